from __future__ import annotations

from typing import TYPE_CHECKING

import highdicom as hd
import numpy as np
import pytest
from pydicom.pixels.utils import pack_bits
from pydicom.tag import Tag

from dicom_node.results import codes, result_set, seg, source, writing
from tests.dicom_node import ct

if TYPE_CHECKING:
    from pathlib import Path

    import pydicom

CASES = ct.cases()
_CLOCK = {Tag("InstanceCreationDate"), Tag("InstanceCreationTime")}
POSITIVE = [name for name, case in CASES.items() if case.report.findings]


def read_back(name: str, folder: Path) -> hd.seg.Segmentation:
    return hd.seg.segread(writing.write(ct.built(name), folder)["seg"])


def source_of(frame: pydicom.Dataset) -> str:
    return frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID


@pytest.mark.parametrize("name", POSITIVE)
def test_every_source_slice_reads_back_pixel_exact(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    segmentation = read_back(name, tmp_path)
    pixels = segmentation.get_pixels_by_source_instance(
        case.keys, combine_segments=True, assert_missing_frames_are_empty=True
    )
    expected = np.zeros_like(case.labels)
    for number, finding in enumerate(case.report.findings, start=1):
        expected[case.labels == finding.label] = number
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("name", POSITIVE)
def test_segments_are_the_findings_in_order_and_none_is_empty(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    segmentation = read_back(name, tmp_path)
    assert segmentation.SegmentationType == "BINARY"
    assert segmentation.segment_numbers == list(range(1, len(case.report.findings) + 1))
    for number, finding in enumerate(case.report.findings, start=1):
        described = segmentation.get_segment_description(number)
        code = codes.look_up(finding.name)
        assert described.segmented_property_category == codes.MORPHOLOGICALLY_ABNORMAL
        assert described.segmented_property_type == codes.HEMORRHAGE
        assert described.anatomic_regions == [code.site]
        assert described.algorithm_type == hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC
        assert described.algorithm_identification.family == codes.ARTIFICIAL_INTELLIGENCE
        assert described.algorithm_identification.name == ct.MODEL.name
        assert described.algorithm_identification.version == ct.MODEL.version
        assert described.tracking_id == finding.name
        lightness, red_green, blue_yellow = described.RecommendedDisplayCIELabValue
        assert hd.color.CIELabColor.from_rgb(*code.colour).value == (lightness, red_green, blue_yellow)
    per_segment = [
        segmentation.get_pixels_by_source_instance(
            case.keys, segment_numbers=[number], assert_missing_frames_are_empty=True
        ).sum()
        for number in segmentation.segment_numbers
    ]
    assert all(per_segment)


@pytest.mark.parametrize("name", POSITIVE)
def test_each_frame_has_its_own_sources_plane_to_the_letter(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    segmentation = read_back(name, tmp_path)
    sources = dict(zip(case.keys, case.sources, strict=True))
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    for frame in segmentation.PerFrameFunctionalGroupsSequence:
        source = sources[source_of(frame)]
        assert_same_strings(frame.PlanePositionSequence[0].ImagePositionPatient, source.ImagePositionPatient)
        orientation = macro(frame, shared, "PlaneOrientationSequence")
        assert_same_strings(orientation.ImageOrientationPatient, source.ImageOrientationPatient)
        measures = macro(frame, shared, "PixelMeasuresSequence")
        assert_same_strings(measures.PixelSpacing, source.PixelSpacing)
        if "SliceThickness" in source:
            assert_same_strings([measures.SliceThickness], [source.SliceThickness])


@pytest.mark.parametrize("kind", ["binary", "labelmap"])
@pytest.mark.parametrize("name", POSITIVE)
def test_frames_are_those_that_highdicom_makes_of_all_slices(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, asked = CASES[name], {}
    monkeypatch.setattr(seg, "Segmentation", lambda **about: asked.update(about) or hd.seg.Segmentation(**about))
    mine = case.build(result_set.Form(kind)).seg

    segments = np.zeros_like(case.labels)
    for number, finding in enumerate(case.report.findings, start=1):
        segments[case.labels == finding.label] = number
    shown = segments.any(axis=(1, 2))
    legal = [one for one, is_shown in zip(source.normalise(case.sources)[0], shown, strict=True) if is_shown]
    theirs = hd.seg.Segmentation(
        **asked | {"source_images": legal, "pixel_array": segments[shown], "omit_empty_frames": True}
    )
    assert mine.NumberOfFrames == theirs.NumberOfFrames
    assert mine.PixelData == theirs.PixelData
    assert mine.SourceImageSequence == theirs.SourceImageSequence
    assert mine.ReferencedSeriesSequence == theirs.ReferencedSeriesSequence
    for one, other in zip(mine.PerFrameFunctionalGroupsSequence, theirs.PerFrameFunctionalGroupsSequence, strict=True):
        for keyword in ("PixelMeasuresSequence", "PlaneOrientationSequence"):  # to the letter: other tests
            one.pop(keyword, None)
        assert one.to_json_dict() == other.to_json_dict()
    assert {*mine.keys()} ^ {*theirs.keys()} <= {Tag("DimensionOrganizationType"), *_CLOCK}


def macro(frame: pydicom.Dataset, shared: pydicom.Dataset, keyword: str) -> pydicom.Dataset:
    """The item of a functional group that is shared or per frame, never both (PS3.3 C.7.6.16)."""
    assert (keyword in frame) != (keyword in shared)
    return (frame if keyword in frame else shared)[keyword].value[0]


def assert_same_strings(mine: list, theirs: list) -> None:
    assert [str(value) for value in mine] == [str(value) for value in theirs]


def test_thickness_that_changes_within_the_series_is_written_per_frame(tmp_path: Path) -> None:
    segmentation = read_back("step change", tmp_path)
    written = {float(f.PixelMeasuresSequence[0].SliceThickness) for f in segmentation.PerFrameFunctionalGroupsSequence}
    assert written == {4.0, 7.0}
    assert "SpacingBetweenSlices" not in segmentation.PerFrameFunctionalGroupsSequence[0].PixelMeasuresSequence[0]


def test_spacing_between_slices_is_the_stacks_along_the_normal_even_if_frames_are_missing(tmp_path: Path) -> None:
    measures = read_back("tilt", tmp_path).SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert float(measures.SpacingBetweenSlices) == pytest.approx(5 * np.cos(np.radians(20)), abs=1e-6)


def test_orientations_that_differ_in_the_last_digit_are_kept(tmp_path: Path) -> None:
    case = ct.cases()["one finding"]
    shown = case.keys.index(case.report.findings[0].keys[1])
    case.sources[shown].ImageOrientationPatient = ["1", "0", "0", "0", "0.99999999", "-0.00000001"]
    segmentation = hd.seg.segread(writing.write(case.build(), tmp_path)["seg"])
    orientations = {
        source_of(frame): [str(v) for v in frame.PlaneOrientationSequence[0].ImageOrientationPatient]
        for frame in segmentation.PerFrameFunctionalGroupsSequence
    }
    assert orientations[case.keys[shown]][-1] == "-0.00000001"
    assert sum(values[-1] == "-0.00000001" for values in orientations.values()) == 1


def test_classes_below_the_threshold_are_left_out(tmp_path: Path) -> None:
    case = CASES["below threshold"]
    assert (case.labels == 2).any()
    segmentation = read_back("below threshold", tmp_path)
    assert [s.SegmentLabel for s in segmentation.SegmentSequence] == ["Intracerebral haemorrhage"]


def test_a_negative_study_has_none() -> None:
    assert ct.built("negative").seg is None


@pytest.mark.parametrize("kind", ["binary", "labelmap"])
def test_a_finding_without_a_pixel_is_refused(kind: str) -> None:
    form = result_set.Form(kind)
    case = CASES["one finding"]
    empty = ct.Case(case.sources, np.zeros_like(case.labels), case.hu, case.report)
    with pytest.raises(ValueError, match="no pixel shows subdural"):
        empty.build(form)
    two = CASES["tilt"]
    without_one = np.where(two.labels == 4, 0, two.labels)
    with pytest.raises(ValueError, match="no pixel shows subarachnoid"):
        ct.Case(two.sources, without_one, two.hu, two.report).build(form)


def test_it_lists_its_sources_and_the_frame_of_reference(tmp_path: Path) -> None:
    case = CASES["one finding"]
    segmentation = read_back("one finding", tmp_path)
    listed = {
        instance.ReferencedSOPInstanceUID
        for series in segmentation.ReferencedSeriesSequence
        for instance in series.ReferencedInstanceSequence
    }
    assert listed == set(case.report.findings[0].keys)
    assert segmentation.FrameOfReferenceUID == case.sources[0].FrameOfReferenceUID
    assert segmentation.StudyInstanceUID == case.sources[0].StudyInstanceUID
    assert segmentation.SeriesInstanceUID != case.sources[0].SeriesInstanceUID
    assert segmentation.ContentLabel == "HAEMORRHAGE"


def test_frames_whose_pixels_fill_no_byte_follow_each_other_without_a_gap() -> None:
    masks = np.random.default_rng(1).random((5, 9, 11)) < 0.5
    assert b"".join(seg._packed(masks)) == pack_bits(masks.astype(np.uint8), pad=False)
