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
TEMPO_SCALE = 8.0
"""Number of env steps that the length of the first ramp is divided by."""
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


@dataclass(frozen=True)
class Sizes:
    """Parameters of the networks."""

    host: IntArray
    """Of each host. (num_envs,)."""
    seeds: IntArray
    """Of the live seed in each slot, 0 where there is none. (num_envs, num_slots)."""
    committed: IntArray
    """Of the fossilized seeds. (num_envs,)."""
    budgeted: IntArray
    """What the live seeds take from the budget: each with a gate. (num_envs,)."""


@dataclass(frozen=True)
class Conditions:
    """What a practitioner would know of the training at hand. Arrays are (num_envs,)."""

    learning_rate: FloatArray
    """Of the host at the start of the episode."""
    train_fraction: FloatArray
    """Share of the training split that is trained on, 0 to 1."""
    width: FloatArray
    """Multiple of the features of the task's host."""


def episode_features() -> dict[str, str]:
    """Return the features of the episode block in order, and what each means."""
    past = range(1, HISTORY + 1)
    return {
        "budget_left": "share of the episode's env steps that are left",
        "accuracy": "validation accuracy of the live network",
        "committed_accuracy": "validation accuracy with only the fossilized seeds",
        "best_accuracy": "best validation accuracy of the live network in this episode",
        "loss": "validation loss / (2 ln classes)",
        "train_loss": "mean training loss of the last env step / (2 ln classes)",
        "plateau_steps": f"env steps since the best accuracy rose by {PLATEAU_MARGIN}, "
        f"/ {STEPS_SCALE:.0f}",
        "growth": f"log2(1 + live seed / host parameters) / {DOUBLINGS_SCALE:.0f}",
        "committed_growth": "the same of the fossilized seeds",
        "rent": f"what the live seeds cost the score, x {CHANGE_SCALE:.0f}",
        "parameter_budget_left": "1 - live seed parameters, with a gate for each, / "
        "(parameter_budget x host parameters)",
        **{
            f"accuracy_change_{i}": "change of accuracy over the env step that ended "
            f"{i - 1} steps ago, x {CHANGE_SCALE:.0f}"
            for i in past
        },
        **{
            f"loss_change_{i}": f"the same of the loss / ln classes, x {CHANGE_SCALE:.0f}"
            for i in past
        },
        **{f"slots_{s.name.lower()}": f"share of slots that are {s.name}" for s in Stage},
        **{f"last_op_{op.name.lower()}": f"1 if the last op was {op.name}" for op in Op},
        "last_action_valid": "1 if the last action was legal",
        "instance_learning_rate": "log10 of the host's first learning rate, + 1.5",
        "instance_train_fraction": "1 + log10 of the share of the training split in use",
        "instance_width": "log2 of the multiple of the host's features",
    }


def slot_features(blueprints: Sequence[str]) -> dict[str, str]:
    """Return the features of one slot in order, and what each means."""
    return {
        **{f"stage_{s.name.lower()}": f"1 if the slot is {s.name}" for s in Stage},
        "alpha": "blend weight",
        "alpha_target": "where the present or last ramp ends, or the first one will",
        "tempo": f"env steps of the first ramp / {TEMPO_SCALE:.0f}",
        "mode_hold": "1 if alpha keeps still",
        "mode_up": "1 if alpha rises",
        "mode_down": "1 if alpha falls",
        "is_pruning": "1 if the seed is removed when the ramp ends",
        "ramp_progress": "share of the ramp that is done",
        "age": f"env steps since germination / {STEPS_SCALE:.0f}",
        "stage_steps": f"env steps in the stage / {STEPS_SCALE:.0f}",
        "cooldown": "share of the embargo that is left",
        "contribution": "accuracy minus accuracy without the seed (or its Shapley value), "
        f"x {CHANGE_SCALE:.0f}",
        "contribution_valid": "1 if it has been measured",
        "contribution_freshness": "1 / (1 + env steps since then)",
        "contribution_velocity": f"change since the measurement before, x {CHANGE_SCALE:.0f}",
        "would_be": "effect on accuracy of a seed of alpha 0 if its alpha were 1, "
        f"x {CHANGE_SCALE:.0f}",
        "would_be_valid": "1 if it was measured in the last step",
        "interaction": "of the only two weighted trial seeds: acc(live) - acc(without one) - "
        f"acc(without the other) + acc(without both), x {CHANGE_SCALE:.0f}",
        "interaction_valid": "1 if it was measured in the last step",
        "gradient_norm": "(log10 of the seed's gradient norm + 1.5) / 4.5",
        "gradient_vanishing": "mean severity over its tensors",
        "gradient_exploding": "largest severity over its tensors",
        "gradient_health": "(1 - vanishing) (1 - exploding)",
        "gradient_valid": "1 if a gradient reached the seed in the last step",
        **{f"blueprint_{name}": f"1 if the seed is of blueprint {name}" for name in blueprints},
        **{f"style_{s.name.lower()}": f"1 if its style is {s.name}" for s in STYLES},
        "seed_growth": f"log2(1 + seed / host parameters) / {DOUBLINGS_SCALE:.0f}",
    }


