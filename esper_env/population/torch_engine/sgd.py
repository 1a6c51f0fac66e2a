"""Flat vectors of selected tensors of selected members, and SGD on them.

A member's row has columns for every tensor that it could have. A `WorkingSet` gathers the tensors
that it has into one vector for training, and scatters them back afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from esper_env.config import BoolArray, FloatArray, IntArray
from esper_env.population.interface import SGDSettings
from esper_env.population.layout import Column


class Piece(NamedTuple):
    """One tensor of several members of a chunk."""

    members: IntArray
    """Positions of the members in the chunk. (rows,)."""
    column: Column
    """Columns of the tensor in a member's row."""
    slot: int = -1
    """Slot of the seed that the tensor belongs to, -1 for the host."""
    position: int = 0
    """Position among the trainable tensors of its seed, 0 for the host."""


class WorkingSet:
    """Flat vector of some tensors of some members of a matrix.

    Each piece is stored row by row, so its view is a contiguous (rows, *shape) tensor.

    Args:
        pieces: The tensors, in their order in the vector.
        members: Members of the chunk. (m,).
        row_width: Number of columns of the matrix.
        device: Device of the matrix.
    """

    def __init__(
        self, pieces: Sequence[Piece], members: IntArray, row_width: int, device: torch.device
    ) -> None:
        self.shapes = [(len(p.members), *p.column.spec.shape) for p in pieces]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        # Flat indices into the matrix: (rows, 1) + (size,) -> (rows, size)
        indices = [np.zeros(0, dtype=np.int64)]
        for own, column, *_ in pieces:
            columns = column.offset + np.arange(column.spec.size)
            indices.append((members[own][:, None] * row_width + columns).reshape(-1))
        self.index = torch.from_numpy(np.concatenate(indices)).to(device)
        # Position in the chunk of the member that an element belongs to. (n,)
        owners = [np.repeat(p.members, p.column.spec.size) for p in pieces]
        self.owner = torch.from_numpy(np.concatenate([indices[0], *owners])).to(device)

    def gather(self, matrix: Tensor) -> Tensor:
        """Copy the elements of a (members, row_width) matrix into a flat vector. (n,)."""
        return matrix.view(-1).index_select(0, self.index)

    def scatter(self, matrix: Tensor, flat: Tensor, keep: Tensor | None = None) -> None:
        """Copy a flat vector back into the matrix, or only its elements at `keep`. (k,) int64."""
        if keep is None:
            matrix.view(-1)[self.index] = flat
        else:
            matrix.view(-1)[self.index[keep]] = flat[keep]

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return a view of each piece. (rows, *shape).

        One split of the whole vector has one backward operation, a concatenation.
        """
        parts = torch.split(flat, self.sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


class ModuleSGD:
    """SGD with momentum on a flat vector, with gradient clipping and learning rates per module.

    A module is the host or one seed of one member. A segment is one tensor of one module. Frozen
    modules keep their parameters and momentum.

    Source: `torch.nn.utils.clip_grad_norm_` for each module, then `torch.optim.SGD` (weight decay
    is added to the gradient before momentum).

    Args:
        pieces: The tensors, in their order in the vector.
        is_frozen: Whether a module is frozen: hosts, then the seeds of each slot.
            (1 + slots, m) bool.
        settings: Momentum, weight decay of hosts, and maximum gradient norm.
        device: Device of the vector.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        is_frozen: BoolArray,
        settings: SGDSettings,
        device: torch.device,
    ) -> None:
        self.settings, self.is_frozen = settings, is_frozen
        num_members = is_frozen.shape[1]
        # From segments to elements: the vector holds segment after segment, each `lengths` long.
        # (num_segments,) -> (n,)
        segment_module = np.concatenate([(1 + p.slot) * num_members + p.members for p in pieces])
        lengths = np.concatenate([np.full(len(p.members), p.column.spec.size) for p in pieces])
        element_module = np.repeat(segment_module, lengths)
        decay = np.where(element_module < num_members, settings.weight_decay, 0).astype(np.float32)
        self.lengths = torch.from_numpy(lengths).to(device)
        self.segment_module = torch.from_numpy(segment_module).to(device)
        self.element_module = torch.from_numpy(element_module).to(device)
        self.decay = torch.from_numpy(decay).to(device)
        self.keep = None
        if is_frozen.any():
            # Indices instead of a mask, because indexing with a mask waits for the device.
            kept = np.nonzero(~is_frozen.reshape(-1)[element_module])[0]
            self.keep = torch.from_numpy(kept).to(device)

    def spread_rates(self, module_rates: FloatArray) -> Tensor:
        """Return the learning rate of each element, 0 if frozen. (1 + slots, m) -> (n,) float32."""
        rates = np.where(self.is_frozen, 0.0, module_rates).astype(np.float32).reshape(-1)
        per_module = torch.from_numpy(rates).to(self.element_module.device)
        return per_module.index_select(0, self.element_module)

    def step(
        self, flat: Tensor, gradient: Tensor, momentum: Tensor, rates: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Update `flat` and `momentum` in place.

        Args:
            flat: Parameters. (n,) float32.
            gradient: Gradient of the parameters, overwritten. (n,) float32.
            momentum: Momentum buffer. (n,) float32.
            rates: Learning rates from `spread_rates`. (n,) float32.

        Returns:
            Squared gradient norms before clipping, of each segment, (num_segments,) float32, and of
            each module, (num_modules,) float32.
        """
        # Squared norms: elements (n,) -> segments (num_segments,) -> modules (num_modules,)
        squares = torch.segment_reduce(
            gradient * gradient, "sum", lengths=self.lengths, unsafe=True
        )
        per_module = squares.new_zeros(self.is_frozen.size)
        per_module.index_add_(0, self.segment_module, squares)
        # `clip_grad_norm_` adds the same 1e-6.
        scale = (self.settings.clip_norm / (per_module.sqrt() + 1e-6)).clamp_(max=1.0)
        gradient.mul_(scale.index_select(0, self.element_module))
        gradient.addcmul_(flat, self.decay)
        momentum.mul_(self.settings.momentum).add_(gradient)
        flat.addcmul_(momentum, rates, value=-1)
        return squares, per_module
