"""Wrappers: joint action space with an exact mask, and masks in observations."""

from __future__ import annotations

import itertools
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from esper_env.config import BoolArray, EnvConfig, Op
from esper_env.envs.single_env import EsperEnv
from esper_env.envs.vector_env import EsperVectorEnv
from esper_env.growth.action_space import ActionHead, usable_options

Inner = TypeVar("Inner", EsperEnv, EsperVectorEnv)


class JointTable:
    """Table of the distinct actions. Heads that the op does not use have option 0.

    Args:
        heads: Heads of the factored action.
        config: Settings of the environment, which decide what each op uses.
    """

    def __init__(self, heads: tuple[ActionHead, ...], config: EnvConfig) -> None:
        rows = []
        for index, name in enumerate(heads[0].options):
            ranges = [usable_options(Op[name], head, config) for head in heads[1:]]
            rows += [(index, *rest) for rest in itertools.product(*ranges)]
        self.actions: npt.NDArray[np.int64] = np.array(rows)
        """Factored action of each joint action. (n, heads) int64."""
        self._names = [head.name for head in heads]

    def mask(self, conditional: dict[str, BoolArray]) -> BoolArray:
        """Return the mask of the joint actions; True means legal.

        Args:
            conditional: Conditional masks of all sub-environments.

        Returns:
            Exact mask. (num_envs, n) bool.
        """
        op, slot, *rest = self.actions.T
        # "slot" (num_envs, ops, slots) -> (num_envs, n); it is False for all slots of an illegal op
        legal = conditional["slot"][:, op, slot]
        for name, options in zip(self._names[2:], rest, strict=True):
            legal = legal & conditional[name][:, op, slot, options]
        return legal


