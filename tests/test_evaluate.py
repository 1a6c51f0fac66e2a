"""Baselines and their comparison on the same episodes, in tiny environments.

Statistics are checked by hand, episodes against the single environment, and the table and JSON
that a user gets.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib.image as mpimg
import numpy as np
import numpy.typing as npt
import pytest

from esper_agent import command_line, evaluate
from esper_agent.arguments import config_of
from esper_agent.baselines import (
    FixedSchedule,
    NeverGrow,
    Periodic,
    PlateauHeuristic,
    RandomLegal,
    parse_plan,
)
from esper_agent.envs import TRAINING, make_envs, settings_of
from esper_agent.evaluate import (
    FIGURES,
    bootstrap_interval,
    evaluate_agents,
    interquartile_mean,
    make_policy,
    plot_scores,
    report,
    run_episodes,
)
from esper_agent.in_service import InService, OpenLoop, Oracle, Threshold, Toggle
from esper_agent.networks import save_network
from esper_agent.ppo_lstm import Args, make_train_state
from esper_env import EnvConfig, Op, Stage
from tests.builders import ID, tiny_config

TINY = tiny_config()
LIFE = tiny_config(episode_steps=16, illegal_actions="raise")
"""Long enough for a seed to germinate, train, blend over 3 steps, hold and be settled."""
ALWAYS = {"patience": 1, "margin": 1.0, "steps_to_live": 1}
"""Settings of a heuristic that grows whenever it can: every accuracy counts as stalled."""
REPOSITORY = Path(__file__).parents[1]
SAME_FIGURE = 1e-6
"""Tolerance of accuracies, which are counts of images: no image may change its class."""

Steps = list[dict[str, Any]]


def play(policy: Any, config: EnvConfig = LIFE, num_envs: int = 2, seed: int = 0) -> Steps:
    """Run one episode; return the info of every step (the last from before the reset)."""
    envs = make_envs(ID, num_envs, "cpu", config)
    observation, info = envs.reset(seed=seed)
    policy.begin(envs, seed)
    steps = []
    for _ in range(config.episode_steps):
        observation, _, _, truncated, info = envs.step(policy.act(observation, info))
        steps.append(info["final_info"] if truncated.all() else info)
    envs.close()
    return steps


def ops_of(steps: Steps) -> set[int]:
    """Return the ops that occurred."""
    return {int(op) for info in steps for op in info["op"]}


# ------------------------------------------------------------------------------ statistics


def test_interquartile_mean_is_the_mean_of_the_middle_half() -> None:
    """Of 8 sorted values the lowest and the highest 2 go: (2 + 3 + 5 + 6) / 4 = 4.

    Of 6 values, a quarter is 1.5, and whole values go: (1 + 2 + 4 + 5) / 4 = 3. Along the last
    axis of a table, (1 + 2) / 2 and (20 + 30) / 2. Exact.
    """
    assert interquartile_mean(np.array([100.0, 2.0, 6.0, -50.0, 3.0, 1.0, 5.0, 7.0])) == 4.0
    assert interquartile_mean(np.array([5.0, -9.0, 1.0, 4.0, 2.0, 99.0])) == 3.0
    values = np.array([[0.0, 1.0, 2.0, 900.0], [30.0, 20.0, -900.0, 50.0]])
    assert interquartile_mean(values).tolist() == [1.5, 25.0]


def test_the_bootstrap_interval_holds_the_interquartile_mean_and_shrinks_with_data() -> None:
    """Its width falls with 1 / sqrt(n): for 25 times the data to a fifth, within a factor of 2."""
    values = np.random.default_rng(0).normal(size=1000)
    widths = []
    for count in (40, 1000):
        low, high = bootstrap_interval(values[:count], np.random.default_rng(1))
        assert low < interquartile_mean(values[:count]) < high
        widths.append(high - low)
    assert 2.5 < widths[0] / widths[1] < 10


def test_the_bootstrap_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    """The IQM of a normal distribution is its mean, 0; 95 % of the intervals should hold it.

    Of 200 intervals 190 are expected, with a standard error of 3.1; the percentile bootstrap is
    known to be a little short at n = 40. At least 170 is 6 standard errors below, and a 50 %
    interval (100) fails. At most 199, so an interval that is always too wide fails.
    """
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        low, high = bootstrap_interval(rng.normal(size=40), rng)
        covered += low <= 0.0 <= high
    assert 170 <= covered <= 199


# ------------------------------------------------------------------------------ episodes


def test_episode_k_of_never_grow_is_the_single_environment_with_seed_plus_k() -> None:
    """Also with fewer members than episodes: the second batch starts at seed + num_envs."""
    envs = make_envs(ID, 2, "cpu", TINY)
    result = run_episodes(NeverGrow(), envs, num_episodes=3, seed=40)
    envs.close()
    assert result["seed"] == [40, 41, 42]
    for k in range(3):
        env = gym.make(ID, batches_per_step=1, batch_size=8, episode_steps=6)
        env.reset(seed=40 + k)
        is_over = False
        while not is_over:
            _, _, terminated, truncated, info = env.step(np.zeros(8, dtype=np.int64))
            is_over = terminated or truncated
        env.close()
        for name in ("committed_score", "committed_accuracy", "committed_test_accuracy"):
            assert result[name][k] == pytest.approx(float(info[name]), abs=SAME_FIGURE)
        assert result["parameters"][k] == 0.0
        assert result["flops"][k] == float(info["flops"]) > 0
    assert len(set(result["committed_test_accuracy"])) > 1, "episodes differ"


def test_agents_start_from_the_same_hosts() -> None:
    """Finding LOOP-8: the losses before the first step are the same, agent by agent.

    The environment is reset after random growth, of which nothing may be left.
    """
    starts: list[list[float]] = []

    class Watched:
        """Another policy, noting the first info of every batch of episodes."""

        def __init__(self, policy: Any) -> None:
            self.policy = policy

        def begin(self, envs: Any, seed: int) -> None:
            self.policy.begin(envs, seed)
            self.is_first = True

        def act(self, observation: Any, info: dict[str, Any]) -> Any:
            if self.is_first:
                starts.append(info["loss"].tolist())
            self.is_first = False
            return self.policy.act(observation, info)

    envs = make_envs(ID, 2, "cpu", TINY)
    for policy in (RandomLegal(), NeverGrow()):
        run_episodes(Watched(policy), envs, num_episodes=4, seed=3)
    envs.close()
    assert len(starts) == 4
    assert starts[:2] == starts[2:]
    assert starts[0] != starts[1]


def test_more_episodes_than_members_give_the_same_figures_as_in_one_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """5 episodes of never-grow in batches of 2 (2, 2 and 1 of 2) and in one of 5."""
    results = []
    for limit in (2, 64):
        monkeypatch.setattr(evaluate, "MAX_ENVS", limit)
        result = evaluate_agents({"never-grow": NeverGrow()}, ID, TINY, 5, 7)
        results.append(result["agents"]["never-grow"]["episodes"])
    few, many = results
    assert few["seed"] == many["seed"] == [7, 8, 9, 10, 11]
    for name in FIGURES:
        assert len(few[name]) == 5
        assert few[name] == pytest.approx(many[name], abs=SAME_FIGURE), name


def test_the_test_score_is_the_committed_score_with_test_images() -> None:
    """Both pay the same rent: test score - score = test accuracy - accuracy, per episode.

    The heuristic fossilizes, so the rent is not 0. Tolerance 1e-9: float64.
    """
    policy = PlateauHeuristic(**ALWAYS, min_contribution=-1.0)
    envs = make_envs(ID, 2, "cpu", LIFE)
    result = {name: np.array(v) for name, v in run_episodes(policy, envs, 2, seed=0).items()}
    envs.close()
    rent = result["committed_accuracy"] - result["committed_score"]
    assert (rent > 0).all()
    assert (result["parameters"] > 0).all()
    assert result["committed_test_accuracy"] - result["test_score"] == pytest.approx(rent, abs=1e-9)


def test_an_episode_that_terminates_is_evaluated_like_one_that_is_truncated() -> None:
    """`horizon` only changes the flag, so never-grow gets the same figures, bit by bit."""
    results = []
    for horizon in ("truncate", "terminal"):
        config = dataclasses.replace(TINY, horizon=horizon)
        envs = make_envs(ID, 2, "cpu", config)
        results.append(run_episodes(NeverGrow(), envs, 2, seed=0))
        envs.close()
    assert results[0] == results[1]


def test_summaries_and_paired_differences_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores 1, 2, 3, 10 against 0, 0, 4, 1, episode by episode.

    Means 4 and 1.25; IQMs (2 + 3) / 2 and (0 + 1) / 2; differences, first minus other, 1, 2, -1,
    9 with IQM (1 + 2) / 2. All exact in binary.
    """
    scores = {RandomLegal: [1.0, 2.0, 3.0, 10.0], NeverGrow: [0.0, 0.0, 4.0, 1.0]}

    def known(policy: Any, *arguments: Any) -> dict[str, list[float]]:
        return dict.fromkeys(("seed", *FIGURES), scores[type(policy)])

    monkeypatch.setattr(evaluate, "run_episodes", known)
    policies = {"random": RandomLegal(), "never-grow": NeverGrow()}
    result = evaluate_agents(policies, ID, TINY, 4, 0)
    for name, mean, iqm in (("random", 4.0, 2.5), ("never-grow", 1.25, 0.5)):
        summary = result["agents"][name]["summary"]
        assert (summary["mean"], summary["iqm"], summary["parameters_mean"]) == (mean, iqm, mean)
        assert summary["low"] < iqm < summary["high"]
    assert list(result["paired"]) == ["random - never-grow"]
    pair = result["paired"]["random - never-grow"]
    assert pair["difference"] == 1.5
    assert -1.0 <= pair["low"] < 1.5 < pair["high"] <= 9.0


