"""The audit trail: what of the node is audited, written where the configuration says, at nobody's expense.

A message is put together and written on a thread of its own, so that neither a slow disk nor a dead syslog server holds
up a scanner or an archive. What does not get where it belongs is counted.
"""

from __future__ import annotations

import os
import queue
import socket
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING

import structlog
from pydicom import dcmread

from dicom_node.configuration.sections import Audit
from dicom_node.monitoring import audit
from dicom_node.monitoring.metrics import Metrics
from dicom_node.monitoring.syslog import Server, frame
from dicom_node.storage.spool import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence
    from pathlib import Path
    from xml.etree.ElementTree import Element

    from dicom_node.configuration.sections import Destination
    from dicom_node.delivery.outbox import OutboxItem
    from dicom_node.network.services import Peer
    from dicom_node.network.tls import Identity
    from dicom_node.storage.spool import Instance

MOST_WAITING = 1000  # events that are not written yet
STOP_S = 5.0  # a disk that hangs is waited for no longer

SECURITY = {"node.allowed_calling_aes", "node.allowed_addresses"}  # keys whose change is more than configuration

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Transfer:
    """Instances of one study, and a file of one of them, to be asked whose it is."""

    path: Path
    classes: Counter[str] = field(default_factory=Counter)


class Trail:
    """Takes events from any thread, from `start` to `stop`; without a file and a server it does nothing.

    Parameters
    ----------
    settings : where messages go
    ae_title : this node's
    identity : for a server that takes TLS
    metrics : what is counted

    """

    def __init__(
        self,
        settings: Audit | None = None,
        ae_title: str = "",
        identity: Identity | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        settings = settings or Audit()
        self._file, self._metrics = settings.file, metrics or Metrics()
        self._is_on = bool(settings.file or settings.host)
        host = socket.gethostname()
        self._source = f"{ae_title}@{host}"
        self._self = partial(audit.Participant, str(os.getpid()), ae_title, host=host)
        self._server = (
            Server(settings, identity, partial(self._metrics.audit_lost, "server")) if settings.host else None
        )
        self._transfers: dict[str, dict[tuple[str, Outcome], _Transfer]] = {}  # by association
        self._events: queue.Queue[tuple[datetime, Callable[..., str]] | None] = queue.Queue(MOST_WAITING)
        self._is_losing = False
        self._thread = Thread(target=self._run, name="audit", daemon=True)

    def start(self) -> None:
        if self._is_on:
            self._thread.start()
            if self._server:
                self._server.start()
            self._put(self._activity, audit.APPLICATION_START)

    def stop(self) -> None:
        """Write what is left."""
        if not self._thread.is_alive():
            return
        self._put(self._activity, audit.APPLICATION_STOP)
        with suppress(queue.Full):
            self._events.put(None, timeout=STOP_S)
        self._thread.join(STOP_S)
        if self._server:
            self._server.stop()

    # what is audited

    def kept(self, peer: Peer, outcome: Outcome, instance: Instance) -> None:
        """Take note of what a peer sent; it is told of when its association ends."""
        if self._is_on:
            transfers = self._transfers.setdefault(peer.name, {})
            transfer = transfers.setdefault((instance.study_uid, outcome), _Transfer(instance.path))
            transfer.classes[instance.sop_class_uid] += 1

    def ended(self, peer: Peer) -> None:
        """Take note of an association's end."""
        for (study_uid, outcome), transfer in self._transfers.pop(peer.name, {}).items():
            self._put(self._received, peer, study_uid, outcome, transfer)

    def refused(self, address: str, calling_ae: str, reason: str) -> None:
        """Take note of who was not let in."""
        self._put(self._refused, address, calling_ae, reason)

    def reconfigured(self, keys: Sequence[str]) -> None:
        """Take note of a configuration that was changed while the node ran."""
        self._put(self._reconfigured, keys)

    def sending(self, destination: Destination, items: Iterable[OutboxItem]) -> None:
        """Take note that results set out for a destination."""
        for study_uid, transfer in _by_study(items).items():
            self._put(self._sent, audit.BEGIN_TRANSFERRING, "E", destination, study_uid, transfer, "")

    def sent(self, destination: Destination, items: Iterable[OutboxItem], failure: str = "") -> None:
        """Take note of results that a destination has, or, with a reason, has not."""
        for study_uid, transfer in _by_study(items).items():
            self._put(self._sent, audit.INSTANCES_TRANSFERRED, "R", destination, study_uid, transfer, failure)

    def patient_of(self, path: Path) -> str:
        """PatientID as a file has it; empty where it has none, or is gone: it is never invented. For `removed`."""
        return _patient_id(path) if self._is_on else ""

    def removed(self, study_uid: str, patient_id: str) -> None:
        """Take note of a study that is not kept any longer."""
        self._put(self._removed, study_uid, patient_id)

    # how it is told

    def _activity(self, when: datetime, kind: audit.Code) -> str:
        """Section A.5.3.1."""
        return self._compose(when, audit.APPLICATION_ACTIVITY, kind, participants=[self._self(role=audit.APPLICATION)])

    def _received(self, when: datetime, peer: Peer, study_uid: str, outcome: Outcome, transfer: _Transfer) -> str:
        """Section A.5.3.7: created, or (read) here before."""
        source = audit.Participant(peer.name, peer.ae_title, peer.address, audit.SOURCE, is_requestor=True)
        return self._compose(
            when,
            audit.INSTANCES_TRANSFERRED,
            action="R" if outcome is Outcome.REPEATED else "C",
            participants=[source, self._self(role=audit.DESTINATION)],
            objects=_whose(study_uid, transfer),
            failure="quarantined: the UIDs are taken by other contents" if outcome is Outcome.CONFLICT else "",
        )

    def _sent(
        self,
        when: datetime,
        event: audit.Code,
        action: str,
        destination: Destination,
        study_uid: str,
        transfer: _Transfer,
        failure: str,
    ) -> str:
        """Sections A.5.3.3 and A.5.3.7: who sends does not know what the receiver held (read)."""
        receiver = audit.Participant(
            destination.name, destination.ae_title, role=audit.DESTINATION, host=destination.host
        )
        return self._compose(
            when,
            event,
            action=action,
            participants=[self._self(role=audit.SOURCE, is_requestor=True), receiver],
            objects=_whose(study_uid, transfer),
            failure=failure,
        )

    def _removed(self, when: datetime, study_uid: str, patient_id: str) -> str:
        """Section A.5.3.8."""
        return self._compose(
            when,
            audit.STUDY_DELETED,
            action="D",
            participants=[self._self(is_requestor=True)],
            objects=[audit.study(study_uid, {}), audit.patient(patient_id)],
        )

    def _refused(self, when: datetime, address: str, calling_ae: str, reason: str) -> str:
        """Section A.5.3.11."""
        performer = audit.Participant(f"{calling_ae}@{address}" if calling_ae else address, calling_ae, address)
        return self._compose(
            when,
            audit.SECURITY_ALERT,
            audit.NODE_AUTHENTICATION,
            participants=[self._self(is_requestor=True), performer],
            objects=[audit.alert(address, reason)],
            failure=reason,
        )

    def _reconfigured(self, when: datetime, keys: Sequence[str]) -> str:
        """Section A.5.3.11."""
        return self._compose(
            when,
            audit.SECURITY_ALERT,
            audit.SECURITY_CONFIGURATION if SECURITY.intersection(keys) else audit.SOFTWARE_CONFIGURATION,
            participants=[self._self(is_requestor=True)],
            objects=[audit.alert(self._source, f"configuration changed: {', '.join(keys)}")],
        )

    def _compose(
        self,
        when: datetime,
        event: audit.Code,
        kind: audit.Code | None = None,
        *,
        participants: Iterable[audit.Participant],
        action: str = "E",
        objects: Iterable[Element] = (),
        failure: str = "",
    ) -> str:
        return audit.compose(
            event,
            kind,
            action=action,
            when=when,
            source=self._source,
            participants=participants,
            objects=objects,
            failure=failure,
        )

    # where it goes

    def _put(self, tell: Callable[..., str], *about: object) -> None:
        if not self._is_on:
            return
        try:
            self._events.put_nowait((datetime.now(UTC), lambda when: tell(when, *about)))
        except queue.Full:
            self._lose("more than can be written")

    def _run(self) -> None:
        while event := self._events.get():
            when, tell = event
            try:
                framed = frame(tell(when), when)
                if self._server:
                    self._server.put(framed)
                if self._file:
                    _append(self._file, framed)
                self._is_losing = False
            except OSError as error:
                self._lose(error.strerror or str(error))
            except Exception:
                log.exception("audit_failed")
                self._lose("a fault of the node")

    def _lose(self, reason: str) -> None:
        """Count a message that is in no file; the log says it once."""
        self._metrics.audit_lost("file", 1)
        if not self._is_losing:
            log.error("audit_messages_lost", reason=reason, remedy="see [audit] file and its disk")
        self._is_losing = True


def _by_study(items: Iterable[OutboxItem]) -> dict[str, _Transfer]:
    studies: dict[str, _Transfer] = {}
    for item in items:
        studies.setdefault(item.study_uid, _Transfer(item.path)).classes[item.sop_class_uid] += 1
    return studies


def _whose(study_uid: str, transfer: _Transfer) -> Collection[Element]:
    """The study, and the patient, without whom a message of a transfer is none (PS3.15 table A.5.3.7-1)."""
    return audit.study(study_uid, transfer.classes), audit.patient(_patient_id(transfer.path))


def _patient_id(path: Path) -> str:
    try:
        return str(dcmread(path, stop_before_pixels=True, specific_tags=["PatientID"]).get("PatientID") or "")
    except Exception:  # noqa: BLE001 (pydicom raises anything on a damaged file, and the event is to be told all the same)
        return ""


def _append(path: Path, framed: bytes) -> None:
    """A line more, in a file for the node's user alone; opened each time, so that it may be moved away."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(handle, "ab", buffering=0) as file:
        file.write(framed + b"\n")
