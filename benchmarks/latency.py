"""How long one inference takes, and how many slices a second: the engine beside what it can't be below.

As trtexec measures: warmed up, for three seconds at least, percentiles. From HU in the host's memory as int16 to labels
there; beside it, in turn, what of that is the engine's own: `InferenceSession.run` of ONNX Runtime, or the GPU's time
between two events around TensorRT's engine. Decoding a slice, which comes before, is timed alone.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import cases
from benchmarks.record import Record, measuring
from benchmarks.timing import LEAST_S, in_turn_ms, once_ms
from dicom_node.analysis import decode
from runtime.bundle import open_bundle
from runtime.ort import OrtSession
from runtime.session import open_session
from runtime.triton import Servers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from runtime.bundle import Bundle
    from runtime.session import Session


def measure(
    bundle: Path | None,
    *,
    backend: str = "onnxruntime",
    precision: str = "fp32",
    batch: int = 1,
    threads: int = 0,
    matrix: int = 512,
    servers: Sequence[str] | None = None,
    seconds: float = LEAST_S,
) -> Record:
    """Latency of one backend, precision and batch.

    Parameters
    ----------
    servers : of the backend ``"triton"``

    Raises
    ------
    ScansideError : the bundle, or the backend, is not to be had

    """
    opened = open_bundle(bundle)
    replicas = Servers(tuple(servers)) if servers else None
    session = open_session(opened, backend, precision=precision, threads=threads, servers=replicas)
    asked = {"backend": backend, "precision": precision, "batch": batch, "threads": threads, "matrix": matrix}
    asked |= {"servers": list(servers)} if servers else {}
    with measuring("latency", **asked, seconds=seconds) as record, tempfile.TemporaryDirectory() as folder:
        record.about |= {"model": f"{opened.name} {opened.version}", "engine": session.identity.backend}
        path = Path(folder) / "0000.dcm"
        paths = cases.head(5, Path(folder), matrix=matrix).write(Path(folder) / "series", 1)
        path = paths[2]
        hu = views(opened, path, batch)
        alone = engine_alone(session, hu)
        if alone:
            whole, floor = in_turn_ms(lambda: session.infer(hu), alone, seconds=seconds)
            record.add("infer_ms", whole, floor="session_run_ms")
            record.add("session_run_ms", floor)
        elif backend == "triton":
            record.add("infer_ms", in_turn_ms(lambda: session.infer(hu), seconds=seconds)[0])
        else:
            _on_gpu(record, session, hu, seconds)
        record.add("decode_ms", in_turn_ms(lambda: next(decode.read(path)), seconds=seconds / 3)[0])
    session.close()
    return record


def throughput(
    bundle: Path | None,
    *,
    backend: str = "onnxruntime",
    precision: str = "fp32",
    batches: Sequence[int] = (1, 2, 4),
    threads: Sequence[int] = (1, 2),
    matrix: int = 512,
    seconds: float = LEAST_S,
) -> Record:
    """Slices a second by batch and threads."""
    opened = open_bundle(bundle)
    asked = {"backend": backend, "precision": precision, "batches": list(batches), "threads": list(threads)}
    with measuring("throughput", **asked, matrix=matrix, seconds=seconds) as record, tempfile.TemporaryDirectory() as f:
        path = cases.head(5, Path(f), matrix=matrix).write(Path(f) / "series", 1)[2]
        record.about["model"] = f"{opened.name} {opened.version}"
        for count in threads:
            session = open_session(opened, backend, precision=precision, threads=count)
            for batch in batches:
                hu = views(opened, path, batch)
                name = f"threads_{count}_batch_{batch}"
                alone = engine_alone(session, hu)
                works: list[Callable[[], object]] = [lambda hu=hu, one=session: one.infer(hu)]
                took = in_turn_ms(*works, *([alone] if alone else []), seconds=seconds)
                slices = batch * opened.view.answered
                record.add(f"{name}_per_s", [1e3 * slices / ms for ms in took[0]])
                if alone:
                    record.add(f"{name}_run_per_s", [1e3 * slices / ms for ms in took[1]])
                    record.floors[f"{name}_per_s"] = f"{name}_run_per_s"
            session.close()
    return record


def views(bundle: Bundle, path: Path, batch: int) -> NDArray[np.int16]:
    """HU as a session takes it: the same slice in every place."""
    _, slice_ = next(decode.read(path))
    return np.broadcast_to(slice_.hu, (batch, bundle.view.shown, *slice_.hu.shape)).copy()


def engine_alone(session: Session, hu: NDArray[np.int16]) -> Callable[[], object] | None:
    """Of ONNX Runtime, the run without anything around it."""
    if not isinstance(session, OrtSession):
        return None
    hu = np.ascontiguousarray(hu, dtype=np.int32)
    return lambda: session.run(hu)


def _on_gpu(record: Record, session: Session, hu: NDArray[np.int16], seconds: float) -> None:
    """Times of the host and of the device apart."""
    from benchmarks.gpu_suite import compute_times  # noqa: PLC0415  # TensorRT's, on a machine that has it

    record.add("infer_ms", in_turn_ms(lambda: session.infer(hu), seconds=seconds)[0], floor="device_compute_ms")
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        record.add("device_compute_ms", compute_times(session, len(hu), 100))
    compute = record.median("device_compute_ms")
    record.add("host_ms", [ms - compute for ms in record.samples["infer_ms"]])


def series_ms(analyse: Callable[[], object], rounds: int) -> list[float]:
    """Milliseconds of a whole series, round by round; the first warms up."""
    return [once_ms(analyse) for _ in range(rounds + 1)][1:]
