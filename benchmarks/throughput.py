"""Env steps per second against a loop over ordinary PyTorch networks doing the same work.

The loop trains one network after the other: channels-last, foreach SGD and clipping, data in
memory, the same batches and the same evaluations. Both sides are timed in turn in the same
process, after warm-up; the ratio is taken round by round.

    python benchmarks/throughput.py --out benchmarks/results/throughput.json

Modes: "empty" has no seed; "mix" has a seed of a random blueprint and style in every slot, in
random stages; "mix + leave-one-out" measures contributions as well; "training" is "empty" without
evaluations on both sides. With `--synthetic` the CIFAR-10 ids train on made-up images.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro

from benchmarks import use_synthetic_cifar10, write_result
from benchmarks.plain import PlainNetwork, train_batch
from esper_env import EsperVectorEnv, Op, Stage
from esper_env.attribution import plan_coalitions

EPISODE_STEPS = 20_000
"""More than are timed, so that no episode ends."""
SLICE = 500
"""Images that the loop evaluates at once."""
MODES = ("empty", "mix", "mix + leave-one-out")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Measure throughput."""

    env_id: str = "Esper-Digits-v0"
    """Environment id."""
    num_envs: tuple[int, ...] = (1, 4, 16, 64)
    """Numbers of members."""
    modes: tuple[str, ...] = MODES
    """Which states of the slots."""
    rounds: int = 7
    """Timed rounds."""
    threads: int = 2
    """Torch threads."""
    batch_size: int | None = None
    """Batch size, if not the environment's default."""
    seed: int = 0
    """Random seed."""
    synthetic: bool = False
    """Whether CIFAR-10 ids train on made-up images of the same shape."""
    out: Path | None = None
    """Where to write the result as JSON."""


def make_state(args: Args, num_envs: int, mode: str) -> EsperVectorEnv:
    """Make an environment and bring its slots into the mode's state."""
    options: dict[str, Any] = {} if args.batch_size is None else {"batch_size": args.batch_size}
    envs = gym.make_vec(
        args.env_id,
        num_envs=num_envs,
        max_episode_steps=EPISODE_STEPS,
        episode_steps=EPISODE_STEPS,
        attribution="leave_one_out" if mode.endswith("leave-one-out") else "none",
        **options,
    ).unwrapped
    assert isinstance(envs, EsperVectorEnv)
    envs.reset(seed=args.seed)
    if mode in ("empty", "training"):
        return envs
    rng = np.random.default_rng(args.seed)
    for slot in envs.heads[1].options:
        actions = np.stack(
            [rng.integers(len(head.options), size=num_envs) for head in envs.heads], axis=1
        )
        actions[:, :2] = Op.GERMINATE, slot
        actions[:, 6:] = 0
        envs.step(actions)
    for _ in range(12):
        masks = envs.conditional_masks()["slot"][:, Op.ADVANCE]
        chosen = masks.any(axis=1) & (rng.random(num_envs) < 0.2)
        actions = np.zeros((num_envs, len(envs.heads)), dtype=np.int64)
        actions[chosen, 0], actions[chosen, 1] = Op.ADVANCE, masks.argmax(axis=1)[chosen]
        envs.step(actions)
    return envs


class PlainLoop:
    """The same networks as ordinary modules, and one env step of work on them."""

    def __init__(self, envs: EsperVectorEnv, seed: int) -> None:
        self.envs, self.config = envs, envs.config
        sim = envs._sim
        population, seeds, splits = sim.population, sim.seeds, sim.splits
        self.train_set, self.validation = splits.train, splits.validation
        self.pixels, self.labels = (
            splits.train.normalised(0, len(splits.train)),
            splits.train.labels,
        )
        self.rng = np.random.default_rng(seed)
        self.networks, self.optimizers = [], []
        for i in range(envs.num_envs):
            network = PlainNetwork(population.layout.host)
            network.load_host(population, i)
            for slot in np.nonzero(seeds.blueprint[i] >= 0)[0].tolist():
                kind = int(seeds.blueprint[i, slot]), int(seeds.blend[i, slot])
                seed_module = network.add_seed(population, i, slot, *kind)
                seed_module.is_training_stage = sim.state.stage[i, slot] == Stage.TRAINING
                seed_module.is_isolated = bool(seeds.is_isolated[i, slot])
                seed_module.alpha = float(seeds.alpha[i, slot])
            self.networks.append(network.to(memory_format=torch.channels_last))
            rates = self.config.host_learning_rate, self.config.seed_learning_rate
            self.optimizers.append(network.optimizer(*rates, self.config.host_weight_decay))
        everyone = np.arange(envs.num_envs)
        leave_one_out = self.config.attribution == "leave_one_out"
        plan = plan_coalitions(everyone, sim.state, leave_one_out=leave_one_out)
        self.coalitions = [plan.alpha[plan.member == i] for i in everyone]

    def step(self, evaluates: bool = True) -> None:
        """Train every network on its batches and evaluate its coalitions."""
        config, data = self.config, self.train_set
        shape = (config.batches_per_step, config.batch_size, self.envs.num_envs)
        indices = torch.from_numpy(self.rng.integers(len(data), size=shape))
        for i, (network, optimizer) in enumerate(zip(self.networks, self.optimizers, strict=True)):
            network.train()
            for index in indices[:, :, i]:
                batch = self.pixels[index], self.labels[index]
                train_batch(network, optimizer, *batch, config.clip_norm)
            network.eval()
            with torch.inference_mode():
                for alpha in self.coalitions[i] if evaluates else ():
                    self.evaluate(network, alpha)

    def evaluate(self, network: PlainNetwork, alpha: Any) -> None:
        """Compute accuracy and loss of one coalition, in slices that suit the cache."""
        before = {}
        for slot, seed in network.seeds.items():
            before[slot] = seed.alpha, seed.is_training_stage
            seed.alpha, seed.is_training_stage = float(alpha[int(slot)]), False
        loss, hits = 0.0, 0
        for first in range(0, len(self.validation), SLICE):
            images = self.validation.normalised(first, first + SLICE)
            labels = self.validation.labels[first : first + SLICE]
            logits = network(images)
            loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            hits += int((logits.argmax(1) == labels).sum())
        for slot, seed in network.seeds.items():
            seed.alpha, seed.is_training_stage = before[slot]


