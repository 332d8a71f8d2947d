"""How far a node goes, and how many it takes, from the committed records.

::

    python -m benchmarks.capacity --scanners 7         (--gpu-ms 2 --exams-per-hour 4 ...: each assumption is an option)
    python -m benchmarks.capacity --page docs/scale.md (writes it, and its picture)

What a part of the way costs was measured (`benchmarks.costs`); who is busiest follows from that
(`benchmarks.stations`); how long it then takes is simulated (`benchmarks.node_simulation`), and the simulation is held
against what was measured of whole runs. The same seed gives the same page.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import capacity_checks, capacity_page, capacity_pictures, costs, stations
from benchmarks.costs import Assumptions, Costs
from benchmarks.node_simulation import Work, simulate
from benchmarks.record import RecordError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.capacity_checks import Check
    from benchmarks.record import Record
    from benchmarks.stations import Engine, Load

RESULTS = Path("benchmarks/results")
ENGINES: tuple[Engine, ...] = ("processor", "gpu")
SITES = {  # how many, and the scanners of each
    "hospital, 1 scanner": (1, 1),
    "hospital, 4 scanners": (1, 4),
    "hospital, 20 scanners": (1, 20),
    "region, 50 hospitals of 4 scanners": (50, 4),
    "region, 200 scanners, nodes in one place": (1, 200),
}
ARCHIVE = 1e9  # slices of a national archive
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0, 1.2)  # of a full node, at which it is simulated


@dataclass(frozen=True, slots=True)
class Point:
    """A number of scanners on one node, or on several: what was simulated, in seconds after a series' last answer.

    Attributes
    ----------
    busy : utilisation of the workers
    first, all_series : percentiles 50, 95, 99 of the first series of an examination, and of all

    """

    scanners: int
    nodes: int
    gpus: int
    busy: float
    first_s: tuple[float, float, float]
    all_series_s: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Capacity:
    """All that the page tells."""

    assumed: Assumptions
    costs: Costs
    records: Mapping[str, Record]
    loads: dict[Engine, Load]
    full: dict[Engine, int]  # scanners of a node
    curves: dict[Engine, list[Point]]
    sites: dict[str, dict[Engine, Point]]
    reread: dict[Engine, tuple[int, int]]
    checks: list[Check]
    agreement: list[Check]
    seed: int


def compute(
    records: Mapping[str, Record],
    assumed: Assumptions,
    *,
    exams: int,
    seed: int,
    asked: Mapping[str, tuple[int, int]] | None = None,
) -> Capacity:
    """All of it, from the records.

    Parameters
    ----------
    exams : examinations of each simulated node
    asked : sites, as `SITES` has them, which are the default

    Raises
    ------
    RecordError : the records lack a figure

    """
    measured = Costs.of(records)
    loads = {engine: stations.load(measured, assumed, engine) for engine in ENGINES}
    work = {engine: Work.of(measured, assumed, engine, assumed.exam) for engine in ENGINES}
    full = {engine: stations.scanners_per_node(load, assumed) for engine, load in loads.items()}

    def point(engine: Engine, scanners: int, nodes: int, gpus: int) -> Point:
        # nodes that share nothing are each like the others: the one with most scanners is enough
        own, count = (math.ceil(scanners / nodes), 1) if not gpus else (scanners, nodes)
        how = {"exams": exams * count, "seed": seed, "nodes": count, "gpus": gpus}
        run = simulate(work[engine], assumed, own, **how)
        spread = [tuple(np.percentile(run.results_s(n), (50, 95, 99)).tolist()) for n in (assumed.exam[0], None)]
        return Point(scanners, nodes, gpus, run.busy("worker"), *spread)

    curves: dict[Engine, list[Point]] = {}
    asked = asked or SITES
    sites: dict[str, dict[Engine, Point]] = {name: {} for name in asked}
    for engine in ENGINES:
        counts = sorted({max(1, round(share * full[engine])) for share in SHARES})
        curves[engine] = [point(engine, count, 1, int(engine == "gpu")) for count in counts]
        for name, (count, each) in asked.items():
            scanners, nodes = count * each, count * stations.nodes_needed(each, loads[engine], assumed)
            gpus = stations.gpus_needed(scanners, loads[engine], assumed) if engine == "gpu" else 0
            sites[name][engine] = point(engine, scanners, nodes, gpus)
    again = {engine: stations.reread(ARCHIVE, load, assumed) for engine, load in loads.items()}
    found = capacity_checks.whole_runs(records, measured, assumed, seed), capacity_checks.formulas(measured, seed)
    return Capacity(assumed, measured, records, loads, full, curves, sites, again, *found, seed)


def options() -> argparse.ArgumentParser:
    """Every assumption, by its name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.capacity", description=__doc__.partition("\n")[0])
    for one in fields(Assumptions):
        name = f"--{one.name.replace('_', '-')}"
        if one.name == "exam":
            parser.add_argument(name, type=_counts, default=one.default, help="slices of each series: 40,320")
        else:
            kind = {"pace": _pace, "most_busy": _share}.get(one.name, _positive)
            parser.add_argument(name, type=kind, default=one.default, help=f"assumed; default {one.default:g}")
    parser.add_argument("--scanners", type=_counts, help="of one site, several with commas; default: the usual sites")
    parser.add_argument("--exams", type=_count, default=120, help="of each simulated node")
    parser.add_argument("--seed", type=_seed, default=1)
    parser.add_argument("--records", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--page", type=Path, help="where the page goes, its picture beside it; default: stdout")
    parser.add_argument("--json", action="store_true", help="predictions and errors on stdout, and nothing else")
    return parser


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: write a whole number, 0 or more")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: write a whole number above 0")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(_count(part.strip()) for part in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text}: write whole numbers above 0 with commas between, such as 40,320"
        ) from None


