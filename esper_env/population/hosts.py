"""Host networks: a sequence of blocks, global average pooling and a linear head.

A block is a convolution, a norm and a relu. A slot and a 2x2 max-pool follow each block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt

from esper_env.population.check_layers import Candidate, check_layers
from esper_env.population.layers import Conv, Layer, Norm, Relu, TensorSpec


@dataclass(frozen=True, kw_only=True)
class Host:
    """Shape of a host. Slot s follows block s."""

    in_channels: int
    """Channels of an image."""
    image_size: int
    """Height and width of an image [pixels]."""
    channels: tuple[int, ...]
    """Output channels of each block."""
    num_classes: int
    """Classes of the task."""
    kernel_size: int = 3
    """Kernel size of the convolution in a built-in block [pixels]."""
    build_block: Callable[[int, int], Sequence[Layer]] | None = None
    """Maps the channels before and after a block to its layers; None for the built-in block."""

    def scaled(self, width: float) -> Host:
        """Return the host with `width` times the channels in every block, at least one each."""
        channels = tuple(max(1, int(c * width + 0.5)) for c in self.channels)
        return dataclasses.replace(self, channels=channels)

    @property
    def num_slots(self) -> int:
        """Number of slots, one per block."""
        return len(self.channels)

    def block(self, index: int) -> Sequence[Layer]:
        """Return the layers of one block, which the slot follows."""
        before = self.in_channels if index == 0 else self.channels[index - 1]
        after = self.channels[index]
        if self.build_block is not None:
            return self.build_block(before, after)
        return (Conv(before, after, self.kernel_size), Norm(after), Relu())

    def slot_size(self, index: int) -> int:
        """Return the height and width of the features at a slot [pixels]."""
        return self.image_size >> index

    @property
    def head(self) -> tuple[TensorSpec, ...]:
        """Weight and bias of the linear head."""
        bound = 1 / sqrt(self.channels[-1])
        return (
            TensorSpec("weight", (self.num_classes, self.channels[-1]), bound=bound),
            TensorSpec("bias", (self.num_classes,), bound=bound),
        )

    @property
    def num_parameters(self) -> int:
        """Number of trainable parameters of one host."""
        blocks = [layer for i in range(self.num_slots) for layer in self.block(i)]
        in_blocks = sum(spec.size for layer in blocks for spec in layer.parameters)
        return in_blocks + sum(spec.size for spec in self.head)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one host per image."""
        total = self.channels[-1] * self.num_classes
        for i in range(self.num_slots):
            size = self.slot_size(i)
            total += sum(layer.multiply_adds(size, size) for layer in self.block(i))
        return total


@dataclass(frozen=True)
class HostDesign:
    """Blocks of a registered host; a task adds the image size and the classes."""

    channels: tuple[int, ...]
    build_block: Callable[[int, int], Sequence[Layer]] | None


_registry: dict[str, HostDesign] = {}


def registered_hosts() -> dict[str, HostDesign]:
    """Return the registered hosts by name."""
    return dict(_registry)


def register_host(
    name: str,
    channels: Sequence[int],
    build_block: Callable[[int, int], Sequence[Layer]] | None = None,
) -> None:
    """Register a host that `EnvConfig.host` selects by name, for any task.

    Example:
        Three blocks, each of a pointwise and a depthwise convolution::

            import gymnasium as gym
            from esper_env import register_host
            from esper_env.population.layers import Conv, Norm, Relu

            def separable(before, after):
                return [
                    Conv(before, after, 1),
                    Conv(after, after, 3, groups=after),
                    Norm(after),
                    Relu(),
                ]

            register_host("separable", channels=(4, 8, 8), build_block=separable)
            env = gym.make("Esper-Digits-v0", host="separable")

    Args:
        name: Name of the host, which `EnvConfig.host` takes.
        channels: Output channels of each block. A slot and a 2x2 max-pool follow each block.
        build_block: Maps the channels before and after a block to its layers, which keep height and
            width; None for a 3x3 convolution, batch norm and relu. The first layer of the first
            block must be a `Conv` without groups: in evaluation all members share its input.

    Raises:
        TypeError: If `build_block` does not return layers.
        ValueError: If the name is taken, or there is no block. Also if a block changes height or
            width, has a parameter without a gradient in the third batch, or computes something else
            when it is embedded in a wider block.
    """
    if name in _registry:
        raise ValueError(f"host {name!r} is already registered; choose another name")
    if not channels or min(channels) < 1:
        raise ValueError(
            f"host {name!r}: channels: expected at least one block of at least one channel, got "
            f"{channels}"
        )
    if build_block is not None:
        # Channels (before, after) of the first block, which reads the image, and of a later block.
        for sizes in (((3, 4), (3, 8)), ((4, 6), (8, 12))):
            narrow, wide = (Candidate(build_block(*size), *size) for size in sizes)
            check_layers(f"host {name!r}", narrow, wide, is_zero_at_birth=False)
    _registry[name] = HostDesign(tuple(channels), build_block)
