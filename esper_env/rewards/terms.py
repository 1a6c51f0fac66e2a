"""Scores, and the terms of the reward as pure functions of a transition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from esper_env.compilation import entry_point, shared
from esper_env.config import BoolArray, EnvConfig, FloatArray, IntArray


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
