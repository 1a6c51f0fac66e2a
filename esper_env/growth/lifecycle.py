"""The life of a seed: one table of transitions, one gate function per transition, arrays only.

All state is arrays of shape (num_envs, num_slots). The masks of `actions` and the transitions here
call the same gates, so a legal action always succeeds. Nothing here knows torch, rewards or
telemetry.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from esper_env.config import BoolArray, Curve, EnvConfig, FloatArray, IntArray, Op, Stage
from esper_env.growth.state import DOWN, HOLD, UP, Measurements, Request, SlotState

TRANSITIONS = frozenset(
    {
        (Stage.DORMANT, Stage.GERMINATED),
        (Stage.GERMINATED, Stage.TRAINING),
        (Stage.TRAINING, Stage.BLENDING),
        (Stage.BLENDING, Stage.HOLDING),
        (Stage.HOLDING, Stage.FOSSILIZED),
        (Stage.HOLDING, Stage.BLENDING),
        (Stage.GERMINATED, Stage.EMBARGOED),
        (Stage.TRAINING, Stage.EMBARGOED),
        (Stage.BLENDING, Stage.EMBARGOED),
        (Stage.HOLDING, Stage.EMBARGOED),
        (Stage.EMBARGOED, Stage.DORMANT),
    }
)
"""Every legal change of stage; anything else raises."""

_IS_LEGAL = np.zeros((len(Stage), len(Stage)), dtype=bool)
for _source, _target in TRANSITIONS:
    _IS_LEGAL[_source, _target] = True


def ease(curve: IntArray, t: FloatArray) -> FloatArray:
    """Compute the share of a ramp that is done at time `t`: monotone, 0 at 0 and 1 at 1.

    Source: design, section 4: linear t; cosine (1 - cos(pi t)) / 2;
    sigmoid (s(k(t - 1/2)) - s(-k/2)) / (s(k/2) - s(-k/2)) with k = 6, 12, 24.
    """
    result = t.copy()
    here = curve == Curve.COSINE.value
    result[here] = (1 - np.cos(np.pi * t[here])) / 2
    for member, k in ((Curve.SIGMOID_6, 6.0), (Curve.SIGMOID_12, 12.0), (Curve.SIGMOID_24, 24.0)):
        here = curve == member.value
        if here.any():
            low, high = _sigmoid(-k / 2), _sigmoid(k / 2)
            result[here] = (_sigmoid(k * (t[here] - 0.5)) - low) / (high - low)
    return result


def can_germinate(
    state: SlotState,
    seed_parameters: IntArray,
    host_parameters: npt.ArrayLike,
    config: EnvConfig,
) -> BoolArray:
    """Gate G0: the slot is empty, and neither `max_seeds` nor the budget would be exceeded.

    Args:
        state: The slots.
        seed_parameters: Parameters of each blueprint in each slot, the largest over styles.
            (num_envs, num_slots, num_blueprints) int64, or what broadcasts to it.
        host_parameters: Parameters of each host. (num_envs,), or one for all.
        config: Limits.

    Returns:
        (num_envs, num_slots, num_blueprints) bool.
    """
    num_slots, is_empty = state.stage.shape[1], is_at(state, Stage.DORMANT)
    if not is_empty.any():
        return np.zeros((*is_empty.shape, seed_parameters.shape[-1]), dtype=bool)
    limit = num_slots if config.max_seeds is None else config.max_seeds
    has_room = is_live(state.stage).sum(axis=1) < limit
    used = used_parameters(state, seed_parameters)
    total = used[:, None, None] + seed_parameters
    limits = config.parameter_budget * np.reshape(host_parameters, (-1, 1, 1))
    is_affordable = total <= limits
    is_open = is_empty & has_room[:, None]
    is_legal: BoolArray = is_open[:, :, None] & is_affordable
    return is_legal


def used_parameters(state: SlotState, seed_parameters: IntArray) -> IntArray:
    """Return what the live seeds take from the parameter budget. (num_envs,) int64."""
    members, slots = state.stage.shape
    table = np.broadcast_to(seed_parameters, (members, slots, seed_parameters.shape[-1]))
    at = np.arange(members)[:, None], np.arange(slots), np.maximum(state.blueprint, 0)
    each = table[at]
    total: IntArray = np.where(is_live(state.stage), each, 0).sum(axis=1)
    return total


# The gates below are formulas of arrays, for the transitions; for the masks they are compiled for
# single slots: `state` and `measured` then hold the numbers of one slot.


def can_train(state: SlotState) -> BoolArray:
    """Gate G1: the module is built, which germination guarantees."""
    return is_at(state, Stage.GERMINATED)


def can_blend(state: SlotState, measured: Measurements, config: EnvConfig) -> BoolArray:
    """Gate G2: trained long enough, with a gradient measured in the step itself, and healthy."""
    is_ready: BoolArray = (
        is_at(state, Stage.TRAINING)
        & (state.stage_steps >= config.min_training_steps)
        & measured.has_gradient
        & (measured.exploding == 0)
        & (measured.health >= config.min_gradient_health)
    )
    return is_ready


def can_hold(state: SlotState) -> BoolArray:
    """Gate G3: alpha reached its target, and the target is 1."""
    is_done: BoolArray = (state.mode == HOLD) & (state.alpha == 1.0)
    return is_at(state, Stage.BLENDING) & is_done


def can_advance(state: SlotState, measured: Measurements, config: EnvConfig) -> BoolArray:
    """Whether ADVANCE leads from the present stage to the next."""
    return can_train(state) | can_blend(state, measured, config) | can_hold(state)


def can_set_alpha(state: SlotState) -> BoolArray:
    """Whether alpha may be given a new target: blended or blending, controller in HOLD."""
    is_blended = is_at(state, Stage.BLENDING) | is_at(state, Stage.HOLDING)
    is_still: BoolArray = state.mode == HOLD
    return is_blended & is_still


def can_prune(state: SlotState, config: EnvConfig) -> BoolArray:
    """Whether a seed may be removed: on trial, old enough, controller in HOLD."""
    is_old_enough: BoolArray = (state.age >= config.min_prune_age) & (state.mode == HOLD)
    return is_trial(state.stage) & is_old_enough


def can_fossilize(state: SlotState, measured: Measurements, config: EnvConfig) -> BoolArray:
    """Gate G5: holding, contribution measured, and in strict mode large enough.

    With `attribution="none"` no contribution is ever measured, and holding suffices.
    """
    is_holding = is_at(state, Stage.HOLDING)
    if not config.measures_contributions:
        return is_holding
    is_good = measured.has_contribution
    if config.strict_fossilize:
        is_good = is_good & (measured.contribution >= config.min_contribution)
    return is_holding & is_good


def is_at(state: SlotState, stage: Stage) -> BoolArray:
    """Where a slot is in a stage.

    The plain number is compared: NumPy takes ten times as long for a member of an enumeration.
    """
    is_there: BoolArray = state.stage == stage.value
    return is_there


def is_live(stage: IntArray) -> BoolArray:
    """Return where a slot holds a seed module: GERMINATED to FOSSILIZED."""
    is_between: BoolArray = (stage >= Stage.GERMINATED.value) & (stage <= Stage.FOSSILIZED.value)
    return is_between


def is_trial(stage: IntArray) -> BoolArray:
    """Where a seed exists that is not fossilized."""
    is_between: BoolArray = (stage >= Stage.GERMINATED.value) & (stage <= Stage.HOLDING.value)
    return is_between


def apply(state: SlotState, measured: Measurements, request: Request, config: EnvConfig) -> None:
    """Carry out legal requests in place.

    Args:
        state: The slots, changed in place.
        measured: What the last step measured; forgotten for slots that get or lose a seed.
        request: One decoded action per member, already checked against the masks; anything else
            is a defect of the caller.
        config: Timing rules.
    """
    if not request.op.any():
        return  # All wait, the most frequent case of all.
    rows = np.arange(len(request.op))

    def chosen(op: Op) -> tuple[IntArray, IntArray]:
        members = rows[request.op == op.value]
        return members, request.slot[members]

    at = chosen(Op.GERMINATE)
    if len(at[0]):
        _move(state, at, Stage.GERMINATED)
        measured.clear(at)
        state.age[at] = 0
        state.blueprint[at] = request.blueprint[at[0]]
        state.style[at] = request.style[at[0]]
        state.tempo[at] = request.tempo[at[0]]
        state.first_target[at] = request.first_target[at[0]]
        state.curve[at] = request.style_curve[at[0]]

    at = chosen(Op.ADVANCE)
    if len(at[0]):
        assert can_advance(state, measured, config)[at].all()
        _advance(state, at)

    at = chosen(Op.SET_ALPHA)
    if len(at[0]):
        assert can_set_alpha(state)[at].all()
        state.style[at] = request.style[at[0]]
        state.curve[at] = request.curve[at[0]]
        _retarget(state, at, request.target[at[0]], request.speed[at[0]])
        leaves = state.stage[at] == Stage.HOLDING
        _move(state, (at[0][leaves], at[1][leaves]), Stage.BLENDING)

    at = chosen(Op.PRUNE)
    if len(at[0]):
        assert can_prune(state, config)[at].all()
        state.curve[at] = request.curve[at[0]]
        is_immediate = request.speed[at[0]] == 0
        _remove(state, measured, (at[0][is_immediate], at[1][is_immediate]), config)
        slow = (at[0][~is_immediate], at[1][~is_immediate])
        _retarget(state, slow, np.zeros(len(slow[0])), request.speed[slow[0]])
        state.is_pruning[slow] = True
        leaves = state.stage[slow] == Stage.HOLDING
        _move(state, (slow[0][leaves], slow[1][leaves]), Stage.BLENDING)

    at = chosen(Op.FOSSILIZE)
    if len(at[0]):
        assert can_fossilize(state, measured, config)[at].all()
        _move(state, at, Stage.FOSSILIZED)


def tick(state: SlotState, measured: Measurements, active: BoolArray, config: EnvConfig) -> None:
    """Let one env step pass: cooldowns, alpha ramps, automatic transitions, then ages.

    Args:
        state: The slots, changed in place.
        measured: What the last step measured.
        active: Members that take part in the step. (num_envs,) bool.
        config: Timing rules.
    """
    here = active[:, None] & ~is_at(state, Stage.DORMANT)
    if not here.any():
        return
    # A slot embargoed by this step's own action has stage_steps 0 and does not count down yet.
    is_cooling = here & is_at(state, Stage.EMBARGOED) & (state.stage_steps > 0)
    if is_cooling.any():
        state.cooldown[is_cooling] -= 1
        is_open = is_cooling & (state.cooldown == 0)
        _move(state, np.nonzero(is_open), Stage.DORMANT)
        state.clear(is_open)

    is_ramping = here & (state.mode != HOLD)
    if is_ramping.any():
        state.ramp_step[is_ramping] += 1
        length = np.maximum(state.ramp_length, 1)
        share = ease(state.curve, state.ramp_step / length)
        alpha = state.alpha_start + (state.alpha_target - state.alpha_start) * share
        has_landed = is_ramping & (state.ramp_step == state.ramp_length)
        state.alpha[is_ramping] = alpha[is_ramping]
        state.alpha[has_landed] = state.alpha_target[has_landed]
        state.mode[has_landed] = HOLD
        _remove(state, measured, np.nonzero(has_landed & state.is_pruning), config)

    if config.automatic_training:
        _advance(state, np.nonzero(here & can_train(state)))
    if config.automatic_blending:
        _advance(state, np.nonzero(here & can_blend(state, measured, config)))
    if config.automatic_holding:
        _advance(state, np.nonzero(here & can_hold(state)))

    state.stage_steps[:] += here & ~is_at(state, Stage.DORMANT)
    state.age[:] += here & is_live(state.stage)


def roll_back(
    state: SlotState, measured: Measurements, members: IntArray, config: EnvConfig
) -> None:
    """Remove all trial seeds of some members after a step's training; fossils stay."""
    where = np.zeros(state.stage.shape, dtype=bool)
    where[members] = is_trial(state.stage[members])
    _remove(state, measured, np.nonzero(where), config)
    # The tick of this step is past, so the next one already counts.
    state.stage_steps[where] = 1


