"""Source headers as the writers of results need them: few attributes, legal where they may be, identity never touched.

Scanners and routers leave out what the standard demands. What is missing and Type 2 is added empty; what no result
could carry is emptied; nothing that identifies is invented or changed. The patient's name and identifier, the accession
number and the UIDs of study, series, slices and frame of reference stay as they are even where they break a rule: a
result that corrects them belongs to no study. ImagePositionPatient, ImageOrientationPatient and PixelSpacing keep the
very strings of the source, since viewers compare them; a string that is too long for its element is rounded.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.uid import UID
from pydicom.valuerep import DA, TM, DSfloat, format_number_as_ds

from dicom_node.images.gate import MULTI_FRAME
from dicom_node.results.encoding import text
from dicom_node.results.uids import derive
from runtime.geometry import stack
from runtime.types import Plane

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from runtime.types import Vector

# Type 2 of the Patient and General Study Modules (PS3.3 C.7.1.1, C.7.2.1)
_TYPE_2 = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "StudyID",
    "ReferringPhysicianName",
)
# of patient, study, series and equipment, where the source has a value; all else stays behind, private elements too
_KEPT = (
    "IssuerOfPatientID",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
    "StudyInstanceUID",
    "StudyDescription",
    "SeriesInstanceUID",
    "SeriesNumber",
    "Modality",
    "FrameOfReferenceUID",
    "PositionReferenceIndicator",
    "Manufacturer",
    "ManufacturerModelName",
    "DeviceSerialNumber",
    "SoftwareVersions",
    "StationName",
    "InstitutionName",
)
_OF_SLICE = (
    "SOPClassUID",
    "SOPInstanceUID",
    "ReferencedFrameNumber",
    "InstanceNumber",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "Rows",
    "Columns",
    "LossyImageCompression",
    "LossyImageCompressionRatio",
    "LossyImageCompressionMethod",
)


# of these, results repeat what the source says
_IDENTIFY = frozenset(
    {
        "PatientName",
        "PatientID",
        "IssuerOfPatientID",
        "AccessionNumber",
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "FrameOfReferenceUID",
        "SOPInstanceUID",
    }
)
_SEVERAL = frozenset({"SoftwareVersions", "DeidentificationMethod"})  # may have more than one value
# the escape sequence that chooses a character set (ISO 2022): pydicom leaves that of GB 2312 in the text it decoded
_DESIGNATOR = re.compile(r"\x1b[\x20-\x2f]+[\x30-\x7e]")
_MEASURES = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness")


@dataclass(frozen=True, slots=True)
class Repairs:
    """What results do not have as the source has it, by keyword.

    Attributes
    ----------
    repaired : added, emptied or rounded
    kept : illegal, and still as it was, since it identifies

    """

    repaired: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


def _is_text(value: str, longest: int) -> bool:
    return len(value) <= longest and not re.search(r"[\x00-\x1f\\\x7f-\x9f]", value)


def _is_name(value: str) -> bool:
    groups = value.split("=")
    return len(groups) <= 3 and all(_is_text(group, 64) for group in groups)


# PS3.5 table 6.2-1. What highdicom refuses, or a result must not carry
_LEGAL: dict[str, Callable[[str], Any]] = {
    "CS": re.compile(r"[A-Z0-9 _]{1,16}").fullmatch,
    "DA": DA,
    "DS": re.compile(r"(?=.{1,16}$)[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?").fullmatch,
    "IS": re.compile(r"[+-]?\d{1,11}").fullmatch,
    "LO": lambda value: _is_text(value, 64),
    "PN": _is_name,
    "SH": lambda value: _is_text(value, 16),
    "TM": TM,
    "UI": lambda value: UID(value).is_valid,
}
# what an alert or a page needs to say whose images they are
_OF_PATIENT = (
    "PatientID",
    "IssuerOfPatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "StudyDescription",
    "ReferringPhysicianName",
    "SeriesNumber",
    "FillerOrderNumberImagingServiceRequest",
    "PlacerOrderNumberImagingServiceRequest",
)


def patient(header: Dataset) -> dict[str, str]:
    """Whose images they are and which study, by keyword, text decoded; what is absent or can't be read is left out."""
    told = {}
    for keyword in _OF_PATIENT:
        try:
            value = header.get(keyword)
            text = "\\".join(map(str, value)) if isinstance(value, MultiValue) else str(value or "")
            told[keyword] = _DESIGNATOR.sub("", text)
        except (ValueError, TypeError, ArithmeticError, LookupError):  # pydicom, of what its VR or encoding can't hold
            continue
    return {keyword: text for keyword, text in told.items() if text}


