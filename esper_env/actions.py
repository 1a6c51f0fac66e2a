"""The factored action space, its exact masks, and the decoding of actions.

`True` in a mask means legal. Two forms of the same mask are kept: the conditional one (legal ops;
legal slots given an op; legal options of every other head given op and slot), which is exact, and
the marginal one (an option is legal if some legal joint action contains it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from esper_env import lifecycle
from esper_env.compilation import entry_point
from esper_env.config import STYLES, BoolArray, Curve, EnvConfig, IntArray, Op
from esper_env.lifecycle import LifecycleState, Measurements, Request

TEMPOS = (3, 5, 8)
"""Lengths of the first ramp [env steps]."""
ALPHA_TARGETS = (0.5, 0.7, 1.0)
"""Where a ramp may end."""
ALPHA_SPEEDS = (0, 3, 5, 8)
"""Lengths of later ramps [env steps]; 0 acts at once."""

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

RELEVANT_HEADS: dict[Op, frozenset[str]] = {
    Op.WAIT: frozenset({"op"}),
    Op.GERMINATE: frozenset({"op", "slot", "blueprint", "style", "tempo", "alpha_target"}),
    Op.ADVANCE: frozenset({"op", "slot"}),
    Op.SET_ALPHA: frozenset({"op", "slot", "style", "alpha_target", "alpha_speed", "alpha_curve"}),
    Op.PRUNE: frozenset({"op", "slot", "alpha_speed", "alpha_curve"}),
    Op.FOSSILIZE: frozenset({"op", "slot"}),
}
"""Heads that an op reads. A head that is not read has one legal option, 0."""


@dataclass(frozen=True)
class ActionHead:
    """One component of the action: its name and the values its options stand for."""

    name: str
    options: tuple[Any, ...]


class ActionSpace:
    """The heads of one environment, with mask computation and decoding.

    Args:
        num_slots: Slots of the host.
        blueprints: Names of the task's registry, in order.
        heads: Restrictions, as `EnvConfig.heads`.

    Raises:
        ValueError: If a restriction names an unknown head or option, repeats one, or forbids WAIT.
    """

    def __init__(self, num_slots: int, blueprints: Sequence[str], heads: Mapping[str, Any]) -> None:
        canonical: dict[str, tuple[Any, ...]] = {
            "op": tuple(op.name for op in Op),
            "slot": tuple(range(num_slots)),
            "blueprint": tuple(blueprints),
            "style": tuple(style.name for style in STYLES),
            "tempo": TEMPOS,
            "alpha_target": ALPHA_TARGETS,
            "alpha_speed": ALPHA_SPEEDS,
            "alpha_curve": tuple(curve.name for curve in Curve),
        }
        for name in heads:
            if name not in canonical:
                raise ValueError(f"heads: expected names among {HEAD_NAMES}, got {name!r}")
        self.num_slots = num_slots
        self.index: dict[str, IntArray] = {}
        options: dict[str, tuple[Any, ...]] = {}
        for name, values in canonical.items():
            options[name] = _restrict(name, values, heads.get(name, values))
            self.index[name] = np.array([values.index(value) for value in options[name]])
        if Op.WAIT not in self.index["op"]:
            raise ValueError("heads: expected WAIT among the options of 'op', it is always legal")
        self.heads = tuple(ActionHead(name, options[name]) for name in HEAD_NAMES)
        self.nvec = np.array([len(head.options) for head in self.heads])
        ops = [Op(i) for i in self.index["op"]]
        self.is_relevant = np.array(
            [[name in RELEVANT_HEADS[op] for name in HEAD_NAMES] for op in ops]
        )
        """(ops, heads) bool."""
        self._key, self._masks = b"", dict[str, BoolArray]()
        self._targets = np.array(ALPHA_TARGETS)[self.index["alpha_target"]]
        self._tempos = np.array(TEMPOS)[self.index["tempo"]]
        self._speeds = np.array(ALPHA_SPEEDS)[self.index["alpha_speed"]]
        self._style_curves = np.array([style.curve for style in STYLES])[self.index["style"]]
        # All heads but op and slot side by side: every option for the ops that read the head,
        # option 0 for the others. (ops, 1, sum of options)
        rest = [
            self.is_relevant[:, h, None, None] | (np.arange(len(head.options)) == 0)
            for h, head in enumerate(self.heads)
            if h >= 2
        ]
        self._unconditional = np.concatenate(rest, axis=2)
        stops = np.cumsum([part.shape[2] for part in rest]).tolist()
        self._columns = {
            head.name: slice(stop - len(head.options), stop)
            for head, stop in zip(self.heads[2:], stops, strict=True)
        }

    def conditional_masks(
        self,
        state: LifecycleState,
        measured: Measurements,
        seed_parameters: IntArray,
        host_parameters: npt.ArrayLike,
        config: EnvConfig,
    ) -> dict[str, BoolArray]:
        """Return the exact legal actions, conditioned on op and slot.

        Args:
            state: The slots.
            measured: What the last step measured.
            seed_parameters: See `lifecycle.can_germinate`.
            host_parameters: Likewise.
            config: Gate rules.

        Returns:
            "op" (N, O), "slot" (N, O, S), every other head (N, O, S, options), all bool. A joint
            action is legal exactly if its op, its slot given the op, and every other option given
            op and slot are True. Rows of an illegal op or (op, slot) are all False. As long as no
            gate changes, the same arrays are returned again: they are not to be written to.
        """
        slots = self.index["slot"]
        shape = (len(state.stage), len(self.index["op"]), len(slots))
        germinate: BoolArray = lifecycle.can_germinate(
            state, seed_parameters, host_parameters, config
        )
        gates: dict[Op, BoolArray] = {
            Op.WAIT: np.zeros(state.stage.shape, dtype=bool),
            Op.GERMINATE: np.any(germinate, axis=2),
            Op.ADVANCE: lifecycle.can_advance(state, measured, config),
            Op.SET_ALPHA: lifecycle.can_set_alpha(state),
            Op.PRUNE: lifecycle.can_prune(state, config),
            Op.FOSSILIZE: lifecycle.can_fossilize(state, measured, config),
        }
        has_weight = state.alpha > 0
        parts = (germinate, *gates.values(), state.alpha_target, has_weight)
        key = b"".join([array.tobytes() for array in parts])
        if key == self._key:
            return self._masks
        legal: BoolArray = np.stack([gates[Op(op)][:, slots] for op in self.index["op"]], axis=1)
        legal[:, 0, 0] = True  # WAIT reads no slot, so its slot is option 0.
        packed = np.broadcast_to(self._unconditional, (*shape, self._unconditional.shape[2])).copy()
        masks = {name: packed[..., columns] for name, columns in self._columns.items()}
        # What an option needs beyond its op's gate. A seed without weight has no ramp to run.
        needs = (
            (Op.GERMINATE, "blueprint", germinate[:, slots][:, :, self.index["blueprint"]]),
            (Op.SET_ALPHA, "alpha_target", state.alpha_target[:, slots, None] != self._targets),
            (
                Op.PRUNE,
                "alpha_speed",
                has_weight[:, slots, None] | (self.index["alpha_speed"] == 0),
            ),
        )
        for op, name, is_met in needs:
            for o in np.nonzero(self.index["op"] == op)[0]:
                masks[name][:, o] = is_met
                legal[:, o] &= is_met.any(axis=2)
        packed &= legal[..., None]
        is_op_legal: BoolArray = np.any(legal, axis=2)
        self._key, self._masks = key, {"op": is_op_legal, "slot": legal, **masks}
        return self._masks

    def marginal_mask(self, conditional: dict[str, BoolArray]) -> BoolArray:
        """Return, for every option of every head, whether some legal joint action contains it.

        Every head has at least one legal option.

        Returns:
            (num_envs, sum(nvec)) bool, heads in order.
        """
        parts = [conditional["op"], conditional["slot"].any(axis=1)]
        parts += [conditional[head.name].any(axis=(1, 2)) for head in self.heads[2:]]
        return np.concatenate(parts, axis=1)

    def check(self, actions: Any, num_envs: int) -> IntArray:
        """Return actions as int64 after checking type, shape and range.

        Raises:
            TypeError: If they are not integers.
            ValueError: If shape or range are wrong.
        """
        array = np.asarray(actions)
        shape = (num_envs, len(HEAD_NAMES))
        if array.dtype.kind not in "iu":
            raise TypeError(
                f"actions: expected integers of shape {shape}, got dtype {array.dtype}; "
                "pass option indices, for example from sample_valid_actions"
            )
        if array.shape != shape:
            raise ValueError(
                f"actions: expected shape {shape} (num_envs, heads), got {array.shape}; "
                f"the heads are {', '.join(HEAD_NAMES)}"
            )
        outside = (array < 0) | (array >= self.nvec)
        if outside.any():
            member, head = (int(x) for x in np.argwhere(outside)[0])
            raise ValueError(
                f"actions[{member}]: head {HEAD_NAMES[head]!r} expected 0 to "
                f"{self.nvec[head] - 1}, got {array[member, head]}"
            )
        return array.astype(np.int64)

    def refuse(self, actions: IntArray, where: BoolArray) -> None:
        """Raise ValueError about the first of the illegal actions in `where` (num_envs,)."""
        member = int(np.nonzero(where)[0][0])
        chosen = {head.name: head.options[actions[member, h]] for h, head in enumerate(self.heads)}
        raise ValueError(
            f"actions[{member}] is illegal in the present state: {chosen}. Choose by "
            "conditional_masks() or sample_valid_actions(rng), or set illegal_actions='wait'"
        )

    def is_legal(self, conditional: dict[str, BoolArray], actions: IntArray) -> BoolArray:
        """Check joint actions (num_envs, 8) against the masks. (num_envs,) bool."""
        legal = np.empty(len(actions), dtype=np.bool_)
        rest = tuple([conditional[name] for name in HEAD_NAMES[2:]])
        _check_legal(legal, actions, conditional["op"], conditional["slot"], rest)
        return legal

    def sample(
        self, conditional: dict[str, BoolArray], rng: np.random.Generator
    ) -> npt.NDArray[np.int64]:
        """Draw legal actions: uniform over ops, then slots, then the options of each head.

        Returns:
            (num_envs, 8) int64.
        """
        rows = np.arange(len(conditional["op"]))
        op = _choose(conditional["op"], rng)
        slot = _choose(conditional["slot"][rows, op], rng)
        rest = [_choose(conditional[head.name][rows, op, slot], rng) for head in self.heads[2:]]
        return np.stack([op, slot, *rest], axis=1)

    def decode(self, actions: IntArray) -> Request:
        """Translate option indices (num_envs, 8) into canonical values."""
        op, slot, blueprint, style, tempo, target, speed, curve = actions.T
        targets = self._targets[target]
        return Request(
            op=self.index["op"][op],
            slot=self.index["slot"][slot],
            blueprint=self.index["blueprint"][blueprint],
            style=self.index["style"][style],
            style_curve=self._style_curves[style],
            tempo=self._tempos[tempo],
            first_target=targets,
            target=targets,
            speed=self._speeds[speed],
            curve=self.index["alpha_curve"][curve],
        )


@entry_point
def _check_legal(
    legal: BoolArray,
    actions: IntArray,
    op_mask: BoolArray,
    slot_mask: BoolArray,
    rest: tuple[BoolArray, ...],
) -> None:
    for i in range(len(legal)):
        op, slot = actions[i, 0], actions[i, 1]
        legal[i] = op_mask[i, op] and slot_mask[i, op, slot]
        for h, mask in enumerate(rest):
            legal[i] = legal[i] and mask[i, op, slot, actions[i, h + 2]]


def _restrict(name: str, canonical: tuple[Any, ...], wanted: Any) -> tuple[Any, ...]:
    values = list(wanted) if isinstance(wanted, (list, tuple)) else [wanted]
    unknown = [value for value in values if value not in canonical]
    if unknown or not values or len(set(values)) != len(values):
        raise ValueError(
            f"heads[{name!r}]: expected one or several distinct options of {canonical}, "
            f"got {wanted!r}"
        )
    return tuple(value for value in canonical if value in values)


def _choose(mask: BoolArray, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Draw one True position per row, uniformly."""
    keys = np.where(mask, rng.random(mask.shape), -1.0)
    choice: npt.NDArray[np.int64] = keys.argmax(axis=1)
    return choice
