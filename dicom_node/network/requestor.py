"""The requestor's side of an association (DICOM PS3.8 section 7.1): open it, or say why there is none."""

from __future__ import annotations

import socket
import ssl
import time
from typing import TYPE_CHECKING, ClassVar

from pynetdicom import AE, evt
from pynetdicom.pdu import A_ABORT_RQ, A_ASSOCIATE_RJ

from dicom_node.network.silence import explain
from dicom_node.network.wire import Answers, PromptSocket
from runtime.errors import ScansideError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pynetdicom.association import Association
    from pynetdicom.events import EventHandlerType
    from pynetdicom.pdu_primitives import SCP_SCU_RoleSelectionNegotiation
    from pynetdicom.presentation import PresentationContext

    from dicom_node.configuration.sections import Destination, Scanner
    from dicom_node.network.tls import Identity

CONNECT_TIMEOUT_S = 5.0
ACSE_TIMEOUT_S = 30.0
DIMSE_TIMEOUT_S = 30.0


class PeerError(ScansideError):
    """A peer that can't be reached or accepts no association."""

    exit_code: ClassVar[int] = 3


class ContextError(PeerError):
    """A peer that takes none of the proposed SOP classes."""


def associate(
    destination: Destination | Scanner,
    ae_title: str,
    contexts: list[PresentationContext],
    roles: Sequence[SCP_SCU_RoleSelectionNegotiation] = (),
    *,
    identity: Identity | None = None,
    handlers: Sequence[EventHandlerType] = (),
    patience_s: float | None = None,
) -> Association:
    """Open an association, or say why there is none.

    Parameters
    ----------
    destination : the peer
    ae_title : ours
    contexts, roles : what is proposed
    identity : for peers that take TLS
    handlers : of what the peer may ask on it
    patience_s : with the peer, in place of the usual; then nobody looks into why it gave no answer

    Raises
    ------
    ContextError : the peer accepts none of the contexts
    PeerError : no such host, no connection, no answer, or a rejection, with its reason

    """
    ae = AE(ae_title)
    ae.connection_timeout, ae.acse_timeout = patience_s or CONNECT_TIMEOUT_S, patience_s or ACSE_TIMEOUT_S
    ae.dimse_timeout = DIMSE_TIMEOUT_S
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
    if patience_s:
        raise PeerError(f"{peer}: no answer")
    is_cut = time.monotonic() - began < ACSE_TIMEOUT_S
    raise PeerError(f"{peer}: {explain(destination, identity, timeout_s=CONNECT_TIMEOUT_S, is_cut=is_cut)}")


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
