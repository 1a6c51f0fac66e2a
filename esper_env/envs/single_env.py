"""The single environment: a vector environment with one sub-environment."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode

from esper_env.config import BoolArray, EnvConfig
from esper_env.envs.info import member_info
from esper_env.envs.render import RENDER_FPS, RENDER_MODES
from esper_env.envs.vector_env import EsperVectorEnv
from esper_env.growth.action_space import ActionHead, as_array


class EsperEnv(gym.Env[npt.NDArray[np.float32], npt.NDArray[np.int64]]):
    """Grow a small neural network while it trains.

    ## Description

    A small convolutional network, the *host*, is trained from scratch to classify images. A *slot*
    follows each of its blocks. The agent can *germinate* a *seed* in a slot. A seed is a small
    residual module; its layers are given by a *blueprint*. The seed first trains without changing
    the output of the host. Then it is blended in: its blend weight *alpha* rises along a ramp.
    Finally the agent can *fossilize* the seed, which keeps it permanently. Until then it can
    *prune* the seed, which removes it. Each slot has a *stage*, for example TRAINING or BLENDING.
    Every seed parameter lowers the score, so the task is to decide what to grow, where and when.

    An env step is one decision followed by training. `step` runs these phases in order:

    1. It applies the action. An illegal action counts as WAIT.
    2. It ticks every slot: cooldowns and alpha ramps advance by one env step, and automatic stage
       transitions take place.
    3. It trains host and seeds by SGD on `batches_per_step` batches of `batch_size` images, or on
       as many as the same compute pays for (`clock`). The learning rates decay linearly, from the
       initial value in the first env step to 1/`episode_steps` of it in the last
       (`learning_rate_decay`).
    4. It restores the last good snapshot if training diverged or collapsed (see Episode End).
    5. It evaluates networks on the validation split: the *live* network with all seeds at their
       current alpha, the *committed* network with only the fossilized seeds, and the networks that
       measure the contribution of single seeds (`attribution`).

    The reward of an action therefore includes the effect of the training that follows it. The test
    split is used for no training, reward, mask or observation.

    Let h be the features at the slot and d the layers of the seed. The input x of the seed is h. In
    the stages of `isolated_stages` x is detached, so the seed sends no gradient to the host. The
    output of a slot is

    | stage | blend | output |
    |---|---|---|
    | DORMANT, GERMINATED, EMBARGOED | | h |
    | TRAINING | | h; the backward pass uses alpha = 1, so the seed learns |
    | BLENDING, HOLDING, FOSSILIZED | ADD | h + alpha * d(x) |
    | BLENDING, HOLDING, FOSSILIZED | MULTIPLY | h * (1 + alpha * tanh(d(x))) |
    | BLENDING, HOLDING, FOSSILIZED | GATE | h + alpha * g(x) * d(x) |

    The gate is g(x) = sigmoid(w * mean(x) + b), one number per image. The layers of a new seed
    output 0. The parameters of a seed are frozen while its alpha falls. Fossilized seeds continue
    to train with the host.

    `gym.make_vec` returns an `EsperVectorEnv`. One engine call trains all its sub-environments. On
    a CPU compiled kernels train them one by one. Grouped tensor operations serve a GPU, layers
    without a kernel, and bfloat16. `EsperEnv` is a vector environment with one sub-environment.

    ## Action Space

    `MultiDiscrete` with eight heads in the order of the table. `heads` lists the options of each.
    An action contains the index of one option per head. Every op uses some of the heads. In an
    unused head only index 0 is legal: GERMINATE with index 1 of alpha_speed, for example, is
    illegal. Without masks almost every random action is illegal and counts as WAIT;
    `info["action_valid"]` shows this.

    - WAIT does nothing.
    - GERMINATE creates a seed of the chosen blueprint in an empty slot. The style sets its blend
      and the curve of its first ramp. Tempo and alpha_target set the length and the end of this
      ramp. With `graft` there is no first ramp: the seed enters HOLDING at alpha 1 at once.
    - ADVANCE moves a seed to its next stage. From TRAINING to BLENDING it starts the first ramp.
    - SET_ALPHA sets the blend of a seed to that of the style. It also starts a ramp to alpha_target
      along alpha_curve over alpha_speed env steps; at speed 0 alpha changes at once. A seed enters
      HOLDING only at alpha 1, so a seed whose first ramp ended below 1 needs this op.
      With `parking` alpha_target 0 *parks* a seed in HOLDING: it keeps its slot, stage and weights,
      but does not train and costs nothing in the score. Alpha_target 1 puts it back.
      `parks_fossilized` allows both for fossilized seeds.
    - PRUNE removes a seed that is not fossilized. With alpha_speed 0 it does so at once, otherwise
      at the end of a ramp to alpha 0.
    - FOSSILIZE keeps a seed permanently.

    The legal actions depend on the state. A legal action always succeeds. An illegal action raises
    ValueError with `illegal_actions="raise"`. In every mask `True` means legal:

    - The *marginal* mask is flat over the options of all heads. An option is legal if at least one
      legal action contains it. `action_masks()` returns it, and so does `info["action_mask"]`.
    - The *conditional* masks are exact. `conditional_masks()` returns the legal ops, the legal
      slots of each op, and the legal options of every other head for each op and slot.
    - The wrapper `JointAction` makes the action one integer, with an exact mask.

    ## Observation Space

    `Box(-1, 1, (n,), float32)`: an episode block followed by one block per slot.
    `observation_names` lists the features. Each feature has a fixed scale and is clipped to
    [-1, 1], so no running normalization is needed. A missing value is 0, and its validity bit is 0.

    ## Rewards

    The score of a network on the validation split is

        score = accuracy - rent_weight * log2(1 + seed parameters / host parameters)

    The *live score* is the score of the live network, the *committed score* that of the committed
    network. The parameters of a seed count from its germination. With the preset `gain` the reward
    of a step is the live score after it minus the live score before it. The last step of an episode
    adds the committed score minus the live score, so seeds that are not fossilized are worth
    nothing at the end. The episode return equals the final committed score minus the initial score,
    minus `rollback_penalty` for each rollback. Parked seeds cost nothing.

    With `objective="anytime"` the objective is the mean over the env steps of the live score, in
    which only seeds at alpha > 0 cost something. With the preset `gain` the reward of a step is
    this score divided by `episode_steps`, so the return equals the objective, minus
    `rollback_penalty` for each rollback. `info["committed_score"]` is what the episode has earned
    so far. Env steps that an early termination leaves out earn nothing.

    `reward_weights` changes the weights of the terms.
    `info["reward_terms"]` contains the weighted value of each term.

    ## Starting State

    All slots are DORMANT and the host has new random weights. The first observation and info come
    from its evaluation before any training.

    `reset(seed=s)` makes this and all later episodes a function of s and the actions. Results are
    bitwise reproducible on the same device. On a CPU they are also bitwise independent of the
    number of sub-environments and threads. Third-party layers and bfloat16 are the exception,
    because they have no compiled kernel. With them, results are reproducible only with the same
    number of sub-environments and threads. `reset()` without a seed starts the next episode of the
    same random stream, with new weights and batches. The global random state is neither read nor
    written.

    `get_state` and `set_state` save and restore the environment, also in another process. If an
    exception ends `reset`, `step` or `set_state` halfway, for example a KeyboardInterrupt, all
    other calls raise ResetNeeded with the reason until the next `reset` or `set_state`.

    With `instances="train"` or `"test"` each episode has one *instance*. An instance fixes the
    learning rate, the share of the training images in use, the share of wrong labels, and the width
    of the host. It is sampled, or chosen by `reset(options={"instance": k})`. Everything but the
    share of wrong labels is observed.

    In some ids an episode consists of *regimes*: kinds of problems that differ in the classes in
    use, in noise on the images, or in the labels of the classes. An episode has one kind, or
    changes between kinds at random env steps. Which kind is in force is hidden from observation and
    masks. `info["regime"]` shows it, for policies that serve as an upper limit. A change takes
    place between the training and the evaluation of an env step. So the accuracies after a step are
    those on the problem that comes next. The rollback rule forgets its recent losses at a change.

    ## Episode End

    1. Truncation: after `episode_steps` env steps. With `horizon="terminal"` this is a termination.
    2. Termination: at `max_rollbacks` rollbacks.

    An episode does not end early when the accuracy stops to rise. That is when growing helps most,
    and all agents get the same training budget, so their scores can be compared. An agent sees a
    plateau in `plateau_steps`, and can WAIT to the end.

    A *rollback* follows if training diverged or collapsed for `panic_patience` consecutive env
    steps. Training has collapsed if the loss returns to that of random guessing. It has diverged if
    the loss is far above its recent mean. Both rules need the losses of `panic_window` healthy env
    steps; a rollback discards these losses. A training loss, validation loss or weight that is not
    finite causes a rollback at once. With `divergence_loss` a loss above a fixed limit also counts
    as diverged. The rollback restores weights, batch norm statistics and momentum from the last
    snapshot. It removes all seeds that are not fossilized.
    `info["rolled_back"]` is True. The step counter of the episode continues.

    The time limit is part of the environment: `gym.make(id, episode_steps=90)`. Gymnasium's own
    argument `max_episode_steps` raises a TypeError, because its wrapper `TimeLimit` would end an
    episode without the reward of its last step.

    ## Information

    All values are NumPy arrays or Python's bool, int and float. The keys are the same after every
    `reset` and `step`. The last step of an episode adds two. In the vector environment each key k
    has a mask `_k`, True for the sub-environments that have the value.

    ## Rendering

    With `render_mode="rgb_array"` `render` returns a chart of the current episode: stage, alpha and
    blueprint of each slot, accuracy, score, and size of the network over env steps. With `"ansi"`
    it returns the same as text.

    ## Arguments

    ```python
    >>> import gymnasium as gym
    >>> env = gym.make("esper_env:Esper-Digits-v0", rent_weight=0.02, heads={"style": "LINEAR_ADD"})
    >>> env.unwrapped.config.rent_weight
    0.02
    >>> env.action_space
    MultiDiscrete([6 2 7 1 3 3 4 5])

    ```

    `gym.make` and `gym.make_vec` accept `device`, `render_mode` and every field of `EnvConfig`.

    ## Version History

    * v0: initial version.

    Args:
        device: Torch device of all tensors, e.g. "cpu" or "cuda".
        render_mode: None, "rgb_array" (a chart of the current episode) or "ansi" (text).
        **config: Fields of `EnvConfig`.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 - as gym.Env declares it
        "render_modes": list(RENDER_MODES),
        "render_fps": RENDER_FPS,
    }

    def __init__(
        self, *, device: str = "cpu", render_mode: str | None = None, **config: Any
    ) -> None:
        _reject_second_time_limit()
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
        """Configuration of the environment."""
        return self._env.config

    @property
    def gamma(self) -> float:
        """Discount factor of shaping; with the term `pbrs` the agent must use the same value."""
        return self._env.gamma

    @property
    def heads(self) -> tuple[ActionHead, ...]:
        """Components of the action, each with the values of its options."""
        return self._env.heads

    @property
    def observation_names(self) -> tuple[str, ...]:
        """Name of each feature of the observation."""
        return self._env.observation_names

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """Start a new episode.

        Args:
            seed: Random seed of this and all later episodes. None keeps the current random
                stream.
            options: "instance" selects the instance of the configured set by its index. Without it
                one is sampled.

        Returns:
            Observation (features,) float32, and info.
        """
        if isinstance(options, Mapping) and set(options) - {"instance"}:
            unknown = [name for name in options if name != "instance"]
            raise ValueError(f"options: expected only 'instance', got also {unknown}")
        if isinstance(seed, (bool, list, tuple, np.ndarray)):
            raise ValueError(f"seed: expected None or an integer, got {seed!r}")
        observation, info = self._env.reset(seed=seed, options=options)
        super().reset(seed=None if seed is None else int(seed))
        return observation[0], member_info(info, 0)

    def step(
        self, action: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Apply the action, train the host, evaluate it.

        Args:
            action: Option indices in the order of `heads`. (8,) integers.

        Returns:
            Observation (features,) float32, reward, terminated, truncated, info.

        Raises:
            gymnasium.error.ResetNeeded: Before the first `reset`, after the end of an episode, or
                after a call was interrupted (see `EsperVectorEnv`).
            TypeError: If the action does not consist of integers.
            ValueError: If the shape or an index is out of range, or if the action is illegal and
                `illegal_actions="raise"`.
        """
        if self._env.debug_state().state.episode.has_test[0]:
            raise gym.error.ResetNeeded("the episode has ended; call reset() before step()")
        array = as_array(action)
        if array.ndim != 1:
            raise ValueError(f"action: expected shape (8,), got {array.shape}")
        observation, reward, terminated, truncated, info = self._env.step(array[None])
        is_terminated, is_truncated = terminated.item(), truncated.item()
        return observation[0], reward.item(), is_terminated, is_truncated, member_info(info, 0)

    def render(self) -> npt.NDArray[np.uint8] | str | None:
        """Render the current episode according to `render_mode`.

        Returns:
            An image, (600, 960, 3) uint8, or a text. Without a render mode it is None, and a
            warning is logged.

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
        """Sample a legal action: uniform over ops, slots, then options. (8,) int64."""
        action: npt.NDArray[np.int64] = self._env.sample_valid_actions(rng)[0]
        return action

    def get_state(self) -> dict[str, Any]:
        """Return the full state, sufficient to resume exactly; see `EsperVectorEnv.get_state`."""
        return self._env.get_state()

    def set_state(self, state: dict[str, Any]) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """Restore a state returned by `get_state`; return its observation and info."""
        observation, info = self._env.set_state(state)
        return observation[0], member_info(info, 0)

    def close(self) -> None:
        """Release the tensors."""
        self._env.close()


def _reject_second_time_limit() -> None:
    """Raise TypeError if `gym.make` is about to wrap the new environment in a `TimeLimit`.

    `gym.make` passes no environment its argument `max_episode_steps`, so this function reads the
    argument from the frame that called the constructor, two above this one.
    """
    frame = sys._getframe(2)
    name = frame.f_globals.get("__name__"), frame.f_code.co_name
    limit = frame.f_locals.get("max_episode_steps")
    if name == ("gymnasium.envs.registration", "make") and limit not in (None, -1):
        raise TypeError(
            f"max_episode_steps: expected None, got {limit!r}; a TimeLimit would end an episode "
            f"without the reward of its last step; pass episode_steps={limit!r} instead"
        )
