"""What is measured of the gradients of seeds: norm, severities and health."""

from __future__ import annotations

import copy

import numpy as np
import numpy.typing as npt
import pytest

from esper_env.config import EnvConfig
from esper_env.growth.gradient_health import record_gradients
from esper_env.growth.state import Measurements

EXACT = 1e-12
"""Tolerance of float64 formulas that differ only in the order of a few operations."""


def record(norms: npt.NDArray[np.float64], config: EnvConfig) -> Measurements:
    """Record gradients of all members into fresh measurements."""
    measured = Measurements.empty(*norms.shape[:2])
    record_gradients(measured, np.arange(len(norms)), norms, np.zeros(len(norms)), config)
    return measured


@pytest.mark.parametrize(
    ("norms", "vanishing", "exploding", "health"),
    [
        ([1.0, 1.0, 1.0], 0.0, 0.0, 1.0),
        ([1e-6, 1e3, 1.0], 0.0, 0.0, 1.0),
        ([1e-7, 1.0, np.nan], 0.25, 0.0, 0.75),
        ([0.0, 1.0, 1.0], 1 / 3, 0.0, 2 / 3),
        ([0.0, 0.0, np.nan], 1.0, 0.0, 0.0),
        ([1e4, 1e3, 1.0], 0.0, 0.5, 0.5),
        ([1e-7, 1e4, np.nan], 0.25, 0.5, 0.375),
        ([np.inf, 1.0, np.nan], 0.0, 1.0, 0.0),
        ([np.nan, np.nan, np.nan], 0.0, 0.0, 0.0),
    ],
)
@pytest.mark.parametrize("clip_norm", [1.0, 10.0])
def test_gradient_health_by_hand(
    norms: list[float], vanishing: float, exploding: float, health: float, clip_norm: float
) -> None:
    """Thresholds 1e-6 and 1e3 clip norms, each severity reaching 1 two decades beyond.

    1e-7 lies one decade below: severity 1/2, of two tensors a mean of 1/4. 1e4 lies one decade
    above: 1/2, and the largest counts. Health is (1 - mean vanishing) * (1 - largest exploding).
    A tensor that does not exist (NaN) is left out of the mean; with none at all health is 0.
    """
    measured = record(clip_norm * np.array([[norms]]), EnvConfig(clip_norm=clip_norm))
    got = measured.vanishing[0, 0], measured.exploding[0, 0], measured.health[0, 0]
    np.testing.assert_allclose(got, [vanishing, exploding, health], rtol=0, atol=EXACT)
    assert measured.has_gradient[0, 0] == (not np.isnan(norms).all())


def test_gradient_health_judges_each_slot_alone() -> None:
    norms = np.array([[[1.0, 1.0], [0.0, np.nan]], [[np.nan, np.nan], [np.inf, 0.0]]])
    measured = record(norms, EnvConfig())
    assert measured.exploding.tolist() == [[0.0, 0.0], [0.0, 1.0]]
    assert measured.health.tolist() == [[1.0, 0.0], [0.0, 0.0]]


@pytest.mark.filterwarnings("error")
def test_a_vanishing_threshold_of_0_leaves_every_severity_finite() -> None:
    """The configuration admits 0, which no norm is below: a norm of 0 is then not vanishing.

    Finding SYN-C2 (finite for every value that validation admits, zero thresholds included).
    """
    config = EnvConfig(vanishing_gradient_norm=0.0)
    measured = record(np.array([[[0.0, 1.0]]]), config)
    assert all(np.isfinite(array).all() for array in measured)


def test_the_norm_of_a_seed_is_that_of_all_its_tensors_and_finite() -> None:
    """sqrt(3^2 + 4^2) = 5; an infinite norm is written as 1e9; without a tensor it is 0."""
    nan = np.nan
    measured = record(np.array([[[3.0, 4.0], [np.inf, nan], [nan, nan]]]), EnvConfig())
    np.testing.assert_allclose(measured.gradient_norm[0], [5.0, 1e9, 0.0], rtol=EXACT)
    assert measured.has_gradient.tolist() == [[True, True, False]]


def test_members_that_were_not_trained_keep_their_measurements() -> None:
    measured = record(np.array([[[1.0]], [[2.0]], [[3.0]]]), EnvConfig())
    before = copy.deepcopy(measured)
    norms = np.array([[[5.0]], [[7.0]]])
    record_gradients(measured, np.array([2, 0]), norms, np.zeros(2), EnvConfig())
    assert measured.gradient_norm[:, 0].tolist() == [7.0, 2.0, 5.0]
    assert measured.has_contribution.tolist() == before.has_contribution.tolist()
