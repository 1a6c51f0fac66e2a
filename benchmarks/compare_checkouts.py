"""Comparison of two checkouts of this repository: bitwise equal results, and speed.

Each checkout runs in a separate process with the packages of this Python environment. The script
uses only names that exist in both checkouts.

    python benchmarks/compare_checkouts.py --old ../old-checkout
    python benchmarks/compare_checkouts.py --old ../old-checkout --speed --first-step \
        --out benchmarks/results/checkouts.json

The comparison steps 16 members of mixed instances through every scenario of `SCENARIOS` with
random legal and some illegal actions, and compares digests of observations, rewards, masks, info,
weights and snapshots after every step. It prints "equal", or the first difference of each scenario.

`--speed` steps both checkouts in turn and prints the ratio of their times, old to new: above 1 the
new checkout is faster. With `--threads 1` the ratio of processor time is valid on a busy machine.
`--first-step` times import, reset and two steps of each with an empty compilation cache.
`--trainings 3` times three default trainings of each, in turn; `--timesteps` shortens them:

    python benchmarks/compare_checkouts.py --old ../old-checkout --scenarios --trainings 3 \
        --out benchmarks/results/training-time.json
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

UNSTABLE = {"learning_rate_decay": "none", "divergence_sigma": 0.0, "divergence_factor": 1.02}
"""Settings with a rollback every few steps."""
SCENARIOS: dict[str, dict[str, Any]] = {
    "leave-one-out": {"attribution": "leave_one_out"},
    "Shapley values": {"attribution": "full", "reward_weights": {"pbrs": 0.1}},
    "no attribution": {"attribution": "none", "horizon": "terminal", "reward": "sparse"},
    "rollbacks": {**UNSTABLE, "max_rollbacks": 4, "host_learning_rate": 0.4},
    "next-step autoreset": {"autoreset_mode": "NextStep", "illegal_actions": "wait"},
    "every option": {
        "automatic_training": False,
        "automatic_holding": False,
        "automatic_blending": True,
        "strict_fossilize": True,
        "isolated_stages": ["TRAINING"],
        "max_seeds": 1,
    },
    "torch engine": {"host": "subclassed", "attribution": "leave_one_out"},
    "torch engine, rollbacks": {"host": "subclassed", "host_learning_rate": 0.4, **UNSTABLE},
    "both engines": {"blueprints": True, "attribution": "full"},
    "bfloat16": {"precision": "bfloat16", "batches_per_step": 2},
}
"""Settings by scenario; "subclassed" and "blueprints" are not fields of `EnvConfig`, but use layers
without kernels (see `_register`)."""
SPEED = [(count, mode) for count in (16, 64) for mode in ("empty", "mix")]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Compare an older checkout with this one."""

    old: Path
    """Root of the older checkout."""
    new: Path = Path(__file__).resolve().parent.parent
    """Root of the newer checkout; by default that of this script."""
    steps: int = 300
    """Env steps of each scenario."""
    num_envs: int = 16
    """Number of members."""
    scenarios: tuple[str, ...] = tuple(SCENARIOS)
    """Scenarios to compare."""
    speed: bool = False
    """Whether to measure the speed of both checkouts."""
    rounds: int = 15
    """Timed rounds of each checkout."""
    threads: int = 2
    """Torch threads."""
    first_step: bool = False
    """Whether to time the first step with an empty compilation cache."""
    trainings: int = 0
    """Trainings of each checkout to time, with its own defaults."""
    timesteps: int | None = None
    """Env steps of a training; by default those of the checkout."""
    out: Path | None = None
    """JSON file for the result."""


# ---------------------------------------------------------------------------------- the worker


