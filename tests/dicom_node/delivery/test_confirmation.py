"""Archives that say later whether they keep what they took: by storage commitment, in its ways, or by a query."""

from __future__ import annotations

import contextlib
import struct
import threading
import time
from typing import TYPE_CHECKING

import pytest
import structlog
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE, build_role, evt
from pynetdicom.sop_class import (
    Comprehensive3DSRStorage,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
    StudyRootQueryRetrieveInformationModelFind,
)

from dicom_node.configuration.sections import Destination
from dicom_node.delivery import confirmation, outbox, sender
from dicom_node.delivery.outbox import Outbox
from dicom_node.delivery.sender import Sender
from dicom_node.intake import commitment
from dicom_node.intake.announced import Announced
from dicom_node.intake.commitment import Commitments
from dicom_node.storage.journal import Journal, JournalError, ResultFile, SeriesState
from dicom_node.storage.spool import Spool
from tests.dicom_node.instances import Recorder, receiving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# pynetdicom does not close the socket of a connection that was refused; it is collected at once
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

DEADLINE_S = 20.0
SOP_CLASS = {"sr": Comprehensive3DSRStorage, "sc": SecondaryCaptureImageStorage, "seg": SegmentationStorage}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    for module, name, value in (
        (outbox, "FIRST_WAIT_S", 0.05),
        (outbox, "LONGEST_WAIT_S", 0.2),
        (sender, "LONGEST_SLEEP_S", 0.05),
        (confirmation, "LONGEST_WAIT_S", 0.2),
        (confirmation, "FIRST_REPORT_S", 0.5),
        (confirmation, "FIRST_QUERY_S", 0.05),
        (commitment, "LONGEST_SLEEP_S", 0.05),
    ):
        monkeypatch.setattr(module, name, value)


class Archive:
    """Stores, and says of what it was asked for what it is told to say."""

    def __init__(self, *contexts: str):
        self.stored: list[str] = []
        self.requests: list[Dataset] = []
        self.queries: list[Dataset] = []
        self.answers: list[int] = []
        self.on: set[object] = set()  # which associations objects came on
        self.reports_to: tuple[str, int] | None = None  # a port; otherwise on the association of the request
        self.is_silent = False
        self.promise = 0x0000
        self.find_status = 0x0000
        self.loses: set[str] = set()
        self._ae = AE("ARCHIVE")
        for sop_class in (*SOP_CLASS.values(), *contexts):
            self._ae.add_supported_context(sop_class)
        self._threads: list[threading.Thread] = []

    @contextlib.contextmanager
    def running(self, port: int = 0) -> Iterator[int]:
        handlers = [
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_N_ACTION, self._commit),
            (evt.EVT_C_FIND, self._find),
        ]
        server = self._ae.start_server(("127.0.0.1", port), block=False, evt_handlers=handlers)
        try:
            yield server.server_address[1]
        finally:
            for thread in self._threads:
                thread.join()
            server.shutdown()

    def _store(self, event: evt.Event) -> int:
        self.stored.append(event.request.AffectedSOPInstanceUID)
        self.on.add(event.assoc)
        return 0x0000

    def _commit(self, event: evt.Event) -> tuple[int, Dataset | None]:
        self.requests.append(event.action_information)
        if not self.is_silent and self.promise == 0:
            target = self._report_there if self.reports_to else self._report_here
            self._threads.append(threading.Thread(target=target, args=(event.action_information, event.assoc)))
            self._threads[-1].start()
        return self.promise, None

    def report(self, request: Dataset) -> Dataset:
        report = Dataset()
        report.TransactionUID = request.TransactionUID
        report.ReferencedSOPSequence, lost = [], []
        for reference in request.ReferencedSOPSequence:
            if reference.ReferencedSOPInstanceUID in self.loses:
                reference.FailureReason = 0x0110
                lost.append(reference)
            else:
                report.ReferencedSOPSequence.append(reference)
        if lost:
            report.FailedSOPSequence = lost
        return report

    def _report_here(self, request: Dataset, association) -> None:
        time.sleep(0.1)  # after the answer
        self._send_report(request, association)

    def _report_there(self, request: Dataset, _association) -> None:
        ae = AE("ARCHIVE")
        ae.add_requested_context(StorageCommitmentPushModel)
        role = build_role(StorageCommitmentPushModel, scp_role=True)
        association = ae.associate(*self.reports_to, ext_neg=[role])
        assert association.is_established
        self._send_report(request, association)
        association.release()

    def _send_report(self, request: Dataset, association) -> None:
        report = self.report(request)
        status, _ = association.send_n_event_report(
            report,
            2 if "FailedSOPSequence" in report else 1,
            StorageCommitmentPushModel,
            StorageCommitmentPushModelInstance,
        )
        self.answers.append(status.get("Status"))

    def _find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        self.queries.append(event.identifier)
        if self.find_status:
            yield self.find_status, None
            return
        asked = event.identifier.SOPInstanceUID
        for sop_uid in [asked] if isinstance(asked, str) else asked:
            if sop_uid not in self.loses:
                match = Dataset()
                match.QueryRetrieveLevel, match.SOPInstanceUID = "IMAGE", sop_uid
                yield 0xFF00, match


