"""Which series of a study comes first: soft tissue before bone, thick before thin, by what the scanner says of itself.

Most heads are reconstructed more than once from one scan. The network has learnt soft tissue; a bone kernel's noise is
as high as the contrast of blood. Of two that are alike the thicker has fewer slices and less noise.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from dicom_node.images import frames
from dicom_node.images.gate import NotAnalysed, Reason

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from pydicom.dataset import Dataset

    from dicom_node.analysis.series import Series
    from runtime.types import Plane

ENOUGH_MM = 5.0  # thicker is no better
COVERED = 0.95  # of a bone series' extent in each direction: reconstructions of one scan differ by a slice
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


def check_needed(
    series: Series,
    siblings: Iterable[Sequence[Path]],
    patterns: Sequence[str],
    *,
    min_slices: int = 2,
    max_lossy_ratio: float = 1.0,
) -> None:
    """Turn away a series for bone where another one of the study shows the same for soft tissue.

    Parameters
    ----------
    series : for bone
    siblings : files of each other series of the study
    patterns : as of `is_bone`
    min_slices, max_lossy_ratio : without which the other one would not be analysed itself

    Raises
    ------
    NotAnalysed

    """
    header, first = next(iter(series.headers.values())), next(iter(series.planes.values()))
    if not header.get("FrameOfReferenceUID"):  # then nothing says that two series show the same place
        return
    axes = np.array([first.row_lps, first.column_lps, first.normal_lps])
    low, high = _extent([_corners(plane, header, axes) for plane in series.planes.values()])
    for paths in siblings:
        soft = [
            _corners(plane, image, axes)
            for path in paths
            for plane, image in _soft_slices(path, patterns, max_lossy_ratio)
            if image.get("FrameOfReferenceUID") == header.FrameOfReferenceUID
            and np.allclose(plane.normal_lps, first.normal_lps, atol=1e-2)
        ]
        if len(soft) < max(min_slices, 2):
            continue
        places = sorted(corners[0, 2] for corners in soft)
        if np.diff(places).max() <= WIDEST_STEP_MM:
            soft_low, soft_high = _extent(soft)
            if (np.minimum(high, soft_high) - np.maximum(low, soft_low) >= COVERED * (high - low)).all():
                raise NotAnalysed(Reason.BONE_KERNEL)


def _corners(plane: Plane, image: Dataset, axes: np.ndarray) -> np.ndarray:
    """The first and the last pixel of a slice, ``(2, 3)``: places along its series' row, column and normal, in mm."""
    first = np.asarray(plane.origin_lps)
    row_mm, column_mm = plane.spacing_mm
    across = (int(image.Columns) - 1) * column_mm * np.asarray(plane.row_lps)
    down = (int(image.Rows) - 1) * row_mm * np.asarray(plane.column_lps)
    return np.array([first, first + across + down]) @ axes.T


def _extent(corners: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    places = np.concatenate(corners)
    return places.min(axis=0), places.max(axis=0)


def _soft_slices(path: Path, patterns: Sequence[str], max_lossy_ratio: float) -> Iterator[tuple[Plane, Dataset]]:
    """Slices of a file that would be analysed, and say that they are for soft tissue."""
    from dicom_node.analysis import decode  # noqa: PLC0415  # highdicom comes with it: not for who only reads a configuration

    try:
        for image in frames.read(path):
            plane = decode.check(image, max_lossy_ratio)
            if image.get("ConvolutionKernel") and not is_bone(image, patterns):
                yield plane, image
    except Exception:  # noqa: BLE001  # pydicom raises anything on bytes that are no DICOM: not a slice, then
        return
