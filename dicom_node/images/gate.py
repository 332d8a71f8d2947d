"""What is not analysed, and why: one enum for the log, the journal and the report."""

from __future__ import annotations

import math
import re
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
from pydicom import uid
from pydicom.multival import MultiValue

from dicom_node.images import codestream
from dicom_node.images.part10 import LARGEST
from runtime.errors import ScansideError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydicom.dataset import Dataset

    from runtime.types import Plane

MULTI_FRAME = (uid.EnhancedCTImageStorage, uid.LegacyConvertedEnhancedCTImageStorage)
CT_IMAGES = (uid.CTImageStorage, *MULTI_FRAME)
SHAPE = ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated")
ALWAYS_LOSSY = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit)
PERHAPS_LOSSY = (uid.JPEGLSNearLossless, uid.JPEG2000, uid.HTJ2K)
MOST_PIXELS = 1 << 22  # of a frame: 2048 x 2048 is the largest matrix of any CT
MOST_QUOTED = 8  # values of an element
_CODE, _NUMBER, _UID = "[A-Z0-9_ ]{0,16}", "[0-9eE.+-]{1,16}", "[0-9.]{1,64}"  # CS, DS and UI (PS3.5 section 6.2)
AXIAL_COSINE = 0.8  # a gantry tilts by 30 degrees (0.87); a coronal or sagittal reformat is far below
# Whole values of ConvolutionKernel, whatever their case. A site with others says so in `series.bone_kernels`.
BONE_KERNELS = (
    r"BONE.*|EDGE|LUNG|ULTRA",  # GE; DETAIL is still read for soft tissue
    r"(?!FC)[A-Z][a-z]?(5[5-9]|[6-9][0-9])[a-z]*",  # Siemens: from B10 (smooth) to U90 (sharp), Hr64
    r"FC[358][0-9].*",  # Canon, Toshiba: inner ear, lung, bone
    r"D|E|F|L|Y[A-D]",  # Philips; UA to UC are for the brain
)


class Reason(StrEnum):
    """Why an image or a series was not analysed; the value is what people read."""

    NOT_CT = "not a CT image"
    LOCALIZER = "a localizer"
    DERIVED = "a derived image, not what the scanner measured"
    NOT_AXIAL = "not axial"
    LOSSY = "lossy compressed: Hounsfield units are not those measured"
    NO_PIXEL_DATA = "no pixel data"
    NO_RESCALE = "no RescaleSlope or RescaleIntercept: pixels can't become Hounsfield units"
    NO_FUNCTIONAL_GROUPS = "a multi-frame image without functional groups of each of its frames"
    NO_GEOMETRY = "no ImagePositionPatient, ImageOrientationPatient or PixelSpacing"
    TRUNCATED = "a truncated file: it ends before its pixels do"
    TOO_LARGE = "larger, or nested deeper, than any CT image"
    NO_DECODER = "compressed in a way that no installed decoder reads"
    UNREADABLE = "a file or pixels that are damaged"
    LETHAL = "its analysis ended the worker three times"
    BAD_GEOMETRY = "slices that make no stack"
    MIXED_SIZES = "slices of different matrix sizes"
    TOO_FEW_SLICES = "too few slices"
    BONE_KERNEL = "a bone kernel, and the study has the same slices for soft tissue"

    @property
    def of_another_kind(self) -> bool:
        """True where the image was never a slice of the head: leaving it out leaves nothing out."""
        return self in (Reason.NOT_CT, Reason.LOCALIZER, Reason.DERIVED, Reason.NOT_AXIAL)

    def leaves_out_a_head(self, missing: Sequence[str]) -> bool:
        """Whether somebody may take the series for a head that was analysed: then the archive gets a notice.

        A few slices are a scanner's test or a contrast bolus, unless some of the series are `missing`.
        """
        if self is Reason.TOO_FEW_SLICES:
            return bool(missing)
        return not self.of_another_kind and self is not Reason.BONE_KERNEL


class NotAnalysed(ScansideError):
    """An image, a frame of one, or a series that the gate turns away; carries the reason."""

    def __init__(self, reason: Reason, detail: str = "", frame: int | None = None) -> None:
        said = f"{reason.value}: {detail}" if detail else reason.value
        super().__init__(said if frame is None else f"frame {frame}: {said}")
        self.reason, self.detail, self.frame = reason, detail, frame

    def of(self, frame: int) -> NotAnalysed:
        """Say the same of a frame."""
        return NotAnalysed(self.reason, self.detail, frame)


