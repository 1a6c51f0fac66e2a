"""Figures of one update: collected as tensors, with one copy to the host at the end."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from esper_agent.telemetry import gradients
from esper_agent.telemetry.activations import (
    CORE_FIGURES,
    core_figures,
    dormant_share,
    effective_rank,
)
from esper_agent.telemetry.metrics import Level, find, has_level

WORST = 10
"""Transitions with extreme ratios that level debug records per update."""
VARIANCE_FLOOR = 1e-8
"""Variance of the returns above which the explained variance means something."""
_WEIGHT_OF_HASH = 0x9E3779B1
_BITS_OF_HASH = 48


def kl_estimate(logratio: Tensor) -> Tensor:
    """Return the KL divergence (ratio - 1) - log ratio of each step, which is never negative.

    Source: Schulman (2020), Approximating KL divergence, estimator k3.
    """
    return (logratio.exp() - 1) - logratio


class Watched(Protocol):
    """Network whose updates are watched."""

    lstm: nn.LSTM
    recurrent: bool
    heads: dict[str, list[Any]]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return all weights by name."""

    def weight_groups(self) -> dict[str, list[tuple[Tensor, slice]]]:
        """Return weights, and their rows, by part of the network.

        A group is named like a head if only this head depends on it. The groups "encoder" and
        "core" are shared by policy and critic.
        """

    def activations(
        self, obs: Tensor, lstm_state: tuple[Tensor, Tensor], dones: Tensor
    ) -> dict[str, Tensor]:
        """Return outputs of ReLU layers, and the features of the heads as "core"."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of the update that figures refer to."""

    clip_coef: float
    max_grad_norm: float
    ratio_low: float
    """Smallest joint ratio that the detector allows."""
    ratio_high: float
    """Largest joint ratio that the detector allows."""


