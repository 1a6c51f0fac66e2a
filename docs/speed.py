"""Tables and the picture of docs/speed.md, from the committed result files.

`docs/generate.py` writes the tables into the page and into the README; the picture is drawn by

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
    "vector": ("one vector environment", 1),
    "async": ("`AsyncVectorEnv`", 16),
    "async of 2": ("`AsyncVectorEnv`, the first two members alone", 2),
    "sync": ("`SyncVectorEnv`", 1),
    "2 x vector": ("two vector environments of 8", 2),
}
"""Label and number of processes of each side."""


def machine(result: dict[str, Any]) -> str:
    """Return where a result was measured."""
    where = result["machine"]
    return (
        f"{where['cpu']}, {where['threads']} threads, Python {where['python']}, torch "
        f"{where['torch']}"
    )


def throughput(result: dict[str, Any]) -> str:
    """Return the table of members and states of the slots."""
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
    head = ["members", "slots", "env steps/s", "training images/s", "ratio to the loop", "outside"]
    return (
        f"{machine(result)}; medians of {len(result['rows'][0]['step_milliseconds'])} rounds:\n\n"
        + table(head, rows)
    )


def aims(
    throughput: dict[str, Any],
    peers: dict[str, Any],
    cifar: dict[str, Any],
    agent: dict[str, Any],
) -> str:
    """Return what was asked for, and whether the medians reach it."""
    found = {(row["num_envs"], row["mode"]): row for row in throughput["rows"]}
    training = next(row for row in cifar["rows"] if row["mode"] == "training")
    rows: list[list[str]] = []

    def add(aim: str, limit: float, measured: float, form: str, *, is_least: bool = True) -> None:
        is_reached = measured >= limit if is_least else measured <= limit
        rows.append([aim, form.format(limit), form.format(measured), "yes" if is_reached else "no"])

    for count, mode, least in ((16, "empty", 6), (16, "mix", 4), (64, "empty", 10), (64, "mix", 5)):
        add(
            f"digits, {count} members, {mode}: loop",
            least,
            found[count, mode]["ratio_median"],
            TIMES,
        )
    for row in peers["rows"]:
        aim = f"digits, {row['num_envs']} members, {row['mode']}: `AsyncVectorEnv`"
        add(aim, 4, row["sides"]["async"]["ratio_median"], TIMES)
    aim = f"CIFAR-10's shape, {training['num_envs']} members, training: loop"
    add(aim, 1.5, training["ratio_median"], TIMES)
    counts = sorted({row["num_envs"] for row in throughput["rows"]})
    costs = (("empty", "env step", "env_steps_per_second"), ("mix", "FLOP", "share_of_matrix_rate"))
    for mode, unit, rate in costs:
        rates = [found[count, mode][rate] for count in counts]
        growth = max(few / many for few, many in itertools.pairwise(rates))
        aim = f"digits, {mode}: time per {unit}, from one number of members to the next"
        add(aim, 1.0, growth, "at most {:.2f}×", is_least=False)
    for mode in MODES:
        outside = found[16, mode]["share_outside_training_and_evaluation"]
        add(f"digits, 16 members, {mode}: outside", 0.05, outside, SHARE, is_least=False)
    for row in agent["rows"]:
        share = row["inference_share"]["median"] + row["update_share"]["median"]
        add(f"agent, {row['num_envs']} members", 0.1, share, SHARE, is_least=False)
    rows.append(["CIFAR-10's shape on a GPU, 64 members: a stream per host", "20.0×", "", "no GPU"])
    return table(["what", "asked", "measured", "reached"], rows)


def draw(throughput: dict[str, Any], profile: dict[str, Any], path: Path) -> None:
    """Draw env steps per second against members, and how a step's time is spent, on digits."""
    figure = Figure(figsize=(11.0, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    for n, mode in enumerate(MODES):
        rows = [row for row in throughput["rows"] if row["mode"] == mode]
        members = [row["num_envs"] for row in rows]
        left.plot(members, [row["env_steps_per_second"] for row in rows], f"C{n}o-", label=mode)
        loop = [row["loop_env_steps_per_second"] for row in rows]
        left.plot(members, loop, f"C{n}x--")
    left.plot([], [], "kx--", label="the same in a loop over plain networks")
    left.set_xscale("log", base=4)
    left.set_yscale("log")
    left.set_xticks(members, [str(count) for count in members])
    left.set_xlabel("members")
    left.set_ylabel("env steps per second, all members")
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
    right.set_xlabel("members, slots")
    right.set_ylabel("ms per step and member")
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def short_throughput(result: dict[str, Any]) -> str:
    """Return env steps per second and the ratio, one row per number of members."""
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
    head = ["members", "empty slots", "a seed alive in every slot", "the same with leave-one-out"]
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
    head = [f"{result['rows'][0]['num_envs']} members as", "processes", "env steps/s, empty"]
    head += ["ours is faster by", "env steps/s, mix", "ours is faster by"]
    return f"{machine(result)}:\n\n" + table(head, rows)


def profile(result: dict[str, Any]) -> str:
    """Return where the time of a step goes, and how near that is to the machine's limits."""
    limits = result["limits"]
    rows = [cells(row) for row in result["rows"]]
    return (
        f"{machine(result)}. Limits measured in the same run: float32 matrix product "
        f"{limits['matrix_gflops']:.0f} GFLOP/s, copy {limits['copy_gigabytes_per_second']:.1f} "
        "GB/s.\n\n" + table(HEAD, rows)
    )


def agent(result: dict[str, Any]) -> str:
    """Return what deciding and learning cost."""
    columns = (
        ("env step [ms]", "env_step_milliseconds", "{:.1f}", ""),
        ("decision [ms]", "inference_milliseconds", "{:.2f}", ""),
        ("update [ms]", "update_milliseconds", "{:.0f}", ""),
        ("decisions [% of training]", "inference_share", "{:.1%}", ""),
        ("update [% of training]", "update_share", "{:.1%}", ""),
        ("update with all threads", "all_threads_ratio", "{:.1f}", "×"),
        ("update with the LSTM step by step", "step_by_step_ratio", "{:.1f}", "×"),
    )
    rows = [
        [str(row["num_envs"]), *(_spread(row[name], form, unit) for _, name, form, unit in columns)]
        for row in result["rows"]
    ]
    rounds = f"medians of {result['arguments']['rounds']} rounds, least and largest in brackets"
    head = ["members", *(title for title, *_ in columns)]
    return f"{machine(result)}; {rounds}.\n\n" + table(head, rows)


def _ratio(row: Mapping[str, float]) -> str:
    return f"{row['ratio_median']:.2f}× ({row['ratio_min']:.2f} .. {row['ratio_max']:.2f})"


def _spread(figure: Mapping[str, float], form: str, unit: str) -> str:
    median, least, largest = (form.format(figure[name]) for name in ("median", "min", "max"))
    return f"{median}{unit} ({least} .. {largest})"


if __name__ == "__main__":
    draw(read("throughput"), read("profile"), ROOT / "docs/speed.png")
