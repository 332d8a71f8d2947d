"""Whether a destination keeps what it took: it is asked for its commitment (PS3.4 annex J), or queried (PS3.4 annex C).

A destination's report on a commitment comes on the association on which it was asked for, or on one of its own.
"""

from __future__ import annotations

import time
from threading import Event
from typing import TYPE_CHECKING, Any

import structlog
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid
from pynetdicom import build_context, evt
from pynetdicom.sop_class import (
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
    StudyRootQueryRetrieveInformationModelFind,
)

from dicom_node.delivery.outbox import LONGEST_CONFIRMATION_S, LONGEST_WAIT_S
from dicom_node.network.dimse import INVALID_ARGUMENT_VALUE, SUCCESS
from dicom_node.network.services import Answer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pynetdicom.association import Association
    from pynetdicom.presentation import PresentationContext

    from dicom_node.configuration.sections import Confirm
    from dicom_node.delivery.outbox import Outbox, OutboxItem

REQUEST_COMMITMENT = 1  # action type, PS3.4 J.3.2
MOST_REFERENCES = 500  # of one request
FIRST_REPORT_S = 60.0  # after a request without a report the next one is sent, then after twice as long
SAME_ASSOCIATION_S = 2.0  # so long a report may come on the association of its request; later ones bring their own
FIRST_QUERY_S = 5.0  # after a query that did not find it: archives index what they took a moment later
MOST_QUERIES = 6  # about five minutes; what is not found then is sent again

CONTEXTS = {"commitment": StorageCommitmentPushModel, "query": StudyRootQueryRetrieveInformationModelFind}
SYNTAXES = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)  # proposed, as for results

STATUSES = {
    SUCCESS: "the report is in the journal",
    INVALID_ARGUMENT_VALUE: "nothing was asked for under this TransactionUID",
}

log = structlog.get_logger(__name__)


class Confirmation:
    """How one destination is asked.

    Parameters
    ----------
    outbox : what it was asked, and what it said
    confirm : in which way
    busy : whether there is something better to do than to wait for a report

    """

    def __init__(self, outbox: Outbox, confirm: Confirm, busy: Callable[[], bool]) -> None:
        self._outbox, self._confirm, self._busy = outbox, confirm, busy
        self._told = Event()

    def contexts(self) -> list[PresentationContext]:
        """What has to be proposed to it."""
        return [build_context(CONTEXTS[self._confirm], list(SYNTAXES))] if self._confirm in CONTEXTS else []

    def handlers(self) -> list[tuple[Any, Any]]:
        """Who takes a report that comes on the association of its request."""
        return [(evt.EVT_N_EVENT_REPORT, self._take)]

    def ask(self, association: Association, items: Sequence[OutboxItem]) -> None:
        """Ask for items that it has taken.

        Parameters
        ----------
        association : with the contexts and the handlers
        items : unconfirmed

        """
        service = CONTEXTS[self._confirm]
        if not any(one.abstract_syntax == service for one in association.accepted_contexts):
            reason = f"it does not accept {service.name}"
            remedy = 'another `confirm` for it; "no" takes its word'
            log.warning("destination_confirms_nothing", destination=items[0].destination, reason=reason, remedy=remedy)
            self._outbox.postpone([item.id for item in items], time.time() + LONGEST_WAIT_S, reason)
        elif self._confirm == "query":
            _query(association, self._outbox, items)
        else:
            for start in range(0, len(items), MOST_REFERENCES):
                self._commit(association, items[start : start + MOST_REFERENCES])

    def _commit(self, association: Association, items: Sequence[OutboxItem]) -> None:
        request = Dataset()
        request.TransactionUID = generate_uid(prefix=None)
        request.ReferencedSOPSequence = []
        for item in items:
            reference = Dataset()
            reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = item.sop_class_uid, item.sop_uid
            request.ReferencedSOPSequence.append(reference)
        self._told.clear()
        # before it is sent: its report may be here before its answer
        wait_s = _wait_s(items[0], FIRST_REPORT_S)
        self._outbox.ask([item.id for item in items], time.time() + wait_s, request.TransactionUID)
        asked = log.bind(destination=items[0].destination, results=len(items), times=items[0].asked + 1)
        status, _ = association.send_n_action(
            request, REQUEST_COMMITMENT, StorageCommitmentPushModel, StorageCommitmentPushModelInstance
        )
        if status.get("Status") != SUCCESS:
            reason = _hex(status.get("Status"))
            asked.warning("commitment_not_promised", reason=reason, retry_s=wait_s)
            reason = f"it does not promise to commit itself: {reason}"
            self._outbox.postpone([item.id for item in items], time.time() + wait_s, reason)
            return
        (asked.warning if items[0].asked else asked.info)("commitment_asked", retry_s=wait_s)
        deadline = time.monotonic() + SAME_ASSOCIATION_S
        while association.is_established and time.monotonic() < deadline and not self._busy():
            if self._told.wait(0.05):
                return

    def _take(self, event: evt.Event) -> tuple[int, None]:
        answer = take(self._outbox, event.event_information, event.assoc.acceptor.ae_title)
        self._told.set()
        return answer.status, None


