"""The report for people, as Encapsulated PDF (PS3.3 A.45.1): for archives whose viewers show no SR.

It says what the SR says and shows the pictures. It names nobody: whose it is, the object around it says, and a page
that is printed or copied out of the archive gives nobody away.
"""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from highdicom.base import SOPClass
from highdicom.sr import CodedConcept
from PIL import Image
from pydicom.multival import MultiValue
from pydicom.uid import EncapsulatedPDFStorage, ExplicitVRLittleEndian
from reportlab.lib.colors import Color, HexColor, white
from reportlab.lib.pagesizes import A4
from reportlab.lib.styles import ParagraphStyle
from reportlab.lib.units import mm
from reportlab.platypus import Image as Picture
from reportlab.platypus import PageBreak, Paragraph, SimpleDocTemplate, Spacer, Table, TableStyle

from dicom_node.results import capture, codes, panel, sr
from dicom_node.results.encoding import put, sequence
from dicom_node.results.source import frame_number, instances, named
from runtime.millilitres import said

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from pydicom.dataset import Dataset
    from reportlab.pdfgen.canvas import Canvas
    from reportlab.platypus import Flowable

    from dicom_node.results.uids import Issue
    from runtime.types import Report

TITLE = "Intracranial haemorrhage: measurements by AI"
WARNING = "Research use only. Not a medical device. Not reviewed by a physician."
_WIDTH = A4[0] - 36 * mm
_INK = HexColor("#20262c")
_BODY = ParagraphStyle("body", fontName="Helvetica", fontSize=9.5, leading=13, textColor=_INK)
_CELL = ParagraphStyle("cell", _BODY, fontSize=9, leading=11.5, splitLongWords=1)
_HEAD = ParagraphStyle("head", _CELL, fontName="Helvetica-Bold")
_TITLE = ParagraphStyle("title", _BODY, fontName="Helvetica-Bold", fontSize=16, leading=21)
_SECTION = ParagraphStyle("section", _BODY, fontName="Helvetica-Bold", fontSize=11.5, leading=16, spaceBefore=8)
_LEVEL = ParagraphStyle("level", _BODY, fontName="Helvetica-Bold", fontSize=13, leading=17, textColor=white)


def build(sources: Sequence[Dataset], images: Sequence[Dataset], report: Report, issue: Issue) -> SOPClass:
    """Encapsulated PDF of a report.

    Parameters
    ----------
    sources : normalised headers in stack order
    images : the Secondary Captures, which it shows
    report : what was found
    issue : names the object

    """
    first = sources[0]
    attributes = issue.attributes("DOC", "pdf", number=issue.revision)
    equipment = attributes.pop("contributing_equipment")
    document = SOPClass(
        study_instance_uid=first.StudyInstanceUID,
        sop_class_uid=EncapsulatedPDFStorage,
        modality="DOC",
        transfer_syntax_uid=ExplicitVRLittleEndian,
        specific_character_set="ISO_IR 192",
        **attributes,
    )
    document.copy_patient_and_study_information(first)
    document.ContributingEquipmentSequence = equipment
    document.ConversionType = "WSD"
    document.AcquisitionDateTime = None  # Type 2: of no use where a report is of many slices
    document.BurnedInAnnotation = "NO"  # nothing that identifies the patient (PS3.3 C.24.2)
    document.RecognizableVisualFeatures = "NO"
    document.VerificationFlag = "UNVERIFIED"
    document.DocumentTitle = f"{TITLE}. {WARNING}"
    document.ConceptNameCodeSequence = [CodedConcept.from_code(codes.MEASUREMENT_REPORT)]
    put(document, sequence("SourceInstanceSequence", (named(*frames) for frames in instances(sources).values())))
    document.MIMETypeOfEncapsulatedDocument = "application/pdf"
    page = render(images, [capture.named(_source(image, sources)) for image in images], report, issue)
    document.EncapsulatedDocumentLength = len(page)
    document.EncapsulatedDocument = page + b"\0" * (len(page) % 2)
    return document


def _source(image: Dataset, sources: Sequence[Dataset]) -> Dataset:
    """Header of the slice, or of the first, that a Secondary Capture was made of."""
    shown = image.SourceImageSequence[0]
    numbers = shown.get("ReferencedFrameNumber")
    number = numbers[0] if isinstance(numbers, MultiValue) else numbers
    same = (one for one in sources if one.SOPInstanceUID == shown.ReferencedSOPInstanceUID)
    return next(one for one in same if number is None or frame_number(one) == number)


