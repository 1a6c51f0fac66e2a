"""Recurrent PPO with factored, conditionally masked actions, in one file.

Order: arguments, network, advantages, rollout, update, checkpoint, training. It uses only public
names of `esper_env`. Run `python -m esper_agent.ppo_lstm --help`.

Sources: PPO, Schulman et al. (2017); GAE, Schulman et al. (2016); implementation details, Huang et
al. (2022); bootstrapping at truncation, Pardo et al. (2018).

Metrics, one row per update in `metrics.jsonl` and TensorBoard:
    charts/episode_score        mean committed score of the episodes that ended (validation)
    charts/episode_return       mean undiscounted return of those episodes
    charts/episode_parameters   mean parameters of their seeds at the end
    charts/valid_share          share of actions that were legal
    charts/learning_rate        of this update
    charts/ent_coef             weight of the entropy in this update
    charts/steps_per_second     env steps per second since the start
    losses/policy, losses/value the clipped surrogate (negated), half the squared value error
    losses/kl                   joint KL over heads, mean of (ratio - 1) - log ratio
    losses/clip_fraction        share of steps whose ratio left 1 +- clip_coef
    losses/explained_variance   1 - var(return - value) / var(return)
    losses/first_ratio_error    largest |ratio - 1| in the first minibatch
    losses/variance_left        share of the advantages' variance after the group's baseline
    losses/gradient_norm        before clipping, mean over minibatches
    entropy/<head>              mean over the steps where the head had a choice [nats]
    choice/<head>               share of steps where it had one
    time/rollout, time/update   seconds in the environment and policy, and in the update
    time/policy_share           share of wall time in inference and update
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
import tyro
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from esper_env import EnvConfig, EsperVectorEnv

# ---------------------------------------------------------------------------------- arguments


TRAINING = EnvConfig(
    instances="train",
    horizon="terminal",
    gamma=1.0,
    heads={
        "op": ["WAIT", "GERMINATE", "ADVANCE", "PRUNE", "FOSSILIZE"],
        "style": ["LINEAR_ADD"],
        "tempo": [3],
        "alpha_target": [1.0],
        "alpha_speed": [0],
        "alpha_curve": ["LINEAR"],
    },
)
"""What an agent is trained with by default; the evidence is in docs/results.md.

The budget is observed, so its end is a true end, and without a discount the rewards sum to the
objective. The heads that say how a seed is blended have one option each: what remains is when,
where and what to grow, keep or remove."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Train a recurrent PPO agent, then evaluate it beside the baselines."""

    env_id: str = "Esper-Digits-v0"
    """Environment id."""
    env: EnvConfig = field(default_factory=lambda: TRAINING)
    """Settings of the environment; those that differ from their default are passed on."""
    seed: int = 1
    """Random seed of the agent and of the training episodes."""
    device: str = "cpu"
    """Device of the environment and of the agent."""
    run_dir: Path | None = None
    """Where to write; by default runs/<env id>__ppo_lstm__<seed>__<time>."""
    total_timesteps: int = 288_000
    """Env steps over all members."""
    num_envs: int = 16
    """Members that train side by side."""
    num_steps: int = 60
    """Env steps per member and update; the episode's length lets sequences be whole episodes."""
    learning_rate: float = 2e-3
    """Of Adam at the start."""
    anneal_lr: bool = True
    """Whether the learning rate falls linearly to 0."""
    gamma: float = 1.0
    """Discount factor; must equal the environment's (`--env.gamma`)."""
    gae_lambda: float = 0.97
    """Lambda of generalised advantage estimation."""
    group_size: int = 4
    """Members that share their reset seeds: same host at birth, images and instance. What their
    advantages have in common is luck that no action caused, and is subtracted; 1 for none."""
    num_minibatches: int = 4
    """Minibatches per epoch; each is a shuffled set of whole sequences."""
    update_epochs: int = 4
    """Passes over the rollout per update."""
    clip_coef: float = 0.2
    """Clipping of the probability ratio."""
    ratio: Literal["joint", "per-head"] = "joint"
    """Whether one ratio is clipped per action, or one per head that had a choice."""
    ent_coef: float = 0.01
    """Weight of the entropy, summed over heads, at the start."""
    anneal_entropy: bool = False
    """Whether that weight falls linearly to 0."""
    vf_coef: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Gradient clipping."""
    target_kl: float | None = None
    """Joint KL above which an update stops early."""
    hidden_size: int = 128
    """Width of the network and of the LSTM."""
    recurrent: bool = True
    """Whether the LSTM remembers earlier steps; otherwise each starts from a zero state."""
    eval_episodes: int = 64
    """Episodes per agent in the final evaluation; 0 leaves it out."""
    eval_seed: int = 1_000_000
    """First reset seed of the final evaluation, far from the training seeds."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("num_envs", "num_steps", "num_minibatches", "update_epochs", "hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.eval_episodes < 0:
            raise ValueError(f"eval_episodes: expected at least 0, got {self.eval_episodes}")
        if self.target_kl is not None and self.target_kl <= 0:
            raise ValueError(f"target_kl: expected None or above 0, got {self.target_kl}")
        if self.group_size < 1 or self.num_envs % self.group_size:
            raise ValueError(
                f"group_size: expected a divisor of num_envs={self.num_envs}, got {self.group_size}"
            )
        if self.num_envs % self.num_minibatches:
            raise ValueError(
                f"num_minibatches: expected a divisor of num_envs={self.num_envs} (a minibatch is "
                f"a set of whole sequences), got {self.num_minibatches}"
            )
        if self.total_timesteps < self.num_envs * self.num_steps:
            raise ValueError(
                f"total_timesteps: expected at least num_envs * num_steps = "
                f"{self.num_envs * self.num_steps}, got {self.total_timesteps}"
            )

    @property
    def num_updates(self) -> int:
        """Rollouts in the run."""
        return self.total_timesteps // (self.num_envs * self.num_steps)


