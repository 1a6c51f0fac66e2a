"""Telemetry of a training: levels, trends, alerts, and the metrics and events of each iteration.

It computes and does not write; `esper_agent.run` writes. Training does not depend on the level.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import torch

from esper_agent.telemetry.detectors import Alerts, Thresholds, raised_nonfinite
from esper_agent.telemetry.environment import EnvironmentWatch
from esper_agent.telemetry.events import AlertRaised, Event, RatiosFound, Updated
from esper_agent.telemetry.metrics import LEVELS, Level, has_level
from esper_agent.telemetry.reference import NeverGrowScores
from esper_agent.telemetry.training import Clock, UpdateSettings, UpdateWatch, Watched
from esper_env import EnvConfig, EsperVectorEnv

DECAY = 0.9
"""Decay of moving averages per update."""
WARM_UP = 10
"""Updates after which a moving average is compared with."""
LAST_UPDATES = 20
"""Updates over which oscillation and the response to the learning rate are computed."""
FEWEST = 5
"""Updates below which these two have no data."""
MOST_SHOWN = 3
"""Tensors, and metrics, that the message about numbers that are not finite names."""
TRENDS = (
    "losses/approx_kl",
    "losses/entropy",
    "losses/explained_variance",
    "losses/gradient_norm",
    "env/score_gain",
)
"""Metrics with a trend, besides the gradient norm of each group."""
PARTS = ("environment", "inference", "update", "telemetry", "evaluation", "checkpoint")
"""Parts of the program whose wall time is measured."""


@dataclass
class Trends:
    """Bias-corrected exponential moving averages.

    Source: Kingma and Ba (2015), section 3.
    """

    totals: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def update(self, name: str, value: float) -> dict[str, float]:
        """Add a value; return its distance from the average before, and the new average."""
        result, count = {}, self.counts.get(name, 0)
        if count >= WARM_UP:
            average = self.average(name)
            result[f"drift/{name}"] = abs(value - average) / max(abs(average), 1e-12)
        self.totals[name] = DECAY * self.totals.get(name, 0.0) + (1 - DECAY) * value
        self.counts[name] = count + 1
        result[f"trend/{name}"] = self.average(name)
        return result

    def average(self, name: str) -> float:
        """Return the moving average of a metric."""
        return self.totals[name] / (1 - DECAY ** self.counts[name])


class Telemetry:
    """Collects what a training says about itself.

    Args:
        level: Level of detail that the user chose.
        env_id: Environment id.
        device: Device of the training.
        config: Environment settings.
        envs: Environment of the training.
        info: Info of its reset.
        max_grad_norm: Norm that gradients are clipped to.
        debug_updates: Updates that an alert keeps at level debug.
        thresholds: Thresholds of the detectors.
    """

    def __init__(
        self,
        level: Level,
        env_id: str,
        device: str,
        config: EnvConfig,
        envs: EsperVectorEnv,
        info: dict[str, Any],
        max_grad_norm: float,
        *,
        debug_updates: int = 5,
        thresholds: Thresholds | None = None,
    ) -> None:
        limits = thresholds or Thresholds()
        self.clock = Clock()
        self.problems: list[str] = []
        """Numbers of the last update that are not finite, in words."""
        self.events: list[Event] = []
        """Events of the last iteration."""
        self._chosen, self._debug_left = level, 0
        self.debug_updates = debug_updates
        """Updates that an alert keeps at level debug."""
        self._device = torch.device(device)
        self.never_grow = NeverGrowScores(env_id, device, config, envs.num_instances)
        is_on = has_level(level, "normal")
        self.environment = EnvironmentWatch(envs, info, self.never_grow if is_on else None)
        num_options = {head.name: len(head.options) for head in envs.heads}
        self.alerts = Alerts(limits, max_grad_norm, num_options)
        self._trends = Trends()
        self._change: list[torch.Tensor] | None = None
        self._began = time.perf_counter()

    def __repr__(self) -> str:
        """Return level, remaining updates at level debug, and open alerts."""
        alerts = ", ".join(self.alerts.open) or "none"
        return f"Telemetry(level {self.level}, debug_updates {self._debug_left}, alerts: {alerts})"

    @property
    def level(self) -> Level:
        """Level of this iteration: the chosen one, or debug for a while after an alert."""
        return "debug" if self._debug_left and self._chosen == "normal" else self._chosen

    def get_state(self) -> dict[str, Any]:
        """Return what later metrics and alerts depend on."""
        return {
            "debug_left": self._debug_left,
            "environment": self.environment.get_state(),
            "never_grow": self.never_grow.get_state(),
            "alerts": self.alerts.get_state(),
            "trends": {"totals": self._trends.totals, "counts": self._trends.counts},
            "change": self._change,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from the result of `get_state`."""
        self._debug_left = state["debug_left"]
        self.environment.set_state(state["environment"])
        self.never_grow.set_state(state["never_grow"])
        self.alerts.set_state(state["alerts"])
        self._trends = Trends(**state["trends"])
        change = state["change"]
        self._change = None if change is None else [t.to(self._device) for t in change]

    def watch_update(self, network: Watched, settings: UpdateSettings) -> UpdateWatch:
        """Return the collector of the coming update."""
        limits = self.alerts.limits.ratio_low, self.alerts.limits.ratio_high
        return UpdateWatch(network, self.level, settings, limits, self.clock, self._change)

    def finish(
        self,
        metrics: dict[str, float],
        watch: UpdateWatch,
        iteration: int,
        num_iterations: int,
        obs: torch.Tensor,
    ) -> None:
        """Complete the metrics of an iteration, in place, and evaluate the detectors.

        Args:
            metrics: Metrics of the update and of the training loop.
            watch: Collector of the update.
            iteration: Number of iterations, this one included.
            num_iterations: Iterations of the whole training.
            obs: Observations of the rollout. (num_steps, num_envs, num_features) float32.
        """
        num_steps = obs.shape[0] * obs.shape[1]
        step, progress = iteration * num_steps, min(1.0, iteration / num_iterations)
        level, self._change = self.level, watch.change
        with self.clock.measure("telemetry"):
            figures, self.events = self.environment.finish(level, step, obs.cpu().numpy())
            metrics |= figures
            if has_level(level, "normal"):
                metrics |= self._system(num_steps) | self._trends_of(metrics)
                raised = self.alerts.evaluate(step, metrics, progress)
                self._set_level(raised)
                metrics["telemetry/level"] = float(LEVELS.index(level))
                metrics["telemetry/debug_updates"] = float(self._debug_left)
                metrics["telemetry/alerts"] = float(len(self.alerts.open))
                self.events += raised
                if watch.worst:
                    self.events.append(RatiosFound(step=step, transitions=watch.worst))
                self.events.append(Updated(step=step, iteration=iteration, level=level))
        wrong = {name: value for name, value in metrics.items() if not math.isfinite(value)}
        shown = [f"{name} is {value}" for name, value in wrong.items()][:MOST_SHOWN]
        more = [f"{len(wrong) - len(shown)} more metrics"] if len(wrong) > len(shown) else []
        self.problems = self.problems[:MOST_SHOWN] + shown + more
        if self.problems:
            self.events.append(raised_nonfinite(step, self.problems))

    def _set_level(self, events: list[Event]) -> None:
        """Count down the updates at level debug; an alert starts the count."""
        self._debug_left = max(0, self._debug_left - 1)
        if any(isinstance(event, AlertRaised) for event in events):
            self._debug_left = self.debug_updates

    def _trends_of(self, metrics: dict[str, float]) -> dict[str, float]:
        """Return trends, and figures of the last updates."""
        result: dict[str, float] = {}
        for name, value in metrics.items():
            if name in TRENDS or name.startswith("gradients/norm/"):
                result |= self._trends.update(name, value)
        rows = [*self.alerts.past, metrics][-LAST_UPDATES:]
        cosines = [row["update/cosine"] for row in rows if "update/cosine" in row]
        if len(cosines) >= FEWEST:
            result["update/oscillation"] = float(np.mean(np.array(cosines) < 0))
        pairs = np.array(
            [[row["losses/gradient_norm"], row["charts/learning_rate"]] for row in rows]
        )
        if len(rows) >= FEWEST and (pairs.std(axis=0) > 0).all():
            result["gradients/rate_correlation"] = float(np.corrcoef(pairs.T)[0, 1])
        return result

    def _system(self, num_steps: int) -> dict[str, float]:
        """Return speed, time and memory since the last iteration."""
        now = time.perf_counter()
        elapsed, self._began = now - self._began, now
        metrics = {"system/SPS": num_steps / elapsed}
        seconds, self.clock.seconds = self.clock.seconds, {}
        for part in PARTS:
            metrics[f"time/{part}"] = seconds.get(part, 0.0) / elapsed
        metrics["system/memory"] = float(psutil.Process().memory_info().rss)
        total = psutil.virtual_memory().total
        metrics["system/memory_share"] = metrics["system/memory"] / total
        return metrics | device_memory(self._device)


def device_memory(device: torch.device) -> dict[str, float]:
    """Return the memory in use on a CUDA device; nothing for other devices. [bytes]."""
    if device.type != "cuda":
        return {}
    reserved = torch.cuda.memory_reserved(device)
    return {
        "system/device_memory": float(torch.cuda.memory_allocated(device)),
        "system/device_reserved": float(reserved),
        "system/device_peak": float(torch.cuda.max_memory_allocated(device)),
        "system/device_share": reserved / torch.cuda.get_device_properties(device).total_memory,
    }
