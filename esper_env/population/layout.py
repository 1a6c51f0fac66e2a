"""Where every tensor of one member lies in its row.

A member is one row of three matrices: parameters, momentum, buffers. A row holds the host, then
for each slot room for the largest blueprint and a gate; only one seed lives in a slot at a time.
Resetting, copying or saving a member is a row operation.

Members may differ in width. A narrow member lives in the leading corner of the tensors of the
widest host, and the rest of its row is born at zero. It stays at zero: a channel whose norm, or
whose last map, is zero puts out zero, so nothing after it learns from it, and no gradient comes
back, as the weights that would carry it are zero too. So no mask is needed in the forward pass.
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
    """A tensor of a member: its spec, and where it starts in the row."""

    spec: TensorSpec
    offset: int


@dataclass(frozen=True)
class PlacedLayer:
    """A layer and where its tensors are."""

    layer: Layer
    parameters: tuple[Column, ...]
    buffers: tuple[Column, ...]


@dataclass(frozen=True)
class Start:
    """How some columns of a row begin: `value` + U(-bound, bound) at `index`, zero elsewhere."""

    columns: IntArray
    """All columns concerned. (n,)."""
    index: IntArray
    """Those of a member of this width. (k,)."""
    value: FloatArray
    bound: FloatArray


class Layout:
    """The row of a member of one kind of host with one registry.

    Args:
        hosts: Shapes of the host, one per width; the last is the widest.
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
        """By slot, then blueprint."""
        self.gates: list[tuple[Column, ...]] = []
        """By slot: weight over the pooled features, and bias."""
        for slot in range(host.num_slots):
            channels = host.channels[slot]
            ends, placed = [cursor], []
            for blueprint in self.blueprints:
                branch = _Cursor(cursor.parameters, cursor.buffers)
                placed.append(branch.place(blueprint.build(channels)))
                ends.append(branch)
            cursor = _Cursor(max(c.parameters for c in ends), max(c.buffers for c in ends))
            self.seeds.append(placed)
            self.gates.append(cursor.place_parameters(gate_specs(channels)))
        self.num_parameters = cursor.parameters
        """Columns of the parameter matrix."""
        self.num_buffers = cursor.buffers
        """Columns of the buffer matrix."""
        self.max_seed_tensors = max(
            len(self.seed_columns(slot, index)[0])
            for slot in range(host.num_slots)
            for index in range(len(self.blueprints))
        )
        """Most trained tensors that any seed has, its gate's included."""

    def host_columns(self) -> tuple[list[Column], list[Column]]:
        """Return all parameter and all buffer columns of the host."""
        layers = [placed for block in self.blocks for placed in block]
        parameters = [c for placed in layers for c in placed.parameters]
        return parameters + list(self.head), [c for placed in layers for c in placed.buffers]

    def seed_columns(self, slot: int, blueprint: int) -> tuple[list[Column], list[Column]]:
        """Return all parameter columns (the gate's last) and buffer columns of a seed."""
        layers = self.seeds[slot][blueprint]
        parameters = [c for placed in layers for c in placed.parameters]
        return parameters + list(self.gates[slot]), [c for p in layers for c in p.buffers]

    def host_start(self, width: int) -> tuple[Start, Start]:
        """Return how parameters and buffers of a host begin; `width` is an index into `hosts`."""
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
        """Return how parameters (with the gate's) and buffers of a seed begin."""
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
    """Return the tensors of a gate: weight over the pooled features, and bias."""
    return (
        TensorSpec("gate_weight", (channels,), bound=1 / sqrt(channels)),
        TensorSpec("gate_bias", (1,)),
    )


@functools.cache
def corner(shape: tuple[int, ...], inner: tuple[int, ...]) -> IntArray:
    """Return the flat positions in a tensor of `shape` of its leading corner of shape `inner`.

    The array is shared: it cannot be written.
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
    """Put each spec into the leading corner of its column."""
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
    """Hands out consecutive columns."""

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
