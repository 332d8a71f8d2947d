"""The first picture of a series of results: slices through the whole head as tiles, numbered, with what was found.

From it one sees where in the head the blood lies and which slices to look at; the key slices follow in the series.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from dicom_node.results import capture
from dicom_node.results.panel import NORMAL, RULE, WHITE, WIDTH, font
from dicom_node.results.sc import Picture
from dicom_node.results.source import plane, slice_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from pydicom.dataset import Dataset

    from dicom_node.results.capture import Shown
    from dicom_node.results.panel import Panel
    from runtime.types import Plane, Report

    Grey = NDArray[np.uint8]

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


def pictured(
    report: Report, keys: Sequence[str], tile: Callable[[str], Grey], whole: Callable[[str], Grey]
) -> dict[str, Grey]:
    """All slices that pictures are made of, by key, at the brain window: whole where they are more than a tile.

    Parameters
    ----------
    report, keys : as of `tiles`
    tile, whole : give a slice ``(h, w)`` by its key, reduced to a tile and as it is

    """
    large = capture.key_slices(report, keys)
    return {key: whole(key) if key in large else tile(key) for key in dict.fromkeys((*tiles(report, keys), *large))}


def draw(keys: Sequence[str], shown: Mapping[str, Shown], panel: Panel) -> Iterator[Picture]:
    """The overview; none where no slice is to be shown. Parameters are those of `dicom_node.results.capture.draw`."""
    chosen = [shown[key] for key in tiles(panel.report, keys) if key in shown]
    if chosen:
        yield Picture(render(chosen, panel), [one.source for one in chosen], "overview", DESCRIPTION)


def render(slices: Sequence[Shown], panel: Panel) -> Image.Image:
    """Tiles beside the panel that the key slices have, too.

    Parameters
    ----------
    slices : one for each tile
    panel : of the series' report

    Returns
    -------
    RGB, as large as a key slice

    """
    across = math.ceil(math.sqrt(len(slices)))
    side = capture.SIDE // across
    canvas = Image.new("RGB", (capture.SIDE + WIDTH, capture.SIDE))
    draw = ImageDraw.Draw(canvas)
    large = font(max(NORMAL, side // 9))
    colours = {finding.key_slice: panel.colours[finding.name] for finding in panel.report.findings[::-1]}
    shown: set[str] = set()
    for number, one in enumerate(slices):
        corner = side * (number % across), side * (number // across)
        shown |= capture.draw_slice(canvas, corner, side, one.grey, one.labels, panel, plane=plane(one.source))
        edge = (*corner, corner[0] + side - 1, corner[1] + side - 1)
        draw.rectangle(edge, outline=RULE)
        if colour := colours.get(slice_key(one.source)):
            draw.rectangle(edge, outline=colour, width=4)
        place = (corner[0] + 8, corner[1] + 6)
        draw.text(place, _number(one.source), colour or WHITE, large, stroke_width=2, stroke_fill=(0, 0, 0))
        _mark_sides(draw, corner, side, plane(one.source))
    caption = _caption(slices[0].source, len(slices), "key ones framed" if colours else "none marked")
    panel.on(canvas, caption, shown=shown)
    return canvas


def _mark_sides(draw: ImageDraw.ImageDraw, corner: tuple[int, int], side: int, where: Plane) -> None:
    """Name the patient's side at the outer edges of the outer tiles: each row of them has both."""
    left, right = capture.sides(where)
    middle, style = corner[1] + side / 2, {"stroke_width": 2, "stroke_fill": (0, 0, 0)}
    if corner[0] == 0:
        draw.text((8, middle), left, WHITE, font(NORMAL), anchor="lm", **style)
    if corner[0] + 2 * side > capture.SIDE:
        draw.text((corner[0] + side - 8, middle), right, WHITE, font(NORMAL), anchor="rm", **style)


def _number(source: Dataset) -> str:
    """What a viewer calls the slice: its frame or image number."""
    number = source.get("ReferencedFrameNumber") or source.get("InstanceNumber")
    return "" if number is None else str(number)


def _caption(source: Dataset, count: int, marks: str) -> str:
    series = source.get("SeriesNumber")
    return f"{'' if series is None else f'series {series}, '}{count} slices, {marks}".capitalize()
