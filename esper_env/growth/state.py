"""State of the decision process: named tuples of arrays with one row per sub-environment.

Compiled functions read the fields; methods and properties are for Python callers. Arrays are
changed in place and never replaced, so a view of the state stays valid. What can be computed from
the state (`Networks`, `Scores`) is not part of it; see `simulation`.
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
"""Past env steps whose change of accuracy and loss is observed."""
HOLD, UP, DOWN = 0, 1, 2
"""Modes of the alpha controller."""

Record = TypeVar("Record")


class SlotState(NamedTuple):
    """Lifecycle of every slot. All arrays have shape (num_envs, num_slots)."""

    stage: IntArray
    """Values of `Stage`."""
    age: IntArray
    """Time since germination [env steps]."""
    stage_steps: IntArray
    """Time in the current stage [env steps]."""
    blueprint: IntArray
    """Index into the registry, -1 where there is no seed."""
    style: IntArray
    """Index into `STYLES`, -1 where there is no seed."""
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
    """HOLD, UP or DOWN."""
    ramp_step: IntArray
    """Completed ticks of the current ramp."""
    ramp_length: IntArray
    """Total ticks of the current ramp."""
    curve: IntArray
    """Values of `Curve`."""
    is_pruning: BoolArray
    """Whether the seed is removed at the end of its down-ramp."""
    cooldown: IntArray
    """Decisions left until an embargoed slot opens."""

    @classmethod
    def empty(cls, num_envs: int, num_slots: int) -> SlotState:
        """Return slots without seeds."""
        return blank(cls, num_envs, (num_slots,), blueprint=-1, style=-1)

    def clear(self, where: BoolArray | tuple[IntArray, ...]) -> None:
        """Empty slots: a (num_envs, num_slots) mask, or indices of environments and slots."""
        for array in self:
            array[where] = 0
        self.blueprint[where] = self.style[where] = -1


class Measurements(NamedTuple):
    """Measurements of each seed in the last env step. Arrays have shape (num_envs, num_slots).

    The gates and the observation read them.
    """

    has_gradient: BoolArray
    """Whether a gradient reached the seed in the last env step."""
    gradient_norm: FloatArray
    """L2 norm over all tensors of the seed, root mean square over the batches of the step."""
    vanishing: FloatArray
    """Mean vanishing severity over tensors, 0 to 1."""
    exploding: FloatArray
    """Largest exploding severity over tensors, 0 to 1."""
    health: FloatArray
    """Gradient health, 0 to 1; 0 where `has_gradient` is False."""
    has_contribution: BoolArray
    """Whether a contribution of this seed has been measured."""
    contribution: FloatArray
    """acc(live) - acc(live without this seed), last measured."""
    contribution_velocity: FloatArray
    """Change of the contribution between the last two consecutive measurements."""
    contribution_age: IntArray
    """Time since the contribution was measured [env steps]."""
    has_would_be: BoolArray
    """Whether `would_be` was measured in the last step: the seed has alpha 0."""
    would_be: FloatArray
    """acc(live with this seed at alpha 1) - acc(live), of a seed with alpha 0."""
    interaction: FloatArray
    """acc(live) - acc(without i) - acc(without j) + acc(without both)."""
    has_interaction: BoolArray
    """Whether the interaction was measured in the last step."""

    @classmethod
    def empty(cls, num_envs: int, num_slots: int) -> Measurements:
        """Return measurements of nothing."""
        return blank(cls, num_envs, (num_slots,))

    def clear(self, where: BoolArray | tuple[IntArray, ...]) -> None:
        """Forget the measurements of slots; see `SlotState.clear`."""
        for array in self:
            array[where] = 0


class Progress(NamedTuple):
    """Course of the episodes. Arrays have shape (num_envs,) unless stated."""

    steps: IntArray
    """Completed env steps."""
    accuracy: FloatArray
    """Validation accuracy of the live network, 0 to 1."""
    loss: FloatArray
    """Validation loss of the live network [nats]."""
    committed_accuracy: FloatArray
    """Validation accuracy with only the fossilized seeds, 0 to 1."""
    accuracy_history: FloatArray
    """Changes of accuracy in the last steps, latest first. (num_envs, HISTORY)."""
    loss_history: FloatArray
    """Changes of loss in the last steps, latest first. (num_envs, HISTORY) [nats]."""
    best_accuracy: FloatArray
    """Best validation accuracy of the live network so far, 0 to 1."""
    plateau_steps: IntArray
    """Time since the best accuracy rose by the margin [env steps]."""
    train_loss: FloatArray
    """Mean training loss of the last env step [nats]."""
    last_op: IntArray
    """Values of `Op`."""
    last_valid: BoolArray
    """Whether the last action was legal."""
    samples: FloatArray
    """Training images seen."""
    flops: FloatArray
    """Floating-point operations of training: 2 per multiply-add, backward twice the forward."""

    @classmethod
    def empty(cls, num_envs: int) -> Progress:
        """Return the state before any episode."""
        histories = {"accuracy_history": (HISTORY,), "loss_history": (HISTORY,)}
        return blank(cls, num_envs, shapes=histories, last_valid=True)

    def begin(self, rows: IntArray, initial_loss: float) -> None:
        """Forget the past of environments that start an episode."""
        for array in self:
            array[rows] = 0
        self.last_valid[rows] = True
        self.train_loss[rows] = initial_loss


class RollbackState(NamedTuple):
    """Memory of the rollback rule. Arrays have shape (num_envs,) unless stated."""

    losses: FloatArray
    """Last healthy losses, newest first. (num_envs, panic_window) [nats]."""
    num_losses: IntArray
    """Number of healthy losses so far."""
    streak: IntArray
    """Consecutive env steps of collapse or divergence."""
    rollbacks: IntArray
    """Rollbacks in this episode."""
    since_snapshot: IntArray
    """Healthy env steps since the last snapshot."""

    @classmethod
    def empty(cls, num_envs: int, config: EnvConfig) -> RollbackState:
        """Return the memory before any episode."""
        return blank(cls, num_envs, shapes={"losses": (config.panic_window,)})

    def begin(self, rows: IntArray) -> None:
        """Forget the past of environments that start an episode."""
        for array in self:
            array[rows] = 0


class EpisodeState(NamedTuple):
    """Random streams, instances and results of the episodes. All arrays have shape (num_envs,)."""

    stream_key: KeyArray
    """Stream of each environment, a function of its reset seed."""
    key: KeyArray
    """Stream of the current episode."""
    num_episodes: IntArray
    """Episodes started since the stream was seeded."""
    instance: IntArray
    """Index of the instance in the configured set."""
    is_rolled_back: BoolArray
    """Whether the environment was rolled back in the last step."""
    has_test: BoolArray
    """Whether the episode has just ended, so that its test accuracies are known."""
    test_accuracy: FloatArray
    """Test accuracy of the live network at the end of the episode, 0 to 1."""
    committed_test_accuracy: FloatArray
    """Test accuracy with only the fossilized seeds at the end of the episode, 0 to 1."""


class State(NamedTuple):
    """The whole state of the decision process."""

    slots: SlotState
    measured: Measurements
    progress: Progress
    rollback: RollbackState
    episode: EpisodeState

    @classmethod
    def empty(cls, num_envs: int, num_slots: int, config: EnvConfig) -> State:
        """Return the state before any episode."""
        return cls(
            SlotState.empty(num_envs, num_slots),
            Measurements.empty(num_envs, num_slots),
            Progress.empty(num_envs),
            RollbackState.empty(num_envs, config),
            blank(EpisodeState, num_envs),
        )

    def arrays(self) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """Yield every array by a unique name, such as "slots.stage". No copies."""
        for part, arrays in self._asdict().items():
            for name, array in arrays._asdict().items():
                yield f"{part}.{name}", array


class Request(NamedTuple):
    """Decoded actions in canonical values. All arrays have shape (num_envs,)."""

    op: IntArray
    slot: IntArray
    blueprint: IntArray
    style: IntArray
    style_curve: IntArray
    tempo: IntArray
    first_target: FloatArray
    target: FloatArray
    speed: IntArray
    curve: IntArray


class Sizes(NamedTuple):
    """Parameters of the networks."""

    host: IntArray
    """Parameters of each host. (num_envs,)."""
    seeds: IntArray
    """Parameters of the live seed in each slot, 0 where there is none. (num_envs, num_slots)."""
    grown: IntArray
    """Parameters of all live seeds. (num_envs,)."""
    committed: IntArray
    """Parameters of the fossilized seeds. (num_envs,)."""
    budgeted: IntArray
    """Parameters that the live seeds use of the budget, each with a gate. (num_envs,)."""


class Conditions(NamedTuple):
    """Training conditions that a practitioner would know. Arrays have shape (num_envs,)."""

    learning_rate: FloatArray
    """Learning rate of the host at the start of the episode."""
    train_fraction: FloatArray
    """Share of the training split in use, 0 to 1."""
    width: FloatArray
    """Multiple of the features of the task's host."""


