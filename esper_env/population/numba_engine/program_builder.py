"""Networks as lists of operations for `interpreter`: what a member computes, region by region.

A tape depends on the composition of a member alone (its width, and the kind and state of its
seeds), so members of one composition share it, and building it is rare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from esper_env.config import Blend, BoolArray, IntArray
from esper_env.population.layers import Conv, Layer, Norm, Relu, SqueezeExcite
from esper_env.population.layout import Column, Layout, PlacedLayer, corner
from esper_env.population.numba_engine.kernels import OPERATION, GradientMode, Kind

SUPPORTED = (Conv, Norm, Relu, SqueezeExcite)


@dataclass(frozen=True)
class SeedState:
    """A seed that runs, as far as a tape depends on it."""

    blueprint: int
    blend: int
    is_isolated: bool
    is_frozen: bool


@dataclass(frozen=True)
class Tape:
    """The operations of one composition."""

    ops: npt.NDArray[np.void]
    """(n,) records of `kernels.OPERATION`."""
    arena: int
    """Numbers that the regions take."""
    cost: int
    """Multiply-adds and visits of a feature per image, to share work out."""
    index: npt.NDArray[np.int32]
    """Positions in the row of all trained parameters, tensor by tensor."""
    ends: IntArray
    """Where each tensor ends in `index`."""
    module: IntArray
    """0 for the host's tensors, 1 + slot for a seed's."""
    tensor: IntArray
    """Position of a seed's tensor among its tensors, -1 for the host's."""
    is_frozen: BoolArray
    """Which modules keep still. (1 + slots,)."""


def is_supported(layers: Sequence[Layer]) -> bool:
    """Return whether kernels exist for all layers."""
    return all(
        type(layer) in SUPPORTED
        and not (isinstance(layer, Conv) and layer.kernel_size not in (1, 3))
        for layer in layers
    )


class TapeBuilder:
    """Builds tapes for members of one layout and width.

    Args:
        layout: Of the widest members.
        width: Index into `layout.hosts`.
        batch: Images side by side.
    """

    def __init__(self, layout: Layout, width: int, batch: int) -> None:
        self._layout, self._batch = layout, batch
        self._host = layout.hosts[width]
        self._ops: list[dict[str, int]] = []
        self._cursor = 0
        self._image = self._region(self._host.in_channels, self._host.image_size)
        self._tensors: list[tuple[IntArray, int, int]] = []
        self._channels = self._host.in_channels

    # ------------------------------------------------------------------ the two kinds of tape

    def training(self, seeds: Sequence[SeedState | None]) -> Tape:
        """Return the tape of a training batch; `seeds` are those that run, by slot."""
        x = self._image
        for slot, seed in enumerate(seeds):
            x = self._block(slot, x)
            if seed is not None:
                x = self._mix(slot, seed, x, *self._branch(slot, seed, x))
            x = self._pool(slot, x)
        self._head(x, 0)
        self._train_host()
        self._choose_modes()
        frozen = [seed is not None and seed.is_frozen for seed in seeds]
        return self._finish([False, *frozen])

    def evaluation(self, seeds: Sequence[SeedState | None], rows: Sequence[Sequence[int]]) -> Tape:
        """Return the tape of networks that differ in blend weights; what they share is run once.

        Args:
            seeds: Seeds with weight in some of the networks, by slot.
            rows: Per network and slot a label of its blend weight; equal labels are equal weights,
                0 is no weight.
        """
        self._evaluate_from(0, self._image, seeds, rows, list(range(len(rows))))
        self._tensors.clear()  # Nothing is trained.
        return self._finish([False] * (1 + self._host.num_slots))

    def _evaluate_from(
        self,
        slot: int,
        x: int,
        seeds: Sequence[SeedState | None],
        rows: Sequence[Sequence[int]],
        members: list[int],
    ) -> None:
        """Run the blocks from `slot` on for some networks that agree on everything before it."""
        if slot == self._host.num_slots:
            self._head(x, members[0])
            return
        x = self._block(slot, x)
        labels = sorted({rows[i][slot] for i in members})
        seed, branch = seeds[slot], (-1, -1)
        if seed is not None and labels != [0]:
            branch = self._branch(slot, seed, x)
        for label in labels:
            own = [i for i in members if rows[i][slot] == label]
            mixed = x
            if label and seed is not None:
                mixed = self._mix(slot, seed, x, *branch)
                self._ops[-1]["row"] = own[0]
            self._evaluate_from(slot + 1, self._pool(slot, mixed), seeds, rows, own)

    # ------------------------------------------------------------------ parts of a network

    def _block(self, slot: int, x: int) -> int:
        return self._layers(self._layout.blocks[slot], self._host.block(slot), x, slot)

    def _branch(self, slot: int, seed: SeedState, x: int) -> tuple[int, int]:
        """Return the regions of the branch's output and of its gate, -1 if it has none."""
        layout, channels = self._layout, self._host.channels[slot]
        placed = layout.seeds[slot][seed.blueprint]
        layers = layout.blueprints[seed.blueprint].build(channels)
        first, aux = len(self._ops), -1
        out = self._layers(placed, layers, x, slot)
        self._ops[first]["is_isolated"] = int(seed.is_isolated)
        columns = [c for p in placed for c in p.parameters]
        shapes = [s.shape for layer in layers for s in layer.parameters]
        self._train(columns, shapes, 1 + slot, 0)
        size = self._host.slot_size(slot)
        if seed.blend == Blend.MULTIPLY:
            op = {"kind": Kind.TANH, "src": out, "in_channels": channels, "size": size}
            self._ops.append(op)
        elif seed.blend == Blend.GATE:
            gate = layout.gates[slot]
            self._train(gate, [(channels,), (1,)], 1 + slot, layout.max_seed_tensors - len(gate))
            aux = self._take((channels + 1) * self._batch)
            op = {"kind": Kind.GATE, "src": x, "in_channels": channels, "size": size, "aux": aux}
            self._ops.append(op | {"weight": gate[0].offset, "bias": gate[1].offset})
        return out, aux

    def _layers(
        self, placed: Sequence[PlacedLayer], layers: Sequence[Layer], x: int, slot: int
    ) -> int:
        size, i = self._host.slot_size(slot), 0
        while i < len(layers):
            layer, tensors = layers[i], placed[i]
            offsets = [c.offset for c in tensors.parameters]
            op = {"src": x, "size": size}
            if isinstance(layer, Conv):
                stride = tensors.parameters[0].spec.size // tensors.parameters[0].spec.shape[0]
                x = self._region(layer.out_channels, size)
                op |= {"kind": Kind.CONV, "in_channels": layer.in_channels, "stride": stride}
                op |= {"out_channels": layer.out_channels, "kernel_size": layer.kernel_size}
                op |= {"groups": layer.groups, "weight": offsets[0]}
                op["bias"] = offsets[1] if layer.bias else -1
                self._channels = layer.out_channels
            elif isinstance(layer, Norm):
                x = self._region(layer.channels, size)
                op |= {"kind": Kind.NORM, "in_channels": layer.channels, "weight": offsets[0]}
                op |= {"bias": offsets[1], "aux": self._take(2 * layer.channels)}
                op |= {"mean": tensors.buffers[0].offset, "var": tensors.buffers[1].offset}
                self._channels = layer.channels
                if i + 1 < len(layers) and isinstance(layers[i + 1], Relu):
                    op["rectify"] = 1
                    i += 1
            elif isinstance(layer, Relu):
                x = self._region(self._channels, size)
                op |= {"kind": Kind.RELU, "in_channels": self._channels}
            else:
                assert isinstance(layer, SqueezeExcite)
                c, h = layer.channels, layer.hidden
                x = self._region(c, size)
                op |= {"kind": Kind.EXCITE, "in_channels": c, "hidden": h}
                op["aux"] = self._take((3 * c + 2 * h) * self._batch)
                op |= {"weight": offsets[0], "bias": offsets[1]}
                op |= {"weight_2": offsets[2], "bias_2": offsets[3]}
                op["stride"] = tensors.parameters[0].spec.shape[1]
                op["stride_2"] = tensors.parameters[2].spec.shape[1]
            op["dst"] = x
            self._ops.append(op)
            i += 1
        return x

    def _mix(self, slot: int, seed: SeedState, x: int, branch: int, aux: int) -> int:
        channels, size = self._host.channels[slot], self._host.slot_size(slot)
        gate = self._layout.gates[slot]
        out = self._region(channels, size)
        op = {"kind": Kind.MIX, "src": x, "dst": out, "branch": branch, "size": size}
        op |= {"in_channels": channels, "slot": slot, "blend": seed.blend}
        op |= {"weight": gate[0].offset, "bias": gate[1].offset}
        self._ops.append(op | {"aux": max(aux, 0), "is_isolated": int(seed.is_isolated)})
        return out

    def _pool(self, slot: int, x: int) -> int:
        channels, size = self._host.channels[slot], self._host.slot_size(slot)
        out = self._region(channels, size // 2)
        op = {"kind": Kind.POOL, "src": x, "dst": out, "in_channels": channels, "size": size}
        self._ops.append(op)
        return out

    def _head(self, x: int, row: int) -> None:
        host = self._host
        weight, bias = self._layout.head
        op = {"kind": Kind.CLASSIFY, "src": x, "in_channels": host.channels[-1], "row": row}
        op |= {"out_channels": host.num_classes, "size": host.image_size >> host.num_slots}
        op |= {"weight": weight.offset, "bias": bias.offset, "stride": weight.spec.shape[1]}
        op["aux"] = self._take((host.channels[-1] + host.num_classes) * self._batch)
        self._ops.append(op)

    # ------------------------------------------------------------------ bookkeeping

    def _train_host(self) -> None:
        """Register all tensors of the host as trained."""
        host = self._host
        layers = [layer for i in range(host.num_slots) for layer in host.block(i)]
        shapes = [s.shape for layer in layers for s in layer.parameters]
        shapes += [s.shape for s in host.head]
        self._train(self._layout.host_columns()[0], shapes, 0, -1)

    def _train(
        self, columns: Sequence[Column], shapes: Sequence[tuple[int, ...]], module: int, first: int
    ) -> None:
        for i, (column, shape) in enumerate(zip(columns, shapes, strict=True)):
            index = column.offset + corner(column.spec.shape, shape)
            self._tensors.append((index, module, first + i if module else -1))

    def _choose_modes(self) -> None:
        """The last reader of a region assigns its gradient, earlier ones add to it."""
        assigned: set[int] = set()
        for op in reversed(self._ops):
            if op["kind"] in (Kind.TANH, Kind.GATE):
                continue  # MIX works out their gradients.
            src, mode = op["src"], GradientMode.ASSIGN
            is_detached = src == self._image or (op["kind"] != Kind.MIX and op.get("is_isolated"))
            if is_detached:
                mode = GradientMode.NONE
            elif src in assigned:
                mode = GradientMode.ACCUMULATE
            op["mode"] = mode
            if mode != GradientMode.NONE:
                assigned.add(src)

    def _cost(self, op: dict[str, int]) -> int:
        features = op["in_channels"] * op["size"] ** 2
        if op["kind"] != Kind.CONV:
            return 4 * features
        return features * op["out_channels"] // op["groups"] * op["kernel_size"] ** 2

    def _region(self, channels: int, size: int) -> int:
        return self._take(channels * (size + 2) ** 2 * self._batch)

    def _take(self, count: int) -> int:
        """Reserve numbers of the arena, aligned to 64 bytes."""
        offset = self._cursor
        self._cursor += -(-count // 16) * 16
        return offset

    def _finish(self, is_frozen: Sequence[bool]) -> Tape:
        blank = dict.fromkeys(OPERATION.fields or (), 0)
        ops = np.array([tuple((blank | op).values()) for op in self._ops], dtype=OPERATION)
        none = np.zeros(0, dtype=np.int32)
        return Tape(
            ops=ops,
            arena=self._cursor,
            cost=sum(self._cost(op) for op in self._ops),
            index=np.concatenate([none, *(i.astype(np.int32) for i, _, _ in self._tensors)]),
            ends=np.cumsum([len(index) for index, _, _ in self._tensors], dtype=np.int64),
            module=np.array([module for _, module, _ in self._tensors], dtype=np.int64),
            tensor=np.array([tensor for _, _, tensor in self._tensors], dtype=np.int64),
            is_frozen=np.array(is_frozen, dtype=bool),
        )
