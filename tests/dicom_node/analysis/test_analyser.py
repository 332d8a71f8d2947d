"""What becomes of a series: in which company its slices are segmented, and what is not analysed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread

from dicom_node.analysis.analyser import Analyser
from dicom_node.analysis.series import Series
from dicom_node.images.gate import NotAnalysed, Reason
from dicom_node.results import notice
from dicom_node.simulation import phantom as writer
from dicom_node.storage.journal import SeriesState
from runtime.bundle import open_bundle
from runtime.errors import DeviceLost, InferenceError
from runtime.geometry import View
from runtime.types import ModelIdentity, Plane, Slice, SliceLabels

MISSING = "closed after 10 s without a new slice"
SLICES = 9


class Recorder:
    """An engine that finds nothing and remembers which slices it was shown: each is filled with its number."""

    identity = ModelIdentity("recorder", "1", "0" * 64, "fp32", "none", "nothing")

    def __init__(self, view: View) -> None:
        self.view = view
        self.shown: list[list[int]] = []

    def infer(self, hu: np.ndarray) -> list[SliceLabels]:
        self.shown += hu[:, :, 0, 0].tolist()
        voxels = np.eye(7, dtype=np.int64)[0] * hu[0, 0].size
        answer = SliceLabels(np.zeros(hu.shape[2:], np.uint8), voxels, np.eye(7, dtype=np.float32)[0])
        return [answer] * (len(hu) * self.view.answered)

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A series of even slices; slice i holds i everywhere."""

    def one(i: int) -> Slice:
        plane = Plane((-8.0, -8.0, 5.0 * i), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 1.0), 5.0)
        return Slice(str(i), plane, np.full((16, 16), i, np.int16))

    return writer.write([one(i) for i in range(SLICES)], tmp_path_factory.mktemp("series"))


def analyser(view: View, max_batch: int = 4) -> tuple[Analyser, Recorder]:
    engine = Recorder(view)
    bundle = dataclasses.replace(open_bundle(), view=view)
    return Analyser(bundle, engine, (), min_slices=5, min_coverage_mm=0, max_batch=max_batch), engine


def test_a_slice_is_segmented_when_its_neighbours_are_there_and_only_the_ends_wait_for_the_close(
    paths: list[Path], tmp_path: Path
):
    one, engine = analyser(View(3))
    series = Series()
    for count, path in enumerate(paths, start=1):
        one.feed(series, [path])
        assert engine.shown == [[i - 1, i, i + 1] for i in range(1, count - 1)]
    assert one.close(series, tmp_path, revision=1, missing=()).state is SeriesState.ANALYSED
    assert engine.shown[SLICES - 2 :] == [[0, 0, 1], [SLICES - 2, SLICES - 1, SLICES - 1]]


def test_whoever_waits_hears_of_each_batch(paths: list[Path], tmp_path: Path):
    """The node takes a worker that says nothing for hung, and one batch may take all the time that servers get."""
    one, engine = analyser(View(3), max_batch=1)
    series, heard = Series(), []

    def hear() -> None:
        heard.append(len(engine.shown))

    for number in (0, 2, 4, 3):
        one.feed(series, [paths[number]], hear)
    assert heard == [2], "between the two views that have 3 in them"
    one.feed(series, [paths[number] for number in (1, 5, 6, 7, 8)])
    heard.clear()
    one.close(series, tmp_path, revision=1, missing=(), on_more=hear)
    assert heard == [len(engine.shown) - 1], "the two ends"


def test_without_neighbours_a_slice_is_segmented_when_it_comes(paths: list[Path], tmp_path: Path):
    one, engine = analyser(View())
    series = Series()
    for count, path in enumerate(paths, start=1):
        one.feed(series, [path])
        assert engine.shown == [[i] for i in range(count)]
    one.close(series, tmp_path, revision=1, missing=())
    assert len(engine.shown) == SLICES


def test_a_volume_is_segmented_when_the_series_closes(paths: list[Path], tmp_path: Path):
    one, engine = analyser(View(6, 4))
    series = Series()
    one.feed(series, paths)
    assert engine.shown == []
    outcome = one.close(series, tmp_path, revision=1, missing=())
    assert (outcome.state, outcome.report.slices) == (SeriesState.ANALYSED, SLICES)
    assert engine.shown == [[0, 0, 1, 2, 3, 4], [3, 4, 5, 6, 7, 8], [7, 8, 8, 8, 8, 8]]


@pytest.mark.parametrize("order", [range(SLICES)[::-1], (0, 2, 4, 6, 8, 1, 3, 5, 7), (5, 1, 8, 0, 3, 7, 2, 6, 4)])
@pytest.mark.parametrize("together", [1, 2, SLICES])
@pytest.mark.parametrize("neighbours", [1, 2])
def test_in_any_order_the_last_word_on_a_slice_is_between_its_true_neighbours(
    paths: list[Path], order: tuple[int, ...], together: int, neighbours: int, tmp_path: Path
):
    one, engine = analyser(View(2 * neighbours + 1), max_batch=2)  # so few that slices are forgotten and decoded again
    series = Series()
    arriving = [paths[i] for i in order]
    for start in range(0, SLICES, together):
        one.feed(series, arriving[start : start + together])
    one.close(series, tmp_path, revision=1, missing=())
    last = {shown[neighbours]: shown for shown in engine.shown}
    reach = range(-neighbours, neighbours + 1)
    assert last == {i: [min(max(i + j, 0), SLICES - 1) for j in reach] for i in range(SLICES)}


