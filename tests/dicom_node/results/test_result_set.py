from __future__ import annotations

import logging
import os
import shutil
import subprocess
import warnings
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import highdicom as hd
import numpy as np
import pydicom
import pytest
from structlog.testing import capture_logs

from dicom_node.results import result_set, uids, writing
from dicom_node.results.picture import BRAIN, grey
from runtime.types import ModelIdentity
from tests.dicom_node import ct

if TYPE_CHECKING:
    pass

CASES = ct.cases()
CORPUS = Path(__file__).parents[3].parent / "shared" / "corpus"
needs_dicom3tools = pytest.mark.skipif(
    shutil.which("dciodvfy") is None, reason="dciodvfy not installed: apt-get install dicom3tools"
)
needs_dcmtk = pytest.mark.skipif(shutil.which("dsrdump") is None, reason="dsrdump not installed: apt-get install dcmtk")
needs_pixelmed = pytest.mark.skipif(
    shutil.which("DicomSRValidator") is None, reason="DicomSRValidator not installed: apt-get install pixelmed-apps"
)
needs_corpus = pytest.mark.skipif(
    not CORPUS.is_dir(), reason=f"{CORPUS} not there: real series are not part of the repository"
)


def run(*command: str | Path, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False, env={**os.environ, **environment}
    )
    return done.returncode, done.stdout + done.stderr


def real_case() -> ct.Case:
    """A real head CT with 18.5 degrees of tilt, slices of 4 and 7 mm, and bleeds that are only in the labels."""
    files = sorted((CORPUS / "01_head_ge_tilt18_varspacing").glob("*.dcm"))
    sources = [pydicom.dcmread(path) for path in files]
    hu = np.stack([s.pixel_array * int(s.RescaleSlope) + int(s.RescaleIntercept) for s in sources]).astype(np.int16)
    for source in sources:
        del source.PixelData
    labels = np.zeros(hu.shape, dtype=np.uint8)
    labels[10:18, 220:280, 150:200] = 1
    labels[14, 198:203, 328:333] = 4
    return ct.Case(sources, labels, hu, ct.report(sources, labels))


@needs_dicom3tools
@pytest.mark.parametrize("name", CASES)
def test_dciodvfy_finds_no_error(name: str, tmp_path: Path) -> None:
    for path in writing.write(ct.built(name), tmp_path).values():
        _, said = run("dciodvfy", "-new", path)
        assert [line for line in said.splitlines() if line.startswith("Error")] == []
        assert {"Segmentation", "Comprehensive3DSR", "SCImage"} & {*said.splitlines()}


@needs_dicom3tools
def test_dcentvfy_finds_one_patient_and_one_study(tmp_path: Path) -> None:
    case = CASES["six findings"]
    paths = list(writing.write(ct.built("six findings"), tmp_path).values())
    for index, source in enumerate(case.sources):
        paths.append(tmp_path / f"ct-{index}.dcm")
        source.save_as(paths[-1], implicit_vr=False, little_endian=True)
    _, said = run("dcentvfy", *paths)
    assert [line for line in said.splitlines() if line.startswith("Error")] == []


@needs_dcmtk
@pytest.mark.parametrize("name", CASES)
def test_dsrdump_reads_the_report(name: str, tmp_path: Path) -> None:
    code, said = run("dsrdump", "+Pc", writing.write(ct.built(name), tmp_path)["sr"])
    assert code == 0
    assert not [line for line in said.splitlines() if line.startswith(("E:", "F:"))]
    assert "Qualitative Evaluations" in said


@needs_pixelmed
@pytest.mark.slow
@pytest.mark.parametrize("name", ["six findings", "negative", "revision 2"])
def test_pixelmed_finds_no_error_against_tid_1500(name: str, tmp_path: Path) -> None:
    limits = " ".join(
        f"-Djdk.xml.{limit}=0" for limit in ("xpathTotalOpLimit", "xpathExprOpLimit", "xpathExprGrpLimit")
    )
    path = writing.write(ct.built(name), tmp_path)["sr"]
    _, said = run("DicomSRValidator", path, JAVA_TOOL_OPTIONS=limits)
    assert "Root Template Validation Complete" in said
    assert "IOD validation complete" in said
    assert [line for line in said.splitlines() if line.startswith("Error")] == []