def test_the_same_call_gives_the_same_result() -> None:
    """Random actions and bootstrap resamples are seeded."""
    first, second = (
        evaluate_agents({"random": RandomLegal()}, ID, TINY, 2, 11)["agents"] for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize(
    "name",
    ["grow-never", "ppo", "schedule", "", "runs/one", "./runs/one", "no.module:policy", "json:"],
)
def test_an_unknown_agent_raises_with_the_known_names(name: str) -> None:
    """Also an import string whose module or attribute does not exist."""
    expected = (
        r"agents: expected \['best-schedule', 'churner', 'heuristic', 'never-grow', 'parasite', "
        r"'periodic', 'random', 'tuned-heuristic'\], ppo:RUN_DIR, sampled-ppo:RUN_DIR, "
        r"schedule:PLAN or MODULE:FACTORY, got "
    )
    with pytest.raises(ValueError, match=expected + re.escape(repr(name))):
        make_policy(name)


def test_a_checkpoint_takes_its_most_likely_actions_unless_they_are_sampled(tmp_path: Path) -> None:
    """`ppo:` is the same for every seed of the policy; `sampled-ppo:` for the same one only."""
    envs = make_envs(ID, 8, "cpu", LIFE)
    save_network(tmp_path, make_train_state(Args(num_envs=8, hidden_size=16), envs).agent)

    def actions(kind: str, seed: int) -> list[list[list[int]]]:
        policy = make_policy(f"{kind}:{tmp_path}")
        observation, info = envs.reset(seed=7)
        policy.begin(envs, seed)
        taken = []
        for _ in range(6):
            chosen = policy.act(observation, info)
            taken.append(chosen.tolist())
            observation, *_, info = envs.step(chosen)
        return taken

    assert actions("ppo", 1) == actions("ppo", 2)
    assert actions("sampled-ppo", 1) == actions("sampled-ppo", 1)
    assert actions("sampled-ppo", 1) != actions("sampled-ppo", 2)
    envs.close()


def test_nothing_to_evaluate_raises() -> None:
    """A mean over no episodes would be NaN; without policies there is no first one."""
    with pytest.raises(ValueError, match="episodes: expected at least 1, got 0"):
        evaluate_agents({"never-grow": NeverGrow()}, ID, TINY, 0)
    with pytest.raises(ValueError, match="agents: expected at least one"):
        evaluate_agents({}, ID, TINY, 1)


def test_a_policy_that_does_not_fit_raises_before_any_episode_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A typing error in the second agent's name must not cost the first agent's run."""
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        make_policy(f"ppo:{tmp_path / 'no'}")
    monkeypatch.delattr(evaluate, "run_episodes")
    policies = {name: make_policy(name) for name in ("never-grow", "schedule:norm@2")}
    with pytest.raises(ValueError, match=r"plan: expected slots among \[0, 1\], got 2"):
        evaluate_agents(policies, ID, TINY, 1)


# ------------------------------------------------------------------------------ baselines


def test_never_grow_waits() -> None:
    """No seed, no parameters."""
    steps = play(NeverGrow())
    assert ops_of(steps) == {Op.WAIT}
    assert (steps[-1]["parameters"] == 0).all()


def test_random_takes_only_legal_actions_of_every_op() -> None:
    """An illegal action would raise; 4 members and 4 episodes meet all six ops."""
    seen = set()
    for seed in range(0, 16, 4):
        seen |= ops_of(play(RandomLegal(), num_envs=4, seed=seed))
    assert seen == set(Op)


def test_the_heuristic_germinates_blends_fully_and_fossilizes() -> None:
    """An illegal action would raise. Everything counts as stalled, every contribution as good.

    It takes its blueprint and full alpha, so each fossilized seed has alpha 1.
    """
    steps = play(PlateauHeuristic(**ALWAYS, min_contribution=-1.0))
    assert ops_of(steps) == {Op.WAIT, Op.GERMINATE, Op.ADVANCE, Op.FOSSILIZE}
    final = steps[-1]
    is_fossil = final["stage"] == Stage.FOSSILIZED
    assert is_fossil.any(axis=1).all()
    assert (final["alpha"][is_fossil] == 1.0).all()
    envs = make_envs(ID, 1, "cpu", LIFE)
    names = next(head.options for head in envs.heads if head.name == "blueprint")
    envs.close()
    assert {names[b] for b in final["blueprint"][is_fossil]} == {"conv_light"}


def test_the_heuristic_prunes_what_does_not_contribute_after_its_trial() -> None:
    """A contribution of 2 is impossible, so every seed that held for `trial_steps` goes.

    HOLDING is seen in exactly 2 decisions, the second of which prunes.
    """
    steps = play(PlateauHeuristic(**ALWAYS, min_contribution=2.0, trial_steps=2))
    assert Op.PRUNE in ops_of(steps)
    assert Op.FOSSILIZE not in ops_of(steps)
    for member in range(2):
        held = [int(info["stage"][member, 0] == Stage.HOLDING) for info in steps]
        first = held.index(1)
        prune = next(t for t, info in enumerate(steps) if info["op"][member] == Op.PRUNE)
        assert held[first:prune] == [1, 1]
        assert steps[prune]["stage"][member, 0] == Stage.EMBARGOED


def test_the_heuristic_waits_while_the_accuracy_rises_or_too_little_time_is_left() -> None:
    """With patience above the episode's length, or more steps to live than there are."""
    for settings in ({"patience": 17}, ALWAYS | {"steps_to_live": 17}):
        assert ops_of(play(PlateauHeuristic(**settings))) == {Op.WAIT}, settings


def test_the_heuristic_germinates_after_exactly_its_patience() -> None:
    """With a margin of 1 nothing counts as a rise, so decision 4 (index 3) is the first stalled 4.

    It germinates no earlier and no later, in all members.
    """
    steps = play(PlateauHeuristic(**ALWAYS | {"patience": 4}))
    ops = np.stack([info["op"] for info in steps])
    assert (ops[:3] == Op.WAIT).all()
    assert (ops[3] == Op.GERMINATE).all()


def test_the_heuristic_forgets_the_past_when_it_begins_again() -> None:
    """The same object gives the same episode twice."""
    policy = PlateauHeuristic(**ALWAYS | {"patience": 2})
    first, second = (np.stack([info["op"] for info in play(policy)]) for _ in range(2))
    assert Op.GERMINATE in first
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    ("heads", "ops"),
    [
        ({"slot": 1, "blueprint": ["norm", "conv_light"]}, {0, 1, 2, 5}),
        ({"style": "LINEAR_GATE", "tempo": 3, "alpha_target": 1.0}, {0, 1, 2, 5}),
        ({"alpha_target": 0.5}, {0, 1, 2}),
        ({"op": ["WAIT", "GERMINATE"]}, {0, 1}),
        ({"op": ["WAIT", "PRUNE"]}, {0}),
    ],
)
def test_the_heuristic_works_with_restricted_heads(heads: dict[str, Any], ops: set[int]) -> None:
    """It does what is left: without full alpha, for example, no seed can hold or be fossilized."""
    config = dataclasses.replace(LIFE, heads=heads)
    steps = play(PlateauHeuristic(**ALWAYS, min_contribution=-1.0), config)
    assert ops_of(steps) == ops
    if "slot" in heads:
        assert (steps[-1]["stage"][:, 0] == Stage.DORMANT).all()
        assert (steps[-1]["stage"][:, 1] != Stage.DORMANT).all()


