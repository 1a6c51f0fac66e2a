"""The engine of networks whose layers all have kernels: tapes, arrays and threads.

The counterpart of `torch_engine` on a CPU. A network of a few thousand parameters lives in the
cache of a core while it is trained, so nothing is gained by joining networks into large operations;
what a member computes depends on nothing but itself, and threads share the members out. The
arithmetic is in `interpreter`.
"""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from esper_env.config import BoolArray, Float32Array, FloatArray, IntArray
from esper_env.jit import announce, entry_point
from esper_env.population.images import Draw, ImageSet
from esper_env.population.interface import Evaluation, Seeds, SGDSettings, TrainReport
from esper_env.population.numba_engine.interpreter import (
    Matrices,
    Networks,
    Pictures,
    Results,
    load_chunks,
    run_members,
)
from esper_env.population.numba_engine.program_builder import is_supported
from esper_env.population.numba_engine.program_cache import Assignment, Library
from esper_env.population.storage import Storage

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
        self._library = Library(self._layout)
        self._chunks: dict[int, tuple[ImageSet, Any, Any]] = {}
        self._arenas: dict[tuple[int, int], Float32Array] = {}
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
        work = library.training(members, seeds, size)
        squares = library.squares.rows[work.tape]
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
        self._run(work, networks, pictures, results, is_training=True)
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
        work = self._library.evaluation(own, seeds, row_start, labelled, size)
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
        self._run(work, networks, pictures, results, is_training=False)
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
        work: Assignment,
        networks: Networks,
        pictures: Pictures,
        results: Results,
        *,
        is_training: bool,
    ) -> None:
        """Run all members, in as many threads as torch may use; this thread is one of them.

        A thread that comes too late, as its core was busy, finds nothing left to do, and nobody
        waits for it.
        """
        storage, library = self._storage, self._library
        arena = int(library.arena.rows[work.tape].max())
        taken, finished = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
        tapes = library.tapes_of(work.tape)
        matrices = Matrices(
            storage.parameters.numpy(), storage.momentum.numpy(), storage.buffers.numpy()
        )
        sizes = (arena, arena, self._layout.num_parameters)
        common = tapes, matrices, networks, pictures, results, is_training
        calls = []
        for n in range(min(torch.get_num_threads(), len(work.order))):
            arenas = [
                self._arena(n, i, size if is_training or i == 0 else 0)
                for i, size in enumerate(sizes)
            ]
            calls.append((work.order, taken, finished, *arenas, *common))
        others = []
        if len(calls) > 1:
            pool = _pool(len(calls) - 1, os.getpid())
            others = [pool.submit(run_members, *call) for call in calls[1:]]
        if not run_members(*calls[0]):
            for future in others:
                future.result()

    def _arena(self, thread: int, index: int, size: int) -> Float32Array:
        """Return a thread's array of at least this size."""
        known = self._arenas.get((thread, index))
        if known is None or len(known) < size:
            self._arenas[thread, index] = known = _aligned(size)
        return known


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


def _aligned(size: int) -> Float32Array:
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
