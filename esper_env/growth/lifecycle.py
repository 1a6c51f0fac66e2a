"""Lifecycle of seeds: the table of legal transitions, one gate function for each, and the tick.

An op (`apply`), the passing of an env step (`tick`) or a rollback (`roll_back`) moves a slot from
one `Stage` to another. Masks and transitions call the same gates, so a legal action always
succeeds. A *trial seed* is a seed that is not fossilized. All state consists of arrays of shape
(num_envs, num_slots). The networks are trained elsewhere; see `simulation`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from esper_env.config import STYLES, BoolArray, Curve, EnvConfig, FloatArray, IntArray, Op, Stage
from esper_env.growth.state import DOWN, HOLD, UP, Measurements, Request, SlotState

TRANSITIONS = frozenset(
    {
        (Stage.DORMANT, Stage.GERMINATED),
        (Stage.GERMINATED, Stage.TRAINING),
        (Stage.GERMINATED, Stage.HOLDING),  # Only with `graft`.
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
"""Legal transitions (from, to); every other one raises an error."""

_STYLE_CURVE = np.array([style.curve for style in STYLES])
_IS_LEGAL = np.zeros((len(Stage), len(Stage)), dtype=bool)
for _source, _target in TRANSITIONS:
    _IS_LEGAL[_source, _target] = True


def ease(curve: IntArray, t: FloatArray) -> FloatArray:
    """Compute the share of the way to the target that alpha has covered at time `t` of a ramp.

    LINEAR is t, COSINE is (1 - cos(pi t)) / 2, and SIGMOID_k is
    (s(k (t - 1/2)) - s(-k/2)) / (s(k/2) - s(-k/2)) with the logistic function s. All increase from
    0 at t = 0 to 1 at t = 1.

    Args:
        curve: Values of `Curve`, of any shape.
        t: Share of the ramp's env steps that have passed, 0 to 1. Same shape as `curve`.

    Returns:
        Share of the way, 0 to 1. Same shape as `curve`, float64.
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
    """Gate G0: the slot is empty, and a new seed exceeds neither `max_seeds` nor the budget.

    Args:
        state: State of the slots.
        seed_parameters: Parameters that each blueprint uses of the budget, the largest number over
            the styles. (num_envs, num_slots, num_blueprints) int64, or broadcastable to it.
        host_parameters: Number of parameters of each host. (num_envs,), or one number for all.
        config: Source of `max_seeds` and `parameter_budget`.

    Returns:
        True where the blueprint can germinate. (num_envs, num_slots, num_blueprints) bool.
    """
    num_slots, is_empty = state.stage.shape[1], is_at(state, Stage.DORMANT)
    if not is_empty.any():
        return np.zeros((*is_empty.shape, seed_parameters.shape[-1]), dtype=bool)
    limit = num_slots if config.max_seeds is None else config.max_seeds
    has_room = is_live(state.stage).sum(axis=1) < limit
    # (num_envs,) -> (num_envs, 1, 1), to broadcast over slots and blueprints
    used = used_parameters(state, seed_parameters)
    limits = config.parameter_budget * np.reshape(host_parameters, (-1, 1, 1))
    is_affordable = used[:, None, None] + seed_parameters <= limits
    is_legal: BoolArray = (is_empty & has_room[:, None])[:, :, None] & is_affordable
    return is_legal


def used_parameters(state: SlotState, seed_parameters: IntArray) -> IntArray:
    """Return the parameters that all seeds use of the budget. (num_envs,) int64."""
    members, slots = state.stage.shape
    table = np.broadcast_to(seed_parameters, (members, slots, seed_parameters.shape[-1]))
    at = np.arange(members)[:, None], np.arange(slots), np.maximum(state.blueprint, 0)
    total: IntArray = np.where(is_live(state.stage), table[at], 0).sum(axis=1)
    return total


# The transitions call the gates below for all slots, or for the slots `at`, a pair of index arrays.
# The masks call them in compiled code for one slot; there `at` is a pair of integers.


def can_train(state: SlotState, at: Any = ...) -> BoolArray:
    """Gate G1: the seed is GERMINATED, so its module has been built."""
    return is_at(state, Stage.GERMINATED, at)


def can_blend(
    state: SlotState, measured: Measurements, config: EnvConfig, at: Any = ...
) -> BoolArray:
    """Gate G2: the seed has trained long enough, with healthy gradients in the last env step."""
    is_ready: BoolArray = (
        is_at(state, Stage.TRAINING, at)
        & (state.stage_steps[at] >= config.min_training_steps)
        & measured.has_gradient[at]
        & (measured.exploding[at] == 0)
        & (measured.health[at] >= config.min_gradient_health)
    )
    return is_ready


