"""The governor: who panics, and what a rollback does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from esper_env import EnvConfig, Op, Stage
from esper_env.growth.rollback import judge
from esper_env.growth.state import RollbackState
from tests.builders import CONV_LIGHT, action, grow, make, play, poison, waits

GUESS = float(np.log(10))
CONFIG = EnvConfig(panic_window=4, panic_patience=2)


def feed(losses: list[float], config: EnvConfig = CONFIG) -> list[bool]:
    """Let one member go through some losses and return where it panics."""
    state, one = RollbackState.empty(1, config), np.array([0])
    fine = np.array([True])
    return [bool(judge(state, one, np.array([x]), fine, GUESS, config)[0]) for x in losses]


def test_ordinary_training_never_panics() -> None:
    assert not any(feed([2.3, 2.0, 1.7, 1.4, 1.2, 1.1, 1.0, 1.3, 0.9, 0.85, 1.1, 0.8]))


@pytest.mark.parametrize("loss", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_panics_at_once(loss: float) -> None:
    assert feed([2.0, loss]) == [False, True]


def test_a_weight_that_is_not_finite_panics_at_once() -> None:
    state = RollbackState.empty(2, CONFIG)
    panics = judge(state, np.array([0, 1]), np.ones(2), np.array([True, False]), GUESS, CONFIG)
    assert panics.tolist() == [False, True]


def test_collapse_panics_when_it_is_sustained() -> None:
    """Mean 1.0 < 0.6 ln 10 = 1.38; 2.2 > 0.935 ln 10 = 2.15 counts, 2.1 does not."""
    past = [1.0, 1.0, 1.0, 1.0]
    assert feed([*past, 2.2, 2.2]) == [False] * 5 + [True]
    assert not any(feed([*past, 2.1, 2.1, 2.1]))
    assert not any(feed([*past, 2.2, 1.0, 2.2, 1.0])), "not in succession"
    assert not any(feed([1.5, 1.5, 1.5, 1.5, 2.2, 2.2])), "never learned, so nothing collapsed"
    assert not any(feed([1.0, 1.0, 1.0, 2.2, 2.2])), "the window is not full"


def test_divergence_needs_both_its_bounds() -> None:
    """Past 0.1, 0.2, 0.1, 0.2: mean 0.15, deviation 0.05. Bounds 0.45 (6 sigma) and 0.45 (3x)."""
    past = [0.1, 0.2, 0.1, 0.2]
    assert feed([*past, 0.46, 0.46])[-1]
    assert not any(feed([*past, 0.44, 0.44]))
    # 6 sigma of a steady past is met by little; three times the mean is not.
    assert not any(feed([0.2, 0.2, 0.2, 0.2, 0.5, 0.5]))
    # Three times the mean of a wild past is met; 6 sigma is not.
    assert not any(feed([0.01, 0.4, 0.01, 0.4, 0.8, 0.8]))


def test_a_panic_clears_the_past_so_that_it_cannot_repeat() -> None:
    """Finding PRE-6: after a rollback the window has to fill again, with all four losses."""
    until_panic, panics = [1.0, 1.0, 1.0, 1.0, 2.2, 2.2], [False] * 5 + [True]
    assert feed([*until_panic, 2.2, 2.2, 2.2]) == panics + [False] * 3
    assert feed([*until_panic, 1.0, 1.0, 1.0, 2.2, 2.2]) == panics + [False] * 5


def test_only_the_poisoned_member_rolls_back_in_that_step_with_its_penalty() -> None:
    """Finding PRE-5: the penalty is on the transition of the panic; others bitwise untouched."""
    envs, twin = make(4, episode_steps=40), make(4, episode_steps=40)
    for each in (envs, twin):
        each.reset(seed=0)
        play(each, 8)
    poison(envs, 2)
    wait = waits(4)
    for step in range(4):
        observation, reward, terminated, _, info = envs.step(wait)
        expected = twin.step(wait)
        assert info["rolled_back"].tolist() == [False, False, step == 0, False]
        penalty = info["reward_terms"]["rollback"]
        assert penalty.tolist() == [0, 0, -envs.config.rollback_penalty * (step == 0), 0]
        assert reward == pytest.approx(
            sum(v for k, v in info["reward_terms"].items() if not k.startswith("_"))
        )
        others = [0, 1, 3]
        np.testing.assert_array_equal(observation[others], expected[0][others])
        np.testing.assert_array_equal(reward[others], expected[1][others])
        assert np.isfinite(observation).all()
        assert np.isfinite(info["accuracy"]).all()
        assert not terminated.any()
    storage, own = envs.debug_state().population.storage, twin.debug_state().population.storage
    assert torch.equal(storage.parameters[others], own.parameters[others])
    assert torch.isfinite(storage.parameters).all()


def test_a_rollback_restores_the_snapshot_and_removes_trial_seeds_but_no_fossils() -> None:
    envs = make(1, episode_steps=60, snapshot_interval=3, embargo_steps=2)
    envs.reset(seed=0)

    def step(op: Op, slot: int = 0, **options: int) -> dict[str, Any]:
        info: dict[str, Any] = envs.step(action(op, slot, **options)[None])[4]
        return info

    grow(envs)
    storage = envs.debug_state().population.storage
    saved = storage.parameters[0].clone()
    step(Op.FOSSILIZE)
    assert torch.equal(storage.snapshots["parameters"][0], saved), "saved at fossilization"
    step(Op.GERMINATE, 1, blueprint=CONV_LIGHT)
    poison(envs, 0)
    info = step(Op.WAIT)
    assert info["rolled_back"][0]
    assert info["stage"][0].tolist() == [Stage.FOSSILIZED, Stage.EMBARGOED]
    assert torch.equal(storage.parameters[0], saved)
    # The embargo lasts embargo_steps decisions, like after a prune.
    assert step(Op.WAIT)["stage"][0, 1] == Stage.EMBARGOED
    assert step(Op.WAIT)["stage"][0, 1] == Stage.DORMANT


def test_an_episode_ends_for_good_at_max_rollbacks() -> None:
    """Finding PRE-6; the settlement of the last step is paid there too."""
    for horizon in ("truncate", "terminal"):
        envs = make(2, max_rollbacks=2, autoreset_mode="SameStep", horizon=horizon)
        _, info = envs.reset(seed=0)
        wait = waits(2)
        start, total = info["score"][0], 0.0
        poison(envs, 0)
        _, reward, terminated, truncated, _ = envs.step(wait)
        total += reward[0]
        assert not (terminated | truncated).any()
        poison(envs, 0)
        _, reward, terminated, truncated, info = envs.step(wait)
        total += reward[0]
        assert terminated.tolist() == [True, False]
        assert not truncated.any()
        final = info["final_info"]["committed_score"][0]
        assert total == pytest.approx(final - start - 2 * envs.config.rollback_penalty)
        assert envs.debug_state().state.rollback.rollbacks[0] == 0, "the next episode starts anew"


def test_a_seed_fossilized_in_the_step_of_a_panic_is_kept_alive() -> None:
    """The last regular snapshot is older than the seed, which may not come back as zeros."""
    envs = make(1, episode_steps=60, snapshot_interval=1000)
    envs.reset(seed=0)
    sim = envs.debug_state()
    grow(envs)
    saved = sim.population.storage.parameters[0].clone()
    train = sim.population.train

    def break_down(*arguments: Any) -> Any:
        report = train(*arguments)
        report.loss[:] = np.nan
        return report

    sim.population.train = break_down  # type: ignore[method-assign]
    *_, info = envs.step(action(Op.FOSSILIZE)[None])
    assert info["rolled_back"][0]
    assert info["stage"][0, 0] == Stage.FOSSILIZED
    assert torch.equal(sim.population.storage.parameters[0], saved)


@pytest.mark.parametrize("interval", [2, 5])
def test_snapshots_are_taken_every_so_many_healthy_steps(interval: int) -> None:
    """Finding TRN-6: by the configured interval, and after each fossilization (test above)."""
    envs = make(1, episode_steps=60, snapshot_interval=interval)
    envs.reset(seed=0)
    storage = envs.debug_state().population.storage
    last, taken = storage.snapshots["parameters"].clone(), []
    for step in range(1, 13):
        envs.step(action(Op.WAIT)[None])
        if not torch.equal(storage.snapshots["parameters"], last):
            taken.append(step)
            last = storage.snapshots["parameters"].clone()
            assert torch.equal(last, storage.parameters)
    assert taken == list(range(interval, 13, interval))
