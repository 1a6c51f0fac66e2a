"""Trial runs of layers that third parties register; what could not work is refused with the reason.

A few batches of plain gradient descent show whether layers keep their promises: shapes, the
identity at birth, gradients that arrive, and that a narrow member can live in the corner of a wide
one (see `layout`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from esper_env.population.layers import Layer, TensorSpec

_IMAGES, _SIZE, _BATCHES, _RATE = 16, 8, 3, 0.01


@dataclass(frozen=True)
class Candidate:
    """Layers for one number of features before and after."""

    layers: Sequence[Layer]
    before: int
    after: int


def check_layers(label: str, narrow: Candidate, wide: Candidate, *, is_zero_at_birth: bool) -> None:
    """Refuse layers that could not work.

    Args:
        label: What is being registered, for the error.
        narrow: The layers for few features.
        wide: The same for more.
        is_zero_at_birth: Whether the output must be exactly zero at first.

    Raises:
        TypeError: If something is not a `Layer`.
        ValueError: If a shape is wrong, the output is not zero at birth although it must be, no
            gradient reaches a parameter by the third batch, or the narrow layers in the corner of
            the wide ones do something else.
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
    """Check shapes, birth and gradients."""
    generator = torch.Generator().manual_seed(0)
    layers, before, after = candidate.layers, candidate.before, candidate.after
    parameters = _draw([s for layer in layers for s in layer.parameters], generator)
    buffers = _draw([s for layer in layers for s in layer.buffers], generator)
    if not parameters:
        raise ValueError(f"{label} has no parameters, so it cannot learn")
    expected = (_IMAGES, after, _SIZE, _SIZE)
    for batch in range(_BATCHES):
        x = torch.randn(_IMAGES, before, _SIZE, _SIZE, generator=generator).relu()
        out = _run(layers, x, parameters, buffers)
        if out.shape != expected:
            raise ValueError(
                f"{label} changes the shape: expected {expected} after {tuple(x.shape)}, got "
                f"{tuple(out.shape)}; keep height and width, and put out {after} channels"
            )
        if batch == 0 and is_zero_at_birth and out.detach().abs().max() != 0:
            raise ValueError(
                f"{label} is not the identity at birth: its residual branch reaches "
                f"{float(out.detach().abs().max()):.3g}, expected 0; start the last affine map, or "
                "the last norm's scale, at zero"
            )
        gradients = _descend(out, torch.randn(expected, generator=generator), parameters)
    names = [spec.name for layer in layers for spec in layer.parameters]
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is None or not (gradient != 0).any():
            raise ValueError(
                f"{label} has no gradient in {name!r} by the third batch; nothing may rectify "
                "after a map that starts at zero"
            )


def _check_corner(label: str, narrow: Candidate, wide: Candidate) -> None:
    """Check that the narrow layers work the same in the corner of the wide ones."""
    generator = torch.Generator().manual_seed(1)
    reason = (
        f"{label}: layers for {narrow.before} channels do not work the same inside those for "
        f"{wide.before}, as instances of other widths need"
    )
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
        own = _draw(few, generator)
        both.append((own, [_pad(t, (1, *s.shape)) for t, s in zip(own, many, strict=True)]))
    (few_p, many_p), (few_b, many_b) = both
    for _ in range(_BATCHES):
        x = torch.randn(_IMAGES, narrow.before, _SIZE, _SIZE, generator=generator).relu()
        target = torch.randn(_IMAGES, narrow.after, _SIZE, _SIZE, generator=generator)
        out = _run(narrow.layers, x, few_p, few_b)
        wide_x = _pad(x, (_IMAGES, wide.before, _SIZE, _SIZE))
        wide_out = _run(wide.layers, wide_x, many_p, many_b)
        error = float((wide_out - _pad(out, wide_out.shape)).detach().abs().max())
        if error > 1e-4:
            raise ValueError(
                f"{reason}: outputs differ by {error:.3g}, expected 0; a layer may not depend on "
                "how many channels there are, and must put out zero for a channel of zeros"
            )
        _descend(out, target, few_p)
        _descend(wide_out, _pad(target, wide_out.shape), many_p)


def _draw(specs: Sequence[TensorSpec], generator: torch.Generator) -> list[Tensor]:
    """Return start values for one member."""
    noise = [2 * torch.rand((1, *spec.shape), generator=generator) - 1 for spec in specs]
    return [s.value + s.bound * n for s, n in zip(specs, noise, strict=True)]


def _run(
    layers: Sequence[Layer], x: Tensor, parameters: list[Tensor], buffers: list[Tensor]
) -> Tensor:
    """Run layers in training mode."""
    for tensor in parameters:
        tensor.requires_grad_()
    own, running = iter(parameters), iter(buffers)
    for layer in layers:
        x = layer.forward(
            x, [next(own) for _ in layer.parameters], [next(running) for _ in layer.buffers], True
        )
    return x


def _descend(out: Tensor, target: Tensor, parameters: list[Tensor]) -> list[Tensor | None]:
    """Make a step of gradient descent on the product with a target; return the gradients."""
    gradients = torch.autograd.grad((out * target).sum(), parameters, allow_unused=True)
    with torch.no_grad():
        for tensor, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                tensor -= _RATE * gradient
    return list(gradients)


def _pad(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Put a tensor into the leading corner of a larger one of zeros."""
    missing = [n - m for m, n in zip(x.shape, shape, strict=True)]
    return F.pad(x.detach(), [n for m in reversed(missing) for n in (0, m)])
