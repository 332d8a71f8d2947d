"""Multi-frame CT (Enhanced and Legacy Converted Enhanced, PS3.3 A.38, A.70) as the single-frame images it stands for.

Each frame becomes an image of its own: where a single-frame image has its position, spacing, rescale and type, stands
what the functional groups say of the frame, and its pixel data are the frame's. So nothing behind this module knows of
frames but by their number. They are read from the file one after the other: 500 take no more memory than 5.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, BinaryIO

from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.tag import Tag

from dicom_node.images.gate import MULTI_FRAME, NotAnalysed, Reason
from dicom_node.images.part10 import opened

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pydicom.dataset import FileDataset
    from pydicom.tag import BaseTag

# Functional group macros (PS3.3 C.7.6.16.2, C.8.15.3), and what of them a single-frame image has itself. Beside the
# groups an image may say none of it, but for its ImageType, which stands for all frames that have no type of their own.
_OF_FRAME = {
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness"),
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelValueTransformationSequence": ("RescaleIntercept", "RescaleSlope", "RescaleType"),
    "CTReconstructionSequence": ("ConvolutionKernel",),
    "UnassignedSharedConvertedAttributesSequence": ("ConvolutionKernel",),
}
_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_OFFSETS = ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")
_NOT_OF_IMAGE = tuple(
    map(Tag, (*_GROUPS, *_OFFSETS, "NumberOfFrames", *(key for keys in _OF_FRAME.values() for key in keys)))
)

_PIXEL_DATA = Tag("PixelData")
_ITEM, _DELIMITER, _UNDEFINED = 0xFFFEE000, 0xFFFEE0DD, 0xFFFFFFFF
_END_OF_IMAGE = b"\xff\xd9"  # closes a frame of JPEG, JPEG-LS and JPEG 2000; a byte of padding may follow


def read(path: Path, only: int | None = None) -> Iterator[Dataset]:
    """Each image of a file, whole: the one that it is, or its frames in their order.

    Parameters
    ----------
    path : any DICOM file
    only : give this frame alone

    Raises
    ------
    NotAnalysed : a multi-frame image that can't be taken apart
    Exception : whatever pydicom raises on bytes that are no DICOM

    """
    stop = _Stop()
    with path.open("rb", buffering=0) as file:
        image, source = opened(file, stop)
        if image.get("SOPClassUID") not in MULTI_FRAME:
            if stop.has_groups:
                file.seek(0)
                image, _ = opened(file, lambda *_: False)
            yield image
            return
        groups = _groups(image)
        pixels = _Pixels(source, image, len(groups))
        shared = (image.get(_GROUPS[0]) or [Dataset()])[0]
        common = {tag: element for tag, element in image.items() if tag not in _NOT_OF_IMAGE}
        for number, own in enumerate(groups, start=1):
            if only in (None, number):
                frame = Dataset(common.copy())
                frame.set_original_encoding(*image.original_encoding, image.original_character_set)
                frame.file_meta = image.file_meta
                _describe(frame, shared, own)
                frame.ReferencedFrameNumber = number
                frame.add(pixels.element(number - 1))
                yield frame


class _Stop:
    """Leaves the pixel data of an image with functional groups in the file."""

    has_groups = False

    def __call__(self, tag: BaseTag, _vr: str | None, _length: int) -> bool:
        self.has_groups |= tag >> 16 == 0x5200
        return self.has_groups and tag == _PIXEL_DATA


def _groups(image: FileDataset) -> list[Dataset]:
    """The functional groups of each frame.

    Raises
    ------
    NotAnalysed : they are not there, or there are more or fewer than frames

    """
    for keyword in _GROUPS:
        raw = image.get_item(keyword)
        if raw is not None and isinstance(raw.value, bytes) and len(raw.value) < raw.length:
            raise NotAnalysed(Reason.TRUNCATED)
    groups, count = image.get(_GROUPS[1]) or (), image.get("NumberOfFrames") or 0
    if not groups or len(groups) != count:
        raise NotAnalysed(Reason.NO_FUNCTIONAL_GROUPS, f"{count} frames, groups of {len(groups)}")
    return groups


def _describe(frame: Dataset, *levels: Dataset) -> None:
    """Put what functional groups say where a single-frame image has it; a frame's own come last and win."""
    for groups in levels:
        for sequence, keywords in _OF_FRAME.items():
            for item in groups.get(sequence) or ():
                for keyword in keywords:
                    if keyword in item:
                        frame.add(item[keyword])
        for item in groups.get("CTImageFrameTypeSequence") or ():
            if "FrameType" in item:
                frame.add_new("ImageType", "CS", item.FrameType)  # a new entry: the old one is all frames'


