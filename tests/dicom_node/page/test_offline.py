"""The report that opens offline: all in one file, nothing asked of anybody, and the same numbers."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from dicom_node.page import offline
from dicom_node.page.palette import Palette
from tests.dicom_node.page.conftest import Folder


def write(made: Folder, *, hide_names: bool = False, **series: object):
    placed = made.place(1, **series)
    report = made.analyse(placed, provisional=bool(series.get("slices")))
    target = made.path / "results" / "1.2.1" / "1.2.1.1" / "revision-1"
    html, montage = offline.write(
        placed.paths, target, report, placed.series_uid, palette=Palette(), hide_names=hide_names
    )
    return placed, report, html.read_text(), Image.open(io.BytesIO(montage.read_bytes()))


def stack_of(text: str) -> dict:
    return json.loads(re.search(r'id="stack">(.*?)</script>', text, re.DOTALL)[1])


def test_it_holds_slices_masks_and_numbers_and_asks_nobody(folder: Folder):
    placed, report, text, montage = write(folder, classes=(1, 2))
    stack = stack_of(text)
    assert len(stack["slices"]) == 12
    assert [bool(one["mask"]) for one in stack["slices"]] == [bool(m.any()) for m in placed.labels]
    for name in ("brain", "subdural", "bone"):
        kind, _, content = stack["slices"][4]["pictures"][name].partition(",")
        assert kind == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(content))).size == (64, 64)
    assert stack["slices"][stack["key"]]["classes"]
    for finding in report["findings"]:
        assert f"{finding['volume_ml']:.1f} ml" in text
    assert "not a medical device" in text.lower()
    assert re.findall(r"""(?:src|href|url\()=?["']?(?!data:)[^\s"'>]*//[^\s"'>]+""", text) == []
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'' in text
    assert montage.size == (offline.COLUMNS * offline.TILE, offline.HEADER + 2 * offline.TILE + offline.FOOTER)
    coloured = np.ptp(np.asarray(montage)[offline.HEADER : -offline.FOOTER].astype(int), axis=2) > 60
    assert coloured.any()


@pytest.mark.parametrize("name", ["</script><script>alert(1)</script>", "<!--<script>"])
def test_no_name_gets_out_of_its_place(folder: Folder, name):
    _, _, text, _ = write(folder, PatientName=name)
    assert name not in text
    assert text.count("<script") == 2


def test_names_may_be_left_out(folder: Folder):
    _, _, text, _ = write(folder, hide_names=True)
    assert "Doe" not in text
    assert "ID P1" in text


def test_of_a_thin_series_every_so_many_are_shown_and_it_says_so(folder: Folder, monkeypatch):
    monkeypatch.setattr(offline, "MOST_SLICES", 5)
    _, report, text, _ = write(folder)
    stack = stack_of(text)
    assert 4 <= len(stack["slices"]) <= 6
    assert "every 3rd of 12 and the key slices" in text
    assert stack["slices"][stack["key"]]["classes"] == [report["findings"][0]["name"]]
