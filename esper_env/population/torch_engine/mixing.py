"""How seed modules read and change the features at their slot.

Features are seen as (batch, height, width, members, channels). With h the features, d the residual
branch of a seed, and x = sg(h) while it is isolated, else h:

    TRAINING     h + r(x) - sg(r(x)), which is h, and the seed receives the loss gradient
    afterwards   h + alpha * r

    r = d(x) for ADD;  h * tanh(d(x)) for MULTIPLY;  g(x) * d(x) for GATE

Both rows are one operation: forward weight alpha, backward weight beta for the seed, with alpha 0
and beta 1 in TRAINING and beta = alpha afterwards. The identity path is never detached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esper_env.config import Blend, BoolArray, IntArray


@dataclass(frozen=True)
class Group:
    """Members with the same blueprint in the same slot: first ADD, then GATE, then MULTIPLY."""

    members: Tensor
    """Positions among the members of the program. (m,) int64."""
    num_gate: int
    num_multiply: int
    first_gate: int
    """Position of the group's first gate among the slot's gates."""

    @property
    def gate_slice(self) -> slice:
        """Positions of the GATE members within the group."""
        stop = len(self.members) - self.num_multiply
        return slice(stop - self.num_gate, stop)

    @property
    def multiply_slice(self) -> slice:
        """Positions of the MULTIPLY members within the group."""
        return slice(len(self.members) - self.num_multiply, len(self.members))


def group_members(
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


def spread(values: npt.NDArray[np.generic], channels: int, device: torch.device) -> Tensor:
    """Repeat one value per member for each of its channels. (m * channels,) float32."""
    return torch.from_numpy(np.repeat(values.astype(np.float32), channels)).to(device)


def gates(pooled: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return g(x) = sigmoid(w . pool(x) + b) per image and gated member.

    Args:
        pooled: Average-pooled features. (batch, m, channels).
        weight: (m, channels).
        bias: (m, 1).

    Returns:
        (batch, m).
    """
    return torch.sigmoid((pooled * weight).sum(dim=2) + bias.view(-1))


