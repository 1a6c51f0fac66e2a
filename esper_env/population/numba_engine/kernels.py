"""Kernels of the compiled engine: forward and backward pass of each operation on flat arrays.

All features of a program lie in one array `a`, the arena, and their gradients at the same offsets
in `d`. `p` is a member's row of parameters, `g` its gradient. An operation is a record of
`OPERATION`. In comments, a[src] is the region of `a` that begins at offset `op.src`.

Features are (channels, side + 2, side + 2, batch): images innermost, and a border of zeros that no
kernel writes. So a row of a 3x3 convolution is nine multiply-adds of long contiguous runs, whatever
the number of channels: 40 to 80 GFLOP/s on one core, where a grouped convolution of such small
networks reaches 5 to 10.

The compiler may reorder sums, but it may not assume that numbers are finite: NaN must stay visible.
"""

from __future__ import annotations

import functools
import math
from enum import IntEnum

import numpy as np

from esper_env.config import Blend, Float32Array, IntArray
from esper_env.jit import entry_point, inlined

EPSILON = np.float32(1e-5)
"""Added to variances, as in torch.nn.BatchNorm2d."""
KEEP = np.float32(0.9)
"""Weight of the old running statistics in an update, as in torch.nn.BatchNorm2d."""
REORDERED = {"reassoc", "contract", "nsz", "arcp"}
"""Freedom of the compiler with floating-point numbers, in LLVM's words."""

kernel = functools.partial(inlined, fastmath=REORDERED)
network_entry_point = functools.partial(entry_point, fastmath=REORDERED)


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


@kernel
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
def add_scaled(out: Float32Array, x: Float32Array, w: np.float32) -> None:
    """Add w * x to `out`."""
    for i in range(len(out)):
        out[i] += w * x[i]


@kernel
def dot(x: Float32Array, y: Float32Array) -> np.float32:
    """Return the inner product."""
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * y[i]
    return total


@kernel
def total_of(x: Float32Array) -> np.float32:
    """Return the sum."""
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i]
    return total


# ---------------------------------------------------------------------------------- convolution


@kernel
def neighbors(a: Float32Array, at: int, row: int, batch: int, n: int) -> tuple[Float32Array, ...]:
    """Return the runs under the nine taps of a 3x3 kernel whose center is at `at`."""
    above, below = at - row, at + row
    return (
        run(a, above - batch, n), run(a, above, n), run(a, above + batch, n),
        run(a, at - batch, n), run(a, at, n), run(a, at + batch, n),
        run(a, below - batch, n), run(a, below, n), run(a, below + batch, n),
    )  # fmt: skip


@kernel
def nine_of(w: Float32Array, flip: bool) -> tuple[np.float32, ...]:
    """Return the taps of a 3x3 kernel, rotated by 180 degrees if `flip`."""
    if flip:
        return w[8], w[7], w[6], w[5], w[4], w[3], w[2], w[1], w[0]
    return w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8]


@kernel
def add_taps(
    out: Float32Array, a: Float32Array, at: int, row: int, batch: int, w: Float32Array, flip: bool
) -> None:
    """Add the 3x3 correlation of one row of features to `out`."""
    # out: (side * batch,); w: (9,); a[at]: the row, between its neighbors above and below
    n = len(out)
    x0, x1, x2, x3, x4, x5, x6, x7, x8 = neighbors(a, at, row, batch, n)
    w0, w1, w2, w3, w4, w5, w6, w7, w8 = nine_of(w, flip)
    # Pixels of the row and images: one pass for all nine taps, so `out` is read and written once.
    for i in range(n):
        out[i] += (
            w0 * x0[i] + w1 * x1[i] + w2 * x2[i] + w3 * x3[i] + w4 * x4[i]
            + w5 * x5[i] + w6 * x6[i] + w7 * x7[i] + w8 * x8[i]
        )  # fmt: skip


