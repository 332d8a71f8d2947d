"""COCO segmentation JSON: polygons and run lengths to label maps, as paper 001's data set has them.

Format: https://cocodataset.org/#format-data. Polygons are rasterised by pycocotools, the format's reference.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from pycocotools import mask as coco_mask

from training.sources import labels, naming, pictures
from training.sources.case import Case, Entry
from training.sources.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

BEYOND_PX = 1.0  # how far a vertex may lie outside its picture: annotation tools round
_REMEDY = "export the annotations again as COCO segmentation"


@dataclass(frozen=True, slots=True)
class _Outline:
    """One annotation: its class index and its segmentation as the file has it."""

    annotation: int
    index: int
    segmentation: Any


def entries(
    annotations: Path, *, classes: Mapping[str, int], patient: str, images: Path | None = None
) -> tuple[Entry, ...]:
    r"""List the pictures of a COCO file, one case a picture; a picture without annotations shows no blood.

    Parameters
    ----------
    annotations : the JSON file
    classes : class index of each category that annotations use, by its name; 0 leaves a category out
    patient : regular expression with a group named ``patient``, sought in ``file_name``,
        such as ``r"^(?P<patient>\d+)_"``
    images : folder that ``file_name`` is relative to; None for the JSON file's own

    Raises
    ------
    SourceError : no COCO file, an unknown category, an annotation without its picture or the other way round, a picture
        listed twice, or a pattern that does not name each picture's patient

    """
    labels.check_classes(classes, annotations)
    pattern = naming.compile_pattern(patient, annotations)
    listed, categories, outlined = _read(annotations)
    outlines: dict[Any, list[_Outline]] = {identity: [] for identity in listed}
    for each in outlined:
        number = _field(each, "id", int, annotations, "annotation")
        at = f"annotation {number}"
        image, category = (_field(each, key, int, annotations, at) for key in ("image_id", "category_id"))
        if image not in outlines:
            raise SourceError(annotations, f"{at} is of image {image}, which is not listed", _REMEDY)
        if category not in categories:
            raise SourceError(annotations, f"{at} has category {category}, which is not listed", _REMEDY)
        index = labels.look_up(classes, categories[category], annotations)
        outlines[image].append(_Outline(number, index, _field(each, "segmentation", (list, dict), annotations, at)))
    folder = images or annotations.parent
    found: dict[str, Entry] = {}
    for identity, each in listed.items():
        at = f"image {identity}"
        name = _field(each, "file_name", str, annotations, at)
        size = _field(each, "height", int, annotations, at), _field(each, "width", int, annotations, at)
        if name in found:
            raise SourceError(annotations, f"{name} is listed twice", "keep one of the two")
        if not (folder / name).is_file():
            raise SourceError(folder / name, "listed and not there", "add it, or say where the images are")
        whose = naming.find_patient(pattern, name, folder / name)
        load = partial(_load, whose, name, folder / name, annotations, size, tuple(outlines[identity]))
        found[name] = Entry(whose, name, load)
    return tuple(found.values())


def _read(path: Path) -> tuple[dict[int, dict[str, Any]], dict[int, str], list[dict[str, Any]]]:
    """Images by id, category names by id, and annotations."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise SourceError(path, f"can't be read ({error.strerror})", "check the path") from error
    except ValueError as error:  # broken JSON, or bytes that are no text
        raise SourceError(path, "no JSON, or truncated", _REMEDY) from error
    if not isinstance(content, dict):
        raise SourceError(path, "no COCO file: its JSON is no object", _REMEDY)
    images, categories, annotations = (
        _field(content, key, list, path, "the file") for key in ("images", "categories", "annotations")
    )
    if not images:
        raise SourceError(path, "no image is listed", _REMEDY)
    named = _by_id(categories, "category", path)
    names = {identity: _field(item, "name", str, path, f"category {identity}") for identity, item in named.items()}
    return _by_id(images, "image", path), names, annotations


def _by_id(items: list[Any], kind: str, path: Path) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for item in items:
        identity = _field(item, "id", int, path, kind)
        if identity in found:
            raise SourceError(path, f"{kind} {identity} is listed twice", _REMEDY)
        found[identity] = item
    return found


def _field(item: Any, key: str, kind: type | tuple[type, ...], path: Path, what: str) -> Any:
    value = item.get(key) if isinstance(item, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise SourceError(path, f"{what} has no valid {key!r}", _REMEDY)
    return value


def _load(
    patient: str, name: str, path: Path, annotations: Path, size: tuple[int, int], outlines: tuple[_Outline, ...]
) -> Case:
    grey = pictures.read_grey(path)
    if grey.shape != size:
        raise SourceError(
            path,
            f"{grey.shape[0]} x {grey.shape[1]} pixels, annotated at {size[0]} x {size[1]}",
            "use the pictures that were annotated",
        )
    truth = np.zeros(size, np.uint8)
    for outline in outlines:
        labels.paint(truth, _raster(outline, size, annotations), outline.index)
    return Case(patient, name, grey[np.newaxis], truth[np.newaxis], "grey")


def _raster(outline: _Outline, size: tuple[int, int], path: Path) -> NDArray[np.uint8]:
    """One annotation's pixels, ``(H, W)`` of 0 and 1; several polygons are parts of one object."""
    segmentation, at = outline.segmentation, f"annotation {outline.annotation}"
    if isinstance(segmentation, list):
        _check_polygons(segmentation, size, path, at)
        joined = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
        segmentation = {"size": list(size), "counts": joined["counts"].decode("ascii")}
    if segmentation.get("size") != list(size):
        raise SourceError(path, f"{at} has run lengths of another size than its picture", _REMEDY)
    counts = segmentation.get("counts")
    runs = _uncompress(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(isinstance(run, int) and run >= 0 for run in runs):
        raise SourceError(path, f"{at} has broken run lengths", _REMEDY)
    # decoded here: pycocotools leaves pixels that no run reaches as they were in memory, and warns under NumPy 2
    if sum(runs) != size[0] * size[1]:
        raise SourceError(path, f"{at} has run lengths of {sum(runs)} pixels, not {size[0] * size[1]}", _REMEDY)
    shown = np.repeat((np.arange(len(runs)) % 2).astype(np.uint8), runs)
    return shown.reshape(size[1], size[0]).T  # column by column


def _check_polygons(polygons: list[Any], size: tuple[int, int], path: Path, at: str) -> None:
    """Refuse what pycocotools would take for something else: four numbers are a box to it."""
    if not polygons:
        raise SourceError(path, f"{at} has no outline", "annotate it with a polygon, or remove it")
    for polygon in polygons:
        numbers = isinstance(polygon, list) and all(isinstance(v, (int, float)) for v in polygon)
        if not numbers or len(polygon) < 6 or len(polygon) % 2:
            raise SourceError(path, f"{at} has a polygon that is no list of three or more points", _REMEDY)
        for values, length in ((polygon[0::2], size[1]), (polygon[1::2], size[0])):
            if not all(-BEYOND_PX <= value <= length + BEYOND_PX for value in values):  # nor NaN
                raise SourceError(path, f"{at} reaches out of its picture", "check that the sizes belong together")


def _uncompress(text: str) -> list[int] | None:
    """Run lengths of COCO's compressed form, None where it breaks off.

    Five bits a character from ``0`` on, lowest first, a sixth for "more follows"; from the fourth run on, what is
    stored is the difference to the run before last (``rleToString`` of pycocotools' maskApi.c).
    """
    runs: list[int] = []
    value, shift = 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value, shift = 0, 0
    return None if shift else runs
