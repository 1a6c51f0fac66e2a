"""State of the decision process: named tuples of arrays with one row per sub-environment.

Compiled functions read the fields; methods and properties are for Python callers. Arrays are
changed in place and never replaced, so a view of the state stays valid. Values computed from the
state (`Networks`, `Scores`) are not part of it; see `simulation`.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar, cast, get_args, get_type_hints

import numpy as np
import numpy.typing as npt

from esper_env.config import BoolArray, EnvConfig, FloatArray, IntArray
from esper_env.rng import KeyArray

HISTORY = 3
"""Number of past env steps whose changes of accuracy and loss are observed."""
HOLD, UP, DOWN = 0, 1, 2
"""Modes of a slot's alpha: no ramp is running, a ramp rises, a ramp falls."""

Record = TypeVar("Record")


class SlotState(NamedTuple):
    """Lifecycle state of the slots. All arrays have shape (num_envs, num_slots)."""

    stage: IntArray
    """Values of `Stage`."""
    age: IntArray
    """Time since germination [env steps]."""
    stage_steps: IntArray
    """Time in the current stage [env steps]."""
    blueprint: IntArray
    """Index of the registered blueprint, -1 in a slot without a seed."""
    style: IntArray
    """Index into `STYLES`, -1 in a slot without a seed."""
    tempo: IntArray
    """Length of the first ramp, chosen at germination [env steps]."""
    first_target: FloatArray
    """Alpha at the end of the first ramp, chosen at germination."""
    alpha: FloatArray
    """Current blend weight, 0 to 1."""
    alpha_start: FloatArray
    """Alpha at the start of the current ramp."""
    alpha_target: FloatArray
    """Alpha at the end of the current ramp."""
    mode: IntArray
    """Mode of alpha: HOLD, UP or DOWN."""
    ramp_step: IntArray
    """Env steps of the current or last ramp that have passed."""
    ramp_length: IntArray
    """Length of the current or last ramp [env steps]."""
    curve: IntArray
    """Curve of the current or next ramp, values of `Curve`."""
    is_pruning: BoolArray
    """Whether the seed is removed at the end of its ramp."""
    cooldown: IntArray
    """Env steps until an embargoed slot opens."""

    @classmethod
    def empty(cls, num_envs: int, num_slots: int) -> SlotState:
        """Return slots without seeds."""
        return blank(cls, num_envs, (num_slots,), blueprint=-1, style=-1)

    def clear(self, where: BoolArray | tuple[IntArray, ...]) -> None:
        """Remove the seeds of slots and reset all fields.

        Args:
            where: Mask, (num_envs, num_slots) bool, or the indices of sub-environments and slots.
        """
        for array in self:
            array[where] = 0
        self.blueprint[where] = self.style[where] = -1


class Measurements(NamedTuple):
    """Measurements of the seeds. All arrays have shape (num_envs, num_slots).

    The gates and the observation read them.
    """

    has_gradient: BoolArray
    """Whether a gradient reached the seed in the last env step."""
    gradient_norm: FloatArray
    """L2 norm of the gradient of all tensors of the seed, root mean square over the batches."""
    vanishing: FloatArray
    """Mean vanishing severity over the tensors of the seed, 0 to 1."""
    exploding: FloatArray
    """Largest exploding severity over the tensors of the seed, 0 to 1."""
    health: FloatArray
    """Gradient health, 0 to 1; 0 where `has_gradient` is False."""
    cause: IntArray
    """Cause of a low gradient, values of `GradientCause`."""
    has_contribution: BoolArray
    """Whether the contribution of the seed has been measured."""
    contribution: FloatArray
    """Last measured contribution: acc(live) - acc(live without this seed), or Shapley value."""
    contribution_velocity: FloatArray
    """Contribution minus the previously measured one; 0 if not measured in the last env step."""
    contribution_age: IntArray
    """Time since the last measurement of the contribution [env steps]."""
    has_would_be: BoolArray
    """Whether `would_be` was measured in the last env step; only at alpha 0."""
    would_be: FloatArray
    """Counterfactual effect of a seed at alpha 0: acc(live with it at alpha 1) - acc(live)."""
    interaction: FloatArray
    """Interaction of two trial seeds with alpha > 0, if there are no others:
    acc(live) - acc(live without one) - acc(live without the other) + acc(live without both)."""
    has_interaction: BoolArray
    """Whether the interaction was measured in the last env step."""

    @classmethod
    def empty(cls, num_envs: int, num_slots: int) -> Measurements:
        """Return the measurements of slots without seeds."""
        return blank(cls, num_envs, (num_slots,))

    def clear(self, where: BoolArray | tuple[IntArray, ...]) -> None:
        """Reset the measurements of slots; `where` is as in `SlotState.clear`."""
        for array in self:
            array[where] = 0


