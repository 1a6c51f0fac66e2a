"""Evaluation of networks that differ in blend weights; shared prefixes are computed once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, TypeGuard, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from esper_env.config import FloatArray, IntArray
from esper_env.population.interface import Seeds
from esper_env.population.layers import (
    Conv,
    Layer,
    Norm,
    as_images,
    as_members,
    classify,
    run_layers,
)
from esper_env.population.layout import Column, PlacedLayer
from esper_env.population.storage import Storage
from esper_env.population.torch_engine.mixing import Group, gates, group_members, residual, spread

Kind = TypeVar("Kind", Conv, Norm)


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
        self._storage = storage
        self._parameters: list[Tensor] = []
        """Parameters in the order in which `forward` uses them. (nodes, *shape) each."""
        self._buffers: list[Tensor] = []
        """Running statistics in that order. (nodes, *shape) each."""
        layout, device = storage.layout, storage.device
        # `nodes` is the member of each node at this level (nodes,), `of_row` the node of each
        # network (rows,). Level 0 has one node per member.
        nodes, of_row = np.unique(members, return_inverse=True)
        self._levels: list[_Level] = []
        for slot, block in enumerate(layout.blocks):
            host = self._fold(block, nodes)
            # Split each node by the blend weight in this slot. Children have a parent node and a
            # weight, (children,) each.
            pairs = np.stack([of_row, alpha[:, slot]], axis=1)
            children, child_of_row = np.unique(pairs, axis=0, return_inverse=True)
            parent, weight = children[:, 0].astype(np.int64), children[:, 1]
            # Run a seed only in nodes where some child gives it weight.
            has_branch = np.isin(np.arange(len(nodes)), parent[weight != 0])
            branches = []
            for blueprint, local, group in group_members(seeds, nodes, slot, has_branch, device):
                layers = self._fold(layout.seeds[slot][blueprint], nodes[local])
                if group.num_gate:
                    gated = nodes[local][group.gate_slice]
                    self._parameters += self._take(storage.parameters, layout.gates[slot], gated)
                # Children that receive this group's residual (targets,), and the position of each
                # one's parent among the group's nodes. (nodes,) -> (targets,)
                place = np.full(len(nodes), -1)
                place[local] = np.arange(len(local))
                targets = np.nonzero((place[parent] >= 0) & (weight != 0))[0]
                branches.append(
                    _Branch(
                        group,
                        layers,
                        torch.from_numpy(targets).to(device),
                        torch.from_numpy(place[parent[targets]]).to(device),
                        spread(weight[targets], layout.host.channels[slot], device),
                    )
                )
            parents = torch.from_numpy(parent).to(device)
            self._levels.append(_Level(host, len(nodes), branches, parents))
            nodes, of_row = nodes[parent], child_of_row.reshape(-1)
        self._parameters += self._take(storage.parameters, layout.head, nodes)
        self._of_row = torch.from_numpy(of_row).to(device)

    def forward(self, images: Tensor) -> Tensor:
        """Run all networks.

        Args:
            images: Images that all members share (batch, channels, height, width), or those of each
                distinct member in ascending order (batch, m * channels, height, width).

        Returns:
            Logits. (rows, batch, classes).
        """
        x = images
        parameters, buffers = iter(self._parameters), iter(self._buffers)
        first, host = self._levels[0].host[0], self._storage.layout.host
        is_shared = images.shape[1] == host.in_channels
        if is_shared and (not _computes_as(first, Conv) or first.groups > 1):
            # Only a convolution without groups can read images that all members share. Other layers
            # get one copy per member: (batch, channels, h, w) -> (batch, m * channels, h, w).
            x = as_images(as_members(x, 1).expand(-1, -1, -1, self._levels[0].num_nodes, -1))
        for level in self._levels:
            x = run_layers(level.host, x, parameters, buffers, False)
            if level.branches or len(level.parents) > level.num_nodes:
                # (batch, nodes * channels, h, w) -> (batch, h, w, nodes, channels), then copied to
                # (batch, h, w, children, channels)
                features = as_members(x, level.num_nodes)
                out = features.index_select(3, level.parents)
                for group, layers, targets, sources, weight in level.branches:
                    # Each residual is computed once per node and used by several children.
                    own = features.index_select(3, group.members)
                    branch = run_layers(layers, as_images(own), parameters, buffers, False)
                    gate = None
                    if group.num_gate:
                        pooled = own[:, :, :, group.gate_slice].mean(dim=(1, 2))
                        gate = gates(pooled, next(parameters), next(parameters))
                    branch = as_members(branch.to(features.dtype), len(group.members))
                    picked = residual(group, features, branch, gate).index_select(3, sources)
                    if weight is not None:
                        picked.flatten(3).mul_(weight)
                    out.index_add_(3, targets, picked)
                x = as_images(out)
            x = F.max_pool2d(x, 2)
        return classify(x, *parameters)[self._of_row]

    def _fold(self, placed: Sequence[PlacedLayer], members: IntArray) -> list[Layer]:
        """Copy the tensors of some layers, and fold each norm into the convolution before it.

        A norm is folded only if that convolution has no bias, and if neither is of a subclass with
        a forward pass of its own.

        Args:
            placed: Layers in their order.
            members: Member of each node. (nodes,).

        Returns:
            Layers to run.
        """
        layers: list[Layer] = []
        for layer in placed:
            own = self._take(self._storage.parameters, layer.parameters, members)
            running = self._take(self._storage.buffers, layer.buffers, members)
            before = layers[-1] if layers else None
            if _computes_as(layer.layer, Norm) and _computes_as(before, Conv) and not before.bias:
                # norm(K * x) = (s K) * x + (shift - s mean), with s = scale / sqrt(var + 1e-5)
                (scale, shift), (mean, var) = own, running
                scale = scale * torch.rsqrt(var + 1e-5)
                kernel = self._parameters.pop() * scale[:, :, None, None, None]
                self._parameters += [kernel, shift - mean * scale]
                layers[-1] = dataclasses.replace(before, bias=True)
            else:
                self._parameters += own
                self._buffers += running
                layers.append(layer.layer)
        return layers

    def _take(self, matrix: Tensor, columns: Sequence[Column], members: IntArray) -> list[Tensor]:
        """Copy some tensors of some members. (nodes, *shape) each."""
        rows = torch.from_numpy(members).to(matrix.device)
        parts = [matrix[rows, c.offset : c.offset + c.spec.size] for c in columns]
        return [p.view(-1, *c.spec.shape) for p, c in zip(parts, columns, strict=True)]


class _Level(NamedTuple):
    """One block and its slot, for all nodes of a level."""

    host: list[Layer]
    """Layers of the block."""
    num_nodes: int
    """Number of nodes."""
    branches: list[_Branch]
    """Groups of seeds in the slot."""
    parents: Tensor
    """Node of each child. (children,) int64."""


class _Branch(NamedTuple):
    """One group of seeds."""

    group: Group
    """Nodes of the group."""
    layers: list[Layer]
    """Layers of the seeds."""
    targets: Tensor
    """Children that receive a residual. (targets,) int64."""
    sources: Tensor
    """Position of each target's node within the group. (targets,) int64."""
    weight: Tensor | None
    """Alpha of each target, for each channel, None if all are 1. (targets * channels,) float32."""


def _computes_as(layer: Layer | None, kind: type[Kind]) -> TypeGuard[Kind]:
    """Return whether a layer has the forward pass of `kind`."""
    return isinstance(layer, kind) and type(layer).forward is kind.forward
