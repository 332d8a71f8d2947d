"""ABC/2 on shapes whose diameters are known, and against every pair of points of shapes whose aren't."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime.coniglobus import Coniglobus, measure_abc

patient = settings(deadline=None, max_examples=40)


def ellipsoid(half_mm: tuple[float, float, float], spacing_mm: tuple[float, float, float], turn_deg: float = 0):
    """A mask of an ellipsoid, its in-plane axes turned; its centre lies between voxels."""
    shape = [2 * round(max(half_mm) / step + 2) for step in spacing_mm]
    z, y, x = (
        step * (index - (size - 1) / 2) for step, index, size in zip(spacing_mm, np.indices(shape), shape, strict=True)
    )
    sine, cosine = np.sin(np.radians(turn_deg)), np.cos(np.radians(turn_deg))
    along, across = cosine * x + sine * y, cosine * y - sine * x
    return (z / half_mm[0]) ** 2 + (across / half_mm[1]) ** 2 + (along / half_mm[2]) ** 2 <= 1


def brute_diameters_mm(area: NDArray[np.bool_], spacing_mm: tuple[float, float]) -> tuple[float, list[float]]:
    """A over all pairs of pixel corners, and B for each pair that far apart (there may be several).

    The hull above a place along A is the highest of all lines between two corners, below it the lowest.
    """
    pixels = np.argwhere(area)
    corners = np.unique((pixels[:, None] + [[0, 0], [0, 1], [1, 0], [1, 1]]).reshape(-1, 2), axis=0) * spacing_mm
    apart = np.linalg.norm(corners[:, None] - corners, axis=2)
    widest = []
    for i, j in np.argwhere(np.isclose(apart, apart.max())):
        axis = (corners[j] - corners[i]) / apart[i, j]
        u, v = (corners - corners[i]) @ axis, (corners - corners[i]) @ [-axis[1], axis[0]]
        widths = []
        for place in u:
            left, right = u <= place, u >= place
            reach = u[right] - u[left][:, None]
            share = np.where(reach > 1e-12, (place - u[left][:, None]) / np.where(reach > 1e-12, reach, 1), 0)
            height = v[left][:, None] + share * (v[right] - v[left][:, None])
            widths.append(height.max() - height.min())
        widest.append(float(max(widths)))
    return float(apart.max()), widest


def test_a_box_has_the_diameters_of_its_diagonal():
    """A rectangle w x h, w >= h: A is the diagonal; the longest chord across it starts in a corner, h / w of A."""
    mask = np.zeros((6, 20, 30), bool)
    mask[1:5, 4:10, 3:19] = True  # 4 slices, 6 rows of 0.5 mm, 16 columns of 0.8 mm
    found = measure_abc(mask, (0.5, 0.8), np.full(6, 2.5))
    height, width = 3.0, 12.8
    assert found.a_mm == pytest.approx(np.hypot(height, width))
    assert found.b_mm == pytest.approx(height / width * found.a_mm)
    assert (found.c_mm, found.slice_index) == (10, 1)
    assert found.volume_ml == pytest.approx(found.a_mm * found.b_mm * 10 / 2 / 1000)


@pytest.mark.parametrize("turn_deg", [0, 33])
@pytest.mark.parametrize("spacing_mm", [(1.0, 0.5, 0.5), (2.5, 0.4, 0.7)])
def test_an_ellipsoid_has_its_axes_and_95_percent_of_its_volume(
    spacing_mm: tuple[float, float, float], turn_deg: float
):
    mask = ellipsoid((15, 10, 22), spacing_mm, turn_deg)
    found = measure_abc(mask, spacing_mm[1:], np.full(len(mask), spacing_mm[0]))
    assert found.a_mm == pytest.approx(44, rel=0.02)
    assert found.b_mm == pytest.approx(20, rel=0.04)
    assert found.c_mm == pytest.approx(30, abs=spacing_mm[0])
    assert found.volume_ml / (4 / 3 * np.pi * 15 * 10 * 22 / 1000) == pytest.approx(3 / np.pi, rel=0.06)


def test_the_weighting_of_kothari_on_a_sphere():
    """What docs/metrics.md says: 95 % of the volume with whole slices, 65 % with Kothari's in thin ones."""
    mask = ellipsoid((20, 20, 20), (0.5, 0.2, 0.2))
    thickness, true_ml = np.full(len(mask), 0.5), 4 / 3 * np.pi * 8
    assert measure_abc(mask, (0.2, 0.2), thickness).volume_ml / true_ml == pytest.approx(3 / np.pi, abs=0.015)
    weighted = measure_abc(mask, (0.2, 0.2), thickness, weighting="kothari")
    assert weighted.volume_ml / true_ml == pytest.approx(3 / np.pi * (1 + np.sqrt(3)) / 4, abs=0.015)


def test_slices_count_by_their_area_and_their_own_thickness():
    mask = np.zeros((6, 1, 100), bool)
    for index, pixels in enumerate((100, 76, 75, 25, 24, 0)):
        mask[index, 0, :pixels] = True
    thickness = np.array([1.0, 2, 4, 8, 16, 32])
    assert measure_abc(mask, (1, 1), thickness).c_mm == 1 + 2 + 4 + 8 + 16
    assert measure_abc(mask, (1, 1), thickness, weighting="kothari").c_mm == 1 + 2 + (4 + 8) / 2


@patient
@given(st.integers(0, 2**32 - 1), st.tuples(st.floats(0.3, 1), st.floats(0.3, 1)))
def test_diameters_are_those_of_brute_force(seed: int, spacing_mm: tuple[float, float]):
    rng = np.random.default_rng(seed)
    area = rng.uniform(size=(6, 7)) < rng.uniform(0.1, 0.9)
    area[3, 3] = True
    found = measure_abc(area[None], spacing_mm, np.ones(1))
    a_mm, each_b_mm = brute_diameters_mm(area, spacing_mm)
    assert found.a_mm == pytest.approx(a_mm)
    assert np.isclose(found.b_mm, each_b_mm).any()


@patient
@given(st.integers(0, 2**32 - 1), st.floats(0.2, 4))
def test_volume_scales_with_the_cube_of_the_spacing(seed: int, factor: float):
    rng = np.random.default_rng(seed)
    mask = rng.uniform(size=(4, 8, 9)) < 0.4
    thickness = rng.uniform(1, 5, 4)
    found = measure_abc(mask, (0.5, 0.6), thickness)
    assert 0 < found.b_mm <= found.a_mm * (1 + 1e-9)
    larger = measure_abc(mask, (0.5 * factor, 0.6 * factor), thickness * factor)
    assert larger.volume_ml == pytest.approx(factor**3 * found.volume_ml)
    assert measure_abc(mask, (0.5, 0.6), thickness, weighting="kothari").c_mm <= found.c_mm + 1e-9


def test_no_blood_has_no_volume():
    found = measure_abc(np.zeros((3, 4, 4), bool), (1, 1), np.ones(3))
    assert found == Coniglobus(0, 0, 0, None)
    assert found.volume_ml == 0
    single = np.zeros((1, 4, 4), bool)
    single[0, 2, 2] = True
    assert measure_abc(single, (0.5, 0.5), np.array([5.0])).a_mm == pytest.approx(np.hypot(0.5, 0.5))


def test_what_does_not_fit_is_refused():
    mask = np.ones((3, 4, 4), bool)
    for wrong in ((mask[0], (1, 1), np.ones(3)), (mask, (1, 1, 1), np.ones(3)), (mask, (1, 1), np.ones(4))):
        with pytest.raises(ValueError, match="two spacings and N thicknesses"):
            measure_abc(*wrong)
