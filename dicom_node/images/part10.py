"""DICOM Part 10 files and encoded data sets, as far as the spool needs them: who they are, and byte for byte.

Nothing is decoded that need not be: what a peer sent is kept as it came, whatever else is wrong with it.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from contextlib import contextmanager
from io import BufferedReader, BytesIO
from typing import TYPE_CHECKING

from pydicom import FileDataset
from pydicom.datadict import dictionary_has_tag, dictionary_VR, keyword_for_tag
from pydicom.filereader import read_dataset, read_partial
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from pydicom.valuerep import EXPLICIT_VR_LENGTH_16
from pynetdicom import PYNETDICOM_IMPLEMENTATION_UID, PYNETDICOM_IMPLEMENTATION_VERSION

from runtime.errors import ScansideError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from io import FileIO
    from pathlib import Path
    from typing import BinaryIO

    from pydicom.dataset import Dataset
    from pydicom.tag import BaseTag

LONGEST_HEAD = 1 << 22  # bytes of a data set, inflated, in which its UIDs are looked for: they stand before the pixels
LARGEST = 1 << 30  # bytes of a file that is decoded, and of what it inflates to: 2,000 frames of 512 x 512
LONGEST_VALUE = 1 << 24  # bytes of an element that is no pixels
LONGEST_NESTED = 1 << 20  # and of one in a sequence that is parsed at once, for lack of a length
MOST_SHORT = 0xFFFF  # bytes of numbers and text, which explicit VR counts in 16 bits (PS3.5 section 7.1.2)
MOST_READS = 1 << 20  # in which a data set is parsed, some for each element: 2,000 frames take 300,000
MOST_READS_OF_HEAD = 1 << 16
MOST_ITEMS = 1 << 16  # of a list of instances; pydicom keeps 1.4 kB for an empty one

MEDIA_STORAGE_SOP_CLASS_UID = Tag(0x0002, 0x0002)
TRANSFER_SYNTAX_UID = Tag(0x0002, 0x0010)
SOP_INSTANCE_UID = Tag(0x0008, 0x0018)
STUDY_INSTANCE_UID = Tag(0x0020, 0x000D)
SERIES_INSTANCE_UID = Tag(0x0020, 0x000E)
PIXEL_DATA = Tag(0x7FE0, 0x0010)
IDENTITY = (STUDY_INSTANCE_UID, SERIES_INSTANCE_UID, SOP_INSTANCE_UID)

# whose length takes four bytes, after two of nothing (PS3.5 section 7.1.2)
_LONG = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
_ITEM = b"\xfe\xff\x00\xe0"  # little endian
_UNDEFINED = 0xFFFFFFFF
_NOT_LITTLE_ENDIAN = (ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)  # or not at once


class DataSetError(ScansideError):
    """Base of what is wrong with a data set."""


class DataSetUnreadable(DataSetError):
    """Bytes that are no data set in the transfer syntax they claim."""


class DataSetExcessive(DataSetUnreadable):
    """A data set that would take more memory than any image of a scanner: large, inflated, or nested without end."""


class DataSetMismatch(DataSetError):
    """A data set without the UIDs that name it, or with another than the request names."""


def read_head(data_set: bytes | memoryview, transfer_syntax_uid: str, tags: tuple[BaseTag, ...]) -> Dataset:
    """Those of `tags` that an encoded data set has, in any transfer syntax; what stands behind them is not looked at.

    This is pydicom's reader, stopped early: 0.1 to 0.2 ms for the UIDs of a CT slice.

    Raises
    ------
    DataSetUnreadable : the bytes are no data set

    """
    syntax, last = UID(transfer_syntax_uid), max(tags)
    with _named(syntax):
        if syntax.is_deflated:
            data_set = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data_set, LONGEST_HEAD)
        stream = _Bounded(BytesIO(data_set))
        stream.left, stream.longest = MOST_READS_OF_HEAD, LONGEST_NESTED
        return _parsed(
            stream,
            lambda stream: read_dataset(
                stream,
                syntax.is_implicit_VR,
                syntax.is_little_endian,
                stop_when=lambda tag, _vr, _length: tag > last,
                specific_tags=list(tags),
            ),
        )


@contextmanager
def _named(syntax: UID) -> Iterator[None]:
    """Make one error of all that pydicom raises on garbage."""
    try:
        yield
    except DataSetError:
        raise
    except Exception as error:  # it raises what it likes, OSError too, and nothing here is read from a disk
        raise DataSetUnreadable(f"these bytes are no data set in {syntax.name} ({type(error).__name__})") from error


class _Bounded(BufferedReader):
    """Bytes that are read so often, and so many at once, and no more: what is read, a parser keeps many times over."""

    left, longest = MOST_READS, LONGEST_VALUE
    excess, is_cut = "", False  # of which pydicom may make another error

    def read(self, size: int | None = -1) -> bytes:
        if size == -1:
            raise _Deflated
        self.left -= 1
        if self.left < 0:
            self.excess = "more elements than any image has"
        if size > self.longest:
            self.excess = f"a value of {size} bytes"
            self.is_cut = self.tell() + size > self.seek(0, os.SEEK_END)
        if self.excess:
            raise DataSetExcessive(self.excess)
        return super().read(size)

    def stopping(self, stop: Callable[[BaseTag, str | None, int], bool]) -> Callable[[BaseTag, str | None, int], bool]:
        """`stop`, and beside it the word of how long the value may be that is read next."""

        def stops(tag: BaseTag, vr: str | None, length: int) -> bool:
            self._allow(tag, length)
            return stop(tag, vr, length)

        return stops

    def _allow(self, tag: BaseTag, length: int) -> None:
        if tag >= PIXEL_DATA:
            self.longest = LARGEST
        elif length == _UNDEFINED:
            self.longest = LONGEST_NESTED
        else:
            is_short = length > MOST_SHORT and dictionary_has_tag(tag) and dictionary_VR(tag) in EXPLICIT_VR_LENGTH_16
            self.longest = MOST_SHORT if is_short else LONGEST_VALUE


class _Deflated(Exception):
    """All that is left was asked for: pydicom is about to inflate it, without any bound."""


def _parsed(stream: _Bounded, parse: Callable[[_Bounded], Dataset]) -> Dataset:
    """What pydicom makes of bytes.

    Raises
    ------
    DataSetExcessive : they have more or longer elements, or are nested deeper, than an image
    EOFError : they end within an element that would be too long
    Exception : whatever pydicom raises

    """
    try:
        return parse(stream)
    except Exception as error:
        if stream.is_cut:
            raise EOFError(f"{stream.excess}, of which not all are there") from error
        if stream.excess:
            raise DataSetExcessive(stream.excess) from error
        if isinstance(error, RecursionError) or isinstance(error.__context__, RecursionError):
            raise DataSetExcessive("sequences nested without end") from None  # its traceback has a thousand frames
        raise


def read_whole(data_set: bytes, transfer_syntax_uid: str) -> Dataset:
    """A list of instances that came with a message, in a little endian transfer syntax.

    Raises
    ------
    DataSetUnreadable : the bytes are no data set, or have more items than any list

    """
    syntax = UID(transfer_syntax_uid)
    if data_set.count(_ITEM) > MOST_ITEMS:
        raise DataSetExcessive(f"more than {MOST_ITEMS} items")
    with _named(syntax):
        return _parsed(
            _Bounded(BytesIO(data_set)),
            lambda stream: read_dataset(stream, syntax.is_implicit_VR, syntax.is_little_endian),
        )


def opened(file: FileIO, stop: Callable[[BaseTag, str | None, int], bool]) -> tuple[FileDataset, BinaryIO]:
    """A DICOM file as pydicom reads it, but for what would take all memory.

    Parameters
    ----------
    file : not buffered
    stop : given tag, VR and length of each element, whether to stop before it

    Returns
    -------
    what was read, and the bytes that follow, inflated

    Raises
    ------
    DataSetExcessive : it would
    Exception : whatever pydicom raises on what is no DICOM file

    """
    size = os.fstat(file.fileno()).st_size
    if size > LARGEST:
        raise DataSetExcessive(f"a file of {size / 1e9:.1f} GB")
    stream = _Bounded(file)
    try:
        return _parsed(stream, lambda stream: read_partial(stream, stream.stopping(stop))), stream
    except _Deflated:
        begins = stream.tell()
        stream.detach()  # or it would close the file
    file.seek(0)
    content = file.readall()
    inflating = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = inflating.decompress(content[begins:], LARGEST)
    if inflating.unconsumed_tail:
        raise DataSetExcessive(f"it inflates to more than {LARGEST / 1e9:.1f} GB")
    if not inflating.eof:
        raise EOFError("the deflated data set is cut off")
    stream = _Bounded(BytesIO(inflated))
    data_set = _parsed(
        stream,
        lambda stream: read_dataset(
            stream, is_implicit_VR=False, is_little_endian=True, stop_when=stream.stopping(stop)
        ),
    )
    meta = read_partial(BytesIO(content[:begins])).file_meta
    image = FileDataset(str(file.name), data_set, file_meta=meta, is_implicit_VR=False, is_little_endian=True)
    return image, stream


def identity(data_set: bytes | memoryview, transfer_syntax_uid: str) -> tuple[str, str, str]:
    """StudyInstanceUID, SeriesInstanceUID and SOPInstanceUID.

    Raises
    ------
    DataSetUnreadable : the bytes can't be parsed as far as the UIDs
    DataSetMismatch : one is missing

    """
    found = _walk(data_set, transfer_syntax_uid)
    if found is None:
        head = read_head(data_set, transfer_syntax_uid, IDENTITY)
        with _named(UID(transfer_syntax_uid)):
            study_uid, series_uid, sop_uid = (_uid(head, tag) for tag in IDENTITY)
        return study_uid, series_uid, sop_uid
    return found


def _walk(data_set: bytes | memoryview, transfer_syntax_uid: str) -> tuple[str, str, str] | None:
    """The identity of a plain data set, 0.02 ms instead of pydicom's 0.2; None where it takes more than counting."""
    if transfer_syntax_uid in _NOT_LITTLE_ENDIAN:
        return None
    explicit = transfer_syntax_uid != ImplicitVRLittleEndian
    wanted, found, at = set(IDENTITY), {}, 0
    while at + 12 <= len(data_set):
        group, element = struct.unpack_from("<HH", data_set, at)
        tag = group << 16 | element
        if tag > SERIES_INSTANCE_UID:
            break
        vr = bytes(data_set[at + 4 : at + 6])
        if explicit and not (vr.isalpha() and vr.isupper()):
            return None
        if not explicit:
            (length,), at = struct.unpack_from("<L", data_set, at + 4), at + 8
        elif vr in _LONG:
            (length,), at = struct.unpack_from("<L", data_set, at + 8), at + 12
        else:
            (length,), at = struct.unpack_from("<H", data_set, at + 6), at + 8
        if length == _UNDEFINED:
            return None
        if tag in wanted:
            found[tag] = bytes(data_set[at : at + length])
            if len(found[tag]) < length:
                return None
        at += length
    uids = [found.get(tag, b"").decode("latin-1").rstrip("\0 ") for tag in IDENTITY]
    return (uids[0], uids[1], uids[2]) if all(uids) else None


