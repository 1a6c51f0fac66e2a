"""Agents that do not learn. They read info and masks and work in any environment of `esper_env`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from esper_env import EsperVectorEnv, Op, Stage

Actions = npt.NDArray[np.int64]
IntArray = npt.NDArray[np.int64]
Plan = tuple[tuple[int, str, int], ...]
"""Slot, blueprint and env step of each germination."""
_GROWTH = re.compile(r"(\w+)@(\d+)(?::(\d+))?")


class Policy(Protocol):
    """What `evaluate` runs."""

    def begin(self, envs: EsperVectorEnv, seed: int) -> None:
        """Prepare for new episodes of all members, just after `reset`."""

    def act(self, observation: npt.NDArray[np.float32], info: dict[str, Any]) -> Actions:
        """Choose actions. (num_envs, 8) int64."""


class NeverGrow:
    """Always WAIT."""

    def begin(self, envs: EsperVectorEnv, seed: int) -> None:
        """Note how many members there are."""
        del seed
        self._shape = (envs.num_envs, len(envs.heads))

    def act(self, observation: npt.NDArray[np.float32], info: dict[str, Any]) -> Actions:
        """WAIT is option 0 of every head."""
        del observation, info
        return np.zeros(self._shape, dtype=np.int64)


class RandomLegal:
    """Uniform over legal ops, then slots, then options."""

    def begin(self, envs: EsperVectorEnv, seed: int) -> None:
        """Seed the draws."""
        self._envs = envs
        self._rng = np.random.default_rng(seed)

    def act(self, observation: npt.NDArray[np.float32], info: dict[str, Any]) -> Actions:
        """Draw."""
        del observation, info
        return self._envs.sample_valid_actions(self._rng)


class RuleBased:
    """Grows by rules: a legal slot of the first rule that has one.

    The other heads get what every rule wants of them: the rule's blueprint, full alpha, and
    otherwise the first legal option.
    """

    def begin(self, envs: EsperVectorEnv, seed: int) -> None:
        """Look up options by name and forget the past."""
        del seed
        self._envs = envs
        self._options = {head.name: head.options for head in envs.heads}
        self._slots = list(self._options["slot"])
        self._step = 0

    def _look_up(self, blueprint: str) -> int:
        """Return a blueprint's option.

        Raises:
            ValueError: If it is not offered.
        """
        offered = self._options["blueprint"]
        if blueprint not in offered:
            raise ValueError(f"blueprint: expected one of {offered}, got {blueprint!r}")
        return offered.index(blueprint)

    def _look_up_everywhere(self, blueprint: str | None) -> IntArray:
        """Return a blueprint's option for all slots; None is conv_light, or else the first."""
        offered = self._options["blueprint"]
        default = "conv_light" if "conv_light" in offered else offered[0]
        return np.full(len(self._slots), self._look_up(blueprint or default))

    def _keep_all(self, germinates: npt.NDArray[np.bool_], blueprint: IntArray) -> Actions:
        """Fossilize and advance every seed as soon as possible, and germinate in some slots.

        Args:
            germinates: Where to germinate now. (slots,).
            blueprint: Options, as `_follow` takes them. (slots,).
        """
        everywhere = np.ones((self._envs.num_envs, len(self._slots)), dtype=bool)
        rules = (
            (Op.FOSSILIZE, everywhere),
            (Op.ADVANCE, everywhere),
            (Op.GERMINATE, everywhere & germinates),
        )
        return self._follow(rules, blueprint)

    def _follow(
        self, rules: Sequence[tuple[Op, npt.NDArray[np.bool_]]], blueprint: IntArray
    ) -> Actions:
        """Carry out rules.

        Args:
            rules: In the order of their rank: an op, and where it is wanted, (num_envs, slots).
            blueprint: The option that GERMINATE takes in each slot. (slots,).
        """
        masks = self._envs.conditional_masks()
        num_envs, num_slots = len(masks["op"]), len(self._slots)
        actions = np.zeros((num_envs, len(self._options)), dtype=np.int64)
        has_acted = np.zeros(num_envs, dtype=bool)
        for op, wanted in rules:
            if op.name not in self._options["op"]:
                continue
            o = self._options["op"].index(op.name)
            possible = masks["slot"][:, o] & wanted
            if op == Op.GERMINATE:
                possible &= masks["blueprint"][:, o, np.arange(num_slots), blueprint]
            for i in np.nonzero(possible.any(axis=1) & ~has_acted)[0].tolist():
                slot = int(possible[i].argmax())
                actions[i] = self._action(masks, i, o, slot, int(blueprint[slot]))
                has_acted[i] = True
        self._step += 1
        return actions

    def _action(
        self,
        masks: dict[str, npt.NDArray[np.bool_]],
        member: int,
        op: int,
        slot: int,
        blueprint: int,
    ) -> Actions:
        """Fill the heads after op and slot."""
        action = np.zeros(len(self._options), dtype=np.int64)
        action[:2] = op, slot
        targets = self._options["alpha_target"]
        wanted = {"blueprint": blueprint}
        if 1.0 in targets:
            wanted["alpha_target"] = targets.index(1.0)
        for h, name in enumerate(self._options):
            if h >= 2:
                legal = masks[name][member, op, slot]
                option = wanted.get(name, 0)
                action[h] = option if legal[option] else legal.argmax()
        return action