class ObservationBuilder:
    """Names and computes the features.

    Args:
        num_slots: Slots of the host.
        blueprints: Names of the registry.
        num_classes: Classes of the task; ln(num_classes) scales losses.
        config: Episode length, prices and budget.
    """

    def __init__(
        self, num_slots: int, blueprints: Sequence[str], num_classes: int, config: EnvConfig
    ) -> None:
        self.num_slots = num_slots
        self.num_blueprints = len(blueprints)
        self.initial_loss = float(np.log(num_classes))
        self.config = config
        slot = slot_features(blueprints)
        slots = (f"slot_{s}.{name}" for s in range(num_slots) for name in slot)
        self.names = (*episode_features(), *slots)

    def build(
        self,
        progress: Progress,
        state: LifecycleState,
        measured: Measurements,
        sizes: Sizes,
        conditions: Conditions,
    ) -> npt.NDArray[np.float32]:
        """Compute the observation of all members.

        Args:
            progress: Course of the episodes.
            state: The slots.
            measured: What the last step measured.
            sizes: Parameters of the networks.
            conditions: Of the training.

        Returns:
            (num_envs, len(names)) float32 within [-1, 1].
        """
        episode = self._episode(progress, state, sizes, conditions)
        slots = self._slots(state, measured, sizes)
        flat = np.concatenate([episode, slots.reshape(len(slots), -1)], axis=1)
        clipped: npt.NDArray[np.float32] = np.clip(flat, -1.0, 1.0).astype(np.float32)
        return clipped

    def _episode(
        self,
        progress: Progress,
        state: LifecycleState,
        sizes: Sizes,
        conditions: Conditions,
    ) -> FloatArray:
        config = self.config
        grown = sizes.seeds.sum(axis=1)
        doublings = np.log2(1 + grown / sizes.host)
        limit = config.parameter_budget * sizes.host
        columns = [
            1 - progress.steps / config.episode_steps,
            progress.accuracy,
            progress.committed_accuracy,
            progress.best_accuracy,
            progress.loss / (2 * self.initial_loss),
            progress.train_loss / (2 * self.initial_loss),
            progress.plateau_steps / STEPS_SCALE,
            doublings / DOUBLINGS_SCALE,
            np.log2(1 + sizes.committed / sizes.host) / DOUBLINGS_SCALE,
            CHANGE_SCALE * config.rent_weight * doublings,
            1 - sizes.budgeted / limit,
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
                np.log10(conditions.learning_rate)[:, None] + 1.5,
                np.log10(conditions.train_fraction)[:, None] + 1,
                np.log2(conditions.width)[:, None],
            ],
            axis=1,
        )

    def _slots(self, state: LifecycleState, measured: Measurements, sizes: Sizes) -> FloatArray:
        """Return (num_envs, num_slots, features per slot)."""
        growth = np.log2(1 + sizes.seeds / sizes.host[:, None]) / DOUBLINGS_SCALE
        # symlog of a norm, so that 1e-6 and 1e3 stay apart: log10 from -6..3 to -1..1
        norm = (np.log10(np.maximum(measured.gradient_norm, 1e-7)) + 1.5) / 4.5
        columns = [
            state.alpha,
            np.where(state.stage < Stage.BLENDING, state.first_target, state.alpha_target),
            state.tempo / TEMPO_SCALE,
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
            CHANGE_SCALE * measured.would_be,
            measured.has_would_be,
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
