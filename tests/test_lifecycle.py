"""The life of a seed: transitions, alpha ramps, gates, embargo, and a random walk over all of it.

The table of transitions, the gates and the easing formulas are restated here from the design,
section 4, so that a change of the code alone cannot move both sides.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import itertools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_env.config import BoolArray, Curve, EnvConfig, Op, Stage
from esper_env.growth import lifecycle
from esper_env.growth import state as state_module
from esper_env.growth.state import DOWN, HOLD, UP, Measurements, SlotState
from tests.builders import (
    HOST_PARAMETERS,
    LIVE,
    SEED_PARAMETERS,
    TRANSITIONS,
    Step,
    move,
    request,
    seed_in,
    walk,
)

EXACT = 1e-12
"""Tolerance of float64 formulas that differ only in the order of a few operations."""
MANUAL = EnvConfig(automatic_training=False, automatic_blending=False, automatic_holding=False)
Gate = Callable[..., BoolArray]


def act(state: SlotState, measured: Measurements, config: EnvConfig, op: Op, **fields: Any) -> None:
    lifecycle.apply(state, measured, request(op, **fields), config)


def tick(state: SlotState, measured: Measurements, config: EnvConfig) -> None:
    lifecycle.tick(state, measured, np.ones(len(state.stage), dtype=bool), config)


def arguments_of(
    gate: Gate, state: SlotState, measured: Measurements, config: EnvConfig
) -> dict[str, Any]:
    """Return the arguments of a gate, by name."""
    values = {
        "state": state,
        "at": ...,
        "measured": measured,
        "config": config,
        "target": 0.5,
        "seed_parameters": SEED_PARAMETERS[: state.stage.shape[1]],
        "host_parameters": HOST_PARAMETERS,
    }
    return {name: values[name] for name in inspect.signature(gate).parameters}


def passes(gate: Gate, *what: Any) -> bool:
    """Whether slot 0 of member 0 passes, with the smallest blueprint."""
    return bool(gate(**arguments_of(gate, *what)).flat[0])


# ------------------------------------------------------------------ the table


def test_the_table_holds_exactly_the_transitions_of_the_design() -> None:
    assert lifecycle.TRANSITIONS == TRANSITIONS


@pytest.mark.parametrize(("source", "target"), list(itertools.product(Stage, Stage)))
def test_a_transition_that_is_not_listed_raises(source: Stage, target: Stage) -> None:
    state = SlotState.empty(1, 1)
    state.stage[:] = source
    at = (np.array([0]), np.array([0]))
    if (source, target) in TRANSITIONS:
        move(state, at, target)
        assert state.stage[0, 0] == target
    else:
        with pytest.raises(RuntimeError, match=f"{source.name} -> {target.name}"):
            move(state, at, target)
        assert state.stage[0, 0] == source


def _embargo_ends(state: SlotState, measured: Measurements, config: EnvConfig) -> None:
    tick(state, measured, config)
    tick(state, measured, config)


_WAYS: dict[str, tuple[Stage, Callable[[SlotState, Measurements, EnvConfig], None]]] = {
    "germinate": (Stage.DORMANT, lambda *s: act(*s, Op.GERMINATE)),
    "advance to training": (Stage.GERMINATED, lambda *s: act(*s, Op.ADVANCE)),
    "advance to blending": (Stage.TRAINING, lambda *s: act(*s, Op.ADVANCE)),
    "advance to holding": (Stage.BLENDING, lambda *s: act(*s, Op.ADVANCE)),
    "fossilize": (Stage.HOLDING, lambda *s: act(*s, Op.FOSSILIZE)),
    "set alpha": (Stage.HOLDING, lambda *s: act(*s, Op.SET_ALPHA, target=0.5)),
    "prune at once": (Stage.TRAINING, lambda *s: act(*s, Op.PRUNE, speed=0)),
    "prune with a ramp": (Stage.HOLDING, lambda *s: act(*s, Op.PRUNE)),
    "tick to training": (Stage.GERMINATED, tick),
    "tick to blending": (Stage.TRAINING, tick),
    "tick to holding": (Stage.BLENDING, tick),
    "embargo ends": (Stage.EMBARGOED, _embargo_ends),
}


@pytest.mark.parametrize("way", _WAYS)
def test_every_way_to_change_a_stage_asks_the_one_table(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real table each way changes the stage, with an empty one each raises.

    Finding LOOP-4.
    """
    source, go = _WAYS[way]
    config = EnvConfig(automatic_blending=True)
    state, measured = seed_in(source)
    go(state, measured, config)
    assert state.stage[0, 0] != source

    monkeypatch.setattr(lifecycle, "_IS_LEGAL", np.zeros((len(Stage), len(Stage)), dtype=bool))
    state, measured = seed_in(source)
    with pytest.raises(RuntimeError, match="transitions not in the table"):
        go(state, measured, config)


