"""The engine of networks whose layers all have kernels: tapes, arrays and threads.

The counterpart of `torch_engine` on a CPU. A network of a few thousand parameters lives in the
cache of a core while it is trained, so nothing is gained by joining networks into large operations;
what a member computes depends on nothing but itself, and threads share the members out. The
arithmetic is in `interpreter`.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from esper_env.compilation import announce, entry_point
from esper_env.config import BoolArray, FloatArray, IntArray
from esper_env.population.images import Draw, ImageSet
from esper_env.population.interpreter import (
    FIELDS,
    Matrices,
    Networks,
    Pictures,
    Results,
    Tapes,
    load_chunks,
    run_members,
)
from esper_env.population.layout import Layout
from esper_env.population.optimizer import SGDSettings
from esper_env.population.report import Evaluation, TrainReport
from esper_env.population.slots import Seeds
from esper_env.population.storage import Storage
from esper_env.population.tape import SeedState, Tape, TapeBuilder, is_supported

MAX_TAPES = 4096
"""Compositions of members that are remembered: some 20 MB."""
EVALUATION_BATCH = 32
"""Images side by side in an evaluation; two vectors of 16 floats."""
_NO_IMAGES = np.zeros((0, 0, 0, 0), dtype=np.uint8)
_NO_NUMBERS = np.zeros(0, dtype=np.float32)


class CompiledEngine:
    """Trains and evaluates members whose layers all have kernels.

    Args:
        storage: Tensors of all members, on the CPU.
        settings: Optimiser rules.
    """

    def __init__(self, storage: Storage, settings: SGDSettings) -> None:
        self._storage, self._layout = storage, storage.layout
        values = (settings.momentum, settings.weight_decay, settings.clip_norm)
        self._settings = np.array(values, dtype=np.float32)
        self._library = _Library(self._layout)
        self._chunks: dict[int, tuple[ImageSet, Any, Any]] = {}
        self._arenas: dict[tuple[int, int], npt.NDArray[np.float32]] = {}
        host = self._layout.host
        self._has_host = all(is_supported(host.block(i)) for i in range(host.num_slots))
        self._has_seed = np.array(
            [[is_supported(b.build(c)) for b in self._layout.blueprints] for c in host.channels]
        )
        self._has_all = bool(self._has_host and self._has_seed.all())

    def supports(self, members: IntArray, seeds: Seeds) -> BoolArray:
        """Return which members have kernels for all that they may run. (m,) bool."""
        if self._has_all:
            return np.ones(len(members), dtype=bool)
        slots, blueprint = np.arange(self._layout.host.num_slots), seeds.blueprint[members]
        has_kernels = self._has_seed[slots, np.maximum(blueprint, 0)] | (blueprint < 0)
        result: BoolArray = np.all(has_kernels, axis=1) & self._has_host
        return result

    def train(
        self,
        members: IntArray,
        seeds: Seeds,
        images: ImageSet,
        draw: Draw,
        host_rate: FloatArray,
        seed_rate: FloatArray,
    ) -> TrainReport:
        """Train members for some batches; see `Population.train`."""
        batches, size, m = draw.indices.shape
        library = self._library
        tape = library.find(
            ("train", size),
            _training_keys(members, seeds),
            lambda key: _training_tape(self._layout, key, size),
        )
        squares = library.squares.rows[tape]
        is_trained = squares == 0
        rates = np.empty((m, 1 + self._layout.host.num_slots), dtype=np.float32)
        rates[:, 0], rates[:, 1:] = host_rate, seed_rate[:, None]
        networks = Networks(
            members=members,
            alpha=seeds.alpha[members].astype(np.float32),
            row_start=np.arange(m + 1),
            beta=seeds.beta[members].astype(np.float32),
            rates=rates,
            settings=self._settings,
        )
        pictures = Pictures(
            images=images.images.numpy(),
            mean=images.mean.numpy(),
            std=images.std.numpy(),
            indices=_by_member(draw.indices),
            shifts=np.zeros((m, batches, 0, 2), dtype=np.int64)
            if draw.shifts is None
            else _by_member(draw.shifts),
            flips=np.zeros((m, batches, 0), dtype=bool)
            if draw.flips is None
            else _by_member(draw.flips),
            chunks=_NO_NUMBERS[:, None],
            labels=_by_member(draw.labels),
        )
        results = Results(np.zeros(m), np.zeros(m), squares, np.zeros(m, dtype=bool))
        self._run(tape, networks, pictures, results, is_training=True)
        norms = np.sqrt(results.squares / batches)
        norms[np.isnan(norms) & is_trained] = np.inf
        return TrainReport(results.losses / batches, norms, results.is_finite)

    def evaluate(
        self, members: IntArray, alpha: FloatArray, seeds: Seeds, images: ImageSet
    ) -> Evaluation:
        """Evaluate networks; see `Population.evaluate`."""
        rows = len(members)
        order = np.argsort(members, kind="stable")
        member_of, weights = members[order], alpha[order]
        is_first = np.ones(rows, dtype=bool)
        np.not_equal(member_of[1:], member_of[:-1], out=is_first[1:])
        row_start = np.append(np.nonzero(is_first)[0], rows)
        own = member_of[row_start[:-1]]
        chunks, labels = self._images(images)
        size = labels.shape[2]
        labelled = np.empty(weights.shape, dtype=np.int64)
        _label_weights(weights, row_start, labelled)
        tape = self._library.find(
            ("evaluate", size),
            _evaluation_keys(own, seeds, row_start, labelled),
            lambda key: _evaluation_tape(self._layout, key, size),
        )
        nothing = _NO_NUMBERS[:, None]
        networks = Networks(
            own, weights.astype(np.float32), row_start, nothing, nothing, self._settings
        )
        none = np.zeros((0, 0, 0), dtype=np.int64)
        pictures = Pictures(
            images=_NO_IMAGES,
            mean=_NO_NUMBERS,
            std=_NO_NUMBERS,
            indices=none,
            shifts=none[..., None],
            flips=none.astype(bool),
            chunks=chunks,
            labels=labels,
        )
        no_squares = self._library.squares.rows[:0]
        results = Results(np.zeros(rows), np.zeros(rows), no_squares, np.zeros(0, dtype=bool))
        self._run(tape, networks, pictures, results, is_training=False)
        accuracy, loss = np.empty(rows), np.empty(rows)
        accuracy[order], loss[order] = results.hits, results.losses
        return Evaluation(accuracy=accuracy / len(images), loss=loss / len(images))

    # ------------------------------------------------------------------ arrays and threads

    def _images(self, images: ImageSet) -> tuple[Any, Any]:
        """Return a split as chunks of normalised images, (chunks, region), and labels, (1, ...)."""
        known = self._chunks.get(id(images))
        if known is not None and known[0] is images:
            return known[1], known[2]
        announce(run_members)
        count, size = len(images), EVALUATION_BATCH
        num_chunks = -(-count // size)
        labels = np.full((1, num_chunks, size), -1)
        labels.reshape(-1)[:count] = images.labels.numpy()
        height, channels = images.images.shape[1], images.images.shape[3]
        chunks = np.zeros((num_chunks, channels * (height + 2) ** 2 * size), dtype=np.float32)
        shown = np.minimum(np.arange(num_chunks * size), count - 1).reshape(num_chunks, size)
        none, no_flips = np.zeros((0, 2), dtype=np.int64), np.zeros(0, dtype=bool)
        pixels, mean, std = images.images.numpy(), images.mean.numpy(), images.std.numpy()
        load_chunks(chunks, pixels, mean, std, shown, none, no_flips)
        self._chunks[id(images)] = (images, chunks, labels)
        return chunks, labels

    def _run(
        self,
        tape: IntArray,
        networks: Networks,
        pictures: Pictures,
        results: Results,
        *,
        is_training: bool,
    ) -> None:
        """Run all members, in as many threads as torch may use; this thread is one of them.

        `tape` is the tape of each in the library.
        """
        storage, library = self._storage, self._library
        arena = int(library.arena.rows[tape].max())
        shares = _deal(tape, library.cost.rows[tape], torch.get_num_threads())
        tapes = library.tapes_of(tape)
        matrices = Matrices(
            storage.parameters.numpy(), storage.momentum.numpy(), storage.buffers.numpy()
        )
        sizes = (arena, arena, self._layout.num_parameters)
        calls = []
        for n, share in enumerate(shares):
            arenas = [
                self._arena(n, i, size if is_training or i == 0 else 0)
                for i, size in enumerate(sizes)
            ]
            calls.append(
                (share, *arenas, tapes, matrices, networks, pictures, results, is_training)
            )
        others = []
        if len(calls) > 1:
            pool = _pool(len(calls) - 1, os.getpid())
            others = [pool.submit(run_members, *call) for call in calls[1:]]
        run_members(*calls[0])
        for future in others:
            future.result()

    def _arena(self, thread: int, index: int, size: int) -> npt.NDArray[np.float32]:
        """Return a thread's array of at least this size."""
        known = self._arenas.get((thread, index))
        if known is None or len(known) < size:
            self._arenas[thread, index] = known = _aligned(size)
        return known


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


