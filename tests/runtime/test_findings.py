"""Labels to findings, thresholds and decisions."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from runtime import geometry
from runtime.report import compose
from runtime.triage import Rule, RuleError, check_rules, decide, is_higher
from runtime.types import Decision, Finding, ModelIdentity, OperatingPoint, SliceLabels
from runtime.volume import in_a_row, measure
from tests.runtime.test_geometry import axial

CLASSES = ("background", "intracerebral", "subdural")
MODEL = ModelIdentity("net", "1", "0" * 64, "fp32", "engine", "phantoms")
RULES = (Rule("critical", ("subdural",), 10), Rule("critical", ("any",), 30), Rule("urgent", ("any",), 0))


def labelled(volume: np.ndarray) -> dict[str, SliceLabels]:
    """Label maps ``(N, H, W)`` as an engine would give them."""
    return {
        str(i): SliceLabels(
            labels.astype(np.uint8),
            np.bincount(labels.ravel(), minlength=len(CLASSES)),
            np.array([1, *(0.9 * (labels == c).any() for c in range(1, len(CLASSES)))], np.float32),
        )
        for i, labels in enumerate(volume)
    }


def finding(name: str, volume_ml: float) -> Finding:
    return Finding(1, name, volume_ml, 1, volume_ml, volume_ml, 0.9, ("0",), "0")


def test_volume_is_the_sum_of_pixels_times_area_times_own_thickness():
    volume = np.zeros((4, 40, 40), int)
    volume[1:3, :20, :20] = 1
    planes = {str(i): axial(z, thickness=t) for i, (z, t) in enumerate([(2, 4), (6, 4), (11.5, 7), (18.5, 7)])}
    (found,) = measure(geometry.stack(planes), labelled(volume), CLASSES)
    assert found.volume_ml == pytest.approx(400 * 0.25 * (4 + 7) / 1000)
    assert found.key_slice == "2"  # as many pixels, but thicker
    assert found.keys == ("1", "2")


def test_parts_are_counted_with_the_thickness_of_the_slices_they_lie_in():
    volume = np.zeros((5, 40, 40), int)
    volume[0, :10, :10] = 1
    volume[3:5, 20:30, 20:30] = 1
    volume[4, 0, 0] = 2
    stack = geometry.stack({str(i): axial(5.0 * i) for i in range(5)})
    found = {each.name: each for each in measure(stack, labelled(volume), CLASSES)}
    assert found["intracerebral"].components == 2
    assert found["intracerebral"].largest_ml == pytest.approx(200 * 0.25 * 5 / 1000)
    # a square of 5 mm with diagonals of 7.07 mm on two slices
    assert found["intracerebral"].abc2_ml == pytest.approx(50 * 10 / 2000)
    assert found["subdural"].components == 1
    assert list(found) == ["intracerebral", "subdural"]  # largest first


def test_what_is_too_small_is_mentioned_and_is_no_finding():
    volume = np.zeros((5, 40, 40), int)
    volume[2, :20, :20] = 1  # 0.5 ml
    volume[2, 30, 30] = 2
    stack = geometry.stack({str(i): axial(5.0 * i) for i in range(5)})
    bundle = SimpleNamespace(classes=CLASSES, operating_point=dict.fromkeys(CLASSES[1:], OperatingPoint(0.4)))
    report = compose(stack, labelled(volume), bundle, MODEL, RULES)
    assert [each.name for each in report.findings] == ["intracerebral"]
    assert report.absent == ("subdural",)
    assert report.below_threshold == (("subdural", pytest.approx(0.00125)),)
    assert report.decision.level == "urgent"
    assert not report.provisional


@pytest.mark.parametrize(
    ("point", "found"),
    [
        (OperatingPoint(0.4), ["intracerebral"]),
        (OperatingPoint(0.4, 0.9), ["intracerebral"]),
        (OperatingPoint(0.4, 0.91), []),
        (OperatingPoint(0.4, 0.0, 2), ["intracerebral"]),
        (OperatingPoint(0.4, 0.0, 3), []),
        (OperatingPoint(3.0), []),
    ],
)
def test_what_is_below_the_operating_point_in_any_way_is_no_finding(point: OperatingPoint, found: list[str]):
    volume = np.zeros((5, 40, 40), int)
    volume[[0, 2, 3], :20, :20] = 1  # 1.5 ml
    stack = geometry.stack({str(i): axial(5.0 * i) for i in range(5)})
    bundle = SimpleNamespace(classes=CLASSES, operating_point=dict.fromkeys(CLASSES[1:], point))
    report = compose(stack, labelled(volume), bundle, MODEL, RULES)
    assert [each.name for each in report.findings] == found
    assert report.decision.level == ("urgent" if found else "routine")
    assert [name for name, _ in report.below_threshold] == ([] if found else ["intracerebral"])
    assert report.operating_point["subdural"] == point


def test_neighbours_end_at_a_gap():
    """Slices 1 and 2 lie 15 mm apart where the others lie 5: two in a row, not four."""
    stack = geometry.stack({str(i): axial(z) for i, z in enumerate([0, 5, 20, 25, 30])})
    assert in_a_row(stack, {"0", "1", "2", "3"}) == 2
    assert in_a_row(stack, {"2", "3", "4"}) == 3
    assert in_a_row(stack, ()) == 0


def test_an_operating_point_says_itself():
    assert str(OperatingPoint(0.5)) == "from 0.5 ml"
    assert str(OperatingPoint(0.5, 0.9, 2)) == "from 0.5 ml, probability 0.9, 2 neighbouring slices"


def test_gaps_and_what_the_caller_misses_make_a_report_provisional_and_are_named():
    stack = geometry.stack({str(i): axial(z) for i, z in enumerate([0, 5, 15, 20])})
    bundle = SimpleNamespace(classes=CLASSES, operating_point={})
    empty = labelled(np.zeros((4, 8, 8), int))
    report = compose(stack, empty, bundle, MODEL, RULES, missing=["the sender broke off"], left_out=["1 localizer"])
    assert report.provisional
    assert report.missing == (
        "the sender broke off",
        "1 slice missing: a step of 10.0 mm after slice 2",
        "1 localizer",
    )
    whole = geometry.stack({str(i): axial(5.0 * i) for i in range(4)})
    report = compose(whole, empty, bundle, MODEL, RULES, left_out=["1 localizer"])
    assert not report.provisional
    assert report.missing == ("1 localizer",)


@pytest.mark.parametrize(
    ("findings", "level"),
    [
        ([], "routine"),
        ([finding("subdural", 12)], "critical"),
        ([finding("subdural", 9)], "urgent"),
        ([finding("subdural", 9), finding("intracerebral", 22)], "critical"),
    ],
)
def test_the_first_rule_that_holds_decides(findings: list[Finding], level: str):
    decision = decide(findings, RULES)
    assert decision.level == level
    for each in findings:
        assert each.name in decision.reason


def test_a_rule_about_a_class_that_the_model_does_not_have_is_refused():
    check_rules(RULES, CLASSES)
    with pytest.raises(RuleError, match="name epidrual; the model has intracerebral, subdural"):
        check_rules([Rule("critical", ("epidrual",), 1)], CLASSES)


def test_a_rule_may_want_company_and_say_why():
    rule = Rule("critical", ("intracerebral",), 5, also=("subdural",), reason="two kinds of blood")
    decision = decide([finding("intracerebral", 6), finding("subdural", 1)], [rule])
    assert decision == Decision(
        "critical", "two kinds of blood: intracerebral 6.0 ml, rule: intracerebral from 5 ml beside subdural"
    )
    assert decide([finding("intracerebral", 6)], [rule]).level == "routine"
    assert decide([finding("subdural", 6)], [rule]).level == "routine"
    for also in ("epidrual", "any"):
        with pytest.raises(RuleError, match=f"name {also}; the model has"):
            check_rules([replace(rule, also=(also,))], CLASSES)


def test_critical_is_higher_than_urgent_and_that_than_anything_else():
    order = enumerate([None, "urgent", "critical"])
    for (i, one), (j, other) in itertools.product(order, repeat=2):
        assert is_higher(one, other) == (i > j)
    assert not is_higher("incomplete", "routine")


def test_what_is_too_little_is_not_hidden_by_no_haemorrhage_found():
    assert "subdural 0.40 ml" in decide([], RULES, [("subdural", 0.4)]).reason


def test_findings_below_every_rule_are_still_named():
    decision = decide([finding("subdural", 1)], [Rule("critical", ("any",), 30)])
    assert decision.level == "routine"
    assert "subdural 1.0 ml" in decision.reason


def test_part_of_a_head_is_never_routine():
    decision = decide([], RULES, complete=False)
    assert decision == Decision("incomplete", "no haemorrhage found in the slices that are there")
    assert decide([], RULES, [("subdural", 0.4)], complete=False).level == "incomplete"
    assert decide([finding("subdural", 12)], RULES, complete=False).level == "critical"
