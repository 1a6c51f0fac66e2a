"""Regimes: courses of episodes, what members train on and are judged by, and the rollback rule."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from esper_env import EsperVectorEnv, Op
from esper_env.config import EnvConfig, IntArray
from esper_env.growth import simulation
from esper_env.growth.rollback import forget, judge
from esper_env.growth.state import RollbackState
from esper_env.population.interface import Training
from esper_env.rng import make_key
from esper_env.tasks import TASKS
from esper_env.tasks.regimes import (
    Course,
    Kind,
    Regimes,
    check_regimes,
    class_index,
    make_exam,
    plan_course,
)
from esper_env.tasks.sampling import draw_batches
from tests.builders import action, assert_same, make, play, poison, waits

C = 10
KEYS = make_key(np.arange(400, dtype=np.uint64))
CYCLE = Regimes(
    kinds=(
        Kind(name="few", num_classes=(2, 4)),
        Kind(name="many", num_classes=(6, 8), swapped_pairs=(1, 3), distortion=1),
        Kind(name="all", label_noise=0.4),
    ),
    dwell=(3, 7.0),
)


def changes_of(course: Course) -> list[IntArray]:
    """Return the env steps at which the kind changes, by episode."""
    return [np.nonzero(np.diff(row))[0] + 1 for row in course.kind]


# ------------------------------------------------------------------ courses


def test_a_course_dwells_as_long_as_asked_and_cycles_from_a_random_kind() -> None:
    course = plan_course(KEYS, CYCLE, 200, C)
    assert course.kind.shape == (400, 201)
    changes = changes_of(course)
    dwells = np.concatenate([np.diff(c) for c in changes])
    assert dwells.min() == 3
    assert abs(dwells.mean() - 7) < 0.2
    assert abs(np.mean([c[0] for c in changes]) - 7) < 0.7
    # Above the smallest dwell each step ends with the same probability 1 / 5.
    assert abs((dwells == 3).mean() - 0.2) < 0.02
    assert np.bincount(course.kind[:, 0]).min() > 100
    for row, own in zip(course.kind, changes, strict=True):
        assert np.array_equal(row[own], (row[own - 1] + 1) % 3)
    assert (course.share == 1).all()


def test_without_a_dwell_an_episode_has_one_kind() -> None:
    course = plan_course(KEYS, dataclasses.replace(CYCLE, dwell=None), 50, C)
    assert (course.kind == course.kind[:, :1]).all()
    assert np.bincount(course.kind[:, 0]).min() > 100


def test_a_sequence_starts_with_the_first_kind_and_ends_with_the_last() -> None:
    """Classes arrive: each kind has the classes of the one before."""
    kinds = tuple(Kind(name=str(n), num_classes=(n, n)) for n in (2, 5, 10))
    regimes = Regimes(kinds=kinds, order="sequence", dwell=(4, 4.0))
    course = plan_course(KEYS, regimes, 20, C)
    assert (course.kind == np.minimum(np.arange(21) // 4, 2)).all()
    assert (course.has_class.sum(axis=2) == [2, 5, 10]).all()
    assert (course.has_class[:, 0] <= course.has_class[:, 1]).all()
    assert len(np.unique(course.has_class[:, 0], axis=0)) == 45, "every pair of classes"


def test_kinds_have_as_many_classes_and_swapped_labels_as_asked() -> None:
    course = plan_course(KEYS, CYCLE, 10, C)
    counts = course.has_class.sum(axis=2)
    for k, allowed in enumerate(([2, 3, 4], [6, 7, 8], [10])):
        assert np.unique(counts[:, k]).tolist() == allowed
    assert (course.label[:, [0, 2]] == np.arange(C)).all()
    moved = course.label[:, 1] != np.arange(C)
    assert np.unique(moved.sum(axis=1)).tolist() == [2, 4, 6]
    assert not (moved & ~course.has_class[:, 1]).any(), "both classes of a pair are in use"
    # Exchanged in pairs: twice the map is the identity.
    twice = np.take_along_axis(course.label[:, 1], course.label[:, 1], axis=1)
    assert (twice == np.arange(C)).all()


def test_a_gradual_change_raises_the_share_step_by_step() -> None:
    regimes = dataclasses.replace(CYCLE, ramp_steps=3, dwell=(6, 6.0))
    course = plan_course(KEYS, regimes, 20, C)
    assert (course.share[:, :6] == 1).all()
    assert (course.share[:, 6:12] == [0.25, 0.5, 0.75, 1, 1, 1]).all()
    assert (course.kind_before[:, 6:12] == course.kind[:, :1]).all()


def test_a_course_depends_on_its_own_key_alone() -> None:
    assert_same(
        plan_course(KEYS[7:9], CYCLE, 30, C), plan_course(KEYS, CYCLE, 30, C).of(np.array([7, 8]))
    )


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ({"num_classes": (1, 3)}, "num_classes of 'it'.*2 <= smallest"),
        ({"num_classes": (3, 11)}, "num_classes of 'it'.*10"),
        ({"num_classes": (4, 6), "swapped_pairs": (1, 3)}, "swapped_pairs of 'it'.*0 to 2"),
        ({"distortion": 2}, "distortion of 'it'.*0 to 1"),
        ({"label_noise": 1.5}, "label_noise of 'it'"),
    ],
)
def test_a_kind_that_the_task_cannot_have_raises(kind: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        check_regimes(Regimes(kinds=(Kind(name="it", **kind),)), C, 2)


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"kinds": ()}, "kinds"), ({"dwell": (5, 4.0)}, "dwell"), ({"ramp_steps": -1}, "ramp_steps")],
)
def test_wrong_regimes_raise(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(CYCLE, **fields)


# ------------------------------------------------------------------ training and evaluation


LABELS = np.random.default_rng(0).integers(0, C, 300)


def test_batches_are_of_the_kind_in_force() -> None:
    """Class, label, level and noise of each image; all images of the classes are drawn alike."""
    m, step = 30, 9
    task = simulation.TASKS["digits"]
    instances = simulation.make_instances("default", task.ranges, 0.05)
    regimes = dataclasses.replace(CYCLE, ramp_steps=3)
    course = plan_course(KEYS[:m], regimes, 20, C)
    index = class_index(LABELS, C, instances.train_fraction, instances.train_start)
    draw = draw_batches(
        KEYS[:m], np.full(m, step), np.zeros(m, dtype=np.int64), instances, LABELS,
        num_classes=C, batches=20, batch_size=50, augments=False, course=course, class_index=index,
    )  # fmt: skip
    assert len(np.unique(course.kind[:, step])) == 3
    assert (course.share[:, step] < 1).any()
    for i in range(m):
        kinds = {int(course.kind[i, step]), int(course.kind_before[i, step])}
        image = draw.indices[:, :, i].ravel()
        shown, truth = draw.labels[:, :, i].ravel(), LABELS[image % len(LABELS)]
        level = image // len(LABELS)
        fits = {k: course.has_class[i, k, truth] & (level == course.level[k]) for k in kinds}
        assert np.logical_or.reduce(list(fits.values())).all()
        if course.share[i, step] == 1:
            k = int(course.kind[i, step])
            wrong = (shown != course.label[i, k, truth]).mean()
            assert abs(wrong - course.noise[k]) < (0.08 if course.noise[k] else 1e-9)
            counts = np.bincount(image % len(LABELS), minlength=len(LABELS))
            pool = course.has_class[i, k, LABELS]
            assert (counts[~pool] == 0).all()
            # Poisson: 1,000 draws over the pool.
            mean = 1000 / pool.sum()
            assert abs(counts[pool].var() / mean - 1) < 0.6


def test_the_share_of_a_gradual_change_is_that_of_the_images() -> None:
    m = 40
    kinds = (Kind(name="few", num_classes=(2, 2)), Kind(name="noisy", distortion=1))
    regimes = Regimes(kinds=kinds, order="sequence", dwell=(5, 5.0), ramp_steps=3)
    instances = simulation.make_instances("default", TASKS["digits"].ranges, 0.05)
    course = plan_course(KEYS[:m], regimes, 9, C)
    index = class_index(LABELS, C, instances.train_fraction, instances.train_start)
    for step, share in ((4, 0.0), (5, 0.25), (6, 0.5), (7, 0.75), (8, 1.0)):
        draw = draw_batches(
            KEYS[:m], np.full(m, step), np.zeros(m, dtype=np.int64), instances, LABELS,
            num_classes=C, batches=4, batch_size=50, augments=False, course=course,
            class_index=index,
        )  # fmt: skip
        assert abs((draw.indices >= len(LABELS)).mean() - share) < 0.02


def test_an_exam_has_every_image_of_the_classes_in_use() -> None:
    course = plan_course(KEYS[:6], CYCLE, 20, C)
    index = class_index(LABELS, C, np.ones(1), np.zeros(1))
    rows = np.array([4, 1, 5])
    kind = np.array([0, 1, 2])
    exam = make_exam(course, kind, rows, 6, index, len(LABELS))
    assert (exam.labels[[0, 2, 3]] == -1).all()
    for i, k in zip(rows, kind, strict=True):
        count = (exam.labels[i] >= 0).sum()
        assert (exam.labels[i, count:] == -1).all()
        pool = np.nonzero(course.has_class[i, k, LABELS])[0]
        image = exam.indices[i, :count] - course.level[k] * len(LABELS)
        assert np.array_equal(np.sort(image), pool)
        assert np.array_equal(exam.labels[i, :count], course.label[i, k, LABELS[image]])


def test_instances_sort_the_images_that_they_use_by_class() -> None:
    index = class_index(LABELS, C, np.array([1.0, 0.5]), np.array([0.3, 0.9]))
    for i, (count, first) in enumerate(((300, 90), (150, 270))):
        used = (first + np.arange(count)) % 300
        assert np.array_equal(np.sort(index.order[i, :count]), np.sort(used))
        for c in range(C):
            own = index.order[i, index.start[i, c] : index.start[i, c + 1]]
            assert np.array_equal(np.sort(own), np.sort(used[LABELS[used] == c]))
    with pytest.raises(ValueError, match=r"instance 0: .*none of class \d.*train_fraction"):
        class_index(LABELS, C, np.array([0.02]), np.zeros(1))


@pytest.mark.parametrize("task", ["digits_sizing", "digits_contexts"])
def test_a_change_falls_between_training_and_evaluation(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step t trains on the kind at t; accuracy and info after it belong to the kind at t + 1."""
    envs = make(6, task=task, episode_steps=20)
    _, info = envs.reset(seed=3)
    sim = envs.debug_state()
    course, size = sim.course, sim.task.levels
    trained: list[Training] = []
    train = sim.population.train
    monkeypatch.setattr(sim.population, "train", lambda t: trained.append(t) or train(t))
    images = sim.splits.validation
    count = len(images) // size
    labels = images.labels.numpy()[:count]
    for t in range(20):
        assert np.array_equal(info["regime"], course.kind[:, t])
        *_, info = envs.step(waits(6))
        shown = trained[-1].draw
        truth = sim.splits.train.labels.numpy()[shown.indices]
        for i in range(6):
            k = course.kind[i, t]
            expected = course.label[i, k, truth[..., i]]
            assert np.array_equal(shown.labels[..., i], expected)
            assert course.has_class[i, k, truth[..., i]].all()
        # The accuracy, once more from the network's own predictions on chosen images.
        for i in range(6):
            k = course.kind[i, t + 1]
            own = np.nonzero(course.has_class[i, k, labels])[0]
            chosen = dataclasses.replace(
                images,
                images=images.images[own + count * course.level[k]],
                labels=images.labels.new_tensor(course.label[i, k, labels[own]]),
            )
            alone = sim.population.evaluate(
                np.array([i]), np.zeros((1, 2)), sim.networks.seeds, chosen
            )
            assert alone.accuracy[0] == info["accuracy"][i]
            np.testing.assert_allclose(alone.loss[0], info["loss"][i], rtol=1e-6)
    assert task == "digits_sizing" or len(np.unique(course.kind[0])) == 2