def test_the_heuristic_can_start_with_the_deepest_slot_and_stop_at_a_number_of_seeds() -> None:
    """With two slots: the second one first; with at most one seed, only that one."""
    settings = ALWAYS | {"deepest_first": True, "min_contribution": -1.0}
    for max_seeds, expected in ((None, [True, True]), (1, [False, True])):
        steps = play(PlateauHeuristic(**settings, max_seeds=max_seeds))
        first = next(info["stage"] for info in steps if (info["stage"] != Stage.DORMANT).any())
        assert ((first != Stage.DORMANT) == [False, True]).all()
        assert ((steps[-1]["stage"] != Stage.DORMANT) == expected).all()


def test_a_schedule_grows_what_it_says_when_it_says() -> None:
    """And the record of the episode is the schedule itself, in its own notation.

    Slot 0 at step 1; slot 1 at once, although it comes second in the plan.
    """
    text = "norm@0:1+conv_small@1:0"
    envs = make_envs(ID, 2, "cpu", LIFE)
    episodes = run_episodes(FixedSchedule(parse_plan(text)), envs, 3, seed=0)
    assert episodes["growth"] == [text] * 3
    assert run_episodes(NeverGrow(), envs, 3, seed=0)["growth"] == [""] * 3
    policy = make_policy("schedule:norm@0:1+conv_small@1")
    assert run_episodes(policy, envs, 3, seed=0) == episodes
    envs.close()


