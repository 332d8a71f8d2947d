"""Why a peer gave no answer to a request for an association; pynetdicom keeps that to itself."""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dicom_node.configuration.sections import Destination, Scanner
    from dicom_node.network.tls import Identity

ALERT_S = 1.0  # TLS 1.3 tells of a certificate that it does not take after the handshake only


def explain(peer: Destination | Scanner, identity: Identity | None, *, timeout_s: float, is_cut: bool) -> str:
    """Connect once more, and say what the operating system and TLS say of that.

    Parameters
    ----------
    peer : who gave no answer
    identity : for peers that take TLS
    timeout_s : for the connection
    is_cut : it ended the connection; else it was silent

    """
    try:
        with socket.create_connection((peer.host, peer.port), timeout_s) as connection:
            why_no_tls = _shake_hands(connection, peer.host, identity) if identity and peer.tls else None
    except OSError as error:
        return error.strerror or str(error)
    if why_no_tls:
        return why_no_tls
    if not is_cut:
        return "something listens, but does not answer; is it a DICOM port?"
    return f"something listens, but cuts the connection; is it a DICOM port{'' if peer.tls else ', and without TLS'}?"


def _shake_hands(connection: socket.socket, host: str, identity: Identity) -> str | None:
    """Why there is no TLS with a peer; None where there is."""
    try:
        with identity.requestor().wrap_socket(connection, server_hostname=host) as tls:
            tls.settimeout(ALERT_S)
            with suppress(TimeoutError):
                tls.recv(1)
    except ssl.SSLCertVerificationError as error:
        return f"its certificate is not taken: {error.verify_message}; see [tls]"
    except ssl.SSLError as error:
        reason = (error.reason or str(error)).lower().replace("_", " ")
        return f"no TLS with it: {reason}; {'see [tls]' if 'alert' in reason else 'does it speak TLS at this port?'}"
    except OSError as error:
        return f"no TLS with it: {error.strerror or error}; does it speak TLS at this port?"
    return None
