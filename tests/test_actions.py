"""The action space: its masks against brute force over the whole joint space, and its samples.

The oracle below decides the legality of one joint action of one member in scalar code, from the
tables of the design (sections 4 and 5) alone. It never calls the gates or masks under test.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from esper_env.config import BoolArray, Curve, EnvConfig, Op, Stage
from esper_env.growth import lifecycle
from esper_env.growth.action_space import HEAD_NAMES, RELEVANT_HEADS, ActionSpace
from esper_env.growth.state import HOLD, Measurements, Request, SlotState
from tests.builders import BLUEPRINTS, HOST_PARAMETERS, SEED_PARAMETERS, action, waits, walk

OPTIONS: dict[str, tuple[Any, ...]] = {
    "op": ("WAIT", "GERMINATE", "ADVANCE", "SET_ALPHA", "PRUNE", "FOSSILIZE"),
    "slot": (0, 1, 2),
    "blueprint": BLUEPRINTS,
    "style": ("LINEAR_ADD", "LINEAR_MULTIPLY", "SIGMOID_ADD", "LINEAR_GATE"),
    "tempo": (3, 5, 8),
    "alpha_target": (0.5, 0.7, 1.0),
    "alpha_speed": (0, 3, 5, 8),
    "alpha_curve": ("LINEAR", "COSINE", "SIGMOID_6", "SIGMOID_12", "SIGMOID_24"),
}
"""The table of heads in section 5 of the design, in its order."""

RELEVANCE = {
    "WAIT": {"op"},
    "GERMINATE": {"op", "slot", "blueprint", "style", "tempo", "alpha_target"},
    "ADVANCE": {"op", "slot"},
    "SET_ALPHA": {"op", "slot", "style", "alpha_target", "alpha_speed", "alpha_curve"},
    "PRUNE": {"op", "slot", "alpha_speed", "alpha_curve"},
    "FOSSILIZE": {"op", "slot"},
}
"""The relevance of heads in section 5 of the design."""


@dataclass(frozen=True)
class Case:
    """A small action space, rules, and which ops its random lives must make legal at times."""

    heads: dict[str, Any]
    num_slots: int = 2
    rules: dict[str, Any] = field(default_factory=dict)
    never: frozenset[str] = frozenset()
    """Ops among the options that these restrictions make impossible."""
    keeps_to_heads: bool = False
    """Whether the random lives use the restricted space, instead of reaching every corner of the
    lifecycle with the full one."""

    def options(self, name: str) -> tuple[Any, ...]:
        """Return the options of a head that the restrictions leave, in the design's order."""
        all_options = OPTIONS[name][: self.num_slots] if name == "slot" else OPTIONS[name]
        if name == "alpha_target" and self.rules.get("parking"):
            all_options = (0.0, *all_options)
        wanted = self.heads.get(name, all_options)
        wanted = wanted if isinstance(wanted, list | tuple) else [wanted]
        return tuple(option for option in all_options if option in wanted)


BY_HAND = {"automatic_training": False, "automatic_holding": False}
SMALL = {
    "blueprint": ["small", "large"],
    "style": ["LINEAR_ADD", "LINEAR_GATE"],
    "tempo": 3,
    "alpha_speed": [0, 3],
    "alpha_curve": ["LINEAR", "SIGMOID_24"],
}

