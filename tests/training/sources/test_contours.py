"""Contours to pixels: against a slow reading of the even-odd rule, and where polygons share edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.sources.contours import fill

SHAPE = (9, 11)
# offsets from pixel centres that keep every edge of this grid at least 0.01 pixels from every centre
places = st.tuples(st.integers(-3, 12), st.integers(-3, 14)).map(lambda p: (p[0] + 0.4995, p[1] + 0.4788))
polygons = st.lists(st.lists(places, min_size=3, max_size=7), min_size=1, max_size=3)


def odd_crossings(row: int, column: int, polygon: list[tuple[float, float]]) -> bool:
    """Whether a ray from a point to the right meets a polygon's edges an odd number of times."""
    odd = False
    for (r0, c0), (r1, c1) in zip(polygon, [*polygon[1:], polygon[0]], strict=True):
        if (r0 > row) != (r1 > row) and column < c0 + (row - r0) / (r1 - r0) * (c1 - c0):
            odd = not odd
    return odd


@given(polygons)
@settings(max_examples=60, deadline=None)
def test_a_pixel_is_inside_if_an_odd_number_of_polygons_encloses_its_centre(shapes):
    expected = np.zeros(SHAPE, bool)
    for row, column in np.ndindex(SHAPE):
        expected[row, column] = sum(odd_crossings(row, column, shape) for shape in shapes) % 2
    assert np.array_equal(fill([np.array(shape) for shape in shapes], SHAPE), expected)


def test_vertices_on_pixel_centres_give_as_many_pixels_as_the_area():
    square = np.array([(2, 3), (2, 8), (6, 8), (6, 3)], float)
    expected = np.zeros(SHAPE, bool)
    expected[2:6, 3:8] = True
    assert np.array_equal(fill([square], SHAPE), expected)
    assert np.array_equal(fill([square + 1e-6], SHAPE), expected), "rounding moved a vertex across a pixel"
    assert np.array_equal(fill([square - 1e-6], SHAPE), expected)


def test_polygons_that_share_an_edge_share_no_pixel_and_leave_none_out():
    left, right = (np.array([(1, a), (1, b), (7, b + 0.5), (7, a + 0.5)], float) for a, b in ((1, 5), (5, 9)))
    both = fill([np.array([(1, 1), (1, 9), (7, 9.5), (7, 1.5)], float)], SHAPE)
    assert not (fill([left], SHAPE) & fill([right], SHAPE)).any()
    assert np.array_equal(fill([left], SHAPE) | fill([right], SHAPE), both)


def test_a_polygon_inside_another_is_a_hole_and_a_keyhole_is_the_same():
    outer = [(1, 1), (1, 9), (7, 9), (7, 1)]
    inner = [(3, 3), (3, 6), (5, 6), (5, 3)]
    expected = np.zeros(SHAPE, bool)
    expected[1:7, 1:9] = True
    expected[3:5, 3:6] = False
    assert np.array_equal(fill([np.array(outer, float), np.array(inner, float)], SHAPE), expected)
    keyhole = [outer[0], inner[0], *reversed(inner), outer[0], *outer[1:]]
    assert np.array_equal(fill([np.array(keyhole, float)], SHAPE), expected)


@pytest.mark.parametrize("far", [(-50, 0), (50, 0), (0, -50), (0, 50)])
def test_what_lies_outside_of_the_image_is_cut_off(far):
    square = np.array([(2, 3), (2, 8), (6, 8), (6, 3)], float)
    assert not fill([square + far], SHAPE).any()
    assert fill([(square - 4) * 30], SHAPE).all()