def measure(args: Args, num_envs: int, mode: str) -> dict[str, Any]:
    """Time environment and loop in turn."""
    envs = make_state(args, num_envs, mode)
    loop = PlainLoop(envs, args.seed)
    wait = np.zeros((num_envs, len(envs.heads)), dtype=np.int64)

    sim, everyone = envs._sim, np.arange(num_envs)
    rates = np.full(num_envs, envs.config.host_learning_rate)

    def env_step() -> None:
        if mode == "training":
            draw = sim._draw_batches(everyone)
            sim.population.train(everyone, sim.seeds, sim.splits.train, draw, rates, rates)
        else:
            envs.step(wait)

    def loop_step() -> None:
        loop.step(evaluates=mode != "training")

    repeats = [_repeats(env_step), _repeats(loop_step)]
    times = np.array(
        [[_time(env_step, repeats[0]), _time(loop_step, repeats[1])] for _ in range(args.rounds)]
    )
    ratios = times[:, 1] / times[:, 0]
    outside = None if mode == "training" else _share_outside(envs, env_step)
    samples = num_envs * envs.config.batches_per_step * envs.config.batch_size
    return {
        "num_envs": num_envs,
        "mode": mode,
        "env_steps_per_second": float(num_envs / np.median(times[:, 0])),
        "loop_env_steps_per_second": float(num_envs / np.median(times[:, 1])),
        "training_samples_per_second": float(samples / np.median(times[:, 0])),
        "state_bytes_per_member": sum(
            part[0].nbytes
            for part in (*sim.member_arrays().values(), *sim.member_tensors().values())
        ),
        "ratio_median": float(np.median(ratios)),
        "ratio_min": float(ratios.min()),
        "ratio_max": float(ratios.max()),
        "step_milliseconds": (1e3 * times[:, 0]).tolist(),
        "loop_milliseconds": (1e3 * times[:, 1]).tolist(),
        "share_outside_training_and_evaluation": outside,
    }


def _share_outside(envs: EsperVectorEnv, env_step: Callable[[], None]) -> float:
    """Return the share of `step` spent outside the population's train and evaluate."""
    population: Any = envs._sim.population
    inside = 0.0
    for name in ("train", "evaluate"):
        method = getattr(population, name)

        def timed(*values: Any, method: Any = method) -> Any:
            nonlocal inside
            begin = time.perf_counter()
            result = method(*values)
            inside += time.perf_counter() - begin
            return result

        setattr(population, name, timed)
    begin = time.perf_counter()
    for _ in range(30):
        env_step()
    total = time.perf_counter() - begin
    for name in ("train", "evaluate"):
        delattr(population, name)
    return 1 - inside / total


def _time(function: Callable[[], None], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - begin) / repeats


def _repeats(function: Callable[[], None]) -> int:
    """Warm up, and choose repetitions so that a round takes about a third of a second."""
    for _ in range(3):
        function()
    return max(1, int(0.35 / _time(function, 2)))


def main() -> None:
    """Measure all combinations, print a line for each, and save."""
    args = tyro.cli(Args)
    torch.set_num_threads(args.threads)
    if args.synthetic:
        use_synthetic_cifar10()
    rows = []
    for num_envs in args.num_envs:
        for mode in args.modes:
            row = measure(args, num_envs, mode)
            rows.append(row)
            outside = row["share_outside_training_and_evaluation"]
            print(
                f"{num_envs:4d} members, {mode:19s} {row['env_steps_per_second']:7.1f} steps/s, "
                f"loop {row['loop_env_steps_per_second']:6.1f}, ratio {row['ratio_median']:.2f} "
                f"({row['ratio_min']:.2f} .. {row['ratio_max']:.2f})"
                + (f", outside training and evaluation {100 * outside:.1f} %" if outside else ""),
                flush=True,
            )
    write_result(args.out, args, rows=rows)


if __name__ == "__main__":
    main()
