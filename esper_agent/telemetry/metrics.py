"""Table of metrics: all metrics that a run writes, with unit, level, formula and healthy range.

A training writes every metric of its level and no other one. The documentation, the captions of the
report and `python -m esper_agent.report --metrics` are generated from this table. In the formulas,
A is the advantage, V the value, ratio the probability ratio of an action and L a loss. Means are
over the steps of the rollout, the minibatches of the update, or the episodes that ended.
"""

from __future__ import annotations

import difflib
import functools
import re
from dataclasses import dataclass
from typing import Literal

Level = Literal["off", "normal", "debug"]
LEVELS: tuple[Level, ...] = ("off", "normal", "debug")
"""Levels of detail. Each one includes the metrics of the levels before it."""


@dataclass(frozen=True)
class Metric:
    """One metric, or a family of metrics with a part of the name in angle brackets."""

    name: str
    unit: str
    """Unit, or an empty string for a number without one."""
    meaning: str
    """Meaning and formula."""
    level: Level = "normal"
    """Lowest level at which the metric is written."""
    low: float | None = None
    """Lower end of the healthy range; None for no limit."""
    high: float | None = None
    """Upper end of the healthy range; None for no limit."""
    source: str = ""
    """Publication that defines the metric."""
    is_optional: bool = False
    """Whether the metric is left out of rows for which it has no data, e.g. without a choice."""

    @property
    def placeholder(self) -> str:
        """Part of the name in angle brackets, or an empty string."""
        found = re.search(r"<(\w+)>", self.name)
        return found[1] if found else ""


_OFF: Level = "off"
_DEBUG: Level = "debug"

