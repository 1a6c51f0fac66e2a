"""Decorators for compiled functions, and the cache that keeps them on disk.

An entry point is called from Python, and all that it calls is compiled into it. An entry point must
not call another entry point. Numba's own cache reads only the file of the entry point.
The cache here is keyed by all that the compiler reads: the bytecode of every function that is
compiled into an entry point, and the constants it refers to. Comments, docstrings and file times
do not count.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import pickle
import sys
import threading
import uuid
import warnings
from collections.abc import Callable
from enum import Enum
from operator import attrgetter
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba.extending import intrinsic, is_jitted, register_jitable

from esper_env.config import IntArray

Plain = TypeVar("Plain", bound=Callable[..., Any])

_numba: Any = numba
_SHARED_OPTIONS = {"forceinline": True}
_shared: set[Any] = set()
_warned: list[str] = []
_code_fields = attrgetter(
    *("co_code", "co_exceptiontable", "co_argcount", "co_flags"),
    *("co_names", "co_varnames", "co_cellvars", "co_freevars"),
)


def inlined(
    function: Callable[..., Any],
    *,
    has_one_call: bool = False,
    is_called: bool = False,
    counts_references: bool = True,
) -> Callable[..., Any]:
    """Compile a function into its callers; it is not kept on disk by itself.

    No formula is rearranged. Otherwise results could depend on the copy of a function that a
    process links: the one that was compiled with its caller, or the one by itself.

    Args:
        function: Loops over arrays and numbers.
        has_one_call: Whether one line calls the function. It is then inlined before optimization,
            and not optimized by itself first, which would take as long again for a large function.
            With several calls, type inference would take longer than this saves.
        is_called: Whether the function is called instead, because it is large.
        counts_references: Whether references to arrays are counted. Counting is slow in inner
            loops. Without it, a function cannot allocate an array nor return a part of one.
    """
    options: dict[str, Any] = {"inline": "always"} if has_one_call else {"forceinline": True}
    if is_called:
        options = {}
    compiled: Callable[..., Any] = _compiled(function, counts_references, **options)
    return compiled


def _compiled(function: Callable[..., Any], counts_references: bool, **options: Any) -> Any:
    if not counts_references:
        options["_nrt"] = False
    return numba.njit(function, nogil=True, error_model="numpy", **options)


def shared(function: Plain) -> Plain:
    """Leave a formula as it is, for arrays, and let compiled code call it too, for numbers."""
    _shared.add(function)
    plain: Plain = register_jitable(**_SHARED_OPTIONS)(function)
    return plain


def entry_point(
    function: Callable[..., Any], *, counts_references: bool = True
) -> Callable[..., Any]:
    """Compile a function and all that it calls at the first call; the result is kept on disk.

    Args:
        function: Loops over arrays and numbers, or tuples of them. It can call what is `inlined`.
        counts_references: See `inlined`.
    """
    if _numba.config.DISABLE_JIT:
        return np.errstate(all="ignore")(function)  # Compiled code does not warn either.
    compiled: Any = _compiled(function, counts_references)
    try:  # Numba's private names; where it no longer has them, nothing is kept.
        _, compiled._cache = compiled._cache, _Cache(compiled)
    except AttributeError as error:
        _warn(f"numba {numba.__version__}: {error}")
    result: Callable[..., Any] = compiled
    return result


def announce(function: Callable[..., Any]) -> None:
    """Print a line if an entry point has to be compiled at its first call, as that takes long."""
    cache = getattr(function, "_cache", None)
    if isinstance(cache, _Cache):
        cache.is_announced = True


def _count_up(context: Any, counter: Any, by: Any) -> Any:
    del context, by

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.atomic_rmw("add", array.data, arguments[1], "seq_cst")

    return numba.types.int64(counter, numba.types.int64), generate


_lock = threading.Lock()


def _count_up_uncompiled(counter: IntArray, by: int) -> int:
    with _lock:
        counter[0] += by
        return int(counter[0]) - by


count_up = cast(
    Callable[[IntArray, int], int],
    _count_up_uncompiled if _numba.config.DISABLE_JIT else intrinsic(_count_up),
)
"""Return the first number of an array, and add to it, as one operation among all threads.

