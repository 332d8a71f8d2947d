"""Overlap and distance against MONAI, scipy and brute force; the two ways of counting against the page about them."""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from scipy.spatial.distance import directed_hausdorff

from training import metrics

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
OVERLAPS = (metrics.dice, metrics.iou, metrics.precision, metrics.recall, metrics.specificity)

patient = settings(deadline=None, max_examples=60)
shapes = st.one_of(
    arrays.array_shapes(min_dims=2, max_dims=2, max_side=9), arrays.array_shapes(min_dims=3, max_dims=3, max_side=5)
)
pairs = shapes.flatmap(lambda shape: st.tuples(arrays.arrays(bool, shape), arrays.arrays(bool, shape)))
spacings = st.tuples(*[st.floats(0.3, 7.0)] * 3)


@pytest.fixture(scope="module")
def monai() -> ModuleType:
    return pytest.importorskip("monai.metrics", reason="MONAI, the reference, is not installed")


def blobs(seed: int, shape: tuple[int, ...], share: float = 0.3) -> NDArray[np.bool_]:
    """A mask with lumps and holes."""
    rng = np.random.default_rng(seed)
    mask = rng.uniform(size=shape) < share
    for axis in range(mask.ndim):
        mask |= np.roll(mask, 1, axis)
    return mask & (rng.uniform(size=shape) < 0.95)


def brute_surface_mm(mask: NDArray[np.bool_], spacing_mm: tuple[float, ...]) -> list[tuple[float, ...]]:
    found = []
    for index in zip(*np.nonzero(mask), strict=True):
        for axis in range(mask.ndim):
            for step in (-1, 1):
                beside = list(index)
                beside[axis] += step
                inside = 0 <= beside[axis] < mask.shape[axis]
                if not inside or not mask[tuple(beside)]:
                    found.append(tuple(i * s for i, s in zip(index, spacing_mm, strict=True)))
                    break
            else:
                continue
            break
    return found


def brute_distances_mm(source: NDArray[np.bool_], target: NDArray[np.bool_], spacing_mm: tuple[float, ...]):
    there = brute_surface_mm(target, spacing_mm)
    return [min(math.dist(a, b) for b in there) for a in brute_surface_mm(source, spacing_mm)]


def test_overlap_of_a_pair_counted_by_hand():
    predicted = np.array([[1, 1, 0, 0], [1, 0, 0, 0]], bool)
    truth = np.array([[1, 0, 0, 0], [1, 1, 1, 0]], bool)
    counts = metrics.count_masks(predicted, truth)
    shown = [int(n) for n in (counts.true_positive, counts.false_positive, counts.false_negative, counts.true_negative)]
    assert shown == [2, 1, 2, 3]
    assert float(metrics.dice(counts)) == pytest.approx(4 / 7)
    assert float(metrics.iou(counts)) == pytest.approx(2 / 5)
    assert float(metrics.precision(counts)) == pytest.approx(2 / 3)
    assert float(metrics.recall(counts)) == pytest.approx(2 / 4)
    assert float(metrics.specificity(counts)) == pytest.approx(3 / 4)
    assert float(metrics.f1(counts)) == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))


@pytest.mark.parametrize("shape", [(24, 31), (6, 17, 13)])
def test_overlap_is_monais(monai: ModuleType, shape: tuple[int, ...]):
    import torch

    predicted, truth = blobs(1, shape), blobs(2, shape)
    counts = metrics.count_masks(predicted, truth)
    one, other = torch.from_numpy(predicted)[None, None], torch.from_numpy(truth)[None, None]
    confusion = monai.get_confusion_matrix(one.flatten(2).float(), other.flatten(2).float())
    assert float(metrics.dice(counts)) == pytest.approx(float(monai.compute_dice(one, other)))
    assert float(metrics.iou(counts)) == pytest.approx(float(monai.compute_iou(one, other)))
    for name in ("precision", "recall", "specificity", "f1 score"):
        ours = getattr(metrics, name.split()[0])(counts)
        assert float(ours) == pytest.approx(float(monai.compute_confusion_matrix_metric(name, confusion))), name


def test_classes_are_counted_each_against_the_rest():
    rng = np.random.default_rng(3)
    predicted, truth = rng.integers(0, 4, (2, 5, 20, 20)).astype(np.uint8)
    counts = metrics.count_classes(predicted, truth, 4)
    for label in range(4):
        one = metrics.count_masks(predicted == label, truth == label)
        for name in ("true_positive", "false_positive", "false_negative", "true_negative"):
            assert getattr(counts, name)[label] == getattr(one, name), name


def test_a_label_map_of_many_classes_does_not_overflow():
    """200 classes are 40,000 pairs: more than the uint8 of the maps can hold."""
    labels = np.arange(200, dtype=np.uint8)
    counts = metrics.count_classes(labels, labels, 200)
    assert counts.true_positive.tolist() == [1] * 200


