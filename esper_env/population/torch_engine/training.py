"""Training graph of one chunk of members with one composition of seeds.

Modules with the same layers are stacked along the member axis, so one grouped operation runs all of
them. The graph is rebuilt when the composition changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from esper_env.config import IntArray
from esper_env.population.interface import Seeds, SGDSettings, Training
from esper_env.population.layers import (
    Layer,
    as_images,
    as_members,
    classify,
    cross_entropy,
    run_layers,
)
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
from esper_env.population.torch_engine.sgd import ModuleSGD, Piece, WorkingSet


class TrainingGraph:
    """Tensors, forward pass and optimizer of one chunk of members with one composition of seeds.

    Args:
        storage: Tensors of all members.
        members: Members of the chunk. (m,).
        seeds: Seeds of the whole population, for the composition.
        settings: Optimizer settings.
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
        self.storage, self.members, self.precision = storage, members, precision
        layout, device = storage.layout, storage.device
        # Tensors in the order in which the forward pass uses them.
        trained: list[Piece] = []
        running: list[Piece] = []

        def place(local: IntArray, placed: Sequence[PlacedLayer], slot: int = -1) -> list[Layer]:
            """Add the tensors of members `local` of the chunk; `slot` -1 is the host."""
            add(local, [c for p in placed for c in p.parameters], slot)
            running.extend(Piece(local, c) for p in placed for c in p.buffers)
            return [p.layer for p in placed]

        def add(local: IntArray, columns: Sequence[Column], slot: int = -1, first: int = 0) -> None:
            for i, column in enumerate(columns, first):
                trained.append(Piece(local, column, slot, i if slot >= 0 else 0))

        everyone = np.arange(len(members))
        self._levels: list[_Level] = []
        for slot, block in enumerate(layout.blocks):
            host = place(everyone, block)
            # A seed without gradient weight does not run in training.
            runs = seeds.beta[members, slot] > 0
            is_isolated = seeds.is_isolated[members, slot]
            branches, gated = [], everyone[:0]
            for index, local, group in group_members(seeds, members, slot, runs, device):
                layers = place(local, layout.seeds[slot][index], slot)
                own = is_isolated[local]
                # If only some seeds are isolated, zeros in `keep` cut their gradients off.
                keep = spread(~own, layout.host.channels[slot], device)
                branches.append(_Branch(group, local, layers, bool(own.all()), keep))
                gated = np.concatenate([gated, local[group.gate_slice]])
            # The gates of all groups run as one operation, in the order of the groups.
            if len(gated):
                gate_columns = layout.gates[slot]
                add(gated, gate_columns, slot, layout.max_seed_tensors - len(gate_columns))
            gates_at = torch.from_numpy(gated).to(device)
            gate_is_isolated = torch.from_numpy(is_isolated[gated]).to(device)
            self._levels.append(_Level(host, branches, gates_at, gate_is_isolated))
        add(everyone, layout.head)
        self._trained = WorkingSet(trained, members, layout.num_parameters, device)
        self._running = WorkingSet(running, members, layout.num_buffers, device)
        # (m, slots) -> (1 + slots, m), hosts first
        is_frozen = np.pad(seeds.is_frozen[members].T, ((1, 0), (0, 0)))
        self._sgd = ModuleSGD(trained, is_frozen, settings, device)
        # Flat index into (m, 1 + slots, max_seed_tensors) of each segment. All tensors of a host
        # have the same, because nobody reads their gradients.
        self._norm_shape = len(members), len(is_frozen), layout.max_seed_tensors
        at = [
            (p.members * len(is_frozen) + 1 + p.slot) * layout.max_seed_tensors + p.position
            for p in trained
        ]
        self._norm_index = torch.from_numpy(np.concatenate(at)).to(device)
        # Position in the chunk of the member that a segment belongs to. (segments,)
        owners = np.concatenate([p.members for p in trained])
        self._segment_owner = torch.from_numpy(owners).to(device)

    def train(self, training: Training) -> tuple[Tensor, Tensor, Tensor]:
        """Train on some batches.

        Args:
            training: Batches, learning rates, and the current alphas and betas.

        Returns:
            Mean loss of each member (m,) [nats], and the squared gradient norm of each seed tensor,
            averaged over the batches, as in `TrainReport` (m, slots, max_seed_tensors). Last, the
            same of the whole host (m,).
        """
        storage, seeds = self.storage, training.seeds
        images, labels = training.images.batches(training.draw)
        # Copy the chunk's tensors out of the matrices; they are written back after the last batch.
        flat = self._trained.gather(storage.parameters).requires_grad_()
        momentum = self._trained.gather(storage.momentum)
        running = self._running.gather(storage.buffers)
        buffers = self._running.views(running)
        num_slots = len(self._levels)
        rates = np.stack([training.host_rate, *[training.seed_rate] * num_slots])
        element_rates = self._sgd.spread_rates(rates)
        mixes = [self._mixes(slot, seeds) for slot in range(num_slots)]
        kind: dict[str, Any] = {"dtype": torch.float32, "device": storage.device}
        counts = np.count_nonzero(training.draw.labels[:, 0] >= 0, axis=0)
        num_batches = torch.from_numpy(counts).to(storage.device)
        total_loss = torch.zeros(len(self.members), **kind)
        total_squares = torch.zeros(len(self._norm_index), **kind)
        host_squares = torch.zeros(len(self.members), **kind)
        for n, (batch, label) in enumerate(zip(images, labels, strict=True)):
            is_over = num_batches <= n if (counts <= n).any() else None
            before = [t.detach().clone() for t in (flat, momentum, running) if is_over is not None]
            with in_precision(self.precision, storage.device):
                logits = self._forward(batch, self._trained.views(flat), buffers, mixes)
            loss = cross_entropy(logits, label).mean(1)
            # Members share no parameters, so the gradient of the sum is each member's own.
            (gradient,) = torch.autograd.grad(loss.sum(), flat)
            with torch.no_grad():
                squares, of_modules = self._sgd.step(flat, gradient, momentum, element_rates)
                # The hosts are the first modules.
                of_hosts = of_modules[: len(host_squares)]
                if is_over is not None:
                    # A member without a batch keeps its tensors, and nothing of it counts.
                    owners = self._trained.owner, self._trained.owner, self._running.owner
                    for now, old, own in zip(
                        (flat, momentum, running), before, owners, strict=True
                    ):
                        now.copy_(torch.where(is_over[own], old, now))
                    squares = squares.masked_fill(is_over[self._segment_owner], 0)
                    of_hosts, loss = (v.masked_fill(is_over, 0) for v in (of_hosts, loss))
                total_squares += squares
                host_squares += of_hosts
                total_loss += loss
        # Frozen modules keep their rows; running statistics are updated for all.
        with torch.no_grad():
            self._trained.scatter(storage.parameters, flat, self._sgd.keep)
            self._trained.scatter(storage.momentum, momentum, self._sgd.keep)
            self._running.scatter(storage.buffers, running)
        # NaN marks tensors that do not exist, so a gradient that is NaN is reported as infinite.
        squares = torch.full(self._norm_shape, torch.nan, **kind)
        mean = total_squares / num_batches[self._segment_owner]
        mean.nan_to_num_(torch.inf, torch.inf)
        squares.view(-1)[self._norm_index] = mean
        host = (host_squares / num_batches).nan_to_num_(torch.inf, torch.inf)
        return total_loss / num_batches, squares[:, 1:], host

    def _mixes(self, slot: int, seeds: Seeds) -> list[Mix]:
        """Return the groups of a slot with the blend weights of the current env step."""
        channels, device = self.storage.layout.host.channels[slot], self.storage.device
        result = []
        for branch in self._levels[slot].branches:
            rows = self.members[branch.local]
            alpha, beta = seeds.alpha[rows, slot], seeds.beta[rows, slot]
            forward, backward = (spread(values, channels, device) for values in (alpha, beta))
            result.append(Mix(branch.group, forward, backward, bool((alpha > 0).any())))
        return result

    def _forward(
        self,
        batch: Tensor,
        parameters: list[Tensor],
        buffers: list[Tensor],
        mixes: list[list[Mix]],
    ) -> Tensor:
        """Return the logits of one batch in training mode.

        Args:
            batch: Images. (batch_size, height, width, m * channels).
            parameters: Views of the trainable tensors. (rows, *shape) each.
            buffers: Views of the running statistics, updated in place. (rows, *shape) each.
            mixes: Groups and blend weights of each slot.

        Returns:
            (m, batch_size, classes).
        """
        own, running = iter(parameters), iter(buffers)
        # (batch_size, height, width, m * channels) -> (batch_size, m * channels, height, width)
        x = batch.permute(0, 3, 1, 2)
        for level, groups in zip(self._levels, mixes, strict=True):
            x = run_layers(level.host, x, own, running, True)
            if groups:
                features = as_members(x, len(self.members))
                x = as_images(level.mix(features, groups, own, running))
            x = F.max_pool2d(x, 2)
        return classify(x, *own)


