"""The environment as a state machine: whatever is done to it, in whatever order, stays true.

Hypothesis drives mixed batches through random, illegal and directed play, poisoned weights, resets,
copies of the state and of members, and checks everything that must hold after every step. It also
counts what it reached, so that it cannot pass by doing nothing.
"""

from __future__ import annotations

import gc
import itertools
import os
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from esper_env import EsperEnv, EsperVectorEnv, Op, Stage
from esper_env.config import STYLES, Blend, BoolArray, IntArray
from esper_env.growth import lifecycle
from esper_env.growth.observation import CHANGE_SCALE
from esper_env.growth.simulation import Simulation
from esper_env.growth.state import DOWN, SlotState
from esper_env.population.interface import Training
from esper_env.population.layout import Layout
from esper_env.population.numba_engine import program_cache
from esper_env.population.numba_engine.engine import _pool
from esper_env.population.population import Population
from esper_env.tasks.instances import SET_SIZES
from tests.builders import (
    CONV_LIGHT,
    INFO_KEYS,
    TRANSITIONS,
    action,
    assert_same,
    is_legal,
    make,
    move,
    play,
    poison,
    waits,
)

EPISODE_STEPS = 25
NUM_STEPS = 3000
"""Env steps of the machine and its twin together."""
MAX_ROLLBACKS = 2
BATCH_SIZE = 4
PREFERENCES = (
    (),
    (Op.FOSSILIZE, Op.ADVANCE, Op.GERMINATE),
    (Op.ADVANCE, Op.GERMINATE, Op.WAIT),
    (Op.SET_ALPHA, Op.ADVANCE, Op.GERMINATE),
    (Op.PRUNE, Op.WAIT, Op.GERMINATE),
)
"""Ops that a directed step prefers, best first; any other comes last. () is random play."""
TELESCOPE_TOLERANCE = 1e-9  # Sums of at most 25 differences in float64.


@dataclass
class Tally:
    """What the machine reached in all its runs."""

    count: Counter[str] = field(default_factory=Counter)
    """Steps, twin steps, rollbacks, resets, and so on."""
    stages: Counter[str] = field(default_factory=Counter)
    ops: Counter[str] = field(default_factory=Counter)
    """Legal ones that were carried out."""
    transitions: Counter[tuple[Stage, Stage]] = field(default_factory=Counter)


Move = tuple[int, int, Stage, Stage]
"""Member, slot, and the stages between which it moved."""


class Recorder:
    """Wraps `lifecycle._move`, `Population.train` and `Simulation.draw_batches`.

    It remembers what they did last.

    Args:
        monkeypatch: Undoes the wrapping.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.moves: list[tuple[SlotState, Move]] = []
        self.watched: Simulation | None = None
        self.style: IntArray = np.zeros((0, 0), dtype=np.int64)
        """Styles of the watched environment before its last training."""
        train, draw_batches = Population.train, Simulation.draw_batches

        def record_move(state: SlotState, at: tuple[IntArray, ...], target: Stage) -> None:
            for member, slot, source in zip(*at, state.stage[at], strict=True):
                self.moves.append((state, (int(member), int(slot), Stage(source), target)))
            move(state, at, target)

        def record_style(sim: Simulation, *arguments: Any) -> Any:
            # In every env step, also in those without a batch for anybody.
            if sim is self.watched:
                self.style = sim.state.slots.style.copy()
            return draw_batches(sim, *arguments)

        def check_train(population: Population, training: Training) -> Any:
            sim = self.watched
            if sim is None or sim.population is not population:
                return train(population, training)
            before = {name: t.clone() for name, t in population.storage.matrices.items()}
            report = train(population, training)
            check_ownership(sim, training.members, before)
            return report

        monkeypatch.setattr(lifecycle, "_move", record_move)
        monkeypatch.setattr(Population, "train", check_train)
        monkeypatch.setattr(Simulation, "draw_batches", record_style)

    def take(self, state: SlotState) -> list[Move]:
        """Return the moves of one environment since the last call, and forget all others."""
        moves = [m for owner, m in self.moves if owner is state]
        self.moves.clear()
        return moves


# ------------------------------------------------------------------ what must hold


def merge(info: dict[str, Any], final: dict[str, Any], ended: BoolArray) -> dict[str, Any]:
    """Return the info of each member's own last step: the final one of those that ended."""
    merged: dict[str, Any] = {}
    for key, value in final.items():
        if isinstance(value, dict):
            merged[key] = merge(info[key], value, ended)
        else:
            where = ended.reshape(-1, *[1] * (value.ndim - 1))
            merged[key] = np.where(where, value, info[key])
    return merged


def has_gate(style: int) -> bool:
    return STYLES[style].blend == Blend.GATE


@cache
def seed_columns(layout: Layout, slot: int, blueprint: int, style: int) -> tuple[IntArray, ...]:
    """Return the columns of a seed in the widest host: those it owns, and those of the gate."""
    parameters, _ = layout.seed_columns(slot, blueprint)
    spans = [np.arange(c.offset, c.offset + c.spec.size) for c in parameters]
    num_gate = len(layout.gates[slot])
    own = spans if has_gate(style) else spans[:-num_gate]
    return np.concatenate(own), np.concatenate(spans[-num_gate:])


