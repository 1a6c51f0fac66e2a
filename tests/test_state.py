"""Saving, restoring and copying members."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
import torch
from typing_extensions import TypeAliasType

from esper_env import EsperEnv
from esper_env.growth.lifecycle import is_trial
from esper_env.growth.state import HOLD, blank
from tests.builders import ID, SMALL, assert_same, make, make_single, play, poison

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
