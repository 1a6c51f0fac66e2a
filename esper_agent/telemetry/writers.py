"""Logs of a run: files that are only appended to, TensorBoard, and Weights & Biases.

No file ever ends in a part of a record. Nothing is dropped: a record that cannot be written waits.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
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


class JsonLines(Log):
    """File with one JSON object per line, each with a key `step`."""

    def add(self, *rows: Mapping[str, Any]) -> None:
        """Write rows."""
        lines = [json.dumps(row, allow_nan=False, separators=(",", ":")) + "\n" for row in rows]
        self.append("".join(lines).encode())

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

    def add_text(self, step: int, tag: str, text: str) -> None:
        """Write a text, which TensorBoard shows in Markdown."""
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
        value = Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
        self.append(self._encode(step=step, summary=Summary(value=[value])))

    def _encode(self, **fields: Any) -> bytes:
        """Return an event with its length and checksums."""
        buffer = io.BytesIO()
        RecordWriter(buffer).write(Event(wall_time=time.time(), **fields).SerializeToString())
        return buffer.getvalue()


class WandbLog:
    """Run of Weights & Biases, which continues under the same id when training is resumed.

    Args:
        directory: Directory of the run; its name is the name and the id there.
        project: Project.
        entity: User or team; None for the default one.
        config: Arguments of the training.

    Raises:
        ImportError: If the package wandb is not installed.
        OSError: If the run cannot be started there.
    """

    def __init__(
        self, directory: Path, project: str, entity: str | None, config: dict[str, Any]
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                'track: expected the package wandb; install it with pip install "esper-env[track]"'
            ) from error
        name = directory.resolve().name
        try:
            self._run = wandb.init(
                project=project,
                entity=entity,
                name=name,
                id=f"{name}-{config['seed']}",
                resume="allow",
                config=config,
                dir=directory,
            )
        except (wandb.Error, ValueError) as error:
            # Without an account, or with a name that is not allowed.
            raise OSError(
                f"track: expected a run of Weights & Biases, got {error}; log in with wandb login, "
                "or set WANDB_MODE=offline"
            ) from error

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        self._run.log(dict(metrics), step=step)

    def alert(self, title: str, text: str) -> None:
        """Send an alert."""
        self._run.alert(title=title, text=text)

    def close(self) -> None:
        """Upload what is left."""
        self._run.finish()
