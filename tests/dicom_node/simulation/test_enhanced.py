"""Enhanced CT through the whole analysis: the same answers as of single-frame images, and references to the frames."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import highdicom as hd
import numpy as np
import pytest
from highdicom.sr.utils import find_content_items
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage

from dicom_node import dispatch
from dicom_node.analysis.analyser import Analyser, Outcome
from dicom_node.analysis.series import Series
from dicom_node.assembler import Assembler
from dicom_node.dispatch import Dispatch
from dicom_node.images.gate import Reason
from dicom_node.monitoring.metrics import Metrics
from dicom_node.results import capture, codes, montage
from dicom_node.results.result_set import USUAL, Form
from dicom_node.simulation import enhanced, phantom
from dicom_node.storage.journal import SeriesState
from dicom_node.storage.spool import Instance
from runtime.bundle import open_bundle
from runtime.geometry import View
from runtime.triage import Rule
from runtime.types import ModelIdentity, OperatingPoint, Plane, Slice, SliceLabels
from tests.dicom_node import ct, multiframe
from tests.dicom_node.multiframe import changed

SLICES = 12
needs_dicom3tools = pytest.mark.skipif(
    shutil.which("dciodvfy") is None, reason="dciodvfy not installed: apt-get install dicom3tools"
)


class Threshold:
    """An engine that takes what is bright for blood: intracerebral in one half of an image, subdural in the other."""

    identity = ModelIdentity("threshold", "1", "0" * 64, "fp32", "none", "nothing")

    def __init__(self, view: View) -> None:
        self._answered = slice(view.first, view.first + view.answered)

    def infer(self, hu: np.ndarray) -> list[SliceLabels]:
        shown = hu[:, self._answered].reshape(-1, *hu.shape[2:])
        half = np.where(np.arange(hu.shape[-1]) < hu.shape[-1] // 2, 1, 2)
        evidence = np.ones(7, dtype=np.float32)
        return [
            SliceLabels(labels.astype(np.uint8), np.bincount(labels.ravel(), minlength=7), evidence)
            for labels in ((shown > 60) & (shown < 80)) * half
        ]


def analyser(view: View = View(), max_batch: int = 4, form: Form = USUAL) -> Analyser:  # noqa: B008  # frozen
    points = dict.fromkeys(open_bundle().classes[1:], OperatingPoint(0.01))
    bundle = dataclasses.replace(open_bundle(), view=view, operating_point=points)
    rules = (Rule("critical", ("intracerebral",), 1.0),)
    return Analyser(bundle, Threshold(view), rules, min_slices=5, min_coverage_mm=0, max_batch=max_batch, form=form)


def analyse(paths: list[Path], folder: Path, *how: View | int, form: Form = USUAL) -> Outcome:
    one, series = analyser(*how, form=form), Series()
    for path in paths:
        one.feed(series, [path])
    return one.close(series, folder, revision=1, missing=())


@pytest.fixture(autouse=True)
def one_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take most of the time here, and `test_sr_and_pictures_name_the_frames` alone looks at them."""
    monkeypatch.setattr(capture, "MAX_IMAGES", 1)
    monkeypatch.setattr(montage, "MAX_TILES", 1)


@pytest.fixture(scope="module")
def slices() -> list[Slice]:
    """A tilted head with bleeds on either side."""
    hu = ct.hounsfield(ct.bleeds(SLICES, classes=(1, 2, 3, 4)))
    tilt = np.radians(18)
    first = Plane(
        (-120.0, -115.5, 0.0), (1.0, 0.0, 0.0), (0.0, float(np.cos(tilt)), -float(np.sin(tilt))), (3.75, 3.75), 5.0
    )
    return [Slice(str(i), replace(first, origin_lps=(-120.0, -115.5, 5.0 * i)), hu[i]) for i in range(SLICES)]


@pytest.fixture(scope="module")
def expected(slices: list[Slice], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list]:
    """What single-frame images give."""
    folder = tmp_path_factory.mktemp("single")
    analyse(phantom.write(slices, folder / "ct", tilt_deg=18), folder)
    return answers(folder)


