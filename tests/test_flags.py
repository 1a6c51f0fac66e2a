"""Flags of undesired strategies, and causes of low gradients, in info."""

from __future__ import annotations

import json
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from esper_agent.baselines import BASELINES, Policy
from esper_agent.envs import TRAINING, make_envs
from esper_env import EnvConfig, EsperVectorEnv, GradientCause, Stage
from esper_env.growth.gradient_health import record_gradients
from esper_env.growth.state import Measurements
from tests.builders import ID, make, tiny_config

FLAGS = ("flag_parasite", "flag_attribution", "flag_churn")


def flagged(policy: Policy, envs: EsperVectorEnv, seed: int = 5) -> dict[str, int]:
    """Play one episode in every sub-environment; return how many have each flag."""
    instance = np.arange(envs.num_envs) % envs.num_instances
    obs, info = envs.reset(seed=seed, options={"instance": instance})
    policy.begin(envs, 0)
    seen = {name: np.zeros(envs.num_envs, dtype=bool) for name in FLAGS}
    for _ in range(envs.config.episode_steps):
        obs, *_, info = envs.step(policy.act(obs, info))
        last = info.get("final_info", info)
        for name in FLAGS:
            flag = last[name]
            seen[name] |= flag.any(1) if flag.ndim > 1 else flag
    return {name: int(flags.sum()) for name, flags in seen.items()}


# ------------------------------------------------------------------ definitions


def test_flags_are_those_of_the_definitions() -> None:
    """Finding SYN-H9: recomputed from the contributions and accuracies of random episodes.

    A contribution is of this env step where the seed is blended and not fossilized; thresholds are
    0 and 1, so that all flags occur.
    """
    envs = make(8, episode_steps=24, flag_contribution=0.0, flag_ratio=1.0)
    rng = np.random.default_rng(0)
    _, info = envs.reset(seed=1)
    count = dict.fromkeys(("flag_parasite", "flag_attribution"), 0)
    for _ in range(23):
        *_, info = envs.step(envs.sample_valid_actions(rng))
        gain = info["accuracy"] - info["committed_accuracy"]
        is_credited = (info["alpha"] > 0) & (info["stage"] < Stage.FOSSILIZED)
        credited = np.where(is_credited & info["contribution_valid"], info["contribution"], 0.0)
        parasite = (credited > 0) & (gain < 0)[:, None]
        np.testing.assert_array_equal(info["flag_parasite"], parasite)
        total = np.maximum(credited, 0).sum(1)
        np.testing.assert_array_equal(info["flag_attribution"], (total > 0) & (total > gain))
        for name in count:
            count[name] += int(info[name].sum())
    assert min(count.values()) > 0, count


def test_churn_counts_prunes_of_young_seeds_in_one_episode() -> None:
    """Prunes at ages 1 and 4 with `flag_age` 4: only the first one is of a young seed."""
    config: dict[str, Any] = {"episode_steps": 24, "flag_prunes": 1, "flag_age": 4}
    envs = make(2, **config, embargo_steps=1, heads={"op": ["WAIT", "GERMINATE", "PRUNE"]})
    envs.reset(seed=0)
    germinate, prune, wait = (np.array([[op, *[0] * 7]] * 2) for op in (1, 2, 0))
    # Sub-environment 1 waits longer before it prunes.
    plan = [germinate, prune, wait, wait, wait, wait]
    late = [germinate, wait, wait, wait, wait, prune]
    flags = []
    for first, second in zip(plan, late, strict=True):
        *_, info = envs.step(np.stack([first[0], second[1]]))
        assert info["action_valid"].all()
        flags.append(info["flag_churn"].tolist())
    assert flags[0] == [False, False]
    assert flags[1:] == [[True, False]] * 5
    state = envs.get_state()
    _, info = envs.reset(seed=1)
    assert not info["flag_churn"].any(), "counted per episode"
    _, info = envs.set_state(state)
    assert info["flag_churn"].tolist() == [True, False]


