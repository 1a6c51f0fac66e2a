"""Configuration of the environment and the vocabulary that several modules share.

Nothing here imports torch or another module of the package.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


class Stage(IntEnum):
    """Where the seed of a slot is in its life."""

    DORMANT = 0
    GERMINATED = 1
    TRAINING = 2
    BLENDING = 3
    HOLDING = 4
    FOSSILIZED = 5
    EMBARGOED = 6


class Op(IntEnum):
    """What an action does."""

    WAIT = 0
    GERMINATE = 1
    ADVANCE = 2
    SET_ALPHA = 3
    PRUNE = 4
    FOSSILIZE = 5


class Blend(IntEnum):
    """How the residual branch of a seed is mixed into the features at its slot."""

    ADD = 0
    MULTIPLY = 1
    GATE = 2


class Curve(IntEnum):
    """Easing of an alpha ramp."""

    LINEAR = 0
    COSINE = 1
    SIGMOID_6 = 2
    SIGMOID_12 = 3
    SIGMOID_24 = 4


@dataclass(frozen=True)
class Style:
    """One option of the style head: the curve of the first ramp, and how alpha mixes."""

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
    """Every setting of the environment; each field is a keyword of `gym.make` and `gym.make_vec`.

    Raises:
        ValueError: If a value is outside its range or two fields contradict each other.
    """

    task: str = "digits"
    """Which data and host to train; a name of `esper_env.tasks.TASKS`."""
    host: str | None = None
    """Name of a host given to `register_host`, to be trained instead of the task's own."""
    data_dir: str | None = None
    """Where data that is not part of a package lies, or is downloaded to at the first reset; None
    is the environment variable ESPER_DATA_DIR, or else ~/.cache/esper."""
    instances: Literal["default", "train", "test"] = "default"
    """Conditions of training: the task's own, or one of a set of 100 or 20 others per episode."""
    episode_steps: int = 60
    """Length of an episode [env steps]."""
    batches_per_step: int = 4
    """Training batches per env step and member."""
    batch_size: int = 32
    """Images per training batch and member."""
    horizon: Literal["truncate", "terminal"] = "truncate"
    """Whether the last step of an episode is reported as `truncated` or as `terminated`."""
    gamma: float = 0.995
    """Discount factor of potential-based shaping; an agent must use the same."""
    reward: str = "gain"
    """Reward preset; a name of `esper_env.growth.reward.PRESETS`."""
    reward_weights: Mapping[str, float] = field(default_factory=dict)
    """Weights of reward terms that replace those of the preset, for example {"pbrs": 0.1}."""
    rent_weight: float = 0.02
    """Price of growth in the score [accuracy per doubling of the parameters]."""
    attribution: Literal["none", "leave_one_out", "full"] = "leave_one_out"
    """How the contribution of each blended, unfossilized seed is measured every env step: not at
    all, by leaving it out, or as its exact Shapley value over all subsets (at most 4 slots)."""
    illegal_actions: Literal["wait", "raise"] = "wait"
    """Whether an illegal action becomes WAIT (and `action_valid` False) or raises ValueError."""
    heads: Mapping[str, Any] = field(default_factory=dict)
    """Action heads restricted to one option or a list of options, e.g. {"style": "LINEAR_ADD"}."""

    max_seeds: int | None = None
    """Largest number of seeds alive or fossilized at once; None means one in every slot."""
    parameter_budget: float = 16.0
    """Largest sum of seed parameters, as a multiple of the host's parameters."""
    min_training_steps: int = 2
    """Time in TRAINING before a seed may blend [env steps]."""
    min_prune_age: int = 1
    """Age from which a seed may be pruned [env steps]."""
    embargo_steps: int = 3
    """Decisions during which a slot stays closed after a prune [env steps]."""
    automatic_training: bool = True
    """Whether a germinated seed starts to train without ADVANCE."""
    automatic_blending: bool = False
    """Whether a trained seed starts to blend without ADVANCE."""
    automatic_holding: bool = True
    """Whether a fully blended seed starts to hold without ADVANCE."""
    isolated_stages: Sequence[str] = ("TRAINING", "BLENDING")
    """Stages in which the seed's input is detached from the host."""
    min_gradient_health: float = 0.7
    """Gradient health from which a seed may blend, 0 to 1."""
    vanishing_gradient_norm: float = 1e-6
    """Norm of one tensor's gradient below which it counts as vanishing [clip norms]."""
    exploding_gradient_norm: float = 1e3
    """Norm of one tensor's gradient above which it counts as exploding [clip norms]."""
    strict_fossilize: bool = False
    """Whether FOSSILIZE needs a contribution of at least `min_contribution`."""
    min_contribution: float = 0.0
    """Smallest contribution that `strict_fossilize` accepts [accuracy, 0 to 1]."""

    snapshot_interval: int = 5
    """Healthy env steps between snapshots; one is also taken at each fossilization, before the
    training of that step."""
    panic_window: int = 8
    """Healthy losses that collapse and divergence are judged against [env steps]."""
    panic_patience: int = 2
    """Env steps in succession of collapse or divergence until a rollback."""
    collapse_fraction: float = 0.6
    """Mean loss below which a return to guessing is a collapse [losses of guessing]."""
    collapse_margin: float = 0.065
    """How near to the loss of guessing a collapsed loss is [losses of guessing]."""
    divergence_sigma: float = 6.0
    """Standard deviations above the mean loss that count as divergence."""
    divergence_factor: float = 3.0
    """Multiple of the mean loss that counts as divergence."""
    rollback_penalty: float = 0.1
    """Subtracted from the reward of the transition in which a member is rolled back [accuracy]."""
    max_rollbacks: int = 3
    """Rollbacks in an episode at which it is terminated."""

    host_learning_rate: float = 0.05
    """Learning rate of the host's SGD at the start of an episode, for the default instance."""
    seed_learning_rate: float = 0.05
    """Likewise of the seeds; another instance scales both by the same factor."""
    learning_rate_decay: Literal["none", "linear"] = "linear"
    """Whether both learning rates fall linearly to 0 over an episode."""
    momentum: float = 0.9
    """Momentum of both."""
    host_weight_decay: float = 5e-4
    """Weight decay of the host; seeds have none."""
    clip_norm: float = 1.0
    """Largest gradient norm of the host and of each seed, per batch."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of convolutions and linear maps; weights, statistics and the optimiser are
    float32. With "bfloat16" members run as one tensor program on a CPU too, more slowly."""
    chunk_size: int | None = None
    """Members that run in one tensor program; None chooses by the size of their activations."""

    def __post_init__(self) -> None:
        """Check every field and the relations between them."""
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            _require(self, f.name, not isinstance(value, float) or math.isfinite(value), "finite")
        for name in ("episode_steps", "batches_per_step", "batch_size", "embargo_steps"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("min_training_steps", "min_prune_age"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("snapshot_interval", "panic_patience", "max_rollbacks"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("max_seeds", "chunk_size"):
            value = getattr(self, name)
            _require(self, name, value is None or value >= 1, "None or at least 1")
        for name in ("host_learning_rate", "seed_learning_rate", "clip_norm", "parameter_budget"):
            _require(self, name, getattr(self, name) > 0, "above 0")
        _require(self, "panic_window", self.panic_window >= 2, "at least 2")
        _require(self, "collapse_fraction", 0 < self.collapse_fraction < 1, "in (0, 1)")
        _require(self, "collapse_margin", 0 < self.collapse_margin < 1, "in (0, 1)")
        _require(self, "divergence_factor", self.divergence_factor > 1, "above 1")
        for name in ("divergence_sigma", "rollback_penalty"):
            _require(self, name, getattr(self, name) >= 0, "at least 0")
        for name in ("rent_weight", "host_weight_decay", "vanishing_gradient_norm"):
            _require(self, name, getattr(self, name) >= 0, "at least 0")
        _require(self, "batch_size", self.batch_size >= 2, "at least 2 (batch normalisation)")
        _require(self, "gamma", 0 < self.gamma <= 1, "in (0, 1]")
        _require(self, "momentum", 0 <= self.momentum < 1, "in [0, 1)")
        _require(self, "min_gradient_health", 0 <= self.min_gradient_health <= 1, "in [0, 1]")
        _require(
            self,
            "exploding_gradient_norm",
            self.exploding_gradient_norm > self.vanishing_gradient_norm,
            "above vanishing_gradient_norm",
        )
        _require_choice(self, "instances", ("default", "train", "test"))
        _require_choice(self, "horizon", ("truncate", "terminal"))
        _require_choice(self, "attribution", ("none", "leave_one_out", "full"))
        _require_choice(self, "illegal_actions", ("wait", "raise"))
        _require_choice(self, "learning_rate_decay", ("none", "linear"))
        _require_choice(self, "precision", ("float32", "bfloat16"))
        for stage in self.isolated_stages:
            if stage not in ("TRAINING", "BLENDING", "HOLDING", "FOSSILIZED"):
                raise ValueError(
                    f"isolated_stages: expected names among TRAINING, BLENDING, HOLDING and "
                    f"FOSSILIZED, got {stage!r}"
                )
        if self.strict_fossilize and self.attribution == "none":
            raise ValueError(
                "strict_fossilize needs a measured contribution, but attribution is 'none'; "
                "set attribution='leave_one_out' or strict_fossilize=False"
            )

    @property
    def measures_contributions(self) -> bool:
        """Whether the contributions of single seeds are measured."""
        return self.attribution != "none"

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any]) -> EnvConfig:
        """Build a configuration from keywords, naming the closest field for an unknown one.

        Raises:
            TypeError: If a keyword is no field.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        for keyword in keywords:
            if keyword not in names:
                close = difflib.get_close_matches(keyword, names, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise TypeError(
                    f"unknown configuration field {keyword!r}{hint} "
                    f"Known fields: {', '.join(sorted(names))}"
                )
        return cls(**keywords)


def _require(config: EnvConfig, name: str, is_met: bool, expected: str) -> None:
    if not is_met:
        raise ValueError(f"{name}: expected {expected}, got {getattr(config, name)!r}")


def _require_choice(config: EnvConfig, name: str, choices: tuple[str, ...]) -> None:
    if getattr(config, name) not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {getattr(config, name)!r}")
