"""The population engine equals ordinary torch.nn networks trained one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from esper_env.config import Blend
from esper_env.population.storage import _begin, _begin_elsewhere
from esper_env.rng import make_key
from esper_env.tasks import TASKS
from tests.builders import NAMES, STAGES, TOLERANCE, SmallPopulation, train_plain

pytestmark = pytest.mark.usefixtures("engine")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("blend", list(Blend))
@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_population_equals_plain_networks(index: int, blend: Blend, stage: str) -> None:
    """Two members with the seed in either slot, one without, over several optimizer steps."""
    small = SmallPopulation(3)
    for member, slot in ((0, 0), (1, 1)):
        small.plant(member, slot, index, stage, blend)
    small.awaken()
    networks = small.plains()
    indices = small.draw(1)
    report = small.train(indices)
    for i, network in enumerate(networks):
        loss = train_plain(network, small.images, indices[:, :, i])
        assert report.loss[i] == pytest.approx(loss, abs=TOLERANCE)
        small.assert_equals(i, network)


def test_a_random_mix_in_both_slots_equals_plain_networks_in_any_chunking() -> None:
    """All blueprints, blends and stages at once; chunks of 5 and of 12 members."""
    for chunk_size in (5, 12):
        rng = np.random.default_rng(2)
        small = SmallPopulation(12, chunk_size=chunk_size)
        for member in range(12):
            for slot in range(2):
                if rng.random() < 0.8:
                    blend, index = int(rng.integers(3)), int(rng.integers(len(NAMES)))
                    small.plant(member, slot, index, str(rng.choice(list(STAGES))), blend)
        small.awaken()
        networks = small.plains()
        indices = small.draw(2)
        small.train(indices)
        for i, network in enumerate(networks):
            train_plain(network, small.images, indices[:, :, i])
            small.assert_equals(i, network)


def test_evaluation_of_coalitions_equals_plain_networks() -> None:
    """Every subset of two seeds of mixed blends, with shared prefixes, in evaluation mode."""
    m, rng = 6, np.random.default_rng(3)
    small = SmallPopulation(m, chunk_size=4)
    for member in range(m):
        for slot in range(2):
            index = int(rng.integers(len(NAMES)))
            small.plant(member, slot, index, "half", (member + slot) % 3)
    small.awaken()
    small.train(small.draw(3))
    subsets = [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5), (1.0, 0.5)]
    members, alpha = np.repeat(np.arange(m), len(subsets)), np.array(subsets * m)
    result = small.evaluate(alpha, members)
    images = small.images
    x = images.normalized(0, len(images))
    for row, member in enumerate(members.tolist()):
        network = small.plain(member).eval()
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
    """Findings PRE-1 and PRE-2: every parameter tensor learns from the start, the gate's too."""
    small = SmallPopulation()
    small.plant(0, 0, index, "training", blend)
    indices = small.draw(4)
    small.train(indices[:2])
    norms = small.train(indices[2:]).seed_gradient_norms[0, 0]
    own, _ = small.layout.seed_columns(0, index)
    count = len(own) if blend == Blend.GATE else len(own) - 2
    assert (~np.isnan(norms)).sum() == count
    assert (norms[~np.isnan(norms)] > 0).all()


@pytest.mark.parametrize("blend", list(Blend))
@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_a_new_seed_is_the_exact_identity(index: int, blend: Blend) -> None:
    """Growth invariant: at any alpha a newborn changes no logit, so no accuracy and no loss."""
    small = SmallPopulation()
    before = small.evaluate([[0, 0]])
    for slot in range(2):
        small.plant(0, slot, index, blend=blend)
    after = small.evaluate([[1, 1]])
    assert after.loss[0] == before.loss[0]
    assert after.accuracy[0] == before.accuracy[0]


@pytest.mark.parametrize("blend", list(Blend))
def test_training_a_seed_does_not_change_the_host(blend: Blend) -> None:
    """In TRAINING the host's trajectory is bitwise that of a host without seed."""
    hosts = []
    for has_seed in (False, True):
        small = SmallPopulation()
        if has_seed:
            small.plant(0, 0, "conv_heavy", "training", blend)
        small.train(small.draw(5))
        hosts.append(small.storage.parameters[0, small.layout.host_start(0)[0].index])
    assert torch.equal(hosts[0], hosts[1])


@pytest.mark.parametrize("is_isolated", [True, False])
def test_layers_before_a_slot_receive_gradient_at_full_alpha(is_isolated: bool) -> None:
    """Finding PRE-3: the identity path is never detached."""
    small = SmallPopulation()
    small.plant(0, 1, "conv_light", "holding")
    small.seeds.is_isolated[0, 1] = is_isolated
    first = small.layout.blocks[0][0].parameters[0].offset
    before = small.storage.parameters[0].clone()
    small.train(small.draw(6), rate=1e-3)
    assert small.storage.parameters[0, first] != before[first]


