"""Enhanced CT of a few small slices, as scanners and archives encode it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from pydicom import dcmread, dcmwrite
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, encapsulate_extended, generate_frames
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from dicom_node.simulation import enhanced, phantom

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from pydicom.dataset import FileDataset

    from runtime.types import Slice


def changed(path: Path, change: Callable[[FileDataset], object]) -> Path:
    """A file after a change of its data set."""
    dataset = dcmread(path)
    change(dataset)
    dcmwrite(path, dataset)
    return path


def encoded(dataset: FileDataset) -> list[bytes]:
    """The frames of a compressed image as they are encoded."""
    return list(generate_frames(dataset.PixelData, number_of_frames=dataset.NumberOfFrames))


def compress(syntax: str, fragments: int = 1, table: str = "basic") -> Callable[[FileDataset], None]:
    """Compress frame by frame, each cut into so many fragments, with a basic, an extended or no offset table."""

    def change(dataset: FileDataset) -> None:
        dataset.compress(syntax, generate_instance_uid=False)
        frames = encoded(dataset)
        if table == "extended":
            dataset.PixelData, dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths = encapsulate_extended(
                frames
            )
        else:
            dataset.PixelData = encapsulate(frames, fragments_per_frame=fragments, has_bot=table == "basic")
        dataset["PixelData"].is_undefined_length = True

    return change


def big_endian(dataset: FileDataset) -> None:
    dataset.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()


def in_syntax(syntax: str) -> Callable[[FileDataset], None]:
    return lambda dataset: setattr(dataset.file_meta, "TransferSyntaxUID", syntax)


ENCODINGS: dict[str, Callable[[FileDataset], None]] = {
    "explicit": in_syntax(ExplicitVRLittleEndian),
    "implicit": in_syntax(ImplicitVRLittleEndian),
    "deflated": in_syntax(DeflatedExplicitVRLittleEndian),
    "big endian": big_endian,
    "RLE": compress(RLELossless),
    "RLE without offsets": compress(RLELossless, table="none"),
    "JPEG-LS": compress(JPEGLSLossless),
    "JPEG-LS in fragments": compress(JPEGLSLossless, 3),
    "JPEG-LS in fragments without offsets": compress(JPEGLSLossless, 3, "none"),
    "JPEG 2000": compress(JPEG2000Lossless, table="none"),
    "JPEG 2000 with extended offsets": compress(JPEG2000Lossless, table="extended"),
}


def rescale_per_frame(dataset: FileDataset) -> None:
    """Another slope and intercept for each frame, and stored values that give the same HU."""
    hu = dataset.pixel_array.astype(np.int32) + phantom.INTERCEPT
    shared = dataset.SharedFunctionalGroupsSequence[0]
    del shared.PixelValueTransformationSequence
    stored = []
    for number, own in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        slope, intercept = (1, 0.5)[number % 2], -1024 - number
        item = Dataset()
        item.RescaleSlope, item.RescaleIntercept, item.RescaleType = slope, intercept, "HU"
        own.PixelValueTransformationSequence = [item]
        stored.append(((hu[number] - intercept) / slope).astype("<u2"))
    dataset.BitsStored, dataset.HighBit = 16, 15
    dataset.PixelData = np.stack(stored).tobytes()


def legacy(slices: Sequence[Slice], folder: Path) -> Path:
    """The slices as Legacy Converted Enhanced CT, made by highdicom of single-frame images."""
    sources = [dcmread(path) for path in phantom.write(slices, folder / "single")]
    converted = LegacyConvertedEnhancedCTImage(
        legacy_datasets=sources,
        series_instance_uid="1.2.3.4.5",
        series_number=7,
        sop_instance_uid="1.2.3.4.5.6",
        instance_number=1,
    )
    converted.save_as(folder / "legacy.dcm")
    return folder / "legacy.dcm"


def write(slices: Sequence[Slice], folder: Path, **how: int) -> Path:
    """One Enhanced CT of the slices."""
    (path,) = enhanced.write(slices, folder, **how)
    return path