RISES = {"mode": UP, "alpha": 0.6, "ramp_step": 1, "ramp_length": 3}


@pytest.mark.parametrize(
    ("op", "stage", "fields"),
    [
        (Op.ADVANCE, Stage.HOLDING, {}),
        (Op.SET_ALPHA, Stage.TRAINING, {}),
        (Op.SET_ALPHA, Stage.BLENDING, RISES),
        (Op.SET_ALPHA, Stage.BLENDING, RISES | {"mode": DOWN}),
        (Op.PRUNE, Stage.FOSSILIZED, {}),
        (Op.PRUNE, Stage.DORMANT, {}),
        (Op.PRUNE, Stage.BLENDING, RISES),
        (Op.PRUNE, Stage.BLENDING, RISES | {"mode": DOWN}),
        (Op.FOSSILIZE, Stage.BLENDING, {}),
    ],
)
@pytest.mark.parametrize("speed", [0, 3])
def test_an_op_that_its_gate_rejects_is_never_carried_out(
    op: Op, stage: Stage, fields: dict[str, Any], speed: int
) -> None:
    """A ramp in progress, for example, is never given another target."""
    state, measured = seed_in(stage, **fields)
    with pytest.raises(RuntimeError, match="illegal in the current state"):
        act(state, measured, EnvConfig(), op, speed=speed, target=0.5)
    assert state.stage[0, 0] == stage


# ------------------------------------------------------------------ easing and ramps


EASED = {
    Curve.LINEAR: (0.25, 1 / 3),
    Curve.COSINE: (0.1464466094067262, 0.25),
    Curve.SIGMOID_6: (0.14914645207033284, 0.24472847105479767),
    Curve.SIGMOID_12: (0.04517665973091217, 0.11731042782619838),
    Curve.SIGMOID_24: (0.002466509291360053, 0.017980286735531537),
}
"""Values of each curve at 1/4 and at 1/3."""


