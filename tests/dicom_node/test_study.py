"""Studies of several series: which comes first, which is left out, and what the archive is told of that."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import RLELossless, SecondaryCaptureImageStorage, generate_uid

from dicom_node import dispatch
from dicom_node import folder as folders
from dicom_node.analysis import decode, kernel
from dicom_node.analysis.analyser import Analyser
from dicom_node.analysis.series import Series
from dicom_node.delivery.outbox import Outbox
from dicom_node.images.gate import BONE_KERNELS, NotAnalysed
from dicom_node.simulation import enhanced
from dicom_node.simulation.scanner import Sent, push
from dicom_node.storage.journal import Journal, SeriesState
from dicom_node.supervisor import Supervisor
from runtime.bundle import open_bundle
from runtime.session import open_session
from tests.dicom_node import multiframe
from tests.dicom_node.conftest import Pushable, config_for, running, wait_until

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

    from dicom_node.node import Node
    from dicom_node.simulation.pacs import Pacs
    from dicom_node.storage.journal import SeriesRecord


@pytest.fixture
def head(bleeding: Pushable) -> list[Path]:
    """Every second slice, for speed: 16 of 5 mm, 10 mm apart, are a stack without gaps."""
    return bleeding.paths[::2]


def again(paths: list[Path], folder: Path, *, every: int = 1, **changed: object) -> list[Path]:
    """The same slices as another series of the study; None takes an attribute away."""
    folder.mkdir(parents=True)
    series_uid = generate_uid()
    written = []
    for path in paths[::every]:
        image = dcmread(path)
        image.SeriesInstanceUID, image.SOPInstanceUID = series_uid, generate_uid()
        image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
        for keyword, value in changed.items():
            if value is None:
                delattr(image, keyword)
            else:
                setattr(image, keyword, value)
        image.save_as(folder / path.name)
        written.append(folder / path.name)
    return written


def scan(paths: list[Path], node: Node) -> None:
    told = push(paths, ("127.0.0.1", node.port), calling_ae="CT1", called_ae="SCANSIDE")
    assert not told.failed


def series_uid(paths: list[Path]) -> str:
    return str(dcmread(paths[0], stop_before_pixels=True).SeriesInstanceUID)


def records(node: Node, count: int) -> dict[str, SeriesRecord]:
    """By SeriesInstanceUID, once there are so many."""

    def read() -> dict[str, SeriesRecord]:
        journal = Journal(node.config.node.folder / "journal.sqlite", read_only=True)
        try:
            return {record.series_uid: record for record in journal.series()}
        finally:
            journal.close()

    wait_until(lambda: len(read()) == count, f"{count} results")
    return read()


def test_a_series_for_bone_is_not_analysed_where_the_study_has_it_for_soft_tissue(
    head: list[Path], node: Node, pacs: Pacs, tmp_path: Path
):
    bone = again(head, tmp_path / "bone", ConvolutionKernel="H60s")
    scan([path for pair in zip(bone, head, strict=True) for path in pair], node)
    found = records(node, 2)
    assert found[series_uid(head)].state is SeriesState.ANALYSED
    turned_away = found[series_uid(bone)]
    assert (turned_away.state, turned_away.reason) == (
        SeriesState.NOT_ANALYSED,
        "a bone kernel, and the study has the same slices for soft tissue",
    )
    wait_until(lambda: len(pacs.received) > 3, "results for soft tissue")
    assert notices(pacs) == []


@pytest.mark.parametrize(
    "other",
    [
        "half of the head",
        "every third slice",
        "another frame of reference",
        "reformatted",
        "lossy",
        "no kernel",
        "a small field of view",
    ],
)
def test_a_series_for_bone_is_analysed_where_nothing_replaces_it(head: list[Path], tmp_path: Path, other: str):
    bone = again(head, tmp_path / "bone", ConvolutionKernel="BONEPLUS")
    half = head[: len(head) // 2]
    soft = {
        "half of the head": lambda: again(half, tmp_path / "soft"),
        "every third slice": lambda: again(head, tmp_path / "soft", every=3),
        "another frame of reference": lambda: again(head, tmp_path / "soft", FrameOfReferenceUID="1.2.3"),
        "reformatted": lambda: again(head, tmp_path / "soft", ImageType=["DERIVED", "SECONDARY", "MPR"]),
        "lossy": lambda: again(head, tmp_path / "soft", LossyImageCompression="01"),
        "no kernel": lambda: again(head, tmp_path / "soft", ConvolutionKernel=None),
        "a small field of view": lambda: again(head, tmp_path / "soft", PixelSpacing=["0.2", "0.2"]),
    }[other]()
    series = Series()
    for path in bone:
        ((header, slice_),) = decode.read(path)
        series.add(path, header, slice_, header)
    kernel.check_needed(series, [soft], BONE_KERNELS)
    with pytest.raises(NotAnalysed):
        kernel.check_needed(series, [soft, head], BONE_KERNELS)


def test_the_same_rule_without_a_network(head: list[Path], tmp_path: Path):
    again(head, tmp_path / "in" / "a bone", ConvolutionKernel="FC81")
    again(head, tmp_path / "in" / "b soft", ConvolutionKernel="FC26")
    bundle = open_bundle()
    session = open_session(bundle, "onnxruntime")
    analyser = Analyser(bundle, session, (), min_slices=5, min_coverage_mm=0, max_batch=4)
    series, _ = folders.find(tmp_path / "in")
    done = folders.analyse(analyser, series, tmp_path / "out", lambda _: None)
    assert {one.outcome.code for one in done} == {None, "BONE_KERNEL"}


def test_frames_for_bone_are_not_analysed_where_other_frames_are_for_soft_tissue(bleeding: Pushable, tmp_path: Path):
    (soft,) = enhanced.write(bleeding.phantom.slices[::2], tmp_path / "soft", tilt_deg=12)
    (bone,) = enhanced.write(bleeding.phantom.slices[::2], tmp_path / "bone", tilt_deg=12)

    def sharpen(image: Dataset) -> None:
        image.SeriesInstanceUID, image.SOPInstanceUID = "1.2.3.4", "1.2.3.5"
        image.SharedFunctionalGroupsSequence[0].CTReconstructionSequence[0].ConvolutionKernel = "BONEPLUS"

    multiframe.changed(bone, sharpen)
    series = Series()
    for header, slice_ in decode.read(bone):
        series.add(bone, header, slice_, header)
    kernel.check_needed(series, [[bone]], BONE_KERNELS)
    with pytest.raises(NotAnalysed, match="a bone kernel"):
        kernel.check_needed(series, [[soft]], BONE_KERNELS)
    kernel.check_needed(series, [[soft]], BONE_KERNELS, min_slices=len(bleeding.phantom.slices) + 1)
    multiframe.changed(soft, lambda image: setattr(image, "FrameOfReferenceUID", "1.2.3"))
    kernel.check_needed(series, [[soft]], BONE_KERNELS)
    multiframe.changed(soft, lambda image: delattr(image, "FrameOfReferenceUID"))
    for header in series.headers.values():
        del header.FrameOfReferenceUID
    kernel.check_needed(series, [[soft]], BONE_KERNELS)


def test_a_series_for_bone_is_analysed_where_that_for_soft_tissue_could_not_be(
    head: list[Path], node: Node, tmp_path: Path
):
    """Its pixels are seen to be damaged only when they are decoded."""
    soft = again(head, tmp_path / "soft")
    for path in soft:
        image = dcmread(path)
        image.compress(RLELossless)
        image.PixelData = encapsulate([b"\xff" * 200])
        image.save_as(path)
    scan(soft, node)
    assert records(node, 1)[series_uid(soft)].reason == "a file or pixels that are damaged"
    bone = again(head, tmp_path / "bone", ConvolutionKernel="H60s")
    scan(bone, node)
    assert records(node, 2)[series_uid(bone)].state is SeriesState.ANALYSED


@pytest.mark.slow
def test_a_series_for_bone_is_analysed_once_that_for_soft_tissue_has_failed(
    head: list[Path], tmp_path: Path, pacs: Pacs, monkeypatch: pytest.MonkeyPatch
):
    """It was left out while the other one was still to be analysed."""
    soft = series_uid(head)
    dying = (
        "import os\nfrom dicom_node.analysis import worker\nfrom dicom_node.results import result_set\n"
        "make = result_set.make\n"
        "result_set.make = lambda sources, *more, **how: os._exit(9)"
        f" if sources[0].header.SeriesInstanceUID == {soft!r} else make(sources, *more, **how)\nworker.main()\n"
    )
    monkeypatch.setattr(Supervisor, "command", (sys.executable, "-c", dying))
    bone = again(head, tmp_path / "bone", ConvolutionKernel="H60s")
    with running(config_for(tmp_path / "node", pacs.port, idle_timeout_s=20)) as node:

        def scan_bone(sent: Sent) -> None:
            """Within the association that brings the soft series, so that it is still open."""
            if sent.path == head[-1]:
                scan(bone, node)
                assert records(node, 1)[series_uid(bone)].state is SeriesState.NOT_ANALYSED

        push(head, ("127.0.0.1", node.port), calling_ae="CT1", called_ae="SCANSIDE", on_slice=scan_bone)
        wait_until(lambda: records(node, 2)[series_uid(bone)].revision == 2, "the bone series again")
        found = records(node, 2)
        assert found[soft].state is SeriesState.FAILED
        assert found[series_uid(bone)].state is SeriesState.ANALYSED


def test_a_series_for_bone_that_has_results_gets_those_that_replace_them(head: list[Path], node: Node, tmp_path: Path):
    bone = again(head, tmp_path / "bone", ConvolutionKernel="H60s")
    scan(bone[:-1], node)
    records(node, 1)
    scan(head, node)
    records(node, 2)
    scan(bone[-1:], node)
    wait_until(lambda: records(node, 2)[series_uid(bone)].revision == 2, "a second revision")
    assert records(node, 2)[series_uid(bone)].state is SeriesState.ANALYSED


def test_soft_tissue_and_thick_slices_are_analysed_first(
    head: list[Path], node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Sent last, and done first: a worker that stands still once it has seen one slice of each finds all waiting."""
    monkeypatch.setattr(dispatch, "UNDER_WAY", 1)
    bone = again(head, tmp_path / "bone", ConvolutionKernel="H60s", FrameOfReferenceUID="1.2.3")
    thin = again(head, tmp_path / "thin", SliceThickness="1")
    thick = again(head, tmp_path / "thick", SliceThickness="5")
    sent = []

    def halt(one: object) -> None:
        sent.append(one)
        if len(sent) == 3:
            wait_until(lambda: list(node.progress().values()) == [(1, 1)] * 3, "a slice of each")
            os.kill(node.supervisor.pid, signal.SIGSTOP)

    paths = [*bone[:1], *thin[:1], *thick[:1], *bone[1:], *thin[1:], *thick[1:]]
    told = push(paths, ("127.0.0.1", node.port), calling_ae="CT1", called_ae="SCANSIDE", on_slice=halt)
    assert not told.failed
    os.kill(node.supervisor.pid, signal.SIGCONT)
    found = records(node, 3)
    order = sorted(found, key=lambda uid: found[uid].recorded)
    assert order == [series_uid(thick), series_uid(thin), series_uid(bone)]


