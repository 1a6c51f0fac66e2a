"""Kernels of the compiled engine: forward and backward pass of each operation on flat arrays.

All features of a program lie in one array `a`, the arena, and their gradients at the same offsets
in `d`. `p` is a member's row of parameters, `g` its gradient. An operation is a record of
`OPERATION`. In comments, a[src] is the region of `a` that begins at offset `op.src`.

Features are (channels, side + 2, side + 2, batch): images innermost, and a border of zeros that no
kernel writes. So a row of a 3x3 convolution is nine multiply-adds of long contiguous runs, whatever
the number of channels: 40 to 80 GFLOP/s on one core, where a grouped convolution of such small
networks reaches 5 to 10.

Numbers are computed in the order that is written here, with vectors where that matters (`lanes`):
the compiler may not reorder sums, so every compilation gives the same bits.
"""

from __future__ import annotations

import functools
import math
from enum import IntEnum

import numpy as np

from esper_env.config import Blend, Float32Array, IntArray
from esper_env.jit import inlined
from esper_env.population.numba_engine.lanes import (
    LANES,
    Lanes,
    add,
    add_product,
    at_least,
    at_most,
    divide,
    first_of,
    floor,
    item,
    load,
    load_first,
    multiply,
    power_of_two,
    splat,
    store_first,
    subtract,
    sum_of,
    where_equal,
    where_larger,
    where_positive,
)

EPSILON = np.float32(1e-5)
"""Added to variances, as in torch.nn.BatchNorm2d."""
KEEP = np.float32(0.9)
"""Weight of the old running statistics in an update, as in torch.nn.BatchNorm2d."""
kernel = functools.partial(inlined, counts_references=False)
called_kernel = functools.partial(kernel, is_called=True)


class Kind(IntEnum):
    """Kind of an operation."""

    CONV = 0
    NORM = 1
    RELU = 2
    EXCITE = 3
    MIX = 4
    POOL = 5
    CLASSIFY = 6
    TANH = 7
    GATE = 8
    NORM_POOL = 9


class GradientMode(IntEnum):
    """What a backward pass does with the gradient of the operation's input."""

    NONE = 0
    ASSIGN = 1
    ACCUMULATE = 2


def record_dtype(*names: str) -> np.dtype[np.void]:
    """Return the dtype of records with integer fields, whose names are attributes."""
    return np.dtype((np.record, [(name, np.int64) for name in names]))


OPERATION = record_dtype(
    "kind",  # A value of `Kind`.
    *("src", "dst"),  # Regions of input and output, as offsets into the arena.
    *("in_channels", "out_channels", "side"),  # Shape of the input; `side` is height and width.
    *("weight", "bias"),  # Offsets into the parameters; bias -1 means none.
    "stride",  # Distance between the weights of two outputs, which the widest member determines.
    "aux",  # Region of intermediate results.
    "mode",  # A value of `GradientMode`.
    "row",  # Index of the network in an evaluation.
    *("kernel_size", "groups"),  # CONV.
    *("running_mean", "running_var"),  # NORM: offsets into the buffers.
    "rectify",  # NORM: whether a ReLU follows.
    *("hidden", "weight_2", "stride_2", "bias_2"),  # EXCITE: hidden channels, second layer.
    *("slot", "branch", "blend"),  # MIX: slot, region of the branch's output, a value of `Blend`.
    "is_isolated",  # MIX and the first layer of a branch: whether the seed's input is detached.
)
"""An operation of a program. Fields that its kind does not use are 0."""


# ---------------------------------------------------------------------------------- contiguous runs


@functools.partial(kernel, has_one_call=True)
def run(a: Float32Array, offset: int, n: int) -> Float32Array:
    """Return a contiguous run. Indexing a slice from 0 needs no check for negative indices."""
    return a[offset : offset + n]


@kernel
def first_row(offset: int, channel: int, side: int, batch: int) -> int:
    """Return the offset of the first pixel of a channel inside the border."""
    row = (side + 2) * batch
    return offset + channel * (side + 2) * row + row + batch


@kernel
def fill(out: Float32Array, value: np.float32) -> None:
    """Write one number everywhere. A loop compiles faster than an assignment to a slice."""
    for i in range(len(out)):
        out[i] = value


@kernel
def copy(out: Float32Array, x: Float32Array) -> None:
    """Write x. A loop compiles faster than an assignment to a slice."""
    for i in range(len(out)):
        out[i] = x[i]


@kernel
def total_of(x: Float32Array, at: int, n: int) -> np.float32:
    """Return the sum of n numbers from an index on."""
    total = splat(np.float32(0))
    for i in range(0, n, LANES):
        total = add(total, load_first(x, at + i, n - i))
    return np.float32(sum_of(total))


@kernel
def square_of(x: Float32Array, at: int, n: int) -> np.float32:
    """Return the sum of squares of n numbers from an index on."""
    total = splat(np.float32(0))
    for i in range(0, n, LANES):
        value = load_first(x, at + i, n - i)
        total = add_product(total, value, value)
    return np.float32(sum_of(total))


# ---------------------------------------------------------------------------------- convolution


BAND = 128
"""Pixels in a band of rows, whose features of a few channels fit into the fastest cache."""
COLUMNS = 4
"""Columns of a tile: outputs side by side whose sums are in registers at once."""


@kernel
def _add_columns(
    s0: Lanes, s1: Lanes, s2: Lanes, s3: Lanes, x0: Lanes, x1: Lanes, x2: Lanes, x3: Lanes,
    w: np.float32,
) -> tuple[Lanes, Lanes, Lanes, Lanes]:  # fmt: skip
    """Return the sums of four columns after one tap of a kernel."""
    v = splat(w)
    return (
        add_product(s0, x0, v),
        add_product(s1, x1, v),
        add_product(s2, x2, v),
        add_product(s3, x3, v),
    )


@kernel
def _tile(
    x: Float32Array, at: int, plane: int, row: int, batch: int, channels: int,
    p: Float32Array, weight: int, step: int, pair: int, is_point: bool, width: int, flip: bool,
    y: Float32Array, to: int, initial: np.float32, other_initial: np.float32,
    accumulate: bool, is_pair: bool, is_wide: bool, count: int,
) -> None:  # fmt: skip
    """Write a tile of outputs: two channels, four columns, and the images in one vector.

    The compiler knows the flags, so it leaves out sums that are not stored.

    Args:
        x: Array of the input.
        at: Offset of the pixel of `x` under the middle of the kernel for the first column.
        plane: Distance between two channels of `x` and of `y`.
        row: Distance between two rows.
        batch: Distance between two columns.
        channels: Input channels.
        p: Parameters.
        weight: Offset of the kernel from the first input channel to the first output.
        step: Distance between the kernels of two input channels.
        pair: Distance between the kernels of two outputs.
        is_point: Whether the kernel is 1x1, else 3x3.
        width: Width of the kernel, which the compiler does not know.
        flip: Whether the kernel is rotated by 180 degrees.
        y: Array of the output.
        to: Offset of the tile in the first output channel.
        initial: Number that the sums of the first output start from.
        other_initial: Number that those of the second start from.
        accumulate: Whether the sums start from the numbers in `y` instead.
        is_pair: Whether there is a second output channel.
        is_wide: Whether there are four columns, else one.
        count: Images, at most a vector.
    """
    b = splat(initial)
    s0, s1, s2, s3 = b, b, b, b
    b = splat(other_initial)
    t0, t1, t2, t3 = b, b, b, b
    if accumulate:
        s0 = load(y, to)
        if is_wide:
            s1, s2, s3 = load(y, to + batch), load(y, to + 2 * batch), load(y, to + 3 * batch)
        if is_pair:
            t0 = load(y, to + plane)
            if is_wide:
                t1, t2 = load(y, to + plane + batch), load(y, to + plane + 2 * batch)
                t3 = load(y, to + plane + 3 * batch)
    # With few registers a loop that is not unrolled, so that no row's inputs are loaded early.
    rows = 3 if LANES == 16 else width
    # Input channels.
    for _ in range(channels):
        if is_point:
            x0, x1 = load(x, at), load(x, at + batch)
            x2, x3 = load(x, at + 2 * batch), load(x, at + 3 * batch)
            s0, s1, s2, s3 = _add_columns(s0, s1, s2, s3, x0, x1, x2, x3, item(p, weight))
            t0, t1, t2, t3 = _add_columns(t0, t1, t2, t3, x0, x1, x2, x3, item(p, weight + pair))
        else:
            # Rows of the kernel; its columns see six columns of the input.
            for r in range(rows):
                left = at + (r - 1) * row - batch
                x0, x1, x2 = load(x, left), load(x, left + batch), load(x, left + 2 * batch)
                x3, x4 = load(x, left + 3 * batch), load(x, left + 4 * batch)
                x5 = load(x, left + 5 * batch)
                w, turn = weight + 3 * r, 1
                if flip:
                    w, turn = weight + 8 - 3 * r, -1
                s0, s1, s2, s3 = _add_columns(s0, s1, s2, s3, x0, x1, x2, x3, item(p, w))
                s0, s1, s2, s3 = _add_columns(s0, s1, s2, s3, x1, x2, x3, x4, item(p, w + turn))
                s0, s1, s2, s3 = _add_columns(s0, s1, s2, s3, x2, x3, x4, x5, item(p, w + 2 * turn))
                w += pair
                t0, t1, t2, t3 = _add_columns(t0, t1, t2, t3, x0, x1, x2, x3, item(p, w))
                t0, t1, t2, t3 = _add_columns(t0, t1, t2, t3, x1, x2, x3, x4, item(p, w + turn))
                t0, t1, t2, t3 = _add_columns(t0, t1, t2, t3, x2, x3, x4, x5, item(p, w + 2 * turn))
        at += plane
        weight += step
    store_first(y, to, s0, count)
    if is_wide:
        store_first(y, to + batch, s1, count)
        store_first(y, to + 2 * batch, s2, count)
        store_first(y, to + 3 * batch, s3, count)
    if is_pair:
        to += plane
        store_first(y, to, t0, count)
        if is_wide:
            store_first(y, to + batch, t1, count)
            store_first(y, to + 2 * batch, t2, count)
            store_first(y, to + 3 * batch, t3, count)


