"""Training graph of one chunk of members with one composition of seeds.

Modules with the same layers are stacked along the member axis, so one grouped operation runs all of
them. The graph is rebuilt when the composition changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from esper_env.config import BoolArray, FloatArray, IntArray
from esper_env.population.interface import Seeds, SGDSettings
from esper_env.population.layers import as_images, as_members, classify, cross_entropy
from esper_env.population.layout import Column, PlacedLayer
from esper_env.population.storage import Storage
from esper_env.population.torch_engine.mixing import (
    GatherMembers,
    Group,
    Mix,
    MixResiduals,
    gates,
    group_members,
    spread,
)
from esper_env.population.torch_engine.sgd import ModuleSGD, WorkingSet


class TrainingGraph:
    """Tensors, forward pass and optimiser of one chunk of members with one composition of seeds.

    Args:
        storage: Tensors of all members.
        members: Members of the chunk. (m,).
        seeds: Seeds of the whole population, for the composition.
        settings: Optimiser settings.
        precision: "float32" or "bfloat16", for convolutions and linear maps.
    """

    def __init__(
        self,
        storage: Storage,
        members: IntArray,
        seeds: Seeds,
        settings: SGDSettings,
        precision: str,
    ) -> None:
        self.storage = storage
        self.precision = precision
        self.members = members
        layout, device = storage.layout, storage.device
        self.trained = WorkingSet(layout.num_parameters, device)
        self.running = WorkingSet(layout.num_buffers, device)
        m, num_slots = len(members), layout.host.num_slots
        # Module i is the host of member i, module m * (1 + s) + i its seed in slot s.
        num_modules = m * (1 + num_slots)
        decay = np.zeros(num_modules)
        decay[:m] = settings.weight_decay
        is_frozen = np.zeros(num_modules, dtype=bool)
        # (m, num_slots) -> (num_slots * m,), the order of the modules
        is_frozen[m:] = seeds.is_frozen[members].T.reshape(-1)
        # Module of each row of each piece, and the position of the tensor within its seed, -1 for
        # tensors of hosts. One (rows,) array per piece.
        modules: list[IntArray] = []
        segment_tensor: list[IntArray] = []

        def add(local: IntArray, columns: Sequence[Column], slot: int, first: int) -> list[int]:
            """Add trainable tensors of members `local` of the chunk; `slot` -1 is the host."""
            positions = []
            for i, column in enumerate(columns):
                positions.append(self.trained.add(members[local], column))
                modules.append(m * (1 + slot) + local)
                segment_tensor.append(np.full(len(local), first + i if slot >= 0 else -1))
            return positions

        def place(local: IntArray, layers: Sequence[PlacedLayer], slot: int) -> list[_Run]:
            """Add the tensors of layers; return each layer with the positions of its tensors."""
            runs, first = [], 0
            for placed in layers:
                buffers = [self.running.add(members[local], c) for c in placed.buffers]
                runs.append(_Run(placed, add(local, placed.parameters, slot, first), buffers))
                first += len(placed.parameters)
            return runs

        everyone = np.arange(m)
        self.blocks = [place(everyone, block, -1) for block in layout.blocks]
        self.slots: list[_SlotGraph | None] = []
        for slot in range(num_slots):
            # A seed without gradient weight does not run in training.
            slot_seeds = group_members(
                seeds.blueprint[members, slot],
                seeds.blend[members, slot],
                seeds.beta[members, slot] > 0,
            )
            if not slot_seeds:
                self.slots.append(None)
                continue
            branches: list[_Branch] = []
            gated: list[int] = []
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
            # The gates of all groups run as one operation, in the order of the groups.
            gate_local = np.array(gated, dtype=np.int64)
            gate = None
            if gated:
                # The tensors of a gate are the last of their seed.
                first = layout.max_seed_tensors - len(layout.gates[slot])
                gate = _Gate(
                    torch.from_numpy(gate_local).to(device),
                    add(gate_local, layout.gates[slot], slot, first),
                    torch.from_numpy(seeds.is_isolated[members[gate_local], slot]).to(device),
                )
            self.slots.append(_SlotGraph(slot, layout.host.channels[slot], branches, gate))
        self.head = add(everyone, layout.head, -1, 0)
        self.trained.freeze()
        self.running.freeze()
        self.sgd = ModuleSGD(
            self.trained,
            modules,
            decay.astype(np.float32),
            is_frozen,
            settings,
        )
        # Index (member, slot, tensor) of each segment that belongs to a seed.
        tensor = np.concatenate(segment_tensor)
        module = np.concatenate(modules)
        self.seed_segments = np.nonzero(tensor >= 0)[0]
        owner = module[self.seed_segments]
        self.segment_at = (
            members[owner % m],
            owner // m - 1,
            tensor[self.seed_segments],
        )

    def train(
        self,
        seeds: Seeds,
        images: Tensor,
        labels: Tensor,
        host_rate: FloatArray,
        seed_rate: FloatArray,
    ) -> tuple[Tensor, Tensor]:
        """Train on some batches.

        Args:
            seeds: Seeds of the whole population, for the current alphas and betas.
            images: Normalised images. (batches, batch_size, height, width, m * channels) float32.
            labels: Training labels. (batches, m, batch_size) int64.
            host_rate: Learning rate of each member's host. (m,).
            seed_rate: Learning rate of each member's seeds. (m,).

        Returns:
            Mean loss of each member (m,) [nats], and the squared gradient norm of each segment,
            averaged over the batches (num_segments,).
        """
        storage = self.storage
        # Copy the chunk's tensors out of the matrices; they are written back after the last batch.
        flat = self.trained.gather(storage.parameters).requires_grad_()
        momentum = self.trained.gather(storage.momentum)
        running = self.running.gather(storage.buffers)
        buffers = self.running.views(running)
        num_slots = len(self.slots)
        # Hosts first, then the seeds slot by slot, the order of the modules. (num_modules,) -> (n,)
        rates = self.sgd.spread_rates(np.concatenate([host_rate, *[seed_rate] * num_slots]))
        mixes = [None if s is None else s.mix(self.members, seeds) for s in self.slots]
        total_loss = torch.zeros(len(self.members), device=storage.device)
        total_squares = torch.zeros(len(self.sgd.lengths), device=storage.device)
        for batch, label in zip(images, labels, strict=True):
            with in_precision(self.precision, storage.device):
                logits = self._forward(batch, self.trained.views(flat), buffers, mixes)
            loss = cross_entropy(logits, label).mean(1)
            # Members share no parameters, so the gradient of the sum is each member's own.
            (gradient,) = torch.autograd.grad(loss.sum(), flat)
            with torch.no_grad():
                total_squares += self.sgd.step(flat, gradient, momentum, rates)
                total_loss += loss
        # Frozen modules keep their rows; running statistics are updated for all.
        with torch.no_grad():
            self.trained.scatter(storage.parameters, flat, self.sgd.keep)
            self.trained.scatter(storage.momentum, momentum, self.sgd.keep)
            self.running.scatter(storage.buffers, running)
        return total_loss / len(images), total_squares / len(images)

    def _forward(
        self,
        batch: Tensor,
        parameters: list[Tensor],
        buffers: list[Tensor],
        mixes: list[Mix | None],
    ) -> Tensor:
        """Return the logits of one batch in training mode.

        Args:
            batch: Images. (batch_size, height, width, m * channels).
            parameters: Views of the trainable tensors. (rows, *shape) each.
            buffers: Views of the running statistics, updated in place. (rows, *shape) each.
            mixes: Blend weights of each slot, None where no seed runs.

        Returns:
            (m, batch_size, classes).
        """
        m = len(self.members)
        # (batch_size, height, width, m * channels) -> (batch_size, m * channels, height, width)
        x = batch.permute(0, 3, 1, 2)
        for block, slot, mix in zip(self.blocks, self.slots, mixes, strict=True):
            x = _run(block, x, parameters, buffers)
            if slot is not None:
                assert mix is not None
                x = as_images(slot.forward(as_members(x, m), mix, parameters, buffers))
            x = F.max_pool2d(x, 2)
        weight, bias = (parameters[i] for i in self.head)
        return classify(x, weight, bias)


def in_precision(precision: str, device: torch.device) -> torch.autocast:
    """Return the autocast context of a forward pass in "float32" or "bfloat16"."""
    # Autocast must not cache converted weights, because they are updated in place between batches.
    is_enabled = precision == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=is_enabled, cache_enabled=False)


@dataclass(frozen=True)
class _Run:
    """A layer of the graph, with the positions of its tensors among the views."""

    placed: PlacedLayer
    parameters: list[int]
    buffers: list[int]


class _Branch:
    """One group of seeds in one slot.

    Args:
        group: Members and blends of the group.
        local: Positions of the members in the chunk. (m,).
        layers: Layers of the seeds.
        is_isolated: Whether a seed's input is detached. (m,) bool.
        channels: Channels at the slot.
        device: Device of all tensors.
    """

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
        # If only some seeds are isolated, zeros in `keep` cut their gradients off.
        self.keep = None
        if is_isolated.any() and not self.is_isolated:
            self.keep = spread(~is_isolated, channels, device)


@dataclass(frozen=True)
class _Gate:
    """Gates of one slot, for all groups."""

    members: Tensor
    """Positions of the gated members in the chunk. (num_gates,) int64."""
    parameters: list[int]
    """Positions of weight and bias among the views."""
    is_isolated: Tensor
    """Whether a gate's input is detached. (num_gates,) bool."""


