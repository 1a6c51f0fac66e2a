"""The Gymnasium contract: spaces, seeding, autoreset, info, errors, and what a step does."""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from esper_env import EnvConfig, EsperVectorEnv, Op, Stage
from esper_env.tasks import TASKS
from tests.builders import (
    CONV_LIGHT,
    ID,
    INFO_KEYS,
    SMALL,
    action,
    assert_same,
    grow,
    make,
    make_single,
    play,
    waits,
)


@pytest.mark.parametrize("horizon", ["truncate", "terminal"])
def test_check_env_passes_without_warning(horizon: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make_single(horizon=horizon))


def test_constructing_reads_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("the constructor read data")

    monkeypatch.setattr("esper_env.growth.simulation.load_splits", fail)
    envs = make()
    assert envs.single_observation_space.shape == (len(envs.observation_names),)
    with pytest.raises(AssertionError, match="read data"):
        envs.reset(seed=0)


def test_spaces_names_and_heads_agree() -> None:
    envs = make(2)
    observation, info = envs.reset(seed=0)
    assert observation in envs.observation_space
    assert len(set(envs.observation_names)) == observation.shape[1]
    assert [len(head.options) for head in envs.heads] == envs.single_action_space.nvec.tolist()
    assert info["action_mask"].shape == (2, sum(envs.single_action_space.nvec))


def test_members_with_different_seeds_differ_and_episodes_follow_their_own_stream() -> None:
    envs = make(2)
    first, _ = envs.reset(seed=0)
    assert not np.array_equal(first[0], first[1])
    second, _ = envs.reset()
    assert not np.array_equal(first, second)
    again, _ = envs.reset(seed=0)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(envs.reset()[0], second)


def test_without_a_seed_resets_differ_between_environments() -> None:
    # The loss, because observations are rounded and clipped and may coincide.
    losses = [make(2).reset()[1]["loss"] for _ in range(2)]
    assert not np.array_equal(*losses)


def test_reset_takes_a_list_of_seeds_and_a_mask() -> None:
    envs = make(3)
    expected, _ = envs.reset(seed=10)
    listed, _ = make(3).reset(seed=[10, 11, 12])
    np.testing.assert_array_equal(expected, listed)
    before = envs.step(waits(3))[0]
    options = {"reset_mask": np.array([False, True, False])}
    after, _ = envs.reset(seed=10, options=options)
    assert "reset_mask" in options
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
    np.testing.assert_array_equal(after[1], expected[1])


def episodes_of(mode: str, episodes: int) -> list[list[Any]]:
    """Return per episode of member 0 its observations, rewards and end, under an autoreset mode.

    Actions depend on the episode and its step alone, so that all modes see the same.
    """
    envs = make(2, autoreset_mode=mode)
    observation, _ = envs.reset(seed=3)
    result: list[list[Any]] = []
    for episode in range(episodes):
        rng = np.random.default_rng(episode)
        record: list[Any] = [observation[0].copy()]
        while True:
            actions = envs.sample_valid_actions(rng)
            observation, reward, terminated, truncated, info = envs.step(actions)
            is_over = terminated[0] or truncated[0]
            shown = observation[0]
            if is_over and mode == "SameStep":
                shown = info["final_obs"][0]
                info = info["final_info"]
            own = {name: info[name][0] for name in INFO_KEYS - {"reward_terms"}}
            record += [shown.copy(), reward[0], terminated[0], truncated[0], own]
            if is_over:
                break
        result.append(record)
        if mode == "NextStep":
            observation, reward, terminated, truncated, _ = envs.step(waits(2))
            assert not reward.any()
            assert not (terminated | truncated).any()
        elif mode == "Disabled":
            observation, _ = envs.reset(options={"reset_mask": np.array([True, True])})
    return result


def test_episodes_depend_on_seed_and_actions_and_not_on_the_autoreset_mode() -> None:
    """Bitwise, in four environments."""
    expected = episodes_of("NextStep", 2)
    for mode in ("NextStep", "SameStep", "Disabled"):
        assert_same(episodes_of(mode, 2), expected)


