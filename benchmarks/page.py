"""docs/performance.md from the committed records; nothing in it is typed by hand.

::

    python -m benchmarks.page            (make bench measures all anew and then does this)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.record import Record, read

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

RESULTS, PAGE = Path("benchmarks/results"), Path("docs/performance.md")
PICTURES = "../benchmarks/results"

# name of the record's file, title, and what is said of it
SECTIONS = {
    "end-to-end": (
        "From the last slice to the archive",
        (
            "A scanner pushes phantom heads with two bleeds through `scanside serve` into an archive. Times count "
            "from the answer on the last slice; `alert` from the answer on the slice that decides to the HL7 "
            "listener; `response`, `analysis`, `closing`, `results` and `delivery` are the node's own metrics "
            "(docs/operations.md). The floor is the remaining work part by part, each alone, as a worker does it, in "
            "the same run: inference of the last slice, measuring, building the results, writing them synced, and the "
            "same objects over loopback into the same archive from a sender that has them encoded."
        ),
    ),
    "end-to-end-int8": (
        "The same in INT8",
        '40 slices, `model.precision = "int8-cpu"`: two cores keep up with the scanner.',
    ),
    "end-to-end-flat-out": (
        "The same, pushed as fast as it goes",
        "What the scanner outruns is waiting inference: `closing` holds it.",
    ),
    "end-to-end-orthanc": (
        "The same, into Orthanc",
        "An object is there when Orthanc has answered.",
    ),
    "peers": (
        "Against what else one could use",
        (
            "The same DICOM files and the same weights, from files to labels; `scanside results` to SEG, SR and "
            "pictures on the disk as well. Pipelines that store first and then process wait until no slice has "
            "come for a while: mercure and Orthanc 60 s, MONAI's gateway 5 s by default. The wait is theirs and "
            "is not measured; the processing is that of ONNX Runtime by hand, the fastest here."
        ),
    ),
    "att-focus-net": (
        "The case of Peng et al.",
        (
            "40 slices through AttFocusNet at its paper's widths, which took 5.6 s there; from files to labels, on the "
            "grid of the [study](../benchmarks/results/networks/README.md) and on the paper's. The network has learnt "
            "nothing, and every layer is in 8 bits that may be: speed does not depend on weights."
        ),
    ),
    "latency": (
        "One inference",
        (
            "From HU as int16 in memory to labels there, as trtexec measures: warmed up, three seconds at least. "
            "The floor is `InferenceSession.run` alone, called in turn with it."
        ),
    ),
    "throughput": (
        "Slices a second",
        "By threads and batch; the limit is the engine alone.",
    ),
    "ingest": (
        "Intake",
        (
            "Slices of 526 kB. Orthanc and scanside answer when a slice is on the disk, DCMTK's storescp syncs "
            "nothing. The peers wait 40 ms for an acknowledgement unless `TCP_NODELAY=1` is in their environment, "
            "which nobody sets by default."
        ),
    ),
    "triton": (
        "Through a Triton on this machine",
        (
            "The same graph by the same ONNX Runtime with as many threads, in this process and behind a Triton's "
            "Python backend; a slice goes each way in turn. `make bench-triton` measures it and what follows."
        ),
    ),
    "replicas": (
        "More Tritons",
        (
            "Slices a second through more and more servers of one thread each. The ideal is one server's rate times "
            "their number, as far as there are cores for them: server and clients share them."
        ),
    ),
    "growth": (
        "As work grows",
        (
            "Slopes are exponents over the larger half of the sizes: 1 is linear. `slice` is decoding and "
            "inference of one, `close` all that is left when the last one is there."
        ),
    ),
}

HEAD = """# Performance

Every figure is of a committed record (benchmarks/results) and was measured by the command beside it; `make bench`
measures all anew and writes this page. Weights do not matter to it: the network that ships has learnt from
phantoms alone. Research use only; not a medical device.

`scanside bench compare A.json B.json` says what has changed beyond noise between two records: a 99 % interval of the
ratio of medians by block bootstrap, and a change of 5 % at least. What the hot paths may do at most (syncs, names,
bytes, sends, memory, inferences) is counted in every test run and held against `tests/budgets.toml`.

