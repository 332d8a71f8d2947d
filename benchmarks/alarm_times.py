"""When an alert comes: counted in slices, and on the clock of a running node that a scanner pushes to."""

from __future__ import annotations

import json
import time
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.soak import serving
from dicom_node.simulation import phantom
from dicom_node.simulation.pacs import Pacs
from dicom_node.simulation.scanner import Sent, push
from runtime.evidence import Evidence
from runtime.triage import is_higher
from runtime.types import SliceLabels

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from benchmarks.alarm_heads import Head, Job
    from runtime.triage import Rule
    from runtime.types import OperatingPoint

RATE = 20.0  # slices a second
MIN_SLICES = 5  # as the node's `series.min_slices`
PATIENCE_S = 60.0


def levels(head: Head, points: Mapping[str, OperatingPoint], rules: Sequence[Rule]) -> list[str | None]:
    """The highest level that may be told after each slice of a head, in the table's order."""
    evidence, told = Evidence(), []
    highest: str | None = None
    nothing = np.zeros((1, 1), np.uint8)
    for i, plane in enumerate(head.planes):
        evidence.take(str(i), plane, SliceLabels(nothing, head.voxels[i], head.evidence[i]))
        level = evidence.level(points, rules) if i + 1 >= MIN_SLICES else None
        highest = level if is_higher(level, highest) else highest
        told.append(highest)
    return told


def in_slices(
    head: Head, points: Mapping[str, OperatingPoint], rules: Sequence[Rule], final: str | None
) -> dict[str, object]:
    """Of one head: its slices, and from the first that shows blood on how many there are to each word of it.

    1 is the slice itself; None where it was not told before the end. Without blood, from the first slice on.
    """
    told = levels(head, points, rules)
    first = int(head.truth_voxels[:, 1:].any(axis=1).argmax())
    any_level = next((i for i, level in enumerate(told) if level), None)
    same = next((i for i, level in enumerate(told) if final and level == final), None)
    return {
        "seed": head.job.seed,
        "bleeds": head.job.bleeds,
        "hard": head.job.is_hard,
        "slices": len(told),
        "final": final,
        "highest_early": told[-1],
        "to_first_alert": None if any_level is None else any_level - first + 1,
        "to_final_level": None if same is None else same - first + 1,
        "to_the_end": len(told) - first,
    }


def on_the_clock(jobs: Sequence[tuple[Job, int]], folder: Path) -> Iterator[dict[str, object]]:
    """Push heads to a running node at 20 slices a second, one after the other: seconds from the first positive slice.

    Parameters
    ----------
    jobs : heads, and which slice is the first to show blood
    folder : for the node

    """
    archive = Pacs(folder / "pacs")
    archive.start()
    try:
        with serving(folder, archive.port) as (_, port):
            for job, first in jobs:
                paths = phantom.write(job.make().slices, folder / str(job.seed))
                sent: list[Sent] = []
                before = len(_events(folder))
                peer = ("127.0.0.1", port)
                push(paths, peer, calling_ae="CT", called_ae="SCANSIDE", rate=RATE, on_slice=sent.append)
                said = _await_end(folder, before)
                early = [one for one in said if one["event"] == "early_evidence"]
                closed, finished = (_when(said, event) for event in ("series_closed", "series_finished"))
                shown, last = (float(one.acknowledged or "nan") for one in (sent[first], sent[-1]))
                yield {
                    "seed": job.seed,
                    "slices": len(paths),
                    "levels": [one["triage"] for one in early],
                    "final": next(one for one in said if one["event"] == "series_finished")["triage"],
                    "first_alert_s": round(_at(early[0]) - shown, 3) if early else None,
                    "final_level_s": round(_at(early[-1]) - shown, 3) if early else None,
                    "last_slice_s": round(last - shown, 3),
                    "closed_s": round(closed - shown, 3),
                    "results_s": round(finished - shown, 3),
                }
    finally:
        archive.stop()


def _events(folder: Path) -> list[dict[str, object]]:
    lines = (folder / "node.log").read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def _await_end(folder: Path, before: int) -> list[dict[str, object]]:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        said = _events(folder)[before:]
        if any(one["event"] == "series_finished" for one in said):
            return said
        time.sleep(0.1)
    raise SystemExit(f"no series_finished within {PATIENCE_S:g} s: see {folder / 'node.log'}")


def _at(event: dict[str, object]) -> float:
    return datetime.fromisoformat(str(event["timestamp"])).timestamp()


def _when(said: Sequence[dict[str, object]], event: str) -> float:
    return next(_at(one) for one in said if one["event"] == event)