GROUPS: dict[str, tuple[Metric, ...]] = {
    "Episodes and speed": (
        Metric(
            "charts/episodic_return",
            "accuracy",
            "undiscounted sum of the rewards of an episode",
            _OFF,
            is_optional=True,
        ),
        Metric(
            "charts/episodic_score",
            "accuracy",
            "committed score at the end of an episode (validation images)",
            _OFF,
            is_optional=True,
        ),
        Metric(
            "charts/episodic_parameters",
            "parameters",
            "parameters of all seeds at the end of an episode",
            _OFF,
            is_optional=True,
        ),
        Metric("charts/learning_rate", "", "learning rate of this iteration", _OFF),
        Metric(
            "charts/SPS",
            "env steps/s",
            "env steps since the start / seconds spent in rollouts and updates",
            _OFF,
        ),
        Metric(
            "eval/committed_score",
            "accuracy",
            "mean committed score of an evaluation on training instances (--eval-every)",
            _OFF,
            is_optional=True,
        ),
    ),
    "Losses": (
        Metric(
            "losses/policy_loss",
            "",
            "-min(ratio * A, clip(ratio, 1 - clip_coef, 1 + clip_coef) * A)",
            _OFF,
            source="Schulman et al. (2017), equation 7",
        ),
        Metric("losses/value_loss", "", "0.5 * (V - return)^2", _OFF),
        Metric("losses/entropy", "nats", "sum of entropy/<head> over heads", _OFF),
        Metric(
            "losses/total_loss",
            "",
            "policy_loss + vf_coef * value_loss - ent_coef * entropy",
            _OFF,
        ),
        Metric(
            "losses/approx_kl",
            "nats",
            "KL divergence of the joint probability over heads, (ratio - 1) - log ratio",
            _OFF,
            high=0.1,
            source="Schulman (2020), Approximating KL divergence",
        ),
        Metric("losses/clipfrac", "share", "steps with |ratio - 1| > clip_coef", _OFF, high=0.4),
        Metric(
            "losses/explained_variance",
            "",
            "1 - var(return - V) / var(return), before the update",
            _OFF,
            low=0.0,
        ),
        Metric(
            "losses/first_ratio_error",
            "",
            "max |ratio - 1| in the first minibatch, where old and new policy are the same",
            _OFF,
            high=1e-3,
        ),
        Metric(
            "losses/variance_left",
            "share",
            "var(A after the group baseline) / var(A)",
            _OFF,
        ),
        Metric("losses/gradient_norm", "", "L2 norm of the gradient before clipping", _OFF),
    ),
    "Trust region": (
        Metric("kl/<head>", "nats", "KL divergence of one head, (ratio - 1) - log ratio"),
        Metric("clipping/above", "share", "steps with ratio > 1 + clip_coef", high=0.3),
        Metric("clipping/below", "share", "steps with ratio < 1 - clip_coef", high=0.3),
        Metric("clipping/<head>", "share", "steps with |ratio of one head - 1| > clip_coef"),
        Metric("update/epochs", "epochs", "epochs that the update ran", low=0.0),
        Metric("update/stopped_early", "0 or 1", "1 if target_kl ended the update"),
    ),
    "Probability ratio": (
        Metric("ratio/mean", "", "mean joint ratio", low=0.9, high=1.1),
        Metric("ratio/std", "", "standard deviation of the joint ratio"),
        Metric("ratio/min", "", "smallest joint ratio after the first minibatch", low=0.1),
        Metric("ratio/max", "", "largest joint ratio after the first minibatch", high=5.0),
        Metric(
            "ratio/extreme",
            "share",
            "steps with a joint ratio outside of the range that the detector `ratio` allows",
            high=0.0,
        ),
        Metric("ratio/max/<head>", "", "largest ratio of one head"),
    ),
    "Entropy": (
        Metric(
            "entropy/<head>", "nats", "mean entropy over steps where the head had a choice", _OFF
        ),
        Metric(
            "entropy_share/<head>",
            "share",
            "mean of entropy / log(number of legal options) over steps where the head had a choice",
            low=0.05,
            is_optional=True,
        ),
        Metric("choice/<head>", "share", "steps where the head had a choice", _OFF),
        Metric("choice/none", "share", "steps where no head had a choice"),
    ),
    "Advantages and returns": (
        Metric("advantages/mean", "", "mean of A before normalization"),
        Metric("advantages/std", "", "standard deviation of A before normalization"),
        Metric("advantages/skew", "", "third standardized moment of A", low=-3.0, high=3.0),
        Metric("advantages/kurtosis", "", "fourth standardized moment of A minus 3", high=30.0),
        Metric("advantages/positive", "share", "steps with A > 0"),
        Metric("returns/mean", "", "mean of A + V, with scaled rewards"),
        Metric("returns/std", "", "standard deviation of A + V"),
        Metric("returns/p10", "", "10th percentile of A + V"),
        Metric("returns/p50", "", "median of A + V"),
        Metric("returns/p90", "", "90th percentile of A + V"),
        Metric(
            "returns/scale", "accuracy", "standard deviation of returns that divides rewards", _OFF
        ),
    ),
    "Critic": (
        Metric(
            "critic/is_valid",
            "0 or 1",
            "1 if the variance of the returns is large enough for the explained variance",
        ),
        Metric("critic/rmse", "", "root of mean (return - V)^2 / standard deviation of returns"),
        Metric("critic/value_mean", "", "mean V before the update"),
        Metric("critic/correlation", "", "correlation of V and return", low=0.0),
        Metric("critic/td_error", "", "mean |r + gamma * V(s') - V(s)|"),
    ),
    "Gradients": (
        Metric("gradients/clipped_norm", "", "L2 norm of the gradient after clipping"),
        Metric("gradients/clipped", "share", "minibatches whose gradient was clipped"),
        Metric(
            "gradients/norm/<group>",
            "",
            "L2 norm of the mean gradient of a group of weights over the first epoch, before "
            "clipping; without data for a head that had no choice",
            is_optional=True,
        ),
        Metric("gradients/policy_norm", "", "L2 norm of the policy loss's gradient on the core"),
        Metric(
            "gradients/value_norm", "", "L2 norm of the gradient of vf_coef * L_value on the core"
        ),
        Metric(
            "gradients/entropy_norm",
            "",
            "L2 norm of the gradient of ent_coef * entropy on the core",
        ),
        Metric(
            "gradients/policy_value_cosine",
            "",
            "cosine between the gradients of policy and value loss on the core",
            low=-0.5,
            is_optional=True,
        ),
        Metric(
            "gradients/policy_entropy_cosine",
            "",
            "cosine between the gradients of policy loss and entropy bonus on the core",
            is_optional=True,
        ),
        Metric(
            "gradients/value_entropy_cosine",
            "",
            "cosine between the gradients of value loss and entropy bonus on the core",
            is_optional=True,
        ),
        Metric("gradients/negative", "share", "elements of the gradient below 0"),
        Metric(
            "gradients/concentration",
            "share",
            "squared norm in the largest 1 % of the elements of each tensor",
        ),
        Metric("gradients/sparsity", "share", "elements of the gradient that are exactly 0"),
        Metric(
            "gradients/noise_scale",
            "sequences",
            "trace of the gradient's covariance / squared norm of its mean, estimated from the "
            "minibatches of the first epoch",
            source="McCandlish et al. (2018), appendix A.1",
            is_optional=True,
        ),
        Metric(
            "gradients/spread_correlation",
            "",
            "correlation over minibatches of the gradient norm and the standard deviation of A",
            is_optional=True,
        ),
        Metric(
            "gradients/rate_correlation",
            "",
            "correlation over the last 20 updates of the gradient norm and the learning rate",
            is_optional=True,
        ),
        Metric(
            "update/cosine",
            "",
            "cosine between the changes of the weights by this update and by the one before",
            is_optional=True,
        ),
        Metric(
            "update/oscillation",
            "share",
            "negative update/cosine among the last 20",
            high=0.5,
            is_optional=True,
        ),
        Metric(
            "update/to_weight",
            "",
            "L2 norm of the change of all weights / L2 norm of the weights",
            low=1e-5,
            high=0.3,
        ),
        Metric("tensor/norm/<tensor>", "", "L2 norm of the gradient of a tensor", _DEBUG),
        Metric("tensor/min/<tensor>", "", "smallest element of the gradient", _DEBUG),
        Metric("tensor/max/<tensor>", "", "largest element of the gradient", _DEBUG),
        Metric("tensor/zero/<tensor>", "share", "elements of the gradient that are 0", _DEBUG),
        Metric(
            "tensor/above_clip/<tensor>",
            "share",
            "elements of the gradient whose absolute value exceeds max_grad_norm",
            _DEBUG,
        ),
        Metric("tensor/nonfinite/<tensor>", "count", "elements of the gradient not finite", _DEBUG),
    ),
    "Trends": (
        Metric(
            "trend/<metric>",
            "",
            "bias-corrected exponential moving average, decay 0.9 per update",
            source="Kingma and Ba (2015), section 3",
            is_optional=True,
        ),
        Metric(
            "drift/<metric>",
            "share",
            "|x - average before this update| / |average|, from the 10th update on",
            is_optional=True,
        ),
    ),
    "Recurrent core": (
        Metric(
            "core/hidden_rms",
            "",
            "root mean square of the LSTM output at the end of the rollout",
            low=1e-4,
            high=1.0,
            is_optional=True,
        ),
        Metric("core/hidden_max", "", "largest |hidden state|", is_optional=True),
        Metric("core/cell_rms", "", "root mean square of the cell state", is_optional=True),
        Metric("core/cell_max", "", "largest |cell state|", is_optional=True),
        Metric(
            "core/saturated",
            "share",
            "gate values beyond 0.99 of their range",
            high=0.5,
            is_optional=True,
        ),
        Metric("core/nonfinite", "count", "elements of the state not finite", is_optional=True),
        Metric(
            "core_after/<figure>",
            "",
            "the same figures after the update, on the same input",
            is_optional=True,
        ),
    ),
    "Plasticity": (
        Metric(
            "plasticity/dormant",
            "share",
            "ReLU units whose mean activation is at most 0.025 times the mean of their layer",
            high=0.5,
            source="Sokar et al. (2023), definition 3.1",
        ),
        Metric(
            "plasticity/effective_rank",
            "share",
            "smallest number of singular values of the core's features that make up 99 % of "
            "their sum / width of the core",
            low=0.05,
            source="Kumar et al. (2021), section 3",
        ),
        Metric("plasticity/weight_norm", "", "L2 norm of all weights"),
    ),
    "Environment": (
        Metric(
            "env/score_gain",
            "accuracy",
            "committed score minus that of never-grow on the same instance",
            low=0.0,
            is_optional=True,
        ),
        Metric("env/score_p10", "accuracy", "10th percentile of the score", is_optional=True),
        Metric("env/score_p50", "accuracy", "median score", is_optional=True),
        Metric("env/score_p90", "accuracy", "90th percentile of the score", is_optional=True),
        Metric(
            "env/score_error",
            "accuracy",
            "standard error of env/score_gain; the mean of each instance is one sample, or each "
            "episode if there is one instance",
            is_optional=True,
        ),
        Metric(
            "env/accuracy", "accuracy", "accuracy of the live network at the end", is_optional=True
        ),
        Metric("env/flops", "FLOP", "compute of an episode", is_optional=True),
        Metric("env/op/<op>", "share", "steps with this op"),
        Metric("env/main_op", "share", "most frequent op among the steps with a choice of op"),
        Metric(
            "env/same_start",
            "share",
            "most frequent blueprint, slot and step of the first germination among the episodes "
            "that ended",
            is_optional=True,
        ),
        Metric("env/germinated/<blueprint>", "per episode", "germinations of this blueprint"),
        Metric("env/germinated_slot/<slot>", "per episode", "germinations in this slot"),
        Metric("env/germination_step", "env step", "median of germinations", is_optional=True),
        Metric("env/fossilization_step", "env step", "median of fossilizations", is_optional=True),
        Metric("env/stage/<stage>", "share", "slots in this stage"),
        Metric("env/pruned", "share", "prunes / germinations in this rollout", is_optional=True),
        Metric(
            "env/fossilized_contribution",
            "accuracy",
            "mean contribution of a seed when it is fossilized",
            is_optional=True,
        ),
        Metric("env/rollbacks", "per 100 episodes", "rollbacks", high=5.0),
        Metric("env/illegal", "share", "illegal actions", high=0.0),
        Metric("env/reward/<term>", "accuracy", "sum of a reward term per episode"),
        Metric("env/flag/<flag>", "per 100 episodes", "episodes with this flag", high=5.0),
        Metric("env/gradient_health", "", "mean gradient health of live seeds", is_optional=True),
        Metric(
            "env/gradient_cause/<cause>",
            "share",
            "live seeds with this cause of a low gradient",
            is_optional=True,
        ),
        Metric(
            "env/observation_bound",
            "share",
            "features of the observation at the bound of their range",
        ),
    ),
    "System": (
        Metric("system/SPS", "env steps/s", "env steps per second in this iteration"),
        Metric("time/<part>", "share", "wall time of this iteration in a part of the program"),
        Metric("time/policy_share", "share", "wall time of the run outside the environment", _OFF),
        Metric("system/memory", "bytes", "resident memory of the process"),
        Metric("system/memory_share", "share", "resident memory / memory of the machine", high=0.9),
        Metric("system/device_memory", "bytes", "device memory allocated", is_optional=True),
        Metric("system/device_reserved", "bytes", "device memory reserved", is_optional=True),
        Metric("system/device_peak", "bytes", "peak device memory", is_optional=True),
        Metric(
            "system/device_share",
            "share",
            "device memory reserved / memory of the device",
            high=0.9,
            is_optional=True,
        ),
        Metric("telemetry/level", "0 to 2", "level of this update: off, normal or debug"),
        Metric("telemetry/debug_updates", "updates", "updates that an alert keeps at level debug"),
        Metric("telemetry/alerts", "count", "open alerts", high=0.0),
    ),
}
"""All metrics by the title of their group."""
METRICS: tuple[Metric, ...] = tuple(metric for group in GROUPS.values() for metric in group)


@functools.cache
def find(name: str) -> Metric:
    """Return the row of the table that describes a metric.

    Raises:
        KeyError: If the table has no such metric; the message names close ones.
    """
    for metric in METRICS:
        if metric.name == name:
            return metric
    # The longest pattern first: "time/policy_share" is no part of the program.
    for metric in sorted(METRICS, key=lambda m: -len(m.name)):
        if metric.placeholder:
            start, end = metric.name.split(f"<{metric.placeholder}>")
            if name.startswith(start) and name.endswith(end) and len(name) > len(start + end):
                return metric
    names = [metric.name for metric in METRICS]
    close = difflib.get_close_matches(name, names, n=3) or names
    raise KeyError(f"metric: expected a name of the table, such as {close}, got {name!r}")


def has_level(level: Level, wanted: Level) -> bool:
    """Return True if a level includes another one."""
    return LEVELS.index(level) >= LEVELS.index(wanted)