def in_precision(precision: str, device: torch.device) -> torch.autocast:
    """Return the autocast context of a forward pass in "float32" or "bfloat16"."""
    # Autocast must not cache converted weights, because they are updated in place between batches.
    is_enabled = precision == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=is_enabled, cache_enabled=False)


class _Branch(NamedTuple):
    """One group of seeds in one slot."""

    group: Group
    """Members and blends of the group."""
    local: IntArray
    """Positions of the members in the chunk. (m,)."""
    layers: list[Layer]
    """Layers of the seeds."""
    is_isolated: bool
    """Whether all seeds read detached features."""
    keep: Tensor | None
    """Factor on the gradient of the input: 0 for isolated seeds, else 1; None if no seed is
    isolated. (m * channels,) float32."""


class _Level(NamedTuple):
    """One block and all seeds of a chunk in its slot."""

    host: list[Layer]
    """Layers of the block."""
    branches: list[_Branch]
    """Groups of seeds in the slot."""
    gated: Tensor
    """Positions of the members with a gate in the chunk, in the order of the groups. (gates,)."""
    is_isolated: Tensor
    """Whether a gate's input is detached. (gates,) bool."""

    def mix(
        self,
        features: Tensor,
        mixes: list[Mix],
        parameters: Iterator[Tensor],
        buffers: Iterator[Tensor],
    ) -> Tensor:
        """Run all seeds and mix their output into the features.

        Args:
            features: Features at the slot. (batch, height, width, members, channels).
            mixes: Groups and blend weights.
            parameters: Next are the trainable tensors of the seeds and gates. (rows, *shape) each.
            buffers: Next are the running statistics of the seeds. (rows, *shape) each.

        Returns:
            Mixed features. (batch, height, width, members, channels).
        """
        # Gather the input of all groups in one operation; see `GatherMembers`.
        inputs = GatherMembers.apply(
            features, [b.keep for b in self.branches], *(b.group.members for b in self.branches)
        )
        outputs = []
        for branch, x in zip(self.branches, inputs, strict=True):
            # (batch, height, width, m, channels) -> (batch, m * channels, height, width) and back
            x = as_images(x.detach() if branch.is_isolated else x)
            out = run_layers(branch.layers, x, parameters, buffers, True)
            outputs.append(as_members(out.to(features.dtype), len(branch.local)))
        gate = None
        if len(self.gated):
            # (batch, height, width, members, channels) -> (batch, gates, channels)
            pooled = features.mean(dim=(1, 2)).index_select(1, self.gated)
            pooled = torch.where(self.is_isolated[:, None], pooled.detach(), pooled)
            gate = gates(pooled, next(parameters), next(parameters))
        mixed: Tensor = MixResiduals.apply(features, gate, mixes, *outputs)
        return mixed
