"""Runs the operations of tapes, compiled: members are trained and evaluated one after the other.

A tape (see `tape`) says what a member computes; here is what each operation does, forwards and
backwards, with the kernels of its layer. Training and evaluation are one entry point because they
share the forward pass, and a second copy of it would take as long again to compile.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from esper_env.config import BoolArray, Float32Array, FloatArray, IntArray
from esper_env.jit import count_up
from esper_env.population.numba_engine import kernels as k
from esper_env.population.numba_engine.kernels import Kind, kernel, network_entry_point

LOOKS = 20_000
"""How often a thread that finds nothing left to do looks whether the others are done: some 0.2 ms,
which to sleep and be woken would take too."""


class Tapes(NamedTuple):
    """Tapes of some members, joined: arrays of all tapes one after the other; see `tape.Tape`."""

    tape: IntArray
    """Which tape each member has. (m,)."""
    ops: npt.NDArray[np.void]
    """(n,) records of `kernels.OPERATION`."""
    op_start: IntArray
    """Where the operations of each tape begin, and the end of the last. (tapes + 1,)."""
    arena: IntArray
    """Numbers that the regions of each tape take. (tapes,)."""
    columns: npt.NDArray[np.int32]
    columns_start: IntArray
    ends: IntArray
    module: IntArray
    tensor: IntArray
    tensor_start: IntArray
    is_frozen: BoolArray
    """(tapes, 1 + slots)."""


class Matrices(NamedTuple):
    """Tensors of all members, a row each; see `layout`."""

    parameters: Float32Array
    momentum: Float32Array
    buffers: Float32Array


class Networks(NamedTuple):
    """Which members are run, and with which weights their seeds are mixed in."""

    members: IntArray
    """Rows of the matrices. (m,)."""
    alpha: Float32Array
    """Forward weights of each network. (networks, slots)."""
    row_start: IntArray
    """Where the networks of each member begin, and the end of the last. (m + 1,)."""
    beta: Float32Array
    """Backward weights. (m, slots), in an evaluation (0, slots)."""
    rates: Float32Array
    """Learning rates of host and seeds. (m, 1 + slots), in an evaluation (0, 1 + slots)."""
    settings: Float32Array
    """Momentum, weight decay of the host, largest norm of a module's gradient. (3,)."""


class Pictures(NamedTuple):
    """What the networks are shown."""

    images: npt.NDArray[np.uint8]
    """To be drawn from in training. (n, height, width, channels)."""
    mean: Float32Array
    std: Float32Array
    indices: IntArray
    """Which images. (m, batches, batch); none in an evaluation."""
    shifts: IntArray
    """(m, batches, batch, 2), or (m, batches, 0, 2) where nothing is cropped."""
    flips: BoolArray
    """(m, batches, batch), or (m, batches, 0) where nothing is mirrored."""
    chunks: Float32Array
    """Normalised images of an evaluation, the same for all members. (batches, region)."""
    labels: IntArray
    """(m, batches, batch), in an evaluation (1, batches, batch); -1: the image does not count."""


class Results(NamedTuple):
    """What is measured, added to what is there."""

    losses: FloatArray
    """Of each network: in training sums over batches of the mean loss, else sums over images."""
    hits: FloatArray
    """Images that each network has right. (networks,)."""
    squares: FloatArray
    """Sums over batches of the squared norms of seed gradients. (m, slots, tensors)."""
    is_finite: BoolArray
    """Whether all weights and statistics are finite after training. (m,)."""


