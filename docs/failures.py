"""Pictures of docs/reading.md: a run that fires each detector, and a healthy run.

The failures are those of tests/test_detectors.py. Each run is healthy for some updates, then it
fails until the alert is raised, and then it is mended until the alert is cleared. The charts are
those of the report, drawn by Debian's Chromium.

    python docs/failures.py --healthy runs/<name> && python docs/generate.py
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tyro
from playwright.sync_api import Browser, sync_playwright
from plotly.offline import get_plotlyjs

from docs.page import ROOT
from esper_agent import report
from esper_agent.checkpoint import write_json
from esper_agent.telemetry.display import progress
from esper_agent.telemetry.events import AlertCleared, AlertRaised
from esper_agent.telemetry.metrics import find
from tests import test_detectors as cases

FOLDER = ROOT / "docs/reading"
BEFORE, AFTER, MOST = 12, 6, 80
"""Healthy updates before a failure, updates after the alert is cleared, and most updates until the
alert is raised or cleared."""
NOT_HEALTHY = ("hacking",)
"""Cases whose untrained policy raises the alert by itself."""
SHOWN = {
    "ratio": ("ratio/max", "ratio/extreme"),
    "kl": ("losses/approx_kl", "update/to_weight"),
    "value": ("losses/explained_variance", "critic/rmse"),
    "entropy": ("entropy_share/op", "env/op/WAIT"),
    "drift": ("gradients/norm/critic", "drift/gradients/norm/critic"),
    "vanishing": ("gradients/norm/encoder", "plasticity/dormant"),
    "exploding": ("gradients/norm/critic", "returns/std"),
    "conflict": ("gradients/policy_value_cosine", "gradients/value_norm"),
    "core": ("core/saturated", "core/cell_rms"),
    "plasticity": ("plasticity/dormant", "plasticity/effective_rank"),
    "performance": ("env/score_gain", "trend/env/score_gain"),
    "policy-collapse": ("env/main_op", "env/op/WAIT"),
    "hacking": ("env/flag/churn", "env/op/PRUNE"),
    "memory": ("system/memory", "time/environment"),
    "device memory": ("system/device_share", "system/device_memory"),
}
"""The two metrics of each case that show the failure."""
HEALTHY = (
    *("losses/approx_kl", "ratio/max", "losses/explained_variance", "losses/entropy"),
    *("gradients/policy_value_cosine", "update/to_weight", "core/saturated", "plasticity/dormant"),
)
"""Metrics of the healthy run, next to its learning curve."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Draw the pictures."""

    healthy: Path
    """Directory of a finished run with the default arguments."""


@dataclass(frozen=True)
class Failure:
    """What a case did, update by update."""

    rows: list[dict[str, float]]
    marks: dict[str, int]
    """Step of the failure, of the alert and of its end."""
    alert: AlertRaised
    updates: int
    """Updates from the failure to the alert."""


def step_of(training: cases.Training) -> int:
    """Return the env steps done."""
    return training.state.iteration * training.args.batch_size


def run_case(case: str) -> Failure:
    """Run a case; it fails after some updates, and is mended when the alert is raised."""
    name, changes, fail, recover, before = cases.CASES[case]
    is_performance = case == "performance"
    rows: list[dict[str, float]] = []
    with pytest.MonkeyPatch.context() as patch:
        training = cases.make_training(changes, patch)

        def iterate() -> dict[str, AlertRaised | AlertCleared]:
            happened = training.iterate()
            row = training.state.telemetry.alerts.past[-1]
            rows.append({"step": float(step_of(training)), **row})
            return {type(event).__name__ + event.name: event for event in happened}

        def until(kind: str) -> AlertRaised | AlertCleared:
            for _ in range(MOST):
                happened = iterate()
                if kind + name in happened:
                    return happened[kind + name]
            raise RuntimeError(f"{name}: expected {kind} within {MOST} updates, got none")

        if is_performance:
            cases.prefer(WAIT=30.0)(training)
        for _ in range(0 if case in NOT_HEALTHY else max(before, BEFORE)):
            iterate()
        marks, begun = {"failure": step_of(training)}, len(rows)
        fail(training)
        alert = until("AlertRaised")
        assert isinstance(alert, AlertRaised)
        marks["alert"], updates = step_of(training), len(rows) - begun
        recover(training)
        if is_performance:
            cases.prefer(WAIT=30.0)(training)
        until("AlertCleared")
        marks["cleared"] = step_of(training)
        for _ in range(AFTER):
            iterate()
        training.envs.close()
    return Failure(rows, marks, alert, updates)


def charts_of(failure: Failure, names: tuple[str, ...]) -> tuple[str, report.Charts]:
    """Return the charts of some metrics with the moments of the failure as vertical lines."""
    charts, figures = report.Charts(), []
    colors = {"failure": "#888888", "alert": "#b3261e", "cleared": "#4f8a3c"}
    for name in names:
        points = [(row["step"], row[name]) for row in failure.rows if name in row]
        values = [value for _, value in points]
        trace = report.line(name, ([x for x, _ in points], values)) | {"mode": "lines+markers"}
        is_wide = min(values) > 0 and max(values) > 100 * min(values)
        layout: dict[str, Any] = {
            "yaxis": {"type": "log" if is_wide else "linear"},
            "shapes": [
                {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": x, "x1": x,
                 "line": {"color": colors[mark], "width": 1.5, "dash": "dot"}}
                for mark, x in failure.marks.items()
            ],
        }  # fmt: skip
        metric = find(name)
        unit = f" [{metric.unit}]" if metric.unit else ""
        figures.append(charts.add(name + unit, metric.meaning, [trace], 220, **layout))
    return f"<div class=grid>{''.join(figures)}</div>", charts


def draw(browser: Browser, body: str, charts: report.Charts, path: Path, width: int) -> None:
    """Draw charts as a picture."""
    page = (
        f"<!doctype html><meta charset=utf-8><style>{report.STYLE}</style>"
        f"<style>.grid{{grid-template-columns:1fr 1fr}}</style>"
        f"<script>{get_plotlyjs()}</script><body>{body}{charts.script()}"
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "page.html")
        file.write_text(page)
        tab = browser.new_page(viewport={"width": width, "height": 300})
        tab.goto(file.as_uri())
        tab.wait_for_timeout(500)
        tab.screenshot(path=path, full_page=True)
        tab.close()


def main() -> None:
    """Run all cases, and draw them and the healthy run."""
    args = tyro.cli(Args)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    figures: dict[str, Any] = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for case in progress(list(cases.CASES), "failures"):
            failure = run_case(case)
            picture = f"{case.replace(' ', '-')}.png"
            draw(browser, *charts_of(failure, SHOWN[case]), FOLDER / picture, 900)
            figures[case] = {
                "alert": failure.alert.name,
                "severity": failure.alert.severity,
                "value": failure.alert.value,
                "threshold": failure.alert.threshold,
                "updates": failure.updates,
                "metrics": SHOWN[case],
                "picture": picture,
            }
        run = report.load(args.healthy)
        charts = report.Charts()
        body = charts.add("Score", "score minus never-grow", report.learning_curve(run), 300)
        keep = {"step", *HEALTHY}
        rows = [{n: v for n, v in row.items() if n in keep} for row in run.rows]
        body += report.metric_charts([dataclasses.replace(run, rows=rows)], charts)
        draw(browser, body, charts, FOLDER / "healthy.png", 900)
        browser.close()
    write_json(FOLDER / "failures.json", figures)


if __name__ == "__main__":
    main()
