"""Which series of a study comes first: soft tissue before bone, thick before thin, by what the scanner says of itself.

Most heads are reconstructed more than once from one scan. The network has learnt soft tissue; a bone kernel's noise is
as high as the contrast of blood. Of two that are alike the thicker has fewer slices and less noise.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pydicom.dataset import Dataset

# Whole values of ConvolutionKernel, whatever their case. A site with others says so in `series.bone_kernels`.
BONE_KERNELS = (
    r"BONE.*|EDGE|LUNG|ULTRA",  # GE; DETAIL is still read for soft tissue
    r"(?!FC)[A-Z][a-z]?(5[5-9]|[6-9][0-9])[a-z]*",  # Siemens: from B10 (smooth) to U90 (sharp), Hr64
    r"FC[358][0-9].*",  # Canon, Toshiba: inner ear, lung, bone
    r"D|E|F|L|Y[A-D]",  # Philips; UA to UC are for the brain
)
ENOUGH_MM = 5.0  # thicker is no better


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
