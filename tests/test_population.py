"""The population engine equals ordinary torch.nn networks trained one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.plain import PlainNetwork, train_batch
from esper_env.config import Blend
from esper_env.population.blueprints import CNN_BLUEPRINTS
from esper_env.population.hosts import Host
from esper_env.population.images import Draw, ImageSet
from esper_env.population.interface import Seeds, SGDSettings
from esper_env.population.population import Population
from esper_env.population.storage import _begin, _begin_elsewhere
from esper_env.rng import make_key
from esper_env.tasks import TASKS

NAMES = [blueprint.name for blueprint in CNN_BLUEPRINTS]
TINY = Host(in_channels=2, image_size=8, channels=(3, 6), num_classes=5)
RATE = 0.05
BATCHES, BATCH_SIZE = 3, 16
# float32 results of a grouped and of a single convolution differ by rounding, a few 1e-7 after
# some optimiser steps; 2e-5 leaves room for other BLAS builds.
TOLERANCE = 2e-5

pytestmark = pytest.mark.usefixtures("engine")
STAGES = {
    "training": {"alpha": 0.0, "beta": 1.0, "is_isolated": True},
    "blending": {"alpha": 0.4, "beta": 0.4, "is_isolated": True},
    "holding": {"alpha": 1.0, "beta": 1.0, "is_isolated": False},
    "half": {"alpha": 0.5, "beta": 0.5, "is_isolated": False},
}


def make_images(count: int = 200, host: Host = TINY) -> ImageSet:
    rng = np.random.default_rng(0)
    shape = (count, host.image_size, host.image_size, host.in_channels)
    images = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, host.num_classes, count))
    return ImageSet(
        images,
        labels,
        torch.full((host.in_channels,), 120.0),
        torch.full((host.in_channels,), 70.0),
    )


def make_population(num_members: int, chunk_size: int | None = None, host: Host = TINY):  # type: ignore[no-untyped-def]
    population = Population(
        [host],
        CNN_BLUEPRINTS,
        num_members,
        SGDSettings(),
        torch.device("cpu"),
        BATCH_SIZE,
        chunk_size,
    )
    members = np.arange(num_members)
    population.reset(members, 0 * members, make_key(members))
    return population


def make_seeds(num_members: int, num_slots: int = 2) -> Seeds:
    shape = (num_members, num_slots)
    return Seeds(
        blueprint=np.full(shape, -1),
        blend=np.zeros(shape, dtype=np.int64),
        alpha=np.zeros(shape),
        beta=np.zeros(shape),
        is_isolated=np.zeros(shape, dtype=bool),
        is_frozen=np.zeros(shape, dtype=bool),
        width=np.zeros(shape[0], dtype=np.int64),
    )


def plant(population: Population, seeds: Seeds, member: int, slot: int, index: int) -> None:
    """Germinate one seed."""
    seeds.blueprint[member, slot] = index
    one = np.array([member])
    key = make_key(one, 77 + slot)
    population.germinate(one, 0 * one, np.array([slot]), np.array([index]), key)


def set_stage(seeds: Seeds, member: int, slot: int, stage: str) -> None:
    for name, value in STAGES[stage].items():
        getattr(seeds, name)[member, slot] = value


def awaken(population: Population, seed: int = 0) -> None:
    """Move all parameters off their start values, zeros included, so that nothing cancels."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, 0.1, population.storage.parameters.shape).astype(np.float32)
    population.storage.parameters += torch.from_numpy(noise)


def draw(rng: np.random.Generator, images: ImageSet, m: int) -> np.ndarray:  # type: ignore[type-arg]
    return rng.integers(0, len(images), (BATCHES, BATCH_SIZE, m))


def shown(images: ImageSet, indices: np.ndarray) -> Draw:  # type: ignore[type-arg]
    """Return what the batches show, with true labels."""
    return Draw(indices, images.labels.numpy()[indices])


def plain_copy(population: Population, seeds: Seeds, member: int) -> PlainNetwork:
    network = PlainNetwork(population.layout.host)
    network.load_host(population, member)
    for slot in range(population.layout.host.num_slots):
        if seeds.blueprint[member, slot] < 0:
            continue
        seed = network.add_seed(
            population,
            member,
            slot,
            int(seeds.blueprint[member, slot]),
            int(seeds.blend[member, slot]),
        )
        seed.alpha = float(seeds.alpha[member, slot])
        seed.is_training_stage = bool(seeds.alpha[member, slot] == 0)
        seed.is_isolated = bool(seeds.is_isolated[member, slot])
    return network


