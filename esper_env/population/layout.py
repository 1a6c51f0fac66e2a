"""Where every tensor of one member lies in its row.

A member is one row of three matrices: parameters, momentum, buffers. A row holds the host, then
for each slot room for the largest blueprint and a gate; only one seed lives in a slot at a time.
Resetting, copying or saving a member is a row operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

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


class Layout:
    """The row of a member of one kind of host with one registry.

    Args:
        host: Shape of the host.
        blueprints: The registry, in the order of the blueprint head.
    """

    def __init__(self, host: Host, blueprints: Sequence[Blueprint]) -> None:
        self.host = host
        self.blueprints = tuple(blueprints)
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
            gate = (
                TensorSpec("gate_weight", (channels,), bound=1 / sqrt(channels)),
                TensorSpec("gate_bias", (1,)),
            )
            self.gates.append(cursor.place_parameters(gate))
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