@kernel
def add_taps_to_two(
    out: Float32Array, other: Float32Array, a: Float32Array, at: int, row: int, batch: int,
    w: Float32Array, v: Float32Array, flip: bool,
) -> None:  # fmt: skip
    """Add the 3x3 correlations of one row of features with two kernels to two outputs.

    The row is loaded once for both, about half as many loads per multiplication.
    """
    # out, other: (side * batch,); w, v: (9,), kernels of `out` and `other`
    n = len(out)
    x0, x1, x2, x3, x4, x5, x6, x7, x8 = neighbors(a, at, row, batch, n)
    w0, w1, w2, w3, w4, w5, w6, w7, w8 = nine_of(w, flip)
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = nine_of(v, flip)
    # Pixels of the row and images.
    for i in range(n):
        out[i] += (
            w0 * x0[i] + w1 * x1[i] + w2 * x2[i] + w3 * x3[i] + w4 * x4[i]
            + w5 * x5[i] + w6 * x6[i] + w7 * x7[i] + w8 * x8[i]
        )  # fmt: skip
        other[i] += (
            v0 * x0[i] + v1 * x1[i] + v2 * x2[i] + v3 * x3[i] + v4 * x4[i]
            + v5 * x5[i] + v6 * x6[i] + v7 * x7[i] + v8 * x8[i]
        )  # fmt: skip


@kernel
def conv_forward(op: np.record, a: Float32Array, p: Float32Array, batch: int) -> None:
    """Convolve with a 1x1 or 3x3 kernel, stride 1 and zero padding."""
    # x = a[src]: (cin, side + 2, side + 2, batch); y = a[dst]: (cout, side + 2, side + 2, batch)
    # w = p[weight]: (cout, cin / groups, width, width), outputs `stride` apart
    # b = p[bias]: (cout,)
    src, dst, weight, bias, stride = op.src, op.dst, op.weight, op.bias, op.stride
    side, width, cout = op.side, op.kernel_size, op.out_channels
    n, row = side * batch, (side + 2) * batch
    group_in, group_out = op.in_channels // op.groups, cout // op.groups
    # Rows, then output channels: the input rows stay in the cache for all outputs.
    for y in range(side):
        co = 0
        # Output channels, two at a time if the next one is in the same group.
        while co < cout:
            pairs = width == 3 and (co + 1) % group_out != 0
            out = run(a, first_row(dst, co, side, batch) + y * row, n)
            other = run(a, first_row(dst, co + pairs, side, batch) + y * row, n)
            fill(out, p[bias + co] if bias >= 0 else np.float32(0))
            if pairs:
                fill(other, p[bias + co + 1] if bias >= 0 else np.float32(0))
            # Input channels of the group.
            for c in range(group_in):
                ci = co // group_out * group_in + c
                at = first_row(src, ci, side, batch) + y * row
                w = weight + co * stride + c * width * width
                if width == 1:
                    add_scaled(out, run(a, at, n), p[w])
                elif pairs:
                    add_taps_to_two(
                        out, other, a, at, row, batch, run(p, w, 9), run(p, w + stride, 9), False
                    )
                else:
                    add_taps(out, a, at, row, batch, run(p, w, 9), False)
            co += 1 + pairs


@kernel
def conv_backward(
    op: np.record, a: Float32Array, d: Float32Array, p: Float32Array, g: Float32Array, batch: int
) -> None:
    """Write the gradients of weights and bias, and of the input unless the mode is NONE."""
    # The forward was y[co] = b[co] + sum over ci of x[ci] correlated with w[co, ci], so
    # dw[co, ci] = sum of dy[co] * shifted x[ci], db[co] = sum of dy[co], and
    # dx[ci] = sum over co of dy[co] correlated with w[co, ci] rotated by 180 degrees.
    # x, dx = a[src], d[src]: (cin, side + 2, side + 2, batch)
    # dy = d[dst]: (cout, side + 2, side + 2, batch)
    # w, dw = p[weight], g[weight]: (cout, cin / groups, width, width), outputs `stride` apart
    # db = g[bias]: (cout,)
    src, dst, weight, bias, stride = op.src, op.dst, op.weight, op.bias, op.stride
    side, width, cin, mode = op.side, op.kernel_size, op.in_channels, op.mode
    n, row = side * batch, (side + 2) * batch
    group_in, group_out = cin // op.groups, op.out_channels // op.groups
    # Output channels: gradients of their weights and bias.
    for co in range(op.out_channels):
        first = first_row(dst, co, side, batch)
        if bias >= 0:
            total = np.float32(0)
            # Rows.
            for y in range(side):
                total += total_of(run(d, first + y * row, n))
            g[bias + co] = total
        # Input channels of the group, a kernel each.
        for c in range(group_in):
            ci = co // group_out * group_in + c
            at = first_row(src, ci, side, batch)
            w = weight + co * stride + c * width * width
            if width == 1:
                total = np.float32(0)
                # Rows.
                for y in range(side):
                    total += dot(run(d, first + y * row, n), run(a, at + y * row, n))
                g[w] = total
            else:
                _tap_gradients(run(g, w, 9), a, d, first, at, side, batch)
    if mode == GradientMode.NONE:
        return
    # Rows, then input channels: the rows of dy stay in the cache for all inputs.
    for y in range(side):
        ci = 0
        # Input channels, two at a time if the next one is in the same group.
        while ci < cin:
            pairs = width == 3 and (ci + 1) % group_in != 0
            out = run(d, first_row(src, ci, side, batch) + y * row, n)
            other = run(d, first_row(src, ci + pairs, side, batch) + y * row, n)
            if mode == GradientMode.ASSIGN:
                fill(out, np.float32(0))
                fill(other, np.float32(0))
            group = ci // group_in
            # Output channels of the group.
            for c in range(group_out):
                co = group * group_out + c
                at = first_row(dst, co, side, batch) + y * row
                w = weight + co * stride + (ci - group * group_in) * width * width
                if width == 1:
                    add_scaled(out, run(d, at, n), p[w])
                elif pairs:
                    add_taps_to_two(
                        out, other, d, at, row, batch, run(p, w, 9), run(p, w + 9, 9), True
                    )
                else:
                    add_taps(out, d, at, row, batch, run(p, w, 9), True)
            ci += 1 + pairs


