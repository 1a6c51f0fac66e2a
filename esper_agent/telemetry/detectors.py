"""Detectors of failing runs: pure functions of the metrics of this update and of those before.

All detectors are evaluated after every update at the levels normal and debug. Numbers that are not
finite end the run at every level. `Alerts` keeps what is open, and returns what was raised and what
was cleared.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from esper_agent.telemetry.events import AlertCleared, AlertRaised, Event
from esper_agent.telemetry.metrics import find

Severity = Literal["warning", "critical"]
Row = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Thresholds of all detectors."""

    ratio_high: float = 5.0
    """Largest joint ratio."""
    ratio_low: float = 0.1
    """Smallest joint ratio."""
    ratio_critical: float = 0.05
    """Share of steps outside of both that is critical. A few outliers are clipped anyway."""
    kl_warning: float = 0.1
    """Joint KL divergence [nats]. Usual targets are 0.01 to 0.05."""
    kl_critical: float = 0.5
    """Joint KL divergence at which the policy is another one [nats]."""
    value_bands: tuple[tuple[float, float], ...] = (
        (0.1, -0.5),
        (0.25, -0.2),
        (0.75, 0.0),
        (1, 0.1),
    )
    """End of a band of progress, and the smallest explained variance in it. An untrained critic
    explains nothing, a trained one must explain something."""
    value_updates: int = 3
    """Consecutive updates until a warning."""
    value_critical_updates: int = 10
    """Consecutive updates until it is critical."""
    entropy_low: float = 0.1
    """Smallest entropy of a head [share of the maximum]."""
    entropy_low_wide: float = 0.05
    """The same for heads with more than 4 options, where 0.1 still means a real choice."""
    entropy_updates: int = 3
    """Consecutive updates until an alert."""
    entropy_choice: float = 0.01
    """Share of steps with a choice below which a head is not judged."""
    entropy_clear: float = 1.5
    """Multiple of the threshold above which the alert is cleared, so that it does not flicker."""
    drift: float = 0.75
    """Distance of a gradient norm from its moving average [share of the average]. At 0.5, a default
    training raises 26 warnings, which are noise."""
    drift_updates: int = 3
    """Consecutive updates until a warning; single minibatches are noisy."""
    vanish_of_clip: float = 1e-4
    """Gradient norm of a group that may have vanished [multiples of max_grad_norm]."""
    vanish_of_trend: float = 0.05
    """The same relative to the moving average of the group; both must hold."""
    explode_of_clip: float = 100.0
    """Gradient norm of a group that may have exploded [multiples of max_grad_norm]."""
    explode_of_trend: float = 10.0
    """The same relative to the moving average of the group; both must hold."""
    conflict_cosine: float = -0.5
    """Cosine of the gradients of policy and value loss on the core."""
    conflict_norms: float = 10.0
    """Norm of the gradient of the value loss [multiples of that of the policy loss]."""
    conflict_updates: int = 5
    """Consecutive updates until a warning."""
    core_high: float = 10.0
    """Largest RMS of the cell. The norm of a state grows with sqrt(hidden_size), its RMS does not;
    |h| never exceeds 1."""
    core_low: float = 1e-6
    """Smallest RMS of the hidden state."""
    core_saturated: float = 0.5
    """Largest share of saturated gates."""
    dormant: float = 0.5
    """Largest share of dormant units."""
    rank: float = 0.05
    """Smallest effective rank [share of the width]."""
    performance_margin: float = 0.02
    """Fall of the score below its moving average that is ignored [accuracy]."""
    performance_errors: float = 3.0
    """The same [standard errors of the mean score]; both must be exceeded."""
    performance_updates: int = 3
    """Consecutive updates until an alert."""
    main_op: float = 0.99
    """Largest share of one op among the steps with a choice of op."""
    flags_warning: float = 5.0
    """Largest number of flagged episodes [per 100]."""
    flags_critical: float = 25.0
    """Number of flagged episodes that is critical [per 100]."""
    flags_updates: int = 10
    """Updates over which flags are averaged; one has few episodes."""
    memory_share: float = 0.9
    """Largest share of the memory in use."""
    memory_growth: float = 0.01
    """Growth of the memory per update that is a leak [share], if it lasts."""
    memory_updates: int = 20
    """Updates that it must last."""
    early: float = 0.1
    """Progress before which entropy, plasticity and performance are not judged, and flags are not
    critical."""
    collapse_from: float = 0.25
    """Progress before which a policy may still be like another."""
    entropy_critical_until: float = 0.5
    """Progress before which a collapsed entropy of ops is critical, as exploration has ended."""


