"""The part of the ICH score that an image shows (Hemphill et al., Stroke 32:891, 2001).

The score adds points for the Glasgow Coma Scale (0 to 2), volume of 30 ml or more (1), blood in the ventricles (1),
infratentorial origin (1) and age of 80 or more (1). Of these, labels give two; nobody may take them for the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.millilitres import said

if TYPE_CHECKING:
    from runtime.types import Report

LARGE_ML = 30.0
INTRACEREBRAL, INTRAVENTRICULAR = "intracerebral", "intraventricular"  # classes by name, as the codes go by it
NOT_COMPUTABLE = (
    "infratentorial origin (the model does not name it)",
    "age (not used)",
    "Glasgow Coma Scale (not in the image)",
)


@dataclass(frozen=True, slots=True)
class ImagingPart:
    """Points that volume and ventricles give.

    Attributes
    ----------
    volume_ml : of intracerebral blood
    is_ventricular : whether blood in the ventricles is among the findings; None where the model has no such class
    is_complete : False where slices are missing: then the points are the least that there are

    """

    volume_ml: float
    is_ventricular: bool | None
    is_complete: bool

    @property
    def points(self) -> int:
        """0 to 2."""
        return (self.volume_ml >= LARGE_ML) + bool(self.is_ventricular)

    def __str__(self) -> str:
        at_least = "" if self.is_complete and self.is_ventricular is not None else "at least "
        ventricles = {True: "yes, 1", False: "none found, 0", None: "unknown, the model has no such class"}
        return (
            f"ICH score, imaging part: {at_least}{self.points} of 2 points (intracerebral volume "
            f"{said(self.volume_ml)}, 30 ml or more: {int(self.volume_ml >= LARGE_ML)}; intraventricular extension: "
            f"{ventricles[self.is_ventricular]}). Not computable here: {', '.join(NOT_COMPUTABLE)}."
        )


def score(report: Report) -> ImagingPart | None:
    """Imaging part of the score; None where no intracerebral haemorrhage was found, which is all that it is about."""
    volumes_ml = {finding.name: finding.volume_ml for finding in report.findings}
    if INTRACEREBRAL not in volumes_ml:
        return None
    knows_ventricles = INTRAVENTRICULAR in volumes_ml or INTRAVENTRICULAR in report.absent
    return ImagingPart(
        volumes_ml[INTRACEREBRAL],
        INTRAVENTRICULAR in volumes_ml if knows_ventricles else None,
        is_complete=not report.provisional,
    )
