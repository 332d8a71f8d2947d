"""Several nodes with one journal: nothing is lost, nothing goes twice, whoever is killed when, the database among them.

Every run has a seed and says it. Each node has a scanner of its own, which pushes study after study through it; nodes,
workers and the database are killed (SIGKILL) at random moments and started again. In the end every slice that was
acknowledged is in its series' last result, whichever node tells of it, and the archive has each result once.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from dicom_node.configuration.toml import show
from dicom_node.delivery import confirmation
from dicom_node.delivery.outbox import ATTEMPTS_BEFORE_PARKING, DeliveryState, Outbox, OutboxItem
from dicom_node.simulation.pacs import Pacs
from dicom_node.simulation.scanner import push
from dicom_node.status import look
from dicom_node.storage.database import JournalError
from dicom_node.storage.journal import Journal
from dicom_node.storage.membership import Membership
from dicom_node.storage.postgres import Address, Postgres
from dicom_node.storage.spool import Spool
from tests.dicom_node import test_crash
from tests.dicom_node.conftest import PATIENCE_S, wait_until
from tests.dicom_node.servers import Server, name_of
from tests.dicom_node.storage.test_journal import record
from tests.dicom_node.test_crash import SERVE, SLICES, Harness, Studies, volumes_ml

pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

_collected, scans = test_crash._collected, test_crash.studies  # fixtures

# leases that run out while a test waits
HASTE = "from dicom_node.storage import membership; membership.LEASE_S, membership.BEAT_S = 3.0, 0.3\n"


@pytest.fixture(autouse=True)
def _in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scanners wait for results sooner than where one node has the machine to itself."""
    monkeypatch.setattr("tests.dicom_node.test_crash.BACKLOG", 3)


class Member(Harness):
    """One of several nodes, with its own scanner."""

    def __init__(self, folder: Path, pacs: Pacs, seed: int, address: Address, *, shared: bool = False) -> None:
        folder.mkdir()
        super().__init__(folder, pacs, seed, program=HASTE + SERVE)
        journal = {"database": address.url, "password": address.password, "shared_storage": shared}
        table = self.config.model_dump() | {"journal": journal}
        table["node"] |= {"name": folder.name}
        self.config = type(self.config).model_validate(table)
        self.path.write_text(show(self.config))
        self.process: subprocess.Popen | None = None

    def live(self) -> None:
        self.process = self.start()

    def die(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(60)


class Cluster:
    """Nodes, their scanners, and their database."""

    def __init__(self, folder: Path, pacs: Pacs, server: Server, nodes: int, seed: int) -> None:
        self.server, self.pacs, self.random = server, pacs, random.Random(seed)
        address = server.database()
        self.members = [Member(folder / f"node-{n}", pacs, seed + n, address) for n in range(nodes)]
        self.deaths = {"node": 0, "worker": 0, "database": 0}

    def run(self, kills: int, studies: Studies, patience_s: float) -> None:
        for member in self.members:
            member.live()
        scanners = [threading.Thread(target=one.scan, args=(one.folder.name.upper(), studies)) for one in self.members]
        for scanner in scanners:
            scanner.start()
        try:
            for number in range(kills):
                time.sleep(4 * self.random.random())
                self.kill(number)
            for member in self.members:
                member.enough.set()
            for scanner in scanners:
                scanner.join(PATIENCE_S)
            deadline = time.monotonic() + patience_s
            while not self.is_done() and time.monotonic() < deadline:
                time.sleep(0.2)
        finally:
            for member in self.members:
                member.enough.set()
                member.over.set()
            for member in self.members:
                member.end()
            for scanner in scanners:
                scanner.join(30)

    def kill(self, number: int) -> None:
        """Kill the database every third time, otherwise some node or its worker; what is killed starts again."""
        if number % 3 == 1:
            self.server.kill()
            self.deaths["database"] += 1
            time.sleep(2 * self.random.random())
            self.server.start()
            return
        member = self.random.choice(self.members)
        before = dict(member.deaths)
        if member.kill(member.process):
            member.live()
        for what in ("node", "worker"):
            self.deaths[what] += member.deaths[what] - before[what]

    def is_done(self) -> bool:
        with contextlib.suppress(JournalError):
            status = look(self.members[0].config)
            whole = {one.series_uid for one in status.series if one.slices_analysed == SLICES}
            acknowledged = {series for member in self.members for series in member.acknowledged}
            return not status.results_unsent and whole >= acknowledged
        return False

    def verdict(self, expected: dict[str, float]) -> list[str]:
        return [reason for member in self.members for reason in member.verdict(expected)]


@pytest.mark.parametrize(
    ("nodes", "kills"),
    [(2, 4), pytest.param(4, 16, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])],
)
def test_no_kill_of_nodes_or_database_loses_or_doubles_anything(
    tmp_path: Path, pacs: Pacs, killable: Server, scans: Studies, nodes: int, kills: int
):
    seed = 20261130 + kills
    cluster = Cluster(tmp_path, pacs, killable, nodes, seed)
    cluster.run(kills, scans, PATIENCE_S + 2 * kills)
    status = look(cluster.members[0].config)
    expected = next(volumes_ml(one) for one in status.series if one.slices_analysed == SLICES)
    assert expected, "no blood was found: volumes say nothing"
    wrong = cluster.verdict(expected)
    acknowledged = [len(member.acknowledged) for member in cluster.members]
    told = f"seed {seed}: {cluster.deaths} deaths, {acknowledged} series acknowledged"
    print(told)
    assert not wrong, "\n".join([told, *wrong])
    assert sum(cluster.deaths.values()) == kills
    assert cluster.deaths["database"] >= 1
    assert min(acknowledged) >= 1
    assert {one.name for one in status.nodes} == {one.folder.name for one in cluster.members}
    assert {one.node for one in status.series} == {one.folder.name for one in cluster.members}


