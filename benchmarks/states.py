"""Environments with slots in a given state, for speed benchmarks.

- "empty": no seeds.
- "mix": a seed in every slot, in random stages. Blueprints and styles occur about equally often, so
  that the work per member is the same for large numbers of members.
- "mix + leave-one-out": "mix", with contributions measured in every step.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from esper_env import EsperVectorEnv, Op
from esper_env.config import IntArray

EPISODE_STEPS = 20_000
"""Length of an episode, more than any benchmark runs [env steps]."""
MODES = ("empty", "mix", "mix + leave-one-out")


def settings_of(mode: str, batch_size: int | None = None) -> dict[str, Any]:
    """Return the keyword arguments of `gym.make` and `gym.make_vec` for a mode."""
    options: dict[str, Any] = {} if batch_size is None else {"batch_size": batch_size}
    attribution = "leave_one_out" if mode.endswith("leave-one-out") else "none"
    return {"attribution": attribution, "episode_steps": EPISODE_STEPS, **options}


def make_envs(env_id: str, num_envs: int, **settings: Any) -> EsperVectorEnv:
    """Make a vector environment without resetting it."""
    envs = gym.make_vec(env_id, num_envs=num_envs, **settings).unwrapped
    assert isinstance(envs, EsperVectorEnv)
    return envs


def grow(envs: EsperVectorEnv, mode: str, seed: int) -> list[IntArray]:
    """Reset an environment and bring its slots into the state of a mode.

    Returns:
        Actions taken, which have the same effect in other environments with the same seed.
        (num_envs, heads) each.
    """
    num_envs = envs.num_envs
    envs.reset(seed=seed)
    if not mode.startswith("mix"):
        return []
    taken: list[IntArray] = []
    rng = np.random.default_rng(seed)
    for slot in envs.heads[1].options:
        drawn = [rng.permutation(np.arange(num_envs) % len(head.options)) for head in envs.heads]
        actions = np.stack(drawn, axis=1)
        actions[:, :2] = Op.GERMINATE, slot
        actions[:, 6:] = 0
        envs.step(actions)
        taken.append(actions)
    for _ in range(12):
        masks = envs.conditional_masks()["slot"][:, Op.ADVANCE]
        chosen = masks.any(axis=1) & (rng.random(num_envs) < 0.2)
        actions = np.zeros((num_envs, len(envs.heads)), dtype=np.int64)
        actions[chosen, 0], actions[chosen, 1] = Op.ADVANCE, masks.argmax(axis=1)[chosen]
        envs.step(actions)
        taken.append(actions)
    return taken
