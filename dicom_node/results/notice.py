"""A page for the archive that says that a series was not analysed, and why: silence reads like "nothing found"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from dicom_node.results import panel, sc, source
from dicom_node.results.sc import Picture
from dicom_node.results.uids import Issue

if TYPE_CHECKING:
    from datetime import datetime

    from pydicom.dataset import Dataset

    from runtime.types import ModelIdentity

WIDTH, HEIGHT = 768, 432
MARGIN = 36
UNSEARCHED = (
    "This series was not searched for haemorrhage: nothing follows from it, for or against. "
    "Results of a later time replace this page."
)
# of which results may show blood: the page must not read as if there were none
ANALYSED_BEFORE = (
    "Results of an earlier time stand for the slices that they were made of. Slices that have come since were not "
    "searched for haemorrhage: nothing follows from them, for or against."
)


def build(
    header: Dataset, reason: str, model: ModelIdentity, *, revision: int, started: datetime, has_results: bool = False
) -> tuple[Dataset, source.Repairs]:
    """One Secondary Capture in the series of the pictures, in their place, and what its source lacks.

    Parameters
    ----------
    header : of any image of the series
    reason : why it was not analysed
    model : what would have analysed it
    revision : as that of results
    started : when it would have begun; ContentDate and ContentTime
    has_results : an earlier revision was analysed

    """
    shared, repairs = source.common(header)
    shared.SOPClassUID, shared.SOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
    content = f"{reason} {has_results}"
    issue = Issue.of(shared, model, revision=revision, started=started, content=content)
    caption = "" if issue.series_number is None else f"Series {issue.series_number}"
    image = render(reason, model, caption=caption, has_results=has_results)
    page = Picture(image, [shared], "notice", "Notice that the series was not analysed. Research use only")
    return next(sc.build([page], issue)), repairs


def render(reason: str, model: ModelIdentity, *, caption: str = "", has_results: bool = False) -> Image.Image:
    """The page, RGB."""
    small, normal, large = (ImageFont.load_default(points) for points in (15, 20, 34))
    page = Image.new("RGB", (WIDTH, HEIGHT), panel.BACKGROUND)
    draw = ImageDraw.Draw(page)
    draw.rectangle((0, 0, WIDTH, 76), panel.LEVEL_COLOURS["incomplete"])
    draw.text((MARGIN, 38), "NOT ANALYSED", panel.WHITE, large, anchor="lm")
    draw.text((WIDTH - MARGIN, 38), caption, panel.WHITE, normal, anchor="rm")
    across = WIDTH - 2 * MARGIN
    y = panel.write(draw, (MARGIN, 104), reason[:1].upper() + reason[1:], normal, panel.WHITE, lines=5, width=across)
    panel.write(
        draw,
        (MARGIN, y + 16),
        ANALYSED_BEFORE if has_results else UNSEARCHED,
        normal,
        panel.WHITE,
        lines=3,
        width=across,
    )
    draw.text((MARGIN, HEIGHT - 76), f"AI: {model.name} {model.version}", panel.DIM, small)
    draw.text((MARGIN, HEIGHT - 50), "Research use only. Not a medical device", panel.WHITE, small)
    return page
