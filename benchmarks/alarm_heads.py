"""Heads for `benchmarks.alarms`, without blood and with it, and what the bundle that ships says of each slice of them.

What it says is kept, a file a head, so that an interrupted study goes on where it was and sweeps need no network.
"""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from runtime.bundle import open_bundle
from runtime.session import open_session
from runtime.types import Plane
from training.heads import draw_lesions
from training.lesions import CLASSES, PhantomError
from training.phantom import Phantom, Scan, make

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

PROTOCOLS_MM = ((5.0,), (4.0,), (4.0, 7.0), (3.0,))  # 18 to 55 slices, every other one tilted
FIRST = {"chosen on": 930_000_000, "told of": 940_000_000}  # seeds, far from those of training, card and verification
ARRAYS = ("voxels", "evidence", "truth_voxels", "truth_ml")
HEADS = {"chosen on": (40, 20), "told of": (100, 20)}  # of each kind: without blood, with it


@dataclass(frozen=True, slots=True)
class Job:
    """One head to be made.

    Attributes
    ----------
    seed, index : which; protocols take turns by the index
    bleeds, is_hard : with how much blood it has room for, or none; with trouble of some kind (`training.trouble`)

    """

    seed: int
    index: int
    bleeds: bool
    is_hard: bool

    def make(self) -> Phantom:
        """Make it, every other one tilted by up to 20 degrees: the same job gives the same head."""
        rng = np.random.default_rng(self.seed)
        tilt_deg = float(rng.uniform(-20, 20)) if self.index % 2 else 0.0
        scan = Scan(PROTOCOLS_MM[self.index // 2 % len(PROTOCOLS_MM)], tilt_deg=tilt_deg)
        while True:
            try:
                blood = draw_lesions(rng, 0.0) if self.bleeds else ()
                return make(blood, scan, seed=self.seed, hard=self.is_hard)
            except PhantomError:  # more blood than that head has room for
                continue


@dataclass(frozen=True, eq=False)
class Head:
    """What the network says of one head, slice by slice in the order of the table, beside its truth.

    Attributes
    ----------
    job : which
    planes : of its slices
    voxels, evidence : ``(N, C)``
    truth_voxels : ``(N, C)``
    truth_ml : ``(C,)``

    """

    job: Job
    planes: tuple[Plane, ...]
    voxels: NDArray[np.int64]
    evidence: NDArray[np.float32]
    truth_voxels: NDArray[np.int64]
    truth_ml: NDArray[np.float64]


def jobs(name: str, bleed_free: int, bleeding: int) -> list[Job]:
    """Heads of a set: of each kind so many without blood and with it."""
    return [
        Job(FIRST[name] + 100_000 * (2 * hard + bleeds) + index, index, bool(bleeds), bool(hard))
        for hard in range(2)
        for bleeds, count in enumerate((bleed_free, bleeding))
        for index in range(count)
    ]


def segmented(todo: Sequence[Job], threads: int) -> Iterator[Head]:
    """What the bundle that ships says of heads, a slice at a time as the node asks it."""
    session = open_session(open_bundle(), "onnxruntime", threads=threads)
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # the engine takes the other core
        for job, phantom in zip(todo, pool.imap(Job.make, todo), strict=True):
            answers = [session.infer(one.hu[None, None])[0] for one in phantom.slices]
            yield Head(
                job,
                tuple(one.plane for one in phantom.slices),
                np.stack([one.voxels for one in answers]),
                np.stack([one.evidence for one in answers]),
                np.stack([np.bincount(labels.ravel(), minlength=len(CLASSES)) for labels in phantom.labels]),
                np.array([phantom.truth_ml.get(name, 0.0) for name in CLASSES]),
            )


def cached(folder: Path, name: str, bleed_free: int, bleeding: int, threads: int) -> list[Head]:
    """The heads of a set; what the network has not said yet, it is asked."""
    folder.mkdir(parents=True, exist_ok=True)
    computing = open_bundle().sha256("fp32")[:12]
    todo = jobs(name, bleed_free, bleeding)
    path = {job: folder / f"{computing}-{job.seed}.npz" for job in todo}
    missing = [job for job in todo if not path[job].exists()]
    for head in segmented(missing, threads) if missing else ():
        partial = path[head.job].with_suffix(".partial.npz")
        arrays = {key: getattr(head, key) for key in ARRAYS}
        np.savez_compressed(partial, planes=json.dumps([asdict(plane) for plane in head.planes]), **arrays)
        partial.rename(path[head.job])
    return [_read(path[job], job) for job in todo]


def _read(path: Path, job: Job) -> Head:
    with np.load(path) as kept:
        planes = [
            Plane(**{name: tuple(value) if isinstance(value, list) else value for name, value in plane.items()})
            for plane in json.loads(str(kept["planes"]))
        ]
        return Head(job, tuple(planes), *(kept[key] for key in ARRAYS))
