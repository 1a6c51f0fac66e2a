"""Does an environment need an agent that adapts? Fixed plans, an oracle, signal rules and agents.

Seeds of a *plan* are in service or not. An open loop switches them at fixed env steps. An oracle
sees the regime. A signal rule sees the validation accuracy, with or without memory. Oracle and
rules are tuned on training instances. The best open loop is chosen on the test instances
themselves, which favours it. The differences from it are paired: all arms have the same instances
and reset seeds.

    python benchmarks/adaptivity.py --env-id Esper-Digits-Sizing-v0 \
        --out benchmarks/results/adaptivity-sizing.json
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import learning, write_result
from benchmarks.headroom import best_of_each, halves
from benchmarks.processes import only_user
from benchmarks.protocol import Episodes, play, table_of
from esper_agent import command_line, ppo_lstm
from esper_agent.baselines import (
    NeverGrow,
    OpenLoop,
    Oracle,
    Plan,
    Policy,
    Threshold,
    Toggle,
    parse_plan,
)
from esper_agent.envs import TRAINING, make_envs, settings_of
from esper_agent.telemetry.display import progress
from esper_env import EnvConfig
from esper_env.config import FloatArray

PLANS = (
    *("conv_heavy@0+conv_heavy@1", "conv_heavy@0", "conv_heavy@1"),
    *("conv_light@0+conv_light@1", "conv_light@0", "conv_light@1"),
    *("conv_small@0+conv_small@1", "conv_small@1", "norm@0+norm@1"),
)
"""Seeds that are in service together, in the format of `parse_plan`."""
SHARES = ((0.0, 1.0), (0.25, 1.0), (0.5, 1.0), (0.75, 1.0), (0.0, 0.25), (0.0, 0.5), (0.0, 0.75))
"""Start and end of service of the open loops, as shares of the episode."""
RESAMPLES = 4000
"""Resamples of the bootstrap."""

Make = Callable[[], Policy]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Measure how much adaptation is worth in an environment with regimes."""

    env_id: str
    """Environment id, of an environment with regimes."""
    env: EnvConfig = field(default_factory=lambda: TRAINING)
    """Settings of the environment, except for the set of instances."""
    plans: tuple[str, ...] = PLANS
    """Plans of all arms."""
    repeats: int = 8
    """Episodes per test instance."""
    seed: int = 1_000_000
    """First reset seed of the evaluation."""
    agent_seeds: tuple[int, ...] = ()
    """Seeds of agents to train and compare."""
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


def open_loops(plans: dict[str, Plan], steps: int) -> dict[str, Make]:
    """Return never-grow and all plans with all times of service, by name."""
    found: dict[str, Make] = {"never": NeverGrow}
    for (name, plan), (start, stop) in itertools.product(plans.items(), SHARES):
        begin, end = round(start * steps), None if stop == 1 else round(stop * steps)
        found[f"{name} from {begin} to {end or steps}"] = partial(OpenLoop, plan, begin, end)
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
        for below, at in itertools.product((0.2, 0.3, 0.4, 0.5, 0.6), (1, 2, 3, 5)):
            found[f"{name} if below {below} at {at}"] = partial(Threshold, plan, below, at)
        for drop, window, wait in itertools.product((0.1, 0.15, 0.2, 0.3), (2, 4), (1, 3)):
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


