"""How healthy the gradients of seeds are, judged per tensor on a log scale."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from esper_env.config import EnvConfig, FloatArray, IntArray
from esper_env.growth.state import Measurements
from esper_env.jit import entry_point

DECADES = 2.0
"""Factors of ten beyond a threshold at which a severity has risen from 0 to 1."""
LARGEST_NORM = 1e9
"""What an infinite norm is written down as."""


def record_gradients(
    measured: Measurements, members: IntArray, tensor_norms: FloatArray, config: EnvConfig
) -> None:
    """Write norm, severities and health of the gradients of all seeds of some members.

    A tensor's vanishing severity rises from 0 at the threshold to 1 two decades below it, and its
    exploding severity from 0 at the threshold to 1 two decades above; thresholds are multiples of
    the clip norm. Health is the mean over tensors of 1 - vanishing, times 1 - the largest exploding
    severity. A seed without any tensor has no gradient, and 0 everywhere.

    Args:
        measured: Changed in place for `members`.
        members: (m,).
        tensor_norms: L2 norm of each tensor's gradient, NaN where the seed has no such tensor.
            (m, num_slots, max_tensors) float64.
        config: Thresholds.
    """
    floor, ceiling = config.vanishing_gradient_norm, config.exploding_gradient_norm
    _record(
        measured,
        members,
        tensor_norms,
        config.clip_norm,
        math.log10(floor) if floor > 0 else -math.inf,
        math.log10(ceiling),
    )


@entry_point
def _record(
    measured: Measurements,
    members: IntArray,
    tensor_norms: npt.NDArray[np.float64],
    clip_norm: float,
    floor: float,
    ceiling: float,
) -> None:
    """Write the measurements; `floor` and `ceiling` are decimal logarithms of clip norms."""
    for n, i in enumerate(members):
        for s in range(tensor_norms.shape[1]):
            count, square, vanishing, exploding = 0, 0.0, 0.0, 0.0
            for norm in tensor_norms[n, s]:
                if not np.isnan(norm):
                    count += 1
                    square += min(norm, LARGEST_NORM) ** 2
                    decades = np.log10(norm / clip_norm)
                    if floor > -np.inf:
                        vanishing += min(max((floor - decades) / DECADES, 0.0), 1.0)
                    exploding = max(exploding, min((decades - ceiling) / DECADES, 1.0))
            vanishing /= max(count, 1)
            measured.has_gradient[i, s] = count > 0
            measured.gradient_norm[i, s] = np.sqrt(square)
            measured.vanishing[i, s] = vanishing
            measured.exploding[i, s] = exploding
            measured.health[i, s] = (1 - vanishing) * (1 - exploding) if count > 0 else 0.0
