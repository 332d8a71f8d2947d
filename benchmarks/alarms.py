"""What the dampers against false alarms bring and cost, and how long before a series' end its alert goes out.

::

    python -m benchmarks.alarms --out benchmarks/results/alarms --cache runs/alarms

Phantoms without blood and with it, ordinary ones and ones that are hard to read (calcification, old cavities, metal,
motion, pale blood). The sweep over operating points is done on what the network says of each slice; the one that
serves is chosen on one set of heads and told of another. How long an alert takes is counted in slices, and read from
the log of a running node.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.alarm_heads import FIRST, HEADS, cached
from benchmarks.alarm_page import draw_clock, draw_sweep, page
from benchmarks.alarm_times import MIN_SLICES, in_slices, on_the_clock
from benchmarks.study import machine
from dicom_node.configuration.config import Config
from runtime import geometry
from runtime.bundle import open_bundle
from runtime.triage import Rule, level_of
from runtime.types import OperatingPoint, in_words
from runtime.volume import in_a_row
from training.lesions import CLASSES
from training.trouble import draw_trouble

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.alarm_heads import Head, Job

    Points = Mapping[str, OperatingPoint]

VOLUMES_ML = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
PROBABILITIES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
SLICES = (1, 2, 3)
BEFORE = OperatingPoint(0.5)  # of bundles that ask for a volume alone
SIZES_ML = ((1.0, 5.0), (5.0, 15.0), (15.0, 1e9))
CLOCKED = 24  # heads that are pushed to a node


@dataclass(frozen=True, eq=False)
class Series:
    """A head as the whole series shows it: by class, what an operating point asks for."""

    head: Head
    volume_ml: list[float]
    probability: list[float]
    in_a_row: list[int]

    def found(self, points: Points) -> dict[str, float]:
        """Volumes of the findings."""
        measured = zip(self.volume_ml, self.probability, self.in_a_row, strict=True)
        return {
            name: seen[0]
            for name, seen in zip(CLASSES, measured, strict=True)
            if name in points and seen[0] and points[name].admits(*seen)
        }


def of_all(point: OperatingPoint) -> Points:
    """The same for every class."""
    return dict.fromkeys(CLASSES[1:], point)


def whole(head: Head) -> Series:
    stack = geometry.stack({str(i): plane for i, plane in enumerate(head.planes)})
    order = [int(key) for key in stack.keys]
    shows = head.voxels > 0
    return Series(
        head,
        (stack.voxel_ml @ head.voxels[order]).tolist(),
        np.where(shows, head.evidence, 0).max(axis=0).tolist(),
        [in_a_row(stack, {str(i) for i in np.flatnonzero(column)}) for column in shows.T],
    )


def count(series: Sequence[Series], points: Points, rules: Sequence[Rule]) -> dict[str, object]:
    """Alarms of heads without blood, and what of the blood is found, at an operating point."""
    clean = [one for one in series if not one.head.job.bleeds]
    bleeding = [one for one in series if one.head.job.bleeds]
    alarms = [level_of(one.found(points), rules) for one in clean]
    lesions = [
        (float(one.head.truth_ml[c]), name in one.found(points))
        for one in bleeding
        for c, name in enumerate(CLASSES)
        if c and one.head.truth_ml[c] > 0
    ]
    return {
        "bleed_free": len(clean),
        "without_alarm": sum(level is None for level in alarms),
        "critical": sum(level == "critical" for level in alarms),
        "bleeding": len(bleeding),
        "bleeding_with_alarm": sum(level_of(one.found(points), rules) is not None for one in bleeding),
        "lesions": [
            {
                "from_ml": low,
                "to_ml": high if high < 1e9 else None,
                "lesions": sum(low <= ml < high for ml, _ in lesions),
                "found": sum(found for ml, found in lesions if low <= ml < high),
            }
            for low, high in SIZES_ML
        ],
    }


def sweep(series: Sequence[Series], rules: Sequence[Rule]) -> list[dict[str, object]]:
    """All operating points of the grid, on these heads; ordinary and hard ones apart, and together."""
    return [
        {"point": asdict(point), "words": str(point), **by_kind(series, of_all(point), rules)}
        for point in itertools.starmap(OperatingPoint, itertools.product(VOLUMES_ML, PROBABILITIES, SLICES))
    ]


def by_kind(series: Sequence[Series], points: Points, rules: Sequence[Rule]) -> dict[str, object]:
    hard, ordinary = ([one for one in series if one.head.job.is_hard is hard] for hard in (True, False))
    return {
        "ordinary": count(ordinary, points, rules),
        "hard": count(hard, points, rules),
        "all": count(series, points, rules),
    }


def choose(rows: Sequence[dict], before: dict) -> dict:
    """The point with the fewest alarms on heads without blood, among those that lose nothing from 1 ml on.

    Among equals, the one that finds most, and then the one that asks for least.
    """

    def harmless(row: dict) -> bool:
        return all(
            now["found"] >= then["found"]
            for kind in ("ordinary", "hard")
            for now, then in zip(row[kind]["lesions"], before[kind]["lesions"], strict=True)
        )

    def worth(row: dict) -> tuple[float, ...]:
        point = row["point"]
        found = sum(stratum["found"] for stratum in row["all"]["lesions"])
        asks = (point["minimum_volume_ml"], point["minimum_slices"], point["minimum_probability"])
        return (row["all"]["without_alarm"], found, *(-value for value in asks))

    return max(filter(harmless, rows), key=worth)


def by_trouble(series: Sequence[Series], points: Points, rules: Sequence[Rule]) -> dict[str, tuple[int, int]]:
    """Of hard heads without blood: how many raise an alarm, of how many, by what makes them hard."""
    counts = dict.fromkeys(("metal", "motion, no metal", "neither"), (0, 0))
    for one in series:
        job = one.head.job
        if job.bleeds or not job.is_hard:
            continue
        trouble = draw_trouble(np.random.default_rng(job.seed))  # as `training.phantom.make` does
        kind = "metal" if trouble.metal else "motion, no metal" if trouble.motion_mm else "neither"
        alarms, heads = counts[kind]
        counts[kind] = (alarms + (level_of(one.found(points), rules) is not None), heads + 1)
    return counts


def relax(point: OperatingPoint, series: Sequence[Series], rules: Sequence[Rule]) -> Points:
    """The same point for every class but those in which it takes away no alarm: they keep what they had."""

    def quiet(points: Points) -> int:
        return sum(not one.head.job.bleeds and level_of(one.found(points), rules) is None for one in series)

    points = of_all(point)
    for name in CLASSES[1:]:
        less = {**points, name: BEFORE}
        points = less if quiet(less) >= quiet(points) else points
    return points


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--out", type=Path, default=Path("benchmarks/results/alarms"))
    asked.add_argument("--cache", type=Path, default=Path("runs/alarms"))
    asked.add_argument("--threads", type=int, default=1, help="of the engine, while heads are made beside it")
    asked.add_argument("--clocked", type=int, default=CLOCKED, help="heads that are pushed to a node")
    told = asked.parse_args()
    told.out.mkdir(parents=True, exist_ok=True)
    rules = [Rule(**rule.model_dump()) for rule in Config().triage]
    sets = {name: [whole(head) for head in cached(told.cache, name, *HEADS[name], told.threads)] for name in FIRST}
    rows = sweep(sets["chosen on"], rules)
    chosen = choose(rows, by_kind(sets["chosen on"], of_all(BEFORE), rules))
    bundle = open_bundle()
    points = {
        "before": of_all(BEFORE),
        "uniform": of_all(OperatingPoint(**chosen["point"])),
        "chosen": relax(OperatingPoint(**chosen["point"]), sets["chosen on"], rules),
        "shipped": bundle.operating_point,
    }
    timed = [
        in_slices(one.head, bundle.operating_point, rules, level_of(one.found(bundle.operating_point), rules))
        for one in sets["told of"]
    ]
    bleeding = [one for one in sets["told of"] if one.head.job.bleeds]
    clock = _clocked([one for one in bleeding if not one.head.job.is_hard][: told.clocked])
    result = {
        "machine": machine(),
        "bundle": {"name": bundle.name, "version": bundle.version, "fp32": bundle.sha256("fp32")},
        "rules": [str(rule) for rule in rules],
        "sweep": rows,
        "before": str(BEFORE),
        "uniform": chosen["words"],
        "chosen": in_words(points["chosen"]),
        "min_slices": MIN_SLICES,
        "shipped": {name: asdict(point) for name, point in bundle.operating_point.items()},
        "chosen_on": {name: by_kind(sets["chosen on"], these, rules) for name, these in points.items()},
        "told_of": {name: by_kind(sets["told of"], these, rules) for name, these in points.items()},
        "trouble": by_trouble(sets["told of"], points["chosen"], rules),
        "in_slices": timed,
        "on_the_clock": clock,
    }
    (told.out / "results.json").write_text(json.dumps(result) + "\n")
    draw_sweep(result, told.out / "sweep.png")
    draw_clock(result, told.out / "clock.png")
    (told.out / "README.md").write_text(page(result))
    print(page(result))


def _clocked(series: Sequence[Series]) -> list[dict[str, object]]:
    jobs: list[tuple[Job, int]] = [
        (one.head.job, int(np.flatnonzero(one.head.truth_voxels[:, 1:].any(axis=1))[0])) for one in series
    ]
    with tempfile.TemporaryDirectory() as folder:
        return list(on_the_clock(jobs, Path(folder)))


if __name__ == "__main__":
    main()
