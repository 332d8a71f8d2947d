"""Source headers as the writers of results need them: few attributes, legal where they may be, identity never touched.

Scanners and routers leave out what the standard demands. What is missing and Type 2 is added empty; what no result
could carry is emptied; nothing that identifies is invented or changed. PatientID, AccessionNumber and the UIDs of
study, series and slices stay as they are even where they break a rule: a result that corrects them belongs to no study.
ImagePositionPatient, ImageOrientationPatient and PixelSpacing keep the very strings of the source, since viewers
compare them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.valuerep import DA, TM, DSfloat, format_number_as_ds

from dicom_node.gate import MULTI_FRAME
from dicom_node.uids import derive
from runtime.geometry import stack
from runtime.types import Plane

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

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


def _is_sex(value: str) -> bool:
    return value in {"M", "F", "O"}


def _is_long_string(value: str) -> bool:
    return len(value) <= 64


# what highdicom refuses, or a result must not repeat; none of these is an identifier
_LEGAL: dict[str, Callable[[str], Any]] = {
    "PatientBirthDate": DA,
    "PatientSex": _is_sex,
    "StudyDate": DA,
    "StudyTime": TM,
    "StudyDescription": _is_long_string,
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
            told[keyword] = "\\".join(map(str, value)) if isinstance(value, MultiValue) else str(value or "")
        except (ValueError, TypeError, ArithmeticError, LookupError):  # pydicom, of what its VR or encoding can't hold
            continue
    return {keyword: text for keyword, text in told.items() if text}


def normalise(sources: Sequence[Dataset]) -> tuple[list[Dataset], tuple[str, ...]]:
    """Small, legal copies of source headers in the same order, and the keywords of what had to be repaired.

    Patient, study, series and equipment are taken from the first slice: one series has one of each. Text is decoded
    from whatever character set the source has and will be written as ISO_IR 192.

    Parameters
    ----------
    sources : headers of one series, in stack order, with the attributes of the Image Plane Module (PS3.3 C.7.6.2)

    """
    shared, repairs = common(sources[0])
    copies = [_copy(source, _OF_SLICE) for source in sources]
    if not all(copy.get("SliceThickness") for copy in copies):
        # PixelMeasures wants one: take what the positions leave to the slice
        repairs.append("SliceThickness")
        thickness_mm = stack({slice_key(copy): plane(copy) for copy in copies}).thickness_mm
        for copy, own_mm in zip(copies, thickness_mm, strict=True):
            if not copy.get("SliceThickness"):
                copy.SliceThickness = DSfloat(format_number_as_ds(float(own_mm)))
    for copy in copies:
        copy.update(shared)
    return copies, tuple(sorted(repairs))


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


def reference(*sources: Dataset) -> Dataset:
    """Reference to an image, and of a multi-frame one to these of its frames (PS3.3 table 10-3)."""
    item = Dataset()
    item.ReferencedSOPClassUID = sources[0].SOPClassUID
    item.ReferencedSOPInstanceUID = sources[0].SOPInstanceUID
    numbers = [frame_number(source) for source in sources]
    if None not in numbers:
        item.ReferencedFrameNumber = numbers
    return item


def common(source: Dataset) -> tuple[Dataset, list[str]]:
    """What all slices share, and the keywords of what had to be repaired in it."""
    shared = _copy(source, (*_TYPE_2, *_KEPT))
    shared.SpecificCharacterSet = "ISO_IR 192"
    repairs = [keyword for keyword in _TYPE_2 if keyword not in shared]
    for keyword, check in _LEGAL.items():
        value = shared.get(keyword)
        if value and not _passes(check, str(value)):
            repairs.append(keyword)
            del shared[keyword]
    for keyword in _TYPE_2:
        if keyword not in shared:
            _add(shared, keyword, None)
    if "FrameOfReferenceUID" not in shared:
        repairs.append("FrameOfReferenceUID")
        _add(shared, "FrameOfReferenceUID", derive("frame of reference", shared.SeriesInstanceUID))
    if shared.get("PatientIdentityRemoved") == "YES" and not shared.get("DeidentificationMethod"):
        repairs.append("DeidentificationMethod")  # Type 1C beside YES (PS3.3 C.7.1.1)
        _add(shared, "DeidentificationMethod", "not stated in the source images")
    return shared, repairs


def _copy(source: Dataset, keywords: Iterable[str]) -> Dataset:
    """Copy what is there, can be read and has a value (or is Type 2); strings of numbers stay as they were."""
    copy = Dataset()
    for keyword in keywords:
        try:
            value = source.get(keyword)
            absent = keyword not in source if keyword in _TYPE_2 else value in (None, "")
            if not absent:
                _add(copy, keyword, value)
        except (ValueError, TypeError, ArithmeticError):  # pydicom, of a value that its VR can't hold
            continue
    return copy


def _add(dataset: Dataset, keyword: str, value: Any) -> None:
    """Add an element as it is: whether it is legal was settled above."""
    tag = tag_for_keyword(keyword)
    dataset.add(DataElement(tag, dictionary_VR(tag), value))


def _passes(check: Callable[[str], Any], value: str) -> bool:
    try:
        return bool(check(value))
    except ValueError:
        return False
