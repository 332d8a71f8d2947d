"""Results of a made-up bleed, made once and thrown away, so that the first patient waits no longer than the next.

highdicom reads its tables of the standard with the first object, Pillow its font with the first picture, modules come
with the first of each kind: half a second in all, which a worker spends before a slice is there instead of after the
last one.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dicom_node.analysis.analyser import Analyser
from dicom_node.analysis.series import Series
from dicom_node.results import painter
from dicom_node.simulation import phantom
from runtime.geometry import View
from runtime.triage import Rule
from runtime.types import Plane, Slice, SliceLabels

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dicom_node.results.result_set import Form
    from runtime.bundle import Bundle
    from runtime.session import Session
    from runtime.types import ModelIdentity

SLICES, SIDE, PIXEL_MM, STEP_MM = 6, 64, 3.5, 5.0
BLOOD = slice(20, 40)  # rows and columns; 25 ml a slice


class _Bleeding:
    """An engine that sees the first class everywhere."""

    def __init__(self, identity: ModelIdentity, classes: int) -> None:
        self.identity, self._classes = identity, classes

    def infer(self, hu: NDArray[np.int16]) -> list[SliceLabels]:
        labels = np.zeros((SIDE, SIDE), np.uint8)
        labels[BLOOD, BLOOD] = 1
        voxels = np.bincount(labels.ravel(), minlength=self._classes)
        return [SliceLabels(labels, voxels, np.float32(voxels > 0))] * len(hu)

    def close(self) -> None:
        """Nothing is open."""


def rehearse(bundle: Bundle, session: Session, form: Form, draw: painter.Draw = painter.draw) -> bool:
    """Make results as they will be made of patients; True where it came to an end. Parameters are those of `Analyser`.

    Raises
    ------
    OSError, NoRoom : there is no room for temporary files

    """
    engine = _Bleeding(session.identity, len(bundle.classes))
    rules = [Rule("critical", ("any",), 0.0)]
    alone = dataclasses.replace(bundle, view=View())
    limits = {"min_slices": SLICES, "min_coverage_mm": 0, "max_batch": SLICES}
    analyser = Analyser(alone, engine, rules, **limits, form=form, draw=draw)
    with tempfile.TemporaryDirectory(prefix="scanside-") as name:
        folder = Path(name)
        series = Series()
        analyser.feed(series, phantom.write([_slice(i) for i in range(SLICES)], folder / "slices"))
        analyser.look(series)
        return analyser.close(series, folder / "results", revision=1, missing=()).report is not None


def _slice(number: int) -> Slice:
    plane = Plane((0.0, 0.0, STEP_MM * number), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (PIXEL_MM, PIXEL_MM), STEP_MM)
    return Slice(str(number), plane, np.full((SIDE, SIDE), 40, np.int16))
