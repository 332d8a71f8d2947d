"""What is not analysed, and why: one enum for the log, the journal and the report."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
from pydicom import uid

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
        raise NotAnalysed(Reason.NOT_CT, f"SOP class {sop_class or 'missing'}")
    image_type = image.get("ImageType") or ()
    image_type = [str(value).strip() for value in ([image_type] if isinstance(image_type, str) else image_type)]
    if _is_lossy(image) and _lossy_ratio(image) > max_lossy_ratio:
        raise NotAnalysed(Reason.LOSSY, f"ratio {image.get('LossyImageCompressionRatio') or 'not given'}")
    if "LOCALIZER" in image_type[2:]:
        raise NotAnalysed(Reason.LOCALIZER)
    if image_type[:1] in (["DERIVED"], ["MIXED"]):  # mixed: some frames are derived, and none says that it isn't
        raise NotAnalysed(Reason.DERIVED, "\\".join(image_type))
    if "PixelData" not in image:
        raise NotAnalysed(Reason.NO_PIXEL_DATA)
    if image.get("RescaleSlope") is None or image.get("RescaleIntercept") is None:
        raise NotAnalysed(Reason.NO_RESCALE)
    if str(image.get("RescaleType") or "HU").upper() not in ("HU", "US"):  # US: unspecified, as older scanners write it
        raise NotAnalysed(Reason.DERIVED, f"RescaleType {image.RescaleType}")


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
    """All steps of lossy compression together; infinite where they are not told."""
    ratios = image.get("LossyImageCompressionRatio")
    if ratios in (None, ""):
        return math.inf
    try:
        return math.prod(float(ratio) for ratio in ([ratios] if isinstance(ratios, str | float | int) else ratios))
    except (TypeError, ValueError):
        return math.inf


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
