"""Watches training losses and says which members must go back to their last good snapshot.

All thresholds are in `EnvConfig`, relative to the loss of guessing, ln(classes), or to the member's
own past. Only healthy losses enter that past, so a disaster does not become the norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from esper_env.config import BoolArray, EnvConfig, FloatArray, IntArray


@dataclass
class GovernorState:
    """What the governor remembers. Arrays are (num_envs,) unless stated."""

    losses: FloatArray
    """The last healthy losses, newest first. (num_envs, panic_window) [nats]."""
    num_losses: IntArray
    """How many of them are filled."""
    streak: IntArray
    """Env steps in succession that looked like collapse or divergence."""
    rollbacks: IntArray
    """Rollbacks in this episode."""
    since_snapshot: IntArray
    """Healthy env steps since the last snapshot."""

    @classmethod
    def empty(cls, num_envs: int, config: EnvConfig) -> GovernorState:
        """Return a governor that has seen nothing."""
        counts = [np.zeros(num_envs, dtype=np.int64) for _ in range(4)]
        return cls(np.zeros((num_envs, config.panic_window)), *counts)

    def begin(self, members: IntArray) -> None:
        """Forget the past of members that start an episode."""
        for array in vars(self).values():
            array[members] = 0


def judge(
    state: GovernorState,
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
    past = state.losses[members]
    has_past = state.num_losses[members] >= config.panic_window
    mean = past.mean(axis=1)
    std = np.sqrt(((past - mean[:, None]) ** 2).mean(axis=1))
    is_sane = np.isfinite(loss) & is_finite
    known = np.where(is_sane, loss, 0.0)
    collapses = (mean < config.collapse_fraction * guess_loss) & (
        known > (1 - config.collapse_margin) * guess_loss
    )
    diverges = (known > mean + config.divergence_sigma * std) & (
        known > config.divergence_factor * mean
    )
    is_bad = has_past & (collapses | diverges)
    streak = np.where(is_bad, state.streak[members] + 1, 0)
    panics = ~is_sane | (streak >= config.panic_patience)
    is_healthy = is_sane & ~is_bad

    state.streak[members] = np.where(panics, 0, streak)
    healthy = members[is_healthy]
    state.losses[healthy] = np.concatenate(
        [loss[is_healthy, None], state.losses[healthy, :-1]], axis=1
    )
    state.num_losses[healthy] += 1
    state.since_snapshot[healthy] += 1
    if panics.any():
        panicked = members[panics]
        state.losses[panicked] = 0.0
        state.num_losses[panicked] = 0
        state.since_snapshot[panicked] = 0
        state.rollbacks[panicked] += 1
    return panics
