"""Records that `Population` and the engines exchange."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from esper_env.config import BoolArray, FloatArray, IntArray
from esper_env.population.images import Draw, ImageSet


@dataclass(frozen=True)
class Seeds:
    """Seeds of all members. Arrays have shape (members, slots) unless stated."""

    blueprint: IntArray
    """Index into the registry, -1 where the slot has no seed."""
    blend: IntArray
    """Values of `Blend`."""
    alpha: FloatArray
    """Blend weight in the forward pass, 0 to 1."""
    beta: FloatArray
    """Weight of the seed's gradient, 0 to 1; a seed with 0 does not run in training."""
    is_isolated: BoolArray
    """Whether the seed's input is detached."""
    is_frozen: BoolArray
    """Whether the seed's parameters are frozen."""
    width: IntArray
    """Index of the member's width in the list of hosts. (members,)."""


@dataclass(frozen=True, kw_only=True)
class SGDSettings:
    """Optimizer settings. Each call of `Population.train` passes the learning rates."""

    momentum: float = 0.9
    """Momentum coefficient."""
    weight_decay: float = 5e-4
    """L2 penalty on the parameters of hosts; seeds have none."""
    clip_norm: float = 1.0
    """Maximum gradient norm of a module (the host or one seed) in each batch."""


class Training(NamedTuple):
    """One env step of training for m members."""

    members: IntArray
    """Members to train. (m,)."""
    seeds: Seeds
    """Seeds of the whole population."""
    images: ImageSet
    """The training split."""
    draw: Draw
    """Samples of each batch for these members."""
    host_rate: FloatArray
    """Learning rate of each member's host. (m,)."""
    seed_rate: FloatArray
    """Learning rate of each member's seeds. (m,)."""

    def of(self, part: slice | BoolArray) -> Training:
        """Return the training of some of the members. The mask is (m,) bool."""
        rates = self.host_rate[part], self.seed_rate[part]
        return Training(self.members[part], self.seeds, self.images, self.draw.of(part), *rates)


class TrainReport(NamedTuple):
    """Measurements of one env step of training for m members."""

    loss: FloatArray
    """Mean training loss. (m,) [nats]."""
    seed_gradient_norms: FloatArray
    """L2 norm of each seed tensor's gradient before clipping, root mean square over the batches;
    NaN where a tensor does not exist, infinite where a gradient is NaN. (m, slots, max_tensors)."""
    host_gradient_norm: FloatArray
    """L2 norm of the host's gradient before clipping, root mean square over the batches; infinite
    where a gradient is NaN. (m,)."""
    is_finite: BoolArray
    """Whether all parameters and running statistics are finite after training. (m,)."""


class Exam(NamedTuple):
    """Images of a split that each member is evaluated on, and their labels.

    Every member that is evaluated has at least one image. Padding is at the end of a row only.
    """

    indices: IntArray
    """Indices into the split, 0 for padding. (members, most) int64."""
    labels: IntArray
    """Labels of these images, -1 for padding. (members, most) int64."""

    def num_images(self, members: IntArray) -> IntArray:
        """Return how many images each of some members has. Both are (m,)."""
        result: IntArray = np.count_nonzero(self.labels[members] >= 0, axis=1)
        return result


class Evaluation(NamedTuple):
    """Accuracy and loss of some networks. Arrays have shape (rows,)."""

    accuracy: FloatArray
    """Share of images that are classified correctly, 0 to 1."""
    loss: FloatArray
    """Mean cross-entropy [nats]."""
