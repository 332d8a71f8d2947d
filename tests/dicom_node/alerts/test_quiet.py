"""Quiet hours: over midnight, and through the nights on which the clock jumps."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest

from dicom_node.alerts.quiet import QuietHours


@pytest.fixture(autouse=True)
def berlin(monkeypatch: pytest.MonkeyPatch):
    """Central European time, by POSIX's rule: no time zone files are needed."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def at(*when: int) -> float:
    """Seconds since the epoch, of a time in UTC."""
    return datetime(*when, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("hours", "now", "until"),
    [
        ("22:00-06:30", at(2026, 1, 10, 20, 59, 59), None),
        ("22:00-06:30", at(2026, 1, 10, 21, 0), at(2026, 1, 11, 5, 30)),
        ("22:00-06:30", at(2026, 1, 11, 3, 0, 30), at(2026, 1, 11, 5, 30)),
        ("22:00-06:30", at(2026, 1, 11, 5, 30), None),
        ("12:00 - 14:00", at(2026, 7, 1, 10, 0), at(2026, 7, 1, 12, 0)),
        ("12:00-14:00", at(2026, 7, 1, 12, 0), None),
        ("22:00-06:30", at(2026, 3, 28, 22, 0), at(2026, 3, 29, 4, 30)),  # the clock goes forward at 2
        ("22:00-02:30", at(2026, 3, 29, 0, 30), at(2026, 3, 29, 1, 0)),  # there is no 2:30 that night
        ("02:15-03:00", at(2026, 3, 29, 1, 0), None),  # and none of these hours
        ("22:00-06:30", at(2026, 10, 24, 21, 0), at(2026, 10, 25, 5, 30)),  # back at 3
        ("22:00-02:30", at(2026, 10, 25, 0, 15), at(2026, 10, 25, 0, 30)),  # its first 2:15
        ("22:00-02:30", at(2026, 10, 25, 0, 45), None),
        ("22:00-02:30", at(2026, 10, 25, 1, 15), at(2026, 10, 25, 1, 30)),  # its second
    ],
)
def test_until_when(hours: str, now: float, until: float | None):
    assert QuietHours.parse(hours).until(now) == until


@pytest.mark.parametrize("text", ["", "22-6", "24:00-06:00", "22:00", "22:00-06:60", "08:00-08:00", "2:00-3:00"])
def test_what_is_none(text: str):
    with pytest.raises(ValueError, match=r"two times|begins when it ends"):
        QuietHours.parse(text)
