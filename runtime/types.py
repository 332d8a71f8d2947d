"""The values that travel through scanside: frozen, slotted, arrays read-only.

Axes: index order is slice, row, column. Positions and directions are in the patient's LPS frame
(x to the left, y to the posterior, z to the superior; DICOM PS3.3 C.7.6.2.1.1), lengths in millimetres.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

Vector = tuple[float, float, float]
SINGLE = 1e-6  # probabilities have single precision: 0.9 is a little less in it


@dataclass(frozen=True, slots=True)
class Plane:
    """Where the pixels of one slice lie in the patient (DICOM Image Plane Module, PS3.3 C.7.6.2).

    Attributes
    ----------
    origin_lps : centre of the first voxel, mm (ImagePositionPatient)
    row_lps : unit vector along a row, to the next column (ImageOrientationPatient, first three)
    column_lps : unit vector along a column, to the next row (ImageOrientationPatient, last three)
    spacing_mm : distance between rows, distance between columns (PixelSpacing)
    thickness_mm : nominal thickness (SliceThickness), None where the source has none

    """

    origin_lps: Vector
    row_lps: Vector
    column_lps: Vector
    spacing_mm: tuple[float, float]
    thickness_mm: float | None = None

    @property
    def normal_lps(self) -> NDArray[np.float64]:
        """Unit normal of the plane, ``(3,)``: row x column."""
        return _normal(self.row_lps, self.column_lps)

    @property
    def pixel_area_mm2(self) -> float:
        return self.spacing_mm[0] * self.spacing_mm[1]


@lru_cache  # the slices of a series have the same
def _normal(row: Vector, column: Vector) -> NDArray[np.float64]:
    cross = np.cross(row, column)
    normal = cross / np.linalg.norm(cross)
    normal.flags.writeable = False
    return normal


@dataclass(frozen=True, slots=True)
class Slice:
    """One image: its plane and its Hounsfield units.

    Attributes
    ----------
    key : the caller's name for the slice (the DICOM node uses the SOPInstanceUID)
    hu : ``(H, W)`` int16, read-only

    """

    key: str
    plane: Plane
    hu: NDArray[np.int16]

    def __post_init__(self) -> None:
        if self.hu.dtype != np.int16 or self.hu.ndim != 2:
            raise TypeError(f"slice {self.key}: hu must be int16 (H, W), not {self.hu.dtype} {self.hu.shape}")
        self.hu.setflags(write=False)


@dataclass(frozen=True, slots=True)
class Gap:
    """A step between neighbours that is larger than their thickness explains.

    Attributes
    ----------
    after_key, before_key : the slices on either side
    step_mm : distance between them along the normal
    missing : how many slices of the usual step would fit

    """

    after_key: str
    before_key: str
    step_mm: float
    missing: int


@dataclass(frozen=True, slots=True)
class SliceStack:
    """Parallel slices in order along their normal, each with a thickness of its own.

    Attributes
    ----------
    keys : the slices' keys, in order
    planes : their planes, in the same order
    thickness_mm : ``(N,)`` float64, what of the normal's axis belongs to each slice
    tilt_deg : angle between the normal and the line through the slices' origins (0: no gantry tilt)
    gaps : steps with slices missing
    repeated : keys left out because another slice lies in the same place

    """

    keys: tuple[str, ...]
    planes: tuple[Plane, ...]
    thickness_mm: NDArray[np.float64]
    tilt_deg: float
    gaps: tuple[Gap, ...] = ()
    repeated: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.thickness_mm.setflags(write=False)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def coverage_mm(self) -> float:
        """How much of the normal's axis the slices cover."""
        return float(self.thickness_mm.sum())

    @property
    def voxel_ml(self) -> NDArray[np.float64]:
        """Volume of one voxel of each slice in millilitres, ``(N,)``: X Y T of V = sum X Y T W (Peng 2022)."""
        areas = np.array([plane.pixel_area_mm2 for plane in self.planes])
        return areas * self.thickness_mm / 1000.0

    @property
    def origin_mm(self) -> NDArray[np.float64]:
        """Where the first voxel of each slice lies, ``(N, 3)``: along the normal, the rows' axis and the columns'.

        From the first slice on; in even steps and without tilt the latter two stay 0.
        """
        first = self.planes[0]
        axes = np.stack([first.normal_lps, first.column_lps, first.row_lps])  # the next row lies along the column
        return (np.array([plane.origin_lps for plane in self.planes]) - first.origin_lps) @ axes.T