class Progress(NamedTuple):
    """Progress of the episodes. Arrays have shape (num_envs,) unless stated."""

    steps: IntArray
    """Completed env steps."""
    accuracy: FloatArray
    """Validation accuracy of the live network, 0 to 1."""
    loss: FloatArray
    """Validation loss of the live network [nats]."""
    committed_accuracy: FloatArray
    """Validation accuracy with only the fossilized seeds, 0 to 1."""
    accuracy_history: FloatArray
    """Changes of `accuracy` in the last env steps, latest first. (num_envs, HISTORY)."""
    loss_history: FloatArray
    """Changes of `loss` in the last env steps, latest first. (num_envs, HISTORY) [nats]."""
    best_accuracy: FloatArray
    """Best validation accuracy of the live network so far, 0 to 1."""
    plateau_steps: IntArray
    """Time since the best accuracy rose by more than `PLATEAU_MARGIN` [env steps]."""
    earned: FloatArray
    """Sum over the env steps of the score divided by `episode_steps`; only with
    `objective="anytime"`, else 0."""
    train_loss: FloatArray
    """Mean training loss of the last env step with a batch [nats]."""
    unspent: FloatArray
    """Compute that is left over for the next env step, less than a batch needs; only with
    `clock="flops"`, else 0 [multiply-adds per image of a batch]."""
    last_op: IntArray
    """Op of the last action, values of `Op`."""
    last_valid: BoolArray
    """Whether the last action was legal."""
    young_prunes: IntArray
    """Prunes of seeds younger than `flag_age` in this episode."""
    samples: FloatArray
    """Training images of the episode so far, repeated ones included."""
    flops: FloatArray
    """Floating-point operations of training in the episode so far. The forward pass counts 2 per
    multiply-add, the backward pass twice as many."""

    @classmethod
    def empty(cls, num_envs: int) -> Progress:
        """Return the progress before the first episode."""
        histories = {"accuracy_history": (HISTORY,), "loss_history": (HISTORY,)}
        return blank(cls, num_envs, shapes=histories, last_valid=True)

    def begin(self, rows: IntArray, initial_loss: float) -> None:
        """Reset sub-environments that start an episode.

        Args:
            rows: Indices of the sub-environments. (m,) int64.
            initial_loss: Value of `train_loss` before the first env step [nats].
        """
        for array in self:
            array[rows] = 0
        self.last_valid[rows] = True
        self.train_loss[rows] = initial_loss


class RollbackState(NamedTuple):
    """State of the rollback rule. Arrays have shape (num_envs,) unless stated.

    An env step is *healthy* if the loss and all weights are finite and the loss has neither
    collapsed nor diverged.
    """

    losses: FloatArray
    """Training losses of the last healthy env steps, latest first. (num_envs, panic_window)
    [nats]."""
    num_losses: IntArray
    """Healthy env steps since the episode started or was rolled back."""
    streak: IntArray
    """Consecutive collapsed or diverged env steps."""
    rollbacks: IntArray
    """Rollbacks in this episode."""
    since_snapshot: IntArray
    """Healthy env steps since the last snapshot."""

    @classmethod
    def empty(cls, num_envs: int, config: EnvConfig) -> RollbackState:
        """Return the state before the first episode."""
        return blank(cls, num_envs, shapes={"losses": (config.panic_window,)})

    def begin(self, rows: IntArray) -> None:
        """Reset sub-environments that start an episode; `rows` is (m,) int64."""
        for array in self:
            array[rows] = 0


class EpisodeState(NamedTuple):
    """Random streams, instances and results of the episodes. All arrays have shape (num_envs,)."""

    stream_key: KeyArray
    """Key of each sub-environment's random stream, derived from its reset seed."""
    key: KeyArray
    """Key of the current episode's random stream."""
    num_episodes: IntArray
    """Episodes started since the stream was seeded."""
    instance: IntArray
    """Index of the instance in the configured set."""
    is_rolled_back: BoolArray
    """Whether the last env step included a rollback."""
    has_test: BoolArray
    """Whether the last env step ended the episode, so the test accuracies are valid."""
    test_accuracy: FloatArray
    """Test accuracy of the live network at the end of the episode, 0 to 1."""
    committed_test_accuracy: FloatArray
    """Test accuracy with only the fossilized seeds at the end of the episode, 0 to 1."""


