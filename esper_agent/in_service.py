"""Policies that put the seeds of a plan into service and out again, at env steps or by a signal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from esper_agent.baselines import Actions, Plan, RuleBased
from esper_env import EsperVectorEnv, Op


class InService(RuleBased):
    """Puts the seeds of a plan into service when it wants them, and takes them out otherwise.

    Seeds are germinated, in the order of the plan, and advanced as soon as the masks allow. Out of
    service they are parked, or pruned where the environment has no parking. Subclasses decide in
    `wants`.

    Args:
        plan: Slot and blueprint of each seed; its env steps are not used.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def begin(self, envs: EsperVectorEnv, seed: int) -> None:
        """Look up the blueprints of the plan."""
        super().begin(envs, seed)
        never = -1
        start, self._blueprint = self._look_up_plan(self.plan, never)
        self._is_planned = start != never
        self._parks = 0.0 in self._options["alpha_target"] and "SET_ALPHA" in self._options["op"]
        self._wanted = np.zeros(envs.num_envs, dtype=bool)

    def wants(self, info: dict[str, Any]) -> npt.NDArray[np.bool_]:
        """Return whether the seeds should be in service; `_wanted` is the previous result.

        Args:
            info: Info after the last step.

        Returns:
            (num_envs,) bool.
        """
        raise NotImplementedError

    def act(self, observation: npt.NDArray[np.float32], info: dict[str, Any]) -> Actions:
        """Apply the rules in the order advance, set alpha, germinate, prune."""
        del observation
        self._wanted = self.wants(info)
        planned = np.broadcast_to(self._is_planned, (len(self._wanted), len(self._slots)))
        enters, leaves = planned & self._wanted[:, None], planned & ~self._wanted[:, None]
        rules = [(Op.ADVANCE, enters), (Op.SET_ALPHA, planned)]
        slots = np.array(self._slots)
        rules += [(Op.GERMINATE, enters & (slots == slot)) for slot, *_ in self.plan]
        if not self._parks:
            rules.append((Op.PRUNE, leaves))
        return self._follow(rules, self._blueprint, parks=~self._wanted)


class OpenLoop(InService):
    """In service from one env step to another, whatever happens.

    Args:
        plan: Slot and blueprint of each seed.
        start: First env step in service.
        stop: First env step out of service again; None for never.
        period: Env steps in service, and then out of service, in turn; None for no interruption.
    """

    def __init__(
        self, plan: Plan, start: int = 0, stop: int | None = None, period: int | None = None
    ) -> None:
        super().__init__(plan)
        self.start, self.stop, self.period = start, stop, period

    def wants(self, info: dict[str, Any]) -> npt.NDArray[np.bool_]:
        """Compare the step with start and stop."""
        del info
        is_on = self._step >= self.start and (self.stop is None or self._step < self.stop)
        if self.period is not None:
            is_on &= (self._step - self.start) // self.period % 2 == 0
        return np.full(len(self._wanted), is_on)


class Oracle(InService):
    """In service in some regimes, which `info["regime"]` reveals: an upper limit, not a policy.

    Args:
        plan: Slot and blueprint of each seed.
        regimes: Kinds of problems in which the seeds are in service.
    """

    def __init__(self, plan: Plan, regimes: Sequence[int]) -> None:
        super().__init__(plan)
        self.regimes = tuple(regimes)

    def wants(self, info: dict[str, Any]) -> npt.NDArray[np.bool_]:
        """Look up the regime."""
        return np.isin(info["regime"], self.regimes)


class Threshold(InService):
    """In service if the validation accuracy is low.

    Args:
        plan: Slot and blueprint of each seed.
        below: Accuracy below which the seeds are in service.
        decide_at: Env step at which this is decided for the rest of the episode; None decides in
            every env step, which needs no memory.
        begins: Whether the seeds are in service before that.
    """

    def __init__(
        self, plan: Plan, below: float, decide_at: int | None = None, begins: bool = False
    ) -> None:
        super().__init__(plan)
        self.below, self.decide_at, self.begins = below, decide_at, begins

    def begin(self, envs: EsperVectorEnv, seed: int) -> None:
        """Put the seeds into service at once, or not."""
        super().begin(envs, seed)
        self._wanted[:] = self.begins

    def wants(self, info: dict[str, Any]) -> npt.NDArray[np.bool_]:
        """Compare the accuracy with the threshold."""
        if self.decide_at is not None and self._step != self.decide_at:
            return self._wanted
        result: npt.NDArray[np.bool_] = info["accuracy"] < self.below
        return result


class Toggle(InService):
    """Changes between in and out of service when the validation accuracy drops.

    Args:
        plan: Slot and blueprint of each seed.
        drop: Drop below the mean of the last env steps that counts [accuracy, 0 to 1].
        window: Env steps in that mean, those before the last change left out.
        wait: Env steps between two changes, at least.
        below: Accuracy below which it changes, instead of a drop; this needs no memory but that of
            the environment.
    """

    def __init__(
        self,
        plan: Plan,
        drop: float = 0.15,
        window: int = 3,
        wait: int = 2,
        below: float | None = None,
    ) -> None:
        super().__init__(plan)
        self.drop, self.window, self.wait, self.below = drop, window, wait, below

    def begin(self, envs: EsperVectorEnv, seed: int) -> None:
        """Forget all accuracies."""
        super().begin(envs, seed)
        self._past = np.full((self.window, envs.num_envs), np.nan)
        self._since = np.full(envs.num_envs, self.wait)

    def wants(self, info: dict[str, Any]) -> npt.NDArray[np.bool_]:
        """Compare the accuracy with the recent ones."""
        accuracy, self._since = info["accuracy"], self._since + 1
        if self.below is not None:
            changes = accuracy < self.below
        else:
            known = ~np.isnan(self._past)
            mean = np.nansum(self._past, axis=0) / np.maximum(known.sum(axis=0), 1)
            changes = known.any(axis=0) & (accuracy < mean - self.drop) & (self._since > self.wait)
        self._since[changes] = 0
        self._past = np.roll(self._past, 1, axis=0)
        self._past[0] = accuracy
        self._past[:, changes] = np.nan
        result: npt.NDArray[np.bool_] = self._wanted ^ changes
        return result
