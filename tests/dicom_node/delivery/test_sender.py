"""The sender against archives that are well, down, choosy, silent or dying: everything arrives, in order."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import structlog
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLSLossless
from pynetdicom import AE, build_context, evt
from pynetdicom.association import Association
from pynetdicom.dimse_messages import DIMSEMessage
from pynetdicom.sop_class import (
    Comprehensive3DSRStorage,
    EncapsulatedSTLStorage,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
)

from dicom_node.configuration.sections import Destination
from dicom_node.delivery import outbox, sender
from dicom_node.delivery.outbox import DeliveryState, Outbox, OutboxItem
from dicom_node.delivery.sender import Sender
from dicom_node.monitoring.trail import Trail
from dicom_node.network import requestor
from dicom_node.network.requestor import PeerError, associate
from dicom_node.network.wire import PromptSocket
from dicom_node.storage.journal import Journal, JournalError, ResultFile, SeriesState

# pynetdicom does not close the socket of a connection that was refused; it is collected at once
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

DEADLINE_S = 30.0
SOP_CLASS = {"sr": Comprehensive3DSRStorage, "sc": SecondaryCaptureImageStorage, "seg": SegmentationStorage}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    """What takes seconds in a hospital takes milliseconds here."""
    monkeypatch.setattr(outbox, "FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(outbox, "LONGEST_WAIT_S", 0.1)
    monkeypatch.setattr(outbox, "ATTEMPTS_BEFORE_PARKING", 3)
    for name in ("CONNECT_TIMEOUT_S", "ACSE_TIMEOUT_S", "DIMSE_TIMEOUT_S"):
        monkeypatch.setattr(requestor, name, 3.0)


@pytest.fixture(autouse=True)
def _no_threads_left():
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("sender-")] == []


@pytest.fixture
def journal(tmp_path):
    with contextlib.closing(Journal(tmp_path / "journal.sqlite")) as opened:
        yield opened


class Archive:
    """A storage SCP that keeps what it gets, and answers as told."""

    def __init__(self, *, classes=None, syntaxes=(ExplicitVRLittleEndian,), answer=lambda _: 0x0000):
        self.received: list[Dataset] = []
        self.associations = self.released = 0
        self.open: set[Association] = set()
        self.on: list[int] = []  # which of them each object came
        self._answer = answer
        self._ae = AE("ARCHIVE")
        for sop_class in SOP_CLASS.values() if classes is None else classes:
            self._ae.add_supported_context(sop_class, list(syntaxes))
        self._ae.add_supported_context("1.2.840.10008.1.1")
        self._server = None

    def start(self, port: int = 0) -> int:
        handlers = [
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_ESTABLISHED, self._count),
            (evt.EVT_RELEASED, self._discount),
        ]
        self._server = self._ae.make_server(("127.0.0.1", port), evt_handlers=handlers)
        # as `AE.start_server` does it, which takes half a second to stop
        self._ae._servers.append(self._server)
        threading.Thread(target=self._server.serve_forever, args=(0.01,)).start()
        return self._server.socket.getsockname()[1]

    def stop(self) -> None:
        self._ae.shutdown()

    @property
    def uids(self) -> list[str]:
        return [dataset.SOPInstanceUID for dataset in self.received]

    def cut(self) -> None:
        """End all associations."""
        for association in self.open:
            association.abort()

    def _count(self, event) -> None:
        self.associations += 1
        self.open.add(event.assoc)

    def _discount(self, event) -> None:
        self.released += 1
        self.open.discard(event.assoc)

    def _store(self, event) -> int:
        status = self._answer(event)
        if status in (0x0000, 0xB000):
            dataset = event.dataset
            dataset.file_meta = event.file_meta
            self.received.append(dataset)
            self.on.append(self.associations)
        return status


@pytest.fixture
def serve():
    """Starts archives; stops them at the end."""
    with contextlib.ExitStack() as stack:

        def start(archive: Archive, port: int = 0) -> int:
            stack.callback(archive.stop)
            return archive.start(port)

        yield start


@pytest.fixture
def run(journal):
    """Starts senders; stops them at the end. Gives the list that `on_sent` fills."""
    with contextlib.ExitStack() as stack:

        def start(*destinations: Destination) -> tuple[Sender, list[str]]:
            sent = []
            running = Sender(
                Outbox(journal), destinations, "NODE", lambda item: sent.append((item.destination, item.sop_uid))
            )
            stack.callback(running.stop)
            running.start()
            return running, sent

        yield start


@pytest.fixture
def owe(journal, tmp_path):
    """Records a series with an SR, an SC and a SEG for each destination; gives their UIDs in the order of sending."""

    def record(series_uid: str, *destinations: str, syntax: str = ExplicitVRLittleEndian, size: int = 64) -> list[str]:
        files = []
        for role in ("seg", "sr", "sc"):
            path = tmp_path / f"{series_uid}.{role}.dcm"
            write(path, SOP_CLASS[role], f"{series_uid}.{len(role) + ord(role[1])}", syntax, size)
            files.append(ResultFile(role, path, SOP_CLASS[role], f"{series_uid}.{len(role) + ord(role[1])}"))
        journal.record_result(
            "1.2", series_uid, 1, state=SeriesState.ANALYSED, reason=None, slices=9, report_json="{}",
            files=files, destinations=dict.fromkeys(destinations, ("sr", "sc", "seg")),
        )  # fmt: skip
        by_role = {file.role: file.sop_uid for file in files}
        return [by_role[role] for role in ("sr", "sc", "seg")]

    return record


def write(path: Path, sop_class: str, sop_uid: str, syntax: str, size: int) -> None:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, sop_uid
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2", "1.2.3"
    dataset.PatientName, dataset.PatientID = "Nobody^Known", "0"
    dataset.add_new(0x00420011, "OB", b"\1" * size)
    dataset.save_as(path, enforce_file_format=True)


def to(port: int, name: str = "pacs") -> Destination:
    return Destination(name=name, ae_title="ARCHIVE", host="127.0.0.1", port=port)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wait_for(condition, deadline_s: float = DEADLINE_S) -> None:
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def all_in(journal: Journal, state: DeliveryState, destination: str = "pacs"):
    return lambda: {item.state for item in Outbox(journal).items() if item.destination == destination} == {state}


def test_a_series_goes_out_over_one_association_in_order_and_unchanged(journal, serve, run, owe, tmp_path):
    archive = Archive()
    running, sent = run(to(serve(archive)))
    expected = owe("1.1", "pacs")
    running.wake()
    wait_for(all_in(journal, DeliveryState.SENT))
    wait_for(lambda: len(sent) == 3)
    assert archive.uids == expected
    assert archive.associations == 1
    assert sent == [("pacs", uid) for uid in expected]
    for received, role in zip(archive.received, ("sr", "sc", "seg"), strict=True):
        assert received == dcmread(tmp_path / f"1.1.{role}.dcm")
        assert received.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian


def test_results_that_are_expected_go_over_an_association_that_is_open_already(journal, serve, run, owe):
    archive = Archive()
    running, _ = run(to(serve(archive)))
    running.expect()
    wait_for(lambda: archive.associations == 1)
    expected = owe("1.1", "pacs")
    running.wake()
    wait_for(all_in(journal, DeliveryState.SENT))
    assert (archive.uids, archive.associations) == (expected, 1)
    wait_for(lambda: not archive.open)


def test_an_association_for_results_that_never_come_is_released(serve, run, monkeypatch):
    monkeypatch.setattr(sender, "AHEAD_S", 0.2)
    archive = Archive()
    running, _ = run(to(serve(archive)))
    running.expect()
    wait_for(lambda: archive.associations == 1)
    wait_for(lambda: archive.released == 1)
    time.sleep(0.1)
    assert archive.associations == 1, "nothing is expected any more"


def test_a_sender_that_stops_lets_go_of_the_association_for_what_it_expects(serve, run):
    archive = Archive()
    running, _ = run(to(serve(archive)))
    running.expect()
    wait_for(lambda: archive.associations == 1)
    running.stop()
    wait_for(lambda: archive.released == 1)


def test_an_association_that_the_peer_has_ended_meanwhile_costs_no_attempt(journal, serve, run, owe):
    archive = Archive()
    running, _ = run(to(serve(archive)))
    running.expect()
    wait_for(lambda: archive.associations == 1)
    archive.cut()
    wait_for(lambda: not any(thread.name.startswith("RequestorThread") for thread in threading.enumerate()))
    expected = owe("1.1", "pacs")
    running.wake()
    wait_for(all_in(journal, DeliveryState.SENT))
    assert (archive.uids, archive.associations) == (expected, 2)
    assert [(item.tries, item.attempts) for item in Outbox(journal).items()] == [(1, 0)] * 3


def test_what_nobody_expected_gets_an_association_of_its_own(journal, serve, run, owe, tmp_path):
    archive = Archive(classes=[*SOP_CLASS.values(), EncapsulatedSTLStorage])
    running, _ = run(to(serve(archive)))
    running.expect()
    wait_for(lambda: archive.associations == 1)
    write(tmp_path / "model.dcm", EncapsulatedSTLStorage, "1.9", ExplicitVRLittleEndian, 64)
    journal.record_result(
        "1.2", "1.1", 1, state=SeriesState.ANALYSED, reason=None, slices=9, report_json="{}",
        files=[ResultFile("seg", tmp_path / "model.dcm", EncapsulatedSTLStorage, "1.9")],
        destinations={"pacs": ("seg",)},
    )  # fmt: skip
    running.wake()
    wait_for(all_in(journal, DeliveryState.SENT))
    assert (archive.uids, archive.associations, archive.on) == (["1.9"], 2, [2])
    assert [(item.tries, item.attempts) for item in Outbox(journal).items()] == [(1, 0)]
    wait_for(lambda: archive.released == 2)


def test_who_gets_some_decisions_only_is_not_connected_to_for_nothing(serve, run):
    choosy, archive = Archive(), Archive()
    some = Destination(name="some", ae_title="ARCHIVE", host="127.0.0.1", port=serve(choosy), levels=("critical",))
    running, _ = run(some, to(serve(archive)))
    running.expect()
    wait_for(lambda: archive.associations == 1)
    assert choosy.associations == 0


def test_a_peer_that_is_away_when_results_are_expected_gets_them_when_it_is_back(journal, serve, run, owe, monkeypatch):
    tried = threading.Event()

    def associate(*arguments, work=requestor.associate, **options):
        try:
            return work(*arguments, **options)
        finally:
            tried.set()

    monkeypatch.setattr(sender, "associate", associate)
    port = free_port()
    running, _ = run(to(port))
    with structlog.testing.capture_logs() as logs:
        running.expect()
        assert tried.wait(DEADLINE_S)
        archive = Archive()
        serve(archive, port)
        expected = owe("1.1", "pacs")
        running.wake()
        wait_for(all_in(journal, DeliveryState.SENT))
    assert archive.uids == expected
    assert {entry["event"] for entry in logs} == {"result_sent"}, "an attempt ahead that fails is nobody's loss"


def test_who_expects_again_and_again_holds_no_association_for_long(serve, run, monkeypatch):
    monkeypatch.setattr(sender, "AHEAD_S", 0.3)
    archive = Archive()
    running, _ = run(to(serve(archive)))
    deadline = time.monotonic() + DEADLINE_S
    while archive.released < 2:
        assert time.monotonic() < deadline, "it is held as long as results are expected"
        running.expect()
        time.sleep(0.02)


def test_a_journal_that_is_away_holds_no_association(serve, run, monkeypatch):
    archive = Archive()
    running, _ = run(to(serve(archive)))
    running.expect()
    wait_for(lambda: archive.associations == 1)

    def away(*_: object) -> None:
        raise JournalError("away")

    monkeypatch.setattr(Outbox, "claim", away)
    running.wake()
    wait_for(lambda: archive.released == 1)
    monkeypatch.undo()


def test_what_an_archive_has_is_audited_as_sent_where_the_journal_can_not_note_it(journal, serve, owe, monkeypatch):
    """And is sent once more: of what the journal does not know the archive may have nothing."""
    archive, outbox, told, marked = Archive(), Outbox(journal), [], []
    note = outbox.mark_sent

    def away_once(item_id: int, **how: bool) -> None:
        marked.append(item_id)
        if len(marked) == 1:
            raise JournalError("away")
        note(item_id, **how)

    class Told(Trail):
        def sent(self, _: Destination, items: Sequence[OutboxItem], failure: str = "") -> None:
            told.extend((item.role, failure) for item in items)

    monkeypatch.setattr(outbox, "mark_sent", away_once)
    expected = owe("1.1", "pacs")
    running = Sender(outbox, [to(serve(archive))], "NODE", trail=Told())
    running.start()
    wait_for(lambda: all(item.state is DeliveryState.SENT for item in outbox.items()))
    running.stop()
    assert archive.uids == [expected[0], *expected]
    sent, not_taken = ([role for role, why in told if why == failure] for failure in ("", "not taken"))
    assert sent == ["sr", "sr", "sc", "seg"]
    assert not_taken == ["sc", "seg"]


def test_an_archive_that_takes_no_masks_gets_the_rest_at_once(journal, serve, run, owe):
    archive = Archive(classes=[Comprehensive3DSRStorage, SecondaryCaptureImageStorage])
    running, _ = run(to(serve(archive)))
    running.expect()
    wait_for(lambda: archive.associations == 1)
    expected = owe("1.1", "pacs")
    running.wake()
    wait_for(lambda: archive.uids == expected[:2])
    assert archive.on == [1, 1]
    wait_for(lambda: Outbox(journal).items()[2].state is DeliveryState.PARKED)


def test_results_that_come_while_others_go_are_still_expected(journal, serve, run, owe):
    """A series closes while the results of another are on their way: its own go over another association ahead."""
    first, go_on = threading.Event(), threading.Event()

    def answer(_):
        first.set()
        return 0x0000 if go_on.wait(DEADLINE_S) else 0xA700

    archive = Archive(answer=answer)
    running, _ = run(to(serve(archive)))
    running.expect()
    wait_for(lambda: archive.associations == 1)
    owe("1.1", "pacs")
    running.wake()
    assert first.wait(DEADLINE_S)
    running.expect()
    go_on.set()
    wait_for(lambda: archive.associations == 2)
    owe("1.2", "pacs")
    running.wake()
    wait_for(all_in(journal, DeliveryState.SENT))
    assert archive.on == [1, 1, 1, 2, 2, 2]


def test_results_that_are_here_already_are_not_expected_any_more(journal, serve, owe):
    """They go at once, over an association of their own: one ahead would be for nothing."""
    archive = Archive()
    owe("1.1", "pacs")
    held = Sender(Outbox(journal), [to(serve(archive))], "NODE")
    held.expect()
    held.start()
    try:
        wait_for(all_in(journal, DeliveryState.SENT))
        wait_for(lambda: archive.released == 1)
        time.sleep(0.2)
    finally:
        held.stop()
    assert archive.associations == 1


def test_an_association_ahead_to_who_has_moved_is_released(journal, serve, run, owe):
    archive, elsewhere = Archive(), Archive()
    running, _ = run(to(serve(archive)))
    running.expect()
    wait_for(lambda: archive.associations == 1)
    running.reload([to(serve(elsewhere))])
    wait_for(lambda: archive.released == 1)
    expected = owe("1.1", "pacs")
    running.wake()
    wait_for(all_in(journal, DeliveryState.SENT))
    assert (archive.uids, elsewhere.uids) == ([], expected)


def test_what_is_owed_at_the_start_goes_out_without_a_wake(journal, serve, run, owe):
    owe("1.1", "pacs")
    run(to(serve(Archive())))
    wait_for(all_in(journal, DeliveryState.SENT))


def test_waking_is_immediate(journal, serve, run, owe, monkeypatch):
    monkeypatch.setattr(sender, "LONGEST_SLEEP_S", 3600.0)
    owe("1.1", "pacs")
    running, sent = run(to(serve(Archive())))
    for number in range(2, 12):  # whether it comes before, in or after a look at the journal
        wait_for(lambda: len(sent) >= 3 * (number - 1))  # noqa: B023 (waits here, in this turn)
        owe(f"1.{number}", "pacs")
        running.wake()
    wait_for(lambda: len(sent) == 33)


def test_with_nothing_to_do_it_sleeps(serve, tmp_path):
    busy = threading.Event()

    class Counted(Outbox):
        looks = 0

        def claim(self, destination, now):
            self.looks += 1
            if self.looks > 20:
                busy.set()
            return super().claim(destination, now)

    with contextlib.closing(Journal(tmp_path / "counted.sqlite")) as journal:
        idle = Sender(Counted(journal), [to(serve(Archive()))], "NODE")
        idle.start()
        idle.wake()
        assert not busy.wait(0.5)
        idle.stop()


def test_a_retry_by_another_process_is_seen_without_a_wake(journal, serve, run, owe, monkeypatch):
    monkeypatch.setattr(sender, "LONGEST_SLEEP_S", 0.05)
    owe("1.1", "pacs")
    for item in Outbox(journal).items():
        Outbox(journal).park(item.id, "by hand")
    _, sent = run(to(serve(Archive())))
    Outbox(journal).retry()
    wait_for(lambda: len(sent) == 3)


def test_a_destination_that_is_down_gets_everything_once_and_in_order_when_it_is_back(journal, serve, run, owe):
    port = free_port()
    first = owe("1.1", "pacs")
    running, sent = run(to(port))
    wait_for(all_in(journal, DeliveryState.WAITING))
    second = owe("1.2", "pacs")
    running.wake()
    wait_for(all_in(journal, DeliveryState.WAITING))
    assert {item.last_error for item in Outbox(journal).items()} == {
        f"pacs (ARCHIVE at 127.0.0.1:{port}): Connection refused"
    }
    assert {item.attempts for item in Outbox(journal).items()} == {0}
    assert min(item.tries for item in Outbox(journal).items()) >= 1

    archive = Archive()
    serve(archive, port)
    wait_for(lambda: len(sent) == 6)
    assert archive.uids == first + second
    assert archive.associations == 1
    assert all_in(journal, DeliveryState.SENT)()


def test_an_archive_that_was_down_for_200_studies_gets_each_result_once_over_one_association(journal, serve, run, owe):
    port = free_port()
    expected = [uid for number in range(200) for uid in owe(f"1.{number}", "pacs")]
    run(to(port))
    wait_for(all_in(journal, DeliveryState.WAITING))
    archive = Archive()
    serve(archive, port)
    wait_for(all_in(journal, DeliveryState.SENT), 120)
    assert archive.uids == expected
    assert archive.associations == 1


def test_a_slow_archive_delays_no_other_and_is_waited_for(journal, serve, run, owe):
    def answer(_event) -> int:
        time.sleep(0.5)
        return 0x0000

    slow, quick = Archive(answer=answer), Archive()
    expected = [uid for number in (1, 2) for uid in owe(f"1.{number}", "pacs", "other")]
    run(to(serve(slow)), to(serve(quick), "other"))
    wait_for(all_in(journal, DeliveryState.SENT, "other"))
    assert len(slow.uids) < len(expected)
    wait_for(all_in(journal, DeliveryState.SENT))
    assert slow.uids == quick.uids == expected


def test_a_new_result_takes_along_what_waits(journal, serve, run, owe, monkeypatch):
    monkeypatch.setattr(outbox, "FIRST_WAIT_S", 3600.0)
    monkeypatch.setattr(outbox, "LONGEST_WAIT_S", 250.0)
    port = free_port()
    first = owe("1.1", "pacs")
    running, sent = run(to(port))
    wait_for(all_in(journal, DeliveryState.WAITING))
    archive = Archive()
    serve(archive, port)
    second = owe("1.2", "pacs")
    running.wake()
    wait_for(lambda: len(sent) == 6)
    assert archive.uids == first + second


def test_a_dead_destination_delays_no_other(journal, serve, run, owe, monkeypatch):
    """The dead one listens and never says a word: its association can only time out."""
    monkeypatch.setattr(requestor, "ACSE_TIMEOUT_S", 1.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        owe("1.1", "dead", "pacs")
        _, sent = run(to(silent.getsockname()[1], "dead"), to(serve(Archive())))
        wait_for(lambda: len(sent) == 3)
        assert all_in(journal, DeliveryState.SENDING, "dead")()
        wait_for(all_in(journal, DeliveryState.WAITING, "dead"))
        assert "something listens" in Outbox(journal).items()[0].last_error


def test_a_refused_sop_class_parks_its_object_and_nothing_else(journal, serve, run, owe):
    port = free_port()
    choosy = Archive(classes=[SOP_CLASS["sr"], SOP_CLASS["sc"]])
    choosy.start(port)
    expected = owe("1.1", "pacs")
    with structlog.testing.capture_logs() as logs:
        running, sent = run(to(port))
        wait_for(lambda: Outbox(journal).items()[2].state is DeliveryState.PARKED)
    assert choosy.uids == expected[:2]
    assert Outbox(journal).items()[2].attempts == 3
    assert "Segmentation Storage" in Outbox(journal).items()[2].last_error
    [loud] = [entry for entry in logs if entry["event"] == "result_parked"]
    assert loud["log_level"] == "error"
    assert "outbox retry 3" in loud["remedy"]

    choosy.stop()
    generous = Archive()
    serve(generous, port)
    Outbox(journal).retry()
    running.wake()
    wait_for(lambda: len(sent) == 3)
    assert generous.uids == expected[2:]


def test_a_peer_that_refuses_every_context(journal, serve, run, owe):
    owe("1.1", "pacs")
    run(to(serve(Archive(classes=[]))))
    wait_for(all_in(journal, DeliveryState.PARKED))
    assert "accepts none of: Comprehensive 3D SR Storage" in Outbox(journal).items()[0].last_error


@pytest.mark.parametrize("status", [0x0117, 0x0122, 0x0124, 0xA900, 0xA9FF])
def test_a_final_status_parks(journal, serve, run, owe, status):
    archive = Archive(
        answer=lambda event: status if event.request.AffectedSOPClassUID == SegmentationStorage else 0x0000
    )
    expected = owe("1.1", "pacs")
    run(to(serve(archive)))
    wait_for(lambda: Outbox(journal).items()[2].state is DeliveryState.PARKED)
    assert archive.uids == expected[:2]
    assert Outbox(journal).items()[2].last_error.startswith(f"0x{status:04X} Failure")


@pytest.mark.parametrize("status", [0xA700, 0x0110, 0xC000, 0xFE00, 0xFF00])
def test_another_failure_is_tried_again_for_ever(journal, serve, run, owe, status):
    refusals = iter([status] * (2 * outbox.ATTEMPTS_BEFORE_PARKING))
    archive = Archive(
        answer=lambda event: (
            next(refusals, 0) if event.request.AffectedSOPClassUID == Comprehensive3DSRStorage else 0x0000
        )
    )
    sr, sc, seg = owe("1.1", "pacs")
    run(to(serve(archive)))
    wait_for(all_in(journal, DeliveryState.SENT))
    assert archive.uids == [sc, seg, sr]
    assert Outbox(journal).items()[0].attempts == 2 * outbox.ATTEMPTS_BEFORE_PARKING


@pytest.mark.parametrize("status", [0xB000, 0xB006, 0xB007, 0xBFFF, 0x0107])
def test_a_warning_is_a_delivery_that_is_logged(journal, serve, run, owe, status):
    owe("1.1", "pacs")
    with structlog.testing.capture_logs() as logs:
        run(to(serve(Archive(answer=lambda _: status))))
        wait_for(all_in(journal, DeliveryState.SENT))
        wait_for(lambda: len(logs) == 3)
    assert {entry["log_level"] for entry in logs} == {"warning"}
    assert f"0x{status:04X} Warning" in logs[0]["status"]
    assert not any("Nobody" in str(entry) for entry in logs)


def test_a_peer_that_takes_only_the_default_transfer_syntax(journal, serve, run, owe, tmp_path):
    archive = Archive(syntaxes=[ImplicitVRLittleEndian])
    owe("1.1", "pacs")
    run(to(serve(archive)))
    wait_for(all_in(journal, DeliveryState.SENT))
    assert archive.received[0].file_meta.TransferSyntaxUID == ImplicitVRLittleEndian
    assert archive.received[0].PatientName == dcmread(tmp_path / "1.1.sr.dcm").PatientName


def test_compressed_pixels_are_proposed_as_they_are_only(journal, serve, run, owe):
    archive = Archive(syntaxes=[ImplicitVRLittleEndian, ExplicitVRLittleEndian])
    owe("1.1", "pacs", syntax=JPEGLSLossless)
    run(to(serve(archive)))
    wait_for(all_in(journal, DeliveryState.PARKED))
    assert archive.received == []


def test_a_rejected_association_says_why(serve):
    archive = Archive()
    archive._ae.require_called_aet = True
    port = serve(archive)
    stranger = Destination(name="pacs", ae_title="SOMEONE", host="127.0.0.1", port=port)
    with pytest.raises(
        PeerError, match=r"rejected the association of NODE \(Rejected Permanent\): Called AE title not recognised"
    ):
        associate(stranger, "NODE", [build_context(SegmentationStorage)])


def test_a_rejection_that_is_faster_than_pynetdicom_looks_says_why(serve):
    archive = Archive()
    archive._ae.require_called_aet = True
    stranger = Destination(name="pacs", ae_title="SOMEONE", host="127.0.0.1", port=serve(archive))
    closed = threading.Event()
    late = [(evt.EVT_CONN_CLOSE, lambda _: closed.set()), (evt.EVT_REQUESTED, lambda _: closed.wait(DEADLINE_S))]
    with pytest.raises(PeerError, match="Called AE title not recognised"):
        associate(stranger, "NODE", [build_context(SegmentationStorage)], handlers=late)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "something listens, but cuts the connection; is it a DICOM port, and without TLS?"),
        (b"\7\0\0\0\0\4\0\0\2\0", "aborted the association of NODE before it was open"),
    ],
)
def test_a_peer_that_hangs_up_at_once_is_told_from_one_that_is_silent(answer, reason):
    def serve(server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:  # it is called again to see why
                with server.accept()[0] as connection:
                    connection.recv(1 << 16)
                    connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        with pytest.raises(PeerError) as caught:
            associate(to(server.getsockname()[1]), "NODE", [build_context(SegmentationStorage)])
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert reason in str(caught.value)


def test_a_host_that_has_no_address(monkeypatch):
    def no_such_name(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_such_name)
    with pytest.raises(PeerError, match="Name or service not known"):
        associate(to(104), "NODE", [build_context(SegmentationStorage)])


def damaged(path: Path) -> None:
    path.write_bytes(b"no DICOM" * 100)


def of_another_object(path: Path) -> None:
    write(path, SegmentationStorage, "9.9.9", ExplicitVRLittleEndian, 64)


def cut_in_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:150])


def of_no_known_vr(path: Path) -> None:
    """For which pydicom raises NotImplementedError."""
    path.write_bytes(path.read_bytes().replace(b"UI", b"QQ"))


def of_no_known_vr_in_the_data_set(path: Path) -> None:
    head, middle, tail = path.read_bytes().partition(b"\x08\x00\x16\x00UI")
    path.write_bytes(head + middle.replace(b"UI", b"QQ") + tail)


def cut_in_the_pixels(path: Path) -> None:
    dataset = dcmread(path)
    dataset.add_new("PixelData", "OB", bytes(1000))
    dataset.save_as(path)
    path.write_bytes(path.read_bytes()[:-500])


@pytest.mark.parametrize(
    "spoil",
    [
        Path.unlink,
        damaged,
        cut_in_the_pixels,
        of_another_object,
        cut_in_the_header,
        of_no_known_vr,
        of_no_known_vr_in_the_data_set,
        lambda path: path.write_bytes(b""),
    ],
)
@pytest.mark.parametrize("is_ahead", [False, True], ids=["", "ahead"])
def test_a_file_that_is_gone_or_damaged_parks_and_the_rest_goes(journal, serve, run, owe, spoil, is_ahead):
    archive = Archive()
    port = serve(archive)
    if is_ahead:
        running, _ = run(to(port))
        running.expect()
        wait_for(lambda: archive.associations == 1)
    expected = owe("1.1", "pacs")
    spoil(Outbox(journal).items()[0].path)
    if is_ahead:
        running.wake()
    else:
        run(to(port))
    wait_for(lambda: Outbox(journal).items()[0].state is DeliveryState.PARKED)
    assert archive.uids == expected[1:]
    assert "1.1.sr.dcm" in Outbox(journal).items()[0].last_error


def test_what_cannot_be_read_to_its_end_ends_the_association_and_goes_later(journal, serve, run, owe, monkeypatch):
    """The peer has got the beginning of a message: nothing else may follow on that association."""
    archive = Archive()
    expected = owe("1.1", "pacs")
    encode, failures = DIMSEMessage.encode_msg, [OSError(5, "Input/output error")]

    def failing(self, *arguments):
        for number, part in enumerate(encode(self, *arguments)):
            if number == 1 and failures:
                raise failures.pop()
            yield part

    monkeypatch.setattr(DIMSEMessage, "encode_msg", failing)
    run(to(serve(archive)))
    wait_for(all_in(journal, DeliveryState.SENT))
    assert sorted(archive.uids) == sorted(expected)
    assert 1 not in archive.on


def test_a_peer_that_hangs_up_in_the_middle_gets_the_rest_first(journal, serve, run, owe):
    """A peer that dies of one object must not be kept from all the others."""
    deaths = iter([True, True])

    def answer(event):
        if event.request.AffectedSOPClassUID == Comprehensive3DSRStorage and next(deaths, False):
            event.assoc.abort()
        return 0x0000

    archive = Archive(answer=answer)
    owe("1.1", "pacs")
    run(to(serve(archive)))
    wait_for(all_in(journal, DeliveryState.SENT))
    assert [item.attempts for item in Outbox(journal).items()] == [2, 0, 0]
    assert archive.associations == 3


def test_a_peer_that_never_answers_a_store(journal, serve, run, owe, monkeypatch):
    monkeypatch.setattr(requestor, "DIMSE_TIMEOUT_S", 0.3)
    answered = threading.Event()
    archive = Archive(answer=lambda _: answered.wait(DEADLINE_S) and 0x0000)
    owe("1.1", "pacs")
    run(to(serve(archive)))
    try:
        wait_for(lambda: Outbox(journal).items()[0].attempts == 1)
        assert "no answer within 0.3 s" in Outbox(journal).items()[0].last_error
    finally:
        answered.set()
    wait_for(all_in(journal, DeliveryState.SENT))


def relay_until_the_data_comes(server: socket.socket, upstream_port: int, enough: threading.Event) -> None:
    """Let one association be made, then read nothing more: the sender's buffers fill up."""
    with contextlib.suppress(OSError):
        client, _ = server.accept()
        with client, socket.create_connection(("127.0.0.1", upstream_port)) as upstream:
            for source, sink in ((client, upstream), (upstream, client)):
                head = source.recv(6, socket.MSG_WAITALL)
                sink.sendall(head + source.recv(int.from_bytes(head[2:], "big"), socket.MSG_WAITALL))
            enough.wait(DEADLINE_S)