def can_hold(state: SlotState, at: Any = ...) -> BoolArray:
    """Gate G3: no ramp is running, and alpha is 1."""
    is_done: BoolArray = (state.mode[at] == HOLD) & (state.alpha[at] == 1.0)
    return is_at(state, Stage.BLENDING, at) & is_done


def can_advance(
    state: SlotState, measured: Measurements, config: EnvConfig, at: Any = ...
) -> BoolArray:
    """Return True where ADVANCE is legal: gate G1, G2 or G3 passes."""
    return can_train(state, at) | can_blend(state, measured, config, at) | can_hold(state, at)


def can_set_alpha(
    state: SlotState, config: EnvConfig, target: FloatArray | float, at: Any = ...
) -> BoolArray:
    """Return True where SET_ALPHA is legal: the stage allows the new target; no ramp is running.

    A seed in BLENDING or HOLDING can get another target above 0. Target 0 parks a seed in HOLDING
    with `parking`. With `parks_fossilized` a fossilized seed can be parked and put back at alpha 1.

    Args:
        state: State of the slots.
        config: Source of `parking` and `parks_fossilized`.
        target: New target of each slot.
        at: Slots; see above.
    """
    is_held = is_at(state, Stage.HOLDING, at)
    is_new: BoolArray = (state.mode[at] == HOLD) & (target != state.alpha_target[at])
    is_legal: BoolArray = (is_at(state, Stage.BLENDING, at) | is_held) & (target > 0)
    if config.parking:
        is_legal = is_legal | is_held
    if config.parks_fossilized:
        is_whole = (target == 0) | (target == 1)
        is_legal = is_legal | (is_at(state, Stage.FOSSILIZED, at) & is_whole)
    return is_legal & is_new


def can_prune(state: SlotState, config: EnvConfig, at: Any = ...) -> BoolArray:
    """Return True where PRUNE is legal: a trial seed, old enough, and no ramp is running."""
    is_old_enough: BoolArray = (state.age[at] >= config.min_prune_age) & (state.mode[at] == HOLD)
    return is_trial(state.stage[at]) & is_old_enough


def can_fossilize(
    state: SlotState, measured: Measurements, config: EnvConfig, at: Any = ...
) -> BoolArray:
    """Gate G5: HOLDING at alpha 1, contribution measured, large enough with `strict_fossilize`.

    With `attribution="none"` contributions are not measured, so HOLDING at alpha 1 is enough.
    """
    is_whole: BoolArray = (state.mode[at] == HOLD) & (state.alpha[at] == 1.0)
    is_holding = is_at(state, Stage.HOLDING, at) & is_whole
    if not config.measures_contributions:
        return is_holding
    is_good: BoolArray = measured.has_contribution[at]
    if config.strict_fossilize:
        is_good = is_good & (measured.contribution[at] >= config.min_contribution)
    return is_holding & is_good


def is_at(state: SlotState, stage: Stage, at: Any = ...) -> BoolArray:
    """Return True where a slot is in the stage.

    The comparison uses the plain number. NumPy takes ten times as long for a member of an
    enumeration.
    """
    is_there: BoolArray = state.stage[at] == stage.value
    return is_there


def is_live(stage: IntArray) -> BoolArray:
    """Return True where a slot holds a seed: GERMINATED to FOSSILIZED."""
    is_between: BoolArray = (stage >= Stage.GERMINATED.value) & (stage <= Stage.FOSSILIZED.value)
    return is_between


def is_parked(state: SlotState) -> BoolArray:
    """Return True where a seed in HOLDING or FOSSILIZED is out of service: at alpha 0, no ramp."""
    is_held = is_at(state, Stage.HOLDING) | is_at(state, Stage.FOSSILIZED)
    is_out: BoolArray = (state.alpha == 0) & (state.mode == HOLD)
    return is_held & is_out


def is_trial(stage: IntArray) -> BoolArray:
    """Return True where a slot holds a trial seed: GERMINATED to HOLDING."""
    is_between: BoolArray = (stage >= Stage.GERMINATED.value) & (stage <= Stage.HOLDING.value)
    return is_between


