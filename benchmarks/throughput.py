r"""Env steps per second, compared with a loop over ordinary PyTorch networks that do the same work.

The loop trains one network after the other, with the same number of batches and the same
evaluations. It uses channels-last memory, foreach SGD and clipping, and data in memory. On a GPU
each network has a separate stream. Both sides are timed in turn in one process, after warm-up, and
the ratio is computed for each round.

    python benchmarks/throughput.py --out benchmarks/results/throughput.json

With `--peers`, compare with Gymnasium's `AsyncVectorEnv` and `SyncVectorEnv` (see `peers`):

    python benchmarks/throughput.py --peers --num-envs 16 --modes empty mix --rounds 5 \
        --out benchmarks/results/throughput-peers.json

On a GPU, with random images of CIFAR-10's shape:

    python benchmarks/throughput.py --device cuda --env-id Esper-CIFAR10-v0 --synthetic \
        --num-envs 64 --out benchmarks/results/throughput-cuda.json

Modes are those of `states`, and "training", which is "empty" without evaluations on both sides.
With `--synthetic` the CIFAR-10 ids train on random images.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from benchmarks import calls_per_round, seconds_per_call, use_synthetic_cifar10, write_result
from benchmarks.peers import OURS, measure_peers
from benchmarks.plain import PlainNetwork, train_batch
from benchmarks.states import MODES, grow, make_envs, settings_of
from benchmarks.step_profile import count_work, measured_phases
from benchmarks.work import measure_limits
from esper_env import EsperVectorEnv, Stage
from esper_env.growth.contributions import plan_coalitions
from esper_env.population.interface import Training

SLICE = 500
"""Number of images that the loop evaluates at once."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Measure env steps per second and the ratio to a loop over plain networks."""

    env_id: str = "Esper-Digits-v0"
    """Environment id."""
    num_envs: tuple[int, ...] = (1, 4, 16, 64)
    """Numbers of members to measure."""
    modes: tuple[str, ...] = MODES
    """States of the slots."""
    rounds: int = 7
    """Timed rounds."""
    device: str = "cpu"
    """Device of both sides, "cpu" or "cuda"."""
    peers: bool = False
    """Whether to compare with Gymnasium's vector environments instead of the loop."""
    threads: int = 2
    """Torch threads."""
    batch_size: int | None = None
    """Batch size, None for the environment's default."""
    seed: int = 0
    """Random seed."""
    synthetic: bool = False
    """Whether CIFAR-10 ids train on random images of the same shape."""
    out: Path | None = None
    """JSON file for the result."""


