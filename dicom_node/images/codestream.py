"""What a compressed frame says of its own size: its decoder believes it, and allocates."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from pydicom.encaps import generate_frames
from pydicom.uid import RLELossless

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydicom.dataset import Dataset

_JPEG, _JPEG_2000, _JP2 = b"\xff\xd8", b"\xff\x4f\xff\x51", b"jP  "
_SCAN, _APP0 = 0xDA, 0xE0
# markers of a frame's header in the processes that DICOM has (ITU-T T.81 table B.1), and in JPEG-LS (T.87 annex C)
_FRAME_HEADERS = (0xC0, 0xC1, 0xC3, 0xF7)


def frames(image: Dataset, count: int) -> Iterator[bytes]:
    """Compressed frames, as pydicom hands them to a decoder."""
    offsets = image.get("ExtendedOffsetTable"), image.get("ExtendedOffsetTableLengths")
    return generate_frames(image.PixelData, number_of_frames=count, extended_offsets=offsets if all(offsets) else None)


def size(frame: bytes, syntax: str) -> tuple[int, int, int] | None:
    """Rows, columns and components that a frame begins with; None for RLE, which says none.

    Raises
    ------
    ValueError : it begins like nothing that a decoder reads

    """
    if syntax == RLELossless:
        return None
    try:
        return _jpeg(frame) if frame.startswith(_JPEG) else _jpeg_2000(frame)
    except (struct.error, IndexError) as error:
        raise ValueError("a compressed frame that is cut off in its header") from error


def _jpeg(frame: bytes) -> tuple[int, int, int]:
    """The frame header among the segments before the first scan (ITU-T T.81 annex B.2), if they are as they should be.

    GDCM ends the process where libjpeg would warn of them.
    """
    at, marker, sizes = 2, 0, []
    while marker != _SCAN:
        if frame[at] != 0xFF:
            raise ValueError("a JPEG frame with bytes between its segments")
        marker = frame[at + 1]
        if marker == 0xFF:  # fill
            at += 1
            continue
        (length,) = struct.unpack_from(">H", frame, at + 2)
        if marker in _FRAME_HEADERS:
            sizes.append(struct.unpack_from(">xxxxxHHB", frame, at))
        if marker == _APP0 and frame[at + 4 : at + 9] == b"JFIF\0" and frame[at + 9] != 1:
            raise ValueError("a JPEG file of another version")
        at += 2 + length
    if len(sizes) != 1 or at > len(frame):
        raise ValueError("a JPEG frame without a header, with two, or cut off")
    return sizes[0]


def _jpeg_2000(frame: bytes) -> tuple[int, int, int]:
    """The SIZ segment, which comes first (ITU-T T.800 annex A.5.1); some wrap the code stream in a JP2 file (I.5)."""
    at = 0
    if frame[4:8] == _JP2:
        while frame[at + 4 : at + 8] != b"jp2c":
            (length,) = struct.unpack_from(">L", frame, at)
            if length < 8:
                raise ValueError("a JP2 file without a code stream")
            at += length
        at += 8
    if frame[at : at + 4] != _JPEG_2000:
        raise ValueError("neither JPEG nor JPEG 2000")
    width, height, left, top = struct.unpack_from(">8xLLLL", frame, at)
    (components,) = struct.unpack_from(">40xH", frame, at)
    return height - top, width - left, components
