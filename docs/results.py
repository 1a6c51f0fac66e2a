"""Tables and figures of docs/results.md, computed from the committed result files.

`docs/generate.py` writes the tables into the pages. This command draws the figures:

    python -m docs.results --agent runs/learning/agents/1
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.image import imsave

from benchmarks.protocol import table_of
from docs.page import ROOT, table
from esper_agent.baselines import parse_plan
from esper_agent.ppo_lstm import TrainedPolicy
from esper_env import EsperVectorEnv
from esper_env.tasks import TASKS
from esper_env.tasks.instances import make_instances

RESULTS = ROOT / "benchmarks" / "results"
OVERVIEW, FIGURE = "docs/adaptivity.png", "docs/learning-digits.png"
ARMS = {
    "ppo_lstm": "`ppo_lstm`",
    "best_schedule": "best fixed schedule",
    "tuned_heuristic": "plateau heuristic, tuned",
    "heuristic": "plateau heuristic",
    "periodic": "periodic growth",
    "random": "random legal actions",
    "never_grow": "never grow",
    "static_grown": "grown architecture from scratch",
    "static_longer": "host only, equal compute",
}
"""Arms in the order of the tables."""
ADAPTIVITY_ARMS = {
    "never": "never grow",
    "constant": "best plan, always in service",
    "open_loop": "best open loop",
    "open_loop of each instance": "best open loop of each instance",
    "oracle": "oracle that sees the regime",
    "rule": "best rule",
    "memoryless_rule": "best rule without memory",
    "ppo_lstm": "`ppo_lstm`",
}
"""Arms of `benchmarks/adaptivity.py`."""
ADAPTIVITY = {
    "Esper-Digits-Sizing-v0": "adaptivity-sizing",
    "Esper-Digits-Contexts-v0": "adaptivity-contexts",
    "Esper-Digits-v0": "adaptivity-digits",
}
"""Result of `benchmarks/adaptivity.py` for each environment."""
ABLATIONS: dict[str, str] = {}
"""Result of `benchmarks/ablations.py` for environments with regimes."""
MARKERS = dict(zip(ARMS, "Do^xvsphd", strict=True)) | {"never_grow": "_"}
"""Marker of each arm in the figures."""
VARIANTS = {
    "actions drawn when judged": "sampled actions in evaluation",
    "reward: committed score at the end only": "reward: preset `sparse`",
    "horizon: truncated, bootstrapped": '`horizon="truncate"` with bootstrapping',
    "no memory": "no LSTM",
    "all heads": "no fixed heads",
    "entropy weight falls to 0": "entropy coefficient annealed to 0",
    "twice the value weight": "twice the value coefficient",
    "half the width": "half the hidden size",
    "minimal observation, no memory": "minimal observation, no LSTM",
    "PRUNE and FOSSILIZE": "with PRUNE and FOSSILIZE",
}
"""Labels of variants in the table; other variants keep the name in the result file."""


def read(name: str) -> dict[str, Any]:
    """Return the content of a committed result file."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def headline(result: dict[str, Any], is_short: bool = False) -> str:
    """Return the table of the arms; the short form omits some columns."""
    rows = []
    for arm, label in ARMS.items():
        record = result["arms"][arm]
        summary, pair = record["summary"], result["paired"].get(f"ppo_lstm - {arm}")
        runs = record["episodes"]

        def mean(figure: str, runs: list[dict[str, Any]] = runs) -> float:
            return float(np.mean([run[figure] for run in runs]))

        rows.append(
            [
                label,
                f"{summary['iqm']:.4f}",
                f"{summary['low']:.4f} .. {summary['high']:.4f}",
                signed_interval(pair) if pair else "",
                f"{100 * pair['probability_of_improvement']:.0f} %" if pair else "",
                f"{mean('test_score'):.4f}",
                f"{mean('committed_test_accuracy'):.4f}",
                f"{mean('parameters'):.0f}",
                f"{mean('flops') / 1e9:.2f}",
            ]
        )
    head = ["arm", "score (IQM)", "95 % CI", "`ppo_lstm` minus arm (95 % CI)"]
    head += ["probability of improvement", "test score"]
    head += ["test accuracy", "parameters grown", "training GFLOP"]
    if is_short:
        kept = [0, 1, 2, 3, 7]
        head, rows = [head[k] for k in kept], [[row[k] for k in kept] for row in rows]
    return table(head, rows)


def search_table(result: dict[str, Any]) -> str:
    """Return the results of the searches on the training instances."""
    rows = []
    for name, label in (("schedule", "fixed schedule"), ("heuristic", "plateau heuristic")):
        found = result["search"][name]
        last = found["rounds"][-1]
        count = len(found["rounds"][0]["scores"])
        best = found["best"].replace('"', "").strip("{}")
        score = last["scores"][found["best"]]
        rows.append([label, str(count), best, f"{score:.4f} ({last['episodes']})"])
    return table(
        ["search", "candidates", "best candidate", "score in the last round (episodes)"], rows
    )


