"""Configuration of the environment, and enumerations that several modules share.

This module imports neither torch nor any other module of the package.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]


class Stage(IntEnum):
    """Stage of a slot in the life cycle of its seed."""

    DORMANT = 0
    GERMINATED = 1
    TRAINING = 2
    BLENDING = 3
    HOLDING = 4
    FOSSILIZED = 5
    EMBARGOED = 6


class Op(IntEnum):
    """Operation of an action."""

    WAIT = 0
    GERMINATE = 1
    ADVANCE = 2
    SET_ALPHA = 3
    PRUNE = 4
    FOSSILIZE = 5


class Blend(IntEnum):
    """Rule that mixes the residual branch of a seed into the features at its slot."""

    ADD = 0
    MULTIPLY = 1
    GATE = 2


class Curve(IntEnum):
    """Easing curve of an alpha ramp."""

    LINEAR = 0
    COSINE = 1
    SIGMOID_6 = 2
    SIGMOID_12 = 3
    SIGMOID_24 = 4


class GradientCause(IntEnum):
    """Cause of a low gradient of a seed."""

    FINE = 0
    """The gradient is not low, or there is no seed or no gradient."""
    NO_GRADIENT = 1
    """No gradient reached the seed: the gradients of all its tensors vanish."""
    DORMANT = 2
    """The gradient does not get through the seed: those of some tensors vanish (dead units)."""
    SATURATED = 3
    """The gradient is low and small: saturated units, or a weight near 0 in the blend."""
    HOST_FAST = 4
    """The gradient is low only in comparison: that of the host is large."""


@dataclass(frozen=True)
class Style:
    """Option of the style head: the curve of the first ramp, and the blend."""

    name: str
    curve: Curve
    blend: Blend


STYLES = (
    Style("LINEAR_ADD", Curve.LINEAR, Blend.ADD),
    Style("LINEAR_MULTIPLY", Curve.LINEAR, Blend.MULTIPLY),
    Style("SIGMOID_ADD", Curve.SIGMOID_12, Blend.ADD),
    Style("LINEAR_GATE", Curve.LINEAR, Blend.GATE),
)


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """Settings of the environment; each field is a keyword of `gym.make` and `gym.make_vec`.

    NumPy scalars are converted to Python's types, and numbers to the type of the field.

    Raises:
        TypeError: If a value has a wrong type, e.g. 8.0 for a count or "yes" for a bool.
        ValueError: If a value is out of range or two fields contradict each other. Names of tasks,
            hosts, rewards, heads and their options are checked when the environment is made.
    """

    task: str = "digits"
    """Data and host to train; a name in `esper_env.tasks.TASKS`."""
    host: str | None = None
    """Name of a host added by `register_host`; None trains the host of the task."""
    data_dir: str | None = None
    """Folder of downloaded data; the first reset downloads what is missing. None uses the
    environment variable ESPER_DATA_DIR if it is set, else ~/.cache/esper."""
    instances: Literal["default", "train", "test"] = "default"
    """Set of training conditions: 1 ("default"), 100 ("train") or 20 ("test") instances; in tasks
    with regimes "test" has 60."""
    observation: Literal["full", "minimal"] = "full"
    """Features of the observation; "minimal" leaves out all differences: from earlier env steps
    (with the best accuracy and the plateau counter), and from networks with other seeds
    (contributions, would-be effects and interactions)."""
    episode_steps: int = 60
    """Length of an episode [env steps]."""
    clock: Literal["steps", "flops"] = "steps"
    """What an env step trains: "steps" `batches_per_step` batches, whatever they cost; "flops" the
    same number of operations in every env step, so a larger network trains on fewer batches. Then
    the episode's budget is that of `episode_steps` x `batches_per_step` batches of the host without
    seeds, times the `compute` of the instance."""
    batches_per_step: int = 4
    """Training batches per env step and sub-environment."""
    batch_size: int = 32
    """Images per training batch and sub-environment."""
    horizon: Literal["truncate", "terminal"] = "truncate"
    """Flag of the last step of an episode: `truncated` or `terminated`."""
    gamma: float = 0.995
    """Discount factor of shaping; with the reward term `pbrs` the agent must use the same value."""
    objective: Literal["final", "anytime"] = "final"
    """Objective of an episode: the score of the committed network at the end, or the mean over env
    steps of the score of the network in service, in which seeds at alpha 0 cost nothing."""
    reward: str = "gain"
    """Reward preset; a name in `esper_env.growth.reward.PRESETS`."""
    reward_weights: Mapping[str, float] = field(default_factory=dict)
    """Weights of reward terms that replace the weights of the preset, e.g. {"pbrs": 0.1}."""
    rent_weight: float = 0.02
    """Price of growth in the score [accuracy per doubling of the parameters]."""
    attribution: Literal["none", "leave_one_out", "full"] = "leave_one_out"
    """Measurement of the contribution of each seed that is blended but not fossilized, in every env
    step: none, accuracy without the seed, or exact Shapley value (at most 4 slots)."""
    illegal_actions: Literal["wait", "raise"] = "wait"
    """Treatment of an illegal action: replace it by WAIT, or raise ValueError."""
    heads: Mapping[str, Any] = field(default_factory=dict)
    """Restriction of action heads to one option or to a list, e.g. {"style": "LINEAR_ADD"}."""

    max_seeds: int | None = None
    """Maximum number of seeds at once, fossilized ones included; None allows one per slot."""
    parameter_budget: float = 16.0
    """Maximum number of seed parameters [multiples of the host's parameters]."""
    min_training_steps: int = 2
    """Minimum time in TRAINING before BLENDING [env steps]."""
    min_prune_age: int = 1
    """Minimum age of a seed for PRUNE [env steps]."""
    embargo_steps: int = 3
    """Time in EMBARGOED after the seed of a slot was removed [env steps]."""
    graft: bool = False
    """Let GERMINATE put a seed into HOLDING at alpha 1 at once; the heads tempo and alpha_target
    are then not used. A new seed returns its input unchanged, so nothing is disturbed."""
    parking: bool = False
    """Let SET_ALPHA take a seed in HOLDING out of service (alpha target 0) and put it back. A
    parked seed keeps its weights, does not train, and costs nothing in the score."""
    parks_fossilized: bool = False
    """With `parking`: let SET_ALPHA also park fossilized seeds and put them back at alpha 1."""
    automatic_training: bool = True
    """Move a seed from GERMINATED to TRAINING without ADVANCE."""
    automatic_blending: bool = False
    """Move a seed from TRAINING to BLENDING without ADVANCE."""
    automatic_holding: bool = True
    """Move a seed from BLENDING to HOLDING without ADVANCE."""
    isolated_stages: Sequence[str] = ("TRAINING", "BLENDING")
    """Stages in which the input of a seed is detached."""
    min_gradient_health: float = 0.7
    """Minimum gradient health of a seed before BLENDING, 0 to 1."""
    vanishing_gradient_norm: float = 1e-6
    """Gradient norm of a tensor below which the gradient vanishes [multiples of `clip_norm`]."""
    exploding_gradient_norm: float = 1e3
    """Gradient norm of a tensor above which the gradient explodes [multiples of `clip_norm`]."""
    strict_fossilize: bool = False
    """Allow FOSSILIZE only at a contribution of at least `min_contribution`."""
    min_contribution: float = 0.0
    """Minimum contribution with `strict_fossilize` [accuracy, 0 to 1]."""

    snapshot_interval: int = 5
    """Healthy env steps between two snapshots; collapsed and diverged env steps are not counted.
    Each fossilization also takes a snapshot, before the training of that env step."""
    panic_window: int = 8
    """Number of recent healthy losses that a new loss is compared with."""
    panic_patience: int = 2
    """Consecutive collapsed or diverged env steps before a rollback."""
    collapse_fraction: float = 0.6
    """Mean recent loss below which a collapse is possible [multiples of ln(classes)]."""
    collapse_margin: float = 0.065
    """Tolerance of a collapse: the loss is above (1 - `collapse_margin`) * ln(classes)."""
    divergence_sigma: float = 6.0
    """Minimum distance of a diverged loss above the mean recent loss [standard deviations]."""
    divergence_factor: float = 3.0
    """Minimum size of a diverged loss [multiples of the mean recent loss]."""
    divergence_loss: float | None = None
    """Loss above which an env step has diverged without a window of recent losses [multiples of
    ln(classes)]; None for no such limit."""
    rollback_penalty: float = 0.1
    """Penalty in the reward of the env step with a rollback [accuracy]."""
    max_rollbacks: int = 3
    """Number of rollbacks at which an episode terminates."""

    flag_contribution: float = 0.05
    """Contributions above which `flag_parasite` and `flag_attribution` are possible [accuracy]."""
    flag_ratio: float = 3.0
    """Sum of the contributions at which `flag_attribution` is set [multiples of the joint gain]."""
    flag_prunes: int = 20
    """Prunes of young seeds in an episode at which `flag_churn` is set."""
    flag_age: int = 5
    """Age below which a seed counts as young for `flag_churn` [env steps]."""

    host_learning_rate: float = 0.05
    """Initial learning rate of the host, for the default instance."""
    seed_learning_rate: float = 0.05
    """Initial learning rate of the seeds; other instances scale both by the same factor."""
    learning_rate_decay: Literal["none", "linear"] = "linear"
    """Schedule of both learning rates: constant, or linear decay from the initial value in the
    first env step to 1/`episode_steps` of it in the last."""
    momentum: float = 0.9
    """Momentum of the SGD of host and seeds."""
    host_weight_decay: float = 5e-4
    """Weight decay of the host; seeds have no weight decay."""
    clip_norm: float = 1.0
    """Maximum gradient norm of the host, and of each seed, per batch."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of convolutions and linear maps; weights, statistics and momentum stay float32. On
    a CPU "bfloat16" is slower, because the compiled kernels support only "float32"."""
    chunk_size: int | None = None
    """Sub-environments per grouped tensor operation; None derives it from their activations."""

    def __post_init__(self) -> None:
        """Normalize the types of all fields, then check values and relations between them."""
        for name, hint in _hints().items():
            value = _normalized(name, hint, getattr(self, name))
            object.__setattr__(self, name, value)  # The class is frozen.
            _require(self, name, not isinstance(value, float) or math.isfinite(value), "finite")
            is_small = not isinstance(value, int) or value < 2**31
            _require(self, name, is_small, "at most 2147483647")
        for name in ("episode_steps", "batches_per_step", "batch_size", "embargo_steps"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("min_training_steps", "min_prune_age"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("flag_prunes", "flag_age"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("flag_contribution", "flag_ratio"):
            _require(self, name, getattr(self, name) >= 0, "at least 0")
        for name in ("snapshot_interval", "panic_patience", "max_rollbacks"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("max_seeds", "chunk_size"):
            value = getattr(self, name)
            _require(self, name, value is None or value >= 1, "None or at least 1")
        for name in ("host_learning_rate", "seed_learning_rate", "clip_norm", "parameter_budget"):
            _require(self, name, getattr(self, name) > 0, "above 0")
        _require(self, "panic_window", self.panic_window >= 2, "at least 2")
        for name in ("collapse_fraction", "collapse_margin"):
            _require(self, name, 0 < getattr(self, name) < 1, "in (0, 1)")
        limit = self.divergence_loss
        _require(self, "divergence_loss", limit is None or limit > 1, "None or above 1")
        _require(self, "divergence_factor", self.divergence_factor > 1, "above 1")
        for name in ("divergence_sigma", "rollback_penalty"):
            _require(self, name, getattr(self, name) >= 0, "at least 0")
        for name in ("rent_weight", "host_weight_decay", "vanishing_gradient_norm"):
            _require(self, name, getattr(self, name) >= 0, "at least 0")
        _require(self, "batch_size", self.batch_size >= 2, "at least 2 (batch normalization)")
        _require(self, "gamma", 0 < self.gamma <= 1, "in (0, 1]")
        _require(self, "momentum", 0 <= self.momentum < 1, "in [0, 1)")
        _require(self, "min_gradient_health", 0 <= self.min_gradient_health <= 1, "in [0, 1]")
        is_above = self.exploding_gradient_norm > self.vanishing_gradient_norm
        _require(self, "exploding_gradient_norm", is_above, "above vanishing_gradient_norm")
        for name, hint in _hints().items():
            if get_origin(hint) is Literal:
                choices = get_args(hint)
                _require(self, name, getattr(self, name) in choices, f"one of {choices}")
        for stage in self.isolated_stages:
            if stage not in ("TRAINING", "BLENDING", "HOLDING", "FOSSILIZED"):
                raise ValueError(
                    f"isolated_stages: expected names among TRAINING, BLENDING, HOLDING and "
                    f"FOSSILIZED, got {stage!r}"
                )
        if self.parks_fossilized and not self.parking:
            raise ValueError(
                "parks_fossilized needs parking, but parking is False; set parking=True or "
                "parks_fossilized=False"
            )
        if self.strict_fossilize and self.attribution == "none":
            raise ValueError(
                "strict_fossilize needs a measured contribution, but attribution is 'none'; "
                "set attribution='leave_one_out' or strict_fossilize=False"
            )

    @property
    def measures_contributions(self) -> bool:
        """True if the contributions of single seeds are measured."""
        return self.attribution != "none"

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any]) -> EnvConfig:
        """Build a configuration from keywords.

        Raises:
            TypeError: If a keyword is not a field; the error names the closest field.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        for keyword in keywords:
            if keyword not in names:
                known = f"; expected one of {', '.join(sorted(names))}"
                hint = near(keyword, names) or known
                raise TypeError(f"unknown configuration field {keyword!r}{hint}")
        return cls(**keywords)


_TYPE_NAMES: dict[Any, str] = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
    str: "a string",
    Literal: "a string",
    Sequence: "a sequence of strings",
    Mapping: "a dictionary with strings as keys",
}


@functools.cache
def _hints() -> dict[str, Any]:
    """Return the type of each field."""
    return get_type_hints(EnvConfig)


def _normalized(name: str, hint: Any, value: Any) -> Any:
    """Return a value in exactly the type of a field, so that no call compiles a kernel again.

    Args:
        name: Name of the field, for the error message.
        hint: Type of the field.
        value: Value of a user.

    Raises:
        TypeError: If the value has another type; no float is a count, and no string is a bool or a
            sequence of strings.
    """
    is_union = get_origin(hint) in (Union, UnionType)  # All unions are of a type and None.
    if is_union and value is None:
        return None
    kind = get_args(hint)[0] if is_union else hint
    is_bool = isinstance(value, (bool, np.bool_))
    origin = get_origin(kind)
    if kind is bool and is_bool:
        return bool(value)
    if kind is int and isinstance(value, (int, np.integer)) and not is_bool:
        return int(value)
    if kind is float and isinstance(value, (int, float, np.integer, np.floating)) and not is_bool:
        try:
            return float(value)
        except OverflowError:  # An integer of more than 300 digits.
            return math.inf
    if kind is str and name == "data_dir" and isinstance(value, os.PathLike):
        return os.fspath(value)
    if (kind is str or origin is Literal) and isinstance(value, str):
        return str(value)
    if origin is Sequence and isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_normalized(name, str, entry) for entry in value)
    if origin is Mapping and isinstance(value, Mapping):
        of_values = get_args(kind)[1]
        return {
            _normalized(f"{name}: a key", str, key): _plain(entry)
            if of_values is Any
            else _normalized(f"{name}[{key!r}]", of_values, entry)
            for key, entry in value.items()
        }
    raise TypeError(
        f"{name}: expected {_TYPE_NAMES[origin or kind]}, got {value!r} of type "
        f"{type(value).__name__}"
    )


def _plain(value: Any) -> Any:
    """Return NumPy scalars and arrays, also inside a list or tuple, as Python's own types."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def near(name: Any, known: Iterable[str]) -> str:
    """Return a hint with the closest known name for an error message, or an empty string."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _require(config: EnvConfig, name: str, is_met: bool, expected: str) -> None:
    if not is_met:
        raise ValueError(f"{name}: expected {expected}, got {getattr(config, name)!r}")
