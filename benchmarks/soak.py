"""Study after study through one running node: what memory and files it holds, and whether that grows.

::

    python -m benchmarks.soak --studies 500 --slices 40 --out benchmarks/results/soak

`scanside serve` with its worker in processes of their own, an archive in this one. A study is one phantom head under
UIDs of its own; the next is pushed when all results of the last one are in the archive. Each study's sample goes to
`samples.jsonl` at once, so that a run that is ended (SIGTERM) or killed has told what it saw.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import cases
from benchmarks.record import machine
from dicom_node.simulation.pacs import Pacs
from dicom_node.simulation.scanner import push

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

WARM_UP = 100  # studies before memory has to stay as it is: allocators, caches and the journal's pages fill first
PATIENCE_S = 120
CONFIGURATION = """[node]
port = {port}
folder = "node"
free_floor_gb = 0.2

[[destinations]]
name = "pacs"
ae_title = "PACS"
host = "127.0.0.1"
port = {pacs}
"""


@dataclass(frozen=True)
class Sample:
    """What node and worker hold after a study: memory in MB, open files, and the node's threads."""

    study: int
    seconds: float
    node_mb: float
    worker_mb: float
    node_files: int
    worker_files: int
    node_threads: int


@contextmanager
def serving(folder: Path, pacs_port: int) -> Iterator[tuple[int, int]]:
    """`scanside serve`: its process id and its port, once it listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = folder / "node.toml"
    config.write_text(CONFIGURATION.format(port=port, pacs=pacs_port))
    with (folder / "node.log").open("w") as log:
        node = subprocess.Popen([sys.executable, "-m", "scanside", "serve", "--config", str(config)], stderr=log)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and node.poll() is None:
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            time.sleep(0.1)
        yield node.pid, port
    finally:
        node.terminate()
        node.wait(60)


def sample(pid: int, study: int, seconds: float) -> Sample:
    """Look at a node and its worker."""
    (worker,) = children(pid)
    return Sample(
        study, round(seconds, 2), memory_mb(pid), memory_mb(worker), files(pid), files(worker),
        len(list(Path(f"/proc/{pid}/task").iterdir())),
    )  # fmt: skip


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # a thread that has just ended
            found += map(int, (task / "children").read_text().split())
    return found


def memory_mb(pid: int) -> float:
    """Resident memory (``VmRSS``)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024, 2)


def files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def soak(studies: int, slices: int, side: int, out: Path) -> list[Sample]:
    """Push studies one after the other, until there were enough of them or SIGTERM came."""
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory() as name, (out / "samples.jsonl").open("w") as told:
        folder = Path(name)
        head = cases.head(slices, folder / "phantom", matrix=side)
        archive = Pacs(folder / "pacs")
        archive.start()
        try:
            with serving(folder, archive.port) as (pid, port):
                results = 0
                for number in range(1, studies + 1):
                    began = time.perf_counter()
                    sent = push(
                        head.write(folder / "phantom", number), ("127.0.0.1", port),
                        calling_ae="SCANNER", called_ae="SCANSIDE",
                    )  # fmt: skip
                    if sent.failed:
                        raise SystemExit(f"study {number}: {sent.failed[0].reason}")
                    results = results or _first(archive)
                    if not archive.wait_for(number * results, PATIENCE_S):
                        raise SystemExit(f"study {number} has no results after {PATIENCE_S} s")
                    samples.append(sample(pid, number, time.perf_counter() - began))
                    print(json.dumps(asdict(samples[-1])), file=told, flush=True)
        except KeyboardInterrupt:  # SIGTERM too
            pass
        finally:
            archive.stop()
    return samples


def _first(archive: Pacs) -> int:
    """How many objects a study gives: all are here when none has come for a while."""
    count = 0
    while not count or archive.wait_for(count + 1, 10):
        archive.wait_for(count + 1, PATIENCE_S)
        count = len(archive.received)
    return count


def slope_kb(samples: Sequence[Sample], what: str) -> float:
    """Growth in kB a study, by least squares, after the warm-up."""
    later = [one for one in samples if one.study > WARM_UP] or samples
    if len(later) < 2:
        return float("nan")
    return round(1024 * float(np.polyfit([one.study for one in later], [getattr(one, what) for one in later], 1)[0]), 2)


PAGE = """# Soak

Made by `python -m benchmarks.soak --studies {studies} --slices {slices} --side {side}` on {cpu}, {threads} threads:
{count} studies of {slices} slices of {side} x {side} (of {studies} asked for), one after the other, through one
`scanside serve` into an archive, in {minutes} minutes. Each has a bleed, so all results are made of each. After
the first {warm_up} studies:

| | after study {first} | after study {last} | growth a study |
|---|---:|---:|---:|
| node, resident | {a.node_mb} MB | {b.node_mb} MB | {node_kb} kB |
| worker, resident | {a.worker_mb} MB | {b.worker_mb} MB | {worker_kb} kB |
| node, open files | {a.node_files} | {b.node_files} | |
| worker, open files | {a.worker_files} | {b.worker_files} | |
| node, threads | {a.node_threads} | {b.node_threads} | |

![memory over studies](soak.png)
"""


def draw(samples: Sequence[Sample], path: Path) -> None:
    """Memory over studies."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (a second to import)

    figure = Figure(figsize=(7, 3.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    for what, name in (("worker_mb", "worker"), ("node_mb", "node")):
        axes.plot([one.study for one in samples], [getattr(one, what) for one in samples], label=name)
    axes.set(xlabel="studies", ylabel="resident memory, MB", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--studies", type=int, default=500)
    asked.add_argument("--slices", type=int, default=40)
    asked.add_argument("--side", type=int, default=512, help="rows and columns")
    asked.add_argument("--out", type=Path, default=Path("benchmarks/results/soak"))
    told = asked.parse_args()
    told.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    samples = soak(told.studies, told.slices, told.side, told.out)
    if not samples:
        raise SystemExit("no study came through")
    seconds = time.monotonic() - began
    later = [one for one in samples if one.study > WARM_UP] or samples
    growth = {"node_kb": slope_kb(samples, "node_mb"), "worker_kb": slope_kb(samples, "worker_mb")}
    run = {"studies": told.studies, "slices": told.slices, "side": told.side}
    result = {"machine": machine(), **run, "seconds": round(seconds), "growth_a_study": growth}
    (told.out / "results.json").write_text(json.dumps(result | {"samples": list(map(asdict, samples))}) + "\n")
    (told.out / "samples.jsonl").unlink()
    page = PAGE.format(
        a=later[0], b=later[-1], first=later[0].study, last=later[-1].study, count=len(samples), warm_up=WARM_UP,
        minutes=round(seconds / 60), **growth, **run, **machine(),
    )  # fmt: skip
    (told.out / "README.md").write_text(page)
    draw(samples, told.out / "soak.png")
    print(page)


if __name__ == "__main__":
    main()
