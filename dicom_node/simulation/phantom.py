"""Slices to a DICOM CT series, as a scanner would store it: for the demo, the tests and the benchmarks."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from pydicom.valuerep import format_number_as_ds

from dicom_node.results.uids import derive

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from runtime.types import Slice

INTERCEPT = -1024
STARTED = datetime(2026, 1, 1, 12, tzinfo=UTC)  # fixed: a phantom has no date of its own


def write(slices: Sequence[Slice], folder: Path, *, tilt_deg: float = 0.0) -> list[Path]:
    """Write one CT Image Storage file per slice (PS3.3 A.3), explicit VR little endian, 12 bits in 16.

    The UIDs are derived from the pixels and their geometry: the same phantom is the same study.

    Parameters
    ----------
    slices : in the order of their InstanceNumber
    folder : made if it is not there
    tilt_deg : for GantryDetectorTilt; the geometry itself is in the slices' planes

    """
    folder.mkdir(parents=True, exist_ok=True)
    identity = identify(slices)
    common = study(identity)
    paths = []
    for number, one in enumerate(slices, start=1):
        paths.append(folder / f"{number:04d}.dcm")
        _image(common, one, number, identity, tilt_deg).save_as(paths[-1], enforce_file_format=True)
    return paths


def identify(slices: Sequence[Slice]) -> str:
    """Name of a phantom: a hash of its pixels and their geometry."""
    content = hashlib.sha256()
    for one in slices:
        content.update(repr(one.plane).encode())
        content.update(one.hu.tobytes())
    return content.hexdigest()


def study(identity: str) -> Dataset:
    """What all slices share."""
    study = Dataset()
    study.SpecificCharacterSet = "ISO_IR 192"
    study.PatientName = "Phantom^Synthetic"
    study.PatientID = f"PHANTOM-{identity[:8].upper()}"
    study.PatientBirthDate = ""
    study.PatientSex = "O"
    study.StudyInstanceUID = derive("phantom study", identity)
    study.StudyDate = study.SeriesDate = study.AcquisitionDate = study.ContentDate = "20260101"
    study.StudyTime = study.SeriesTime = "120000"
    study.StudyID = identity[:8].upper()
    study.AccessionNumber = ""
    study.ReferringPhysicianName = ""
    study.StudyDescription = "Synthetic head CT, not a patient"
    study.Modality = "CT"
    study.SeriesInstanceUID = derive("phantom series", identity)
    study.SeriesNumber = 2
    study.SeriesDescription = "Head phantom"
    study.BodyPartExamined = "HEAD"
    study.PatientPosition = "HFS"
    study.FrameOfReferenceUID = derive("phantom frame of reference", identity)
    study.PositionReferenceIndicator = ""
    study.Manufacturer = "scanside"
    study.ManufacturerModelName = "phantom"
    study.KVP = "120"
    study.ConvolutionKernel = "SOFT"
    return study


def _image(study: Dataset, one: Slice, number: int, identity: str, tilt_deg: float) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = derive("phantom instance", identity, str(number))
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image = FileDataset(None, study, file_meta=meta, preamble=b"\0" * 128)  # type: ignore[arg-type]
    image.SOPClassUID, image.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    image.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    image.AcquisitionNumber = 1
    image.InstanceNumber = number
    taken = STARTED + timedelta(seconds=0.5 * number)
    image.AcquisitionTime = image.ContentTime = taken.strftime("%H%M%S.%f")
    plane = one.plane
    image.ImagePositionPatient = [format_number_as_ds(v) for v in plane.origin_lps]
    image.ImageOrientationPatient = [format_number_as_ds(v) for v in (*plane.row_lps, *plane.column_lps)]
    image.PixelSpacing = [format_number_as_ds(v) for v in plane.spacing_mm]
    image.SliceThickness = format_number_as_ds(float(plane.thickness_mm)) if plane.thickness_mm else None
    image.SliceLocation = format_number_as_ds(plane.origin_lps[2])
    image.GantryDetectorTilt = format_number_as_ds(float(tilt_deg))
    image.RescaleIntercept, image.RescaleSlope, image.RescaleType = INTERCEPT, 1, "HU"
    image.WindowCenter, image.WindowWidth = 40, 80
    put_pixels(image, [one])
    return image


def put_pixels(image: Dataset, slices: Sequence[Slice]) -> None:
    """Image Pixel Module (PS3.3 C.7.6.3) of an image that holds these slices."""
    image.SamplesPerPixel = 1
    image.PhotometricInterpretation = "MONOCHROME2"
    image.Rows, image.Columns = slices[0].hu.shape
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 12, 11, 0
    image.PixelData = b"".join(
        np.clip(one.hu.astype(np.int32) - INTERCEPT, 0, 4095).astype("<u2").tobytes() for one in slices
    )
