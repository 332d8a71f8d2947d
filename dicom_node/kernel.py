"""Which series of a study comes first: soft tissue before bone, thick before thin, by what the scanner says of itself.

Most heads are reconstructed more than once from one scan. The network has learnt soft tissue; a bone kernel's noise is
as high as the contrast of blood. Of two that are alike the thicker has fewer slices and less noise.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
from pydicom import dcmread
from pydicom.uid import CTImageStorage

from dicom_node.gate import NotAnalysed, Reason

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from pydicom.dataset import Dataset

    from dicom_node.analysis import Series

# Whole values of ConvolutionKernel, whatever their case. A site with others says so in `series.bone_kernels`.
BONE_KERNELS = (
    r"BONE.*|EDGE|LUNG|ULTRA",  # GE; DETAIL is still read for soft tissue
    r"(?!FC)[A-Z][a-z]?(5[5-9]|[6-9][0-9])[a-z]*",  # Siemens: from B10 (smooth) to U90 (sharp), Hr64
    r"FC[358][0-9].*",  # Canon, Toshiba: inner ear, lung, bone
    r"D|E|F|L|Y[A-D]",  # Philips; UA to UC are for the brain
)
ENOUGH_MM = 5.0  # thicker is no better
_LOOKED_AT = [
    "SOPClassUID",
    "ImageType",
    "ConvolutionKernel",
    "FrameOfReferenceUID",
    "ImageOrientationPatient",
    "ImagePositionPatient",
]
COVERED = 0.95  # of a bone series' extent: reconstructions of one scan differ by a slice


def is_bone(header: Dataset, patterns: Iterable[str]) -> bool:
    """Whether an image's ConvolutionKernel, or the first of several, is one of these regular expressions."""
    value = header.get("ConvolutionKernel")
    first = str(value or "") if value is None or isinstance(value, str) else next(map(str, value), "")
    return any(re.fullmatch(pattern, first.strip(), re.IGNORECASE) for pattern in patterns)


def rank(header: Dataset, patterns: Iterable[str]) -> tuple[bool, float]:
    """The lower, the sooner an image's series should be analysed."""
    try:
        thickness_mm = float(header.get("SliceThickness") or 0)
    except (TypeError, ValueError):
        thickness_mm = 0.0
    return is_bone(header, patterns), -min(thickness_mm, ENOUGH_MM)


def check_needed(series: Series, siblings: Iterable[Sequence[Path]], patterns: Sequence[str]) -> None:
    """Turn away a series for bone where another one of the study shows the same for soft tissue.

    Parameters
    ----------
    series : for bone
    siblings : files of each other series of the study; multi-frame images are not looked into
    patterns : as of `is_bone`

    Raises
    ------
    NotAnalysed

    """
    header, plane = next(iter(series.headers.values())), next(iter(series.planes.values()))
    normal = plane.normal_lps
    places = [float(normal @ np.asarray(one.origin_lps)) for one in series.planes.values()]
    frame_of_reference = header.get("FrameOfReferenceUID")
    for paths in siblings:
        found = [at for path in paths if (at := _soft_place(path, frame_of_reference, normal, patterns)) is not None]
        if len(found) > 1:
            both = min(max(found), max(places)) - max(min(found), min(places))
            if both >= COVERED * (max(places) - min(places)):
                raise NotAnalysed(Reason.BONE_KERNEL)


def _soft_place(
    path: Path, frame_of_reference: str | None, normal: np.ndarray, patterns: Sequence[str]
) -> float | None:
    """Where an original slice for soft tissue lies along a normal, in mm; None for any other file."""
    try:
        image = dcmread(path, stop_before_pixels=True, specific_tags=_LOOKED_AT)
        orientation = np.array(image.ImageOrientationPatient, dtype=float)
        position = np.array(image.ImagePositionPatient, dtype=float)
        kind = list(image.ImageType)
    except Exception:  # noqa: BLE001  # pydicom raises anything on bytes that are no DICOM: not a slice, then
        return None
    fits = image.get("SOPClassUID") == CTImageStorage and image.get("FrameOfReferenceUID") == frame_of_reference
    parallel = orientation.shape == (6,) and np.allclose(np.cross(orientation[:3], orientation[3:]), normal, atol=1e-2)
    if not fits or not parallel or kind[0] == "DERIVED" or "LOCALIZER" in kind or is_bone(image, patterns):
        return None
    return float(normal @ position)
