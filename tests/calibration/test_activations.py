"""Ranges: histograms that grow, and four ways to cut them."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.activations import BINS, METHODS, Histogram, Probe, float_tensors, observe
from tests.calibration.made import unet, views


def histogram(*parts: np.ndarray) -> Histogram:
    made = Histogram()
    for part in parts:
        made.add(part.astype(np.float32))
    return made


def test_a_histogram_grows_with_what_it_sees_and_forgets_nothing():
    rng = np.random.default_rng(0)
    parts = [rng.normal(scale=scale, size=5000) for scale in (0.01, 1, 300, 2)]
    grown = histogram(*parts)
    everything = np.concatenate(parts).astype(np.float32)
    assert grown.counts.sum() == everything.size
    assert (grown.low, grown.high) == (everything.min(), everything.max())
    expected, _ = np.histogram(np.abs(everything), BINS, (0, BINS * grown.width))
    assert np.abs(grown.counts - expected).sum() <= 2, "values on an edge between two bins"


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_has_no_limit_that_lets_it_pass(odd: float):
    seen = histogram(np.array([1.0, odd]), np.array([2.0]))
    assert seen.peak == np.inf
    assert seen.reach("minmax") == np.inf


def test_a_tensor_that_is_always_zero_has_an_empty_range():
    seen = histogram(np.zeros(10))
    assert (seen.peak, seen.span("mse")) == (0.0, (0.0, 0.0))


def test_minmax_keeps_all_and_the_percentile_all_but_a_ten_thousandth():
    values = np.abs(np.random.default_rng(1).normal(size=200_000))
    values[:5] = 40.0  # rare and bright: blood
    seen = histogram(values)
    assert seen.reach("minmax") == pytest.approx(40.0)
    assert seen.reach("percentile") == pytest.approx(np.percentile(values, 99.99), abs=seen.width)


def test_least_squares_finds_the_reach_that_brute_force_finds():
    values = np.random.default_rng(2).laplace(size=100_000).astype(np.float32)
    seen = histogram(values)

    def error(reach: float) -> float:
        step = reach / 127
        return float(((np.clip(np.round(values / step), -127, 127) * step - values) ** 2).mean())

    best = min(np.linspace(0.2, 1, 81) * seen.peak, key=error)
    assert error(seen.reach("mse")) <= 1.02 * error(best)
    assert seen.reach("mse") < seen.peak


def test_entropy_cuts_off_what_is_rare_which_is_why_it_may_not_be_trusted_with_blood():
    values = np.concatenate([np.abs(np.random.default_rng(3).normal(size=500_000)), np.full(50, 60.0)])
    seen = histogram(values)
    assert seen.reach("entropy") < 20 < seen.reach("minmax")


def test_a_range_holds_zero_and_no_more_than_was_there():
    assert histogram(np.array([2.0, 5.0])).span("minmax") == (0.0, 5.0)
    assert histogram(np.array([-3.0, -1.0])).span("minmax") == (-3.0, 0.0)
    low, high = histogram(np.array([-1.0, 8.0])).span("minmax")
    assert (low, high) == (-1.0, 8.0)


def test_a_probe_reads_what_the_network_computes():
    model = unet()
    names = float_tensors(model)
    assert "gate" in names
    assert "first.w" not in names
    seen = observe(model, names, views())
    assert set(seen) == set(names)
    assert 0 <= seen["gate"].low <= seen["gate"].high <= 1
    assert seen["skip"].low == 0
    values = Probe(model, ["skip", "pooled"]).read(views()[0])
    assert values["pooled"].max() == values["skip"].max()
    assert set(METHODS) == {"minmax", "percentile", "mse", "entropy"}
