"""Wrappers: the joint action space with its exact mask, and masks inside observations."""

from __future__ import annotations

import itertools
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from esper_env.config import BoolArray, Op
from esper_env.envs.single_env import EsperEnv
from esper_env.envs.vector_env import EsperVectorEnv
from esper_env.growth.action_space import RELEVANT_HEADS, ActionHead

Inner = TypeVar("Inner", EsperEnv, EsperVectorEnv)


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
        self._inner = _unwrap(env, EsperEnv, "JointAction", "JointActionVector")
        _refuse_mask_of_factors(env, env.observation_space)
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)
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
        self._inner = _unwrap(env, EsperVectorEnv, "JointActionVector", "JointAction")
        _refuse_mask_of_factors(env, env.single_observation_space)
        super().__init__(env)
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
            mask = self.table.mask(self._inner.final_conditional_masks())
            info["final_info"] = {**info["final_info"], "action_mask": mask}
        return observation, reward, terminated, truncated, info

    def action_masks(self) -> BoolArray:
        """Return the masks of the next actions, (num_envs, n) bool; True is legal."""
        return self.table.mask(self._inner.conditional_masks())


class MaskInObservation(gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    """A single environment whose observation contains the mask of the next action.

    Observations are `{"observations": features, "action_mask": mask}`, the keys that RLlib's
    modules for masked actions read. The mask is that of `info["action_mask"]` as (n,) float32,
    1.0 is legal: those modules take its logarithm, and a flattened observation has one dtype.
    `action_masks()` stays bool; `get_wrapper_attr("action_masks")` finds it.

    Args:
        env: An `EsperEnv` or a `JointAction`, possibly wrapped.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        _unwrap(env, EsperEnv, "MaskInObservation", "MaskInObservationVector")
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)
        self.observation_space = _space_with_mask(env.observation_space, env.action_space)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, npt.NDArray[np.float32]], dict[str, Any]]:
        """Reset, and put the mask into the observation."""
        observation, info = self.env.reset(seed=seed, options=options)
        return _with_mask(observation, info["action_mask"]), info

    def step(
        self, action: Any
    ) -> tuple[dict[str, npt.NDArray[np.float32]], Any, bool, bool, dict[str, Any]]:
        """Step, and put the mask into the observation."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return _with_mask(observation, info["action_mask"]), reward, terminated, truncated, info


class MaskInObservationVector(VectorWrapper):
    """A vector environment whose observations contain the masks of the next actions.

    The same as `MaskInObservation` for every member; entries of `final_obs` contain the masks of
    the final states.

    Args:
        env: An `EsperVectorEnv` or a `JointActionVector`, possibly wrapped.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        _unwrap(env, EsperVectorEnv, "MaskInObservationVector", "MaskInObservation")
        super().__init__(env)
        self.single_observation_space = _space_with_mask(
            env.single_observation_space, env.single_action_space
        )
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, npt.NDArray[np.float32]], dict[str, Any]]:
        """Reset, and put the masks into the observations."""
        observations, info = self.env.reset(seed=seed, options=options)
        return _with_mask(observations, info["action_mask"]), info

    def step(
        self, actions: Any
    ) -> tuple[dict[str, npt.NDArray[np.float32]], Any, Any, Any, dict[str, Any]]:
        """Step, and put the masks into the observations and final observations."""
        observations, rewards, terminations, truncations, info = self.env.step(actions)
        if "final_obs" in info:
            rows = info["final_obs"].copy()
            for i in np.nonzero(info["_final_obs"])[0]:
                rows[i] = _with_mask(rows[i], info["final_info"]["action_mask"][i])
            info = {**info, "final_obs": rows}
        observations = _with_mask(observations, info["action_mask"])
        return observations, rewards, terminations, truncations, info


def _unwrap(env: Any, expected: type[Inner], wrapper: str, other: str) -> Inner:
    """Return the environment below all wrappers, or say which wrapper is the right one."""
    inner = env.unwrapped
    if not isinstance(inner, expected):
        raise TypeError(
            f"{wrapper}: expected an {expected.__name__}, got {type(inner).__name__}; {other} is "
            "the wrapper for the other kind of environment, single or vector"
        )
    return inner


def _refuse_mask_of_factors(env: Any, space: gym.Space[Any]) -> None:
    """Raise if observations already contain the mask of the factored action."""
    if isinstance(space, gym.spaces.Dict) and "action_mask" in space.spaces:
        raise ValueError(
            f"joint actions: expected observations without a mask, got those of {env}; apply "
            "MaskInObservation or MaskInObservationVector last"
        )


def _space_with_mask(space: gym.Space[Any], actions: gym.Space[Any]) -> gym.spaces.Dict:
    mask = gym.spaces.Box(0.0, 1.0, (gym.spaces.flatdim(actions),), np.float32)
    return gym.spaces.Dict({"observations": space, "action_mask": mask})


def _with_mask(observations: Any, mask: BoolArray) -> dict[str, npt.NDArray[np.float32]]:
    return {"observations": observations, "action_mask": mask.astype(np.float32)}


def _check_range(actions: npt.NDArray[Any], shape: tuple[int, ...], n: int) -> None:
    is_integer = np.issubdtype(actions.dtype, np.integer) and actions.shape == shape
    if not is_integer or ((actions < 0) | (actions >= n)).any():
        raise ValueError(
            f"joint actions: expected integers from 0 to {n - 1} of shape {shape}, got {actions!r}"
        )
