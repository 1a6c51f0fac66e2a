"""Training and evaluation of members on a CPU, one network after the other, compiled.

The counterpart of `program` and `tree` for hosts and seeds whose layers have kernels. A network of
a few thousand parameters lives in the cache of a core while it is trained, so nothing is gained by
joining networks into large operations; what a member computes depends on nothing but itself, and
threads share the members out.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from esper_env.config import BoolArray, FloatArray, IntArray
from esper_env.population import kernels as k
from esper_env.population import tape as tape_module
from esper_env.population.images import Draw, ImageSet
from esper_env.population.kernels import entry_point, kernel
from esper_env.population.optimizer import SGDSettings
from esper_env.population.report import Evaluation, TrainReport
from esper_env.population.slots import Seeds
from esper_env.population.storage import Storage
from esper_env.population.tape import FIELDS, Kind, SeedState, Tape, TapeBuilder, is_supported

MAX_TAPES, MAX_BATCHES = 512, 8
"""Compositions, of members and of batches of them, that are remembered: some 10 MB."""
EVALUATION_BATCH = 32
"""Images side by side in an evaluation; two vectors of 16 floats."""

(
    KIND, SRC, DST, CIN, COUT, SIZE, WIDTH, GROUPS, WEIGHT, STRIDE, BIAS, MEAN, VAR, AUX, RECTIFY,
    MODE, SLOT, BLEND, BRANCH, HIDDEN, WEIGHT_2, STRIDE_2, BIAS_2, ISOLATED, ROW,
) = range(len(FIELDS))  # fmt: skip
# A kernel cannot read an enumeration.
CONV, NORM, RELU, EXCITE, MIX, POOL, CLASSIFY, TANH, GATE = (int(kind) for kind in Kind)


@kernel
def _forward(
    ops: IntArray, a: Any, p: Any, buffers: Any, alpha: Any, batch: int, training: bool
) -> None:
    """Run operations up to and without CLASSIFY ones."""
    for o in ops:
        kind, src, dst, size, cin = o[KIND], o[SRC], o[DST], o[SIZE], o[CIN]
        if kind == CONV:
            k.conv_forward(
                a, p, src, dst, cin, o[COUT], size, batch, o[WIDTH], o[GROUPS], o[WEIGHT],
                o[STRIDE], o[BIAS],
            )  # fmt: skip
        elif kind == NORM:
            k.norm_forward(
                a, p, buffers, src, dst, cin, size, batch, o[WEIGHT], o[BIAS], o[MEAN], o[VAR],
                o[AUX], o[RECTIFY] != 0, training,
            )  # fmt: skip
        elif kind == RELU:
            k.relu_forward(a, src, dst, cin, size, batch)
        elif kind == EXCITE:
            k.excite_forward(
                a, p, src, dst, cin, o[HIDDEN], size, batch, o[AUX], o[WEIGHT], o[STRIDE], o[BIAS],
                o[WEIGHT_2], o[STRIDE_2], o[BIAS_2],
            )  # fmt: skip
        elif kind == TANH:
            region = k.run(a, src, cin * (size + 2) * (size + 2) * batch)
            k.tanh_of(region, region)
        elif kind == GATE:
            k.gate_forward(a, p, src, cin, size, batch, o[AUX], o[WEIGHT], o[BIAS])
        elif kind == MIX:
            k.mix_forward(
                a, src, o[BRANCH], dst, cin, size, batch, o[BLEND], alpha[o[ROW], o[SLOT]], o[AUX]
            )
        elif kind == POOL:
            k.pool_forward(a, src, dst, cin, size, batch)


@kernel
def _backward(
    ops: IntArray, a: Any, d: Any, p: Any, g: Any, alpha: Any, beta: Any, batch: int
) -> None:
    """Run operations backwards from the last before CLASSIFY."""
    for n in range(len(ops) - 1, -1, -1):
        o = ops[n]
        kind, src, dst, size, cin, mode = o[KIND], o[SRC], o[DST], o[SIZE], o[CIN], o[MODE]
        if kind == CONV:
            k.conv_backward(
                a, d, p, g, src, dst, cin, o[COUT], size, batch, o[WIDTH], o[GROUPS], o[WEIGHT],
                o[STRIDE], o[BIAS], mode,
            )  # fmt: skip
        elif kind == NORM:
            k.norm_backward(
                a, d, p, g, src, dst, cin, size, batch, o[WEIGHT], o[BIAS], o[AUX],
                o[RECTIFY] != 0, mode,
            )  # fmt: skip
        elif kind == RELU:
            k.relu_backward(a, d, src, dst, cin, size, batch, mode)
        elif kind == EXCITE:
            k.excite_backward(
                a, d, p, g, src, dst, cin, o[HIDDEN], size, batch, o[AUX], o[WEIGHT], o[STRIDE],
                o[BIAS], o[WEIGHT_2], o[STRIDE_2], o[BIAS_2], mode,
            )  # fmt: skip
        elif kind == MIX:
            k.mix_backward(
                a, d, p, g, src, o[BRANCH], dst, cin, size, batch, o[BLEND],
                alpha[o[ROW], o[SLOT]], beta[o[SLOT]], o[AUX], o[WEIGHT], o[BIAS],
                o[ISOLATED] != 0,
            )  # fmt: skip
        elif kind == POOL:
            k.pool_backward(a, d, src, dst, cin, size, batch)


@kernel
def _load(a: Any, images: Any, mean: Any, std: Any, index: Any, shifts: Any, flips: Any) -> None:
    """Write normalised images into the first region, (channels, size + 2, size + 2, batch).

    `shifts` and `flips` are empty where nothing is changed.
    """
    batch, size, channels = len(index), images.shape[1], images.shape[3]
    row = (size + 2) * batch
    for i in range(batch):
        dy, dx, flip = 0, 0, False
        if len(shifts):
            dy, dx = shifts[i, 0], shifts[i, 1]
        if len(flips):
            flip = flips[i]
        for y in range(size):
            for x in range(size):
                u = y + dy
                v = (size - 1 - x if flip else x) + dx
                inside = u >= 0 and u < size and v >= 0 and v < size
                for c in range(channels):
                    value = np.float32(images[index[i], u, v, c]) if inside else np.float32(0)
                    at = k.first_row(0, c, size, batch) + y * row + x * batch + i
                    a[at] = (value - mean[c]) / std[c]


@entry_point
def _load_chunks(
    chunks: Any, pixels: Any, mean: Any, std: Any, shown: Any, no_shifts: Any, no_flips: Any
) -> None:
    """Write normalised images into every chunk."""
    for n in range(len(chunks)):
        _load(chunks[n], pixels, mean, std, shown[n], no_shifts, no_flips)


@kernel
def _update(
    p: Any,
    momentum: Any,
    g: Any,
    index: Any,
    ends: Any,
    module: Any,
    tensor: Any,
    is_frozen: Any,
    rates: Any,
    settings: Any,
    squares: Any,
) -> None:
    """Clip, decay and step like `optimizer.ModuleSGD`; add each seed tensor's squared norm."""
    mu, decay, clip = settings[0], settings[1], settings[2]
    norms = np.zeros(len(rates), dtype=np.float32)
    first = 0
    for t in range(len(ends)):
        total = np.float32(0)
        for i in range(first, ends[t]):
            total += g[index[i]] * g[index[i]]
        norms[module[t]] += total
        if tensor[t] >= 0:
            squares[module[t] - 1, tensor[t]] += total
        first = ends[t]
    first = 0
    for t in range(len(ends)):
        m = module[t]
        if not is_frozen[m]:
            scale = clip / (np.sqrt(norms[m]) + np.float32(1e-6))
            scale = np.float32(1) if scale > 1 else scale
            pull = decay if m == 0 else np.float32(0)
            for i in range(first, ends[t]):
                at = index[i]
                momentum[at] = mu * momentum[at] + g[at] * scale + pull * p[at]
                p[at] -= rates[m] * momentum[at]
        first = ends[t]


