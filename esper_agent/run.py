"""A training as a process: its directory, logs, checkpoints, signals, and how it ends.

A directory holds one run, which a lock keeps to one process. `config.json` is its first file and
`finished.json` its last. Results do not depend on when checkpoints are written. This module knows
nothing of the algorithm.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import shutil
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from filelock import FileLock, Timeout
from torch import nn

from esper_agent.arguments import difference
from esper_agent.checkpoint import (
    CheckpointError,
    load_latest_checkpoint,
    save_checkpoint,
    write_json,
)
from esper_agent.command_line import exit_with, say
from esper_agent.networks import save_network
from esper_agent.telemetry.events import (
    AlertCleared,
    AlertRaised,
    CheckpointWritten,
    Evaluated,
    Event,
    RunStarted,
)
from esper_agent.telemetry.writers import Board, JsonLines, WandbLog

DIVERGED, NOT_SAVED = 3, 1
"""Exit codes of a run that diverged, and of one whose end could not be written."""
SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
"""Signals at which a run is saved. Windows has no SIGHUP."""
LOCK = ".lock"
"""File that the process of a run has locked."""


class Interrupted(SystemExit):
    """A signal ended the run after it was saved; the exit code is 128 plus its number."""


class DivergedError(ArithmeticError):
    """A metric or weight is not finite."""


class NotSavedError(OSError):
    """The end of a run could not be written."""


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Turn the ways in which a run goes wrong into one line on stderr and an exit code."""
    try:
        yield
    except DivergedError as error:
        exit_with(str(error), DIVERGED)
    except NotSavedError as error:
        exit_with(str(error), NOT_SAVED)


