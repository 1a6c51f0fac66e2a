"""Scores, reward terms (pure functions of a transition), their potential, and preset weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from esper_env.config import EnvConfig, FloatArray, IntArray, Stage
from esper_env.growth.state import Progress, Scores, Sizes, SlotState, Transition
from esper_env.jit import entry_point, shared

STAGE_POTENTIAL = {
    Stage.DORMANT: 0.0,
    Stage.GERMINATED: 0.1,
    Stage.TRAINING: 0.2,
    Stage.BLENDING: 0.4,
    Stage.HOLDING: 0.6,
    Stage.FOSSILIZED: 1.0,
    Stage.EMBARGOED: 0.0,
}
"""Potential on entering a stage."""

STAGE_PROGRESS = {
    Stage.DORMANT: 0.0,
    Stage.GERMINATED: 0.05,
    Stage.TRAINING: 0.15,
    Stage.BLENDING: 0.15,
    Stage.HOLDING: 0.15,
    Stage.FOSSILIZED: 0.0,
    Stage.EMBARGOED: 0.0,
}
"""What time within the stage adds at most; less than the step to the next stage."""

PROGRESS_HALF_LIFE_STEPS = 4.0
"""Time in a stage after which half of its progress is reached [env steps]."""

_STAGE = np.array([STAGE_POTENTIAL[stage] for stage in Stage])
_PROGRESS = np.array([STAGE_PROGRESS[stage] for stage in Stage])


def compute_scores(
    slots: SlotState, progress: Progress, sizes: Sizes, rent_weight: float
) -> Scores:
    """Compute the scores and the potential of a state; `rent_weight` as in `score`."""
    values = np.empty((3, len(sizes.host)))
    _compute_scores(values, slots, progress, sizes, rent_weight)
    return Scores(*values)


@entry_point
def _compute_scores(
    values: FloatArray, slots: SlotState, progress: Progress, sizes: Sizes, rent_weight: float
) -> None:
    """Write score, committed score and potential. (3, num_envs)."""
    for i in range(len(sizes.host)):
        host = sizes.host[i]
        values[0, i] = score(progress.accuracy[i], sizes.grown[i], host, rent_weight)
        values[1, i] = score(progress.committed_accuracy[i], sizes.committed[i], host, rent_weight)
        values[2, i] = 0.0
        for s in range(slots.stage.shape[1]):
            values[2, i] += slot_potential(slots.stage[i, s], slots.stage_steps[i, s])


@shared
def score(
    accuracy: FloatArray, parameters: IntArray, host_parameters: IntArray | int, rent_weight: float
) -> FloatArray:
    """Return accuracy - rent_weight * log2(1 + parameters / host_parameters).

    Args:
        accuracy: 0 to 1. (num_envs,).
        parameters: Parameters of the seeds that are paid for. (num_envs,).
        host_parameters: Parameters of each host. (num_envs,), or one for all.
        rent_weight: Price per doubling [accuracy].
    """
    return accuracy - rent_weight * np.log2(1.0 + parameters / host_parameters)


def gain(transition: Transition, config: EnvConfig) -> FloatArray:
    """Live score after minus live score before; sums to the live score's rise in an episode."""
    del config
    return transition.after.score - transition.before.score


def commit(transition: Transition, config: EnvConfig) -> FloatArray:
    """Committed minus live score on the last step: what is not fossilized is not kept.

    With `gain` the sum over an episode is the committed score at its end minus the score at its
    start, so there is nothing to farm.
    """
    del config
    difference = transition.after.committed_score - transition.after.score
    return np.where(transition.is_last, difference, 0.0)


def final(transition: Transition, config: EnvConfig) -> FloatArray:
    """Committed score on the last step: the objective itself, all at once."""
    del config
    return np.where(transition.is_last, transition.after.committed_score, 0.0)


def pbrs(transition: Transition, config: EnvConfig) -> FloatArray:
    """Potential-based shaping gamma * Phi(after) - Phi(before), with Phi = 0 at a true terminal.

    Source: Ng, Harada, Russell (1999), theorem 1; terminal rule: Grzes (2017), section 4.
    """
    after = np.where(transition.is_terminated, 0.0, transition.after.potential)
    return config.gamma * after - transition.before.potential


def rollback(transition: Transition, config: EnvConfig) -> FloatArray:
    """Minus `rollback_penalty` on the very transition that was rolled back."""
    return np.where(transition.is_rolled_back, -config.rollback_penalty, 0.0)


TERMS: dict[str, Callable[[Transition, EnvConfig], FloatArray]] = {
    "gain": gain,
    "commit": commit,
    "final": final,
    "pbrs": pbrs,
    "rollback": rollback,
}
"""Terms by name."""


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


@shared
def slot_potential(stage: Any, stage_steps: Any) -> Any:
    """Return Phi of slots, a function of the lifecycle state alone; Phi(s) is their sum.

    Args:
        stage: Values of `Stage`, an array or a number.
        stage_steps: Time in the stage [env steps].

    Returns:
        From 0 to 1.
    """
    share = 1.0 - 0.5 ** (stage_steps / PROGRESS_HALF_LIFE_STEPS)
    return _STAGE[stage] + _PROGRESS[stage] * share
