"""Evaluation of networks that differ in blend weights; shared prefixes are computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from esper_env.config import FloatArray, IntArray
from esper_env.population.interface import Seeds
from esper_env.population.layers import Conv, Norm, as_images, as_members, classify
from esper_env.population.layout import Column, PlacedLayer
from esper_env.population.storage import Storage
from esper_env.population.torch_engine.mixing import Group, gates, group_members, residual, spread


class EvaluationGraph:
    """Networks that share members' weights and differ in blend weights, as a tree.

    Level s of the tree has one node per distinct (member, blend weights before slot s).

    Args:
        storage: Tensors of all members.
        members: Member whose weights each network uses. (rows,).
        alpha: Blend weight of each seed; 0 removes the seed. (rows, slots).
        seeds: Seeds of the whole population, for blueprints and blends.
    """

    def __init__(
        self, storage: Storage, members: IntArray, alpha: FloatArray, seeds: Seeds
    ) -> None:
        layout, device = storage.layout, storage.device
        parameters, buffers = storage.parameters, storage.buffers
        # `nodes` is the member of each node at this level (nodes,), `of_row` the node of each
        # network (rows,). Level 0 has one node per member.
        nodes = np.unique(members)
        of_row = np.searchsorted(nodes, members)
        self.levels: list[_Level] = []
        for slot in range(layout.host.num_slots):
            rows = torch.from_numpy(nodes).to(device)
            host = _fold(layout.blocks[slot], rows, parameters, buffers)
            # Split each node by the blend weight in this slot. Children have a parent node and a
            # weight, (children,) each.
            pairs = np.stack([of_row, alpha[:, slot]], axis=1)
            children, child_of_row = np.unique(pairs, axis=0, return_inverse=True)
            child_of_row = child_of_row.reshape(-1)
            parent = children[:, 0].astype(np.int64)
            weight = children[:, 1]
            # Run a seed only in nodes where some child gives it weight.
            has_branch = np.zeros(len(nodes), dtype=bool)
            has_branch[parent[weight != 0]] = True
            blueprint = np.where(has_branch, seeds.blueprint[nodes, slot], -1)
            branches = []
            for index, local, num_gate, num_multiply in group_members(
                blueprint, seeds.blend[nodes, slot], has_branch
            ):
                group = Group(torch.from_numpy(local).to(device), num_gate, num_multiply, 0)
                rows = torch.from_numpy(nodes[local]).to(device)
                layers = _fold(layout.seeds[slot][index], rows, parameters, buffers)
                gated = rows[group.gate_slice]
                gate = [_take(parameters, gated, c) for c in layout.gates[slot]]
                # Children that receive this group's residual (targets,), and the position of each
                # one's parent among the group's nodes. (nodes,) -> (targets,)
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
                        spread(weight[targets], layout.host.channels[slot], device),
                    )
                )
            # Without a split, children and nodes are the same in the same order.
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
        first = self.levels[0].host[0][0].layer
        if not isinstance(first, Conv) or first.groups > 1:
            # Only a convolution without groups can read images that all members share. Other layers
            # get one copy per member: (batch, channels, h, w) -> (batch, m * channels, h, w).
            x = as_images(as_members(x, 1).expand(-1, -1, -1, self.levels[0].num_nodes, -1))
        for level in self.levels:
            x = run_folded(level.host, x)
            if level.branches:
                # (batch, nodes * channels, h, w) -> (batch, h, w, nodes, channels), then copied to
                # (batch, h, w, children, channels)
                features = as_members(x, level.num_nodes)
                out = features.clone()
                if level.parents is not None:
                    out = features.index_select(3, level.parents)
                for branch in level.branches:
                    branch.add(features, out)
                x = as_images(out)
            elif level.parents is not None:  # pragma: no cover - children differ only by a seed
                raise AssertionError("nodes split without a seed")
            x = F.max_pool2d(x, 2)
        return classify(x, *self.head)[self.of_row]


@dataclass(frozen=True)
class _Level:
    """One block and its slot, for all nodes of a level."""

    host: list[tuple[PlacedLayer, list[Tensor], list[Tensor]]]
    """Layers of the block, each with its parameters and buffers of all nodes."""
    num_nodes: int
    """Number of nodes."""
    branches: list[_EvaluatedBranch]
    """Groups of seeds in the slot."""
    parents: Tensor | None
    """Node of each child, None if children and nodes are the same. (children,) int64."""


@dataclass(frozen=True)
class _EvaluatedBranch:
    """One group of seeds. Each residual is computed once per node and used by several children."""

    group: Group
    """Nodes of the group."""
    layers: list[tuple[PlacedLayer, list[Tensor], list[Tensor]]]
    """Layers of the seeds, each with its parameters and buffers of all nodes of the group."""
    gate: list[Tensor]
    """Weight and bias of the gates of the group's GATE nodes."""
    targets: Tensor
    """Children that receive a residual. (targets,) int64."""
    sources: Tensor
    """Position of each target's node within the group. (targets,) int64."""
    weight: Tensor
    """Alpha of each target, for each channel. (targets * channels,) float32."""

    def add(self, features: Tensor, out: Tensor) -> None:
        """Add alpha * r to the children.

        Args:
            features: Features of the nodes. (batch, height, width, nodes, channels).
            out: Features of the children, changed. (batch, height, width, children, channels).
        """
        x = features.index_select(3, self.group.members)
        out_of_layers = run_folded(self.layers, as_images(x)).to(features.dtype)
        branch = as_members(out_of_layers, len(self.group.members))
        gate = None
        if self.group.num_gate:
            gate = gates(x[:, :, :, self.group.gate_slice].mean(dim=(1, 2)), *self.gate)
        mixed = residual(self.group, features, branch, gate)
        picked = mixed.index_select(3, self.sources)
        picked.flatten(3).mul_(self.weight)
        out.index_add_(3, self.targets, picked)


