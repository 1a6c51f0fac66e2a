"""What is remembered of an episode so that it can be shown: one row per env step.

Recording costs a few array assignments per env step, so it is done whether or not anybody looks,
and a saved state can be shown by an environment with another render mode.
"""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from esper_env.config import IntArray
from esper_env.jit import entry_point, record_type


@dataclass
class Trace:
    """The course of every member's present episode; row 0 is the state after the reset.

    Arrays are (num_envs, episode_steps + 1) unless stated; rows from `length` on are blank.
    """

    length: IntArray
    """Rows recorded so far: env steps done, and one. (num_envs,)."""
    stage: npt.NDArray[np.int8]
    """Values of `Stage` after the step. (num_envs, episode_steps + 1, num_slots)."""
    alpha: npt.NDArray[np.float32]
    """Blend weights, 0 to 1. (num_envs, episode_steps + 1, num_slots)."""
    blueprint: npt.NDArray[np.int16]
    """Index into the registry, -1 without a seed. (num_envs, episode_steps + 1, num_slots)."""
    accuracy: npt.NDArray[np.float32]
    """Of the live network, 0 to 1."""
    committed_accuracy: npt.NDArray[np.float32]
    """Of the network with only its fossilized seeds, 0 to 1."""
    score: npt.NDArray[np.float32]
    """Of the live network [accuracy]."""
    committed_score: npt.NDArray[np.float32]
    """Of the network with only its fossilized seeds [accuracy]."""
    parameters: npt.NDArray[np.int64]
    """Of all seeds; the host's are not counted."""
    op: npt.NDArray[np.int8]
    """The op that the step began with; WAIT in row 0."""
    op_slot: npt.NDArray[np.int8]
    """The slot it acted on; without meaning for WAIT."""
    rolled_back: npt.NDArray[np.bool_]
    """Whether the step ended in a rollback."""

    @classmethod
    def empty(cls, num_envs: int, num_slots: int, episode_steps: int) -> Trace:
        """Return a trace of nothing."""

        def blank(dtype: type, *shape: int) -> npt.NDArray[Any]:
            return np.zeros((num_envs, episode_steps + 1, *shape), dtype=dtype)

        return cls(
            length=np.zeros(num_envs, dtype=np.int64),
            stage=blank(np.int8, num_slots),
            alpha=blank(np.float32, num_slots),
            blueprint=blank(np.int16, num_slots),
            accuracy=blank(np.float32),
            committed_accuracy=blank(np.float32),
            score=blank(np.float32),
            committed_score=blank(np.float32),
            parameters=blank(np.int64),
            op=blank(np.int8),
            op_slot=blank(np.int8),
            rolled_back=blank(np.bool_),
        )

    def begin(self, members: IntArray) -> None:
        """Forget the episodes of members that start a new one."""
        for array in vars(self).values():
            array[members] = 0

    def record(self, members: IntArray, **values: npt.NDArray[Any]) -> None:
        """Add a row for some members.

        Args:
            members: Indices of those that were reset or took a step. (m,) integers.
            **values: Every field but `length`, of all members. (num_envs, ...).
        """
        _record(_Trace(*vars(self).values()), members, _Row(**values))

    def course(self, member: int) -> Trace:
        """Return views of one member's rows so far: the same fields without the member axis."""
        end = int(self.length[member])
        rows = {name: array[member, :end] for name, array in vars(self).items() if name != "length"}
        return dataclasses.replace(self, length=self.length[member], **rows)


_Trace = record_type("_Trace", __name__, Trace)
_Row = namedtuple(
    "_Row",
    "stage alpha blueprint accuracy committed_accuracy score committed_score parameters op op_slot "
    "rolled_back",
)


@entry_point
def _record(trace: Any, members: IntArray, row: Any) -> None:
    for i in members:
        at = trace.length[i]
        for s in range(row.stage.shape[1]):
            trace.stage[i, at, s] = row.stage[i, s]
            trace.alpha[i, at, s] = row.alpha[i, s]
            trace.blueprint[i, at, s] = row.blueprint[i, s]
        trace.accuracy[i, at] = row.accuracy[i]
        trace.committed_accuracy[i, at] = row.committed_accuracy[i]
        trace.score[i, at] = row.score[i]
        trace.committed_score[i, at] = row.committed_score[i]
        trace.parameters[i, at] = row.parameters[i]
        trace.op[i, at] = row.op[i]
        trace.op_slot[i, at] = row.op_slot[i]
        trace.rolled_back[i, at] = row.rolled_back[i]
        trace.length[i] += 1
