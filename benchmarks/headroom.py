"""Scores of fixed growth schedules, and the headroom of choosing a schedule for each instance.

A schedule germinates given blueprints in given slots at given env steps, and advances and
fossilizes as soon as the masks allow. All schedules run on the same instances and reset seeds. The
best schedule of each instance is compared with the single best schedule and with never growing.
Schedules are chosen on one half of the episodes and evaluated on the other half, in both
directions, so that the choice does not bias the result.

    python benchmarks/headroom.py --out benchmarks/results/headroom.json
    python benchmarks/headroom.py --env.instances test --repeats 16 \
        --out benchmarks/results/headroom-instances.json
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks import write_result
from benchmarks.protocol import play, summarize, table_of
from esper_agent.baselines import FixedSchedule, parse_plan
from esper_agent.telemetry.display import progress
from esper_env import EnvConfig
from esper_env.config import FloatArray

SMALL = ("norm", "attention", "conv_small", "bottleneck", "depthwise", "conv_light")
GRID = (
    "",
    *(f"{blueprint}@{slot}" for blueprint in (*SMALL, "conv_heavy") for slot in (0, 1)),
    *(
        f"{first}@0+{second}@1"
        for first in ("norm", "conv_light", "conv_heavy")
        for second in ("norm", "conv_small", "conv_light", "conv_heavy")
    ),
    *(f"conv_heavy@{slot}:{step}" for slot in (0, 1) for step in (10, 20, 30)),
)
"""Schedules in the format of `parse_plan`. The first one never grows."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Measure the scores of fixed schedules."""

    env_id: str = "Esper-Digits-v0"
    """Environment id."""
    env: EnvConfig = field(default_factory=EnvConfig)
    """Settings of the environment, including its set of instances."""
    repeats: int = 64
    """Episodes per schedule and instance."""
    seed: int = 500_000
    """First reset seed, different from those of training and evaluation."""
    schedules: tuple[str, ...] = GRID
    """Schedules to run. The others are compared with the first."""
    out: Path | None = None
    """JSON file for the result."""


def halves(repeats: int) -> tuple[tuple[slice, slice], ...]:
    """Return the repeats to choose on and those to judge by: both halves, in both directions."""
    half = repeats // 2
    return (np.s_[:half], np.s_[half:]), (np.s_[half:], np.s_[:half])


def best_of_each(scores: FloatArray, chosen: slice, held: slice) -> FloatArray:
    """Return the held scores of each instance's best schedule on chosen repeats.

    Args:
        scores: Scores of all episodes. (schedules, instances, repeats).
        chosen: Repeats to choose on.
        held: Repeats to return.

    Returns:
        (instances, held repeats).
    """
    best = scores[:, :, chosen].mean(axis=2).argmax(axis=0)
    return scores[best, np.arange(scores.shape[1])][:, held]


def choose_and_judge(scores: FloatArray, rng: np.random.Generator) -> dict[str, Any]:
    """Compare the best schedule of each instance with the single best and the first schedule.

    Args:
        scores: Scores of all episodes, with an even number of repeats.
            (schedules, instances, repeats).
        rng: Random generator of the bootstrap.

    Returns:
        Summaries of scores and of paired differences, on episodes not used for the choice.
    """
    judged: dict[str, list[FloatArray]] = {"first": [], "single": [], "each": []}
    for chosen, held in halves(scores.shape[2]):
        mean = scores[:, :, chosen].mean(axis=2)
        judged["each"].append(best_of_each(scores, chosen, held))
        judged["single"].append(scores[mean.mean(axis=1).argmax()][:, held])
        judged["first"].append(scores[0][:, held])
    tables = {name: np.concatenate(parts, axis=1)[None] for name, parts in judged.items()}
    return {
        **{name: summarize(table, rng) for name, table in tables.items()},
        "each - first": summarize(tables["each"] - tables["first"], rng),
        "single - first": summarize(tables["single"] - tables["first"], rng),
        "each - single": summarize(tables["each"] - tables["single"], rng),
    }


def main() -> None:
    """Run all schedules, print a line per schedule, and save."""
    args = tyro.cli(Args)
    if args.repeats < 2 or args.repeats % 2:
        raise ValueError(f"repeats: expected an even number of at least 2, got {args.repeats}")
    rng = np.random.default_rng(args.seed)
    rows: dict[str, Any] = {}
    tables: list[FloatArray] = []
    for name in progress(args.schedules, "schedules"):
        began = time.perf_counter()
        policy = FixedSchedule(parse_plan(name))
        episodes = play(policy, args.env_id, args.env, args.repeats, args.seed)
        tables.append(table_of([episodes])[0])
        # Paired: all schedules run on the same instances and reset seeds. (instances, repeats)
        difference = tables[-1] - tables[0]
        rows[name] = {
            "score_mean": float(tables[-1].mean()),
            "minus_first_mean": float(difference.mean()),
            "minus_first_standard_error": float(difference.std(ddof=1) / difference.size**0.5),
            "test_accuracy_mean": float(np.mean(episodes["committed_test_accuracy"])),
            "parameters_mean": float(np.mean(episodes["parameters"])),
            "score_of_each_instance": tables[-1].mean(axis=1).tolist(),
        }
        print(
            f"{name or 'never':26s} score {rows[name]['score_mean']:.4f}  minus first "
            f"{rows[name]['minus_first_mean']:+.4f} "
            f"+- {rows[name]['minus_first_standard_error']:.4f}  "
            f"parameters {rows[name]['parameters_mean']:.0f}  "
            f"{time.perf_counter() - began:.1f} s",
            flush=True,
        )
    judged = choose_and_judge(np.stack(tables), rng)
    for name, summary in judged.items():
        print(f"{name:16s} {summary['iqm']:+.4f} ({summary['low']:+.4f} .. {summary['high']:+.4f})")
    write_result(args.out, args, schedules=rows, judged=judged)


if __name__ == "__main__":
    main()