@kernel
def _tap_gradients(
    out: Float32Array, a: Float32Array, d: Float32Array, first: int, at: int, side: int, batch: int
) -> None:
    """Write the gradient of one 3x3 kernel: inner products of dy with the shifted input."""
    # out: (9,); dy = d[first] and x = a[at]: one channel each, (side + 2, side + 2, batch)
    n, row = side * batch, (side + 2) * batch
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = s8 = np.float32(0)
    # Rows, then pixels of the row and images: nine sums in registers.
    for y in range(side):
        v = run(d, first + y * row, n)
        x0, x1, x2, x3, x4, x5, x6, x7, x8 = neighbors(a, at + y * row, row, batch, n)
        for i in range(n):
            s0 += v[i] * x0[i]
            s1 += v[i] * x1[i]
            s2 += v[i] * x2[i]
            s3 += v[i] * x3[i]
            s4 += v[i] * x4[i]
            s5 += v[i] * x5[i]
            s6 += v[i] * x6[i]
            s7 += v[i] * x7[i]
            s8 += v[i] * x8[i]
    out[0], out[1], out[2], out[3], out[4] = s0, s1, s2, s3, s4
    out[5], out[6], out[7], out[8] = s5, s6, s7, s8


# ---------------------------------------------------------------------------------- batch norm


@kernel
def norm_forward(
    op: np.record,
    a: Float32Array,
    p: Float32Array,
    buffers: Float32Array,
    batch: int,
    is_training: bool,
) -> None:
    """Batch norm, and ReLU if `rectify`; training also updates the running statistics."""
    # x = a[src], y = a[dst]: (channels, side + 2, side + 2, batch)
    # scale = p[weight], shift = p[bias]: (channels,)
    # running mean and variance = buffers[running_mean], buffers[running_var]: (channels,)
    # a[aux]: (channels, 2), output: mean and 1 / std for the backward pass
    src, dst, side, rectify, aux = op.src, op.dst, op.side, op.rectify, op.aux
    n, row, count = side * batch, (side + 2) * batch, np.float32(side * side * batch)
    # Channels, each with statistics of its own.
    for c in range(op.in_channels):
        x, y = first_row(src, c, side, batch), first_row(dst, c, side, batch)
        if is_training:
            total = np.float32(0)
            # Rows: the mean.
            for r in range(side):
                total += total_of(run(a, x + r * row, n))
            mean = total / count
            square = np.float32(0)
            # Rows again: a variance from squared deviations does not cancel.
            for r in range(side):
                v = run(a, x + r * row, n)
                for i in range(n):
                    square += (v[i] - mean) * (v[i] - mean)
            var = square / count
            at, to = op.running_mean + c, op.running_var + c
            buffers[at] = KEEP * buffers[at] + (1 - KEEP) * mean
            unbiased = square / (count - 1)
            buffers[to] = KEEP * buffers[to] + (1 - KEEP) * unbiased
        else:
            mean, var = buffers[op.running_mean + c], buffers[op.running_var + c]
        inverse = np.float32(1) / np.sqrt(var + EPSILON)
        a[aux + 2 * c], a[aux + 2 * c + 1] = mean, inverse
        factor = p[op.weight + c] * inverse
        constant = p[op.bias + c] - mean * factor
        # Rows: y = scale * (x - mean) / std + shift as one multiply-add.
        for r in range(side):
            v, out = run(a, x + r * row, n), run(a, y + r * row, n)
            if rectify:
                for i in range(n):
                    value = v[i] * factor + constant
                    out[i] = np.float32(0) if value <= 0 else value
            else:
                for i in range(n):
                    out[i] = v[i] * factor + constant


