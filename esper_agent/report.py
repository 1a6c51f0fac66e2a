"""Report of one or several runs as one HTML file that opens offline.

    python -m esper_agent.report runs/<name>

It also works for a run that was killed or is still going. The charts are drawn by Plotly, whose
code is part of the file.
"""

from __future__ import annotations

import html
import itertools
import json
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from plotly.offline import get_plotlyjs
from rich.console import Console
from rich.table import Table

from esper_agent import command_line
from esper_agent.arguments import check_types
from esper_agent.checkpoint import write_file
from esper_agent.evaluate import bootstrap_interval, interquartile_mean
from esper_agent.telemetry.metrics import GROUPS, Metric, find

COLORS = ("#3465a4", "#c4632c", "#4f8a3c", "#8a4f8f", "#a08321", "#3a8a8a", "#b0455f", "#6b6b6b")
"""Colors of lines, in order."""
GAIN, SCORE = "env/score_gain", "charts/episodic_score"
MOST_POINTS = 400
"""Points of a line; longer series are thinned."""
SECONDS = 60
"""Time between two reports with --watch."""
STAGE_COLORS = {
    "TRAINING": "#c9d8ea",
    "BLENDING": "#8fb3da",
    "HOLDING": "#e3b778",
    "FOSSILIZED": "#6f9e5e",
}
STYLE = """
:root{color-scheme:light}body{font:15px/1.5 system-ui,sans-serif;color:#222;background:#fff;
margin:0 auto;max-width:1360px;padding:16px}h1{font-size:24px;margin:0;overflow-wrap:anywhere}
h2{font-size:19px;margin:32px 0 8px;border-bottom:1px solid #ddd;padding-bottom:4px}
p,figcaption{margin:2px 0 6px;color:#666;font-size:13px;overflow-wrap:anywhere}
.keys,.grid{display:grid;gap:16px}.keys{grid-template-columns:repeat(auto-fit,minmax(140px,1fr));
margin:16px 0}.keys b{display:block;font-size:21px;font-weight:600}.keys span{color:#666;
font-size:13px}.grid{grid-template-columns:repeat(auto-fill,minmax(min(400px,100%),1fr))}
figure{margin:0;min-width:0}figure>b{font-size:14px;font-weight:600}.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:14px}td,th{padding:3px 14px 3px 0;text-align:left;
vertical-align:top;border-bottom:1px solid #eee}td:last-child{min-width:240px}
.critical{color:#b3261e}.warning{color:#9a6700}
pre{font-size:12px;white-space:pre-wrap;overflow-wrap:anywhere}summary{cursor:pointer}
"""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Write a report of runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run directories; several are compared."""
    out: Path | None = None
    """HTML file; by default report.html in the run directory, or here for several runs."""
    watch: bool = False
    """Write the report again every minute until all runs are finished."""
    metrics: bool = False
    """Print the table of metrics instead."""

    def __post_init__(self) -> None:
        """Check types."""
        check_types(self)


@dataclass(frozen=True)
class RunData:
    """Everything that a report shows of a run."""

    directory: Path
    config: dict[str, Any]
    rows: list[dict[str, float]]
    """Metrics of each iteration."""
    events: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    is_finished: bool

    @property
    def name(self) -> str:
        """Name of the directory."""
        return self.directory.resolve().name

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Return steps and values of a metric, thinned, without the rows that lack it."""
        points = [(row["step"], row[name]) for row in self.rows if name in row]
        points = points[:: max(1, -(-len(points) // MOST_POINTS))]
        return [step for step, _ in points], [value for _, value in points]

    def of_kind(self, *kinds: str) -> list[dict[str, Any]]:
        """Return the events of some kinds."""
        return [event for event in self.events if event["kind"] in kinds]


def load(directory: Path) -> RunData:
    """Read a run; a last line that is not finished yet is skipped.

    Raises:
        FileNotFoundError: If the directory has no run, or no metrics yet.
        ValueError: If a file is damaged.
    """
    directory = directory.expanduser()
    if not (directory / "config.json").exists():
        raise FileNotFoundError(
            f"runs: expected the directory of a run with a config.json, got {directory}"
        )
    rows = _read_lines(directory / "metrics.jsonl", "step")
    if not rows:
        raise FileNotFoundError(
            f"runs: expected a run with metrics, but {directory} has none yet; wait for its first "
            "iteration"
        )
    evaluation = directory / "evaluation.json"
    return RunData(
        directory=directory,
        config=_parse(directory / "config.json", None, "env_id", "env"),
        rows=rows,
        events=_read_lines(directory / "events.jsonl", "step", "kind"),
        evaluation=_parse(evaluation, None, "agents", "episodes") if evaluation.exists() else None,
        is_finished=(directory / "finished.json").exists(),
    )


def _read_lines(path: Path, *keys: str) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines; empty if there is no file."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    # What follows the last line break is not finished.
    return [_parse(path, line, *keys) for line in lines[:-1]]


def _parse(path: Path, text: bytes | None, *keys: str) -> dict[str, Any]:
    """Return a JSON object that has some keys; the text is that of the file if it is None."""
    text = path.read_bytes() if text is None else text
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    is_fit = isinstance(value, dict) and all(key in value for key in keys)
    if not is_fit or not isinstance(value.get("step", 0), int):
        expected = f"a JSON object with {', '.join(keys)}"
        raise ValueError(f"{path}: expected {expected}, got {text[:60]!r}; copy the file again")
    return dict(value)


# ------------------------------------------------------------------ charts


Trace = dict[str, Any]
"""A trace of Plotly."""
LAYOUT = {
    "margin": {"l": 48, "r": 8, "t": 8, "b": 32},
    "colorway": COLORS,
    "font": {"size": 12},
    "legend": {"orientation": "h", "y": -0.18, "font": {"size": 11}},
    "hovermode": "x",
    "xaxis": {"gridcolor": "#eee", "rangemode": "tozero"},
    "yaxis": {"gridcolor": "#eee", "zerolinecolor": "#ddd"},
}
"""Layout that all charts share."""


class Charts:
    """Charts of a page, each drawn by Plotly from its own JSON.

    The JSON is written directly: Plotly's Python classes would check every trace, which takes ten
    times as long as all the rest.
    """

    def __init__(self) -> None:
        self._calls: list[str] = []

    def add(
        self,
        title: str,
        caption: str,
        traces: list[Trace],
        height: int = 240,
        **layout: Any,
    ) -> str:
        """Return the HTML of a chart with its title and caption; `layout` changes `LAYOUT`."""
        name = f"chart{len(self._calls)}"
        layout = {"showlegend": len(traces) > 1, "height": height, **layout}
        # No string of a run can end the script.
        spec = json.dumps([traces, layout], allow_nan=False).replace("<", "\\u003c")
        self._calls.append(f"draw('{name}',...{spec});")
        head = f"<b>{html.escape(title)}</b><figcaption>{html.escape(caption)}</figcaption>"
        return f'<figure>{head}<div id="{name}" style="height:{height}px"></div></figure>'

    def script(self) -> str:
        """Return the script that draws all charts."""
        options = '{responsive:true,displaylogo:false,displayModeBar:"hover"}'
        draw = f"Plotly.newPlot(n,d,{{...structuredClone(common),...l}},{options})"
        start = f"const common={json.dumps(LAYOUT)};const draw=(n,d,l)=>{draw};"
        return f"<script>{start}{''.join(self._calls)}</script>"


def line(name: str, points: tuple[list[float], list[float]], **look: Any) -> Trace:
    """Return a line; `look` is its color, width or dash."""
    x, y = points
    return {"x": x, "y": y, "name": name, "mode": "lines", "line": {"width": 1.5, **look}}


def learning_curve(run: RunData) -> list[Trace]:
    """Return the score minus that of never-grow, its average, baselines and alerts."""
    name = GAIN if any(GAIN in row for row in run.rows) else SCORE
    traces = [line("each iteration", run.series(name), color="#c3cfdf")]
    ends = [0.0, run.rows[-1]["step"]]
    if name == GAIN:
        traces.append(line("moving average", run.series(f"trend/{GAIN}"), color=COLORS[0], width=2))
        agents = (run.evaluation or {}).get("agents", {})
        zero = agents.get("never-grow", {}).get("summary", {}).get("mean")
        for k, (agent, record) in enumerate(agents.items()):
            if zero is not None:
                level, color = record["summary"]["mean"] - zero, COLORS[(k + 1) % len(COLORS)]
                look = {"dash": "dot", "width": 1, "color": color}
                traces.append(line(f"{agent} (evaluation)", (ends, [level, level]), **look))
    for severity, color in (("warning", "#d9a400"), ("critical", "#b3261e")):
        alerts = [e for e in run.of_kind("alert_raised") if e["severity"] == severity]
        low = min(run.series(name)[1], default=0.0)
        if alerts:
            traces.append(
                {
                    "x": [e["step"] for e in alerts],
                    "y": [low] * len(alerts),
                    "text": [f"{e['name']}: {e['value']:.3g}" for e in alerts],
                    "name": severity,
                    "mode": "markers",
                    "marker": {"color": color, "symbol": "triangle-up", "size": 9},
                }
            )
    return traces


def metric_charts(runs: list[RunData], charts: Charts) -> str:
    """Return small charts of all metrics, group by group; a family shares a chart."""
    names = dict.fromkeys(name for run in runs for row in run.rows for name in row)
    own: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if name != "step":
            own[find(name).name].append(name)
    parts = []
    for title, group in GROUPS.items():
        figures = [_metric_chart(runs, m, own[m.name], charts) for m in group if m.name in own]
        if figures:
            parts.append(f"<h2>{title}</h2><div class=grid>{''.join(figures)}</div>")
    return "".join(parts)


def _metric_chart(runs: list[RunData], metric: Metric, own: list[str], charts: Charts) -> str:
    """Return the chart of a metric, or of a family with its members."""
    parts = []
    for run, name in itertools.product(runs, own):
        short = name
        if metric.placeholder:
            start, end = metric.name.split(f"<{metric.placeholder}>")
            short = name.removeprefix(start).removesuffix(end)
        label = short if len(runs) == 1 else f"{run.name} {short}" * bool(metric.placeholder)
        parts.append((label or run.name, run.series(name)))
    traces = [line(label, points) for label, points in parts]
    layout: dict[str, Any] = {}
    if metric.low is not None or metric.high is not None:
        # Without a limit on one side the shade ends with the data.
        values = [value for _, (_, y) in parts for value in y]
        low = min([*values, *_known(metric.high)]) if metric.low is None else metric.low
        high = max([*values, *_known(metric.low)]) if metric.high is None else metric.high
        shade = {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "y0": low, "y1": high}
        shade |= {"fillcolor": "#4f8a3c", "opacity": 0.07, "line": {"width": 0}}
        layout["shapes"] = [shade]
    unit = f" [{metric.unit}]" if metric.unit else ""
    return charts.add(metric.name + unit, metric.meaning, traces, **layout)


def _known(limit: float | None) -> list[float]:
    return [] if limit is None else [limit]


def growth_charts(run: RunData, charts: Charts) -> str:
    """Return what the agent does: ops over training, first germinations, sample episodes."""
    figures = []
    ops = sorted(n for n in set().union(*run.rows) if n.startswith("env/op/"))
    if ops:
        traces = [line(n.removeprefix("env/op/"), run.series(n), width=0.5) for n in ops]
        traces = [{**trace, "stackgroup": "ops"} for trace in traces]
        figures.append(charts.add("Ops", "share of env steps with each op", traces, 300))
    first: dict[tuple[int, int], dict[str, Any]] = {}
    for event in run.of_kind("germinated"):
        first.setdefault((event["member"], event["episode"]), event)
    if first:
        traces, blueprints = [], sorted({e["blueprint"] for e in first.values()})
        for blueprint in blueprints:
            own = [e for e in first.values() if e["blueprint"] == blueprint]
            counts = Counter((e["step"], e["at"], e["slot"]) for e in own)
            shown = list(counts)[:: max(1, -(-len(counts) // MOST_POINTS))]
            traces.append(
                {
                    "x": [step for step, _, _ in shown],
                    "y": [at for _, at, _ in shown],
                    "text": [f"slot {slot}: {counts[step, at, slot]}" for step, at, slot in shown],
                    "name": blueprint,
                    "mode": "markers",
                    "marker": {"size": 5, "opacity": 0.6},
                }
            )
        caption = "env step of the first germination of each episode, by blueprint"
        layout = {"hovermode": "closest", "showlegend": True}
        figures.append(charts.add("First germination", caption, traces, 300, **layout))
        table = Counter((e["blueprint"], e["slot"]) for e in first.values())
        slots = sorted({slot for _, slot in table})
        heat = {
            "type": "heatmap",
            "z": [[table[blueprint, slot] for slot in slots] for blueprint in blueprints],
            "x": [f"slot {slot}" for slot in slots],
            "y": blueprints,
            "colorscale": [[0, "#f3f6fa"], [1, "#1f4e8c"]],
        }
        caption = "number of first germinations, over all episodes"
        layout = {"margin": {"l": 90, "r": 8, "t": 8, "b": 32}, "hovermode": "closest"}
        figures.append(charts.add("Where and what", caption, [heat], 300, **layout))
    figures.extend(_episode_chart(run, episode, charts) for episode in _sample_episodes(run))
    if not figures:
        return "<p>No events: the run was made with --telemetry off.</p>"
    return f"<div class=grid>{''.join(figures)}</div>"


def _sample_episodes(run: RunData) -> list[dict[str, Any]]:
    """Return the ends of an early, a middle and a late episode in which something grew."""
    grown = {(e["member"], e["episode"]) for e in run.of_kind("germinated")}
    ended = run.of_kind("episode_ended")
    ended = [e for e in ended if (e["member"], e["episode"]) in grown]
    return [ended[i] for i in sorted({0, len(ended) // 2, len(ended) - 1})] if ended else []


def _episode_chart(run: RunData, end: dict[str, Any], charts: Charts) -> str:
    """Return the timeline of one episode: the stage of each slot, and the accuracy."""
    key = end["member"], end["episode"]
    kinds = ("germinated", "stage_changed", "pruned", "fossilized")
    events = [e for e in run.of_kind(*kinds) if (e["member"], e["episode"]) == key]
    bars: dict[str, list[tuple[int, int, int, str]]] = defaultdict(list)
    for slot in sorted({e["slot"] for e in events}):
        own = [e for e in events if e["slot"] == slot]
        for event, following in itertools.zip_longest(own, own[1:]):
            stop = following["at"] if following else end["length"]
            bars[event["stage"]].append((slot, event["at"], stop - event["at"], event["blueprint"]))
    traces: list[Trace] = []
    for stage, color in STAGE_COLORS.items():
        if bars[stage]:
            slots, starts, widths, names = zip(*bars[stage], strict=True)
            traces.append(
                {
                    "type": "bar",
                    "y": [f"slot {slot}" for slot in slots],
                    "x": widths,
                    "base": starts,
                    "orientation": "h",
                    "name": stage.lower(),
                    "hovertext": [f"{name}, {stage.lower()}" for name in names],
                    # The name of a seed stands where it stays.
                    "text": names if stage in ("HOLDING", "FOSSILIZED") else None,
                    "textposition": "inside",
                    "textangle": 0,
                    "marker": {"color": color},
                }
            )
    points = [e["at"] for e in events], [e["accuracy"] for e in events]
    accuracy = line("accuracy (right)", points, color="#222", width=1)
    traces.append({**accuracy, "mode": "markers+lines", "marker": {"size": 4}, "yaxis": "y2"})
    caption = f"instance {end['instance']}, score {end['score']:.3f}"
    if end["never_grow"] is not None:
        caption += f", never-grow {end['never_grow']:.3f}"
    return charts.add(
        f"Episode that ended at step {end['step']:,}",
        caption,
        traces,
        300,
        barmode="overlay",
        hovermode="closest",
        margin={"l": 48, "r": 40, "t": 8, "b": 32},
        xaxis={"range": [0, end["length"]]},
        yaxis2={"overlaying": "y", "side": "right", "range": [0, 1], "showgrid": False},
    )


# ------------------------------------------------------------------ page


def page(runs: list[RunData]) -> str:
    """Return the report of one run, or the comparison of several."""
    charts = Charts()
    body = _compare(runs, charts) if len(runs) > 1 else _single(runs[0], charts)
    title = html.escape(", ".join(run.name for run in runs))
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{title}</title>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f'<link rel=icon href="data:,"><style>{STYLE}</style>'
        f"<script>{get_plotlyjs()}</script></head>"
        f"<body>{body}{charts.script()}</body></html>"
    )


def _single(run: RunData, charts: Charts) -> str:
    config, last = run.config, run.rows[-1]
    total, step = config["total_timesteps"], int(last["step"])
    status = "finished" if run.is_finished else f"not finished: {step:,} of {total:,} steps"
    raised = run.of_kind("alert_raised")
    started = run.of_kind("run_started")
    installed = started[-1]["versions"] if started else {}
    versions = ", ".join(f"{package} {version}" for package, version in installed.items())
    keys = [("env steps", f"{step:,}"), ("status", status.split(":")[0])]
    if f"trend/{GAIN}" in last:
        keys.append(("score minus never-grow", f"{last[f'trend/{GAIN}']:+.3f}"))
    if run.evaluation is not None:
        name, record = next(iter(run.evaluation["agents"].items()))
        keys.append((f"evaluation of {name}", f"{record['summary']['mean']:.3f}"))
    keys += [("env steps/s", f"{last['charts/SPS']:.0f}")]
    critical = sum(e["severity"] == "critical" for e in raised)
    keys += [("alerts (critical)", f"{len(raised)} ({critical})")]
    curve = "committed score minus that of never-grow on the same instances"
    parts = [
        f"<h1>{html.escape(str(config['env_id']))}, seed {config['seed']}</h1>",
        f"<p>{html.escape(str(run.directory))}: {status}. {html.escape(versions)}</p>",
        _keys(keys),
        "<h2>Learning curve</h2>",
        charts.add("Score", curve, learning_curve(run), 380),
        _alerts(run),
        "<h2>What the agent does</h2>",
        growth_charts(run, charts),
        _evaluation(run),
        metric_charts([run], charts),
        "<h2>Configuration</h2><details><summary>all arguments</summary><pre>",
        html.escape(json.dumps(config, indent=1)),
        "</pre></details>",
    ]
    return "".join(parts)


def _compare(runs: list[RunData], charts: Charts) -> str:
    """Return the comparison of several runs."""
    name = f"trend/{GAIN}" if all(f"trend/{GAIN}" in run.rows[-1] for run in runs) else SCORE
    meaning = find(SCORE if name == SCORE else GAIN).meaning
    meaning += "" if name == SCORE else ": moving average"
    traces = [line(run.name, run.series(name)) for run in runs]
    finals = np.array([run.series(name)[1][-1] for run in runs])
    low, high = bootstrap_interval(finals, np.random.default_rng(0))
    mean = float(interquartile_mean(finals))
    rows = [
        (
            run.name,
            f"{int(run.rows[-1]['step']):,}",
            f"{value:+.4f}",
            "" if run.evaluation is None
            else f"{next(iter(run.evaluation['agents'].values()))['summary']['mean']:.4f}",
            str(len(run.of_kind("alert_raised"))),
        )
        for run, value in zip(runs, finals, strict=True)
    ]  # fmt: skip
    head = ("run", "env steps", find(name).name.replace("<metric>", GAIN), "evaluation", "alerts")
    keys = [
        ("runs", str(len(runs))),
        ("interquartile mean at the end", f"{mean:+.4f}"),
        ("95 % bootstrap interval", f"{low:+.4f} .. {high:+.4f}"),
    ]
    parts = [
        "<h1>Comparison</h1>",
        _keys(keys),
        "<h2>Learning curves</h2>",
        charts.add("Score", meaning, traces, 380),
        f"<h2>Runs</h2><div class=wide>{_table(head, rows)}</div>",
        metric_charts(runs, charts),
    ]
    return "".join(parts)


def _keys(pairs: Iterable[tuple[str, str]]) -> str:
    cells = (f"<div><b>{html.escape(v)}</b><span>{html.escape(k)}</span></div>" for k, v in pairs)
    return f"<div class=keys>{''.join(cells)}</div>"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], severity: int = -1) -> str:
    """Return an HTML table; the column `severity` is the class of its cells."""
    lines = [f"<tr>{''.join(f'<th>{html.escape(h)}</th>' for h in head)}</tr>"]
    for row in rows:
        cells = [
            f"<td{f' class={cell}' if k == severity else ''}>{html.escape(cell)}</td>"
            for k, cell in enumerate(row)
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _alerts(run: RunData) -> str:
    """Return a table with one row per alert."""
    raised: dict[str, list[dict[str, Any]]] = defaultdict(list)
    cleared = {event["name"]: event["step"] for event in run.of_kind("alert_cleared")}
    for event in run.of_kind("alert_raised"):
        raised[event["name"]].append(event)
    rows = []
    for name, events in raised.items():
        last = events[-1]
        severity = min(event["severity"] for event in events)  # critical comes before warning.
        is_open = cleared.get(name, -1) < last["step"]
        steps = f"{events[0]['step']:,}", f"{last['step']:,}", "yes" if is_open else "no"
        numbers = f"{last['value']:.4g}", f"{last['threshold']:.4g}"
        rows.append((name, severity, str(len(events)), *steps, *numbers, last["meaning"]))
    if not rows:
        return "<h2>Alerts</h2><p>none</p>"
    head = ("alert", "severity", "times", "first at", "last at", "open", "value", "threshold")
    table = _table((*head, "usual cause, and what to try"), rows, severity=1)
    return f"<h2>Alerts</h2><div class=wide>{table}</div>"


def _evaluation(run: RunData) -> str:
    """Return the table of the final evaluation."""
    if run.evaluation is None:
        return ""
    rows = []
    for name, record in run.evaluation["agents"].items():
        s = record["summary"]
        interval = f"{s['low']:.4f} .. {s['high']:.4f}"
        rows.append((name, f"{s['mean']:.4f}", f"{s['iqm']:.4f}", interval))
    head = ("agent", "mean score", "IQM", "95 % interval")
    count = run.evaluation["episodes"]
    caption = f"<p>committed score over {count} episodes of test instances</p>"
    return f"<h2>Evaluation</h2>{caption}<div class=wide>{_table(head, rows)}</div>"


# ------------------------------------------------------------------ command


def write(args: Args) -> tuple[Path, bool]:
    """Write the report; return its path and whether all runs are finished."""
    runs = [load(directory) for directory in args.runs]
    own = runs[0].directory / "report.html" if len(runs) == 1 else Path("report.html")
    out = (args.out or own).expanduser()
    write_file(out, [page(runs).encode()])
    return out, all(run.is_finished for run in runs)


def print_metrics() -> None:
    """Print the table of metrics."""
    console = Console()
    for title, group in GROUPS.items():
        table = Table(title=title, title_justify="left")
        for column in ("metric", "level", "unit", "meaning"):
            table.add_column(column, overflow="fold")
        for metric in group:
            table.add_row(metric.name, metric.level, metric.unit, metric.meaning)
        with command_line.lenient_stdout():
            console.print(table)


def main() -> None:
    """Parse the command line and write the report."""
    with command_line.short_mistakes():
        args = command_line.parse(Args)
        if args.metrics:
            print_metrics()
            return
        if not args.runs:
            raise ValueError("runs: expected at least one run directory, got none")
        out, is_finished = write(args)
        command_line.say(f"saved: {out}")
    try:
        while args.watch and not is_finished:
            time.sleep(SECONDS)
            out, is_finished = write(args)
    except KeyboardInterrupt:
        command_line.exit_with("interrupted; the report is complete", 128 + signal.SIGINT)


if __name__ == "__main__":
    main()