def take(outbox: Outbox, report: Dataset, peer: str) -> Answer:
    """Act on a report of storage commitment (PS3.4 J.3.3).

    Who sends it is not asked: its TransactionUID is known to whom we have asked, and to nobody else.
    """
    transaction_uid = str(report.get("TransactionUID") or "")
    items = outbox.asked_in(transaction_uid) if transaction_uid else []
    if not items:
        log.warning("commitment_report_unknown", peer=peer, transaction_uid=transaction_uid)
        return Answer(INVALID_ARGUMENT_VALUE, "no such transaction")
    held = {str(each.get("ReferencedSOPInstanceUID")) for each in report.get("ReferencedSOPSequence") or ()}
    failed = {
        str(each.get("ReferencedSOPInstanceUID")): each.get("FailureReason")
        for each in report.get("FailedSOPSequence") or ()
    }
    for item in items:
        if item.state != "unconfirmed":
            continue
        if item.sop_uid in failed:
            outbox.refused(item, f"the destination does not keep it: failure reason {_hex(failed[item.sop_uid])}")
        elif item.sop_uid in held:
            outbox.confirm(item)
    return Answer(SUCCESS)


def _query(association: Association, outbox: Outbox, items: Sequence[OutboxItem]) -> None:
    """One query for each series of results."""
    series: dict[tuple[str, str], list[OutboxItem]] = {}
    for item in items:
        try:
            series.setdefault(_place(item), []).append(item)
        except Exception as error:  # noqa: BLE001 (a damaged file makes pydicom raise anything; it must hold up no other)
            outbox.refused(item, f"{item.path}: {error}")
    for place, members in series.items():
        status, found = _found(association, place, members)
        lacking = [item for item in members if item.sop_uid not in found]
        for item in members:
            if item not in lacking:
                outbox.confirm(item)
            elif status == SUCCESS and item.asked + 1 >= MOST_QUERIES:
                outbox.refused(item, f"the destination took it, and has not had it in {MOST_QUERIES} queries")
            elif status == SUCCESS:
                outbox.ask([item.id], time.time() + _wait_s(item, FIRST_QUERY_S))
        if status != SUCCESS:
            log.warning("query_failed", destination=members[0].destination, status=_hex(status))
            reason = f"the query was answered with {_hex(status)}"
            outbox.postpone([item.id for item in lacking], time.time() + LONGEST_WAIT_S, reason)


def _found(
    association: Association, place: tuple[str, str], items: Sequence[OutboxItem]
) -> tuple[int | None, set[str]]:
    """The status that ended a query, and the SOP Instance UIDs that it brought."""
    identifier = Dataset()
    identifier.QueryRetrieveLevel = "IMAGE"
    identifier.StudyInstanceUID, identifier.SeriesInstanceUID = place
    identifier.SOPInstanceUID = [item.sop_uid for item in items]
    last, found = None, set()
    for status, match in association.send_c_find(identifier, StudyRootQueryRetrieveInformationModelFind):
        last = status.get("Status")
        if match is not None:
            found.add(str(match.get("SOPInstanceUID")))
    return last, found


def _place(item: OutboxItem) -> tuple[str, str]:
    """Study and series that the object itself names: its series is not the one that was analysed."""
    header = dcmread(item.path, specific_tags=["StudyInstanceUID", "SeriesInstanceUID"], stop_before_pixels=True)
    return str(header.StudyInstanceUID), str(header.SeriesInstanceUID)


def _wait_s(item: OutboxItem, first_s: float) -> float:
    return min(first_s * 2 ** min(item.asked, 16), LONGEST_CONFIRMATION_S)


def _hex(status: int | None) -> str:
    return "no answer" if status is None else f"0x{status:04X}"
