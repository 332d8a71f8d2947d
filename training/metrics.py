"""Overlap and surface distance of masks, and the two ways of averaging over a test set.

A metric without a value is NaN and never a 0 or a 1 by accident; each docstring says when that is. The papers are
numbered as in docs/metrics.md, which says what they count, where they contradict themselves and how to read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    Metric = Callable[["Counts"], NDArray[np.float64]]


@dataclass(frozen=True, slots=True, eq=False)
class Counts:
    """Pixels or voxels by what prediction and truth say of them: ``()`` of one mask pair, ``(C,)`` of C classes.

    Additive: the counts of a test set are the sum of those of its images.
    """

    true_positive: NDArray[np.int64]
    false_positive: NDArray[np.int64]
    false_negative: NDArray[np.int64]
    true_negative: NDArray[np.int64]

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.true_positive + other.true_positive,
            self.false_positive + other.false_positive,
            self.false_negative + other.false_negative,
            self.true_negative + other.true_negative,
        )


def count_masks(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> Counts:
    """Count one pair of masks of any shape; the counts have shape ``()``.

    Raises
    ------
    TypeError : not boolean: a label map or a probability would be counted as a mask
    ValueError : shapes differ

    """
    _check_masks(predicted, truth)
    both = np.count_nonzero(predicted & truth)
    shown, there = np.count_nonzero(predicted), np.count_nonzero(truth)
    counts = (both, shown - both, there - both, truth.size - shown - there + both)
    return Counts(*(np.array(count, np.int64) for count in counts))


def count_classes(predicted: NDArray[np.integer], truth: NDArray[np.integer], classes: int) -> Counts:
    """Count every class of two label maps of any shape against the rest; the counts have shape ``(classes,)``.

    Raises
    ------
    ValueError : shapes differ, or a label outside 0 ... classes - 1

    """
    if predicted.shape != truth.shape:
        raise ValueError(f"prediction {predicted.shape} and truth {truth.shape} differ in shape")
    for name, labels in (("prediction", predicted), ("truth", truth)):
        if labels.size and not 0 <= labels.min() <= labels.max() < classes:
            raise ValueError(f"{name} has labels {labels.min()} to {labels.max()}, classes are 0 to {classes - 1}")
    pairs = truth.astype(np.int64).ravel() * classes + predicted.ravel()
    confusion = np.bincount(pairs, minlength=classes**2).reshape(classes, classes)  # (truth, predicted)
    both = confusion.diagonal()
    extra, missed = confusion.sum(axis=0) - both, confusion.sum(axis=1) - both
    return Counts(both, extra, missed, truth.size - both - extra - missed)


def total(counts: Iterable[Counts]) -> Counts:
    """Sum of counts; TypeError when there are none."""
    return reduce(add, counts)


def dice(counts: Counts) -> NDArray[np.float64]:
    """Dice coefficient 2 TP / (2 TP + FP + FN): paper 002 formula 1, paper 003 equation 1, paper 004 equation 2.

    NaN where neither mask shows anything (0 / 0). Paper 003 scores only slices that show blood, so it never asks; none
    of the others says what it did.
    """
    return _ratio(2 * counts.true_positive, 2 * counts.true_positive + counts.false_positive + counts.false_negative)


def f1(counts: Counts) -> NDArray[np.float64]:
    """F1, the harmonic mean of precision and recall (paper 002, section 2.5).

    The same number as Dice from the same counts, and defined where Dice is. That paper 002 prints .507 beside a Dice of
    .867 shows two ways of averaging, not two metrics.
    """
    return dice(counts)


def iou(counts: Counts) -> NDArray[np.float64]:
    """Intersection over union TP / (TP + FP + FN): paper 002 formula 2, paper 004 equation 3. NaN as in `dice`."""
    return _ratio(counts.true_positive, counts.true_positive + counts.false_positive + counts.false_negative)


def recall(counts: Counts) -> NDArray[np.float64]:
    """Recall, the sensitivity TP / (TP + FN) of paper 004 equation 4. NaN where the truth is empty: nothing to find."""
    return _ratio(counts.true_positive, counts.true_positive + counts.false_negative)


def precision(counts: Counts) -> NDArray[np.float64]:
    """Precision, the PPV TP / (TP + FP) of paper 004 equation 5. NaN where the prediction is empty: nothing claimed."""
    return _ratio(counts.true_positive, counts.true_positive + counts.false_positive)


def specificity(counts: Counts) -> NDArray[np.float64]:
    """TN / (TN + FP), of pixels. NaN where the truth fills the image. Near 1 for any head: most of it is no blood."""
    return _ratio(counts.true_negative, counts.true_negative + counts.false_positive)


def macro(counts: Counts, metric: Metric, *, undefined: float = np.nan, background: bool = False) -> float:
    """Mean of a metric over classes.

    Parameters
    ----------
    counts : ``(C,)``, class 0 the background
    metric : `dice`, `iou`, `recall`, ...
    undefined : what a class without a value counts as. NaN leaves it out of the mean; 1 is what a smoothing term
        added above and below makes of it, 0 what one added below alone makes of it
    background : whether class 0 is one of the classes

    Returns
    -------
    NaN where no class has a value

    """
    values = metric(counts)[0 if background else 1 :]
    return _mean(np.where(np.isnan(values), undefined, values))


def global_macro(
    images: Iterable[Counts], metric: Metric, *, undefined: float = np.nan, background: bool = False
) -> float:
    """Global macro of paper 001, section 5.2: counts summed over the whole test set, then the metric, then the mean.

    "Computed across all classes over the full test set": a pixel weighs the same in whichever image it lies, so the
    order and grouping of images don't matter, and one flooded image can spoil the precision of a class.

    Parameters
    ----------
    images : counts ``(C,)`` of each image
    metric, undefined, background : as in `macro`; the paper doesn't say whether its 12 outputs include the background

    """
    return macro(total(images), metric, undefined=undefined, background=background)


def batch_average(
    images: Sequence[Counts], metric: Metric, *, batch: int, undefined: float = np.nan, background: bool = False
) -> float:
    """Batch-average of paper 001, section 5.2, and of paper 003, section II.C: a macro per batch, then their mean.

    "The same batch-average Dice style as in the training loop": each batch weighs the same however much blood it
    shows, so the result depends on batch size and order. To be reported beside `global_macro`, never instead of it.

    Parameters
    ----------
    images : counts ``(C,)`` of each image, in the order in which they were batched
    batch : images per batch; the last batch may be smaller. Paper 003 used 8; 001 doesn't say
    metric, undefined, background : as in `macro`; a batch without any value is left out of the mean

    Raises
    ------
    ValueError : no image, or a batch of none

    """
    if not images or batch < 1:
        raise ValueError(f"{len(images)} images in batches of {batch}: nothing to average")
    batches = [total(images[start : start + batch]) for start in range(0, len(images), batch)]
    return _mean(np.array([macro(one, metric, undefined=undefined, background=background) for one in batches]))


def find_surface(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Voxels of a mask ``(H, W)`` or ``(N, H, W)`` with a face neighbour outside it; beyond the image is outside."""
    return mask & ~ndimage.binary_erosion(mask)


