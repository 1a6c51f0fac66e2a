"""Arguments of a training: their ranges, and how a run stores and returns them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy as np
import typeguard

Args = TypeVar("Args")
MOST = 2**53
"""Largest integer."""


def load_arguments(kind: type[Args], directory: Path | str, **nested: type[Any]) -> Args:
    """Return the arguments of a run, as its config.json has them.

    Args:
        kind: Dataclass of the arguments, with a field `resume`.
        directory: Directory of the run.
        nested: Dataclasses of the fields that are dataclasses.

    Raises:
        FileNotFoundError: If the directory has no run.
        ValueError: If config.json is damaged, or of another version of the arguments.
    """
    path = Path(directory).expanduser() / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"--resume {directory}: expected the directory of a run with a config.json, which does "
            "not exist; start a run with --run-dir"
        )
    try:
        config = json.loads(path.read_text())
        for name, field_kind in nested.items():
            config[name] = _build(field_kind, config[name])
        args: Args = _build(kind, config | {"resume": Path(directory).expanduser()})
        return args
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"--resume {directory}: expected a config.json of this version of Esper, got one that "
            f"cannot be used ({error}); resume with the version that started the run"
        ) from error


def _build(kind: Callable[..., Any], values: dict[str, Any]) -> Any:
    """Build a dataclass from JSON, in which tuples are lists."""
    tuples = {f.name for f in dataclasses.fields(kind) if isinstance(f.default, tuple)}  # type: ignore[arg-type]
    return kind(**{n: tuple(v) if n in tuples else v for n, v in values.items()})


def config_of(args: Any) -> dict[str, Any]:
    """Return the content of config.json: all arguments but the directory, which may be moved.

    Raises:
        ValueError: If there are two directories.
    """
    if args.resume is not None and args.run_dir is not None:
        raise ValueError(f"run_dir: expected none beside --resume, got {args.run_dir}")
    values = json.loads(json.dumps(dataclasses.asdict(args), allow_nan=False, default=str))
    return {name: value for name, value in values.items() if name not in ("run_dir", "resume")}


def check_types(args: Any) -> None:
    """Check that every field of a dataclass has its type; NumPy scalars become Python's own.

    Raises:
        TypeError: For the first field of another type; no truth value is a number.
        ValueError: For an integer whose size no float can hold.
    """
    for name, hint in get_type_hints(type(args)).items():
        value = getattr(args, name)
        if isinstance(value, np.generic):
            value = value.item()
            object.__setattr__(args, name, value)  # The class may be frozen.
        is_fit = isinstance(value, bool) <= (hint is bool)
        try:
            typeguard.check_type(value, hint)
        except typeguard.TypeCheckError:
            is_fit = False
        if not is_fit:
            expected = str(getattr(hint, "__name__", hint)).replace("typing.", "")
            got = f"{value!r} of type {type(value).__name__}"
            raise TypeError(f"{name}: expected {expected}, got {got}")
        if isinstance(value, int) and abs(value) > MOST:
            raise ValueError(f"{name}: expected at most {MOST}, got {value}")


def check_ranges(
    args: Any,
    expected: str,
    *names: str,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
) -> None:
    """Check that numbers are finite and in a range; None is accepted.

    Args:
        args: Object with the numbers.
        expected: The range in words.
        names: Attributes to check.
        least: Smallest number.
        above: Number that all must exceed.
        most: Largest number.

    Raises:
        ValueError: For the first number that is not in the range.
    """
    for name in names:
        value = getattr(args, name)
        if value is None or (math.isfinite(value) and least <= value <= most and value > above):
            continue
        raise ValueError(f"{name}: expected {expected}, got {value}")


USUAL = {
    "learning_rate": (1e-5, 1e-2, "larger steps diverge, smaller ones hardly learn"),
    "gamma": (0.9, 1.0, "the final score is many env steps away"),
    "gae_lambda": (0.8, 1.0, "credit would end after a few env steps"),
    "clip_coef": (0.05, 0.4, "a wide range does not limit the update, a narrow one stops it"),
    "ent_coef": (0.0, 0.1, "a large entropy bonus outweighs the reward"),
    "vf_coef": (0.1, 2.0, "value and policy loss share the encoder and the LSTM"),
    "max_grad_norm": (0.1, 10.0, "either every gradient is clipped, or none"),
    "update_epochs": (1, 15, "old samples are used too often"),
    "target_kl": (0.003, 0.2, "updates would stop at once, or never"),
    "hidden_size": (16, 1024, "the observation has about 100 features"),
}
"""Usual range of arguments of PPO, and the reason, by name."""


def find_unusual(args: Any) -> list[str]:
    """Return a note for every argument that is valid but outside its usual range."""
    notes = []
    for name, (low, high, reason) in USUAL.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            notes.append(f"{name} {value} is unusual (usual: {low:g} to {high:g}): {reason}")
    return notes


def difference(name: str, expected: Any, actual: Any) -> str:
    """Return an argument whose value differs, for a message; of `env` only what differs."""
    if name == "env" and isinstance(expected, dict):
        keys = [key for key in actual if actual[key] != expected.get(key)]
        parts = [f"{name}.{k}={actual[k]!r} (run: {expected.get(k)!r})" for k in keys]
        return ", ".join(parts)
    return f"{name}={actual!r} (run: {expected!r})"
