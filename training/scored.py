"""One case, as a bundle sees it, beside its truth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from training import metrics

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from runtime.types import OperatingPoint
    from training.detection import Match, Reliability
    from training.metrics import Counts


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """One case, as the bundle sees it. Arrays by class, the background included.

    Attributes
    ----------
    name, patient : of the case: the data set's own name for it is written, what the split takes for the patient is not
    slices : how many it has
    counts : voxels, over the whole case
    truth_ml, measured_ml : volumes; NaN where the case has no spacing
    abc_ml : ABC/2 of the truth's parts, what a reader with a perfect eye and a ruler would say
    hausdorff_95_mm : NaN where either mask is empty, or the case has no spacing
    hausdorff_mm : ``(C, 2)``, directed, from the answer to the truth and back; NaN as above
    lesions : by class, the true lesions
    probability : highest in a slice that the answer shows the class in; 0 where none does
    in_a_row : most neighbouring slices in which the answer shows it
    false_parts : connected parts of at least 0.1 ml that touch no blood of any class; NaN without spacing
    reliability : of each slice's highest probability of each class of blood: does the slice show it?
    slice_ms : median time of an inference, batch 1, by the slices that it answers
    shown : HU, truth and answer of the slice with the most blood, and the distances of its rows and columns
    left_out : slices that the source has and the case has not, by reason
    notes : what else the source says of the case, such as lossy compression

    """

    name: str
    patient: str
    slices: int
    counts: Counts
    truth_ml: NDArray[np.float64]
    measured_ml: NDArray[np.float64]
    abc_ml: NDArray[np.float64]
    hausdorff_95_mm: NDArray[np.float64]
    hausdorff_mm: NDArray[np.float64]
    lesions: tuple[tuple[Match, ...], ...]
    probability: NDArray[np.float64]
    in_a_row: NDArray[np.int64]
    false_parts: NDArray[np.float64]
    reliability: Reliability
    slice_ms: float
    shown: tuple[NDArray[np.int16], NDArray[np.uint8], NDArray[np.uint8], tuple[float, float]]
    left_out: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def dice(self) -> NDArray[np.float64]:
        return metrics.dice(self.counts)

    def is_found(self, c: int, point: OperatingPoint) -> bool:
        """Whether the node would report a class; where a case has no millilitres, whether it would mention it."""
        if np.isnan(self.measured_ml[c]):
            return bool(self.counts.true_positive[c] + self.counts.false_positive[c])
        return point.admits(float(self.measured_ml[c]), float(self.probability[c]), int(self.in_a_row[c]))

    def shows(self, c: int) -> bool:
        """Whether the truth has any of a class."""
        return bool(self.counts.true_positive[c] + self.counts.false_negative[c])
