"""Generated blocks of docs/telemetry.md: metrics, detectors, thresholds and events."""

from __future__ import annotations

import ast
import dataclasses
import inspect

from docs.page import table
from esper_agent.telemetry import detectors, events, metrics


def blocks() -> dict[str, str]:
    """Return all generated blocks by name."""
    return {
        "metrics": metric_tables(),
        "detectors": detector_table(),
        "thresholds": threshold_table(),
        "events": event_table(),
    }


def metric_tables() -> str:
    """Return one table per group of metrics."""
    parts = []
    for title, group in metrics.GROUPS.items():
        rows = [
            (
                f"`{m.name}`",
                m.level,
                m.unit,
                healthy(m),
                m.meaning + (m.source and f" ({m.source})"),
            )
            for m in group
        ]
        head = ("metric", "level", "unit", "healthy", "meaning")
        parts.append(f"### {title}\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def healthy(metric: metrics.Metric) -> str:
    """Return the healthy range of a metric in words."""
    if metric.low is not None and metric.high is not None:
        return f"{metric.low:g} to {metric.high:g}"
    if metric.low is not None:
        return f"from {metric.low:g}"
    return "" if metric.high is None else f"up to {metric.high:g}"


def detector_table() -> str:
    """Return the table of detectors."""
    rows = []
    for name, detector in detectors.DETECTORS.items():
        finds = (inspect.getdoc(detector.function) or "").removeprefix("Find ").rstrip(".")
        rows.append((f"`{name}`", finds, detector.meaning))
    return table(("detector", "finds", "usual cause, and what to try"), rows)


def threshold_table() -> str:
    """Return the table of thresholds, with the docstring under each field."""
    rows = [
        (f"`{name}`", getattr(detectors.Thresholds(), name), meaning)
        for name, meaning in field_docstrings(detectors.Thresholds).items()
    ]
    return table(("threshold", "default", "meaning"), rows)


def event_table() -> str:
    """Return the table of events with their fields."""
    rows = []
    for kind, event in events.EVENTS.items():
        names = [f"`{f.name}`" for f in dataclasses.fields(event) if f.name != "step"]
        meaning = (inspect.getdoc(event) or "").rstrip(".")
        rows.append((f"`{kind}`", meaning, ", ".join(names)))
    return table(("kind", "meaning", "fields besides `kind` and `step`"), rows)


def field_docstrings(kind: type) -> dict[str, str]:
    """Return the text under each field of a dataclass."""
    (definition,) = ast.parse(inspect.getsource(kind)).body
    result: dict[str, str] = {}
    last = ""
    for node in definition.body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            last = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and last:
            result[last], last = " ".join(str(node.value.value).split()), ""
    return result
