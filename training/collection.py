"""From a data set as people have it to training slices: listed, divided by patient, read once into arrays."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from training.recipe import RecipeError
from training.slices import MATRIX, Slices
from training.sources.errors import LeakError
from training.sources.split import by_fractions, check_no_leak, into_folds, survey, take

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from runtime.bundle import Bundle
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
                assume=data.assume,
                pair_by=data.pair_by,
            )
        case "ct_ich":
            from training.sources import ct_ich  # noqa: PLC0415

            return ct_ich.entries(root, classes=index, assume=data.assume, pair_by=data.pair_by)


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


def fingerprint(sides: Mapping[str, tuple[Entry, ...]]) -> str:
    """A hash of which patients were learnt from and which chose the weights; it says nothing about one of them."""
    patients = [sorted({entry.patient for entry in sides[name]}) for name in ("training", "validation")]
    return hashlib.sha256(json.dumps(patients).encode()).hexdigest()


def side(recipe: Recipe, root: Path, name: str, bundle: Bundle) -> tuple[Entry, ...]:
    """Cases of one side of a recipe's split, or ``"all"`` of them, for a bundle that was trained by it.

    Raises
    ------
    RecipeError : a side that the split does not have, other classes than the bundle's, or phantoms
    LeakError : validation or test, and the bundle was trained on another division of these patients

    """
    if recipe.classes != bundle.classes:
        theirs = ", ".join(bundle.classes)
        raise RecipeError(f"{recipe.name} has the classes {', '.join(recipe.classes)}; the bundle {theirs}")
    if recipe.data.kind == "phantoms" or recipe.split is None:
        raise RecipeError(f"{recipe.name} learns from phantoms: it reads no data set")
    listed = entries(recipe.data, recipe.classes, root)
    if name == "all":
        return listed
    sides = divide(listed, recipe.split)
    if name not in sides:
        raise RecipeError(f"{recipe.name} has no {name} side: choose from {', '.join([*sides, 'all'])}")
    if name != "training" and fingerprint(sides) != bundle.learnt_from:
        raise LeakError(
            f"{bundle.folder} was not trained on this division of these patients, so its {name} side may hold some "
            "that it learnt from: use its training's recipe and data, or --side all of a data set that it never saw"
        )
    return sides[name]


def state(root: Path, besides: Path) -> str:
    """A hash of where a data set lies and of the size and time of each of its files, so that a change is noticed.

    Parameters
    ----------
    besides : a folder whose files are not of the data set: the run's own

    """
    folder = (root if root.is_dir() else root.parent).resolve()
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_relative_to(besides.resolve()))
    stats = [(str(path), stat.st_size, stat.st_mtime_ns) for path in files for stat in (path.stat(),)]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def collect(
    listed: tuple[Entry, ...], recipe: Recipe, files: str, folder: Path, side: str, on_case: Callable[[int, int], None]
) -> Slices:
    """Read cases into arrays under `folder`, or open those that an earlier run made of the same recipe and files.

    Slices of one size keep it, and meet the network as they will in service. Of several sizes, all are brought to
    `MATRIX` by `MATRIX` first.

    Parameters
    ----------
    files : what `state` says of the data set

    """
    what = [recipe.data.model_dump(mode="json"), recipe.classes, [entry.name for entry in listed], files]
    identity = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]
    hu_path, labels_path, cases_path = (folder / f"{side}-{kind}-{identity}.npy" for kind in ("hu", "labels", "cases"))
    told_path = folder / f"{side}-left-out-{identity}.json"
    if not labels_path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        raw = (hu_path.with_suffix(".partial"), labels_path.with_suffix(".partial"))
        shape, counts, left_out = _write_raw(listed, recipe.data, raw, on_case)
        np.save(cases_path, counts)
        told_path.write_text(json.dumps(left_out, indent=2) + "\n")
        for path, partial, dtype in zip((hu_path, labels_path), raw, (np.int16, np.uint8), strict=True):
            values = np.memmap(partial, dtype, "r", shape=(sum(counts), *shape))
            np.save(path.with_suffix(".saving.npy"), values)
            path.with_suffix(".saving.npy").rename(path)  # labels last: an interrupted run starts again
            partial.unlink()
    hu, labels = np.load(hu_path, mmap_mode="r"), np.load(labels_path, mmap_mode="r")
    counts = np.load(cases_path).tolist()
    views = [
        first + shown
        for first, count in zip(np.cumsum([0, *counts[:-1]]), counts, strict=True)
        for shown, _ in recipe.input.view.over(count)
    ]
    slices = Slices(hu, labels, np.stack(views), len(recipe.classes), json.loads(told_path.read_text()))
    if not getattr(recipe.data, "only_with_blood", False):
        return slices
    bleeds = np.array([labels[at].any() for at in slices.own])
    left_out = {**slices.left_out, "shows no blood": int((~bleeds).sum())}
    return replace(slices, around=slices.around[bleeds], left_out=left_out)


def _write_raw(
    listed: tuple[Entry, ...], data: Data, paths: tuple[Path, Path], on_case: Callable[[int, int], None]
) -> tuple[tuple[int, int], list[int], dict[str, int]]:
    """Values of all cases one after the other, HU and labels; their size, slices by case, and what cases leave out."""
    sizes = {entry.load().images.shape[1:] for entry in listed}
    shape = sizes.pop() if len(sizes) == 1 else (MATRIX, MATRIX)
    counts, left_out = [], dict[str, int]()
    with paths[0].open("wb") as hu_file, paths[1].open("wb") as labels_file:
        for number, entry in enumerate(listed, start=1):
            case = entry.load()
            hu_file.write(_resized(to_hu(case, data), shape, Image.Resampling.BILINEAR).tobytes())
            labels_file.write(_resized(case.labels, shape, Image.Resampling.NEAREST).tobytes())
            counts.append(len(case.images))
            for reason, slices in case.excluded:
                left_out[reason] = left_out.get(reason, 0) + slices
            on_case(number, len(listed))
    return shape, counts, left_out


def to_hu(case: Case, data: Data | None) -> NDArray[np.int16]:
    """A case's images in Hounsfield units ``(N, H, W)``.

    Grey values become what the recipe's ``shows_hu`` says that black and white stand for. Of a picture these are 0 and
    255, or the recipe's ``grey`` where it has more than 8 bits; of a volume its first and 99th percentile.

    Raises
    ------
    RecipeError : grey values of which the recipe does not say what they stand for

    """
    if case.quantity == "HU":
        return case.images.astype(np.int16)
    shows_hu, grey = getattr(data, "shows_hu", None), getattr(data, "grey", None)
    if shows_hu is None:
        raise RecipeError(f"{case.name} has grey values, not Hounsfield units: say data.shows_hu, what they stand for")
    if data is None or data.kind not in ("coco", "pairs"):
        grey = np.percentile(case.images, GREY_PERCENTILES)
    elif grey is None and case.images.dtype == np.uint8:
        grey = (0, 255)
    if grey is None:
        raise RecipeError(f"{case.name} has 16 bits: say data.grey, its values of black and white")
    share = (case.images.astype(np.float32) - grey[0]) / max(float(grey[1] - grey[0]), 1.0)
    lower, upper = shows_hu
    return np.rint(lower + share.clip(0, 1) * (upper - lower)).astype(np.int16)


def _resized(
    stack: NDArray[np.int16] | NDArray[np.uint8], shape: tuple[int, int], how: Image.Resampling
) -> NDArray[np.int16 | np.uint8]:
    """Slices at one size, both sides to it, whatever their ratio."""
    if stack.shape[1:] == shape:
        return stack
    kind = np.float32 if stack.dtype == np.int16 else np.uint8
    resized = [np.asarray(Image.fromarray(one.astype(kind)).resize(shape[::-1], how)) for one in stack]
    return np.rint(np.stack(resized)).astype(stack.dtype)
