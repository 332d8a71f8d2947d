"""The node as a service: what the service manager hears of it, and what signals do to a real process."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event

import httpx
import pytest
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, SegmentationStorage
from pynetdicom import AE
from pynetdicom.association import Association
from structlog.testing import capture_logs

from dicom_node import service, supervisor
from dicom_node.configuration.toml import show
from dicom_node.monitoring.systemd import ServiceManager
from dicom_node.network import requestor
from dicom_node.node import Node
from dicom_node.service import Service
from dicom_node.simulation.pacs import Pacs
from dicom_node.simulation.scanner import push
from dicom_node.storage.journal import ResultFile, SeriesState
from tests.dicom_node.conftest import PATIENCE_S, Pushable, config_for, running, wait_until

PACKAGING = Path(__file__).parents[2] / "packaging"
UNIT = PACKAGING / "scanside.service"
systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed: apt-get install systemd"
)


class Manager:
    """A service manager's socket, and what it has been told."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address.replace("@", "\0", 1))
        self._socket.settimeout(PATIENCE_S)
        self.address = address

    def next(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self._socket.recv(4096).decode().splitlines())

    def until(self, field: str) -> dict[str, str]:
        """The next message with a field; others are passed over."""
        while field not in (told := self.next()):
            pass
        return told

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path) -> Iterator[Manager]:
    opened = Manager(str(tmp_path / "notify"))
    yield opened
    opened.close()


@contextmanager
def served(config: Path, *, drain_s: float = 60, **environment: str) -> Iterator[subprocess.Popen]:
    """`scanside serve`, and killed if the test did not end it."""
    program = f"from dicom_node import service; service.DRAIN_S = {drain_s}; from scanside import main; main()"
    with config.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", program, "serve", "--config", str(config)],
            stderr=log, env=os.environ | environment, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_service_manager_hears_of_the_start_the_watchdog_a_reload_and_the_stop(tmp_path, manager):
    """And a second signal ends at once what the first has begun to end."""
    config = written(tmp_path, 1)
    with served(config, drain_s=600, NOTIFY_SOCKET=manager.address, WATCHDOG_USEC="600000") as process:
        ready = manager.next()
        assert ready["READY"] == "1"
        assert re.match(r"SCANSIDE on 127\.0\.0\.1:\d+: 0 series open, 0 images to analyse, 0 results", ready["STATUS"])
        with associated(int(ready["STATUS"].split(":")[1])):  # ready means open
            assert manager.until("WATCHDOG")["STATUS"] == ready["STATUS"]
            before = time.monotonic_ns() // 1000
            process.send_signal(signal.SIGHUP)
            assert before <= int(manager.until("RELOADING")["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
            assert manager.until("READY")
            worker = events(config, "worker_ready")[0]["pid"]
            process.send_signal(signal.SIGTERM)
            assert manager.until("STOPPING")["STOPPING"] == "1"
            wait_until(lambda: events(config, "stop_waits"), "stop_waits in the log")
            while not manager.until("WATCHDOG")["STATUS"].startswith("stopping: "):
                pass  # the last one from before the stop
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0
    assert events(config, "node_stopped_at_once")
    wait_until(lambda: not Path(f"/proc/{worker}").exists(), "the worker's end")


def test_an_abstract_socket_is_told_too():
    manager = Manager(f"@scanside-{os.getpid()}-{time.time_ns()}")
    ServiceManager({"NOTIFY_SOCKET": manager.address}).tell(READY=1, STATUS="well")
    assert manager.next() == {"READY": "1", "STATUS": "well"}
    manager.close()


def events(config: Path, name: str) -> list[dict]:
    """What a served node has logged under a name."""
    lines = config.with_suffix(".log").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def started(config: Path) -> int:
    """The port of a served node, once it listens."""
    wait_until(lambda: events(config, "node_started"), "node_started in the log")
    return events(config, "node_started")[0]["port"]


def written(folder: Path, port: int, **node: object) -> Path:
    """A configuration file for a node that has an archive at a port."""
    config = config_for(folder / "node", port)
    path = folder / "node.toml"
    path.write_text(show(config.model_copy(update={"node": config.node.model_copy(update=node)})))
    return path


@contextmanager
def held(node: Node) -> Iterator[None]:
    """A desk that hears nothing."""
    taken, let_go = Event(), Event()
    node._events.put(lambda: (taken.set(), let_go.wait()))
    taken.wait()
    try:
        yield
    finally:
        let_go.set()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def test_who_sends_when_the_node_is_told_to_stop_finishes_and_has_its_result(bleeding: Pushable, tmp_path, pacs: Pacs):
    config, web = written(tmp_path, pacs.port), free_port()
    seen = []

    def stop_at_the_tenth(_: object) -> None:
        seen.append(1)
        if len(seen) == 10:
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: events(config, "stop_waits"), "stop_waits in the log")
            answer = httpx.get(f"http://127.0.0.1:{web}/readyz")
            assert (answer.status_code, answer.json()["node"]) == (503, "is stopping")
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))

    with served(config, SCANSIDE_WEB__PORT=str(web)) as process:
        port = started(config)
        sent = push(
            bleeding.paths, ("127.0.0.1", port), calling_ae="CT1", called_ae="SCANSIDE", on_slice=stop_at_the_tenth
        )
        assert not sent.failed
        assert process.wait(PATIENCE_S) == 0
    assert not events(config, "stop_waits_no_longer")
    assert any(sop_class == SegmentationStorage for _, sop_class, _ in pacs.received)
    (report,) = (json.loads(path.read_text()) for path in (tmp_path / "node").rglob("report.json"))
    assert (report["slices"], report["provisional"]) == (len(bleeding.paths), False)
    waits = events(config, "stop_waits")
    assert len(waits) <= 4, "one for each thing that is waited for, however often it comes and goes"
    assert waits[0]["associations"][0].startswith("CT1@127.0.0.1:")


