"""Comparison of the agent with baselines, tuned schedules and static networks, in one command.

Agents and searches use training instances only. Every arm then runs on the same held-out instances
and reset seeds. Each search gets as many env steps as one agent. The working directory keeps
finished parts, so a second call continues an interrupted one. Two calls cannot share it.

    python benchmarks/learning.py --out benchmarks/results/learning-digits.json
    python benchmarks/learning.py --quick

Arms:
    never_grow, random, periodic, heuristic   baselines with their default settings
    tuned_heuristic   the plateau heuristic, tuned by random search with successive halving
    best_schedule     the best fixed schedule, found by successive halving
    ppo_lstm          the agent, once per agent seed
    static_grown      the final network of each agent's episode, trained from scratch (`references`)
    static_longer     the host without seeds, with at least the compute of that episode
                      (`references`)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import write_result
from benchmarks.processes import only_user, process_pool
from benchmarks.protocol import compare, play, summarize, table_of
from benchmarks.references import Episodes, train_equal_compute, train_grown_size
from esper_agent import command_line, ppo_lstm
from esper_agent.baselines import BASELINES, FixedSchedule, PlateauHeuristic, Policy, parse_plan
from esper_agent.checkpoint import write_file
from esper_agent.envs import TRAINING, make_envs, settings_of
from esper_agent.evaluate import MAX_ENVS, run_episodes
from esper_agent.telemetry.display import progress
from esper_env import EnvConfig, EsperVectorEnv

SMALL = ("norm", "attention", "conv_small", "bottleneck", "depthwise", "conv_light")
GRID = (
    "",
    *(f"{blueprint}@{slot}" for blueprint in (*SMALL, "conv_heavy") for slot in (0, 1)),
    *(
        f"{first}@0+{second}@1"
        for first in ("norm", "conv_light", "conv_heavy")
        for second in ("norm", "conv_small", "conv_light", "conv_heavy")
    ),
    *(f"conv_heavy@{slot}:{step}" for slot in (0, 1) for step in (10, 20, 30)),
)
"""Schedules in the format of `parse_plan`. The first one never grows."""
SEARCH_SEED = 3_000_000
"""First reset seed of the searches, far from those of training and evaluation."""
ROUNDS, KEEP = 4, 3
"""Successive halving: rounds of equal cost. One in `KEEP` candidates survives each round."""
LEAST_EPISODES = 4
"""Episodes of a candidate in a round, at least: with fewer, one kind of problem may be missing."""
FINISHED = "finished.json"
"""Last file of a run of `ppo_lstm`."""

BASELINE_ARMS = {
    "never_grow": "never-grow",
    "random": "random",
    "periodic": "periodic",
    "heuristic": "heuristic",
}
"""Names of baselines by arm."""

Make = Callable[[], Policy]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Train the agent, search for baselines, and compare them on held-out instances."""

    env_id: str = "Esper-Digits-v0"
    """Environment id."""
    env: EnvConfig = field(default_factory=lambda: TRAINING)
    """Settings of the environment, except for the set of instances."""
    agent_seeds: tuple[int, ...] = tuple(range(1, 11))
    """Seeds of the agents."""
    total_timesteps: int = ppo_lstm.Args().total_timesteps
    """Env steps of one agent, and of each search."""
    schedules: tuple[str, ...] = GRID
    """Candidates of the search for the best fixed schedule."""
    num_heuristics: int = 96
    """Candidates of the search for the best settings of the heuristic."""
    repeats: int = 8
    """Evaluation episodes per held-out instance."""
    seed: int = 1_000_000
    """First reset seed of the evaluation."""
    jobs: int = 2
    """Agents that train in parallel, with one thread each."""
    work_dir: Path = Path("runs/learning")
    """Directory of finished parts."""
    quick: bool = False
    """Whether to use the smallest sizes, as a test of the script."""
    out: Path | None = None
    """JSON file for the result."""

    def __post_init__(self) -> None:
        """Complete the settings of the environment."""
        object.__setattr__(self, "env", settings_of(self.env_id, self.env))


def smallest(env: EnvConfig) -> EnvConfig:
    """Return settings with short episodes and little training."""
    return dataclasses.replace(env, episode_steps=8, batches_per_step=1, batch_size=8)


def quick(args: Args) -> Args:
    """Return the arguments with the smallest sizes."""
    return dataclasses.replace(
        args,
        env=smallest(args.env),
        agent_seeds=args.agent_seeds[:2],
        total_timesteps=ppo_lstm.Args().batch_size,
        schedules=args.schedules[:6],
        num_heuristics=6,
        repeats=2,
    )


