"""What a series that still arrives comes to: never more than it will be, in whatever order its slices come."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import geometry
from runtime.evidence import MOST_IN_A_ROW, Evidence
from runtime.report import ARRIVING, compose
from runtime.triage import Rule, is_higher
from runtime.types import ModelIdentity, OperatingPoint, Plane, SliceLabels
from runtime.volume import volumes_ml
from tests.runtime.test_geometry import axial

CLASSES = ("background", "intracerebral", "subdural")
MODEL = ModelIdentity("net", "1", "0" * 64, "fp32", "engine", "phantoms")
RULES = (Rule("critical", ("subdural",), 0.3), Rule("critical", ("any",), 1.0), Rule("urgent", ("any",), 0.0))
PIXELS = 64  # of a slice: 16 mm2


@dataclass(frozen=True)
class Arrival:
    """Slices in the order in which they come, and what the network says of each."""

    planes: dict[str, Plane]
    answers: dict[str, SliceLabels]


def answer(intracerebral: int, subdural: int, probability: float = 1.0) -> SliceLabels:
    labels = np.repeat([1, 2, 0], [intracerebral, subdural, PIXELS - intracerebral - subdural]).astype(np.uint8)
    evidence = np.array([1, probability, probability], np.float32)
    return SliceLabels(labels.reshape(8, 8), np.bincount(labels, minlength=3), evidence)


@st.composite
def arrivals(draw: st.DrawFn) -> Arrival:
    """Slices that lie side by side, perhaps in two thicknesses, tilted, with gaps, some of them in one place twice."""
    kinds = draw(st.lists(st.sampled_from([1.0, 2.5, 5.0, 7.0]), min_size=1, max_size=2))
    thickness = [t for t in kinds for _ in range(draw(st.integers(3, 9)))]
    tilt_deg = draw(st.floats(-25, 25))
    centres = np.cumsum(thickness) - np.array(thickness) / 2
    planes = [axial(float(z), thickness=t, tilt_deg=tilt_deg) for z, t in zip(centres, thickness, strict=True)]
    lost = draw(st.sets(st.integers(1, len(planes) - 2), max_size=len(planes) // 2))
    left = [plane for i, plane in enumerate(planes) if i not in lost]
    left += draw(st.lists(st.sampled_from(left), max_size=3))
    shown = st.builds(answer, st.integers(0, 30), st.integers(0, 30), st.sampled_from([0.4, 0.7, 0.99]))
    blood = [draw(st.just(answer(0, 0)) | shown) for _ in left]
    order = draw(st.permutations(range(len(left))))
    return Arrival({str(i): left[i] for i in order}, {str(i): blood[i] for i in order})


def operating(draw_from: OperatingPoint) -> SimpleNamespace:
    return SimpleNamespace(classes=CLASSES, operating_point=dict.fromkeys(CLASSES[1:], draw_from))


POINTS = st.builds(
    OperatingPoint, st.sampled_from([0.0, 0.1, 0.4]), st.sampled_from([0.0, 0.5, 0.9]), st.integers(1, 4)
)


def total_ml(stack: geometry.SliceStack, answers: dict[str, SliceLabels]) -> np.ndarray:
    return volumes_ml(stack, np.stack([answers[key].voxels for key in stack.keys]))


@settings(deadline=None)
@given(arrivals())
def test_volumes_so_far_are_never_more_than_those_of_the_whole_series(arrival: Arrival):
    final_ml = total_ml(geometry.stack(arrival.planes), arrival.answers)
    evidence, here = Evidence(), {}
    for key, plane in arrival.planes.items():
        here[key] = plane
        evidence.take(key, plane, arrival.answers[key])
        growing = geometry.stack(here, growing=True)
        assert len(growing) == len(evidence)
        assert evidence._total_ml == pytest.approx(total_ml(growing, arrival.answers)), "kept up as if made anew"
        assert (evidence._total_ml <= final_ml + 1e-9).all()


@settings(deadline=None)
@given(arrivals(), POINTS)
def test_no_level_on_the_way_is_higher_than_the_last(arrival: Arrival, point: OperatingPoint):
    bundle = operating(point)
    final = compose(geometry.stack(arrival.planes), arrival.answers, bundle, MODEL, RULES).decision.level
    evidence, here = Evidence(), {}
    for key, plane in arrival.planes.items():
        here[key] = plane
        evidence.take(key, plane, arrival.answers[key])
        report = compose(geometry.stack(here, growing=True), arrival.answers, bundle, MODEL, RULES, arriving=True)
        assert report.missing[0] == ARRIVING
        assert report.provisional
        assert not is_higher(report.decision.level, evidence.level(bundle.operating_point, RULES)), "the first look"
        assert not is_higher(report.decision.level, final)


def test_a_volume_at_the_limit_is_looked_at_however_it_rounds():
    """Slice by slice these 80 pixels come to a little less than 0.1 ml."""
    point, evidence, planes, answers = OperatingPoint(0.1, 0.0, 1), Evidence(), {}, {}
    for key, pixels in zip("01234", (0, 3, 30, 30, 17), strict=True):
        planes[key], answers[key] = axial(5.5 + 5.0 * int(key), thickness=5.0), answer(pixels, 0)
        evidence.take(key, planes[key], answers[key])
    report = compose(geometry.stack(planes, growing=True), answers, operating(point), MODEL, RULES, arriving=True)
    assert report.findings[0].volume_ml == 0.1
    assert evidence._total_ml[1] < 0.1
    assert evidence.level(operating(point).operating_point, RULES) == report.decision.level


def test_with_all_its_slices_a_series_knows_what_the_whole_one_shows():
    planes = {str(i): axial(5.0 * i) for i in range(6)}
    assert geometry.stack(planes, growing=True).thickness_mm == pytest.approx(geometry.stack(planes).thickness_mm)


def test_slices_that_lie_apart_have_their_own_thickness_and_no_more():
    """A whole series of such steps would give each 10 mm, and 4.7 of them are not missing but not here yet."""
    planes = {str(i): axial(10.0 * i, tilt_deg=20) for i in range(3)}
    growing = geometry.stack(planes, growing=True)
    assert growing.thickness_mm == pytest.approx([5 * np.cos(np.radians(20))] * 3)
    assert [gap.after_key for gap in growing.gaps] == ["0", "1"]
    assert geometry.stack(planes).gaps == ()


def test_without_a_thickness_nothing_is_sure():
    evidence = Evidence()
    for i in range(3):
        evidence.take(str(i), axial(5.0 * i, thickness=None), answer(30, 30))
    assert evidence.level(dict.fromkeys(CLASSES[1:], OperatingPoint(0.0)), RULES) is None


def test_an_answer_that_changes_counts_once():
    evidence, points = Evidence(), dict.fromkeys(CLASSES[1:], OperatingPoint(0.05))
    evidence.take("0", axial(0.0), answer(60, 0))
    assert evidence.level(points, RULES) == "urgent"
    evidence.take("0", axial(0.0), answer(60, 0))
    assert evidence._total_ml[1] == pytest.approx(60 * 0.25 * 5 / 1000)
    evidence.take("0", axial(0.0), answer(0, 0))
    assert evidence.level(points, RULES) is None


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 0, 2, 1), (1, 3, 0, 2)])
def test_neighbours_have_to_agree(order: tuple[int, ...]):
    """Slices 0, 1 and 3 show it: two in a row, and three only once 2 does too."""
    evidence, points = Evidence(), dict.fromkeys(CLASSES[1:], OperatingPoint(0.0, 0.0, 3))
    for i in order:
        evidence.take(str(i), axial(5.0 * i), answer(0 if i == 2 else 9, 0))
        assert evidence.level(points, RULES) is None
    evidence.take("2", axial(10.0), answer(9, 0))
    assert evidence.level(points, RULES) == "urgent"


def test_who_lies_beyond_a_gap_is_no_neighbour():
    evidence, points = Evidence(), dict.fromkeys(CLASSES[1:], OperatingPoint(0.0, 0.0, 2))
    for z in (0.0, 10.0, 20.0):
        evidence.take(str(z), axial(z), answer(9, 0))
        assert evidence.level(points, RULES) is None
    evidence.take("5", axial(5.0), answer(9, 0))
    assert evidence.level(points, RULES) == "urgent"


def test_a_row_is_not_walked_further_than_anybody_asks():
    evidence = Evidence()
    for i in range(4 * MOST_IN_A_ROW):
        evidence.take(str(i), axial(5.0 * i), answer(9, 0))
    assert MOST_IN_A_ROW <= evidence._in_a_row[1] <= MOST_IN_A_ROW + 1


def test_another_probability_or_rule_makes_another_level():
    evidence = Evidence()
    for i in range(5):
        evidence.take(str(i), axial(5.0 * i), answer(0, 60, 0.8))
    for probability, level in ((0.9, None), (0.7, "critical")):
        points = dict.fromkeys(CLASSES[1:], OperatingPoint(0.0, probability))
        assert evidence.level(points, RULES) == level
    beside = [replace(RULES[0], also=("intracerebral",))]
    assert evidence.level(points, beside) is None
