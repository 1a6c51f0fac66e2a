"""Static networks that grown ones are compared with.

Both see the grown episode's instance and reset seed, hence the same host at birth, the same images
in the same order, and the same learning rates.

- grown size: the host with the grown network's seeds in place from the first batch, fully
  blended, trained for as many batches. Seeds add (the style LINEAR_ADD).
- equal compute: the host alone for a whole multiple of the env steps, rounded up so that its
  training costs at least what the grown network's did.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from benchmarks.protocol import Episodes
from esper_agent.baselines import NeverGrow, parse_plan
from esper_agent.evaluate import FIGURES, MAX_ENVS, run_episodes
from esper_agent.ppo_lstm import make_envs
from esper_env import EnvConfig, Stage, streams
from esper_env.config import IntArray


def train_grown_size(episodes: Episodes, env_id: str, config: EnvConfig) -> Episodes:
    """Train from scratch what each episode ended with.

    Args:
        episodes: As `run_episodes` gives them, on the instances of the configured set.
        env_id: Environment id.
        config: Its settings.

    Returns:
        The figures of the static networks, in the same order.
    """
    envs = make_envs(env_id, min(MAX_ENVS, len(episodes["seed"])), "cpu", config)
    parts = []
    for first in range(0, len(episodes["seed"]), envs.num_envs):
        rows = np.arange(first, first + envs.num_envs) % len(episodes["seed"])
        seeds = np.array(episodes["seed"])[rows]
        instance = np.array(episodes["instance"])[rows]
        growth = [episodes["growth"][row] for row in rows]
        part = _run_static(envs, seeds, instance, growth)
        parts.append(
            {name: values[: len(episodes["seed"]) - first] for name, values in part.items()}
        )
    envs.close()
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


def _run_static(envs: Any, seeds: IntArray, instance: IntArray, growth: list[str]) -> Episodes:
    """Run one episode per member with all its seeds fossilized before the first batch."""
    envs.reset(seed=seeds.tolist(), options={"instance": instance})
    sim = envs._sim
    names = [blueprint.name for blueprint in envs._blueprints]
    for i, text in enumerate(growth):
        for slot, name, _ in parse_plan(text):
            member, at = np.array([i]), np.array([slot])
            blueprint = np.array([names.index(name)])
            width = sim.instances.width[sim.instance[member]]
            key = streams.make_key(sim._episode_key[member], slot)
            sim.population.germinate(member, width, at, blueprint, key)
            sim.state.stage[i, slot] = Stage.FOSSILIZED
            sim.state.blueprint[i, slot] = blueprint[0]
            sim.state.style[i, slot] = 0
            sim.state.alpha[i, slot] = sim.state.alpha_target[i, slot] = 1.0
    sim.refresh()
    wait = np.zeros((envs.num_envs, len(envs.heads)), dtype=np.int64)
    for _ in range(envs.config.episode_steps):
        *_, info = envs.step(wait)
    last = info["final_info"]
    rent = last["committed_accuracy"] - last["committed_score"]
    last = {**last, "test_score": last["committed_test_accuracy"] - rent}
    figures = {name: last[name].astype(float).tolist() for name in FIGURES}
    return {"seed": seeds.tolist(), "instance": instance.tolist(), **figures, "growth": growth}


def train_equal_compute(runs: list[Episodes], env_id: str, config: EnvConfig) -> list[Episodes]:
    """Train the host alone for at least the compute of each episode.

    Args:
        runs: Episodes of several agents, all with the same seeds, on the instances of the
            configured set in turn.
        env_id: Environment id.
        config: Its settings.

    Returns:
        The figures of the hosts, in the same order.
    """
    seeds = runs[0]["seed"]
    assert all(run["seed"] == seeds for run in runs)
    flops = np.array([run["flops"] for run in runs])
    one = _run_host(1, seeds, env_id, config)
    multiples = np.maximum(np.ceil(flops / np.array(one["flops"]) - 1e-9), 1).astype(int)
    hosts = {int(m): _run_host(int(m), seeds, env_id, config) for m in np.unique(multiples)}
    return [
        {name: [hosts[int(m)][name][k] for k, m in enumerate(row)] for name in one}
        for row in multiples
    ]


def _run_host(multiple: int, seeds: list[int], env_id: str, config: EnvConfig) -> Episodes:
    """Run never-grow in episodes that are a multiple as long."""
    longer = dataclasses.replace(config, episode_steps=multiple * config.episode_steps)
    envs = make_envs(env_id, min(MAX_ENVS, len(seeds)), "cpu", longer)
    figures = run_episodes(NeverGrow(), envs, len(seeds), seeds[0])
    envs.close()
    return figures
