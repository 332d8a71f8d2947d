"""What the dampers against false alarms bring and cost, and how long before a series' end its alert goes out.

::

    python -m benchmarks.alarms --out benchmarks/results/alarms --cache runs/alarms

Phantoms without blood and with it, ordinary ones and ones that are hard to read (`training.trouble`: calcification,
old cavities, metal, motion, pale blood), segmented slice by slice by the bundle that ships. What the network says of
each slice is kept in the cache, so the sweep over operating points is done without it. The operating point is chosen on
one set of heads and told of another. How long an alert takes is read from the log of a running node.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from runtime.bundle import open_bundle
from runtime.session import open_session
from runtime.types import Plane
from training.heads import draw_lesions
from training.lesions import CLASSES, PhantomError
from training.phantom import Phantom, Scan, make

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

PROTOCOLS_MM = ((5.0,), (4.0,), (4.0, 7.0), (3.0,))  # 18 to 55 slices, every other one tilted
FIRST = {"chosen on": 930_000_000, "told of": 940_000_000}  # seeds, far from those of training, card and verification
HEADS = {"chosen on": (40, 20), "told of": (100, 30)}  # of each kind: without blood, with it
KINDS = ("ordinary", "hard")


@dataclass(frozen=True, eq=False)
class Head:
    """What the network says of one head, slice by slice in the order of the table, beside its truth.

    Attributes
    ----------
    seed, is_hard : which
    planes : of its slices
    voxels, evidence : ``(N, C)``
    truth_voxels : ``(N, C)``
    truth_ml : ``(C,)``

    """

    seed: int
    is_hard: bool
    planes: tuple[Plane, ...]
    voxels: NDArray[np.int64]
    evidence: NDArray[np.float32]
    truth_voxels: NDArray[np.int64]
    truth_ml: NDArray[np.float64]

    @property
    def bleeds(self) -> bool:
        return bool(self.truth_ml.any())


def drawn(job: tuple[int, int, bool, bool]) -> Phantom:
    """Make the head of a seed: with as much blood as it has room for, or none."""
    seed, index, bleeds, hard = job
    rng = np.random.default_rng(seed)
    tilt_deg = float(rng.uniform(-20, 20)) if index % 2 else 0.0
    scan = Scan(PROTOCOLS_MM[index // 2 % len(PROTOCOLS_MM)], tilt_deg=tilt_deg)
    while True:
        try:
            return make(draw_lesions(rng, 0.0) if bleeds else (), scan, seed=seed, hard=hard)
        except PhantomError:
            continue


def jobs(name: str, bleed_free: int, bleeding: int) -> list[tuple[int, int, bool, bool]]:
    """Heads of a set: of each kind so many without blood and with it."""
    return [
        (FIRST[name] + 100_000 * (2 * hard + bleeds) + index, index, bool(bleeds), bool(hard))
        for hard in range(2)
        for bleeds, count in enumerate((bleed_free, bleeding))
        for index in range(count)
    ]


def segmented(todo: list[tuple[int, int, bool, bool]], threads: int) -> Iterator[Head]:
    """What the bundle that ships says of heads, a slice at a time as the node asks it."""
    session = open_session(open_bundle(), "onnxruntime", threads=threads)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for job, phantom in zip(todo, pool.imap(drawn, todo), strict=True):
            answers = [session.infer(one.hu[None, None])[0] for one in phantom.slices]
            yield Head(
                job[0],
                job[3],
                tuple(one.plane for one in phantom.slices),
                np.stack([one.voxels for one in answers]),
                np.stack([one.evidence for one in answers]),
                np.stack([np.bincount(labels.ravel(), minlength=len(CLASSES)) for labels in phantom.labels]),
                np.array([phantom.truth_ml.get(name, 0.0) for name in CLASSES]),
            )


def cached(folder: Path, name: str, bleed_free: int, bleeding: int, threads: int) -> list[Head]:
    """The heads of a set; what the network has not said yet, it is asked."""
    folder.mkdir(parents=True, exist_ok=True)
    digest = open_bundle().sha256("fp32")[:12]
    todo = jobs(name, bleed_free, bleeding)
    path = {job: folder / f"{digest}-{job[0]}.npz" for job in todo}
    missing = [job for job in todo if not path[job].exists()]
    for job, head in zip(missing, segmented(missing, threads), strict=True):
        partial = path[job].with_suffix(".partial.npz")
        arrays = {key: getattr(head, key) for key in ("voxels", "evidence", "truth_voxels", "truth_ml")}
        np.savez_compressed(partial, planes=json.dumps([asdict(plane) for plane in head.planes]), **arrays)
        partial.rename(path[job])
    return [read(path[job], job) for job in todo]


def read(path: Path, job: tuple[int, int, bool, bool]) -> Head:
    with np.load(path) as kept:
        planes = [
            Plane(**{name: tuple(v) if isinstance(v, list) else v for name, v in plane.items()})
            for plane in json.loads(str(kept["planes"]))
        ]
        arrays = (kept[key] for key in ("voxels", "evidence", "truth_voxels", "truth_ml"))
        return Head(job[0], job[3], tuple(planes), *arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("runs/alarms"))
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    for name in FIRST:
        cached(given.cache, name, *HEADS[name], given.threads)


if __name__ == "__main__":
    main()
