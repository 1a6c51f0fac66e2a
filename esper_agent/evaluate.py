"""Compare agents on the same episodes.

Every agent gets the same reset seeds, so in episode k all of them start from the same host, data
order and seed initialization, and differences are paired. Run `python -m esper_agent.evaluate
--help`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import signal
import tempfile
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy import stats

from esper_agent import command_line
from esper_agent.arguments import check_types, difference
from esper_agent.baselines import BASELINES, FixedSchedule, Policy, parse_plan
from esper_agent.checkpoint import write_json
from esper_agent.command_line import lenient_stdout
from esper_agent.envs import EVALUATION, make_envs, settings_of
from esper_agent.telemetry.display import progress
from esper_env import EnvConfig, EsperVectorEnv, Stage

MAX_ENVS = 64
"""Episodes that run in parallel."""
SEED = 1_000_000
"""Default reset seed of the first episode, far from the training seeds."""
CHECKPOINTS = {
    "ppo": "esper_agent.ppo_lstm:TrainedPolicy",
    "sampled-ppo": "esper_agent.ppo_lstm:SampledPolicy",
}
"""Import string of the policy that reads a run directory, by the prefix of an agent's name."""
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
"""Figures recorded for every episode. `committed_score` is the objective; `test_score` is the score
after the last step with test images."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Evaluate agents on the same episodes and print a table."""

    agents: tuple[str, ...] = ("never-grow", "random", "heuristic")
    """Agents to compare: names of baselines; ppo:RUN_DIR, the most likely actions of a checkpoint;
    sampled-ppo:RUN_DIR, actions sampled from its policy; schedule:PLAN, such as
    conv_heavy@0+norm@1:20; or MODULE:FACTORY, an import string of your own class or function, which
    is called without arguments and returns a `baselines.Policy`."""
    env_id: str = "Esper-Digits-v0"
    """Environment id."""
    env: EnvConfig = field(default_factory=lambda: EVALUATION)
    """Environment settings; by default those of the id for training, with the test instances."""
    episodes: int = 64
    """Episodes per agent."""
    seed: int = SEED
    """Reset seed of the first episode; episode k has seed + k."""
    device: str = "cpu"
    """Device of the environment."""
    out: Path | None = None
    """JSON file for the result; a plot of the same name is written beside it."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        check_types(self)
        object.__setattr__(self, "env", settings_of(self.env_id, self.env))
        for name, least in (("episodes", 1), ("seed", 0)):
            if getattr(self, name) < least:
                got = getattr(self, name)
                raise ValueError(f"{name}: expected at least {least}, got {got}")
        repeated = {name for name in self.agents if self.agents.count(name) > 1}
        if repeated or not self.agents:
            wrong = f"{min(repeated)!r} twice" if repeated else "none"
            raise ValueError(f"agents: expected at least one, each once, got {wrong}")


def make_policy(name: str) -> Policy:
    """Return the policy with a name that `--agents` accepts.

    Raises:
        TypeError: If the name is no string.
        ValueError: If the name is unknown, or a plan cannot be parsed.
        FileNotFoundError: If there is no checkpoint.
    """
    if not isinstance(name, str):
        raise TypeError(f"agents: expected names, got {name!r} of type {type(name).__name__}")
    if name in BASELINES:
        return BASELINES[name]()
    prefix, colon, rest = name.partition(":")
    if colon and prefix == "schedule":
        if not rest:
            raise ValueError("agents: expected schedule:PLAN with a plan, got none; use never-grow")
        return FixedSchedule(parse_plan(rest))
    is_checkpoint = bool(colon) and prefix in CHECKPOINTS
    module, _, attribute = (CHECKPOINTS[prefix] if is_checkpoint else name).partition(":")
    try:
        factory: Callable[..., Policy] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"agents: expected {sorted(BASELINES)}, ppo:RUN_DIR, sampled-ppo:RUN_DIR, "
            f"schedule:PLAN or MODULE:FACTORY, got {name!r} ({error})"
        ) from error
    return factory(Path(rest).expanduser()) if is_checkpoint else factory()


def figures_of(
    final_info: dict[str, Any], objective: str = "final"
) -> dict[str, npt.NDArray[np.float64]]:
    """Return the figures of episodes that ended, given the info of their last step.

    The test score is that of the network which the objective judges in the last step: the committed
    one, or with the objective "anytime" the one in service.
    """
    rent = final_info["committed_accuracy"] - final_info["committed_score"]
    test_score = final_info["committed_test_accuracy"] - rent
    if objective == "anytime":
        rent = final_info["accuracy"] - final_info["score"]
        test_score = final_info["test_accuracy"] - rent
    known = {**final_info, "test_score": test_score}
    return {name: known[name] for name in FIGURES}


def run_episodes(
    policy: Policy, envs: EsperVectorEnv, num_episodes: int, seed: int
) -> dict[str, list[Any]]:
    """Run episodes with reset seeds seed, seed + 1, ..., on all instances in turn.

    Returns:
        "seed", "instance", the figures, and "growth" of every episode, in order of its seed. Growth
        lists its fossilized seeds, such as "conv_heavy@0:3": blueprint@slot:step of germination.
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
        germinated_at, step = np.zeros_like(info["blueprint"]), 0
        is_running = np.ones(envs.num_envs, dtype=bool)
        while is_running.any():
            is_empty = info["blueprint"] < 0
            observation, _, terminated, truncated, info = envs.step(policy.act(observation, info))
            ends = (terminated | truncated) & is_running
            if ends.any():
                last = info["final_info"]
                for name, values in figures_of(last, envs.config.objective).items():
                    final.setdefault(name, np.zeros(envs.num_envs))[ends] = values[ends]
                for i in np.nonzero(ends)[0].tolist():
                    slots = np.nonzero(last["stage"][i] == Stage.FOSSILIZED)[0].tolist()
                    growth[i] = "+".join(
                        f"{names[last['blueprint'][i, s]]}@{s}:{germinated_at[i, s]}" for s in slots
                    )
            germinated_at[is_empty & (info["blueprint"] >= 0)] = step
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
    policies: dict[str, Policy],
    env_id: str,
    config: EnvConfig,
    episodes: int,
    seed: int = SEED,
    device: str = "cpu",
) -> dict[str, Any]:
    """Run several policies on the same episodes.

    Args:
        policies: Policies by name; the first one is compared with each other one.
        env_id: Environment id.
        config: Environment settings; episodes use the instances of the configured set in turn.
        episodes: Episodes per policy.
        seed: Reset seed of the first episode.
        device: Device of the environment.

    Returns:
        A record for JSON: settings, every episode's figures and their summary by policy, and the
        paired differences of the committed score between the first policy and each other one.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If there are no policies or episodes, or a policy does not fit the environment.
    """
    known = policies.values() if isinstance(policies, Mapping) else [policies]
    if not all(hasattr(policy, "begin") and hasattr(policy, "act") for policy in known):
        raise TypeError(f"policies: expected a dictionary of policies by name, got {policies!r}")
    # The checks of the command line; its names of policies and config are agents and env.
    settings = Args(
        agents=tuple(policies), env_id=env_id, env=config, episodes=episodes, seed=seed,
        device=device,
    )  # fmt: skip
    episodes, seed = settings.episodes, settings.seed
    envs = make_envs(env_id, min(episodes, MAX_ENVS), device, config)
    # A policy that does not fit the environment must raise before another one's episodes are run.
    check_policies(policies, envs, seed)
    agents: dict[str, Any] = {}
    for name, policy in progress(list(policies.items()), f"{env_id}: agents"):
        agents[name] = {"episodes": run_episodes(policy, envs, episodes, seed)}
    envs.close()
    rng = np.random.default_rng(seed)
    scores = {name: np.array(agents[name]["episodes"]["committed_score"]) for name in agents}
    for name, record in agents.items():
        low, high = bootstrap_interval(scores[name], rng)
        record["summary"] = {
            "mean": float(scores[name].mean()),
            "iqm": float(interquartile_mean(scores[name])),
            "low": low,
            "high": high,
            **{f"{n}_mean": float(np.mean(record["episodes"][n])) for n in FIGURES[1:]},
        }
    first, *others = policies
    paired = {}
    for name in others:
        differences = scores[first] - scores[name]
        low, high = bootstrap_interval(differences, rng)
        paired[f"{first} - {name}"] = {
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


def mean_scores(result: dict[str, Any]) -> dict[str, float]:
    """Return the mean committed score of each agent, given the result of `evaluate_agents`."""
    return {name: agent["summary"]["mean"] for name, agent in result["agents"].items()}


def check_policies(policies: dict[str, Policy], envs: EsperVectorEnv, seed: int) -> None:
    """Begin an episode with every policy; those that do not fit the environment raise."""
    envs.reset(seed=seed)
    for policy in policies.values():
        policy.begin(envs, seed)


def evaluate_beside_baselines(
    policies: dict[str, Policy],
    evaluate: Callable[..., dict[str, Any]],
    config: EnvConfig,
    episodes: int,
) -> dict[str, Any]:
    """Evaluate policies and three baselines by `evaluate_agents`.

    Args:
        policies: Policies by name.
        evaluate: `evaluate_agents` with all other arguments.
        config: Environment settings of the training. Instances that an agent was trained on would
            say little, so those of the test set take their place.
        episodes: Episodes per policy.
    """
    baselines = {name: BASELINES[name]() for name in ("never-grow", "random", "heuristic")}
    instances = "test" if config.instances == "train" else config.instances
    config = dataclasses.replace(config, instances=instances)
    return evaluate(policies | baselines, config=config, episodes=episodes)


def report(result: dict[str, Any], out: Path | None) -> None:
    """Print the result of `evaluate_agents` as a table.

    Args:
        result: Record to print.
        out: JSON file for the record; a plot of the same name is written beside it.
    """
    # The files first: output may end at any line.
    if out is not None:
        write_json(out, result)
        plot_scores(result, out.with_suffix(".png"))
    console = Console()
    console.size = (max(console.width, 140), console.height)
    with lenient_stdout():
        console.print(make_table(result))
        if out is not None:
            console.print(f"saved: {out} and .png", soft_wrap=True)


def make_table(result: dict[str, Any]) -> Table:
    """Return the summary of `evaluate_agents` as a table of at most 140 columns."""
    first = next(iter(result["agents"]))
    table = Table(
        title=f"{result['env_id']}: committed score over {result['episodes']} episodes",
        caption="interval: 95 % bootstrap interval of the interquartile mean (IQM)\n"
        f"difference: {first} minus this agent, paired by episode",
    )
    table.add_column("agent", overflow="fold")
    for column in ("mean", "IQM", "interval", "difference", "test score", "parameters grown"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, record in result["agents"].items():
        summary = record["summary"]
        pair = result["paired"].get(f"{first} - {name}")
        table.add_row(
            name,
            f"{summary['mean']:.4f}",
            f"{summary['iqm']:.4f}",
            f"{summary['low']:.4f} .. {summary['high']:.4f}",
            f"{pair['difference']:+.4f} ({pair['low']:+.4f} .. {pair['high']:+.4f})"
            if pair
            else "",
            f"{summary['test_score_mean']:.4f}",
            f"{summary['parameters_mean']:.0f}",
        )
    return table


def plot_scores(result: dict[str, Any], path: Path) -> None:
    """Plot every episode's committed score and the interval of the interquartile mean.

    Args:
        result: Result of `evaluate_agents`.
        path: Picture to write; its suffix chooses the format.
    """
    names = list(result["agents"])
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
    axes.set_yticks(range(len(names)), [textwrap.fill(name, 24) for name in reversed(names)])
    axes.set_xlabel("committed score (bar: 95 % interval of the interquartile mean)")
    axes.set_title(f"{result['env_id']}, {result['episodes']} episodes", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def begin(args: Args) -> dict[str, Policy]:
    """Return the policies, after checking everything that can be checked before the first episode.

    Raises:
        ValueError: If an argument is wrong.
        OSError: If a checkpoint is missing, or `--out` cannot be written.
    """
    policies = {name: make_policy(name) for name in args.agents}
    check_policies(policies, make_envs(args.env_id, 1, args.device, args.env), args.seed)
    for name in args.agents:
        if note := other_settings(name, args.env):
            command_line.say(f"{name}: trained with other settings than those here: {note}")
    if args.out is not None:
        prepare_output(args.out)
    return policies


def other_settings(name: str, config: EnvConfig) -> str:
    """Return the settings that differ from those of a checkpoint's run, the instances aside."""
    prefix, _, rest = name.partition(":")
    path = Path(rest).expanduser() / "config.json"
    if prefix not in CHECKPOINTS or not path.exists():
        return ""
    known = json.loads(path.read_text())["env"]
    actual = json.loads(json.dumps(dataclasses.asdict(config)))
    return difference("env", known | {"instances": config.instances}, actual)


def prepare_output(out: Path) -> None:
    """Create the folder of a JSON file, and check that files can be written there.

    Raises:
        TypeError: If `out` is no path.
        ValueError: If it is a folder or a picture.
        OSError: If it cannot be written.
    """
    if not isinstance(out, Path):
        raise TypeError(f"out: expected a Path, got {out!r} of type {type(out).__name__}")
    if out.is_dir() or out.suffix == ".png":
        raise ValueError(f"out: expected a JSON file; a plot of the same name follows; got {out}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise OSError(f"out: expected a file that can be written, got {out} ({error})") from error


def main() -> None:
    """Parse the command line, evaluate, print and save."""
    with command_line.short_mistakes():
        args = command_line.parse(Args)
        policies = begin(args)
    settings = args.env_id, args.env, args.episodes, args.seed, args.device
    try:
        report(evaluate_agents(policies, *settings), args.out)
    except KeyboardInterrupt:
        command_line.exit_with("interrupted; nothing is saved", 128 + signal.SIGINT)


if __name__ == "__main__":
    main()
