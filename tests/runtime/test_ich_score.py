"""The imaging part of the ICH score, on reports."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from runtime import ich_score
from tests.runtime.test_findings import finding


def told(*findings: tuple[str, float], absent: tuple[str, ...] = (), provisional: bool = False) -> SimpleNamespace:
    return SimpleNamespace(findings=tuple(finding(*each) for each in findings), absent=absent, provisional=provisional)


@pytest.mark.parametrize(
    ("findings", "absent", "points"),
    [
        ([("intracerebral", 29.99)], ("intraventricular",), 0),
        ([("intracerebral", 30.0)], ("intraventricular",), 1),
        ([("intracerebral", 3.0), ("intraventricular", 1.0)], (), 1),
        ([("intraventricular", 40.0), ("intracerebral", 31.0), ("subdural", 9.0)], (), 2),
        ([("intracerebral", 10.0), ("subdural", 60.0)], ("intraventricular",), 0),  # volume of the intracerebral alone
    ],
)
def test_points(findings: list[tuple[str, float]], absent: tuple[str, ...], points: int):
    part = ich_score.score(told(*findings, absent=absent))
    assert part.points == points
    assert f"imaging part: {points} of 2 points" in str(part)
    for unknown in ("infratentorial", "age", "Glasgow"):
        assert unknown in str(part).partition("Not computable here: ")[2]


def test_without_intracerebral_blood_there_is_none():
    assert ich_score.score(told(("intraventricular", 40.0), ("subdural", 40.0))) is None


def test_what_may_still_come_makes_it_the_least():
    part = ich_score.score(told(("intracerebral", 31.0), absent=("intraventricular",), provisional=True))
    assert "at least 1 of 2 points" in str(part)


def test_a_model_without_ventricles_knows_nothing_of_them():
    part = ich_score.score(told(("intracerebral", 31.0)))
    assert part.is_ventricular is None
    assert "at least 1 of 2 points" in str(part)