def check_kind(image: Dataset, max_lossy_ratio: float = 1.0) -> None:
    """Turn away what is no axial CT slice as the scanner measured it, by the header of an image or a frame alone.

    Lossy compression is let pass up to a ratio, all its steps together (PS3.3 C.7.6.1.1.5.2), if the image tells one.

    Modality and BodyPartExamined decide nothing: dose pages are Modality CT, and heads are labelled as necks.

    Raises
    ------
    NotAnalysed

    """
    sop_class = str(image.get("SOPClassUID", ""))
    if sop_class not in CT_IMAGES:
        raise NotAnalysed(Reason.NOT_CT, f"SOP class {_quoted([sop_class], _UID) if sop_class else 'missing'}")
    image_type = _values(image, "ImageType")
    if _is_lossy(image) and _lossy_ratio(image) > max_lossy_ratio:
        ratios = _values(image, "LossyImageCompressionRatio")
        raise NotAnalysed(Reason.LOSSY, f"ratio {_quoted(ratios, _NUMBER) or 'not given'}")
    if "LOCALIZER" in image_type[2:]:
        raise NotAnalysed(Reason.LOCALIZER)
    if image_type[:1] in (["DERIVED"], ["MIXED"]):  # mixed: some frames are derived, and none says that it isn't
        raise NotAnalysed(Reason.DERIVED, _quoted(image_type, _CODE))
    if "PixelData" not in image:
        raise NotAnalysed(Reason.NO_PIXEL_DATA)
    if image.get("RescaleSlope") is None or image.get("RescaleIntercept") is None:
        raise NotAnalysed(Reason.NO_RESCALE)
    if str(image.get("RescaleType") or "HU").upper() not in ("HU", "US"):  # US: unspecified, as older scanners write it
        raise NotAnalysed(Reason.DERIVED, f"RescaleType {_quoted(_values(image, 'RescaleType'), _CODE)}")


def _values(image: Dataset, keyword: str) -> list[str]:
    """Values of an element as text; none where it is missing or empty."""
    value = image.get(keyword)
    if value is None or value == "":
        return []
    return [str(one).strip() for one in (value if isinstance(value, MultiValue) else [value])]


def _quoted(values: Sequence[str], legal: str) -> str:
    """Values of a foreign file for a reason, which is logged: what the standard does not allow may be a name."""
    return "\\".join(value if re.fullmatch(legal, value) else "?" for value in values[:MOST_QUOTED])


def check_size(image: Dataset) -> None:
    """Turn away pixels that are not there or would fill the memory, before anything is decoded.

    A decoder allocates what a compressed frame claims, and only then finds out that nothing follows.

    Raises
    ------
    NotAnalysed
    Exception : whatever pydicom raises on numbers that are none

    """
    rows, columns, samples, bits = (int(image[name].value) for name in SHAPE)
    frames = int(image.get("NumberOfFrames") or 1)
    size = f"{frames} frame{'s' * (frames != 1)} of {columns} x {rows}"
    needed = (frames * rows * columns * samples * bits + 7) // 8
    if rows * columns > MOST_PIXELS or needed > LARGEST:
        raise NotAnalysed(Reason.TOO_LARGE, size)
    if samples != 1:  # PS3.3 C.8.2.1.1
        raise NotAnalysed(Reason.NOT_CT, f"{samples} samples per pixel")
    if not image.file_meta.TransferSyntaxUID.is_encapsulated:
        if len(image.PixelData) < needed:
            raise NotAnalysed(Reason.TRUNCATED)
        return
    claimed = {codestream.size(frame, image.file_meta.TransferSyntaxUID) for frame in codestream.frames(image, frames)}
    if claimed - {None, (rows, columns, samples)}:
        raise NotAnalysed(Reason.UNREADABLE, "a compressed frame of another size than the image says")


def _is_lossy(image: Dataset) -> bool:
    """By what the image says of itself, and by a transfer syntax that can't be anything else unless it says so."""
    said = str(image.get("LossyImageCompression") or "")
    syntax = getattr(image, "file_meta", {}).get("TransferSyntaxUID")
    return said == "01" or syntax in ALWAYS_LOSSY or (syntax in PERHAPS_LOSSY and said != "00")


def _lossy_ratio(image: Dataset) -> float:
    """All steps of lossy compression together; infinite where they are not told, or not in numbers that can be."""
    try:
        ratios = [float(ratio) for ratio in _values(image, "LossyImageCompressionRatio")]
    except ValueError:
        return math.inf
    return math.prod(ratios) if ratios and all(ratio > 0 for ratio in ratios) else math.inf


def check_plane(plane: Plane) -> None:
    """Turn away planes that are none (numbers that are not finite, directions that are not perpendicular) or not axial.

    Raises
    ------
    NotAnalysed

    """
    numbers = np.array(
        [*plane.origin_lps, *plane.row_lps, *plane.column_lps, *plane.spacing_mm, plane.thickness_mm or 1.0]
    )
    row, column = np.array(plane.row_lps), np.array(plane.column_lps)
    unit = np.allclose([row @ row, column @ column, row @ column], [1, 1, 0], atol=1e-2)
    if not np.isfinite(numbers).all() or not unit or min(*plane.spacing_mm, plane.thickness_mm or 1.0) <= 0:
        raise NotAnalysed(Reason.NO_GEOMETRY, "orientation, position or spacing is impossible")
    if abs(float(plane.normal_lps[2])) < AXIAL_COSINE:
        raise NotAnalysed(Reason.NOT_AXIAL, f"normal {np.round(plane.normal_lps, 2).tolist()}")
