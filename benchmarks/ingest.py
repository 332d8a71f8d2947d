"""How fast slices are taken in and safe on the disk: ours beside DCMTK's storescp and Orthanc, in one run.

::

    scanside bench ingest --out benchmarks/results/ingest.json

The same files from the same senders: DCMTK's `storescu` as it is, one and four at once; and a sender of its own that
times each answer, from the last byte of a slice to its status. Receivers write to the same disk; each runs alone. The
peers as they are shipped, and with `TCP_NODELAY=1` in their environment, which both take for it. Loopback, and (as
root, with `unshare`, `tc` and `ethtool`) a line of 1 Gb/s with an MTU of 1500, emulated in a network namespace of its
own. Beside it `fdatasync` alone, of a file as large as a slice, which is what nobody who says "stored" can be below.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydicom import dcmread
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import build_context
from pynetdicom.pdu import A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import A_ASSOCIATE, ImplementationClassUIDNotification, MaximumLengthNotification
from pynetdicom.sop_class import CTImageStorage

from benchmarks.record import Record, measuring
from dicom_node.images import part10
from dicom_node.intake.receiver import Receiver
from dicom_node.network import dimse
from dicom_node.simulation.phantom import write
from dicom_node.storage.spool import Spool
from runtime.types import Plane, Slice

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pynetdicom.presentation import PresentationContext

SENDERS = 4
LINE = (
    "ip link set lo up mtu 1500 && ethtool -K lo gso off tso off gro off && "
    "tc qdisc add dev lo root tbf rate 1gbit burst 64kb latency 50ms"
)


class Intake:
    """Nobody who listens: only storing is measured."""

    def instance_stored(self, *_: object) -> None:
        """Nothing."""

    def association_ended(self, *_: object, **__: object) -> None:
        """Nothing."""


@contextmanager
def process(command: Sequence[str], port: int, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A receiver, from when it listens."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=os.environ | environment, **quiet) as running:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.05)
        try:
            yield running
        finally:
            running.terminate()


def receivers(folder: Path, port: int) -> Iterator[tuple[str, Sequence[str], dict[str, str]]]:
    """Name, command and environment of each."""
    yield "scanside", (sys.executable, "-m", "benchmarks.ingest", "--serve", str(port), str(folder / "ours")), {}
    prompt = {"TCP_NODELAY": "1"}
    if shutil.which("storescp"):
        kept = folder / "storescp"
        kept.mkdir()
        command = ("storescp", "+B", "-od", str(kept), "--fork", str(port))
        yield "storescp_as_shipped", command, {}
        yield "storescp_nodelay", command, prompt
    if shutil.which("Orthanc"):
        settings = {
            "Name": "bench", "StorageDirectory": str(folder / "orthanc"), "IndexDirectory": str(folder / "orthanc"),
            "DicomPort": port, "HttpPort": port + 1, "DicomCheckCalledAet": False, "DicomAlwaysAllowStore": True,
            "SyncStorageArea": True, "OverwriteInstances": True, "DicomThreadsCount": 8,
        }  # fmt: skip
        path = folder / "orthanc.json"
        path.write_text(json.dumps(settings))
        yield "orthanc_as_shipped", ("Orthanc", str(path)), {}
        yield "orthanc_nodelay", ("Orthanc", str(path)), prompt


def cpu_s(pid: int) -> float:
    """Processor seconds of a process and the children it has waited for, so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def per_second(port: int, folders: Sequence[Path]) -> float:
    """Slices per second from one `storescu` for each folder, all at once."""
    count = sum(len(list(folder.iterdir())) for folder in folders)
    began = time.perf_counter()
    senders = [subprocess.Popen(("storescu", "+sd", "127.0.0.1", str(port), str(folder))) for folder in folders]
    if any(sender.wait() for sender in senders):
        raise SystemExit("a sender failed")
    return count / (time.perf_counter() - began)


