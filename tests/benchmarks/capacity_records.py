"""Records in the form of the real ones, of a node that never was: 65 ms a slice in the worker, 4 ms to be stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from benchmarks.record import Record

if TYPE_CHECKING:
    from pathlib import Path

SLICES, SERIES = (20, 40, 80, 160, 320), (1, 2, 4)
MACHINE = {"cpu": "none", "threads": 2, "memory_gb": 8.0, "kernel": "6"}


def write(folder: Path) -> None:
    """Write all that `benchmarks.costs` asks for."""
    random = np.random.default_rng(7)

    def around(ms: float, count: int = 10) -> list[float]:
        return list(ms * (0.9 + random.gamma(2.0, 0.05, count)))

    growth = {}
    for n in SLICES:
        growth |= {f"slices_{n}_slice_ms": around(65, n), f"slices_{n}_close_ms": around(300 + 2 * n, 5)}
    for n in SERIES:
        growth |= {f"series_{n}_push_ms": [180.0 * n], f"series_{n}_to_results_ms": [1640.0 * n + 300]}
    _write(folder / "growth.json", "growth", {"slices": list(SLICES), "series": list(SERIES)}, growth)
    taken = {
        "loopback_scanside_4_senders_per_s": [400.0, 420.0, 390.0],
        "loopback_scanside_response_ms": around(4.2, 120),
        "loopback_scanside_cpu_ms": [0.8, 0.9, 0.85],
    }
    _write(folder / "ingest.json", "ingest", {"slices": 120}, taken)
    _write(folder / "latency.json", "latency", {"batch": 1}, {"decode_ms": around(0.6), "infer_ms": around(60)})
    for name, rate, pace_ms in (("end-to-end", 20.0, 50.0), ("end-to-end-flat-out", 0, 9.0)):
        whole: dict[str, list[float]] = {}
        for n in (40, 320):
            closing = around((65.9 - pace_ms) * n)
            results = [ms + 300 + 2 * n for ms in closing]
            whole |= {f"{n}_closing_ms": closing, f"{n}_results_ms": results}
            whole[f"{n}_all_ms"] = [ms + 150 for ms in results]
        _write(folder / f"{name}.json", "end-to-end", {"slices": [40, 320], "rate": rate}, whole)


def _write(path: Path, kind: str, asked: dict[str, object], figures: dict[str, list[float]]) -> None:
    record = Record(kind, asked, machine=MACHINE, load_average={"before": 0.0, "after": 0.0})
    for name, samples in figures.items():
        record.add(name, samples)
    record.write(path)
