"""Tasks: data and host of each environment id."""

from esper_env.tasks.digits import DIGITS
from esper_env.tasks.task import Splits, Task

TASKS: dict[str, Task] = {"digits": DIGITS}
"""Tasks by the name that `EnvConfig.task` takes."""

__all__ = ["TASKS", "Splits", "Task"]
