"""Programs of a population: one per composition, built when a member first has it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from esper_env.config import BoolArray, IntArray
from esper_env.population.interface import Seeds
from esper_env.population.layout import Layout
from esper_env.population.numba_engine.interpreter import PROGRAM, TENSOR, Programs
from esper_env.population.numba_engine.kernels import OPERATION
from esper_env.population.numba_engine.program_builder import (
    Composition,
    Program,
    ProgramBuilder,
    SeedState,
)

MAX_PROGRAMS = 4096
"""Programs that are kept, about 20 MB; all are dropped when there are more."""

ListCompositions = Callable[..., list[Composition]]


class Assignment(NamedTuple):
    """Programs of some members."""

    programs: Programs
    """All programs, and the index of each member's. `Programs.program` has shape (m,)."""
    order: IntArray
    """Positions of the members by falling cost, members of one program together. (m,)."""


class ProgramCache:
    """All programs built so far, stored one after the other; a program is given by its index.

    Args:
        layout: Offsets of all tensors in a member's row.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._clear()

    def _clear(self) -> None:
        self._index: dict[Composition, int] = {}
        self._last: dict[ListCompositions, tuple[tuple[object, ...], Assignment]] = {}
        self._records = _GrowingArray((), PROGRAM)
        self._ops = _GrowingArray((), OPERATION)
        self._columns = _GrowingArray((), np.int32)
        self._tensors = _GrowingArray((), TENSOR)
        shape = self._layout.host.num_slots, self._layout.max_seed_tensors
        self.squares = _GrowingArray(shape, np.float64)
        """0 for each tensor of a seed that the program trains, else NaN."""

    def __len__(self) -> int:
        """Return the number of programs built so far."""
        return len(self._index)

    def training(self, members: IntArray, seeds: Seeds, batch: int) -> Assignment:
        """Return the programs of members for training.

        Args:
            members: Indices of the members. (m,).
            seeds: Seeds of the population.
            batch: Images per batch.
        """
        arrays = seeds.beta > 0, seeds.blueprint, seeds.blend, seeds.is_isolated, seeds.is_frozen
        return self._assign(_training_compositions, batch, members, seeds.width, *arrays)

    def evaluation(
        self, members: IntArray, seeds: Seeds, row_start: IntArray, labels: IntArray, batch: int
    ) -> Assignment:
        """Return the programs of members for evaluation.

        Args:
            members: Indices of the members. (m,).
            seeds: Seeds of the population.
            row_start: First network of each member, and the number of networks. (m + 1,).
            labels: Label of the blend weight of each network and slot; see `Composition.networks`.
                (networks, slots).
            batch: Images per batch.
        """
        arrays = seeds.width, seeds.blueprint, seeds.blend, row_start, labels
        return self._assign(_evaluation_compositions, batch, members, *arrays)

    def _assign(
        self, list_compositions: ListCompositions, batch: int, *arrays: npt.NDArray[Any]
    ) -> Assignment:
        """Return the programs of members, after building those that are missing.

        Args:
            list_compositions: Function from `batch` and `arrays` to each member's composition.
            batch: Images per batch.
            arrays: State that the programs depend on. Usually it has not changed since the last
                call, so its bytes are compared first.
        """
        state = batch, *map(np.ndarray.tobytes, arrays)
        if list_compositions in self._last and self._last[list_compositions][0] == state:
            return self._last[list_compositions][1]
        if len(self._index) >= MAX_PROGRAMS:
            self._clear()
        program = np.array([self._index_of(c) for c in list_compositions(batch, *arrays)])
        cost = self._records.rows["cost"][program]
        parts = (self._records, self._ops, self._columns, self._tensors)
        programs = Programs(program, *[part.rows for part in parts])
        assignment = Assignment(programs, np.lexsort((program, -cost)))
        self._last[list_compositions] = state, assignment
        return assignment

    def _index_of(self, composition: Composition) -> int:
        """Return the index of a program, after building it if it is missing."""
        index = self._index.get(composition)
        if index is None:
            self._append(ProgramBuilder(self._layout, composition).build())
            index = self._index[composition] = len(self._index)
        return index

    def _append(self, program: Program) -> None:
        ranges = []
        parts = (self._ops, program.ops), (self._columns, program.columns)
        for array, part in (*parts, (self._tensors, program.tensors)):
            ranges += [array.count, array.count + len(part)]
            array.extend(part)
        record = (*ranges, program.arena, program.chunk, program.cost)
        self._records.extend(np.array([record], dtype=PROGRAM))
        squares = np.full(self.squares.rows.shape[1:], np.nan)
        trained = program.tensors[program.tensors["module"] > 0]
        squares[trained["module"] - 1, trained["index"]] = 0.0
        self.squares.extend([squares])


def _training_compositions(
    batch: int,
    members: IntArray,
    width: IntArray,
    is_running: BoolArray,
    *fields: npt.NDArray[Any],
) -> list[Composition]:
    """Return the composition of each member that is trained.

    Args:
        batch: Images per batch.
        members: Indices of the members. (m,).
        width: Index of each member's width. (members,).
        is_running: Whether the slot has a seed that runs. (members, slots).
        fields: Fields of `SeedState`. (members, slots).
    """
    seeds = _seed_states(is_running[members], *(field[members] for field in fields))
    return [Composition(w, batch, s) for w, s in zip(width[members].tolist(), seeds, strict=True)]


def _evaluation_compositions(
    batch: int,
    members: IntArray,
    width: IntArray,
    blueprint: IntArray,
    blend: IntArray,
    row_start: IntArray,
    labels: IntArray,
) -> list[Composition]:
    """Return the composition of each member that is evaluated; see `ProgramCache.evaluation`.

    A seed runs if it has weight in any of the member's networks.
    """
    is_running = np.maximum.reduceat(labels, row_start[:-1]) > 0
    no = np.zeros_like(is_running)  # Isolation and freezing matter in training alone.
    seeds = _seed_states(is_running, blueprint[members], blend[members], no, no)
    rows, starts = [tuple(row) for row in labels.tolist()], row_start.tolist()
    networks = [tuple(rows[a:b]) for a, b in itertools.pairwise(starts)]
    each = zip(width[members].tolist(), seeds, networks, strict=True)
    return [Composition(w, batch, s, n) for w, s, n in each]


def _seed_states(
    is_running: BoolArray, *fields: npt.NDArray[Any]
) -> list[tuple[SeedState | None, ...]]:
    """Return the seed of each slot by member. Arrays are (m, slots)."""
    rows = zip(is_running.tolist(), *(field.tolist() for field in fields), strict=True)
    return [
        tuple(SeedState._make(seed) if runs else None for runs, *seed in zip(*row, strict=True))
        for row in rows
    ]


class _GrowingArray:
    """Array that grows at its end; its capacity doubles, so rows are seldom copied.

    Args:
        shape: Shape of a row.
        dtype: Type of the numbers.
    """

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self.rows: npt.NDArray[Any] = np.zeros((64, *shape), dtype=dtype)
        """The rows, then zeros up to the capacity."""
        self.count = 0

    def extend(self, rows: Any) -> None:
        """Append rows."""
        end = self.count + len(rows)
        if end > len(self.rows):
            more = np.zeros((2 * end, *self.rows.shape[1:]), dtype=self.rows.dtype)
            more[: self.count] = self.rows[: self.count]
            self.rows = more
        self.rows[self.count : end] = rows
        self.count = end
