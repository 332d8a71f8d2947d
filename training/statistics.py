"""Agreement of volumes, differences between models, and how sure of them one may be.

The papers are numbered as in docs/metrics.md.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from numpy.typing import ArrayLike, NDArray

T = TypeVar("T")

LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its confidence interval.

    Attributes
    ----------
    estimate, low, high : in the unit of what was estimated
    undefined : bootstrap resamples that had no value and were left out

    """

    estimate: float
    low: float
    high: float
    undefined: int = 0


def volume_error_ml(measured_ml: ArrayLike, true_ml: ArrayLike) -> NDArray[np.float64]:
    """Measured minus true volume in ml, both as in paper 004, equation 1 (`runtime.volume.volumes_ml`)."""
    return np.asarray(measured_ml, np.float64) - np.asarray(true_ml, np.float64)


def volume_error_percent(measured_ml: ArrayLike, true_ml: ArrayLike) -> NDArray[np.float64]:
    """Measured minus true volume in per cent of the true one; NaN where that is 0: no share of nothing."""
    error = volume_error_ml(measured_ml, true_ml)
    whole = np.broadcast_to(np.asarray(true_ml, np.float64), error.shape)
    return np.divide(100 * error, whole, out=np.full(error.shape, np.nan), where=whole > 0)


@dataclass(frozen=True, slots=True)
class Icc:
    """Intraclass correlation of single measurements in a two-way table, names after Shrout & Fleiss 1979.

    Attributes
    ----------
    agreement : ICC(2,1), raters random, absolute agreement: a constant offset between the raters lowers it
    consistency : ICC(3,1), raters fixed, consistency: a constant offset between the raters costs nothing

    """

    agreement: Interval
    consistency: Interval


def icc(ratings: ArrayLike, *, level: float = LEVEL) -> Icc:
    """Intraclass correlations ICC(2,1) and ICC(3,1) with their confidence intervals.

    Paper 004 reports an ICC of .997 between measured and true volumes and doesn't say which. A method that measures
    every haematoma 5 ml too large should not pass, so quote the agreement; give both for comparison.
    Shrout & Fleiss, Psychol. Bull. 86:420 (1979); intervals as McGraw & Wong, Psychol. Methods 1:30 (1996).

    Parameters
    ----------
    ratings : ``(n, k)``, n patients measured by each of k methods, such as columns of measured and true ml

    Returns
    -------
    NaN where there is no variance to share out: all ratings equal, or (consistency) all patients equal

    Raises
    ------
    ValueError : fewer than two patients or two methods, or values that aren't finite

    """
    table = np.asarray(ratings, np.float64)
    if table.ndim != 2 or min(table.shape) < 2 or not np.isfinite(table).all():
        raise ValueError(f"ICC needs finite ratings (patients >= 2, methods >= 2), not {table.shape}")
    n, k = table.shape
    method = n * float(table.mean(axis=0).var(ddof=1))  # JMS of Shrout & Fleiss
    table = table - table[0]  # changes neither of the other two, and equal patients give exact zeros
    patients = table.mean(axis=1, keepdims=True)
    between = k * float(patients.var(ddof=1))  # BMS
    noise = table - patients - table.mean(axis=0) + table.mean()
    residual = float((noise**2).sum()) / ((n - 1) * (k - 1))  # EMS
    agreement = _share(between - residual, between + (k - 1) * residual + k * (method - residual) / n)
    consistency = _share(between - residual, between + (k - 1) * residual)
    return Icc(
        Interval(agreement, *_agreement_limits(between, method, residual, agreement, (n, k), level)),
        Interval(consistency, *_consistency_limits(between, residual, (n, k), level)),
    )


def _consistency_limits(between: float, residual: float, shape: tuple[int, int], level: float) -> tuple[float, float]:
    """Limits of ICC(3,1), with the mean squares kept apart so that a residual of 0 divides nothing."""
    n, k = shape
    tail, error = (1 - level) / 2, (n - 1) * (k - 1)
    low, high = stats.f.ppf(tail, error, n - 1), stats.f.ppf(tail, n - 1, error)  # 1 / F of the other tail
    return (
        _share(low * between - residual, low * between + (k - 1) * residual),
        _share(between - high * residual, between + (k - 1) * high * residual),
    )


