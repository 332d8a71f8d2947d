"""Pictures of the key slices as Secondary Capture: what a reader sees whose viewer shows neither SEG nor SR.

The anatomy stays visible: a brain window, thin contours around each class, and all text on a panel beside the image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from highdicom.sc import SCImage
from highdicom.sr import CodedConcept
from PIL import Image, ImageDraw, ImageFont
from pydicom.uid import ExplicitVRLittleEndian
from pydicom.valuerep import DA, TM

from dicom_node import codes
from dicom_node.picture import WINDOWS, contour, grey
from dicom_node.source import frame_number, instances, plane, reference, slice_key
from runtime import millilitres

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from numpy.typing import NDArray
    from pydicom.dataset import Dataset

    from dicom_node.uids import Issue
    from runtime.types import Finding, Plane, Report, Vector

MAX_IMAGES = 8
A_REVISION = MAX_IMAGES + 1  # instance numbers: an overview, then the key slices
MAX_FINDINGS = 6  # that the panel has room for
BRAIN = WINDOWS["brain"]
SIDE = 768  # pixels of the square that holds the slice: 512 x 1.5, so that text is legible beside it
PANEL = 384  # pixels of the panel to the right of it; both in a viewport of 512: text has 8 pixels there
MARGIN = 20
FOOTER = SIDE - 188  # where the panel's last block begins
SMALL, NORMAL, LARGE = 18, 22, 34  # font sizes

DESCRIPTION = "Brain window with contours of the segmented haemorrhage. Research use only"

WHITE, DIM, RULE, BACKGROUND = (240, 243, 246), (160, 168, 178), (58, 64, 72), (16, 19, 23)
_OPPOSITE = dict(zip("LRPAHF", "RLAPFH", strict=True))
LEVEL_COLOURS = {
    "critical": (214, 48, 49),
    "urgent": (230, 138, 0),
    "incomplete": (122, 82, 160),
    "routine": (84, 110, 122),
}


def key_slices(report: Report, keys: Sequence[str]) -> tuple[str, ...]:
    """Slices worth a picture, the most telling first, `MAX_IMAGES` at most.

    The key slice of each finding, largest volume first; then, while there is room, slices a quarter and three quarters
    through each finding, so that its extent shows. Without a finding, four slices spread evenly over the middle of the
    stack.

    Parameters
    ----------
    report : what was found
    keys : the slices' keys, in stack order

    """
    if not report.findings:
        return tuple(dict.fromkeys(keys[int(len(keys) * part)] for part in (0.25, 0.42, 0.58, 0.75)))
    wanted = [telling(finding) for finding in report.findings]
    in_turn = (one[place] for place in range(3) for one in wanted if place < len(one))
    return tuple(dict.fromkeys(in_turn))[:MAX_IMAGES]


def telling(finding: Finding) -> tuple[str, ...]:
    """Slices that show a finding best: where most of it is, and a quarter and three quarters through it."""
    keys = finding.keys
    return tuple(dict.fromkeys([finding.key_slice, *(keys[int(len(keys) * part)] for part in (0.25, 0.75))]))


def build(
    sources: Sequence[Dataset],
    labels: NDArray[np.uint8],
    hu: Mapping[str, NDArray[np.int16]],
    report: Report,
    issue: Issue,
) -> list[SCImage]:
    """One Secondary Capture for each key slice whose HU are given, behind the overview in the same series.

    Parameters
    ----------
    sources : normalised headers in stack order
    labels : ``(N, H, W)``, class index per pixel
    hu : ``(H, W)`` Hounsfield units by `dicom_node.source.slice_key`
    report : what was found
    issue : names the objects

    """
    slices = {slice_key(source): (source, mask) for source, mask in zip(sources, labels, strict=True)}
    images = []
    for key in key_slices(report, list(slices)):
        if key not in hu:
            continue
        source, mask = slices[key]
        caption = named(source)
        picture = render(hu[key], mask, report, key, plane=plane(source), caption=caption, own=issue.codes)
        images.append(wrap(picture, [source], issue, f"sc:{key}", place=len(images) + 2, description=DESCRIPTION))
    return images


def wrap(
    picture: NDArray[np.uint8], shown: Sequence[Dataset], issue: Issue, role: str, *, place: int, description: str
) -> SCImage:
    """A picture of slices as Secondary Capture, `place` in this revision's part of the series, from 1."""
    where = plane(shown[0])
    image = SCImage.from_ref_dataset(
        ref_dataset=shown[0],
        pixel_array=picture,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        transfer_syntax_uid=ExplicitVRLittleEndian,
        patient_orientation=(_direction(where.row_lps), _direction(where.column_lps)),
        **issue.attributes("OT", role, number=(issue.revision - 1) * A_REVISION + place),
    )
    complete(image, shown, issue, description=description)
    return image


