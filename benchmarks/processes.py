"""Worker processes that end with their parent, and directories that one process uses at a time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from filelock import FileLock, Timeout

INTERVAL = 0.1
"""Time between two looks at the parent [seconds]."""
LOCK = ".lock"
"""File that the user of a directory has locked."""


def end_with_parent(parent: int | None = None) -> None:
    """End this process at once when its parent has ended, also if the parent was killed.

    Linux could send a signal instead, but when the starting thread ends, not the process.

    Args:
        parent: Process id of the parent, which may have ended already. None for a process of
            `multiprocessing`, where a forkserver may be between it and its parent.
    """

    def watch() -> None:
        if parent is None:
            owner = multiprocessing.parent_process()
            assert owner is not None
            owner.join()
        while os.getppid() == parent:
            time.sleep(INTERVAL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def process_pool(jobs: int) -> ProcessPoolExecutor:
    """Return a pool of processes with one torch thread each, which end with this process."""
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin)


def _begin() -> None:
    import torch  # Not above: `compare_checkouts` loads this file before its first imports.

    end_with_parent()
    torch.set_num_threads(1)


@contextlib.contextmanager
def only_user(work_dir: Path) -> Iterator[None]:
    """Lock a directory, which is created if it does not exist.

    Raises:
        ValueError: If another process uses the directory.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work_dir / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"work_dir: expected a directory that no other process uses, but {work_dir} is in use; "
            "wait for that process, or choose another directory"
        ) from error
    try:
        yield
    finally:
        lock.release()