@pytest.mark.parametrize(
    ("norms", "host", "cause"),
    [
        ([0.5, 0.5], 1.0, GradientCause.FINE),
        ([0.0, 0.0], 1.0, GradientCause.NO_GRADIENT),
        ([1e-9, 1e-8], 1.0, GradientCause.NO_GRADIENT),
        ([0.0, 0.5], 1.0, GradientCause.DORMANT),
        ([1e-4, 1e-4], 1.0, GradientCause.SATURATED),
        ([0.05, 0.05], 1.0, GradientCause.HOST_FAST),
        ([1e-4, 1e-4], 1e-4, GradientCause.FINE),
        ([np.nan, np.nan], 1.0, GradientCause.FINE),
    ],
)
def test_the_cause_of_a_low_gradient_by_hand(
    norms: list[float], host: float, cause: GradientCause
) -> None:
    """Finding GRD-H3: the clip norm is 1, and tensors of a norm below 1e-6 vanish."""
    measured = Measurements.empty(1, 1)
    record_gradients(measured, np.array([0]), np.array([[norms]]), np.array([host]), EnvConfig())
    assert measured.cause.item() == cause


def test_without_a_threshold_only_a_norm_of_zero_vanishes() -> None:
    measured = Measurements.empty(1, 2)
    config = EnvConfig(vanishing_gradient_norm=0.0)
    norms = np.array([[[0.0, 0.0], [1e-30, 1e-30]]])
    record_gradients(measured, np.array([0]), norms, np.array([0.0]), config)
    assert measured.cause.tolist() == [[GradientCause.NO_GRADIENT, GradientCause.FINE]]


def test_a_fast_host_is_the_cause_in_a_real_training() -> None:
    """Wrong labels and a large learning rate drive the host's gradient up."""
    envs = make(4, episode_steps=20, host_learning_rate=2.0, seed_learning_rate=1e-6)
    envs.reset(seed=0)
    rng, seen = np.random.default_rng(0), set()
    for _ in range(19):
        *_, info = envs.step(envs.sample_valid_actions(rng))
        seen |= set(info["gradient_cause"][info["blueprint"] >= 0].tolist())
        assert (info["gradient_cause"][info["blueprint"] < 0] == GradientCause.FINE).all()
    assert GradientCause.HOST_FAST in seen


# ------------------------------------------------------------------ interface


def test_flags_are_in_the_info_of_a_single_environment_and_of_sync_ones() -> None:
    config = {"batches_per_step": 1, "batch_size": 8, "episode_steps": 4}
    env = gym.make(ID, **config)
    _, info = env.reset(seed=0)
    names = [*FLAGS, "gradient_cause"]
    assert all(name in info for name in names)
    assert json.dumps({name: np.asarray(info[name]).tolist() for name in names})
    assert info["gradient_cause"].dtype == np.int8
    assert isinstance(info["flag_churn"], bool)
    envs = gym.make_vec(ID, num_envs=2, vectorization_mode="sync", **config)
    _, info = envs.reset(seed=0)
    assert info["flag_parasite"].shape == (2, 2)


def test_without_attribution_no_contribution_is_flagged() -> None:
    envs = make(4, attribution="none", flag_contribution=0.0, flag_ratio=0.0, episode_steps=12)
    envs.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(11):
        *_, info = envs.step(envs.sample_valid_actions(rng))
        assert not info["flag_parasite"].any()
        assert not info["flag_attribution"].any()


# ------------------------------------------------------------------ adversaries


def test_a_churner_is_flagged_and_the_heuristic_is_not() -> None:
    envs = make_envs(ID, 4, "cpu", tiny_config(episode_steps=60))
    assert flagged(BASELINES["churner"](), envs)["flag_churn"] == 4
    for name in ("heuristic", "best-schedule", "random"):
        assert flagged(BASELINES[name](), envs)["flag_churn"] == 0
    envs.close()


def test_a_parasite_grower_is_flagged_and_others_are_not() -> None:
    """In more than 5 of 100 episodes, at which the detector raises an alert."""
    envs = make_envs(ID, 64, "cpu", TRAINING)
    parasite = flagged(BASELINES["parasite"](), envs)
    assert min(parasite["flag_parasite"], parasite["flag_attribution"]) > 0.05 * 64
    assert flagged(BASELINES["tuned-heuristic"](), envs) == dict.fromkeys(FLAGS, 0)
    envs.close()
