"""ICC, Bland-Altman and ANOVA against published tables and scipy; the bootstrap against what it must keep."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from scipy import stats

from training import metrics, statistics

patient = settings(deadline=None, max_examples=50)
tables = arrays.arrays(float, st.tuples(st.integers(3, 12), st.integers(2, 4)), elements=st.integers(0, 200).map(float))

# Shrout & Fleiss 1979, table 2: six subjects, four judges
JUDGES = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]

# Bland & Altman, Lancet 327:307 (1986), table 1: peak flow in l/min of 17 people, large and mini meter
LARGE = [494, 395, 516, 434, 476, 557, 413, 442, 650, 433, 417, 656, 267, 478, 178, 423, 427]
MINI = [512, 430, 520, 428, 500, 600, 364, 380, 658, 445, 432, 626, 260, 477, 259, 350, 451]


def test_volume_errors_in_ml_and_per_cent():
    measured, true = np.array([12.0, 0.5, 9.0]), np.array([10.0, 0.0, 10.0])
    assert statistics.volume_error_ml(measured, true) == pytest.approx([2, 0.5, -1])
    assert statistics.volume_error_percent(measured, true) == pytest.approx([20, np.nan, -10], nan_ok=True)
    assert statistics.volume_error_percent([5, 20], 10) == pytest.approx([-50, 100])


def test_icc_is_that_of_shrout_and_fleiss():
    """ICC(2,1) .29 and ICC(3,1) .71 from the paper; the limits are those that R's psych::ICC prints for its table."""
    found = statistics.icc(JUDGES)
    assert found.agreement.estimate == pytest.approx(0.29, abs=0.005)
    assert found.consistency.estimate == pytest.approx(0.71, abs=0.005)
    assert (found.agreement.low, found.agreement.high) == pytest.approx((0.019, 0.761), abs=0.001)
    assert (found.consistency.low, found.consistency.high) == pytest.approx((0.342, 0.946), abs=0.001)


def icc_from_sums(table: NDArray[np.float64]) -> tuple[float, float]:
    """Both from the mean squares of an analysis of variance written out in sums."""
    n, k = table.shape
    correction = table.sum() ** 2 / (n * k)
    rows = (table.sum(axis=1) ** 2).sum() / k - correction
    columns = (table.sum(axis=0) ** 2).sum() / n - correction
    rest = (table**2).sum() - correction - rows - columns
    bms, jms, ems = rows / (n - 1), columns / (k - 1), rest / ((n - 1) * (k - 1))
    return (bms - ems) / (bms + (k - 1) * ems + k * (jms - ems) / n), (bms - ems) / (bms + (k - 1) * ems)


@patient
@given(tables, st.floats(0.1, 10), st.floats(-50, 50), st.randoms())
def test_icc_keeps_its_invariants(table: NDArray[np.float64], factor: float, offset: float, random):
    found = statistics.icc(table)
    assume(not math.isnan(found.agreement.estimate) and np.ptp(table.mean(axis=1)) > 0)
    assert (found.agreement.estimate, found.consistency.estimate) == pytest.approx(icc_from_sums(table), abs=1e-6)
    order = list(range(len(table)))
    random.shuffle(order)
    again = statistics.icc(factor * table[order] + offset)
    assert again.agreement.estimate == pytest.approx(found.agreement.estimate, abs=1e-6)
    assert again.consistency.estimate == pytest.approx(found.consistency.estimate, abs=1e-6)
    shifted = statistics.icc(table + offset * np.arange(table.shape[1]))
    assert shifted.consistency.estimate == pytest.approx(found.consistency.estimate, abs=1e-6)
    for one in (found.agreement, found.consistency):
        assert one.estimate <= 1 + 1e-9
        assert one.low - 1e-9 <= one.estimate <= one.high + 1e-9


def test_a_negative_icc_lies_between_its_limits():
    """A table whose weights in Satterthwaite's formula would be negative, and its degrees of freedom next to none."""
    found = statistics.icc([[118, 51, 107, 48], [1, 146, 156, 45]]).agreement
    assert found.low < found.estimate < 0 < found.high