def test_frozen_seeds_keep_parameters_and_momentum_while_the_host_trains() -> None:
    """A down-ramp freezes the seed; its momentum is not lost either."""
    small = SmallPopulation(2)
    for member in range(2):
        small.plant(member, 0, "conv_light", "holding")
    small.train(small.draw(7))
    small.seeds.is_frozen[0, 0] = True
    columns, _ = small.layout.seed_columns(0, NAMES.index("conv_light"))
    span = slice(columns[0].offset, columns[-3].offset + columns[-3].spec.size)
    storage = small.storage
    before = storage.parameters.clone(), storage.momentum.clone()
    small.train(small.draw(8))
    assert torch.equal(storage.parameters[0, span], before[0][0, span])
    assert torch.equal(storage.momentum[0, span], before[1][0, span])
    assert not torch.equal(storage.parameters[1, span], before[0][1, span])
    assert not torch.equal(storage.parameters[0, :20], before[0][0, :20])


def test_momentum_lives_from_germination_to_removal() -> None:
    """Finding LOOP-5: two calls of `train` equal one with the batches of both."""
    rows = []
    for parts in ((slice(0, 3),), (slice(0, 1), slice(1, 3))):
        small = SmallPopulation()
        small.plant(0, 0, "bottleneck", "holding")
        for part in parts:
            small.train(small.draw(8)[part])
        rows.append(small.storage.parameters[0].clone())
    assert torch.equal(rows[0], rows[1])


def test_start_values_are_the_same_on_another_device() -> None:
    """The way to a GPU, taken on the CPU: only the columns concerned are written."""
    layout = SmallPopulation(4).layout
    start, _ = layout.seed_start(1, 2, 0)
    members, key = np.array([3, 1]), make_key(np.arange(2))
    here, there = torch.full((2, 4, layout.num_parameters), 7.0)
    _begin(here, members, key, start)
    _begin_elsewhere(there, members, key, start)
    assert torch.equal(here, there)
    is_old = here == 7
    assert is_old[[0, 2]].all()
    assert (~is_old[3]).nonzero()[:, 0].tolist() == sorted(start.columns.tolist())


def test_germination_clears_the_momentum_of_a_former_seed() -> None:
    """A slot that is reused starts like a fresh one."""
    small = SmallPopulation()
    small.plant(0, 0, "conv_heavy", "holding")
    small.train(small.draw(9))
    small.plant(0, 0, "conv_light")
    columns = small.layout.seed_start(0, NAMES.index("conv_light"), 0)[0].columns
    assert (small.storage.momentum[0, columns] == 0).all()


def test_members_left_out_of_a_step_do_not_change() -> None:
    small = SmallPopulation(3)
    before = small.storage.parameters.clone()
    small.train(small.draw(11, 2), [0, 2])
    assert torch.equal(small.storage.parameters[1], before[1])
    assert not torch.equal(small.storage.parameters[2], before[2])


@pytest.mark.parametrize("task", TASKS)
def test_initial_loss_is_that_of_guessing(task: str) -> None:
    """Finding PRE-18: within 5 % of ln(classes) for every host."""
    host = TASKS[task].host
    small = SmallPopulation(16, hosts=(host,))
    if task == "digits":  # The other tasks need a download; made-up images have the same scale.
        small.images = TASKS[task].load(None).validation
    loss = small.evaluate(np.zeros((16, host.num_slots))).loss.mean()
    assert loss == pytest.approx(np.log(host.num_classes), rel=0.05)


def test_gradient_norms_are_those_before_clipping() -> None:
    """The root mean square over batches of each tensor's L2 norm, from plain autograd."""
    small = SmallPopulation()
    small.plant(0, 0, "conv_light", "holding")
    network, images = small.plain(0), small.images
    index = small.draw(12)[:1]
    x = ((images.images[index[0, :, 0]].float() - images.mean) / images.std).permute(0, 3, 1, 2)
    F.cross_entropy(network(x), images.labels[index[0, :, 0]]).backward()  # type: ignore[no-untyped-call]
    expected = [float(p.grad.norm()) for p in network.seeds["0"].parameters() if p.grad is not None]
    norms = small.train(index).seed_gradient_norms[0, 0, : len(expected)]
    np.testing.assert_allclose(norms, expected, rtol=1e-4)


def test_a_non_finite_gradient_is_reported_as_infinite_and_stays_in_its_member() -> None:
    small = SmallPopulation(2)
    for member in range(2):
        small.plant(member, 0, "conv_light", "holding")
    column = small.layout.seed_columns(0, NAMES.index("conv_light"))[0][0]
    small.storage.parameters[0, column.offset] = float("nan")
    report = small.train(small.draw(13))
    assert np.isinf(report.seed_gradient_norms[0, 0]).any()
    assert np.isfinite(report.loss[1])
    assert torch.isfinite(small.storage.parameters[1]).all()


def test_seeds_that_do_not_run_have_no_gradient() -> None:
    """A germinated seed (beta 0) is not run and reports no norm (GRD-M5)."""
    small = SmallPopulation()
    small.plant(0, 0, 0)
    assert small.seeds.beta[0, 0] == 0
    assert np.isnan(small.train(small.draw(14)).seed_gradient_norms).all()


def test_alphas_of_the_population_stay_floats() -> None:
    """Finding PRE-17: alpha 0.4 is not cut to an integer anywhere on its way into the mix."""
    small = SmallPopulation()
    small.plant(0, 0, "conv_heavy")
    small.awaken()
    loss = small.evaluate([[0, 0], [0.4, 0], [1, 0]], [0, 0, 0]).loss
    assert len(set(loss.tolist())) == 3