class Run:
    """One run in its directory, from its first file to its last.

    Use it as a context manager around the training loop: inside, a signal is noted and the run ends
    by `Interrupted` at the next `save_if_due`; a second signal ends the process at once.

    Attributes:
        directory: Directory of the run.
    """

    def __init__(
        self,
        directory: Path,
        config: dict[str, Any],
        identity: dict[str, Any],
        *,
        is_new: bool,
        changeable: tuple[str, ...] = (),
    ) -> None:
        """Create the directory of a new run, or open that of an unfinished one.

        Args:
            directory: Directory of the run.
            config: Result of `config_of`. It has `checkpoint_minutes` and `keep_checkpoints`.
            identity: Description of the environment, which checkpoints must share.
            is_new: Whether a run starts; else one continues.
            changeable: Arguments that may differ from those the run was started with.

        Raises:
            OSError: If the directory contains a run, or none; if another process has it; or if it
                cannot be written. Nothing is left behind.
            ValueError: If a run continues with other arguments than it was started with.
        """
        self.directory = directory = directory.expanduser()
        self._identity = json.loads(json.dumps(identity))
        self._interval_seconds = 60.0 * config["checkpoint_minutes"]
        self._keep = config["keep_checkpoints"]
        self._parts: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {}
        self._handlers: dict[int, Any] = {}
        self._signal: int | None = None
        self._is_training = True
        self._last_checkpoint: Path | None = None
        self._problems: list[str] = []
        self._step, self._best_score = 0, -math.inf
        self._lock = FileLock(directory / LOCK, timeout=0)
        self.carry("run", lambda: {"best_score": self._best_score}, self._set_state)
        if is_new:
            self._create(config)
        else:
            self._open(config, changeable)
        self._saved_at = time.monotonic()
        self._metrics = JsonLines(directory / "metrics.jsonl")
        self._events = JsonLines(directory / "events.jsonl")
        self._board = Board(directory, 0)
        self._config, self._is_new = config, is_new
        self._tracker: WandbLog | None = None

    def carry(
        self, name: str, get_state: Callable[[], Any], set_state: Callable[[Any], object]
    ) -> None:
        """Make the state of an object part of all checkpoints; call this before `restore`.

        Args:
            name: Name of the part.
            get_state: Returns a nested structure that `save_checkpoint` takes.
            set_state: Is called with that structure when a run continues.
        """
        self._parts[name] = get_state, set_state

    def restore(self) -> None:
        """Continue from the last checkpoint, if any, and cut the logs back to its step.

        A new run, and one that was killed before its first checkpoint, starts at the beginning.

        Raises:
            CheckpointError: If there are checkpoints, but none can be used.
        """
        try:
            loaded = load_latest_checkpoint(self.directory / "checkpoints", self._identity)
            if loaded is not None:
                if loaded.state.keys() != self._parts.keys():
                    parts = sorted(self._parts), sorted(loaded.state)
                    raise CheckpointError(loaded.path, f"the state of {parts[0]}", f"{parts[1]}")
                for name, (_, set_state) in self._parts.items():
                    set_state(loaded.state[name])
                self._step, self._last_checkpoint = loaded.step, loaded.path
        except BaseException:
            self._lock.release()
            raise
        for log in (self._metrics, self._events):
            log.cut(self._step)
        self._board = Board(self.directory, self._step + 1)
        started = RunStarted(
            step=self._step,
            is_resumed=not self._is_new,
            time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            versions=_versions(),
        )
        self._log_events([started])

    def track(self, project: str, entity: str | None) -> None:
        """Also log to Weights & Biases; if that cannot start, a new directory is removed again.

        Args:
            project: Project.
            entity: User or team; None for the default one.

        Raises:
            ImportError: If the package wandb is not installed.
            OSError: If the run cannot be started there.
        """
        try:
            self._tracker = WandbLog(self.directory, project, entity, self._config)
        except BaseException:
            if self._is_new:
                shutil.rmtree(self.directory / "wandb", ignore_errors=True)
                for name in ("config.json", "metrics.jsonl", "events.jsonl", LOCK):
                    (self.directory / name).unlink(missing_ok=True)
            self._lock.release()
            with contextlib.suppress(OSError):
                self.directory.rmdir()
            raise

    def __enter__(self) -> Run:
        """Note signals from now on. Only the main thread can; an ignored signal stays ignored."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Restore the handlers of signals and release the directory."""
        if isinstance(error, Interrupted):
            how = f"interrupted by {signal.Signals(int(error.code or 0) - 128).name}"
            say(f"{how} at step {self._step}; continue with --resume {self.directory}")
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._tracker is not None:
            self._tracker.close()
        self._lock.release()

    def check(self, step: int, problems: Sequence[str], events: Sequence[Event]) -> None:
        """Check that an iteration left everything finite, before anything of it is saved.

        Args:
            step: Env steps at the end of the iteration.
            problems: What is not finite, in words.
            events: Events of the iteration, which are written if the run ends here.

        Raises:
            DivergedError: If something is not finite.
        """
        if problems:
            self._log_events(events)
            good = f"the last good checkpoint is {self._last_checkpoint}"
            raise DivergedError(
                f"training diverged in the iteration that ends at step {step}: "
                f"{'; '.join(problems)}; "
                f"{good if self._last_checkpoint else 'there is no checkpoint yet'}; start a new "
                "run with a smaller --learning-rate or smaller coefficients"
            )

    def record(self, step: int, metrics: dict[str, float], events: Sequence[Event]) -> None:
        """Log the metrics and events of one iteration."""
        self._step = step
        self._try("metrics.jsonl", lambda: self._metrics.add({"step": step, **metrics}))
        self._try("the TensorBoard events", lambda: self._board.add(step, metrics))
        self._log_events(events)
        if self._tracker is not None:
            self._tracker.add(step, metrics)

    def _log_events(self, events: Sequence[Event]) -> None:
        """Log events; alerts go to all logs."""
        self._try("events.jsonl", lambda: self._events.add(*(e.to_row() for e in events)))
        for event in events:
            if not isinstance(event, (AlertRaised, AlertCleared)):
                continue
            text, name, step = "cleared", event.name, event.step
            if isinstance(event, AlertRaised):
                text = f"{event.severity}: {event.value:.4g} (threshold {event.threshold:.4g})"
                text += f"; {event.meaning}"
            self._try(
                "the TensorBoard events",
                lambda step=step, name=name, text=text: self._board.add_text(  # type: ignore[misc]
                    step, f"alerts/{name}", text
                ),
            )
            if self._tracker is not None and isinstance(event, AlertRaised):
                self._tracker.alert(name, text)

    def save_if_due(self, is_last: bool = False) -> None:
        """Write a checkpoint at regular intervals, at the end and after a signal.

        Raises:
            Interrupted: After a signal.
        """
        is_due = time.monotonic() - self._saved_at >= self._interval_seconds
        if is_due or is_last or self._signal is not None:
            self._save()
        if self._signal is not None:
            raise Interrupted(128 + self._signal)

    def keep_best(self, score: float, network: nn.Module) -> None:
        """Save a network in the folder `best` if its score is the highest so far."""
        if score > self._best_score:
            folder = self.directory / "best"

            def write() -> None:
                folder.mkdir(exist_ok=True)
                save_network(folder, network)

            if self._try("the best network", write):
                self._best_score = score

    def save_network(self, network: nn.Module) -> Path:
        """Save the trained network; return its directory, a temporary one if the disk is full.

        Raises:
            Interrupted: After a signal.
        """
        self._is_training = False
        if self._signal is not None:
            raise Interrupted(128 + self._signal)
        try:
            save_network(self.directory, network)
            return self.directory
        except OSError as error:
            directory = Path(tempfile.mkdtemp(prefix="esper-"))
            save_network(directory, network)
            self._problems.append(f"{error}; the trained network is in {directory}")
            say(f"{self.directory} is not writable; the trained network is in {directory}")
            return directory

    def record_evaluation(self, step: int, scores: dict[str, float]) -> None:
        """Log the mean score of each agent in an evaluation after a step."""
        self._log_events([Evaluated(step=step, scores=scores)])

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Enclose what follows the training, such as an evaluation; afterwards the run is finished.

        Raises:
            NotSavedError: If something of it could not be written; the run can be resumed.
        """
        try:
            yield
            for log in (self._metrics, self._events, self._board):
                log.sync()
            if not self._problems:
                write_json(self.directory / "finished.json", {"step": self._step})
        except OSError as error:
            self._problems.append(f"{error}")
        if self._problems:
            raise NotSavedError(
                f"the end of the run could not be written: {'; '.join(self._problems)}; free the "
                f"disk and continue with --resume {self.directory}"
            )

    # ------------------------------------------------------------------ private

    def _set_state(self, state: dict[str, Any]) -> None:
        self._best_score = state["best_score"]

    def _create(self, config: dict[str, Any]) -> None:
        """Create a directory with a config.json, or leave everything as it was."""
        directory, lock = self.directory, self.directory / LOCK
        missing = [path for path in (directory, *directory.parents) if not path.exists()]
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._acquire("--run-dir")
            unfinished = f"a run that is not finished; continue it with --resume {directory}, or"
            for name, content in (
                ("finished.json", "a finished run;"),
                ("config.json", unfinished),
                ("checkpoints", "checkpoints of a run without config.json;"),
            ):
                if (directory / name).exists():
                    problem = f"contains {content} choose another directory"
                    raise FileExistsError(f"--run-dir {directory} {problem}")
            write_json(directory / "config.json", config)
        except OSError as error:
            # The lock of another process stays, and with it the directory.
            if self._lock.is_locked and not (directory / "config.json").exists():
                lock.unlink()
            self._lock.release()
            with contextlib.suppress(OSError):
                for path in missing:
                    path.rmdir()
            if error.strerror is None:
                raise
            problem = f"is not writable ({error.strerror}); choose another directory"
            raise type(error)(f"--run-dir {directory} {problem}") from error

    def _open(self, config: dict[str, Any], changeable: tuple[str, ...]) -> None:
        """Open the directory of an unfinished run."""
        if (self.directory / "finished.json").exists():
            raise FileExistsError(
                f"--resume {self.directory}: expected an unfinished run, got one that is finished; "
                "start another with --run-dir"
            )
        known = json.loads((self.directory / "config.json").read_text())
        other = [n for n in config if n not in changeable and config[n] != known.get(n)]
        if other:
            shown = ", ".join(f"{difference(n, known.get(n), config[n])}" for n in other)
            raise ValueError(
                f"--resume {self.directory}: expected the arguments in its config.json, got "
                f"{shown}; leave them out"
            )
        self._acquire("--resume")

    def _acquire(self, flag: str) -> None:
        try:
            self._lock.acquire()
        except Timeout as error:
            raise BlockingIOError(
                f"{flag} {self.directory} is in use by another process; wait for it or stop it"
            ) from error

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; the second one has its default effect."""
        del frame
        if self._signal is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._signal = number
        if not self._is_training:
            # Everything is saved but the evaluation, which --resume repeats.
            raise Interrupted(128 + number)

    def _save(self) -> None:
        """Write a checkpoint. If that fails, the next one is tried after the usual time."""
        state = {name: get_state() for name, (get_state, _) in self._parts.items()}
        folder = self.directory / "checkpoints"

        def write() -> None:
            # First the logs: a run that continues from here would miss the rows that still wait.
            for log in (self._metrics, self._events, self._board):
                log.sync()
            path = save_checkpoint(folder, self._step, state, self._identity, self._keep)
            self._last_checkpoint = path

        if self._try("the checkpoint", write) and self._last_checkpoint is not None:
            path = str(self._last_checkpoint.relative_to(self.directory))
            self._log_events([CheckpointWritten(step=self._step, path=path)])
        self._saved_at = time.monotonic()

    def _try(self, name: str, write: Callable[[], object]) -> bool:
        """Write something; if that fails, warn and return False, and training goes on."""
        try:
            write()
        except OSError as error:
            warnings.warn(
                f"{self.directory}: {name} could not be written at step {self._step} ({error}); "
                "training goes on and tries again",
                stacklevel=3,
            )
            return False
        return True


def _versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that results depend on."""
    versions = {"python": platform.python_version()}
    for name in ("esper-env", "torch", "numpy", "numba", "gymnasium"):
        # A checkout that is only on the path has no version.
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
