"""Performed procedure steps and storage commitment: what scanners say, what they are told, what a crash leaves."""

from __future__ import annotations

import contextlib
import gc
import json
import sqlite3
from typing import TYPE_CHECKING

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid
from pynetdicom import AE, evt
from pynetdicom.dsutils import encode
from pynetdicom.sop_class import (
    ModalityPerformedProcedureStep,
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
)
from structlog.testing import capture_logs

from dicom_node.configuration.sections import Scanner
from dicom_node.delivery import outbox
from dicom_node.intake import commitment, mpps
from dicom_node.intake.announced import Announced, Source, StepState
from dicom_node.intake.commitment import Commitments
from dicom_node.intake.mpps import PerformedSteps
from dicom_node.intake.receiver import Receiver
from dicom_node.network import dimse, requestor
from dicom_node.simulation.scanner import push
from dicom_node.storage.journal import Journal
from dicom_node.storage.spool import Spool
from tests.dicom_node.conftest import wait_until
from tests.dicom_node.instances import SERIES, Recorder, image, write
from tests.dicom_node.network.test_connection import associated

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

# pynetdicom leaves the socket of a connection that could not be opened to garbage collection
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """Sockets that pynetdicom left go within the test that is known for it, not in a later one."""
    yield
    gc.collect()


class Bench:
    """A receiver with both services, and what they told."""

    def __init__(self, folder: Path, scanners: tuple[Scanner, ...] = ()) -> None:
        self.folder = folder
        self.told: list[tuple[str, ...]] = []
        self.journal = Journal(folder / "journal.sqlite")
        self.announced = Announced(self.journal)
        spool = Spool(folder / "spool", 0)
        self.commitments = Commitments(self.journal, spool, self.announced, scanners, "SCANSIDE", self.told.append)
        self.receiver = Receiver(
            ae_title="SCANSIDE",
            address="127.0.0.1",
            port=0,
            spool=spool,
            intake=Recorder(),
            services={
                mpps.SOP_CLASS: PerformedSteps(self.announced, self.told.append),
                commitment.SOP_CLASS: self.commitments,
            },
        )

    def start(self) -> None:
        self.receiver.start()
        self.commitments.start()

    def stop(self) -> None:
        self.receiver.stop()
        self.commitments.stop()
        self.journal.close()

    def reports(self) -> list[dict]:
        """Rows of the journal."""
        with contextlib.closing(sqlite3.connect(self.folder / "journal.sqlite")) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute("SELECT * FROM commitment ORDER BY created")]

    @contextlib.contextmanager
    def associated(self, sop_class: str, handlers: Sequence = (), syntax: str = ExplicitVRLittleEndian) -> Iterator:
        ae = AE("CT01")
        ae.add_requested_context(sop_class, syntax)
        association = ae.associate("127.0.0.1", self.receiver.port, evt_handlers=list(handlers))
        assert association.is_established
        try:
            yield association
        finally:
            association.release()
            wait_until(lambda: not association.is_alive(), "the association's end")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    bench.start()
    yield bench
    bench.stop()


def step(state: str, series: dict[str, list[str]] | None = None) -> Dataset:
    """Attributes of a step: of its beginning, or of its end with what it brought forth."""
    told = Dataset()
    told.PerformedProcedureStepStatus = state
    items = []
    for series_uid, sop_uids in (series or {}).items():
        item = Dataset()
        item.SeriesInstanceUID = series_uid
        item.ReferencedImageSequence = [reference(sop_uid) for sop_uid in sop_uids]
        item.ReferencedNonImageCompositeSOPInstanceSequence = []
        items.append(item)
    if items:
        told.PerformedSeriesSequence = items
    return told