def test_only_the_agreement_minds_a_constant_error():
    true = np.array([5.0, 12.0, 30.0, 44.0, 61.0])
    found = statistics.icc(np.column_stack([true + 20, true]))
    assert found.consistency.estimate == pytest.approx(1)
    assert found.agreement.estimate < 0.8
    perfect = statistics.icc(np.column_stack([true, true]))
    assert perfect.agreement == statistics.Interval(1, 1, 1)
    assert perfect.consistency == statistics.Interval(1, 1, 1)


def test_icc_has_no_value_without_variance():
    constant = statistics.icc(np.full((7, 3), 0.1))
    assert math.isnan(constant.agreement.estimate)
    assert math.isnan(constant.consistency.estimate)
    same_patients = statistics.icc([[1.1, 2.3]] * 9)
    assert same_patients.agreement.estimate == 0
    assert math.isnan(same_patients.consistency.estimate)
    assert math.isnan(statistics.icc([[0, 1], [1, 0]]).agreement.estimate)
    for table in ([[1, 2]], [[1], [2]], [1, 2, 3], [[1, 2], [3, np.nan]]):
        with pytest.raises(ValueError, match="finite ratings"):
            statistics.icc(table)


def test_bland_altman_is_that_of_bland_and_altman():
    """Bias -2.1 (-22.0 to 17.8) l/min, standard deviation 38.8; they rounded 1.96 to 2 in the limits."""
    found = statistics.bland_altman(LARGE, MINI)
    assert (found.bias.estimate, found.bias.low, found.bias.high) == pytest.approx((-2.1, -22.0, 17.8), abs=0.05)
    assert found.lower.estimate == pytest.approx(-2.12 - 1.96 * 38.77, abs=0.05)
    assert found.upper.estimate == pytest.approx(-2.12 + 1.96 * 38.77, abs=0.05)
    assert (found.lower.low, found.lower.high) == pytest.approx((-114.3, -45.1), abs=2)
    assert (found.upper.low, found.upper.high) == pytest.approx((40.9, 110.1), abs=2)
    assert found.difference[0] == -18
    assert found.mean[0] == 503
    with pytest.raises(ValueError, match="same two or more patients"):
        statistics.bland_altman([1, 2, 3], [1, 2])


def test_the_limits_of_agreement_lie_in_their_intervals_as_often_as_they_should():
    """True limits of normal differences, 0 +- 1.96, over 2,000 samples of 30: about 95 % covered."""
    rng = np.random.default_rng(5)
    samples = rng.normal(size=(2000, 30))
    found = [statistics.bland_altman(sample, np.zeros(30)).upper for sample in samples]
    covered = np.mean([one.low <= stats.norm.ppf(0.975) <= one.high for one in found])
    assert covered == pytest.approx(0.95, abs=0.02)


@patient
@given(st.lists(st.tuples(st.floats(0, 150), st.floats(0, 150)), min_size=2, max_size=30), st.floats(0.1, 10))
def test_bland_altman_scales_and_turns_round(pairs: list[tuple[float, float]], factor: float):
    first, second = np.array(pairs).T
    found, back = statistics.bland_altman(first, second), statistics.bland_altman(second, first)
    assert back.upper.estimate == pytest.approx(-found.lower.estimate)
    assert back.upper.high == pytest.approx(-found.lower.low)
    scaled = statistics.bland_altman(factor * first, factor * second)
    assert scaled.upper.low == pytest.approx(factor * found.upper.low, abs=1e-6)


def test_anova_is_scipys():
    rng = np.random.default_rng(6)
    groups = [rng.normal(mean, 1 + mean, size) for mean, size in ((0, 12), (0.4, 20), (1, 7))]
    found = statistics.anova(*zip(*[(g.mean(), g.std(ddof=1), len(g)) for g in groups], strict=True))
    reference = stats.f_oneway(*groups)
    assert (found.f, found.p) == pytest.approx((reference.statistic, reference.pvalue))
    assert (found.between, found.within) == (2, 36)
    for means, deviations, sizes in (([1], [1], [5]), ([1, 2], [0, 0], [5, 5]), ([1, 2], [1, 1], [5, 1])):
        with pytest.raises(ValueError, match="two or more groups"):
            statistics.anova(means, deviations, sizes)