def test_a_gradual_change_is_judged_by_both_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    task = TASKS["digits_contexts"]
    regimes = dataclasses.replace(task.regimes, dwell=(5, 5.0), ramp_steps=3)
    monkeypatch.setitem(TASKS, "digits_contexts", dataclasses.replace(task, regimes=regimes))
    envs = make(3, task="digits_contexts", episode_steps=12)
    envs.reset(seed=0)
    sim = envs.debug_state()
    for t in range(12):
        *_, info = envs.step(waits(3))
        rows, share = np.arange(3), sim.course.share[:, t + 1]
        parts = []
        for kind in (sim.course.kind[:, t + 1], sim.course.kind_before[:, t + 1]):
            (index,) = [i for k, i in sim._indices.items() if k == id(sim.splits.validation)]
            exam = make_exam(sim.course, kind, rows, 3, index, len(sim.splits.validation))
            parts.append(
                sim.population.evaluate(
                    rows, np.zeros((3, 2)), sim.networks.seeds, sim.splits.validation, exam
                ).accuracy
            )
        expected = share * parts[0] + (1 - share) * parts[1]
        np.testing.assert_allclose(info["accuracy"], expected, rtol=1e-12)
        assert (share < 1).all() == (t + 1 in (5, 6, 7, 10, 11, 12))


