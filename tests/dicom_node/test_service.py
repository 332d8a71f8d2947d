"""The node as a service: what the service manager hears of it, and what signals do to a real process."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from dicom_node.service import Service
from dicom_node.systemd import ServiceManager
from dicom_node.toml import show
from tests.dicom_node.conftest import PATIENCE_S, config_for

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


@pytest.fixture(params=["a file", "abstract"])
def manager(request, tmp_path) -> Iterator[Manager]:
    address = str(tmp_path / "notify") if request.param == "a file" else f"@scanside-{os.getpid()}-{time.time_ns()}"
    opened = Manager(address)
    yield opened
    opened.close()


@contextmanager
def served(config: Path, **environment: str) -> Iterator[subprocess.Popen]:
    """`scanside serve`, and killed if the test did not end it."""
    with config.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "scanside", "serve", "--config", str(config)],
            stderr=log, env=os.environ | environment, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_service_manager_hears_of_the_start_the_watchdog_a_reload_and_the_stop(tmp_path, manager):
    config = tmp_path / "node.toml"
    config.write_text(show(config_for(tmp_path / "node", 1)))
    with served(config, NOTIFY_SOCKET=manager.address, WATCHDOG_USEC="600000") as process:
        ready = manager.next()
        assert ready["READY"] == "1"
        assert re.match(r"SCANSIDE on 127\.0\.0\.1:\d+: 0 series open, 0 images to analyse, 0 results", ready["STATUS"])
        port = int(ready["STATUS"].split(":")[1])
        socket.create_connection(("127.0.0.1", port)).close()  # ready means open
        assert manager.until("WATCHDOG")["STATUS"] == ready["STATUS"]
        before = time.monotonic_ns() // 1000
        process.send_signal(signal.SIGHUP)
        assert before <= int(manager.until("RELOADING")["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
        assert manager.until("READY")
        process.send_signal(signal.SIGTERM)
        assert manager.until("STOPPING")["STOPPING"] == "1"
        assert process.wait(PATIENCE_S) == 0


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


class Node:
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
    node = Node(answers=2)
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
