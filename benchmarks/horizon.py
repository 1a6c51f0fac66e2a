"""Does the agent learn with the end of the budget reported as truncated or as terminated?

Trains short runs of the default agent with both horizons and several seeds, two at a time with one
thread each, and writes the learning curves and final evaluations. Evidence for the default of
`esper_agent.ppo_lstm`.

    python benchmarks/horizon.py --out benchmarks/results/horizon.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks import write_result

HORIZONS = ("truncate", "terminal")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Compare the horizons."""

    seeds: tuple[int, ...] = (11, 12, 13)
    """Agent seeds; not those of other benchmarks."""
    total_timesteps: int = 48_000
    """Env steps per run."""
    eval_episodes: int = 64
    """Episodes of the final evaluation."""
    out: Path | None = None
    """Where to write the result as JSON."""


def run(args: Args, horizon: str, seed: int, directory: Path) -> dict[str, Any]:
    """Train one agent in a process of its own and summarise it."""
    command = [sys.executable, "-m", "esper_agent.ppo_lstm", "--run-dir", str(directory)]
    command += ["--env.horizon", horizon, "--seed", str(seed)]
    command += ["--total-timesteps", str(args.total_timesteps)]
    command += ["--eval-episodes", str(args.eval_episodes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    evaluation = json.loads((directory / "evaluation.json").read_text())
    return {
        "horizon": horizon,
        "seed": seed,
        "training": evaluation["training"],
        "curve": [json.loads(line)["charts/episode_score"] for line in lines],
        "agents": {
            name.split(":")[0]: record["summary"] for name, record in evaluation["agents"].items()
        },
    }


def main() -> None:
    """Run everything, print a line per run, and save."""
    args = tyro.cli(Args)
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(run, args, horizon, seed, Path(work) / f"{horizon}-{seed}")
            for seed in args.seeds
            for horizon in HORIZONS
        ]
        rows = [job.result() for job in jobs]
    for row in rows:
        ppo, training = row["agents"]["ppo"], row["training"]
        print(
            f"{row['horizon']:9s} seed {row['seed']}: score {training['score_first_tenth']:.4f} -> "
            f"{training['score_last_tenth']:.4f}, evaluated IQM {ppo['iqm']:.4f} with "
            f"{ppo['parameters_mean']:.0f} parameters; never-grow "
            f"{row['agents']['never-grow']['iqm']:.4f}"
        )
    write_result(args.out, args, runs=rows)


if __name__ == "__main__":
    main()
