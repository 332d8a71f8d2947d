"""The first picture of a series of results: slices through the whole head as tiles, numbered, with what was found.

From it one sees where in the head the blood lies and which slices to look at; the key slices follow in the series.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dicom_node import capture, codes
from dicom_node.source import plane, slice_key

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from highdicom.sc import SCImage
    from numpy.typing import NDArray
    from pydicom.dataset import Dataset

    from dicom_node.uids import Issue
    from runtime.types import Plane, Report

MAX_TILES = 16  # in four rows: 85 pixels each in a viewport of 512
DESCRIPTION = "Overview of the slices with contours of the segmented haemorrhage. Research use only"


def tiles(report: Report, keys: Sequence[str]) -> tuple[str, ...]:
    """Slices for the overview, in stack order: evenly through the head, and the key slice of each finding among them.

    Parameters
    ----------
    report : what was found
    keys : the slices' keys, in stack order

    """
    wanted = {keys.index(finding.key_slice) for finding in report.findings[:MAX_TILES]}
    others = [index for index in range(len(keys)) if index not in wanted]
    room = min(MAX_TILES, len(keys)) - len(wanted)
    wanted.update(others[int((place + 0.5) * len(others) / room)] for place in range(room))
    return tuple(keys[index] for index in sorted(wanted))


def pictured(report: Report, keys: Sequence[str]) -> tuple[str, ...]:
    """All slices whose Hounsfield units pictures are made of."""
    return tuple(dict.fromkeys((*capture.key_slices(report, keys), *tiles(report, keys))))


def build(
    sources: Sequence[Dataset],
    labels: NDArray[np.uint8],
    hu: Mapping[str, NDArray[np.int16]],
    report: Report,
    issue: Issue,
) -> list[SCImage]:
    """The overview as Secondary Capture, first of its series; none where no slice's HU are given.

    Parameters
    ----------
    sources : normalised headers in stack order
    labels : ``(N, H, W)``, class index per pixel
    hu : ``(H, W)`` Hounsfield units by `dicom_node.source.slice_key`
    report : what was found
    issue : names the object

    """
    slices = {slice_key(source): (source, mask) for source, mask in zip(sources, labels, strict=True)}
    chosen = [key for key in tiles(report, list(slices)) if key in hu]
    if not chosen:
        return []
    picture = render([(slices[key][0], hu[key], slices[key][1]) for key in chosen], report, own=issue.codes)
    shown = [slices[key][0] for key in chosen]
    return [capture.wrap(picture, shown, issue, "overview", place=1, description=DESCRIPTION)]


def render(
    slices: Sequence[tuple[Dataset, NDArray[np.int16], NDArray[np.uint8]]],
    report: Report,
    *,
    own: Mapping[str, codes.OwnCode] = codes.NONE,
) -> NDArray[np.uint8]:
    """Tiles beside the panel that the key slices have, too.

    Parameters
    ----------
    slices : header, ``(H, W)`` Hounsfield units and ``(H, W)`` labels of each tile
    report : what was found in the series
    own : codes of the configuration

    Returns
    -------
    ``(SIDE, SIDE + PANEL, 3)`` RGB, as large as a key slice

    """
    across = math.ceil(math.sqrt(len(slices)))
    side = capture.SIDE // across
    canvas = Image.new("RGB", (capture.SIDE + capture.PANEL, capture.SIDE))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(max(capture.NORMAL, side // 9))
    colours = {
        finding.key_slice: codes.look_up(finding.name, report.model, own).colour for finding in report.findings[::-1]
    }
    shown: set[str] = set()
    for number, (source, hu, labels) in enumerate(slices):
        corner = side * (number % across), side * (number // across)
        canvas.paste(capture.draw_slice(hu, labels, report, side, plane=plane(source), own=own), corner)
        edge = (*corner, corner[0] + side - 1, corner[1] + side - 1)
        draw.rectangle(edge, outline=capture.RULE)
        if colour := colours.get(slice_key(source)):
            draw.rectangle(edge, outline=colour, width=4)
        place = (corner[0] + 8, corner[1] + 6)
        draw.text(place, _number(source), colour or capture.WHITE, font, stroke_width=2, stroke_fill=(0, 0, 0))
        shown.update(finding.name for finding in report.findings if (labels == finding.label).any())
        _mark_sides(draw, corner, side, plane(source))
    caption = _caption(slices[0][0], len(slices), "key ones framed" if colours else "none marked")
    capture.draw_panel(draw, report, caption, shown=shown, own=own)
    return np.asarray(canvas)


def _mark_sides(draw: ImageDraw.ImageDraw, corner: tuple[int, int], side: int, where: Plane) -> None:
    """Name the patient's side at the outer edges of the outer tiles: each row of them has both."""
    left, right = capture.sides(where)
    font, middle = ImageFont.load_default(capture.NORMAL), corner[1] + side / 2
    if corner[0] == 0:
        draw.text((8, middle), left, capture.WHITE, font, anchor="lm", stroke_width=2, stroke_fill=(0, 0, 0))
    if corner[0] + 2 * side > capture.SIDE:
        draw.text(
            (corner[0] + side - 8, middle),
            right,
            capture.WHITE,
            font,
            anchor="rm",
            stroke_width=2,
            stroke_fill=(0, 0, 0),
        )


def _number(source: Dataset) -> str:
    """What a viewer calls the slice: its frame or image number."""
    number = source.get("ReferencedFrameNumber") or source.get("InstanceNumber")
    return "" if number is None else str(number)


def _caption(source: Dataset, count: int, marks: str) -> str:
    series = source.get("SeriesNumber")
    return f"{'' if series is None else f'series {series}, '}{count} slices, {marks}".capitalize()