@called_kernel
def correlate(
    x: Float32Array, src: int, y: Float32Array, dst: int, p: Float32Array, weight: int,
    bias: int, inputs: int, outputs: int, between: int, step: int, pair: int, side: int,
    batch: int, width: int, flip: bool, accumulate: bool, groups: int,
) -> None:  # fmt: skip
    """Correlate features with kernels: the forward pass of a convolution, or that of gradients.

    Args:
        x: Array of the input.
        src: Region of the input in `x`. (channels, side + 2, side + 2, batch).
        y: Array of the output.
        dst: Region of the output in `y`. (channels, side + 2, side + 2, batch).
        p: Parameters.
        weight: Offset of the first kernel.
        bias: Offset of the biases, -1 for none.
        inputs: Input channels of a group.
        outputs: Output channels of a group.
        between: Distance between the kernels of two groups.
        step: Distance between the kernels of two input channels.
        pair: Distance between the kernels of two outputs.
        side: Height and width.
        batch: Images.
        width: Width of a kernel, 1 or 3.
        flip: Whether kernels are rotated by 180 degrees.
        accumulate: Whether to add to `y`; else it is assigned.
        groups: Groups.
    """
    row = (side + 2) * batch
    plane, zero = (side + 2) * row, np.float32(0)
    # Groups, then tiles by rows, columns and images.
    for group in range(groups):
        kernels = weight + group * between
        x_start = first_row(src, group * inputs, side, batch)
        y_start = first_row(dst, group * outputs, side, batch)
        for r in range(side):
            q = 0
            while q < side:
                is_wide = q + COLUMNS <= side
                for i in range(0, batch, LANES):
                    offset, count = r * row + q * batch + i, batch - i
                    at, to, w, b, c = x_start + offset, y_start + offset, kernels, zero, zero
                    # Output channels in pairs, while the input is in the cache.
                    for o in range(0, outputs, 2):
                        is_pair = o + 1 < outputs
                        if bias >= 0:
                            b = p[bias + group * outputs + o]
                            c = p[bias + group * outputs + o + is_pair]
                        if width == 1:
                            _tiles(
                                x, at, plane, row, batch, inputs, p, w, step, pair, True, 1, flip,
                                y, to, b, c, accumulate, is_pair, is_wide, count,
                            )  # fmt: skip
                        else:
                            _tiles(
                                x, at, plane, row, batch, inputs, p, w, step, pair, False, width,
                                flip, y, to, b, c, accumulate, is_pair, is_wide, count,
                            )  # fmt: skip
                        to += 2 * plane
                        w += 2 * pair
                q += COLUMNS if is_wide else 1


@kernel
def _tiles(
    x: Float32Array, at: int, plane: int, row: int, batch: int, channels: int,
    p: Float32Array, weight: int, step: int, pair: int, is_point: bool, width: int, flip: bool,
    y: Float32Array, to: int, initial: np.float32, other_initial: np.float32,
    accumulate: bool, is_pair: bool, is_wide: bool, count: int,
) -> None:  # fmt: skip
    """Call `_tile` with flags that the compiler knows."""
    if is_pair and is_wide:
        _tile(
            x, at, plane, row, batch, channels, p, weight, step, pair, is_point, width, flip, y,
            to, initial, other_initial, accumulate, True, True, count,
        )  # fmt: skip
    elif is_pair:
        _tile(
            x, at, plane, row, batch, channels, p, weight, step, pair, is_point, width, flip, y,
            to, initial, other_initial, accumulate, True, False, count,
        )  # fmt: skip
    elif is_wide:
        _tile(
            x, at, plane, row, batch, channels, p, weight, step, 0, is_point, width, flip, y,
            to, initial, other_initial, accumulate, False, True, count,
        )  # fmt: skip
    else:
        _tile(
            x, at, plane, row, batch, channels, p, weight, step, 0, is_point, width, flip, y,
            to, initial, other_initial, accumulate, False, False, count,
        )  # fmt: skip


@called_kernel
def conv_forward(op: np.record, a: Float32Array, p: Float32Array, batch: int) -> None:
    """Convolve with a 1x1 or 3x3 kernel, stride 1 and zero padding."""
    # x = a[src]: (cin, side + 2, side + 2, batch); y = a[dst]: (cout, side + 2, side + 2, batch)
    # w = p[weight]: (cout, cin / groups, width, width), outputs `stride` apart
    # b = p[bias]: (cout,)
    group_in, group_out = op.in_channels // op.groups, op.out_channels // op.groups
    taps = op.kernel_size * op.kernel_size
    correlate(
        a, op.src, a, op.dst, p, op.weight, op.bias, group_in, group_out, group_out * op.stride,
        taps, op.stride, op.side, batch, op.kernel_size, False, False, op.groups,
    )  # fmt: skip


@called_kernel
def conv_backward(
    op: np.record, a: Float32Array, d: Float32Array, p: Float32Array, g: Float32Array, batch: int
) -> None:
    """Add the gradients of weights and bias, and write that of the input unless mode is NONE."""
    # The forward was y[co] = b[co] + sum over ci of x[ci] correlated with w[co, ci], so
    # dw[co, ci] = sum of dy[co] * shifted x[ci], db[co] = sum of dy[co], and
    # dx[ci] = sum over co of dy[co] correlated with w[co, ci] rotated by 180 degrees.
    # x, dx = a[src], d[src]: (cin, side + 2, side + 2, batch)
    # dy = d[dst]: (cout, side + 2, side + 2, batch)
    # w, dw = p[weight], g[weight]: (cout, cin / groups, width, width), outputs `stride` apart
    # db = g[bias]: (cout,)
    side, width, groups = op.side, op.kernel_size, op.groups
    row, taps = (side + 2) * batch, width * width
    inputs, outputs = op.in_channels // groups, op.out_channels // groups
    if op.bias >= 0:
        # Output channels and rows.
        for co in range(op.out_channels):
            for y in range(side):
                at = first_row(op.dst, co, side, batch) + y * row
                g[op.bias + co] += total_of(d, at, side * batch)
    weight_gradients(
        g, op.weight, op.stride, a, op.src, d, op.dst, inputs, outputs, groups, side, batch, width
    )
    if op.mode == GradientMode.NONE:
        return
    accumulate = op.mode == GradientMode.ACCUMULATE
    correlate(
        d, op.dst, d, op.src, p, op.weight, -1, outputs, inputs, outputs * op.stride, op.stride,
        taps, side, batch, width, True, accumulate, groups,
    )  # fmt: skip


