"""Files of a run: its configuration, and a network as weights (safetensors) and arguments."""

from __future__ import annotations

import json
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from esper_env import EsperVectorEnv

Network = TypeVar("Network", bound=nn.Module)


def create_run_directory(directory: Path, config: dict[str, Any]) -> None:
    """Create a directory for a new run and write its config.json.

    Raises:
        FileExistsError: If the directory contains a run.
        OSError: If it cannot be written.
    """
    path = directory / "config.json"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with path.open("x") as file:
            json.dump(config, file, indent=1, default=str)
    except OSError as error:
        has_run = isinstance(error, FileExistsError) and path.exists()
        problem = "contains a run" if has_run else f"is not writable ({error.strerror})"
        raise type(error)(f"--run-dir {directory} {problem}; choose another directory") from error


def save_network(directory: Path, network: nn.Module) -> None:
    """Write the weights of a network and the arguments of its constructor.

    Args:
        directory: Directory of the run.
        network: Network with an attribute for each argument of its constructor.
    """
    state = {name: tensor.contiguous().cpu() for name, tensor in network.state_dict().items()}
    save_file(state, directory / "agent.safetensors")
    arguments = {name: getattr(network, name) for name in signature(type(network)).parameters}
    (directory / "agent.json").write_text(json.dumps(arguments, indent=1))


def load_network(directory: Path, make: Callable[..., Network]) -> Network:
    """Construct a saved network and load its weights; global random state is not changed.

    Args:
        directory: Directory of the run.
        make: Constructor of the network.

    Raises:
        FileNotFoundError: If the directory has no checkpoint.
    """
    path = directory / "agent.json"
    if not path.exists():
        raise FileNotFoundError(
            f"no checkpoint in {directory}: expected agent.json and agent.safetensors, as written "
            "by python -m esper_agent.ppo_lstm --run-dir"
        )
    # The constructor samples initial weights, which are then overwritten.
    with torch.random.fork_rng(devices=[]):
        network = make(**json.loads(path.read_text()))
    network.load_state_dict(load_file(directory / "agent.safetensors"))
    return network


def describe_spaces(envs: EsperVectorEnv) -> dict[str, Any]:
    """Return the names of the observations, and the options of each head by its name."""
    return {
        "observation_names": list(envs.observation_names),
        "heads": {head.name: list(head.options) for head in envs.heads},
    }


def check_spaces(directory: Path, envs: EsperVectorEnv) -> None:
    """Check that an environment has the observations and heads that a network was trained with.

    Raises:
        ValueError: If they differ; the message shows the first difference.
    """
    known = json.loads((directory / "agent.json").read_text())
    for name, value in describe_spaces(envs).items():
        expected, actual = (list(x.items() if name == "heads" else x) for x in (known[name], value))
        if expected == actual:
            continue
        difference = f"expected {len(expected)} of them, got {len(actual)}"
        if len(expected) == len(actual):
            pairs = zip(expected, actual, strict=True)
            difference = next(f"expected {a!r}, got {b!r}" for a, b in pairs if a != b)
        raise ValueError(
            f"the checkpoint in {directory} was trained with other {name}: {difference}; make the "
            "environment with the settings in its config.json"
        )
