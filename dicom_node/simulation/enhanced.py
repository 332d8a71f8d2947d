"""Slices to Enhanced CT (PS3.3 A.38): the phantom as scanners store it that write one object for many slices."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import EnhancedCTImageStorage, ExplicitVRLittleEndian
from pydicom.valuerep import format_number_as_ds

from dicom_node.results.uids import derive
from dicom_node.simulation import phantom

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pydicom.sr.coding import Code

    from runtime.types import Slice

TYPE = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]


def write(slices: Sequence[Slice], folder: Path, *, tilt_deg: float = 0.0, images: int = 1) -> list[Path]:
    """Write slices as frames of one Enhanced CT Image Storage file, or of several, explicit VR little endian.

    Parameters
    ----------
    slices : in the order of their frames
    folder : made if it is not there
    tilt_deg : for GantryDetectorTilt; the geometry itself is in the slices' planes
    images : over how many files the slices are spread

    """
    folder.mkdir(parents=True, exist_ok=True)
    identity = phantom.identify(slices)
    paths = []
    for number, part in enumerate(np.array_split(np.arange(len(slices)), images), start=1):
        paths.append(folder / f"enhanced-{number:02d}.dcm")
        image = _image(phantom.study(identity), [slices[i] for i in part], number, identity, tilt_deg)
        image.save_as(paths[-1], enforce_file_format=True)
    return paths


def _image(study: Dataset, slices: Sequence[Slice], number: int, identity: str, tilt_deg: float) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    meta.MediaStorageSOPInstanceUID = derive("enhanced phantom instance", identity, str(number))
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    for keyword in ("KVP", "ConvolutionKernel", "AcquisitionDate"):  # said in the functional groups
        delattr(study, keyword)
    image = FileDataset(None, study, file_meta=meta, preamble=b"\0" * 128)  # type: ignore[arg-type]
    image.SOPClassUID, image.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    image.SeriesInstanceUID = derive("enhanced phantom series", identity)  # beside the single-frame one's, not in it
    image.DeviceSerialNumber, image.SoftwareVersions = "0", "0"
    image.ImageType, image.InstanceNumber = TYPE, number
    image.AcquisitionNumber, image.AcquisitionDateTime, image.AcquisitionDuration = 1, "20260101120000", 10.0
    image.ContentTime = "120000"
    image.PixelPresentation, image.VolumetricProperties = "MONOCHROME", "VOLUME"
    image.VolumeBasedCalculationTechnique, image.ContentQualification = "NONE", "RESEARCH"
    image.MultienergyCTAcquisition, image.BurnedInAnnotation = "NO", "NO"
    image.PresentationLUTShape, image.LossyImageCompression = "IDENTITY", "00"
    image.AcquisitionContextSequence = []
    _organise(image, derive("enhanced phantom dimensions", identity))
    phantom.put_pixels(image, slices)
    image.NumberOfFrames = len(slices)
    image.SharedFunctionalGroupsSequence = [_shared(slices[0], identity, tilt_deg)]
    image.PerFrameFunctionalGroupsSequence = [_frame(one, place) for place, one in enumerate(slices, start=1)]
    return image


def _organise(image: FileDataset, uid: str) -> None:
    """Multi-frame Dimension Module (PS3.3 C.7.6.17): stack, and place in it."""
    image.DimensionOrganizationSequence = [_item(DimensionOrganizationUID=uid)]
    group = 0x00209111  # FrameContentSequence
    image.DimensionIndexSequence = [
        _item(DimensionOrganizationUID=uid, DimensionIndexPointer=pointer, FunctionalGroupPointer=group)
        for pointer in (0x00209056, 0x00209057)  # StackID, InStackPositionNumber
    ]


def _frame(one: Slice, place: int) -> Dataset:
    plane = one.plane
    thickness = {"SliceThickness": _decimal(plane.thickness_mm)} if plane.thickness_mm else {}
    when = (phantom.STARTED + timedelta(seconds=0.5 * place)).strftime("%Y%m%d%H%M%S.%f")
    return _item(
        FrameContentSequence=[
            _item(
                FrameAcquisitionNumber=1,
                FrameReferenceDateTime=when,
                FrameAcquisitionDateTime=when,
                FrameAcquisitionDuration=500.0,
                StackID="1",
                InStackPositionNumber=place,
                DimensionIndexValues=[1, place],
            )
        ],
        PlanePositionSequence=[_item(ImagePositionPatient=[_decimal(v) for v in plane.origin_lps])],
        PlaneOrientationSequence=[
            _item(ImageOrientationPatient=[_decimal(v) for v in (*plane.row_lps, *plane.column_lps)])
        ],
        PixelMeasuresSequence=[_item(PixelSpacing=[_decimal(v) for v in plane.spacing_mm], **thickness)],
    )


def _shared(first: Slice, identity: str, tilt_deg: float) -> Dataset:
    """What an Enhanced CT has to say of how it was made (PS3.3 C.8.15.3): of a phantom most of it is invented."""
    return _item(
        FrameAnatomySequence=[
            _item(FrameLaterality="U", AnatomicRegionSequence=[_code(codes.SCT.Head)]),
        ],
        PixelValueTransformationSequence=[
            _item(RescaleIntercept=phantom.INTERCEPT, RescaleSlope=1, RescaleType="HU"),
        ],
        FrameVOILUTSequence=[_item(WindowCenter=40, WindowWidth=80)],
        CTImageFrameTypeSequence=[
            _item(
                FrameType=TYPE,
                PixelPresentation="MONOCHROME",
                VolumetricProperties="VOLUME",
                VolumeBasedCalculationTechnique="NONE",
            )
        ],
        IrradiationEventIdentificationSequence=[_item(IrradiationEventUID=derive("phantom exposure", identity))],
        CTAcquisitionTypeSequence=[
            _item(AcquisitionType="SEQUENCED", ConstantVolumeFlag="NO", FluoroscopyFlag="NO"),
        ],
        CTAcquisitionDetailsSequence=[
            _item(
                RotationDirection="CW",
                RevolutionTime=1.0,
                SingleCollimationWidth=5.0,
                TotalCollimationWidth=5.0,
                TableHeight=0.0,
                GantryDetectorTilt=float(tilt_deg),
                DataCollectionDiameter=500.0,
            )
        ],
        CTTableDynamicsSequence=[_item(TableSpeed=0.0, TableFeedPerRotation=0.0, SpiralPitchFactor=0.0)],
        CTPositionSequence=[
            _item(
                TablePosition=0.0,
                DataCollectionCenterPatient=[0.0] * 3,
                ReconstructionTargetCenterPatient=[0.0] * 3,
            )
        ],
        CTGeometrySequence=[_item(DistanceSourceToDetector=1000.0, DistanceSourceToDataCollectionCenter=500.0)],
        CTReconstructionSequence=[
            _item(
                ReconstructionAlgorithm="FILTER_BACK_PROJ",
                ConvolutionKernel="SOFT",
                ConvolutionKernelGroup="BRAIN",
                ReconstructionPixelSpacing=list(first.plane.spacing_mm),
                ReconstructionFieldOfView=[
                    n * mm for n, mm in zip(first.hu.shape, first.plane.spacing_mm, strict=True)
                ],
                ReconstructionAngle=360.0,
                ImageFilter="NONE",
            )
        ],
        CTExposureSequence=[
            _item(
                ExposureTimeInms=1000.0,
                XRayTubeCurrentInmA=200.0,
                ExposureInmAs=200.0,
                ExposureModulationType="NONE",
            )
        ],
        CTXRayDetailsSequence=[
            _item(KVP="120", FocalSpots=[1.0], FilterType="FLAT", FilterMaterial="ALUMINUM"),
        ],
    )


def _item(**attributes: Any) -> Dataset:
    item = Dataset()
    for keyword, value in attributes.items():
        setattr(item, keyword, value)
    return item


def _code(code: Code) -> Dataset:
    return _item(CodeValue=code.value, CodingSchemeDesignator=code.scheme_designator, CodeMeaning=code.meaning)


def _decimal(value: float) -> str:
    return format_number_as_ds(float(value))