def reference(sop_uid: str, sop_class: str = CTImageStorage) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, sop_uid
    return item


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("end", ["COMPLETED", "DISCONTINUED"])
def test_a_step_from_its_beginning_to_its_end(bench: Bench, end: str, syntax: str):
    with bench.associated(ModalityPerformedProcedureStep, syntax=syntax) as scanner:
        asked = (ModalityPerformedProcedureStep, "1.2.9")
        assert scanner.send_n_create(step("IN PROGRESS"), *asked)[0].Status == 0
        assert bench.announced.state_of("1.2.9") is StepState.IN_PROGRESS
        assert scanner.send_n_set(step("IN PROGRESS"), *asked)[0].Status == 0
        assert bench.told == []
        assert scanner.send_n_set(step(end, {"1.2": ["1.2.1", "1.2.2"], "1.3": ["1.3.1"]}), *asked)[0].Status == 0
    assert bench.announced.state_of("1.2.9") == end
    assert bench.told == [("1.2", "1.3")]
    assert bench.announced.of("1.2", Source.STEP) == {"1.2.1", "1.2.2"}
    assert bench.announced.of("1.2", Source.COMMITMENT) == frozenset()
    assert bench.announced.of("9.9", Source.STEP) == frozenset()
    with contextlib.closing(Journal(bench.folder / "journal.sqlite")) as again:  # a crash takes none of it
        assert Announced(again).of("1.3", Source.STEP) == {"1.3.1"}


def test_a_step_that_makes_no_sense_is_answered_so(bench: Bench):
    with bench.associated(ModalityPerformedProcedureStep) as scanner:
        asked = (ModalityPerformedProcedureStep, "1.2.9")
        assert scanner.send_n_set(step("COMPLETED"), *asked)[0].Status == 0x0112
        assert scanner.send_n_create(step("COMPLETED"), *asked)[0].Status == 0x0106
        assert scanner.send_n_create(reference("1.2"), *asked)[0].Status == 0x0106
        assert scanner.send_n_create(step("IN PROGRESS"), *asked)[0].Status == 0
        assert scanner.send_n_create(step("IN PROGRESS"), *asked)[0].Status == 0x0111
        assert scanner.send_n_set(step("FINISHED"), *asked)[0].Status == 0x0106
        assert scanner.send_n_set(step("COMPLETED"), *asked)[0].Status == 0
        assert scanner.send_n_set(step("COMPLETED"), *asked)[0].Status == 0x0110  # may no longer be updated
        assert scanner.send_n_create(step("IN PROGRESS"), ModalityPerformedProcedureStep)[0].Status == 0x0117
        assert scanner.send_n_delete(*asked).Status == 0x0211


def request(*references: Dataset) -> Dataset:
    asked = Dataset()
    asked.TransactionUID = generate_uid()
    asked.ReferencedSOPSequence = list(references)
    return asked


def ask(scanner, asked: Dataset, action: int = 1) -> int:
    status, _ = scanner.send_n_action(asked, action, StorageCommitmentPushModel, StorageCommitmentPushModelInstance)
    return status.Status


@pytest.fixture
def held(bench: Bench, tmp_path: Path) -> list[str]:
    """Three slices, pushed; their SOP Instance UIDs."""
    paths = write(tmp_path / "scanner", *(image(number) for number in (1, 2, 3)))
    assert not push(paths, ("127.0.0.1", bench.receiver.port), calling_ae="CT01", called_ae="SCANSIDE").failed
    return [f"{SERIES}.{number}" for number in (1, 2, 3)]


