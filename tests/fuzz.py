"""Hostile bytes by coverage, through the functions that receiver and worker call: an answer, or a refusal by name.

::

    python -m tests.fuzz --seconds 660 --seed 1 --out benchmarks/results/fuzz --more /folder/of/files

Needs Google's atheris (``pip install atheris``), which is libFuzzer for Python. What is found lies in the folder of
``--corpus`` as ``decode-crash-...``, to be given to `TARGETS`; what is worth keeping in ``tests/dicom_node/seeds``,
which `test_seeds` replays.
"""

from __future__ import annotations

import argparse
import atexit
import json
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SEEDS = Path(__file__).parent / "dicom_node" / "seeds"
LONGEST = 1 << 16
TOKENS = [
    b"\xfe\xff\x00\xe0", b"\xfe\xff\x0d\xe0", b"\xfe\xff\xdd\xe0", b"\xff\xff\xff\xff", b"SQ\0\0\xff\xff\xff\xff",
    b"\x08\x00\x05\x00CS", b"\x08\x00\x18\x00UI", b"\x20\x00\x0d\x00UI", b"\x20\x00\x0e\x00UI", b"\x28\x00\x10\x00US",
    b"\x28\x00\x08\x00IS", b"\x20\x00\x37\x00DS", b"\x20\x00\x32\x00DS", b"\xe0\x7f\x10\x00OW", b"\x08\x00\x08\x00CS",
    b"ISO 2022 IR 87", b"ISO_IR 192", b"\\", b"1e999", b"nan", b"1.2.840.10008.1.2.4.90", b"1.2.840.10008.1.2.1.99",
    b"UN\0\0", b"UT\0\0", b"OB\0\0", b"\xff\xd8\xff\xc3", b"\xff\x4f\xff\x51", b"\xff\xd8\xff\xf7", b"LOCALIZER",
    b"\x04\x00\x00\x00\x00\x00", b"\x01\x00\x00\x00\x00\x00", b"\x00\x00\x00\x01\x02\x00\x00\x00\x01\x00", b"DERIVED",
]  # fmt: skip
FINDINGS = ("association_failed", "instance_failed", "disk_failed", "event_failed")  # what is logged as a fault of ours


def _no_fault(_logger: object, _method: str, event: dict[str, Any]) -> dict[str, Any]:
    import structlog

    if event["event"] in FINDINGS:
        raise AssertionError(event["event"])
    raise structlog.DropEvent


# what is fuzzed


def parse(data: bytes) -> None:
    """Take bytes from a peer: its PDUs, or by the first byte a data set that it stores, or one of another service."""
    from pydicom.uid import UID

    from dicom_node.images import part10
    from dicom_node.network.wire import TRANSFER_SYNTAXES

    if data[:1] == b"\x01":
        _connect(data)
        return
    kind, data_set = data[0] if data else 0, data[1:]
    syntax = UID(TRANSFER_SYNTAXES[kind % len(TRANSFER_SYNTAXES)])
    with suppress(part10.DataSetError):
        study, series, instance = part10.identity(data_set, syntax)
        assert study
        assert series
        assert instance
    with suppress(part10.DataSetError):
        part10.read_whole(data_set, syntax)


def _connect(data: bytes) -> None:
    """Serve a connection whose peer sends this and no more."""
    import structlog

    from dicom_node.network.connection import Connection

    structlog.configure(processors=[_no_fault])
    acceptor, folder = _served()
    ours, theirs = socket.socketpair()
    with _Pair(fileno=ours.detach()) as accepted, theirs:
        theirs.sendall(data[:LONGEST])
        theirs.shutdown(socket.SHUT_WR)
        Connection(acceptor, accepted, "192.0.2.1", 104, None).run()
        answer = theirs.recv(1)
        assert answer in (b"", b"\x02", b"\x03", b"\x07"), answer
    for kept in (*folder.glob("[0-9u]*"), *(folder / "quarantine").iterdir()):
        shutil.rmtree(kept) if kept.is_dir() else kept.unlink()
    assert not list((folder / "incoming").iterdir()), "left behind"


class _Pair(socket.socket):
    """One of two sockets without a network between, which has none of TCP's options."""

    def setsockopt(self, *_: object) -> None:
        """Pass over it."""