def apply(state: SlotState, measured: Measurements, request: Request, config: EnvConfig) -> None:
    """Apply one legal action per sub-environment to its slots.

    Args:
        state: State of the slots, changed in place.
        measured: Measurements of the last env step. Those of slots that get or lose a seed are
            cleared.
        request: Decoded actions. The caller has checked them against the masks.
        config: Thresholds of the gates, and `embargo_steps`.

    Raises:
        RuntimeError: If an action causes a transition that is not in `TRANSITIONS`.
    """
    if not request.op.any():
        return  # All sub-environments WAIT, the most frequent case.
    rows = np.arange(len(request.op))

    def chosen(op: Op) -> tuple[IntArray, IntArray]:
        """Return the sub-environments with this op, and the slot of each, as an index pair."""
        members = rows[request.op == op.value]
        return members, request.slot[members]

    at = chosen(Op.GERMINATE)
    if len(at[0]):
        # An empty slot has alpha 0 and no ramp. Style, tempo and target are stored for the first
        # ramp, which starts when the seed enters BLENDING.
        _move(state, at, Stage.GERMINATED)
        measured.clear(at)
        state.age[at] = 0
        state.blueprint[at] = request.blueprint[at[0]]
        state.style[at] = request.style[at[0]]
        state.tempo[at] = request.tempo[at[0]]
        state.first_target[at] = request.target[at[0]]
        state.curve[at] = _STYLE_CURVE[state.style[at]]
        if config.graft:
            # As at the end of a first ramp of length 0 to alpha 1.
            _move(state, at, Stage.HOLDING)
            state.tempo[at] = 0
            state.first_target[at] = state.alpha[at] = state.alpha_target[at] = 1.0

    at = chosen(Op.ADVANCE)
    if len(at[0]):
        _require_legal(Op.ADVANCE, can_advance(state, measured, config, at))
        _advance(state, at)

    at = chosen(Op.SET_ALPHA)
    if len(at[0]):
        target = request.target[at[0]]
        _require_legal(Op.SET_ALPHA, can_set_alpha(state, config, target, at))
        state.style[at] = request.style[at[0]]
        state.curve[at] = request.curve[at[0]]
        # A seed stays in HOLDING or FOSSILIZED while it is parked or put back.
        blends = (target > 0) & (target < 1)
        _retarget(state, at, target, request.speed[at[0]], blends)

    at = chosen(Op.PRUNE)
    if len(at[0]):
        _require_legal(Op.PRUNE, can_prune(state, config, at))
        state.curve[at] = request.curve[at[0]]
        # Speed 0 removes the seed now. Otherwise alpha starts a ramp to 0 in BLENDING, and `tick`
        # removes the seed at the end of the ramp.
        is_immediate = request.speed[at[0]] == 0
        _remove(state, measured, (at[0][is_immediate], at[1][is_immediate]), config)
        slow = (at[0][~is_immediate], at[1][~is_immediate])
        _retarget(state, slow, np.zeros(len(slow[0])), request.speed[slow[0]], True)
        state.is_pruning[slow] = True

    at = chosen(Op.FOSSILIZE)
    if len(at[0]):
        _require_legal(Op.FOSSILIZE, can_fossilize(state, measured, config, at))
        _move(state, at, Stage.FOSSILIZED)


def tick(state: SlotState, measured: Measurements, active: BoolArray, config: EnvConfig) -> None:
    """Advance slots by one env step: cooldowns, alpha ramps, automatic transitions, ages.

    Args:
        state: State of the slots, changed in place.
        measured: Measurements of the last env step. Those of slots that lose a seed are cleared.
        active: True for sub-environments that take part in the env step. (num_envs,) bool.
        config: Thresholds of the gates, and the settings `automatic_*`.
    """
    # An empty slot has nothing to tick. `here` is not updated below, so a slot that becomes empty
    # in this tick is still in it.
    here = active[:, None] & ~is_at(state, Stage.DORMANT)
    if not here.any():
        return
    # The op of this env step may have embargoed a slot. Then stage_steps is 0, and the cooldown
    # starts with the next tick.
    is_cooling = here & is_at(state, Stage.EMBARGOED) & (state.stage_steps > 0)
    if is_cooling.any():
        state.cooldown[is_cooling] -= 1
        is_open = is_cooling & (state.cooldown == 0)
        _move(state, np.nonzero(is_open), Stage.DORMANT)
        state.clear(is_open)

    is_ramping = here & (state.mode != HOLD)
    if is_ramping.any():
        state.ramp_step[is_ramping] += 1
        # Slots that are not ramping may have length 0. Their share is not used.
        length = np.maximum(state.ramp_length, 1)
        share = ease(state.curve, state.ramp_step / length)
        alpha = state.alpha_start + (state.alpha_target - state.alpha_start) * share
        has_landed = is_ramping & (state.ramp_step == state.ramp_length)
        state.alpha[is_ramping] = alpha[is_ramping]
        # The end of a ramp is the target itself, without the rounding errors of the formula.
        state.alpha[has_landed] = state.alpha_target[has_landed]
        state.mode[has_landed] = HOLD
        # PRUNE with a ramp removes the seed here.
        _remove(state, measured, np.nonzero(has_landed & state.is_pruning), config)

    # A seed makes at most one of these transitions per tick: TRAINING lasts at least one env step,
    # and the first ramp at least three.
    if config.automatic_training:
        _advance(state, np.nonzero(here & can_train(state)))
    if config.automatic_blending:
        _advance(state, np.nonzero(here & can_blend(state, measured, config)))
    if config.automatic_holding:
        _advance(state, np.nonzero(here & can_hold(state)))

    # A stage that was entered in this env step has now lasted one step.
    state.stage_steps[:] += here & ~is_at(state, Stage.DORMANT)
    state.age[:] += here & is_live(state.stage)


