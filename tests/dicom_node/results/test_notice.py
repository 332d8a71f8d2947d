"""A notice is a legal Secondary Capture of its study, whatever its source lacks."""

from __future__ import annotations

import shutil
import subprocess
from datetime import UTC, datetime

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage

from dicom_node.results import notice
from runtime.types import ModelIdentity
from tests.dicom_node import instances

MODEL = ModelIdentity("phantom-unet", "1.5.0", "ab" * 32, "fp32", "onnxruntime", "synthetic")
STARTED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
needs_dicom3tools = pytest.mark.skipif(
    shutil.which("dciodvfy") is None, reason="dciodvfy not installed: apt-get install dicom3tools"
)


def bare() -> Dataset:
    """What the worst source has: UIDs."""
    header = Dataset()
    header.SOPClassUID, header.SOPInstanceUID = CTImageStorage, "1.2.3.4.5.6"
    header.StudyInstanceUID, header.SeriesInstanceUID = "1.2.3.4", "1.2.3.4.5"
    return header


@needs_dicom3tools
@pytest.mark.parametrize("header", [bare(), instances.image(SeriesNumber=3)], ids=["bare", "usual"])
def test_it_is_legal_and_of_the_study(header, tmp_path):
    image, _ = notice.build(header, "slices that make no stack", MODEL, revision=2, started=STARTED)
    image.save_as(tmp_path / "notice.dcm", enforce_file_format=True)
    said = subprocess.run(
        ["dciodvfy", "-new", str(tmp_path / "notice.dcm")], capture_output=True, text=True, check=False
    )
    assert [line for line in (said.stdout + said.stderr).splitlines() if line.startswith("Error")] == []
    back = dcmread(tmp_path / "notice.dcm")
    assert (back.StudyInstanceUID, back.PatientID) == (header.StudyInstanceUID, header.get("PatientID", ""))
    assert back.SourceImageSequence[0].ReferencedSOPInstanceUID == header.SOPInstanceUID
    assert back.pixel_array.shape == (notice.HEIGHT, notice.WIDTH, 3)


def test_a_uid_of_two_values_costs_no_notice():
    header = bare()
    header.add_new("SOPInstanceUID", "UI", "1.2.3.4.5.6\\7")
    image, _ = notice.build(header, "slices that make no stack", MODEL, revision=1, started=STARTED)
    assert image.SourceImageSequence[0].ReferencedSOPInstanceUID == ["1.2.3.4.5.6", "7"]


def test_the_same_notice_is_the_same_object_and_another_revision_another():
    first, again, next_ = (
        notice.build(bare(), "too few slices", MODEL, revision=revision, started=STARTED)[0] for revision in (1, 1, 2)
    )
    assert first.SOPInstanceUID == again.SOPInstanceUID != next_.SOPInstanceUID
    assert first.SeriesInstanceUID == next_.SeriesInstanceUID


def test_the_reason_is_on_the_page():
    pages = [notice.render(reason, MODEL, caption="Series 3") for reason in ("one", "another " * 80)]
    assert pages[0] != pages[1]


def test_the_page_tells_whether_there_are_results():
    pages = [notice.render("one", MODEL, has_results=has_results) for has_results in (True, False)]
    assert pages[0] != pages[1]
