"""How fast slices are taken in and safe on the disk: ours beside DCMTK's storescp and Orthanc, in one run.

::

    python -m benchmarks.ingest --out benchmarks/results/ingest

The same files from the same senders: DCMTK's `storescu` as it is, one and four at once; and a sender of its own that
times each answer, from the last byte of a slice to its status. Receivers write to the same disk; each runs alone. The
peers as they are shipped, and with `TCP_NODELAY=1` in their environment, which both take for it. Loopback, and (as
root, with `unshare`, `tc` and `ethtool`) a line of 1 Gb/s with an MTU of 1500, emulated in a network namespace of its
own. Beside it `fdatasync` alone, of a file as large as a slice, which is what nobody who says "stored" can be below.
"""

from __future__ import annotations

import argparse
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydicom import dcmread
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import build_context
from pynetdicom.pdu import A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import A_ASSOCIATE, ImplementationClassUIDNotification, MaximumLengthNotification
from pynetdicom.sop_class import CTImageStorage
from rich.console import Console

from benchmarks.study import machine
from dicom_node import dimse, part10
from dicom_node.phantom import write
from dicom_node.receiver import Receiver
from dicom_node.spool import Spool
from runtime.types import Plane, Slice

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SENDERS = 4
LINE = (
    "ip link set lo up mtu 1500 && ethtool -K lo gso off tso off gro off && "
    "tc qdisc add dev lo root tbf rate 1gbit burst 64kb latency 50ms"
)


@dataclass(frozen=True)
class Row:
    """One receiver on one line.

    Attributes
    ----------
    one, four : slices per second from one and from four `storescu`, the median of the rounds
    response_ms : p50 and p99 from a slice's last byte to its answer
    cpu_ms : processor time of the receiver for each slice

    """

    line: str
    receiver: str
    one: float
    four: float
    response_ms: dict[str, float]
    cpu_ms: float


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
        yield "storescp, as shipped", command, {}
        yield "storescp, TCP_NODELAY", command, prompt
    if shutil.which("Orthanc"):
        settings = {
            "Name": "bench", "StorageDirectory": str(folder / "orthanc"), "IndexDirectory": str(folder / "orthanc"),
            "DicomPort": port, "HttpPort": port + 1, "DicomCheckCalledAet": False, "DicomAlwaysAllowStore": True,
            "SyncStorageArea": True, "OverwriteInstances": True, "DicomThreadsCount": 8,
        }  # fmt: skip
        path = folder / "orthanc.json"
        path.write_text(json.dumps(settings))
        yield "Orthanc, as shipped", ("Orthanc", str(path)), {}
        yield "Orthanc, TCP_NODELAY", ("Orthanc", str(path)), prompt


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


def responses_ms(port: int, folder: Path) -> dict[str, float]:
    """Times from a slice's last byte to its answer; nothing is encoded between two slices."""
    asked = A_ASSOCIATE()
    asked.application_context_name = "1.2.840.10008.3.1.1.1"
    asked.calling_ae_title, asked.called_ae_title = "BENCH", "ANY-SCP"
    context = build_context(CTImageStorage, ExplicitVRLittleEndian)
    context.context_id = 1
    asked.presentation_context_definition_list = [context]
    length, implementation = MaximumLengthNotification(), ImplementationClassUIDNotification()
    length.maximum_length_received, implementation.implementation_class_uid = 16384, "1.2.3"
    asked.user_information = [length, implementation]
    took = []
    with socket.create_connection(("127.0.0.1", port)) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.sendall(A_ASSOCIATE_RQ(asked).encode())
        _read_pdu(peer)
        for path in sorted(folder.iterdir()):
            message = _encoded(path)
            peer.sendall(message[:-1])
            time.sleep(0.002)  # all but the last byte has been taken in
            began = time.perf_counter()
            peer.sendall(message[-1:])
            _read_pdu(peer)
            took.append(1e3 * (time.perf_counter() - began))
        peer.sendall(struct.pack(">BxL4x", 5, 4))
        _read_pdu(peer)
    return {f"p{p}": round(float(np.percentile(took, p)), 2) for p in (50, 99)}


def _encoded(path: Path, piece: int = 16000) -> bytes:
    """A C-STORE-RQ and its data set as PDUs, of a length that every receiver takes."""
    with path.open("rb") as file:
        part10.begin(file)
        data_set = file.read()
    command = dimse.encode(
        {
            dimse.AFFECTED_SOP_CLASS_UID: CTImageStorage,
            dimse.COMMAND_FIELD: dimse.Request.C_STORE,
            dimse.MESSAGE_ID: 1,
            0x0700: 0,
            dimse.COMMAND_DATA_SET_TYPE: 0,
            dimse.AFFECTED_SOP_INSTANCE_UID: str(dcmread(path, stop_before_pixels=True).SOPInstanceUID),
        }
    )
    parts = [(3, command)]
    starts = range(0, len(data_set), piece)
    parts += [(2 if at == starts[-1] else 0, data_set[at : at + piece]) for at in starts]
    return b"".join(struct.pack(">BxLLBB", 4, len(part) + 6, len(part) + 2, 1, kind) + part for kind, part in parts)


def _read_pdu(peer: socket.socket) -> None:
    head = _exactly(peer, 6)
    _exactly(peer, struct.unpack(">BxL", head)[1])


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


def sync_ms(folder: Path, size: int) -> dict[str, float]:
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
    return {f"p{p}": round(float(np.percentile(took, p)), 2) for p in (50, 99)}