@kernel
def norm_backward(
    op: np.record, a: Float32Array, d: Float32Array, p: Float32Array, g: Float32Array, batch: int
) -> None:
    """Write the gradients of scale and shift, and of the input unless the mode is NONE.

    Source: Ioffe and Szegedy (2015), section 3.
    """
    # The forward was y = scale * z + shift with z = (x - mean) * inverse, and ReLU if `rectify`, so
    # dshift = sum of dy, dscale = sum of dy * z, and
    # dx = scale * inverse * (dy - mean of dy - z * mean of dy * z).
    # x, dx = a[src], d[src]; y, dy = a[dst], d[dst]: (channels, side + 2, side + 2, batch)
    # scale, dscale = p[weight], g[weight]; dshift = g[bias]: (channels,)
    # mean, inverse = a[aux]: (channels, 2)
    src, dst, side, rectify, mode, aux = op.src, op.dst, op.side, op.rectify, op.mode, op.aux
    n, row, count = side * batch, (side + 2) * batch, np.float32(side * side * batch)
    # Channels.
    for c in range(op.in_channels):
        x, y = first_row(src, c, side, batch), first_row(dst, c, side, batch)
        mean, inverse = a[aux + 2 * c], a[aux + 2 * c + 1]
        of_shift = of_scale = np.float32(0)
        # Rows: dy is masked in place where the ReLU cut off, then both sums.
        for r in range(side):
            v, grad, out = run(a, x + r * row, n), run(d, y + r * row, n), run(a, y + r * row, n)
            if rectify:
                for i in range(n):
                    grad[i] = np.float32(0) if out[i] <= 0 else grad[i]
            for i in range(n):
                of_shift += grad[i]
                of_scale += grad[i] * (v[i] - mean)
        of_scale *= inverse
        g[op.bias + c], g[op.weight + c] = of_shift, of_scale
        if mode == GradientMode.NONE:
            continue
        factor = p[op.weight + c] * inverse
        mean_grad = of_shift / count
        slope = of_scale / count * inverse
        # Rows again: dx needs the sums over all of them.
        for r in range(side):
            v, grad, out = run(a, x + r * row, n), run(d, y + r * row, n), run(d, x + r * row, n)
            if mode == GradientMode.ASSIGN:
                for i in range(n):
                    out[i] = factor * (grad[i] - mean_grad - (v[i] - mean) * slope)
            else:
                for i in range(n):
                    out[i] += factor * (grad[i] - mean_grad - (v[i] - mean) * slope)


# ---------------------------------------------------------------------------------- ReLU, pooling


@kernel
def relu_forward(op: np.record, a: Float32Array, batch: int) -> None:
    """Write max(x, 0)."""
    # x = a[src], y = a[dst]: (channels, side + 2, side + 2, batch)
    src, dst, side = op.src, op.dst, op.side
    n, row = side * batch, (side + 2) * batch
    # Channels, rows, then pixels of the row and images; NaN is not <= 0, so it stays NaN.
    for c in range(op.in_channels):
        x, y = first_row(src, c, side, batch), first_row(dst, c, side, batch)
        for r in range(side):
            v, out = run(a, x + r * row, n), run(a, y + r * row, n)
            for i in range(n):
                out[i] = np.float32(0) if v[i] <= 0 else v[i]


@kernel
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
            v, grad, out = run(a, y + r * row, n), run(d, y + r * row, n), run(d, x + r * row, n)
            for i in range(n):
                through = np.float32(0) if v[i] <= 0 else grad[i]
                out[i] = through if mode == GradientMode.ASSIGN else out[i] + through