def test_a_node_that_dies_for_good_in_mid_series_is_taken_over_from(
    tmp_path: Path, pacs: Pacs, killable: Server, scans: Studies
):
    address = killable.database()
    dead, heir = (Member(tmp_path / name, pacs, 1, address, shared=True) for name in ("dead", "heir"))
    dead.live()
    heir.live()
    try:
        whole, halves = scans.next(), scans.next()
        send(whole, dead)
        wait_until(lambda: delivered(dead), "the whole series is delivered")
        first, second = list(halves.items())[: SLICES // 2], list(halves.items())[SLICES // 2 :]
        send(dict(first), dead)
        dead.die()  # before the idle timeout, with half of the second study
        send(dict(second), heir)
        series = "1.2.3.2.1"
        wait_until(lambda: analysed(heir, series) == SLICES, "the heir has both halves")
        wait_until(lambda: delivered(heir), "and delivers them")
        # any node sends what lies on shared storage
        with contextlib.closing(Journal(address, node="heir")) as journal:
            of_the_dead = next(item for item in Outbox(journal).items() if item.node == "dead")
            assert Outbox(journal).retry(of_the_dead.id) == 1
            wait_until(lambda: delivered(heir), "what the dead one owes goes, too")
            again = next(item for item in Outbox(journal).items() if item.id == of_the_dead.id)
            assert (again.sender, again.state) == ("heir", DeliveryState.SENT)
            assert {one.node for one in journal.series() if one.series_uid == series} == {"heir"}
    finally:
        heir.end()
    assert not list((tmp_path / "dead" / "node" / "spool").glob("*/1.2.3.2.1/*.dcm"))
    kept = {path.stem for path in (tmp_path / "heir" / "node" / "spool").glob("*/1.2.3.2.1/*.dcm")}
    assert kept == set(halves)
    assert not list((pacs.folder / "quarantine").iterdir())
    status = look(heir.config)
    assert {one.name: one.lives for one in status.nodes} == {"dead": False, "heir": False}
    assert not any(one.is_open for one in status.series)


def send(files: dict[str, Path], member: Member) -> None:
    sent = []
    push(list(files.values()), ("127.0.0.1", member.port), calling_ae="CT", called_ae="SCANSIDE", on_slice=sent.append)
    assert [one.is_stored for one in sent] == [True] * len(files)


def delivered(member: Member) -> bool:
    status = look(member.config)
    return bool(status.series) and not status.results_unsent and not any(one.is_open for one in status.series)


def analysed(member: Member, series: str) -> int:
    return max((one.slices_analysed or 0 for one in look(member.config).series if one.series_uid == series), default=0)


# claims


@contextlib.contextmanager
def nodes(address: Address, folder: Path, count: int) -> Iterator[list[Journal]]:
    """Journals of nodes that live and share their storage."""
    with contextlib.ExitStack() as stack:
        journals = []
        for number in range(count):
            home = folder / f"n{number}"
            home.mkdir(exist_ok=True)
            journal = Journal(address, node=f"n{number}", shares_storage=True)
            stack.callback(journal.close)
            member = Membership(journal, home, Spool(home / "spool", 0), Desk(), shares_storage=True)
            member.join()
            stack.callback(member.stop)
            journals.append(journal)
        yield journals


class Desk:
    """Has nothing open, and hears of nothing."""

    def __init__(self) -> None:
        self.stored: list[Path] = []

    def instance_stored(self, _, instance) -> None:
        self.stored.append(instance.path)

    def association_ended(self, association, *, released) -> None:
        pass

    def arriving(self):
        return []


def claimed_by_all(journals: list[Journal], rounds: int) -> list[int]:
    """Ids of what nodes claim that look at the same moment, again and again."""
    together = threading.Barrier(len(journals))

    def work(number: int) -> list[int]:
        journal, found = journals[number], []
        for revision in range(1, rounds + 1):
            record(journal, series_uid=f"1.{number}", revision=revision)
            together.wait(30)
            for item in Outbox(journal).claim("pacs", time.time()):
                found.append(item.id)
                Outbox(journal).mark_sent(item.id)
            together.wait(30)
        return found

    with ThreadPoolExecutor(len(journals)) as pool:
        return [item for found in pool.map(work, range(len(journals))) for item in found]


@pytest.mark.parametrize("count", [2, 4])
def test_no_two_nodes_claim_the_same(postgres: Server, tmp_path: Path, count: int):
    with nodes(postgres.database(), tmp_path, count) as journals:
        found = claimed_by_all(journals, 10)
        assert sorted(found) == sorted(item.id for item in Outbox(journals[0]).items())
        assert len(found) == len(set(found)) == 10 * count * 3


def test_claims_that_lock_nothing_are_found_out(postgres: Server, tmp_path: Path, monkeypatch):
    """The test above can fail: without locks, nodes that look at the same moment send the same."""
    monkeypatch.setattr(Postgres, "skip_locked", "")
    genuine = Postgres._execute

    def slow(self, sql, values=()):
        found = genuine(self, sql, values)
        if sql.startswith("SELECT * FROM outbox"):
            time.sleep(0.05)
        return found

    monkeypatch.setattr(Postgres, "_execute", slow)
    with nodes(postgres.database(), tmp_path, 2) as journals:
        found = claimed_by_all(journals, 3)
    assert len(found) > len(set(found))


def test_what_a_living_node_is_sending_is_its_own_until_its_lease_runs_out(postgres: Server, tmp_path: Path):
    address = postgres.database()
    with nodes(address, tmp_path, 2) as (first, second):
        record(first)
        assert len(Outbox(first).claim("pacs", time.time())) == 3
        assert Outbox(second).claim("pacs", time.time()) == []
        assert Outbox(second).next_due("pacs") is None, "or it would look again and again"
        assert len(Outbox(first).claim("pacs", time.time())) == 3, "its own crash's"
        postgres.execute("UPDATE node SET expires = 0 WHERE name = 'n0'", name_of(address))
        assert {item.sender for item in Outbox(second).claim("pacs", time.time())} == {"n1"}
        assert Outbox(first).claim("pacs", time.time()) == []


def test_without_shared_storage_a_node_sends_what_lies_on_its_disk(postgres: Server):
    address = postgres.database()
    with (
        contextlib.closing(Journal(address, node="a")) as first,
        contextlib.closing(Journal(address, node="b")) as second,
    ):
        record(first, series_uid="1.1")
        record(second, series_uid="1.2")
        assert {item.series_uid for item in Outbox(second).claim("pacs", time.time())} == {"1.2"}
        assert {item.series_uid for item in Outbox(first).claim("pacs", time.time())} == {"1.1"}


def taken_over(journals: list[Journal], address: Address, postgres: Server) -> tuple[Outbox, Outbox, list[OutboxItem]]:
    """Outboxes of a node that lost its lease while it sent and of the one that sends now, and what the first had."""
    first, second = map(Outbox, journals)
    record(journals[0])
    items = first.claim("pacs", time.time())
    postgres.execute("UPDATE node SET expires = 0 WHERE name = 'n0'", name_of(address))
    assert len(second.claim("pacs", time.time())) == len(items) == 3
    return first, second, items


def test_what_another_node_sends_by_now_is_not_changed_by_who_sent_it_before(postgres: Server, tmp_path: Path):
    address = postgres.database()
    with nodes(address, tmp_path, 2) as journals:
        first, second, items = taken_over(journals, address, postgres)
        before = second.items()
        assert not first.failed(items[0], "no answer")
        first.refused(replace(items[1], attempts=ATTEMPTS_BEFORE_PARKING), "0x0122")
        first.postpone([items[2].id], time.time() + 60, "the node stopped")
        assert second.items() == before
        assert {(item.state, item.sender) for item in before} == {(DeliveryState.SENDING, "n1")}
        assert second.failed(before[0], "no answer")
        second.postpone([items[2].id], time.time() + 60, "no route")
        assert [item.state for item in second.items()] == ["waiting", "sending", "waiting"]


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_a_node_decides_nothing_for_what_another_waits_for(postgres: Server, tmp_path: Path):
    """Each has its own configuration of a destination: one takes its word, or has another address, and one asks."""
    address = postgres.database()
    with nodes(address, tmp_path, 2) as journals:
        first, second = map(Outbox, journals)
        for number, outbox in enumerate((first, second)):
            record(journals[number], series_uid=f"1.{number}")
            for item in outbox.claim("pacs", time.time()):
                outbox.mark_sent(item.id, confirm=True)
        of_second = [item for item in second.items() if item.sender == "n1"]
        second.ask([item.id for item in of_second], time.time() + 60, "2.25.7")
        before = [item for item in second.items() if item.sender == "n1"]
        first.ask([item.id for item in before], time.time(), "2.25.8")
        first.hurry("pacs")
        first.believe("pacs")
        assert [item for item in second.items() if item.sender == "n1"] == before
        assert {item.state for item in first.items() if item.sender == "n0"} == {DeliveryState.SENT}
        # the archive may report to any of them
        report = Dataset()
        report.TransactionUID = "2.25.7"
        report.ReferencedSOPSequence, report.FailedSOPSequence = [Dataset()], [Dataset()]
        report.ReferencedSOPSequence[0].ReferencedSOPInstanceUID = before[0].sop_uid
        report.FailedSOPSequence[0].ReferencedSOPInstanceUID = before[1].sop_uid
        confirmation.take(first, report, "PACS")
        told = [item.state for item in second.items() if item.sender == "n1"]
        assert told == ["confirmed", "waiting", "unconfirmed"]


def test_without_shared_storage_another_node_s_destination_is_another(postgres: Server):
    address = postgres.database()
    with (
        contextlib.closing(Journal(address, node="a")) as first,
        contextlib.closing(Journal(address, node="b")) as second,
    ):
        record(first)
        items = Outbox(first).claim("pacs", time.time())
        Outbox(first).postpone([item.id for item in items], time.time() + 60, "refused")
        before = Outbox(first).items()
        Outbox(second).hurry("pacs")
        assert Outbox(first).items() == before
        Outbox(first).hurry("pacs")
        assert len(Outbox(first).claim("pacs", time.time())) == 3
