"""Kill trainings at random moments, resume them, and compare them with an uninterrupted one.

A run is killed (SIGKILL) up to twice, at a random time or in the middle of a random operation
on a file: half of a write is done, or an fsync or a rename is not. Then it is resumed to its end.
Weights, metrics (times aside) and evaluation must be bitwise those of an uninterrupted run. The
script also measures the cost of checkpoints at their default interval.

    python -m benchmarks.kill_runs --out benchmarks/results/kill_runs.json
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from safetensors.numpy import load_file

from benchmarks import write_result
from benchmarks.processes import end_with_parent
from esper_agent import ppo_lstm
from esper_agent.run import Run
from esper_agent.telemetry.display import progress
from esper_agent.telemetry.recorder import PARTS
from esper_env import EnvConfig

TIMES = {"charts/SPS", "system/SPS", "time/policy_share", *(f"time/{part}" for part in PARTS)}
TIMES |= {"system/memory", "system/memory_share"}
"""Metrics that depend on wall time and on the process."""
PROCESS_EVENTS = ("run_started", "checkpoint_written")
"""Kinds of events that depend on where a run was interrupted."""
OPERATIONS = ("write", "fsync", "replace")
"""Functions of `os` through which files of a run are written."""
MAX_KILLS = 2
"""Kills of one run before it may reach its end."""
LIMIT = 0.01
"""Largest accepted share of training time that checkpoints cost."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Kill trainings at random moments and compare what they end with."""

    runs: int = 30
    """Runs that are killed."""
    seed: int = 0
    """Random seed of the moments."""
    writes: int = 6
    """Checkpoints of the default training whose cost is measured; 0 skips the measurement."""
    out: Path | None = None
    """JSON file for the result."""


def small_training(directory: Path, **changes: Any) -> ppo_lstm.Args:
    """Return a training of 5 iterations of 3 env steps, with episodes of 4, saved every time."""
    settings: dict[str, Any] = {
        "env": EnvConfig(batches_per_step=1, batch_size=8, episode_steps=4, gamma=0.99),
        "gamma": 0.99,
        "num_envs": 2,
        "num_steps": 3,
        "total_timesteps": 30,
        "group_size": 1,
        "num_minibatches": 2,
        "update_epochs": 2,
        "hidden_size": 8,
        "learning_rate": 1e-3,
        "eval_episodes": 2,
        "checkpoint_minutes": 0.0,
        "run_dir": directory,
    }
    return ppo_lstm.Args(**(settings | changes))


