"""The backward pass of each kernel equals central finite differences, in float64.

The kernels run as plain Python; `test_population` compares the compiled ones with PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from esper_env.config import Blend, FloatArray, IntArray
from esper_env.population.numba_engine import kernels as k
from esper_env.population.numba_engine.kernels import OPERATION, GradientMode

BATCH = 2
SRC, DST, BRANCH, AUX = 0, 1000, 2000, 3000
WEIGHT, BIAS, WEIGHT_2, BIAS_2, NUMBERS = 0, 200, 210, 240, 250
"""Where regions of the arena and tensors of the parameters begin, and the number of parameters."""
STEP = 1e-5
TOLERANCE = 1e-6
"""Differences are exact to STEP^2 and to rounding / STEP; one kernel rounds a slope to float32."""
TOLERANCE_OF_TANH = 1e-4
"""The slope of `tanh_of` is that of the true tanh within this bound."""
LABELS = np.array([2, 0])
ALPHA = np.float64(0.7)


@dataclass(frozen=True)
class Case:
    """An operation with its inputs, outputs and trained parameters as indices."""

    forward: Callable[[Any, FloatArray, FloatArray], Any]
    backward: Callable[[Any, FloatArray, FloatArray, FloatArray, FloatArray], Any]
    fields: dict[str, int]
    inputs: IntArray
    outputs: IntArray
    parameters: IntArray
    modes: tuple[GradientMode, ...] = (GradientMode.ASSIGN,)
    tolerance: float = TOLERANCE


def region(offset: int, channels: int, side: int) -> IntArray:
    """Return the indices of a region's features inside the border."""
    shape = channels, side + 2, side + 2, BATCH
    return offset + np.arange(np.prod(shape)).reshape(shape)[:, 1:-1, 1:-1].reshape(-1)


def pooled(offset: int, channels: int) -> IntArray:
    """Return the indices of pooled features."""
    return offset + np.arange(channels * BATCH)


def tensors(outputs: int, inputs: int) -> tuple[dict[str, int], IntArray]:
    """Return fields of a weight and a bias, and the indices of both.

    The weights of two outputs are one number further apart than needed, as in a wider member.
    """
    weight = WEIGHT + (inputs + 1) * np.arange(outputs)[:, None] + np.arange(inputs)
    index = np.append(weight, BIAS + np.arange(outputs))
    return {"weight": WEIGHT, "stride": inputs + 1, "bias": BIAS}, index


