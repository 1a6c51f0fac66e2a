"""Time of the agent (inference and updates) compared with the time of the environment.

`esper_agent.ppo_lstm` runs with its default arguments. The agent starts untrained, so it germinates
seeds at random. Three versions of the update are timed in turn on the same rollout, each with a
copy of the agent: the default (one thread, one LSTM call for whole sequences), the default with all
threads, and an LSTM call for every step as in CleanRL's `ppo_atari_lstm.py`. Then iterations at all
levels of telemetry are timed in turn, and decisions and updates with and without `torch.compile`.

    python benchmarks/agent.py --out benchmarks/results/agent.json && python docs/generate.py

`--quick` tests the script with small sizes; its figures mean nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from benchmarks import write_result
from esper_agent import ppo_lstm
from esper_agent.envs import make_envs
from esper_agent.telemetry.metrics import LEVELS
from esper_env import EnvConfig


@dataclass(frozen=True, kw_only=True)
class Args:
    """Measure inference and update of the agent."""

    env_id: str = "Esper-Digits-v0"
    """Environment id."""
    num_envs: tuple[int, ...] = (16, 32, 64)
    """Numbers of members to measure."""
    rounds: int = 7
    """Timed rollouts, each with one update of every version, after one round of warm-up."""
    threads: int = 2
    """Torch threads."""
    seed: int = 0
    """Random seed of the agent and of the environment."""
    compile: bool = True
    """Whether to measure `torch.compile`, which needs a C++ compiler."""
    quick: bool = False
    """Whether to use tiny networks and short rollouts, as a test of the script."""
    out: Path | None = None
    """JSON file for the result."""


def training_arguments(args: Args, num_envs: int) -> ppo_lstm.Args:
    """Return the agent's arguments: the defaults, or small sizes if `args.quick`."""
    settings: dict[str, Any] = {}
    if args.quick:
        config = EnvConfig(batches_per_step=1, batch_size=8, episode_steps=6, horizon="terminal")
        settings = {"env": config, "num_steps": 6, "hidden_size": 16}
    default = ppo_lstm.Args(env_id=args.env_id, seed=args.seed, **settings)
    # Minibatches of four sub-environments, as by default.
    settings |= {"num_envs": num_envs, "num_minibatches": num_envs // 4}
    settings |= {"total_timesteps": num_envs * default.num_steps}
    return ppo_lstm.Args(env_id=args.env_id, seed=args.seed, **settings)


def step_by_step(lstm: nn.LSTM, x: Tensor, state: ppo_lstm.LstmState, dones: Tensor) -> Tensor:
    """Replace `ppo_lstm.run_lstm` by one LSTM call per step.

    Source: `Agent.get_states` of CleanRL's `ppo_atari_lstm.py`.
    """
    outputs = []
    for features, done in zip(x, dones, strict=True):
        keep = (1.0 - done.float())[None, :, None]
        output, state = lstm(features[None], (keep * state[0], keep * state[1]))
        outputs.append(output)
    return torch.cat(outputs)


def seconds_of(update: Callable[..., Any], state: ppo_lstm.TrainState, *work: Any) -> float:
    """Return the time of one update [seconds]."""
    began = time.perf_counter()
    rollout, args = work
    watch = state.telemetry.watch_update(state.agent, args)
    update(state, rollout, args, watch)
    return time.perf_counter() - began


def measure(args: Args, num_envs: int) -> dict[str, Any]:
    """Time rollouts, and the versions of the update in turn."""
    training = dataclasses.replace(training_arguments(args, num_envs), telemetry="off")
    envs = make_envs(args.env_id, num_envs, "cpu", training.env)
    own = ppo_lstm.make_train_state(training, envs)
    # The agent with the default update acts; all versions train on its rollouts.
    threaded, looped = copy.deepcopy(own), copy.deepcopy(own)
    rows = []
    for _ in range(args.rounds + 1):
        began, env_before = time.perf_counter(), own.env_seconds
        rollout = ppo_lstm.collect_rollout(own, envs, training)
        total, in_env = time.perf_counter() - began, own.env_seconds - env_before
        threaded.return_scale = looped.return_scale = own.return_scale
        work = rollout, training
        row = [in_env, total - in_env, seconds_of(ppo_lstm.update, own, *work)]
        # Without its decorator, the update uses all threads.
        row.append(seconds_of(ppo_lstm.update.__wrapped__, threaded, *work))  # type: ignore[attr-defined]
        with mock.patch.object(ppo_lstm, "run_lstm", step_by_step):
            row.append(seconds_of(ppo_lstm.update, looped, *work))
        rows.append(row)
    envs.close()
    # Without the first round, which is warm-up. (rounds, 5) -> 5 arrays (rounds,)
    env, inference, update, all_threads, loop = np.array(rows[1:]).T
    steps = training.num_steps
    return {
        "num_envs": num_envs,
        "env_step_milliseconds": _spread(1e3 * env / steps),
        "inference_milliseconds": _spread(1e3 * inference / steps),
        "update_milliseconds": _spread(1e3 * update),
        "inference_share": _spread(inference / (env + inference + update)),
        "update_share": _spread(update / (env + inference + update)),
        "all_threads_ratio": _spread(all_threads / update),
        "step_by_step_ratio": _spread(loop / update),
    }


def measure_telemetry(args: Args, num_envs: int) -> dict[str, Any]:
    """Time iterations at each level of telemetry in turn; all do the same training.

    Scores of never-grow are played before: once per instance and run, which is also timed.
    """
    runs, reference = [], 0.0
    for level in LEVELS:
        training = dataclasses.replace(training_arguments(args, num_envs), telemetry=level)
        envs = make_envs(args.env_id, num_envs, "cpu", training.env)
        state = ppo_lstm.make_train_state(training, envs)
        state.telemetry.debug_updates = 0  # An alert would lift the level.
        began = time.perf_counter()
        if level != "off":
            every = np.arange(envs.num_instances)
            state.telemetry.never_grow(every, np.zeros_like(every))
        reference = time.perf_counter() - began
        runs.append((state, envs, training))
    rows = []
    # The differences are small, so they need more rounds.
    for _ in range(3 * args.rounds + 1):
        row = []
        for state, envs, training in runs:
            began, env_before = time.perf_counter(), state.env_seconds
            ppo_lstm.run_iteration(state, envs, training)
            total = time.perf_counter() - began
            row.append((total, total - (state.env_seconds - env_before)))
        rows.append(row)
    # Without warm-up. (rounds, levels, [all, outside the environment])
    seconds = np.array(rows[1:])
    # The environment does the same work at each level, so its noise is left out.
    extra = (seconds[..., 1] - seconds[:, :1, 1]) / seconds[:, :1, 0]
    result: dict[str, Any] = {
        f"{level}_share": _spread(extra[:, k]) for k, level in enumerate(LEVELS) if k
    }
    return result | {"never_grow_seconds": reference, "num_envs": num_envs}


def measure_compiled(args: Args, num_envs: int) -> dict[str, Any]:
    """Time decisions and updates in turn with and without `torch.compile`.

    All networks of an update are in `evaluate_rollout`, those of a decision in `get_next_state` and
    `get_action`. The most likely action is taken, as a generator cannot be compiled.
    """
    training = dataclasses.replace(training_arguments(args, num_envs), telemetry="off")
    envs = make_envs(args.env_id, num_envs, "cpu", training.env)
    state = ppo_lstm.make_train_state(training, envs)
    rollout = ppo_lstm.collect_rollout(state, envs, training)
    envs.close()
    # (envs, heads, width) -> (envs, ops, slots, heads, width): the same for every op and slot
    counts = [len(options) for options in state.agent.heads.values()][:2]
    masks = rollout.masks[0][:, None, None].expand(-1, *counts, -1, -1)
    agents = {"plain": state.agent, "compiled": copy.deepcopy(state.agent)}

    @ppo_lstm.one_thread()
    @torch.inference_mode()
    def decide(next_state: Any, action: Any) -> None:
        hidden, slots, _ = next_state(rollout.obs[0], rollout.lstm_state, rollout.dones[0])
        action(hidden, slots, masks, None)

    decisions: dict[str, Any] = {
        name: (agent.get_next_state, agent.get_action) for name, agent in agents.items()
    }
    decisions["compiled"] = [torch.compile(function) for function in decisions["compiled"]]
    evaluate = {"plain": ppo_lstm.evaluate_rollout,
                "compiled": torch.compile(ppo_lstm.evaluate_rollout)}  # fmt: skip
    states = {name: copy.deepcopy(state) for name in agents}
    rows: dict[str, list[list[float]]] = {name: [] for name in agents}
    for _ in range(args.rounds + 1):
        for name in agents:
            began = time.perf_counter()
            for _ in range(training.num_steps):
                decide(*decisions[name])
            row = [time.perf_counter() - began]
            with mock.patch.object(ppo_lstm, "evaluate_rollout", evaluate[name]):
                row.append(seconds_of(ppo_lstm.update, states[name], rollout, training))
            rows[name].append(row)
    seconds = {name: np.array(rows[name]) for name in agents}
    ratios = seconds["compiled"][1:] / seconds["plain"][1:]
    return {
        "num_envs": num_envs,
        "compile_seconds": float((seconds["compiled"][0] - seconds["compiled"][1:].mean(0)).sum()),
        "decision_ratio": _spread(ratios[:, 0]),
        "update_ratio": _spread(ratios[:, 1]),
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    """Return median, minimum and maximum over the rounds."""
    return {
        "median": float(np.median(values)),
        "min": float(values.min()),
        "max": float(values.max()),
    }


def main() -> None:
    """Measure every number of members, print a line per figure, and save."""
    args = tyro.cli(Args)
    torch.set_num_threads(args.threads)
    rows = []
    for num_envs in args.num_envs:
        row = measure(args, num_envs)
        rows.append(row)
        print(f"{num_envs} members")
        for name, value in row.items():
            if isinstance(value, dict):
                spread = f"{value['median']:9.3f} ({value['min']:.3f} .. {value['max']:.3f})"
                print(f"  {name:24s} {spread}", flush=True)
    telemetry = measure_telemetry(args, args.num_envs[0])
    print(f"telemetry: {telemetry}")
    compiled = measure_compiled(args, args.num_envs[0]) if args.compile else None
    print(f"torch.compile: {compiled}")
    write_result(args.out, args, rows=rows, telemetry=telemetry, compiled=compiled)


if __name__ == "__main__":
    main()