def test_easing_follows_the_formula_of_the_curve_of_each_element() -> None:
    """Linear is t. Cosine at 1/4 is (1 - sqrt(1/2)) / 2, at 1/3 it is (1 - 1/2) / 2.

    Sigmoid: s(x) = (1 + tanh(x/2)) / 2 turns the design's quotient into
    (1 + tanh(k(2t - 1)/4) / tanh(k/4)) / 2. At t = 1/4 and k = 6 that is
    (1 - tanh(0.75) / tanh(1.5)) / 2 = (1 - 0.635149 / 0.905148) / 2 = 0.149146. The
    other values follow in the same way. All curves are point-symmetric about (1/2, 1/2).
    """
    assert list(EASED) == list(Curve)
    t = np.array([0.0, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 3 / 4, 1.0])
    expected = [[0.0, a, b, 0.5, 1 - b, 1 - a, 1.0] for a, b in EASED.values()]
    curves, times = np.meshgrid([int(curve) for curve in EASED], t, indexing="ij")
    np.testing.assert_allclose(lifecycle.ease(curves, times), expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("curve", Curve)
def test_easing_rises_from_exactly_0_to_exactly_1(curve: Curve) -> None:
    t = np.linspace(0, 1, 97)
    eased = lifecycle.ease(np.full(t.shape, int(curve)), t)
    assert eased[0] == 0.0
    assert eased[-1] == 1.0
    assert (np.diff(eased) > 0).all()


@pytest.mark.parametrize(
    ("stage", "op", "target"),
    [
        (Stage.TRAINING, Op.ADVANCE, 0.5),
        (Stage.TRAINING, Op.ADVANCE, 0.7),
        (Stage.TRAINING, Op.ADVANCE, 1.0),
        (Stage.HOLDING, Op.SET_ALPHA, 0.7),
        # In float64 1 + (0.1 - 1) * 1 is 0.09999999999999998, which only easing would give.
        (Stage.HOLDING, Op.SET_ALPHA, 0.1),
    ],
)
@pytest.mark.parametrize("length", [1, 3, 5, 8])
@pytest.mark.parametrize("curve", Curve)
def test_a_ramp_follows_its_curve_and_lands_exactly_on_its_last_tick(
    curve: Curve, length: int, stage: Stage, op: Op, target: float
) -> None:
    """After k of N ticks alpha is start + (target - start) * ease(k / N), on its way for k < N."""
    planned = {"tempo": length, "first_target": target, "curve": int(curve)}
    asked = {"speed": length, "target": target, "curve": int(curve)}
    state, measured = seed_in(stage, **(planned if op == Op.ADVANCE else {}))
    start = float(state.alpha[0, 0])
    act(state, measured, MANUAL, op, **(asked if op == Op.SET_ALPHA else {}))
    alphas = [start]
    for k in range(1, length + 1):
        assert state.alpha[0, 0] == alphas[-1]
        assert state.mode[0, 0] == (UP if target > start else DOWN)
        tick(state, measured, MANUAL)
        share = lifecycle.ease(np.array([int(curve)]), np.array([k / length]))[0]
        assert abs(state.alpha[0, 0] - (start + (target - start) * share)) < EXACT
        alphas.append(float(state.alpha[0, 0]))
    assert (np.diff(alphas) * (target - start) > 0).all()
    for _ in range(2):
        assert (state.stage[0, 0], state.mode[0, 0]) == (Stage.BLENDING, HOLD)
        assert state.alpha[0, 0] == target
        tick(state, measured, MANUAL)


def test_set_alpha_at_speed_0_lands_at_once_and_changes_how_the_seed_mixes() -> None:
    state, measured = seed_in(Stage.HOLDING, style=0)
    asked = {"target": 0.5, "speed": 0, "style": 3, "curve": int(Curve.COSINE)}
    act(state, measured, MANUAL, Op.SET_ALPHA, **asked)
    for _ in range(2):
        assert (state.stage[0, 0], state.mode[0, 0]) == (Stage.BLENDING, HOLD)
        assert (state.alpha[0, 0], state.style[0, 0]) == (0.5, 3)
        assert state.curve[0, 0] == Curve.COSINE
        tick(state, measured, MANUAL)


# ------------------------------------------------------------------ prune and embargo


def assert_slot_is_empty(state: SlotState, env: int, slot: int) -> None:
    """Everything but stage, time in the stage and cooldown is as in a fresh state."""
    fresh = SlotState.empty(1, 1)
    for name, array in state._asdict().items():
        if name not in ("stage", "stage_steps", "cooldown"):
            assert array[env, slot] == getattr(fresh, name)[0, 0], name


@pytest.mark.parametrize("stage", LIVE[:-1])
def test_a_prune_at_speed_0_removes_the_seed_and_what_was_measured_of_it(stage: Stage) -> None:
    state, measured = seed_in(stage)
    act(state, measured, MANUAL, Op.PRUNE, speed=0)
    assert state.stage[0, 0] == Stage.EMBARGOED
    assert_slot_is_empty(state, 0, 0)
    for name, array in measured._asdict().items():
        assert array[0, 0] == 0, name


@pytest.mark.parametrize("source", [Stage.BLENDING, Stage.HOLDING])
@pytest.mark.parametrize("length", [3, 5, 8])
def test_a_prune_with_a_ramp_removes_the_seed_when_the_ramp_ends(
    source: Stage, length: int
) -> None:
    """HOLDING -> BLENDING at the decision, BLENDING -> EMBARGOED on the tick that lands on 0."""
    state, measured = seed_in(source)
    act(state, measured, EnvConfig(), Op.PRUNE, speed=length)
    for _ in range(length):
        assert state.stage[0, 0] == Stage.BLENDING
        assert state.mode[0, 0] == DOWN
        assert state.is_pruning[0, 0]
        assert state.alpha[0, 0] > 0
        assert measured.has_contribution[0, 0]
        tick(state, measured, EnvConfig())
    assert state.stage[0, 0] == Stage.EMBARGOED
    assert_slot_is_empty(state, 0, 0)
    assert not measured.has_contribution[0, 0]


@pytest.mark.parametrize("speed", [0, 3])
@pytest.mark.parametrize("embargo_steps", [1, 2, 3, 5])
def test_a_slot_stays_closed_for_exactly_embargo_steps_decisions(
    embargo_steps: int, speed: int
) -> None:
    """A decision sees the slot closed E times, with E, E-1, ..., 1 decisions left. Finding PRE-4.

    The tick that follows the prune in the same step must not count, whichever of the two it was.
    """
    config = EnvConfig(embargo_steps=embargo_steps)
    state, measured = seed_in(Stage.HOLDING)
    act(state, measured, config, Op.PRUNE, speed=speed)
    for _ in range(max(speed, 1)):
        tick(state, measured, config)
    for left in range(embargo_steps, 0, -1):
        assert state.stage[0, 0] == Stage.EMBARGOED
        assert state.cooldown[0, 0] == left
        assert not passes(lifecycle.can_germinate, state, measured, config)
        tick(state, measured, config)
    assert state.stage[0, 0] == Stage.DORMANT
    assert passes(lifecycle.can_germinate, state, measured, config)


# ------------------------------------------------------------------ gates


def test_a_seed_may_use_the_parameter_budget_up_to_its_last_parameter() -> None:
    """Budget 2 * 100. The seeds of slots 0 and 1 take 30 + 120, so 50 fit and 51 do not."""
    state = SlotState.empty(1, 3)
    state.stage[0] = [Stage.FOSSILIZED, Stage.TRAINING, Stage.DORMANT]
    state.blueprint[0] = [1, 0, -1]
    table = np.array([[7, 30, 8], [120, 9, 9], [50, 51, 1]])
    config = EnvConfig(parameter_budget=2.0)
    assert lifecycle.used_parameters(state, table).tolist() == [150]
    gate = lifecycle.can_germinate(state, table, HOST_PARAMETERS, config)
    assert gate[0].tolist() == [[False] * 3, [False] * 3, [True, False, True]]


def test_germination_records_what_was_asked_and_forgets_what_was_measured() -> None:
    state, measured = seed_in(Stage.DORMANT)
    for array in measured:
        array[:] = 1
    act(state, measured, MANUAL, Op.GERMINATE, blueprint=2, style=2, tempo=8, target=0.7)
    got = {name: array[0, 0] for name, array in state._asdict().items()}
    asked = {"stage": Stage.GERMINATED, "blueprint": 2, "style": 2, "tempo": 8}
    asked |= {"first_target": 0.7, "curve": Curve.SIGMOID_12}
    assert got == {name: asked.get(name, 0) for name in got}
    for name, array in measured._asdict().items():
        assert array[0, 0] == 0, name


@pytest.mark.parametrize("least", [1, 2, 4])
@pytest.mark.parametrize(
    ("gate", "setting", "stage", "op"),
    [
        (lifecycle.can_blend, "min_training_steps", Stage.GERMINATED, Op.ADVANCE),
        (lifecycle.can_prune, "min_prune_age", Stage.DORMANT, Op.GERMINATE),
    ],
)
def test_a_gate_opens_after_exactly_its_waiting_time(
    gate: Gate, setting: str, stage: Stage, op: Op, least: int
) -> None:
    """The step of the op itself counts: the seed is 1 env step old at the next decision."""
    config = dataclasses.replace(MANUAL, **{setting: least})
    state, measured = seed_in(stage)
    act(state, measured, config, op)
    seen = []
    for _ in range(least + 2):
        seen.append(passes(gate, state, measured, config))
        tick(state, measured, config)
    assert seen == [False] * least + [True, True]


@pytest.mark.parametrize("gate", [lifecycle.can_blend, lifecycle.can_advance])
@pytest.mark.parametrize(
    ("is_open", "fields"),
    [
        (True, {}),
        (True, {"health": 0.7}),
        (True, {"stage_steps": 2}),
        (False, {"health": 0.6999}),
        (False, {"stage_steps": 1}),
        (False, {"exploding": 0.001}),
        (False, {"has_gradient": False}),
    ],
)
def test_gate_2_needs_time_and_a_healthy_gradient(
    gate: Gate, is_open: bool, fields: dict[str, Any]
) -> None:
    """Without a measured gradient even a perfect health does not pass. Finding GRD-M5."""
    assert passes(gate, *seed_in(Stage.TRAINING, **fields), EnvConfig()) == is_open


STRICT = {"strict_fossilize": True, "min_contribution": 0.1}
NO_CREDIT = {"attribution": "none"}


@pytest.mark.parametrize(
    ("gate", "is_open", "stage", "rules", "fields"),
    [
        (lifecycle.can_hold, True, Stage.BLENDING, {}, {}),
        (lifecycle.can_hold, False, Stage.BLENDING, {}, {"alpha": 0.7, "alpha_target": 0.7}),
        (lifecycle.can_hold, False, Stage.BLENDING, {}, {"alpha": 0.9, "mode": UP}),
        (lifecycle.can_hold, False, Stage.BLENDING, {}, {"mode": DOWN}),
        (lifecycle.can_hold, False, Stage.TRAINING, {}, {"alpha": 1.0}),
        (lifecycle.can_hold, False, Stage.HOLDING, {}, {}),
        (lifecycle.can_fossilize, True, Stage.HOLDING, {}, {"contribution": -0.5}),
        (lifecycle.can_fossilize, False, Stage.BLENDING, {}, {"contribution": -0.5}),
        (lifecycle.can_fossilize, False, Stage.HOLDING, {}, {"has_contribution": False}),
        (lifecycle.can_fossilize, True, Stage.HOLDING, STRICT, {"contribution": 0.1}),
        (lifecycle.can_fossilize, False, Stage.HOLDING, STRICT, {"contribution": 0.0999}),
        (lifecycle.can_fossilize, False, Stage.BLENDING, STRICT, {"contribution": 0.1}),
        (lifecycle.can_fossilize, False, Stage.HOLDING, STRICT, {"has_contribution": False}),
        (lifecycle.can_fossilize, True, Stage.HOLDING, NO_CREDIT, {"has_contribution": False}),
        (lifecycle.can_fossilize, False, Stage.BLENDING, NO_CREDIT, {"has_contribution": False}),
    ],
)
def test_gates_3_and_5_by_hand(
    gate: Gate, is_open: bool, stage: Stage, rules: dict[str, Any], fields: dict[str, Any]
) -> None:
    """Gate 3 needs a ramp that has landed on 1.

    Gate 5 needs a measured contribution, and in strict mode a large one.
    """
    assert passes(gate, *seed_in(stage, **fields), EnvConfig(**rules)) == is_open


@pytest.mark.parametrize("is_automatic", [True, False])
@pytest.mark.parametrize(
    ("option", "source", "target"),
    [
        ("automatic_training", Stage.GERMINATED, Stage.TRAINING),
        ("automatic_blending", Stage.TRAINING, Stage.BLENDING),
        ("automatic_holding", Stage.BLENDING, Stage.HOLDING),
    ],
)
def test_a_tick_advances_a_seed_exactly_if_its_option_says_so(
    option: str, source: Stage, target: Stage, is_automatic: bool
) -> None:
    """ADVANCE does the same by hand when the option is off."""
    config = dataclasses.replace(MANUAL, **{option: is_automatic})
    state, measured = seed_in(source)
    tick(state, measured, config)
    assert state.stage[0, 0] == (target if is_automatic else source)
    if not is_automatic:
        act(state, measured, config, Op.ADVANCE)
        assert state.stage[0, 0] == target


def test_automatic_blending_waits_for_gate_2() -> None:
    config = EnvConfig(automatic_blending=True)
    state, measured = seed_in(Stage.TRAINING, has_gradient=False)
    tick(state, measured, config)
    assert state.stage[0, 0] == Stage.TRAINING
    measured.has_gradient[:] = True
    tick(state, measured, config)
    assert state.stage[0, 0] == Stage.BLENDING


def test_no_option_fossilizes_a_seed() -> None:
    config = EnvConfig(automatic_blending=True)
    state, measured = seed_in(Stage.HOLDING)
    for _ in range(30):
        tick(state, measured, config)
    assert state.stage[0, 0] == Stage.HOLDING


_GATES = (
    lifecycle.can_germinate,
    lifecycle.can_train,
    lifecycle.can_blend,
    lifecycle.can_hold,
    lifecycle.can_advance,
    lifecycle.can_set_alpha,
    lifecycle.can_prune,
    lifecycle.can_fossilize,
)


@pytest.mark.parametrize("gate", _GATES)
def test_gates_read_state_measurements_and_rules_and_change_none(gate: Gate) -> None:
    """Nothing else can reach a gate: no global, no telemetry, no history. Finding PRE-7.

    Two calls on equal arguments agree, and whatever a diagnosis would add to the measurements
    (norms, severities of vanishing, velocities, interactions) makes no difference.
    """
    rng = np.random.default_rng(0)
    has_passed = has_refused = False
    for step in walk(MANUAL, rng, num_envs=32, num_steps=60, restart_share=0.02):
        chosen = arguments_of(gate, step.before, step.measured, MANUAL)
        kept = copy.deepcopy(chosen)
        first = gate(**chosen)
        for name in chosen.keys() & {"state", "measured"}:
            assert_equal_fields(chosen[name], kept[name])
        if "measured" in chosen:
            unread = kept["measured"]
            for field in ("gradient_norm", "vanishing", "contribution_velocity", "interaction"):
                getattr(unread, field)[:] = rng.normal(size=unread.health.shape)
            unread.has_interaction[:] = rng.random(unread.health.shape) < 0.5
            unread.contribution_age[:] = rng.integers(0, 9, unread.health.shape)
        assert (gate(**kept) == first).all()
        has_passed |= bool(first.any())
        has_refused |= not first.all()
    assert has_passed
    assert has_refused


def test_the_lifecycle_imports_nothing_but_numpy_and_the_configuration() -> None:
    """So neither telemetry nor the networks can have a say in a gate. Finding PRE-7."""
    known = {"numpy", "numpy.typing", "esper_env.config", "esper_env.growth.state"}
    for module in (lifecycle, state_module):
        tree = ast.parse(inspect.getsource(module))
        nodes = list(ast.walk(tree))
        names = {node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)}
        names |= {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
        outside = {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}
        assert outside == known
        known = {"numpy", "numpy.typing", "esper_env.config", "esper_env.rng"}


# ------------------------------------------------------------------ random walks


def assert_equal_fields(left: Any, right: Any, where: Any = slice(None)) -> None:
    for name, one, other in zip(left._fields, left, right, strict=True):
        assert np.array_equal(one[where], other[where]), name


def changes(source: SlotState, target: SlotState) -> set[tuple[int, int]]:
    """Return the pairs of stages between which some slot has moved."""
    moved = source.stage != target.stage
    pairs = zip(source.stage[moved].tolist(), target.stage[moved].tolist(), strict=True)
    return set(pairs)


def check_invariants(state: SlotState, config: EnvConfig) -> None:
    """Assert what must hold of every slot between any two operations."""
    stage = state.stage
    assert np.isin(stage, [int(s) for s in Stage]).all()
    assert ((state.alpha >= 0) & (state.alpha <= 1)).all()
    assert (stage[state.is_pruning] == Stage.BLENDING).all()
    # Outside of BLENDING alpha is 1, unless the seed is parked, put back, or on the way.
    parks = (stage == Stage.HOLDING) & config.parking
    parks |= (stage == Stage.FOSSILIZED) & config.parks_fossilized
    is_whole = ((stage == Stage.HOLDING) | (stage == Stage.FOSSILIZED)) & ~parks
    assert (state.alpha[is_whole] == 1.0).all()
    assert (state.mode[~parks & (stage != Stage.BLENDING)] == HOLD).all()
    assert np.isin(state.alpha[parks & (state.mode == HOLD)], (0, 1)).all()
    is_out = parks & (state.alpha == 0) & (state.mode == HOLD)
    assert np.array_equal(lifecycle.is_parked(state), is_out)
    is_live = np.isin(stage, [int(s) for s in LIVE])
    assert (lifecycle.is_live(stage) == is_live).all()
    assert ((state.blueprint >= 0) == is_live).all()
    assert ((state.style >= 0) == is_live).all()
    is_closed = stage == Stage.EMBARGOED
    assert ((state.cooldown >= 0) & (state.cooldown <= config.embargo_steps)).all()
    assert ((state.cooldown > 0) == is_closed).all()
    fresh = SlotState.empty(*stage.shape)
    for name, value, default in zip(state._fields, state, fresh, strict=True):
        assert value.dtype == default.dtype, name
        assert (value == default)[stage == Stage.DORMANT].all(), name
        if name not in ("stage", "stage_steps", "cooldown"):
            assert (value == default)[is_closed].all(), name
    limit = stage.shape[1] if config.max_seeds is None else config.max_seeds
    assert (is_live.sum(axis=1) <= limit).all()
    used = np.where(is_live, SEED_PARAMETERS[np.arange(stage.shape[1]), state.blueprint], 0)
    assert (used.sum(axis=1) <= config.parameter_budget * HOST_PARAMETERS).all()


def check_step(step: Step, config: EnvConfig) -> set[tuple[int, int]]:
    """Assert what must hold across one decision and its tick; return the stage changes."""
    check_invariants(step.acted, config)
    check_invariants(step.after, config)
    seen = changes(step.before, step.acted) | changes(step.acted, step.after)
    if config.graft and (Stage.DORMANT, Stage.HOLDING) in seen:  # Two moves of one op.
        seen.remove((Stage.DORMANT, Stage.HOLDING))
        seen |= {(Stage.DORMANT, Stage.GERMINATED), (Stage.GERMINATED, Stage.HOLDING)}
    assert seen <= TRANSITIONS
    # Fossils are for good, and an action moves one slot at most.
    assert (step.after.stage[step.before.stage == Stage.FOSSILIZED] == Stage.FOSSILIZED).all()
    assert ((step.before.stage != step.acted.stage).sum(axis=1) <= 1).all()
    assert_equal_fields(step.acted, step.after, ~step.active)
    # Time passes by one for who stays, and the controller moves alpha only toward its target.
    stays = step.active[:, None] & (step.acted.stage == step.after.stage)
    lives = stays & lifecycle.is_live(step.acted.stage)
    assert (step.after.age[lives] == step.acted.age[lives] + 1).all()
    in_stage = stays & (step.acted.stage != Stage.DORMANT)
    assert (step.after.stage_steps[in_stage] == step.acted.stage_steps[in_stage] + 1).all()
    rise = step.after.alpha - step.acted.alpha
    is_ramping = lives & (step.acted.mode != HOLD)
    assert (rise[lives & (step.acted.mode == HOLD)] == 0).all()
    assert (rise[is_ramping & (step.acted.mode == UP)] > 0).all()
    assert (rise[is_ramping & (step.acted.mode == DOWN)] < 0).all()
    return seen


CONFIGS = st.builds(
    lambda credit, parks, **fields: EnvConfig(
        **credit, **fields, parking=parks > 0, parks_fossilized=parks > 1
    ),
    credit=st.sampled_from(
        [
            {"attribution": "none"},
            {"attribution": "leave_one_out"},
            {"strict_fossilize": True, "min_contribution": 0.02},
        ]
    ),
    embargo_steps=st.integers(1, 4),
    min_training_steps=st.integers(1, 3),
    min_prune_age=st.integers(1, 4),
    max_seeds=st.sampled_from([None, 1, 2]),
    parameter_budget=st.sampled_from([0.5, 1.0, 2.0, 16.0]),
    automatic_training=st.booleans(),
    automatic_blending=st.booleans(),
    automatic_holding=st.booleans(),
    graft=st.booleans(),
    parks=st.integers(0, 2),
)


@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(config=CONFIGS, rng_seed=st.integers(0, 2**32 - 1), num_slots=st.integers(1, 3))
def test_random_legal_lives_keep_every_invariant(
    config: EnvConfig, rng_seed: int, num_slots: int
) -> None:
    """About 25 x 40 x 24 random decisions under random rules, some members resting."""
    rng = np.random.default_rng(rng_seed)
    for step in walk(
        config,
        rng,
        num_envs=24,
        num_steps=40,
        num_slots=num_slots,
        active_share=0.9,
        restart_share=0.02,
    ):
        check_step(step, config)


@pytest.mark.parametrize("is_automatic", [True, False])
def test_random_legal_lives_use_every_transition_of_the_table(is_automatic: bool) -> None:
    """What the walk is worth: 120 x 48 decisions meet each row of the table.

    One row is out of reach by design when training is automatic: the tick that follows a
    germination moves the seed on, so no decision can prune it in GERMINATED.
    """
    config = EnvConfig(automatic_training=is_automatic, automatic_holding=is_automatic)
    seen: set[tuple[int, int]] = set()
    rng = np.random.default_rng(1)
    for step in walk(config, rng, num_envs=48, num_steps=120, restart_share=0.01):
        seen |= check_step(step, config)
    unreachable = {(Stage.GERMINATED, Stage.EMBARGOED)} if is_automatic else set()
    unreachable |= {(Stage.GERMINATED, Stage.HOLDING)}
    assert seen == TRANSITIONS - unreachable


def test_random_lives_with_grafts_need_neither_training_nor_a_first_ramp() -> None:
    """A seed reaches BLENDING by another target or a slow prune alone."""
    config = EnvConfig(graft=True, parking=True, parks_fossilized=True)
    seen: set[tuple[int, int]] = set()
    parked = {Stage.HOLDING: 0, Stage.FOSSILIZED: 0}
    for step in walk(config, np.random.default_rng(1), num_envs=48, num_steps=120):
        seen |= check_step(step, config)
        for stage in parked:
            parked[stage] += int(lifecycle.is_parked(step.after)[step.after.stage == stage].sum())
    assert min(parked.values()) > 50
    skipped = {(Stage.GERMINATED, Stage.TRAINING), (Stage.TRAINING, Stage.BLENDING)}
    skipped |= {(Stage.TRAINING, Stage.EMBARGOED), (Stage.GERMINATED, Stage.EMBARGOED)}
    assert seen == TRANSITIONS - skipped


@pytest.mark.parametrize("stage", [Stage.HOLDING, Stage.FOSSILIZED])
@pytest.mark.parametrize("speed", [0, 3])
def test_a_seed_is_parked_and_put_back_without_a_change_of_stage(stage: Stage, speed: int) -> None:
    config = EnvConfig(parking=True, parks_fossilized=True)
    state, measured = seed_in(stage)
    for target in (0.0, 1.0):
        act(state, measured, config, Op.SET_ALPHA, target=target, speed=speed)
        assert not lifecycle.is_parked(state).any() or speed == 0
        for _ in range(max(speed, 1)):
            tick(state, measured, config)
            assert state.stage[0, 0] == stage
        assert state.alpha[0, 0] == target
        assert lifecycle.is_parked(state)[0, 0] == (target == 0)
        is_trial = stage == Stage.HOLDING
        assert passes(lifecycle.can_prune, state, measured, config) == is_trial
        assert passes(lifecycle.can_fossilize, state, measured, config) == (
            is_trial and target == 1
        )
