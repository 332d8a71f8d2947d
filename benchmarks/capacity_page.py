"""docs/scale.md: tables and sentences from what `benchmarks.capacity` has computed; nothing in it is typed by hand."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING

from benchmarks import stations
from benchmarks.costs import SLICE_B, Assumptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.capacity import Capacity, Point
    from benchmarks.stations import Engine

HEAD = """# Scale

How far one node goes, how many it takes, and what limits it. Costs come from the records of
[performance](performance.md), measured on {machine}; what no record says is **assumed** and stands below. **There is no
record of a GPU: every figure under "GPU" rests on an assumption, not on a measurement.** Weights do not matter to any
of this. Research use only; not a medical device.

Made by `{command}`; the same records and the same seed ({seed}) give the same page.
"""
WORDS = {
    "exam": "slices of the series of one examination",
    "exams_per_hour": "examinations an hour of one scanner, in its busiest hour",
    "pace": "slices a second that a scanner sends",
    "line_gbps": "line between scanner, node and archive, Gb/s",
    "results_mb": "results of one series on the line, MB",
    "gpu_ms": "a GPU's time for one slice, ms",
    "trip_ms": "from node to GPU server and back, without that, ms",
    "most_busy": "utilisation at which a machine is full",
    "target_s": "seconds to all results of the first series, at p95",
    "days": "days for reading an archive anew",
}
SOURCES = {
    "network in": "assumed line",
    "disk sync": "`ingest`: four senders at once",
    "decode": "`latency`",
    "inference": "`growth` less decoding; GPU: assumed",
    "building results": "`growth`",
    "GPU": "assumed",
    "network out": "assumed line and size",
    "archive's answers": "`end-to-end`: from results on the disk to the last answer",
}
ENGINE_WORDS = {"processor": "processor", "gpu": "GPU (assumed)"}


def compose(found: Capacity, command: str, picture: str | None) -> str:
    """The page; with a picture, if it has a name."""
    machine = found.records["growth"].machine
    where = f"{machine['cpu']}, {machine['threads']} threads, {machine['memory_gb']:g} GB"
    parts = [
        HEAD.format(machine=where, command=command, seed=found.seed),
        "## What it takes\n",
        table_of_sites(found),
        _sentences(found),
        *([f"![Latency by scanners of a node, and what limits it]({picture})\n"] if picture else ()),
        "## One examination\n",
        _parts(found),
        "## One node as it fills\n",
        _curves(found),
        "## Predicted and measured\n",
        _checks(found),
        "## Assumptions, and what they matter\n",
        _assumptions(found),
        _sensitivity(found),
        HOW,
    ]
    return "\n".join(parts)


HOW = """## How it is computed

A station's utilisation is its rate times its time for one examination; the worker (decoding, inference, results) is one
process, so its parts add up. A node is full where its busiest station reaches the utilisation above. How long results
take is simulated event by event (`benchmarks/node_simulation.py`, simpy): examinations come at random, times are drawn
from the records' samples, results go before slices and short series before long ones, as in the node. The simulation is
held against formulas where these apply (`tests/benchmarks/test_capacity.py`): Little's law, the utilisation law, M/M/1,
M/G/1 (Pollaczek and Khinchine) for examinations that come at once, M/M/c for GPUs.