def test_test_accuracy_is_shown_only_at_the_end_of_an_episode() -> None:
    """Finding PRE-12: the test split never reaches agent, gates or reward during an episode."""
    env = make_single()
    env.reset(seed=0)
    wait = np.zeros(8, dtype=np.int64)
    for step in range(SMALL["episode_steps"]):
        *_, truncated, info = env.step(wait)
        assert ("test_accuracy" in info) == truncated == (step == SMALL["episode_steps"] - 1)
    assert 0 <= info["test_accuracy"] <= 1


def test_splits_are_disjoint_and_shared_by_all_members() -> None:
    """Finding PRE-12: three splits; validation is not test, and is one for all members."""
    splits = TASKS["digits"].load(None)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (1097, 350, 350)
    from sklearn.datasets import load_digits

    everything = {image.tobytes() for image in load_digits().images.astype(np.uint8)}
    parts = [{bytes(image.numpy()) for image in split.images} for split in vars(splits).values()]
    assert set.union(*parts) == everything
    # An image that exists twice may be in two splits.
    assert sum(map(len, parts)) - len(everything) <= len(load_digits().images) - len(everything)


def test_work_per_step_does_not_depend_on_the_number_of_members() -> None:
    """Findings PRE-12 and SYN-M17: as many as configured, whatever num_envs is."""
    for num_envs in (1, 5):
        envs = make(num_envs)
        envs.reset(seed=0)
        *_, info = envs.step(waits(num_envs))
        assert (info["samples"] == 2 * 16).all()


def test_the_reward_contains_what_the_training_after_the_action_did() -> None:
    """Finding PRE-8: reward = score after the step - score before it."""
    env = make_single()
    before = env.reset(seed=0)[1]["score"]
    _, reward, _, _, info = env.step(action(Op.GERMINATE, 1, blueprint=CONV_LIGHT))
    assert info["parameters"] > 0
    assert reward == pytest.approx(info["score"] - before, abs=1e-12)
    assert info["score"] < info["accuracy"], "the rent of the new seed is charged at once"


def test_episode_return_telescopes_to_the_committed_score() -> None:
    """Finding PRE-10: hoarding pays nothing; random legal play, uncommitted seeds included."""
    envs = make(4, autoreset_mode="SameStep")
    _, info = envs.reset(seed=0)
    start, total = info["score"], np.zeros(4)
    rng = np.random.default_rng(1)
    for _ in range(SMALL["episode_steps"]):
        _, reward, _, truncated, info = envs.step(envs.sample_valid_actions(rng))
        total += reward
    assert truncated.all()
    final = info["final_info"]
    assert (final["parameters"] > 0).any()
    np.testing.assert_allclose(total, final["committed_score"] - start, atol=1e-12)


def test_reward_is_paid_for_seeds_in_any_slot_while_waiting() -> None:
    """Finding PRE-9: on WAIT the score change of a seed in slot 1 is paid like one in slot 0."""
    for slot in (0, 1):
        envs = make(1, episode_steps=60)
        envs.reset(seed=0)
        infos = grow(envs, slot)
        _, reward, _, _, info = envs.step(waits(1))
        assert info["op"] == Op.WAIT
        assert reward == pytest.approx(info["score"] - infos[-1]["score"], abs=1e-12)


def test_a_seed_is_grown_measured_once_it_is_blended_and_fossilized() -> None:
    envs = make(1, episode_steps=60)
    envs.reset(seed=0)
    infos = grow(envs)
    assert [Stage(s) for s in dict.fromkeys(info["stage"][0, 0] for info in infos)] == [
        Stage.TRAINING,
        Stage.BLENDING,
        Stage.HOLDING,
    ]
    for info in infos:
        assert info["contribution_valid"][0, 0] == (info["alpha"][0, 0] > 0)
    *_, info = envs.step(action(Op.FOSSILIZE)[None])
    assert info["stage"][0, 0] == Stage.FOSSILIZED
    assert info["committed_accuracy"] == info["accuracy"]
    assert info["parameters"] == 172
    assert not envs.conditional_masks()["slot"][0, 1:, 0].any(), "a fossil stays"


def test_an_illegal_action_becomes_wait_or_raises() -> None:
    env = make_single()
    env.reset(seed=0)
    *_, info = env.step(action(Op.FOSSILIZE))
    assert not info["action_valid"]
    assert info["op"] == Op.WAIT
    envs = make(1, illegal_actions="raise")
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=r"FOSSILIZE.*conditional_masks"):
        envs.step(action(Op.FOSSILIZE)[None])
    assert envs.debug_state().state.progress.steps.tolist() == [0]


