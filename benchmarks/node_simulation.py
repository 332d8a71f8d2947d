"""Nodes as queues, event by event: scanners send series, workers analyse, an archive takes results.

A node has a line and an intake (each one slice after the other), one worker process (results first, then slices, of
short series before those of long ones, as `dicom_node.dispatch` has it), and one sender. GPUs are shared by all nodes.
Times are seconds; what a piece of work takes is drawn from what was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import simpy

from benchmarks.costs import SLICE_B

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from benchmarks.costs import Assumptions, Costs
    from benchmarks.stations import Engine

    Events = Generator[simpy.Event, Any, None]

# slices of one series that the worker takes together, dicom_node's default on two cores; their times are added up here,
# where side by side they take a quarter less
MOST_AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class Work:
    """What pieces of work take, in seconds, as samples to draw from.

    Attributes
    ----------
    line_s, intake_s : of a slice, which the next one waits for
    answer_s : of a slice, until its answer, which nobody else waits for
    stolen_s : of the worker, for each slice that is taken in meanwhile: processor time shared by all cores
    slice_s, close_s, send_s : in worker, worker and sender, by number of slices of the series
    gpu_s : on a GPU, while the worker waits; None: the worker does it itself, within `slice_s`
    out_s : of a series' results on the line to the archive

    """

    line_s: float
    intake_s: float
    answer_s: np.ndarray
    stolen_s: float
    slice_s: Mapping[int, np.ndarray]
    close_s: Mapping[int, np.ndarray]
    send_s: Mapping[int, np.ndarray]
    gpu_s: np.ndarray | None = None
    out_s: float = 0.0

    @classmethod
    def of(
        cls, costs: Costs, assumed: Assumptions, engine: Engine, sizes: Sequence[int], *, loopback: bool = False
    ) -> Work:
        """From measured costs; over loopback, as they were measured, lines take no time of their own."""
        on_gpu = engine == "gpu"
        slices = {n: (costs.decode_ms + assumed.trip_ms if on_gpu else costs.of_slice(n)) / 1e3 for n in sizes}
        return cls(
            line_s=0.0 if loopback else assumed.on_the_line_ms(SLICE_B) / 1e3,
            intake_s=costs.intake_ms / 1e3,
            answer_s=np.maximum(costs.response_ms - costs.intake_ms, 0.0) / 1e3,
            stolen_s=0.0 if on_gpu else costs.intake_cpu_ms / costs.threads / 1e3,
            slice_s=slices,
            close_s={n: costs.of_close(n) / 1e3 for n in sizes},
            send_s={n: costs.of_send(n) / 1e3 for n in sizes},
            gpu_s=np.asarray([assumed.gpu_ms / 1e3]) if on_gpu else None,
            out_s=0.0 if loopback else assumed.on_the_line_ms(1e6 * assumed.results_mb) / 1e3,
        )


@dataclass(slots=True)
class Told:
    """What became of one series, in seconds.

    Attributes
    ----------
    began : when its first slice was sent
    last : when its last slice was answered
    analysed, built, sent : when all slices were analysed, results were on the disk, the archive had them

    """

    slices: int
    began: float
    last: float = math.nan
    analysed: float = math.nan
    built: float = math.nan
    sent: float = math.nan
    left: int = field(default=0)
    all_here: bool = False


class Draw:
    """Samples in random order, thousands at a time: one call of numpy for each would be slower than the simulation."""

    def __init__(self, samples: np.ndarray, random: np.random.Generator) -> None:
        self._samples, self._random = np.asarray(samples, float), random
        self._drawn: list[float] = []

    def __call__(self) -> float:
        if not self._drawn:
            self._drawn = self._random.choice(self._samples, 1024).tolist()
        return self._drawn.pop()


class Node:
    """Queues of one node.

    Parameters
    ----------
    gpus : shared with other nodes; None where the worker computes

    """

    def __init__(
        self, env: simpy.Environment, work: Work, random: np.random.Generator, gpus: simpy.Resource | None = None
    ) -> None:
        self.env, self.work, self.gpus = env, work, gpus
        self._draws = {
            name: {n: Draw(samples, random) for n, samples in getattr(work, name).items()}
            for name in ("slice_s", "close_s", "send_s")
        }
        self._answer = Draw(work.answer_s, random)
        self._gpu = Draw(work.gpu_s, random) if work.gpu_s is not None else None
        self._waiting = simpy.PriorityStore(env)
        self._to_send = simpy.Store(env)
        self._number = 0
        self._stolen = self._line_free = self._intake_free = 0.0
        self.busy_s = dict.fromkeys(("line", "intake", "worker", "gpu", "sender"), 0.0)
        self.done = {"slices": 0, "series": 0}
        env.process(self._run_worker())
        env.process(self._run_sender())

    def take(self, series: Told) -> float:
        """Take a slice that is sent now; when it is answered."""
        work, now = self.work, self.env.now
        self._line_free = max(now, self._line_free) + work.line_s
        self._intake_free = max(self._line_free, self._intake_free) + work.intake_s
        self.busy_s["line"] += work.line_s
        self.busy_s["intake"] += work.intake_s
        self._stolen += work.stolen_s
        series.left += 1
        return self._intake_free + self._answer()

    def analyse(self, series: Told) -> None:
        """Have a slice that is on the disk analysed."""
        self._put((1, series.slices), series)

    def is_complete(self, series: Told) -> None:
        """All slices are here: results follow the last one's analysis."""
        series.all_here = True
        if not series.left:
            self._close(series)

    def _close(self, series: Told) -> None:
        series.analysed = self.env.now
        self._put((0, series.slices), series)

    def _put(self, rank: tuple[int, int], series: Told) -> None:
        self._number += 1
        self._waiting.put(simpy.PriorityItem((*rank, self._number), series))

    def _run_worker(self) -> Events:
        while True:
            item = yield self._waiting.get()
            rank, series = item.priority, item.item
            began = self.env.now
            if rank[0] == 0:
                yield self.env.timeout(self._draws["close_s"][series.slices]())
                series.built = self.env.now
                self._to_send.put(series)
            else:
                yield from self._infer(series, self._together(series))
            self.busy_s["worker"] += self.env.now - began

    def _together(self, series: Told) -> int:
        """Take what waits of the same series, up to what goes together."""
        count, items = 1, self._waiting.items
        while count < MOST_AT_ONCE and items and items[0].item is series and items[0].priority[0] == 1:
            self._waiting.get()
            count += 1
        return count

    def _infer(self, series: Told, count: int) -> Events:
        draw = self._draws["slice_s"][series.slices]
        stolen, self._stolen = self._stolen, 0.0
        yield self.env.timeout(sum(draw() for _ in range(count)) + stolen)
        if self.gpus is not None and self._gpu is not None:
            with self.gpus.request() as turn:
                yield turn
                took = sum(self._gpu() for _ in range(count))
                self.busy_s["gpu"] += took
                yield self.env.timeout(took)
        self.done["slices"] += count
        series.left -= count
        if series.all_here and not series.left:
            self._close(series)

    def _run_sender(self) -> Events:
        while True:
            series = yield self._to_send.get()
            took = self._draws["send_s"][series.slices]() + self.work.out_s
            yield self.env.timeout(took)
            self.busy_s["sender"] += took
            self.done["series"] += 1
            series.sent = self.env.now