def train_plain(network: PlainNetwork, images: ImageSet, indices: np.ndarray) -> float:  # type: ignore[type-arg]
    optimizer = network.optimizer(RATE, RATE, SGDSettings().weight_decay)
    network.train()
    losses = []
    for index in torch.from_numpy(indices):
        x = ((images.images[index].float() - images.mean) / images.std).permute(0, 3, 1, 2)
        losses.append(
            train_batch(network, optimizer, x, images.labels[index], SGDSettings().clip_norm)
        )
    return float(torch.stack(losses).mean())


def assert_equal(population: Population, seeds: Seeds, member: int, network: PlainNetwork) -> None:
    expected = network.state_dict()
    actual = plain_copy(population, seeds, member).state_dict()
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(actual[name], tensor, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("blend", list(Blend))
@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_population_equals_plain_networks(index: int, blend: Blend, stage: str) -> None:
    """Two members with the seed in either slot, one without, over several optimiser steps."""
    images = make_images()
    population, seeds = make_population(3), make_seeds(3)
    for member, slot in ((0, 0), (1, 1)):
        seeds.blend[member, slot] = blend
        plant(population, seeds, member, slot, index)
        set_stage(seeds, member, slot, stage)
    awaken(population)
    networks = [plain_copy(population, seeds, i) for i in range(3)]
    indices = draw(np.random.default_rng(1), images, 3)
    rates = np.full(3, RATE)
    report = population.train(np.arange(3), seeds, images, shown(images, indices), rates, rates)
    for i, network in enumerate(networks):
        loss = train_plain(network, images, indices[:, :, i])
        assert report.loss[i] == pytest.approx(loss, abs=TOLERANCE)
        assert_equal(population, seeds, i, network)


def test_a_random_mix_in_both_slots_equals_plain_networks_in_any_chunking() -> None:
    """All blueprints, blends and stages at once; chunks of 5 and of 12 members."""
    images, m = make_images(), 12
    for chunk_size in (5, 12):
        rng = np.random.default_rng(2)
        population, seeds = make_population(m, chunk_size), make_seeds(m)
        for member in range(m):
            for slot in range(2):
                if rng.random() < 0.8:
                    seeds.blend[member, slot] = rng.integers(3)
                    plant(population, seeds, member, slot, int(rng.integers(len(NAMES))))
                    set_stage(seeds, member, slot, str(rng.choice(list(STAGES))))
        awaken(population)
        networks = [plain_copy(population, seeds, i) for i in range(m)]
        indices = draw(rng, images, m)
        rates = np.full(m, RATE)
        population.train(np.arange(m), seeds, images, shown(images, indices), rates, rates)
        for i, network in enumerate(networks):
            train_plain(network, images, indices[:, :, i])
            assert_equal(population, seeds, i, network)


def test_evaluation_of_coalitions_equals_plain_networks() -> None:
    """Every subset of two seeds of mixed blends, with shared prefixes, in evaluation mode."""
    images, m = make_images(), 6
    rng = np.random.default_rng(3)
    population, seeds = make_population(m, 4), make_seeds(m)
    for member in range(m):
        for slot in range(2):
            seeds.blend[member, slot] = (member + slot) % 3
            plant(population, seeds, member, slot, int(rng.integers(len(NAMES))))
            set_stage(seeds, member, slot, "half")
    awaken(population)
    rates = np.full(m, RATE)
    population.train(np.arange(m), seeds, images, shown(images, draw(rng, images, m)), rates, rates)
    subsets = [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5), (1.0, 0.5)]
    members = np.repeat(np.arange(m), len(subsets))
    alpha = np.array(subsets * m)
    result = population.evaluate(members, alpha, seeds, images)
    x = images.normalised(0, len(images))
    for row, member in enumerate(members):
        network = plain_copy(population, seeds, int(member)).eval()
        for slot in range(2):
            seed = network.seeds[str(slot)]
            seed.alpha, seed.is_training_stage = float(alpha[row, slot]), False
        with torch.no_grad():
            logits = network(x)
        loss = float(F.cross_entropy(logits, images.labels))
        accuracy = float((logits.argmax(1) == images.labels).float().mean())
        assert result.loss[row] == pytest.approx(loss, abs=1e-4)
        # One image on the border between two classes may fall to the other side.
        assert result.accuracy[row] == pytest.approx(accuracy, abs=1.5 / len(images))


