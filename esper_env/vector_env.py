"""The vector environment: all members train as one tensor program."""

from __future__ import annotations

import functools
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from esper_env import lifecycle, streams
from esper_env.actions import HEAD_NAMES, ActionHead, ActionSpace
from esper_env.attribution import Coalitions, plan_coalitions, record_contributions
from esper_env.config import (
    STYLES,
    Blend,
    BoolArray,
    EnvConfig,
    FloatArray,
    IntArray,
    Op,
    Stage,
)
from esper_env.lifecycle import DOWN, LifecycleState, Measurements
from esper_env.observation import ObservationBuilder, Progress
from esper_env.population.blueprints import CNN_BLUEPRINTS
from esper_env.population.optimizer import SGDSettings
from esper_env.population.population import Evaluation, Population
from esper_env.population.slots import Seeds
from esper_env.rewards.potential import potential
from esper_env.rewards.presets import compute_reward, resolve_weights
from esper_env.rewards.terms import Standing, Transition, score
from esper_env.tasks import TASKS, Splits

_STREAM_HOST, _STREAM_DATA, _STREAM_SEED = 0, 1, 2
_STYLE_BLEND = np.array([style.blend for style in STYLES])


class EsperVectorEnv(VectorEnv[npt.NDArray[np.float32], npt.NDArray[np.int64], npt.NDArray[Any]]):
    """`num_envs` hosts being trained, each with an agent that may grow it.

    A step is one decision per member followed by `batches_per_step` training batches of every
    host. Every member has the same validation images and a fixed amount of work per step.

    Args:
        num_envs: Number of members.
        device: Where all tensors live, e.g. "cpu" or "cuda".
        autoreset_mode: Gymnasium's `AutoresetMode` or its value; NEXT_STEP by default.
        render_mode: Only None.
        max_episode_steps: Gymnasium's name for `episode_steps`, passed by `gym.make_vec`; if both
            are given, an upper limit.
        **config: Fields of `EnvConfig`.

    Raises:
        TypeError: If a keyword is no field of `EnvConfig`.
        ValueError: If a value is out of range.
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        device: str = "cpu",
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
        max_episode_steps: int | None = None,
        **config: Any,
    ) -> None:
        if not isinstance(num_envs, (int, np.integer)) or num_envs < 1:
            raise ValueError(f"num_envs: expected an integer of at least 1, got {num_envs!r}")
        if render_mode is not None:
            raise ValueError(f"render_mode: expected None, got {render_mode!r}")
        if max_episode_steps is not None:
            own = config.setdefault("episode_steps", max_episode_steps)
            if own > max_episode_steps:
                raise ValueError(
                    f"episode_steps: expected at most max_episode_steps={max_episode_steps}, got "
                    f"{own}; gym.make_vec passes the limit of the id unless you name another: "
                    f"max_episode_steps={own}"
                )
        self.config = EnvConfig.from_keywords(config)
        if self.config.task not in TASKS:
            raise ValueError(f"task: expected one of {sorted(TASKS)}, got {self.config.task!r}")
        self.num_envs = int(num_envs)
        self.device = torch.device(device)
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {"render_modes": [], "autoreset_mode": self.autoreset_mode}
        self.render_mode = None
        self.gamma = self.config.gamma
        """Discount factor of the shaping reward; an agent must use the same."""

        self._task = TASKS[self.config.task]
        self._blueprints = CNN_BLUEPRINTS
        names = [blueprint.name for blueprint in self._blueprints]
        host = self._task.host
        self._weights = resolve_weights(self.config)
        self._isolates = np.array([stage.name in self.config.isolated_stages for stage in Stage])
        self._actions = ActionSpace(host.num_slots, names, self.config.heads)
        self._observations = ObservationBuilder(
            host.num_slots, names, host.num_parameters, host.num_classes, self.config
        )
        self.heads: tuple[ActionHead, ...] = self._actions.heads
        """The action's components and the values of their options."""
        self.observation_names: tuple[str, ...] = self._observations.names
        """One name per feature of the observation."""
        shape = (len(self.observation_names),)
        self.single_observation_space = gym.spaces.Box(-1.0, 1.0, shape, np.float32)
        self.single_action_space = gym.spaces.MultiDiscrete(self._actions.nvec)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._population: Population | None = None
        self._splits: Splits | None = None
        self._is_done: BoolArray = np.zeros(self.num_envs, dtype=bool)
        self._episode_key: streams.KeyArray = np.zeros(self.num_envs, dtype=np.uint64)
        self._standing: Standing

    # ------------------------------------------------------------------ Gymnasium

    # A caller may be inside inference_mode, whose tensors could not be trained later.
    @torch.inference_mode(False)
    def reset(
        self,
        *,
        seed: int | list[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """Start new episodes.

        Args:
            seed: Member i becomes a function of seed + i alone, or of the i-th entry of a list.
                Without one, members go on with their own streams.
            options: "reset_mask" (num_envs,) bool starts only some members anew.

        Returns:
            Observations (num_envs, features) float32, and info.
        """
        options = dict(options or {})
        mask = options.pop("reset_mask", None)
        if options:
            raise ValueError(f"options: expected only 'reset_mask', got also {sorted(options)}")
        is_first = self._population is None
        if is_first:
            self._build()
        if mask is None:
            members = np.arange(self.num_envs)
        else:
            members = self._members_of_mask(mask, is_first)
        self._seed(seed, members, is_first)
        self._begin_episodes(members)
        self._refresh_masks()
        return self._observe(), self._info()

    @torch.inference_mode(False)
    def step(
        self, actions: npt.NDArray[np.int64]
    ) -> tuple[
        npt.NDArray[np.float32],
        npt.NDArray[np.float64],
        npt.NDArray[np.bool_],
        npt.NDArray[np.bool_],
        dict[str, Any],
    ]:
        """Decide, train, evaluate.

        Args:
            actions: Option indices in the order of `heads`. (num_envs, 8) integers.

        Returns:
            Observations, rewards, terminations, truncations, info.

        Raises:
            gymnasium.error.ResetNeeded: Before the first `reset`, or when a finished member is
                stepped without autoreset.
            TypeError: If the actions are not integers.
            ValueError: If shape or range are wrong, or an action is illegal while
                `illegal_actions="raise"`.
        """
        actions = self._check_actions(actions)
        resetting = np.zeros(self.num_envs, dtype=bool)
        if self._is_done.any():
            if self.autoreset_mode == AutoresetMode.DISABLED:
                done = np.nonzero(self._is_done)[0].tolist()
                raise gym.error.ResetNeeded(
                    f"members {done} have finished; call reset(options={{'reset_mask': mask}}) "
                    "before step, or choose another autoreset_mode"
                )
            resetting = self._is_done.copy()
        active = ~resetting
        is_legal = self._actions.is_legal(self._conditional, actions)
        if self.config.illegal_actions == "raise" and (active & ~is_legal).any():
            self._raise_illegal(actions, active & ~is_legal)
        if resetting.any():
            self._begin_episodes(np.nonzero(resetting)[0])
        rewards, terminations, truncations, terms = self._advance(actions, is_legal, active)
        self._refresh_masks()
        observations, info = self._observe(), self._info(terms)
        self._is_done = terminations | truncations
        if self._is_done.any() and self.autoreset_mode == AutoresetMode.SAME_STEP:
            final_observations, final_info = observations, info
            ended = self._is_done.copy()
            self._begin_episodes(np.nonzero(ended)[0])
            self._refresh_masks()
            observations, info = self._observe(), self._info(terms)
            rows = np.full(self.num_envs, None, dtype=object)
            for i in np.nonzero(ended)[0]:
                rows[i] = final_observations[i]
            info["final_obs"], info["_final_obs"] = rows, ended.copy()
            info["final_info"], info["_final_info"] = _masked_info(final_info, ended), ended.copy()
        return observations, rewards, terminations, truncations, info

    def close_extras(self, **kwargs: Any) -> None:
        """Release the tensors."""
        del kwargs
        self._population = None

    # ------------------------------------------------------------------ masks and samples

    def action_masks(self) -> BoolArray:
        """Return the marginal mask of the next action; True is legal.

        Returns:
            (num_envs, sum(nvec)) bool; also in `info["action_mask"]`.
        """
        self._require_reset()
        return self._marginal.copy()

    def conditional_masks(self) -> dict[str, BoolArray]:
        """Return the exact mask for a policy that picks op, then slot, then the rest.

        Returns:
            "op" (num_envs, ops); "slot" (num_envs, ops, slots); every other head
            (num_envs, ops, slots, options). All bool; True is legal. Rows below an illegal op or
            (op, slot) are all False.
        """
        self._require_reset()
        return {name: mask.copy() for name, mask in self._conditional.items()}

    def sample_valid_actions(self, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Draw legal actions: uniform over ops, then slots, then options. (num_envs, 8) int64."""
        self._require_reset()
        return self._actions.sample(self._conditional, rng)

    # ------------------------------------------------------------------ one step

    def _advance(
        self, actions: IntArray, is_legal: BoolArray, active: BoolArray
    ) -> tuple[FloatArray, BoolArray, BoolArray, dict[str, FloatArray]]:
        """Act, tick, train and evaluate the active members."""
        config, state, progress = self.config, self._state, self._progress
        before = self._standing
        acts = active & is_legal
        request = self._actions.decode(np.where(acts[:, None], actions, 0))
        lifecycle.apply(state, self._measured, request, config)
        progress.last_op[active] = request.op[active]
        progress.last_valid[active] = is_legal[active]
        new = np.nonzero(request.op == Op.GERMINATE)[0]
        if len(new):
            key = streams.make_key(self._episode_key[new], _STREAM_SEED, progress.steps[new])
            self._pop.germinate(new, request.slot[new], request.blueprint[new], key)
        lifecycle.tick(state, self._measured, active, config)
        self._take_inventory()

        members = np.nonzero(active)[0]
        if len(members):
            self._train(members)
            progress.steps[members] += 1
            self._evaluate(members)
        truncated = active & (progress.steps >= config.episode_steps)
        terminated = np.zeros(self.num_envs, dtype=bool)
        if config.horizon == "terminal":
            terminated, truncated = truncated, terminated
        is_last = terminated | truncated
        self._has_test = is_last
        if is_last.any():
            self._test(np.nonzero(is_last)[0])
        self._take_stock()
        transition = Transition(before, self._standing, is_last, terminated)
        reward, terms = compute_reward(transition, self._weights, config)
        for array in (reward, *terms.values()):
            array[~active] = 0.0
        return reward, terminated, truncated, terms

    def _train(self, members: IntArray) -> None:
        """Train members on their own batches and judge the gradients of their seeds."""
        config, progress = self.config, self._progress
        train = self._data.train
        size = config.batches_per_step * config.batch_size
        key = streams.make_key(self._episode_key[members], _STREAM_DATA, progress.steps[members])
        drawn = (streams.uniform(key, size) * len(train)).astype(np.int64)
        indices = drawn.T.reshape(config.batches_per_step, config.batch_size, len(members))
        decay = np.ones(len(members))
        if config.learning_rate_decay == "linear":
            decay -= progress.steps[members] / config.episode_steps
        report = self._pop.train(
            members,
            self._seeds,
            train,
            indices,
            config.host_learning_rate * decay,
            config.seed_learning_rate * decay,
        )
        progress.train_loss[members] = report.loss
        progress.samples[members] += size
        macs = self._task.host.multiply_adds + self._seed_macs.sum(axis=1)
        progress.flops[members] += 6.0 * macs[members] * size
        if self._state.is_live.any():
            self._judge_gradients(members, report.seed_gradient_norms)

    def _judge_gradients(self, members: IntArray, norms: FloatArray) -> None:
        """Write what training measured of the seeds of members; norms are (m, slots, tensors)."""
        measured = self._measured
        vanishing, exploding, health = lifecycle.gradient_health(norms, self.config)
        measured.has_gradient[members] = ~np.isnan(norms).all(axis=2)
        finite = np.nan_to_num(norms, nan=0.0, posinf=1e9)
        measured.gradient_norm[members] = np.sqrt((finite**2).sum(axis=2))
        measured.vanishing[members] = vanishing
        measured.exploding[members] = exploding
        measured.health[members] = health

    def _evaluate(self, members: IntArray) -> None:
        """Evaluate the coalitions of members on the validation split."""
        coalitions, result = self._run_coalitions(
            members, self._data.validation, self.config.attribution == "leave_one_out"
        )
        live, committed = coalitions.live, coalitions.committed
        self._progress.record(
            members, result.accuracy[live], result.loss[live], result.accuracy[committed]
        )
        record_contributions(self._measured, members, coalitions, result.accuracy)

    def _test(self, members: IntArray) -> None:
        """Evaluate finished members on the test split."""
        coalitions, result = self._run_coalitions(members, self._data.test, False)
        self._test_accuracy[members] = result.accuracy[coalitions.live]
        self._committed_test_accuracy[members] = result.accuracy[coalitions.committed]

    def _run_coalitions(
        self, members: IntArray, images: Any, leave_one_out: bool
    ) -> tuple[Coalitions, Evaluation]:
        coalitions = plan_coalitions(members, self._state, leave_one_out=leave_one_out)
        result = self._pop.evaluate(coalitions.member, coalitions.alpha, self._seeds, images)
        return coalitions, result

    def _take_inventory(self) -> None:
        """Work out what the slots hold, once per change of the lifecycle state."""
        state = self._state
        stage, population = state.stage, self._pop
        is_mixed = (stage >= Stage.BLENDING) & (stage <= Stage.FOSSILIZED)
        alpha = np.where(is_mixed, state.alpha, 0.0)
        self._seeds = Seeds(
            blueprint=state.blueprint,
            blend=_STYLE_BLEND[state.style],
            alpha=alpha,
            beta=np.where(stage == Stage.TRAINING, 1.0, alpha),
            is_isolated=self._isolates[stage],
            is_frozen=state.mode == DOWN,
        )
        slots, index = np.arange(stage.shape[1]), np.maximum(state.blueprint, 0)
        gate = population.gate_parameters * (self._seeds.blend == Blend.GATE)
        sizes = population.seed_parameters[slots, index] + gate
        self._seed_sizes = np.where(state.is_live, sizes, 0)
        self._seed_macs = np.where(state.is_live, population.seed_multiply_adds[slots, index], 0)
        self._committed_size = np.where(stage == Stage.FOSSILIZED, self._seed_sizes, 0).sum(axis=1)

    def _take_stock(self) -> None:
        """Work out scores and potential of the present state."""
        host, rent = self._task.host.num_parameters, self.config.rent_weight
        progress, state = self._progress, self._state
        self._standing = Standing(
            score=score(progress.accuracy, self._seed_sizes.sum(axis=1), host, rent),
            committed_score=score(progress.committed_accuracy, self._committed_size, host, rent),
            potential=potential(state.stage, state.stage_steps),
        )

    # ------------------------------------------------------------------ episodes

    def _build(self) -> None:
        """Read the data and allocate the population; done at the first reset."""
        config = self.config
        self._splits = _load_splits(config.task, str(self.device))
        settings = SGDSettings(
            momentum=config.momentum,
            weight_decay=config.host_weight_decay,
            clip_norm=config.clip_norm,
        )
        host = self._task.host
        self._population = Population(
            host,
            self._blueprints,
            self.num_envs,
            settings,
            self.device,
            config.batch_size,
            config.chunk_size,
        )
        # A gate is part of the price of every blueprint, so that no style can exceed the budget.
        self._budget_table = (
            self._population.seed_parameters + self._population.gate_parameters[:, None]
        )
        self._state = LifecycleState.empty(self.num_envs, host.num_slots)
        self._measured = Measurements.empty(self.num_envs, host.num_slots)
        self._progress = Progress.empty(self.num_envs)
        self._has_test = np.zeros(self.num_envs, dtype=bool)
        self._test_accuracy = np.zeros(self.num_envs)
        self._committed_test_accuracy = np.zeros(self.num_envs)
        self._member_key = np.zeros(self.num_envs, dtype=np.uint64)
        self._episode = np.zeros(self.num_envs, dtype=np.int64)

    def _seed(self, seed: int | list[int | None] | None, members: IntArray, is_first: bool) -> None:
        """Give members new streams where a seed is given, or where there is none yet."""
        if seed is None and is_first:
            seed = int(self.np_random.integers(2**62))
        if seed is None:
            return
        seeds: list[int | None]
        if isinstance(seed, (int, np.integer)):
            seeds = [int(seed) + i for i in range(self.num_envs)]
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(
                f"seed: expected one integer or {self.num_envs} entries, got {len(seeds)}"
            )
        for value in seeds:
            if value is not None and value < 0:
                raise ValueError(f"seed: expected non-negative integers, got {value}")
        if isinstance(seed, (int, np.integer)):
            self._np_random, self._np_random_seed = gym.utils.seeding.np_random(int(seed))
        for i in members:
            value = seeds[i]
            if value is None and not is_first:
                continue
            if value is None:
                value = int(self.np_random.integers(2**62))
            self._member_key[i] = streams.make_key(value % 2**64)[0]
            self._episode[i] = 0

    def _begin_episodes(self, members: IntArray) -> None:
        """Start a new episode for some members."""
        self._episode_key[members] = streams.make_key(
            self._member_key[members], self._episode[members]
        )
        self._episode[members] += 1
        where = np.zeros(self._state.stage.shape, dtype=bool)
        where[members] = True
        self._state.clear(where)
        self._measured.clear(where)
        self._progress.begin(members, self._observations.initial_loss)
        self._is_done[members] = False
        self._has_test = np.zeros(self.num_envs, dtype=bool)
        key = streams.make_key(self._episode_key[members], _STREAM_HOST)
        self._pop.reset(members, key)
        self._take_inventory()
        _, result = self._run_coalitions(members, self._data.validation, False)
        progress = self._progress
        progress.accuracy[members] = result.accuracy
        progress.committed_accuracy[members] = result.accuracy
        progress.best_accuracy[members] = result.accuracy
        progress.loss[members] = result.loss
        self._take_stock()

    # ------------------------------------------------------------------ what is shown

    def _refresh_masks(self) -> None:
        self._conditional = self._actions.conditional_masks(
            self._state,
            self._measured,
            self._budget_table,
            self._task.host.num_parameters,
            self.config,
        )
        self._marginal = self._actions.marginal_mask(self._conditional)

    def _observe(self) -> npt.NDArray[np.float32]:
        return self._observations.build(
            self._progress, self._state, self._measured, self._seed_sizes, self._committed_size
        )

    def _info(self, terms: dict[str, FloatArray] | None = None) -> dict[str, Any]:
        """Build info: copies, NumPy only, with Gymnasium's `_key` masks."""
        state, measured, progress = self._state, self._measured, self._progress
        standing = self._standing
        if terms is None:
            terms = {name: np.zeros(self.num_envs) for name in self._weights}
        everyone = np.ones(self.num_envs, dtype=bool)
        values: dict[str, Any] = {
            "action_mask": self._marginal,
            "action_valid": progress.last_valid,
            "op": progress.last_op,
            "accuracy": progress.accuracy,
            "loss": progress.loss,
            "committed_accuracy": progress.committed_accuracy,
            "score": standing.score,
            "committed_score": standing.committed_score,
            "contribution": measured.contribution,
            "contribution_valid": measured.has_contribution,
            "stage": state.stage,
            "alpha": state.alpha,
            "blueprint": state.blueprint,
            "parameters": self._seed_sizes.sum(axis=1),
            "host_parameters": np.full(self.num_envs, self._task.host.num_parameters),
            "flops": progress.flops,
            "samples": progress.samples.astype(np.int64),
        }
        info: dict[str, Any] = {}
        for name, value in values.items():
            info[name], info[f"_{name}"] = value.copy(), everyone.copy()
        parts: dict[str, Any] = {}
        for name, value in terms.items():
            parts[name], parts[f"_{name}"] = value.copy(), everyone.copy()
        info["reward_terms"], info["_reward_terms"] = parts, everyone.copy()
        for name, value in (
            ("test_accuracy", self._test_accuracy),
            ("committed_test_accuracy", self._committed_test_accuracy),
        ):
            info[name] = np.where(self._has_test, value, 0.0)
            info[f"_{name}"] = self._has_test.copy()
        return info

    # ------------------------------------------------------------------ checks

    @property
    def _pop(self) -> Population:
        assert self._population is not None
        return self._population

    @property
    def _data(self) -> Splits:
        assert self._splits is not None
        return self._splits

    def _require_reset(self) -> None:
        if self._population is None:
            raise gym.error.ResetNeeded("call reset() before using the environment")

    def _check_actions(self, actions: Any) -> IntArray:
        """Return the actions as int64 after checking type, shape and range."""
        self._require_reset()
        array = np.asarray(actions)
        shape = (self.num_envs, len(HEAD_NAMES))
        if not np.issubdtype(array.dtype, np.integer):
            raise TypeError(
                f"actions: expected integers of shape {shape}, got dtype {array.dtype}; "
                "pass option indices, for example from sample_valid_actions"
            )
        if array.shape != shape:
            raise ValueError(
                f"actions: expected shape {shape} (num_envs, heads), got {array.shape}; "
                f"the heads are {', '.join(HEAD_NAMES)}"
            )
        outside = (array < 0) | (array >= self._actions.nvec)
        if outside.any():
            member, head = (int(x) for x in np.argwhere(outside)[0])
            raise ValueError(
                f"actions[{member}]: head {HEAD_NAMES[head]!r} expected 0 to "
                f"{self._actions.nvec[head] - 1}, got {array[member, head]}"
            )
        return array.astype(np.int64)

    def _members_of_mask(self, mask: Any, is_first: bool) -> IntArray:
        array = np.asarray(mask)
        if array.dtype != np.bool_ or array.shape != (self.num_envs,):
            raise ValueError(
                f"reset_mask: expected bool of shape ({self.num_envs},), "
                f"got {array.dtype} of shape {array.shape}"
            )
        if is_first and not array.all():
            self._population = None
            raise gym.error.ResetNeeded(
                "the first reset must start all members: leave out the mask"
            )
        return np.nonzero(array)[0]

    def _raise_illegal(self, actions: IntArray, where: BoolArray) -> None:
        member = int(np.nonzero(where)[0][0])
        chosen = {head.name: head.options[actions[member, h]] for h, head in enumerate(self.heads)}
        raise ValueError(
            f"actions[{member}] is illegal in the present state: {chosen}. Choose by "
            "conditional_masks() or sample_valid_actions(rng), or set illegal_actions='wait'"
        )


def _masked_info(info: dict[str, Any], mask: BoolArray) -> dict[str, Any]:
    """Restrict the `_key` masks of an info dictionary."""
    result: dict[str, Any] = {}
    for name, value in info.items():
        if isinstance(value, dict):
            result[name] = _masked_info(value, mask)
        elif name.startswith("_"):
            result[name] = value & mask
        else:
            result[name] = value
    return result


@functools.cache
def _load_splits(task: str, device: str) -> Splits:
    """Read a task's data once per process and device."""
    splits = TASKS[task].load()
    target = torch.device(device)
    return Splits(
        train=splits.train.to(target),
        validation=splits.validation.to(target),
        test=splits.test.to(target),
    )
