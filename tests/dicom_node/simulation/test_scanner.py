"""The scanner's side: what it sends, in which order and when, and that nothing fails in silence."""

from __future__ import annotations

import queue
import shutil
import socket
import subprocess
import time
from types import SimpleNamespace

import pytest
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import (
    JPEG2000MC,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
    RLELossless,
)

from dicom_node.network.requestor import PeerError
from dicom_node.network.wire import Answers
from dicom_node.simulation import scanner
from dicom_node.simulation.scanner import NO_DICOM, PushError, push
from tests.dicom_node.instances import SERIES, Recorder, data_set_of, encoded, image, receiving, write

# pynetdicom does not close the socket of a connection that was refused or cut; it is collected at once
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


@pytest.fixture
def intake():
    return Recorder()


@pytest.fixture
def receiver(tmp_path, intake):
    with receiving(tmp_path / "spool", intake) as receiver:
        yield receiver


def sent(paths, receiver, **options):
    return push(paths, ("127.0.0.1", receiver.port), calling_ae="CT01", called_ae="SCANSIDE", **options)


def test_a_folder_goes_in_order_of_instance_number_over_one_association(tmp_path, receiver, intake):
    folder = tmp_path / "scanner"
    for name, number in (("c", 10), ("a", 2), ("b", 1), ("sub/d", 3)):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image(number).save_as(path, enforce_file_format=True)
    told = []
    before = time.time()
    report = sent([folder], receiver, on_slice=told.append)
    intake.wait(lambda intake: intake.ended() == [True])

    assert [instance.sop_uid for instance in intake.stored()] == [f"{SERIES}.{number}" for number in (1, 2, 3, 10)]
    assert len({association for _, association, _ in intake.calls}) == 1
    assert [each.path.name for each in report.sent] == ["b", "a", "d", "c"]
    assert tuple(told) == report.sent
    assert (report.failed, report.skipped) == ((), ())
    assert all(each.status == 0 and each.reason == "" and each.is_stored for each in report.sent)
    times = [each.response_ms for each in report.sent]
    assert min(times) > 0
    assert report.response_ms(100) == max(times)
    assert min(times) <= report.response_ms(50) <= report.response_ms(95) <= max(times)
    assert (
        before < report.sent[0].acknowledged <= report.last_acknowledged == report.sent[-1].acknowledged < time.time()
    )
    assert sum(times) / 1000 <= report.seconds


@pytest.mark.parametrize(
    "syntax",
    [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless],
    ids=lambda syntax: syntax.name,
)
def test_the_data_set_goes_as_it_is_encoded(tmp_path, receiver, intake, syntax):
    slice_ = image(1, syntax)
    slice_.add_new(0x00080000, "UL", 1234)  # a group length, wrong too: every decoder and encoder drops or mends it
    (path,) = write(tmp_path / "scanner", slice_)
    if syntax != DeflatedExplicitVRLittleEndian:
        raw = b"\x08\x00\x00\x00\x04\x00\x00\x00\xd2\x04\x00\x00"
        raw = raw if syntax == ImplicitVRLittleEndian else b"\x08\x00\x00\x00UL\x04\x00\xd2\x04\x00\x00"
        raw = b"\x00\x08\x00\x00UL\x00\x04\x00\x00\x04\xd2" if syntax == ExplicitVRBigEndian else raw
        content, data_set = path.read_bytes(), data_set_of(path)
        path.write_bytes(content.removesuffix(data_set) + raw + data_set.removeprefix(raw))
    report = sent([path], receiver)
    assert report.failed == ()
    (instance,) = intake.stored()
    assert instance.transfer_syntax_uid == syntax
    assert data_set_of(instance.path) == data_set_of(path)


def test_the_pace_is_kept_however_long_answers_take(tmp_path, receiver, monkeypatch):
    clock = SimpleNamespace(now=100.0, slept=[])

    def sleep(seconds):
        clock.slept.append(round(seconds, 6))
        clock.now += seconds

    monkeypatch.setattr(
        scanner, "time", SimpleNamespace(perf_counter=lambda: clock.now, sleep=sleep, time=lambda: clock.now)
    )
    answers = iter([0.01, 0.07, 0.0, 0.0])

    def answered(_):
        clock.now += next(answers)

    paths = write(tmp_path / "scanner", *(image(number) for number in range(1, 5)))
    assert len(sent(paths, receiver, rate=20, on_slice=answered).sent) == 4
    assert clock.slept == [0.0, 0.04, 0.0, 0.03]  # due at 0, 50, 100 and 150 ms; the third is late, the fourth is not


def test_what_is_no_instance_is_listed(tmp_path, receiver):
    folder = tmp_path / "scanner"
    write(folder, image(1))
    (folder / "notes.txt").write_text("no DICOM")
    (folder / "empty").touch()
    directory = image(2)
    directory.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    with (folder / "DICOMDIR").open("wb") as file:
        file.write(bytes(128) + b"DICM")
        write_file_meta_info(file, directory.file_meta)
    (folder / "no meta").write_bytes(bytes(128) + b"DICM" + encoded(image(3)))
    empty = image(4)
    empty.file_meta.MediaStorageSOPClassUID = ""
    with (folder / "empty meta").open("wb") as file:
        file.write(bytes(128) + b"DICM")
        write_file_meta_info(file, empty.file_meta, enforce_standard=False)
        file.write(encoded(image(4)))
    missing = folder / "missing.dcm"

    report = sent([folder, missing], receiver)

    assert [each.path.name for each in report.sent] == ["1.dcm"]
    skipped = {path.name: reason for path, reason in report.skipped}
    assert skipped == {
        "notes.txt": NO_DICOM,
        "empty": NO_DICOM,
        "DICOMDIR": "a DICOMDIR, not an instance",
        "no meta": "a DICOM file without MediaStorageSOPClassUID in its file meta information",
        "empty meta": "a DICOM file without MediaStorageSOPClassUID in its file meta information",
        "missing.dcm": "No such file or directory",
    }