@cache
def _served() -> tuple[Any, Path]:
    """A receiver with all of its services, behind an acceptor that has no port."""
    from dicom_node.intake import commitment, mpps
    from dicom_node.intake.announced import Announced
    from dicom_node.intake.receiver import Receiver, contexts
    from dicom_node.network.wire import FROM_CT_SCANNERS
    from dicom_node.storage.journal import Journal
    from dicom_node.storage.spool import Spool

    folder = _fast_folder()
    spool, journal = Spool(folder / "spool", 0), Journal(folder / "journal.sqlite")
    announced = Announced(journal)
    services = {
        mpps.SOP_CLASS: mpps.PerformedSteps(announced, _nothing),
        commitment.SOP_CLASS: commitment.Commitments(journal, spool, announced, (), "SCANSIDE", _nothing),
    }
    intake = SimpleNamespace(instance_stored=_nothing, association_ended=_nothing)
    receiver = Receiver(ae_title="SCANSIDE", address="", port=0, spool=spool, intake=intake, services=services)
    acceptor = SimpleNamespace(
        services=receiver, contexts=contexts(FROM_CT_SCANNERS, services), max_pdu=131072, idle_timeout_s=1,
        is_stopping=False, admit=_nothing, left=_nothing, gone=_nothing,
    )  # fmt: skip
    return acceptor, folder / "spool"


def decode(data: bytes) -> None:
    """Analyse a file as the worker does: decoded, or refused with a reason, and said in JSON."""
    import numpy as np

    from dicom_node.analysis import decode as decoding
    from dicom_node.analysis import kernel
    from dicom_node.analysis.series import Seen, Series
    from dicom_node.analysis.worker import _seen
    from dicom_node.images.gate import BONE_KERNELS, NotAnalysed

    path = _fast_folder() / "slice.dcm"
    path.write_bytes(data)
    seen, series = Seen(path), Series()
    for image in decoding.read(path):
        if isinstance(image, NotAnalysed):
            seen.images.append(image)
            continue
        header, slice_ = image
        assert slice_.hu.dtype == np.int16
        assert "PixelData" not in header
        series.add(path, header, slice_, header)
        series.rank = kernel.rank(header, BONE_KERNELS)
        seen.images.append(slice_.plane)
    json.dumps(_seen(seen, series), allow_nan=False)


def gate(data: bytes) -> None:
    """The same of a header alone, before pixels that are whole."""
    from pydicom.uid import CTImageStorage

    from dicom_node.images import part10
    from dicom_node.network.wire import TRANSFER_SYNTAXES

    kind = data[0] if data else 0
    head = part10.file_head(CTImageStorage, "1.2.3", TRANSFER_SYNTAXES[kind % 2], "CT01")
    tail = b"\xe0\x7f\x10\x00" + (b"" if kind % 2 else b"OW\0\0") + struct.pack("<L", 512) + bytes(512)
    decode(head + data[1:] + tail)


TARGETS: dict[str, Callable[[bytes], None]] = {"parse": parse, "decode": decode, "gate": gate}


def _nothing(*_: object, **__: object) -> None:
    """Take note of nothing."""


