"""RT Structure Set to label maps: contours filled slice by slice, each in its slice's own plane (PS3.3 C.8.8.6)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from training.sources import contours, labels
from training.sources.dicom_image import AGAIN, BROKEN, MISSING, read, required
from training.sources.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray
    from pydicom.dataset import Dataset

    from runtime.types import SliceStack

FLAT_MM = 0.1  # how far a contour's points may differ in depth: positions are decimal strings
BEYOND_PX = 1.0  # how far a contour may reach out of its image
_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")


def read_labels(
    path: Path, stack: SliceStack, shape: tuple[int, int], classes: Mapping[str | int, int]
) -> NDArray[np.uint8]:
    """Label maps of a series from its structure set, ``(N, H, W)`` uint8, in the stack's order.

    A contour goes to the slice that its ContourImageSequence names, else to the nearest. It must be parallel to the
    slice, within half of its thickness: contours drawn in another orientation, such as upright ones on a tilted series,
    are refused. The contours of one structure on one slice are filled together by the even-odd rule: a
    contour within another is a hole.

    Parameters
    ----------
    stack : geometry of the series, SOP Instance UIDs as keys
    shape : rows and columns of its images
    classes : class index by ROIName

    Raises
    ------
    SourceError : a broken file, a structure that is not in `classes`, or a contour that is not closed, of no slice,
        out of its image or there twice

    """
    structures = read(path)
    names = {
        int(required(item, "ROINumber", path)): str(item.get("ROIName"))
        for item in required(structures, "StructureSetROISequence", path)
    }
    place = {uid: position for position, uid in enumerate(stack.keys)}
    result = np.zeros((len(stack), *shape), np.uint8)
    for roi in required(structures, "ROIContourSequence", path):
        number = int(required(roi, "ReferencedROINumber", path))
        if number not in names:
            raise SourceError(path, f"contours of structure {number}, which is not described", AGAIN)
        index = labels.look_up(classes, names[number], path)
        if not index:
            continue
        polygons: dict[int, list[NDArray[np.float64]]] = {}
        for contour in roi.get("ContourSequence") or ():
            points = _points(contour, names[number], path)
            where = _find_slice(contour, points, stack, place, names[number], path)
            pixels = _to_pixels(points, stack, where)
            if (pixels < -BEYOND_PX).any() or (pixels > np.array(shape) - 1 + BEYOND_PX).any():
                raise SourceError(path, f"a contour of {names[number]!r} reaches out of its image", "check the series")
            if any(np.array_equal(pixels, other) for other in polygons.setdefault(where, [])):
                raise SourceError(path, f"a contour of {names[number]!r} is there twice", "remove one of the two")
            polygons[where].append(pixels)
        for where, on_slice in polygons.items():
            labels.paint(result[where], contours.fill(on_slice, shape), index)
    return result


def _points(contour: Dataset, name: str, path: Path) -> NDArray[np.float64]:
    """Vertices of a contour, ``(P, 3)`` mm in LPS."""
    kind = contour.get("ContourGeometricType")
    if kind not in _CLOSED:
        raise SourceError(path, f"a contour of {name!r} is {kind}, not closed", "map the structure to 0, or close it")
    try:
        points = np.array([float(value) for value in contour.ContourData]).reshape(-1, 3)
        said = int(contour.get("NumberOfContourPoints") or len(points))
    except BROKEN as error:
        raise SourceError(path, f"a contour of {name!r} without valid points", AGAIN) from error
    if len(points) < 3 or len(points) != said or not np.isfinite(points).all():
        raise SourceError(path, f"a contour of {name!r} with {len(points)} points of {said}", AGAIN)
    return points


def _find_slice(
    contour: Dataset, points: NDArray[np.float64], stack: SliceStack, place: Mapping[str, int], name: str, path: Path
) -> int:
    """The slice's place in the stack."""
    referenced = {str(item.get("ReferencedSOPInstanceUID")) for item in contour.get("ContourImageSequence") or ()}
    if len(referenced) > 1 or not referenced <= place.keys():
        raise SourceError(path, f"a contour of {name!r} names slices that the stack has not", MISSING)
    origins = np.array([plane.origin_lps for plane in stack.planes])  # (N, 3)
    normals = np.array([plane.normal_lps for plane in stack.planes])
    away_mm = np.einsum("npk,nk->np", points - origins[:, np.newaxis], normals)  # (N, P)
    offset_mm, bend_mm = np.abs(away_mm.mean(axis=1)), np.ptp(away_mm, axis=1)
    where = place[referenced.pop()] if referenced else int(np.argmin(offset_mm))
    if offset_mm[where] > stack.thickness_mm[where] / 2 or bend_mm[where] > FLAT_MM:
        raise SourceError(
            path,
            f"a contour of {name!r} lies {offset_mm[where]:.2f} mm from its slice and {bend_mm[where]:.2f} mm bent "
            f"(allowed: half its thickness and {FLAT_MM} mm)",
            "draw it on the series itself, in the slices' own planes",
        )
    return where


def _to_pixels(points: NDArray[np.float64], stack: SliceStack, where: int) -> NDArray[np.float64]:
    """Rows and columns of points in a slice's plane, ``(P, 2)`` (PS3.3 C.7.6.2.1.1, inverted)."""
    plane = stack.planes[where]
    offset = points - np.array(plane.origin_lps)
    down, across = offset @ np.array(plane.column_lps), offset @ np.array(plane.row_lps)
    return np.stack([down / plane.spacing_mm[0], across / plane.spacing_mm[1]], axis=1)
