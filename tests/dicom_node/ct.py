"""Head CT in memory: headers as a scanner sends them, HU of a schematic head, bleeds, and the report on them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from scipy import ndimage

from dicom_node.results import montage, result_set
from dicom_node.results.picture import BRAIN, grey, reduced
from dicom_node.results.source import plane
from runtime.geometry import stack
from runtime.types import Decision, Finding, ModelIdentity, Report

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

NAMES = ("background", "intracerebral", "subdural", "epidural", "subarachnoid", "intraventricular", "contusion")
STARTED = datetime(2026, 3, 4, 5, 6, 7, 800000)  # noqa: DTZ001 -- DICOM's times are local
MODEL = ModelIdentity(
    name="ich-unet",
    version="1.2.0",
    digest="0123456789abcdef" * 4,
    precision="fp32",
    backend="onnxruntime 1.0 CPUExecutionProvider",
    training_data="Trained on synthetic heads.",
)


def headers(
    slices: int = 12,
    *,
    side: int = 64,
    tilt_deg: float = 0.0,
    steps_mm: Sequence[float] = (5.0,),
    without: Collection[str] = (),
    **replaced: object,
) -> list[Dataset]:
    """Headers of one series from foot to head, without PixelData.

    Parameters
    ----------
    side : rows and columns; the field of view is 240 mm
    tilt_deg : gantry tilt; the table still moves along z
    steps_mm : table steps, repeated as often as needed; each is its slice's nominal thickness
    without : keywords of attributes to leave out
    replaced : attributes to set to another value in every slice

    """
    tilt = np.radians(tilt_deg)
    z = 0.0
    series = []
    for index in range(slices):
        step_mm = steps_mm[index * len(steps_mm) // slices]
        header = Dataset()
        header.SpecificCharacterSet = "ISO_IR 192"
        header.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        header.SOPClassUID = CTImageStorage
        header.SOPInstanceUID = f"1.2.3.4.5.{index + 1}"
        header.StudyDate, header.StudyTime = "20260304", "050505"
        header.AccessionNumber = "A1"
        header.Modality = "CT"
        header.Manufacturer = "Phantom"
        header.ReferringPhysicianName = ""
        header.StudyDescription = "Head"
        header.PatientName = "Phantom^Head"
        header.PatientID = "P1"
        header.PatientBirthDate, header.PatientSex = "19500101", "O"
        header.BodyPartExamined = "HEAD"
        header.SliceThickness = f"{step_mm:.1f}"
        header.StudyInstanceUID, header.SeriesInstanceUID = "1.2.3.4", "1.2.3.4.5"
        header.StudyID, header.SeriesNumber, header.InstanceNumber = "S1", 2, index + 1
        header.ImagePositionPatient = ["-120.0000", "-115.50", f"{z:.4f}"]
        header.ImageOrientationPatient = ["1", "0", "0", "0", f"{np.cos(tilt):.8f}", f"{-np.sin(tilt):.8f}"]
        header.FrameOfReferenceUID = "1.2.3.4.6"
        header.PositionReferenceIndicator = ""
        header.Rows = header.Columns = side
        header.PixelSpacing = [f"{240 / side:.6f}"] * 2
        for keyword, value in replaced.items():
            setattr(header, keyword, value)
        for keyword in without:
            delattr(header, keyword)
        header.file_meta = FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        series.append(header)
        z += step_mm
    return series


def as_received(header: Dataset) -> Dataset:
    """The header as read from bytes, with its values not yet decoded."""
    stream = BytesIO()
    header.save_as(stream, implicit_vr=False, little_endian=True)
    stream.seek(0)
    return dcmread(stream, force=True)


def bleeds(slices: int = 12, side: int = 64, *, classes: Sequence[int] = (1,), extent: int = 4) -> NDArray[np.uint8]:
    """Label maps ``(N, H, W)`` with one ellipsoidal bleed per class, apart from each other, on `extent` slices each."""
    labels = np.zeros((slices, side, side), dtype=np.uint8)
    rows, columns = np.ogrid[:side, :side]
    for place, label in enumerate(classes):
        angle = 2 * np.pi * place / 6 + 0.4
        row, column = side * (0.5 + 0.2 * np.sin(angle)), side * (0.5 + 0.2 * np.cos(angle))
        first = (place + slices // 3) % (slices - extent + 1)
        for index in range(first, first + extent):
            radius = side * 0.09 * np.sin(np.pi * (index - first + 1) / (extent + 1))
            labels[index][((rows - row) / 1.3) ** 2 + (columns - column) ** 2 <= max(radius, 0.6) ** 2] = label
    return labels


def hounsfield(labels: NDArray[np.uint8], seed: int = 0) -> NDArray[np.int16]:
    """HU ``(N, H, W)`` of a schematic head with blood of 68 HU where the labels say."""
    slices, side, _ = labels.shape
    rows, columns = (np.ogrid[:side, :side][axis] / side - 0.5 for axis in (0, 1))
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(0, 12, labels.shape), (0, 0.8, 0.8))
    volume = np.full(labels.shape, -1000.0)
    for index in range(slices):
        scale = 0.75 + 0.25 * np.sin(np.pi * (index + 1) / (slices + 1))
        head = np.hypot(rows / (0.47 * scale), columns / (0.38 * scale))
        volume[index][head < 1.0] = 40
        volume[index][head < 0.96] = 900
        volume[index][head < 0.87] = 12
        volume[index][head < 0.84] = 37
        volume[index][(head < 0.74) & (np.abs(np.sin(9 * np.arctan2(rows, columns))) > 0.1)] = 30
        volume[index][(np.abs(columns) < 0.004) & (head < 0.84)] = 50
        volume[index][np.hypot((np.abs(columns) - 0.06) / 0.035, (rows + 0.02) / 0.12) < 1] = 8
    volume[labels > 0] = 68
    inside = volume > -500
    volume[inside] += noise[inside]
    return np.rint(volume).astype(np.int16)


def report(
    sources: Sequence[Dataset],
    labels: NDArray[np.uint8],
    *,
    provisional: bool = False,
    missing: tuple[str, ...] = (),
    below_threshold: tuple[tuple[str, float], ...] = (),
    names: Sequence[str] = NAMES,
) -> Report:
    """The report on label maps, measured with the stack's own thickness."""
    geometry = stack({str(source.SOPInstanceUID): plane(source) for source in sources})
    hidden = {name for name, _ in below_threshold}
    findings = []
    for label, name in enumerate(names):
        voxels = (labels == label).sum(axis=(1, 2))
        if label == 0 or name in hidden or not voxels.any():
            continue
        volume_ml = float(voxels @ geometry.voxel_ml)
        findings.append(
            Finding(
                label=label,
                name=name,
                volume_ml=volume_ml,
                components=1,
                largest_ml=volume_ml,
                abc2_ml=1.1 * volume_ml,
                probability=0.97 - 0.01 * label,
                keys=tuple(key for key, count in zip(geometry.keys, voxels, strict=True) if count),
                key_slice=geometry.keys[int(np.argmax(voxels))],
            )
        )
    findings.sort(key=lambda finding: -finding.volume_ml)
    found = {finding.name for finding in findings}
    largest = f"{findings[0].name} {findings[0].volume_ml:.1f} ml" if findings else "no hemorrhage above the threshold"
    return Report(
        findings=tuple(findings),
        absent=tuple(name for name in names[1:] if name not in found),
        below_threshold=below_threshold,
        decision=Decision(level="critical" if findings else "routine", reason=f"Largest finding: {largest}."),
        model=MODEL,
        slices=len(sources),
        provisional=provisional,
        missing=missing,
        thickness_mm=(float(geometry.thickness_mm.min()), float(geometry.thickness_mm.max())),
        coverage_mm=geometry.coverage_mm,
        tilt_deg=geometry.tilt_deg,
    )


