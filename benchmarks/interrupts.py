"""Interrupt an environment at random moments, and use it in two threads at once.

Every attempt calls `step`, `reset`, `set_state` or `fork` and raises KeyboardInterrupt in it:
before a random line of `esper_env`, or by a timer. Afterwards either the call has happened
completely, or every method but `reset` and `set_state` raises ResetNeeded. In both cases `reset`
with a seed and `set_state` must give bitwise the states that they give in a new environment.

    python benchmarks/interrupts.py --out benchmarks/results/interrupts.json
"""

from __future__ import annotations

import collections
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import gymnasium as gym
import numpy as np
import tyro

from benchmarks import print_problems, write_result
from esper_env import EsperVectorEnv
from esper_env.testing.compare import difference

PACKAGE = str(Path(__file__).resolve().parent.parent / "esper_env") + "/"
SETTINGS: dict[str, Any] = {
    "instances": "train",
    "batches_per_step": 1,
    "batch_size": 8,
    "episode_steps": 8,
    "autoreset_mode": "SameStep",
}
NUM_ENVS, SEED = 4, 7
CALLS = ("step", "step", "step", "reset", "set_state", "fork")
"""Methods to interrupt, the most frequent one several times."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Interrupt calls at random moments, and use one environment in two threads."""

    interrupts: int = 1000
    """Steps to interrupt; half as many other calls are interrupted besides."""
    threads: int = 100
    """Attempts with two threads."""
    seed: int = 0
    """Random seed of the calls, the moments and the actions."""
    out: Path | None = None
    """JSON file for the result."""


def make_envs() -> EsperVectorEnv:
    """Make a small environment of mixed instances."""
    envs = gym.make_vec("Esper-Digits-v0", num_envs=NUM_ENVS, **SETTINGS).unwrapped
    if not isinstance(envs, EsperVectorEnv):
        raise TypeError(f"expected an EsperVectorEnv, got {envs!r}")
    return envs


@contextmanager
def before_line(number: float) -> Iterator[list[int]]:
    """Count the executed lines of the package, and raise KeyboardInterrupt before one of them."""
    lines = [0]

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        lines[0] += event == "line"
        if lines[0] >= number:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(before)