@dataclass(frozen=True)
class Finding:
    """What a detector found for one subject."""

    severity: Severity
    value: float
    threshold: float


@dataclass(frozen=True, kw_only=True)
class Look:
    """Everything that a detector may look at."""

    now: Row
    """Metrics of this update."""
    past: Sequence[Row]
    """Metrics of the updates before, the last one at the end."""
    progress: float
    """Share of the training that is done."""
    limits: Thresholds
    max_grad_norm: float
    """Norm that gradients are clipped to."""
    num_options: Mapping[str, int]
    """Number of options of each head."""
    open: Container[str]
    """Subjects with an open alert."""

    def rows(self, count: int) -> list[Row]:
        """Return the last rows, this one included; an empty list if there are fewer."""
        rows = [*self.past, self.now][-count:]
        return rows if len(rows) == count else []

    def holds(self, count: int, test: Callable[[Row], bool]) -> bool:
        """Return True if a test holds for the last rows, this one included."""
        rows = self.rows(count)
        return bool(rows) and all(test(row) for row in rows)

    def subjects(self, prefix: str) -> list[str]:
        """Return what follows a prefix in the names of this update's metrics."""
        return [name.removeprefix(prefix) for name in self.now if name.startswith(prefix)]


Findings = dict[str, Finding]
"""Findings by subject; the subject is empty for a detector that watches one thing."""


def ratio(look: Look) -> Findings:
    """Find joint ratios far from 1 after the first minibatch."""
    now, limits = look.now, look.limits
    severity: Severity = "warning"
    if now["ratio/extreme"] > limits.ratio_critical:
        severity = "critical"
    if now["ratio/max"] > limits.ratio_high:
        return {"": Finding(severity, now["ratio/max"], limits.ratio_high)}
    if now["ratio/min"] < limits.ratio_low:
        return {"": Finding(severity, now["ratio/min"], limits.ratio_low)}
    return {}


def kl(look: Look) -> Findings:
    """Find updates that change the policy too much."""
    value, limits = look.now["losses/approx_kl"], look.limits
    if value > limits.kl_critical:
        return {"": Finding("critical", value, limits.kl_critical)}
    return {"": Finding("warning", value, limits.kl_warning)} if value > limits.kl_warning else {}


def value(look: Look) -> Findings:
    """Find a critic that explains too little for the progress of the training."""
    limits, name = look.limits, "losses/explained_variance"
    floor = next(low for end, low in limits.value_bands if look.progress <= end)

    def is_low(row: Row) -> bool:
        return row["critic/is_valid"] > 0 and row[name] < floor

    if look.holds(limits.value_critical_updates, is_low):
        return {"": Finding("critical", look.now[name], floor)}
    if look.holds(limits.value_updates, is_low):
        return {"": Finding("warning", look.now[name], floor)}
    return {}


def entropy(look: Look) -> Findings:
    """Find heads that hardly choose any more, although they could."""
    limits, found = look.limits, {}
    if look.progress < limits.early:
        return {}
    for head in look.subjects("entropy_share/"):
        name = f"entropy_share/{head}"
        is_wide = look.num_options[head] > 4
        low = limits.entropy_low_wide if is_wide else limits.entropy_low
        is_open = head in look.open
        if is_open:
            low *= limits.entropy_clear

        def is_low(row: Row, head: str = head, name: str = name, low: float = low) -> bool:
            return row[f"choice/{head}"] >= limits.entropy_choice and row.get(name, 1.0) < low

        if look.holds(1 if is_open else limits.entropy_updates, is_low):
            is_critical = head == "op" and look.progress < limits.entropy_critical_until
            severity: Severity = "critical" if is_critical else "warning"
            found[head] = Finding(severity, look.now[name], low)
    return found


def drift(look: Look) -> Findings:
    """Find gradient norms that leave their moving average."""
    limits, found = look.limits, {}
    for subject in look.subjects("drift/gradients/norm/"):
        name = f"drift/gradients/norm/{subject}"

        def is_far(row: Row, name: str = name) -> bool:
            return row.get(name, 0.0) > limits.drift

        if look.holds(limits.drift_updates, is_far):
            found[subject] = Finding("warning", look.now[name], limits.drift)
    return found


def vanishing(look: Look) -> Findings:
    """Find parts of the network that gradients do not reach any more."""
    limits, found = look.limits, {}
    floor = limits.vanish_of_clip * look.max_grad_norm
    for group, norm, average in _groups(look):
        # The moving average follows, so an open alert is judged by the norm alone.
        is_below_trend = norm < limits.vanish_of_trend * average or group in look.open
        if norm < floor and is_below_trend:
            found[group] = Finding("critical", norm, floor)
    return found


