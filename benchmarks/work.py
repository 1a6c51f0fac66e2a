"""The arithmetic and the memory traffic of training and evaluation, and what a device can do.

Traffic is what moves if nothing outlasts an operation in the cache: every feature map is written
and read once forwards, and read, its gradient written and read backwards; a parameter is read in
both passes, its gradient written and read, momentum and parameter read and written by the
optimiser. A rectifier works in place. So intensity (FLOP per byte) tells which limit would hold
without a cache; a network that stays in the cache may exceed it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import seconds_per_call
from esper_env.config import FloatArray, IntArray
from esper_env.population.images import Draw, ImageSet
from esper_env.population.interface import Seeds
from esper_env.population.layers import Conv, Layer, Relu
from esper_env.population.population import Population

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Work:
    """What one call of `Population.train` or `Population.evaluate` does."""

    flops: float
    """Two per multiply-add forwards, twice that backwards."""
    traffic_bytes: float

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.traffic_bytes


def training_work(population: Population, members: IntArray, seeds: Seeds, draw: Draw) -> Work:
    """Count one env step of training; all members have the widest host."""
    blocks, branches, head = _counts(population)
    batches, size, _ = draw.indices.shape
    macs = features = parameters = 0.0
    for member in members.tolist():
        runs = np.nonzero(seeds.beta[member] > 0)[0]
        grown = [branches[slot][seeds.blueprint[member, slot]] for slot in runs]
        own = np.sum([*blocks, *grown, head], axis=0)
        macs, features, parameters = macs + own[0], features + own[1], parameters + own[2]
    moved = batches * (5 * size * features + 8 * parameters)
    return Work(6.0 * batches * size * macs, FLOAT_BYTES * moved)


def evaluation_work(
    population: Population, members: IntArray, alpha: FloatArray, seeds: Seeds, images: ImageSet
) -> Work:
    """Count one evaluation; networks of a member share what they have in common up to a slot."""
    blocks, branches, head = _counts(population)
    macs = features = parameters = 0.0
    for member in np.unique(members).tolist():
        rows = alpha[members == member].tolist()
        for slot, block in enumerate(blocks):
            nodes = {tuple(row[:slot]) for row in rows}
            seeded = {tuple(row[:slot]) for row in rows if row[slot] != 0}
            own = len(nodes) * block
            if seeded:
                own = own + len(seeded) * branches[slot][seeds.blueprint[member, slot]]
            macs, features, parameters = macs + own[0], features + own[1], parameters + own[2]
        own = len({tuple(row) for row in rows}) * head
        macs, parameters = macs + own[0], parameters + own[2]
    moved = 2 * len(images) * features + parameters
    return Work(2.0 * len(images) * macs, FLOAT_BYTES * moved)


def measure_limits(device: torch.device) -> dict[str, float]:
    """Measure what the device can do, with as many threads as torch may use.

    Returns:
        The best of a few rates of a float32 matrix product without TF32 [GFLOP/s] and of a copy,
        counting bytes read and written [GB/s].
    """
    n = 8192 if device.type == "cuda" else 2048
    a, b, c = (torch.randn(n, n, device=device) for _ in range(3))
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    product, copy = [], []
    for _ in range(6):
        product.append(2 * n**3 / seconds_per_call(lambda: torch.mm(a, b, out=c), 2))
        moved = 2 * source.numel() * FLOAT_BYTES
        copy.append(moved / seconds_per_call(lambda: target.copy_(source), 2))
    return {"matrix_gflops": max(product) / 1e9, "copy_gigabytes_per_second": max(copy) / 1e9}


Counts = npt.NDArray[np.float64]
"""Multiply-adds per image, features per image, parameters. (3,)."""


def _counts(population: Population) -> tuple[list[Counts], list[list[Counts]], Counts]:
    """Return the counts of each block (with its pool), of each seed by slot, and of the head."""
    host = population.layout.host
    blocks, branches = [], []
    before = host.in_channels
    for slot, channels in enumerate(host.channels):
        size = host.slot_size(slot)
        block = _count(host.block(slot), before, size)
        blocks.append(block + np.array([0, channels * (size // 2) ** 2, 0]))
        seeds = [b.build(channels) for b in population.layout.blueprints]
        branches.append([_count(layers, channels, size) for layers in seeds])
        before = channels
    head_parameters = sum(spec.size for spec in host.head)
    head = np.array([before * host.num_classes, host.num_classes, head_parameters])
    blocks[0] = blocks[0] + np.array([0, host.in_channels * host.image_size**2, 0])
    return blocks, branches, head


def _count(layers: Sequence[Layer], channels: int, size: int) -> Counts:
    total = np.zeros(3)
    for layer in layers:
        channels = layer.out_channels if isinstance(layer, Conv) else channels
        written = 0 if isinstance(layer, Relu) else channels * size**2
        parameters = sum(spec.size for spec in layer.parameters)
        total += (layer.multiply_adds(size, size), written, parameters)
    return total
