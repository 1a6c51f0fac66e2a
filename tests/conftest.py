"""Fixtures that several files share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from esper_env.growth import simulation
from esper_env.population.images import ImageSet
from esper_env.population.numba_engine import engine as engine_module
from esper_env.tasks import Splits

NUM_IMAGES = 12
"""Validation and test images of a cheap evaluation."""


@pytest.fixture
def threads() -> Iterator[None]:
    """Let a test change how many threads torch may use."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run everything with tensor operations."""
    monkeypatch.setattr(engine_module, "is_supported", lambda layers: not layers)


@pytest.fixture(params=["compiled", "torch"])
def engine(request: pytest.FixtureRequest) -> str:
    """Run every test with both engines: compiled kernels, and tensor operations."""
    if request.param == "torch":
        request.getfixturevalue("no_kernels")
    return str(request.param)


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut validation and test split down to what a cheap evaluation needs."""
    load_splits = simulation.load_splits

    def cut(images: ImageSet) -> ImageSet:
        # One image of each class, because regimes need all classes, then others.
        labels = images.labels.tolist()
        first = [labels.index(c) for c in range(10)]
        chosen = [*first, *(i for i in range(len(labels)) if i not in first)][:NUM_IMAGES]
        return dataclasses.replace(
            images, images=images.images[chosen], labels=images.labels[chosen]
        )

    def load_few(*args: Any) -> Splits:
        splits = load_splits(*args)
        return dataclasses.replace(splits, validation=cut(splits.validation), test=cut(splits.test))

    monkeypatch.setattr(simulation, "load_splits", load_few)
