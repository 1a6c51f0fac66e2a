"""Factored action space: heads, exact masks, and decoding of actions.

`True` in a mask means legal. The *conditional* masks are exact. They contain the legal ops, the
legal slots of each op, and the legal options of every other head for each op and slot. The
*marginal* mask is flat over the options of all heads. An option is legal in it if at least one
legal joint action contains the option.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from esper_env.config import STYLES, BoolArray, Curve, EnvConfig, FloatArray, IntArray, Op
from esper_env.growth import lifecycle
from esper_env.growth.state import Measurements, Request, SlotState
from esper_env.jit import entry_point, shared

TEMPOS = (3, 5, 8)
"""Options of the tempo head: length of the first ramp [env steps]."""
ALPHA_TARGETS = (0.5, 0.7, 1.0)
"""Options of the alpha_target head: alpha at the end of a ramp."""
PARKED = 0.0
"""First option of the alpha_target head with `parking`; only SET_ALPHA can use it."""
ALPHA_SPEEDS = (0, 3, 5, 8)
"""Options of the alpha_speed head: length of a later ramp [env steps]; 0 changes alpha at once."""

HEAD_NAMES = (
    "op",
    "slot",
    "blueprint",
    "style",
    "tempo",
    "alpha_target",
    "alpha_speed",
    "alpha_curve",
)
"""Names of the heads in the order of an action."""

RELEVANT_HEADS: dict[Op, frozenset[str]] = {
    Op.WAIT: frozenset({"op"}),
    Op.GERMINATE: frozenset({"op", "slot", "blueprint", "style", "tempo", "alpha_target"}),
    Op.ADVANCE: frozenset({"op", "slot"}),
    Op.SET_ALPHA: frozenset({"op", "slot", "style", "alpha_target", "alpha_speed", "alpha_curve"}),
    Op.PRUNE: frozenset({"op", "slot", "alpha_speed", "alpha_curve"}),
    Op.FOSSILIZE: frozenset({"op", "slot"}),
}
"""Heads that each op uses. An unused head has one legal option, 0."""
_CONDITIONAL_HEAD = {
    Op.GERMINATE: "blueprint",
    Op.SET_ALPHA: "alpha_target",
    Op.PRUNE: "alpha_speed",
}
"""Head whose legal options depend on the state of the slot."""
_NUMERIC_HEADS = ("tempo", "alpha_target", "alpha_speed")


@dataclass(frozen=True)
class ActionHead:
    """Head of the factored action: its name and the values of its options."""

    name: str
    options: tuple[Any, ...]


def usable_options(op: Op, head: ActionHead, config: EnvConfig) -> list[int]:
    """Return the options of a head that an op can use in some state; [0] if it uses none."""
    relevant = RELEVANT_HEADS[op]
    if op == Op.GERMINATE and config.graft:
        relevant = relevant - {"tempo", "alpha_target"}
    if head.name not in relevant:
        return [0]
    is_first = op == Op.GERMINATE and head.name == "alpha_target"
    return [i for i, option in enumerate(head.options) if not (is_first and option == PARKED)]


class ActionSpace:
    """Heads of an environment, with mask computation and decoding of actions.

    Args:
        num_slots: Number of slots of the host.
        blueprints: Names of the registered blueprints, in order.
        config: Thresholds of the gates, and restrictions of the heads (`heads`).

    Raises:
        ValueError: If a restriction names an unknown head or option, repeats an option, or excludes
            WAIT.
    """

    def __init__(self, num_slots: int, blueprints: Sequence[str], config: EnvConfig) -> None:
        canonical: dict[str, tuple[Any, ...]] = {
            "op": tuple(op.name for op in Op),
            "slot": tuple(range(num_slots)),
            "blueprint": tuple(blueprints),
            "style": tuple(style.name for style in STYLES),
            "tempo": TEMPOS,
            "alpha_target": (PARKED, *ALPHA_TARGETS) if config.parking else ALPHA_TARGETS,
            "alpha_speed": ALPHA_SPEEDS,
            "alpha_curve": tuple(curve.name for curve in Curve),
        }
        for name in config.heads:
            if name not in canonical:
                raise ValueError(f"heads: expected names among {HEAD_NAMES}, got {name!r}")
        # A restriction renumbers the options of a head. `_values` maps them to what the state
        # stores: the value of a numeric option, and the canonical index of any other.
        heads: list[ActionHead] = []
        self._values: dict[str, npt.NDArray[Any]] = {}
        for name, options in canonical.items():
            kept = _restrict(name, options, config.heads.get(name, options))
            heads.append(ActionHead(name, kept))
            is_numeric = name in _NUMERIC_HEADS
            self._values[name] = np.array(kept if is_numeric else [options.index(o) for o in kept])
        if Op.WAIT not in self._values["op"]:
            raise ValueError("heads: expected WAIT among the options of 'op'; it is always legal")
        self.heads = tuple(heads)
        self.nvec = np.array([len(head.options) for head in heads])
        ops = [Op(i) for i in self._values["op"]]
        self._config = config
        self._rules = _Rules(*[getattr(config, name) for name in _Rules._fields])
        self._germinate: tuple[bytes, BoolArray] | None = None
        # Head and index of all options but those of op and slot, concatenated.
        columns = [(head, o) for head in heads[2:] for o in range(len(head.options))]
        usable = {op: {head.name: usable_options(op, head, config) for head in heads} for op in ops}
        if Op.GERMINATE in ops and not usable[Op.GERMINATE]["alpha_target"]:
            raise ValueError(
                "heads['alpha_target']: expected an option above 0 for GERMINATE, got only 0.0; "
                "add 1.0, or set graft=True"
            )
        self._options = _Options(
            op=self._values["op"],
            slot=self._values["slot"],
            value=np.concatenate([self._values[name] for name in HEAD_NAMES[2:]]),
            unconditional=np.array(
                [[o in usable[op][head.name] for head, o in columns] for op in ops]
            ),
            conditional=np.array(
                [[head.name == _CONDITIONAL_HEAD.get(op) for head, _ in columns] for op in ops]
            ),
        )

    def conditional_masks(
        self,
        slots: SlotState,
        measured: Measurements,
        budget_table: IntArray,
        host_parameters: IntArray,
    ) -> dict[str, BoolArray]:
        """Return the exact masks, conditioned on op and slot.

        Args:
            slots: State of the slots.
            measured: Measurements of the last env step.
            budget_table: Parameters that each blueprint uses of the budget, the largest number over
                the styles. (num_envs, num_slots, num_blueprints) int64.
            host_parameters: Number of parameters of each host. (num_envs,) int64.

        Returns:
            "op" (num_envs, ops), "slot" (num_envs, ops, slots) and every other head
            (num_envs, ops, slots, options), all bool. A joint action is legal if and only if its
            op, its slot for the op, and all other options for op and slot are True. Rows of an
            illegal op, or of an illegal slot for the op, are all False.
        """
        # Gate G0 depends only on these arrays. They change in few env steps, so its result is kept.
        parts = slots.stage, slots.blueprint, budget_table, host_parameters
        key = b"".join(map(np.ndarray.tobytes, parts))
        if self._germinate is None or self._germinate[0] != key:
            can = lifecycle.can_germinate(slots, budget_table, host_parameters, self._config)
            self._germinate = key, can
        # `rest` is (num_envs, ops, slots, sum of options): all heads but op and slot, concatenated.
        num_ops, num_slots, *_ = self.nvec
        is_op = np.zeros((len(slots.stage), num_ops), dtype=np.bool_)
        is_slot = np.zeros((*is_op.shape, num_slots), dtype=np.bool_)
        rest = np.zeros((*is_slot.shape, len(self._options.value)), dtype=np.bool_)
        masks = {"op": is_op, "slot": is_slot}
        _fill_masks(
            is_op, is_slot, rest, slots, measured, self._germinate[1], self._rules, self._options
        )
        start = 0
        for head in self.heads[2:]:
            masks[head.name] = rest[..., start : start + len(head.options)]
            start += len(head.options)
        return masks

    def marginal_mask(self, conditional: dict[str, BoolArray]) -> BoolArray:
        """Return the marginal mask: an option is legal if a legal joint action contains it.

        Every head has at least one legal option.

        Args:
            conditional: Masks returned by `conditional_masks`.

        Returns:
            Options of all heads in order, True where legal. (num_envs, sum(nvec)) bool.
        """
        op, slot, *rest = conditional.values()
        marginal = np.zeros((len(op), self.nvec.sum()), dtype=np.bool_)
        _project(marginal, op, slot, tuple(rest))
        return marginal

    def parse(
        self,
        actions: Any,
        conditional: dict[str, BoolArray],
        active: BoolArray,
        *,
        raises_on_illegal: bool,
    ) -> tuple[Request, BoolArray]:
        """Validate actions, compare them with the masks, and decode them.

        Args:
            actions: Option indices in the order of `heads`. (num_envs, heads) integers.
            conditional: Conditional masks of the current state.
            active: True for sub-environments that take part in the env step. The others WAIT.
                (num_envs,) bool.
            raises_on_illegal: Whether an illegal action of an active sub-environment is an error.
                Otherwise it becomes WAIT.

        Returns:
            Decoded actions, and True where the given action was legal, (num_envs,) bool.

        Raises:
            TypeError: If the actions are not integers.
            ValueError: If the shape is wrong or an index is out of range; with
                `raises_on_illegal` also if an action is illegal.
        """
        array = as_array(actions)
        shape = (len(active), len(HEAD_NAMES))
        if array.dtype.kind not in "iu":
            raise TypeError(
                f"actions: expected integers of shape {shape}, got dtype {array.dtype}; "
                "pass option indices, e.g. those that sample_valid_actions returns"
            )
        if array.shape != shape:
            raise ValueError(
                f"actions: expected shape {shape} (num_envs, heads), got {array.shape}; "
                f"the heads are {', '.join(HEAD_NAMES)}"
            )
        outside = (array < 0) | (array >= self.nvec)
        if outside.any():
            row, head = np.argwhere(outside)[0].tolist()
            raise ValueError(
                f"actions[{row}]: head {HEAD_NAMES[head]!r} expected 0 to "
                f"{self.nvec[head] - 1}, got {array[row, head]}"
            )
        # One dtype for all callers, so `_check_legal` is compiled only once.
        array = array.astype(np.int64)
        op_mask, slot_mask, *rest = conditional.values()
        is_legal = np.empty(len(array), dtype=np.bool_)
        _check_legal(is_legal, array, op_mask, slot_mask, tuple(rest))
        # A sub-environment that is not active does not act, so its action may be illegal.
        acts = active & is_legal
        if raises_on_illegal and (active & ~is_legal).any():
            row = int((active & ~is_legal).argmax())
            raise ValueError(
                f"actions[{row}] is illegal in the current state: "
                f"{self._why_illegal(array[row], [mask[row] for mask in conditional.values()])}; "
                "choose a legal action with conditional_masks() or sample_valid_actions(rng), or "
                "set illegal_actions='wait'"
            )
        # A row of zeros is WAIT. Illegal actions and inactive sub-environments get such a row.
        # (num_envs, heads) -> one (num_envs,) array per head
        options = zip(HEAD_NAMES, (array * acts[:, None]).T, strict=True)
        chosen = {name: self._values[name][option] for name, option in options}
        request = Request(
            op=chosen["op"],
            slot=chosen["slot"],
            blueprint=chosen["blueprint"],
            style=chosen["style"],
            tempo=chosen["tempo"],
            target=chosen["alpha_target"],
            speed=chosen["alpha_speed"],
            curve=chosen["alpha_curve"],
        )
        return request, is_legal

    def _why_illegal(self, action: IntArray, masks: list[BoolArray]) -> str:
        """Return the first option of an illegal action that its mask excludes, with the mask.

        Args:
            action: Option indices. (heads,).
            masks: Conditional masks of the sub-environment, without its axis.
        """
        op, slot = action[:2]
        given = [head.options[o] for head, o in zip(self.heads, action, strict=True)]
        rows = [masks[0], masks[1][op], *[mask[op, slot] for mask in masks[2:]]]
        h = next(h for h, row in enumerate(rows) if not row[action[h]])
        legal = [o for o, is_legal in zip(self.heads[h].options, rows[h], strict=True) if is_legal]
        place = ("", f" of {given[0]}", f" of {given[0]} in slot {given[1]}")[min(h, 2)]
        whole = dict(zip(HEAD_NAMES, given, strict=True))
        return f"{HEAD_NAMES[h]}{place}: expected one of {legal}, got {given[h]!r} in {whole}"

    def sample(
        self, conditional: dict[str, BoolArray], rng: np.random.Generator
    ) -> npt.NDArray[np.int64]:
        """Sample legal actions: uniform over ops, then slots, then the options of each head.

        Args:
            conditional: Masks returned by `conditional_masks`.
            rng: Source of randomness.

        Returns:
            Option indices in the order of `heads`. (num_envs, 8) int64.
        """
        rows = np.arange(len(conditional["op"]))
        op = _choose(conditional["op"], rng)
        slot = _choose(conditional["slot"][rows, op], rng)
        rest = [_choose(conditional[head.name][rows, op, slot], rng) for head in self.heads[2:]]
        return np.stack([op, slot, *rest], axis=1)


def as_array(value: Any) -> npt.NDArray[Any]:
    """Return an argument as an array, so that its dtype and shape can be checked."""
    try:
        return np.asarray(value)
    except (TypeError, ValueError):  # For example lists of different lengths.
        return np.array(None)


class _Rules(NamedTuple):
    """Fields of `EnvConfig` that the gates read."""

    parking: bool
    parks_fossilized: bool
    min_training_steps: int
    min_gradient_health: float
    min_prune_age: int
    measures_contributions: bool
    strict_fossilize: bool
    min_contribution: float


class _Options(NamedTuple):
    """Options of the heads. The columns are those of all heads but op and slot, concatenated."""

    op: IntArray
    """Values of `Op`. (ops,)."""
    slot: IntArray
    """Indices of slots. (slots,)."""
    value: FloatArray
    """Value of each option, or its canonical index. (columns,)."""
    unconditional: BoolArray
    """Options that each op allows: all of a head that it uses, and option 0. (ops, columns)."""
    conditional: BoolArray
    """Options of the op's `_CONDITIONAL_HEAD`. (ops, columns)."""


