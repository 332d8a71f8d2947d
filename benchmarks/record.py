"""What every benchmark writes: figures with their floors, the machine, versions and load; one JSON schema for all.

::

    {"schema": 1, "kind": "latency", "command": "scanside bench latency --batch 1", "machine": {...}, "versions": {...},
     "load_average": {"before": 0.1, "after": 1.0}, "asked": {...},
     "figures": {"infer_ms": {"p50": ..., "p99": ..., "cv_percent": ..., "count": ..., "samples": [...],
                              "floor": "session_run_ms", "ratio": 1.03}},
     "about": {...}}

A figure's unit ends its name; what ends in ``_per_s`` is better when it is larger, all else when it is smaller.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import pace
from runtime.errors import ScansideError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

SCHEMA = 1
MOST_SAMPLES = 1000  # kept of a figure, evenly spread: enough for any percentile that is told
PERCENTILES = (50, 90, 95, 99)
PACKAGES = ("scanside", "numpy", "onnxruntime", "tensorrt", "pydicom", "pynetdicom", "highdicom", "torch", "monai")


class RecordError(ScansideError):
    """A file that is no record of a benchmark."""


@dataclass(slots=True)
class Record:
    """Results of one benchmark.

    Attributes
    ----------
    kind : which: ``"latency"`` and so on
    asked : its options, without paths
    samples : of each figure, in the order of measuring
    floors : for a figure, the one below which it can't be
    about : what else is to be said
    machine, versions, load_average : see `machine`, `versions`

    """

    kind: str
    asked: dict[str, Any]
    samples: dict[str, list[float]] = field(default_factory=dict)
    floors: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=lambda: machine())  # noqa: PLW0108  # defined below
    versions: dict[str, str] = field(default_factory=lambda: versions())  # noqa: PLW0108
    load_average: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, samples: Sequence[float], *, floor: str | None = None) -> None:
        """Add samples to a figure."""
        self.samples.setdefault(name, []).extend(float(one) for one in samples)
        if floor:
            self.floors[name] = floor

    def median(self, name: str) -> float:
        return float(np.median(self.samples[name]))

    def ratio(self, name: str) -> float | None:
        """How far a figure is from its floor, median by median; of rates, how much of the floor's it reaches."""
        return self.median(name) / self.median(self.floors[name]) if name in self.floors else None

    def command(self) -> str:
        """What gives such a record again."""
        words = ["scanside", "bench", self.kind]
        for name, value in self.asked.items():
            if isinstance(value, bool):
                words += [f"--{name.replace('_', '-')}"] if value else []
            elif value is not None:
                text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
                words += [f"--{name.replace('_', '-')}", text]
        return shlex.join(words)

    def lines(self) -> list[str]:
        """Each figure in a line for people."""
        width = max(map(len, self.samples), default=0)
        return [f"{name:{width}}  {self._line(name)}" for name in self.samples]

    def _line(self, name: str) -> str:
        told = summary(self.samples[name])
        words = "  ".join(f"p{p} {told[f'p{p}']:.4g}" for p in PERCENTILES) + f"  cv {told['cv_percent']:.3g} %"
        ratio = self.ratio(name)
        return f"{words}  n {told['count']}" + (f"  = {ratio:.2f} x {self.floors[name]}" if ratio else "")

    def told(self) -> dict[str, Any]:
        """The record as JSON has it."""
        figures = {}
        for name, samples in self.samples.items():
            figures[name] = summary(samples)
            if name in self.floors:
                figures[name] |= {"floor": self.floors[name], "ratio": round(self.ratio(name), 4)}
            figures[name]["samples"] = [float(f"{one:.5g}") for one in thinned(samples)]
        return {
            "schema": SCHEMA,
            "kind": self.kind,
            "command": self.command(),
            "machine": self.machine,
            "versions": self.versions,
            "load_average": self.load_average,
            "asked": self.asked,
            "figures": figures,
            "about": self.about,
        }

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(compact(self.told()) + "\n")


@contextmanager
def measuring(kind: str, **asked: Any) -> Iterator[Record]:
    """Take the load and the machine's pace before and after what is measured."""
    record = Record(kind, asked)
    record.load_average["before"] = round(os.getloadavg()[0], 2)
    before = pace.measure()
    yield record
    for name, after in pace.measure().items():
        record.add(name, before[name] + after)
    record.load_average["after"] = round(os.getloadavg()[0], 2)


def read(path: Path) -> Record:
    """A record from its file.

    Raises
    ------
    RecordError : it is none, or of another schema

    """
    try:
        told = json.loads(path.read_text())
        if told["schema"] != SCHEMA:
            raise RecordError(f"{path}: a record of schema {told['schema']}, this is {SCHEMA}: measure again")
        record = Record(told["kind"], told["asked"], machine=told["machine"], versions=told["versions"])
        for name, figure in told["figures"].items():
            record.add(name, figure["samples"], floor=figure.get("floor"))
        record.about, record.load_average = told["about"], told["load_average"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"{path}: no record of a benchmark: write one with `scanside bench ... --out`") from error
    return record


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Percentiles, coefficient of variation and count."""
    values = np.asarray(samples, dtype=float)
    told: dict[str, float] = {f"p{p}": float(f"{np.percentile(values, p):.5g}") for p in PERCENTILES}
    mean = float(values.mean())
    told["cv_percent"] = round(100 * float(values.std()) / mean, 2) if mean else 0.0
    return told | {"count": len(values)}


def thinned(samples: Sequence[float]) -> list[float]:
    """Some of them, evenly spread over the run."""
    if len(samples) <= MOST_SAMPLES:
        return list(samples)
    return [samples[int(at)] for at in np.linspace(0, len(samples) - 1, MOST_SAMPLES)]


def compact(told: Mapping[str, Any]) -> str:
    """JSON to be read in a diff: indented, but the numbers of a list on one line."""
    lists: list[str] = []

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: kept(inner) for key, inner in value.items()}
        if isinstance(value, list) and value and not any(isinstance(one, dict | list) for one in value):
            lists.append(json.dumps(value))
            return f"\0{len(lists) - 1}\0"
        return [kept(one) for one in value] if isinstance(value, list) else value

    text = json.dumps(kept(told), indent=2)
    for number, line in enumerate(lists):
        text = text.replace(f'"\\u0000{number}\\u0000"', line)
    return text


def machine() -> dict[str, Any]:
    """What this runs on; no name of it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": next(names, platform.processor()),
        "threads": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9, 1),
        "kernel": platform.release().partition("-")[0],
    }


def versions() -> dict[str, str]:
    """Python's, and of each package that matters and is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
