"""Heads at random, as a recipe asks for them: what bleeds, how the scanner takes it, and the slices they give."""

from __future__ import annotations

import hashlib
import multiprocessing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from training import anatomy, lesions, phantom
from training.lesions import CLASSES, Lesion, PhantomError, bleed
from training.phantom import Scan, take
from training.slices import MATRIX, Slices

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from training.recipe import Phantoms

LARGEST_ML = {
    "intracerebral": 80,
    "subdural": 90,
    "epidural": 70,
    "subarachnoid": 28,
    "intraventricular": 30,
    "contusion": 35,
}
SMALLEST_ML = 1.5
SHARES = np.array((1.0, 1.0, 1.0, 2.0, 1.0, 1.5)) / 7.5  # how often a class is drawn: the hard ones more often


def draw_lesions(rng: np.random.Generator, bleed_free: float) -> tuple[Lesion, ...]:
    """None to three classes of blood, sizes even on a logarithmic scale: small ones are the hard ones."""
    if rng.random() < bleed_free:
        return ()
    names = rng.choice(CLASSES[1:], size=rng.choice((1, 2, 3), p=(0.3, 0.4, 0.3)), replace=False, p=SHARES)
    return tuple(
        Lesion(str(n), float(np.exp(rng.uniform(np.log(SMALLEST_ML), np.log(LARGEST_ML[str(n)]))))) for n in names
    )


def draw_scan(rng: np.random.Generator, slices: int) -> Scan:
    """A protocol as emergency rooms have them: 1 to 7 mm, straight or tilted, any table height and zoom."""
    tilt = float(rng.choice((0.0, rng.uniform(-24, 24))))
    thickness = float(rng.choice((1.0, 1.25, 2.5, 3.0, 4.0, 5.0, 5.0, 7.0)))
    reach = (132 + 2 * 84 * abs(np.sin(np.radians(tilt)))) / slices
    return Scan(
        (thickness,),
        step_mm=float(np.clip(reach * rng.uniform(0.92, 1.08), 0.3, 20)),
        slices=slices,
        tilt_deg=tilt,
        matrix=MATRIX,
        field_of_view_mm=float(rng.uniform(205, 260)),
        noise_hu=float(rng.uniform(2.0, 5.0)),
    )


def _head(arguments: tuple[int, float, int]) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    seed, bleed_free, slices = arguments
    rng = np.random.default_rng(seed)
    while True:
        try:
            head = bleed(draw_lesions(rng, bleed_free), rng)
        except PhantomError:
            continue  # more blood than this head has room for: draw again
        taken = take(head, draw_scan(rng, slices), rng)
        return np.stack([s.hu for s in taken.slices]), taken.labels


def collect(recipe: Phantoms, folder: Path, *, validation: bool, on_head: Callable[[int, int], None]) -> Slices:
    """Generate (or reuse) the recipe's phantom slices under `folder`, with as many processes as there are cores.

    Training and validation heads come from different seeds. The files' name carries a hash of all that they depend on.
    """
    heads = recipe.validation_heads if validation else recipe.heads
    first = recipe.seed * 1_000_000 + (500_000 if validation else 0)
    total = heads * recipe.slices_per_head
    makers = b"".join(
        Path(file).read_bytes() for file in (anatomy.__file__, lesions.__file__, phantom.__file__, __file__)
    )
    identity = hashlib.sha256(f"{recipe!r} {validation}".encode() + makers).hexdigest()[:12]
    hu_path, labels_path = (folder / f"{kind}-{identity}.npy" for kind in ("hu", "labels"))
    if not labels_path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shape = (total, MATRIX, MATRIX)
        hu = np.lib.format.open_memmap(hu_path, "w+", np.int16, shape)
        partial = labels_path.with_suffix(".partial")
        labels = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
        jobs = [(first + i, recipe.bleed_free, recipe.slices_per_head) for i in range(heads)]
        with multiprocessing.get_context("spawn").Pool() as pool:
            for i, (head_hu, head_labels) in enumerate(pool.imap(_head, jobs)):
                rows = slice(i * recipe.slices_per_head, (i + 1) * recipe.slices_per_head)
                hu[rows], labels[rows] = head_hu, head_labels
                on_head(i + 1, heads)
        hu.flush()
        labels.flush()
        partial.rename(labels_path)  # last, so that an interrupted run starts again
    return Slices(np.load(hu_path, mmap_mode="r"), np.load(labels_path, mmap_mode="r"), len(CLASSES))
