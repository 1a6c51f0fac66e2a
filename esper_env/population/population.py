"""Training and evaluation of many growing hosts as one tensor program.

The population knows members, slots, blueprints and blend weights; it knows nothing of stages,
actions or rewards. Per env step it makes one copy of results to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from esper_env import streams
from esper_env.config import Blend, BoolArray, FloatArray, IntArray
from esper_env.population.blueprints import Blueprint
from esper_env.population.hosts import Host
from esper_env.population.images import ImageSet
from esper_env.population.layers import Conv, Norm
from esper_env.population.layout import Column, Layout, PlacedLayer
from esper_env.population.optimizer import ModuleSGD, SGDSettings, WorkingSet
from esper_env.population.slots import (
    GatherMembers,
    Group,
    Mix,
    MixResiduals,
    gates,
    residual,
)

CHUNK_BYTES = 4 * 2**20
"""Activations of one block that a chunk may have, by default: about what stays in cache."""


@dataclass(frozen=True)
class Seeds:
    """The seeds of all members, as the population sees them. Arrays are (members, slots)."""

    blueprint: IntArray
    """Index into the registry, -1 where there is none."""
    blend: IntArray
    """Values of `Blend`."""
    alpha: FloatArray
    """Weight in the forward pass, 0 to 1."""
    beta: FloatArray
    """Weight of the gradient that reaches the seed, 0 to 1; 0 means that it does not run."""
    is_isolated: BoolArray
    """Whether the seed's input is detached."""
    is_frozen: BoolArray
    """Whether its parameters keep still."""


@dataclass(frozen=True)
class TrainReport:
    """What one env step of training measured."""

    loss: FloatArray
    """Mean training loss. (m,) [nats]."""
    seed_gradient_norms: FloatArray
    """Norm of each tensor's gradient before clipping, root mean square over the batches; NaN where
    there is no such tensor. (m, slots, max_tensors)."""


@dataclass(frozen=True)
class Evaluation:
    """Accuracy and loss of some networks on one split. Arrays are (rows,)."""

    accuracy: FloatArray
    loss: FloatArray


