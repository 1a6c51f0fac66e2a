"""The tapes of a population, and what makes members share one.

A member's composition is written as bytes; equal bytes are one tape, built when first asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from esper_env.config import IntArray
from esper_env.population.interface import Seeds
from esper_env.population.layout import Layout
from esper_env.population.numba_engine.interpreter import Tapes
from esper_env.population.numba_engine.kernels import OPERATION
from esper_env.population.numba_engine.program_builder import SeedState, Tape, TapeBuilder

MAX_TAPES = 4096
"""Compositions of members that are remembered, some 20 MB."""


class Assignment(NamedTuple):
    """The tapes of some members."""

    tape: IntArray
    """Number of each member's tape. (m,)."""
    order: IntArray
    """Positions of the members by falling cost, those of one composition together. (m,)."""


class Library:
    """All tapes that were asked for, one behind the other; a member's tape is given by its number.

    Args:
        layout: Of the members.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._clear()

    def _clear(self) -> None:
        modules = 1 + self._layout.host.num_slots
        self._numbers: dict[tuple[tuple[str, int], bytes], int] = {}
        self._last: dict[tuple[str, int], tuple[bytes, Assignment]] = {}
        self._ops = _Rows((), OPERATION)
        self._columns = _Rows((), np.int32)
        self._ends, self._module, self._tensor = (_Rows((), np.int64) for _ in range(3))
        self._starts = [_Rows((), np.int64) for _ in range(3)]
        for start in self._starts:
            start.extend([0])
        self._is_frozen = _Rows((modules,), np.bool_)
        self.arena = _Rows((), np.int64)
        """Numbers that the regions of each tape take."""
        self._cost = _Rows((), np.int64)
        self.squares = _Rows((modules - 1, self._layout.max_seed_tensors), np.float64)
        """Per tape, 0 for each tensor of a seed that it trains, else NaN."""

    def training(self, members: IntArray, seeds: Seeds, size: int) -> Assignment:
        """Return the members' tapes for training batches of some size."""
        kinds = members, seeds.width, seeds.blueprint, seeds.blend
        states = seeds.is_isolated, seeds.is_frozen, seeds.beta > 0
        return self._find(
            ("train", size),
            b"".join(array.tobytes() for array in (*kinds, *states)),
            lambda: _cut(_training_rows(members, seeds), range(len(members) + 1)),
            lambda key: _training_tape(self._layout, key, size),
        )

    def evaluation(
        self, members: IntArray, seeds: Seeds, row_start: IntArray, labels: IntArray, size: int
    ) -> Assignment:
        """Return the members' tapes for evaluations of some images side by side.

        Args:
            members: Positions. (m,).
            seeds: Of the population.
            row_start: Where the networks of each member begin, and the end of the last. (m + 1,).
            labels: Per network and slot a label of its blend weight; see `TapeBuilder.evaluation`.
            size: Images.
        """
        state = seeds.width[members], seeds.blueprint[members], seeds.blend[members]
        return self._find(
            ("evaluate", size),
            b"".join(array.tobytes() for array in (*state, row_start, labels)),
            lambda: _evaluation_keys(*state, row_start, labels),
            lambda key: _evaluation_tape(self._layout, key, size),
        )

    def _find(
        self,
        name: tuple[str, int],
        state: bytes,
        list_keys: Callable[[], list[bytes]],
        build: Callable[[bytes], Tape],
    ) -> Assignment:
        """Look compositions up, after building the tapes that are missing.

        Args:
            name: Kind and images side by side.
            state: All that the members' tapes depend on; often that of the last call.
            list_keys: Tells it apart by member.
            build: Makes the tape of a key.
        """
        if name in self._last and self._last[name][0] == state:
            return self._last[name][1]
        if len(self._numbers) >= MAX_TAPES:
            self._clear()
        known, keys = self._numbers, list_keys()
        for key in keys:
            if (name, key) not in known:
                self._add(build(key))
                known[name, key] = len(known)
        tape = np.array([known[name, key] for key in keys])
        found = Assignment(tape, np.lexsort((tape, -self._cost.rows[tape])))
        self._last[name] = state, found
        return found

    def _add(self, tape: Tape) -> None:
        parts = (self._ops, tape.ops), (self._columns, tape.index), (self._ends, tape.ends)
        for (rows, part), start in zip(parts, self._starts, strict=True):
            rows.extend(part)
            start.extend([rows.count])
        self._module.extend(tape.module)
        self._tensor.extend(tape.tensor)
        self._is_frozen.extend([tape.is_frozen])
        self.arena.extend([tape.arena])
        self._cost.extend([tape.cost])
        squares = np.full(self.squares.rows.shape[1:], np.nan)
        is_seed = tape.tensor >= 0
        squares[tape.module[is_seed] - 1, tape.tensor[is_seed]] = 0.0
        self.squares.extend([squares])

    def tapes_of(self, tape: IntArray) -> Tapes:
        """Return the tapes for members that have these numbers."""
        op_start, columns_start, tensor_start = self._starts
        return Tapes(
            tape=tape,
            ops=self._ops.rows,
            op_start=op_start.rows,
            arena=self.arena.rows,
            columns=self._columns.rows,
            columns_start=columns_start.rows,
            ends=self._ends.rows,
            module=self._module.rows,
            tensor=self._tensor.rows,
            tensor_start=tensor_start.rows,
            is_frozen=self._is_frozen.rows,
        )


