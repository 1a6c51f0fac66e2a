"""The single environment: the vector environment of one."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode

from esper_env.actions import ActionHead
from esper_env.config import BoolArray, EnvConfig
from esper_env.info import member_info
from esper_env.render import RENDER_FPS, RENDER_MODES
from esper_env.vector_env import EsperVectorEnv


class EsperEnv(gym.Env[npt.NDArray[np.float32], npt.NDArray[np.int64]]):
    """Grow a small network while it trains.

    A host network is trained from scratch. The agent may put a seed module into one of its slots,
    let it learn behind the host, blend it in, keep it for good or remove it.

    ## Action space
    `MultiDiscrete` with the heads op, slot, blueprint, style, tempo, alpha_target, alpha_speed,
    alpha_curve; `heads` names their options. Which options are legal depends on the state:
    `action_masks()` is the flat marginal mask (also `info["action_mask"]`), `conditional_masks()`
    the exact one. An illegal action counts as WAIT.

    ## Observation space
    `Box` of float32 within [-1, 1]; `observation_names` names the features.

    ## Reward
    `gain`: the rise of the live score in the step; on the last step also committed minus live
    score. Score = accuracy - rent_weight * log2(1 + grown / host parameters). The sum over an
    episode is the committed score at its end minus the score at its start.

    ## Episode end
    After `episode_steps` steps, as `truncated` (or `terminated` with `horizon="terminal"`). A host
    whose training breaks (a loss or weight that is not finite, collapse, divergence) is taken back
    to its last good snapshot without its trial seeds, `info["rolled_back"]` is True and
    `rollback_penalty` is charged; at `max_rollbacks` the episode is `terminated`.

    `gym.make` puts a `TimeLimit` of `max_episode_steps` around the environment, which can only cut
    an episode short from outside, without its settlement. Change the length with `episode_steps`;
    to lengthen it, give both: `gym.make(id, episode_steps=90, max_episode_steps=90)`.

    ## Rendering
    With `render_mode="rgb_array"` a chart of the episode so far: per slot the stage, alpha and
    blueprint over env steps, and accuracy, score and size; with `"ansi"` the same as text.

    ## Arguments
    Every field of `EnvConfig`, and `device`.

    Args:
        device: Where the tensors live.
        render_mode: What `render` returns: "rgb_array" a chart of the episode so far, "ansi" the
            same as text; None for nothing.
        **config: Fields of `EnvConfig`.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 - as gym.Env declares it
        "render_modes": list(RENDER_MODES),
        "render_fps": RENDER_FPS,
    }

    def __init__(
        self, *, device: str = "cpu", render_mode: str | None = None, **config: Any
    ) -> None:
        self._env = EsperVectorEnv(
            1,
            device=device,
            autoreset_mode=AutoresetMode.DISABLED,
            render_mode=render_mode,
            **config,
        )
        self.render_mode = render_mode
        self.observation_space = self._env.single_observation_space
        self.action_space = self._env.single_action_space

    @property
    def config(self) -> EnvConfig:
        """The configuration."""
        return self._env.config

    @property
    def gamma(self) -> float:
        """Discount factor of the shaping reward; an agent must use the same."""
        return self._env.gamma

    @property
    def heads(self) -> tuple[ActionHead, ...]:
        """The action's components and the values of their options."""
        return self._env.heads

    @property
    def observation_names(self) -> tuple[str, ...]:
        """One name per feature of the observation."""
        return self._env.observation_names

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """Start a new episode.

        Args:
            seed: Makes the episode, and those that follow, a function of it alone.
            options: "instance" k says which instance of the configured set the episode has;
                without it one is drawn.

        Returns:
            Observation (features,) float32, and info.
        """
        super().reset(seed=seed)
        unknown = set(options or ()) - {"instance"}
        if unknown:
            raise ValueError(f"options: expected only 'instance', got also {sorted(unknown)}")
        observation, info = self._env.reset(seed=seed, options=options)
        return observation[0], member_info(info, 0)

    def step(
        self, action: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Decide, train, evaluate. The action has shape (8,) and an integer dtype.

        Raises:
            gymnasium.error.ResetNeeded: Before the first reset or after the end of an episode.
            TypeError: If the action is not of integers.
            ValueError: If shape or range are wrong.
        """
        array = np.asarray(action)
        if array.ndim != 1:
            raise ValueError(f"action: expected shape (8,), got {array.shape}")
        observation, reward, terminated, truncated, info = self._env.step(array[None])
        return (
            observation[0],
            float(reward[0]),
            bool(terminated[0]),
            bool(truncated[0]),
            member_info(info, 0),
        )

    def render(self) -> npt.NDArray[np.uint8] | str | None:
        """Show the episode so far, by `render_mode`.

        Returns:
            A picture (600, 960, 3) uint8 or a text; None, with a warning, without a render mode.

        Raises:
            gymnasium.error.ResetNeeded: Before the first `reset`.
        """
        frames = self._env.render()
        return None if frames is None else frames[0]

    def action_masks(self) -> BoolArray:
        """Return the marginal mask of the next action, (sum(nvec),) bool; True is legal."""
        mask: BoolArray = self._env.action_masks()[0]
        return mask

    def conditional_masks(self) -> dict[str, BoolArray]:
        """Return the exact mask: "op" (O,), "slot" (O, S), every other head (O, S, options)."""
        return {name: mask[0] for name, mask in self._env.conditional_masks().items()}

    def sample_valid_actions(self, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Draw a legal action: uniform over ops, then slots, then options. (8,) int64."""
        action: npt.NDArray[np.int64] = self._env.sample_valid_actions(rng)[0]
        return action

    def get_state(self) -> dict[str, Any]:
        """Copy everything that the coming steps depend on; see `EsperVectorEnv.get_state`."""
        return self._env.get_state()

    def set_state(self, state: dict[str, Any]) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """Go on from a copy made by `get_state` and return its observation and info."""
        observation, info = self._env.set_state(state)
        return observation[0], member_info(info, 0)

    def close(self) -> None:
        """Release the tensors."""
        self._env.close()