def responses_ms(port: int, folder: Path) -> list[float]:
    """Times from a slice's last byte to its answer; nothing is encoded between two slices."""
    context = build_context(CTImageStorage, ExplicitVRLittleEndian)
    context.context_id = 1
    took = []
    with socket.create_connection(("127.0.0.1", port)) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.sendall(request([context]))
        read_pdu(peer)
        for path in sorted(folder.iterdir()):
            message = encoded(path)
            peer.sendall(message[:-1])
            time.sleep(0.002)  # all but the last byte has been taken in
            began = time.perf_counter()
            peer.sendall(message[-1:])
            read_pdu(peer)
            took.append(1e3 * (time.perf_counter() - began))
        peer.sendall(struct.pack(">BxL4x", 5, 4))
        read_pdu(peer)
    return took


def request(contexts: Sequence[PresentationContext]) -> bytes:
    """An A-ASSOCIATE-RQ for these contexts, which have their numbers."""
    asked = A_ASSOCIATE()
    asked.application_context_name = "1.2.840.10008.3.1.1.1"
    asked.calling_ae_title, asked.called_ae_title = "BENCH", "ANY-SCP"
    asked.presentation_context_definition_list = list(contexts)
    length, implementation = MaximumLengthNotification(), ImplementationClassUIDNotification()
    length.maximum_length_received, implementation.implementation_class_uid = 16384, "1.2.3"
    asked.user_information = [length, implementation]
    return A_ASSOCIATE_RQ(asked).encode()


def encoded(path: Path, piece: int = 16000, context_id: int = 1) -> bytes:
    """A C-STORE-RQ and its data set as PDUs, of a length that every receiver takes."""
    head = dcmread(path, stop_before_pixels=True)
    with path.open("rb") as file:
        part10.begin(file)
        data_set = file.read()
    command = dimse.encode(
        {
            dimse.AFFECTED_SOP_CLASS_UID: str(head.SOPClassUID),
            dimse.COMMAND_FIELD: dimse.Request.C_STORE,
            dimse.MESSAGE_ID: 1,
            0x0700: 0,
            dimse.COMMAND_DATA_SET_TYPE: 0,
            dimse.AFFECTED_SOP_INSTANCE_UID: str(head.SOPInstanceUID),
        }
    )
    parts = [(3, command)]
    starts = range(0, len(data_set), piece)
    parts += [(2 if at == starts[-1] else 0, data_set[at : at + piece]) for at in starts]
    return b"".join(
        struct.pack(">BxLLBB", 4, len(part) + 6, len(part) + 2, context_id, kind) + part for kind, part in parts
    )


def read_pdu(peer: socket.socket) -> bytes:
    """The next PDU without its head."""
    head = _exactly(peer, 6)
    return _exactly(peer, struct.unpack(">BxL", head)[1])


def _exactly(peer: socket.socket, size: int) -> bytes:
    got = b""
    while len(got) < size:
        if hasattr(socket, "TCP_QUICKACK"):
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        piece = peer.recv(size - len(got))
        if not piece:
            raise SystemExit("the receiver closed the connection")
        got += piece
    return got


def sync_ms(folder: Path, size: int) -> list[float]:
    """What it takes to write so many bytes to a new file and have them on the disk."""
    took, content = [], os.urandom(size)
    for number in range(100):
        path = folder / f"sync-{number}"
        began = time.perf_counter()
        with path.open("xb", buffering=0) as file:
            file.write(content)
            os.fdatasync(file.fileno())
        took.append(1e3 * (time.perf_counter() - began))
        path.unlink()
    return took


def measure(line: str, folder: Path, slices: int, rounds: int) -> dict[str, list[float]]:
    """All receivers in turn, and that several times: samples by figure."""
    series = [folder / f"series-{number}" for number in range(SENDERS + 2)]  # nothing is sent twice
    for number, one in enumerate(series):
        write(noise(number, slices), one)
    found: dict[str, list[float]] = {}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for _ in range(rounds):
        kept = folder / "kept"
        kept.mkdir()
        for name, command, environment in receivers(kept, port):
            with process(command, port, **environment) as running:
                before = cpu_s(running.pid)
                figures = {
                    "1_sender_per_s": [per_second(port, series[:1])],
                    "4_senders_per_s": [per_second(port, series[1:-1])],
                    "cpu_ms": [1e3 * (cpu_s(running.pid) - before) / (slices * (SENDERS + 1))],
                    "response_ms": responses_ms(port, series[-1]),
                }
            for figure, samples in figures.items():
                found.setdefault(f"{line}_{name}_{figure}", []).extend(samples)
        shutil.rmtree(kept)
    return found