@dataclass(frozen=True, slots=True)
class ResultSet:
    """What one analysis sends.

    Attributes
    ----------
    seg : Segmentation; None for a negative study, since viewers hang on an empty one
    sr : Comprehensive 3D SR, TID 1500
    sc : Secondary Captures: an overview, then the key slices, the most telling first
    pdf : the report as Encapsulated PDF, where it is wanted
    notice : in place of all these: a page that says why the series was not analysed

    """

    seg: Dataset | None = None
    sr: Dataset | None = None
    sc: tuple[Dataset, ...] = ()
    pdf: Dataset | None = None
    notice: Dataset | None = None

    @classmethod
    def of(cls, made: Iterable[tuple[str, Dataset]]) -> ResultSet:
        """What `dicom_node.results.result_set.make` gives."""
        named = dict(made)
        pictures = tuple(dataset for name, dataset in named.items() if name.startswith("sc-"))
        return cls(sc=pictures, **{name: dataset for name, dataset in named.items() if not name.startswith("sc-")})

    def __iter__(self) -> Iterator[tuple[str, Dataset]]:
        """What there is, by name: ``"notice"``, ``"seg"``, ``"sr"``, ``"sc-1"`` and so on."""
        one_each = {"notice": self.notice, "seg": self.seg, "sr": self.sr, "pdf": self.pdf}
        yield from ((name, dataset) for name, dataset in one_each.items() if dataset is not None)
        yield from ((f"sc-{number}", image) for number, image in enumerate(self.sc, start=1))


