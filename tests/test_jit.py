"""How functions are compiled, and when their compiled code on disk is used again."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import numba
import numpy as np
import pytest

import esper_env
from esper_env import jit
from esper_env.rng import make_key, mix, number_at, uniform

SOURCES = {
    "below": """from enum import IntEnum
from typing import NamedTuple
import numpy as np
from functools import partial
from esper_env.jit import inlined, shared
class Colour(IntEnum):
    RED = 1
class Pair(NamedTuple):
    first: int
    second: int
FACTOR = 2
TABLE = np.array([10, 20])
ITEM = np.dtype([("first", np.int64), ("second", np.int8)])
@inlined
def scaled(x, by=1):
    '''A docstring.'''
    return x * FACTOR * by  # A comment.
@shared
def shifted(x):
    return x + Colour.RED
def make_adder(number):
    @inlined
    def added(x):
        return x + number
    return added
added = make_adder(4)
""",
    "between": """import below
from below import Pair, shifted
from esper_env.jit import inlined
@inlined
def passed_on(x):
    return below.scaled(x)
@inlined
def of_pair(x):
    pair = Pair(x, 3)
    return pair.first - pair.second
""",
    "above": """import numpy as np
import between
import below
from esper_env.jit import entry_point
@entry_point
def scale(x):
    return between.passed_on(x)
@entry_point
def shift(x):
    return between.shifted(x)
@entry_point
def look_up(x):
    return below.TABLE[x]
@entry_point
def subtract(x):
    return between.of_pair(x)
@entry_point
def measure(x):
    return np.zeros(x, below.ITEM).itemsize
@entry_point
def add(x):
    return below.added(x)
@entry_point
def first_of(pair):
    return pair.first
""",
}


class Modules:
    """Modules in a folder or an archive, which are imported again at each run.

    Args:
        folder: Where they are written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in SOURCES.items():
            (folder / f"{name}.py").write_text(text)

    def edit(self, name: str, old: str, new: str) -> None:
        """Replace a text in a module."""
        file = self.folder / f"{name}.py"
        text = file.read_text()
        assert text.count(old) == 1, old
        file.write_text(text.replace(old, new))

    def load(self) -> ModuleType:
        """Import all again, and return the module with the entry points."""
        for name in SOURCES:
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return importlib.import_module("above")

    def environment(self) -> dict[str, str]:
        """Return environment variables with which another process finds the modules."""
        path = os.pathsep.join([str(self.folder), str(Path(esper_env.__file__).parents[1])])
        return {"PYTHONPATH": path, "NUMBA_CACHE_DIR": numba.config.CACHE_DIR}

    def run(self) -> tuple[dict[str, int], set[str]]:
        """Call all entry points; return their results and the names of the compiled ones."""
        above = self.load()
        pair = above.below.Pair(5, 7)
        results, compiled = {}, set()
        for name in RESULTS:
            function = getattr(above, name)
            results[name] = int(function(pair if name == "first_of" else 1))
            if sum(function.stats.cache_misses.values()):
                compiled.add(name)
        return results, compiled