class _Pixels:
    """Where the frames' pixel data lie in a file.

    Parameters
    ----------
    file : at its pixel data
    image : its header
    count : how many frames it has

    Raises
    ------
    NotAnalysed : there are no pixel data, or not of so many frames

    """

    def __init__(self, file: BinaryIO, image: FileDataset, count: int) -> None:
        self._file, self._is_encapsulated = file, image.file_meta.TransferSyntaxUID.is_encapsulated
        is_implicit, is_little_endian = image.original_encoding
        order = "<" if is_little_endian else ">"
        head = file.read(8 if is_implicit else 12)
        if len(head) < 8:
            raise NotAnalysed(Reason.TRUNCATED if head else Reason.NO_PIXEL_DATA)
        self._vr = "OW" if is_implicit else head[4:6].decode("latin-1")
        (length,) = struct.unpack(f"{order}L", head[-4:])
        begins, size = file.tell(), file.seek(0, 2)
        if self._is_encapsulated:
            file.seek(begins)
            self._parts = _frames_of(file, _items(file), count)
            return
        if length == _UNDEFINED:
            raise NotAnalysed(Reason.UNREADABLE, "pixel data that are not compressed and tell no length")
        frame_bytes = image.Rows * image.Columns * image.SamplesPerPixel * image.BitsAllocated // 8
        if length < count * frame_bytes or begins + count * frame_bytes > size:
            raise NotAnalysed(
                Reason.TRUNCATED, f"{count} frames of {frame_bytes} bytes in {min(length, size - begins)}"
            )
        self._parts = [[(begins + index * frame_bytes, frame_bytes)] for index in range(count)]

    def element(self, index: int) -> DataElement:
        """PixelData of a frame, as a single-frame image has it."""
        parts = []
        for offset, length in self._parts[index]:
            self._file.seek(offset)
            parts.append(self._file.read(length))
        value = b"".join(parts)
        return DataElement(
            _PIXEL_DATA, self._vr, encapsulate([value], has_bot=False) if self._is_encapsulated else value
        )


def _items(file: BinaryIO) -> list[tuple[int, int]]:
    """Offset and length of each item of encapsulated pixel data: the basic offset table, then fragments (PS3.5 A.4)."""
    items = []
    while True:
        head = file.read(8)
        if len(head) < 8:
            raise NotAnalysed(Reason.TRUNCATED)
        group, element, length = struct.unpack("<HHL", head)
        tag = group << 16 | element
        if tag == _DELIMITER:
            break
        if tag != _ITEM or length == _UNDEFINED:
            raise NotAnalysed(Reason.UNREADABLE, "what should be a fragment of pixel data is none")
        items.append((file.tell(), length))
        file.seek(length, 1)
    return items


def _frames_of(file: BinaryIO, items: list[tuple[int, int]], count: int) -> list[list[tuple[int, int]]]:
    """The fragments of each frame.

    Most images have one for each. Where there are more, the offset table says at which a frame begins, or the
    fragments themselves say where one ends. Extended offset tables are for one fragment a frame (PS3.3 C.7.6.3.1.8).
    """
    table, *fragments = items or [(0, 0)]
    if len(fragments) < count:
        raise NotAnalysed(Reason.TRUNCATED, f"{count} frames in {len(fragments)} fragments")
    if len(fragments) == count:
        return [[fragment] for fragment in fragments]
    begins = [0]
    if table[1] == 4 * count:
        file.seek(table[0])
        offsets = struct.unpack(f"<{count}L", file.read(table[1]))
        places = {offset - fragments[0][0]: index for index, (offset, _) in enumerate(fragments)}
        begins = [places.get(offset, -1) for offset in offsets]
    else:
        for index, (offset, length) in enumerate(fragments, start=1):
            file.seek(offset + max(length - 3, 0))
            if _END_OF_IMAGE in file.read(3):
                begins.append(index)
        begins = begins[:-1]
    if len(begins) != count or begins[0] != 0 or begins != sorted(set(begins)):
        raise NotAnalysed(Reason.UNREADABLE, f"it can't be told which of {len(fragments)} fragments are which frame's")
    return [fragments[first:last] for first, last in zip(begins, [*begins[1:], None], strict=True)]
