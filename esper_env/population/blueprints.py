"""Registry of seed modules, each of which outputs zero at first, with a non-zero gradient.

The last layer (or the scale of the last norm) is initialized to zero, and no relu follows it. A new
seed therefore outputs zero, while the gradient of that layer is not zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from esper_env.population.check_layers import Candidate, check_layers
from esper_env.population.layers import Conv, Layer, Norm, Relu, SqueezeExcite


@dataclass(frozen=True)
class Blueprint:
    """Kind of seed module: a name and the layers of its residual branch."""

    name: str
    build: Callable[[int], Sequence[Layer]]
    """Maps the number of channels at a slot to layers that keep channels, height and width."""

    def num_parameters(self, channels: int) -> int:
        """Return the number of trainable parameters of one seed, without its gate."""
        return sum(spec.size for layer in self.build(channels) for spec in layer.parameters)

    def multiply_adds(self, channels: int, height: int, width: int) -> int:
        """Return the multiply-adds of one seed per image, without its gate."""
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
"""Built-in blueprints for convolutional hosts, in the order of the blueprint head."""

_registry: list[Blueprint] = list(CNN_BLUEPRINTS)


def registered_blueprints() -> tuple[Blueprint, ...]:
    """Return the built-in blueprints, then registered ones in the order of registration."""
    return tuple(_registry)


def register_blueprint(name: str, build: Callable[[int], Sequence[Layer]]) -> None:
    """Register a blueprint for all environments that are made afterwards.

    Example:
        A pre-norm 3x3 convolution, initialized to zero::

            from esper_env import register_blueprint
            from esper_env.population.layers import Conv, Norm, Relu

            register_blueprint(
                "pre_norm",
                lambda c: [Norm(c), Relu(), Conv(c, c, 3, bias=True, zero=True)],
            )

    Args:
        name: Name of the blueprint, which is also its option in the blueprint head.
        build: Maps the number of channels at a slot to the layers of the residual branch.

    Raises:
        TypeError: If `build` does not return layers.
        ValueError: If the name is taken. Also if the branch changes the shape of its input, does
            not output zero at first, has a parameter without a gradient in the third batch, or
            computes something else when it is embedded in a wider branch. A norm over channels
            would (see `layout`).
    """
    if name in [blueprint.name for blueprint in _registry]:
        raise ValueError(f"blueprint {name!r} is already registered; choose another name")
    narrow, wide = (Candidate(build(channels), channels, channels) for channels in (4, 8))
    check_layers(f"blueprint {name!r}", narrow, wide, is_zero_at_birth=True)
    _registry.append(Blueprint(name, build))
