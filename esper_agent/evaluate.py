"""Compare agents on the same episodes.

Every agent sees the same reset seeds, so episode k has the same initial host, data order and seed
initialisation for all of them and differences are paired. Run `python -m esper_agent.evaluate
--help`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy import stats

from esper_agent.baselines import BASELINES, FixedSchedule, Policy, parse_plan
from esper_agent.ppo_lstm import TRAINING, load_agent, make_envs, one_thread, pad_masks
from esper_env import EnvConfig, EsperVectorEnv, Stage

MAX_ENVS = 64
"""Episodes that run side by side."""
CHECKPOINTS = ("ppo", "sampled-ppo")
"""What comes before the directory of a run in an agent's name."""
TABLE_WIDTH = 140
"""Columns of the terminal that the table needs."""
NUM_RESAMPLES = 2000
"""Bootstrap resamples."""
FIGURES = (
    "committed_score",
    "test_score",
    "committed_accuracy",
    "committed_test_accuracy",
    "parameters",
    "flops",
)
"""What is kept of every episode. `committed_score` is the objective; `test_score` is the same with
test images."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Evaluate agents on the same episodes and print a table."""

    agents: tuple[str, ...] = ("never-grow", "random", "heuristic")
    """Names of baselines; ppo:RUN_DIR, which takes the checkpoint's likeliest actions, or
    sampled-ppo:RUN_DIR, which draws them; schedule:PLAN, such as conv_heavy@0+norm@1:20."""
    env_id: str = "Esper-Digits-v0"
    """Environment id."""
    env: EnvConfig = field(default_factory=lambda: TRAINING)
    """Settings of the environment; those that differ from their default are passed on."""
    instances: Literal["default", "train", "test"] = "test"
    """Instances to evaluate on, in turn."""
    episodes: int = 64
    """Episodes per agent."""
    seed: int = 1_000_000
    """Reset seed of the first episode; episode k has seed + k."""
    device: str = "cpu"
    """Where the hosts train."""
    out: Path | None = None
    """Where to write the result as JSON; a picture of the same name is written beside it."""


class TrainedPolicy:
    """A checkpoint of `ppo_lstm`.

    Args:
        directory: Of the run.
        envs: What it will act in.
        samples: Whether actions are drawn from the policy, as in training, with a seeded generator;
            otherwise each head takes its likeliest option.
    """

    def __init__(self, directory: Path, envs: EsperVectorEnv, samples: bool = False) -> None:
        self._agent = load_agent(directory, envs)
        self._samples = samples

    def begin(self, envs: EsperVectorEnv, seed: int) -> None:
        """Start from a zero state."""
        self._envs = envs
        self._state = self._agent.initial_state(envs.num_envs)
        self._start = torch.ones(envs.num_envs, dtype=torch.bool)
        self._generator = torch.Generator().manual_seed(seed) if self._samples else None

    @torch.no_grad()
    @one_thread()
    def act(
        self, observation: npt.NDArray[np.float32], info: dict[str, Any]
    ) -> npt.NDArray[np.int64]:
        """Choose by the present observations."""
        del info
        core, slots, self._state = self._agent.step_core(
            torch.from_numpy(observation), self._state, self._start
        )
        self._start = torch.zeros_like(self._start)
        masks = pad_masks(self._envs.conditional_masks(), torch.device("cpu"))
        actions, _ = self._agent.act(core, slots, masks, self._generator)
        result: npt.NDArray[np.int64] = actions.numpy()
        return result


def make_policy(name: str, envs: EsperVectorEnv) -> Policy:
    """Return the policy of a name: a baseline, ppo:RUN_DIR, sampled-ppo:RUN_DIR or schedule:PLAN.

    Raises:
        ValueError: If the name is unknown, a plan cannot be read, or a checkpoint does not fit the
            environment.
        FileNotFoundError: If there is no checkpoint.
    """
    kind, colon, rest = name.partition(":")
    if colon and kind in CHECKPOINTS:
        return TrainedPolicy(Path(rest), envs, samples=kind == "sampled-ppo")
    if colon and kind == "schedule":
        return FixedSchedule(parse_plan(rest))
    if name not in BASELINES:
        raise ValueError(
            f"agents: expected {sorted(BASELINES)}, ppo:RUN_DIR, sampled-ppo:RUN_DIR or "
            f"schedule:PLAN, got {name!r}"
        )
    return BASELINES[name]()


