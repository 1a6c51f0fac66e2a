"""Scores and rewards: values by hand, telescoping sums, and errors for wrong settings."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from esper_env.config import BoolArray, EnvConfig, FloatArray, IntArray, Op, Stage
from esper_env.growth.reward import (
    PRESETS,
    STAGE_POTENTIAL,
    STAGE_PROGRESS,
    TERMS,
    compute_reward,
    compute_scores,
    resolve_weights,
    score,
)
from esper_env.growth.state import Progress, Scores, Sizes, SlotState, Transition
from tests.builders import walk

EXACT = 1e-12
"""Tolerance of float64 sums of a few dozen numbers around 1."""
TELESCOPE = 1e-9
"""What finding SYN-H8 asks for."""


def standing(
    live: FloatArray, committed: FloatArray | None = None, phi: FloatArray | None = None
) -> Scores:
    """Return a standing; what is not given is 0."""
    none = np.zeros(len(live))
    return Scores(
        score=live,
        committed_score=none if committed is None else committed,
        potential=none if phi is None else phi,
        earned=live,
    )


def transition(
    before: Scores,
    after: Scores,
    is_last: npt.ArrayLike = False,
    is_terminated: npt.ArrayLike = False,
    is_rolled_back: npt.ArrayLike = False,
) -> Transition:
    """Return a transition; a flag is one for all members or one for each."""
    flags = [
        np.broadcast_to(f, before.score.shape) for f in (is_last, is_terminated, is_rolled_back)
    ]
    return Transition(before, after, *flags)


def potential(stages: IntArray, steps: IntArray) -> FloatArray:
    """Return Phi of members, the part of the scores. (members,)."""
    n = len(stages)
    slots, none = SlotState.empty(*stages.shape), np.zeros(n, dtype=np.int64)
    slots.stage[:], slots.stage_steps[:] = stages, steps
    sizes = Sizes(
        host=none + 100, seeds=slots.stage, grown=none, charged=none, committed=none, budgeted=none
    )
    return compute_scores(slots, Progress.empty(n), sizes, EnvConfig(rent_weight=0.0)).potential


# ------------------------------------------------------------------ score


@pytest.mark.parametrize(
    ("accuracy", "parameters", "rent_weight", "expected"),
    [
        (0.8, 0, 0.01, 0.8),
        (0.8, 100, 0.01, 0.79),
        (0.8, 300, 0.01, 0.78),
        (0.8, 700, 0.1, 0.5),
        (0.1, 1500, 0.05, -0.1),
        (0.8, 700, 0.0, 0.8),
    ],
)
def test_score_pays_rent_for_every_doubling(
    accuracy: float, parameters: int, rent_weight: float, expected: float
) -> None:
    """Host 100 parameters. 300 more make 4 times as many: 2 doublings, 0.8 - 2 * 0.01 = 0.78.

    100, 700 and 1500 more parameters are 1, 3 and 4 doublings.
    """
    got = score(np.array([accuracy]), np.array([float(parameters)]), 100, rent_weight)
    assert abs(got[0] - expected) < EXACT


# ------------------------------------------------------------------ gain and commit


@pytest.mark.parametrize("is_terminated", [False, True])
def test_gain_and_commit_sum_to_the_rise_of_the_committed_score(is_terminated: bool) -> None:
    """Sum = (score_T - score_0) + (committed_T - score_T) = committed_T - score_0.

    At the start nothing is grown, so score_0 is the committed score too, and the sum is what
    evaluation reports, whatever happened between. Finding PRE-10.
    """
    rng = np.random.default_rng(0)
    config = EnvConfig()
    weights = resolve_weights(config)
    num_steps, n = 40, 5
    live, committed = rng.normal(size=(2, num_steps + 1, n))
    total = np.zeros(n)
    standings = [standing(*scores) for scores in zip(live, committed, strict=True)]
    for t, pair in enumerate(itertools.pairwise(standings)):
        is_last = t == num_steps - 1
        step = transition(*pair, is_last, is_terminated and is_last)
        total += compute_reward(step, weights, config)[0]
    np.testing.assert_allclose(total, committed[-1] - live[0], rtol=0, atol=EXACT)


# ------------------------------------------------------------------ potential


@pytest.mark.parametrize(
    ("stages", "steps", "expected"),
    [
        ([Stage.DORMANT], [0], 0.0),
        ([Stage.EMBARGOED], [3], 0.0),
        ([Stage.GERMINATED], [0], 0.1),
        ([Stage.TRAINING], [4], 0.275),
        ([Stage.BLENDING], [8], 0.5125),
        ([Stage.HOLDING], [12], 0.73125),
        ([Stage.FOSSILIZED], [40], 1.0),
        ([Stage.TRAINING, Stage.DORMANT, Stage.BLENDING], [4, 0, 8], 0.7875),
        ([Stage.FOSSILIZED, Stage.FOSSILIZED], [0, 9], 2.0),
    ],
)
def test_potential_by_hand(stages: list[Stage], steps: list[int], expected: float) -> None:
    """Stage potential plus progress * (1 - 2^(-steps / 4)).

    TRAINING for 4 steps: 0.2 + 0.15 / 2 = 0.275. BLENDING for 8: 0.4 + 0.15 * 3/4 = 0.5125.
    HOLDING for 12: 0.6 + 0.15 * 7/8 = 0.73125. Slots add up.
    """
    got = potential(np.array([stages], dtype=np.int64), np.array([steps]))
    assert got.shape == (1,)
    assert abs(got[0] - expected) < EXACT


def test_waiting_in_a_stage_never_reaches_the_potential_of_the_next() -> None:
    path = (Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED)
    for stage, following in itertools.pairwise(path):
        assert STAGE_POTENTIAL[stage] + STAGE_PROGRESS[stage] < STAGE_POTENTIAL[following]


def test_every_slot_counts_and_all_count_alike() -> None:
    """Phi of slots together is the sum of Phi of each, in any order. Finding PRE-9."""
    rng = np.random.default_rng(0)
    stages = rng.integers(0, len(Stage), (200, 4))
    steps = rng.integers(0, 30, (200, 4))
    together = potential(stages, steps)
    alone = sum(potential(stages[:, s : s + 1], steps[:, s : s + 1]) for s in range(4))
    np.testing.assert_allclose(together, alone, rtol=0, atol=EXACT)
    order = [2, 0, 3, 1]
    np.testing.assert_allclose(
        potential(stages[:, order], steps[:, order]), together, rtol=0, atol=EXACT
    )


# ------------------------------------------------------------------ shaping


def rollout(
    rng: np.random.Generator, num_steps: int, n: int
) -> list[tuple[FloatArray, FloatArray]]:
    """Return Phi before and after each step of random lives, [(n,), (n,)] per step.

    Now and then a member is set back to where it was eight steps before and lives on from there,
    as after a rollback. That is done by reading its recorded life with a lag.
    """
    config = EnvConfig(automatic_holding=False)
    lives = list(walk(config, rng, num_envs=n, num_steps=num_steps, num_slots=3))
    assert set(np.concatenate([step.actions[:, 0] for step in lives]).tolist()) == set(Op)
    states = [lives[0].before, *(step.after for step in lives)]
    recorded = np.array([potential(state.stage, state.stage_steps) for state in states])
    lag = np.zeros(n, dtype=np.int64)
    phi = [recorded[0]]
    for t in range(1, num_steps + 1):
        is_set_back = (rng.random(n) < 0.05) & (t - lag >= 8)
        lag = np.where(is_set_back, lag + 8, lag)
        phi.append(recorded[t - lag, np.arange(n)])
    assert (lag > 0).any()
    return list(itertools.pairwise(phi))


@pytest.mark.parametrize("gamma", [0.9, 0.99, 1.0])
@pytest.mark.parametrize("end", ["", "truncated", "terminated"])
def test_shaping_telescopes_whatever_the_actions(end: str, gamma: float) -> None:
    """Sum of gamma^t F_t = gamma^T Phi_T - Phi_0, with Phi_T = 0 at a true terminal only.

    Over random lives of 16 members and 150 steps, every operation and set-backs included.
    Finding SYN-H8.
    """
    config = EnvConfig(gamma=gamma, reward_weights={"pbrs": 1.0, "gain": 0.0, "commit": 0.0})
    weights = resolve_weights(config)
    n, num_steps = 16, 150
    pairs = rollout(np.random.default_rng(3), num_steps, n)
    # Start in the middle of the lives, where Phi_0 is not 0.
    pairs = pairs[20:]
    zeros, total = np.zeros(n), np.zeros(n)
    for t, (before, after) in enumerate(pairs):
        step = transition(
            standing(zeros, phi=before),
            standing(zeros, phi=after),
            end != "" and t == len(pairs) - 1,
            end == "terminated" and t == len(pairs) - 1,
        )
        total += gamma**t * compute_reward(step, weights, config)[0]
    phi_0, phi_end = pairs[0][0], pairs[-1][1]
    assert (phi_0 > 0).any()
    assert (phi_end > 0).any()
    kept = 0.0 if end == "terminated" else gamma ** len(pairs) * phi_end
    np.testing.assert_allclose(total, kept - phi_0, rtol=0, atol=TELESCOPE)


def test_terms_by_hand_where_an_episode_goes_on_is_truncated_or_terminates() -> None:
    """Commit is paid at the end; the potential is 0 at a terminal and kept at a truncation.

    With gamma 0.5 and Phi 0.4 -> 0.6, pbrs is 0.3 - 0.4 or, at a terminal, 0 - 0.4.
    """
    config = EnvConfig(gamma=0.5, reward_weights={"pbrs": 1.0})
    before = standing(np.full(3, 0.5), np.full(3, 0.5), np.full(3, 0.4))
    after = standing(np.full(3, 0.8), np.full(3, 0.6), np.full(3, 0.6))
    step = transition(before, after, [False, True, True], [False, False, True])
    terms = compute_reward(step, resolve_weights(config), config)[1]
    expected = {"gain": [0.3] * 3, "commit": [0.0, -0.2, -0.2], "pbrs": [-0.1, -0.1, -0.4]}
    for name, values in expected.items():
        np.testing.assert_allclose(terms[name], values, rtol=0, atol=EXACT)


# ------------------------------------------------------------------ weights


def random_transition(n: int, is_last: BoolArray) -> Transition:
    """Return arbitrary standings; every other ending is a true terminal."""
    rng = np.random.default_rng(5)
    values = rng.normal(size=(2, 4, n))
    is_terminated = is_last & (np.arange(n) % 2 == 0)
    is_rolled_back = ~is_last & (np.arange(n) % 5 == 0)
    return transition(
        Scores(*values[0]), Scores(*values[1]), is_last, is_terminated, is_rolled_back
    )


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_the_reported_terms_sum_to_the_reward(preset: str) -> None:
    config = EnvConfig(reward=preset, reward_weights={"pbrs": 0.3, "gain": -2.0})
    weights = resolve_weights(config)
    step = random_transition(50, np.arange(50) % 5 == 0)
    reward, terms = compute_reward(step, weights, config)
    assert reward.shape == (50,)
    assert set(terms) == set(weights)
    np.testing.assert_allclose(sum(terms.values()), reward, rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", sorted(TERMS))
def test_each_weight_scales_its_own_term(name: str) -> None:
    """The transition is not changed."""
    config = EnvConfig()
    step = random_transition(20, np.arange(20) % 3 == 0)
    kept = copy.deepcopy(step)
    alone = TERMS[name](step, config)
    assert (alone != 0).any()
    weights = {**dict.fromkeys(TERMS, 0.0), name: 2.5}
    reward, terms = compute_reward(step, weights, config)
    np.testing.assert_allclose(reward, 2.5 * alone, rtol=0, atol=EXACT)
    assert all((terms[other] == 0).all() for other in TERMS if other != name)
    np.testing.assert_equal(step, kept)


def test_the_default_preset_is_gain_and_single_weights_can_be_replaced() -> None:
    expected = {"gain": 1.0, "commit": 1.0, "pbrs": 0.0, "rollback": 1.0}
    assert resolve_weights(EnvConfig()) == expected
    changed = resolve_weights(EnvConfig(reward_weights={"pbrs": 0.1}))
    assert changed == expected | {"pbrs": 0.1}


def test_sparse_pays_the_committed_score_on_the_last_step_and_nothing_before() -> None:
    """0.7 for the first member, whose episode ends; the third is rolled back."""
    before = standing(np.full(3, 0.5), np.full(3, 0.4))
    after = standing(np.full(3, 0.9), np.full(3, 0.7))
    is_last, is_rolled_back = np.array([True, False, False]), np.array([False, False, True])
    config = EnvConfig(reward="sparse", rollback_penalty=0.25)
    step = transition(before, after, is_last, is_last, is_rolled_back)
    reward, _ = compute_reward(step, resolve_weights(config), config)
    assert reward.tolist() == [0.7, 0.0, -0.25]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"reward": "gian"}, "gain"),
        ({"reward_weights": {"pbr": 1.0}}, "pbrs"),
        ({"reward_weights": {"pbrs": math.nan}}, "pbrs.*finite"),
        ({"reward_weights": {"gain": math.inf}}, "gain.*finite"),
        ({"reward_weights": {"commit": -math.inf}}, "commit.*finite"),
    ],
)
def test_wrong_presets_terms_and_weights_raise(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        resolve_weights(EnvConfig(**fields))


@pytest.mark.parametrize("rent_weight", [0.0, 1e-300, 0.01, 1.0, 1e6])
def test_the_reward_is_finite_for_every_price_of_growth(rent_weight: float) -> None:
    """Growing, staying and pruning everything: no term divides by what may be 0. Finding SYN-C2."""
    accuracy, zeros = np.array([0.1, 0.5, 0.9]), np.zeros(3)
    before, after = (
        standing(score(accuracy, grown, 100, rent_weight), score(accuracy, zeros, 100, rent_weight))
        for grown in (np.array([0.0, 300.0, 1600.0]), np.array([300.0, 300.0, 0.0]))
    )
    config = EnvConfig(rent_weight=rent_weight)
    for is_last in (False, True):
        step = transition(before, after, is_last)
        assert np.isfinite(compute_reward(step, resolve_weights(config), config)[0]).all()


@pytest.mark.parametrize("rent_weight", [math.inf, math.nan, -0.01])
def test_a_price_of_growth_that_gives_no_finite_reward_is_refused(rent_weight: float) -> None:
    """An infinite price times no growth is NaN, so validation must not admit it. Finding SYN-C2."""
    with pytest.raises(ValueError, match="rent_weight"):
        EnvConfig(rent_weight=rent_weight)