`pace` is the machine's own, before and after: a million additions in Python, and reading 16 MB that rested for 0.1 s.
That of a virtual machine changes within hours, and all figures with it: compare what was measured at one pace.
"""


def compose(records: Mapping[str, Record]) -> str:
    """The page."""
    parts = [HEAD, _targets(records) if records else "No record is committed yet.\n"]
    for name, (title, words) in SECTIONS.items():
        if name in records:
            parts.append(_section(name, title, words, records[name]))
    return "\n".join(parts)


def _targets(records: Mapping[str, Record]) -> str:
    lines = ["## Targets", "", "| what | target | measured | |", "|---|---:|---:|---|"]
    for what, target, measured in _measured(records):
        met = "met" if (measured >= target if what.startswith("times sooner") else measured <= target) else "**missed**"
        lines.append(f"| {what} | {target:g} | {measured:.3g} | {met} |")
    return "\n".join(lines) + "\n"


def _measured(records: Mapping[str, Record]) -> Iterator[tuple[str, float, float]]:
    whole, peers = records.get("end-to-end"), records.get("peers")
    for name, how in (("end-to-end", ""), ("end-to-end-int8", ", INT8")):
        if name in records:
            yield from _after_the_last_slice(records[name], how)
    if whole:
        yield "node from its start to its open port, s", 3.0, whole.median("node_start_s")
        yield "idle processor time of node and worker, percent of a core", 1.0, whole.median("idle_cpu_percent")
    if peers:
        yield "40 slices from files to results on the disk, ms", 1000.0, peers.median("scanside_results_ms")
        if "scanside_int8_results_ms" in peers.samples:
            yield "the same in INT8, ms", 1000.0, peers.median("scanside_int8_results_ms")
    if own := records.get("att-focus-net"):
        for grid in own.asked["grids"]:
            what = f"{own.asked['slices']} slices from files to labels by AttFocusNet in INT8, grid {grid}, ms"
            yield what, 5600.0, own.median(f"grid_{grid}_int8_series_ms")
    if peers and whole and "40_all_ms" in whole.samples:
        shortest = min(record for name, record in _waits(peers).items())
        yield "times sooner than store-then-process with a wait of 5 s", 10.0, shortest / whole.median("40_all_ms")


def _after_the_last_slice(whole: Record, how: str) -> Iterator[tuple[str, float, float]]:
    for count, most in ((40, 300.0), (320, 600.0)):
        if f"{count}_all_ms" in whole.samples:
            yield (
                f"all results in the archive, {count} slices at 20/s{how}, p95, ms",
                most,
                _p95(whole, f"{count}_all_ms"),
            )
            yield f"times the floor, {count} slices{how}", 1.5, whole.ratio(f"{count}_all_ms") or float("nan")
        if f"{count}_alert_ms" in whole.samples:
            yield (
                f"alert after the slice that decides, {count} slices{how}, p95, ms",
                150,
                _p95(whole, f"{count}_alert_ms"),
            )


def _waits(peers: Record) -> dict[str, float]:
    return {name: peers.median(name) for name in peers.samples if name.endswith("_last_slice_to_labels_ms")}


def _p95(record: Record, name: str) -> float:
    return float(np.percentile(record.samples[name], 95))


def _section(name: str, title: str, words: str, record: Record) -> str:
    machine, load = record.machine, record.load_average
    where = (
        f"`{record.command()}` on {machine['cpu']}, {machine['threads']} threads, {machine['memory_gb']:g} GB; load "
        f"average before {load['before']:g}, after {load['after']:g}; Python {record.versions['python']}, ONNX Runtime "
        f"{record.versions.get('onnxruntime', 'none')}."
    )
    rows = ["| figure | p50 | p95 | p99 | variation, % | times its floor |", "|---|---:|---:|---:|---:|---:|"]
    for figure, samples in record.samples.items():
        values = [float(np.percentile(samples, p)) for p in (50, 95, 99)]
        mean = float(np.mean(samples))
        ratio = record.ratio(figure)
        cells = [f"{value:.4g}" for value in values]
        cells += [f"{100 * float(np.std(samples)) / mean:.0f}" if mean else "", f"{ratio:.2f}" if ratio else ""]
        rows.append(f"| {figure.replace('_', ' ')} | {' | '.join(cells)} |")
    more = SAID.get(record.kind, lambda _: "")(record)
    picture = f"![{title}]({PICTURES}/{name}.png)"
    return "\n".join([f"## {title}", "", words, "", where, "", picture, "", *([more, ""] if more else []), *rows, ""])


def _slopes(record: Record) -> str:
    rows = [f"| {what} | {slope} |" for what, slope in record.about["slopes"].items()]
    return "\n".join(["| work: figure | slope |", "|---|---:|", *rows])


def _same(record: Record) -> str:
    most = max(record.about["pixels_that_differ"].values())
    return f"Labels of the peers differ from the bundle's in {most:.4%} of the pixels at most."


SAID: dict[str, Callable[[Record], str]] = {"growth": _slopes, "peers": _same}


def main() -> None:
    records = {name: read(RESULTS / f"{name}.json") for name in SECTIONS if (RESULTS / f"{name}.json").exists()}
    PAGE.write_text(compose(records))
    print(f"{PAGE}: {len(records)} records")


if __name__ == "__main__":
    main()
