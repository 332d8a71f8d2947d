"""ABC/2, the bedside estimate of a haematoma's volume, measured on a mask as a reader measures it on the film.

The papers are numbered as in docs/metrics.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.spatial import ConvexHull
from scipy.spatial.distance import cdist

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

Weighting = Literal["slices", "kothari"]


@dataclass(frozen=True, slots=True)
class Coniglobus:
    """The three diameters of ABC/2 in mm.

    Attributes
    ----------
    a_mm : largest diameter on the slice that shows the largest area
    b_mm : largest diameter perpendicular to it on the same slice
    c_mm : height: weighted sum of the thickness of the slices that show the lesion
    slice_index : that slice; None for an empty mask, whose lengths are 0: no blood has no volume

    """

    a_mm: float
    b_mm: float
    c_mm: float
    slice_index: int | None

    @property
    def volume_ml(self) -> float:
        """V = A x B x C / 2 (Kwak 1983; paper 004, introduction). An ellipsoid has pi / 6 of it, 4.7 % more."""
        return self.a_mm * self.b_mm * self.c_mm / 2000


def measure_abc(
    mask: NDArray[np.bool_],
    spacing_mm: Sequence[float],
    thickness_mm: NDArray[np.float64],
    *,
    weighting: Weighting = "slices",
) -> Coniglobus:
    """Measure A, B and C of one lesion; give each connected part by itself, as a reader would.

    A and B run from outer edge to outer edge of the pixels, in a straight line that may leave a hollow lesion, as
    with a ruler: both are taken on the convex hull.

    Parameters
    ----------
    mask : ``(N, H, W)``
    spacing_mm : distance between rows, between columns
    thickness_mm : ``(N,)`` of each slice along the normal (`runtime.types.SliceStack.thickness_mm`)
    weighting : ``"slices"``: every slice that shows the lesion counts (paper 004: "the number of ICH slices x slice
        thickness"). ``"kothari"``: one with more than 75 % of the largest area counts 1, with 25 to 75 % one half,
        with less 0 (Kothari et al., Stroke 27:1304, 1996)

    Raises
    ------
    ValueError : shapes that don't fit

    """
    if mask.ndim != 3 or np.shape(thickness_mm) != (len(mask),) or len(spacing_mm) != 2:
        raise ValueError(
            f"ABC/2 needs a mask (N, H, W), two spacings and N thicknesses, not {mask.shape}, {tuple(spacing_mm)} and "
            f"{np.shape(thickness_mm)}"
        )
    pixels = np.count_nonzero(mask, axis=(1, 2))
    if not pixels.any():
        return Coniglobus(0.0, 0.0, 0.0, None)
    largest = int(pixels.argmax())
    a_mm, b_mm = _diameters_mm(mask[largest], spacing_mm)
    weights = (pixels > 0).astype(np.float64) if weighting == "slices" else _kothari(pixels / pixels[largest])
    return Coniglobus(a_mm, b_mm, float(weights @ thickness_mm), largest)


def _kothari(share: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.select([share > 0.75, share >= 0.25], [1.0, 0.5], 0.0)


def _diameters_mm(area: NDArray[np.bool_], spacing_mm: Sequence[float]) -> tuple[float, float]:
    """Largest diameter of an area ``(H, W)``, and the longest chord of its convex hull perpendicular to it."""
    rows = np.flatnonzero(area.any(axis=1))
    ends = area[rows].argmax(axis=1), area.shape[1] - area[rows, ::-1].argmax(axis=1)  # nothing else is on the hull
    corners = np.concatenate([np.column_stack((rows + down, at)) for down in (0, 1) for at in ends]) * spacing_mm
    hull = corners[ConvexHull(corners).vertices]  # in order around it
    apart = cdist(hull, hull)
    start, end = np.unravel_index(apart.argmax(), apart.shape)
    a_mm = float(apart[start, end])
    hull = np.roll(hull, -start, axis=0)
    end = (end - start) % len(hull)

    # The chord's length changes linearly between two vertices, so its longest is at one. Nothing of the hull lies
    # beyond the ends of A, or A were longer: each side of it is a curve over A.
    along_axis = (hull[end] - hull[0]) / a_mm
    along = (hull - hull[0]) @ along_axis
    across = (hull - hull[0]) @ np.array([-along_axis[1], along_axis[0]])
    one = np.interp(along, along[: end + 1], across[: end + 1])
    back = np.r_[end : len(hull), 0][::-1]
    other = np.interp(along, along[back], across[back])
    return a_mm, float(np.abs(one - other).max())
