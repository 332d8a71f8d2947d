"""Which series of a study comes first: soft tissue before bone, thick before thin, by what the scanner says of itself.

Most heads are reconstructed more than once from one scan. The network has learnt soft tissue; a bone kernel's noise is
as high as the contrast of blood. Of two that are alike the thicker has fewer slices and less noise.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from dicom_node import frames
from dicom_node.gate import CT_IMAGES, NotAnalysed, Reason

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
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
COVERED = 0.95  # of a bone series' extent: reconstructions of one scan differ by a slice
WIDEST_STEP_MM = 10.5  # between slices for soft tissue; a wider one leaves something out


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
    siblings : files of each other series of the study
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
        found = sorted(at for path in paths for at in _soft_places(path, frame_of_reference, normal, patterns))
        if len(found) > 1 and np.diff(found).max() <= WIDEST_STEP_MM:
            both = min(found[-1], max(places)) - max(found[0], min(places))
            if both >= COVERED * (max(places) - min(places)):
                raise NotAnalysed(Reason.BONE_KERNEL)


def _soft_places(
    path: Path, frame_of_reference: str | None, normal: np.ndarray, patterns: Sequence[str]
) -> Iterator[float]:
    """Where the original slices for soft tissue of a file lie along a normal, in mm."""
    try:
        for image in frames.read(path):
            orientation = np.array(image.ImageOrientationPatient, dtype=float)
            position = np.array(image.ImagePositionPatient, dtype=float)
            kind = list(image.ImageType)
            measured = kind[0] not in ("DERIVED", "MIXED") and "LOCALIZER" not in kind
            fits = image.SOPClassUID in CT_IMAGES and image.get("FrameOfReferenceUID") == frame_of_reference
            parallel = np.allclose(np.cross(orientation[:3], orientation[3:]), normal, atol=1e-2)
            if measured and fits and parallel and not is_bone(image, patterns):
                yield float(normal @ position)
    except Exception:  # noqa: BLE001  # pydicom raises anything on bytes that are no DICOM: not a slice, then
        return