def test_slices_that_name_several_patients_make_a_provisional_report_that_says_so(paths: list[Path], tmp_path: Path):
    one, _ = analyser(View())
    mixed = [tmp_path / path.name for path in paths]
    for number, (path, copy) in enumerate(zip(paths, mixed, strict=True)):
        header = dcmread(path)
        header.PatientID = ("", "MRN-77", " MRN-77", "BOB-1")[number % 4]
        header.save_as(copy)
    series = Series()
    one.feed(series, mixed)
    report = one.close(series, tmp_path / "results", revision=1, missing=()).report
    assert report.provisional
    assert "the slices name 2 patients by PatientID, the results one of them" in report.missing


def test_slices_of_several_sizes_are_no_stack(paths: list[Path], tmp_path: Path):
    plane = Plane((-8.0, -8.0, 100.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 1.0), 5.0)
    (odd,) = writer.write([Slice("odd", plane, np.zeros((32, 32), np.int16))], tmp_path / "odd")
    one, _ = analyser(View(3))
    series = Series()
    one.feed(series, [*paths, odd])
    outcome = one.close(series, tmp_path, revision=1, missing=())
    assert (outcome.state, outcome.reason) == (SeriesState.NOT_ANALYSED, Reason.MIXED_SIZES.value)


@pytest.mark.parametrize(
    ("reason", "verdict"),
    [
        (Reason.NOT_CT, "not a CT image"),
        (Reason.LOCALIZER, "a localizer"),
        (Reason.TRUNCATED, f"{Reason.TRUNCATED.value}; {MISSING}"),
    ],
)
def test_a_series_of_another_kind_lacks_nothing(reason: Reason, verdict: str, tmp_path: Path):
    outcome = analyser(View())[0].close(Series(refused=[NotAnalysed(reason)]), tmp_path, revision=1, missing=(MISSING,))
    assert outcome.reason == verdict


def test_what_may_be_a_head_decides_among_many_reformats(tmp_path: Path):
    refused = [NotAnalysed(Reason.TRUNCATED), *(NotAnalysed(Reason.DERIVED) for _ in range(9))]
    outcome = analyser(View())[0].close(Series(refused=refused), tmp_path, revision=1, missing=())
    assert outcome.code == "TRUNCATED"


def test_few_slices_are_a_head_where_others_of_it_were_turned_away(paths: list[Path], tmp_path: Path):
    one, _ = analyser(View())
    for refused, told in ([], []), ([NotAnalysed(Reason.LOCALIZER)], []), ([NotAnalysed(Reason.LOSSY)], ["notice"]):
        series = Series()
        one.feed(series, paths[:3])
        series.refused += refused
        outcome = one.close(series, tmp_path, revision=1, missing=())
        assert (outcome.code, [file.role for file in outcome.files]) == ("TOO_FEW_SLICES", told)
    assert outcome.reason == f"too few slices: 3, 5 needed; 1 image not analysed: {Reason.LOSSY.value}"


def test_a_notice_is_of_the_first_file_that_can_be_read(paths: list[Path], tmp_path: Path):
    damaged = tmp_path / "1.dcm"
    damaged.write_bytes(b"no DICOM")
    one, _ = analyser(View())
    for files, told in (([damaged, *paths], ["notice"]), ([damaged], [])):
        outcome = one.give_up("it died", files, tmp_path, revision=1)
        assert [file.role for file in outcome.files] == told


@pytest.mark.parametrize("has_results", [True, False])
def test_a_notice_after_results_lets_them_stand(paths: list[Path], tmp_path: Path, monkeypatch, has_results: bool):
    """Which may show blood: 'nothing follows from this series' would be wrong."""
    one, _ = analyser(View())
    pages = []
    genuine = notice.render
    monkeypatch.setattr(notice, "render", lambda *args, **told: pages.append(told) or genuine(*args, **told))
    before = tmp_path / "sr.dcm" if has_results else None
    series = Series(refused=[NotAnalysed(Reason.LOSSY)])
    series.files += paths
    one.close(series, tmp_path, revision=2, missing=(), predecessor=before)
    one.give_up("it died", paths, tmp_path, revision=2, predecessor=before)
    assert [told["has_results"] for told in pages] == [has_results] * 2


def test_an_engine_that_can_not_answer_ends_the_series_and_says_why(paths: list[Path], tmp_path: Path):
    one, engine = analyser(View(1))
    engine.infer = lambda _: (_ for _ in ()).throw(InferenceError("slices of 16 x 16, and plans for 512 x 512 alone"))
    series = Series()
    assert len(one.feed(series, paths)) == SLICES, "each of them is accounted for"
    outcome = one.close(series, tmp_path, revision=1, missing=())
    assert outcome.state is SeriesState.FAILED
    assert outcome.reason == "slices of 16 x 16, and plans for 512 x 512 alone"


def test_a_lost_gpu_is_not_the_series_fault(paths: list[Path], tmp_path: Path):
    one, engine = analyser(View(3))
    series = Series()
    one.feed(series, paths[:5])
    engine.infer = lambda _: (_ for _ in ()).throw(DeviceLost("the GPU hangs"))
    with pytest.raises(DeviceLost):
        one.feed(series, paths[5:])
    with pytest.raises(DeviceLost):
        one.close(series, tmp_path, revision=1, missing=())
