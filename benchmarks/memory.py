"""Test that the environment's memory stays constant over many episodes with rollbacks.

The script plays random legal actions in mixed instances. At regular intervals it sets a weight of a
random member to NaN, which causes a rollback. It compares the resident set size after the first
episodes with that after the last.

    python benchmarks/memory.py --out benchmarks/results/memory.json
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import tyro

from benchmarks import write_result
from esper_env import EsperVectorEnv

LIMIT = 0.03
"""Largest accepted change of the resident set size, as a fraction."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Measure the memory of an environment over many episodes."""

    env_id: str = "Esper-Digits-v0"
    """Environment id; the script reduces its batches."""
    num_envs: int = 16
    """Number of members."""
    episodes: int = 300
    """Episodes of each member."""
    warm_up_episodes: int = 50
    """Episodes before the reference measurement."""
    episode_steps: int = 12
    """Length of an episode [env steps]."""
    poison_interval_steps: int = 5
    """Time between two NaN weights [env steps]."""
    seed: int = 0
    """Random seed of the environment and of the actions."""
    out: Path | None = None
    """JSON file for the result."""


def resident_bytes() -> int:
    """Return the resident set size of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run(args: Args) -> dict[str, Any]:
    """Play all episodes, and return the resident set size after every tenth."""
    envs = gym.make_vec(
        args.env_id,
        num_envs=args.num_envs,
        instances="train",
        autoreset_mode="SameStep",
        batches_per_step=1,
        batch_size=4,
        episode_steps=args.episode_steps,
        max_rollbacks=1_000,
        snapshot_interval=2,
    ).unwrapped
    assert isinstance(envs, EsperVectorEnv)
    rng = np.random.default_rng(args.seed)
    envs.reset(seed=args.seed)
    # The governor rolls back a member with a weight that is not finite.
    storage = envs.debug_state().population.storage
    num_rollbacks, curve = 0, []
    for episode in range(1, args.episodes + 1):
        for step in range(args.episode_steps):
            if step % args.poison_interval_steps == args.poison_interval_steps - 1:
                storage.parameters[rng.integers(args.num_envs), 0] = float("nan")
            *_, info = envs.step(envs.sample_valid_actions(rng))
            num_rollbacks += int((info["reward_terms"]["rollback"] < 0).sum())
        if episode % 10 == 0 or episode == args.warm_up_episodes:
            curve.append({"episode": episode, "resident_bytes": resident_bytes()})
    (before,) = (row for row in curve if row["episode"] == args.warm_up_episodes)
    growth = curve[-1]["resident_bytes"] / before["resident_bytes"] - 1
    return {"rollbacks": num_rollbacks, "growth": growth, "curve": curve}


def main() -> None:
    """Measure, print and save. Exit with an error if the memory changes by more than `LIMIT`."""
    args = tyro.cli(Args)
    start = time.perf_counter()
    result = run(args)
    seconds = time.perf_counter() - start
    last = result["curve"][-1]["resident_bytes"]
    print(
        f"{args.episodes} episodes of {args.num_envs} members, {result['rollbacks']} rollbacks, "
        f"{seconds:.0f} s: {last / 2**20:.1f} MiB at the end, {result['growth']:+.2%} since "
        f"episode {args.warm_up_episodes}"
    )
    write_result(args.out, args, **result)
    if abs(result["growth"]) > LIMIT:
        sys.exit(f"memory changed by {result['growth']:+.2%}, expected at most {LIMIT:.0%}")


if __name__ == "__main__":
    main()