class Scu:
    """Who asked: takes reports, and answers them with a status."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.reports: list[tuple[int, Dataset]] = []
        self.handlers = [(evt.EVT_N_EVENT_REPORT, self._take)]

    def _take(self, event: evt.Event) -> tuple[int, None]:
        self.reports.append((event.event_type, event.event_information))
        return self.status, None


def test_what_is_held_is_committed_on_the_same_association(bench: Bench, held: list[str]):
    scu = Scu()
    asked = request(*map(reference, held))
    with bench.associated(StorageCommitmentPushModel, scu.handlers) as scanner:
        assert ask(scanner, asked) == 0
        wait_until(lambda: bench.reports() and bench.reports()[0]["told"], "the report")
    ((event_type, report),) = scu.reports
    assert event_type == 1
    assert report.TransactionUID == asked.TransactionUID
    assert [each.ReferencedSOPInstanceUID for each in report.ReferencedSOPSequence] == held
    assert "FailedSOPSequence" not in report
    assert bench.told == [(SERIES,)]
    assert bench.announced.of(SERIES, Source.COMMITMENT) == set(held)


def test_what_is_not_held_is_named_with_its_reason_and_announces_nothing(bench: Bench, held: list[str]):
    scu = Scu()
    asked = request(reference(held[0]), reference("9.9"), reference(held[1], "1.2.840.10008.5.1.4.1.1.7"))
    with bench.associated(StorageCommitmentPushModel, scu.handlers) as scanner:
        assert ask(scanner, asked) == 0
        wait_until(lambda: len(scu.reports) == 1, "the report")
    ((event_type, report),) = scu.reports
    assert event_type == 2
    assert [each.ReferencedSOPInstanceUID for each in report.ReferencedSOPSequence] == held[:1]
    failed = [(each.ReferencedSOPInstanceUID, each.FailureReason) for each in report.FailedSOPSequence]
    assert failed == [("9.9", 0x0112), (held[1], 0x0119)]
    assert bench.told == []


def test_a_damaged_file_is_not_committed(bench: Bench, held: list[str]):
    (path,) = (bench.folder / "spool").rglob(f"{held[2]}.dcm")
    path.write_bytes(b"")
    scu = Scu()
    with bench.associated(StorageCommitmentPushModel, scu.handlers) as scanner:
        assert ask(scanner, request(*map(reference, held))) == 0
        wait_until(lambda: len(scu.reports) == 1, "the report")
    assert scu.reports[0][0] == 2


@pytest.mark.parametrize(
    ("asked", "action", "status"),
    [(reference("1.2"), 1, 0x0106), (request(), 1, 0x0106), (request(reference("1.2")), 7, 0x0123)],
    ids=["nothing", "no references", "another action"],
)
def test_a_request_that_makes_no_sense_is_answered_so(bench: Bench, asked: Dataset, action: int, status: int):
    with bench.associated(StorageCommitmentPushModel) as scanner:
        assert ask(scanner, asked, action) == status
    assert bench.reports() == []


def test_a_scanner_with_a_port_of_its_own_is_told_there_until_it_listens(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(outbox, "FIRST_WAIT_S", 0.05)
    monkeypatch.setattr(commitment, "LONGEST_SLEEP_S", 0.05)
    monkeypatch.setattr(requestor, "CONNECT_TIMEOUT_S", 1.0)
    scu = Scu()
    ae = AE("CT01")
    ae.add_supported_context(StorageCommitmentPushModel, scu_role=True, scp_role=True)
    first = ae.start_server(("127.0.0.1", 0), block=False)
    port = first.server_address[1]
    first.shutdown()
    bench = Bench(tmp_path, (Scanner(ae_title="CT01", host="127.0.0.1", port=port),))
    bench.start()
    try:
        with bench.associated(StorageCommitmentPushModel) as scanner:
            assert ask(scanner, request(reference("9.9"))) == 0
        wait_until(lambda: bench.reports()[0]["tries"] >= 2, "two attempts")
        assert "refused" in bench.reports()[0]["last_error"]
        bench.commitments.stop()  # the node stops, and starts again
        bench.commitments = Commitments(
            bench.journal, Spool(tmp_path / "other", 0), bench.announced,
            (Scanner(ae_title="CT01", host="127.0.0.1", port=port),), "SCANSIDE", bench.told.append,
        )  # fmt: skip
        bench.commitments.start()
        scu.status = 0x0110
        server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=scu.handlers)
        wait_until(lambda: len(scu.reports) >= 2, "a report that is not taken comes again")
        scu.status = 0
        wait_until(lambda: bench.reports()[0]["told"], "the report")
        server.shutdown()
    finally:
        bench.stop()
    assert {event_type for event_type, _ in scu.reports} == {2}
    assert json.loads(bench.reports()[0]["report"])["failed"] == [[CTImageStorage, "9.9", 0x0112]]


def test_a_scanner_that_can_not_be_told_holds_up_no_other(tmp_path: Path, monkeypatch):
    """Sending raises ValueError where a context is not accepted in our role, RuntimeError where the peer has gone."""
    monkeypatch.setattr(commitment, "LONGEST_SLEEP_S", 0.05)

    class Association:
        def __init__(self, peer: Scanner, *_: object, **__: object) -> None:
            self._peer = peer

        def send_n_event_report(self, *_: object) -> tuple[Dataset, None]:
            if self._peer.ae_title == "CT01":
                raise ValueError("no context has been accepted")
            status = Dataset()
            status.Status = 0
            return status, None

        def release(self) -> None:
            pass

    monkeypatch.setattr(commitment, "associate", Association)
    bench = Bench(tmp_path, tuple(Scanner(ae_title=name, host="127.0.0.1", port=9) for name in ("CT01", "CT02")))
    for name in ("CT01", "CT02"):
        bench.commitments._keep(commitment.Report(f"1.2.{name[-1]}", name, (), (("1.2", "1.2.4", 0x0112),)))
    bench.start()
    try:
        wait_until(lambda: bench.reports()[1]["told"], "the second scanner's report")
        assert bench.reports()[0]["last_error"] == "no context has been accepted"
    finally:
        bench.stop()


@pytest.mark.parametrize("jump_s", [86400, -86400])
def test_a_clock_that_jumps_by_a_day_holds_no_report_up(tmp_path: Path, monkeypatch, jump_s: int):
    """Its next try is tomorrow, or was yesterday: it is told now."""
    bench = Bench(tmp_path, (Scanner(ae_title="CT01", host="127.0.0.1", port=9),))
    report = commitment.Report("1.2.3", "CT01", (), (("1.2", "1.2.4", 0x0112),))
    with monkeypatch.context() as patched:
        patched.setattr(commitment.time, "time", lambda: before + jump_s)
        before = 1.8e9
        bench.commitments._keep(report)
        bench.commitments._postpone(report, "no answer")
        assert bench.commitments._due() == []
        patched.setattr(commitment.time, "time", lambda: before)
        assert [one.transaction_uid for one in bench.commitments._due()] == ["1.2.3"]
    bench.journal.close()


def test_who_leaves_before_its_report_is_owed_it(bench: Bench, held: list[str]):
    """Nobody knows its port, so it has to ask again; the journal says that it was not told."""
    command = dimse.encode(
        {
            dimse.REQUESTED_SOP_CLASS_UID: StorageCommitmentPushModel,
            dimse.COMMAND_FIELD: dimse.Request.N_ACTION,
            dimse.MESSAGE_ID: 1,
            dimse.COMMAND_DATA_SET_TYPE: 0,
            dimse.REQUESTED_SOP_INSTANCE_UID: StorageCommitmentPushModelInstance,
            dimse.ACTION_TYPE_ID: 1,
        }
    )
    with capture_logs() as events:
        with associated(bench.receiver, StorageCommitmentPushModel) as scanner:
            scanner.message(command, encode(request(reference(held[0])), False, True))
            assert scanner.answer().number(dimse.STATUS) == 0
        wait_until(lambda: any(one["event"] == "association_ended" for one in events), "the end")
        wait_until(lambda: any(one["event"] == "commitment_not_told" for one in events), "a warning")
    (warning,) = (one for one in events if one["event"] == "commitment_not_told")
    assert "[[scanners]]" in warning["remedy"]
    assert [row["told"] for row in bench.reports()] == [None]
