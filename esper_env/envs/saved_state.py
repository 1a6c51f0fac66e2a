"""Checks of a saved state, made before `EsperVectorEnv.set_state` writes anything."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from esper_env.config import STYLES, BoolArray, Curve, GradientCause, Op, Stage
from esper_env.growth.state import DOWN, HOLD

Array = npt.NDArray[Any]

_PARTS = ("made_with", "arrays", "tensors", "is_done", "np_random")
_SHARES = (
    *("slots.first_target", "slots.alpha", "slots.alpha_start", "slots.alpha_target"),
    *("measured.vanishing", "measured.exploding", "measured.health"),
    *("progress.accuracy", "progress.committed_accuracy", "progress.best_accuracy"),
    *("episode.test_accuracy", "episode.committed_test_accuracy"),
    *("history.alpha", "history.accuracy", "history.committed_accuracy"),
)
"""Arrays with values from 0 to 1."""


def check_state(
    state: Any,
    *,
    made_with: Mapping[str, Any],
    arrays: Mapping[str, Array],
    tensors: Mapping[str, torch.Tensor],
    generator: np.random.BitGenerator,
    num_instances: int,
) -> None:
    """Check that a state is complete, fits the environment, and has possible values.

    Args:
        state: Argument of `set_state`.
        made_with: Settings of the environment that the state must share.
        arrays: Arrays of the environment by name, as examples of shape and dtype.
        tensors: Tensors of the environment by name.
        generator: Random generator of the environment, not changed.
        num_instances: Number of instances in the configured set.

    Raises:
        ValueError: If the state cannot be restored; the error names the part, what was expected and
            what came.
    """
    _check_keys("state", state, _PARTS)
    _check_settings(state["made_with"], made_with)
    _check_keys("state['arrays']", state["arrays"], arrays)
    _check_keys("state['tensors']", state["tensors"], tensors)
    for name, array in arrays.items():
        _check_array(f"state['arrays'][{name!r}]", state["arrays"][name], array.shape, array.dtype)
    for name, tensor in tensors.items():
        shape, dtype = tuple(tensor.shape), np.dtype(np.float32)
        _check_array(f"state['tensors'][{name!r}]", state["tensors"][name], shape, dtype)
    shape = (len(arrays["progress.steps"]),)
    _check_array("state['is_done']", state["is_done"], shape, np.dtype(bool))
    _check_ranges(state["arrays"], made_with, num_instances)
    for expected, is_met in _relations(state["arrays"], state["is_done"], made_with):
        if not is_met.all():
            row = int(np.argwhere(~is_met)[0, 0])
            raise ValueError(
                f"state['arrays']: expected that {expected}, but sub-environment {row} differs"
            )
    _check_generator(state["np_random"], copy.deepcopy(generator))


def writable(array: Array) -> Array:
    """Return an array, or a copy of it, that PyTorch can share memory with."""
    return np.require(array, requirements=["C", "W"])


def _check_keys(label: str, value: Any, expected: Any) -> None:
    """Raise ValueError unless a value is a dictionary with exactly the expected keys."""
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{label}: expected a dictionary with the keys {list(expected)}, got {value!r}"
        )
    missing = [key for key in expected if key not in value]
    unknown = [key for key in value if key not in expected]
    if missing or unknown:
        raise ValueError(
            f"{label}: expected the keys that get_state returns, got a dictionary without "
            f"{missing} and with the unknown keys {unknown}"
        )


def _check_settings(other: Any, own: Mapping[str, Any]) -> None:
    """Raise ValueError if settings that change the future differ."""
    if not isinstance(other, Mapping):
        raise ValueError(f"state['made_with']: expected a dictionary of settings, got {other!r}")
    differing = [name for name in own if own[name] != other.get(name)]
    if differing:
        differences = [f"{n}={own[n]!r}, got {other.get(n)!r}" for n in differing]
        raise ValueError(
            f"state: expected a copy made with {'; '.join(differences)}; make the environment "
            "with the same settings"
        )


def _check_array(label: str, value: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Raise ValueError unless a value is a finite array of this shape and dtype."""
    if not isinstance(value, np.ndarray) or value.shape != shape or value.dtype != dtype:
        is_array = isinstance(value, np.ndarray)
        got = f"shape {value.shape}, dtype {value.dtype}" if is_array else repr(value)
        raise ValueError(f"{label}: expected an array of shape {shape}, dtype {dtype}, got {got}")
    if dtype.kind == "f" and not np.isfinite(value).all():
        raise ValueError(f"{label}: expected finite numbers, got {value[~np.isfinite(value)][0]}")


