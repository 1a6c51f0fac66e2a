"""Figures and events of the environment: episodes, growth, and flags of undesired strategies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from esper_agent.telemetry.events import (
    EpisodeEnded,
    Event,
    Fossilized,
    Germinated,
    Growth,
    Pruned,
    RolledBack,
    StageChanged,
)
from esper_agent.telemetry.metrics import Level, has_level
from esper_env import EsperVectorEnv, GradientCause, Op, Stage

Array = npt.NDArray[Any]

FLAGS = ("parasite", "attribution", "churn")
"""Flags in info without their prefix."""
WATCHED = (
    *("stage", "blueprint", "accuracy", "contribution", "contribution_valid", "parameters"),
    *("op", "action_valid", "rolled_back", "gradient_cause", "flops", "instance"),
    *("committed_score", *(f"flag_{name}" for name in FLAGS)),
)
"""Keys of info that are read in every env step."""
STACKED = ("op", "action_valid", "rolled_back", "stage", "blueprint", "gradient_cause")
"""Those of them that are counted at the end of a rollout."""
_BINARY = ("stage_", "mode_", "is_", "blueprint_", "style_")
"""Prefixes of features that are 0 or 1."""


@dataclass
class _Counts:
    """Counts and steps of one rollout."""

    steps: list[dict[str, Array]] = field(default_factory=list)
    """Values of `STACKED` in each env step."""
    num_steps: int = 0
    """Env steps, summed over sub-environments."""
    reward: dict[str, Array] = field(default_factory=dict)
    """Sum of each reward term. (num_envs,) float64."""
    blueprint: Counter[str] = field(default_factory=Counter)
    slot: Counter[int] = field(default_factory=Counter)
    start: Counter[tuple[int, ...]] = field(default_factory=Counter)
    """Blueprint, slot and env step of the first germination of each episode that ended."""
    flag: Counter[str] = field(default_factory=Counter)
    pruned: int = 0
    germinated_at: list[int] = field(default_factory=list)
    fossilized_at: list[int] = field(default_factory=list)
    contribution: list[float] = field(default_factory=list)
    episodes: list[EpisodeEnded] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)


STAGES = {int(stage): stage.name for stage in Stage}
"""Name of each stage."""


class EnvironmentWatch:
    """Collects figures and events of the environment, step by step.

    Args:
        envs: Environment of the training.
        never_grow: Returns the committed score of never-grow on each of some instances, in each
            of as many kinds of problems; None at level off.
    """

    def __init__(
        self,
        envs: EsperVectorEnv,
        info: dict[str, Any],
        never_grow: Callable[[Array, Array], list[float | None]] | None,
    ) -> None:
        self._num_envs, self._num_slots = info["stage"].shape
        self._episode_steps = envs.config.episode_steps
        self._never_grow = never_grow
        prefix = "slot_0.blueprint_"
        names = envs.observation_names
        self._blueprints = [n.removeprefix(prefix) for n in names if n.startswith(prefix)]
        self._ops = envs.heads[0].options
        # All features have a range that is symmetric around 0, or begins at 0.
        self._bound = np.asarray(envs.single_observation_space.high)  # type: ignore[attr-defined]
        parts = [name.split(".")[-1] for name in names]
        self._is_continuous = np.array(
            [not part.startswith(_BINARY) and not part.endswith("_valid") for part in parts]
        )
        self._health = np.array([part == "gradient_health" for part in parts])
        self._has_health = np.array([part == "gradient_valid" for part in parts])
        self._before = {key: info[key] for key in WATCHED}
        self._op_mask = info["action_mask"][:, : len(self._ops)]
        self._episode = np.zeros(self._num_envs, dtype=np.int64)
        self._at = np.zeros(self._num_envs, dtype=np.int64)
        self._return = np.zeros(self._num_envs)
        self._start = np.full((self._num_envs, 3), -1)
        self._flagged = np.zeros((len(FLAGS), self._num_envs), dtype=bool)
        self._counts = _Counts()
        self._events: list[dict[str, Any]] = []

    def get_state(self) -> dict[str, Any]:
        """Return what the figures of the next rollout depend on."""
        names = ("before", "op_mask", "episode", "at", "return", "start", "flagged")
        return {name: getattr(self, f"_{name}") for name in names}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from the result of `get_state`."""
        for name, value in state.items():
            setattr(self, f"_{name}", value)

    def add(
        self,
        level: Level,
        rewards: npt.NDArray[np.float64],
        done: npt.NDArray[np.bool_],
        info: dict[str, Any],
    ) -> None:
        """Record one env step.

        Args:
            level: Level of detail; at "off" only episodes are recorded.
            rewards: Rewards. (num_envs,) float64.
            done: True where an episode ended, and the environment has reset itself. (num_envs,).
            info: Info of the step.
        """
        self._counts.num_steps += self._num_envs
        self._return += rewards
        # `build_info` returns copies, so these arrays do not change any more.
        keys = (*WATCHED, "regime") if "regime" in info else WATCHED
        after = {key: info[key] for key in keys}
        terms = info["reward_terms"]
        if done.any():
            # Where an episode ended, `info` is of the next one.
            final = info["final_info"]
            for key in keys:
                after[key] = np.where(_like(done, after[key]), final[key], after[key])
            terms = {
                name: np.where(done, final["reward_terms"][name], term)
                for name, term in terms.items()
            }
        if has_level(level, "normal"):
            self._add_step(after, terms)
        self._at += 1
        if done.any():
            self._end_episodes(level, np.nonzero(done)[0], after)
        self._before = {key: info[key] for key in WATCHED}
        self._op_mask = info["action_mask"][:, : len(self._ops)]

    def _add_step(self, after: dict[str, Array], terms: dict[str, Array]) -> None:
        """Record ops, stages, growth, flags and reward terms of one env step."""
        counts = self._counts
        row = {key: after[key] for key in STACKED}
        counts.steps.append(row | {"has_op": self._op_mask.sum(1) > 1})
        for f, name in enumerate(FLAGS):
            flag = after[f"flag_{name}"]
            self._flagged[f] |= flag.any(1) if flag.ndim > 1 else flag
        for name, term in terms.items():
            if not name.startswith("_"):
                counts.reward[name] = counts.reward.get(name, 0.0) + term
        self._add_growth(after)

    def _add_growth(self, after: dict[str, Array]) -> None:
        """Record the changes of stages and the rollbacks of one env step."""
        before, counts = self._before, self._counts
        for i in np.nonzero(after["rolled_back"])[0].tolist():
            self._events.append(
                {
                    "event": RolledBack,
                    "member": i,
                    "episode": int(self._episode[i]),
                    "at": int(self._at[i]),
                    "accuracy_before": round(float(before["accuracy"][i]), 5),
                    "accuracy": round(float(after["accuracy"][i]), 5),
                }
            )
        has_changed = (after["stage"] != before["stage"]) & (before["stage"] != Stage.EMBARGOED)
        at = np.nonzero(has_changed)
        if not len(at[0]):
            return
        # All changes of the step at once, as single elements of an array are slow.
        member = at[0]
        found: list[Array] = [
            *at,
            *(before["stage"][at], after["stage"][at]),
            *(before["blueprint"][at], after["blueprint"][at]),
            *(before["contribution"][at].astype(float).round(5), before["contribution_valid"][at]),
            *(self._episode[member], self._at[member]),
            after["rolled_back"][member],
            *(part["accuracy"][member].astype(float).round(5) for part in (before, after)),
            after["parameters"][member],
        ]
        columns = [column.tolist() for column in found]
        for row in zip(*columns, strict=True):
            i, s, old, new, removed, grown, value, is_measured = row[:8]
            number, step, is_rolled_back, accuracy_before, accuracy, parameters = row[8:]
            is_gone = new in (Stage.DORMANT, Stage.EMBARGOED)
            blueprint = removed if is_gone else grown
            name = self._blueprints[blueprint]
            contribution = value if is_measured else None
            kind: type[Growth] = StageChanged
            if old == Stage.DORMANT:
                kind = Germinated
                counts.blueprint[name] += 1
                counts.slot[s] += 1
                counts.germinated_at.append(step)
                if self._start[i, 0] < 0:
                    self._start[i] = blueprint, s, step
            elif new == Stage.FOSSILIZED:
                kind = Fossilized
                counts.fossilized_at.append(step)
                if contribution is not None:
                    counts.contribution.append(contribution)
            elif is_gone and not is_rolled_back:
                kind = Pruned
                counts.pruned += 1
            self._events.append(
                {
                    "event": kind,
                    "member": i,
                    "episode": number,
                    "at": step,
                    "slot": s,
                    "blueprint": name,
                    "stage_before": STAGES[old],
                    "stage": STAGES[new],
                    "accuracy_before": accuracy_before,
                    "accuracy": accuracy,
                    "contribution": contribution,
                    "parameters": parameters,
                }
            )

    def _end_episodes(self, level: Level, rows: Array, after: dict[str, Array]) -> None:
        """Record episodes that ended, and start the next ones."""
        counts = self._counts
        references: list[float | None] = [None] * len(rows)
        if self._never_grow is not None and has_level(level, "normal"):
            regime = after.get("regime", np.zeros_like(after["instance"]))
            references = self._never_grow(after["instance"][rows], regime[rows])
        for i, reference in zip(rows.tolist(), references, strict=True):
            fields = {
                "member": i,
                "episode": int(self._episode[i]),
                "instance": int(after["instance"][i]),
                "length": int(self._at[i]),
                "score": float(after["committed_score"][i]),
                "never_grow": reference,
                "episodic_return": float(self._return[i]),
                "parameters": int(after["parameters"][i]),
            }
            counts.episodes.append(EpisodeEnded(step=0, **fields))
            self._events.append({"event": EpisodeEnded, **fields})
            counts.start[tuple(self._start[i].tolist())] += 1
            counts.accuracy.append(float(after["accuracy"][i]))
            counts.flops.append(float(after["flops"][i]))
            for f, name in enumerate(FLAGS):
                counts.flag[name] += bool(self._flagged[f, i])
        self._episode[rows] += 1
        self._at[rows] = 0
        self._return[rows] = 0.0
        self._start[rows] = -1
        self._flagged[:, rows] = False

    # ------------------------------------------------------------------ end of a rollout

    def finish(
        self, level: Level, step: int, obs: npt.NDArray[np.float32]
    ) -> tuple[dict[str, float], list[Event]]:
        """Return the metrics and events of a rollout, and start the next one.

        Args:
            level: Level of detail.
            step: Env steps of the run at the end of the iteration.
            obs: Observations of the rollout. (num_steps, num_envs, num_features) float32.
        """
        counts, metrics = self._counts, {}
        for name, attribute in (("return", "episodic_return"), ("score", "score"),
                                ("parameters", "parameters")):  # fmt: skip
            # If a rollout is shorter than an episode, no episode may have ended.
            if counts.episodes:
                values = [getattr(episode, attribute) for episode in counts.episodes]
                metrics[f"charts/episodic_{name}"] = float(np.mean(values))
        events: list[Event] = []
        if has_level(level, "normal"):
            metrics |= self._figures_of_steps() | self._figures_of_episodes()
            metrics |= self._figures_of_observations(obs)
            events = [e.pop("event")(step=step, **e) for e in self._events]
        self._counts, self._events = _Counts(), []
        return metrics, events

    def _figures_of_steps(self) -> dict[str, float]:
        counts = self._counts
        # (num_steps, num_envs, ...) by key
        steps = {key: np.stack([row[key] for row in counts.steps]) for key in counts.steps[0]}
        # Rates refer to whole episodes, of which a rollout may hold parts.
        episodes = counts.num_steps / self._episode_steps
        ops = np.bincount(steps["op"].ravel(), minlength=len(Op))
        metrics = {f"env/op/{name}": float(ops[Op[name]] / counts.num_steps) for name in self._ops}
        chosen = np.bincount(steps["op"][steps["has_op"]], minlength=len(Op))
        metrics["env/main_op"] = float(chosen.max() / max(1, chosen.sum()))
        for name in self._blueprints:
            metrics[f"env/germinated/{name}"] = counts.blueprint[name] / episodes
        for s in range(self._num_slots):
            metrics[f"env/germinated_slot/{s}"] = counts.slot[s] / episodes
        stages = np.bincount(steps["stage"].ravel(), minlength=len(Stage)) / steps["stage"].size
        metrics |= {f"env/stage/{stage.name}": float(stages[stage]) for stage in Stage}
        metrics["env/rollbacks"] = 100 * float(steps["rolled_back"].sum()) / episodes
        metrics["env/illegal"] = float((~steps["action_valid"]).mean())
        for name, total in counts.reward.items():
            metrics[f"env/reward/{name}"] = float(total.sum()) / episodes
        causes = steps["gradient_cause"][steps["blueprint"] >= 0]
        if len(causes):
            shares = np.bincount(causes, minlength=len(GradientCause)) / len(causes)
            metrics |= {f"env/gradient_cause/{c.name}": float(shares[c]) for c in GradientCause}
        germinated = counts.slot.total()
        if germinated:
            metrics["env/germination_step"] = float(np.median(counts.germinated_at))
            metrics["env/pruned"] = counts.pruned / germinated
        if counts.fossilized_at:
            metrics["env/fossilization_step"] = float(np.median(counts.fossilized_at))
        if counts.contribution:
            metrics["env/fossilized_contribution"] = float(np.mean(counts.contribution))
        return metrics

    def _figures_of_episodes(self) -> dict[str, float]:
        counts, episodes = self._counts, len(self._counts.episodes)
        metrics = {f"env/flag/{f}": 100 * counts.flag[f] / max(1, episodes) for f in FLAGS}
        if not episodes:
            return metrics
        scores = np.array([episode.score for episode in counts.episodes])
        for name, share in (("p10", 10), ("p50", 50), ("p90", 90)):
            metrics[f"env/score_{name}"] = float(np.percentile(scores, share))
        metrics["env/accuracy"] = float(np.mean(counts.accuracy))
        metrics["env/flops"] = float(np.mean(counts.flops))
        metrics["env/same_start"] = max(counts.start.values()) / episodes
        gains: dict[int, list[float]] = {}
        for e in counts.episodes:
            if e.never_grow is not None:
                gains.setdefault(e.instance, []).append(e.score - e.never_grow)
        if gains:
            metrics["env/score_gain"] = float(np.mean([x for own in gains.values() for x in own]))
        # Episodes of one instance are alike, so only instances count as independent.
        samples = [float(np.mean(own)) for own in gains.values()]
        if len(gains) == 1:
            (samples,) = gains.values()
        if len(samples) > 1:
            metrics["env/score_error"] = float(np.std(samples, ddof=1) / len(samples) ** 0.5)
        return metrics

    def _figures_of_observations(self, obs: npt.NDArray[np.float32]) -> dict[str, float]:
        at_bound = np.abs(obs) >= self._bound
        metrics = {"env/observation_bound": float(at_bound[..., self._is_continuous].mean())}
        is_valid = obs[..., self._has_health] > 0
        if is_valid.any():
            health = obs[..., self._health][is_valid]
            metrics["env/gradient_health"] = float(health.mean())
        return metrics


def _like(done: npt.NDArray[np.bool_], values: Array) -> npt.NDArray[np.bool_]:
    """Return a mask of sub-environments that broadcasts to an array (num_envs, ...)."""
    return done.reshape(-1, *[1] * (values.ndim - 1))