def test_empty_masks_have_no_value():
    nothing, something = np.zeros((3, 3), bool), np.eye(3, dtype=bool)
    neither = metrics.count_masks(nothing, nothing)
    assert all(np.isnan(metric(neither)) for metric in OVERLAPS[:4])
    assert metrics.specificity(neither) == 1
    missed = metrics.count_masks(nothing, something)
    assert (metrics.dice(missed), metrics.recall(missed)) == (0, 0)
    assert np.isnan(metrics.precision(missed))
    invented = metrics.count_masks(something, nothing)
    assert (metrics.dice(invented), metrics.precision(invented)) == (0, 0)
    assert np.isnan(metrics.recall(invented))
    everything = metrics.count_masks(~nothing, ~nothing)
    assert np.isnan(metrics.specificity(everything))
    for distance in (metrics.directed_hausdorff_mm, metrics.hausdorff_mm, metrics.hausdorff_95_mm):
        assert np.isnan(distance(nothing, nothing, (1, 1)))
        assert np.isnan(distance(nothing, something, (1, 1)))
        assert np.isnan(distance(something, nothing, (1, 1)))


def test_what_does_not_fit_is_refused():
    mask = np.ones((4, 4), bool)
    with pytest.raises(TypeError, match="boolean"):
        metrics.count_masks(mask.astype(np.uint8), mask)
    with pytest.raises(ValueError, match="differ in shape"):
        metrics.count_masks(mask, mask[:2])
    with pytest.raises(ValueError, match="differ in shape"):
        metrics.count_classes(np.zeros((2, 2), int), np.zeros((2, 3), int), 2)
    with pytest.raises(ValueError, match="truth has labels 0 to 7"):
        metrics.count_classes(np.zeros((2, 2), int), np.array([[0, 7], [0, 0]]), 7)
    for spacing in ((1.0,), (1.0, 1.0, 1.0), (1.0, 0.0), (1.0, float("nan"))):
        with pytest.raises(ValueError, match="positive spacings"):
            metrics.hausdorff_mm(mask, mask, spacing)
    with pytest.raises(ValueError, match="nothing to average"):
        metrics.batch_average([], metrics.dice, batch=2)


@patient
@given(pairs)
def test_overlap_keeps_its_bounds_and_symmetries(pair: tuple[NDArray[np.bool_], NDArray[np.bool_]]):
    one, other = pair
    there, back = metrics.count_masks(one, other), metrics.count_masks(other, one)
    for metric in OVERLAPS:
        assert np.isnan(metric(there)) or 0 <= metric(there) <= 1
    assert np.array_equal(metrics.dice(there), metrics.dice(back), equal_nan=True)
    assert np.array_equal(metrics.precision(there), metrics.recall(back), equal_nan=True)
    dice, iou = metrics.dice(there), metrics.iou(there)
    assert np.isnan(iou) if np.isnan(dice) else iou == pytest.approx(dice / (2 - dice))


@patient
@given(pairs, spacings)
def test_distances_are_those_of_brute_force(
    pair: tuple[NDArray[np.bool_], NDArray[np.bool_]], spacing_mm: tuple[float, float, float]
):
    one, other = pair
    spacing = spacing_mm[: one.ndim]
    if not one.any() or not other.any():
        return
    there, back = brute_distances_mm(one, other, spacing), brute_distances_mm(other, one, spacing)
    assert sorted(metrics.surface_distances_mm(one, other, spacing)) == pytest.approx(sorted(there))
    assert metrics.directed_hausdorff_mm(one, other, spacing) == pytest.approx(max(there))
    assert metrics.hausdorff_mm(one, other, spacing) == pytest.approx(max(there + back))
    outermost = max(np.percentile(there, 95), np.percentile(back, 95))
    assert metrics.hausdorff_95_mm(one, other, spacing) == pytest.approx(outermost)


@patient
@given(pairs, spacings, st.floats(0.2, 5))
def test_distances_scale_with_the_spacing(
    pair: tuple[NDArray[np.bool_], NDArray[np.bool_]], spacing_mm: tuple[float, float, float], factor: float
):
    spacing = spacing_mm[: pair[0].ndim]
    wider = [factor * s for s in spacing]
    for distance in (metrics.directed_hausdorff_mm, metrics.hausdorff_mm, metrics.hausdorff_95_mm):
        assert distance(*pair, wider) == pytest.approx(factor * distance(*pair, spacing), nan_ok=True)


@patient
@given(pairs, spacings)
def test_hausdorff_is_symmetric_and_hd95_no_larger(
    pair: tuple[NDArray[np.bool_], NDArray[np.bool_]], spacing_mm: tuple[float, float, float]
):
    one, other = pair
    spacing = spacing_mm[: one.ndim]
    whole = metrics.hausdorff_mm(one, other, spacing)
    assert whole == pytest.approx(metrics.hausdorff_mm(other, one, spacing), nan_ok=True)
    assert not metrics.hausdorff_95_mm(one, other, spacing) > whole
    if one.any():
        assert metrics.hausdorff_mm(one, one, spacing) == 0


