"""A scanner pushes through the real node into an archive: how long after its last slice what is where.

`scanside serve` in processes of its own, an archive, and `dicom_node.simulation.scanner` as the scanner, at a pace or
as fast as it goes; each round is another study. Counted from the answer on the last slice. Stages are those of the
node's own metrics; what the remaining work takes by itself, part by part, is measured in the same run, between two
rounds.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import cases, floors
from benchmarks.ingest import sync_ms
from benchmarks.record import Record, measuring
from benchmarks.running import PATIENCE_S, Arrival, Emergency, Node, Orthanc, Ours, RunError, serving
from dicom_node.simulation.scanner import push

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.running import Archive
    from dicom_node.simulation.scanner import PushReport

QUIET_S = 0.6  # without another object before a round is over: an archive gets them one after the other
SETTLING_S = 1.0  # between two rounds: what the last one left behind is not the next one's
ALONE = 500_000  # what is analysed for the floor is a study of its own, too
IDLE_ROUNDS, IDLE_S = 3, 5.0
SYNCED_B = 526_000
TARGETS_MS = {"40 slices": 300.0, "320 slices": 600.0}  # at p95, pushed at 20 slices a second


def measure(
    slices: Sequence[int] = (40, 320),
    *,
    rate: float | None = 20.0,
    rounds: int = 10,
    orthanc: bool = False,
    bundle: Path | None = None,
    precision: str = "auto",
    disk: Path = Path(),
) -> Record:
    """Rounds of each number of slices, after one of each that warms up.

    Parameters
    ----------
    rate : slices a second; None is as fast as it goes
    orthanc : into Orthanc instead of our own archive
    precision : of the model
    disk : a folder on the disk to write to

    Raises
    ------
    RunError : the node, the archive or the scanner did not do its part

    """
    asked = {"slices": list(slices), "rate": rate or 0, "rounds": rounds, "orthanc": orthanc}
    asked |= {"precision": precision} if precision != "auto" else {}
    with measuring("end-to-end", **asked) as record, tempfile.TemporaryDirectory(dir=disk) as name:
        folder = Path(name).resolve()
        heads = {count: cases.head(count, folder / f"head-{count}") for count in slices}
        with _archive(folder / "archive", orthanc=orthanc) as archive, floors.rehearsed(bundle, precision) as one:
            record.about |= {"archive": archive.name, "engine": one.session.identity.backend, "model": _model(one)}
            emergency = Emergency()
            with serving(folder, archive.port, _sections(bundle, precision, emergency.port)) as node:
                record.add("node_start_s", [node.started_s])
                _warm_up(node, archive, heads)
                for number in range(1, rounds + 1):
                    for count, head in heads.items():
                        _round(
                            record, node, archive, emergency, head.write(folder / "scan", 1000 * count + number), rate
                        )
                        alone = head.write(folder / "scan", ALONE + 1000 * count + number)
                        own = floors.close(one, alone, folder / "alone")
                        _floors(record, count, own, archive.port)
                        shutil.rmtree(folder / "alone")
                        time.sleep(SETTLING_S)
                record.add("fdatasync_ms", sync_ms(folder, SYNCED_B))
                record.add("idle_cpu_percent", _idle_percent(node))
            emergency.close()
        for count in slices:
            record.floors[f"{count}_all_ms"] = f"{count}_floor_ms"
    return record


def stages(record: Record) -> dict[str, dict[str, float]]:
    """Medians of what follows the last slice, one after the other, by number of slices."""
    found = {}
    for count in record.asked["slices"]:
        closed, there, whole = (record.median(f"{count}_{what}_ms") for what in ("closing", "results", "all"))
        found[f"{count} slices"] = {
            "closing": closed,
            "results on disk and in the journal": there - closed,
            "delivery": whole - there,
        }
        found[f"{count} slices, floor"] = {
            part.replace("_", " "): record.median(f"{count}_floor_{part}_ms") for part in floors.REMAINING
        }
    return found


def _round(
    record: Record, node: Node, archive: Archive, emergency: Emergency, paths: Sequence[Path], rate: float | None
) -> None:
    heard = len(emergency.heard)
    before, known = node.stages(), len(archive.arrivals(node.log))
    sent = pushed(paths, node.port, rate)
    arrived = _wait(archive, node, known)
    count, last = len(paths), sent.last_acknowledged
    for role in ("sr", "sc", "seg"):
        times = [1e3 * (one.at - last) for one in arrived if one.role == role]
        record.add(f"{count}_{role}_ms", [max(times)] if times else [])
    record.add(f"{count}_all_ms", [1e3 * (max(one.at for one in arrived) - last)])
    for at, slices in emergency.heard[heard:]:
        decided = sent.sent[slices - 1].acknowledged
        record.add(f"{count}_{'alert' if slices < count else 'confirmation'}_ms", [1e3 * (at - decided)])
    after = node.stages()
    for stage, (seconds, number) in after.items():
        began, counted = before.get(stage, (0.0, 0))
        if number > counted:
            record.add(f"{count}_{stage}_ms", [1e3 * (seconds - began) / (number - counted)])


def _floors(record: Record, count: int, own: floors.Parts, port: int) -> None:
    parts = own.ms | {"round_trip": floors.round_trip_ms(own.files, port)}
    for part in floors.REMAINING:
        record.add(f"{count}_floor_{part}_ms", [parts[part]])
    record.add(f"{count}_floor_ms", [sum(parts[part] for part in floors.REMAINING)])


def pushed(paths: Sequence[Path], port: int, rate: float | None) -> PushReport:
    """Push a series, or say why it was not taken.

    Raises
    ------
    RunError : slices were refused

    """
    sent = push(paths, ("127.0.0.1", port), calling_ae="SCANNER", called_ae="SCANSIDE", rate=rate)
    if sent.failed:
        raise RunError(f"the node refused {len(sent.failed)} slices: {sent.failed[0].reason}")
    return sent


def _wait(archive: Archive, node: Node, known: int) -> list[Arrival]:
    """What has come after what is known: all of it, once SR and SEG are there and nothing has followed for a while."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        arrived = archive.arrivals(node.log)[known:]
        if {"sr", "seg"} <= {one.role for one in arrived} and time.time() - arrived[-1].at > QUIET_S:
            return arrived
        time.sleep(0.05)
    raise RunError(f"no results in the archive after {PATIENCE_S} s: see {node.log}")


