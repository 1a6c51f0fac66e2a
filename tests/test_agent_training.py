"""The training loop on a real but tiny environment: rollouts, updates, checkpoints and runs.

Formulas are in `test_agent_maths.py`. Four hosts with one batch of 8 images per env step and
episodes of 6 steps; nothing here says whether the agent learns.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.kill_runs import TIMES
from esper_agent import ppo_lstm
from esper_agent.envs import make_envs
from esper_agent.networks import load_network, save_network
from esper_agent.ppo_lstm import (
    Agent,
    Args,
    Rollout,
    TrainedPolicy,
    TrainState,
    collect_rollout,
    compute_gae,
    evaluate_rollout,
    make_train_state,
    mean_entropies,
    run_iteration,
    subtract_group_baseline,
    train,
    update,
)
from esper_agent.telemetry.events import EpisodeEnded
from esper_agent.telemetry.metrics import find
from esper_env import EsperVectorEnv
from tests.builders import ID, sharpen, tiny_config

TINY = tiny_config(gamma=0.99, illegal_actions="raise")
"""An illegal action of the agent would raise an error in any test."""
NUM_ENVS = 4
EVERYONE = torch.arange(NUM_ENVS)
ROUNDING = 1e-5
"""Tolerance of log-probabilities and values that one LSTM call per sequence and one per step
compute in float32: additions in another order over some hundred terms near 1."""


def tiny_args(**changes: Any) -> Args:
    """Arguments of a run of 2 iterations of 6 env steps of 4 sub-environments."""
    settings: dict[str, Any] = {
        "env": TINY,
        "num_envs": NUM_ENVS,
        "num_steps": 6,
        "total_timesteps": 48,
        "group_size": 2,
        "num_minibatches": 2,
        "update_epochs": 2,
        "hidden_size": 16,
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "learning_rate": 1e-3,
        "eval_episodes": 0,
    }
    return Args(**(settings | changes))


def begin(envs: EsperVectorEnv, args: Args) -> TrainState:
    """Return the first state of a run whose agent is far from uniform."""
    state = make_train_state(args, envs)
    sharpen(state.agent)
    return state


@pytest.fixture(name="envs")
def make_tiny_envs() -> Iterator[EsperVectorEnv]:
    """Four tiny sub-environments."""
    envs = make_envs(ID, NUM_ENVS, "cpu", TINY)
    yield envs
    envs.close()


@dataclass
class Recorded:
    """A rollout and what was seen while it was made. Tensors are (steps, envs, ...)."""

    state: TrainState
    rollout: Rollout
    log_probs: Tensor
    """Of the actions, computed when they were chosen."""
    values: Tensor
    """Of the observations, computed at the same time."""
    last_obs: list[np.ndarray]
    """Observation after each step, before any reset. (envs, features)."""


def record(envs: EsperVectorEnv, args: Args, num_rollouts: int) -> Recorded:
    """Collect rollouts, watching `Agent.get_action` and `step`, and return the last one."""
    state = begin(envs, args)
    agent = state.agent
    seen: dict[str, list[Any]] = {"log_probs": [], "values": [], "last_obs": []}
    get_action, step = agent.get_action, envs.step

    def watched_action(*arguments: Any) -> Any:
        actions, masks = get_action(*arguments)
        seen["log_probs"].append(agent.evaluate_actions(*arguments[:2], actions, masks)[0])
        seen["values"].append(agent.get_value(arguments[0]))
        return actions, masks

    def watched_step(actions: np.ndarray) -> Any:
        result = step(actions)
        final = result[4].get("final_obs")
        seen["last_obs"].append(result[0] if final is None else np.stack(list(final)))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent, "get_action", watched_action)
        patch.setattr(envs, "step", watched_step)
        for _ in range(num_rollouts):
            for values in seen.values():
                values.clear()
            rollout = collect_rollout(state, envs, args)
    seen |= {name: torch.stack(seen[name]) for name in ("log_probs", "values")}
    return Recorded(state, rollout, **seen)


@pytest.fixture(name="recorded", scope="module")
def record_second_rollout() -> Iterator[Recorded]:
    """The second rollout of 8 steps over episodes of 6.

    It starts at step 2 of an episode with a state that is not zero; episodes end with its step 3,
    so its step 4 is a start.
    """
    envs = make_envs(ID, NUM_ENVS, "cpu", TINY)
    yield record(envs, tiny_args(num_steps=8), num_rollouts=2)
    envs.close()


def train_on(state: TrainState, rollout: Rollout, args: Args) -> dict[str, float]:
    """Update an agent with a rollout; return metrics."""
    watch = state.telemetry.watch_update(state.agent, args)
    metrics, problems = update(state, rollout, args, watch)
    assert problems == []
    return metrics


def update_once(recorded: Recorded, **changes: Any) -> tuple[dict[str, float], int]:
    """Update a copy of the agent; return metrics and the number of optimizer steps."""
    state = copy.deepcopy(recorded.state)
    calls: list[Any] = []
    state.optimizer.register_step_pre_hook(lambda *arguments: calls.append(arguments))
    metrics = train_on(state, recorded.rollout, tiny_args(num_steps=8, **changes))
    return metrics, len(calls)


# ------------------------------------------------------------------------------ rollout


def test_the_recorded_rollout_has_what_the_tests_below_need(recorded: Recorded) -> None:
    """An episode end inside, a state carried over, and ops whose heads have a choice."""
    rollout = recorded.rollout
    assert rollout.truncations.any(dim=1).tolist() == [False] * 3 + [True] + [False] * 4
    assert rollout.dones.any(dim=1).tolist() == [False] * 4 + [True] + [False] * 3
    assert (rollout.lstm_state[0] != 0).any()
    assert (rollout.lstm_state[1] != 0).any()
    assert len(rollout.actions[..., 0].unique()) >= 3
    assert (recorded.log_probs[..., 2:] < 0).any()


def test_evaluation_at_unchanged_weights_equals_what_was_acted_on(recorded: Recorded) -> None:
    """Findings SYN-C4, LOOP-2: log-probabilities and values, per step, sub-environment and head."""
    with torch.no_grad():
        log_probs, _, _, values = evaluate_rollout(recorded.state.agent, recorded.rollout, EVERYONE)
    torch.testing.assert_close(log_probs, recorded.log_probs, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(values, recorded.values, rtol=0, atol=ROUNDING)


def test_evaluation_of_some_sequences_equals_their_part_of_all(recorded: Recorded) -> None:
    """A minibatch sees the same sequences, in its own order."""
    envs = torch.tensor([3, 1])
    with torch.no_grad():
        everyone = evaluate_rollout(recorded.state.agent, recorded.rollout, EVERYONE)
        some = evaluate_rollout(recorded.state.agent, recorded.rollout, envs)
    for whole, part in zip(everyone, some, strict=True):
        torch.testing.assert_close(part, whole[:, envs], rtol=0, atol=ROUNDING)


def test_the_bootstrap_value_is_that_of_the_observation_before_the_reset(
    recorded: Recorded,
) -> None:
    """Findings SYN-H4, LOOP-3.

    The LSTM is run step by step up to the truncation (step 3) and once more on the last
    observation, without a reset; the same at the end of the rollout (step 7).
    """
    agent, rollout = recorded.state.agent, recorded.rollout
    state = rollout.lstm_state
    with torch.no_grad():
        for t in range(8):
            _, _, state = agent.get_next_state(rollout.obs[t], state, rollout.dones[t])
            last_obs = torch.from_numpy(recorded.last_obs[t])
            hidden, _, _ = agent.get_next_state(last_obs, state, rollout.dones[0] & False)
            expected = agent.get_value(hidden) if t in (3, 7) else torch.zeros(NUM_ENVS)
            torch.testing.assert_close(rollout.next_values[t], expected, rtol=0, atol=ROUNDING)
    # The observation after the reset is another one, and so is its value.
    assert (rollout.next_values[3] - recorded.values[4]).abs().min() > 100 * ROUNDING


def test_the_rollout_and_its_figures_are_those_of_the_environment(envs: EsperVectorEnv) -> None:
    """Finding LOOP-2: its actions in a fresh environment give the same, bit by bit.

    Two episodes per sub-environment end in 12 steps. The return with the reward "gain" is the
    committed score at the end minus that at the start. Tolerance 1e-9: sums of 6 float64 rewards.
    """
    args = tiny_args(num_steps=12)
    state = begin(envs, args)
    rollout = collect_rollout(state, envs, args)
    metrics, events = state.telemetry.environment.finish("normal", 48, rollout.obs.numpy())
    episodes = [event for event in events if isinstance(event, EpisodeEnded)]
    # Groups of two share their reset seeds.
    obs, info = envs.reset(seed=[1, 1, 2, 2])
    first_scores = info["score"]
    for t in range(12):
        assert np.array_equal(rollout.obs[t].numpy(), obs)
        obs, rewards, _, truncations, info = envs.step(rollout.actions[t].numpy())
        assert np.array_equal(rollout.rewards[t].numpy(), rewards)
        assert np.array_equal(rollout.truncations[t].numpy(), truncations)
    returns = [*rollout.rewards[:6].sum(dim=0).tolist(), *rollout.rewards[6:].sum(dim=0).tolist()]
    scores = [episode.score for episode in episodes]
    assert [e.episodic_return for e in episodes] == pytest.approx(returns, abs=1e-9)
    assert metrics["charts/episodic_return"] == pytest.approx(np.mean(returns), abs=1e-9)
    assert metrics["charts/episodic_score"] == pytest.approx(np.mean(scores), abs=1e-9)
    assert scores[NUM_ENVS:] == info["final_info"]["committed_score"].tolist()
    parameters = [episode.parameters for episode in episodes]
    assert parameters[NUM_ENVS:] == info["final_info"]["parameters"].tolist()
    assert metrics["charts/episodic_parameters"] == np.mean(parameters)
    gains = np.array(scores[:NUM_ENVS]) - first_scores
    assert returns[:NUM_ENVS] == pytest.approx(gains.tolist(), abs=1e-9)
    first = rollout.obs[0]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


# ------------------------------------------------------------------------------ update


def test_only_the_first_minibatch_has_ratio_one(recorded: Recorded) -> None:
    """Findings SYN-C5, LOOP-2: with one minibatch and one epoch KL and clipping are 0 as well."""
    metrics, _ = update_once(recorded, update_epochs=1, num_minibatches=1)
    assert metrics["losses/first_ratio_error"] < ROUNDING
    assert metrics["losses/clipfrac"] == 0.0
    assert abs(metrics["losses/approx_kl"]) < ROUNDING
    metrics, _ = update_once(recorded, update_epochs=4, num_minibatches=1)
    assert metrics["losses/first_ratio_error"] < ROUNDING
    assert metrics["losses/approx_kl"] > 10 * ROUNDING


def test_an_update_is_two_adam_steps_on_the_loss_written_out(recorded: Recorded) -> None:
    """Findings SYN-C4, SYN-H4, LOOP-3: two epochs of one minibatch, most of the second clipped.

    The value of the next observation is V(s'), except at the truncation (step 3) and at the end
    (step 7), where the rollout has it. Only the order of sequences differs, so weights agree within
    1e-5 (a step is 1e-3 at most) and metrics within one per mille.
    """
    rollout, settings = recorded.rollout, {"ent_coef": 0.1, "vf_coef": 0.7, "max_grad_norm": 0.1}
    args = tiny_args(num_steps=8, num_minibatches=1, clip_coef=1e-3, **settings)
    state, plain = copy.deepcopy(recorded.state), copy.deepcopy(recorded.state)
    metrics = train_on(state, rollout, args)

    with torch.no_grad():
        old, _, _, values = evaluate_rollout(plain.agent, rollout, EVERYONE)
    following = torch.cat([values[1:], rollout.next_values[7:]])
    following[3] = rollout.next_values[3]
    rewards = (rollout.rewards / plain.return_scale.std).float()
    ends = rollout.terminations, rollout.truncations
    advantages = compute_gae(rewards, values, following, *ends, args.gamma, args.gae_lambda)
    returns = advantages + values
    advantages, variance_left = subtract_group_baseline(advantages, args.group_size)
    advantages = (advantages - advantages.mean()) / advantages.std()
    rows = []
    for _ in range(2):
        new, entropies, num_legal, predicted = evaluate_rollout(plain.agent, rollout, EVERYONE)
        choices = num_legal > 1
        logratio = (new - old).sum(-1)
        ratio = logratio.exp()
        clipped = ratio.clamp(1 - 1e-3, 1 + 1e-3)
        pg_loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
        v_loss = (predicted - returns).square().mean() / 2
        entropy = mean_entropies(entropies, choices).sum()
        plain.optimizer.zero_grad()
        (pg_loss + 0.7 * v_loss - 0.1 * entropy).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.agent.parameters(), 0.1)
        plain.optimizer.step()
        kl, is_clipped = ratio - 1 - logratio, ratio != clipped
        row = [pg_loss, v_loss, entropy, kl.mean(), is_clipped.float().mean(), norm]
        rows.append(torch.stack(row).detach())
    for weight, expected in zip(state.agent.parameters(), plain.agent.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-5)
    names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "gradient_norm")
    actual = [metrics[f"losses/{name}"] for name in names]
    assert actual == pytest.approx(torch.stack(rows).mean(0).tolist(), rel=1e-3, abs=1e-6)
    assert actual[4] > 0.3
    explained = 1 - float((returns - values).var() / returns.var())
    assert metrics["losses/explained_variance"] == pytest.approx(explained, rel=1e-3)
    assert metrics["losses/variance_left"] == pytest.approx(variance_left, rel=1e-3)
    assert metrics["choice/slot"] == pytest.approx(float(choices[..., 1].float().mean()))


def test_minibatches_are_whole_sequences_shuffled_each_epoch(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Findings SYN-C3, SYN-H5: each epoch has every sequence once, all steps, in a new order."""
    calls: list[list[int]] = []
    shapes: set[tuple[int, ...]] = set()

    def watched(agent: Agent, rollout: Rollout, envs: Tensor) -> Any:
        result = evaluate_rollout(agent, rollout, envs)
        calls.append(envs.tolist())
        shapes.add((len(result[0]), result[0].shape[1] // len(envs)))
        return result

    monkeypatch.setattr(ppo_lstm, "evaluate_rollout", watched)
    update_once(recorded, update_epochs=6, num_minibatches=2)
    assert calls[0] == EVERYONE.tolist(), "old log-probabilities of all, first"
    assert shapes == {(8, 1)}
    minibatches = calls[1:]
    assert [len(envs) for envs in minibatches] == [2] * 12
    epochs = [tuple(a + b) for a, b in zip(minibatches[::2], minibatches[1::2], strict=True)]
    assert all(sorted(epoch) == EVERYONE.tolist() for epoch in epochs)
    assert len(set(epochs)) > 1


def test_a_rollout_gives_several_gradient_steps_until_the_target_kl(recorded: Recorded) -> None:
    """Finding PRE-15: epochs times minibatches, several by default.

    The first minibatch has KL 0 up to rounding, so one step is taken; the next one stops.
    """
    assert update_once(recorded, update_epochs=3, num_minibatches=4)[1] == 12
    assert Args().update_epochs * Args().num_minibatches >= 8
    settings = {"update_epochs": 4, "num_minibatches": 1, "target_kl": ROUNDING}
    assert update_once(recorded, **settings)[1] == 1


def test_heads_that_never_had_a_choice_report_entropy_zero_and_finite_metrics() -> None:
    """Findings SYN-H3, SYN-H6: with WAIT as the only op no head has a choice.

    The critic still learns, which moves the encoder, and yet log-probabilities stay 0.
    """
    args = tiny_args(env=dataclasses.replace(TINY, heads={"op": "WAIT"}), learning_rate=1e-2)
    envs = make_envs(ID, NUM_ENVS, "cpu", args.env)
    state = begin(envs, args)
    weight = state.agent.encoder.weight.detach().clone()
    metrics = run_iteration(state, envs, args)
    envs.close()
    assert (state.agent.encoder.weight != weight).any()
    assert all(np.isfinite(value) for value in metrics.values())
    for name in state.agent.heads:
        assert metrics[f"entropy/{name}"] == metrics[f"choice/{name}"] == 0.0
    assert metrics["losses/approx_kl"] == 0.0


def test_the_train_state_is_all_that_a_run_carries_from_iteration_to_iteration(
    envs: EsperVectorEnv,
) -> None:
    """A copy of it and of the environment's state goes on bit by bit, in the middle of episodes."""
    args = tiny_args(num_steps=8, total_timesteps=96)
    state = begin(envs, args)
    run_iteration(state, envs, args)
    saved, environment = copy.deepcopy(state), envs.get_state()
    results = []
    for start in (state, saved):
        envs.set_state(environment)
        metrics = run_iteration(start, envs, args)
        metrics = {n: v for n, v in metrics.items() if n not in TIMES}
        results.append((metrics, [p.tolist() for p in start.agent.parameters()]))
    assert results[0] == results[1]


# ------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_envs": 0}, "num_envs: expected at least 1, got 0"),
        ({"num_steps": 0}, "num_steps: expected at least 1, got 0"),
        ({"update_epochs": 0}, "update_epochs: expected at least 1, got 0"),
        ({"hidden_size": -1}, "hidden_size: expected at least 1, got -1"),
        ({"num_minibatches": 0}, "num_minibatches: expected at least 1, got 0"),
        ({"num_minibatches": 3}, "num_minibatches: expected a divisor of num_envs=4, got 3"),
        ({"group_size": 3}, "group_size: expected a divisor of num_envs=4, got 3"),
        ({"total_timesteps": 23}, "total_timesteps: expected at least num_envs * num_steps = 24"),
        # Else these would fail after the training and in the first update.
        ({"eval_episodes": -1}, "eval_episodes: expected at least 0, got -1"),
        ({"target_kl": -0.1}, "target_kl: expected a finite number above 0, got -0.1"),
        ({"learning_rate": float("nan")}, "learning_rate: expected above 0 and at most 1, got nan"),
        ({"learning_rate": 1e6}, "learning_rate: expected above 0 and at most 1, got 1000000.0"),
        ({"learning_rate": 0.0}, "learning_rate: expected above 0 and at most 1, got 0.0"),
        ({"gamma": 1.5}, "gamma: expected above 0 and at most 1, got 1.5"),
        ({"gae_lambda": -0.1}, "gae_lambda: expected 0 to 1, got -0.1"),
        ({"clip_coef": float("nan")}, "clip_coef: expected a finite number above 0, got nan"),
        ({"max_grad_norm": -1.0}, "max_grad_norm: expected a finite number above 0, got -1.0"),
        ({"wait_logit": float("nan")}, "wait_logit: expected -100 to 100, got nan"),
        ({"ent_coef": float("inf")}, "ent_coef: expected a finite number of at least 0, got inf"),
        ({"vf_coef": -0.5}, "vf_coef: expected a finite number of at least 0, got -0.5"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"eval_every": -1}, "eval_every: expected at least 0, got -1"),
        ({"keep_checkpoints": 0}, "keep_checkpoints: expected at least 1, got 0"),
        ({"checkpoint_minutes": -1.0}, "checkpoint_minutes: expected a finite number of at least"),
        (
            {"num_envs": 1, "num_steps": 1, "group_size": 1, "num_minibatches": 1},
            "num_steps: expected at least 2 with one environment; a single advantage has no",
        ),
    ],
)
def test_arguments_out_of_range_raise(changes: dict[str, Any], message: str) -> None:
    """The message names the argument, the expected and the actual value."""
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_args(**changes)