@network_entry_point
def run_members(
    order: IntArray,
    taken: IntArray,
    finished: IntArray,
    a: Float32Array,
    d: Float32Array,
    g: Float32Array,
    tapes: Tapes,
    matrices: Matrices,
    networks: Networks,
    pictures: Pictures,
    results: Results,
    is_training: bool,
) -> bool:
    """Train members on their batches, or evaluate all their networks.

    Threads that share the work call this with the same arrays, but arenas of their own; each takes
    the next member whenever it is done with one.

    Args:
        order: Positions of the members in the arrays with a row per member, in order of work.
        taken: How many of them some thread has begun with. (1,).
        finished: How many of them are done. (1,).
        a: Arena.
        d: Gradient of the arena; not touched in an evaluation.
        g: Gradient of a member's parameters; likewise.
        tapes: What the members compute.
        matrices: What they are; training changes their rows.
        networks: How their seeds are mixed in.
        pictures: What they are shown.
        results: Where measurements go.
        is_training: Whether to train.

    Returns:
        Whether all members are done; if not, other threads are still busy with the last ones.
    """
    last = -1
    batch = pictures.labels.shape[2]
    while True:
        turn = count_up(taken, 1)
        if turn >= len(order):
            break
        m = order[turn]
        t = tapes.tape[m]
        if t != last:
            k.fill(k.run(a, 0, tapes.arena[t]), np.float32(0))
            if is_training:
                k.fill(k.run(d, 0, tapes.arena[t]), np.float32(0))
            last = t
        ops = tapes.ops[tapes.op_start[t] : tapes.op_start[t + 1]]
        first, stop = tapes.tensor_start[t], tapes.tensor_start[t + 1]
        where = tapes.columns[tapes.columns_start[t] : tapes.columns_start[t + 1]]
        row = networks.members[m]
        p, v, b = matrices.parameters[row], matrices.momentum[row], matrices.buffers[row]
        alpha = networks.alpha[networks.row_start[m] : networks.row_start[m + 1]]
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
            for i in range(len(ops)):
                head = ops[i]
                if head["kind"] == Kind.CLASSIFY:
                    _forward(ops[start:i], a, p, b, alpha, batch, is_training)
                    loss, hits = k.classify(head, a, p, batch, labels)
                    network = networks.row_start[m] + head["row"]
                    results.losses[network] += loss / (batch if is_training else 1)
                    results.hits[network] += hits
                    start = i + 1
            if is_training:
                body, head = ops[:-1], ops[-1]
                k.classify_backward(head, a, d, p, g, batch, labels)
                _backward(body, a, d, p, g, alpha, networks.beta[m], batch)
                _update(
                    p, v, g, where, tapes.ends[first:stop], tapes.module[first:stop],
                    tapes.tensor[first:stop], tapes.is_frozen[t], networks.rates[m],
                    networks.settings, results.squares[m],
                )  # fmt: skip
        if is_training:
            total = np.float32(0)
            for i in where:
                total += p[i]
            results.is_finite[m] = math.isfinite(total) and math.isfinite(k.total_of(b))
        count_up(finished, 1)
    looks = 0
    while count_up(finished, 0) < len(order) and looks < LOOKS:
        looks += 1
    return looks < LOOKS


@network_entry_point
def load_chunks(
    chunks: Float32Array,
    images: npt.NDArray[np.uint8],
    mean: Float32Array,
    std: Float32Array,
    shown: IntArray,
    no_shifts: IntArray,
    no_flips: BoolArray,
) -> None:
    """Write normalised images into every chunk."""
    for n in range(len(chunks)):
        load(chunks[n], images, mean, std, shown[n], no_shifts, no_flips)


@kernel
def _forward(
    ops: npt.NDArray[np.void],
    a: Float32Array,
    p: Float32Array,
    buffers: Float32Array,
    alpha: Float32Array,
    batch: int,
    training: bool,
) -> None:
    """Run operations up to and without CLASSIFY ones."""
    for o in ops:
        if o["kind"] == Kind.CONV:
            k.conv_forward(o, a, p, batch)
        elif o["kind"] == Kind.NORM:
            k.norm_forward(o, a, p, buffers, batch, training)
        elif o["kind"] == Kind.RELU:
            k.relu_forward(o, a, batch)
        elif o["kind"] == Kind.EXCITE:
            k.excite_forward(o, a, p, batch)
        elif o["kind"] == Kind.TANH:
            k.tanh_forward(o, a, batch)
        elif o["kind"] == Kind.GATE:
            k.gate_forward(o, a, p, batch)
        elif o["kind"] == Kind.MIX:
            k.mix_forward(o, a, alpha[o["row"], o["slot"]], batch)
        elif o["kind"] == Kind.POOL:
            k.pool_forward(o, a, batch)


@kernel
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
    """Run operations backwards from the last before CLASSIFY."""
    for n in range(len(ops) - 1, -1, -1):
        o = ops[n]
        if o["kind"] == Kind.CONV:
            k.conv_backward(o, a, d, p, g, batch)
        elif o["kind"] == Kind.NORM:
            k.norm_backward(o, a, d, p, g, batch)
        elif o["kind"] == Kind.RELU:
            k.relu_backward(o, a, d, batch)
        elif o["kind"] == Kind.EXCITE:
            k.excite_backward(o, a, d, p, g, batch)
        elif o["kind"] == Kind.MIX:
            k.mix_backward(o, a, d, p, g, alpha[o["row"], o["slot"]], beta[o["slot"]], batch)
        elif o["kind"] == Kind.POOL:
            k.pool_backward(o, a, d, batch)


@kernel
def load(
    a: Float32Array,
    images: npt.NDArray[np.uint8],
    mean: Float32Array,
    std: Float32Array,
    index: IntArray,
    shifts: IntArray,
    flips: BoolArray,
) -> None:
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


@kernel
def _update(
    p: Float32Array,
    momentum: Float32Array,
    g: Float32Array,
    index: IntArray,
    ends: IntArray,
    module: IntArray,
    tensor: IntArray,
    is_frozen: BoolArray,
    rates: Float32Array,
    settings: Float32Array,
    squares: FloatArray,
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
