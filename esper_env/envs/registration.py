"""Environment ids and their registration."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym

from esper_env.config import EnvConfig
from esper_env.population.hosts import Host
from esper_env.tasks import TASKS, Splits, Task
from esper_env.tasks.instances import InstanceRanges

ENVIRONMENTS = {
    "Esper-Digits-v0": ("digits", 60),
    "Esper-Digits-Sizing-v0": ("digits_sizing", 40),
    "Esper-Digits-Contexts-v0": ("digits_contexts", 60),
    "Esper-FashionMNIST-Small-v0": ("fashion_mnist_small", 60),
    "Esper-FashionMNIST-v0": ("fashion_mnist", 60),
    "Esper-CIFAR10-v0": ("cifar10", 150),
    "Esper-CIFAR10-Impaired-v0": ("cifar10_impaired", 150),
    "Esper-CIFAR10-Deep-v0": ("cifar10_deep", 150),
}
"""Task and episode length [env steps] of each built-in id."""
_ID = re.compile(r"[\w.-]+-v\d+")


def register_environments() -> None:
    """Register every built-in id for `gym.make` and `gym.make_vec`; registered ids are skipped."""
    for name, (task, episode_steps) in ENVIRONMENTS.items():
        if name not in gym.registry:
            _register(name, task=task, episode_steps=episode_steps)


def register_task(
    env_id: str,
    load: Callable[[str | None], Splits],
    host: Host,
    *,
    augments: bool = False,
    ranges: InstanceRanges | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Register an environment that trains a host on your own data.

    docs/extending.md has an example. Every process that makes the environment must register it.

    Args:
        env_id: Id for `gym.make`, such as "Shapes-v0"; also the name of the task in the settings.
        load: Returns the data, usually by `make_splits`. It receives the setting `data_dir` and
            runs at the first reset, once per process and device.
        host: The network that is trained, for images of the size and channels that `load` returns.
        augments: Whether training images are shifted by up to 4 pixels and mirrored at random.
        ranges: Ranges of the instances "train" and "test"; None for the default ones.
        defaults: Settings that differ from the defaults of `EnvConfig`, such as
            {"episode_steps": 40}.

    Raises:
        TypeError: If an argument has another type, or a setting does not exist.
        ValueError: If the id has no version or is taken, the host halves the images to nothing, or
            a setting has a value that is not allowed.
    """
    for name, value, kind in (
        ("env_id", env_id, str),
        ("host", host, Host),
        ("ranges", InstanceRanges() if ranges is None else ranges, InstanceRanges),
        ("defaults", {} if defaults is None else defaults, Mapping),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected {kind.__name__}, got {value!r}")
    if not callable(load):
        raise TypeError(f"load: expected a function of data_dir that returns Splits, got {load!r}")
    if not _ID.fullmatch(env_id):
        raise ValueError(f"env_id: expected a name with a version, such as Own-v0, got {env_id!r}")
    if env_id in gym.registry or env_id in TASKS:
        raise ValueError(f"env_id: {env_id!r} is already registered; choose another one")
    if host.slot_size(host.num_slots) < 1:
        raise ValueError(
            f"host: expected at most {host.image_size.bit_length() - 1} blocks, as each halves the "
            f"image of {host.image_size} pixels, got {host.num_slots}"
        )
    settings = dict(defaults or {})
    for name in ("task", "host"):
        if name in settings:
            raise ValueError(f"defaults: expected no {name!r}; it is an argument of its own")
    EnvConfig.from_keywords({**settings, "task": env_id})  # Raises its own errors.
    TASKS[env_id] = Task(
        host=host,
        load=load,
        augments=augments,
        ranges=ranges or InstanceRanges(),
        defaults=settings,
    )
    _register(env_id, task=env_id)


def _register(env_id: str, **keywords: Any) -> None:
    gym.register(
        id=env_id,
        entry_point="esper_env.envs.single_env:EsperEnv",
        vector_entry_point="esper_env.envs.vector_env:EsperVectorEnv",
        # The environment has its own time limit and its own check that it was reset. Gymnasium's
        # wrappers expect a reset, which `set_state` replaces.
        max_episode_steps=None,
        order_enforce=False,
        disable_env_checker=True,
        kwargs=keywords,
    )