def figures_of(final_info: dict[str, Any]) -> dict[str, npt.NDArray[np.float64]]:
    """Return the figures of members whose episodes ended, by the info of their last step."""
    rent = final_info["committed_accuracy"] - final_info["committed_score"]
    known = {**final_info, "test_score": final_info["committed_test_accuracy"] - rent}
    return {name: known[name] for name in FIGURES}


def run_episodes(
    policy: Policy, envs: EsperVectorEnv, num_episodes: int, seed: int
) -> dict[str, list[Any]]:
    """Run one episode for each of the seeds seed, seed + 1, ..., on all instances in turn.

    Returns:
        "seed", "instance", the figures, and "growth" of every episode, in order of its seed. Growth
        is the plan of its fossils, such as "conv_heavy@0:3": blueprint@slot:step of germination.
    """
    prefix = "slot_0.blueprint_"
    names = [n.removeprefix(prefix) for n in envs.observation_names if n.startswith(prefix)]
    result: dict[str, list[Any]] = {n: [] for n in ("seed", "instance", *FIGURES, "growth")}
    for first in range(seed, seed + num_episodes, envs.num_envs):
        instance = (first - seed + np.arange(envs.num_envs)) % envs.num_instances
        observation, info = envs.reset(seed=first, options={"instance": instance})
        policy.begin(envs, first)
        final: dict[str, npt.NDArray[np.float64]] = {}
        growth = [""] * envs.num_envs
        born, step = np.zeros_like(info["blueprint"]), 0
        is_running = np.ones(envs.num_envs, dtype=bool)
        while is_running.any():
            is_empty = info["blueprint"] < 0
            observation, _, terminated, truncated, info = envs.step(policy.act(observation, info))
            ends = (terminated | truncated) & is_running
            if ends.any():
                last = info["final_info"]
                for name, values in figures_of(last).items():
                    final.setdefault(name, np.zeros(envs.num_envs))[ends] = values[ends]
                for i in np.nonzero(ends)[0].tolist():
                    slots = np.nonzero(last["stage"][i] == Stage.FOSSILIZED)[0].tolist()
                    growth[i] = "+".join(
                        f"{names[last['blueprint'][i, s]]}@{s}:{born[i, s]}" for s in slots
                    )
            born[is_empty & (info["blueprint"] >= 0)] = step
            step += 1
            is_running &= ~ends
        count = min(envs.num_envs, seed + num_episodes - first)
        result["seed"].extend(range(first, first + count))
        result["instance"].extend(instance[:count].tolist())
        result["growth"].extend(growth[:count])
        for name in FIGURES:
            result[name].extend(float(x) for x in final[name][:count])
    return result


def interquartile_mean(values: npt.NDArray[np.float64], axis: int = -1) -> npt.NDArray[np.float64]:
    """Return the mean of the middle half. Source: Agarwal et al. (2021), section 4.3."""
    return np.asarray(stats.trim_mean(values, 0.25, axis=axis))


def bootstrap_interval(
    values: npt.NDArray[np.float64], rng: np.random.Generator
) -> tuple[float, float]:
    """Return the 95 % percentile-bootstrap interval of the interquartile mean of (n,) values."""
    draws = rng.integers(len(values), size=(NUM_RESAMPLES, len(values)))
    low, high = np.percentile(interquartile_mean(values[draws]), [2.5, 97.5])
    return float(low), float(high)


