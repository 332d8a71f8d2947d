"""The journal: one transaction for a result and what is owed for it, whatever kills the process in between."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dicom_node.delivery.outbox import DeliveryState, Outbox
from dicom_node.intake.announced import Announced, Source
from dicom_node.storage.journal import Journal, JournalError, ResultFile, SeriesState
from dicom_node.storage.postgres import Address

ALL = ("sr", "sc", "seg")
PACS = {"pacs": ALL}
LATER = ("twin", "attempt", "message", "acknowledgement", "alert", "node")  # the tables of later schemas


@pytest.fixture
def journal(place):
    with contextlib.closing(Journal(place)) as opened:
        yield opened


def result_files(prefix: str) -> list[ResultFile]:
    """Out of order on purpose."""
    return [
        ResultFile(role, Path(f"/results/{prefix}.{role}"), "1.2.3", f"{prefix}.{role}") for role in ("seg", "sc", "sr")
    ]


def record(journal: Journal, series_uid: str = "1.1", revision: int = 1, destinations=None) -> bool:
    return journal.record_result(
        "1",
        series_uid,
        revision,
        state=SeriesState.ANALYSED,
        reason=None,
        slices=40,
        report_json='{"findings": []}',
        files=result_files(f"{series_uid}.{revision}"),
        destinations=PACS if destinations is None else destinations,
    )


def states(journal: Journal) -> list[tuple[str, str]]:
    return [(item.sop_uid, item.state.value) for item in Outbox(journal).items()]


def test_a_result_and_what_is_owed_for_it(journal):
    before = time.time()
    assert record(journal, destinations={"pacs": ALL, "archive": ("seg",), "nobody": ()})
    last = journal.latest("1", "1.1")
    assert (last.revision, last.state, last.reason, last.slices) == (1, SeriesState.ANALYSED, None, 40)
    assert last.report_json == '{"findings": []}'
    assert before <= last.recorded <= time.time()
    assert journal.series() == [last]
    owed = [(item.destination, item.role, item.path) for item in Outbox(journal).items()]
    assert owed == [
        ("pacs", "sr", Path("/results/1.1.1.sr")),
        ("pacs", "sc", Path("/results/1.1.1.sc")),
        ("pacs", "seg", Path("/results/1.1.1.seg")),
        ("archive", "seg", Path("/results/1.1.1.seg")),
    ]
    assert all(item.state is DeliveryState.QUEUED and item.attempts == 0 for item in Outbox(journal).items())


def test_a_series_that_was_not_analysed_owes_nothing(journal):
    assert journal.record_result(
        "1",
        "1.1",
        1,
        state=SeriesState.NOT_ANALYSED,
        reason="localizer",
        slices=2,
        report_json=None,
        files=[],
        destinations=PACS,
    )
    last = journal.latest("1", "1.1")
    assert (last.state, last.reason, last.report_json) == (SeriesState.NOT_ANALYSED, "localizer", None)
    assert Outbox(journal).items() == []


def test_recording_twice_changes_nothing(journal):
    assert record(journal)
    [first, *_] = Outbox(journal).claim("pacs", time.time())
    Outbox(journal).mark_sent(first.id)
    before = Outbox(journal).items(), journal.series()
    assert not record(journal)
    assert not record(journal, destinations={"pacs": ALL, "another": ALL})
    assert (Outbox(journal).items(), journal.series()) == before


def test_the_latest_revision(journal):
    for revision in (1, 3, 2):
        record(journal, revision=revision)
    record(journal, series_uid="1.2")
    assert journal.latest("1", "1.1").revision == 3
    assert journal.latest("1", "1.3") is None
    assert journal.latest("2", "1.1") is None


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"state": "finished"}, ValueError),
        ({"files": [ResultFile("png", Path("x"), "1.2.3", "9.9")]}, ValueError),
        ({"files": [ResultFile("sr", Path("x"), "1.2.3", "1.1.1.sr")]}, JournalError),  # owed for revision 1 already
        ({"files": [ResultFile("sr", Path("x"), "1.2.3", None)]}, JournalError),
        ({"slices": None}, JournalError),
    ],
)
def test_what_is_wrong_is_not_recorded_at_all(journal, wrong, error):
    record(journal)
    before = Outbox(journal).items(), journal.series()
    right = {
        "state": SeriesState.ANALYSED,
        "reason": None,
        "slices": 1,
        "report_json": None,
        "files": result_files("1.1.2"),
        "destinations": PACS,
    }
    with pytest.raises(error):
        journal.record_result("1", "1.1", 2, **(right | wrong))
    assert (Outbox(journal).items(), journal.series()) == before
    assert record(journal, revision=2)  # and the journal still works


def test_claiming_takes_a_destination_s_items_in_order(journal):
    record(journal, destinations={"pacs": ALL, "archive": ALL})
    record(journal, series_uid="1.2")
    items = Outbox(journal).claim("pacs", time.time())
    assert [item.sop_uid for item in items] == [
        "1.1.1.sr",
        "1.1.1.sc",
        "1.1.1.seg",
        "1.2.1.sr",
        "1.2.1.sc",
        "1.2.1.seg",
    ]
    assert {item.state for item in items} == {DeliveryState.SENDING}
    assert {item.state for item in Outbox(journal).items() if item.destination == "archive"} == {DeliveryState.QUEUED}
    assert Outbox(journal).claim("nobody", time.time()) == []


def test_what_failed_waits_and_then_goes_last(journal):
    record(journal)
    now = time.time()
    sr, sc, seg = Outbox(journal).claim("pacs", now)
    Outbox(journal).failed(sr, "0xA700")
    Outbox(journal).postpone([sc.id, seg.id], now + 1, "refused")
    assert [(i.state, i.attempts, i.last_error) for i in Outbox(journal).items()] == [
        (DeliveryState.WAITING, 1, "0xA700"),
        (DeliveryState.WAITING, 0, "refused"),
        (DeliveryState.WAITING, 0, "refused"),
    ]
    assert Outbox(journal).claim("pacs", now) == []
    assert Outbox(journal).next_due("pacs") == now + 1
    assert [item.role for item in Outbox(journal).claim("pacs", now + 1.5)] == ["sc", "seg", "sr"]  # one is due: all go


def test_a_clock_that_was_set_back_holds_nothing_up(journal):
    record(journal)
    now = time.time()
    items = Outbox(journal).claim("pacs", now)
    Outbox(journal).postpone([item.id for item in items], now + 300, "refused")
    assert Outbox(journal).claim("pacs", now) == []
    assert len(Outbox(journal).claim("pacs", now - 3600)) == 3


def test_sent_is_sent(journal):
    record(journal)
    for item in Outbox(journal).claim("pacs", time.time()):
        Outbox(journal).mark_sent(item.id)
    assert Outbox(journal).claim("pacs", time.time()) == []
    assert Outbox(journal).next_due("pacs") is None
    sent = Outbox(journal).items()[0]
    assert sent.state is DeliveryState.SENT
    assert sent.sent >= sent.created
    assert not Outbox(journal).park(sent.id, "no")
    assert Outbox(journal).retry() == 0
    assert Outbox(journal).retry(sent.id) == 1, "an archive that has lost it asks for it by name"
    assert [item.id for item in Outbox(journal).claim("pacs", time.time())] == [sent.id]
    assert Outbox(journal).retry(sent.id) == 0, "it is on the wire"


def test_parked_until_retried(journal):
    record(journal)
    sr, sc, _ = Outbox(journal).items()
    assert Outbox(journal).park(sr.id, "by hand")
    assert not Outbox(journal).park(sr.id, "by hand")
    assert [item.role for item in Outbox(journal).claim("pacs", time.time())] == ["sc", "seg"]
    Outbox(journal).failed(sc, "0x0122")
    assert Outbox(journal).park(sc.id, "0x0122")
    Outbox(journal).failed(sc, "late")  # an answer that comes after the operator parked it
    assert states(journal)[:2] == [("1.1.1.sr", "parked"), ("1.1.1.sc", "parked")]
    assert Outbox(journal).items()[1].attempts == 1

    assert Outbox(journal).retry(99) == 0
    assert Outbox(journal).retry(sr.id) == 1
    assert states(journal)[:2] == [("1.1.1.sr", "queued"), ("1.1.1.sc", "parked")]
    assert Outbox(journal).retry() == 1
    assert [(item.state.value, item.attempts) for item in Outbox(journal).items()][:2] == [("queued", 0), ("queued", 0)]


def test_parked_while_on_the_wire_and_then_delivered(journal):
    record(journal)
    [sr, *_] = Outbox(journal).claim("pacs", time.time())
    Outbox(journal).park(sr.id, "by hand")
    Outbox(journal).mark_sent(sr.id)
    assert Outbox(journal).items()[0].state is DeliveryState.SENT


def test_threads_share_a_journal(journal):
    def work(number: int) -> None:
        for revision in range(1, 6):
            assert record(journal, series_uid=f"1.{number}", revision=revision, destinations={f"d{number}": ALL})
            for item in Outbox(journal).claim(f"d{number}", time.time()):
                Outbox(journal).mark_sent(item.id)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(journal.series()) == 20
    assert [item.state for item in Outbox(journal).items()] == [DeliveryState.SENT] * 60


def test_another_process_may_retry_while_the_node_runs(journal, place):
    record(journal)
    Outbox(journal).park(Outbox(journal).items()[0].id, "by hand")
    with contextlib.closing(Journal(place)) as other:
        assert Outbox(other).retry() == 1
        assert record(other, series_uid="1.2")
    assert len(Outbox(journal).claim("pacs", time.time())) == 6


def test_every_try_counts_whether_the_peer_was_there_or_not(journal):
    record(journal)
    for _ in range(3):
        now = time.time()
        items = Outbox(journal).claim("pacs", now)
        Outbox(journal).postpone([item.id for item in items], now, "refused")
    sr, sc, seg = items
    assert {item.tries for item in items} == {3}
    assert [(item.tries, item.attempts) for item in Outbox(journal).items()] == [(3, 0)] * 3
    Outbox(journal).claim("pacs", time.time())
    Outbox(journal).mark_sent(sr.id)
    Outbox(journal).failed(sc, "0xA700")
    Outbox(journal).park(seg.id, "by hand")
    assert [item.tries for item in Outbox(journal).items()] == [4, 4, 4]
    Outbox(journal).retry(seg.id)
    assert [item.tries for item in Outbox(journal).items()] == [4, 4, 0]


def of_version_1(path: Path) -> None:
    """A journal as the first schema left it, with something owed."""
    with contextlib.closing(Journal(path)) as journal:
        record(journal)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for table in ("step", "announced", "commitment", *LATER):
            connection.execute(f"DROP TABLE {table}")
        connection.execute("DROP INDEX outbox_by_transaction")
        connection.execute("DROP INDEX outbox_by_series")
        for column in ("tries", "transaction_uid", "asked", "confirmed", "node", "sender"):
            connection.execute(f"ALTER TABLE outbox DROP COLUMN {column}")
        connection.execute("ALTER TABLE series DROP COLUMN node")
        connection.execute("PRAGMA user_version = 1")


def test_a_journal_of_version_1_still_opens_and_counts_from_now_on(tmp_path):
    path = tmp_path / "journal.sqlite"
    of_version_1(path)
    with contextlib.closing(Journal(path)) as journal:
        assert [item.tries for item in Outbox(journal).items()] == [0, 0, 0]
        assert [item.tries for item in Outbox(journal).claim("pacs", time.time())] == [1, 1, 1]
    with contextlib.closing(Journal(path)) as journal:
        assert [item.tries for item in Outbox(journal).items()] == [1, 1, 1]


def test_what_an_older_journal_has_announced_counts_as_of_now(tmp_path):
    path = tmp_path / "journal.sqlite"
    Journal(path).close()
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        for table in LATER:
            connection.execute(f"DROP TABLE {table}")
        for table in ("series", "outbox", "commitment"):
            connection.execute(f"ALTER TABLE {table} DROP COLUMN node")
        connection.execute("ALTER TABLE outbox DROP COLUMN sender")
        connection.execute("ALTER TABLE announced DROP COLUMN announced")
        connection.execute("INSERT INTO announced VALUES ('1.2', '1.2.1', 'step')")
        connection.execute("PRAGMA user_version = 4")
    with contextlib.closing(Journal(path)) as journal:
        journal.forget(time.time() - 60, set())
        assert Announced(journal).of("1.2", Source.STEP) == {"1.2.1"}


def test_who_only_looks_writes_nothing(tmp_path):
    path = tmp_path / "journal.sqlite"
    of_version_1(path)
    before = path.read_bytes()
    with contextlib.closing(Journal(path, read_only=True)) as looking:
        assert [item.tries for item in Outbox(looking).items()] == [0, 0, 0]
        assert len(looking.series()) == 1
        with pytest.raises(JournalError, match="readonly"):
            Outbox(looking).park(1, "by hand")
    assert path.read_bytes() == before
    with pytest.raises(JournalError, match="unable to open"):
        Journal(tmp_path / "another.sqlite", read_only=True)
    assert not (tmp_path / "another.sqlite").exists()
    (tmp_path / "empty.sqlite").touch()
    with pytest.raises(JournalError, match="has not run yet"):
        Journal(tmp_path / "empty.sqlite", read_only=True)


def test_who_only_looks_sees_what_a_running_node_writes(journal, place):
    with contextlib.closing(Journal(place, read_only=True)) as looking:
        record(journal)
        assert Outbox(looking).items() == Outbox(journal).items()
        with journal.transaction() as execute:  # and waits for no transaction of it
            execute("UPDATE outbox SET state = 'sending'")
            assert [item.state for item in Outbox(looking).items()] == [DeliveryState.QUEUED] * 3


def test_it_survives_being_closed(journal, place):
    record(journal)
    before = journal.series(), Outbox(journal).items()
    journal.close()
    with contextlib.closing(Journal(place)) as again:
        assert (again.series(), Outbox(again).items()) == before
    with pytest.raises(JournalError, match="closed"):
        journal.series()


def test_the_pragmas_that_make_it_durable(tmp_path):
    with contextlib.closing(Journal(tmp_path / "journal.sqlite")) as journal, journal.statements() as execute:
        assert execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL


def foreign_database(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE photos (id)")


def newer_journal(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (foreign_database, "not a journal of scanside"),
        (newer_journal, "written by a newer scanside"),
        (lambda path: path.write_bytes(b"not a database, but long enough to be looked at" * 100), "not a database"),
        (lambda path: path.mkdir(), "unable to open"),
    ],
)
def test_what_is_no_journal_is_refused_and_left_alone(tmp_path, make, reason):
    path = tmp_path / "journal.sqlite"
    make(path)
    content = path.read_bytes() if path.is_file() else None
    with pytest.raises(JournalError, match=reason) as caught:
        Journal(path)
    assert str(path) in str(caught.value)
    if content:
        assert path.read_bytes()[100:] == content[100:]  # the header says WAL now, the rest is as it was


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(JournalError, match="unable to open"):
        Journal(tmp_path / "nowhere" / "journal.sqlite")


# kill -9

PRELUDE = """
import itertools, os, signal, sys, time
from pathlib import Path
from dicom_node.storage.journal import Journal, ResultFile, SeriesState
from dicom_node.delivery.outbox import Outbox
from dicom_node.storage.postgres import Address

