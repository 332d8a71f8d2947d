"""The Storage SCP: scanners push, the spool keeps, and only then the peer hears success. Nothing is decoded here."""

from __future__ import annotations

import errno
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, ClassVar, Protocol

import structlog
from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.sop_class import Verification

from dicom_node.spool import DataSetMismatch, DataSetUnreadable, Outcome, SpoolError, SpoolFull
from dicom_node.wire import FROM_CT_SCANNERS, TRANSFER_SYNTAXES, Connection, Server, release_place
from runtime.errors import ScansideError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydicom.uid import UID
    from pynetdicom.association import Association
    from pynetdicom.events import Event

    from dicom_node.spool import Instance, Spool

IDLE_TIMEOUT_S = 300  # scanners hold an association open while they reconstruct; a dead one's place is free after that

# Storage status codes, PS3.4 table B.2-1
SUCCESS = 0x0000
OUT_OF_RESOURCES = 0xA700
DOES_NOT_MATCH = 0xA900
CANNOT_UNDERSTAND = 0xC000
INTERNAL_ERROR = 0xC1FF
# A failure, not a warning: the first content is what gets analysed, and scanners take a warning for "stored", as does
# whoever sends a study again because the patient's name was wrong. The price: some senders stop at a failure.
UID_TAKEN = 0xC111

PORT_REMEDIES = {
    errno.EADDRINUSE: "is a node running already? Stop it, or set another node.port",
    errno.EADDRNOTAVAIL: "no network of this machine has this address; set node.address to one that is its own, or to "
    '"0.0.0.0" for all',
    errno.EACCES: "ports below 1024 need privileges; set node.port to a higher one",
}
_REFUSALS = {SpoolFull: OUT_OF_RESOURCES, DataSetMismatch: DOES_NOT_MATCH, DataSetUnreadable: CANNOT_UNDERSTAND}

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


@dataclass(slots=True)
class _Peer:
    """An accepted association: its name, unique while it is open, and what became of its instances."""

    name: str
    outcomes: Counter[str] = field(default_factory=Counter)


class Receiver:
    """Storage and Verification SCP.

    Parameters
    ----------
    ae_title : our AE title; peers may call us by another
    address, port : where to listen; ``""`` is every interface, port 0 any free one
    spool : where instances are kept
    intake : who is told
    allowed_calling_aes : AE titles that may connect; empty: all may
    max_associations : more at once are rejected (transient, local limit exceeded)
    max_pdu : largest PDU that a peer may send, bytes
    sop_classes : accepted for storage

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
        max_associations: int = 10,
        max_pdu: int = 131072,
        sop_classes: Sequence[UID] = FROM_CT_SCANNERS,
    ) -> None:
        self._address = (address, port)
        self._spool = spool
        self._intake = intake
        self._peers: dict[Association, _Peer] = {}
        self._server: Server | None = None
        self._ae = AE(ae_title)
        self._ae.require_calling_aet = list(allowed_calling_aes)
        self._ae.maximum_associations = max_associations
        self._ae.maximum_pdu_size = max_pdu
        self._ae.network_timeout = IDLE_TIMEOUT_S
        self._ae.add_supported_context(Verification)  # pynetdicom answers C-ECHO by itself
        for sop_class in sop_classes:
            self._ae.add_supported_context(sop_class, list(TRANSFER_SYNTAXES))

    @property
    def port(self) -> int:
        if self._server is None:
            raise RuntimeError("the receiver is not started: it has no port yet")
        return self._server.server_address[1]

    def start(self) -> None:
        """Open the port and return; associations are served on threads of their own."""
        handlers = [
            (evt.EVT_ACCEPTED, self._on_accepted),
            (evt.EVT_REJECTED, self._on_rejected),
            (evt.EVT_CONN_CLOSE, release_place),
            (evt.EVT_C_STORE, self._on_c_store),
        ]
        try:
            self._server = self._ae.make_server(
                self._address,
                evt_handlers=handlers,
                server_class=Server,
                request_handler=partial(Connection, ended=self._on_ended),
            )
        except OSError as error:
            remedy = PORT_REMEDIES.get(error.errno, "set another node.address or node.port")
            raise ReceiverError(
                f"can't listen on {self._address[0] or '*'}:{self._address[1]} ({error.strerror}): {remedy}"
            ) from error
        Thread(target=self._server.serve_forever, name="receiver", daemon=True).start()
        log.info("receiver_started", ae_title=self._ae.ae_title, port=self.port)

    def stop(self) -> None:
        """Close the port and abort what is open. On return the intake has heard the end of every association."""
        if self._server is not None:
            self._server.shutdown()
            self._server = None

    def _on_accepted(self, event: Event) -> None:
        remote = event.assoc.requestor
        peer = self._peers[event.assoc] = _Peer(f"{remote.ae_title}@{remote.address}:{remote.port}")
        log.info("association_accepted", association=peer.name)

    def _on_rejected(self, event: Event) -> None:
        remote = event.assoc.requestor
        log.warning("association_rejected", calling_ae=remote.ae_title, address=remote.address)

    def _on_ended(self, association: Association) -> None:
        peer = self._peers.pop(association, None)
        if peer:  # not one that was rejected, or never asked for an association
            log.info("association_ended", association=peer.name, released=association.is_released, **peer.outcomes)
            complete = association.is_released and not peer.outcomes["refused"]
            self._intake.association_ended(peer.name, released=complete)

    def _on_c_store(self, event: Event) -> int | Dataset:
        peer = self._peers[event.assoc]
        status, reason = self._take(event, peer)
        if status == SUCCESS:
            return status
        peer.outcomes["refused"] += 1
        log.warning("instance_refused", association=peer.name, status=f"0x{status:04X}", reason=reason)
        answer = Dataset()
        answer.Status = status
        answer.ErrorComment = ascii(reason)[1:-1].replace("\\", "/")[:64]  # LO: 64 characters, no backslash
        return answer

    def _take(self, event: Event, peer: _Peer) -> tuple[int, str]:
        """Status of a C-STORE request, and the reason where it is refused."""
        request = event.request
        try:
            outcome, instance = self._spool.store(
                request.DataSet.getvalue(),
                sop_class_uid=str(request.AffectedSOPClassUID),
                sop_uid=str(request.AffectedSOPInstanceUID),
                transfer_syntax_uid=str(event.context.transfer_syntax),
                calling_ae=event.assoc.requestor.ae_title,
            )
            peer.outcomes[outcome] += 1
            if outcome is Outcome.NEW:
                self._intake.instance_stored(peer.name, instance)
        except SpoolError as error:
            return _REFUSALS[type(error)], str(error)
        except OSError:
            log.exception("disk_failed", association=peer.name)
            return OUT_OF_RESOURCES, "the disk failed"
        except Exception:
            log.exception("instance_failed", association=peer.name)
            return INTERNAL_ERROR, "internal error"
        if outcome is Outcome.CONFLICT:
            log.warning("instance_quarantined", association=peer.name, path=str(instance.path))
            return UID_TAKEN, "SOP Instance UID is taken by another content; the first stays"
        return SUCCESS, ""
