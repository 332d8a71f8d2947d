"""What a clinic would notice between two precisions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from runtime import geometry
from runtime.report import compose
from runtime.triage import Rule
from runtime.types import ModelIdentity, OperatingPoint, Plane, SliceLabels
from runtime.verdict import Budget, compare, judge

CLASSES = ("background", "subdural", "contusion")
BOTH = (2, 12, 10, 14)  # 3.9 ml of contusion, so that neither class goes unjudged
RULES = (Rule("critical", ("subdural",), 10.0), Rule("urgent", ("any",), 0.0))
MODEL = ModelIdentity("m", "1", "0", "fp32", "none", "nothing")


@dataclass(frozen=True)
class Operating:
    """The bundle's part that a report asks for."""

    classes: tuple[str, ...] = CLASSES
    operating_point: Mapping[str, OperatingPoint] = field(
        default_factory=lambda: dict.fromkeys(CLASSES[1:], OperatingPoint(0.5))
    )


def volume(*blocks: tuple[int, int, int, int]) -> np.ndarray:
    """20 slices of 100 x 100 voxels of 0.005 ml; a block: class, first slice, first row, edge in voxels (depth 4)."""
    labels = np.zeros((20, 100, 100), np.uint8)
    for c, z, row, edge in (*blocks, BOTH) if blocks else ():
        labels[z : z + 4, row : row + edge, 10 : 10 + edge] = c
    return labels


def difference(one: np.ndarray, two: np.ndarray):
    planes = {str(i): Plane((0.0, 0.0, 5.0 * i), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 1.0), 5.0) for i in range(20)}
    stack = geometry.stack(planes)

    def answer(labels: np.ndarray):
        slices = {
            str(i): SliceLabels(one, np.bincount(one.ravel(), minlength=3), np.ones(3, np.float32))
            for i, one in enumerate(labels.copy())
        }
        return slices, compose(stack, slices, Operating(), MODEL, RULES)

    return compare("head", stack, answer(one), answer(two), 3, RULES)


LARGE = (1, 2, 10, 30)  # 18 ml of subdural blood


def verdict(
    one: np.ndarray, two: np.ndarray, budget: Budget | None = None, logits: tuple[float, float] | None = (0.0, 0.0)
):
    return judge([difference(one, two)], budget or Budget(), CLASSES, logits)


def test_what_is_the_same_passes_and_says_so_in_numbers():
    same = verdict(volume(LARGE), volume(LARGE))
    assert same.passed
    assert same.reasons == ()
    assert same.figures["dice"] == {"subdural": 1.0, "contusion": 1.0}
    assert same.figures["worst_volume_change"]["ml"] == 0
    assert same.figures["decisions_flipped"] == 0


def test_series_without_blood_prove_nothing():
    empty = verdict(volume(), volume())
    assert not empty.passed
    assert empty.reasons == ("FP32 shows less than 1 ml of subdural, contusion: these series prove nothing of it",)
    assert not empty.is_decided
    assert verdict(volume(), volume(), logits=(9.0, 9.0)).is_decided, "something else is against it"


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (volume((1, 2, 10, 28)), "subdural: Dice 0.9"),
        (volume((1, 2, 10, 28)), r"head: subdural 18.00 -> 15.68 ml"),
        (volume((2, 2, 10, 30)), "head: contusion 3.92 -> 21.92 ml"),
        (volume((2, 2, 10, 30)), "head: findings subdural, contusion -> contusion"),
        (volume((1, 2, 10, 30), (2, 12, 60, 6)), "0 small lesions lost and 1 invented"),
        (volume((1, 2, 10, 22)), "head: triage critical -> urgent"),
        (volume(), "head: triage critical -> routine"),
        (volume(LARGE) * (volume(LARGE) < 2), "head: findings subdural, contusion -> subdural"),
    ],
)
def test_what_differs_is_named(other: np.ndarray, reason: str):
    found = verdict(volume(LARGE), other)
    assert not found.passed
    assert any(re.search(reason, text) for text in found.reasons), found.reasons


def test_a_small_lesion_that_is_lost_fails_where_every_mean_would_let_it_pass():
    small = (2, 12, 60, 6)  # 0.72 ml
    found = verdict(volume(LARGE, small), volume(LARGE))
    assert found.reasons == (
        "contusion: Dice 0.9159 against FP32, at least 0.98",
        "head: contusion 4.64 -> 3.92 ml",
        "1 small lesions lost and 0 invented, at most 0",
    )
    lenient = replace(Budget(), small_lesions=1, volume_ml=1.0, dice=0.9)
    assert verdict(volume(LARGE, small), volume(LARGE), lenient).passed


def test_a_decision_on_the_edge_of_a_rule_is_counted_apart():
    """10.00 ml are critical, 9.99 are not: no precision can promise that."""
    just, under = (volume((1, 0, 0, 20), (1, 4, 0, 10)) for _ in range(2))
    under[0, 0, 10] = 0
    found = verdict(just, under)
    assert found.passed
    assert (found.figures["decisions_flipped"], found.figures["decisions_differing_on_the_edge_of_a_rule"]) == (0, 1)


def test_specks_are_noise_in_every_precision():
    speck = (1, 12, 60, 2)  # 0.08 ml
    assert verdict(volume(LARGE, speck), volume(LARGE)).passed


@pytest.mark.parametrize(("edge", "lost"), [(6, 0), (5, 1), (1, 1)])
def test_a_lesion_of_which_less_than_half_is_left_is_lost(edge: int, lost: int):
    found = difference(volume((1, 2, 10, 8)), volume((1, 2, 10, edge)))
    assert (found.lost, found.invented) == (lost, 0)


def test_a_class_that_was_never_shown_is_not_passed():
    only = volume(LARGE) * (volume(LARGE) < 2)
    found = verdict(only, only)
    assert found.reasons == ("FP32 shows less than 1 ml of contusion: these series prove nothing of it",)


@pytest.mark.parametrize("logits", [(0.5, 1.0), (float("nan"), float("nan"))])
def test_logits_far_off_fail_and_so_do_those_that_are_no_numbers(logits: tuple[float, float]):
    found = verdict(volume(LARGE), volume(LARGE), logits=logits)
    assert not found.passed
    assert "logits differ by" in found.reasons[0]
    assert verdict(volume(LARGE), volume(LARGE), logits=None).passed
