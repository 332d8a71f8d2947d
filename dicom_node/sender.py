"""Storage SCU: brings what the journal owes to its destinations (DICOM PS3.4 annex B, PS3.7 section 9.1.1).

One thread for each destination, so that a dead one delays no other. One association carries all that a destination is
owed. Delivery is at least once: a crash between the peer's success and the journal's means the same object, under the
same SOP Instance UID, once more.
"""

from __future__ import annotations

import socket
import ssl
import time
from contextlib import suppress
from threading import Event, Thread
from typing import TYPE_CHECKING, ClassVar

import structlog
from pydicom.filereader import read_file_meta_info
from pydicom.uid import ImplicitVRLittleEndian
from pynetdicom import AE, build_context, evt
from pynetdicom.pdu import A_ABORT_RQ, A_ASSOCIATE_RJ
from pynetdicom.status import STORAGE_SERVICE_CLASS_STATUS, code_to_category

from dicom_node.confirmation import Confirmation
from dicom_node.journal import JournalError
from dicom_node.outbox import back_off_s
from dicom_node.silence import explain
from dicom_node.trail import Trail
from dicom_node.wire import Answers, PromptSocket, store_file
from runtime.errors import ScansideError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pynetdicom.association import Association
    from pynetdicom.events import EventHandlerType
    from pynetdicom.pdu_primitives import SCP_SCU_RoleSelectionNegotiation
    from pynetdicom.presentation import PresentationContext

    from dicom_node.outbox import Outbox, OutboxItem
    from dicom_node.sections import Destination, Scanner
    from dicom_node.tls import Identity

CONNECT_TIMEOUT_S = 5.0
ACSE_TIMEOUT_S = 30.0
DIMSE_TIMEOUT_S = 30.0
# `outbox retry` is another process and can't wake this one
LONGEST_SLEEP_S = 5.0

# Refusals that trying again will not change (PS3.7 annex C, PS3.4 table B.2-1): invalid SOP instance, SOP class not
# supported, not authorised, data set does not match SOP class. Not Cxxx: archives say that of a broken database, too.
FINAL_STATUSES = frozenset({0x0117, 0x0122, 0x0124, *range(0xA900, 0xAA00)})

log = structlog.get_logger(__name__)


class PeerError(ScansideError):
    """A peer that can't be reached or accepts no association."""

    exit_code: ClassVar[int] = 3


class ContextError(PeerError):
    """A peer that takes none of the proposed SOP classes."""


class Sender:
    """Sends what the journal owes, from `start` to `stop`.

    Parameters
    ----------
    outbox : what is owed
    destinations : who gets results
    ae_title : this node's
    on_sent : told of each delivered item, in the destination's thread
    identity : for destinations that take TLS
    trail : what is audited

    """

    def __init__(
        self,
        outbox: Outbox,
        destinations: Sequence[Destination],
        ae_title: str,
        on_sent: Callable[[OutboxItem], None] | None = None,
        identity: Identity | None = None,
        trail: Trail | None = None,
    ) -> None:
        self._outbox = outbox
        self._way = ae_title, on_sent, identity, trail or Trail()
        self._couriers = [_Courier(outbox, each, *self._way) for each in destinations]
        self._leaving: list[_Courier] = []  # of destinations that are gone: they end after the object on the wire

    def start(self) -> None:
        self._outbox.tell_stranded({courier.destination.name for courier in self._couriers})
        for courier in self._couriers:
            courier.start()

    def wake(self) -> None:
        """Look at the journal now: something has been recorded or retried."""
        for courier in self._couriers:
            courier.wake()

    def reload(self, destinations: Sequence[Destination]) -> None:
        """Serve these from now on; what one that is gone is owed, or has to be asked for, stays until it is back."""
        before = {courier.destination.name: courier for courier in (*self._leaving, *self._couriers)}
        couriers = []
        for destination in destinations:
            old = before.get(destination.name)
            if old in self._couriers and old.destination == destination:
                couriers.append(before.pop(destination.name))
                continue
            if old:
                with suppress(JournalError):  # or else later
                    self._outbox.hurry(destination.name)
            couriers.append(_Courier(self._outbox, destination, *self._way, after=old))
            couriers[-1].start()
        for courier in before.values():
            courier.stop()
        self._couriers, self._leaving = couriers, [courier for courier in before.values() if courier.is_alive()]
        with suppress(JournalError):  # or else at the next start
            self._outbox.tell_stranded({destination.name for destination in destinations})

    def busy(self, within_s: float) -> list[str]:
        """Destinations for which something is due by then."""
        return [each.destination.name for each in self._couriers if each.is_busy(within_s)]

    def fault(self) -> str:
        """Whom nobody delivers to any more: empty where it is well."""
        dead = [each.destination.name for each in self._couriers if not each.is_alive()]
        return f"delivers no more to {', '.join(dead)}" if dead else ""

    def stop(self) -> None:
        """Finish the object on the wire, leave the rest for the next start, and wait for the threads.

        A peer that hangs at this moment is waited for until its timeout.
        """
        for courier in self._couriers:
            courier.stop()
        for courier in (*self._couriers, *self._leaving):
            if courier.is_alive():  # a node that could not start stops what it never started
                courier.join()


