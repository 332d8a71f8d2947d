"""The upper layer as acceptor, against peers that speak it badly: byte by byte, without a library between."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from contextlib import ExitStack, contextmanager, suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE, build_context
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import A_ASSOCIATE, ImplementationClassUIDNotification, MaximumLengthNotification
from pynetdicom.sop_class import CTImageStorage, StorageCommitmentPushModel, Verification
from structlog.testing import capture_logs

from dicom_node.monitoring.metrics import Metrics
from dicom_node.network import acceptor, connection, dimse
from dicom_node.network.dimse import Command, CommandError, Request
from dicom_node.network.refusal import Refusal
from tests.dicom_node.instances import SERIES, Recorder, encoded, image, receiving

ABORT, RELEASE_RQ, RELEASE_RP = 0x07, 0x05, 0x06


@pytest.fixture
def intake():
    return Recorder()


@pytest.fixture
def receiver(tmp_path, intake):
    with receiving(tmp_path / "spool", intake, max_instance_mb=0.3) as receiver:
        yield receiver


def request(*sop_classes) -> bytes:
    """An A-ASSOCIATE-RQ."""
    asked = A_ASSOCIATE()
    asked.application_context_name = "1.2.840.10008.3.1.1.1"
    asked.calling_ae_title, asked.called_ae_title = "CT01", "SCANSIDE"
    contexts = [build_context(sop_class, ExplicitVRLittleEndian) for sop_class in sop_classes]
    for number, context in enumerate(contexts):
        context.context_id = 2 * number + 1
    asked.presentation_context_definition_list = contexts
    length, implementation = MaximumLengthNotification(), ImplementationClassUIDNotification()
    length.maximum_length_received, implementation.implementation_class_uid = 16384, "1.2.3"
    asked.user_information = [length, implementation]
    return A_ASSOCIATE_RQ(asked).encode()


def items(kind: int, body: bytes, times: int = 1) -> bytes:
    return (struct.pack(">BxH", kind, len(body)) + body) * times


class Peer:
    """A connection, and PDUs by hand."""

    def __init__(self, port: int, source: str = "127.0.0.1") -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10, source_address=(source, 0))

    def send(self, kind: int, body: bytes) -> None:
        self.socket.sendall(struct.pack(">BxL", kind, len(body)) + body)

    def receive(self) -> tuple[int, bytes]:
        """Type and body of the next PDU; type 0 where the connection is closed."""
        head = self._exactly(6)
        if len(head) < 6:
            return 0, b""
        kind, length = struct.unpack(">BxL", head)
        return kind, self._exactly(length)

    def _exactly(self, size: int) -> bytes:
        got = b""
        while len(got) < size and (piece := self.socket.recv(size - len(got))):
            got += piece
        return got

    def message(self, command: bytes, data_set: bytes = b"", *, context: int = 1, piece: int = 1 << 14) -> None:
        values = [(3, command)]
        starts = range(0, len(data_set), piece)
        values += [(2 if at == starts[-1] else 0, data_set[at : at + piece]) for at in starts]
        for control, part in values:
            self.send(4, value(part, control, context))

    def answer(self) -> Command:
        kind, body = self.receive()
        assert kind == 4, (kind, body)
        size, _, control = struct.unpack_from(">LBB", body)
        assert (size, control) == (len(body) - 4, 3)
        return Command(body[6:])


def value(part: bytes, control: int, context: int = 1) -> bytes:
    """A presentation data value."""
    return struct.pack(">LBB", len(part) + 2, context, control) + part


@contextmanager
def associated(receiver, *sop_classes):
    peer = Peer(receiver.port)
    peer.socket.sendall(request(*(sop_classes or (CTImageStorage, Verification))))
    kind, body = peer.receive()
    assert kind == 2
    accepted = A_ASSOCIATE_AC()
    accepted.decode(struct.pack(">BxL", kind, len(body)) + body)
    try:
        yield peer
    finally:
        peer.socket.close()


def store(number: int = 1) -> bytes:
    """A C-STORE-RQ."""
    fields = {
        dimse.AFFECTED_SOP_CLASS_UID: CTImageStorage,
        dimse.COMMAND_FIELD: Request.C_STORE,
        dimse.MESSAGE_ID: 7,
        dimse.COMMAND_DATA_SET_TYPE: 0,
        dimse.AFFECTED_SOP_INSTANCE_UID: f"{SERIES}.{number}",
    }
    return dimse.encode(fields)


def asked(field: int) -> bytes:
    """A request without a data set."""
    fields = {dimse.COMMAND_FIELD: field, dimse.MESSAGE_ID: 9, dimse.COMMAND_DATA_SET_TYPE: dimse.NO_DATA_SET}
    return dimse.encode(fields)


def test_messages_follow_one_another_in_pieces_of_any_size(receiver, intake):
    slices = [image(number) for number in (1, 2, 3)]
    with associated(receiver) as peer:
        for slice_, piece in zip(slices, (1, 100, 1 << 14), strict=True):
            peer.message(store(slice_.InstanceNumber), encoded(slice_), piece=piece)
            answer = peer.answer()
            assert (answer.field, answer.number(dimse.STATUS)) == (0x8001, 0)
            assert answer.number(dimse.MESSAGE_ID_BEING_RESPONDED_TO) == 7
            assert answer.text(dimse.AFFECTED_SOP_INSTANCE_UID) == slice_.SOPInstanceUID
        # a command set in two fragments, and with its data set in one PDU
        command, data_set = store(4), encoded(image(4))
        peer.send(4, value(command[:50], 1) + value(command[50:], 3) + value(data_set, 2))
        assert peer.answer().number(dimse.STATUS) == 0
        peer.message(asked(Request.C_ECHO), context=3)
        assert peer.answer().field == 0x8030
        peer.send(RELEASE_RQ, bytes(4))
        assert peer.receive() == (RELEASE_RP, bytes(4))
        intake.wait(lambda intake: intake.ended() == [True])  # told before the peer closes
        assert [one.sop_uid for one in intake.stored()] == [f"{SERIES}.{n}" for n in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: scanside\r\n\r\n",
        struct.pack(">BxL", 1, 1 << 30),
        struct.pack(">BxL", 1, 40) + bytes(40),
        request(CTImageStorage).replace(b"\x30\0\0\x19", b"\x40\0\0\x19"),
        struct.pack(">BxL", 4, 10) + bytes(10),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    ],
    ids=["HTTP", "a request of a gigabyte", "a request of zeros", "a context of nothing", "data at once", "TLS"],
)
def test_what_asks_for_no_association_is_aborted_and_named(receiver, intake, sent):
    with capture_logs() as events:
        peer = Peer(receiver.port)
        peer.socket.sendall(sent)
        assert peer.receive()[0] == ABORT
        assert peer.receive()[0] == 0
        peer.socket.close()
        with associated(receiver):
            pass
        intake.wait(lambda intake: intake.ended() == [False])
    (event,) = [event for event in events if event["event"] == "connection_ended"]
    assert event["peer"] == "127.0.0.1"
    assert "association" in event["reason"]


@pytest.mark.parametrize(
    ("kind", "body", "reason"),
    [
        (9, b"", "a PDU of type 09"),
        (1, bytes(100), "a PDU of type 01"),
        (4, bytes(3), "cut off"),
        (4, struct.pack(">LBB", 100, 1, 3) + b"x", "longer than its PDU"),
        (4, struct.pack(">LBB", 0, 1, 3), "longer than its PDU"),
        (4, value(b"pixels", 2), "a data set without a command set"),
        (4, value(store(), 3) + value(store(), 3), "a command set within a data set"),
        (4, value(store(), 3, context=99), "presentation context 99"),
        (4, value(store()[:-5], 3), "cut off"),
        (4, value(b"\x08\x00" + bytes(20), 3), "group 0008"),
        (4, value(dimse.encode({dimse.MESSAGE_ID: 1}), 3), r"\(0000,0100\)"),
        (4, value(dimse.encode({dimse.COMMAND_FIELD: Request.C_ECHO, dimse.COMMAND_DATA_SET_TYPE: 0x101}), 3), "0110"),
    ],
)
def test_what_is_no_message_ends_the_association_and_no_other(receiver, intake, kind, body, reason):
    with capture_logs() as events, associated(receiver) as other:
        with associated(receiver) as peer:
            peer.send(kind, body)
            assert peer.receive()[0] == ABORT
            intake.wait(lambda intake: intake.ended() == [False])
        other.message(store(), encoded(image()))
        assert other.answer().number(dimse.STATUS) == 0
    (event,) = [event for event in events if event["event"] == "connection_ended"]
    assert event["peer"].startswith("CT01@127.0.0.1:")
    assert re.search(reason, event["reason"])


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (struct.pack(">BxL", 4, 0xFFFFFFFF) + value(b"x" * 100_000, 3), 6),
        (struct.pack(">BxL", 4, 131073), 6),
        (struct.pack(">BxL", 4, 100) + value(bytes(200), 1), 6),
        (struct.pack(">BxL", 0x63, 4) + bytes(4), 2),
        (struct.pack(">BxL", 2, 1 << 31), 2),
        (struct.pack(">BxL", 4, 6) + value(b"", 3, context=5), 6),
        (struct.pack(">BxL", 4, 0x7FFF) + value(store(), 3, context=1) + value(b"pixels", 2, context=3), 6),
        (struct.pack(">BxL", 4, 0x7FFF) + value(b"pixels", 2) + value(store(), 3), 6),
    ],
    ids=[
        "4 GB", "one byte more than agreed", "a value across the PDU's end", "an unknown type", "an answer of 2 GB",
        "a context that was not accepted", "data in another context", "data before its command",
    ],
)  # fmt: skip
def test_every_bad_pdu_is_answered_with_an_abort_that_says_why(receiver, intake, sent, code):
    """Also where the peer goes on sending: what is closed with bytes unread destroys what the other side has not."""
    with capture_logs() as events, associated(receiver, CTImageStorage, Verification) as peer:
        peer.socket.sendall(sent + bytes(1 << 20))
        assert peer.receive() == (ABORT, bytes([0, 0, 2, code]))
        intake.wait(lambda intake: intake.ended() == [False])
        with associated(receiver) as other:
            other.message(asked(Request.C_ECHO), context=3)
            assert other.answer().field == 0x8030
    assert {event["event"] for event in events if event["log_level"] in ("warning", "error")} == {"connection_ended"}


@pytest.mark.parametrize("place", ["request", "PDU", "data set"])
def test_what_breaks_off_leaves_nothing(receiver, intake, tmp_path, place):
    with capture_logs() as events:
        if place == "request":
            peer = Peer(receiver.port)
            peer.socket.sendall(request(CTImageStorage)[:-1])
            peer.socket.shutdown(socket.SHUT_WR)
            assert peer.receive() == (0, b"")
            peer.socket.close()
        else:
            with associated(receiver) as peer:
                peer.send(4, value(store(), 3))
                whole = struct.pack(">BxL", 4, 5006) + value(bytes(5000), 2)
                peer.socket.sendall(whole[: 5 if place == "PDU" else 500])
                peer.socket.shutdown(socket.SHUT_WR)
                assert peer.receive() == (0, b"")
            intake.wait(lambda intake: intake.ended() == [False])
    assert {event["log_level"] for event in events} <= {"info"}
    assert not list((tmp_path / "spool" / "incoming").iterdir())


@pytest.mark.parametrize(
    ("contexts", "syntaxes", "users", "answer"),
    [(128, 100, 10_000, 2), (128, 1, 0, 2), (15_000, 1, 1, ABORT), (1, 40_000, 1, ABORT)],
    ids=["128 contexts, 10,000 sub-items", "no user information", "15,000 contexts", "more than a megabyte"],
)
def test_requests_of_any_length_are_answered(receiver, contexts, syntaxes, users, answer):
    """PS3.8 section 9.3.2: contexts have odd numbers up to 255."""
    wanted = items(0x30, CTImageStorage.encode()) + items(0x40, ExplicitVRLittleEndian.encode(), min(syntaxes, 2000))
    body = struct.pack(">Hxx16s16s32x", 1, b"SCANSIDE".ljust(16), b"CT01".ljust(16)) + items(
        0x10, b"1.2.840.10008.3.1.1.1"
    )
    body += b"".join(items(0x20, bytes([2 * n + 1 & 0xFF, 0, 0, 0]) + wanted) for n in range(contexts))
    about = items(0x51, struct.pack(">L", 16384)) + items(0x52, b"1.2.3") + items(0x55, b"x", users)
    body += items(0x50, about) if users else b""
    with capture_logs() as events:
        peer = Peer(receiver.port)
        peer.send(1, body + bytes(1 << 20 if syntaxes == 40_000 else 0))
        kind, told = peer.receive()
        peer.socket.close()
    assert kind == answer
    if kind == 2:
        accepted = A_ASSOCIATE_AC()
        accepted.decode(struct.pack(">BxL", kind, len(told)) + told)
        assert len(accepted.to_primitive().presentation_context_definition_results_list) == contexts
    assert not [event for event in events if event["log_level"] == "error"]


def test_drips_hold_no_place(receiver, intake, monkeypatch):
    """A byte now and then is no sign of life: a request, and then a PDU, has to be here in time."""
    monkeypatch.setattr(connection, "ARTIM_S", 0.4)
    monkeypatch.setattr(connection, "STALL_S", 0.4)
    with capture_logs() as events:
        peer = Peer(receiver.port)
        assert drip(peer, request(CTImageStorage)) < len(request(CTImageStorage))
        assert peer.receive() == (0, b"")
        peer.socket.close()
        with associated(receiver) as peer:
            pdu = struct.pack(">BxL", 4, len(store()) + 6) + value(store(), 3)
            assert drip(peer, pdu) < len(pdu)
            assert peer.receive() == (ABORT, bytes([0, 0, 2, 0]))
        intake.wait(lambda intake: intake.ended() == [False])
    assert [event["reason"] for event in events if event["event"] == "connection_ended"] == [
        "silent in the middle of a message"
    ]


def drip(peer, content: bytes) -> int:
    """Send byte by byte, each long before the last would have timed out; how many until the other side had enough."""
    for count in range(len(content)):
        peer.socket.sendall(content[count : count + 1])
        peer.socket.settimeout(0.02)
        with suppress(TimeoutError):
            if len(peer.socket.recv(1, socket.MSG_PEEK)) in (0, 1):
                peer.socket.settimeout(10)
                return count
    return len(content)


def test_who_waits_for_the_end_is_counted_and_told_to_leave(receiver, intake, monkeypatch):
    """A peer that never closes what was rejected or aborted keeps a thread for a moment, and never more than some."""
    monkeypatch.setattr(acceptor, "MOST_WAITING", 8)
    monkeypatch.setattr(connection, "LINGER_S", 30)
    before = threading.active_count()
    with ExitStack() as crowd:
        for _ in range(40):
            peer = Peer(receiver.port)
            crowd.callback(peer.socket.close)
            peer.socket.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert peer.receive()[0] == ABORT
        deadline = time.monotonic() + 10
        while threading.active_count() > before + 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert threading.active_count() <= before + 8
        with associated(receiver) as peer:
            peer.message(store(), encoded(image()))
            assert peer.answer().number(dimse.STATUS) == 0


def test_an_object_over_the_limit_is_refused_before_it_is_here(receiver, intake, tmp_path):
    big = encoded(image(side=512))
    with associated(receiver) as peer:
        peer.message(store(), big)
        answer = peer.answer()
        assert answer.number(dimse.STATUS) == 0xA700
        assert "max_instance_mb, 0.3 MB" in answer.text(dimse.ERROR_COMMENT)
        peer.message(store(2), encoded(image(2)))
        assert peer.answer().number(dimse.STATUS) == 0
    assert [one.sop_uid for one in intake.stored()] == [f"{SERIES}.2"]
    assert not list((tmp_path / "spool" / "incoming").iterdir())


def test_what_is_not_offered_is_answered_and_the_association_goes_on(receiver):
    with associated(receiver) as peer:
        peer.message(asked(Request.N_ACTION))
        assert peer.answer().number(dimse.STATUS) == dimse.UNRECOGNISED_OPERATION
        peer.message(store(), encoded(image()), context=3)  # that context is for C-ECHO
        assert peer.answer().number(dimse.STATUS) == dimse.UNRECOGNISED_OPERATION
        peer.message(asked(Request.C_CANCEL))  # has no answer
        peer.message(asked(0x8001))  # nor has an answer
        peer.message(asked(Request.C_ECHO), context=3)
        assert peer.answer().field == 0x8030


def test_a_half_message_is_no_release_and_leaves_nothing(receiver, intake, tmp_path):
    with associated(receiver) as peer:
        peer.send(4, value(store(), 3) + value(encoded(image()), 0))
        peer.send(RELEASE_RQ, bytes(4))
        intake.wait(lambda intake: intake.ended() == [False])
    assert intake.stored() == []
    assert not list((tmp_path / "spool" / "incoming").iterdir())


def test_silent_connections_crowd_nobody_out(receiver, intake, monkeypatch):
    monkeypatch.setattr(acceptor, "MOST_WAITING", 8)
    before = threading.active_count()
    with ExitStack() as crowd, associated(receiver) as peer:
        for _ in range(60):
            crowd.enter_context(socket.create_connection(("127.0.0.1", receiver.port)))
        deadline = time.monotonic() + 10
        while threading.active_count() > before + 9 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert threading.active_count() <= before + 9  # eight that wait, and the one with an association
        peer.message(store(), encoded(image()))
        assert peer.answer().number(dimse.STATUS) == 0
    assert len(intake.stored()) == 1


def test_one_address_does_not_take_the_places_of_all(tmp_path, intake):
    """However many AE titles it has; what another has open does not count, and a place that is given up does."""
    metrics = Metrics()
    limits = {"max_associations": 4, "max_associations_per_peer": 2}
    with (
        capture_logs() as events,
        receiving(tmp_path / "s", intake, metrics=metrics, **limits) as receiver,
        ExitStack() as peers,
    ):

        def answer(source: str) -> tuple[int, bytes]:
            peer = Peer(receiver.port, source)
            peers.callback(peer.socket.close)
            peer.socket.sendall(request(CTImageStorage))
            return peer.receive()

        assert [answer("127.0.0.1")[0] for _ in range(2)] == [2, 2]
        rejected = [answer("127.0.0.1") for _ in range(2)]
        assert rejected == [(3, bytes((0, 2, 3, 2)))] * 2
        assert [answer("127.0.0.2")[0] for _ in range(2)] == [2, 2]
        assert answer("127.0.0.3") == (3, bytes((0, 2, 3, 2)))  # and four are the most of all
        receiver.reload(**{"allowed_calling_aes": (), "allowed_addresses": ()} | limits | {"max_associations": 5})
        assert answer("127.0.0.2")[0] == 3
        assert answer("127.0.0.3")[0] == 2
    reasons = [event["reason"] for event in events if event["event"] == "association_rejected"]
    assert reasons == [Refusal.PEER_LIMIT.why] * 2 + [Refusal.LIMIT.why, Refusal.PEER_LIMIT.why]
    for reason, count in (("peer_limit", 3), ("limit", 1)):
        assert metrics.registry.get_sample_value("scanside_rejections_total", {"reason": reason}) == count


def test_a_crowd_that_waits_crowds_out_itself(receiver, monkeypatch):
    monkeypatch.setattr(acceptor, "MOST_WAITING", 8)
    with ExitStack() as crowd:
        other = Peer(receiver.port, "127.0.0.2")
        crowd.callback(other.socket.close)
        for _ in range(20):
            crowd.enter_context(socket.create_connection(("127.0.0.1", receiver.port)))
        other.socket.sendall(request(CTImageStorage))
        assert other.receive()[0] == 2


def test_who_sends_now_and_then_is_not_slow(receiver, intake, monkeypatch):
    """Pauses between messages count for nothing: scanners reconstruct meanwhile."""
    monkeypatch.setattr(connection, "STALL_S", 0.5)
    with associated(receiver) as peer:
        for number in (1, 2, 3):
            peer.message(store(number), encoded(image(number)))
            assert peer.answer().number(dimse.STATUS) == 0
            time.sleep(0.6)
        peer.send(RELEASE_RQ, bytes(4))
        assert peer.receive()[0] == RELEASE_RP


def test_who_says_nothing_for_too_long_is_aborted(receiver, intake, monkeypatch):
    monkeypatch.setattr(receiver._acceptor, "idle_timeout_s", 0.1)
    with associated(receiver) as peer:
        assert peer.receive()[0] == ABORT
        intake.wait(lambda intake: intake.ended() == [False])


def test_addresses_that_are_not_allowed_are_closed_at_once(tmp_path, intake):
    with capture_logs() as events, receiving(tmp_path / "s", intake, allowed_addresses=("192.0.2.0/24",)) as receiver:
        peer = Peer(receiver.port)
        assert peer.receive() == (0, b"")
        peer.socket.close()
    assert [event["address"] for event in events if event["event"] == "connection_refused"] == ["127.0.0.1"]
    with (
        receiving(tmp_path / "t", intake, allowed_addresses=("192.0.2.0/24", "127.0.0.1/32")) as receiver,
        associated(receiver) as peer,
    ):
        peer.message(asked(Request.C_ECHO), context=3)
        assert peer.answer().field == 0x8030


def test_roles_and_unknown_classes_are_negotiated(receiver):
    ae = AE("CT01")
    for sop_class in (CTImageStorage, StorageCommitmentPushModel):
        ae.add_requested_context(sop_class, ExplicitVRLittleEndian)
    association = ae.associate("127.0.0.1", receiver.port)
    assert [context.abstract_syntax for context in association.accepted_contexts] == [CTImageStorage]
    assert [context.abstract_syntax for context in association.rejected_contexts] == [StorageCommitmentPushModel]
    assert association.acceptor.maximum_length == 131072
    association.release()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_bring_anything_but_a_command_error(encoded_command):
    try:
        command = Command(encoded_command)
    except CommandError:
        return
    assert isinstance(command.field, int)
