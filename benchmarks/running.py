"""A node and an archive as processes of their own, to be measured from outside."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from prometheus_client.parser import text_string_to_metric_families
from pydicom.uid import Comprehensive3DSRStorage, EncapsulatedPDFStorage, SecondaryCaptureImageStorage

from dicom_node.alerts import mllp
from dicom_node.simulation.demo import ROLES
from dicom_node.simulation.pacs import Pacs
from runtime.errors import ScansideError

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE_S = 180
ROLE_OF = {**ROLES, Comprehensive3DSRStorage: "sr", SecondaryCaptureImageStorage: "sc", EncapsulatedPDFStorage: "pdf"}
CONFIGURATION = """[node]
port = {port}
folder = "node"
free_floor_gb = 0.2
max_associations = 64
max_associations_per_peer = 64

[[destinations]]
name = "archive"
ae_title = "ARCHIVE"
host = "127.0.0.1"
port = {archive}

[web]
port = {web}

[log]
format = "json"
"""


class RunError(ScansideError):
    """A node, an archive or a sender that did not do its part."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """An object in the archive: when it had it, in seconds since the epoch, and which."""

    at: float
    role: str
    series_uid: str


class Archive(Protocol):
    """Where results go."""

    name: str
    port: int

    def arrivals(self, log: Path) -> list[Arrival]:
        """What it has so far; `log` is the node's."""


class Ours:
    """The archive of the demo, which has an object on its disk before it says so."""

    name = "scanside's own archive"

    def __init__(self, folder: Path) -> None:
        self._pacs = Pacs(folder)
        self._pacs.start()
        self.port = self._pacs.port
        self.close = self._pacs.stop

    def arrivals(self, log: Path) -> list[Arrival]:  # noqa: ARG002  # it knows by itself
        return [Arrival(at, ROLE_OF.get(sop_class, "other"), "") for at, sop_class, _ in list(self._pacs.received)]


class Orthanc:
    """Orthanc as Debian ships it: an object is there when the node has its answer, as the node's log tells."""

    name = "Orthanc"

    def __init__(self, folder: Path) -> None:
        if not shutil.which("Orthanc"):
            raise RunError("Orthanc is not installed: apt-get install orthanc, or leave out --orthanc")
        folder.mkdir(parents=True)
        self.port, web = free_port(), free_port()
        path = folder / "orthanc.json"
        settings = {
            "StorageDirectory": str(folder), "IndexDirectory": str(folder), "DicomPort": self.port, "HttpPort": web,
            "DicomCheckCalledAet": False, "DicomAlwaysAllowStore": True, "OverwriteInstances": True,
            "UnknownSopClassAccepted": True,
        }  # fmt: skip
        path.write_text(json.dumps(settings))
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(("Orthanc", str(path)), **quiet)
        wait_for_port(self.port)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)

    def arrivals(self, log: Path) -> list[Arrival]:
        return [
            Arrival(when(line), line["role"].partition("-")[0], line["series_uid"])
            for line in told(log)
            if line["event"] == "result_sent"
        ]


class Emergency:
    """An HL7 listener that takes every alert: when it came, and of how many slices it speaks."""

    def __init__(self) -> None:
        self.heard: list[tuple[float, int]] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                with connection, suppress(OSError):
                    self._take(connection)

    def _take(self, connection: socket.socket) -> None:
        connection.settimeout(5)
        message = b""
        while not message.endswith(mllp.END):
            piece = connection.recv(1 << 16)
            if not piece:
                return
            message += piece
        at, head = time.time(), message.split(b"\r")[0].split(b"|")
        slices = [int(one) for one in re.findall(rb" of (\d+) slices", message)]
        answer = b"MSH|^~\\&|ED||SCANSIDE||20260101120000||ACK^R01^ACK|1|P|2.5.1\rMSA|AA|" + head[9] + b"\r"
        connection.sendall(mllp.START + answer + mllp.END)
        if slices:
            self.heard.append((at, max(slices)))


@dataclass(frozen=True, slots=True)
class Node:
    """A running `scanside serve`."""

    pid: int
    port: int
    web: int
    folder: Path
    started_s: float  # from its start to its open port

    @property
    def log(self) -> Path:
        return self.folder / "node.log"

    def cpu_s(self) -> float:
        """Processor seconds of the node and its processes so far."""
        children = [
            int(child)
            for task in Path(f"/proc/{self.pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
        return sum(_cpu_s(pid) for pid in (self.pid, *children))

    def stages(self) -> dict[str, tuple[float, int]]:
        """Seconds and count of each stage so far, as its metrics tell."""
        address = f"http://127.0.0.1:{self.web}/metrics"
        with urllib.request.urlopen(address, timeout=10) as answer:  # http, to this machine
            families = {one.name: one for one in text_string_to_metric_families(answer.read().decode())}
        found: dict[str, dict[str, float]] = {}
        for one in families["scanside_stage_seconds"].samples:
            found.setdefault(one.labels["stage"], {})[one.name.rpartition("_")[2]] = one.value
        return {name: (values["sum"], int(values["count"])) for name, values in found.items()}


@contextmanager
def serving(folder: Path, archive: int, more: str = "") -> Iterator[Node]:
    """`scanside serve`, from when its port is open.

    Parameters
    ----------
    archive : port of its destination
    more : further sections of its configuration

    """
    port, web = free_port(), free_port()
    config = folder / "node.toml"
    config.write_text(CONFIGURATION.format(port=port, archive=archive, web=web) + more)
    began = time.perf_counter()
    with (folder / "node.log").open("w") as log:
        command = [sys.executable, "-m", "scanside", "serve", "--config", str(config)]
        process = subprocess.Popen(command, stderr=log, stdout=log)
    try:
        wait_for_port(port, process)
        yield Node(process.pid, port, web, folder, time.perf_counter() - began)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def wait_for_port(port: int, process: subprocess.Popen[bytes] | None = None) -> None:
    """Wait until somebody listens.

    Raises
    ------
    RunError : nobody does in time, or the process has ended

    """
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and (process is None or process.poll() is None):
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        time.sleep(0.01)
    raise RunError(f"nobody listens on port {port}: see the log of what should")


def told(log: Path) -> list[dict[str, Any]]:
    """The lines of a node's log that are whole."""
    lines = []
    for line in log.read_text().splitlines():
        with suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and "event" in line]


def when(line: dict[str, Any]) -> float:
    """Seconds since the epoch of a line of a log."""
    return datetime.fromisoformat(line["timestamp"]).timestamp()
