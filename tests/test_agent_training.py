"""The training loop on a real but tiny environment: rollouts, updates, checkpoints and runs.

Formulas are in `test_agent_maths.py`. Four hosts with one batch of 8 images per env step and
episodes of 6 steps; nothing here says whether the agent learns.
"""

from __future__ import annotations

import contextlib
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

from esper_agent import ppo_lstm
from esper_agent.ppo_lstm import (
    Agent,
    Args,
    Collector,
    Rollout,
    check_gamma,
    compute_gae,
    load_agent,
    make_envs,
    make_optimizer,
    pad_masks,
    prepare_run_directory,
    replay,
    save_agent,
    train,
    update,
)
from esper_env import EnvConfig, EsperVectorEnv, Op

TINY = EnvConfig(batches_per_step=1, batch_size=8, episode_steps=6, gamma=0.99)
ENV_ID = "Esper-Digits-v0"
NUM_ENVS = 4
REPLAY = 1e-5
"""Tolerance of log-probabilities and values that one LSTM call per sequence and one per step
compute in float32: additions in another order over some hundred terms near 1."""


def tiny_args(**changes: Any) -> Args:
    """Arguments of a run of 2 updates of 6 env steps of 4 members."""
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


def group_seeds(args: Args) -> list[int | None]:
    """Reset seeds with which the collector starts."""
    return [args.seed + i // args.group_size for i in range(args.num_envs)]


def make_agent(envs: EsperVectorEnv, rng_seed: int = 0) -> Agent:
    """A small agent whose heads are far from uniform (their initial gain is 0.01)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng_seed)
        agent = Agent(envs.observation_names, tuple(len(h.options) for h in envs.heads), 16)
    with torch.no_grad():
        for head in (agent.op_head, agent.slot_head, agent.rest_head):
            head.weight.mul_(100.0)
    return agent


@pytest.fixture(name="envs")
def make_tiny_envs() -> Iterator[EsperVectorEnv]:
    """Four tiny members."""
    envs = make_envs(ENV_ID, NUM_ENVS, "cpu", TINY)
    yield envs
    envs.close()


@dataclass
class Recorded:
    """A rollout and what was seen while it was made. Tensors are (steps, envs, ...)."""

    agent: Agent
    args: Args
    rollout: Rollout
    log_probs: Tensor
    """Of the actions, computed when they were chosen."""
    values: Tensor
    """Of the observations, likewise."""
    final_observations: dict[int, np.ndarray]
    """By step, where episodes ended: (envs, features)."""
    last_observation: np.ndarray
    """What the last step led to, before any reset."""
    scale: float
    valid: list[float]


def record(envs: EsperVectorEnv, args: Args, num_rollouts: int) -> Recorded:
    """Collect rollouts, watching `Agent.act` and `step`, and return the last one."""
    agent = make_agent(envs)
    collector = Collector(envs, agent, args)
    log_probs: list[Tensor] = []
    values: list[Tensor] = []
    finals: list[np.ndarray | None] = []
    last: list[np.ndarray] = []
    act, step = agent.act, envs.step

    def watched_act(*arguments: Any) -> Any:
        actions, masks = act(*arguments)
        log_probs.append(agent.evaluate_actions(*arguments[:2], actions, masks)[0])
        values.append(agent.value(arguments[0]))
        return actions, masks

    def watched_step(actions: np.ndarray) -> Any:
        result = step(actions)
        rows = result[4].get("final_obs")
        finals.append(None if rows is None else np.stack(list(rows)))
        last.append(result[0] if rows is None else finals[-1])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent, "act", watched_act)
        patch.setattr(envs, "step", watched_step)
        for _ in range(num_rollouts):
            log_probs.clear(), values.clear(), finals.clear()
            rollout, episodes = collector.collect()
    return Recorded(
        agent,
        args,
        rollout,
        torch.stack(log_probs),
        torch.stack(values),
        {t: rows for t, rows in enumerate(finals) if rows is not None},
        last[-1],
        collector.scale.std,
        episodes["valid"],
    )


@pytest.fixture(name="recorded", scope="module")
def record_second_rollout() -> Iterator[Recorded]:
    """The second rollout of 8 steps over episodes of 6.

    It starts at step 2 of an episode with a state that is not zero; episodes end with its step 3,
    so its step 4 is a start.
    """
    envs = make_envs(ENV_ID, NUM_ENVS, "cpu", TINY)
    yield record(envs, tiny_args(num_steps=8), num_rollouts=2)
    envs.close()


def update_once(
    recorded: Recorded, ent_coef: float = 0.01, **changes: Any
) -> tuple[dict[str, float], int]:
    """Update a copy of the agent; return metrics and the number of optimiser steps."""
    envs = make_envs(ENV_ID, NUM_ENVS, "cpu", TINY)
    agent = make_agent(envs)
    agent.load_state_dict(recorded.agent.state_dict())
    optimizer = make_optimizer(agent, tiny_args())
    num_gradient_steps = 0
    step = optimizer.step

    def counted_step(*arguments: Any) -> Any:
        nonlocal num_gradient_steps
        num_gradient_steps += 1
        return step(*arguments)

    optimizer.step = counted_step  # type: ignore[method-assign]
    metrics = update(
        agent,
        optimizer,
        recorded.rollout,
        recorded.scale,
        tiny_args(num_steps=8, **changes),
        torch.Generator().manual_seed(0),
        [head.name for head in envs.heads],
        ent_coef,
    )
    return metrics, num_gradient_steps


# ------------------------------------------------------------------------------ rollout


def test_an_agent_without_memory_acts_on_the_present_observation_alone() -> None:
    """Whatever the state, step by step and in whole sequences; one with memory does not."""
    generator = torch.Generator().manual_seed(0)
    for recurrent in (False, True):
        agent = Agent(("a", "slot_0.b"), (2, 1, 2), 8, recurrent)
        observations = torch.randn(5, 3, 2, generator=generator)
        state = torch.randn(1, 3, 8, generator=generator), torch.randn(1, 3, 8, generator=generator)
        starts = torch.zeros(5, 3, dtype=torch.bool)
        with torch.no_grad():
            whole, _ = agent.sequence_core(observations, state, starts)
            alone, *_ = agent.step_core(observations[4], agent.initial_state(3), starts[4])
            later, *_ = agent.step_core(observations[4], state, starts[4])
        assert torch.allclose(whole[4], alone, atol=REPLAY) is not recurrent
        assert torch.equal(later, alone) is not recurrent


def test_the_recorded_rollout_has_what_the_tests_below_need(recorded: Recorded) -> None:
    """An episode end inside, a state carried over, and ops whose heads have a choice."""
    rollout = recorded.rollout
    assert rollout.truncations.any(dim=1).tolist() == [False] * 3 + [True] + [False] * 4
    assert rollout.starts.any(dim=1).tolist() == [False] * 4 + [True] + [False] * 3
    assert (rollout.state[0] != 0).any()
    assert (rollout.state[1] != 0).any()
    assert len(rollout.actions[..., 0].unique()) >= 3
    assert (recorded.log_probs[..., 2:] < 0).any()


def test_replay_at_unchanged_weights_equals_what_was_acted_on(recorded: Recorded) -> None:
    """Findings SYN-C4, LOOP-2: log-probabilities and values, per step, member and head."""
    with torch.no_grad():
        log_probs, _, _, values = replay(recorded.agent, recorded.rollout, torch.arange(NUM_ENVS))
    torch.testing.assert_close(log_probs, recorded.log_probs, rtol=0, atol=REPLAY)
    torch.testing.assert_close(values, recorded.values, rtol=0, atol=REPLAY)


def test_replay_of_some_members_equals_their_part_of_the_replay_of_all(
    recorded: Recorded,
) -> None:
    """A minibatch sees the same sequences, in its own order."""
    envs = torch.tensor([3, 1])
    with torch.no_grad():
        everyone = replay(recorded.agent, recorded.rollout, torch.arange(NUM_ENVS))
        some = replay(recorded.agent, recorded.rollout, envs)
    for all_members, part in zip(everyone, some, strict=True):
        torch.testing.assert_close(part, all_members[:, envs], rtol=0, atol=REPLAY)


def test_the_agent_chooses_only_legal_actions(recorded: Recorded) -> None:
    """The environment accepted every action of the rollout."""
    assert len(recorded.valid) == 8 * NUM_ENVS
    assert all(recorded.valid)


def test_the_bootstrap_value_is_that_of_the_observation_before_the_reset(
    recorded: Recorded,
) -> None:
    """Findings SYN-H4, LOOP-3.

    The LSTM is run step by step up to the truncation (step 3) and once more on the final
    observation, without a reset; likewise at the end of the rollout (step 7).
    """
    agent, rollout = recorded.agent, recorded.rollout
    assert list(recorded.final_observations) == [3]
    reached = {3: recorded.final_observations[3], 7: recorded.last_observation}
    no_start = torch.zeros(NUM_ENVS, dtype=torch.bool)
    state = rollout.state
    with torch.no_grad():
        for t in range(8):
            _, _, state = agent.step_core(rollout.observations[t], state, rollout.starts[t])
            if t in reached:
                core, _, _ = agent.step_core(torch.from_numpy(reached[t]), state, no_start)
                torch.testing.assert_close(
                    rollout.next_values[t], agent.value(core), rtol=0, atol=REPLAY
                )
    # The observation after the reset is another one, and so is its value.
    assert (rollout.next_values[3] - recorded.values[4]).abs().min() > 100 * REPLAY


def test_masks_after_a_germination_differ_from_those_that_were_acted_on(
    envs: EsperVectorEnv,
) -> None:
    """Finding SYN-H4: a value or mask from before the action would describe another state."""
    envs.reset(seed=0)
    before = envs.conditional_masks()
    actions = np.zeros((NUM_ENVS, len(envs.heads)), dtype=np.int64)
    actions[:, 0] = Op.GERMINATE
    envs.step(actions)
    after = envs.conditional_masks()
    assert before["slot"][:, Op.GERMINATE, 0].all()
    assert not after["slot"][:, Op.GERMINATE, 0].any()


def test_the_rollout_keeps_the_observations_and_rewards_of_the_environment(
    envs: EsperVectorEnv,
) -> None:
    """Finding LOOP-2: replaying its actions in a fresh environment gives the same, bit by bit."""
    args = tiny_args(num_steps=8)
    rollout = record(envs, args, num_rollouts=1).rollout
    observation, _ = envs.reset(seed=group_seeds(args))
    for t in range(8):
        assert np.array_equal(rollout.observations[t].numpy(), observation)
        observation, rewards, _, truncations, _ = envs.step(rollout.actions[t].numpy())
        assert np.array_equal(rollout.rewards[t].numpy(), rewards)
        assert np.array_equal(rollout.truncations[t].numpy(), truncations)


def test_members_of_a_group_live_the_same_life_until_their_actions_differ(
    envs: EsperVectorEnv,
) -> None:
    """Pairs share the host at birth; another pair has another one."""
    rollout = record(envs, tiny_args(num_steps=2), num_rollouts=1).rollout
    first = rollout.observations[0]
    assert torch.equal(first[0], first[1])
    assert torch.equal(first[2], first[3])
    assert not torch.equal(first[0], first[2])


def test_episode_figures_are_those_of_the_episodes_that_ended(envs: EsperVectorEnv) -> None:
    """The return with preset "gain" is the committed score at the end minus that at the start.

    Two episodes per member end in 12 steps. Tolerance 1e-9: sums of 6 float64 rewards.
    """
    args = tiny_args(num_steps=12, total_timesteps=48)
    _, info = envs.reset(seed=group_seeds(args))
    first_scores = info["score"]
    collector = Collector(envs, make_agent(envs), args)
    rollout, episodes = collector.collect()
    assert len(episodes["return"]) == len(episodes["score"]) == 2 * NUM_ENVS
    returns = torch.cat([rollout.rewards[:6].sum(dim=0), rollout.rewards[6:].sum(dim=0)]).tolist()
    assert episodes["return"] == pytest.approx(returns, abs=1e-9)
    expected = np.array(episodes["score"][:NUM_ENVS]) - first_scores
    assert returns[:NUM_ENVS] == pytest.approx(expected.tolist(), abs=1e-9)


# ------------------------------------------------------------------------------ update


def test_advantages_bootstrap_from_the_right_values(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Findings SYN-C4, SYN-H4, LOOP-3: what `update` passes to `compute_gae`.

    Values come from the training path. The value of what a step led to is that of the next
    observation, except at the truncation (step 3) and at the end (step 7), where the rollout has
    it. Rewards are divided by the scale; tolerance 1e-6: float32.
    """
    seen: list[Tensor] = []

    def watched(*arguments: Any) -> Tensor:
        seen.extend(arguments)
        return compute_gae(*arguments)

    monkeypatch.setattr(ppo_lstm, "compute_gae", watched)
    update_once(recorded, update_epochs=1)
    rollout = recorded.rollout
    with torch.no_grad():
        values = replay(recorded.agent, rollout, torch.arange(NUM_ENVS))[3]
    expected = torch.cat([values[1:], rollout.next_values[7:]])
    expected[3] = rollout.next_values[3]
    assert torch.equal(seen[1], values)
    assert torch.equal(seen[2], expected)
    scaled = (rollout.rewards / recorded.scale).float()
    torch.testing.assert_close(seen[0], scaled, rtol=1e-6, atol=0)
    assert torch.equal(seen[3], rollout.terminations)
    assert torch.equal(seen[4], rollout.truncations)
    assert seen[5:] == [0.99, 0.95]


@pytest.mark.parametrize("ratio", ["joint", "per-head"])
def test_the_ratio_of_the_first_minibatch_is_one(recorded: Recorded, ratio: str) -> None:
    """Findings SYN-C5, LOOP-2. With one minibatch of one epoch KL and clipping are 0 as well."""
    metrics, _ = update_once(recorded, update_epochs=1, num_minibatches=1, ratio=ratio)
    assert metrics["losses/first_ratio_error"] < REPLAY
    assert metrics["losses/clip_fraction"] == 0.0
    assert abs(metrics["losses/kl"]) < REPLAY


def test_later_minibatches_have_ratios_that_differ_from_one(recorded: Recorded) -> None:
    """So that the test above is not about a ratio that is 1 whatever happens."""
    metrics, _ = update_once(recorded, update_epochs=4, num_minibatches=1)
    assert metrics["losses/first_ratio_error"] < REPLAY
    assert metrics["losses/kl"] > 10 * REPLAY


def test_minibatches_are_whole_sequences_shuffled_each_epoch(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Findings SYN-C3, SYN-H5: each epoch replays every member once, all steps, in a new order."""
    calls: list[list[int]] = []
    shapes: set[tuple[int, ...]] = set()

    def watched(agent: Agent, rollout: Rollout, envs: Tensor) -> Any:
        result = replay(agent, rollout, envs)
        calls.append(envs.tolist())
        shapes.add((len(result[0]), result[0].shape[1] // len(envs)))
        return result

    monkeypatch.setattr(ppo_lstm, "replay", watched)
    update_once(recorded, update_epochs=6, num_minibatches=2)
    assert calls[0] == list(range(NUM_ENVS)), "old log-probabilities of all, first"
    assert shapes == {(8, 1)}
    minibatches = calls[1:]
    assert [len(envs) for envs in minibatches] == [2] * 12
    epochs = [tuple(a + b) for a, b in zip(minibatches[::2], minibatches[1::2], strict=True)]
    assert all(sorted(epoch) == list(range(NUM_ENVS)) for epoch in epochs)
    assert len(set(epochs)) > 1


def test_a_rollout_gives_several_gradient_steps(recorded: Recorded) -> None:
    """Finding PRE-15: epochs times minibatches, several by default."""
    assert update_once(recorded, update_epochs=3, num_minibatches=4)[1] == 12
    assert Args().update_epochs * Args().num_minibatches >= 8


def test_an_update_stops_at_the_target_kl(recorded: Recorded) -> None:
    """The first minibatch has KL 0 up to rounding, so one step is taken; the next one stops."""
    settings = {"update_epochs": 4, "num_minibatches": 1}
    assert update_once(recorded, **settings, target_kl=REPLAY)[1] == 1
    assert update_once(recorded, **settings)[1] == 4


def test_heads_that_never_had_a_choice_report_entropy_zero_and_finite_metrics() -> None:
    """Findings SYN-H3, SYN-H6: with WAIT as the only op no head has a choice.

    The critic still learns, which moves the core, and yet log-probabilities stay 0.
    """
    config = dataclasses.replace(TINY, heads={"op": "WAIT"})
    envs = make_envs(ENV_ID, NUM_ENVS, "cpu", config)
    args = tiny_args(env=config)
    agent = make_agent(envs)
    collector = Collector(envs, agent, args)
    rollout, _ = collector.collect()
    weight = agent.encoder[0].weight.detach().clone()
    metrics = update(
        agent,
        torch.optim.Adam(agent.parameters(), lr=1e-2),
        rollout,
        collector.scale.std,
        args,
        torch.Generator().manual_seed(0),
        [head.name for head in envs.heads],
        ent_coef=0.01,
    )
    envs.close()
    assert (agent.encoder[0].weight != weight).any()
    assert all(np.isfinite(value) for value in metrics.values())
    for head in envs.heads:
        assert metrics[f"entropy/{head.name}"] == metrics[f"choice/{head.name}"] == 0.0
    assert metrics["losses/kl"] == 0.0


def test_probability_of_an_op_falls_to_zero_in_the_real_action_space(recorded: Recorded) -> None:
    """Finding PRE-11: no floor. In float32, e^-200 is 0, and the op is no longer drawn."""
    envs = make_envs(ENV_ID, NUM_ENVS, "cpu", TINY)
    agent = make_agent(envs)
    observation, _ = envs.reset(seed=0)
    with torch.no_grad():
        agent.op_head.weight.zero_()
        agent.op_head.bias[Op.GERMINATE] = -200.0
        core, slots, _ = agent.step_core(
            torch.from_numpy(observation),
            agent.initial_state(NUM_ENVS),
            torch.ones(NUM_ENVS, dtype=torch.bool),
        )
        masks = pad_masks(envs.conditional_masks(), torch.device("cpu"))
        assert masks[:, 0, 0, 0, Op.GERMINATE].all()
        generator = torch.Generator().manual_seed(0)
        drawn, along = agent.act(core, slots, masks, generator)
        actions = drawn.clone()
        actions[:, 0] = Op.GERMINATE
        log_prob = agent.evaluate_actions(core, slots, actions, along)[0][:, 0]
    envs.close()
    assert (drawn[:, 0] == Op.WAIT).all()
    assert (log_prob < -190).all()
    assert (log_prob.exp() == 0).all()


# ------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_envs": 0}, "num_envs: expected at least 1, got 0"),
        ({"num_steps": 0}, "num_steps: expected at least 1, got 0"),
        ({"update_epochs": 0}, "update_epochs: expected at least 1, got 0"),
        ({"hidden_size": -1}, "hidden_size: expected at least 1, got -1"),
        ({"num_minibatches": 0}, "num_minibatches: expected at least 1, got 0"),
        ({"num_minibatches": 3}, "num_minibatches: expected a divisor of num_envs=4"),
        ({"total_timesteps": 23}, "total_timesteps: expected at least num_envs"),
    ],
)
def test_arguments_out_of_range_raise(changes: dict[str, Any], message: str) -> None:
    """The message names the argument, what was expected and what came."""
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_args(**changes)


@pytest.mark.parametrize(("name", "value"), [("eval_episodes", -1), ("target_kl", -0.1)])
def test_arguments_that_would_fail_during_the_run_raise_at_once(name: str, value: float) -> None:
    """Else -1 episodes fail after the training, and a target KL below 0 in the first update."""
    with pytest.raises(ValueError, match=name):
        tiny_args(**{name: value})


def test_a_discount_factor_other_than_the_environments_is_refused(envs: EsperVectorEnv) -> None:
    """Finding SYN-C1: the message names both values and the remedy."""
    check_gamma(0.99, envs)
    with pytest.raises(ValueError, match=r"gamma: the agent has 0\.98, the environment 0\.99"):
        check_gamma(0.98, envs)


def test_training_with_different_discount_factors_raises_before_anything_is_written(
    tmp_path: Path,
) -> None:
    """Finding SYN-C1: no run directory is left behind."""
    with pytest.raises(ValueError, match="gamma"):
        train(tiny_args(gamma=0.9, run_dir=tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_with_a_run_is_refused(tmp_path: Path) -> None:
    """Its configuration is left as it was."""
    args = tiny_args(run_dir=tmp_path / "run")
    assert prepare_run_directory(args) == tmp_path / "run"
    before = (tmp_path / "run" / "config.json").read_text()
    assert json.loads(before)["env"]["batch_size"] == 8
    with pytest.raises(FileExistsError, match=r"--run-dir .*holds a run already"):
        prepare_run_directory(tiny_args(run_dir=tmp_path / "run", seed=2))
    assert (tmp_path / "run" / "config.json").read_text() == before


@pytest.mark.parametrize("below", ["", "run"])
def test_a_run_directory_that_cannot_be_made_raises_naming_the_flag(
    tmp_path: Path, below: str
) -> None:
    """A regular file stands where the directory, or its parent, should be."""
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(OSError, match="--run-dir"):
        prepare_run_directory(tiny_args(run_dir=tmp_path / "file" / below))


# ------------------------------------------------------------------------------ checkpoint


def test_a_loaded_checkpoint_acts_like_the_agent_that_was_saved(
    recorded: Recorded, tmp_path: Path
) -> None:
    """Likeliest actions and cores over a whole rollout, bit by bit."""
    envs = make_envs(ENV_ID, NUM_ENVS, "cpu", TINY)
    envs.reset(seed=0)
    saved, rollout = recorded.agent, recorded.rollout
    save_agent(saved, envs, tmp_path)
    loaded = load_agent(tmp_path, envs)
    state, other = rollout.state, rollout.state
    masks = pad_masks(envs.conditional_masks(), torch.device("cpu"))
    with torch.no_grad():
        for t in range(8):
            observation, starts = rollout.observations[t], rollout.starts[t]
            core, slots, state = saved.step_core(observation, state, starts)
            other_core, other_slots, other = loaded.step_core(observation, other, starts)
            assert torch.equal(core, other_core)
            actions, _ = saved.act(core, slots, masks, None)
            other_actions, _ = loaded.act(other_core, other_slots, masks, None)
            assert torch.equal(actions, other_actions)
    envs.close()


def test_loading_a_checkpoint_leaves_the_global_random_state_alone(
    recorded: Recorded, envs: EsperVectorEnv, tmp_path: Path
) -> None:
    """A caller who evaluates between two draws must get the same second draw."""
    save_agent(recorded.agent, envs, tmp_path)
    before = torch.get_rng_state()
    load_agent(tmp_path, envs)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_checkpoint_of_other_heads_is_refused(
    recorded: Recorded, envs: EsperVectorEnv, tmp_path: Path
) -> None:
    """The message names the head that differs."""
    save_agent(recorded.agent, envs, tmp_path)
    restricted = make_envs(
        ENV_ID, NUM_ENVS, "cpu", EnvConfig(episode_steps=6, heads={"style": "LINEAR_ADD"})
    )
    with pytest.raises(ValueError, match=r"other heads: expected \['style', .*LINEAR_GATE"):
        load_agent(tmp_path, restricted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: ["other", *names[1:]], "other observation_names: expected 'other', got"),
        (lambda names: names[1:], r"other observation_names: expected \d+ of them, got \d+"),
    ],
)
def test_a_checkpoint_of_other_observations_is_refused(
    recorded: Recorded, envs: EsperVectorEnv, tmp_path: Path, change: Any, message: str
) -> None:
    """A feature with another name or another number of features."""
    save_agent(recorded.agent, envs, tmp_path)
    path = tmp_path / "agent.json"
    description = json.loads(path.read_text())
    description["observation_names"] = change(description["observation_names"])
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match=message):
        load_agent(tmp_path, envs)


def test_a_missing_checkpoint_raises_file_not_found(
    recorded: Recorded, envs: EsperVectorEnv, tmp_path: Path
) -> None:
    """Both where nothing is and where the weights alone are missing."""
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*agent.json"):
        load_agent(tmp_path, envs)
    save_agent(recorded.agent, envs, tmp_path)
    (tmp_path / "agent.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"agent\.safetensors"):
        load_agent(tmp_path, envs)


# ------------------------------------------------------------------------------ whole runs


@dataclass
class Run:
    """A finished run."""

    directory: Path
    args: Args
    output: str
    random_states: list[tuple[Any, Any, Any]]
    """Of torch, NumPy and Python, before and after."""


def random_states() -> tuple[Any, Any, Any]:
    """Return the global random states in a form that compares with ==."""
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()  # noqa: NPY002


def run_to_end(args: Args) -> Run:
    """Train with the output captured."""
    states = [random_states()]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        directory = train(args)
    return Run(directory, args, output.getvalue(), [*states, random_states()])


@pytest.fixture(name="run", scope="module")
def run_two_updates(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two updates and an evaluation of 4 episodes."""
    return run_to_end(tiny_args(run_dir=tmp_path_factory.mktemp("runs") / "a", eval_episodes=4))


@pytest.fixture(name="repeated", scope="module")
def run_two_updates_again(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same without an evaluation."""
    return run_to_end(tiny_args(run_dir=tmp_path_factory.mktemp("runs") / "b"))


def rows_of(run: Run) -> list[dict[str, float]]:
    """Read metrics.jsonl."""
    lines = (run.directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def documented_metrics(head_names: list[str]) -> set[str]:
    """Names in the table of metrics in the module's docstring, one set per head expanded."""
    assert ppo_lstm.__doc__ is not None
    table = ppo_lstm.__doc__.split("`metrics.jsonl` and TensorBoard:")[1]
    names = set()
    for line in table.splitlines():
        # Names come first in a line, separated by ", "; the description follows after blanks.
        match = re.match(r" {4}((?:[a-z]+/[a-z_<>]+(?:, )?)+)", line)
        names |= set(match[1].split(", ")) if match else set()
    return {n.replace("<head>", head) for n in names for head in head_names}


def test_a_run_writes_its_files(run: Run) -> None:
    """The configuration, metrics, TensorBoard events, checkpoint and evaluation; no pickle."""
    names = {path.name for path in run.directory.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert len(events) == 1
    assert names - events == {
        "config.json",
        "metrics.jsonl",
        "agent.safetensors",
        "agent.json",
        "evaluation.json",
        "evaluation.png",
    }
    config = json.loads((run.directory / "config.json").read_text())
    assert config["num_steps"] == 6
    assert config["env"]["batches_per_step"] == 1


def test_metrics_are_finite_and_those_of_the_module_docstring(
    run: Run, envs: EsperVectorEnv
) -> None:
    """Neither a metric without a description nor a description without a metric."""
    rows = rows_of(run)
    assert [row.pop("step") for row in rows] == [24, 48]
    expected = documented_metrics([head.name for head in envs.heads])
    assert "entropy/alpha_curve" in expected
    assert "losses/value" in expected
    for row in rows:
        assert set(row) == expected
        assert all(np.isfinite(value) for value in row.values())
        assert row["losses/first_ratio_error"] < REPLAY
        assert row["charts/valid_share"] == 1.0
    assert [row["charts/learning_rate"] for row in rows] == pytest.approx([1e-3, 5e-4])
    assert [row["charts/ent_coef"] for row in rows] == [0.01, 0.01]


def test_weight_of_the_entropy_falls_where_asked(tmp_path: Path) -> None:
    """It is constant in the run above."""
    rows = rows_of(run_to_end(tiny_args(run_dir=tmp_path / "run", anneal_entropy=True)))
    assert [row["charts/ent_coef"] for row in rows] == pytest.approx([0.01, 0.005])


def test_a_larger_weight_of_the_entropy_leaves_more_of_it(recorded: Recorded) -> None:
    """Judged on the last minibatches of one update with many epochs."""
    entropy = {}
    for weight in (0.0, 1.0):
        metrics, _ = update_once(recorded, ent_coef=weight, update_epochs=20)
        entropy[weight] = metrics["entropy/op"]
    assert entropy[1.0] > entropy[0.0]


def test_tensorboard_has_the_values_of_metrics_jsonl(run: Run) -> None:
    """The tolerance is float32, in which events are stored."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.directory))
    events.Reload()
    rows = rows_of(run)
    assert set(events.Tags()["scalars"]) == set(rows[0]) - {"step"}
    for name in ("losses/value", "charts/episode_score"):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in logged] == [24, 48]
        assert [value for _, value in logged] == pytest.approx(
            [row[name] for row in rows], rel=1e-6
        )


def test_a_run_ends_with_an_evaluation_of_four_agents(run: Run) -> None:
    """The trained agent and three baselines on the same 4 episodes."""
    result = json.loads((run.directory / "evaluation.json").read_text())
    assert list(result["agents"]) == [f"ppo:{run.directory}", "never-grow", "random", "heuristic"]
    seeds = [1_000_000 + k for k in range(4)]
    assert all(record["episodes"]["seed"] == seeds for record in result["agents"].values())
    assert "evaluation.json" in run.output


def test_the_table_of_the_final_evaluation_is_not_cut(run: Run) -> None:
    """Rich shortens with an ellipsis what does not fit; output to a file has no terminal width."""
    assert "never-grow" in run.output
    assert "…" not in run.output
    result = json.loads((run.directory / "evaluation.json").read_text())
    summary = result["agents"]["never-grow"]["summary"]
    assert f"{summary['low']:.4f} .. {summary['high']:.4f}" in run.output


def test_the_same_seed_gives_the_same_metrics(run: Run, repeated: Run) -> None:
    """Everything but wall time, whether or not an evaluation follows."""
    for row, other in zip(rows_of(run), rows_of(repeated), strict=True):
        assert row.keys() == other.keys()
        for name in row:
            if not name.startswith("time/") and name != "charts/steps_per_second":
                assert row[name] == other[name], name


def test_the_agent_uses_one_thread_and_the_environment_those_of_torch(
    envs: EsperVectorEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent's matrices are too small to share out."""
    seen: dict[str, set[int]] = {"act": set(), "step": set(), "replay": set()}

    def watch(name: str, function: Any) -> Any:
        def watched(*arguments: Any) -> Any:
            seen[name].add(torch.get_num_threads())
            return function(*arguments)

        return watched

    agent, args = make_agent(envs), tiny_args()
    collector = Collector(envs, agent, args)
    monkeypatch.setattr(agent, "act", watch("act", agent.act))
    monkeypatch.setattr(envs, "step", watch("step", envs.step))
    monkeypatch.setattr(ppo_lstm, "replay", watch("replay", replay))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rollout, _ = collector.collect()
        optimizer = make_optimizer(agent, args)
        names = [head.name for head in envs.heads]
        update(agent, optimizer, rollout, 1.0, args, torch.Generator(), names, 0.01)
    finally:
        torch.set_num_threads(before)
    assert seen == {"act": {1}, "step": {2}, "replay": {1}}


def test_what_the_agent_does_and_learns_does_not_depend_on_the_number_of_threads() -> None:
    """Bit by bit, initial weights included; wide enough that torch would share out the work."""
    args = tiny_args(hidden_size=128)
    before, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            envs = make_envs(ENV_ID, NUM_ENVS, "cpu", TINY)
            agent = ppo_lstm.make_agent(envs, args.hidden_size, seed=0)
            collector = Collector(envs, agent, args)
            rollout, _ = collector.collect()
            generator = torch.Generator().manual_seed(0)
            names = [head.name for head in envs.heads]
            update(agent, make_optimizer(agent, args), rollout, 1.0, args, generator, names, 0.01)
            envs.close()
        finally:
            torch.set_num_threads(before)
        results.append([rollout.actions, *agent.state_dict().values()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_another_seed_gives_other_metrics(repeated: Run, tmp_path: Path) -> None:
    """So that the test above is not about constants."""
    other = run_to_end(tiny_args(run_dir=tmp_path / "c", seed=2, total_timesteps=24))
    assert rows_of(other)[0]["losses/value"] != rows_of(repeated)[0]["losses/value"]


def test_training_leaves_global_random_states_alone(repeated: Run) -> None:
    """Torch, NumPy and Python; without the final evaluation."""
    before, after = repeated.random_states
    assert before == after


def test_training_with_an_evaluation_leaves_global_random_states_alone(run: Run) -> None:
    """Torch, NumPy and Python; the evaluation loads the checkpoint into a new network."""
    before, after = run.random_states
    for name, old, new in zip(("torch", "NumPy", "Python"), before, after, strict=True):
        assert old == new, name


def test_training_with_other_blueprints_than_the_heuristics_ends_with_an_evaluation(
    tmp_path: Path,
) -> None:
    """A restriction that the environment admits must not fail after the training is done."""
    config = dataclasses.replace(TINY, heads={"blueprint": "norm"})
    run = run_to_end(
        tiny_args(env=config, total_timesteps=24, eval_episodes=2, run_dir=tmp_path / "run")
    )
    assert (run.directory / "evaluation.json").exists()
