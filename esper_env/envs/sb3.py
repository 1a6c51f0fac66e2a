"""Adapter from an Esper vector environment to a `VecEnv` of Stable-Baselines3.

A `VecEnv` usually loops over single environments in Python. With this adapter one engine call still
trains all sub-environments. Stable-Baselines3 is an optional dependency, so `import esper_env` does
not import this module.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper

from esper_env.envs.info import member_info
from esper_env.envs.vector_env import EsperVectorEnv

try:
    from stable_baselines3.common.vec_env.base_vec_env import (
        VecEnv,
        VecEnvIndices,
        VecEnvObs,
        VecEnvStepReturn,
    )
except ModuleNotFoundError as error:
    raise ImportError(
        'esper_env.sb3 needs Stable-Baselines3: pip install "esper-env[interop]"'
    ) from error

MEMBER_METHODS = ("action_masks", "conditional_masks", "sample_valid_actions")
"""Methods that `env_method` can call; each returns one row per sub-environment."""


class Sb3VecEnv(VecEnv):
    """`VecEnv` of Stable-Baselines3 that steps an Esper vector environment.

    Entry i of the info list is the info of sub-environment i. If its episode is done, the entry is
    the info of the final state with `terminal_observation` added, and `reset_infos[i]` is the info
    of the new episode. `TimeLimit.truncated` is True if the episode was truncated and not
    terminated, so that agents bootstrap. Wrap the adapter in `VecMonitor` to record the returns and
    lengths of episodes.

    Args:
        vector_env: An `EsperVectorEnv` with `autoreset_mode="SameStep"`, possibly wrapped.

    Raises:
        TypeError: If `vector_env` does not contain an `EsperVectorEnv`.
        ValueError: If its autoreset mode is not SAME_STEP.
    """

    def __init__(self, vector_env: VectorEnv[Any, Any, Any]) -> None:
        inner = vector_env.unwrapped
        if not isinstance(inner, EsperVectorEnv):
            raise TypeError(
                f"Sb3VecEnv: expected an EsperVectorEnv, got {type(inner).__name__}; "
                "pass a single environment to Stable-Baselines3 directly"
            )
        if inner.autoreset_mode != AutoresetMode.SAME_STEP:
            raise ValueError(
                "autoreset_mode: expected SAME_STEP, because Stable-Baselines3 expects the reset "
                f"in the step that ends an episode, got {inner.autoreset_mode.name}; make the "
                'environment with autoreset_mode="SameStep"'
            )
        self.vector_env = vector_env
        self._actions: npt.NDArray[Any] | None = None
        super().__init__(
            vector_env.num_envs,
            vector_env.single_observation_space,
            vector_env.single_action_space,
        )

    def reset(self) -> VecEnvObs:
        """Start new episodes with the arguments of `seed` and `set_options`, if they were called.

        Returns:
            Observations. (num_envs, features) float32.

        Raises:
            ValueError: If the options are not {"instance": k} for every sub-environment.
        """
        is_seeded = any(seed is not None for seed in self._seeds)
        # Gymnasium annotates `seed` as an integer, but vector environments also accept a list.
        seed: Any = self._seeds if is_seeded else None
        options = None
        if any(self._options):
            if any(set(own) != {"instance"} for own in self._options):
                raise ValueError(
                    "options: expected {'instance': k} for every sub-environment, "
                    f"got {self._options}"
                )
            options = {"instance": np.array([own["instance"] for own in self._options])}
        observations, info = self.vector_env.reset(seed=seed, options=options)
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = [member_info(info, i) for i in range(self.num_envs)]
        return observations  # type: ignore[no-any-return]

    def step_async(self, actions: npt.NDArray[Any]) -> None:
        """Store the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Step with the stored actions.

        Returns:
            Observations (num_envs, features) float32, rewards (num_envs,) float32, dones
            (num_envs,) bool, and a list of one info dictionary per sub-environment.
        """
        if self._actions is None:
            raise RuntimeError("call step_async before step_wait")
        observations, rewards, terminations, truncations, info = self.vector_env.step(self._actions)
        self._actions = None
        final_observations = info.pop("final_obs", None)
        final_info = info.pop("final_info", None)
        infos = [member_info(info, i) for i in range(self.num_envs)]
        dones = terminations | truncations
        # After autoreset `infos` describes the new episodes. Stable-Baselines3 expects the final
        # state of the old one.
        for i in np.nonzero(dones)[0].tolist():
            self.reset_infos[i] = infos[i]
            infos[i] = member_info(final_info, i)
            infos[i]["terminal_observation"] = final_observations[i]
        for i, member in enumerate(infos):
            member["TimeLimit.truncated"] = bool(truncations[i] and not terminations[i])
        return observations, rewards.astype(np.float32), dones, infos

    def get_images(self) -> list[npt.NDArray[np.uint8] | None]:
        """Return an image of each current episode, with `render_mode="rgb_array"`."""
        return list(self.vector_env.render() or ())  # type: ignore[arg-type]

    def close(self) -> None:
        """Close the vector environment, which releases its tensors."""
        self.vector_env.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return an attribute of the outermost wrapper that has it, once per sub-environment.

        Sub-environments share all attributes except the methods in `MEMBER_METHODS`.

        Raises:
            AttributeError: If no wrapper has the attribute.
        """
        members = self._get_indices(indices)
        if attr_name in MEMBER_METHODS:
            return [partial(self._call_one, attr_name, i) for i in members]
        is_space = attr_name in ("observation_space", "action_space")
        name = f"single_{attr_name}" if is_space else attr_name
        value = getattr(self._layer_with(name), name)
        return [value for _ in members]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an existing attribute for all sub-environments.

        Raises:
            AttributeError: If no wrapper has the attribute.
            ValueError: If `indices` does not select all sub-environments, which share it.
        """
        if set(self._get_indices(indices)) != set(range(self.num_envs)):
            raise ValueError(
                f"indices: expected all sub-environments, because they share {attr_name!r}, "
                f"got {indices}"
            )
        setattr(self._layer_with(attr_name), attr_name, value)

    def env_method(
        self,
        method_name: str,
        *method_args: Any,
        indices: VecEnvIndices = None,
        **method_kwargs: Any,
    ) -> list[Any]:
        """Call a method once and return its results for the selected sub-environments.

        Raises:
            AttributeError: If the method is not one of `MEMBER_METHODS`.
        """
        if method_name not in MEMBER_METHODS:
            raise AttributeError(
                f"env_method: expected one of {MEMBER_METHODS}, got {method_name!r}; call other "
                "methods on `vector_env`"
            )
        method = getattr(self._layer_with(method_name), method_name)
        result = method(*method_args, **method_kwargs)
        return [_member(result, i) for i in self._get_indices(indices)]

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """Return, for each sub-environment, whether a wrapper of this class is applied."""
        is_wrapped = any(isinstance(layer, wrapper_class) for layer in self._layers())
        return [is_wrapped for _ in self._get_indices(indices)]

    def _call_one(self, name: str, index: int, *args: Any, **kwargs: Any) -> Any:
        """Call a method and return its result for one sub-environment."""
        return self.env_method(name, *args, indices=index, **kwargs)[0]

    def _layers(self) -> list[VectorEnv[Any, Any, Any]]:
        """Return the wrappers, outermost first, followed by the environment."""
        layers = [self.vector_env]
        while isinstance(layers[-1], VectorWrapper):
            layers.append(layers[-1].env)
        return layers

    def _layer_with(self, name: str) -> VectorEnv[Any, Any, Any]:
        """Return the outermost wrapper that has an attribute, or the environment."""
        for layer in self._layers():
            if hasattr(layer, name):
                return layer
        raise AttributeError(f"{self.vector_env} has no attribute {name!r}")


def _member(values: Any, index: int) -> Any:
    """Return the row of one sub-environment in an array, or in each array of a dictionary."""
    if isinstance(values, dict):
        return {name: _member(value, index) for name, value in values.items()}
    return values[index]
