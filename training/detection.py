"""What was found: sensitivity by lesion size, false parts in heads without blood, how true the probabilities are."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import cc3d
import numpy as np
from scipy import stats

from training.statistics import LEVEL, Interval

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Match:
    """One true lesion, a connected part of the truth (26-neighbourhood), and how much of it was predicted.

    Attributes
    ----------
    volume_ml : of the lesion
    covered : predicted share of its volume, 0 to 1

    """

    volume_ml: float
    covered: float


@dataclass(frozen=True, slots=True)
class Stratum:
    """Lesions of one range of sizes.

    Attributes
    ----------
    low_ml, high_ml : a lesion of low_ml belongs to it, one of high_ml doesn't
    lesions, found : how many there were and how many of them were found

    """

    low_ml: float
    high_ml: float
    lesions: int
    found: int

    @property
    def sensitivity(self) -> float:
        """Share of lesions found; NaN where the stratum has none."""
        return self.found / self.lesions if self.lesions else float("nan")


def match_lesions(
    predicted: NDArray[np.bool_], truth: NDArray[np.bool_], voxel_ml: NDArray[np.float64]
) -> tuple[Match, ...]:
    """Every lesion of one head and one class, and how much of it was predicted.

    Parameters
    ----------
    predicted, truth : ``(N, H, W)``
    voxel_ml : ``(N,)`` volume of one voxel of each slice (`runtime.types.SliceStack.voxel_ml`)

    """
    parts, volume_ml = _parts(truth, voxel_ml)
    covered_ml = _part_volumes(np.where(predicted, parts, 0), voxel_ml, len(volume_ml))
    return tuple(
        Match(float(whole), float(covered / whole))
        for whole, covered in zip(volume_ml[1:], covered_ml[1:], strict=True)
    )


def stratify(matches: Iterable[Match], edges_ml: Sequence[float], *, least_covered: float = 0.0) -> tuple[Stratum, ...]:
    """Sensitivity per lesion by size.

    Parameters
    ----------
    matches : lesions of all heads
    edges_ml : increasing; n + 1 edges make n strata. Use 0 and infinity to leave no lesion out
    least_covered : a lesion is found when more than this share of it was predicted. By default one voxel is enough:
        what matters beside a scanner is that somebody looks there

    Raises
    ------
    ValueError : edges that don't increase

    """
    if len(edges_ml) < 2 or any(high <= low for low, high in pairwise(edges_ml)):
        raise ValueError(f"strata need two or more increasing edges, not {list(edges_ml)}")
    everything = list(matches)
    strata = []
    for low, high in pairwise(edges_ml):
        inside = [match for match in everything if low <= match.volume_ml < high]
        strata.append(Stratum(low, high, len(inside), sum(match.covered > least_covered for match in inside)))
    return tuple(strata)


def count_false_parts(
    predicted: NDArray[np.bool_], truth: NDArray[np.bool_], voxel_ml: NDArray[np.float64], *, least_ml: float = 0.0
) -> int:
    """Connected parts of the prediction (26-neighbourhood) that touch no true voxel; in a bleed-free head, all of them.

    Parameters
    ----------
    predicted, truth, voxel_ml : as in `match_lesions`
    least_ml : smaller parts are not reported and so not counted

    """
    parts, volume_ml = _parts(predicted, voxel_ml)
    false = np.ones(len(volume_ml), bool)
    false[parts[truth]] = False
    false[0] = False
    return int(np.count_nonzero(false & (volume_ml >= least_ml)))


def false_positive_rate(parts_per_head: Sequence[int], *, level: float = LEVEL) -> Interval:
    """False positives per bleed-free head, with Garwood's exact Poisson interval (Biometrika 28:437, 1936).

    Exact and not bootstrapped: heads without a single false part would bootstrap to an interval of no width, while 60
    of them only say that the rate is below 0.062. False parts of one head come in clusters, which the Poisson law
    doesn't know: with many per head, bootstrap over the heads.

    Parameters
    ----------
    parts_per_head : `count_false_parts` of each bleed-free head

    Raises
    ------
    ValueError : no head

    """
    heads, parts = len(parts_per_head), sum(parts_per_head)
    if not heads:
        raise ValueError("no bleed-free head: no rate of false positives")
    low = float(stats.chi2.ppf((1 - level) / 2, 2 * parts)) / 2 if parts else 0.0
    high = float(stats.chi2.ppf((1 + level) / 2, 2 * parts + 2)) / 2
    return Interval(parts / heads, low / heads, high / heads)


@dataclass(frozen=True, slots=True, eq=False)
class Reliability:
    """Probabilities in B equal bins from 0 to 1, and what came true. Additive: sum it over heads.

    Attributes
    ----------
    count : ``(B,)`` predictions in each bin
    probability_sum : ``(B,)`` sum of their probabilities
    outcome_sum : ``(B,)`` how many came true

    """

    count: NDArray[np.int64]
    probability_sum: NDArray[np.float64]
    outcome_sum: NDArray[np.int64]

    def __add__(self, other: Reliability) -> Reliability:
        return Reliability(
            self.count + other.count,
            self.probability_sum + other.probability_sum,
            self.outcome_sum + other.outcome_sum,
        )

    @property
    def edges(self) -> NDArray[np.float64]:
        """Edges of the bins, ``(B + 1,)``."""
        return np.linspace(0, 1, len(self.count) + 1)

    @property
    def confidence(self) -> NDArray[np.float64]:
        """Mean probability in each bin, ``(B,)``; NaN where it is empty."""
        return self._mean(self.probability_sum)

    @property
    def frequency(self) -> NDArray[np.float64]:
        """Share that came true in each bin, ``(B,)``; NaN where it is empty."""
        return self._mean(self.outcome_sum)

    @property
    def expected_error(self) -> float:
        """Expected calibration error: absolute difference of frequency and confidence, weighted by count.

        NaN without predictions.

        Guo et al., On Calibration of Modern Neural Networks, ICML 2017, equation 3, for one class's probability.
        """
        known = int(self.count.sum())
        return float(np.abs(self.outcome_sum - self.probability_sum).sum() / known) if known else float("nan")

    def _mean(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.divide(sums, self.count, out=np.full(len(sums), np.nan), where=self.count > 0)


def bin_probabilities(probability: NDArray[np.floating], outcome: NDArray[np.bool_], *, bins: int = 10) -> Reliability:
    """Reliability of one class's probabilities; a probability on an edge belongs to the bin above, 1 to the last.

    Nearly all pixels of a head are certain background, so over all pixels the expected error is near 0 for any
    network: pass those of a region (within 10 mm of the brain's blood, say) or one probability per head or lesion.

    Parameters
    ----------
    probability : any shape, 0 to 1
    outcome : of the same shape, whether it is the class

    Raises
    ------
    ValueError : shapes differ, or a probability outside 0 ... 1

    """
    if probability.shape != outcome.shape:
        raise ValueError(f"probabilities {probability.shape} and outcomes {outcome.shape} differ in shape")
    flat, true = probability.astype(np.float64).ravel(), outcome.astype(bool).ravel()
    if not ((flat >= 0) & (flat <= 1)).all():
        raise ValueError("a probability lies between 0 and 1")
    place = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], flat, side="right")
    return Reliability(
        np.bincount(place, minlength=bins),
        np.bincount(place, weights=flat, minlength=bins),
        np.bincount(place[true], minlength=bins),
    )


def _parts(mask: NDArray[np.bool_], voxel_ml: NDArray[np.float64]) -> tuple[NDArray[np.integer], NDArray[np.float64]]:
    """Connected parts as a label map ``(N, H, W)``, and the volume in ml of each label; label 0 is no part."""
    parts = cc3d.connected_components(mask.view(np.uint8), connectivity=26)  # boolean: 4.1 fails on a single row
    return parts, _part_volumes(parts, voxel_ml, int(parts.max(initial=0)) + 1)


def _part_volumes(parts: NDArray[np.integer], voxel_ml: NDArray[np.float64], labels: int) -> NDArray[np.float64]:
    volume_ml = np.zeros(labels)
    for ml, part in zip(voxel_ml, parts, strict=True):
        volume_ml += np.bincount(part.ravel(), minlength=labels) * ml
    return volume_ml