CASES = {
    "all ops": Case(SMALL),
    "all ops, nothing automatic": Case(SMALL, rules=BY_HAND),
    "everything automatic, no attribution": Case(
        SMALL, rules={"automatic_blending": True, "attribution": "none"}
    ),
    "three slots, one seed, strict": Case(
        {**SMALL, "style": "SIGMOID_ADD", "alpha_curve": "COSINE", "blueprint": BLUEPRINTS},
        num_slots=3,
        rules={"max_seeds": 1, "strict_fossilize": True, "min_contribution": 0.02},
    ),
    "tight budget": Case(
        {**SMALL, "blueprint": BLUEPRINTS, "tempo": [3, 8], "alpha_curve": "LINEAR"},
        rules={"parameter_budget": 1.5, "min_prune_age": 4, "min_training_steps": 1},
    ),
    "few ops": Case({**SMALL, "op": ["PRUNE", "WAIT", "GERMINATE"]}),
    "one slot enabled": Case({**SMALL, "slot": 1, "alpha_target": [0.5, 1.0]}),
    "two of three slots enabled, two seeds": Case(
        {**SMALL, "slot": [2, 0], "style": "LINEAR_ADD"}, 3, {"max_seeds": 2}
    ),
    "only full blending": Case(
        {**SMALL, "alpha_target": 1.0},
        rules=BY_HAND,
        never=frozenset({"SET_ALPHA"}),
        keeps_to_heads=True,
    ),
    "no full blending": Case(
        {**SMALL, "alpha_target": [0.5, 0.7]}, never=frozenset({"FOSSILIZE"}), keeps_to_heads=True
    ),
    "parking": Case({**SMALL, "alpha_target": [0.0, 0.5, 1.0]}, rules={"parking": True}),
    "parking, fossilized seeds too": Case(
        {**SMALL, "blueprint": "small"}, rules={"parking": True, "parks_fossilized": True}
    ),
    "parking and grafts": Case(
        {**SMALL, "blueprint": "small", "tempo": [3, 5]},
        rules={"parking": True, "graft": True, "automatic_holding": False},
    ),
    "grafts": Case({**SMALL, "tempo": [3, 5]}, rules={"graft": True, "automatic_holding": False}),
    "grafts that are only parked and put back": Case(
        {**SMALL, "op": ["WAIT", "GERMINATE", "SET_ALPHA"], "alpha_target": [0.0, 1.0]},
        rules={"parking": True, "graft": True},
        keeps_to_heads=True,
    ),
    "only slow ramps": Case({**SMALL, "alpha_speed": [3, 8]}),
    "only blueprints that never fit": Case(
        {**SMALL, "op": ["WAIT", "GERMINATE", "PRUNE"], "blueprint": "large"},
        rules={"parameter_budget": 1.0},
        never=frozenset({"GERMINATE"}),
    ),
}


# ------------------------------------------------------------------ the oracle


def is_legal_by_the_design(
    action: dict[str, Any],
    is_first: dict[str, bool],
    state: SlotState,
    measured: Measurements,
    i: int,
    rules: EnvConfig,
) -> bool:
    """Decide about one joint action of member `i` in scalar code.

    Args:
        action: Option of each head.
        is_first: Whether that is the head's option 0.
        state: The slots.
        measured: What the last step measured.
        i: Member.
        rules: Gate rules.
    """
    op, slot = action["op"], action["slot"]
    grafts = op == "GERMINATE" and rules.graft
    for name in OPTIONS:
        is_relevant = name in RELEVANCE[op] and not (grafts and name in ("tempo", "alpha_target"))
        if not is_relevant and not is_first[name]:
            return False
    if op == "WAIT":
        return True
    stage = Stage(int(state.stage[i, slot])).name
    is_still = state.mode[i, slot] == HOLD
    alpha = float(state.alpha[i, slot])
    if op == "GERMINATE":
        if stage != "DORMANT" or (action["alpha_target"] == 0 and not grafts):
            return False
        seeds, parameters = 0, 0
        for other in range(state.stage.shape[1]):
            if Stage(int(state.stage[i, other])).name not in ("DORMANT", "EMBARGOED"):
                seeds += 1
                parameters += int(SEED_PARAMETERS[other, state.blueprint[i, other]])
        if rules.max_seeds is not None and seeds + 1 > rules.max_seeds:
            return False
        new = int(SEED_PARAMETERS[slot, BLUEPRINTS.index(action["blueprint"])])
        return parameters + new <= rules.parameter_budget * HOST_PARAMETERS
    if op == "ADVANCE":
        if stage == "GERMINATED":
            return True
        if stage == "TRAINING":
            return bool(
                state.stage_steps[i, slot] >= rules.min_training_steps
                and measured.has_gradient[i, slot]
                and measured.exploding[i, slot] == 0
                and measured.health[i, slot] >= rules.min_gradient_health
            )
        return stage == "BLENDING" and bool(is_still) and alpha == 1.0
    if op == "SET_ALPHA":
        # In HOLD alpha stands on its target, so a target equal to it would change nothing.
        target = action["alpha_target"]
        is_possible = {
            "BLENDING": target > 0,
            "HOLDING": target > 0 or rules.parking,
            "FOSSILIZED": rules.parks_fossilized and target in (0, 1),
        }
        return is_possible.get(stage, False) and bool(is_still) and target != alpha
    if op == "PRUNE":
        if stage not in ("GERMINATED", "TRAINING", "BLENDING", "HOLDING"):
            return False
        if state.age[i, slot] < rules.min_prune_age or not is_still:
            return False
        # Without weight there is nothing to ramp down: such a seed goes at once.
        return action["alpha_speed"] == 0 or alpha > 0
    assert op == "FOSSILIZE"
    if stage != "HOLDING" or alpha != 1 or not is_still:
        return False
    if rules.attribution == "none":
        return True
    if not measured.has_contribution[i, slot]:
        return False
    contribution = float(measured.contribution[i, slot])
    return not rules.strict_fossilize or contribution >= rules.min_contribution