def test_training_with_different_discount_factors_raises_before_anything_is_written(
    tmp_path: Path,
) -> None:
    """Finding SYN-C1: the message names both values; no run directory is left behind."""
    with pytest.raises(ValueError, match=r"gamma: expected 0\.99 as in --env.gamma, got 0\.9"):
        train(tiny_args(gamma=0.9, run_dir=tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------ checkpoint


def test_a_loaded_checkpoint_is_the_agent_that_was_saved(
    recorded: Recorded, tmp_path: Path
) -> None:
    """Bit by bit, with the global random state as it was before."""
    saved, before = recorded.state.agent, torch.get_rng_state()
    save_network(tmp_path, saved)
    loaded = load_network(tmp_path, Agent)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        results = [evaluate_rollout(a, recorded.rollout, EVERYONE) for a in (saved, loaded)]
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": {"style": "LINEAR_ADD"}}, r"other heads: expected \('style', .*LINEAR_GATE"),
        ({"observation_names": ["a"]}, r"other observation_names: expected 1 of them, got \d+"),
        (
            {"observation_names": None},
            "other observation_names: expected 'other', got 'budget_left",
        ),
    ],
)
def test_a_checkpoint_of_other_spaces_is_rejected(
    recorded: Recorded, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """The message shows the head or feature that differs, or their number."""
    save_network(tmp_path, recorded.state.agent)
    policy, path = TrainedPolicy(tmp_path), tmp_path / "agent.json"
    heads = change.get("heads", {})
    if not heads:
        arguments = json.loads(path.read_text())
        others = ["other", *arguments["observation_names"][1:]]
        arguments["observation_names"] = change["observation_names"] or others
        path.write_text(json.dumps(arguments))
    envs = make_envs(ID, NUM_ENVS, "cpu", dataclasses.replace(TINY, heads=heads))
    with pytest.raises(ValueError, match=message):
        policy.begin(envs, 0)
    envs.close()


def test_a_missing_checkpoint_raises_file_not_found(recorded: Recorded, tmp_path: Path) -> None:
    """Both where nothing is and where the weights alone are missing."""
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*agent.json"):
        load_network(tmp_path, Agent)
    save_network(tmp_path, recorded.state.agent)
    (tmp_path / "agent.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"agent\.safetensors"):
        load_network(tmp_path, Agent)


# ------------------------------------------------------------------------------ whole runs


@dataclass
class Run:
    """A finished run."""

    directory: Path
    output: str
    random_states: list[tuple[Any, Any, Any]]
    """Of torch, NumPy and Python, before and after."""

    def rows(self) -> list[dict[str, float]]:
        """Read metrics.jsonl."""
        lines = (self.directory / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def random_states() -> tuple[Any, Any, Any]:
    """Return the global random states in a form that compares with ==."""
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()  # noqa: NPY002


def run_to_end(args: Args) -> Run:
    """Train with the output captured."""
    states = [random_states()]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        directory = train(args)
    return Run(directory, output.getvalue(), [*states, random_states()])


@pytest.fixture(name="run", scope="module")
def run_two_iterations(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two iterations and an evaluation of 4 episodes."""
    return run_to_end(tiny_args(run_dir=tmp_path_factory.mktemp("runs") / "a", eval_episodes=4))


@pytest.fixture(name="repeated", scope="module")
def run_two_iterations_again(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same without an evaluation."""
    return run_to_end(tiny_args(run_dir=tmp_path_factory.mktemp("runs") / "b"))


def test_a_run_writes_its_files(run: Run) -> None:
    """The configuration, metrics, TensorBoard events, checkpoint and evaluation; no pickle."""
    names = {path.name for path in run.directory.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert len(events) == 1
    agent, evaluation = {"agent.safetensors", "agent.json"}, {"evaluation.json", "evaluation.png"}
    assert names - events == {
        *("config.json", "metrics.jsonl", "checkpoints", ".lock", "finished.json"),
        "events.jsonl",
        *agent,
        *evaluation,
    }
    config = json.loads((run.directory / "config.json").read_text())
    assert config["num_steps"] == 6
    assert config["env"]["batches_per_step"] == 1


def test_metrics_are_finite_and_those_of_the_table(run: Run) -> None:
    """tests/test_telemetry.py proves that none is missing."""
    rows = run.rows()
    assert [row.pop("step") for row in rows] == [24, 48]
    for row in rows:
        assert {"entropy/alpha_curve", "losses/value_loss", "charts/SPS"} <= set(row)
        assert all(find(name) for name in row)
        assert all(np.isfinite(value) for value in row.values())
        assert row["losses/first_ratio_error"] < ROUNDING
    assert [row["charts/learning_rate"] for row in rows] == pytest.approx([1e-3, 5e-4])


def test_tensorboard_has_the_values_of_metrics_jsonl(run: Run) -> None:
    """The tolerance is float32, in which events are stored."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.directory))
    events.Reload()
    rows = run.rows()
    assert set(events.Tags()["scalars"]) == set().union(*rows) - {"step"}
    for name in ("losses/value_loss", "charts/episodic_score"):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in logged] == [24, 48]
        values = [row[name] for row in rows]
        assert [value for _, value in logged] == pytest.approx(values, rel=1e-6)


def test_a_run_ends_with_an_evaluation_of_four_agents(run: Run) -> None:
    """The trained agent and three baselines on the same 4 episodes.

    The table is printed in full; rich shortens with an ellipsis what does not fit, and output to a
    file has no terminal width.
    """
    result = json.loads((run.directory / "evaluation.json").read_text())
    assert list(result["agents"]) == ["ppo_lstm", "never-grow", "random", "heuristic"]
    seeds = [1_000_000 + k for k in range(4)]
    assert all(record["episodes"]["seed"] == seeds for record in result["agents"].values())
    summary = result["agents"]["never-grow"]["summary"]
    assert f"{summary['low']:.4f} .. {summary['high']:.4f}" in run.output
    assert "…" not in run.output
    assert re.search(r"^step 48  score - never-grow .* min left$", run.output, re.M)


def test_the_same_seed_gives_the_same_metrics_and_another_seed_others(
    run: Run, repeated: Run, tmp_path: Path
) -> None:
    """Everything but wall time, whether or not an evaluation follows."""
    for row, again in zip(run.rows(), repeated.rows(), strict=True):
        for name in TIMES:
            del row[name], again[name]
        assert row == again
    other = run_to_end(tiny_args(run_dir=tmp_path / "c", seed=2, total_timesteps=24))
    assert other.rows()[0]["losses/value_loss"] != run.rows()[0]["losses/value_loss"]


def test_training_and_evaluation_leave_global_random_states_alone(run: Run, repeated: Run) -> None:
    """Torch, NumPy and Python, with and without the final evaluation."""
    for states in (run.random_states, repeated.random_states):
        for name, before, after in zip(("torch", "NumPy", "Python"), *states, strict=True):
            assert before == after, name


def test_training_with_other_blueprints_than_the_heuristics_ends_with_an_evaluation(
    tmp_path: Path,
) -> None:
    """A restriction that the environment admits must not fail after the training is done."""
    config = dataclasses.replace(TINY, heads={"blueprint": "norm"})
    run = run_to_end(
        tiny_args(env=config, total_timesteps=24, eval_episodes=2, run_dir=tmp_path / "run")
    )
    assert (run.directory / "evaluation.json").exists()


# ------------------------------------------------------------------------------ threads


@pytest.mark.usefixtures("threads")
def test_the_agent_uses_one_thread_and_the_environment_those_of_torch(
    envs: EsperVectorEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent's matrices are too small to share out."""
    seen: dict[str, set[int]] = {}

    def watch(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def watched(*arguments: Any) -> Any:
            seen.setdefault(name, set()).add(torch.get_num_threads())
            return function(*arguments)

        monkeypatch.setattr(owner, name, watched)

    args = tiny_args()
    state = begin(envs, args)
    watch(state.agent, "get_action")
    watch(envs, "step")
    watch(ppo_lstm, "evaluate_rollout")
    torch.set_num_threads(2)
    run_iteration(state, envs, args)
    assert seen == {"get_action": {1}, "step": {2}, "evaluate_rollout": {1}}


@pytest.mark.usefixtures("threads")
def test_training_does_not_depend_on_the_number_of_threads() -> None:
    """Bit by bit, initial weights included; wide enough that torch would share out the work."""
    args = tiny_args(hidden_size=128)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        envs = make_envs(ID, NUM_ENVS, "cpu", TINY)
        state = make_train_state(args, envs)
        rollout = collect_rollout(state, envs, args)
        train_on(state, rollout, args)
        envs.close()
        results.append([rollout.actions, *state.agent.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("env_id", "wait_logit", "expected"),
    [("Esper-Digits-v0", None, 0), ("Esper-Digits-Contexts-v0", None, 2.5), (ID, 1.5, 1.5)],
)
def test_an_agent_of_an_environment_with_parking_begins_by_waiting(
    env_id: str, wait_logit: float | None, expected: float
) -> None:
    """All other ops have logits near 0."""
    args = Args(env_id=env_id, num_envs=4, num_minibatches=1, wait_logit=wait_logit)
    assert args.wait_logit == expected
    envs = make_envs(args.env_id, args.num_envs, "cpu", args.env)
    agent = make_train_state(args, envs).agent
    assert envs.heads[0].options[0] == "WAIT"
    assert agent.op_head.bias.tolist() == [expected] + (agent.width - 1) * [0]