journal = Journal(Address(sys.argv[1], Path(sys.argv[2])) if len(sys.argv) > 2 else Path(sys.argv[1]))

def record(revision, destinations):
    files = [ResultFile(role, Path(role), "1.2.3", f"{revision}.{role}") for role in ("sr", "sc", "seg")]
    journal.record_result("1", "1.1", revision, state=SeriesState.ANALYSED, reason=None, slices=1, report_json="{}",
                          files=files, destinations=destinations)
"""


def start(place: Path | Address, body: str) -> subprocess.Popen[str]:
    script = PRELUDE + textwrap.dedent(body)
    where = [str(place)] if isinstance(place, Path) else [place.url, str(place.password)]
    return subprocess.Popen([sys.executable, "-c", script, *where], stdout=subprocess.PIPE, text=True)


def assert_sound(path: Path | Address) -> None:
    if isinstance(path, Address):
        return
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"


@pytest.mark.parametrize("acknowledged", [1, 4, 17])
def test_kill_9_at_any_moment_loses_nothing_and_halves_nothing(place, acknowledged):
    process = start(
        place,
        """
        for revision in itertools.count(1):
            record(revision, {"pacs": ("sr", "sc", "seg")})
            print(revision, flush=True)
            for item in Outbox(journal).claim("pacs", time.time()):
                Outbox(journal).mark_sent(item.id)
        """,
    )
    with process:
        for _ in range(acknowledged):
            last = int(process.stdout.readline())
        process.kill()
    assert_sound(place)
    with contextlib.closing(Journal(place)) as journal:
        revisions = [record.revision for record in journal.series()]
        assert revisions == list(range(1, len(revisions) + 1))
        assert len(revisions) >= last
        assert [item.sop_uid for item in Outbox(journal).items()] == [f"{n}.{role}" for n in revisions for role in ALL]


def test_kill_9_between_the_series_and_its_outbox_rows(place):
    process = start(
        place,
        """
        class Deadly(dict):
            def items(self):
                yield "pacs", ("sr",)
                os.kill(os.getpid(), signal.SIGKILL)

        record(1, {"pacs": ("sr", "sc", "seg")})
        record(2, Deadly())
        """,
    )
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert_sound(place)
    with contextlib.closing(Journal(place)) as journal:
        assert journal.latest("1", "1.1").revision == 1
        assert len(Outbox(journal).items()) == 3
        assert record(journal, revision=2)


def test_what_was_being_sent_when_the_node_was_killed_is_due_again(place):
    process = start(
        place,
        """
        record(1, {"pacs": ("sr", "sc", "seg")})
        Outbox(journal).mark_sent(Outbox(journal).claim("pacs", time.time())[0].id)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    process.communicate()
    with contextlib.closing(Journal(place)) as journal:
        assert states(journal) == [("1.sr", "sent"), ("1.sc", "sending"), ("1.seg", "sending")]
        assert [item.sop_uid for item in Outbox(journal).claim("pacs", time.time())] == ["1.sc", "1.seg"]


def test_a_full_disk_is_a_journal_error_and_passes(tmp_path):
    journal = Journal(tmp_path / "journal.sqlite")
    with journal.statements() as execute:
        execute(f"PRAGMA max_page_count = {execute('PRAGMA page_count').fetchone()[0]}")
    with pytest.raises(JournalError, match="full"):
        journal.record_result(
            "1",
            "1.1",
            1,
            state=SeriesState.ANALYSED,
            reason=None,
            slices=1,
            report_json="x" * 100_000,
            files=[],
            destinations={},
        )
    assert journal.series() == []
    with journal.statements() as execute:
        execute("PRAGMA max_page_count = 100000")
    assert record(journal)
    journal.close()
