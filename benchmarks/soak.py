"""Use environments for a long time in every way at once, and check every output.

Blocks of steps go in turn through all modes of attribution and of autoreset, each block in a new
environment of mixed instances. Between random legal and illegal actions, members are forked, reset
by mask, restored from older states, and get NaN into their host's weights. After every call all
outputs must be finite and in their space, and the reward terms must sum to the reward. Resident
memory, threads and file descriptors are measured after every block.

    python benchmarks/soak.py --out benchmarks/results/soak.json
"""

from __future__ import annotations

import collections
import gc
import itertools
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import tyro

from benchmarks import print_problems, write_result
from benchmarks.memory import resident_bytes
from esper_env import EsperVectorEnv

SETTINGS: dict[str, Any] = {
    "instances": "train",
    "batches_per_step": 1,
    "batch_size": 8,
    "episode_steps": 16,
    "snapshot_interval": 2,
    "max_rollbacks": 2,
}
CASES = list(
    itertools.product(("none", "leave_one_out", "full"), ("NextStep", "SameStep", "Disabled"))
)
"""Modes of attribution and of autoreset."""
MEMORY_LIMIT = 0.05
"""Largest accepted growth of the resident memory after the first tenth, as a fraction."""
SUM_TOLERANCE = 1e-9
"""Accepted difference of a reward and the sum of its terms, both float64 of at most about 10."""