class JointAction(gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    """Wrapper of a single environment that makes the action one integer.

    `action_masks()` and `info["action_mask"]` are the exact mask of the n actions, (n,) bool.

    Args:
        env: An `EsperEnv`, possibly wrapped.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        self._inner = _unwrap(env, EsperEnv, "JointAction", "JointActionVector")
        _reject_mask_of_factors(env, env.observation_space)
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)
        self.table = JointTable(self._inner.heads, self._inner.config)
        self.action_space = gym.spaces.Discrete(len(self.table.actions))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset the environment; info contains the mask of the n actions."""
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, {**info, "action_mask": self.action_masks()}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step with one of the n actions."""
        _check_range(np.asarray(action), (), len(self.table.actions))
        observation, reward, terminated, truncated, info = self.env.step(
            self.table.actions[int(action)]
        )
        info = {**info, "action_mask": self.action_masks()}
        return observation, reward, terminated, truncated, info

    def action_masks(self) -> BoolArray:
        """Return the mask of the next action, (n,) bool; True means legal."""
        conditional = {name: m[None] for name, m in self._inner.conditional_masks().items()}
        mask: BoolArray = self.table.mask(conditional)[0]
        return mask


class JointActionVector(VectorWrapper):
    """Wrapper of a vector environment that makes each action one integer.

    `action_masks()` and `info["action_mask"]` are the exact masks of the n actions,
    (num_envs, n) bool. `final_info` contains those of the final states.

    Args:
        env: An `EsperVectorEnv`, possibly wrapped.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        self._inner = _unwrap(env, EsperVectorEnv, "JointActionVector", "JointAction")
        _reject_mask_of_factors(env, env.single_observation_space)
        super().__init__(env)
        self.table = JointTable(self._inner.heads, self._inner.config)
        self.single_action_space = gym.spaces.Discrete(len(self.table.actions))
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset the environment; info contains the mask of the n actions."""
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, {**info, "action_mask": self.action_masks()}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step with one of the n actions per sub-environment. (num_envs,) integers."""
        array = np.asarray(actions)
        _check_range(array, (self.num_envs,), len(self.table.actions))
        observation, reward, terminated, truncated, info = self.env.step(self.table.actions[array])
        info = {**info, "action_mask": self.action_masks()}
        if "final_info" in info:
            mask = self.table.mask(self._inner.final_conditional_masks())
            info["final_info"] = {**info["final_info"], "action_mask": mask}
        return observation, reward, terminated, truncated, info

    def action_masks(self) -> BoolArray:
        """Return the masks of the next actions, (num_envs, n) bool; True means legal."""
        return self.table.mask(self._inner.conditional_masks())


class MaskInObservation(gym.ObservationWrapper[Any, Any, Any], gym.utils.RecordConstructorArgs):
    """Wrapper of a single environment that adds the mask of the next action to the observation.

    An observation is `{"observations": features, "action_mask": mask}`. RLlib's modules for masked
    actions read these keys. The mask is `info["action_mask"]` as (n,) float32, with 1.0 for legal,
    because these modules compute its logarithm and a flattened observation has a single dtype.
    `get_wrapper_attr("action_masks")` still returns the method with the bool mask.

    Args:
        env: An `EsperEnv` or a `JointAction`, possibly wrapped.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        _unwrap(env, EsperEnv, "MaskInObservation", "MaskInObservationVector")
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.ObservationWrapper.__init__(self, env)
        self.observation_space = _space_with_mask(env.observation_space, env.action_space)

    def observation(self, observation: Any) -> dict[str, npt.NDArray[np.float32]]:
        """Add the mask of the next action to an observation."""
        return _with_mask(observation, self.env.get_wrapper_attr("action_masks")())


class MaskInObservationVector(VectorWrapper):
    """Wrapper of a vector environment that adds the masks of the next actions to the observations.

    The observations have the format of `MaskInObservation` for every sub-environment. The entries
    of `final_obs` contain the masks of the final states.

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
        """Reset the environment and add the masks to the observations."""
        observations, info = self.env.reset(seed=seed, options=options)
        return _with_mask(observations, info["action_mask"]), info

    def step(
        self, actions: Any
    ) -> tuple[dict[str, npt.NDArray[np.float32]], Any, Any, Any, dict[str, Any]]:
        """Step the environment and add the masks to the observations and final observations."""
        observations, rewards, terminations, truncations, info = self.env.step(actions)
        if "final_obs" in info:
            rows = info["final_obs"].copy()
            for i in np.nonzero(info["_final_obs"])[0]:
                rows[i] = _with_mask(rows[i], info["final_info"]["action_mask"][i])
            info = {**info, "final_obs": rows}
        observations = _with_mask(observations, info["action_mask"])
        return observations, rewards, terminations, truncations, info


def _unwrap(env: Any, expected: type[Inner], wrapper: str, other: str) -> Inner:
    """Return the environment inside all wrappers.

    Raises:
        TypeError: If it is of another class; the error names the right wrapper.
    """
    inner = env.unwrapped
    if not isinstance(inner, expected):
        raise TypeError(
            f"{wrapper}: expected an {expected.__name__}, got {type(inner).__name__}; {other} "
            "wraps the other kind of environment, single or vector"
        )
    return inner


def _reject_mask_of_factors(env: Any, space: gym.Space[Any]) -> None:
    """Raise ValueError if observations already contain the mask of the factored action."""
    if isinstance(space, gym.spaces.Dict) and "action_mask" in space.spaces:
        raise ValueError(
            f"joint actions: expected observations without a mask, got those of {env}; "
            "apply MaskInObservation or MaskInObservationVector last"
        )


def _space_with_mask(space: gym.Space[Any], actions: gym.Space[Any]) -> gym.spaces.Dict:
    """Return the observation space with the mask added."""
    mask = gym.spaces.Box(0.0, 1.0, (gym.spaces.flatdim(actions),), np.float32)
    return gym.spaces.Dict({"observations": space, "action_mask": mask})


def _with_mask(observations: Any, mask: BoolArray) -> dict[str, npt.NDArray[np.float32]]:
    """Return observations with the mask added, as float32."""
    return {"observations": observations, "action_mask": mask.astype(np.float32)}


def _check_range(actions: npt.NDArray[Any], shape: tuple[int, ...], n: int) -> None:
    """Raise ValueError unless the actions are integers from 0 to n - 1 of the given shape."""
    is_integer = np.issubdtype(actions.dtype, np.integer) and actions.shape == shape
    if not is_integer or ((actions < 0) | (actions >= n)).any():
        raise ValueError(
            f"joint actions: expected integers from 0 to {n - 1} of shape {shape}, got {actions!r}"
        )
