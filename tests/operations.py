"""Counts of what a stretch of code does to the machine, without a clock: syncs, names, opened files, bytes, sends."""

from __future__ import annotations

import os
import socket
import sqlite3
import sys
import threading
import tracemalloc
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dicom_node.storage import journal, spool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import pytest

SYSTEM_CALLS = ("fsync", "fdatasync", "link", "rename", "replace", "unlink")
_listening: list[tuple[Counter[str], Callable[[], bool], str]] = []  # an audit hook stays for ever: one for all


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and _listening and not isinstance(arguments[0], int):  # a number is open already
        count, is_meant, folder = _listening[-1]
        if is_meant() and os.fsdecode(arguments[0]).startswith(folder):
            count["open"] += 1


sys.addaudithook(_audit)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, threads: str = "", folder: Path | str = "") -> Iterator[Counter[str]]:
    """Operations of this block, in threads whose names begin so: ours, not those of a sender beside it.

    Files that are opened count in this folder: what a log or a library opens besides is no slice's.
    """
    count: Counter[str] = Counter()

    def is_meant() -> bool:
        return threading.current_thread().name.startswith(threads)

    def watched(name: str, work: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            if is_meant():
                count[name] += 1
            return work(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in SYSTEM_CALLS:
            patch.setattr(os, name, watched(name, getattr(os, name)))
        patch.setattr(socket.socket, "sendall", watched("send", socket.socket.sendall))

        def written(file: object, piece: bytes, work: Callable[..., None] = spool._write) -> None:
            if is_meant():
                count["bytes_written"] += len(piece)
            work(file, piece)

        patch.setattr(spool, "_write", written)
        _listening.append((count, is_meant, str(folder)))
        try:
            yield count
        finally:
            _listening.pop()


@contextmanager
def transactions(opened: journal.Journal) -> Iterator[list[str]]:
    """What a journal commits in this block: the first statement of each transaction that writes."""
    begun: list[str] = []
    connection: sqlite3.Connection = opened.database.connection
    connection.set_trace_callback(lambda statement: begun.append(statement) if statement == "BEGIN IMMEDIATE" else None)
    try:
        yield begun
    finally:
        connection.set_trace_callback(None)


@contextmanager
def memory() -> Iterator[dict[str, int]]:
    """Bytes that this block has allocated at its peak, and those that it leaves."""
    tracemalloc.start()
    told: dict[str, int] = {}
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        yield told
        after, peak = tracemalloc.get_traced_memory()
        told |= {"peak": peak - before, "kept": after - before}
    finally:
        tracemalloc.stop()