def complete(image: SCImage, shown: Sequence[Dataset], issue: Issue, *, description: str) -> None:
    """Add what highdicom leaves out, and replace its clock by the issue's."""
    image.copy_patient_and_study_information(shown[0])
    image.BodyPartExamined = "HEAD"  # without it Laterality is required (PS3.3 C.7.3.1)
    image.ConversionType = "WSD"
    image.BurnedInAnnotation = "NO"  # nothing that identifies the patient (PS3.3 C.7.6.1)
    image.DerivationDescription = description
    started = issue.started.astimezone()
    image.DateOfSecondaryCapture, image.TimeOfSecondaryCapture = DA(started.date()), TM(started.time())
    references = [reference(*sources) for sources in instances(shown).values()]
    for item in references:
        item.PurposeOfReferenceCodeSequence = [CodedConcept.from_code(codes.SOURCE_IMAGE)]
    image.SourceImageSequence = references


def render(
    hu: NDArray[np.int16],
    labels: NDArray[np.uint8],
    report: Report,
    key: str,
    *,
    plane: Plane | None = None,
    caption: str = "",
    own: Mapping[str, codes.OwnCode] = codes.NONE,
) -> NDArray[np.uint8]:
    """Picture of one slice: brain window, contours in the colours of the classes, and a panel that says what they are.

    Parameters
    ----------
    hu : ``(H, W)`` Hounsfield units
    labels : ``(H, W)``, class index per pixel; classes without a finding are not drawn
    report : what was found in the series
    key : the slice's key: a finding that is largest here says so
    plane : gives the shape of the pixels and the side markers; without it pixels are square and no side is named
    caption : names the slice, such as ``"series 2, image 17"``
    own : codes of the configuration

    Returns
    -------
    ``(SIDE, SIDE + PANEL, 3)`` RGB

    """
    canvas = Image.new("RGB", (SIDE + PANEL, SIDE))
    canvas.paste(draw_slice(hu, labels, report, SIDE, plane=plane, own=own))
    draw = ImageDraw.Draw(canvas)
    if plane:
        _draw_sides(draw, plane)
    shown = {finding.name for finding in report.findings if (labels == finding.label).any()}
    draw_panel(draw, report, caption, shown=shown, key=key, own=own)
    return np.asarray(canvas)


