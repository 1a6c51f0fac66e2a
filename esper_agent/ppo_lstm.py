"""Recurrent PPO for `esper_env` in one file, with CleanRL's names (`ppo_atari_lstm.py`).

Differences from CleanRL: An action has several heads with conditional masks. The LSTM runs over all
sequences of a minibatch in one call. Log-probabilities and values of the old policy are recomputed
before each update, so the first ratio is 1 up to rounding. A truncated episode bootstraps from its
own last observation. Rewards are divided by the standard deviation of the returns.
docs/telemetry.md lists the metrics of `metrics.jsonl` and TensorBoard, one row per iteration.

Sources: PPO, Schulman et al. (2017); GAE, Schulman et al. (2016); implementation details, Huang et
al. (2022); bootstrapping at truncation, Pardo et al. (2018).
"""

from __future__ import annotations

import copy
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from esper_agent import command_line, networks
from esper_agent.arguments import check_ranges, check_types, config_of, find_unusual, load_arguments
from esper_agent.baselines import Actions, Policy
from esper_agent.checkpoint import capture, restore
from esper_agent.envs import TRAINING, ReturnScale, make_envs, one_thread, pad_masks, settings_of
from esper_agent.evaluate import evaluate_agents, evaluate_beside_baselines, mean_scores, report
from esper_agent.layers import LstmState, MaskedCategorical, layer_init, run_lstm
from esper_agent.run import Run, exit_codes
from esper_agent.telemetry.display import Display
from esper_agent.telemetry.gradients import clip_groups
from esper_agent.telemetry.metrics import Level
from esper_agent.telemetry.profiler import profiling
from esper_agent.telemetry.recorder import Telemetry
from esper_agent.telemetry.training import UpdateWatch, kl_estimate
from esper_env import EnvConfig, EsperVectorEnv