class PlainLoop:
    """Loop over an environment's networks as ordinary modules, which does the work of a step."""

    def __init__(self, envs: EsperVectorEnv, seed: int) -> None:
        self.envs, self.config = envs, envs.config
        sim = envs.debug_state()
        population, seeds, splits = sim.population, sim.networks.seeds, sim.splits
        self.train_set, self.validation = splits.train, splits.validation
        self.pixels = splits.train.normalized(0, len(splits.train))
        self.labels = splits.train.labels
        on_gpu = envs.device.type == "cuda"
        self.streams = [torch.cuda.Stream() if on_gpu else None for _ in range(envs.num_envs)]
        self.rng = np.random.default_rng(seed)
        self.networks, self.optimizers = [], []
        # Copy weights, seeds and alphas of every member, so that both sides do the same work.
        for i in range(envs.num_envs):
            network = PlainNetwork(population.layout.host)
            network.load_host(population, i)
            for slot in np.nonzero(seeds.blueprint[i] >= 0)[0].tolist():
                kind = int(seeds.blueprint[i, slot]), int(seeds.blend[i, slot])
                seed_module = network.add_seed(population, i, slot, *kind)
                seed_module.is_training_stage = sim.state.slots.stage[i, slot] == Stage.TRAINING
                seed_module.is_isolated = bool(seeds.is_isolated[i, slot])
                seed_module.alpha = float(seeds.alpha[i, slot])
            self.networks.append(network.to(envs.device, memory_format=torch.channels_last))
            rates = self.config.host_learning_rate, self.config.seed_learning_rate
            self.optimizers.append(network.optimizer(*rates, self.config.host_weight_decay))
        # Alphas of the networks that the environment evaluates for each member. (networks, slots)
        everyone = np.arange(envs.num_envs)
        leave_one_out = self.config.attribution == "leave_one_out"
        plan = plan_coalitions(everyone, sim.state.slots, leave_one_out=leave_one_out)
        self.coalitions = [plan.alpha[plan.member == i] for i in everyone]

    def step(self, evaluates: bool = True) -> None:
        """Train every network, evaluate its coalitions, and copy the results to the CPU."""
        config, data = self.config, self.train_set
        shape = (config.batches_per_step, config.batch_size, self.envs.num_envs)
        indices = torch.from_numpy(self.rng.integers(len(data), size=shape)).to(self.envs.device)
        results = []
        for i, (network, optimizer) in enumerate(zip(self.networks, self.optimizers, strict=True)):
            with self.in_stream(i):
                network.train()
                for index in indices[:, :, i]:
                    batch = self.pixels[index], self.labels[index]
                    results.append(train_batch(network, optimizer, *batch, config.clip_norm))
                network.eval()
                with torch.inference_mode():
                    for alpha in self.coalitions[i] if evaluates else ():
                        results += self.evaluate(network, alpha)
        torch.stack(results).cpu()

    @contextmanager
    def in_stream(self, i: int) -> Iterator[None]:
        """Run the work of one network in its stream, if on a GPU."""
        stream = self.streams[i]
        if stream is None:
            yield
            return
        main = torch.cuda.current_stream()
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            yield
        main.wait_stream(stream)

    def evaluate(self, network: PlainNetwork, alpha: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return summed loss and number of correct images of one coalition. () float32."""
        before = {}
        for slot, seed in network.seeds.items():
            before[slot] = seed.alpha, seed.is_training_stage
            seed.alpha, seed.is_training_stage = float(alpha[int(slot)]), False
        loss, hits = torch.zeros(2, device=self.labels.device)
        for first in range(0, len(self.validation), SLICE):
            images = self.validation.normalized(first, first + SLICE)
            labels = self.validation.labels[first : first + SLICE]
            logits = network(images)
            loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            hits += (logits.argmax(1) == labels).sum()
        for slot, seed in network.seeds.items():
            seed.alpha, seed.is_training_stage = before[slot]
        return loss, hits


def measure(args: Args, num_envs: int, mode: str, limits: dict[str, float]) -> dict[str, Any]:
    """Time environment and loop in turn; `limits` comes from `work.measure_limits`."""
    settings = settings_of(mode, args.batch_size)
    envs = make_envs(args.env_id, num_envs, device=args.device, **settings)
    grow(envs, mode, args.seed)
    loop = PlainLoop(envs, args.seed)
    wait = np.zeros((num_envs, len(envs.heads)), dtype=np.int64)

    sim, everyone = envs.debug_state(), np.arange(num_envs)
    rates = np.full(num_envs, envs.config.host_learning_rate)

    def env_step() -> None:
        if mode == "training":
            draw = sim.draw_batches(everyone)
            seeds, images = sim.networks.seeds, sim.splits.train
            sim.population.train(Training(everyone, seeds, images, draw, rates, rates))
        else:
            envs.step(wait)

    def loop_step() -> None:
        loop.step(evaluates=mode != "training")

    # (rounds, 2) seconds per call; ratios of one round, so that slow changes of the machine cancel.
    sides = [(side, calls_per_round(side)) for side in (env_step, loop_step)]
    times = np.array([[seconds_per_call(*side) for side in sides] for _ in range(args.rounds)])
    ratios = times[:, 1] / times[:, 0]
    # A separate round with timers, which would slow down the timed rounds.
    with measured_phases(envs) as phases:
        total = sides[0][1] * seconds_per_call(*sides[0])
    inside = phases.seconds["training"] + phases.seconds["evaluation"]
    work, seconds = count_work(envs, phases).values(), np.median(times[:, 0])
    gflops = sum(part.flops for part in work) / 1e9 / seconds
    gigabytes = sum(part.traffic_bytes for part in work) / 1e9 / seconds
    samples = num_envs * envs.config.batches_per_step * envs.config.batch_size
    return {
        "num_envs": num_envs,
        "mode": mode,
        "env_steps_per_second": float(num_envs / np.median(times[:, 0])),
        "loop_env_steps_per_second": float(num_envs / np.median(times[:, 1])),
        "training_samples_per_second": float(samples / np.median(times[:, 0])),
        "state_bytes_per_member": sum(
            part[0].nbytes
            for part in (
                *dict(sim.state.arrays()).values(),
                *sim.population.member_tensors().values(),
            )
        ),
        "ratio_median": float(np.median(ratios)),
        "ratio_min": float(ratios.min()),
        "ratio_max": float(ratios.max()),
        "step_milliseconds": (1e3 * times[:, 0]).tolist(),
        "loop_milliseconds": (1e3 * times[:, 1]).tolist(),
        "share_outside_training_and_evaluation": 1 - inside / total,
        "share_of_matrix_rate": float(gflops / limits["matrix_gflops"]),
        "share_of_copy_bandwidth": float(gigabytes / limits["copy_gigabytes_per_second"]),
    }


def describe(row: dict[str, Any]) -> str:
    """Return a result as one line of text."""
    if "sides" in row:
        parts = [
            f"{name} {side['env_steps_per_second']:.0f} steps/s"
            + ("" if name == OURS else f" ({_ratio(side)})")
            for name, side in row["sides"].items()
        ]
    else:
        parts = [
            f"{row['env_steps_per_second']:.1f} steps/s",
            f"loop {row['loop_env_steps_per_second']:.1f} ({_ratio(row)})",
            f"outside training and evaluation {row['share_outside_training_and_evaluation']:.1%}",
            f"{row['share_of_matrix_rate']:.1%} of the matrix rate",
            f"{row['share_of_copy_bandwidth']:.1%} of the bandwidth",
        ]
    return f"{row['num_envs']:4d} members, {row['mode']}: {', '.join(parts)}"


def _ratio(row: dict[str, Any]) -> str:
    return f"{row['ratio_median']:.2f}x, {row['ratio_min']:.2f} .. {row['ratio_max']:.2f}"


def main(args: Args) -> None:
    """Measure all combinations, print a line for each, and save.

    Raises:
        ValueError: If the device is not available, or `peers` is set on a GPU.
    """
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device: expected an available device, got {args.device!r}, but torch "
            f"{torch.__version__} sees no GPU; check the driver, or measure with --device cpu"
        )
    if args.peers and device.type != "cpu":
        raise ValueError(f"peers: expected --device cpu, got {args.device}; peers run on the CPU")
    torch.set_num_threads(args.threads)
    if args.synthetic:
        use_synthetic_cifar10()
    limits = measure_limits(device)
    rows = []
    for num_envs in args.num_envs:
        for mode in args.modes:
            if args.peers:
                common = {"rounds": args.rounds, "seed": args.seed, "batch_size": args.batch_size}
                row = measure_peers(args.env_id, num_envs, mode, **common)
            else:
                row = measure(args, num_envs, mode, limits)
            rows.append(row)
            print(describe(row), flush=True)
    write_result(args.out, args, limits=limits, rows=rows)


if __name__ == "__main__":
    main(tyro.cli(Args))