def answers(folder: Path) -> tuple[dict, list]:
    """The report without what depends on how slices are called, and the label maps by place and segment."""
    report = json.loads((folder / "report.json").read_text())
    del report["composed"]
    for finding in report["findings"]:
        finding["keys"] = len(finding["keys"])
        del finding["key_slice"]
    segmentation = hd.seg.segread(folder / "seg.dcm")
    maps = [
        (
            int(frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber),
            [float(value) for value in frame.PlanePositionSequence[0].ImagePositionPatient],
            pixels.tobytes(),
        )
        for frame, pixels in zip(segmentation.PerFrameFunctionalGroupsSequence, segmentation.pixel_array, strict=True)
    ]
    return report, sorted(maps)


def files(slices: list[Slice], folder: Path, images: int = 1) -> list[Path]:
    return enhanced.write(slices, folder, tilt_deg=18, images=images)


def shuffled(slices: list[Slice], folder: Path) -> list[Path]:
    return files([slices[i] for i in np.random.default_rng(5).permutation(SLICES)], folder)


def changing(change: Callable) -> Callable[[list[Slice], Path], list[Path]]:
    return lambda slices, folder: [changed(path, change) for path in files(slices, folder)]


def mixed(slices: list[Slice], folder: Path) -> list[Path]:
    """Single-frame and multi-frame images in one series."""
    paths = [*phantom.write(slices[:5], folder / "single", tilt_deg=18), *files(slices[5:], folder)]
    first = dcmread(paths[-1])

    def join(dataset: Dataset) -> None:
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "PatientID", "StudyID"):
            setattr(dataset, keyword, first[keyword].value)

    return [changed(path, join) for path in paths]