def test_a_peer_that_stops_reading(journal, serve, run, owe, monkeypatch):
    monkeypatch.setattr(requestor, "DIMSE_TIMEOUT_S", 0.5)
    enough = threading.Event()
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        server.bind(("127.0.0.1", 0))
        server.listen()
        relay = threading.Thread(target=relay_until_the_data_comes, args=(server, serve(Archive()), enough))
        relay.start()
        owe("1.1", "pacs", size=16_000_000)
        run(to(server.getsockname()[1]))
        try:
            wait_for(lambda: Outbox(journal).items()[0].attempts == 1)
            wait_for(lambda: not any(thread.name.startswith("RequestorThread") for thread in threading.enumerate()))
        finally:
            enough.set()
            relay.join()


def test_a_bug_in_on_sent_does_not_end_delivery(journal, serve, owe):
    def explode(item):
        raise KeyError("a bug")

    expected = owe("1.1", "pacs")
    archive = Archive()
    running = Sender(Outbox(journal), [to(serve(archive))], "NODE", explode)
    with structlog.testing.capture_logs() as logs:
        running.start()
        wait_for(all_in(journal, DeliveryState.SENT))
        running.stop()
    assert archive.uids == expected
    assert "delivery_failed" in [entry["event"] for entry in logs]


def test_stopping_leaves_the_rest_for_the_next_start(journal, serve, run, owe):
    first_came, go_on = threading.Event(), threading.Event()

    def answer(event):
        first_came.set()
        go_on.wait(DEADLINE_S)
        return 0x0000

    archive = Archive(answer=answer)
    expected = owe("1.1", "pacs")
    destination = to(serve(archive))
    running = Sender(Outbox(journal), [destination], "NODE")
    running.start()
    assert first_came.wait(DEADLINE_S)
    stopping = threading.Thread(target=running.stop)
    stopping.start()
    wait_for(lambda: running._couriers[0]._stopping)
    go_on.set()
    stopping.join(DEADLINE_S)
    assert archive.uids == expected[:1]
    assert [item.state.value for item in Outbox(journal).items()] == ["sent", "waiting", "waiting"]
    run(destination)
    wait_for(all_in(journal, DeliveryState.SENT))
    assert archive.uids == expected


