"""Observation: a flat vector of features with fixed scales, each clipped to [-1, 1].

A missing value is 0, and its validity bit is 0. Accuracy, growth and rent are observed;
rollbacks are only in info.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from esper_env.config import STYLES, EnvConfig, Float32Array, Op, Stage
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
"""Factor of changes of accuracy; it scales a change of 0.1 to 1."""
TEMPO_SCALE = 8.0
"""Divisor of the length of the first ramp [env steps]."""
STEPS_SCALE = 20.0
"""Divisor of ages and counters [env steps]."""
DOUBLINGS_SCALE = 4.0
"""Divisor of growth [doublings of the parameters]."""
BUDGET_FEATURE = "instance_compute"
"""Feature of the episode block that only environments with `clock="flops"` have."""
_NUM_STAGES, _NUM_OPS, _NUM_STYLES = len(Stage), len(Op), len(STYLES)


def episode_features() -> dict[str, str]:
    """Return the features of the episode block in order, each with its description."""
    past = range(1, HISTORY + 1)
    return {
        "budget_left": "share of the episode's env steps that remains",
        "accuracy": "validation accuracy of the live network",
        "committed_accuracy": "validation accuracy of the committed network",
        "best_accuracy": "best validation accuracy of the live network in this episode",
        "loss": "validation loss of the live network / (2 ln(classes))",
        "train_loss": "mean training loss of the last env step / (2 ln(classes))",
        "plateau_steps": "env steps since the best accuracy rose by more than "
        f"{PLATEAU_MARGIN}, / {STEPS_SCALE:.0f}",
        "growth": "log2(1 + parameters of all seeds / parameters of the host) / "
        f"{DOUBLINGS_SCALE:.0f}",
        "committed_growth": "log2(1 + parameters of the fossilized seeds / parameters of the host) "
        f"/ {DOUBLINGS_SCALE:.0f}",
        "rent": "accuracy minus score of the live network: the price of the seeds it pays for, "
        f"x {CHANGE_SCALE:.0f}",
        "parameter_budget_left": "share of the parameter budget that remains; each seed is counted "
        "with a gate",
        **{
            f"accuracy_change_{i}": f"change of the accuracy in one env step, x {CHANGE_SCALE:.0f} "
            f"({i} of {HISTORY}, latest first)"
            for i in past
        },
        **{
            f"loss_change_{i}": "change of the validation loss in one env step / ln(classes), "
            f"x {CHANGE_SCALE:.0f} ({i} of {HISTORY}, latest first)"
            for i in past
        },
        **{f"slots_{s.name.lower()}": f"share of the slots in stage {s.name}" for s in Stage},
        **{f"last_op_{op.name.lower()}": f"1 if the last op was {op.name}" for op in Op},
        "last_action_valid": "1 if the last action was legal",
        "instance_learning_rate": "log10(initial learning rate of the host) + 1.5",
        "instance_train_fraction": "log10(share of the training split in use) + 1",
        "instance_width": "log2(width of the host / width of the task's host)",
        BUDGET_FEATURE: "log2(compute budget / (`episode_steps` x `batches_per_step` batches "
        f'of the host without seeds)) / {DOUBLINGS_SCALE:.0f}; only with `clock="flops"`',
    }


def slot_features(blueprints: Sequence[str]) -> dict[str, str]:
    """Return the features of one slot in order, each with its description."""
    return {
        **{f"stage_{s.name.lower()}": f"1 if the slot is in stage {s.name}" for s in Stage},
        "alpha": "blend weight",
        "alpha_target": "alpha at the end of the latest ramp; before BLENDING at the end of the "
        "first ramp",
        "tempo": f"length of the first ramp [env steps] / {TEMPO_SCALE:.0f}",
        "mode_hold": "1 if no ramp is running",
        "mode_up": "1 if a ramp raises alpha",
        "mode_down": "1 if a ramp lowers alpha",
        "is_pruning": "1 if the seed is removed at the end of the ramp",
        "ramp_progress": "share of the latest ramp that has passed",
        "age": f"env steps since germination / {STEPS_SCALE:.0f}",
        "stage_steps": f"env steps in the current stage / {STEPS_SCALE:.0f}",
        "cooldown": "share of the embargo that remains",
        "contribution": "last measured contribution: accuracy minus accuracy without the seed, or "
        f"Shapley value, x {CHANGE_SCALE:.0f}",
        "contribution_valid": "1 if the contribution has been measured",
        "contribution_freshness": "1 / (1 + env steps since the contribution was measured)",
        "contribution_velocity": "change of the contribution since the previous measurement, "
        f"x {CHANGE_SCALE:.0f}",
        "would_be": "counterfactual effect on the accuracy of setting a zero-alpha seed to alpha "
        f"1, x {CHANGE_SCALE:.0f}",
        "would_be_valid": "1 if `would_be` was measured in the last env step",
        "interaction": "interaction of two blended seeds that are not fossilized, if there are "
        "exactly two: accuracy - accuracy without one - accuracy without the other + accuracy "
        f"without both, x {CHANGE_SCALE:.0f}",
        "interaction_valid": "1 if `interaction` was measured in the last env step",
        "gradient_norm": "(log10(gradient norm of the seed) + 1.5) / 4.5",
        "gradient_vanishing": "mean severity over the tensors of the seed; 0 where the gradient "
        "norm is at least `vanishing_gradient_norm`",
        "gradient_exploding": "largest severity over the tensors of the seed; 0 where the gradient "
        "norm is at most `exploding_gradient_norm`",
        "gradient_health": "(1 - gradient_vanishing) x (1 - gradient_exploding)",
        "gradient_valid": "1 if a gradient reached the seed in the last env step",
        **{f"blueprint_{name}": f"1 if the blueprint of the seed is {name}" for name in blueprints},
        **{f"style_{s.name.lower()}": f"1 if the style of the seed is {s.name}" for s in STYLES},
        "seed_growth": "log2(1 + parameters of the seed / parameters of the host) / "
        f"{DOUBLINGS_SCALE:.0f}",
    }


class ObservationBuilder:
    """Builder of the observations; `names` lists the features in order.

    Args:
        num_slots: Number of slots of the host.
        blueprints: Names of the registered blueprints.
        num_classes: Number of classes of the task; ln(num_classes) scales the losses.
        config: Source of episode length, rent weight, parameter budget and embargo length.
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
            config.clock == "flops",
        )
        slot = slot_features(blueprints)
        slots = (f"slot_{s}.{name}" for s in range(num_slots) for name in slot)
        has_budget = config.clock == "flops"
        episode = (name for name in episode_features() if has_budget or name != BUDGET_FEATURE)
        names = (*episode, *slots)
        keeps_all = config.observation == "full"
        self._kept = [i for i, name in enumerate(names) if keeps_all or not _compares(name)]
        self._num_features = len(names)
        self.names = tuple(names[i] for i in self._kept)

    def build(self, state: State, sizes: Sizes, conditions: Conditions) -> Float32Array:
        """Compute the observations of all sub-environments.

        Args:
            state: State of the decision process.
            sizes: Numbers of parameters of the networks.
            conditions: Training conditions of the episodes.

        Returns:
            Features within [-1, 1]. (num_envs, len(names)) float32.
        """
        observation = np.empty((len(sizes.host), self._num_features), dtype=np.float32)
        slots, measured, progress, *_ = state
        _observe(observation, progress, slots, measured, sizes, conditions, self._scales)
        if len(self._kept) < self._num_features:
            return np.ascontiguousarray(observation[:, self._kept])
        return observation