def _agreement_limits(
    between: float, method: float, residual: float, estimate: float, shape: tuple[int, int], level: float
) -> tuple[float, float]:
    """Limits of ICC(2,1) with Satterthwaite's degrees of freedom for the sum of method and residual.

    A negative estimate counts as 0 in them: with negative weights they can vanish, and the limits with them.
    """
    n, k = shape
    share = max(estimate, 0.0)
    by_method, by_residual = k * share * method, (n * (1 + (k - 1) * share) - k * share) * residual
    scale = (n - 1) * by_method**2 + by_residual**2
    if scale == 0:
        return estimate, estimate  # the methods never differ: nothing is estimated
    freedom = (k - 1) * (n - 1) * (by_method + by_residual) ** 2 / scale
    tail = (1 - level) / 2
    low, high = stats.f.ppf(tail, freedom, n - 1), stats.f.ppf(tail, n - 1, freedom)  # 1 / F: F may be infinite
    other = k * method + (k * n - k - n) * residual
    return (
        _share(n * (low * between - residual), other + n * low * between),
        _share(n * (between - high * residual), high * other + n * between),
    )


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")


@dataclass(frozen=True, slots=True, eq=False)
class Agreement:
    """Bland and Altman's analysis of two methods over n patients.

    Attributes
    ----------
    mean, difference : ``(n,)`` of each patient: mean of both methods, first minus second
    bias : mean difference
    lower, upper : limits of agreement, bias -+ 1.96 standard deviations

    """

    mean: NDArray[np.float64]
    difference: NDArray[np.float64]
    bias: Interval
    lower: Interval
    upper: Interval


def bland_altman(measured: ArrayLike, reference: ArrayLike, *, level: float = LEVEL) -> Agreement:
    """Bias and 95 % limits of agreement of two methods over the same patients, each with a confidence interval.

    Bland & Altman, Stat. Methods Med. Res. 8:135 (1999): standard error of the bias s / sqrt(n), of a limit
    s sqrt(1/n + 1.96^2 / (2 (n - 1))), both with Student's t of n - 1 degrees of freedom. Plotted against the mean of
    both methods, not the reference: against that, an imperfect reference shows a slope where there is none.

    Parameters
    ----------
    measured, reference : ``(n,)`` in one unit, such as ml
    level : of the confidence intervals; the limits of agreement are always those of 95 %

    Raises
    ------
    ValueError : fewer than two patients, or not the same patients

    """
    first, second = np.asarray(measured, np.float64), np.asarray(reference, np.float64)
    if first.shape != second.shape or first.ndim != 1 or len(first) < 2:
        raise ValueError(f"agreement needs the same two or more patients twice, not {first.shape} and {second.shape}")
    difference = first - second
    n, bias, deviation = len(difference), float(difference.mean()), float(difference.std(ddof=1))
    reach = float(stats.norm.ppf(0.975))
    t = float(stats.t.ppf((1 + level) / 2, n - 1))
    about_bias = t * deviation / n**0.5
    about_limit = t * deviation * (1 / n + reach**2 / (2 * (n - 1))) ** 0.5
    lower, upper = bias - reach * deviation, bias + reach * deviation
    return Agreement(
        mean=(first + second) / 2,
        difference=difference,
        bias=Interval(bias, bias - about_bias, bias + about_bias),
        lower=Interval(lower, lower - about_limit, lower + about_limit),
        upper=Interval(upper, upper - about_limit, upper + about_limit),
    )


@dataclass(frozen=True, slots=True)
class Anova:
    """One-way analysis of variance: F, its degrees of freedom between and within groups, and p."""

    f: float
    between: int
    within: int
    p: float


