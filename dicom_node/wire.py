"""What is spoken on the wire, and what pynetdicom lacks there: ends told once, a prompt stop, no answer lost."""

from __future__ import annotations

import queue
import socket
from contextlib import suppress
from socketserver import BaseServer
from typing import TYPE_CHECKING, Any

from pydicom import uid
from pynetdicom import sop_class as sop
from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

if TYPE_CHECKING:
    from collections.abc import Callable

    from pynetdicom.association import Association
    from pynetdicom.events import Event

# Of several proposed for one context the first of these is taken: what needs no decoder, then what loses nothing.
TRANSFER_SYNTAXES = (
    uid.ExplicitVRLittleEndian,
    uid.ImplicitVRLittleEndian,
    uid.RLELossless,
    uid.JPEGLSLossless,
    uid.JPEGLosslessSV1,
    uid.JPEGLossless,
    uid.JPEG2000Lossless,
    uid.HTJ2KLossless,
    uid.HTJ2KLosslessRPCL,
    uid.DeflatedExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
)

# What a CT console pushes in one job beside its slices. All are accepted, since some consoles fail the whole job over
# one refused dose report; what is analysed is decided later. Not every storage class there is: pynetdicom copies the
# list for each connection (170 classes: 12 to 19 ms, these: 2 to 3), and some scanners open one for each image.
FROM_CT_SCANNERS = (
    sop.CTImageStorage,
    sop.EnhancedCTImageStorage,
    sop.LegacyConvertedEnhancedCTImageStorage,
    sop.SecondaryCaptureImageStorage,
    sop.MultiFrameSingleBitSecondaryCaptureImageStorage,
    sop.MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    sop.MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    sop.MultiFrameTrueColorSecondaryCaptureImageStorage,
    sop.XRayRadiationDoseSRStorage,
    sop.EnhancedXRayRadiationDoseSRStorage,
    sop.PatientRadiationDoseSRStorage,
    sop.BasicTextSRStorage,
    sop.EnhancedSRStorage,
    sop.ComprehensiveSRStorage,
    sop.Comprehensive3DSRStorage,
    sop.KeyObjectSelectionDocumentStorage,
    sop.GrayscaleSoftcopyPresentationStateStorage,
    sop.ColorSoftcopyPresentationStateStorage,
    sop.BlendingSoftcopyPresentationStateStorage,
    sop.CTPerformedProcedureProtocolStorage,
    sop.RawDataStorage,
    sop.SpatialRegistrationStorage,
    sop.EncapsulatedPDFStorage,
)

PIECE = 4096  # pynetdicom reads a PDU's six first bytes, then pieces of this size, then the rest
STALL_TIMEOUT_S = 30  # silence in the middle of a PDU: the cable is out


class PromptSocket(socket.socket):
    """Acknowledges at once what begins or ends a PDU, and is closed in the end.

    DCMTK writes a PDU's header and its body one after the other with Nagle's algorithm on: the body waits until the
    header has been acknowledged, which Linux puts off for 40 ms. The option holds for a few segments only and has to be
    set again and again. As SCP, a slice that fits into one PDU takes 4 ms with it instead of 45. As SCU (together with
    TCP_NODELAY), SR, SC and SEG take 32 ms to DCMTK's storescp instead of 233, to Orthanc 50 instead of 242.
    """

    def recv(self, size: int, flags: int = 0) -> bytes:
        if size < PIECE and hasattr(socket, "TCP_QUICKACK"):  # Linux
            self.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return super().recv(size, flags)

    def shutdown(self, how: int) -> None:
        """Say nothing when the peer was faster: pynetdicom closes the socket only where this raises nothing."""
        with suppress(OSError):
            super().shutdown(how)


class Server(ThreadedAssociationServer):
    """A server that stops at once, whatever its peers do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(*args, **kwargs)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        return PromptSocket(fileno=connection.detach()), address

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown(self) -> None:
        """Close the port, cut every connection, and return when each has ended.

        Not pynetdicom's own: that leaves open associations to their peers, and Association.abort() waits for one that
        hangs in the middle of a PDU.
        """
        _cut(self.socket)  # wakes the loop that accepts, which looks up twice a second
        BaseServer.shutdown(self)
        for connection in tuple(self.connections):
            _cut(connection)
        self.server_close()  # joins the connections' threads


def _cut(connection: socket.socket) -> None:
    with suppress(OSError):  # closed already
        connection.shutdown(socket.SHUT_RDWR)


class Connection(RequestHandler):
    """One TCP connection, on a thread that outlasts its association.

    pynetdicom's events tell of an end twice, or in the middle of the last C-STORE, or, when its own thread died, not at
    all. The end of the association's thread comes once, after everything else.

    Parameters
    ----------
    args : socketserver's
    ended : called with the association

    """

    def __init__(self, *args: Any, ended: Callable[[Association], None]) -> None:
        self._ended = ended
        super().__init__(*args)

    def handle(self) -> None:
        self.request.settimeout(STALL_TIMEOUT_S)  # pynetdicom sets none on what it accepts and would wait for ever
        association = self._create_association()
        association.start()
        association.join()
        self.request.close()  # pynetdicom leaves it to garbage collection when the peer was first
        self.server.connections.discard(self.request)
        self._ended(association)


def release_place(event: Event) -> None:
    """Free the place of a connection that closed before it asked for an association; to be bound to EVT_CONN_CLOSE.

    Port scanners and load balancers' probes do that. pynetdicom would wait 30 s for the request that can't come, and
    count the connection as one of the associations that may be open at once.
    """
    if event.assoc.requestor.primitive is None:
        event.assoc.dul.to_user_queue.put(None)


class Answers(queue.Queue):
    """A requestor's message queue that pynetdicom's own loop finds empty; to be set as ``association.dimse.msg_queue``.

    That loop polls the queue for requests of the peer. send_c_store pauses it, but trusts its "paused" flag while it
    may still be passing its checkpoint. Then the loop takes the answer, throws it away ("unexpected C-STORE service
    message"), and the sender waits for it until the DIMSE timeout: once in 6,000 C-STOREs in one busy process.
    """

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        if not block:  # the loop; whoever sent something waits
            raise queue.Empty
        return super().get(block, timeout)
