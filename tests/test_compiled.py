"""The compiled engine: threads, batches and layers without kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esper_env.population.blueprints import CNN_BLUEPRINTS, Blueprint
from esper_env.population.hosts import Host
from esper_env.population.interface import SGDSettings, Training
from esper_env.population.layers import Conv, Layer, Norm, Relu
from esper_env.population.numba_engine.engine import _pool
from esper_env.population.numba_engine.kernels import tanh_of
from esper_env.population.population import Population
from esper_env.rng import make_key
from tests.builders import (
    BATCH_SIZE,
    TOLERANCE,
    awaken,
    draw,
    make,
    make_images,
    make_seeds,
    make_single,
    plain_copy,
    plant,
    set_stage,
    shown,
    train_plain,
)


def test_tanh_is_that_of_numpy() -> None:
    x = np.concatenate([np.linspace(-12, 12, 4001), [0, 1e-8, -1e-8, 88, -88]]).astype(np.float32)
    out = np.empty_like(x)
    tanh_of(out, x)
    np.testing.assert_allclose(out, np.tanh(x), atol=5e-7)
    assert out[4001] == 0
    tanh_of(out[:1], np.array([np.nan], dtype=np.float32))
    assert np.isnan(out[0])


def test_a_member_of_a_batch_is_bitwise_the_single_environment() -> None:
    """Whole episodes of five members with different instances."""
    options: dict[str, Any] = {"instances": "train", "episode_steps": 30, "attribution": "full"}
    envs = make(5, **options)
    observation, info = envs.reset(seed=40)
    singles = [make_single(**options) for _ in range(5)]
    for i, env in enumerate(singles):
        own, _ = env.reset(seed=40 + i)
        np.testing.assert_array_equal(own, observation[i])
    rng = np.random.default_rng(0)
    for _ in range(30):
        actions = envs.sample_valid_actions(rng)
        observation, reward, *_, info = envs.step(actions)
        for i, env in enumerate(singles):
            own, own_reward, *_, own_info = env.step(actions[i])
            np.testing.assert_array_equal(own, observation[i])
            assert own_reward == reward[i]
            assert own_info["loss"] == info["loss"][i]
    assert info["parameters"].any()


@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_changes_nothing() -> None:
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        envs = make(7, instances="train", episode_steps=10)
        envs.reset(seed=0)
        rng = np.random.default_rng(0)
        steps = [envs.step(envs.sample_valid_actions(rng)) for _ in range(12)]
        results.append(np.stack([step[0] for step in steps]))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.usefixtures("threads")
def test_a_late_helper_thread_delays_nobody() -> None:
    """The only helper thread is busy until after the step; the results are as with one thread."""
    torch.set_num_threads(1)
    alone, together = make(4), make(4)
    wait = np.zeros((4, 8), dtype=np.int64)
    alone.reset(seed=0)
    expected = alone.step(wait)[0]
    torch.set_num_threads(2)
    together.reset(seed=0)
    is_over = threading.Event()
    late = _pool(1, os.getpid()).submit(is_over.wait, 60)
    observation = together.step(wait)[0]
    assert not late.done()
    is_over.set()
    assert late.result()
    np.testing.assert_array_equal(observation, expected)


def make_population(
    host: Host, blueprints: Sequence[Blueprint] = CNN_BLUEPRINTS, members: int = 2
) -> Population:
    population = Population(
        [host], blueprints, members, SGDSettings(), torch.device("cpu"), BATCH_SIZE, None
    )
    own = np.arange(members)
    population.reset(own, 0 * own, make_key(own))
    return population


@pytest.mark.parametrize("size", [5, 7, 9])
def test_odd_images_are_pooled_as_torch_does(size: int) -> None:
    """The odd last row and column is dropped, and its gradient is 0."""
    host = Host(in_channels=1, image_size=size, channels=(3, 4), num_classes=5)
    images = make_images(host=host)
    population, seeds = make_population(host), make_seeds(2)
    networks = [plain_copy(population, seeds, i) for i in range(2)]
    indices, rates = draw(np.random.default_rng(1), images, 2), np.full(2, 0.05)
    batches = shown(images, indices)
    population.train(Training(np.arange(2), seeds, images, batches, rates, rates))
    for i, network in enumerate(networks):
        train_plain(network, images, indices[:, :, i])
        expected = network.state_dict()
        actual = plain_copy(population, seeds, i).state_dict()
        for name, tensor in expected.items():
            if tensor.is_floating_point():
                torch.testing.assert_close(actual[name], tensor, atol=TOLERANCE, rtol=TOLERANCE)


class Doubled(Relu):
    """A layer without a kernel."""

    def forward(self, x, parameters, buffers, training):  # type: ignore[no-untyped-def]
        del parameters, buffers, training
        return x + x


def test_members_with_a_layer_without_kernel_run_on_torch_and_the_others_do_not() -> None:
    """The results are those of the torch engine alone."""

    def build(c: int) -> Sequence[Layer]:
        return [Doubled(), Conv(c, c, 3), Norm(c), Relu(), Conv(c, c, 1, bias=True, zero=True)]

    host = Host(in_channels=1, image_size=8, channels=(4, 8), num_classes=5)
    blueprints = [*CNN_BLUEPRINTS, Blueprint("doubled", build)]
    images, rates = make_images(host=host), np.full(2, 0.05)
    population, seeds = make_population(host, blueprints), make_seeds(2)
    for member, index in ((0, len(blueprints) - 1), (1, 5)):
        plant(population, seeds, member, 0, index)
        set_stage(seeds, member, 0, "holding")
    awaken(population)
    assert population.compiled is not None
    assert population.compiled.supports(np.arange(2), seeds).tolist() == [False, True]
    twin = make_population(host, blueprints)
    twin.storage.parameters.copy_(population.storage.parameters)
    twin.storage.buffers.copy_(population.storage.buffers)
    twin.compiled = None
    indices = draw(np.random.default_rng(2), images, 2)
    for each in (population, twin):
        batches = shown(images, indices)
        report = each.train(Training(np.arange(2), seeds, images, batches, rates, rates))
        assert np.isfinite(report.loss).all()
        result = each.evaluate(np.arange(2), seeds.alpha, seeds, images)
        assert np.isfinite(result.loss).all()
    torch.testing.assert_close(
        population.storage.parameters, twin.storage.parameters, atol=TOLERANCE, rtol=TOLERANCE
    )


def test_a_larger_kernel_runs_on_torch() -> None:
    host = Host(in_channels=1, image_size=8, channels=(4,), num_classes=5, kernel_size=5)
    population = make_population(host)
    assert population.compiled is not None
    assert not population.compiled.supports(np.arange(2), make_seeds(2, 1)).any()


def test_a_block_may_begin_with_a_rectifier() -> None:
    """Its channels are those of the block before, whatever network was evaluated last."""

    def build(before: int, after: int) -> Sequence[Layer]:
        first = [Relu()] if before > 1 else []
        return [*first, Conv(before, after, 3), Norm(after)]

    host = Host(in_channels=1, image_size=8, channels=(8, 4), num_classes=5, build_block=build)
    population, seeds, images = make_population(host), make_seeds(2), make_images(host=host)
    plant(population, seeds, 0, 0, 0)
    set_stage(seeds, 0, 0, "holding")
    awaken(population)
    networks = np.zeros(2, dtype=np.int64), np.array([[0.0, 0.0], [1.0, 0.0]]), seeds, images
    result = population.evaluate(*networks)
    population.compiled = None
    expected = population.evaluate(*networks)
    assert result.loss[0] != result.loss[1]
    np.testing.assert_allclose(result.loss, expected.loss, atol=TOLERANCE)


def test_a_nan_weight_shows_in_the_loss() -> None:
    """The compiler may reorder sums, but not assume that numbers are finite."""
    host = Host(in_channels=1, image_size=8, channels=(4, 8), num_classes=5)
    population, seeds, images = make_population(host), make_seeds(2), make_images(host=host)
    population.storage.parameters[0, 0] = float("nan")
    indices, rates = draw(np.random.default_rng(3), images, 2), np.full(2, 0.05)
    batches = shown(images, indices)
    report = population.train(Training(np.arange(2), seeds, images, batches, rates, rates))
    assert np.isnan(report.loss[0])
    assert np.isfinite(report.loss[1])
    assert report.is_finite.tolist() == [False, True]
    loss = population.evaluate(np.arange(2), seeds.alpha, seeds, images).loss
    assert np.isnan(loss[0])
    assert np.isfinite(loss[1])


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux does")
def test_snapshots_wake_no_thread_that_training_would_wait_for() -> None:
    """Torch copies large matrices by threads of its own, which stay awake for milliseconds."""
    code = """
import os, numpy as np, torch
torch.set_num_threads(1)
from esper_env.population.storage import Storage
from esper_env.population.blueprints import CNN_BLUEPRINTS
from esper_env.population.layout import Layout
from tests.builders import TINY
storage = Storage(Layout([TINY], CNN_BLUEPRINTS), 5000, torch.device("cpu"))
torch.set_num_threads(2)
before = len(os.listdir("/proc/self/task"))
for members in (np.arange(5000), np.arange(4000)):
    storage.parameters.numpy()[:] += 1
    storage.save(members)
    storage.parameters.numpy()[:] += 1
    storage.restore(members)
assert len(os.listdir("/proc/self/task")) == before
assert (storage.parameters[:4000] == 2).all() and (storage.parameters[4000:] == 3).all()
storage.snapshots["parameters"].copy_(storage.parameters)
assert len(os.listdir("/proc/self/task")) > before
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