@cache
def live_columns(layout: Layout, slot: int, blueprint: int, style: int, width: int) -> IntArray:
    """Return the columns that a seed of a member of this width really has."""
    index = layout.seed_start(slot, blueprint, width)[0].index
    own, gate = seed_columns(layout, slot, blueprint, style)
    return index if has_gate(style) else np.setdiff1d(index, np.setdiff1d(gate, own))


def check_ownership(sim: Simulation, members: IntArray, before: dict[str, torch.Tensor]) -> None:
    """Check that every host and every seed that trains has learned, and nothing else has changed.

    That each of its parameters learns as it should: `test_population` and `test_instances`.

    Args:
        sim: Just after training; its lifecycle state is still that of the training.
        members: Those trained. (m,).
        before: The matrices before training.
    """
    layout, state, sizes = sim.population.layout, sim.state.slots, sim.networks.sizes
    changed = {}
    for name in ("parameters", "momentum"):
        matrix = sim.population.storage.matrices[name]
        is_same = (matrix == before[name]) | (matrix.isnan() & before[name].isnan())
        changed[name] = ~is_same.numpy()
    may_change = np.zeros_like(changed["momentum"])
    for i in members.tolist():
        width = int(sim.instances.width[sim.state.episode.instance[i]])
        host = layout.host_start(width)[0].index
        learning, count = [host], len(host)
        for s in np.nonzero(state.stage[i] >= Stage.TRAINING)[0].tolist():
            if state.stage[i, s] != Stage.EMBARGOED:
                kind = s, int(state.blueprint[i, s]), int(state.style[i, s])
                own = live_columns(layout, *kind, width)
                count += len(own)
                if state.mode[i, s] != DOWN and not lifecycle.is_parked(state)[i, s]:
                    learning.append(own)
        untrained = sizes.seeds[i][state.stage[i] == Stage.GERMINATED].sum()
        assert count == sizes.host[i] + sizes.seeds[i].sum() - untrained
        is_sound = all(before[name][i].isfinite().all() for name in before)
        for own in learning:
            assert len(np.unique(own)) == len(own), "nothing is owned twice"
            assert changed["momentum"][i, own].any() or not is_sound
            may_change[i, own] = True
    for is_changed in changed.values():
        assert not is_changed[~may_change].any(), "something that does not train changed"


@cache
def outside_columns(layout: Layout, width: int, *seed: int) -> IntArray:
    """Return the columns that a host, or a seed (slot, blueprint), of this width leaves at zero."""
    start = (layout.seed_start(*seed, width) if seed else layout.host_start(width))[0]
    return np.setdiff1d(start.columns, start.index)


def check_corners(sim: Simulation) -> None:
    """Check that a narrow member is exactly zero outside its corner, momentum included."""
    layout, storage = sim.population.layout, sim.population.storage
    parameters, momentum = storage.parameters.numpy(), storage.momentum.numpy()
    for i, width in enumerate(sim.instances.width[sim.state.episode.instance].tolist()):
        outside = [outside_columns(layout, width)]
        outside += [
            outside_columns(layout, width, s, int(sim.state.slots.blueprint[i, s]))
            for s in np.nonzero(lifecycle.is_live(sim.state.slots.stage[i]))[0].tolist()
        ]
        columns = np.concatenate(outside)
        assert not parameters[i, columns].any()
        assert not momentum[i, columns].any()


def check_masks(envs: EsperVectorEnv, info: dict[str, Any]) -> None:
    """Check that every head has a legal option and that both forms of the mask agree."""
    conditional, marginal = envs.conditional_masks(), envs.action_masks()
    assert np.array_equal(info["action_mask"], marginal)
    assert np.array_equal(conditional["op"], conditional["slot"].any(axis=2))
    parts = [conditional["op"], conditional["slot"].any(axis=1)]
    for head in envs.heads[2:]:
        mask = conditional[head.name]
        assert np.array_equal(mask.any(axis=3), conditional["slot"])
        parts.append(mask.any(axis=(1, 2)))
    assert all(part.any(axis=1).all() for part in parts)
    assert np.array_equal(marginal, np.concatenate(parts, axis=1))
    assert conditional["op"][:, Op.WAIT].all()


def check_info(info: dict[str, Any], ended: BoolArray, whose: BoolArray) -> None:
    """Check keys, masks and the formulas that hold in any info.

    Args:
        info: Of a reset or step, or a final one.
        ended: Members whose test accuracy must be shown.
        whose: Members that the info speaks of.
    """
    keys = {key for key in info if not key.startswith("_")} - {"final_obs", "final_info"}
    assert keys - {"regime"} == INFO_KEYS
    assert {key[1:] for key in info if key.startswith("_")} == {
        key for key in info if not key.startswith("_")
    }
    for key in keys:
        is_test = key in ("test_accuracy", "committed_test_accuracy")
        assert np.array_equal(info[f"_{key}"], ended if is_test else whose), key
    for key, value in info["reward_terms"].items():
        if not key.startswith("_"):
            assert np.array_equal(info["reward_terms"][f"_{key}"], whose)
            assert np.isfinite(value).all()
    for key in keys - {"reward_terms"}:
        assert np.isfinite(info[key]).all(), key


