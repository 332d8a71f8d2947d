"""The overview: which slices it shows, that they can be told apart, and what stands beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pydicom
import pytest

from dicom_node.results import capture, codes, montage, result_set, sc, writing
from dicom_node.results.capture import Shown
from dicom_node.results.panel import Panel
from dicom_node.results.picture import BRAIN, grey, reduced
from tests.dicom_node import ct

if TYPE_CHECKING:
    from pathlib import Path

CASES = ct.cases()


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_first_of_the_series_and_as_large_as_the_others(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    paths = writing.write(ct.built(name), tmp_path)
    overview, key_slice = (pydicom.dcmread(paths[role]) for role in ("sc-1", "sc-2"))
    assert overview.InstanceNumber == 1 + (case.revision - 1) * sc.A_REVISION
    assert overview.SeriesInstanceUID == key_slice.SeriesInstanceUID
    assert (overview.Rows, overview.Columns) == (key_slice.Rows, key_slice.Columns)
    shown = [item.ReferencedSOPInstanceUID for item in overview.SourceImageSequence]
    assert shown == list(montage.tiles(case.report, case.keys))
    drawn = [Shown(case.sources[n], case.grey[n], case.labels[n]) for n in map(case.keys.index, shown)]
    np.testing.assert_array_equal(overview.pixel_array, np.asarray(montage.render(drawn, Panel(case.report))))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("count", [1, 5, 12, 16, 17, 40, 300])
def test_tiles_go_through_the_head_in_order_with_every_key_slice(name: str, count: int) -> None:
    report = CASES[name].report
    keys = [finding.key_slice for finding in report.findings]
    keys += [f"other {number}" for number in range(max(0, count - len(keys)))]
    chosen = [keys.index(key) for key in montage.tiles(report, keys)]
    assert chosen == sorted(chosen)
    assert len(set(chosen)) == len(chosen) == min(montage.MAX_TILES, len(keys))
    assert {finding.key_slice for finding in report.findings} <= {keys[index] for index in chosen}
    assert max(np.diff([-1, *chosen, len(keys)])) <= 3 * len(keys) / len(chosen) + 1  # no part is left out


def test_the_tile_of_a_key_slice_is_framed_in_its_colour() -> None:
    case = CASES["one finding"]
    (finding,) = case.report.findings
    drawn = [*map(Shown, case.sources, case.grey, case.labels)]
    picture = np.asarray(montage.render(drawn, Panel(case.report)))
    side = capture.SIDE // 4
    colour = np.array(codes.look_up(finding.name).colour)
    for number, key in enumerate(case.keys):
        row, column = side * (number // 4), side * (number % 4)
        edge = picture[row + 1, column : column + side]
        assert (edge == colour).all() == (key == finding.key_slice)


def test_tiles_that_were_reduced_before_look_like_those_of_whole_slices() -> None:
    size, (rows, columns) = 512, np.mgrid[:512, :512]
    hu = np.where((rows - 256) ** 2 + (columns - 256) ** 2 < 200**2, 30 + rows // 32, -1000).astype(np.int16)
    hu[200:240, 200:260] = 70
    labels = (hu == 70).astype(np.uint8) * 2
    case = CASES["one finding"]
    whole, tile = grey(hu, BRAIN), reduced(grey(hu, BRAIN))
    assert tile.shape == (size // 2, size // 2)
    pictures = [
        np.asarray(montage.render([Shown(one, shown, labels) for one in case.sources], Panel(case.report))).astype(int)
        for shown in (whole, tile)
    ]
    apart = np.abs(pictures[0] - pictures[1])
    assert apart.mean() < 0.5
    assert apart.max() < 40, "where the head ends"


@pytest.mark.parametrize("shown", [np.zeros((8, 8), np.int16), np.zeros((8, 8, 3), np.uint8)], ids=["HU", "RGB"])
def test_what_is_no_slice_at_a_window_is_refused(shown: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"a picture of \d dimensions in"):
        Shown(CASES["one finding"].sources[0], shown, None)


def test_it_shows_what_has_been_found_and_no_other_class() -> None:
    case = CASES["below threshold"]
    picture = montage.render([*map(Shown, case.sources, case.grey, case.labels)], Panel(case.report))
    tiles = np.asarray(picture)[:, : capture.SIDE].astype(int)
    for name, is_shown in (("intracerebral", True), ("subdural", False)):
        assert (np.abs(tiles - codes.look_up(name).colour) < 40).all(axis=2).any() == is_shown


def test_sites_colours_reach_the_pictures() -> None:
    case = CASES["one finding"]
    colour = (0, 255, 255)
    own = {"subdural": codes.OwnCode(codes.HEMORRHAGE, codes.BRAIN, "Subdural haematoma", colour)}
    for image in case.build(result_set.Form(codes=own)).sc:
        assert (image.pixel_array == colour).all(axis=2).sum() > 100
    for image in ct.built("one finding").sc:
        assert not (image.pixel_array == colour).all(axis=2).any()
