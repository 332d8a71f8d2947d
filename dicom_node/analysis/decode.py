"""A stored instance to Hounsfield units and a plane, with the header kept for the results."""

from __future__ import annotations

import zlib
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
from pydicom import dcmread
from pydicom.pixels import get_decoder, pixel_array
from pydicom.uid import UID

from dicom_node.images import frames, gate
from dicom_node.images.gate import NotAnalysed, Reason
from dicom_node.images.part10 import DataSetExcessive
from dicom_node.results import source
from runtime.types import Slice

SOP_CLASS_UID = 0x0008_0016

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from pydicom.dataset import Dataset

    from runtime.types import Plane


def read(
    path: Path, max_lossy_ratio: float = 1.0, only: int | None = None
) -> Iterator[tuple[Dataset, Slice] | NotAnalysed]:
    """Each image of a file, that is the one, or the frames of a multi-frame one: header and slice, or why it is none.

    Headers are those of single-frame images without PixelData (see `dicom_node.images.frames`); a slice's key is
    `dicom_node.results.source.slice_key` of its header.

    Parameters
    ----------
    path : any file
    max_lossy_ratio : images that were compressed lossily by more are turned away
    only : decode this frame alone

    """
    try:
        for image in frames.read(path, only):
            yield _slice(image, max_lossy_ratio)
    except NotAnalysed as refusal:
        yield refusal
    except Exception as error:  # noqa: BLE001  # parsers raise what they like on hostile bytes; none may end the worker
        yield _refusal(None, error)


def _slice(image: Dataset, max_lossy_ratio: float) -> tuple[Dataset, Slice] | NotAnalysed:
    try:
        where = check(image, max_lossy_ratio)
        slice_ = Slice(source.slice_key(image), where, hounsfield(image))
    except Exception as error:  # noqa: BLE001  # as above, and decoders
        refusal = error if isinstance(error, NotAnalysed) else _refusal(image, error)
        frame = source.frame_number(image)
        return refusal if frame is None else refusal.of(frame)
    del image.PixelData
    return image, slice_


def legible(paths: Sequence[Path]) -> Dataset:
    """Header of the first of some files that can be read and says which image it is.

    Raises
    ------
    Exception : whatever pydicom raises on the last one, where there is none

    """
    *paths, last = paths
    for path in paths:
        with suppress(Exception):
            header = dcmread(path, stop_before_pixels=True)
            if header.SOPInstanceUID and header.StudyInstanceUID and header.SeriesInstanceUID:
                return header
    return dcmread(last, stop_before_pixels=True)


def check(image: Dataset, max_lossy_ratio: float) -> Plane:
    """All that can be said against an image before it is decoded; where it lies, if there is nothing.

    Raises
    ------
    NotAnalysed
    Exception : whatever pydicom raises

    """
    _check_whole(image)
    gate.check_kind(image, max_lossy_ratio)
    where = _plane(image)
    gate.check_plane(where)
    gate.check_size(image)
    return where


def hounsfield(image: Dataset) -> NDArray[np.int16]:
    """Pixels of a single-frame CT in HU, ``(H, W)`` int16: RescaleSlope and RescaleIntercept (PS3.3 C.8.2.1), rounded.

    Raises
    ------
    NotAnalysed : the pixels are no greyscale image, or the rescale is no number
    Exception : whatever the decoder of the transfer syntax raises

    """
    stored = pixel_array(image)
    slope, intercept = float(image.RescaleSlope), float(image.RescaleIntercept)
    if stored.ndim != 2:
        raise NotAnalysed(Reason.NOT_CT, f"pixels of shape {stored.shape}")
    if not (np.isfinite(slope) and np.isfinite(intercept)) or slope == 0:
        raise NotAnalysed(Reason.NO_RESCALE, f"slope {slope}, intercept {intercept}")
    if slope == 1 and intercept == int(intercept):
        hu = stored.astype(np.int32) + int(intercept)
    else:
        hu = np.rint(stored * slope + intercept)
    return np.clip(hu, -32768, 32767).astype(np.int16)


def _check_whole(image: Dataset) -> None:
    """Turn away a data set without the SOP Class UID that its file meta information has: it ended before, or is none.

    pydicom gives an empty one for a file that breaks off within compressed pixels: without this, no CT image.
    """
    if "SOPClassUID" not in image and "MediaStorageSOPClassUID" in image.file_meta:
        is_cut = max(image.keys(), default=0) < SOP_CLASS_UID
        raise NotAnalysed(Reason.TRUNCATED if is_cut else Reason.UNREADABLE)


def _refusal(image: Dataset | None, error: Exception) -> NotAnalysed:
    """Why a file can't be decoded: it lacks its end, a decoder is not installed, or it is damaged."""
    if isinstance(error, DataSetExcessive | MemoryError):
        return NotAnalysed(Reason.TOO_LARGE, str(error))
    if isinstance(error, EOFError) or (isinstance(error, zlib.error) and "truncated" in str(error)):
        return NotAnalysed(Reason.TRUNCATED)
    if image is not None and "PixelData" in image:
        syntax = image.file_meta.get("TransferSyntaxUID")
        if isinstance(syntax, UID) and not _is_decoded(syntax):  # there may be several
            return NotAnalysed(Reason.NO_DECODER, syntax.name if syntax.is_valid else "")
    return NotAnalysed(Reason.UNREADABLE, type(error).__name__)


def _is_decoded(syntax: UID) -> bool:
    try:
        return get_decoder(syntax).is_available
    except NotImplementedError:
        return False


def _plane(image: Dataset) -> Plane:
    try:
        return source.plane(image)
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise NotAnalysed(Reason.NO_GEOMETRY) from error
