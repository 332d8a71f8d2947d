"""The simulation of `benchmarks.node_simulation` held against whole runs that were measured, and against formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.costs import SLICES_EACH, Assumptions
from benchmarks.node_simulation import Work, at_once, simulate
from benchmarks.queueing import mg1_wait, mgc_wait
from benchmarks.record import RecordError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.costs import Costs
    from benchmarks.record import Record

REPEATED = 20  # simulations of a run that was measured
CUSTOMERS = 4000  # of a queue that is held against its formula
BUSY = 0.5


@dataclass(frozen=True, slots=True)
class Check:
    """What is known, of a run or by a formula, and what the simulation says of it, in milliseconds.

    Attributes
    ----------
    is_input : the simulation was told it

    """

    what: str
    known: float
    simulated: float
    is_input: bool = False

    @property
    def error(self) -> float:
        """Of the simulation, as a share of what is known."""
        return self.simulated / self.known - 1


def whole_runs(records: Mapping[str, Record], measured: Costs, assumed: Assumptions, seed: int) -> list[Check]:
    """Whole runs that were measured, beside the simulation of the same: one series paced and flat out, many at once."""
    found = []
    own_s = sender_s(records["growth"], measured)
    for name in ("end-to-end", "end-to-end-flat-out"):
        if name not in records:
            continue
        record = records[name]
        pace = float(record.asked["rate"]) or math.inf
        for slices in record.asked["slices"]:
            told = _alone(measured, assumed, slices, pace, own_s, seed)
            for what, predicted in told.items():
                said = f"{slices} slices {'flat out' if math.isinf(pace) else f'at {pace:g}/s'}: {what}"
                found.append(Check(said, record.median(f"{slices}_{what}_ms"), predicted))
    growth = records["growth"]
    slices = SLICES_EACH
    work = Work.of(measured, assumed, "processor", [slices], loopback=True)
    for count in growth.asked["series"]:
        runs = [at_once(work, slices, count, seed=seed + number, own_s=own_s) for number in range(REPEATED)]
        names = f"{count} series of {slices} at once"
        for figure, words, stage in (("push", "pushed", "last"), ("to_results", "all results", "sent")):
            predicted = 1e3 * float(np.median([max(getattr(one, stage) for one in run) for run in runs]))
            is_input = count == 1 and figure == "push"
            found.append(Check(f"{names}: {words}", growth.median(f"series_{count}_{figure}_ms"), predicted, is_input))
    return found


def sender_s(growth: Record, measured: Costs) -> float:
    """What the benchmark's own scanner does for a slice beside waiting: from its push of a single series."""
    if 1 not in growth.asked["series"]:
        raise RecordError("growth: no run of a single series, which tells the sender's own time: --series 1,2,4,8,16")
    answered_ms = max(float(measured.response_ms.mean()), measured.intake_ms)
    return max(growth.median("series_1_push_ms") / SLICES_EACH - answered_ms, 0.0) / 1e3


def _alone(
    measured: Costs, assumed: Assumptions, slices: int, pace: float, own_s: float, seed: int
) -> dict[str, float]:
    """Medians of one series after the other, far apart, in milliseconds."""
    work = Work.of(measured, assumed, "processor", [slices], loopback=True)
    if math.isinf(pace):
        told = [at_once(work, slices, 1, seed=seed + number, own_s=own_s)[0] for number in range(REPEATED)]
    else:
        quiet = replace(assumed, exam=(slices,), exams_per_hour=1.0, pace=pace)
        told = simulate(work, quiet, 1, exams=REPEATED, seed=seed).series
    stages = {"closing": "analysed", "results": "built", "all": "sent"}
    return {
        what: 1e3 * float(np.median([getattr(one, stage) - one.last for one in told])) for what, stage in stages.items()
    }


def formulas(measured: Costs, seed: int) -> list[Check]:
    """Mean times in queue and service, of queues simple enough for a formula, with measured times where they may be.

    M/M/1: series of one slice, whose time is exponential. M/G/1: series of `SLICES_EACH` that come at once, with the
    measured times of slices and results. M/M/c: as many nodes as make requests random, two GPUs.
    """
    random = np.random.default_rng(seed)
    mean_s = float(measured.of_slice(SLICES_EACH).mean()) / 1e3
    exponential = random.exponential(mean_s, 100_000)
    mean_s = float(exponential.mean())
    found = []
    run = simulate(queue(exponential), _stream(1, BUSY / mean_s), 1, exams=3 * CUSTOMERS, seed=seed)
    found.append(_judged("one worker, M/M/1", mean_s / (1 - BUSY), run.results_s()))

    slices, close = (samples / 1e3 for samples in (measured.of_slice(SLICES_EACH), measured.of_close(SLICES_EACH)))
    mean = SLICES_EACH * slices.mean() + close.mean()
    second = SLICES_EACH * slices.var() + close.var() + mean**2
    run = simulate(
        queue(slices, close, slices=SLICES_EACH), _stream(SLICES_EACH, BUSY / mean), 1, exams=CUSTOMERS, seed=seed
    )
    wait = mg1_wait(BUSY / mean, mean, second)
    found.append(_judged("one worker, measured times, M/G/1", wait + mean, run.results_s()))

    nodes, gpus = 200, 2
    rate = 0.7 * gpus / mean_s
    run = simulate(
        queue(np.zeros(1), gpu=exponential), _stream(1, rate), 1, exams=3 * CUSTOMERS, seed=seed, nodes=nodes, gpus=gpus
    )
    found.append(_judged("two GPUs of many nodes, M/M/c", mean_s + mgc_wait(rate, mean_s, gpus), run.results_s()))
    return found


def queue(
    slice_s: np.ndarray, close_s: np.ndarray | None = None, *, slices: int = 1, gpu: np.ndarray | None = None
) -> Work:
    """A worker in which nothing else takes time."""
    nothing = np.zeros(1)
    closing = nothing if close_s is None else close_s
    return Work(0.0, 0.0, nothing, 0.0, {slices: slice_s}, {slices: closing}, {slices: nothing}, gpu)


def _stream(slices: int, per_s: float) -> Assumptions:
    return Assumptions(exam=(slices,), exams_per_hour=3600 * per_s, pace=math.inf)


def _judged(what: str, known_s: float, found_s: np.ndarray) -> Check:
    return Check(what, 1e3 * known_s, 1e3 * float(found_s.mean()))