class _Courier(Thread):
    """The way to one destination."""

    def __init__(
        self,
        outbox: Outbox,
        destination: Destination,
        ae_title: str,
        on_sent: Callable[[OutboxItem], None] | None,
        identity: Identity | None,
        trail: Trail,
        after: _Courier | None = None,
    ) -> None:
        super().__init__(name=f"sender-{destination.name}", daemon=True)
        self._after = after  # who served it before: a destination has one sender
        self.destination = destination
        self._outbox = outbox
        self._ae_title = ae_title
        self._on_sent, self._identity, self._trail = on_sent, identity, trail
        self._log = log.bind(destination=destination.name)
        self._news = Event()
        self._stopping = False
        self._fruitless = 0  # turns in a row in which nothing arrived; the back-off of the destination

    def wake(self) -> None:
        self._news.set()

    def stop(self) -> None:
        self._stopping = True
        self._news.set()

    def is_busy(self, within_s: float) -> bool:
        try:
            due = self._outbox.next_due(self.destination.name)
        except JournalError:  # a disk that fails is not waited for
            return False
        return due is not None and due <= time.time() + within_s

    def run(self) -> None:
        if self._after:
            self._after.join()
            self._after = None
        while not self._stopping:
            self._news.clear()  # before the journal is read: what is recorded from here on cuts the sleep short
            try:
                if self.destination.confirm == "no":
                    self._outbox.believe(self.destination.name)  # what was taken when it was asked still
                items = self._outbox.claim(self.destination.name, time.time())
                unconfirmed = self._outbox.unconfirmed(self.destination.name, time.time())
                if items or unconfirmed:
                    self._deliver(items, unconfirmed)
                due = self._outbox.next_due(self.destination.name)
                sleep_s = LONGEST_SLEEP_S if due is None else min(max(due - time.time(), 0.0), LONGEST_SLEEP_S)
            except JournalError as error:  # a full disk, a database that is away
                self._fruitless += 1
                sleep_s = back_off_s(self._fruitless)
                self._log.warning("delivery_waits_for_journal", reason=str(error), retry_s=sleep_s)
            except Exception:  # noqa: BLE001 (a bug in one batch must not end all delivery)
                self._fruitless += 1
                sleep_s = back_off_s(self._fruitless)
                self._log.exception("delivery_failed", retry_s=sleep_s)
            self._news.wait(sleep_s)

    def _deliver(self, items: list[OutboxItem], unconfirmed: list[OutboxItem]) -> None:
        """Send a batch over one association, and ask there for what has been taken; no item stays in ``sending``."""
        sendable, contexts = self._look_at_files(items)
        if not sendable and not unconfirmed:
            return
        confirmation = Confirmation(self._outbox, self.destination.confirm, self._news.is_set)
        try:
            association = associate(
                self.destination,
                self._ae_title,
                [*contexts, *confirmation.contexts()],
                identity=self._identity,
                handlers=confirmation.handlers(),
            )
        except ContextError as error:
            for item in sendable:
                self._outbox.refused(item, str(error))
            self._postpone(unconfirmed, str(error))
            return
        except PeerError as error:
            self._postpone([*sendable, *unconfirmed], str(error))
            return
        unsent = list(sendable)
        try:
            self._send(association, unsent)
            taken = self._outbox.unconfirmed(self.destination.name, time.time())
            if taken and association.is_established and not self._stopping:
                confirmation.ask(association, taken)
                self._fruitless = 0  # it is there: what fails next is tried again soon
            association.release()
        finally:
            if association.is_established:  # something above raised
                association.abort()
        self._postpone(unsent, "the node stopped" if self._stopping else "the association ended before its turn")

    def _send(self, association: Association, unsent: list[OutboxItem]) -> None:
        """Send as many as the association lasts for; they leave the list."""
        taken: list[OutboxItem] = []
        others: list[OutboxItem] = []
        self._trail.sending(self.destination, unsent)
        try:
            while unsent and association.is_established and not self._stopping:
                item = unsent.pop(0)
                (taken if self._store(association, item) else others).append(item)
        finally:
            self._trail.sent(self.destination, taken)
            self._trail.sent(self.destination, [*others, *unsent], failure="not taken")

    def _look_at_files(self, items: list[OutboxItem]) -> tuple[list[OutboxItem], list[PresentationContext]]:
        """The items that can be sent, and what has to be proposed for them."""
        sendable = []
        contexts: dict[tuple[str, str], PresentationContext] = {}
        for item in items:
            try:
                contexts |= _contexts(item)
            except Exception as error:  # noqa: BLE001 (a damaged file makes pydicom raise anything; it must hold up no other)
                self._outbox.refused(item, f"{item.path}: {error}")
            else:
                sendable.append(item)
        return sendable, list(contexts.values())

    def _store(self, association: Association, item: OutboxItem) -> bool:
        """Send one object; True where the peer has it now."""
        try:
            status = store_file(association, item.path)
        except Exception as error:  # noqa: BLE001 (as above; ValueError where the peer does not accept the context)
            if association.is_established:
                self._outbox.refused(item, f"{item.path}: {error}")
                return False
            status = None  # the peer ended the association a moment ago
        if status is None:
            self._outbox.failed(item, f"no answer within {DIMSE_TIMEOUT_S:g} s, or the peer ended the association")
            return False

        category, meaning = STORAGE_SERVICE_CLASS_STATUS.get(status, (code_to_category(status), ""))
        answer = f"0x{status:04X} {category} {meaning}".rstrip()
        if category in ("Success", "Warning"):
            self._outbox.mark_sent(item.id, confirm=self.destination.confirm != "no")
            self._fruitless = 0
            tell = self._log.info if category == "Success" else self._log.warning
            tell("result_sent", role=item.role, sop_uid=item.sop_uid, series_uid=item.series_uid, status=answer)
            if self._on_sent:
                self._on_sent(item)
            return True
        if status in FINAL_STATUSES:
            self._outbox.refused(item, answer)
        else:
            self._outbox.failed(item, answer)
        return False

    def _postpone(self, items: list[OutboxItem], reason: str) -> None:
        if not items:
            return
        self._fruitless += 1
        wait_s = 0.0 if self._stopping else back_off_s(self._fruitless)
        self._log.warning("destination_waits", results=len(items), reason=reason, retry_s=wait_s)
        self._outbox.postpone([item.id for item in items], time.time() + wait_s, reason)


