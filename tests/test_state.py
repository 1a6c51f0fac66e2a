"""Saving, restoring and copying members."""

from __future__ import annotations

import copy
import functools
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
import torch
from typing_extensions import TypeAliasType

from esper_env import EsperEnv, Op
from esper_env.growth.lifecycle import is_trial
from esper_env.growth.state import HOLD, blank
from tests.builders import (
    ID,
    SMALL,
    action,
    assert_same,
    make,
    make_single,
    play,
    poison,
    waits,
)

STEPS = 20
MIXED: dict[str, Any] = {"instances": "train", "attribution": "full", "episode_steps": 18}


def test_a_restored_state_continues_bitwise_in_a_new_process(tmp_path: Path) -> None:
    """Live seeds, a ramp that goes on, different instances, and a member just rolled back."""
    envs = make(5, **MIXED)
    envs.reset(seed=0)
    play(envs, 8, seed=1)
    poison(envs, 0)
    *_, info = play(envs, 1, seed=3)[0]
    assert info["rolled_back"].tolist() == [True, False, False, False, False]
    slots = envs.debug_state().state.slots
    assert (slots.mode != HOLD).any(), "the test needs a ramp"
    assert (is_trial(slots.stage).sum(axis=1) > 0).sum() >= 3, "the test needs live seeds"
    assert len(set(info["host_parameters"].tolist())) > 1, "the test needs different hosts"
    (tmp_path / "state.pkl").write_bytes(pickle.dumps(envs.get_state()))
    code = (
        "import pickle, sys, torch; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\n"
        "from tests.test_state import MIXED, STEPS, make, play\n"
        "folder = Path(sys.argv[1])\n"
        "torch.set_num_threads(int(sys.argv[3]))\n"
        "envs = make(5, **MIXED)\n"
        "envs.set_state(pickle.loads((folder / 'state.pkl').read_bytes()))\n"
        "(folder / 'record.pkl').write_bytes(pickle.dumps(play(envs, STEPS, seed=2)))\n"
    )
    root = str(Path(__file__).parent.parent)
    arguments = [str(tmp_path), root, str(torch.get_num_threads())]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=root)
    record = pickle.loads((tmp_path / "record.pkl").read_bytes())
    assert_same(record, play(envs, STEPS, seed=2))


def test_the_single_environment_saves_and_restores_too() -> None:
    env = make_single()
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    env.step(env.sample_valid_actions(rng))
    state = env.get_state()
    action = env.sample_valid_actions(rng)
    expected = env.step(action)
    other = gym.make(ID, **SMALL).unwrapped
    assert isinstance(other, EsperEnv)
    other.set_state(state)
    assert_same(other.step(action), expected)


def test_bad_states_and_indices_are_refused() -> None:
    envs = make(2)
    with pytest.raises(gym.error.ResetNeeded):
        envs.get_state()
    with pytest.raises(gym.error.ResetNeeded):
        envs.fork([0], [1])
    envs.reset(seed=0)
    state = envs.get_state()
    with pytest.raises(ValueError, match=r"made with num_envs=3, got 2; make the environment"):
        make(3).set_state(state)
    with pytest.raises(ValueError, match=r"made with batch_size=8, got 16;"):
        make(2, batch_size=8).set_state(state)
    for source, target in (([0], [2]), ([-1], [0]), ([0, 0], [1, 1]), ([0, 1], [0]), ([0.5], [1])):
        with pytest.raises(ValueError, match=r"source_indices|target_indices|fork"):
            envs.fork(source, target)


def changed(part: str, name: str, value: Any, index: Any = ...) -> Callable[[Any], None]:
    """Return a function that writes a value into an array of a state."""

    def change(state: Any) -> None:
        state[part][name][index] = value

    return change