@pytest.mark.parametrize("text", ["conv_heavy", "conv_heavy@x", "@0", "norm@0:", "norm@0,norm@1"])
def test_a_schedule_that_cannot_be_read_raises_with_an_example(text: str) -> None:
    """The remedy is the form."""
    message = r"schedule: expected blueprint@slot or blueprint@slot:step joined by \+, such as conv"
    with pytest.raises(ValueError, match=message):
        parse_plan(text)


def test_a_schedule_takes_each_slot_once_and_only_what_is_offered() -> None:
    """A slot twice, a slot that is not enabled, and a blueprint that is not offered."""
    with pytest.raises(ValueError, match="expected each slot once, got 'norm@0\\+norm@0'"):
        parse_plan("norm@0+norm@0")
    envs = make_envs(ID, 1, "cpu", LIFE)
    with pytest.raises(ValueError, match=r"plan: expected slots among \[0, 1\], got 2"):
        FixedSchedule(parse_plan("norm@2")).begin(envs, 0)
    with pytest.raises(ValueError, match=r"blueprint: expected one of \('norm', .*, got 'nrom'"):
        FixedSchedule(parse_plan("nrom@0")).begin(envs, 0)
    envs.close()


def test_periodic_germinates_at_every_multiple_of_its_period_and_keeps_all() -> None:
    """Period 3: decisions 3 and 6 find a free slot, later ones none."""
    steps = play(Periodic(period=3))
    ops = np.stack([info["op"] for info in steps])
    assert (np.nonzero((ops == Op.GERMINATE).all(axis=1))[0] == [3, 6]).all()
    assert (steps[-1]["stage"] == Stage.FOSSILIZED).all()


