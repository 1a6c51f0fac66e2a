"""Env step of all sub-environments: act, tick, train, guard, evaluate.

`state` holds the state of the decision process. `networks` and `scores` are computed from it. Each
access compares the arrays that they depend on with those of the last computation and computes them
again after a change. Spaces, masks, autoreset and info are in `esper_env.envs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from esper_env.config import STYLES, Blend, BoolArray, EnvConfig, FloatArray, IntArray, Op, Stage
from esper_env.growth import lifecycle
from esper_env.growth.contributions import Coalitions, plan_coalitions, record_evaluation
from esper_env.growth.gradient_health import record_gradients
from esper_env.growth.reward import compute_reward, compute_scores, resolve_weights
from esper_env.growth.rollback import forget, judge, record_rollback
from esper_env.growth.state import DOWN, Conditions, Request, Scores, Sizes, State, Transition
from esper_env.population.blueprints import Blueprint
from esper_env.population.images import Draw, ImageSet
from esper_env.population.interface import Evaluation, Exam, Seeds, SGDSettings, Training
from esper_env.population.population import Population
from esper_env.rng import Stream, make_key, uniform
from esper_env.tasks import TASKS, load_splits, resolve_host
from esper_env.tasks.data import check_splits
from esper_env.tasks.instances import make_instances
from esper_env.tasks.regimes import (
    ClassIndex,
    Course,
    check_regimes,
    class_index,
    make_exam,
    plan_course,
)
from esper_env.tasks.sampling import NO_COURSE, NO_INDEX, draw_batches
from esper_env.tasks.task import first_level

_STYLE_BLEND = np.array([style.blend for style in STYLES])


class Networks(NamedTuple):
    """Composition and size of the networks, computed from the slots and the instances."""

    seeds: Seeds
    """Seed table in the format of the population."""
    trained: Seeds
    """The same without parked seeds, which do not train."""
    has_seeds: bool
    """Whether any slot holds a seed."""
    sizes: Sizes
    """Numbers of parameters of the networks."""
    budget_table: IntArray
    """Parameters that each blueprint uses of the budget. A gate is included for every style.
    (num_envs, num_slots, num_blueprints) int64."""
    multiply_adds: IntArray
    """Multiply-adds of the forward pass of host and seeds, per image. (num_envs,) int64."""
    host_multiply_adds: IntArray
    """The same of the host alone. (num_envs,) int64."""
    conditions: Conditions
    """Training conditions of the episodes."""


class StepResult(NamedTuple):
    """Result of `Simulation.step`. Arrays have shape (num_envs,)."""

    reward: FloatArray
    """Reward, 0 for sub-environments that did not take part."""
    reward_terms: dict[str, FloatArray]
    """Weighted terms by name; their sum is the reward."""
    terminated: BoolArray
    """Whether the episode is done by termination."""
    truncated: BoolArray
    """Whether the episode is done by truncation."""


class Simulation:
    """State and networks of all sub-environments, and the env step.

    The constructor loads the data and allocates the population.

    Args:
        num_envs: Number of sub-environments.
        device: Torch device of all tensors.
        config: Settings of the environment.
        blueprints: Registered blueprints, in order.
    """

    def __init__(
        self, num_envs: int, device: str, config: EnvConfig, blueprints: Sequence[Blueprint]
    ) -> None:
        self.config = config
        self.task = TASKS[config.task]
        self.host = resolve_host(config)
        self.splits = load_splits(self.task.load, config.data_dir, device)
        check_splits(config.task, self.splits, self.host)
        self.instances = make_instances(
            config.instances, self.task.ranges, config.host_learning_rate
        )
        levels, classes = self.task.levels, self.host.num_classes
        self._train_labels = first_level(self.splits.train.labels, levels)
        self._train_index = NO_INDEX
        self._indices: dict[int, ClassIndex] = {}
        if self.task.regimes is not None:
            check_regimes(self.task.regimes, classes, levels)
            used = self.instances.train_fraction, self.instances.train_start
            self._train_index = class_index(self._train_labels, classes, *used)
            whole = np.ones(1), np.zeros(1)
            for split in (self.splits.validation, self.splits.test):
                labels = first_level(split.labels, levels)
                self._indices[id(split)] = class_index(labels, classes, *whole)
        # One host per width that occurs. The instance of an episode selects one of them.
        hosts = [self.host.scaled(width) for width in self.instances.widths]
        sgd = SGDSettings(
            momentum=config.momentum,
            weight_decay=config.host_weight_decay,
            clip_norm=config.clip_norm,
        )
        sizes = config.batch_size, config.chunk_size
        self.population = Population(
            hosts, blueprints, num_envs, sgd, device, *sizes, config.precision
        )
        self.state = State.empty(num_envs, self.host.num_slots, config)
        self._weights = resolve_weights(config)
        # Loss of random guessing
        self._initial_loss = float(np.log(self.host.num_classes))
        self._isolates = np.array([stage.name in config.isolated_stages for stage in Stage])
        # Cached values, after a copy of the arrays that they were computed from
        self._networks: tuple[bytes, Networks] | None = None
        self._scores: tuple[Networks, bytes, Scores] | None = None
        self._course: tuple[bytes, Course] | None = None

    # ------------------------------------------------------------------ derived values

    @property
    def networks(self) -> Networks:
        """Composition and size of the current networks."""
        slots, instance = self.state.slots, self.state.episode.instance
        parts = slots.stage, slots.blueprint, slots.style, slots.alpha, slots.mode, instance
        key = b"".join(map(np.ndarray.tobytes, parts))
        if self._networks is None or self._networks[0] != key:
            self._networks = key, self._describe_networks()
        return self._networks[1]

    @property
    def scores(self) -> Scores:
        """Scores and potential of the current state."""
        slots, progress, networks = self.state.slots, self.state.progress, self.networks
        parts = slots.stage, slots.stage_steps, progress.accuracy, progress.committed_accuracy
        key = b"".join(map(np.ndarray.tobytes, (*parts, progress.earned)))
        if self._scores is None or self._scores[0] is not networks or self._scores[1] != key:
            scores = compute_scores(slots, progress, networks.sizes, self.config)
            self._scores = networks, key, scores
        return self._scores[2]

    @property
    def course(self) -> Course:
        """Courses of the current episodes; without kinds if the task has no regimes."""
        regimes, key = self.task.regimes, self.state.episode.key
        if regimes is None:
            return NO_COURSE
        if self._course is None or self._course[0] != key.tobytes():
            steps, classes = self.config.episode_steps, self.host.num_classes
            self._course = key.tobytes(), plan_course(key, regimes, steps, classes)
        return self._course[1]

    @property
    def regime(self) -> IntArray:
        """Kind of problem that each network is judged by and trains on next. (num_envs,) int64."""
        kind, steps = self.course.kind, self.state.progress.steps
        return kind[np.arange(len(kind)), steps] if len(kind) else np.zeros_like(steps)

    def _describe_networks(self) -> Networks:
        """Compute composition and size of the networks from the slots and the instances."""
        slots, population, instances = self.state.slots, self.population, self.instances
        stage, instance = slots.stage, self.state.episode.instance
        is_live = lifecycle.is_live(stage)
        width = instances.width[instance]
        is_mixed = (stage >= Stage.BLENDING) & (stage <= Stage.FOSSILIZED)
        alpha = np.where(is_mixed, slots.alpha, 0.0)
        seeds = Seeds(
            # Copied, because an engine may keep the array while the slots change.
            blueprint=slots.blueprint.copy(),
            blend=_STYLE_BLEND[slots.style],
            alpha=alpha,
            # A seed in TRAINING has alpha 0. Its backward pass uses alpha 1, so it learns.
            beta=np.where(stage == Stage.TRAINING, 1.0, alpha),
            is_isolated=self._isolates[stage],
            is_frozen=slots.mode == DOWN,
            width=width,
        )
        # Tables (widths, num_slots, num_blueprints) -> one entry per slot (num_envs, num_slots)
        at = (width[:, None], np.arange(stage.shape[1]), np.maximum(slots.blueprint, 0))
        gate = population.gate_parameters[width] * (seeds.blend == Blend.GATE)
        parameters = np.where(is_live, population.seed_parameters[at] + gate, 0)
        budget_table = (
            population.seed_parameters[width] + population.gate_parameters[width][..., None]
        )
        # Parked seeds neither train nor cost anything.
        is_active, trained = is_live, seeds
        if self.config.parking:
            is_parked = lifecycle.is_parked(slots)
            is_active = is_live & ~is_parked
            trained = replace(seeds, blueprint=np.where(is_parked, -1, slots.blueprint))
        is_charged = is_active & (alpha > 0) if self.config.objective == "anytime" else is_active
        multiply_adds = np.where(is_active, population.seed_multiply_adds[at], 0)
        return Networks(
            seeds=seeds,
            trained=trained,
            has_seeds=bool(is_live.any()),
            sizes=Sizes(
                host=population.host_parameters[width],
                seeds=parameters,
                grown=parameters.sum(axis=1),
                charged=np.where(is_charged, parameters, 0).sum(axis=1),
                committed=np.where(is_active & (stage == Stage.FOSSILIZED), parameters, 0).sum(
                    axis=1
                ),
                budgeted=lifecycle.used_parameters(slots, budget_table),
            ),
            budget_table=budget_table,
            multiply_adds=population.host_multiply_adds[width] + multiply_adds.sum(axis=1),
            host_multiply_adds=population.host_multiply_adds[width],
            conditions=Conditions(
                learning_rate=instances.learning_rate[instance],
                train_fraction=instances.train_fraction[instance],
                width=np.array(instances.widths)[width],
                compute=instances.compute[instance],
            ),
        )

    # ------------------------------------------------------------------ episodes

    def seed(self, row: int, value: int) -> None:
        """Start the random stream of a sub-environment; later episodes depend only on `value`.

        Args:
            row: Index of the sub-environment.
            value: Random seed.
        """
        self.state.episode.stream_key[row] = make_key(value % 2**64)[0]
        self.state.episode.num_episodes[row] = 0

    def begin_episodes(self, rows: IntArray, instance: IntArray | None = None) -> None:
        """Start a new episode in some sub-environments.

        The host gets new weights and is evaluated before any training.

        Args:
            rows: Indices of the sub-environments. (m,) int64.
            instance: Index of the instance of each sub-environment, (m,) int64. None samples them.
        """
        slots, measured, progress, rollback, episode = self.state
        episode.key[rows] = make_key(episode.stream_key[rows], episode.num_episodes[rows])
        episode.num_episodes[rows] += 1
        where = np.zeros(slots.stage.shape, dtype=bool)
        where[rows] = True
        slots.clear(where)
        measured.clear(where)
        progress.begin(rows, self._initial_loss)
        rollback.begin(rows)
        episode.has_test[rows] = episode.is_rolled_back[rows] = False
        episode.test_accuracy[rows] = episode.committed_test_accuracy[rows] = 0.0
        if instance is None:
            key = make_key(episode.key[rows], Stream.INSTANCE)
            instance = (uniform(key, 1)[:, 0] * len(self.instances)).astype(np.int64)
        episode.instance[rows] = instance
        key = make_key(episode.key[rows], Stream.HOST)
        self.population.reset(rows, self.instances.width[instance], key)
        # A rollback before the first regular snapshot restores the initial weights.
        self.population.storage.save(rows)
        # All slots are empty, so the live and the committed network are the same coalition.
        _, result = self._evaluate_coalitions(rows, self.splits.validation, "none")
        for accuracy in (progress.accuracy, progress.committed_accuracy, progress.best_accuracy):
            accuracy[rows] = result.accuracy
        progress.loss[rows] = result.loss

    # ------------------------------------------------------------------ one env step

    def step(self, request: Request, is_valid: BoolArray, active: BoolArray) -> StepResult:
        """Run one env step: act, tick, train, guard, evaluate, then compute the reward.

        Args:
            request: One legal decoded action per sub-environment, WAIT for those not active.
            is_valid: True where the original action was legal. (num_envs,) bool.
            active: True for sub-environments that take part in the env step. (num_envs,) bool.

        Returns:
            Reward and end flags of all sub-environments.
        """
        slots, measured, progress, rollback, episode = self.state
        config, rows = self.config, np.nonzero(active)[0]
        before = self.scores
        episode.is_rolled_back[:] = False
        self._act(request, is_valid, active)
        lifecycle.tick(slots, measured, active, config)
        if len(rows):
            is_finite = self._train(rows)
            self._guard(rows, is_finite)
            self._evaluate(rows)
            if config.objective == "anytime":
                progress.earned[rows] += self.scores.score[rows] / config.episode_steps
        # An episode ends after `episode_steps`, or earlier at `max_rollbacks`.
        is_lost = active & (rollback.rollbacks >= config.max_rollbacks)
        is_last = active & (progress.steps >= config.episode_steps) | is_lost
        episode.has_test[:] = is_last
        if is_last.any():
            self._test(np.nonzero(is_last)[0])
        # The time limit truncates an episode, unless the horizon is "terminal".
        terminated = is_last if config.horizon == "terminal" else is_lost
        transition = Transition(
            before, self.scores, is_last, terminated, episode.is_rolled_back.copy()
        )
        reward, terms = compute_reward(transition, self._weights, config)
        if len(rows) < len(active):
            for array in (reward, *terms.values()):
                array[~active] = 0.0
        return StepResult(reward, terms, terminated.copy(), is_last & ~terminated)

    def _act(self, request: Request, is_valid: BoolArray, active: BoolArray) -> None:
        """Apply the actions to slots, create new seeds, and save snapshots of fossilized ones."""
        slots, measured, progress, _, episode = self.state
        pruned = np.nonzero(request.op == Op.PRUNE.value)[0]
        is_young = slots.age[pruned, request.slot[pruned]] < self.config.flag_age
        progress.young_prunes[pruned] += is_young
        lifecycle.apply(slots, measured, request, self.config)
        np.copyto(progress.last_op, request.op, where=active)
        np.copyto(progress.last_valid, is_valid, where=active)
        new = np.nonzero(request.op == Op.GERMINATE.value)[0]
        if len(new):
            key = make_key(episode.key[new], Stream.SEED, progress.steps[new])
            width = self.instances.width[episode.instance[new]]
            self.population.germinate(new, width, request.slot[new], request.blueprint[new], key)
        fossilized = np.nonzero(request.op == Op.FOSSILIZE.value)[0]
        if len(fossilized):
            # Before the training of this env step: a rollback must not lose a fossilized seed.
            self._save(fossilized)

    def _train(self, rows: IntArray) -> BoolArray:
        """Train the networks of some sub-environments and measure the gradients of their seeds.

        Args:
            rows: Indices of the sub-environments. (m,) int64.

        Returns:
            True where all weights are finite after training. (m,) bool.
        """
        _, measured, progress, _, episode = self.state
        config, networks = self.config, self.networks
        batches, unspent = self._buy_batches(rows)
        draw = self.draw_batches(rows, batches)
        progress.unspent[rows] = unspent
        is_finite, has_batch = np.ones(len(rows), dtype=bool), batches > 0
        if not has_batch.all():
            # A network that saves its compute for a later batch has no gradients in this env step.
            idle = rows[~has_batch]
            nothing = np.full((len(idle), self.host.num_slots, 1), np.nan)
            record_gradients(measured, idle, nothing, np.zeros(len(idle)), config)
            rows, batches, draw = rows[has_batch], batches[has_batch], draw.of(has_batch)
            if not len(rows):
                return is_finite
        host_rate = self.instances.learning_rate[episode.instance[rows]]
        if config.learning_rate_decay == "linear":
            host_rate = host_rate * (1 - progress.steps[rows] / config.episode_steps)
        seed_rate = host_rate * (config.seed_learning_rate / config.host_learning_rate)
        training = Training(rows, networks.trained, self.splits.train, draw, host_rate, seed_rate)
        report = self.population.train(training)
        progress.train_loss[rows] = report.loss
        size = batches * config.batch_size
        progress.samples[rows] += size
        # 2 operations per multiply-add; the backward pass costs twice the forward pass.
        progress.flops[rows] += 6.0 * networks.multiply_adds[rows] * size
        if networks.has_seeds:
            norms = report.seed_gradient_norms, report.host_gradient_norm
            record_gradients(measured, rows, *norms, config)
        is_finite[has_batch] = report.is_finite
        return is_finite

    def _buy_batches(self, rows: IntArray) -> tuple[IntArray, FloatArray]:
        """Return the batches of the coming env step, and the compute that is left over.

        Args:
            rows: Indices of the sub-environments. (m,) int64.

        Returns:
            Batches (m,) int64, and compute in the unit of `Progress.unspent` (m,) float64.
        """
        config, networks = self.config, self.networks
        if config.clock == "steps":
            return np.full(len(rows), config.batches_per_step), np.zeros(len(rows))
        share = networks.conditions.compute[rows] * config.batches_per_step
        available = self.state.progress.unspent[rows] + share * networks.host_multiply_adds[rows]
        price = networks.multiply_adds[rows]
        # The budget of a whole number of batches buys all of them, whatever the rounding.
        batches = np.floor(available / price + 1e-9).astype(np.int64)
        return batches, np.maximum(available - batches * price, 0.0)

    def draw_batches(self, rows: IntArray, batches: IntArray | None = None) -> Draw:
        """Sample the coming training batches of some sub-environments; see `draw_batches`.

        Args:
            rows: Indices of the sub-environments. (m,) int64.
            batches: Batches of each, if they are known. (m,) int64.
        """
        config, episode = self.config, self.state.episode
        # Batches are a function of the episode's key and the step counter, so a copy of the state
        # trains on the same images.
        return draw_batches(
            episode.key[rows],
            self.state.progress.steps[rows],
            episode.instance[rows],
            self.instances,
            self._train_labels,
            num_classes=self.host.num_classes,
            batches=self._buy_batches(rows)[0] if batches is None else batches,
            batch_size=config.batch_size,
            augments=self.task.augments,
            course=NO_COURSE if self.task.regimes is None else self.course.of(rows),
            class_index=self._train_index,
        )

    def _guard(self, rows: IntArray, is_finite: BoolArray) -> None:
        """Restore snapshots where training diverged or collapsed; save snapshots that are due.

        Args:
            rows: Indices of the sub-environments. (m,) int64.
            is_finite: True where all weights are finite. (m,) bool.
        """
        config, rollback = self.config, self.state.rollback
        loss = self.state.progress.train_loss[rows]
        if self.task.regimes is not None:
            # A jump of the loss at a change of regime is no divergence.
            forget(rollback, rows[self._is_changing(rows)])
        panics = judge(rollback, rows, loss, is_finite, self._initial_loss, config)
        if panics.any():
            self._restore(rows[panics])
        # A rollback restarts the count, so no snapshot of a sub-environment is due after one.
        due = rows[rollback.since_snapshot[rows] >= config.snapshot_interval]
        if len(due):
            self._save(due)

    def _is_changing(self, rows: IntArray) -> BoolArray:
        """Return whether members just trained on other kinds of images than in the step before."""
        course, steps = self.course, self.state.progress.steps[rows]
        before = np.maximum(steps - 1, 0)
        is_same: BoolArray = (course.kind[rows, steps] == course.kind[rows, before]) & (
            course.share[rows, steps] == course.share[rows, before]
        )
        return ~is_same

    def _restore(self, rows: IntArray) -> None:
        """Restore the snapshots of some sub-environments; `rows` is (m,) int64."""
        slots, measured, progress, _, episode = self.state
        episode.is_rolled_back[rows] = True
        self.population.storage.restore(rows)
        lifecycle.roll_back(slots, measured, rows, self.config)
        # The measured loss belongs to discarded weights, and it may not be finite.
        progress.train_loss[rows] = self._initial_loss

    def _evaluate(self, rows: IntArray) -> None:
        """Count the env step and evaluate all coalitions on the validation split."""
        _, measured, progress, *_ = self.state
        progress.steps[rows] += 1
        mode = self.config.attribution
        coalitions, result = self._evaluate_coalitions(rows, self.splits.validation, mode)
        is_finite = np.isfinite(result.loss[coalitions.live])
        if not is_finite.all():
            self._evaluate_restored(rows[~is_finite])
            rows, coalitions = rows[is_finite], coalitions.of(is_finite)
        record_evaluation(progress, measured, rows, coalitions, result.accuracy, result.loss)

    def _evaluate_restored(self, rows: IntArray) -> None:
        """Roll back sub-environments whose validation loss is not finite, and evaluate them again.

        Args:
            rows: Indices of the sub-environments. (m,) int64.
        """
        _, measured, progress, rollback, episode = self.state
        new = rows[~episode.is_rolled_back[rows]]
        record_rollback(rollback, new)
        self._restore(new)
        mode = self.config.attribution
        coalitions, result = self._evaluate_coalitions(rows, self.splits.validation, mode)
        # A layer can return NaN for every weight. The observation stays finite all the same.
        loss = np.where(np.isfinite(result.loss), result.loss, self._initial_loss)
        record_evaluation(progress, measured, rows, coalitions, result.accuracy, loss)

    def _test(self, rows: IntArray) -> None:
        """Evaluate the live and the committed network on the test split."""
        coalitions, result = self._evaluate_coalitions(rows, self.splits.test, "none")
        episode = self.state.episode
        episode.test_accuracy[rows] = result.accuracy[coalitions.live]
        episode.committed_test_accuracy[rows] = result.accuracy[coalitions.committed]

    def _evaluate_coalitions(
        self, rows: IntArray, images: ImageSet, attribution: str
    ) -> tuple[Coalitions, Evaluation]:
        """Return the coalitions for a mode of `attribution`, and their accuracies and losses."""
        seeds = self.networks.seeds
        coalitions = plan_coalitions(
            rows,
            self.state.slots,
            leave_one_out=attribution != "none",
            all_subsets=attribution == "full",
        )
        evaluate, (member, alpha) = self.population.evaluate, coalitions[:2]
        if self.task.regimes is None:
            return coalitions, evaluate(member, alpha, seeds, images)
        course, steps = self.course, self.state.progress.steps[rows]
        result = evaluate(member, alpha, seeds, images, self._exam(rows, images))
        # While one kind replaces another, both count by their share of the images.
        share = np.ones(len(self.state.progress.steps))
        share[rows] = course.share[rows, steps]
        weight = share[member]
        part = weight < 1
        if part.any():
            exam = self._exam(rows, images, is_before=True)
            before = evaluate(member[part], alpha[part], seeds, images, exam)
            for new, old in zip(result, before, strict=True):
                new[part] = weight[part] * new[part] + (1 - weight[part]) * old
        return coalitions, result

    def _exam(self, rows: IntArray, images: ImageSet, *, is_before: bool = False) -> Exam:
        """Return the images that some members are judged by, of the current or previous kind."""
        course, steps = self.course, self.state.progress.steps[rows]
        kind = (course.kind_before if is_before else course.kind)[rows, steps]
        size = len(images) // self.task.levels
        return make_exam(course, kind, rows, len(course.kind), self._indices[id(images)], size)

    def _save(self, rows: IntArray) -> None:
        """Save snapshots of some sub-environments; `rows` is (m,) int64."""
        self.population.storage.save(rows)
        self.state.rollback.since_snapshot[rows] = 0
