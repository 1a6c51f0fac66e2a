"""Working directories and worker processes of the benchmarks, when something is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ablations, learning
from benchmarks.processes import only_user

ROOT = Path(__file__).parent.parent
PATIENCE = 20.0
"""Time for a process to end on a busy machine [seconds]; it takes about 0.1."""

POOL = """
import os, time
from benchmarks.processes import process_pool
pool = process_pool(1)
pids = [pool.submit(os.getpid).result()]
pool.submit(time.sleep, 100)
"""
CHECKOUTS = """
import pathlib
from benchmarks.compare_checkouts import Worker
worker = Worker(pathlib.Path().resolve(), pathlib.Path("{cache}"), 1)
worker.send(what="nothing")
worker.receive()  # It has started.
worker.send(what="record", settings={{}}, num_envs=2, steps=10**6)
pids = [worker.process.pid]
"""
PEERS = """
from benchmarks.peers import TwoProcesses
pids = [process.pid for process in TwoProcesses("Esper-Digits-v0", 2, {{}}).processes]
"""


def is_running(pid: int) -> bool:
    """Return whether a process exists that is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("code", [POOL, CHECKOUTS, PEERS], ids=["pool", "checkouts", "peers"])
def test_workers_end_with_their_parent_that_is_killed(code: str, tmp_path: Path) -> None:
    code = code.format(cache=tmp_path) + "print(*pids, flush=True); time.sleep(100)\n"
    parent = subprocess.Popen(
        [sys.executable, "-c", "import time\n" + code],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert pids
    assert all(map(is_running, pids))
    parent.kill()
    parent.wait()  # Not `communicate`, because workers hold the same pipe.
    until = time.monotonic() + PATIENCE
    while any(map(is_running, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    running = list(filter(is_running, pids))
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    parent.stdout.close()
    assert running == []


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