@pytest.mark.parametrize("blend", list(Blend))
@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_every_seed_has_a_live_gradient_by_the_third_batch(index: int, blend: Blend) -> None:
    """Findings PRE-1 and PRE-2: every parameter tensor, the gate's too, learns from birth."""
    images = make_images()
    population, seeds = make_population(1), make_seeds(1)
    seeds.blend[0, 0] = blend
    plant(population, seeds, 0, 0, index)
    set_stage(seeds, 0, 0, "training")
    rng, rates = np.random.default_rng(4), np.full(1, RATE)
    indices = draw(rng, images, 1)
    population.train(np.array([0]), seeds, images, shown(images, indices[:2]), rates, rates)
    report = population.train(
        np.array([0]), seeds, images, shown(images, indices[2:]), rates, rates
    )
    norms = report.seed_gradient_norms[0, 0]
    own, _ = population.layout.seed_columns(0, index)
    count = len(own) if blend == Blend.GATE else len(own) - 2
    assert (~np.isnan(norms)).sum() == count
    assert (norms[~np.isnan(norms)] > 0).all()


@pytest.mark.parametrize("blend", list(Blend))
@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_a_new_seed_is_the_exact_identity(index: int, blend: Blend) -> None:
    """Growth invariant: at any alpha a newborn changes no logit, so no accuracy and no loss."""
    images = make_images()
    population, seeds = make_population(1), make_seeds(1)
    before = population.evaluate(np.array([0]), np.zeros((1, 2)), seeds, images)
    seeds.blend[0, :] = blend
    for slot in range(2):
        plant(population, seeds, 0, slot, index)
    after = population.evaluate(np.array([0]), np.ones((1, 2)), seeds, images)
    assert after.loss[0] == before.loss[0]
    assert after.accuracy[0] == before.accuracy[0]


@pytest.mark.parametrize("blend", list(Blend))
def test_training_a_seed_does_not_change_the_host(blend: Blend) -> None:
    """In TRAINING the host's trajectory is bitwise that of a host without seed."""
    images, rates = make_images(), np.full(1, RATE)
    hosts = []
    for has_seed in (False, True):
        population, seeds = make_population(1), make_seeds(1)
        if has_seed:
            seeds.blend[0, 0] = blend
            plant(population, seeds, 0, 0, NAMES.index("conv_heavy"))
            set_stage(seeds, 0, 0, "training")
        indices = draw(np.random.default_rng(5), images, 1)
        population.train(np.array([0]), seeds, images, shown(images, indices), rates, rates)
        columns, _ = population.layout.host_columns()
        width = columns[-1].offset + columns[-1].spec.size
        hosts.append(
            torch.cat(
                [
                    population.storage.parameters[0, c.offset : c.offset + c.spec.size]
                    for c in columns
                    if c.offset < width
                ]
            )
        )
    assert torch.equal(hosts[0], hosts[1])


@pytest.mark.parametrize("is_isolated", [True, False])
def test_layers_before_a_slot_receive_gradient_at_full_alpha(is_isolated: bool) -> None:
    """Finding PRE-3: the identity path is never detached."""
    images, rates = make_images(), np.full(1, RATE)
    population, seeds = make_population(1), make_seeds(1)
    plant(population, seeds, 0, 1, NAMES.index("conv_light"))
    set_stage(seeds, 0, 1, "holding")
    seeds.is_isolated[0, 1] = is_isolated
    first = population.layout.blocks[0][0].parameters[0]
    before = population.storage.parameters[0].clone()
    indices = draw(np.random.default_rng(6), images, 1)
    population.train(np.array([0]), seeds, images, shown(images, indices), np.full(1, 1e-3), rates)
    change = (population.storage.parameters[0] - before)[first.offset : first.offset + 1]
    assert change.abs().min() > 0


def test_frozen_seeds_keep_parameters_and_momentum_while_the_host_trains() -> None:
    """A down-ramp freezes the seed; its momentum is not lost either."""
    images, rates = make_images(), np.full(2, RATE)
    population, seeds = make_population(2), make_seeds(2)
    for member in range(2):
        plant(population, seeds, member, 0, NAMES.index("conv_light"))
        set_stage(seeds, member, 0, "holding")
    rng = np.random.default_rng(7)
    population.train(np.arange(2), seeds, images, shown(images, draw(rng, images, 2)), rates, rates)
    seeds.is_frozen[0, 0] = True
    columns, _ = population.layout.seed_columns(0, NAMES.index("conv_light"))
    span = slice(columns[0].offset, columns[-3].offset + columns[-3].spec.size)
    storage = population.storage
    before = storage.parameters.clone(), storage.momentum.clone()
    population.train(np.arange(2), seeds, images, shown(images, draw(rng, images, 2)), rates, rates)
    assert torch.equal(storage.parameters[0, span], before[0][0, span])
    assert torch.equal(storage.momentum[0, span], before[1][0, span])
    assert not torch.equal(storage.parameters[1, span], before[0][1, span])
    assert not torch.equal(storage.parameters[0, :20], before[0][0, :20])


