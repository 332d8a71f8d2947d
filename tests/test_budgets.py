"""What the hot paths do to the machine, counted and held against budgets.toml: a guard that no busy machine upsets."""

from __future__ import annotations

import contextlib
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dicom_node.analysis import decode
from dicom_node.analysis import series as kept
from dicom_node.analysis.analyser import Analyser
from dicom_node.analysis.series import Series
from dicom_node.configuration.sections import Destination
from dicom_node.delivery import sender
from dicom_node.delivery.outbox import Outbox
from dicom_node.delivery.sender import Sender
from dicom_node.simulation import phantom as writer
from dicom_node.simulation.pacs import Pacs
from dicom_node.simulation.scanner import push
from dicom_node.storage.journal import Journal, SeriesState
from runtime.bundle import open_bundle
from runtime.ort import OrtSession
from runtime.types import ModelIdentity, Plane, Slice, SliceLabels
from tests.dicom_node.instances import Recorder, receiving
from tests.operations import counted, memory, transactions

BUDGETS = tomllib.loads((Path(__file__).parent / "budgets.toml").read_text())
SLICES, SIDE = 24, 256
PIXELS_B = 2 * SIDE * SIDE


class Engine:
    """Finds a bleed in the middle of the series, and counts what it is asked."""

    identity = ModelIdentity("recorder", "1", "0" * 64, "fp32", "none", "nothing")

    def __init__(self) -> None:
        self.slices = 0

    def infer(self, hu: np.ndarray) -> list[SliceLabels]:
        self.slices += len(hu)
        return [self._answer(int(one[0, 0, 0])) for one in hu]

    def _answer(self, number: int) -> SliceLabels:
        labels = np.zeros((SIDE, SIDE), np.uint8)
        if SLICES // 3 < number < SLICES // 2:
            labels[100:180, 100:180] = 1
        voxels = np.bincount(labels.ravel(), minlength=7)
        return SliceLabels(labels, voxels, np.float32([1.0, *(voxels[1:] > 0)]))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    def one(i: int) -> Slice:
        plane = Plane((-120.0, -120.0, 5.0 * i), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.9, 0.9), 5.0)
        return Slice(str(i), plane, np.full((SIDE, SIDE), i, np.int16))

    return writer.write([one(i) for i in range(SLICES)], tmp_path_factory.mktemp("series"))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every slice that is decoded."""
    found: list[Path] = []

    def hounsfield(image: object, work: object = decode.hounsfield) -> np.ndarray:
        found.append(image)
        return work(image)

    monkeypatch.setattr(decode, "hounsfield", hounsfield)
    return found


def analyser(engine: Engine) -> Analyser:
    return Analyser(open_bundle(), engine, (), min_slices=5, min_coverage_mm=0, max_batch=4)


def within(counts: dict[str, float], budget: dict[str, float]) -> None:
    """Hold every number of a budget against what was counted."""
    over = {name: (counts[name], most) for name, most in budget.items() if counts[name] > most}
    assert over == {}, "counted, and allowed"


def test_intake_of_a_slice(paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with receiving(tmp_path / "spool", Recorder()) as receiver:
        address = ("127.0.0.1", receiver.port)

        def send(some: list[Path]) -> None:
            assert not push(some, address, calling_ae="CT", called_ae="SCANSIDE").failed

        send(paths[:1])  # which makes the directories, and loads what is loaded once
        counts = []
        for some in (paths[1:5], paths[5:]):
            with counted(monkeypatch, "association-", tmp_path) as count:
                send(some)
            count["slices"] = len(some)
            counts.append(count)
    few, many = counts  # an association's own costs fall out
    slices = many["slices"] - few["slices"]
    each = {name: (many[name] - few[name]) / slices for name in (*many, *BUDGETS["intake"])}
    size = sum(path.stat().st_size for path in paths) / len(paths)
    each["bytes_written_beside_the_slice"] = each["bytes_written"] - size
    within(each, {name: most for name, most in BUDGETS["intake"].items() if name != "peak_bytes"})


def test_memory_of_intake_is_not_that_of_the_object(tmp_path: Path):
    spool = receiving(tmp_path / "spool", Recorder())
    piece = memoryview(bytes(1 << 17))
    with spool as receiver:
        kept = receiver._spool
        request = {"sop_class_uid": "1.2", "sop_uid": "1.2.3", "transfer_syntax_uid": "1.2.840.10008.1.2.1"}
        with memory() as told:
            incoming = kept.incoming(**request, calling_ae="CT")
            for _ in range(100):  # 13 MB
                incoming.write(piece)
            incoming.discard()
    within({"peak_bytes": told["peak"]}, {"peak_bytes": BUDGETS["intake"]["peak_bytes"]})


def test_analysis_of_a_slice(paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[Path]):
    engine, series = Engine(), Series()
    one = analyser(engine)
    one.feed(series, paths[:1])
    with counted(monkeypatch) as count:
        for path in paths[1:]:
            one.feed(series, [path])
    fed = len(paths) - 1
    each = {name: count[name] / fed for name in BUDGETS["analysis"]}
    each["decodes"] = len(decoded) / len(paths)
    one.close(series, tmp_path / "results", revision=1, missing=())
    each["inferences"] = engine.slices / len(paths)
    with memory() as told:
        again = Series()
        for path in paths:
            one.feed(again, [path])
        while again.make_tile():
            pass
    each["kept_slices"] = (told["kept"] - sum(hu.nbytes for hu in again.recent.values())) / len(paths) / PIXELS_B
    monkeypatch.setattr(kept, "TILES_B", 3 * again.tile(next(iter(again.paths))).nbytes)
    thinned = Series()
    for path in paths:
        one.feed(thinned, [path])
        thinned.make_tile()
    assert 0 < sum(tile.nbytes for tile in thinned.tiles.values()) <= kept.TILES_B
    assert all((thinned.tile(key) == again.tile(key)).all() for key in again.paths)
    again.forget(1)
    assert sum(hu.nbytes for hu in again.recent.values()) <= kept.KEPT_B
    with memory() as told:
        one.feed(Series(), paths[:1])
    each["peak_slices"] = told["peak"] / PIXELS_B
    within(each, BUDGETS["analysis"])


def test_close_of_a_series(paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[Path]):
    monkeypatch.setattr(kept, "KEPT_B", 0)
    one, series = analyser(Engine()), Series()
    one.feed(series, paths)
    one.close(series, tmp_path / "warm", revision=1, missing=())
    gone = [key for key in series.paths if key not in series.recent]
    decoded.clear()
    pictured: set[str] = set()

    def noted(series: Series, key: str, work: object = Series.grey) -> object:
        pictured.add(key)
        return work(series, key)

    monkeypatch.setattr(Series, "grey", noted)
    with counted(monkeypatch) as count:
        outcome = one.close(series, tmp_path / "results", revision=1, missing=())
    assert outcome.state is SeriesState.ANALYSED
    files = len(outcome.files)
    assert files >= 3
    counts = {f"{name}_beside_files": count[name] - files for name in ("fsync", "open")}
    again = len(pictured & set(gone))  # slices to picture whose HU had to be read again
    counts["open_beside_files"] -= again
    counts["replace_beside_files"] = count["replace"] + count["rename"] - files
    counts["decodes_beside_pictures"] = len(decoded) - again
    within(counts, BUDGETS["close"])


@pytest.fixture
def owed(paths: list[Path], tmp_path: Path) -> Iterator[tuple[Journal, int]]:
    """A journal in which a destination is owed the results of a series."""
    one, series = analyser(Engine()), Series()
    one.feed(series, paths)
    outcome = one.close(series, tmp_path / "results", revision=1, missing=())
    with contextlib.closing(Journal(tmp_path / "journal.sqlite")) as journal:
        with transactions(journal) as begun:
            journal.record_result(
                "1.2", "1.2.3", 1, state=outcome.state, reason=None, slices=SLICES, report_json="{}",
                files=outcome.files, destinations={"archive": ("sr", "sc", "seg")},
            )  # fmt: skip
        within({"transactions": len(begun)}, BUDGETS["record"])
        yield journal, len(outcome.files)


def test_delivery_of_a_batch(owed: tuple[Journal, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    journal, objects = owed
    archive = Pacs(tmp_path / "archive", ae_title="ARCHIVE")
    archive.start()
    associations: list[object] = []

    def associate(*arguments: object, work: object = sender.associate, **options: object) -> object:
        associations.append(arguments)
        return work(*arguments, **options)

    monkeypatch.setattr(sender, "associate", associate)
    done = threading.Semaphore(0)
    destination = Destination(name="archive", ae_title="ARCHIVE", host="127.0.0.1", port=archive.port)
    delivery = Sender(Outbox(journal), [destination], "SCANSIDE", lambda _: done.release())
    with transactions(journal) as begun:
        delivery.start()
        for _ in range(objects):
            assert done.acquire(timeout=30)
        delivery.stop()
    archive.stop()
    counts = {"associations": len(associations), "transactions_beside_objects": len(begun) - objects}
    within(counts, BUDGETS["delivery"])


def test_onnx_runtime_runs_once_for_a_batch_and_copies_it_once():
    session = OrtSession(open_bundle(), threads=1)
    engine, fed = session._session, []

    class Watched:
        def run(self, outputs: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            fed.append(inputs["hu"])
            return engine.run(outputs, inputs)

    session._session = Watched()
    hu = np.zeros((4, 1, 64, 64), np.int32)
    session.infer(hu)
    assert len(fed) == 1
    assert np.shares_memory(fed[0], hu), "int32 goes in as it is"
