"""What becomes of a series that is not analysed."""

from __future__ import annotations

from pathlib import Path

import pytest

from dicom_node.analysis import Analyser, Series
from dicom_node.gate import NotAnalysed, Reason

MISSING = "closed after 10 s without a new slice"


@pytest.mark.parametrize(
    ("reason", "verdict"),
    [
        (Reason.NOT_CT, "not a CT image"),
        (Reason.LOCALIZER, "a localizer"),
        (Reason.TRUNCATED, f"{Reason.TRUNCATED.value}; {MISSING}"),
    ],
)
def test_a_series_of_another_kind_lacks_nothing(reason: Reason, verdict: str, tmp_path: Path):
    analyser = Analyser(None, None, (), min_slices=5, min_coverage_mm=0, max_batch=4)
    outcome = analyser.close(Series(refused=[NotAnalysed(reason)]), tmp_path, revision=1, missing=(MISSING,))
    assert outcome.reason == verdict
