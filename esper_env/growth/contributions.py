"""Which coalitions of seeds are evaluated, and what follows from their accuracies.

A coalition is the live network with some seeds left out. Each distinct one is evaluated once per
env step; the population computes what they share once.
"""

from __future__ import annotations

from math import factorial
from typing import NamedTuple

import numpy as np

from esper_env.config import FloatArray, IntArray, Stage
from esper_env.growth.state import HISTORY, Measurements, Progress, SlotState
from esper_env.jit import entry_point, inlined

PLATEAU_MARGIN = 0.003
"""Improvement of the best accuracy that resets the plateau counter [accuracy, 0 to 1]."""


class Coalitions(NamedTuple):
    """Distinct networks to evaluate, and the row of each in the arrays."""

    member: IntArray
    """Sub-environment of each row. (rows,)."""
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
    subsets: IntArray
    """Row of the network without the trial seeds whose slots are the set bits of k.
    (m, 2**slots), or (m, 0) unless all subsets are evaluated."""


def plan_coalitions(
    members: IntArray, slots: SlotState, *, leave_one_out: bool, all_subsets: bool = False
) -> Coalitions:
    """List the distinct coalitions of some sub-environments.

    Args:
        members: Indices of the sub-environments. (m,).
        slots: Slots of all sub-environments.
        leave_one_out: Whether to leave out each seed with alpha > 0 that is not fossilized, and to
            try each seed with alpha 0 at alpha 1.
        all_subsets: Whether to leave out every subset of the seeds with alpha > 0 too.

    Returns:
        Rows to evaluate.
    """
    m, num_slots = len(members), slots.stage.shape[1]
    num_subsets = 2**num_slots if all_subsets else 0
    most = m * (2 + 2 * num_slots * leave_one_out + num_subsets)
    plan = Coalitions(
        member=np.empty(most, dtype=np.int64),
        alpha=np.empty((most, num_slots)),
        live=np.empty(m, dtype=np.int64),
        committed=np.empty(m, dtype=np.int64),
        without=np.full((m, num_slots), -1),
        would_be=np.full((m, num_slots), -1),
        subsets=np.empty((m, num_subsets), dtype=np.int64),
    )
    rows = _plan(plan, members, slots.stage, slots.alpha, leave_one_out)
    return plan._replace(member=plan.member[:rows], alpha=plan.alpha[:rows])


@entry_point
def _plan(
    plan: Coalitions,
    members: IntArray,
    stage: IntArray,
    present: FloatArray,
    leave_one_out: bool,
) -> int:
    """Fill the plan, rows of one sub-environment one after the other; return the rows."""
    num_slots, rows = stage.shape[1], 0
    wanted, alpha = np.empty(num_slots), plan.alpha
    for n, i in enumerate(members):
        first = rows
        plan.live[n], rows = _row_of(present[i], alpha, first, rows)
        for s in range(num_slots):
            wanted[s] = present[i, s] if stage[i, s] == Stage.FOSSILIZED else 0.0
        plan.committed[n], rows = _row_of(wanted, alpha, first, rows)
        for s in range(num_slots):
            is_trial = Stage.GERMINATED <= stage[i, s] < Stage.FOSSILIZED
            if leave_one_out and (is_trial or present[i, s] > 0):
                for other in range(num_slots):
                    wanted[other] = present[i, other]
                if stage[i, s] != Stage.FOSSILIZED:
                    if present[i, s] > 0:
                        wanted[s] = 0.0
                        plan.without[n, s], rows = _row_of(wanted, alpha, first, rows)
                    else:
                        wanted[s] = 1.0
                        plan.would_be[n, s], rows = _row_of(wanted, alpha, first, rows)
        for k in range(plan.subsets.shape[1]):
            for s in range(num_slots):
                is_out = k >> s & 1 and stage[i, s] != Stage.FOSSILIZED
                wanted[s] = 0.0 if is_out else present[i, s]
            plan.subsets[n, k], rows = _row_of(wanted, alpha, first, rows)
        for row in range(first, rows):
            plan.member[row] = i
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


def record_evaluation(
    progress: Progress,
    measured: Measurements,
    members: IntArray,
    coalitions: Coalitions,
    accuracy: FloatArray,
    loss: FloatArray,
) -> None:
    """Write accuracies, contributions, pair interactions and would-be effects into the state.

    contribution_i = acc(live) - acc(without i), or the Shapley value of seed i where all subsets
    were evaluated. With exactly two trial seeds i and j, the network without both is the committed
    one, and their interaction by inclusion and exclusion is
    acc(live) - acc(without i) - acc(without j) + acc(committed). A seed of alpha 0 contributes
    nothing yet; its would-be effect is acc(live with it at alpha 1) - acc(live).

    Args:
        progress: Changed in place for `members`.
        measured: Changed in place for `members`.
        members: Sub-environments that were evaluated. (m,).
        coalitions: The evaluated networks.
        accuracy: Accuracy of each row of `coalitions`, 0 to 1. (rows,).
        loss: Mean loss of each row [nats]. (rows,).
    """
    shapley = np.zeros((0, coalitions.without.shape[1]))
    if coalitions.subsets.shape[1]:
        shapley = shapley_values(accuracy[coalitions.subsets], coalitions.without.shape[1])
    _record(progress, measured, members, coalitions, accuracy, loss, shapley)


@entry_point
def _record(
    progress: Progress,
    measured: Measurements,
    members: IntArray,
    coalitions: Coalitions,
    accuracy: FloatArray,
    loss: FloatArray,
    shapley: FloatArray,
) -> None:
    without, would_be = coalitions.without, coalitions.would_be
    for n, i in enumerate(members):
        live, committed = coalitions.live[n], coalitions.committed[n]
        own = accuracy[live]
        for past in range(HISTORY - 1, 0, -1):
            progress.accuracy_history[i, past] = progress.accuracy_history[i, past - 1]
            progress.loss_history[i, past] = progress.loss_history[i, past - 1]
        progress.accuracy_history[i, 0] = own - progress.accuracy[i]
        progress.loss_history[i, 0] = loss[live] - progress.loss[i]
        has_improved = own > progress.best_accuracy[i] + PLATEAU_MARGIN
        progress.plateau_steps[i] = 0 if has_improved else progress.plateau_steps[i] + 1
        progress.best_accuracy[i] = max(progress.best_accuracy[i], own)
        progress.accuracy[i] = own
        progress.loss[i] = loss[live]
        progress.committed_accuracy[i] = accuracy[committed]

        num_tested, lost = 0, 0.0
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
            measured.interaction[i, s] = own - lost + accuracy[committed] if is_pair else 0.0
