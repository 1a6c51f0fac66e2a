"""Benchmark scripts, and the plain networks that they compare with."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch

from esper_env.population.images import ImageSet
from esper_env.tasks import TASKS, Splits


def describe_machine() -> dict[str, Any]:
    """Return processor, threads and versions, to be saved with the results."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(names),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gymnasium": gym.__version__,
    }


def use_synthetic_cifar10(num_train: int = 2000) -> None:
    """Replace the data of this process's CIFAR-10 tasks by random images of the same shape."""

    def load(data_dir: str | None) -> Splits:
        del data_dir
        generator = torch.Generator().manual_seed(0)
        mean, std = torch.full((3,), 120.0), torch.full((3,), 64.0)

        def split(count: int) -> ImageSet:
            images = torch.randint(0, 256, (count, 32, 32, 3), generator=generator)
            labels = torch.randint(0, 10, (count,), generator=generator)
            return ImageSet(images.to(torch.uint8), labels, mean, std)

        return Splits(train=split(num_train), validation=split(2000), test=split(2000))

    for name, task in TASKS.items():
        if name.startswith("cifar10"):
            TASKS[name] = dataclasses.replace(task, load=load)


def seconds_per_call(function: Callable[[], object], calls: int) -> float:
    """Return the mean time of some calls, including their work on a GPU [seconds]."""
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / calls


def calls_per_round(function: Callable[[], object]) -> int:
    """Warm up, and return the number of calls that take about a third of a second."""
    return max(1, int(0.35 / min(seconds_per_call(function, 1) for _ in range(3))))


def write_result(out: Path | None, args: Any, *, indent: int | None = 1, **content: Any) -> None:
    """Write arguments, machine and content as JSON, unless `out` is None."""
    if out is None:
        return
    from esper_agent.checkpoint import write_file

    head = {"arguments": dataclasses.asdict(args), "machine": describe_machine()}
    write_file(out, [json.dumps(head | content, indent=indent, default=str).encode()])


def print_problems(problems: list[str]) -> None:
    """Print how many problems there are, and each different one with its number."""
    print(f"problems: {len(problems)}")
    for problem in sorted(set(problems)):
        print(f"  {problems.count(problem)} x {problem}")
