"""Gymnasium environments in which an agent grows a neural network while it trains.

Importing this package registers the environment ids of `esper_env.envs.registration`.
"""

from esper_env.config import EnvConfig, GradientCause, Op, Stage
from esper_env.envs.registration import register_environments, register_task
from esper_env.envs.single_env import EsperEnv
from esper_env.envs.vector_env import EsperVectorEnv
from esper_env.envs.wrappers import (
    JointAction,
    JointActionVector,
    MaskInObservation,
    MaskInObservationVector,
)
from esper_env.growth.action_space import ActionHead
from esper_env.population.blueprints import register_blueprint
from esper_env.population.hosts import Host, register_host
from esper_env.tasks.data import make_splits
from esper_env.tasks.instances import InstanceRanges
from esper_env.testing.vector_env_checker import check_vector_env

register_environments()

__all__ = [
    "ActionHead",
    "EnvConfig",
    "EsperEnv",
    "EsperVectorEnv",
    "GradientCause",
    "Host",
    "InstanceRanges",
    "JointAction",
    "JointActionVector",
    "MaskInObservation",
    "MaskInObservationVector",
    "Op",
    "Stage",
    "check_vector_env",
    "make_splits",
    "register_blueprint",
    "register_host",
    "register_task",
]
