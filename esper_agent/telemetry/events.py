"""Events of a run: one frozen record per line of `events.jsonl`, in the order of their steps.

Every event has `step`, the env steps of the run at the end of the iteration in which it happened.
So the file can be cut back to a checkpoint. `at` is the env step of the event in its episode.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events."""

    kind: ClassVar[str]
    """Name of the kind of event."""
    step: int
    """Env steps of the run, summed over sub-environments."""

    def to_row(self) -> dict[str, Any]:
        """Return the JSON object of the event."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """A process began or continued the run."""

    kind = "run_started"
    is_resumed: bool
    time: str
    """Time in ISO format."""
    versions: dict[str, str]
    """Versions of Python and of the packages that the results depend on."""


@dataclass(frozen=True, kw_only=True)
class Updated(Event):
    """An iteration ended."""

    kind = "updated"
    iteration: int
    """Number of iterations done."""
    level: str
    """Level of telemetry of this iteration."""


@dataclass(frozen=True, kw_only=True)
class EpisodeEnded(Event):
    """An episode of a sub-environment ended."""

    kind = "episode_ended"
    member: int
    """Index of the sub-environment."""
    episode: int
    """Number of the episode in this sub-environment, from 0."""
    instance: int
    """Index of the training instance."""
    length: int
    """Env steps of the episode in this run."""
    score: float
    """Committed score [accuracy]."""
    never_grow: float | None
    """Committed score of never-grow on the same instance; None at level off."""
    episodic_return: float
    """Undiscounted sum of the rewards [accuracy]."""
    parameters: int
    """Parameters of all seeds at the end."""


@dataclass(frozen=True, kw_only=True)
class Growth(Event):
    """Base of the events in the life of a seed."""

    member: int
    """Index of the sub-environment."""
    episode: int
    """Number of the episode in this sub-environment, from 0."""
    at: int
    """Env step in the episode, from 0."""
    slot: int
    blueprint: str
    stage_before: str
    stage: str
    accuracy_before: float
    """Accuracy of the live network before the env step."""
    accuracy: float
    """Accuracy of the live network after the env step."""
    contribution: float | None
    """Measured contribution of the seed before the env step [accuracy]; None if not measured."""
    parameters: int
    """Parameters of all seeds after the env step."""


@dataclass(frozen=True, kw_only=True)
class Germinated(Growth):
    """A seed was germinated."""

    kind = "germinated"


@dataclass(frozen=True, kw_only=True)
class StageChanged(Growth):
    """A seed entered another stage."""

    kind = "stage_changed"


@dataclass(frozen=True, kw_only=True)
class Pruned(Growth):
    """A seed was removed."""

    kind = "pruned"


@dataclass(frozen=True, kw_only=True)
class Fossilized(Growth):
    """A seed became permanent."""

    kind = "fossilized"


@dataclass(frozen=True, kw_only=True)
class RolledBack(Event):
    """A sub-environment was restored to its last good snapshot."""

    kind = "rolled_back"
    member: int
    """Index of the sub-environment."""
    episode: int
    """Number of the episode in this sub-environment, from 0."""
    at: int
    """Env step in the episode, from 0."""
    accuracy_before: float
    """Accuracy of the live network before the env step."""
    accuracy: float
    """Accuracy of the live network after the env step."""


@dataclass(frozen=True, kw_only=True)
class AlertRaised(Event):
    """A detector found a problem, or a warning became critical."""

    kind = "alert_raised"
    name: str
    """Detector, with its subject in brackets if it watches several, e.g. entropy[op]."""
    severity: str
    """warning or critical."""
    value: float
    threshold: float
    meaning: str
    """Usual cause, and what to try."""
    metrics: tuple[str, ...]
    """Metrics to look at."""


@dataclass(frozen=True, kw_only=True)
class AlertCleared(Event):
    """The problem of an alert is gone."""

    kind = "alert_cleared"
    name: str
    raised_at: int
    """Env steps of the run when the alert was raised."""


@dataclass(frozen=True, kw_only=True)
class CheckpointWritten(Event):
    """A checkpoint was written."""

    kind = "checkpoint_written"
    path: str
    """Path in the run directory."""


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """The agent was evaluated on training instances, or at the end beside the baselines."""

    kind = "evaluated"
    scores: dict[str, float]
    """Mean committed score of each agent."""


@dataclass(frozen=True, kw_only=True)
class RatiosFound(Event):
    """Transitions with the most extreme probability ratios of an update (level debug)."""

    kind = "ratios_found"
    transitions: tuple[dict[str, Any], ...]
    """Per transition: member, time in the rollout, ratio, advantage, action, old and new
    log-probability of each head, hash of the observation, gradient norm of its minibatch."""


EVENTS: dict[str, type[Event]] = {
    event.kind: event
    for event in (
        RunStarted,
        Updated,
        EpisodeEnded,
        Germinated,
        StageChanged,
        Pruned,
        Fossilized,
        RolledBack,
        AlertRaised,
        AlertCleared,
        CheckpointWritten,
        Evaluated,
        RatiosFound,
    )
}
"""Kinds of events by name."""
