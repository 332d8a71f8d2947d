"""The receiver against real senders, and against peers that lie, break off, fall silent or come in crowds."""

from __future__ import annotations

import errno
import shutil
import signal
import socket
import subprocess
import threading
import time
from contextlib import contextmanager

import pytest
from pydicom import dcmread
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    SecondaryCaptureImageStorage,
    XRayRadiationDoseSRStorage,
)
from pynetdicom import AE
from pynetdicom.pdu import A_ASSOCIATE_RQ
from pynetdicom.sop_class import CTImageStorage, Verification
from structlog.testing import capture_logs

from dicom_node.intake.receiver import Receiver, ReceiverError
from dicom_node.network import wire
from dicom_node.simulation.scanner import push
from dicom_node.storage import spool
from dicom_node.storage.spool import Spool
from tests.dicom_node.instances import SERIES, Recorder, data_set_of, encoded, image, receiving, write

NESTED = b"\x08\x00\x06\x00SQ\x00\x00\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * 5000  # sequences without end

HALF = b"\x04\x00\x00\x01\x00\x00" + b"\x00\x00\xff\xfc\x01\x01" + b"only the beginning"  # of a command set

needs_dcmtk = pytest.mark.skipif(
    shutil.which("storescu") is None, reason="storescu not installed: apt-get install dcmtk"
)


@pytest.fixture
def intake():
    return Recorder()


@pytest.fixture
def receiver(tmp_path, intake):
    with receiving(tmp_path / "spool", intake) as receiver:
        yield receiver


def dcmtk(tool, receiver, *arguments, calling_ae="CT01"):
    called = ["-aet", calling_ae, "-aec", "SCANSIDE", "127.0.0.1", str(receiver.port)]
    options = [str(argument) for argument in arguments if str(argument).startswith(("-", "+"))]
    paths = [str(argument) for argument in arguments if str(argument) not in options]
    return subprocess.run([tool, *options, *called, *paths], capture_output=True, text=True, timeout=60, check=False)


@contextmanager
def associated(receiver, *sop_classes, calling_ae="CT01"):
    """An association of our own making; the caller ends it, or it is aborted here."""
    ae = AE(calling_ae)
    for sop_class in sop_classes or (CTImageStorage,):
        ae.add_requested_context(sop_class, ExplicitVRLittleEndian)
    association = ae.associate("127.0.0.1", receiver.port, ae_title="SCANSIDE")
    connection = association.dul.socket.socket
    try:
        yield association
    finally:
        if association.is_established:
            association.abort()
        if connection:  # pynetdicom forgets to where the other side was first
            connection.close()


def sent(paths, receiver, calling_ae="CT01"):
    return push(paths, ("127.0.0.1", receiver.port), calling_ae=calling_ae, called_ae="SCANSIDE")


@needs_dcmtk
@pytest.mark.parametrize("tool", ["storescu", "dcmsend"])
def test_dcmtk_pushes_a_series(tmp_path, receiver, intake, tool):
    slices = [image(number) for number in range(1, 21)]
    paths = write(tmp_path / "scanner", *slices)
    answer = dcmtk(tool, receiver, *paths)
    assert answer.returncode == 0, answer.stderr
    intake.wait(lambda intake: intake.ended())

    assert [instance.sop_uid for instance in intake.stored()] == [f"{SERIES}.{n}" for n in range(1, 21)]
    assert [data_set_of(instance.path) for instance in intake.stored()] == [encoded(slice_) for slice_ in slices]
    assert intake.ended() == [True]
    assert intake.calls[-1][0] == "ended"
    assert {association.split(":")[0] for _, association, _ in intake.calls} == {"CT01@127.0.0.1"}


