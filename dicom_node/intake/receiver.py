"""The Storage SCP: scanners push, the spool keeps, and only then the peer hears success. Nothing is decoded here."""

from __future__ import annotations

import time
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import structlog
from pynetdicom import build_context
from pynetdicom.sop_class import StorageCommitmentPushModel, Verification

from dicom_node.images.part10 import DataSetError, DataSetMismatch
from dicom_node.monitoring.metrics import Metrics
from dicom_node.monitoring.trail import Trail
from dicom_node.network import dimse
from dicom_node.network.acceptor import PORT_REMEDIES, Acceptor
from dicom_node.network.dimse import SUCCESS, UNRECOGNISED_OPERATION, Request
from dicom_node.network.services import Answer, Ignored
from dicom_node.network.wire import FROM_CT_SCANNERS, TRANSFER_SYNTAXES
from dicom_node.storage.spool import Outcome, SpoolError
from runtime.errors import ScansideError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pydicom.uid import UID
    from pynetdicom.presentation import PresentationContext

    from dicom_node.network.dimse import Command
    from dicom_node.network.refusal import Refusal
    from dicom_node.network.services import Message, Peer, Service
    from dicom_node.network.tls import Identity
    from dicom_node.storage.spool import Incoming, Instance, Spool

LARGEST_PDU = 1 << 17  # bytes that a peer may send in one
IDLE_TIMEOUT_S = 300  # scanners hold an association open while they reconstruct; a dead one's place is free after that

# of a C-STORE, PS3.4 table B.2-1
OUT_OF_RESOURCES = 0xA700
DOES_NOT_MATCH = 0xA900
CANNOT_UNDERSTAND = 0xC000
# A failure, not a warning: the first content is what gets analysed, and scanners take a warning for "stored", as does
# whoever sends a study again because the patient's name was wrong. The price: some senders stop at a failure.
UID_TAKEN = 0xC111
INTERNAL_ERROR = 0xC1FF

STATUSES = {
    SUCCESS: "the instance is on the disk, or the same content was already",
    OUT_OF_RESOURCES: "less than node.free_floor_gb is free, the object is larger than node.max_instance_mb, or the "
    "disk failed; it may be sent again later",
    DOES_NOT_MATCH: "StudyInstanceUID, SeriesInstanceUID or SOPInstanceUID is missing from the first 4 MiB, or "
    "SOPInstanceUID is not that of the request",
    CANNOT_UNDERSTAND: "the bytes are no data set in the transfer syntax that was agreed upon, or sequences nested "
    "without end",
    UID_TAKEN: "the SOPInstanceUID is taken by another content: this one is kept in quarantine, the first is analysed",
    INTERNAL_ERROR: "a fault of the node, in its log",
    UNRECOGNISED_OPERATION: "the service has no such operation",
}

log = structlog.get_logger(__name__)


class ReceiverError(ScansideError):
    """The port can't be opened."""

    exit_code: ClassVar[int] = 3


class Intake(Protocol):
    """Who is told of what arrives. Calls about one association come one after the other; its end comes last."""

    def instance_stored(self, association: str, instance: Instance) -> None:
        """Take note of a new instance: durable, not yet answered. The scanner waits meanwhile."""

    def association_ended(self, association: str, *, released: bool) -> None:
        """Take note that nothing more comes: the association was released, or else aborted or lost. Comes once."""


def contexts(sop_classes: Iterable[UID], services: Iterable[UID]) -> list[PresentationContext]:
    """What is accepted: Verification, storage of these SOP Classes, and other services."""
    accepted = [
        build_context(Verification),
        *(build_context(sop_class, list(TRANSFER_SYNTAXES)) for sop_class in sop_classes),
        *(build_context(sop_class, list(TRANSFER_SYNTAXES[:2])) for sop_class in services),
    ]
    for context in accepted:
        if context.abstract_syntax == StorageCommitmentPushModel:  # destinations report here as its SCP
            context.scu_role = context.scp_role = True
    return accepted