It knows nothing of: series that are not analysed, retries, archives that are down, several destinations, compressed
slices (decoding is of uncompressed ones), and cores that other programs take.
"""


def options_said(assumed: Assumptions, scanners: Sequence[int]) -> list[str]:
    """What was not left as it is by default, as it is typed."""
    default = Assumptions()
    said = []
    for one in fields(Assumptions):
        value = getattr(assumed, one.name)
        if value != getattr(default, one.name):
            said += [f"--{one.name.replace('_', '-')}", _typed(value)]
    return said + (["--scanners", _typed(scanners)] if scanners else [])


def table_of_sites(found: Capacity) -> str:
    """Nodes and GPUs by site; for one machine more than needed, see the sentence below it."""
    rows = [
        "| who | examinations/h | nodes, processor | p95, s | nodes, GPU (assumed) | GPUs | p95, s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, of in found.sites.items():
        own, gpu = of["processor"], of["gpu"]
        exams = own.scanners * found.assumed.exams_per_hour
        cells = [f"{own.nodes}", f"{own.first_s[1]:.3g}", f"{gpu.nodes}", f"{gpu.gpus}", f"{gpu.first_s[1]:.3g}"]
        rows.append(f"| {name} | {exams:g} | {' | '.join(cells)} |")
    again = found.reread
    days = f"{found.assumed.days:g} days"
    rows.append(
        f"| national archive, 10⁹ slices in {days} | {_reread_exams(found):.0f} | {again['processor'][0]} | | "
        f"{again['gpu'][0]} | {again['gpu'][1]} | |"
    )
    return "\n".join(rows) + "\n"


def _sentences(found: Capacity) -> str:
    """What the table means for who buys machines."""
    load, assumed = found.loads, found.assumed
    own, gpu = load["processor"], load["gpu"]
    a_day = 1e9 / assumed.days / 86400  # slices a second, day and night
    first, full = assumed.exam[0], {engine: _count(number, "scanner") for engine, number in found.full.items()}
    lines = f"""p95 is from the answer on the last slice of an examination's first series ({first} slices) to all of its
results in the archive. An emergency is told earlier, from the slice that shows it.

A node on the processor is full at **{full["processor"]}**, limited by {_where(own.bottleneck)}; with a GPU at
{full["gpu"]} (assumed), limited by {_where(gpu.bottleneck)}. Nodes are counted by site and by whole scanners: a
scanner has its node, and a hospital has at least one of its own, near its scanners, however few these are. Each site
wants one more than the table says. With one, a restart means that scanners wait (they keep their slices and send
again); with two, half of them do not notice.

A region's GPUs are few, and all of its nodes share them: one answers
{assumed.most_busy * 1e3 / assumed.gpu_ms:,.0f} slices a second at the assumed {assumed.gpu_ms:g} ms. What grows is
nodes: with its hospitals where these are small, with its scanners where they are large.

