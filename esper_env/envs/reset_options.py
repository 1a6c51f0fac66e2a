"""Arguments of the vector environment's `reset`, validated before any change of state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from esper_env.config import IntArray
from esper_env.growth.action_space import as_array


@dataclass(frozen=True)
class ResetRequest:
    """Validated arguments of `reset`."""

    members: IntArray
    """Indices of the sub-environments to reset. (m,) int64."""
    seeds: list[int | None]
    """Random seed of each sub-environment; None keeps its current random stream. (num_envs,)."""
    instance: IntArray | None
    """Index of the instance of each entry of `members`, (m,) int64. None samples them."""


def check_reset(
    seed: Any,
    options: dict[str, Any] | None,
    *,
    num_envs: int,
    num_instances: int,
    must_reset_all: str | None,
) -> ResetRequest:
    """Validate the arguments of `EsperVectorEnv.reset`.

    Args:
        seed: Argument of `reset`.
        options: Argument of `reset`, not changed.
        num_envs: Number of sub-environments.
        num_instances: Number of instances in the configured set.
        must_reset_all: Why all sub-environments must be reset, None if they need not.

    Raises:
        gymnasium.error.ResetNeeded: If all sub-environments must be reset and the mask excludes
            some.
        ValueError: If a seed or an option is invalid.
    """
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"options: expected a dictionary or None, got {options!r}")
    rest = dict(options or {})
    mask, instance = rest.pop("reset_mask", None), rest.pop("instance", None)
    if rest:
        raise ValueError(
            f"options: expected only 'reset_mask' and 'instance', got also {list(rest)}"
        )
    members = np.arange(num_envs) if mask is None else _members_of(mask, num_envs, must_reset_all)
    if instance is not None:
        instance = _check_instance(instance, num_envs, num_instances)[members]
    return ResetRequest(members, _check_seeds(seed, num_envs), instance)


def _check_seeds(seed: Any, num_envs: int) -> list[int | None]:
    """Return a random seed or None for each sub-environment."""
    if seed is None:
        return [None] * num_envs
    if _is_integer(seed):
        seeds: list[Any] = [int(seed) + i for i in range(num_envs)]
    elif isinstance(seed, (list, tuple)) or (isinstance(seed, np.ndarray) and seed.ndim == 1):
        seeds = list(seed)
    else:
        raise ValueError(f"seed: expected None, an integer or {num_envs} of them, got {seed!r}")
    if len(seeds) != num_envs:
        raise ValueError(f"seed: expected one integer or {num_envs} entries, got {len(seeds)}")
    for value in seeds:
        if value is not None and (not _is_integer(value) or value < 0):
            raise ValueError(f"seed: expected non-negative integers, got {value!r}")
    return [None if value is None else int(value) for value in seeds]


def _check_instance(instance: Any, num_envs: int, num_instances: int) -> IntArray:
    """Return the index of an instance for each sub-environment. (num_envs,) int64."""
    array = as_array(instance)
    is_integer = np.issubdtype(array.dtype, np.integer) and array.shape in ((), (num_envs,))
    if not is_integer or ((array < 0) | (array >= num_instances)).any():
        raise ValueError(
            f"options['instance']: expected integers from 0 to {num_instances - 1}, one or "
            f"({num_envs},) of them, got {instance!r}; `instances` selects the set that they index"
        )
    return np.broadcast_to(array, (num_envs,)).astype(np.int64)


def _members_of(mask: Any, num_envs: int, must_reset_all: str | None) -> IntArray:
    """Return the indices of the sub-environments that a reset mask selects. (m,) int64."""
    array = as_array(mask)
    if array.dtype != np.bool_ or array.shape != (num_envs,) or not array.any():
        raise ValueError(
            f"reset_mask: expected bool of shape ({num_envs},) with at least one True, "
            f"got {array!r}"
        )
    if must_reset_all is not None and not array.all():
        raise gym.error.ResetNeeded(
            f"{must_reset_all}, so this reset must reset all sub-environments; call it without "
            "reset_mask"
        )
    return np.nonzero(array)[0]


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