SWAPPED = {"subtract": 2, "first_of": 7}
RESULTS = {
    "scale": 2,
    "shift": 2,
    "look_up": 20,
    "subtract": -2,
    "add": 5,
    "measure": 9,
    "first_of": 5,
}


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Modules:
    """The modules and an empty cache, of which nothing is compiled."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"), raising=False)
    monkeypatch.setattr(jit, "_warned", [])
    monkeypatch.syspath_prepend(tmp_path)
    return Modules(tmp_path)


def kept(folder: Path) -> list[Path]:
    """Return the files of compiled code."""
    return sorted(folder.rglob("*.nbc"))


@pytest.mark.parametrize(
    ("module", "old", "new", "changed"),
    [
        ("below", "# A comment.", "# Another comment.\n", {}),
        ("below", "A docstring.", "Another docstring.", {}),
        ("below", "FACTOR = 2", "\n\nOTHER = 4\nFACTOR = 2", {}),
        ("below", "FACTOR = 2", "FACTOR = 3", {"scale": 3}),
        ("below", "by=1", "by=3", {"scale": 6}),
        ("below", "x * FACTOR * by", "x * FACTOR - by", {"scale": 1}),
        ("below", "@inlined\ndef sc", "@partial(inlined, is_called=True)\ndef sc", {"scale": 2}),
        ("below", "RED = 1", "RED = 2", {"shift": 3}),
        ("below", "x + Colour", "x - Colour", {"shift": 0}),
        ("below", "make_adder(4)", "make_adder(5)", {"add": 6}),
        ("below", "np.int8", "np.int16", {"measure": 10}),
        ("below", "[10, 20]", "[10, 30]", {"look_up": 30}),
        ("below", "first: int\n    second", "second: int\n    first", SWAPPED),
        ("between", "below.scaled(x)", "below.scaled(x, 5)", {"scale": 10}),
        ("above", "between.passed_on(x)", "between.passed_on(x + 1)", {"scale": 4}),
    ],
)  # fmt: skip
def test_an_edit_compiles_what_it_reaches_and_nothing_else(
    modules: Modules, module: str, old: str, new: str, changed: dict[str, int]
) -> None:
    assert modules.run() == (RESULTS, set(RESULTS))
    assert modules.run() == (RESULTS, set())
    modules.edit(module, old, new)
    assert modules.run() == (RESULTS | changed, set(changed))
    assert modules.run() == (RESULTS | changed, set())


def test_code_of_former_sources_is_removed(modules: Modules) -> None:
    modules.run()
    before = kept(modules.folder)
    modules.edit("below", "FACTOR = 2", "FACTOR = 3")
    modules.run()
    after = kept(modules.folder)
    assert len(before) == len(after) == len(RESULTS)
    assert len(set(before) - set(after)) == 1


def test_file_times_do_not_matter(modules: Modules) -> None:
    """The clock was an hour ahead; then a source is replaced by an older one."""
    modules.run()
    source, now = modules.folder / "below.py", (modules.folder / "below.py").stat().st_mtime
    os.utime(source, (now + 3600, now + 3600))
    for file in kept(modules.folder):
        os.utime(file, (now - 3600, now - 3600))
    assert modules.run() == (RESULTS, set())
    modules.edit("below", "FACTOR = 2", "FACTOR = 5")
    os.utime(source, (now - 7200, now - 7200))
    assert modules.run() == (RESULTS | {"scale": 5}, {"scale"})


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:-1] + b"?", bytes.lower]
)
def test_a_damaged_file_is_replaced(
    modules: Modules, damage: Callable[[bytes], bytes], recwarn: pytest.WarningsRecorder
) -> None:
    modules.run()
    file = kept(modules.folder)[0]
    file.write_bytes(damage(file.read_bytes()))
    results, compiled = modules.run()
    assert (results, len(compiled)) == (RESULTS, 1)
    assert modules.run() == (RESULTS, set())
    assert not recwarn.list


def test_code_with_addresses_is_compiled_at_every_start(modules: Modules) -> None:
    """Numba compiles the address of a large array in, not its numbers."""
    modules.edit("below", "[10, 20]", "[10, 20] + 200_000 * [0]")
    with pytest.warns(UserWarning, match="look_up") as caught:
        assert modules.run() == (RESULTS, set(RESULTS))
    assert len(caught) == 1
    assert modules.run() == (RESULTS, {"look_up"})


def test_a_file_of_another_user_is_no_error(modules: Modules) -> None:
    """A folder in its place can be neither read nor replaced, even by an administrator."""
    modules.run()
    file = kept(modules.folder)[0]
    file.unlink()
    file.mkdir()
    with pytest.warns(UserWarning, match="NUMBA_CACHE_DIR") as caught:
        assert modules.run()[0] == RESULTS
    assert len(caught) == 1


@pytest.mark.parametrize("user", ["{}/file", "relative"])
def test_without_a_writable_folder_there_is_one_warning(
    modules: Modules, monkeypatch: pytest.MonkeyPatch, user: str
) -> None:
    """Without a home the user's path is relative; it does not mean the current folder."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", user.format(modules.folder))
    monkeypatch.chdir(modules.folder)
    for name in ("__pycache__", "file"):
        (modules.folder / name).touch()
    with pytest.warns(UserWarning, match="NUMBA_CACHE_DIR") as caught:
        runs = [modules.run() for _ in range(2)]
    assert runs == [(RESULTS, set(RESULTS))] * 2
    assert len(caught) == 1
    assert not (modules.folder / "relative").exists()