def build(*arguments: Any, **options: Any) -> ResultSet:
    """All that `dicom_node.results.result_set.make` makes of the same arguments."""
    return ResultSet.of(result_set.make(*arguments, **options))


@dataclass(frozen=True)
class Case:
    """One analysed series: what `dicom_node.results.result_set.make` is given."""

    sources: list[Dataset]
    labels: NDArray[np.uint8]
    hu: NDArray[np.int16]
    report: Report
    revision: int = 1

    @property
    def grey(self) -> NDArray[np.uint8]:
        return grey(self.hu, BRAIN)

    @property
    def keys(self) -> list[str]:
        return [str(source.SOPInstanceUID) for source in self.sources]

    def pictured(self) -> dict[str, NDArray[np.uint8]]:
        shown = dict(zip(self.keys, self.grey, strict=True))
        return montage.pictured(self.report, self.keys, lambda key: reduced(shown[key]), shown.__getitem__)

    def build(self, form: result_set.Form = result_set.USUAL) -> ResultSet:
        return build(
            self.sources,
            self.labels,
            self.pictured(),
            self.report,
            revision=self.revision,
            started=STARTED,
            predecessor=built("one finding").sr if self.revision == 2 else None,
            form=form,
        )


def _case(
    *,
    classes: Sequence[int] = (2,),
    extent: int = 4,
    revision: int = 1,
    header: dict[str, Any] | None = None,
    **told: Any,
) -> Case:
    sources = headers(**(header or {}))
    labels = bleeds(classes=classes, extent=extent)
    return Case(sources, labels, hounsfield(labels), report(sources, labels, **told), revision)


def cases() -> dict[str, Case]:
    """Every kind of study that the writers must get right, by name."""
    poor = (
        "PatientBirthDate PatientSex StudyDate StudyTime AccessionNumber StudyID ReferringPhysicianName SliceThickness "
        "FrameOfReferenceUID PositionReferenceIndicator Manufacturer SeriesNumber InstanceNumber StudyDescription"
    )
    return {
        "one finding": _case(),
        "six findings": _case(classes=(1, 2, 3, 4, 5, 6)),
        "tilt": _case(classes=(1, 4), header={"tilt_deg": 20.0}),
        "step change": _case(classes=(1, 4), header={"tilt_deg": 18.5, "steps_mm": (4.0, 7.0)}),
        "two slices": _case(classes=(5,), extent=2),
        "negative": _case(classes=()),
        "below threshold": _case(classes=(1, 2), below_threshold=(("subdural", 0.2),)),
        "provisional": _case(provisional=True, missing=("2 slices missing: a step of 15.0 mm after slice 6",)),
        "revision 2": _case(revision=2),
        "foreign class": _case(names=("background", "other", "hygroma_of_the_brain")),
        "poor source": _case(header={"without": poor.split()}),
    }


@functools.cache
def built(name: str) -> ResultSet:
    """The results of a case, built once for all tests; only to be read."""
    return cases()[name].build()