def results_of(directory: Path) -> dict[str, Any]:
    """Return everything that must not depend on interruptions, in a form that compares with ==."""
    weights = load_file(directory / "agent.safetensors")
    rows, events = (
        [json.loads(line) for line in (directory / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "events.jsonl")
    )
    evaluation = directory / "evaluation.json"
    return {
        "weights": {name: weights[name].tobytes() for name in sorted(weights)},
        "metrics": [{n: v for n, v in row.items() if n not in TIMES} for row in rows],
        "events": [event for event in events if event["kind"] not in PROCESS_EVENTS],
        "evaluation": json.loads(evaluation.read_text()) if evaluation.exists() else None,
    }


# ------------------------------------------------------------------ kills


def in_process(
    function: Callable[..., object], *arguments: Any, seconds: float | None = None
) -> int:
    """Call a function in a new process; return its exit code, negative for a signal.

    Args:
        function: Function of a module.
        arguments: Its arguments.
        seconds: Time after which the process is killed.
    """
    # The server has done a training, so its children start in no time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.warm"])
    process = context.Process(target=_run, args=(function, arguments))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _run(function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    end_with_parent()
    function(*arguments)


@contextlib.contextmanager
def operations_watched(
    watch: Callable[[str, Callable[..., Any], tuple[Any, ...]], Any],
) -> Iterator[None]:
    """Call `watch(name, function, arguments)` instead of each of `OPERATIONS`."""
    before = {name: getattr(os, name) for name in OPERATIONS}
    for name, function in before.items():
        setattr(os, name, lambda *a, n=name, f=function: watch(n, f, a))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(os, name, function)


def train(args: ppo_lstm.Args, kill_at: int | None) -> None:
    """Start or resume a training, and kill this process in an operation on a file.

    Args:
        args: Arguments of the run.
        kill_at: Number of the operation, counted from 0; None for none.
    """
    torch.set_num_threads(1)
    count = 0

    def watch(name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        nonlocal count
        count += 1
        if count - 1 == kill_at:
            if name == "write":
                file, content = arguments
                function(file, content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)

    assert args.run_dir is not None
    if (args.run_dir / "config.json").exists():
        args = ppo_lstm.load_args(args.run_dir)
    with contextlib.redirect_stdout(io.StringIO()), operations_watched(watch):
        ppo_lstm.train(args)


def kill_and_resume(
    args: ppo_lstm.Args, seconds: float, operations: int, rng: np.random.Generator
) -> list[str]:
    """Kill a run at random moments until it ends; return the moments.

    Args:
        args: Arguments of the run.
        seconds: Longest time until a kill.
        operations: Largest number of operations on files until a kill.
        rng: Source of the moments.
    """
    moments = []
    for _ in range(MAX_KILLS):
        delay, kill_at = None, None
        if rng.integers(3):
            kill_at = int(rng.integers(operations))
            moments.append(f"operation {kill_at}")
        else:
            delay = float(rng.uniform(0, seconds))
            moments.append(f"{delay:.3f} s")
        code = in_process(train, args, kill_at, seconds=delay)
        if code == 0:
            return moments
        if code != -signal.SIGKILL:
            raise RuntimeError(f"expected a process that was killed, got exit code {code}")
    code = in_process(train, args, None)
    if code != 0:
        raise RuntimeError(f"a resumed run ended with exit code {code} after kills at {moments}")
    return moments


def count_operations(args: ppo_lstm.Args) -> int:
    """Run a training in this process; return its operations on files."""
    names = []

    def watch(name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        names.append(name)
        return function(*arguments)

    with contextlib.redirect_stdout(io.StringIO()), operations_watched(watch):
        ppo_lstm.train(args)
    return len(names)


def compare(folder: Path, num_runs: int, seed: int) -> list[dict[str, Any]]:
    """Kill runs and compare each with an uninterrupted one.

    Returns:
        Moments of the kills of each run, and the results that differ.
    """
    operations = count_operations(small_training(folder / "whole"))
    expected = results_of(folder / "whole")
    begin = time.perf_counter()
    in_process(train, small_training(folder / "timed"), None)
    seconds = time.perf_counter() - begin
    records = []
    for k in progress(range(num_runs), "runs"):
        args, rng = small_training(folder / str(k)), np.random.default_rng([seed, k])
        moments = kill_and_resume(args, seconds, operations, rng)
        actual = results_of(folder / str(k))
        differing = [name for name in expected if actual[name] != expected[name]]
        records.append({"kills": moments, "differing": differing})
    return records


# ------------------------------------------------------------------ cost


def cost_of_checkpoints(folder: Path, num_writes: int) -> dict[str, Any]:
    """Measure checkpoints of the default training in the run, one after each iteration."""
    default = ppo_lstm.Args()
    args = ppo_lstm.Args(
        total_timesteps=num_writes * default.batch_size,
        eval_episodes=0,
        checkpoint_minutes=0.0,
        run_dir=folder / "cost",
    )
    seconds: list[float] = []
    save = Run.save_if_due

    def timed(run: Run, is_last: bool = False) -> None:
        begin = time.perf_counter()
        save(run, is_last)
        seconds.append(time.perf_counter() - begin)

    Run.save_if_due = timed  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            directory = ppo_lstm.train(args)
    finally:
        Run.save_if_due = save  # type: ignore[method-assign]
    num_bytes = sum(p.stat().st_size for p in (directory / "checkpoints").iterdir())
    return {
        "writes": len(seconds),
        "seconds_median": statistics.median(seconds),
        "seconds_max": max(seconds),
        "bytes": num_bytes // args.keep_checkpoints,
        "share": statistics.median(seconds) / (60 * default.checkpoint_minutes),
        "share_max": max(seconds) / (60 * default.checkpoint_minutes),
    }


def main() -> None:
    """Kill, compare, measure, print and save. Exit with an error if a promise is broken."""
    args = tyro.cli(Args)
    with tempfile.TemporaryDirectory() as name:
        records = compare(Path(name), args.runs, args.seed)
        cost = cost_of_checkpoints(Path(name), args.writes) if args.writes else None
    num_kills = sum(len(record["kills"]) for record in records)
    num_equal = sum(not record["differing"] for record in records)
    print(f"{num_equal} of {args.runs} runs equal the uninterrupted one, after {num_kills} kills")
    if cost is not None:
        print(
            f"a checkpoint of {cost['bytes'] / 2**20:.1f} MiB takes {cost['seconds_median']:.3f} s "
            f"(median of {cost['writes']}), {cost['share']:.3%} of the training time"
        )
    write_result(args.out, args, runs=records, cost=cost)
    if num_equal < args.runs or (cost is not None and cost["share"] > LIMIT):
        sys.exit("expected equal runs, and checkpoints that cost at most 1 % of the training time")


if __name__ == "__main__":
    main()
