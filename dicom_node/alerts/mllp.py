"""Minimal Lower Layer Protocol: one HL7 message there, one answer back, over TCP or TLS (HL7 v2 transport)."""

from __future__ import annotations

import socket
import ssl
from typing import TYPE_CHECKING

from dicom_node.alerts.channel import Deadline, Unreachable, Unready

if TYPE_CHECKING:
    from dicom_node.alerts.settings import Hl7
    from dicom_node.network.tls import Identity

START, END = b"\x0b", b"\x1c\r"
CONNECT_S = 5.0
LONGEST_ANSWER = 1 << 16


def exchange(settings: Hl7, identity: Identity | None, message: bytes | None) -> bytes:
    """Send a message and read its answer, without their frames; None: connect, and say nothing.

    Raises
    ------
    Unreachable : no connection, no TLS, no answer, or one that is none

    """
    where = f"{settings.host}:{settings.port}"
    with Deadline() as deadline:
        try:
            with _connect(settings, identity, deadline) as connection:
                if message is None:
                    return b""
                connection.sendall(START + message + END)
                answer = _read(connection)
        except ssl.SSLCertVerificationError as error:
            raise Unreachable(f"{where}: its certificate is not taken: {error.verify_message}; see [tls]") from error
        except OSError as error:
            reason = "takes too long" if deadline.has_passed else error.strerror or str(error)
            raise Unreachable(f"{where}: {reason}") from error
    if deadline.has_passed:
        raise Unreachable(f"{where}: takes too long to answer")
    if not answer.startswith(START) or not answer.endswith(END):
        problem = (
            f"answers with more than {LONGEST_ANSWER} bytes" if len(answer) > LONGEST_ANSWER else "cuts its answer"
        )
        raise Unreachable(f"{where}: {problem if answer else 'closed the connection and gave no answer'}")
    return answer[len(START) : -len(END)]


def _connect(settings: Hl7, identity: Identity | None, deadline: Deadline) -> socket.socket:
    if settings.tls and identity is None:  # never in the clear instead
        raise Unready(f"{settings.name} takes TLS, and this node has no certificate: see [tls]")
    connection = socket.create_connection((settings.host, settings.port), CONNECT_S)
    try:
        connection.settimeout(None)  # the deadline is for all of it
        deadline.watch(connection)
        if settings.tls and identity:
            connection = identity.requestor().wrap_socket(
                connection, server_hostname=settings.host, do_handshake_on_connect=False
            )
            deadline.watch(connection)  # the socket that was watched has given its handle away
            connection.do_handshake()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        connection.close()
        raise
    return connection


def _read(connection: socket.socket) -> bytes:
    """Read to the end of a frame, of the connection, or of what an answer may have."""
    answer = b""
    while not answer.endswith(END) and len(answer) <= LONGEST_ANSWER:
        piece = connection.recv(8192)
        if not piece:
            break
        answer += piece
    return answer
