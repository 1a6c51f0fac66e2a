"""Ablations of the agent: variants that differ from the default in one setting.

Agents train on training instances. Each variant is compared with the default on the same held-out
episodes, and agent seed k of a variant is paired with agent seed k of the default. The working
directory keeps finished agents, so a second call continues an interrupted one.

    python benchmarks/ablations.py --out benchmarks/results/ablations.json
    python benchmarks/ablations.py --env-id Esper-Digits-Contexts-v0 --total-timesteps 207360 \
        --variants "no memory" "minimal observation, no memory" "PRUNE and FOSSILIZE" \
        --out benchmarks/results/ablations-contexts.json
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import write_result
from benchmarks.adaptivity import interval
from benchmarks.learning import check_work_dir, remember, smallest, train_agents
from benchmarks.processes import only_user
from benchmarks.protocol import Episodes, compare, play, summarize, table_of
from esper_agent import command_line, ppo_lstm
from esper_agent.envs import TRAINING, settings_of
from esper_agent.telemetry.display import progress
from esper_env import EnvConfig, Op
from esper_env.config import FloatArray

DEFAULT = "default"
SAMPLED = "actions drawn when judged"
MINIMAL: dict[str, Any] = {"env.observation": "minimal", "env.attribution": "none"}
"""Without attribution a step costs less, and a minimal observation does not show it."""
VARIANTS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    SAMPLED: {},
    "reward: gain + PBRS": {"env.reward_weights": {"pbrs": 0.1}},
    "reward: committed score at the end only": {"env.reward": "sparse"},
    "horizon: truncated, bootstrapped": {"env.horizon": "truncate"},
    "no memory": {"recurrent": False},
    "all heads": {"env.heads": {}},
    "half the env steps": {"total_timesteps": 0.5},
    "no group baseline": {"group_size": 1},
    "twice the value weight": {"vf_coef": 1.0},
    "half the width": {"hidden_size": 64},
    "minimal observation": MINIMAL,
    "minimal observation, no memory": {**MINIMAL, "recurrent": False},
    "PRUNE and FOSSILIZE": {
        "env.heads": {**TRAINING.heads, "op": [op.name for op in Op], "alpha_target": [0.0, 1.0]}
    },
}
"""Changes of `ppo_lstm.Args` by variant; `total_timesteps` is a factor. `SAMPLED` evaluates the
default's agents with sampled instead of greedy actions. The last one needs parking."""
OF_REGIMES = ("minimal observation", "minimal observation, no memory", "PRUNE and FOSSILIZE")
"""Variants for environments with regimes; not among the default ones."""
BASES = {"minimal observation, no memory": "minimal observation"}
"""Variants that are compared with another one than the default."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Train agents with one changed setting each, and compare them with the default."""

    variants: tuple[str, ...] = tuple(name for name in VARIANTS if name not in OF_REGIMES)
    """Variants to train; what they are compared with is always included."""
    env_id: str = "Esper-Digits-v0"
    """Environment id."""
    env: EnvConfig = field(default_factory=lambda: TRAINING)
    """Settings of the environment, before a variant changes them."""
    agent_seeds: tuple[int, ...] = (101, 102, 103, 104, 105)
    """Seeds of the agents, different from those of `learning.py`."""
    total_timesteps: int = 96_000
    """Env steps per agent; half of the agent's default, so that all variants take two hours."""
    repeats: int = 8
    """Evaluation episodes per held-out instance."""
    seed: int = 1_000_000
    """First reset seed of the evaluation."""
    jobs: int = 2
    """Agents that train in parallel, with one thread each."""
    work_dir: Path = Path("runs/ablations")
    """Directory of finished agents and evaluations."""
    quick: bool = False
    """Whether to use the smallest sizes, as a test of the script."""
    out: Path | None = None
    """JSON file for the result."""

    def __post_init__(self) -> None:
        """Complete the settings of the environment."""
        object.__setattr__(self, "env", settings_of(self.env_id, self.env))


