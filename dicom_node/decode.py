"""A stored instance to Hounsfield units and a plane, with the header kept for the results."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pydicom
from pydicom.pixels import pixel_array

from dicom_node import gate
from dicom_node.gate import NotAnalysed, Reason
from dicom_node.source import plane
from runtime.types import Slice

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from pydicom.dataset import Dataset

    from runtime.types import Plane


def read(path: Path) -> tuple[Dataset, Slice]:
    """Header without PixelData, and the slice with its SOPInstanceUID as key.

    Raises
    ------
    NotAnalysed : the image is turned away, with the reason

    """
    try:
        image = pydicom.dcmread(path)
        gate.check_kind(image)
        where = _plane(image)
        gate.check_plane(where)
        slice_ = Slice(str(image.SOPInstanceUID), where, hounsfield(image))
    except NotAnalysed:
        raise
    except (
        Exception
    ) as error:  # parsers and decoders raise what they like on hostile bytes; none of it may end the worker
        raise NotAnalysed(Reason.UNREADABLE, type(error).__name__) from error
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


def _plane(image: Dataset) -> Plane:
    try:
        return plane(image)
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise NotAnalysed(Reason.NO_GEOMETRY) from error