def push(node: Node, series: Told, pace: float, scanner: simpy.Resource | None = None, own_s: float = 0.0) -> Events:
    """Send a series: at a pace if the answers keep up, or each slice when the last one is answered.

    Parameters
    ----------
    pace : slices a second; infinite is as fast as answers come
    scanner, own_s : what else the sender does for a slice, and with whom it shares the processor for that

    """
    env = node.env
    for number in range(series.slices):
        yield env.timeout(max(series.began + number / pace - env.now, 0.0))
        if scanner is not None:
            with scanner.request() as turn:
                yield turn
                yield env.timeout(own_s)
        series.last = node.take(series)
        yield env.timeout(max(series.last - env.now, 0.0))
        node.analyse(series)
    node.is_complete(series)


@dataclass(frozen=True, slots=True)
class Run:
    """What a simulation tells: every series, how long it ran, and its nodes."""

    series: list[Told]
    nodes: list[Node]
    seconds: float

    def results_s(self, slices: int | None = None) -> np.ndarray:
        """From a series' last answer to all of its results in the archive."""
        return np.asarray([one.sent - one.last for one in self.series if slices in (None, one.slices)])

    def busy(self, station: str) -> float:
        """Share of time, over all nodes."""
        return sum(node.busy_s[station] for node in self.nodes) / (len(self.nodes) * self.seconds)

    def mean_in_system(self) -> float:
        """Series between their first slice and their delivery, averaged over time: counted from what came and went."""
        steps = sorted([(one.began, 1) for one in self.series] + [(one.sent, -1) for one in self.series])
        area, present, before = 0.0, 0, 0.0
        for at, step in steps:
            area += present * (at - before)
            present, before = present + step, at
        return area / self.seconds


def simulate(
    work: Work, assumed: Assumptions, scanners: float, *, exams: int, seed: int, nodes: int = 1, gpus: int = 0
) -> Run:
    """Scanners of a busy hour that does not end, until so many examinations have been sent; then all is delivered.

    Examinations come at random (Poisson), each to any of the nodes, as they do where a scanner has its node; the series
    of each one after the other.
    """
    env, random = simpy.Environment(), np.random.default_rng(seed)
    shared = simpy.Resource(env, gpus) if gpus else None
    all_nodes = [Node(env, work, random, shared) for _ in range(nodes)]
    told: list[Told] = []

    def examine(node: Node) -> Events:
        for slices in assumed.exam:
            told.append(Told(slices, env.now))
            yield from push(node, told[-1], assumed.pace)

    def arrive() -> Events:
        gaps = random.exponential(3600 / (scanners * assumed.exams_per_hour), exams)
        places = random.integers(nodes, size=exams)
        for gap, place in zip(gaps, places, strict=True):
            yield env.timeout(gap)
            env.process(examine(all_nodes[place]))

    env.process(arrive())
    env.run()
    return Run(told, all_nodes, env.now)


def at_once(work: Work, slices: int, count: int, *, seed: int, own_s: float) -> list[Told]:
    """Let so many scanners begin together, each with a series, flat out, as `benchmarks.growth` does in one process."""
    env, random = simpy.Environment(), np.random.default_rng(seed)
    node, scanner = Node(env, work, random), simpy.Resource(env, 1)
    told = [Told(slices, 0.0) for _ in range(count)]
    for series in told:
        env.process(push(node, series, math.inf, scanner, own_s))
    env.run()
    return told