def adaptivity_table(
    results: dict[str, dict[str, Any]], ablations: dict[str, dict[str, Any]]
) -> str:
    """Return what adaptation is worth in each environment, and what agents get of it.

    Args:
        results: Results of `benchmarks/adaptivity.py` by environment.
        ablations: Results of `benchmarks/ablations.py` by environment, where there are any.
    """
    rows = []
    for env_id, result in results.items():
        paired = result["paired"]
        variants = ablations[env_id]["variants"] if env_id in ablations else {}
        without = variants.get("minimal observation, no memory")
        memory = None
        if without is not None:
            # The other way round: what the agent with memory scores more.
            pair = without["mean_difference"]
            memory = {"difference": -pair["difference"], "low": -pair["high"], "high": -pair["low"]}
        rows.append(
            [
                f"`{env_id}`",
                *(
                    signed_interval(paired[f"{arm} - open_loop"], 3)
                    if f"{arm} - open_loop" in paired
                    else "no regimes"
                    for arm in ("oracle", "rule", "ppo_lstm")
                ),
                "not measured" if memory is None else signed_interval(memory, 3),
            ]
        )
    head = ["environment", "gap: oracle", "best rule", "`ppo_lstm`", "memory"]
    return table(head, rows)


def adaptivity_arms(result: dict[str, Any]) -> str:
    """Return all arms of one environment."""
    rows = []
    for arm, label in ADAPTIVITY_ARMS.items():
        if arm in result["scores"]:
            pair = result["paired"].get(f"{arm} - open_loop")
            difference = "" if pair is None else signed_interval(pair)
            found = result["found"].get(arm, "").replace('"', "").strip("{}")
            rows.append([label, f"{result['scores'][arm]:.4f}", difference, found])
    if (pair := result["paired"].get("ppo_lstm - rule")) is not None:
        rows.append(["`ppo_lstm` minus best rule", "", signed_interval(pair), ""])
    return table(["arm", "score", "minus best open loop (95 % CI)", "what was found"], rows)


def plan_table(result: dict[str, Any]) -> str:
    """Return the score of each plan in the hands of an oracle, on training instances."""
    first = result["searches"]["oracle"]["rounds"][0]
    best: dict[str, float] = {}
    for name, score in first["scores"].items():
        plan = name.partition(" ")[0]
        best[plan] = max(best.get(plan, 0.0), score)
    rows = [[plan, f"{score:.3f}"] for plan, score in sorted(best.items(), key=lambda p: -p[1])]
    return table(["seeds", f"score of the oracle ({first['episodes']} episodes)"], rows)


