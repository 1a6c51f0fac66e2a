"""Environment ids."""

from typing import Any

import gymnasium as gym

_CIFAR10 = {"episode_steps": 150, "batches_per_step": 4, "batch_size": 128}
ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "Esper-Digits-v0": {"task": "digits", "episode_steps": 60},
    "Esper-CIFAR10-v0": {"task": "cifar10", **_CIFAR10},
    "Esper-CIFAR10-Impaired-v0": {"task": "cifar10_impaired", **_CIFAR10},
    "Esper-CIFAR10-Deep-v0": {"task": "cifar10_deep", **_CIFAR10},
}
"""The settings of each id that differ from `EnvConfig`'s defaults, or that define it."""


def register_environments() -> None:
    """Register every id with single and vector entry points; repeated calls change nothing."""
    for name, config in ENVIRONMENTS.items():
        if name not in gym.registry:
            gym.register(
                id=name,
                entry_point="esper_env.env:EsperEnv",
                vector_entry_point="esper_env.vector_env:EsperVectorEnv",
                max_episode_steps=config["episode_steps"],
                kwargs=config,
            )
