"""Vectors of `LANES` numbers in compiled code: a value that lies in registers.

The compiler vectorizes a loop, but it does not keep sums of several outputs in registers while it
goes through the inputs. With these functions a kernel does (see `kernels.correlate`). A processor
with AVX-512 has 32 registers of 16 numbers, one with AVX2 has 16 of 8.

Compiled code calls the generators below; plain Python, as in tests, calls the functions with NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.ir
import numba
import numpy as np
from numba.core import cgutils as _untyped_cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic, models, register_model

from esper_env.config import Float32Array

Lanes = Float32Array
"""A vector, for annotations."""

ir: Any = llvmlite.ir
_cgutils: Any = _untyped_cgutils
_models: Any = models
_numba: Any = numba
_types: Any = numba.types

_features = cpu_target.target_context.codegen().magic_tuple()[2]
LANES = 16 if "+avx512f" in _features else 8
"""Numbers in a vector: a register with AVX-512 or AVX2."""
HAS_MASKS = LANES == 16
"""Whether the processor masks lanes of a load or store at no cost, as with AVX-512."""
HAS_FUSED = "+fma" in _features or "+neon" in _features
"""Whether the processor multiplies and adds in one operation."""

_FLOAT, _INT = ir.FloatType(), ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_NUMBERS = ir.VectorType(_INT, LANES)
_MASK = ir.VectorType(ir.IntType(1), LANES)


class _LanesType(_types.Type):  # type: ignore[misc]
    """Numba's type of a vector."""

    def __init__(self) -> None:
        super().__init__(name=f"lanes({LANES})")


_lanes = _LanesType()
register_model(_LanesType)(lambda manager, kind: _models.PrimitiveModel(manager, kind, _VECTOR))


def _call(builder: Any, name: str, result: Any, *arguments: Any, **options: Any) -> Any:
    """Call a function of LLVM, which is part of the language."""
    signature = ir.FunctionType(result, [argument.type for argument in arguments])
    function = _cgutils.get_or_insert_function(builder.module, signature, name)
    return builder.call(function, arguments, **options)