def test_a_destination_that_moves_gets_at_once_what_waits_for_it(journal, serve, run, owe, monkeypatch):
    monkeypatch.setattr(outbox, "FIRST_WAIT_S", 200.0)
    monkeypatch.setattr(outbox, "LONGEST_WAIT_S", 200.0)
    archive = Archive()
    expected = owe("1.1", "pacs")
    running, _ = run(to(free_port()))
    wait_for(all_in(journal, DeliveryState.WAITING))
    running.reload([to(serve(archive))])
    wait_for(all_in(journal, DeliveryState.SENT))
    assert archive.uids == expected


def test_a_destination_that_goes_and_comes_back_gets_everything_once(journal, serve, run, owe):
    """It goes while an object is on the wire, and is back, changed, before that has an answer: never two at once."""
    asked, answered = threading.Event(), threading.Event()

    def answer(_event) -> int:
        asked.set()
        assert answered.wait(DEADLINE_S)
        return 0x0000

    archive, other = Archive(answer=answer), Archive()
    port, elsewhere = serve(archive), serve(other)
    expected = owe("1.1", "pacs")
    owe("1.2", "other")
    running, _ = run(to(port), to(elsewhere, "other"))
    assert asked.wait(DEADLINE_S)
    kept = running._couriers[1]
    running.reload([to(elsewhere, "other")])
    running.reload([to(port).model_copy(update={"ae_title": "MOVED"}), to(elsewhere, "other")])
    assert running._couriers[1] is kept
    assert archive.associations == 1
    answered.set()
    wait_for(all_in(journal, DeliveryState.SENT))
    wait_for(all_in(journal, DeliveryState.SENT, "other"))
    assert archive.uids == expected
    assert archive.associations == 2


