"""Telemetry of a run: metrics, events, levels, figures against plain computations, and writers.

Four sub-environments with one batch of 8 images per env step.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.kill_runs import TIMES
from esper_agent import ppo_lstm
from esper_agent.baselines import NeverGrow, RandomLegal
from esper_agent.envs import TRAINING, make_envs, settings_of
from esper_agent.ppo_lstm import (
    Args,
    collect_rollout,
    evaluate_rollout,
    make_train_state,
    run_iteration,
    train,
)
from esper_agent.telemetry import gradients, recorder
from esper_agent.telemetry.activations import core_figures, dormant_share, effective_rank
from esper_agent.telemetry.detectors import DETECTORS, Alerts, Thresholds
from esper_agent.telemetry.display import Display, progress
from esper_agent.telemetry.environment import EnvironmentWatch
from esper_agent.telemetry.events import (
    EVENTS,
    AlertCleared,
    AlertRaised,
    EpisodeEnded,
    Germinated,
    Growth,
)
from esper_agent.telemetry.metrics import GROUPS, METRICS, Metric, find, has_level
from esper_agent.telemetry.recorder import Trends
from esper_agent.telemetry.reference import NeverGrowScores
from esper_env import EnvConfig, EsperVectorEnv, Op, Stage
from tests.builders import ID, tiny_config

CONFIG = tiny_config(
    gamma=0.99,
    episode_steps=12,
    heads={"op": ["WAIT", "GERMINATE", "ADVANCE", "PRUNE", "FOSSILIZE"], "alpha_target": [1.0]},
    min_gradient_health=0.0,
    panic_patience=2,
    panic_window=2,
    divergence_sigma=0.0,
    divergence_factor=1.05,
)
"""Seeds can be fossilized, and two losses that rise a little are rolled back: all events occur."""
NO_DEVICE = re.compile(r"system/device_")
"""Metrics that only a GPU has; `test_a_gpu_reports_its_memory` covers them."""


def small_args(**changes: Any) -> Args:
    settings: dict[str, Any] = {
        "env": CONFIG, "gamma": 0.99, "num_envs": 4, "num_steps": 8, "group_size": 2,
        "num_minibatches": 2, "update_epochs": 2, "hidden_size": 16, "learning_rate": 1e-2,
        "total_timesteps": 4 * 8 * 24, "eval_episodes": 0,
    }  # fmt: skip
    return Args(**(settings | changes))


@pytest.fixture(name="envs")
def make_small_envs() -> Iterator[EsperVectorEnv]:
    envs = make_envs(ID, 4, "cpu", CONFIG)
    yield envs
    envs.close()


def rows_of(directory: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


# ------------------------------------------------------------------ a whole run at each level


@pytest.fixture(name="runs", scope="module")
def run_every_level(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of 24 iterations at each level; alerts do not lift the level, entropy raises some."""
    directories = {}
    for level in ("off", "normal", "debug"):
        directory = tmp_path_factory.mktemp("runs") / level
        args = small_args(telemetry=level, run_dir=directory, eval_every=12, checkpoint_minutes=0.0)
        with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
            patch.setattr(ppo_lstm, "EVAL_EPISODES", 2)
            low = Thresholds(kl_warning=1e-4, kl_critical=1e-2)
            patch.setattr(recorder, "Thresholds", lambda low=low: low)
            directories[level] = train(args)
    return directories


def test_a_run_writes_every_metric_of_its_level_and_no_other_one(runs: dict[str, Path]) -> None:
    """The table and the rows are the same set.

    Findings TEL-1, TEL-6, TEL-7, GRD-H4, SYN-M12, SYN-M13.
    """
    for level, directory in runs.items():
        written = set().union(*rows_of(directory, "metrics.jsonl")) - {"step"}
        described = {find(name) for name in written}
        lifted = "debug" if level == "normal" else level  # An alert lifts it for a while.
        assert all(has_level(lifted, metric.level) for metric in described)
        expected = {m for m in METRICS if has_level(level, m.level) and not NO_DEVICE.match(m.name)}
        missing = {metric.name for metric in expected - described}
        assert missing == set()


