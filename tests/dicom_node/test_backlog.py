"""Slices that come while the journal can't be read: kept with all that is known of them, noted once, and told once."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from dicom_node.assembler import Assembler
from dicom_node.backlog import Backlog
from dicom_node.storage.database import JournalError
from dicom_node.storage.journal import Journal, SeriesState
from dicom_node.storage.register import history
from dicom_node.storage.spool import Instance, Outcome, Spool
from tests.dicom_node.instances import image
from tests.dicom_node.storage.test_spool import store
from tests.runtime.test_geometry import axial

if TYPE_CHECKING:
    from collections.abc import Callable

    from dicom_node.assembler import Assembly

TIMEOUT_S = 10.0


class Bench:
    """A backlog whose journal can go away, whose worker sees at once what it is fed, and whose clock is pushed on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fault: Exception | None = None
        self.now = 0.0
        self.disk: dict[str, list[Path]] = {}
        self.fed: list[tuple[str, list[str]]] = []
        self.later: list[Callable[[], None]] = []
        self.assembler = Assembler(TIMEOUT_S, self.history, min_coverage_mm=0)
        self.backlog = Backlog(self.assembler, self.feed, self.later.append)
        monkeypatch.setattr("time.monotonic", lambda: self.now)

    def history(self, _: str, series_uid: str) -> tuple[int, list[Path], bool]:
        if self.fault:
            raise self.fault
        return 0, self.disk.get(series_uid, []), False

    def feed(self, assembly: Assembly, paths: list[Path]) -> None:
        if paths:
            self.fed.append((assembly.series_uid, [path.stem for path in paths]))
        for path in paths:
            self.assembler.seen(assembly.name, path, (axial(float(path.stem)),))

    def store(self, z: float, series_uid: str = "1.2", association: str = "ct") -> None:
        path = Path(f"/spool/{series_uid}/{z}.dcm")
        self.disk.setdefault(series_uid, []).append(path)
        self.backlog.stored(association, Instance("1", series_uid, "ct", f"{series_uid}.{z}", "le", path, "hash"))

    def retry(self) -> None:
        (again,) = self.later
        self.later.clear()
        again()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


FAULTS = pytest.mark.parametrize("fault", [JournalError("away"), OSError("no such device")], ids=repr)


@FAULTS
def test_what_waited_comes_in_together_with_the_end_of_its_association(bench: Bench, fault: Exception):
    bench.fault = fault
    for z in (0, 5, 10):
        bench.store(z)
        bench.now += 1
    bench.backlog.ended("ct", released=True)
    bench.retry()
    assert bench.fed == []
    assert list(bench.assembler.due(bench.now)) == []
    bench.fault = None
    bench.retry()
    assert bench.fed == [("1.2", ["0", "5", "10"])]
    (closed,) = bench.assembler.due(bench.now)
    assert closed.missing == (), "it was released in order"
    assert closed.longest_pause_s == 1, "as the slices came, not as they were noted"
    assert bench.backlog.images() == 0
    assert bench.later == []


def test_an_association_that_broke_off_is_not_forgotten_either(bench: Bench):
    bench.fault = JournalError("away")
    for z in (0, 5, 10):
        bench.store(z)
    bench.backlog.ended("ct", released=False)
    bench.fault = None
    bench.retry()
    assert list(bench.assembler.due(bench.now)) == []
    (closed,) = bench.assembler.due(TIMEOUT_S)
    assert "the sender broke off" in closed.missing[0]


def test_a_series_that_was_open_goes_on_and_ends_at_once(bench: Bench):
    """Both come over one association."""
    bench.store(0, "1.3")
    bench.fault = JournalError("away")
    for z in (5, 10):
        bench.store(z, "1.3")
        bench.store(z, "1.2")
    bench.backlog.ended("ct", released=True)
    (closed,) = bench.assembler.due(bench.now)
    assert (closed.series_uid, closed.missing) == ("1.3", ())
    assert bench.backlog.images() == 2
    bench.fault = None
    bench.retry()
    (closed,) = bench.assembler.due(bench.now)
    assert (closed.series_uid, closed.missing) == ("1.2", ())


def test_what_comes_when_the_journal_is_back_keeps_its_place(bench: Bench):
    bench.fault = JournalError("away")
    bench.store(0)
    bench.store(5)
    bench.fault = None
    bench.store(10)
    assert bench.fed == [], "what came before it is not noted yet"
    bench.backlog.ended("ct", released=True)
    bench.retry()
    (closed,) = bench.assembler.due(bench.now)
    assert [path.stem for path in closed.brought["ct"]] == ["0", "5", "10"]


