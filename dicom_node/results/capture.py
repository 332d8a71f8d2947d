"""Pictures of the key slices: what a reader sees whose viewer shows neither SEG nor SR.

The anatomy stays visible: a brain window, thin contours around each class, and all text on a panel beside the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from dicom_node.results.panel import HEIGHT, LARGE, WHITE, WIDTH, font
from dicom_node.results.picture import contour
from dicom_node.results.sc import A_REVISION, Picture
from dicom_node.results.source import direction, frame_number, plane

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from pydicom.dataset import Dataset

    from dicom_node.results.panel import Panel
    from runtime.types import Finding, Plane, Report

MAX_IMAGES = A_REVISION - 1  # beside the overview
ENOUGH = 3  # for the extent of one finding: more would weigh as much in the archive as the scan itself
SMALLER = 1.3  # a slice that is larger than so many times its tile, or twice that, is halved first: quicker
SIDE = HEIGHT  # pixels of the square that holds the slice, left of the panel
PICTURE_B = SIDE * (SIDE + WIDTH) * 3

DESCRIPTION = "Brain window with contours of the segmented haemorrhage. Research use only"

_OPPOSITE = dict(zip("LRPAHF", "RLAPFH", strict=True))


@dataclass(frozen=True, slots=True)
class Shown:
    """A slice to picture.

    Attributes
    ----------
    source : its normalised header
    grey : ``(h, w)``, itself at the brain window, as large as it is or smaller
    labels : ``(H, W)``, class index per pixel; None where it shows no finding

    """

    source: Dataset
    grey: NDArray[np.uint8]
    labels: NDArray[np.uint8] | None

    def __post_init__(self) -> None:
        if self.grey.dtype != "uint8" or self.grey.ndim != 2:
            raise ValueError(f"a picture of {self.grey.ndim} dimensions in {self.grey.dtype}: two in uint8 are shown")


def key_slices(report: Report, keys: Sequence[str]) -> tuple[str, ...]:
    """Slices worth a picture, the most telling first, `MAX_IMAGES` at most.

    The key slice of each finding, largest volume first; then, while these are fewer than `ENOUGH`, slices a quarter and
    three quarters through each finding, so that its extent shows. Without a finding, four slices spread evenly over the
    middle of the stack.

    Parameters
    ----------
    report : what was found
    keys : the slices' keys, in stack order

    """
    if not report.findings:
        return tuple(dict.fromkeys(keys[int(len(keys) * part)] for part in (0.25, 0.42, 0.58, 0.75)))
    wanted = [telling(finding) for finding in report.findings]
    in_turn = (one[place] for place in range(3) for one in wanted if place < len(one))
    room = min(max(len({one[0] for one in wanted}), ENOUGH), MAX_IMAGES)
    return tuple(dict.fromkeys(in_turn))[:room]


def telling(finding: Finding) -> tuple[str, ...]:
    """Slices that show a finding best: where most of it is, and a quarter and three quarters through it."""
    keys = finding.keys
    return tuple(dict.fromkeys([finding.key_slice, *(keys[int(len(keys) * part)] for part in (0.25, 0.75))]))


def draw(keys: Sequence[str], shown: Mapping[str, Shown], panel: Panel) -> Iterator[Picture]:
    """A picture of each key slice that is to be shown.

    Parameters
    ----------
    keys : of the whole series, in stack order
    shown : slices to picture, by key
    panel : of the report

    """
    for key in key_slices(panel.report, keys):
        if one := shown.get(key):
            source = one.source
            image = render(one.grey, one.labels, panel, key, plane=plane(source), caption=named(source))
            yield Picture(image, [source], f"sc:{key}", DESCRIPTION)


def render(
    grey: NDArray[np.uint8],
    labels: NDArray[np.uint8] | None,
    panel: Panel,
    key: str,
    *,
    plane: Plane | None = None,
    caption: str = "",
) -> Image.Image:
    """Picture of one slice: brain window, contours in the colours of the classes, and a panel that says what they are.

    Parameters
    ----------
    grey, labels : of a `Shown`; classes without a finding are not drawn
    panel : of the series' report
    key : the slice's key: a finding that is largest here says so
    plane : gives the shape of the pixels and the side markers; without it pixels are square and no side is named
    caption : names the slice, such as ``"series 2, image 17"``

    Returns
    -------
    RGB, `SIDE` + `WIDTH` across and `SIDE` down

    """
    canvas = Image.new("RGB", (SIDE + WIDTH, SIDE))
    shown = draw_slice(canvas, (0, 0), SIDE, grey, labels, panel, plane=plane)
    if plane:
        _draw_sides(ImageDraw.Draw(canvas), plane)
    panel.on(canvas, caption, shown=shown, key=key)
    return canvas


def draw_slice(
    canvas: Image.Image,
    corner: tuple[int, int],
    side: int,
    grey: NDArray[np.uint8],
    labels: NDArray[np.uint8] | None,
    panel: Panel,
    *,
    plane: Plane | None = None,
) -> set[str]:
    """Draw a slice with contours into the square of `side` pixels at a corner; names of the findings that it shows.

    Further parameters are those of `render`.
    """
    rows_mm, columns_mm = plane.spacing_mm if plane else (1.0, 1.0)
    height, width = grey.shape[0] * rows_mm, grey.shape[1] * columns_mm
    size = round(side * width / max(height, width)), round(side * height / max(height, width))
    left, top = corner[0] + (side - size[0]) // 2, corner[1] + (side - size[1]) // 2
    base = Image.fromarray(grey).resize(size, Image.Resampling.BICUBIC, reducing_gap=SMALLER)
    canvas.paste(base, (left, top))
    shown = set()
    for finding in reversed(panel.report.findings if labels is not None else ()):  # the largest last, on top
        mask = labels == finding.label
        if mask.any():
            line, (x, y) = contour(mask, size)
            canvas.paste(panel.colours[finding.name], (left + x, top + y), mask=line)
            shown.add(finding.name)
    return shown


def sides(plane: Plane) -> tuple[str, str]:
    """The patient's side at the left and at the right edge of an image, such as ``("R", "L")``."""
    across = direction(plane.row_lps)
    return _OPPOSITE[across], across


def _draw_sides(draw: ImageDraw.ImageDraw, plane: Plane) -> None:
    """Name the patient's side at the left and right edge, as ImageOrientationPatient gives it."""
    left, right = sides(plane)
    for x, side, anchor in ((10, left, "lm"), (SIDE - 10, right, "rm")):
        draw.text((x, SIDE / 2), side, WHITE, font(LARGE), anchor=anchor, stroke_width=2, stroke_fill=(0, 0, 0))


def named(source: Dataset) -> str:
    """The slice as a viewer numbers it."""
    named = (
        ("series", source.get("SeriesNumber")),
        ("image", source.get("InstanceNumber")),
        ("frame", frame_number(source)),
    )
    return ", ".join(f"{word} {number}" for word, number in named if number is not None).capitalize()