def test_metrics_without_data_are_the_optional_ones(runs: dict[str, Path]) -> None:
    """Finding TEL-8: a metric that is not optional is in every row of its level."""
    rows = rows_of(runs["debug"], "metrics.jsonl")
    for name in set().union(*rows):
        if name != "step" and not find(name).is_optional:
            assert all(name in row for row in rows), name


def test_every_kind_of_event_occurs(runs: dict[str, Path]) -> None:
    """Findings TEL-9, GRD-L5: events are frozen records."""
    events = rows_of(runs["debug"], "events.jsonl")
    kinds = {event["kind"] for event in events}
    assert kinds == set(EVENTS)
    for event in events:
        fields = set(event) - {"kind"}
        names = {field.name for field in dataclasses.fields(EVENTS[event["kind"]])}
        assert fields == names
    assert [e["step"] for e in events if e["kind"] == "updated"] == [32 * k for k in range(1, 25)]
    with pytest.raises(AttributeError):
        EVENTS["updated"](step=1, iteration=1, level="off").step = 2  # type: ignore[call-arg]


def test_the_level_changes_neither_weights_nor_trajectories(runs: dict[str, Path]) -> None:
    """Finding PRE-7, bit by bit."""
    from safetensors.torch import load_file

    off, *others = (load_file(path / "agent.safetensors") for path in runs.values())
    for other in others:
        assert all(torch.equal(off[name], other[name]) for name in off)
    rows = [rows_of(path, "metrics.jsonl") for path in runs.values()]
    for off_row, *other_rows in zip(*rows, strict=True):
        for row in other_rows:
            assert {n: row[n] for n in off_row if n not in TIMES} == {
                n: v for n, v in off_row.items() if n not in TIMES
            }
    kinds = [event["kind"] for event in rows_of(runs["off"], "events.jsonl")]
    assert kinds[0] == "run_started"
    assert "episode_ended" not in kinds


def test_an_alert_lifts_the_level_for_some_updates(runs: dict[str, Path]) -> None:
    """Finding TEL-21: level and remaining updates are metrics."""
    rows = rows_of(runs["normal"], "metrics.jsonl")
    events = rows_of(runs["normal"], "events.jsonl")
    raised = {event["step"] for event in events if event["kind"] == "alert_raised"}
    left = 0
    for row in rows:
        assert row["telemetry/level"] == (2.0 if left else 1.0)
        assert ("tensor/norm/op_head.bias" in row) == bool(left)
        left = 5 if row["step"] in raised else max(0, left - 1)
        assert row["telemetry/debug_updates"] == left
    assert 1.0 in [row["telemetry/level"] for row in rows[1:]] or len(raised) > 4


def test_every_detector_is_evaluated_in_every_update(envs: EsperVectorEnv) -> None:
    """Findings TEL-1, TEL-2, TEL-3."""
    args = small_args()
    state = make_train_state(args, envs)
    for k in range(1, 4):
        run_iteration(state, envs, args)
        assert state.telemetry.alerts.evaluated == dict.fromkeys(DETECTORS, k)


def test_resumed_telemetry_goes_on_as_if_nothing_had_happened(envs: EsperVectorEnv) -> None:
    """Averages, alerts, history, running episodes and the change of the weights."""
    args = small_args(num_steps=5)
    fresh = make_train_state(args, envs).telemetry
    state = make_train_state(args, envs)
    for _ in range(12):
        run_iteration(state, envs, args)
    environment, other = envs.get_state(), copy.deepcopy(state)
    fresh.set_state(copy.deepcopy(state.telemetry.get_state()))
    other.telemetry = fresh
    results = []
    for one in (state, other):
        envs.set_state(environment)
        metrics = run_iteration(one, envs, args)
        events = [event.to_row() for event in one.telemetry.events]
        results.append(({n: v for n, v in metrics.items() if n not in TIMES}, events))
    assert results[0] == results[1]


# ------------------------------------------------------------------ table


