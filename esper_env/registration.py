"""Environment ids."""

import gymnasium as gym


def register_environments() -> None:
    """Register every id with single and vector entry points; repeated calls change nothing."""
    if "Esper-Digits-v0" not in gym.registry:
        gym.register(
            id="Esper-Digits-v0",
            entry_point="esper_env.env:EsperEnv",
            vector_entry_point="esper_env.vector_env:EsperVectorEnv",
            max_episode_steps=60,
            kwargs={"task": "digits"},
        )
