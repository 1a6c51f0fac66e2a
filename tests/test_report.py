"""The report: loading of runs in every state, and the page in a real browser."""

from __future__ import annotations

import contextlib
import html
import io
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from esper_agent import report
from esper_agent.ppo_lstm import Args, train
from esper_agent.report import load, page
from esper_agent.telemetry.metrics import GROUPS, METRICS
from tests.builders import tiny_config

CHROMIUM = shutil.which("chromium")
NAME = "<b>&x"


@pytest.fixture(name="run", scope="module")
def train_a_little(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 iterations in a directory whose name is HTML."""
    config = tiny_config(gamma=0.99, min_gradient_health=0.0, episode_steps=12)
    args = Args(
        env=config, gamma=0.99, num_envs=4, num_steps=12, total_timesteps=12 * 48, group_size=1,
        num_minibatches=2, update_epochs=2, hidden_size=16, eval_episodes=2, telemetry="debug",
        run_dir=tmp_path_factory.mktemp("runs") / NAME, quiet=True,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        return train(args)


def copy_of(run: Path, folder: Path, *without: str) -> Path:
    """Copy a run without some of its files."""
    target = folder / "copy"
    shutil.copytree(run, target)
    for name in without:
        (target / name).unlink()
    return target


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    try:
        report.main()
    except SystemExit as error:
        return int(error.code or 0)
    return 0


# ------------------------------------------------------------------ loading


def test_a_run_that_was_killed_while_writing_is_shown_up_to_there(
    run: Path, tmp_path: Path
) -> None:
    killed = copy_of(run, tmp_path, "finished.json", "evaluation.json")
    for name in ("metrics.jsonl", "events.jsonl"):
        with (killed / name).open("a") as file:
            file.write('{"step":99999,"losses/val')
    data = load(killed)
    assert data.rows == load(run).rows
    assert not data.is_finished
    assert "not finished: 576 of 576 steps" in page([data])


def test_a_run_without_events_has_a_report(run: Path, tmp_path: Path) -> None:
    """As at --telemetry off, where most metrics are missing too."""
    bare = copy_of(run, tmp_path, "events.jsonl")
    rows = [json.loads(line) for line in (bare / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "charts/episodic_score", "charts/SPS", "losses/value_loss")
    lines = [json.dumps({name: row[name] for name in kept}) + "\n" for row in rows]
    (bare / "metrics.jsonl").write_text("".join(lines))
    text = page([load(bare)])
    assert "--telemetry off" in text
    assert "losses/value_loss" in text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "missing", "expected the directory of a run with a config.json"),
        (lambda folder: folder, "expected a run with metrics, but .* has none yet"),
    ],
)
def test_a_directory_without_a_run_is_an_error_in_one_line(
    make: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "config.json").write_text("{}")
    assert call(monkeypatch, make(tmp_path)) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: runs: {message}.*\n", error)
    assert call(monkeypatch) == 2
    assert "expected at least one run directory" in capsys.readouterr().err


def test_the_table_of_metrics_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert call(monkeypatch, "--metrics") == 0
    printed = capsys.readouterr().out
    assert all(metric.name in printed for metric in METRICS)


def test_watching_ends_when_the_run_is_finished(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished = copy_of(run, tmp_path, "finished.json")
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            (unfinished / "finished.json").write_text("{}")

    monkeypatch.setattr(report.time, "sleep", sleep)
    assert call(monkeypatch, unfinished, "--watch") == 0
    assert slept == [60, 60]
    assert "not finished" not in (unfinished / "report.html").read_text()
    (unfinished / "finished.json").unlink()

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report.time, "sleep", interrupt)
    assert call(monkeypatch, unfinished, "--watch") == 130


# ------------------------------------------------------------------ content


def test_every_group_of_the_table_has_charts_with_its_captions(run: Path) -> None:
    text = page([load(run)])
    written = set().union(*load(run).rows)
    for title, group in GROUPS.items():
        assert f"<h2>{title}</h2>" in text
        for metric in group:
            if metric.name in written:
                assert html.escape(metric.name) in text
                assert html.escape(metric.meaning) in text
    assert len(text) < 10e6


def test_strings_are_escaped(run: Path) -> None:
    text = page([load(run)])
    assert "<b>&x" not in text.replace("<b>&amp;x", "")
    assert "&lt;b&gt;&amp;x" in text


def test_several_runs_are_compared(run: Path, tmp_path: Path) -> None:
    """Interval and interquartile mean of equal runs are their common value."""
    runs = [load(run), load(copy_of(run, tmp_path)), load(run)]
    text = page(runs)
    value = runs[0].series("trend/env/score_gain")[1][-1]
    assert f"<b>{value:+.4f}</b><span>interquartile mean at the end" in text
    assert f"<b>{value:+.4f} .. {value:+.4f}</b>" in text
    assert text.count("<tr>") == 4


# ------------------------------------------------------------------ in a browser


@pytest.fixture(name="browser", scope="module")
def start_browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium (apt-get install chromium)")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize(("count", "width"), [(1, 1400), (1, 400), (3, 1400)])
def test_the_page_opens_offline_and_draws_every_chart(
    count: int, width: int, run: Path, tmp_path: Path, browser: Any
) -> None:
    """No console message, no request, no sideways scrolling, marks in all charts, hover text."""
    path = tmp_path / "report.html"
    path.write_text(page([load(run)] * count))
    tab = browser.new_page(viewport={"width": width, "height": 900})
    problems: list[str] = []
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    requests: list[str] = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(path.as_uri())
    tab.wait_for_function(
        "() => [...document.querySelectorAll('figure > div')].every(d => d._fullLayout)"
    )
    assert problems == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    marks = tab.evaluate(
        "[...document.querySelectorAll('figure')].map(f => [f.querySelector('b').textContent,"
        "f.querySelectorAll('.trace path, .trace image, .hm image, .points path').length])"
    )
    assert len(marks) > 60
    assert [name for name, number in marks if number == 0] == []
    tab.evaluate(
        "Plotly.Fx.hover(document.querySelector('figure > div'),[{curveNumber:0,pointNumber:1}])"
    )
    tab.wait_for_selector(".hovertext", state="attached")
    tab.close()


def test_the_benchmark_measures_the_report(run: Path, tmp_path: Path, browser: Any) -> None:
    from benchmarks.report import measure

    row = measure(browser, (run,), 1, tmp_path)
    assert row["runs"] == 1
    assert row["charts"] > 50
    assert row["report_bytes"] < 10e6
    assert min(row["write_seconds"], row["draw_seconds"]) > 0