@dataclass(frozen=True)
class Truth:
    """Many random states of one case, with the oracle's verdict on every joint action."""

    space: ActionSpace
    rules: EnvConfig
    state: SlotState
    measured: Measurements
    joint: npt.NDArray[np.int64]
    """All joint actions. (actions, 8)."""
    is_legal: BoolArray
    """(states, actions)."""
    masks: dict[str, BoolArray]
    """The conditional masks under test."""

    @property
    def table(self) -> BoolArray:
        """Return `is_legal` with one axis per head. (states, *nvec)."""
        return self.is_legal.reshape(len(self.is_legal), *self.space.nvec)


STATES = 200
"""Random states per case."""


@pytest.fixture(scope="module", params=CASES)
def truth(request: pytest.FixtureRequest) -> Truth:
    """Live at random under the rules of a case, and test every joint action in some states."""
    case = CASES[request.param]
    rules = EnvConfig(**case.rules, heads=case.heads)
    rng = np.random.default_rng(0)
    lived = rules if case.keeps_to_heads else EnvConfig(**case.rules)
    sizes = {"num_envs": 20, "num_steps": 100, "num_slots": case.num_slots}
    steps = list(walk(lived, rng, **sizes, restart_share=0.02))
    states = _concatenate([s.before for s in steps])
    seen = _concatenate([s.measured for s in steps])
    _, first = np.unique(_describe(states, seen, rules), axis=0, return_index=True)
    chosen = rng.permutation(first)[:STATES]
    state, measured = _take(states, chosen), _take(seen, chosen)

    space = ActionSpace(case.num_slots, BLUEPRINTS, rules)
    options = {name: case.options(name) for name in OPTIONS}
    joint = np.array(list(itertools.product(*(range(len(o)) for o in options.values()))))
    verdicts = np.zeros((len(chosen), len(joint)), dtype=bool)
    for j, indices in enumerate(joint.tolist()):
        pairs = list(zip(options, indices, strict=True))
        action = {name: options[name][index] for name, index in pairs}
        is_first = {name: index == 0 for name, index in pairs}
        for i in range(len(chosen)):
            verdicts[i, j] = is_legal_by_the_design(action, is_first, state, measured, i, rules)
    masks = space.conditional_masks(
        state, measured, SEED_PARAMETERS[: case.num_slots], HOST_PARAMETERS
    )
    ops = {options["op"][o] for o in joint[verdicts.any(axis=0), 0].tolist()}
    assert ops == set(options["op"]) - case.never, "the random lives miss part of the space"
    assert len(verdicts) >= 100
    assert len(np.unique(verdicts, axis=0)) >= 4, "the states are too much alike"
    return Truth(space, rules, state, measured, joint, verdicts, masks)


def _concatenate(parts: list[Any]) -> Any:
    """Join states (or measurements) of several steps along the members."""
    return type(parts[0])(*map(np.concatenate, zip(*parts, strict=True)))


def _take(whole: Any, rows: npt.NDArray[np.int64]) -> Any:
    """Pick members, with copies of their arrays."""
    return type(whole)(*(array[rows].copy() for array in whole))