def test_the_regime_is_hidden_from_observation_and_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Courses that differ from step 8 on show the same up to step 7, and not after it."""
    seen = []
    plan = simulation.plan_course
    for is_other in (False, True):

        def plan_other(*args: Any, is_other: bool = is_other) -> Course:
            course = plan(*args)
            if is_other:
                course.kind[:, 8:] = 1 - course.kind[:, 8:]
            return course

        monkeypatch.setattr(simulation, "plan_course", plan_other)
        envs = make(3, task="digits_contexts")
        shown = [envs.reset(seed=0), *((s[0], s[4]) for s in play(envs, 9))]
        assert all("regime" in info for _, info in shown)
        seen.append([(o.tobytes(), info["action_mask"].tobytes()) for o, info in shown])
    assert seen[0][:8] == seen[1][:8]
    assert seen[0][8] != seen[1][8]
    assert "regime" not in make(2).reset(seed=0)[1]


# ------------------------------------------------------------------ objective


@pytest.mark.parametrize("task", ["digits_sizing", "digits_contexts"])
def test_the_return_is_the_objective(task: str) -> None:
    """The mean over steps of accuracy minus rent, from what info shows. No rollback occurs."""
    heads = {"style": "LINEAR_ADD"}
    envs = make(5, task=task, episode_steps=20, autoreset_mode="Disabled", heads=heads)
    envs.reset(seed=1)
    sim, rent = envs.debug_state(), envs.config.rent_weight
    returns, objective = np.zeros(5), np.zeros(5)
    paid = set()
    for _, reward, _, _, info in play(envs, 20):
        returns += reward
        price = sim.population.seed_parameters[0][np.arange(2), info["blueprint"]]
        in_service = np.where(info["alpha"] > 0, price, 0).sum(axis=1)
        paid |= set((in_service > 0).tolist())
        doublings = np.log2(1 + in_service / info["host_parameters"])
        objective += (info["accuracy"] - rent * doublings) / 20
        assert not info["rolled_back"].any()
    assert paid == {False, True}
    np.testing.assert_allclose(returns, info["committed_score"], atol=1e-12)
    np.testing.assert_allclose(objective, info["committed_score"], atol=1e-12)


def test_a_parked_seed_is_as_good_as_gone_and_comes_back_as_it_was() -> None:
    """Bitwise: the host trains like one whose seed was pruned, and the seed keeps every number."""
    options = {"graft": True, "parking": True, "episode_steps": 12}
    parks, prunes = make(1, **options), make(1, **options)
    for envs in (parks, prunes):
        envs.reset(seed=0)
        envs.step(action(Op.GERMINATE, 1, blueprint=5)[None])
        envs.step(waits(1))
    sims = parks.debug_state(), prunes.debug_state()
    parks.step(action(Op.SET_ALPHA, 1)[None])
    prunes.step(action(Op.PRUNE, 1)[None])
    layout, storage = sims[0].population.layout, sims[0].population.storage
    start, kept = layout.seed_start(1, 5, 0), {}
    for name, place in (("parameters", start[0]), ("momentum", start[0]), ("buffers", start[1])):
        kept[name] = storage.matrices[name][0, place.index].clone()
    score = []
    for _ in range(4):
        infos = [envs.step(waits(1))[4] for envs in (parks, prunes)]
        for key in ("accuracy", "loss", "score", "committed_score", "flops"):
            assert infos[0][key] == infos[1][key], key
        assert infos[0]["parameters"] > infos[1]["parameters"] == 0
        measured = sims[0].state.measured
        assert measured.has_would_be[0, 1]
        score.append(float(measured.would_be[0, 1]))
    assert any(score)
    for name, place in (("parameters", start[0]), ("momentum", start[0]), ("buffers", start[1])):
        assert (storage.matrices[name][0, place.index] == kept[name]).all()
    *_, info = parks.step(action(Op.SET_ALPHA, 1, alpha_target=3)[None])
    assert info["alpha"][0, 1] == 1
    assert info["score"] < info["accuracy"]


# ------------------------------------------------------------------ the rollback rule


def rule(limit: float | None) -> tuple[RollbackState, EnvConfig]:
    config = EnvConfig(panic_window=3, panic_patience=2, divergence_loss=limit)
    return RollbackState.empty(1, config), config


def feed(state: RollbackState, config: EnvConfig, *losses: float) -> list[bool]:
    one, fine = np.zeros(1, dtype=np.int64), np.ones(1, dtype=bool)
    guess = float(np.log(10))
    return [bool(judge(state, one, np.array([x]), fine, guess, config)[0]) for x in losses]


def test_a_jump_is_forgiven_only_after_a_change() -> None:
    state, config = rule(None)
    assert feed(state, config, 0.5, 0.5, 0.5, 8.0, 8.0) == [False] * 4 + [True]
    state, config = rule(None)
    assert feed(state, config, 0.5, 0.5, 0.5) == [False] * 3
    forget(state, np.zeros(1, dtype=np.int64))
    assert feed(state, config, 8.0, 7.0, 6.0, 5.0) == [False] * 4
    assert feed(state, config, 50.0, 50.0) == [False, True]


def test_a_loss_above_the_limit_needs_no_history() -> None:
    """20 times ln(10) is 46; one step above it is forgiven, two are not."""
    state, config = rule(20.0)
    assert feed(state, config, 46.0, 46.1, 46.0, 46.1, 46.1) == [False] * 4 + [True]


@pytest.mark.long
def test_ten_thousand_changes_cause_no_rollback_and_all_divergences_do() -> None:
    """Every 20th step one member gets weights that are not finite, or far too large.

    All members wait: an action can be a reason for a rollback of its own.
    """
    envs = EsperVectorEnv(
        64, task="digits_contexts", instances="train", autoreset_mode="NextStep", max_rollbacks=99
    )
    _, info = envs.reset(seed=0)
    rng = np.random.default_rng(0)
    changes = planted = 0
    due: dict[int, int] = {}
    """Steps within which a planted divergence must be rolled back, by member."""
    step = 0
    while changes < 10_000:
        before, sim = info["regime"].copy(), envs.debug_state()
        # Not at the end of an episode, which would discard the weights.
        if step % 20 == 10 and not due and sim.state.progress.steps.max() < 55:
            member = int(rng.integers(64))
            planted += 1
            if planted % 2:
                poison(envs, member)
                due[member] = 1
            else:
                # The classifier far from any training; SGD cannot bring it back in two steps.
                head = sim.population.layout.head[0]
                span = slice(head.offset, head.offset + head.spec.size)
                sim.population.storage.parameters[member, span] *= 1e6
                due[member] = envs.config.panic_patience
        *_, terminated, truncated, info = envs.step(waits(64))
        changes += int((info["regime"] != before)[~(terminated | truncated)].sum())
        for member in np.nonzero(info["rolled_back"])[0].tolist():
            assert member in due, "a rollback without a divergence"
            del due[member]
        due = {member: left - 1 for member, left in due.items()}
        assert all(left > 0 for left in due.values()), "a divergence without a rollback"
        step += 1
    assert planted > 50
