"""Plain loops compiled for this processor: at the first start of all, then kept on disk.

A function that is compiled must not call what is compiled on its own: an entry point is called from
Python, and all that it calls is compiled into it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import namedtuple
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.extending import intrinsic, register_jitable

from esper_env import config
from esper_env.config import IntArray

Plain = TypeVar("Plain", bound=Callable[..., Any])

_sources = {Path(config.__file__), Path(__file__)}
"""Files of all that is compiled, and of the enumerations it holds as constants."""

_record_names: set[str] = set()


def inlined(function: Callable[..., Any], fastmath: Set[str] = frozenset()) -> Callable[..., Any]:
    """Compile into whatever calls it; nothing is kept on disk.

    Numba would not notice there that something compiled into this function has changed. Nothing but
    entry points is called at run time: two callers would each have their own optimised copy, and
    which one a process links would decide the last bits.

    Args:
        function: Loops over arrays and numbers.
        fastmath: Freedom of the compiler with floating-point numbers, in LLVM's words; without
            any, results are those of the formulas as written.
    """
    _sources.add(Path(function.__code__.co_filename))
    compiled: Callable[..., Any] = numba.njit(
        function, nogil=True, error_model="numpy", fastmath=set(fastmath), forceinline=True
    )
    return compiled


def shared(function: Plain) -> Plain:
    """Leave a formula as it is, for arrays, and let compiled code use it too, for numbers."""
    _sources.add(Path(function.__code__.co_filename))
    plain: Plain = register_jitable(forceinline=True)(function)
    return plain


def _count_up(context: Any, counter: Any, by: Any) -> Any:
    del context, by

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.atomic_rmw("add", array.data, arguments[1], "seq_cst")

    return numba.types.int64(counter, numba.types.int64), generate


count_up = cast(Callable[[IntArray, int], int], intrinsic(_count_up))
"""Return the first number of an array, and add to it, as one operation among all threads.

For compiled code. What a thread wrote before it counted, others see when they have counted."""


def record_type(name: str, module: str, source: type) -> Any:
    """Make a named tuple with the fields of a dataclass, which compiled code cannot read itself.

    Args:
        name: Different from all others: numba takes records of one name for the same type at a
            call, and each call then costs 0.1 ms more.
        module: Where the result is a global of this name, so that compiled code finds it again.
        source: The dataclass.
    """
    assert name not in _record_names, name
    _record_names.add(name)
    return namedtuple(name, [f.name for f in dataclasses.fields(source)], module=module)


def entry_point(
    function: Callable[..., Any], fastmath: Set[str] = frozenset()
) -> Callable[..., Any]:
    """Compile at the first call of all, with everything it calls; the result is kept on disk.

    Args:
        function: Loops over arrays and numbers, or tuples of them. It can call what is `inlined`.
        fastmath: See `inlined`.
    """
    _sources.add(Path(function.__code__.co_filename))
    compiled: Any = numba.njit(
        function, nogil=True, cache=True, error_model="numpy", fastmath=set(fastmath)
    )
    _forget_outdated(Path(compiled.stats.cache_path), function)
    result: Callable[..., Any] = compiled
    return result


def announce(function: Callable[..., Any]) -> None:
    """Say that a first call will take long, if an entry point has not been compiled yet."""
    if not _compiled_files(Path(function.stats.cache_path), function):  # type: ignore[attr-defined]
        print("esper_env: compiling for this processor, once; about 30 s", file=sys.stderr)


def _forget_outdated(folder: Path, function: Any) -> None:
    """Remove compiled code that is older than one of the sources.

    Numba looks only at the file of an entry point, not at those of what is compiled into it.
    """
    newest = max(source.stat().st_mtime for source in _sources)
    for file in _compiled_files(folder, function):
        if file.stat().st_mtime < newest:
            file.unlink(missing_ok=True)


def _compiled_files(folder: Path, function: Any) -> list[Path]:
    module = Path(function.__code__.co_filename).stem
    return list(folder.glob(f"{module}.{function.__qualname__}-*.nb*"))
