"""Operations that mix the output of seed modules into the features at a slot.

Features have the shape (batch, height, width, members, channels). Let h be the features, d the
residual branch of a seed, sg the stop-gradient, and x = sg(h) while the seed is isolated, else h:

    TRAINING     h + r(x) - sg(r(x)), which equals h, while the seed receives the loss gradient
    afterwards   h + alpha * r

    r = d(x) for ADD;  h * tanh(d(x)) for MULTIPLY;  g(x) * d(x) for GATE

One operation computes both rows. It weights r by alpha in the forward pass and the seed's gradient
by beta in the backward pass, with alpha 0 and beta 1 in TRAINING and beta = alpha afterwards. The
identity path is never detached.
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
    """Members with the same blueprint in the same slot, in the order ADD, GATE, MULTIPLY."""

    members: Tensor
    """Positions along the member axis of the features. (m,) int64."""
    num_gate: int
    """Number of members whose seed has the blend GATE."""
    num_multiply: int
    """Number of members whose seed has the blend MULTIPLY."""
    first_gate: int
    """Position of the group's first gate among all gates of the slot."""

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
    """Group members by blueprint, each group in the order ADD, GATE, MULTIPLY.

    Args:
        blueprint: Blueprint of each member's seed in one slot, -1 for none. (members,).
        blend: Values of `Blend`. (members,).
        runs: Whether the seed is computed. (members,).

    Returns:
        Blueprint, positions of the members (m,) int64, number of GATE, and number of MULTIPLY of
        each group.
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
    """Repeat each member's value for its channels. (m,) -> (m * channels,) float32."""
    return torch.from_numpy(np.repeat(values.astype(np.float32), channels)).to(device)


