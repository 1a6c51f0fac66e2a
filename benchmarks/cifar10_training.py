"""Time and memory of a training on `Esper-CIFAR10-v0`, extrapolated from its first env steps.

    python -m benchmarks.cifar10_training --out benchmarks/results/cifar10-training.json

The script runs the training script's own loop, on random images in the number and shape of
CIFAR-10's, for one rollout of a few env steps and its update. A whole episode has 150 steps. The
agent is untrained, so it grows at random.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from benchmarks import use_synthetic_cifar10, write_result
from esper_agent import ppo_lstm

ENV_ID, TRAINING_IMAGES = "Esper-CIFAR10-v0", 48_000


@dataclass(frozen=True, kw_only=True)
class Args:
    """Measure the first env steps of a training."""

    steps: int = 30
    """Env steps of each sub-environment that are measured."""
    num_envs: int = 16
    """Sub-environments."""
    threads: int = 2
    """Torch threads."""
    images: int = TRAINING_IMAGES
    """Training images."""
    out: Path | None = None
    """JSON file for the result."""


def measure(args: Args) -> dict[str, float]:
    """Train for one rollout; return times [seconds], memory, and hours of a whole training."""
    torch.set_num_threads(args.threads)
    use_synthetic_cifar10(args.images)
    size = min(4, args.num_envs)
    run = ppo_lstm.Args(
        env_id=ENV_ID,
        num_envs=args.num_envs,
        num_steps=args.steps,
        group_size=size,
        num_minibatches=size,
        total_timesteps=args.num_envs * args.steps,
        quiet=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        envs, state, directory = ppo_lstm.begin(
            dataclasses.replace(run, run_dir=Path(folder, "run"))
        )
        with directory:
            began = time.perf_counter()
            ppo_lstm.run_iteration(state, envs, run)
            seconds = time.perf_counter() - began
        envs.close()
    total = ppo_lstm.Args().total_timesteps
    return {
        "seconds_per_step": state.env_seconds / args.steps,
        "share_of_env": state.env_seconds / seconds,
        "env_steps": total,
        "hours": seconds / run.total_timesteps * total / 3600,
        # Linux counts in KiB.
        "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def main() -> None:
    """Measure, print and save."""
    args = tyro.cli(Args)
    result = measure(args)
    print(json.dumps(result))
    write_result(args.out, args, result=result)


if __name__ == "__main__":
    main()