@cache
def _fast_folder() -> Path:
    """A folder of this process, in memory where there is one."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="scanside-fuzz-", dir=memory if memory.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# how bytes are changed


def mutate(data: bytes, seed: int) -> bytes:
    """Change elements of a data set or PDUs of a connection as a whole: libFuzzer knows bytes alone."""
    drawn = random.Random(seed)
    parts = list(_parts(data))
    at = drawn.randrange(len(parts))
    match drawn.randrange(7):
        case 0:
            parts.insert(drawn.randrange(len(parts)), parts[at])
        case 1:
            del parts[at]
        case 2:
            other = drawn.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        case 3:  # another length, as elements, PDUs and their values have it
            width = drawn.choice([2, 4])
            where = drawn.randrange(2, 12)
            length = drawn.choice([0, 1, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, drawn.randrange(70000)])
            parts[at] = parts[at][:where] + length.to_bytes(4, "little")[:width] + parts[at][where + width :]
        case 4:
            parts[at] = parts[at][:4] + drawn.choice([b"UI", b"DS", b"IS", b"US", b"SQ", b"UN", b"OB"]) + parts[at][6:]
        case 5:
            parts[at] = parts[at][:4] + b"SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" + b"".join(parts[at:])
        case 6:
            where = drawn.randrange(len(parts[at]) + 1)
            parts[at] = parts[at][:where] + drawn.choice(TOKENS) + parts[at][where:]
    return b"".join(parts)


def _parts(data: bytes) -> Iterator[bytes]:
    """PDUs, or what stands before each thing that looks like an element of explicit VR."""
    if data[:2] == b"\x01\0":
        at = 0
        while at < len(data):
            length = 6 + int.from_bytes(data[at + 2 : at + 6], "big")
            yield data[at : at + length]
            at += length
        return
    starts = [match.start() for match in re.finditer(rb"(?s)[\x02\x08\x10\x18\x20\x28\xe0][\x00\x7f]..[A-Z]{2}", data)]
    for first, last in zip([0, *starts], [*starts, len(data)], strict=True):
        yield data[first:last]


# the run


def fuzz(target: str, arguments: list[str]) -> None:
    """Run libFuzzer in this process, until its time is up or something is found."""
    import atheris

    with atheris.instrument_imports(include=["dicom_node", "pydicom", "pynetdicom"]):
        pass

    import warnings

    def change(data: bytes, most: int, seed: int) -> bytes:
        changed = mutate(data, seed) if data and seed % 2 else atheris.Mutate(data, most)
        return changed[:most]

    warnings.simplefilter("ignore")
    atheris.Setup([sys.argv[0], *arguments], TARGETS[target], custom_mutator=change)
    atheris.Fuzz()


def measure(target: str, seconds: int, seed: int, corpus: Path, more: list[Path]) -> dict[str, Any]:
    """Fuzz in a process of its own: how long, how often, how much was reached, and what was found."""
    found = corpus / target
    found.mkdir(parents=True, exist_ok=True)
    words = found.parent / "tokens"
    words.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in token) + '"\n' for token in TOKENS))
    options = [
        f"-max_total_time={seconds}", f"-seed={seed}", f"-max_len={LONGEST}", f"-dict={words}", "-timeout=20",
        "-rss_limit_mb=4096", "-print_final_stats=1", f"-artifact_prefix={found.parent}/{target}-",
    ]  # fmt: skip
    folders = [str(folder) for folder in (found, SEEDS / target, *more) if folder.is_dir()]
    command = [sys.executable, "-m", "tests.fuzz", "--target", target, "--", *options, *folders]
    began = time.monotonic()
    log = found.parent / f"{target}.log"
    with log.open("wb") as file:
        returned = subprocess.run(command, stderr=file, stdout=file, check=False).returncode
    said = log.read_text(errors="replace")
    edges = re.findall(r"cov: (\d+) ft: (\d+)", said) or [("0", "0")]
    runs = re.findall(r"^#(\d+)", said, re.MULTILINE) or ["0"]
    return {
        "target": target, "seed": seed, "seconds": round(time.monotonic() - began), "executions": int(runs[-1]),
        "edges": int(edges[-1][0]), "features": int(edges[-1][1]),
        "findings": sorted(path.name for path in found.parent.glob(f"{target}-*")), "returned": returned,
    }  # fmt: skip


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--seconds", type=int, default=660, help="of all targets together")
    asked.add_argument("--seed", type=int, default=1)
    asked.add_argument("--corpus", type=Path, default=Path(tempfile.gettempdir()) / "scanside-fuzz")
    asked.add_argument("--more", type=Path, nargs="*", default=[], help="folders of files to begin with")
    asked.add_argument("--out", type=Path, help="folder for results.json")
    asked.add_argument("--target", choices=TARGETS, help="this alone, with libFuzzer's own arguments after --")
    asked.add_argument("libfuzzer", nargs="*", help=argparse.SUPPRESS)
    told = asked.parse_args()
    if told.target:
        fuzz(told.target, told.libfuzzer)
    rows = []
    for target in TARGETS:
        rows.append(measure(target, told.seconds // len(TARGETS), told.seed, told.corpus, told.more))
        print(json.dumps(rows[-1]), flush=True)
    if told.out:
        from benchmarks.study import machine

        told.out.mkdir(parents=True, exist_ok=True)
        command = f"python -m tests.fuzz --seconds {told.seconds} --seed {told.seed}{' --more ...' * bool(told.more)}"
        result = {"command": command, "machine": machine(), "rows": rows}
        (told.out / "results.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
