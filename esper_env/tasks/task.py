"""What a task consists of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from esper_env.population.hosts import Host
from esper_env.population.images import ImageSet
from esper_env.tasks.instances import InstanceRanges


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Three disjoint splits of one data set."""

    train: ImageSet
    validation: ImageSet
    """All that the agent, the gates and the reward may see; the same for all members."""
    test: ImageSet
    """Seen only at the end of an episode, in `info["test_accuracy"]`."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A host and the data it is trained on; the data is read at the first reset, not before."""

    host: Host
    load: Callable[[str | None], Splits]
    """From `EnvConfig.data_dir` to the data."""
    augments: bool = False
    """Whether training images are shifted by up to 4 pixels and mirrored at random."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `EnvConfig` that have another default for this task."""
    ranges: InstanceRanges = field(default_factory=InstanceRanges)
    """Where the instances are drawn from."""


@functools.cache
def load_splits(load: Callable[[str | None], Splits], data_dir: str | None, device: str) -> Splits:
    """Read a task's data once per process and device."""
    splits = load(data_dir)
    target = torch.device(device)
    return Splits(
        train=splits.train.to(target),
        validation=splits.validation.to(target),
        test=splits.test.to(target),
    )
