"""What is told of a series before it ends: when, what of it, and what is left beside it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.sr.coding import Code
from structlog.testing import capture_logs

from dicom_node.analysis.analyser import Analyser
from dicom_node.analysis.series import Series
from dicom_node.analysis.worker import _outcome, _tell_early
from dicom_node.assembler import Assembler
from dicom_node.configuration.config import Config
from dicom_node.dispatch import Dispatch
from dicom_node.monitoring.metrics import Metrics
from dicom_node.opening import opening as opening_of
from dicom_node.results import result_set, writing
from dicom_node.results.codes import BRAIN, OwnCode
from dicom_node.results.result_set import Form
from dicom_node.simulation import enhanced, phantom
from dicom_node.storage.spool import Instance
from runtime.bundle import open_bundle
from runtime.geometry import View
from runtime.report import ARRIVING
from runtime.triage import Rule
from runtime.types import ModelIdentity, OperatingPoint, Plane, Slice, SliceLabels

SLICES, SIDE, STEP_MM = 12, 32, 10.0  # a pixel of 10 mm2, a slice of 10 mm: 0.1 ml
RULES = (Rule("critical", ("any",), 20.0), Rule("urgent", ("any",), 0.0))
BLEEDING = range(3, 9)  # slices of 60 pixels of blood: 6 ml each, so the second makes it urgent and the fourth critical


class Threshold:
    """An engine that takes what is bright for intracerebral blood."""

    identity = ModelIdentity("threshold", "1", "0" * 64, "fp32", "none", "nothing")
    why = "asked for"

    def __init__(self, view: View) -> None:
        self._answered = slice(view.first, view.first + view.answered)

    def infer(self, hu: np.ndarray) -> list[SliceLabels]:
        shown = hu[:, self._answered].reshape(-1, *hu.shape[2:])
        answers = []
        for labels in (shown > 50).astype(np.uint8):
            voxels = np.bincount(labels.ravel(), minlength=7)
            answers.append(SliceLabels(labels, voxels, np.where(voxels > 0, 0.8, 0.0).astype(np.float32)))
        return answers

    def close(self) -> None:
        pass


def head(bleeding: Iterable[int] = BLEEDING) -> list[Slice]:
    made = []
    for i in range(SLICES):
        hu = np.zeros((SIDE, SIDE), np.int16)
        hu[:2, :30] = 70 if i in bleeding else 0
        plane = Plane((0.0, 0.0, STEP_MM * i), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (4.0, 2.5), STEP_MM)
        made.append(Slice(str(i), plane, hu))
    return made


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return phantom.write(head(), tmp_path_factory.mktemp("head"))


def analyser(
    rules: Sequence[Rule] = RULES,
    point: OperatingPoint | None = None,
    view: View = View(),  # noqa: B008  # frozen
    max_batch: int = 4,
) -> Analyser:
    points = dict.fromkeys(open_bundle().classes[1:], point or OperatingPoint(6.5))
    bundle = dataclasses.replace(open_bundle(), view=view, operating_point=points)
    return Analyser(bundle, Threshold(view), rules, min_slices=5, min_coverage_mm=0, max_batch=max_batch)


def told(one: Analyser, paths: Iterable[Path], series: Series | None = None) -> list[tuple[int, str]]:
    """After how many slices which level was told."""
    series, said = series or Series(), []
    for path in paths:
        one.feed(series, [path])
        if report := one.look(series):
            assert report.missing == (ARRIVING,)
            assert report.provisional
            assert report.slices == len(series.labels)
            said.append((len(series.planes), report.decision.level))
    return said


def test_each_level_is_told_once_as_soon_as_the_slices_make_it(paths: list[Path]):
    assert told(analyser(), paths) == [(5, "urgent"), (7, "critical")]


def test_nothing_is_told_where_too_few_slices_are_here_to_be_a_head(paths: list[Path]):
    assert told(analyser(), paths[3:]) == [(5, "critical")], "that is 24 ml, at once"


def test_in_any_order_it_is_told_no_sooner_than_the_blood_is_here(paths: list[Path]):
    interleaved = [*paths[::2], *paths[1::2]]
    assert told(analyser(), interleaved) == [(5, "urgent"), (8, "critical")]
    assert told(analyser(), paths[::-1]) == [(5, "urgent"), (7, "critical")]


def test_dampers_hold_for_what_is_told_early_too(paths: list[Path]):
    assert told(analyser(point=OperatingPoint(0.0, 0.81)), paths) == []
    assert told(analyser(point=OperatingPoint(0.0, 0.8)), paths) == [(5, "urgent"), (7, "critical")]
    assert told(analyser(point=OperatingPoint(0.0, 0.0, 5)), paths) == [(8, "critical")]
    interleaved = [*paths[::2], *paths[1::2]]
    assert told(analyser(point=OperatingPoint(0.0, 0.0, 3)), interleaved) == [(9, "critical")], "4, 5 and 6"


def test_a_rule_that_wants_company_waits_for_it(paths: list[Path]):
    beside = Rule("critical", ("intracerebral",), 1.0, also=("subdural",))
    assert told(analyser([beside, RULES[1]]), paths) == [(5, "urgent")]


def test_a_network_with_neighbours_tells_a_slice_later_and_one_for_volumes_nothing(paths: list[Path]):
    assert told(analyser(view=View(3)), paths) == [(7, "urgent"), (8, "critical")], "five of seven are answered"
    assert told(analyser(view=View(6, 4)), paths) == []


def test_rules_that_change_hold_from_the_next_slice_on(paths: list[Path]):
    one, series = analyser(()), Series()
    assert told(one, paths[:8], series) == []
    limits = {"min_slices": 5, "min_coverage_mm": 0, "max_lossy_ratio": 1.0, "bone_kernels": ()}
    one.reload(RULES, **limits, form=result_set.USUAL)
    assert told(one, paths[8:], series) == [(9, "critical")]


def test_a_series_for_bone_or_of_several_sizes_tells_nothing(paths: list[Path], tmp_path: Path):
    bone = []
    for path in paths:
        image = dcmread(path)
        image.ConvolutionKernel = "BONE"
        bone.append(tmp_path / path.name)
        image.save_as(bone[-1])
    assert told(analyser(), bone) == []
    odd = dataclasses.replace(head()[0], hu=np.zeros((16, 16), np.int16))
    assert told(analyser(), [*phantom.write([odd], tmp_path / "odd"), *paths]) == []


def test_a_look_at_all_slices_that_comes_to_nothing_is_not_had_again_at_once(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
):
    """Counts may say more than the whole: then looking at 2,000 slices for each of them would never end."""
    one, series = analyser(), Series()
    for path in paths[:4]:
        one.feed(series, [path])
    monkeypatch.setattr(series.evidence, "level", lambda *_: "critical")
    wholes = []
    monkeypatch.setattr(
        "dicom_node.analysis.analyser.compose",
        lambda stack, *_, **__: wholes.append(len(stack)) or SimpleNamespace(decision=SimpleNamespace(level="routine")),
    )
    for path in paths[4:]:
        one.feed(series, [path])
        assert one.look(series) is None
    assert wholes == [5, 6, 7, 8, 10, 12]


def test_what_it_drew_lies_whole_beside_it(paths: list[Path], tmp_path: Path):
    one, series = analyser(), Series()
    one.feed(series, paths[:7])
    report = one.look(series)
    folder = tmp_path / "revision-1"
    series.labels["file"] = series.labels[report.findings[0].keys[0]]  # an illegal UID, and what savez can't name
    shown = dataclasses.replace(report.findings[0], keys=(*report.findings[0].keys, "file"))
    path = writing.write_early(dataclasses.replace(report, findings=(shown,)), series.labels, folder)
    with np.load(path, allow_pickle=False) as kept:
        assert set(kept) == {*shown.keys}
        for key in kept:
            assert kept[key].dtype == np.uint8
            assert np.array_equal(kept[key], series.labels[key].labels)
    assert [one.name for one in folder.iterdir()] == ["early.npz"], "no half of it"


def test_a_look_that_fails_is_logged_and_costs_the_series_nothing(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    one, series, said = analyser(), Series(), StringIO()
    one.feed(series, paths[:7])
    monkeypatch.setattr("dicom_node.analysis.analyser.compose", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
    with capture_logs() as logs:
        for _ in range(2):
            _tell_early(one, "one", series, tmp_path, said)
    assert [(line["event"], line["reason"]) for line in logs] == [("early_look_failed", "MemoryError")]
    assert said.getvalue() == ""


def test_a_disk_that_is_full_costs_the_picture_and_not_the_word(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    one, series, said = analyser(), Series(), StringIO()
    one.feed(series, paths[:7])
    (tmp_path / "file").touch()
    with capture_logs() as logs:
        _tell_early(one, "one", series, tmp_path / "file", said)
    assert [line["event"] for line in logs] == ["early_labels_not_kept"]
    assert json.loads(said.getvalue())["is"] == "early"


def test_findings_are_called_as_the_site_calls_them_before_the_end_and_at_it(paths: list[Path], tmp_path: Path):
    one, series, said = analyser(), Series(), StringIO()
    own = OwnCode(Code("B7", "99SITE", "Bleed, inner"), BRAIN, "Inner bleed")
    one.form = Form(codes=dict.fromkeys(one.bundle.classes[1:], own))
    one.feed(series, paths[:7])
    _tell_early(one, "one", series, tmp_path, said)
    outcome = one.close(series, tmp_path / "done", revision=1, missing=[])
    reports = (
        json.loads(said.getvalue())["report"],
        _outcome(outcome, one.form, {"arrived": 0.0, "closed": 0.0})["report"],
    )
    kept = (tmp_path / "done" / "report.json").read_text()
    for report in (*reports, kept):
        (finding,) = json.loads(report)["findings"]
        assert (finding["title"], finding["code"]) == ("Inner bleed", ["B7", "99SITE", "Bleed, inner"])


def answers(requests: list[dict[str, object]], max_batch: int = 1) -> list[dict[str, object]]:
    """What a worker answers."""
    command = [sys.executable, "-c", WORKER.replace("max_batch=1", f"max_batch={max_batch}")]
    given = "".join(f"{json.dumps(one)}\n" for one in requests)
    shown = subprocess.run(command, input=given, capture_output=True, text=True, check=True, timeout=60)
    return [json.loads(line) for line in shown.stdout.splitlines()]


WORKER = """
import dicom_node.analysis.worker as worker
from tests.dicom_node.test_early import analyser

