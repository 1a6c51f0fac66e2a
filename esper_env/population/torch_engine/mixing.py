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
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esper_env.config import BoolArray, IntArray
from esper_env.population.interface import Seeds


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

    @property
    def own_gates(self) -> slice:
        """Positions of the group's gates among all gates of the slot."""
        return slice(self.first_gate, self.first_gate + self.num_gate)


def group_members(
    seeds: Seeds, members: IntArray, slot: int, runs: BoolArray, device: torch.device
) -> list[tuple[int, IntArray, Group]]:
    """Group members by the blueprint of their seed in one slot.

    Args:
        seeds: Seeds of the whole population.
        members: Members to group. (m,).
        slot: The slot.
        runs: Whether a member's seed, if it has one, is computed. (m,).
        device: Device of the positions.

    Returns:
        Blueprint, positions of the members in `members`, and these positions as a `Group`.
    """
    blueprint = np.where(runs, seeds.blueprint[members, slot], -1)
    rank = np.array([0, 2, 1])[seeds.blend[members, slot]]  # Blend.ADD, MULTIPLY, GATE
    result, first_gate = [], 0
    for index in np.unique(blueprint[blueprint >= 0]).tolist():
        local = np.nonzero(blueprint == index)[0]
        local = local[np.argsort(rank[local], kind="stable")]
        _, num_gate, num_multiply = np.bincount(rank[local], minlength=3).tolist()
        group = Group(torch.from_numpy(local).to(device), num_gate, num_multiply, first_gate)
        result.append((index, local, group))
        first_gate += num_gate
    return result


def spread(values: npt.NDArray[np.generic], channels: int, device: torch.device) -> Tensor | None:
    """Repeat each member's weight for its channels; None if all are 1, to save a multiplication.

    (m,) -> (m * channels,) float32.
    """
    if (values == 1).all():
        return None
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
        gate: Values g(x) of the group's gates, (batch, num_gate), or None without gates.

    Returns:
        r. (batch, height, width, m, channels). It is `branch` itself if every blend is ADD.
    """
    if not group.num_gate and not group.num_multiply:
        return branch
    mixed = branch.clone()
    if group.num_gate and gate is not None:
        _scale_by_gate(mixed, group, gate)
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
        ctx.keeps, ctx.members, ctx.shape = keeps, members, features.shape
        ctx.empty = features.new_empty(0)
        ctx.set_materialize_grads(False)
        return tuple(features.index_select(3, index) for index in members)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Add the gradients of all groups into one tensor; detached groups have none."""
        # The forward was out[g] = features[..., members[g], :] for each group g.
        total = ctx.empty.new_zeros(ctx.shape)
        for grad, keep, members in zip(grads, ctx.keeps, ctx.members, strict=True):
            if grad is not None:
                total.index_add_(3, members, _scaled(grad, keep))
        return total, None, *(None for _ in ctx.members)


class Mix(NamedTuple):
    """Blend weights of one group, without gradients."""

    group: Group
    alpha: Tensor | None
    """Weights in the forward pass, (m * channels,) float32; None if all are 1."""
    beta: Tensor | None
    """Weights of the seeds' gradients, (m * channels,) float32; None if all are 1."""
    is_visible: bool
    """Whether any alpha is above 0."""


class MixResiduals(torch.autograd.Function):
    """Computes h + alpha * r, and weights the gradients of seeds by beta instead of alpha."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, gate: Tensor | None, mixes: list[Mix], *branches: Tensor
    ) -> Tensor:
        """Return h + alpha * r.

        Args:
            ctx: Autograd's context.
            features: Features h. (batch, height, width, members, channels).
            gate: Values g(x) of all gates of the slot, (batch, num_gates), or None without gates.
            mixes: Each group with its blend weights.
            branches: Output d(x) of each group. (batch, height, width, m, channels).

        Returns:
            Mixed features. (batch, height, width, members, channels).
        """
        ctx.mixes = mixes
        # The backward pass of ADD needs no activations, so a slot with ADD only saves none.
        needs_features = any(mix.group.num_multiply for mix in mixes)
        needs_branches = needs_features or gate is not None
        ctx.save_for_backward(
            features if needs_features else None, gate, *(branches if needs_branches else ())
        )
        out = features.clone()
        for (group, alpha, _, is_visible), branch in zip(mixes, branches, strict=True):
            if is_visible:
                own = None if gate is None else gate[:, group.own_gates]
                mixed = residual(group, features, branch, own)
                out.index_add_(3, group.members, _scaled(mixed, alpha))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradients of features, gate and branches."""
        # The forward was out = h + alpha * r, with r = d, h * tanh(d) or g * d for each member.
        (grad,) = grads
        features, gate, *branches = ctx.saved_tensors
        # The identity path passes the gradient on unchanged, so it is copied only when a MULTIPLY
        # member adds to it.
        grad_features = grad
        grad_gate = None if gate is None else torch.zeros_like(gate)
        grad_branches = []
        for i, (group, alpha, beta, is_visible) in enumerate(ctx.mixes):
            # (batch, height, width, members, channels) -> (batch, height, width, m, channels)
            local = grad.index_select(3, group.members)
            # ADD: the gradient of d is beta * grad. Without beta it is `local` itself, which is not
            # read again after the changes in place below.
            grad_branch = _scaled(local, beta)
            # GATE: the gradient of g is beta * grad * d, summed over pixels and channels; that of d
            # is beta * grad * g.
            if group.num_gate and grad_gate is not None:
                rows = group.gate_slice
                product = grad_branch[:, :, :, rows] * branches[i][:, :, :, rows]
                # (batch, height, width, num_gate, channels) -> (batch, num_gate)
                grad_gate[:, group.own_gates] = product.sum((1, 2)).sum(2)
                _scale_by_gate(grad_branch, group, gate[:, group.own_gates])
            # MULTIPLY: the gradient of d is beta * grad * h * (1 - tanh(d)^2). The features receive
            # alpha * grad * tanh(d) in addition, because r contains h itself, never detached.
            if group.num_multiply:
                rows = group.multiply_slice
                members = group.members[rows]
                factor = features.index_select(3, members)
                tanh = torch.tanh(branches[i][:, :, :, rows])
                if is_visible:
                    if grad_features is grad:
                        grad_features = grad.clone()
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


def _scale_by_gate(x: Tensor, group: Group, gate: Tensor) -> None:
    """Multiply the GATE members of (batch, height, width, m, channels) in place by their gates."""
    channels, rows = x.shape[4], group.gate_slice
    # (batch, num_gate) -> (batch, 1, 1, num_gate * channels)
    weight = gate.repeat_interleave(channels, dim=1)[:, None, None]
    x.flatten(3)[..., rows.start * channels : rows.stop * channels] *= weight
