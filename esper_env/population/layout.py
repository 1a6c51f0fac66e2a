"""Layout of a member's tensors in its row.

A member is one row of three matrices: parameters, momentum and buffers. A row holds the host, and
for each slot enough columns for the largest blueprint and a gate, because a slot has at most one
seed at a time. Resetting, copying or saving a member is a row operation.

Members may differ in width. A narrow member uses the leading corner of each tensor of the widest
host. The rest of its row is initialized to zero and stays zero. A channel whose norm or last layer
is zero outputs zero, so the weights that read it receive no gradient. Those weights are zero too,
so no gradient flows back through them. The forward pass therefore needs no mask.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from esper_env.config import FloatArray, IntArray
from esper_env.population.blueprints import Blueprint
from esper_env.population.hosts import Host
from esper_env.population.layers import Layer, TensorSpec


@dataclass(frozen=True)
class Column:
    """Position of one tensor in a member's row."""

    spec: TensorSpec
    offset: int
    """First column."""


@dataclass(frozen=True)
class PlacedLayer:
    """A layer and the columns of its tensors."""

    layer: Layer
    parameters: tuple[Column, ...]
    buffers: tuple[Column, ...]


@dataclass(frozen=True)
class Start:
    """Initial values of some columns: `value` + U(-bound, bound) at `index`, zero elsewhere."""

    columns: IntArray
    """Columns that are initialized, for the widest host. (n,) int64."""
    index: IntArray
    """Columns that a member of this width uses. (k,) int64."""
    value: FloatArray
    """Mean initial value of each used column. (k,) float64."""
    bound: FloatArray
    """Largest deviation from it. (k,) float64."""


class Layout:
    """Columns of the host, of each blueprint in each slot, and of the gates.

    Args:
        hosts: Host of each width; the last is the widest.
        blueprints: The registry, in the order of the blueprint head.
    """

    def __init__(self, hosts: Sequence[Host], blueprints: Sequence[Blueprint]) -> None:
        self.hosts = tuple(hosts)
        self.host = host = hosts[-1]
        self.blueprints = tuple(blueprints)
        self._starts: dict[tuple[int, ...], tuple[Start, Start]] = {}
        cursor = _Cursor()
        self.blocks = [cursor.place(host.block(i)) for i in range(host.num_slots)]
        self.head = cursor.place_parameters(host.head)
        self.seeds: list[list[list[PlacedLayer]]] = []
        """Layers of the seeds, by slot and blueprint."""
        self.gates: list[tuple[Column, ...]] = []
        """Columns of the gates, by slot: weight over the pooled features, and bias."""
        for slot in range(host.num_slots):
            channels = host.channels[slot]
            # All blueprints of a slot start at the same column, since a slot has one seed at a
            # time. The gate follows the largest of them, at the same columns for all.
            ends, placed = [cursor], []
            for blueprint in self.blueprints:
                branch = _Cursor(cursor.parameters, cursor.buffers)
                placed.append(branch.place(blueprint.build(channels)))
                ends.append(branch)
            cursor = _Cursor(max(c.parameters for c in ends), max(c.buffers for c in ends))
            self.seeds.append(placed)
            self.gates.append(cursor.place_parameters(gate_specs(channels)))
        self.num_parameters = cursor.parameters
        """Number of columns of the parameter and momentum matrices."""
        self.num_buffers = cursor.buffers
        """Number of columns of the buffer matrix."""
        self.max_seed_tensors = max(
            len(self.seed_columns(slot, index)[0])
            for slot in range(host.num_slots)
            for index in range(len(self.blueprints))
        )
        """Largest number of trainable tensors of a seed, including its gate."""

    def host_columns(self) -> tuple[list[Column], list[Column]]:
        """Return the parameter columns and the buffer columns of the host."""
        layers = [placed for block in self.blocks for placed in block]
        parameters = [c for placed in layers for c in placed.parameters]
        return parameters + list(self.head), [c for placed in layers for c in placed.buffers]

    def seed_columns(self, slot: int, blueprint: int) -> tuple[list[Column], list[Column]]:
        """Return the parameter columns (the gate's last) and the buffer columns of a seed."""
        layers = self.seeds[slot][blueprint]
        parameters = [c for placed in layers for c in placed.parameters]
        return parameters + list(self.gates[slot]), [c for p in layers for c in p.buffers]

    def host_start(self, width: int) -> tuple[Start, Start]:
        """Return the initial parameters and buffers of `hosts[width]`."""
        key = (width,)
        if key not in self._starts:
            host = self.hosts[width]
            layers = [layer for i in range(host.num_slots) for layer in host.block(i)]
            parameters, buffers = self.host_columns()
            self._starts[key] = (
                _start(parameters, [*_parameters(layers), *host.head]),
                _start(buffers, _buffers(layers)),
            )
        return self._starts[key]

    def seed_start(self, slot: int, blueprint: int, width: int) -> tuple[Start, Start]:
        """Return the initial parameters (with the gate's) and buffers of a seed.

        Args:
            slot: Slot of the seed.
            blueprint: Index into the registry.
            width: Index into `hosts`.
        """
        key = (slot, blueprint, width)
        if key not in self._starts:
            channels = self.hosts[width].channels[slot]
            layers = self.blueprints[blueprint].build(channels)
            parameters, buffers = self.seed_columns(slot, blueprint)
            self._starts[key] = (
                _start(parameters, [*_parameters(layers), *gate_specs(channels)]),
                _start(buffers, _buffers(layers)),
            )
        return self._starts[key]


