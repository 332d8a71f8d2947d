"""What is removed, and above all what is not."""

from __future__ import annotations

import shutil
import threading
import time
from typing import TYPE_CHECKING

import pytest
from pydicom.uid import CTImageStorage

from dicom_node import retention
from dicom_node.alerts.ledger import Ledger
from dicom_node.delivery.outbox import Outbox
from dicom_node.images.part10 import digest
from dicom_node.intake.announced import Announced, Source, StepState
from dicom_node.retention import DAY_S, Retention
from dicom_node.storage.journal import Journal, ResultFile, SeriesState
from dicom_node.storage.spool import LEAVING, QUARANTINE, Outcome, Spool
from tests.dicom_node.alerts.made import Channel, note, report, written
from tests.dicom_node.instances import SERIES, STUDY, encoded, image

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LATER = 31 * DAY_S


class Bench:
    """A spool with two series of one study, and a journal."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.results = folder, folder / "results"
        self.spool = Spool(folder / "spool", 0)
        self.journal = Journal(folder / "journal.sqlite")
        self.retention = Retention(self.spool, self.journal, self.results, keep_days=30)
        for number in (1, 2, 3):
            self.store(number)
        self.store(9, series=f"{SERIES}.9")

    def store(self, number: int, series: str = SERIES, **changed: str) -> Outcome:
        slice_ = image(number, SeriesInstanceUID=series, **changed)
        request = {"sop_class_uid": CTImageStorage, "sop_uid": slice_.SOPInstanceUID, "calling_ae": "CT01"}
        outcome, _ = self.spool.store(encoded(slice_), transfer_syntax_uid="1.2.840.10008.1.2.1", **request)
        return outcome

    def record(self, series: str = SERIES, state=SeriesState.ANALYSED, slices: int = 3, revision: int = 1) -> None:
        folder = self.results / STUDY / series / f"revision-{revision}"
        folder.mkdir(parents=True)
        files = [ResultFile("sr", folder / "sr.dcm", "1.2", f"9.{series}.{revision}")]
        files[0].path.write_bytes(b"report")
        self.journal.record_result(
            STUDY, series, revision, state=state, reason=None, slices=slices, report_json=None, files=files,
            destinations={"pacs": ("sr",)},
        )  # fmt: skip

    def deliver(self) -> None:
        for item in Outbox(self.journal).items():
            Outbox(self.journal).mark_sent(item.id)

    def sweep(self, after_s: float = LATER) -> list[str]:
        return self.retention.sweep(time.time() + after_s)

    def kept(self) -> int:
        return len(list((self.folder / "spool").rglob("*.dcm")))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.journal.close()


@pytest.fixture
def done(bench: Bench) -> Bench:
    """Both series have results, and the archive has them."""
    bench.record()
    bench.record(f"{SERIES}.9", state=SeriesState.NOT_ANALYSED, slices=1)
    bench.deliver()
    return bench


def test_what_is_delivered_goes_after_its_time_and_not_before(done: Bench):
    assert done.sweep(29 * DAY_S) == []
    assert done.kept() == 4
    assert done.sweep() == [STUDY]
    assert done.kept() == 0
    assert not (done.results / STUDY).exists()
    assert done.sweep() == []
    assert len(done.journal.series()) == 2  # what became of it stays known


def test_a_clock_that_jumps_by_a_day_removes_nothing_that_is_owed(bench: Bench):
    bench.record()
    bench.record(f"{SERIES}.9", slices=1)
    assert bench.sweep(LATER + DAY_S) == []
    bench.deliver()
    assert bench.sweep(-DAY_S) == []
    assert bench.sweep(DAY_S) == []
    assert bench.kept() == 4
    assert bench.sweep(LATER) == [STUDY]


def test_a_study_that_is_sent_again_begins_anew(done: Bench):
    """Its record is of as many slices and old enough, and not of these."""
    done.sweep()
    time.sleep(0.01)
    assert done.store(1) is Outcome.NEW
    assert done.sweep() == []
    assert done.kept() == 1


def why_not(reason: str, bench: Bench) -> None:
    """Make one thing wrong with a study that could go."""
    match reason:
        case "parked":
            Outbox(bench.journal).retry(1)
            with bench.journal.transaction() as execute:
                execute("UPDATE outbox SET state = 'parked' WHERE id = 1")
        case "queued":
            with bench.journal.transaction() as execute:
                execute("UPDATE outbox SET state = 'queued' WHERE id = 2")
        case "failed":
            bench.record(revision=2, state=SeriesState.FAILED)
            bench.deliver()
        case "a late slice":
            bench.store(4)
        case "a series without a result":
            bench.store(5, series=f"{SERIES}.5")
        case "a fresh revision":
            bench.record(revision=2)
            bench.deliver()
            with bench.journal.transaction() as execute:
                execute("UPDATE series SET recorded = ? WHERE revision = 2", (time.time() + LATER,))


@pytest.mark.parametrize(
    "reason", ["parked", "queued", "failed", "a late slice", "a series without a result", "a fresh revision"]
)
def test_one_thing_that_is_not_done_keeps_the_whole_study(done: Bench, reason: str):
    why_not(reason, done)
    before = done.kept()
    assert done.sweep() == []
    assert done.kept() == before
    assert (done.results / STUDY).exists()


def test_a_slice_that_comes_in_the_middle_is_never_deleted(done: Bench, monkeypatch):
    """It gets its name after the study was looked at and before it is taken away."""
    counts = {SERIES: 3, f"{SERIES}.9": 1}
    genuine = type(done.folder).rename

    def late(path: Path, target: Path) -> Path:
        monkeypatch.undo()
        done.store(4)
        return genuine(path, target)

    monkeypatch.setattr(type(done.folder), "rename", late)
    assert not done.spool.remove(STUDY, counts)
    assert done.kept() == 5
    assert len(done.spool.series(STUDY, SERIES)) == 4
    assert not list((done.folder / "spool" / LEAVING).iterdir())


def test_a_removal_that_a_crash_broke_off_is_undone(done: Bench):
    spool = done.folder / "spool"
    (spool / STUDY).rename(spool / LEAVING / STUDY)
    done.store(7)  # meanwhile, or before the restart
    again = Spool(spool, 0)
    assert len(again.series(STUDY, SERIES)) == 4
    assert not list((spool / LEAVING).iterdir())
    shutil.copytree(spool / STUDY, spool / "incoming" / "being deleted")
    Spool(spool, 0)
    assert not list((spool / "incoming").iterdir())


def test_a_removal_that_is_undone_drops_neither_of_two_contents(done: Bench):
    """Both were acknowledged: what came anew keeps its name, the other goes where second contents go."""
    spool = done.folder / "spool"
    before = {path.name: path.read_bytes() for path in (spool / STUDY / SERIES).iterdir()}
    (spool / STUDY).rename(spool / LEAVING / STUDY)
    assert done.store(1, PatientName="Corrected") is Outcome.NEW
    assert done.store(2) is Outcome.NEW
    Spool(spool, 0)
    after = {path.name: path.read_bytes() for path in (spool / STUDY / SERIES).iterdir()}
    (apart,) = (spool / QUARANTINE).iterdir()
    (changed,) = (name for name in before if before[name] != after[name])
    assert apart.read_bytes() == before[changed]
    assert apart.name == f"{changed.removesuffix('.dcm')}.{digest(apart)}.dcm"


def rows(bench: Bench, table: str) -> int:
    with bench.journal.statements() as execute:
        return execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0]


def test_the_journal_forgets_what_nobody_needs(done: Bench):
    done.record(revision=2)
    done.deliver()
    done.journal.record_result(
        "1.9", "1.9.1", 1, state=SeriesState.ANALYSED, reason=None, slices=1, report_json="{}",
        files=[ResultFile("sr", done.results / "sr.dcm", "1.2", "9.9.9")], destinations={"pacs": ("sr",)},
    )  # fmt: skip
    with done.journal.transaction() as execute:
        execute("UPDATE series SET report_json = '{}'")
    done.journal.forget(time.time() - 1, set())
    assert (rows(done, "outbox"), rows(done, "series")) == (4, 4), "what is young stays"
    done.journal.forget(time.time() + 1, {STUDY})
    assert (rows(done, "outbox"), rows(done, "series")) == (4, 4), "what is here stays"
    done.journal.forget(time.time() + 1, set())
    (owed,) = Outbox(done.journal).items()
    assert owed.study_uid == "1.9", "what is owed stays"
    kept = {record.series_uid: record for record in done.journal.series()}
    assert {uid: record.revision for uid, record in kept.items()} == {SERIES: 2, f"{SERIES}.9": 1, "1.9.1": 1}
    assert kept[SERIES].report_json is None
    assert kept[SERIES].state is SeriesState.ANALYSED


def test_what_scanners_announced_is_forgotten(done: Bench):
    announced = Announced(done.journal)
    announced.begin_step("1.2.9", "CT01")
    announced.end_step("1.2.9", StepState.COMPLETED, {SERIES: ["1.1"]})
    done.journal.forget(time.time() - 1, {STUDY})
    assert announced.of(SERIES, Source.STEP) == {"1.1"}
    done.journal.forget(time.time() + 1, {STUDY})
    assert announced.of(SERIES, Source.STEP) == frozenset()
    assert announced.state_of("1.2.9") is None


def test_a_sweep_that_fails_is_not_the_last(done: Bench, monkeypatch):
    monkeypatch.setattr(retention, "INTERVAL_S", 0.01)
    swept = []

    def sweep(now: float) -> None:
        swept.append(now)
        raise IndexError

    monkeypatch.setattr(done.retention, "sweep", sweep)
    done.retention.start()
    deadline = time.monotonic() + 10
    while len(swept) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    done.retention.stop()
    assert len(swept) >= 3


def test_it_runs_by_itself(done: Bench, monkeypatch):
    monkeypatch.setattr(time, "time", lambda real=time.time: real() + LATER)
    done.retention.start()
    deadline = time.monotonic() + 10
    while (done.folder / "spool" / STUDY).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    done.retention.stop()  # when it is done
    assert done.kept() == 0


def test_a_study_stays_while_an_alert_of_it_is_open_or_owed(done: Bench):
    ledger = Ledger(done.journal, [Channel()])
    note(ledger, report(), series=SERIES)
    assert done.sweep() == []
    assert ledger.acknowledge(1, "Dr A")
    assert done.sweep() == []
    ledger.sent(written(ledger)[0], "AA")
    assert done.sweep() == [STUDY]


def test_the_patient_of_an_alert_goes_with_the_study(done: Bench, monkeypatch: pytest.MonkeyPatch):
    ledger = Ledger(done.journal)
    note(ledger, report(), series=SERIES)
    ledger.acknowledge(1, "Dr A")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + LATER)
    stopped = threading.Event()
    monkeypatch.setattr(done.retention._stopping, "wait", lambda _: stopped.set() or done.retention._stopping.set())
    done.retention._run()
    assert stopped.is_set()
    assert ledger.alerts()[0].patient == {}