def record(settings: dict[str, Any], num_envs: int, steps: int) -> Iterator[dict[str, str]]:
    """Yield the digests after a reset and after every step."""
    import gymnasium as gym

    import esper_env  # noqa: F401

    settings = dict(settings)
    if settings.pop("blueprints", False):
        _register(blueprint=True)
    if settings.get("host") == "subclassed":
        _register(blueprint=False)
    common = {"instances": "train", "autoreset_mode": "SameStep", "episode_steps": 40}
    envs = gym.make_vec("Esper-Digits-v0", num_envs=num_envs, **{**common, **settings}).unwrapped
    rng = np.random.default_rng(0)
    observation, info = envs.reset(seed=list(range(num_envs)))
    rewards = np.zeros(num_envs)
    num_rollbacks = 0
    for step in range(steps + 1):
        num_rollbacks += int(info["rolled_back"].sum())
        state = envs.get_state()
        yield {
            "observation": _digest(observation),
            "reward": _digest(rewards),
            "mask": _digest([envs.action_masks(), *envs.conditional_masks().values()]),
            "info": _digest(info),
            **{n: _digest(state["tensors"][n]) for n in sorted(state["tensors"])},
            "rollbacks": str(num_rollbacks),
        }
        actions = envs.sample_valid_actions(rng)
        if step % 7 == 3:  # Independent samples per head, which gives some illegal actions.
            for h, head in enumerate(envs.heads):
                actions[::3, h] = rng.integers(len(head.options), size=len(actions[::3]))
        if step % 50 == 20:
            envs.fork([0, 1], [num_envs - 1, num_envs - 2])
        if step % 50 == 40:
            envs.set_state(state)
        observation, rewards, *_, info = envs.step(actions)
        if "final_info" in info:
            num_rollbacks += int(info["final_info"]["rolled_back"].sum())
    envs.close()


def _register(*, blueprint: bool) -> None:
    """Register a blueprint or a host whose layers have no kernels, so that PyTorch runs them."""
    from esper_env import register_blueprint, register_host
    from esper_env.population.layers import Conv, Norm, Relu

    class OtherConv(Conv):
        pass

    if blueprint:
        register_blueprint(
            "without_kernels", lambda c: [Norm(c), Relu(), OtherConv(c, c, 3, bias=True, zero=True)]
        )
    else:
        register_host("subclassed", (4, 8), lambda a, b: [OtherConv(a, b, 3), Norm(b), Relu()])


def _digest(value: Any) -> str:
    """Return a hash of nested arrays and numbers with their names, dtypes and shapes."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, dict):
            for name in sorted(part):
                digest.update(name.encode())
                add(part[name])
        elif isinstance(part, (list, tuple)) or getattr(part, "dtype", "") == "object":
            for item in part:
                add(item)
        elif part is not None:
            array = np.asarray(part)
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(array.tobytes())

    add(value)
    return digest.hexdigest()[:16]


def _work(threads: int) -> None:
    """Answer requests from standard input, one line of JSON each, until it ends."""
    import torch

    torch.set_num_threads(threads)
    timed: dict[tuple[int, str], Any] = {}
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Other output goes to stderr, so that it cannot mix with answers.
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any = None
        if request["what"] == "record":
            answer = list(record(request["settings"], request["num_envs"], request["steps"]))
        elif request["what"] == "time":
            key = request["num_envs"], request["mode"]
            if key not in timed:
                timed[key] = _timed_environment(*key)
            envs, wait = timed[key]
            began = time.perf_counter(), time.process_time()
            for _ in range(request["steps"]):
                envs.step(wait)
            answer = [time.perf_counter() - began[0], time.process_time() - began[1]]
        elif request["what"] == "train":
            answer = _train(request["seed"], request["timesteps"])
        print(json.dumps(answer), file=out, flush=True)


def _timed_environment(num_envs: int, mode: str) -> tuple[Any, Any]:
    """Return an environment with slots in the state of a mode, and actions that wait."""
    from benchmarks.states import grow, make_envs, settings_of

    envs = make_envs("Esper-Digits-v0", num_envs, **settings_of(mode))
    grow(envs, mode, 0)
    wait = np.zeros((num_envs, len(envs.heads)), dtype=np.int64)
    for _ in range(20):
        envs.step(wait)
    return envs, wait


def _train(seed: int, timesteps: int | None) -> dict[str, float]:
    """Train an agent; return env steps, time [seconds], and the agent's share of it."""
    from esper_agent import ppo_lstm

    length = {} if timesteps is None else {"total_timesteps": timesteps}
    with tempfile.TemporaryDirectory() as folder:
        settings = {"seed": seed, "run_dir": Path(folder, "run"), "eval_episodes": 0}
        args = ppo_lstm.Args(**settings, **length)
        began = time.perf_counter()
        run = ppo_lstm.train(args)
        seconds = time.perf_counter() - began
        *_, last = (run / "metrics.jsonl").read_text().splitlines()
    share = json.loads(last)["time/policy_share"]
    return {"env_steps": args.total_timesteps, "seconds": seconds, "policy_share": share}


