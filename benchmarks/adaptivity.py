"""Does an environment need an agent that adapts? Fixed plans, an oracle, rules and agents.

An open loop acts at fixed env steps, whatever happens. The best one is chosen on the test instances
themselves, which favours it. An oracle sees the regime. A rule sees the validation accuracy, with
or without memory. Oracle and rules are tuned on training instances. The differences from the best
open loop are paired: all arms have the same instances and reset seeds.

With regimes, the seeds of a *plan* are in service or not. Without, an open loop is a schedule of
germinations, and the rules are plateau heuristics.

    python benchmarks/adaptivity.py --env-id Esper-Digits-Sizing-v0 \
        --agent-seeds 1 2 3 4 5 6 7 8 9 10 --out benchmarks/results/adaptivity-sizing.json
    python benchmarks/adaptivity.py --env-id Esper-Digits-v0 --repeats 8 \
        --agents-from benchmarks/results/learning-digits.json \
        --out benchmarks/results/adaptivity-digits.json
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import learning, write_result
from benchmarks.processes import only_user
from benchmarks.protocol import Episodes, play, table_of
from esper_agent import command_line, ppo_lstm
from esper_agent.baselines import FixedSchedule, NeverGrow, Plan, Policy, parse_plan
from esper_agent.envs import TRAINING, make_envs, settings_of
from esper_agent.in_service import OpenLoop, Oracle, Threshold, Toggle
from esper_agent.telemetry.display import progress
from esper_env import EnvConfig
from esper_env.config import FloatArray
from esper_env.tasks import TASKS

PLANS = (
    *("conv_heavy@1+conv_heavy@0", "conv_heavy@0", "conv_heavy@1"),
    *("conv_light@1+conv_light@0", "conv_light@0", "conv_light@1"),
    *("conv_small@1+conv_small@0", "conv_small@1", "norm@0+norm@1", "norm@1"),
    *("conv_heavy@0+norm@1", "conv_light@0+norm@1", "conv_heavy@1+norm@0"),
)
"""Seeds that are in service together, in the format of `parse_plan` and in the order in which they
are germinated: of both orders the one with the higher score on 96 training episodes of Sizing."""
SHARES = ((0.0, 1.0), (0.25, 1.0), (0.5, 1.0), (0.75, 1.0), (0.0, 0.25), (0.0, 0.5), (0.0, 0.75))
"""Start and end of service of the open loops, as shares of the episode."""
PERIODS = (10, 20)
"""Env steps in service, and then out of service, of the open loops that alternate."""
RESAMPLES = 4000
"""Resamples of the bootstrap."""
Make = Callable[[], Policy]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Measure how much adaptation is worth in an environment."""

    env_id: str
    """Environment id."""
    env: EnvConfig = field(default_factory=lambda: TRAINING)
    """Settings of the environment, except for the set of instances."""
    plans: tuple[str, ...] = ()
    """Plans or schedules of the open loops; by default a grid of them."""
    repeats: int = 4
    """Episodes per test instance."""
    seed: int = 1_000_000
    """First reset seed of the evaluation."""
    agent_seeds: tuple[int, ...] = ()
    """Seeds of agents to train and compare."""
    agents_from: Path | None = None
    """Result of `learning.py` whose agents' episodes are compared instead of training agents."""
    total_timesteps: int = ppo_lstm.Args().total_timesteps
    """Env steps of one agent, and of each search."""
    jobs: int = 2
    """Agents that train in parallel, with one thread each."""
    work_dir: Path = Path("runs/adaptivity")
    """Directory of finished parts."""
    quick: bool = False
    """Whether to use the smallest sizes, as a test of the script."""
    out: Path | None = None
    """JSON file for the result."""

    def __post_init__(self) -> None:
        """Complete the settings of the environment."""
        object.__setattr__(self, "env", settings_of(self.env_id, self.env))
        if not self.plans:
            has_regimes, most = TASKS[self.env.task].regimes is not None, self.env.max_seeds
            grid = PLANS if has_regimes else learning.GRID
            grid = tuple(text for text in grid if most is None or text.count("@") <= most)
            object.__setattr__(self, "plans", grid)
        if self.repeats < 2 or self.repeats % 2:
            raise ValueError(f"repeats: expected an even number of at least 2, got {self.repeats}")
        if self.agents_from is not None and self.agent_seeds:
            raise ValueError(
                f"agents_from: expected no agent_seeds beside it, got {self.agent_seeds}; train "
                "agents or take those of a result"
            )


def open_loops(plans: dict[str, Plan], steps: int) -> dict[str, Make]:
    """Return never-grow and all plans with all times of service, by name."""
    found: dict[str, Make] = {"never": NeverGrow}
    for (name, plan), (start, stop) in itertools.product(plans.items(), SHARES):
        begin, end = round(start * steps), None if stop == 1 else round(stop * steps)
        text = name if (start, stop) == (0, 1) else f"{name} from {begin} to {end or steps}"
        found[text] = partial(OpenLoop, plan, begin, end)
    for (name, plan), period in itertools.product(plans.items(), PERIODS):
        found[f"{name} every other {period}"] = partial(OpenLoop, plan, period=period)
    return found