def test_stepping_works_inside_no_grad_and_inference_mode() -> None:
    for context in (torch.no_grad(), torch.inference_mode()):
        envs = make(2)
        with context:
            envs.reset(seed=0)
            *_, info = envs.step(waits(2))
        expected = make(2)
        expected.reset(seed=0)
        *_, info_expected = expected.step(waits(2))
        np.testing.assert_array_equal(info["accuracy"], info_expected["accuracy"])


def test_horizon_chooses_between_truncated_and_terminated() -> None:
    for horizon in ("truncate", "terminal"):
        envs = make(1, horizon=horizon, episode_steps=1)
        envs.reset(seed=0)
        _, _, terminated, truncated, _ = envs.step(waits(1))
        assert (terminated[0], truncated[0]) == (horizon == "terminal", horizon == "truncate")


WAYS: dict[str, Callable[..., Any]] = {
    "make": functools.partial(gym.make, ID),
    "make_vec": functools.partial(gym.make_vec, ID),
    "sync": functools.partial(gym.make_vec, ID, vectorization_mode="sync"),
    "async": functools.partial(gym.make_vec, ID, vectorization_mode="async"),
}


@pytest.mark.parametrize("way", WAYS)
def test_episode_steps_is_the_length_of_an_episode_with_its_last_payment(way: str) -> None:
    """Longer than the default of the id; the last step takes back what an unkept seed gained."""
    env = WAYS[way](episode_steps=63, batches_per_step=1, batch_size=4)
    try:
        actions = action(Op.GERMINATE) if way == "make" else action(Op.GERMINATE)[None]
        _, info = env.reset(seed=0)
        start, total = np.sum(info["score"]), 0.0
        for step in range(63):
            is_last = step == 62
            _, reward, _, truncated, info = env.step(actions if step == 0 else 0 * actions)
            total += np.sum(reward)
            assert np.all(truncated) == is_last
            assert np.all(info.get("_test_accuracy", "test_accuracy" in info)) == is_last
        assert total == pytest.approx(np.sum(info["committed_score"]) - start, abs=1e-12)
    finally:
        env.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_second_time_limit_is_rejected_everywhere(way: str) -> None:
    for limit in (20, 60, 90):
        with pytest.raises(TypeError, match=r"max_episode_steps.* episode_steps|did you mean"):
            WAYS[way](max_episode_steps=limit)
    if way == "make":  # Gymnasium's value for no limit.
        assert "TimeLimit" not in str(WAYS[way](max_episode_steps=-1))


def test_gymnasiums_wrapper_turns_all_values_into_tensors() -> None:
    pytest.importorskip("array_api_compat", reason="gymnasium[array-api] is not installed")
    from gymnasium.wrappers import NumpyToTorch

    env = NumpyToTorch(gym.make(ID, **SMALL))
    assert isinstance(env.reset(seed=0)[1]["action_mask"], torch.Tensor)
    assert isinstance(env.step(torch.zeros(8, dtype=torch.int64))[4]["stage"], torch.Tensor)