def test_a_stop_that_asks_before_a_series_is_closed_waits_for_it(bleeding: Pushable, tmp_path, pacs: Pacs):
    """The desk is asked between the event that makes a series complete and its own look at what is."""
    config = config_for(tmp_path / "node", pacs.port, idle_timeout_s=600)
    with running(config) as node, ThreadPoolExecutor(1) as asker, ExitStack() as desk:
        seen = []

        def hold_the_desk_at_the_last(_: object) -> None:
            seen.append(1)
            if len(seen) == len(bleeding.paths):
                wait_until(lambda: list(node.progress().values()) == [(len(seen), len(seen))], "all to be analysed")
                desk.enter_context(held(node))

        push(
            bleeding.paths, ("127.0.0.1", node.port), calling_ae="CT1", called_ae="SCANSIDE",
            on_slice=hold_the_desk_at_the_last,
        )  # fmt: skip
        wait_until(lambda: not node._receiver.associations(), "the association's end")
        before = node._events.qsize()
        answer = asker.submit(node.unfinished, 60)
        wait_until(lambda: node._events.qsize() > before, "the question behind the association's end")
        desk.close()
        assert answer.result()["series"] == 1


def test_a_stop_waits_for_a_desk_that_does_not_answer(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dicom_node.node.DESK_PATIENCE_S", 0.01)
    with running(config_for(tmp_path / "node", 1)) as node, held(node):
        assert node.unfinished(60) == {"series": "unknown: the desk gives no answer"}


def test_a_stop_waits_for_results_that_may_still_be_delivered_in_time(tmp_path):
    """Nobody listens at the archive's port: what is owed is tried again, in seconds, and for ever."""
    with running(config_for(tmp_path / "node", 1)) as node:
        assert node.unfinished(60) == {}
        made = ResultFile("sr", tmp_path / "sr.dcm", "1.2", "1.2.3")
        node._journal.record_result(
            "1", "2", 1, state=SeriesState.ANALYSED, reason=None, slices=1, report_json=None, files=[made],
            destinations={"pacs": ["sr"]},
        )  # fmt: skip
        assert node.unfinished(600) == {"destinations": ["pacs"]}
        assert node._sender.busy(-600) == [], "what is due later"
        assert not node.readiness().get("node")
        node.close()
        assert node.readiness()["node"] == "is stopping"
        assert node.summary().startswith("stopping: 0 series open, 0 images to analyse, 1 results to send")


@contextmanager
def associated(port: int) -> Iterator[Association]:
    ae = AE("CT1")
    ae.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)
    association = ae.associate("127.0.0.1", port, ae_title="SCANSIDE")
    assert association.is_established
    connection = association.dul.socket.socket
    try:
        yield association
    finally:
        if association.is_established:
            association.abort()
        connection.close()


def test_a_reload_says_what_it_changes_what_it_can_not_and_what_is_wrong(bleeding: Pushable, tmp_path):
    """Who is there stays, until it goes on sending when the node is told to stop: then it is cut off."""
    config = written(tmp_path, 1)
    good = config.read_text()
    with served(config, drain_s=1) as process, associated(started(config)) as association:
        config.write_text(
            good.replace("port = 0", "port = -1").replace("max_associations = 16", "max_associations = 0")
        )
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: events(config, "configuration_not_reloaded"), "a refusal in the log")
        assert events(config, "configuration_not_reloaded")[0]["mistakes"] == [
            "node.port: -1 is below 0",
            "node.max_associations: 0 is below 1",
        ]
        only = good.replace("allowed_calling_aes = []", 'allowed_calling_aes = ["CT2"]')
        config.write_text(only.replace("port = 0", "port = 104"))
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: events(config, "restart_needed"), "what needs a restart in the log")
        assert events(config, "configuration_reloaded")[0]["changed"] == ["node.allowed_calling_aes"]
        assert events(config, "restart_needed")[0]["unchanged"] == ["node.port"]
        ae = AE("CT1")
        ae.add_requested_context(CTImageStorage)
        # to pynetdicom it may seem aborted: see test_receiver
        assert not ae.associate("127.0.0.1", started(config)).is_established
        wait_until(lambda: events(config, "association_rejected"), "a rejection in the log")
        assert association.send_c_store(bleeding.paths[0]).Status == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
        wait_until(lambda: not association.is_established, "the end of the association")
    assert events(config, "stop_waits_no_longer")[0]["associations"][0].startswith("CT1@")
    assert len(list((tmp_path / "node" / "spool").rglob("*.dcm"))) == 1


