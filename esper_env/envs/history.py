"""Record of the current episode for rendering: one row per env step.

Recording takes a few array assignments per env step. It is always on, so an environment with any
render mode can render a restored state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from esper_env.config import IntArray
from esper_env.growth.state import blank


class Course(NamedTuple):
    """Recorded fields of an episode. Arrays have shape (steps,) unless stated.

    `History.rows` holds them for all sub-environments, with shape (num_envs, episode_steps + 1).
    """

    stage: npt.NDArray[np.int8]
    """Values of `Stage` after the env step. (steps, num_slots)."""
    alpha: npt.NDArray[np.float32]
    """Blend weights, 0 to 1. (steps, num_slots)."""
    blueprint: npt.NDArray[np.int16]
    """Index of the registered blueprint, -1 in a slot without a seed. (steps, num_slots)."""
    accuracy: npt.NDArray[np.float32]
    """Validation accuracy of the live network, 0 to 1."""
    committed_accuracy: npt.NDArray[np.float32]
    """Validation accuracy of the committed network, 0 to 1."""
    score: npt.NDArray[np.float32]
    """Score of the live network [accuracy]."""
    committed_score: npt.NDArray[np.float32]
    """Score of the committed network [accuracy]."""
    parameters: npt.NDArray[np.int64]
    """Parameters of all seeds, without those of the host."""
    op: npt.NDArray[np.int8]
    """Op of the env step, values of `Op`; WAIT in row 0."""
    op_slot: npt.NDArray[np.int8]
    """Slot of the op; unused for WAIT."""
    rolled_back: npt.NDArray[np.bool_]
    """Whether the env step included a rollback."""


class History:
    """Recorded rows of the current episode of every sub-environment.

    Row 0 is the state after the reset.

    Args:
        num_envs: Number of sub-environments.
        num_slots: Number of slots of the host.
        episode_steps: Length of an episode [env steps].
    """

    def __init__(self, num_envs: int, num_slots: int, episode_steps: int) -> None:
        rows = (episode_steps + 1,)
        per_slot = dict.fromkeys(("stage", "alpha", "blueprint"), (*rows, num_slots))
        self.length: IntArray = np.zeros(num_envs, dtype=np.int64)
        """Number of recorded rows: completed env steps + 1. (num_envs,) int64."""
        self.rows: Course = blank(Course, num_envs, rows, shapes=per_slot)
        """Recorded rows, followed by zeros. (num_envs, episode_steps + 1, ...)."""

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return every array, not copied, by its unique name."""
        rows = self.rows._asdict()
        return {"history.length": self.length} | {f"history.{n}": rows[n] for n in rows}

    def begin(self, members: IntArray) -> None:
        """Clear the rows of sub-environments that start an episode; `members` is (m,) int64."""
        for array in self.arrays().values():
            array[members] = 0

    def record(self, members: IntArray, info: Mapping[str, Any], op_slot: IntArray) -> None:
        """Append a row with the current state of some sub-environments.

        Args:
            members: Indices of the sub-environments that were reset or stepped. (m,) int64.
            info: Info of all sub-environments. It contains every field of `Course` but `op_slot`.
            op_slot: Slot of the op of each sub-environment. (num_envs,) int64.
        """
        at = self.length[members]
        for name, rows in self.rows._asdict().items():
            values = op_slot if name == "op_slot" else info[name]
            rows[members, at] = values[members]
        self.length[members] += 1

    def course(self, member: int) -> Course:
        """Return the recorded rows of one sub-environment, as views."""
        end = int(self.length[member])
        return Course(**{n: array[member, :end] for n, array in self.rows._asdict().items()})
