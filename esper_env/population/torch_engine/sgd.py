"""Flat vectors of selected tensors of selected members, and SGD on them.

A member's row has columns for every tensor that it could have. A `WorkingSet` gathers the tensors
that it has into one vector for training, and scatters them back afterwards.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esper_env.population.interface import SGDSettings
from esper_env.population.layout import Column

IndexArray = npt.NDArray[np.int64]


class WorkingSet:
    """Flat vector of some tensors of some rows of a matrix.

    The vector consists of pieces. A piece is one tensor of several rows, row by row, so its view is
    a contiguous (rows, *shape) tensor.

    Args:
        row_width: Number of columns of the matrix.
        device: Device of the matrix.
    """

    def __init__(self, row_width: int, device: torch.device) -> None:
        self.row_width = row_width
        self.device = device
        self.shapes: list[tuple[int, ...]] = []
        self.sizes: list[int] = []
        self._indices: list[IndexArray] = []

    def add(self, rows: IndexArray, column: Column) -> int:
        """Append one tensor of the given rows, and return its position among the views."""
        spec = column.spec
        # (rows, 1) + (size,) -> (rows, size) flat indices into the matrix
        index = rows[:, None] * self.row_width + np.arange(column.offset, column.offset + spec.size)
        self._indices.append(index.reshape(-1))
        self.shapes.append((len(rows), *spec.shape))
        self.sizes.append(index.size)
        return len(self.shapes) - 1

    def freeze(self) -> None:
        """Build the index after all tensors have been added."""
        flat = np.concatenate(self._indices) if self._indices else np.zeros(0, dtype=np.int64)
        self.index = torch.from_numpy(flat).to(self.device)

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
        working: Layout of the vector.
        modules: Module of each row of each piece. One (rows,) int64 array per piece.
        weight_decay: Weight decay of each module. (num_modules,) float32.
        is_frozen: Whether a module is frozen. (num_modules,) bool.
        settings: Momentum and maximum gradient norm.
    """

    def __init__(
        self,
        working: WorkingSet,
        modules: list[IndexArray],
        weight_decay: npt.NDArray[np.float32],
        is_frozen: npt.NDArray[np.bool_],
        settings: SGDSettings,
    ) -> None:
        device = working.device
        self.settings = settings
        # From segments to elements: the vector holds segment after segment, each `lengths` long.
        # (num_segments,) -> (n,)
        segment_module = np.concatenate(modules)
        widths = [
            size // shape[0] for size, shape in zip(working.sizes, working.shapes, strict=True)
        ]
        counts = [shape[0] for shape in working.shapes]
        lengths = np.repeat(widths, counts)
        element_module = np.repeat(segment_module, lengths)
        decay = weight_decay.astype(np.float32)[element_module]
        self.num_modules = len(weight_decay)
        self.lengths = torch.from_numpy(lengths).to(device)
        self.segment_module = torch.from_numpy(segment_module).to(device)
        self.element_module = torch.from_numpy(element_module).to(device)
        self.decay = torch.from_numpy(decay).to(device)
        self.is_frozen = is_frozen
        self.keep = None
        if is_frozen.any():
            # Indices instead of a mask, because indexing with a mask waits for the device.
            self.keep = torch.from_numpy(np.nonzero(~is_frozen[element_module])[0]).to(device)

    def spread_rates(self, module_rates: npt.NDArray[np.float64]) -> Tensor:
        """Return the learning rate of each element, 0 if frozen. (num_modules,) -> (n,) float32."""
        rates = np.where(self.is_frozen, 0.0, module_rates).astype(np.float32)
        per_module = torch.from_numpy(rates).to(self.element_module.device)
        return per_module.index_select(0, self.element_module)

    def step(self, flat: Tensor, gradient: Tensor, momentum: Tensor, rates: Tensor) -> Tensor:
        """Update `flat` and `momentum` in place.

        Args:
            flat: Parameters. (n,) float32.
            gradient: Gradient of the parameters, overwritten. (n,) float32.
            momentum: Momentum buffer. (n,) float32.
            rates: Learning rates from `spread_rates`. (n,) float32.

        Returns:
            Squared gradient norm of each segment before clipping. (num_segments,) float32.
        """
        # Squared norms: elements (n,) -> segments (num_segments,) -> modules (num_modules,)
        squares = torch.segment_reduce(
            gradient * gradient, "sum", lengths=self.lengths, unsafe=True
        )
        per_module = squares.new_zeros(self.num_modules)
        per_module.index_add_(0, self.segment_module, squares)
        # `clip_grad_norm_` adds the same 1e-6.
        scale = (self.settings.clip_norm / (per_module.sqrt() + 1e-6)).clamp_(max=1.0)
        gradient.mul_(scale.index_select(0, self.element_module))
        gradient.addcmul_(flat, self.decay)
        momentum.mul_(self.settings.momentum).add_(gradient)
        flat.addcmul_(momentum, rates, value=-1)
        return squares
