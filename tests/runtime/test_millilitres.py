"""Volumes in words."""

from __future__ import annotations

import pytest

from runtime.millilitres import said
from runtime.triage import decide


@pytest.mark.parametrize(
    ("volume_ml", "words"),
    [
        (31.249, "31.2 ml"),
        (1.0, "1.0 ml"),
        (0.52, "0.52 ml"),
        (0.005, "0.01 ml"),
        (0.0049, "under 0.01 ml"),
        (1e-9, "under 0.01 ml"),
        (0.0, "0.00 ml"),
    ],
)
def test_what_is_there_is_never_told_as_none(volume_ml: float, words: str):
    assert said(volume_ml) == words


def test_a_decision_tells_it_so():
    assert decide([], [], [("subarachnoid", 0.0012)]).reason.endswith("below it: subarachnoid under 0.01 ml")