# ------------------------------------------------------------------------------ seeds in service

PLAN = parse_plan("conv_light@0+norm@1")
REGIMES = ("Esper-Digits-Sizing-v0", "Esper-Digits-Contexts-v0")


def serve(policy: InService, env_id: str, **settings: Any) -> npt.NDArray[np.float64]:
    """Return alpha after every step of one episode of 3 members. (steps, members, slots)."""
    config = dataclasses.replace(
        settings_of(env_id, TRAINING),
        episode_steps=14,
        batches_per_step=1,
        max_seeds=None,
        **settings,
    )
    envs = make_envs(env_id, 3, "cpu", config)
    observation, info = envs.reset(seed=0)
    policy.begin(envs, 0)
    alphas = []
    for _ in range(14):
        observation, _, terminated, truncated, info = envs.step(policy.act(observation, info))
        if (terminated | truncated).any():
            info = info["final_info"]
        alphas.append(info["alpha"])
    envs.close()
    return np.array(alphas)


@pytest.mark.parametrize("env_id", REGIMES)
def test_an_open_loop_serves_from_its_start_to_its_stop(env_id: str) -> None:
    """One op per step: the second seed is a step later. Parked or pruned, both leave again."""
    alpha = serve(OpenLoop(PLAN, 2, 7), env_id)
    on = np.zeros((14, 2))
    on[2:7, 0] = on[3:8, 1] = 1
    assert (alpha == on[:, None]).all()
    assert not serve(OpenLoop(PLAN, 14), env_id).any()
    assert (serve(OpenLoop(PLAN), env_id)[1:] == 1).all()


