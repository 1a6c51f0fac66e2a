"""Health of a network's activations: its recurrent core and its plasticity."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

DORMANT = 0.025
"""Activation below which a unit is dormant [mean of its layer]."""
RANK_SHARE = 0.99
"""Share of the sum of singular values that the effective rank covers."""
SATURATED = 0.99
"""Gate value beyond which a gate is saturated: above it, or below 1 minus it."""
CORE_FIGURES = ("hidden_rms", "hidden_max", "cell_rms", "cell_max", "saturated", "nonfinite")
"""Names of the figures of `core_figures`."""


def core_figures(lstm: nn.LSTM, x: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
    """Return figures of one LSTM step: RMS and maximum of both states, and their gates.

    Args:
        lstm: LSTM with one layer.
        x: Input of the step. (num_envs, num_features) float32.
        state: Hidden state and cell before the step. (1, num_envs, hidden_size) each.

    Returns:
        RMS and maximum of |h|, those of |c|, share of gate values beyond 0.99 of their range, and
        number of elements of both states that are not finite. (6,) float32.
    """
    w_ih, w_hh, *biases = lstm.all_weights[0]
    h, c = state[0][0], state[1][0]
    gates = x @ w_ih.T + h @ w_hh.T + sum(biases)
    # torch orders the gates input, forget, candidate, output; the candidate is a tanh.
    i, f, g, o = gates.chunk(4, dim=-1)
    i, f, o = i.sigmoid(), f.sigmoid(), o.sigmoid()
    c = f * c + i * g.tanh()
    h = o * c.tanh()
    sigmoids = torch.cat([i, f, o])
    is_saturated = (sigmoids > SATURATED) | (sigmoids < 1 - SATURATED)
    return torch.stack(
        [
            h.square().mean().sqrt(),
            h.abs().max(),
            c.square().mean().sqrt(),
            c.abs().max(),
            is_saturated.float().mean(),
            (~torch.cat([h, c]).isfinite()).float().sum(),
        ]
    )


def dormant_share(layers: Mapping[str, Tensor]) -> Tensor:
    """Return the share of dormant units among all units of several ReLU layers. () float32.

    A unit is dormant if its mean |activation| is at most 0.025 times the mean of its layer; a layer
    that is 0 everywhere is dormant as a whole.

    Args:
        layers: Activations by layer. (..., num_units) each.

    Source: Sokar et al. (2023), definition 3.1.
    """
    dormant = []
    for activations in layers.values():
        mean = activations.flatten(0, -2).abs().mean(0)
        dormant.append(mean <= DORMANT * mean.mean())
    return torch.cat(dormant).float().mean()


def effective_rank(features: Tensor) -> Tensor:
    """Return the effective rank of features as a share of their width. () float32.

    It is the smallest number of singular values that make up 99 % of the sum of all.

    Args:
        features: (..., width) float32.

    Source: Kumar et al. (2021), section 3.
    """
    # Numbers that are not finite end the run elsewhere; here they must not stop the solver.
    matrix = features.flatten(0, -2).double().nan_to_num(0.0, 0.0, 0.0)
    # Eigenvalues of the small Gram matrix are the squared singular values, and cheaper.
    values = torch.linalg.eigvalsh(matrix.T @ matrix).clamp(min=0).sqrt().flip(0)
    is_needed = values.cumsum(0) < RANK_SHARE * values.sum()
    rank: Tensor = is_needed.sum() + 1
    return rank.float() / features.shape[-1]