For compiled code. What a thread wrote before it counted, others see when they have counted."""


class _Cache:
    """Compiled code of one entry point on disk; numba calls the methods.

    There is one file for each combination of argument types, processor and versions of numba and
    NumPy. Its name holds the hash of the sources and the hash of the rest.

    Args:
        compiled: The entry point.
    """

    def __init__(self, compiled: Any) -> None:
        source = Path(compiled.py_func.__code__.co_filename)
        name = compiled.py_func.__qualname__.replace("<", "").replace(">", "")
        self._compiled = compiled
        self._rebuild = _numba.core.compiler.CompileResult._rebuild
        self._dumps = _numba.core.serialize.dumps
        # Bytecode without docstrings numbers its constants in another way, so it has its own files.
        mode = ".opt-2" if sys.flags.optimize >= 2 else ""
        self._prefix = f"{source.stem}.{name}.{sys.implementation.cache_tag}{mode}-"
        self._names: dict[Any, tuple[str, str]] = {}
        self.cache_path = _folders(source.parent)
        self.is_announced = False

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """Return compiled code from disk, or None."""
        target_context.refresh()
        processor = target_context.codegen().magic_tuple()
        rest = numba.__version__, np.__version__, processor, _content(signature, {})
        sources = f"{self._prefix}{_hash(_content(self._compiled, {}))}-"
        self._names[signature] = sources, f"{sources}{_hash(rest)}.nbc"
        for folder in self.cache_path:
            data = _read(folder / self._names[signature][1])
            if data is not None:
                return self._rebuild(target_context, *pickle.loads(data))
        if self.is_announced:
            print("esper_env: compiling for this processor, once; about a minute", file=sys.stderr)
        return None

    def save_overload(self, signature: Any, result: Any) -> None:
        """Write compiled code into the first writable folder, and remove that of other sources."""
        sources, name = self._names[signature]
        if result.library.has_dynamic_globals:
            _warn(f"{name} contains an address in memory, as of a large constant")
            return
        data = self._dumps(result._reduce())
        problems = []
        for folder in self.cache_path:
            try:
                _write(folder / name, data)
            except OSError as error:
                problems.append(str(error))
                continue
            for file in folder.glob(glob.escape(self._prefix) + "*"):
                if not file.name.startswith(sources):
                    with contextlib.suppress(OSError):
                        file.unlink()
            return
        _warn("; ".join(problems))


def _folders(source: Path) -> list[Path]:
    """Return the folders for compiled code of a source folder, in the order to be tried."""
    name = f"{source.name}-{_hash(str(source))}"
    if _numba.config.CACHE_DIR:
        return [Path(_numba.config.CACHE_DIR, name)]
    user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    folders = [source / "__pycache__", user / "esper" / "compiled" / name]
    return [folder for folder in folders if folder.is_absolute()]  # No source file, or no home.


def _read(file: Path) -> bytes | None:
    """Return what `_write` wrote, or None if the file is missing, unreadable or damaged."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    return data[32:] if hashlib.sha256(data[32:]).digest() == data[:32] else None


def _write(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(hashlib.sha256(data).digest() + data)
        temporary.replace(file)  # Other processes see all of the file or none.
    finally:
        temporary.unlink(missing_ok=True)


def _warn(problem: str) -> None:
    if not _warned:
        warnings.warn(
            f"compiled functions cannot be kept on disk, so every start takes longer ({problem}); "
            "set the environment variable NUMBA_CACHE_DIR to a folder that you can write",
            stacklevel=3,
        )
    _warned.append(problem)


def _hash(content: Any) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:20]


def _content(value: Any, seen: dict[Any, int]) -> Any:
    """Return what the compiler reads of a value; its `repr` is the same in every process.

    Args:
        value: Something that compiled code refers to, or the type of an argument.
        seen: Functions that have been visited, numbered.
    """
    if is_jitted(value):
        options = tuple(sorted(value.targetoptions.items()))
        return _content_of_function(value.py_func, seen), _content(options, seen)
    if isinstance(value, _numba.extending._Intrinsic):
        return _content_of_function(value._defn, seen)
    if isinstance(value, FunctionType) and value in _shared:
        return _content_of_function(value, seen), _SHARED_OPTIONS
    if isinstance(value, np.ndarray | np.generic):
        return repr(value.dtype), value.shape, value.strides, value.tobytes()
    if isinstance(value, numba.types.Type):  # Names of fields are not in the name of a type.
        members = [_content(member, seen) for member in getattr(value, "types", ())]
        return str(value), _content(getattr(value, "instance_class", None), seen), members
    if isinstance(value, type):
        members = [*getattr(value, "__members__", {}).values()]
        return value.__module__, value.__qualname__, getattr(value, "_fields", ()), members
    if isinstance(value, tuple):
        return _content(type(value), seen), [_content(member, seen) for member in value]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, int | float | complex | str | bytes | Enum | np.dtype | None):
        return value
    return type(value).__qualname__, getattr(value, "__name__", "")


def _content_of_function(function: Any, seen: dict[Any, int]) -> Any:
    """Return the bytecode of a function, and the content of all that it refers to."""
    if function in seen:
        return seen[function]
    seen[function] = len(seen)
    codes = [function.__code__]
    for code in codes:  # Lambdas and comprehensions have code objects of their own.
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    names = sorted({name for code in codes for name in code.co_names + code.co_freevars})
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    scopes = [dict(zip(function.__code__.co_freevars, cells, strict=True)), function.__globals__]
    found = []
    # A name after a dot belongs to one of the modules. Looking it up in all of them finds too much
    # rather than too little: at worst, something is compiled once more.
    for scope in scopes:
        for name in (name for name in names if name in scope):
            value = scope[name]
            if isinstance(value, FunctionType) and value.__module__ == function.__module__:
                # What generates code, like `lanes`, calls plain functions.
                found.append((name, _content_of_function(value, seen)))
            elif not isinstance(value, ModuleType):
                found.append((name, _content(value, seen)))
            elif all(vars(value) is not known for known in scopes):
                scopes.append(vars(value))
    texts = []
    for code in codes:
        constants = tuple(None if c == function.__doc__ else c for c in code.co_consts)
        texts.append((_code_fields(code), _content(constants, seen)))
    defaults = _content(function.__defaults__, seen)
    return function.__module__, function.__qualname__, texts, defaults, found
