"""The registry of seed modules. Each is the identity at birth, with a live gradient.

The last affine map (or the final norm's scale) starts at zero and nothing rectifies after it, so
the residual branch is zero while its gradient is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esper_env.population.layers import Conv, Layer, Norm, Relu, SqueezeExcite, TensorSpec


@dataclass(frozen=True)
class Blueprint:
    """A kind of seed module: a name, and the layers of its residual branch."""

    name: str
    build: Callable[[int], Sequence[Layer]]
    """From the channels at the slot to the layers, which keep channels, height and width."""

    def num_parameters(self, channels: int) -> int:
        """Trained numbers of one seed."""
        return sum(spec.size for layer in self.build(channels) for spec in layer.parameters)

    def multiply_adds(self, channels: int, height: int, width: int) -> int:
        """Multiply-adds of one seed per image."""
        return sum(layer.multiply_adds(height, width) for layer in self.build(channels))


def _norm(c: int) -> Sequence[Layer]:
    return (Norm(c, zero=True),)


def _attention(c: int) -> Sequence[Layer]:
    return (SqueezeExcite(c, hidden=max(4, c // 4)),)


def _conv_small(c: int) -> Sequence[Layer]:
    return (Conv(c, c, 1, bias=True, zero=True),)


def _bottleneck(c: int) -> Sequence[Layer]:
    inner = max(2, c // 2)
    return (
        Conv(c, inner, 1),
        Norm(inner),
        Relu(),
        Conv(inner, inner, 3),
        Norm(inner),
        Relu(),
        Conv(inner, c, 1, bias=True, zero=True),
    )


def _depthwise(c: int) -> Sequence[Layer]:
    return (
        Conv(c, c, 3, groups=c),
        Norm(c),
        Relu(),
        Conv(c, c, 1, bias=True, zero=True),
    )


def _conv_light(c: int) -> Sequence[Layer]:
    return (Conv(c, c, 3), Norm(c), Relu(), Conv(c, c, 1, bias=True, zero=True))


def _conv_heavy(c: int) -> Sequence[Layer]:
    return (Conv(c, 4 * c, 3), Norm(4 * c), Relu(), Conv(4 * c, c, 3, bias=True, zero=True))


CNN_BLUEPRINTS: tuple[Blueprint, ...] = (
    Blueprint("norm", _norm),
    Blueprint("attention", _attention),
    Blueprint("conv_small", _conv_small),
    Blueprint("bottleneck", _bottleneck),
    Blueprint("depthwise", _depthwise),
    Blueprint("conv_light", _conv_light),
    Blueprint("conv_heavy", _conv_heavy),
)
"""The built-in blueprints for convolutional hosts, in the order of the blueprint head."""

_registry: list[Blueprint] = list(CNN_BLUEPRINTS)


def registered_blueprints() -> tuple[Blueprint, ...]:
    """Return the built-in blueprints, then those of third parties in order of registration."""
    return tuple(_registry)


def register_blueprint(name: str, build: Callable[[int], Sequence[Layer]]) -> None:
    """Add a blueprint for environments that are made from now on.

    Example:
        A 3x3 convolution behind a norm, with the zero map last::

            from esper_env import register_blueprint
            from esper_env.population.layers import Conv, Norm, Relu

            register_blueprint(
                "pre_norm",
                lambda c: [Norm(c), Relu(), Conv(c, c, 3, bias=True, zero=True)],
            )

    Args:
        name: Its option of the blueprint head.
        build: From the channels at a slot to the layers of the residual branch.

    Raises:
        TypeError: If `build` does not return layers.
        ValueError: If the name is taken, or the branch changes the shape, is not zero at birth, or
            has a parameter that no gradient reaches by the third batch.
    """
    if name in [blueprint.name for blueprint in _registry]:
        raise ValueError(f"blueprint {name!r} is registered already; choose another name")
    for channels in (4, 8):
        _check_branch(name, build(channels), channels)
    _registry.append(Blueprint(name, build))


def _check_branch(name: str, layers: Sequence[Layer], channels: int) -> None:
    """Train a branch of two members for three batches and refuse what could not grow."""
    for layer in layers:
        if not isinstance(layer, Layer):
            raise TypeError(
                f"blueprint {name!r}: expected esper_env.population.layers.Layer instances, got "
                f"{type(layer).__name__}"
            )
    members, size = 2, 8
    generator = torch.Generator().manual_seed(0)

    def draw(spec: TensorSpec) -> Tensor:
        noise = 2 * torch.rand((members, *spec.shape), generator=generator) - 1
        return spec.value + spec.bound * noise

    parameters = [[draw(spec).requires_grad_() for spec in layer.parameters] for layer in layers]
    buffers = [[draw(spec) for spec in layer.buffers] for layer in layers]
    flat = [tensor for own in parameters for tensor in own]
    if not flat:
        raise ValueError(f"blueprint {name!r} has no parameters, so it cannot learn")
    for batch in range(3):
        x = torch.randn(16, members * channels, size, size, generator=generator).relu()
        out = x
        for layer, own, running in zip(layers, parameters, buffers, strict=True):
            out = layer.forward(out, own, running, True)
        if out.shape != x.shape:
            raise ValueError(
                f"blueprint {name!r} changes the shape: expected {tuple(x.shape)}, got "
                f"{tuple(out.shape)}; keep channels, height and width"
            )
        if batch == 0 and out.detach().abs().max() != 0:
            raise ValueError(
                f"blueprint {name!r} is not the identity at birth: its residual branch reaches "
                f"{float(out.detach().abs().max()):.3g}, expected 0; start the last affine map, or "
                "the last norm's scale, at zero"
            )
        target = torch.randn(out.shape, generator=generator)
        gradients = torch.autograd.grad((out * target).sum(), flat, allow_unused=True)
        with torch.no_grad():
            for tensor, gradient in zip(flat, gradients, strict=True):
                if gradient is not None:
                    tensor -= 0.01 * gradient
    specs = [spec.name for layer in layers for spec in layer.parameters]
    for label, gradient in zip(specs, gradients, strict=True):
        if gradient is None or not (gradient != 0).any():
            raise ValueError(
                f"blueprint {name!r} has no gradient in {label!r} by the third batch; nothing may "
                "rectify after the map that starts at zero"
            )
