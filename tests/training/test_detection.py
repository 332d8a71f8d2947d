"""Lesions found and invented, and the calibration of probabilities, against counting by hand and by scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from scipy import ndimage, stats

from training import detection

patient = settings(deadline=None, max_examples=50)
volumes = arrays.arrays(bool, st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7)))


def head() -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.float64]]:
    """Predicted, truth, voxel volumes: a large lesion half found, a small one missed, a false speck of two voxels."""
    truth, predicted = np.zeros((2, 3, 20, 20), bool)
    truth[0:2, 2:6, 2:7] = True  # 40 voxels, 20 in each of two slices of 0.1 and 0.2 ml: 6 ml
    predicted[0, 2:6, 2:7] = True  # 2 ml of it
    truth[2, 15, 15] = True  # 0.4 ml
    predicted[1, 0, 18:20] = True  # 0.4 ml, false
    return predicted, truth, np.array([0.1, 0.2, 0.4])


def test_lesions_are_weighed_by_their_own_slices():
    matches = detection.match_lesions(*head())
    assert sorted((m.volume_ml, m.covered) for m in matches) == [
        (pytest.approx(0.4), 0),
        (pytest.approx(6), pytest.approx(1 / 3)),
    ]


def test_sensitivity_by_size():
    matches = [detection.Match(ml, covered) for ml, covered in ((0.4, 0), (0.5, 0.9), (1, 0.1), (6, 1 / 3), (40, 1))]
    strata = detection.stratify(matches, (0, 1, 10, math.inf))
    assert [(s.lesions, s.found) for s in strata] == [(2, 1), (2, 2), (1, 1)]  # 1 ml is of the second
    assert [s.sensitivity for s in strata] == [0.5, 1, 1]
    half = detection.stratify(matches, (0, 1, 10, math.inf), least_covered=0.5)
    assert [s.found for s in half] == [1, 0, 1]
    assert math.isnan(detection.stratify([], (0, 1))[0].sensitivity)
    for edges in ((1,), (0, 0), (3, 2)):
        with pytest.raises(ValueError, match="increasing edges"):
            detection.stratify(matches, edges)


def test_false_parts_touch_no_blood():
    predicted, truth, voxel_ml = head()
    assert detection.count_false_parts(predicted, truth, voxel_ml) == 1
    assert detection.count_false_parts(predicted, truth, voxel_ml, least_ml=0.39) == 1
    assert detection.count_false_parts(predicted, truth, voxel_ml, least_ml=0.41) == 0
    clean = np.zeros_like(truth)
    assert detection.count_false_parts(predicted, clean, voxel_ml) == 2  # without blood, every part is false
    assert detection.count_false_parts(clean, clean, voxel_ml) == 0


@patient
@example(np.array([[[True, False, True]]]), 0)
@given(volumes, st.integers(0, 2**32 - 1))
def test_parts_are_scipys(truth: NDArray[np.bool_], seed: int):
    rng = np.random.default_rng(seed)
    voxel_ml, predicted = rng.uniform(0.1, 1, len(truth)), rng.uniform(size=truth.shape) < 0.3
    labels, count = ndimage.label(truth, np.ones((3, 3, 3)))
    weights = np.broadcast_to(voxel_ml[:, None, None], truth.shape)
    expected = [(weights[labels == i].sum(), (weights * predicted)[labels == i].sum()) for i in range(1, count + 1)]
    found = sorted((m.volume_ml, m.volume_ml * m.covered) for m in detection.match_lesions(predicted, truth, voxel_ml))
    assert np.array(found).ravel() == pytest.approx(np.array(sorted(expected)).ravel())
    missed = sum(m.covered == 0 for m in detection.match_lesions(predicted, truth, voxel_ml))
    assert detection.count_false_parts(truth, predicted, voxel_ml) == missed  # the same, the other way round


def test_false_positives_per_head_have_exact_limits():
    """Garwood's limits: P(X >= k) at the lower and P(X <= k) at the upper are 2.5 % each."""
    found = detection.false_positive_rate([0, 2, 0, 1, 0])
    assert found.estimate == pytest.approx(0.6)
    assert stats.poisson.sf(2, 5 * found.low) == pytest.approx(0.025)
    assert stats.poisson.cdf(3, 5 * found.high) == pytest.approx(0.025)
    quiet = detection.false_positive_rate([0] * 60)
    assert (quiet.estimate, quiet.low) == (0, 0)
    assert quiet.high == pytest.approx(-math.log(0.025) / 60)
    with pytest.raises(ValueError, match="no bleed-free head"):
        detection.false_positive_rate([])


def test_reliability_counted_by_hand():
    probability = np.array([0.05, 0.1, 0.15, 0.92, 1.0])
    outcome = np.array([False, False, True, True, False])
    found = detection.bin_probabilities(probability, outcome)
    assert found.count.tolist() == [1, 2, 0, 0, 0, 0, 0, 0, 0, 2]
    assert found.confidence[[0, 1, 9]] == pytest.approx([0.05, 0.125, 0.96])
    assert found.frequency[[0, 1, 9]] == pytest.approx([0, 0.5, 0.5])
    assert np.isnan(found.confidence[5])
    assert found.expected_error == pytest.approx((1 * 0.05 + 2 * 0.375 + 2 * 0.46) / 5)
    assert found.edges == pytest.approx(np.arange(11) / 10)


@patient
@given(arrays.arrays(np.float32, st.integers(1, 60), elements=st.floats(0, 1, width=32)), st.integers(1, 15))
def test_reliability_is_a_histogram_and_additive(probability: NDArray[np.float32], bins: int):
    outcome = np.random.default_rng(len(probability)).uniform(size=len(probability)) < probability
    whole = detection.bin_probabilities(probability, outcome, bins=bins)
    assert whole.count.tolist() == np.histogram(probability.astype(float), bins, (0, 1))[0].tolist()
    assert whole.outcome_sum.sum() == outcome.sum()
    assert 0 <= whole.expected_error <= 1
    cut = len(probability) // 2
    parts = [detection.bin_probabilities(probability[s], outcome[s], bins=bins) for s in np.s_[:cut, cut:]]
    both = parts[0] + parts[1]
    assert both.count.tolist() == whole.count.tolist()
    assert both.expected_error == pytest.approx(whole.expected_error)


def test_true_probabilities_have_no_calibration_error_and_certain_ones_do():
    rng = np.random.default_rng(10)
    probability = rng.uniform(size=(500, 400))
    outcome = rng.uniform(size=probability.shape) < probability
    assert detection.bin_probabilities(probability, outcome).expected_error < 0.01
    certain = detection.bin_probabilities((probability > 0.5).astype(float), outcome)
    assert certain.expected_error == pytest.approx(0.25, abs=0.01)
    assert math.isnan(detection.bin_probabilities(probability[:0], outcome[:0]).expected_error)


def test_what_is_no_probability_is_refused():
    for wrong in ([1.2], [-0.1], [np.nan]):
        with pytest.raises(ValueError, match="between 0 and 1"):
            detection.bin_probabilities(np.array(wrong), np.array([True]))
    with pytest.raises(ValueError, match="differ in shape"):
        detection.bin_probabilities(np.zeros(3), np.zeros(2, bool))