def test_an_unknown_metric_is_an_error_that_names_close_ones() -> None:
    """Finding TEL-20."""
    with pytest.raises(KeyError, match=r"such as \['losses/value_loss'.*got 'losses/valu_loss'"):
        find("losses/valu_loss")
    assert find("time/policy_share").name == "time/policy_share"
    assert find("time/update").name == "time/<part>"
    assert (
        len({metric.name for metric in METRICS}) == len(METRICS) == sum(map(len, GROUPS.values()))
    )


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
def test_the_table_describes_each_metric(metric: Metric) -> None:
    assert metric.meaning
    assert not metric.meaning.endswith(".")
    assert metric.low is None or metric.high is None or metric.low < metric.high


# ------------------------------------------------------------------ gradients by hand


def test_norms_cosines_and_shares_are_those_of_joined_gradients() -> None:
    """Findings GRD-C1, GRD-C2, GRD-L1, GRD-L2, TEL-12, TEL-13: to 1e-6 of what NumPy says."""
    generator = torch.Generator().manual_seed(3)
    first, second = (
        [torch.randn(*shape, generator=generator) for shape in ((5, 3), (7,), (2, 2, 2))]
        for _ in range(2)
    )
    first[1][::2] = 0.0
    a, b = (np.concatenate([t.numpy().ravel() for t in g]).astype(float) for g in (first, second))
    assert float(gradients.norm(first)) == pytest.approx(np.linalg.norm(a), rel=1e-6)
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert float(gradients.cosine(first, second)) == pytest.approx(cosine, abs=1e-6)
    assert float(gradients.negative_share(first)) == pytest.approx((a < 0).mean(), abs=1e-6)
    assert float(gradients.sparsity(first)) == pytest.approx(4 / 30, abs=1e-6)
    largest = sum(float(t.abs().max()) ** 2 for t in first) / (a @ a)
    assert float(gradients.concentration(first)) == pytest.approx(largest, rel=1e-6)
    zero = [torch.zeros_like(t) for t in first]
    assert math.isnan(float(gradients.cosine(first, zero)))


def test_the_noise_scale_of_known_batches() -> None:
    """Finding GRD-L3: gradients g_i = mean + noise; trace of the covariance over squared mean.

    With batches of 1 and the whole batch of 4 both estimates are exact sample statistics.
    """
    samples = torch.tensor([[3.0, 1.0], [1.0, 1.0], [2.0, 3.0], [2.0, -1.0]], dtype=torch.float64)
    mean = samples.mean(0)
    trace = ((samples - mean) ** 2).sum() / 3  # Unbiased.
    square = mean @ mean - trace / 4
    scale = gradients.noise_scale((samples**2).sum(1).mean(), mean @ mean, 1, 4)
    assert float(scale) == pytest.approx(float(trace / square), rel=1e-12)
    assert math.isnan(float(gradients.noise_scale(torch.tensor(9.0), torch.tensor(1.0), 1, 4)))


def test_gradient_figures_compile_into_one_graph() -> None:
    """Findings SYN-C6, SYN-G5, TEL-15: no graph break, no private function."""
    grads = [torch.randn(4, 3), torch.randn(200)]

    def figures(grads: list[Tensor]) -> Tensor:
        other = [g.flip(0) for g in grads]
        square = gradients.norm(grads).square()
        return torch.stack(
            [
                gradients.norm(grads),
                gradients.cosine(grads, other),
                gradients.negative_share(grads),
                gradients.sparsity(grads),
                gradients.concentration(grads),
                gradients.noise_scale(2 * square, square, 1, 4),
                *gradients.tensor_figures(grads[0], 0.5),
                gradients.correlation(grads[1], other[1]),
            ]
        )

    compiled = torch.compile(figures, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(grads), figures(grads))