def _describe(
    state: SlotState, measured: Measurements, rules: EnvConfig
) -> npt.NDArray[np.float64]:
    """Return a row per member that tells apart the situations which matter for legality."""
    parts = [
        state.stage,
        state.mode,
        state.alpha,
        state.blueprint,
        np.minimum(state.age, rules.min_prune_age),
        np.minimum(state.stage_steps, rules.min_training_steps),
        measured.has_gradient,
        measured.exploding > 0,
        measured.health >= rules.min_gradient_health,
        measured.has_contribution,
        measured.contribution >= rules.min_contribution,
    ]
    return np.concatenate(parts, axis=1)


def judge(
    space: ActionSpace, masks: dict[str, BoolArray], actions: npt.NDArray[np.int64]
) -> tuple[Request, BoolArray]:
    """Parse one action per row of the masks; illegal ones become WAIT."""
    return space.parse(actions, masks, np.ones(len(actions), dtype=bool), raises_on_illegal=False)


def all_legal(space: ActionSpace, num_envs: int) -> dict[str, BoolArray]:
    """Return conditional masks under which everything is legal."""
    op, slot, *rest = space.nvec
    shapes = [(op,), (op, slot), *((op, slot, options) for options in rest)]
    pairs = zip(HEAD_NAMES, shapes, strict=True)
    return {name: np.ones((num_envs, *shape), dtype=bool) for name, shape in pairs}


# ------------------------------------------------------------------ masks = brute force


def test_is_legal_agrees_with_the_oracle_on_every_joint_action(truth: Truth) -> None:
    for i in range(len(truth.is_legal)):
        rows = np.full(len(truth.joint), i)
        masks = {name: mask[rows] for name, mask in truth.masks.items()}
        got = judge(truth.space, masks, truth.joint)[1]
        assert np.array_equal(got, truth.is_legal[i])


def test_conditional_masks_are_projections_of_the_legal_set(truth: Truth) -> None:
    """An option is True given (op, slot) exactly if some legal joint action has all three."""
    everything = truth.table
    axes = set(range(1, 9))
    assert list(truth.masks) == list(HEAD_NAMES)
    for h, name in enumerate(HEAD_NAMES):
        kept = {1, 2, h + 1} if h >= 2 else set(range(1, h + 2))
        projection = everything.any(axis=tuple(axes - kept))
        assert truth.masks[name].dtype == bool
        assert np.array_equal(truth.masks[name], projection), name


def test_the_conditional_masks_are_the_legal_set_and_no_more(truth: Truth) -> None:
    """Given op and slot the heads are independent: their product is the legal set.

    So a policy that draws head after head under these masks can never draw an illegal action.
    """
    # (states, op, slot, 1, ..., 1) times one axis of options per head
    product = truth.masks["slot"].reshape(*truth.masks["slot"].shape, 1, 1, 1, 1, 1, 1)
    for h, name in enumerate(HEAD_NAMES[2:]):
        shape = [1] * 6
        shape[h] = -1
        product = product & truth.masks[name].reshape(*truth.masks["slot"].shape, *shape)
    assert np.array_equal(product, truth.table)


def test_the_marginal_mask_is_the_projection_on_each_head(truth: Truth) -> None:
    marginal = truth.space.marginal_mask(truth.masks)
    assert marginal.shape == (len(truth.is_legal), truth.space.nvec.sum())
    parts = np.split(marginal, np.cumsum(truth.space.nvec)[:-1], axis=1)
    for h, part in enumerate(parts):
        others = tuple(axis for axis in range(1, 9) if axis != h + 1)
        assert np.array_equal(part, truth.table.any(axis=others)), HEAD_NAMES[h]
        assert part.any(axis=1).all(), HEAD_NAMES[h]


