"""The journal in PostgreSQL: what is refused and how that is told, what happens while the database is away."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from urllib.error import HTTPError

import pytest
from pydicom import dcmread
from structlog.testing import capture_logs

from dicom_node import status
from dicom_node.alerts.ledger import Ledger
from dicom_node.assembler import Assembly
from dicom_node.configuration import toml
from dicom_node.configuration.config import Config, ConfigError, load
from dicom_node.configuration.sections import Destination
from dicom_node.delivery.outbox import DeliveryState, Outbox
from dicom_node.dispatch import Result
from dicom_node.node import Node
from dicom_node.operation.check import check
from dicom_node.operation.trial import Item
from dicom_node.page.board import Lookout
from dicom_node.simulation.pacs import Pacs
from dicom_node.simulation.scanner import push
from dicom_node.storage import postgres as driver
from dicom_node.storage.database import EmptyJournal, JournalError
from dicom_node.storage.journal import Journal, ResultFile, RevisionTaken, SeriesRecord, SeriesState
from dicom_node.storage.membership import IDENTITY, Member, Membership, members
from dicom_node.storage.postgres import Address, in_postgres
from dicom_node.storage.register import Register, without_result
from dicom_node.storage.schema import VERSIONS
from dicom_node.storage.spool import Spool
from tests.dicom_node.conftest import Pushable, config_for, running, wait_until
from tests.dicom_node.instances import image
from tests.dicom_node.servers import PASSWORD, Server, name_of
from tests.dicom_node.storage.test_journal import ALL, record
from tests.dicom_node.storage.test_spool import store
from tests.dicom_node.test_nodes import Desk


def shared_config(
    folder: Path, address: Address, port: int = 4242, *, name: str = "ct-1", shared: bool = False
) -> Config:
    table = config_for(folder, port).model_dump()
    table["node"]["name"] = name
    journal = {"database": address.url, "password": address.password, "shared_storage": shared}
    return Config.model_validate(table | {"journal": journal})


def no_destinations(config: Config) -> Config:
    return config.model_copy(update={"destinations": ()})


# what is refused


def foreign(server: Server, address: Address) -> Address:
    server.execute("CREATE TABLE photos (id INTEGER)", name_of(address))
    return address


def newer(server: Server, address: Address) -> Address:
    Journal(address).close()
    server.execute("UPDATE journal_version SET version = 99", name_of(address))
    return address


def wrong_password(server: Server, address: Address) -> Address:
    path = server.folder / "wrong"
    path.write_text("battery staple")
    return Address(address.url, path)


def no_schema(_: Server, address: Address) -> Address:
    return Address(f"{address.url}?options=-csearch_path%3Dnos", address.password)


def may_not_create(server: Server, address: Address) -> Address:
    """A role of its own, in a database whose public schema lets nobody make tables, as PostgreSQL 15 has it."""
    name = name_of(address)
    server.execute(f"CREATE ROLE guest_{name} LOGIN PASSWORD '{PASSWORD}'", name)
    server.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC", name)
    return Address(address.url.replace("scanside@", f"guest_{name}@"), address.password)


def may_not_write(server: Server, address: Address) -> Address:
    Journal(address).close()
    guest = may_not_create(server, address)
    server.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO PUBLIC", name_of(address))
    return guest


def may_not_insert(server: Server, address: Address) -> Address:
    guest = may_not_write(server, address)
    server.execute("GRANT UPDATE ON ALL TABLES IN SCHEMA public TO PUBLIC", name_of(address))
    return guest


def may_not_send(server: Server, address: Address) -> Address:
    guest = may_not_write(server, address)
    server.execute("GRANT INSERT, UPDATE ON node TO PUBLIC", name_of(address))
    return guest


def takes_no_writes(server: Server, address: Address) -> Address:
    return Address(f"{address.url}?options=-cdefault_transaction_read_only%3Don", address.password)


def empty_password(server: Server, address: Address) -> Address:
    (server.folder / "empty").write_text("\n")
    return Address(address.url, server.folder / "empty")


WRONG = [
    (foreign, "not a journal of scanside"),
    (newer, r"written by a newer scanside .*: update this node"),
    (no_schema, r"has no schema nos, or scanside may not use it: CREATE SCHEMA .* AUTHORIZATION scanside"),
    (lambda _, address: Address(address.url), "no password supplied; write it into a file and name that in journal"),
    (empty_password, "journal.password: .*/empty: is empty: write the database's password into it"),
    (wrong_password, "password authentication failed"),
    (lambda server, _: server.address("nowhere"), 'database "nowhere" does not exist'),
    (lambda *_: Address("postgresql://scanside@127.0.0.1:1/scanside"), "Connection refused"),
    (lambda *_: Address("postgresql://scanside@nowhere.invalid/scanside"), "can't be reached"),
    (lambda server, address: Address(address.url, server.folder / "none"), "/none: No such file or directory: write"),
    (lambda _, address: Address(address.url + "?colour=red"), "colour"),
]


@pytest.mark.parametrize(("make", "reason"), WRONG, ids=range(len(WRONG)))
def test_what_can_t_be_used_is_told_in_a_line_by_every_command(postgres: Server, tmp_path: Path, make, reason: str):
    address = make(postgres, postgres.database())
    with pytest.raises(JournalError, match=reason) as caught:
        Journal(address)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert PASSWORD not in str(caught.value)
    (tmp_path / "node.toml").write_text(toml.show(no_destinations(shared_config(tmp_path / "data", address))))
    item = next(item for item in check(load(tmp_path / "node.toml")) if item.name == "journal")
    assert (item.ok, item.kind) == (False, "environment")
    assert re.search(reason, item.message)
    for command in (["status"], ["serve"]):
        ended = scanside(*command, "--config", tmp_path / "node.toml")
        assert ended.returncode == 3, ended.stderr
        assert re.search(reason, ended.stderr)
        assert len(ended.stderr.splitlines()) == 1, ended.stderr


STARTS_NO_NODE = [
    (
        may_not_create,
        r"guest_journal_\d+ may make no tables in schema public: .*GRANT CREATE ON SCHEMA public TO guest",
    ),
    (may_not_write, r"permission denied for table node; its tables have to be those of the role"),
    (may_not_insert, "permission denied for table node"),
    (may_not_send, "permission denied for table outbox"),
    (takes_no_writes, "read-only transaction; name the server that takes writes"),
]


@pytest.mark.parametrize(("make", "reason"), STARTS_NO_NODE, ids=range(len(STARTS_NO_NODE)))
def test_check_finds_what_a_start_would(postgres: Server, tmp_path: Path, make, reason: str):
    address = make(postgres, postgres.database())
    config = no_destinations(shared_config(tmp_path / "data", address))
    item = next(item for item in check(config) if item.name == "journal")
    assert (item.ok, item.kind) == (False, "environment")
    assert re.search(reason, item.message), item.message
    with pytest.raises(JournalError) as caught, member(address, tmp_path / "data", "ct-1"):
        pass
    assert str(caught.value) == item.message


def test_check_finds_that_a_living_node_has_the_name(postgres: Server, tmp_path: Path):
    address = postgres.database()
    config = no_destinations(shared_config(tmp_path / "b", address, name="ct"))

    def look() -> Item:
        return next(item for item in check(config) if item.name == "journal")

    with member(address, tmp_path / "a", "ct"):
        item = look()
        assert (item.ok, item.kind) == (False, "environment")
        assert "another node of this database is called ct (its folder is" in item.message
        assert not (tmp_path / "b").exists()
    assert look().ok, "it is dead"
    with member(address, tmp_path / "b", "ct"):
        before = postgres.execute("SELECT token, folder FROM node", name_of(address))
        assert look().ok, "it is this one"
    assert postgres.execute("SELECT token, folder FROM node", name_of(address)) == before
    (tmp_path / "b" / IDENTITY).write_text('{"name": "mr", "token": "x"}')
    assert "belongs to node mr" in look().message


def test_check_leaves_a_database_as_it_was(postgres: Server, tmp_path: Path):
    address = postgres.database()
    config = no_destinations(shared_config(tmp_path / "data", address))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dicom_node.storage.postgres.VERSIONS", VERSIONS[:6])
        Journal(address).close()
    tables = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY 1"
    before = postgres.execute(tables, name_of(address))
    assert next(item for item in check(config) if item.name == "journal").ok
    assert postgres.execute(tables, name_of(address)) == before
    assert postgres.execute("SELECT version FROM journal_version", name_of(address)) == [(6,)]


def scanside(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from scanside import main; main()", *map(str, arguments)],
        capture_output=True, text=True, check=False, env=os.environ | environment, timeout=120,
    )  # fmt: skip


def test_a_foreign_database_is_left_alone(postgres: Server):
    address = foreign(postgres, postgres.database())
    with pytest.raises(JournalError):
        Journal(address)
    tables = postgres.execute(
        "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace", name_of(address)
    )
    assert tables == [("photos",)]


def test_what_no_node_has_run_on_is_empty_for_who_only_looks(postgres: Server, tmp_path: Path):
    address = postgres.database()
    with pytest.raises(EmptyJournal, match="no node has run"):
        Journal(address, read_only=True)
    item = next(
        item for item in check(no_destinations(shared_config(tmp_path / "data", address))) if item.name == "journal"
    )
    assert item.ok
    assert "makes its tables" in item.message
    Journal(address).close()
    with contextlib.closing(Journal(address, read_only=True)) as looking:
        assert looking.series() == []
        with pytest.raises(JournalError, match="read-only"):
            record(looking)


def test_without_psycopg_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(JournalError, match=r"pip install '\.\[postgres\]'"):
        Journal(Address("postgresql://localhost/x"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('database = "postgresql://a:hunter2@db/x"', "journal.database: has a password in it"),
        ('database = "postgresql://a@db/x?password=hunter2"', "journal.database: has a password in it"),
        ('database = "postgresql://a@db/x?sslpassword=hunter2"', "journal.database: has a password in it"),
        ('database = "mysql://db/x"', "is no database's URL"),
        ('database = "db.hospital"', "is no database's URL"),
        ("shared_storage = true", "journal.shared_storage: true needs journal.database"),
        ('password = "file"', 'journal.password: "file" needs journal.database'),
    ],
)
def test_what_is_wrong_in_the_configuration(tmp_path: Path, text: str, complaint: str):
    (tmp_path / "node.toml").write_text(f"[journal]\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "node.toml")
    assert complaint in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_the_password_is_in_a_file_and_nowhere_else(postgres: Server, tmp_path: Path):
    address = postgres.database()
    (tmp_path / "secret").write_text(PASSWORD + "\n")
    (tmp_path / "node.toml").write_text(f'[journal]\ndatabase = "{address.url}"\npassword = "secret"\n')
    config = load(tmp_path / "node.toml")
    assert config.journal.password == tmp_path / "secret"
    Journal(config.journal_place).close()
    assert PASSWORD not in toml.show(config) + config.model_dump_json() + repr(config)
    # as libpq finds one
    passes = tmp_path / "pgpass"
    passes.write_text(f"127.0.0.1:{postgres.port}:*:scanside:{PASSWORD}\n")
    passes.chmod(0o600)
    (tmp_path / "scanside-data").mkdir()
    (tmp_path / "node.toml").write_text(f'[journal]\ndatabase = "{address.url}"\n')
    assert scanside("status", "--config", tmp_path / "node.toml", PGPASSFILE=str(passes)).returncode == 0


# two databases, one SQL


def test_places_for_values():
    assert (
        in_postgres("SELECT ? WHERE a = :name AND b LIKE '100%?:x'")
        == "SELECT %s WHERE a = %(name)s AND b LIKE '100%%?:x'"
    )
    assert in_postgres("SELECT a % 2, b::text") == "SELECT a %% 2, b::text"


def test_a_uid_with_a_nul_in_it_is_kept_as_it_is(place):
    with contextlib.closing(Journal(place)) as journal:
        assert record(journal, series_uid="1\0002")
        assert journal.latest("1", "1\0002").series_uid == "1\0002"
        assert journal.latest("1", "12") is None
        journal.forget(time.time() + 60, ["1\0002"])


def test_nodes_that_start_at_once_make_the_tables_once(postgres: Server):
    address = postgres.database()
    with ThreadPoolExecutor(6) as pool:
        for journal in list(pool.map(lambda _: Journal(address), range(6))):
            journal.close()
    assert postgres.execute("SELECT version FROM journal_version", name_of(address)) == [(len(VERSIONS),)]


def test_an_older_database_is_brought_up_to_date(postgres: Server, monkeypatch):
    address = postgres.database()
    with monkeypatch.context() as patch:
        patch.setattr("dicom_node.storage.postgres.VERSIONS", VERSIONS[:6])
        Journal(address).close()
    postgres.execute("INSERT INTO series VALUES ('1', '1.1', 1, 'analysed', NULL, 9, NULL, 5.0)", name_of(address))
    with contextlib.closing(Journal(address, node="a")) as journal:
        assert [(one.series_uid, one.node) for one in journal.series()] == [("1.1", "")]


def test_what_it_promises_is_durable(postgres: Server):
    address = postgres.database()
    postgres.execute(f"ALTER DATABASE {name_of(address)} SET synchronous_commit = off", "postgres")
    with contextlib.closing(Journal(address)) as journal, journal.statements() as execute:
        assert execute("SHOW synchronous_commit").fetchone()[0] == "on"


def test_a_refusal_quotes_no_row_in_its_traceback_either(postgres: Server):
    """PostgreSQL's DETAIL does, and the row of an alert has the patient's name."""
    with contextlib.closing(Journal(postgres.database())) as journal:
        with (
            pytest.raises(JournalError, match="violates not-null constraint") as caught,
            journal.transaction() as execute,
        ):
            execute(
                "INSERT INTO alert (study_uid, series_uid, revision, level, reason, state, raised, changed, patient)"
                " VALUES ('1', '1.1', 1, 'critical', 'x', 'due', 0, 0, 'Muster^Erika')"
            )
        assert "Muster" not in "".join(traceback.format_exception(caught.value))


# revisions


def result(uid: str) -> list[ResultFile]:
    return [ResultFile("sr", Path("/x"), "1.2.3", uid)]


def keep(journal: Journal, uid: str, revision: int = 1, slices: int = 2) -> bool:
    return journal.record_result(
        "1", "1.1", revision, state=SeriesState.ANALYSED, reason=None, slices=slices, report_json=None,
        files=result(uid), destinations={"pacs": ALL},
    )  # fmt: skip


def test_two_results_never_have_one_revision(postgres: Server):
    address = postgres.database()
    with (
        contextlib.closing(Journal(address, node="a")) as first,
        contextlib.closing(Journal(address, node="b")) as second,
    ):
        assert keep(first, "9.1")
        assert not keep(first, "9.1"), "the same again, after an answer that was lost"
        assert not keep(second, "9.1"), "made of the same: the same result"
        with pytest.raises(RevisionTaken, match="node a"):
            keep(second, "9.2")
        assert keep(second, "9.2", revision=2)
        assert [(one.revision, one.node) for one in first.series()] == [(1, "a"), (2, "b")]
        assert first.latest("1", "1.1").revision == 2
        assert first.latest("1", "1.1", of="a").revision == 1
        assert [item.sop_uid for item in Outbox(first).items()] == ["9.1", "9.2"]


def test_a_result_that_two_nodes_have_made_is_a_result_of_each(postgres: Server, tmp_path: Path):
    """A series sent to both at once: who records second has nothing to add, and nothing left to do."""
    address = postgres.database()
    configs = [shared_config(tmp_path / name, address, name=name, shared=True) for name in ("a", "b")]
    with contextlib.ExitStack() as stack:
        journals, spools, desks = [], [], [Desk(), Desk()]
        for config, desk in zip(configs, desks, strict=True):
            stack.enter_context(member(address, config.node.folder, config.node_name, desk, shared=True))
            journals.append(stack.enter_context(contextlib.closing(Journal(address, node=config.node_name))))
            spools.append(Spool(config.node.folder / "spool", 0))
        for number in (1, 2):
            store(spools[0], image(SOPInstanceUID=f"1.1.{number}", StudyInstanceUID="1", SeriesInstanceUID="1.1"))
        assert keep(journals[0], "9.1")
        for number in (1, 2, 3):  # later than the first node's result; and one that can't be read
            store(spools[1], image(SOPInstanceUID=f"1.1.{number}", StudyInstanceUID="1", SeriesInstanceUID="1.1"))
        assert [*without_result(spools[1], journals[1], "b")] == [("1", "1.1", 3)], "not yet made by this node"
        assert not keep(journals[1], "9.1", slices=3)
        assert not keep(journals[1], "9.1", slices=3), "the same again, after an answer that was lost"
        assert [*without_result(spools[1], journals[1], "b")] == [], "nothing that would be taken over"
        assert (journals[1].latest("1", "1.1", of="b").slices, journals[1].latest("1", "1.1").node) == (3, "a")
        assert [(one.node, one.revision) for one in journals[0].series()] == [("a", 1)]
        for config in configs:
            assert [(one.node, one.is_open) for one in status.look(config).series] == [("a", False)]
            (row,) = Lookout(config).look().rows
            assert (row.state, row.told.node, row.told.revision) == ("analysed", "a", 1)
        store(spools[1], image(SOPInstanceUID="1.1.4", StudyInstanceUID="1", SeriesInstanceUID="1.1"))
        assert [*without_result(spools[1], journals[1], "b")] == [("1", "1.1", 4)]
        assert [one.revision for one in status.look(configs[1]).series if one.is_open] == [2]
        with journals[0].transaction() as execute:
            execute("DELETE FROM outbox")
            execute("DELETE FROM series")
        assert journals[0].twins() == []


def test_what_a_second_node_rests_on_is_not_forgotten_by_the_first(postgres: Server):
    """The first has a later revision and has removed the study; the second still has it, and its slices are covered."""
    address, late = postgres.database(), time.time() + 60
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(contextlib.closing(Journal(address, node=node))) for node in ("a", "b"))
        for number, journal in ((1, first), (1, second), (2, first)):
            record(journal, revision=number)
        for item in Outbox(first).items():
            Outbox(first).mark_sent(item.id)
        first.forget(late, [])
        assert [(one.revision, one.report_json is None) for one in first.series()] == [(1, False), (2, True)]
        assert second.latest("1", "1.1", of="b").revision == 1
        second.forget(0, [])
        second.forget(late, ["1"])
        assert len(second.twins()) == 1, "young, or in its spool"
        second.forget(late, [])
        assert (second.twins(), second.latest("1", "1.1", of="b")) == ([], None)
        first.forget(late, [])
        assert [one.revision for one in first.series()] == [2], "nobody needs it any more"


def test_a_notice_that_two_nodes_have_made_is_one_s_and_covers_both(postgres: Server):
    """For the second it is no news, and the same all the same."""
    address = postgres.database()
    pacs = Destination(name="pacs", ae_title="PACS", host="127.0.0.1", port=104)
    notice = Result(SeriesState.NOT_ANALYSED, "no CT", files=(ResultFile("notice", Path("/x"), "1.2.3", "9.1"),))
    with contextlib.ExitStack() as stack:
        for node in ("a", "b"):
            journal = stack.enter_context(contextlib.closing(Journal(address, node=node)))
            assembly = Assembly("1", "1.1", 1, 0.0, {Path("1"): None})
            Register(journal, Outbox(journal), Ledger(journal)).record(assembly, notice, [pacs])
        assert [(one.revision, one.node) for one in journal.series()] == [(1, "a")]
        assert [one.node for one in journal.twins()] == ["b"]
        assert len(Outbox(journal).items()) == 1


def test_both_parts_of_a_series_that_two_nodes_have_got_are_told(
    postgres: Server, tmp_path: Path, pacs: Pacs, bleeding: Pushable
):
    """Without shared storage: the one that is later makes its result the next revision."""
    address = postgres.database()
    configs = [shared_config(tmp_path / name, address, pacs.port, name=name) for name in ("a", "b")]
    with running(configs[0]) as first, running(configs[1]) as second:
        revisions = threading.Barrier(2)
        genuine = Journal.record_result

        def at_once(self, *arguments, **named):
            with contextlib.suppress(threading.BrokenBarrierError):
                revisions.wait(60)  # both have made revision 1
            return genuine(self, *arguments, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Journal, "record_result", at_once)
            half = len(bleeding.paths) // 2
            for node, paths in ((first, bleeding.paths[:half]), (second, bleeding.paths[half:])):
                push(paths, ("127.0.0.1", node.port), calling_ae="CT", called_ae="SCANSIDE")
            wait_until(lambda: len(status.look(configs[0]).series) >= 1, "the first result")
            revisions.abort()
        wait_until(
            lambda: {(one.revision, one.is_open) for one in status.look(configs[0]).series} == {(1, False), (2, False)},
            "both",
        )
        wait_until(lambda: not status.look(configs[0]).results_unsent, "both are delivered")
        told = status.look(configs[1])
    assert {one.node for one in told.series} == {"a", "b"}
    assert sum(one.slices_analysed for one in told.series) == len(bleeding.paths)
    assert [one.name for one in told.nodes] == ["a", "b"]
    reports = [path for one in configs for path in (one.node.folder / "results").rglob("sr.dcm")]
    assert sorted(path.parent.name for path in reports) == ["revision-1", "revision-2"]
    assert not any("PredecessorDocumentsSequence" in dcmread(path) for path in reports), "no archive ever got one"
    assert not list((pacs.folder / "quarantine").iterdir())


def test_a_series_that_two_nodes_get_at_once_has_one_result(
    postgres: Server, tmp_path: Path, pacs: Pacs, bleeding: Pushable
):
    address = postgres.database()
    configs = [shared_config(tmp_path / name, address, pacs.port, name=name) for name in ("a", "b")]
    together, genuine = threading.Barrier(2), Journal.record_result

    def at_once(self, *arguments, **named):
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(60)
        return genuine(self, *arguments, **named)

    with running(configs[0]) as first, running(configs[1]) as second, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "record_result", at_once)
        for node in (first, second):
            push(bleeding.paths, ("127.0.0.1", node.port), calling_ae="CT", called_ae="SCANSIDE")
        wait_until(lambda: not first.progress() and not second.progress(), "both are done")
        wait_until(lambda: not status.look(configs[0]).results_unsent, "it is delivered")
        for config in configs:
            wait_until(lambda config=config: not any(one.is_open for one in status.look(config).series), "none waits")
            (one,) = status.look(config).series
            assert (one.revision, one.slices_analysed) == (1, len(bleeding.paths))
            kept = (tmp_path / one.node / "spool").rglob("*.dcm")
            assert one.arrived == min(path.stat().st_mtime for path in kept)
    assert not list((pacs.folder / "quarantine").iterdir())


def test_a_series_that_another_node_told_of_and_then_recorded_is_told_once():
    open_series = {"study_uid": "1", "series_uid": "1.1", "revision": 2, "slices_received": 5}
    other = Member("b", Path(), shared=False, lives=True, seen=9.0, open=[open_series])
    first = SeriesRecord("1", "1.1", 1, SeriesState.ANALYSED, None, 3, None, 1.0, "b")
    assert [one.revision for one in status.elsewhere([other], "a", [first])] == [2]
    assert status.elsewhere([other], "a", [first, replace(first, revision=2)]) == []
    assert status.elsewhere([other], "b", [first]) == []
    assert len(status.elsewhere([other], "a", [first, replace(first, revision=2, node="a")])) == 1


# who is who


@contextlib.contextmanager
def member(
    address: Address, folder: Path, name: str, desk: Desk | None = None, *, shared: bool = False
) -> Iterator[Membership]:
    folder.mkdir(exist_ok=True)
    journal = Journal(address, node=name, shares_storage=shared)
    one = Membership(journal, folder, Spool(folder / "spool", 0), desk or Desk(), shares_storage=shared)
    try:
        one.join()
        yield one
    finally:
        one.stop()
        journal.close()


def test_a_name_is_one_node_s(postgres: Server, tmp_path: Path):
    address = postgres.database()
    with member(address, tmp_path / "a", "ct"):
        with (
            pytest.raises(JournalError, match="another node of this database is called ct"),
            member(address, tmp_path / "b", "ct"),
        ):
            pass
        with contextlib.closing(Journal(address)) as journal:
            assert [(one.name, one.lives, one.folder) for one in members(journal)] == [("ct", True, tmp_path / "a")]
    with contextlib.closing(Journal(address)) as journal:
        assert [one.lives for one in members(journal)] == [False]
    with capture_logs() as said, member(address, tmp_path / "b", "ct"):  # of a machine that is gone for good
        pass
    assert [one["folder"] for one in said if one["event"] == "dead_node_replaced"] == [str(tmp_path / "a")]


def test_a_node_that_was_killed_goes_on_at_once(postgres: Server, tmp_path: Path):
    address = postgres.database()
    with member(address, tmp_path / "a", "ct"):
        postgres.execute("UPDATE node SET seen = 5", name_of(address))
        with member(address, tmp_path / "a", "ct"), contextlib.closing(Journal(address)) as journal:
            assert members(journal)[0].seen > 5


def test_a_folder_keeps_its_node_s_name(postgres: Server, tmp_path: Path):
    address = postgres.database()
    with member(address, tmp_path / "a", "ct"):
        pass
    with (
        pytest.raises(JournalError, match='belongs to node ct: set node.name = "ct"'),
        member(address, tmp_path / "a", "mr"),
    ):
        pass
    (tmp_path / "a" / IDENTITY).write_text("[]")
    with pytest.raises(JournalError, match="remove it"), member(address, tmp_path / "a", "ct"):
        pass


def test_who_a_node_is_outlasts_a_power_cut(postgres: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    genuine, synced = os.fsync, []

    def note(handle: int) -> None:
        genuine(handle)
        place = Path(f"/proc/self/fd/{handle}").readlink()
        synced.append((place.name, (tmp_path / "ct" / IDENTITY).exists()))

    monkeypatch.setattr(os, "fsync", note)
    with member(postgres.database(), tmp_path / "ct", "ct"):
        pass
    content, name = ("identity.new", False), ("ct", True)
    assert [one for one in synced if one in (content, name)] == [content, name]


def test_a_node_s_own_journal_comes_with_it(postgres: Server, tmp_path: Path):
    from tests.dicom_node.alerts.made import Channel, note, report

    path = tmp_path / "a" / "journal.sqlite"
    path.parent.mkdir()
    with contextlib.closing(Journal(path)) as own:
        record(own)
        record(own, series_uid="1.2")
        Outbox(own).mark_sent(Outbox(own).claim("pacs", time.time())[0].id)
        note(Ledger(own, [Channel()]), report())
        message, _ = Ledger(own).claim("ed", time.time())
        Ledger(own).sent(message, "AA")
        Ledger(own).acknowledge(1, "Dr A")
        before = own.series(), Outbox(own).items(), Ledger(own).alerts(), Ledger(own).attempts(1)
        content = own
    address = postgres.database()
    with contextlib.closing(Journal(address)) as journal:  # ids are others' there
        record(journal, series_uid="7.7")
        note(Ledger(journal, [Channel()]), report(), series="7.7")
    kept = path.read_bytes()
    for _ in range(2):  # the second time as if it had died before the file had its other name
        with member(address, tmp_path / "a", "a"), contextlib.closing(Journal(address, node="a")) as journal:
            records = [one for one in journal.series() if one.series_uid != "7.7"]
            items = [one for one in Outbox(journal).items() if one.series_uid != "7.7"]
            (alert,) = (one for one in Ledger(journal).alerts() if one.series_uid != "7.7")
            given = [one for one in Ledger(journal).acknowledgements() if one["alert_id"] == alert.id]
            tried = Ledger(journal).attempts(alert.messages[0].id)
        assert [replace(one, node="") for one in records] == before[0]
        assert {one.node for one in [*records, *items]} == {"a"}
        assert [replace(one, id=0, node="", sender=None) for one in items] == [
            replace(one, id=0, sender=None) for one in before[1]
        ]
        assert (alert.acknowledged_by, alert.messages[0].control_id) == ("Dr A", before[2][0].messages[0].control_id)
        assert (len(given), tried) == (1, before[3])
        assert not path.exists()
        path.write_bytes(kept)
    assert content.node == ""


# takeovers


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr("dicom_node.storage.membership.BEAT_S", 0.05)


def left_by(address: Address, folder: Path, name: str, postgres: Server) -> list[str]:
    """A node that died with a series of five slices that has no result, and one that has."""
    with member(address, folder, name, shared=True):
        pass
    spool = Spool(folder / "spool", 0)
    for series in ("1.1", "1.2"):
        for number in range(1, 6):
            uids = {"StudyInstanceUID": "1", "SeriesInstanceUID": series, "SOPInstanceUID": f"{series}.{number}"}
            store(spool, image(number, **uids))
    with contextlib.closing(Journal(address, node=name)) as journal:
        time.sleep(0.05)
        journal.record_result(
            "1",
            "1.2",
            1,
            state=SeriesState.ANALYSED,
            reason=None,
            slices=5,
            report_json=None,
            files=[],
            destinations={},
        )
    return [path.name for path in spool.series("1", "1.1")]


def test_of_two_heirs_one_takes_each_slice_and_what_is_done_stays(postgres: Server, tmp_path: Path, hasty):
    address = postgres.database()
    names = left_by(address, tmp_path / "dead", "dead", postgres)
    desks = [Desk(), Desk()]
    with (
        member(address, tmp_path / "b", "b", desks[0], shared=True),
        member(address, tmp_path / "c", "c", desks[1], shared=True),
        contextlib.closing(Journal(address)) as journal,
    ):
        wait_until(
            lambda: postgres.execute("SELECT emptied FROM node WHERE name = 'dead'", name_of(address))[0][0],
            "it is taken over from",
        )
        assert {one.name: one.lives for one in members(journal)} == {"dead": False, "b": True, "c": True}
    stored = [path.name for desk in desks for path in desk.stored]
    assert sorted(stored) == sorted(names)
    assert [] in [desk.stored for desk in desks], "one of them has the whole series"
    assert Spool(tmp_path / "dead" / "spool", 0).series("1", "1.1") == []
    assert len(Spool(tmp_path / "dead" / "spool", 0).series("1", "1.2")) == 5


def test_nobody_takes_over_from_a_node_that_has_only_lost_the_database(postgres: Server, tmp_path: Path, hasty):
    from dicom_node.storage.lock import FolderLock

    address = postgres.database()
    names = left_by(address, tmp_path / "cut-off", "cut-off", postgres)
    held = FolderLock(tmp_path / "cut-off")
    desk = Desk()
    with member(address, tmp_path / "b", "b", desk, shared=True):
        time.sleep(1)
        assert desk.stored == []
        held.release()
        wait_until(lambda: len(desk.stored) == len(names), "it is dead after all")


def test_who_takes_over_may_die_of_it(postgres: Server, tmp_path: Path, hasty, monkeypatch):
    """After each slice: it has a name in one of the spools, and the next who tries moves what is left."""
    address = postgres.database()
    names = left_by(address, tmp_path / "dead", "dead", postgres)
    genuine = Spool.keep
    kept = []

    def keep_two(self, incoming, instance):
        if len(kept) == 2:
            raise OSError(28, "No space left on device")
        kept.append(instance.path.name)
        return genuine(self, incoming, instance)

    monkeypatch.setattr(Spool, "keep", keep_two)
    with member(address, tmp_path / "b", "b", shared=True):
        wait_until(lambda: len(kept) == 2, "two are moved")
        time.sleep(0.3)
    spools = [Spool(tmp_path / name / "spool", 0) for name in ("dead", "b")]
    assert sorted(path.name for spool in spools for path in spool.series("1", "1.1")) == sorted(names)
    monkeypatch.setattr(Spool, "keep", genuine)
    desk = Desk()
    with member(address, tmp_path / "b", "b", desk, shared=True):
        wait_until(lambda: len(desk.stored) == 3, "the others follow")
    assert sorted(path.name for path in spools[1].series("1", "1.1")) == sorted(names)


def test_a_damaged_file_holds_up_no_other(postgres: Server, tmp_path: Path, hasty):
    address = postgres.database()
    names = left_by(address, tmp_path / "dead", "dead", postgres)
    damaged = Spool(tmp_path / "dead" / "spool", 0).series("1", "1.1")[2]
    damaged.write_bytes(b"no DICOM")
    desk = Desk()
    with member(address, tmp_path / "b", "b", desk, shared=True):
        wait_until(
            lambda: postgres.execute("SELECT emptied FROM node WHERE name = 'dead'", name_of(address))[0][0],
            "it is taken over from",
        )
    assert sorted(path.name for path in desk.stored) == sorted(set(names) - {damaged.name})
    assert damaged.exists()
    config = shared_config(tmp_path / "b", address, name="b", shared=True)
    told = [(one.node, one.series_uid, one.slices_received) for one in status.look(config).series if one.is_open]
    assert ("dead", "1.1", 1) in told, "and everybody is told"
    damaged.unlink()
    assert "dead" not in {one.node for one in status.look(config).series if one.is_open}
    shutil.rmtree(tmp_path / "dead")
    assert "dead" not in {one.node for one in status.look(config).series if one.is_open}


def test_a_slice_whose_old_name_stays_is_told_of_all_the_same(postgres: Server, tmp_path: Path, hasty, monkeypatch):
    address = postgres.database()
    names = left_by(address, tmp_path / "dead", "dead", postgres)
    genuine, failed = Path.unlink, []

    def unlink(self, missing_ok=False):
        if self.suffix == ".dcm" and "dead" in self.parts and not failed:
            failed.append(self)
            raise OSError(5, "Input/output error")
        genuine(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    desk = Desk()
    with member(address, tmp_path / "b", "b", desk, shared=True):
        wait_until(lambda: len(desk.stored) == len(names), "all are told of")
    assert failed


def test_who_takes_over_much_is_not_taken_for_dead(postgres: Server, tmp_path: Path, hasty, monkeypatch):
    address = postgres.database()
    left_by(address, tmp_path / "dead", "dead", postgres)
    uids = {"StudyInstanceUID": "1", "SeriesInstanceUID": "1.3", "SOPInstanceUID": "1.3.1"}
    store(Spool(tmp_path / "dead" / "spool", 0), image(1, **uids))
    done = []
    for name in ("_beat", "_move"):
        genuine = getattr(Membership, name)
        monkeypatch.setattr(
            Membership, name, lambda self, *of, name=name, genuine=genuine: (done.append(name), genuine(self, *of))
        )
    with member(address, tmp_path / "b", "b", shared=True):
        wait_until(lambda: done.count("_move") == 2, "both series are moved")
    assert ("_move", "_move") not in pairwise(done), "the lease is renewed between them"


def test_part_of_a_head_on_another_node_takes_no_alert_back(postgres: Server, tmp_path: Path):
    from dicom_node.assembler import Assembly
    from dicom_node.dispatch import Result
    from dicom_node.storage.register import Register
    from tests.dicom_node.alerts.made import Channel, report

    address = postgres.database()

    def tell(node: str, revision: int, slices: int, said: dict) -> None:
        with contextlib.closing(Journal(address, node=node)) as journal:
            assembly = Assembly("1", "1.1", revision, 0.0, dict.fromkeys(Path(str(n)) for n in range(slices)))
            found = Result(SeriesState.ANALYSED, None, json.dumps(said))
            Register(journal, Outbox(journal), Ledger(journal, [Channel()])).record(assembly, found, ())

    with contextlib.closing(Journal(address)) as journal:
        tell("a", 1, 40, report("urgent", 5))
        tell("b", 2, 1, report("incomplete"))
        assert [(one.state, one.level) for one in Ledger(journal).alerts()] == [("confirmed", "urgent")]
        tell("b", 3, 2, report("critical"))
        assert [(one.state, one.level) for one in Ledger(journal).alerts()] == [("provisional", "critical")]
        tell("a", 4, 40, report("routine"))
        assert [one.state for one in Ledger(journal).alerts()] == ["withdrawn"]


@pytest.mark.parametrize("moment", ["before", "within"])
def test_a_node_that_records_at_the_same_moment_is_seen(postgres: Server, monkeypatch: pytest.MonkeyPatch, moment: str):
    """One has the whole head, the other a slice of it, which must not take back what the whole head has raised."""
    from dicom_node.assembler import Assembly
    from dicom_node.dispatch import Result
    from dicom_node.storage.register import Register
    from tests.dicom_node.alerts.made import Channel, report

    address = postgres.database()

    def tell(node: str, revision: int, slices: int, said: dict) -> None:
        with contextlib.closing(Journal(address, node=node)) as journal:
            assembly = Assembly("1", "1.1", revision, 0.0, dict.fromkeys(Path(str(n)) for n in range(slices)))
            found = Result(SeriesState.ANALYSED, None, json.dumps(said))
            Register(journal, Outbox(journal), Ledger(journal, [Channel()])).record(assembly, found, ())

    whole, part = ("a", 1, 40, report("urgent", 5)), ("b", 2, 1, report("routine"))
    record_result, note = Journal.record_result, Ledger.note
    if moment == "before":  # the whole head is there once the part has begun

        def late(self, *arguments, **named):
            if self.node == "b":
                tell(*whole)
            return record_result(self, *arguments, **named)

        monkeypatch.setattr(Journal, "record_result", late)
        tell(*part)
    else:  # its transaction is open
        with ThreadPoolExecutor(1) as pool:
            others = []

            def noted(self, *arguments, **named):
                note(self, *arguments, **named)
                if not others:
                    others.append(pool.submit(tell, *part))
                    waiting = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
                    wait_until(lambda: postgres.execute(waiting, name_of(address)), "the other waits")

            monkeypatch.setattr(Ledger, "note", noted)
            tell(*whole)
            others[0].result()
    with contextlib.closing(Journal(address)) as journal:
        assert [(one.state, one.level) for one in Ledger(journal).alerts()] == [("confirmed", "urgent")]


@contextlib.contextmanager
def two_ledgers(address: Address, folder: Path) -> Iterator[list[Ledger]]:
    """Those of nodes a and b, which live."""
    from tests.dicom_node.alerts.made import Channel

    with (
        member(address, folder / "a", "a"),
        member(address, folder / "b", "b"),
        contextlib.closing(Journal(address, node="a")) as first,
        contextlib.closing(Journal(address, node="b")) as second,
    ):
        yield [Ledger(journal, [Channel()]) for journal in (first, second)]


def test_a_message_goes_from_one_node_at_a_time(postgres: Server, tmp_path: Path):
    from tests.dicom_node.alerts.made import note, report

    address = postgres.database()
    with two_ledgers(address, tmp_path) as ledgers:
        note(ledgers[0], report(), series="1.1")
        note(ledgers[1], report(), series="1.2")
        message, _ = ledgers[0].claim("ed", time.time())
        assert ledgers[1].claim("ed", time.time()) is None
        ledgers[0].sent(message, "AA")
        message, _ = ledgers[1].claim("ed", time.time())
        assert ledgers[0].claim("ed", time.time()) is None
        postgres.execute("UPDATE node SET expires = 0 WHERE name = 'b'", name_of(address))
        assert ledgers[0].claim("ed", time.time())[0].control_id == message.control_id


@pytest.mark.parametrize("late", ["unreachable", "refused"])
@pytest.mark.parametrize("told", [0, 1], ids=["told by the dead", "told by the heir"])
def test_what_one_node_has_told_no_other_s_attempt_takes_back(postgres: Server, tmp_path: Path, told: int, late: str):
    from tests.dicom_node.alerts.made import note, report

    address = postgres.database()
    with two_ledgers(address, tmp_path) as ledgers:
        note(ledgers[0], report(), series="1.1")
        message, _ = ledgers[0].claim("ed", time.time())
        postgres.execute("UPDATE node SET expires = 0 WHERE name = 'a'", name_of(address))
        again, _ = ledgers[1].claim("ed", time.time())
        assert again.control_id == message.control_id
        attempts = [message, again]
        ledgers[told].sent(attempts[told], "AA")
        getattr(ledgers[1 - told], late)(attempts[1 - told], "no answer", 1.0)
        (kept,) = ledgers[0].alerts()[0].messages
        assert (kept.state, kept.last_error) == ("sent", None)


def test_nobody_waits_behind_what_a_crash_left(postgres: Server, tmp_path: Path):
    """Also where the node that lives again has neither channel nor destination any more."""
    from tests.dicom_node.alerts.made import Channel, note, report

    address = postgres.database()
    with (
        contextlib.closing(Journal(address, node="a", shares_storage=True)) as first,
        contextlib.closing(Journal(address, node="b", shares_storage=True)) as second,
    ):
        ledger = Ledger(first, [Channel()])
        with member(address, tmp_path / "a", "a", shared=True):
            note(ledger, report(), series="1.1")
            message, _ = ledger.claim("ed", time.time())
            record(first)
            assert len(Outbox(first).claim("pacs", time.time())) == 3
        with member(address, tmp_path / "a", "a", shared=True), member(address, tmp_path / "b", "b", shared=True):
            assert Ledger(second).claim("ed", time.time())[0].control_id == message.control_id
            assert len(Outbox(second).claim("pacs", time.time())) == 3


# the database is away


def test_a_frozen_server_keeps_nobody_waiting(killable: Server, monkeypatch):
    """Its kernel answers for it: only who looks at the clock finds out."""
    monkeypatch.setattr("dicom_node.storage.answering.SILENCE_S", 1.0)
    with contextlib.closing(Journal(killable.database())) as journal, ThreadPoolExecutor(1) as beside:
        record(journal)
        with killable.frozen():
            with pytest.raises(JournalError, match="can't be reached: connection timeout"):
                beside.submit(journal.series).result(30)
            with monkeypatch.context() as patch:
                patch.setattr(journal.database, "_open", None)  # for a while nobody tries again
                with pytest.raises(JournalError, match="can't be reached"):
                    journal.series()
            assert journal.database.fault()
        wait_until(lambda: is_back(journal), "it goes on")
        assert not journal.database.fault()

        def freeze_within() -> None:
            with journal.transaction() as execute:
                execute("UPDATE outbox SET state = 'sent'")
                with killable.frozen():
                    execute("UPDATE outbox SET state = 'sent'")

        with pytest.raises(JournalError, match="no answer within 1 s"):
            beside.submit(freeze_within).result(30)
        wait_until(lambda: is_back(journal), "it goes on")
        assert {item.state for item in Outbox(journal).items()} == {DeliveryState.QUEUED}


def test_a_statement_that_takes_long_is_no_silence(postgres: Server, monkeypatch):
    from dicom_node.storage.answering import SILENCE_S

    assert float(driver._SESSION["statement_timeout"].removesuffix("s")) < SILENCE_S
    monkeypatch.setitem(driver._SESSION, "statement_timeout", "1s")
    with contextlib.closing(Journal(postgres.database())) as journal:
        with pytest.raises(JournalError, match="statement timeout"), journal.statements() as execute:
            execute("SELECT pg_sleep(60)")
        assert not journal.database.fault()
        assert journal.series() == []


def test_a_server_that_was_started_again_is_not_noticed(killable: Server):
    with contextlib.closing(Journal(killable.database())) as journal:
        record(journal)
        killable.kill()
        killable.start()
        assert len(Outbox(journal).claim("pacs", time.time())) == 3
        killable.kill()
        killable.start()
        assert len(journal.series()) == 1


def test_who_dies_within_a_transaction_has_written_nothing(killable: Server):
    with contextlib.closing(Journal(killable.database())) as journal:
        record(journal)
        with pytest.raises(JournalError), journal.transaction() as execute:
            die_within(execute, killable)
        assert journal.database.fault()
        began = time.monotonic()
        for _ in range(20):
            with pytest.raises(JournalError, match="can't be reached|terminat|closed"):
                journal.series()
        assert time.monotonic() - began < 10, "nobody waits for what is away"
        killable.start()
        wait_until(lambda: is_back(journal), "it is back")
        assert not journal.database.fault()
        assert {item.state for item in Outbox(journal).items()} == {DeliveryState.QUEUED}


def die_within(execute, server: Server) -> None:
    execute("UPDATE outbox SET state = 'sent'")
    server.kill()
    execute("UPDATE outbox SET state = 'sent'")


def is_back(journal: Journal) -> bool:
    with contextlib.suppress(JournalError):
        journal.series()
        return True
    return False


@contextlib.contextmanager
def killed(server: Server) -> Iterator[None]:
    server.kill()
    yield
    server.start()


@pytest.mark.parametrize("away", [killed, Server.frozen])
def test_while_it_is_away_slices_are_taken_and_results_wait(
    tmp_path: Path, pacs: Pacs, killable: Server, bleeding: Pushable, monkeypatch, away
):
    monkeypatch.setattr("dicom_node.storage.answering.SILENCE_S", 2.0)
    config = shared_config(tmp_path / "node", killable.database(), pacs.port)
    web = config.web.model_copy(update={"port": 0})
    with running(config.model_copy(update={"web": web})) as node, capture_logs() as logs:
        with away(killable):
            sent = []
            push(bleeding.paths, ("127.0.0.1", node.port), calling_ae="CT", called_ae="SCANSIDE", on_slice=sent.append)
            assert [one.is_stored for one in sent] == [True] * len(bleeding.paths)
            wait_until(lambda: node.readiness()["journal"], "somebody has missed it")
            address = f"http://127.0.0.1:{node._web.port}/readyz"
            with pytest.raises(HTTPError) as answer:
                urllib.request.urlopen(address)
            assert answer.value.code == 503
            assert "the database is away" in json.loads(answer.value.read())["journal"]
            answer.value.close()
            assert any(said in node.summary() for said in ("can't be reached", "terminating", "no answer within"))
            with pytest.raises(JournalError, match="can't be reached"):
                status.look(config)
            assert not any(reason for reason in node.health().values()), "it is well all the same"
            assert watched(node) == (0, len(bleeding.paths), None)
        wait_until(lambda: not node.readiness()["journal"], "it is back")
        wait_until(
            lambda: [one.slices_analysed for one in look(config)] == [len(bleeding.paths)], "the series is analysed"
        )
        wait_until(lambda: not status.look(config).results_unsent, "and delivered")
        (only,) = look(config)
        assert (only.revision, only.provisional) == (1, False), "whole, for it was released in order"
        assert watched(node) == (1, 0, 1)
    told = [
        (each["event"], each.get("images")) for each in logs if each["event"] in {"series_not_opened", "series_opened"}
    ]
    assert told == [("series_not_opened", None), ("series_opened", len(bleeding.paths))]


def watched(node: Node) -> tuple[float | None, ...]:
    """Whether the journal is up, images that wait for it, and how many alerts there are."""
    value = node.metrics.registry.get_sample_value
    alerts = value("scanside_alerts", {"level": "critical", "state": "confirmed"})
    return value("scanside_journal_up"), value("scanside_images_not_noted"), alerts


def look(config: Config):
    with contextlib.suppress(JournalError):
        return status.look(config).series
    return ()
