"""Norms and directions of gradients: pure functions of tensors that stay on their device.

Gradients are lists of tensors, one per weight. They are never joined, so no figure needs memory of
the size of all weights. NaN stands for "no data". All functions use public operations of torch and
compile into one graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

SMALLEST_NORM = 1e-15
"""Norm below which a gradient has no direction."""
TOP_SHARE = 0.01
"""Share of the elements of each tensor that `concentration` calls the largest."""


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all elements of several tensors. () float32."""
    result: Tensor = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(t) for t in tensors])
    )
    return result


def dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Return the inner product of two lists of tensors. () float32."""
    return torch.stack([(a * b).sum() for a, b in zip(first, second, strict=True)]).sum()


def cosine(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Return the cosine of the angle between two gradients; NaN if one is zero. () float32."""
    norms = norm(first), norm(second)
    # Below this norm, products of elements underflow.
    is_known = torch.minimum(*norms) > SMALLEST_NORM
    return torch.where(is_known, dot(first, second) / norms[0] / norms[1], torch.nan)


def negative_share(tensors: Sequence[Tensor]) -> Tensor:
    """Return the share of elements below 0. () float32."""
    return _share(tensors, [torch.count_nonzero(t < 0) for t in tensors])


def sparsity(tensors: Sequence[Tensor]) -> Tensor:
    """Return the share of elements that are exactly 0. () float32."""
    return _share(tensors, [t.numel() - torch.count_nonzero(t) for t in tensors])


def concentration(tensors: Sequence[Tensor]) -> Tensor:
    """Return the share of the squared norm in the largest 1 % of the elements of each tensor.

    A tensor contributes at least one element. NaN if all elements are 0. () float32.
    """
    squares = [t.flatten().square() for t in tensors]
    largest = [
        s.topk(max(1, round(TOP_SHARE * len(s))), sorted=False).values.sum() for s in squares
    ]
    return torch.stack(largest).sum() / torch.stack([s.sum() for s in squares]).sum()


def noise_scale(small_square: Tensor, big_square: Tensor, small_size: int, big_size: int) -> Tensor:
    """Return the simple noise scale: trace of the covariance / squared norm of the mean gradient.

    |G|^2 = (B_big |G_big|^2 - B_small |G_small|^2) / (B_big - B_small) and
    tr(S) = (|G_small|^2 - |G_big|^2) / (1 / B_small - 1 / B_big) are unbiased. NaN if the estimate
    of |G|^2 is not positive.

    Args:
        small_square: Mean squared norm of gradients of small batches. () float32.
        big_square: Squared norm of the gradient of a big batch. () float32.
        small_size: Samples of a small batch.
        big_size: Samples of the big batch, more than `small_size`.

    Returns:
        Noise scale [samples]. () float32.

    Source: McCandlish et al. (2018), appendix A.1.
    """
    square = (big_size * big_square - small_size * small_square) / (big_size - small_size)
    trace = (small_square - big_square) / (1 / small_size - 1 / big_size)
    return torch.where(square > 0, trace / square, torch.nan)


def tensor_figures(gradient: Tensor, limit: float) -> Tensor:
    """Return figures of one tensor: norm, min, max, and shares and counts of its elements.

    Args:
        gradient: Gradient of one weight.
        limit: Absolute value above which an element counts as large.

    Returns:
        L2 norm, minimum, maximum, share of zeros, share above the limit, and number of elements
        that are not finite. (6,) float32.
    """
    return torch.stack(
        [
            torch.linalg.vector_norm(gradient),
            gradient.min(),
            gradient.max(),
            (gradient == 0).float().mean(),
            (gradient.abs() > limit).float().mean(),
            (~gradient.isfinite()).float().sum(),
        ]
    )


TENSOR_FIGURES = ("norm", "min", "max", "zero", "above_clip", "nonfinite")
"""Names of the figures of `tensor_figures`."""


def gradients_of(group: Sequence[tuple[Tensor, slice]]) -> list[Tensor]:
    """Return the gradients of some rows of weights, without those that have none."""
    return [weight.grad[rows] for weight, rows in group if weight.grad is not None]


def clip_groups(groups: Iterable[Sequence[tuple[Tensor, slice]]], max_norm: float) -> Tensor:
    """Scale the gradients of each group to a norm of at most `max_norm`, in place.

    Args:
        groups: Weights and their rows, which no two groups share.
        max_norm: Largest norm of the gradient of a group.

    Returns:
        Norm of the gradient of all groups before. () float32.

    Source: Pascanu et al. (2013), algorithm 1, applied to each group.
    """
    norms = []
    for group in groups:
        found = gradients_of(group)
        norms.append(norm(found))
        scale = (max_norm / (norms[-1] + 1e-6)).clamp(max=1.0)
        for tensor in found:
            tensor.mul_(scale)
    return norm(norms)


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Return Pearson's correlation of two vectors; NaN if one is constant. () float32."""
    a, b = first - first.mean(), second - second.mean()
    return cosine([a], [b])


def _share(tensors: Sequence[Tensor], counts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(counts)).sum() / sum(t.numel() for t in tensors)