def test_momentum_lives_from_germination_to_removal() -> None:
    """Finding LOOP-5: two calls of `train` equal one with the batches of both."""
    images, rates = make_images(), np.full(1, RATE)
    rows = []
    for parts in ((slice(0, 3),), (slice(0, 1), slice(1, 3))):
        population, seeds = make_population(1), make_seeds(1)
        plant(population, seeds, 0, 0, NAMES.index("bottleneck"))
        set_stage(seeds, 0, 0, "holding")
        indices = draw(np.random.default_rng(8), images, 1)
        for part in parts:
            population.train(
                np.array([0]), seeds, images, shown(images, indices[part]), rates, rates
            )
        rows.append(population.storage.parameters[0].clone())
    assert torch.equal(rows[0], rows[1])


def test_start_values_are_the_same_on_another_device() -> None:
    """The way to a GPU, taken on the CPU: only the columns concerned are written."""
    population = make_population(4)
    start, _ = population.layout.seed_start(1, 2, 0)
    members, key = np.array([3, 1]), make_key(np.arange(2))
    here, there = torch.full((2, 4, population.layout.num_parameters), 7.0)
    _begin(here, members, key, start)
    _begin_elsewhere(there, members, key, start)
    assert torch.equal(here, there)
    is_old = here == 7
    assert is_old[[0, 2]].all()
    assert (~is_old[3]).nonzero()[:, 0].tolist() == sorted(start.columns.tolist())


def test_germination_clears_the_momentum_of_a_former_seed() -> None:
    """A slot that is reused starts like a fresh one."""
    images, rates = make_images(), np.full(1, RATE)
    population, seeds = make_population(1), make_seeds(1)
    plant(population, seeds, 0, 0, NAMES.index("conv_heavy"))
    set_stage(seeds, 0, 0, "holding")
    indices = draw(np.random.default_rng(9), images, 1)
    population.train(np.array([0]), seeds, images, shown(images, indices), rates, rates)
    plant(population, seeds, 0, 0, NAMES.index("conv_light"))
    for column in population.layout.seed_columns(0, NAMES.index("conv_light"))[0]:
        part = population.storage.momentum[0, column.offset : column.offset + column.spec.size]
        assert (part == 0).all()


def test_a_member_does_not_depend_on_the_others() -> None:
    """Work per member is fixed (Finding PRE-12): alone or beside others, the same weights."""
    images = make_images()
    rows = []
    for m in (1, 9):
        population, seeds = make_population(m), make_seeds(m)
        for member in range(m):
            plant(population, seeds, member, 0, (NAMES.index("conv_light") + member) % len(NAMES))
            set_stage(seeds, member, 0, "holding")
        indices = draw(np.random.default_rng(10), images, 9)[:, :, :m]
        rates = np.full(m, RATE)
        population.train(np.arange(m), seeds, images, shown(images, indices), rates, rates)
        rows.append(population.storage.parameters[0].clone())
    torch.testing.assert_close(rows[0], rows[1], atol=TOLERANCE, rtol=TOLERANCE)


def test_members_left_out_of_a_step_do_not_change() -> None:
    images = make_images()
    population, seeds = make_population(3), make_seeds(3)
    before = population.storage.parameters.clone()
    indices = draw(np.random.default_rng(11), images, 2)
    rates = np.full(2, RATE)
    population.train(np.array([0, 2]), seeds, images, shown(images, indices), rates, rates)
    assert torch.equal(population.storage.parameters[1], before[1])
    assert not torch.equal(population.storage.parameters[2], before[2])


@pytest.mark.parametrize("task", TASKS)
def test_initial_loss_is_that_of_guessing(task: str) -> None:
    """Finding PRE-18: within 5 % of ln(classes) for every host."""
    host = TASKS[task].host
    population = make_population(16, host=host)
    # The other tasks need a download; made-up images have the same scale.
    images = TASKS[task].load(None).validation if task == "digits" else make_images(host=host)
    seeds = make_seeds(16, host.num_slots)
    zeros = np.zeros((16, host.num_slots))
    loss = population.evaluate(np.arange(16), zeros, seeds, images).loss.mean()
    assert loss == pytest.approx(np.log(host.num_classes), rel=0.05)