def test_an_updates_figures_are_those_of_plain_autograd(envs: EsperVectorEnv) -> None:
    """Policy, value and entropy gradients apart, cosines and norms of groups, by hand.

    One epoch of one minibatch, so all figures belong to the first gradient.
    """
    args = small_args(num_minibatches=1, update_epochs=1, ent_coef=0.5, telemetry="debug")
    state = make_train_state(args, envs)
    rollout = collect_rollout(state, envs, args)
    seen: dict[str, Any] = {}
    watch = state.telemetry.watch_update(state.agent, args)
    before_backward = watch.before_backward
    agent = state.agent
    shared = [*agent.slot_encoder.parameters(), *agent.encoder.parameters()]
    shared += list(agent.lstm.parameters())

    def watched(policy: Tensor, value: Tensor, entropy: Tensor) -> None:
        for name, loss in (("policy", policy), ("value", value), ("entropy", entropy)):
            parts = torch.autograd.grad(loss, shared, retain_graph=True)
            seen[name] = torch.cat([part.flatten() for part in parts]).double()
        whole = policy + value + entropy
        weights = list(agent.parameters())
        seen["all"] = torch.autograd.grad(whole, weights, retain_graph=True, materialize_grads=True)
        before_backward(policy, value, entropy)

    watch.before_backward = watched  # type: ignore[method-assign]
    metrics, problems = ppo_lstm.update(state, rollout, args, watch)
    assert problems == []
    for name in ("policy", "value", "entropy"):
        norm = float(seen[name].norm())
        assert metrics[f"gradients/{name}_norm"] == pytest.approx(norm, abs=1e-6)
    for first, second in (("policy", "value"), ("policy", "entropy"), ("value", "entropy")):
        cosine = torch.nn.functional.cosine_similarity(seen[first], seen[second], dim=0)
        actual = metrics[f"gradients/{first}_{second}_cosine"]
        assert actual == pytest.approx(float(cosine), abs=1e-5)
    names = [name for name, _ in agent.named_parameters()]
    by_name = dict(zip(names, seen["all"], strict=True))
    total = math.sqrt(sum(float(g.double().square().sum()) for g in seen["all"]))
    assert metrics["losses/gradient_norm"] == pytest.approx(total, rel=1e-6)
    clipped = min(total, args.max_grad_norm)
    assert metrics["gradients/clipped_norm"] == pytest.approx(clipped, rel=1e-6)
    assert metrics["gradients/clipped"] == float(total > args.max_grad_norm)
    core = math.sqrt(sum(float(g.norm()) ** 2 for n, g in by_name.items() if "lstm" in n))
    assert metrics["gradients/norm/core"] == pytest.approx(core, rel=1e-5)
    width, head = agent.width, list(agent.heads).index("blueprint") - 2
    rows = slice(head * width, (head + 1) * width)
    parts = [by_name[f"rest_head.{n}"][rows].norm() for n in ("weight", "bias")]
    norm = math.hypot(*map(float, parts))
    assert metrics["gradients/norm/blueprint"] == pytest.approx(norm, rel=1e-5)
    for name in ("encoder.weight", "rest_head.bias"):
        for figure, value in zip(
            gradients.TENSOR_FIGURES, gradients.tensor_figures(by_name[name], 0.5), strict=True
        ):
            assert metrics[f"tensor/{figure}/{name}"] == pytest.approx(float(value), abs=1e-6)
    parts = [g.flatten() for g in seen["all"]]
    joined = torch.cat(parts)
    assert metrics["gradients/negative"] == pytest.approx(float((joined < 0).float().mean()))
    assert metrics["gradients/sparsity"] == pytest.approx(float((joined == 0).float().mean()))


