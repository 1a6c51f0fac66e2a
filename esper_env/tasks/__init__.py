"""Tasks: the data and the host of each environment id."""

import dataclasses

from esper_env.config import EnvConfig, near
from esper_env.population.hosts import Host, registered_hosts
from esper_env.tasks import cifar10, digits, fashion_mnist
from esper_env.tasks.task import Splits, Task, load_splits

TASKS: dict[str, Task] = {
    "digits": digits.STANDARD,
    "digits_sizing": digits.SIZING,
    "digits_contexts": digits.CONTEXTS,
    "fashion_mnist": fashion_mnist.STANDARD,
    "fashion_mnist_small": fashion_mnist.SMALL,
    "cifar10": cifar10.STANDARD,
    "cifar10_impaired": cifar10.IMPAIRED,
    "cifar10_deep": cifar10.DEEP,
}
"""Tasks by their name in `EnvConfig.task`."""

__all__ = ["TASKS", "Splits", "Task", "load_splits", "resolve_host"]


def resolve_host(config: EnvConfig) -> Host:
    """Return the host of a configuration: the task's default, or a registered host for its data.

    Raises:
        ValueError: If the task or the host is unknown, or the images are too small for the host.
    """
    if config.task not in TASKS:
        raise ValueError(
            f"task: expected one of {sorted(TASKS)}, got {config.task!r}{near(config.task, TASKS)}"
        )
    host = TASKS[config.task].host
    if config.host is None:
        return host
    designs = registered_hosts()
    if config.host not in designs:
        raise ValueError(
            f"host: expected None or a registered host, one of {sorted(designs)}, got "
            f"{config.host!r}{near(config.host, designs)}; call esper_env.register_host first"
        )
    design = designs[config.host]
    if host.image_size >> len(design.channels) < 1:
        raise ValueError(
            f"host: {config.host!r} halves the image {len(design.channels)} times, and the images "
            f"of task {config.task!r} are {host.image_size} pixels wide; register a host with "
            "fewer blocks"
        )
    return dataclasses.replace(host, channels=design.channels, build_block=design.build_block)
