"""The single environment: the vector environment of one."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode

from esper_env.config import BoolArray, EnvConfig
from esper_env.envs.info import member_info
from esper_env.envs.render import RENDER_FPS, RENDER_MODES
from esper_env.envs.vector_env import EsperVectorEnv
from esper_env.growth.action_space import ActionHead


class EsperEnv(gym.Env[npt.NDArray[np.float32], npt.NDArray[np.int64]]):
    """Grow a small neural network while it trains.

    ## Description

    A small convolutional network, the *host*, is trained from scratch to classify images. Behind
    each of its blocks is a *slot*. The agent may germinate a *seed* in a slot (a small residual
    module, built from a *blueprint*), let it learn behind the host, blend it in, and either
    fossilize it, which keeps it for good, or prune it. Parameters cost score, so what, where and
    when to grow is the task.

    One env step is one decision and the training after it. In this order, `step`

    1. applies the action if it is legal (an illegal one counts as WAIT);
    2. lets every slot tick: cooldowns, ramps of alpha (the blend weight of a seed), transitions
       that need no action;
    3. trains host and seeds on `batches_per_step` batches of `batch_size` images, by SGD whose
       learning rates fall to 0 in the course of the episode (`learning_rate_decay`);
    4. takes the host back to its last good snapshot if its training broke (see Episode End);
    5. evaluates on the validation split: the *live* network, which has all seeds with their
       alphas; the *committed* network, which has only the fossilized ones; and those that tell what
       single seeds contribute (`attribution`).

    So the reward of an action contains what the training after it did. No training, reward, mask
    or observation uses the test split.

    With h the features at the slot, d the layers of the seed, and x the detached h while the seed
    is isolated (`isolated_stages`), else h itself, a slot puts out

    | stage | output |
    |---|---|
    | DORMANT, GERMINATED, EMBARGOED | h |
    | TRAINING | h, but the backward pass treats the seed as if alpha were 1, so it learns |
    | BLENDING, HOLDING, FOSSILIZED; blend ADD | h + alpha * d(x) |
    | the same; blend MULTIPLY | h * (1 + alpha * tanh(d(x))) |
    | the same; blend GATE | h + alpha * g(x) * d(x), with g = sigmoid(w * mean(x) + b) per image |

    d is 0 at birth, so a new seed changes nothing until it has learned. While alpha falls, the
    seed's parameters keep still. Fossilized seeds keep training with the host.

    `gym.make_vec` trains many hosts as one tensor program; this class is that program with one
    member.

    ## Action Space

    `MultiDiscrete` with eight heads in the order of the table; `heads` names the options of each.
    An op reads some of the heads; every other head has one legal option, 0.

    - WAIT does nothing.
    - GERMINATE puts a seed of the blueprint into an empty slot. Style, tempo and alpha_target say
      how it will be blended: the blend, and curve, length and end of its first ramp.
    - ADVANCE takes a seed to its next stage; from TRAINING to BLENDING it starts the first ramp.
    - SET_ALPHA gives a blended seed the blend of the style and starts a ramp to another
      alpha_target, alpha_speed env steps long (0 acts at once), along alpha_curve. A seed whose
      first ramp ended below 1 needs it to get on: only at alpha 1 does it reach HOLDING.
    - PRUNE removes a seed that is not fossilized, at once (alpha_speed 0) or by a ramp to 0.
    - FOSSILIZE keeps a seed for good.

    What is legal depends on the state, and a legal action always succeeds. `True` in a mask means
    legal. `action_masks()`, also `info["action_mask"]`, is the *marginal* mask, flat over the
    options of all heads: an option is legal if some legal action contains it.
    `conditional_masks()` is exact: ops; slots given the op; options of every other head given op
    and slot. The wrapper `JointAction` turns the action into one integer with an exact mask. With
    `illegal_actions="raise"` an illegal action raises ValueError.

    ## Observation Space

    `Box(-1, 1, (n,), float32)`: an episode block, then one block per slot; `observation_names`
    names the features. Each has a fixed scale and is clipped to [-1, 1], so no running normaliser
    is needed. A missing value is 0, and its validity bit is 0.

    ## Rewards

    With the score of a network

        score = accuracy - rent_weight * log2(1 + seed parameters / host parameters)

    on the validation split, the preset `gain` pays in every step the rise of the live score, and in
    the last step of an episode also committed score minus live score: what is not fossilized is
    not kept. A seed's parameters count from germination on. The rewards of an episode sum to the
    committed score at its end, minus the score at its start, minus `rollback_penalty` for every
    rollback. `reward_weights` changes the weights of the terms; `info["reward_terms"]` has each
    one's part of the reward.

    ## Starting State

    All slots are DORMANT and the host has fresh random weights; observation and info come from its
    evaluation before any training. `reset(seed=s)` makes this and the coming episodes a function
    of s and the actions alone: bitwise on one device, and on a CPU whatever the number of threads
    and the other members of a batch (layers of a third party and bfloat16 have no compiled kernel
    and need the same of both). Global random state is neither read nor written. `reset()` starts
    the next episode of the same stream: other weights, other batches.

    With `instances="train"` or `"test"` each episode has one of a fixed set of conditions (learning
    rate, share of the training images, share of wrong labels, width of the host), drawn or chosen
    by `reset(options={"instance": k})`. All but the wrong labels are observed.

    ## Episode End

    1. Truncation: after `episode_steps` env steps (termination with `horizon="terminal"`).
    2. Termination: at `max_rollbacks` rollbacks. A host is rolled back when its training breaks: a
       loss or weight is not finite, or for `panic_patience` steps in succession the loss is back at
       that of guessing (collapse) or far above its recent mean (divergence). It gets the weights,
       statistics and momentum of its last snapshot, its seeds are removed unless they are
       fossilized, and `info["rolled_back"]` is True. The time that has passed is not given back.

    `gym.make` also puts a `TimeLimit` of `max_episode_steps` around the environment. To lengthen
    episodes, change both: `gym.make(id, episode_steps=90, max_episode_steps=90)`; the limit alone
    would cut an episode off without the payment of its last step.

    ## Information

    NumPy values with the same keys after every `reset` and `step`, and two more after the last step
    of an episode. In the vector environment each key k has a mask `_k` of the members that have it.

    ## Rendering

    With `render_mode="rgb_array"` a chart of the episode so far: per slot the stage, alpha and
    blueprint over env steps, and accuracy, score and size; with `"ansi"` the same as text.

    ## Arguments

    ```python
    >>> import gymnasium as gym
    >>> env = gym.make("esper_env:Esper-Digits-v0", rent_weight=0.02, heads={"style": "LINEAR_ADD"})
    >>> env.unwrapped.config.rent_weight
    0.02
    >>> env.action_space
    MultiDiscrete([6 2 7 1 3 3 4 5])

    ```

    `gym.make` and `gym.make_vec` take `device`, `render_mode` and every field of `EnvConfig`.

    ## Version History

    * v0: initial version.

    Args:
        device: Where the tensors live, e.g. "cpu" or "cuda".
        render_mode: None, "rgb_array" (a chart of the episode so far) or "ansi" (text).
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
