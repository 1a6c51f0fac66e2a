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
from esper_env.jit import count_up
from esper_env.population.images import Draw, ImageSet
from esper_env.population.numba_engine import kernels as k
from esper_env.population.numba_engine.kernels import (
    Kind,
    kernel,
    network_entry_point,
    record_dtype,
)

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
    "arena",  # Length of its arena.
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
    """Images and labels; either the fields of training are empty or those of evaluation."""

    labels: IntArray
    """Classes. (m, batches, batch); in an evaluation (1, batches, batch), -1 for padding."""
    images: npt.NDArray[np.uint8]
    """Raw images to sample from. (n, size, size, channels)."""
    mean: Float32Array
    """Subtracted from each channel. (channels,)."""
    std: Float32Array
    """Divides each channel. (channels,)."""
    indices: IntArray = _NO_INDICES
    """Sampled images. (m, batches, batch), in training."""
    shifts: IntArray = _NO_INDICES[..., None]
    """Shifts of the crops; (m, batches, batch, 2) [pixels], or (m, batches, 0, 2) without crops."""
    flips: BoolArray = _NO_INDICES.astype(bool)
    """Whether images are mirrored. (m, batches, batch), or (m, batches, 0) without mirroring."""
    chunks: Float32Array = _NO_NUMBERS
    """Normalized images of all members, in an evaluation. (batches, region)."""

    @classmethod
    def for_training(cls, images: ImageSet, draw: Draw) -> Pictures:
        """Return batches that are sampled from a split."""
        batches, _, m = draw.indices.shape
        none = np.zeros((batches, 0, m, 2), dtype=np.int64)
        return cls(
            labels=_by_member(draw.labels),
            images=images.images.numpy(),
            mean=images.mean.numpy(),
            std=images.std.numpy(),
            indices=_by_member(draw.indices),
            shifts=_by_member(none if draw.shifts is None else draw.shifts),
            flips=_by_member(none[..., 0] > 0 if draw.flips is None else draw.flips),
        )

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
            images=images.images.numpy(),
            mean=images.mean.numpy(),
            std=images.std.numpy(),
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


