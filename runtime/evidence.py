"""What the slices of a series that still arrives come to at least, kept up slice by slice.

A stack with slices still missing knows less than a whole one: between two slices that lie apart another may come, and
then what is between them is not theirs. So none counts with more than is sure to be its own
(`runtime.geometry.certain_thickness_mm`), and what that adds up to is the least that the whole series will show, as
long as what it shows now stands.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

import numpy as np

from runtime.geometry import SAME_PLACE_MM, are_neighbours, certain_thickness_mm
from runtime.triage import level_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from runtime.triage import Rule
    from runtime.types import OperatingPoint, Plane, SliceLabels

ROUNDING_ML = 1e-9  # what adding up slice by slice may lose: at a limit it must not keep anybody from measuring
MOST_IN_A_ROW = 16  # neighbours that an operating point may ask for


class Evidence:
    """Volumes, probabilities and neighbours so far, from pixel counts alone.

    A slice costs the same however many there are: it changes what is sure of itself and of its two neighbours. What is
    the highest or the longest stays so, even where a slice is answered anew or another comes between: this is a first
    look, and `runtime.report.compose` of the same slices the one that counts.
    """

    def __init__(self) -> None:
        self._normal: NDArray[np.float64] | None = None
        self._places: list[float] = []  # along the first slice's normal, mm, in order; the three below alike
        self._nominal: list[float] = []
        self._planes: list[Plane] = []
        self._voxels: list[NDArray[np.int64]] = []
        self._own: list[float] = []  # mm that are sure
        self._at: dict[str, float] = {}  # places of the slices that have one, by key
        self._total_ml: NDArray[np.float64] = np.zeros(0)
        self._probability: NDArray[np.float32] = np.zeros(0, np.float32)
        self._in_a_row: NDArray[np.int64] = np.zeros(0, np.int64)

    def __len__(self) -> int:
        """Slices that have a place of their own."""
        return len(self._places)

    def take(self, key: str, plane: Plane, answer: SliceLabels) -> None:
        """Take what the network says of a slice, the first time or anew."""
        if self._normal is None:
            self._normal = plane.normal_lps
            self._total_ml = np.zeros(len(answer.voxels))
            self._probability, self._in_a_row = np.zeros_like(answer.evidence), np.zeros_like(answer.voxels)
        if key not in self._at and not self._place(key, plane, np.zeros_like(answer.voxels)):
            return  # another lies there
        index = bisect.bisect_left(self._places, self._at[key])
        self._total_ml += self._voxel_ml(index) * (answer.voxels - self._voxels[index])
        self._voxels[index] = answer.voxels
        if answer.voxels[1:].any():
            shown = answer.voxels > 0
            self._probability = np.maximum(self._probability, answer.evidence * shown)
            for c in np.flatnonzero(shown[1:]) + 1:
                self._in_a_row[c] = max(self._in_a_row[c], self._row(index, int(c)))

    def level(self, operating_point: Mapping[str, OperatingPoint], rules: Sequence[Rule]) -> str | None:
        """Level of triage that all this may make; None where no rule holds.

        Parameters
        ----------
        operating_point : of each class but the background, in the order of their labels

        """
        if not self._places or not self._total_ml[1:].any():
            return None
        most_ml = [float(ml) + ROUNDING_ML for ml in self._total_ml]
        volumes_ml = {
            name: most_ml[c]
            for c, (name, point) in enumerate(operating_point.items(), start=1)
            if self._in_a_row[c] and point.admits(most_ml[c], float(self._probability[c]), int(self._in_a_row[c]))
        }
        return level_of(volumes_ml, rules) if volumes_ml else None

    def _place(self, key: str, plane: Plane, nothing: NDArray[np.int64]) -> bool:
        """Give a slice its place, and its neighbours what it leaves them; False where another lies there."""
        at = float(self._normal @ np.asarray(plane.origin_lps))  # type: ignore[operator]
        index = bisect.bisect_left(self._places, at)
        if any(abs(at - other) < SAME_PLACE_MM for other in self._places[max(0, index - 1) : index + 1]):
            return False
        self._at[key] = at
        self._places.insert(index, at)
        self._nominal.insert(index, plane.thickness_mm or 0.0)
        self._planes.insert(index, plane)
        self._voxels.insert(index, nothing)
        self._own.insert(index, 0.0)
        first, last = max(0, index - 2), min(len(self._places), index + 3)  # neighbours, and what they need
        position, nominal = np.array(self._places[first:last]), np.array(self._nominal[first:last])
        own = certain_thickness_mm(position, nominal, float(self._normal[2]))  # type: ignore[index]
        for i in range(max(0, index - 1), min(len(self._places), index + 2)):
            before_ml = self._voxel_ml(i)
            self._own[i] = float(own[i - first])
            self._total_ml += (self._voxel_ml(i) - before_ml) * self._voxels[i]
        return True

    def _voxel_ml(self, index: int) -> float:
        return self._planes[index].pixel_area_mm2 * self._own[index] / 1000

    def _row(self, index: int, c: int) -> int:
        """How many neighbours in a row show a class, a slice among them; no more than anybody asks for."""
        low = high = index
        while low > 0 and self._voxels[low - 1][c] and high - low < MOST_IN_A_ROW and self._meet(low - 1):
            low -= 1
        last = len(self._places) - 1
        while high < last and self._voxels[high + 1][c] and high - low < MOST_IN_A_ROW and self._meet(high):
            high += 1
        return high - low + 1

    def _meet(self, lower: int) -> bool:
        """Whether a slice and the next one are neighbours."""
        step_mm = self._places[lower + 1] - self._places[lower]
        return are_neighbours(step_mm, self._nominal[lower], self._nominal[lower + 1])
