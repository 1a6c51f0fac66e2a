"""The potential of potential-based reward shaping."""

from __future__ import annotations

import numpy as np

from esper_env.compilation import shared
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


@shared
def potential(stage: IntArray, stage_steps: IntArray) -> FloatArray:
    """Return what each slot adds to Phi(s), a function of the lifecycle state alone.

    Args:
        stage: Values of `Stage`.
        stage_steps: Time in the stage [env steps], in the same shape.

    Returns:
        float64 of that shape, between 0 and 1.
    """
    share = 1.0 - 0.5 ** (stage_steps / PROGRESS_HALF_LIFE_STEPS)
    return _STAGE[stage] + _PROGRESS[stage] * share
