"""Static networks to compare grown networks with.

Both kinds use the instance and the reset seed of the grown network's episode. They therefore start
with the same host, and train on the same images in the same order with the same learning rates.

- Grown size: the host with the final seeds of the grown network from the first batch on, at alpha 1
  and with the style LINEAR_ADD, trained for as many batches.
- Equal compute: the host without seeds, trained for a multiple of the env steps. The multiple is
  the smallest integer whose training costs at least as much as that of the grown network.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from benchmarks.protocol import Episodes
from esper_agent.baselines import parse_plan
from esper_agent.envs import make_envs
from esper_agent.evaluate import FIGURES, MAX_ENVS, figures_of
from esper_env import EnvConfig, Stage
from esper_env.config import IntArray
from esper_env.rng import make_key


def train_grown_size(episodes: Episodes, env_id: str, config: EnvConfig) -> Episodes:
    """Train the final network of each episode from scratch.

    Args:
        episodes: Episodes in the format of `run_episodes`, on the configured set of instances.
        env_id: Environment id.
        config: Settings of the environment.

    Returns:
        Figures of the static networks, in the same order.
    """
    return _run_static(episodes["seed"], episodes["instance"], episodes["growth"], env_id, config)


def _run_static(
    seeds: list[int], instance: list[int], growth: list[str], env_id: str, config: EnvConfig
) -> Episodes:
    """Run episodes in which all seeds are fossilized before the first batch."""
    envs = make_envs(env_id, min(MAX_ENVS, len(seeds)), "cpu", config)
    parts = []
    for first in range(0, len(seeds), envs.num_envs):
        # The last group of environments is filled with the first episodes again.
        rows = (np.arange(first, first + envs.num_envs) % len(seeds)).tolist()
        _begin(envs, *([values[k] for k in rows] for values in (seeds, instance, growth)))
        wait = np.zeros((envs.num_envs, len(envs.heads)), dtype=np.int64)
        for _ in range(config.episode_steps):
            *_, info = envs.step(wait)
        parts.append(figures_of(info["final_info"]))
    envs.close()
    figures = {
        name: np.concatenate([part[name] for part in parts])[: len(seeds)].astype(float).tolist()
        for name in FIGURES
    }
    return {"seed": seeds, "instance": instance, **figures, "growth": growth}


def _begin(envs: Any, seeds: list[int], instance: list[int], growth: list[str]) -> None:
    """Begin episodes with the seeds of a plan, fossilized at alpha 1."""
    envs.reset(seed=seeds, options={"instance": np.array(instance)})
    sim = envs.debug_state()
    names = [blueprint.name for blueprint in envs._blueprints]
    for i, text in enumerate(growth):
        for slot, name, _ in parse_plan(text):
            member, at = np.array([i]), np.array([slot])
            blueprint = np.array([names.index(name)])
            width = sim.instances.width[sim.state.episode.instance[member]]
            key = make_key(sim.state.episode.key[member], slot)
            sim.population.germinate(member, width, at, blueprint, key)
            sim.state.slots.stage[i, slot] = Stage.FOSSILIZED
            sim.state.slots.blueprint[i, slot] = blueprint[0]
            sim.state.slots.style[i, slot] = 0
            sim.state.slots.alpha[i, slot] = sim.state.slots.alpha_target[i, slot] = 1.0


def train_equal_compute(runs: list[Episodes], env_id: str, config: EnvConfig) -> list[Episodes]:
    """Train the host without seeds for at least the compute of each episode.

    Args:
        runs: Episodes of several agents, all with the same reset seeds, on the configured set of
            instances in turn.
        env_id: Environment id.
        config: Settings of the environment.

    Returns:
        Figures of the hosts, in the same order.
    """
    seeds, instance = np.array(runs[0]["seed"]), np.array(runs[0]["instance"])
    assert all(run["seed"] == runs[0]["seed"] for run in runs)
    flops = np.array([run["flops"] for run in runs])  # (agents, episodes)

    def train(multiple: int, rows: IntArray) -> dict[int, dict[str, Any]]:
        """Run episodes of a multiple of the length, and return the figures by row."""
        longer = dataclasses.replace(config, episode_steps=multiple * config.episode_steps)
        own = seeds[rows].tolist(), instance[rows].tolist(), [""] * len(rows)
        figures = _run_static(*own, env_id, longer)
        return {
            int(row): {name: values[k] for name, values in figures.items()}
            for k, row in enumerate(rows)
        }

    # The host of the usual length gives the compute of one multiple.
    hosts = {1: train(1, np.arange(len(seeds)))}
    one = np.array([hosts[1][row]["flops"] for row in range(len(seeds))])
    multiples = np.maximum(np.ceil(flops / one - 1e-9), 1).astype(int)
    for multiple in np.unique(multiples[multiples > 1]).tolist():
        hosts[multiple] = train(multiple, np.nonzero((multiples == multiple).any(axis=0))[0])
    return [
        {name: [hosts[int(m)][row][name] for row, m in enumerate(own)] for name in hosts[1][0]}
        for own in multiples
    ]