def residual(group: Group, features: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    """Return r for one group.

    Args:
        group: Its members and their blends.
        features: (batch, height, width, members, channels).
        branch: d(x), of the features' dtype. (batch, height, width, m, channels).
        gate: All gates of the slot, (batch, num_gates), or None if there are none.

    Returns:
        (batch, height, width, m, channels); `branch` itself where every blend is ADD.
    """
    if not group.num_gate and not group.num_multiply:
        return branch
    mixed = branch.clone()
    if group.num_gate:
        _scale_rows(mixed, group.gate_slice, _spread_gate(group, gate, branch.shape[4]))
    if group.num_multiply:
        rows = group.multiply_slice
        factor = features.index_select(3, group.members[rows])
        torch.mul(factor, torch.tanh(branch[:, :, :, rows]), out=mixed[:, :, :, rows])
    return mixed


class GatherMembers(torch.autograd.Function):
    """Copy the features of several groups of members; their gradients come back in one buffer."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, keeps: list[Tensor | None], *members: Tensor
    ) -> tuple[Tensor, ...]:
        """Gather.

        Args:
            ctx: Autograd's context.
            features: (batch, height, width, members, channels).
            keeps: Per group None, or 0 for the channels of members whose input is detached.
                (m * channels,) float32.
            members: Per group, which members. (m,) int64.
        """
        ctx.keeps = keeps
        ctx.members = members
        ctx.shape = features.shape
        return tuple(features.index_select(3, index) for index in members)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Add every group's gradient into one zero tensor."""
        total = grads[0].new_zeros(ctx.shape)
        for grad, keep, members in zip(grads, ctx.keeps, ctx.members, strict=True):
            total.index_add_(3, members, _scaled(grad, keep))
        return total, None, *(None for _ in ctx.members)


@dataclass(frozen=True)
class Mix:
    """Everything about one slot's mixture that carries no gradient; one entry per group."""

    groups: tuple[Group, ...]
    alphas: tuple[Tensor | None, ...]
    """Forward weights, (m * channels,) float32; None where all are 1."""
    betas: tuple[Tensor | None, ...]
    """Backward weights, likewise."""
    is_visible: tuple[bool, ...]
    """Whether any alpha of the group is above 0."""


class MixResiduals(torch.autograd.Function):
    """h + alpha * r forward, with beta in place of alpha towards the seed."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, gate: Tensor | None, mix: Mix, *branches: Tensor
    ) -> Tensor:
        """Mix.

        Args:
            ctx: Autograd's context.
            features: (batch, height, width, members, channels).
            gate: (batch, num_gates), or None.
            mix: Weights and groups.
            branches: d(x) per group. (batch, height, width, m, channels).
        """
        ctx.mix = mix
        needs_features = any(group.num_multiply for group in mix.groups)
        needs_branches = needs_features or gate is not None
        ctx.save_for_backward(
            features if needs_features else None, gate, *(branches if needs_branches else ())
        )
        out = features.clone()
        for group, alpha, is_visible, branch in zip(
            mix.groups, mix.alphas, mix.is_visible, branches, strict=True
        ):
            if is_visible:
                mixed = residual(group, features, branch, gate)
                out.index_add_(3, group.members, _scaled(mixed, alpha))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return gradients of features, gate and branches."""
        mix: Mix = ctx.mix
        (grad,) = grads
        features, gate, *branches = ctx.saved_tensors
        grad_features = grad
        grad_gate = None if gate is None else torch.zeros_like(gate)
        grad_branches = []
        for i, group in enumerate(mix.groups):
            local = grad.index_select(3, group.members)
            grad_branch = _scaled(local, mix.betas[i])
            if group.num_gate:
                assert grad_gate is not None
                rows = group.gate_slice
                product = grad_branch[:, :, :, rows] * branches[i][:, :, :, rows]
                start = group.first_gate
                grad_gate[:, start : start + group.num_gate] = product.sum((1, 2)).sum(2)
                _scale_rows(grad_branch, rows, _spread_gate(group, gate, grad.shape[4]))
            if group.num_multiply:
                rows = group.multiply_slice
                members = group.members[rows]
                factor = features.index_select(3, members)
                tanh = torch.tanh(branches[i][:, :, :, rows])
                if mix.is_visible[i]:
                    if grad_features is grad:
                        grad_features = grad.clone()
                    alpha = mix.alphas[i]
                    if alpha is not None:
                        alpha = alpha[rows.start * grad.shape[4] :]
                    through = _scaled(local[:, :, :, rows] * tanh, alpha)
                    grad_features.index_add_(3, members, through)
                grad_branch[:, :, :, rows] *= factor.mul_(1 - tanh * tanh)
            grad_branches.append(grad_branch)
        return grad_features, grad_gate, None, *grad_branches


def _scaled(x: Tensor, weight: Tensor | None) -> Tensor:
    """Multiply (batch, height, width, m, channels) by (m * channels,).

    With members and channels as one axis the product runs over long contiguous rows; broadcasting
    (m, 1) over (m, channels) instead is several times slower.
    """
    if weight is None:
        return x
    return (x.flatten(3) * weight.to(x.dtype)).view(x.shape)


def _scale_rows(x: Tensor, rows: slice, weight: Tensor) -> None:
    """Multiply some members in place by (batch, 1, 1, members * channels)."""
    channels = x.shape[4]
    x.flatten(3)[..., rows.start * channels : rows.stop * channels] *= weight


def _spread_gate(group: Group, gate: Tensor | None, channels: int) -> Tensor:
    """Return the group's gates for every channel, (batch, 1, 1, num_gate * channels)."""
    assert gate is not None
    own = gate[:, group.first_gate : group.first_gate + group.num_gate]
    return own.repeat_interleave(channels, dim=1)[:, None, None]
