"""Enhanced CT through a running node: received, completed by evidence, analysed, and results that name its frames."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import Comprehensive3DSRStorage, SecondaryCaptureImageStorage, SegmentationStorage
from structlog.testing import capture_logs

from dicom_node.images.gate import Reason
from dicom_node.node import Node
from dicom_node.simulation import enhanced
from dicom_node.simulation.pacs import Pacs
from dicom_node.simulation.scanner import push
from dicom_node.status import look
from dicom_node.storage.journal import Journal
from tests.dicom_node import multiframe
from tests.dicom_node.conftest import PATIENCE_S, Pushable, config_for, running, wait_until
from tests.dicom_node.simulation.test_enhanced import answers

needs_dicom3tools = pytest.mark.skipif(
    shutil.which("dciodvfy") is None, reason="dciodvfy not installed: apt-get install dicom3tools"
)
needs_dcmtk = pytest.mark.skipif(shutil.which("storescu") is None, reason="DCMTK not installed: apt-get install dcmtk")


@pytest.fixture
def patient(tmp_path: Path, pacs: Pacs):
    """A node that would wait for longer than any test: what closes a series here is evidence."""
    with running(config_for(tmp_path / "node", pacs.port, idle_timeout_s=10 * PATIENCE_S)) as started:
        yield started


def scan(paths: list[Path], node: Node) -> None:
    assert not push(paths, ("127.0.0.1", node.port), calling_ae="CT1", called_ae="SCANSIDE").failed


def finished(node: Node, count: int = 1) -> list:
    """Wait for so many series with a result."""
    journal = Journal(node.config.node.folder / "journal.sqlite", read_only=True)
    try:
        wait_until(lambda: len(journal.series()) >= count, f"{count} results")
        return journal.series()
    finally:
        journal.close()


def folder_of(node: Node, record) -> Path:
    return node.config.node.folder / "results" / record.study_uid / record.series_uid / "revision-1"


def received(pacs: Pacs, sop_class: str) -> list[Path]:
    return [path for _, each, path in pacs.received if each == sop_class]


@needs_dicom3tools
def test_a_head_in_one_image_gives_what_it_gives_in_many(bleeding: Pushable, patient: Node, pacs: Pacs, tmp_path: Path):
    (image,) = enhanced.write(bleeding.phantom.slices, tmp_path / "ct", tilt_deg=12)
    scan([image], patient)
    (first,) = finished(patient)
    scan(bleeding.paths, patient)
    _, second = finished(patient, 2)
    one, many = (answers(folder_of(patient, record)) for record in (first, second))
    assert one == many
    assert one[0]["slices"] == len(bleeding.paths)
    assert not one[0]["provisional"]

    assert pacs.wait_for(lambda objects: sum(each == SegmentationStorage for _, each, _ in objects) == 2, PATIENCE_S)
    header = dcmread(image)
    for sop_class in (SegmentationStorage, Comprehensive3DSRStorage, SecondaryCaptureImageStorage):
        paths = [path for path in received(pacs, sop_class) if header.SOPInstanceUID.encode() in path.read_bytes()]
        assert paths
        for path in paths:
            assert dcmread(path).StudyInstanceUID == header.StudyInstanceUID
            shown = subprocess.run(["dciodvfy", "-new", path], capture_output=True, text=True, check=False)
            assert not [line for line in (shown.stdout + shown.stderr).splitlines() if line.startswith("Error")]
    told = look(patient.config).series
    assert {(one.slices_analysed, one.slices_received) for one in told} == {(len(bleeding.paths), len(bleeding.paths))}


def test_a_head_over_several_images_and_associations_is_complete_with_the_last(
    bleeding: Pushable, patient: Node, tmp_path: Path
):
    images = enhanced.write(bleeding.phantom.slices, tmp_path / "ct", tilt_deg=12, images=2)
    uid = dcmread(images[0]).SeriesInstanceUID
    scan(images[:1], patient)
    wait_until(lambda: patient.progress().get(uid) == (1, 1), "the first image analysed")
    (lower,) = look(patient.config).series
    assert (lower.state, lower.slices_received) == ("receiving", 16)
    scan(images[1:], patient)
    (record,) = finished(patient)
    report = json.loads(record.report_json)
    assert (report["slices"], report["received"], record.slices) == (32, 32, 2)
    assert not report["provisional"], report["missing"]


@pytest.mark.slow
@needs_dcmtk
def test_dcmtk_sends_it_compressed(bleeding: Pushable, patient: Node, tmp_path: Path):
    (image,) = enhanced.write(bleeding.phantom.slices, tmp_path / "ct", tilt_deg=12)
    multiframe.changed(image, multiframe.ENCODINGS["JPEG-LS"])
    command = ["dcmsend", "--decompress-never", "-aec", "SCANSIDE", "127.0.0.1", str(patient.port), str(image)]
    subprocess.run(command, check=True, timeout=PATIENCE_S)
    (record,) = finished(patient)
    assert json.loads(record.report_json)["slices"] == len(bleeding.paths)
    (kept,) = (patient.config.node.folder / "spool").glob("*/*/*.dcm")
    assert dcmread(kept, stop_before_pixels=True).file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.4.80"


def test_what_is_not_analysed_is_named(bleeding: Pushable, node: Node, tmp_path: Path):
    (bare,) = enhanced.write(bleeding.phantom.slices[:8], tmp_path / "bare")
    multiframe.changed(bare, lambda dataset: dataset.pop("PerFrameFunctionalGroupsSequence"))
    (derived,) = enhanced.write(bleeding.phantom.slices[8:16], tmp_path / "derived")

    def derive(dataset: Dataset) -> None:
        dataset.SharedFunctionalGroupsSequence[0].CTImageFrameTypeSequence[0].FrameType = ["DERIVED", "PRIMARY"]

    multiframe.changed(derived, derive)
    with capture_logs() as events:
        scan([derived], node)
        scan([bare], node)
        records = finished(node, 2)
    assert {record.state for record in records} == {"not_analysed"}
    reasons = {record.series_uid: record.reason for record in records}
    assert Reason.DERIVED.value in reasons[dcmread(derived).SeriesInstanceUID]
    assert Reason.NO_FUNCTIONAL_GROUPS.value in reasons[dcmread(bare).SeriesInstanceUID]
    refusals = [event["reason"] for event in events if event["event"] == "image_not_analysed"]
    assert [f"frame {n}: {Reason.DERIVED.value}: DERIVED\\PRIMARY" for n in range(1, 9)] == refusals[:8]
    assert refusals[8:] == [f"{Reason.NO_FUNCTIONAL_GROUPS.value}: 8 frames, groups of 0"]
