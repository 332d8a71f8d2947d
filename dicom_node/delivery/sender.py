"""Storage SCU: brings what the journal owes to its destinations (DICOM PS3.4 annex B, PS3.7 section 9.1.1).

One thread for each destination, so that a dead one delays no other. One association carries all that a destination is
owed; where results are expected, it is open before they are. Delivery is at least once: a crash between the peer's
success and the journal's means the same object, under the same SOP Instance UID, once more.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from threading import Event, Thread
from typing import TYPE_CHECKING, get_args

import structlog
from pynetdicom import build_context

from dicom_node.configuration.sections import Level
from dicom_node.delivery.confirmation import SYNTAXES, Confirmation
from dicom_node.delivery.outbox import back_off_s
from dicom_node.delivery.storing import FINAL_STATUSES, SOP_CLASSES, contexts_for, meaning
from dicom_node.monitoring.trail import Trail
from dicom_node.network.requestor import ContextError, PeerError, associate
from dicom_node.network.wire import store_file
from dicom_node.storage.journal import JournalError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pynetdicom.association import Association
    from pynetdicom.presentation import PresentationContext

    from dicom_node.configuration.sections import Destination
    from dicom_node.delivery.outbox import Outbox, OutboxItem
    from dicom_node.network.tls import Identity

AHEAD_S = 5.0  # an association stays open for results that are being made
# `outbox retry` is another process and can't wake this one
LONGEST_SLEEP_S = 5.0

log = structlog.get_logger(__name__)


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

    def expect(self) -> None:
        """Results are being made: be connected to who gets them, whatever they say, by the time they are owed."""
        for courier in self._couriers:
            wanted = courier.destination
            if set(wanted.levels) == set(get_args(Level)) and not {"sr", "sc"}.isdisjoint(wanted.results):
                courier.expect()

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


@dataclass(frozen=True, slots=True)
class _Ahead:
    """An association that is open before anything is owed, and until when (clock)."""

    association: Association
    confirmation: Confirmation
    until: float


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
        self._ahead: _Ahead | None = None
        self._is_expecting = self._is_owing = False

    def expect(self) -> None:
        self._is_expecting = True
        self._news.set()

    def wake(self) -> None:
        self._is_owing = True
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
            self._is_owing = False
            try:
                if self.destination.confirm == "no":
                    self._outbox.believe(self.destination.name)  # what was taken when it was asked still
                items = self._outbox.claim(self.destination.name, time.time())
                unconfirmed = self._outbox.unconfirmed(self.destination.name, time.time())
                if items or unconfirmed:
                    self._deliver(items, unconfirmed)
                due = self._outbox.next_due(self.destination.name)
                sleep_s = min(self._be_ahead(), LONGEST_SLEEP_S if due is None else max(due - time.time(), 0.0))
            except JournalError as error:  # a full disk, a database that is away
                self._let_go()
                self._fruitless += 1
                sleep_s = back_off_s(self._fruitless)
                self._log.warning("delivery_waits_for_journal", reason=str(error), retry_s=sleep_s)
            except Exception:  # noqa: BLE001 (a bug in one batch must not end all delivery)
                self._let_go()
                self._fruitless += 1
                sleep_s = back_off_s(self._fruitless)
                self._log.exception("delivery_failed", retry_s=sleep_s)
            self._news.wait(sleep_s)
        self._let_go()

    def _be_ahead(self) -> float:
        """Connect for results that are expected, let go of a connection for which none came; how long to sleep then."""
        ahead = self._ahead
        if ahead and (ahead.until <= time.monotonic() or not ahead.association.is_established):
            self._let_go()
        if self._is_expecting and not self._ahead:
            self._is_expecting = False
            if not self._fruitless and not self._stopping:
                classes = {each for role in self.destination.results for each in SOP_CLASSES[role]}
                contexts = [build_context(each, syntax) for each in sorted(classes) for syntax in SYNTAXES]
                with suppress(PeerError):  # delivery says why, if it is so then
                    self._ahead = _Ahead(*self._connect(contexts, AHEAD_S), time.monotonic() + AHEAD_S)
        return max(self._ahead.until - time.monotonic(), 0.0) if self._ahead else LONGEST_SLEEP_S

    def _is_called(self) -> bool:
        return self._is_owing or self._stopping

    def _let_go(self) -> None:
        if self._ahead:
            self._ahead.association.release()
            self._ahead = None

    def _connect(
        self, contexts: Iterable[PresentationContext], patience_s: float | None = None
    ) -> tuple[Association, Confirmation]:
        confirmation = Confirmation(self._outbox, self.destination.confirm, self._is_called)
        association = associate(
            self.destination,
            self._ae_title,
            [*contexts, *confirmation.contexts()],
            identity=self._identity,
            handlers=confirmation.handlers(),
            patience_s=patience_s,
        )
        return association, confirmation

    def _deliver(self, items: list[OutboxItem], unconfirmed: list[OutboxItem]) -> None:
        """Send a batch over one association, and ask there for what has been taken.

        No item stays in ``sending``, unless the journal fails: then it is claimed again.
        """
        ahead = self._take_ahead(items)
        if items and not ahead:  # what was expected is here
            self._is_expecting = False
        sendable, contexts = (items, []) if ahead else self._look_at_files(items)
        if not sendable and not unconfirmed:
            return
        try:
            association, confirmation = (ahead.association, ahead.confirmation) if ahead else self._connect(contexts)
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

    def _take_ahead(self, items: Sequence[OutboxItem]) -> _Ahead | None:
        """What is open already, if it is for such as these; what was offered before is looked at first."""
        ahead = self._ahead
        if not items or ahead is None or not ahead.association.is_established:
            return None
        proposed = {context.abstract_syntax for context in ahead.association.requestor.requested_contexts}
        if any(item.tries > 1 or item.sop_class_uid not in proposed for item in items):
            return None
        self._ahead = None
        return ahead

    def _send(self, association: Association, unsent: list[OutboxItem]) -> None:
        """Send as many as the association lasts for; they leave the list."""
        taken: list[OutboxItem] = []
        others: list[OutboxItem] = []
        self._trail.sending(self.destination, unsent)
        try:
            while unsent and association.is_established and not self._stopping:
                status = self._store(association, unsent[0])
                (others if status is None else taken).append(item := unsent.pop(0))
                if status is not None:
                    self._sent(item, status)
        finally:
            self._trail.sent(self.destination, taken)
            self._trail.sent(self.destination, [*others, *unsent], failure="not taken")

    def _look_at_files(self, items: list[OutboxItem]) -> tuple[list[OutboxItem], list[PresentationContext]]:
        """The items that can be sent, and what has to be proposed for them."""
        sendable = []
        contexts: dict[tuple[str, str], PresentationContext] = {}
        for item in items:
            try:
                contexts |= contexts_for(item)
            except Exception as error:  # noqa: BLE001 (a damaged file makes pydicom raise anything; it must hold up no other)
                self._outbox.refused(item, f"{item.path}: {error}")
            else:
                sendable.append(item)
        return sendable, list(contexts.values())

    def _store(self, association: Association, item: OutboxItem) -> int | None:
        """Send one object; the status where the peer has it now."""
        try:
            status = store_file(association, item.path, item.sop_class_uid, item.sop_uid)
        except Exception as error:  # noqa: BLE001 (as above; ValueError where the peer does not accept the context)
            if association.is_established:
                self._outbox.refused(item, f"{item.path}: {error}")
                return None
            status = None  # the peer ended the association a moment ago
        if status is None:
            patience = f"no answer within {association.dimse_timeout:g} s"
            self._outbox.failed(item, f"{patience}, or the peer ended the association")
            return None
        category, answer = meaning(status)
        if category in ("Success", "Warning"):
            return status
        if status in FINAL_STATUSES:
            self._outbox.refused(item, answer)
        else:
            self._outbox.failed(item, answer)
        return None

    def _sent(self, item: OutboxItem, status: int) -> None:
        self._outbox.mark_sent(item.id, confirm=self.destination.confirm != "no")
        self._fruitless = 0
        category, answer = meaning(status)
        tell = self._log.info if category == "Success" else self._log.warning
        tell("result_sent", role=item.role, sop_uid=item.sop_uid, series_uid=item.series_uid, status=answer)
        if self._on_sent:
            self._on_sent(item)

    def _postpone(self, items: list[OutboxItem], reason: str) -> None:
        if not items:
            return
        self._fruitless += 1
        wait_s = 0.0 if self._stopping else back_off_s(self._fruitless)
        self._log.warning("destination_waits", results=len(items), reason=reason, retry_s=wait_s)
        self._outbox.postpone([item.id for item in items], time.time() + wait_s, reason)