def test_parameter_and_multiply_add_counts_equal_those_of_the_real_modules() -> None:
    """Counts from the registry against torch.nn modules; convolutions counted by hooks."""
    population, seeds = make_population(1), make_seeds(1)
    for slot, channels in enumerate(TINY.channels):
        for index, name in enumerate(NAMES):
            plant(population, seeds, 0, slot, index)
            branch = plain_copy(population, seeds, 0).seeds[str(slot)]
            count = sum(p.numel() for p in branch.parameters())
            assert population.seed_parameters[0, slot, index] == count, name
            size = TINY.slot_size(slot)
            macs = sum(
                m.weight.numel() * size * size
                for m in branch.modules()
                if isinstance(m, torch.nn.Conv2d)
            )
            macs += sum(
                m.num_features * size * size
                for m in branch.modules()
                if isinstance(m, torch.nn.BatchNorm2d)
            )
            macs += sum(
                m.weight.numel() for m in branch.modules() if isinstance(m, torch.nn.Linear)
            )
            macs += channels * size * size if name == "attention" else 0
            assert population.seed_multiply_adds[0, slot, index] == macs, name
    assert sum(p.numel() for p in PlainNetwork(TINY).parameters()) == TINY.num_parameters
    assert TASKS["digits"].host.num_parameters == 438


def test_gradient_norms_are_those_before_clipping() -> None:
    """The root mean square over batches of each tensor's L2 norm, from plain autograd."""
    images = make_images()
    population, seeds = make_population(1), make_seeds(1)
    plant(population, seeds, 0, 0, NAMES.index("conv_light"))
    set_stage(seeds, 0, 0, "holding")
    network = plain_copy(population, seeds, 0)
    index = draw(np.random.default_rng(12), images, 1)[:1]
    x = ((images.images[index[0, :, 0]].float() - images.mean) / images.std).permute(0, 3, 1, 2)
    F.cross_entropy(network(x), images.labels[index[0, :, 0]]).backward()  # type: ignore[no-untyped-call]
    expected = [float(p.grad.norm()) for p in network.seeds["0"].parameters() if p.grad is not None]
    rates = np.full(1, RATE)
    report = population.train(np.array([0]), seeds, images, shown(images, index), rates, rates)
    norms = report.seed_gradient_norms[0, 0, : len(expected)]
    np.testing.assert_allclose(norms, expected, rtol=1e-4)


def test_a_non_finite_gradient_is_reported_as_infinite_and_stays_in_its_member() -> None:
    images, rates = make_images(), np.full(2, RATE)
    population, seeds = make_population(2), make_seeds(2)
    for member in range(2):
        plant(population, seeds, member, 0, NAMES.index("conv_light"))
        set_stage(seeds, member, 0, "holding")
    column = population.layout.seed_columns(0, NAMES.index("conv_light"))[0][0]
    population.storage.parameters[0, column.offset] = float("nan")
    indices = draw(np.random.default_rng(13), images, 2)
    report = population.train(np.arange(2), seeds, images, shown(images, indices), rates, rates)
    assert np.isinf(report.seed_gradient_norms[0, 0]).any()
    assert np.isfinite(report.loss[1])
    assert torch.isfinite(population.storage.parameters[1]).all()


def test_seeds_that_do_not_run_have_no_gradient() -> None:
    """A germinated seed (beta 0) is not run and reports no norm (GRD-M5)."""
    images, rates = make_images(), np.full(1, RATE)
    population, seeds = make_population(1), make_seeds(1)
    plant(population, seeds, 0, 0, 0)
    assert seeds.beta[0, 0] == 0
    indices = draw(np.random.default_rng(14), images, 1)
    report = population.train(np.array([0]), seeds, images, shown(images, indices), rates, rates)
    assert np.isnan(report.seed_gradient_norms).all()


def test_alphas_of_the_population_stay_floats() -> None:
    """Finding PRE-17: alpha 0.4 is not cut to an integer anywhere on its way into the mix."""
    images = make_images()
    population, seeds = make_population(1), make_seeds(1)
    plant(population, seeds, 0, 0, NAMES.index("conv_heavy"))
    awaken(population)
    members = np.zeros(3, dtype=np.int64)
    alpha = np.array([[0.0, 0.0], [0.4, 0.0], [1.0, 0.0]])
    loss = population.evaluate(members, alpha, seeds, images).loss
    assert len(set(loss.tolist())) == 3