def render(images: Sequence[Dataset], captions: Sequence[str], report: Report, issue: Issue) -> bytes:
    """The pages, the same bytes for the same report: without the time at which they are made, without random names.

    Parameters
    ----------
    images, captions : the Secondary Captures, the overview first, and what their slices are called
    report : what was found
    issue : names the findings

    """
    stream = BytesIO()
    pages = SimpleDocTemplate(
        stream,
        pagesize=A4,
        leftMargin=18 * mm,
        rightMargin=18 * mm,
        topMargin=16 * mm,
        bottomMargin=20 * mm,
        title=TITLE,
        author="scanside",
        subject=WARNING,
        invariant=1,
    )
    story = [*_summary(report, issue), *_overview(images[:1]), *_about(report, issue)]
    story += _key_slices(images[1:], captions[1:])
    pages.build(story, onFirstPage=_foot, onLaterPages=_foot)
    return stream.getvalue()


def _foot(canvas: Canvas, pages: SimpleDocTemplate) -> None:
    """On every page: one may be copied without the others."""
    canvas.setFont("Helvetica-Bold", 9)
    canvas.setFillColor(_INK)
    canvas.drawString(18 * mm, 11 * mm, WARNING)
    canvas.drawRightString(A4[0] - 18 * mm, 11 * mm, str(pages.page))


def _summary(report: Report, issue: Issue) -> Iterator[Flowable]:
    yield Paragraph(TITLE, _TITLE)
    level = report.decision.level
    red, green, blue = panel.LEVEL_COLOURS.get(level, panel.LEVEL_COLOURS["routine"])
    banner = f"{level.upper()}{', PROVISIONAL' if report.provisional else ''}"
    coloured = TableStyle([("BACKGROUND", (0, 0), (-1, -1), Color(red / 255, green / 255, blue / 255))])
    yield Spacer(1, 2 * mm)
    yield Table([[Paragraph(banner, _LEVEL)]], colWidths=[_WIDTH], style=coloured)
    yield Spacer(1, 2 * mm)
    yield Paragraph(escape(report.decision.reason), _BODY)
    yield Spacer(1, 3 * mm)
    if not report.findings:
        nothing = "No finding" if report.below_threshold or report.provisional else "No haemorrhage segmented"
        yield Paragraph(f"{nothing}.", _BODY)
        return
    head = ("", "Finding", "Volume", "Parts", "Largest", "by ABC/2", "Slices", "Probability*")
    rows: list[list[object]] = [[Paragraph(each, _HEAD) for each in head]]
    styles = [("LINEBELOW", (0, 0), (-1, -1), 0.4, HexColor("#c3cad1")), ("VALIGN", (0, 0), (-1, -1), "MIDDLE")]
    for number, finding in enumerate(report.findings, start=1):
        code = issue.code(finding.name)
        red, green, blue = code.colour
        styles.append(("BACKGROUND", (0, number), (0, number), Color(red / 255, green / 255, blue / 255)))
        told = (
            said(finding.volume_ml),
            str(finding.components),
            said(finding.largest_ml),
            said(finding.abc2_ml),
            str(len(finding.keys)),
            f"{finding.probability:.2f}",
        )
        rows.append(["", Paragraph(escape(code.title), _CELL), *(Paragraph(each, _CELL) for each in told)])
    widths = [6 * mm, 48 * mm, 22 * mm, 15 * mm, 22 * mm, 24 * mm, 15 * mm, 22 * mm]
    yield Table(rows, colWidths=widths, style=TableStyle(styles), repeatRows=1)
    note = f"* highest of any pixel, no measure of certainty: {report.model.calibration}."
    yield Paragraph(escape(note), ParagraphStyle("note", _CELL, fontSize=8))


def _overview(images: Sequence[Dataset]) -> Iterator[Flowable]:
    for image in images:
        yield Spacer(1, 3 * mm)
        yield _picture(image.pixel_array, _WIDTH)


def _key_slices(images: Sequence[Dataset], captions: Sequence[str]) -> Iterator[Flowable]:
    """Two in a row, without their panel: what it says stands above."""
    width = _WIDTH / 2 - 2 * mm
    cells = [
        [_picture(image.pixel_array[:, : capture.SIDE], width), Paragraph(escape(caption), _CELL)]
        for image, caption in zip(images, captions, strict=True)
    ]
    rows = [[*cells[start : start + 2], *[""] * (start + 1 == len(cells))] for start in range(0, len(cells), 2)]
    if rows:
        yield PageBreak()
        yield Paragraph("Key slices", _SECTION)
        yield Table(rows, colWidths=[_WIDTH / 2] * 2, style=TableStyle([("LEFTPADDING", (0, 0), (-1, -1), 0)]))


def _picture(pixels: NDArray[np.uint8], width: float) -> Picture:
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, format="JPEG", quality=85, subsampling=0)
    return Picture(stream, width=width, height=width * pixels.shape[0] / pixels.shape[1])


def _about(report: Report, issue: Issue) -> Iterator[Flowable]:
    """What the comments of the SR say, in their words."""
    yield Paragraph("About this analysis", _SECTION)
    for comment in sr.comments(report, issue):
        yield Paragraph(escape(comment), _CELL, bulletText="\u2022")