@entry_point
def _train(
    order: Any,
    a: Any,
    d: Any,
    g: Any,
    tape: Any,
    ops: Any,
    op_start: Any,
    arena: Any,
    index: Any,
    index_start: Any,
    ends: Any,
    module: Any,
    tensor: Any,
    tensor_start: Any,
    is_frozen: Any,
    members: Any,
    parameters: Any,
    momentum: Any,
    buffers: Any,
    alpha: Any,
    beta: Any,
    images: Any,
    mean: Any,
    std: Any,
    indices: Any,
    labels: Any,
    shifts: Any,
    flips: Any,
    rates: Any,
    settings: Any,
    losses: Any,
    squares: Any,
    is_finite: Any,
) -> None:
    """Train some members; `order` are positions in the arrays with a row per member."""
    last = -1
    batches, batch = indices.shape[1], indices.shape[2]
    for m in order:
        t = tape[m]
        if t != last:
            k.run(a, 0, arena[t])[:] = np.float32(0)
            k.run(d, 0, arena[t])[:] = np.float32(0)
            last = t
        own = ops[op_start[t] : op_start[t + 1]]
        body, head = own[:-1], own[-1]
        first, stop = tensor_start[t], tensor_start[t + 1]
        where = index[index_start[t] : index_start[t + 1]]
        p, v, b = parameters[members[m]], momentum[members[m]], buffers[members[m]]
        weights = alpha[m : m + 1]
        for n in range(batches):
            _load(a, images, mean, std, indices[m, n], shifts[m, n], flips[m, n])
            _forward(body, a, p, b, weights, batch, True)
            loss, _ = k.classify(
                a, p, head[SRC], head[CIN], head[SIZE], batch, head[COUT], head[AUX],
                head[WEIGHT], head[STRIDE], head[BIAS], labels[m, n],
            )  # fmt: skip
            losses[m] += loss / batch
            k.classify_backward(
                a, d, p, g, head[SRC], head[CIN], head[SIZE], batch, head[COUT], head[AUX],
                head[WEIGHT], head[STRIDE], head[BIAS], labels[m, n],
            )  # fmt: skip
            _backward(body, a, d, p, g, weights, beta[m], batch)
            _update(
                p, v, g, where, ends[first:stop], module[first:stop], tensor[first:stop],
                is_frozen[t], rates[m], settings, squares[m],
            )  # fmt: skip
        total = np.float32(0)
        for i in where:
            total += p[i]
        is_finite[m] = math.isfinite(total) and math.isfinite(k.total_of(b))