def _idle_percent(node: Node) -> list[float]:
    """Processor time of a node that nobody sends to, of one core."""
    shares = []
    for _ in range(IDLE_ROUNDS):
        before = node.cpu_s()
        time.sleep(IDLE_S)
        shares.append(100 * (node.cpu_s() - before) / IDLE_S)
    return shares


def _warm_up(node: Node, archive: Archive, heads: dict[int, cases.Head]) -> None:
    for count, head in heads.items():
        known = len(archive.arrivals(node.log))
        pushed(head.write(node.folder / "scan", 999_000 + count), node.port, None)
        _wait(archive, node, known)


@contextmanager
def _archive(folder: Path, *, orthanc: bool) -> Iterator[Archive]:
    archive = Orthanc(folder) if orthanc else Ours(folder)
    try:
        yield archive
    finally:
        archive.close()


def _model(one: floors.Analyser) -> str:
    return f"{one.bundle.name} {one.bundle.version}"


def _sections(bundle: Path | None, precision: str, emergency: int) -> str:
    """Whom to alert, and with which model."""
    alerted = f'\n[[hl7]]\nname = "emergency"\nhost = "127.0.0.1"\nport = {emergency}\n'
    model = f'\n[model]\nprecision = "{precision}"\n'
    return alerted + model + (f'bundle = "{bundle.resolve()}"\n' if bundle else "")
