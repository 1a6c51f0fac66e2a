"""Every function of vectors gives the same compiled as in plain Python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba.core.registry import cpu_target

from esper_env.config import Float32Array
from esper_env.jit import entry_point
from esper_env.population.numba_engine import lanes
from esper_env.population.numba_engine.lanes import LANES

X = np.linspace(-3, 3, LANES).astype(np.float32)
X[:4] = np.nan, 0.0, -np.inf, 2.0
Y = np.roll(X, 1)
TESTS = Path(__file__).parent
AVX2 = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma"}
ROOM = 5
"""Numbers of an array beside the vector."""


def compiled(function: Any, *arguments: Any) -> Float32Array:
    """Return a compiled function of vectors."""
    load, store = lanes.load, lanes.store_first

    @entry_point
    def one(out: Float32Array, x: Float32Array, y: Float32Array) -> None:
        store(out, 0, function(load(x, 0)), LANES)

    @entry_point
    def two(out: Float32Array, x: Float32Array, y: Float32Array) -> None:
        store(out, 0, function(load(x, 0), load(y, 0)), LANES)

    @entry_point
    def three(out: Float32Array, x: Float32Array, y: Float32Array) -> None:
        store(out, 0, function(load(x, 0), load(y, 0), load(x, 0)), LANES)

    @entry_point
    def four(out: Float32Array, x: Float32Array, y: Float32Array) -> None:
        store(out, 0, function(load(x, 0), load(y, 0), load(y, 0), load(x, 0)), LANES)

    out = np.zeros(LANES, dtype=np.float32)
    (one, two, three, four)[len(arguments) - 1](out, X, Y)
    return out


ARGUMENTS = {
    "add_product": (X, Y, X),
    "add": (X, Y),
    "subtract": (X, Y),
    "multiply": (X, Y),
    "divide": (X, Y),
    "at_most": (X, Y),
    "at_least": (X, Y),
    "floor": (X,),
    "where_larger": (X, Y, Y, X),
    "where_equal": (X, Y, Y, X),
    "where_positive": (X, Y, X),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_function_of_vectors_is_that_of_numpy(name: str) -> None:
    function, arguments = getattr(lanes, name), ARGUMENTS[name]
    with np.errstate(all="ignore"):
        expected = function.py_func(*arguments)
    # A product and a sum are rounded once or twice.
    np.testing.assert_allclose(compiled(function, *arguments), expected, rtol=3e-7)


@entry_point
def write_powers(out: Float32Array, x: Float32Array) -> None:
    lanes.store_first(out, 0, lanes.power_of_two(lanes.load(x, 0)), LANES)


def test_powers_of_two_are_exact() -> None:
    x = np.linspace(-126, 127, LANES).round().astype(np.float32)
    out = np.zeros_like(x)
    write_powers(out, x)
    np.testing.assert_array_equal(out, np.ldexp(np.float32(1), x.astype(int)))


@entry_point
def write_parts(out: Float32Array, x: Float32Array, at: int, count: int) -> float:
    value = lanes.load_first(x, at, count)
    lanes.store_first(out, at, value, count)
    lanes.store_first(out, len(x), lanes.first_of(lanes.splat(x[0]), count), LANES)
    total = lanes.sum_of(value)
    lanes.set_item(out, 0, lanes.item(x, 0))
    return float(total)


@pytest.mark.parametrize("count", [-2, 0, 1, LANES - 1, LANES, LANES + 3])
def test_lanes_from_a_count_on_are_neither_read_nor_written(count: int) -> None:
    x = np.arange(1, LANES + ROOM, dtype=np.float32)
    x[1 + max(0, min(count, LANES)) :] = np.nan  # What is not read cannot make a sum NaN.
    out = np.zeros(len(x) + LANES, dtype=np.float32)
    total = write_parts(out, x, 1, count)
    own = x[1 : 1 + max(0, min(count, LANES))]
    assert total == own.sum()
    expected = np.zeros_like(out)
    expected[0], expected[1 : 1 + len(own)] = x[0], own
    expected[len(x) : len(x) + len(own)] = x[0]
    np.testing.assert_array_equal(out, expected)


@pytest.mark.long
@pytest.mark.parametrize("processor", [{"NUMBA_CPU_NAME": "generic"}, AVX2])
def test_kernels_are_right_with_the_vectors_of_other_processors(processor: dict[str, str]) -> None:
    has_avx2 = "+avx2" in cpu_target.target_context.codegen().magic_tuple()[2]
    if processor is AVX2 and not has_avx2:
        pytest.skip("this processor has no AVX2")
    files = [str(TESTS / name) for name in ("test_lanes.py", "test_kernels.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not long", *files]
    subprocess.run(command, env=os.environ | processor, check=True)
