"""Tables and figure of docs/speed.md, computed from the committed result files.

`docs/generate.py` writes the tables into the pages. This command draws the figure:

    python -m docs.speed
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.states import MODES
from benchmarks.step_profile import HEAD, PHASES, cells
from docs.page import ROOT, table
from docs.results import read

TIMES, SHARE = "{:.1f}×", "{:.0%}"
PEERS = {
    "vector": ("`EsperVectorEnv`, 16 sub-environments", 1),
    "async": ("`AsyncVectorEnv`, 16 sub-environments", 16),
    "async of 2": ("`AsyncVectorEnv`, 2 sub-environments", 2),
    "sync": ("`SyncVectorEnv`, 16 sub-environments", 1),
    "2 x vector": ("two `EsperVectorEnv` of 8 sub-environments", 2),
}
"""Label and number of processes of each setup."""


def machine(result: dict[str, Any]) -> str:
    """Return processor, threads and versions of a result."""
    where = result["machine"]
    return (
        f"{where['cpu']}, {where['threads']} threads, Python {where['python']}, torch "
        f"{where['torch']}"
    )


def throughput(result: dict[str, Any]) -> str:
    """Return the table of throughput by `num_envs` and state of the slots."""
    rows = []
    for row in result["rows"]:
        outside = row["share_outside_training_and_evaluation"]
        steps = row["env_steps_per_second"]
        rows.append(
            [
                str(row["num_envs"]),
                row["mode"],
                f"{steps:.0f}" if steps >= 100 else f"{steps:.1f}",
                f"{row['training_samples_per_second']:.0f}",
                _ratio(row),
                "" if outside is None or row["mode"] == "training" else f"{100 * outside:.0f} %",
            ]
        )
    head = ["`num_envs`", "slots", "env steps/s", "training images/s", "speedup over the loop"]
    head.append("outside training and evaluation")
    return (
        f"{machine(result)}; medians of {len(result['rows'][0]['step_milliseconds'])} rounds:\n\n"
        + table(head, rows)
    )


def targets(
    throughput: dict[str, Any],
    peers: dict[str, Any],
    cifar: dict[str, Any],
    agent: dict[str, Any],
) -> str:
    """Return the performance targets, each with the measured median."""
    found = {(row["num_envs"], row["mode"]): row for row in throughput["rows"]}
    training = next(row for row in cifar["rows"] if row["mode"] == "training")
    rows: list[list[str]] = []

    def add(name: str, limit: float, measured: float, form: str, *, is_least: bool = True) -> None:
        is_met = measured >= limit if is_least else measured <= limit
        rows.append([name, form.format(limit), form.format(measured), "yes" if is_met else "no"])

    for count, mode, least in ((16, "empty", 6), (16, "mix", 4), (64, "empty", 10), (64, "mix", 5)):
        add(
            f"speedup over the loop: digits, {count}, {mode}",
            least,
            found[count, mode]["ratio_median"],
            TIMES,
        )
    for row in peers["rows"]:
        name = f"speedup over `AsyncVectorEnv`: digits, {row['num_envs']}, {row['mode']}"
        add(name, 4, row["sides"]["async"]["ratio_median"], TIMES)
    name = f"speedup over the loop: CIFAR-10 shape, {training['num_envs']}, training only"
    add(name, 1.5, training["ratio_median"], TIMES)
    counts = sorted({row["num_envs"] for row in throughput["rows"]})
    costs = (("empty", "env step", "env_steps_per_second"), ("mix", "FLOP", "share_of_matrix_rate"))
    for mode, unit, rate in costs:
        rates = [found[count, mode][rate] for count in counts]
        growth = max(few / many for few, many in itertools.pairwise(rates))
        name = f"growth of the time per {unit} with the next larger `num_envs`: digits, {mode}"
        add(name, 1.0, growth, "at most {:.2f}×", is_least=False)
    for mode in MODES:
        outside = found[16, mode]["share_outside_training_and_evaluation"]
        name = f"share outside training and evaluation: digits, 16, {mode}"
        add(name, 0.05, outside, SHARE, is_least=False)
    for row in agent["rows"]:
        share = row["inference_share"]["median"] + row["update_share"]["median"]
        name = f"share of the agent in the time of a training run: {row['num_envs']}"
        add(name, 0.1, share, SHARE, is_least=False)
    name = "speedup on a GPU over one stream per network: CIFAR-10 shape, 64"
    rows.append([name, "20.0×", "", "not measured"])
    return table(["quantity", "target", "measured", "met"], rows)


def draw(throughput: dict[str, Any], profile: dict[str, Any], path: Path) -> None:
    """Draw env steps per second over `num_envs`, and the time of a step by phase, on digits."""
    figure = Figure(figsize=(11.0, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    for n, mode in enumerate(MODES):
        rows = [row for row in throughput["rows"] if row["mode"] == mode]
        members = [row["num_envs"] for row in rows]
        left.plot(members, [row["env_steps_per_second"] for row in rows], f"C{n}o-", label=mode)
        loop = [row["loop_env_steps_per_second"] for row in rows]
        left.plot(members, loop, f"C{n}x--")
    left.plot([], [], "kx--", label="loop over plain networks")
    left.set_xscale("log", base=4)
    left.set_yscale("log")
    left.set_xticks(members, [str(count) for count in members])
    left.set_xlabel("num_envs")
    left.set_ylabel("env steps per second")
    low, high = left.get_ylim()
    left.set_ylim(low, 8 * high)
    left.legend(loc="upper left", fontsize=8, frameon=False)
    rows = [row for row in profile["rows"] if row["env_id"] == "Esper-Digits-v0"]
    labels = [f"{row['num_envs']}\n{row['mode']}" for row in rows]
    floor = np.zeros(len(rows))
    for phase in PHASES:
        part = np.array([r["phases"][phase]["milliseconds"] / r["num_envs"] for r in rows])
        right.bar(labels, part, bottom=floor, label=phase)
        floor += part
    right.set_xlabel("num_envs, slots")
    right.set_ylabel("ms per env step and sub-environment")
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def short_throughput(result: dict[str, Any]) -> str:
    """Return env steps per second and the speedup, one row per `num_envs`."""
    modes = ("empty", "mix", "mix + leave-one-out")
    found = {(row["num_envs"], row["mode"]): row for row in result["rows"]}
    rows = []
    for members in dict.fromkeys(row["num_envs"] for row in result["rows"]):
        cells = (found[members, mode] for mode in modes)
        rows.append(
            [
                str(members),
                *(f"{c['env_steps_per_second']:.0f} ({c['ratio_median']:.1f}×)" for c in cells),
            ]
        )
    head = ["`num_envs`", "empty slots", "a seed in every slot"]
    head.append("a seed in every slot, leave-one-out")
    return table(head, rows)


def peers(result: dict[str, Any]) -> str:
    """Return the comparison with Gymnasium's vector environments."""
    empty, mix = (row["sides"] for row in result["rows"])
    rows = []
    for name, (label, processes) in PEERS.items():
        cells = []
        for sides in (empty, mix):
            side = sides[name]
            cells += [
                f"{side['env_steps_per_second']:.0f}",
                "" if name == "vector" else _ratio(side),
            ]
        rows.append([label, str(processes), *cells])
    head = ["setup", "processes", "env steps/s, empty", "speedup of the first row, empty"]
    head += ["env steps/s, mix", "speedup of the first row, mix"]
    return f"{machine(result)}:\n\n" + table(head, rows)


