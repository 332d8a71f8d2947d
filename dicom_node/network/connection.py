"""One connection that a peer has opened: the upper layer as acceptor (PS3.8 section 9), DIMSE messages above it.

One thread reads, serves and answers; nothing polls, and what arrives is handed on in the pieces in which it came.
pynetdicom's codecs and its negotiation open an association; the rest of its acceptor is not used: it needs three
threads a connection with polls of a millisecond between them (3 ms an image), holds every image in memory whole,
whatever a peer says of its size, and has the TLS handshake of one peer delay all others.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from contextlib import suppress
from threading import Thread, current_thread
from typing import TYPE_CHECKING, Any

import structlog
from pynetdicom import PYNETDICOM_IMPLEMENTATION_UID, PYNETDICOM_IMPLEMENTATION_VERSION
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RJ, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    ImplementationClassUIDNotification,
    ImplementationVersionNameNotification,
    MaximumLengthNotification,
    SCP_SCU_RoleSelectionNegotiation,
)
from pynetdicom.presentation import negotiate_as_acceptor

from dicom_node.network import dimse
from dicom_node.network.dimse import Command, CommandError, Request
from dicom_node.network.refusal import Refusal
from dicom_node.network.services import Answer, Ignored, Peer

if TYPE_CHECKING:
    from dicom_node.network.acceptor import Acceptor
    from dicom_node.network.services import Message

ARTIM_S = 30  # from the connection to the request for an association, and to its end after a release (PS3.8 9.1.5)
STALL_S = 30  # for a PDU, and between two of a message: the cable is out, or a peer holds its place on purpose
LONGEST_REQUEST = 1 << 20  # bytes of an association request: 128 contexts of 40 transfer syntaxes are 150 kB
MOST_CONTEXTS = 128  # odd numbers up to 255 name them (PS3.8 section 9.3.2.2)
PIECE = 1 << 17  # bytes to take in at once
LINGER_S, MOST_IGNORED = 1.0, 64  # after an end: for so long, and so many pieces, is the peer waited for

# PDU types, PS3.8 section 9.3.1
_ASSOCIATE_RQ, _DATA, _RELEASE_RQ, _RELEASE_RP, _ABORT = 0x01, 0x04, 0x05, 0x06, 0x07
# reasons of an abort, PS3.8 table 9-26
_NO_REASON, _UNEXPECTED_PDU, _INVALID_PARAMETER = 0, 2, 6

log = structlog.get_logger(__name__)


class _Ended(Exception):
    """The connection is over: by the peer, by silence, or because nothing good can come of it."""


class Connection(Thread):
    """One TCP connection, from its first byte to its last.

    Attributes
    ----------
    address : the peer's
    is_asking : it has sent something, and has no answer to it yet

    """

    def __init__(self, acceptor: Acceptor, accepted: socket.socket, address: str, port: int, tls: Any) -> None:
        super().__init__(name=f"association-{address}:{port}", daemon=True)
        self._acceptor, self._socket, self._tls = acceptor, accepted, tls
        self.address, self._port = address, port
        self.is_asking = False
        self._until = 0.0  # when waiting for bytes is over
        self._peer: Peer | None = None
        self._command = bytearray()  # fragments of a command set that is not complete
        self._message: tuple[int, Command, Message] | None = None  # whose data set is coming
        self._piece = memoryview(bytearray(0))
        self._lingers = False
        self._longest = PIECE  # fragment that the peer takes

    def cut(self) -> None:
        """End the connection from another thread."""
        cut(self._socket)

    def run(self) -> None:
        released = False
        try:
            self._open()
            released = self._serve()
        except _Ended as end:
            if str(end):
                log.warning("connection_ended", peer=self.who, reason=str(end))
        except CommandError as error:
            log.warning("connection_ended", peer=self.who, reason=str(error))
            self._abort(_INVALID_PARAMETER)
        except ssl.SSLError as error:
            log.warning("tls_failed", peer=self.who, reason=error.reason or str(error))
            if not self._peer:
                self._acceptor.services.refused(self.address, "", Refusal.TLS)
        except TimeoutError:
            if self._peer:
                log.warning("connection_ended", peer=self.who, reason="silent in the middle of a message")
                self._abort(_NO_REASON)
        except OSError as error:
            log.info("connection_lost", peer=self.who, reason=error.strerror)
        except Exception:
            log.exception("association_failed", peer=self.who)
            self._abort(_NO_REASON)
        try:
            self._end(released=released)
        finally:
            self._acceptor.gone(self)

    @property
    def who(self) -> str:
        return self._peer.name if self._peer else self.address

    def _open(self) -> None:
        self._allow(ARTIM_S)
        self._socket.settimeout(ARTIM_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not self._socket.recv(1, socket.MSG_PEEK):
            raise _Ended
        self.is_asking = True
        if self._tls:
            self._socket = self._tls.wrap_socket(self._socket, server_side=True, do_handshake_on_connect=False)
            if self._acceptor.is_stopping:  # and has cut the socket that was wrapped
                raise _Ended
            self._socket.do_handshake()
        self._negotiate()

    def _end(self, *, released: bool) -> None:
        """Tell the end, and then leave closing to the peer: closing at once may destroy what it has not read yet."""
        message, self._message = self._message, None
        self.is_asking = False
        if message:
            message[2].discard()
        if self._peer:
            self._acceptor.services.ended(self._peer, released=released and message is None)
        self._acceptor.left(self)  # after that: who has no place has told all
        with suppress(OSError):
            if self._lingers:  # PS3.8 state 13
                self._allow(LINGER_S)
                ignored = memoryview(bytearray(PIECE))
                for _ in range(MOST_IGNORED):
                    if not self._receive(ignored):
                        break
        cut(self._socket)
        self._socket.close()

    # association control

    def _negotiate(self) -> None:
        """Accept what the peer asks for.

        Raises
        ------
        _Ended : it asked for nothing, or was rejected

        """
        first = self._header()
        if first is None:
            raise _Ended
        request, accepted, acceptance = self._requested(*first)
        calling_ae = request.calling_ae_title.strip()
        refusal = self._acceptor.admit(self, calling_ae)
        if refusal:
            answer = A_ASSOCIATE()
            answer.result, answer.result_source, answer.diagnostic = refusal.rejection
            self._socket.sendall(A_ASSOCIATE_RJ(answer).encode())
            log.warning("association_rejected", calling_ae=calling_ae, address=self.address, reason=refusal.why)
            self._acceptor.services.refused(self.address, calling_ae, refusal)
            self._lingers = True
            raise _Ended
        self._socket.sendall(acceptance)
        contexts = {
            one.context_id: (str(one.abstract_syntax), str(one.transfer_syntax[0]))
            for one in accepted.presentation_context_definition_results_list
            if one.result == 0
        }
        self._peer = Peer(calling_ae, self.address, self._port, contexts)
        self._longest = max(min(PIECE, request.maximum_length_received or PIECE) - 6, 1)
        current_thread().name = f"association-{self._peer.name}"
        self._acceptor.services.accepted(self._peer)

    def _requested(self, kind: int, length: int) -> tuple[A_ASSOCIATE, A_ASSOCIATE, bytes]:
        """Read what the peer asks for, its acceptance, and that encoded.

        Raises
        ------
        _Ended : it asks for nothing that can be accepted

        """
        if kind != _ASSOCIATE_RQ or length > LONGEST_REQUEST:
            self._abort(_UNEXPECTED_PDU)
            raise _Ended(f"a PDU of type {kind:02X} and {length} bytes instead of a request for an association")
        body = bytearray(length)
        self._fill(memoryview(body))
        try:
            pdu = A_ASSOCIATE_RQ()
            pdu.decode(struct.pack(">BxL", kind, length) + bytes(body))
            request = pdu.to_primitive()
            if len(request.presentation_context_definition_list) > MOST_CONTEXTS:
                raise ValueError  # noqa: TRY301 (as much is wrong as where pynetdicom raises one)
            accepted = self._accept(request)
            return request, accepted, A_ASSOCIATE_AC(accepted).encode()
        except Exception as error:  # pynetdicom raises anything on what is no request
            self._abort(_INVALID_PARAMETER)
            raise _Ended(f"a request for an association that can't be read ({type(error).__name__})") from error

    def _accept(self, request: A_ASSOCIATE) -> A_ASSOCIATE:
        """The acceptance of a request (PS3.8 section 7.1.1, PS3.7 annex D.3.3)."""
        roles = {
            item.sop_class_uid: (item.scu_role, item.scp_role)
            for item in request.user_information
            if isinstance(item, SCP_SCU_RoleSelectionNegotiation)
        }
        results, granted = negotiate_as_acceptor(
            request.presentation_context_definition_list, self._acceptor.contexts, roles
        )
        length, implementation, version = (
            MaximumLengthNotification(),
            ImplementationClassUIDNotification(),
            ImplementationVersionNameNotification(),
        )
        length.maximum_length_received = self._acceptor.max_pdu
        implementation.implementation_class_uid = PYNETDICOM_IMPLEMENTATION_UID
        version.implementation_version_name = PYNETDICOM_IMPLEMENTATION_VERSION
        answer = A_ASSOCIATE()
        answer.application_context_name = request.application_context_name
        answer.calling_ae_title, answer.called_ae_title = request.calling_ae_title, request.called_ae_title
        answer.result, answer.result_source = 0, 1
        answer.presentation_context_definition_results_list = results
        answer.user_information = [length, implementation, version, *granted]
        return answer

    def _abort(self, reason: int) -> None:
        """Send an A-ABORT of the service provider, if the peer still hears it."""
        self._lingers = True
        with suppress(OSError):
            self._socket.sendall(struct.pack(">BxLxxBB", _ABORT, 4, 2, reason))

    # messages

    def _serve(self) -> bool:
        """Serve messages to the association's end; True when the peer released it."""
        while True:
            busy = self._message or self._command
            self._allow(STALL_S if busy else self._acceptor.idle_timeout_s)
            try:
                kind, length = self._header() or (_ABORT, 0)
            except TimeoutError as error:
                self._abort(_NO_REASON)
                raise _Ended("silent in the middle of a message" if busy else "silent for too long") from error
            if kind == _DATA:
                self._data(length)
            elif kind == _RELEASE_RQ:
                self._socket.sendall(struct.pack(">BxL4x", _RELEASE_RP, 4))
                self._lingers = True
                return True
            elif kind == _ABORT:
                return False
            else:
                self._abort(_UNEXPECTED_PDU)
                raise _Ended(f"a PDU of type {kind:02X} and {length} bytes in an association")

    def _data(self, length: int) -> None:
        """Take a P-DATA-TF PDU: presentation data values, each a fragment of a command set or of a data set."""
        if length > self._acceptor.max_pdu:
            raise self._malformed(f"a PDU of {length} bytes, {self._acceptor.max_pdu} were agreed upon")
        self._allow(STALL_S)
        head = memoryview(bytearray(6))
        while length:
            if length < 6:
                raise self._malformed("a presentation data value that is cut off")
            self._fill(head)
            size, context_id, control = struct.unpack(">LBB", head)
            length -= 4 + size
            if size < 2 or length < 0:
                raise self._malformed("a presentation data value longer than its PDU")
            self._fragment(size - 2, context_id, is_command=bool(control & 1), is_last=bool(control & 2))

    def _fragment(self, size: int, context_id: int, *, is_command: bool, is_last: bool) -> None:
        if is_command:
            if self._message or len(self._command) + size > LONGEST_REQUEST:
                raise self._malformed("a command set within a data set, or one without end")
            fragment = bytearray(size)
            self._fill(memoryview(fragment))
            self._command += fragment
            if is_last:
                self._begin(context_id)
            return
        if self._message is None or self._message[0] != context_id:
            raise self._malformed("a data set without a command set")
        if not len(self._piece):
            self._piece = memoryview(bytearray(PIECE))
        while size:
            piece = self._piece[: min(size, PIECE)]
            self._fill(piece)
            self._message[2].write(piece)
            size -= len(piece)
        if is_last:
            (context_id, command, message), self._message = self._message, None
            self._answer(context_id, command, message.finish())

    def _begin(self, context_id: int) -> None:
        """Act on a complete command set."""
        encoded, self._command = self._command, bytearray()
        command = Command(encoded)
        if context_id not in self._peer.contexts:
            raise self._malformed(f"presentation context {context_id} was not accepted")
        if command.field == Request.C_CANCEL or command.field & dimse.RESPONSE:
            if command.field != Request.C_CANCEL:
                self._acceptor.services.answered(self._peer, context_id, command)
            if command.has_data_set:
                self._message = context_id, command, Ignored(None)
            return
        if command.field == Request.C_ECHO:
            message: Message = Ignored(Answer(dimse.SUCCESS))
        else:
            message = self._acceptor.services.serve(self._peer, context_id, command)
        if command.has_data_set:
            self._message = context_id, command, message
        else:
            self._answer(context_id, command, message.finish())

    def _answer(self, context_id: int, command: Command, answer: Answer | None) -> None:
        if answer is None:
            return
        self._send(context_id, dimse.response(command, answer.status, answer.comment))
        if answer.then:
            self._send(context_id, *answer.then)

    def _send(self, context_id: int, command: bytes, data_set: bytes = b"") -> None:
        """Send a message, in PDUs that the peer takes."""
        values = []
        for control, part in ((1, command), (0, data_set)):
            starts = range(0, len(part), self._longest)
            for at in starts:
                piece, last = part[at : at + self._longest], 2 * (at == starts[-1])
                values.append(struct.pack(">BxLLBB", _DATA, len(piece) + 6, len(piece) + 2, context_id, control | last))
                values.append(piece)
        self._socket.sendall(b"".join(values))

    def _malformed(self, reason: str) -> _Ended:
        self._abort(_INVALID_PARAMETER)
        return _Ended(reason)

    # bytes

    def _header(self) -> tuple[int, int] | None:
        """Type and length of the next PDU; None where the peer has closed the connection."""
        header = memoryview(bytearray(6))
        count = self._receive(header)
        if count == 0:
            return None
        self._fill(header[count:])
        return struct.unpack(">BxL", header)

    def _fill(self, buffer: memoryview) -> None:
        """Read until `buffer` is full."""
        while len(buffer):
            count = self._receive(buffer)
            if count == 0:
                raise _Ended
            buffer = buffer[count:]

    def _receive(self, buffer: memoryview) -> int:
        """Read what has come, or comes first.

        DCMTK writes a PDU's header and its body one after the other with Nagle's algorithm on: the body waits until the
        header has been acknowledged, which Linux puts off for 40 ms, unless it is asked to be quick about it. That
        holds for a few segments only and has to be set again and again.
        """
        _acknowledge(self._socket)
        self._socket.settimeout(max(self._until - time.monotonic(), 0.001))  # what is here is taken in any case
        return self._socket.recv_into(buffer)

    def _allow(self, seconds: float) -> None:
        """Begin to wait: for all that comes before the next such call, in drips or at once."""
        self._until = time.monotonic() + seconds


def _acknowledge(connection: socket.socket) -> None:
    if hasattr(socket, "TCP_QUICKACK"):  # Linux
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def cut(connection: socket.socket) -> None:
    with suppress(OSError):  # closed already
        connection.shutdown(socket.SHUT_RDWR)