def test_the_p_of_paper_003_needs_batches_not_slices():
    table = [0.8361, 0.8281, 0.8359], [0.156, 0.1727, 0.131]
    assert statistics.anova(*table, [63] * 3).p == pytest.approx(0.9455, abs=0.0015)  # 497 slices in eights
    assert statistics.anova(*table, [497] * 3).p < 0.65


def test_slices_are_grouped_by_patient():
    assert statistics.by_patient([1, 2, 3, 4], ["b", "a", "b", "a"]) == [[1, 3], [2, 4]]
    with pytest.raises(ValueError):
        statistics.by_patient([1, 2], ["a"])


def test_the_bootstrap_is_seeded_and_close_to_scipys():
    dice = np.random.default_rng(7).beta(8, 2, 60).tolist()
    found = statistics.bootstrap(dice, np.mean, seed=1)
    assert found == statistics.bootstrap(dice, np.mean, seed=1)
    assert found != statistics.bootstrap(dice, np.mean, seed=2)
    reference = stats.bootstrap((dice,), np.mean, n_resamples=5000, method="percentile", rng=3).confidence_interval
    assert found.estimate == np.mean(dice)
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=0.004)


def test_resampling_patients_is_honest_where_resampling_slices_is_not():
    """Twelve heads of forty slices that resemble each other: the honest interval is several times as wide."""
    rng = np.random.default_rng(8)
    slices = np.clip(rng.normal(0.8, 0.1, (12, 1)) + rng.normal(0, 0.01, (12, 40)), 0, 1)
    heads = statistics.by_patient(slices.ravel(), np.repeat(np.arange(12), 40))

    def width(one: statistics.Interval) -> float:
        return one.high - one.low

    honest = statistics.bootstrap(heads, np.mean, seed=1, resamples=500)
    naive = statistics.bootstrap(slices.ravel().tolist(), np.mean, seed=1, resamples=500)
    assert honest.estimate == pytest.approx(naive.estimate)
    assert width(honest) > 4 * width(naive)


def test_the_bootstrap_takes_counts_and_leaves_out_what_has_no_value():
    some = metrics.Counts(*(np.array([0, n]) for n in (5, 1, 2, 0)))
    none = metrics.Counts(*(np.array([0, 0]) for _ in range(4)))
    found = statistics.bootstrap(
        [some, none, none], lambda heads: metrics.global_macro(heads, metrics.dice), seed=1, resamples=400
    )
    assert (found.estimate, found.low, found.high) == pytest.approx((10 / 13,) * 3)
    assert found.undefined == pytest.approx(400 * (2 / 3) ** 3, rel=0.25)
    nowhere = statistics.bootstrap([none, none], lambda heads: metrics.global_macro(heads, metrics.dice), seed=1)
    assert math.isnan(nowhere.low)
    assert nowhere.undefined == 2000


def test_a_paired_difference_sees_what_two_intervals_hide():
    rng = np.random.default_rng(9)
    hard = rng.uniform(0.3, 0.9, 40)
    first, second = hard.tolist(), (hard + 0.02 + rng.normal(0, 0.01, 40)).tolist()
    paired = statistics.paired_difference(first, second, np.mean, seed=1)
    assert paired.estimate == pytest.approx(np.mean(second) - np.mean(first))
    assert 0 < paired.low < 0.02 < paired.high
    alone = [statistics.bootstrap(scores, np.mean, seed=1) for scores in (first, second)]
    assert alone[0].high > alone[1].low  # side by side they overlap
    turned = statistics.paired_difference(second, first, np.mean, seed=1)
    assert (turned.low, turned.high) == pytest.approx((-paired.high, -paired.low))
    for one, other in (([1.0], [1.0]), ([1.0, 2.0], [1.0, 2.0, 3.0])):
        with pytest.raises(ValueError, match="same two or more patients"):
            statistics.paired_difference(one, other, np.mean, seed=1)


@patient
@given(st.lists(st.floats(0, 1), min_size=2, max_size=20), st.randoms())
def test_the_estimate_does_not_know_the_order_of_patients(scores: list[float], random):
    found = statistics.bootstrap(scores, np.mean, seed=1, resamples=50)
    random.shuffle(scores)
    again = statistics.bootstrap(scores, np.mean, seed=1, resamples=50)
    assert again.estimate == pytest.approx(found.estimate)
    assert min(scores) - 1e-9 <= found.low <= found.high <= max(scores) + 1e-9
