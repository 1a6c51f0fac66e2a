"""Policies that do not learn; they use info and masks, and work in every environment of Esper."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from esper_env import EsperVectorEnv, Op, Stage

Actions = npt.NDArray[np.int64]
IntArray = npt.NDArray[np.int64]
Masks = dict[str, npt.NDArray[np.bool_]]
Plan = tuple[tuple[int, str, int], ...]
"""Slot, blueprint and env step of each germination."""
_GROWTH = re.compile(r"(\w+)@(\d+)(?::(\d+))?")


class Policy(Protocol):
    """Interface of the policies that `evaluate` compares."""

    def begin(self, envs: EsperVectorEnv, seed: int) -> None:
        """Prepare for new episodes; called after every `reset`.

        Args:
            envs: Environment to act in.
            seed: Random seed of the policy.

        Raises:
            ValueError: If the policy does not fit the environment.
        """

    def act(self, observation: npt.NDArray[np.float32], info: dict[str, Any]) -> Actions:
        """Return one action per sub-environment. (num_envs, num_heads) int64.

        Args:
            observation: Observations from `reset` or `step`. (num_envs, num_features).
            info: Info from the same call.
        """


class NeverGrow:
    """Always WAIT."""

    def begin(self, envs: EsperVectorEnv, seed: int) -> None:
        """Store the shape of the actions."""
        del seed
        self._shape = (envs.num_envs, len(envs.heads))

    def act(self, observation: npt.NDArray[np.float32], info: dict[str, Any]) -> Actions:
        """Return option 0 of every head, which is WAIT."""
        del observation, info
        return np.zeros(self._shape, dtype=np.int64)


class RandomLegal:
    """Samples uniformly from the legal ops, then slots, then options."""

    def begin(self, envs: EsperVectorEnv, seed: int) -> None:
        """Seed the generator."""
        self._envs = envs
        self._rng = np.random.default_rng(seed)

    def act(self, observation: npt.NDArray[np.float32], info: dict[str, Any]) -> Actions:
        """Sample actions."""
        del observation, info
        return self._envs.sample_valid_actions(self._rng)


class RuleBased:
    """Base of policies that follow rules: the first rule with a legal slot decides the action.

    The other heads get the blueprint of their slot, full alpha, `style` if it is offered, and
    otherwise the first legal option.
    """

    style: ClassVar[str | None] = None
    """Style of all germinations; None for the first legal one."""

    def begin(self, envs: EsperVectorEnv, seed: int) -> None:
        """Look up the options of all heads and reset the step count."""
        del seed
        self._envs = envs
        self._options = {head.name: head.options for head in envs.heads}
        self._slots = list(self._options["slot"])
        self._step = 0

    def _look_up(self, blueprint: str) -> int:
        """Return the option of a blueprint.

        Raises:
            ValueError: If the environment does not offer it.
        """
        offered = self._options["blueprint"]
        if blueprint not in offered:
            raise ValueError(f"blueprint: expected one of {offered}, got {blueprint!r}")
        return offered.index(blueprint)

    def _look_up_everywhere(self, blueprint: str | None) -> IntArray:
        """Return an option per slot; None means conv_light if offered, else the first one."""
        offered = self._options["blueprint"]
        default = "conv_light" if "conv_light" in offered else offered[0]
        return np.full(len(self._slots), self._look_up(blueprint or default))

    def _look_up_plan(self, plan: Plan, never: int) -> tuple[IntArray, IntArray]:
        """Return env step and blueprint option of each slot in a plan. (num_slots,) int64 each.

        Args:
            plan: Slot, blueprint and env step of each germination.
            never: Env step of slots that are not in the plan.

        Raises:
            ValueError: If the environment does not offer a slot or a blueprint.
        """
        start = np.full(len(self._slots), never)
        option = np.zeros(len(self._slots), dtype=np.int64)
        for slot, blueprint, step in plan:
            if slot not in self._slots:
                raise ValueError(f"plan: expected slots among {self._slots}, got {slot}")
            at = self._slots.index(slot)
            start[at], option[at] = step, self._look_up(blueprint)
        return start, option

    def _keep_all(self, germinates: npt.NDArray[np.bool_], blueprint: IntArray) -> Actions:
        """Fossilize and advance every seed as soon as possible, and germinate in given slots.

        Args:
            germinates: True for slots to germinate in now. (num_slots,) bool.
            blueprint: Blueprint option of each slot. (num_slots,) int64.
        """
        everywhere = np.ones((self._envs.num_envs, len(self._slots)), dtype=bool)
        rules = (
            (Op.FOSSILIZE, everywhere),
            (Op.ADVANCE, everywhere),
            (Op.GERMINATE, everywhere & germinates),
        )
        return self._follow(rules, blueprint)

    def _follow(
        self,
        rules: Sequence[tuple[Op, npt.NDArray[np.bool_]]],
        blueprint: IntArray,
        parks: npt.NDArray[np.bool_] | None = None,
    ) -> Actions:
        """Return the action of the first rule that is legal, else WAIT.

        Args:
            rules: Pairs of an op and the slots it applies to, (num_envs, num_slots) bool, by
                priority.
            blueprint: Blueprint option that GERMINATE uses in each slot. (num_slots,) int64.
            parks: Where SET_ALPHA aims at alpha 0 instead of 1. (num_envs,) bool.
        """
        masks = self._envs.conditional_masks()
        num_envs, num_slots = len(masks["op"]), len(self._slots)
        targets = list(self._options["alpha_target"])
        target = np.full(num_envs, targets.index(1.0) if 1.0 in targets else 0)
        if parks is not None and 0.0 in targets:
            target[parks] = targets.index(0.0)
        actions = np.zeros((num_envs, len(self._options)), dtype=np.int64)
        has_acted = np.zeros(num_envs, dtype=bool)
        for op, wanted in rules:
            if op.name not in self._options["op"]:
                continue
            o = self._options["op"].index(op.name)
            possible = masks["slot"][:, o] & wanted
            if op == Op.GERMINATE:
                possible &= masks["blueprint"][:, o, np.arange(num_slots), blueprint]
            if op == Op.SET_ALPHA:
                possible &= masks["alpha_target"][np.arange(num_envs), o, :, target]
            rows = np.nonzero(possible.any(axis=1) & ~has_acted)[0]
            slot = possible[rows].argmax(axis=1)
            chosen = {"blueprint": blueprint[slot], "alpha_target": target[rows]}
            actions[rows] = self._complete(masks, rows, o, slot, chosen)
            has_acted[rows] = True
        self._step += 1
        return actions

    def _complete(
        self, masks: Masks, rows: IntArray, op: int, slot: IntArray, wanted: dict[str, IntArray]
    ) -> Actions:
        """Return the full actions of m sub-environments, given op and slots. (m, num_heads) int64.

        Args:
            masks: Conditional masks of all sub-environments.
            rows: Indices of the sub-environments. (m,) int64.
            op: Option of the op.
            slot: Option of each slot. (m,) int64.
            wanted: Options of some heads where they are legal. (m,) int64 each.
        """
        first = np.zeros(len(rows), dtype=np.int64)
        if self.style in self._options["style"]:
            wanted["style"] = first + self._options["style"].index(self.style)
        heads = [np.full(len(rows), op), slot]
        for name in list(self._options)[2:]:
            legal, option = masks[name][rows, op, slot], wanted.get(name, first)
            is_legal = legal[np.arange(len(rows)), option]
            heads.append(np.where(is_legal, option, legal.argmax(axis=1)))
        return np.stack(heads, axis=1)


@dataclass
class FixedSchedule(RuleBased):
    """Germinates given blueprints in given slots at given env steps.

    Seeds are advanced and fossilized as soon as the masks allow.

    Args:
        plan: Slot, blueprint and env step of each germination, at most one per slot. A germination
            that is illegal at its step follows as soon as it is legal.
    """

    plan: Plan

    def begin(self, envs: EsperVectorEnv, seed: int) -> None:
        """Look up the slots and blueprints of the plan."""
        super().begin(envs, seed)
        for _, _, step in self.plan:
            if step >= envs.config.episode_steps:
                last = envs.config.episode_steps - 1
                raise ValueError(f"plan: expected steps of 0 to {last}, got {step}")
        never = envs.config.episode_steps
        self._start, self._blueprint = self._look_up_plan(self.plan, never)

    def act(self, observation: npt.NDArray[np.float32], info: dict[str, Any]) -> Actions:
        """Apply the rules in the order fossilize, advance, germinate."""
        del observation, info
        return self._keep_all(self._step >= self._start, self._blueprint)


@dataclass(kw_only=True)
class Periodic(RuleBased):
    """Germinates in the first free slot at regular intervals, and keeps every seed.

    Args:
        period: Interval between germinations [env steps].
        blueprint: Blueprint to germinate; None for conv_light if offered, else the first one.
    """

    period: int = 15
    blueprint: str | None = None

    def begin(self, envs: EsperVectorEnv, seed: int) -> None:
        """Look up the blueprint."""
        super().begin(envs, seed)
        self._blueprint = self._look_up_everywhere(self.blueprint)

    def act(self, observation: npt.NDArray[np.float32], info: dict[str, Any]) -> Actions:
        """Apply the rules in the order fossilize, advance, germinate."""
        del observation, info
        is_time = self._step > 0 and self._step % self.period == 0
        return self._keep_all(np.full(len(self._slots), is_time), self._blueprint)


@dataclass(kw_only=True)
class PlateauHeuristic(RuleBased):
    """Grows when the validation accuracy stalls, keeps seeds that help and prunes the others.

    Germinates in a free slot when the best accuracy has not improved by `margin` for `patience`
    steps and enough of the episode is left. Seeds are advanced as soon as the masks allow and
    blended fully. A holding seed is fossilized if its contribution is at least `min_contribution`,
    and pruned after `trial_steps` otherwise.

    Args:
        patience: Env steps without improvement before a germination.
        margin: Smallest improvement that counts [accuracy, 0 to 1].
        blueprint: Blueprint to germinate; None for conv_light if offered, else the first one.
        deepest_first: Use the last free slot instead of the first.
        max_seeds: Largest number of seeds alive or fossilized; None for no limit.
        min_contribution: Smallest contribution of a seed that is kept [accuracy, 0 to 1].
        trial_steps: Holding time after which a seed is pruned [env steps].
        steps_to_live: Remaining time below which nothing is germinated [env steps].
    """

    patience: int = 5
    margin: float = 0.01
    blueprint: str | None = None
    deepest_first: bool = False
    max_seeds: int | None = None
    min_contribution: float = 0.005
    trial_steps: int = 5
    steps_to_live: int = 15

    def begin(self, envs: EsperVectorEnv, seed: int) -> None:
        """Look up the blueprint and reset the memory of accuracies and holding times."""
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
            # `_follow` picks the first legal slot, so slots before another free one are excluded.
            is_free = stage == Stage.DORMANT
            num_free_after = np.cumsum(is_free[:, ::-1], axis=1)[:, ::-1] - is_free
            where &= num_free_after == 0
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


class Churner(RuleBased):
    """Adversary: prunes every seed as soon as possible and germinates the next one.

    It sets `info["flag_churn"]`.
    """

    def act(self, observation: npt.NDArray[np.float32], info: dict[str, Any]) -> Actions:
        """Apply the rules in the order prune, germinate."""
        del observation, info
        everywhere = np.ones((self._envs.num_envs, len(self._slots)), dtype=bool)
        rules = ((Op.PRUNE, everywhere), (Op.GERMINATE, everywhere))
        return self._follow(rules, self._look_up_everywhere(None))


class ParasiteGrower(RuleBased):
    """Adversary: blends untrained seeds that harm together, though each one looks needed.

    Seeds of two slots that scale the features (LINEAR_MULTIPLY, where it is offered) cancel some of
    each other's harm. Without one of them the network is worse, without both it is better. It sets
    `info["flag_parasite"]` and `info["flag_attribution"]`.
    """

    style = "LINEAR_MULTIPLY"

    def act(self, observation: npt.NDArray[np.float32], info: dict[str, Any]) -> Actions:
        """Apply the rules in the order prune, advance, germinate; a holding seed is pruned."""
        del observation
        is_holding = info["stage"][:, self._slots] == Stage.HOLDING
        everywhere = np.ones_like(is_holding)
        rules = ((Op.PRUNE, is_holding), (Op.ADVANCE, everywhere), (Op.GERMINATE, everywhere))
        return self._follow(rules, self._look_up_everywhere("conv_small"))


def parse_plan(text: str) -> Plan:
    """Parse a plan such as "conv_heavy@0+norm@1:20": blueprint@slot or blueprint@slot:step.

    Raises:
        ValueError: If the text has another form, or contains a slot twice.
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
"""Thresholds tuned on the training instances of Esper-Digits-v0 (`benchmarks/learning.py`)."""
BEST_SCHEDULE = "conv_light@0+conv_heavy@1"
"""Best fixed schedule on the same instances, in the form that `parse_plan` reads."""

BASELINES: dict[str, Callable[[], Policy]] = {
    "never-grow": NeverGrow,
    "random": RandomLegal,
    "periodic": Periodic,
    "heuristic": PlateauHeuristic,
    "tuned-heuristic": partial(PlateauHeuristic, **TUNED_HEURISTIC),
    "churner": Churner,
    "parasite": ParasiteGrower,
    "best-schedule": partial(FixedSchedule, parse_plan(BEST_SCHEDULE)),
}
"""Baselines by their name in `evaluate --agents`."""