def _pace(text: str) -> float:
    """Infinite: all at once."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text}: write a number above 0")
    return value


def _positive(text: str) -> float:
    value = _pace(text)
    if math.isinf(value):
        raise argparse.ArgumentTypeError(f"{text}: write a number that ends")
    return value


def _share(text: str) -> float:
    value = _positive(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text}: write a number between 0 and 1: who is always busy never catches up")
    return value


def told(found: Capacity) -> dict[str, Any]:
    """For other programs."""

    def site(one: Point) -> dict[str, float]:
        return {"nodes": one.nodes, "gpus": one.gpus, "first_p95_s": one.first_s[1]}

    return {
        "assumed": asdict(found.assumed),
        "scanners_per_node": found.full,
        "bottleneck": {engine: load.bottleneck for engine, load in found.loads.items()},
        "parts_ms": {engine: load.parts for engine, load in found.loads.items()},
        "sites": {name: {engine: site(one) for engine, one in of.items()} for name, of in found.sites.items()},
        "reread": found.reread,
        "checks": [asdict(one) for one in (*found.checks, *found.agreement)],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    said = vars(options().parse_args(arguments))
    folder, page, exams, seed, as_json = (said.pop(name) for name in ("records", "page", "exams", "seed", "json"))
    scanners = said.pop("scanners") or ()
    asked = {f"one site, {count} scanner{'s' * (count != 1)}": (1, count) for count in scanners}
    try:
        found = compute(costs.load(folder), Assumptions(**said), exams=exams, seed=seed, asked=asked)
    except RecordError as error:
        print(error, file=sys.stderr)
        return 2
    command = " ".join(["python -m benchmarks.capacity", *capacity_page.options_said(found.assumed, scanners)])
    picture = page and page.with_suffix(".png")
    text = capacity_page.compose(found, command, picture and picture.name)
    if page:
        page.write_text(text)
        capacity_pictures.draw(found, picture)
        text = capacity_page.table_of_sites(found)
    print(json.dumps(told(found), indent=2) if as_json else text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