def test_infos_of_single_environments_have_types_that_other_tools_accept() -> None:
    env = gym.make(ID, **(SMALL | {"episode_steps": 1}))
    infos = [env.reset(seed=0)[1], env.step(action(Op.WAIT))[4]]
    for info in infos:
        for name, value in (info | info["reward_terms"]).items():
            assert type(value) in (bool, int, float, np.ndarray, dict), name
        json.dumps(info, default=np.ndarray.tolist)
    envs = gym.make_vec(ID, num_envs=2, vectorization_mode="sync", **SMALL)
    _, info = envs.reset(seed=0)
    kinds = {name: np.asarray(value).dtype.kind for name, value in info.items()}
    del kinds["reward_terms"], kinds["_reward_terms"]
    assert set(kinds.values()) == {"b", "i", "f"}
    assert info["rolled_back"].dtype == bool


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_envs": 0}, ValueError, "num_envs: expected an integer of at least 1, got 0"),
    ({"gama": 0.9}, TypeError, "unknown configuration field 'gama'; did you mean 'gamma'"),
    ({"num_envs": True}, ValueError, "num_envs: expected an integer"),
    ({"task": "digit"}, ValueError, "got 'digit'; did you mean 'digits'?"),
    ({"task": ["digits"]}, TypeError, "task: expected a string, got .* of type list"),
    ({"reward": "gains"}, ValueError, "got 'gains'; did you mean 'gain'?"),
    ({"reward_weights": {"commits": 1.0}}, ValueError, "got 'commits'; did you mean 'commit'?"),
    ({"reward_weights": {"gain": "1"}}, TypeError, r"reward_weights\['gain'\]: expected a number"),
    ({"reward_weights": ["gain"]}, TypeError, "reward_weights: expected a dictionary with"),
    ({"batch_size": 8.0}, TypeError, "batch_size: expected an integer, got 8.0 of type float"),
    ({"embargo_steps": 1.5}, TypeError, "embargo_steps: expected an integer, got 1.5"),
    ({"embargo_steps": True}, TypeError, "embargo_steps: expected an integer, got True"),
    ({"episode_steps": 10**12}, ValueError, "episode_steps: expected at most 2147483647"),
    ({"max_seeds": "2"}, TypeError, "max_seeds: expected an integer, got '2'"),
    ({"batch_size": None}, TypeError, "batch_size: expected an integer, got None"),
    ({"strict_fossilize": "yes"}, TypeError, "strict_fossilize: expected True or False, got 'yes'"),
    ({"strict_fossilize": 1}, TypeError, "strict_fossilize: expected True or False, got 1"),
    ({"gamma": "0.9"}, TypeError, "gamma: expected a number, got '0.9' of type str"),
    ({"gamma": np.array([0.9])}, TypeError, "gamma: expected a number, got array"),
    ({"rent_weight": float("nan")}, ValueError, "rent_weight: expected finite, got nan"),
    ({"rent_weight": 10**400}, ValueError, "rent_weight: expected finite, got inf"),
    ({"isolated_stages": "TRAINING"}, TypeError, "isolated_stages: expected a sequence of strings"),
    ({"isolated_stages": (2,)}, TypeError, "isolated_stages: expected a string, got 2"),
    ({"horizon": ["truncate"]}, TypeError, "horizon: expected a string"),
    ({"heads": "style"}, TypeError, "heads: expected a dictionary"),
    ({"heads": {0: "ADD"}}, TypeError, "heads: a key: expected a string, got 0"),
    ({"data_dir": 3}, TypeError, "data_dir: expected a string, got 3"),
    ({"device": "gpu"}, ValueError, "device: expected a device of this machine.*got 'gpu'"),
    ({"device": "cuda:99"}, ValueError, "device: expected a device of this machine"),
    ({"render_mode": ["ansi"]}, ValueError, "render_mode: expected None or one of"),
    ({"autoreset_mode": None}, ValueError, "autoreset_mode: expected an AutoresetMode or one of"),
    ({"max_episode_steps": 9}, TypeError, "'max_episode_steps'; did you mean 'episode_steps'?"),
    ({"gamma": 1.5}, ValueError, r"gamma: expected in \(0, 1\], got 1.5"),
    ({"heads": {"blueprint": "conv_huge"}}, ValueError, "conv_heavy.*got 'conv_huge'"),
    ({"reward": "profit"}, ValueError, r"reward: expected one of \['gain', 'sparse'\], got 'prof"),
    ({"reward_weights": {"fun": 1.0}}, ValueError, "expected terms among.*got 'fun'"),
    ({"horizon": "never"}, ValueError, "horizon: expected one of"),
    ({"autoreset_mode": "Sometimes"}, ValueError, "Sometimes"),
    ({"task": "mnist"}, ValueError, r"task: expected one of .*'digits'.*, got 'mnist'"),
    ({"batch_size": 1}, ValueError, "batch_size: expected at least 2"),
    ({"isolated_stages": ("DORMANT",)}, ValueError, "isolated_stages: expected names among"),
    ({"strict_fossilize": True, "attribution": "none"}, ValueError, "attribution='leave_one_out'"),
    ({"render_mode": "human"}, ValueError, "render_mode: expected None"),
    ({"instances": "validation"}, ValueError, "instances: expected one of"),
]


