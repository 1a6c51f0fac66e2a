"""What fixed growth schedules reach on an environment: how much there is to win by growing.

Each arm germinates given blueprints in given slots at given steps, advances and fossilizes as soon
as the masks allow, and otherwise waits. All arms see the same reset seeds. Evidence for the
defaults of the environment ids.

    python benchmarks/headroom.py --env.batches-per-step 4 --out benchmarks/results/headroom.json
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks import write_result
from esper_agent.ppo_lstm import make_envs
from esper_env import EnvConfig, EsperVectorEnv, Op

Plan = tuple[tuple[int, str, int], ...]
"""(slot, blueprint, step of germination) per seed."""

ARMS: dict[str, Plan] = {
    "never": (),
    **{f"{b}@{s}": ((s, b, 1),) for s in (0, 1) for b in ("conv_small", "bottleneck", "depthwise")},
    **{f"{b}@{s}": ((s, b, 1),) for s in (0, 1) for b in ("conv_light", "conv_heavy")},
    "conv_light@0 + conv_light@1": ((0, "conv_light", 1), (1, "conv_light", 2)),
    "conv_heavy@0 + conv_light@1": ((0, "conv_heavy", 1), (1, "conv_light", 2)),
    "conv_heavy@0 + conv_heavy@1": ((0, "conv_heavy", 1), (1, "conv_heavy", 2)),
    "conv_heavy@0 from step 15": ((0, "conv_heavy", 15),),
    "conv_heavy@0 from step 30": ((0, "conv_heavy", 30),),
}


@dataclass(frozen=True, kw_only=True)
class Args:
    """Measure the arms."""

    env_id: str = "Esper-Digits-v0"
    """Environment id."""
    env: EnvConfig = field(default_factory=EnvConfig)
    """Its settings."""
    episodes: int = 64
    """Episodes per arm, side by side."""
    seed: int = 500_000
    """First reset seed; not one of training or evaluation."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Which arms."""
    out: Path | None = None
    """Where to write the result as JSON."""


def follow(envs: EsperVectorEnv, plan: Plan, step: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Choose the plan's actions for all members."""
    masks = envs.conditional_masks()
    names = list(envs.heads[2].options)
    actions = np.zeros((envs.num_envs, len(envs.heads)), dtype=np.int64)
    full_alpha = envs.heads[5].options.index(1.0)
    for i in range(envs.num_envs):
        for slot, blueprint, start in plan:
            if step == start and masks["slot"][i, Op.GERMINATE, slot]:
                actions[i, :6] = Op.GERMINATE, slot, names.index(blueprint), 0, 0, full_alpha
            elif masks["slot"][i, Op.FOSSILIZE, slot]:
                actions[i, :2] = Op.FOSSILIZE, slot
            elif masks["slot"][i, Op.ADVANCE, slot]:
                actions[i, :2] = Op.ADVANCE, slot
            else:
                continue
            break
    return actions


def run_arm(envs: EsperVectorEnv, plan: Plan, seed: int) -> dict[str, Any]:
    """Run one episode per member and summarise it."""
    envs.reset(seed=seed)
    begin = time.perf_counter()
    for step in range(envs.config.episode_steps):
        *_, info = envs.step(follow(envs, plan, step))
    seconds = (time.perf_counter() - begin) / envs.config.episode_steps
    final = info["final_info"]
    score = final["committed_score"]
    return {
        "score_mean": float(score.mean()),
        "score_std": float(score.std(ddof=1)),
        "test_accuracy_mean": float(final["committed_test_accuracy"].mean()),
        "parameters_mean": float(final["parameters"].mean()),
        "step_seconds": seconds,
        "score": score.tolist(),
    }


def main() -> None:
    """Run all arms, print a line for each, and save."""
    args = tyro.cli(Args)
    envs = make_envs(args.env_id, args.episodes, "cpu", args.env)
    arms: dict[str, Any] = {}
    never: list[float] = []
    for name in args.arms:
        arm = run_arm(envs, ARMS[name], args.seed)
        never = never or arm["score"]
        difference = np.array(arm["score"]) - np.array(never)
        arm["minus_first_mean"] = float(difference.mean())
        arm["minus_first_standard_error"] = float(difference.std(ddof=1) / len(difference) ** 0.5)
        arms[name] = arm
        print(
            f"{name:32s} score {arm['score_mean']:.4f} sd {arm['score_std']:.4f}  "
            f"minus first {arm['minus_first_mean']:+.4f} "
            f"+- {arm['minus_first_standard_error']:.4f}  "
            f"test {arm['test_accuracy_mean']:.4f}  parameters {arm['parameters_mean']:.0f}  "
            f"{1e3 * arm['step_seconds']:.0f} ms/step",
            flush=True,
        )
    write_result(args.out, args, arms=arms)


if __name__ == "__main__":
    main()