@needs_corpus
@needs_dicom3tools
def test_a_real_tilted_series_with_two_thicknesses(tmp_path: Path) -> None:
    case = real_case()
    paths = writing.write(case.build(), tmp_path)
    for path in paths.values():
        _, said = run("dciodvfy", "-new", path)
        assert [line for line in said.splitlines() if line.startswith("Error")] == []
    segmentation = hd.seg.segread(paths["seg"])
    sources = dict(zip(case.keys, case.sources, strict=True))
    thicknesses = set()
    for frame in segmentation.PerFrameFunctionalGroupsSequence:
        source = sources[frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID]
        position = frame.PlanePositionSequence[0].ImagePositionPatient
        assert [str(value) for value in position] == [str(value) for value in source.ImagePositionPatient]
        thicknesses.add(float(frame.PixelMeasuresSequence[0].SliceThickness))
    assert thicknesses == {4.0, 7.0}
    pixels = segmentation.get_pixels_by_source_instance(
        case.keys, combine_segments=True, assert_missing_frames_are_empty=True
    )
    assert [f.name for f in case.report.findings] == ["intracerebral", "subarachnoid"]
    np.testing.assert_array_equal(pixels, np.where(case.labels == 4, 2, case.labels))


@pytest.mark.parametrize("name", ["six findings", "negative", "revision 2"])
def test_the_same_analysis_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    first = writing.write(ct.built(name), tmp_path / "first")
    again = writing.write(ct.cases()[name].build(), tmp_path / "again")
    assert first.keys() == again.keys()
    for role, path in first.items():
        assert path.read_bytes() == again[role].read_bytes(), role


def test_a_revision_is_new_objects_in_the_same_series() -> None:
    first, second = ct.built("one finding"), ct.built("revision 2")
    for one, other in ((first.seg, second.seg), (first.sr, second.sr), *zip(first.sc, second.sc, strict=True)):
        assert one.SOPInstanceUID != other.SOPInstanceUID
        assert one.file_meta.MediaStorageSOPInstanceUID != other.file_meta.MediaStorageSOPInstanceUID
        assert one.InstanceNumber != other.InstanceNumber
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "Modality"):
            assert one[keyword].value == other[keyword].value
        assert "SeriesDate" not in one  # it would differ between revisions of one series
    assert first.seg.SegmentSequence[0].TrackingUID == second.seg.SegmentSequence[0].TrackingUID


def test_every_object_has_a_uid_of_its_own_and_says_who_made_it() -> None:
    built = ct.built("six findings")
    every = [built.seg, built.sr, *built.sc]
    assert len({dataset.SOPInstanceUID for dataset in every}) == len(every)
    assert len({dataset.SeriesInstanceUID for dataset in every}) == 3
    assert [dataset.SeriesNumber for dataset in every] == [2992, 2993, *[2991] * len(built.sc)]
    for dataset in every:
        assert pydicom.uid.UID(dataset.SOPInstanceUID).is_valid
        assert dataset.Manufacturer == "scanside"
        assert dataset.ManufacturerModelName == ct.MODEL.name
        assert dataset.SoftwareVersions == ct.MODEL.version
        assert ct.MODEL.digest.startswith(dataset.DeviceSerialNumber.removeprefix("sha256 "))
        assert "Research AI" in dataset.SeriesDescription
        assert (str(dataset.ContentDate), str(dataset.ContentTime)) == ("20260304", "050607.800000")
        assert "InstanceCreationDate" not in dataset


def test_times_with_a_zone_are_written_as_local_time() -> None:
    started = datetime(2026, 3, 4, 12, tzinfo=UTC)
    case = CASES["negative"]
    built = ct.build(case.sources, case.labels, {}, case.report, revision=1, started=started)
    assert str(built.sr.ContentTime).startswith(started.astimezone().strftime("%H%M%S"))


def test_only_the_slices_that_are_given_are_pictured() -> None:
    case = CASES["one finding"]
    built = ct.build(case.sources, case.labels, {}, case.report, revision=1, started=ct.STARTED)
    assert built.sc == ()


def test_labels_that_do_not_match_the_sources_are_refused() -> None:
    case = CASES["one finding"]
    with pytest.raises(ValueError, match="12 source slices and 11 label maps"):
        ct.build(case.sources, case.labels[1:], {}, case.report, revision=1, started=ct.STARTED)