def test_without_dicom_files_there_is_an_error_and_no_connection(tmp_path):
    (tmp_path / "notes.txt").write_text("no DICOM")
    with pytest.raises(PushError, match=rf"no DICOM files in {tmp_path} \(1 other"):
        push([tmp_path], ("127.0.0.1", 1), calling_ae="CT01", called_ae="SCANSIDE")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"address": ("127.0.0.1", 99999)}, "port: 99999 is above 65535"),
        ({"address": ("my host", 104)}, 'host: "my host" is not a host name or an IP address'),
        ({"called_ae": "A" * 17}, f'called AE title: "{"A" * 17}" is not an AE title: 1 to 16 ASCII characters'),
        ({"calling_ae": "A" * 17}, f'calling AE title: "{"A" * 17}" is not an AE title: 1 to 16 ASCII characters'),
    ],
)
def test_what_is_no_address_is_told_in_our_words(tmp_path, changed, message):
    paths = write(tmp_path, image(1))
    with pytest.raises(PushError) as caught:
        push(paths, **{"address": ("127.0.0.1", 1), "calling_ae": "CT01", "called_ae": "SCANSIDE"} | changed)
    assert str(caught.value).startswith(message)


def test_a_peer_that_is_not_there_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    paths = write(tmp_path, image(1))
    with pytest.raises(PeerError, match=rf"SCANSIDE at 127\.0\.0\.1:{port}.*refused"):
        push(paths, ("127.0.0.1", port), calling_ae="CT01", called_ae="SCANSIDE")


def test_a_rejection_is_told_with_its_reason(tmp_path, intake):
    paths = write(tmp_path / "scanner", image(1))
    with (
        receiving(tmp_path / "spool", intake, allowed_calling_aes=("OTHER",)) as receiver,
        pytest.raises(PeerError, match="rejected.*[Cc]alling AE title not recogni"),
    ):
        sent(paths, receiver)


def test_a_file_the_peer_has_no_context_for_fails_by_name_and_the_others_go(tmp_path, receiver):
    lossy = image(2, RLELossless)
    lossy.file_meta.TransferSyntaxUID = JPEG2000MC
    report = sent(write(tmp_path / "scanner", image(1), lossy, image(3)), receiver)
    assert [each.path.name for each in report.sent] == ["1.dcm", "3.dcm"]
    (failed,) = report.failed
    assert (failed.path.name, failed.status) == ("2.dcm", None)
    assert (
        failed.reason
        == "the peer does not accept CT Image Storage in JPEG 2000 Part 2 Multi-component Image Compression"
    )


def test_a_refusal_is_told_with_status_and_comment(tmp_path, intake):
    paths = write(tmp_path / "scanner", image(1))
    with receiving(tmp_path / "spool", intake, free_floor_gb=1e9) as receiver:
        report = sent(paths, receiver)
    assert report.sent == ()
    assert report.last_acknowledged is None
    assert report.response_ms(50) != report.response_ms(50)  # NaN
    (failed,) = report.failed
    assert failed.status == 0xA700
    assert failed.reason.startswith("0xA700 Failure Refused: Out of Resources: ")
    assert "below node.free_floor_gb" in failed.reason
    assert failed.response_ms > 0


def test_when_the_peer_breaks_off_every_file_is_accounted_for(tmp_path, receiver):
    paths = write(tmp_path / "scanner", *(image(number) for number in range(1, 7)))

    def stop_after_two(each):
        if each.path.name == "2.dcm":
            receiver.stop()

    report = sent(paths, receiver, on_slice=stop_after_two)
    assert [each.path.name for each in report.sent] == ["1.dcm", "2.dcm"]
    assert [each.path.name for each in report.failed] == ["3.dcm", "4.dcm", "5.dcm", "6.dcm"]
    assert all("the peer ended the association" in each.reason or "is gone" in each.reason for each in report.failed)


def test_an_answer_is_only_for_who_waits_for_it():
    answers = Answers()
    answers.put("answer")
    with pytest.raises(queue.Empty):
        answers.get(block=False)  # as pynetdicom's loop looks for requests
    assert answers.get(block=True, timeout=1) == "answer"
    with pytest.raises(queue.Empty):
        answers.get(timeout=0.01)


def test_an_error_of_the_listener_aborts(tmp_path, receiver, intake):
    def fail(_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sent(write(tmp_path / "scanner", image(1), image(2)), receiver, on_slice=fail)
    intake.wait(lambda intake: intake.ended() == [False])
    assert len(intake.stored()) == 1


@pytest.mark.skipif(shutil.which("storescp") is None, reason="storescp not installed: apt-get install dcmtk")
def test_dcmtk_receives_it_unchanged(tmp_path):
    archive = tmp_path / "archive"
    archive.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    paths = write(tmp_path / "scanner", *(image(number) for number in range(1, 6)))
    run = ["storescp", "--bit-preserving", "-od", str(archive), "+xa", str(port)]
    with subprocess.Popen(run, stdout=subprocess.DEVNULL) as process:
        try:
            _wait_for(port)
            report = push(paths, ("127.0.0.1", port), calling_ae="CT01", called_ae="ARCHIVE")
        finally:
            process.terminate()
    assert len(report.sent) == 5
    received = {data_set_of(path) for path in archive.iterdir()}
    assert received == {data_set_of(path) for path in paths}


def _wait_for(port):
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        else:
            return