@entry_point
def _evaluate(
    order: Any,
    a: Any,
    tape: Any,
    ops: Any,
    op_start: Any,
    arena: Any,
    members: Any,
    parameters: Any,
    buffers: Any,
    alpha: Any,
    row_start: Any,
    chunks: Any,
    labels: Any,
    losses: Any,
    hits: Any,
) -> None:
    """Evaluate all networks of some members on chunks of normalised images."""
    last = -1
    batch = labels.shape[1]
    for m in order:
        t = tape[m]
        if t != last:
            k.run(a, 0, arena[t])[:] = np.float32(0)
            last = t
        own = ops[op_start[t] : op_start[t + 1]]
        p, b = parameters[members[m]], buffers[members[m]]
        weights = alpha[row_start[m] : row_start[m + 1]]
        for n in range(len(chunks)):
            k.run(a, 0, chunks.shape[1])[:] = chunks[n]
            start = 0
            for i in range(len(own)):
                head = own[i]
                if head[KIND] == CLASSIFY:
                    _forward(own[start:i], a, p, b, weights, batch, False)
                    start = i + 1
                    loss, hit = k.classify(
                        a, p, head[SRC], head[CIN], head[SIZE], batch, head[COUT], head[AUX],
                        head[WEIGHT], head[STRIDE], head[BIAS], labels[n],
                    )  # fmt: skip
                    losses[row_start[m] + head[ROW]] += loss
                    hits[row_start[m] + head[ROW]] += hit


