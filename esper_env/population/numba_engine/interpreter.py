"""Interpreter of programs, compiled: trains and evaluates members one after the other.

A program (see `program_builder`) lists the operations of a member, and `kernels` computes them.
Training and evaluation share one entry point, because they share the forward pass and compiling it
twice would take twice as long.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from esper_env.config import BoolArray, Float32Array, FloatArray, IntArray
from esper_env.jit import count_up, entry_point
from esper_env.population.images import Draw, ImageSet
from esper_env.population.interface import Exam
from esper_env.population.numba_engine import kernels as k
from esper_env.population.numba_engine.kernels import (
    Kind,
    called_kernel,
    kernel,
    record_dtype,
)
from esper_env.population.numba_engine.lanes import item, set_item

kernel_with_one_call = functools.partial(kernel, has_one_call=True)

SPINS = 20_000
"""Iterations (about 0.2 ms) before a finished thread blocks on the others; blocking and waking up
would take as long."""

_NO_NUMBERS = np.zeros((0, 0), dtype=np.float32)
_NO_INDICES = np.zeros((0, 0, 0), dtype=np.int64)


PROGRAM = record_dtype(
    *("op_start", "op_stop"),  # Range of its operations.
    *("column_start", "column_stop"),  # Range of its columns.
    *("tensor_start", "tensor_stop"),  # Range of its trained tensors.
    "arena",  # Length of the arena of one chunk.
    "chunk",  # Images in a chunk, at most.
    "cost",  # Estimated time per image [multiply-adds].
)
"""A program; see `program_builder.Program`."""
TENSOR = record_dtype(
    *("start", "stop"),  # Range of its numbers in the columns of the program.
    "module",  # 0 for a tensor of the host, 1 + slot for a tensor of a seed.
    "index",  # Index among the tensors of its seed, -1 for the host's.
    "is_frozen",  # Whether only its gradient is measured.
)
"""A tensor that a program trains."""


class Programs(NamedTuple):
    """Programs of all compositions; their operations, columns and tensors are concatenated."""

    program: IntArray
    """Index of each member's program. (m,)."""
    records: npt.NDArray[np.void]
    """Records of `PROGRAM`. (programs,)."""
    ops: npt.NDArray[np.void]
    """Records of `kernels.OPERATION`. (ops,)."""
    columns: npt.NDArray[np.int32]
    """Positions of trained numbers in a member's row. (columns,)."""
    tensors: npt.NDArray[np.void]
    """Records of `TENSOR`. (tensors,)."""


class Matrices(NamedTuple):
    """Tensors of all members, one row per member; see `layout`."""

    parameters: Float32Array
    momentum: Float32Array
    buffers: Float32Array


class Networks(NamedTuple):
    """Members to run, and the weights of their seeds. Fields with defaults are for training."""

    members: IntArray
    """Rows of the matrices. (m,)."""
    row_start: IntArray
    """First network of each member, and the number of networks. (m + 1,)."""
    alpha: Float32Array
    """Forward weights of the seeds in each network. (networks, slots)."""
    settings: Float32Array
    """Momentum, weight decay of the host, largest norm of a module's gradient. (3,)."""
    beta: Float32Array = _NO_NUMBERS
    """Backward weights of the seeds. (m, slots)."""
    rates: Float32Array = _NO_NUMBERS
    """Learning rates of host and seeds. (m, 1 + slots)."""


