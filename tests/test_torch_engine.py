"""The torch engine: what it alone promises; that it equals plain networks: test_population."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from esper_env.population.population import Population
from esper_env.population.slots import Seeds
from tests.test_population import (
    draw,
    make_images,
    make_population,
    make_seeds,
    plant,
    set_stage,
    shown,
)

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


def make_mix(num_members: int, chunk_size: int | None) -> tuple[Population, Seeds]:
    """All blueprints, blends and stages, and a frozen seed, without compiled kernels."""
    population, seeds = make_population(num_members, chunk_size), make_seeds(num_members)
    population._compiled = None
    for member in range(num_members):
        for slot, stage in enumerate(("training", "half")):
            seeds.blend[member, slot] = (member + slot) % 3
            plant(population, seeds, member, slot, (member + 3 * slot) % 7)
            set_stage(seeds, member, slot, stage)
    seeds.is_frozen[0, 1] = True
    return population, seeds


@pytest.mark.parametrize("chunk_size", [3, 7])
def test_the_host_asks_for_results_once_in_training_and_once_in_evaluation(
    chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, m = make_images(), 7
    population, seeds = make_mix(m, chunk_size)
    members, rates = np.arange(m), np.full(m, 0.05)
    batches = shown(images, draw(np.random.default_rng(0), images, m))
    with counted_waits(monkeypatch) as training:
        population.train(members, seeds, images, batches, rates, rates)
    with counted_waits(monkeypatch) as evaluation:
        population.evaluate(members, seeds.alpha, seeds, images)
    assert training == {"cpu": 1}
    assert evaluation == {"cpu": 1}


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