def quick(args: Args) -> Args:
    """Return the arguments with the smallest sizes."""
    return dataclasses.replace(
        args,
        env=smallest(args.env),
        agent_seeds=args.agent_seeds[:2],
        total_timesteps=2 * ppo_lstm.Args().batch_size,
        repeats=1,
    )


def agent_args(args: Args, variant: str, seed: int) -> ppo_lstm.Args:
    """Return the arguments of one agent of a variant."""
    changes = dict(VARIANTS[variant])
    env = {key.removeprefix("env."): changes.pop(key) for key in list(changes) if "." in key}
    factor = changes.pop("total_timesteps", 1)
    return ppo_lstm.Args(
        env_id=args.env_id,
        env=dataclasses.replace(args.env, **env),
        seed=seed,
        total_timesteps=int(factor * args.total_timesteps),
        run_dir=args.work_dir / _slug(DEFAULT if variant == SAMPLED else variant) / str(seed),
        eval_episodes=0,
        **changes,
    )


def _slug(variant: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in variant)


def evaluate(variant: str, run: ppo_lstm.Args, args: Args) -> Episodes:
    """Run a trained agent on the held-out instances, in the environment it was trained with."""
    held_out = dataclasses.replace(run.env, instances="test")
    assert run.run_dir is not None
    policy = ppo_lstm.TrainedPolicy(run.run_dir, samples=variant == SAMPLED)
    return play(policy, run.env_id, held_out, args.repeats, args.seed)


def main() -> None:
    """Parse the command line, and run."""
    args = command_line.parse(Args)
    args = quick(args) if args.quick else args
    unknown = set(args.variants) - set(VARIANTS)
    if unknown:
        raise ValueError(f"variants: expected names among {list(VARIANTS)}, got {sorted(unknown)}")
    with only_user(args.work_dir):
        run(args)


def run(args: Args) -> None:
    """Train and evaluate missing agents, print a line per variant, and save."""
    free = {"out", "work_dir", "jobs", "variants", "agent_seeds"}
    check_work_dir(args.work_dir, dataclasses.asdict(args), free)
    rng = np.random.default_rng(args.seed)
    variants: dict[str, Any] = {}
    # What others are paired with comes first. `SAMPLED` uses the default's agents.
    bases = [BASES[name] for name in args.variants if name in BASES]
    names = dict.fromkeys((DEFAULT, *bases, *args.variants))
    tables: dict[str, FloatArray] = {}
    runs_of = {name: [agent_args(args, name, seed) for seed in args.agent_seeds] for name in names}
    trained = [run for name, runs in runs_of.items() if name != SAMPLED for run in runs]
    train_agents(trained, args.jobs)
    for name, runs in runs_of.items():
        episodes = [
            remember(
                args.work_dir / _slug(name) / f"{run.seed}.json", partial(evaluate, name, run, args)
            )
            for run in progress(runs, f"{name}: evaluations")
        ]
        table = tables[name] = table_of(episodes)
        base = BASES.get(name, DEFAULT)
        variants[name] = {
            "changes": VARIANTS[name],
            "compared_with": base,
            "summary": summarize(table, rng),
            "parameters_mean": float(np.mean([run["parameters"] for run in episodes])),
            "score_of_each_agent": table.mean(axis=(1, 2)).tolist(),
        }
        pair = compare(table, tables[base], rng)
        variants[name]["paired"] = pair
        variants[name]["mean_difference"] = interval(table - tables[base], rng)
        print(
            f"{name:42s} {variants[name]['summary']['iqm']:.4f}  minus {base} "
            f"{pair['difference']:+.4f} ({pair['low']:+.4f} .. {pair['high']:+.4f})",
            flush=True,
        )
    write_result(args.out, args, variants=variants)


if __name__ == "__main__":
    main()