@pytest.mark.parametrize(("shape", "spacing_mm"), [((40, 52), (0.4, 0.7)), ((7, 30, 22), (5.0, 0.5, 0.45))])
def test_distances_are_monais_and_scipys(monai: ModuleType, shape: tuple[int, ...], spacing_mm: tuple[float, ...]):
    import torch

    one, other = blobs(4, shape, 0.02), blobs(5, shape, 0.02)
    first, second = torch.from_numpy(one)[None, None], torch.from_numpy(other)[None, None]

    def reference(percentile: float | None, *, directed: bool) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.6 calls its own deprecated argument
            found = monai.compute_hausdorff_distance(
                first, second, include_background=True, percentile=percentile, directed=directed, spacing=spacing_mm
            )
        return float(found)

    there = metrics.directed_hausdorff_mm(one, other, spacing_mm)
    back = metrics.directed_hausdorff_mm(other, one, spacing_mm)
    assert there != back  # or the direction would not be tested
    assert there == pytest.approx(reference(None, directed=True), rel=1e-5)
    assert metrics.hausdorff_mm(one, other, spacing_mm) == pytest.approx(reference(None, directed=False), rel=1e-5)
    assert metrics.hausdorff_95_mm(one, other, spacing_mm) == pytest.approx(reference(95, directed=False), rel=1e-5)
    from_mm, to_mm = (np.argwhere(metrics.find_surface(mask)) * spacing_mm for mask in (one, other))
    assert there == pytest.approx(directed_hausdorff(from_mm, to_mm)[0])
    assert back == pytest.approx(directed_hausdorff(to_mm, from_mm)[0])


def test_distance_runs_from_surface_to_surface():
    """A voxel in the middle of a larger mask is as far from its surface as one outside."""
    large, small = np.ones((9, 9), bool), np.zeros((9, 9), bool)
    small[4, 4] = True
    assert metrics.directed_hausdorff_mm(small, large, (1, 1)) == 4
    assert metrics.find_surface(large).sum() == 32  # the image's edge is a surface


def test_a_macro_is_the_mean_over_classes_that_have_a_value():
    counts = metrics.Counts(*(np.array(n) for n in ([90, 4, 0, 0], [5, 2, 0, 1], [0, 2, 0, 3], [0, 0, 0, 0])))
    assert metrics.macro(counts, metrics.dice) == pytest.approx((8 / 12 + 0) / 2)
    assert metrics.macro(counts, metrics.dice, undefined=1) == pytest.approx((8 / 12 + 1 + 0) / 3)
    assert metrics.macro(counts, metrics.dice, undefined=0) == pytest.approx((8 / 12 + 0 + 0) / 3)
    assert metrics.macro(counts, metrics.dice, background=True) == pytest.approx((180 / 185 + 8 / 12 + 0) / 3)
    nothing = metrics.Counts(*(np.array(n) for n in ([9, 0], [0, 0], [0, 0], [0, 0])))
    assert math.isnan(metrics.macro(nothing, metrics.dice))
    assert math.isnan(metrics.batch_average([nothing, nothing], metrics.dice, batch=1))
    both = [nothing, metrics.total([nothing, counts_of(3)])]
    assert metrics.batch_average(both, metrics.dice, batch=1) == metrics.macro(both[1], metrics.dice)


def counts_of(seed: int) -> metrics.Counts:
    return metrics.Counts(*np.random.default_rng(seed).integers(0, 50, (4, 2)))


@patient
@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=9), st.integers(1, 9), st.randoms())
def test_a_global_macro_does_not_know_order_or_batches(seeds: list[int], batch: int, random):
    images = [counts_of(seed) for seed in seeds]
    whole = metrics.global_macro(images, metrics.dice)
    batches = [metrics.total(images[i : i + batch]) for i in range(0, len(images), batch)]
    random.shuffle(batches)
    assert metrics.global_macro(batches, metrics.dice) == pytest.approx(whole, nan_ok=True)
    assert metrics.batch_average(images, metrics.dice, batch=len(images)) == pytest.approx(whole, nan_ok=True)


def test_a_batch_average_gives_every_batch_one_voice():
    images = [counts_of(seed) for seed in range(5)]
    expected = np.mean(
        [metrics.macro(metrics.total(part), metrics.iou) for part in (images[:2], images[2:4], images[4:])]
    )
    assert metrics.batch_average(images, metrics.iou, batch=2) == pytest.approx(expected)


def test_the_example_of_the_page_prints_what_the_page_says():
    code, printed = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE.read_text(), re.DOTALL).groups()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    assert out.getvalue() == printed
    (average_a, _, global_a), (average_b, _, global_b) = [
        [float(number) for number in re.findall(r"\d\.\d+", line)] for line in printed.splitlines()
    ]
    assert average_a > average_b  # the contradiction of the paper's table 3
    assert global_a < global_b