@called_kernel
def weight_gradients(
    g: Float32Array, weight: int, stride: int, a: Float32Array, src: int, d: Float32Array,
    dst: int, inputs: int, outputs: int, groups: int, side: int, batch: int, width: int,
) -> None:  # fmt: skip
    """Add the gradients of all kernels of a convolution.

    Args:
        g: Gradient of the parameters.
        weight: Offset of the first kernel in `g`.
        stride: Distance between the kernels of two outputs.
        a: Array of the input.
        src: Region of the input in `a`.
        d: Array of the gradient.
        dst: Region of the gradient of the output in `d`.
        inputs: Input channels of a group.
        outputs: Output channels of a group.
        groups: Groups.
        side: Height and width.
        batch: Images.
        width: Width of a kernel, 1 or 3.
    """
    row, taps = (side + 2) * batch, width * width
    plane = (side + 2) * row
    # Groups, and bands of rows that fit into the cache.
    for group in range(groups):
        for top in range(0, side, max(1, BAND // side)):
            stop = min(side, top + max(1, BAND // side))
            o = 0
            # Output channels, two at a time.
            while o < outputs:
                is_pair = o + 1 < outputs
                dy = first_row(dst, group * outputs + o, side, batch)
                w = weight + (group * outputs + o) * stride
                for c in range(inputs):
                    x = first_row(src, group * inputs + c, side, batch)
                    if width == 1:
                        _point_gradient(g, w, a, x, d, dy, top, stop, side, batch)
                        if is_pair:
                            v = w + stride
                            _point_gradient(g, v, a, x, d, dy + plane, top, stop, side, batch)
                    elif is_pair and LANES == 16:
                        _kernel_gradient(g, w, stride, a, x, d, dy, top, stop, side, batch, True)
                    elif is_pair:
                        # Registers hold the sums of one row of the kernel.
                        for r in range(width):
                            _row_gradient(
                                g, w + 3 * r, stride, a, x + (r - 1) * row, d, dy, top, stop, side,
                                batch,
                            )  # fmt: skip
                    else:
                        _kernel_gradient(g, w, 0, a, x, d, dy, top, stop, side, batch, False)
                    w += taps
                o += 1 + is_pair


@kernel
def _point_gradient(
    g: Float32Array, w: int, a: Float32Array, at: int, d: Float32Array, first: int, top: int,
    stop: int, side: int, batch: int,
) -> None:  # fmt: skip
    """Add the gradient of a 1x1 kernel from some rows: the inner product of dy with the input."""
    row, n = (side + 2) * batch, side * batch
    total = other = splat(np.float32(0))
    for r in range(top, stop):
        for i in range(0, n, 2 * LANES):
            v, x, count = first + r * row + i, at + r * row + i, n - i
            total = add_product(total, load_first(d, v, count), load_first(a, x, count))
            v, x, count = v + LANES, x + LANES, count - LANES
            other = add_product(other, load_first(d, v, count), load_first(a, x, count))
    g[w] += sum_of(add(total, other))


@kernel
def _kernel_gradient(
    g: Float32Array, w: int, pair: int, a: Float32Array, at: int, d: Float32Array, first: int,
    top: int, stop: int, side: int, batch: int, is_pair: bool,
) -> None:  # fmt: skip
    """Add the gradient of a 3x3 kernel from some rows: inner products of dy with shifted inputs.

    If `is_pair`, also add that of the next output channel's kernel.
    """
    # g[w], g[w + pair]: (9,); dy = d[first] and x = a[at]: (side + 2, side + 2, batch)
    row = (side + 2) * batch
    plane = (side + 2) * row
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = s8 = splat(np.float32(0))
    t0 = t1 = t2 = t3 = t4 = t5 = t6 = t7 = t8 = splat(np.float32(0))
    # Rows, columns and images: nine sums in registers, or twice as many.
    for r in range(top, stop):
        q = 0
        while q < side:
            for i in range(0, batch, LANES):
                offset, n = r * row + q * batch + i, batch - i
                v, x = first + offset, at + offset - batch
                u = v + plane
                if q + COLUMNS <= side:
                    s0, s1, s2 = _add_taps(s0, s1, s2, a, x - row, d, v, batch, n, True)
                    s3, s4, s5 = _add_taps(s3, s4, s5, a, x, d, v, batch, n, True)
                    s6, s7, s8 = _add_taps(s6, s7, s8, a, x + row, d, v, batch, n, True)
                    if is_pair:
                        t0, t1, t2 = _add_taps(t0, t1, t2, a, x - row, d, u, batch, n, True)
                        t3, t4, t5 = _add_taps(t3, t4, t5, a, x, d, u, batch, n, True)
                        t6, t7, t8 = _add_taps(t6, t7, t8, a, x + row, d, u, batch, n, True)
                else:
                    s0, s1, s2 = _add_taps(s0, s1, s2, a, x - row, d, v, batch, n, False)
                    s3, s4, s5 = _add_taps(s3, s4, s5, a, x, d, v, batch, n, False)
                    s6, s7, s8 = _add_taps(s6, s7, s8, a, x + row, d, v, batch, n, False)
                    if is_pair:
                        t0, t1, t2 = _add_taps(t0, t1, t2, a, x - row, d, u, batch, n, False)
                        t3, t4, t5 = _add_taps(t3, t4, t5, a, x, d, u, batch, n, False)
                        t6, t7, t8 = _add_taps(t6, t7, t8, a, x + row, d, u, batch, n, False)
            q += COLUMNS if q + COLUMNS <= side else 1
    _add_nine(g, w, s0, s1, s2, s3, s4, s5, s6, s7, s8)
    if is_pair:
        _add_nine(g, w + pair, t0, t1, t2, t3, t4, t5, t6, t7, t8)


@kernel
def _row_gradient(
    g: Float32Array, w: int, pair: int, a: Float32Array, at: int, d: Float32Array, first: int,
    top: int, stop: int, side: int, batch: int,
) -> None:  # fmt: skip
    """Add the gradients of one row of the 3x3 kernels of two outputs; see `_kernel_gradient`."""
    row = (side + 2) * batch
    plane = (side + 2) * row
    s0 = s1 = s2 = t0 = t1 = t2 = splat(np.float32(0))
    for r in range(top, stop):
        q = 0
        while q < side:
            for i in range(0, batch, LANES):
                offset, n = r * row + q * batch + i, batch - i
                v, x = first + offset, at + offset - batch
                u = v + plane
                if q + COLUMNS <= side and n >= LANES:
                    # A constant count needs neither masks nor branches.
                    s0, s1, s2 = _add_taps(s0, s1, s2, a, x, d, v, batch, LANES, True)
                    t0, t1, t2 = _add_taps(t0, t1, t2, a, x, d, u, batch, LANES, True)
                elif q + COLUMNS <= side:
                    s0, s1, s2 = _add_taps(s0, s1, s2, a, x, d, v, batch, n, True)
                    t0, t1, t2 = _add_taps(t0, t1, t2, a, x, d, u, batch, n, True)
                else:
                    s0, s1, s2 = _add_taps(s0, s1, s2, a, x, d, v, batch, n, False)
                    t0, t1, t2 = _add_taps(t0, t1, t2, a, x, d, u, batch, n, False)
            q += COLUMNS if q + COLUMNS <= side else 1
    _add_three(g, w, s0, s1, s2)
    _add_three(g, w + pair, t0, t1, t2)


@kernel
def _add_three(g: Float32Array, w: int, s0: Lanes, s1: Lanes, s2: Lanes) -> None:
    """Add the sums of the lanes of three vectors."""
    g[w] += sum_of(s0)
    g[w + 1] += sum_of(s1)
    g[w + 2] += sum_of(s2)


@kernel
def _add_nine(
    g: Float32Array, w: int, s0: Lanes, s1: Lanes, s2: Lanes, s3: Lanes, s4: Lanes, s5: Lanes,
    s6: Lanes, s7: Lanes, s8: Lanes,
) -> None:  # fmt: skip
    """Add the sums of the lanes of nine vectors."""
    _add_three(g, w, s0, s1, s2)
    _add_three(g, w + 3, s3, s4, s5)
    _add_three(g, w + 6, s6, s7, s8)


@kernel
def _add_taps(
    s0: Lanes, s1: Lanes, s2: Lanes, a: Float32Array, x: int, d: Float32Array, v: int, batch: int,
    count: int, is_wide: bool,
) -> tuple[Lanes, Lanes, Lanes]:  # fmt: skip
    """Return the sums of the taps in a row of a kernel after four columns of dy, or one."""
    x0, x1 = load_first(a, x, count), load_first(a, x + batch, count)
    x2, v0 = load_first(a, x + 2 * batch, count), load_first(d, v, count)
    s0, s1, s2 = add_product(s0, v0, x0), add_product(s1, v0, x1), add_product(s2, v0, x2)
    if is_wide:
        x3, v1 = load_first(a, x + 3 * batch, count), load_first(d, v + batch, count)
        x4, v2 = load_first(a, x + 4 * batch, count), load_first(d, v + 2 * batch, count)
        x5, v3 = load_first(a, x + 5 * batch, count), load_first(d, v + 3 * batch, count)
        s0, s1, s2 = add_product(s0, v1, x1), add_product(s1, v1, x2), add_product(s2, v1, x3)
        s0, s1, s2 = add_product(s0, v2, x2), add_product(s1, v2, x3), add_product(s2, v2, x4)
        s0, s1, s2 = add_product(s0, v3, x3), add_product(s1, v3, x4), add_product(s2, v3, x5)
    return s0, s1, s2


# ---------------------------------------------------------------------------------- batch norm


@called_kernel
def norm_measure(
    op: np.record, a: Float32Array, part: Float32Array, before: int, batch: int
) -> None:
    """Add a chunk to the statistics of a batch.

    Source of the sum of squares of two parts: Chan, Golub and LeVeque (1983), equation 2.1.
    """
    # x = part[src]: (channels, side + 2, side + 2, batch)
    # a[aux]: (channels, 2), output: mean and sum of squared deviations, of `before` images before
    side = op.side
    n, row, count = side * batch, (side + 2) * batch, np.float32(side * side * batch)
    known = np.float32(side * side * before)
    # Channels, each with statistics of its own.
    for c in range(op.in_channels):
        x, to = first_row(op.src, c, side, batch), op.aux + 2 * c
        # Rows: the mean. Four sums, because each addition waits for the one before.
        s0 = s1 = s2 = s3 = splat(np.float32(0))
        for r in range(side):
            for i in range(0, n, 4 * LANES):
                at, left = x + r * row + i, n - i
                s0 = add(s0, load_first(part, at, left))
                s1 = add(s1, load_first(part, at + LANES, left - LANES))
                s2 = add(s2, load_first(part, at + 2 * LANES, left - 2 * LANES))
                s3 = add(s3, load_first(part, at + 3 * LANES, left - 3 * LANES))
        mean = sum_of(add(add(s0, s1), add(s2, s3))) / count
        center = splat(mean)
        s0 = s1 = s2 = s3 = splat(np.float32(0))
        # Rows again: a variance from squared deviations does not cancel.
        for r in range(side):
            for i in range(0, n, 4 * LANES):
                at, left = x + r * row + i, n - i
                s0 = _add_square(s0, part, at, center, left)
                s1 = _add_square(s1, part, at + LANES, center, left - LANES)
                s2 = _add_square(s2, part, at + 2 * LANES, center, left - 2 * LANES)
                s3 = _add_square(s3, part, at + 3 * LANES, center, left - 3 * LANES)
        square = sum_of(add(add(s0, s1), add(s2, s3)))
        if before:
            change = mean - a[to]
            share = count / (known + count)
            mean = a[to] + change * share
            square += a[to + 1] + change * change * known * share
        a[to], a[to + 1] = mean, square


@kernel
def _add_square(total: Lanes, x: Float32Array, at: int, mean: Lanes, count: int) -> Lanes:
    """Return the sum of squared deviations with one vector more."""
    deviation = subtract(load_first(x, at, count), first_of(mean, count))
    return add_product(total, deviation, deviation)


@called_kernel
def norm_finish(
    op: np.record, a: Float32Array, arena: int, chunks: int, buffers: Float32Array, batch: int
) -> None:
    """Turn the statistics of a batch into what every chunk needs; update the running ones."""
    # running mean and variance = buffers[running_mean], buffers[running_var]: (channels,)
    # a[aux] of every arena: (channels, 2), output: mean and 1 / std
    count = np.float32(op.side * op.side * batch)
    for c in range(op.in_channels):
        mean, square = a[op.aux + 2 * c], a[op.aux + 2 * c + 1]
        at, to = op.running_mean + c, op.running_var + c
        buffers[at] = KEEP * buffers[at] + (1 - KEEP) * mean
        buffers[to] = KEEP * buffers[to] + (1 - KEEP) * (square / (count - 1))
        inverse = np.float32(1) / np.sqrt(square / count + EPSILON)
        for j in range(chunks):
            a[j * arena + op.aux + 2 * c], a[j * arena + op.aux + 2 * c + 1] = mean, inverse


@kernel
def _line(
    op: np.record, c: int, a: Float32Array, p: Float32Array, buffers: Float32Array,
    is_training: bool,
) -> tuple[Lanes, Lanes]:  # fmt: skip
    """Return factor and constant of a channel's norm: scale * (x - mean) / std + shift."""
    mean, inverse = a[op.aux + 2 * c], a[op.aux + 2 * c + 1]
    if not is_training:
        mean = buffers[op.running_mean + c]
        inverse = np.float32(1) / np.sqrt(buffers[op.running_var + c] + EPSILON)
    factor: Lanes = multiply(splat(p[op.weight + c]), splat(inverse))
    return factor, add_product(splat(p[op.bias + c]), splat(-mean), factor)


@called_kernel
def norm_forward(
    op: np.record, a: Float32Array, p: Float32Array, buffers: Float32Array, batch: int,
    is_training: bool,
) -> None:  # fmt: skip
    """Batch norm, and ReLU if `rectify`; by running statistics unless in training."""
    # x = a[src], y = a[dst]: (channels, side + 2, side + 2, batch)
    # scale = p[weight], shift = p[bias]: (channels,)
    # running mean and variance = buffers[running_mean], buffers[running_var]: (channels,)
    # a[aux]: (channels, 2): mean and 1 / std of the batch
    side, rectify = op.side, op.rectify
    n, row, zero = side * batch, (side + 2) * batch, splat(np.float32(0))
    # Channels.
    for c in range(op.in_channels):
        x, y = first_row(op.src, c, side, batch), first_row(op.dst, c, side, batch)
        f, b = _line(op, c, a, p, buffers, is_training)
        # Rows: y = scale * (x - mean) / std + shift as one multiply-add.
        for r in range(side):
            for i in range(0, n, LANES):
                value = add_product(b, load(a, x + r * row + i), f)
                if rectify:
                    value = at_least(value, zero)
                store_first(a, y + r * row + i, value, n - i)


@called_kernel
def norm_backward_measure(
    op: np.record, a: Float32Array, sums: Float32Array, d: Float32Array, before: int, batch: int
) -> None:
    """Add a chunk to the sums over the gradients of a batch."""
    # x = a[src]; y, dy = a[dst], d[dst]: (channels, side + 2, side + 2, batch)
    # a[aux]: (channels, 2): mean and 1 / std
    # sums[aux]: (channels, 2), output: sum of dy, and of dy * (x - mean)
    side, row, zero = op.side, (op.side + 2) * batch, splat(np.float32(0))
    # Channels, then squares by row and column: sums in the order of `norm_pool_backward_measure`.
    for c in range(op.in_channels):
        x, y = first_row(op.src, c, side, batch), first_row(op.dst, c, side, batch)
        mean = splat(a[op.aux + 2 * c])
        s0 = s1 = s2 = s3 = t0 = t1 = t2 = t3 = zero
        even = side - side % 2
        for r in range(0, even, 2):
            for q in range(0, even, 2):
                for i in range(0, batch, LANES):
                    at, n = r * row + q * batch + i, batch - i
                    s0, t0 = _add_masked(op, a, d, x + at, y + at, mean, n, s0, t0)
                    at += batch
                    s1, t1 = _add_masked(op, a, d, x + at, y + at, mean, n, s1, t1)
                    at += row - batch
                    s2, t2 = _add_masked(op, a, d, x + at, y + at, mean, n, s2, t2)
                    at += batch
                    s3, t3 = _add_masked(op, a, d, x + at, y + at, mean, n, s3, t3)
        # Last column and row of an odd side.
        for k in range(2 * side - 1 if even < side else 0):
            r, q = (k, even) if k < side else (even, k - side)
            for i in range(0, batch, LANES):
                at = r * row + q * batch + i
                s0, t0 = _add_masked(op, a, d, x + at, y + at, mean, batch - i, s0, t0)
        _add_sums(sums, op.aux + 2 * c, s0, s1, s2, s3, t0, t1, t2, t3, before)


@kernel
def _add_masked(
    op: np.record, a: Float32Array, d: Float32Array, x: int, y: int, mean: Lanes, count: int,
    of_shift: Lanes, of_scale: Lanes,
) -> tuple[Lanes, Lanes]:  # fmt: skip
    """Mask dy in place where the ReLU cut off, and return both sums with it."""
    grad = load_first(d, y, count)
    if op.rectify:
        grad = where_positive(load_first(a, y, count), grad, splat(np.float32(0)))
        store_first(d, y, grad, count)
    sums: tuple[Lanes, Lanes] = _add_gradient(a, x, mean, count, grad, of_shift, of_scale)
    return sums


@kernel
def _add_gradient(
    a: Float32Array, x: int, mean: Lanes, count: int, grad: Lanes, of_shift: Lanes, of_scale: Lanes
) -> tuple[Lanes, Lanes]:
    """Return the sums of dy and of dy * (x - mean) with one pixel more."""
    difference = subtract(load_first(a, x, count), mean)
    return add(of_shift, grad), add_product(of_scale, grad, difference)


@kernel
def _add_sums(
    sums: Float32Array, at: int, s0: Lanes, s1: Lanes, s2: Lanes, s3: Lanes, t0: Lanes, t1: Lanes,
    t2: Lanes, t3: Lanes, before: int,
) -> None:  # fmt: skip
    """Add the sums of a chunk, or assign them if there are none before."""
    if before == 0:
        sums[at] = sums[at + 1] = np.float32(0)
    sums[at] += sum_of(add(add(s0, s1), add(s2, s3)))
    sums[at + 1] += sum_of(add(add(t0, t1), add(t2, t3)))


@called_kernel
def norm_backward_finish(
    op: np.record, a: Float32Array, d: Float32Array, arena: int, chunks: int, p: Float32Array,
    g: Float32Array, batch: int,
) -> None:  # fmt: skip
    """Write the gradients of scale and shift, and what every chunk needs for that of the input.

    Source: Ioffe and Szegedy (2015), section 3.
    """
    # The forward was y = scale * z + shift with z = (x - mean) * inverse, and ReLU if `rectify`, so
    # dshift = sum of dy, dscale = sum of dy * z, and
    # dx = scale * inverse * (dy - mean of dy - z * mean of dy * z)
    #    = factor * dy - slope * (x - mean) - constant.
    # scale, dscale = p[weight], g[weight]; dshift = g[bias]: (channels,)
    # d[aux] of every arena: (channels, 2), output: slope, and constant - slope * mean
    count = np.float32(op.side * op.side * batch)
    for c in range(op.in_channels):
        mean, inverse = a[op.aux + 2 * c], a[op.aux + 2 * c + 1]
        of_shift, of_scale = d[op.aux + 2 * c], d[op.aux + 2 * c + 1] * inverse
        g[op.bias + c] += of_shift
        g[op.weight + c] += of_scale
        factor = p[op.weight + c] * inverse
        slope = factor * (of_scale / count * inverse)
        constant = factor * (of_shift / count) - slope * mean
        for j in range(chunks):
            d[j * arena + op.aux + 2 * c], d[j * arena + op.aux + 2 * c + 1] = slope, constant


@called_kernel
def norm_backward(
    op: np.record, a: Float32Array, d: Float32Array, p: Float32Array, batch: int
) -> None:
    """Write the gradient of the input unless the mode is NONE."""
    # dx = factor * dy - slope * x - constant; see `norm_backward_finish`
    # x, dx = a[src], d[src]; dy = d[dst]: (channels, side + 2, side + 2, batch)
    side, mode = op.side, op.mode
    n, row = side * batch, (side + 2) * batch
    if mode == GradientMode.NONE:
        return
    # Channels, then rows.
    for c in range(op.in_channels):
        x, y = first_row(op.src, c, side, batch), first_row(op.dst, c, side, batch)
        f = splat(p[op.weight + c] * a[op.aux + 2 * c + 1])
        slope, constant = splat(-d[op.aux + 2 * c]), splat(-d[op.aux + 2 * c + 1])
        for r in range(side):
            for i in range(0, n, LANES):
                at = r * row + i
                value = add_product(constant, load(d, y + at), f)
                value = add_product(value, load(a, x + at), slope)
                if mode == GradientMode.ACCUMULATE:
                    value = add(value, load(d, x + at))
                store_first(d, x + at, value, n - i)


# ---------------------------------------------------------------------------------- ReLU, pooling


@called_kernel
def relu_forward(op: np.record, a: Float32Array, batch: int) -> None:
    """Write max(x, 0)."""
    # x = a[src], y = a[dst]: (channels, side + 2, side + 2, batch)
    src, dst, side = op.src, op.dst, op.side
    n, row = side * batch, (side + 2) * batch
    # Channels, rows, then pixels of the row and images; NaN is not < 0, so it stays NaN.
    for c in range(op.in_channels):
        x, y = first_row(src, c, side, batch), first_row(dst, c, side, batch)
        for r in range(side):
            for i in range(0, n, LANES):
                at = r * row + i
                value = at_least(load(a, x + at), splat(np.float32(0)))
                store_first(a, y + at, value, n - i)


@called_kernel
def relu_backward(op: np.record, a: Float32Array, d: Float32Array, batch: int) -> None:
    """Write the gradient of the input unless the mode is NONE."""
    # The forward was y = max(x, 0), so dx = dy where y > 0, else 0.
    # y = a[dst]; dx, dy = d[src], d[dst]: (channels, side + 2, side + 2, batch)
    src, dst, side, mode = op.src, op.dst, op.side, op.mode
    n, row = side * batch, (side + 2) * batch
    if mode == GradientMode.NONE:
        return
    # Channels, rows, then pixels of the row and images.
    for c in range(op.in_channels):
        x, y = first_row(src, c, side, batch), first_row(dst, c, side, batch)
        for r in range(side):
            for i in range(0, n, LANES):
                at, zero = r * row + i, splat(np.float32(0))
                through = where_positive(load(a, y + at), load(d, y + at), zero)
                if mode == GradientMode.ACCUMULATE:
                    through = add(through, load(d, x + at))
                store_first(d, x + at, through, n - i)


@called_kernel
def pool_forward(op: np.record, a: Float32Array, batch: int) -> None:
    """Max-pool every 2x2 square; an odd last row or column is dropped."""
    # x = a[src]: (channels, side + 2, side + 2, batch)
    # y = a[dst]: (channels, half + 2, half + 2, batch)
    src, dst, side = op.src, op.dst, op.side
    row, half = (side + 2) * batch, side // 2
    # Channels, then squares by row and column, then images.
    for c in range(op.in_channels):
        x, y = first_row(src, c, side, batch), first_row(dst, c, half, batch)
        for r in range(half):
            for q in range(half):
                at, to = x + 2 * r * row + 2 * q * batch, y + (r * (half + 2) + q) * batch
                for i in range(0, batch, LANES):
                    upper = at_least(load(a, at + i), load(a, at + batch + i))
                    lower = at_least(load(a, at + row + i), load(a, at + row + batch + i))
                    store_first(a, to + i, at_least(upper, lower), batch - i)


@called_kernel
def pool_backward(op: np.record, a: Float32Array, d: Float32Array, batch: int) -> None:
    """Assign the gradient of the input."""
    # The forward was y = max(x0, x1, x2, x3) for every 2x2 square, so dy goes to the first of the
    # four that equals y, and the others get 0.
    # x, dx = a[src], d[src]: (channels, side + 2, side + 2, batch)
    # y, dy = a[dst], d[dst]: (channels, half + 2, half + 2, batch)
    src, dst, side = op.src, op.dst, op.side
    n, row, half = side * batch, (side + 2) * batch, side // 2
    zero = splat(np.float32(0))
    # Channels.
    for c in range(op.in_channels):
        x, y = first_row(src, c, side, batch), first_row(dst, c, half, batch)
        if side % 2:
            # Rows: no square covers the last row and column.
            for r in range(side):
                fill(run(d, x + r * row, n), np.float32(0))
        # Squares by row and column, then images.
        for r in range(half):
            for q in range(half):
                at, to = x + 2 * r * row + 2 * q * batch, y + (r * (half + 2) + q) * batch
                for i in range(0, batch, LANES):
                    top, grad, count = load(a, to + i), load(d, to + i), batch - i
                    for k in range(3):
                        from_here = at + (k // 2) * row + k % 2 * batch + i
                        value = load(a, from_here)
                        store_first(d, from_here, where_equal(value, top, grad, zero), count)
                        grad = where_equal(value, top, zero, grad)
                    store_first(d, at + row + batch + i, grad, count)


# ---------------------------------------------------------------------------------- norm and pool


@called_kernel
def norm_pool_forward(
    op: np.record, a: Float32Array, p: Float32Array, buffers: Float32Array, batch: int,
    is_training: bool,
) -> None:  # fmt: skip
    """Batch norm, ReLU and 2x2 max-pool of an even side, without features between them."""
    # x = a[src]: (channels, side + 2, side + 2, batch)
    # y = a[dst]: (channels, half + 2, half + 2, batch); all else as in `norm_forward`
    side, half, zero = op.side, op.side // 2, splat(np.float32(0))
    row = (side + 2) * batch
    # Channels, then squares by row and column, then images.
    for c in range(op.in_channels):
        x, y = first_row(op.src, c, side, batch), first_row(op.dst, c, half, batch)
        f, b = _line(op, c, a, p, buffers, is_training)
        for r in range(half):
            for q in range(half):
                at, to = x + 2 * r * row + 2 * q * batch, y + (r * (half + 2) + q) * batch
                for i in range(0, batch, LANES):
                    y0, y1, y2, y3 = _square(a, at + i, row, batch, f, b)
                    top = at_least(at_least(y0, y1), at_least(y2, y3))
                    store_first(a, to + i, at_least(top, zero), batch - i)


@kernel
def _square(
    a: Float32Array, at: int, row: int, batch: int, f: Lanes, b: Lanes
) -> tuple[Lanes, Lanes, Lanes, Lanes]:
    """Return the norm of the four pixels of a square."""
    y0, y1 = add_product(b, load(a, at), f), add_product(b, load(a, at + batch), f)
    y2, y3 = add_product(b, load(a, at + row), f), add_product(b, load(a, at + row + batch), f)
    return y0, y1, y2, y3


@kernel
def _gradients_in_square(
    y0: Lanes, y1: Lanes, y2: Lanes, y3: Lanes, grad: Lanes
) -> tuple[Lanes, Lanes, Lanes, Lanes]:
    """Return the gradients of ReLU and max-pool.

    That of the largest number goes to the first one that is as large, unless it is 0 or less.
    """
    zero = splat(np.float32(0))
    top = at_least(at_least(y0, y1), at_least(y2, y3))
    grad = where_positive(top, grad, zero)
    d0, grad = where_equal(y0, top, grad, zero), where_equal(y0, top, zero, grad)
    d1, grad = where_equal(y1, top, grad, zero), where_equal(y1, top, zero, grad)
    d2, grad = where_equal(y2, top, grad, zero), where_equal(y2, top, zero, grad)
    return d0, d1, d2, grad


@called_kernel
def norm_pool_backward_measure(
    op: np.record, a: Float32Array, sums: Float32Array, d: Float32Array, p: Float32Array,
    before: int, batch: int,
) -> None:  # fmt: skip
    """Add a chunk to the sums over the gradients of a batch; see `norm_backward_measure`."""
    # x = a[src]: (channels, side + 2, side + 2, batch)
    # dy = d[dst]: (channels, half + 2, half + 2, batch)
    side, half, zero = op.side, op.side // 2, splat(np.float32(0))
    row = (side + 2) * batch
    # Channels, then squares by row and column, then images.
    for c in range(op.in_channels):
        x, y = first_row(op.src, c, side, batch), first_row(op.dst, c, half, batch)
        mean, (f, b) = splat(a[op.aux + 2 * c]), _line(op, c, a, p, a, True)
        s0 = s1 = s2 = s3 = t0 = t1 = t2 = t3 = zero
        for r in range(half):
            for q in range(half):
                at, to = x + 2 * r * row + 2 * q * batch, y + (r * (half + 2) + q) * batch
                for i in range(0, batch, LANES):
                    n, grad = batch - i, load_first(d, to + i, batch - i)
                    y0, y1, y2, y3 = _square(a, at + i, row, batch, f, b)
                    d0, d1, d2, d3 = _gradients_in_square(y0, y1, y2, y3, grad)
                    s0, t0 = _add_gradient(a, at + i, mean, n, d0, s0, t0)
                    s1, t1 = _add_gradient(a, at + batch + i, mean, n, d1, s1, t1)
                    s2, t2 = _add_gradient(a, at + row + i, mean, n, d2, s2, t2)
                    s3, t3 = _add_gradient(a, at + row + batch + i, mean, n, d3, s3, t3)
        _add_sums(sums, op.aux + 2 * c, s0, s1, s2, s3, t0, t1, t2, t3, before)


@called_kernel
def norm_pool_backward(
    op: np.record, a: Float32Array, d: Float32Array, p: Float32Array, batch: int
) -> None:
    """Write the gradient of the input; see `norm_backward_finish`."""
    # x, dx = a[src], d[src]: (channels, side + 2, side + 2, batch)
    # dy = d[dst]: (channels, half + 2, half + 2, batch)
    side, half = op.side, op.side // 2
    row = (side + 2) * batch
    # Channels, then squares by row and column, then images.
    for c in range(op.in_channels):
        x, y = first_row(op.src, c, side, batch), first_row(op.dst, c, half, batch)
        f, b = _line(op, c, a, p, a, True)
        slope, constant = splat(-d[op.aux + 2 * c]), splat(-d[op.aux + 2 * c + 1])
        for r in range(half):
            for q in range(half):
                at, to = x + 2 * r * row + 2 * q * batch, y + (r * (half + 2) + q) * batch
                for i in range(0, batch, LANES):
                    y0, y1, y2, y3 = _square(a, at + i, row, batch, f, b)
                    d0, d1, d2, d3 = _gradients_in_square(y0, y1, y2, y3, load(d, to + i))
                    _store_slope(a, d, at + i, d0, f, slope, constant, batch - i)
                    _store_slope(a, d, at + batch + i, d1, f, slope, constant, batch - i)
                    _store_slope(a, d, at + row + i, d2, f, slope, constant, batch - i)
                    _store_slope(a, d, at + row + batch + i, d3, f, slope, constant, batch - i)


@kernel
def _store_slope(
    a: Float32Array, d: Float32Array, at: int, grad: Lanes, f: Lanes, slope: Lanes,
    constant: Lanes, count: int,
) -> None:  # fmt: skip
    """Write the gradient of the input of a norm at one pixel."""
    value = add_product(add_product(constant, grad, f), load(a, at), slope)
    store_first(d, at, value, count)


# ---------------------------------------------------------------------------------- pooled features


@called_kernel
def average(a: Float32Array, src: int, dst: int, channels: int, side: int, batch: int) -> None:
    """Average over pixels."""
    # x = a[src]: (channels, side + 2, side + 2, batch); y = a[dst]: (channels, batch)
    row = (side + 2) * batch
    share = splat(np.float32(1) / np.float32(side * side))
    # Channels and images, then pixels by row and column.
    for c in range(channels):
        for i in range(0, batch, LANES):
            x, total = first_row(src, c, side, batch) + i, splat(np.float32(0))
            for r in range(side):
                for q in range(side):
                    total = add_product(total, load(a, x + r * row + q * batch), share)
            store_first(a, dst + c * batch + i, total, batch - i)


@called_kernel
def spread_average(
    d: Float32Array, src: int, dst: int, channels: int, side: int, batch: int, mode: GradientMode
) -> None:
    """Assign or accumulate the gradient of the input of `average`."""
    # The forward was y = sum of x / side^2, so dx = dy / side^2 at every pixel.
    # dx = d[src]: (channels, side + 2, side + 2, batch); dy = d[dst]: (channels, batch)
    row = (side + 2) * batch
    share = splat(np.float32(1) / np.float32(side * side))
    # Channels and images, then pixels by row and column.
    for c in range(channels):
        for i in range(0, batch, LANES):
            x = first_row(src, c, side, batch) + i
            grad = multiply(load(d, dst + c * batch + i), share)
            for r in range(side):
                for q in range(side):
                    at, value = x + r * row + q * batch, grad
                    if mode != GradientMode.ASSIGN:
                        value = add(grad, load(d, at))
                    store_first(d, at, value, batch - i)


@called_kernel
def affine_forward(
    a: Float32Array, p: Float32Array, src: int, dst: int, cin: int, cout: int, batch: int,
    weight: int, stride: int, bias: int,
) -> None:  # fmt: skip
    """Linear layer on pooled features."""
    # x = a[src]: (cin, batch); y = a[dst]: (cout, batch)
    # w = p[weight]: (cout, cin), outputs `stride` apart; b = p[bias]: (cout,)
    # Images and outputs, then inputs.
    for i in range(0, batch, LANES):
        for j in range(cout):
            total, w = splat(p[bias + j]), weight + j * stride
            for c in range(cin):
                total = add_product(total, load(a, src + c * batch + i), splat(p[w + c]))
            store_first(a, dst + j * batch + i, total, batch - i)


@called_kernel
def affine_backward(
    a: Float32Array, d: Float32Array, p: Float32Array, g: Float32Array, src: int, dst: int,
    cin: int, cout: int, batch: int, weight: int, stride: int, bias: int,
) -> None:  # fmt: skip
    """Add the gradients of weights and bias, and assign that of the input."""
    # The forward was y[j] = b[j] + sum over c of w[j, c] * x[c], so
    # dw[j, c] = sum over images of dy[j] * x[c], db[j] = sum over images of dy[j], and
    # dx[c] = sum over j of w[j, c] * dy[j].
    # x, dx = a[src], d[src]: (cin, batch); dy = d[dst]: (cout, batch)
    # w, dw = p[weight], g[weight]: (cout, cin), outputs `stride` apart; db = g[bias]: (cout,)
    # Outputs and inputs, then images: sums over all images.
    for j in range(cout):
        total = splat(np.float32(0))
        for i in range(0, batch, LANES):
            total = add(total, load_first(d, dst + j * batch + i, batch - i))
        g[bias + j] += sum_of(total)
        for c in range(cin):
            total = splat(np.float32(0))
            for i in range(0, batch, LANES):
                grad = load_first(d, dst + j * batch + i, batch - i)
                x = load_first(a, src + c * batch + i, batch - i)
                total = add_product(total, grad, x)
            g[weight + j * stride + c] += sum_of(total)
    # Images and inputs, then outputs.
    for i in range(0, batch, LANES):
        for c in range(cin):
            total = splat(np.float32(0))
            for j in range(cout):
                w = splat(p[weight + j * stride + c])
                total = add_product(total, load(d, dst + j * batch + i), w)
            store_first(d, src + c * batch + i, total, batch - i)


# ---------------------------------------------------------------------------------- functions


@kernel
def exp_of(x: Lanes) -> Lanes:
    """Return exp(x) for x <= 0, or exp(-87) if x is smaller than -87.

    exp(x) = 2^n exp(r) with n = round(x / ln 2), and a polynomial for exp(r). Within 2e-7 of the
    true value. Source: the coefficients of Cephes' `expf`.
    """
    v = at_least(x, splat(np.float32(-87)))
    n = floor(add_product(splat(np.float32(0.5)), v, splat(np.float32(1.44269504088896341))))
    r = add_product(v, n, splat(np.float32(-0.693359375)))
    r = add_product(r, n, splat(np.float32(2.12194440e-4)))
    s = splat(np.float32(1.9875691500e-4))
    s = add_product(splat(np.float32(1.3981999507e-3)), s, r)
    s = add_product(splat(np.float32(8.3334519073e-3)), s, r)
    s = add_product(splat(np.float32(4.1665795894e-2)), s, r)
    s = add_product(splat(np.float32(1.6666665459e-1)), s, r)
    s = add_product(splat(np.float32(5.0000001201e-1)), s, r)
    s = add_product(splat(np.float32(1)), add_product(splat(np.float32(1)), s, r), r)
    return multiply(s, power_of_two(n))


@kernel
def sigmoid_of(x: Lanes) -> Lanes:
    """Return 1 / (1 + exp(-x)), by the exponential of -|x|, which does not overflow."""
    zero, one = splat(np.float32(0)), splat(np.float32(1))
    size = at_least(x, subtract(zero, x))
    small = exp_of(subtract(zero, size))
    share = divide(one, add(one, small))
    return where_positive(x, share, multiply(small, share))


@kernel
def tanh_of(x: Lanes) -> Lanes:
    """Return tanh(x), as a rational function.

    Within 5e-7 of the true value. Source: the coefficients of Eigen's `ptanh_float`.
    """
    limit = np.float32(7.90531110763549805)
    v = at_least(at_most(x, splat(limit)), splat(-limit))
    s = multiply(v, v)
    top = splat(np.float32(-2.76076847742355e-16))
    top = add_product(splat(np.float32(2.00018790482477e-13)), top, s)
    top = add_product(splat(np.float32(-8.60467152213735e-11)), top, s)
    top = add_product(splat(np.float32(5.12229709037114e-08)), top, s)
    top = add_product(splat(np.float32(1.48572235717979e-05)), top, s)
    top = add_product(splat(np.float32(6.37261928875436e-04)), top, s)
    top = add_product(splat(np.float32(4.89352455891786e-03)), top, s)
    low = splat(np.float32(1.19825839466702e-06))
    low = add_product(splat(np.float32(1.18534705686654e-04)), low, s)
    low = add_product(splat(np.float32(2.26843463243900e-03)), low, s)
    low = add_product(splat(np.float32(4.89352518554385e-03)), low, s)
    return divide(multiply(v, top), low)


# ---------------------------------------------------------------------------------- squeeze-excite


@kernel
def _excite_regions(op: np.record, batch: int) -> tuple[int, int, int, int]:
    """Return the offsets of z1, h, z2 and e, which follow the pooled features."""
    z1 = op.aux + op.in_channels * batch
    h = z1 + op.hidden * batch
    z2 = h + op.hidden * batch
    return z1, h, z2, z2 + op.in_channels * batch


@called_kernel
def excite_forward(op: np.record, a: Float32Array, p: Float32Array, batch: int) -> None:
    """Multiply each channel by a function of all pooled channels."""
    # x = a[src], y = a[dst]: (channels, side + 2, side + 2, batch)
    # pooled = a[aux]: (channels, batch); z1, h = silu(z1): (hidden, batch)
    # z2, e = tanh(z2): (channels, batch)
    # first layer = p[weight], p[bias]; second layer = p[weight_2], p[bias_2]
    channels, hidden, side = op.in_channels, op.hidden, op.side
    z1, h, z2, e = _excite_regions(op, batch)
    average(a, op.src, op.aux, channels, side, batch)
    affine_forward(a, p, op.aux, z1, channels, hidden, batch, op.weight, op.stride, op.bias)
    # Hidden units and images: silu.
    for i in range(0, hidden * batch, LANES):
        x = load(a, z1 + i)
        store_first(a, h + i, multiply(x, sigmoid_of(x)), hidden * batch - i)
    affine_forward(a, p, h, z2, hidden, channels, batch, op.weight_2, op.stride_2, op.bias_2)
    # Channels and images: tanh.
    for i in range(0, channels * batch, LANES):
        store_first(a, e + i, tanh_of(load(a, z2 + i)), channels * batch - i)
    row = (side + 2) * batch
    # Channels and images, then pixels by row and column: y = x * e.
    for c in range(channels):
        x, y = first_row(op.src, c, side, batch), first_row(op.dst, c, side, batch)
        for i in range(0, batch, LANES):
            factor = load(a, e + c * batch + i)
            for r in range(side):
                for q in range(side):
                    at = r * row + q * batch + i
                    store_first(a, y + at, multiply(load(a, x + at), factor), batch - i)


@called_kernel
def excite_backward(
    op: np.record, a: Float32Array, d: Float32Array, p: Float32Array, g: Float32Array, batch: int
) -> None:
    """Write the gradients of both layers, and of the input unless the mode is NONE."""
    # The forward was y = x * e with e = tanh(W2 silu(W1 pooled(x) + b1) + b2), so
    # de = sum over pixels of dy * x, dx = dy * e + the gradient that comes back through e.
    # x, dx = a[src], d[src]; dy = d[dst]: (channels, side + 2, side + 2, batch)
    # pooled = a[aux]: (channels, batch); z1, h: (hidden, batch); z2, e: (channels, batch)
    channels, hidden, side, mode = op.in_channels, op.hidden, op.side, op.mode
    z1, h, z2, e = _excite_regions(op, batch)
    row = (side + 2) * batch
    # Channels and images: dz2, and the part of dx that does not pass through e.
    for c in range(channels):
        x, y = first_row(op.src, c, side, batch), first_row(op.dst, c, side, batch)
        for i in range(0, batch, LANES):
            factor, of_factor = load(a, e + c * batch + i), splat(np.float32(0))
            # Pixels by row and column.
            for r in range(side):
                for q in range(side):
                    at = r * row + q * batch + i
                    grad = load(d, y + at)
                    of_factor = add_product(of_factor, grad, load(a, x + at))
                    if mode != GradientMode.NONE:
                        through = multiply(grad, factor)
                        if mode == GradientMode.ACCUMULATE:
                            through = add(through, load(d, x + at))
                        store_first(d, x + at, through, batch - i)
            # tanh' = 1 - tanh^2.
            slope = subtract(splat(np.float32(1)), multiply(factor, factor))
            store_first(d, z2 + c * batch + i, multiply(of_factor, slope), batch - i)
    affine_backward(a, d, p, g, h, z2, hidden, channels, batch, op.weight_2, op.stride_2, op.bias_2)
    # Hidden units and images: silu'(z) = s * (1 + z * (1 - s)) with s = sigmoid(z).
    for i in range(0, hidden * batch, LANES):
        z, one = load(a, z1 + i), splat(np.float32(1))
        s = sigmoid_of(z)
        slope = multiply(s, add_product(one, z, subtract(one, s)))
        store_first(d, z1 + i, multiply(load(d, h + i), slope), hidden * batch - i)
    affine_backward(a, d, p, g, op.aux, z1, channels, hidden, batch, op.weight, op.stride, op.bias)
    if mode != GradientMode.NONE:
        spread_average(d, op.src, op.aux, channels, side, batch, GradientMode.ACCUMULATE)


# ---------------------------------------------------------------------------------- blending


@called_kernel
def tanh_forward(op: np.record, a: Float32Array, batch: int) -> None:
    """Replace the output of a branch by its tanh; `mix_backward` includes the gradient."""
    # r = a[src]: (channels, side + 2, side + 2, batch), input and output
    side = op.side
    # Channels and rows.
    for c in range(op.in_channels):
        for y in range(side):
            x = run(a, first_row(op.src, c, side, batch) + y * (side + 2) * batch, side * batch)
            for i in range(0, len(x), LANES):
                store_first(x, i, tanh_of(load(x, i)), len(x) - i)


@called_kernel
def gate_forward(op: np.record, a: Float32Array, p: Float32Array, batch: int) -> None:
    """Compute a seed's gate; `mix_backward` includes the gradient."""
    # x = a[src]: (channels, side + 2, side + 2, batch)
    # pooled = a[aux]: (channels, batch), output; gate, behind it: (batch,), output
    # w = p[weight]: (channels,); b = p[bias]: (1,)
    channels = op.in_channels
    average(a, op.src, op.aux, channels, op.side, batch)
    gate = op.aux + channels * batch
    affine_forward(a, p, op.aux, gate, channels, 1, batch, op.weight, channels, op.bias)
    # Images.
    for i in range(0, batch, LANES):
        store_first(a, gate + i, sigmoid_of(load(a, gate + i)), batch - i)


@called_kernel
def mix_forward(op: np.record, a: Float32Array, alpha: np.float32, batch: int) -> None:
    """Blend the output of a branch into the features, with weight alpha."""
    # h = a[src], r = a[branch], y = a[dst]: (channels, side + 2, side + 2, batch)
    # gate, behind the pooled features a[aux]: (batch,); for MULTIPLY, r is a tanh already
    side, blend = op.side, op.blend
    row = (side + 2) * batch
    gate = op.aux + op.in_channels * batch
    weight = splat(alpha)
    # Channels, rows, columns and images.
    for c in range(op.in_channels):
        x, v = first_row(op.src, c, side, batch), first_row(op.branch, c, side, batch)
        y = first_row(op.dst, c, side, batch)
        for r in range(side):
            for q in range(side):
                for i in range(0, batch, LANES):
                    at = r * row + q * batch + i
                    h, residual = load(a, x + at), load(a, v + at)
                    value = h
                    # Exactly h for alpha 0, even if the branch is not finite.
                    if alpha != 0:
                        if blend == Blend.MULTIPLY:
                            residual = multiply(residual, h)
                        elif blend == Blend.GATE:
                            residual = multiply(residual, load(a, gate + i))
                        value = add_product(h, weight, residual)
                    store_first(a, y + at, value, batch - i)


@called_kernel
def mix_backward(
    op: np.record, a: Float32Array, d: Float32Array, p: Float32Array, g: Float32Array,
    alpha: np.float32, beta: np.float32, batch: int,
) -> None:  # fmt: skip
    """Assign the gradients of features, branch and gate.

    Toward the seed the weight is beta instead of alpha, so a seed can learn while alpha is 0.
    """
    # The forward was y = h + alpha * r (ADD), h + alpha * h * tanh(r) (MULTIPLY) or
    # h + alpha * gate * r (GATE), so
    # dh = dy (MULTIPLY: + alpha * dy * tanh(r); GATE: + the gradient through the pooled features),
    # dr = beta * dy, beta * dy * h * (1 - tanh(r)^2) or beta * dy * gate, and
    # dgate = sum over features of beta * dy * r.
    # h, dh = a[src], d[src]; r, dr = a[branch], d[branch]: (channels, side + 2, side + 2, batch)
    # dy = d[dst]: (channels, side + 2, side + 2, batch)
    # gate, dgate, behind the pooled features a[aux], d[aux]: (batch,)
    channels, side, blend = op.in_channels, op.side, op.blend
    row, gate = (side + 2) * batch, op.aux + channels * batch
    forward, backward, zero, one = (
        splat(alpha),
        splat(beta),
        splat(np.float32(0)),
        splat(np.float32(1)),
    )
    # Images, then channels, rows and columns.
    for i in range(0, batch, LANES):
        of_gate, count = zero, batch - i
        factor = load(a, gate + i) if blend == Blend.GATE else one
        for c in range(channels):
            x, v = first_row(op.src, c, side, batch), first_row(op.branch, c, side, batch)
            y = first_row(op.dst, c, side, batch)
            for r in range(side):
                for q in range(side):
                    at = r * row + q * batch + i
                    grad = load(d, y + at)
                    toward = multiply(backward, grad)
                    if blend == Blend.MULTIPLY:
                        residual = load(a, v + at)
                        toward = multiply(toward, load(a, x + at))
                        toward = multiply(toward, subtract(one, multiply(residual, residual)))
                        if alpha != 0:
                            grad = add_product(grad, multiply(forward, grad), residual)
                    elif blend == Blend.GATE:
                        of_gate = add_product(of_gate, toward, load(a, v + at))
                        toward = multiply(toward, factor)
                    store_first(d, x + at, grad, count)
                    store_first(d, v + at, toward, count)
        if blend == Blend.GATE:
            # sigmoid' = sigmoid * (1 - sigmoid).
            slope = multiply(factor, subtract(one, factor))
            store_first(d, gate + i, multiply(of_gate, slope), count)
    if blend == Blend.GATE:
        affine_backward(a, d, p, g, op.aux, gate, channels, 1, batch, op.weight, channels, op.bias)
        if not op.is_isolated:
            spread_average(d, op.src, op.aux, channels, side, batch, GradientMode.ACCUMULATE)


# ---------------------------------------------------------------------------------- classifier


@called_kernel
def classify(
    op: np.record, a: Float32Array, p: Float32Array, batch: int, labels: IntArray
) -> tuple[float, int]:
    """Return the summed cross-entropy and the number of hits; negative labels do not count."""
    # x = a[src]: (channels, side + 2, side + 2, batch); labels: (batch,)
    # pooled = a[aux]: (channels, batch); softmax, behind it: (classes, batch), output
    # w = p[weight]: (classes, channels), outputs `stride` apart; b = p[bias]: (classes,)
    channels, classes, aux = op.in_channels, op.out_channels, op.aux
    average(a, op.src, aux, channels, op.side, batch)
    logits = aux + channels * batch
    affine_forward(a, p, aux, logits, channels, classes, batch, op.weight, op.stride, op.bias)
    # First class with the largest logit, and sum of exponentials, behind the softmax.
    best, total = logits + classes * batch, logits + (classes + 1) * batch
    loss, hits = 0.0, 0
    # Images, a vector at a time.
    for i in range(0, batch, LANES):
        count, x = batch - i, logits + i
        top, first, sums = load(a, x), splat(np.float32(0)), splat(np.float32(0))
        # Classes: the first one with the largest logit.
        for j in range(1, classes):
            value = load(a, x + j * batch)
            first = where_larger(value, top, splat(np.float32(j)), first)
            top = at_least(top, value)
        store_first(a, best + i, first, count)
        # Classes: exponentials less the largest logit, so none overflows.
        for j in range(classes):
            value = subtract(load(a, x + j * batch), top)
            store_first(a, x + j * batch, value, count)
        for n in range(i, min(i + LANES, batch)):
            if labels[n] >= 0:
                loss -= a[logits + labels[n] * batch + n]
                hits += a[best + n] == labels[n]
        for j in range(classes):
            value = exp_of(load(a, x + j * batch))
            store_first(a, x + j * batch, value, count)
            sums = add(sums, value)
        store_first(a, total + i, sums, count)
        # The logarithm of the product of all sums, as one of each takes long.
        product = 1.0
        for n in range(i, min(i + LANES, batch)):
            if labels[n] >= 0:
                product *= a[total + n]
        loss += math.log(product)
        # Classes: divided by their sum.
        share = divide(splat(np.float32(1)), sums)
        for j in range(classes):
            store_first(a, x + j * batch, multiply(load(a, x + j * batch), share), count)
    return loss, hits


@called_kernel
def classify_backward(
    op: np.record, a: Float32Array, d: Float32Array, p: Float32Array, g: Float32Array, batch: int,
    labels: IntArray, images: int,
) -> None:  # fmt: skip
    """Add the gradients of weights and bias, and assign that of the input, after `classify`.

    They are those of the mean loss of `images` images, of which `batch` are in this chunk.
    """
    # The forward was loss = -mean over images of log softmax(logits)[label] with
    # logits = w pooled(x) + b, so dlogits = (softmax - one_hot(label)) / images.
    # dx = d[src]: (channels, side + 2, side + 2, batch); labels: (batch,)
    # softmax = a[logits], dlogits = d[logits]: (classes, batch)
    channels, classes, aux = op.in_channels, op.out_channels, op.aux
    logits = aux + channels * batch
    share = np.float32(1) / np.float32(images)
    # Classes and images.
    for k in range(classes):
        for i in range(batch):
            hit = np.float32(labels[i] == k)
            d[logits + k * batch + i] = (a[logits + k * batch + i] - hit) * share
    affine_backward(
        a, d, p, g, aux, logits, channels, classes, batch, op.weight, op.stride, op.bias
    )
    spread_average(d, op.src, aux, channels, op.side, batch, GradientMode.ASSIGN)