@pytest.mark.parametrize("env_id", REGIMES)
def test_an_oracle_serves_in_its_regime(env_id: str) -> None:
    seen = []

    class Watched(Oracle):
        def wants(self, info: dict[str, Any]) -> npt.NDArray[np.bool_]:
            result = super().wants(info)
            assert np.array_equal(result, info["regime"] == 1)
            seen.append(result)
            return result

    alpha = serve(Watched(parse_plan("norm@1"), [1]), env_id)
    assert not alpha[..., 0].any()
    wanted = np.array(seen)
    assert 0 < wanted.mean() < 1
    # A pruned slot is closed for some steps; a parked seed comes back at once.
    if env_id == REGIMES[1]:
        assert np.array_equal(alpha[..., 1] == 1, wanted)
    assert not alpha[..., 1][~wanted].any()


def decisions(policy: InService, accuracies: list[float]) -> list[bool]:
    """Return what a policy wants at each accuracy of one member."""
    envs = make_envs(ID, 1, "cpu", LIFE)
    envs.reset(seed=0)
    policy.begin(envs, 0)
    wanted = []
    for accuracy in accuracies:
        policy.act(np.zeros((1, 1), np.float32), {"accuracy": np.array([accuracy])})
        wanted.append(bool(policy._wanted[0]))
    envs.close()
    return wanted


def test_a_threshold_decides_once_or_in_every_step() -> None:
    course = [0.1, 0.2, 0.6, 0.3, 0.9]
    assert decisions(Threshold(PLAN, 0.5, decide_at=1), course) == [False] + 4 * [True]
    assert decisions(Threshold(PLAN, 0.5, decide_at=2), course) == 5 * [False]
    early = Threshold(PLAN, 0.5, decide_at=2, begins=True)
    assert decisions(early, course) == 2 * [True] + 3 * [False]
    assert decisions(Threshold(PLAN, 0.5), course) == [True, True, False, True, False]


