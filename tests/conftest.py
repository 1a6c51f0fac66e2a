"""Fixtures that several files share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from esper_env.population.interface import Seeds
from esper_env.population.numba_engine.engine import CompiledEngine


@pytest.fixture
def threads() -> Iterator[None]:
    """Let a test change how many threads torch may use."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["compiled", "torch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run every test with both engines: compiled kernels, and tensor operations."""
    if request.param == "torch":

        def supports_nothing(self: CompiledEngine, members: Any, seeds: Seeds) -> Any:
            del self, seeds
            return np.zeros(len(members), dtype=bool)

        monkeypatch.setattr(CompiledEngine, "supports", supports_nothing)
    return str(request.param)