def test_a_legal_action_always_succeeds(truth: Truth) -> None:
    """Every legal joint action of every state is carried out, and its slot shows it."""
    rows, actions = np.nonzero(truth.is_legal)
    state, measured = _take(truth.state, rows), _take(truth.measured, rows)
    before = copy.deepcopy(state)
    masks = {name: mask[rows] for name, mask in truth.masks.items()}
    asked, is_legal = judge(truth.space, masks, truth.joint[actions])
    assert is_legal.all()
    lifecycle.apply(state, measured, asked, truth.rules)

    env = np.arange(len(rows))
    source, target = before.stage[env, asked.slot], state.stage[env, asked.slot]
    is_slow = asked.speed > 0
    ends = {
        Op.WAIT: source,
        Op.GERMINATE: np.full(len(rows), Stage.HOLDING if truth.rules.graft else Stage.GERMINATED),
        Op.ADVANCE: source + 1,
        # Parking a seed, and putting it back, leave it where it is.
        Op.SET_ALPHA: np.where(np.isin(asked.target, (0, 1)), source, Stage.BLENDING),
        Op.PRUNE: np.where(is_slow, Stage.BLENDING, Stage.EMBARGOED),
        Op.FOSSILIZE: np.full(len(rows), Stage.FOSSILIZED),
    }
    for op, expected in ends.items():
        assert (target == expected)[asked.op == op].all(), op.name
    ramps = ((asked.op == Op.SET_ALPHA) | (asked.op == Op.PRUNE)) & is_slow
    assert (state.mode[env, asked.slot][ramps] != HOLD).all()
    untouched = np.ones(state.stage.shape, dtype=bool)
    untouched[env, asked.slot] = asked.op == Op.WAIT
    for name, now, then in zip(state._fields, state, before, strict=True):
        assert (now == then)[untouched].all(), name
    lifecycle.tick(state, measured, np.ones(len(rows), dtype=bool), truth.rules)


def test_sampled_actions_are_legal_and_reach_every_legal_action(truth: Truth) -> None:
    """60 draws for each of 200 states; every op, slot and option that is legal comes up."""
    rng = np.random.default_rng(1)
    rows = np.repeat(np.arange(len(truth.is_legal)), 60)
    masks = {name: mask[rows] for name, mask in truth.masks.items()}
    actions = truth.space.sample(masks, rng)
    assert actions.shape == (len(rows), 8)
    assert actions.dtype == np.int64
    assert truth.table[(rows, *actions.T)].all()
    for h, head in enumerate(truth.space.heads):
        others = tuple(axis for axis in range(9) if axis != h + 1)
        legal = np.flatnonzero(truth.table.any(axis=others))
        assert set(actions[:, h].tolist()) == set(legal.tolist()), head.name


# ------------------------------------------------------------------ sampling


def _unrestricted(stages: list[Stage], **rules: Any) -> tuple[ActionSpace, dict[str, BoolArray]]:
    """Return the full space over given slots of one member, and its masks."""
    space = ActionSpace(len(stages), BLUEPRINTS, EnvConfig(**rules))
    state, measured = SlotState.empty(1, len(stages)), Measurements.empty(1, len(stages))
    state.stage[0] = stages
    is_live = lifecycle.is_live(state.stage)
    for name, value in (("blueprint", 0), ("style", 0), ("age", 9), ("stage_steps", 9)):
        getattr(state, name)[is_live] = value
    state.alpha[state.stage >= Stage.BLENDING] = 1.0
    state.alpha_target[:] = state.alpha
    measured.has_contribution[:] = True
    table = SEED_PARAMETERS[: len(stages)]
    masks = space.conditional_masks(state, measured, table, HOST_PARAMETERS)
    return space, masks


def _assert_uniform(draws: npt.NDArray[np.int64], options: list[int]) -> None:
    """Each option's count lies within 5 standard deviations of its mean under uniformity.

    A right sampler fails this about once in two million counts, and the draws are seeded.
    """
    p = 1 / len(options)
    bound = 5 * np.sqrt(len(draws) * p * (1 - p))
    counts = [int((draws == option).sum()) for option in options]
    assert sum(counts) == len(draws)
    assert max(abs(count - p * len(draws)) for count in counts) <= bound