def gate_specs(channels: int) -> tuple[TensorSpec, TensorSpec]:
    """Return the specs of a gate: weight over the pooled features, and bias."""
    return (
        TensorSpec("gate_weight", (channels,), bound=1 / sqrt(channels)),
        TensorSpec("gate_bias", (1,)),
    )


@functools.cache
def corner(shape: tuple[int, ...], inner: tuple[int, ...]) -> IntArray:
    """Return the flat indices of the leading corner of shape `inner` in a tensor of `shape`.

    The result is cached and therefore read-only. (n,) int64.
    """
    positions = np.arange(int(np.prod(shape))).reshape(shape)
    flat: IntArray = positions[tuple(slice(n) for n in inner)].reshape(-1)
    flat.setflags(write=False)
    return flat


def _parameters(layers: Sequence[Layer]) -> list[TensorSpec]:
    return [spec for layer in layers for spec in layer.parameters]


def _buffers(layers: Sequence[Layer]) -> list[TensorSpec]:
    return [spec for layer in layers for spec in layer.buffers]


def _start(columns: Sequence[Column], specs: Sequence[TensorSpec]) -> Start:
    """Embed each spec in the leading corner of its column's tensor."""
    no_columns, no_values = np.zeros(0, dtype=np.int64), np.zeros(0)
    corners = [
        column.offset + corner(column.spec.shape, spec.shape)
        for column, spec in zip(columns, specs, strict=True)
    ]
    return Start(
        columns=np.concatenate([no_columns, *(c.offset + np.arange(c.spec.size) for c in columns)]),
        index=np.concatenate([no_columns, *corners]),
        value=np.concatenate([no_values, *(np.full(s.size, s.value) for s in specs)]),
        bound=np.concatenate([no_values, *(np.full(s.size, s.bound) for s in specs)]),
    )


class _Cursor:
    """Next free columns of a row, which it assigns to tensors in order."""

    def __init__(self, parameters: int = 0, buffers: int = 0) -> None:
        self.parameters = parameters
        self.buffers = buffers

    def place(self, layers: Sequence[Layer]) -> list[PlacedLayer]:
        placed = []
        for layer in layers:
            parameters = self.place_parameters(layer.parameters)
            buffers = []
            for spec in layer.buffers:
                buffers.append(Column(spec, self.buffers))
                self.buffers += spec.size
            placed.append(PlacedLayer(layer, parameters, tuple(buffers)))
        return placed

    def place_parameters(self, specs: Sequence[TensorSpec]) -> tuple[Column, ...]:
        columns = []
        for spec in specs:
            columns.append(Column(spec, self.parameters))
            self.parameters += spec.size
        return tuple(columns)
