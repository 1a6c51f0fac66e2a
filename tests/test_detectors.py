"""Every detector: a real failure of a small training raises its alert, and recovery clears it.

Each failure goes through the real rollout and the real update. The learning rate is tiny unless the
failure is a learning rate, so nothing else changes; four sub-environments have one batch of 8
images per env step.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from docs.telemetry import FAILURES
from esper_agent import ppo_lstm
from esper_agent.envs import make_envs
from esper_agent.ppo_lstm import Args, TrainState, make_train_state, run_iteration
from esper_agent.telemetry import recorder
from esper_agent.telemetry.detectors import DETECTORS, Thresholds
from esper_agent.telemetry.events import AlertCleared, AlertRaised
from esper_env import EsperVectorEnv
from tests.builders import ID, tiny_config

Change = Callable[["Training"], None]


@dataclass
class Training:
    """A training that can be broken and mended between two iterations."""

    args: Args
    envs: EsperVectorEnv
    state: TrainState
    patch: pytest.MonkeyPatch
    saved: dict[str, Any] = field(default_factory=dict)

    def iterate(self) -> list[AlertRaised | AlertCleared]:
        """Run an iteration; return what happened to alerts."""
        run_iteration(self.state, self.envs, self.args)
        assert self.state.telemetry.problems == []
        events = self.state.telemetry.events
        return [event for event in events if isinstance(event, AlertRaised | AlertCleared)]

    def until(self, kind: type, name: str, most: int) -> tuple[Any, int]:
        """Iterate until an alert is raised or cleared; return the event and the iterations."""
        for count in range(1, most + 1):
            for event in self.iterate():
                if isinstance(event, kind) and event.name == name:
                    return event, count
        raise AssertionError(f"{name}: no {kind.__name__} in {most} updates")


def make_training(changes: dict[str, Any], patch: pytest.MonkeyPatch) -> Training:
    """Return a training with the arguments of a case."""
    changes = dict(changes)
    config = tiny_config(gamma=0.99, **changes.pop("env", {}))
    settings = {
        "env": config, "gamma": 0.99, "num_envs": 4, "num_steps": config.episode_steps,
        "total_timesteps": 4 * config.episode_steps * 100, "group_size": 1, "num_minibatches": 2,
        "update_epochs": 2, "hidden_size": 16, "learning_rate": 1e-9, "eval_episodes": 0,
    }  # fmt: skip
    progress = changes.pop("progress", 0.0)
    thresholds = Thresholds(**changes.pop("thresholds", {}))
    args = Args(**(settings | changes))
    envs = make_envs(ID, 4, "cpu", config)
    state = make_train_state(args, envs)
    state.telemetry.alerts.limits = thresholds
    state.iteration = round(progress * args.num_iterations)
    return Training(args, envs, state, patch)


def set_rate(training: Training, rate: float) -> None:
    training.args = dataclasses.replace(training.args, learning_rate=rate, anneal_lr=False)
    training.state.optimizer.param_groups[0]["lr"] = rate


def save(training: Training) -> None:
    training.saved["agent"] = copy.deepcopy(training.state.agent.state_dict())


def load(training: Training) -> None:
    training.state.agent.load_state_dict(training.saved["agent"])


def set_large_rate(training: Training) -> None:
    save(training)
    set_rate(training, 1.0)


def set_small_rate(training: Training) -> None:
    load(training)
    set_rate(training, 1e-9)


def break_weights(*names: str, factor: float = 1.0, offset: float = 0.0) -> Change:
    """Change weights; the returned function remembers the old ones."""

    def change(training: Training) -> None:
        save(training)
        weights = dict(training.state.agent.named_parameters())
        with torch.no_grad():
            for name in names:
                weights[name].mul_(factor).add_(offset)

    return change


def prefer(**ops: float) -> Change:
    """Make the agent prefer some ops."""

    def change(training: Training) -> None:
        save(training)
        options = list(training.state.agent.heads["op"])
        with torch.no_grad():
            for op, logit in ops.items():
                training.state.agent.op_head.bias[options.index(op)] = logit

    return change


def scale_rewards(factor: float) -> Change:
    """Multiply what the environment pays, without the scale that would divide by it."""

    def change(training: Training) -> None:
        step = training.envs.step

        def scaled(actions: Any) -> Any:
            obs, rewards, *rest = step(actions)
            return obs, factor * rewards, *rest

        training.patch.setattr(training.envs, "step", scaled)
        training.patch.setattr(training.state.return_scale, "update", lambda *_: None)

    return change


def unscale(training: Training) -> None:
    training.patch.undo()


def wire_critic_to_policy(training: Training) -> None:
    """Let the value loss push against the policy loss on every weight that they share."""
    evaluate_rollout = ppo_lstm.evaluate_rollout

    def wired(*arguments: Any) -> Any:
        logprobs, entropies, num_legal, values = evaluate_rollout(*arguments)
        joint = logprobs.sum(-1)
        return logprobs, entropies, num_legal, values.detach() + 100 * (joint - joint.detach())

    training.patch.setattr(ppo_lstm, "evaluate_rollout", wired)
    # Returns far above all values: the value loss raises the log-probability of every action,
    # the policy loss lowers it where the advantage is negative.
    training.patch.setattr(ppo_lstm, "policy_loss", lambda r, a, c: (r - 1).mean() * a.std() / 1e3)


def leak(training: Training) -> None:
    """Keep 20 MB more of memory after every step of the environment."""
    kept: list[Any] = []
    step = training.envs.step
    training.saved["kept"] = kept

    def leaking(actions: Any) -> Any:
        kept.append(np.ones(2_500_000))
        return step(actions)

    training.patch.setattr(training.envs, "step", leaking)


def stop_leak(training: Training) -> None:
    training.patch.undo()
    training.saved.clear()


def fill_device(training: Training) -> None:
    """Report a device whose memory is used up."""
    figures = {f"system/device_{n}": 9.5e9 for n in ("memory", "reserved", "peak")}
    figures["system/device_share"] = 0.95
    training.patch.setattr(recorder, "device_memory", lambda device: figures)


WARM = {"progress": 0.3}
GROWTH = {"op": ["WAIT", "GERMINATE", "ADVANCE", "PRUNE", "FOSSILIZE"]}
LONG = {"env": {"episode_steps": 12, "flag_prunes": 2, "heads": {**GROWTH, "alpha_speed": [0]}}}
PAID = {
    "episode_steps": 16,
    "rent_weight": 2.0,
    "min_gradient_health": 0.0,
    "heads": {
        **GROWTH,
        "blueprint": ["conv_heavy"],
        "tempo": [3],
        "slot": [0],
        "alpha_target": [1.0],
    },
}
CASES: dict[str, tuple[str, dict[str, Any], Change, Change, int]] = {
    "ratio": ("ratio", {"max_grad_norm": 10.0}, set_large_rate, set_small_rate, 0),
    "kl": ("kl", {"max_grad_norm": 10.0}, set_large_rate, set_small_rate, 0),
    "value": (
        "value",
        WARM,
        break_weights("critic.2.weight", factor=1e3),
        load,
        0,
    ),
    "entropy": ("entropy[op]", WARM, prefer(WAIT=30.0), load, 0),
    "drift": ("drift[critic]", {}, scale_rewards(1e3), unscale, 11),
    "vanishing": (
        "vanishing[encoder]",
        {},
        break_weights("encoder.bias", "slot_encoder.bias", offset=-1e4),
        load,
        11,
    ),
    "exploding": ("exploding[critic]", {}, scale_rewards(1e5), unscale, 11),
    "conflict": ("conflict", {}, wire_critic_to_policy, unscale, 11),
    "core": (
        "core[saturated]",
        {},
        break_weights("lstm.bias_ih_l0", offset=50.0),
        load,
        0,
    ),
    "plasticity": (
        "plasticity[dormant]",
        WARM,
        break_weights("encoder.bias", "slot_encoder.bias", "critic.0.bias", offset=-1e4),
        load,
        0,
    ),
    "performance": (
        "performance",
        WARM | {"env": PAID},
        prefer(GERMINATE=30.0, ADVANCE=40.0, FOSSILIZE=50.0),
        load,
        4,
    ),
    "policy-collapse": ("policy-collapse[op]", WARM, prefer(WAIT=30.0), load, 0),
    "hacking": (
        "hacking[churn]",
        LONG,
        prefer(GERMINATE=30.0, PRUNE=40.0),
        prefer(WAIT=100.0),
        0,
    ),
    "memory": (
        "memory[host]",
        {"thresholds": {"memory_growth": 1e-3, "memory_updates": 3}},
        leak,
        stop_leak,
        0,
    ),
    "device memory": ("memory[device]", {}, fill_device, unscale, 0),
}
"""Alert, arguments, failure, recovery and updates before the failure, by case."""


@pytest.mark.parametrize("case", CASES)
def test_a_failure_raises_an_alert_and_recovery_clears_it(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Findings SYN-H1, SYN-H2, TEL-1, TEL-2, TEL-3, TEL-4, GRD-C3, GRD-H2, SYN-H14."""
    name, changes, fail, recover, before = CASES[case]
    training = make_training(changes, monkeypatch)
    if case == "performance":
        prefer(WAIT=30.0)(training)
    for _ in range(before):
        assert name not in [event.name for event in training.iterate()]
    fail(training)
    event, count = training.until(AlertRaised, name, most=25)
    print(f"{name}: raised after {count} updates")
    assert event.meaning
    assert event.severity in ("warning", "critical")
    assert event.name in repr(training.state.telemetry)
    recover(training)
    if case == "performance":
        prefer(WAIT=30.0)(training)
    training.until(AlertCleared, name, most=60)
    training.envs.close()


def test_every_detector_has_a_case() -> None:
    assert {name.split("[")[0] for name, *_ in CASES.values()} == set(DETECTORS)
    assert set(FAILURES) == set(CASES), "docs/reading.md describes all of them"