CHANGEABLE = (
    *("checkpoint_minutes", "keep_checkpoints", "eval_episodes", "quiet", "track"),
    *("wandb_project", "wandb_entity", "profile", "profile_stacks", "profile_shapes"),
)
"""Arguments that may be given beside `--resume`, as the training does not depend on them."""
EVAL_EPISODES = 16
"""Episodes of each evaluation of `--eval-every`."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Train a recurrent PPO agent and evaluate it beside the baselines."""

    env_id: str = "Esper-Digits-v0"
    """Environment id."""
    env: EnvConfig = field(default_factory=lambda: TRAINING)
    """Environment settings; by default those of the id for training."""
    seed: int = 1
    """Random seed of the agent and of the training episodes."""
    device: str = "cpu"
    """Device of the environment and the agent."""
    run_dir: Path | None = None
    """Run directory; by default runs/<env id>__ppo_lstm__<seed>__<time>."""
    total_timesteps: int = 207_360
    """Env steps, summed over sub-environments."""
    num_envs: int = 32
    """Sub-environments that run in parallel."""
    num_steps: int = 60
    """Env steps per sub-environment and rollout; the default is one episode of Esper-Digits-v0."""
    learning_rate: float = 2e-3
    """Initial learning rate of Adam."""
    anneal_lr: bool = True
    """Anneal the learning rate linearly to 0."""
    gamma: float = 1.0
    """Discount factor; must equal that of the environment (`--env.gamma`)."""
    gae_lambda: float = 0.97
    """Lambda of generalized advantage estimation."""
    group_size: int = 4
    """Sub-environments per group. A group shares reset seeds, hence hosts, images and instances,
    and the common part of its advantages is subtracted; 1 disables this."""
    num_minibatches: int = 8
    """Minibatches per epoch, each a random set of whole sequences."""
    update_epochs: int = 4
    """Epochs per update."""
    clip_coef: float = 0.2
    """Clipping range of the probability ratio."""
    ent_coef: float = 0.01
    """Coefficient of the entropy, which is summed over heads."""
    wait_logit: float | None = None
    """Logit of WAIT before training; by default 2.5 with parking (docs/results.md), else 0."""
    vf_coef: float = 0.5
    """Coefficient of the value loss."""
    max_grad_norm: float = 0.5
    """Maximum norm of the gradient."""
    clip_groups: bool = False
    """Clip the gradient of each part of the network by itself instead of all together."""
    target_kl: float | None = None
    """Joint KL divergence over heads above which an update stops early."""
    hidden_size: int = 128
    """Width of the encoder and the LSTM."""
    recurrent: bool = True
    """Carry the LSTM state from step to step; otherwise every step starts from a zero state."""
    eval_episodes: int = 64
    """Episodes per agent in the final evaluation; 0 skips it."""
    eval_every: int = 0
    """Iterations between evaluations on the training instances, of which the best agent is kept in
    the folder `best`; 0 skips them. They add eval/committed_score to the metrics."""
    checkpoint_minutes: float = 1.0
    """Time between checkpoints, from which `--resume` continues; 0 saves every iteration."""
    keep_checkpoints: int = 3
    """Number of checkpoints that stay."""
    telemetry: Level = "normal"
    """Level of detail of metrics and events: off, normal or debug; results do not depend on it."""
    quiet: bool = False
    """Print no progress."""
    track: bool = False
    """Also log to Weights & Biases."""
    wandb_project: str = "esper"
    """Project of Weights & Biases."""
    wandb_entity: str | None = None
    """User or team of Weights & Biases."""
    profile: int = 0
    """Iterations to profile with torch.profiler, from the second one on."""
    profile_stacks: bool = False
    """Record Python stacks in the profile."""
    profile_shapes: bool = False
    """Record shapes of tensors in the profile."""
    resume: Path | None = None
    """Directory of an unfinished run to continue; all other arguments are those of the run."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        check_types(self)
        object.__setattr__(self, "env", settings_of(self.env_id, self.env))
        if self.wait_logit is None:
            object.__setattr__(self, "wait_logit", 2.5 if self.env.parking else 0.0)
        counts = ("num_envs", "num_steps", "num_minibatches", "group_size", "update_epochs")
        check_ranges(self, "at least 1", *counts, "hidden_size", "keep_checkpoints", least=1)
        check_ranges(self, "at least 0", "seed", "eval_episodes", "eval_every", "profile", least=0)
        check_ranges(self, "above 0 and at most 1", "learning_rate", "gamma", above=0, most=1)
        check_ranges(self, "0 to 1", "gae_lambda", least=0, most=1)
        check_ranges(self, "-100 to 100", "wait_logit", least=-100, most=100)
        at_least = ("ent_coef", "vf_coef", "checkpoint_minutes")
        check_ranges(self, "a finite number of at least 0", *at_least, least=0)
        above = ("clip_coef", "max_grad_norm", "target_kl")
        check_ranges(self, "a finite number above 0", *above, above=0)
        for name in ("num_minibatches", "group_size"):
            if self.num_envs % getattr(self, name):
                expected = f"a divisor of num_envs={self.num_envs}"
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)}")
        few = "at least 2 with one environment; a single advantage has no standard deviation"
        check_ranges(self, few, "num_steps", least=2 if self.num_envs == 1 else 1)
        enough = f"at least num_envs * num_steps = {self.batch_size}"
        check_ranges(self, enough, "total_timesteps", least=self.batch_size)

    @property
    def batch_size(self) -> int:
        """Env steps per rollout, summed over sub-environments."""
        return self.num_envs * self.num_steps

    @property
    def num_iterations(self) -> int:
        """Rollouts, each followed by an update."""
        return self.total_timesteps // self.batch_size


class Agent(nn.Module):
    """Slot encoder shared over slots, LSTM, critic, and autoregressive heads.

    The op is chosen first, then the slot given the op, then all other heads given both. Every head
    has as many logits as the largest one (`width`); its mask excludes those beyond its options.

    The methods share these tensors, with leading axes (num_envs) to act and (num_steps, num_envs)
    to train: `hidden` (..., hidden_size), output of the LSTM plus its input; `slots`
    (..., num_slots * slot_size), encodings of all slots; `done` (...) bool, True where the step
    before ended an episode; `actions` (..., num_heads) int64; `masks` (..., num_heads, width) bool,
    given the op and slot of an action.

    Args:
        observation_names: Names of the features: those of the episode, then slot by slot with the
            prefix "slot_<s>.".
        heads: Options of each head; the first head is op, the second slot.
        hidden_size: Width of the encoder and the LSTM.
        recurrent: Carry the LSTM state from step to step.
    """

    def __init__(
        self,
        observation_names: list[str],
        heads: dict[str, list[Any]],
        hidden_size: int,
        recurrent: bool = True,
    ) -> None:
        super().__init__()
        self.observation_names, self.heads = observation_names, heads
        self.hidden_size, self.recurrent = hidden_size, recurrent
        episode = [n for n in observation_names if "." not in n]
        slots = list(dict.fromkeys(n.split(".")[0] for n in observation_names if "." in n))
        features = list(dict.fromkeys(n.split(".")[1] for n in observation_names if "." in n))
        if observation_names != episode + [f"{s}.{f}" for s in slots for f in features]:
            raise ValueError("observation_names: expected the episode's, then slot by slot")
        self.num_episode, self.num_slots, slot_size = len(episode), len(slots), 32
        self.num_rest, self.width = len(heads) - 2, max(map(len, heads.values()))
        num_ops, num_slot_options = (len(options) for options in list(heads.values())[:2])
        self.slot_encoder = layer_init(nn.Linear(len(features), slot_size))
        self.encoder = layer_init(nn.Linear(len(episode) + len(slots) * slot_size, hidden_size))
        self.lstm = nn.LSTM(hidden_size, hidden_size)
        for name, parameter in self.lstm.named_parameters():
            (nn.init.zeros_ if "bias" in name else nn.init.orthogonal_)(parameter)
        self.critic = nn.Sequential(
            layer_init(nn.Linear(hidden_size, 64)), nn.ReLU(), layer_init(nn.Linear(64, 1), std=1.0)
        )
        self.op_head = layer_init(nn.Linear(hidden_size, self.width), std=0.01)
        self.op_embedding = nn.Embedding(num_ops, 64)
        self.hidden_to_joint = layer_init(nn.Linear(hidden_size, 64))
        self.slots_to_joint = layer_init(nn.Linear(len(slots) * slot_size, 64))
        self.slot_head = layer_init(nn.Linear(64, self.width), std=0.01)
        self.slot_embedding = nn.Embedding(num_slot_options, 64)
        self.rest_head = layer_init(nn.Linear(64, self.num_rest * self.width), std=0.01)

    def get_initial_state(self, num_envs: int) -> LstmState:
        """Return the LSTM state at the start of an episode."""
        zeros = torch.zeros(1, num_envs, self.hidden_size, device=self.op_head.weight.device)
        return zeros, zeros.clone()

    def get_states(
        self, obs: Tensor, lstm_state: LstmState, dones: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run encoder and LSTM over whole sequences; return `hidden` and `slots`."""
        x, slots = self.encode(obs)
        dones = dones if self.recurrent else torch.ones_like(dones)
        return run_lstm(self.lstm, x, lstm_state, dones) + x, slots

    def get_next_state(
        self, obs: Tensor, lstm_state: LstmState, done: Tensor
    ) -> tuple[Tensor, Tensor, LstmState]:
        """Run encoder and LSTM for one step; return `hidden`, `slots` and the next LSTM state."""
        x, slots = self.encode(obs)
        done = done if self.recurrent else torch.ones_like(done)
        h, c = lstm_state[0][0], lstm_state[1][0]
        if done.any():
            h, c = (part.masked_fill(done[:, None], 0.0) for part in (h, c))
        # Without the preparations of nn.LSTM for a sequence, which cost more than one step.
        h, c = torch.lstm_cell(x, (h, c), *self.lstm.all_weights[0])
        return h + x, slots, (h[None], c[None])

    def get_value(self, hidden: Tensor) -> Tensor:
        """Return V(s). (...) float32."""
        return torch.squeeze(self.critic(hidden), -1)

    def get_action(
        self, hidden: Tensor, slots: Tensor, masks: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Return the actions of one step, and the masks given their ops and slots.

        `masks` are given every op and slot, as `pad_masks` returns them. Without a generator, every
        head takes its most likely option.
        """
        envs, gumbel = torch.arange(len(hidden), device=hidden.device), None
        if generator is not None:
            noise = torch.empty(len(hidden), len(self.heads), self.width, device=hidden.device)
            gumbel = noise.exponential_(generator=generator).log_().neg_()

        def choose(logits: Tensor, mask: Tensor, heads: int | slice) -> Tensor:
            options = MaskedCategorical(logits, mask)
            return options.mode() if gumbel is None else options.sample(gumbel[:, heads])

        op = choose(self.op_head(hidden), masks[:, 0, 0, 0], 0)
        joint = self._joint(hidden, slots, op)
        slot = choose(self.slot_head(joint), masks[envs, op, 0, 1], 1)
        # (envs, ops, slots, heads, width) -> (envs, heads, width)
        chosen = masks[envs, op, slot]
        rest = choose(self._rest_logits(joint, slot), chosen[:, 2:], slice(2, None))
        return torch.cat([op[:, None], slot[:, None], rest], dim=1), chosen

    def evaluate_actions(
        self, hidden: Tensor, slots: Tensor, actions: Tensor, masks: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities, entropies and numbers of legal options (..., num_heads)."""
        op, slot = actions[..., 0], actions[..., 1]
        joint = self._joint(hidden, slots, op)
        op_logits, slot_logits = self.op_head(hidden), self.slot_head(joint)
        rest_logits = self._rest_logits(joint, slot)
        # (..., width), (..., width), (..., heads - 2, width) -> (..., heads, width)
        logits = torch.cat([op_logits[..., None, :], slot_logits[..., None, :], rest_logits], -2)
        options = MaskedCategorical(logits, masks)
        return options.log_prob(actions), options.entropy(), options.num_legal()

    def weight_groups(self) -> dict[str, list[tuple[Tensor, slice]]]:
        """Return weights, and their rows, by part of the network; a head's group is its own."""
        op, slot, *rest = self.heads
        mixed = self.hidden_to_joint, self.slots_to_joint, self.op_embedding, self.slot_embedding
        modules: dict[str, tuple[nn.Module, ...]] = {
            "encoder": (self.slot_encoder, self.encoder),
            **{"core": (self.lstm,), "critic": (self.critic,), "joint": mixed},
            **{op: (self.op_head,), slot: (self.slot_head,)},
        }
        groups: dict[str, list[tuple[Tensor, slice]]] = {
            name: [(weight, slice(None)) for module in part for weight in module.parameters()]
            for name, part in modules.items()
        }
        for h, name in enumerate(rest):
            rows = slice(h * self.width, (h + 1) * self.width)
            groups[name] = [(weight, rows) for weight in self.rest_head.parameters()]
        return groups

    def activations(self, obs: Tensor, lstm_state: LstmState, dones: Tensor) -> dict[str, Tensor]:
        """Return the outputs of ReLU layers by name, and the input of the heads as "core"."""
        x, slots = self.encode(obs)
        hidden, _ = self.get_states(obs, lstm_state, dones)
        return {"slots": slots, "encoder": x, "critic": self.critic[:2](hidden), "core": hidden}

    def encode(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input of the LSTM and the slot encodings."""
        episode, blocks = obs.tensor_split([self.num_episode], dim=-1)
        # (..., slots * features) -> (..., slots, features) -> (..., slots * slot_size)
        blocks = blocks.reshape(*blocks.shape[:-1], self.num_slots, -1)
        slots = torch.relu(self.slot_encoder(blocks)).flatten(-2)
        return torch.relu(self.encoder(torch.cat([episode, slots], dim=-1))), slots

    def _joint(self, hidden: Tensor, slots: Tensor, op: Tensor) -> Tensor:
        """Combine LSTM output, slot encodings and the chosen op. (..., 64)."""
        mixed = self.hidden_to_joint(hidden) + self.slots_to_joint(slots) + self.op_embedding(op)
        return torch.relu(mixed)

    def _rest_logits(self, joint: Tensor, slot: Tensor) -> Tensor:
        """Return the logits of all heads after op and slot. (..., num_heads - 2, width)."""
        logits = self.rest_head(torch.relu(joint + self.slot_embedding(slot)))
        # (..., rest * width) -> (..., rest, width)
        return torch.unflatten(logits, -1, (self.num_rest, self.width))


def compute_gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminations: Tensor,
    truncations: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Return advantages by generalized advantage estimation. All tensors are (num_steps, num_envs).

    delta_t = r_t + gamma * V(s') - V(s_t) and A_t = delta_t + gamma * lambda * A_{t+1}, where V(s')
    is 0 at a termination and A_{t+1} counts as 0 at both kinds of end. `next_values` are V of the
    observations after each step, before a reset.
    """
    carries = gamma * gae_lambda * ~(terminations | truncations)
    deltas = rewards + gamma * next_values * (~terminations) - values
    advantages = list(deltas)
    for t in reversed(range(len(deltas) - 1)):
        advantages[t] = deltas[t] + carries[t] * advantages[t + 1]
    return torch.stack(advantages)


def subtract_group_baseline(advantages: Tensor, group_size: int) -> tuple[Tensor, float]:
    """Subtract the mean advantage of the rest of the group, times the best-fitting coefficient.

    The baseline does not depend on the action of the sub-environment itself, so it reduces the
    variance of the policy gradient without bias, except for the fit (of order 1 / samples).
    Returns advantages (num_steps, num_envs), and the share of their variance that is left.
    Sources: Mao et al. (2019); Kool et al. (2019); coefficient, Greensmith et al. (2004).
    """
    if group_size == 1:
        return advantages, 1.0
    # (steps, envs) -> (steps, groups, group_size)
    own = advantages.view(len(advantages), -1, group_size)
    others = (own.sum(-1, keepdim=True) - own) / (group_size - 1)
    others = others - others.mean()
    coefficient = (own * others).mean() / others.square().mean().clamp(min=1e-12)
    result = (own - coefficient * others).flatten(1)
    return result, float(result.var() / advantages.var().clamp(min=1e-12))


@dataclass
class TrainState:
    """Everything that a run carries from iteration to iteration, apart from the environment."""

    agent: Agent
    optimizer: torch.optim.Optimizer
    action_rng: torch.Generator
    minibatch_rng: torch.Generator
    return_scale: ReturnScale
    next_obs: npt.NDArray[np.float32]
    """Observations to act on next. (num_envs, num_features) float32."""
    next_done: npt.NDArray[np.bool_]
    """True where the last step ended an episode. (num_envs,) bool."""
    next_lstm_state: LstmState
    telemetry: Telemetry
    iteration: int = 0
    seconds: float = 0.0
    """Wall time of rollouts and updates."""
    env_seconds: float = 0.0
    """Wall time of the environment in it."""


def make_train_state(args: Args, envs: EsperVectorEnv) -> TrainState:
    """Reset the environment and return a run's first state; global random state is not changed."""
    seeds: list[int | None] = [args.seed + i // args.group_size for i in range(args.num_envs)]
    spaces = networks.describe_spaces(envs)
    with one_thread(), torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed CUDA, whose random state is not restored.
        torch.default_generator.manual_seed(args.seed)
        agent = Agent(**spaces, hidden_size=args.hidden_size, recurrent=args.recurrent)
    nn.init.constant_(agent.op_head.bias[:1], args.wait_logit or 0.0)  # The first op is WAIT.
    agent.to(args.device)
    next_obs, info = envs.reset(seed=seeds)
    where = args.env_id, args.device, args.env
    telemetry = Telemetry(args.telemetry, *where, envs, info, args.max_grad_norm)
    return TrainState(
        agent=agent,
        # The fused kernel takes a third of the time on a CPU.
        optimizer=torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5, fused=True),
        action_rng=torch.Generator(args.device).manual_seed(args.seed),
        minibatch_rng=torch.Generator(args.device).manual_seed(args.seed + 1),
        return_scale=ReturnScale(args.gamma, np.zeros(args.num_envs)),
        next_obs=next_obs,
        next_done=np.zeros(args.num_envs, dtype=bool),
        next_lstm_state=agent.get_initial_state(args.num_envs),
        telemetry=telemetry,
    )


@dataclass(frozen=True)
class Rollout:
    """Experience of one iteration. Tensors are (num_steps, num_envs, ...)."""

    lstm_state: LstmState
    """LSTM state before the first step."""
    obs: Tensor
    dones: Tensor
    """True where the step before ended an episode, so that the observation starts one."""
    rewards: Tensor
    """Unscaled rewards. float64."""
    terminations: Tensor
    truncations: Tensor
    actions: Tensor
    masks: Tensor
    next_values: Tensor
    """V of the observation after the step; only at truncations and in the last step, else 0."""


def collect_rollout(state: TrainState, envs: EsperVectorEnv, args: Args) -> Rollout:
    """Act for `num_steps` env steps."""

    def tensor(array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(args.device)

    agent, lstm_state, steps = state.agent, state.next_lstm_state, []
    telemetry, level = state.telemetry, state.telemetry.level
    for step in range(args.num_steps):
        obs, done = state.next_obs, state.next_done
        with torch.inference_mode(), one_thread():
            hidden, slots, state.next_lstm_state = agent.get_next_state(
                tensor(obs), state.next_lstm_state, tensor(done)
            )
            all_masks = pad_masks(envs.conditional_masks(), args.device)
            actions, masks = agent.get_action(hidden, slots, all_masks, state.action_rng)
        began, numbers = time.perf_counter(), actions.cpu().numpy()
        with telemetry.clock.measure("environment"):
            next_obs, rewards, terminations, truncations, info = envs.step(numbers)
        state.env_seconds += time.perf_counter() - began
        next_done = terminations | truncations
        state.return_scale.update(rewards, next_done)
        with telemetry.clock.measure("telemetry"):
            telemetry.environment.add(level, rewards, next_done, info)
        last_obs, next_values = next_obs, torch.zeros(args.num_envs, device=args.device)
        if next_done.any():
            # The environment has reset itself, so next_obs belongs to the next episode.
            last_obs = next_obs.copy()
            last_obs[next_done] = np.stack(info["final_obs"][next_done].tolist())
        # Elsewhere V(s') is the value of the next step, which `update` computes.
        if truncations.any() or step == args.num_steps - 1:
            with torch.inference_mode(), one_thread():
                no_done = tensor(np.zeros_like(done))
                hidden, *_ = agent.get_next_state(tensor(last_obs), state.next_lstm_state, no_done)
                next_values = agent.get_value(hidden)
        arrays = obs, done, rewards, terminations, truncations
        steps.append((*map(torch.from_numpy, arrays), actions, masks, next_values))
        state.next_obs, state.next_done = next_obs, next_done
    # num_steps tuples of (num_envs, ...) -> one (num_steps, num_envs, ...) per field
    columns = [torch.stack(column).to(args.device) for column in zip(*steps, strict=True)]
    return Rollout(lstm_state, *columns)


def evaluate_rollout(agent: Agent, rollout: Rollout, envs: Tensor) -> tuple[Tensor, ...]:
    """Evaluate the sequences of some sub-environments by `evaluate_actions` and `get_value`."""
    lstm_state = (rollout.lstm_state[0][:, envs], rollout.lstm_state[1][:, envs])
    hidden, slots = agent.get_states(rollout.obs[:, envs], lstm_state, rollout.dones[:, envs])
    actions, masks = rollout.actions[:, envs], rollout.masks[:, envs]
    return *agent.evaluate_actions(hidden, slots, actions, masks), agent.get_value(hidden)


def mean_entropies(entropies: Tensor, choices: Tensor) -> Tensor:
    """Return the mean entropy of each head over the steps where it had a choice. (num_heads,)."""
    # (steps, envs, heads) -> (steps * envs, heads) -> (heads,)
    total = (entropies * choices).flatten(0, 1).sum(0)
    return total / choices.flatten(0, 1).sum(0).clamp(min=1)


def policy_loss(ratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """Return the negative clipped surrogate objective; both tensors have the same shape."""
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


@one_thread()
def update(
    state: TrainState, rollout: Rollout, args: Args, watch: UpdateWatch
) -> tuple[dict[str, float], list[str]]:
    """Update the agent with a rollout; return metrics, and what is not finite in words."""
    agent, optimizer = state.agent, state.optimizer
    with torch.no_grad():
        # `get_next_state`, which chose the actions, rounds differently from `get_states`, which is
        # trained; so everything is recomputed by the latter.
        everyone = torch.arange(args.num_envs, device=args.device)
        b_logprobs, b_entropies, b_num_legal, b_values = evaluate_rollout(agent, rollout, everyone)
        ends = rollout.terminations, rollout.truncations
        next_values = rollout.next_values.clone()
        next_values[:-1] = torch.where((ends[0] | ends[1])[:-1], next_values[:-1], b_values[1:])
        rewards = (rollout.rewards / state.return_scale.std).float()
        advantages = compute_gae(rewards, b_values, next_values, *ends, args.gamma, args.gae_lambda)
        b_returns = advantages + b_values
        td_errors = rewards + args.gamma * next_values * ~rollout.terminations - b_values
        advantages, variance_left = subtract_group_baseline(advantages, args.group_size)
        b_advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        next_state = torch.from_numpy(state.next_obs).to(args.device), state.next_lstm_state
        old = b_logprobs, b_entropies, b_num_legal, b_values
        watch.begin(rollout, next_state, *old, b_returns, td_errors, advantages, b_advantages)

    # A minibatch is a set of sub-environments with all their steps: the LSTM needs whole sequences.
    shuffle = partial(torch.randperm, args.num_envs, generator=state.minibatch_rng)
    orders = (shuffle(device=args.device) for _ in range(args.update_epochs))
    for mb_envs in (mb for order in orders for mb in order.chunk(args.num_minibatches)):
        newlogprobs, entropies, _, newvalues = evaluate_rollout(agent, rollout, mb_envs)
        # The log-probability of an action is the sum over its heads.
        head_logratios = newlogprobs - b_logprobs[:, mb_envs]
        logratio = head_logratios.sum(-1)
        if args.target_kl and kl_estimate(logratio.detach()).mean() > args.target_kl:
            break
        pg_loss = policy_loss(logratio.exp(), b_advantages[:, mb_envs], args.clip_coef)
        v_loss = 0.5 * ((newvalues - b_returns[:, mb_envs]) ** 2).mean()
        head_entropies = mean_entropies(entropies, b_num_legal[:, mb_envs] > 1)
        entropy = head_entropies.sum()
        parts = pg_loss, args.vf_coef * v_loss, -args.ent_coef * entropy
        loss = parts[0] + parts[1] + parts[2]
        optimizer.zero_grad()
        watch.before_backward(*parts)
        torch.autograd.backward(loss)
        watch.before_clipping()
        if args.clip_groups:
            norm = clip_groups(agent.weight_groups().values(), args.max_grad_norm)
        else:
            norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
        optimizer.step()
        losses = pg_loss, v_loss, entropy, loss, norm
        watch.after_minibatch(mb_envs, *losses, head_entropies, head_logratios)
    metrics, problems = watch.finish()
    metrics["losses/variance_left"] = variance_left
    return metrics, problems


def run_iteration(state: TrainState, envs: EsperVectorEnv, args: Args) -> dict[str, float]:
    """Collect a rollout, update the agent, and return metrics."""
    if args.anneal_lr:
        frac = 1 - state.iteration / args.num_iterations
        state.optimizer.param_groups[0]["lr"] = frac * args.learning_rate
    began = time.perf_counter()
    telemetry = state.telemetry
    with telemetry.clock.measure("inference"):
        rollout = collect_rollout(state, envs, args)
    watch = telemetry.watch_update(state.agent, args)
    with telemetry.clock.measure("update"):
        metrics, telemetry.problems = update(state, rollout, args, watch)
    state.seconds += time.perf_counter() - began
    state.iteration += 1
    metrics["returns/scale"] = state.return_scale.std
    metrics["charts/learning_rate"] = state.optimizer.param_groups[0]["lr"]
    metrics["charts/SPS"] = state.iteration * args.batch_size / state.seconds
    metrics["time/policy_share"] = 1 - state.env_seconds / state.seconds
    telemetry.finish(metrics, watch, state.iteration, args.num_iterations, rollout.obs)
    return metrics


def begin(args: Args) -> tuple[EsperVectorEnv, TrainState, Run]:
    """Check everything, then create the run directory, or continue the run in it."""
    envs = make_envs(args.env_id, args.num_envs, args.device, args.env)
    if args.gamma != envs.gamma:
        raise ValueError(f"gamma: expected {envs.gamma} as in --env.gamma, got {args.gamma}")
    state, config = make_train_state(args, envs), config_of(args)
    name = f"{args.env_id}__ppo_lstm__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    directory = args.resume or args.run_dir or Path("runs") / name
    identity = {name: config[name] for name in ("env_id", "num_envs", "env")}
    identity |= networks.describe_spaces(envs)
    run = Run(directory, config, identity, is_new=args.resume is None, changeable=CHANGEABLE)
    # Whatever else a run carries from iteration to iteration is added in the same way.
    run.carry("training", partial(capture, state), partial(restore, state))
    run.carry("environment", envs.get_state, envs.set_state)
    run.restore()
    if args.track:
        run.track(args.wandb_project, args.wandb_entity)
    if not args.quiet:
        for line in (*find_unusual(args), f"run directory: {run.directory}"):
            command_line.say(line)
    return envs, state, run


def finish(args: Args, envs: EsperVectorEnv, state: TrainState, run: Run) -> Path:
    """Train to the end and evaluate; return the run directory, which has all results."""
    judge = partial(evaluate_agents, env_id=args.env_id, device=args.device)
    policies: dict[str, Policy]
    telemetry, total = state.telemetry, args.num_iterations * args.batch_size
    profile = profiling(run.directory, args.profile, args.profile_stacks, args.profile_shapes)
    with run:
        with Display(total, args.quiet) as display, profile as end_of_profiled:
            while state.iteration < args.num_iterations:
                metrics = run_iteration(state, envs, args)
                global_step = state.iteration * args.batch_size
                run.check(global_step, telemetry.problems, telemetry.events)
                if args.eval_every and state.iteration % args.eval_every == 0:
                    with telemetry.clock.measure("evaluation"):
                        policies = {"now": TrainedPolicy(copy.deepcopy(state.agent).cpu())}
                        result = judge(policies, config=args.env, episodes=EVAL_EPISODES)
                    scores = mean_scores(result)
                    metrics["eval/committed_score"] = scores["now"]
                    run.record_evaluation(global_step, scores)
                    run.keep_best(scores["now"], state.agent)
                run.record(global_step, metrics, telemetry.events)
                display.show(global_step, metrics, telemetry.events, state.seconds / 60)
                with telemetry.clock.measure("checkpoint"):
                    run.save_if_due(is_last=state.iteration == args.num_iterations)
                end_of_profiled()
        directory = run.save_network(state.agent)
        envs.close()
        with run.ending():
            if args.eval_episodes:
                policies = {"ppo_lstm": TrainedPolicy(directory)}
                result = evaluate_beside_baselines(policies, judge, args.env, args.eval_episodes)
                run.record_evaluation(total, mean_scores(result))
                report(result, run.directory / "evaluation.json")
    return directory


def train(args: Args) -> Path:
    """Train and evaluate an agent; return the run directory, which has all results."""
    return finish(args, *begin(args))


class TrainedPolicy:
    """Policy of a run or agent, on the CPU. It samples, or takes each head's most likely option."""

    def __init__(self, source: Path | str | Agent, samples: bool = False) -> None:
        self._source, self._samples = source, samples
        self._agent = source if isinstance(source, Agent) else networks.load_network(source, Agent)

    def begin(self, envs: EsperVectorEnv, seed: int) -> None:
        """Check that the environment is like that of the run, and reset the LSTM state."""
        if not isinstance(self._source, Agent):
            networks.check_spaces(self._source, envs)
        self._envs = envs
        self._lstm_state = self._agent.get_initial_state(envs.num_envs)
        self._no_done = torch.zeros(envs.num_envs, dtype=torch.bool)
        self._rng = torch.Generator().manual_seed(seed) if self._samples else None

    @torch.inference_mode()
    @one_thread()
    def act(self, observation: npt.NDArray[np.float32], info: dict[str, Any]) -> Actions:
        """Return the actions of one step."""
        del info
        hidden, slots, self._lstm_state = self._agent.get_next_state(
            torch.from_numpy(observation), self._lstm_state, self._no_done
        )
        masks = pad_masks(self._envs.conditional_masks(), "cpu")
        return np.asarray(self._agent.get_action(hidden, slots, masks, self._rng)[0])


SampledPolicy = partial(TrainedPolicy, samples=True)


def load_args(run_dir: Path | str) -> Args:
    """Return the arguments that continue a run, as its config.json has them."""
    return load_arguments(Args, run_dir, env=EnvConfig)


def main() -> None:
    """Parse the command line and train."""
    with command_line.short_mistakes():
        run_dir = command_line.value_of("--resume", sys.argv[1:])
        # Beside --resume, the arguments of the run are the defaults.
        args = command_line.parse(Args, default=None if run_dir is None else load_args(run_dir))
        begun = begin(args)
    with exit_codes():
        finish(args, *begun)


if __name__ == "__main__":
    main()
