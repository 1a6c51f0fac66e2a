"""Contributions of seeds: the networks to evaluate, and the measurements from their accuracies.

A *coalition* is the live network with other blend weights: seeds are left out (weight 0) or a seed
at alpha 0 gets alpha 1. Each distinct coalition of a sub-environment is evaluated once per env
step. The population evaluates the layers that coalitions share only once.
"""

from __future__ import annotations

from math import factorial
from typing import NamedTuple

import numpy as np

from esper_env.config import BoolArray, FloatArray, IntArray, Stage
from esper_env.growth.state import HISTORY, Measurements, Progress, SlotState
from esper_env.jit import entry_point, inlined

PLATEAU_MARGIN = 0.003
"""Rise of the best accuracy above which the plateau counter restarts [accuracy, 0 to 1]."""


class Coalitions(NamedTuple):
    """Distinct coalitions to evaluate, one per row, and the rows of m sub-environments.

    All integers are int64.
    """

    member: IntArray
    """Index of the sub-environment. (rows,)."""
    alpha: FloatArray
    """Blend weight of each slot, 0 for a seed that is left out. (rows, num_slots)."""
    live: IntArray
    """Row of the live network. (m,)."""
    committed: IntArray
    """Row of the committed network, which has only the fossilized seeds. (m,)."""
    without: IntArray
    """Row of the live network without one trial seed, -1 if not evaluated. (m, num_slots)."""
    would_be: IntArray
    """Row of the live network with one seed at alpha 1 instead of 0, -1 if not evaluated.
    (m, num_slots)."""
    subsets: IntArray
    """Row of the live network without a subset of the trial seeds. Entry k leaves out the slots
    that are the set bits of k. (m, 2**num_slots), or (m, 0) if subsets are not evaluated."""

    def of(self, part: BoolArray) -> Coalitions:
        """Return the coalitions of some of the m sub-environments; the mask is (m,) bool."""
        return Coalitions(self.member, self.alpha, *(rows[part] for rows in self[2:]))


def plan_coalitions(
    members: IntArray, slots: SlotState, *, leave_one_out: bool, all_subsets: bool = False
) -> Coalitions:
    """List the distinct coalitions of some sub-environments.

    Args:
        members: Indices of the sub-environments. (m,) int64.
        slots: State of the slots of all sub-environments.
        leave_one_out: Whether to leave out each trial seed with alpha > 0, and to evaluate each
            seed with alpha 0 at alpha 1.
        all_subsets: Whether to also leave out every subset of the trial seeds.

    Returns:
        Coalitions to evaluate.
    """
    m, num_slots = len(members), slots.stage.shape[1]
    num_subsets = 2**num_slots if all_subsets else 0
    # Upper limit of the rows: live, committed, two per slot, subsets. `_plan` skips duplicates.
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
    """Write the plan and return the number of rows.

    The rows of a sub-environment are contiguous, so `_row_of` searches only these for a duplicate.

    Args:
        plan: Arrays to write, with as many rows as can be needed.
        members: Indices of the sub-environments. (m,) int64.
        stage: Values of `Stage`. (num_envs, num_slots) int64.
        present: Current blend weights. (num_envs, num_slots) float64.
        leave_one_out: As in `plan_coalitions`.
    """
    num_slots, rows = stage.shape[1], 0
    wanted, alpha = np.empty(num_slots), plan.alpha
    for n, i in enumerate(members):
        first = rows
        plan.live[n], rows = _row_of(present[i], alpha, first, rows)
        for s in range(num_slots):
            wanted[s] = present[i, s] if stage[i, s] == Stage.FOSSILIZED else 0.0
        plan.committed[n], rows = _row_of(wanted, alpha, first, rows)
        # Without a trial seed, or with a seed at alpha 1 instead of 0; all others at their alpha.
        for s in range(num_slots):
            is_live = Stage.GERMINATED <= stage[i, s] <= Stage.FOSSILIZED
            if leave_one_out and is_live:
                for other in range(num_slots):
                    wanted[other] = present[i, other]
                if present[i, s] == 0:
                    wanted[s] = 1.0
                    plan.would_be[n, s], rows = _row_of(wanted, alpha, first, rows)
                elif stage[i, s] != Stage.FOSSILIZED:
                    wanted[s] = 0.0
                    plan.without[n, s], rows = _row_of(wanted, alpha, first, rows)
        # Bits of slots without a trial seed change nothing, so many subsets share a row.
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
    """Find blend weights in the rows from `first` on, or append them.

    Args:
        wanted: Blend weights to find. (num_slots,) float64.
        alpha: Blend weights of all rows, changed in place. (most rows, num_slots) float64.
        first: First row of the sub-environment.
        rows: Number of rows in use.

    Returns:
        Row of the weights, and the new number of rows.
    """
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
    """Compute the exact Shapley value of every slot.

    phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! * (v(S with i) - v(S)). Slots without a
    trial seed are null players. Their value is 0, and they do not affect the values of the others.

    Source: Shapley (1953), equation 11.

    Args:
        value: v of the coalition without the slots that are the set bits of k.
            (m, 2**num_slots) float64.
        num_slots: Number n of players.

    Returns:
        Shapley values in the unit of `value`. (m, num_slots) float64.
    """
    result = np.zeros((len(value), num_slots))
    for k in range(2**num_slots):
        num_absent = k.bit_count()
        for slot in range(num_slots):
            if k >> slot & 1:
                # S is the coalition without the slots of k. Clearing the slot's bit adds it to S.
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
    """Write accuracies, contributions, interactions and counterfactual effects into the state.

    The contribution of seed i is acc(live) - acc(live without i), or its Shapley value if all
    subsets were evaluated. If exactly two trial seeds i and j have alpha > 0, the live network
    without both equals the committed network. By inclusion and exclusion their interaction is
    acc(live) - acc(live without i) - acc(live without j) + acc(committed). The counterfactual
    effect of a seed at alpha 0 is acc(live with it at alpha 1) - acc(live).

    Args:
        progress: Progress of the episodes, changed in place for `members`.
        measured: Measurements of the seeds, changed in place for `members`.
        members: Indices of the evaluated sub-environments. (m,) int64.
        coalitions: Evaluated coalitions of `members`.
        accuracy: Accuracy of each coalition, 0 to 1. (rows,) float64.
        loss: Mean loss of each coalition [nats]. (rows,) float64.
    """
    # (m, 2**num_slots) rows -> (m, 2**num_slots) accuracies -> (m, num_slots) Shapley values
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
    """Write the measurements of `record_evaluation`; `shapley` is (m, num_slots) or (0, num_slots).

    The changes are differences from the values that the state holds before the call.
    """
    without, would_be = coalitions.without, coalitions.would_be
    for n, i in enumerate(members):
        live, committed = coalitions.live[n], coalitions.committed[n]
        own = accuracy[live]
        # Shift the histories by one env step; index 0 is the latest change.
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
            # A fossilized seed keeps its last contribution, whose age grows.
            elif measured.has_contribution[i, s]:
                measured.contribution_age[i, s] += 1
        # `lost` is the sum of the accuracies without one seed each.
        for s in range(without.shape[1]):
            is_pair = num_tested == 2 and without[n, s] >= 0
            measured.has_interaction[i, s] = is_pair
            measured.interaction[i, s] = own - lost + accuracy[committed] if is_pair else 0.0