def _pointer(context: Any, builder: Any, kind: Any, array: Any, at: Any) -> Any:
    """Return the address of the number at an index, as that of a vector."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), _VECTOR.as_pointer())


def _broadcast(builder: Any, value: Any, vector: Any) -> Any:
    """Return a vector with a number in all lanes."""
    nothing = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(ir.IntType(32), 0))
    lanes = ir.VectorType(ir.IntType(32), LANES)
    return builder.shuffle_vector(first, nothing, ir.Constant(lanes, [0] * LANES))


def _first(builder: Any, count: Any) -> Any:
    """Return a mask of the first `count` lanes."""
    index = ir.Constant(_NUMBERS, list(range(LANES)))
    return builder.icmp_signed("<", index, _broadcast(builder, count, _NUMBERS))


def _by_count(
    builder: Any, count: Any, work_of_all: Callable[[], Any], work_of_some: Callable[[], Any]
) -> Any:
    """Write work for the first `count` lanes, with a branch for all lanes where masks are slow.

    A masked store takes 12 cycles on AMD's processors with AVX2, a plain one takes one.
    """
    if HAS_MASKS:
        return work_of_some()
    is_whole = builder.icmp_signed(">=", count, ir.Constant(_INT, LANES))
    with builder.if_else(is_whole, likely=True) as (whole, part):
        with whole:
            results = [(work_of_all(), builder.block)]
        with part:
            results.append((work_of_some(), builder.block))
    if results[0][0] is None:
        return None
    result = builder.phi(_VECTOR)
    for value, block in results:
        result.add_incoming(value, block)
    return result


def _function(plain: Callable[..., Any], generator: Callable[..., Any]) -> Any:
    """Return what compiled code calls, or the plain function if nothing is compiled."""
    if _numba.config.DISABLE_JIT:
        return plain
    compiled: Any = intrinsic(generator)
    compiled.py_func = plain
    return compiled


def _load(context: Any, array: Any, at: Any) -> Any:
    del context, at

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.load(_pointer(context, builder, signature.args[0], *values), align=4)

    return _lanes(array, _types.int64), generate


def _load_plain(array: Float32Array, at: int) -> Float32Array:
    return _load_first_plain(array, at, LANES)


load: Callable[..., Lanes] = _function(_load_plain, _load)
"""Return the numbers of an array from an index on. The array must reach as far."""


def _load_first(context: Any, array: Any, at: Any, count: Any) -> Any:
    del context, at, count

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], *values[:2])

        def load_all() -> Any:
            return builder.load(pointer, align=4)

        def load_some() -> Any:
            others = ir.Constant(_VECTOR, [0.0] * LANES)
            mask, align = _first(builder, values[2]), ir.Constant(ir.IntType(32), 4)
            name = f"llvm.masked.load.v{LANES}f32.p0"
            return _call(builder, name, _VECTOR, pointer, align, mask, others)

        return _by_count(builder, values[2], load_all, load_some)

    return _lanes(array, _types.int64, _types.int64), generate


def _load_first_plain(array: Float32Array, at: int, count: int) -> Float32Array:
    result = np.zeros(LANES, dtype=array.dtype)
    found = array[at : at + min(count, LANES)]
    result[: len(found)] = found
    return result


load_first: Callable[..., Lanes] = _function(_load_first_plain, _load_first)
"""Return up to `count` numbers of an array from an index on, and zeros in all other lanes."""


def _store_first(context: Any, array: Any, at: Any, value: Any, count: Any) -> Any:
    del context, at, value, count

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], *values[:2])

        def store_all() -> None:
            builder.store(values[2], pointer, align=4)

        def store_some() -> None:
            mask, align = _first(builder, values[3]), ir.Constant(ir.IntType(32), 4)
            name = f"llvm.masked.store.v{LANES}f32.p0"
            _call(builder, name, ir.VoidType(), values[2], pointer, align, mask)

        _by_count(builder, values[3], store_all, store_some)
        return context.get_dummy_value()

    return _types.void(array, _types.int64, _lanes, _types.int64), generate


def _store_first_plain(array: Float32Array, at: int, value: Float32Array, count: int) -> None:
    array[at : at + min(count, LANES)] = value[:count]


store_first: Callable[..., None] = _function(_store_first_plain, _store_first)
"""Write up to `count` lanes into an array from an index on."""


def _splat(context: Any, value: Any) -> Any:
    del context, value

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        del context, signature
        return _broadcast(builder, values[0], _VECTOR)

    return _lanes(_types.float32), generate


splat: Callable[..., Lanes] = _function(lambda value: np.full(LANES, value), _splat)
"""Return a vector with a number in all lanes."""


def _first_of(context: Any, value: Any, count: Any) -> Any:
    del context, value, count

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        del context, signature
        return builder.select(_first(builder, values[1]), values[0], ir.Constant(_VECTOR, None))

    return _lanes(_lanes, _types.int64), generate


first_of: Callable[..., Lanes] = _function(
    lambda value, count: np.where(np.arange(LANES) < count, value, 0), _first_of
)
"""Return a vector with zeros in all lanes from `count` on."""


def _sum_of(context: Any, value: Any) -> Any:
    del context, value

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        del context, signature
        (total,), number = values, ir.IntType(32)
        # The upper half is added to the lower one until one number is left.
        for half in (LANES >> n for n in range(1, LANES.bit_length())):
            kind = ir.VectorType(number, half)
            lower, upper = (ir.Constant(kind, list(range(n, n + half))) for n in (0, half))
            parts = (builder.shuffle_vector(total, total, part) for part in (lower, upper))
            total = builder.fadd(*parts)
        return builder.extract_element(total, ir.Constant(number, 0))

    return _types.float32(_lanes), generate


sum_of: Callable[..., np.float32] = _function(np.sum, _sum_of)
"""Return the sum of all lanes."""


def _elementwise(
    plain: Callable[..., Any], build: Callable[..., Any], arguments: int
) -> Callable[..., Lanes]:
    """Return a function from vectors to a vector; `build` writes it in LLVM's language."""

    def typed() -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            del context, signature
            return build(builder, *values)

        return _lanes(*[_lanes] * arguments), generate

    generators: list[Callable[..., Any]] = [
        lambda context, x: typed(),
        lambda context, x, y: typed(),
        lambda context, x, y, z: typed(),
        lambda context, x, y, z, other: typed(),
    ]
    result: Callable[..., Lanes] = _function(plain, generators[arguments - 1])
    return result


