"""Storage Commitment Push Model SCP (PS3.4 annex J): the scanner asks what is safe here, and is told.

A destination that was asked the same by us reports to the same SOP Class; that is for
`dicom_node.delivery.confirmation`.

A request is acknowledged once its report is in the journal. The report goes to the scanner's own port where the
configuration knows it, tried until it is taken; to others on the association on which they asked, which they may end
before: then they ask again, as the standard has it.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from threading import Event, Thread
from typing import TYPE_CHECKING

import structlog
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import build_context, build_role
from pynetdicom.dsutils import encode
from pynetdicom.sop_class import StorageCommitmentPushModel, StorageCommitmentPushModelInstance

from dicom_node.delivery import confirmation
from dicom_node.delivery.outbox import LONGEST_WAIT_S, Outbox, back_off_s
from dicom_node.network import dimse
from dicom_node.network.dimse import (
    INVALID_ATTRIBUTE_VALUE,
    NO_SUCH_ACTION,
    SUCCESS,
    UNRECOGNISED_OPERATION,
    Request,
)
from dicom_node.network.requestor import PeerError, associate
from dicom_node.network.services import Answer, Gathered, Ignored
from dicom_node.storage.journal import JournalError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dicom_node.configuration.sections import Scanner
    from dicom_node.intake.announced import Announced
    from dicom_node.network.dimse import Command
    from dicom_node.network.services import Message, Peer
    from dicom_node.network.tls import Identity
    from dicom_node.storage.journal import Journal
    from dicom_node.storage.spool import Spool

SOP_CLASS = StorageCommitmentPushModel
ALL_COMMITTED, FAILURES_EXIST = 1, 2  # event types, PS3.4 J.3.3
NO_SUCH_OBJECT, CLASS_CONFLICT = 0x0112, 0x0119  # failure reasons, PS3.3 C.14.1.1

LONGEST_SLEEP_S = 5.0

STATUSES = {
    SUCCESS: "the report that follows is in the journal",
    INVALID_ATTRIBUTE_VALUE: "TransactionUID or ReferencedSOPSequence has no value",
    NO_SUCH_ACTION: "the action type is not 1, Request Storage Commitment",
    UNRECOGNISED_OPERATION: "the service has no such operation",
}
FAILURES = {
    NO_SUCH_OBJECT: "the instance is not here, or its file can't be read",
    CLASS_CONFLICT: "the instance is here under another SOP Class",
}

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Report:
    """What is owed for a request.

    Attributes
    ----------
    held : SOP Class and Instance UID of what is safe here
    failed : of what is not, and the failure reason

    """

    transaction_uid: str
    calling_ae: str
    held: tuple[tuple[str, str], ...]
    failed: tuple[tuple[str, str, int], ...]
    tries: int = 0

    @property
    def event_type(self) -> int:
        return FAILURES_EXIST if self.failed else ALL_COMMITTED

    def data_set(self) -> Dataset:
        """Event information (PS3.4 table J.3-2)."""
        told = Dataset()
        told.TransactionUID = self.transaction_uid
        told.ReferencedSOPSequence = [_reference(*each) for each in self.held]
        if self.failed:
            told.FailedSOPSequence = [_reference(*each) for each in self.failed]
        return told


class Commitments:
    """The service, from `start` to `stop`.

    Parameters
    ----------
    journal : where reports wait
    spool : what is held
    announced : what a request lists is evidence
    scanners : whose ports are known
    ae_title : this node's
    told : called with the SeriesInstanceUIDs of which a request lists instances
    identity : for scanners that take TLS

    """

    def __init__(
        self,
        journal: Journal,
        spool: Spool,
        announced: Announced,
        scanners: tuple[Scanner, ...],
        ae_title: str,
        told: Callable[[tuple[str, ...]], None],
        identity: Identity | None = None,
    ) -> None:
        self._journal, self._outbox, self._spool, self._announced = journal, Outbox(journal), spool, announced
        self.reload(scanners)
        self._ae_title, self._told, self._identity = ae_title, told, identity
        self._news = Event()
        self._stopping = False
        self._thread = Thread(target=self._run, name="commitment", daemon=True)

    def reload(self, scanners: tuple[Scanner, ...]) -> None:
        """Know the ports of these from now on."""
        self._scanners = {scanner.ae_title: scanner for scanner in scanners}

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._news.set()
        if self._thread.is_alive():
            self._thread.join()

    # what scanners ask

    def serve(self, peer: Peer, command: Command, transfer_syntax: str) -> Message:
        if command.field == Request.N_EVENT_REPORT:
            return Gathered(peer, transfer_syntax, lambda report: confirmation.take(self._outbox, report, peer.name))
        if command.field != Request.N_ACTION:
            return Ignored(Answer(UNRECOGNISED_OPERATION))
        if command.number(dimse.ACTION_TYPE_ID) != confirmation.REQUEST_COMMITMENT:
            return Ignored(Answer(NO_SUCH_ACTION, "the only action is Request Storage Commitment, 1"))
        return Gathered(peer, transfer_syntax, lambda request: self._commit(peer, request, transfer_syntax))

    def answered(self, peer: Peer, command: Command) -> None:
        """Take the answer to a report that was sent on the peer's own association."""
        transaction_uid = peer.asked.pop(command.number(dimse.MESSAGE_ID_BEING_RESPONDED_TO), None)
        if transaction_uid and command.number(dimse.STATUS) == SUCCESS:
            with suppress(JournalError):  # it is told all the same, and the association goes on
                self._mark_told(transaction_uid, peer.ae_title)

    def _commit(self, peer: Peer, request: Dataset, transfer_syntax: str) -> Answer:
        transaction_uid = str(request.get("TransactionUID") or "")
        asked = [
            (str(each.get("ReferencedSOPClassUID") or ""), str(each.get("ReferencedSOPInstanceUID") or ""))
            for each in request.get("ReferencedSOPSequence") or ()
        ]
        if not transaction_uid or not asked:
            return Answer(INVALID_ATTRIBUTE_VALUE, "TransactionUID and ReferencedSOPSequence need values")
        held = self._spool.find({sop_uid for _, sop_uid in asked})
        failed = [
            (sop_class, sop_uid, CLASS_CONFLICT if sop_uid in held else NO_SUCH_OBJECT)
            for sop_class, sop_uid in asked
            if sop_uid not in held or held[sop_uid].sop_class_uid != sop_class
        ]
        lacking = {sop_uid for _, sop_uid, _ in failed}
        safe = tuple(each for each in asked if each[1] not in lacking)
        report = Report(transaction_uid, peer.ae_title, safe, tuple(failed))
        self._keep(report)
        log.info("commitment_asked", association=peer.name, held=len(safe), failed=len(failed))
        if not failed:
            series: dict[str, set[str]] = {}
            for instance in held.values():
                series.setdefault(instance.series_uid, set()).add(instance.sop_uid)
            self._announced.announce(series)
            self._told(tuple(series))
        if peer.ae_title in self._scanners:
            self._news.set()
            return Answer(SUCCESS)
        peer.asked[message_id := 1 + max(peer.asked, default=0)] = transaction_uid
        return Answer(SUCCESS, then=_event_report(report, message_id, transfer_syntax))

    # what scanners are told

    def _run(self) -> None:
        while not self._stopping:
            self._news.clear()
            try:
                for report in self._due():
                    self._tell(report)
            except JournalError as error:  # a full disk, a database that is away
                log.warning("commitment_reports_wait", reason=str(error))
            except Exception:  # a peer that breaks off: the reports of all scanners must not wait for ever
                log.exception("commitment_reports_wait")
            self._news.wait(LONGEST_SLEEP_S)

    def _tell(self, report: Report) -> None:
        """Bring a report to the scanner's port, in the role of the SCP that we are (PS3.4 J.3.3)."""
        context = build_context(StorageCommitmentPushModel, list(confirmation.SYNTAXES))
        role = build_role(StorageCommitmentPushModel, scp_role=True)
        try:
            association = associate(
                self._scanners[report.calling_ae], self._ae_title, [context], [role], identity=self._identity
            )
        except PeerError as error:
            self._postpone(report, str(error))
            return
        try:
            status, _ = association.send_n_event_report(
                report.data_set(), report.event_type, StorageCommitmentPushModel, StorageCommitmentPushModelInstance
            )
        except Exception as error:  # noqa: BLE001 (ValueError where it does not let us be the SCP; the next is not to wait for it)
            self._postpone(report, str(error))
            return
        finally:
            association.release()
        if status.get("Status") == SUCCESS:
            self._mark_told(report.transaction_uid, report.calling_ae)
        else:
            self._postpone(report, f"answered with {status.get('Status', 'nothing')}")

    # the journal

    def _keep(self, report: Report) -> None:
        content = json.dumps({"held": report.held, "failed": report.failed})
        now = time.time()
        with self._journal.transaction() as execute:
            execute(
                "INSERT INTO commitment (transaction_uid, calling_ae, report, created, next_try, node)"
                " VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (transaction_uid, calling_ae) DO UPDATE SET"
                " report = excluded.report, created = excluded.created, next_try = excluded.next_try,"
                " node = excluded.node, tries = 0, last_error = NULL, told = NULL",
                (report.transaction_uid, report.calling_ae, content, now, now, self._journal.node),
            )

    def _due(self) -> list[Report]:
        """Reports to be told now; one that is further away than any wait is: the clock has been set back since."""
        now = time.time()
        with self._journal.statements() as execute:
            rows = execute(
                "SELECT * FROM commitment WHERE told IS NULL AND NOT next_try BETWEEN ? AND ?"  # noqa: S608 (a constant)
                f" AND {self._journal.own} ORDER BY created",
                (now, now + LONGEST_WAIT_S),
            ).fetchall()
        return [
            Report(
                row["transaction_uid"],
                row["calling_ae"],
                *(tuple(tuple(each) for each in json.loads(row["report"])[kind]) for kind in ("held", "failed")),
                tries=row["tries"],
            )
            for row in rows
            if row["calling_ae"] in self._scanners
        ]

    def _postpone(self, report: Report, reason: str) -> None:
        retry_s = back_off_s(report.tries + 1)
        log.warning("commitment_not_told", scanner=report.calling_ae, reason=reason, retry_s=retry_s)
        with self._journal.transaction() as execute:
            execute(
                "UPDATE commitment SET tries = tries + 1, next_try = ?, last_error = ?"
                " WHERE transaction_uid = ? AND calling_ae = ?",
                (time.time() + retry_s, reason, report.transaction_uid, report.calling_ae),
            )

    def _mark_told(self, transaction_uid: str, calling_ae: str) -> None:
        log.info("commitment_told", scanner=calling_ae, transaction_uid=transaction_uid)
        with self._journal.transaction() as execute:
            execute(
                "UPDATE commitment SET told = ?, last_error = NULL WHERE transaction_uid = ? AND calling_ae = ?",
                (time.time(), transaction_uid, calling_ae),
            )


def _event_report(report: Report, message_id: int, transfer_syntax: str) -> tuple[bytes, bytes]:
    """Command set and data set of an N-EVENT-REPORT-RQ (PS3.7 section 10.3.1)."""
    command = dimse.encode(
        {
            dimse.AFFECTED_SOP_CLASS_UID: StorageCommitmentPushModel,
            dimse.COMMAND_FIELD: Request.N_EVENT_REPORT,
            dimse.MESSAGE_ID: message_id,
            dimse.COMMAND_DATA_SET_TYPE: 0,
            dimse.AFFECTED_SOP_INSTANCE_UID: StorageCommitmentPushModelInstance,
            dimse.EVENT_TYPE_ID: report.event_type,
        }
    )
    explicit = transfer_syntax == ExplicitVRLittleEndian
    return command, encode(report.data_set(), not explicit, True)


def _reference(sop_class_uid: str, sop_uid: str, failure_reason: int | None = None) -> Dataset:
    """An item of a Referenced or Failed SOP Sequence."""
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class_uid, sop_uid
    if failure_reason is not None:
        item.FailureReason = failure_reason
    return item