def associate(
    destination: Destination | Scanner,
    ae_title: str,
    contexts: list[PresentationContext],
    roles: Sequence[SCP_SCU_RoleSelectionNegotiation] = (),
    *,
    identity: Identity | None = None,
    handlers: Sequence[EventHandlerType] = (),
) -> Association:
    """Open an association, or say why there is none.

    Parameters
    ----------
    destination : the peer
    ae_title : ours
    contexts, roles : what is proposed
    identity : for peers that take TLS
    handlers : of what the peer may ask on it

    Raises
    ------
    ContextError : the peer accepts none of the contexts
    PeerError : no such host, no connection, no answer, or a rejection, with its reason

    """
    ae = AE(ae_title)
    ae.connection_timeout, ae.acse_timeout, ae.dimse_timeout = CONNECT_TIMEOUT_S, ACSE_TIMEOUT_S, DIMSE_TIMEOUT_S
    peer = f"{destination.name} ({destination.ae_title} at {destination.host}:{destination.port})"
    ends: list[A_ASSOCIATE_RJ | A_ABORT_RQ] = []
    began = time.monotonic()
    try:
        association = ae.associate(
            destination.host,
            destination.port,
            contexts=contexts,
            ae_title=destination.ae_title,
            ext_neg=list(roles),
            tls_args=(identity.requestor(), destination.host) if identity and destination.tls else None,
            evt_handlers=[(evt.EVT_CONN_OPEN, _make_prompt), (evt.EVT_PDU_RECV, _note_end, [ends]), *handlers],
        )
    except OSError as error:  # the name service
        raise PeerError(f"{peer}: {error.strerror or error}") from error
    if association.is_established:
        association.dimse.msg_queue = Answers()
        return association
    # not `is_rejected`: a rejection that is here before pynetdicom has looked whether it is connected goes by unseen
    if ends and isinstance(ends[0], A_ASSOCIATE_RJ):
        answer = ends[0].to_primitive()
        raise PeerError(f"{peer} rejected the association of {ae_title} ({answer.result_str}): {answer.reason_str}")
    if association.rejected_contexts:
        refused = ", ".join(sorted({context.abstract_syntax.name for context in association.rejected_contexts}))
        raise ContextError(f"{peer} accepts none of: {refused}")
    if ends:
        raise PeerError(f"{peer} aborted the association of {ae_title} before it was open")
    is_cut = time.monotonic() - began < ACSE_TIMEOUT_S
    raise PeerError(f"{peer}: {explain(destination, identity, timeout_s=CONNECT_TIMEOUT_S, is_cut=is_cut)}")


