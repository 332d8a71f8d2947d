"""DICOM Segmentation to label maps: every frame goes to the slice that it names as its source (PS3.3 A.51, C.8.20)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels import pixel_array

from training.sources import labels
from training.sources.dicom_image import AGAIN, BROKEN, MISSING, corners_lps, read, read_plane, required
from training.sources.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from runtime.types import SliceStack

AGREE_MM = 0.1  # how far a frame's corners may lie from its source's: positions are decimal strings


def read_labels(
    path: Path, stack: SliceStack, shape: tuple[int, int], classes: Mapping[str | int, int]
) -> NDArray[np.uint8]:
    """Label maps of a series from its segmentation, ``(N, H, W)`` uint8, in the stack's order.

    BINARY and LABELMAP as they are, FRACTIONAL from half of MaximumFractionalValue on. A frame that says where it lies
    must lie where its source does.

    Parameters
    ----------
    stack : geometry of the series, SOP Instance UIDs as keys
    shape : rows and columns of its images
    classes : class index by SegmentLabel

    Raises
    ------
    SourceError : a broken file, a segment that is not in `classes`, or a frame that is of no slice, of several, or not
        where its slice is

    """
    segmentation = read(path)
    size = segmentation.get("Rows"), segmentation.get("Columns")
    if size != shape:
        raise SourceError(
            path,
            f"frames of {size[0]} x {size[1]} pixels, images of {shape[0]} x {shape[1]}",
            "segment the series itself, not a resampled volume",
        )
    index = {
        number: labels.look_up(classes, str(item.get("SegmentLabel")), path)
        for item in required(segmentation, "SegmentSequence", path)
        if (number := int(required(item, "SegmentNumber", path)))  # a label map may describe its background as 0
    }
    place = {uid: position for position, uid in enumerate(stack.keys)}
    shared = (segmentation.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    groups = required(segmentation, "PerFrameFunctionalGroupsSequence", path)
    frames = _decode(segmentation, len(groups), path)
    result = np.zeros((len(stack), *shape), np.uint8)
    for number, (frame, group) in enumerate(zip(frames, groups, strict=True), start=1):
        uid = _source(group, shared, path, number)
        if uid not in place:
            raise SourceError(path, f"frame {number} is of a slice that the stack has not", MISSING)
        _check_plane(group, shared, stack, place[uid], shape, path, number)
        for segment, mask in _segments(segmentation, frame, group, shared, path):
            if segment not in index:
                raise SourceError(path, f"frame {number} is of segment {segment}, which is not described", AGAIN)
            labels.paint(result[place[uid]], mask, index[segment])
    return result


def _decode(segmentation: Dataset, frames: int, path: Path) -> NDArray[np.generic]:
    try:
        pixels = pixel_array(segmentation)
    except BROKEN as error:
        raise SourceError(path, f"frames that don't decode ({type(error).__name__})", AGAIN) from error
    pixels = pixels[np.newaxis] if pixels.ndim == 2 else pixels
    if len(pixels) != frames:
        raise SourceError(path, f"{len(pixels)} frames and {frames} descriptions of frames", AGAIN)
    return pixels


def _item(group: Dataset, shared: Dataset, keyword: str) -> Dataset | None:
    """A functional group of a frame, its own or shared."""
    sequence = group.get(keyword) or shared.get(keyword)
    return sequence[0] if sequence else None


def _source(group: Dataset, shared: Dataset, path: Path, number: int) -> str:
    derivation = _item(group, shared, "DerivationImageSequence") or Dataset()
    uids = {str(item.get("ReferencedSOPInstanceUID")) for item in derivation.get("SourceImageSequence") or ()}
    if len(uids) != 1:
        raise SourceError(
            path,
            f"frame {number} names {len(uids)} source images, not one",
            "write it from the series itself with a reference to each frame's slice, as highdicom and dcmqi do",
        )
    return uids.pop()


def _segments(
    segmentation: Dataset, frame: NDArray[np.generic], group: Dataset, shared: Dataset, path: Path
) -> list[tuple[int, NDArray[np.bool_]]]:
    """Segment numbers that a frame shows, with the pixels of each."""
    if segmentation.get("SegmentationType") == "LABELMAP":
        return [(int(value), frame == value) for value in np.unique(frame) if value]
    identification = _item(group, shared, "SegmentIdentificationSequence")
    segment = int(required(identification or Dataset(), "ReferencedSegmentNumber", path))
    if segmentation.get("SegmentationType") == "FRACTIONAL":
        return [(segment, 2 * frame.astype(np.int32) >= int(required(segmentation, "MaximumFractionalValue", path)))]
    return [(segment, frame != 0)]


def _check_plane(
    group: Dataset, shared: Dataset, stack: SliceStack, place: int, shape: tuple[int, int], path: Path, number: int
) -> None:
    items = [
        _item(group, shared, keyword)
        for keyword in ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")
    ]
    plane = Dataset()
    for item in items:
        if item is None:
            return  # the standard lets a frame go without a plane; then the reference alone says where it is
        plane.update(item)
    wanted = corners_lps(stack.planes[place], shape)
    apart_mm = np.linalg.norm(corners_lps(read_plane(plane, path), shape) - wanted, axis=1).max()
    if apart_mm > AGREE_MM:
        raise SourceError(
            path,
            f"frame {number} lies {apart_mm:.2f} mm from the slice that it names (allowed: {AGREE_MM} mm)",
            "write it from the series itself: it may be mirrored or resampled",
        )
