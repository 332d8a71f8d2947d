from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pydicom
import pytest

from dicom_node.results import capture, codes, panel, sc, writing
from dicom_node.results.panel import Panel
from dicom_node.results.picture import BRAIN, grey
from dicom_node.results.source import plane
from runtime.types import Plane
from tests.dicom_node import ct

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

CASES = ct.cases()


def coloured(picture: NDArray[np.uint8], name: str) -> NDArray[np.bool_]:
    """Where the picture beside the panel has the colour of a class."""
    colour = np.array(codes.look_up(name).colour)
    return (np.abs(picture[:, : capture.SIDE].astype(int) - colour) < 40).all(axis=2)


def drawn(mask: NDArray[np.bool_], hu: int = 40, **options: object) -> NDArray[np.uint8]:
    """A picture of one subdural on an even grey."""
    labels = mask.astype(np.uint8) * 2
    case = CASES["one finding"]
    shown = grey(np.full(mask.shape, hu, dtype=np.int16), BRAIN)
    return np.asarray(capture.render(shown, labels, Panel(case.report), "1.2.3", **options))


def test_contour_surrounds_the_class_and_leaves_its_inside_untouched() -> None:
    mask = np.zeros((512, 512), dtype=bool)
    mask[200:300, 100:160] = True
    line = coloured(drawn(mask), "subdural")
    rows, columns = np.nonzero(line)
    assert rows.min() == pytest.approx(300, abs=4)
    assert rows.max() == pytest.approx(450, abs=4)
    assert columns.min() == pytest.approx(150, abs=4)
    assert columns.max() == pytest.approx(240, abs=4)
    inside = drawn(mask)[306:444, 156:234]
    assert (inside == 127).all()


@pytest.mark.parametrize("row", range(100, 104))
@pytest.mark.parametrize("side", [128, 256, 400, 512, 768, 1024])
def test_a_lone_pixel_keeps_a_contour(row: int, side: int) -> None:
    mask = np.zeros((side, side), dtype=bool)
    mask[row, 101] = True
    assert coloured(drawn(mask), "subdural").sum() >= 4


@pytest.mark.parametrize("corner", [(slice(0, 3), slice(0, 3)), (slice(-3, None), slice(-3, None))])
def test_a_class_at_the_edge_of_the_image_is_drawn(corner: tuple[slice, slice]) -> None:
    mask = np.zeros((512, 512), dtype=bool)
    mask[corner] = True
    assert coloured(drawn(mask), "subdural").any()


def test_a_class_without_a_finding_is_not_drawn() -> None:
    mask = np.zeros((128, 128), dtype=bool)
    mask[40:60, 40:60] = True
    labels = mask.astype(np.uint8)  # class 1 is below the threshold here
    shown = np.full(mask.shape, 127, dtype=np.uint8)
    picture = capture.render(shown, labels, Panel(CASES["one finding"].report), "1.2.3")
    assert not coloured(np.asarray(picture), "intracerebral").any()


@pytest.mark.parametrize(("hu", "grey"), [(-1000, 0), (0, 0), (40, 127), (80, 255), (3000, 255), (-32768, 0)])
def test_brain_window(hu: int, grey: int) -> None:
    picture = drawn(np.zeros((64, 64), dtype=bool), hu=hu)
    assert (picture[100, 100] == grey).all()


