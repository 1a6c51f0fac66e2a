"""Layers of one network on a CPU, compiled: forward and backward on flat arrays.

Features of a batch are kept image-innermost, (channels, size + 2, size + 2, batch), with a border
of zeros. So the 3x3 convolution of a row is nine multiply-adds of long contiguous runs, whatever
the number of channels: 40 to 80 GFLOP/s on one core, where a grouped convolution of such small
networks reaches 5 to 10.

Everything a network computes lies in one array `a` (the arena), its gradient at the same place in
`d`. A region is named by its offset; `p` is the member's row of parameters, `g` their gradient.
NaN must stay visible, so the compiler may reorder sums but not assume that numbers are finite.
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
"""Share of running statistics that a batch keeps, as there."""
REORDERED = {"reassoc", "contract", "nsz", "arcp"}
"""Freedom of the compiler: sums in any order, but NaN and infinity stay what they are."""


class Kind(IntEnum):
    """What an operation does."""

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
    """What the backward pass of an operation does with the gradient of its input."""

    NONE = 0
    ASSIGN = 1
    ACCUMULATE = 2


OPERATION = np.dtype(
    [
        (name, np.int64)
        for name in (
            "kind",  # A value of `Kind`.
            *("src", "dst", "in_channels", "out_channels", "size"),
            *("kernel_size", "groups", "weight", "stride", "bias"),
            *("mean", "var", "aux", "rectify", "mode", "slot", "blend", "branch"),
            *("hidden", "weight_2", "stride_2", "bias_2", "is_isolated", "row"),
        )
    ]
)


kernel = functools.partial(inlined, fastmath=REORDERED)
network_entry_point = functools.partial(entry_point, fastmath=REORDERED)


@kernel
def run(a: Float32Array, offset: int, n: int) -> Float32Array:
    """Return a contiguous run; slices, unlike indices, leave no sign to check in a loop."""
    return a[offset : offset + n]


@kernel
def first_row(offset: int, channel: int, size: int, batch: int) -> int:
    """Return where the first row of a channel begins, behind the border."""
    row = (size + 2) * batch
    return offset + channel * (size + 2) * row + row + batch


@kernel
def neighbours(a: Float32Array, at: int, row: int, batch: int, n: int) -> tuple[Float32Array, ...]:
    """Return the nine runs that the taps of a 3x3 kernel see, in their order."""
    above, below = at - row, at + row
    return (
        run(a, above - batch, n), run(a, above, n), run(a, above + batch, n),
        run(a, at - batch, n), run(a, at, n), run(a, at + batch, n),
        run(a, below - batch, n), run(a, below, n), run(a, below + batch, n),
    )  # fmt: skip


@kernel
def nine_of(w: Float32Array, flip: bool) -> tuple[np.float32, ...]:
    """Return the taps of a 3x3 kernel, turned if asked for."""
    if flip:
        return w[8], w[7], w[6], w[5], w[4], w[3], w[2], w[1], w[0]
    return w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8]


@kernel
def add_taps(
    out: Float32Array, a: Float32Array, at: int, row: int, batch: int, w: Float32Array, flip: bool
) -> None:
    """Add the 3x3 correlation of a row with its neighbours to `out`; `flip` turns the kernel."""
    n = len(out)
    x0, x1, x2, x3, x4, x5, x6, x7, x8 = neighbours(a, at, row, batch, n)
    w0, w1, w2, w3, w4, w5, w6, w7, w8 = nine_of(w, flip)
    for i in range(n):
        out[i] += (
            w0 * x0[i] + w1 * x1[i] + w2 * x2[i] + w3 * x3[i] + w4 * x4[i]
            + w5 * x5[i] + w6 * x6[i] + w7 * x7[i] + w8 * x8[i]
        )  # fmt: skip


@kernel
def add_taps_to_two(
    out: Float32Array,
    other: Float32Array,
    a: Float32Array,
    at: int,
    row: int,
    batch: int,
    w: Float32Array,
    v: Float32Array,
    flip: bool,
) -> None:
    """Do the same for two outputs of one input, which is read once; `v` is the kernel of `other`.

    The processor reads little more than half as much per multiplication.
    """
    n = len(out)
    x0, x1, x2, x3, x4, x5, x6, x7, x8 = neighbours(a, at, row, batch, n)
    w0, w1, w2, w3, w4, w5, w6, w7, w8 = nine_of(w, flip)
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = nine_of(v, flip)
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
def fill(out: Float32Array, value: np.float32) -> None:
    """Write the same number everywhere. A loop compiles sooner than an assignment to a slice."""
    for i in range(len(out)):
        out[i] = value


@kernel
def copy(out: Float32Array, x: Float32Array) -> None:
    """Write x, likewise."""
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


@kernel
def conv_forward(op: np.void, a: Float32Array, p: Float32Array, batch: int) -> None:
    """Convolve with kernels of `width` 1 or 3; weights of one output are `stride` apart."""
    src, dst, cin, cout, size, width, groups, weight, stride, bias = (
        op["src"], op["dst"], op["in_channels"], op["out_channels"], op["size"],
        op["kernel_size"], op["groups"], op["weight"], op["stride"], op["bias"],
    )  # fmt: skip
    n, row = size * batch, (size + 2) * batch
    group_in, group_out = cin // groups, cout // groups
    for y in range(size):
        co = 0
        while co < cout:
            pairs = width == 3 and (co + 1) % group_out != 0
            out = run(a, first_row(dst, co, size, batch) + y * row, n)
            other = run(a, first_row(dst, co + pairs, size, batch) + y * row, n)
            fill(out, p[bias + co] if bias >= 0 else np.float32(0))
            if pairs:
                fill(other, p[bias + co + 1] if bias >= 0 else np.float32(0))
            for c in range(group_in):
                ci = co // group_out * group_in + c
                at = first_row(src, ci, size, batch) + y * row
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
    op: np.void, a: Float32Array, d: Float32Array, p: Float32Array, g: Float32Array, batch: int
) -> None:
    """Write the gradients of weights and bias, and of the input unless the mode is NONE."""
    src, dst, cin, cout, size, width, groups, weight, stride, bias, mode = (
        op["src"], op["dst"], op["in_channels"], op["out_channels"], op["size"],
        op["kernel_size"], op["groups"], op["weight"], op["stride"], op["bias"], op["mode"],
    )  # fmt: skip
    n, row = size * batch, (size + 2) * batch
    group_in, group_out = cin // groups, cout // groups
    for co in range(cout):
        first = first_row(dst, co, size, batch)
        if bias >= 0:
            total = np.float32(0)
            for y in range(size):
                total += total_of(run(d, first + y * row, n))
            g[bias + co] = total
        for c in range(group_in):
            ci = co // group_out * group_in + c
            at = first_row(src, ci, size, batch)
            w = weight + co * stride + c * width * width
            if width == 1:
                total = np.float32(0)
                for y in range(size):
                    total += dot(run(d, first + y * row, n), run(a, at + y * row, n))
                g[w] = total
            else:
                _tap_gradients(run(g, w, 9), a, d, first, at, size, batch)
    if mode == GradientMode.NONE:
        return
    for y in range(size):
        ci = 0
        while ci < cin:
            pairs = width == 3 and (ci + 1) % group_in != 0
            out = run(d, first_row(src, ci, size, batch) + y * row, n)
            other = run(d, first_row(src, ci + pairs, size, batch) + y * row, n)
            if mode == GradientMode.ASSIGN:
                fill(out, np.float32(0))
                fill(other, np.float32(0))
            group = ci // group_in
            for c in range(group_out):
                co = group * group_out + c
                at = first_row(dst, co, size, batch) + y * row
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
    out: Float32Array, a: Float32Array, d: Float32Array, first: int, at: int, size: int, batch: int
) -> None:
    """Write the nine inner products of a gradient with its shifted input."""
    n, row = size * batch, (size + 2) * batch
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = s8 = np.float32(0)
    for y in range(size):
        v = run(d, first + y * row, n)
        x0, x1, x2, x3, x4, x5, x6, x7, x8 = neighbours(a, at + y * row, row, batch, n)
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


@kernel
def norm_forward(
    op: np.void,
    a: Float32Array,
    p: Float32Array,
    buffers: Float32Array,
    batch: int,
    training: bool,
) -> None:
    """Batch norm, and a rectifier if asked for; mean and 1 / std of the batch go to `stats`."""
    src, dst, channels, size, scale, shift, mean_at, var_at, stats, rectify = (
        op["src"], op["dst"], op["in_channels"], op["size"], op["weight"],
        op["bias"], op["mean"], op["var"], op["aux"], op["rectify"] != 0,
    )  # fmt: skip
    n, row, count = size * batch, (size + 2) * batch, np.float32(size * size * batch)
    for c in range(channels):
        x, y = first_row(src, c, size, batch), first_row(dst, c, size, batch)
        if training:
            total = np.float32(0)
            for r in range(size):
                total += total_of(run(a, x + r * row, n))
            mean = total / count
            square = np.float32(0)
            for r in range(size):
                v = run(a, x + r * row, n)
                for i in range(n):
                    square += (v[i] - mean) * (v[i] - mean)
            var = square / count
            buffers[mean_at + c] = KEEP * buffers[mean_at + c] + (1 - KEEP) * mean
            unbiased = square / (count - 1)
            buffers[var_at + c] = KEEP * buffers[var_at + c] + (1 - KEEP) * unbiased
        else:
            mean, var = buffers[mean_at + c], buffers[var_at + c]
        inverse = np.float32(1) / np.sqrt(var + EPSILON)
        a[stats + 2 * c], a[stats + 2 * c + 1] = mean, inverse
        factor = p[scale + c] * inverse
        constant = p[shift + c] - mean * factor
        for r in range(size):
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
    op: np.void, a: Float32Array, d: Float32Array, p: Float32Array, g: Float32Array, batch: int
) -> None:
    """Gradients of scale, shift and input. Source: Ioffe and Szegedy (2015), section 3."""
    src, dst, channels, size, scale, shift, stats, rectify, mode = (
        op["src"], op["dst"], op["in_channels"], op["size"],
        op["weight"], op["bias"], op["aux"], op["rectify"] != 0, op["mode"],
    )  # fmt: skip
    n, row, count = size * batch, (size + 2) * batch, np.float32(size * size * batch)
    for c in range(channels):
        x, y = first_row(src, c, size, batch), first_row(dst, c, size, batch)
        mean, inverse = a[stats + 2 * c], a[stats + 2 * c + 1]
        of_shift = of_scale = np.float32(0)
        for r in range(size):
            v, grad, out = run(a, x + r * row, n), run(d, y + r * row, n), run(a, y + r * row, n)
            if rectify:
                for i in range(n):
                    grad[i] = np.float32(0) if out[i] <= 0 else grad[i]
            for i in range(n):
                of_shift += grad[i]
                of_scale += grad[i] * (v[i] - mean)
        of_scale *= inverse
        g[shift + c], g[scale + c] = of_shift, of_scale
        if mode == GradientMode.NONE:
            continue
        factor = p[scale + c] * inverse
        mean_grad = of_shift / count
        slope = of_scale / count * inverse
        for r in range(size):
            v, grad, out = run(a, x + r * row, n), run(d, y + r * row, n), run(d, x + r * row, n)
            if mode == GradientMode.ASSIGN:
                for i in range(n):
                    out[i] = factor * (grad[i] - mean_grad - (v[i] - mean) * slope)
            else:
                for i in range(n):
                    out[i] += factor * (grad[i] - mean_grad - (v[i] - mean) * slope)


@kernel
def relu_forward(op: np.void, a: Float32Array, batch: int) -> None:
    """Rectify."""
    src, dst, channels, size = op["src"], op["dst"], op["in_channels"], op["size"]
    n, row = size * batch, (size + 2) * batch
    for c in range(channels):
        x, y = first_row(src, c, size, batch), first_row(dst, c, size, batch)
        for r in range(size):
            v, out = run(a, x + r * row, n), run(a, y + r * row, n)
            for i in range(n):
                out[i] = np.float32(0) if v[i] <= 0 else v[i]


@kernel
def relu_backward(op: np.void, a: Float32Array, d: Float32Array, batch: int) -> None:
    """Let the gradient through where the output is above zero."""
    src, dst, channels, size, mode = op["src"], op["dst"], op["in_channels"], op["size"], op["mode"]
    n, row = size * batch, (size + 2) * batch
    if mode == GradientMode.NONE:
        return
    for c in range(channels):
        x, y = first_row(src, c, size, batch), first_row(dst, c, size, batch)
        for r in range(size):
            v, grad, out = run(a, y + r * row, n), run(d, y + r * row, n), run(d, x + r * row, n)
            for i in range(n):
                through = np.float32(0) if v[i] <= 0 else grad[i]
                out[i] = through if mode == GradientMode.ASSIGN else out[i] + through


@kernel
def pool_forward(op: np.void, a: Float32Array, batch: int) -> None:
    """Take the maximum of every 2x2 square; a last odd row or column is left out."""
    src, dst, channels, size = op["src"], op["dst"], op["in_channels"], op["size"]
    row, half = (size + 2) * batch, size // 2
    for c in range(channels):
        x, y = first_row(src, c, size, batch), first_row(dst, c, half, batch)
        for r in range(half):
            for q in range(half):
                at = x + 2 * r * row + 2 * q * batch
                x0, x1 = run(a, at, batch), run(a, at + batch, batch)
                x2, x3 = run(a, at + row, batch), run(a, at + row + batch, batch)
                out = run(a, y + r * (half + 2) * batch + q * batch, batch)
                for i in range(batch):
                    upper = x1[i] if x1[i] > x0[i] else x0[i]
                    lower = x3[i] if x3[i] > x2[i] else x2[i]
                    out[i] = lower if lower > upper else upper


@kernel
def pool_backward(op: np.void, a: Float32Array, d: Float32Array, batch: int) -> None:
    """Give each gradient to the first of the four that is the maximum; the others get zero."""
    src, dst, channels, size = op["src"], op["dst"], op["in_channels"], op["size"]
    n, row, half = size * batch, (size + 2) * batch, size // 2
    zero = np.float32(0)
    for c in range(channels):
        x, y = first_row(src, c, size, batch), first_row(dst, c, half, batch)
        if size % 2:
            for r in range(size):
                fill(run(d, x + r * row, n), zero)
        for r in range(half):
            for q in range(half):
                at = x + 2 * r * row + 2 * q * batch
                to = y + r * (half + 2) * batch + q * batch
                x0, x1 = run(a, at, batch), run(a, at + batch, batch)
                x2 = run(a, at + row, batch)
                top, grad = run(a, to, batch), run(d, to, batch)
                d0, d1 = run(d, at, batch), run(d, at + batch, batch)
                d2, d3 = run(d, at + row, batch), run(d, at + row + batch, batch)
                for i in range(batch):
                    is0 = x0[i] == top[i]
                    is1 = x1[i] == top[i] and not is0
                    is2 = x2[i] == top[i] and not is0 and not is1
                    d0[i] = grad[i] if is0 else zero
                    d1[i] = grad[i] if is1 else zero
                    d2[i] = grad[i] if is2 else zero
                    d3[i] = zero if is0 or is1 or is2 else grad[i]


@kernel
def average(a: Float32Array, src: int, dst: int, channels: int, size: int, batch: int) -> None:
    """Pool over pixels. (channels, size + 2, size + 2, batch) -> (channels, batch)."""
    row = (size + 2) * batch
    share = np.float32(1) / np.float32(size * size)
    for c in range(channels):
        x, out = first_row(src, c, size, batch), run(a, dst + c * batch, batch)
        fill(out, np.float32(0))
        for r in range(size):
            for q in range(size):
                add_scaled(out, run(a, x + r * row + q * batch, batch), share)


@kernel
def spread_average(
    d: Float32Array, src: int, dst: int, channels: int, size: int, batch: int, mode: int
) -> None:
    """Give every pixel of `src` its share of the gradient of its average at `dst`."""
    row = (size + 2) * batch
    share = np.float32(1) / np.float32(size * size)
    for c in range(channels):
        x, grad = first_row(src, c, size, batch), run(d, dst + c * batch, batch)
        for r in range(size):
            for q in range(size):
                out = run(d, x + r * row + q * batch, batch)
                if mode == GradientMode.ASSIGN:
                    fill(out, np.float32(0))
                add_scaled(out, grad, share)


@kernel
def affine_forward(
    a: Float32Array,
    p: Float32Array,
    src: int,
    dst: int,
    cin: int,
    cout: int,
    batch: int,
    weight: int,
    stride: int,
    bias: int,
) -> None:
    """Map (cin, batch) to (cout, batch)."""
    for j in range(cout):
        out = run(a, dst + j * batch, batch)
        fill(out, p[bias + j])
        for c in range(cin):
            add_scaled(out, run(a, src + c * batch, batch), p[weight + j * stride + c])


@kernel
def affine_backward(
    a: Float32Array,
    d: Float32Array,
    p: Float32Array,
    g: Float32Array,
    src: int,
    dst: int,
    cin: int,
    cout: int,
    batch: int,
    weight: int,
    stride: int,
    bias: int,
) -> None:
    """Write the gradients of weights, bias and input."""
    fill(run(d, src, cin * batch), np.float32(0))
    for j in range(cout):
        grad = run(d, dst + j * batch, batch)
        g[bias + j] = total_of(grad)
        for c in range(cin):
            g[weight + j * stride + c] = dot(grad, run(a, src + c * batch, batch))
            add_scaled(run(d, src + c * batch, batch), grad, p[weight + j * stride + c])


@kernel
def excite_forward(op: np.void, a: Float32Array, p: Float32Array, batch: int) -> None:
    """Squeeze and excite; `aux` holds pooled, map 1, its silu, map 2 and its tanh."""
    src, dst, channels, hidden, size, aux, w1, stride1, b1, w2, stride2, b2 = (
        op["src"], op["dst"], op["in_channels"], op["hidden"], op["size"], op["aux"],
        op["weight"], op["stride"], op["bias"], op["weight_2"], op["stride_2"], op["bias_2"],
    )  # fmt: skip
    z1, h = aux + channels * batch, aux + (channels + hidden) * batch
    z2, e = aux + (channels + 2 * hidden) * batch, aux + (2 * channels + 2 * hidden) * batch
    average(a, src, aux, channels, size, batch)
    affine_forward(a, p, aux, z1, channels, hidden, batch, w1, stride1, b1)
    for i in range(hidden * batch):
        a[h + i] = a[z1 + i] / (1 + math.exp(-a[z1 + i]))
    affine_forward(a, p, h, z2, hidden, channels, batch, w2, stride2, b2)
    for i in range(channels * batch):
        a[e + i] = math.tanh(a[z2 + i])
    row = (size + 2) * batch
    for c in range(channels):
        factor = run(a, e + c * batch, batch)
        x, y = first_row(src, c, size, batch), first_row(dst, c, size, batch)
        for r in range(size):
            for q in range(size):
                at = r * row + q * batch
                v, out = run(a, x + at, batch), run(a, y + at, batch)
                for i in range(batch):
                    out[i] = v[i] * factor[i]


@kernel
def excite_backward(
    op: np.void, a: Float32Array, d: Float32Array, p: Float32Array, g: Float32Array, batch: int
) -> None:
    """Write the gradients of both maps and of the input."""
    src, dst, channels, hidden, size, aux, w1, stride1, b1, w2, stride2, b2, mode = (
        op["src"], op["dst"], op["in_channels"], op["hidden"], op["size"], op["aux"],
        op["weight"], op["stride"], op["bias"], op["weight_2"], op["stride_2"], op["bias_2"],
        op["mode"],
    )  # fmt: skip
    z1, h = aux + channels * batch, aux + (channels + hidden) * batch
    z2, e = aux + (channels + 2 * hidden) * batch, aux + (2 * channels + 2 * hidden) * batch
    row = (size + 2) * batch
    for c in range(channels):
        factor, of_factor = run(a, e + c * batch, batch), run(d, z2 + c * batch, batch)
        fill(of_factor, np.float32(0))
        x, y = first_row(src, c, size, batch), first_row(dst, c, size, batch)
        for r in range(size):
            for q in range(size):
                at = r * row + q * batch
                v, grad, out = run(a, x + at, batch), run(d, y + at, batch), run(d, x + at, batch)
                for i in range(batch):
                    of_factor[i] += grad[i] * v[i]
                if mode != GradientMode.NONE:
                    for i in range(batch):
                        through = grad[i] * factor[i]
                        out[i] = through if mode == GradientMode.ASSIGN else out[i] + through
        for i in range(batch):
            of_factor[i] *= 1 - factor[i] * factor[i]
    affine_backward(a, d, p, g, h, z2, hidden, channels, batch, w2, stride2, b2)
    for i in range(hidden * batch):
        s = 1 / (1 + math.exp(-a[z1 + i]))
        d[z1 + i] = d[h + i] * np.float32(s * (1 + a[z1 + i] * (1 - s)))
    affine_backward(a, d, p, g, aux, z1, channels, hidden, batch, w1, stride1, b1)
    if mode != GradientMode.NONE:
        spread_average(d, src, aux, channels, size, batch, GradientMode.ACCUMULATE)


@kernel
def tanh_of(out: Float32Array, x: Float32Array) -> None:
    """Write tanh(x), by a rational function that a loop can vectorise.

    Within 5e-7 of the true value, like Eigen's, whose coefficients these are.
    """
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
def tanh_forward(op: np.void, a: Float32Array, batch: int) -> None:
    """Replace features by their tanh."""
    src, channels, size = op["src"], op["in_channels"], op["size"]
    row = (size + 2) * batch
    for c in range(channels):
        for y in range(size):
            x = run(a, first_row(src, c, size, batch) + y * row, size * batch)
            tanh_of(x, x)


@kernel
def gate_forward(op: np.void, a: Float32Array, p: Float32Array, batch: int) -> None:
    """Put the pooled features at `aux` and the gate, (batch,), behind them."""
    src, channels, size, aux, weight, bias = (
        op["src"], op["in_channels"], op["size"], op["aux"], op["weight"], op["bias"],
    )  # fmt: skip
    average(a, src, aux, channels, size, batch)
    gate = aux + channels * batch
    affine_forward(a, p, aux, gate, channels, 1, batch, weight, channels, bias)
    for i in range(batch):
        a[gate + i] = 1 / (1 + math.exp(-a[gate + i]))


@kernel
def mix_forward(op: np.void, a: Float32Array, alpha: np.float32, batch: int) -> None:
    """H + alpha * r; see `slots`. For MULTIPLY, tanh(d) replaces d at `branch`."""
    src, branch, dst, channels, size, blend, aux = (
        op["src"], op["branch"], op["dst"], op["in_channels"], op["size"], op["blend"], op["aux"],
    )  # fmt: skip
    row = (size + 2) * batch
    gate = run(a, aux + channels * batch, batch)
    for c in range(channels):
        x, v = first_row(src, c, size, batch), first_row(branch, c, size, batch)
        y = first_row(dst, c, size, batch)
        for r in range(size):
            h, out = run(a, x + r * row, size * batch), run(a, y + r * row, size * batch)
            residual = run(a, v + r * row, size * batch)
            if alpha == 0:
                copy(out, h)
            elif blend == Blend.ADD:
                for i in range(len(h)):
                    out[i] = h[i] + alpha * residual[i]
            elif blend == Blend.MULTIPLY:
                for i in range(len(h)):
                    out[i] = h[i] + alpha * h[i] * residual[i]
            else:
                for q in range(size):
                    for i in range(batch):
                        k = q * batch + i
                        out[k] = h[k] + alpha * gate[i] * residual[k]


@kernel
def mix_backward(
    op: np.void,
    a: Float32Array,
    d: Float32Array,
    p: Float32Array,
    g: Float32Array,
    alpha: np.float32,
    beta: np.float32,
    batch: int,
) -> None:
    """Gradients of features, branch and gate, with beta in place of alpha towards the seed."""
    src, branch, dst, channels, size, blend, aux, weight, bias, is_isolated = (
        op["src"], op["branch"], op["dst"], op["in_channels"], op["size"],
        op["blend"], op["aux"], op["weight"], op["bias"], op["is_isolated"] != 0,
    )  # fmt: skip
    row = (size + 2) * batch
    gate, of_gate = run(a, aux + channels * batch, batch), run(d, aux + channels * batch, batch)
    if blend == Blend.GATE:
        fill(of_gate, np.float32(0))
    for c in range(channels):
        x, v = first_row(src, c, size, batch), first_row(branch, c, size, batch)
        y = first_row(dst, c, size, batch)
        for r in range(size):
            n = size * batch
            h, grad = run(a, x + r * row, n), run(d, y + r * row, n)
            residual, of_residual = run(a, v + r * row, n), run(d, v + r * row, n)
            of_h = run(d, x + r * row, n)
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
                for q in range(size):
                    for i in range(batch):
                        k = q * batch + i
                        of_h[k] = grad[k]
                        of_residual[k] = beta * grad[k] * gate[i]
                        of_gate[i] += beta * grad[k] * residual[k]
    if blend == Blend.GATE:
        for i in range(batch):
            of_gate[i] *= gate[i] * (1 - gate[i])
        at = aux + channels * batch
        affine_backward(a, d, p, g, aux, at, channels, 1, batch, weight, channels, bias)
        if not is_isolated:
            spread_average(d, src, aux, channels, size, batch, GradientMode.ACCUMULATE)


@kernel
def classify(
    op: np.void, a: Float32Array, p: Float32Array, batch: int, labels: IntArray
) -> tuple[float, int]:
    """Return summed loss and number of hits of images with a label, which is not negative.

    The softmax is left behind the pooled features at `aux`.
    """
    src, channels, size, classes, aux, weight, stride, bias = (
        op["src"], op["in_channels"], op["size"], op["out_channels"], op["aux"], op["weight"],
        op["stride"], op["bias"],
    )  # fmt: skip
    average(a, src, aux, channels, size, batch)
    logits = aux + channels * batch
    affine_forward(a, p, aux, logits, channels, classes, batch, weight, stride, bias)
    loss, hits = 0.0, 0
    for i in range(batch):
        best = 0
        for k in range(1, classes):
            if a[logits + k * batch + i] > a[logits + best * batch + i]:
                best = k
        top = a[logits + best * batch + i]
        own = a[logits + max(labels[i], 0) * batch + i] - top
        total = np.float32(0)
        for k in range(classes):
            value = np.float32(math.exp(a[logits + k * batch + i] - top))
            a[logits + k * batch + i] = value
            total += value
        for k in range(classes):
            a[logits + k * batch + i] /= total
        if labels[i] >= 0:
            loss += math.log(total) - own
            hits += best == labels[i]
    return loss, hits


@kernel
def classify_backward(
    op: np.void,
    a: Float32Array,
    d: Float32Array,
    p: Float32Array,
    g: Float32Array,
    batch: int,
    labels: IntArray,
) -> None:
    """Gradients of the mean loss, after `classify` on the same features."""
    src, channels, size, classes, aux, weight, stride, bias = (
        op["src"], op["in_channels"], op["size"], op["out_channels"], op["aux"], op["weight"],
        op["stride"], op["bias"],
    )  # fmt: skip
    logits = aux + channels * batch
    share = np.float32(1) / np.float32(batch)
    for k in range(classes):
        for i in range(batch):
            hit = np.float32(labels[i] == k)
            d[logits + k * batch + i] = (a[logits + k * batch + i] - hit) * share
    affine_backward(a, d, p, g, aux, logits, channels, classes, batch, weight, stride, bias)
    spread_average(d, src, aux, channels, size, batch, GradientMode.ASSIGN)