class Population:
    """`num_members` hosts with their seeds.

    Args:
        host: Shape of every host.
        blueprints: The registry.
        num_members: How many hosts.
        settings: Optimiser rules.
        device: Where all tensors live.
        batch_size: Images per training batch; used for the default chunk size.
        chunk_size: Members per tensor program, or None for as many as fit `CHUNK_BYTES`.
    """

    def __init__(
        self,
        host: Host,
        blueprints: Sequence[Blueprint],
        num_members: int,
        settings: SGDSettings,
        device: torch.device,
        batch_size: int,
        chunk_size: int | None,
    ) -> None:
        self.layout = Layout(host, blueprints)
        self.num_members = num_members
        self.settings = settings
        self.device = device
        largest = max(c * host.slot_size(i) ** 2 for i, c in enumerate(host.channels))
        self._feature_bytes = 4 * largest
        fitting = CHUNK_BYTES // (self._feature_bytes * batch_size)
        self.chunk_size = min(num_members, chunk_size or max(1, fitting))
        width, buffers = self.layout.num_parameters, self.layout.num_buffers
        self.parameters = torch.zeros(num_members, width, device=device)
        self.momentum = torch.zeros(num_members, width, device=device)
        self.buffers = torch.zeros(num_members, buffers, device=device)
        registry = self.layout.blueprints
        self.seed_parameters: IntArray = np.array(
            [[b.num_parameters(c) for b in registry] for c in host.channels]
        )
        """Parameters of each blueprint in each slot, without gate. (slots, blueprints)."""
        self.gate_parameters: IntArray = np.array([c + 1 for c in host.channels])
        """Parameters of a gate in each slot. (slots,)."""
        self.seed_multiply_adds: IntArray = np.array(
            [
                [b.multiply_adds(c, host.slot_size(i), host.slot_size(i)) for b in registry]
                for i, c in enumerate(host.channels)
            ]
        )
        """Multiply-adds per image of each blueprint in each slot. (slots, blueprints)."""
        self._max_tensors = max(
            len(self.layout.seed_columns(s, b)[0])
            for s in range(host.num_slots)
            for b in range(len(registry))
        )
        self._programs: dict[int, tuple[bytes, _Program]] = {}

    def reset(self, members: IntArray, key: streams.KeyArray) -> None:
        """Give members fresh hosts and empty slots.

        Args:
            members: Which. (m,).
            key: Stream of each member's initial weights. (m,) uint64.
        """
        for matrix in (self.parameters, self.momentum, self.buffers):
            matrix[torch.from_numpy(members).to(self.device)] = 0
        self._initialise(members, key, *self.layout.host_columns())

    def germinate(
        self, members: IntArray, slots: IntArray, blueprints: IntArray, key: streams.KeyArray
    ) -> None:
        """Build seeds: initial weights, gate, no momentum. All arrays are (m,)."""
        for slot, blueprint in set(zip(slots.tolist(), blueprints.tolist(), strict=True)):
            here = (slots == slot) & (blueprints == blueprint)
            columns = self.layout.seed_columns(slot, blueprint)
            self._initialise(members[here], key[here], *columns)

    # A caller may step the environment inside no_grad or inference_mode.
    @torch.inference_mode(False)
    @torch.enable_grad()
    def train(
        self,
        members: IntArray,
        seeds: Seeds,
        images: ImageSet,
        indices: IntArray,
        host_rate: FloatArray,
        seed_rate: FloatArray,
    ) -> TrainReport:
        """Train members for some batches.

        Args:
            members: Which. (m,).
            seeds: Seeds of the whole population.
            images: The training split.
            indices: Images of each batch. (batches, batch_size, m).
            host_rate: Learning rate of each member's host. (m,).
            seed_rate: Learning rate of each member's seeds. (m,).

        Returns:
            Measurements of these members.
        """
        losses, squares, programs = [], [], []
        for start in range(0, len(members), self.chunk_size):
            part = slice(start, start + self.chunk_size)
            program = self._program(start, members[part], seeds, host_rate[part], seed_rate[part])
            batch_index = torch.from_numpy(np.ascontiguousarray(indices[:, :, part]))
            loss, square = program.train(seeds, *images.batches(batch_index.to(self.device)))
            losses.append(loss)
            squares.append(square)
            programs.append(program)
        result = torch.cat([*losses, *squares]).cpu().numpy().astype(np.float64)
        num_slots = self.layout.host.num_slots
        norms = np.full((self.num_members, num_slots, self._max_tensors), np.nan)
        start = len(members)
        for program, square in zip(programs, squares, strict=True):
            values = np.sqrt(result[start : start + len(square)])
            start += len(square)
            measured = values[program.seed_segments]
            norms[program.segment_at] = np.where(np.isnan(measured), np.inf, measured)
        return TrainReport(loss=result[: len(members)], seed_gradient_norms=norms[members])

    @torch.inference_mode()
    def evaluate(
        self, members: IntArray, alpha: FloatArray, seeds: Seeds, images: ImageSet
    ) -> Evaluation:
        """Evaluate networks that share weights with members but have blend weights of their own.

        What several networks of one member have in common up to a slot is computed once.

        Args:
            members: The member whose weights each network has. (rows,).
            alpha: Blend weight of each slot; 0 leaves a seed out. (rows, slots).
            seeds: Blueprints and blends of the whole population.
            images: The split, the same images for all.

        Returns:
            Accuracy [0 to 1] and mean loss [nats] per row.
        """
        correct, loss = [], []
        distinct = np.unique(members)
        for start in range(0, len(distinct), self.chunk_size):
            part = distinct[start : start + self.chunk_size]
            rows = np.nonzero(np.isin(members, part))[0]
            tree = _Tree(self, members[rows], alpha[rows], seeds)
            per_image = self._feature_bytes * len(part)
            step = max(1, min(len(images), 2 * CHUNK_BYTES // per_image))
            chunk_correct = torch.zeros(len(rows), device=self.device)
            chunk_loss = torch.zeros(len(rows), device=self.device)
            for first in range(0, len(images), step):
                last = min(first + step, len(images))
                logits = tree.forward(images.normalised(first, last))
                labels = images.labels[first:last].expand(len(rows), -1)
                chunk_correct += (logits.argmax(2) == labels).sum(1)
                chunk_loss += _cross_entropy(logits, labels).sum(1)
            order = torch.from_numpy(rows)
            correct.append((order, chunk_correct))
            loss.append(chunk_loss)
        stacked = torch.stack([torch.cat([c for _, c in correct]), torch.cat(loss)]).cpu()
        result = np.empty((2, len(members)))
        result[:, np.concatenate([order.numpy() for order, _ in correct])] = stacked.numpy()
        result /= len(images)
        return Evaluation(accuracy=result[0], loss=result[1])

    def _initialise(
        self,
        members: IntArray,
        key: streams.KeyArray,
        parameters: Sequence[Column],
        buffers: Sequence[Column],
    ) -> None:
        """Write start values of the given columns and clear their momentum."""
        if not len(members):
            return
        rows = torch.from_numpy(members).to(self.device)[:, None]
        for matrix, columns in ((self.parameters, parameters), (self.buffers, buffers)):
            if not columns:
                continue
            index = np.concatenate([c.offset + np.arange(c.spec.size) for c in columns])
            value = np.concatenate([np.full(c.spec.size, c.spec.value) for c in columns])
            bound = np.concatenate([np.full(c.spec.size, c.spec.bound) for c in columns])
            start = value + bound * (2 * streams.uniform(key, len(index)) - 1)
            at = torch.from_numpy(index).to(self.device)
            matrix[rows, at] = torch.from_numpy(start.astype(np.float32)).to(self.device)
            if matrix is self.parameters:
                self.momentum[rows, at] = 0

    def _program(
        self,
        position: int,
        members: IntArray,
        seeds: Seeds,
        host_rate: FloatArray,
        seed_rate: FloatArray,
    ) -> _Program:
        """Return the chunk's program, rebuilt only when its composition changed."""
        here = [
            array[members]
            for array in (seeds.blueprint, seeds.blend, seeds.is_isolated, seeds.is_frozen)
        ]
        runs = seeds.beta[members] > 0
        key = b"".join(a.tobytes() for a in (members, *here, runs, host_rate, seed_rate))
        known = self._programs.get(position)
        if known is None or known[0] != key:
            program = _Program(self, members, seeds, host_rate, seed_rate)
            self._programs[position] = known = (key, program)
        return known[1]


class _Program:
    """One chunk of members with one composition of seeds: its tensors, forward and optimiser."""

    def __init__(
        self,
        population: Population,
        members: IntArray,
        seeds: Seeds,
        host_rate: FloatArray,
        seed_rate: FloatArray,
    ) -> None:
        self.population = population
        self.members = members
        layout, device = population.layout, population.device
        self.trained = WorkingSet(layout.num_parameters, device)
        self.running = WorkingSet(layout.num_buffers, device)
        m, num_slots = len(members), layout.host.num_slots
        # Modules: the m hosts, then the seed of member i in slot s as m * (1 + s) + i.
        num_modules = m * (1 + num_slots)
        rate = np.tile(seed_rate, 1 + num_slots)
        rate[:m] = host_rate
        decay = np.zeros(num_modules)
        decay[:m] = population.settings.weight_decay
        is_frozen = np.zeros(num_modules, dtype=bool)
        is_frozen[m:] = seeds.is_frozen[members].T.reshape(-1)
        modules: list[IntArray] = []
        segment_tensor: list[IntArray] = []

        def add(local: IntArray, columns: Sequence[Column], slot: int, first: int) -> list[int]:
            """Add trained tensors of some members; `slot` -1 is the host."""
            positions = []
            for i, column in enumerate(columns):
                positions.append(self.trained.add(members[local], column))
                modules.append(m * (1 + slot) + local)
                segment_tensor.append(np.full(len(local), first + i if slot >= 0 else -1))
            return positions

        def place(local: IntArray, layers: Sequence[PlacedLayer], slot: int) -> list[_Run]:
            runs, first = [], 0
            for placed in layers:
                buffers = [self.running.add(members[local], c) for c in placed.buffers]
                runs.append(_Run(placed, add(local, placed.parameters, slot, first), buffers))
                first += len(placed.parameters)
            return runs

        everyone = np.arange(m)
        self.blocks = [place(everyone, block, -1) for block in layout.blocks]
        self.slots: list[_SlotProgram | None] = []
        for slot in range(num_slots):
            slot_seeds = _group_members(
                seeds.blueprint[members, slot],
                seeds.blend[members, slot],
                seeds.beta[members, slot] > 0,
            )
            if not slot_seeds:
                self.slots.append(None)
                continue
            branches, gated = [], []
            for blueprint, local, num_gate, num_multiply in slot_seeds:
                branch = place(local, layout.seeds[slot][blueprint], slot)
                group = Group(
                    torch.from_numpy(local).to(device), num_gate, num_multiply, len(gated)
                )
                gated += local[group.gate_slice].tolist()
                isolated = seeds.is_isolated[members[local], slot]
                branches.append(
                    _Branch(group, local, branch, isolated, layout.host.channels[slot], device)
                )
            gate_local = np.array(gated, dtype=np.int64)
            gate = None
            if gated:
                first = population._max_tensors - len(layout.gates[slot])
                gate = _Gate(
                    torch.from_numpy(gate_local).to(device),
                    add(gate_local, layout.gates[slot], slot, first),
                    torch.from_numpy(seeds.is_isolated[members[gate_local], slot]).to(device),
                )
            self.slots.append(_SlotProgram(slot, layout.host.channels[slot], branches, gate))
        self.head = add(everyone, layout.head, -1, 0)
        self.trained.freeze()
        self.running.freeze()
        self.sgd = ModuleSGD(
            self.trained,
            modules,
            rate.astype(np.float32),
            decay.astype(np.float32),
            is_frozen,
            population.settings,
        )
        # Where each seed tensor's gradient norm belongs in (member, slot, tensor).
        tensor = np.concatenate(segment_tensor)
        module = np.concatenate(modules)
        self.seed_segments = np.nonzero(tensor >= 0)[0]
        owner = module[self.seed_segments]
        self.segment_at = (
            members[owner % m],
            owner // m - 1,
            tensor[self.seed_segments],
        )

    def train(self, seeds: Seeds, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Train on some batches.

        Args:
            seeds: For the present alphas and betas.
            images: (batches, batch_size, height, width, m * channels).
            labels: (batches, m, batch_size).

        Returns:
            Mean loss of each member (m,), and the mean over batches of each segment's squared
            gradient norm (segments,).
        """
        population = self.population
        flat = self.trained.gather(population.parameters).requires_grad_()
        momentum = self.trained.gather(population.momentum)
        running = self.running.gather(population.buffers)
        buffers = self.running.views(running)
        mixes = [None if s is None else s.mix(self.members, seeds) for s in self.slots]
        total_loss = torch.zeros(len(self.members), device=population.device)
        total_squares = torch.zeros(len(self.sgd.lengths), device=population.device)
        for batch, label in zip(images, labels, strict=True):
            logits = self._forward(batch, self.trained.views(flat), buffers, mixes)
            loss = _cross_entropy(logits, label).mean(1)
            (gradient,) = torch.autograd.grad(loss.sum(), flat)
            with torch.no_grad():
                total_squares += self.sgd.step(flat, gradient, momentum)
                total_loss += loss
        with torch.no_grad():
            self.trained.scatter(population.parameters, flat, self.sgd.keep)
            self.trained.scatter(population.momentum, momentum, self.sgd.keep)
            self.running.scatter(population.buffers, running)
        return total_loss / len(images), total_squares / len(images)

    def _forward(
        self,
        batch: Tensor,
        parameters: list[Tensor],
        buffers: list[Tensor],
        mixes: list[Mix | None],
    ) -> Tensor:
        """Return logits (m, batch_size, classes) in training mode."""
        m = len(self.members)
        x = batch.permute(0, 3, 1, 2)
        for block, slot, mix in zip(self.blocks, self.slots, mixes, strict=True):
            x = _run(block, x, parameters, buffers)
            if slot is not None:
                assert mix is not None
                x = _as_images(slot.forward(_as_members(x, m), mix, parameters, buffers))
            x = F.max_pool2d(x, 2)
        weight, bias = (parameters[i] for i in self.head)
        return _head(x, weight, bias)


@dataclass(frozen=True)
class _Run:
    """A layer of a program and the positions of its tensors among the views."""

    placed: PlacedLayer
    parameters: list[int]
    buffers: list[int]


class _Branch:
    """One group of seeds in one slot."""

    def __init__(
        self,
        group: Group,
        local: IntArray,
        layers: list[_Run],
        is_isolated: BoolArray,
        channels: int,
        device: torch.device,
    ) -> None:
        self.group = group
        self.local = local
        self.layers = layers
        self.is_isolated = bool(is_isolated.all())
        self.keep = None
        if is_isolated.any() and not self.is_isolated:
            self.keep = _spread(~is_isolated, channels, device)


@dataclass(frozen=True)
class _Gate:
    """The gates of one slot."""

    members: Tensor
    parameters: list[int]
    is_isolated: Tensor


@dataclass(frozen=True)
class _SlotProgram:
    """All seeds in one slot of a chunk."""

    slot: int
    channels: int
    branches: list[_Branch]
    gate: _Gate | None

    def mix(self, members: IntArray, seeds: Seeds) -> Mix:
        """Build the step's weights."""
        alphas, betas, visible = [], [], []
        for branch in self.branches:
            rows = members[branch.local]
            alpha = seeds.alpha[rows, self.slot]
            visible.append(bool((alpha > 0).any()))
            device = branch.group.members.device
            for target, values in ((alphas, alpha), (betas, seeds.beta[rows, self.slot])):
                is_one = bool((values == 1).all())
                target.append(None if is_one else _spread(values, self.channels, device))
        groups = tuple(branch.group for branch in self.branches)
        return Mix(groups, tuple(alphas), tuple(betas), tuple(visible))

    def forward(
        self, features: Tensor, mix: Mix, parameters: list[Tensor], buffers: list[Tensor]
    ) -> Tensor:
        """Run all branches and mix them in. (batch, height, width, members, channels)."""
        attached = [b for b in self.branches if not b.is_isolated]
        inputs: dict[int, Tensor] = {}
        if attached:
            gathered = GatherMembers.apply(
                features, [b.keep for b in attached], *(b.group.members for b in attached)
            )
            inputs = {id(b): x for b, x in zip(attached, gathered, strict=True)}
        detached = features.detach()
        outputs = []
        for branch in self.branches:
            x = inputs.get(id(branch))
            if x is None:
                x = detached.index_select(3, branch.group.members)
            out = _run(branch.layers, _as_images(x), parameters, buffers)
            outputs.append(_as_members(out, len(branch.local)))
        gate = None
        if self.gate is not None:
            pooled = features.mean(dim=(1, 2)).index_select(1, self.gate.members)
            pooled = torch.where(self.gate.is_isolated[:, None], pooled.detach(), pooled)
            weight, bias = (parameters[i] for i in self.gate.parameters)
            gate = gates(pooled, weight, bias)
        mixed: Tensor = MixResiduals.apply(features, gate, mix, *outputs)
        return mixed


class _Tree:
    """Networks of some members that differ in blend weights, evaluated with shared prefixes.

    Level s has one node per distinct (member, blend weights before slot s).
    """

    def __init__(
        self, population: Population, members: IntArray, alpha: FloatArray, seeds: Seeds
    ) -> None:
        layout, device = population.layout, population.device
        parameters, buffers = population.parameters, population.buffers
        nodes = np.unique(members)
        of_row = np.searchsorted(nodes, members)
        self.levels: list[_Level] = []
        for slot in range(layout.host.num_slots):
            rows = torch.from_numpy(nodes).to(device)
            host = _fold(layout.blocks[slot], rows, parameters, buffers)
            pairs = np.stack([of_row, alpha[:, slot]], axis=1)
            children, child_of_row = np.unique(pairs, axis=0, return_inverse=True)
            child_of_row = child_of_row.reshape(-1)
            parent = children[:, 0].astype(np.int64)
            weight = children[:, 1]
            has_branch = np.zeros(len(nodes), dtype=bool)
            has_branch[parent[weight != 0]] = True
            blueprint = np.where(has_branch, seeds.blueprint[nodes, slot], -1)
            branches = []
            for index, local, num_gate, num_multiply in _group_members(
                blueprint, seeds.blend[nodes, slot], has_branch
            ):
                group = Group(torch.from_numpy(local).to(device), num_gate, num_multiply, 0)
                rows = torch.from_numpy(nodes[local]).to(device)
                layers = _fold(layout.seeds[slot][index], rows, parameters, buffers)
                gated = rows[group.gate_slice]
                gate = [_take(parameters, gated, c) for c in layout.gates[slot]]
                # Children that this group contributes to, and from which of its nodes.
                place = np.full(len(nodes), -1)
                place[local] = np.arange(len(local))
                targets = np.nonzero((place[parent] >= 0) & (weight != 0))[0]
                branches.append(
                    _EvaluatedBranch(
                        group,
                        layers,
                        gate,
                        torch.from_numpy(targets).to(device),
                        torch.from_numpy(place[parent[targets]]).to(device),
                        _spread(weight[targets], layout.host.channels[slot], device),
                    )
                )
            is_same = len(children) == len(nodes)
            parents = None if is_same else torch.from_numpy(parent).to(device)
            self.levels.append(_Level(host, len(nodes), branches, parents))
            nodes, of_row = nodes[parent], child_of_row
        rows = torch.from_numpy(nodes).to(device)
        self.head = [_take(parameters, rows, c) for c in layout.head]
        self.of_row = torch.from_numpy(of_row).to(device)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (rows, batch, classes) for images (batch, channels, height, width)."""
        x = images
        for level in self.levels:
            x = _run_folded(level.host, x)
            if level.branches:
                features = _as_members(x, level.num_nodes)
                out = features.clone()
                if level.parents is not None:
                    out = features.index_select(3, level.parents)
                for branch in level.branches:
                    branch.add(features, out)
                x = _as_images(out)
            elif level.parents is not None:  # pragma: no cover - children differ only by a seed
                raise AssertionError("nodes split without a seed")
            x = F.max_pool2d(x, 2)
        return _head(x, *self.head)[self.of_row]


@dataclass(frozen=True)
class _Level:
    """One block and its slot for all nodes."""

    host: list[tuple[PlacedLayer, list[Tensor], list[Tensor]]]
    num_nodes: int
    branches: list[_EvaluatedBranch]
    parents: Tensor | None
    """Node of each child, or None if they are the same."""


@dataclass(frozen=True)
class _EvaluatedBranch:
    """One group of seeds; its residual is computed once per node and used by several children."""

    group: Group
    layers: list[tuple[PlacedLayer, list[Tensor], list[Tensor]]]
    gate: list[Tensor]
    targets: Tensor
    sources: Tensor
    weight: Tensor

    def add(self, features: Tensor, out: Tensor) -> None:
        """Add alpha * r to the children in `out`."""
        x = features.index_select(3, self.group.members)
        branch = _as_members(_run_folded(self.layers, _as_images(x)), len(self.group.members))
        gate = None
        if self.group.num_gate:
            gate = gates(x[:, :, :, self.group.gate_slice].mean(dim=(1, 2)), *self.gate)
        mixed = residual(self.group, features, branch, gate)
        picked = mixed.index_select(3, self.sources)
        picked.flatten(3).mul_(self.weight)
        out.index_add_(3, self.targets, picked)


def _group_members(
    blueprint: npt.NDArray[np.int64], blend: IntArray, runs: BoolArray
) -> list[tuple[int, IntArray, int, int]]:
    """Group members by blueprint; inside a group ADD, then GATE, then MULTIPLY.

    Returns:
        (blueprint, members, number of GATE, number of MULTIPLY) per group.
    """
    rank = np.array([0, 2, 1])[blend]  # Blend.ADD, Blend.MULTIPLY, Blend.GATE
    result = []
    for index in np.unique(blueprint[runs & (blueprint >= 0)]):
        local = np.nonzero(runs & (blueprint == index))[0]
        local = local[np.argsort(rank[local], kind="stable")]
        num_gate = int((blend[local] == Blend.GATE).sum())
        num_multiply = int((blend[local] == Blend.MULTIPLY).sum())
        result.append((int(index), local, num_gate, num_multiply))
    return result


def _spread(
    values: npt.NDArray[np.generic], channels: int, device: torch.device
) -> Tensor:
    """Repeat one value per member for each of its channels. (m * channels,) float32."""
    return torch.from_numpy(np.repeat(values.astype(np.float32), channels)).to(device)


def _run(layers: list[_Run], x: Tensor, parameters: list[Tensor], buffers: list[Tensor]) -> Tensor:
    """Run layers in training mode."""
    for run in layers:
        x = run.placed.layer.forward(
            x, [parameters[i] for i in run.parameters], [buffers[i] for i in run.buffers], True
        )
    return x


def _take(matrix: Tensor, rows: Tensor, column: Column) -> Tensor:
    """Copy one tensor of some rows. (rows, *shape)."""
    spec = column.spec
    part = matrix[rows, column.offset : column.offset + spec.size]
    return part.reshape(len(rows), *spec.shape)


def _fold(
    layers: Sequence[PlacedLayer], rows: Tensor, parameters: Tensor, buffers: Tensor
) -> list[tuple[PlacedLayer, list[Tensor], list[Tensor]]]:
    """Take the tensors of some layers; a norm after a convolution without bias becomes its bias."""
    result: list[tuple[PlacedLayer, list[Tensor], list[Tensor]]] = []
    for placed in layers:
        own = [_take(parameters, rows, c) for c in placed.parameters]
        running = [_take(buffers, rows, c) for c in placed.buffers]
        before = result[-1][0].layer if result else None
        if isinstance(placed.layer, Norm) and isinstance(before, Conv) and not before.bias:
            conv, (kernel,), _ = result.pop()
            (scale, shift), (mean, var) = own, running
            scale = scale * torch.rsqrt(var + 1e-5)
            kernel = kernel * scale[:, :, None, None, None]
            folded = Conv(before.in_channels, before.out_channels, before.kernel_size,
                          before.groups, bias=True)
            placed = PlacedLayer(folded, conv.parameters, ())
            own, running = [kernel, shift - mean * scale], []
        result.append((placed, own, running))
    return result


def _run_folded(
    layers: list[tuple[PlacedLayer, list[Tensor], list[Tensor]]], x: Tensor
) -> Tensor:
    """Run layers in evaluation mode."""
    for placed, parameters, buffers in layers:
        x = placed.layer.forward(x, parameters, buffers, False)
    return x


def _as_members(x: Tensor, m: int) -> Tensor:
    """(batch, m * channels, height, width) -> (batch, height, width, m, channels)."""
    return x.permute(0, 2, 3, 1).contiguous().unflatten(3, (m, -1))


def _as_images(x: Tensor) -> Tensor:
    """(batch, height, width, m, channels) -> (batch, m * channels, height, width)."""
    return x.flatten(3).permute(0, 3, 1, 2)


def _head(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Pool and classify. (batch, m * channels, h, w) -> (m, batch, classes)."""
    pooled = x.mean(dim=(2, 3)).view(len(x), len(weight), -1).transpose(0, 1)
    return torch.baddbmm(bias[:, None], pooled, weight.mT)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss per member and image. (m, batch, classes), (m, batch) -> (m, batch)."""
    flat = F.cross_entropy(logits.flatten(0, 1), labels.reshape(-1), reduction="none")
    return flat.view(labels.shape)