def surface_distances_mm(
    source: NDArray[np.bool_],
    target: NDArray[np.bool_],
    spacing_mm: Sequence[float],
    origin_mm: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Distance in mm from each surface voxel of `source` to the nearest surface voxel of `target`, centre to centre.

    Surfaces, not sets: a point deep inside `target` is as far from it as one outside ("the distance between the
    surface point sets", paper 004). This is what MONAI computes.

    Parameters
    ----------
    source, target : ``(H, W)`` or ``(N, H, W)``
    spacing_mm : distance between neighbours as (row, column) or (slice, row, column)
    origin_mm : ``(N, 3)``, where each slice's first voxel lies, in the order of `spacing_mm`, instead of its even
        steps: for a series whose step changes or whose gantry is tilted

    Returns
    -------
    ``(S,)`` in no particular order; empty where either mask is

    Raises
    ------
    TypeError, ValueError : masks that aren't boolean, or shapes and spacing that don't fit or aren't positive

    """
    _check_masks(source, target)
    spacing = np.asarray(spacing_mm, dtype=np.float64)
    if spacing.shape != (source.ndim,) or not (spacing > 0).all():
        raise ValueError(f"a mask with {source.ndim} axes needs {source.ndim} positive spacings, not {spacing_mm}")
    points = [_surface_points(mask) for mask in (source, target)]
    if origin_mm is None:
        from_mm, to_mm = (at * spacing for at in points)
    else:
        from_mm, to_mm = (at * spacing * (0, 1, 1) + origin_mm[at[:, 0]] for at in points)
    if not len(from_mm) or not len(to_mm):
        return np.zeros(0)
    return KDTree(to_mm).query(from_mm)[0]


def directed_hausdorff_mm(
    source: NDArray[np.bool_],
    target: NDArray[np.bool_],
    spacing_mm: Sequence[float],
    origin_mm: NDArray[np.float64] | None = None,
) -> np.float64:
    """Directed Hausdorff distance h(source, target) in mm: the "dHD" of paper 000; h of paper 004, equation 6.

    How far the worst point of `source` lies from `target`; the other direction may be much farther. Paper 000 doesn't
    say which it reports: give both, h(prediction, truth) and h(truth, prediction).

    Returns
    -------
    NaN where either mask is empty: there is no point to measure from or to. So a missed lesion isn't in the mean of
    the distances; report how many pairs had none. None of the papers says what it did

    """
    return farthest(surface_distances_mm(source, target, spacing_mm, origin_mm))


def hausdorff_mm(
    first: NDArray[np.bool_],
    second: NDArray[np.bool_],
    spacing_mm: Sequence[float],
    origin_mm: NDArray[np.float64] | None = None,
) -> np.float64:
    """Hausdorff distance max(h(G, P), h(P, G)) in mm: paper 004, equation 6. NaN as in `directed_hausdorff_mm`."""
    return _hausdorff(first, second, spacing_mm, origin_mm, 100)


def hausdorff_95_mm(
    first: NDArray[np.bool_],
    second: NDArray[np.bool_],
    spacing_mm: Sequence[float],
    origin_mm: NDArray[np.float64] | None = None,
) -> np.float64:
    """HD95 in mm: the larger of the two directions' 95th percentiles. NaN as in `directed_hausdorff_mm`.

    As MONAI computes it. Paper 004 says that "the HD value is usually multiplied by 95%"; taken literally that is
    ``0.95 * hausdorff_mm(...)``, which removes no outlier. Others pool both directions before the percentile.
    """
    return _hausdorff(first, second, spacing_mm, origin_mm, 95)


def _hausdorff(
    first: NDArray[np.bool_],
    second: NDArray[np.bool_],
    spacing_mm: Sequence[float],
    origin_mm: NDArray[np.float64] | None,
    percentile: float,
) -> np.float64:
    there = farthest(surface_distances_mm(first, second, spacing_mm, origin_mm), percentile)
    back = farthest(surface_distances_mm(second, first, spacing_mm, origin_mm), percentile)
    return np.maximum(there, back)


def farthest(distances_mm: NDArray[np.float64], percentile: float = 100) -> np.float64:
    """Largest of the distances, or a percentile of them; NaN where there is none."""
    return np.percentile(distances_mm, percentile) if len(distances_mm) else np.float64(np.nan)


def _surface_points(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Indices ``(S, ndim)`` of the surface, looked for only where the mask is: blood fills little of a head."""
    boxes = ndimage.find_objects(mask.astype(np.uint8))
    if not boxes:
        return np.zeros((0, mask.ndim), np.int64)
    return np.argwhere(find_surface(mask[boxes[0]])) + [edge.start for edge in boxes[0]]


def _check_masks(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> None:
    if first.dtype != np.bool_ or second.dtype != np.bool_:
        raise TypeError(f"masks must be boolean, not {first.dtype} and {second.dtype}")
    if first.shape != second.shape:
        raise ValueError(f"masks {first.shape} and {second.shape} differ in shape")


def _ratio(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
