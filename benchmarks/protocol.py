"""How agents are compared: episodes on instances that training never saw, and their statistics.

All arms see the same instances and reset seeds, so that differences are paired. A table of figures
has the shape (agent seeds, instances, repeats); an arm without agent seeds has one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from esper_agent.baselines import Policy
from esper_agent.evaluate import (
    MAX_ENVS,
    NUM_RESAMPLES,
    interquartile_mean,
    make_policy,
    run_episodes,
)
from esper_agent.ppo_lstm import make_envs
from esper_env import EnvConfig
from esper_env.config import FloatArray

Episodes = dict[str, list[Any]]
"""Figures of episodes, as `run_episodes` gives them."""


def play(policy: Policy | str, env_id: str, config: EnvConfig, repeats: int, seed: int) -> Episodes:
    """Run a policy on every instance of the configured set, in turn.

    Args:
        policy: Who acts, or its name for `make_policy`.
        env_id: Environment id.
        config: Its settings.
        repeats: Episodes per instance.
        seed: Reset seed of the first episode.

    Returns:
        Figures of all episodes, as `run_episodes` gives them.
    """
    envs = make_envs(env_id, MAX_ENVS, "cpu", config)
    if isinstance(policy, str):
        policy = make_policy(policy, envs)
    episodes = run_episodes(policy, envs, repeats * envs.num_instances, seed)
    envs.close()
    return episodes


def table_of(runs: list[Episodes], figure: str = "committed_score") -> FloatArray:
    """Return a figure of the episodes of several agent seeds. (agent seeds, instances, repeats)."""
    num_instances = int(max(runs[0]["instance"])) + 1
    values = np.array([run[figure] for run in runs])
    return values.reshape(len(runs), -1, num_instances).swapaxes(1, 2)


def summarise(table: FloatArray, rng: np.random.Generator) -> dict[str, float]:
    """Return the interquartile mean over agent seeds and instances, and its 95 % interval.

    A value is the mean of one agent seed's episodes on one instance. The bootstrap draws agent
    seeds, and within each instance episodes, with replacement; the instances stay (they are the
    strata).

    Source: Agarwal et al. (2021), section 4.

    Args:
        table: (agent seeds, instances, repeats).
        rng: Source of the resamples.
    """
    agents, instances, repeats = table.shape
    strata = np.arange(instances)[:, None]
    means = []
    for _ in range(NUM_RESAMPLES):
        agent = rng.integers(agents, size=(agents, 1, 1))
        repeat = rng.integers(repeats, size=(instances, repeats))
        means.append(table[agent, strata, repeat].mean(axis=2).reshape(-1))
    low, high = np.percentile(interquartile_mean(np.array(means)), [2.5, 97.5])
    return {
        "mean": float(table.mean()),
        "iqm": float(interquartile_mean(table.mean(axis=2).reshape(-1))),
        "low": float(low),
        "high": float(high),
        "agent_seeds": agents,
    }


def compare(first: FloatArray, second: FloatArray, rng: np.random.Generator) -> dict[str, float]:
    """Return the paired difference of two arms and how often the first is better.

    Args:
        first: (agent seeds, instances, repeats).
        second: The same, or with one agent seed.
        rng: Source of the resamples.
    """
    difference = first - second
    summary = summarise(difference, rng)
    is_better = (difference > 0) + 0.5 * (difference == 0)
    return {
        "difference": summary["iqm"],
        "low": summary["low"],
        "high": summary["high"],
        "probability_of_improvement": float(is_better.mean()),
        "agent_seeds": len(difference),
    }