def run_arms(args: Args) -> dict[str, Any]:
    """Search, evaluate all arms on the test instances, and compare them."""
    held_out = dataclasses.replace(args.env, instances="test")
    budget = learning.Args(env_id=args.env_id, env=args.env, total_timesteps=args.total_timesteps)
    plans = {text: parse_plan(text) for text in args.plans}
    envs = make_envs(args.env_id, 1, "cpu", args.env)
    kinds = envs.num_regimes
    envs.close()
    if not kinds:
        raise ValueError(f"env_id: expected an id with regimes, got {args.env_id}")

    def episodes(make: Make) -> Episodes:
        return play(make(), args.env_id, held_out, args.repeats, args.seed)

    # All open loops, on the test instances: the best of them is favoured.
    loops = open_loops(plans, args.env.episode_steps)
    played = {}
    for k, name in enumerate(progress(list(loops), "open loops")):
        path = args.work_dir / f"loop-{k}.json"
        played[name] = learning.remember(path, partial(episodes, loops[name]))
    scores = {name: float(np.mean(run["committed_score"])) for name, run in played.items()}
    constants = [name for name in loops if name.endswith(f"from 0 to {args.env.episode_steps}")]
    arms: dict[str, list[Episodes]] = {"never": [played["never"]]}
    found = {
        "constant": max(constants, key=scores.__getitem__),
        "open_loop": max(scores, key=scores.__getitem__),
    }
    arms |= {arm: [played[name]] for arm, name in found.items()}

    families = {
        "oracle": oracles(plans, kinds),
        "rule": rules(plans),
        "memoryless_rule": memoryless_rules(plans),
    }
    for arm, candidates in families.items():
        search = partial(learning.halve, candidates, budget)
        found[arm] = learning.remember(args.work_dir / f"search-{arm}.json", search)["best"]
        path = args.work_dir / f"arm-{arm}.json"
        arms[arm] = [learning.remember(path, partial(episodes, candidates[found[arm]]))]
    if args.agent_seeds:
        runs = [
            learning.agent_args(budget, seed, args.work_dir / "agents") for seed in args.agent_seeds
        ]
        learning.train_agents(runs, args.jobs)
        arms["ppo_lstm"] = []
        for run in runs:
            agent = partial(episodes, partial(ppo_lstm.TrainedPolicy, run.run_dir))
            path = args.work_dir / f"arm-ppo_lstm-{run.seed}.json"
            arms["ppo_lstm"].append(learning.remember(path, agent))
    rng = np.random.default_rng(args.seed)
    tables = {name: table_of(runs) for name, runs in arms.items()}
    # The best open loop of each instance, chosen on half of its episodes and judged on the others.
    everything = np.concatenate([table_of([run]) for run in played.values()])
    parts = [
        best_of_each(everything, chosen, held) - tables["open_loop"][0][:, held]
        for chosen, held in halves(args.repeats)
    ]
    paired = {
        f"{name} - open_loop": interval(table - tables["open_loop"], rng)
        for name, table in tables.items()
        if name != "open_loop"
    }
    paired["open loop of each instance - open_loop"] = interval(
        np.concatenate(parts, axis=1)[None], rng
    )
    if "ppo_lstm" in tables:
        paired["ppo_lstm - rule"] = interval(tables["ppo_lstm"] - tables["rule"], rng)
    return {
        "scores": {name: float(table.mean()) for name, table in tables.items()},
        "found": found,
        "paired": paired,
        "open_loops": scores,
        "committed_scores": {name: table.tolist() for name, table in tables.items()},
    }


def main() -> None:
    """Parse the command line, run missing parts, print the comparison, and save."""
    args = command_line.parse(Args)
    if args.quick:
        args = dataclasses.replace(
            args,
            env=learning.smallest(args.env),
            plans=args.plans[:1],
            repeats=2,
            agent_seeds=args.agent_seeds[:1],
            total_timesteps=ppo_lstm.Args().batch_size,
        )
    with only_user(args.work_dir):
        began = time.perf_counter()
        free = {"out", "work_dir", "jobs", "agent_seeds"}
        learning.check_work_dir(args.work_dir, dataclasses.asdict(args), free)
        result = run_arms(args)
    for name, score in result["scores"].items():
        print(f"{name:16s} {score:.4f}  {result['found'].get(name, '')}")
    for name, pair in result["paired"].items():
        print(f"{name:40s} {pair['difference']:+.4f} ({pair['low']:+.4f} .. {pair['high']:+.4f})")
    write_result(args.out, args, indent=None, seconds=time.perf_counter() - began, **result)


if __name__ == "__main__":
    main()
