"""The whole way: a scanner's push in, results in the archive, whatever dies in between."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.uid import Comprehensive3DSRStorage, CTImageStorage, SecondaryCaptureImageStorage, SegmentationStorage
from pynetdicom import AE
from structlog.testing import capture_logs

from dicom_node import node as nodes
from dicom_node.assembler import Assembler, Assembly
from dicom_node.configuration.sections import Scanner
from dicom_node.configuration.toml import show
from dicom_node.delivery.outbox import Outbox
from dicom_node.images.gate import Reason
from dicom_node.node import Node
from dicom_node.simulation.pacs import Pacs
from dicom_node.simulation.scanner import push
from dicom_node.status import look
from dicom_node.storage.journal import Journal, JournalError, SeriesState
from dicom_node.storage.lock import LockedError
from dicom_node.supervisor import Supervisor
from tests.dicom_node.conftest import PATIENCE_S, Pushable, config_for, running, wait_until

CORPUS = Path(__file__).parents[3] / "shared" / "corpus"
real_head = pytest.mark.skipif(
    not CORPUS.exists(), reason="the corpus of real DICOM is not here: real heads are NOT tested"
)
dcmtk = pytest.mark.skipif(shutil.which("storescu") is None, reason="DCMTK is not installed: apt-get install dcmtk")
dciodvfy = pytest.mark.skipif(
    shutil.which("dciodvfy") is None, reason="dciodvfy is not installed: apt-get install dicom3tools"
)
orthanc = pytest.mark.skipif(
    shutil.which("Orthanc") is None, reason="Orthanc is not installed: apt-get install orthanc"
)


def scan(paths: list[Path], node: Node, **kwargs) -> None:
    report = push(paths, ("127.0.0.1", node.port), calling_ae="CT1", called_ae="SCANSIDE", **kwargs)
    assert not report.failed


def received(pacs: Pacs, sop_class: str) -> list[Path]:
    return [path for _, each, path in pacs.received if each == sop_class]


def result(pacs: Pacs, *, seg: bool = True) -> dict:
    """Wait for a whole set of results and give the node's own report."""
    last = SegmentationStorage if seg else SecondaryCaptureImageStorage
    assert pacs.wait_for(lambda objects: any(each == last for _, each, _ in objects), PATIENCE_S)
    return reports(pacs.folder.parent / "node")[-1]


def reports(folder: Path) -> list[dict]:
    paths = sorted((folder / "results").glob("*/*/revision-*/report.json"), key=lambda path: path.parent.name)
    return [json.loads(path.read_text()) for path in paths]


def faults(path: Path) -> list[str]:
    """What dciodvfy calls an error."""
    shown = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, text=True, check=False)
    return [line for line in (shown.stdout + shown.stderr).splitlines() if line.startswith("Error")]


