"""Builds the program of a member: its network as a list of operations on regions of the arena.

A program depends only on the composition of a member: its width and the kinds and states of its
seeds. Members of one composition share a program, and `program_cache` keeps it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from esper_env.config import Blend, IntArray
from esper_env.population.hosts import Host
from esper_env.population.layers import Conv, Layer, Norm, Relu, SqueezeExcite
from esper_env.population.layout import Column, Layout, PlacedLayer, corner
from esper_env.population.numba_engine.interpreter import TENSOR
from esper_env.population.numba_engine.kernels import OPERATION, GradientMode, Kind
from esper_env.population.numba_engine.lanes import LANES

REGION = 150_000
"""Numbers in a region above which a chunk is one vector of images instead of two."""
SUPPORTED = (Conv, Norm, Relu, SqueezeExcite)


class SeedState(NamedTuple):
    """State of a running seed, as far as a program depends on it."""

    blueprint: int
    blend: int
    is_isolated: bool
    is_frozen: bool


class Composition(NamedTuple):
    """Everything that a member's program depends on; the key of the program cache."""

    width: int
    """Index into `Layout.hosts`."""
    batch: int
    """Images per batch."""
    seeds: tuple[SeedState | None, ...]
    """Seed of each slot, None where none runs."""
    networks: tuple[tuple[int, ...], ...] = ()
    """Networks to evaluate, each a label of the blend weight of every slot. Equal labels are equal
    weights, 0 is weight 0. Empty for training."""


@dataclass(frozen=True)
class Program:
    """Operations of one composition, and the tensors that they train."""

    ops: npt.NDArray[np.void]
    """Records of `kernels.OPERATION`. (n,)."""
    columns: npt.NDArray[np.int32]
    """Positions of all trained numbers in a member's row, tensor by tensor."""
    tensors: npt.NDArray[np.void]
    """Records of `interpreter.TENSOR`. (tensors,)."""
    arena: int
    """Length of the arena of one chunk."""
    chunk: int
    """Images in a chunk, at most."""
    cost: int
    """Estimated time per image [multiply-adds], to balance threads."""


def is_supported(layers: Sequence[Layer]) -> bool:
    """Return whether kernels exist for all layers."""
    return all(
        type(layer) in SUPPORTED
        and not (isinstance(layer, Conv) and layer.kernel_size not in (1, 3))
        for layer in layers
    )


def chunk_size(host: Host) -> int:
    """Return how many images run at a time: one or two vectors, so that they fit into the cache.

    Args:
        host: The widest host.
    """
    numbers = max(
        channels * (host.slot_size(slot) + 2) ** 2 for slot, channels in enumerate(host.channels)
    )
    return LANES if 2 * LANES * numbers > REGION else 2 * LANES