def test_samples_are_uniform_over_ops_then_slots_then_options() -> None:
    """Slots DORMANT, HOLDING, DORMANT: all ops but ADVANCE are legal, GERMINATE in two slots.

    A draw uniform over joint actions would nearly always germinate (2 * 3 * 4 * 3 * 3 = 216 joint
    actions) and hardly ever wait (1).
    """
    space, masks = _unrestricted([Stage.DORMANT, Stage.HOLDING, Stage.DORMANT])
    n = 20_000
    many = {name: np.repeat(mask, n, axis=0) for name, mask in masks.items()}
    actions = space.sample(many, np.random.default_rng(2))
    _assert_uniform(actions[:, 0], [Op.WAIT, Op.GERMINATE, Op.SET_ALPHA, Op.PRUNE, Op.FOSSILIZE])
    germinates = actions[actions[:, 0] == Op.GERMINATE]
    _assert_uniform(germinates[:, 1], [0, 2])
    for slot in (0, 2):
        chosen = germinates[germinates[:, 1] == slot]
        for h, options in ((2, [0, 1, 2]), (3, [0, 1, 2, 3]), (4, [0, 1, 2]), (5, [0, 1, 2])):
            _assert_uniform(chosen[:, h], options)
    sets = actions[actions[:, 0] == Op.SET_ALPHA]
    _assert_uniform(sets[:, 5], [0, 1])
    _assert_uniform(sets[:, 6], [0, 1, 2, 3])
    _assert_uniform(sets[:, 7], [0, 1, 2, 3, 4])


def test_samples_depend_on_the_generator_alone() -> None:
    space, masks = _unrestricted([Stage.DORMANT, Stage.HOLDING])
    many = {name: np.repeat(mask, 50, axis=0) for name, mask in masks.items()}
    draws = [space.sample(many, np.random.default_rng(seed)) for seed in (3, 3, 4)]
    assert np.array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])


# ------------------------------------------------------------------ single facts


def test_masks_after_a_germination_differ_from_before() -> None:
    """The slot is taken, so GERMINATE is gone and ADVANCE is there. Finding SYN-H4."""
    rules = EnvConfig(automatic_training=False)
    space = ActionSpace(1, BLUEPRINTS, rules)
    state, measured = SlotState.empty(1, 1), Measurements.empty(1, 1)
    place = (SEED_PARAMETERS[:1], HOST_PARAMETERS)
    before = space.conditional_masks(state, measured, *place)
    assert np.flatnonzero(before["op"][0]).tolist() == [Op.WAIT, Op.GERMINATE]
    germinate = np.array([[Op.GERMINATE, 0, 1, 2, 1, 2, 0, 0]])
    asked, is_legal = judge(space, before, germinate)
    assert is_legal.all()
    lifecycle.apply(state, measured, asked, rules)
    lifecycle.tick(state, measured, np.array([True]), rules)
    after = space.conditional_masks(state, measured, *place)
    assert np.flatnonzero(after["op"][0]).tolist() == [Op.WAIT, Op.ADVANCE, Op.PRUNE]
    assert not np.array_equal(space.marginal_mask(before), space.marginal_mask(after))


def test_the_relevance_of_heads_is_that_of_the_design() -> None:
    assert {op.name: set(names) for op, names in RELEVANT_HEADS.items()} == RELEVANCE


def test_heads_and_options_are_those_of_the_design() -> None:
    space = ActionSpace(3, BLUEPRINTS, EnvConfig())
    assert [(head.name, head.options) for head in space.heads] == list(OPTIONS.items())
    assert space.nvec.tolist() == [6, 3, 3, 4, 3, 3, 4, 5]


def test_restricted_heads_keep_the_order_of_the_design() -> None:
    heads = {"style": ["LINEAR_GATE", "LINEAR_ADD"], "op": ("PRUNE", "WAIT"), "tempo": 8}
    space = ActionSpace(2, BLUEPRINTS, EnvConfig(heads=heads))
    expected = OPTIONS | {"style": ("LINEAR_ADD", "LINEAR_GATE"), "op": ("WAIT", "PRUNE")}
    expected |= {"tempo": (8,), "slot": (0, 1)}
    assert {head.name: head.options for head in space.heads} == expected


def test_options_decode_to_what_they_stand_for() -> None:
    """With restricted heads index 0 may stand for any value."""
    heads = {
        "slot": [1, 2],
        "blueprint": "large",
        "style": ["SIGMOID_ADD", "LINEAR_GATE"],
        "tempo": [5, 8],
        "alpha_target": [0.7, 1.0],
        "alpha_speed": [3, 8],
        "alpha_curve": ["COSINE", "SIGMOID_24"],
    }
    space = ActionSpace(3, BLUEPRINTS, EnvConfig(heads=heads))
    actions = np.array([[Op.GERMINATE, 0, 0, 0, 0, 0, 0, 0], [3, 1, 0, 1, 1, 1, 1, 1]])
    got, _ = judge(space, all_legal(space, 2), actions)
    assert {name: array.tolist() for name, array in got._asdict().items()} == {
        "op": [Op.GERMINATE, Op.SET_ALPHA],
        "slot": [1, 2],
        "blueprint": [2, 2],
        "style": [2, 3],
        "tempo": [5, 8],
        "target": [0.7, 1.0],
        "speed": [3, 8],
        "curve": [Curve.COSINE, Curve.SIGMOID_24],
    }