def remember(path: Path, make: Callable[[], Any]) -> Any:
    """Return the content of a JSON file; if it does not exist, make the content and write it."""
    if not path.exists():
        content = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, [json.dumps(content).encode()])
    return json.loads(path.read_text())


def check_work_dir(work_dir: Path, settings: dict[str, Any], free: set[str]) -> None:
    """Check that finished parts in a working directory were made with the same settings.

    Args:
        work_dir: Directory of finished parts.
        settings: Settings of this call.
        free: Names of settings that do not affect the parts.

    Raises:
        ValueError: If another setting differs.
    """
    settings = json.loads(json.dumps(settings, default=str))
    known = remember(work_dir / "settings.json", lambda: settings)
    differing = [n for n in settings if known.get(n) != settings[n] and n not in free]
    if differing:
        raise ValueError(
            f"work_dir: expected parts made with the same settings, but {work_dir} was made with "
            f"other values of {', '.join(differing)}; choose another directory"
        )


# ------------------------------------------------------------------ searches


def halve(candidates: dict[str, Make], args: Args) -> dict[str, Any]:
    """Find the best candidate on training instances by successive halving.

    All candidates of a round run the same episodes, and every round runs new ones.

    Args:
        candidates: Function that makes each candidate, by name.
        args: Budget and environment.

    Returns:
        "best" with the name of the best candidate, and "rounds" with the number of episodes and
        the mean committed score of every candidate.

    Source: Jamieson and Talwalkar (2016), algorithm 1, with a reduction by `KEEP`.
    """
    config = dataclasses.replace(args.env, instances="train")
    budget = args.total_timesteps // config.episode_steps // ROUNDS
    names, seed, rounds = list(candidates), SEARCH_SEED, []
    for k in range(ROUNDS):
        count = max(LEAST_EPISODES, budget // len(names))
        scores = {}
        envs = make_envs(args.env_id, min(MAX_ENVS, count), "cpu", config)
        for name in progress(names, f"candidates of round {k + 1} of {ROUNDS}"):
            episodes = run_episodes(candidates[name](), envs, count, seed)
            scores[name] = float(np.mean(episodes["committed_score"]))
        envs.close()
        rounds.append({"episodes": count, "scores": scores})
        names = sorted(names, key=scores.__getitem__, reverse=True)
        names = names[: max(1, len(names) // KEEP)]
        seed += count
    return {"best": names[0], "rounds": rounds}


def _schedule(text: str) -> Make:
    return lambda: FixedSchedule(parse_plan(text))


def blueprints_of(envs: EsperVectorEnv) -> tuple[str, ...]:
    """Return the blueprints that an environment offers."""
    return next(head.options for head in envs.heads if head.name == "blueprint")


def heuristics(
    blueprints: tuple[str, ...], count: int, fixed: Mapping[str, Any] | None = None
) -> dict[str, Make]:
    """Return plateau heuristics with random settings, by their JSON text.

    Args:
        blueprints: Blueprints to choose from.
        count: Number of heuristics.
        fixed: Settings that are the same for all.
    """
    rng = np.random.default_rng(SEARCH_SEED)
    candidates = {}
    for _ in range(count):
        settings = {
            "patience": int(rng.integers(0, 16)),
            "margin": float(np.exp(rng.uniform(np.log(0.002), np.log(0.05)))),
            "blueprint": str(rng.choice(blueprints)),
            "deepest_first": bool(rng.random() < 0.5),
            "max_seeds": int(rng.integers(1, 3)),
            "min_contribution": float(rng.uniform(-0.02, 0.03)),
            "trial_steps": int(rng.integers(1, 11)),
            "steps_to_live": int(rng.integers(10, 46)),
            **(fixed or {}),
        }
        candidates[json.dumps(settings)] = _heuristic(settings)
    return candidates


def _heuristic(settings: dict[str, Any]) -> Make:
    return lambda: PlateauHeuristic(**settings)


# ------------------------------------------------------------------ agents


def train_agents(runs: list[ppo_lstm.Args], jobs: int) -> None:
    """Train agents that do not exist yet, in processes with one thread each.

    Args:
        runs: Arguments of the agents. The last file of a finished agent is `FINISHED` in its
            `run_dir`.
        jobs: Number of parallel processes.
    """
    missing = [run for run in runs if not (_directory(run) / FINISHED).exists()]
    if not missing:
        return
    with process_pool(jobs) as pool:
        trained = pool.map(_train, missing)
        for run in progress(trained, f"agents, {jobs} at a time", len(missing)):
            print(f"trained {run}", flush=True)


def _directory(run: ppo_lstm.Args) -> Path:
    assert run.run_dir is not None
    return run.run_dir


def _train(run: ppo_lstm.Args) -> Path:
    """Train one agent, or continue it if it was interrupted, with its output in a file."""
    directory = _directory(run)
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / "config.json").exists():
        run = ppo_lstm.load_args(directory)
    with (directory / "output.txt").open("a") as file, contextlib.redirect_stdout(file):
        return ppo_lstm.train(run)


def agent_args(args: Args, seed: int, directory: Path) -> ppo_lstm.Args:
    """Return the arguments of the agent with a given seed."""
    return ppo_lstm.Args(
        env_id=args.env_id,
        env=dataclasses.replace(args.env, instances="train"),
        seed=seed,
        total_timesteps=args.total_timesteps,
        run_dir=directory / str(seed),
        eval_episodes=0,
    )


# ------------------------------------------------------------------ arms


def run_arms(args: Args) -> dict[str, list[Episodes]]:
    """Search, train and evaluate.

    Returns:
        Episodes of every arm, one entry per agent seed.
    """
    held_out = dataclasses.replace(args.env, instances="test")
    directory = args.work_dir

    def episodes(name: str, make: Callable[[], list[Episodes]]) -> list[Episodes]:
        runs: list[Episodes] = remember(directory / f"arm-{name}.json", make)
        print(f"{name:16s} {np.mean([run['committed_score'] for run in runs]):.4f}", flush=True)
        return runs

    def of_policy(make: Callable[[], Policy]) -> list[Episodes]:
        return [play(make(), args.env_id, held_out, args.repeats, args.seed)]

    arms = {}
    for arm, name in BASELINE_ARMS.items():
        arms[arm] = episodes(arm, partial(of_policy, BASELINES[name]))
    found = search(args)
    heuristic = _heuristic(json.loads(found["heuristic"]["best"]))
    schedule = _schedule(found["schedule"]["best"])
    arms["tuned_heuristic"] = episodes("tuned_heuristic", partial(of_policy, heuristic))
    arms["best_schedule"] = episodes("best_schedule", partial(of_policy, schedule))

    runs = [agent_args(args, seed, directory / "agents") for seed in args.agent_seeds]
    train_agents(runs, args.jobs)
    arms["ppo_lstm"] = []
    # One file per agent seed, so that an interrupted call repeats one evaluation at most.
    for run in runs:
        arm = partial(of_policy, partial(ppo_lstm.TrainedPolicy, _directory(run)))
        arms["ppo_lstm"] += episodes(f"ppo_lstm-{run.seed}", arm)
    grown = arms["ppo_lstm"]
    arms["static_grown"] = episodes(
        "static_grown", lambda: [train_grown_size(run, args.env_id, held_out) for run in grown]
    )
    arms["static_longer"] = episodes(
        "static_longer", lambda: train_equal_compute(grown, args.env_id, held_out)
    )
    return arms


def search(args: Args) -> dict[str, Any]:
    """Search for the best schedule and settings of the heuristic on the training instances."""
    envs = make_envs(args.env_id, 1, "cpu", args.env)
    candidates = {
        "schedule": {text: _schedule(text) for text in args.schedules},
        "heuristic": heuristics(blueprints_of(envs), args.num_heuristics),
    }
    return {
        name: remember(args.work_dir / f"search-{name}.json", partial(halve, makes, args))
        for name, makes in candidates.items()
    }


def main() -> None:
    """Parse the command line, and run."""
    args = command_line.parse(Args)
    args = quick(args) if args.quick else args
    with only_user(args.work_dir):
        run(args)


def run(args: Args) -> None:
    """Run missing parts in a working directory that is locked, print the comparison, and save."""
    began = time.perf_counter()
    check_work_dir(args.work_dir, dataclasses.asdict(args), {"out", "work_dir", "jobs"})
    arms = run_arms(args)
    rng = np.random.default_rng(args.seed)
    tables = {name: table_of(runs) for name, runs in arms.items()}
    summaries = {name: summarize(table, rng) for name, table in tables.items()}
    paired = {
        f"ppo_lstm - {name}": compare(tables["ppo_lstm"], table, rng)
        for name, table in tables.items()
        if name != "ppo_lstm"
    }
    for name, pair in paired.items():
        print(
            f"{name:30s} {pair['difference']:+.4f} ({pair['low']:+.4f} .. {pair['high']:+.4f})  "
            f"better in {100 * pair['probability_of_improvement']:.0f} %"
        )
    write_result(
        args.out,
        args,
        indent=None,
        seconds=time.perf_counter() - began,
        search=search(args),
        arms={name: {"summary": summaries[name], "episodes": runs} for name, runs in arms.items()},
        paired=paired,
    )


if __name__ == "__main__":
    main()
