"""The torch engine: what it alone promises; that it equals plain networks: test_population."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.plain import PlainNetwork
from esper_env.config import Blend
from esper_env.population.blueprints import CNN_BLUEPRINTS, Blueprint
from esper_env.population.interface import Exam, SGDSettings
from esper_env.population.layers import Conv, Layer, Norm, Relu, TensorSpec
from esper_env.population.layout import Column
from esper_env.population.torch_engine.sgd import ModuleSGD, Piece
from tests.builders import SMALL, SmallPopulation, make, train_plain

# A bfloat16 has 8 bits, a relative rounding of 0.004 per operation; the whole change of the weights
# over three batches was within 0.13 of that of float32.
BFLOAT16_TOLERANCE = 0.2

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}
"""Operations whose result, or the shape of it, the host must know."""


class Waits(TorchDispatchMode):
    """Counts the operations for which the host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        del types
        name = func.__name__.split(".")[0]
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(i is not None and i.dtype == torch.bool for i in indices)
        if name in WAITS or by_mask:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count waits; on a CPU, copies to the host are seen as calls of `Tensor.cpu`."""
    mode, cpu = Waits(), torch.Tensor.cpu

    def counted(self: torch.Tensor) -> torch.Tensor:
        mode.counts["cpu"] += 1
        return cpu(self)

    with monkeypatch.context() as patch, mode:
        patch.setattr(torch.Tensor, "cpu", counted)
        yield mode.counts


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("chunk_size", [3, 7])
def test_the_host_asks_for_results_once_in_training_and_once_in_evaluation(
    chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blueprints, blends and stages, and a frozen seed, without compiled kernels."""
    small = SmallPopulation(7, chunk_size=chunk_size)
    for member in range(7):
        for slot, stage in enumerate(("training", "half")):
            small.plant(member, slot, (member + 3 * slot) % 7, stage, (member + slot) % 3)
    small.seeds.is_frozen[0, 1] = True
    indices = small.draw(0)
    with counted_waits(monkeypatch) as training:
        small.train(indices)
    with counted_waits(monkeypatch) as evaluation:
        small.evaluate(small.seeds.alpha)
    exam = Exam(*np.repeat([[[3, 1, 0]], [[2, 4, -1]]], 7, axis=1))
    with counted_waits(monkeypatch) as examination:
        small.evaluate(small.seeds.alpha, exam=exam)
    assert training == evaluation == examination == {"cpu": 1}


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.cpu(),
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.__setitem__(x > 0, torch.ones(3)),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
    ],
)
def test_every_kind_of_wait_is_counted(wait: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with counted_waits(monkeypatch) as counts:
        wait(torch.arange(4.0))
    assert sum(counts.values()) == 1


def test_a_tiny_gradient_is_not_clipped() -> None:
    """The norm 1e-7 is below the constant 1e-6 that `clip_grad_norm_` adds to it."""
    piece = Piece(np.array([0]), Column(TensorSpec("weight", (1,)), 0))
    sgd = ModuleSGD([piece], np.zeros((1, 1), dtype=bool), SGDSettings(), torch.device("cpu"))
    weight, gradient, momentum = torch.zeros(1), torch.full((1,), 1e-7), torch.zeros(1)
    rates = sgd.spread_rates(np.array([[0.5]]))
    squares, of_modules = sgd.step(weight, gradient, momentum, rates)
    assert weight.item() == pytest.approx(-0.5e-7)
    assert squares.item() == of_modules.item() == pytest.approx(1e-14)


# ------------------------------------------------------------------ bfloat16


def flat_weights(network: PlainNetwork) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@pytest.mark.parametrize("stage", ["training", "half"])
@pytest.mark.parametrize("blend", list(Blend))
def test_bfloat16_trains_like_plain_networks(blend: Blend, stage: str) -> None:
    """The change of all weights over three batches, every blueprint in either slot."""
    small = SmallPopulation(2 * len(CNN_BLUEPRINTS), precision="bfloat16")
    for member in small.members.tolist():
        small.plant(member, member % 2, member // 2, stage, blend)
    small.awaken()
    networks = small.plains()
    before = [flat_weights(network) for network in networks]
    indices = small.draw(1)
    report = small.train(indices)
    assert all(matrix.dtype == torch.float32 for matrix in small.storage.matrices.values())
    for i, network in enumerate(networks):
        loss = train_plain(network, small.images, indices[:, :, i])
        assert report.loss[i] == pytest.approx(loss, rel=BFLOAT16_TOLERANCE)
        expected = flat_weights(network) - before[i]
        actual = flat_weights(small.plain(i)) - before[i]
        assert 0 < (actual - expected).norm() < BFLOAT16_TOLERANCE * expected.norm()


def test_bfloat16_keeps_steps_that_are_too_small_for_it() -> None:
    """Weights are float32: at a rate of 1e-5 hardly a bfloat16 weight would move."""
    small = SmallPopulation(precision="bfloat16")
    before = small.storage.parameters.clone()
    small.train(small.draw(2), rate=1e-5)
    after = small.storage.parameters
    has_moved = (after != before) & (before.abs() > 1e-3)
    is_visible = after.bfloat16() != before.bfloat16()
    assert has_moved.sum() > 100
    assert (has_moved & is_visible).sum() < 0.1 * has_moved.sum()


class Single(Relu):
    """A layer of a third party that puts out float32 whatever it is given."""

    def forward(self, x, parameters, buffers, training):  # type: ignore[no-untyped-def]
        return super().forward(x, parameters, buffers, training).float()


@pytest.mark.parametrize("blend", list(Blend))
def test_a_branch_that_puts_out_float32_can_be_mixed_in(blend: Blend) -> None:
    def build(c: int) -> Sequence[Layer]:
        return [Conv(c, c, 1, bias=True, zero=True), Single()]

    small = SmallPopulation(blueprints=[Blueprint("single", build)], precision="bfloat16")
    small.plant(0, 0, 0, "half", blend)
    small.awaken()
    assert np.isfinite(small.train(small.draw(3)).loss).all()
    assert np.isfinite(small.evaluate(small.seeds.alpha).loss).all()


class Doubled(Conv):
    """A convolution whose output is doubled."""

    def forward(self, x, parameters, buffers, training):  # type: ignore[no-untyped-def]
        return 2 * super().forward(x, parameters, buffers, training)


class Double(Relu):
    """The doubling alone."""

    def forward(self, x, parameters, buffers, training):  # type: ignore[no-untyped-def]
        return 2 * x


def test_a_norm_after_a_subclass_of_a_convolution_is_not_folded_into_it() -> None:
    losses = []
    for first in ([Doubled(3, 3, 3)], [Conv(3, 3, 3), Double()]):
        layers = [*first, Norm(3)]
        small = SmallPopulation(blueprints=[Blueprint("double", lambda c, own=layers: own)])
        small.plant(0, 0, 0, "half", Blend.ADD)
        losses.append(small.evaluate(small.seeds.alpha).loss)
    np.testing.assert_array_equal(*losses)


def test_episodes_in_bfloat16_take_the_same_course() -> None:
    """The same actions are legal and lead to the same stages; accuracies differ by rounding."""
    plain, rounded = (make(4, precision=p, episode_steps=20) for p in ("float32", "bfloat16"))
    plain.reset(seed=3)
    rounded.reset(seed=3)
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(20):
        actions = plain.sample_valid_actions(rng)
        (*_, expected), (*_, actual) = plain.step(actions), rounded.step(actions)
        for name in ("action_mask", "action_valid", "stage", "blueprint", "parameters", "flops"):
            np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)
        np.testing.assert_allclose(actual["loss"], expected["loss"], rtol=0.1)
        losses.append((actual["loss"], expected["loss"]))
    assert (np.array(losses)[:, 0] != np.array(losses)[:, 1]).all()
    assert expected["blueprint"].max() >= 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_trains_as_a_cpu_does() -> None:
    """Tensors of several seeds lie one behind the other, whatever alignment a library requires."""
    on_cpu, on_gpu = (make(4, instances="train", device=device) for device in ("cpu", "cuda"))
    for envs in (on_cpu, on_gpu):
        envs.reset(seed=3)
    rng = np.random.default_rng(0)
    for _ in range(SMALL["episode_steps"]):
        actions = on_cpu.sample_valid_actions(rng)
        expected, actual = on_cpu.step(actions), on_gpu.step(actions)
        np.testing.assert_allclose(actual[4]["loss"], expected[4]["loss"], rtol=0.01)