def draw_slice(
    hu: NDArray[np.int16],
    labels: NDArray[np.uint8],
    report: Report,
    side: int,
    *,
    plane: Plane | None = None,
    own: Mapping[str, codes.OwnCode] = codes.NONE,
) -> Image.Image:
    """A slice with contours in a square of `side` pixels; parameters are those of `render`."""
    rows_mm, columns_mm = plane.spacing_mm if plane else (1.0, 1.0)
    height, width = hu.shape[0] * rows_mm, hu.shape[1] * columns_mm
    size = round(side * width / max(height, width)), round(side * height / max(height, width))
    picture = Image.fromarray(grey(hu, BRAIN)).resize(size, Image.Resampling.BICUBIC).convert("RGB")
    for finding in reversed(report.findings):  # the largest last, on top
        mask = labels == finding.label
        if mask.any():
            picture.paste(codes.look_up(finding.name, report.model, own).colour, mask=contour(mask, size))
    square = Image.new("RGB", (side, side))
    square.paste(picture, ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def sides(plane: Plane) -> tuple[str, str]:
    """The patient's side at the left and at the right edge of an image, such as ``("R", "L")``."""
    across = _direction(plane.row_lps)
    return _OPPOSITE[across], across


def _draw_sides(draw: ImageDraw.ImageDraw, plane: Plane) -> None:
    """Name the patient's side at the left and right edge, as ImageOrientationPatient gives it."""
    font = ImageFont.load_default(LARGE)
    left, right = sides(plane)
    for x, side, anchor in ((10, left, "lm"), (SIDE - 10, right, "rm")):
        draw.text((x, SIDE / 2), side, WHITE, font, anchor=anchor, stroke_width=2, stroke_fill=(0, 0, 0))


def draw_panel(
    draw: ImageDraw.ImageDraw,
    report: Report,
    caption: str,
    *,
    shown: Collection[str],
    key: str = "",
    own: Mapping[str, codes.OwnCode] = codes.NONE,
) -> None:
    """Level and reason, what was found in which colour, what is missing, and what made it.

    Parameters
    ----------
    shown : names of the findings that the picture shows: their boxes are filled
    key : of the slice in the picture

    """
    left, right = SIDE + MARGIN, SIDE + PANEL - MARGIN
    small, normal, large = (ImageFont.load_default(points) for points in (SMALL, NORMAL, LARGE))
    draw.rectangle((SIDE, 0, SIDE + PANEL, SIDE), BACKGROUND)

    level = report.decision.level
    draw.rectangle((SIDE, 0, SIDE + PANEL, 60), LEVEL_COLOURS.get(level, LEVEL_COLOURS["routine"]))
    draw.text((left, 30), level.upper(), WHITE, large, anchor="lm")
    if report.provisional:
        draw.text((right, 30), "PROVISIONAL", WHITE, small, anchor="rm")
    y = write(draw, (left, 70), report.decision.reason, small, WHITE, lines=4)

    y = _rule(draw, y + 6)
    if not report.findings:
        nothing = "No finding" if report.below_threshold or report.provisional else "No haemorrhage segmented"
        y = write(draw, (left, y), nothing, normal, WHITE, lines=1)
    rows = report.findings[:MAX_FINDINGS]
    is_tight = len(rows) > 4  # then the second lines give way
    for finding in rows:
        code = codes.look_up(finding.name, report.model, own)
        box = (left, y + 4, left + 18, y + 22)
        draw.rectangle(box, fill=code.colour if finding.name in shown else None, outline=code.colour, width=3)
        volume = millilitres.said(finding.volume_ml)
        title = code.title.removesuffix(" haemorrhage")
        room = right - left - 30 - round(normal.getlength(volume)) - 8
        draw.text((left + 30, y), _clip(title, normal, room), WHITE, normal)
        draw.text((right, y), volume, WHITE, normal, anchor="ra")
        y += 30
        if not is_tight:
            parts = "1 part" if finding.components == 1 else f"{finding.components} parts"
            here = ", most of it here" if finding.key_slice == key else ""
            draw.text((left + 30, y - 2), f"{parts}{here}", DIM, small)
            y += 26
    if len(report.findings) > MAX_FINDINGS:
        more = f"and {len(report.findings) - MAX_FINDINGS} more, see the report"
        y = write(draw, (left, y), more, small, DIM, lines=1)

    notes = [
        *report.missing,
        *(f"Below threshold: {name} {millilitres.said(ml)}" for name, ml in report.below_threshold),
    ]
    if notes:
        y = _rule(draw, y + 4)
    for index, note in enumerate(notes):
        if y > FOOTER - 4 * SMALL:
            write(draw, (left, y), f"and {len(notes) - index} more, see the report", small, DIM, lines=1)
            break
        y = write(draw, (left, y), note, small, WHITE, lines=2) + 2
    _draw_footer(draw, report, caption)


def _draw_footer(draw: ImageDraw.ImageDraw, report: Report, caption: str) -> None:
    left, right = SIDE + MARGIN, SIDE + PANEL - MARGIN
    small, normal = ImageFont.load_default(SMALL), ImageFont.load_default(NORMAL)
    draw.line((left, FOOTER, right, FOOTER), RULE)
    model = f"AI: {report.model.name} {report.model.version}"
    extent = f"{report.slices} slices analysed, {report.coverage_mm:.0f} mm"
    for row, text in enumerate((caption, extent, f"W {BRAIN.width_hu}  L {BRAIN.level_hu}", model)):
        draw.text((left, FOOTER + 10 + 25 * row), _clip(text, small, right - left), DIM, small)
    draw.text((left, FOOTER + 118), "Research use only", WHITE, normal)
    draw.text((left, FOOTER + 147), "Not a medical device", WHITE, normal)


def _rule(draw: ImageDraw.ImageDraw, y: float) -> float:
    draw.line((SIDE + MARGIN, y, SIDE + PANEL - MARGIN, y), RULE)
    return y + 14


def write(
    draw: ImageDraw.ImageDraw,
    corner: tuple[float, float],
    text: str,
    font: ImageFont.FreeTypeFont,
    colour: codes.Colour,
    *,
    lines: int,
    width: int = PANEL - 2 * MARGIN,
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


def named(source: Dataset) -> str:
    """The slice as a viewer numbers it."""
    named = (
        ("series", source.get("SeriesNumber")),
        ("image", source.get("InstanceNumber")),
        ("frame", frame_number(source)),
    )
    return ", ".join(f"{word} {number}" for word, number in named if number is not None).capitalize()


def _direction(vector: Vector) -> str:
    """The patient's direction that a vector points to most: one of L R P A H F (PS3.3 C.7.6.1.1.1)."""
    axis = int(np.argmax(np.abs(vector)))
    return ("LPH" if vector[axis] > 0 else "RAF")[axis]