def _by_member(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(batches, size, m, ...) -> (m, batches, size, ...)."""
    return np.ascontiguousarray(array.transpose(2, 0, 1, *range(3, array.ndim)))


@network_entry_point
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
        a: Arena.
        d: Gradient of the arena; unused in an evaluation.
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
            arena = programs.records[index].arena
            k.fill(k.run(a, 0, arena), np.float32(0))
            if is_training:
                k.fill(k.run(d, 0, arena), np.float32(0))
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
    """Run all batches of one member."""
    program = programs.records[programs.program[m]]
    ops = programs.ops[program.op_start : program.op_stop]
    columns = programs.columns[program.column_start : program.column_stop]
    tensors = programs.tensors[program.tensor_start : program.tensor_stop]
    row = networks.members[m]
    p, momentum = matrices.parameters[row], matrices.momentum[row]
    buffers = matrices.buffers[row]
    alpha = networks.alpha[networks.row_start[m] : networks.row_start[m + 1]]
    batch = pictures.labels.shape[2]
    # Batches.
    for n in range(pictures.labels.shape[1]):
        labels = pictures.labels[m if is_training else 0, n]
        if is_training:
            load(
                a, pictures.images, pictures.mean, pictures.std, pictures.indices[m, n],
                pictures.shifts[m, n], pictures.flips[m, n],
            )  # fmt: skip
        else:
            k.copy(k.run(a, 0, pictures.chunks.shape[1]), pictures.chunks[n])
        start = 0
        # Classifiers: one in training, one per network in an evaluation.
        for i in range(len(ops)):
            head = ops[i]
            if head.kind == Kind.CLASSIFY:
                _forward(ops[start:i], a, p, buffers, alpha, batch, is_training)
                loss, hits = k.classify(head, a, p, batch, labels)
                network = networks.row_start[m] + head.row
                results.losses[network] += loss / (batch if is_training else 1)
                results.hits[network] += hits
                start = i + 1
        if is_training:
            k.classify_backward(ops[-1], a, d, p, g, batch, labels)
            _backward(ops[:-1], a, d, p, g, alpha, networks.beta[m], batch)
            rates, squares = networks.rates[m], results.squares[m]
            host = _update(p, momentum, g, columns, tensors, rates, networks.settings, squares)
            results.host_squares[m] += host
    if is_training:
        # A sum is finite only if every number is.
        total = np.float32(0)
        for i in columns:
            total += p[i]
        results.is_finite[m] = math.isfinite(total) and math.isfinite(k.total_of(buffers))


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
) -> None:
    """Run the backward passes of operations other than CLASSIFY, last operation first."""
    for n in range(len(ops) - 1, -1, -1):
        op = ops[n]
        if op.kind == Kind.CONV:
            k.conv_backward(op, a, d, p, g, batch)
        elif op.kind == Kind.NORM:
            k.norm_backward(op, a, d, p, g, batch)
        elif op.kind == Kind.RELU:
            k.relu_backward(op, a, d, batch)
        elif op.kind == Kind.EXCITE:
            k.excite_backward(op, a, d, p, g, batch)
        elif op.kind == Kind.MIX:
            k.mix_backward(op, a, d, p, g, alpha[op.row, op.slot], beta[op.slot], batch)
        elif op.kind == Kind.POOL:
            k.pool_backward(op, a, d, batch)


@kernel
def load(
    a: Float32Array,
    images: npt.NDArray[np.uint8],
    mean: Float32Array,
    std: Float32Array,
    indices: IntArray,
    shifts: IntArray,
    flips: BoolArray,
) -> None:
    """Write a batch of sampled, augmented and normalized images into the first region."""
    # a[0]: (channels, side + 2, side + 2, batch)
    # images: (n, side, side, channels); indices: (batch,)
    # shifts: (batch, 2) or (0, 2); flips: (batch,) or (0,)
    batch, side, channels = len(indices), images.shape[1], images.shape[3]
    row = (side + 2) * batch
    # Images of the batch.
    for i in range(batch):
        dy, dx, flip = 0, 0, False
        if len(shifts):
            dy, dx = shifts[i, 0], shifts[i, 1]
        if len(flips):
            flip = flips[i]
        # Pixels of the crop; (u, v) is where a pixel comes from, black outside the image.
        for y in range(side):
            for x in range(side):
                u = y + dy
                v = (side - 1 - x if flip else x) + dx
                inside = u >= 0 and u < side and v >= 0 and v < side
                for c in range(channels):
                    value = np.float32(images[indices[i], u, v, c]) if inside else np.float32(0)
                    at = k.first_row(0, c, side, batch) + y * row + x * batch + i
                    a[at] = (value - mean[c]) / std[c]


@kernel
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
    mu, decay, clip = settings[0], settings[1], settings[2]
    norms = np.zeros(len(rates), dtype=np.float32)
    # Trained tensors and their numbers: squared norms of each module, and of each seed's tensor.
    for t in tensors:
        total = np.float32(0)
        for i in range(t.start, t.stop):
            total += g[columns[i]] * g[columns[i]]
        norms[t.module] += total
        if t.module > 0:
            squares[t.module - 1, t.index] += total
    # Trained tensors again, as each is scaled by the norm of its whole module.
    for t in tensors:
        if not t.is_frozen:
            rate = rates[t.module]
            scale = clip / (np.sqrt(norms[t.module]) + np.float32(1e-6))
            scale = np.float32(1) if scale > 1 else scale
            pull = decay if t.module == 0 else np.float32(0)
            for i in range(t.start, t.stop):
                at = columns[i]
                momentum[at] = mu * momentum[at] + g[at] * scale + pull * p[at]
                p[at] -= rate * momentum[at]
    return np.float32(norms[0])