class Receiver:
    """Storage and Verification SCP.

    Parameters
    ----------
    ae_title : our AE title; peers may call us by another
    address, port : where to listen; ``""`` is every interface, port 0 any free one
    spool : where instances are kept
    intake : who is told
    allowed_calling_aes : AE titles that may connect; empty: all may
    allowed_addresses : networks from which connections are taken; empty: from all
    max_associations : more at once are rejected (transient, local limit exceeded)
    max_associations_per_peer : as many of one address; None: all of them
    max_pdu : largest PDU that a peer may send, bytes
    sop_classes : accepted for storage
    services : beside storage, by their SOP Class
    identity : connections have to be TLS, with this
    metrics : what is counted
    trail : what is audited

    """

    def __init__(
        self,
        *,
        ae_title: str,
        address: str,
        port: int,
        spool: Spool,
        intake: Intake,
        allowed_calling_aes: tuple[str, ...] = (),
        allowed_addresses: tuple[str, ...] = (),
        max_associations: int = 10,
        max_associations_per_peer: int | None = None,
        max_pdu: int = LARGEST_PDU,
        sop_classes: Sequence[UID] = FROM_CT_SCANNERS,
        services: Mapping[UID, Service] = MappingProxyType({}),
        identity: Identity | None = None,
        metrics: Metrics | None = None,
        trail: Trail | None = None,
    ) -> None:
        self._address = (address, port)
        self._spool = spool
        self._intake = intake
        self._acceptor: Acceptor | None = None
        self._ae_title, self._services = ae_title, services
        self._metrics, self._trail = metrics or Metrics(), trail or Trail()
        self._limits = {
            "allowed_calling_aes": allowed_calling_aes,
            "allowed_addresses": allowed_addresses,
            "max_associations": max_associations,
            "max_associations_per_peer": max_associations_per_peer,
        }
        self._options = {
            "max_pdu": max_pdu,
            "tls": identity.acceptor if identity else None,
            "contexts": contexts(sop_classes, services),
        }

    @property
    def port(self) -> int:
        if self._acceptor is None:
            raise RuntimeError("the receiver is not started: it has no port yet")
        return self._acceptor.port

    def start(self) -> None:
        """Open the port and return; associations are served on threads of their own."""
        try:
            self._acceptor = Acceptor(
                *self._address, services=self, idle_timeout_s=IDLE_TIMEOUT_S, **self._options, **self._limits
            )
        except OSError as error:
            reason, *_ = error.strerror.partition(" (")  # which goes on to repeat the address
            remedy = PORT_REMEDIES.get(error.errno, "set another node.address or node.port")
            raise ReceiverError(
                f"can't listen on {self._address[0] or '*'}:{self._address[1]} ({reason}): {remedy}"
            ) from error
        log.info("receiver_started", ae_title=self._ae_title, port=self.port)

    def reload(self, **limits: Any) -> None:
        """Let in others than before, all of the parameters that say who; open associations stay."""
        self._limits = limits
        if self._acceptor is not None:
            self._acceptor.reload(**limits)

    def close(self) -> None:
        """Close the port; associations that are open go on."""
        if self._acceptor is not None:
            self._acceptor.close()

    def is_alive(self) -> bool:
        """Whether connections are taken."""
        return self._acceptor is not None and self._acceptor.is_alive()

    def associations(self) -> list[str]:
        """Who has an association; without them, the intake has heard the end of every one."""
        return self._acceptor.associations() if self._acceptor else []

    def stop(self) -> None:
        """Close the port and cut what is open. On return the intake has heard the end of every association."""
        if self._acceptor is not None:
            self._acceptor.stop()
            self._acceptor = None

    # what the acceptor asks

    def refused(self, address: str, calling_ae: str, refusal: Refusal) -> None:
        self._metrics.rejected(refusal.label)
        if refusal.is_alarming:
            self._trail.refused(address, calling_ae, refusal.why)

    def accepted(self, peer: Peer) -> None:
        log.info("association_accepted", association=peer.name)

    def ended(self, peer: Peer, *, released: bool) -> None:
        log.info("association_ended", association=peer.name, released=released, **peer.outcomes)
        if peer.asked:
            remedy = "name the port where it takes reports in [[scanners]]: it then gets those that it is owed, too"
            log.warning("commitment_not_told", association=peer.name, reports=len(peer.asked), remedy=remedy)
        self._metrics.association_ended(released=released)
        self._intake.association_ended(peer.name, released=released and not peer.outcomes["refused"])
        self._trail.ended(peer)

    def serve(self, peer: Peer, context_id: int, command: Command) -> Message:
        abstract_syntax, transfer_syntax = peer.contexts[context_id]
        if abstract_syntax in self._services:
            return self._services[abstract_syntax].serve(peer, command, transfer_syntax)
        if command.field != Request.C_STORE or abstract_syntax == Verification:
            return Ignored(Answer(UNRECOGNISED_OPERATION))
        return _Store(self._spool, self._intake, self._metrics, self._trail, peer, command, transfer_syntax)

    def answered(self, peer: Peer, context_id: int, command: Command) -> None:
        service = self._services.get(peer.contexts[context_id][0])
        if service:
            service.answered(peer, command)