@pytest.mark.parametrize("row", [0, 1])
def test_one_illegal_action_raises_and_names_its_row(row: int) -> None:
    """An illegal action of an inactive member, here the last one, does not raise."""
    space = ActionSpace(1, BLUEPRINTS, EnvConfig())
    state, measured = SlotState.empty(3, 1), Measurements.empty(3, 1)
    masks = space.conditional_masks(state, measured, SEED_PARAMETERS[:1], HOST_PARAMETERS)
    actions = waits(3)
    actions[[row, 2]] = action(Op.FOSSILIZE)
    active = np.array([True, True, False])
    with pytest.raises(ValueError, match=rf"actions\[{row}\] is illegal .*: op: expected .*FOSS"):
        space.parse(actions, masks, active, raises_on_illegal=True)


def test_an_illegal_action_raises_with_the_first_wrong_option_and_the_legal_ones() -> None:
    space = ActionSpace(2, BLUEPRINTS, EnvConfig())
    state, measured = SlotState.empty(1, 2), Measurements.empty(1, 2)
    masks = space.conditional_masks(state, measured, SEED_PARAMETERS[:1], HOST_PARAMETERS[:1])
    germinate = action(Op.GERMINATE)
    for head, option, expected in (
        (0, 3, r"op: expected one of \['WAIT', 'GERMINATE'\], got 'SET_ALPHA' in"),
        (6, 1, r"alpha_speed of GERMINATE in slot 0: expected one of \[0\], got 3 in"),
    ):
        actions = np.array([germinate])
        actions[0, head] = option
        with pytest.raises(ValueError, match=expected):
            space.parse(actions, masks, np.array([True]), raises_on_illegal=True)
    with pytest.raises(ValueError, match=r"slot of WAIT: expected one of \[0\], got 1 in"):
        space.parse([[0, 1, *[0] * 6]], masks, np.array([True]), raises_on_illegal=True)


@pytest.mark.parametrize(
    ("heads", "named"),
    [
        ({"colour": "red"}, "alpha_curve"),
        ({"style": "LINEAR"}, "LINEAR_MULTIPLY"),
        ({"style": ["LINEAR_ADD", "LINEAR"]}, "LINEAR_MULTIPLY"),
        ({"blueprint": "huge"}, "middle"),
        ({"slot": 2}, r"\(0, 1\)"),
        ({"slot": [0, 0]}, r"\(0, 1\)"),
        ({"slot": []}, r"\(0, 1\)"),
        ({"tempo": 4}, r"\(3, 5, 8\)"),
        ({"tempo": "3"}, r"\(3, 5, 8\)"),
        ({"alpha_target": None}, r"\(0\.5, 0\.7, 1\.0\)"),
        ({"alpha_speed": {"fast": 0}}, r"\(0, 3, 5, 8\)"),
        ({"op": "GROW"}, "GERMINATE"),
        ({"op": ["GERMINATE", "PRUNE"]}, "WAIT"),
        ({"alpha_target": 0.0}, r"\(0\.5, 0\.7, 1\.0\)"),
    ],
)
def test_a_bad_restriction_raises_and_names_the_options(heads: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        ActionSpace(2, BLUEPRINTS, EnvConfig(heads=heads))
    assert str(next(iter(heads))) in str(caught.value)


def test_a_seed_that_ramps_needs_a_target_above_zero() -> None:
    config = EnvConfig(parking=True, heads={"alpha_target": 0.0})
    with pytest.raises(ValueError, match=r"alpha_target.*above 0 for GERMINATE.*graft=True"):
        ActionSpace(2, BLUEPRINTS, config)
    ActionSpace(2, BLUEPRINTS, dataclasses.replace(config, graft=True))
