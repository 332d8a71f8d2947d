"""What work costs as there is more of it: slices of a series, series at once, lesions, matrix size, associations.

Each curve's slope is fitted over its larger half, logarithm by logarithm: 1 is linear, and nothing may be steeper but
what is explained.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import cases, floors, ingest
from benchmarks.end_to_end import pushed
from benchmarks.record import Record, measuring
from benchmarks.running import Ours, RunError, free_port, serving
from benchmarks.timing import once_ms
from dicom_node.analysis.series import Series
from dicom_node.simulation.phantom import write
from training.lesions import CLASSES, Lesion

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.running import Node

SLICES = (20, 40, 80, 160, 320, 640, 1280, 2000)
SERIES = (1, 2, 4, 8, 16)
MATRICES = (256, 384, 512, 768, 1024)
ASSOCIATIONS = (1, 2, 4, 8, 16)
SLICES_EACH = 20  # of series at once, and of matrices
CLOSES = 5
PATIENCE_S = 300


def measure(
    *,
    slices: Sequence[int] = SLICES,
    series: Sequence[int] = SERIES,
    matrices: Sequence[int] = MATRICES,
    associations: Sequence[int] = ASSOCIATIONS,
    disk: Path = Path(),
) -> Record:
    """Every curve. Those of analysis in this process, those of series at once and associations through the node."""
    sizes = {"slices": slices, "series": series, "matrix": matrices, "associations": associations}
    with measuring("growth", **{name: list(each) for name, each in sizes.items()}) as record:
        with tempfile.TemporaryDirectory(dir=disk) as name:
            folder = Path(name).resolve()
            names = [name for name in CLASSES if name != "background"]
            with floors.rehearsed(None) as one:
                record.about["engine"] = one.session.identity.backend
                for count in slices:
                    _analysis(record, f"slices_{count}", one, cases.head(count, folder / "head"), folder)
                for matrix in matrices:
                    head = cases.head(SLICES_EACH, folder / "head", matrix=matrix)
                    _analysis(record, f"matrix_{matrix}", one, head, folder)
                for count in range(1, len(names) + 1):
                    blood = [Lesion(each, 8) for each in names[:count]]
                    head = cases.head(cases.DRAWN, folder / "head", lesions=blood)
                    _analysis(record, f"lesions_{count}", one, head, folder)
            _series_at_once(record, series, folder)
            _associations(record, associations, folder)
        sizes["lesions"] = range(1, len(names) + 1)
        record.about["slopes"] = {
            f"{what}: {figure}": slope([record.median(f"{what}_{size}_{figure}") for size in each], each)
            for what, each in sizes.items()
            for figure in figures(record, what, each[0])
        }
    return record


def figures(record: Record, what: str, size: int) -> list[str]:
    """What was measured of a kind of work."""
    start = f"{what}_{size}_"
    return [name.removeprefix(start) for name in record.samples if name.startswith(start)]


def slope(values: Sequence[float], sizes: Sequence[int]) -> float | None:
    """Exponent of growth over the larger half of the sizes; None of a single one."""
    first = max(len(sizes) // 2 - 1, 0)
    x, y = np.log(np.asarray(sizes[first:], float)), np.log(np.asarray(values[first:], float))
    return round(float(np.polyfit(x, y, 1)[0]), 2) if len(x) > 1 else None


def panels(record: Record) -> list[tuple[str, str, Sequence[int], dict[str, list[float]]]]:
    """For `charts.growth`."""
    titles = {
        "slices": "one series", "matrix": f"{SLICES_EACH} slices", "series": "series at once",
        "associations": "intake",
    }  # fmt: skip
    found = []
    for what, title in titles.items():
        sizes = record.asked[what]
        curves = {
            figure.removesuffix("_ms").replace("_", " "): [record.median(f"{what}_{size}_{figure}") for size in sizes]
            for figure in figures(record, what, sizes[0])
        }
        found.append((title, what, sizes, curves))
    return found


def _analysis(record: Record, name: str, one: floors.Analyser, head: cases.Head, folder: Path) -> None:
    """Feed a series and close it, several times: closing does not change it."""
    paths = head.write(folder / "series", 1)
    state = Series()
    for path in paths:
        record.add(f"{name}_slice_ms", [once_ms(lambda path=path: one.feed(state, [path]))])
    for number in range(CLOSES):
        target = folder / f"results-{number}"
        record.add(
            f"{name}_close_ms", [once_ms(lambda target=target: one.close(state, target, revision=1, missing=()))]
        )
    for number in range(CLOSES):
        shutil.rmtree(folder / f"results-{number}")
    for kept in ("series", "head"):
        shutil.rmtree(folder / kept, ignore_errors=True)


def _series_at_once(record: Record, counts: Sequence[int], folder: Path) -> None:
    """As many scanners, each its own series: from the last one's last answer to all results in the archive."""
    head = cases.head(SLICES_EACH, folder / "head")
    archive = Ours(folder / "archive")
    try:
        with serving(folder, archive.port) as node:
            _push_all(node, archive, head, 1, 999, folder)  # warms up
            for number, count in enumerate(counts):
                push_s, rest_s = _push_all(node, archive, head, count, 100 * number, folder)
                record.add(f"series_{count}_push_ms", [1e3 * push_s])
                record.add(f"series_{count}_to_results_ms", [1e3 * (push_s + rest_s)])
    finally:
        archive.close()


def _push_all(node: Node, archive: Ours, head: cases.Head, count: int, first: int, folder: Path) -> tuple[float, float]:
    scans = [head.write(folder / f"scan-{number}", 1000 + first + number) for number in range(count)]
    known = len(archive.arrivals(node.log))
    began = time.time()
    with ThreadPoolExecutor(count) as scanners:
        sent = list(scanners.map(lambda paths: pushed(paths, node.port, None), scans))
    last = max(one.last_acknowledged for one in sent)
    _wait(lambda: sum(one.role == "seg" for one in archive.arrivals(node.log)[known:]) >= count)
    time.sleep(1)  # the last objects
    return last - began, max(one.at for one in archive.arrivals(node.log)) - last


def _wait(is_there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_there():
        if time.monotonic() > deadline:
            raise RunError(f"no results in the archive after {PATIENCE_S} s")
        time.sleep(0.05)


def _associations(record: Record, counts: Sequence[int], folder: Path) -> None:
    """As many `storescu` at once into our receiver alone: milliseconds for all of their slices."""
    port = free_port()
    most = max(counts)
    senders = [folder / f"sender-{number}" for number in range(most)]
    command = [sys.executable, "-m", "benchmarks.ingest", "--serve", str(port)]
    for count in counts:
        kept = folder / f"kept-{count}"
        for number, one in enumerate(senders[:count]):
            shutil.rmtree(one, ignore_errors=True)
            write(ingest.noise(100 * count + number, SLICES_EACH), one)
        with ingest.process([*command, str(kept)], port):
            rate = ingest.per_second(port, senders[:count])
            record.add(f"associations_{count}_all_slices_ms", [1e3 * SLICES_EACH * count / rate])