@kernel
def pool_forward(op: np.record, a: Float32Array, batch: int) -> None:
    """Max-pool every 2x2 square; an odd last row or column is dropped."""
    # x = a[src]: (channels, side + 2, side + 2, batch)
    # y = a[dst]: (channels, half + 2, half + 2, batch)
    src, dst, side = op.src, op.dst, op.side
    row, half = (side + 2) * batch, side // 2
    # Channels, then squares by row and column.
    for c in range(op.in_channels):
        x, y = first_row(src, c, side, batch), first_row(dst, c, half, batch)
        for r in range(half):
            for q in range(half):
                at = x + 2 * r * row + 2 * q * batch
                x0, x1 = run(a, at, batch), run(a, at + batch, batch)
                x2, x3 = run(a, at + row, batch), run(a, at + row + batch, batch)
                out = run(a, y + r * (half + 2) * batch + q * batch, batch)
                # Images.
                for i in range(batch):
                    upper = x1[i] if x1[i] > x0[i] else x0[i]
                    lower = x3[i] if x3[i] > x2[i] else x2[i]
                    out[i] = lower if lower > upper else upper


@kernel
def pool_backward(op: np.record, a: Float32Array, d: Float32Array, batch: int) -> None:
    """Assign the gradient of the input."""
    # The forward was y = max(x0, x1, x2, x3) for every 2x2 square, so dy goes to the first of the
    # four that equals y, and the others get 0.
    # x, dx = a[src], d[src]: (channels, side + 2, side + 2, batch)
    # y, dy = a[dst], d[dst]: (channels, half + 2, half + 2, batch)
    src, dst, side = op.src, op.dst, op.side
    n, row, half = side * batch, (side + 2) * batch, side // 2
    zero = np.float32(0)
    # Channels.
    for c in range(op.in_channels):
        x, y = first_row(src, c, side, batch), first_row(dst, c, half, batch)
        if side % 2:
            # Rows: no square covers the last row and column.
            for r in range(side):
                fill(run(d, x + r * row, n), zero)
        # Squares by row and column.
        for r in range(half):
            for q in range(half):
                at = x + 2 * r * row + 2 * q * batch
                to = y + r * (half + 2) * batch + q * batch
                x0, x1 = run(a, at, batch), run(a, at + batch, batch)
                x2 = run(a, at + row, batch)
                top, grad = run(a, to, batch), run(d, to, batch)
                d0, d1 = run(d, at, batch), run(d, at + batch, batch)
                d2, d3 = run(d, at + row, batch), run(d, at + row + batch, batch)
                # Images.
                for i in range(batch):
                    is0 = x0[i] == top[i]
                    is1 = x1[i] == top[i] and not is0
                    is2 = x2[i] == top[i] and not is0 and not is1
                    d0[i] = grad[i] if is0 else zero
                    d1[i] = grad[i] if is1 else zero
                    d2[i] = grad[i] if is2 else zero
                    d3[i] = zero if is0 or is1 or is2 else grad[i]


# ---------------------------------------------------------------------------------- pooled features


@kernel
def average(a: Float32Array, src: int, dst: int, channels: int, side: int, batch: int) -> None:
    """Average over pixels."""
    # x = a[src]: (channels, side + 2, side + 2, batch); y = a[dst]: (channels, batch)
    row = (side + 2) * batch
    share = np.float32(1) / np.float32(side * side)
    # Channels, then pixels by row and column.
    for c in range(channels):
        x, out = first_row(src, c, side, batch), run(a, dst + c * batch, batch)
        fill(out, np.float32(0))
        for r in range(side):
            for q in range(side):
                add_scaled(out, run(a, x + r * row + q * batch, batch), share)


@kernel
def spread_average(
    d: Float32Array, src: int, dst: int, channels: int, side: int, batch: int, mode: GradientMode
) -> None:
    """Assign or accumulate the gradient of the input of `average`."""
    # The forward was y = sum of x / side^2, so dx = dy / side^2 at every pixel.
    # dx = d[src]: (channels, side + 2, side + 2, batch); dy = d[dst]: (channels, batch)
    row = (side + 2) * batch
    share = np.float32(1) / np.float32(side * side)
    # Channels, then pixels by row and column.
    for c in range(channels):
        x, grad = first_row(src, c, side, batch), run(d, dst + c * batch, batch)
        for r in range(side):
            for q in range(side):
                out = run(d, x + r * row + q * batch, batch)
                if mode == GradientMode.ASSIGN:
                    fill(out, np.float32(0))
                add_scaled(out, grad, share)