class ProgramBuilder:
    """Builds one program.

    Args:
        layout: Offsets of all tensors in a member's row.
        composition: Composition of the member.
    """

    def __init__(self, layout: Layout, composition: Composition) -> None:
        self._layout, self._composition = layout, composition
        self._host = layout.hosts[composition.width]
        self._chunk = min(composition.batch, chunk_size(layout.host))
        self._ops: list[dict[str, int]] = []
        self._cursor = 0
        self._image = self._region(self._host.in_channels, self._host.image_size)
        self._tensors: list[tuple[IntArray, int, int, bool]] = []
        """Columns, module, index and `is_frozen` of each trained tensor."""

    def build(self) -> Program:
        """Return the program of a training batch, or of an evaluation if networks are given."""
        if networks := self._composition.networks:
            self._evaluate_from(0, self._image, range(len(networks)))
            self._tensors.clear()  # An evaluation trains nothing.
        else:
            self._train()
        blank = dict.fromkeys(OPERATION.fields or (), 0)
        stops = np.cumsum([0, *(len(columns) for columns, *_ in self._tensors)]).tolist()
        ranges = zip(stops[:-1], stops[1:], self._tensors, strict=True)
        none = np.zeros(0, dtype=np.int32)
        return Program(
            ops=np.array([tuple((blank | op).values()) for op in self._ops], dtype=OPERATION),
            columns=np.concatenate([none, *(c.astype(np.int32) for c, *_ in self._tensors)]),
            tensors=np.array([(*ends, *rest) for *ends, (_, *rest) in ranges], dtype=TENSOR),
            arena=self._cursor,
            chunk=self._chunk,
            cost=sum(self._cost(op) for op in self._ops),
        )

    def _train(self) -> None:
        """Append the one network that is trained."""
        x = self._image
        for slot, seed in enumerate(self._composition.seeds):
            x = self._block(slot, x)
            if seed is not None:
                x = self._mix(slot, seed, x, *self._branch(slot, seed, x))
            x = self._pool(slot, x)
        self._head(x, 0)
        host = self._host
        layers = [layer for i in range(host.num_slots) for layer in host.block(i)]
        shapes = [s.shape for layer in layers for s in layer.parameters]
        shapes += [s.shape for s in host.head]
        self._add_trained(self._layout.host_columns()[0], shapes, 0)
        self._choose_modes()

    def _evaluate_from(self, slot: int, x: int, rows: Iterable[int]) -> None:
        """Append all networks of an evaluation from `slot` on, computing what they share once.

        Args:
            slot: First slot to append; the networks have equal weights in all earlier ones.
            x: Region of the features before it.
            rows: Indices of the networks.
        """
        rows = list(rows)
        if slot == self._host.num_slots:
            self._head(x, rows[0])
            return
        networks, seed = self._composition.networks, self._composition.seeds[slot]
        x = self._block(slot, x)
        labels = sorted({networks[row][slot] for row in rows})
        branch = (-1, -1)
        if seed is not None and labels != [0]:
            branch = self._branch(slot, seed, x)
        for label in labels:
            own = [row for row in rows if networks[row][slot] == label]
            mixed = x
            if label and seed is not None:
                mixed = self._mix(slot, seed, x, *branch)
                self._ops[-1]["row"] = own[0]
            self._evaluate_from(slot + 1, self._pool(slot, mixed), own)

    # ------------------------------------------------------------------ parts of a network

    def _block(self, slot: int, x: int) -> int:
        """Append the host's block before a slot; return the region of its output."""
        channels = (self._host.in_channels, *self._host.channels)[slot]
        return self._layers(self._layout.blocks[slot], self._host.block(slot), x, channels, slot)

    def _branch(self, slot: int, seed: SeedState, x: int) -> tuple[int, int]:
        """Append the seed's branch; return the regions of its output and its gate (-1: none)."""
        layout, channels = self._layout, self._host.channels[slot]
        placed = layout.seeds[slot][seed.blueprint]
        layers = layout.blueprints[seed.blueprint].build(channels)
        first, aux = len(self._ops), -1
        out = self._layers(placed, layers, x, channels, slot)
        self._ops[first]["is_isolated"] = int(seed.is_isolated)
        columns = [c for p in placed for c in p.parameters]
        shapes = [s.shape for layer in layers for s in layer.parameters]
        self._add_trained(columns, shapes, 1 + slot, is_frozen=seed.is_frozen)
        same = {"in_channels": channels, "side": self._host.slot_size(slot)}
        if seed.blend == Blend.MULTIPLY:
            self._add(Kind.TANH, src=out, **same)
        elif seed.blend == Blend.GATE:
            gate = layout.gates[slot]
            start = layout.max_seed_tensors - len(gate)
            self._add_trained(gate, [(channels,), (1,)], 1 + slot, start, seed.is_frozen)
            aux = self._take((channels + 1) * self._chunk)
            offsets = {"weight": gate[0].offset, "bias": gate[1].offset}
            self._add(Kind.GATE, src=x, aux=aux, **same, **offsets)
        return out, aux

    def _layers(
        self,
        placed: Sequence[PlacedLayer],
        layers: Sequence[Layer],
        x: int,
        channels: int,
        slot: int,
    ) -> int:
        """Append layers that read `channels` channels at `x`; return the region of their output."""
        side = self._host.slot_size(slot)
        for i, (layer, tensors) in enumerate(zip(layers, placed, strict=True)):
            if isinstance(layer, Relu) and i and isinstance(layers[i - 1], Norm):
                self._ops[-1]["rectify"] = 1  # Fused into the norm, so features are read once.
                continue
            fields = {"src": x, "side": side, "in_channels": channels}
            channels = layer.out_channels if isinstance(layer, Conv) else channels
            fields["dst"] = x = self._region(channels, side)
            offsets = [c.offset for c in tensors.parameters]
            shapes = [c.spec.shape for c in tensors.parameters]
            if isinstance(layer, Conv):
                fields |= {"kernel_size": layer.kernel_size, "groups": layer.groups}
                fields |= {"weight": offsets[0], "bias": offsets[1] if layer.bias else -1}
                stride = math.prod(shapes[0][1:])
                self._add(Kind.CONV, **fields, out_channels=channels, stride=stride)
            elif isinstance(layer, Norm):
                fields |= {"weight": offsets[0], "bias": offsets[1]}
                mean, var = (c.offset for c in tensors.buffers)
                aux = self._take(2 * channels)
                self._add(Kind.NORM, **fields, aux=aux, running_mean=mean, running_var=var)
            elif isinstance(layer, Relu):
                self._add(Kind.RELU, **fields)
            elif isinstance(layer, SqueezeExcite):
                aux = self._take((3 * channels + 2 * layer.hidden) * self._chunk)
                fields |= {"weight": offsets[0], "stride": shapes[0][1], "bias": offsets[1]}
                fields |= {"weight_2": offsets[2], "stride_2": shapes[2][1], "bias_2": offsets[3]}
                self._add(Kind.EXCITE, **fields, hidden=layer.hidden, aux=aux)
            else:
                raise TypeError(f"no kernel exists for a layer of type {type(layer).__name__}")
        return x

    def _mix(self, slot: int, seed: SeedState, x: int, branch: int, aux: int) -> int:
        """Append the blend of features and branch; return the region of its output."""
        channels, side = self._host.channels[slot], self._host.slot_size(slot)
        weight, bias = self._layout.gates[slot]
        out = self._region(channels, side)
        self._add(
            Kind.MIX,
            src=x, branch=branch, dst=out, in_channels=channels, side=side, slot=slot,
            blend=seed.blend, weight=weight.offset, bias=bias.offset, aux=max(aux, 0),
            is_isolated=int(seed.is_isolated),
        )  # fmt: skip
        return out

    def _pool(self, slot: int, x: int) -> int:
        """Append the 2x2 max-pool after a slot; return the region of its output."""
        channels, side = self._host.channels[slot], self._host.slot_size(slot)
        out = self._region(channels, side // 2)
        last = self._ops[-1]
        is_norm = last["kind"] == Kind.NORM and last["dst"] == x and "rectify" in last
        if is_norm and self._composition.seeds[slot] is None and side % 2 == 0:
            # Nothing else reads the features between them.
            last |= {"kind": Kind.NORM_POOL, "dst": out}
            return out
        self._add(Kind.POOL, src=x, dst=out, in_channels=channels, side=side)
        return out

    def _head(self, x: int, row: int) -> None:
        """Append the classifier of network `row`."""
        host, batch = self._host, self._chunk
        weight, bias = self._layout.head
        self._add(
            Kind.CLASSIFY,
            src=x, in_channels=host.channels[-1], out_channels=host.num_classes,
            side=host.image_size >> host.num_slots, weight=weight.offset, bias=bias.offset,
            stride=weight.spec.shape[1], row=row,
            aux=self._take((host.channels[-1] + host.num_classes + 3) * batch),
        )  # fmt: skip

    # ------------------------------------------------------------------ bookkeeping

    def _add(self, kind: Kind, **fields: int) -> None:
        """Append an operation; fields that are not given are 0."""
        self._ops.append({"kind": kind, **fields})

    def _add_trained(
        self,
        columns: Sequence[Column],
        shapes: Sequence[tuple[int, ...]],
        module: int,
        start: int = 0,
        is_frozen: bool = False,
    ) -> None:
        """Register tensors as trained.

        Args:
            columns: Tensors of the widest member.
            shapes: Shapes of this member's leading corner of each.
            module: 0 for the host, 1 + slot for a seed.
            start: Index of the first tensor among those of its module.
            is_frozen: Whether only gradients are measured.
        """
        for i, (column, shape) in enumerate(zip(columns, shapes, strict=True)):
            index = column.offset + corner(column.spec.shape, shape)
            self._tensors.append((index, module, start + i, is_frozen))

    def _choose_modes(self) -> None:
        """Let the last reader of a region assign its gradient, and earlier readers add to it.

        The backward pass runs in reverse, so the last reader comes first. No gradient goes to the
        image, nor from an isolated branch to the host's features.
        """
        assigned: set[int] = set()
        for op in reversed(self._ops):
            if op["kind"] in (Kind.TANH, Kind.GATE):
                continue  # The backward pass of MIX includes theirs.
            src, mode = op["src"], GradientMode.ASSIGN
            if src == self._image or (op["kind"] != Kind.MIX and op.get("is_isolated")):
                mode = GradientMode.NONE
            elif src in assigned:
                mode = GradientMode.ACCUMULATE
            op["mode"] = mode
            if mode != GradientMode.NONE:
                assigned.add(src)

    def _cost(self, op: dict[str, int]) -> int:
        """Return the multiply-adds of a convolution, or 4 per feature of another operation."""
        features = op["in_channels"] * op["side"] ** 2
        if op["kind"] != Kind.CONV:
            return 4 * features
        return features * op["out_channels"] // op["groups"] * op["kernel_size"] ** 2

    def _region(self, channels: int, side: int) -> int:
        """Reserve (channels, side + 2, side + 2, batch) numbers; return the offset."""
        return self._take(channels * (side + 2) ** 2 * self._chunk)

    def _take(self, count: int) -> int:
        """Reserve `count` numbers of the arena at a multiple of 64 bytes; return the offset."""
        offset = self._cursor
        self._cursor += -(-count // 16) * 16
        return offset
