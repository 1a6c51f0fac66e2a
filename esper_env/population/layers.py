"""Layers of m members that run as one grouped operation.

A layer holds no tensors. It describes the parameters and buffers of one member, their initial
values, and the forward pass of m members.

Images are (batch, m * channels, height, width) and channels-last in memory, so
(batch, height, width, m, channels) is a view of them without a copy.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and initial values, `value` + U(-bound, bound), of one tensor of one member."""

    name: str
    shape: tuple[int, ...]
    value: float = 0.0
    bound: float = 0.0

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


class Layer(ABC):
    """Layer of one member, with a forward pass for many members."""

    @property
    def parameters(self) -> tuple[TensorSpec, ...]:
        """Trainable tensors of one member."""
        return ()

    @property
    def buffers(self) -> tuple[TensorSpec, ...]:
        """Running statistics of one member."""
        return ()

    def multiply_adds(self, height: int, width: int) -> int:
        """Return the multiply-adds of one member per image."""
        del height, width
        return 0

    @abstractmethod
    def forward(
        self, x: Tensor, parameters: Sequence[Tensor], buffers: Sequence[Tensor], training: bool
    ) -> Tensor:
        """Run the layer for m members.

        Args:
            x: Input features. (batch, m * channels, height, width), channels-last.
            parameters: One tensor per spec. (m, *shape).
            buffers: One tensor per spec, updated in place in training. (m, *shape), contiguous.
            training: Whether the layer uses batch statistics and updates the running ones.

        Returns:
            Output features. (batch, m * channels_out, height, width).
        """


@dataclass(frozen=True)
class Conv(Layer):
    """Convolution with an odd kernel and stride 1, which keeps height and width."""

    in_channels: int
    out_channels: int
    kernel_size: int
    groups: int = 1
    bias: bool = False
    zero: bool = False
    """Whether weight and bias start at zero."""

    @functools.cached_property
    def parameters(self) -> tuple[TensorSpec, ...]:
        """Weight, and bias if enabled; uniform within 1 / sqrt(fan_in) as in `torch.nn.Conv2d`."""
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
        """Return one multiply-add per weight and pixel, without the bias."""
        return self.parameters[0].size * height * width

    def forward(
        self, x: Tensor, parameters: Sequence[Tensor], buffers: Sequence[Tensor], training: bool
    ) -> Tensor:
        """Run one grouped convolution; members may also share one input of `in_channels`."""
        del buffers, training
        weight = parameters[0]
        bias = parameters[1].flatten() if self.bias else None
        inputs = x.shape[1] // self.in_channels
        if inputs != len(weight) and (inputs != 1 or self.groups != 1):
            raise ValueError(
                f"Conv: expected inputs of {self.in_channels} channels for each of {len(weight)} "
                f"members, got {x.shape[1]} channels"
            )
        padding = self.kernel_size // 2
        # (m, out, in / groups, k, k) -> (m * out, in / groups, k, k)
        return F.conv2d(x, weight.flatten(0, 1), bias, padding=padding, groups=inputs * self.groups)


@dataclass(frozen=True)
class Norm(Layer):
    """Batch normalization. Run over m * channels, it normalizes each member separately."""

    channels: int
    zero: bool = False
    """Whether the scale starts at zero instead of one."""

    @functools.cached_property
    def parameters(self) -> tuple[TensorSpec, ...]:
        """Scale and shift."""
        value = 0.0 if self.zero else 1.0
        return (
            TensorSpec("weight", (self.channels,), value=value),
            TensorSpec("bias", (self.channels,)),
        )

    @functools.cached_property
    def buffers(self) -> tuple[TensorSpec, ...]:
        """Running mean and variance, updated with PyTorch's default momentum of 0.1."""
        return (
            TensorSpec("running_mean", (self.channels,)),
            TensorSpec("running_var", (self.channels,), value=1.0),
        )

    def multiply_adds(self, height: int, width: int) -> int:
        """Return one multiply-add per channel and pixel."""
        return self.channels * height * width

    def forward(
        self, x: Tensor, parameters: Sequence[Tensor], buffers: Sequence[Tensor], training: bool
    ) -> Tensor:
        """Run one batch norm over m * channels."""
        weight, bias = parameters
        mean, var = buffers
        # Not `F.batch_norm`: on a GPU it calls cuDNN, which requires tensors whose addresses are
        # multiples of 16 bytes. These are views of larger ones.
        out: Tensor = torch.native_batch_norm(
            x, weight.flatten(), bias.flatten(), mean.view(-1), var.view(-1), training, 0.1, 1e-5
        )[0]
        return out