def exploding(look: Look) -> Findings:
    """Find parts of the network with gradients of another order of magnitude."""
    limits, found = look.limits, {}
    ceiling = limits.explode_of_clip * look.max_grad_norm
    for group, norm, average in _groups(look):
        is_above_trend = norm > limits.explode_of_trend * average or group in look.open
        if norm > ceiling and is_above_trend:
            found[group] = Finding("critical", norm, ceiling)
    return found


def _groups(look: Look) -> list[tuple[str, float, float]]:
    """Return group, gradient norm and moving average before this update, once it is warmed up."""
    result = []
    for group in look.subjects("gradients/norm/"):
        name = f"gradients/norm/{group}"
        if look.past and f"drift/{name}" in look.now:
            average = look.past[-1].get(f"trend/{name}")
            if average is not None:
                result.append((group, look.now[name], average))
    return result


def conflict(look: Look) -> Findings:
    """Find a value loss that works against the policy on the weights that they share."""
    limits, name = look.limits, "gradients/policy_value_cosine"

    def is_conflict(row: Row) -> bool:
        return (
            "drift/losses/gradient_norm" in row
            and row.get(name, 0.0) < limits.conflict_cosine
            and row["gradients/value_norm"] > limits.conflict_norms * row["gradients/policy_norm"]
        )

    if look.holds(limits.conflict_updates, is_conflict):
        return {"": Finding("warning", look.now[name], limits.conflict_cosine)}
    return {}


def core(look: Look) -> Findings:
    """Find a recurrent core that is saturated, dead or out of range."""
    limits, found = look.limits, {}
    for prefix in ("core", "core_after"):
        if f"{prefix}/cell_rms" not in look.now:
            continue  # The agent has no memory.
        figures = {n: look.now[f"{prefix}/{n}"] for n in ("cell_rms", "hidden_rms", "saturated")}
        if figures["cell_rms"] > limits.core_high:
            found["cell_rms"] = Finding("critical", figures["cell_rms"], limits.core_high)
        if figures["hidden_rms"] < limits.core_low:
            found["hidden_rms"] = Finding("critical", figures["hidden_rms"], limits.core_low)
        if figures["saturated"] > limits.core_saturated:
            found["saturated"] = Finding("critical", figures["saturated"], limits.core_saturated)
        if look.now[f"{prefix}/nonfinite"] > 0:
            found["nonfinite"] = Finding("critical", look.now[f"{prefix}/nonfinite"], 0.0)
    return found


def plasticity(look: Look) -> Findings:
    """Find a network that is losing the ability to learn."""
    limits, now, found = look.limits, look.now, {}
    if look.progress < limits.early:
        return {}
    if now["plasticity/dormant"] > limits.dormant:
        found["dormant"] = Finding("warning", now["plasticity/dormant"], limits.dormant)
    if now["plasticity/effective_rank"] < limits.rank:
        found["rank"] = Finding("warning", now["plasticity/effective_rank"], limits.rank)
    return found


def performance(look: Look) -> Findings:
    """Find a score that falls, and one that falls below that of never-grow."""
    limits, gain = look.limits, "env/score_gain"
    if look.progress < limits.early or gain not in look.now:
        return {}
    rows = look.rows(limits.performance_updates + 1)
    # The average before the fall, as the fall pulls it down.
    average = rows[0].get(f"trend/{gain}") if rows else None
    if average is None:
        return {}

    def is_low(row: Row) -> bool:
        margin = limits.performance_errors * row.get("env/score_error", 0.0)
        return row.get(gain, average) < average - max(limits.performance_margin, margin)

    if look.holds(limits.performance_updates, is_low):
        severity: Severity = "critical" if look.now[gain] < 0 else "warning"
        return {"": Finding(severity, look.now[gain], average - limits.performance_margin)}
    return {}


def policy_collapse(look: Look) -> Findings:
    """Find a policy that always does the same."""
    limits, now, found = look.limits, look.now, {}
    if look.progress < limits.collapse_from:
        return {}
    if now["env/main_op"] > limits.main_op:
        found["op"] = Finding("warning", now["env/main_op"], limits.main_op)
    if now.get("env/same_start", 0.0) >= 1.0:
        found["start"] = Finding("warning", now["env/same_start"], 1.0)
    return found


