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
_FACTOR_OF_HASH = 0x9E3779B1
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

    def encode(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input of the core, and other encodings."""

    def activations(
        self, obs: Tensor, lstm_state: tuple[Tensor, Tensor], dones: Tensor
    ) -> dict[str, Tensor]:
        """Return outputs of ReLU layers, and the features of the heads as "core"."""


class Experience(Protocol):
    """Experience of one rollout; tensors are (num_steps, num_envs, ...)."""

    @property
    def obs(self) -> Tensor:
        """Observations."""

    @property
    def dones(self) -> Tensor:
        """True where the step before ended an episode."""

    @property
    def actions(self) -> Tensor:
        """Option of each head."""

    @property
    def rewards(self) -> Tensor:
        """Unscaled rewards."""

    @property
    def lstm_state(self) -> tuple[Tensor, Tensor]:
        """LSTM state before the first step."""


class UpdateSettings(Protocol):
    """Settings of PPO that figures refer to."""

    @property
    def num_minibatches(self) -> int:
        """Minibatches per epoch."""

    @property
    def update_epochs(self) -> int:
        """Epochs of an update that is not stopped early."""

    @property
    def clip_coef(self) -> float:
        """Clipping range of the ratio."""

    @property
    def max_grad_norm(self) -> float:
        """Norm that gradients are clipped to."""


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
        settings: Settings of the update.
        ratios: Smallest and largest joint ratio that the detectors allow.
        clock: Clock to which the time spent here is added.
        change_before: Change of each weight by the update before, if known.
    """

    def __init__(
        self,
        network: Watched,
        level: Level,
        settings: UpdateSettings,
        ratios: tuple[float, float],
        clock: Clock,
        change_before: list[Tensor] | None = None,
    ) -> None:
        self.change = change_before
        """Change of each weight by the last update that was watched."""
        self.worst: tuple[dict[str, Any], ...] = ()
        """Transitions with the most extreme ratios (level debug)."""
        self._network, self._settings, self._clock = network, settings, clock
        self._ratios = ratios
        self._is_on, self._is_debug = has_level(level, "normal"), has_level(level, "debug")
        self._weights = dict(network.named_parameters())
        self._groups = network.weight_groups()
        self._shared = [w for name in ("encoder", "core") for w, _ in self._groups[name]]
        self._before = [w.detach().clone() for w in self._weights.values()] if self._is_on else []
        self._figures: dict[str, Tensor] = {}
        self._minibatches: list[tuple[Tensor, ...]] = []
        """Sub-environments, scalars, entropies and log-ratios of each head, of each minibatch."""
        self._directions: list[dict[str, Tensor]] = []
        """Norms and cosines of the gradients of parts of the loss, minibatch by minibatch."""
        self._tensors: list[Tensor] = []
        """Figures of each weight in the first minibatch of each epoch (level debug)."""
        self._mean_gradient: list[Tensor] = []
        """Mean gradient over the first epoch."""

    # ------------------------------------------------------------------ before the first epoch

    def begin(
        self,
        rollout: Experience,
        next_state: tuple[Tensor, tuple[Tensor, Tensor]],
        logprobs: Tensor,
        entropies: Tensor,
        num_legal: Tensor,
        values: Tensor,
        returns: Tensor,
        td_errors: Tensor,
        advantages: Tensor,
        normalized: Tensor,
    ) -> None:
        """Collect the figures that do not change during the update.

        Args:
            rollout: Experience to learn from.
            next_state: Observations and LSTM state after the rollout.
            logprobs: Log-probability of each head's option before the update.
                (num_steps, num_envs, num_heads) float32, as the next two.
            entropies: Entropy of each head.
            num_legal: Legal options of each head.
            values: V before the update. (num_steps, num_envs) float32, as all that follow.
            returns: Advantages plus values, from scaled rewards.
            td_errors: r + gamma * V(s') - V(s).
            advantages: Advantages before normalization.
            normalized: Advantages after it.
        """
        with self._clock.measure("telemetry"), torch.no_grad():
            self._rollout, self._next_state = rollout, next_state
            self._logprobs, self._normalized = logprobs, normalized
            figures, heads = self._figures, self._network.heads
            variance, error = returns.var(), returns - values
            figures["losses/explained_variance"] = 1 - error.var() / variance.clamp(min=1e-12)
            has_choice = num_legal > 1
            # (steps, envs, heads) -> (heads,)
            self._choice = has_choice.float().mean((0, 1))
            figures |= {f"choice/{n}": c for n, c in zip(heads, self._choice, strict=True)}
            if not self._is_on:
                return
            figures["choice/none"] = (~has_choice).all(-1).float().mean()
            # log(1) = 0 never divides: such a head has no choice.
            shares = entropies / num_legal.clamp(min=2).log()
            shares = (shares * has_choice).sum((0, 1)) / has_choice.sum((0, 1))
            figures |= {f"entropy_share/{n}": x for n, x in zip(heads, shares, strict=True)}
            mean, std = advantages.mean(), advantages.std()
            standard = (advantages - mean) / std.clamp(min=1e-12)
            figures["advantages/mean"], figures["advantages/std"] = mean, std
            figures["advantages/skew"] = standard.pow(3).mean()
            figures["advantages/kurtosis"] = standard.pow(4).mean() - 3
            figures["advantages/positive"] = (advantages > 0).float().mean()
            figures["returns/mean"], figures["returns/std"] = returns.mean(), variance.sqrt()
            levels = torch.tensor([0.1, 0.5, 0.9], device=returns.device)
            for name, value in zip(("p10", "p50", "p90"), returns.quantile(levels), strict=True):
                figures[f"returns/{name}"] = value
            figures["critic/is_valid"] = (variance > VARIANCE_FLOOR).float()
            figures["critic/rmse"] = error.square().mean().sqrt() / variance.sqrt().clamp(min=1e-6)
            figures["critic/value_mean"] = values.mean()
            correlation = gradients.correlation(values.flatten(), returns.flatten())
            figures["critic/correlation"] = correlation.nan_to_num()
            figures["critic/td_error"] = td_errors.abs().mean()
            self._add_core("core")

    # ------------------------------------------------------------------ each minibatch

    def _is_watched(self) -> bool:
        """Return True for the first minibatch, and at level debug for those of the first epoch."""
        is_first_epoch = len(self._minibatches) < self._settings.num_minibatches
        return self._is_on and (is_first_epoch if self._is_debug else not self._minibatches)

    def before_backward(self, policy: Tensor, value: Tensor, entropy: Tensor) -> None:
        """Collect the gradients of parts of the loss on the weights that all of them share.

        At level normal this is done for the first minibatch, at level debug for those of the first
        epoch: two more backward passes for each minibatch would take a sixth of the training time.

        Args:
            policy: Policy loss.
            value: Value loss with its coefficient.
            entropy: Entropy bonus with its coefficient and sign.
        """
        del value  # Its gradient is what is left of the whole.
        if not self._is_watched():
            return
        with self._clock.measure("telemetry"):
            # A loss that does not depend on a weight has gradient 0 there.
            self._policy, self._entropy = (
                torch.autograd.grad(loss, self._shared, retain_graph=True, materialize_grads=True)
                for loss in (policy, entropy)
            )

    def before_clipping(self) -> None:
        """Collect figures of the gradient of one minibatch, before it is clipped."""
        is_first_epoch = len(self._minibatches) < self._settings.num_minibatches
        if not (self._is_watched() or (self._is_on and is_first_epoch)):
            return
        with self._clock.measure("telemetry"), torch.no_grad():
            found = [w.grad for w in self._weights.values() if w.grad is not None]
            if self._is_watched():
                self._add_directions()
            if not self._minibatches:
                self._add_elements(found)
            if is_first_epoch:
                if not self._mean_gradient:
                    self._mean_gradient = [torch.zeros_like(w) for w in self._weights.values()]
                for total, weight in zip(self._mean_gradient, self._weights.values(), strict=True):
                    if weight.grad is not None:
                        total.add_(weight.grad, alpha=1 / self._settings.num_minibatches)
            if self._is_debug and len(self._minibatches) % self._settings.num_minibatches == 0:
                limit = self._settings.max_grad_norm
                rows = [gradients.tensor_figures(g, limit) for g in found]
                self._tensors.append(torch.stack(rows))

    def _add_directions(self) -> None:
        """Collect norms and cosines of the gradients of parts of the loss."""
        whole = [w.grad if w.grad is not None else torch.zeros_like(w) for w in self._shared]
        parts = zip(whole, self._policy, self._entropy, strict=True)
        value = [total - policy - entropy for total, policy, entropy in parts]
        self._directions.append(
            {
                "gradients/policy_norm": gradients.norm(self._policy),
                "gradients/value_norm": gradients.norm(value),
                "gradients/entropy_norm": gradients.norm(self._entropy),
                "gradients/policy_value_cosine": gradients.cosine(self._policy, value),
                "gradients/policy_entropy_cosine": gradients.cosine(self._policy, self._entropy),
                "gradients/value_entropy_cosine": gradients.cosine(value, self._entropy),
            }
        )

    def _add_elements(self, found: list[Tensor]) -> None:
        """Collect figures of the elements of a gradient."""
        figures = self._figures
        figures["gradients/negative"] = gradients.negative_share(found)
        figures["gradients/concentration"] = gradients.concentration(found).nan_to_num()
        figures["gradients/sparsity"] = gradients.sparsity(found)

    def after_minibatch(
        self,
        envs: Tensor,
        policy_loss: Tensor,
        value_loss: Tensor,
        entropy: Tensor,
        total_loss: Tensor,
        gradient_norm: Tensor,
        head_entropies: Tensor,
        head_logratios: Tensor,
    ) -> None:
        """Remember the results of one minibatch.

        Args:
            envs: Sub-environments of the minibatch. (minibatch envs,) int64.
            policy_loss: () float32, as the next four.
            value_loss: Without its coefficient.
            entropy: Without its coefficient.
            total_loss: Loss whose gradient was taken.
            gradient_norm: Norm of the gradient before clipping.
            head_entropies: Mean entropy of each head. (num_heads,) float32.
            head_logratios: Log-probability minus that of the old policy, of each head.
                (num_steps, minibatch envs, num_heads) float32.
        """
        scalars = torch.stack([policy_loss, value_loss, entropy, total_loss, gradient_norm])
        heads = head_entropies.detach(), head_logratios.detach()
        self._minibatches.append((envs, scalars.detach(), *heads))

    # ------------------------------------------------------------------ after the last epoch

    def finish(self) -> tuple[dict[str, float], list[str]]:
        """Return the metrics of the update, and what is not finite in words."""
        with self._clock.measure("telemetry"), torch.no_grad():
            # Sizes of minibatches are equal, so the mean over all is that of the means.
            stacked = [torch.stack(column) for column in zip(*self._minibatches, strict=True)]
            envs, scalars, head_entropies, head_logratios = stacked
            self._add_losses(scalars, head_entropies, head_logratios)
            tables: list[Tensor] = []
            if self._is_on:
                self._add_policy(head_logratios)
                self._add_gradients(scalars[:, 4], envs)
                self._add_change()
                self._add_activations()
            if self._is_debug:
                tables = [self._table_of_tensors(), self._table_of_transitions(*stacked)]
            everything: dict[str, Tensor] = {f"weight {n}": w for n, w in self._weights.items()}
            everything["observations"] = self._rollout.obs
            everything["rewards"] = self._rollout.rewards
            is_finite = torch.stack([t.isfinite().all() for t in everything.values()]).all()
            single = torch.stack([value.double() for value in self._figures.values()])
            joined = [single, is_finite.double()[None], *(t.double().flatten() for t in tables)]
            # The only copy to the host.
            values = torch.cat(joined).tolist()
            count = len(self._figures)
            problems = [] if values[count] else _find_nonfinite(everything)
            pairs = zip(self._figures, values[:count], strict=True)
            metrics = {n: v for n, v in pairs if not (math.isnan(v) and find(n).is_optional)}
            if self._is_on:
                epochs = len(self._minibatches) / self._settings.num_minibatches
                metrics["update/epochs"] = epochs
                metrics["update/stopped_early"] = float(epochs < self._settings.update_epochs)
            if self._is_debug:
                self._unpack(metrics, values[count + 1 :])
        return metrics, problems

    def _add_losses(self, scalars: Tensor, head_entropies: Tensor, logratios: Tensor) -> None:
        """Add the figures of level off."""
        figures, means = self._figures, scalars.double().mean(0)
        names = "policy_loss", "value_loss", "entropy", "total_loss", "gradient_norm"
        figures |= {f"losses/{n}": mean for n, mean in zip(names, means, strict=True)}
        entropies = head_entropies.double().mean(0)
        figures |= {f"entropy/{n}": x for n, x in zip(self._network.heads, entropies, strict=True)}
        logratio = logratios.sum(-1)
        self._ratio = logratio.exp()
        distance = (self._ratio - 1).abs()
        figures["losses/approx_kl"] = kl_estimate(logratio).mean()
        figures["losses/clipfrac"] = (distance > self._settings.clip_coef).float().mean()
        figures["losses/first_ratio_error"] = distance[0].max()

    def _add_policy(self, logratios: Tensor) -> None:
        """Add figures of the probability ratios; `logratios` is (minibatches, ..., num_heads)."""
        figures, ratio = self._figures, self._ratio
        clip_coef, (low, high) = self._settings.clip_coef, self._ratios
        head_ratios, over = logratios.exp(), (0, 1, 2)
        kls = kl_estimate(logratios).mean(over)
        clipped = ((head_ratios - 1).abs() > clip_coef).float().mean(over)
        largest = head_ratios.amax(over)
        for h, name in enumerate(self._network.heads):
            figures[f"kl/{name}"], figures[f"clipping/{name}"] = kls[h], clipped[h]
            figures[f"ratio/max/{name}"] = largest[h]
        figures["clipping/above"] = (ratio > 1 + clip_coef).float().mean()
        figures["clipping/below"] = (ratio < 1 - clip_coef).float().mean()
        # In the first minibatch all ratios are 1.
        later = ratio[1:] if len(ratio) > 1 else ratio
        figures["ratio/mean"], figures["ratio/std"] = later.mean(), later.std()
        figures["ratio/min"], figures["ratio/max"] = later.min(), later.max()
        is_extreme = (later < low) | (later > high)
        figures["ratio/extreme"] = is_extreme.float().mean()

    def _add_gradients(self, norms: Tensor, envs: Tensor) -> None:
        """Add figures of the gradients, given their norms and sub-environments by minibatch."""
        figures, limit = self._figures, self._settings.max_grad_norm
        figures["gradients/clipped_norm"] = norms.clamp(max=limit).mean()
        figures["gradients/clipped"] = (norms > limit).float().mean()
        # (steps, minibatches, minibatch envs) -> (minibatches,)
        spread = self._normalized[:, envs].std((0, 2))
        figures["gradients/spread_correlation"] = gradients.correlation(norms, spread)
        for name in self._directions[0]:
            column = torch.stack([row[name] for row in self._directions])
            figures[name] = column.nanmean() if find(name).is_optional else column.mean()
        mean = dict(zip(map(id, self._weights.values()), self._mean_gradient, strict=True))
        heads = list(self._network.heads)
        unknown = norms.new_tensor(math.nan)
        for name, group in self._groups.items():
            norm = gradients.norm([mean[id(weight)][rows] for weight, rows in group])
            if name in heads:
                # A head without a choice has no gradient, which is not the same as gradient 0.
                norm = torch.where(self._choice[heads.index(name)] > 0, norm, unknown)
            figures[f"gradients/norm/{name}"] = norm
        figures["gradients/noise_scale"] = unknown
        count, sequences = self._settings.num_minibatches, self._rollout.obs.shape[1]
        if 1 < count <= len(norms):
            small = norms[:count].square().mean()
            big = gradients.norm(self._mean_gradient).square()
            scale = gradients.noise_scale(small, big, sequences // count, sequences)
            figures["gradients/noise_scale"] = scale

    def _add_change(self) -> None:
        """Add figures of the change of the weights by this update."""
        figures, weights = self._figures, [w.detach() for w in self._weights.values()]
        change = [after - before for after, before in zip(weights, self._before, strict=True)]
        figures["plasticity/weight_norm"] = gradients.norm(weights)
        figures["update/to_weight"] = gradients.norm(change) / figures["plasticity/weight_norm"]
        unknown = figures["update/to_weight"].new_tensor(math.nan)
        known = self.change
        figures["update/cosine"] = gradients.cosine(change, known) if known else unknown
        self.change = change

    def _add_activations(self) -> None:
        """Add figures of the recurrent core and of plasticity, with the updated weights."""
        network, figures, rollout = self._network, self._figures, self._rollout
        # A part of the sequences is enough, and cheaper.
        some = slice(max(1, rollout.obs.shape[1] // self._settings.num_minibatches))
        h, c = (part[:, some] for part in rollout.lstm_state)
        layers = network.activations(rollout.obs[:, some], (h, c), rollout.dones[:, some])
        figures["plasticity/effective_rank"] = effective_rank(layers.pop("core"))
        figures["plasticity/dormant"] = dormant_share(layers)
        self._add_core("core_after")

    def _add_core(self, prefix: str) -> None:
        """Add figures of the recurrent core in one step after the rollout, if there is one."""
        if not self._network.recurrent:
            return
        obs, lstm_state = self._next_state
        values = core_figures(self._network.lstm, self._network.encode(obs)[0], lstm_state)
        for name, value in zip(CORE_FIGURES, values, strict=True):
            self._figures[f"{prefix}/{name}"] = value

    # ------------------------------------------------------------------ level debug

    def _table_of_tensors(self) -> Tensor:
        """Return the figures of the gradient of each weight. (weights, figures) float32."""
        rows = torch.stack(self._tensors)
        # (epochs, weights, figures) -> (weights, figures)
        table = rows.mean(0)
        table[:, 1], table[:, 2] = rows[..., 1].amin(0), rows[..., 2].amax(0)
        table[:, 5] = rows[..., 5].sum(0)
        return table

    def _table_of_transitions(
        self, envs: Tensor, scalars: Tensor, head_entropies: Tensor, head_logratios: Tensor
    ) -> Tensor:
        """Return the transitions with the most extreme ratios. (transitions, columns) float64."""
        del head_entropies
        extremity = head_logratios.sum(-1).abs()
        at = extremity.flatten().topk(min(WORST, extremity.numel())).indices
        # (minibatches, steps, minibatch envs)
        minibatch, step, column = torch.unravel_index(at, extremity.shape)
        env = envs[minibatch, column]
        obs, old = self._rollout.obs[step, env], self._logprobs[step, env]
        # Products of the bits, of which float64 holds the last 48 bits exactly.
        factors = torch.arange(1, 2 * obs.shape[-1], 2, device=obs.device) * _FACTOR_OF_HASH
        hashes = (obs.view(torch.int32).long() * factors).sum(-1) & ((1 << _BITS_OF_HASH) - 1)
        single = [
            *(minibatch, step, env, hashes, self._ratio[minibatch, step, column]),
            *(self._normalized[step, env], scalars[minibatch, 4]),
        ]
        new = old + head_logratios[minibatch, step, column]
        several = [self._rollout.actions[step, env], old, new]
        columns = [part.double()[:, None] for part in single] + [part.double() for part in several]
        return torch.cat(columns, dim=1)

    def _unpack(self, metrics: dict[str, float], values: list[float]) -> None:
        """Read both tables from the host's copy."""
        names = [name for name, weight in self._weights.items() if weight.grad is not None]
        values = values[::-1]
        for tensor in names:
            for figure in gradients.TENSOR_FIGURES:
                metrics[f"tensor/{figure}/{tensor}"] = values.pop()
        values = values[::-1]
        heads = list(self._network.heads)
        worst, width = [], 7 + 3 * len(heads)
        for first in range(0, len(values), width):
            minibatch, step, env, digest, ratio, advantage, norm = values[first : first + 7]
            rest = values[first + 7 : first + width]
            parts = [rest[k : k + len(heads)] for k in range(0, len(rest), len(heads))]
            worst.append(
                {
                    "member": int(env),
                    "at": int(step),
                    "minibatch": int(minibatch),
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
