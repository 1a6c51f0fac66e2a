"""Stable-Baselines3 adapter; see `esper_env.envs.sb3`."""

from esper_env.envs.sb3 import Sb3VecEnv as Sb3VecEnv
