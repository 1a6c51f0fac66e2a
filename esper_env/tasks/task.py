"""Records of a task: its host and the splits of its data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from esper_env.config import IntArray
from esper_env.population.hosts import Host
from esper_env.population.images import ImageSet
from esper_env.tasks.instances import InstanceRanges
from esper_env.tasks.regimes import Regimes


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Three disjoint splits of one data set."""

    train: ImageSet
    """Images that members train on."""
    validation: ImageSet
    """Images that observations, gates and rewards are computed from, the same for all members."""
    test: ImageSet
    """Images evaluated only at the end of an episode, for `info["test_accuracy"]`."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A host and the data that it is trained on. The first reset reads the data."""

    host: Host
    """Shape of the host."""
    load: Callable[[str | None], Splits]
    """Maps `EnvConfig.data_dir` to the data."""
    augments: bool = False
    """Whether training images are shifted by up to 4 pixels and mirrored at random."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of this task that differ from those of `EnvConfig`, by field."""
    regimes: Regimes | None = None
    """Kinds of problems of an episode; None for one kind, all images of the splits."""
    levels: int = 1
    """Levels of distortion in the splits: copies of all images, one level after the other."""
    ranges: InstanceRanges = field(default_factory=InstanceRanges)
    """Ranges that the instances are sampled from."""


def first_level(labels: Tensor, levels: int) -> IntArray:
    """Return the labels of the images without distortion, the first of some levels."""
    array: IntArray = labels.cpu().numpy()
    return array[: len(array) // levels]


@functools.cache
def load_splits(load: Callable[[str | None], Splits], data_dir: str | None, device: str) -> Splits:
    """Return a task's data on a device. Each process reads it once per device.

    Raises:
        TypeError: If `load` does not return splits.
    """
    splits: object = load(data_dir)
    if not isinstance(splits, Splits):
        raise TypeError(
            f"load: expected Splits from the function of the task, got {type(splits).__name__}; "
            "return make_splits(...)"
        )
    target = torch.device(device)
    return Splits(
        train=splits.train.to(target),
        validation=splits.validation.to(target),
        test=splits.test.to(target),
    )