class Bench:
    """A journal with three results that are owed, and a node's port."""

    def __init__(self, folder: Path):
        self.journal = Journal(folder / "journal.sqlite")
        self.outbox = Outbox(self.journal)
        files = [self._file(folder, role, sop_class) for role, sop_class in SOP_CLASS.items()]
        self.journal.record_result(
            "1.2", "1.2.3", 1, state=SeriesState.ANALYSED, reason=None, slices=9, report_json="{}",
            files=files, destinations={"pacs": ("sr", "sc", "seg")},
        )  # fmt: skip

    @staticmethod
    def _file(folder: Path, role: str, sop_class: str) -> ResultFile:
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, generate_uid()
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2", f"1.2.4.{len(role)}{ord(role[1])}"
        dataset.save_as(folder / f"{role}.dcm", enforce_file_format=True)
        return ResultFile(role, folder / f"{role}.dcm", sop_class, dataset.SOPInstanceUID)

    @contextlib.contextmanager
    def sending(self, port: int, confirm: str) -> Iterator[Sender]:
        destination = Destination(name="pacs", ae_title="ARCHIVE", host="127.0.0.1", port=port, confirm=confirm)
        running = Sender(self.outbox, [destination], "NODE")
        running.start()
        try:
            yield running
        finally:
            running.stop()

    def states(self) -> list[str]:
        return [str(item.state) for item in self.outbox.items()]

    def wait_for(self, *states: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while self.states() != list(states):
            assert time.monotonic() < deadline, [(item.state, item.last_error) for item in self.outbox.items()]
            time.sleep(0.01)


def wait_until(fulfilled: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not fulfilled():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def bench(tmp_path):
    made = Bench(tmp_path)
    yield made
    made.journal.close()


@pytest.fixture
def node_port(bench, tmp_path):
    """Where destinations may report."""
    spool = Spool(tmp_path / "spool", 0)
    commitments = Commitments(bench.journal, spool, Announced(bench.journal), (), "NODE", lambda _: None)
    with receiving(tmp_path / "spool", Recorder(), services={commitment.SOP_CLASS: commitments}) as receiver:
        yield receiver.port


def test_a_commitment_on_the_association_of_its_request(bench):
    archive = Archive(StorageCommitmentPushModel)
    with archive.running() as port, bench.sending(port, "commitment"):
        bench.wait_for("confirmed", "confirmed", "confirmed")
    (request,) = archive.requests
    assert {(one.ReferencedSOPClassUID, one.ReferencedSOPInstanceUID) for one in request.ReferencedSOPSequence} == {
        (item.sop_class_uid, item.sop_uid) for item in bench.outbox.items()
    }
    assert archive.answers == [0x0000]
    assert all(item.sent <= item.confirmed for item in bench.outbox.items())


@pytest.mark.parametrize("confirm", ["commitment", "query"])
def test_an_association_that_was_open_before_results_were_owed_serves_as_well(bench, confirm):
    archive = Archive(StorageCommitmentPushModel, StudyRootQueryRetrieveInformationModelFind)
    for item in bench.outbox.items():
        bench.outbox.park(item.id, "not yet")
    with archive.running() as port, bench.sending(port, confirm) as running:
        running.expect()
        wait_until(lambda: len(archive._ae.active_associations) == 1)
        (association,) = archive._ae.active_associations
        bench.outbox.retry()
        running.expect()  # of another series: no reason to hurry
        running.wake()
        bench.wait_for("confirmed", "confirmed", "confirmed")
    assert len(archive.stored) == 3
    assert archive.on == {association}


def test_a_commitment_on_an_association_of_the_archive(bench, node_port):
    archive = Archive(StorageCommitmentPushModel)
    archive.reports_to = ("127.0.0.1", node_port)
    with archive.running() as port, bench.sending(port, "commitment"):
        bench.wait_for("confirmed", "confirmed", "confirmed")
    assert archive.answers == [0x0000]


def test_what_is_not_kept_is_sent_again_and_parked_if_it_never_is(bench):
    archive = Archive(StorageCommitmentPushModel)
    sr, sc, seg = (item.sop_uid for item in bench.outbox.items())
    archive.loses = {sc}
    with archive.running() as port, bench.sending(port, "commitment"):
        bench.wait_for("confirmed", "parked", "confirmed")
    assert archive.stored == [sr, sc, seg] + [sc] * (outbox.ATTEMPTS_BEFORE_PARKING - 1)
    assert "0x0110" in bench.outbox.items()[1].last_error


def test_without_a_report_it_is_asked_again_under_another_transaction(bench, node_port):
    archive = Archive(StorageCommitmentPushModel)
    archive.is_silent = True
    with archive.running() as port, bench.sending(port, "commitment"):
        wait_until(lambda: len(archive.requests) >= 2)
        assert bench.states() == ["unconfirmed"] * 3
        archive.reports_to = ("127.0.0.1", node_port)
        archive._report_there(archive.requests[-1], None)
        bench.wait_for("confirmed", "confirmed", "confirmed")
    assert len({request.TransactionUID for request in archive.requests}) == len(archive.requests)
    assert len(archive.stored) == 3, "what it took is not sent again because it is silent"


def test_a_report_of_nobody_changes_nothing(bench, node_port):
    archive = Archive(StorageCommitmentPushModel)
    archive.is_silent, archive.reports_to = True, ("127.0.0.1", node_port)
    with archive.running() as port, bench.sending(port, "commitment"):
        wait_until(lambda: archive.requests)
        forged = archive.requests[0]
        forged.TransactionUID = generate_uid()
        archive._report_there(forged, None)
        assert archive.answers == [0x0115]
        assert bench.states() == ["unconfirmed"] * 3


@pytest.mark.parametrize(("contexts", "promise"), [((), 0), ((StorageCommitmentPushModel,), 0x0110)])
def test_an_archive_that_does_not_commit_keeps_what_it_took_unconfirmed(bench, contexts, promise):
    archive = Archive(*contexts)
    archive.promise = promise
    with archive.running() as port, bench.sending(port, "commitment"):
        bench.wait_for("unconfirmed", "unconfirmed", "unconfirmed")
        wait_until(lambda: all("commit" in (item.last_error or "").lower() for item in bench.outbox.items()))
        time.sleep(0.5)
        assert bench.states() == ["unconfirmed"] * 3
    assert len(archive.stored) == 3
    with archive.running() as port, bench.sending(port, "no"):  # whoever configures that takes its word
        bench.wait_for("sent", "sent", "sent")
    assert len(archive.stored) == 3


def test_whose_word_is_taken_is_believed_when_the_disk_has_room_again(bench, monkeypatch):
    archive = Archive(StorageCommitmentPushModel)
    archive.is_silent = True
    with archive.running() as port:
        with bench.sending(port, "commitment"):
            bench.wait_for("unconfirmed", "unconfirmed", "unconfirmed")
        genuine, failures = bench.outbox.believe, iter([JournalError("the disk is full")] * 2)

        def believe(destination: str) -> None:
            for failure in failures:
                raise failure
            genuine(destination)

        monkeypatch.setattr(bench.outbox, "believe", believe)
        with bench.sending(port, "no"):
            bench.wait_for("sent", "sent", "sent")


def test_what_a_destination_that_is_gone_does_not_confirm_is_told_and_waits_for_it_or_for_a_person(bench):
    archive = Archive(StudyRootQueryRetrieveInformationModelFind)
    archive.find_status = 0xA700
    with archive.running() as port, bench.sending(port, "query") as running:
        bench.wait_for("unconfirmed", "unconfirmed", "unconfirmed")
        destinations = [courier.destination for courier in running._couriers]
        with structlog.testing.capture_logs() as logs:
            running.reload([])
        (told,) = (one for one in logs if one["event"] == "destination_not_configured")
        assert (told["destination"], told["results"]) == ("pacs", {"unconfirmed": 3})
        first, *_ = bench.outbox.items()
        assert bench.outbox.park(first.id, "it will never say so")
        assert not bench.outbox.park(first.id, "again")
        archive.find_status = 0x0000
        running.reload(destinations)
        bench.wait_for("parked", "confirmed", "confirmed")
        assert len(archive.stored) == 3
        assert bench.outbox.retry(first.id) == 1
        bench.wait_for("confirmed", "confirmed", "confirmed")
    assert len(archive.stored) == 4


def test_a_destination_that_can_be_asked_again_is_up(bench):
    """After a night without the archive the next result is tried soon where its first attempt fails."""
    archive = Archive(StorageCommitmentPushModel)
    archive.is_silent = True
    with archive.running() as port, bench.sending(port, "commitment"):
        bench.wait_for("unconfirmed", "unconfirmed", "unconfirmed")
    bench.outbox.hurry("pacs")
    with bench.sending(port, "commitment") as running:
        (courier,) = running._couriers
        wait_until(lambda: courier._fruitless > 3)
        with archive.running(port):
            wait_until(lambda: len(archive.requests) > 1 and courier._fruitless == 0)


def test_a_query_for_a_damaged_file_holds_up_no_other(bench, monkeypatch):
    archive = Archive(StudyRootQueryRetrieveInformationModelFind)
    genuine = confirmation.dcmread

    def read(path: Path, **how: object) -> Dataset:
        if path.name == "sr.dcm":
            raise struct.error
        return genuine(path, **how)

    monkeypatch.setattr(confirmation, "dcmread", read)
    with archive.running() as port, bench.sending(port, "query"):
        bench.wait_for("parked", "confirmed", "confirmed")


def test_what_was_said_of_an_object_before_it_was_sent_again_counts_no_more(bench, node_port):
    archive = Archive(StorageCommitmentPushModel)
    with archive.running() as port, bench.sending(port, "commitment"):
        bench.wait_for("confirmed", "confirmed", "confirmed")
        archive.is_silent, archive.reports_to = True, ("127.0.0.1", node_port)
        first = bench.outbox.items()[0]
        assert bench.outbox.retry(first.id) == 1
        bench.wait_for("unconfirmed", "confirmed", "confirmed")
        archive._report_there(archive.requests[0], None)
        assert bench.states()[0] == "unconfirmed"
        assert bench.outbox.items()[0].confirmed is None
        wait_until(lambda: len(archive.requests) > 1)
        archive._report_there(archive.requests[-1], None)
        bench.wait_for("confirmed", "confirmed", "confirmed")


def test_a_query_confirms(bench):
    archive = Archive(StudyRootQueryRetrieveInformationModelFind)
    with archive.running() as port, bench.sending(port, "query"):
        bench.wait_for("confirmed", "confirmed", "confirmed")
    assert {str(query.StudyInstanceUID) for query in archive.queries} == {"1.2"}
    assert len({str(query.SeriesInstanceUID) for query in archive.queries}) == 3


def test_what_a_query_never_finds_is_sent_again(bench):
    archive = Archive(StudyRootQueryRetrieveInformationModelFind)
    sr, _, _ = (item.sop_uid for item in bench.outbox.items())
    archive.loses = {sr}
    with archive.running() as port, bench.sending(port, "query"):
        wait_until(lambda: archive.stored.count(sr) >= 2)
        archive.loses = set()
        bench.wait_for("confirmed", "confirmed", "confirmed")
    assert len(archive.stored) == 4


def test_a_query_that_fails_proves_nothing(bench):
    archive = Archive(StudyRootQueryRetrieveInformationModelFind)
    archive.find_status = 0xA700
    with archive.running() as port, bench.sending(port, "query"):
        wait_until(lambda: len(archive.queries) > 3 * confirmation.MOST_QUERIES)
        assert bench.states() == ["unconfirmed"] * 3
        archive.find_status = 0
        bench.wait_for("confirmed", "confirmed", "confirmed")
    assert len(archive.stored) == 3


def test_an_archive_that_is_gone_when_it_is_to_be_asked(bench):
    archive = Archive(StorageCommitmentPushModel)
    archive.is_silent = True
    with archive.running() as port, bench.sending(port, "commitment"):
        bench.wait_for("unconfirmed", "unconfirmed", "unconfirmed")
    bench.outbox.ask([item.id for item in bench.outbox.items()], time.time())
    with bench.sending(port, "commitment"):
        wait_until(lambda: all("refused" in (item.last_error or "") for item in bench.outbox.items()))
        assert bench.states() == ["unconfirmed"] * 3
