"""Progress of a training: a live display on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, track
from rich.table import Table
from rich.text import Text

from esper_agent.command_line import lenient_stdout, say
from esper_agent.telemetry.events import AlertCleared, AlertRaised, Event

Item = TypeVar("Item")

LINES = 20
"""Lines of progress of a training without a terminal."""
SHOWN = (
    ("score - never-grow", "env/score_gain", "+.3f"),
    ("  moving average", "trend/env/score_gain", "+.3f"),
    ("score", "charts/episodic_score", ".3f"),
    ("parameters", "charts/episodic_parameters", ".0f"),
    ("entropy [nats]", "losses/entropy", ".2f"),
    ("KL [nats]", "losses/approx_kl", ".4f"),
    ("explained variance", "losses/explained_variance", ".2f"),
    ("env steps/s", "charts/SPS", ".0f"),
)
"""Label, metric and format of each figure of the live display."""
IN_LINES = ("score - never-grow", "score", "parameters", "KL [nats]", "env steps/s")
"""Labels of the figures in a line."""
_OPEN: list[Display] = []
"""The live display of this process, if there is one."""


class Display:
    """Shows the progress of a training; use it as a context manager.

    Args:
        total_steps: Env steps of the whole training.
        is_quiet: Whether to show nothing.
    """

    def __init__(self, total_steps: int, is_quiet: bool) -> None:
        self._total, self._is_quiet = total_steps, is_quiet
        self._best, self._shown, self._has_estimate = -math.inf, 0, False
        self._alerts: dict[str, str] = {}
        self._live: Live | None = None
        console = Console()
        # A second display, such as that of an evaluation, would overwrite the first one.
        if has_terminal(console) and not is_quiet and not _OPEN:
            self._live = Live(console=console, auto_refresh=False)
            self._bar = Progress(
                TextColumn("step {task.completed:,.0f} of {task.total:,.0f}"),
                BarColumn(),
                TextColumn("{task.percentage:3.0f} %"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("", total=total_steps)

    def __enter__(self) -> Display:
        """Start the live display."""
        if self._live is not None:
            _OPEN.append(self)
            with lenient_stdout():
                self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the live display; what it shows stays."""
        if self._live is not None:
            _OPEN.remove(self)
            with lenient_stdout():
                self._live.stop()

    def show(
        self,
        step: int,
        metrics: Mapping[str, float],
        events: Iterable[Event],
        minutes: float,
    ) -> None:
        """Show the state after an iteration.

        Args:
            step: Env steps done.
            metrics: Metrics of the iteration.
            events: Events of the iteration; alerts are shown once each.
            minutes: Time of rollouts and updates so far.
        """
        if self._is_quiet:
            return
        self._best = max(self._best, metrics.get("trend/env/score_gain", -math.inf))
        for event in events:
            self._show_alert(event)
        if self._live is not None:
            self._bar.update(self._task, completed=step)
            with lenient_stdout():
                self._live.update(Group(self._bar, self._table(metrics)), refresh=True)
            return
        # The first line comes early. One after the first minute has a better estimate of the time.
        is_estimate = minutes >= 1 and not self._has_estimate
        if step * LINES // self._total > self._shown or not self._shown or is_estimate:
            self._shown = max(1, step * LINES // self._total)
            self._has_estimate = minutes >= 1
            parts = [f"{n.strip()} {metrics[m]:{f}}" for n, m, f in SHOWN
                     if n in IN_LINES and m in metrics]  # fmt: skip
            total = minutes * self._total / step
            of_all = f" of about {total:.0f} min" if is_estimate else ""
            say(f"step {step}  {'  '.join(parts)}  {total - minutes:.1f} min left{of_all}")

    def _show_alert(self, event: Event) -> None:
        """Print an alert that was raised or cleared."""
        if isinstance(event, AlertRaised):
            self._alerts[event.name] = event.severity
            text = (
                f"step {event.step}  {event.severity}: {event.name} {event.value:.4g} "
                f"(threshold {event.threshold:.4g}): {event.meaning}"
            )
        elif isinstance(event, AlertCleared):
            self._alerts.pop(event.name, None)
            text = f"step {event.step}  cleared: {event.name}"
        else:
            return
        if self._live is None:
            say(text)
        else:
            with lenient_stdout():
                self._live.console.print(Text(text), style="yellow")

    def _table(self, metrics: Mapping[str, float]) -> Table:
        """Return the figures of the live display."""
        table = Table.grid(padding=(0, 2))
        for label, name, form in SHOWN:
            table.add_row(label, f"{metrics[name]:{form}}" if name in metrics else "-")
        if self._best > -math.inf:
            table.add_row("  best average", f"{self._best:+.3f}")
        ops = {n.removeprefix("env/op/"): v for n, v in metrics.items() if n.startswith("env/op/")}
        table.add_row("ops", "  ".join(f"{name} {share:.0%}" for name, share in ops.items()))
        alerts = (f"{name} ({severity})" for name, severity in self._alerts.items())
        table.add_row("open alerts", ", ".join(alerts) or "none")
        return table


def has_terminal(console: Console) -> bool:
    """Return True if a console can be redrawn; notebooks and dumb terminals show lines."""
    return console.is_terminal and not console.is_dumb_terminal and not console.is_jupyter


def progress(items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]:
    """Iterate with a progress bar on stderr, if that is a terminal.

    Args:
        items: Items to iterate over.
        description: Text before the bar.
        total: Number of items, if they have no length.
    """
    console = Console(stderr=True)
    # Below a live display there is no room for a second one.
    is_shown = has_terminal(console) and not _OPEN
    look: dict[str, Any] = {"console": console, "disable": not is_shown, "transient": True}
    return track(items, description, total=total, **look)