class Pictures(NamedTuple):
    """Images and labels: batches of each member, or chunks of a whole split for all members."""

    labels: IntArray
    """Classes, -1 for padding. (m, batches, batch), or (1, batches, batch) for a whole split."""
    images: npt.NDArray[np.uint8]
    """Raw images of the split, one after the other. (n * size * size * channels,)."""
    size: int
    """Height and width of an image."""
    table: Float32Array
    """Normalized value of each raw one. (channels, 256)."""
    indices: IntArray = _NO_INDICES
    """Images of each member's batches. (m, batches, batch), or empty for a whole split."""
    shifts: IntArray = _NO_INDICES[..., None]
    """Shifts of the crops; (m, batches, batch, 2) [pixels], or (m, batches, 0, 2) without crops."""
    flips: BoolArray = _NO_INDICES.astype(bool)
    """Whether images are mirrored. (m, batches, batch), or (m, batches, 0) without mirroring."""
    chunks: Float32Array = _NO_NUMBERS
    """Normalized images of a whole split, otherwise empty. (batches, region)."""

    @classmethod
    def for_draw(cls, images: ImageSet, draw: Draw) -> Pictures:
        """Return batches of each member."""
        batches, _, m = draw.indices.shape
        none = np.zeros((batches, 0, m, 2), dtype=np.int64)
        return cls(
            labels=_by_member(draw.labels),
            images=images.images.numpy().reshape(-1),
            size=images.images.shape[1],
            table=_normalized_values(images),
            indices=_by_member(draw.indices),
            shifts=_by_member(none if draw.shifts is None else draw.shifts),
            flips=_by_member(none[..., 0] > 0 if draw.flips is None else draw.flips),
        )

    @classmethod
    def for_exam(cls, images: ImageSet, exam: Exam, members: IntArray, batch: int) -> Pictures:
        """Return the images of some members (m,) in batches, the last ones padded."""
        padding = (0, 0), (0, -exam.labels.shape[1] % batch)
        shape = len(members), -1, batch
        indices = np.pad(exam.indices[members], padding).reshape(shape)
        labels = np.pad(exam.labels[members], padding, constant_values=-1).reshape(shape)
        # (m, batches, batch) -> (batches, batch, m)
        return cls.for_draw(images, Draw(indices.transpose(1, 2, 0), labels.transpose(1, 2, 0)))

    @classmethod
    def for_evaluation(cls, images: ImageSet, batch: int) -> Pictures:
        """Return a whole split in chunks of `batch` images, the last one padded."""
        count, size, _, channels = images.images.shape
        num_chunks = -(-count // batch)
        labels = np.full((1, num_chunks, batch), -1)
        labels.reshape(-1)[:count] = images.labels.numpy()
        pixels = np.zeros((num_chunks * batch, channels, size + 2, size + 2), dtype=np.float32)
        pixels[:count, :, 1:-1, 1:-1] = images.normalized(0, count).numpy()
        # (chunks * batch, channels, size + 2, size + 2) -> (chunks, channels * ..., batch)
        chunks = pixels.reshape(num_chunks, batch, -1).transpose(0, 2, 1)
        return cls(
            labels=labels,
            images=images.images.numpy().reshape(-1),
            size=images.images.shape[1],
            table=_normalized_values(images),
            chunks=chunks.reshape(num_chunks, -1),
        )


class Results(NamedTuple):
    """Sums that are added to. Fields with defaults are for training."""

    losses: FloatArray
    """Sum over batches of the mean loss, in an evaluation over images. (networks,)."""
    hits: FloatArray
    """Number of images that each network classifies correctly. (networks,)."""
    squares: FloatArray = np.zeros((0, 0, 0))
    """Sum over batches of the squared gradient norm of each seed tensor. (m, slots, tensors)."""
    host_squares: FloatArray = np.zeros(0)
    """Sum over batches of the squared gradient norm of the host. (m,)."""
    is_finite: BoolArray = np.zeros(0, dtype=bool)
    """Whether all weights and statistics are finite after training. (m,)."""


def _normalized_values(images: ImageSet) -> Float32Array:
    """Return the normalized value of each raw one. (channels, 256) float32."""
    mean, std = images.mean.numpy()[:, None], images.std.numpy()[:, None]
    values: Float32Array = (np.arange(256, dtype=np.float32) - mean) / std
    return values


def _by_member(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(batches, size, m, ...) -> (m, batches, size, ...)."""
    return np.ascontiguousarray(array.transpose(2, 0, 1, *range(3, array.ndim)))


@functools.partial(entry_point, counts_references=False)
def run_members(
    order: IntArray,
    taken: IntArray,
    finished: IntArray,
    a: Float32Array,
    d: Float32Array,
    g: Float32Array,
    programs: Programs,
    matrices: Matrices,
    networks: Networks,
    pictures: Pictures,
    results: Results,
    is_training: bool,
) -> bool:
    """Train members on their batches, or evaluate all their networks.

    Threads that share the work call this with the same arrays, except for `a`, `d` and `g`. Each
    takes the next member when it has finished one.

    Args:
        order: Positions of the members in arrays with a row per member, in order of work. (m,).
        taken: Number of members that a thread has started. (1,).
        finished: Number of members that are finished. (1,).
        a: Arenas of all chunks.
        d: Gradient of the arenas; unused in an evaluation.
        g: Gradient of a member's parameters; unused in an evaluation.
        programs: Programs of the members.
        matrices: Tensors of the members; training changes their rows.
        networks: Weights of the seeds.
        pictures: Images and labels.
        results: Sums to add to.
        is_training: Whether to train.

    Returns:
        Whether all members are finished; if not, other threads are still running the last ones.
    """
    last = -1
    # Members, until all are taken: a fixed share per thread would wait for the slowest core.
    while True:
        turn = count_up(taken, 1)
        if turn >= len(order):
            break
        m = order[turn]
        index = programs.program[m]
        if index != last:
            # Regions of another program lie elsewhere, and their borders must be zero.
            record = programs.records[index]
            batch, most = pictures.labels.shape[2], record.chunk
            length = record.arena * ((batch + most - 1) // most)
            k.fill(k.run(a, 0, length), np.float32(0))
            if is_training:
                k.fill(k.run(d, 0, length), np.float32(0))
            last = index
        _run_member(m, a, d, g, programs, matrices, networks, pictures, results, is_training)
        count_up(finished, 1)
    spins = 0
    # Other threads' last members: they usually finish sooner than this thread could block.
    while count_up(finished, 0) < len(order) and spins < SPINS:
        spins += 1
    return spins < SPINS


@kernel_with_one_call
def _run_member(
    m: int,
    a: Float32Array,
    d: Float32Array,
    g: Float32Array,
    programs: Programs,
    matrices: Matrices,
    networks: Networks,
    pictures: Pictures,
    results: Results,
    is_training: bool,
) -> None:
    """Run all batches of one member, each in chunks of images that fit into the cache.

    A chunk has an arena of its own. All chunks run as far as the next operation that needs a sum
    over the whole batch, which is a batch norm in training; then they go on from there.
    """
    program = programs.records[programs.program[m]]
    ops = programs.ops[program.op_start : program.op_stop]
    columns = programs.columns[program.column_start : program.column_stop]
    tensors = programs.tensors[program.tensor_start : program.tensor_stop]
    row = networks.members[m]
    p, momentum = matrices.parameters[row], matrices.momentum[row]
    buffers = matrices.buffers[row]
    alpha = networks.alpha[networks.row_start[m] : networks.row_start[m + 1]]
    batch, arena, most = pictures.labels.shape[2], program.arena, program.chunk
    chunks = (batch + most - 1) // most
    is_shared = len(pictures.chunks) > 0  # The batches are those of a whole split.
    # Batches.
    for n in range(pictures.labels.shape[1]):
        labels = pictures.labels[0 if is_shared else m, n]
        if labels[0] < 0:
            break  # Only padding follows: other members have more images.
        start = 0
        # Operations up to a classifier (one in training, one per network in an evaluation) or norm.
        for i in range(len(ops)):
            op = ops[i]
            is_norm = is_training and (op.kind == Kind.NORM or op.kind == Kind.NORM_POOL)
            if not is_norm and op.kind != Kind.CLASSIFY:
                continue
            for j in range(chunks):
                first, size = j * most, min(most, batch - j * most)
                part = k.run(a, j * arena, arena)
                if start == 0 and not is_shared:
                    load(
                        part, pictures.images, pictures.size, pictures.table,
                        pictures.indices[m, n], pictures.shifts[m, n], pictures.flips[m, n],
                        first, size,
                    )  # fmt: skip
                elif start == 0:
                    k.copy(k.run(part, 0, pictures.chunks.shape[1]), pictures.chunks[n])
                _forward(ops[start:i], part, p, buffers, alpha, size, is_training)
                if is_norm:
                    k.norm_measure(op, a, part, first, size)
                else:
                    loss, hits = k.classify(op, part, p, size, labels[first : first + size])
                    network = networks.row_start[m] + op.row
                    results.losses[network] += loss / (batch if is_training else 1)
                    results.hits[network] += hits
            start = i + 1
            if is_norm:
                k.norm_finish(op, a, arena, chunks, buffers, batch)
                start = i
        if not is_training:
            continue
        k.fill(g, np.float32(0))
        stop = len(ops)
        # The same backwards: a norm needs sums over the gradients of the whole batch.
        for i in range(len(ops) - 2, -2, -1):
            is_norm = i >= 0 and (ops[i].kind == Kind.NORM or ops[i].kind == Kind.NORM_POOL)
            if i >= 0 and not is_norm:
                continue
            for j in range(chunks):
                first, size = j * most, min(most, batch - j * most)
                part, grads = k.run(a, j * arena, arena), k.run(d, j * arena, arena)
                own = labels[first : first + size]
                _backward(
                    ops[i + 1 : stop], part, grads, p, g, alpha, networks.beta[m], size, own, batch
                )
                if is_norm and ops[i].kind == Kind.NORM:
                    k.norm_backward_measure(ops[i], part, d, grads, first, size)
                elif is_norm:
                    k.norm_pool_backward_measure(ops[i], part, d, grads, p, first, size)
            if is_norm:
                k.norm_backward_finish(ops[i], a, d, arena, chunks, p, g, batch)
            stop = i + 1
        rates, squares = networks.rates[m], results.squares[m]
        host = _update(p, momentum, g, columns, tensors, rates, networks.settings, squares)
        results.host_squares[m] += host
    if is_training:
        # A sum is finite only if every number is.
        total = k.total_of(buffers, 0, len(buffers))
        for t in tensors:
            begin, count = columns[t.start], t.stop - t.start
            if columns[t.stop - 1] - begin == count - 1:
                total += k.total_of(p, begin, count)
            else:
                for i in range(t.start, t.stop):
                    total += p[columns[i]]
        results.is_finite[m] = math.isfinite(total)


@kernel_with_one_call
def _forward(
    ops: npt.NDArray[np.void],
    a: Float32Array,
    p: Float32Array,
    buffers: Float32Array,
    alpha: Float32Array,
    batch: int,
    is_training: bool,
) -> None:
    """Run operations other than CLASSIFY."""
    for op in ops:
        if op.kind == Kind.CONV:
            k.conv_forward(op, a, p, batch)
        elif op.kind == Kind.NORM:
            k.norm_forward(op, a, p, buffers, batch, is_training)
        elif op.kind == Kind.NORM_POOL:
            k.norm_pool_forward(op, a, p, buffers, batch, is_training)
        elif op.kind == Kind.RELU:
            k.relu_forward(op, a, batch)
        elif op.kind == Kind.EXCITE:
            k.excite_forward(op, a, p, batch)
        elif op.kind == Kind.TANH:
            k.tanh_forward(op, a, batch)
        elif op.kind == Kind.GATE:
            k.gate_forward(op, a, p, batch)
        elif op.kind == Kind.MIX:
            k.mix_forward(op, a, alpha[op.row, op.slot], batch)
        elif op.kind == Kind.POOL:
            k.pool_forward(op, a, batch)


@kernel_with_one_call
def _backward(
    ops: npt.NDArray[np.void],
    a: Float32Array,
    d: Float32Array,
    p: Float32Array,
    g: Float32Array,
    alpha: Float32Array,
    beta: Float32Array,
    batch: int,
    labels: IntArray,
    images: int,
) -> None:
    """Run the backward passes of operations, last operation first.

    `batch` is the number of images in this chunk, `images` that in all chunks.
    """
    for n in range(len(ops) - 1, -1, -1):
        op = ops[n]
        if op.kind == Kind.CONV:
            k.conv_backward(op, a, d, p, g, batch)
        elif op.kind == Kind.NORM:
            k.norm_backward(op, a, d, p, batch)
        elif op.kind == Kind.NORM_POOL:
            k.norm_pool_backward(op, a, d, p, batch)
        elif op.kind == Kind.RELU:
            k.relu_backward(op, a, d, batch)
        elif op.kind == Kind.EXCITE:
            k.excite_backward(op, a, d, p, g, batch)
        elif op.kind == Kind.MIX:
            k.mix_backward(op, a, d, p, g, alpha[op.row, op.slot], beta[op.slot], batch)
        elif op.kind == Kind.POOL:
            k.pool_backward(op, a, d, batch)
        elif op.kind == Kind.CLASSIFY:
            k.classify_backward(op, a, d, p, g, batch, labels, images)


@called_kernel
def load(
    a: Float32Array,
    raw: npt.NDArray[np.uint8],
    side: int,
    table: Float32Array,
    indices: IntArray,
    shifts: IntArray,
    flips: BoolArray,
    first: int,
    batch: int,
) -> None:
    """Write sampled, augmented and normalized images into the first region.

    They are `batch` images of a larger batch, from the one at index `first` on.
    """
    # a[0]: (channels, side + 2, side + 2, batch)
    # raw: (n * side * side * channels,); table: (channels, 256)
    # indices: (images,); shifts: (images, 2) or (0, 2); flips: (images,) or (0,)
    channels = table.shape[0]
    own, size = indices[first : first + batch], side * side * channels
    row = (side + 2) * batch
    if len(shifts) == 0 and len(flips) == 0:
        # Pixels, then images: writes are contiguous.
        for c in range(channels):
            values = table[c]
            for y in range(side):
                for x in range(side):
                    to = k.first_row(0, c, side, batch) + y * row + x * batch
                    for i in range(batch):
                        value = item(raw, item(own, i) * size + (y * side + x) * channels + c)
                        set_item(a, to + i, item(values, value))
        return
    # Images, rows and channels of the crop.
    for i in range(batch):
        dy, dx, flip = 0, 0, False
        if len(shifts):
            dy, dx = shifts[first + i, 0], shifts[first + i, 1]
        if len(flips):
            flip = flips[first + i]
        for y in range(side):
            u, step = y + dy, -channels if flip else channels
            # Columns of the crop that lie in the image; all others are black.
            start, stop = max(0, -dx), min(side, side - dx)
            if flip:
                start, stop = max(0, dx), min(side, side + dx)
            if u < 0 or u >= side:
                start, stop = side, side
            left = (side - 1 - start if flip else start) + dx
            for c in range(channels):
                at, values = k.first_row(0, c, side, batch) + y * row + i, table[c]
                for x in range(start):
                    set_item(a, at + x * batch, values[0])
                source = ((own[i] * side + u) * side + left) * channels + c
                for x in range(start, stop):
                    set_item(a, at + x * batch, item(values, item(raw, source)))
                    source += step
                for x in range(stop, side):
                    set_item(a, at + x * batch, values[0])


@called_kernel
def _update(
    p: Float32Array,
    momentum: Float32Array,
    g: Float32Array,
    columns: npt.NDArray[np.int32],
    tensors: npt.NDArray[np.void],
    rates: Float32Array,
    settings: Float32Array,
    squares: FloatArray,
) -> np.float32:
    """Clip, decay and step as `torch_engine.sgd.ModuleSGD` does; record squared gradient norms.

    Returns the squared gradient norm of the host.
    """
    # p, momentum, g: (parameters,); columns: (n,); rates: (1 + slots,); squares: (slots, tensors)
    mu, clip, of_host = settings[0], settings[2], np.float32(0)
    first = 0
    # Modules, each with its tensors one after the other.
    while first < len(tensors):
        module, last, square = tensors[first].module, first, np.float32(0)
        # Tensors and their numbers: squared norms.
        while last < len(tensors) and tensors[last].module == module:
            t, total = tensors[last], np.float32(0)
            begin, count = columns[t.start], t.stop - t.start
            if columns[t.stop - 1] - begin == count - 1:
                total = k.square_of(g, begin, count)
            else:
                for i in range(t.start, t.stop):
                    total += g[columns[i]] * g[columns[i]]
            if module > 0:
                squares[module - 1, t.index] += total
            square += total
            last += 1
        if module == 0:
            of_host = square
        rate, pull = rates[module], settings[1] if module == 0 else np.float32(0)
        scale = clip / (np.sqrt(square) + np.float32(1e-6))
        scale = np.float32(1) if scale > 1 else scale
        # The same tensors again, as each is scaled by the norm of the whole module.
        for n in range(first, last):
            t = tensors[n]
            begin, count = columns[t.start], t.stop - t.start
            if t.is_frozen:
                continue
            if columns[t.stop - 1] - begin == count - 1:
                slope, value = k.run(g, begin, count), k.run(p, begin, count)
                speed = k.run(momentum, begin, count)
                for i in range(count):
                    speed[i] = mu * speed[i] + slope[i] * scale + pull * value[i]
                    value[i] -= rate * speed[i]
            else:
                for i in range(t.start, t.stop):
                    at = columns[i]
                    momentum[at] = mu * momentum[at] + g[at] * scale + pull * p[at]
                    p[at] -= rate * momentum[at]
        first = last
    return of_host
