"""What the end of a series can't be faster than: each part of the remaining work alone, in this process.

Inference of the last slice; measuring; building the results and writing them, synced; a file as large as a slice
synced; and the same results over loopback into the same archive, encoded before, from a sender that does nothing else.
"""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydicom import dcmread
from pynetdicom import build_context

from benchmarks import ingest
from benchmarks.running import RunError
from benchmarks.timing import once_ms
from dicom_node import analysis, dimse, results
from dicom_node.analysis import Analyser, Series
from runtime.bundle import open_bundle
from runtime.session import open_session
from runtime.triage import Rule

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from runtime.session import Session

RULES = (Rule("critical", ("any",), 30.0), Rule("urgent", ("any",), 0.0))
REMAINING = ("inference", "compose", "build", "write", "round_trip")  # their sum is the floor of the whole


@dataclass(frozen=True, slots=True)
class Parts:
    """Milliseconds of each part of one series' end, and the files it left."""

    ms: dict[str, float]
    files: list[Path]


def analyser(bundle: Path | None, precision: str = "auto") -> tuple[Analyser, Session]:
    """As the worker has it."""
    opened = open_bundle(bundle)
    session = open_session(opened, precision=precision)
    limits = {"min_slices": 5, "min_coverage_mm": 100.0}
    return Analyser(opened, session, RULES, **limits, max_batch=session.max_batch), session


def closing(one: Analyser, paths: Sequence[Path], folder: Path) -> Parts:
    """Analyse a series in this process and time what is left when its last slice is there."""
    series = Series()
    for path in paths[:-1]:
        one.feed(series, [path])
    ms = {"inference": once_ms(lambda: one.feed(series, paths[-1:]))}
    with _timed(ms):
        ms["close"] = once_ms(lambda: one.close(series, folder, revision=1, missing=()))
    return Parts(ms, sorted(folder.glob("*.dcm")))


class _timed:  # noqa: N801  # reads as the context manager that it is
    """Time the parts of `Analyser.close` while it runs."""

    def __init__(self, ms: dict[str, float]) -> None:
        self._ms, self._before = ms, []

    def __enter__(self) -> None:
        for owner, name, called in (
            (analysis, "compose", "compose"), (results, "build", "build"), (results, "write", "write"),
        ):  # fmt: skip
            self._before.append((owner, name, getattr(owner, name)))
            setattr(owner, name, self._around(getattr(owner, name), called))

    def __exit__(self, *_: object) -> None:
        for owner, name, before in self._before:
            setattr(owner, name, before)

    def _around(self, work: Callable[..., object], called: str) -> Callable[..., object]:
        def timed(*args: object, **options: object) -> object:
            began = time.perf_counter()
            answer = work(*args, **options)
            self._ms[called] = self._ms.get(called, 0.0) + 1e3 * (time.perf_counter() - began)
            return answer

        return timed


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