def measure(line: str, folder: Path, slices: int, rounds: int) -> list[Row]:
    """All receivers in turn, and that several times."""
    series = [folder / f"series-{number}" for number in range(SENDERS + 2)]  # nothing is sent twice
    for number, one in enumerate(series):
        write(noise(number, slices), one)
    found: dict[str, list[tuple[float, float, dict[str, float], float]]] = {}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for _ in range(rounds):
        kept = folder / "kept"
        kept.mkdir()
        for name, command, environment in receivers(kept, port):
            with process(command, port, **environment) as running:
                before = cpu_s(running.pid)
                one, four = per_second(port, series[:1]), per_second(port, series[1:-1])
                cpu_ms = 1e3 * (cpu_s(running.pid) - before) / (slices * (SENDERS + 1))
                found.setdefault(name, []).append((one, four, responses_ms(port, series[-1]), cpu_ms))
        shutil.rmtree(kept)
    return [
        Row(
            line,
            name,
            round(float(np.median([one for one, *_ in runs])), 1),
            round(float(np.median([four for _, four, *_ in runs])), 1),
            {key: round(float(np.median([ms[key] for _, _, ms, _ in runs])), 2) for key in ("p50", "p99")},
            round(float(np.median([cpu for *_, cpu in runs])), 2),
        )
        for name, runs in found.items()
    ]


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


PAGE = """# Intake

Made by `python -m benchmarks.ingest --slices {slices} --rounds {rounds}` on {cpu}, {threads} threads: CT slices
of 526 kB, stored on one disk ({filesystem}), medians of {rounds} rounds. To write such a file and have it on the disk
(`fdatasync`) takes {sync[p50]} ms (p99 {sync[p99]}). Orthanc and scanside answer when it is there (Orthanc's
SyncStorageArea is on), DCMTK's storescp syncs nothing.

{table}

Slices per second from one and from four `storescu` as they are shipped; response: from a slice's last byte to its
answer, one sender; CPU: the receiver's, for each slice. "1 Gb/s" is emulated: a network namespace whose loopback has an
MTU of 1500 and a token bucket. The peers answer in two writes with Nagle's algorithm on, and wait for an
acknowledgement that the other side puts off by 40 ms; `TCP_NODELAY=1` in their environment cures it, and nobody sets
that by default.

![slices per second](ingest.png)
"""


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| line | receiver | 1 storescu | 4 storescu | response p50, ms | p99 | CPU ms |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.line} | {row.receiver} | {row.one:.0f} | {row.four:.0f} "
        f"| {row.response_ms['p50']} | {row.response_ms['p99']} | {row.cpu_ms} |"
        for row in rows
    ]
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Slices per second, as bars."""
    import matplotlib as mpl  # noqa: PLC0415 (takes a second, and only here)

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    lines = list(dict.fromkeys(row.line for row in rows))
    figure, axes = plt.subplots(1, len(lines), figsize=(5.5 * len(lines), 3.2), sharey=True, squeeze=False)
    for axis, line in zip(axes[0], lines, strict=True):
        some = [row for row in rows if row.line == line][::-1]
        at = np.arange(len(some))
        for offset, name, values in (
            (0.2, "1 sender", [r.one for r in some]),
            (-0.2, "4 senders", [r.four for r in some]),
        ):
            bars = axis.barh(at + offset, values, 0.36, label=name)
            axis.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
        axis.set_yticks(at, [row.receiver for row in some])
        axis.set_title(line)
        axis.set_xlabel("slices per second")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
    axes[0][0].legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, default=Path("benchmarks/results/ingest"))
    arguments.add_argument("--disk", type=Path, default=Path(), help="a folder on the disk to write to")
    arguments.add_argument("--slices", type=int, default=120, help="of each series")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments.add_argument("--line", help=argparse.SUPPRESS)
    asked = arguments.parse_args()
    if asked.serve:
        serve(int(asked.serve[0]), Path(asked.serve[1]))
    with tempfile.TemporaryDirectory(dir=asked.disk) as folder:
        rows = measure(asked.line or "loopback", Path(folder), asked.slices, asked.rounds)
        sync = sync_ms(Path(folder), 526_000)
    if asked.line:  # within the namespace, for the run outside
        json.dump([asdict(row) for row in rows], sys.stdout)
        return
    again = [sys.executable, "-m", "benchmarks.ingest", "--line", "1 Gb/s", "--disk", str(asked.disk)]
    again += ["--slices", str(asked.slices), "--rounds", str(asked.rounds)]
    shell = f"{LINE} && exec {shlex.join(again)}"
    line = subprocess.run(("unshare", "-n", "sh", "-c", shell), stdout=subprocess.PIPE, text=True, check=False)
    if line.returncode == 0:
        rows += [Row(**row) for row in json.loads(line.stdout)]
    else:
        print("no emulated line: that takes root, unshare, tc and ethtool", file=sys.stderr)
    asked.out.mkdir(parents=True, exist_ok=True)
    filesystem = subprocess.run(
        ("stat", "-f", "-c", "%T", str(asked.disk)), stdout=subprocess.PIPE, text=True, check=True
    )
    told = {"machine": machine(), "filesystem": filesystem.stdout.strip(), "fdatasync_ms": sync}
    told |= {"slices": asked.slices, "rounds": asked.rounds, "rows": [asdict(row) for row in rows]}
    (asked.out / "results.json").write_text(json.dumps(told, indent=2) + "\n")
    page = PAGE.format(table=table(rows), sync=sync, **told | told["machine"])
    (asked.out / "README.md").write_text(page)
    draw(rows, asked.out / "ingest.png")
    Console().print(table(rows))


if __name__ == "__main__":
    main()
