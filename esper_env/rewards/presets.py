"""Reward presets: tables of weights over the terms."""

from __future__ import annotations

import numpy as np

from esper_env.config import EnvConfig, FloatArray
from esper_env.rewards.terms import TERMS, Transition

PRESETS: dict[str, dict[str, float]] = {
    "gain": {"gain": 1.0, "commit": 1.0, "pbrs": 0.0, "rollback": 1.0},
    "sparse": {"final": 1.0, "pbrs": 0.0, "rollback": 1.0},
}
"""Weights by preset; `EnvConfig.reward_weights` replaces single ones."""


def resolve_weights(config: EnvConfig) -> dict[str, float]:
    """Return the weight of every term of the configured preset.

    Raises:
        ValueError: If the preset or a term is unknown, or a weight is not finite.
    """
    if config.reward not in PRESETS:
        raise ValueError(f"reward: expected one of {sorted(PRESETS)}, got {config.reward!r}")
    for name, weight in config.reward_weights.items():
        if name not in TERMS:
            raise ValueError(f"reward_weights: expected terms among {sorted(TERMS)}, got {name!r}")
        if not np.isfinite(weight):
            raise ValueError(f"reward_weights[{name!r}]: expected a finite number, got {weight!r}")
    return {**PRESETS[config.reward], **config.reward_weights}


def compute_reward(
    transition: Transition, weights: dict[str, float], config: EnvConfig
) -> tuple[FloatArray, dict[str, FloatArray]]:
    """Return the reward and its weighted terms.

    Args:
        transition: State before and after.
        weights: From `resolve_weights`.
        config: For gamma.

    Returns:
        reward (num_envs,) float64, and each term's part of it by name; the parts sum to it. A term
        of weight 0 is not worked out.
    """
    shape, terms = transition.is_last.shape, {}
    reward = np.zeros(shape)
    for name, weight in weights.items():
        terms[name] = weight * TERMS[name](transition, config) if weight else np.zeros(shape)
        reward += terms[name]
    return reward, terms
