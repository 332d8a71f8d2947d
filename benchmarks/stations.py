"""Which part of the way limits: what each station has to do for one examination, by the utilisation law."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from benchmarks.costs import SLICE_B
from benchmarks.queueing import servers_needed

if TYPE_CHECKING:
    from benchmarks.costs import Assumptions, Costs

Engine = Literal["processor", "gpu"]
WORKER = ("decode", "inference", "building results")
HOUR_MS = 3.6e6
STATIONS = ("network in", "disk sync", *WORKER, "GPU", "network out", "archive's answers")


@dataclass(frozen=True, slots=True)
class Load:
    """Milliseconds for one examination, by what takes them. The parts in `WORKER` follow each other in one process."""

    parts: dict[str, float]

    @property
    def worker_ms(self) -> float:
        return sum(self.parts[part] for part in WORKER)

    @property
    def node_ms(self) -> float:
        """Of the node's busiest station: no node can do more examinations than one in this time."""
        return max(self.worker_ms, *(ms for part, ms in self.parts.items() if part not in (*WORKER, "GPU")))

    @property
    def bottleneck(self) -> str:
        """What limits a node; within the worker, its largest part."""
        others = {part: ms for part, ms in self.parts.items() if part not in (*WORKER, "GPU")}
        name = max(others, key=others.__getitem__)
        if others[name] > self.worker_ms:
            return name
        return max(WORKER, key=self.parts.__getitem__)

    def busy(self, exams_per_hour: float) -> dict[str, float]:
        """Utilisation of each station, the worker as one."""
        own = {part: ms for part, ms in self.parts.items() if part not in WORKER}
        return {part: exams_per_hour * ms / HOUR_MS for part, ms in ({"worker": self.worker_ms} | own).items()}


def load(costs: Costs, assumed: Assumptions, engine: Engine, exam: tuple[int, ...] | None = None) -> Load:
    """What one examination asks of a node and of a GPU.

    On the processor, intake takes its share of the cores from the worker; with a GPU the worker waits for its answers.
    """
    exam = exam or assumed.exam
    slices = sum(exam)
    decode = float(costs.decode_ms.mean())
    if engine == "processor":
        answer = sum(n * (float(costs.of_slice(n).mean()) - decode) for n in exam)
        answer += slices * costs.intake_cpu_ms / costs.threads
    else:
        answer = slices * (assumed.gpu_ms + assumed.trip_ms)
    return Load(
        {
            "network in": slices * assumed.on_the_line_ms(SLICE_B),
            "disk sync": slices * costs.intake_ms,
            "decode": slices * decode,
            "inference": max(answer, 0.0),
            "building results": sum(float(costs.of_close(n).mean()) for n in exam),
            "GPU": slices * assumed.gpu_ms if engine == "gpu" else 0.0,
            "network out": len(exam) * assumed.on_the_line_ms(1e6 * assumed.results_mb),
            "archive's answers": sum(float(costs.of_send(n).mean()) for n in exam),
        }
    )


def scanners_per_node(one: Load, assumed: Assumptions) -> int:
    """As many as keep its busiest station at `most_busy`; 0 where one is too many."""
    return int(assumed.most_busy * HOUR_MS / (assumed.exams_per_hour * one.node_ms) + 1e-9)


def nodes_needed(scanners: int, one: Load, assumed: Assumptions) -> int:
    """Of one site: a scanner has its node, and where one alone is too many for a node, it has several to itself."""
    each = scanners_per_node(one, assumed)
    if each:
        return max(1, math.ceil(scanners / each))
    return scanners * servers_needed(assumed.exams_per_hour, one.node_ms / HOUR_MS, assumed.most_busy)


def gpus_needed(scanners: int, one: Load, assumed: Assumptions) -> int:
    return servers_needed(scanners * assumed.exams_per_hour, one.parts["GPU"] / HOUR_MS, assumed.most_busy)


def reread(slices: float, one: Load, assumed: Assumptions) -> tuple[int, int]:
    """Nodes, and GPUs, that read an archive of so many slices within `Assumptions.days`, day and night."""
    exams_per_hour = slices / assumed.slices / (24 * assumed.days)
    gpu = one.parts["GPU"] / HOUR_MS
    nodes = servers_needed(exams_per_hour, one.node_ms / HOUR_MS, assumed.most_busy)
    return nodes, servers_needed(exams_per_hour, gpu, assumed.most_busy) if gpu else 0
