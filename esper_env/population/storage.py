"""The tensors of all members: one row per member in three matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from esper_env.config import FloatArray, IntArray
from esper_env.jit import entry_point
from esper_env.population.layout import Layout, Start
from esper_env.rng import KeyArray, number_at


class Storage:
    """Parameters, momentum and buffers of `num_members` members.

    Args:
        layout: What the columns mean.
        num_members: Rows.
        device: Where the matrices live.
    """

    def __init__(self, layout: Layout, num_members: int, device: torch.device) -> None:
        self.layout = layout
        self.device = device
        self.parameters = torch.zeros(num_members, layout.num_parameters, device=device)
        self.momentum = torch.zeros(num_members, layout.num_parameters, device=device)
        self.buffers = torch.zeros(num_members, layout.num_buffers, device=device)
        self.snapshots = {name: torch.zeros_like(t) for name, t in self.matrices.items()}
        """The last good rows; one buffer of fixed size."""

    @property
    def matrices(self) -> dict[str, torch.Tensor]:
        """The three matrices by name."""
        return {
            "parameters": self.parameters,
            "momentum": self.momentum,
            "buffers": self.buffers,
        }

    def save(self, members: IntArray) -> None:
        """Copy rows into the snapshot."""
        self._copy(self.matrices, self.snapshots, members)

    def restore(self, members: IntArray) -> None:
        """Copy rows back from the snapshot."""
        self._copy(self.snapshots, self.matrices, members)

    def _copy(
        self, source: dict[str, torch.Tensor], target: dict[str, torch.Tensor], members: IntArray
    ) -> None:
        """Copy rows of all three matrices."""
        is_here = self.device.type == "cpu"
        rows: Any = slice(None)  # Of all members, the usual case: one copy instead of two.
        if len(members) < len(self.parameters):
            rows = members if is_here else torch.from_numpy(members).to(self.device)
        for name, matrix in source.items():
            if is_here:
                # By NumPy: torch would share the copying out to its own threads, which then stay
                # awake for a moment and keep those that train from starting.
                target[name].numpy()[rows] = matrix.numpy()[rows]
            else:
                target[name][rows] = matrix[rows]

    def total(self, members: IntArray) -> torch.Tensor:
        """Return the sum of all weights and statistics: finite only if each is. (m,) float32."""
        rows = torch.from_numpy(members).to(self.device)
        return self.parameters[rows].sum(dim=1) + self.buffers[rows].sum(dim=1)

    def clear(self, members: IntArray) -> None:
        """Set whole rows to zero."""
        rows = torch.from_numpy(members).to(self.device)
        for matrix in self.matrices.values():
            matrix[rows] = 0

    def initialise(
        self, members: IntArray, key: KeyArray, parameters: Start, buffers: Start
    ) -> None:
        """Write start values and clear the momentum of the same columns.

        Args:
            members: Which rows. (m,).
            key: Stream of each row's random numbers. (m,) uint64.
            parameters: Columns of the parameter matrix and how they begin.
            buffers: Likewise of the buffer matrix.
        """
        none = parameters.index[:0], parameters.value[:0], parameters.bound[:0]
        starts = parameters, Start(parameters.columns, *none), buffers
        write = _begin if self.device.type == "cpu" else _begin_elsewhere
        for matrix, start in zip(self.matrices.values(), starts, strict=True):
            write(matrix, members, key, start)


def _begin(matrix: torch.Tensor, members: IntArray, key: KeyArray, start: Start) -> None:
    """Write start values into rows of a matrix in the host's memory."""
    columns = start.columns, start.index
    _write_start(matrix.numpy(), members, key, *columns, start.value, start.bound)


def _begin_elsewhere(matrix: torch.Tensor, members: IntArray, key: KeyArray, start: Start) -> None:
    """Do the same on any device, without waiting for it."""
    fresh = torch.zeros(len(members), matrix.shape[1])
    _begin(fresh, np.arange(len(members)), key, start)
    columns = torch.from_numpy(start.columns)
    rows = torch.from_numpy(members).to(matrix.device)[:, None]
    matrix[rows, columns.to(matrix.device)] = fresh[:, columns].to(matrix.device)


@entry_point
def _write_start(
    matrix: npt.NDArray[np.float32],
    members: IntArray,
    key: KeyArray,
    columns: IntArray,
    index: IntArray,
    value: FloatArray,
    bound: FloatArray,
) -> None:
    for i in range(len(members)):
        row = matrix[members[i]]
        for column in columns:
            row[column] = 0
        for k in range(len(index)):
            noise = 2 * number_at(key[i], np.uint64(k)) - 1
            row[index[k]] = np.float32(value[k] + bound[k] * noise)
