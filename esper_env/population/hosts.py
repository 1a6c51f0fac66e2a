"""Host networks: blocks of convolution, norm, rectifier, slot and 2x2 max-pool, then a linear head.

Global average pooling stands between the last block and the head.
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
    """Shape of a host; slot s sits after the rectifier of block s."""

    in_channels: int
    image_size: int
    """Height and width of an image [pixels]."""
    channels: tuple[int, ...]
    """Features of each block."""
    num_classes: int
    kernel_size: int = 3
    """Of the convolution in a built-in block."""
    build_block: Callable[[int, int], Sequence[Layer]] | None = None
    """From features before and after to the layers of a block; None for the built-in one."""

    def scaled(self, width: float) -> Host:
        """Return the host with `width` times the features in every block, at least one."""
        channels = tuple(max(1, int(c * width + 0.5)) for c in self.channels)
        return dataclasses.replace(self, channels=channels)

    @property
    def num_slots(self) -> int:
        """One per block."""
        return len(self.channels)

    def block(self, index: int) -> Sequence[Layer]:
        """Layers of one block before its slot."""
        before = self.in_channels if index == 0 else self.channels[index - 1]
        after = self.channels[index]
        if self.build_block is not None:
            return self.build_block(before, after)
        return (Conv(before, after, self.kernel_size), Norm(after), Relu())

    def slot_size(self, index: int) -> int:
        """Height and width of the features at a slot [pixels]."""
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
        """Trained numbers of one host."""
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
    """A registered host, to be joined with the images and classes of a task."""

    channels: tuple[int, ...]
    build_block: Callable[[int, int], Sequence[Layer]] | None


_registry: dict[str, HostDesign] = {}


def registered_hosts() -> dict[str, HostDesign]:
    """Return the hosts of third parties by name."""
    return dict(_registry)


def register_host(
    name: str,
    channels: Sequence[int],
    build_block: Callable[[int, int], Sequence[Layer]] | None = None,
) -> None:
    """Add a host that `EnvConfig.host` can name, for the images and classes of any task.

    Example:
        Three blocks of a pointwise and a depthwise convolution::

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
        name: What `EnvConfig.host` calls it.
        channels: Features of each block; one slot after each, before a 2x2 max-pool.
        build_block: From the features before and after to the layers of a block, which keep height
            and width; None for a 3x3 convolution, batch norm and rectifier. The first layer of the
            first block is a `Conv` without groups: in evaluation all members share its input.

    Raises:
        TypeError: If `build_block` does not return layers.
        ValueError: If the name is taken, there is no block, or a block changes height or width, has
            a parameter that no gradient reaches, or works otherwise inside a wider one.
    """
    if name in _registry:
        raise ValueError(f"host {name!r} is registered already; choose another name")
    if not channels or min(channels) < 1:
        raise ValueError(f"host {name!r}: expected at least one block of features, got {channels}")
    if build_block is not None:
        # The first block, whose input is the image, and a later one.
        for sizes in (((3, 4), (3, 8)), ((4, 6), (8, 12))):
            narrow, wide = (Candidate(build_block(*size), *size) for size in sizes)
            check_layers(f"host {name!r}", narrow, wide, is_zero_at_birth=False)
    _registry[name] = HostDesign(tuple(channels), build_block)
