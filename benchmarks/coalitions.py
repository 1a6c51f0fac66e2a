"""Cost of evaluating all eight coalitions of three seeds, relative to one plain evaluation.

Both evaluations use the same weights, images and engine, and are timed in turn. The plain
evaluation contains only the live network of each member. Coalitions with equal blend weights before
a slot share the computation up to this slot.

    python benchmarks/coalitions.py --out benchmarks/results/coalitions.json
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from benchmarks import write_result
from esper_env.config import Blend
from esper_env.population.blueprints import CNN_BLUEPRINTS
from esper_env.population.hosts import Host
from esper_env.population.images import ImageSet
from esper_env.population.interface import Seeds, SGDSettings
from esper_env.population.population import Population
from esper_env.rng import make_key

CASES = {
    "digits-shaped, 4-8-8": (
        Host(in_channels=1, image_size=8, channels=(4, 8, 8), num_classes=10),
        350,
    ),
    "CIFAR-shaped, 8-16-32": (
        Host(in_channels=3, image_size=32, channels=(8, 16, 32), num_classes=10),
        2000,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Args:
    """Measure the cost of evaluating coalitions."""

    num_members: int = 4
    """Members evaluated together."""
    rounds: int = 7
    """Timed rounds."""
    threads: int = 2
    """Torch threads."""
    out: Path | None = None
    """JSON file for the result."""


def measure(host: Host, num_images: int, args: Args) -> dict[str, Any]:
    """Time both evaluations in turn, for members with a random seed in every slot."""
    rng = np.random.default_rng(0)
    m = args.num_members
    members = np.arange(m)
    population = Population(
        [host], CNN_BLUEPRINTS, m, SGDSettings(), torch.device("cpu"), 128, None
    )
    population.reset(members, 0 * members, make_key(members))
    shape = (m, host.num_slots)
    blueprint = rng.integers(0, len(CNN_BLUEPRINTS), shape)
    for slot in range(host.num_slots):
        key = make_key(members, slot)
        population.germinate(members, 0 * members, 0 * members + slot, blueprint[:, slot], key)
    seeds = Seeds(
        blueprint=blueprint,
        blend=rng.integers(0, len(Blend), shape),
        alpha=np.full(shape, 0.5),
        beta=np.full(shape, 0.5),
        is_isolated=np.zeros(shape, dtype=bool),
        is_frozen=np.zeros(shape, dtype=bool),
        width=np.zeros(shape[0], dtype=np.int64),
    )
    size = (num_images, host.image_size, host.image_size, host.in_channels)
    ones = torch.ones(host.in_channels)
    images = ImageSet(
        torch.from_numpy(rng.integers(0, 256, size, dtype=np.uint8)),
        torch.from_numpy(rng.integers(0, host.num_classes, num_images)),
        128 * ones,
        64 * ones,
    )
    subsets = np.array(list(itertools.product((0.0, 0.5), repeat=host.num_slots)))
    # One row per network: (m,) for the plain pass, (m * subsets,) for the coalitions.
    passes = {
        "plain": (members, seeds.alpha),
        "coalitions": (np.repeat(members, len(subsets)), np.tile(subsets, (m, 1))),
    }
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for round_index in range(args.rounds + 2):
        for name, (rows, alpha) in passes.items():
            start = time.perf_counter()
            population.evaluate(rows, alpha, seeds, images)
            if round_index >= 2:  # The first two rounds are warm-up.
                seconds[name].append(time.perf_counter() - start)
    ratios = np.array(seconds["coalitions"]) / np.array(seconds["plain"])
    return {
        "coalitions": len(subsets),
        "images": num_images,
        "members": m,
        "plain_ms": 1000 * float(np.median(seconds["plain"])),
        "ratio": {
            "median": float(np.median(ratios)),
            "min": float(ratios.min()),
            "max": float(ratios.max()),
        },
    }


def main(args: Args) -> None:
    """Measure every case, print a line for each, and save."""
    torch.set_num_threads(args.threads)
    result = {}
    for name, (host, num_images) in CASES.items():
        result[name] = case = measure(host, num_images, args)
        ratio = case["ratio"]
        print(
            f"{name}: {case['coalitions']} coalitions cost {ratio['median']:.2f}x "
            f"({ratio['min']:.2f} .. {ratio['max']:.2f}) a plain pass of {case['plain_ms']:.1f} ms"
        )
    write_result(args.out, args, cases=result)


if __name__ == "__main__":
    main(tyro.cli(Args))