@kernel
def affine_forward(
    a: Float32Array, p: Float32Array, src: int, dst: int, cin: int, cout: int, batch: int,
    weight: int, stride: int, bias: int,
) -> None:  # fmt: skip
    """Linear layer on pooled features."""
    # x = a[src]: (cin, batch); y = a[dst]: (cout, batch)
    # w = p[weight]: (cout, cin), outputs `stride` apart; b = p[bias]: (cout,)
    # Outputs, then inputs.
    for j in range(cout):
        out = run(a, dst + j * batch, batch)
        fill(out, p[bias + j])
        for c in range(cin):
            add_scaled(out, run(a, src + c * batch, batch), p[weight + j * stride + c])


@kernel
def affine_backward(
    a: Float32Array, d: Float32Array, p: Float32Array, g: Float32Array, src: int, dst: int,
    cin: int, cout: int, batch: int, weight: int, stride: int, bias: int,
) -> None:  # fmt: skip
    """Assign the gradients of weights, bias and input."""
    # The forward was y[j] = b[j] + sum over c of w[j, c] * x[c], so
    # dw[j, c] = sum over images of dy[j] * x[c], db[j] = sum over images of dy[j], and
    # dx[c] = sum over j of w[j, c] * dy[j].
    # x, dx = a[src], d[src]: (cin, batch); dy = d[dst]: (cout, batch)
    # w, dw = p[weight], g[weight]: (cout, cin), outputs `stride` apart; db = g[bias]: (cout,)
    fill(run(d, src, cin * batch), np.float32(0))
    # Outputs, then inputs.
    for j in range(cout):
        grad = run(d, dst + j * batch, batch)
        g[bias + j] = total_of(grad)
        for c in range(cin):
            g[weight + j * stride + c] = dot(grad, run(a, src + c * batch, batch))
            add_scaled(run(d, src + c * batch, batch), grad, p[weight + j * stride + c])


# ---------------------------------------------------------------------------------- squeeze-excite


@kernel
def _excite_regions(op: np.record, batch: int) -> tuple[int, int, int, int]:
    """Return the offsets of z1, h, z2 and e, which follow the pooled features."""
    z1 = op.aux + op.in_channels * batch
    h = z1 + op.hidden * batch
    z2 = h + op.hidden * batch
    return z1, h, z2, z2 + op.in_channels * batch


@kernel
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
    for i in range(hidden * batch):
        a[h + i] = a[z1 + i] / (1 + math.exp(-a[z1 + i]))
    affine_forward(a, p, h, z2, hidden, channels, batch, op.weight_2, op.stride_2, op.bias_2)
    # Channels and images: tanh.
    for i in range(channels * batch):
        a[e + i] = math.tanh(a[z2 + i])
    row = (side + 2) * batch
    # Channels, then pixels by row and column: y = x * e.
    for c in range(channels):
        factor = run(a, e + c * batch, batch)
        x, y = first_row(op.src, c, side, batch), first_row(op.dst, c, side, batch)
        for r in range(side):
            for q in range(side):
                at = r * row + q * batch
                v, out = run(a, x + at, batch), run(a, y + at, batch)
                # Images.
                for i in range(batch):
                    out[i] = v[i] * factor[i]


@kernel
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
    # Channels: dz2, and the part of dx that does not pass through e.
    for c in range(channels):
        factor, of_factor = run(a, e + c * batch, batch), run(d, z2 + c * batch, batch)
        fill(of_factor, np.float32(0))
        x, y = first_row(op.src, c, side, batch), first_row(op.dst, c, side, batch)
        # Pixels by row and column, then images.
        for r in range(side):
            for q in range(side):
                at = r * row + q * batch
                v, grad, out = run(a, x + at, batch), run(d, y + at, batch), run(d, x + at, batch)
                for i in range(batch):
                    of_factor[i] += grad[i] * v[i]
                if mode != GradientMode.NONE:
                    for i in range(batch):
                        through = grad[i] * factor[i]
                        out[i] = through if mode == GradientMode.ASSIGN else out[i] + through
        # Images: tanh' = 1 - tanh^2.
        for i in range(batch):
            of_factor[i] *= 1 - factor[i] * factor[i]
    affine_backward(a, d, p, g, h, z2, hidden, channels, batch, op.weight_2, op.stride_2, op.bias_2)
    # Hidden units and images: silu'(z) = s * (1 + z * (1 - s)) with s = sigmoid(z).
    for i in range(hidden * batch):
        s = 1 / (1 + math.exp(-a[z1 + i]))
        d[z1 + i] = d[h + i] * np.float32(s * (1 + a[z1 + i] * (1 - s)))
    affine_backward(a, d, p, g, op.aux, z1, channels, hidden, batch, op.weight, op.stride, op.bias)
    if mode != GradientMode.NONE:
        spread_average(d, op.src, op.aux, channels, side, batch, GradientMode.ACCUMULATE)