@pytest.mark.parametrize(
    "patient",
    [
        {"PatientName": "SECRET"},
        {"PatientName": "SECRET^" + 70 * "X"},
        {"PatientID": "SECRET" + 70 * "1"},
        {"PatientBirthDate": "SECRET"},
        {"AccessionNumber": "SECRET" + 20 * "1"},
    ],
    ids=str,
)
def test_no_patient_in_logs_and_warnings(
    patient: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sources = [ct.as_received(header) for header in ct.headers(**patient)]
    labels = ct.bleeds()
    report = ct.report(sources, labels)
    caplog.clear()
    caplog.set_level(logging.DEBUG)
    with warnings.catch_warnings(record=True) as warned, capture_logs() as events:
        warnings.simplefilter("always")
        pictured = {report.findings[0].key_slice: grey(ct.hounsfield(labels)[5], BRAIN)}
        writing.write(ct.build(sources, labels, pictured, report, revision=1, started=ct.STARTED), tmp_path)
    assert [event["event"] for event in events] in ([], ["sources_repaired"])
    said = caplog.text + "".join(str(each) for each in (*events, *(each.message for each in warned)))
    assert "SECRET" not in said


def test_repairs_are_logged_by_keyword() -> None:
    case = CASES["poor source"]
    with capture_logs() as events:
        case.build()
    (event,) = events
    assert (event["event"], event["series"]) == ("sources_repaired", "1.2.3.4.5")
    assert {"PatientSex", "FrameOfReferenceUID", "SliceThickness"} <= set(event["keywords"])
    assert "PatientID" not in event["keywords"]
    assert event["kept"] == ()
    worst = ct.headers(1, without=["PatientSex", "PatientID"])[0]
    with capture_logs() as events:
        result_set.build_notice(worst, "why", ct.MODEL, revision=1, started=ct.STARTED)
    assert [event["keywords"] for event in events] == [("PatientID", "PatientSex")]


class TestUids:
    ISSUE = uids.Issue("1.2", "1.2.3", 2, ct.MODEL, 1, ct.STARTED, "content")

    def test_parts_do_not_run_into_each_other(self) -> None:
        assert uids.derive("a", "bc") != uids.derive("ab", "c")
        assert uids.derive("a", "bc") == uids.derive("a", "bc")
        assert uids.derive("a").is_valid
        assert uids.derive("a").startswith("2.25.")

    @pytest.mark.parametrize(
        "changed",
        [
            {"study_uid": "1.9"},
            {"series_uid": "1.2.9"},
            {"model": ModelIdentity("other", "1.2.0", ct.MODEL.digest, "fp32", "b", "t")},
            {"model": ModelIdentity("ich-unet", "1.3.0", ct.MODEL.digest, "fp32", "b", "t")},
            {"model": ModelIdentity("ich-unet", "1.2.0", "f" * 64, "fp32", "b", "t")},
        ],
    )
    def test_another_series_or_model_names_everything_anew(self, changed: dict[str, object]) -> None:
        other = replace(self.ISSUE, **changed)
        assert other.instance("seg") != self.ISSUE.instance("seg")
        assert other.series("SEG") != self.ISSUE.series("SEG")
        assert other.tracking("subdural") != self.ISSUE.tracking("subdural")

    def test_what_a_revision_changes(self) -> None:
        second = replace(self.ISSUE, revision=2)
        assert second.instance("sr") != self.ISSUE.instance("sr")
        assert second.series("SR") == self.ISSUE.series("SR")
        assert second.tracking("subdural") == self.ISSUE.tracking("subdural")
        assert second.device == self.ISSUE.device

    def test_the_uids_of_a_known_series_never_change(self) -> None:
        assert self.ISSUE.instance("seg") == "2.25.209046007632729786447690110746346618935"

    @pytest.mark.parametrize(
        ("source", "number"),
        [(2, 2992), (None, 992), (0, 992), (-1, 992), (2_000_000, 2_000_000_992), (2_000_001, 992)],
    )
    def test_series_number_follows_the_source(self, source: int | None, number: int) -> None:
        issue = replace(self.ISSUE, series_number=source)
        assert issue.attributes("SEG", "seg", number=1)["series_number"] == number

    def test_long_names_are_cut_to_what_an_element_holds(self) -> None:
        model = ModelIdentity("n\\" * 60, "v" * 80, ct.MODEL.digest, "fp32", "b", "t")
        attributes = replace(self.ISSUE, model=model).attributes("SEG", "seg", number=1)
        for keyword in ("manufacturer_model_name", "software_versions", "series_description"):
            assert len(attributes[keyword]) <= 64
            assert "\\" not in attributes[keyword]