def _compares(name: str) -> bool:
    """Return whether a feature compares accuracies, so that `observation="minimal"` leaves it out.

    The others are of other env steps, or of networks that were not in service.
    """
    what = name.split(".")[-1]
    is_difference = "_change_" in what or what.startswith(
        ("contribution", "would_be", "interaction")
    )
    return is_difference or what in ("best_accuracy", "plateau_steps")


class _Scales(NamedTuple):
    """Numbers that the features need besides the state."""

    episode_steps: int
    initial_loss: float
    rent_weight: float
    parameter_budget: float
    embargo_steps: int
    num_blueprints: int
    has_budget: bool


@entry_point
def _observe(
    observation: Float32Array,
    progress: Progress,
    state: SlotState,
    measured: Measurements,
    sizes: Sizes,
    conditions: Conditions,
    scales: _Scales,
) -> None:
    """Write all features in the order of `episode_features` and `slot_features`.

    `at` is the index of the next feature. The helpers write features and return the new index.
    """
    num_slots = state.stage.shape[1]
    for i in range(len(observation)):
        row, host = observation[i], sizes.host[i]
        doublings = np.log2(1 + sizes.grown[i] / host)
        charged = np.log2(1 + sizes.charged[i] / host)
        episode = (
            1 - progress.steps[i] / scales.episode_steps,
            progress.accuracy[i],
            progress.committed_accuracy[i],
            progress.best_accuracy[i],
            progress.loss[i] / (2 * scales.initial_loss),
            progress.train_loss[i] / (2 * scales.initial_loss),
            progress.plateau_steps[i] / STEPS_SCALE,
            doublings / DOUBLINGS_SCALE,
            np.log2(1 + sizes.committed[i] / host) / DOUBLINGS_SCALE,
            CHANGE_SCALE * scales.rent_weight * charged,
            1 - sizes.budgeted[i] / (scales.parameter_budget * host),
        )
        at = _put(row, 0, episode)
        for past in range(HISTORY):
            at = _put(row, at, (CHANGE_SCALE * progress.accuracy_history[i, past],))
        for past in range(HISTORY):
            change = CHANGE_SCALE * progress.loss_history[i, past] / scales.initial_loss
            at = _put(row, at, (change,))
        # Share of the slots in each stage.
        for stage in range(_NUM_STAGES):
            count = 0
            for s in range(num_slots):
                count += state.stage[i, s] == stage
            at = _put(row, at, (count / num_slots,))
        at = _put_one_hot(row, at, _NUM_OPS, progress.last_op[i])
        training = (
            _bit(progress.last_valid[i]),
            np.log10(conditions.learning_rate[i]) + 1.5,
            np.log10(conditions.train_fraction[i]) + 1,
            np.log2(conditions.width[i]),
        )
        at = _put(row, at, training)
        if scales.has_budget:
            at = _put(row, at, (np.log2(conditions.compute[i]) / DOUBLINGS_SCALE,))
        for s in range(num_slots):
            stage, mode = state.stage[i, s], state.mode[i, s]
            # Before BLENDING no ramp has started, so `alpha_target` is not set yet.
            target = state.first_target if stage < Stage.BLENDING else state.alpha_target
            has_contribution = _bit(measured.has_contribution[i, s])
            has_gradient = _bit(measured.has_gradient[i, s])
            # Norms differ by orders of magnitude, so log10 from [-6, 3] is scaled to [-1, 1].
            norm = (np.log10(max(measured.gradient_norm[i, s], 1e-7)) + 1.5) / 4.5
            slot = (
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
            )
            at = _put_one_hot(row, at, _NUM_STAGES, stage)
            at = _put(row, at, slot)
            at = _put_one_hot(row, at, scales.num_blueprints, state.blueprint[i, s])
            at = _put_one_hot(row, at, _NUM_STYLES, state.style[i, s])
            growth = np.log2(1 + sizes.seeds[i, s] / host) / DOUBLINGS_SCALE
            at = _put(row, at, (growth,))


@inlined
def _bit(is_set: bool) -> float:
    """Return 1.0 for True and 0.0 for False."""
    return 1.0 if is_set else 0.0


@inlined
def _put(row: Float32Array, at: int, features: tuple[float, ...]) -> int:
    """Write features, clipped to [-1, 1], and return the index of the next one."""
    for feature in features:
        row[at] = min(max(feature, -1.0), 1.0)
        at += 1
    return at


@inlined
def _put_one_hot(row: Float32Array, at: int, size: int, index: int) -> int:
    """Write `size` features, 1 at `index` and 0 elsewhere, and return the index of the next one.

    All of them are 0 if `index` is -1.
    """
    for option in range(size):
        row[at + option] = option == index
    return at + size
