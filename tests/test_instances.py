"""Instances: what differs between members, and that a narrow member is a narrow network."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.plain import PlainNetwork
from esper_env.config import Blend, EnvConfig, Op
from esper_env.growth.simulation import Simulation
from esper_env.growth.state import Request, blank
from esper_env.population.blueprints import CNN_BLUEPRINTS
from esper_env.population.hosts import Host
from esper_env.population.images import Draw
from esper_env.population.interface import SGDSettings, TrainReport
from esper_env.population.population import Population
from esper_env.rng import make_key
from esper_env.tasks import TASKS
from esper_env.tasks.instances import SET_SIZES, InstanceRanges, make_instances
from tests.test_env import make, make_single
from tests.test_population import (
    BATCH_SIZE,
    NAMES,
    RATE,
    STAGES,
    TOLERANCE,
    draw,
    make_images,
    make_seeds,
    set_stage,
    shown,
    train_plain,
)

pytestmark = pytest.mark.usefixtures("engine")
WIDE = Host(in_channels=2, image_size=8, channels=(4, 8), num_classes=5)
WIDTHS = (0.5, 0.75, 1.0)
HOSTS = [WIDE.scaled(width) for width in WIDTHS]


def make_mixed_population() -> Population:
    """Return three members, one of each width."""
    population = Population(
        HOSTS, CNN_BLUEPRINTS, 3, SGDSettings(), torch.device("cpu"), BATCH_SIZE, None
    )
    members = np.arange(3)
    population.reset(members, members, make_key(members))
    return population


def narrow_copy(population: Population, seeds: Any, member: int) -> PlainNetwork:
    """Return the ordinary network that a member of width `member` should be."""
    network = PlainNetwork(HOSTS[member])
    network.load_host(population, member)
    for slot in np.nonzero(seeds.blueprint[member] >= 0)[0].tolist():
        blueprint, blend = int(seeds.blueprint[member, slot]), int(seeds.blend[member, slot])
        seed = network.add_seed(population, member, slot, blueprint, blend)
        seed.alpha = float(seeds.alpha[member, slot])
        seed.is_training_stage = bool(seeds.alpha[member, slot] == 0)
        seed.is_isolated = bool(seeds.is_isolated[member, slot])
    return network


# ------------------------------------------------------------------ narrow members


def test_hosts_are_scaled_to_at_least_one_feature() -> None:
    assert [h.channels for h in HOSTS] == [(2, 4), (3, 6), (4, 8)]
    assert WIDE.scaled(0.01).channels == (1, 1)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("blend", list(Blend))
@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_narrow_members_equal_narrow_networks(index: int, blend: Blend, stage: str) -> None:
    """Three widths in one batch, a seed in each slot, several optimiser steps from birth on.

    What lies outside a narrow member's corner is born at zero and stays exactly there.
    """
    images = make_images(host=WIDE)
    population, seeds = make_mixed_population(), make_seeds(3)
    seeds.width[:] = np.arange(3)
    members = np.arange(3)
    for slot in range(2):
        seeds.blueprint[:, slot], seeds.blend[:, slot] = index, blend
        place = np.full(3, slot), np.full(3, index)
        population.germinate(members, members, *place, make_key(members, 77 + slot))
        for member in range(3):
            set_stage(seeds, member, slot, stage)
    networks = [narrow_copy(population, seeds, i) for i in range(3)]
    rates = np.full(3, RATE)
    for seed in (2, 3):
        indices = draw(np.random.default_rng(seed), images, 3)
        report = population.train(members, seeds, images, shown(images, indices), rates, rates)
    # The momentum of the plain optimiser lives for one call, so train it on both draws at once.
    both = [draw(np.random.default_rng(seed), images, 3) for seed in (2, 3)]
    for i, network in enumerate(networks):
        train_plain(network, images, np.concatenate(both)[:, :, i])
        assert np.isfinite(report.loss[i])
        actual = narrow_copy(population, seeds, i).state_dict()
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                torch.testing.assert_close(actual[name], tensor, atol=TOLERANCE, rtol=TOLERANCE)
    layout = population.layout
    for width in range(3):
        starts = [layout.host_start(width)[0]]
        starts += [layout.seed_start(slot, index, width)[0] for slot in range(2)]
        for start in starts:
            outside = np.setdiff1d(start.columns, start.index)
            assert (len(outside) == 0) == (width == 2)
            assert not population.storage.parameters[width, outside].any()
            assert not population.storage.momentum[width, outside].any()


@pytest.mark.parametrize("blend", list(Blend))
def test_narrow_members_are_evaluated_like_narrow_networks(blend: Blend) -> None:
    """After training, with running statistics of features that do not exist."""
    images = make_images(host=WIDE)
    population, seeds = make_mixed_population(), make_seeds(3)
    seeds.width[:] = np.arange(3)
    members, rates = np.arange(3), np.full(3, RATE)
    index = NAMES.index("conv_heavy")
    seeds.blueprint[:, 0], seeds.blend[:, 0] = index, blend
    where = np.zeros(3, dtype=np.int64), np.full(3, index)
    population.germinate(members, members, *where, make_key(members, 77))
    for member in range(3):
        set_stage(seeds, member, 0, "holding")
    indices = draw(np.random.default_rng(0), images, 3)
    population.train(members, seeds, images, shown(images, indices), rates, rates)
    result = population.evaluate(members, seeds.alpha, seeds, images)
    for i in range(3):
        network = narrow_copy(population, seeds, i).eval()
        with torch.no_grad():
            logits = network(images.normalised(0, len(images)))
        loss = torch.nn.functional.cross_entropy(logits, images.labels)
        assert result.loss[i] == pytest.approx(float(loss), abs=1e-4)


def test_counts_of_a_narrow_member_are_those_of_a_narrow_network() -> None:
    population, seeds = make_mixed_population(), make_seeds(3)
    seeds.width[:] = np.arange(3)
    for width, host in enumerate(HOSTS):
        count = sum(p.numel() for p in PlainNetwork(host).parameters())
        assert population.host_parameters[width] == count
        for slot, channels in enumerate(host.channels):
            for index, blueprint in enumerate(CNN_BLUEPRINTS):
                seeds.blueprint[width, slot], seeds.blend[width, slot] = index, Blend.GATE
                seed = narrow_copy(population, seeds, width).seeds[str(slot)]
                count = sum(p.numel() for p in seed.parameters())
                own = population.seed_parameters[width, slot, index]
                assert own == blueprint.num_parameters(channels)
                assert own + population.gate_parameters[width, slot] == count
                seeds.blueprint[width, slot] = -1


# ------------------------------------------------------------------ the sets


def test_train_and_test_instances_are_disjoint_fixed_and_within_their_ranges() -> None:
    ranges = InstanceRanges()
    sets = {name: make_instances(name, ranges, 0.05) for name in ("train", "test")}
    assert {name: len(s) for name, s in sets.items()} == {"train": 100, "test": 20}
    for instances in sets.values():
        for values, (low, high) in (
            (instances.learning_rate, ranges.learning_rate),
            (instances.train_fraction, ranges.train_fraction),
            (instances.label_noise, ranges.label_noise),
        ):
            assert (values >= low).all()
            assert (values <= high).all()
            assert values.max() - values.min() > 0.7 * (high - low)
        assert set(instances.width.tolist()) == {0, 1, 2}
    assert not set(sets["train"].learning_rate) & set(sets["test"].learning_rate)
    # The sets are part of the task: these values must never change.
    assert sets["train"].learning_rate[0] == pytest.approx(0.01854414087600188)
    assert sets["test"].label_noise[19] == pytest.approx(0.14261970019070724)


def test_the_default_instance_is_the_whole_task() -> None:
    instances = make_instances("default", InstanceRanges(), 0.07)
    assert len(instances) == 1
    assert instances.learning_rate == 0.07
    assert instances.train_fraction == 1.0
    assert instances.label_noise == 0.0
    assert instances.widths == (1.0,)


# ------------------------------------------------------------------ what an instance changes


def make_simulation(**config: Any) -> Simulation:
    settings = EnvConfig(instances="train", batches_per_step=8, batch_size=64, **config)
    sim = Simulation(4, torch.device("cpu"), settings, CNN_BLUEPRINTS)
    for member in range(4):
        sim.seed(member, member)
    return sim


def train_calls(sim: Simulation, num_steps: int) -> list[tuple[Any, ...]]:
    """Let all members wait for some steps; return what training was called with, in its stead."""
    calls = []
    n, slots = sim.state.slots.stage.shape

    def train(*args: Any) -> TrainReport:
        calls.append(args)
        report = TrainReport.empty(n, slots, 1)
        report.loss[:], report.is_finite[:] = 1.0, True
        return report

    sim.population.train = train  # type: ignore[method-assign]
    everyone = np.ones(n, dtype=bool)
    for _ in range(num_steps):
        sim.step(blank(Request, n), everyone, everyone)
    return calls


def draws_of(sim: Simulation, num_steps: int) -> list[Draw]:
    """Return what some steps of all members show."""
    return [draw for _, _, _, draw, *_ in train_calls(sim, num_steps)]


def test_members_train_on_their_share_of_the_split_with_their_share_of_wrong_labels() -> None:
    sim = make_simulation()
    noise = sim.instances.label_noise
    chosen = np.array([int(noise.argmax()), int(noise.argmin()), 5, 6])
    sim.begin_episodes(np.arange(4), chosen)
    true = sim.splits.train.labels.numpy()
    total = len(true)
    seen: list[set[int]] = [set() for _ in range(4)]
    given: list[dict[int, int]] = [{} for _ in range(4)]
    for drawn in draws_of(sim, 40):
        assert drawn.indices.shape == drawn.labels.shape == (8, 64, 4)
        assert drawn.shifts is None
        for i in range(4):
            for image, label in zip(
                drawn.indices[:, :, i].flat, drawn.labels[:, :, i].flat, strict=True
            ):
                seen[i].add(int(image))
                assert given[i].setdefault(int(image), int(label)) == label, "labels keep still"
    for i, k in enumerate(chosen):
        count = round(float(sim.instances.train_fraction[k]) * total)
        start = int(sim.instances.train_start[k] * total)
        assert seen[i] <= {(start + j) % total for j in range(count)}
        # 20,480 draws with replacement see nearly all of at most 1,097 images.
        assert len(seen[i]) > 0.99 * count
        wrong = np.mean([given[i][j] != true[j] for j in given[i]])
        share = float(noise[k])
        # Four standard errors of a binomial share.
        assert abs(wrong - share) < 4 * np.sqrt(max(share * (1 - share), 1e-3) / count)


def test_wrong_labels_are_spread_over_all_other_classes() -> None:
    sim = make_simulation()
    sim.begin_episodes(np.arange(4), np.full(4, int(sim.instances.label_noise.argmax())))
    true = sim.splits.train.labels.numpy()
    shifts = []
    for drawn in draws_of(sim, 20):
        shifts.append((drawn.labels - true[drawn.indices]) % 10)
    counts = np.bincount(np.concatenate([s.ravel() for s in shifts]), minlength=10)
    assert (counts[1:] > 0.6 * counts[1:].mean()).all()


def test_an_instance_sets_the_learning_rates_of_host_and_seeds() -> None:
    """The seeds' rate keeps its ratio to the host's; both fall linearly."""
    sim = make_simulation(host_learning_rate=0.1, seed_learning_rate=0.05, episode_steps=10)
    sim.begin_episodes(np.arange(4), np.array([0, 1, 2, 3]))
    sim.state.progress.steps[:] = 5
    *_, host, seeds = train_calls(sim, 1)[0]
    np.testing.assert_allclose(host, 0.5 * sim.instances.learning_rate[:4])
    np.testing.assert_allclose(seeds, 0.25 * sim.instances.learning_rate[:4])
    assert len(set(host.tolist())) == 4


# ------------------------------------------------------------------ in the environment


def test_reset_picks_the_instance_that_was_asked_for_and_leaves_the_options_alone() -> None:
    envs = make(3, instances="train")
    options = {"instance": np.array([4, 0, 99])}
    _, info = envs.reset(seed=0, options=options)
    assert info["instance"].tolist() == [4, 0, 99]
    assert list(options) == ["instance"]
    _, info = envs.reset(seed=0, options={"instance": 7})
    assert info["instance"].tolist() == [7, 7, 7]
    mask = np.array([False, True, False])
    _, info = envs.reset(options={"instance": [1, 2, 3], "reset_mask": mask})
    assert info["instance"].tolist() == [7, 2, 7]
    env = make_single(instances="test")
    assert env.reset(seed=0, options={"instance": 19})[1]["instance"] == 19


def test_without_being_asked_members_draw_their_instances_from_their_own_streams() -> None:
    envs = make(8, instances="train")
    first = envs.reset(seed=0)[1]["instance"]
    assert len(set(first.tolist())) > 1
    assert make(1, instances="train").reset(seed=3)[1]["instance"] == first[3]
    assert (envs.reset()[1]["instance"] != first).any()
    assert (envs.reset(seed=0)[1]["instance"] == first).all()


@pytest.mark.parametrize(
    ("instances", "value"),
    [("default", 1), ("train", 100), ("test", 20), ("test", -1), ("train", 1.0), ("train", [1, 2])],
)
def test_an_impossible_instance_is_refused(instances: str, value: Any) -> None:
    envs = make(3, instances=instances)
    envs.reset(seed=0)
    limit = SET_SIZES[instances] - 1
    with pytest.raises(ValueError, match=rf"instance.*expected integers from 0 to {limit}"):
        envs.reset(options={"instance": value})


def test_an_unknown_set_is_refused() -> None:
    with pytest.raises(ValueError, match="instances: expected one of"):
        make(1, instances="validation")


def test_what_a_practitioner_knows_is_observed_and_label_noise_is_not() -> None:
    """Two instances that differ in label noise alone look the same after reset."""
    envs = make(2, instances="train")
    observation, info = envs.reset(seed=[5, 5], options={"instance": [0, 1]})
    names = envs.observation_names
    features = {name: observation[:, names.index(name)] for name in names if "instance" in name}
    sim = envs.debug_state()
    rate, fraction = sim.instances.learning_rate[:2], sim.instances.train_fraction[:2]
    width = np.array(sim.instances.widths)[sim.instances.width[:2]]
    np.testing.assert_allclose(features["instance_learning_rate"], np.log10(rate) + 1.5, rtol=1e-5)
    np.testing.assert_allclose(
        features["instance_train_fraction"], np.log10(fraction) + 1, rtol=1e-5
    )
    np.testing.assert_allclose(features["instance_width"], np.log2(width), rtol=1e-5)
    assert not any("noise" in name for name in names)
    hosts = [TASKS["digits"].host.scaled(w).num_parameters for w in width]
    assert info["host_parameters"].tolist() == hosts
    sim.instances.label_noise[0] = 0.3
    again, _ = envs.reset(seed=[5, 5], options={"instance": [0, 1]})
    np.testing.assert_array_equal(again, observation)


def test_prices_are_relative_to_the_members_own_host() -> None:
    """The same blueprint in a narrow and a wide host: its own count, rent and budget."""
    envs = make(3, instances="train", parameter_budget=2.0)
    widths = make_instances("train", TASKS["digits"].ranges, 0.05).width
    chosen = [int(np.nonzero(widths == w)[0][0]) for w in range(3)]
    envs.reset(seed=0, options={"instance": chosen})
    actions = np.zeros((3, 8), dtype=np.int64)
    actions[:, 0], actions[:, 2] = Op.GERMINATE, NAMES.index("conv_light")
    _, _, _, _, info = envs.step(actions)
    light = CNN_BLUEPRINTS[NAMES.index("conv_light")]
    assert info["parameters"].tolist() == [light.num_parameters(c) for c in (2, 3, 4)]
    rent = envs.config.rent_weight * np.log2(1 + info["parameters"] / info["host_parameters"])
    np.testing.assert_allclose(info["score"], info["accuracy"] - rent)
    masks = envs.conditional_masks()["blueprint"]
    heavy = NAMES.index("conv_heavy")
    for i, c in enumerate((4, 6, 8)):
        cost = CNN_BLUEPRINTS[heavy].num_parameters(c) + c + 1
        # What the budget counts of a seed includes a gate: channels + 1.
        used = info["parameters"][i] + (2, 3, 4)[i] + 1
        fits = used + cost <= 2.0 * info["host_parameters"][i]
        assert masks[i, Op.GERMINATE, 1, heavy] == fits
