"""The joint action space: one integer per distinct effective action, with its exact mask."""

from __future__ import annotations

import itertools
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from esper_env.actions import RELEVANT_HEADS, ActionHead
from esper_env.config import BoolArray, Op
from esper_env.env import EsperEnv
from esper_env.vector_env import EsperVectorEnv


class JointTable:
    """All distinct effective actions: heads that an op does not read stay at option 0.

    Args:
        heads: The factored action's components.
    """

    def __init__(self, heads: tuple[ActionHead, ...]) -> None:
        rows = []
        for index, name in enumerate(heads[0].options):
            relevant = RELEVANT_HEADS[Op[name]]
            ranges = [range(len(h.options)) if h.name in relevant else (0,) for h in heads[1:]]
            rows += [(index, *rest) for rest in itertools.product(*ranges)]
        self.actions: npt.NDArray[np.int64] = np.array(rows)
        """The factored action of each integer. (n, heads)."""
        self._names = [head.name for head in heads]

    def mask(self, conditional: dict[str, BoolArray]) -> BoolArray:
        """Return which integers are legal; True is legal.

        Args:
            conditional: Conditional masks of all members.

        Returns:
            (num_envs, n) bool. A joint action is legal exactly if its mask is True.
        """
        op, slot, *rest = self.actions.T
        legal = conditional["slot"][:, op, slot]
        for name, options in zip(self._names[2:], rest, strict=True):
            legal = legal & conditional[name][:, op, slot, options]
        return legal


class JointAction(gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    """A single environment whose action is one integer.

    `action_masks()` and `info["action_mask"]` hold the mask of the integers, (n,) bool.

    Args:
        env: An `EsperEnv`, possibly wrapped.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)
        if not isinstance(env.unwrapped, EsperEnv):
            raise TypeError(
                f"JointAction: expected an EsperEnv, got {type(env.unwrapped).__name__}; use "
                "JointActionVector for a vector environment"
            )
        self._inner = env.unwrapped
        self.table = JointTable(self._inner.heads)
        self.action_space = gym.spaces.Discrete(len(self.table.actions))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset, and replace the mask in info."""
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, {**info, "action_mask": self.action_masks()}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take one of the `n` actions."""
        _check_range(np.asarray(action), (), len(self.table.actions))
        observation, reward, terminated, truncated, info = self.env.step(
            self.table.actions[int(action)]
        )
        info = {**info, "action_mask": self.action_masks()}
        return observation, reward, terminated, truncated, info

    def action_masks(self) -> BoolArray:
        """Return the mask of the next action, (n,) bool; True is legal."""
        conditional = {name: m[None] for name, m in self._inner.conditional_masks().items()}
        mask: BoolArray = self.table.mask(conditional)[0]
        return mask


class JointActionVector(VectorWrapper):
    """A vector environment whose actions are one integer per member.

    `action_masks()` and `info["action_mask"]` (also in `final_info`) hold masks of the integers,
    (num_envs, n) bool.

    Args:
        env: An `EsperVectorEnv`, possibly wrapped.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(env)
        if not isinstance(env.unwrapped, EsperVectorEnv):
            raise TypeError(
                f"JointActionVector: expected an EsperVectorEnv, got "
                f"{type(env.unwrapped).__name__}; use JointAction for a single environment"
            )
        self._inner = env.unwrapped
        self.table = JointTable(self._inner.heads)
        self.single_action_space = gym.spaces.Discrete(len(self.table.actions))
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset, and replace the mask in info."""
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, {**info, "action_mask": self.action_masks()}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Take one of the `n` actions per member. (num_envs,) integers."""
        array = np.asarray(actions)
        _check_range(array, (self.num_envs,), len(self.table.actions))
        observation, reward, terminated, truncated, info = self.env.step(self.table.actions[array])
        info = {**info, "action_mask": self.action_masks()}
        if "final_info" in info:
            # The factored mask of an observation that nobody acts on has no joint counterpart left.
            final = dict(info["final_info"])
            del final["action_mask"], final["_action_mask"]
            info["final_info"] = final
        return observation, reward, terminated, truncated, info

    def action_masks(self) -> BoolArray:
        """Return the masks of the next actions, (num_envs, n) bool; True is legal."""
        return self.table.mask(self._inner.conditional_masks())


def _check_range(actions: npt.NDArray[Any], shape: tuple[int, ...], n: int) -> None:
    is_integer = np.issubdtype(actions.dtype, np.integer) and actions.shape == shape
    if not is_integer or ((actions < 0) | (actions >= n)).any():
        raise ValueError(
            f"joint actions: expected integers from 0 to {n - 1} of shape {shape}, got {actions!r}"
        )