def _by_name(name: str) -> Callable[..., Any]:
    """Return the builder of a function that LLVM has for vectors."""
    return lambda builder, *x: _call(builder, f"llvm.{name}.v{LANES}f32", _VECTOR, *x)


def _power_of_two(builder: Any, x: Any) -> Any:
    integers = ir.VectorType(ir.IntType(32), LANES)
    exponent = builder.add(builder.fptosi(x, integers), ir.Constant(integers, [127] * LANES))
    bits = builder.shl(exponent, ir.Constant(integers, [23] * LANES))
    return builder.bitcast(bits, _VECTOR)


def _add_product(builder: Any, total: Any, x: Any, y: Any) -> Any:
    if HAS_FUSED:
        return _by_name("fma")(builder, x, y, total)
    return builder.fadd(total, builder.fmul(x, y))


add_product = _elementwise(lambda total, x, y: total + x * y, _add_product, 3)
"""Return total + x * y, rounded once if the processor can."""
add = _elementwise(lambda x, y: x + y, lambda builder, x, y: builder.fadd(x, y), 2)
"""Return x + y."""
subtract = _elementwise(lambda x, y: x - y, lambda builder, x, y: builder.fsub(x, y), 2)
"""Return x - y."""
multiply = _elementwise(lambda x, y: x * y, lambda builder, x, y: builder.fmul(x, y), 2)
"""Return x * y."""
divide = _elementwise(lambda x, y: x / y, lambda builder, x, y: builder.fdiv(x, y), 2)
"""Return x / y."""
at_most = _elementwise(
    lambda x, limit: np.where(x > limit, limit, x),
    lambda builder, x, limit: builder.select(builder.fcmp_ordered(">", x, limit), limit, x),
    2,
)
"""Return the smaller one, or NaN where x is."""
at_least = _elementwise(
    lambda x, limit: np.where(x < limit, limit, x),
    lambda builder, x, limit: builder.select(builder.fcmp_ordered("<", x, limit), limit, x),
    2,
)
"""Return the larger one, or NaN where x is."""
floor = _elementwise(np.floor, _by_name("floor"), 1)
"""Return the largest integers that are not above x."""
power_of_two = _elementwise(np.exp2, _power_of_two, 1)
"""Return 2^n for integers n of -126 to 127."""
where_larger = _elementwise(
    lambda x, y, value, other: np.where(x > y, value, other),
    lambda builder, x, y, value, other: builder.select(
        builder.fcmp_ordered(">", x, y), value, other
    ),
    4,
)
"""Return `value` where x > y, else `other`."""
where_equal = _elementwise(
    lambda x, y, value, other: np.where(x == y, value, other),
    lambda builder, x, y, value, other: builder.select(
        builder.fcmp_ordered("==", x, y), value, other
    ),
    4,
)
"""Return `value` where x == y, else `other`."""
where_positive = _elementwise(
    lambda x, value, other: np.where(x <= 0, other, value),
    lambda builder, x, value, other: builder.select(
        builder.fcmp_unordered(">", x, ir.Constant(_VECTOR, None)), value, other
    ),
    3,
)
"""Return `value` where x > 0 or NaN, else `other`."""


def _element(context: Any, builder: Any, kind: Any, array: Any, at: Any) -> Any:
    """Return the address of the number at an index."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [at])


def _item(context: Any, array: Any, at: Any) -> Any:
    del context, at

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.load(_element(context, builder, signature.args[0], *values))

    return array.dtype(array, _types.int64), generate


item: Callable[..., Any] = _function(lambda array, at: array[at], _item)
"""Return array[at] of a contiguous array without a check for a negative index."""


def _set_item(context: Any, array: Any, at: Any, value: Any) -> Any:
    del context, at, value

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.store(values[2], _element(context, builder, signature.args[0], *values[:2]))
        return context.get_dummy_value()

    return _types.void(array, _types.int64, array.dtype), generate


set_item: Callable[..., None] = _function(
    lambda array, at, value: array.__setitem__(at, value), _set_item
)
"""Write array[at] of a contiguous array without a check for a negative index."""