def _contexts(item: OutboxItem) -> dict[tuple[str, str], PresentationContext]:
    """The file's own transfer syntax, and for native pixels the default one, which every SCP has (PS3.5 section 10.1).

    Raises
    ------
    ValueError : the file holds another object than the one that is owed; besides, all that pydicom raises

    """
    meta = read_file_meta_info(item.path)
    sop_class, sop_uid = meta.get("MediaStorageSOPClassUID"), meta.get("MediaStorageSOPInstanceUID")
    syntax = meta.get("TransferSyntaxUID")
    if (sop_class, sop_uid) != (item.sop_class_uid, item.sop_uid) or syntax is None:
        raise ValueError(f"holds {sop_class} {sop_uid} in {syntax}, not {item.sop_class_uid} {item.sop_uid}")
    syntaxes = [syntax] if syntax.is_compressed else [syntax, ImplicitVRLittleEndian]
    return {(sop_class, each): build_context(sop_class, each) for each in syntaxes}


def _note_end(event: evt.Event, ends: list[A_ASSOCIATE_RJ | A_ABORT_RQ]) -> None:
    if isinstance(event.pdu, A_ASSOCIATE_RJ | A_ABORT_RQ):
        ends.append(event.pdu)


def _make_prompt(event: evt.Event) -> None:
    """Set up a connection that has just been opened."""
    transport = event.assoc.dul.socket
    if not isinstance(transport.socket, ssl.SSLSocket):  # which its context has made prompt already
        transport.socket = PromptSocket(fileno=transport.socket.detach())
    transport.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # pynetdicom has none for an established connection: a peer that stops reading would hold the thread for ever
    transport.socket.settimeout(DIMSE_TIMEOUT_S)
