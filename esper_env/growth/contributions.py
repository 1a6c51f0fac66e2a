"""Which coalitions of seeds are evaluated, and what follows from their accuracies.

A coalition is the live network with some seeds left out. Each distinct one is evaluated once per
env step; the population computes what they share once.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import factorial
from typing import Any

import numpy as np

from esper_env.config import FloatArray, IntArray, Stage
from esper_env.growth.lifecycle import LifecycleState, Measurements
from esper_env.growth.records import MeasuredRecord
from esper_env.jit import entry_point, inlined


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
    num_subsets = 2**num_slots if all_subsets else 0
    most = m * (2 + 2 * num_slots * leave_one_out + num_subsets)
    member, alpha = np.empty(most, dtype=np.int64), np.empty((most, num_slots))
    live, committed = np.empty(m, dtype=np.int64), np.empty(m, dtype=np.int64)
    without, would_be = np.full((2, m, num_slots), -1)
    subsets = np.empty((m, num_subsets), dtype=np.int64)
    rows = _plan(
        members, state.stage, state.alpha, leave_one_out,
        member, alpha, live, committed, without, would_be, subsets,
    )  # fmt: skip
    return Coalitions(
        member=member[:rows],
        alpha=alpha[:rows],
        live=live,
        committed=committed,
        without=without,
        would_be=would_be,
        subsets=subsets if all_subsets else None,
    )


@entry_point
def _plan(
    members: IntArray,
    stage: IntArray,
    present: FloatArray,
    leave_one_out: bool,
    member: IntArray,
    alpha: FloatArray,
    live: IntArray,
    committed: IntArray,
    without: IntArray,
    would_be: IntArray,
    subsets: IntArray,
) -> int:
    """Fill in the arrays of `Coalitions`, rows of one member in succession; return the rows."""
    num_slots, rows = stage.shape[1], 0
    wanted = np.empty(num_slots)
    for n, i in enumerate(members):
        first = rows
        live[n], rows = _row_of(present[i], alpha, first, rows)
        for s in range(num_slots):
            wanted[s] = present[i, s] if stage[i, s] == Stage.FOSSILIZED else 0.0
        committed[n], rows = _row_of(wanted, alpha, first, rows)
        for s in range(num_slots):
            is_trial = Stage.GERMINATED <= stage[i, s] < Stage.FOSSILIZED
            if leave_one_out and (is_trial or present[i, s] > 0):
                for other in range(num_slots):
                    wanted[other] = present[i, other]
                if stage[i, s] != Stage.FOSSILIZED:
                    if present[i, s] > 0:
                        wanted[s] = 0.0
                        without[n, s], rows = _row_of(wanted, alpha, first, rows)
                    else:
                        wanted[s] = 1.0
                        would_be[n, s], rows = _row_of(wanted, alpha, first, rows)
        for k in range(subsets.shape[1]):
            for s in range(num_slots):
                is_out = k >> s & 1 and stage[i, s] != Stage.FOSSILIZED
                wanted[s] = 0.0 if is_out else present[i, s]
            subsets[n, k], rows = _row_of(wanted, alpha, first, rows)
        for row in range(first, rows):
            member[row] = i
    return rows


@inlined
def _row_of(wanted: FloatArray, alpha: FloatArray, first: int, rows: int) -> tuple[int, int]:
    """Find weights among the rows from `first` on, or append them; return row and new length."""
    for row in range(first, rows):
        is_same = True
        for s in range(len(wanted)):
            is_same = is_same and alpha[row, s] == wanted[s]
        if is_same:
            return row, rows
    for s in range(len(wanted)):
        alpha[rows, s] = wanted[s]
    return rows, rows + 1


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
    shapley = np.zeros((0, coalitions.without.shape[1]))
    if coalitions.subsets is not None:
        shapley = shapley_values(accuracy[coalitions.subsets], coalitions.without.shape[1])
    _record(
        MeasuredRecord(*vars(measured).values()),
        members,
        coalitions.live,
        coalitions.committed,
        coalitions.without,
        coalitions.would_be,
        accuracy,
        shapley,
    )


@entry_point
def _record(
    measured: Any,
    members: IntArray,
    live: IntArray,
    committed: IntArray,
    without: IntArray,
    would_be: IntArray,
    accuracy: FloatArray,
    shapley: FloatArray,
) -> None:
    for n, i in enumerate(members):
        own, num_tested, lost = accuracy[live[n]], 0, 0.0
        for s in range(without.shape[1]):
            is_tried, is_tested = would_be[n, s] >= 0, without[n, s] >= 0
            measured.has_would_be[i, s] = is_tried
            measured.would_be[i, s] = accuracy[would_be[n, s]] - own if is_tried else 0.0
            measured.contribution_velocity[i, s] = 0.0
            if is_tested:
                num_tested += 1
                lost += accuracy[without[n, s]]
                contribution = own - accuracy[without[n, s]]
                if len(shapley):
                    contribution = shapley[n, s]
                if measured.has_contribution[i, s]:
                    change = contribution - measured.contribution[i, s]
                    measured.contribution_velocity[i, s] = change
                measured.contribution[i, s] = contribution
                measured.contribution_age[i, s] = 0
                measured.has_contribution[i, s] = True
            elif measured.has_contribution[i, s]:
                measured.contribution_age[i, s] += 1
        for s in range(without.shape[1]):
            is_pair = num_tested == 2 and without[n, s] >= 0
            measured.has_interaction[i, s] = is_pair
            measured.interaction[i, s] = own - lost + accuracy[committed[n]] if is_pair else 0.0
