"""Categorical distributions of which some options are illegal."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class MaskedCategorical:
    """Categorical distributions over legal options; an illegal option has probability 0.

    A distribution with one legal option has log-probability 0, entropy 0 and no gradient. Logits
    and mask (True is legal) are (..., num_options).
    """

    def __init__(self, logits: Tensor, mask: Tensor) -> None:
        self.logits, self.mask = logits, mask

    def mode(self) -> Tensor:
        """Return the most likely option. (...) int64."""
        return self.logits.masked_fill(~self.mask, -torch.inf).argmax(-1)

    def sample(self, gumbel: Tensor) -> Tensor:
        """Sample by the Gumbel-max trick, given the noise (..., num_options). (...) int64."""
        return MaskedCategorical(self.logits + gumbel, self.mask).mode()

    def log_prob(self, option: Tensor) -> Tensor:
        """Return the log-probability of an option (...) int64. (...) float32."""
        return self._log_probs.gather(0, option[None]).squeeze(0)

    def entropy(self) -> Tensor:
        """Return the entropy [nats]. (...) float32."""
        # exp is slow where it underflows, so an illegal option gets 0 here: exp(0) * 0 = 0.
        log_probs = self._log_probs * self._legal
        return -(log_probs.exp() * log_probs).sum(0)

    def has_choice(self) -> Tensor:
        """Return True for distributions with more than one legal option. (...) bool."""
        return self._legal.sum(0) > 1

    # (..., num_options) -> (num_options, ...): softmax is ten times as fast over a leading axis.

    @cached_property
    def _legal(self) -> Tensor:
        return self.mask.movedim(-1, 0).contiguous().float()

    @cached_property
    def _log_probs(self) -> Tensor:
        # Adding the lowest number gives the lowest number, and is faster than a masked fill.
        lowest = torch.finfo(torch.float32).min
        return (self.logits.float().movedim(-1, 0) + (1 - self._legal) * lowest).log_softmax(0)
