"""Rollback rule: decides after training which sub-environments are restored from a snapshot.

All thresholds are in `EnvConfig`. They are relative to ln(classes), the loss of random guessing, or
to the recent losses of the episode. Collapsed, diverged and non-finite losses are not among the
recent losses, so they do not shift the thresholds.
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
    """Update the state of the rule with one env step of training and return the rollbacks.

    A loss or weight that is not finite causes a rollback at once. `panic_patience` consecutive
    collapsed or diverged env steps cause one too:

    - Training has collapsed if the mean of the recent losses is below
      `collapse_fraction * guess_loss` and the loss is above `(1 - collapse_margin) * guess_loss`.
    - Training has diverged if the loss is above the mean of the recent losses by more than
      `divergence_sigma` standard deviations, and above `divergence_factor` times that mean.

    Both need `panic_window` recent losses. A rollback discards the recent losses. Training has also
    diverged if the loss is above `divergence_loss * guess_loss`, which needs no recent losses.

    Args:
        state: State of the rule, changed in place for `members`.
        members: Indices of the trained sub-environments. (m,) int64.
        loss: Mean training loss of the env step [nats]. (m,) float64.
        is_finite: True where all weights are finite. (m,) bool.
        guess_loss: Loss of random guessing, ln(classes) [nats].
        config: Source of the thresholds.

    Returns:
        True where a rollback is due. (m,) bool.
    """
    limits = (
        config.collapse_fraction * guess_loss,
        (1 - config.collapse_margin) * guess_loss,
        config.divergence_sigma,
        config.divergence_factor,
        np.inf if config.divergence_loss is None else config.divergence_loss * guess_loss,
    )
    panics = np.empty(len(members), dtype=np.bool_)
    _judge(state, members, loss, is_finite, panics, config.panic_patience, limits)
    if panics.any():
        record_rollback(state, members[panics])
    return panics


def record_rollback(state: RollbackState, members: IntArray) -> None:
    """Count rollbacks, and start new windows of recent losses; `members` is (m,) int64."""
    state.num_losses[members] = state.streak[members] = state.since_snapshot[members] = 0
    state.rollbacks[members] += 1


def forget(state: RollbackState, members: IntArray) -> None:
    """Start new windows of recent losses, without a rollback; `members` is (m,) int64.

    A streak goes on: without a window, only a loss above `divergence_loss` can lengthen it.
    """
    state.num_losses[members] = 0


@entry_point
def _judge(
    state: RollbackState,
    members: IntArray,
    loss: FloatArray,
    is_finite: BoolArray,
    panics: BoolArray,
    patience: int,
    limits: tuple[float, float, float, float, float],
) -> None:
    """Write `panics` and update the state as described in `judge`.

    `limits` are the loss below which a network has learned, the loss at which it is back at
    guessing, `divergence_sigma`, `divergence_factor`, and the largest loss.
    """
    learned, back_at_guessing, sigma, factor, largest = limits
    window = state.losses.shape[1]
    for n, i in enumerate(members):
        past, new = state.losses[i], loss[n]
        # Mean and standard deviation of the recent losses, once there are enough of them.
        is_sane = np.isfinite(new) and is_finite[n]
        is_bad = is_sane and new > largest
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
            is_bad = is_bad or collapses or diverges
        # A healthy env step ends the streak.
        streak = state.streak[i] + 1 if is_bad else 0
        panics[n] = not is_sane or streak >= patience
        state.streak[i] = streak
        if is_sane and not is_bad:
            # Shift the window by one env step; index 0 is the latest loss.
            for k in range(window - 1, 0, -1):
                past[k] = past[k - 1]
            past[0] = new
            state.num_losses[i] += 1
            state.since_snapshot[i] += 1
