"""Validation of registered layers, with errors that explain the violation and the remedy.

Registration runs the layers on a few batches of plain gradient descent. It checks output shapes,
that a new seed outputs zero, that every parameter receives a gradient, and that a narrow network
can be embedded in the corner of a wide one (see `layout`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from esper_env.population.layers import Layer, TensorSpec, run_layers

_IMAGES, _SIZE, _BATCHES, _RATE = 16, 8, 3, 0.01
"""Images per batch, their height and width [pixels], number of batches, and learning rate."""


@dataclass(frozen=True)
class Candidate:
    """Layers to validate, which map `before` channels to `after` channels."""

    layers: Sequence[Layer]
    before: int
    after: int


def check_layers(label: str, narrow: Candidate, wide: Candidate, *, is_zero_at_birth: bool) -> None:
    """Validate layers before they are registered.

    Args:
        label: Name of the registered object, for error messages.
        narrow: Layers for few channels.
        wide: Layers of the same object for more channels.
        is_zero_at_birth: Whether the initial output must be exactly zero.

    Raises:
        TypeError: If an element is not a `Layer`.
        ValueError: If the output has a wrong shape or is not finite, in training or in evaluation.
            Also if the initial output is not zero although it must be, a parameter has no gradient
            in the third batch, or the narrow layers compute something else when they are embedded
            in the corner of the wide ones.
    """
    for candidate in (narrow, wide):
        for layer in candidate.layers:
            if not isinstance(layer, Layer):
                raise TypeError(
                    f"{label}: expected esper_env.population.layers.Layer instances, got "
                    f"{type(layer).__name__}"
                )
        _check_growth(label, candidate, is_zero_at_birth)
    _check_corner(label, narrow, wide)


def _check_growth(label: str, candidate: Candidate, is_zero_at_birth: bool) -> None:
    """Check output shapes, the initial output, and gradients."""
    generator = torch.Generator().manual_seed(0)
    layers, before, after = candidate.layers, candidate.before, candidate.after
    parameters = _draw([s for layer in layers for s in layer.parameters], generator)
    buffers = _draw([s for layer in layers for s in layer.buffers], generator)
    if not parameters:
        raise ValueError(f"{label} has no parameters, so it cannot learn")
    expected = (_IMAGES, after, _SIZE, _SIZE)
    # No gradient passes through a layer that is still zero, so layers before it receive their first
    # gradient in the second batch.
    for batch in range(_BATCHES):
        # Noise after a relu, because slots follow a relu.
        x = _noise((_IMAGES, before, _SIZE, _SIZE), generator).relu()
        out = _run(layers, x, parameters, buffers)
        if out.shape != expected:
            raise ValueError(
                f"{label} outputs a wrong shape for an input of shape {tuple(x.shape)}: expected "
                f"{expected}, got {tuple(out.shape)}; keep height and width, and output {after} "
                "channels"
            )
        _check_finite(label, out, "training")
        if batch == 0 and is_zero_at_birth and out.detach().abs().max() != 0:
            raise ValueError(
                f"{label}: expected a new seed to output 0, got up to "
                f"{float(out.detach().abs().max()):.3g}; initialize the last layer, or the scale "
                "of the last norm, to zero"
            )
        # A random target, so that no gradient vanishes by symmetry.
        gradients = _descend(out, _noise(expected, generator), parameters)
    with torch.no_grad():
        _check_finite(label, _run(layers, x, parameters, buffers, False), "evaluation")
    names = [spec.name for layer in layers for spec in layer.parameters]
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is None or not (gradient != 0).any():
            raise ValueError(
                f"{label}: expected a gradient in parameter {name!r} by the third batch, got none; "
                "the usual cause is a relu after the layer that is initialized to zero"
            )


def _check_corner(label: str, narrow: Candidate, wide: Candidate) -> None:
    """Check that narrow layers compute the same when they are embedded in wide ones."""
    generator = torch.Generator().manual_seed(1)
    reason = (
        f"{label}: layers for {narrow.before} channels cannot be embedded in layers for "
        f"{wide.before}, which instances of other widths require"
    )
    # Sample the narrow tensors and embed copies of them in zeros, as a narrow member's row does.
    both = []
    for kind in ("parameters", "buffers"):
        few = [s for layer in narrow.layers for s in getattr(layer, kind)]
        many = [s for layer in wide.layers for s in getattr(layer, kind)]
        shapes = [s.shape for s in few], [s.shape for s in many]
        is_inside = len(few) == len(many) and all(
            len(a) == len(b) and all(i <= j for i, j in zip(a, b, strict=True))
            for a, b in zip(*shapes, strict=True)
        )
        if not is_inside:
            raise ValueError(f"{reason}: tensors of shapes {shapes[0]} do not fit into {shapes[1]}")
        # (1, *narrow shape) -> (1, *wide shape)
        own = _draw(few, generator)
        both.append((own, [_pad(t, (1, *s.shape)) for t, s in zip(own, many, strict=True)]))
    (few_p, many_p), (few_b, many_b) = both
    # Train both on the same batches: a difference in gradients shows in the next batch's outputs.
    for _ in range(_BATCHES):
        x = _noise((_IMAGES, narrow.before, _SIZE, _SIZE), generator).relu()
        target = _noise((_IMAGES, narrow.after, _SIZE, _SIZE), generator)
        out = _run(narrow.layers, x, few_p, few_b)
        wide_x = _pad(x, (_IMAGES, wide.before, _SIZE, _SIZE))
        wide_out = _run(wide.layers, wide_x, many_p, many_b)
        error = float((wide_out - _pad(out, wide_out.shape)).detach().abs().max())
        if not error <= 1e-4:  # Also if it is NaN.
            raise ValueError(
                f"{reason}: expected equal outputs, got a difference of {error:.3g}; a layer must "
                "not depend on the number of channels, and must output zero for a channel of zeros"
            )
        _descend(out, target, few_p)
        _descend(wide_out, _pad(target, wide_out.shape), many_p)


def _draw(specs: Sequence[TensorSpec], generator: torch.Generator) -> list[Tensor]:
    """Sample initial values for one member. (1, *shape) each."""
    kind: dict[str, Any] = {"generator": generator, "dtype": torch.float32}
    noise = [2 * torch.rand((1, *spec.shape), **kind) - 1 for spec in specs]
    return [s.value + s.bound * n for s, n in zip(specs, noise, strict=True)]


def _run(
    layers: Sequence[Layer],
    x: Tensor,
    parameters: list[Tensor],
    buffers: list[Tensor],
    training: bool = True,
) -> Tensor:
    """Run layers in training or evaluation mode, with gradients of the parameters."""
    own = iter([tensor.requires_grad_() for tensor in parameters])
    return run_layers(layers, x, own, iter(buffers), training)


def _check_finite(label: str, out: Tensor, mode: str) -> None:
    """Raise ValueError if an output contains NaN or infinity."""
    if not out.isfinite().all():
        raise ValueError(
            f"{label}: expected finite outputs in {mode}, got NaN or infinity; check its layers "
            f"with training={mode == 'training'}"
        )


def _noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Sample from a standard normal distribution; float32, as all tensors of the population."""
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def _descend(out: Tensor, target: Tensor, parameters: list[Tensor]) -> list[Tensor | None]:
    """Take a step of gradient descent on sum(out * target), and return the gradients."""
    gradients = torch.autograd.grad((out * target).sum(), parameters, allow_unused=True)
    with torch.no_grad():
        for tensor, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                tensor -= _RATE * gradient
    return list(gradients)


def _pad(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Embed a tensor in the leading corner of a larger tensor of zeros."""
    missing = [n - m for m, n in zip(x.shape, shape, strict=True)]
    return F.pad(x.detach(), [n for m in reversed(missing) for n in (0, m)])
