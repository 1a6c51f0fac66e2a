"""The compiled engine: threads, batches and layers without kernels."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch

from esper_env.config import Blend, Float32Array
from esper_env.jit import entry_point
from esper_env.population.blueprints import CNN_BLUEPRINTS, Blueprint
from esper_env.population.hosts import Host
from esper_env.population.layers import Conv, Layer, Norm, Relu
from esper_env.population.numba_engine.engine import _pool
from esper_env.population.numba_engine.kernels import exp_of, tanh_of
from esper_env.population.numba_engine.lanes import LANES, load, store_first
from tests.builders import CONV_LIGHT, TOLERANCE, SmallPopulation, make, play, train_plain, waits


@entry_point
def write_functions(x: Float32Array, tanh: Float32Array, exp: Float32Array) -> None:
    for i in range(0, len(x), LANES):
        store_first(tanh, i, tanh_of(load(x, i)), LANES)
        store_first(exp, i, exp_of(load(x, i)), LANES)


def functions_of(*numbers: float) -> tuple[Float32Array, Float32Array, Float32Array]:
    """Return some numbers, and their tanh and exp."""
    x = np.zeros(-(-len(numbers) // LANES) * LANES, dtype=np.float32)
    x[: len(numbers)] = numbers
    tanh, exp = np.zeros((2, len(x)), dtype=np.float32)
    write_functions(x, tanh, exp)
    return x, tanh, exp


def test_tanh_is_that_of_numpy() -> None:
    x, tanh, _ = functions_of(0, *np.linspace(-12, 12, 4001), 1e-8, -1e-8, 88, -88, np.inf)
    np.testing.assert_allclose(tanh, np.tanh(x), atol=5e-7)
    assert tanh[0] == 0
    assert np.isnan(functions_of(np.nan)[1][0])


def test_exp_is_that_of_numpy() -> None:
    x, _, exp = functions_of(*np.linspace(-87, 0, 4001))
    np.testing.assert_allclose(exp, np.exp(x), rtol=2e-7)
    _, _, exp = functions_of(-1000, -np.inf, np.nan)
    assert exp[0] == exp[1] < 1e-37
    assert np.isnan(exp[2])


@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_changes_nothing() -> None:
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        envs = make(7, instances="train", episode_steps=10)
        envs.reset(seed=0)
        results.append([step[0] for step in play(envs, 12)])
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.usefixtures("threads")
def test_a_late_helper_thread_delays_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The only helper thread is busy until after the step; the results are as with one thread."""
    torch.set_num_threads(1)
    alone, together = make(4), make(4)
    alone.reset(seed=0)
    expected = alone.step(waits(4))[0]
    torch.set_num_threads(2)
    together.reset(seed=0)
    is_over, waited_for = threading.Event(), []
    result = Future.result

    def release(future: Future[Any], timeout: float | None = None) -> Any:
        waited_for.append(future)
        is_over.set()
        return result(future, timeout)

    late = _pool(1, os.getpid()).submit(is_over.wait)
    monkeypatch.setattr(Future, "result", release)
    observation = together.step(waits(4))[0]
    assert waited_for == []
    assert not late.done()
    is_over.set()
    np.testing.assert_array_equal(observation, expected)


@pytest.mark.parametrize("size", [5, 7, 9])
def test_odd_images_are_pooled_as_torch_does(size: int) -> None:
    """The odd last row and column is dropped, and its gradient is 0."""
    host = Host(in_channels=1, image_size=size, channels=(3, 4), num_classes=5)
    small = SmallPopulation(2, hosts=(host,))
    networks = small.plains()
    indices = small.draw(1)
    small.train(indices)
    for i, network in enumerate(networks):
        train_plain(network, small.images, indices[:, :, i])
        small.assert_equals(i, network)


class Doubled(Relu):
    """A layer without a kernel."""

    def forward(self, x, parameters, buffers, training):  # type: ignore[no-untyped-def]
        del parameters, buffers, training
        return x + x


@pytest.mark.parametrize("batch", [1, 7, 33, 40, 80])
def test_a_batch_in_chunks_trains_as_torch_does(batch: int) -> None:
    """Chunks have 16 or 32 images; one slot has a seed, so both kinds of norms are there."""
    small = SmallPopulation(2)
    small.plant(1, 0, "conv_heavy", "blending", Blend.GATE)
    indices = np.random.default_rng(0).integers(0, len(small.images), (2, batch, 2))
    networks = small.plains()
    small.train(indices)
    for i, network in enumerate(networks):
        train_plain(network, small.images, indices[:, :, i])
        small.assert_equals(i, network)


def test_members_with_a_layer_without_kernel_run_on_torch_and_the_others_do_not() -> None:
    """The results are those of the torch engine alone."""

    def build(c: int) -> Sequence[Layer]:
        return [Doubled(), Conv(c, c, 3), Norm(c), Relu(), Conv(c, c, 1, bias=True, zero=True)]

    host = Host(in_channels=1, image_size=8, channels=(4, 8), num_classes=5)
    blueprints = [*CNN_BLUEPRINTS, Blueprint("doubled", build)]
    small, twin = (SmallPopulation(2, hosts=(host,), blueprints=blueprints) for _ in range(2))
    for each in (small, twin):
        each.plant(0, 0, len(blueprints) - 1, "holding")
        each.plant(1, 0, CONV_LIGHT, "holding")
        each.awaken()
    compiled = small.population.compiled
    assert compiled is not None
    assert compiled.supports(small.members, small.seeds).tolist() == [False, True]
    twin.population.compiled = None
    for each in (small, twin):
        assert np.isfinite(each.train(each.draw(2)).loss).all()
        assert np.isfinite(each.evaluate(each.seeds.alpha).loss).all()
    torch.testing.assert_close(
        small.storage.parameters, twin.storage.parameters, atol=TOLERANCE, rtol=TOLERANCE
    )


def test_a_larger_kernel_runs_on_torch() -> None:
    host = Host(in_channels=1, image_size=8, channels=(4,), num_classes=5, kernel_size=5)
    small = SmallPopulation(2, hosts=(host,))
    assert small.population.compiled is not None
    assert not small.population.compiled.supports(small.members, small.seeds).any()


def test_a_block_may_begin_with_a_rectifier() -> None:
    """Its channels are those of the block before, whatever network was evaluated last."""

    def build(before: int, after: int) -> Sequence[Layer]:
        first = [Relu()] if before > 1 else []
        return [*first, Conv(before, after, 3), Norm(after)]

    host = Host(in_channels=1, image_size=8, channels=(8, 4), num_classes=5, build_block=build)
    small = SmallPopulation(hosts=(host,))
    small.plant(0, 0, 0, "holding")
    small.awaken()
    networks = [[0, 0], [1, 0]], [0, 0]
    result = small.evaluate(*networks)
    small.population.compiled = None
    expected = small.evaluate(*networks)
    assert result.loss[0] != result.loss[1]
    np.testing.assert_allclose(result.loss, expected.loss, atol=TOLERANCE)


def test_a_nan_weight_shows_in_the_loss() -> None:
    """The compiler may reorder sums, but not assume that numbers are finite."""
    small = SmallPopulation(2)
    small.storage.parameters[0, 0] = float("nan")
    report = small.train(small.draw(3))
    assert report.is_finite.tolist() == [False, True]
    for loss in (report.loss, small.evaluate(small.seeds.alpha).loss):
        assert np.isnan(loss[0])
        assert np.isfinite(loss[1])
