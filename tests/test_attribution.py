"""Which coalitions are evaluated, and what is concluded from their accuracies.

Blend weights are powers of 1/2, so that every sum and product here is exact.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from esper_env.config import EnvConfig, FloatArray, Stage
from esper_env.growth.contributions import (
    Coalitions,
    plan_coalitions,
    record_evaluation,
    shapley_values,
)
from esper_env.growth.state import Measurements, Progress, SlotState
from tests.builders import slots, walk

D, T, B, H, F = Stage.DORMANT, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED
GRADIENTS = ("has_gradient", "gradient_norm", "vanishing", "exploding", "health")
EXACT = 1e-12
"""Tolerance of a sum of four float64 accuracies."""


def everyone(state: SlotState) -> npt.NDArray[np.int64]:
    return np.arange(len(state.stage))


def networks(plan: Coalitions) -> list[tuple[int, tuple[float, ...]]]:
    """Return each row as (member, blend weights)."""
    return [(int(m), tuple(a)) for m, a in zip(plan.member, plan.alpha.tolist(), strict=True)]


def network(plan: Coalitions, row: Any) -> tuple[int, tuple[float, ...]]:
    return networks(plan)[int(row)]


# ------------------------------------------------------------------ what is evaluated


@pytest.mark.parametrize(
    ("stages", "alpha", "expected"),
    [
        ([D, D, D], [0, 0, 0], {(0, 0, 0)}),
        ([T, D, D], [0, 0, 0], {(0, 0, 0), (1, 0, 0)}),
        ([T, B, F], [0, 0.5, 1], {(0, 0.5, 1), (0, 0, 1), (1, 0.5, 1)}),
        ([F, D, F], [1, 0, 1], {(1, 0, 1)}),
        ([B, D, D], [0.5, 0, 0], {(0.5, 0, 0), (0, 0, 0)}),
        ([B, F, D], [0.5, 1, 0], {(0.5, 1, 0), (0, 1, 0)}),
        ([B, H, D], [0.5, 1, 0], {(0.5, 1, 0), (0, 1, 0), (0.5, 0, 0), (0, 0, 0)}),
        ([B, H, F], [0.5, 1, 1], {(0.5, 1, 1), (0, 1, 1), (0.5, 0, 1), (0, 0, 1)}),
        (
            [B, H, B],
            [0.5, 1, 0.25],
            {(0.5, 1, 0.25), (0, 1, 0.25), (0.5, 0, 0.25), (0.5, 1, 0), (0, 0, 0)},
        ),
    ],
)
def test_each_distinct_network_is_listed_once(
    stages: list[Stage], alpha: list[float], expected: set[tuple[float, ...]]
) -> None:
    """Live, only fossilized seeds, live without each blended trial seed; equal ones share a row.

    A seed that trains behind the host has no weight, so leaving it out changes nothing, and it is
    tried at alpha 1 instead. The predecessor evaluated 12 networks where 8 differ. Findings PRE-16
    and SYN-M18.
    """
    state = slots([stages], [alpha])
    plan = plan_coalitions(everyone(state), state, leave_one_out=True)
    rows = networks(plan)
    assert len(rows) == len(expected)
    assert {a for _, a in rows} == expected


@pytest.mark.parametrize("leave_one_out", [True, False])
def test_random_lives_list_what_scalar_code_lists(leave_one_out: bool) -> None:
    """The same plan, written again with one loop per member and slot and a set."""
    rng = np.random.default_rng(0)
    steps = walk(EnvConfig(), rng, num_envs=12, num_steps=80, num_slots=3, restart_share=0.02)
    sizes = set()
    for step in steps:
        state = step.after
        members = rng.permutation(12)[:7]
        plan = plan_coalitions(members, state, leave_one_out=leave_one_out)
        expected = set()
        for k, i in enumerate(members.tolist()):
            live = tuple(state.alpha[i].tolist())
            fossils = tuple(a if state.stage[i, s] == F else 0.0 for s, a in enumerate(live))
            expected |= {(i, live), (i, fossils)}
            assert network(plan, plan.live[k]) == (i, live)
            assert network(plan, plan.committed[k]) == (i, fossils)
            for s in range(3):
                is_tested = leave_one_out and live[s] > 0 and state.stage[i, s] != F
                assert (plan.without[k, s] >= 0) == is_tested
                if is_tested:
                    rest = (i, (*live[:s], 0.0, *live[s + 1 :]))
                    assert network(plan, plan.without[k, s]) == rest
                    expected.add(rest)
                is_on_trial = Stage.GERMINATED <= state.stage[i, s] <= Stage.HOLDING
                is_tried = leave_one_out and live[s] == 0 and is_on_trial
                assert (plan.would_be[k, s] >= 0) == is_tried
                if is_tried:
                    full = (i, (*live[:s], 1.0, *live[s + 1 :]))
                    assert network(plan, plan.would_be[k, s]) == full
                    expected.add(full)
        rows = networks(plan)
        assert len(rows) == len(set(rows))
        assert set(rows) == expected
        sizes.add(len(rows))
    assert len(sizes) > 3, "the lives are too much alike to show anything"


# ------------------------------------------------------------------ what is concluded


def record(
    state: SlotState, measured: Measurements, accuracy: dict[tuple[float, ...], float]
) -> None:
    """Evaluate all members; every member has the same accuracy for the same blend weights."""
    plan = plan_coalitions(everyone(state), state, leave_one_out=True)
    values = np.array([accuracy[alpha] for _, alpha in networks(plan)])
    conclude(measured, everyone(state), plan, values)


def conclude(
    measured: Measurements, members: npt.NDArray[np.int64], plan: Coalitions, accuracy: FloatArray
) -> None:
    """Record accuracies; the losses are all 0."""
    progress = Progress.empty(len(measured.health))
    record_evaluation(progress, measured, members, plan, accuracy, np.zeros(len(accuracy)))


def test_histories_and_plateau_follow_the_live_network() -> None:
    """0.5015 is within the margin of 0.003 of 0.5, and 0.505 is beyond it."""
    state, progress = slots([[D]], [[0]]), Progress.empty(1)
    plan = plan_coalitions(everyone(state), state, leave_one_out=True)
    accuracies, plateaus = [0.25, 0.5, 0.5015, 0.505, 0.4], []
    losses = np.array([2.0, 1.5, 1.75, 1.0, 0.5])
    for accuracy, loss in zip(accuracies, losses, strict=True):
        measured = Measurements.empty(1, 1)
        results = np.array([accuracy]), np.array([loss])
        record_evaluation(progress, measured, everyone(state), plan, *results)
        plateaus.append(int(progress.plateau_steps[0]))
    assert plateaus == [0, 0, 1, 0, 1]
    assert progress.best_accuracy[0] == 0.505
    latest = slice(None, -len(progress.loss_history[0]) - 1, -1)
    np.testing.assert_array_equal(progress.accuracy_history[0], np.diff(accuracies)[latest])
    np.testing.assert_array_equal(progress.loss_history[0], np.diff(losses)[latest])


def of(measured: Measurements, name: str) -> FloatArray:
    """Return a measurement of member 0, (slots,)."""
    return np.asarray(getattr(measured, name)[0])


def test_contribution_is_what_the_network_loses_without_the_seed() -> None:
    """0.75 with both, 0.5 without the first, 0.875 without the second: 0.25 and -0.125.

    By inclusion and exclusion the pair interacts with 0.75 - 0.5 - 0.875 + 0.25 = -0.375, where
    0.25 is the accuracy without both.
    """
    state = slots([[B, H, D]], [[0.5, 1, 0]])
    measured = Measurements.empty(1, 3)
    accuracy = {(0.5, 1, 0): 0.75, (0, 1, 0): 0.5, (0.5, 0, 0): 0.875, (0, 0, 0): 0.25}
    record(state, measured, accuracy)
    assert of(measured, "contribution").tolist() == [0.25, -0.125, 0.0]
    assert of(measured, "has_contribution").tolist() == [True, True, False]
    assert of(measured, "contribution_velocity").tolist() == [0.0, 0.0, 0.0]
    assert of(measured, "contribution_age").tolist() == [0, 0, 0]
    assert of(measured, "interaction").tolist() == [-0.375, -0.375, 0.0]
    assert of(measured, "has_interaction").tolist() == [True, True, False]


def test_interaction_of_two_seeds_beside_a_fossil_keeps_the_fossil_in() -> None:
    """0.9 - 0.6 - 0.7 + 0.5 = 0.1, where 0.5 is the accuracy of the committed network."""
    state = slots([[B, F, H]], [[0.5, 1, 1]])
    measured = Measurements.empty(1, 3)
    accuracy = {(0.5, 1, 1): 0.9, (0, 1, 1): 0.6, (0.5, 1, 0): 0.7, (0, 1, 0): 0.5}
    record(state, measured, accuracy)
    np.testing.assert_allclose(of(measured, "interaction"), [0.1, 0, 0.1], rtol=0, atol=EXACT)
    assert of(measured, "has_interaction").tolist() == [True, False, True]
    assert of(measured, "has_contribution").tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("stages", "alpha"),
    [([B, D, D], [0.5, 0, 0]), ([B, T, F], [0.5, 0, 1]), ([B, H, B], [0.5, 1, 0.25])],
)
def test_interaction_is_measured_only_between_exactly_two_seeds(
    stages: list[Stage], alpha: list[float]
) -> None:
    """With one seed there is no pair; with three the network without two is not evaluated."""
    state = slots([stages], [alpha])
    measured = Measurements.empty(1, 3)
    plan = plan_coalitions(everyone(state), state, leave_one_out=True)
    values = np.random.default_rng(0).random(len(plan.member))
    conclude(measured, everyone(state), plan, values)
    assert measured.has_contribution.any()
    assert not measured.has_interaction.any()
    assert (measured.interaction == 0).all()


def test_an_interaction_is_forgotten_when_the_pair_is_gone() -> None:
    measured = Measurements.empty(1, 2)
    pair = slots([[B, H]], [[0.5, 1]])
    accuracy = {(0.5, 1): 0.9, (0, 1): 0.6, (0.5, 0): 0.7, (0, 0): 0.5}
    record(pair, measured, accuracy)
    assert measured.has_interaction.all()
    record(slots([[B, F]], [[0.5, 1]]), measured, accuracy)
    assert not measured.has_interaction.any()
    assert (measured.interaction == 0).all()


def test_velocity_and_freshness_follow_the_measurements() -> None:
    """Contributions 0.25, 0.375, 0.3125, then the seed is fossilized and not measured again.

    The velocity of the first is 0, then 0.125 and -0.0625, then 0 because nothing was measured.
    The last contribution stays, and its age counts on.
    """
    state = slots([[H]], [[1]])
    measured = Measurements.empty(1, 1)
    seen = []
    for step in range(5):
        live = [0.75, 0.875, 0.8125, 0.9, 0.9][step]
        if step == 3:
            state.stage[:] = F
        record(state, measured, {(1.0,): live, (0.0,): 0.5})
        names = ("contribution", "contribution_velocity", "contribution_age", "has_contribution")
        seen.append(tuple(of(measured, name)[0] for name in names))
    assert seen == [
        (0.25, 0.0, 0, True),
        (0.375, 0.125, 0, True),
        (0.3125, -0.0625, 0, True),
        (0.3125, 0.0, 1, True),
        (0.3125, 0.0, 2, True),
    ]


def test_a_seed_without_weight_shows_what_it_would_do_until_it_has_weight() -> None:
    """Finding SYN-M18: acc(with it at alpha 1) - acc(live) = 0.625 - 0.5; gone once blended.

    Its contribution was never measured, so it has no age.
    """
    state = slots([[T, B]], [[0, 0.5]])
    measured = Measurements.empty(1, 2)
    for _ in range(3):
        record(state, measured, {(0.0, 0.5): 0.5, (0.0, 0.0): 0.25, (1.0, 0.5): 0.625})
    assert measured.has_contribution.tolist() == [[False, True]]
    assert (measured.contribution_age == 0).all()
    assert measured.has_would_be.tolist() == [[True, False]]
    assert measured.would_be.tolist() == [[0.125, 0.0]]
    assert measured.contribution.tolist() == [[0.0, 0.25]]
    state = slots([[B, B]], [[0.5, 0.5]])
    values = {(0.5, 0.5): 0.5, (0.0, 0.5): 0.25, (0.5, 0.0): 0.25, (0.0, 0.0): 0.125}
    record(state, measured, values)
    assert not measured.has_would_be.any()
    assert not measured.would_be.any()


def test_a_member_that_is_not_in_the_list_keeps_its_measurements() -> None:
    """All four members are alike; 3 and 1 are evaluated, with accuracies of their own.

    Gradients are measured by another part of a step, so those of 3 and 1 stay as well.
    """
    state = slots([[B, H]] * 4, [[0.5, 1]] * 4)
    measured = Measurements.empty(4, 2)
    for array in measured:
        array[:] = 1
    kept = copy.deepcopy(measured)
    members = np.array([3, 1])
    plan = plan_coalitions(members, state, leave_one_out=True)
    base = {3: 0.0, 1: 0.25}
    values = np.array([base[m] + 0.5 * (a[0] > 0) for m, a in networks(plan)])
    conclude(measured, members, plan, values)
    for name, now, before in zip(measured._fields, measured, kept, strict=True):
        stays = slice(None) if name in GRADIENTS else [0, 2]
        assert np.array_equal(now[stays], before[stays]), name
    assert measured.contribution[[1, 3]].tolist() == [[0.5, 0.0], [0.5, 0.0]]
    assert measured.contribution_velocity[[1, 3]].tolist() == [[-0.5, -1.0], [-0.5, -1.0]]


# ------------------------------------------------------------------ all subsets


def test_shapley_values_equal_the_mean_over_all_orders() -> None:
    """Brute force: phi_i is the mean marginal contribution of i over all orders of joining."""
    rng = np.random.default_rng(3)
    for n in (1, 2, 3, 4):
        value = rng.normal(size=(5, 2**n))
        expected = np.zeros((5, n))
        orders = list(itertools.permutations(range(n)))
        for order in orders:
            absent = 2**n - 1
            for slot in order:
                joined = absent & ~(1 << slot)
                expected[:, slot] += (value[:, joined] - value[:, absent]) / len(orders)
                absent = joined
        actual = shapley_values(value, n)
        # Sums of at most 4! products in float64.
        np.testing.assert_allclose(actual, expected, atol=1e-12)
        np.testing.assert_allclose(actual.sum(1), value[:, 0] - value[:, -1], atol=1e-12)


def test_full_attribution_records_shapley_values_of_trial_seeds_only() -> None:
    """Slot 0 fossilized, 1 and 2 on trial: v = .9 live, .7 without 1, .8 without 2, .5 without.

    phi_1 = ((.9 - .7) + (.8 - .5)) / 2 = .25, phi_2 = ((.9 - .8) + (.7 - .5)) / 2 = .15.
    """
    state = slots([[F, H, B]], [[1, 1, 0.5]])
    members = np.array([0])
    plan = plan_coalitions(members, state, leave_one_out=True, all_subsets=True)
    assert len(plan.member) == 4, "a fossil is never left out, and each network is listed once"
    by_alpha = {(1.0, 1.0, 0.5): 0.9, (1.0, 0.0, 0.5): 0.7, (1.0, 1.0, 0.0): 0.8}
    by_alpha[1.0, 0.0, 0.0] = 0.5
    accuracy = np.array([by_alpha[tuple(row)] for row in plan.alpha.tolist()])
    measured = Measurements.empty(1, 3)
    conclude(measured, members, plan, accuracy)
    np.testing.assert_allclose(measured.contribution[0], [0, 0.25, 0.15], atol=1e-12)
    assert measured.has_contribution[0].tolist() == [False, True, True]
