"""The study of alarms: what it counts, what it chooses, and the page that tells it."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.alarm_heads import Head, Job
from benchmarks.alarm_page import draw_clock, draw_sweep, page
from benchmarks.alarm_times import in_slices
from benchmarks.alarms import BEFORE, by_kind, by_trouble, choose, in_words, of_all, relax, sweep, whole
from runtime.triage import Rule
from runtime.types import OperatingPoint
from training.lesions import CLASSES
from training.phantom import Plane

RULES = (Rule("critical", ("any",), 30.0), Rule("urgent", ("any",), 0.0))
SLICES = 10


def head(seed: int, blood: dict[int, int], *, bleeds: bool = True, hard: bool = False) -> Head:
    """Slices of 10 mm with pixels of 10 mm2: so many of intracerebral blood in these, as the truth has it or not."""
    planes = [Plane((0.0, 0.0, 10.0 * i), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (4.0, 2.5), 10.0) for i in range(SLICES)]
    voxels = np.zeros((SLICES, len(CLASSES)), np.int64)
    for i, count in blood.items():
        voxels[i, 1] = count
    evidence = (voxels > 0).astype(np.float32)
    truth = voxels if bleeds else np.zeros_like(voxels)
    return Head(Job(seed, seed, bleeds, hard), tuple(planes), voxels, evidence, truth, 0.1 * truth.sum(axis=0))


@pytest.fixture
def heads() -> list[Head]:
    """A speck in one slice is wrong in two heads, one in two slices in another; what bleeds is in three."""
    kinds = (False, True)
    wrong = [head(i, {4: 8}, bleeds=False, hard=hard) for i, hard in enumerate(kinds)]
    wrong += [head(2, {4: 12, 5: 8}, bleeds=False), head(3, {}, bleeds=False, hard=True)]
    return [*wrong, *(head(4 + i, {2: 6, 3: 7, 4: 200, 5: 200}, hard=hard) for i, hard in enumerate(kinds))]


def test_what_is_chosen_loses_no_bleed_and_asks_for_least(heads: list[Head]):
    series = [whole(one) for one in heads]
    before = by_kind(series, of_all(BEFORE), RULES)
    assert (before["all"]["without_alarm"], before["all"]["bleed_free"]) == (1, 4)
    assert before["all"]["bleeding_with_alarm"] == 2
    chosen = choose(sweep(series, RULES), before)
    assert chosen["point"] == {"minimum_volume_ml": 0.25, "minimum_probability": 0.0, "minimum_slices": 3}
    assert chosen["all"]["without_alarm"] == 4
    small = [*series, whole(head(9, {4: 20}))]
    kept = choose(sweep(small, RULES), by_kind(small, of_all(BEFORE), RULES))
    assert kept["point"]["minimum_slices"] == 1, "it lies in one slice, and is 2 ml"
    assert kept["point"]["minimum_volume_ml"] == 1.0
    assert kept["all"]["without_alarm"] == 3


def test_classes_in_which_a_damper_takes_away_no_alarm_keep_what_they_had(heads: list[Head]):
    point = OperatingPoint(0.5, 0.0, 2)
    points = relax(point, [whole(one) for one in heads], RULES)
    assert points == of_all(BEFORE) | {"intracerebral": point}
    assert in_words(points).startswith("intracerebral from 0.5 ml, 2 neighbouring slices; subdural, epidural,")
    assert relax(point, [whole(heads[-1])], RULES) == of_all(BEFORE)


def test_an_alert_is_counted_from_the_first_slice_that_shows_blood(heads: list[Head]):
    told = in_slices(heads[-1], of_all(OperatingPoint(0.5, 0.0, 2)), RULES, "critical")
    assert (told["to_first_alert"], told["to_final_level"], told["to_the_end"]) == (3, 4, 8)
    assert in_slices(heads[0], of_all(OperatingPoint(0.5, 0.0, 2)), RULES, None)["to_first_alert"] is None


def test_the_page_tells_all_of_it(heads: list[Head], tmp_path):
    series = [whole(one) for one in heads]
    points = {name: of_all(BEFORE) for name in ("before", "uniform", "chosen", "shipped")}
    counted = {name: by_kind(series, these, RULES) for name, these in points.items()}
    clock = dict.fromkeys(("first_alert_s", "last_slice_s", "closed_s", "results_s"), 1.0) | {"final_level_s": None}
    found = {
        "machine": {"cpu": "a processor", "threads": 2},
        "bundle": {"name": "net", "version": "1"},
        "rules": [str(rule) for rule in RULES],
        "sweep": sweep(series, RULES),
        "before": str(BEFORE),
        "uniform": str(BEFORE),
        "chosen": in_words(of_all(BEFORE)),
        "min_slices": 5,
        "trouble": by_trouble(series, of_all(BEFORE), RULES),
        "chosen_on": counted,
        "told_of": counted,
        "in_slices": [in_slices(one, of_all(BEFORE), RULES, "critical" if one.job.bleeds else None) for one in heads],
        "on_the_clock": [clock],
    }
    assert sum(alarms for alarms, _ in found["trouble"].values()) == 1
    told = page(found)
    assert "1 of 4, 25.0% (4.6% to 69.9%)" in told
    assert "| the first alert | 3 | 3 to 3 |" in told
    assert "| the first alert | 1.00 | 1.00 to 1.00 |" in told
    draw_sweep(found, tmp_path / "sweep.png")
    draw_clock(found, tmp_path / "clock.png")
    assert all((tmp_path / name).stat().st_size > 5_000 for name in ("sweep.png", "clock.png"))
