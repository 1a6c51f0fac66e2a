"""How loops are compiled and kept on disk."""

from __future__ import annotations

import importlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from esper_env import jit
from esper_env.rng import make_key, mix, number_at, uniform


@jit.entry_point
def numbers_of(keys: np.ndarray, count: int) -> np.ndarray:  # type: ignore[type-arg]
    result = np.empty((len(keys), count))
    for i in range(len(keys)):
        for k in range(count):
            result[i, k] = number_at(keys[i], np.uint64(k))
    return result


def test_a_shared_formula_gives_the_same_for_arrays_and_compiled() -> None:
    keys = make_key(np.arange(5))
    np.testing.assert_array_equal(numbers_of(keys, 7), uniform(keys, 7))
    assert isinstance(mix(keys), np.ndarray), "it stays a plain function"


def test_compiled_code_older_than_a_source_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numba looks at the file of the entry point alone; here another file has changed."""
    source, module = tmp_path / "inlined.py", Path(__file__).stem
    source.touch()
    monkeypatch.setattr(jit, "_sources", {source})
    old, new, other = (
        tmp_path / f"{module}.numbers_of-1.old.nbi",
        tmp_path / f"{module}.numbers_of-1.new.nbc",
        tmp_path / f"{module}.other-1.nbi",
    )
    now = source.stat().st_mtime
    for file, age in ((old, now - 1), (new, now + 1), (other, now - 1)):
        file.touch()
        os.utime(file, (age, age))
    jit._forget_outdated(tmp_path, numbers_of.py_func)  # type: ignore[attr-defined]
    assert [file.exists() for file in (old, new, other)] == [False, True, True]


def test_a_change_far_below_an_entry_point_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The changed function is inlined into another one, whose file stays as it is."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(jit, "_sources", set())
    head = "from esper_env.jit import entry_point, inlined\n"
    results = []
    for number in (1, 2):
        texts = {
            "far_below": f"@inlined\ndef constant():\n    return {number}\n",
            "between": "from far_below import constant\n"
            "@inlined\ndef passed_on():\n    return constant()\n",
            "above": "from between import passed_on\n"
            "@entry_point\ndef asked():\n    return passed_on()\n",
        }
        for name, text in texts.items():
            sys.modules.pop(name, None)
            if not (tmp_path / f"{name}.py").exists() or name == "far_below":
                (tmp_path / f"{name}.py").write_text(head + text)
        age = time.time() - 20 + 10 * number
        os.utime(tmp_path / "far_below.py", (age, age))
        importlib.invalidate_caches()
        results.append(importlib.import_module("above").asked())
    for name in texts:
        del sys.modules[name]
    assert results == [1, 2]


@dataclass
class Pair:
    first: int
    second: int


def test_records_have_the_fields_of_their_dataclass_and_names_of_their_own() -> None:
    record = jit.record_type("PairRecord", __name__, Pair)
    assert record(*vars(Pair(1, 2)).values()) == (1, 2)
    assert record._fields == ("first", "second")
    with pytest.raises(AssertionError, match="PairRecord"):
        jit.record_type("PairRecord", __name__, Pair)
