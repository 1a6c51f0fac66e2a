"""Scores, reward terms (pure functions of a transition), their potential, and preset weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from esper_env.config import BoolArray, EnvConfig, FloatArray, IntArray, Stage
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


@dataclass(frozen=True)
class Standing:
    """What the reward needs to know of a state. All arrays have shape (num_envs,)."""

    score: FloatArray
    """Live score: all seeds count and are paid for."""
    committed_score: FloatArray
    """Score of the network with only its fossilized seeds."""
    potential: FloatArray
    """Phi of the lifecycle state."""


@dataclass(frozen=True)
class Transition:
    """State before, state after, and how the episode goes on. Flags have shape (num_envs,)."""

    before: Standing
    after: Standing
    is_last: BoolArray
    """Whether the episode ends here, in either way."""
    is_terminated: BoolArray
    """Whether it ends for good, so that the next state has no value."""
    is_rolled_back: BoolArray
    """Whether the governor took the member back to its last snapshot."""


def appraise(
    accuracy: tuple[FloatArray, FloatArray],
    parameters: tuple[IntArray, IntArray],
    host_parameters: IntArray,
    rent_weight: float,
    potential: FloatArray,
) -> Standing:
    """Work out the scores of a state.

    Args:
        accuracy: Of the live and of the committed network. Each (num_envs,).
        parameters: Of the seeds of the live and of the committed network. Each (num_envs,).
        host_parameters: (num_envs,).
        rent_weight: See `score`.
        potential: (num_envs,).
    """
    scores = np.empty((2, len(host_parameters)))
    _score_all(scores, accuracy, parameters, host_parameters, rent_weight)
    return Standing(score=scores[0], committed_score=scores[1], potential=potential)


@entry_point
def _score_all(
    scores: FloatArray,
    accuracy: tuple[FloatArray, FloatArray],
    parameters: tuple[IntArray, IntArray],
    host_parameters: IntArray,
    rent_weight: float,
) -> None:
    for k in range(2):
        for i in range(len(host_parameters)):
            scores[k, i] = score(accuracy[k][i], parameters[k][i], host_parameters[i], rent_weight)


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

    Source: design, section 7.
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


@entry_point
def potential(stage: IntArray, stage_steps: IntArray) -> FloatArray:
    """Return Phi(s), a function of the lifecycle state alone, summed over slots.

    Args:
        stage: Values of `Stage`. (num_envs, num_slots).
        stage_steps: Time in the stage [env steps]. (num_envs, num_slots).

    Returns:
        (num_envs,) float64, between 0 and the number of slots.
    """
    total = np.zeros(len(stage))
    for i in range(len(stage)):
        for s in range(stage.shape[1]):
            share = 1.0 - 0.5 ** (stage_steps[i, s] / PROGRESS_HALF_LIFE_STEPS)
            total[i] += _STAGE[stage[i, s]] + _PROGRESS[stage[i, s]] * share
    return total
