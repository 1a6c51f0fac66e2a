"""Profile of `step` by phase, and the rates of training and evaluation relative to the hardware's.

    python benchmarks/step_profile.py --out benchmarks/results/profile.json

The script wraps functions of the environment in timers. The time of a phase excludes phases called
inside it. The rates of the hardware come from a float32 matrix product and a copy on the same
number of threads. The CIFAR-10 ids train on random images of the same shape. A file named `profile`
would shadow Python's module when a script of this folder is run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import tyro

from benchmarks import calls_per_round, use_synthetic_cifar10, write_result
from benchmarks.states import grow, make_envs, settings_of
from benchmarks.work import Work, evaluation_work, measure_limits, training_work
from esper_env import EsperVectorEnv
from esper_env.envs import vector_env
from esper_env.growth import simulation
from esper_env.growth.action_space import ActionSpace
from esper_env.growth.observation import ObservationBuilder

PHASES = ("batches", "training", "evaluation", "lifecycle", "observation", "reward", "rest")
"""Sampling of batches; `Population.train` and `evaluate`; other work of the simulation, and masks;
observation; reward and info; the remaining time."""
HEAD = ("environment", "members", "slots", "step", *PHASES, "GFLOP/s", "FLOP/byte")
"""Columns of the table of profiles."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Profile `step` by phase."""

    env_ids: tuple[str, ...] = ("Esper-Digits-v0", "Esper-CIFAR10-v0")
    """Environment ids."""
    num_envs: tuple[int, ...] = (1, 16, 64, 256)
    """Numbers of members to measure."""
    largest: tuple[int, ...] = (256, 64)
    """Largest number of members for each environment; 256 of CIFAR-10's shape take 40 minutes."""
    modes: tuple[str, ...] = ("empty", "mix")
    """States of the slots; see `benchmarks/states.py`."""
    rounds: int = 5
    """Timed rounds."""
    threads: int = 2
    """Torch threads."""
    seed: int = 0
    """Random seed."""
    quick: bool = False
    """Whether to run one round of digits with 1 and 2 members, as a test of the script."""
    out: Path | None = None
    """JSON file for the result."""


class Phases:
    """Times of the phases [seconds], and the last arguments of each phase."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES[:-1], 0.0)
        self.arguments: dict[str, tuple[Any, ...]] = {}
        self._inside: list[float] = []

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its time, without nested phases, is added to a phase."""

        def call(*values: Any) -> Any:
            self._inside.append(0.0)
            begin = time.perf_counter()
            result = function(*values)
            total = time.perf_counter() - begin
            self.seconds[phase] += total - self._inside.pop()
            if self._inside:
                self._inside[-1] += total
            self.arguments[phase] = values
            return result

        return call


@contextmanager
def measured_phases(envs: EsperVectorEnv) -> Iterator[Phases]:
    """Measure the phases of an environment's steps inside the context."""
    phases, sim = Phases(), envs.debug_state()
    wanted: list[tuple[str, Any, str]] = [
        ("batches", sim, "draw_batches"),
        ("training", sim.population, "train"),
        ("evaluation", sim.population, "evaluate"),
        ("lifecycle", sim, "step"),
        ("lifecycle", ActionSpace, "conditional_masks"),
        ("observation", ObservationBuilder, "build"),
        ("reward", simulation, "compute_reward"),
        ("reward", vector_env, "build_info"),
    ]
    with ExitStack() as stack:
        for phase, owner, name in wanted:
            function = phases.timed(phase, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, function))
        yield phases


def count_work(envs: EsperVectorEnv, phases: Phases) -> dict[str, Work]:
    """Return the work of the last training and, if there was one, of the last evaluation."""
    population = envs.debug_state().population
    (training,) = phases.arguments["training"]
    work = {"training": training_work(population, training.members, training.seeds, training.draw)}
    if "evaluation" in phases.arguments:
        work["evaluation"] = evaluation_work(population, *phases.arguments["evaluation"])
    return work


def profile(
    env_id: str, num_envs: int, mode: str, rounds: int, seed: int, steps: int | None = None
) -> dict[str, Any]:
    """Profile steps in which all members wait.

    Args:
        env_id: Environment id.
        num_envs: Members.
        mode: State of the slots; see `states`.
        rounds: Timed rounds.
        seed: Random seed.
        steps: Env steps per round, None for about a third of a second.

    Returns:
        For each phase its time per step (median over the rounds) [milliseconds] and its share; for
        training and evaluation also their work and rates.
    """
    envs = make_envs(env_id, num_envs, **settings_of(mode))
    grow(envs, mode, seed)
    wait = np.zeros((num_envs, len(envs.heads)), dtype=np.int64)
    steps = steps or calls_per_round(lambda: envs.step(wait))
    times = []
    for _ in range(rounds):
        with measured_phases(envs) as phases:
            begin = time.perf_counter()
            for _ in range(steps):
                envs.step(wait)
            total = time.perf_counter() - begin
        # The last phase is the time outside of all others.
        own = [phases.seconds[phase] for phase in PHASES[:-1]]
        times.append(np.array([*own, total - sum(own)]) / steps)
    milliseconds = 1e3 * np.median(times, axis=0)
    rows: dict[str, dict[str, float]] = {
        phase: {"milliseconds": float(ms), "share": float(ms / milliseconds.sum())}
        for phase, ms in zip(PHASES, milliseconds, strict=True)
    }
    for phase, work in count_work(envs, phases).items():
        seconds = 1e-3 * rows[phase]["milliseconds"]
        rows[phase] |= {
            "megaflop": work.flops / 1e6,
            "gflops": work.flops / seconds / 1e9,
            "flop_per_byte": work.intensity,
        }
    return {
        "env_id": env_id,
        "num_envs": num_envs,
        "mode": mode,
        "step_milliseconds": float(milliseconds.sum()),
        "phases": rows,
    }


def main(args: Args) -> None:
    """Profile all combinations, print a table row for each, and save."""
    torch.set_num_threads(args.threads)
    use_synthetic_cifar10()
    limits = measure_limits(torch.device("cpu"))
    print(
        f"{args.threads} threads: matrix product {limits['matrix_gflops']:.0f} GFLOP/s, "
        f"copy {limits['copy_gigabytes_per_second']:.0f} GB/s"
    )
    print(f"| {' | '.join(HEAD)} |")
    rows = []
    env_ids, num_envs, largest, rounds = args.env_ids, args.num_envs, args.largest, args.rounds
    if args.quick:
        env_ids, num_envs, largest, rounds = ("Esper-Digits-v0",), (1, 2), (2,), 1
    for env_id, most in zip(env_ids, largest, strict=True):
        for count in (n for n in num_envs if n <= most):
            for mode in args.modes:
                row = profile(env_id, count, mode, rounds, args.seed, 2 if args.quick else None)
                rows.append(row)
                print(f"| {' | '.join(cells(row))} |", flush=True)
    write_result(args.out, args, limits=limits, rows=rows)


def cells(row: dict[str, Any]) -> list[str]:
    """Return a profile as table cells in the order of `HEAD`."""
    phases = row["phases"]
    pair = phases["training"], phases["evaluation"]
    return [
        row["env_id"],
        str(row["num_envs"]),
        row["mode"],
        f"{row['step_milliseconds']:.3g} ms",
        *(f"{100 * phases[phase]['share']:.0f} %" for phase in PHASES),
        " / ".join(f"{part['gflops']:.0f}" for part in pair),
        " / ".join(f"{part['flop_per_byte']:.1f}" for part in pair),
    ]


if __name__ == "__main__":
    main(tyro.cli(Args))
