"""Record of the current episode for rendering: one row per env step.

Recording costs a few array assignments per env step, so it is done in every render mode, and a
saved state can be rendered by an environment with another render mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from esper_env.config import IntArray
from esper_env.growth.state import blank


class Course(NamedTuple):
    """Fields recorded for rendering. Arrays are (steps,) of one episode unless stated."""

    stage: npt.NDArray[np.int8]
    """Values of `Stage` after the step. (steps, num_slots)."""
    alpha: npt.NDArray[np.float32]
    """Blend weights, 0 to 1. (steps, num_slots)."""
    blueprint: npt.NDArray[np.int16]
    """Index into the registry, -1 without a seed. (steps, num_slots)."""
    accuracy: npt.NDArray[np.float32]
    """Validation accuracy of the live network, 0 to 1."""
    committed_accuracy: npt.NDArray[np.float32]
    """Validation accuracy with only the fossilized seeds, 0 to 1."""
    score: npt.NDArray[np.float32]
    """Score of the live network [accuracy]."""
    committed_score: npt.NDArray[np.float32]
    """Score with only the fossilized seeds [accuracy]."""
    parameters: npt.NDArray[np.int64]
    """Parameters of all seeds, without the host."""
    op: npt.NDArray[np.int8]
    """Values of `Op`; WAIT in row 0."""
    op_slot: npt.NDArray[np.int8]
    """Slot that the op acted on; without meaning for WAIT."""
    rolled_back: npt.NDArray[np.bool_]
    """Whether the step ended in a rollback."""


class History:
    """Course of every sub-environment's current episode; row 0 is the state after the reset.

    Args:
        num_envs: Number of sub-environments.
        num_slots: Slots of the host.
        episode_steps: Length of an episode [env steps].
    """

    def __init__(self, num_envs: int, num_slots: int, episode_steps: int) -> None:
        rows = (episode_steps + 1,)
        per_slot = dict.fromkeys(("stage", "alpha", "blueprint"), (*rows, num_slots))
        self.length: IntArray = np.zeros(num_envs, dtype=np.int64)
        """Rows recorded so far: completed env steps, and one. (num_envs,)."""
        self.rows: Course = blank(Course, num_envs, rows, shapes=per_slot)
        """Recorded rows, then blank ones. (num_envs, episode_steps + 1, ...)."""

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return every array by a unique name. No copies."""
        rows = self.rows._asdict()
        return {"history.length": self.length} | {f"history.{n}": rows[n] for n in rows}

    def begin(self, members: IntArray) -> None:
        """Clear the rows of sub-environments that start a new episode."""
        for array in self.arrays().values():
            array[members] = 0

    def record(self, members: IntArray, info: Mapping[str, Any], op_slot: IntArray) -> None:
        """Append the current state of some sub-environments.

        Args:
            members: Indices of those that were reset or took a step. (m,).
            info: Info of all sub-environments, which has every other field by its name.
            op_slot: Slot that each one's op acted on. (num_envs,).
        """
        at = self.length[members]
        for name, rows in self.rows._asdict().items():
            values = op_slot if name == "op_slot" else info[name]
            rows[members, at] = values[members]
        self.length[members] += 1

    def course(self, member: int) -> Course:
        """Return views of one sub-environment's rows so far."""
        end = int(self.length[member])
        return Course(**{n: array[member, :end] for n, array in self.rows._asdict().items()})