# The same gates serve the transitions, as NumPy formulas, and the masks, compiled for single slots.
for _formula in (
    lifecycle.is_at,
    lifecycle.is_trial,
    lifecycle.can_train,
    lifecycle.can_blend,
    lifecycle.can_hold,
    lifecycle.can_advance,
    lifecycle.can_set_alpha,
    lifecycle.can_prune,
    lifecycle.can_fossilize,
):
    shared(_formula)


@entry_point
def _fill_masks(
    is_op: BoolArray,
    is_slot: BoolArray,
    rest: BoolArray,
    state: SlotState,
    measured: Measurements,
    germinate: BoolArray,
    rules: Any,
    options: _Options,
) -> None:
    """Write the conditional masks, which are False before the call.

    Args:
        is_op: Mask of the ops. (num_envs, ops) bool.
        is_slot: Mask of the slots of each op. (num_envs, ops, slots) bool.
        rest: Masks of all other heads, concatenated. (num_envs, ops, slots, columns) bool.
        state: State of the slots.
        measured: Measurements of the last env step.
        germinate: Result of gate G0. (num_envs, num_slots, num_blueprints) bool.
        rules: Fields of the configuration that the gates read, a `_Rules`.
        options: Options of the heads.
    """
    for i in range(len(is_op)):
        for k, s in enumerate(options.slot):
            at = (i, s)
            for o, op in enumerate(options.op):
                is_legal: Any = op == Op.GERMINATE  # Gate G0 is a condition on the blueprint.
                if op == Op.WAIT:
                    is_legal = k == 0  # WAIT uses no slot, so only option 0 is legal.
                elif op == Op.ADVANCE:
                    is_legal = lifecycle.can_advance(state, measured, rules, at)
                elif op == Op.SET_ALPHA:
                    is_legal = True  # Its gate is a condition on the target.
                elif op == Op.PRUNE:
                    is_legal = lifecycle.can_prune(state, rules, at)
                elif op == Op.FOSSILIZE:
                    is_legal = lifecycle.can_fossilize(state, measured, rules, at)
                if not is_legal:
                    continue
                # An op with a conditional head is legal in the slot if one of its options is.
                mask, has_option = rest[i, o, k], not options.conditional[o].any()
                for c, value in enumerate(options.value):
                    is_legal = options.unconditional[o, c]
                    if options.conditional[o, c]:
                        if op == Op.GERMINATE:
                            is_legal = germinate[i, s, int(value)]
                        elif op == Op.SET_ALPHA:
                            is_legal = lifecycle.can_set_alpha(state, rules, value, at)
                        else:
                            # At alpha 0 there is no ramp to 0, so PRUNE must be immediate.
                            is_legal = value == 0 or state.alpha[at] > 0
                        has_option = has_option or is_legal
                    mask[c] = is_legal
                if has_option:
                    is_slot[i, o, k] = True
                    is_op[i, o] = True
                else:
                    mask[:] = False  # Rows of an illegal slot stay all False.