@pytest.fixture
def expected(node: Node, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """An entry each time that results are expected."""
    times, expect = [], node._sender.expect
    monkeypatch.setattr(node._sender, "expect", lambda: times.append(expect()))
    return times


def test_a_bleed_pushed_by_our_own_scanner_comes_back_as_seg_sr_and_sc(
    bleeding: Pushable, node: Node, pacs: Pacs, expected: list[None]
):
    scan(bleeding.paths, node)
    report = result(pacs)
    assert len(expected) == 1
    assert node._first_answer.empty(), "who keeps every answer of a worker grows with every slice"
    assert report["slices"] == len(bleeding.paths)
    assert not report["provisional"], report["missing"]
    assert report["decision"]["level"] == "critical"
    assert report["tilt_deg"] == pytest.approx(12, abs=0.01)
    volumes = {finding["name"]: finding["volume_ml"] for finding in report["findings"]}
    assert volumes.keys() >= bleeding.phantom.truth_ml.keys()
    assert sum(volumes.values()) == pytest.approx(sum(bleeding.phantom.truth_ml.values()), rel=0.1)
    (sr,), (seg,) = received(pacs, Comprehensive3DSRStorage), received(pacs, SegmentationStorage)
    assert received(pacs, SecondaryCaptureImageStorage)
    assert dcmread(sr).StudyInstanceUID == dcmread(bleeding.paths[0]).StudyInstanceUID
    assert dcmread(seg).FrameOfReferenceUID == dcmread(bleeding.paths[0]).FrameOfReferenceUID


@dcmtk
@pytest.mark.parametrize("command", [["storescu"], ["dcmsend"]], ids=lambda c: c[0])
def test_dcmtk_pushes(bleeding: Pushable, node: Node, pacs: Pacs, command: list[str]):
    paths = [str(path) for path in bleeding.paths]
    subprocess.run([*command, "-aec", "SCANSIDE", "127.0.0.1", str(node.port), *paths], check=True, timeout=PATIENCE_S)
    report = result(pacs)
    assert report["slices"] == len(paths)
    assert not report["provisional"]


def test_a_head_without_blood_gets_an_sr_that_says_so_and_no_seg(healthy: Pushable, node: Node, pacs: Pacs):
    scan(healthy.paths, node)
    report = result(pacs, seg=False)
    assert report["findings"] == []
    assert report["decision"]["level"] == "routine"
    wait_until(lambda: len(pacs.received) >= 5, "SR and four pictures")
    assert len(received(pacs, Comprehensive3DSRStorage)) == 1
    assert received(pacs, SegmentationStorage) == []


def test_a_part_of_a_head_without_blood_is_told_of_whatever_levels_are_wanted(healthy: Pushable, tmp_path, pacs: Pacs):
    config = config_for(tmp_path / "node", pacs.port, idle_timeout_s=0.5)
    only_critical = [one.model_copy(update={"levels": ("critical",)}) for one in config.destinations]
    with running(config.model_copy(update={"destinations": tuple(only_critical)})) as node:
        scan(healthy.paths[-8:], node)
        assert result(pacs, seg=False)["decision"]["level"] == "incomplete"


def test_slices_are_analysed_while_the_association_is_still_open(bleeding: Pushable, tmp_path: Path, pacs: Pacs):
    with running(config_for(tmp_path / "node", pacs.port, idle_timeout_s=600)) as node:  # never quiet for so long
        ae = AE("CT1")
        ae.add_requested_context(CTImageStorage, "1.2.840.10008.1.2.1")
        association = ae.associate("127.0.0.1", node.port, ae_title="SCANSIDE")
        assert association.is_established
        for path in bleeding.paths[:6]:
            assert association.send_c_store(path).Status == 0
        wait_until(
            lambda: node.progress().get(dcmread(bleeding.paths[0]).SeriesInstanceUID) == (6, 6), "six analysed slices"
        )
        assert pacs.received == []
        told = look(node.config)
        assert told.node_running
        assert [(one.state, one.slices_received) for one in told.series] == [("receiving", 6)]
        for path in bleeding.paths[6:]:
            assert association.send_c_store(path).Status == 0
        association.release()
        assert result(pacs)["slices"] == len(bleeding.paths)


def test_a_worker_killed_in_mid_series_costs_nothing(bleeding: Pushable, node: Node, pacs: Pacs):
    killed = []

    def kill_at_the_tenth(sent) -> None:
        killed.append(sent)
        if len(killed) == 10:
            os.kill(node.supervisor.pid, signal.SIGKILL)

    scan(bleeding.paths, node, on_slice=kill_at_the_tenth)
    report = result(pacs)
    assert report["slices"] == len(bleeding.paths)
    assert not report["provisional"]


def test_blood_is_told_of_before_the_series_ends_and_again_by_the_next_worker(
    bleeding: Pushable, node: Node, pacs: Pacs, monkeypatch: pytest.MonkeyPatch
):
    """The worker dies as soon as it has told it: the next one, told the slices again, says the same."""
    heard: list[tuple[Assembly, dict, dict]] = []

    def hear(assembly: Assembly, report_json: str, patient: dict[str, str]) -> None:
        heard.append((assembly, json.loads(report_json), patient))
        if len(heard) == 1:
            os.kill(node.supervisor.pid, signal.SIGKILL)

    monkeypatch.setattr(node._dispatch, "_on_early", hear)
    header = dcmread(bleeding.paths[0])
    ae = AE("CT1")
    ae.add_requested_context(CTImageStorage, "1.2.840.10008.1.2.1")
    association = ae.associate("127.0.0.1", node.port, ae_title="SCANSIDE")
    with capture_logs() as logs:
        for path in bleeding.paths[:-5]:
            assert association.send_c_store(path).Status == 0
        levels = [["urgent", "critical"], ["critical"]]
        wait_until(lambda: [report["decision"]["level"] for _, report, _ in heard[1:]] in levels, "the word again")
        assert not pacs.received, "the association is open, and five slices have not come"
        for path in bleeding.paths[-5:]:
            assert association.send_c_store(path).Status == 0
        association.release()
        final = result(pacs)
    assert final["slices"] == len(bleeding.paths)
    assert final["decision"]["level"] == "critical"
    volumes = {finding["name"]: finding["volume_ml"] for finding in final["findings"]}
    for assembly, report, patient in heard:
        assert assembly.series_uid == header.SeriesInstanceUID
        assert report["provisional"]
        assert report["missing"][0] == "the series is still arriving"
        assert 5 <= report["slices"] <= len(bleeding.paths) - 5
        assert all(finding["volume_ml"] <= volumes[finding["name"]] + 1e-6 for finding in report["findings"])
        assert patient["PatientID"] == header.PatientID
    (early,) = (node.config.node.folder / "results").glob("*/*/revision-1/early.npz")
    assert early.with_name("report.json").exists()
    told = [one for one in logs if one["event"] == "early_evidence"]
    assert [one["triage"] for one in told] == [report["decision"]["level"] for _, report, _ in heard]
    assert str(header.PatientID) not in str(told)
    assert str(header.PatientName) not in str(told)


def test_an_image_that_kills_three_workers_is_set_aside_alone(
    bleeding: Pushable, tmp_path: Path, pacs: Pacs, monkeypatch: pytest.MonkeyPatch
):
    """One slice in the middle ends every worker that opens it: the rest of its series is analysed, provisionally."""
    poison = bleeding.paths[10]
    uid = str(dcmread(poison).SOPInstanceUID)
    dying = (
        "import os\nfrom dicom_node.analysis import decode, worker\nread = decode.read\n"
        f"decode.read = lambda path, *more: os._exit(9) if {uid!r} in str(path) else read(path, *more)\nworker.main()\n"
    )
    monkeypatch.setattr(Supervisor, "command", (sys.executable, "-c", dying))
    with running(config_for(tmp_path / "node", pacs.port)) as node:
        scan(bleeding.paths, node)
        report = result(pacs)
        assert report["slices"] == len(bleeding.paths) - 1
        assert report["provisional"]
        assert any("ended the worker three times" in sentence for sentence in report["missing"])
        assert any("1 slice missing" in sentence for sentence in report["missing"])
        assert list((node.config.node.folder / "spool").rglob(f"{uid}.dcm")), "the slice itself is gone"


def test_results_that_do_not_fit_on_the_disk_wait_for_room(
    bleeding: Pushable, tmp_path: Path, pacs: Pacs, monkeypatch: pytest.MonkeyPatch
):
    """And are made then, of the slices that the worker has analysed: a full disk is no fault of the series."""
    full = tmp_path / "full"
    full.touch()
    failing = (
        "import errno, os\nfrom dicom_node.analysis import worker\n"
        "from dicom_node.results import writing\nwrite = writing.dcmwrite\n"
        "def full(*given, **how):\n"
        f"    if os.path.exists({str(full)!r}):\n"
        "        raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "    write(*given, **how)\n"
        "writing.dcmwrite = full\nworker.main()\n"
    )
    monkeypatch.setattr(Supervisor, "command", (sys.executable, "-c", failing))
    monkeypatch.setattr("dicom_node.dispatch.NO_ROOM_RETRY_S", 0.2)
    with capture_logs() as logs, running(config_for(tmp_path / "node", pacs.port)) as node:
        scan(bleeding.paths, node)
        told = lambda: [one for one in logs if one["event"] == "results_not_written"]  # noqa: E731
        wait_until(lambda: len(told()) > 1, "a second try")
        full.unlink()
        report = result(pacs)
        assert (report["slices"], report["provisional"]) == (len(bleeding.paths), False)
        assert "make room" in told()[0]["reason"]
        (one,) = look(node.config).series
        assert one.revision == 1


def test_a_worker_that_hangs_is_replaced(
    bleeding: Pushable, tmp_path: Path, pacs: Pacs, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("dicom_node.dispatch.HANG_S", 8.0)  # more than results take on a busy machine
    with running(config_for(tmp_path / "node", pacs.port)) as node:
        pid = node.supervisor.pid
        os.kill(pid, signal.SIGSTOP)
        scan(bleeding.paths, node)
        assert result(pacs)["slices"] == len(bleeding.paths)
        assert node.supervisor.pid != pid


def test_signals_to_the_whole_group_let_the_worker_finish(bleeding: Pushable, tmp_path: Path, pacs: Pacs):
    """Systemd and Ctrl-C signal the worker too: it must not die of that, and what it was told is finished."""
    config = tmp_path / "node.toml"
    config.write_text(show(config_for(tmp_path / "node", pacs.port)))
    with serving(config) as (process, port):
        push(bleeding.paths, ("127.0.0.1", port), calling_ae="CT1", called_ae="SCANSIDE")
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == 0
    told = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert "worker_died" not in told
    assert '"triage": "critical"' in told, "the decision, which is not the event's level"


def test_a_second_node_in_the_same_folder_is_refused(node: Node):
    with pytest.raises(LockedError, match="another node runs here"):
        Node(node.config)


def test_slices_that_were_refused_make_the_report_provisional(bleeding: Pushable, node: Node, pacs: Pacs):
    """The disk is full for the last slices: no gap, a clean release, and still not the whole head."""
    sent = []

    def fill_the_disk(one) -> None:
        sent.append(one)
        if len(sent) == len(bleeding.paths) - 4:
            node._spool._free_floor_gb = 1e9

    node._spool._free_floor_gb = 0
    told = push(
        bleeding.paths, ("127.0.0.1", node.port), calling_ae="CT1", called_ae="SCANSIDE", on_slice=fill_the_disk
    )
    assert [each.status for each in told.failed] == [0xA700] * 4
    report = result(pacs)
    assert report["provisional"]
    assert "refused" in report["missing"][0]
    (told,) = look(node.config).series
    assert (told.provisional, list(told.missing)) == (True, report["missing"])
    assert told.slices_analysed == told.slices_received == len(bleeding.paths) - 4


def test_a_node_killed_in_mid_series_resumes_from_the_spool(bleeding: Pushable, tmp_path: Path, pacs: Pacs):
    """Kill -9 of the whole node after half of the slices: what it had acknowledged is in the result."""
    config = tmp_path / "node.toml"
    config.write_text(show(config_for(tmp_path / "node", pacs.port)))
    half = len(bleeding.paths) // 2
    with serving(config) as (process, port):
        push(bleeding.paths[:half], ("127.0.0.1", port), calling_ae="CT1", called_ae="SCANSIDE")
        process.kill()
        process.wait()
    with serving(config) as (process, port):
        push(bleeding.paths[half:], ("127.0.0.1", port), calling_ae="CT1", called_ae="SCANSIDE")
        assert result(pacs)["slices"] == len(bleeding.paths)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_files_that_are_damaged_when_a_node_starts_again_are_told(bleeding: Pushable, tmp_path: Path, pacs: Pacs):
    """One empty, one garbage, of a whole other series all: the rest is analysed, and nothing goes without a word."""
    config = config_for(tmp_path / "node", pacs.port, idle_timeout_s=30)
    half = len(bleeding.paths) // 2
    alone = dcmread(bleeding.paths[0])
    alone.SeriesInstanceUID, alone.SOPInstanceUID = "1.2.3.4", "1.2.3.4.1"
    alone.file_meta.MediaStorageSOPInstanceUID = alone.SOPInstanceUID
    alone.save_as(tmp_path / "alone.dcm")
    with running(config) as node:
        scan([*bleeding.paths[:half], tmp_path / "alone.dcm"], node)
    kept = sorted((tmp_path / "node" / "spool").glob("*/*/*.dcm"), key=lambda path: path.stat().st_mtime_ns)
    (other,) = [path for path in kept if path.parent.name == "1.2.3.4"]
    kept.remove(other)
    kept[3].write_bytes(b"")
    kept[5].write_bytes(kept[5].read_bytes()[:400] + bytes(range(256)) * 1000)
    other.write_bytes(b"garbage")
    config = config_for(tmp_path / "node", pacs.port, idle_timeout_s=3)
    with capture_logs() as events, running(config) as node:
        scan(bleeding.paths[half:], node)
        report = result(pacs)
        wait_until(lambda: len(_records(node)) == 2, "a record of both series")
        records = {record.series_uid: record for record in _records(node)}
    assert report["slices"] == len(bleeding.paths) - 2
    assert report["provisional"]
    for reason in (Reason.TRUNCATED, Reason.UNREADABLE):
        assert any(f"1 image not analysed: {reason.value}" in one for one in report["missing"]), report["missing"]
    assert records["1.2.3.4"].state is SeriesState.NOT_ANALYSED
    assert "damaged" in records["1.2.3.4"].reason
    assert [event["path"] for event in events if event["event"] == "spool_file_unreadable"] == [str(other)]


class serving:  # noqa: N801  # used as a function
    """`scanside serve` in a process of its own, and the port it took."""

    def __init__(self, config: Path) -> None:
        self.log = config.with_suffix(f".{time.time_ns()}.log")
        command = [sys.executable, "-m", "scanside", "serve", "--config", str(config)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stderr=log, start_new_session=True)

    def __enter__(self) -> tuple[subprocess.Popen, int]:
        wait_until(lambda: "node_started" in self.log.read_text(), "node_started in the log")
        line = next(line for line in self.log.read_text().splitlines() if "node_started" in line)
        return self.process, json.loads(line)["port"]

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def test_a_late_slice_makes_a_second_revision_that_names_the_first(bleeding: Pushable, node: Node, pacs: Pacs):
    middle = len(bleeding.paths) // 2
    scan(bleeding.paths[:middle] + bleeding.paths[middle + 1 :], node)
    first = result(pacs)
    assert first["provisional"]
    assert "1 slice missing" in first["missing"][0]
    count = len(pacs.received)
    scan([bleeding.paths[middle]], node)
    assert pacs.wait_for(lambda objects: len(objects) > count and objects[-1][1] == SegmentationStorage, PATIENCE_S)
    second = reports(pacs.folder.parent / "node")[-1]
    assert second["slices"] == len(bleeding.paths)
    old, new = (dcmread(path) for path in received(pacs, Comprehensive3DSRStorage))
    reference = new.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
    assert reference.ReferencedSOPInstanceUID == old.SOPInstanceUID


def test_slices_that_can_not_be_noted_are_not_forgotten(
    bleeding: Pushable, node: Node, pacs: Pacs, monkeypatch: pytest.MonkeyPatch
):
    """They were acknowledged; the journal can't be read while they come."""
    monkeypatch.setattr(nodes, "JOURNAL_RETRY_S", 0.2)
    genuine, failures = Assembler.stored, iter([JournalError("a disk that fails")] * len(bleeding.paths))

    def stored(self: Assembler, *told: object) -> object:
        for failure in failures:
            raise failure
        return genuine(self, *told)

    monkeypatch.setattr(Assembler, "stored", stored)
    scan(bleeding.paths, node)
    wait_until(lambda: len(pacs.received) >= 3, "results")


def test_a_desk_that_was_kept_waiting_takes_no_series_for_quiet_whose_slices_are_there(
    bleeding: Pushable, tmp_path: Path, pacs: Pacs
):
    """As by a database that hangs: what came meanwhile is noted before anything is closed."""
    few, everything_sent = 4, threading.Event()

    def hang() -> None:
        """Until the slices that are here have been quiet for longer than the timeout, which they have not been yet."""
        (series,) = node._assembler._assemblies.values()
        quiet_s = time.monotonic() - series.last_arrival
        everything_sent.wait(60)
        node._assembler.reload(quiet_s + 1.0, node.config.series.min_coverage_mm)
        time.sleep(1.0)

    with running(config_for(tmp_path / "node", pacs.port, idle_timeout_s=600)) as node:
        scan(bleeding.paths[:few], node)
        wait_until(lambda: set(node.progress().values()) == {(few, few)}, "the first slices are analysed")
        node._events.put(hang)
        scan(bleeding.paths[few:], node)
        everything_sent.set()
        wait_until(lambda: _records(node), "a record of the series")
        wait_until(lambda: node.progress() == {}, "nothing is open")
        (only,) = _records(node)
    assert (only.revision, only.slices) == (1, len(bleeding.paths))


def test_a_desk_that_always_has_something_to_hear_closes_series_all_the_same(bleeding: Pushable, node: Node):
    enough = threading.Event()

    def again() -> None:
        if not enough.wait(0.001):
            node._events.put(again)

    for _ in range(2):
        node._events.put(again)
    try:
        scan(bleeding.paths, node)
        wait_until(lambda: _records(node), "a record of the series")
    finally:
        enough.set()


def test_the_same_push_again_changes_nothing(bleeding: Pushable, node: Node, pacs: Pacs):
    scan(bleeding.paths, node)
    result(pacs)
    count = len(pacs.received)
    scan(bleeding.paths, node)
    assert node.progress() == {}
    assert len(pacs.received) == count


def test_what_is_no_head_ct_is_recorded_with_its_reason(
    bleeding: Pushable, node: Node, tmp_path: Path, expected: list[None]
):
    path = tmp_path / "localizer.dcm"
    localizer = dcmread(bleeding.paths[0])
    localizer.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    localizer.SeriesInstanceUID += ".1"
    localizer.SOPInstanceUID += ".1"
    localizer.file_meta.MediaStorageSOPInstanceUID = localizer.SOPInstanceUID
    localizer.save_as(path)
    scan([path], node)
    wait_until(lambda: _records(node), "a record of the series")
    (record,) = _records(node)
    assert record.state is SeriesState.NOT_ANALYSED
    assert record.reason.startswith("a localizer")
    assert expected == [], "no archive is connected to for it"


def _records(node: Node) -> list:
    journal = Journal(node.config.node.folder / "journal.sqlite")
    try:
        return journal.series()
    finally:
        journal.close()


@real_head
@dcmtk
@dciodvfy
def test_a_real_tilted_head_with_three_steps_goes_through_whole(node: Node, pacs: Pacs):
    """GE, 18.5 degrees, steps of 4.00, 1.08 and 7.00 mm. What the network finds there is not judged."""
    folder = CORPUS / "01_head_ge_tilt18_varspacing"
    images = [str(path) for path in sorted(folder.iterdir()) if path.suffix != ".txt"]
    subprocess.run(
        ["storescu", "-aec", "SCANSIDE", "127.0.0.1", str(node.port), *images], check=True, timeout=PATIENCE_S
    )
    wait_until(lambda: _records(node), "a record of the series")
    wait_until(lambda: all(item.state == "sent" for item in _outbox(node)), "everything sent")
    (report,) = reports(node.config.node.folder)
    assert report["slices"] == len(images)
    assert report["tilt_deg"] == pytest.approx(18.5, abs=0.1)
    assert report["thickness_mm"][1] == pytest.approx(7.0, abs=0.01)
    assert "never seen a human" in report["model"]["training_data"]
    objects = [path for _, _, path in pacs.received]
    assert {dcmread(path).Modality for path in objects} >= {"SR", "OT"}
    for path in objects:
        assert faults(path) == [], path


def _outbox(node: Node) -> list:
    journal = Journal(node.config.node.folder / "journal.sqlite")
    try:
        return Outbox(journal).items()
    finally:
        journal.close()


@orthanc
def test_orthanc_stores_the_results_and_gives_them_back(bleeding: Pushable, tmp_path: Path):
    with archive(tmp_path) as (rest, port), running(config_for(tmp_path / "node", port, ae_title="ORTHANC")) as node:
        scan(bleeding.paths, node)
        wait_until(lambda: _outbox(node) and all(item.state == "sent" for item in _outbox(node)), "everything sent")
        items = _outbox(node)
        stored = {one["MainDicomTags"]["SOPInstanceUID"]: one["ID"] for one in asked(f"{rest}/instances?expand")}
        assert set(stored) == {item.sop_uid for item in items}
        assert {one["MainDicomTags"]["Modality"] for one in asked(f"{rest}/series?expand")} == {"SEG", "SR", "OT"}
        for item in items:
            with urllib.request.urlopen(f"{rest}/instances/{stored[item.sop_uid]}/file") as answer:
                (tmp_path / "back.dcm").write_bytes(answer.read())
            sent, back = dcmread(item.path), dcmread(tmp_path / "back.dcm")
            assert back == sent, f"{item.role} came back changed"


@orthanc
@pytest.mark.parametrize("confirm", ["commitment", "query"])
def test_orthanc_says_that_it_keeps_the_results(bleeding: Pushable, tmp_path: Path, confirm: str):
    with archive(tmp_path) as (rest, port):
        config = config_for(tmp_path / "node", port, ae_title="ORTHANC")
        (destination,) = config.destinations
        destination = destination.model_copy(update={"confirm": confirm})
        with running(config.model_copy(update={"destinations": (destination,)})) as node:
            know(rest, node)
            scan(bleeding.paths, node)
            wait_until(
                lambda: _outbox(node) and all(item.state == "confirmed" for item in _outbox(node)), "all confirmed"
            )


@orthanc
def test_orthanc_asks_for_the_commitment_of_what_it_has_sent(bleeding: Pushable, tmp_path: Path, pacs: Pacs):
    """Orthanc as a scanner. It takes reports at its port alone: on the association of its request it breaks off."""
    with archive(tmp_path) as (rest, port), contextlib.ExitStack() as stack:
        scanner = Scanner(ae_title="ORTHANC", host="127.0.0.1", port=port)
        config = config_for(tmp_path / "node", pacs.port).model_copy(update={"scanners": (scanner,)})
        node = stack.enter_context(running(config))
        know(rest, node)
        ids = [asked(f"{rest}/instances", path.read_bytes())["ID"] for path in bleeding.paths]
        asked(f"{rest}/modalities/node/store", json.dumps({"Resources": ids, "Synchronous": True}).encode())
        instances = [
            {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2", "SOPInstanceUID": dcmread(path).SOPInstanceUID}
            for path in bleeding.paths
        ]
        references = [[each["SOPClassUID"], each["SOPInstanceUID"]] for each in instances]
        for extra, status in (([], "Success"), ([["1.2.840.10008.5.1.4.1.1.2", "9.9"]], "Failure")):
            body = json.dumps({"DicomInstances": references + extra}).encode()
            request = asked(f"{rest}/modalities/node/storage-commitment", body)

            def report(where: str = request["Path"]) -> dict:
                return asked(f"{rest}{where}")

            wait_until(lambda report=report: report()["Status"] != "Pending", "Orthanc has its report")
            assert report()["Status"] == status
            assert len(report()["Success"]) == len(instances)
            assert [each["SOPInstanceUID"] for each in report().get("Failures", [])] == [uid for _, uid in extra]


def know(rest: str, node: Node) -> None:
    """Tell Orthanc of the node."""
    modality = {"AET": "SCANSIDE", "Host": "127.0.0.1", "Port": node.port, "AllowStorageCommitment": True}
    asked(f"{rest}/modalities/node", json.dumps(modality).encode(), method="PUT")


class archive:  # noqa: N801  # used as a function
    """Orthanc on free ports: its REST root and its DICOM port."""

    def __init__(self, folder: Path, plugins: tuple[str, ...] = ()) -> None:
        import socket

        ports = []
        for _ in range(2):
            with socket.create_server(("127.0.0.1", 0)) as free:
                ports.append(free.getsockname()[1])
        self.rest, self.port = f"http://127.0.0.1:{ports[0]}", ports[1]
        settings = {
            "StorageDirectory": str(folder / "orthanc"),
            "IndexDirectory": str(folder / "orthanc"),
            "HttpPort": ports[0],
            "DicomPort": ports[1],
            "DicomAet": "ORTHANC",
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "Plugins": [*plugins],
        }
        (folder / "orthanc.json").write_text(json.dumps(settings))
        with (folder / "orthanc.log").open("w") as log:
            self.process = subprocess.Popen(["Orthanc", str(folder / "orthanc.json")], stdout=log, stderr=log)

    def __enter__(self) -> tuple[str, int]:
        wait_until(self._answers, "Orthanc")
        return self.rest, self.port

    def _answers(self) -> bool:
        assert self.process.poll() is None, "Orthanc ended"
        try:
            return bool(asked(f"{self.rest}/system"))
        except OSError:
            return False

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)


def asked(url: str, body: bytes | None = None, method: str | None = None) -> list | dict:
    with urllib.request.urlopen(urllib.request.Request(url, body, method=method), timeout=60) as answer:
        return json.loads(answer.read() or b"{}")