def _advance(state: SlotState, at: tuple[IntArray, ...]) -> None:
    """Move slots to the next stage; entering BLENDING starts the first ramp."""
    if not len(at[0]):
        return
    stage = state.stage[at]
    for source, target in (
        (Stage.GERMINATED, Stage.TRAINING),
        (Stage.TRAINING, Stage.BLENDING),
        (Stage.BLENDING, Stage.HOLDING),
    ):
        here = tuple(index[stage == source.value] for index in at)
        _move(state, here, target)
        if target == Stage.BLENDING:
            _retarget(state, here, state.first_target[here], state.tempo[here])


def _retarget(
    state: SlotState, at: tuple[IntArray, ...], target: FloatArray, length: IntArray
) -> None:
    """Start a ramp from HOLD; a ramp of length 0 lands at once."""
    if not len(at[0]):
        return
    assert (state.mode[at] == HOLD).all()
    is_immediate = length == 0
    direction = np.where(target > state.alpha[at], UP, DOWN)
    state.mode[at] = np.where(is_immediate, HOLD, direction)
    state.alpha_start[at] = state.alpha[at]
    state.alpha_target[at] = target
    state.alpha[at] = np.where(is_immediate, target, state.alpha[at])
    state.ramp_step[at] = 0
    state.ramp_length[at] = length


def _remove(
    state: SlotState, measured: Measurements, at: tuple[IntArray, ...], config: EnvConfig
) -> None:
    """Take seeds out of their slots and close the slots for a while."""
    if not len(at[0]):
        return
    _move(state, at, Stage.EMBARGOED)
    state.clear(at)
    measured.clear(at)
    state.stage[at] = Stage.EMBARGOED
    state.cooldown[at] = config.embargo_steps


def _move(state: SlotState, at: tuple[IntArray, ...], target: Stage) -> None:
    """Change stages, refusing what the table does not list."""
    if not len(at[0]):
        return
    source = state.stage[at]
    is_legal = _IS_LEGAL[source, target]
    if not is_legal.all():
        names = [f"{Stage(s).name} -> {target.name}" for s in np.unique(source[~is_legal])]
        raise RuntimeError(f"transitions not in the table: {', '.join(names)}")
    state.stage[at] = target
    state.stage_steps[at] = 0


def _sigmoid(x: FloatArray | float) -> FloatArray:
    return np.asarray(1.0 / (1.0 + np.exp(-np.asarray(x, dtype=np.float64))))
