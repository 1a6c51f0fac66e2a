"""The environment as training and evaluation need it: settings, masks as one tensor, threads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esper_env import EnvConfig, EsperVectorEnv

TRAINING = EnvConfig(
    instances="train",
    horizon="terminal",
    gamma=1.0,
    heads={
        "op": ["WAIT", "GERMINATE", "ADVANCE", "PRUNE", "FOSSILIZE"],
        "style": ["LINEAR_ADD"],
        "tempo": [3],
        "alpha_target": [1.0],
        "alpha_speed": [0],
        "alpha_curve": ["LINEAR"],
    },
)
"""Default settings for training; docs/results-digits.md has the evidence.

The remaining budget is observed, so the end of an episode is a terminal state. Without a discount
the return is the objective. The heads that control blending have one option each: the agent decides
when, where and what to grow, keep or remove."""


EVALUATION = dataclasses.replace(TRAINING, instances="test")
"""Default settings for evaluation."""
NAMES = [f.name for f in dataclasses.fields(EnvConfig)]


def settings_of(env_id: str, config: EnvConfig) -> EnvConfig:
    """Return complete settings for an environment id.

    Args:
        env_id: Environment id.
        config: `TRAINING` or `EVALUATION`, which mean the id's own settings with what is changed
            there; or complete settings, which are returned. In an id with parking SET_ALPHA with
            the targets 0 and 1 takes the place of PRUNE and FOSSILIZE: an agent that explores by
            pruning its seeds does not learn to park them (docs/results.md).

    Raises:
        ValueError: If the id is that of another package.
        gymnasium.error.Error: If there is no such id.
    """
    if config is not TRAINING and config is not EVALUATION:
        return config
    default = EnvConfig()
    changed = {n: getattr(config, n) for n in NAMES if getattr(config, n) != getattr(default, n)}
    own = _make(env_id, 1, "cpu", {}).config
    if own.parking:
        heads = dict(changed["heads"])
        ops = ["WAIT", "GERMINATE", "ADVANCE", "SET_ALPHA"]
        heads |= {"op": ops, "alpha_target": [0.0, 1.0]}
        changed["heads"] = heads
    return dataclasses.replace(own, **changed)


def make_envs(env_id: str, num_envs: int, device: str, config: EnvConfig) -> EsperVectorEnv:
    """Make a vector environment.

    Args:
        env_id: Environment id.
        num_envs: Number of sub-environments.
        device: Device of the environment.
        config: Complete settings, such as those of `settings_of`.

    Raises:
        ValueError: If the id is that of another package, the device does not exist, or the
            settings are those of another task.
        gymnasium.error.Error: If there is no such id.
    """
    check_device(device)
    task = gym.spec(env_id).kwargs.get("task", config.task)
    if config.task != task:
        raise ValueError(
            f"env.task: expected {task!r}, the task of {env_id}, got {config.task!r}; start from "
            f"settings_of({env_id!r}, TRAINING)"
        )
    settings = {name: getattr(config, name) for name in NAMES}
    return _make(env_id, num_envs, device, settings)


def _make(env_id: str, num_envs: int, device: str, settings: dict[str, Any]) -> EsperVectorEnv:
    entry_point: object = gym.spec(env_id).vector_entry_point
    if isinstance(entry_point, str):
        entry_point = gym.envs.registration.load_env_creator(entry_point)
    envs = None
    if isinstance(entry_point, type) and issubclass(entry_point, EsperVectorEnv):
        envs = gym.make_vec(
            env_id, num_envs=num_envs, device=device, autoreset_mode="SameStep", **settings
        ).unwrapped
    if not isinstance(envs, EsperVectorEnv):
        raise ValueError(
            f"env_id: expected an environment of esper_env, such as Esper-Digits-v0, got {env_id!r}"
        )
    return envs


def check_device(device: str) -> None:
    """Raise `ValueError` if torch has no such device here."""
    try:
        torch.empty(0, device=device)
    # torch raises an AssertionError where it was built without CUDA.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device: expected cpu or another device of this machine, got {device!r} ({reason})"
        ) from error


def pad_masks(masks: dict[str, npt.NDArray[np.bool_]], device: torch.device | str) -> Tensor:
    """Combine the conditional masks of all heads into one tensor.

    Args:
        masks: Result of `EsperVectorEnv.conditional_masks`.
        device: Device of the result.

    Returns:
        Legal options of each head given the op and the slot, padded with False.
        (num_envs, num_ops, num_slots, num_heads, largest head) bool. The row of the op head is the
        same for all ops and slots, that of the slot head for all slots.
    """
    op, slot, *rest = masks.values()
    # (envs, ops) -> (envs, 1, 1, ops); (envs, ops, slots) -> (envs, ops, 1, slots)
    heads = [op[:, None, None], slot[:, :, None], *rest]
    width = max(mask.shape[-1] for mask in heads)
    padded = np.zeros((*slot.shape, len(heads), width), dtype=bool)
    for h, mask in enumerate(heads):
        padded[..., h, : mask.shape[-1]] = mask
    return torch.from_numpy(padded).to(device)


@dataclass
class ReturnScale:
    """Running standard deviation of discounted returns, in float64.

    Source: Chan et al. (1983), equations 2.1.
    """

    gamma: float
    returns: npt.NDArray[np.float64]
    """Discounted return of each running episode. (num_envs,) float64."""
    count: int = 0
    mean: float = 0.0
    m2: float = 0.0
    """Sum of squared deviations from the mean."""

    def update(self, rewards: npt.NDArray[np.float64], dones: npt.NDArray[np.bool_]) -> None:
        """Update with the rewards and episode ends of one env step. (num_envs,) both."""
        self.returns = self.gamma * self.returns + rewards
        count = len(self.returns)
        mean = float(self.returns.mean())
        delta, total = mean - self.mean, self.count + count
        self.m2 += float(((self.returns - mean) ** 2).sum())
        self.m2 += delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count = total
        self.returns[dones] = 0.0

    @property
    def std(self) -> float:
        """Standard deviation; 1 while it is undefined or 0."""
        if self.count < 2 or self.m2 <= 0:
            return 1.0
        return float(np.sqrt(self.m2 / self.count))


@contextmanager
def one_thread() -> Iterator[None]:
    """Restrict torch to one thread, as a context manager or decorator.

    The agent's matrices of 16 x 128 gain little from a second thread, and synchronizing two threads
    at every LSTM step is slow while another process keeps a core busy (docs/speed.md). Results do
    not depend on the number of threads.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