@dataclass(frozen=True)
class Relu(Layer):
    """Rectified linear unit."""

    def forward(
        self, x: Tensor, parameters: Sequence[Tensor], buffers: Sequence[Tensor], training: bool
    ) -> Tensor:
        """Return max(x, 0)."""
        del parameters, buffers, training
        return F.relu(x)


@dataclass(frozen=True)
class SqueezeExcite(Layer):
    """Squeeze-and-excitation: x * tanh(W2 silu(W1 pool(x) + b1) + b2), W2 and b2 initially zero.

    Source: Hu et al. (2018), equations 3 and 4. tanh replaces the sigmoid so that the initial
    output is zero. silu replaces ReLU so that no hidden unit is initially dead.
    """

    channels: int
    hidden: int

    @functools.cached_property
    def parameters(self) -> tuple[TensorSpec, ...]:
        """Weights and biases of the two linear layers on pooled features."""
        bound = 1 / sqrt(self.channels)
        return (
            TensorSpec("squeeze_weight", (self.hidden, self.channels), bound=bound),
            TensorSpec("squeeze_bias", (self.hidden,), bound=bound),
            TensorSpec("excite_weight", (self.channels, self.hidden)),
            TensorSpec("excite_bias", (self.channels,)),
        )

    def multiply_adds(self, height: int, width: int) -> int:
        """Return the multiply-adds of both linear layers, and one per channel and pixel."""
        return 2 * self.channels * self.hidden + self.channels * height * width

    def forward(
        self, x: Tensor, parameters: Sequence[Tensor], buffers: Sequence[Tensor], training: bool
    ) -> Tensor:
        """Scale each channel by a function of all pooled channels."""
        del buffers, training
        squeeze_weight, squeeze_bias, excite_weight, excite_bias = parameters
        m = len(squeeze_weight)
        # (batch, m * channels, height, width) -> (m, batch, channels)
        pooled = x.mean(dim=(2, 3)).view(len(x), m, self.channels).transpose(0, 1)
        hidden = F.silu(torch.baddbmm(squeeze_bias[:, None], pooled, squeeze_weight.mT))
        excite = torch.tanh(torch.baddbmm(excite_bias[:, None], hidden, excite_weight.mT))
        # (m, batch, channels) -> (batch, m * channels, 1, 1)
        return x * excite.transpose(0, 1).reshape(len(x), -1, 1, 1)


def run_layers(
    layers: Sequence[Layer],
    x: Tensor,
    parameters: Iterator[Tensor],
    buffers: Iterator[Tensor],
    training: bool,
) -> Tensor:
    """Run layers in order, each with the next tensors of both iterators; see `Layer.forward`."""
    for layer in layers:
        own = [next(parameters) for _ in layer.parameters]
        running = [next(buffers) for _ in layer.buffers]
        x = layer.forward(x, own, running, training)
    return x


def as_members(x: Tensor, m: int) -> Tensor:
    """Give images a member axis: (batch, m * channels, h, w) -> (batch, h, w, m, channels)."""
    batch, width, height, size = x.shape[0], x.shape[3], x.shape[2], x.shape[1]
    return x.permute(0, 2, 3, 1).contiguous().view(batch, height, width, m, size // m)


def as_images(x: Tensor) -> Tensor:
    """Remove the member axis: (batch, h, w, m, channels) -> (batch, m * channels, h, w)."""
    return x.flatten(3).permute(0, 3, 1, 2)


def classify(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply global average pooling and each member's linear head.

    Args:
        x: Features after the last block. (batch, m * channels, height, width).
        weight: Weight of each head. (m, classes, channels).
        bias: Bias of each head. (m, classes).

    Returns:
        Logits. (m, batch, classes).
    """
    # (batch, m * channels) -> (m, batch, channels)
    pooled = x.mean(dim=(2, 3)).view(len(x), len(weight), -1).transpose(0, 1)
    return torch.baddbmm(bias[:, None], pooled, weight.mT)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each member and image [nats].

    Args:
        logits: Logits. (m, batch, classes).
        labels: Classes, -1 for padding. (m, batch) int64.

    Returns:
        (m, batch) float32, 0 for padding.
    """
    flat = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.reshape(-1), reduction="none", ignore_index=-1
    )
    return flat.view(labels.shape)