@dataclass(kw_only=True)
class Clock:
    """Wall time by part of the program; a part that starts inside another one pauses it."""

    seconds: dict[str, float] = field(default_factory=dict)
    _stack: list[str] = field(default_factory=list)
    _since: float = 0.0

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time of the enclosed block to a part. [seconds]."""
        self._add()
        self._stack.append(part)
        try:
            yield
        finally:
            self._add()
            self._stack.pop()

    def _add(self) -> None:
        now = time.perf_counter()
        if self._stack:
            part = self._stack[-1]
            self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now


class UpdateWatch:
    """Collects figures during one update.

    Call `begin` once, then `before_backward`, `before_clipping` and `after_minibatch` for each
    minibatch, and `finish` once. Training does not depend on the level.

    Args:
        network: Network to watch.
        level: Level of detail.
        limits: Limits of the update.
        clock: Clock to which the time spent here is added.
        change_before: Change of each weight by the update before, if known.
    """

    def __init__(
        self,
        network: Watched,
        level: Level,
        limits: Limits,
        clock: Clock,
        change_before: list[Tensor] | None = None,
    ) -> None:
        self.level = level
        self.change = change_before
        self.worst: tuple[dict[str, Any], ...] = ()
        """Transitions with the most extreme ratios (level debug)."""
        self._network, self._limits, self._clock = network, limits, clock
        self._weights = dict(network.named_parameters())
        self._groups = network.weight_groups()
        self._shared = [w for name in ("encoder", "core") for w, _ in self._groups[name]]
        self._figures: dict[str, Tensor] = {}
        self._rows: list[dict[str, Tensor]] = []
        self._tensors: list[Tensor] = []
        self._transitions: list[Tensor] = []
        self._before = [w.detach().clone() for w in self._weights.values()] if self._is_on else []
        self._first_epoch: list[Tensor] = []
        self._num_summed = 0

    @property
    def _is_on(self) -> bool:
        return has_level(self.level, "normal")

    @property
    def _is_debug(self) -> bool:
        return has_level(self.level, "debug")

    # ------------------------------------------------------------------ before the first epoch

    def begin(
        self,
        *,
        advantages: Tensor,
        returns: Tensor,
        values: Tensor,
        td_errors: Tensor,
        entropies: Tensor,
        num_legal: Tensor,
        states: Mapping[str, Any],
    ) -> None:
        """Collect the figures that do not change during the update.

        Args:
            advantages: Before normalization. (num_steps, num_envs) float32.
            returns: Advantages plus values, from scaled rewards. (num_steps, num_envs) float32.
            values: V before the update. (num_steps, num_envs) float32.
            td_errors: r + gamma * V(s') - V(s). (num_steps, num_envs) float32.
            entropies: Entropy of each head. (num_steps, num_envs, num_heads) float32.
            num_legal: Legal options of each head. (num_steps, num_envs, num_heads).
            states: "obs", "lstm_state" and "dones" of some sequences; "next_obs" and
                "next_lstm_state" after the rollout.
        """
        with self._clock.measure("telemetry"), torch.no_grad():
            figures, heads = self._figures, self._network.heads
            has_choice = num_legal > 1
            variance, error = returns.var(), returns - values
            figures["losses/explained_variance"] = 1 - error.var() / variance.clamp(min=1e-12)
            for name, share in zip(heads, has_choice.float().mean((0, 1)), strict=True):
                figures[f"choice/{name}"] = share
            self._states = states
            if not self._is_on:
                return
            if self._network.recurrent:
                self._add_core("core")
            figures["choice/none"] = (~has_choice).all(-1).float().mean()
            # log(1) = 0 never divides: such a head has no choice.
            shares = entropies / num_legal.clamp(min=2).log()
            total = (shares * has_choice).flatten(0, 1).sum(0)
            mean_shares = total / has_choice.flatten(0, 1).sum(0)
            for name, share in zip(heads, mean_shares, strict=True):
                figures[f"entropy_share/{name}"] = share
            mean, std = advantages.mean(), advantages.std()
            standard = (advantages - mean) / std.clamp(min=1e-12)
            figures["advantages/mean"], figures["advantages/std"] = mean, std
            figures["advantages/skew"] = standard.pow(3).mean()
            figures["advantages/kurtosis"] = standard.pow(4).mean() - 3
            figures["advantages/positive"] = (advantages > 0).float().mean()
            figures["returns/mean"], figures["returns/std"] = returns.mean(), variance.sqrt()
            shares = torch.tensor([0.1, 0.5, 0.9], device=returns.device)
            for name, value in zip(("p10", "p50", "p90"), returns.quantile(shares), strict=True):
                figures[f"returns/{name}"] = value
            figures["critic/is_valid"] = (variance > VARIANCE_FLOOR).float()
            figures["critic/rmse"] = error.square().mean().sqrt() / variance.sqrt().clamp(min=1e-6)
            figures["critic/value_mean"] = values.mean()
            correlation = gradients.correlation(values.flatten(), returns.flatten())
            figures["critic/correlation"] = correlation.nan_to_num()
            figures["critic/td_error"] = td_errors.abs().mean()

    # ------------------------------------------------------------------ each minibatch

    def before_backward(self, losses: Mapping[str, Tensor]) -> None:
        """Collect the gradients of each loss on the weights that policy and critic share.

        At level normal this is done for the first minibatch, at level debug for all.

        Args:
            losses: "policy", "value" and "entropy", with their coefficients and signs.
        """
        if not self._is_on or (self._rows and not self._is_debug):
            return
        with self._clock.measure("telemetry"):
            names, parts = list(losses), {}
            for name, loss in losses.items():
                # A loss that does not depend on a weight has gradient 0 there.
                parts[name] = torch.autograd.grad(
                    loss, self._shared, retain_graph=True, materialize_grads=True
                )
            self._separate = {f"gradients/{n}_norm": gradients.norm(parts[n]) for n in names}
            for i, first in enumerate(names):
                for second in names[i + 1 :]:
                    cosine = gradients.cosine(parts[first], parts[second])
                    self._separate[f"gradients/{first}_{second}_cosine"] = cosine

    def before_clipping(self, is_first_epoch: bool) -> None:
        """Collect figures of the gradient of one minibatch, before it is clipped."""
        self._gradient_figures: dict[str, Tensor] = {}
        if not self._is_on:
            return
        with self._clock.measure("telemetry"), torch.no_grad():
            found = [w.grad for w in self._weights.values() if w.grad is not None]
            figures = self._gradient_figures
            for name, group in self._groups.items():
                rows = [w.grad[part] for w, part in group if w.grad is not None]
                figures[f"gradients/norm/{name}"] = gradients.norm(rows)
            if not self._rows or self._is_debug:
                figures["gradients/negative"] = gradients.negative_share(found)
                figures["gradients/concentration"] = gradients.concentration(found)
                figures["gradients/sparsity"] = gradients.sparsity(found)
                figures |= self._separate
            if is_first_epoch:
                if not self._first_epoch:
                    self._first_epoch = [torch.zeros_like(g) for g in found]
                for total, gradient in zip(self._first_epoch, found, strict=True):
                    total.add_(gradient)
                self._num_summed += 1
            if self._is_debug:
                limit = self._limits.max_grad_norm
                self._tensors.append(
                    torch.stack([gradients.tensor_figures(g, limit) for g in found])
                )

    def after_minibatch(
        self,
        *,
        losses: Mapping[str, Tensor],
        head_entropies: Tensor,
        gradient_norm: Tensor,
        head_logratios: Tensor,
        has_choice: Tensor,
        advantages: Tensor,
        transitions: Mapping[str, Tensor],
        envs: Tensor,
    ) -> None:
        """Collect the figures of one minibatch.

        Args:
            losses: Scalars by the name of their metric without "losses/".
            head_entropies: Mean entropy of each head. (num_heads,) float32.
            gradient_norm: Norm before clipping. () float32.
            head_logratios: Log-probability minus that of the old policy, of each head.
                (num_steps, minibatch envs, num_heads) float32.
            has_choice: True where a head had a choice. (num_steps, minibatch envs, num_heads) bool.
            advantages: Normalized advantages. (num_steps, minibatch envs) float32.
            transitions: "obs", "actions" and "old_logprobs" of all sub-environments.
            envs: Sub-environments of the minibatch. (minibatch envs,) int64.
        """
        with self._clock.measure("telemetry"), torch.no_grad():
            limits, heads = self._limits, self._network.heads
            logratio = head_logratios.sum(-1)
            ratio = logratio.exp()
            row = {f"losses/{name}": loss.detach() for name, loss in losses.items()}
            row["losses/approx_kl"] = kl_estimate(logratio).mean()
            row["losses/clipfrac"] = ((ratio - 1).abs() > limits.clip_coef).float().mean()
            row["losses/gradient_norm"] = gradient_norm
            for name, entropy in zip(heads, head_entropies.detach(), strict=True):
                row[f"entropy/{name}"] = entropy
            if not self._rows:
                self._figures["losses/first_ratio_error"] = (ratio - 1).abs().max()
            if self._is_on:
                self._add_policy(row, head_logratios, ratio)
                row["gradients/clipped_norm"] = gradient_norm.clamp(max=limits.max_grad_norm)
                row["gradients/clipped"] = (gradient_norm > limits.max_grad_norm).float()
                row["spread"] = advantages.std()
                # A head without a choice has no gradient, which is not the same as gradient 0.
                for name, chosen in zip(heads, has_choice.flatten(0, 1).any(0), strict=True):
                    norm = self._gradient_figures[f"gradients/norm/{name}"]
                    self._gradient_figures[f"gradients/norm/{name}"] = torch.where(
                        chosen, norm, torch.nan
                    )
                row |= self._gradient_figures
                if self._rows and not self._is_debug:
                    # One row of figures was computed in the first minibatch.
                    missing = self._rows[0].keys() - row.keys()
                    row |= {name: row["spread"].new_tensor(math.nan) for name in missing}
                    row = {name: row[name] for name in self._rows[0]}
            if self._is_debug and self._rows:
                self._add_transitions(
                    head_logratios, ratio, advantages, gradient_norm, transitions, envs
                )
            self._rows.append(row)

    def _add_policy(self, row: dict[str, Tensor], head_logratios: Tensor, ratio: Tensor) -> None:
        """Add figures of the ratios of one minibatch to a row."""
        limits = self._limits
        head_ratios = head_logratios.exp()
        kls = kl_estimate(head_logratios).mean((0, 1))
        clipped = ((head_ratios - 1).abs() > limits.clip_coef).float().mean((0, 1))
        largest = head_ratios.amax((0, 1))
        for h, name in enumerate(self._network.heads):
            row[f"kl/{name}"], row[f"clipping/{name}"] = kls[h], clipped[h]
            row[f"ratio/max/{name}"] = largest[h]
        row["clipping/above"] = (ratio > 1 + limits.clip_coef).float().mean()
        row["clipping/below"] = (ratio < 1 - limits.clip_coef).float().mean()
        row["ratio/mean"], row["ratio/std"] = ratio.mean(), ratio.std()
        row["ratio/min"], row["ratio/max"] = ratio.min(), ratio.max()
        is_extreme = (ratio < limits.ratio_low) | (ratio > limits.ratio_high)
        row["ratio/extreme"] = is_extreme.float().mean()

    def _add_transitions(
        self,
        head_logratios: Tensor,
        ratio: Tensor,
        advantages: Tensor,
        gradient_norm: Tensor,
        transitions: Mapping[str, Tensor],
        envs: Tensor,
    ) -> None:
        """Remember the transitions of one minibatch with the most extreme ratios."""
        width = ratio.shape[1]
        extremity = ratio.log().abs().flatten()
        at = extremity.topk(min(WORST, len(extremity))).indices
        step, column = at // width, at % width
        env = envs[column]
        obs, old = transitions["obs"][step, env], transitions["old_logprobs"][step, env]
        # A sum of products of the bits, which float64 holds exactly.
        factors = torch.arange(1, 2 * obs.shape[-1], 2, device=obs.device) * _WEIGHT_OF_HASH
        hashes = (obs.view(torch.int32).long() * factors).sum(-1) & ((1 << _BITS_OF_HASH) - 1)
        single = [
            extremity[at], hashes, step, env, ratio[step, column], advantages[step, column],
            gradient_norm.expand(len(at)),
        ]  # fmt: skip
        several = [transitions["actions"][step, env], old, old + head_logratios[step, column]]
        columns = [part.double()[:, None] for part in single] + [part.double() for part in several]
        self._transitions.append(torch.cat(columns, dim=1))

    # ------------------------------------------------------------------ after the last epoch

    def finish(
        self,
        *,
        epochs: float,
        num_minibatches: int,
        sequences: int,
        checked: Mapping[str, Tensor],
    ) -> tuple[dict[str, float], list[str]]:
        """Return the metrics of the update, and descriptions of what is not finite.

        Args:
            epochs: Epochs that were run.
            num_minibatches: Minibatches per epoch.
            sequences: Sequences of the rollout.
            checked: Tensors that must be finite, by name, besides the weights.
        """
        with self._clock.measure("telemetry"), torch.no_grad():
            figures = self._figures
            self._reduce_rows()
            if self._is_on:
                self._add_change(num_minibatches, sequences)
                self._add_activations()
            everything = {f"weight {name}": weight for name, weight in self._weights.items()}
            everything |= checked
            is_finite = torch.stack([t.isfinite().all() for t in everything.values()]).all()
            tensors = [t.double().flatten() for t in self._tables()]
            names = list(figures)
            sizes = [len(names), 1, *(len(t) for t in tensors)]
            scalars = torch.stack([value.double() for value in figures.values()])
            # The only copy to the host.
            values = torch.cat([scalars, is_finite.double()[None], *tensors]).tolist()
            problems = [] if values[sizes[0]] else _find_nonfinite(everything)
            pairs = zip(names, values[: sizes[0]], strict=True)
            metrics = {n: v for n, v in pairs if not (math.isnan(v) and find(n).is_optional)}
            if self._is_on:
                metrics["update/epochs"] = epochs
            self._unpack(metrics, values[sizes[0] + 1 :])
        return metrics, problems

    def _reduce_rows(self) -> None:
        """Reduce the rows of all minibatches to one figure for each name."""
        names = list(self._rows[0])
        # (minibatches, figures)
        table = torch.stack([torch.stack(list(row.values())) for row in self._rows]).double()
        means, present = table.mean(0), table.nanmean(0)
        after_first = table[1:] if len(table) > 1 else table
        low, high = after_first.amin(0), after_first.amax(0)
        for k, name in enumerate(names):
            if name == "spread":
                continue
            if name == "ratio/min":
                value = low[k]
            elif name.startswith("ratio/max"):
                value = high[k]
            else:
                is_partial = find(name).is_optional or name in self._once
                value = present[k] if is_partial else means[k]
            self._figures[name] = value
        if self._is_on:
            norms = table[:, names.index("losses/gradient_norm")]
            spread = table[:, names.index("spread")]
            self._figures["gradients/spread_correlation"] = gradients.correlation(norms, spread)
            self._norms = norms

    @property
    def _once(self) -> set[str]:
        """Names of figures that level normal computes for the first minibatch only."""
        once = {"gradients/negative", "gradients/concentration", "gradients/sparsity"}
        return once | {f"gradients/{name}_norm" for name in ("policy", "value", "entropy")}

    def _add_change(self, num_minibatches: int, sequences: int) -> None:
        """Add figures of the change of the weights by this update."""
        figures, weights = self._figures, [w.detach() for w in self._weights.values()]
        change = [after - before for after, before in zip(weights, self._before, strict=True)]
        figures["plasticity/weight_norm"] = gradients.norm(weights)
        figures["update/to_weight"] = gradients.norm(change) / figures["plasticity/weight_norm"]
        unknown = figures["update/to_weight"].new_tensor(math.nan)
        known = self.change
        figures["update/cosine"] = gradients.cosine(change, known) if known else unknown
        self.change = change
        figures["gradients/noise_scale"] = unknown
        if num_minibatches > 1 and self._num_summed == num_minibatches:
            mean = [total / num_minibatches for total in self._first_epoch]
            figures["gradients/noise_scale"] = gradients.noise_scale(
                self._norms[:num_minibatches].square().mean(),
                gradients.norm(mean).double().square(),
                sequences // num_minibatches,
                sequences,
            )

    def _add_activations(self) -> None:
        """Add figures of the recurrent core and of plasticity, with the updated weights."""
        network, figures, states = self._network, self._figures, self._states
        layers = network.activations(states["obs"], states["lstm_state"], states["dones"])
        figures["plasticity/effective_rank"] = effective_rank(layers.pop("core"))
        figures["plasticity/dormant"] = dormant_share(layers)
        if network.recurrent:
            self._add_core("core_after")

    def _add_core(self, prefix: str) -> None:
        """Add figures of the recurrent core in one step after the rollout."""
        obs, state = self._states["next_obs"], self._states["next_lstm_state"]
        no_done = torch.zeros(1, obs.shape[0], dtype=torch.bool, device=obs.device)
        x = self._network.activations(obs[None], state, no_done)["encoder"][0]
        values = core_figures(self._network.lstm, x, state)
        for name, value in zip(CORE_FIGURES, values, strict=True):
            self._figures[f"{prefix}/{name}"] = value

    def _tables(self) -> list[Tensor]:
        """Return the tables of level debug: transitions, and figures of each tensor."""
        if not self._is_debug:
            return []
        rows = torch.stack(self._tensors).double()
        # (minibatches, tensors, figures) -> (tensors, figures)
        table = rows.mean(0)
        table[:, 1], table[:, 2] = rows[..., 1].amin(0), rows[..., 2].amax(0)
        table[:, 5] = rows[..., 5].sum(0)
        if not self._transitions:
            return [table]
        found = torch.cat(self._transitions)
        return [table, found[found[:, 0].topk(min(WORST, len(found))).indices]]

    def _unpack(self, metrics: dict[str, float], values: list[float]) -> None:
        """Read the tables of level debug from the host's copy."""
        if not self._is_debug:
            return
        names = [name for name, w in self._weights.items() if w.grad is not None]
        for tensor in names:
            for figure in gradients.TENSOR_FIGURES:
                metrics[f"tensor/{figure}/{tensor}"] = values.pop(0)
        heads = list(self._network.heads)
        width = 7 + 3 * len(heads)
        worst = []
        for first in range(0, len(values), width):
            _, digest, step, env, ratio, advantage, norm, *rest = values[first : first + width]
            parts = [rest[k::1][: len(heads)] for k in range(0, len(rest), len(heads))]
            worst.append(
                {
                    "member": int(env),
                    "at": int(step),
                    "ratio": ratio,
                    "advantage": advantage,
                    "gradient_norm": norm,
                    "observation": f"{int(digest):012x}",
                    "action": dict(zip(heads, map(int, parts[0]), strict=True)),
                    "old_logprob": dict(zip(heads, parts[1], strict=True)),
                    "new_logprob": dict(zip(heads, parts[2], strict=True)),
                }
            )
        self.worst = tuple(worst)


def _find_nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return a description of each tensor with elements that are not finite."""
    found = []
    for name, tensor in tensors.items():
        wrong = (~tensor.isfinite()).nonzero()
        if len(wrong):
            first = tuple(wrong[0].tolist())
            value = float(tensor[first])
            found.append(f"{name} has {len(wrong)} elements not finite, first {value} at {first}")
    return found