# ---------------------------------------------------------------------------------- blending


@kernel
def tanh_of(out: Float32Array, x: Float32Array) -> None:
    """Write tanh(x) as a rational function, which the compiler can vectorize.

    Within 5e-7 of the true value. Source: the coefficients of Eigen's `ptanh_float`.
    """
    # out, x: (n,)
    for i in range(len(x)):
        v = x[i]
        v = np.float32(7.90531110763549805) if v > np.float32(7.90531110763549805) else v
        v = np.float32(-7.90531110763549805) if v < np.float32(-7.90531110763549805) else v
        s = v * v
        top = np.float32(-2.76076847742355e-16) * s + np.float32(2.00018790482477e-13)
        top = top * s + np.float32(-8.60467152213735e-11)
        top = top * s + np.float32(5.12229709037114e-08)
        top = top * s + np.float32(1.48572235717979e-05)
        top = top * s + np.float32(6.37261928875436e-04)
        top = top * s + np.float32(4.89352455891786e-03)
        low = np.float32(1.19825839466702e-06) * s + np.float32(1.18534705686654e-04)
        low = low * s + np.float32(2.26843463243900e-03)
        low = low * s + np.float32(4.89352518554385e-03)
        out[i] = v * top / low


@kernel
def tanh_forward(op: np.record, a: Float32Array, batch: int) -> None:
    """Replace the output of a branch by its tanh; `mix_backward` includes the gradient."""
    # r = a[src]: (channels, side + 2, side + 2, batch), input and output
    side = op.side
    # Channels and rows.
    for c in range(op.in_channels):
        for y in range(side):
            x = run(a, first_row(op.src, c, side, batch) + y * (side + 2) * batch, side * batch)
            tanh_of(x, x)


@kernel
def gate_forward(op: np.record, a: Float32Array, p: Float32Array, batch: int) -> None:
    """Compute a seed's gate; `mix_backward` includes the gradient."""
    # x = a[src]: (channels, side + 2, side + 2, batch)
    # pooled = a[aux]: (channels, batch), output; gate, behind it: (batch,), output
    # w = p[weight]: (channels,); b = p[bias]: (1,)
    channels = op.in_channels
    average(a, op.src, op.aux, channels, op.side, batch)
    gate = op.aux + channels * batch
    affine_forward(a, p, op.aux, gate, channels, 1, batch, op.weight, channels, op.bias)
    # Images: sigmoid.
    for i in range(batch):
        a[gate + i] = 1 / (1 + math.exp(-a[gate + i]))


@kernel
def mix_forward(op: np.record, a: Float32Array, alpha: np.float32, batch: int) -> None:
    """Blend the output of a branch into the features, with weight alpha."""
    # h = a[src], r = a[branch], y = a[dst]: (channels, side + 2, side + 2, batch)
    # gate, behind the pooled features a[aux]: (batch,); for MULTIPLY, r is a tanh already
    side, blend = op.side, op.blend
    row = (side + 2) * batch
    gate = run(a, op.aux + op.in_channels * batch, batch)
    # Channels and rows.
    for c in range(op.in_channels):
        x, v = first_row(op.src, c, side, batch), first_row(op.branch, c, side, batch)
        y = first_row(op.dst, c, side, batch)
        for r in range(side):
            h, out = run(a, x + r * row, side * batch), run(a, y + r * row, side * batch)
            residual = run(a, v + r * row, side * batch)
            # Pixels of the row and images.
            if alpha == 0:
                copy(out, h)  # Exactly h, even if the branch is not finite.
            elif blend == Blend.ADD:
                for i in range(len(h)):
                    out[i] = h[i] + alpha * residual[i]
            elif blend == Blend.MULTIPLY:
                for i in range(len(h)):
                    out[i] = h[i] + alpha * h[i] * residual[i]
            else:
                for q in range(side):
                    for i in range(batch):
                        k = q * batch + i
                        out[k] = h[k] + alpha * gate[i] * residual[k]