def notices(pacs: Pacs) -> list[Path]:
    images = [path for _, sop_class, path in pacs.received if sop_class == SecondaryCaptureImageStorage]
    return [path for path in images if "Notice" in dcmread(path).DerivationDescription]


def test_the_archive_is_told_of_a_head_that_was_not_analysed(head: list[Path], node: Node, pacs: Pacs, tmp_path: Path):
    spoilt = again(head, tmp_path / "spoilt", RescaleSlope=None)
    scan(spoilt[:-2], node)
    record = records(node, 1)[series_uid(spoilt)]
    assert record.state is SeriesState.NOT_ANALYSED
    wait_until(lambda: notices(pacs), "the notice")
    told = dcmread(notices(pacs)[0])
    source = dcmread(spoilt[0])
    assert (told.StudyInstanceUID, told.PatientID) == (source.StudyInstanceUID, source.PatientID)
    scan(spoilt[-2:], node)
    wait_until(lambda: records(node, 1)[series_uid(spoilt)].revision == 2, "a second revision")
    scan(head, node)
    wait_until(lambda: len(pacs.received) > 3, "results of another series")
    assert len(notices(pacs)) == 1, "what the archive knows it is not told again"


@pytest.mark.parametrize("reason", ["few", "derived"])
def test_the_archive_is_not_told_of_what_nobody_takes_for_a_head(
    head: list[Path], node: Node, pacs: Pacs, tmp_path: Path, reason: str
):
    if reason == "few":
        paths = again(head[:3], tmp_path / "bolus")
    else:
        paths = again(head, tmp_path / "mpr", ImageType=["DERIVED", "SECONDARY", "MPR"])
    scan(paths, node)
    assert records(node, 1)[series_uid(paths)].state is SeriesState.NOT_ANALYSED
    scan(head, node)  # what comes after it is delivered, so it would have been
    wait_until(lambda: len(pacs.received) > 3, "results of the head")
    assert notices(pacs) == []