def _check_ranges(
    arrays: Mapping[str, Array], made_with: Mapping[str, Any], num_instances: int
) -> None:
    """Raise ValueError if a value is out of range; counters are at least 0."""
    num_slots, steps = arrays["slots.stage"].shape[1], made_with["episode_steps"]
    limits: dict[str, tuple[float, float]] = dict.fromkeys(_SHARES, (0, 1))
    for part in ("slots", "history"):
        limits[f"{part}.stage"] = 0, len(Stage) - 1
        limits[f"{part}.blueprint"] = -1, len(made_with["blueprints"]) - 1
    limits |= {
        "slots.style": (-1, len(STYLES) - 1),
        "slots.mode": (HOLD, DOWN),
        "slots.curve": (0, len(Curve) - 1),
        "measured.cause": (0, len(GradientCause) - 1),
        "progress.last_op": (0, len(Op) - 1),
        "progress.steps": (0, steps),
        "progress.samples": (0, np.inf),
        "progress.flops": (0, np.inf),
        "episode.instance": (0, num_instances - 1),
        "history.length": (1, steps + 1),
        "history.op": (0, len(Op) - 1),
        "history.op_slot": (0, num_slots - 1),
    }
    for name, array in arrays.items():
        is_count = array.dtype.kind == "i"
        low, high = limits.get(name, (0, np.inf) if is_count else (-np.inf, np.inf))
        is_outside = (array < low) | (array > high)
        if is_outside.any():
            raise ValueError(
                f"state['arrays'][{name!r}]: expected values from {low} to {high}, got "
                f"{array[is_outside][0]}"
            )


def _check_generator(value: Any, probe: np.random.BitGenerator) -> None:
    """Raise ValueError unless a value is the state of a random generator, which is changed."""
    problem: Exception | None = None
    try:
        probe.state = copy.deepcopy(value)
        is_same = bool(probe.state == value)  # NumPy truncates some wrong numbers.
    except (IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        problem, is_same = error, False
    if not is_same:
        raise ValueError(
            f"state['np_random']: expected the state of a {type(probe).__name__}, got {value!r}"
        ) from problem


def _relations(
    arrays: Mapping[str, Array], is_done: BoolArray, made_with: Mapping[str, Any]
) -> Iterator[tuple[str, BoolArray]]:
    """Yield relations between arrays that a step relies on, and where each is met."""
    stage, steps = arrays["slots.stage"], arrays["progress.steps"]
    has_seed = (stage >= Stage.GERMINATED) & (stage <= Stage.FOSSILIZED)
    for name in ("blueprint", "style"):
        is_set = arrays[f"slots.{name}"] >= 0
        yield f"a slot has a {name} if and only if it has a seed", is_set == has_seed
    is_ramp = arrays["slots.mode"] != HOLD
    is_under_way = arrays["slots.ramp_step"] < arrays["slots.ramp_length"]
    yield "a ramp that is running has env steps left", ~is_ramp | (has_seed & is_under_way)
    is_closed = arrays["slots.cooldown"] > 0
    yield "a slot has a cooldown if it is embargoed", is_closed == (stage == Stage.EMBARGOED)
    yield "history.length is progress.steps + 1", arrays["history.length"] == steps + 1
    has_steps = steps < made_with["episode_steps"]
    yield "an episode that is not done has env steps left", is_done | has_steps
    yield "episode.has_test is is_done", arrays["episode.has_test"] == is_done
