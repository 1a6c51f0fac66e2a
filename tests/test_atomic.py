"""Calls that are interrupted, layers that fail, threads, and copies of environments."""

from __future__ import annotations

import ast
import copy
import functools
import multiprocessing
import pickle
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AsyncVectorEnv

from benchmarks.interrupts import Interrupter, use_in_two_threads
from esper_env import EsperVectorEnv, Op, Stage, register_blueprint
from esper_env.population import blueprints
from esper_env.population.check_layers import Candidate, check_layers
from esper_env.population.layers import Conv, Layer, Relu
from tests.builders import (
    FULL_ALPHA,
    ID,
    SMALL,
    action,
    assert_same,
    make,
    make_single,
    play,
    waits,
)

PACKAGE = Path(__file__).parent.parent / "esper_env"


def test_an_interrupted_call_is_complete_or_leaves_a_mark() -> None:
    """The script tries 1,000 times."""
    interrupter = Interrupter(seed=1)
    assert [problem for _ in range(40) for problem in interrupter.attempt()] == []
    outcomes = " ".join(interrupter.counts)
    assert "step, needs a reset" in outcomes
    assert "as before or complete" in outcomes


def test_a_second_thread_in_one_environment_is_rejected() -> None:
    """The script tries 100 times."""
    results = [use_in_two_threads(seed) for seed in range(20)]
    assert [problem for _, problems in results for problem in problems] == []
    assert sum(rejected for rejected, _ in results) > 0


def test_environments_in_separate_threads_are_bitwise_as_serial() -> None:
    def run(seed: int) -> list[Any]:
        envs = make(2)
        return [envs.reset(seed=seed), *play(envs, 8, seed)]

    results: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda n=seed: results.update({n: run(n)})) for seed in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, result in results.items():
        assert_same(result, run(seed))
    assert len(results) == 3


COPIES = pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))],
    ids=["deep", "pickle"],
)


@COPIES
def test_a_copy_continues_bitwise_and_independently(duplicate: Any) -> None:
    envs = make(2)
    envs.reset(seed=0)
    play(envs, 4)
    other = duplicate(envs)
    expected = play(envs, 4, seed=2)
    assert_same(play(other, 4, seed=2), expected)
    env = gym.make(ID, **SMALL)
    env.reset(seed=0)
    twin = duplicate(env)
    assert_same(twin.step(action(Op.WAIT)), env.step(action(Op.WAIT)))


