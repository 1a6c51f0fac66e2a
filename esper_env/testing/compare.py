"""Bitwise comparison of nested values, and access to the global random state of the process."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from gymnasium import spaces

ARRAY_SPACES = (spaces.Box, spaces.MultiDiscrete, spaces.MultiBinary)


def misfit(space: spaces.Space[Any], value: Any) -> str | None:
    """Return why a value is not an element of a space or has another dtype, None if it fits."""
    if isinstance(space, ARRAY_SPACES) and not isinstance(value, np.ndarray):
        return f"expected a NumPy array, got {value!r}"
    if isinstance(space, ARRAY_SPACES) and value.dtype != space.dtype:
        return f"expected dtype {space.dtype}, got {value.dtype}"
    parts: Iterable[tuple[spaces.Space[Any], Any]] = ()
    if isinstance(space, spaces.Dict) and isinstance(value, dict):
        parts = [(space[key], value[key]) for key in space if key in value]
    elif isinstance(space, spaces.Tuple) and isinstance(value, tuple):
        parts = zip(space, value, strict=False)
    for part in parts:
        problem = misfit(*part)
        if problem is not None:
            return problem
    return None if value in space else f"expected an element of {space}, got {value!r}"


def leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the path and the value of each leaf of nested dicts, sequences and object arrays."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from leaves(part, f"{name}[{key!r}]")
    elif isinstance(value, (tuple, list)) or (isinstance(value, np.ndarray) and value.dtype == "O"):
        for i, part in enumerate(value):
            yield from leaves(part, f"{name}[{i}]")
    else:
        yield name, value


def difference(expected: Any, actual: Any, name: str) -> str | None:
    """Return a description of the first bitwise difference of two nested values, None if equal."""
    a, b = dict(leaves(expected, name)), dict(leaves(actual, name))
    if a.keys() != b.keys():
        return f"{name}: expected {sorted(a.keys() - b.keys())}, got {sorted(b.keys() - a.keys())}"
    for path, x in a.items():
        y = b[path]
        if _is_bitwise_equal(x, y):
            continue
        if isinstance(x, np.ndarray) and x.ndim > 0 and np.shape(y) == x.shape:
            i = next(i for i in range(len(x)) if not _is_bitwise_equal(x[i], y[i]))
            path, x, y = f"{path}[{i}]", x[i], y[i]
        return f"{path}: expected {x!r}, got {y!r}"
    return None


def _is_bitwise_equal(a: Any, b: Any) -> bool:
    if isinstance(a, (np.ndarray, np.generic, float)):
        a, b = np.asarray(a), np.asarray(b)
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    return type(a) is type(b) and bool(a == b)


def global_random_state() -> dict[str, Any]:
    """Return the states of the global random generators of this process."""
    state: dict[str, Any] = {
        "random": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        state["torch"] = torch.get_rng_state().numpy()
        if torch.cuda.is_initialized():
            state["cuda"] = [s.numpy() for s in torch.cuda.get_rng_state_all()]
    return state


def set_global_random_state(state: dict[str, Any]) -> None:
    """Restore a state that `global_random_state` returned."""
    random.setstate(state["random"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch = sys.modules.get("torch")
    if torch is not None and "torch" in state:
        torch.set_rng_state(torch.from_numpy(state["torch"]))
        if "cuda" in state:
            torch.cuda.set_rng_state_all([torch.from_numpy(s) for s in state["cuda"]])