@dataclass(frozen=True, slots=True)
class Own:
    """What a slice's own header settles of its normalised one, before the others are there.

    Attributes
    ----------
    header : of the slice
    copy : small and legal, of what is not all slices'
    repairs : what had to be repaired in it
    groups : functional groups of its frames (`dicom_node.results.seg.own_groups`)

    """

    header: Dataset
    copy: Dataset
    repairs: Repairs
    groups: Sequence[RawDataElement] = ()


def own(header: Dataset) -> Own:
    """Copy what is a slice's own, with the attributes of the Image Plane Module (PS3.3 C.7.6.2)."""
    copy, unreadable = _copy(header, _OF_SLICE)
    kept = () if _is_legal(copy, "SOPInstanceUID") else ("SOPInstanceUID",)
    return Own(header, copy, Repairs((*unreadable, *_mend(copy)), kept))


def normalise(sources: Sequence[Dataset | Own]) -> tuple[list[Dataset], Repairs]:
    """Small, legal copies of source headers in the same order, and what had to be repaired.

    Patient, study, series and equipment are taken from the first slice: one series has one of each. Text is decoded
    from whatever character set the source has and will be written as ISO_IR 192.

    Parameters
    ----------
    sources : headers of one series, in stack order, or what is settled of them

    """
    owns = [one if isinstance(one, Own) else own(one) for one in sources]
    shared, repairs = common(owns[0].header)
    repaired, kept = {*repairs.repaired}, {*repairs.kept}
    copies = []
    for one in owns:
        copies.append(Dataset())
        copies[-1].update(one.copy)  # Dataset(one.copy) would be another name for the same elements
        repaired.update(one.repairs.repaired)
        kept.update(one.repairs.kept)
    if not all("SliceThickness" in copy for copy in copies):
        # PixelMeasures wants one: take what the positions leave to the slice
        repaired.add("SliceThickness")
        thickness_mm = stack({slice_key(copy): plane(copy) for copy in copies}).thickness_mm
        for copy, own_mm in zip(copies, thickness_mm, strict=True):
            if "SliceThickness" not in copy:
                copy.SliceThickness = DSfloat(format_number_as_ds(float(own_mm)))
    for copy in copies:
        copy.update(shared)
    return copies, Repairs(tuple(sorted(repaired)), tuple(sorted(kept)))


def _mend(copy: Dataset) -> Iterator[str]:
    """Round numbers that are too long for DS, remove what means nothing; yields the keywords."""
    thickness = copy.get("SliceThickness")
    if thickness is not None and not (isinstance(thickness, float) and 0 < thickness < math.inf):
        yield "SliceThickness"
        del copy.SliceThickness
    if copy.get("LossyImageCompression", "00") not in {"00", "01"}:
        yield "LossyImageCompression"
        del copy.LossyImageCompression
    for keyword in _MEASURES:
        if keyword in copy and not _is_legal(copy, keyword):
            yield keyword
            values = copy[keyword].value
            rounded = [DSfloat(format_number_as_ds(float(v))) for v in (values if copy[keyword].VM > 1 else [values])]
            copy[keyword].value = rounded if len(rounded) > 1 else rounded[0]


def plane(source: Dataset) -> Plane:
    """Where a slice lies, from its Image Plane Module."""
    cosines = [float(value) for value in source.ImageOrientationPatient]
    x, y, z = (float(value) for value in source.ImagePositionPatient)
    row_mm, column_mm = (float(value) for value in source.PixelSpacing)
    thickness_mm = source.get("SliceThickness")
    return Plane(
        origin_lps=(x, y, z),
        row_lps=(cosines[0], cosines[1], cosines[2]),
        column_lps=(cosines[3], cosines[4], cosines[5]),
        spacing_mm=(row_mm, column_mm),
        thickness_mm=float(thickness_mm) if thickness_mm else None,
    )


def direction(vector: Vector) -> str:
    """The patient's direction that a vector points to most: one of L R P A H F (PS3.3 C.7.6.1.1.1)."""
    axis = max(range(3), key=lambda axis: abs(vector[axis]))
    return ("LPH" if vector[axis] > 0 else "RAF")[axis]


def directions(source: Dataset) -> list[str] | None:
    """PatientOrientation of a slice: where its rows and its columns go; None for what lies nowhere."""
    if "ImageOrientationPatient" not in source:
        return None
    where = plane(source)
    return [direction(where.row_lps), direction(where.column_lps)]


def frame_number(source: Dataset) -> int | None:
    """Which frame of a multi-frame image a header is of, from 1; None for that of an image as a whole."""
    number = source.get("ReferencedFrameNumber") if source.get("SOPClassUID") in MULTI_FRAME else None
    return None if number is None else int(number)


def slice_key(source: Dataset) -> str:
    """What a slice is called: its SOPInstanceUID, and for a frame the number."""
    number = frame_number(source)
    return str(source.SOPInstanceUID) if number is None else f"{source.SOPInstanceUID} frame {number}"