def test_without_an_environment_variable_files_lie_beside_the_bytecode(
    modules: Modules, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    modules.run()
    assert len(kept(modules.folder / "__pycache__")) == len(RESULTS)
    assert modules.run() == (RESULTS, set())


def test_sources_in_an_archive_are_kept_in_the_cache_of_the_user(
    modules: Modules, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(modules.folder / "user"))
    with zipfile.ZipFile(modules.folder / "archive.zip", "w") as archive:
        for name in SOURCES:
            archive.write(modules.folder / f"{name}.py", f"{name}.py")
            (modules.folder / f"{name}.py").unlink()
    monkeypatch.syspath_prepend(modules.folder / "archive.zip")
    assert modules.run() == (RESULTS, set(RESULTS))
    assert modules.run() == (RESULTS, set())
    assert len(kept(modules.folder / "user" / "esper")) == len(RESULTS)


@pytest.mark.parametrize(
    ("place", "name"), [("compiler.CompileResult", "_rebuild"), ("serialize", "dumps")]
)
def test_a_numba_without_the_private_names_compiles_at_every_start(
    modules: Modules, monkeypatch: pytest.MonkeyPatch, place: str, name: str
) -> None:
    monkeypatch.delattr(f"numba.core.{place}.{name}")
    with pytest.warns(UserWarning, match=numba.__version__) as caught:
        runs = [modules.run() for _ in range(2)]
    assert runs == [(RESULTS, set(RESULTS))] * 2
    assert len(caught) == 1
    assert not kept(modules.folder)


def test_a_long_compilation_is_announced_only_if_it_comes(
    modules: Modules, capsys: pytest.CaptureFixture[str]
) -> None:
    for lines in (1, 0):
        above = modules.load()
        jit.announce(above.scale)
        assert not capsys.readouterr().err, "nothing is compiled yet"
        above.scale(1)
        above.shift(1)
        assert len(capsys.readouterr().err.splitlines()) == lines


def run_python(*arguments: str, **environment: str) -> str:
    """Return what a process prints."""
    done = subprocess.run(
        [sys.executable, "-P", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("options", "processor", "misses"), [(["-O"], "", 0), (["-OO"], "", 1), ([], "generic", 1)]
)
def test_another_process_uses_the_code_unless_processor_or_bytecode_differ(
    modules: Modules, options: list[str], processor: str, misses: int
) -> None:
    modules.run()
    code = "import sys, above; print(above.scale(1), sum(above.scale.stats.cache_misses.values()))"
    environment = modules.environment()
    if processor:
        environment["NUMBA_CPU_NAME"] = processor
    assert run_python(*options, "-c", code, **environment).split() == ["2", str(misses)]
    assert modules.run() == (RESULTS, set()), "both are kept"


def test_processes_that_compile_at_once_leave_whole_files(modules: Modules) -> None:
    code = "import above; print(above.scale(1), above.shift(1))"
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(run_python, "-c", code, **modules.environment()) for _ in range(3)]
    assert [run.result().split() for run in runs] == [["2", "2"]] * 3
    assert len(kept(modules.folder)) == 2
    assert not list(modules.folder.rglob("*.tmp"))
    assert modules.run()[1] == set(RESULTS) - {"scale", "shift"}


CONTENTS = """
import sys
from numba.extending import is_jitted
from esper_env import jit
for module in [m for name, m in sys.modules.items() if name.startswith("esper_env")]:
    for value in vars(module).values():
        if is_jitted(value) and "forceinline" not in value.targetoptions:
            print(value.py_func.__qualname__, module.__name__, jit._hash(jit._content(value, {})))
"""


def test_a_comment_in_the_package_compiles_nothing(tmp_path: Path) -> None:
    """An edit of what is compiled reaches the entry points that contain it, and no others."""
    package = tmp_path / "esper_env"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(esper_env.__file__).parent, package, ignore=ignored)

    def contents() -> set[str]:
        return set(run_python("-B", "-c", CONTENTS, PYTHONPATH=str(tmp_path)).splitlines())

    before = contents()
    for file in package.rglob("*.py"):
        file.write_text(
            re.sub(r"^( *)(return|for) ", r"\1# Why.\n\n\1\2 ", file.read_text(), flags=re.M)
        )
    assert contents() == before
    for name, old, new in (
        ("growth/lifecycle.py", "config.min_prune_age", "2 * config.min_prune_age"),
        ("rng.py", "DATA = 1", "DATA = 9"),
    ):
        text = (package / name).read_text()
        assert old in text
        (package / name).write_text(text.replace(old, new))
    changed = {line.split()[0] for line in before - contents()}
    assert changed == {"_fill_masks", "_draw"}
    # A plain function that writes code in the language of the compiler.
    file = package / "population/numba_engine/lanes.py"
    file.write_text(file.read_text().replace("builder.fptosi(x", "builder.fptoui(x"))
    changed = {line.split()[0] for line in before - contents()}
    assert "run_members" in changed
    assert not changed & {"_observe", "_plan", "_judge"}


def first_step() -> list[list[float]]:
    """Return the observations and rewards of an environment's first transition."""
    envs = gym.make_vec("esper_env:Esper-Digits-v0", num_envs=1)
    before, _ = envs.reset(seed=0)
    after, rewards, *_ = envs.step(np.zeros((1, 8), dtype=np.int64))
    return [before[0].tolist(), after[0].tolist(), rewards.tolist()]


def test_without_compilation_the_environment_steps_with_the_same_results() -> None:
    code = "from tests.test_jit import first_step; print(first_step())"
    root = str(Path(__file__).parents[1])
    options = ("-W", "error::RuntimeWarning", "-c", code)
    plain = ast.literal_eval(run_python(*options, PYTHONPATH=root, NUMBA_DISABLE_JIT="1"))
    for one, other in zip(plain, first_step(), strict=True):
        # Compiled sums are in another order.
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


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
