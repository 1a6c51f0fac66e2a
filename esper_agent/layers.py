"""Parts of the agent: masked distributions, an LSTM over cut sequences, and initial weights."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

LstmState = tuple[Tensor, Tensor]
"""Hidden state and cell. (1, num_envs, hidden_size) each."""


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

    def num_legal(self) -> Tensor:
        """Return the number of legal options. (...) float32."""
        return self._legal.sum(0)

    # (..., num_options) -> (num_options, ...): softmax is ten times as fast over a leading axis.

    @cached_property
    def _legal(self) -> Tensor:
        return self.mask.movedim(-1, 0).contiguous().float()

    @cached_property
    def _log_probs(self) -> Tensor:
        # Adding the lowest number gives the lowest number, and is faster than a masked fill.
        lowest = torch.finfo(torch.float32).min
        return (self.logits.float().movedim(-1, 0) + (1 - self._legal) * lowest).log_softmax(0)


def run_lstm(lstm: nn.LSTM, x: Tensor, lstm_state: LstmState, dones: Tensor) -> Tensor:
    """Run an LSTM over sequences in one call, with a zero state after the end of an episode.

    Args:
        lstm: LSTM with one layer.
        x: (num_steps, num_envs, num_features).
        lstm_state: State before the first step.
        dones: True where the step before ended an episode. (num_steps, num_envs) bool.

    Returns:
        (num_steps, num_envs, hidden_size).
    """
    num_steps, num_envs = dones.shape
    keep = (~dones[0])[None, :, None].to(x.dtype)
    h, c = lstm_state[0] * keep, lstm_state[1] * keep
    if not dones[1:].any():
        output: Tensor = lstm(x, (h, c))[0]
        return output
    # One call cannot reset the state halfway. So sequences are cut where episodes start, and the
    # pieces run in parallel, padded to the longest.
    is_cut = dones.clone()
    is_cut[0] = True
    # (steps, envs, features) -> (envs * steps, features): a piece is a range of consecutive rows.
    flat = x.transpose(0, 1).reshape(num_steps * num_envs, -1)
    env, step = is_cut.T.nonzero(as_tuple=True)
    first = env * num_steps + step
    length = torch.diff(first, append=first.new_tensor([num_steps * num_envs]))
    # (longest piece, pieces)
    offset = torch.arange(int(length.max()), device=x.device)[:, None]
    is_inside = offset < length
    row = (first + offset).clamp_(max=num_steps * num_envs - 1)
    # Only a piece at step 0 continues an episode.
    carries = (step == 0)[:, None].to(x.dtype)
    output = lstm(flat[row], ((h[0, env] * carries)[None], (c[0, env] * carries)[None]))[0]
    # (longest piece, pieces, hidden_size) -> (envs * steps, hidden_size) -> (steps, envs, ...)
    joined = output.new_zeros(num_steps * num_envs, output.shape[-1])
    joined = joined.index_put((row[is_inside],), output[is_inside])
    return joined.view(num_envs, num_steps, -1).transpose(0, 1)


def layer_init(layer: nn.Linear, std: float = 2**0.5) -> nn.Linear:
    """Initialize a layer with orthogonal weights and zero biases, and return it."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer
