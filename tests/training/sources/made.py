"""Small DICOM series with exact masks: tilted, uneven, written with plain pydicom and highdicom, and loaded."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import nibabel
import numpy as np
from highdicom.content import AlgorithmIdentificationSequence
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentDescription
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.coding import Code
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RTStructureSetStorage

from runtime.types import Plane
from training.sources import dicom

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

PATIENT = "SECRET-4711"  # must stand in no message
SHAPE = (26, 29)  # rows and columns differ, so that nothing can be transposed unseen; rows enough for a tilt to show
SPACING_MM = (0.5, 0.4)
STUDY, SERIES, FRAME = "1.2.3", "1.2.3.4", "1.2.3.9"


def planes(
    steps_mm: Sequence[float] = (5.0, 5.0, 5.0, 5.0), tilt_deg: float = 0.0, thickness_mm: float | None = None
) -> list[Plane]:
    """Planes from foot to head, one more than table steps, each as thick as the step before it if nothing is said."""
    tilt = np.radians(tilt_deg)
    table = np.concatenate([[0.0], np.cumsum(steps_mm)])
    thicknesses = [steps_mm[0], *steps_mm]
    return [
        Plane(
            origin_lps=(-101.25, -88.5, round(float(z), 6) - 20.0),
            row_lps=(1.0, 0.0, 0.0),
            column_lps=(0.0, float(np.cos(tilt)), float(np.sin(tilt))),
            spacing_mm=SPACING_MM,
            thickness_mm=float(thickness_mm or thick),
        )
        for z, thick in zip(table, thicknesses, strict=True)
    ]


def hounsfield(slices: int, shape: tuple[int, int] = SHAPE, seed: int = 1) -> NDArray[np.int16]:
    """Values ``(N, H, W)``, every one different enough to tell pixels apart."""
    return np.random.default_rng(seed).integers(-1000, 3000, (slices, *shape)).astype(np.int16)


def image(plane: Plane, hu: NDArray[np.int16], number: int, *, patient: str = PATIENT, series: str = SERIES) -> Dataset:
    """One CT slice; stored values are HU + 1,024."""
    one = Dataset()
    one.SpecificCharacterSet = "ISO_IR 192"
    one.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    one.SOPClassUID, one.SOPInstanceUID = CTImageStorage, f"{series}.{number}"
    one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID = STUDY, series, FRAME
    one.StudyDate, one.StudyTime, one.AccessionNumber, one.StudyID = "20260101", "120000", "", ""
    one.Modality, one.Manufacturer, one.ReferringPhysicianName = "CT", "phantom", ""
    one.PatientName, one.PatientID, one.PatientBirthDate, one.PatientSex = f"{patient}^X", patient, "", "O"
    one.SeriesNumber, one.InstanceNumber, one.PositionReferenceIndicator = 1, number, ""
    one.ImagePositionPatient = [f"{v:.6f}" for v in plane.origin_lps]
    one.ImageOrientationPatient = [f"{v:.8f}" for v in (*plane.row_lps, *plane.column_lps)]
    one.PixelSpacing = [f"{v:g}" for v in plane.spacing_mm]
    one.SliceThickness = f"{plane.thickness_mm:g}" if plane.thickness_mm else None
    one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
    one.Rows, one.Columns = hu.shape
    one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 0
    one.RescaleIntercept, one.RescaleSlope = "-1024", "1"
    one.PixelData = (hu.astype(np.int32) + 1024).astype("<u2").tobytes()
    one.file_meta = FileMetaDataset()
    one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return one


def series(where: Sequence[Plane], hu: NDArray[np.int16], **identity: str) -> list[Dataset]:
    """Slices in the order of their planes."""
    return [image(plane, one, i, **identity) for i, (plane, one) in enumerate(zip(where, hu, strict=True), start=1)]


def write(datasets: Sequence[Dataset], folder: Path) -> list[Path]:
    """Files in another order than the slices: their names must not matter."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{(7 * i) % 101:03d}.dcm" for i in range(1, len(datasets) + 1)]
    for dataset, path in zip(datasets, paths, strict=True):
        dataset.save_as(path, enforce_file_format=True)
    return paths


def segmentation(
    sources: Sequence[Dataset], labels: NDArray[np.uint8], names: Sequence[str], **more: object
) -> Dataset:
    """A SEG by highdicom; segment n is label n of a label map ``(N, H, W)``, or channel n - 1 of ``(N, H, W, S)``."""
    blood = Code("50960005", "SCT", "Hemorrhage")
    describe = [
        SegmentDescription(
            number,
            name,
            Code("49755003", "SCT", "Morphologically Abnormal Structure"),
            blood,
            SegmentAlgorithmTypeValues.AUTOMATIC,
            AlgorithmIdentificationSequence("made", Code("123109", "DCM", "Manual Processing"), "1"),
        )
        for number, name in enumerate(names, start=1)
    ]
    return Segmentation(
        source_images=list(sources),
        pixel_array=labels,
        segmentation_type=more.pop("segmentation_type", "BINARY"),
        segment_descriptions=describe,
        series_instance_uid="1.2.3.5",
        series_number=5,
        sop_instance_uid="1.2.3.5.1",
        instance_number=1,
        manufacturer="made",
        manufacturer_model_name="made",
        software_versions="1",
        device_serial_number="1",
        **more,
    )


def contour(plane: Plane, pixels: Sequence[tuple[float, float]], uid: str | None = None) -> Dataset:
    """A closed contour by rows and columns in a slice's plane."""
    down, across = (np.array(pixels, float) * plane.spacing_mm).T
    points = np.array(plane.origin_lps) + np.outer(down, plane.column_lps) + np.outer(across, plane.row_lps)
    item = Dataset()
    item.ContourGeometricType, item.NumberOfContourPoints = "CLOSED_PLANAR", len(points)
    item.ContourData = [f"{value:.5f}" for value in points.ravel()]
    if uid:
        reference = Dataset()
        reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = CTImageStorage, uid
        item.ContourImageSequence = [reference]
    return item


def structures(rois: dict[str, list[Dataset]], *, series_uid: str | None = SERIES, frame: str = FRAME) -> Dataset:
    """A structure set with the contours of each structure."""
    one = Dataset()
    one.SOPClassUID, one.SOPInstanceUID = RTStructureSetStorage, "1.2.3.6.1"
    one.StudyInstanceUID, one.SeriesInstanceUID, one.PatientID, one.Modality = STUDY, "1.2.3.6", PATIENT, "RTSTRUCT"
    one.ReferencedFrameOfReferenceSequence = [Dataset()]
    one.ReferencedFrameOfReferenceSequence[0].FrameOfReferenceUID = frame
    if series_uid:
        study, of_series = Dataset(), Dataset()
        of_series.SeriesInstanceUID = series_uid
        study.RTReferencedSeriesSequence = [of_series]
        one.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence = [study]
    names, drawn = [], []
    for number, (name, contours) in enumerate(rois.items(), start=1):
        described, outlined = Dataset(), Dataset()
        described.ROINumber, described.ROIName, described.ReferencedFrameOfReferenceUID = number, name, frame
        outlined.ReferencedROINumber, outlined.ContourSequence = number, contours
        names.append(described)
        drawn.append(outlined)
    one.StructureSetROISequence, one.ROIContourSequence = names, drawn
    one.file_meta = FileMetaDataset()
    one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return one


def affine_ras(where: Sequence[Plane]) -> NDArray[np.float64]:
    """Affine of a NIfTI with column, row and slice as its axes, sheared where the series is; for even steps."""
    first, last = where[0], where[-1]
    step = (np.array(last.origin_lps) - first.origin_lps) / max(len(where) - 1, 1)
    axes = (
        np.array(first.row_lps) * first.spacing_mm[1],
        np.array(first.column_lps) * first.spacing_mm[0],
        step,
        first.origin_lps,
    )
    affine = np.eye(4)
    affine[:3] = np.diag([-1, -1, 1]) @ np.array(axes).T
    return affine


NAMES = {"Subdural": 2, "Epidural": 3}
UPRIGHT, TILTED, UNEVEN = planes(), planes(tilt_deg=20.0), planes((4.0, 4.0, 7.0, 7.0), tilt_deg=-18.0)
OUTLINE = [(2, 3), (2, 11), (24, 11), (24, 3)]  # rows 2 to 23, columns 3 to 10
HOLE = [(4, 5), (4, 8), (20, 8), (20, 5)]


def truth(slices: int = 5) -> np.ndarray:
    """A label map ``(N, H, W)`` that no turn, mirror or shift leaves as it is; segments 1 and 2."""
    labels = np.zeros((slices, *SHAPE), np.uint8)
    for i in range(slices):
        labels[i, 1 : 4 + i, 2:9] = 1
        labels[i, 5:7, 10 : 12 + i % 3] = 2
    labels[0] = 0
    return labels


def load(folder, classes=NAMES, **options):
    (entry,) = dicom.entries(folder, classes=classes, **options)
    return pickle.loads(pickle.dumps(entry)).load()


def with_segmentation(folder, where=UPRIGHT, labels=None, **more):
    """A series with a segmentation below the folder; the HU, and the segmentation's path."""
    hu = hounsfield(len(where))
    sources = series(where, hu)
    write(sources, folder / "ct")
    made = segmentation(sources, truth() if labels is None else labels, list(NAMES), **more)
    made.save_as(folder / "seg.dcm")
    return hu, folder / "seg.dcm"


def with_structures(folder, rois, where=UPRIGHT, **more):
    write(series(where, hounsfield(len(where))), folder / "ct")
    structures(rois, **more).save_as(folder / "rt.dcm", enforce_file_format=True)


def with_nifti(folder, values, affine, where=UPRIGHT):
    write(series(where, hounsfield(len(where))), folder / "ct")
    nibabel.save(nibabel.Nifti1Image(values, affine), folder / "ct/mask.nii.gz")


def change(path, **values):
    """Set attributes of a file; None removes one."""
    one = dcmread(path)
    for keyword, value in values.items():
        if value is None:
            delattr(one, keyword)
        else:
            setattr(one, keyword, value)
    one.save_as(path)