@needs_dcmtk
@pytest.mark.parametrize(
    ("syntax", "option"),
    [
        (ImplicitVRLittleEndian, "-xi"),
        (ExplicitVRBigEndian, "-xb"),
        (DeflatedExplicitVRLittleEndian, "-xd"),
        (RLELossless, "-xr"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_dcmtk_pushes_in_other_transfer_syntaxes(tmp_path, receiver, intake, syntax, option):
    slice_ = image(1, syntax)
    answer = dcmtk("storescu", receiver, option, "-R", *write(tmp_path / "scanner", slice_))
    assert answer.returncode == 0, answer.stderr
    (instance,) = intake.stored()

    assert instance.transfer_syntax_uid == syntax
    if syntax != DeflatedExplicitVRLittleEndian:  # that storescu deflates anew
        assert data_set_of(instance.path) == encoded(slice_)
    assert (dcmread(instance.path).pixel_array == slice_.pixel_array).all()


@pytest.mark.parametrize(
    "syntax", [ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless], ids=lambda syntax: syntax.name
)
def test_what_is_offered_alone_is_taken_as_it_is(tmp_path, receiver, intake, syntax):
    slice_ = image(1, syntax)
    (path,) = write(tmp_path / "scanner", slice_)
    assert not sent([path], receiver).failed
    (instance,) = intake.stored()
    assert instance.transfer_syntax_uid == syntax
    assert data_set_of(instance.path) == data_set_of(path)


@needs_dcmtk
def test_several_senders_at_once(tmp_path, receiver, intake):
    slices = {
        series: [image(n, SeriesInstanceUID=f"1.2.{series}", SOPInstanceUID=f"1.2.{series}.{n}") for n in range(1, 16)]
        for series in range(4)
    }
    folders = {series: write(tmp_path / str(series), *slices[series]) for series in slices}
    threads = [threading.Thread(target=dcmtk, args=("storescu", receiver, *paths)) for paths in folders.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    intake.wait(lambda intake: len(intake.ended()) == 4)

    assert intake.ended() == [True] * 4
    for series, expected in slices.items():
        kept = [i for i in intake.stored() if i.series_uid == f"1.2.{series}"]
        assert [data_set_of(instance.path) for instance in kept] == [encoded(slice_) for slice_ in expected]
    for association in {association for _, association, _ in intake.calls}:
        assert [kind for kind, name, _ in intake.calls if name == association] == ["stored"] * 15 + ["ended"]


@needs_dcmtk
def test_echo(receiver, intake):
    assert dcmtk("echoscu", receiver).returncode == 0
    intake.wait(lambda intake: intake.ended() == [True])


@needs_dcmtk
def test_a_calling_ae_that_is_not_allowed_is_rejected(tmp_path, intake):
    with (
        capture_logs() as events,
        receiving(tmp_path / "spool", intake, allowed_calling_aes=("CT01", "CT02")) as receiver,
    ):
        assert dcmtk("echoscu", receiver, calling_ae="STRANGER").returncode != 0
        assert dcmtk("echoscu", receiver, calling_ae="CT02").returncode == 0
    assert [association.split("@")[0] for _, association, _ in intake.calls] == ["CT02"]
    assert [event["calling_ae"] for event in events if event["event"] == "association_rejected"] == ["STRANGER"]


def test_over_the_limit_an_association_is_rejected_for_now(tmp_path, intake):
    with receiving(tmp_path / "spool", intake, max_associations=1) as receiver:
        with associated(receiver) as first:
            assert first.is_established
            for _ in range(5):  # a rejection that is here before pynetdicom has looked whether it is connected goes by
                with associated(receiver) as second:
                    assert not second.is_established
                if second.is_rejected:
                    break
            assert second.is_rejected
            assert second.acceptor.primitive.result == 2  # transient
            first.release()
        intake.wait(lambda intake: intake.ended() == [True])


def test_connections_that_ask_for_nothing_take_no_place(tmp_path, intake, capfd):
    with receiving(tmp_path / "spool", intake, max_associations=1) as receiver:
        for _ in range(5):
            socket.create_connection(("127.0.0.1", receiver.port)).close()
        deadline = time.monotonic() + 10  # pynetdicom alone takes 30 s
        established = False
        while not established and time.monotonic() < deadline:
            with associated(receiver, Verification) as association:
                established = association.is_established
        assert established
    assert intake.ended() == [False]
    assert "Traceback" not in capfd.readouterr().err  # what socketserver prints when a connection's thread fails


@needs_dcmtk
def test_a_killed_sender(tmp_path, receiver, intake):
    paths = write(tmp_path / "scanner", *(image(number, side=256) for number in range(1, 201)))
    run = ["storescu", "-aec", "SCANSIDE", "127.0.0.1", str(receiver.port), *map(str, paths)]
    with subprocess.Popen(run, stderr=subprocess.DEVNULL) as process:
        intake.wait(lambda intake: len(intake.stored()) >= 5)
        process.send_signal(signal.SIGKILL)
    intake.wait(lambda intake: intake.ended())

    assert intake.ended() == [False]
    assert intake.calls[-1][0] == "ended"
    assert len(intake.stored()) < 200
    assert all(data_set_of(i.path) == encoded(image(n, side=256)) for n, i in enumerate(intake.stored(), start=1))
    again = sent(paths, receiver)
    assert len(again.sent) == 200
    intake.wait(lambda intake: len(intake.ended()) == 2)
    assert sorted(instance.path for instance in intake.stored()) == sorted((tmp_path / "spool").rglob("*.dcm"))
    assert len(intake.stored()) == 200  # the repeated ones are no news


@pytest.mark.parametrize("how", ["abort", "drop", "half a PDU"])
def test_an_association_that_is_broken_off_ends_once(receiver, intake, how):
    with associated(receiver) as association:
        assert association.is_established
        connection = association.dul.socket.socket
        if how == "abort":
            association.abort()
        else:
            if how == "half a PDU":
                connection.sendall(HALF)
            connection.shutdown(socket.SHUT_RDWR)
        intake.wait(lambda intake: intake.ended())
    with associated(receiver) as another:
        another.release()
    intake.wait(lambda intake: len(intake.ended()) == 2)
    assert intake.ended() == [False, True]


@pytest.mark.parametrize("state", ["connected", "in the middle of a PDU", "associated"])
def test_stop_waits_for_no_peer_and_tells_every_end(tmp_path, intake, state):
    with receiving(tmp_path / "spool", intake) as receiver:
        if state == "associated":
            with associated(receiver):
                stopped = threading.Thread(target=receiver.stop)
                stopped.start()
                stopped.join(15)
                assert not stopped.is_alive()
                assert intake.ended() == [False]
        else:
            with socket.create_connection(("127.0.0.1", receiver.port)) as connection:
                if state == "in the middle of a PDU":
                    connection.sendall(b"\x01\x00\x00\x00\x01\x00half an association request")
                    time.sleep(0.05)
                stopped = threading.Thread(target=receiver.stop)
                stopped.start()
                stopped.join(15)
                assert not stopped.is_alive()
            assert intake.calls == []


def test_a_closed_receiver_serves_who_is_there_and_nobody_else(tmp_path, receiver, intake):
    """Also not who has connected before and asks only now: that is told to come back."""
    late = socket.create_connection(("127.0.0.1", receiver.port), timeout=10)
    with associated(receiver) as association:
        receiver.close()
        assert [name.split(":")[0] for name in receiver.associations()] == ["CT01@127.0.0.1"]
        late.sendall(A_ASSOCIATE_RQ(association.requestor.primitive).encode())
        rejection = late.recv(64)
        assert (rejection[0], tuple(rejection[7:10])) == (0x03, (2, 3, 1))  # transient, presentation, congestion
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", receiver.port))
        assert association.send_c_store(image()).Status == 0
        association.release()
    late.close()
    deadline = time.monotonic() + 20
    while receiver.associations():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert intake.ended() == [True]  # has been told before


def test_a_peer_that_falls_silent_in_the_middle_of_a_pdu_is_given_up(tmp_path, intake, monkeypatch):
    monkeypatch.setattr("dicom_node.network.connection.STALL_S", 0.2)
    with receiving(tmp_path / "spool", intake) as receiver, associated(receiver) as association:
        association.dul.socket.socket.sendall(HALF)
        intake.wait(lambda intake: intake.ended() == [False])


def test_the_beginning_and_the_end_of_a_pdu_are_acknowledged_at_once():
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as peer,
        wire.PromptSocket(fileno=server.accept()[0].detach()) as prompt,
    ):
        peer.sendall(bytes(wire.PIECE + 6))
        for size, expected in ((wire.PIECE, 0), (6, 1)):
            prompt.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
            assert len(prompt.recv(size)) == size
            assert prompt.getsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK) == expected


def test_a_repeated_push_succeeds_and_is_no_news(tmp_path, receiver, intake):
    paths = write(tmp_path / "scanner", image(1), image(2))
    with capture_logs() as events:
        assert len(sent(paths, receiver).sent) == 2
        assert len(sent(paths, receiver).sent) == 2
        intake.wait(lambda intake: len(intake.ended()) == 2)
    assert len(intake.stored()) == 2
    ends = [event for event in events if event["event"] == "association_ended"]
    assert [(end.get("new"), end.get("repeated")) for end in ends] == [(2, None), (None, 2)]


def test_other_content_under_a_taken_uid_fails_and_the_first_stays(tmp_path, receiver, intake):
    sent(write(tmp_path / "first", image(1)), receiver)
    answer = sent(write(tmp_path / "second", image(1, PatientID="P2"), image(2)), receiver)
    assert [each.status for each in answer.failed] == [0xC111]
    assert "SOP Instance UID is taken by another content" in answer.failed[0].reason
    assert [instance.sop_uid for instance in intake.stored()] == [f"{SERIES}.1", f"{SERIES}.2"]
    assert data_set_of(intake.stored()[0].path) == encoded(image(1))


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom on what is wrong on purpose
@pytest.mark.parametrize(
    ("change", "status", "reason"),
    [
        (
            lambda data_set: data_set.replace(f"{SERIES}.1".encode(), f"{SERIES}.9".encode()),
            0xA900,
            "is not the request's",
        ),
        (
            lambda data_set: data_set.replace(b"\x08\x00\x18\x00UI", b"\x08\x00\x17\x00UI"),
            0xA900,
            ": SOPInstanceUID (0008,0018) is missing or empty",
        ),
        (
            lambda data_set: data_set.replace(b"\x20\x00\x0d\x00UI", b"\x20\x00\x0c\x00UI"),
            0xA900,
            ": StudyInstanceUID (0020,000D) is missing or empty",
        ),
        (lambda data_set: data_set[:30], 0xA900, "(0020,000D)"),
        (lambda data_set: data_set[: data_set.index(b"\x20\x00\x0e\x00UI") + 12], 0xC000, "within (0020,000E)"),
        (lambda _: NESTED, 0xC000, "sequences nested without end"),
    ],
    ids=[
        "another instance",
        "no SOPInstanceUID",
        "no StudyInstanceUID",
        "cut between",
        "cut within",
        "nested without end",
    ],
)
def test_bad_data_sets_are_refused_and_the_association_goes_on(tmp_path, receiver, intake, change, status, reason):
    bad, good = write(tmp_path / "scanner", image(1), image(2))
    whole, data_set = bad.read_bytes(), data_set_of(bad)
    bad.write_bytes(whole.removesuffix(data_set) + change(data_set))

    answer = sent([bad, good], receiver)

    assert [(each.path, each.status) for each in answer.failed] == [(bad, status)]
    assert reason in answer.failed[0].reason
    assert [each.path for each in answer.sent] == [good]
    assert [instance.sop_uid for instance in intake.stored()] == [f"{SERIES}.2"]
    assert len(list((tmp_path / "spool").rglob("*.dcm"))) == 1


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom on an illegal UID
def test_a_hostile_uid_stays_in_the_spool(tmp_path, receiver, intake):
    (path,) = write(tmp_path / "scanner", image(1, StudyInstanceUID="9" * 16))
    path.write_bytes(path.read_bytes().replace(b"9" * 16, b"../../../outside"))
    assert not sent([path], receiver).failed
    (instance,) = intake.stored()
    assert instance.study_uid == "../../../outside"
    assert list(tmp_path.rglob("1.2.*.dcm")) == [instance.path]
    assert instance.path.is_relative_to(tmp_path / "spool")


def test_a_full_disk_is_out_of_resources(tmp_path, intake):
    with receiving(tmp_path / "spool", intake, free_floor_gb=1e9) as receiver:
        answer = sent(write(tmp_path / "scanner", image(1)), receiver)
    assert [each.status for each in answer.failed] == [0xA700]
    assert "below node.free_floor_gb" in answer.failed[0].reason
    assert intake.stored() == []


def test_a_disk_that_is_full_in_the_middle_of_a_slice_is_out_of_resources(tmp_path, receiver, intake, monkeypatch):
    """Half of it is written: nothing stays, the scanner is told, and the next one has room again."""
    genuine, pieces = spool._write, []

    def full(file, piece):
        pieces.append(len(piece))
        if len(pieces) == 4:  # the head of the file is the first
            file.write(piece[: len(piece) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        genuine(file, piece)

    monkeypatch.setattr(spool, "_write", full)
    with capture_logs() as events:
        answer = sent(write(tmp_path / "scanner", image(1, side=512), image(2, side=512)), receiver)
    assert [(each.sop_uid, each.status) for each in answer.failed] == [(f"{SERIES}.1", 0xA700)]
    assert [instance.sop_uid for instance in intake.stored()] == [f"{SERIES}.2"]
    assert len(list((tmp_path / "spool").rglob("*.dcm"))) == 1
    assert not list((tmp_path / "spool" / "incoming").iterdir())
    assert "disk_failed" in [event["event"] for event in events]


@pytest.mark.parametrize(
    ("error", "status", "event"),
    [(OSError(5, "Input/output error"), 0xA700, "disk_failed"), (RuntimeError("a bug"), 0xC1FF, "instance_failed")],
    ids=["disk", "bug"],
)
def test_whatever_fails_inside_is_logged_and_answered(tmp_path, receiver, intake, monkeypatch, error, status, event):
    def fail(*_):
        monkeypatch.undo()
        raise error

    monkeypatch.setattr(intake, "instance_stored", fail)
    with capture_logs() as events:
        answer = sent(write(tmp_path / "scanner", image(1), image(2)), receiver)
    assert [each.status for each in answer.failed] == [status]
    assert [each.sop_uid for each in answer.sent] == [f"{SERIES}.2"]
    (logged,) = [each for each in events if each["event"] == event]
    assert logged["exc_info"]
    assert logged["association"].startswith("CT01@")


def test_what_a_console_pushes_beside_slices_is_taken_too(receiver):
    wanted = [
        CTImageStorage,
        EnhancedCTImageStorage,
        SecondaryCaptureImageStorage,
        XRayRadiationDoseSRStorage,
        Verification,
    ]
    with associated(receiver, *wanted) as association:
        assert {context.abstract_syntax for context in association.accepted_contexts} == set(wanted)


def test_a_port_in_use_is_named(tmp_path, receiver, intake):
    second = Receiver(
        ae_title="S", address="127.0.0.1", port=receiver.port, spool=Spool(tmp_path / "s", 0), intake=intake
    )
    with pytest.raises(
        ReceiverError, match=rf"can't listen on 127\.0\.0\.1:{receiver.port} \(Address already in use\)"
    ):
        second.start()
    second.stop()
    with pytest.raises(RuntimeError, match="not started"):
        _ = second.port


def test_after_stop_the_port_is_closed(tmp_path, intake):
    with receiving(tmp_path / "spool", intake) as receiver:
        port = receiver.port
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