def member_bytes(
    envs: EsperVectorEnv, member: int, ignore: tuple[str, ...] = ()
) -> dict[str, bytes]:
    """Return everything that one member's future depends on, by name, to compare bit by bit."""
    sim = envs.debug_state()
    arrays = {
        k: a[member].tobytes() for k, a in dict(sim.state.arrays()).items() if k not in ignore
    }
    return arrays | {
        k: t[member].numpy().tobytes() for k, t in sim.population.member_tensors().items()
    }


# Of the last call rather than of the episode, and so reset by any reset.
TRANSIENT = tuple(
    f"episode.{name}"
    for name in ("has_test", "is_rolled_back", "test_accuracy", "committed_test_accuracy")
)


# ------------------------------------------------------------------ the machine


@dataclass(frozen=True)
class Play:
    """Some legal steps; every rule begins with them, so that none is tried in one state only."""

    seed: int
    steps: int
    wanted: tuple[Op, ...]
    """Ops that are preferred, best first."""


PLAYS = st.builds(
    Play,
    seed=st.integers(0, 2**16),
    steps=st.integers(1, 9),
    wanted=st.sampled_from(PREFERENCES),
)
MATRICES = st.sampled_from(["parameters", "momentum", "buffers"])


class Machine(RuleBasedStateMachine):
    """A batch of mixed instances, a twin to compare with, and a small model of each member."""

    tally: Tally
    recorder: Recorder

    @initialize(
        num_envs=st.sampled_from([3, 3, 4]),
        seed=st.integers(0, 2**16),
        mode=st.sampled_from(["NextStep", "SameStep", "Disabled"]),
        attribution=st.sampled_from(["leave_one_out", "full"]),
        parameter_budget=st.sampled_from([16.0, 16.0, 1.0]),
        max_seeds=st.sampled_from([None, None, 1]),
        automatic_training=st.booleans(),
        chunk_size=st.sampled_from([None, None, 2]),
        task=st.sampled_from(["digits", "digits", "digits_contexts"]),
        objective=st.sampled_from(["final", "anytime"]),
        clock=st.sampled_from(["steps", "steps", "steps", "flops"]),
        graft=st.sampled_from([False, False, True]),
        parks=st.integers(0, 2),
    )
    def start(self, num_envs: int, seed: int, mode: str, parks: int, **config: Any) -> None:
        config |= {"parking": parks > 0, "parks_fossilized": parks > 1}
        options = {
            "instances": "train",
            "batches_per_step": 1,
            "batch_size": BATCH_SIZE,
            "episode_steps": EPISODE_STEPS,
            "snapshot_interval": 3,
            "learning_rate_decay": "linear",
            "max_rollbacks": MAX_ROLLBACKS,
            "autoreset_mode": mode,
            **config,
        }
        self.mode = mode
        self.envs, self.twin = make(num_envs, **options), make(num_envs, **options)
        self.everyone = np.ones(num_envs, dtype=bool)
        self.nobody = np.zeros(num_envs, dtype=bool)
        self.steps = np.zeros(num_envs, dtype=np.int64)
        self.rollbacks = np.zeros(num_envs, dtype=np.int64)
        self.total = np.zeros(num_envs)
        self.first_score = np.zeros(num_envs)
        self.earned = np.zeros(num_envs)
        self.regime = np.zeros(num_envs, dtype=np.int64)
        self.is_over = self.nobody.copy()
        observation, info = self.envs.reset(seed=seed)
        self.recorder.watched = self.envs.debug_state()
        self.begin(self.everyone, info)
        self.check_reset(observation, info)
        self.tally.count["examples"] += 1

    # -------------------------------------------------------------- rules

    @rule(play=PLAYS)
    def play_legally(self, play: Play) -> None:
        """Of some legal actions, each member takes the one whose op is wanted most."""
        rng = np.random.default_rng(play.seed)
        rank = np.full(len(Op), len(play.wanted))
        rank[list(play.wanted)] = np.arange(len(play.wanted))
        for _ in range(play.steps):
            self.revive()
            drawn = np.stack([self.envs.sample_valid_actions(rng) for _ in range(5)])
            best = rank[drawn[:, :, 0]].argmin(axis=0)
            self.step(drawn[best, np.arange(self.envs.num_envs)])
        self.revive()

    @rule(play=PLAYS)
    def play_illegally(self, play: Play) -> None:
        """What is illegal does to everything what WAIT would have done, bit by bit."""
        self.play_legally(play)
        rng = np.random.default_rng(play.seed)
        envs, twin = self.envs, self.twin
        for _ in range(2):
            self.revive()
            twin.set_state(envs.get_state())
            actions = rng.integers(
                0, [len(h.options) for h in envs.heads], (envs.num_envs, len(envs.heads))
            )
            legal = is_legal(envs.conditional_masks(), actions)
            waiting = np.where(legal[:, None], actions, 0)
            observation, reward, *_ = self.step(actions)
            expected = twin.step(waiting)
            self.tally.count["twin steps"] += 1
            self.tally.count["illegal actions"] += int((~legal).sum())
            assert np.array_equal(reward, expected[1])
            last_valid = envs.observation_names.index("last_action_valid")
            others = np.arange(observation.shape[1]) != last_valid
            assert np.array_equal(observation[:, others], expected[0][:, others])
            for i in range(envs.num_envs):
                ignore = ("progress.last_valid",)
                assert member_bytes(envs, i, ignore) == member_bytes(twin, i, ignore)

    @rule(
        play=PLAYS,
        member=st.integers(0, 3),
        matrices=st.lists(MATRICES, min_size=1, max_size=2),
        value=st.sampled_from([float("nan"), float("inf")]),
    )
    def poison_a_member(self, play: Play, member: int, matrices: list[str], value: float) -> None:
        self.play_legally(play)
        for matrix in matrices:
            self.revive()
            self.poison_once(member % self.envs.num_envs, matrix, value, play.seed)

    def poison_once(self, member: int, matrix: str, value: float, seed: int) -> None:
        """It rolls back in the next step with the penalty; the others are bitwise unchanged."""
        envs, twin = self.envs, self.twin
        if self.is_over[member]:
            return
        rng = np.random.default_rng(seed)
        sim, storage = envs.debug_state(), envs.debug_state().population.storage
        actions = envs.sample_valid_actions(rng)
        if envs.config.clock == "flops":
            # Without a batch nothing can diverge, and growing may leave none.
            actions[member] = 0
            if not (sim.draw_batches(np.array([member])).labels >= 0).any():
                return
        twin.set_state(envs.get_state())
        width = int(sim.instances.width[sim.state.episode.instance[member]])
        start = sim.population.layout.host_start(width)[matrix == "buffers"]
        storage.matrices[matrix][member, int(rng.choice(start.index))] = value
        saved = {name: t[member].clone() for name, t in storage.snapshots.items()}
        is_fossil = sim.state.slots.stage[member] == Stage.FOSSILIZED
        if actions[member, 0] == Op.FOSSILIZE:
            # It would save the poison: weights are finite after every step, unless poisoned.
            actions[member] = 0
        observation, reward, terminated, truncated, info = self.step(actions)
        expected = twin.step(actions)
        self.tally.count["twin steps"] += 1
        self.tally.count["poisonings"] += 1
        assert self.shown["reward_terms"]["rollback"][member] == -envs.config.rollback_penalty
        assert self.shown["_rolled_back"][member]
        assert self.shown["rolled_back"][member]
        for i in range(envs.num_envs):
            if i != member:
                assert member_bytes(envs, i, TRANSIENT) == member_bytes(twin, i, TRANSIENT)
        others = np.arange(envs.num_envs) != member
        for array, other in zip(
            (observation, reward, terminated, truncated), expected[:4], strict=True
        ):
            assert np.array_equal(array[others], other[others])
        for key in INFO_KEYS - {"reward_terms", "rolled_back"}:
            assert np.array_equal(info[key][others], expected[4][key][others])
        if self.mode != "SameStep" or not (terminated | truncated)[member]:
            for name, row in saved.items():
                assert torch.equal(storage.matrices[name][member], row)
            stage = sim.state.slots.stage[member]
            assert np.array_equal(stage == Stage.FOSSILIZED, is_fossil)
            assert not lifecycle.is_trial(sim.state.slots.stage[member]).any()

    @rule(
        play=PLAYS,
        bits=st.integers(1, 15),
        instance=st.none() | st.integers(0, SET_SIZES["train"] - 1),
        seed=st.none() | st.integers(0, 2**16),
    )
    def reset_some(self, play: Play, bits: int, instance: int | None, seed: int | None) -> None:
        """Those reset start a new episode of the given instance; the others keep every bit."""
        self.play_legally(play)
        envs = self.envs
        mask = (bits >> np.arange(envs.num_envs)) & 1 == 1
        if not mask.any():
            return
        options: dict[str, Any] = {"reset_mask": mask}
        if instance is not None:
            options["instance"] = (instance + np.arange(envs.num_envs)) % SET_SIZES["train"]
        before = [member_bytes(envs, i, TRANSIENT) for i in range(envs.num_envs)]
        shown = self.observation[~mask].copy()
        observation, info = envs.reset(seed=seed, options=options)
        for i in np.nonzero(~mask)[0].tolist():
            assert member_bytes(envs, i, TRANSIENT) == before[i]
        assert np.array_equal(observation[~mask], shown)
        if instance is not None:
            assert np.array_equal(info["instance"][mask], options["instance"][mask])
        self.begin(mask, info)
        self.check_reset(observation, info)
        self.tally.count["partial resets"] += 1

    @rule(play=PLAYS, seed=st.integers(0, 2**16))
    def reset_all(self, play: Play, seed: int) -> None:
        """The past does not matter: a twin with another past shows the same."""
        self.play_legally(play)
        observation, info = self.envs.reset(seed=seed)
        expected = self.twin.reset(seed=seed)
        assert_same((observation, info), expected)
        self.begin(self.everyone, info)
        self.check_reset(observation, info)
        self.tally.count["full resets"] += 1

    @rule(play=PLAYS)
    def copy_the_state(self, play: Play) -> None:
        """A second environment goes on from a copy, bitwise the same."""
        self.play_legally(play)
        envs, twin = self.envs, self.twin
        observation, info = twin.set_state(envs.get_state())
        assert np.array_equal(observation, self.observation)
        assert np.array_equal(info["action_mask"], envs.action_masks())
        actions = envs.sample_valid_actions(np.random.default_rng(play.seed))
        result = self.step(actions)
        assert_same(twin.step(actions), result)
        for i in range(envs.num_envs):
            assert member_bytes(twin, i) == member_bytes(envs, i)
        self.tally.count["twin steps"] += 1
        self.tally.count["state copies"] += 1

    @rule(play=PLAYS, source=st.integers(0, 3), shift=st.integers(1, 2))
    def fork_a_member(self, play: Play, source: int, shift: int) -> None:
        """The copy is its source to the bit, and so it is after the same action; others stay."""
        self.play_legally(play)
        envs = self.envs
        source %= envs.num_envs
        target = (source + shift) % envs.num_envs
        expected = [member_bytes(envs, i) for i in range(envs.num_envs)]
        expected[target] = expected[source]
        observation, info = envs.fork([source], [target])
        assert [member_bytes(envs, i) for i in range(envs.num_envs)] == expected
        assert np.array_equal(observation[source], self.observation[source])
        assert np.array_equal(observation[target], observation[source])
        for key in INFO_KEYS - {"reward_terms"}:
            assert np.array_equal(info[key][target], info[key][source])
        self.observation = observation
        model = self.steps, self.rollbacks, self.total, self.first_score, self.earned, self.is_over
        for array in model:
            array[target] = array[source]
        actions = envs.sample_valid_actions(np.random.default_rng(play.seed))
        actions[target] = actions[source]
        self.step(actions)
        for key in INFO_KEYS - {"reward_terms"}:
            assert np.array_equal(self.shown[key][target], self.shown[key][source]), key
        self.tally.count["forks"] += 1

    # -------------------------------------------------------------- one step, and its invariants

    def revive(self) -> None:
        """Without autoreset, start new episodes of the finished members."""
        if self.mode == "Disabled" and self.is_over.any():
            mask = self.is_over.copy()
            observation, info = self.envs.reset(options={"reset_mask": mask})
            self.begin(mask, info)
            self.check_reset(observation, info)

    def begin(self, members: BoolArray, info: dict[str, Any]) -> None:
        """Let the model start episodes."""
        self.steps[members] = self.rollbacks[members] = 0
        self.total[members] = self.earned[members] = 0.0
        is_final = self.envs.config.objective == "final"
        self.first_score[members] = info["score"][members] if is_final else 0.0
        self.regime[members] = info.get("regime", self.regime)[members]
        self.is_over[members] = False
        assert (info["stage"][members] == Stage.DORMANT).all()
        assert (info["parameters"][members] == 0).all()

    def check_reset(self, observation: Any, info: dict[str, Any]) -> None:
        self.recorder.take(self.envs.debug_state().state.slots)
        assert observation in self.envs.observation_space
        # Members that ended and are not reset yet still show how.
        check_info(info, self.is_over, self.everyone)
        check_masks(self.envs, info)
        check_corners(self.envs.debug_state())
        self.observation = observation

    def step(self, actions: IntArray) -> tuple[Any, ...]:
        """Step, check all that must hold, and keep in `shown` each member's own last info."""
        envs, sim = self.envs, self.envs.debug_state()
        legal, resetting = is_legal(envs.conditional_masks(), actions), self.is_over.copy()
        stage = np.where(resetting[:, None], int(Stage.DORMANT), sim.state.slots.stage)
        instance = sim.state.episode.instance.copy()
        result = envs.step(actions)
        observation, reward, terminated, truncated, info = result
        ended = terminated | truncated
        self.observation, self.shown = observation, info
        assert observation in envs.observation_space
        assert envs.single_observation_space.contains(observation[0])
        is_same_step = self.mode == "SameStep" and bool(ended.any())
        assert ("final_info" in info) == ("final_obs" in info) == is_same_step
        check_info(info, self.nobody if is_same_step else ended, self.everyone)
        if is_same_step:
            final = info["final_info"]
            check_info(final, ended, ended)
            assert np.array_equal(info["_final_info"], ended)
            assert np.array_equal(info["_final_obs"], ended)
            for i in range(envs.num_envs):
                shown = info["final_obs"][i]
                assert (shown in envs.single_observation_space) if ended[i] else shown is None
            self.shown = merge(info, final, ended)
        shown = self.shown

        # What was asked for was done.
        active = ~resetting
        assert np.array_equal(shown["action_valid"], legal | resetting)
        assert np.array_equal(shown["op"], np.where(legal & active, actions[:, 0], 0))
        acts = np.where((legal & active)[:, None], actions, 0)
        self.check_moves(acts, stage, shown)
        assert np.array_equal(shown["instance"][active], instance[active])

        # Rewards.
        terms = {k: v for k, v in shown["reward_terms"].items() if not k.startswith("_")}
        np.testing.assert_allclose(sum(terms.values()), reward, atol=1e-15)
        assert not reward[resetting].any()
        is_rolled_back = terms["rollback"] < 0
        penalty = -envs.config.rollback_penalty * is_rolled_back
        assert np.array_equal(terms["rollback"], penalty)
        assert np.array_equal(shown["rolled_back"], is_rolled_back)

        # Sizes and scores.
        layout, rent = sim.population.layout, envs.config.rent_weight
        width = sim.instances.width[shown["instance"]]
        grown, charged, committed = self.count_parameters(shown, width)
        assert np.array_equal(shown["parameters"], grown)
        host = [len(layout.host_start(w)[0].index) for w in width.tolist()]
        assert np.array_equal(shown["host_parameters"], host)
        score, objective = (
            accuracy - rent * np.log2(1 + count / np.array(host))
            for accuracy, count in (
                (shown["accuracy"], charged),
                (shown["committed_accuracy"], committed),
            )
        )
        self.earned[resetting] = 0.0
        if envs.config.objective == "anytime":
            self.earned[active] += score[active] / EPISODE_STEPS
            objective = self.earned
        np.testing.assert_allclose(shown["score"], score, atol=1e-12)
        np.testing.assert_allclose(shown["committed_score"], objective, atol=1e-12)
        check_masks(envs, info)
        check_corners(sim)

        # The course of the episodes.
        self.begin(resetting, info)
        self.steps[active] += 1
        self.rollbacks += is_rolled_back
        self.total += reward - terms["rollback"]
        if envs.config.clock == "steps":
            assert np.array_equal(shown["samples"], self.steps * BATCH_SIZE)
        else:
            # The budget is that of the hosts alone, and everything that grows costs some of it.
            budget = 6 * sim.population.host_multiply_adds[width] * self.steps * BATCH_SIZE
            assert (shown["flops"] <= budget).all()
            assert (shown["samples"] <= self.steps * BATCH_SIZE).all()
        assert np.array_equal(terminated, active & (self.rollbacks >= MAX_ROLLBACKS))
        assert np.array_equal(truncated, active & ~terminated & (self.steps >= EPISODE_STEPS))
        np.testing.assert_allclose(
            self.total[ended],
            (shown["committed_score"] - self.first_score)[ended],
            atol=TELESCOPE_TOLERANCE,
        )
        self.is_over = ended.copy()
        if is_same_step:
            self.begin(ended, info)

        count = self.tally.count
        count["steps"] += 1
        count["member steps"] += int(active.sum())
        count["rollbacks"] += int(is_rolled_back.sum())
        count["autoresets"] += int(resetting.sum() + is_same_step * ended.sum())
        count["terminated"] += int(terminated.sum())
        count["truncated"] += int(truncated.sum())
        if sim.task.regimes is not None:
            regimes = shown["regime"] != self.regime
            count["changes of regime"] += int((regimes & active & ~ended).sum())
            self.regime = info["regime"].copy()
        slots = sim.state.slots
        for stage_now in (Stage.HOLDING, Stage.FOSSILIZED):
            is_parked = lifecycle.is_parked(slots) & (slots.stage == stage_now)
            count[f"parked in {stage_now.name}"] += int(is_parked.sum())
        self.tally.stages.update(Stage(s).name for s in shown["stage"].reshape(-1))
        self.tally.ops.update(Op(op).name for op in acts[legal & active, 0])
        return result

    def check_moves(self, acts: IntArray, stage: IntArray, shown: dict[str, Any]) -> None:
        """Check that stages changed by moves of the table alone, and as the actions asked."""
        moves = self.recorder.take(self.envs.debug_state().state.slots)
        reached = stage.copy()
        by_slot: dict[tuple[int, int], list[tuple[Stage, Stage]]] = {}
        for member, slot, source, target in moves:
            assert reached[member, slot] == source
            reached[member, slot] = target
            assert (source, target) in TRANSITIONS
            by_slot.setdefault((member, slot), []).append((source, target))
            self.tally.transitions[source, target] += 1
        assert np.array_equal(shown["stage"], reached)
        speeds = self.envs.heads[6].options
        for i in range(self.envs.num_envs):
            for s in range(stage.shape[1]):
                made = by_slot.get((i, s), [])
                op = Op(acts[i, 0]) if acts[i, 1] == s else Op.WAIT
                assert ((Stage.DORMANT, Stage.GERMINATED) in made) == (op == Op.GERMINATE)
                assert ((Stage.HOLDING, Stage.FOSSILIZED) in made) == (op == Op.FOSSILIZE)
                assert made or op != Op.ADVANCE
                if op == Op.GERMINATE and shown["stage"][i, s] != Stage.EMBARGOED:
                    assert shown["blueprint"][i, s] == acts[i, 2]
                if op == Op.PRUNE and speeds[acts[i, 6]] == 0:
                    assert made[0] == (Stage(stage[i, s]), Stage.EMBARGOED)
        alpha, after = shown["alpha"], shown["stage"]
        assert ((alpha >= 0) & (alpha <= 1)).all()
        config = self.envs.config
        for stage_now, parks in (
            (Stage.HOLDING, config.parking),
            (Stage.FOSSILIZED, config.parks_fossilized),
        ):
            assert parks or (alpha[after == stage_now] == 1).all()
        assert (alpha[after == Stage.BLENDING] > 0).all()
        is_unblended = (after < Stage.BLENDING) | (after == Stage.EMBARGOED)
        assert (alpha[is_unblended] == 0).all()

    def count_parameters(self, shown: dict[str, Any], width: IntArray) -> IntArray:
        """Count columns of seeds: all, those paid for, those fossilized. (3, num_envs)."""
        layout = self.envs.debug_state().population.layout
        counts = np.zeros((3, self.envs.num_envs), dtype=np.int64)
        is_out = (shown["stage"] >= Stage.HOLDING) & (shown["alpha"] == 0)
        is_free = is_out
        if self.envs.config.objective == "anytime":
            is_free = shown["alpha"] == 0
        for i, s in np.argwhere((shown["stage"] > 0) & (shown["stage"] < Stage.EMBARGOED)).tolist():
            kind = s, int(shown["blueprint"][i, s]), int(self.recorder.style[i, s])
            size = len(live_columns(layout, *kind, int(width[i])))
            counts[0, i] += size
            counts[1, i] += size * (not is_free[i, s])
            counts[2, i] += size * (shown["stage"][i, s] == Stage.FOSSILIZED and not is_out[i, s])
        return counts