def test_pixels_that_are_not_square_keep_the_shape_of_the_head() -> None:
    tall = Plane((0, 0, 0), (1, 0, 0), (0, 1, 0), spacing_mm=(1.0, 0.5), thickness_mm=5)
    picture = drawn(np.zeros((64, 64), dtype=bool), plane=tall)
    shown = picture[20, : capture.SIDE].any(axis=1)
    assert shown.sum() == capture.SIDE // 2
    assert not shown[: capture.SIDE // 4].any()


def test_sides_are_marked_only_where_the_plane_is_known() -> None:
    black = np.zeros((64, 64), dtype=bool)
    edge = (slice(340, 430), slice(0, 40))
    assert not drawn(black, hu=-1000)[edge].any()
    feet_first = Plane((0, 0, 0), (-1, 0, 0), (0, 1, 0), spacing_mm=(1.0, 1.0))
    head_first = Plane((0, 0, 0), (1, 0, 0), (0, 1, 0), spacing_mm=(1.0, 1.0))
    left, right = drawn(black, hu=-1000, plane=feet_first)[edge], drawn(black, hu=-1000, plane=head_first)[edge]
    assert left.any()
    assert right.any()
    assert (left != right).any()


@pytest.mark.parametrize("name", CASES)
def test_key_slices_show_every_finding_and_no_more_than_fit(name: str) -> None:
    case = CASES[name]
    chosen = capture.key_slices(case.report, case.keys)
    firsts = [finding.key_slice for finding in case.report.findings]
    most = min(max(len(set(firsts)), capture.ENOUGH), capture.MAX_IMAGES) if firsts else 4
    assert 0 < len(chosen) <= most
    assert list(chosen[: len(set(firsts))]) == list(dict.fromkeys(firsts)), "the largest finding comes first"
    assert {finding.key_slice for finding in case.report.findings} <= set(chosen)


@pytest.mark.parametrize(
    ("findings", "chosen"),
    [
        (1, ["5", "3", "7"]),
        (2, ["5", "15", "3"]),
        (5, ["5", "15", "25", "35", "45"]),
        (9, ["5", "15", "25", "35", "45", "55", "65", "75"]),
    ],
)
def test_few_findings_show_their_extent_and_many_get_a_picture_each(findings: int, chosen: list[str]) -> None:
    report = CASES["one finding"].report
    made = [
        replace(
            report.findings[0], keys=tuple(str(10 * first + n) for n in range(1, 10)), key_slice=str(10 * first + 5)
        )
        for first in range(findings)
    ]
    report = replace(report, findings=tuple(made))
    assert list(capture.key_slices(report, [str(number) for number in range(100)])) == chosen


@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_key_slices_of_a_negative_study_are_spread(count: int) -> None:
    keys = [str(number) for number in range(count)]
    chosen = [int(key) for key in capture.key_slices(CASES["negative"].report, keys)]
    assert len(chosen) == min(count, 4) or count < 4
    if count == 40:
        assert chosen == [10, 16, 23, 30]


@pytest.mark.parametrize("name", CASES)
def test_images_read_back_as_rendered_and_name_their_source(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    paths = writing.write(ct.built(name), tmp_path)
    keys = capture.key_slices(case.report, case.keys)
    assert [role for role in paths if role.startswith("sc")] == [f"sc-{n}" for n in range(1, len(keys) + 2)]
    for number, key in enumerate(keys, start=2):
        image = pydicom.dcmread(paths[f"sc-{number}"])
        index = case.keys.index(key)
        source = case.sources[index]
        caption = f"Series {source.SeriesNumber}, image {source.InstanceNumber}" if "SeriesNumber" in source else ""
        expected = capture.render(
            case.grey[index], case.labels[index], Panel(case.report), key, plane=plane(source), caption=caption
        )
        np.testing.assert_array_equal(image.pixel_array, np.asarray(expected))
        assert image.SourceImageSequence[0].ReferencedSOPInstanceUID == key
        assert image.InstanceNumber == number + (case.revision - 1) * sc.A_REVISION
        assert list(image.PatientOrientation) == ["L", "P"]
        assert image.BurnedInAnnotation == "NO"
        assert image.BodyPartExamined == "HEAD"
        assert (image.DateOfSecondaryCapture, image.TimeOfSecondaryCapture) == ("20260304", "050607.800000")


def test_a_picture_of_a_foreign_slice_is_refused() -> None:
    case = CASES["one finding"]
    with pytest.raises(ValueError, match=r"not of this series: 9\.9"):
        ct.build(case.sources, case.labels, {"9.9": case.grey[0]}, case.report, revision=1, started=ct.STARTED)


def test_the_panel_holds_long_reports_above_its_footer() -> None:
    case = CASES["six findings"]
    report = ct.report(
        case.sources,
        case.labels,
        provisional=True,
        missing=tuple(
            f"{number} slices missing: a step of 20.0 mm after slice {number}, {'m' * 90}" for number in range(9)
        ),
    )
    short, full = (
        np.asarray(capture.render(case.grey[5], case.labels[5], Panel(one), case.keys[5]))
        for one in (case.report, report)
    )
    footer = (slice(panel.FOOTER, None), slice(capture.SIDE, None))
    np.testing.assert_array_equal(full[footer], short[footer])
    right_margin = full[61:, -panel.MARGIN + 1 :]
    assert (right_margin == panel.BACKGROUND).all()