def gates(pooled: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return g(x) = sigmoid(w . pool(x) + b) per image and gated member.

    Args:
        pooled: Average-pooled features. (batch, m, channels).
        weight: Weight of each gate. (m, channels).
        bias: Bias of each gate. (m, 1).

    Returns:
        Values of the gates, 0 to 1. (batch, m).
    """
    return torch.sigmoid((pooled * weight).sum(dim=2) + bias.view(-1))


def residual(group: Group, features: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    """Return the residual r of one group.

    Args:
        group: Members and blends of the group.
        features: Features h. (batch, height, width, members, channels).
        branch: Output d(x), of the same dtype. (batch, height, width, m, channels).
        gate: Values g(x) of all gates of the slot, (batch, num_gates), or None without gates.

    Returns:
        r. (batch, height, width, m, channels). It is `branch` itself if every blend is ADD.
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
    """Copies the features of several groups of members, with one buffer for their gradients.

    With one `index_select` per group, autograd would allocate a gradient of all members' features
    for each group.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, keeps: list[Tensor | None], *members: Tensor
    ) -> tuple[Tensor, ...]:
        """Copy the features of each group.

        Args:
            ctx: Autograd's context.
            features: Features of all members. (batch, height, width, members, channels).
            keeps: Factor on the gradient for each group: 0 for channels of members whose input is
                detached, else 1; or None for 1 everywhere. (m * channels,) float32.
            members: Positions of the members of each group. (m,) int64.

        Returns:
            Features of each group. (batch, height, width, m, channels).
        """
        ctx.keeps = keeps
        ctx.members = members
        ctx.shape = features.shape
        return tuple(features.index_select(3, index) for index in members)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Add the gradients of all groups into one tensor."""
        # The forward was out[g] = features[..., members[g], :] for each group g.
        total = grads[0].new_zeros(ctx.shape)
        for grad, keep, members in zip(grads, ctx.keeps, ctx.members, strict=True):
            total.index_add_(3, members, _scaled(grad, keep))
        return total, None, *(None for _ in ctx.members)


@dataclass(frozen=True)
class Mix:
    """Groups and blend weights of one slot, without gradients. Tuples have one entry per group."""

    groups: tuple[Group, ...]
    """Groups of members."""
    alphas: tuple[Tensor | None, ...]
    """Weights in the forward pass, (m * channels,) float32; None if all are 1."""
    betas: tuple[Tensor | None, ...]
    """Weights of the seeds' gradients, (m * channels,) float32; None if all are 1."""
    is_visible: tuple[bool, ...]
    """Whether any alpha of the group is above 0."""


class MixResiduals(torch.autograd.Function):
    """Computes h + alpha * r, and weights the gradients of seeds by beta instead of alpha."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, gate: Tensor | None, mix: Mix, *branches: Tensor
    ) -> Tensor:
        """Return h + alpha * r.

        Args:
            ctx: Autograd's context.
            features: Features h. (batch, height, width, members, channels).
            gate: Values g(x) of all gates of the slot, (batch, num_gates), or None without gates.
            mix: Groups and blend weights.
            branches: Output d(x) of each group. (batch, height, width, m, channels).

        Returns:
            Mixed features. (batch, height, width, members, channels).
        """
        ctx.mix = mix
        # The backward pass of ADD needs no activations, so a slot with ADD only saves none.
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
        """Return the gradients of features, gate and branches."""
        # The forward was out = h + alpha * r, with r = d, h * tanh(d) or g * d for each member.
        mix: Mix = ctx.mix
        (grad,) = grads
        features, gate, *branches = ctx.saved_tensors
        # The identity path passes the gradient on unchanged, so it is copied only when a MULTIPLY
        # member adds to it.
        grad_features = grad
        grad_gate = None if gate is None else torch.zeros_like(gate)
        grad_branches = []
        for i, group in enumerate(mix.groups):
            # (batch, height, width, members, channels) -> (batch, height, width, m, channels)
            local = grad.index_select(3, group.members)
            # ADD: the gradient of d is beta * grad. Without beta it is `local` itself, which is not
            # read again after the changes in place below.
            grad_branch = _scaled(local, mix.betas[i])
            # GATE: the gradient of g is beta * grad * d, summed over pixels and channels; that of d
            # is beta * grad * g.
            if group.num_gate:
                assert grad_gate is not None
                rows = group.gate_slice
                product = grad_branch[:, :, :, rows] * branches[i][:, :, :, rows]
                start = group.first_gate
                # (batch, height, width, num_gate, channels) -> (batch, num_gate)
                grad_gate[:, start : start + group.num_gate] = product.sum((1, 2)).sum(2)
                _scale_rows(grad_branch, rows, _spread_gate(group, gate, grad.shape[4]))
            # MULTIPLY: the gradient of d is beta * grad * h * (1 - tanh(d)^2). The features receive
            # alpha * grad * tanh(d) in addition, because r contains h itself, never detached.
            if group.num_multiply:
                rows = group.multiply_slice
                members = group.members[rows]
                factor = features.index_select(3, members)
                tanh = torch.tanh(branches[i][:, :, :, rows])
                if mix.is_visible[i]:
                    if grad_features is grad:
                        grad_features = grad.clone()
                    alpha = mix.alphas[i]
                    # MULTIPLY members are the last of the group: (m * channels,) -> their part
                    if alpha is not None:
                        alpha = alpha[rows.start * grad.shape[4] :]
                    through = _scaled(local[:, :, :, rows] * tanh, alpha)
                    grad_features.index_add_(3, members, through)
                grad_branch[:, :, :, rows] *= factor.mul_(1 - tanh * tanh)
            grad_branches.append(grad_branch)
        return grad_features, grad_gate, None, *grad_branches


def _scaled(x: Tensor, weight: Tensor | None) -> Tensor:
    """Multiply (batch, height, width, m, channels) by (m * channels,).

    With members and channels as one axis, the product runs over long contiguous rows. Broadcasting
    (m, 1) over (m, channels) is several times slower.
    """
    if weight is None:
        return x
    return (x.flatten(3) * weight.to(x.dtype)).view(x.shape)


def _scale_rows(x: Tensor, rows: slice, weight: Tensor) -> None:
    """Multiply the members of `rows` in place by (batch, 1, 1, len(rows) * channels)."""
    channels = x.shape[4]
    x.flatten(3)[..., rows.start * channels : rows.stop * channels] *= weight


def _spread_gate(group: Group, gate: Tensor | None, channels: int) -> Tensor:
    """Repeat the group's gates for every channel. (batch, 1, 1, num_gate * channels)."""
    assert gate is not None
    own = gate[:, group.first_gate : group.first_gate + group.num_gate]
    return own.repeat_interleave(channels, dim=1)[:, None, None]