class _Library:
    """All tapes that were asked for, one behind the other; a member's tape is given by its number.

    Args:
        layout: Of the members.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._clear()

    def _clear(self) -> None:
        modules = 1 + self._layout.host.num_slots
        self._numbers: dict[Any, int] = {}
        self._ops = _Rows((len(FIELDS),), np.int64)
        self._columns = _Rows((), np.int32)
        self._ends, self._module, self._tensor = (_Rows((), np.int64) for _ in range(3))
        self._starts = [_Rows((), np.int64) for _ in range(3)]
        for start in self._starts:
            start.extend([0])
        self._is_frozen = _Rows((modules,), np.bool_)
        self.arena = _Rows((), np.int64)
        """Numbers that the regions of each tape take."""
        self.cost = _Rows((), np.int64)
        """Of each tape, to share work out."""
        self.squares = _Rows((modules - 1, self._layout.max_seed_tensors), np.float64)
        """Per tape, 0 for each tensor of a seed that it trains, else NaN."""

    def find(
        self, name: tuple[str, int], keys: Sequence[bytes], build: Callable[[bytes], Tape]
    ) -> IntArray:
        """Return the numbers of some members' tapes, after building those that are missing.

        Args:
            name: Kind and images side by side.
            keys: Compositions of the members.
            build: Makes the tape of a composition.
        """
        if len(self._numbers) >= MAX_TAPES:
            self._clear()
        known = self._numbers
        for key in keys:
            if (name, key) not in known:
                self._add(build(key))
                known[name, key] = len(known)
        return np.array([known[name, key] for key in keys])

    def _add(self, tape: Tape) -> None:
        parts = (self._ops, tape.ops), (self._columns, tape.index), (self._ends, tape.ends)
        for (rows, part), start in zip(parts, self._starts, strict=True):
            rows.extend(part)
            start.extend([rows.count])
        self._module.extend(tape.module)
        self._tensor.extend(tape.tensor)
        self._is_frozen.extend([tape.is_frozen])
        self.arena.extend([tape.arena])
        self.cost.extend([tape.cost])
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


def _training_keys(members: IntArray, seeds: Seeds) -> list[bytes]:
    """Return what the training tape of each member depends on.

    As int64: width, and per slot blueprint, blend, isolated, frozen of the seed, -1 if none runs.
    """
    count, slots = seeds.blueprint[members].shape
    rows = np.empty((count, 1 + 4 * slots), dtype=np.int64)
    rows[:, 0] = seeds.width[members]
    packed = rows[:, 1:].reshape(count, slots, 4)
    fields = (seeds.blueprint, seeds.blend, seeds.is_isolated, seeds.is_frozen)
    for i, array in enumerate(fields):
        packed[..., i] = array[members]
    packed[seeds.beta[members] <= 0] = -1
    return _cut(rows, range(count + 1))


def _training_tape(layout: Layout, key: bytes, size: int) -> Tape:
    width, *fields = np.frombuffer(key, dtype=np.int64).tolist()
    seeds = [_seed(*fields[i : i + 4]) for i in range(0, len(fields), 4)]
    return TapeBuilder(layout, width, size).training(seeds)


def _evaluation_keys(
    members: IntArray, seeds: Seeds, row_start: IntArray, labels: IntArray
) -> list[bytes]:
    """Return what the evaluation tape of each member depends on.

    As int64: width; per slot blueprint, and per slot blend, of a seed with weight in some of the
    networks, else -1; per network and slot a label of its blend weight.
    """
    is_used = np.maximum.reduceat(labels, row_start[:-1]) > 0
    heads = np.column_stack(
        [
            seeds.width[members],
            np.where(is_used, seeds.blueprint[members], -1),
            np.where(is_used, seeds.blend[members], -1),
        ]
    ).astype(np.int64)
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


@entry_point
def _label_weights(weights: FloatArray, row_start: IntArray, labels: IntArray) -> None:
    """Number the distinct weights of each member's slot by first appearance; no weight is 0."""
    for i in range(len(row_start) - 1):
        for slot in range(weights.shape[1]):
            count = 0
            for row in range(row_start[i], row_start[i + 1]):
                label = 0
                if weights[row, slot] != 0:
                    for earlier in range(row_start[i], row):
                        if weights[earlier, slot] == weights[row, slot]:
                            label = labels[earlier, slot]
                    if label == 0:
                        count += 1
                        label = count
                labels[row, slot] = label


def _deal(tape: IntArray, cost: IntArray, threads: int) -> tuple[IntArray, ...]:
    """Deal members out by falling cost, there and back again, so that threads end together.

    Members of one composition follow each other.
    """
    count = len(tape)
    threads = min(threads, count)
    falling = np.lexsort((tape, -cost))
    turn = np.arange(count) % (2 * threads)
    dealt = np.minimum(turn, 2 * threads - 1 - turn)
    return tuple(falling[dealt == n] for n in range(threads))


def _aligned(size: int) -> npt.NDArray[np.float32]:
    """Return zeros that begin at a multiple of 64 bytes, a cache line and a vector register."""
    raw = np.zeros(size + 16, dtype=np.float32)
    start = -raw.ctypes.data % 64 // 4
    return raw[start : start + size]


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Return the threads of a process; a forked one inherits none."""
    del process
    return ThreadPoolExecutor(threads, thread_name_prefix="esper")


def _by_member(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(batches, size, m, ...) -> (m, batches, size, ...)."""
    return np.ascontiguousarray(array.transpose(2, 0, 1, *range(3, array.ndim)))