VARIANTS: dict[str, Callable[[list[Slice], Path], list[Path]]] = {
    "one image": files,
    "three images": lambda slices, folder: files(slices, folder, 3),
    "three images, the last first": lambda slices, folder: files(slices, folder, 3)[::-1],
    "frames in any order": shuffled,
    "rescale per frame": changing(multiframe.rescale_per_frame),
    "legacy converted": lambda slices, folder: [multiframe.legacy(slices, folder)],
    "single-frame and multi-frame": mixed,
    **{name: changing(multiframe.ENCODINGS[name]) for name in ("deflated", "RLE", "JPEG-LS", "JPEG 2000")},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_volumes_decision_and_label_maps_as_of_single_frame_images(
    slices: list[Slice], expected: tuple[dict, list], variant: str, tmp_path: Path
):
    report, maps = expected
    assert [finding["name"] for finding in report["findings"]] == ["intracerebral", "subdural"]
    assert report["decision"]["level"] == "critical"
    outcome = analyse(VARIANTS[variant](slices, tmp_path / "ct"), tmp_path)
    assert outcome.state is SeriesState.ANALYSED, outcome.reason
    assert answers(tmp_path) == (report, maps)


@pytest.mark.parametrize("view", [View(3), View(6, 4)])
def test_networks_that_see_neighbours_or_volumes_get_the_frames_hu_again(
    slices: list[Slice], expected: tuple[dict, list], view: View, tmp_path: Path
):
    analyse(shuffled(slices, tmp_path / "ct"), tmp_path, view, 1)  # so few are kept that the others are decoded again
    assert answers(tmp_path)[0] == expected[0]


@needs_dicom3tools
@pytest.mark.parametrize("variant", ["three images", "legacy converted", "single-frame and multi-frame"])
def test_dciodvfy_finds_no_error(slices: list[Slice], variant: str, tmp_path: Path):
    analyse(VARIANTS[variant](slices, tmp_path / "ct"), tmp_path)
    for path in tmp_path.glob("*.dcm"):
        shown = subprocess.run(["dciodvfy", "-new", path], capture_output=True, text=True, check=False)
        assert [line for line in (shown.stdout + shown.stderr).splitlines() if line.startswith("Error")] == [], path


@needs_dicom3tools
def test_the_phantom_is_a_legal_enhanced_ct(slices: list[Slice], tmp_path: Path):
    for path in files(slices, tmp_path, 2):
        shown = subprocess.run(["dciodvfy", "-new", path], capture_output=True, text=True, check=False)
        assert "EnhancedCTImage" in shown.stdout + shown.stderr
        assert [line for line in (shown.stdout + shown.stderr).splitlines() if line.startswith("Error")] == []


def test_every_frame_of_the_seg_names_the_frame_that_lies_where_it_does(slices: list[Slice], tmp_path: Path):
    sources = {path: dcmread(path) for path in files(slices, tmp_path / "ct", 3)}
    by_uid = {image.SOPInstanceUID: image for image in sources.values()}
    analyse(list(sources), tmp_path)
    segmentation = hd.seg.segread(tmp_path / "seg.dcm")
    named = set()
    for frame in segmentation.PerFrameFunctionalGroupsSequence:
        (reference,) = frame.DerivationImageSequence[0].SourceImageSequence
        assert reference.ReferencedSOPClassUID == EnhancedCTImageStorage
        assert reference.SpatialLocationsPreserved == "YES"
        groups = by_uid[reference.ReferencedSOPInstanceUID].PerFrameFunctionalGroupsSequence
        own = groups[reference.ReferencedFrameNumber - 1]
        assert frame.PlanePositionSequence[0].ImagePositionPatient == own.PlanePositionSequence[0].ImagePositionPatient
        named.add((reference.ReferencedSOPInstanceUID, int(reference.ReferencedFrameNumber)))
    listed = segmentation.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert {item.ReferencedSOPInstanceUID for item in listed} == {uid for uid, _ in named}
    assert len(listed) > 1
    said = {
        (item.ReferencedSOPInstanceUID, int(number))
        for item in segmentation.SourceImageSequence
        for number in (
            item.ReferencedFrameNumber if item["ReferencedFrameNumber"].VM > 1 else [item.ReferencedFrameNumber]
        )
    }
    assert said == named


def test_highdicom_finds_the_masks_by_source_frame(slices: list[Slice], tmp_path: Path):
    (path,) = shuffled(slices, tmp_path / "ct")
    analyse([path], tmp_path)
    segmentation = hd.seg.segread(tmp_path / "seg.dcm")
    hu = dcmread(path).pixel_array.astype(int) + phantom.INTERCEPT
    bright = (hu > 60) & (hu < 80)
    found = segmentation.get_pixels_by_source_frame(
        dcmread(path).SOPInstanceUID,
        list(range(1, SLICES + 1)),
        combine_segments=True,
        assert_missing_frames_are_empty=True,
    )
    np.testing.assert_array_equal(found > 0, bright)


def test_sr_and_pictures_name_the_frames(slices: list[Slice], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(capture, "MAX_IMAGES", 3)
    monkeypatch.setattr(montage, "MAX_TILES", 9)
    paths = files(slices, tmp_path / "ct", 2)
    assert "pdf" in {file.role for file in analyse(paths, tmp_path, form=Form(pdf=True)).files}
    report = json.loads((tmp_path / "report.json").read_text())
    document = hd.sr.srread(tmp_path / "sr.dcm")
    for group, finding in zip(
        document.content.get_volumetric_roi_measurement_groups(), report["findings"], strict=True
    ):
        referenced = {
            f"{uid} frame {number}"
            for item in group.referenced_segment
            if item.ValueType == "IMAGE" and item.name.meaning == "Source Image for Segmentation"
            for uid in [item.referenced_sop_instance_uid]
            for number in item.referenced_frame_numbers
        }
        assert referenced == set(finding["keys"])
        assert finding["key_slice"] in referenced
        (item,) = find_content_items(group[0], name=codes.BEST_ILLUSTRATION)
        uid, number = item.referenced_sop_instance_uid, item.referenced_frame_numbers[0]
        assert f"{uid} frame {number}" == finding["key_slice"]
    (evidence,) = [
        series.ReferencedSOPSequence
        for study in document.CurrentRequestedProcedureEvidenceSequence
        for series in study.ReferencedSeriesSequence
        if series.SeriesInstanceUID == dcmread(paths[0]).SeriesInstanceUID
    ]
    assert [item.ReferencedSOPInstanceUID for item in evidence] == [dcmread(path).SOPInstanceUID for path in paths]
    overview, *key_slices = [dcmread(path) for path in sorted(tmp_path.glob("sc-*.dcm"))]
    by_image = {item.ReferencedSOPInstanceUID: item.ReferencedFrameNumber for item in overview.SourceImageSequence}
    assert set(by_image) <= {dcmread(path).SOPInstanceUID for path in paths}
    assert sum(np.size(numbers) for numbers in by_image.values()) == 9
    pictured = []
    for image in key_slices:
        (item,) = image.SourceImageSequence
        pictured.append(f"{item.ReferencedSOPInstanceUID} frame {item.ReferencedFrameNumber}")
    assert pictured[0] == report["findings"][0]["key_slice"]
    assert len(pictured) == len(set(pictured)) > 1


def test_single_frame_images_keep_their_references(slices: list[Slice], tmp_path: Path):
    paths = phantom.write(slices, tmp_path / "ct")
    analyse(paths, tmp_path)
    segmentation = dcmread(tmp_path / "seg.dcm")
    for item in segmentation.SourceImageSequence:
        assert item.ReferencedSOPClassUID == CTImageStorage
        assert "ReferencedFrameNumber" not in item
    assert b"Source Series for Segmentation" in (tmp_path / "sr.dcm").read_bytes()


def test_temporal_positions_are_one_head_and_not_two(slices: list[Slice], tmp_path: Path):
    """The first of the frames in one place is taken."""
    later = [Slice(one.key, one.plane, np.full_like(one.hu, 40)) for one in slices]
    outcome = analyse(files([*slices, *later], tmp_path / "ct"), tmp_path)
    assert outcome.report.slices == SLICES
    assert outcome.report.findings
    assert outcome.report.missing == (f"{SLICES} images lie where another one is and were left out",)


def test_frames_that_can_t_be_used_are_counted_as_frames(slices: list[Slice], tmp_path: Path):
    def change(dataset: Dataset) -> None:
        groups = dataset.PerFrameFunctionalGroupsSequence
        del groups[0].PlanePositionSequence
        for own in groups[10:]:
            item = Dataset()
            item.FrameType = ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]
            own.CTImageFrameTypeSequence = [item]

    outcome = analyse(changing(change)(slices, tmp_path / "ct"), tmp_path)
    assert outcome.report.slices == SLICES - 3
    assert outcome.report.provisional
    assert outcome.report.missing == (
        f"1 frame not analysed: {Reason.NO_GEOMETRY.value}",
        "2 frames not analysed: a localizer",
    )


def test_a_frame_that_is_not_parallel_is_named(slices: list[Slice], tmp_path: Path):
    upright = replace(slices[4].plane, column_lps=(0.0, 1.0, 0.0))
    bent = [*slices[:4], Slice("bent", upright, slices[4].hu), *slices[5:]]
    outcome = analyse(files(bent, tmp_path / "ct"), tmp_path)
    assert outcome.state is SeriesState.NOT_ANALYSED
    assert "frame 5 is not parallel to the others" in outcome.reason


def test_between_batches_of_frames_there_is_a_sign_of_life(slices: list[Slice], tmp_path: Path):
    signs: list[int] = []
    series = Series()
    (seen,) = analyser().feed(series, files(slices, tmp_path), lambda: signs.append(len(series.labels)))
    assert signs == [4, 8]
    assert len(seen.images) == len(series.labels) == SLICES
    signs.clear()
    analyser().feed(Series(), phantom.write(slices[:4], tmp_path), lambda: signs.append(0))
    assert signs == [], "one batch is one answer"


def test_a_worker_that_goes_on_with_frames_does_not_hang(monkeypatch: pytest.MonkeyPatch):
    clock, kills = [0.0], []
    monkeypatch.setattr(dispatch, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    supervisor = SimpleNamespace(pid=1, send=lambda *_, **__: None, kill=lambda: kills.append(clock[0]))
    path = Path("/spool/1/1.2/all.dcm")
    assembler = Assembler(10, lambda *_: (0, [], False), min_coverage_mm=0)
    desk = Dispatch(supervisor, assembler, Path("/results"), lambda *_: None, Metrics())
    desk.hear(
        {"is": "ready", "worker": 1, "servers": {}, **dict.fromkeys(("model", "backend", "precision", "why"), "")}
    )
    desk.feed(*assembler.stored("ct", Instance("1", "1.2", "ct", "all", "le", path, "hash"), 0.0))
    for _ in range(5):
        desk.pump(clock[0])
        clock[0] += 0.9 * dispatch.HANG_S
        desk.hear({"is": "going", "series": "1/1.2/1"})
    assert kills == []
    clock[0] += 1.1 * dispatch.HANG_S
    desk.pump(clock[0])
    assert kills == clock