# ---------------------------------------------------------------------------------- the comparison


class Worker:
    """Process that runs one checkout.

    Args:
        checkout: Root of the checkout.
        cache: Compilation cache of the checkout.
        threads: Torch threads.
    """

    def __init__(self, checkout: Path, cache: Path, threads: int) -> None:
        script = Path(__file__).resolve()
        environment = {**os.environ, "PYTHONPATH": str(checkout), "NUMBA_CACHE_DIR": str(cache)}
        code = (
            "import importlib.util as u, pathlib, sys\n"
            "def load(path):\n"
            "    s = u.spec_from_file_location(path.stem, path)\n"
            "    m = u.module_from_spec(s); sys.modules[s.name] = m; s.loader.exec_module(m)\n"
            "    return m\n"
            f"script = pathlib.Path({str(script)!r})\n"
            f"load(script.with_name('processes.py')).end_with_parent({os.getpid()})\n"
            "m = load(script)\n"
            "import esper_env\n"
            f"assert esper_env.__file__.startswith({str(checkout)!r}), esper_env.__file__\n"
            f"m._work({threads})\n"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=checkout,
        )
        """The process, which ends with this one."""

    def send(self, **request: Any) -> None:
        """Send a request to the process."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def receive(self) -> Any:
        """Wait for the answer to a request."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with code {self.process.wait()}; see above")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def make_workers(args: Args, cache: Path) -> tuple[Worker, Worker]:
    """Start a process for the old and one for the new checkout."""
    old = Worker(args.old.resolve(), cache / "old", args.threads)
    return old, Worker(args.new.resolve(), cache / "new", args.threads)


def compare(args: Args, cache: Path) -> dict[str, Any]:
    """Compare all scenarios and print a line for each."""
    results = {}
    for name in args.scenarios:
        request = {"settings": SCENARIOS[name], "num_envs": args.num_envs, "steps": args.steps}
        workers = make_workers(args, cache)  # New processes, because registrations last.
        for worker in workers:
            worker.send(what="record", **request)
        before, after = (worker.receive() for worker in workers)
        for worker in workers:
            worker.close()
        difference = _first_difference(before, after)
        rollbacks = int(before[-1]["rollbacks"])
        if "rollbacks" in name and not rollbacks:
            raise RuntimeError(f"{name}: expected rollbacks, got none; the scenario shows nothing")
        results[name] = {"difference": difference, "rollbacks": rollbacks}
        print(f"{name}: {difference or 'equal'} ({rollbacks} rollbacks)", flush=True)
    return results


def _first_difference(before: list[dict[str, str]], after: list[dict[str, str]]) -> str | None:
    for step, (a, b) in enumerate(zip(before, after, strict=True)):
        differing = sorted(n for n in a.keys() | b.keys() if a.get(n) != b.get(n))
        if differing:
            return f"step {step}: {', '.join(differing)} differ"
    return None