def oracles(plans: dict[str, Plan], kinds: int) -> dict[str, Make]:
    """Return policies in service in one kind of problem, by name."""
    return {
        f"{name} in regime {k}": partial(Oracle, plan, [k])
        for name, plan in plans.items()
        for k in range(kinds)
    }


def rules(plans: dict[str, Plan]) -> dict[str, Make]:
    """Return rules that remember past accuracies or their own decision, by name."""
    found: dict[str, Make] = {}
    for name, plan in plans.items():
        for below, at in itertools.product((0.3, 0.4, 0.5, 0.6), (1, 2, 4)):
            found[f"{name} if below {below} at {at}"] = partial(Threshold, plan, below, at)
            found[f"{name}, after {at} only if below {below}"] = partial(
                Threshold, plan, below, at, begins=True
            )
        for drop, window, wait in itertools.product((0.1, 0.2, 0.3), (2, 4), (1, 3)):
            options = {"drop": drop, "window": window, "wait": wait}
            found[f"{name} toggled {options}"] = partial(Toggle, plan, **options)
    return found


def memoryless_rules(plans: dict[str, Plan]) -> dict[str, Make]:
    """Return rules that see only the current accuracy and their seeds, by name."""
    found: dict[str, Make] = {}
    for (name, plan), below in itertools.product(plans.items(), (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)):
        found[f"{name} while below {below}"] = partial(Threshold, plan, below)
        found[f"{name} toggled below {below}"] = partial(Toggle, plan, below=below)
    return found


def interval(difference: FloatArray, rng: np.random.Generator) -> dict[str, float]:
    """Return the mean of paired differences with a 95 % bootstrap interval.

    Agents, instances, and episodes within each instance are resampled.

    Args:
        difference: (agent seeds, instances, repeats).
        rng: Random generator of the bootstrap.
    """
    agents, instances, repeats = difference.shape
    means = np.empty(RESAMPLES)
    for k in range(RESAMPLES):
        agent = rng.integers(agents, size=agents)[:, None, None]
        instance = rng.integers(instances, size=instances)[:, None]
        repeat = rng.integers(repeats, size=(instances, repeats))
        means[k] = difference[agent, instance, repeat].mean()
    low, high = np.percentile(means, [2.5, 97.5])
    return {"difference": float(difference.mean()), "low": float(low), "high": float(high)}


@dataclass(frozen=True)
class Candidates:
    """Policies of the arms, by name."""

    loops: dict[str, Make]
    """Open loops."""
    constants: list[str]
    """Names of those that grow at once and change nothing later."""
    searched: dict[str, dict[str, Make]]
    """Candidates of each arm that is tuned on training instances."""


def candidates_of(args: Args) -> Candidates:
    """Return the policies that make sense in an environment."""
    envs = make_envs(args.env_id, 1, "cpu", args.env)
    envs.close()
    steps = args.env.episode_steps
    plans = {text: parse_plan(text) for text in args.plans}
    if envs.num_regimes:
        searched = {
            "oracle": oracles(plans, envs.num_regimes),
            "rule": rules(plans),
            "memoryless_rule": memoryless_rules(plans),
        }
        return Candidates(open_loops(plans, steps), list(plans), searched)
    # A schedule cannot germinate after the end of a short episode.
    plans = {text: plan for text, plan in plans.items() if all(at < steps for *_, at in plan)}
    loops: dict[str, Make] = {"never": NeverGrow}
    loops |= {text: partial(FixedSchedule, plan) for text, plan in plans.items() if plan}
    constants = [text for text in loops if text != "never" and ":" not in text]
    blueprints, count = learning.blueprints_of(envs), learning.Args.num_heuristics
    # Without patience and trial a heuristic uses nothing from before this env step.
    forgets = {"patience": 0, "trial_steps": 1}
    searched = {
        "rule": learning.heuristics(blueprints, count),
        "memoryless_rule": learning.heuristics(blueprints, count, forgets),
    }
    return Candidates(loops, constants, searched)


def halves(repeats: int) -> tuple[tuple[slice, slice], ...]:
    """Return the repeats to choose on and those to judge by: both halves, in both directions."""
    half = repeats // 2
    return (np.s_[:half], np.s_[half:]), (np.s_[half:], np.s_[:half])


def best_of_each(scores: FloatArray) -> FloatArray:
    """Return the scores of each instance's best policy, chosen on the other half of the repeats.

    Args:
        scores: Scores of all episodes. (policies, instances, repeats).

    Returns:
        (instances, repeats).
    """
    result = np.empty(scores.shape[1:])
    for chosen, held in halves(scores.shape[2]):
        best = scores[:, :, chosen].mean(axis=2).argmax(axis=0)
        result[:, held] = scores[best, np.arange(scores.shape[1])][:, held]
    return result


