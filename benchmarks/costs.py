"""What a node's work costs, as the committed records have measured it; and what nobody has, as assumptions.

Records: ``growth`` (a slice and a close in the worker, by number of slices; series at once), ``ingest`` (what is taken
in and synced), ``latency`` (decoding alone) and ``end-to-end`` (from results on the disk to the archive's last answer).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.record import Record, RecordError, read

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

SLICES_EACH = 20  # of the series at once in `benchmarks.growth`, which it takes torch to ask
SLICE_B = 526_000  # 512 x 512, 16 bit, and its header: what `ingest` sends
NEEDED = {
    "growth": "scanside bench growth --out {path}",
    "ingest": "scanside bench ingest --out {path}",
    "latency": "scanside bench latency --out {path}",
    "end-to-end": "scanside bench end-to-end --out {path}",
}


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What no record says. None of it is a measurement.

    Attributes
    ----------
    exam : slices of each series of one examination, in the order in which a scanner sends them
    exams_per_hour : of one scanner, in its busiest hour
    pace : slices a second that a scanner sends; infinite: all at once
    line_gbps : between scanners, nodes and archive
    results_mb : of one series, on the line to the archive
    gpu_ms : a GPU's time for one slice, which no other slice has meanwhile
    trip_ms : from a node to the GPU's server and back, for one slice, without the GPU's time
    most_busy : utilisation at which a machine is called full
    target_s : for the 95th percentile from a series' last slice to all of its results in the archive
    days : for reading an archive anew

    """

    exam: tuple[int, ...] = (40, 320)
    exams_per_hour: float = 4.0
    pace: float = 20.0
    line_gbps: float = 1.0
    results_mb: float = 22.0
    gpu_ms: float = 2.0
    trip_ms: float = 2.0
    most_busy: float = 0.7
    target_s: float = 10.0
    days: float = 365.0

    @property
    def slices(self) -> int:
        """Of one examination."""
        return sum(self.exam)

    def on_the_line_ms(self, size_b: float) -> float:
        return 1e3 * 8 * size_b / (1e9 * self.line_gbps)


@dataclass(frozen=True, slots=True)
class Costs:
    """Milliseconds as measured, as samples to draw from.

    Attributes
    ----------
    intake_ms : for each slice of four senders at once: the pace at which slices are synced and answered
    response_ms : from a slice's last byte to its answer, one sender
    intake_cpu_ms : processor time of that
    decode_ms : of a slice
    slice_ms : decoding and inference of a slice in the worker, by number of slices of its series
    close_ms : measuring, building and writing results, by number of slices
    send_ms : from results on the disk to the archive's last answer, by number of slices
    threads : of the machine

    """

    intake_ms: float
    response_ms: NDArray[np.float64]
    intake_cpu_ms: float
    decode_ms: NDArray[np.float64]
    slice_ms: Mapping[int, NDArray[np.float64]]
    close_ms: Mapping[int, NDArray[np.float64]]
    send_ms: Mapping[int, NDArray[np.float64]]
    threads: int

    @classmethod
    def of(cls, records: Mapping[str, Record]) -> Costs:
        """From the records named in `NEEDED`.

        Raises
        ------
        RecordError : a figure is not there

        """
        growth, ingest = records["growth"], records["ingest"]
        whole = records["end-to-end"]
        try:
            return cls(
                1e3 / ingest.median("loopback_scanside_4_senders_per_s"),
                np.asarray(ingest.samples["loopback_scanside_response_ms"]),
                ingest.median("loopback_scanside_cpu_ms"),
                np.asarray(records["latency"].samples["decode_ms"]),
                {n: np.asarray(growth.samples[f"slices_{n}_slice_ms"]) for n in growth.asked["slices"]},
                {n: np.asarray(growth.samples[f"slices_{n}_close_ms"]) for n in growth.asked["slices"]},
                {n: _between(whole, f"{n}_results_ms", f"{n}_all_ms") for n in whole.asked["slices"]},
                growth.machine["threads"],
            )
        except KeyError as error:
            raise RecordError(f"no figure {error} in the records: measure again with `make bench`") from error

    def of_slice(self, slices: int) -> NDArray[np.float64]:
        return self.slice_ms[nearest(self.slice_ms, slices)]

    def of_close(self, slices: int) -> NDArray[np.float64]:
        """Of the nearest number of slices that was measured, brought to the mean between its neighbours.

        Below the smallest it stays, beyond the largest it grows with the slices.
        """
        return _scaled(self.close_ms, slices)

    def of_send(self, slices: int) -> NDArray[np.float64]:
        """Likewise."""
        return _scaled(self.send_ms, slices)


def load(folder: Path) -> dict[str, Record]:
    """The records that are needed, and ``end-to-end-flat-out`` where there is one.

    Raises
    ------
    RecordError : one is not there; with the command that measures it

    """
    missing = [name for name in NEEDED if not (folder / f"{name}.json").exists()]
    if missing:
        remedies = "; ".join(NEEDED[name].format(path=folder / f"{name}.json") for name in missing)
        raise RecordError(f"{folder}: no record of {', '.join(missing)}: {remedies}")
    names = [*NEEDED, *(one for one in ("end-to-end-flat-out",) if (folder / f"{one}.json").exists())]
    return {name: read(folder / f"{name}.json") for name in names}


def nearest(measured: Mapping[int, object], slices: int) -> int:
    """The number of slices nearest to this one, as ratios go, for which there are samples."""
    return min(measured, key=lambda each: abs(np.log(each / slices)))


def _scaled(measured: Mapping[int, NDArray[np.float64]], slices: int) -> NDArray[np.float64]:
    sizes, samples = sorted(measured), measured[nearest(measured, slices)]
    mean = np.interp(slices, sizes, [measured[each].mean() for each in sizes]) * max(1.0, slices / sizes[-1])
    return samples * (mean / samples.mean()) if samples.any() else samples


def _between(record: Record, first: str, last: str) -> NDArray[np.float64]:
    """How much later one is than the other, round by round; of rounds that do not pair, the medians' difference."""
    earlier, later = record.samples[first], record.samples[last]
    if len(earlier) == len(later):
        return np.maximum(np.subtract(later, earlier), 0.0)
    return np.asarray([max(record.median(last) - record.median(first), 0.0)])