@kernel
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
    n, row, at = side * batch, (side + 2) * batch, op.aux + channels * batch
    gate, of_gate = run(a, at, batch), run(d, at, batch)
    if blend == Blend.GATE:
        fill(of_gate, np.float32(0))
    # Channels and rows.
    for c in range(channels):
        x, v = first_row(op.src, c, side, batch), first_row(op.branch, c, side, batch)
        y = first_row(op.dst, c, side, batch)
        for r in range(side):
            h, grad = run(a, x + r * row, n), run(d, y + r * row, n)
            residual, of_residual = run(a, v + r * row, n), run(d, v + r * row, n)
            of_h = run(d, x + r * row, n)
            # Pixels of the row and images.
            if blend == Blend.ADD:
                for i in range(n):
                    of_h[i] = grad[i]
                    of_residual[i] = beta * grad[i]
            elif blend == Blend.MULTIPLY:
                for i in range(n):
                    of_h[i] = grad[i]
                    slope = 1 - residual[i] * residual[i]
                    of_residual[i] = beta * grad[i] * h[i] * slope
                if alpha != 0:
                    for i in range(n):
                        of_h[i] += alpha * grad[i] * residual[i]
            else:
                for q in range(side):
                    for i in range(batch):
                        k = q * batch + i
                        of_h[k] = grad[k]
                        of_residual[k] = beta * grad[k] * gate[i]
                        of_gate[i] += beta * grad[k] * residual[k]
    if blend == Blend.GATE:
        # Images: sigmoid' = sigmoid * (1 - sigmoid).
        for i in range(batch):
            of_gate[i] *= gate[i] * (1 - gate[i])
        affine_backward(a, d, p, g, op.aux, at, channels, 1, batch, op.weight, channels, op.bias)
        if not op.is_isolated:
            spread_average(d, op.src, op.aux, channels, side, batch, GradientMode.ACCUMULATE)


# ---------------------------------------------------------------------------------- classifier


@kernel
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
    loss, hits = 0.0, 0
    # Images.
    for i in range(batch):
        best = 0
        # Classes: the first one with the largest logit.
        for k in range(1, classes):
            if a[logits + k * batch + i] > a[logits + best * batch + i]:
                best = k
        top = a[logits + best * batch + i]
        own = a[logits + max(labels[i], 0) * batch + i] - top
        total = np.float32(0)
        # Classes: exponentials less the largest logit, so none overflows.
        for k in range(classes):
            at = logits + k * batch + i
            a[at] = math.exp(a[at] - top)
            total += a[at]
        # Classes: divided by their sum.
        for k in range(classes):
            a[logits + k * batch + i] /= total
        if labels[i] >= 0:
            loss += math.log(total) - own
            hits += best == labels[i]
    return loss, hits


@kernel
def classify_backward(
    op: np.record, a: Float32Array, d: Float32Array, p: Float32Array, g: Float32Array, batch: int,
    labels: IntArray,
) -> None:  # fmt: skip
    """Assign the gradients of weights, bias and input of the mean loss, after `classify`."""
    # The forward was loss = -mean over images of log softmax(logits)[label] with
    # logits = w pooled(x) + b, so dlogits = (softmax - one_hot(label)) / batch.
    # dx = d[src]: (channels, side + 2, side + 2, batch); labels: (batch,)
    # softmax = a[logits], dlogits = d[logits]: (classes, batch)
    channels, classes, aux = op.in_channels, op.out_channels, op.aux
    logits = aux + channels * batch
    share = np.float32(1) / np.float32(batch)
    # Classes and images.
    for k in range(classes):
        for i in range(batch):
            hit = np.float32(labels[i] == k)
            d[logits + k * batch + i] = (a[logits + k * batch + i] - hit) * share
    affine_backward(
        a, d, p, g, aux, logits, channels, classes, batch, op.weight, op.stride, op.bias
    )
    spread_average(d, op.src, aux, channels, op.side, batch, GradientMode.ASSIGN)