def test_stopping_what_was_never_started(journal):
    Sender(Outbox(journal), [to(104)], "NODE").stop()


def test_a_destination_that_left_the_configuration_is_named(journal, run, owe):
    owe("1.1", "gone")
    with structlog.testing.capture_logs() as logs:
        run()
    assert [(entry["event"], entry["destination"]) for entry in logs] == [("destination_not_configured", "gone")]


def test_killed_between_the_peer_s_success_and_the_journal_s(journal, serve, run, owe, tmp_path):
    """Delivery is at least once: the same object twice, under the same SOP Instance UID."""
    archive = Archive()
    expected = owe("1.1", "pacs")
    port = serve(archive)
    script = textwrap.dedent(f"""
        import os, signal, sys
        from pathlib import Path
        from dicom_node.configuration.sections import Destination
        from dicom_node.storage.journal import Journal
        from dicom_node.delivery.outbox import Outbox
        from dicom_node.delivery.sender import Sender

        class Dying(Outbox):
            def mark_sent(self, item_id, *, confirm=False):
                os.kill(os.getpid(), signal.SIGKILL)

        outbox = Dying(Journal(Path(sys.argv[1])))
        Sender(outbox, [Destination(name="pacs", ae_title="ARCHIVE", host="127.0.0.1", port={port})], "NODE").start()
        signal.pause()
    """)
    killed = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "journal.sqlite")], timeout=DEADLINE_S, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert archive.uids == expected[:1]
    assert all_in(journal, DeliveryState.SENDING)()

    run(to(port))
    wait_for(all_in(journal, DeliveryState.SENT))
    assert archive.uids == expected[:1] + expected


