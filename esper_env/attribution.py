"""Which coalitions of seeds are evaluated, and what follows from their accuracies.

A coalition is the live network with some seeds left out. Each distinct one is evaluated once per
env step; the population computes what they share once.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import factorial

import numpy as np

from esper_env.config import BoolArray, FloatArray, IntArray, Stage
from esper_env.lifecycle import LifecycleState, Measurements


@dataclass(frozen=True)
class Coalitions:
    """Distinct networks to evaluate, and where to find each one's row."""

    member: IntArray
    """Member of each row. (rows,)."""
    alpha: FloatArray
    """Blend weights of each row, 0 for a seed that is left out. (rows, slots)."""
    live: IntArray
    """Row of the live network. (m,)."""
    committed: IntArray
    """Row of the network with only the fossilized seeds. (m,)."""
    without: IntArray
    """Row of the network without one trial seed, -1 where it is not evaluated. (m, slots)."""
    would_be: IntArray
    """Row of the network with one trial seed of alpha 0 at alpha 1, -1 where it is not evaluated.
    (m, slots)."""
    subsets: IntArray | None = None
    """Row of the network without the trial seeds whose slots are the set bits of k; None unless all
    subsets were asked for. (m, 2**slots)."""


def plan_coalitions(
    members: IntArray, state: LifecycleState, *, leave_one_out: bool, all_subsets: bool = False
) -> Coalitions:
    """List the distinct coalitions of some members.

    Args:
        members: Which members. (m,).
        state: Slots of all members.
        leave_one_out: Whether to leave out each seed with alpha > 0 that is not fossilized, and to
            try each seed with alpha 0 at alpha 1.
        all_subsets: Whether to leave out every subset of the former too.

    Returns:
        Rows to evaluate.
    """
    m, num_slots = len(members), state.stage.shape[1]
    alpha = state.alpha[members]
    is_fossil = state.stage[members] == Stage.FOSSILIZED
    is_weighted = (alpha > 0) & ~is_fossil
    is_weightless = state.is_trial[members] & (alpha == 0) & leave_one_out
    if not is_weighted.any() and not is_weightless.any():
        own, nowhere = np.arange(m), np.full((m, num_slots), -1)
        return Coalitions(members, alpha, own, own, nowhere, nowhere)
    wanted = [alpha, np.where(is_fossil, alpha, 0.0)]
    is_tested = is_weighted & leave_one_out
    for weight in (0.0, 1.0):
        wanted += [np.where(np.arange(num_slots) == s, weight, alpha) for s in range(num_slots)]
    is_needed = np.concatenate(
        [np.ones(2 * m, dtype=bool), is_tested.T.reshape(-1), is_weightless.T.reshape(-1)]
    )
    if all_subsets:
        bits = (np.arange(2**num_slots)[:, None] >> np.arange(num_slots)) & 1 == 1
        wanted += [np.where(absent & ~is_fossil, 0.0, alpha) for absent in bits]
        is_needed = np.concatenate([is_needed, np.ones(len(bits) * m, dtype=bool)])
    keys = np.concatenate([np.concatenate([np.arange(m)[:, None], a], axis=1) for a in wanted])
    distinct, row = np.unique(keys[is_needed], axis=0, return_inverse=True)
    row_of = np.full(len(keys), -1)
    row_of[is_needed] = row.reshape(-1)
    return Coalitions(
        member=members[distinct[:, 0].astype(np.int64)],
        alpha=distinct[:, 1:],
        live=row_of[:m],
        committed=row_of[m : 2 * m],
        without=row_of[2 * m : (2 + num_slots) * m].reshape(num_slots, m).T,
        would_be=row_of[(2 + num_slots) * m : (2 + 2 * num_slots) * m].reshape(num_slots, m).T,
        subsets=row_of[(2 + 2 * num_slots) * m :].reshape(-1, m).T if all_subsets else None,
    )


def shapley_values(value: FloatArray, num_slots: int) -> FloatArray:
    """Return the exact Shapley value of every slot.

    phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! * (v(S with i) - v(S)). Slots without a
    trial seed are null players: they get 0 and do not change what the others get.

    Args:
        value: v of the coalition without the slots that are the set bits of k. (m, 2**slots).
        num_slots: n.

    Returns:
        (m, slots).

    Source: Shapley (1953), equation 11.
    """
    result = np.zeros((len(value), num_slots))
    for k in range(2**num_slots):
        num_absent = k.bit_count()
        for slot in range(num_slots):
            if k >> slot & 1:
                present = num_slots - num_absent
                weight = factorial(present) * factorial(num_absent - 1) / factorial(num_slots)
                result[:, slot] += weight * (value[:, k & ~(1 << slot)] - value[:, k])
    return result


def record_contributions(
    measured: Measurements, members: IntArray, coalitions: Coalitions, accuracy: FloatArray
) -> None:
    """Write contributions, pair interactions and would-be effects into the measurements.

    contribution_i = acc(live) - acc(without i), or the Shapley value of seed i where all subsets
    were evaluated. With exactly two trial seeds i and j, the network without both is the committed
    one, and their interaction by inclusion and exclusion is
    acc(live) - acc(without i) - acc(without j) + acc(committed). A seed of alpha 0 contributes
    nothing yet; its would-be effect is acc(live with it at alpha 1) - acc(live).

    Args:
        measured: Changed in place for `members`.
        members: (m,).
        coalitions: What was evaluated.
        accuracy: Accuracy of each row.
    """
    live = accuracy[coalitions.live]
    is_tried = coalitions.would_be >= 0
    measured.has_would_be[members] = is_tried
    tried = accuracy[coalitions.would_be] - live[:, None]
    measured.would_be[members] = np.where(is_tried, tried, 0.0)
    is_new: BoolArray = coalitions.without >= 0
    if not is_new.any() and not measured.has_contribution.any():
        return
    without = np.where(is_new, accuracy[coalitions.without], 0.0)
    contribution = np.where(is_new, live[:, None] - without, 0.0)
    if coalitions.subsets is not None:
        num_slots = is_new.shape[1]
        shapley = shapley_values(accuracy[coalitions.subsets], num_slots)
        contribution = np.where(is_new, shapley, 0.0)

    before = measured.contribution[members]
    in_succession = is_new & measured.has_contribution[members]
    velocity = np.where(in_succession, contribution - before, 0.0)
    measured.contribution_velocity[members] = velocity
    measured.contribution[members] = np.where(is_new, contribution, before)
    measured.contribution_age[members] = np.where(
        is_new, 0, measured.contribution_age[members] + measured.has_contribution[members]
    )
    measured.has_contribution[members] |= is_new

    is_pair = is_new & (is_new.sum(axis=1) == 2)[:, None]
    pair_sum = np.where(is_new, without, 0.0).sum(axis=1)
    interaction = live - pair_sum + accuracy[coalitions.committed]
    measured.interaction[members] = np.where(is_pair, interaction[:, None], 0.0)
    measured.has_interaction[members] = is_pair