def test_a_node_without_a_service_manager_tells_nobody(tmp_path):
    manager = ServiceManager({})
    assert not manager.listens
    with capture_logs() as events:
        manager.tell(READY=1)
        ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "gone")}).tell(READY=1)
    assert [event["event"] for event in events] == ["service_manager_not_told"]


@pytest.mark.parametrize(
    ("environment", "watchdog_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
    ],
)
def test_whose_watchdog_it_is(environment, watchdog_s):
    assert ServiceManager(environment).watchdog_s == watchdog_s


class Numbered:
    """A node whose desk answers as often as it is told to."""

    def __init__(self, answers: int) -> None:
        self.answers = answers

    def health(self) -> dict[str, str]:
        self.answers -= 1
        return {"desk": "" if self.answers >= 0 else "gives no answer within 5 s"}

    def summary(self) -> str:
        return "well"


def test_the_watchdog_hears_nothing_of_a_node_whose_desk_hangs(tmp_path, monkeypatch):
    manager = Manager(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
    monkeypatch.setenv("WATCHDOG_USEC", "30000")
    service = Service(tmp_path / "node.toml")
    node = Numbered(answers=2)
    monkeypatch.setattr(service, "_ended", Counted(4))
    service._report(node)
    told = [manager.next() for _ in range(4)]
    assert [("WATCHDOG" in one, one["STATUS"]) for one in told] == [(True, "well")] * 2 + [
        (False, "desk gives no answer within 5 s")
    ] * 2
    manager.close()


class Counted:
    """An event that is set when it has been waited for so often, for the time that a watchdog of 30 ms gives."""

    def __init__(self, times: int) -> None:
        self._times = times

    def wait(self, interval_s: float) -> bool:
        assert interval_s == pytest.approx(0.01)
        self._times -= 1
        return self._times < 0


@systemd
def test_systemd_finds_no_mistake_in_the_unit(tmp_path):
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/scanside/bin/scanside", sys.executable))  # one that is there
    shown = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False, timeout=60)
    assert (shown.returncode, shown.stdout + shown.stderr) == (0, "")


@systemd
def test_systemd_calls_the_unit_well_confined():
    shown = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", UNIT],  # of 100; 17 by systemd 252
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    if "unrecognized option" in shown.stderr or "Unknown" in shown.stderr:
        pytest.skip("this systemd-analyze judges no files: the unit's exposure is NOT tested")
    assert shown.returncode == 0, shown.stdout


def test_the_unit_leaves_time_for_the_stop_and_room_for_the_gpu():
    settings = re.findall(r"^(\w+)=(.*)$", UNIT.read_text(), re.MULTILINE)
    silent_archive_s = requestor.CONNECT_TIMEOUT_S + max(requestor.ACSE_TIMEOUT_S, requestor.DIMSE_TIMEOUT_S)
    assert int(dict(settings)["TimeoutStopSec"]) > service.DRAIN_S + supervisor.GRACE_S + silent_archive_s
    assert ("DeviceAllow", "char-nvidia* rw") in settings
    assert not any(name == "PrivateDevices" for name, _ in settings)
    assert "SCANSIDE_NODE__FOLDER=/var/lib/scanside" in dict(settings)["Environment"]


def test_the_container_copies_what_there_is_and_starts_the_console_script():
    """No container engine is asked: what it is told is held against the project."""
    lines = (PACKAGING / "Containerfile").read_text().replace("\\\n", " ").splitlines()
    orders = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    copied = {
        source for order, rest in orders if order == "COPY" and "--from" not in rest for source in rest.split()[:-1]
    }
    root = PACKAGING.parent
    assert all((root / source).exists() for source in copied)
    wheel = re.search(r"only-include = \[(.*?)\]", (root / "pyproject.toml").read_text())[1]
    assert set(re.findall(r'"(.*?)"', wheel)) <= copied
    told = dict(orders)
    assert told["ENTRYPOINT"] == '["/opt/scanside/bin/scanside"]'
    assert told["CMD"].startswith('["serve", "--config", ')
    assert told["STOPSIGNAL"] == "SIGTERM"
    assert told["USER"].isdecimal()
    assert told["VOLUME"] in told["ENV"]
