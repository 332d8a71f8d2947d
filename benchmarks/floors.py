"""What the end of a series can't be faster than: each part of the remaining work alone, as a worker does it.

Inference of the last slice; measuring; building the results and writing them, synced; a file as large as a slice
synced; and the same results over loopback into the same archive, encoded before, from a sender that does nothing else.
"""

from __future__ import annotations

import socket
import struct
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from pydicom import dcmread
from pynetdicom import build_context

from benchmarks import ingest
from benchmarks.running import RunError
from benchmarks.timing import once_ms
from dicom_node.analysis import analyser
from dicom_node.analysis.analyser import Analyser
from dicom_node.analysis.rehearsal import rehearse
from dicom_node.analysis.series import Series
from dicom_node.network import dimse
from dicom_node.results import writing
from dicom_node.results.painter import Painter
from dicom_node.results.result_set import USUAL
from runtime.bundle import open_bundle
from runtime.session import open_session
from runtime.triage import Rule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

RULES = (Rule("critical", ("any",), 30.0), Rule("urgent", ("any",), 0.0))
T = TypeVar("T")
REMAINING = ("inference", "compose", "build", "write", "round_trip")  # their sum is the floor of the whole


@dataclass(frozen=True, slots=True)
class Parts:
    """Milliseconds of each part of one series' end, and the files it left."""

    ms: dict[str, float]
    files: list[Path]


@contextmanager
def rehearsed(bundle: Path | None, precision: str = "auto") -> Iterator[Analyser]:
    """As the worker has it, rehearsed."""
    opened = open_bundle(bundle)
    limits = {"min_slices": 5, "min_coverage_mm": 100.0}
    with closing(open_session(opened, precision=precision)) as session, closing(Painter()) as painter:
        rehearse(opened, session, USUAL, painter.draw)
        yield Analyser(opened, session, RULES, **limits, max_batch=session.max_batch, draw=painter.draw)


def close(one: Analyser, paths: Sequence[Path], folder: Path) -> Parts:
    """Analyse a series in this process and time what is left when its last slice is there."""
    series = Series()
    for path in paths[:-1]:
        one.feed(series, [path])
    ms = {"inference": once_ms(lambda: one.feed(series, paths[-1:]))}
    with _timed(ms):
        ms["close"] = once_ms(lambda: one.close(series, folder, revision=1, missing=()))
    return Parts(ms, sorted(folder.glob("*.dcm")))


@contextmanager
def _timed(ms: dict[str, float]) -> Iterator[None]:
    """Time the parts of `Analyser.close` while it runs: what comes of them together is made first, and written then."""
    compose, write = analyser.compose, writing.write

    def timed_compose(*args: object, **options: object) -> object:
        return _noted(ms, "compose", lambda: compose(*args, **options))

    def timed_write(made: Iterable[object], *args: object, **options: object) -> object:
        objects = _noted(ms, "build", lambda: list(made))
        return _noted(ms, "write", lambda: write(objects, *args, **options))

    analyser.compose, writing.write = timed_compose, timed_write
    try:
        yield
    finally:
        analyser.compose, writing.write = compose, write


def _noted(ms: dict[str, float], part: str, work: Callable[[], T]) -> T:
    began = time.perf_counter()
    answer = work()
    ms[part] = 1e3 * (time.perf_counter() - began)
    return answer


def round_trip_ms(files: Sequence[Path], port: int) -> float:
    """Milliseconds to store objects over loopback, from connecting to the last answer, with all encoded before.

    Raises
    ------
    RunError : one was refused

    """
    messages, contexts = [], []
    for number, path in enumerate(files):
        head = dcmread(path, stop_before_pixels=True)
        context = build_context(head.SOPClassUID, head.file_meta.TransferSyntaxUID)
        context.context_id = 2 * number + 1
        contexts.append(context)
        messages.append(ingest.encoded(path, context_id=context.context_id))
    request = ingest.request(contexts)
    return once_ms(lambda: _store(request, messages, port))


def _store(request: bytes, messages: Sequence[bytes], port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.sendall(request)
        ingest.read_pdu(peer)
        for message in messages:
            peer.sendall(message)
            status = dimse.Command(ingest.read_pdu(peer)[6:]).number(dimse.STATUS)
            if status != dimse.SUCCESS:
                raise RunError(f"an object was refused with status {status:04X}")
        peer.sendall(struct.pack(">BxL4x", 5, 4))
        ingest.read_pdu(peer)