@pytest.mark.slow
def test_whatever_is_done_to_a_mixed_batch_its_invariants_hold(
    few_images: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Derandomized: every run is the same until the rules change, so the counts have slack."""
    Machine.tally = tally = Tally()
    Machine.recorder = Recorder(monkeypatch)
    count = tally.count
    for number in itertools.count():
        # How far a few examples get differs a lot, so there are as many as it takes.
        run_state_machine_as_test(
            hypothesis.seed(number)(Machine),
            settings=settings(
                max_examples=3,
                stateful_step_count=20,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate],  # Shrinking a failure takes five minutes.
                suppress_health_check=list(HealthCheck),
            ),
        )
        if count["steps"] + count["twin steps"] >= NUM_STEPS:
            break
    assert count["member steps"] >= 6000, tally
    for what in ("rollbacks", "partial resets", "full resets", "forks", "terminated"):
        assert count[what] >= 10, tally
    for what in ("parked in HOLDING", "parked in FOSSILIZED", "changes of regime"):
        assert count[what] >= 15, tally
    for what in ("illegal actions", "state copies", "autoresets", "truncated"):
        assert count[what] >= 20, tally
    assert tally.stages.keys() == {stage.name for stage in Stage}
    assert min(tally.stages.values()) >= 100, tally
    assert tally.ops.keys() == {op.name for op in Op}
    assert min(tally.ops.values()) >= 30, tally
    assert tally.transitions.keys() == TRANSITIONS
    assert min(tally.transitions.values()) >= 3, tally


# ------------------------------------------------------------------ the observation


def test_every_feature_of_the_observation_varies(few_images: None) -> None:
    """Finding PRE-14: no feature is constant over random play that reaches every stage.

    Play that is partly illegal, with gradients that explode behind a head of huge weights, in
    mixed instances, with Shapley values, and with germination that waits for ADVANCE.
    """
    rules = {"instances": "train", "attribution": "full", "automatic_training": False}
    sizes = {"batches_per_step": 1, "batch_size": 8, "episode_steps": 30}
    envs = make(12, **rules, **sizes, autoreset_mode="SameStep")
    seen = [envs.reset(seed=0)[0]]
    rng = np.random.default_rng(0)
    population = envs.debug_state().population
    weights = population.layout.head[0]
    span = slice(weights.offset, weights.offset + weights.spec.size)
    options = [len(head.options) for head in envs.heads]
    for step in range(90):
        actions = envs.sample_valid_actions(rng)
        actions[0] = rng.integers(0, options)
        masks = envs.conditional_masks()["slot"]
        for op in (Op.ADVANCE, Op.FOSSILIZE):  # Random play rarely gets there.
            for member in range(2, 6):
                if masks[member, op].any():
                    actions[member] = action(op, int(masks[member, op].argmax()))
        if step % 10 == 9:
            population.storage.parameters[1, span] *= 1e6
        seen.append(envs.step(actions)[0])
    is_constant = np.ptp(np.concatenate(seen), axis=0) == 0
    assert np.array(envs.observation_names)[is_constant].tolist() == []


def test_would_be_effect_is_that_of_the_network_at_alpha_one() -> None:
    """Finding SYN-M18: measured from the step after germination on, until the seed has weight.

    The validity bit is 0 before germination and once the seed is blended.
    """
    env = make(1, episode_steps=60, automatic_training=False)
    (observation,), _ = env.reset(seed=0)
    value, valid = (
        env.observation_names.index(f"slot_1.{name}") for name in ("would_be", "would_be_valid")
    )
    assert observation[valid] == observation[value] == 0
    (observation,) = env.step(waits(1))[0]
    assert observation[valid] == 0
    sim = env.debug_state()
    one_image = 1 / len(sim.splits.validation)
    stages, effects = set(), []
    played = [action(Op.GERMINATE, 1, blueprint=CONV_LIGHT), action(Op.ADVANCE, 1)]
    for act in [*played, *waits(12)]:
        (observation,), _, _, _, info = env.step(act[None])
        stages.add(Stage(info["stage"][0, 1]).name)
        assert observation[valid] == 1
        alphas = np.array([[0.0, 0.0], [0.0, 1.0]])
        result = sim.population.evaluate(
            np.zeros(2, dtype=np.int64), alphas, sim.networks.seeds, sim.splits.validation
        )
        # The prediction of at most one image may differ when other networks run beside it.
        assert result.accuracy[0] == pytest.approx(info["accuracy"][0], abs=1.01 * one_image)
        effect = result.accuracy[1] - result.accuracy[0]
        shown = observation[value] / CHANGE_SCALE
        assert shown == pytest.approx(effect, abs=1.01 * one_image)
        effects.append(effect)
    assert stages == {"GERMINATED", "TRAINING"}
    assert effects[0] == 0, "a seed is the identity at birth"
    assert max(np.abs(effects)) > 5 * one_image, "the test needs an effect to measure"
    (observation,), _, _, _, info = env.step(action(Op.ADVANCE, 1)[None])
    assert info["stage"][0, 1] == Stage.BLENDING
    assert observation[valid] == observation[value] == 0


# ------------------------------------------------------------------ batches


@pytest.mark.slow
@pytest.mark.parametrize("task", ["digits", "digits_sizing", "digits_contexts"])
def test_members_with_mixed_instances_equal_single_environments(task: str) -> None:
    """Bitwise, for a whole default episode: nothing depends on the other members of a batch."""
    seed, instance = 0, np.arange(16)
    envs = EsperVectorEnv(16, task=task, instances="train", autoreset_mode="Disabled")
    envs.reset(seed=seed, options={"instance": instance})
    widths = envs.debug_state().instances.width[instance]
    chosen = np.unique(widths, return_index=True)[1].tolist()
    assert task != "digits" or len(chosen) == 3, "the test needs every width"
    singles = []
    for i in chosen:
        single = EsperEnv(task=task, instances="train")
        single.reset(seed=seed + i, options={"instance": int(instance[i])})
        singles.append(single)
    rng = np.random.default_rng(seed)
    for _ in range(envs.config.episode_steps):
        actions = envs.sample_valid_actions(rng)
        observation, reward, *_, info = envs.step(actions)
        for i, single in zip(chosen, singles, strict=True):
            own, own_reward, *_, own_info = single.step(actions[i])
            np.testing.assert_array_equal(own, observation[i])
            assert own_reward == reward[i]
            for key in own_info.keys() - {"reward_terms"}:
                np.testing.assert_array_equal(own_info[key], info[key][i], err_msg=key)


def test_networks_do_not_depend_on_how_many_compositions_are_remembered(
    few_images: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise: forgotten before every call, and in arrays that had to grow."""
    observations, sizes = [], []
    for limit in (program_cache.MAX_PROGRAMS, 0):
        monkeypatch.setattr(program_cache, "MAX_PROGRAMS", limit)
        envs = make(8, instances="train", batches_per_step=1, batch_size=4, episode_steps=40)
        envs.reset(seed=0)
        observations.append([result[0] for result in play(envs, 39)])
        engine = envs.debug_state().population.compiled
        assert engine is not None
        sizes.append(len(engine.programs))
    assert sizes[0] > 64 > 8 >= sizes[1]
    np.testing.assert_array_equal(*observations)


def test_a_copy_of_a_finished_member_is_finished_too() -> None:
    """Members that end at different times, which the machine rarely copies in that very moment."""
    envs = make(2, episode_steps=3)
    envs.reset(seed=0)
    wait = waits(2)
    envs.step(wait)
    envs.reset(options={"reset_mask": np.array([False, True])})
    envs.step(wait)
    assert envs.step(wait)[3].tolist() == [True, False]
    envs.fork([0], [1])
    _, reward, _, truncated, info = envs.step(wait)
    assert not reward.any()
    assert not truncated.any()
    assert info["samples"].tolist() == [0, 0], "both start their next episode"


# ------------------------------------------------------------------ memory


@pytest.mark.usefixtures("few_images", "threads")
def test_episodes_with_rollbacks_leave_no_tensor_behind() -> None:
    """Finding SYN-C7: as many tensors of as many bytes after 25 episodes as after 5."""
    torch.set_num_threads(2)
    envs = make(4, instances="train", batches_per_step=1, batch_size=4, snapshot_interval=1)
    rng = np.random.default_rng(0)
    measured = {}
    num_rollbacks = 0
    for episode in range(1, 26):
        envs.reset(seed=episode)
        for step in range(8):
            if step == 5:
                poison(envs, episode % 4)
            *_, info = envs.step(envs.sample_valid_actions(rng))
            num_rollbacks += int(info["rolled_back"].sum())
        if episode in (5, 25):
            # With no seeds, so that the one cached program is that of bare hosts.
            envs.reset(seed=0)
            envs.step(waits(4))
            # A helper that comes late, whom nobody waits for, holds tensors until it has come.
            _pool(1, os.getpid()).submit(int).result()
            measured[episode] = live_tensors()
    assert num_rollbacks >= 25
    assert measured[5] == measured[25]


def live_tensors() -> tuple[int, int]:
    """Return the number of tensors that exist, and the bytes of their distinct storages."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return len(tensors), sum(storages.values())


# ------------------------------------------------------------------ known defects


def test_a_rollback_is_shown_when_another_member_is_reset_in_the_same_step() -> None:
    envs = make(2, autoreset_mode="SameStep", episode_steps=3)
    envs.reset(seed=0)
    wait = waits(2)
    envs.step(wait)
    envs.reset(options={"reset_mask": np.array([False, True])})
    envs.step(wait)
    poison(envs, 1)
    _, _, _, truncated, info = envs.step(wait)
    assert truncated.tolist() == [True, False]
    assert info["reward_terms"]["rollback"].tolist() == [0, -envs.config.rollback_penalty]
    assert info["rolled_back"][1]