def make_envs(env_id: str, num_envs: int, device: str, config: EnvConfig) -> EsperVectorEnv:
    """Make the vector environment; only settings that differ from their default are passed."""
    default = EnvConfig()
    names = [f.name for f in dataclasses.fields(config)]
    changed = {n: getattr(config, n) for n in names if getattr(config, n) != getattr(default, n)}
    if "episode_steps" in changed:
        changed["max_episode_steps"] = config.episode_steps
    envs = gym.make_vec(
        env_id, num_envs=num_envs, device=device, autoreset_mode="SameStep", **changed
    )
    assert isinstance(envs.unwrapped, EsperVectorEnv)
    return envs.unwrapped


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread; a block or a decorator. The environment keeps its threads.

    Matrices of 16 x 128 gain little from a second thread, and two that wait for each other at every
    step of the LSTM lose much where a core is busy (docs/speed.md). Results do not depend on how
    many there are.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


# ---------------------------------------------------------------------------------- network


def pad_masks(masks: dict[str, npt.NDArray[np.bool_]], device: torch.device) -> Tensor:
    """Return the environment's conditional masks as one tensor; True is legal.

    Returns:
        (envs, ops, slots, heads, largest head) bool, padded with False. The row of a head says what
        is legal given the op and the slot; that of op is the same for all of them, that of slot for
        all slots.
    """
    op, slot, *rest = masks.values()
    heads = [op[:, None, None], slot[:, :, None], *rest]
    width = max(mask.shape[-1] for mask in heads)
    padded = np.zeros((*slot.shape, len(heads), width), dtype=bool)
    for h, mask in enumerate(heads):
        padded[..., h, : mask.shape[-1]] = mask
    return torch.from_numpy(padded).to(device)