def _uid(data_set: Dataset, tag: BaseTag) -> str:
    """A UID as it was sent, legal or not, but for its padding (PS3.5 section 9.1; some pad with a space)."""
    element = data_set.get_item(tag) if tag in data_set else None
    value = element.value if element else None  # raw: pydicom would complain of an illegal one
    uid = value.decode("latin-1").rstrip("\0 ") if isinstance(value, bytes) else ""
    if not uid:
        raise DataSetMismatch(f"{keyword_for_tag(tag)} {tag} is missing or empty")  # an ErrorComment has 64 characters
    if len(value) < element.length:
        raise DataSetUnreadable(f"the data set is cut off within {tag}")
    return uid


def file_head(sop_class_uid: str, sop_uid: str, transfer_syntax_uid: str, calling_ae: str) -> bytes:
    """Preamble and file meta information (PS3.10 section 7.1), by hand: it must take any UID that a peer can send."""

    def element(number: int, vr: bytes, value: str) -> bytes:
        encoded = value.encode("latin-1", "replace")
        encoded += (b"\0" if vr == b"UI" else b" ") * (len(encoded) % 2)
        return struct.pack("<HH2sH", 0x0002, number, vr, len(encoded)) + encoded

    meta = b"".join(
        (
            struct.pack("<HH2sHIH", 0x0002, 0x0001, b"OB", 0, 2, 0x0100),
            element(0x0002, b"UI", sop_class_uid),
            element(0x0003, b"UI", sop_uid),
            element(0x0010, b"UI", transfer_syntax_uid),
            element(0x0012, b"UI", PYNETDICOM_IMPLEMENTATION_UID),
            element(0x0013, b"SH", PYNETDICOM_IMPLEMENTATION_VERSION),
            element(0x0016, b"AE", calling_ae),
        )
    )
    return bytes(128) + b"DICM" + struct.pack("<HH2sHI", 0x0002, 0x0000, b"UL", 4, len(meta)) + meta


