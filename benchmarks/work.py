"""Arithmetic and memory traffic of training and evaluation, and the rates of a device.

Traffic is counted as if no data stayed in the cache between operations:

- A feature map is written and read in the forward pass. In the backward pass it is read, and its
  gradient is written and read.
- A parameter is read in both passes, and its gradient is written and read. The optimizer reads and
  writes the parameter and its momentum.
- A relu works in place.

The intensity (FLOP per byte) therefore tells which rate limits the work without a cache. A network
that stays in the cache may be faster.
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
    """Work of one call of `Population.train` or `Population.evaluate`."""

    flops: float
    """Floating-point operations: two per multiply-add forwards, four backwards."""
    traffic_bytes: float
    """Bytes read and written."""

    @property
    def intensity(self) -> float:
        """Arithmetic intensity [FLOP per byte]."""
        return self.flops / self.traffic_bytes


def training_work(population: Population, members: IntArray, seeds: Seeds, draw: Draw) -> Work:
    """Return the work of one env step of training. All members have the widest host."""
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
    """Return the work of one evaluation, with shared prefixes counted once.

    Args:
        population: Population of the members, all with the widest host.
        members: Member whose weights each network uses. (rows,).
        alpha: Blend weight of each seed. (rows, slots).
        seeds: Seeds of the whole population.
        images: Split that is evaluated.
    """
    blocks, branches, head = _counts(population)
    macs = features = parameters = 0.0
    for member in np.unique(members).tolist():
        rows = alpha[members == member].tolist()
        # One node per distinct prefix of blend weights; seeds run in nodes that give them weight.
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
    """Measure the rates of a device, on all threads that torch uses.

    Returns:
        Best rate of a float32 matrix product without TF32 [GFLOP/s], and best rate of a copy in
        bytes read and written [GB/s].
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
    """Return the counts of each block (with its pool), each seed by slot, and the head."""
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