def roll_back(
    state: SlotState, measured: Measurements, members: IntArray, config: EnvConfig
) -> None:
    """Remove all trial seeds of some sub-environments after the training of an env step.

    Args:
        state: State of the slots, changed in place.
        measured: Measurements of the last env step. Those of removed seeds are cleared.
        members: Indices of the sub-environments. (m,) int64.
        config: Source of `embargo_steps`.
    """
    where = np.zeros(state.stage.shape, dtype=bool)
    where[members] = is_trial(state.stage[members])
    _remove(state, measured, np.nonzero(where), config)
    # The tick of this env step is over. At 1 the next tick already counts down the cooldown.
    state.stage_steps[where] = 1


def _require_legal(op: Op, is_legal: BoolArray) -> None:
    """Raise RuntimeError if the caller did not check an action; the masks test the same gate."""
    if not is_legal.all():
        raise RuntimeError(f"{op.name} is illegal in the current state of a slot")


def _advance(state: SlotState, at: tuple[IntArray, ...]) -> None:
    """Move slots to their next stage; a seed that enters BLENDING starts its first ramp."""
    if not len(at[0]):
        return
    # The stages are read before the first move, so no slot moves twice.
    stage = state.stage[at]
    for source, target in (
        (Stage.GERMINATED, Stage.TRAINING),
        (Stage.TRAINING, Stage.BLENDING),
        (Stage.BLENDING, Stage.HOLDING),
    ):
        here = tuple(index[stage == source.value] for index in at)
        _move(state, here, target)
        if target == Stage.BLENDING:
            _retarget(state, here, state.first_target[here], state.tempo[here], True)


def _retarget(
    state: SlotState,
    at: tuple[IntArray, ...],
    target: FloatArray,
    length: IntArray,
    blends: BoolArray | bool,
) -> None:
    """Start ramps of slots in mode HOLD; at length 0 alpha changes at once.

    A seed in HOLDING returns to BLENDING where `blends` is True.
    """
    if not len(at[0]):
        return
    if not (state.mode[at] == HOLD).all():
        raise RuntimeError("a ramp cannot start while another one is running")
    is_immediate = length == 0
    direction = np.where(target > state.alpha[at], UP, DOWN)
    state.mode[at] = np.where(is_immediate, HOLD, direction)
    state.alpha_start[at] = state.alpha[at]
    state.alpha_target[at] = target
    state.alpha[at] = np.where(is_immediate, target, state.alpha[at])
    state.ramp_step[at] = 0
    state.ramp_length[at] = length
    leaves = (state.stage[at] == Stage.HOLDING) & blends
    _move(state, tuple(index[leaves] for index in at), Stage.BLENDING)


def _remove(
    state: SlotState, measured: Measurements, at: tuple[IntArray, ...], config: EnvConfig
) -> None:
    """Remove the seeds of slots and close the slots for `embargo_steps` env steps."""
    if not len(at[0]):
        return
    # `_move` checks the transition. `clear` then resets the stage too, so it is set again.
    _move(state, at, Stage.EMBARGOED)
    state.clear(at)
    measured.clear(at)
    state.stage[at] = Stage.EMBARGOED
    state.cooldown[at] = config.embargo_steps


def _move(state: SlotState, at: tuple[IntArray, ...], target: Stage) -> None:
    """Change the stage of slots and set their time in the stage to 0.

    Raises:
        RuntimeError: If a transition is not in `TRANSITIONS`.
    """
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
    """Return the logistic function of x."""
    return np.asarray(1.0 / (1.0 + np.exp(-np.asarray(x, dtype=np.float64))))