@contextmanager
def after_seconds(seconds: float) -> Iterator[None]:
    """Raise KeyboardInterrupt in the main thread after a time."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def is_equal(a: Any, b: Any) -> bool:
    """Return whether nested values are bitwise equal."""
    return difference(a, b, "") is None


class Interrupter:
    """Interrupts calls of one environment, and compares it with another one.

    Args:
        seed: Random seed of the calls, the moments and the actions.
    """

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.envs, self.twin = make_envs(), make_envs()
        self.fresh = self.twin.reset(seed=SEED), self.twin.get_state()
        for envs in (self.envs, self.twin):
            envs.reset(seed=SEED)
        self.counts: collections.Counter[str] = collections.Counter()
        """Outcomes of all attempts."""
        self.interrupted = 0
        """Steps that were interrupted."""

    def attempt(self) -> list[str]:
        """Interrupt one call; return what went wrong."""
        rng, envs, twin = self.rng, self.envs, self.twin
        before = envs.get_state()
        name = str(rng.choice(CALLS))
        actions = envs.sample_valid_actions(rng)
        seed, pair = int(rng.integers(100)), rng.permutation(NUM_ENVS)[:2]
        calls: dict[str, Callable[[EsperVectorEnv], Any]] = {
            "step": lambda e: e.step(actions),
            "reset": lambda e: e.reset(seed=seed),
            "set_state": lambda e: e.set_state(self.fresh[1]),
            "fork": lambda e: e.fork(pair[:1], pair[1:]),
        }
        twin.set_state(before)
        interrupt: AbstractContextManager[Any]
        if rng.integers(2):
            with before_line(np.inf) as lines:
                calls[name](twin)
            interrupt = before_line(rng.integers(1, lines[0] + 1))
        else:
            begin = time.perf_counter()
            calls[name](twin)
            # A timer of 0 seconds never ends.
            interrupt = after_seconds(1e-6 + rng.random() * (time.perf_counter() - begin))
        after = twin.get_state()
        problems, is_interrupted = [], False
        try:
            with interrupt:
                calls[name](envs)
        except KeyboardInterrupt:
            is_interrupted = True
        except Exception as error:  # An internal error is the finding.
            problems.append(f"{name}: internal error {error!r}")
        outcome = "not interrupted"
        if is_interrupted:
            outcome = "as before or complete"
            try:
                state = envs.get_state()
            except gym.error.ResetNeeded:
                outcome = "needs a reset"
                problems += self._unusable(name, before)
            else:
                if not is_equal(state, before) and not is_equal(state, after):
                    problems.append(f"{name}: half a call without a mark")
        elif not problems and not is_equal(envs.get_state(), after):
            problems.append(f"{name}: another result")
        self.counts[f"{name}, {outcome}"] += 1
        self.interrupted += is_interrupted and name == "step"
        problems += self._recovers(name, before, after, actions)
        return problems

    def _unusable(self, name: str, state: dict[str, Any]) -> list[str]:
        """Return the methods that do not raise ResetNeeded with the reason."""
        envs, rng = self.envs, np.random.default_rng(0)
        mask = np.arange(NUM_ENVS) > 0
        calls: dict[str, Callable[[], Any]] = {
            "step": lambda: envs.step(np.zeros((NUM_ENVS, 8), dtype=np.int64)),
            "fork": lambda: envs.fork([0], [1]),
            "get_state": envs.get_state,
            "action_masks": envs.action_masks,
            "conditional_masks": envs.conditional_masks,
            "final_conditional_masks": envs.final_conditional_masks,
            "sample_valid_actions": lambda: envs.sample_valid_actions(rng),
            "debug_state": envs.debug_state,
            "a reset of some members": lambda: envs.reset(options={"reset_mask": mask}),
        }
        problems = []
        for other, call in calls.items():
            try:
                call()
            except gym.error.ResetNeeded as error:
                if f"{name}() was interrupted" not in str(error):
                    problems.append(f"{other} after {name}: unclear reason {error}")
            else:
                problems.append(f"{other} after {name}: no error")
        try:
            envs.set_state({**state, "is_done": None})
            problems.append("an impossible state was accepted")
        except ValueError:
            pass
        return problems

    def _recovers(
        self, name: str, before: dict[str, Any], after: dict[str, Any], actions: Any
    ) -> list[str]:
        """Reset or restore the environment, and compare it with the other one."""
        problems, envs = [], self.envs
        if self.rng.integers(2):
            result = envs.reset(seed=SEED), envs.get_state()
            if not is_equal(result, self.fresh):
                problems.append(f"reset after {name} differs from that of a new environment")
        envs.set_state(before)
        if not is_equal(envs.get_state(), before):
            problems.append(f"set_state after {name} differs from the state")
        envs.step(actions)
        self.twin.set_state(before)
        self.twin.step(actions)
        if not is_equal(envs.get_state(), self.twin.get_state()):
            problems.append(f"a step after {name} and set_state differs")
        return problems


def use_in_two_threads(seed: int) -> tuple[int, list[str]]:
    """Step one environment in two threads at once.

    Returns:
        Number of calls that were rejected, and what went wrong.
    """
    envs, twin = make_envs(), make_envs()
    envs.reset(seed=seed)
    twin.reset(seed=seed)
    actions, start = np.zeros((NUM_ENVS, 8), dtype=np.int64), threading.Barrier(2)
    outcomes: list[str] = []

    def use() -> None:
        start.wait()
        for _ in range(4):
            try:
                envs.step(actions)
                outcomes.append("step")
            except RuntimeError as error:
                outcomes.append(str(error))
            except BaseException as error:  # Everything else is the finding.
                outcomes.append(f"other: {error!r}")

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(outcomes.count("step")):
        twin.step(actions)
    problems = [text for text in outcomes if text.startswith("other")]
    if not is_equal(envs.get_state(), twin.get_state()):
        problems.append("the state is not that of the steps that were not rejected")
    return sum("another thread is using" in text for text in outcomes), problems


def main(args: Args) -> None:
    """Make all attempts, print the counts and write them."""
    interrupter, problems = Interrupter(args.seed), list[str]()
    while interrupter.interrupted < args.interrupts:
        problems += interrupter.attempt()
    for name, count in sorted(interrupter.counts.items()):
        print(f"{name}: {count}")
    rejected = []
    for attempt in range(args.threads):
        count, found = use_in_two_threads(attempt)
        rejected.append(count)
        problems += found
    print(f"two threads: {sum(rejected)} of {8 * args.threads} calls rejected")
    print_problems(problems)
    write_result(
        args.out,
        args,
        outcomes=dict(sorted(interrupter.counts.items())),
        thread_attempts=args.threads,
        attempts_with_rejected_calls=sum(count > 0 for count in rejected),
        rejected_calls=sum(rejected),
        problems=problems,
    )
    if problems:
        sys.exit(1)


if __name__ == "__main__":
    main(tyro.cli(Args))
