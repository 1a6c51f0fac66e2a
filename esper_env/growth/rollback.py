"""Watches training losses and says which members must go back to their last good snapshot.

All thresholds are in `EnvConfig`, relative to the loss of guessing, ln(classes), or to the member's
own past. Only healthy losses enter that past, so a disaster does not become the norm.
"""

from __future__ import annotations

import numpy as np

from esper_env.config import BoolArray, EnvConfig, FloatArray, IntArray
from esper_env.growth.state import RollbackState
from esper_env.jit import entry_point


def judge(
    state: RollbackState,
    members: IntArray,
    loss: FloatArray,
    is_finite: BoolArray,
    guess_loss: float,
    config: EnvConfig,
) -> BoolArray:
    """Take in one env step of training and return who panics.

    A member panics at once if its loss or a weight is not finite; and after `panic_patience` steps
    in succession of collapse (the mean of its healthy losses is below `collapse_fraction` of the
    loss of guessing, and the loss is back within `collapse_margin` of it) or of divergence (the
    loss is above the mean by `divergence_sigma` standard deviations, and above `divergence_factor`
    times the mean). Those two need a full window. After a panic the past is forgotten.

    Args:
        state: Changed in place for `members`.
        members: Which members were trained. (m,).
        loss: Their mean training loss. (m,) [nats].
        is_finite: Whether all their weights are finite. (m,).
        guess_loss: ln(classes).
        config: Thresholds.

    Returns:
        (m,) bool.
    """
    panics = np.empty(len(members), dtype=np.bool_)
    _judge(
        state,
        members,
        loss,
        is_finite,
        panics,
        config.panic_patience,
        (
            config.collapse_fraction * guess_loss,
            (1 - config.collapse_margin) * guess_loss,
            config.divergence_sigma,
            config.divergence_factor,
        ),
    )
    return panics


@entry_point
def _judge(
    state: RollbackState,
    members: IntArray,
    loss: FloatArray,
    is_finite: BoolArray,
    panics: BoolArray,
    patience: int,
    limits: tuple[float, float, float, float],
) -> None:
    learned, back_at_guessing, sigma, factor = limits
    window = state.losses.shape[1]
    for n, i in enumerate(members):
        past, new = state.losses[i], loss[n]
        is_sane, is_bad = np.isfinite(new) and is_finite[n], False
        if is_sane and state.num_losses[i] >= window:
            total, squares = 0.0, 0.0
            for k in range(window):
                total += past[k]
            mean = total / window
            for k in range(window):
                squares += (past[k] - mean) ** 2
            std = np.sqrt(squares / window)
            collapses = mean < learned and new > back_at_guessing
            diverges = new > mean + sigma * std and new > factor * mean
            is_bad = collapses or diverges
        streak = state.streak[i] + 1 if is_bad else 0
        panics[n] = not is_sane or streak >= patience
        state.streak[i] = 0 if panics[n] else streak
        if panics[n]:
            for k in range(window):
                past[k] = 0.0
            state.num_losses[i] = 0
            state.since_snapshot[i] = 0
            state.rollbacks[i] += 1
        elif not is_bad:
            for k in range(window - 1, 0, -1):
                past[k] = past[k - 1]
            past[0] = new
            state.num_losses[i] += 1
            state.since_snapshot[i] += 1
