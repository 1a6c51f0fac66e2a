"""A training and its report in unusual surroundings: the same results as in usual ones.

The default suite has one process in all surroundings at once. `pytest -m long` has one process for
each, and those that compile everything, which takes minutes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium as gym
import pytest

import esper_agent
import esper_env
from benchmarks.kill_runs import results_of, small_training
from esper_agent import ppo_lstm, report
from tests.builders import SMALL, play

ROOT = Path(__file__).parent.parent
CODE = "import sys; from tests.test_surroundings import main; main(sys.argv[1])"
POWERS = "-dac_override,-dac_read_search,-fowner"
"""Capabilities with which root writes where nobody else may."""
COMPILING = "compiling for this processor"
NOT_KEPT = "compiled functions cannot be kept on disk"

C_LOCALE = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
SURROUNDINGS: dict[str, tuple[list[str], dict[str, str]]] = {
    "C locale": ([], C_LOCALE),
    "TERM=dumb": ([], {"TERM": "dumb"}),
    "no TERM": ([], {"TERM": ""}),
    "one column": ([], {"COLUMNS": "1", "LINES": "1"}),
    "-O": (["-O"], {}),
    "-OO": (["-OO"], {}),
    "PYTHONHASHSEED=1": ([], {"PYTHONHASHSEED": "1"}),
    "PYTHONHASHSEED=2": ([], {"PYTHONHASHSEED": "2"}),
}
"""Options of Python and environment variables."""


def hash_of_results(folder: Path) -> str:
    """Train, write the report and step an environment; return a hash of all results."""
    run = ppo_lstm.train(small_training(folder / "run"))
    report.write(report.Args(runs=(run,)))
    results = results_of(run)
    envs = gym.make_vec("esper_env:Esper-Digits-v0", num_envs=2, **SMALL)
    envs.reset(seed=0)
    observations = [step[0].tolist() for step in play(envs.unwrapped, 6)]
    weights = sorted((name, data.hex()) for name, data in results.pop("weights").items())
    content = json.dumps([weights, results, observations], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def main(folder: str) -> None:
    """Write the hash of all results to a file of a folder."""
    Path(folder, "hash").write_text(hash_of_results(Path(folder)))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    return hash_of_results(tmp_path_factory.mktemp("expected"))


def copy_packages(folder: Path, *, compiled: bool) -> Path:
    """Return a read-only folder with copies of both packages, with or without compiled code."""
    for package in (esper_env, esper_agent):
        source = Path(str(package.__file__)).parent
        ignored = shutil.ignore_patterns() if compiled else shutil.ignore_patterns("*.nbc")
        shutil.copytree(source, folder / source.name, ignore=ignored)
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    return folder


def read_only_home(folder: Path) -> dict[str, str]:
    """Return environment variables for a home that nothing can be written to."""
    folder.mkdir()
    folder.chmod(0o555)
    return {"HOME": str(folder), "XDG_CACHE_HOME": ""}


def without_powers() -> list[str]:
    """Return a command to put before others, after which root must obey file modes too."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root can write everywhere, and setpriv is missing")
    return ["setpriv", f"--bounding-set={POWERS}", f"--inh-caps={POWERS}"]


def run_in(
    folder: Path, options: list[str], environment: dict[str, str], packages: Path = ROOT
) -> tuple[str, str]:
    """Call `main` in a process with a terminal; return the hash and what the terminal got.

    Args:
        folder: Folder for everything that the process writes; it is made.
        options: Options of Python.
        environment: Environment variables to add.
        packages: Folder of the packages.
    """
    folder.mkdir()
    terminal, other_side = pty.openpty()
    process = subprocess.Popen(
        [*without_powers(), sys.executable, "-P", "-B", *options, "-c", CODE, str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=other_side,
        stderr=other_side,
        env=os.environ | {"PYTHONPATH": f"{packages}:{ROOT}"} | environment,
        cwd=folder,
    )
    os.close(other_side)
    printed = b""
    with contextlib.suppress(OSError):  # At the end, nobody has the other side any more.
        while part := os.read(terminal, 1 << 16):
            printed += part
    os.close(terminal)
    text = printed.decode(errors="replace")
    assert process.wait() == 0, text
    assert "Traceback" not in text
    return (folder / "hash").read_text(), text


def test_all_surroundings_at_once_change_nothing(tmp_path: Path, expected: str) -> None:
    """Read-only package and no home, C locale, dumb terminal, another hash seed."""
    packages = copy_packages(tmp_path / "site", compiled=True)
    environment = C_LOCALE | {"TERM": "dumb", "PYTHONHASHSEED": "1"}
    environment |= read_only_home(tmp_path / "home")
    found, text = run_in(tmp_path / "out", [], environment, packages)
    assert found == expected
    assert "\x1b" not in text, "a dumb terminal knows no control sequences"
    assert "step 30" in text
    assert COMPILING not in text
    assert "Warning" not in text


@pytest.mark.long
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_each_of_the_surroundings_changes_nothing(name: str, tmp_path: Path, expected: str) -> None:
    options, environment = SURROUNDINGS[name]
    found, text = run_in(tmp_path / "out", options, environment)
    assert found == expected
    assert "Warning" not in text


@pytest.mark.long
def test_a_read_only_package_without_a_home_compiles_at_every_start(
    tmp_path: Path, expected: str
) -> None:
    packages = copy_packages(tmp_path / "site", compiled=False)
    home = read_only_home(tmp_path / "home")
    found, text = run_in(tmp_path / "out", [], home, packages)
    assert found == expected
    assert text.count(NOT_KEPT) == 1


@pytest.mark.long
def test_two_processes_that_compile_at_once_end_the_same(tmp_path: Path, expected: str) -> None:
    """They write to one empty cache, which a third process then uses."""
    environment = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(run_in, tmp_path / name, [], environment) for name in "ab"]
    for run in both:
        found, text = run.result()
        assert found == expected
        assert COMPILING in text
    found, text = run_in(tmp_path / "c", [], environment)
    assert found == expected
    assert COMPILING not in text


@pytest.mark.long
def test_another_processor_compiles_its_own_code(tmp_path: Path) -> None:
    """Results may differ from those of this processor, but not from start to start."""
    environment = {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "NUMBA_CPU_NAME": "generic"}
    first, text = run_in(tmp_path / "first", [], environment)
    assert COMPILING in text
    second, text = run_in(tmp_path / "second", [], environment)
    assert COMPILING not in text
    assert first == second
