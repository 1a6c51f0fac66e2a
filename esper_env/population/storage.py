"""Tensors of all members, one row per member in three matrices."""

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
    """Parameters, momentum and buffers of `num_members` members, all float32.

    Args:
        layout: Meaning of the columns.
        num_members: Number of rows.
        device: Device of the matrices.
    """

    def __init__(self, layout: Layout, num_members: int, device: torch.device) -> None:
        self.layout = layout
        self.device = device
        # Named, because a caller may have changed torch's default dtype.
        kind: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.parameters = torch.zeros(num_members, layout.num_parameters, **kind)
        self.momentum = torch.zeros(num_members, layout.num_parameters, **kind)
        self.buffers = torch.zeros(num_members, layout.num_buffers, **kind)
        self.snapshots = {name: torch.zeros_like(t) for name, t in self.matrices.items()}
        """Last good rows of each matrix, by name; allocated once."""

    @property
    def matrices(self) -> dict[str, torch.Tensor]:
        """The three matrices by name. (num_members, columns) float32."""
        return {
            "parameters": self.parameters,
            "momentum": self.momentum,
            "buffers": self.buffers,
        }

    def save(self, members: IntArray) -> None:
        """Copy the rows of members into the snapshots."""
        self._copy(self.matrices, self.snapshots, members)

    def restore(self, members: IntArray) -> None:
        """Copy the rows of members back from the snapshots."""
        self._copy(self.snapshots, self.matrices, members)

    def _copy(
        self, source: dict[str, torch.Tensor], target: dict[str, torch.Tensor], members: IntArray
    ) -> None:
        """Copy the rows of members in all three matrices."""
        is_here = self.device.type == "cpu"
        # A slice copies once, an index array twice. All members at once is the usual case.
        rows: Any = slice(None)
        if len(members) < len(self.parameters):
            rows = members if is_here else torch.from_numpy(members).to(self.device)
        for name, matrix in source.items():
            if is_here:
                # NumPy copies in this thread. PyTorch would copy in its own threads, which spin for
                # a moment afterwards and delay the threads that train.
                target[name].numpy()[rows] = matrix.numpy()[rows]
            else:
                target[name][rows] = matrix[rows]

    def total(self, members: IntArray) -> torch.Tensor:
        """Return each row's sum of parameters and buffers, finite only if all are. (m,) float32."""
        rows = torch.from_numpy(members).to(self.device)
        return self.parameters[rows].sum(dim=1) + self.buffers[rows].sum(dim=1)

    def clear(self, members: IntArray) -> None:
        """Set the rows of members to zero in all three matrices."""
        rows = torch.from_numpy(members).to(self.device)
        for matrix in self.matrices.values():
            matrix[rows] = 0

    def initialize(
        self, members: IntArray, key: KeyArray, parameters: Start, buffers: Start
    ) -> None:
        """Write initial values, and set the momentum of the same parameters to zero.

        Args:
            members: Rows to initialize. (m,).
            key: Random stream of each row. (m,) uint64.
            parameters: Columns and initial values in the parameter matrix.
            buffers: Columns and initial values in the buffer matrix.
        """
        none = parameters.index[:0], parameters.value[:0], parameters.bound[:0]
        starts = parameters, Start(parameters.columns, *none), buffers
        write = _begin if self.device.type == "cpu" else _begin_elsewhere
        for matrix, start in zip(self.matrices.values(), starts, strict=True):
            write(matrix, members, key, start)


def _begin(matrix: torch.Tensor, members: IntArray, key: KeyArray, start: Start) -> None:
    """Write initial values into rows of a matrix in CPU memory."""
    columns = start.columns, start.index
    _write_start(matrix.numpy(), members, key, *columns, start.value, start.bound)


def _begin_elsewhere(matrix: torch.Tensor, members: IntArray, key: KeyArray, start: Start) -> None:
    """Write initial values into rows of a matrix on any device, without synchronizing with it."""
    # Sample on the CPU, so that initial weights are the same on every device.
    fresh = torch.zeros(len(members), matrix.shape[1], dtype=matrix.dtype)
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
    """Set columns of some rows to zero, then sample the initial values at `index`.

    Args:
        matrix: Matrix to write into. (num_members, num_columns) float32.
        members: Rows to initialize. (m,).
        key: Random stream of each row. (m,) uint64.
        columns: Columns set to zero. (n,).
        index: Columns with an initial value. (k,).
        value: Mean initial value. (k,) float64.
        bound: Largest deviation from the mean. (k,) float64.
    """
    for i in range(len(members)):
        row = matrix[members[i]]
        for column in columns:
            row[column] = 0
        for k in range(len(index)):
            noise = 2 * number_at(key[i], np.uint64(k)) - 1
            row[index[k]] = np.float32(value[k] + bound[k] * noise)
