"""Benchmarks: scripts that measure, and the plain networks they compare with."""

from __future__ import annotations

import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch


def describe_machine() -> dict[str, Any]:
    """Return processor, threads and versions, for the head of a result file."""
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


def write_result(out: Path | None, args: Any, **content: Any) -> None:
    """Write arguments, machine and content as JSON, if there is a path to write to."""
    if out is None:
        return
    head = {
        "arguments": dataclasses.asdict(args) | {"out": str(out)},
        "machine": describe_machine(),
    }
    out.write_text(json.dumps(head | content, indent=1))
