"""The engine for a CPU: trains and evaluates members one by one in compiled code.

A network of a few thousand parameters fits into the cache of a core, so joining networks into large
operations, as `torch_engine` does on a GPU, gains nothing. Threads take whole members, so results
do not depend on the number of threads. `interpreter` does the arithmetic.
"""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from esper_env.config import BoolArray, Float32Array, FloatArray, IntArray
from esper_env.jit import announce, entry_point
from esper_env.population.images import ImageSet
from esper_env.population.interface import (
    Evaluation,
    Exam,
    Seeds,
    SGDSettings,
    Training,
    TrainReport,
)
from esper_env.population.numba_engine.interpreter import (
    Matrices,
    Networks,
    Pictures,
    Results,
    run_members,
)
from esper_env.population.numba_engine.program_builder import chunk_size, is_supported
from esper_env.population.numba_engine.program_cache import Assignment, ProgramCache
from esper_env.population.storage import Storage

SLACK = 1024
"""Numbers after the arenas that a kernel may load but does not use."""


class CompiledEngine:
    """Trains and evaluates members whose layers all have kernels.

    Args:
        storage: Tensors of all members, on the CPU.
        settings: Optimizer rules.
    """

    def __init__(self, storage: Storage, settings: SGDSettings) -> None:
        self._storage, self._layout = storage, storage.layout
        values = (settings.momentum, settings.weight_decay, settings.clip_norm)
        self._chunk = chunk_size(storage.layout.host)
        self._settings = np.array(values, dtype=np.float32)
        self.programs = ProgramCache(self._layout)
        self._pictures: dict[int, tuple[ImageSet, Pictures]] = {}
        self._arrays: dict[tuple[int, int], Float32Array] = {}
        """Arena, its gradient, and the gradient of the parameters, by thread."""
        host = self._layout.host
        self._has_host = all(is_supported(host.block(i)) for i in range(host.num_slots))
        self._has_seed = np.array(
            [[is_supported(b.build(c)) for b in self._layout.blueprints] for c in host.channels]
        )

    @property
    def has_all_kernels(self) -> bool:
        """Whether kernels exist for all layers that any member may have."""
        return bool(self._has_host and self._has_seed.all())

    def supports(self, members: IntArray, seeds: Seeds) -> BoolArray:
        """Return whether kernels exist for all layers of each member. (m,)."""
        slots, blueprint = np.arange(self._layout.host.num_slots), seeds.blueprint[members]
        has_kernels = self._has_seed[slots, np.maximum(blueprint, 0)] | (blueprint < 0)
        result: BoolArray = np.all(has_kernels, axis=1) & self._has_host
        return result

    def train(self, training: Training) -> TrainReport:
        """Train members for some batches; see `Population.train`."""
        members, seeds, images, draw, host_rate, seed_rate = training
        _, size, m = draw.indices.shape
        batches = np.count_nonzero(draw.labels[:, 0] >= 0, axis=0)
        assignment = self.programs.training(members, seeds, size)
        squares = self.programs.squares.rows[assignment.programs.program]
        is_trained = squares == 0
        rates = np.empty((m, 1 + seeds.alpha.shape[1]), dtype=np.float32)
        rates[:, 0], rates[:, 1:] = host_rate, seed_rate[:, None]
        networks = Networks(
            members=members,
            row_start=np.arange(m + 1),
            alpha=seeds.alpha[members].astype(np.float32),
            settings=self._settings,
            beta=seeds.beta[members].astype(np.float32),
            rates=rates,
        )
        is_finite = np.zeros(m, dtype=bool)
        results = Results(np.zeros(m), np.zeros(m), squares, np.zeros(m), is_finite)
        pictures = Pictures.for_draw(images, draw)
        self._run(assignment, networks, pictures, results, is_training=True)
        norms = np.sqrt(results.squares / batches[:, None, None])
        norms[np.isnan(norms) & is_trained] = np.inf
        host_norms = np.sqrt(results.host_squares / batches)
        host_norms[np.isnan(host_norms)] = np.inf
        return TrainReport(results.losses / batches, norms, host_norms, is_finite)

    def evaluate(
        self,
        members: IntArray,
        alpha: FloatArray,
        seeds: Seeds,
        images: ImageSet,
        exam: Exam | None = None,
    ) -> Evaluation:
        """Evaluate networks; see `Population.evaluate`."""
        rows = len(members)
        order = np.argsort(members, kind="stable")
        member_of, weights = members[order], alpha[order]
        is_first = np.ones(rows, dtype=bool)
        np.not_equal(member_of[1:], member_of[:-1], out=is_first[1:])
        row_start = np.append(np.nonzero(is_first)[0], rows)
        own = member_of[row_start[:-1]]
        labels = np.empty(weights.shape, dtype=np.int64)
        _label_weights(weights, row_start, labels)
        assignment = self.programs.evaluation(own, seeds, row_start, labels, self._chunk)
        networks = Networks(own, row_start, weights.astype(np.float32), self._settings)
        results = Results(np.zeros(rows), np.zeros(rows))
        num_images: int | IntArray = images.labels.shape[0]
        if exam is None:
            pictures = self._pictures_of(images)
        else:
            announce(run_members)
            pictures = Pictures.for_exam(images, exam, own, self._chunk)
            num_images = exam.num_images(members)
        self._run(assignment, networks, pictures, results, is_training=False)
        accuracy, loss = np.empty(rows), np.empty(rows)
        accuracy[order], loss[order] = results.hits, results.losses
        return Evaluation(accuracy=accuracy / num_images, loss=loss / num_images)

    # ------------------------------------------------------------------ arrays and threads

    def _pictures_of(self, images: ImageSet) -> Pictures:
        """Return the chunks of a split, which are computed once."""
        known = self._pictures.get(id(images))
        if known is None or known[0] is not images:
            announce(run_members)
            known = images, Pictures.for_evaluation(images, self._chunk)
            self._pictures[id(images)] = known
        return known[1]

    def _run(
        self,
        assignment: Assignment,
        networks: Networks,
        pictures: Pictures,
        results: Results,
        *,
        is_training: bool,
    ) -> None:
        """Run all members in as many threads as torch may use, this one included.

        A helper thread that starts late, because its core was busy, finds no member left. This
        thread waits only for helpers that have taken one.
        """
        storage, programs, order = self._storage, assignment.programs, assignment.order
        records, batch = programs.records[programs.program], pictures.labels.shape[2]
        chunks = -(-batch // records["chunk"])
        arena = int((records["arena"] * chunks).max()) + SLACK
        taken, finished = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
        matrices = Matrices(
            storage.parameters.numpy(), storage.momentum.numpy(), storage.buffers.numpy()
        )
        common = programs, matrices, networks, pictures, results, is_training
        sizes = (arena, arena, self._layout.num_parameters) if is_training else (arena, 0, 0)
        calls = []
        for n in range(min(torch.get_num_threads(), len(order))):
            arrays = []
            for i, size in enumerate(sizes):
                known = self._arrays.get((n, i))
                if known is None or len(known) < size:
                    self._arrays[n, i] = known = _aligned(size)
                arrays.append(known)
            calls.append((order, taken, finished, *arrays, *common))
        others = []
        if len(calls) > 1:
            pool = _pool(len(calls) - 1, os.getpid())
            others = [pool.submit(run_members, *call) for call in calls[1:]]
        if not run_members(*calls[0]):
            for future in others:
                future.result()


@entry_point
def _label_weights(weights: FloatArray, row_start: IntArray, labels: IntArray) -> None:
    """Number the distinct weights of each slot in the networks of a member; weight 0 gets 0.

    Args:
        weights: Weight of each seed in each network. (networks, slots).
        row_start: First network of each member, and the number of networks. (m + 1,).
        labels: Output: 1, 2, ... by first appearance. (networks, slots).
    """
    # Members and slots, each with labels of its own.
    for i in range(len(row_start) - 1):
        for slot in range(weights.shape[1]):
            count = 0
            # Networks, and all earlier ones: a repeated weight gets the label it has there.
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
    """Return zeros that start at a multiple of 64 bytes: a cache line and a vector register."""
    raw = np.zeros(size + 16, dtype=np.float32)
    start = -raw.ctypes.data % 64 // 4
    return raw[start : start + size]


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Return the helper threads of a process; a forked process does not inherit them."""
    del process
    return ThreadPoolExecutor(threads, thread_name_prefix="esper")
