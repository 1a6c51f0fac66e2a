"""Speed of the vector environment compared with Gymnasium's vector environments of single ones.

`throughput --peers` runs this comparison. All sides use the same seeds and actions, and must end
with bitwise equal observations. Rates are env steps per second, summed over all members.

- "vector": Esper's vector environment.
- "async", "sync": Gymnasium's `AsyncVectorEnv` and `SyncVectorEnv` with as many members.
- "async of 2": `AsyncVectorEnv` with the first two members only.
- "2 x vector": two processes, each with a vector environment of half the members.

`AsyncVectorEnv` starts one process per member. All processes share the cores of the machine, and
each uses one thread, which the environment sets in a forked process.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

from benchmarks import calls_per_round, seconds_per_call
from benchmarks.states import grow, make_envs, settings_of

OURS = "vector"
FloatRows = npt.NDArray[np.float32]


def make_single(env_id: str, settings: dict[str, Any]) -> gym.Env[Any, Any]:
    """Make a single environment without Gymnasium's checks, which take time."""
    return gym.make(env_id, disable_env_checker=True, **settings)


def _serve(pipe: Connection, env_id: str, num_envs: int, settings: dict[str, Any]) -> None:
    """Run a vector environment in this process: reset for a seed, step for an array of actions.

    The process ends when the other side of the pipe is closed, also because its owner was killed.
    """
    torch.set_num_threads(1)
    envs = make_envs(env_id, num_envs, **settings)
    with contextlib.suppress(EOFError):
        while True:
            order = pipe.recv()
            pipe.send(envs.reset(seed=order) if isinstance(order, int) else envs.step(order))


class TwoProcesses:
    """Two processes, each with a vector environment of half the members."""

    def __init__(self, env_id: str, num_envs: int, settings: dict[str, Any]) -> None:
        self.num_envs, self.half = num_envs, num_envs // 2
        self.pipes, self.processes = [], []
        # Forked processes would hold each other's pipes, and never see the end of one.
        context = multiprocessing.get_context("spawn")
        for count in (self.half, num_envs - self.half):
            own, other = context.Pipe()
            arguments = (other, env_id, count, settings)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            other.close()
            self.pipes.append(own)
            self.processes.append(process)

    def reset(self, *, seed: int) -> tuple[FloatRows, None]:
        """Reset both halves with the seeds that one vector environment would use."""
        return self._order(seed, seed + self.half), None

    def step(self, actions: npt.NDArray[np.int64]) -> tuple[FloatRows, None]:
        """Step both halves in parallel."""
        return self._order(actions[: self.half], actions[self.half :]), None

    def close(self) -> None:
        """End both processes."""
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.close()
            process.join()

    def _order(self, *orders: Any) -> FloatRows:
        for pipe, order in zip(self.pipes, orders, strict=True):
            pipe.send(order)
        return np.concatenate([pipe.recv()[0] for pipe in self.pipes])


def measure_peers(
    env_id: str, num_envs: int, mode: str, *, rounds: int, seed: int, batch_size: int | None = None
) -> dict[str, Any]:
    """Step all sides in turn, the same number of steps per round.

    Args:
        env_id: Environment id.
        num_envs: Members, at least 2.
        mode: State of the slots; see `states`.
        rounds: Timed rounds.
        seed: Seed of the first member; the following members have the following seeds.
        batch_size: Batch size, None for the environment's default.

    Returns:
        Env steps per second of each side, and the speed of Esper's environment relative to it.
    """
    settings = settings_of(mode, batch_size)
    single = functools.partial(make_single, env_id, settings)
    ours = make_envs(env_id, num_envs, **settings)
    # The first step compiles, so it runs before the other processes start.
    taken = grow(ours, mode, seed)
    sides: dict[str, Any] = {
        OURS: ours,
        "async": AsyncVectorEnv([single] * num_envs),
        "async of 2": AsyncVectorEnv([single] * 2),
        "sync": SyncVectorEnv([single] * num_envs),
        "2 x vector": TwoProcesses(env_id, num_envs, settings),
    }
    wait = np.zeros((num_envs, len(ours.heads)), dtype=np.int64)
    seen: dict[str, FloatRows] = {}

    def step(name: str) -> None:
        seen[name] = sides[name].step(wait[: sides[name].num_envs])[0]

    try:
        for side in list(sides.values())[1:]:
            side.reset(seed=seed)
            for actions in taken:
                side.step(actions[: side.num_envs])
        calls = [functools.partial(step, name) for name in sides]
        repeats = calls_per_round(calls[0])
        for call in calls[1:]:
            seconds_per_call(call, 3)  # as many as ours has had
        times = np.array([[seconds_per_call(c, repeats) for c in calls] for _ in range(rounds)])
    finally:
        for side in sides.values():
            side.close()
    for name, observations in seen.items():
        np.testing.assert_array_equal(observations, seen[OURS][: len(observations)], err_msg=name)
    rows: dict[str, Any] = {}
    for i, (name, side) in enumerate(sides.items()):
        ratios = times[:, i] / times[:, 0] * num_envs / side.num_envs
        rows[name] = {
            "env_steps_per_second": float(side.num_envs / np.median(times[:, i])),
            "ratio_median": float(np.median(ratios)),
            "ratio_min": float(ratios.min()),
            "ratio_max": float(ratios.max()),
            "step_milliseconds": (1e3 * times[:, i]).tolist(),
        }
    return {"num_envs": num_envs, "mode": mode, "steps_per_round": repeats, "sides": rows}