class Scores(NamedTuple):
    """Quantities of a state that enter the reward. All arrays have shape (num_envs,)."""

    score: FloatArray
    """Live score: all seeds count."""
    committed_score: FloatArray
    """Score of the network with only its fossilized seeds."""
    potential: FloatArray
    """Potential of the lifecycle state, for shaping."""


class Transition(NamedTuple):
    """State before and after a step, and whether the episode ends. Flags have shape (num_envs,)."""

    before: Scores
    after: Scores
    is_last: BoolArray
    """Whether the episode ends here, terminated or truncated."""
    is_terminated: BoolArray
    """Whether the next state has no value."""
    is_rolled_back: BoolArray
    """Whether the last snapshot was restored in this step."""


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
        num_envs: Rows of every array.
        shape: Shape of a row.
        shapes: Shape of a row of the fields that have another one.
        **values: Initial value of the fields that do not start at 0.
    """
    rows = shapes or {}
    arrays: dict[str, Any] = {
        name: np.full((num_envs, *rows.get(name, shape)), values.get(name, 0), dtype=dtype)
        for name, dtype in _dtypes(cast(Hashable, kind)).items()
    }
    return kind(**arrays)


@functools.cache
def _dtypes(kind: Any) -> dict[str, type]:
    """Return the scalar type of each field: NDArray[T] is ndarray[Any, dtype[T]]."""
    hints = get_type_hints(kind)
    return {name: cast(type, get_args(get_args(hint)[1])[0]) for name, hint in hints.items()}
