"""Order, gaps, repeats, tilt and each slice's own thickness."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import geometry
from runtime.errors import GeometryError
from runtime.types import Plane


def axial(z: float, *, thickness: float | None = 5.0, tilt_deg: float = 0.0) -> Plane:
    """A plane whose table position is `z`."""
    sine, cosine = float(np.sin(np.radians(tilt_deg))), float(np.cos(np.radians(tilt_deg)))
    return Plane(
        (-100.0, -100.0 * cosine, z - 100.0 * sine), (1.0, 0.0, 0.0), (0.0, cosine, sine), (0.5, 0.5), thickness
    )


def stacked(positions: list[float], **kwargs: float) -> geometry.SliceStack:
    return geometry.stack({str(i): axial(z, **kwargs) for i, z in enumerate(positions)})


def test_slices_are_ordered_along_the_normal_whatever_order_they_came_in():
    stack = stacked([10, 0, 15, 5])
    assert stack.keys == ("1", "3", "0", "2")
    assert stack.thickness_mm == pytest.approx([5, 5, 5, 5])
    assert stack.gaps == ()


def test_a_tilted_gantry_makes_slices_thinner_than_the_table_step():
    """20 degrees and 5 mm: 4.6985 mm along the normal; 5 would overstate every volume by 6.4 %."""
    stack = stacked([0, 5, 10, 15], tilt_deg=20)
    assert stack.thickness_mm == pytest.approx([5 * np.cos(np.radians(20))] * 4)
    assert stack.tilt_deg == pytest.approx(20)
    assert stack.voxel_ml[0] == pytest.approx(0.25 * 4.6985 / 1000, rel=1e-4)


def test_contiguous_slabs_of_two_thicknesses_keep_their_own():
    planes = {str(i): axial(z, thickness=t) for i, (z, t) in enumerate([(2, 4), (6, 4), (11.5, 7), (18.5, 7)])}
    assert geometry.stack(planes).thickness_mm == pytest.approx([4, 4, 7, 7])


def test_overlapping_slabs_share_their_overlap():
    """The step change of a real GE series: 4 mm slices, then 7 mm ones 1.08 mm further on."""
    planes = {str(i): axial(z, thickness=t) for i, (z, t) in enumerate([(0, 4), (4, 4), (5.08, 7), (12.08, 7)])}
    stack = geometry.stack(planes)
    assert stack.thickness_mm.sum() == pytest.approx(2 + 12.08 + 3.5)  # what the slabs cover, each millimetre once
    assert stack.gaps == ()


def test_a_missing_slice_is_a_gap_and_its_neighbours_stand_for_it():
    stack = stacked([0, 5, 15, 20])
    assert [(gap.after_key, gap.before_key, gap.step_mm, gap.missing) for gap in stack.gaps] == [("1", "2", 10.0, 1)]
    assert stack.thickness_mm.sum() == pytest.approx(25)


def test_a_protocol_with_even_spaces_between_slices_has_no_gap():
    assert stacked([0, 10, 20, 30], thickness=5.0).gaps == ()


def test_a_hole_between_overlapping_slices_is_a_gap_though_their_thickness_covers_it():
    """5 mm slices every 2.5 mm, two of them missing: nothing but the even steps tells."""
    assert [gap.missing for gap in stacked([0, 2.5, 5, 12.5, 15, 17.5], thickness=5.0).gaps] == [2]


def test_one_slice_too_many_makes_no_gap_of_the_others():
    assert stacked([0, 10, 20, 21, 30, 40], thickness=10.0).gaps == ()


def test_images_in_one_place_count_once_and_are_named():
    stack = stacked([0, 5, 5.001, 10])
    assert stack.keys == ("0", "1", "3")
    assert stack.repeated == ("2",)


def test_without_slice_thickness_the_steps_speak():
    assert stacked([0, 2.5, 5, 7.5], thickness=None).thickness_mm == pytest.approx([2.5] * 4)


@pytest.mark.parametrize(
    ("planes", "message"),
    [
        ({}, "no slices"),
        ({"a": axial(0, thickness=None)}, "single slice without SliceThickness"),
        ({"a": axial(0), "b": axial(5, tilt_deg=12)}, "slice b is not parallel"),
    ],
)
def test_planes_that_make_no_stack_are_refused_by_name(planes: dict[str, Plane], message: str):
    with pytest.raises(GeometryError, match=message):
        geometry.stack(planes)


@given(
    steps=st.lists(st.floats(0.5, 8), min_size=2, max_size=30),
    tilt=st.floats(-30, 30),
    seed=st.integers(0, 2**16),
)
def test_thicknesses_tile_the_stack(steps: list[float], tilt: float, seed: int):
    """Whatever the steps, tilt and order: nothing between the first and the last slice is counted twice or left out."""
    positions = np.cumsum([0.0, *steps])
    names = np.random.default_rng(seed).permutation(len(positions))
    stack = geometry.stack({str(i): axial(float(positions[i]), thickness=3.0, tilt_deg=tilt) for i in names})
    assert stack.keys == tuple(str(i) for i in range(len(positions)))
    along = positions * np.cos(np.radians(tilt))
    ends = (min(3.0, along[1]) + min(3.0, along[-1] - along[-2])) / 2
    assert stack.thickness_mm.sum() == pytest.approx(along[-1] + ends)
    assert (stack.thickness_mm > 0).all()


def test_a_stack_is_read_only():
    with pytest.raises(ValueError, match="read-only"):
        stacked([0, 5, 10]).thickness_mm[0] = 1


def views(count: int, view: geometry.View) -> list[tuple[list[int], list[int]]]:
    return [(shown.tolist(), answered.tolist()) for shown, answered in view.over(count)]


def test_a_slice_lies_between_its_neighbours_and_beyond_the_end_is_the_last_again():
    assert views(3, geometry.View(3)) == [([0, 0, 1], [0]), ([0, 1, 2], [1]), ([1, 2, 2], [2])]
    assert views(2, geometry.View(5)) == [([0, 0, 0, 1, 1], [0]), ([0, 0, 1, 1, 1], [1])]
    assert views(2, geometry.View()) == [([0], [0]), ([1], [1])]
    assert views(0, geometry.View(3)) == [], "a series of nothing but refused images"


def test_a_volume_answers_its_middle_and_leaves_none_out():
    assert views(5, geometry.View(4, 2)) == [([0, 0, 1, 2], [0, 1]), ([1, 2, 3, 4], [2, 3]), ([3, 4, 4, 4], [4])]


@given(count=st.integers(1, 60), answered=st.integers(1, 9), around=st.integers(0, 6))
def test_views_answer_every_slice_once_and_show_it_in_its_place(count: int, answered: int, around: int):
    view = geometry.View(answered + 2 * around, answered)
    all_answered = [place for _, places in views(count, view) for place in places]
    assert all_answered == list(range(count))
    for shown, places in views(count, view):
        assert shown[view.first : view.first + len(places)] == places