@entry_point
def _project(
    marginal: BoolArray, is_op: BoolArray, is_slot: BoolArray, rest: tuple[BoolArray, ...]
) -> None:
    """Write the marginal mask, which is False before the call.

    Args:
        marginal: Marginal mask. (num_envs, sum(nvec)) bool.
        is_op: Mask of the ops. (num_envs, ops) bool.
        is_slot: Mask of the slots of each op. (num_envs, ops, slots) bool.
        rest: Mask of each other head. (num_envs, ops, slots, options) bool.
    """
    _, num_ops, num_slots = is_slot.shape
    for i in range(len(marginal)):
        for o in range(num_ops):
            if is_op[i, o]:
                marginal[i, o] = True
                for k in range(num_slots):
                    if is_slot[i, o, k]:
                        marginal[i, num_ops + k] = True
                        at = num_ops + num_slots
                        for mask in rest:
                            for c in range(mask.shape[3]):
                                marginal[i, at + c] |= mask[i, o, k, c]
                            at += mask.shape[3]


@entry_point
def _check_legal(
    legal: BoolArray,
    actions: IntArray,
    op_mask: BoolArray,
    slot_mask: BoolArray,
    rest: tuple[BoolArray, ...],
) -> None:
    """Write True where an action is legal by the conditional masks. (num_envs,) bool."""
    for i in range(len(legal)):
        op, slot = actions[i, 0], actions[i, 1]
        legal[i] = op_mask[i, op] and slot_mask[i, op, slot]
        for h, mask in enumerate(rest):
            legal[i] = legal[i] and mask[i, op, slot, actions[i, h + 2]]


def _restrict(name: str, canonical: tuple[Any, ...], wanted: Any) -> tuple[Any, ...]:
    """Return the wanted options of a head in canonical order."""
    values = list(wanted) if isinstance(wanted, (list, tuple)) else [wanted]
    # No bool, which equals the number 0 or 1; the types also exclude values without a simple `==`.
    unknown = [v for v in values if type(v) not in (str, int, float) or v not in canonical]
    if unknown or not values or len(set(values)) != len(values):
        raise ValueError(
            f"heads[{name!r}]: expected one option or a list of distinct options of {canonical}, "
            f"got {wanted!r}"
        )
    return tuple(value for value in canonical if value in values)


def _choose(mask: BoolArray, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Sample one True position per row, uniformly."""
    keys = np.where(mask, rng.random(mask.shape), -1.0)
    choice: npt.NDArray[np.int64] = keys.argmax(axis=1)
    return choice