The archive's {_reread_exams(found):.0f} examinations an hour are {a_day:.0f} slices a second,
{8 * SLICE_B * a_day / 1e9:.2g} Gb/s out of it day and night, which it has to give away beside its work. Nothing need
stay on the nodes longer than `node.keep_days`.
"""
    late = [name for name, of in found.sites.items() if of["processor"].first_s[1] > assumed.target_s]
    if late:
        return f"{lines}\nLater than {assumed.target_s:g} s at p95 on the processor: {', '.join(late)}.\n"
    return f"{lines}\nEverywhere in the table p95 is below the {assumed.target_s:g} s that were asked for.\n"


def _parts(found: Capacity) -> str:
    rows = ["| station | processor, ms | GPU (assumed), ms | from |", "|---|---:|---:|---|"]
    own, gpu = found.loads["processor"].parts, found.loads["gpu"].parts
    rows += [f"| {name} | {own[name]:,.0f} | {gpu[name]:,.0f} | {SOURCES[name]} |" for name in stations.STATIONS]
    totals = [f"{found.loads[engine].worker_ms:,.0f}" for engine in found.loads]
    rows.append(f"| **worker**: decode, inference, results | {' | '.join(totals)} | |")
    return "\n".join(rows) + "\n"


def _curves(found: Capacity) -> str:
    rows = [
        "Worker busy: by the utilisation law, and as simulated.\n",
        "| scanners | engine | worker busy | p50 / p95 / p99 of the first series, s | p95 of all series, s |",
        "|---:|---|---:|---:|---:|",
    ]
    for engine, points in found.curves.items():
        law = found.loads[engine].busy(found.assumed.exams_per_hour)["worker"]
        rows += [_point(engine, one, one.scanners * law) for one in points]
    return "\n".join(rows) + "\n"


def _point(engine: Engine, one: Point, law: float) -> str:
    spread = " / ".join(f"{value:.3g}" for value in one.first_s)
    busy = f"{law:.0%}, {one.busy:.0%}"
    return f"| {one.scanners} | {ENGINE_WORDS[engine]} | {busy} | {spread} | {one.all_series_s[1]:.3g} |"


def _checks(found: Capacity) -> str:
    judged = [one for one in found.checks if not one.is_input]
    errors = sorted(abs(one.error) for one in judged)
    words = (
        "Whole runs of the records, beside the simulation of the same runs from the costs of parts, without a fit: the "
        "sender's own time is all that is taken from a run of this kind, the one marked *input*. Median error "
        f"{errors[len(errors) // 2]:.0%}, largest {errors[-1]:.0%}. Sender, archive and node shared these threads; the "
        "simulation lets the worker pay for intake alone.\n"
    )
    rows = [words, "| run | measured, ms | simulated, ms | error |", "|---|---:|---:|---:|"]
    rows += [
        f"| {one.what} | {one.known:,.0f} | {one.simulated:,.0f} | {'input' if one.is_input else f'{one.error:+.0%}'} |"
        for one in found.checks
    ]
    rows += [
        "\nThe same simulation where a formula is exact, or nearly (M/M/c); mean time in queue and service:\n",
        "| queue | formula, ms | simulated, ms | error |",
        "|---|---:|---:|---:|",
    ]
    rows += [f"| {one.what} | {one.known:.4g} | {one.simulated:.4g} | {one.error:+.1%} |" for one in found.agreement]
    return "\n".join(rows) + "\n"


def _assumptions(found: Capacity) -> str:
    rows = ["| assumed | value | option |", "|---|---:|---|"]
    for one in fields(Assumptions):
        option = f"`--{one.name.replace('_', '-')}`"
        rows.append(f"| {WORDS[one.name]} | {_value(getattr(found.assumed, one.name))} | {option} |")
    return "\n".join(rows) + "\n"


def _sensitivity(found: Capacity) -> str:
    """Scanners of a full node, one assumption or cost changed at a time."""
    rows = [
        "Scanners of a full node, when one thing is twice what it is above:\n",
        "| twice | processor | GPU (assumed) |",
        "|---|---:|---:|",
        f"| nothing | {found.full['processor']} | {found.full['gpu']} |",
    ]
    for name in ("exams_per_hour", "exam", "line_gbps", "results_mb", "gpu_ms", "trip_ms"):
        value = getattr(found.assumed, name)
        twice = tuple(2 * each for each in value) if name == "exam" else 2 * value
        changed = replace(found.assumed, **{name: twice})
        counts = [
            stations.scanners_per_node(stations.load(found.costs, changed, engine), changed) for engine in found.loads
        ]
        rows.append(f"| {WORDS[name]} | {' | '.join(map(str, counts))} |")
    for part in ("disk sync", "decode", "inference", "building results", "archive's answers"):
        counts = [
            stations.scanners_per_node(replace(load, parts=load.parts | {part: 2 * load.parts[part]}), found.assumed)
            for load in found.loads.values()
        ]
        rows.append(f"| time of {part} | {' | '.join(map(str, counts))} |")
    return "\n".join(rows) + "\n"


def _reread_exams(found: Capacity) -> float:
    return 1e9 / found.assumed.slices / 24 / found.assumed.days


def _where(station: str) -> str:
    return f"{station} (in the worker)" if station in stations.WORKER else station


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _typed(value: float | Sequence[int]) -> str:
    return f"{value:g}" if isinstance(value, float | int) else ",".join(map(str, value))


def _value(value: float | Sequence[int]) -> str:
    """For people, to whom 40,320 is forty thousand."""
    if isinstance(value, float | int):
        return f"{value:g}"
    *first, last = map(str, value)
    return f"{', '.join(first)} and {last}" if first else last