def file_meta(meta: bytes) -> tuple[str, str]:
    """SOP Class and transfer syntax UID of the file meta information of a file of ours."""
    named = read_head(meta, ExplicitVRLittleEndian, (MEDIA_STORAGE_SOP_CLASS_UID, TRANSFER_SYNTAX_UID))
    return _uid(named, MEDIA_STORAGE_SOP_CLASS_UID), _uid(named, TRANSFER_SYNTAX_UID)


def begin(file: BinaryIO) -> bytes:
    """File meta information of a file of ours, which ends where (0002,0000) says; the data set is next."""
    first = file.read(144)
    return first[132:] + file.read(min(int.from_bytes(first[140:], "little"), LONGEST_HEAD))


def names(file: BinaryIO) -> tuple[str, str, str, str, str]:
    """SOP Class and transfer syntax UID of a file of ours, and its data set's identity."""
    sop_class_uid, transfer_syntax_uid = file_meta(begin(file))
    return sop_class_uid, transfer_syntax_uid, *identity(file.read(LONGEST_HEAD), transfer_syntax_uid)


def digest(path: Path) -> str:
    """SHA-256 of the encoded data set in a file of ours."""
    with path.open("rb") as file:
        begin(file)
        return hashlib.file_digest(file, "sha256").hexdigest()
