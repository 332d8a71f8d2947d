"""Durable intake: every instance a peer was promised to be kept lies here, byte for byte as it came.

::

    <root>/<StudyInstanceUID>/<SeriesInstanceUID>/<SOPInstanceUID>.dcm
    <root>/incoming/        being written; emptied at start-up
    <root>/quarantine/      a second content under a UID that is taken

The directory is the truth for slices: nothing about them is written anywhere else. It must lie on a local file system
with hard links, since a file gets its name only when its content is on the disk, and only if the name is free.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from io import BytesIO
from threading import Lock
from typing import TYPE_CHECKING, ClassVar
from uuid import uuid4

import structlog
from pydicom.filereader import read_dataset
from pydicom.tag import Tag
from pydicom.uid import UID, ExplicitVRLittleEndian
from pynetdicom import PYNETDICOM_IMPLEMENTATION_UID, PYNETDICOM_IMPLEMENTATION_VERSION

from runtime.errors import ScansideError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pydicom.dataset import Dataset
    from pydicom.tag import BaseTag

INCOMING = "incoming"
QUARANTINE = "quarantine"
OURS = "[0-9u]*/"  # what `_name` gives to studies and series; not the two above, nor a partition's lost+found
HASHED = "uid-"  # begins the name of what a peer gave no legal UID
INFLATED_HEAD = 1 << 20  # bytes of a deflated data set to inflate for its UIDs, which stand far before the pixels

MEDIA_STORAGE_SOP_CLASS_UID = Tag(0x0002, 0x0002)
TRANSFER_SYNTAX_UID = Tag(0x0002, 0x0010)
SOP_INSTANCE_UID = Tag(0x0008, 0x0018)
STUDY_INSTANCE_UID = Tag(0x0020, 0x000D)
SERIES_INSTANCE_UID = Tag(0x0020, 0x000E)

log = structlog.get_logger(__name__)


class SpoolError(ScansideError):
    """Base of what the spool refuses."""


class SpoolFull(SpoolError):
    """Less free space than the floor: nothing more is taken in."""

    exit_code: ClassVar[int] = 3


class DataSetUnreadable(SpoolError):
    """Bytes that are no data set in the transfer syntax they claim."""


class DataSetMismatch(SpoolError):
    """A data set without the UIDs that name it, or with another than the request names."""


class Outcome(StrEnum):
    """What became of an instance."""

    NEW = "new"
    REPEATED = "repeated"  # the same content is here already
    CONFLICT = "conflict"  # another content has the UID: this one went to quarantine


@dataclass(frozen=True, slots=True)
class Instance:
    """One stored object.

    Attributes
    ----------
    study_uid, series_uid, sop_class_uid, sop_uid, transfer_syntax_uid : as the peer sent them, without padding
    path : its DICOM Part 10 file
    sha256 : of the encoded data set, without preamble and file meta information

    """

    study_uid: str
    series_uid: str
    sop_class_uid: str
    sop_uid: str
    transfer_syntax_uid: str
    path: Path
    sha256: str


class Spool:
    """The directory of received instances. Safe to use from many threads.

    Parameters
    ----------
    root : the directory; made if it is not there
    free_floor_gb : free space in GB (1e9 bytes) below which nothing more is taken

    """

    def __init__(self, root: Path, free_floor_gb: float) -> None:
        self._root = root
        self._free_floor_gb = free_floor_gb
        self._making_directory = Lock()
        for directory in (root, root / INCOMING, root / QUARANTINE):
            directory.mkdir(parents=True, exist_ok=True)
        for leftover in (root / INCOMING).iterdir():
            leftover.unlink()
        # an earlier life may have been killed between making a directory and syncing its parent
        for directory in (root.parent, root, *self._studies()):
            _sync_directory(directory)

    def store(
        self,
        data_set: bytes | memoryview,
        *,
        sop_class_uid: str,
        sop_uid: str,
        transfer_syntax_uid: str,
        calling_ae: str,
    ) -> tuple[Outcome, Instance]:
        """Keep an encoded data set; on return it survives a power cut.

        Parameters
        ----------
        data_set : as it came over the wire
        sop_class_uid, sop_uid : Affected SOP Class and Instance UID of the C-STORE request
        transfer_syntax_uid : of the presentation context
        calling_ae : AE title of the peer, written into the file meta information

        Returns
        -------
        Outcome and Instance; the instance's path lies in quarantine when the outcome is CONFLICT

        Raises
        ------
        SpoolFull : free space is below the floor
        DataSetUnreadable : the bytes can't be parsed as far as the UIDs
        DataSetMismatch : a UID is missing, or SOPInstanceUID is not `sop_uid`
        OSError : the disk failed

        """
        self._require_space()
        study_uid, series_uid, own_uid = _identity(data_set, transfer_syntax_uid)
        if own_uid != sop_uid:
            raise DataSetMismatch(f"SOPInstanceUID {own_uid!r} is not the Affected SOP Instance UID {sop_uid!r}")

        path = self._directory(study_uid, series_uid) / f"{_name(sop_uid)}.dcm"
        sha256 = hashlib.sha256(data_set).hexdigest()
        instance = Instance(study_uid, series_uid, sop_class_uid, sop_uid, transfer_syntax_uid, path, sha256)

        incoming = self._root / INCOMING / uuid4().hex
        try:
            _write(incoming, _part10_header(instance, calling_ae), data_set)
            outcome = _claim(incoming, path, sha256)
            if outcome is Outcome.CONFLICT:
                instance = replace(instance, path=self._root / QUARANTINE / f"{_name(sop_uid)}.{sha256}.dcm")
                incoming.rename(instance.path)
        finally:
            incoming.unlink(missing_ok=True)
        _sync_directory(instance.path.parent)  # after a repeat too: whoever stored the first may not have come so far
        return outcome, instance

    def contents(self) -> Iterator[tuple[str, str, int]]:
        """StudyInstanceUID, SeriesInstanceUID and number of instances of each series on disk.

        Reads one file of each series: a start must not take longer the more was ever received.
        """
        for study in sorted(self._studies()):
            for folder in sorted(study.iterdir()):
                paths = _by_arrival(folder)
                for path in paths:
                    try:
                        study_uid, series_uid = _series_of(path)
                    except (SpoolError, OSError) as error:
                        log.warning("spool_file_unreadable", path=str(path), reason=str(error))
                        continue
                    yield study_uid, series_uid, len(paths)
                    break

    def series(self, study_uid: str, series_uid: str) -> list[Path]:
        """Files of one series, in order of arrival."""
        return _by_arrival(self._root / _name(study_uid) / _name(series_uid))

    def _studies(self) -> Iterator[Path]:
        return _studies(self._root)

    def _require_space(self) -> None:
        free_gb = shutil.disk_usage(self._root).free / 1e9
        if free_gb < self._free_floor_gb:
            raise SpoolFull(
                f"{free_gb:.1f} GB free is below the floor of {self._free_floor_gb:g} GB: "
                f"make room in {self._root} or lower free_floor_gb"
            )

    def _directory(self, study_uid: str, series_uid: str) -> Path:
        """Directory of a series, itself already durable. The lock keeps others from using it before it is."""
        series = self._root / _name(study_uid) / _name(series_uid)
        with self._making_directory:
            if not series.is_dir():
                series.mkdir(parents=True, exist_ok=True)
                _sync_directory(series.parent)
                _sync_directory(self._root)
        return series


def count(root: Path) -> dict[tuple[str, str], tuple[int, float]]:
    """What lies in a spool, without the spool: for who looks on while a node fills it.

    Of a series that is named on disk as its peer named it no file is opened: a look must be cheap, too.

    Returns
    -------
    by StudyInstanceUID and SeriesInstanceUID: instances, and when the last one came, in seconds since the epoch

    """
    found = {}
    for folder in sorted(series for study in _studies(root) for series in study.iterdir()):
        paths = list(folder.glob("*.dcm"))
        if not paths:
            continue
        uids = folder.parent.name, folder.name
        if any(uid.startswith(HASHED) for uid in uids):
            with suppress(SpoolError, OSError):  # then its names on disk have to do
                uids = _series_of(paths[0])
        found[uids] = len(paths), folder.stat().st_mtime  # a directory changes when a file gets its name there
    return found


def read_head(data_set: bytes | memoryview, transfer_syntax_uid: str, tags: tuple[BaseTag, ...]) -> Dataset:
    """Those of `tags` that an encoded data set has, in any transfer syntax; what stands behind them is not looked at.

    This is pydicom's reader, stopped early: 0.1 to 0.2 ms for the UIDs of a CT slice.

    Raises
    ------
    DataSetUnreadable : the bytes are no data set

    """
    syntax, last = UID(transfer_syntax_uid), max(tags)
    try:
        if syntax.is_deflated:
            data_set = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data_set, INFLATED_HEAD)
        return read_dataset(
            BytesIO(data_set),
            syntax.is_implicit_VR,
            syntax.is_little_endian,
            stop_when=lambda tag, _vr, _length: tag > last,
            specific_tags=list(tags),
        )
    # what pydicom raises on garbage; RuntimeError is the recursion limit, from sequences nested without end
    except (ValueError, RuntimeError, EOFError, struct.error, zlib.error) as error:
        raise DataSetUnreadable(f"these bytes are no data set in {syntax.name} ({type(error).__name__})") from error


def _identity(data_set: bytes | memoryview, transfer_syntax_uid: str) -> tuple[str, str, str]:
    """StudyInstanceUID, SeriesInstanceUID and SOPInstanceUID."""
    tags = (STUDY_INSTANCE_UID, SERIES_INSTANCE_UID, SOP_INSTANCE_UID)
    head = read_head(data_set, transfer_syntax_uid, tags)
    study_uid, series_uid, sop_uid = (_uid(head, tag) for tag in tags)
    return study_uid, series_uid, sop_uid


def _uid(data_set: Dataset, tag: BaseTag) -> str:
    """A UID as it was sent, legal or not, but for its padding (PS3.5 section 9.1; some pad with a space)."""
    element = data_set.get_item(tag) if tag in data_set else None
    value = element.value if element else None  # raw: pydicom would complain of an illegal one
    uid = value.decode("latin-1").rstrip("\0 ") if isinstance(value, bytes) else ""
    if not uid:
        raise DataSetMismatch(f"the data set has no {tag}: it can't be told which study, series and instance it is")
    if len(value) < element.length:
        raise DataSetUnreadable(f"the data set is cut off within {tag}")
    return uid


def _name(uid: str) -> str:
    """What a UID is called on disk: itself, or a hash where a peer sent ``../x``, 200 characters or a NUL."""
    if len(uid) <= 64 and re.fullmatch(r"[0-9]+(\.[0-9]+)*", uid):
        return uid
    return HASHED + hashlib.sha256(uid.encode("latin-1", "replace")).hexdigest()


def _part10_header(instance: Instance, calling_ae: str) -> bytes:
    """Preamble and file meta information (PS3.10 section 7.1), by hand: it must take any UID that a peer can send."""

    def element(number: int, vr: bytes, value: str) -> bytes:
        encoded = value.encode("latin-1", "replace")
        encoded += (b"\0" if vr == b"UI" else b" ") * (len(encoded) % 2)
        return struct.pack("<HH2sH", 0x0002, number, vr, len(encoded)) + encoded

    meta = b"".join(
        (
            struct.pack("<HH2sHIH", 0x0002, 0x0001, b"OB", 0, 2, 0x0100),
            element(0x0002, b"UI", instance.sop_class_uid),
            element(0x0003, b"UI", instance.sop_uid),
            element(0x0010, b"UI", instance.transfer_syntax_uid),
            element(0x0012, b"UI", PYNETDICOM_IMPLEMENTATION_UID),
            element(0x0013, b"SH", PYNETDICOM_IMPLEMENTATION_VERSION),
            element(0x0016, b"AE", calling_ae),
        )
    )
    return bytes(128) + b"DICM" + struct.pack("<HH2sHI", 0x0002, 0x0000, b"UL", 4, len(meta)) + meta


def _write(path: Path, header: bytes, data_set: bytes | memoryview) -> None:
    with path.open("xb") as file:
        file.write(header)
        file.write(data_set)
        file.flush()
        now = time.time_ns()
        os.utime(file.fileno(), ns=(now, now))  # the kernel's own stamps are too coarse to tell the order of arrival
        os.fdatasync(file.fileno())


def _claim(incoming: Path, path: Path, sha256: str) -> Outcome:
    """Give a complete file its name, if the name is free. Of two threads only one can: link(2) never replaces."""
    try:
        os.link(incoming, path)
    except FileExistsError:
        _, present = _split(path)
        return Outcome.REPEATED if hashlib.sha256(present).hexdigest() == sha256 else Outcome.CONFLICT
    return Outcome.NEW


def _studies(root: Path) -> Iterator[Path]:
    return root.glob(OURS)


def _by_arrival(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.dcm"), key=lambda path: path.stat().st_mtime_ns)


def _series_of(path: Path) -> tuple[str, str]:
    """StudyInstanceUID and SeriesInstanceUID of a file of ours."""
    meta, data_set = _split(path)
    syntax = _uid(read_head(meta, ExplicitVRLittleEndian, (TRANSFER_SYNTAX_UID,)), TRANSFER_SYNTAX_UID)
    return _identity(data_set, syntax)[:2]


def read(path: Path) -> Instance:
    """A file of the spool back into its instance."""
    meta, data_set = _split(path)
    named = read_head(meta, ExplicitVRLittleEndian, (MEDIA_STORAGE_SOP_CLASS_UID, TRANSFER_SYNTAX_UID))
    transfer_syntax_uid = _uid(named, TRANSFER_SYNTAX_UID)
    study_uid, series_uid, sop_uid = _identity(data_set, transfer_syntax_uid)
    return Instance(
        study_uid=study_uid,
        series_uid=series_uid,
        sop_class_uid=_uid(named, MEDIA_STORAGE_SOP_CLASS_UID),
        sop_uid=sop_uid,
        transfer_syntax_uid=transfer_syntax_uid,
        path=path,
        sha256=hashlib.sha256(data_set).hexdigest(),
    )


def _split(path: Path) -> tuple[memoryview, memoryview]:
    """File meta information and encoded data set of a file of ours; (0002,0000) says where the one ends."""
    content = memoryview(path.read_bytes())
    start = 144 + int.from_bytes(content[140:144], "little")
    return content[132:start], content[start:]


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