def profile(result: dict[str, Any]) -> str:
    """Return the time of a step by phase, and the arithmetic rates beside the machine's limits."""
    limits = result["limits"]
    rows = [cells(row) for row in result["rows"]]
    return (
        f"{machine(result)}. Limits measured in the same run: float32 matrix product "
        f"{limits['matrix_gflops']:.0f} GFLOP/s, copy {limits['copy_gigabytes_per_second']:.1f} "
        "GB/s.\n\n" + table([name.replace("members", "`num_envs`") for name in HEAD], rows)
    )


def agent(result: dict[str, Any]) -> str:
    """Return the time of the agent's decisions and updates."""
    columns = (
        ("env step [ms]", "env_step_milliseconds", "{:.1f}", ""),
        ("decision [ms]", "inference_milliseconds", "{:.2f}", ""),
        ("update [ms]", "update_milliseconds", "{:.0f}", ""),
        ("decisions [% of run]", "inference_share", "{:.1%}", ""),
        ("update [% of run]", "update_share", "{:.1%}", ""),
        ("update with all threads [× update]", "all_threads_ratio", "{:.1f}", "×"),
        ("update with one LSTM call per step [× update]", "step_by_step_ratio", "{:.1f}", "×"),
    )
    rows = [
        [str(row["num_envs"]), *(_spread(row[name], form, unit) for _, name, form, unit in columns)]
        for row in result["rows"]
    ]
    rounds = f"medians of {result['arguments']['rounds']} rounds (minimum .. maximum)"
    head = ["`num_envs`", *(title for title, *_ in columns)]
    return f"{machine(result)}; {rounds}.\n\n" + table(head, rows)