@dataclass(frozen=True, slots=True)
class SliceLabels:
    """What the network says of one slice.

    Attributes
    ----------
    labels : ``(H, W)`` uint8, class index per pixel, 0 is background, read-only
    voxels : ``(C,)`` int64, pixels per class, background included
    evidence : ``(C,)`` float32, highest probability of each class anywhere in the slice

    """

    labels: NDArray[np.uint8]
    voxels: NDArray[np.int64]
    evidence: NDArray[np.float32]

    def __post_init__(self) -> None:
        for array in (self.labels, self.voxels, self.evidence):
            array.setflags(write=False)


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """From where on a class of haemorrhage is a finding, and may raise an alert; what is below it is mentioned.

    Attributes
    ----------
    minimum_volume_ml : in the whole series
    minimum_probability : the highest anywhere in a slice that shows it
    minimum_slices : so many neighbouring slices in a row have to show it

    """

    minimum_volume_ml: float
    minimum_probability: float = 0.0
    minimum_slices: int = 1

    def __str__(self) -> str:
        told = [f"from {self.minimum_volume_ml:g} ml"]
        if self.minimum_probability > 0:
            told.append(f"probability {self.minimum_probability:g}")
        if self.minimum_slices > 1:
            told.append(f"{self.minimum_slices} neighbouring slices")
        return ", ".join(told)

    def admits(self, volume_ml: float, probability: float, in_a_row: int) -> bool:
        """Whether so much of a class, seen with such a probability in so many neighbouring slices, is a finding."""
        return (
            volume_ml >= self.minimum_volume_ml
            and probability >= self.minimum_probability - SINGLE
            and in_a_row >= self.minimum_slices
        )


def in_words(points: Mapping[str, OperatingPoint], title: Callable[[str], str] = str) -> str:
    """Operating points by class, those together that are the same: ``"subdural, epidural from 0.5 ml; ..."``.

    Parameters
    ----------
    title : what to call a class

    """
    alike: dict[str, list[str]] = {}
    for name, point in points.items():
        alike.setdefault(str(point), []).append(title(name))
    return "; ".join(f"{', '.join(names)} {point}" for point, names in alike.items())


@dataclass(frozen=True, slots=True)
class Finding:
    """One class of haemorrhage found in a series.

    Attributes
    ----------
    label : class index in the label map
    name : class name of the bundle's class table, such as ``"subdural"``
    volume_ml : sum over slices of pixels x pixel area x the slice's own thickness
    components : connected parts (26-neighbourhood)
    largest_ml : volume of the largest part
    abc2_ml : what a reader would estimate the largest part at with a ruler (`runtime.coniglobus`)
    probability : highest class probability seen; what it is worth, `ModelIdentity.calibration` says
    keys : the slices that show it, in stack order
    key_slice : the slice that shows most of it

    """

    label: int
    name: str
    volume_ml: float
    components: int
    largest_ml: float
    abc2_ml: float
    probability: float
    keys: tuple[str, ...]
    key_slice: str


@dataclass(frozen=True, slots=True)
class Decision:
    """What triage says: a level and the rule that gave it.

    Attributes
    ----------
    level : ``"critical"``, ``"urgent"`` or ``"routine"``; ``"incomplete"`` where nothing was found in part of a head
    reason : one sentence with the numbers that decided

    """

    level: str
    reason: str


@dataclass(frozen=True, slots=True)
class Concept:
    """A coded concept: CodeValue (at most 16 characters), CodingSchemeDesignator, CodeMeaning (DICOM PS3.3 8.8)."""

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Coded:
    """What a class is called in results: the finding, and the site where it lies."""

    finding: Concept
    site: Concept


IN_PLACE = "in place of"  # in `ModelIdentity.backend`: an engine stood in for the one that was asked for


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which network, in which precision, on which engine: what every result must carry.

    Attributes
    ----------
    name, version : of the bundle
    digest : of the bundle: SHA-256 of all that decides its answers
    precision : ``"fp32"``, ``"fp16"`` or ``"int8"``
    backend : engine and its version, such as ``"onnxruntime 1.31.1 CPUExecutionProvider"``; where a local engine
        stood in for servers it says so, and how many slices each answered
    training_data : one sentence on what the network was trained with
    codes : of those classes for which the bundle brings its own
    calibration : what is known of what its probabilities are worth

    """

    name: str
    version: str
    digest: str
    precision: str
    backend: str
    training_data: str
    codes: Mapping[str, Coded] = field(default_factory=dict)
    calibration: str = "not calibrated"


@dataclass(frozen=True, slots=True)
class Report:
    """All that one analysis of one series says.

    Attributes
    ----------
    findings : classes found, largest volume first
    absent : names of the classes looked for and not found
    below_threshold : (name, ml) of what was seen but is no finding at the bundle's operating point
    decision : triage
    model : what computed it
    slices : how many slices went in
    provisional : True while slices are missing or may still come
    missing : one sentence for each thing that is missing or was left out; empty when nothing is
    thickness_mm : smallest and largest slice thickness along the normal
    coverage_mm : how much of the head the slices cover, along the normal
    tilt_deg : gantry tilt as the positions show it
    operating_point : by class, what made it a finding or not

    """

    findings: tuple[Finding, ...]
    absent: tuple[str, ...]
    below_threshold: tuple[tuple[str, float], ...]
    decision: Decision
    model: ModelIdentity
    slices: int
    provisional: bool
    missing: tuple[str, ...]
    thickness_mm: tuple[float, float]
    coverage_mm: float
    tilt_deg: float
    operating_point: Mapping[str, OperatingPoint] = field(default_factory=dict)
