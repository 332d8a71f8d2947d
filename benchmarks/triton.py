"""What a server costs beside the engine in the node's own process, and what more of them give.

A real Triton on this machine (`benchmarks.tritonserver`) runs the same graph by the same ONNX Runtime with as many
threads; a slice goes there over gRPC with shared memory, gRPC and HTTP, and through the local session, in turn, so that
noise meets all alike. Its Python backend passes tensors once more between two processes, which Triton's own backends
do not.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.record import Record, measuring
from benchmarks.timing import LEAST_S, in_turn_ms
from benchmarks.tritonserver import TritonServer
from export import triton
from runtime.bundle import open_bundle
from runtime.errors import ScansideError
from runtime.session import open_session
from runtime.triton import Servers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from runtime.bundle import Bundle
    from runtime.session import Session

WINDOWS = 5  # into which a rate is divided, for its spread
CLIENTS = 2  # of each replica: one request waits while another is computed
DEADLINE_S = 60.0


class OtherAnswers(ScansideError):
    """A server whose labels are not the local engine's: it would be another thing that is measured."""


def measure(
    bundle: Path | None, *, batch: int = 1, threads: int = 1, matrix: int = 512, seconds: float = LEAST_S
) -> Record:
    """Milliseconds of an inference by each way, and what each costs more than the local engine.

    Raises
    ------
    NoTriton : it is not installed
    OtherAnswers

    """
    opened = open_bundle(bundle)
    asked = {"batch": batch, "threads": threads, "matrix": matrix, "seconds": seconds}
    hu = _views(opened, batch, matrix)
    with measuring("triton", **asked) as record, ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        repository = _repository(opened, folder, threads)
        server = stack.enter_context(TritonServer(repository, folder))
        ways = {
            "local": open_session(opened, "onnxruntime", threads=threads),
            "shared_memory": _connected(opened, [server.grpc]),
            "grpc": _connected(opened, [server.grpc], shares=False),
            "http": _connected(opened, [server.http]),
        }
        for session in ways.values():
            stack.callback(session.close)
        record.about |= {
            "model": f"{opened.name} {opened.version}",
            "engines": {name: f"{one.identity.backend}; {one.why}" for name, one in ways.items()},
        }
        _check_same(ways, hu)
        took = in_turn_ms(*(lambda one=one: one.infer(hu) for one in ways.values()), seconds=seconds)
        local = np.array(took[0])
        for name, times in zip(ways, took, strict=True):
            record.add(f"{name}_ms", times, floor=None if name == "local" else "local_ms")
        for name, times in list(zip(ways, took, strict=True))[1:]:
            record.add(f"{name}_more_per_slice_ms", (np.array(times) - local) / batch / opened.view.answered)
    return record


def replicas(
    bundle: Path | None, *, counts: Sequence[int] = (1, 2, 4), matrix: int = 512, seconds: float = LEAST_S
) -> Record:
    """Slices a second through more and more replicas of one thread each, beside as many times the first.

    More replicas than cores can't be faster than the cores are: the ideal goes as far as there are any.
    """
    opened = open_bundle(bundle)
    hu = _views(opened, 1, matrix)
    cores = len(os.sched_getaffinity(0))
    asked = {"counts": list(counts), "matrix": matrix, "seconds": seconds}
    with measuring("replicas", **asked) as record, ExitStack() as stack:
        record.about |= {"model": f"{opened.name} {opened.version}", "cores": cores, "clients_of_each": CLIENTS}
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        repository = _repository(opened, folder, 1)
        servers: list[TritonServer] = []
        for count in sorted(counts):
            for number in range(len(servers), count):
                place = folder / str(number)
                place.mkdir()
                servers.append(stack.enter_context(TritonServer(repository, place)))
            name = f"replicas_{count}_per_s"
            record.add(name, _rate(opened, [one.grpc for one in servers], hu, seconds))
            first = record.median(f"replicas_{min(counts)}_per_s") / min(counts)
            record.add(f"replicas_{count}_ideal_per_s", [first * min(count, cores)])
            record.floors[name] = f"replicas_{count}_ideal_per_s"
    return record


def _rate(bundle: Bundle, addresses: Sequence[str], hu: NDArray[np.int16], seconds: float) -> list[float]:
    """Slices a second of several clients at once, window by window; each asks all replicas in turn."""
    done: list[float] = []
    over = threading.Event()
    clients = CLIENTS * len(addresses)
    ready = threading.Barrier(clients + 1)

    def work(number: int) -> None:
        first = number % len(addresses)
        session = _connected(bundle, [*addresses[first:], *addresses[:first]])
        session.infer(hu)
        ready.wait()
        while not over.is_set():
            session.infer(hu)
            done.append(time.perf_counter())
        session.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for one in threads:
        one.start()
    ready.wait()
    began = time.perf_counter()
    time.sleep(seconds)
    over.set()
    for one in threads:
        one.join()
    edges = began + seconds * np.arange(WINDOWS + 1) / WINDOWS
    counts, _ = np.histogram(done, edges)
    return [float(count) * bundle.view.answered * WINDOWS / seconds for count in counts]


def _repository(bundle: Bundle, folder: Path, threads: int) -> Path:
    triton.write(bundle, "fp32", folder / "repository", engine="python", threads=threads)
    return folder / "repository"


def _connected(bundle: Bundle, addresses: Sequence[str], *, shares: bool = True) -> Session:
    session = open_session(bundle, "triton", servers=Servers(tuple(addresses), DEADLINE_S))
    if not shares:
        for replica in session._replicas:  # noqa: SLF001  # nobody but a benchmark wants less
            replica.server._shares = False  # noqa: SLF001
            replica.server.why = replica.server.why.replace(" with shared memory", "")
        session.infer(bundle.golden()[0][:1])
    return session


def _check_same(ways: dict[str, Session], hu: NDArray[np.int16]) -> None:
    reference = [one.labels for one in ways["local"].infer(hu)]
    for name, session in ways.items():
        differ = sum(
            int((one.labels != labels).sum()) for one, labels in zip(session.infer(hu), reference, strict=True)
        )
        if differ:
            raise OtherAnswers(f"{name}: {differ} pixels have another label than the local engine gives them")


def _views(bundle: Bundle, batch: int, matrix: int) -> NDArray[np.int16]:
    """A golden view as large as a slice, in every place."""
    hu = bundle.golden()[0][0]
    rows = np.arange(matrix) * hu.shape[1] // matrix
    columns = np.arange(matrix) * hu.shape[2] // matrix
    return np.broadcast_to(hu[:, rows[:, None], columns], (batch, len(hu), matrix, matrix)).copy()