def evaluate_agents(
    names: list[str], env_id: str, config: EnvConfig, episodes: int, seed: int, device: str
) -> dict[str, Any]:
    """Run all agents on the same episodes.

    Args:
        names: Agents, as `make_policy` takes them; differences are against the first.
        env_id: Environment id.
        config: Its settings; episodes have the instances of the configured set in turn.
        episodes: Episodes per agent.
        seed: Reset seed of the first.
        device: Where the hosts train.

    Returns:
        A JSON-able record: settings, per agent every episode's figures and a summary, and the
        paired differences of the committed score between the first agent and each other.
    """
    if episodes < 1:
        raise ValueError(f"episodes: expected at least 1, got {episodes}")
    if not names:
        raise ValueError(f"agents: expected at least one of {sorted(BASELINES)} or ppo:RUN_DIR")
    envs = make_envs(env_id, min(episodes, MAX_ENVS), device, config)
    policies = {name: make_policy(name, envs) for name in names}
    agents: dict[str, Any] = {}
    for name, policy in policies.items():
        agents[name] = {"episodes": run_episodes(policy, envs, episodes, seed)}
    envs.close()
    rng = np.random.default_rng(seed)
    for record in agents.values():
        scores = np.array(record["episodes"]["committed_score"])
        low, high = bootstrap_interval(scores, rng)
        record["summary"] = {
            "mean": float(scores.mean()),
            "iqm": float(interquartile_mean(scores)),
            "low": low,
            "high": high,
            **{f"{n}_mean": float(np.mean(record["episodes"][n])) for n in FIGURES[1:]},
        }
    first = np.array(agents[names[0]]["episodes"]["committed_score"])
    paired = {}
    for name in names[1:]:
        differences = first - np.array(agents[name]["episodes"]["committed_score"])
        low, high = bootstrap_interval(differences, rng)
        paired[f"{names[0]} - {name}"] = {
            "difference": float(interquartile_mean(differences)),
            "low": low,
            "high": high,
        }
    return {
        "env_id": env_id,
        "env": dataclasses.asdict(config),
        "episodes": episodes,
        "seed": seed,
        "torch": torch.__version__,
        "agents": agents,
        "paired": paired,
    }


def print_table(result: dict[str, Any], console: Console) -> None:
    """Print the summary of `evaluate_agents`."""
    names = list(result["agents"])
    first, labels = names[0], _labels(names)
    table = Table(
        title=f"{result['env_id']}: committed score over {result['episodes']} episodes",
        caption="intervals: 95 % bootstrap of the interquartile mean (IQM)",
    )
    table.add_column("agent", no_wrap=True)
    columns = ("mean", "IQM", "interval", f"{labels[first]} minus it, paired", "test score")
    for column in (*columns, "parameters grown"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, record in result["agents"].items():
        summary = record["summary"]
        pair = result["paired"].get(f"{first} - {name}")
        table.add_row(
            labels[name],
            f"{summary['mean']:.4f}",
            f"{summary['iqm']:.4f}",
            f"{summary['low']:.4f} .. {summary['high']:.4f}",
            f"{pair['difference']:+.4f} ({pair['low']:+.4f} .. {pair['high']:+.4f})"
            if pair
            else "",
            f"{summary['test_score_mean']:.4f}",
            f"{summary['parameters_mean']:.0f}",
        )
    console.print(table)


def plot_scores(result: dict[str, Any], path: Path) -> None:
    """Draw every episode's committed score and the interval of the interquartile mean, per agent.

    Args:
        result: From `evaluate_agents`.
        path: Where to write the picture; its suffix chooses the format.
    """
    names = list(result["agents"])
    labels = _labels(names)
    figure = Figure(figsize=(7.0, 0.7 + 0.6 * len(names)), layout="constrained")
    axes = figure.subplots()
    rng = np.random.default_rng(0)
    for row, name in enumerate(reversed(names)):
        record = result["agents"][name]
        scores = np.array(record["episodes"]["committed_score"])
        heights = row + rng.uniform(-0.22, 0.22, len(scores))
        summary = record["summary"]
        axes.plot(scores, heights, ".", color="0.75", markersize=4, zorder=1)
        axes.plot([summary["low"], summary["high"]], [row, row], color="C0", linewidth=5, zorder=2)
        axes.plot(summary["iqm"], row, "|", color="black", markersize=14, zorder=3)
    axes.set_yticks(range(len(names)), [labels[name] for name in reversed(names)])
    axes.set_xlabel("committed score (bar: 95 % interval of the interquartile mean)")
    axes.set_title(f"{result['env_id']}, {result['episodes']} episodes", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _labels(names: list[str]) -> dict[str, str]:
    """Return short names: the only checkpoint is ppo_lstm, several go by their directories."""
    checkpoints = [name for name in names if name.partition(":")[0] in CHECKPOINTS]
    labels = {name: name for name in names}
    for name in checkpoints:
        kind, _, directory = name.partition(":")
        labels[name] = "ppo_lstm" if len(checkpoints) == 1 else f"{kind}:{Path(directory).name}"
    return labels


def main() -> None:
    """Parse the command line, evaluate, print and save."""
    args = tyro.cli(Args)
    result = evaluate_agents(
        list(args.agents),
        args.env_id,
        dataclasses.replace(args.env, instances=args.instances),
        args.episodes,
        args.seed,
        args.device,
    )
    print_table(result, Console(width=max(Console().width, TABLE_WIDTH)))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1))
        plot_scores(result, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