class State(NamedTuple):
    """State of the decision process; the population holds the weights of the networks."""

    slots: SlotState
    measured: Measurements
    progress: Progress
    rollback: RollbackState
    episode: EpisodeState

    @classmethod
    def empty(cls, num_envs: int, num_slots: int, config: EnvConfig) -> State:
        """Return the state before the first episode."""
        return cls(
            SlotState.empty(num_envs, num_slots),
            Measurements.empty(num_envs, num_slots),
            Progress.empty(num_envs),
            RollbackState.empty(num_envs, config),
            blank(EpisodeState, num_envs),
        )

    def arrays(self) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """Yield every array, not copied, after its unique name, e.g. "slots.stage"."""
        for part, arrays in self._asdict().items():
            for name, array in arrays._asdict().items():
                yield f"{part}.{name}", array


class Request(NamedTuple):
    """Decoded actions. All arrays have shape (num_envs,); an op leaves some of them unused."""

    op: IntArray
    """Values of `Op`."""
    slot: IntArray
    """Index of the slot."""
    blueprint: IntArray
    """Index of the registered blueprint."""
    style: IntArray
    """Index into `STYLES`."""
    tempo: IntArray
    """Length of the first ramp [env steps]."""
    target: FloatArray
    """Alpha at the end of the first or of a later ramp."""
    speed: IntArray
    """Length of a later ramp [env steps]."""
    curve: IntArray
    """Curve of a later ramp, values of `Curve`."""


class Sizes(NamedTuple):
    """Numbers of parameters of the networks."""

    host: IntArray
    """Parameters of the host. (num_envs,)."""
    seeds: IntArray
    """Parameters of the seed in each slot, 0 in a slot without a seed. (num_envs, num_slots)."""
    grown: IntArray
    """Parameters of all seeds. (num_envs,)."""
    charged: IntArray
    """Parameters of the seeds that the score charges for: all but parked ones, or with
    `objective="anytime"` those at alpha > 0. (num_envs,)."""
    committed: IntArray
    """Parameters of the fossilized seeds that are not parked. (num_envs,)."""
    budgeted: IntArray
    """Parameters that the seeds use of the budget, each counted with a gate. (num_envs,)."""


class Conditions(NamedTuple):
    """Training conditions that the agent observes. Arrays have shape (num_envs,).

    A practitioner would know them. The share of wrong labels is not among them.
    """

    learning_rate: FloatArray
    """Learning rate of the host at the start of the episode."""
    train_fraction: FloatArray
    """Share of the training split in use, 0 to 1."""
    width: FloatArray
    """Width of the host [multiples of the width of the task's host]."""
    compute: FloatArray
    """Compute budget with `clock="flops"` [multiples of `episode_steps` x `batches_per_step`
    batches of the host without seeds]."""


class Scores(NamedTuple):
    """Quantities of a state that enter the reward. All arrays have shape (num_envs,)."""

    score: FloatArray
    """Score of the live network, which has all seeds [accuracy]."""
    committed_score: FloatArray
    """Objective if the episode ended now [accuracy]: score of the committed network, which has only
    the fossilized seeds; with `objective="anytime"` what the episode has earned."""
    earned: FloatArray
    """What the episode has earned so far [accuracy]: `score`, or `Progress.earned` with
    `objective="anytime"`. The reward term `gain` is its change."""
    potential: FloatArray
    """Potential of the lifecycle state for reward shaping."""


class Transition(NamedTuple):
    """Inputs of the reward of an env step. Flags have shape (num_envs,)."""

    before: Scores
    """Scores of the state before the env step."""
    after: Scores
    """Scores of the state after the env step, before any autoreset."""
    is_last: BoolArray
    """Whether the episode is done after this env step, terminated or truncated."""
    is_terminated: BoolArray
    """Whether the episode is terminated, so the state after it has no value."""
    is_rolled_back: BoolArray
    """Whether the env step included a rollback."""


def blank(
    kind: type[Record],
    num_envs: int,
    shape: tuple[int, ...] = (),
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    **values: Any,
) -> Record:
    """Return a named tuple of new arrays.

    Args:
        kind: Named tuple whose fields are annotated with array types.
        num_envs: Number of rows of every array.
        shape: Shape of a row.
        shapes: Shapes of a row that differ from `shape`, by field.
        **values: Initial values that differ from 0, by field.

    Returns:
        Arrays (num_envs, *shape of a row) of the annotated dtypes.
    """
    rows = shapes or {}
    arrays: dict[str, Any] = {
        name: np.full((num_envs, *rows.get(name, shape)), values.get(name, 0), dtype=dtype)
        for name, dtype in _dtypes(cast(Hashable, kind)).items()
    }
    return kind(**arrays)


@functools.cache
def _dtypes(kind: Any) -> dict[str, type]:
    """Return the scalar type of each field, the innermost argument of its annotation."""
    # NDArray[T] is ndarray[Any, dtype[T]], and since NumPy 2.5 an alias with the argument T.
    types = {}
    for name, hint in get_type_hints(kind).items():
        while arguments := get_args(hint):
            hint = arguments[-1]
        types[name] = cast(type, hint)
    return types