def compiled(result: dict[str, Any]) -> str:
    """Return what torch.compile changes."""
    own = result["compiled"]
    decision = _spread(own["decision_ratio"], "{:.2f}", "×")
    update = _spread(own["update_ratio"], "{:.2f}", "×")
    return (
        f"{machine(result)}: with `torch.compile` a decision of {own['num_envs']} sub-environments "
        f"takes {decision} of the time without it, and an update {update}; medians of "
        f"{result['arguments']['rounds']} rounds (minimum .. maximum). Compilation takes "
        f"{own['compile_seconds']:.0f} s more in the first round, or several times as long with an "
        "empty cache."
    )


def telemetry_cost(result: dict[str, Any]) -> str:
    """Return the cost of telemetry."""
    own = result["telemetry"]
    normal, debug = (
        _spread(own[f"{level}_share"], "{:.1%}", "").replace("..", "to")
        for level in ("normal", "debug")
    )
    return (
        f"Cost, as share of the time of an iteration at level `off`, by `benchmarks/agent.py` "
        f"({machine(result)}, medians of {3 * result['arguments']['rounds']} rounds): `normal` "
        f"{normal}, `debug` {debug}. One episode of never-grow per instance comes on top, "
        f"{own['never_grow_seconds']:.1f} s per run."
    )


def training_time(result: dict[str, Any]) -> str:
    """Return how long a default training takes, and how long it took before."""
    runs = result["trainings"]
    new, old = ([run["seconds"] for run in runs[side]] for side in ("new", "old"))
    ratio = np.median(np.array(new) / np.array(old))
    return (
        f"{machine(result)}: {runs['new'][0]['env_steps']:,} env steps take "
        f"{np.median(new) / 60:.1f} minutes ({min(new):.0f} to {max(new):.0f} s, {len(new)} runs). "
        "Commit 07d5f5e with its defaults, in turn with these runs, took "
        f"{np.median(old) / 60:.1f} minutes ({runs['old'][0]['env_steps']:,} env steps), so the "
        f"ratio is {ratio:.2f}. "
        f"Decisions and updates of the agent are {median_share(runs['new']):.0%} of the time, "
        f"before {median_share(runs['old']):.0%}."
    )


def short_training_time(result: dict[str, Any]) -> str:
    """Return how long a default training takes."""
    runs = result["trainings"]["new"]
    minutes = np.median([run["seconds"] for run in runs]) / 60
    where = result["machine"]
    return (
        f"It takes {minutes:.1f} minutes on {where['threads']} threads of an {where['cpu']} "
        f"(median of {len(runs)} runs)."
    )


def median_share(runs: list[dict[str, float]]) -> float:
    """Return the share of decisions and updates of the agent in a training."""
    return float(np.median([run["policy_share"] for run in runs]))


def cifar_training(result: dict[str, Any]) -> str:
    """Return time and memory of a training on CIFAR-10, extrapolated from its first env steps."""
    figures, arguments = result["result"], result["arguments"]
    return (
        f"{machine(result)}: {arguments['num_envs']} sub-environments take "
        f"{figures['seconds_per_step']:.2f} s per env step. {figures['env_steps']:,} env steps "
        f"would take {figures['hours']:.1f} hours. The process needs "
        f"{figures['peak_gigabytes']:.1f} GB."
    )


def report_cost(result: dict[str, Any]) -> str:
    """Return size and time of the report."""
    one, several = result["rows"]
    parts = [
        f"{row['report_bytes'] / 1e6:.1f} MB, {row['write_seconds']:.1f} s to write and "
        f"{row['draw_seconds']:.1f} s to draw"
        for row in (one, several)
    ]
    return (
        f"The report of a default run has {one['charts']} charts ({parts[0]}), that of "
        f"{several['runs']} runs {several['charts']} ({parts[1]}); `benchmarks/report.py`."
    )


def _ratio(row: Mapping[str, float]) -> str:
    return f"{row['ratio_median']:.2f}× ({row['ratio_min']:.2f} .. {row['ratio_max']:.2f})"


def _spread(figure: Mapping[str, float], form: str, unit: str) -> str:
    median, least, largest = (form.format(figure[name]) for name in ("median", "min", "max"))
    return f"{median}{unit} ({least} .. {largest})"


if __name__ == "__main__":
    draw(read("throughput"), read("profile"), ROOT / "docs/speed.png")
