"""Slices in any order to a stack in space: order, gaps, repeats, tilt, and each slice's own thickness.

There is no affine here on purpose. A tilted gantry shears the stack and a scanner may change its step within one
series, so a volume is the sum over slices of pixels x pixel area x the thickness that belongs to that slice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from runtime.errors import GeometryError
from runtime.types import Gap, Plane, SliceStack

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

SAME_PLACE_MM = 0.01  # positions are decimal strings of about this resolution
PARALLEL_COSINE = 0.9998  # about 1.1 degrees: a series that mixes tilts is not one stack
GAP_FACTOR = 1.5  # a step this much wider than usual has room for another slice


@dataclass(frozen=True, slots=True)
class View:
    """What a network looks at: so many neighbouring slices at once, of which it segments those in the middle.

    Attributes
    ----------
    shown : slices in one input: 1, with a slice's neighbours 2k + 1, in a volume its depth
    answered : slices of the answer: 1, in a volume those that have enough of it on either side

    """

    shown: int = 1
    answered: int = 1

    @property
    def first(self) -> int:
        """Place of the first answered slice among those shown."""
        return (self.shown - self.answered) // 2

    def over(self, count: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Views that answer every slice of a stack once: places shown ``(shown,)``, places answered (the last: fewer).

        Beyond an end of the stack, its last slice is shown again.
        """
        starts = np.arange(0, count, self.answered)
        shown = np.clip(starts[:, None] + np.arange(self.shown) - self.first, 0, count - 1)
        answered = (np.arange(start, min(start + self.answered, count)) for start in starts.tolist())
        return list(zip(shown, answered, strict=True))


def stack(planes: Mapping[str, Plane]) -> SliceStack:
    """Order parallel planes along their normal and give each its thickness.

    The boundary between two neighbours divides their distance in the ratio of their nominal thicknesses, so
    contiguous slabs of 4 and 7 mm get 4 and 7, overlapping ones share the overlap, and nothing is counted twice.
    Under gantry tilt the distance along the normal is smaller than the table step: 5 mm at 20 degrees are 4.70. The
    two outer slices extend outwards by half their nominal thickness, at most half the distance to their neighbour.

    Parameters
    ----------
    planes : the slices' planes by key; the first in iteration order wins where several lie in one place

    Returns
    -------
    SliceStack in the direction of the normal (row x column; for a supine head-first axial scan, towards the head)

    Raises
    ------
    GeometryError : no plane at all, planes that are not parallel, or one lone plane without a thickness

    """
    if not planes:
        raise GeometryError("no slices: nothing to stack")
    reference = next(iter(planes.values()))
    normal = reference.normal_lps
    for key, plane in planes.items():
        if float(normal @ plane.normal_lps) < PARALLEL_COSINE:
            raise GeometryError(
                f"slice {key} is not parallel to the others (normal {np.round(plane.normal_lps, 4).tolist()} against "
                f"{np.round(normal, 4).tolist()}): send each orientation as a series of its own"
            )

    along = {key: float(normal @ np.asarray(plane.origin_lps)) for key, plane in planes.items()}
    ordered: list[str] = []
    repeated: list[str] = []
    for key in sorted(planes, key=along.__getitem__):  # stable: the first to arrive stays first among equals
        if ordered and along[key] - along[ordered[-1]] < SAME_PLACE_MM:
            repeated.append(key)
        else:
            ordered.append(key)

    position = np.array([along[key] for key in ordered])
    nominal = _nominal_thickness([planes[key] for key in ordered], position)
    return SliceStack(
        keys=tuple(ordered),
        planes=tuple(planes[key] for key in ordered),
        thickness_mm=_own_thickness(position, nominal),
        tilt_deg=_tilt_deg([planes[key] for key in ordered], normal),
        gaps=_gaps(ordered, position, nominal),
        repeated=tuple(repeated),
    )


def _nominal_thickness(planes: list[Plane], position: NDArray[np.float64]) -> NDArray[np.float64]:
    """SliceThickness of each plane, ``(N,)`` mm; where it is missing, the median step."""
    given = [plane.thickness_mm for plane in planes]
    if all(thickness for thickness in given):
        return np.array(given, dtype=np.float64)
    if len(planes) < 2:
        raise GeometryError("a single slice without SliceThickness has no volume: send the whole series")
    usual = float(np.median(np.diff(position)))
    return np.array([thickness or usual for thickness in given], dtype=np.float64)


def _own_thickness(position: NDArray[np.float64], nominal: NDArray[np.float64]) -> NDArray[np.float64]:
    if len(position) == 1:
        return nominal.copy()
    step = np.diff(position)
    below = step * nominal[:-1] / (nominal[:-1] + nominal[1:])  # what of each step belongs to its lower slice
    upwards = np.append(below, min(nominal[-1], step[-1]) / 2)
    downwards = np.insert(step - below, 0, min(nominal[0], step[0]) / 2)
    return upwards + downwards


def _gaps(keys: list[str], position: NDArray[np.float64], nominal: NDArray[np.float64]) -> tuple[Gap, ...]:
    """Steps too wide for their series.

    A protocol may scan 5 mm slices every 10 mm, or every 2.5: neither is a gap. So a step is measured against the
    median of the steps between slices of the same thickness; where the thickness changes, against what both explain.
    """
    if len(position) < 3:
        return ()
    step = np.diff(position)
    even = np.isclose(nominal[:-1], nominal[1:])
    found = []
    for i, wide in enumerate(step):
        alike = step[even & np.isclose(nominal[:-1], nominal[i])]
        usual = float(np.median(alike)) if even[i] and len(alike) > 1 else (nominal[i] + nominal[i + 1]) / 2
        if wide > GAP_FACTOR * usual:
            found.append(Gap(keys[i], keys[i + 1], float(wide), max(1, round(wide / usual) - 1)))
    return tuple(found)


def _tilt_deg(planes: list[Plane], normal: NDArray[np.float64]) -> float:
    """Angle in degrees between the normal and the line from the first slice's origin to the last's.

    Taken from positions and orientation: the sign of GantryDetectorTilt differs between vendors, and some leave it out.
    """
    line = np.asarray(planes[-1].origin_lps) - np.asarray(planes[0].origin_lps)
    length = float(np.linalg.norm(line))
    if length < SAME_PLACE_MM:
        return 0.0
    return float(np.degrees(np.arccos(np.clip(normal @ line / length, -1.0, 1.0))))