def conv(
    cin: int, cout: int, width: int, groups: int = 1, bias: bool = True, side: int = 3
) -> Case:
    offsets, parameters = tensors(cout, cin // groups * width**2)
    if not bias:
        offsets["bias"], parameters = -1, parameters[:-cout]
    shape = {"in_channels": cin, "out_channels": cout, "side": side}
    return Case(
        lambda op, a, p: k.conv_forward(op, a, p, BATCH),
        lambda op, a, d, p, g: k.conv_backward(op, a, d, p, g, BATCH),
        {**shape, **offsets, "kernel_size": width, "groups": groups},
        region(SRC, cin, side),
        region(DST, cout, side),
        parameters,
        tuple(GradientMode),
    )


def norm(rectify: bool) -> Case:
    """All images in one chunk."""
    buffers = np.ones(4)

    def forward(op: Any, a: FloatArray, p: FloatArray) -> None:
        k.norm_measure(op, a, a, 0, BATCH)
        k.norm_finish(op, a, len(a), 1, buffers, BATCH)
        k.norm_forward(op, a, p, buffers, BATCH, True)

    def backward(op: Any, a: FloatArray, d: FloatArray, p: FloatArray, g: FloatArray) -> None:
        k.norm_backward_measure(op, a, d, d, 0, BATCH)
        k.norm_backward_finish(op, a, d, len(a), 1, p, g, BATCH)
        k.norm_backward(op, a, d, p, BATCH)

    return Case(
        forward,
        backward,
        {"in_channels": 2, "side": 3, "rectify": rectify, "running_var": 2, "bias": BIAS},
        region(SRC, 2, 3),
        region(DST, 2, 3),
        np.array([WEIGHT, WEIGHT + 1, BIAS, BIAS + 1]),
        tuple(GradientMode),
    )


def norm_pool() -> Case:
    """All images in one chunk; enough channels that some squares are cut off and others are not."""
    buffers = np.ones(8)

    def forward(op: Any, a: FloatArray, p: FloatArray) -> None:
        k.norm_measure(op, a, a, 0, BATCH)
        k.norm_finish(op, a, len(a), 1, buffers, BATCH)
        k.norm_pool_forward(op, a, p, buffers, BATCH, True)

    def backward(op: Any, a: FloatArray, d: FloatArray, p: FloatArray, g: FloatArray) -> None:
        k.norm_pool_backward_measure(op, a, d, d, p, 0, BATCH)
        k.norm_backward_finish(op, a, d, len(a), 1, p, g, BATCH)
        k.norm_pool_backward(op, a, d, p, BATCH)

    return Case(
        forward,
        backward,
        {"in_channels": 4, "side": 4, "running_var": 4, "bias": BIAS},
        region(SRC, 4, 4),
        region(DST, 4, 2),
        np.append(WEIGHT + np.arange(4), BIAS + np.arange(4)),
    )


def relu() -> Case:
    return Case(
        lambda op, a, _: k.relu_forward(op, a, BATCH),
        lambda op, a, d, *_: k.relu_backward(op, a, d, BATCH),
        {"in_channels": 2, "side": 3},
        region(SRC, 2, 3),
        region(DST, 2, 3),
        np.zeros(0, dtype=np.int64),
        tuple(GradientMode),
    )


def pool(side: int) -> Case:
    return Case(
        lambda op, a, _: k.pool_forward(op, a, BATCH),
        lambda op, a, d, *_: k.pool_backward(op, a, d, BATCH),
        {"in_channels": 2, "side": side},
        region(SRC, 2, side),
        region(DST, 2, side // 2),
        np.zeros(0, dtype=np.int64),
    )


def average() -> Case:
    sizes = SRC, DST, 2, 3, BATCH
    return Case(
        lambda _, a, __: k.average(a, *sizes),
        lambda op, _, d, *__: k.spread_average(d, *sizes, op.mode),
        {},
        region(SRC, 2, 3),
        pooled(DST, 2),
        np.zeros(0, dtype=np.int64),
        (GradientMode.ASSIGN, GradientMode.ACCUMULATE),
    )


def affine() -> Case:
    offsets, parameters = tensors(3, 2)
    sizes = SRC, DST, 2, 3, BATCH, *offsets.values()
    return Case(
        lambda _, a, p: k.affine_forward(a, p, *sizes),
        lambda _, a, d, p, g: k.affine_backward(a, d, p, g, *sizes),
        {},
        pooled(SRC, 2),
        pooled(DST, 3),
        parameters,
    )


def excite() -> Case:
    offsets, first = tensors(3, 2)
    offsets |= {"weight_2": WEIGHT_2, "stride_2": 4, "bias_2": BIAS_2}
    second = np.array([0, 1, 2, 4, 5, 6]) + WEIGHT_2
    return Case(
        lambda op, a, p: k.excite_forward(op, a, p, BATCH),
        lambda op, a, d, p, g: k.excite_backward(op, a, d, p, g, BATCH),
        {"in_channels": 2, "hidden": 3, "side": 3, **offsets},
        region(SRC, 2, 3),
        region(DST, 2, 3),
        np.concatenate([first, second, [BIAS_2, BIAS_2 + 1]]),
        tuple(GradientMode),
    )


def mix(blend: Blend) -> Case:
    """Blend with alpha and beta the same; otherwise the gradient is none of a function."""

    def forward(op: Any, a: FloatArray, p: FloatArray) -> None:
        if blend == Blend.MULTIPLY:
            k.tanh_forward(operation({**fields, "src": BRANCH}), a, BATCH)
        elif blend == Blend.GATE:
            k.gate_forward(op, a, p, BATCH)
        k.mix_forward(op, a, ALPHA, BATCH)

    fields = {"in_channels": 2, "side": 3, "blend": blend, "branch": BRANCH, "bias": BIAS}
    return Case(
        forward,
        lambda op, a, d, p, g: k.mix_backward(op, a, d, p, g, ALPHA, ALPHA, BATCH),
        fields,
        np.append(region(SRC, 2, 3), region(BRANCH, 2, 3)),
        region(DST, 2, 3),
        np.array([WEIGHT, WEIGHT + 1, BIAS] if blend == Blend.GATE else [], dtype=np.int64),
        tolerance=TOLERANCE_OF_TANH if blend == Blend.MULTIPLY else TOLERANCE,
    )


def classify() -> Case:
    """Three classes; the loss is the output."""
    offsets, parameters = tensors(3, 2)
    return Case(
        lambda op, a, p: k.classify(op, a, p, BATCH, LABELS)[0] / BATCH,
        lambda op, a, d, p, g: k.classify_backward(op, a, d, p, g, BATCH, LABELS, BATCH),
        {"in_channels": 2, "out_channels": 3, "side": 3, **offsets},
        region(SRC, 2, 3),
        np.zeros(0, dtype=np.int64),
        parameters,
    )


CASES = {
    "conv 1x1": conv(3, 2, 1),
    "conv 1x1, groups": conv(4, 4, 1, groups=2),
    "conv 3x3, pairs": conv(2, 4, 3),
    "conv 3x3, wide": conv(3, 3, 3, side=6),
    "conv 3x3, odd channels": conv(3, 3, 3, bias=False),
    "conv 3x3, groups": conv(4, 4, 3, groups=2),
    "conv 3x3, depthwise": conv(3, 3, 3, groups=3),
    "norm": norm(rectify=False),
    "norm and relu": norm(rectify=True),
    "norm, relu and pool": norm_pool(),
    "relu": relu(),
    "pool": pool(4),
    "pool, odd": pool(5),
    "average": average(),
    "affine": affine(),
    "excite": excite(),
    **{f"mix {blend.name}": mix(blend) for blend in Blend},
    "classify": classify(),
}


@pytest.fixture
def _plain_python(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, function in list(vars(k).items()):
        monkeypatch.setattr(k, name, getattr(function, "py_func", function))
    monkeypatch.setattr(k, "BAND", 6)  # A band has fewer rows than an image.


def operation(fields: dict[str, int]) -> Any:
    op = np.zeros(1, dtype=OPERATION)[0]
    for name, value in {"src": SRC, "dst": DST, "aux": AUX, **fields}.items():
        op[name] = value
    return op


@pytest.mark.usefixtures("_plain_python")
@pytest.mark.parametrize("name", CASES)
def test_the_backward_pass_is_the_gradient(name: str) -> None:
    """Gradient of a random combination of the outputs with respect to inputs and parameters."""
    case, rng = CASES[name], np.random.default_rng(0)
    a, d, p, g = np.zeros(4000), np.zeros(4000), rng.normal(size=NUMBERS), np.zeros(NUMBERS)
    a[case.inputs] = rng.normal(size=len(case.inputs))
    slope, before = rng.normal(size=len(case.outputs)), rng.normal(size=len(case.inputs))

    def loss() -> Any:
        features = a.copy()
        own = case.forward(operation(case.fields), features, p)
        return slope @ features[case.outputs] + (own or 0.0)

    def differences(array: FloatArray, index: IntArray) -> FloatArray:
        result = np.empty(len(index))
        for n, i in enumerate(index):
            value = array[i]
            array[i] = value + STEP
            result[n] = loss()
            array[i] = value - STEP
            result[n] = (result[n] - loss()) / (2 * STEP)
            array[i] = value
        return result

    of_inputs, of_parameters = differences(a, case.inputs), np.zeros(NUMBERS)
    of_parameters[case.parameters] = differences(p, case.parameters)
    case.forward(operation(case.fields), a, p)
    for mode in case.modes:
        d[case.inputs], d[case.outputs] = before, slope
        g[:] = 0
        case.backward(operation({**case.fields, "mode": mode}), a, d, p, g)
        expected = {
            GradientMode.NONE: before,
            GradientMode.ASSIGN: of_inputs,
            GradientMode.ACCUMULATE: before + of_inputs,
        }[mode]
        np.testing.assert_allclose(d[case.inputs], expected, atol=case.tolerance, err_msg=mode.name)
        np.testing.assert_allclose(g, of_parameters, atol=case.tolerance, err_msg=mode.name)
    elsewhere = np.setdiff1d(np.arange(AUX), np.append(case.inputs, case.outputs))
    assert not a[elsewhere].any()
    assert not d[elsewhere].any(), "borders stay zero"
