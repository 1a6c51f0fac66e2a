"""The observation: a flat vector of features with fixed scales, each within [-1, 1].

A missing value is 0 with a validity bit 0. What is charged is observed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from esper_env.config import (
    STYLES,
    BoolArray,
    EnvConfig,
    FloatArray,
    IntArray,
    Op,
    Stage,
)
from esper_env.lifecycle import DOWN, HOLD, UP, LifecycleState, Measurements

HISTORY = 3
"""Past env steps whose change of accuracy and loss is observed."""
PLATEAU_MARGIN = 0.003
"""Improvement of the best accuracy that resets the plateau counter [accuracy, 0 to 1]."""
CHANGE_SCALE = 10.0
"""Factor on changes of accuracy, so that 0.1 becomes 1."""
STEPS_SCALE = 20.0
"""Number of env steps that ages and counters divide by."""
DOUBLINGS_SCALE = 4.0
"""Doublings of the parameters that growth divides by."""


@dataclass
class Progress:
    """Course of the episodes. Arrays are (num_envs,) unless stated."""

    steps: IntArray
    """Env steps done."""
    accuracy: FloatArray
    """Of the live network on the validation split."""
    loss: FloatArray
    """Likewise [nats]."""
    committed_accuracy: FloatArray
    """Of the network with only its fossilized seeds."""
    accuracy_history: FloatArray
    """Changes in the last steps, latest first. (num_envs, HISTORY)."""
    loss_history: FloatArray
    """Likewise."""
    best_accuracy: FloatArray
    plateau_steps: IntArray
    """Time since the best accuracy rose by the margin [env steps]."""
    train_loss: FloatArray
    """Mean over the last env step [nats]."""
    last_op: IntArray
    last_valid: BoolArray
    samples: FloatArray
    """Training images seen."""
    flops: FloatArray
    """Floating-point operations of training: 2 per multiply-add, backward twice the forward."""

    @classmethod
    def empty(cls, num_envs: int) -> Progress:
        """Return the state before any episode."""

        def ints() -> IntArray:
            return np.zeros(num_envs, dtype=np.int64)

        def floats(*shape: int) -> FloatArray:
            return np.zeros((num_envs, *shape))

        return cls(
            steps=ints(),
            accuracy=floats(),
            loss=floats(),
            committed_accuracy=floats(),
            accuracy_history=floats(HISTORY),
            loss_history=floats(HISTORY),
            best_accuracy=floats(),
            plateau_steps=ints(),
            train_loss=floats(),
            last_op=ints(),
            last_valid=np.ones(num_envs, dtype=bool),
            samples=floats(),
            flops=floats(),
        )

    def begin(self, members: IntArray, initial_loss: float) -> None:
        """Forget the past of members that start an episode."""
        for array in vars(self).values():
            array[members] = 0
        self.last_valid[members] = True
        self.train_loss[members] = initial_loss

    def record(
        self, members: IntArray, accuracy: FloatArray, loss: FloatArray, committed: FloatArray
    ) -> None:
        """Take in an evaluation of the live and the committed network after an env step."""
        for history, new, old in (
            (self.accuracy_history, accuracy, self.accuracy[members]),
            (self.loss_history, loss, self.loss[members]),
        ):
            history[members] = np.concatenate([(new - old)[:, None], history[members, :-1]], axis=1)
        has_improved = accuracy > self.best_accuracy[members] + PLATEAU_MARGIN
        self.plateau_steps[members] = np.where(has_improved, 0, self.plateau_steps[members] + 1)
        self.best_accuracy[members] = np.maximum(self.best_accuracy[members], accuracy)
        self.accuracy[members] = accuracy
        self.loss[members] = loss
        self.committed_accuracy[members] = committed


class ObservationBuilder:
    """Names and computes the features.

    Args:
        num_slots: Slots of the host.
        blueprints: Names of the registry.
        host_parameters: Parameters of the host.
        num_classes: Classes of the task; ln(num_classes) scales losses.
        config: Episode length, prices and budget.
    """

    def __init__(
        self,
        num_slots: int,
        blueprints: Sequence[str],
        host_parameters: int,
        num_classes: int,
        config: EnvConfig,
    ) -> None:
        self.num_slots = num_slots
        self.num_blueprints = len(blueprints)
        self.host_parameters = host_parameters
        self.initial_loss = float(np.log(num_classes))
        self.config = config
        past = range(1, HISTORY + 1)
        episode = [
            "budget_left",
            "accuracy",
            "committed_accuracy",
            "best_accuracy",
            "loss",
            "train_loss",
            "plateau_steps",
            "growth",
            "committed_growth",
            "rent",
            "parameter_budget_left",
            *(f"accuracy_change_{i}" for i in past),
            *(f"loss_change_{i}" for i in past),
            *(f"slots_{stage.name.lower()}" for stage in Stage),
            *(f"last_op_{op.name.lower()}" for op in Op),
            "last_action_valid",
        ]
        slot = [
            *(f"stage_{stage.name.lower()}" for stage in Stage),
            "alpha",
            "alpha_target",
            "mode_hold",
            "mode_up",
            "mode_down",
            "is_pruning",
            "ramp_progress",
            "age",
            "stage_steps",
            "cooldown",
            "contribution",
            "contribution_valid",
            "contribution_freshness",
            "contribution_velocity",
            "interaction",
            "interaction_valid",
            "gradient_norm",
            "gradient_vanishing",
            "gradient_exploding",
            "gradient_health",
            "gradient_valid",
            *(f"blueprint_{name}" for name in blueprints),
            *(f"style_{style.name.lower()}" for style in STYLES),
            "seed_growth",
        ]
        slots = (f"slot_{s}.{name}" for s in range(num_slots) for name in slot)
        self.names = (*episode, *slots)

    def build(
        self,
        progress: Progress,
        state: LifecycleState,
        measured: Measurements,
        seed_parameters: IntArray,
        committed_parameters: IntArray,
    ) -> npt.NDArray[np.float32]:
        """Compute the observation of all members.

        Args:
            progress: Course of the episodes.
            state: The slots.
            measured: What the last step measured.
            seed_parameters: Parameters of the live seed in each slot. (num_envs, num_slots).
            committed_parameters: Parameters of the fossilized seeds. (num_envs,).

        Returns:
            (num_envs, len(names)) float32 within [-1, 1].
        """
        episode = self._episode(progress, state, seed_parameters, committed_parameters)
        slots = self._slots(state, measured, seed_parameters)
        flat = np.concatenate([episode, slots.reshape(len(slots), -1)], axis=1)
        clipped: npt.NDArray[np.float32] = np.clip(flat, -1.0, 1.0).astype(np.float32)
        return clipped

    def _episode(
        self,
        progress: Progress,
        state: LifecycleState,
        seed_parameters: IntArray,
        committed_parameters: IntArray,
    ) -> FloatArray:
        config = self.config
        grown = seed_parameters.sum(axis=1)
        doublings = np.log2(1 + grown / self.host_parameters)
        limit = config.parameter_budget * self.host_parameters
        columns = [
            1 - progress.steps / config.episode_steps,
            progress.accuracy,
            progress.committed_accuracy,
            progress.best_accuracy,
            progress.loss / self.initial_loss,
            progress.train_loss / self.initial_loss,
            progress.plateau_steps / STEPS_SCALE,
            doublings / DOUBLINGS_SCALE,
            np.log2(1 + committed_parameters / self.host_parameters) / DOUBLINGS_SCALE,
            CHANGE_SCALE * config.rent_weight * doublings,
            1 - grown / limit,
        ]
        stages = np.arange(len(Stage))
        counts = (state.stage[:, :, None] == stages).sum(axis=1) / self.num_slots
        last_op = progress.last_op[:, None] == np.arange(len(Op))
        return np.concatenate(
            [
                np.stack(columns, axis=1),
                CHANGE_SCALE * progress.accuracy_history,
                CHANGE_SCALE * progress.loss_history / self.initial_loss,
                counts,
                last_op,
                progress.last_valid[:, None],
            ],
            axis=1,
        )

    def _slots(
        self, state: LifecycleState, measured: Measurements, seed_parameters: IntArray
    ) -> FloatArray:
        """Return (num_envs, num_slots, features per slot)."""
        growth = np.log2(1 + seed_parameters / self.host_parameters) / DOUBLINGS_SCALE
        # symlog of a norm, so that 1e-6 and 1e3 stay apart: log10 from -6..3 to -1..1
        norm = (np.log10(np.maximum(measured.gradient_norm, 1e-7)) + 1.5) / 4.5
        columns = [
            state.alpha,
            state.alpha_target,
            state.mode == HOLD,
            state.mode == UP,
            state.mode == DOWN,
            state.is_pruning,
            state.ramp_step / np.maximum(state.ramp_length, 1),
            state.age / STEPS_SCALE,
            state.stage_steps / STEPS_SCALE,
            state.cooldown / self.config.embargo_steps,
            CHANGE_SCALE * measured.contribution,
            measured.has_contribution,
            measured.has_contribution / (1 + measured.contribution_age),
            CHANGE_SCALE * measured.contribution_velocity,
            CHANGE_SCALE * measured.interaction,
            measured.has_interaction,
            norm * measured.has_gradient,
            measured.vanishing,
            measured.exploding,
            measured.health,
            measured.has_gradient,
        ]
        return np.concatenate(
            [
                state.stage[:, :, None] == np.arange(len(Stage)),
                np.stack(columns, axis=2),
                state.blueprint[:, :, None] == np.arange(self.num_blueprints),
                state.style[:, :, None] == np.arange(len(STYLES)),
                growth[:, :, None],
            ],
            axis=2,
        )