def replaced(part: str, name: str, value: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Return a function that replaces an array of a state."""

    def change(state: Any) -> None:
        state[part][name] = value(state[part][name])

    return change


STAGE, TENSOR = "slots.stage", "snapshot.momentum"
BAD_STATES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "empty": (dict.clear, r"state: expected the keys .* without \['made_with', 'arrays'"),
    "no tensor": (lambda s: s["tensors"].pop(TENSOR), rf"without \['{TENSOR}'\]"),
    "more": (lambda s: s["arrays"].update(x=0), r"unknown keys \['x'\]"),
    "a key": (lambda s: s.update(x=0), r"unknown keys \['x'\]"),
    "settings": (lambda s: s.update(made_with=3), "made_with.*expected a dictionary of settings"),
    "tensors": (lambda s: s.update(tensors=[]), "'tensors'.*expected a dictionary with the keys"),
    "stage -1": (changed("arrays", STAGE, -1), "slots.stage.*expected values from 0 to 6, got -1"),
    "stage 7": (changed("arrays", STAGE, 7, (0, 1)), "slots.stage.*from 0 to 6, got 7"),
    "NaN alpha": (changed("arrays", "slots.alpha", np.nan), "slots.alpha.*finite.*got nan"),
    "alpha 2": (changed("arrays", "slots.alpha", 2), "slots.alpha.*from 0 to 1, got 2"),
    "blueprint": (changed("arrays", "slots.blueprint", 7), "slots.blueprint.*from -1 to 6, got 7"),
    "style": (changed("arrays", "slots.style", 4), "slots.style.*from -1 to 3, got 4"),
    "mode": (changed("arrays", "slots.mode", 3), "slots.mode.*from 0 to 2, got 3"),
    "curve": (changed("arrays", "slots.curve", 5), "slots.curve.*from 0 to 4, got 5"),
    "counter": (changed("arrays", "slots.age", -1), "slots.age.*expected values from 0"),
    "instance": (changed("arrays", "episode.instance", 1), "episode.instance.*from 0 to 0, got 1"),
    "steps": (changed("arrays", "progress.steps", 13), "progress.steps.*from 0 to 12, got 13"),
    "length": (changed("arrays", "history.length", 1), "history.length is progress.steps"),
    "no seed": (changed("arrays", STAGE, 2), "a slot has a blueprint if and only if"),
    "done": (lambda s: s["is_done"].fill(True), "episode.has_test is is_done"),
    "embargo": (changed("arrays", "slots.cooldown", 1), "cooldown if it is embargoed"),
    "ramp": (changed("arrays", "slots.mode", 1), "a ramp that is running has env steps left"),
    "NaN weight": (changed("tensors", "parameters", np.nan), "'parameters'.*finite.*got nan"),
    "infinite snapshot": (changed("tensors", TENSOR, np.inf), f"'{TENSOR}'.*finite.*got inf"),
    "dtype": (
        replaced("tensors", "buffers", lambda a: a.astype(float)),
        "'buffers'.*dtype float32, got shape .*, dtype float64",
    ),
    "shape": (replaced("arrays", STAGE, lambda a: a[:1]), r"expected an array of shape \(2, 2\)"),
    "a list": (replaced("arrays", STAGE, lambda a: a.tolist()), "expected an array of shape"),
    "is_done": (lambda s: s.update(is_done=None), r"is_done.*expected an array.*got None"),
    "generator": (lambda s: s.update(np_random={}), "np_random.*expected the state of a PCG64"),
    "its numbers": (
        lambda s: s["np_random"]["state"].update(state="x"),
        "np_random.*expected the state of a PCG64",
    ),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_an_impossible_state_is_rejected_and_nothing_is_written(case: str) -> None:
    change, text = BAD_STATES[case]
    envs = make(2)
    envs.reset(seed=0)
    play(envs, 3)
    before = envs.get_state()
    state = copy.deepcopy(make_state())
    change(state)
    with pytest.raises(ValueError, match=text):
        envs.set_state(state)
    assert_same(envs.get_state(), before)
    new = make(2)
    with pytest.raises(ValueError, match=text):
        new.set_state(state)
    with pytest.raises(gym.error.ResetNeeded):
        new.get_state()


@functools.cache
def make_state() -> dict[str, Any]:
    envs = make(2)
    envs.reset(seed=1)
    envs.step(waits(2))
    return envs.get_state()


@pytest.mark.parametrize("state", [None, 3, [], "state"])
def test_something_else_than_a_state_is_rejected(state: Any) -> None:
    with pytest.raises(ValueError, match="state: expected a dictionary with the keys"):
        make(1).set_state(state)


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_every_state_of_a_wild_life_is_accepted(mode: str) -> None:
    """Rollbacks, ramps, embargoes, fossils and ends of episodes."""
    options: dict[str, Any] = {"divergence_sigma": 0.0, "divergence_factor": 1.02}
    options |= {"host_learning_rate": 0.4, "learning_rate_decay": "none", "panic_window": 2}
    options |= {"automatic_training": False, "min_training_steps": 1, "episode_steps": 20}
    envs = make(8, autoreset_mode=mode, instances="train", **options)
    envs.reset(seed=0)
    stages, is_rolled_back = set(), False
    for seed in range(45):
        *_, info = play(envs, 1, seed)[0]
        stages |= set(np.unique(info["stage"]).tolist())
        is_rolled_back |= bool(info["rolled_back"].any())
        state = envs.get_state()
        envs.set_state(state)
        assert_same(envs.get_state(), state)
        is_done = state["is_done"]
        if mode == "Disabled" and is_done.any():
            envs.reset(options={"reset_mask": is_done})
    assert is_rolled_back
    assert stages == set(range(7))


def test_a_state_moves_to_a_machine_with_other_folders_and_chunks(tmp_path: Path) -> None:
    envs = make(2, data_dir=str(tmp_path))
    envs.reset(seed=0)
    play(envs, 3)
    state = envs.get_state()
    expected = play(envs, 2)
    for array in (*state["arrays"].values(), *state["tensors"].values()):
        array.setflags(write=False)
    other = make(2, chunk_size=1)
    other.set_state(state)
    assert_same(play(other, 2), expected)


def test_a_wrapped_environment_continues_from_a_state_without_a_reset() -> None:
    """An episode of 12 env steps, restored after 4; also in a new environment."""
    env = gym.make(ID, **SMALL)
    env.reset(seed=0)
    wait = action(Op.WAIT)
    for _ in range(4):
        env.step(wait)
    assert isinstance(env.unwrapped, EsperEnv)
    state = env.unwrapped.get_state()
    expected = [env.step(wait) for _ in range(8)]
    assert [truncated for *_, truncated, _ in expected] == [False] * 7 + [True]
    for other in (env, gym.make(ID, **SMALL)):
        assert isinstance(other.unwrapped, EsperEnv)
        other.unwrapped.set_state(state)
        assert_same([other.step(wait) for _ in range(8)], expected)
        with pytest.raises(gym.error.ResetNeeded, match="the episode has ended"):
            other.step(wait)
    with pytest.raises(gym.error.ResetNeeded, match=r"has not been reset; call reset\(\)"):
        gym.make(ID, **SMALL).step(wait)


Scalar = TypeVar("Scalar", bound=np.generic)
Aliased = TypeAliasType("Aliased", npt.NDArray[Scalar], type_params=(Scalar,))


class Annotated(NamedTuple):
    old: npt.NDArray[np.float32]
    new: Aliased[np.bool_]
    """NumPy's own `NDArray` is such an alias since version 2.5."""


def test_new_arrays_have_the_annotated_dtypes() -> None:
    arrays = blank(Annotated, 2, (3,), old=0.5)
    assert [a.dtype for a in arrays] == [np.float32, np.bool_]
    assert [a.shape for a in arrays] == [(2, 3)] * 2
    assert (arrays.old == 0.5).all()