class _Store:
    """A C-STORE request (PS3.7 section 9.1.1); the first thing that fails is its answer."""

    def __init__(
        self,
        spool: Spool,
        intake: Intake,
        metrics: Metrics,
        trail: Trail,
        peer: Peer,
        command: Command,
        transfer_syntax: str,
    ) -> None:
        self._intake, self._metrics, self._trail, self._peer = intake, metrics, trail, peer
        self._began = time.perf_counter()
        self._refusal: Answer | None = None
        self._incoming: Incoming | None = None
        try:
            self._incoming = spool.incoming(
                sop_class_uid=command.text(dimse.AFFECTED_SOP_CLASS_UID),
                sop_uid=command.text(dimse.AFFECTED_SOP_INSTANCE_UID),
                transfer_syntax_uid=transfer_syntax,
                calling_ae=peer.ae_title,
            )
        except Exception as error:  # noqa: BLE001 (whatever fails is logged and answered)
            self._fail(error)

    def write(self, piece: memoryview) -> None:
        if self._refusal is None:
            try:
                self._incoming.write(piece)
            except Exception as error:  # noqa: BLE001 (as above)
                self._fail(error)

    def finish(self) -> Answer:
        if self._refusal is None:
            try:
                self._keep()
            except Exception as error:  # noqa: BLE001 (as above)
                self._fail(error)
        self._metrics.stage("response", time.perf_counter() - self._began)
        if self._refusal is None:
            return Answer(SUCCESS)
        self._peer.outcomes["refused"] += 1
        self._metrics.instance("refused")
        status, reason = self._refusal.status, self._refusal.comment
        log.warning("instance_refused", association=self._peer.name, status=f"0x{status:04X}", reason=reason)
        return self._refusal

    def discard(self) -> None:
        try:
            if self._incoming:
                self._incoming.discard()
        except OSError as error:  # the next start removes it
            log.warning("incoming_not_removed", reason=error.strerror)

    def _keep(self) -> None:
        outcome, instance = self._incoming.commit()
        if outcome is Outcome.NEW:  # told before anything else can go wrong: it would be no news the next time
            self._intake.instance_stored(self._peer.name, instance)
        self._peer.outcomes[outcome] += 1
        self._metrics.instance(outcome)
        self._trail.kept(self._peer, outcome, instance)
        if outcome is Outcome.CONFLICT:
            log.warning("instance_quarantined", association=self._peer.name, path=str(instance.path))
            self._refusal = Answer(UID_TAKEN, "SOP Instance UID is taken by another content; the first stays")

    def _fail(self, error: Exception) -> None:
        """Find the answer to what was raised, and forget the instance."""
        match error:
            case SpoolError():
                self._refusal = Answer(OUT_OF_RESOURCES, str(error))
            case DataSetMismatch():
                self._refusal = Answer(DOES_NOT_MATCH, str(error))
            case DataSetError():
                self._refusal = Answer(CANNOT_UNDERSTAND, str(error))
            case OSError():
                log.error("disk_failed", association=self._peer.name, exc_info=error)
                self._refusal = Answer(OUT_OF_RESOURCES, "the disk failed")
            case _:
                log.error("instance_failed", association=self._peer.name, exc_info=error)
                self._refusal = Answer(INTERNAL_ERROR, "internal error")
        self.discard()