def test_a_series_that_something_else_has_opened_is_not_waited_for(bench: Bench):
    bench.fault = JournalError("away")
    bench.store(0)
    bench.fault = None
    bench.assembler.reopen("1", "1.2", bench.now)
    bench.store(5)
    assert bench.backlog.images() == 0
    bench.retry()  # in vain
    assert bench.later == []


def test_it_is_said_once_for_a_series_and_once_when_it_is_over(bench: Bench):
    bench.fault = JournalError("the database is away")
    with capture_logs() as logs:
        for z in (0, 5, 10):
            for series_uid in ("1.2", "1.3"):
                bench.store(z, series_uid)
        for _ in range(9):
            bench.now += 5
            bench.retry()
        assert bench.backlog.images() == 6
        bench.fault = None
        bench.retry()
    told = [(each["event"], each["series"], each.get("images"), each.get("after_s")) for each in logs]
    assert told == [
        ("series_not_opened", "1/1.2", None, None),
        ("series_not_opened", "1/1.3", None, None),
        ("series_opened", "1/1.2", 3, 45),
        ("series_opened", "1/1.3", 3, 45),
    ]
    assert logs[0]["reason"] == "the database is away"


def test_a_bug_at_one_slice_does_not_hold_up_the_others(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    bench.fault = JournalError("away")
    bench.store(0, "1.2")
    bench.store(0, "1.3")
    bench.fault = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        bench.retry()
    bench.fault = None
    bench.retry()
    assert ("1.3", ["0"]) in bench.fed
    assert bench.later == []


def test_whether_a_result_has_all_there_is_comes_from_journal_and_disk(tmp_path: Path):
    spool, journal = Spool(tmp_path / "spool", 0.0), Journal(tmp_path / "journal.sqlite")
    first = image(number=1)
    outcome, kept = store(spool, first)
    key = kept.study_uid, kept.series_uid

    def record(revision: int, slices: int) -> None:
        told = {"state": SeriesState.FAILED, "reason": "x", "report_json": None, "files": (), "destinations": {}}
        journal.record_result(*key, revision, slices=slices, **told)

    assert outcome is Outcome.NEW
    assert history(spool, journal, *key) == (0, [kept.path], False)
    record(1, 1)
    assert history(spool, journal, *key) == (1, [kept.path], True)
    store(spool, image(number=2))
    assert history(spool, journal, *key)[2] is False, "more has come"
    record(2, 3)
    assert history(spool, journal, *key)[2] is True
    kept.path.unlink()
    store(spool, first)
    later = time.time() + 1  # the clock of directories is coarse
    os.utime(kept.path.parent, (later, later))
    assert history(spool, journal, *key)[2] is False, "it has come anew after a removal"
    assert history(spool, journal, "9", "9") == (0, [], False)
    journal.close()


def test_the_desk_waits_for_a_slow_journal_once_and_not_for_each_series(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    bench.fault = JournalError("locked")
    for series_uid in ("1.1", "1.2", "1.3"):
        bench.store(0, series_uid)
    asked = []
    monkeypatch.setattr(bench.assembler, "_history", lambda *key: asked.append(key) or bench.history(*key))
    bench.retry()
    assert len(asked) == 1
    assert bench.backlog.images() == 3
    bench.fault = None
    bench.retry()
    assert [series_uid for series_uid, _ in bench.fed] == ["1.1", "1.2", "1.3"]


def test_new_lists_are_looked_up_when_the_journal_is_back(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    bench.store(0)
    (assembly,) = bench.assembler._open.values()

    def lists(_: str) -> tuple[set[str], bool]:
        if bench.fault:
            raise bench.fault
        return {"1.2.0", "1.2.5"}, True

    monkeypatch.setattr(bench.assembler, "_lists", lists)
    bench.fault = JournalError("away")
    bench.backlog.announced(("1.2",))
    bench.fault = None
    assert not assembly.committed
    bench.retry()
    assert (assembly.listed, assembly.committed) == ({"1.2.0", "1.2.5"}, True)


def test_who_waited_for_the_journal_makes_no_series_older(bench: Bench):
    bench.fault = JournalError("away")
    bench.store(0)
    bench.now = 100.0
    bench.fault = None
    bench.assembler.reopen("1", "1.2", bench.now)
    bench.retry()
    (assembly,) = bench.assembler._open.values()
    assert assembly.last_arrival == 100.0
