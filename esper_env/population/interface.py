"""Records that pass between `Population` and the engines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from esper_env.config import BoolArray, FloatArray, IntArray


@dataclass(frozen=True)
class Seeds:
    """The seeds of all members, as the population sees them. Arrays are (members, slots)."""

    blueprint: IntArray
    """Index into the registry, -1 where there is none."""
    blend: IntArray
    """Values of `Blend`."""
    alpha: FloatArray
    """Weight in the forward pass, 0 to 1."""
    beta: FloatArray
    """Weight of the gradient that reaches the seed, 0 to 1; 0 means that it does not run."""
    is_isolated: BoolArray
    """Whether the seed's input is detached."""
    is_frozen: BoolArray
    """Whether its parameters keep still."""
    width: IntArray
    """Index of the member's width among the hosts. (members,)."""


@dataclass(frozen=True, kw_only=True)
class SGDSettings:
    """Rules of the optimiser; learning rates are per module."""

    momentum: float = 0.9
    weight_decay: float = 5e-4
    """Of hosts; seeds have none."""
    clip_norm: float = 1.0
    """Largest gradient norm of a module, per batch."""


@dataclass(frozen=True)
class TrainReport:
    """What one env step of training measured."""

    loss: FloatArray
    """Mean training loss. (m,) [nats]."""
    seed_gradient_norms: FloatArray
    """Norm of each tensor's gradient before clipping, root mean square over the batches; NaN where
    there is no such tensor. (m, slots, max_tensors)."""
    is_finite: BoolArray
    """Whether all weights and statistics are finite afterwards. (m,)."""

    @classmethod
    def empty(cls, members: int, slots: int, tensors: int) -> TrainReport:
        """Return a report to be filled in."""
        return cls(
            np.empty(members), np.empty((members, slots, tensors)), np.empty(members, dtype=bool)
        )

    def fill(self, where: BoolArray, part: TrainReport) -> None:
        """Write the report of some members. (m,) bool."""
        for name, array in vars(self).items():
            array[where] = getattr(part, name)


@dataclass(frozen=True)
class Evaluation:
    """Accuracy and loss of some networks on one split. Arrays are (rows,)."""

    accuracy: FloatArray
    loss: FloatArray

    @classmethod
    def empty(cls, rows: int) -> Evaluation:
        """Return a result to be filled in."""
        return cls(np.empty(rows), np.empty(rows))

    def fill(self, where: BoolArray, part: Evaluation) -> None:
        """Write the result of some rows. (rows,) bool."""
        for name, array in vars(self).items():
            array[where] = getattr(part, name)