def _training_rows(members: IntArray, seeds: Seeds) -> IntArray:
    """Return what the training tape of each member depends on, a row each.

    Width, and per slot blueprint, blend, isolated, frozen of the seed, -1 if none runs.
    """
    count, slots = seeds.blueprint[members].shape
    rows = np.empty((count, 1 + 4 * slots), dtype=np.int64)
    rows[:, 0] = seeds.width[members]
    packed = rows[:, 1:].reshape(count, slots, 4)
    fields = (seeds.blueprint, seeds.blend, seeds.is_isolated, seeds.is_frozen)
    for i, array in enumerate(fields):
        packed[..., i] = array[members]
    packed[seeds.beta[members] <= 0] = -1
    return rows


def _training_tape(layout: Layout, key: bytes, size: int) -> Tape:
    width, *fields = np.frombuffer(key, dtype=np.int64).tolist()
    seeds = [_seed(*fields[i : i + 4]) for i in range(0, len(fields), 4)]
    return TapeBuilder(layout, width, size).training(seeds)


def _evaluation_keys(
    width: IntArray, blueprint: IntArray, blend: IntArray, row_start: IntArray, labels: IntArray
) -> list[bytes]:
    """Return what the evaluation tape of each member depends on.

    As int64: width; per slot blueprint, and per slot blend, of a seed with weight in some of the
    networks, else -1; per network and slot a label of its blend weight.
    """
    is_used = np.maximum.reduceat(labels, row_start[:-1]) > 0
    seeds = [np.where(is_used, array, -1) for array in (blueprint, blend)]
    heads = np.column_stack([width, *seeds]).astype(np.int64)
    own = _cut(labels, row_start.tolist())
    return [a + b for a, b in zip(_cut(heads, range(len(heads) + 1)), own, strict=True)]


def _evaluation_tape(layout: Layout, key: bytes, size: int) -> Tape:
    slots = layout.host.num_slots
    width, *fields = np.frombuffer(key, dtype=np.int64).tolist()
    blueprints, blends, labels = fields[:slots], fields[slots : 2 * slots], fields[2 * slots :]
    seeds = [_seed(*seed, 0, 0) for seed in zip(blueprints, blends, strict=True)]
    rows = [labels[i : i + slots] for i in range(0, len(labels), slots)]
    return TapeBuilder(layout, width, size).evaluation(seeds, rows)


def _seed(blueprint: int, blend: int, is_isolated: int, is_frozen: int) -> SeedState | None:
    if blueprint < 0:
        return None
    return SeedState(blueprint, blend, bool(is_isolated), bool(is_frozen))


def _cut(rows: IntArray, starts: Sequence[int]) -> list[bytes]:
    """Return the bytes of the rows from each start to the next."""
    everything, width = rows.tobytes(), rows.itemsize * rows.shape[1]
    return [everything[a * width : b * width] for a, b in itertools.pairwise(starts)]


class _Rows:
    """An array that grows by rows at its end, seldom by copying.

    Args:
        shape: Of a row.
        dtype: Of the numbers.
    """

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self.rows: npt.NDArray[Any] = np.zeros((64, *shape), dtype=dtype)
        """Those that are there, and zeros."""
        self.count = 0

    def extend(self, rows: Any) -> None:
        """Put rows behind the last one."""
        end = self.count + len(rows)
        if end > len(self.rows):
            more = np.zeros((2 * end, *self.rows.shape[1:]), dtype=self.rows.dtype)
            more[: self.count] = self.rows[: self.count]
            self.rows = more
        self.rows[self.count : end] = rows
        self.count = end
