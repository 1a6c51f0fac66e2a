"""The observation: a flat vector of features with fixed scales, each within [-1, 1].

A missing value is 0 with a validity bit 0. What is charged is observed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from esper_env.config import (
    STYLES,
    EnvConfig,
    Op,
    Stage,
)
from esper_env.growth.contributions import PLATEAU_MARGIN
from esper_env.growth.state import (
    DOWN,
    HISTORY,
    HOLD,
    UP,
    Conditions,
    Measurements,
    Progress,
    Sizes,
    SlotState,
    State,
)
from esper_env.jit import entry_point, inlined

CHANGE_SCALE = 10.0
"""Factor on changes of accuracy, so that 0.1 becomes 1."""
TEMPO_SCALE = 8.0
"""Number of env steps that the length of the first ramp is divided by."""
STEPS_SCALE = 20.0
"""Number of env steps that ages and counters divide by."""
DOUBLINGS_SCALE = 4.0
"""Doublings of the parameters that growth divides by."""
_NUM_STAGES, _NUM_OPS, _NUM_STYLES = len(Stage), len(Op), len(STYLES)


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
        self._scales = _Scales(
            config.episode_steps,
            float(np.log(num_classes)),
            config.rent_weight,
            config.parameter_budget,
            config.embargo_steps,
            len(blueprints),
        )
        slot = slot_features(blueprints)
        slots = (f"slot_{s}.{name}" for s in range(num_slots) for name in slot)
        self.names = (*episode_features(), *slots)

    def build(
        self,
        state: State,
        sizes: Sizes,
        conditions: Conditions,
    ) -> npt.NDArray[np.float32]:
        """Compute the observations of all environments.

        Args:
            state: The state.
            sizes: Parameters of the networks.
            conditions: Training conditions.

        Returns:
            (num_envs, len(names)) float32 within [-1, 1].
        """
        observation = np.empty((len(sizes.host), len(self.names)), dtype=np.float32)
        _observe(
            observation,
            state.progress,
            state.slots,
            state.measured,
            sizes,
            conditions,
            self._scales,
        )
        return observation


class _Scales(NamedTuple):
    """What features are divided by, and how many of a kind there are."""

    episode_steps: int
    initial_loss: float
    rent_weight: float
    parameter_budget: float
    embargo_steps: int
    num_blueprints: int


@entry_point
def _observe(
    observation: npt.NDArray[np.float32],
    progress: Progress,
    state: SlotState,
    measured: Measurements,
    sizes: Sizes,
    conditions: Conditions,
    scales: _Scales,
) -> None:
    """Write all features in the order of `episode_features` and `slot_features`."""
    num_slots = state.stage.shape[1]
    for i in range(len(observation)):
        row, host = observation[i], sizes.host[i]
        doublings = np.log2(1 + sizes.grown[i] / host)
        at = _put(
            row,
            0,
            (
                1 - progress.steps[i] / scales.episode_steps,
                progress.accuracy[i],
                progress.committed_accuracy[i],
                progress.best_accuracy[i],
                progress.loss[i] / (2 * scales.initial_loss),
                progress.train_loss[i] / (2 * scales.initial_loss),
                progress.plateau_steps[i] / STEPS_SCALE,
                doublings / DOUBLINGS_SCALE,
                np.log2(1 + sizes.committed[i] / host) / DOUBLINGS_SCALE,
                CHANGE_SCALE * scales.rent_weight * doublings,
                1 - sizes.budgeted[i] / (scales.parameter_budget * host),
            ),
        )
        for past in range(HISTORY):
            at = _put(row, at, (CHANGE_SCALE * progress.accuracy_history[i, past],))
        for past in range(HISTORY):
            change = CHANGE_SCALE * progress.loss_history[i, past] / scales.initial_loss
            at = _put(row, at, (change,))
        for stage in range(_NUM_STAGES):
            count = 0
            for s in range(num_slots):
                count += state.stage[i, s] == stage
            at = _put(row, at, (count / num_slots,))
        at = _put_one_hot(row, at, _NUM_OPS, progress.last_op[i])
        at = _put(
            row,
            at,
            (
                _bit(progress.last_valid[i]),
                np.log10(conditions.learning_rate[i]) + 1.5,
                np.log10(conditions.train_fraction[i]) + 1,
                np.log2(conditions.width[i]),
            ),
        )
        for s in range(num_slots):
            stage, mode = state.stage[i, s], state.mode[i, s]
            target = state.first_target if stage < Stage.BLENDING else state.alpha_target
            has_contribution = _bit(measured.has_contribution[i, s])
            has_gradient = _bit(measured.has_gradient[i, s])
            # symlog of a norm, so that 1e-6 and 1e3 stay apart: log10 from -6..3 to -1..1
            norm = (np.log10(max(measured.gradient_norm[i, s], 1e-7)) + 1.5) / 4.5
            at = _put_one_hot(row, at, _NUM_STAGES, stage)
            at = _put(
                row,
                at,
                (
                    state.alpha[i, s],
                    target[i, s],
                    state.tempo[i, s] / TEMPO_SCALE,
                    _bit(mode == HOLD),
                    _bit(mode == UP),
                    _bit(mode == DOWN),
                    _bit(state.is_pruning[i, s]),
                    state.ramp_step[i, s] / max(state.ramp_length[i, s], 1),
                    state.age[i, s] / STEPS_SCALE,
                    state.stage_steps[i, s] / STEPS_SCALE,
                    state.cooldown[i, s] / scales.embargo_steps,
                    CHANGE_SCALE * measured.contribution[i, s],
                    has_contribution,
                    has_contribution / (1 + measured.contribution_age[i, s]),
                    CHANGE_SCALE * measured.contribution_velocity[i, s],
                    CHANGE_SCALE * measured.would_be[i, s],
                    _bit(measured.has_would_be[i, s]),
                    CHANGE_SCALE * measured.interaction[i, s],
                    _bit(measured.has_interaction[i, s]),
                    norm * has_gradient,
                    measured.vanishing[i, s],
                    measured.exploding[i, s],
                    measured.health[i, s],
                    has_gradient,
                ),
            )
            at = _put_one_hot(row, at, scales.num_blueprints, state.blueprint[i, s])
            at = _put_one_hot(row, at, _NUM_STYLES, state.style[i, s])
            growth = np.log2(1 + sizes.seeds[i, s] / host) / DOUBLINGS_SCALE
            at = _put(row, at, (growth,))


@inlined
def _bit(is_set: bool) -> float:
    return 1.0 if is_set else 0.0


@inlined
def _put(row: npt.NDArray[np.float32], at: int, features: tuple[float, ...]) -> int:
    """Write features, clipped, and return where the next one goes."""
    for feature in features:
        row[at] = min(max(feature, -1.0), 1.0)
        at += 1
    return at


@inlined
def _put_one_hot(row: npt.NDArray[np.float32], at: int, size: int, index: int) -> int:
    """Write which of `size` options holds, none if `index` is none of them."""
    for option in range(size):
        row[at + option] = option == index
    return at + size