@dataclass(frozen=True)
class _Batch:
    """Tapes of some members, joined: arrays of all tapes one after the other."""

    tape: IntArray
    """Which tape each member has. (m,)."""
    ops: IntArray
    op_start: IntArray
    arena: IntArray
    cost: IntArray
    index: npt.NDArray[np.int32]
    index_start: IntArray
    ends: IntArray
    module: IntArray
    tensor: IntArray
    tensor_start: IntArray
    is_frozen: BoolArray


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
        self._tapes: dict[Any, Tape] = {}
        self._batches: dict[Any, _Batch] = {}
        self._chunks: dict[int, tuple[ImageSet, Any, Any]] = {}
        self._arenas: dict[int, list[npt.NDArray[np.float32]]] = {}
        host = self._layout.host
        self._has_host = all(is_supported(host.block(i)) for i in range(host.num_slots))
        self._has_seed = np.array(
            [[is_supported(b.build(c)) for b in self._layout.blueprints] for c in host.channels]
        )

    def supports(self, members: IntArray, seeds: Seeds) -> BoolArray:
        """Return which members have kernels for all that they may run. (m,) bool."""
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
        num_slots = self._layout.host.num_slots
        kinds, keys = self._training_kinds(members, seeds)
        batch = self._join(("train", size, *keys), kinds, functools.partial(self._trained, size))
        squares = np.full((m, num_slots, self._layout.max_seed_tensors), np.nan)
        for i in range(m):
            t = batch.tape[i]
            part = slice(batch.tensor_start[t], batch.tensor_start[t + 1])
            is_seed = batch.tensor[part] >= 0
            squares[i, batch.module[part][is_seed] - 1, batch.tensor[part][is_seed]] = 0.0
        exists = ~np.isnan(squares)
        losses = np.zeros(m)
        nothing = np.zeros((m, batches, 0, 2), dtype=np.int64)
        no_flips = np.zeros((m, batches, 0), dtype=bool)
        rates = np.concatenate([host_rate[:, None], np.repeat(seed_rate[:, None], num_slots, 1)], 1)
        arrays = self._rows()
        is_finite = np.zeros(m, dtype=bool)
        tapes = [value for name, value in vars(batch).items() if name != "cost"]
        given = (
            *tapes,
            members,
            *arrays,
            seeds.alpha[members].astype(np.float32),
            seeds.beta[members].astype(np.float32),
            images.images.numpy(),
            images.mean.numpy(),
            images.std.numpy(),
            _by_member(draw.indices),
            _by_member(draw.labels),
            nothing if draw.shifts is None else _by_member(draw.shifts),
            no_flips if draw.flips is None else _by_member(draw.flips),
            rates.astype(np.float32),
            self._settings,
            losses,
            squares,
            is_finite,
        )
        largest = int(batch.arena.max())
        self._share_out(_train, batch, (largest, largest, self._layout.num_parameters), given)
        norms = np.sqrt(squares / batches)
        norms = np.where(exists & np.isnan(norms), np.inf, norms)
        return TrainReport(losses / batches, norms, is_finite)

    def evaluate(
        self, members: IntArray, alpha: FloatArray, seeds: Seeds, images: ImageSet
    ) -> Evaluation:
        """Evaluate networks; see `Population.evaluate`."""
        order = np.argsort(members, kind="stable")
        own, first = np.unique(members[order], return_index=True)
        row_start = np.append(first, len(members))
        rows = alpha[order]
        chunks, labels = self._images(images)
        size = labels.shape[1]
        kinds, keys = self._evaluation_kinds(own, rows.tolist(), row_start.tolist(), seeds)
        batch = self._join(("evaluate", size, *keys), kinds, functools.partial(self._tried, size))
        losses, hits = np.zeros(len(members)), np.zeros(len(members))
        parameters, _, buffers = self._rows()
        given = (
            *(batch.tape, batch.ops, batch.op_start, batch.arena),
            own,
            parameters,
            buffers,
            rows.astype(np.float32),
            row_start,
            chunks,
            labels,
            losses,
            hits,
        )
        self._share_out(_evaluate, batch, (int(batch.arena.max()),), given)
        result = np.empty((2, len(members)))
        result[:, order] = hits, losses
        result /= len(images)
        return Evaluation(accuracy=result[0], loss=result[1])

    # ------------------------------------------------------------------ compositions

    def _training_kinds(self, members: IntArray, seeds: Seeds) -> tuple[list[Any], list[bytes]]:
        """Return each member's composition: width, and per slot the seed that runs."""
        fields = (seeds.blueprint, seeds.blend, seeds.is_isolated, seeds.is_frozen)
        parts = [array[members].astype(np.int64) for array in fields]
        runs = seeds.beta[members] > 0
        packed = np.where(runs[..., None], np.stack(parts, axis=2), -1)
        width = seeds.width[members]
        kinds = [
            (w, tuple(tuple(slot) for slot in row))
            for w, row in zip(width.tolist(), packed.tolist(), strict=True)
        ]
        return kinds, [packed.tobytes(), width.tobytes()]

    def _evaluation_kinds(
        self, members: IntArray, rows: Any, row_start: list[int], seeds: Seeds
    ) -> tuple[list[Any], list[Any]]:
        """Return each member's composition: width, seeds, and which networks share which weight."""
        blueprint, blend = seeds.blueprint[members].tolist(), seeds.blend[members].tolist()
        kinds = []
        for i, width in enumerate(seeds.width[members].tolist()):
            own = rows[row_start[i] : row_start[i + 1]]
            labels, used = [], []
            for slot, values in enumerate(zip(*own, strict=True)):
                known = {0.0: 0}
                labels.append([known.setdefault(value, len(known)) for value in values])
                is_used = len(known) > 1
                used.append((blueprint[i][slot], blend[i][slot], 0, 0) if is_used else (-1,) * 4)
            kinds.append((width, tuple(used), tuple(zip(*labels, strict=True))))
        return kinds, kinds

    def _trained(self, size: int, kind: Any) -> Tape:
        width, seeds = kind
        return TapeBuilder(self._layout, width, size).training(_states(seeds))

    def _tried(self, size: int, kind: Any) -> Tape:
        width, seeds, rows = kind
        return TapeBuilder(self._layout, width, size).evaluation(_states(seeds), rows)

    def _join(self, key: Any, kinds: list[Any], build: Callable[[Any], Tape]) -> _Batch:
        """Return the joined tapes of some compositions."""
        known = self._batches.get(key)
        if known is not None:
            return known
        distinct = {kind: n for n, kind in enumerate(dict.fromkeys(kinds))}
        tapes = []
        for kind in distinct:
            name = (*key[:2], kind)
            if name not in self._tapes:
                self._tapes[name] = build(kind)
            tapes.append(self._tapes[name])
        batch = _Batch(
            tape=np.array([distinct[kind] for kind in kinds]),
            ops=np.concatenate([t.ops for t in tapes]),
            op_start=_starts([t.ops for t in tapes]),
            arena=np.array([t.arena for t in tapes]),
            cost=np.array([t.cost for t in tapes]),
            index=np.concatenate([t.index for t in tapes]),
            index_start=_starts([t.index for t in tapes]),
            ends=np.concatenate([t.ends for t in tapes]),
            module=np.concatenate([t.module for t in tapes]),
            tensor=np.concatenate([t.tensor for t in tapes]),
            tensor_start=_starts([t.ends for t in tapes]),
            is_frozen=np.stack([t.is_frozen for t in tapes]),
        )
        if len(self._batches) >= MAX_BATCHES:
            self._batches.clear()
        if len(self._tapes) >= MAX_TAPES:
            self._tapes.clear()
        self._batches[key] = batch
        return batch

    # ------------------------------------------------------------------ arrays and threads

    def _rows(self) -> tuple[Any, Any, Any]:
        storage = self._storage
        return storage.parameters.numpy(), storage.momentum.numpy(), storage.buffers.numpy()

    def _images(self, images: ImageSet) -> tuple[Any, Any]:
        """Return a split as chunks of normalised images, (chunks, region), and their labels."""
        known = self._chunks.get(id(images))
        if known is not None and known[0] is images:
            return known[1], known[2]
        count, size = len(images), EVALUATION_BATCH
        num_chunks = -(-count // size)
        labels = np.full((num_chunks, size), -1)
        labels.reshape(-1)[:count] = images.labels.numpy()
        height, channels = images.images.shape[1], images.images.shape[3]
        chunks = np.zeros((num_chunks, channels * (height + 2) ** 2 * size), dtype=np.float32)
        shown = np.minimum(np.arange(num_chunks * size), count - 1).reshape(num_chunks, size)
        none, no_flips = np.zeros((0, 2), dtype=np.int64), np.zeros(0, dtype=bool)
        pixels, mean, std = images.images.numpy(), images.mean.numpy(), images.std.numpy()
        _load_chunks(chunks, pixels, mean, std, shown, none, no_flips)
        self._chunks[id(images)] = (images, chunks, labels)
        return chunks, labels

    def _share_out(
        self, function: Callable[..., None], batch: _Batch, sizes: Sequence[int], given: Any
    ) -> None:
        """Call a kernel for all members, in as many threads as torch may use.

        Members are dealt out by falling cost, there and back again, so that threads end together;
        those of one composition follow each other.
        """
        _check_cache()
        count = len(batch.tape)
        threads = min(torch.get_num_threads(), count)
        falling = np.lexsort((batch.tape, -batch.cost[batch.tape]))
        turn = np.arange(count) % (2 * threads)
        dealt = np.minimum(turn, 2 * threads - 1 - turn)
        calls = []
        for n in range(threads):
            arenas = self._arenas.setdefault(n, [])
            for i, size in enumerate(sizes):
                if i == len(arenas):
                    arenas.append(_aligned(0))
                if len(arenas[i]) < size:
                    arenas[i] = _aligned(size)
            calls.append((falling[dealt == n], *arenas[: len(sizes)], *given))
        if threads == 1:
            function(*calls[0])
            return
        pool = _pool(threads, os.getpid())
        for future in [pool.submit(function, *call) for call in calls]:
            future.result()


def _aligned(size: int) -> npt.NDArray[np.float32]:
    """Return zeros that begin at a multiple of 64 bytes, a cache line and a vector register."""
    raw = np.zeros(size + 16, dtype=np.float32)
    start = -raw.ctypes.data % 64 // 4
    return raw[start : start + size]


@functools.cache
def _check_cache() -> None:
    """Forget compiled code that is older than its sources, and say so if there is none.

    Numba looks only at the file of an entry point, not at those of what is compiled into it.
    """
    folder = Path(_train.stats.cache_path)  # type: ignore[attr-defined]
    sources = [Path(file) for file in (__file__, k.__file__, tape_module.__file__)]
    newest = max(source.stat().st_mtime for source in sources)
    compiled = list(folder.glob("compiled.*.nb*"))
    for file in compiled:
        if file.stat().st_mtime < newest:
            file.unlink(missing_ok=True)
    if not any(file.exists() for file in compiled):
        print("esper_env: compiling for this processor, once; about 30 s", file=sys.stderr)


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Return the threads of a process; a forked one inherits none."""
    del process
    return ThreadPoolExecutor(threads, thread_name_prefix="esper")


def _states(seeds: Sequence[tuple[int, int, int, int]]) -> list[SeedState | None]:
    return [
        None if blueprint < 0 else SeedState(blueprint, blend, bool(isolated), bool(frozen))
        for blueprint, blend, isolated, frozen in seeds
    ]


def _starts(arrays: Sequence[npt.NDArray[Any]]) -> IntArray:
    """Return where each array begins in their concatenation, and its end."""
    return np.cumsum([0, *(len(array) for array in arrays)], dtype=np.int64)


def _by_member(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(batches, size, m, ...) -> (m, batches, size, ...)."""
    return np.ascontiguousarray(np.moveaxis(array, 2, 0))