def measure_speed(args: Args, cache: Path) -> list[dict[str, Any]]:
    """Time both checkouts in turn, print a line per case, and return the rows of the result."""
    rows = []
    old, new = make_workers(args, cache)
    for num_envs, mode in SPEED:
        request = {"what": "time", "num_envs": num_envs, "mode": mode}
        warm_up = [_timed(worker, 20, request)[0] for worker in (old, new)]
        steps = max(5, int(20 * 0.4 / min(warm_up)))
        # (rounds, old and new, wall and processor time)
        times = np.empty((args.rounds, 2, 2))
        for i in range(args.rounds):
            for side in (0, 1) if i % 2 else (1, 0):
                times[i, side] = _timed((old, new)[side], steps, request)
        rate = num_envs * steps / np.median(times[:, :, 0], axis=0)
        row = {"num_envs": num_envs, "mode": mode}
        row |= {"old_env_steps_per_second": rate[0], "new_env_steps_per_second": rate[1]}
        for k, name in enumerate(("wall", "processor")):
            ratios = times[:, 0, k] / times[:, 1, k]
            row[f"ratio_{name}"] = [float(f(ratios)) for f in (np.median, np.min, np.max)]
        rows.append(row)
        print(
            f"{num_envs} members, {mode}: {rate[1]:.0f} env steps/s, before {rate[0]:.0f}; ratio "
            "of wall time {:.3f} ({:.3f} .. {:.3f}), ".format(*row["ratio_wall"])
            + "of processor time {:.3f} ({:.3f} .. {:.3f})".format(*row["ratio_processor"]),
            flush=True,
        )
    for worker in (old, new):
        worker.close()
    return rows


def _timed(worker: Worker, steps: int, request: dict[str, Any]) -> list[float]:
    worker.send(steps=steps, **request)
    seconds: list[float] = worker.receive()
    return seconds


def measure_first_step(args: Args, repeats: int = 3) -> dict[str, list[float]]:
    """Return times of import, reset and two steps with an empty cache, in turn [seconds]."""
    times: dict[str, list[float]] = {"old": [], "new": []}
    for _ in range(repeats):
        for side, checkout in (("old", args.old), ("new", args.new)):
            with tempfile.TemporaryDirectory() as cache:
                began = time.perf_counter()
                worker = Worker(checkout.resolve(), Path(cache), args.threads)
                worker.send(
                    what="record",
                    settings=SCENARIOS["leave-one-out"],
                    num_envs=args.num_envs,
                    steps=2,
                )
                worker.receive()
                times[side].append(time.perf_counter() - began)
                worker.close()
    print(f"first step: {np.median(times['new']):.1f} s, before {np.median(times['old']):.1f} s")
    return times


def measure_trainings(args: Args, cache: Path) -> dict[str, Any]:
    """Time trainings of both checkouts in turn, and print a line per pair."""
    workers = dict(zip(("old", "new"), make_workers(args, cache), strict=True))
    rows: dict[str, list[dict[str, float]]] = {side: [] for side in workers}
    for seed in range(args.trainings + 1):
        for side, worker in workers.items():
            # The first, short pair loads or compiles the kernels.
            worker.send(what="train", seed=seed, timesteps=args.timesteps if seed else 1920)
            row = worker.receive()
            if seed:
                rows[side].append(row)
        if seed:
            before, after = (rows[side][-1] for side in ("old", "new"))
            print(
                f"training {seed}: {after['seconds']:.0f} s, before {before['seconds']:.0f} s; "
                f"ratio {after['seconds'] / before['seconds']:.3f}; "
                f"share of the agent {after['policy_share']:.3f}, "
                f"before {before['policy_share']:.3f}",
                flush=True,
            )
    for worker in workers.values():
        worker.close()
    return rows


def main(args: Args) -> int:
    """Compare, print and save. Return 1 if any scenario differs."""
    unknown = [name for name in args.scenarios if name not in SCENARIOS]
    if unknown:
        raise ValueError(f"scenarios: expected names among {sorted(SCENARIOS)}, got {unknown}")
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.scenarios:
            result["scenarios"] = compare(args, Path(folder))
        if args.speed:
            result["speed"] = measure_speed(args, Path(folder))
        if args.trainings:
            result["trainings"] = measure_trainings(args, Path(folder))
    if args.first_step:
        result["first_step_seconds"] = measure_first_step(args)
    from benchmarks import write_result

    write_result(args.out, args, **result)
    differing = [name for name, row in result.get("scenarios", {}).items() if row["difference"]]
    if args.scenarios:
        print(f"different: {', '.join(differing)}" if differing else "equal")
    return 1 if differing else 0


if __name__ == "__main__":
    import tyro

    raise SystemExit(main(tyro.cli(Args)))