def _take(matrix: Tensor, rows: Tensor, column: Column) -> Tensor:
    """Copy one tensor of some rows of a matrix. (rows, *shape)."""
    spec = column.spec
    part = matrix[rows, column.offset : column.offset + spec.size]
    return part.reshape(len(rows), *spec.shape)


def _fold(
    layers: Sequence[PlacedLayer], rows: Tensor, parameters: Tensor, buffers: Tensor
) -> list[tuple[PlacedLayer, list[Tensor], list[Tensor]]]:
    """Copy the tensors of some layers, and fold each norm into the convolution before it.

    A norm is folded only if that convolution has no bias.

    Args:
        layers: Layers in their order.
        rows: Rows of the matrices. (m,) int64.
        parameters: The parameter matrix. (num_members, num_parameters).
        buffers: The buffer matrix. (num_members, num_buffers).

    Returns:
        Layers with their parameters and buffers, (m, *shape) each.
    """
    result: list[tuple[PlacedLayer, list[Tensor], list[Tensor]]] = []
    for placed in layers:
        own = [_take(parameters, rows, c) for c in placed.parameters]
        running = [_take(buffers, rows, c) for c in placed.buffers]
        before = result[-1][0].layer if result else None
        if isinstance(placed.layer, Norm) and isinstance(before, Conv) and not before.bias:
            # norm(K * x) = (s K) * x + (shift - s mean), with s = scale / sqrt(var + 1e-5)
            conv, (kernel,), _ = result.pop()
            (scale, shift), (mean, var) = own, running
            scale = scale * torch.rsqrt(var + 1e-5)
            kernel = kernel * scale[:, :, None, None, None]
            folded = Conv(
                before.in_channels,
                before.out_channels,
                before.kernel_size,
                before.groups,
                bias=True,
            )
            placed = PlacedLayer(folded, conv.parameters, ())
            own, running = [kernel, shift - mean * scale], []
        result.append((placed, own, running))
    return result


def run_folded(layers: list[tuple[PlacedLayer, list[Tensor], list[Tensor]]], x: Tensor) -> Tensor:
    """Run layers in evaluation mode."""
    for placed, parameters, buffers in layers:
        x = placed.layer.forward(x, parameters, buffers, False)
    return x
