"""What is written beside every picture of a result: level and reason, what was found, what is missing, what made it.

All text stands here, so that nothing covers anatomy.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from dicom_node.results import codes
from dicom_node.results.picture import BRAIN
from runtime import millilitres

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from runtime.types import Finding, Report

MAX_FINDINGS = 6  # that there is room for
HEIGHT = 768  # pixels: 512 x 1.5, so that text is legible
WIDTH = 384  # in a viewport of 512, with a slice as high beside it, text has 8 pixels
MARGIN = 20
RIGHT = WIDTH - MARGIN
FOOTER = HEIGHT - 188  # where the last block begins
SMALL, NORMAL, LARGE = 18, 22, 34  # font sizes

WHITE, DIM, RULE, BACKGROUND = (240, 243, 246), (160, 168, 178), (58, 64, 72), (16, 19, 23)
LEVEL_COLOURS = {
    "critical": (214, 48, 49),
    "urgent": (230, 138, 0),
    "incomplete": (122, 82, 160),
    "routine": (84, 110, 122),
}


@cache
def font(points: int) -> ImageFont.FreeTypeFont:
    """Pillow's own, which it unpacks anew each time."""
    return ImageFont.load_default(points)


class Panel:
    """The panel of one report, drawn once for all of its pictures.

    Parameters
    ----------
    report : what was found
    own : codes of the configuration

    """

    def __init__(self, report: Report, own: Mapping[str, codes.OwnCode] = codes.NONE) -> None:
        self.report = report
        self.colours = {one.name: codes.look_up(one.name, report.model, own).colour for one in report.findings}
        self._titles = {one.name: codes.look_up(one.name, report.model, own).title for one in report.findings}
        self._rows: list[tuple[float, Finding]] = []  # where each finding stands
        self._image = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
        draw = ImageDraw.Draw(self._image)
        self._draw_notes(draw, self._draw_findings(draw, self._draw_level(draw)))
        self._draw_footer(draw)

    def on(self, canvas: Image.Image, caption: str, *, shown: Collection[str], key: str = "") -> None:
        """Paste it to the right edge of a picture, with what is this picture's own.

        Parameters
        ----------
        caption : names what is shown, such as ``"Series 2, image 17"``
        shown : names of the findings that the picture shows: their boxes are filled
        key : of the slice in the picture: a finding that is largest here says so

        """
        panel = self._image.copy()
        draw, small = ImageDraw.Draw(panel), font(SMALL)
        for y, finding in self._rows:
            colour = self.colours[finding.name]
            box = (MARGIN, y + 4, MARGIN + 18, y + 22)
            draw.rectangle(box, fill=colour if finding.name in shown else None, outline=colour, width=3)
            if not self._is_tight:
                parts = "1 part" if finding.components == 1 else f"{finding.components} parts"
                here = ", most of it here" if finding.key_slice == key else ""
                draw.text((MARGIN + 30, y + 28), f"{parts}{here}", DIM, small)
        draw.text((MARGIN, FOOTER + 10), _clip(caption, small, RIGHT - MARGIN), DIM, small)
        canvas.paste(panel, (canvas.width - WIDTH, 0))

    @property
    def _is_tight(self) -> bool:
        """Second lines give way."""
        return len(self.report.findings) > 4

    def _draw_level(self, draw: ImageDraw.ImageDraw) -> float:
        small, large = font(SMALL), font(LARGE)
        level = self.report.decision.level
        draw.rectangle((0, 0, WIDTH, 60), LEVEL_COLOURS.get(level, LEVEL_COLOURS["routine"]))
        draw.text((MARGIN, 30), level.upper(), WHITE, large, anchor="lm")
        if self.report.provisional:
            draw.text((RIGHT, 30), "PROVISIONAL", WHITE, small, anchor="rm")
        return write(draw, (MARGIN, 70), self.report.decision.reason, small, WHITE, lines=4)

    def _draw_findings(self, draw: ImageDraw.ImageDraw, y: float) -> float:
        report, small, normal = self.report, font(SMALL), font(NORMAL)
        y = _rule(draw, y + 6)
        if not report.findings:
            nothing = "No finding" if report.below_threshold or report.provisional else "No haemorrhage segmented"
            y = write(draw, (MARGIN, y), nothing, normal, WHITE, lines=1)
        for finding in report.findings[:MAX_FINDINGS]:
            self._rows.append((y, finding))
            volume = millilitres.said(finding.volume_ml)
            title = self._titles[finding.name].removesuffix(" haemorrhage")
            room = RIGHT - MARGIN - 30 - round(normal.getlength(volume)) - 8
            draw.text((MARGIN + 30, y), _clip(title, normal, room), WHITE, normal)
            draw.text((RIGHT, y), volume, WHITE, normal, anchor="ra")
            y += 30 if self._is_tight else 56
        if len(report.findings) > MAX_FINDINGS:
            more = f"and {len(report.findings) - MAX_FINDINGS} more, see the report"
            y = write(draw, (MARGIN, y), more, small, DIM, lines=1)
        return y

    def _draw_notes(self, draw: ImageDraw.ImageDraw, y: float) -> None:
        small = font(SMALL)
        notes = [
            *self.report.missing,
            *(f"Below threshold: {name} {millilitres.said(ml)}" for name, ml in self.report.below_threshold),
        ]
        if notes:
            y = _rule(draw, y + 4)
        for index, note in enumerate(notes):
            if y > FOOTER - 4 * SMALL:
                write(draw, (MARGIN, y), f"and {len(notes) - index} more, see the report", small, DIM, lines=1)
                break
            y = write(draw, (MARGIN, y), note, small, WHITE, lines=2) + 2

    def _draw_footer(self, draw: ImageDraw.ImageDraw) -> None:
        small, normal = font(SMALL), font(NORMAL)
        draw.line((MARGIN, FOOTER, RIGHT, FOOTER), RULE)
        model = f"AI: {self.report.model.name} {self.report.model.version}"
        extent = f"{self.report.slices} slices analysed, {self.report.coverage_mm:.0f} mm"
        for row, text in enumerate((extent, f"W {BRAIN.width_hu}  L {BRAIN.level_hu}", model), start=1):
            draw.text((MARGIN, FOOTER + 10 + 25 * row), _clip(text, small, RIGHT - MARGIN), DIM, small)
        draw.text((MARGIN, FOOTER + 118), "Research use only", WHITE, normal)
        draw.text((MARGIN, FOOTER + 147), "Not a medical device", WHITE, normal)


def _rule(draw: ImageDraw.ImageDraw, y: float) -> float:
    draw.line((MARGIN, y, RIGHT, y), RULE)
    return y + 14


def write(
    draw: ImageDraw.ImageDraw,
    corner: tuple[float, float],
    text: str,
    font: ImageFont.FreeTypeFont,
    colour: codes.Colour,
    *,
    lines: int,
    width: int = RIGHT - MARGIN,
) -> float:
    """Write a paragraph, cut after some lines; returns where the next may begin."""
    wrapped: list[str] = []
    for word in text.split():
        if wrapped and font.getlength(f"{wrapped[-1]} {word}") <= width:
            wrapped[-1] += f" {word}"
        else:
            wrapped.append(word)
    if len(wrapped) > lines:
        wrapped[lines - 1] += " ..."
    x, y = corner
    for line in wrapped[:lines]:
        draw.text((x, y), _clip(line, font, width), colour, font)
        y += font.size * 1.3
    return y


def _clip(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Text cut to a width in pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