def test_a_toggle_needs_a_drop_below_the_recent_mean_and_waits() -> None:
    """Mean of up to 2 earlier accuracies; after a change two steps pass without another."""
    policy = Toggle(PLAN, drop=0.2, window=2, wait=2)
    course = [0.5, 0.31, 0.2, 0.9, 0.1, 0.1, 0.6, 0.6, 0.39]
    # 0.31 > 0.5 - 0.2; 0.2 < 0.405 - 0.2 is a change; the first 0.1 < 0.9 - 0.2 comes too early,
    # the second one < 0.5 - 0.2 does not; 0.39 < 0.6 - 0.2.
    expected = [False, False, True, True, True, False, False, False, True]
    assert decisions(policy, course) == expected
    course = [0.5, 0.2, 0.6, 0.2]
    assert decisions(Toggle(PLAN, below=0.3), course) == [False, True, True, False]


def test_a_plan_that_does_not_fit_raises() -> None:
    envs = make_envs(ID, 1, "cpu", LIFE)
    with pytest.raises(ValueError, match=r"plan: expected slots among \[0, 1\], got 2"):
        OpenLoop(parse_plan("norm@2")).begin(envs, 0)
    envs.close()


def test_the_anytime_test_score_is_that_of_the_network_in_service() -> None:
    """0.9 with test images minus the rent of 0.1; what is fossilized does not matter."""
    info = {"accuracy": 0.7, "score": 0.6, "test_accuracy": 0.9, "committed_score": 0.4}
    info |= {"committed_accuracy": 0.5, "committed_test_accuracy": 0.3, "parameters": 9, "flops": 1}
    arrays = {name: np.array([value]) for name, value in info.items()}
    assert evaluate.figures_of(arrays, "anytime")["test_score"][0] == pytest.approx(0.8)
    assert evaluate.figures_of(arrays)["test_score"][0] == pytest.approx(0.2)


def test_the_heuristic_names_the_blueprints_it_could_take() -> None:
    """When the one it was given is not among the options."""
    config = dataclasses.replace(LIFE, heads={"blueprint": ["norm", "conv_heavy"]})
    message = r"blueprint: expected one of \('norm', 'conv_heavy'\), got 'conv_light'"
    with pytest.raises(ValueError, match=message):
        play(PlateauHeuristic(blueprint="conv_light"), config)
    steps = play(PlateauHeuristic(**ALWAYS, blueprint="conv_heavy"), config)
    assert Op.GERMINATE in ops_of(steps)


# ------------------------------------------------------------------------------ output


def result_of(*names: str) -> dict[str, Any]:
    """A result as `evaluate_agents` returns it, with the widest plausible numbers."""
    summary = {"mean": -0.5, "iqm": 0.5, "low": -0.9876, "high": 0.9876}
    summary |= {f"{figure}_mean": 0.5 for figure in FIGURES[1:]} | {"parameters_mean": 123_456.0}
    pair = {"difference": -0.1234, "low": -0.2345, "high": 0.3456}
    record = {"summary": summary, "episodes": {"committed_score": [0.5, 0.6]}}
    return {
        "env_id": ID,
        "episodes": 64,
        "agents": dict.fromkeys(names, record),
        "paired": {f"{names[0]} - {name}": pair for name in names[1:]},
    }