def test_a_series_that_kills_three_workers_at_its_end_gets_a_notice(
    head: list[Path], tmp_path: Path, pacs: Pacs, monkeypatch: pytest.MonkeyPatch
):
    dying = (
        "import os\nfrom dicom_node.analysis import worker\nfrom dicom_node.results import result_set\n"
        "worker.rehearse = lambda *_: True\n"
        "result_set.make = lambda *_, **__: os._exit(9)\nworker.main()\n"
    )
    monkeypatch.setattr(Supervisor, "command", (sys.executable, "-c", dying))
    with running(config_for(tmp_path / "node", pacs.port)) as node:
        scan(head, node)
        record = records(node, 1)[series_uid(head)]
        assert record.state is SeriesState.FAILED
        assert "died 3 times" in record.reason
        wait_until(lambda: notices(pacs), "the notice")


def test_a_destination_gets_the_levels_it_wants_and_whatever_corrects_what_it_has_got(
    head: list[Path], healthy: Pushable, tmp_path: Path, pacs: Pacs
):
    """30 ml are critical, and a head without blood is routine."""
    config = config_for(tmp_path / "node", pacs.port)
    (everything,) = config.destinations
    bleeds = everything.model_copy(update={"name": "bleeds", "levels": ("critical", "urgent")})
    with running(config.model_copy(update={"destinations": (everything, bleeds)})) as node:
        scan(healthy.paths, node)
        scan(head[:-1], node)
        records(node, 2)
        scan(head[-1:], node)

        def owed(paths: list[Path]) -> dict[str, set[int]]:
            journal = Journal(node.config.node.folder / "journal.sqlite", read_only=True)
            try:
                items = [item for item in Outbox(journal).items() if item.series_uid == series_uid(paths)]
            finally:
                journal.close()
            return {name: {item.revision for item in items if item.destination == name} for name in ("pacs", "bleeds")}

        wait_until(lambda: owed(head)["pacs"] == {1, 2}, "the second revision")
        assert owed(head)["bleeds"] == {1, 2}
        assert owed(healthy.paths) == {"pacs": {1}, "bleeds": set()}
