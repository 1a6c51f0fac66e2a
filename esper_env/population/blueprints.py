"""The registry of seed modules. Each is the identity at birth, with a live gradient.

The last affine map (or the final norm's scale) starts at zero and nothing rectifies after it, so
the residual branch is zero while its gradient is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from esper_env.population.check_layers import Candidate, check_layers
from esper_env.population.layers import Conv, Layer, Norm, Relu, SqueezeExcite


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
        ValueError: If the name is taken, or the branch changes the shape, is not zero at birth, has
            a parameter that no gradient reaches by the third batch, or works otherwise inside a
            wider one (a norm over channels would: see `layout`).
    """
    if name in [blueprint.name for blueprint in _registry]:
        raise ValueError(f"blueprint {name!r} is registered already; choose another name")
    narrow, wide = (Candidate(build(channels), channels, channels) for channels in (4, 8))
    check_layers(f"blueprint {name!r}", narrow, wide, is_zero_at_birth=True)
    _registry.append(Blueprint(name, build))
