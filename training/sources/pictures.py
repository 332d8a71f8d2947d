"""PNG, JPEG and TIFF by Pillow: grey values, and masks as class indices."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from training.sources.errors import SourceError
from training.sources.labels import map_values

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)  # what Pillow raises
_ORIENTATION = 0x0112  # EXIF: a picture stored turned or mirrored
_WIDE = ("I", "I;16", "I;16B", "I;16L")


def read_grey(path: Path) -> NDArray[np.uint8] | NDArray[np.int16]:
    """Grey values of a picture, ``(H, W)``: uint8, or int16 where the picture has 16 bits.

    Colours become luma (ITU-R BT.601, as Pillow does); equal red, green and blue stay exactly what they are.

    Raises
    ------
    SourceError : no picture, truncated, several pages, turned by EXIF, floating point, or values above 32,767

    """
    picture = _open(path)
    if picture.mode in _WIDE:
        return _narrow(np.asarray(picture), path)
    return np.array(picture.convert("L"))


def read_mask(path: Path, classes: Mapping[int, int] | None = None) -> NDArray[np.uint8]:
    """Class index per pixel, ``(H, W)`` uint8.

    Parameters
    ----------
    classes : class index of each value that the mask may have beside 0 (a palette's indices, not its colours); None
        where masks are black and white: class 1 is what is above half of the full scale

    Raises
    ------
    SourceError : as `read_grey`; values that are not in the mapping, or black and white expected and all is dark

    """
    if classes is not None:
        picture = _open(path)
        if picture.format == "JPEG":
            raise SourceError(path, "a JPEG changes class indices", "save the masks as PNG")
        if picture.mode not in ("1", "L", "P", *_WIDE):
            raise SourceError(path, f"a mask of mode {picture.mode} has no class indices", "save one grey channel")
        return map_values(np.asarray(picture).astype(np.int32), classes, path)
    values = read_grey(path)
    full_scale = 255 if values.dtype == np.uint8 else 32767
    labels = (values > (full_scale / 2 if values.max() > 1 else 0)).astype(np.uint8)  # 0 and 1 are meant so
    if values.any() and not labels.any():
        raise SourceError(
            path,
            f"values up to {values.max()} of {full_scale} and none above half of it: these look like class indices",
            "give the class of each value, or save the mask in black and white",
        )
    return labels


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            pages, turned = getattr(picture, "n_frames", 1), picture.getexif().get(_ORIENTATION, 1)
            picture.load()
    except _BROKEN as error:
        raise SourceError(
            path, f"broken picture ({type(error).__name__})", "copy it again from where it came"
        ) from error
    if pages != 1:
        raise SourceError(path, f"{pages} pages", "save one picture a file")
    if turned != 1:
        raise SourceError(path, "turned or mirrored by its EXIF orientation", "save it upright, without the tag")
    if picture.mode == "F":
        raise SourceError(path, "floating-point pixels", "save 8 or 16 bits")
    return picture


def _narrow(values: NDArray[np.generic], path: Path) -> NDArray[np.int16]:
    if values.min() < -32768 or values.max() > 32767:
        raise SourceError(path, f"values up to {values.max()}", "save 8 bits, or 16 bits up to 32,767")
    return values.astype(np.int16)
