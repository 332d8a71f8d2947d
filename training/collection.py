"""From a data set as people have it to training slices: listed, divided by patient, read once into arrays."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from training.recipe import RecipeError
from training.slices import MATRIX, Slices, places
from training.sources.split import by_fractions, check_no_leak, into_folds, survey, take

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from training.recipe import Data, Recipe, Split
    from training.sources.case import Case, Entry

GREY_PERCENTILES = (1, 99)  # of an MR volume: what counts as black and as white


def entries(data: Data, classes: tuple[str, ...], root: Path) -> tuple[Entry, ...]:
    """List the cases of a recipe's source under the folder or file that the command line named."""
    index = {own: classes.index(name) for own, name in data.classes.items()}
    numbers = {int(own): label for own, label in index.items() if own.lstrip("-").isdigit()}
    # each of them needs a library of its own
    match data.kind:
        case "coco":
            from training.sources import coco  # noqa: PLC0415

            return coco.entries(root, classes=index, patient=data.patient)
        case "pairs":
            from training.sources import pairs  # noqa: PLC0415

            return pairs.entries(
                root / data.images,
                root / data.masks,
                patient=data.patient,
                classes=None if numbers == {1: 1} else numbers,  # black and white
                mask_suffix=data.mask_suffix,
            )
        case "dicom":
            from training.sources import dicom  # noqa: PLC0415

            return dicom.entries(root, classes=index | numbers, unmasked=data.unmasked)
        case "nifti":
            from training.sources import nifti  # noqa: PLC0415

            return nifti.entries(
                root / data.images,
                root / data.masks,
                quantity="grey" if data.shows_hu else "HU",
                classes=numbers,
                patient=data.patient,
                mask_suffix=data.mask_suffix,
            )
        case "ct_ich":
            from training.sources import ct_ich  # noqa: PLC0415

            return ct_ich.entries(root, classes=index)


def divide(listed: tuple[Entry, ...], split: Split) -> dict[str, tuple[Entry, ...]]:
    """Entries by side: training, validation and, where the split has three parts, test. No patient is on two."""
    shown = survey(listed)
    if split.folds is not None:
        turn = into_folds(shown, split.folds, seed=split.seed)[split.fold]
        parts = (turn.train, turn.test)
    else:
        parts = by_fractions(shown, split.fractions or (), seed=split.seed)
    sides = {name: take(listed, part) for name, part in zip(("training", "validation", "test"), parts, strict=False)}
    check_no_leak(*sides.values())
    return sides


def side(recipe: Recipe, root: Path, name: str, classes: tuple[str, ...]) -> tuple[Entry, ...]:
    """Cases of one side of a recipe's split, or ``"all"`` of them, for a bundle of the given classes.

    Raises
    ------
    RecipeError : a side that the split does not have, other classes than the bundle's, or phantoms

    """
    if recipe.classes != classes:
        raise RecipeError(f"{recipe.name} has the classes {', '.join(recipe.classes)}; the bundle {', '.join(classes)}")
    if recipe.data.kind == "phantoms" or recipe.split is None:
        raise RecipeError(f"{recipe.name} learns from phantoms: it reads no data set")
    listed = entries(recipe.data, recipe.classes, root)
    sides = {**divide(listed, recipe.split), "all": listed}
    if name not in sides:
        raise RecipeError(f"{recipe.name} has no {name} side: choose from {', '.join(sides)}")
    return sides[name]


def collect(
    listed: tuple[Entry, ...], recipe: Recipe, folder: Path, side: str, on_case: Callable[[int, int], None]
) -> Slices:
    """Read cases into arrays under `folder`, or open those that an earlier run of the same recipe and cases made."""
    what = json.dumps([recipe.data.model_dump(mode="json"), recipe.classes, [entry.name for entry in listed]])
    identity = hashlib.sha256(what.encode()).hexdigest()[:12]
    hu_path, labels_path, cases_path = (folder / f"{side}-{kind}-{identity}.npy" for kind in ("hu", "labels", "cases"))
    if not labels_path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shows_hu = getattr(recipe.data, "shows_hu", None)
        raw = [path.with_suffix(".partial") for path in (hu_path, labels_path)]
        counts = []
        with raw[0].open("wb") as hu_file, raw[1].open("wb") as labels_file:
            for number, entry in enumerate(listed, start=1):
                case = entry.load()
                hu_file.write(_resized(to_hu(case, shows_hu), Image.Resampling.BILINEAR).tobytes())
                labels_file.write(_resized(case.labels, Image.Resampling.NEAREST).tobytes())
                counts.append(len(case.images))
                on_case(number, len(listed))
        np.save(cases_path, counts)
        for path, partial, dtype in zip((hu_path, labels_path), raw, (np.int16, np.uint8), strict=True):
            values = np.memmap(partial, dtype, "r", shape=(sum(counts), MATRIX, MATRIX))
            np.save(path.with_suffix(".saving.npy"), values)
            path.with_suffix(".saving.npy").rename(path)  # labels last: an interrupted run starts again
            partial.unlink()
    hu, labels = np.load(hu_path, mmap_mode="r"), np.load(labels_path, mmap_mode="r")
    counts = np.load(cases_path)
    first = np.cumsum(counts) - counts
    stacks = [at + places(count, recipe.input.view.shown) for at, count in zip(first, counts, strict=True)]
    return Slices(hu, labels, np.concatenate(stacks), len(recipe.classes))


def to_hu(case: Case, shows_hu: tuple[float, float] | None) -> NDArray[np.int16]:
    """A case's images in Hounsfield units ``(N, H, W)``.

    Parameters
    ----------
    shows_hu : for grey values, what black and white stand for: 0 and 255 of a picture, of an MR volume its first and
        99th percentile

    """
    if case.quantity == "HU" or shows_hu is None:
        return case.images.astype(np.int16)
    black, white = (0, 255) if case.images.dtype == np.uint8 else np.percentile(case.images, GREY_PERCENTILES)
    share = (case.images.astype(np.float32) - black) / max(float(white - black), 1.0)
    lower, upper = shows_hu
    return np.rint(lower + share.clip(0, 1) * (upper - lower)).astype(np.int16)


def _resized(stack: NDArray[np.int16] | NDArray[np.uint8], how: Image.Resampling) -> NDArray[np.int16 | np.uint8]:
    """Slices at `MATRIX` by `MATRIX`, as the graph resizes a slice: both sides to the grid, whatever their ratio."""
    if stack.shape[1:] == (MATRIX, MATRIX):
        return stack
    kind = np.float32 if stack.dtype == np.int16 else np.uint8
    resized = [np.asarray(Image.fromarray(one.astype(kind)).resize((MATRIX, MATRIX), how)) for one in stack]
    return np.rint(np.stack(resized)).astype(stack.dtype)