def test_worst_transitions_are_those_of_the_most_extreme_ratios(envs: EsperVectorEnv) -> None:
    """Findings GRD-I2, SYN-G1: with the action, both log-probabilities and the gradient norm."""
    args = small_args(telemetry="debug", learning_rate=0.05, max_grad_norm=10.0)
    state = make_train_state(args, envs)
    rollout = collect_rollout(state, envs, args)
    with torch.no_grad():
        old = evaluate_rollout(state.agent, rollout, torch.arange(4))[0]
    watch = state.telemetry.watch_update(state.agent, args)
    metrics, _ = ppo_lstm.update(state, rollout, args, watch)
    extremity = [abs(math.log(row["ratio"])) for row in watch.worst]
    assert extremity == sorted(extremity, reverse=True)
    ratios = [row["ratio"] for row in watch.worst]
    assert any(r == pytest.approx(metrics[f"ratio/{n}"]) for r in ratios for n in ("min", "max"))
    heads = list(state.agent.heads)
    for row in watch.worst:
        at, member = row["at"], row["member"]
        assert list(row["action"].values()) == rollout.actions[at, member].tolist()
        known = [row["old_logprob"][h] for h in heads]
        assert known == pytest.approx(old[at, member].tolist(), abs=1e-6)
        total = sum(row["new_logprob"].values()) - sum(known)
        assert math.exp(total) == pytest.approx(row["ratio"], rel=1e-4)
        assert re.fullmatch(r"[0-9a-f]{12}", row["observation"])