class FixedSchedule(RuleBased):
    """Germinates given blueprints in given slots at given steps, whatever happens.

    Seeds are advanced and fossilized as soon as the masks allow.

    Args:
        plan: Slot, blueprint and env step of each germination, at most one per slot. One that is
            not legal yet waits until it is.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def begin(self, envs: EsperVectorEnv, seed: int) -> None:
        """Look up the plan's slots and blueprints."""
        super().begin(envs, seed)
        num_slots = len(self._slots)
        self._start = np.full(num_slots, envs.config.episode_steps)
        self._blueprint = np.zeros(num_slots, dtype=np.int64)
        for slot, blueprint, step in self.plan:
            if slot not in self._slots:
                raise ValueError(f"plan: expected slots among {self._slots}, got {slot}")
            at = self._slots.index(slot)
            self._start[at], self._blueprint[at] = step, self._look_up(blueprint)

    def act(self, observation: npt.NDArray[np.float32], info: dict[str, Any]) -> Actions:
        """Fossilize, advance, germinate."""
        del observation, info
        return self._keep_all(self._step >= self._start, self._blueprint)


class Periodic(RuleBased):
    """Germinates `blueprint` in the first free slot every `period` steps, and keeps every seed.

    Args:
        period: Time between germinations [env steps].
        blueprint: What to germinate; None for conv_light, or the first one if that is not offered.
    """

    def __init__(self, *, period: int = 15, blueprint: str | None = None) -> None:
        self.period = period
        self.blueprint = blueprint

    def begin(self, envs: EsperVectorEnv, seed: int) -> None:
        """Look up the blueprint."""
        super().begin(envs, seed)
        self._blueprint = self._look_up_everywhere(self.blueprint)

    def act(self, observation: npt.NDArray[np.float32], info: dict[str, Any]) -> Actions:
        """Fossilize, advance, germinate."""
        del observation, info
        is_time = self._step > 0 and self._step % self.period == 0
        return self._keep_all(np.full(len(self._slots), is_time), self._blueprint)


