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


def stack(planes: Mapping[str, Plane], *, growing: bool = False) -> SliceStack:
    """Order parallel planes along their normal and give each its thickness.

    The boundary between two neighbours divides their distance in the ratio of their nominal thicknesses, so
    contiguous slabs of 4 and 7 mm get 4 and 7, overlapping ones share the overlap, and nothing is counted twice.
    Under gantry tilt the distance along the normal is smaller than the table step: 5 mm at 20 degrees are 4.70. The
    two outer slices extend outwards by half their nominal thickness, at most half the distance to their neighbour.

    Parameters
    ----------
    planes : the slices' planes by key; the first in iteration order wins where several lie in one place
    growing : slices may still come between these: see `certain_thickness_mm`. Slices further apart than their nominal
        thickness explains are told as gaps, for there is nothing to say of the series' usual step

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
    if growing:
        nominal = np.array([planes[key].thickness_mm or 0.0 for key in ordered])
        thickness_mm = certain_thickness_mm(position, nominal, float(normal[2]))
        gaps = tuple(
            Gap(ordered[i], ordered[i + 1], float(step), 1)
            for i, step in enumerate(np.diff(position))
            if not are_neighbours(step, *nominal[i : i + 2])
        )
    else:
        nominal = _nominal_thickness([planes[key] for key in ordered], position)
        thickness_mm, gaps = _own_thickness(position, nominal), _gaps(ordered, position, nominal)
    return SliceStack(
        keys=tuple(ordered),
        planes=tuple(planes[key] for key in ordered),
        thickness_mm=thickness_mm,
        tilt_deg=_tilt_deg([planes[key] for key in ordered], normal),
        gaps=gaps,
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


def certain_thickness_mm(
    position: NDArray[np.float64], nominal: NDArray[np.float64], along_patient: float
) -> NDArray[np.float64]:
    """What of the normal's axis is sure to be each slice's own, ``(N,)`` mm, while others may come between them.

    As in a whole stack, but in either direction no more than half the nominal thickness; under gantry tilt less, for
    the table moves along the patient. That is the least of a slice that stands alone in the end as well, unless others
    overlap it. A slice without a SliceThickness has nothing that is sure.

    Parameters
    ----------
    position : ``(N,)`` along the normal, in order
    nominal : ``(N,)``, SliceThickness; 0 where it is missing
    along_patient : z of the normal

    """
    most = nominal * abs(along_patient) / 2
    return np.minimum(_halves_mm(position, nominal), most).sum(0)


def are_neighbours(step_mm: float, lower_mm: float, upper_mm: float) -> bool:
    """Whether two slices of such thicknesses lie so near that none of their kind is missing between them."""
    return step_mm <= GAP_FACTOR * (lower_mm + upper_mm) / 2


def _own_thickness(position: NDArray[np.float64], nominal: NDArray[np.float64]) -> NDArray[np.float64]:
    return nominal.copy() if len(position) == 1 else _halves_mm(position, nominal).sum(0)


def _halves_mm(position: NDArray[np.float64], nominal: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far each slice reaches down and up, ``(2, N)``."""
    if len(position) == 1:
        return np.stack([nominal, nominal]) / 2
    step, both = np.diff(position), nominal[:-1] + nominal[1:]
    below = step * np.divide(nominal[:-1], both, out=np.zeros_like(both), where=both > 0)  # the lower slice's part
    upwards = np.append(below, min(nominal[-1], step[-1]) / 2)
    downwards = np.insert(step - below, 0, min(nominal[0], step[0]) / 2)
    return np.stack([downwards, upwards])


def _gaps(keys: list[str], position: NDArray[np.float64], nominal: NDArray[np.float64]) -> tuple[Gap, ...]:
    """Steps too wide for their series.

    A protocol may scan 5 mm slices every 10 mm, or every 2.5: neither is a gap. So a step is measured against the
    median of the steps between slices of the same thickness; where the thickness changes, against what both explain.
    """
    if len(position) < 3:
        return ()
    step = np.diff(position)
    even = np.isclose(nominal[:-1], nominal[1:])
    alike = {thickness: step[even & np.isclose(nominal[:-1], thickness)] for thickness in np.unique(nominal)}
    median = {thickness: float(np.median(steps)) for thickness, steps in alike.items() if len(steps) > 1}
    found = []
    for i, wide in enumerate(step):
        explained = (nominal[i] + nominal[i + 1]) / 2
        usual = median.get(nominal[i], explained) if even[i] else explained
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