def hacking(look: Look) -> Findings:
    """Find episodes in which a contribution does not mean what it should."""
    limits, found = look.limits, {}
    rows = [*look.past, look.now][-limits.flags_updates :]
    for subject in look.subjects("env/flag/"):
        # Before there are enough updates, the missing ones count as free of flags.
        rate = sum(row[f"env/flag/{subject}"] for row in rows) / limits.flags_updates
        # An untrained policy acts at random, and its churn means nothing.
        if rate > limits.flags_critical and look.progress >= limits.early:
            found[subject] = Finding("critical", rate, limits.flags_critical)
        elif rate > limits.flags_warning:
            found[subject] = Finding("warning", rate, limits.flags_warning)
    return found


def memory(look: Look) -> Findings:
    """Find memory that is nearly used up, and memory that grows without end."""
    limits, found = look.limits, {}
    for subject, share, size in (
        ("host", "system/memory_share", "system/memory"),
        ("device", "system/device_share", "system/device_memory"),
    ):
        if share not in look.now:
            continue
        if look.now[share] > limits.memory_share:
            found[subject] = Finding("critical", look.now[share], limits.memory_share)
        sizes = [row[size] for row in look.rows(limits.memory_updates + 1) if size in row]
        growth = [b / a - 1 for a, b in itertools.pairwise(sizes)]
        if len(growth) == limits.memory_updates and min(growth) > limits.memory_growth:
            found[subject] = Finding("critical", growth[-1], limits.memory_growth)
    return found


@dataclass(frozen=True)
class Detector:
    """A detector with the text of its alerts."""

    function: Callable[[Look], Findings]
    meaning: str
    """Usual cause, and what to try."""
    metrics: tuple[str, ...]
    """Metrics to look at, as the table names them; `<...>` is replaced by the subject."""


NONFINITE = "non-finite"
"""Detector that ends the run at every level; see `Run.check`."""
DETECTORS: dict[str, Detector] = {
    "ratio": Detector(
        ratio,
        "the update moves the policy too far: lower learning_rate or update_epochs, or set "
        "target_kl",
        ("ratio/max", "ratio/min", "ratio/extreme", "losses/approx_kl"),
    ),
    "kl": Detector(
        kl,
        "the update changes the policy too much: lower learning_rate or update_epochs, or set "
        "target_kl to 0.05",
        ("losses/approx_kl", "kl/<head>", "update/to_weight"),
    ),
    "value": Detector(
        value,
        "the critic does not follow the returns: check the scale of the rewards, raise vf_coef or "
        "learning_rate",
        ("losses/explained_variance", "critic/rmse", "critic/correlation", "returns/std"),
    ),
    "entropy": Detector(
        entropy,
        "the head has stopped to explore: raise ent_coef; late in a training that scores well it "
        "is harmless",
        ("entropy_share/<head>", "choice/<head>"),
    ),
    "drift": Detector(
        drift,
        "the gradient of this part changes its size: look for a change of the policy or of the "
        "returns at the same time",
        ("gradients/norm/<group>", "trend/<metric>", "losses/explained_variance"),
    ),
    "vanishing": Detector(
        vanishing,
        "this part of the network has stopped to learn: look for dormant units and saturated gates",
        ("gradients/norm/<group>", "plasticity/dormant", "core/saturated"),
    ),
    "exploding": Detector(
        exploding,
        "gradients of another order of magnitude: check the scale of the rewards, lower "
        "learning_rate or vf_coef",
        ("gradients/norm/<group>", "returns/scale", "losses/value_loss"),
    ),
    "conflict": Detector(
        conflict,
        "the value loss dominates the shared weights and works against the policy: lower vf_coef",
        ("gradients/policy_value_cosine", "gradients/value_norm", "gradients/policy_norm"),
    ),
    "core": Detector(
        core,
        "the recurrent core carries no information any more: lower learning_rate, or start again "
        "from an earlier checkpoint",
        ("core/hidden_rms", "core/cell_rms", "core/saturated"),
    ),
    "plasticity": Detector(
        plasticity,
        "units or directions of the features are lost: lower learning_rate, or train a fresh agent",
        ("plasticity/dormant", "plasticity/effective_rank", "plasticity/weight_norm"),
    ),
    "performance": Detector(
        performance,
        "the policy gets worse: look for alerts of ratio, KL or entropy just before, and continue "
        "from an earlier checkpoint with a smaller learning_rate",
        ("env/score_gain", "losses/approx_kl", "losses/entropy"),
    ),
    "policy-collapse": Detector(
        policy_collapse,
        "the policy does the same whatever it observes: raise ent_coef early on; if the score is "
        "good, one opening may simply be the best",
        ("env/main_op", "env/same_start", "env/op/<op>"),
    ),
    "hacking": Detector(
        hacking,
        "seeds look useful without being so, or slots are refilled for nothing: look at the "
        "flagged episodes in events.jsonl and at the reward weights",
        ("env/flag/<flag>", "env/pruned", "env/reward/<term>"),
    ),
    "memory": Detector(
        memory,
        "memory will run out: fewer sub-environments, or report the leak",
        ("system/memory", "system/memory_share", "system/device_memory"),
    ),
}
"""Detectors by name. `non-finite` is not among them: it ends the run, also at level off."""


