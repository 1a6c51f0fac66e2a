"""Layers of many networks at once: images are (batch, members * channels, height, width).

A layer holds no tensors. It says which parameters and buffers one member needs, how they start,
and how the layers of `m` members run as one grouped operation. Features are channels-last in
memory, so (batch, height, width, members, channels) is a free view of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of one member: shape, and start value `value` + U(-bound, bound)."""

    name: str
    shape: tuple[int, ...]
    value: float = 0.0
    bound: float = 0.0

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


class Layer(ABC):
    """A layer of one member, and how it runs for many."""

    @property
    def parameters(self) -> tuple[TensorSpec, ...]:
        """Trained tensors of one member."""
        return ()

    @property
    def buffers(self) -> tuple[TensorSpec, ...]:
        """Running statistics of one member."""
        return ()

    def multiply_adds(self, height: int, width: int) -> int:
        """Multiply-adds per image of one member."""
        del height, width
        return 0

    @abstractmethod
    def forward(
        self, x: Tensor, parameters: Sequence[Tensor], buffers: Sequence[Tensor], training: bool
    ) -> Tensor:
        """Run the layer.

        Args:
            x: Features. (batch, m * channels, height, width), channels-last.
            parameters: One tensor per spec. (m, *shape).
            buffers: One tensor per spec, updated in place in training. (m, *shape), contiguous.
            training: Whether batch statistics are used and running ones updated.

        Returns:
            (batch, m * channels_out, height, width).
        """


@dataclass(frozen=True)
class Conv(Layer):
    """Convolution with odd kernel and stride 1 that keeps height and width."""

    in_channels: int
    out_channels: int
    kernel_size: int
    groups: int = 1
    bias: bool = False
    zero: bool = False
    """Whether weight and bias start at zero."""

    @property
    def parameters(self) -> tuple[TensorSpec, ...]:
        """Weight, and bias if asked for; uniform within 1 / sqrt(fan_in) as in torch.nn."""
        shape = (
            self.out_channels,
            self.in_channels // self.groups,
            self.kernel_size,
            self.kernel_size,
        )
        bound = 0.0 if self.zero else 1 / sqrt(prod(shape[1:]))
        specs = [TensorSpec("weight", shape, bound=bound)]
        if self.bias:
            specs.append(TensorSpec("bias", (self.out_channels,), bound=bound))
        return tuple(specs)

    def multiply_adds(self, height: int, width: int) -> int:
        """One per weight and pixel."""
        return self.parameters[0].size * height * width

    def forward(
        self, x: Tensor, parameters: Sequence[Tensor], buffers: Sequence[Tensor], training: bool
    ) -> Tensor:
        """One grouped convolution; members may also share one input of `in_channels`."""
        del buffers, training
        weight = parameters[0]
        bias = parameters[1].flatten() if self.bias else None
        inputs = x.shape[1] // self.in_channels
        assert inputs == len(weight) or (inputs == 1 and self.groups == 1)
        padding = self.kernel_size // 2
        return F.conv2d(x, weight.flatten(0, 1), bias, padding=padding, groups=inputs * self.groups)


@dataclass(frozen=True)
class Norm(Layer):
    """Batch normalisation; over members * channels it is each member's own."""

    channels: int
    zero: bool = False
    """Whether the scale starts at zero instead of one."""

    @property
    def parameters(self) -> tuple[TensorSpec, ...]:
        """Scale and shift."""
        value = 0.0 if self.zero else 1.0
        return (
            TensorSpec("weight", (self.channels,), value=value),
            TensorSpec("bias", (self.channels,)),
        )

    @property
    def buffers(self) -> tuple[TensorSpec, ...]:
        """Running mean and variance, with torch's momentum of 0.1."""
        return (
            TensorSpec("running_mean", (self.channels,)),
            TensorSpec("running_var", (self.channels,), value=1.0),
        )

    def multiply_adds(self, height: int, width: int) -> int:
        """One per feature."""
        return self.channels * height * width

    def forward(
        self, x: Tensor, parameters: Sequence[Tensor], buffers: Sequence[Tensor], training: bool
    ) -> Tensor:
        """One batch norm over members * channels."""
        weight, bias = parameters
        mean, var = buffers
        return F.batch_norm(
            x, mean.view(-1), var.view(-1), weight.flatten(), bias.flatten(), training
        )


@dataclass(frozen=True)
class Relu(Layer):
    """Rectifier."""

    def forward(
        self, x: Tensor, parameters: Sequence[Tensor], buffers: Sequence[Tensor], training: bool
    ) -> Tensor:
        """Rectify."""
        del parameters, buffers, training
        return F.relu(x)


@dataclass(frozen=True)
class SqueezeExcite(Layer):
    """x * tanh(W2 silu(W1 pool(x) + b1) + b2), with W2 and b2 zero at birth.

    Source: Hu et al. (2018), equations 3 and 4, with tanh in place of the sigmoid so that the
    branch is zero at birth, and silu in place of ReLU so that no hidden unit is born dead.
    """

    channels: int
    hidden: int

    @property
    def parameters(self) -> tuple[TensorSpec, ...]:
        """Two affine maps between pooled features."""
        bound = 1 / sqrt(self.channels)
        return (
            TensorSpec("squeeze_weight", (self.hidden, self.channels), bound=bound),
            TensorSpec("squeeze_bias", (self.hidden,), bound=bound),
            TensorSpec("excite_weight", (self.channels, self.hidden)),
            TensorSpec("excite_bias", (self.channels,)),
        )

    def multiply_adds(self, height: int, width: int) -> int:
        """Two small maps and one product per feature."""
        return 2 * self.channels * self.hidden + self.channels * height * width

    def forward(
        self, x: Tensor, parameters: Sequence[Tensor], buffers: Sequence[Tensor], training: bool
    ) -> Tensor:
        """Scale each channel by a function of all pooled channels."""
        del buffers, training
        squeeze_weight, squeeze_bias, excite_weight, excite_bias = parameters
        m = len(squeeze_weight)
        pooled = x.mean(dim=(2, 3)).view(len(x), m, self.channels).transpose(0, 1)
        hidden = F.silu(torch.baddbmm(squeeze_bias[:, None], pooled, squeeze_weight.mT))
        excite = torch.tanh(torch.baddbmm(excite_bias[:, None], hidden, excite_weight.mT))
        # (m, batch, channels) -> (batch, m * channels, 1, 1)
        return x * excite.transpose(0, 1).reshape(len(x), -1, 1, 1)


def as_members(x: Tensor, m: int) -> Tensor:
    """(batch, m * channels, height, width) -> (batch, height, width, m, channels)."""
    batch, width, height, size = x.shape[0], x.shape[3], x.shape[2], x.shape[1]
    return x.permute(0, 2, 3, 1).contiguous().view(batch, height, width, m, size // m)


def as_images(x: Tensor) -> Tensor:
    """(batch, height, width, m, channels) -> (batch, m * channels, height, width)."""
    return x.flatten(3).permute(0, 3, 1, 2)


def classify(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Pool and classify. (batch, m * channels, h, w) -> (m, batch, classes)."""
    pooled = x.mean(dim=(2, 3)).view(len(x), len(weight), -1).transpose(0, 1)
    return torch.baddbmm(bias[:, None], pooled, weight.mT)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss per member and image. (m, batch, classes), (m, batch) -> (m, batch) float32."""
    flat = F.cross_entropy(logits.flatten(0, 1).float(), labels.reshape(-1), reduction="none")
    return flat.view(labels.shape)
