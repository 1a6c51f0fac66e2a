"""Gradient health of seeds, computed from the gradient norm of each tensor on a log scale."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from esper_env.config import EnvConfig, FloatArray, GradientCause, IntArray
from esper_env.growth.state import Measurements
from esper_env.jit import entry_point

DECADES = 2.0
"""Factors of ten beyond a threshold at which a severity reaches 1."""
LOW_RATIO = 0.1
"""Gradient norm of a seed below which its gradient is low [multiples of that of the host]."""
SMALL_NORM = 1e-3
"""Gradient norm of a seed below which a low gradient is due to the seed [multiples of `clip_norm`].
"""
LARGEST_NORM = 1e9
"""Upper limit of the norm of a tensor, so that an infinite gradient has a finite norm."""


def record_gradients(
    measured: Measurements,
    members: IntArray,
    tensor_norms: FloatArray,
    host_norm: FloatArray,
    config: EnvConfig,
) -> None:
    """Write norm, severities and health of the gradients of all seeds of some sub-environments.

    The vanishing severity of a tensor is 0 at the threshold and above, and rises to 1 two decades
    below it. The exploding severity is 0 at its threshold and below, and rises to 1 two decades
    above it. The thresholds are multiples of the clip norm. The health of a seed is
    (1 - mean vanishing severity) * (1 - largest exploding severity) over its tensors. A slot
    without a seed has no gradient, and all its values are 0.

    `GradientCause` explains a low gradient. If the norms of all tensors vanish (norm below the
    threshold), no gradient reached the seed; if only some vanish, its gradient ends at dead units.
    Otherwise the gradient is low if its norm is below `LOW_RATIO` times that of the host. Then
    either it is small itself (below `SMALL_NORM`), as the seed is saturated or its weight in the
    blend is near 0, or the host's gradient is large.

    Args:
        measured: Measurements of the seeds, changed in place for `members`.
        members: Indices of the sub-environments. (m,) int64.
        tensor_norms: L2 norm of the gradient of each tensor, NaN where the seed has no such tensor.
            (m, num_slots, max_tensors) float64.
        host_norm: L2 norm of the gradient of the host. (m,) float64.
        config: Source of the thresholds and the clip norm.
    """
    vanishing = config.vanishing_gradient_norm
    floor = math.log10(vanishing) if vanishing > 0 else -math.inf
    ceiling = math.log10(config.exploding_gradient_norm)
    _record(measured, members, tensor_norms, host_norm, config.clip_norm, floor, ceiling)


@entry_point
def _record(
    measured: Measurements,
    members: IntArray,
    tensor_norms: npt.NDArray[np.float64],
    host_norm: npt.NDArray[np.float64],
    clip_norm: float,
    floor: float,
    ceiling: float,
) -> None:
    """Write the measurements of `record_gradients`.

    `floor` and `ceiling` are the thresholds as log10 of multiples of the clip norm. `floor` is -inf
    if no norm counts as vanishing.
    """
    for n, i in enumerate(members):
        for s in range(tensor_norms.shape[1]):
            count, vanished, square, vanishing, exploding = 0, 0, 0.0, 0.0, 0.0
            for norm in tensor_norms[n, s]:
                # NaN marks a tensor that the seed does not have.
                if not np.isnan(norm):
                    count += 1
                    square += min(norm, LARGEST_NORM) ** 2
                    decades = np.log10(norm / clip_norm)
                    # Without a threshold, only a norm of 0 vanishes.
                    vanished += norm == 0 or decades < floor
                    if floor > -np.inf:
                        vanishing += min(max((floor - decades) / DECADES, 0.0), 1.0)
                    exploding = max(exploding, min((decades - ceiling) / DECADES, 1.0))
            vanishing /= max(count, 1)
            measured.has_gradient[i, s] = count > 0
            measured.gradient_norm[i, s] = np.sqrt(square)
            measured.vanishing[i, s] = vanishing
            measured.exploding[i, s] = exploding
            measured.health[i, s] = (1 - vanishing) * (1 - exploding) if count > 0 else 0.0
            cause = GradientCause.FINE.value
            if vanished > 0:
                is_all = vanished == count
                cause = GradientCause.NO_GRADIENT.value if is_all else GradientCause.DORMANT.value
            elif count > 0 and np.sqrt(square) < LOW_RATIO * host_norm[n]:
                is_small = np.sqrt(square) < SMALL_NORM * clip_norm
                cause = GradientCause.SATURATED.value if is_small else GradientCause.HOST_FAST.value
            measured.cause[i, s] = cause
