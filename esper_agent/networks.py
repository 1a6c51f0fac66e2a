"""Files of a network: its weights (safetensors) and the arguments of its constructor (JSON)."""

from __future__ import annotations

import json
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from esper_agent.checkpoint import is_finite, write_file, write_json
from esper_env import EsperVectorEnv

Network = TypeVar("Network", bound=nn.Module)


def save_network(directory: Path, network: nn.Module) -> None:
    """Write the weights of a network and the arguments of its constructor.

    Args:
        directory: Directory of the run, which must exist.
        network: Network with an attribute for each argument of its constructor.

    Raises:
        ValueError: If a weight is not finite.
    """
    if not is_finite(network):
        raise ValueError(f"network: expected finite weights to save in {directory}, got NaN or inf")
    state = {name: tensor.contiguous().cpu() for name, tensor in network.state_dict().items()}
    arguments = {name: getattr(network, name) for name in signature(type(network)).parameters}
    write_json(directory / "agent.json", arguments)
    write_file(directory / "agent.safetensors", [save(state)])


def load_network(directory: Path | str, make: Callable[..., Network]) -> Network:
    """Construct a saved network and load its weights; global random state is not changed.

    Args:
        directory: Directory of the run.
        make: Constructor of the network.

    Raises:
        TypeError: If `directory` is no path.
        FileNotFoundError: If the directory has no checkpoint.
        ValueError: If a file is damaged.
    """
    if not isinstance(directory, str | Path):
        got = f"{directory!r} of type {type(directory).__name__}"
        raise TypeError(f"directory: expected a Path or a string, got {got}")
    directory = Path(directory).expanduser()
    path = directory / "agent.json"
    if not path.exists():
        raise FileNotFoundError(
            f"no checkpoint in {directory}: expected agent.json and agent.safetensors, as written "
            "by python -m esper_agent.ppo_lstm --run-dir"
        )
    try:
        # The constructor samples initial weights, which are then overwritten.
        with torch.random.fork_rng(devices=[]):
            network = make(**json.loads(path.read_text()))
        path = directory / "agent.safetensors"
        network.load_state_dict(load_file(path))
    except (ValueError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: expected the file of a network, got one that cannot be used ({reason}); copy "
            f"it again, or continue its run with --resume {directory}"
        ) from error
    return network


def describe_spaces(envs: EsperVectorEnv) -> dict[str, Any]:
    """Return the names of the observations, and the options of each head by its name."""
    return {
        "observation_names": list(envs.observation_names),
        "heads": {head.name: list(head.options) for head in envs.heads},
    }


def check_spaces(directory: Path | str, envs: EsperVectorEnv) -> None:
    """Check that an environment has the observations and heads that a network was trained with.

    Raises:
        ValueError: If they differ; the message shows the first difference.
    """
    known = json.loads((Path(directory).expanduser() / "agent.json").read_text())
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