def instances(sources: Iterable[Dataset]) -> dict[str, list[Dataset]]:
    """Headers by SOPInstanceUID: of a multi-frame image several."""
    found: dict[str, list[Dataset]] = {}
    for source in sources:
        found.setdefault(str(source.SOPInstanceUID), []).append(source)
    return found


def named(*sources: Dataset, frames: bool = True) -> list[RawDataElement]:
    """Elements of a reference to an image, and of a multi-frame one to these of its `frames` (PS3.3 table 10-3)."""
    first = sources[0]
    elements = [
        text("ReferencedSOPClassUID", first.SOPClassUID),
        text("ReferencedSOPInstanceUID", first.SOPInstanceUID),
    ]
    numbers = [frame_number(source) for source in sources]
    if frames and None not in numbers:
        elements.append(text("ReferencedFrameNumber", *map(str, numbers)))
    return elements


def common(source: Dataset) -> tuple[Dataset, Repairs]:
    """What all slices share, and what had to be repaired in it."""
    shared, unreadable = _copy(source, (*_TYPE_2, *_KEPT))
    shared.SpecificCharacterSet = "ISO_IR 192"
    repaired = {*unreadable, *(keyword for keyword in _TYPE_2 if keyword not in shared)}
    repaired.update(_read(shared))
    illegal = {keyword for keyword in (*_TYPE_2, *_KEPT) if shared.get(keyword) and not _is_legal(shared, keyword)}
    for keyword in illegal - _IDENTIFY:
        repaired.add(keyword)
        del shared[keyword]
    for keyword in _TYPE_2:
        if keyword not in shared:
            _add(shared, keyword, None)
    if "FrameOfReferenceUID" not in shared:
        repaired.add("FrameOfReferenceUID")
        _add(shared, "FrameOfReferenceUID", derive("frame of reference", shared.SeriesInstanceUID))
    if shared.get("PatientIdentityRemoved") == "YES" and not shared.get("DeidentificationMethod"):
        repaired.add("DeidentificationMethod")  # Type 1C beside YES (PS3.3 C.7.1.1)
        _add(shared, "DeidentificationMethod", "not stated in the source images")
    return shared, Repairs(tuple(sorted(repaired)), tuple(sorted(illegal & _IDENTIFY)))


def _read(shared: Dataset) -> Iterator[str]:
    """Make text of what can be made text; yields the keywords of what changed, or what no character set decodes."""
    for keyword, mark in (("PatientName", "/"), ("FrameOfReferenceUID", "")):  # highdicom takes one value of them
        if keyword in shared and shared[keyword].VM > 1:
            yield keyword
            values = [str(value) for value in shared[keyword].value]
            _add(shared, keyword, mark.join(values) if mark else values[0])
    for element in list(shared):
        legible = _legible(element)
        if legible != str(element.value):
            _add(shared, element.keyword, legible)
            yield element.keyword
        elif "\ufffd" in legible:
            yield element.keyword


def _legible(element: DataElement) -> str:
    """Text without what is none of it: designators of character sets, and the dots of an old form of date."""
    text = str(element.value)
    if element.VR == "DA":
        return re.sub(r"^(\d{4})\.(\d{2})\.(\d{2})$", r"\1\2\3", text)
    return _DESIGNATOR.sub("", text) if element.VR in {"LO", "PN", "SH"} else text


def _copy(source: Dataset, keywords: Iterable[str]) -> tuple[Dataset, list[str]]:
    """Copy what is there, can be read and has a value (or is Type 2); strings of numbers stay as they were.

    Returns
    -------
    the copy, and the keywords of what could not be read

    """
    copy, unreadable = Dataset(), []
    for keyword in keywords:
        try:
            value = source.get(keyword)
            absent = keyword not in source if keyword in _TYPE_2 else value in (None, "")
            if absent:
                continue
            _add(copy, keyword, value)
        except (ValueError, TypeError, LookupError, ArithmeticError):  # pydicom, of a value that its VR can't hold
            unreadable.append(keyword)
    return copy, unreadable


def _add(dataset: Dataset, keyword: str, value: Any) -> None:
    """Add an element as it is: whether it is legal was settled above."""
    tag = tag_for_keyword(keyword)
    dataset.add(DataElement(tag, dictionary_VR(tag), value))


def _is_legal(dataset: Dataset, keyword: str) -> bool:
    """Whether an element that has a value may have it."""
    element = dataset[keyword]
    is_measure = keyword in _MEASURES
    if element.VM > 1 and not is_measure and keyword not in _SEVERAL:
        return False
    if keyword == "PatientSex":
        return element.value in {"M", "F", "O"}
    try:
        return all(_LEGAL[element.VR](str(value)) for value in (element.value if element.VM > 1 else [element.value]))
    except ValueError:
        return False