worker._open = lambda opening, answers: analyser(max_batch=1)
worker.main()
"""


def test_a_worker_tells_it_before_the_slice_and_again_after_a_restart(paths: list[Path], tmp_path: Path):
    """Two series take turns; what one shows is not told of the other."""
    clean = phantom.write(head(()), tmp_path / "files")
    opening = opening_of(Config())
    requests = [
        {"do": "slice", "series": name, "path": str(path), "folder": str(tmp_path / name)}
        for pair in zip(paths, clean, strict=True)
        for name, path in zip(("bleeds", "clean"), pair, strict=True)
    ]
    close = {
        "do": "close",
        "revision": 1,
        "missing": [],
        "predecessor": None,
        "arrived": 0.0,
        "closed": 0.0,
        "given_up": None,
        "paths": [],
    }
    closing = [
        close | {"series": name, "folder": str(tmp_path / "results" / name / "revision-1")}
        for name in ("bleeds", "clean")
    ]
    said = answers([opening, *requests, *closing])
    early = [one for one in said if one["is"] == "early"]
    assert [(one["series"], json.loads(one["report"])["decision"]["level"]) for one in early] == [
        ("bleeds", "urgent"),
        ("bleeds", "critical"),
    ]
    before = said[: said.index(early[0])]
    assert sum(one["is"] == "slice" and one["series"] == "bleeds" for one in before) == 4, "it comes before the fifth"
    header = dcmread(paths[0])
    report = json.loads(early[1]["report"])
    assert report["missing"] == [ARRIVING]
    assert report["received"] == report["slices"] == 7
    assert report["operating_point"]["subdural"]["minimum_volume_ml"] == 6.5
    assert early[1]["key"] == report["findings"][0]["key_slice"]
    assert early[1]["patient"]["PatientID"] == header.PatientID
    assert early[1]["patient"]["PatientName"] == str(header.PatientName)
    with np.load(tmp_path / "bleeds" / "early.npz") as kept:
        assert len(kept) == 4
    assert not (tmp_path / "clean").exists()
    for result in said[-2:]:
        assert result["patient"]["PatientID"] == dcmread((paths, clean)[result["series"] == "clean"][0]).PatientID
    assert json.loads(said[-2]["report"])["decision"]["level"] == "critical"
    again = answers([opening, *(one for one in requests if one["series"] == "bleeds")])
    assert [one["is"] for one in again].count("early") == 2


def test_frames_of_one_file_are_looked_at_batch_by_batch(tmp_path: Path):
    (path,) = enhanced.write(head(), tmp_path / "frames")
    request = {"do": "slice", "series": "one", "path": str(path), "folder": str(tmp_path / "one")}
    said = answers([opening_of(Config()), request], max_batch=4)
    assert [one["is"] for one in said] == ["going", "going", "early", "slice"]
    assert said[2]["key"].endswith(" frame 4")
    with np.load(tmp_path / "one" / "early.npz") as kept:
        assert said[2]["key"] in kept


def test_the_desk_hands_it_on_and_times_it():
    heard, metrics = [], Metrics()
    supervisor = SimpleNamespace(pid=1, send=lambda *_, **__: None, kill=lambda: heard.append("killed"))
    assembler = Assembler(10, lambda *_: (0, [], False), min_coverage_mm=0)
    desk = Dispatch(
        supervisor,
        assembler,
        Path("/results"),
        lambda _, result: heard.append(result),
        metrics,
        lambda *told: heard.append(told),
    )
    desk.hear(
        {"is": "ready", "worker": 1, "servers": {}, **dict.fromkeys(("model", "backend", "precision", "why"), "")}
    )
    path = Path("/spool/1/1.2/one.dcm")
    desk.feed(*assembler.stored("ct", Instance("1", "1.2", "ct", "one", "le", path, "hash"), 0.0))
    desk.pump(0.0)
    report = json.dumps({"decision": {"level": "urgent"}, "findings": [], "provisional": True})
    with pytest.raises(RuntimeError, match="answered 1/9/1 early instead of"):  # a worker that has lost count
        desk.hear({"is": "early", "series": "1/9/1", "report": report, "patient": {"PatientID": "9"}, "key": "k"})
    assert heard.pop() == "killed"
    desk.hear({"is": "early", "series": "1/1.2/1", "report": report, "patient": {"PatientID": "7"}, "key": "k"})
    ((assembly, told, patient),) = heard
    assert (assembly.series_uid, told, patient) == ("1.2", report, {"PatientID": "7"})
    count = metrics.registry.get_sample_value("scanside_stage_seconds_count", {"stage": "alert"})
    assert count == 1
    desk.hear({"is": "slice", "series": "1/1.2/1", "rank": None, "path": str(path), "planes": [], "refusals": []})
    desk.close(assembly)
    desk.pump(0.0)
    told = {
        "state": "analysed",
        "reason": None,
        "report": report,
        "files": [],
        "code": None,
        "patient": {"PatientID": "7"},
    }
    desk.hear({"is": "result", "series": "1/1.2/1", **told})
    assert heard[-1].patient == {"PatientID": "7"}