class Agent(nn.Module):
    """Slot encoder shared over slots, LSTM core, critic, and autoregressive heads.

    Heads: op from the core; slot from core, slot encodings and op; all others from these and the
    slot. All have as many logits as the largest head; those past a head's options are never legal.

    Args:
        observation_names: Names of the features: the episode's, then slot by slot with the prefix
            "slot_<s>.".
        nvec: Options per head; the first head is op, the second slot.
        hidden_size: Width of encoder output, core and heads.
        recurrent: Whether the core remembers earlier steps.
    """

    def __init__(
        self,
        observation_names: tuple[str, ...],
        nvec: tuple[int, ...],
        hidden_size: int,
        recurrent: bool = True,
    ) -> None:
        super().__init__()
        self.nvec = nvec
        self.hidden_size = hidden_size
        self.recurrent = recurrent
        episode = [n for n in observation_names if "." not in n]
        slots = list(dict.fromkeys(n.split(".")[0] for n in observation_names if "." in n))
        features = list(dict.fromkeys(n.split(".")[1] for n in observation_names if "." in n))
        in_order = (*episode, *(f"{slot}.{feature}" for slot in slots for feature in features))
        assert observation_names == in_order, "observation: expected episode, then slot by slot"
        self.num_episode, self.num_slots, slot_size = len(episode), len(slots), 32
        self.num_rest, self.width = len(nvec) - 2, max(nvec)
        self.slot_encoder = nn.Sequential(_linear(len(features), slot_size), nn.ReLU())
        self.encoder = nn.Sequential(
            _linear(len(episode) + len(slots) * slot_size, hidden_size), nn.ReLU()
        )
        self.lstm = nn.LSTM(hidden_size, hidden_size)
        for name, parameter in self.lstm.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
            else:
                nn.init.orthogonal_(parameter)
        self.critic = nn.Sequential(_linear(hidden_size, 64), nn.ReLU(), _linear(64, 1, gain=1.0))
        self.op_head = _linear(hidden_size, self.width, gain=0.01)
        self.op_embedding = nn.Embedding(nvec[0], 64)
        self.core_to_joint = _linear(hidden_size, 64)
        self.slots_to_joint = _linear(len(slots) * slot_size, 64)
        self.slot_head = _linear(64, self.width, gain=0.01)
        self.slot_embedding = nn.Embedding(nvec[1], 64)
        self.rest_head = _linear(64, self.num_rest * self.width, gain=0.01)

    def initial_state(self, num_envs: int) -> tuple[Tensor, Tensor]:
        """Return the LSTM state at the start of an episode, (1, num_envs, hidden) twice."""
        zeros = torch.zeros(1, num_envs, self.hidden_size, device=self.op_head.weight.device)
        return zeros, zeros.clone()

    def step_core(
        self, observations: Tensor, state: tuple[Tensor, Tensor], starts: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Run encoder and core for one env step.

        Args:
            observations: (envs, features).
            state: LSTM state, (1, envs, hidden) twice.
            starts: Whether an episode begins with this observation. (envs,) bool.

        Returns:
            core (envs, hidden), slot encodings (envs, slots * size), next state.
        """
        x, slots = self._encode(observations)
        hidden, cell = state[0][0], state[1][0]
        if not self.recurrent:
            starts = torch.ones_like(starts)
        if starts.any():
            hidden, cell = (part.masked_fill(starts[:, None], 0.0) for part in (hidden, cell))
        # The bare cell, without what nn.LSTM prepares for a sequence.
        hidden, cell = torch.lstm_cell(x, (hidden, cell), *self.lstm.all_weights[0])
        return hidden + x, slots, (hidden[None], cell[None])

    def sequence_core(
        self, observations: Tensor, state: tuple[Tensor, Tensor], starts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run encoder and core over whole sequences in one LSTM call.

        Args:
            observations: (steps, envs, features).
            state: LSTM state before the first step.
            starts: (steps, envs) bool.

        Returns:
            core (steps, envs, hidden), slot encodings (steps, envs, slots * size).
        """
        x, slots = self._encode(observations)
        if not self.recurrent:
            starts = torch.ones_like(starts)
        return run_lstm(self.lstm, x, state, starts) + x, slots

    def value(self, core: Tensor) -> Tensor:
        """Return V(s). (..., hidden) -> (...)."""
        value: Tensor = self.critic(core).squeeze(-1)
        return value

    def act(
        self, core: Tensor, slots: Tensor, masks: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Choose actions for one env step.

        Args:
            core: (envs, hidden).
            slots: (envs, slots * size).
            masks: From `pad_masks`.
            generator: Source of randomness; None takes the likeliest option of each head.

        Returns:
            actions (envs, heads) int64, and the masks along the way (envs, heads, width) bool.
        """
        rows = torch.arange(len(core), device=core.device)
        noise = _gumbel((len(core), len(self.nvec), self.width), core.device, generator)
        op = _choose(self.op_head(core) + noise[:, 0], masks[:, 0, 0, 0])
        joint = self._joint(core, slots, op)
        slot = _choose(self.slot_head(joint) + noise[:, 1], masks[rows, op, 0, 1])
        along = masks[rows, op, slot]
        rest = _choose(self._rest_logits(joint, slot) + noise[:, 2:], along[:, 2:])
        return torch.cat([op[:, None], slot[:, None], rest], dim=1), along

    def evaluate_actions(
        self, core: Tensor, slots: Tensor, actions: Tensor, masks: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities, entropies and where each head had a choice.

        A head with one legal option has log-probability 0, entropy 0 and no gradient.

        Args:
            core: (..., hidden).
            slots: (..., slots * size).
            actions: (..., heads).
            masks: Along the choice. (..., heads, width) bool.

        Returns:
            Three tensors (..., heads): float32, float32, bool.
        """
        op, slot = actions[..., 0], actions[..., 1]
        joint = self._joint(core, slots, op)
        op_logits, slot_logits = self.op_head(core), self.slot_head(joint)
        rest_logits = self._rest_logits(joint, slot)
        logits = torch.cat([op_logits[..., None, :], slot_logits[..., None, :], rest_logits], -2)
        # (width, ..., heads): over a leading dimension softmax is vectorised and takes a tenth.
        logits = logits.float().movedim(-1, 0)
        legal = masks.movedim(-1, 0).contiguous().float()
        # A sum with the lowest number is the lowest number. Masked fills are slower.
        log_probs = (logits + (1 - legal) * torch.finfo(torch.float32).min).log_softmax(0)
        chosen = log_probs.gather(0, actions[None]).squeeze(0)
        # exp is slow where it underflows. An illegal option becomes 0 here, and exp(0) * 0 = 0.
        log_probs = log_probs * legal
        return chosen, -(log_probs.exp() * log_probs).sum(0), legal.sum(0) > 1

    def _encode(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Return the core's input (..., hidden) and the slot encodings (..., slots * size)."""
        episode = observations[..., : self.num_episode]
        blocks = observations[..., self.num_episode :]
        blocks = blocks.reshape(*blocks.shape[:-1], self.num_slots, -1)
        slots = self.slot_encoder(blocks).flatten(-2)
        return self.encoder(torch.cat([episode, slots], dim=-1)), slots

    def _joint(self, core: Tensor, slots: Tensor, op: Tensor) -> Tensor:
        """Combine core, slot encodings and the chosen op. (..., 64)."""
        mixed = self.core_to_joint(core) + self.slots_to_joint(slots) + self.op_embedding(op)
        return torch.relu(mixed)

    def _rest_logits(self, joint: Tensor, slot: Tensor) -> Tensor:
        """(..., heads - 2, width)."""
        logits: Tensor = self.rest_head(torch.relu(joint + self.slot_embedding(slot)))
        return logits.view(*logits.shape[:-1], self.num_rest, self.width)


@one_thread()
def make_agent(envs: EsperVectorEnv, hidden_size: int, seed: int, recurrent: bool = True) -> Agent:
    """Build an agent for an environment; global random state stays as it was."""
    nvec = tuple(len(head.options) for head in envs.heads)
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed CUDA too, which is not forked.
        torch.default_generator.manual_seed(seed)
        return Agent(envs.observation_names, nvec, hidden_size, recurrent)


def make_optimizer(agent: Agent, args: Args) -> torch.optim.Optimizer:
    """Return Adam at the first learning rate; fused, which takes a third of the time on a CPU."""
    return torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)


def run_lstm(lstm: nn.LSTM, x: Tensor, state: tuple[Tensor, Tensor], starts: Tensor) -> Tensor:
    """Run an LSTM over sequences in one call, from a zero state wherever an episode starts.

    Sequences are cut at the starts and the pieces run side by side, padded to the longest.

    Args:
        lstm: One layer, time first.
        x: (steps, envs, features).
        state: State before the first step. (1, envs, hidden) twice.
        starts: (steps, envs) bool.

    Returns:
        (steps, envs, hidden).
    """
    num_steps, num_envs = starts.shape
    keep = (~starts[0])[None, :, None].to(x.dtype)
    hidden, cell = state[0] * keep, state[1] * keep
    if not starts[1:].any():
        out: Tensor = lstm(x, (hidden, cell))[0]
        return out
    is_cut = starts.clone()
    is_cut[0] = True
    # In env-major order every piece is a contiguous range of positions.
    env, begin = is_cut.T.nonzero(as_tuple=True)
    first = env * num_steps + begin
    length = torch.diff(first, append=first.new_tensor([num_steps * num_envs]))
    offset = torch.arange(int(length.max()), device=x.device)[:, None]
    is_inside = offset < length
    position = (first + offset).clamp_(max=num_steps * num_envs - 1)
    flat = x.transpose(0, 1).reshape(num_steps * num_envs, -1)
    carries = (begin == 0)[:, None].to(x.dtype)
    start = ((hidden[0, env] * carries)[None], (cell[0, env] * carries)[None])
    padded, _ = lstm(flat[position], start)
    joined = padded.new_zeros(num_steps * num_envs, padded.shape[-1])
    joined = joined.index_put((position[is_inside],), padded[is_inside])
    in_order: Tensor = joined.view(num_envs, num_steps, -1).transpose(0, 1)
    return in_order


def _linear(size: int, out: int, gain: float = 2**0.5) -> nn.Linear:
    layer = nn.Linear(size, out)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def _gumbel(
    shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """Return Gumbel noise, -log of an exponential, or zeros without a generator.

    The option with the largest sum of logit and noise is a draw from the softmax of the logits.
    """
    if generator is None:
        return torch.zeros(shape, device=device)
    return torch.empty(shape, device=device).exponential_(generator=generator).log_().neg_()


def _choose(scores: Tensor, mask: Tensor) -> Tensor:
    """Return the legal option with the highest score, over the last dimension."""
    return scores.masked_fill(~mask, -torch.inf).argmax(-1)


# ---------------------------------------------------------------------------------- advantages


def compute_gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminations: Tensor,
    truncations: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Return generalised advantages.

    delta_t = r_t + gamma * V(s') - V(s_t), with V(s') = 0 at a termination and the value of the
    observation before the reset at a truncation; the sum over deltas stops at both.

    Args:
        rewards: (steps, envs).
        values: V of the observation acted on. (steps, envs).
        next_values: V of the observation that the step led to, before any reset. (steps, envs).
        terminations: (steps, envs) bool.
        truncations: (steps, envs) bool.
        gamma: Discount factor.
        gae_lambda: Weight of later deltas.

    Returns:
        (steps, envs).
    """
    carries = gamma * gae_lambda * ~(terminations | truncations)
    deltas = rewards + gamma * next_values * (~terminations) - values
    advantages = list(deltas)
    for t in reversed(range(len(deltas) - 1)):
        advantages[t] = deltas[t] + carries[t] * advantages[t + 1]
    return torch.stack(advantages)


def subtract_group_baseline(advantages: Tensor, group_size: int) -> tuple[Tensor, float]:
    """Subtract from each advantage what the other members of its group had in the same step.

    The others' advantages do not depend on the member's own action, so this changes the variance
    of the policy gradient and not its mean. The baseline is their mean, times the coefficient that
    fits best in this rollout (which brings in a bias of the order of 1 / samples).

    Source: baselines that know the environment's luck, Mao et al. (2019); the mean over the others,
    Kool et al. (2019); the coefficient of a control variate, Greensmith et al. (2004).

    Args:
        advantages: (steps, envs).
        group_size: Members of a group lie side by side.

    Returns:
        Advantages (steps, envs), and the share of their variance that is left.
    """
    own = advantages.view(len(advantages), -1, group_size)
    if group_size == 1:
        return advantages, 1.0
    others = (own.sum(-1, keepdim=True) - own) / (group_size - 1)
    others = others - others.mean()
    coefficient = (own * others).mean() / others.square().mean().clamp(min=1e-12)
    result = (own - coefficient * others).flatten(1)
    return result, float(result.var() / advantages.var().clamp(min=1e-12))


class ReturnScale:
    """Standard deviation of discounted returns, in float64. Single-threaded use.

    Source: Welford's update merged by batches, Chan et al. (1983), equations 2.1.
    """

    def __init__(self, num_envs: int, gamma: float) -> None:
        self.gamma = gamma
        self.returns = np.zeros(num_envs)
        self.count, self.mean, self.m2 = 0, 0.0, 0.0

    def update(self, rewards: npt.NDArray[np.float64], is_over: npt.NDArray[np.bool_]) -> None:
        """Take in one env step. Both arrays are (num_envs,)."""
        self.returns = self.gamma * self.returns + rewards
        count = len(self.returns)
        mean = float(self.returns.mean())
        delta, total = mean - self.mean, self.count + count
        self.m2 += float(((self.returns - mean) ** 2).sum())
        self.m2 += delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count = total
        self.returns[is_over] = 0.0

    @property
    def std(self) -> float:
        """Standard deviation so far; 1 before there are two numbers or if they are all equal."""
        if self.count < 2 or self.m2 <= 0:
            return 1.0
        return float(np.sqrt(self.m2 / self.count))


# ---------------------------------------------------------------------------------- rollout


@dataclass(frozen=True)
class Rollout:
    """What one rollout saw and did. Tensors are (steps, envs, ...)."""

    observations: Tensor
    actions: Tensor
    masks: Tensor
    """Along the choice. (steps, envs, heads, width) bool."""
    starts: Tensor
    """Whether an episode begins with the observation."""
    rewards: Tensor
    """As the environment gave them. float64."""
    terminations: Tensor
    truncations: Tensor
    state: tuple[Tensor, Tensor]
    """LSTM state before the first step."""
    next_values: Tensor
    """V of the observation that each step led to; filled at truncations and on the last step."""


class Collector:
    """Steps the environment with the agent and keeps what goes on between rollouts."""

    def __init__(self, envs: EsperVectorEnv, agent: Agent, args: Args) -> None:
        self.envs, self.agent, self.args = envs, agent, args
        self.device = torch.device(args.device)
        self.generator = torch.Generator(self.device).manual_seed(args.seed)
        seeds: list[int | None] = [args.seed + i // args.group_size for i in range(args.num_envs)]
        self.observation, _ = envs.reset(seed=seeds)
        self.start = np.ones(args.num_envs, dtype=bool)
        self.state = agent.initial_state(args.num_envs)
        self.scale = ReturnScale(args.num_envs, args.gamma)
        self.running_return = np.zeros(args.num_envs)
        self.env_seconds = 0.0
        """Wall time spent inside the environment."""

    def collect(self) -> tuple[Rollout, dict[str, list[float]]]:
        """Run `num_steps` env steps.

        Returns:
            The rollout, and per finished episode its score, return and parameters.
        """
        first_state = self.state
        steps: list[dict[str, npt.NDArray[Any]]] = []
        masks: list[Tensor] = []
        next_values = torch.zeros(self.args.num_steps, self.args.num_envs, device=self.device)
        episodes: dict[str, list[float]] = {
            "score": [],
            "return": [],
            "parameters": [],
            "valid": [],
        }
        for t in range(self.args.num_steps):
            actions, along = self._act()
            began = time.perf_counter()
            observation, reward, terminated, truncated, info = self.envs.step(actions)
            self.env_seconds += time.perf_counter() - began
            is_over = terminated | truncated
            self.running_return += reward
            reached, is_valid = observation, info["action_valid"]
            if is_over.any():
                reached = observation.copy()
                reached[is_over] = np.stack(info["final_obs"][is_over].tolist())
                is_valid = np.where(is_over, info["final_info"]["action_valid"], is_valid)
                self._record(episodes, info["final_info"], is_over)
            episodes["valid"].extend(is_valid.tolist())
            if truncated.any() or t == self.args.num_steps - 1:
                next_values[t] = self._value(reached)
            self.scale.update(reward, is_over)
            masks.append(along)
            steps.append(
                {
                    "observations": self.observation,
                    "actions": actions,
                    "starts": self.start,
                    "rewards": reward,
                    "terminations": terminated,
                    "truncations": truncated,
                }
            )
            self.observation, self.start = observation, is_over
        fields: dict[str, Any] = {
            name: self._tensor(np.stack([step[name] for step in steps])) for name in steps[0]
        }
        fields |= {"masks": torch.stack(masks), "state": first_state, "next_values": next_values}
        return Rollout(**fields), episodes

    @torch.inference_mode()
    @one_thread()
    def _act(self) -> tuple[npt.NDArray[np.int64], Tensor]:
        """Choose actions by the present observations; also return the masks along the way."""
        core, slots, self.state = self.agent.step_core(
            self._tensor(self.observation), self.state, self._tensor(self.start)
        )
        masks = pad_masks(self.envs.conditional_masks(), self.device)
        actions, along = self.agent.act(core, slots, masks, self.generator)
        return actions.cpu().numpy(), along

    @torch.inference_mode()
    @one_thread()
    def _value(self, reached: npt.NDArray[np.float32]) -> Tensor:
        """Return V of observations that the last step led to, before any reset."""
        no_start = torch.zeros(len(reached), dtype=torch.bool, device=self.device)
        core, _, _ = self.agent.step_core(self._tensor(reached), self.state, no_start)
        return self.agent.value(core)

    def _record(
        self,
        episodes: dict[str, list[float]],
        final_info: dict[str, Any],
        is_over: npt.NDArray[np.bool_],
    ) -> None:
        """Note finished episodes and start their returns anew."""
        episodes["score"].extend(final_info["committed_score"][is_over].tolist())
        episodes["return"].extend(self.running_return[is_over].tolist())
        episodes["parameters"].extend(final_info["parameters"][is_over].tolist())
        self.running_return[is_over] = 0.0

    def _tensor(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device)


# ---------------------------------------------------------------------------------- update


def replay(agent: Agent, rollout: Rollout, envs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the training path over whole sequences of some envs.

    Returns:
        log-probabilities, entropies, choices (steps, envs, heads), and values (steps, envs).
    """
    state = (rollout.state[0][:, envs], rollout.state[1][:, envs])
    core, slots = agent.sequence_core(rollout.observations[:, envs], state, rollout.starts[:, envs])
    log_probs, entropies, choices = agent.evaluate_actions(
        core, slots, rollout.actions[:, envs], rollout.masks[:, envs]
    )
    return log_probs, entropies, choices, agent.value(core)


def policy_loss(
    log_ratio: Tensor, choices: Tensor, advantages: Tensor, clip_coef: float, ratio: str
) -> Tensor:
    """Return the negated clipped surrogate.

    "joint" clips one ratio per action, the product over heads. "per-head" clips one ratio per head
    that had a choice, sums over heads, and divides by the number of steps for all of them.

    Args:
        log_ratio: (steps, envs, heads).
        choices: Where a head had a choice. (steps, envs, heads) bool.
        advantages: (steps, envs).
        clip_coef: Half width of the clipping range.
        ratio: "joint" or "per-head".
    """
    if ratio == "joint":
        log_ratio = log_ratio.sum(-1, keepdim=True)
        choices = torch.ones_like(log_ratio, dtype=torch.bool)
    ratios = log_ratio.exp()
    gain = advantages[..., None]
    surrogate = torch.minimum(ratios * gain, ratios.clamp(1 - clip_coef, 1 + clip_coef) * gain)
    return -(surrogate * choices).sum(-1).mean()


def mean_entropies(entropies: Tensor, choices: Tensor) -> Tensor:
    """Return the mean entropy of each head over the steps where it had a choice. (heads,)."""
    total = (entropies * choices).flatten(0, 1).sum(0)
    return total / choices.flatten(0, 1).sum(0).clamp(min=1)


@one_thread()
def update(
    agent: Agent,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    scale: float,
    args: Args,
    generator: torch.Generator,
    head_names: list[str],
    ent_coef: float,
) -> dict[str, float]:
    """Improve the agent on one rollout and return metrics.

    Old log-probabilities and values are recomputed by the training path first, so the ratio of the
    first minibatch is 1 and advantages belong to the values that are regressed. `ent_coef` is the
    present weight of the entropy.
    """
    num_envs = rollout.rewards.shape[1]
    everyone = torch.arange(num_envs, device=rollout.rewards.device)
    with torch.no_grad():
        old_log_probs, _, all_choices, values = replay(agent, rollout, everyone)
        next_values = rollout.next_values.clone()
        is_over = rollout.terminations | rollout.truncations
        next_values[:-1] = torch.where(is_over[:-1], next_values[:-1], values[1:])
        rewards = (rollout.rewards / scale).float()
        advantages = compute_gae(
            rewards,
            values,
            next_values,
            rollout.terminations,
            rollout.truncations,
            args.gamma,
            args.gae_lambda,
        )
        returns = advantages + values
        gains, variance_left = subtract_group_baseline(advantages, args.group_size)
        normalised = (gains - gains.mean()) / (gains.std() + 1e-8)
    names = ("policy", "value", "kl", "clip_fraction", "gradient_norm")
    loss_rows, entropy_rows, first_ratio_error, stop = [], [], 0.0, False
    for epoch in range(args.update_epochs):
        order = torch.randperm(num_envs, generator=generator, device=everyone.device)
        for mb_index, envs in enumerate(order.chunk(args.num_minibatches)):
            log_probs, entropies, choices, mb_values = replay(agent, rollout, envs)
            log_ratio = log_probs - old_log_probs[:, envs]
            joint = log_ratio.sum(-1)
            with torch.no_grad():
                ratio = joint.exp()
                kl = ((ratio - 1) - joint).mean()
                clipped = ((ratio - 1).abs() > args.clip_coef).float().mean()
                if epoch == 0 and mb_index == 0:
                    first_ratio_error = float((ratio - 1).abs().max())
            if args.target_kl is not None and float(kl) > args.target_kl:
                stop = True
                break
            pg_loss = policy_loss(
                log_ratio, choices, normalised[:, envs], args.clip_coef, args.ratio
            )
            v_loss = 0.5 * ((mb_values - returns[:, envs]) ** 2).mean()
            head_entropies = mean_entropies(entropies, choices)
            loss = pg_loss + args.vf_coef * v_loss - ent_coef * head_entropies.sum()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            loss_rows.append(torch.stack([pg_loss, v_loss, kl, clipped, norm]).detach())
            entropy_rows.append(head_entropies.detach())
        if stop:
            break
    means = torch.stack(loss_rows).double().mean(0).tolist()
    metrics = {f"losses/{name}": mean for name, mean in zip(names, means, strict=True)}
    residual = (returns - values).var()
    metrics["losses/explained_variance"] = float(1 - residual / returns.var().clamp(min=1e-12))
    metrics["losses/first_ratio_error"] = first_ratio_error
    metrics["losses/variance_left"] = variance_left
    entropy = torch.stack(entropy_rows).mean(0)
    for h, name in enumerate(head_names):
        metrics[f"entropy/{name}"] = float(entropy[h])
        metrics[f"choice/{name}"] = float(all_choices[..., h].float().mean())
    return metrics


# ---------------------------------------------------------------------------------- checkpoint


def save_agent(agent: Agent, envs: EsperVectorEnv, directory: Path) -> None:
    """Write weights (safetensors) and what they fit to (JSON)."""
    state = {name: tensor.contiguous().cpu() for name, tensor in agent.state_dict().items()}
    save_file(state, directory / "agent.safetensors")
    description = {
        "hidden_size": agent.hidden_size,
        "recurrent": agent.recurrent,
        "observation_names": list(envs.observation_names),
        "heads": _describe_heads(envs),
    }
    (directory / "agent.json").write_text(json.dumps(description, indent=1))


def load_agent(directory: Path, envs: EsperVectorEnv, device: str = "cpu") -> Agent:
    """Read a checkpoint and check that it fits the environment.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If it was trained with other observations or actions.
    """
    path = directory / "agent.json"
    if not path.exists():
        raise FileNotFoundError(
            f"no checkpoint in {directory}: expected agent.json and agent.safetensors, as written "
            "by python -m esper_agent.ppo_lstm --run-dir"
        )
    known = json.loads(path.read_text())
    present = {
        "observation_names": list(envs.observation_names),
        "heads": json.loads(json.dumps(_describe_heads(envs))),
    }
    for name, value in present.items():
        if known[name] != value:
            raise ValueError(
                f"the checkpoint in {directory} was trained with other {name}: "
                f"{_first_difference(known[name], value)}; make the environment with the settings "
                "in its config.json"
            )
    agent = make_agent(envs, known["hidden_size"], 0, known["recurrent"])
    agent.load_state_dict(load_file(directory / "agent.safetensors"))
    return agent.to(device)


def _describe_heads(envs: EsperVectorEnv) -> list[list[Any]]:
    return [[head.name, list(head.options)] for head in envs.heads]


def _first_difference(expected: list[Any], actual: list[Any]) -> str:
    if len(expected) != len(actual):
        return f"expected {len(expected)} of them, got {len(actual)}"
    pair = next((e, a) for e, a in zip(expected, actual, strict=True) if e != a)
    return f"expected {pair[0]!r}, got {pair[1]!r}"


# ---------------------------------------------------------------------------------- training


def check_gamma(agent_gamma: float, envs: EsperVectorEnv) -> None:
    """Refuse a discount factor that differs from the environment's.

    Raises:
        ValueError: If they differ; shaping would then change which policy is optimal.
    """
    if agent_gamma != envs.gamma:
        raise ValueError(
            f"gamma: the agent has {agent_gamma}, the environment {envs.gamma}; "
            f"set --gamma and --env.gamma to the same value"
        )


def prepare_run_directory(args: Args) -> Path:
    """Create the run's directory and write its configuration.

    Raises:
        FileExistsError: If it holds a run already.
        OSError: If it cannot be written.
    """
    name = f"{args.env_id}__ppo_lstm__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    directory = args.run_dir or Path("runs") / name
    if (directory / "config.json").exists():
        raise FileExistsError(
            f"--run-dir {directory} holds a run already; choose another directory"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(args), indent=1, default=str)
        (directory / "config.json").write_text(text)
    except OSError as error:
        raise OSError(
            f"--run-dir {directory} cannot be written ({error.strerror}); choose another directory"
        ) from error
    return directory


def train(args: Args) -> Path:
    """Train, evaluate and write everything to the run's directory.

    Returns:
        That directory.
    """
    envs = make_envs(args.env_id, args.num_envs, args.device, args.env)
    check_gamma(args.gamma, envs)
    directory = prepare_run_directory(args)
    console = Console(file=sys.stdout)
    console.print(f"run directory: {directory}", soft_wrap=True)
    device = torch.device(args.device)
    agent = make_agent(envs, args.hidden_size, args.seed, args.recurrent).to(device)
    optimizer = make_optimizer(agent, args)
    collector = Collector(envs, agent, args)
    head_names = [head.name for head in envs.heads]
    shuffler = torch.Generator(device).manual_seed(args.seed + 1)
    scores: list[float] = []
    started = time.perf_counter()
    with SummaryWriter(str(directory)) as writer, (directory / "metrics.jsonl").open("w") as log:
        for index in range(args.num_updates):
            left = 1 - index / args.num_updates
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = args.learning_rate * left
            ent_coef = args.ent_coef * (left if args.anneal_entropy else 1.0)
            began = time.perf_counter()
            rollout, episodes = collector.collect()
            collected = time.perf_counter()
            metrics = update(
                agent, optimizer, rollout, collector.scale.std, args, shuffler, head_names, ent_coef
            )
            ended = time.perf_counter()
            step = (index + 1) * args.num_envs * args.num_steps
            metrics |= _chart_metrics(episodes)
            metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            metrics["charts/ent_coef"] = ent_coef
            metrics["charts/steps_per_second"] = step / (ended - started)
            metrics["time/rollout"] = collected - began
            metrics["time/update"] = ended - collected
            metrics["time/policy_share"] = 1 - collector.env_seconds / (ended - started)
            log.write(json.dumps({"step": step, **metrics}) + "\n")
            log.flush()
            for key, value in metrics.items():
                writer.add_scalar(key, value, step)
            _report(console, index + 1, args, metrics, ended - started)
            scores += episodes["score"]
    summary = {
        "env_steps": step,
        "seconds": ended - started,
        "policy_share": metrics["time/policy_share"],
    }
    if scores:
        tenth = max(1, len(scores) // 10)
        summary["score_first_tenth"] = float(np.mean(scores[:tenth]))
        summary["score_last_tenth"] = float(np.mean(scores[-tenth:]))
    save_agent(agent, envs, directory)
    envs.close()
    console.print()
    console.print(
        f"trained for {summary['seconds'] / 60:.1f} min, {100 * summary['policy_share']:.1f} % of "
        f"them in inference and update; mean score of the first tenth of the episodes "
        f"{summary.get('score_first_tenth', float('nan')):.4f}, of the last tenth "
        f"{summary.get('score_last_tenth', float('nan')):.4f}",
        soft_wrap=True,
        highlight=False,
    )
    if args.eval_episodes:
        _evaluate(args, summary, directory, console)
    return directory


def _chart_metrics(episodes: dict[str, list[float]]) -> dict[str, float]:
    metrics = {"charts/valid_share": float(np.mean(episodes["valid"]))}
    for name in ("score", "return", "parameters"):
        if episodes[name]:
            metrics[f"charts/episode_{name}"] = float(np.mean(episodes[name]))
    return metrics


def _report(
    console: Console, index: int, args: Args, metrics: dict[str, float], seconds: float
) -> None:
    """Print progress: each update on a terminal, every twentieth of the run elsewhere."""
    every = 1 if console.is_terminal else max(1, args.num_updates // 20)
    if index % every and index != args.num_updates:
        return
    left = seconds / index * (args.num_updates - index)
    line = (
        f"update {index}/{args.num_updates}  score {metrics.get('charts/episode_score', 0):.4f}  "
        f"parameters {metrics.get('charts/episode_parameters', 0):.0f}  "
        f"kl {metrics.get('losses/kl', 0):.4f}  "
        f"entropy(op) {metrics['entropy/op']:.2f}  "
        f"{metrics['charts/steps_per_second']:.0f} steps/s  {left / 60:.1f} min left"
    )
    console.print(line, end="\r" if console.is_terminal else "\n", soft_wrap=True, highlight=False)


def _evaluate(args: Args, training: dict[str, float], directory: Path, console: Console) -> None:
    """Compare the trained agent with the baselines, on instances that it has not seen."""
    # Imported here because `evaluate` imports this file to load checkpoints.
    from esper_agent.evaluate import TABLE_WIDTH, evaluate_agents, plot_scores, print_table

    agents = [f"ppo:{directory}", "never-grow", "random", "heuristic"]
    env = args.env
    if env.instances == "train":
        env = dataclasses.replace(env, instances="test")
    result = evaluate_agents(
        agents, args.env_id, env, args.eval_episodes, args.eval_seed, args.device
    )
    result["training"] = training
    (directory / "evaluation.json").write_text(json.dumps(result, indent=1))
    print_table(result, Console(file=sys.stdout, width=max(console.width, TABLE_WIDTH)))
    plot_scores(result, directory / "evaluation.png")
    console.print(f"saved: {directory / 'evaluation.json'} and .png", soft_wrap=True)


def main() -> None:
    """Parse the command line and train."""
    train(tyro.cli(Args))


if __name__ == "__main__":
    main()
