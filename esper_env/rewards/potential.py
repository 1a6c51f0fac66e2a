"""The potential of potential-based reward shaping."""

from __future__ import annotations

import numpy as np

from esper_env.compilation import entry_point
from esper_env.config import FloatArray, IntArray, Stage

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
