"""Logs of a run: files that are only appended to, and never end in a part of a record."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class Log:
    """File to which whole records are appended; it never ends in a part of one.

    A record that cannot be written waits, and is written with the next one.

    Args:
        path: The file. Its folder is not created.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting = b""

    def append(self, record: bytes = b"") -> None:
        """Write a record and those that wait; raises `OSError` if that fails now."""
        self._waiting += record
        if not self._waiting:
            return
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(file).st_size
            try:
                view = memoryview(self._waiting)
                while view:
                    view = view[os.write(file, view) :]
            except OSError:
                os.ftruncate(file, size)
                raise
            self._waiting = b""
        finally:
            os.close(file)

    def sync(self) -> None:
        """Wait until all records are on the disk; raises `OSError` if that fails."""
        self.append()
        if self._path.exists():
            file = os.open(self._path, os.O_RDWR)
            try:
                os.fsync(file)
            finally:
                os.close(file)


class MetricsLog(Log):
    """File with one JSON object per line."""

    def add(self, row: dict[str, float]) -> None:
        """Write a row."""
        self.append((json.dumps(row, allow_nan=False) + "\n").encode())

    def cut(self, step: int) -> None:
        """Remove all rows after a step, and an unfinished line."""
        if not self._path.exists():
            return
        kept = 0
        with self._path.open("r+b") as file:
            for line in file:
                try:
                    is_kept = line.endswith(b"\n") and json.loads(line)["step"] <= step
                except ValueError:
                    is_kept = False
                if not is_kept:
                    break
                kept += len(line)
            file.truncate(kept)


class Board(Log):
    """File of TensorBoard events, written at once and without a thread of its own.

    Args:
        directory: Directory of the run. Every process writes a file of its own.
        first_step: TensorBoard discards the events of earlier files from this step on.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        super().__init__(directory / f"events.out.tfevents.{time.time_ns():020d}")
        start = SessionLog(status=SessionLog.START)
        self._waiting = self._encode(file_version="brain.Event:2")
        self._waiting += self._encode(step=first_step, session_log=start)

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of a step."""
        values = [Summary.Value(tag=n, simple_value=v) for n, v in metrics.items()]
        self.append(self._encode(step=step, summary=Summary(value=values)))

    def _encode(self, **fields: Any) -> bytes:
        """Return an event with its length and checksums."""
        buffer = io.BytesIO()
        RecordWriter(buffer).write(Event(wall_time=time.time(), **fields).SerializeToString())
        return buffer.getvalue()
