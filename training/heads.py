"""Heads at random, as a recipe asks for them: what bleeds, how the scanner takes it, and the slices they give."""

from __future__ import annotations

import hashlib
import multiprocessing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from runtime import geometry
from training import anatomy, lesions, phantom, trouble
from training.lesions import CLASSES, Lesion, PhantomError, bleed
from training.phantom import Phantom, Scan, make, take
from training.slices import MATRIX, Slices, places
from training.sources.case import Case
from training.trouble import draw_trouble

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from runtime.geometry import View
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
ENDS = (0, 1, -2, -1)  # slices of every series: the cap of the skull and its base are seldom, and look like blood
SHARES = np.array((1.0, 1.0, 1.0, 2.0, 1.0, 1.5)) / 7.5  # how often a class is drawn: the hard ones more often


def draw_lesions(rng: np.random.Generator, bleed_free: float) -> tuple[Lesion, ...]:
    """None to three classes of blood, sizes even on a logarithmic scale: small ones are the hard ones."""
    if rng.random() < bleed_free:
        return ()
    names = rng.choice(CLASSES[1:], size=rng.choice((1, 2, 3), p=(0.3, 0.4, 0.3)), replace=False, p=SHARES)
    return tuple(
        Lesion(str(n), float(np.exp(rng.uniform(np.log(SMALLEST_ML), np.log(LARGEST_ML[str(n)]))))) for n in names
    )


THICKNESSES_MM = (1.0, 1.25, 2.5, 3.0, 4.0, 5.0, 5.0, 7.0)


def draw_scan(rng: np.random.Generator) -> Scan:
    """A protocol as emergency rooms have them: 1 to 7 mm, even or with a change of step, straight or tilted."""
    thickness = tuple(rng.choice(THICKNESSES_MM, size=rng.choice((1, 2), p=(0.8, 0.2))).tolist())
    overlap = rng.random() < 0.2  # or a gap
    return Scan(
        thickness,
        step_mm=thickness[0] * float(rng.uniform(0.5, 1.4)) if overlap and len(thickness) == 1 else None,
        tilt_deg=float(rng.choice((0.0, rng.uniform(-24, 24)))),
        matrix=MATRIX,
        field_of_view_mm=float(rng.uniform(205, 260)),
        noise_hu=float(rng.uniform(2.0, 5.0)),
    )


def _head(
    arguments: tuple[int, Phantoms, int],
) -> tuple[NDArray[np.int16], NDArray[np.uint8], NDArray[np.int64]]:
    """Slices of one head, their labels, and for each slice to learn from the places of it and its neighbours."""
    seed, recipe, shown = arguments
    rng = np.random.default_rng(seed)
    wrong = draw_trouble(rng) if recipe.hard and rng.random() < recipe.hard else None
    while True:
        try:
            head = bleed(draw_lesions(rng, recipe.bleed_free), rng, trouble=wrong)
        except PhantomError:
            continue  # more blood than this head has room for: draw again
        scan = draw_scan(rng)
        count = len(scan.table_mm()[0])
        inner = recipe.slices_per_head - len(ENDS)
        evenly = (np.arange(inner) + rng.random()) * count / inner
        chosen = np.append(evenly.astype(int), np.array(ENDS) % count)
        taking, around = np.unique(places(count, shown)[chosen], return_inverse=True)
        taken = take(head, scan, rng, only=taking, trouble=wrong)
        return np.stack([s.hu for s in taken.slices]), taken.labels, around


def collect(
    recipe: Phantoms, shown: int, folder: Path, *, validation: bool, on_head: Callable[[int, int], None]
) -> Slices:
    """Generate (or reuse) the recipe's phantom slices under `folder`, with as many processes as there are cores.

    Training and validation heads come from different seeds. The files' name carries a hash of all that they depend on.

    Parameters
    ----------
    shown : slices that the network sees at once

    """
    heads = recipe.validation_heads if validation else recipe.heads
    first = recipe.seed * 1_000_000 + (500_000 if validation else 0)
    most = recipe.slices_per_head * shown  # of one head; rows that stay empty take no room on a disk
    modules = (anatomy.__file__, lesions.__file__, trouble.__file__, phantom.__file__, __file__)
    makers = b"".join(Path(file).read_bytes() for file in modules)
    identity = hashlib.sha256(f"{recipe!r} {shown} {validation}".encode() + makers).hexdigest()[:12]
    hu_path, around_path, labels_path = (folder / f"{kind}-{identity}.npy" for kind in ("hu", "around", "labels"))
    if not labels_path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shape = (heads * most, MATRIX, MATRIX)
        hu = np.lib.format.open_memmap(hu_path, "w+", np.int16, shape)
        partial = labels_path.with_suffix(".partial")
        around: list[NDArray[np.int64]] = []
        labels = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
        jobs = [(first + i, recipe, shown) for i in range(heads)]
        with multiprocessing.get_context("spawn").Pool() as pool:
            for i, (head_hu, head_labels, head_around) in enumerate(pool.imap(_head, jobs)):
                rows = slice(i * most, i * most + len(head_hu))
                hu[rows], labels[rows] = head_hu, head_labels
                around.append(head_around + i * most)
                on_head(i + 1, heads)
        hu.flush()
        labels.flush()
        np.save(around_path, np.concatenate(around))
        partial.rename(labels_path)  # last, so that an interrupted run starts again
    arrays = (np.load(path, mmap_mode="r") for path in (hu_path, labels_path, around_path))
    return Slices(*arrays, classes=len(CLASSES))


