"""Instances: training conditions of an episode, chosen so that no fixed schedule is best for all.

The sets "train" and "test" are sampled from two separate random streams, so they are disjoint and
the same for every user. The observation includes the learning rate, the share of training data and
the width of an instance, but not its label noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from esper_env.config import FloatArray, IntArray
from esper_env.jit import shared
from esper_env.rng import make_key, uniform

SET_SIZES = {"default": 1, "train": 100, "test": 20}
"""Number of instances in each set, unless the ranges say otherwise."""
_SET_KEYS = {"train": 1, "test": 2}


@dataclass(frozen=True, kw_only=True)
class InstanceRanges:
    """Ranges that a task's instances are sampled from; a pair is the lowest and highest value."""

    learning_rate: tuple[float, float] = (0.01, 0.1)
    """Learning rate of the host at the start of an episode, log-uniform."""
    train_fraction: tuple[float, float] = (0.1, 1.0)
    """Share of the training split in use, log-uniform."""
    label_noise: tuple[float, float] = (0.0, 0.3)
    """Share of the training labels that are wrong, uniform."""
    compute: tuple[float, float] = (1.0, 1.0)
    """Compute budget with `clock="flops"`, log-uniform [multiples of `episode_steps` x
    `batches_per_step` batches of the host without seeds]."""
    widths: tuple[float, ...] = (0.5, 0.75, 1.0)
    """Factors on the channels of every block of the host; each is equally likely."""
    test_size: int = SET_SIZES["test"]
    """Number of instances in the set "test"."""

    def set_size(self, name: str) -> int:
        """Return the number of instances in a set."""
        return self.test_size if name == "test" else SET_SIZES[name]


@dataclass(frozen=True, kw_only=True)
class Instances:
    """A set of instances. Arrays have shape (n,)."""

    learning_rate: FloatArray
    """Learning rate of the host at the start of an episode."""
    train_fraction: FloatArray
    """Share of the training split in use, 0 to 1."""
    train_start: FloatArray
    """Start of that share in the shuffled split, 0 to 1; it wraps around at the end."""
    label_noise: FloatArray
    """Share of the training labels that are wrong, 0 to 1."""
    compute: FloatArray
    """Compute budget with `clock="flops"`; see `InstanceRanges`."""
    width: IntArray
    """Index into `widths`."""
    widths: tuple[float, ...]
    """Factors on the channels of every block of the host, in ascending order."""

    def __len__(self) -> int:
        """Return the number of instances."""
        return len(self.learning_rate)


def make_instances(name: str, ranges: InstanceRanges, learning_rate: float) -> Instances:
    """Return a set of instances.

    Args:
        name: "default" for one instance with the whole split, no label noise and the full width;
            "train" or "test" for instances sampled from `ranges`.
        ranges: Ranges to sample from.
        learning_rate: Learning rate of the default instance.
    """
    if name == "default":
        one = np.ones(1)
        return Instances(
            learning_rate=learning_rate * one,
            train_fraction=one,
            train_start=0 * one,
            label_noise=0 * one,
            compute=one,
            width=np.zeros(1, dtype=np.int64),
            widths=(1.0,),
        )
    key = make_key(_SET_KEYS[name], np.arange(ranges.set_size(name)))
    u = uniform(key, 6).T
    return Instances(
        learning_rate=_log_uniform(u[0], ranges.learning_rate),
        train_fraction=_log_uniform(u[1], ranges.train_fraction),
        train_start=u[2],
        label_noise=_uniform(u[3], ranges.label_noise),
        compute=_log_uniform(u[5], ranges.compute),
        width=(u[4] * len(ranges.widths)).astype(np.int64),
        widths=ranges.widths,
    )


@shared
def images_in_use(total: int, train_fraction: float, train_start: float) -> tuple[int, int]:
    """Return how many images of a split an instance uses, and the first; they wrap around."""
    return max(int(np.rint(train_fraction * total)), 1), int(train_start * total)


def _uniform(u: FloatArray, limits: tuple[float, float]) -> FloatArray:
    low, high = limits
    return low + (high - low) * u


def _log_uniform(u: FloatArray, limits: tuple[float, float]) -> FloatArray:
    low, high = np.log(limits)
    values: FloatArray = np.exp(low + (high - low) * u)
    return values