class PlateauHeuristic(RuleBased):
    """Grow when the validation accuracy stalls; keep what helps, remove what hurts.

    When the best accuracy has not risen by `margin` for `patience` steps, and enough of the
    episode is left, it germinates `blueprint` in a free slot. Seeds are advanced as soon
    as allowed, fully blended, and fossilized if their contribution is at least
    `min_contribution`; otherwise pruned after `trial_steps` steps of holding.

    Args:
        patience: Stalled env steps before growing.
        margin: Rise that counts [accuracy, 0 to 1].
        blueprint: What to germinate; None for conv_light, or the first one if that is not offered.
        deepest_first: Whether the last free slot is taken instead of the first.
        max_seeds: Seeds alive or fossilized at which it stops growing; None for no limit.
        min_contribution: Contribution that a seed must have to stay [accuracy, 0 to 1].
        trial_steps: Time that a holding seed has to prove itself [env steps].
        steps_to_live: Time left below which nothing is germinated [env steps].
    """

    def __init__(
        self,
        *,
        patience: int = 5,
        margin: float = 0.01,
        blueprint: str | None = None,
        deepest_first: bool = False,
        max_seeds: int | None = None,
        min_contribution: float = 0.005,
        trial_steps: int = 5,
        steps_to_live: int = 15,
    ) -> None:
        self.patience = patience
        self.margin = margin
        self.blueprint = blueprint
        self.deepest_first = deepest_first
        self.max_seeds = max_seeds
        self.min_contribution = min_contribution
        self.trial_steps = trial_steps
        self.steps_to_live = steps_to_live

    def begin(self, envs: EsperVectorEnv, seed: int) -> None:
        """Look up options by name and forget the past."""
        super().begin(envs, seed)
        self._blueprint = self._look_up_everywhere(self.blueprint)
        self._best = np.zeros(envs.num_envs)
        self._stalled = np.zeros(envs.num_envs, dtype=np.int64)
        self._holding = np.zeros((envs.num_envs, len(self._slots)), dtype=np.int64)

    def act(self, observation: npt.NDArray[np.float32], info: dict[str, Any]) -> Actions:
        """Apply the rules in the order fossilize, prune, advance, germinate."""
        del observation
        stage = info["stage"][:, self._slots]
        has_improved = info["accuracy"] > self._best + self.margin
        self._best = np.maximum(self._best, info["accuracy"])
        self._stalled = np.where(has_improved, 0, self._stalled + 1)
        self._holding = np.where(stage == Stage.HOLDING, self._holding + 1, 0)
        is_good = info["contribution"][:, self._slots] >= self.min_contribution
        left = self._envs.config.episode_steps - self._step
        wants_growth = (self._stalled >= self.patience) & (left >= self.steps_to_live)
        if self.max_seeds is not None:
            is_live = (stage != Stage.DORMANT) & (stage != Stage.EMBARGOED)
            wants_growth &= is_live.sum(axis=1) < self.max_seeds
        where = np.repeat(wants_growth[:, None], len(self._slots), axis=1)
        if self.deepest_first:
            # Later slots stand back only where they are not free.
            is_free = stage == Stage.DORMANT
            has_free_behind = np.cumsum(is_free[:, ::-1], axis=1)[:, ::-1] - is_free > 0
            where &= ~has_free_behind
        rules = (
            (Op.FOSSILIZE, is_good),
            (Op.PRUNE, (self._holding >= self.trial_steps) & ~is_good),
            (Op.ADVANCE, np.ones_like(is_good)),
            (Op.GERMINATE, where),
        )
        actions = self._follow(rules, self._blueprint)
        ops = np.array([Op[name] for name in self._options["op"]])
        self._stalled[ops[actions[:, 0]] == Op.GERMINATE] = 0
        return actions


def parse_plan(text: str) -> Plan:
    """Read a plan such as "conv_heavy@0+norm@1:20": blueprint@slot, from step 20 or at once.

    Raises:
        ValueError: If it cannot be read, or names a slot twice.
    """
    plan = []
    for part in text.split("+") if text else ():
        match = _GROWTH.fullmatch(part.strip())
        if match is None:
            raise ValueError(
                f"schedule: expected blueprint@slot or blueprint@slot:step joined by +, such as "
                f"conv_heavy@0+norm@1:20, got {part!r}"
            )
        blueprint, slot, step = match.groups()
        plan.append((int(slot), blueprint, int(step or 0)))
    if len({slot for slot, *_ in plan}) < len(plan):
        raise ValueError(f"schedule: expected each slot once, got {text!r}")
    return tuple(plan)


TUNED_HEURISTIC: dict[str, Any] = {
    "patience": 2,
    "margin": 0.02052760337504611,
    "blueprint": "conv_heavy",
    "deepest_first": True,
    "max_seeds": 2,
    "min_contribution": -0.015598877639594975,
    "trial_steps": 10,
    "steps_to_live": 30,
}
"""Thresholds found on the training instances of Esper-Digits-v0 (`benchmarks/learning.py`)."""
BEST_SCHEDULE = "conv_heavy@0+norm@1"
"""The best fixed schedule on them, as `parse_plan` reads it."""

BASELINES: dict[str, Callable[[], Policy]] = {
    "never-grow": NeverGrow,
    "random": RandomLegal,
    "periodic": Periodic,
    "heuristic": PlateauHeuristic,
    "tuned-heuristic": partial(PlateauHeuristic, **TUNED_HEURISTIC),
    "best-schedule": partial(FixedSchedule, parse_plan(BEST_SCHEDULE)),
}
"""Baselines by the name that `evaluate --agents` takes."""
