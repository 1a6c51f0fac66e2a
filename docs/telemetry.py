"""Generated blocks of docs/telemetry.md: metrics, detectors, thresholds and events."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from docs.page import table
from esper_agent.telemetry import detectors, events, metrics

FAILURES = {
    "ratio": "The learning rate became 1.",
    "kl": "The same failure: the learning rate became 1.",
    "value": "The last layer of the critic was multiplied by 1,000.",
    "entropy": "The logit of WAIT was raised by 30, so the policy hardly samples other ops.",
    "drift": "Rewards became 1,000 times as large, and their scale was not updated.",
    "vanishing": "The biases of the encoders fell by 10,000, so all units output 0.",
    "exploding": "Rewards became 100,000 times as large, and their scale was not updated.",
    "conflict": "The value loss was made to raise the log-probability of every action.",
    "core": "The biases of the LSTM's gates rose by 50.",
    "plasticity": "The biases of encoders and critic fell by 10,000.",
    "performance": "The policy was made to fossilize the largest blueprint at a high price.",
    "policy-collapse": "The logit of WAIT was raised by 30.",
    "hacking": "The policy was made to germinate and prune in turn; `flag_prunes` is 2 in episodes "
    "of 12 steps.",
    "memory": "20 MB were kept after every env step; `memory_growth` is 0.001 here.",
    "device memory": "A reading of the device was replaced by 95 %.",
}
"""What went wrong in each case of tests/test_detectors.py."""


def failures(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a section per failure, given what docs/failures.py measured."""
    parts = []
    for case, own in figures.items():
        name, _ = detectors.split_title(own["alert"])
        count = f"{own['updates']} update{'s' * (own['updates'] > 1)}"
        charts = " and ".join(f"`{metric}`" for metric in own["metrics"])
        parts.append(
            f"### {own['alert']}\n\n{FAILURES[case]} The alert came after {count}: "
            f"{own['severity']}, {own['value']:.3g} (threshold {own['threshold']:.3g}).\n\n"
            f"![Charts of {charts}](reading/{own['picture']})\n\n"
            f"*Usual cause, and what to try*: {detectors.DETECTORS[name].meaning}."
        )
    return "\n\n".join(parts)


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