Reset = tuple[npt.NDArray[np.float32], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Use environments for a long time, and check every output."""

    member_steps: int = 200_000
    """Steps of all members together [env steps]."""
    num_envs: int = 32
    """Number of members."""
    block_steps: int = 50
    """Steps in one environment before the next mode has its turn [env steps]."""
    seed: int = 0
    """Random seed."""
    out: Path | None = None
    """JSON file for the result."""


class Soak:
    """Steps environments at random, and collects what is wrong.

    Args:
        args: Size of the test.
    """

    def __init__(self, args: Args) -> None:
        self.args = args
        self.rng = np.random.default_rng(args.seed)
        self.counts: collections.Counter[str] = collections.Counter()
        """Number of calls and events by name."""
        self.problems: list[str] = []
        self.samples: list[dict[str, float]] = []
        """Member-steps, resident memory, threads and descriptors after each block."""
        self._states: dict[Any, dict[str, Any]] = {}
        """The latest saved state of each configuration."""

    def run(self) -> None:
        """Run all blocks."""
        for block in itertools.count():
            if self.counts["member-steps"] >= self.args.member_steps:
                break
            attribution, autoreset = CASES[block % len(CASES)]
            # The number of cases is odd, so every case meets both values.
            illegal = ("wait", "raise")[block % 2]
            where = f"{attribution}, {autoreset}, {illegal}"
            try:
                self._run_block(attribution, autoreset, illegal, where)
            except Exception as error:  # Every exception is the finding.
                self.problems.append(f"{where}: {error!r}")
                self.counts["member-steps"] += self.args.num_envs  # Every block must end.
            gc.collect()
            self.samples.append({"member_steps": self.counts["member-steps"], **resources()})

    def _run_block(self, attribution: str, autoreset: str, illegal: str, where: str) -> None:
        config = {**SETTINGS, "attribution": attribution, "illegal_actions": illegal}
        envs = gym.make_vec(
            "Esper-Digits-v0", num_envs=self.args.num_envs, autoreset_mode=autoreset, **config
        ).unwrapped
        if not isinstance(envs, EsperVectorEnv):
            raise TypeError(f"expected an EsperVectorEnv, got {envs!r}")
        key = attribution, illegal
        if key in self._states:  # A new environment takes a state without a reset.
            self._check(where, "set_state", envs, envs.set_state(self._states[key]))
        else:
            self._check(where, "reset", envs, envs.reset(seed=int(self.rng.integers(1000))))
        for _ in range(self.args.block_steps):
            if self.counts["member-steps"] >= self.args.member_steps:
                break
            self._change(envs, key, where)
            self._reset_done(envs, where)
            self._step(envs, illegal, where)
            self.counts["member-steps"] += self.args.num_envs
        envs.close()

    def _change(self, envs: EsperVectorEnv, key: Any, where: str) -> None:
        """Fork, reset, save, restore or poison members, each with some probability."""
        rng, count = self.rng, envs.num_envs
        chance = rng.random(5)
        if chance[0] < 0.1:
            pairs = rng.permutation(count)[: 2 * (count // 4)].reshape(2, -1)
            self._check(where, "fork", envs, envs.fork(*pairs))
        if chance[1] < 0.1:
            mask = rng.random(count) < 0.2
            mask[rng.integers(count)] = True
            options: dict[str, Any] = {"reset_mask": mask}
            if rng.integers(2):
                options["instance"] = rng.integers(envs.num_instances, size=count)
            seed = int(rng.integers(1000)) if rng.integers(2) else None
            result = envs.reset(seed=seed, options=options)
            self._check(where, "reset of some members", envs, result)
        # Before the poison, because a state that is not finite is rejected.
        if chance[2] < 0.05 or key not in self._states:
            self._states[key] = envs.get_state()
            self.counts["get_state"] += 1
        elif chance[3] < 0.05:
            self._check(where, "set_state", envs, envs.set_state(self._states[key]))
        if chance[4] < 0.2:
            member = rng.integers(count)
            envs.debug_state().population.storage.parameters[member, 0] = float("nan")
            self.counts["poison"] += 1

    def _reset_done(self, envs: EsperVectorEnv, where: str) -> None:
        """Reset the members that are done, if the environment does not."""
        if envs.autoreset_mode != gym.vector.AutoresetMode.DISABLED:
            return
        is_done = envs.get_state()["is_done"]
        if is_done.any():
            result = envs.reset(options={"reset_mask": is_done})
            self._check(where, "reset of done members", envs, result)

    def _step(self, envs: EsperVectorEnv, illegal: str, where: str) -> None:
        """Take a step with legal, illegal, or sometimes impossible actions."""
        rng, sizes = self.rng, [len(head.options) for head in envs.heads]
        legal = envs.sample_valid_actions(rng)
        actions = legal.copy()
        if rng.random() < 0.5:
            chosen = rng.random(envs.num_envs) < 0.3
            actions[chosen] = rng.integers(sizes, size=(int(chosen.sum()), len(sizes)))
        is_impossible = rng.random() < 0.02
        if is_impossible:
            actions[rng.integers(envs.num_envs), rng.integers(len(sizes))] = rng.choice((-1, 99))
        try:
            result = envs.step(actions)
        except ValueError:
            if not is_impossible and (illegal == "wait" or np.array_equal(actions, legal)):
                raise
            self.counts["rejected step"] += 1
            result = envs.step(legal)  # The rejected step has changed nothing.
        else:
            if is_impossible:
                self.problems.append(f"{where}: an action out of range was accepted")
        observations, reward, terminated, truncated, info = result
        self._check(where, "step", envs, (observations, info))
        terms = [v for name, v in info["reward_terms"].items() if not name.startswith("_")]
        if not np.allclose(reward, sum(terms), rtol=0, atol=SUM_TOLERANCE):
            self.problems.append(f"{where}: the reward is not the sum of its terms")
        done = terminated | truncated
        for row in info["final_obs"][done] if "final_obs" in info else ():
            if not envs.single_observation_space.contains(row):
                self.problems.append(f"{where}: a final observation is not in its space")
        ended = info.get("final_info", info)
        self.counts["rollback"] += int((ended["rolled_back"] & info["_rolled_back"]).sum())
        self.counts["illegal action"] += int((~info["action_valid"]).sum())
        self.counts["episode"] += int(done.sum())

    def _check(self, where: str, call: str, envs: EsperVectorEnv, result: Reset) -> None:
        """Check the observations and info of a call."""
        self.counts[call] += 1
        observations, info = result
        if not envs.observation_space.contains(observations):
            self.problems.append(f"{where}, {call}: an observation is not finite or not in space")
        self.problems += [f"{where}, {call}: {name} is not finite" for name in not_finite(info)]


def not_finite(info: dict[str, Any]) -> list[str]:
    """Return the names of numbers in an info dictionary that are not finite."""
    names = []
    for name, value in info.items():
        if isinstance(value, dict):
            names += [f"{name}.{inner}" for inner in not_finite(value)]
        elif value.dtype == object:
            rows = [row for row in value if row is not None]
            names += [name] if not all(np.isfinite(row).all() for row in rows) else []
        elif not np.isfinite(value).all():
            names.append(name)
    return names


def resources() -> dict[str, float]:
    """Return resident memory, threads and file descriptors of this process (Linux)."""
    return {
        "resident_megabytes": resident_bytes() / 1e6,
        "threads": len(os.listdir("/proc/self/task")),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }


def grown(samples: list[dict[str, float]]) -> list[str]:
    """Return the resources whose largest value after the first tenth is above that within it.

    The resident memory may grow by `MEMORY_LIMIT`, threads and descriptors not at all.
    """
    until = max(1, sum(s["member_steps"] <= samples[-1]["member_steps"] / 10 for s in samples))
    problems = []
    limits = {"resident_megabytes": 1 + MEMORY_LIMIT, "threads": 1.0, "descriptors": 1.0}
    for name, factor in limits.items():
        first = max(sample[name] for sample in samples[:until])
        later = max((sample[name] for sample in samples[until:]), default=first)
        if later > factor * first:
            problems.append(f"{name} grew from {first:.0f} to {later:.0f}")
    return problems


def main(args: Args) -> None:
    """Run all blocks, print the counts and write them."""
    soak, began = Soak(args), time.perf_counter()
    soak.run()
    leaks = grown(soak.samples)
    for name, count in sorted(soak.counts.items()):
        print(f"{name}: {count}")
    first, last = soak.samples[len(soak.samples) // 10], soak.samples[-1]
    for name in first:
        print(f"{name}: {first[name]:.0f} after a tenth, {last[name]:.0f} at the end")
    problems = soak.problems + leaks
    print_problems(problems)
    write_result(
        args.out,
        args,
        seconds=time.perf_counter() - began,
        counts=dict(sorted(soak.counts.items())),
        problems=problems,
        memory_limit=MEMORY_LIMIT,
        samples=soak.samples,
    )
    if problems:
        sys.exit(1)


if __name__ == "__main__":
    main(tyro.cli(Args))
