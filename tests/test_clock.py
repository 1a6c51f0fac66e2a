"""Compute as the clock: every env step buys the same operations, whatever the network costs."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from esper_env import Op
from esper_env.population.images import Draw
from esper_env.population.interface import Training
from esper_env.tasks import TASKS
from esper_env.tasks.instances import InstanceRanges, make_instances
from tests.builders import (
    NAMES,
    RATE,
    SMALL,
    SmallPopulation,
    action,
    assert_same,
    make,
    train_plain,
    waits,
)

COUNTS = (3, 1, 2, 3, 1, 2)
"""Batches of each member."""
IMAGES_PER_BATCH = SMALL["batch_size"]
CONV_HEAVY = NAMES.index("conv_heavy")


def uneven(small: SmallPopulation, indices: Any) -> Draw:
    """Return a draw in which each member has as many batches as `COUNTS` says."""
    labels = small.images.labels.numpy()[indices]
    is_over = np.arange(len(indices))[:, None] >= np.array(COUNTS)
    labels = np.where(is_over[:, None], -1, labels)
    return Draw(np.where(labels < 0, 0, indices), labels)


def make_population() -> SmallPopulation:
    """Return six members with all kinds of blends, one seed frozen and some isolated."""
    small = SmallPopulation(len(COUNTS), chunk_size=4)
    for member in small.members.tolist():
        stage = ("half", "training")[member % 2]
        small.plant(member, member % 2, member % len(NAMES), stage, member % 3)
    small.seeds.is_frozen[2, 0] = True
    small.awaken()
    return small


def test_members_with_fewer_batches_equal_plain_networks_with_fewer_batches(engine: str) -> None:
    """Losses, gradient norms, parameters, momentum and statistics."""
    small = make_population()
    small.seeds.is_frozen[:] = False
    indices = small.draw(1)
    plains = small.plains()
    rates = np.full(len(COUNTS), RATE)
    draw = uneven(small, indices)
    report = small.population.train(
        Training(small.members, small.seeds, small.images, draw, rates, rates)
    )
    for member, network in enumerate(plains):
        own = indices[: COUNTS[member], :, member]
        assert report.loss[member] == pytest.approx(
            train_plain(network, small.images, own), abs=1e-5
        )
        small.assert_equals(member, network)


def test_members_with_fewer_batches_equal_trainings_of_their_own(engine: str) -> None:
    """With compiled kernels bitwise; frozen seeds included."""
    together, alone = make_population(), make_population()
    indices = together.draw(1)
    rates = np.full(len(COUNTS), RATE)
    report = together.population.train(
        Training(
            together.members,
            together.seeds,
            together.images,
            uneven(together, indices),
            rates,
            rates,
        )
    )
    for member, count in enumerate(COUNTS):
        own = alone.train(indices[:count, :, [member]], [member])
        for shown, expected in zip(report, own, strict=True):
            if engine == "compiled":
                np.testing.assert_array_equal(shown[[member]], expected)
            np.testing.assert_allclose(shown[[member]], expected, rtol=1e-4, atol=1e-5)
    for name in ("parameters", "momentum", "buffers"):
        shown, expected = (getattr(s.storage, name).numpy() for s in (together, alone))
        if engine == "compiled":
            np.testing.assert_array_equal(shown, expected)
        np.testing.assert_allclose(shown, expected, rtol=1e-4, atol=1e-5)


def batches_of(infos: list[dict[str, Any]]) -> list[int]:
    """Return the batches of the first member in each env step."""
    samples = np.array([0, *(info["samples"][0] for info in infos)])
    return (np.diff(samples) / IMAGES_PER_BATCH).astype(int).tolist()


def test_networks_without_seeds_train_as_with_the_clock_of_steps() -> None:
    """Bitwise, as the budget of the default instance is that of the host."""
    plain, clocked = make(2), make(2, clock="flops")
    for envs in (plain, clocked):
        envs.reset(seed=3)
    for _ in range(5):
        expected, shown = plain.step(waits(2)), clocked.step(waits(2))
        kept = [clocked.observation_names.index(name) for name in plain.observation_names]
        np.testing.assert_array_equal(shown[0][:, kept], expected[0])
        assert_same(shown[1:4], expected[1:4])
        np.testing.assert_array_equal(shown[4]["flops"], expected[4]["flops"])


def test_a_grown_network_trains_on_the_batches_that_its_share_of_the_budget_pays() -> None:
    """By hand: what is left over is carried to the next env step, also over env steps of rest."""
    envs = make(1, clock="flops", batches_per_step=3, episode_steps=30)
    _, info = envs.reset(seed=0)
    infos = [envs.step(action(Op.GERMINATE, 0, blueprint=CONV_HEAVY)[None])[4]]
    infos += [envs.step(waits(1))[4] for _ in range(9)]
    population = envs.debug_state().population
    host = int(population.host_multiply_adds[0])
    grown = host + int(population.seed_multiply_adds[0, 0, CONV_HEAVY])
    left, expected = 0, []
    for _ in infos:
        left += 3 * host
        expected.append(left // grown)
        left -= expected[-1] * grown
    assert batches_of(infos) == expected
    assert {0, 1} <= set(expected), "the test needs env steps with and without a batch"
    spent = infos[-1]["flops"][0]
    assert 6 * IMAGES_PER_BATCH * (30 * host - grown) < spent <= 6 * IMAGES_PER_BATCH * 30 * host
    assert info["flops"][0] == 0


def test_without_a_batch_nothing_changes_and_no_gradient_is_valid() -> None:
    envs = make(2, clock="flops", batches_per_step=1, episode_steps=30)
    envs.reset(seed=0)
    act = np.concatenate([action(Op.GERMINATE, 0, blueprint=CONV_HEAVY)[None], waits(1)])
    infos, weights = [], []
    valid = envs.observation_names.index("slot_0.gradient_valid")
    shown = []
    for _ in range(9):
        observation, *_, info = envs.step(act)
        act = waits(2)
        infos.append(info)
        shown.append(observation[0, valid])
        weights.append(envs.debug_state().population.storage.parameters[0].clone())
    batches = batches_of(infos)
    assert 0 in batches
    for step in range(1, 9):
        assert shown[step] == (batches[step] > 0)
        assert bool((weights[step] == weights[step - 1]).all()) == (batches[step] == 0)
    assert infos[-1]["samples"][1] == 9 * IMAGES_PER_BATCH


@pytest.mark.usefixtures("threads")
def test_the_clock_of_a_member_does_not_depend_on_the_others() -> None:
    """Each member of a mixed batch equals the same one alone, bitwise."""
    settings = {"clock": "flops", "instances": "train", "attribution": "none"}
    seeds = [3, 4, 5]
    together = make(3, **settings)
    together.reset(seed=seeds)
    singles = [make(1, **settings) for _ in seeds]
    for envs, seed in zip(singles, seeds, strict=True):
        envs.reset(seed=[seed])
    rng = np.random.default_rng(0)
    for _ in range(10):
        actions = together.sample_valid_actions(rng)
        result = together.step(actions)
        for member, envs in enumerate(singles):
            own = envs.step(actions[[member]])
            np.testing.assert_array_equal(result[0][[member]], own[0])
            np.testing.assert_array_equal(result[1][[member]], own[1])
            np.testing.assert_array_equal(result[4]["flops"][[member]], own[4]["flops"])


def test_the_budget_of_an_instance_is_drawn_from_its_range_and_observed() -> None:
    ranges = InstanceRanges(compute=(1.0, 8.0))
    compute = make_instances("train", ranges, 0.05).compute
    assert compute.min() > 1
    assert compute.max() < 8
    assert np.median(np.log2(compute)) == pytest.approx(1.5, abs=0.5)
    assert (make_instances("train", InstanceRanges(), 0.05).compute == 1).all()
    assert "instance_compute" not in make(1).observation_names


def test_a_larger_budget_buys_more_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = InstanceRanges(compute=(2.5, 2.5), widths=(1.0,))
    monkeypatch.setitem(TASKS, "digits", dataclasses.replace(TASKS["digits"], ranges=ranges))
    envs = make(1, clock="flops", instances="train", batches_per_step=1)
    observation, _ = envs.reset(seed=0)
    at = envs.observation_names.index("instance_compute")
    assert observation[0, at] == pytest.approx(np.log2(2.5) / 4)
    assert batches_of([envs.step(waits(1))[4] for _ in range(4)]) == [2, 3, 2, 3]
