"""Instances: what differs between members, and that a narrow member is a narrow network."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.plain import PlainNetwork
from esper_env.config import Blend, EnvConfig, Op
from esper_env.growth.simulation import Simulation
from esper_env.population.blueprints import CNN_BLUEPRINTS
from esper_env.population.hosts import Host
from esper_env.tasks import TASKS
from esper_env.tasks.instances import SET_SIZES, InstanceRanges, make_instances
from tests.builders import (
    CONV_LIGHT,
    NAMES,
    STAGES,
    SmallPopulation,
    action,
    make,
    make_single,
    train_calls,
    train_plain,
)

pytestmark = pytest.mark.usefixtures("engine")
WIDE = Host(in_channels=2, image_size=8, channels=(4, 8), num_classes=5)
WIDTHS = (0.5, 0.75, 1.0)
HOSTS = [WIDE.scaled(width) for width in WIDTHS]


# ------------------------------------------------------------------ narrow members


def test_hosts_are_scaled_to_at_least_one_feature() -> None:
    assert [h.channels for h in HOSTS] == [(2, 4), (3, 6), (4, 8)]
    assert WIDE.scaled(0.01).channels == (1, 1)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("blend", list(Blend))
@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_narrow_members_equal_narrow_networks(index: int, blend: Blend, stage: str) -> None:
    """Three widths in one batch, a seed in each slot, several optimizer steps from germination on.

    What lies outside a narrow member's corner starts at zero and stays exactly there.
    Evaluation uses no running statistics of features that do not exist.
    """
    small = SmallPopulation(3, hosts=HOSTS)
    for member in range(3):
        for slot in range(2):
            small.plant(member, slot, index, stage, blend)
    networks = small.plains()
    both = [small.draw(seed) for seed in (2, 3)]
    for indices in both:
        report = small.train(indices)
    result = small.evaluate(small.seeds.alpha)
    # The momentum of the plain optimizer lives for one call, so train it on both draws at once.
    for i, network in enumerate(networks):
        train_plain(network, small.images, np.concatenate(both)[:, :, i])
        assert np.isfinite(report.loss[i])
        small.assert_equals(i, network)
        with torch.no_grad():
            logits = small.plain(i).eval()(small.images.normalized(0, len(small.images)))
        loss = torch.nn.functional.cross_entropy(logits, small.images.labels)
        assert result.loss[i] == pytest.approx(float(loss), abs=1e-4)
    for width in range(3):
        starts = [small.layout.host_start(width)[0]]
        starts += [small.layout.seed_start(slot, index, width)[0] for slot in range(2)]
        for start in starts:
            outside = np.setdiff1d(start.columns, start.index)
            assert (len(outside) == 0) == (width == 2)
            assert not small.storage.parameters[width, outside].any()
            assert not small.storage.momentum[width, outside].any()


def test_counts_of_a_member_are_those_of_the_real_modules() -> None:
    """Parameters of hosts, seeds and gates, and multiply-adds of seeds, in every width."""
    small = SmallPopulation(3, hosts=HOSTS)
    population = small.population
    for width, host in enumerate(HOSTS):
        assert population.host_parameters[width] == host.num_parameters
        assert host.num_parameters == count_parameters(PlainNetwork(host))
        for slot, channels in enumerate(host.channels):
            pixels = host.slot_size(slot) ** 2
            for index, blueprint in enumerate(CNN_BLUEPRINTS):
                small.plant(width, slot, index, blend=Blend.GATE)
                seed: Any = small.plain(width).seeds[str(slot)]
                own = population.seed_parameters[width, slot, index]
                assert own == blueprint.num_parameters(channels) == count_parameters(seed.branch)
                assert population.gate_parameters[width, slot] == count_parameters(seed.gate)
                macs = channels * pixels if blueprint.name == "attention" else 0
                for module in seed.branch.modules():
                    if isinstance(module, torch.nn.BatchNorm2d):
                        macs += module.num_features * pixels
                    elif isinstance(module, torch.nn.Conv2d):
                        macs += module.weight.numel() * pixels
                    elif isinstance(module, torch.nn.Linear):
                        macs += module.weight.numel()
                assert population.seed_multiply_adds[width, slot, index] == macs, blueprint.name
    assert TASKS["digits"].host.num_parameters == 438


def count_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


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


def test_members_train_on_their_share_of_the_split_with_their_share_of_wrong_labels() -> None:
    sim = make_simulation()
    noise = sim.instances.label_noise
    chosen = np.array([int(noise.argmax()), int(noise.argmin()), 5, 6])
    sim.begin_episodes(np.arange(4), chosen)
    true = sim.splits.train.labels.numpy()
    total = len(true)
    draws = [drawn for _, _, _, drawn, *_ in train_calls(sim, 40)]
    assert draws[0].indices.shape == draws[0].labels.shape == (8, 64, 4)
    assert draws[0].shifts is None
    index, label = (
        np.concatenate(parts).reshape(-1, 4)
        for parts in ([d.indices for d in draws], [d.labels for d in draws])
    )
    for i, k in enumerate(chosen):
        count = round(float(sim.instances.train_fraction[k]) * total)
        start = int(sim.instances.train_start[k] * total)
        pairs = set(zip(index[:, i].tolist(), label[:, i].tolist(), strict=True))
        seen = {image for image, _ in pairs}
        assert len(pairs) == len(seen), "an image keeps its label for the whole episode"
        assert seen <= {(start + j) % total for j in range(count)}
        # 20,480 draws with replacement see nearly all of at most 1,097 images.
        assert len(seen) > 0.99 * count
        wrong = np.mean([given != true[image] for image, given in pairs])
        share = float(noise[k])
        # Four standard errors of a binomial share.
        assert abs(wrong - share) < 4 * np.sqrt(max(share * (1 - share), 1e-3) / count)


def test_an_instance_sets_the_learning_rates_of_host_and_seeds() -> None:
    """The seeds' rate keeps its ratio to the host's; both fall linearly with each one's steps."""
    sim = make_simulation(host_learning_rate=0.1, seed_learning_rate=0.05, episode_steps=10)
    sim.begin_episodes(np.arange(4), np.array([0, 1, 2, 3]))
    sim.state.progress.steps[:] = steps = np.array([0, 2, 5, 9])
    ((*_, host, seeds),) = train_calls(sim, 1)
    expected = (1 - steps / 10) * sim.instances.learning_rate[:4]
    np.testing.assert_allclose(host, expected)
    np.testing.assert_allclose(seeds, 0.5 * expected)
    assert len(set(sim.instances.learning_rate[:4].tolist())) == 4


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
    germinate = action(Op.GERMINATE, blueprint=CONV_LIGHT)
    *_, info = envs.step(np.tile(germinate, (3, 1)))
    light = CNN_BLUEPRINTS[CONV_LIGHT]
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