def noise(number: int, slices: int) -> list[Slice]:
    """Slices of 512 x 512 that nothing compresses."""
    drawn = np.random.default_rng(number)
    return [
        Slice(
            f"{number}.{n}",
            Plane((0.0, 0.0, 5.0 * n), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.5, 0.5), 5.0),
            drawn.integers(-1000, 1500, (512, 512)).astype(np.int16),
        )
        for n in range(slices)
    ]


def serve(port: int, folder: Path) -> None:
    """Our receiver alone, until it is ended."""
    receiver = Receiver(
        ae_title="SCANSIDE",
        address="127.0.0.1",
        port=port,
        spool=Spool(folder, 0),
        intake=Intake(),
        max_associations=64,
    )
    receiver.start()
    while True:
        time.sleep(60)


def run(disk: Path, slices: int = 120, rounds: int = 3) -> Record:
    """All of it, on loopback and, where that can be had, on the emulated line.

    Parameters
    ----------
    disk : a folder on the disk to write to

    """
    with measuring("ingest", slices=slices, rounds=rounds) as record:
        with tempfile.TemporaryDirectory(dir=disk) as folder:
            found = measure("loopback", Path(folder), slices, rounds)
            record.add("fdatasync_ms", sync_ms(Path(folder), 526_000))
        again = [sys.executable, "-m", "benchmarks.ingest", "--line", "1_gbps", str(disk), str(slices), str(rounds)]
        shell = f"{LINE} && exec {shlex.join(again)}"
        line = subprocess.run(("unshare", "-n", "sh", "-c", shell), stdout=subprocess.PIPE, text=True, check=False)
        if line.returncode == 0:
            found |= json.loads(line.stdout)
        else:
            record.about["no_line"] = "no emulated line: that takes root, unshare, tc and ethtool"
        for name, samples in found.items():
            record.add(name, samples, floor="fdatasync_ms" if name.endswith("_response_ms") else None)
        where = subprocess.run(("stat", "-f", "-c", "%T", str(disk)), stdout=subprocess.PIPE, text=True, check=True)
        record.about["filesystem"] = where.stdout.strip()
    return record


def draw(record: Record, path: Path) -> None:
    """Slices per second, as bars."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (takes a second, and only here)

    lines = [line for line in ("loopback", "1_gbps") if any(name.startswith(line) for name in record.samples)]
    figure = Figure(figsize=(5.5 * len(lines), 3.2), dpi=120, layout="constrained")
    for axis, line in zip(figure.subplots(1, len(lines), sharey=True, squeeze=False)[0], lines, strict=True):
        end = "_1_sender_per_s"
        names = [name.removesuffix(end) for name in record.samples if name.startswith(line) and name.endswith(end)]
        at = np.arange(len(names))
        for offset, many in ((0.2, "1_sender"), (-0.2, "4_senders")):
            values = [record.median(f"{name}_{many}_per_s") for name in names]
            drawn = axis.barh(at + offset, values, 0.36, label=many.replace("_", " "))
            axis.bar_label(drawn, fmt="%.0f", padding=3, fontsize=8)
        axis.set_yticks(at, [name.removeprefix(f"{line}_").replace("_", " ") for name in names])
        axis.set(title=line.replace("1_gbps", "1 Gb/s"), xlabel="slices per second")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
        axis.legend(frameon=False, loc="lower right")
    figure.savefig(path)


def main() -> None:
    """What `run` starts: our receiver alone, or what is measured within the network namespace."""
    kind, *asked = sys.argv[1:]
    if kind == "--serve":
        serve(int(asked[0]), Path(asked[1]))
    line, disk, slices, rounds = asked
    with tempfile.TemporaryDirectory(dir=disk) as folder:
        json.dump(measure(line, Path(folder), int(slices), int(rounds)), sys.stdout)


if __name__ == "__main__":
    main()
