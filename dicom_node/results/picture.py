"""Hounsfield units and masks as pictures: windows, contours, files that a browser shows. For results, page and report.

The slice and what was found in it are two pictures that lie on each other, so that the second can be taken away.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageChops, ImageFilter

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from dicom_node.results.codes import Colour
    from runtime.types import Plane

FINEST = (
    1024  # pixels: contours are drawn at twice the slice's size up to this, so that they stay thin when it is shown
)
TILE = 256  # pixels, at least, of the longer edge of a slice that was reduced to one: as many as each of nine tiles has
TINT = 46  # of 255: what lies within a contour keeps its grey


@dataclass(frozen=True, slots=True)
class Window:
    """What part of the Hounsfield scale is shown.

    Attributes
    ----------
    title : what people call it
    level_hu, width_hu : its middle and its extent
    key : of the keyboard

    """

    title: str
    level_hu: int
    width_hu: int
    key: str


# The three that entries of the RSNA 2019 haemorrhage challenge looked through. Blood beside bone needs a wider one than
# the brain: W 130-300, L 50-100 (radiopaedia.org, "Windowing (CT)").
WINDOWS = MappingProxyType(
    {
        "brain": Window("Brain", 40, 80, "1"),
        "subdural": Window("Subdural", 80, 200, "2"),
        "bone": Window("Bone", 600, 2800, "3"),
    }
)


BRAIN = WINDOWS["brain"]  # what results show


def grey(hu: NDArray[np.int16], window: Window) -> NDArray[np.uint8]:
    """Hounsfield units ``(H, W)`` as grey values (DICOM PS3.3 C.11.2.1.3.2, LINEAR_EXACT)."""
    lowest = window.level_hu - window.width_hu // 2
    within = np.clip(hu, lowest, lowest + window.width_hu) - lowest  # in integers: a third of the time
    return (within.astype(np.uint32 if window.width_hu > 257 else np.uint16) * 255 // window.width_hu).astype(np.uint8)


def reduced(shown: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture ``(h, w)`` reduced by a whole number, for a tile of five or more."""
    times = max(shown.shape) // TILE
    return np.asarray(Image.fromarray(shown).reduce(times)) if times > 1 else shown


def contour(mask: NDArray[np.bool_], size: tuple[int, int]) -> tuple[Image.Image, tuple[int, int]]:
    """Line of about two pixels just outside a mask, so that what is inside stays visible, however small.

    Drawn at twice the size around the mask only, then halved: the edges are smooth and the cost is the lesion's.

    Parameters
    ----------
    mask : ``(H, W)``, somewhere true
    size : width and height at which the slice is shown

    Returns
    -------
    the line, to paste through, and where its upper left corner lies in the picture

    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    across, down = mask.shape[1] / size[0], mask.shape[0] / size[1]  # pixels of the mask to one of the picture
    left, right = int(columns[0] / across) - 8, int((columns[-1] + 1) / across) + 9
    top, bottom = int(rows[0] / down) - 8, int((rows[-1] + 1) / down) + 9
    part = max(left, 0), max(top, 0), min(right, size[0]), min(bottom, size[1])
    around = Image.new("L", (2 * (right - left), 2 * (bottom - top)))
    around.paste(
        Image.fromarray(mask.astype(np.uint8) * 255).resize(
            (2 * (part[2] - part[0]), 2 * (part[3] - part[1])),
            Image.Resampling.BOX,
            box=(part[0] * across, part[1] * down, part[2] * across, part[3] * down),
        ),
        (2 * (part[0] - left), 2 * (part[1] - top)),
    )
    inside = _wider(around.point([0] + [255] * 255))  # a lone pixel survives what follows
    inside = _grown(inside, blur=2, threshold=64)
    outside = _grown(inside, blur=3, threshold=14)
    line = ImageChops.subtract(outside, inside).resize((right - left, bottom - top), Image.Resampling.BOX)
    return line.crop((part[0] - left, part[1] - top, part[2] - left, part[3] - top)), part[:2]


def _wider(mask: Image.Image) -> Image.Image:
    """A mask and a pixel around it; its edge must be empty. As MaxFilter(3) in a tenth of the time."""
    for across, down in ((1, 0), (0, 1)):
        one, other = (ImageChops.offset(mask, sign * across, sign * down) for sign in (1, -1))
        mask = ImageChops.lighter(mask, ImageChops.lighter(one, other))
    return mask


def _grown(mask: Image.Image, *, blur: float, threshold: int) -> Image.Image:
    """A mask of 0 and 255 with round corners, wider the lower the threshold."""
    return mask.filter(ImageFilter.GaussianBlur(blur)).point([0] * threshold + [255] * (256 - threshold))


def overlay(labels: NDArray[np.uint8], colours: Mapping[int, Colour]) -> Image.Image:
    """Contours around each class with a light tint within, on nothing.

    Parameters
    ----------
    labels : ``(H, W)``
    colours : of each label that is drawn, the last on top

    Returns
    -------
    an RGBA image of the same shape, up to twice as large

    """
    height, width = labels.shape
    times = max(1.0, min(2.0, FINEST / max(height, width)))
    size = round(width * times), round(height * times)
    canvas = Image.new("RGBA", size)
    for label, colour in colours.items():
        mask = labels == label
        if mask.any():
            inside = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
            canvas.paste((*colour, TINT), mask=inside)
            line, corner = contour(mask, size)
            canvas.paste((*colour, 255), corner, mask=line)
    return canvas


def drawn(hu: NDArray[np.int16], labels: NDArray[np.uint8] | None, colours: Mapping[int, Colour]) -> Image.Image:
    """A slice at the brain window with its overlay on it, RGB, at the overlay's size."""
    base = Image.fromarray(grey(hu, BRAIN))
    if labels is None:
        return base.convert("RGB")
    above = overlay(labels, colours)
    below = base.resize(above.size, Image.Resampling.BICUBIC).convert("RGBA")
    return Image.alpha_composite(below, above).convert("RGB")


def shown_size(plane: Plane, shape: tuple[int, ...]) -> tuple[int, int]:
    """Width and height at which a slice of ``(H, W)`` pixels has its true proportions, the larger as it is."""
    rows_mm, columns_mm = plane.spacing_mm
    height_mm, width_mm = shape[0] * rows_mm, shape[1] * columns_mm
    longest = max(shape)
    return round(longest * width_mm / max(height_mm, width_mm)), round(longest * height_mm / max(height_mm, width_mm))


def png(image: Image.Image | NDArray[np.uint8]) -> bytes:
    """A picture without loss; quick to make rather than small."""
    return _encoded(image, format="PNG", compress_level=1)


def small_png(image: Image.Image) -> bytes:
    """A picture of few colours, as small as it gets: for what is kept."""
    return _encoded(image.quantize(64, method=Image.Quantize.FASTOCTREE), format="PNG", optimize=True)


def jpeg(image: Image.Image | NDArray[np.uint8]) -> bytes:
    """A picture with loss that is not seen, a quarter of the size: for a report that has them all."""
    return _encoded(image, format="JPEG", quality=88)


def _encoded(image: Image.Image | NDArray[np.uint8], **options: object) -> bytes:
    stream = BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(stream, **options)
    return stream.getvalue()
