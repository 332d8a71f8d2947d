"""A stored instance to Hounsfield units and a plane, with the header kept for the results."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np
from pydicom.pixels import get_decoder, pixel_array
from pydicom.uid import UID

from dicom_node import gate
from dicom_node.gate import NotAnalysed, Reason
from dicom_node.part10 import DataSetExcessive, opened
from dicom_node.source import plane
from runtime.types import Slice

SOP_CLASS_UID = 0x0008_0016

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from pydicom.dataset import Dataset, FileDataset

    from runtime.types import Plane


def read(path: Path, max_lossy_ratio: float = 1.0) -> tuple[Dataset, Slice]:
    """Header without PixelData, and the slice with its SOPInstanceUID as key.

    Images that were compressed lossily by more than `max_lossy_ratio` are turned away.

    Raises
    ------
    NotAnalysed : the image is turned away, with the reason

    """
    image = None
    try:
        image = opened(path)
        _check_whole(image)
        gate.check_kind(image, max_lossy_ratio)
        where = _plane(image)
        gate.check_plane(where)
        gate.check_size(image)
        slice_ = Slice(str(image.SOPInstanceUID), where, hounsfield(image))
    except NotAnalysed:
        raise
    except (
        Exception
    ) as error:  # parsers and decoders raise what they like on hostile bytes; none of it may end the worker
        raise _refusal(image, error) from error
    del image.PixelData
    return image, slice_


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


def _check_whole(image: FileDataset) -> None:
    """Turn away a data set without the SOP Class UID that its file meta information has: it ended before, or is none.

    pydicom gives an empty one for a file that breaks off within compressed pixels: without this, no CT image.
    """
    if "SOPClassUID" not in image and "MediaStorageSOPClassUID" in image.file_meta:
        is_cut = max(image.keys(), default=0) < SOP_CLASS_UID
        raise NotAnalysed(Reason.TRUNCATED if is_cut else Reason.UNREADABLE)


def _refusal(image: FileDataset | None, error: Exception) -> NotAnalysed:
    """Why a file can't be decoded: it lacks its end, a decoder is not installed, or it is damaged."""
    if isinstance(error, DataSetExcessive | MemoryError):
        return NotAnalysed(Reason.TOO_LARGE, str(error))
    if isinstance(error, EOFError) or (isinstance(error, zlib.error) and "truncated" in str(error)):
        return NotAnalysed(Reason.TRUNCATED)
    if image is not None and "PixelData" in image:
        syntax = image.file_meta.get("TransferSyntaxUID")
        if isinstance(syntax, UID) and not _is_decoded(syntax):  # there may be several
            return NotAnalysed(Reason.NO_DECODER, syntax.name)
    return NotAnalysed(Reason.UNREADABLE, type(error).__name__)


def _is_decoded(syntax: UID) -> bool:
    try:
        return get_decoder(syntax).is_available
    except NotImplementedError:
        return False


def _plane(image: Dataset) -> Plane:
    try:
        return plane(image)
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise NotAnalysed(Reason.NO_GEOMETRY) from error