@dataclass(frozen=True)
class _SlotGraph:
    """All seeds of a chunk in one slot."""

    slot: int
    channels: int
    branches: list[_Branch]
    gate: _Gate | None

    def mix(self, members: IntArray, seeds: Seeds) -> Mix:
        """Return the groups with the blend weights of the current env step.

        Args:
            members: Members of the chunk. (m,).
            seeds: Seeds of the whole population.
        """
        # Weights that are all 1 become None, which saves the multiplication.
        alphas: list[Tensor | None] = []
        betas: list[Tensor | None] = []
        visible = []
        for branch in self.branches:
            rows = members[branch.local]
            alpha = seeds.alpha[rows, self.slot]
            visible.append(bool((alpha > 0).any()))
            device = branch.group.members.device
            for target, values in ((alphas, alpha), (betas, seeds.beta[rows, self.slot])):
                is_one = bool((values == 1).all())
                target.append(None if is_one else spread(values, self.channels, device))
        groups = tuple(branch.group for branch in self.branches)
        return Mix(groups, tuple(alphas), tuple(betas), tuple(visible))

    def forward(
        self, features: Tensor, mix: Mix, parameters: list[Tensor], buffers: list[Tensor]
    ) -> Tensor:
        """Run all seeds and mix their output into the features.

        Args:
            features: Features at the slot. (batch, height, width, members, channels).
            mix: Groups and blend weights.
            parameters: Views of the trainable tensors. (rows, *shape) each.
            buffers: Views of the running statistics, updated in place. (rows, *shape) each.

        Returns:
            Mixed features. (batch, height, width, members, channels).
        """
        # Gather the input of all groups with a gradient in one operation; see `GatherMembers`.
        # Groups whose seeds are all isolated read detached features.
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
            # (batch, height, width, m, channels) -> (batch, m * channels, height, width) and back
            out = _run(branch.layers, as_images(x), parameters, buffers)
            outputs.append(as_members(out.to(features.dtype), len(branch.local)))
        gate = None
        if self.gate is not None:
            # (batch, height, width, members, channels) -> (batch, num_gates, channels)
            pooled = features.mean(dim=(1, 2)).index_select(1, self.gate.members)
            pooled = torch.where(self.gate.is_isolated[:, None], pooled.detach(), pooled)
            weight, bias = (parameters[i] for i in self.gate.parameters)
            gate = gates(pooled, weight, bias)
        mixed: Tensor = MixResiduals.apply(features, gate, mix, *outputs)
        return mixed


def _run(layers: list[_Run], x: Tensor, parameters: list[Tensor], buffers: list[Tensor]) -> Tensor:
    """Run layers in training mode."""
    for run in layers:
        x = run.placed.layer.forward(
            x, [parameters[i] for i in run.parameters], [buffers[i] for i in run.buffers], True
        )
    return x
