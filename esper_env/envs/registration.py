"""Environment ids and their registration."""

import gymnasium as gym

ENVIRONMENTS = {
    "Esper-Digits-v0": ("digits", 60),
    "Esper-Digits-Sizing-v0": ("digits_sizing", 40),
    "Esper-Digits-Contexts-v0": ("digits_contexts", 60),
    "Esper-CIFAR10-v0": ("cifar10", 150),
    "Esper-CIFAR10-Impaired-v0": ("cifar10_impaired", 150),
    "Esper-CIFAR10-Deep-v0": ("cifar10_deep", 150),
}
"""Task and episode length [env steps] of each id."""


def register_environments() -> None:
    """Register every id for `gym.make` and `gym.make_vec`; registered ids are skipped."""
    for name, (task, episode_steps) in ENVIRONMENTS.items():
        if name not in gym.registry:
            gym.register(
                id=name,
                entry_point="esper_env.envs.single_env:EsperEnv",
                vector_entry_point="esper_env.envs.vector_env:EsperVectorEnv",
                # The environment has its own time limit and its own check that it was reset.
                # Gymnasium's wrappers expect a reset, which `set_state` replaces.
                max_episode_steps=None,
                order_enforce=False,
                disable_env_checker=True,
                kwargs={"task": task, "episode_steps": episode_steps},
            )
