"""What happens in an env step: the lifecycle acts, hosts train, coalitions are evaluated.

The Gymnasium side (spaces, autoreset, masks, info) is in `vector_env`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from esper_env.config import (
    STYLES,
    Blend,
    BoolArray,
    EnvConfig,
    IntArray,
    Op,
    Stage,
)
from esper_env.growth import lifecycle
from esper_env.growth.contributions import Coalitions, plan_coalitions, record_contributions
from esper_env.growth.gradient_health import record_gradients
from esper_env.growth.lifecycle import DOWN, LifecycleState, Measurements, Request
from esper_env.growth.observation import Conditions, Progress, Sizes
from esper_env.growth.reward import Standing, Transition, appraise, potential
from esper_env.growth.rollback import GovernorState, judge
from esper_env.population.blueprints import Blueprint
from esper_env.population.images import Draw, ImageSet
from esper_env.population.interface import Evaluation, Seeds, SGDSettings
from esper_env.population.population import Population
from esper_env.rng import Stream, make_key, uniform
from esper_env.tasks import TASKS, load_splits, resolve_host
from esper_env.tasks.instances import make_instances
from esper_env.tasks.sampling import draw_batches

_STYLE_BLEND = np.array([style.blend for style in STYLES])


class Simulation:
    """All members: their networks, lifecycle, measurements and progress.

    Creating one reads the data and allocates the population.

    Args:
        num_envs: Number of members.
        device: Where all tensors live.
        config: The environment's settings.
        blueprints: The registry, in the order of the blueprint head.
    """

    def __init__(
        self,
        num_envs: int,
        device: str,
        config: EnvConfig,
        blueprints: Sequence[Blueprint],
    ) -> None:
        self.config = config
        self.task = TASKS[config.task]
        self.host = resolve_host(config)
        self.splits = load_splits(self.task.load, config.data_dir, device)
        self._train_labels = self.splits.train.labels.cpu().numpy()
        self.instances = make_instances(
            config.instances, self.task.ranges, config.host_learning_rate
        )
        settings = SGDSettings(
            momentum=config.momentum,
            weight_decay=config.host_weight_decay,
            clip_norm=config.clip_norm,
        )
        self.population = Population(
            [self.host.scaled(width) for width in self.instances.widths],
            blueprints,
            num_envs,
            settings,
            device,
            config.batch_size,
            config.chunk_size,
            config.precision,
        )
        self.instance = np.zeros(num_envs, dtype=np.int64)
        """Index of each member's instance in the configured set."""
        self.state = LifecycleState.empty(num_envs, self.host.num_slots)
        self.measured = Measurements.empty(num_envs, self.host.num_slots)
        self.progress = Progress.empty(num_envs)
        self.governor = GovernorState.empty(num_envs, config)
        self.is_rolled_back = np.zeros(num_envs, dtype=bool)
        """Which members were rolled back in the last step."""
        self.has_test = np.zeros(num_envs, dtype=bool)
        """Which members have just ended, so that their test accuracies are known."""
        self.test_accuracy = np.zeros(num_envs)
        self.committed_test_accuracy = np.zeros(num_envs)
        self.seeds: Seeds
        """What the slots hold, as the population sees it."""
        self.sizes: Sizes
        """Parameters of the networks."""
        self.budget_table: IntArray
        """What each blueprint takes from the budget: a gate too, so that no style can exceed it.
        (num_envs, slots, blueprints)."""
        self.conditions: Conditions
        """What is known of each member's training."""
        self.standing: Standing
        """Scores and potential of the present state."""
        self._initial_loss = float(np.log(self.host.num_classes))
        self._isolates = np.array([stage.name in config.isolated_stages for stage in Stage])
        self._inventory_key, self._has_seeds = b"", False
        self._member_key = np.zeros(num_envs, dtype=np.uint64)
        self._episode_key = np.zeros(num_envs, dtype=np.uint64)
        self._episode = np.zeros(num_envs, dtype=np.int64)

    def seed(self, member: int, value: int) -> None:
        """Make a member's coming episodes a function of `value` alone."""
        self._member_key[member] = make_key(value % 2**64)[0]
        self._episode[member] = 0

    def member_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return every NumPy array that has one row per member, by a unique name. No copies."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        for part in ("state", "measured", "progress", "governor"):
            arrays |= {f"{part}.{name}": array for name, array in vars(getattr(self, part)).items()}
        for name in ("_member_key", "_episode_key", "_episode", "has_test", "is_rolled_back"):
            arrays[name.removeprefix("_")] = getattr(self, name)
        arrays["instance"] = self.instance
        for name in ("test_accuracy", "committed_test_accuracy"):
            arrays[name] = getattr(self, name)
        return arrays

    def refresh(self) -> None:
        """Work out what follows from the state, after it was written from outside."""
        self._take_inventory()
        self._take_stock()

    def begin_episodes(self, members: IntArray, instance: IntArray | None = None) -> None:
        """Start a new episode for some members.

        Args:
            members: Which. (m,).
            instance: Index of each one's instance; None draws them. (m,).
        """
        self._episode_key[members] = make_key(self._member_key[members], self._episode[members])
        self._episode[members] += 1
        where = np.zeros(self.state.stage.shape, dtype=bool)
        where[members] = True
        self.state.clear(where)
        self.measured.clear(where)
        self.progress.begin(members, self._initial_loss)
        self.has_test[members] = False
        self.is_rolled_back[members] = False
        if instance is None:
            key = make_key(self._episode_key[members], Stream.INSTANCE)
            instance = (uniform(key, 1)[:, 0] * len(self.instances)).astype(np.int64)
        self.instance[members] = instance
        key = make_key(self._episode_key[members], Stream.HOST)
        self.population.reset(members, self.instances.width[instance], key)
        self.population.storage.save(members)
        self.governor.begin(members)
        self._take_inventory()
        _, result = self._run_coalitions(members, self.splits.validation, "none")
        progress = self.progress
        progress.accuracy[members] = result.accuracy
        progress.committed_accuracy[members] = result.accuracy
        progress.best_accuracy[members] = result.accuracy
        progress.loss[members] = result.loss
        self._take_stock()

    def advance(
        self, request: Request, is_valid: BoolArray, active: BoolArray
    ) -> tuple[Transition, BoolArray]:
        """Act, tick, train and evaluate.

        Args:
            request: One legal decoded action per member; WAIT for members that are not active.
            is_valid: Whether the action asked for was legal. (num_envs,) bool.
            active: Members that take part in the step. (num_envs,) bool.

        Returns:
            The transition, for the reward, and which episodes were truncated.
        """
        config, state, progress = self.config, self.state, self.progress
        before = self.standing
        lifecycle.apply(state, self.measured, request, config)
        np.copyto(progress.last_op, request.op, where=active)
        np.copyto(progress.last_valid, is_valid, where=active)
        new = np.nonzero(request.op == Op.GERMINATE.value)[0]
        if len(new):
            key = make_key(self._episode_key[new], Stream.SEED, progress.steps[new])
            width = self.instances.width[self.instance[new]]
            self.population.germinate(new, width, request.slot[new], request.blueprint[new], key)
        lifecycle.tick(state, self.measured, active, config)
        self._take_inventory()

        members = np.nonzero(active)[0]
        self.is_rolled_back = np.zeros(len(active), dtype=bool)
        if len(members):
            fossilized = np.nonzero(request.op == Op.FOSSILIZE.value)[0]
            if len(fossilized):
                # Before this step's training, so that no snapshot lacks a seed that is kept.
                self._save(fossilized)
            self._govern(members, self._train(members))
            progress.steps[members] += 1
            self._evaluate(members)
        is_lost = active & (self.governor.rollbacks >= config.max_rollbacks)
        is_last = active & (progress.steps >= config.episode_steps) | is_lost
        self.has_test = is_last.copy()
        if is_last.any():
            self._test(np.nonzero(is_last)[0])
        self._take_stock()
        is_terminated = is_last if config.horizon == "terminal" else is_lost
        transition = Transition(before, self.standing, is_last, is_terminated, self.is_rolled_back)
        return transition, is_last & ~is_terminated

    def _train(self, members: IntArray) -> BoolArray:
        """Train members on their own batches and judge the gradients of their seeds.

        Returns:
            Whether all weights of each are finite afterwards. (m,) bool.
        """
        config, progress = self.config, self.progress
        host_rate = self.instances.learning_rate[self.instance[members]]
        if config.learning_rate_decay == "linear":
            host_rate = host_rate * (1 - progress.steps[members] / config.episode_steps)
        report = self.population.train(
            members,
            self.seeds,
            self.splits.train,
            self._draw_batches(members),
            host_rate,
            host_rate * (config.seed_learning_rate / config.host_learning_rate),
        )
        progress.train_loss[members] = report.loss
        size = config.batches_per_step * config.batch_size
        progress.samples[members] += size
        progress.flops[members] += 6.0 * self._multiply_adds[members] * size
        if self._has_seeds:
            record_gradients(self.measured, members, report.seed_gradient_norms, config)
        return report.is_finite

    def _draw_batches(self, members: IntArray) -> Draw:
        """Draw what the coming batches show to members."""
        config = self.config
        return draw_batches(
            self._episode_key[members],
            self.progress.steps[members],
            self.instance[members],
            self.instances,
            self._train_labels,
            num_classes=self.host.num_classes,
            batches=config.batches_per_step,
            batch_size=config.batch_size,
            augments=self.task.augments,
        )

    def _save(self, members: IntArray) -> None:
        """Take snapshots of members."""
        self.population.storage.save(members)
        self.governor.since_snapshot[members] = 0

    def _govern(self, members: IntArray, is_finite: BoolArray) -> None:
        """Roll back members that panic and take snapshots of those that are due."""
        governor, progress = self.governor, self.progress
        loss = progress.train_loss[members]
        panics = judge(governor, members, loss, is_finite, self._initial_loss, self.config)
        if panics.any():
            panicked = members[panics]
            self.is_rolled_back[panicked] = True
            self.population.storage.restore(panicked)
            lifecycle.roll_back(self.state, self.measured, panicked, self.config)
            progress.train_loss[panicked] = self._initial_loss
            self._take_inventory()
        # After a panic the count starts anew, so nobody who has panicked is due.
        due = members[governor.since_snapshot[members] >= self.config.snapshot_interval]
        if len(due):
            self._save(due)

    def _evaluate(self, members: IntArray) -> None:
        """Evaluate the coalitions of members on the validation split."""
        coalitions, result = self._run_coalitions(
            members, self.splits.validation, self.config.attribution
        )
        live, committed = coalitions.live, coalitions.committed
        self.progress.record(
            members, result.accuracy[live], result.loss[live], result.accuracy[committed]
        )
        record_contributions(self.measured, members, coalitions, result.accuracy)

    def _test(self, members: IntArray) -> None:
        """Evaluate finished members on the test split."""
        coalitions, result = self._run_coalitions(members, self.splits.test, "none")
        self.test_accuracy[members] = result.accuracy[coalitions.live]
        self.committed_test_accuracy[members] = result.accuracy[coalitions.committed]

    def _run_coalitions(
        self, members: IntArray, images: ImageSet, attribution: str
    ) -> tuple[Coalitions, Evaluation]:
        coalitions = plan_coalitions(
            members,
            self.state,
            leave_one_out=attribution != "none",
            all_subsets=attribution == "full",
        )
        result = self.population.evaluate(coalitions.member, coalitions.alpha, self.seeds, images)
        return coalitions, result

    def _take_inventory(self) -> None:
        """Work out what the slots hold, once per change of the lifecycle state."""
        state = self.state
        parts = (state.stage, state.blueprint, state.style, state.alpha, state.mode, self.instance)
        key = b"".join([array.tobytes() for array in parts])
        if key == self._inventory_key:
            return
        self._inventory_key = key
        stage, population, is_live = state.stage, self.population, state.is_live
        self._has_seeds = bool(is_live.any())
        width = self.instances.width[self.instance]
        is_mixed = (stage >= Stage.BLENDING) & (stage <= Stage.FOSSILIZED)
        alpha = np.where(is_mixed, state.alpha, 0.0)
        self.seeds = Seeds(
            blueprint=state.blueprint,
            blend=_STYLE_BLEND[state.style],
            alpha=alpha,
            beta=np.where(stage == Stage.TRAINING, 1.0, alpha),
            is_isolated=self._isolates[stage],
            is_frozen=state.mode == DOWN,
            width=width,
        )
        at = (width[:, None], np.arange(stage.shape[1]), np.maximum(state.blueprint, 0))
        gate = population.gate_parameters[width] * (self.seeds.blend == Blend.GATE)
        seeds = np.where(is_live, population.seed_parameters[at] + gate, 0)
        macs = np.where(is_live, population.seed_multiply_adds[at], 0)
        self.budget_table = (
            population.seed_parameters[width] + population.gate_parameters[width][..., None]
        )
        self._multiply_adds = population.host_multiply_adds[width] + macs.sum(axis=1)
        self.sizes = Sizes(
            host=population.host_parameters[width],
            seeds=seeds,
            grown=seeds.sum(axis=1),
            committed=np.where(stage == Stage.FOSSILIZED, seeds, 0).sum(axis=1),
            budgeted=lifecycle.used_parameters(state, self.budget_table),
        )
        self.conditions = Conditions(
            learning_rate=self.instances.learning_rate[self.instance],
            train_fraction=self.instances.train_fraction[self.instance],
            width=np.array(self.instances.widths)[width],
        )

    def _take_stock(self) -> None:
        """Work out scores and potential of the present state."""
        sizes, rent = self.sizes, self.config.rent_weight
        progress, state = self.progress, self.state
        self.standing = appraise(
            (progress.accuracy, progress.committed_accuracy),
            (sizes.grown, sizes.committed),
            sizes.host,
            rent,
            potential(state.stage, state.stage_steps),
        )