@pytest.mark.parametrize(
    ("options", "error", "text"), ERRORS, ids=[next(iter(e[0])) for e in ERRORS]
)
def test_bad_configuration_gives_a_clear_error(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        EsperVectorEnv(**({"num_envs": 1} | options))


def test_numpy_scalars_and_integers_become_the_types_of_the_fields() -> None:
    """Exactly these types, because compiled kernels exist for each combination of types."""
    config = EnvConfig(
        gamma=np.float32(1),  # type: ignore[arg-type]
        parameter_budget=16,
        divergence_sigma=np.int8(6),  # type: ignore[arg-type]
        batch_size=np.int64(16),  # type: ignore[arg-type]
        automatic_blending=np.bool_(True),  # type: ignore[arg-type]
        heads={"tempo": np.array([3, 5]), "alpha_target": [np.float64(1.0)]},
        isolated_stages=[np.str_("TRAINING")],
        data_dir=Path("data"),  # type: ignore[arg-type]
    )
    for f in dataclasses.fields(config):
        value, default = getattr(config, f.name), getattr(EnvConfig(), f.name)
        assert type(value) is type(default) or default is None, f.name
    assert (config.data_dir, config.batch_size, config.isolated_stages) == (
        "data",
        16,
        ("TRAINING",),
    )
    heads = json.loads(json.dumps(dataclasses.asdict(config)))["heads"]
    assert heads == {"tempo": [3, 5], "alpha_target": [1.0]}
    envs = EsperVectorEnv(1, gamma=np.float32(0.9))
    envs.reset(seed=0)
    assert play(envs, 1)[0][4]["samples"] == 128


def test_bad_actions_give_a_clear_error_and_lose_nothing() -> None:
    envs = make(2)
    before, _ = envs.reset(seed=0)
    cases: list[tuple[Any, type[Exception], str]] = [
        (np.zeros((2, 7), dtype=np.int64), ValueError, r"expected shape \(2, 8\).*got \(2, 7\)"),
        (np.zeros((2, 8)), TypeError, "expected integers.*got dtype float64"),
        (np.full((2, 8), 99), ValueError, r"actions\[0\]: head 'op' expected 0 to 5, got 99"),
        (np.full((2, 8), -1), ValueError, "head 'op' expected 0 to 5, got -1"),
        (3, ValueError, r"expected shape \(2, 8\)"),
    ]
    for actions, error, text in cases:
        with pytest.raises(error, match=text):
            envs.step(actions)
    np.testing.assert_array_equal(envs.set_state(envs.get_state())[0], before)
    single = make_single()
    single.reset(seed=0)
    with pytest.raises(ValueError, match=r"action: expected shape \(8,\)"):
        single.step(waits(1))


def test_using_an_environment_before_reset_is_rejected() -> None:
    """A first reset of some members is rejected too, and another reset is still needed."""
    envs = make(3)
    for text, use in (
        (r"reset\(\)", lambda: envs.step(waits(3))),
        (r"reset\(\)", envs.action_masks),
        (r"reset\(\)", envs.conditional_masks),
        (r"reset\(\)", lambda: envs.sample_valid_actions(np.random.default_rng(0))),
        (
            "this reset must reset all sub",
            lambda: envs.reset(options={"reset_mask": np.arange(3) > 0}),
        ),
        (r"reset\(\)", lambda: envs.step(waits(3))),
        (r"reset\(\)", lambda: make_single().step(np.zeros(8, dtype=np.int64))),
    ):
        with pytest.raises(gym.error.ResetNeeded, match=text):
            use()


def test_stepping_a_finished_member_without_autoreset_is_refused() -> None:
    envs = make(2, autoreset_mode="Disabled", episode_steps=1)
    envs.reset(seed=0)
    wait = waits(2)
    envs.step(wait)
    with pytest.raises(gym.error.ResetNeeded, match=r"sub-environments \[0, 1\] have finished"):
        envs.step(wait)


def test_config_is_frozen_and_exported() -> None:
    config = make().config
    assert isinstance(config, EnvConfig)
    with pytest.raises(AttributeError):
        config.gamma = 0.5  # type: ignore[misc]
    env = gym.make(ID, gamma=0.9)
    assert env.get_wrapper_attr("gamma") == 0.9


def test_records_of_gymnasiums_statistics_wrapper_agree_with_ours() -> None:
    envs = gym.wrappers.vector.RecordEpisodeStatistics(
        gym.make_vec(ID, num_envs=2, **(SMALL | {"episode_steps": 3}))
    )
    envs.reset(seed=0)
    total = np.zeros(2)
    for _ in range(3):
        _, reward, _, _, info = envs.step(waits(2))
        total += reward
    np.testing.assert_allclose(info["episode"]["r"], total)
    assert (info["episode"]["l"] == 3).all()


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.usefixtures("threads")
def test_gymnasiums_own_vector_environments_take_single_ones(mode: str) -> None:
    """For those who need them; `make_vec` without a mode trains all hosts as one program.

    Forked workers of a parent whose threads have run must not wait for threads they lack.
    """
    torch.set_num_threads(2)
    torch.zeros(10**6) + torch.ones(10**6)
    envs = gym.make_vec(ID, num_envs=2, vectorization_mode=mode, **SMALL)
    native = make(2)
    try:
        observation, _ = envs.reset(seed=0)
        expected, _ = native.reset(seed=0)
        for _ in range(3):
            np.testing.assert_array_equal(observation, expected)
            actions = native.sample_valid_actions(np.random.default_rng(0))
            observation, *_ = envs.step(actions)
            expected, *_ = native.step(actions)
    finally:
        envs.close()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"seed": -1}, "seed: expected non-negative integers, got -1"),
        ({"seed": [1]}, "seed: expected one integer or 2 entries, got 1"),
        ({"seed": 1.5}, "seed: expected None, an integer or 2 of them, got 1.5"),
        ({"seed": "ab"}, "seed: expected None, an integer or 2 of them, got 'ab'"),
        ({"seed": [True, False]}, "seed: expected non-negative integers, got True"),
        ({"options": [1]}, r"options: expected a dictionary or None, got \[1\]"),
        ({"options": {"reset_mask": [[True], [1, 2]]}}, "reset_mask: expected bool of shape"),
        ({"options": {"instance": [[0], [1, 2]]}}, r"options\['instance'\]: expected integers"),
        ({"seed": [0, 0.5]}, "seed: expected non-negative integers, got 0.5"),
        ({"options": {"mask": None}}, r"expected only 'reset_mask' and 'instance', got also"),
        ({"options": {"instance": 1}}, r"options\['instance'\]: expected integers from 0 to 0"),
        ({"options": {"reset_mask": [True]}}, r"reset_mask: expected bool of shape \(2,\)"),
        ({"options": {"reset_mask": [1, 0]}}, r"reset_mask: expected bool of shape \(2,\)"),
        ({"options": {"reset_mask": [False] * 2}}, r"reset_mask: expected bool of shape \(2,\)"),
    ],
)
def test_a_rejected_reset_changes_nothing(arguments: dict[str, Any], text: str) -> None:
    envs = make(2)
    with pytest.raises(ValueError, match=text):
        envs.reset(**arguments)
    with pytest.raises(gym.error.ResetNeeded):
        envs.step(waits(2))
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=text):
        envs.reset(**arguments)
    assert envs.step(waits(2))[4]["samples"].tolist() == [32, 32]


def test_the_minimal_observation_leaves_out_all_differences() -> None:
    """8 features of the episode and 8 of each slot; all others have their values."""
    full, minimal = make(2), make(2, observation="minimal")
    left_out = {"best_accuracy", "plateau_steps"}
    left_out |= {f"{what}_change_{i}" for what in ("accuracy", "loss") for i in (1, 2, 3)}
    measured = [f"contribution{end}" for end in ("", "_valid", "_freshness", "_velocity")]
    measured += ["would_be", "would_be_valid", "interaction", "interaction_valid"]
    left_out |= {f"slot_{s}.{name}" for s in (0, 1) for name in measured}
    kept = [i for i, name in enumerate(full.observation_names) if name not in left_out]
    assert minimal.observation_names == tuple(full.observation_names[i] for i in kept)
    assert minimal.single_observation_space.shape == (len(kept),)
    assert len(full.observation_names) - len(kept) == len(left_out) == 24
    full.reset(seed=0)
    minimal.reset(seed=0)
    for expected, shown in zip(play(full, 6), play(minimal, 6), strict=True):
        np.testing.assert_array_equal(shown[0], expected[0][:, kept])