@dataclass
class Alerts:
    """Open alerts of a run, and the history that detectors need.

    Args:
        limits: Thresholds.
        max_grad_norm: Norm that gradients are clipped to.
        num_options: Number of options of each head.
    """

    limits: Thresholds
    max_grad_norm: float
    num_options: Mapping[str, int]
    evaluated: dict[str, int] = field(default_factory=dict)
    """Number of evaluations of each detector in this process."""
    open: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Severity, and step at which it was raised, of each open alert."""
    past: list[dict[str, float]] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        """Rows of history that a detector may look back."""
        limits = self.limits
        counts = [getattr(limits, f.name) for f in dataclasses.fields(limits)
                  if f.name.endswith("_updates")]  # fmt: skip
        return int(max(counts))

    def get_state(self) -> dict[str, Any]:
        """Return what later alerts depend on."""
        return {"open": self.open, "past": self.past}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from the result of `get_state`."""
        self.open, self.past = state["open"], state["past"]

    def evaluate(self, step: int, metrics: dict[str, float], progress: float) -> list[Event]:
        """Evaluate all detectors.

        Args:
            step: Env steps of the run.
            metrics: Metrics of this update.
            progress: Share of the training that is done.

        Returns:
            Alerts that were raised, rose from warning to critical, or were cleared.
        """
        events: list[Event] = []
        found: dict[str, Finding] = {}
        for name, detector in DETECTORS.items():
            look = Look(
                now=metrics,
                past=self.past,
                progress=progress,
                limits=self.limits,
                max_grad_norm=self.max_grad_norm,
                num_options=self.num_options,
                open=[subject for owner, subject in map(split_title, self.open) if owner == name],
            )
            for subject, finding in detector.function(look).items():
                found[title(name, subject)] = finding
                if self._is_news(title(name, subject), finding):
                    events.append(raised(step, name, subject, finding))
            self.evaluated[name] = self.evaluated.get(name, 0) + 1
        gone = [name for name in self.open if name not in found]
        events.extend(
            AlertCleared(step=step, name=name, raised_at=self.open.pop(name)["raised_at"])
            for name in gone
        )
        for event in events:
            if isinstance(event, AlertRaised):
                first = self.open.get(event.name, {}).get("raised_at", step)
                self.open[event.name] = {"severity": event.severity, "raised_at": first}
        self.past = [*self.past, dict(metrics)][-self.num_rows :]
        return events

    def _is_news(self, name: str, finding: Finding) -> bool:
        """Return True for an alert that is not open, or was only a warning so far."""
        known = self.open.get(name)
        is_worse = finding.severity == "critical"
        return known is None or (is_worse and known["severity"] == "warning")


def title(name: str, subject: str) -> str:
    """Return the name of an alert."""
    return f"{name}[{subject}]" if subject else name


def split_title(text: str) -> tuple[str, str]:
    """Return the detector and the subject of an alert, given its name."""
    name, _, rest = text.partition("[")
    return name, rest.removesuffix("]")


def raised(step: int, name: str, subject: str, finding: Finding) -> AlertRaised:
    """Return the event of an alert."""
    detector = DETECTORS[name]
    metrics = tuple(
        metric.replace(f"<{find(metric).placeholder}>", subject) if subject else metric
        for metric in detector.metrics
        if subject or not find(metric).placeholder
    )
    return AlertRaised(
        step=step,
        name=title(name, subject),
        severity=finding.severity,
        value=finding.value,
        threshold=finding.threshold,
        meaning=detector.meaning,
        metrics=metrics,
    )


def raised_nonfinite(step: int, problems: Sequence[str]) -> AlertRaised:
    """Return the event of numbers that are not finite, which end a run."""
    return AlertRaised(
        step=step,
        name=NONFINITE,
        severity="critical",
        value=float(len(problems)),
        threshold=0.0,
        meaning=f"{'; '.join(problems)}; lower learning_rate or the coefficients of the losses",
        metrics=("losses/gradient_norm", "losses/value_loss"),
    )
