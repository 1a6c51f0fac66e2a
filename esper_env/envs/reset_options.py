"""Arguments of the vector environment's `reset`, validated before any change of state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from esper_env.config import IntArray


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
    is_first: bool,
) -> ResetRequest:
    """Validate the arguments of `EsperVectorEnv.reset`.

    Args:
        seed: Argument of `reset`.
        options: Argument of `reset`, not changed.
        num_envs: Number of sub-environments.
        num_instances: Number of instances in the configured set.
        is_first: Whether this is the first `reset`.

    Raises:
        gymnasium.error.ResetNeeded: If the first reset does not reset all sub-environments.
        ValueError: If a seed or an option is invalid.
    """
    rest = dict(options or {})
    mask, instance = rest.pop("reset_mask", None), rest.pop("instance", None)
    if rest:
        raise ValueError(
            f"options: expected only 'reset_mask' and 'instance', got also {sorted(rest)}"
        )
    members = np.arange(num_envs) if mask is None else _members_of(mask, num_envs, is_first)
    if instance is not None:
        instance = _check_instance(instance, num_envs, num_instances)[members]
    return ResetRequest(members, _check_seeds(seed, num_envs), instance)


def _check_seeds(seed: Any, num_envs: int) -> list[int | None]:
    """Return a random seed or None for each sub-environment."""
    if seed is None:
        return [None] * num_envs
    if isinstance(seed, (int, np.integer)):
        seeds: list[Any] = [int(seed) + i for i in range(num_envs)]
    else:
        seeds = list(seed)
    if len(seeds) != num_envs:
        raise ValueError(f"seed: expected one integer or {num_envs} entries, got {len(seeds)}")
    for value in seeds:
        is_seed = value is None or (isinstance(value, (int, np.integer)) and value >= 0)
        if not is_seed:
            raise ValueError(f"seed: expected non-negative integers, got {value!r}")
    return [None if value is None else int(value) for value in seeds]


def _check_instance(instance: Any, num_envs: int, num_instances: int) -> IntArray:
    """Return the index of an instance for each sub-environment. (num_envs,) int64."""
    array = np.asarray(instance)
    is_integer = np.issubdtype(array.dtype, np.integer) and array.shape in ((), (num_envs,))
    if not is_integer or ((array < 0) | (array >= num_instances)).any():
        raise ValueError(
            f"options['instance']: expected integers from 0 to {num_instances - 1}, one or "
            f"({num_envs},) of them, got {instance!r}; `instances` selects the set that they index"
        )
    return np.broadcast_to(array, (num_envs,)).astype(np.int64)


def _members_of(mask: Any, num_envs: int, is_first: bool) -> IntArray:
    """Return the indices of the sub-environments that a reset mask selects. (m,) int64."""
    array = np.asarray(mask)
    if array.dtype != np.bool_ or array.shape != (num_envs,) or not array.any():
        raise ValueError(
            f"reset_mask: expected bool of shape ({num_envs},) with at least one True, "
            f"got {array!r}"
        )
    if is_first and not array.all():
        raise gym.error.ResetNeeded(
            "the first reset must reset all sub-environments; call it without reset_mask"
        )
    return np.nonzero(array)[0]
