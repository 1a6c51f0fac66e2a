"""Fixtures that several files share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from esper_env.population.compiled import CompiledEngine
from esper_env.population.slots import Seeds


@pytest.fixture(params=["compiled", "torch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run every test with both engines: compiled kernels, and tensor operations."""
    if request.param == "torch":

        def supports_nothing(self: CompiledEngine, members: Any, seeds: Seeds) -> Any:
            del self, seeds
            return np.zeros(len(members), dtype=bool)

        monkeypatch.setattr(CompiledEngine, "supports", supports_nothing)
    return str(request.param)
