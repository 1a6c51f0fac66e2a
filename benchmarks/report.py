"""Time and size of the HTML report of one run, and of several.

The time to draw it is that of headless Chromium from opening the file until the last chart has its
marks.

    python -m benchmarks.report --runs runs/a runs/b runs/c --out benchmarks/results/report.json
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from playwright.sync_api import Browser, sync_playwright

from benchmarks import write_result
from esper_agent import report
from esper_agent.telemetry.display import progress

BROWSER = shutil.which("chromium")
DRAWN = "[...document.querySelectorAll('figure > div')].every(d => d.querySelector('.main-svg'))"
"""JavaScript expression: all charts are drawn."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Measure the report of the first run, and of all together."""

    runs: tuple[Path, ...]
    """Run directories."""
    rounds: int = 5
    """Timed rounds."""
    out: Path | None = None
    """JSON file for the result."""


def measure(browser: Browser, runs: tuple[Path, ...], rounds: int, folder: Path) -> dict[str, Any]:
    """Write and draw a report several times."""
    path = folder / "report.html"
    write_seconds, draw_seconds, num_charts = [], [], 0
    for _ in progress(range(rounds), f"reports of {len(runs)} runs"):
        began = time.perf_counter()
        report.write(report.Args(runs=runs, out=path))
        write_seconds.append(time.perf_counter() - began)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        began = time.perf_counter()
        page.goto(path.as_uri())
        page.wait_for_function(DRAWN)
        draw_seconds.append(time.perf_counter() - began)
        num_charts = page.locator("figure > div").count()
        page.close()
    return {
        "runs": len(runs),
        "rows": sum(len((run / "metrics.jsonl").read_bytes().splitlines()) for run in runs),
        "event_bytes": sum((run / "events.jsonl").stat().st_size for run in runs),
        "report_bytes": path.stat().st_size,
        "charts": num_charts,
        "write_seconds": statistics.median(write_seconds),
        "draw_seconds": statistics.median(draw_seconds),
    }


def main() -> None:
    """Measure, print and save."""
    args = tyro.cli(Args)
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        sets = dict.fromkeys((args.runs[:1], args.runs))
        rows = [measure(browser, runs, args.rounds, Path(name)) for runs in sets]
    for row in rows:
        print(json.dumps(row))
    write_result(args.out, args, rows=rows)


if __name__ == "__main__":
    main()