def anova(means: Sequence[float], deviations: Sequence[float], sizes: Sequence[int]) -> Anova:
    """One-way ANOVA of groups of scores from their summaries, as paper 003 (section II.C) compares its three models.

    From summaries so that a published table can be checked: Table I of 003 gives its p of .9455 with 63 scores a
    model, the batches of eight, not with the 497 test slices. It takes the groups as independent although all models
    score the same images; `paired_difference` doesn't, and finds smaller differences.

    Parameters
    ----------
    means, deviations, sizes : of each group: mean, standard deviation (n - 1), number of scores

    Raises
    ------
    ValueError : fewer than two groups, a group of fewer than two, or no variance within any group

    """
    mean, deviation, size = (np.asarray(values, np.float64) for values in (means, deviations, sizes))
    if not len(mean) == len(deviation) == len(size) >= 2 or size.min() < 2 or not deviation.any():
        raise ValueError("ANOVA needs two or more groups of two or more scores, with some variance within")
    between, within = len(mean) - 1, int(size.sum()) - len(mean)
    grand = (size * mean).sum() / size.sum()
    explained = (size * (mean - grand) ** 2).sum() / between
    unexplained = ((size - 1) * deviation**2).sum() / within
    f = float(explained / unexplained)
    return Anova(f, between, within, float(stats.f.sf(f, between, within)))


def by_patient(values: Iterable[T], patients: Iterable[Hashable]) -> list[list[T]]:
    """Group the values of slices (or lesions) by the patient each belongs to, patients in order of appearance.

    Slices of one head resemble each other: resampling them as if independent gives intervals far too narrow.

    Raises
    ------
    ValueError : not one patient per value

    """
    groups: defaultdict[Hashable, list[T]] = defaultdict(list)
    for value, patient in zip(values, patients, strict=True):
        groups[patient].append(value)
    return list(groups.values())


def bootstrap(
    patients: Sequence[T],
    statistic: Callable[[Sequence[T]], float],
    *,
    seed: int,
    resamples: int = 2000,
    level: float = LEVEL,
) -> Interval:
    """Percentile bootstrap over patients (Efron & Tibshirani, An Introduction to the Bootstrap, chapter 13).

    Parameters
    ----------
    patients : one item each, whatever it is: a Dice, a pair of volumes, `Counts`, the list that `by_patient` made
    statistic : of such a sequence, such as ``numpy.nanmean`` or ``lambda heads: global_macro(heads, dice)``
    seed : the same seed gives the same interval

    Returns
    -------
    resamples without a value (no lesion of the class among them, say) are left out and counted

    Raises
    ------
    ValueError : fewer than two patients

    """
    return _resample((patients,), lambda groups: statistic(groups[0]), seed=seed, resamples=resamples, level=level)


def paired_difference(
    first: Sequence[T],
    second: Sequence[T],
    statistic: Callable[[Sequence[T]], float],
    *,
    seed: int,
    resamples: int = 2000,
    level: float = LEVEL,
) -> Interval:
    """Difference of a statistic between two models, second minus first, bootstrapped over the patients of both.

    Every resample draws the same patients for both models, so what makes a patient hard for both cancels.

    Parameters
    ----------
    first, second : the two models' results, one item per patient, patients in the same order
    statistic, seed, resamples, level : as in `bootstrap`

    Raises
    ------
    ValueError : fewer than two patients, or not as many for one model as for the other

    """
    return _resample(
        (first, second),
        lambda groups: statistic(groups[1]) - statistic(groups[0]),
        seed=seed,
        resamples=resamples,
        level=level,
    )


def _resample(
    groups: tuple[Sequence[T], ...],
    statistic: Callable[[tuple[Sequence[T], ...]], float],
    *,
    seed: int,
    resamples: int,
    level: float,
) -> Interval:
    n = len(groups[0])
    if n < 2 or any(len(group) != n for group in groups):
        raise ValueError(f"a bootstrap needs the same two or more patients, not {[len(group) for group in groups]}")
    rng = np.random.default_rng(seed)
    values = np.empty(resamples)
    for i in range(resamples):
        drawn = rng.integers(n, size=n).tolist()
        values[i] = statistic(tuple([group[j] for j in drawn] for group in groups))
    known = values[~np.isnan(values)]
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2]) if known.size else (np.nan, np.nan)
    return Interval(float(statistic(groups)), float(low), float(high), int(resamples - known.size))
