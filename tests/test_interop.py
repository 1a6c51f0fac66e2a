"""Other libraries: the adapter to Stable-Baselines3, masks inside observations, the examples."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import VectorEnv
from gymnasium.wrappers import FlattenObservation
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

from esper_env import (
    EsperVectorEnv,
    JointAction,
    JointActionVector,
    MaskInObservation,
    MaskInObservationVector,
    Op,
)
from esper_env.sb3 import Sb3VecEnv

ID = "Esper-Digits-v0"
TINY: dict[str, Any] = {
    "episode_steps": 6,
    "batches_per_step": 1,
    "batch_size": 8,
    "min_training_steps": 1,
}
NUM_ENVS = 3
STEPS = 14
"""Two episodes of every member and the start of a third."""
EXAMPLES = sorted((Path(__file__).parent.parent / "docs" / "examples").glob("*.py"))
Envs = VectorEnv[Any, Any, Any]


def make_vector(is_joint: bool = False, mode: str = "SameStep", **options: Any) -> Envs:
    envs = gym.make_vec(ID, num_envs=NUM_ENVS, autoreset_mode=mode, **(TINY | options))
    return JointActionVector(envs) if is_joint else envs


def make_single(is_joint: bool = False, **options: Any) -> gym.Env[Any, Any]:
    env = gym.make(ID, **(TINY | options))
    return JointAction(env) if is_joint else env


def legal_actions(envs: Envs, rng: np.random.Generator) -> Any:
    """Draw one legal action per member, factored or joint."""
    if isinstance(envs, JointActionVector):
        return np.array([rng.choice(np.nonzero(row)[0]) for row in envs.action_masks()])
    assert isinstance(envs.unwrapped, EsperVectorEnv)
    return envs.unwrapped.sample_valid_actions(rng)


def assert_members_info(member: dict[str, Any], info: dict[str, Any], index: int) -> None:
    """Check that a member has exactly the values that a vector info has for it."""
    present = {n for n in info if not n.startswith("_") and info[f"_{n}"][index]}
    assert set(member) == present - {"final_obs", "final_info"}
    for name, value in member.items():
        if isinstance(value, dict):
            assert_members_info(value, info[name], index)
        else:
            np.testing.assert_array_equal(value, info[name][index])


# -------------------------------------------------------------------- the adapter


@pytest.mark.parametrize("is_joint", [False, True], ids=["factored", "joint"])
@pytest.mark.parametrize("horizon", ["truncate", "terminal"])
def test_the_adapter_steps_like_the_vector_environment(is_joint: bool, horizon: str) -> None:
    envs = make_vector(is_joint, horizon=horizon)
    venv = Sb3VecEnv(make_vector(is_joint, horizon=horizon))
    assert venv.observation_space == envs.single_observation_space
    assert venv.action_space == envs.single_action_space
    venv.seed(5)
    observations, info = envs.reset(seed=5)
    np.testing.assert_array_equal(venv.reset(), observations)
    for i in range(NUM_ENVS):
        assert_members_info(venv.reset_infos[i], info, i)
    rng, num_ends = np.random.default_rng(0), 0
    for _ in range(STEPS):
        actions = legal_actions(envs, rng)
        expected, rewards, terminations, truncations, info = envs.step(actions)
        got, got_rewards, dones, infos = venv.step(actions)
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(got_rewards, rewards.astype(np.float32))
        assert got_rewards.dtype == np.float32
        np.testing.assert_array_equal(dones, terminations | truncations)
        np.testing.assert_array_equal(get_action_masks(venv), info["action_mask"])
        for i in range(NUM_ENVS):
            assert infos[i].pop("TimeLimit.truncated") is bool(truncations[i])
            if dones[i]:
                terminal_observation = infos[i].pop("terminal_observation")
                np.testing.assert_array_equal(terminal_observation, info["final_obs"][i])
                assert_members_info(infos[i], info["final_info"], i)
                assert_members_info(venv.reset_infos[i], info, i)
                assert "test_accuracy" in infos[i]
                assert "test_accuracy" not in venv.reset_infos[i]
                num_ends += 1
            else:
                assert_members_info(infos[i], info, i)
    assert num_ends == 2 * NUM_ENVS


def test_a_seed_holds_for_one_reset_and_members_go_on_with_their_own_streams() -> None:
    venv = Sb3VecEnv(make_vector())
    assert list(venv.seed(3)) == [3, 4, 5]
    losses = []
    for _ in range(2):
        venv.reset()
        losses.append([info["loss"] for info in venv.reset_infos])
    assert losses[0] != losses[1]
    venv.seed(3)
    venv.reset()
    assert [info["loss"] for info in venv.reset_infos] == losses[0]


@pytest.mark.parametrize("is_joint", [False, True], ids=["factored", "joint"])
def test_sb3_contrib_finds_the_masks_through_wrappers(is_joint: bool) -> None:
    envs = make_vector(is_joint)
    venv = VecMonitor(Sb3VecEnv(envs))
    venv.seed(0)
    venv.reset()
    # Member 0 waits, the others germinate in slots 0 and 1.
    actions = np.zeros((NUM_ENVS, 8), dtype=np.int64)
    actions[1:, 0], actions[2, 1] = Op.GERMINATE, 1
    if isinstance(envs, JointActionVector):
        is_row = (envs.table.actions[None] == actions[:, None]).all(axis=2)
        actions = is_row.argmax(axis=1)
    venv.step(actions)
    assert is_masking_supported(venv)
    masks = get_action_masks(venv)
    assert (masks[0] != masks[1:]).any(axis=1).all(), "members cannot be told apart"
    assert masks.dtype == bool
    assert masks.shape == (NUM_ENVS, gym.spaces.flatdim(venv.action_space))
    np.testing.assert_array_equal([call() for call in venv.get_attr("action_masks")], masks)
    np.testing.assert_array_equal(venv.env_method("action_masks", indices=[2, 0]), masks[[2, 0]])


def test_maskable_ppo_learns_and_is_evaluated_through_the_adapter() -> None:
    """The monitor sees whole episodes: of 6 steps, and with the return that the rewards sum to."""
    venv = VecMonitor(Sb3VecEnv(make_vector()))
    model = MaskablePPO("MlpPolicy", venv, n_steps=6, batch_size=6, n_epochs=1, device="cpu")
    model.learn(2 * 6 * NUM_ENVS)
    assert [episode["l"] for episode in model.ep_info_buffer] == [6] * 2 * NUM_ENVS
    returns, lengths = evaluate_policy(model, venv, 3, return_episode_rewards=True)
    assert lengths == [6] * 3
    assert np.isfinite(returns).all()


def test_methods_and_attributes_of_members_are_reachable() -> None:
    venv = Sb3VecEnv(make_vector(is_joint=True))
    venv.reset()
    inner = venv.vector_env.unwrapped
    assert isinstance(inner, EsperVectorEnv)
    assert venv.get_attr("gamma") == [inner.gamma] * NUM_ENVS
    assert venv.get_attr("gamma", indices=1) == [inner.gamma]
    assert venv.get_attr("action_space") == [venv.action_space] * NUM_ENVS
    assert not venv.has_attr("gama")
    members = venv.env_method("conditional_masks")
    for name, mask in inner.conditional_masks().items():
        np.testing.assert_array_equal([member[name] for member in members], mask)
    drawn = venv.env_method("sample_valid_actions", np.random.default_rng(0))
    expected = inner.sample_valid_actions(np.random.default_rng(0))
    np.testing.assert_array_equal(drawn, expected)
    with pytest.raises(AttributeError, match=r"expected one of .*action_masks.*, got 'get_state'"):
        venv.env_method("get_state")
    assert venv.env_is_wrapped(JointActionVector) == [True] * NUM_ENVS  # type: ignore[arg-type]
    assert venv.env_is_wrapped(Monitor, indices=[0]) == [False]


def test_attributes_are_set_for_all_members_where_they_are_defined() -> None:
    venv = Sb3VecEnv(make_vector(is_joint=True))
    venv.set_attr("gamma", 0.9)
    assert venv.vector_env.unwrapped.gamma == 0.9  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"expected all sub-environments, because .* 'gamma'"):
        venv.set_attr("gamma", 0.5, indices=0)
    with pytest.raises(AttributeError, match="has no attribute 'gama'"):
        venv.set_attr("gama", 0.5)


def test_the_adapter_takes_other_wrappers_and_closes() -> None:
    venv = Sb3VecEnv(RecordEpisodeStatistics(make_vector(episode_steps=1)))
    venv.reset()
    *_, infos = venv.step(np.zeros((NUM_ENVS, 8), dtype=np.int64))
    assert "episode" not in infos[0], "SB3's key is left to VecMonitor"
    with pytest.warns(UserWarning, match="no `render_mode` was passed"):
        assert venv.render() is None
    venv.close()
    assert venv.vector_env.closed


def test_the_adapter_refuses_what_it_cannot_serve() -> None:
    for mode in ("NextStep", "Disabled"):
        with pytest.raises(ValueError, match='make the environment with autoreset_mode="SameStep"'):
            Sb3VecEnv(make_vector(mode=mode))
    with pytest.raises(TypeError, match="expected an EsperVectorEnv, got SyncVectorEnv"):
        Sb3VecEnv(gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync"))
    venv = Sb3VecEnv(make_vector())
    venv.set_options({"reset_mask": None})
    with pytest.raises(ValueError, match=r"options: expected {'instance': k} for every sub-env"):
        venv.reset()


def test_the_package_needs_no_stable_baselines3_and_its_adapter_names_the_extra() -> None:
    code = (
        "import sys\n"
        "sys.modules['stable_baselines3'] = None\n"
        "import esper_env\n"
        "try:\n    import esper_env.sb3\n"
        "except ImportError as error:\n    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    expected = 'esper_env.sb3 needs Stable-Baselines3: pip install "esper-env[interop]"\n'
    assert (result.stdout, result.returncode) == (expected, 0), result.stderr


# -------------------------------------------------------------------- masks inside observations


@pytest.mark.parametrize("is_joint", [False, True], ids=["factored", "joint"])
def test_observations_contain_the_mask_for_a_whole_episode(is_joint: bool) -> None:
    plain, env = make_single(is_joint), MaskInObservation(make_single(is_joint))
    expected, _ = plain.reset(seed=0)
    observation, info = env.reset(seed=0)
    rng, is_done, num_legal = np.random.default_rng(0), False, set()
    while True:
        assert observation in env.observation_space
        np.testing.assert_array_equal(observation["observations"], expected)
        for mask in (env.get_wrapper_attr("action_masks")(), info["action_mask"]):
            np.testing.assert_array_equal(observation["action_mask"], mask)
        num_legal.add(int(observation["action_mask"].sum()))
        if is_done:
            break
        action = env.get_wrapper_attr("sample_valid_actions")(rng)
        if is_joint:
            action = rng.choice(np.nonzero(observation["action_mask"])[0])
        expected, *_ = plain.step(action)
        observation, _, terminated, truncated, info = env.step(action)
        is_done = terminated or truncated
    assert len(num_legal) > 1, "the mask never changed"


@pytest.mark.parametrize("is_joint", [False, True], ids=["factored", "joint"])
@pytest.mark.parametrize("wrap", [MaskInObservation, lambda env: env], ids=["masks", "plain"])
def test_both_checkers_pass_with_and_without_masks(is_joint: bool, wrap: Any) -> None:
    env = wrap(make_single(is_joint))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*different from the unwrapped version.*")
        check_env(env, skip_render_check=True)
        check_env_for_sb3(env, skip_render_check=True)


def test_a_flattened_observation_is_one_box_of_floats() -> None:
    env = FlattenObservation(MaskInObservation(make_single()))
    assert isinstance(env.observation_space, gym.spaces.Box)
    assert env.observation_space.dtype == np.float32


@pytest.mark.parametrize(
    ("mode", "is_joint"),
    [("NextStep", False), ("NextStep", True), ("SameStep", False), ("SameStep", True)],
)
def test_vector_observations_contain_the_masks_of_their_states(mode: str, is_joint: bool) -> None:
    """The same episodes without autoreset show the final states."""
    envs = MaskInObservationVector(make_vector(is_joint, mode))
    plain = make_vector(is_joint, "Disabled")
    observations, info = envs.reset(seed=0)
    expected, plain_info = plain.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(TINY["episode_steps"]):
        assert observations in envs.observation_space
        np.testing.assert_array_equal(observations["observations"], expected)
        np.testing.assert_array_equal(observations["action_mask"], plain_info["action_mask"])
        actions = legal_actions(plain, rng)
        expected, _, _, _, plain_info = plain.step(actions)
        observations, _, _, _, info = envs.step(actions)
    np.testing.assert_array_equal(observations["action_mask"], info["action_mask"])
    members = [{name: part[i] for name, part in observations.items()} for i in range(NUM_ENVS)]
    final = members if mode == "NextStep" else info["final_obs"]
    for i in range(NUM_ENVS):
        assert final[i] in envs.single_observation_space
        np.testing.assert_array_equal(final[i]["observations"], expected[i])
        np.testing.assert_array_equal(final[i]["action_mask"], plain_info["action_mask"][i])
    is_same = bool((observations["action_mask"] == plain_info["action_mask"]).all())
    assert is_same == (mode == "NextStep"), "the first mask of an episode is another"


def test_the_adapter_takes_observations_with_masks_as_dummy_vec_env_does() -> None:
    """One member by both ways; its terminal observation has the mask of the final state."""
    venv = Sb3VecEnv(MaskInObservationVector(make_vector()))
    dummy = DummyVecEnv([lambda: MaskInObservation(make_single())])
    assert venv.observation_space == dummy.observation_space
    rng = np.random.default_rng(0)
    for one in (venv, dummy):
        one.seed(0)
        one.reset()
    for _ in range(TINY["episode_steps"]):
        actions = np.stack(venv.env_method("sample_valid_actions", rng))
        *_, infos = venv.step(actions)
        *_, dummy_infos = dummy.step(actions[:1])
    np.testing.assert_array_equal(
        infos[0]["terminal_observation"]["action_mask"],
        dummy_infos[0]["terminal_observation"]["action_mask"],
    )


def test_masks_of_another_action_space_are_refused() -> None:
    with pytest.raises(ValueError, match="apply MaskInObservation or MaskInObservationVector last"):
        JointAction(MaskInObservation(make_single()))
    with pytest.raises(ValueError, match="apply MaskInObservation or MaskInObservationVector last"):
        JointActionVector(MaskInObservationVector(make_vector()))
    with pytest.raises(TypeError, match="expected an EsperEnv, got EsperVectorEnv; MaskIn"):
        MaskInObservation(make_vector())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected an EsperVectorEnv, got EsperEnv; MaskIn"):
        MaskInObservationVector(make_single())  # type: ignore[arg-type]


# -------------------------------------------------------------------- the examples


def test_there_are_examples_and_each_fits_on_a_screen() -> None:
    assert len(EXAMPLES) == 3
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) <= 40, path.name


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_trains_and_prints_the_score_of_an_episode(path: Path) -> None:
    result = subprocess.run(
        [sys.executable, path, "--timesteps", "60"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found = re.search(r"^committed score (\S+)$", result.stdout, re.MULTILINE)
    assert found, result.stdout
    assert math.isfinite(float(found[1]))
    # A guess is right for one image of ten.
    assert float(found[1]) > 0.2


def test_the_adapter_passes_instances_on_for_one_reset() -> None:
    venv = Sb3VecEnv(make_vector(instances="train"))
    venv.set_options([{"instance": k} for k in (5, 1, 7)[:NUM_ENVS]])
    venv.seed(0)
    venv.reset()
    assert [info["instance"] for info in venv.reset_infos] == [5, 1, 7][:NUM_ENVS]
    venv.reset()
    assert [info["instance"] for info in venv.reset_infos] != [5, 1, 7][:NUM_ENVS]


def test_the_adapter_shows_the_members_side_by_side() -> None:
    venv = Sb3VecEnv(make_vector(render_mode="rgb_array"))
    venv.reset()
    frame = venv.render("rgb_array")
    assert frame is not None
    assert frame.ndim == 3
    assert len(venv.get_images()) == NUM_ENVS