def draw_adaptivity(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the differences of all arms from the best open loop, one panel per environment."""
    figure = Figure(figsize=(12.0, 3.6), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True)
    arms = [arm for arm in ADAPTIVITY_ARMS if arm != "open_loop"]
    for axes, (env_id, result) in zip(panels, results.items(), strict=True):
        axes.axvline(0, color="0.5", linewidth=1)
        for y, arm in enumerate(reversed(arms)):
            pair = result["paired"].get(f"{arm} - open_loop")
            if pair is not None:
                color = "C3" if arm.startswith("ppo") else "C0"
                axes.plot([pair["low"], pair["high"]], [y, y], color=color, linewidth=2)
                axes.plot(pair["difference"], y, "o", color=color)
        axes.set_title(env_id, fontsize=10)
        axes.locator_params(axis="x", nbins=5)
        axes.set_yticks(range(len(arms)))
        axes.set_yticklabels([ADAPTIVITY_ARMS[arm].replace("`", "") for arm in reversed(arms)])
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("score minus that of the best open loop (mean and 95 % interval)", fontsize=10)
    figure.savefig(path, dpi=110)


def policy_table(result: dict[str, Any]) -> str:
    """Return the fossilized seeds of the trained agents by width of the host."""
    runs = result["arms"]["ppo_lstm"]["episodes"]
    instances = make_instances("test", TASKS["digits"].ranges, 0.05)
    width = np.array(instances.widths)[instances.width]
    rows = []
    for value in instances.widths:
        growths = [
            growth
            for run in runs
            for growth, instance in zip(run["growth"], run["instance"], strict=True)
            if width[instance] == value
        ]
        if growths:
            rows.append([f"{value:g}", *_describe(growths)])
    every = [growth for run in runs for growth in run["growth"]]
    rows.append(["all", *_describe(every)])
    head = ["host width", "episodes", "no seed", "slot 0", "slot 1", "both slots"]
    return table([*head, "median env step of germination"], rows)


def _describe(growths: Sequence[str]) -> list[str]:
    plans = [parse_plan(growth) for growth in growths]
    share = 100 / len(plans)
    cells = [str(len(plans)), f"{share * sum(not plan for plan in plans):.0f} %"]
    for slot in (0, 1):
        counts = Counter(name for plan in plans for s, name, _ in plan if s == slot)
        common = [(name, share * n) for name, n in counts.most_common(3)]
        parts = [f"{name} {percent:.0f} %" for name, percent in common if percent >= 0.5]
        cells.append(", ".join(parts) or "-")
    cells.append(f"{share * sum(len(plan) == 2 for plan in plans):.0f} %")
    steps = [step for plan in plans for *_, step in plan]
    cells.append(f"{np.median(steps):.0f}" if steps else "-")
    return cells


def ablation_table(result: dict[str, Any]) -> str:
    """Return the score of each variant and its difference to the default."""
    rows = []
    for name, variant in result["variants"].items():
        summary, pair = variant["summary"], variant["paired"]
        agents = variant["score_of_each_agent"]
        base = variant.get("compared_with", "default")
        note = "" if base == "default" else f", minus {base}"
        rows.append(
            [
                VARIANTS.get(name, name),
                f"{summary['iqm']:.4f}",
                "" if name == "default" else signed_interval(pair) + note,
                f"{min(agents):.3f} .. {max(agents):.3f}",
                f"{variant['parameters_mean']:.0f}",
            ]
        )
    head = ["variant", "score (IQM)", "minus the default (95 % CI)", "means of single agents"]
    return table([*head, "parameters grown"], rows)


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw scores per instance, and accuracy over parameters and training compute."""
    figure = Figure(figsize=(12.0, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.6, 1, 1))
    colors = {arm: f"C{n}" for n, arm in enumerate(ARMS)}
    means = {arm: table_of(result["arms"][arm]["episodes"]).mean(axis=(0, 2)) for arm in ARMS}
    order = np.argsort(means["never_grow"])
    for arm in ("never_grow", "heuristic", "tuned_heuristic", "best_schedule", "ppo_lstm"):
        left.plot(means[arm][order], MARKERS[arm], color=colors[arm], alpha=0.85)
    left.set_xticks(range(0, len(order), 5))
    left.set_xlabel("test instance, sorted by the score of never grow")
    left.set_ylabel("committed score")
    for axes, name, label in (
        (middle, "parameters", "parameters grown"),
        (right, "flops", "training compute [GFLOP]"),
    ):
        for arm, text in ARMS.items():
            runs = result["arms"][arm]["episodes"]
            x = np.mean([run[name] for run in runs]) / (1e9 if name == "flops" else 1)
            y = np.mean([run["committed_test_accuracy"] for run in runs])
            label_of = text.replace("`", "") if axes is middle else None
            axes.plot(x, y, MARKERS[arm], color=colors[arm], label=label_of, markersize=8)
        axes.set_xlabel(label)
        axes.set_ylabel("test accuracy (mean)")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)


def signed_interval(pair: dict[str, float], digits: int = 4) -> str:
    """Return a difference with its interval."""
    mean, low, high = (f"{pair[key]:+.{digits}f}" for key in ("difference", "low", "high"))
    return f"{mean} ({low} .. {high})"


def draw_episode(agent: Path, instance: int, seed: int, path: Path) -> None:
    """Draw one episode of a trained agent on a test instance."""
    config = json.loads((agent / "config.json").read_text())
    settings = {"instances": "test", "heads": config["env"]["heads"]}
    envs = gym.make_vec(
        config["env_id"], 1, render_mode="rgb_array", autoreset_mode="Disabled", **settings
    ).unwrapped
    assert isinstance(envs, EsperVectorEnv)
    observation, info = envs.reset(seed=seed, options={"instance": instance})
    policy = TrainedPolicy(agent)
    policy.begin(envs, seed)
    is_over = np.zeros(1, dtype=bool)
    while not is_over.all():
        observation, _, terminated, truncated, info = envs.step(policy.act(observation, info))
        is_over = terminated | truncated
    frames = envs.render()
    assert frames is not None
    imsave(path, frames[0])


@dataclass(frozen=True, kw_only=True)
class Args:
    """Draw the figures of docs/results.md."""

    agent: Path | None = None
    """Run directory of the agent that acts in the episodes; without it they are not drawn."""
    instances: tuple[int, int] = (0, 1)
    """Test instances of the two episodes."""
    seed: int = 1_000_000
    """Reset seed of both episodes."""


def main() -> None:
    """Draw all figures."""
    args = tyro.cli(Args)
    draw(read("learning-digits"), ROOT / FIGURE)
    draw_adaptivity({name: read(file) for name, file in ADAPTIVITY.items()}, ROOT / OVERVIEW)
    for name, instance in zip(("a", "b") if args.agent else (), args.instances, strict=False):
        draw_episode(args.agent, instance, args.seed, ROOT / f"docs/episode-{name}.png")


if __name__ == "__main__":
    main()
