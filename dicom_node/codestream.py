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
# markers of a JPEG frame's header (ITU-T T.81 table B.1), and of a JPEG-LS frame's (T.87 annex C)
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}


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
    """The frame header, which comes before any scan: ITU-T T.81 annex B.2.2."""
    at = 2
    while True:
        if frame[at] != 0xFF:
            raise ValueError("a JPEG frame without a header")
        marker = frame[at + 1]
        if marker == 0xFF:  # fill
            at += 1
        elif marker in _FRAME_HEADERS:
            return struct.unpack_from(">xxxxxHHB", frame, at)
        else:
            (length,) = struct.unpack_from(">H", frame, at + 2)
            at += 2 + length


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
