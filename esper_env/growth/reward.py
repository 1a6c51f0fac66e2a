"""Reward: scores, terms, the potential for shaping, and presets of weights.

Every term is a pure function of a transition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from esper_env.config import EnvConfig, FloatArray, IntArray, Stage, near
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
"""Potential of a slot that has just entered the stage."""

STAGE_PROGRESS = {
    Stage.DORMANT: 0.0,
    Stage.GERMINATED: 0.05,
    Stage.TRAINING: 0.15,
    Stage.BLENDING: 0.15,
    Stage.HOLDING: 0.15,
    Stage.FOSSILIZED: 0.0,
    Stage.EMBARGOED: 0.0,
}
"""Maximum that time in the stage adds to the potential; less than entering the next stage adds."""

PROGRESS_HALF_LIFE_STEPS = 4.0
"""Time in a stage that adds half of its `STAGE_PROGRESS` [env steps]."""

_STAGE = np.array([STAGE_POTENTIAL[stage] for stage in Stage])
_PROGRESS = np.array([STAGE_PROGRESS[stage] for stage in Stage])


def compute_scores(slots: SlotState, progress: Progress, sizes: Sizes, config: EnvConfig) -> Scores:
    """Compute the scores and the potential of a state.

    Args:
        slots: State of the slots.
        progress: Source of the accuracies.
        sizes: Numbers of parameters of the networks.
        config: Source of `rent_weight` and `objective`.
    """
    values = np.empty((3, len(sizes.host)))
    _compute_scores(values, slots, progress, sizes, config.rent_weight)
    score, committed, potential = values
    if config.objective == "anytime":
        earned = progress.earned.copy()
        return Scores(score, earned, earned, potential)
    return Scores(score, committed, score, potential)


@entry_point
def _compute_scores(
    values: FloatArray, slots: SlotState, progress: Progress, sizes: Sizes, rent_weight: float
) -> None:
    """Write score, committed score and potential, the rows of `values`. (3, num_envs) float64."""
    for i in range(len(sizes.host)):
        host = sizes.host[i]
        values[0, i] = score(progress.accuracy[i], sizes.charged[i], host, rent_weight)
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
        accuracy: Validation accuracy of the network, 0 to 1. (num_envs,) float64.
        parameters: Parameters of its seeds. (num_envs,) int64.
        host_parameters: Parameters of its host. (num_envs,) int64, or one number for all.
        rent_weight: Price of growth [accuracy per doubling of the parameters].
    """
    return accuracy - rent_weight * np.log2(1.0 + parameters / host_parameters)


def gain(transition: Transition, config: EnvConfig) -> FloatArray:
    """What the episode has earned after the env step minus what it had earned before it.

    With `objective="final"` this is the change of the live score, so the sum over an episode is the
    final live score minus the initial one. With `objective="anytime"` it is the live score divided
    by `episode_steps`, so the sum is the objective.
    """
    del config
    return transition.after.earned - transition.before.earned


def commit(transition: Transition, config: EnvConfig) -> FloatArray:
    """Committed score minus live score in the last env step of an episode, 0 before it.

    The sum of `gain` and `commit` over an episode is the final committed score minus the initial
    score. Seeds that are not fossilized add nothing to it. With `objective="anytime"` it is 0.
    """
    del config
    difference = transition.after.committed_score - transition.after.earned
    return np.where(transition.is_last, difference, 0.0)


def final(transition: Transition, config: EnvConfig) -> FloatArray:
    """Objective of the episode in its last env step, 0 before it."""
    del config
    return np.where(transition.is_last, transition.after.committed_score, 0.0)


def pbrs(transition: Transition, config: EnvConfig) -> FloatArray:
    """Potential-based shaping gamma * Phi(after) - Phi(before); Phi is 0 after a termination.

    Source: Ng, Harada, Russell (1999), theorem 1; Grzes (2017), section 4, for terminations.
    """
    after = np.where(transition.is_terminated, 0.0, transition.after.potential)
    return config.gamma * after - transition.before.potential


def rollback(transition: Transition, config: EnvConfig) -> FloatArray:
    """Minus `rollback_penalty` in an env step with a rollback, 0 in the others."""
    return np.where(transition.is_rolled_back, -config.rollback_penalty, 0.0)


TERMS: dict[str, Callable[[Transition, EnvConfig], FloatArray]] = {
    "gain": gain,
    "commit": commit,
    "final": final,
    "pbrs": pbrs,
    "rollback": rollback,
}
"""Reward terms by name."""


PRESETS: dict[str, dict[str, float]] = {
    "gain": {"gain": 1.0, "commit": 1.0, "pbrs": 0.0, "rollback": 1.0},
    "sparse": {"final": 1.0, "pbrs": 0.0, "rollback": 1.0},
}
"""Weights of the terms, by preset; `EnvConfig.reward_weights` replaces single weights."""


def resolve_weights(config: EnvConfig) -> dict[str, float]:
    """Return the weights of the configured preset, updated with `reward_weights`.

    Raises:
        ValueError: If the preset or a term is unknown, or a weight is not finite.
    """
    if config.reward not in PRESETS:
        raise ValueError(
            f"reward: expected one of {sorted(PRESETS)}, got {config.reward!r}"
            f"{near(config.reward, PRESETS)}"
        )
    for name, weight in config.reward_weights.items():
        if name not in TERMS:
            raise ValueError(
                f"reward_weights: expected terms among {sorted(TERMS)}, got {name!r}"
                f"{near(name, TERMS)}"
            )
        if not np.isfinite(weight):
            raise ValueError(f"reward_weights[{name!r}]: expected a finite number, got {weight!r}")
    return {**PRESETS[config.reward], **config.reward_weights}


def compute_reward(
    transition: Transition, weights: dict[str, float], config: EnvConfig
) -> tuple[FloatArray, dict[str, FloatArray]]:
    """Compute the reward and its weighted terms.

    Args:
        transition: Scores before and after the env step, and how it ended.
        weights: Weights returned by `resolve_weights`.
        config: Source of `gamma` and `rollback_penalty`.

    Returns:
        Reward, (num_envs,) float64, and the weighted terms by name, (num_envs,) float64 each. The
        reward is the sum of the terms. A term with weight 0 is not computed and is all 0.
    """
    shape, terms = transition.is_last.shape, {}
    reward = np.zeros(shape)
    for name, weight in weights.items():
        terms[name] = weight * TERMS[name](transition, config) if weight else np.zeros(shape)
        reward += terms[name]
    return reward, terms


@shared
def slot_potential(stage: Any, stage_steps: Any) -> Any:
    """Return the potential of slots. The potential Phi of a state is the sum over its slots.

    Args:
        stage: Values of `Stage`, an array or a number.
        stage_steps: Time in the stage [env steps], of the same shape.

    Returns:
        Potential of each slot, 0 to 1.
    """
    share = 1.0 - 0.5 ** (stage_steps / PROGRESS_HALF_LIFE_STEPS)
    return _STAGE[stage] + _PROGRESS[stage] * share