def run_arms(args: Args) -> dict[str, Any]:
    """Search, train, evaluate all arms on the test instances, and compare them."""
    candidates = candidates_of(args)
    budget = learning.Args(env_id=args.env_id, env=args.env, total_timesteps=args.total_timesteps)
    cheap = budget
    if TASKS[args.env.task].regimes is not None:
        # Policies in service need no contributions. Without them scores are the same, and sooner.
        env = dataclasses.replace(args.env, attribution="none")
        cheap = dataclasses.replace(budget, env=env)

    def episodes(name: str, make: Make, env: EnvConfig = cheap.env) -> Episodes:
        held_out = dataclasses.replace(env, instances="test")
        play_all = partial(play, make(), args.env_id, held_out, args.repeats, args.seed)
        result: Episodes = learning.remember(args.work_dir / f"arm-{name}.json", play_all)
        return result

    # All open loops, on the test instances: the best of them is favoured.
    played = {
        name: episodes(f"loop-{k}", candidates.loops[name])
        for k, name in enumerate(progress(list(candidates.loops), "open loops"))
    }
    scores = {name: float(np.mean(run["committed_score"])) for name, run in played.items()}
    found = {
        "constant": max(candidates.constants, key=scores.__getitem__),
        "open_loop": max(scores, key=scores.__getitem__),
    }
    tables = {arm: table_of([played[name]]) for arm, name in {"never": "never", **found}.items()}
    every_loop = np.concatenate([table_of([run]) for run in played.values()])
    tables["open_loop of each instance"] = best_of_each(every_loop)[None]
    searches = {}
    for arm, makes in candidates.searched.items():
        search = partial(learning.halve, makes, cheap)
        searches[arm] = learning.remember(args.work_dir / f"search-{arm}.json", search)
        found[arm] = searches[arm]["best"]
        tables[arm] = table_of([episodes(arm, makes[found[arm]])])
    runs = [
        learning.agent_args(budget, seed, args.work_dir / "agents") for seed in args.agent_seeds
    ]
    learning.train_agents(runs, args.jobs)
    if runs:
        makes = {run.seed: partial(ppo_lstm.TrainedPolicy, run.run_dir) for run in runs}
        played_by = [episodes(f"ppo-{k}", make, args.env) for k, make in makes.items()]
        tables["ppo_lstm"] = table_of(played_by)
    if args.agents_from is not None:
        tables["ppo_lstm"] = table_of(episodes_of(args.agents_from, played["never"]))
    return {
        "scores": {name: float(table.mean()) for name, table in tables.items()},
        "found": found,
        "paired": paired_differences(tables, np.random.default_rng(args.seed)),
        "open_loops": scores,
        "searches": searches,
        "committed_scores": {name: np.round(table, 6).tolist() for name, table in tables.items()},
    }


def episodes_of(path: Path, expected: Episodes) -> list[Episodes]:
    """Return the episodes of the agents in a result of `learning.py`.

    Args:
        path: JSON file.
        expected: Episodes that have the same reset seeds and instances.

    Raises:
        ValueError: If the reset seeds or instances are others.
    """
    runs: list[Episodes] = json.loads(path.read_text())["arms"]["ppo_lstm"]["episodes"]
    for name in ("seed", "instance"):
        if any(run[name] != expected[name] for run in runs):
            raise ValueError(
                f"agents_from: expected the same {name} of every episode in {path}; set repeats "
                "and seed as there"
            )
    return runs


def paired_differences(
    tables: dict[str, FloatArray], rng: np.random.Generator
) -> dict[str, dict[str, float]]:
    """Return the paired differences of arms.

    Args:
        tables: Scores by arm. (agent seeds, instances, repeats) each.
        rng: Random generator of the bootstrap.
    """
    pairs = [(name, "open_loop") for name in tables if name != "open_loop"]
    if "ppo_lstm" in tables:
        pairs.append(("ppo_lstm", "rule"))
    return {f"{a} - {b}": interval(tables[a] - tables[b], rng) for a, b in pairs}


def main() -> None:
    """Parse the command line, run missing parts, print the comparison, and save."""
    args = command_line.parse(Args)
    if args.quick:
        args = dataclasses.replace(
            args,
            env=learning.smallest(args.env),
            plans=args.plans[1:2],
            repeats=2,
            agent_seeds=args.agent_seeds[:1],
            total_timesteps=ppo_lstm.Args().batch_size,
        )
    with only_user(args.work_dir):
        began = time.perf_counter()
        free = {"out", "work_dir", "jobs", "agent_seeds", "agents_from"}
        learning.check_work_dir(args.work_dir, dataclasses.asdict(args), free)
        result = run_arms(args)
    for name, score in result["scores"].items():
        print(f"{name:26s} {score:.4f}  {result['found'].get(name, '')}")
    for name, pair in result["paired"].items():
        print(f"{name:40s} {pair['difference']:+.4f} ({pair['low']:+.4f} .. {pair['high']:+.4f})")
    write_result(args.out, args, indent=None, seconds=time.perf_counter() - began, **result)


if __name__ == "__main__":
    main()
