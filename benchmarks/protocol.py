"""Comparison of agents: episodes on held-out instances, and their statistics.

All arms run on the same instances and reset seeds, so differences are paired. A table has the shape
(agent seeds, instances, repeats); policies without training count as one agent seed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from esper_agent.baselines import Policy
from esper_agent.envs import make_envs
from esper_agent.evaluate import MAX_ENVS, NUM_RESAMPLES, interquartile_mean, run_episodes
from esper_env import EnvConfig
from esper_env.config import FloatArray

Episodes = dict[str, list[Any]]
"""Figures of episodes in the format of `run_episodes`."""


def play(policy: Policy, env_id: str, config: EnvConfig, repeats: int, seed: int) -> Episodes:
    """Run a policy on every instance of the configured set, in turn.

    Args:
        policy: Policy to run.
        env_id: Environment id.
        config: Settings of the environment.
        repeats: Episodes per instance.
        seed: Reset seed of the first episode.

    Returns:
        Figures of all episodes in the format of `run_episodes`.
    """
    envs = make_envs(env_id, MAX_ENVS, "cpu", config)
    episodes = run_episodes(policy, envs, repeats * envs.num_instances, seed)
    envs.close()
    return episodes


def table_of(runs: list[Episodes], figure: str = "committed_score") -> FloatArray:
    """Return one figure of all episodes. (agent seeds, instances, repeats)."""
    num_instances = int(max(runs[0]["instance"])) + 1
    values = np.array([run[figure] for run in runs])
    return values.reshape(len(runs), -1, num_instances).swapaxes(1, 2)


def summarize(table: FloatArray, rng: np.random.Generator) -> dict[str, float]:
    """Return the interquartile mean over agent seeds and instances, with a 95 % interval.

    Each value is the mean of one agent seed's episodes on one instance. The stratified bootstrap
    samples agent seeds, and within each instance episodes, with replacement. Instances are the
    strata and are not sampled.

    Source: Agarwal et al. (2021), section 4.

    Args:
        table: Figures of episodes. (agent seeds, instances, repeats).
        rng: Random generator of the bootstrap.
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
    """Return the paired difference of two arms, and the share of pairs that the first one wins.

    Args:
        first: Figures of the first arm. (agent seeds, instances, repeats).
        second: Figures of the second arm, of the same shape or with one agent seed.
        rng: Random generator of the bootstrap.
    """
    difference = first - second
    summary = summarize(difference, rng)
    is_better = (difference > 0) + 0.5 * (difference == 0)
    return {
        "difference": summary["iqm"],
        "low": summary["low"],
        "high": summary["high"],
        "probability_of_improvement": float(is_better.mean()),
        "agent_seeds": len(difference),
    }