def test_the_table_shows_every_name_and_number_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    """Also names of run directories, which are folded."""
    name = "Esper-Digits-v0__ppo_lstm__1__20250101-000000"
    report(result_of(f"ppo:runs/{name}-one", "never-grow", f"ppo:runs/{name}-two"), None)
    text = capsys.readouterr().out
    assert "…" not in text
    for part in ("never-grow", "-0.5000", "123456", "-0.1234", "-0.2345", "+0.3456"):
        assert part in text, part
    names = "".join(re.findall(r"^│ (\S+) *│", text, re.M))
    assert f"ppo:runs/{name}-one" in names
    assert f"ppo:runs/{name}-two" in names


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    """`python -m esper_agent.evaluate` as a user runs it, into a directory not there yet."""
    out = tmp_path / "results" / "evaluation.json"
    command = [sys.executable, "-m", "esper_agent.evaluate", "--agents"]
    command += ["random", "esper_agent.baselines:NeverGrow"]
    command += ["--episodes", "2", "--seed", "5", "--out", str(out), "--env.instances", "test"]
    command += ["--env.batches-per-step", "1", "--env.batch-size", "8", "--env.episode-steps", "6"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "baselines:NeverGrow" in done.stdout
    assert "…" not in done.stdout
    result = json.loads(out.read_text())
    assert list(result["agents"]) == ["random", "esper_agent.baselines:NeverGrow"]
    assert result["env"]["episode_steps"] == 6
    assert result["env"]["instances"] == "test"
    episodes = result["agents"]["random"]["episodes"]
    assert set(episodes) == {*("seed", "instance", "growth"), *FIGURES}
    assert all(len(values) == 2 for values in episodes.values())
    assert (episodes["seed"], episodes["instance"]) == ([5, 6], [0, 1])


def test_settings_of_an_id_are_its_own_with_those_for_training() -> None:
    config = settings_of("Esper-CIFAR10-v0", TRAINING)
    assert (config.task, config.episode_steps, config.batch_size) == ("cifar10", 150, 128)
    assert config.heads == TRAINING.heads
    assert settings_of(ID, TRAINING) == TRAINING
    assert settings_of(ID, TINY) is TINY
    assert make_envs("Esper-CIFAR10-v0", 1, "cpu", config).config == config
    with pytest.raises(ValueError, match=r"env\.task: expected 'cifar10', the task of .* 'digits'"):
        make_envs("Esper-CIFAR10-v0", 1, "cpu", TRAINING)


@pytest.mark.parametrize("flag", ["--env-id", "--env_id"])
@pytest.mark.parametrize("kind", [Args, evaluate.Args], ids=["training", "evaluation"])
def test_a_value_of_the_command_line_holds_also_if_another_id_has_it_by_default(
    kind: Any, flag: str
) -> None:
    """The batch size of Esper-CIFAR10-v0 is 128, that of Esper-Digits-v0 is 32."""
    arguments = [flag, "Esper-CIFAR10-v0"]
    default = command_line.parse(kind, arguments).env
    assert (default.batch_size, default.episode_steps) == (128, 150)
    changed = command_line.parse(kind, [*arguments, "--env.batch-size", "32"]).env
    assert changed == dataclasses.replace(default, batch_size=32)


def test_an_evaluation_says_how_its_settings_differ_from_those_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = Args(env=TINY, gamma=TINY.gamma, hidden_size=8)
    envs = make_envs(ID, args.num_envs, "cpu", TINY)
    save_network(tmp_path, make_train_state(args, envs).agent)
    (tmp_path / "config.json").write_text(json.dumps(config_of(args)))
    for rent, expected in ((0.5, "env.rent_weight=0.5 (run: 0.25)"), (TINY.rent_weight, "")):
        config = dataclasses.replace(TINY, instances="test", rent_weight=rent)
        evaluate.begin(evaluate.Args(agents=(f"ppo:{tmp_path}",), env=config))
        printed = capsys.readouterr().out
        assert expected.replace("0.25", str(TINY.rent_weight)) in printed
        assert bool(printed) == bool(expected)


def test_ctrl_c_in_an_evaluation_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "run_episodes", interrupt)
    monkeypatch.setattr(sys, "argv", ["evaluate", "--episodes", "1"])
    with pytest.raises(SystemExit) as caught:
        evaluate.main()
    assert caught.value.code == 130
    assert capsys.readouterr().err == "error: interrupted; nothing is saved\n"


def test_the_plot_shows_every_agent(tmp_path: Path) -> None:
    """A picture of a few hundred pixels with more than the background in it."""
    path = tmp_path / "scores.png"
    plot_scores(result_of("never-grow", "ppo:runs/one"), path)
    pixels = mpimg.imread(path)
    assert min(pixels.shape[:2]) > 200
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 10


def test_episodes_have_the_instances_of_the_set_in_turn() -> None:
    """22 episodes of the 20 test instances, in two batches; the first two come again."""
    config = dataclasses.replace(TINY, instances="test", episode_steps=2)
    envs = make_envs(ID, 13, "cpu", config)
    result = run_episodes(NeverGrow(), envs, 22, seed=40)
    assert result["instance"] == [*range(20), 0, 1]
    assert result["seed"] == list(range(40, 62))
