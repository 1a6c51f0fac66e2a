"""Working directories and worker processes of the benchmarks, when something is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ablations, learning
from benchmarks.processes import only_user

ROOT = Path(__file__).parent.parent
WORK = """
import os, sys, time
os.write(2, b"ready\\n")
time.sleep(100)
os.write(2, b"ended by itself\\n")
os._exit(0)
"""
POOL = f"""
from benchmarks.processes import process_pool
pool = process_pool(1)
pool.submit(exec, {WORK!r}).result()
"""
CHECKOUTS = """
import os, pathlib, time
from benchmarks.compare_checkouts import Worker
worker = Worker(pathlib.Path().resolve(), pathlib.Path("{folder}"), 1)
worker.send(what="nothing")
worker.receive()  # It has started.
worker.send(what="record", settings={}, num_envs=2, steps=3000)
os.write(2, b"ready\\n")
time.sleep(100)
"""
PEERS = """
import os, time
from benchmarks.peers import TwoProcesses
sides = TwoProcesses("Esper-Digits-v0", 2, {})
sides.reset(seed=0)
os.write(2, b"ready\\n")
time.sleep(100)
"""
KILLS = f"""
from benchmarks.kill_runs import in_process
in_process(exec, {WORK!r})
"""
MUTANTS = """
from pathlib import Path
from benchmarks.mutants import Area, run_tests
run_tests(Area((), ("test_of_a_mutant.py",), 1, True), Path("{folder}"), 1000)
"""
PARENTS = {
    "pool": POOL, "checkouts": CHECKOUTS, "peers": PEERS, "kills": KILLS, "mutants": MUTANTS,
}  # fmt: skip
"""Programs that start workers. Without their parent, workers end by an error, or by themselves and
say so."""


@pytest.mark.parametrize("name", PARENTS)
def test_workers_end_with_their_parent_that_is_killed(name: str, tmp_path: Path) -> None:
    # Workers inherit this pipe or open it, so its end comes when the last of them has ended.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(pipe, os.O_WRONLY)
    os.set_blocking(reader, True)
    test = f"import os\nos.dup2(os.open({str(pipe)!r}, os.O_WRONLY), 2)\n{WORK}"
    (tmp_path / "test_of_a_mutant.py").write_text(test)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENTS[name].replace("{folder}", str(tmp_path))],
        stderr=writer,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    os.close(writer)
    with open(reader) as lines:
        assert "ready\n" in lines
        parent.kill()
        rest = lines.read()
    parent.wait()
    assert "by itself" not in rest
    assert "Error" not in rest


@pytest.mark.parametrize("script", [learning, ablations], ids=["learning", "ablations"])
def test_two_calls_never_share_a_working_directory(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(script, "run", calls.append)
    monkeypatch.setattr("sys.argv", ["script", "--quick", "--work-dir", str(tmp_path)])
    with only_user(tmp_path):
        with pytest.raises(ValueError, match=r"no other process uses, but .* is in use; wait"):
            script.main()
        assert calls == []
    script.main()
    assert len(calls) == 1


def test_a_part_is_there_only_when_all_of_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full after three bytes, and then is not."""
    path, write = tmp_path / "parts" / "part.json", os.write

    def fill(file: int, content: Any) -> int:
        write(file, content[:3])
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fill)
        with pytest.raises(OSError, match="no space left"):
            learning.remember(path, lambda: {"score": 1.5})
    assert list(path.parent.iterdir()) == []
    assert learning.remember(path, lambda: {"score": 1.5}) == {"score": 1.5}
    assert json.loads(path.read_text()) == learning.remember(path, lambda: pytest.fail("again"))


def test_an_agent_without_its_last_file_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Any] = []

    class Pool:
        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *values: Any) -> None: ...

        def map(self, function: Any, runs: list[Any]) -> list[Any]:
            trained.extend(runs)
            return runs

    monkeypatch.setattr(learning, "process_pool", lambda jobs: Pool())
    runs = [learning.agent_args(learning.Args(), seed, tmp_path) for seed in (1, 2, 3)]
    for name in ("1/agent.safetensors", "2/agent.safetensors", "2/finished.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    learning.train_agents(runs, 1)
    assert trained == [runs[0], runs[2]]