@pytest.mark.skipif(shutil.which("storescp") is None, reason="storescp not installed: apt-get install dcmtk")
def test_dcmtk_takes_it(journal, run, owe, tmp_path):
    port = free_port()
    folder = tmp_path / "received"
    folder.mkdir()
    peer = subprocess.Popen(["storescp", "--output-directory", str(folder), str(port)])
    try:
        owe("1.1", "pacs", size=300_000)
        run(to(port))  # it may not listen yet: then the sender waits for it, too
        wait_for(all_in(journal, DeliveryState.SENT))
    finally:
        peer.terminate()
        peer.wait()
    received = {dataset.SOPInstanceUID: dataset for dataset in map(dcmread, folder.iterdir())}
    for item in Outbox(journal).items():
        assert received[item.sop_uid] == dcmread(item.path)


def test_the_connection_is_prompt_and_has_a_timeout(serve):
    association = associate(to(serve(Archive())), "NODE", [build_context(SegmentationStorage)])
    wire = association.dul.socket.socket
    assert wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert wire.gettimeout() == requestor.DIMSE_TIMEOUT_S
    assert isinstance(wire, PromptSocket)
    association.release()


def test_the_back_off():
    assert [outbox.back_off_s(n) for n in (1, 2, 3, 50)] == [0.02, 0.04, 0.08, 0.1]