def check_classes(classes: tuple[str, ...]) -> None:
    """Refuse a model of other classes: a phantom's truth has those of `training.lesions`, in their order.

    Raises
    ------
    PhantomError

    """
    if classes != CLASSES:
        raise PhantomError(f"phantoms show {', '.join(CLASSES[1:])}; the model has {', '.join(classes[1:])}: use data")


FIRST_UNSEEN = 900_000_000  # far from any training seed; what scores are taken on
FIRST_CALIBRATION, FIRST_VERIFICATION = 910_000_000, 920_000_000
UNSEEN_MM = ((5.0,), (4.0,), (2.5,), (1.25,), (4.0, 7.0))
GOLDEN_MATRIX = 320  # a size that the graph resizes both ways and a bundle has room for


def unseen(heads: int, bleed_free: int, *, hard: bool = False, first: int = FIRST_UNSEEN) -> Iterator[Case]:
    """Heads that no recipe trains on, first those with blood; all of them with trouble, or none.

    Every protocol in turn: 1.25 to 7 mm, one with a step change, half of them tilted up to 20 degrees.

    Parameters
    ----------
    first : seed; scores, calibration and verification have heads of their own

    """
    jobs = [(first + i, i < heads, hard, i) for i in range(heads + bleed_free)]
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # the engine takes the other core
        yield from pool.imap(_unseen, jobs)


def _unseen(job: tuple[int, bool, bool, int]) -> Case:
    seed, bleeds, hard, index = job
    rng = np.random.default_rng(seed)
    scan = Scan(UNSEEN_MM[index % len(UNSEEN_MM)], tilt_deg=float(rng.uniform(-20, 20)) if index % 2 else 0.0)
    for attempt in range(1000):
        try:
            blood = draw_lesions(rng, 0.0) if bleeds else ()
            return as_case(make(blood, scan, seed=seed + 1_000_000 * attempt, hard=hard))
        except PhantomError:
            continue  # more blood than that head has room for
    raise PhantomError(f"no phantom for seed {seed}")


def as_case(phantom: Phantom) -> Case:
    """A phantom as any other data set's case: its slices in order along their normal."""
    stack = geometry.stack({one.key: one.plane for one in phantom.slices})
    order = [int(key) for key in stack.keys]
    row_mm, column_mm = phantom.slices[0].plane.spacing_mm
    return Case(
        patient=f"phantom {phantom.seed}",
        name=f"phantom {phantom.seed}",
        images=np.stack([phantom.slices[i].hu for i in order]),
        labels=phantom.labels[order],
        quantity="HU",
        spacing_mm=(float(np.median(stack.thickness_mm)), row_mm, column_mm),
        thickness_mm=stack.thickness_mm.copy(),
        origin_mm=stack.origin_mm,
    )


def golden_slices(view: View) -> NDArray[np.int16]:
    """Views for parity and self-tests: most of each class and none, thick and thin, tilted and straight.

    Returns
    -------
    ``(N, shown, 320, 320)``

    """
    blood = tuple(Lesion(name, 12.0) for name in CLASSES[1:])
    bleeding = make(blood, Scan((5.0,), tilt_deg=12.0, matrix=GOLDEN_MATRIX), seed=FIRST_UNSEEN - 1)
    clean = make((), Scan((1.25,), matrix=GOLDEN_MATRIX), seed=FIRST_UNSEEN - 2)
    shown = [int((bleeding.labels == c).sum(axis=(1, 2)).argmax()) for c in range(1, len(CLASSES))]
    middle = len(clean.slices) // 2
    return np.concatenate([_shown(bleeding, sorted(set(shown)), view), _shown(clean, [middle], view)])


def _shown(phantom: Phantom, chosen: list[int], view: View) -> NDArray[np.int16]:
    hu = np.stack([one.hu for one in phantom.slices])
    return hu[places(len(hu), view.shown)[chosen]]