class Reads(TorchDispatchMode):
    """Counts the reads of single numbers, each of which waits for a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("level", ["off", "normal", "debug"])
def test_an_update_copies_its_figures_once(level: str, envs: EsperVectorEnv) -> None:
    """Findings SYN-M14, SYN-G3: besides what the update itself reads, one copy to the host."""
    args = small_args(telemetry=level)
    state = make_train_state(args, envs)
    rollout = collect_rollout(state, envs, args)
    watch = state.telemetry.watch_update(state.agent, args)
    copies: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        to_list = Tensor.tolist
        patch.setattr(Tensor, "tolist", lambda t: copies.append(t.shape) or to_list(t))
        with Reads() as reads:
            ppo_lstm.update(state, rollout, args, watch)
    # The update asks before each LSTM call whether an episode ends within the rollout: once for all
    # sequences, and for each of the minibatches. Level normal has one call more.
    own = 1 + args.num_minibatches * args.update_epochs
    calls = {"off": own, "normal": own + 1, "debug": own + 1}[level]
    longest = 2 * calls  # Where one ends, the longest piece is read as well.
    assert reads.count <= longest + 1  # And the share of variance that the group baseline leaves.
    assert len(copies) == 1


# ------------------------------------------------------------------ activations by hand


def test_figures_of_the_core_are_those_of_torchs_lstm() -> None:
    """Findings TEL-3, TEL-18: states from `nn.LSTM`, gates by hand."""
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(3, 4)
    with torch.no_grad():
        lstm.bias_ih_l0[4:6] = 20.0  # Two forget gates are open for good.
    x, state = torch.randn(5, 3), (torch.randn(1, 5, 4), torch.randn(1, 5, 4))
    with torch.no_grad():
        _, (h, c) = lstm(x[None], state)
        figures = core_figures(lstm, x, state).tolist()
    expected = [h.square().mean().sqrt(), h.abs().max(), c.square().mean().sqrt(), c.abs().max()]
    assert figures[:4] == pytest.approx([float(e) for e in expected], rel=1e-5)
    assert figures[4] == pytest.approx(2 / 12)
    assert figures[5] == 0.0
    state[0][0, 0, 0] = torch.nan
    with torch.no_grad():
        assert core_figures(lstm, x, state)[5] > 0


def test_dormant_units_and_effective_rank_by_hand() -> None:
    """Layer means are 1 and 0: 1 of 4 units is at most 0.025, and a silent layer is dormant."""
    active = torch.tensor([[2.0, 1.99, 0.01, 0.0], [2.0, 1.99, 0.01, 0.0]])
    assert float(dormant_share({"a": active})) == pytest.approx(2 / 4)
    assert float(dormant_share({"a": active, "b": torch.zeros(2, 4)})) == pytest.approx(6 / 8)
    # Singular values 99.5 and 0.5: one makes up 99 % of the sum. 98 and 2: two are needed.
    for values, rank in (((99.5, 0.5), 1), ((98.0, 2.0), 2)):
        features = torch.diag(torch.tensor([*values, 0.0]))
        assert float(effective_rank(features)) == pytest.approx(rank / 3)


def test_moving_averages_are_bias_corrected_and_drift_waits() -> None:
    """Findings TEL-16, SYN-M23, SYN-G2: the average of a constant is the constant at once."""
    trends = Trends()
    for count in range(12):
        result = trends.update("x", 3.0)
        assert result["trend/x"] == pytest.approx(3.0)
        assert ("drift/x" in result) == (count >= 10)
    assert trends.update("x", 6.0)["drift/x"] == pytest.approx(1.0)
    plain = Trends()
    for x in (1.0, 2.0, 4.0):
        last = plain.update("y", x)["trend/y"]
    weights = np.array([0.9**2, 0.9, 1.0])
    assert last == pytest.approx((weights * [1, 2, 4]).sum() / weights.sum())


# ------------------------------------------------------------------ environment


def test_figures_and_events_of_the_environment_are_those_of_its_infos(
    envs: EsperVectorEnv,
) -> None:
    """Counts over a recorded rollout that ends in the middle of episodes, by brute force."""
    obs, info = envs.reset(seed=5)
    watch = EnvironmentWatch(envs, info, lambda instances, _: [0.05] * len(instances))
    policy = RandomLegal()
    policy.begin(envs, 3)
    steps = envs.config.episode_steps
    stages, all_obs, ops, scores = [info["stage"]], [], [], []
    germinated, rewards_of = 0, {"gain": 0.0}
    for _ in range(2 * steps + 3):
        all_obs.append(obs)
        obs, rewards, terminated, truncated, info = envs.step(policy.act(obs, info))
        done = terminated | truncated
        watch.add("normal", rewards, done, info)
        last = info["final_info"] if done.any() else info
        germinated += int(((stages[-1] == Stage.DORMANT) & (last["stage"] > 0)).sum())
        ops.extend(last["op"].tolist())
        rewards_of["gain"] += float(last["reward_terms"]["gain"].sum())
        if done.any():
            scores.extend(last["committed_score"].tolist())
        stages.append(info["stage"])
    metrics, events = watch.finish("normal", 77, np.stack(all_obs))
    episodes = len(ops) / steps
    assert {event.step for event in events} == {77}
    ended = [event for event in events if isinstance(event, EpisodeEnded)]
    assert [event.score for event in ended] == pytest.approx(scores)
    assert {event.length for event in ended} == {steps}
    assert [event.episode for event in ended] == [0] * 4 + [1] * 4
    assert metrics["env/score_gain"] == pytest.approx(np.mean(scores) - 0.05)
    assert metrics["env/score_p50"] == pytest.approx(np.median(scores))
    assert sum(isinstance(event, Germinated) for event in events) == germinated > 0
    for name in envs.heads[0].options:
        share = ops.count(Op[name].value) / len(ops)
        assert metrics[f"env/op/{name}"] == pytest.approx(share)
    slots = [metrics[f"env/germinated_slot/{s}"] for s in range(2)]
    assert sum(slots) == pytest.approx(germinated / episodes)
    assert metrics["env/reward/gain"] == pytest.approx(rewards_of["gain"] / episodes)
    assert sum(metrics[f"env/stage/{stage.name}"] for stage in Stage) == pytest.approx(1.0)
    for event in events:
        if isinstance(event, Growth):
            assert event.stage_before != event.stage
            assert 0 <= event.at < steps


def test_never_grow_scores_are_those_of_its_episodes() -> None:
    """One episode per instance, whatever was asked for before."""
    config = tiny_config(instances="train")

    def ask(scores: NeverGrowScores, *instances: int) -> list[float | None]:
        return scores(np.array(instances), np.zeros(len(instances), dtype=np.int64))

    scores = NeverGrowScores(ID, "cpu", config, 100)
    together = ask(scores, 7, 3, 7, 99)
    assert together[0] == together[2]
    assert ask(NeverGrowScores(ID, "cpu", config, 100), 99)[0] == together[3]
    assert together[1] == never_grows(ID, config, 2_000_000 + 3, 3)["committed_score"][0]
    restored = NeverGrowScores(ID, "cpu", config, 100)
    restored.set_state(scores.get_state())
    assert restored.scores == scores.scores


def test_never_grow_scores_are_of_the_same_kind_of_problem() -> None:
    """That of the first episode that ends in the kind; none if there is no such episode."""
    env_id = "Esper-Digits-Sizing-v0"
    own = settings_of(env_id, TRAINING)
    short = {"episode_steps": 3, "batches_per_step": 1, "batch_size": 4, "instances": "train"}
    config = dataclasses.replace(own, **short)
    scores = NeverGrowScores(env_id, "cpu", config, 100)
    instance, kinds = np.array([5, 5, 8, 8, 5]), np.array([0, 1, 0, 1, 2])
    found = scores(instance, kinds)
    assert found[4] is None
    for k, kind, score in zip(instance[:4].tolist(), kinds[:4].tolist(), found[:4], strict=True):
        for seed in range(2_000_000 + k, 2_010_000, 100):
            info = never_grows(env_id, config, seed, k)
            if info["regime"][0] == kind:
                break
        assert score == info["committed_score"][0]
    restored = NeverGrowScores(env_id, "cpu", config, 100)
    restored.set_state(scores.get_state())
    assert restored(instance, kinds) == found


def never_grows(env_id: str, config: EnvConfig, seed: int, instance: int) -> dict[str, Any]:
    """Return the info at the end of one episode of never-grow."""
    envs = make_envs(env_id, 1, "cpu", config)
    policy = NeverGrow()
    obs, info = envs.reset(seed=seed, options={"instance": np.array([instance])})
    policy.begin(envs, 0)
    done = np.zeros(1, dtype=bool)
    while not done.any():
        obs, _, terminated, truncated, info = envs.step(policy.act(obs, info))
        done = terminated | truncated
    final: dict[str, Any] = info["final_info"]
    return final


# ------------------------------------------------------------------ alerts


def test_an_alert_is_raised_once_and_again_when_it_becomes_critical() -> None:
    alerts = Alerts(Thresholds(), 0.5, {})
    base = kl_row(0.0)
    seen = []
    for k, value in enumerate([0.2, 0.2, 0.6, 0.6, 0.0]):
        seen.append(
            [
                e.to_row()["kind"]
                for e in alerts.evaluate(k, base | {"losses/approx_kl": value}, 0.0)
            ]
        )
    assert seen == [["alert_raised"], [], ["alert_raised"], [], ["alert_cleared"]]


def kl_row(kl: float) -> dict[str, float]:
    """Metrics of an update at which no detector finds anything but maybe the KL."""
    zero = ("ratio/extreme", "plasticity/dormant", "env/main_op", "env/flag/churn")
    row = dict.fromkeys(zero, 0.0) | {"ratio/max": 1.0, "ratio/min": 1.0}
    row |= {"losses/explained_variance": 1.0, "critic/is_valid": 1.0}
    row |= {"plasticity/effective_rank": 1.0, "losses/approx_kl": kl}
    return row


# ------------------------------------------------------------------ writers, display, profile


def test_alerts_are_in_tensorboard(runs: dict[str, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs["normal"]), size_guidance={"tensors": 0})
    events.Reload()
    assert "alerts/kl" in events.Tags()["tensors"]
    text = events.Tensors("alerts/kl")[0].tensor_proto.string_val[0].decode()
    assert text.startswith(("warning: ", "critical: "))


def test_a_run_is_tracked_offline_by_the_real_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights & Biases writes its own files into the run directory."""
    pytest.importorskip("wandb", reason="needs the extra track")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    args = small_args(run_dir=tmp_path / "run", track=True, total_timesteps=64, quiet=True)
    train(args)
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_tracking_without_the_package_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r'track: expected the package wandb.*"esper-env\[track'):
        train(small_args(run_dir=tmp_path / "run", track=True, quiet=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("has_stacks", [False, True])
def test_a_profile_is_in_the_run_directory(has_stacks: bool, tmp_path: Path) -> None:
    """Findings SYN-M15, SYN-M16, TEL-19: Python stacks only if asked for."""
    flags = {"profile": 1, "profile_stacks": has_stacks, "profile_shapes": has_stacks}
    train(small_args(run_dir=tmp_path / "run", total_timesteps=96, quiet=True, **flags))
    text = (tmp_path / "run" / "profile" / "trace.json").read_text()
    names = {event.get("name", "") for event in json.loads(text)["traceEvents"]}
    assert any("aten::lstm" in name for name in names)
    assert any("ppo_lstm.py" in name for name in names) == has_stacks
    assert ("Input Dims" in text) == has_stacks


class Terminal(io.StringIO):
    """Stream that looks like a terminal."""

    def isatty(self) -> bool:
        return True


def show_some(out: io.StringIO, monkeypatch: pytest.MonkeyPatch, is_quiet: bool = False) -> str:
    """Show two iterations with an alert that is raised and cleared; return the output."""
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("TERM", "xterm")
    raised = AlertRaised(
        step=10, name="kl", severity="warning", value=0.2, threshold=0.1, meaning="too much",
        metrics=("losses/approx_kl",),
    )  # fmt: skip
    metrics = {"env/score_gain": 0.25, "charts/SPS": 500.0, "env/op/WAIT": 0.5}
    with Display(100, is_quiet) as shown:
        shown.show(10, metrics, [raised], 0.3)
        shown.show(20, metrics, [AlertCleared(step=20, name="kl", raised_at=10)], 0.6)
        shown.show(21, metrics, [], 0.63)
        shown.show(22, metrics, [], 1.1)
        shown.show(23, metrics, [], 1.15)
    return out.getvalue()


def test_plain_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    output = show_some(io.StringIO(), monkeypatch)
    lines = output.splitlines()
    assert lines[0] == "step 10  warning: kl 0.2 (threshold 0.1): too much"
    assert lines[1] == "step 10  score - never-grow +0.250  env steps/s 500  2.7 min left"
    assert lines[2] == "step 20  cleared: kl"
    assert [line.split("500  ")[1] for line in lines[3:]] == [
        "2.4 min left",
        "3.9 min left of about 5 min",
    ], "a line per part of the training, and one after the first minute"
    assert "\x1b" not in output
    assert show_some(io.StringIO(), monkeypatch, is_quiet=True) == ""


def test_a_live_display_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    output = show_some(Terminal(), monkeypatch)
    assert "\x1b[" in output
    assert "score - never-grow" in output
    assert "kl (warning)" in output
    assert output.count("too much") == 1, "an alert is printed once"


def test_two_displays_never_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation within a training shows no bar of its own."""
    monkeypatch.setattr(sys, "stdout", Terminal())
    error = Terminal()
    monkeypatch.setattr(sys, "stderr", error)
    monkeypatch.setenv("TERM", "xterm")
    with Display(100, is_quiet=False):
        assert list(progress([1, 2], "episodes")) == [1, 2]
        assert error.getvalue() == ""
    assert list(progress([1, 2], "episodes")) == [1, 2]
    assert "episodes" in error.getvalue()


def test_unusual_arguments_are_named_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finding TRN-5: valid, and yet the user should know."""
    train(small_args(run_dir=tmp_path / "run", total_timesteps=32, ent_coef=0.5, clip_coef=0.9))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("clip_coef 0.9 is unusual (usual: 0.05 to 0.4): ")
    assert lines[1].startswith("ent_coef 0.5 is unusual")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_reports_its_memory_and_needs_one_copy() -> None:
    """Reading a number waits for the device; `set_sync_debug_mode` counts that."""
    args = small_args(device="cuda")
    envs = make_envs(ID, 4, "cuda", CONFIG)
    state = make_train_state(args, envs)
    metrics = run_iteration(state, envs, args)
    names = {metric.name for metric in METRICS if NO_DEVICE.match(metric.name)}
    assert names <= set(metrics)
    assert all(metrics[name] > 0 for name in names)
    envs.close()