@COPIES
def test_a_copy_of_an_interrupted_environment_needs_a_reset_too(
    duplicate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    envs = make(2)
    envs.reset(seed=0)
    monkeypatch.setattr(EsperVectorEnv, "_present", interrupt)
    with pytest.raises(KeyboardInterrupt):
        envs.step(waits(2))
    monkeypatch.undo()
    other = duplicate(envs)
    with pytest.raises(gym.error.ResetNeeded, match=r"step\(\) was interrupted by KeyboardInter"):
        other.step(waits(2))
    assert_same(other.reset(seed=0), make(2).reset(seed=0))


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_the_single_environment_names_the_interrupted_call_and_its_own_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env = make_single(episode_steps=1)
    env.reset(seed=0)
    env.step(action(Op.WAIT))
    with pytest.raises(gym.error.ResetNeeded, match=r"^the episode has ended; call reset\(\)"):
        env.step(action(Op.WAIT))
    env.reset()
    monkeypatch.setattr(EsperVectorEnv, "_present", interrupt)
    with pytest.raises(KeyboardInterrupt):
        env.step(action(Op.WAIT))
    monkeypatch.undo()
    for use in (lambda: env.step(action(Op.WAIT)), env.action_masks, env.get_state):
        with pytest.raises(gym.error.ResetNeeded, match=r"step\(\) was interrupted by Keyb"):
            use()
    assert_same(env.reset(seed=0), make_single(episode_steps=1).reset(seed=0))


def test_a_process_that_is_forked_after_a_step_continues_bitwise() -> None:
    envs = make(3)
    envs.reset(seed=0)
    play(envs, 3)
    reader, writer = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(
        target=lambda: writer.send(play(envs, 3, seed=2))
    )
    child.start()
    found = reader.recv()
    child.join()
    assert_same(found, play(envs, 3, seed=2))


@pytest.mark.parametrize("context", ["fork", "forkserver", "spawn"])
def test_asynchronous_environments_start_in_every_way(context: str) -> None:
    envs = AsyncVectorEnv(
        [functools.partial(gym.make, f"esper_env:{ID}", **SMALL)] * 1, context=context
    )
    try:
        observation, _ = envs.reset(seed=0)
        np.testing.assert_array_equal(observation, make(1).reset(seed=0)[0])
    finally:
        envs.close()


# ------------------------------------------------------------------ layers that fail

MOODY = "moody"


class Moody(Relu):
    """Passes features on until its mood changes: then it fails in training or in evaluation."""

    mood = ""

    def forward(self, x, parameters, buffers, training):  # type: ignore[no-untyped-def]
        del parameters, buffers
        if Moody.mood == "raises in training" and training:
            raise ZeroDivisionError("a bad day")
        if Moody.mood == "raises in evaluation" and not training:
            raise ZeroDivisionError("a bad day")
        if Moody.mood == "NaN in evaluation" and not training:
            return x * float("nan")
        return x


def moody(c: int) -> Sequence[Layer]:
    return [Conv(c, c, 1), Moody(), Conv(c, c, 1, bias=True, zero=True)]


@pytest.fixture
def envs(monkeypatch: pytest.MonkeyPatch) -> EsperVectorEnv:
    """Return three members; the first holds a seed of the blueprint `moody`."""
    monkeypatch.setattr(Moody, "mood", "")
    monkeypatch.setattr(blueprints, "_registry", list(blueprints.registered_blueprints()))
    register_blueprint(MOODY, moody)
    result = make(3, episode_steps=60)
    result.reset(seed=0)
    index = result.heads[2].options.index(MOODY)
    actions = waits(3)
    actions[0] = action(Op.GERMINATE, blueprint=index, alpha_target=FULL_ALPHA)
    info = result.step(actions)[4]
    while info["stage"][0, 0] != Stage.HOLDING:
        actions = waits(3)
        if result.conditional_masks()["slot"][0, Op.ADVANCE, 0]:
            actions[0] = action(Op.ADVANCE)
        info = result.step(actions)[4]
    return result


@pytest.mark.parametrize("mood", ["raises in training", "raises in evaluation"])
def test_a_layer_that_raises_costs_no_member_half_a_step(envs: EsperVectorEnv, mood: str) -> None:
    before = envs.get_state()
    Moody.mood = mood
    with pytest.raises(ZeroDivisionError, match="a bad day"):
        envs.step(waits(3))
    text = r"step\(\) was interrupted by ZeroDivisionError: a bad day; call reset\(\)"
    with pytest.raises(gym.error.ResetNeeded, match=text):
        envs.step(waits(3))
    Moody.mood = ""
    envs.set_state(before)
    assert_same(envs.get_state(), before)
    envs.step(waits(3))


@pytest.mark.parametrize("is_fossilized", [False, True])
def test_a_loss_that_is_not_finite_in_evaluation_only_rolls_its_member_back(
    envs: EsperVectorEnv, is_fossilized: bool
) -> None:
    if is_fossilized:
        envs.step(np.stack([action(Op.FOSSILIZE), *waits(2)]))
    before = envs.get_state()
    expected = [envs.step(waits(3)) for _ in range(2)]
    envs.set_state(before)
    Moody.mood = "NaN in evaluation"
    results = [envs.step(waits(3)) for _ in range(2)]
    for (observation, reward, *_, info), healthy in zip(results, expected, strict=True):
        assert np.isfinite(observation).all()
        assert np.isfinite(reward).all()
        assert np.isfinite(info["loss"]).all()
        np.testing.assert_array_equal(observation[1:], healthy[0][1:])
        np.testing.assert_array_equal(info["loss"][1:], healthy[4]["loss"][1:])
    # A seed that is not fossilized is removed, so the second step is healthy.
    rolled_back = [info["rolled_back"].tolist() for *_, info in results]
    assert rolled_back == [[True, False, False], [is_fossilized, False, False]]
    stage = results[1][4]["stage"][0, 0]
    assert stage == (Stage.FOSSILIZED if is_fossilized else Stage.EMBARGOED)


def test_a_layer_that_is_not_finite_in_evaluation_is_not_registered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Moody, "mood", "NaN in evaluation")
    with pytest.raises(ValueError, match="'ill': expected finite outputs in evaluation, got NaN"):
        register_blueprint("ill", moody)


# ------------------------------------------------------------------ the code


@pytest.mark.usefixtures("engine")
def test_all_tensors_are_float32_whatever_the_default_dtype_is() -> None:
    def run() -> list[Any]:
        envs = make(2, instances="train")
        sizes = (Candidate([Conv(c, c, 3, zero=True)], c, c) for c in (4, 8))
        check_layers("a layer", *sizes, is_zero_at_birth=True)
        results = [envs.reset(seed=0), *play(envs, 6), envs.get_state()]
        tensors = envs.debug_state().population.member_tensors().values()
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
        return results

    expected = run()
    torch.set_default_dtype(torch.float64)
    try:
        assert_same(run(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_no_check_disappears_with_python_o() -> None:
    found = [
        f"{path.relative_to(PACKAGE.parent)}:{node.lineno}"
        for package in (PACKAGE, PACKAGE.with_name("esper_agent"))
        for path in sorted(package.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert found == []
