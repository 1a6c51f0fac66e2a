"""Esper: decide when, where and what a neural network grows while it trains.

Importing this package registers the ids of `registration.ENVIRONMENTS`.
"""

from esper_env.actions import ActionHead
from esper_env.checks import check_vector_env
from esper_env.config import EnvConfig, Op, Stage
from esper_env.env import EsperEnv
from esper_env.population.blueprints import register_blueprint
from esper_env.population.hosts import register_host
from esper_env.registration import register_environments
from esper_env.vector_env import EsperVectorEnv
from esper_env.wrappers import (
    JointAction,
    JointActionVector,
    MaskInObservation,
    MaskInObservationVector,
)

register_environments()

__all__ = [
    "ActionHead",
    "EnvConfig",
    "EsperEnv",
    "EsperVectorEnv",
    "JointAction",
    "JointActionVector",
    "MaskInObservation",
    "MaskInObservationVector",
    "Op",
    "Stage",
    "check_vector_env",
    "register_blueprint",
    "register_host",
]
