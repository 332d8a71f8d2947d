"""One DICOM file: read without surprises, its plane, its pixels."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import pydicom
from pydicom.config import disable_value_validation
from pydicom.dataelem import RawDataElement
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.pixels import pixel_array
from pydicom.uid import CTImageStorage

from runtime.types import Plane
from training.sources.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from pydicom.dataset import Dataset

UNDEFINED = 0xFFFFFFFF  # the length of what ends with a delimiter
# what parser and decoders raise on bytes that are not what their headers say
BROKEN = (
    InvalidDicomError,
    BytesLengthException,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    ArithmeticError,
    RuntimeError,
    OSError,
    EOFError,
    struct.error,
)
AGAIN = "copy it again from where it came"
MISSING = "add the missing slice, or remove the one that lies in its place"


def read(path: Path, keywords: Sequence[str] | None = None) -> Dataset:
    """Read a DICOM Part 10 file, or only some of its attributes.

    Raises
    ------
    SourceError : the file is none, or breaks off

    """
    try:
        if keywords is None:
            dataset = pydicom.dcmread(path)
        else:
            dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(keywords))
    except BROKEN as error:
        raise SourceError(
            path, f"no DICOM file, or truncated ({type(error).__name__})", "copy it again, or take it away"
        ) from error
    for element in map(dataset.get_item, dataset.keys()):
        # pydicom takes what is left of a value that breaks off: of a sequence, fewer contours than were drawn
        if (
            isinstance(element, RawDataElement)
            and element.length != UNDEFINED
            and len(element.value or b"") < element.length
        ):
            raise SourceError(path, f"truncated in {element.tag}", AGAIN)
    return dataset


def text(header: Dataset, keyword: str) -> str:
    """Value of an attribute without the blanks around it; empty where there is none.

    It is not validated: pydicom's warnings quote values, and they may be a patient's.
    """
    with disable_value_validation():
        return str(header.get(keyword) or "").strip()


def required(item: Dataset, keyword: str, path: Path) -> Any:
    """Value of an attribute, not validated either.

    Raises
    ------
    SourceError : it is missing, empty or no value of its kind

    """
    try:
        with disable_value_validation():
            value = item.get(keyword)
    except BROKEN as error:
        raise SourceError(path, f"no valid {keyword}", AGAIN) from error
    if value is None or value == "":
        raise SourceError(path, f"no {keyword}, or truncated before it", AGAIN)
    return value


def read_plane(image: Dataset, path: Path) -> Plane:
    """Where a slice lies, from its Image Plane Module (PS3.3 C.7.6.2), or from a frame's items of the same attributes.

    Raises
    ------
    SourceError : attributes that are missing or no numbers

    """
    try:
        cosines = [float(value) for value in image.ImageOrientationPatient]
        x, y, z = (float(value) for value in image.ImagePositionPatient)
        row_mm, column_mm = (float(value) for value in image.PixelSpacing)
        axes = np.reshape(cosines, (2, 3))
        thickness_mm = image.get("SliceThickness")
        plane = Plane(
            origin_lps=(x, y, z),
            row_lps=(cosines[0], cosines[1], cosines[2]),
            column_lps=(cosines[3], cosines[4], cosines[5]),
            spacing_mm=(row_mm, column_mm),
            thickness_mm=float(thickness_mm) if thickness_mm else None,
        )
    except BROKEN as error:
        raise SourceError(path, "no position, orientation or pixel spacing", "export it with its geometry") from error
    upright = np.allclose(axes @ axes.T, np.eye(2), atol=2e-3)
    if not upright or not np.isfinite([x, y, z, row_mm, column_mm]).all() or min(row_mm, column_mm) <= 0:
        raise SourceError(
            path, "a position, orientation or pixel spacing that no plane has", "export it with its geometry"
        )
    return plane


def corners_lps(plane: Plane, shape: tuple[int, int]) -> NDArray[np.float64]:
    """Centres of the corner pixels, ``(4, 3)`` mm: first, end of the first row, of the first column, last."""
    down, across = np.array([(0, 0), (0, shape[1] - 1), (shape[0] - 1, 0), (shape[0] - 1, shape[1] - 1)]).T
    return (
        np.array(plane.origin_lps)
        + np.outer(across * plane.spacing_mm[1], plane.row_lps)
        + np.outer(down * plane.spacing_mm[0], plane.column_lps)
    )


def read_pixels(image: Dataset, path: Path) -> NDArray[np.int16]:
    """Pixels of a single-frame image, ``(H, W)`` int16: a CT in HU, rounded, an MR as stored.

    HU by RescaleSlope and RescaleIntercept (PS3.3 C.8.2.1), for every transfer syntax that the plug-ins of pydicom
    decode.

    Raises
    ------
    SourceError : pixels that don't decode, are no greyscale or don't fit int16, or a CT without a valid rescale

    """
    try:
        stored = pixel_array(image)
    except BROKEN as error:
        syntax = image.file_meta.get("TransferSyntaxUID", pydicom.uid.UID("")).name
        raise SourceError(
            path,
            f"pixels that don't decode ({syntax or 'no transfer syntax'})",
            f"{AGAIN}; or decompress it with gdcmconv",
        ) from error
    if stored.ndim != 2:
        raise SourceError(path, f"pixels of shape {stored.shape}", "give single-frame greyscale images")
    if image.SOPClassUID != CTImageStorage:
        if stored.min() < -32768 or stored.max() > 32767:
            raise SourceError(path, f"stored values up to {stored.max()}", "rescale it to 16 bits with a sign")
        return stored.astype(np.int16)
    try:
        slope, intercept = float(image.RescaleSlope), float(image.RescaleIntercept)
    except BROKEN as error:
        raise SourceError(path, "a CT without RescaleSlope and RescaleIntercept", "export it with them") from error
    if not (np.isfinite(slope) and np.isfinite(intercept)) or slope == 0:
        raise SourceError(path, f"rescale slope {slope} and intercept {intercept}", "export it with a valid rescale")
    return np.clip(np.rint(stored * slope + intercept), -32768, 32767).astype(np.int16)
