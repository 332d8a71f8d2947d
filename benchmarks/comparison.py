"""Two records of one benchmark: what has changed beyond noise.

For each figure that both have, the ratio of the second's median to the first's, with a 99 % interval by bootstrap. What
is drawn again are blocks of neighbouring samples, as long as the square root of their number (Künsch 1989): neighbours
in time share their noise, and drawing them one by one would take that for certainty. A figure has changed where the
interval leaves out the ratio of 1 and the change is larger than the tolerance: what differs by less is not worth a word
even where it is sure. Fewer than five samples decide nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from benchmarks.record import RecordError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from benchmarks.record import Record

DRAWS, CONFIDENCE, FEWEST = 2000, 0.99, 5
TOLERANCE = 0.05

Verdict = Literal["better", "worse", "same", "too few samples"]


@dataclass(frozen=True, slots=True)
class Change:
    """One figure in two records.

    Attributes
    ----------
    first, second : medians
    ratio, low, high : second by first, and its interval

    """

    name: str
    first: float
    second: float
    ratio: float
    low: float
    high: float
    verdict: Verdict

    def line(self) -> str:
        interval = f"{self.ratio:.3f} [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.name}: {self.first:.4g} -> {self.second:.4g}, x {interval}: {self.verdict}"


def compare(first: Record, second: Record, tolerance: float = TOLERANCE) -> list[Change]:
    """What became of each figure.

    Raises
    ------
    RecordError : of two benchmarks, or without a figure in common

    """
    if first.kind != second.kind:
        raise RecordError(f"one record is of {first.kind}, the other of {second.kind}: compare two of a kind")
    common = [name for name in first.samples if name in second.samples]
    if not common:
        raise RecordError("the records have no figure in common: measure both with the same options")
    return [_change(name, first.samples[name], second.samples[name], tolerance) for name in common]


def doubts(first: Record, second: Record) -> list[str]:
    """Why a difference may be another than the code's."""
    found = [
        f"{what}: {first.machine.get(what)} and {second.machine.get(what)}"
        for what in first.machine
        if first.machine[what] != second.machine.get(what)
    ]
    found += [
        f"asked {name}: {first.asked[name]} and {second.asked.get(name)}"
        for name in first.asked
        if first.asked[name] != second.asked.get(name)
    ]
    loads = {"first": first.load_average.get("before", 0.0), "second": second.load_average.get("before", 0.0)}
    found += [f"the {which} was measured under a load of {load:g}" for which, load in loads.items() if load > 0.5]
    return found


def _change(name: str, first: Sequence[float], second: Sequence[float], tolerance: float) -> Change:
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    medians = float(np.median(a)), float(np.median(b))
    ratio = medians[1] / medians[0] if medians[0] else float("nan")
    if min(len(a), len(b)) < FEWEST or not medians[0]:
        return Change(name, *medians, ratio, float("nan"), float("nan"), "too few samples")
    drawn = np.random.default_rng(0)  # the same records, the same answer
    ratios = _medians(b, drawn) / _medians(a, drawn)
    low, high = (float(one) for one in np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]))
    is_sure = (low > 1 or high < 1) and abs(ratio - 1) > tolerance
    verdict: Verdict = "same" if not is_sure else "better" if (ratio > 1) == name.endswith("_per_s") else "worse"
    return Change(name, *medians, ratio, low, high, verdict)


def _medians(values: NDArray[np.float64], drawn: np.random.Generator) -> NDArray[np.float64]:
    """Medians of series drawn again, block by block."""
    length = int(np.sqrt(len(values)))
    blocks = -(-len(values) // length)
    starts = drawn.integers(0, len(values), (DRAWS, blocks))
    places = (starts[:, :, None] + np.arange(length)) % len(values)  # round the end: each sample as often as any
    return np.median(values[places.reshape(DRAWS, -1)[:, : len(values)]], axis=1)
