"""Agents that do not learn. They read info and masks and work in any environment of `esper_env`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from esper_env import EsperVectorEnv, Op, Stage

Actions = npt.NDArray[np.int64]


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


class PlateauHeuristic:
    """Grow when the validation accuracy stalls; keep what helps, remove what hurts.

    When the best accuracy has not risen by `margin` for `patience` steps, and enough of the
    episode is left, it germinates `blueprint` in the first free slot. Seeds are advanced as soon
    as allowed, fully blended, and fossilized if their contribution is at least
    `min_contribution`; otherwise pruned after `trial_steps` steps of holding.

    Args:
        patience: Stalled env steps before growing.
        margin: Rise that counts [accuracy, 0 to 1].
        blueprint: What to germinate; None for conv_light, or the first one if that is not offered.
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
        min_contribution: float = 0.005,
        trial_steps: int = 5,
        steps_to_live: int = 15,
    ) -> None:
        self.patience = patience
        self.margin = margin
        self.blueprint = blueprint
        self.min_contribution = min_contribution
        self.trial_steps = trial_steps
        self.steps_to_live = steps_to_live

    def begin(self, envs: EsperVectorEnv, seed: int) -> None:
        """Look up options by name and forget the past."""
        del seed
        self._envs = envs
        self._options = {head.name: head.options for head in envs.heads}
        offered = self._options["blueprint"]
        default = "conv_light" if "conv_light" in offered else offered[0]
        self._blueprint = self.blueprint or default
        if self._blueprint not in offered:
            raise ValueError(f"blueprint: expected one of {offered}, got {self.blueprint!r}")
        self._best = np.zeros(envs.num_envs)
        self._stalled = np.zeros(envs.num_envs, dtype=np.int64)
        self._holding = np.zeros((envs.num_envs, len(self._options["slot"])), dtype=np.int64)
        self._step = 0

    def act(self, observation: npt.NDArray[np.float32], info: dict[str, Any]) -> Actions:
        """Apply the rules in the order fossilize, prune, advance, germinate."""
        del observation
        slots = list(self._options["slot"])
        stage = info["stage"][:, slots]
        contribution = info["contribution"][:, slots]
        has_improved = info["accuracy"] > self._best + self.margin
        self._best = np.maximum(self._best, info["accuracy"])
        self._stalled = np.where(has_improved, 0, self._stalled + 1)
        self._holding = np.where(stage == Stage.HOLDING, self._holding + 1, 0)
        left = self._envs.config.episode_steps - self._step
        self._step += 1

        masks = self._envs.conditional_masks()
        is_good = contribution >= self.min_contribution
        wants_prune = (self._holding >= self.trial_steps) & ~is_good
        wants_growth = (self._stalled >= self.patience) & (left >= self.steps_to_live)
        actions = np.zeros((len(stage), len(self._options)), dtype=np.int64)
        rules = (
            (Op.FOSSILIZE, is_good),
            (Op.PRUNE, wants_prune),
            (Op.ADVANCE, np.ones_like(is_good)),
            (Op.GERMINATE, np.repeat(wants_growth[:, None], len(slots), axis=1)),
        )
        has_acted = np.zeros(len(stage), dtype=bool)
        for op, wanted in rules:
            if op.name not in self._options["op"]:
                continue
            o = self._options["op"].index(op.name)
            possible = masks["slot"][:, o] & wanted
            if op == Op.GERMINATE:
                b = self._options["blueprint"].index(self._blueprint)
                possible &= masks["blueprint"][:, o, :, b]
            now = possible.any(axis=1) & ~has_acted
            slot = possible.argmax(axis=1)
            for i in np.nonzero(now)[0].tolist():
                actions[i] = self._action(masks, i, o, int(slot[i]))
                if op == Op.GERMINATE:
                    self._stalled[i] = 0
            has_acted |= now
        return actions

    def _action(
        self, masks: dict[str, npt.NDArray[np.bool_]], member: int, op: int, slot: int
    ) -> Actions:
        """Fill the other heads: the wanted blueprint, full alpha, otherwise the first legal."""
        action = np.zeros(len(self._options), dtype=np.int64)
        action[:2] = op, slot
        wanted = {"blueprint": self._blueprint, "alpha_target": 1.0}
        for h, (name, options) in enumerate(self._options.items()):
            if h < 2:
                continue
            legal = masks[name][member, op, slot]
            action[h] = legal.argmax()
            if name in wanted and wanted[name] in options and legal[options.index(wanted[name])]:
                action[h] = options.index(wanted[name])
        return action


BASELINES: dict[str, Callable[[], Policy]] = {
    "never-grow": NeverGrow,
    "random": RandomLegal,
    "heuristic": PlateauHeuristic,
}
"""Baselines by the name that `evaluate --agents` takes."""
