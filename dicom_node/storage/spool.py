"""Durable intake: every instance a peer was promised to be kept lies here, byte for byte as it came.

::

    <root>/<StudyInstanceUID>/<SeriesInstanceUID>/<SOPInstanceUID>.dcm
    <root>/incoming/        being written, or being deleted; emptied at start-up
    <root>/leaving/         about to be deleted; put back at start-up
    <root>/quarantine/      a second content under a UID that is taken

The directory is the truth for slices: nothing about them is written anywhere else. It must lie on a local file system
with hard links, since a file gets its name only when its content is on the disk, and only if the name is free.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from threading import Lock
from typing import TYPE_CHECKING, ClassVar
from uuid import uuid4

import structlog

from dicom_node.images import part10
from dicom_node.images.part10 import DataSetError, DataSetMismatch
from runtime.errors import ScansideError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from io import FileIO
    from pathlib import Path

INCOMING, QUARANTINE, LEAVING = "incoming", "quarantine", "leaving"
OURS = "[0-9u]*/"  # what `file_name` gives to studies and series; not the three above, nor a partition's lost+found
HASHED = "uid-"  # begins the name of what a peer gave no legal UID
HEAD = 1 << 16  # bytes of a data set that are kept at hand for its UIDs

log = structlog.get_logger(__name__)


class SpoolError(ScansideError):
    """Base of what the spool refuses."""


class SpoolFull(SpoolError):
    """Less free space than the floor: nothing more is taken in."""

    exit_code: ClassVar[int] = 3


class InstanceTooLarge(SpoolError):
    """An object over the limit of size."""


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
    max_instance_mb : largest data set in MB (1e6 bytes) that is taken

    """

    def __init__(self, root: Path, free_floor_gb: float, max_instance_mb: float = 4000) -> None:
        self.root = root
        self.reload(free_floor_gb, max_instance_mb)
        self._making_directory = Lock()
        self._unpromised: set[Path] = set()  # got their names when the disk failed: nobody was told of them
        for directory in (root, root / INCOMING, root / QUARANTINE, root / LEAVING):
            directory.mkdir(parents=True, exist_ok=True)
        for leftover in (root / INCOMING).iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        for study in (root / LEAVING).iterdir():
            self._put_back(study)
        # an earlier life may have been killed between making a directory and syncing its parent
        for directory in (root.parent, root, *root.glob(OURS)):
            sync_directory(directory)

    def reload(self, free_floor_gb: float, max_instance_mb: float) -> None:
        """Go by other limits."""
        self._free_floor_gb, self.max_instance_mb = free_floor_gb, max_instance_mb

    def incoming(self, *, sop_class_uid: str, sop_uid: str, transfer_syntax_uid: str, calling_ae: str) -> Incoming:
        """Begin an instance whose data set will come piece by piece.

        Parameters
        ----------
        sop_class_uid, sop_uid : Affected SOP Class and Instance UID of the C-STORE request
        transfer_syntax_uid : of the presentation context
        calling_ae : AE title of the peer, written into the file meta information

        Raises
        ------
        SpoolFull : free space is below the floor
        OSError : the disk failed

        """
        self._require_space()
        head = part10.file_head(sop_class_uid, sop_uid, transfer_syntax_uid, calling_ae)
        return Incoming(self, self.root / INCOMING / uuid4().hex, head, sop_class_uid, sop_uid, transfer_syntax_uid)

    def store(self, data_set: bytes | memoryview, **request: str) -> tuple[Outcome, Instance]:
        """Keep a data set that is here whole: `incoming`, with its parameters, `Incoming.write` and `commit`."""
        incoming = self.incoming(**request)
        try:
            incoming.write(data_set)
            return incoming.commit()
        finally:
            incoming.discard()

    def contents(self) -> Iterator[tuple[str, str, int]]:
        """StudyInstanceUID, SeriesInstanceUID and number of instances of each series on disk.

        Reads one file of each series: a start must not take longer the more was ever received.
        """
        for study in sorted(self.root.glob(OURS)):
            for folder in sorted(study.iterdir()):
                paths = _by_arrival(folder)
                for path in paths:
                    try:
                        yield *_series_of(path), len(paths)
                        break
                    except (DataSetError, OSError) as error:
                        log.warning("spool_file_unreadable", path=str(path), reason=str(error))
                else:  # all are damaged: its names on disk have to do, so that it is told
                    if paths and not any(name.startswith(HASHED) for name in (study.name, folder.name)):
                        yield study.name, folder.name, len(paths)

    def series(self, study_uid: str, series_uid: str) -> list[Path]:
        """Files of one series, in order of arrival."""
        return _by_arrival(self.root / file_name(study_uid) / file_name(series_uid))

    def last_arrival(self, study_uid: str, series_uid: str) -> float:
        """When the last instance of a series got its name, in seconds since the epoch."""
        return (self.root / file_name(study_uid) / file_name(series_uid)).stat().st_mtime

    def remove(self, study_uid: str, counts: Mapping[str, int]) -> bool:
        """Delete a study that holds, by SeriesInstanceUID, just so many instances; False where it holds others.

        An instance that is acknowledged while this goes on is never deleted: the study is taken away from where new
        ones are put, looked at again, and put back if there is one more.
        """
        study = self.root / file_name(study_uid)
        wanted = {file_name(series_uid): count for series_uid, count in counts.items()}
        if _counts(study) != wanted:
            return False
        leaving = study.rename(self.root / LEAVING / study.name)
        if _counts(leaving) != wanted:
            self._put_back(leaving)
            return False
        shutil.rmtree(leaving.rename(self.root / INCOMING / uuid4().hex))
        return True

    def _put_back(self, leaving: Path) -> None:
        """Undo the beginning of a removal; what has come anew meanwhile keeps its name: a worker may read it."""
        for series in leaving.iterdir():
            place = self.root / leaving.name / series.name
            place.mkdir(parents=True, exist_ok=True)
            for path in series.iterdir():
                sha256 = part10.digest(path)
                if _claim(path, place / path.name, sha256) is Outcome.CONFLICT:
                    path.rename(self.root / QUARANTINE / f"{path.stem}.{sha256}.dcm")
            sync_directory(place)
        for directory in (self.root / leaving.name, self.root / QUARANTINE, self.root):
            sync_directory(directory)
        shutil.rmtree(leaving)

    def find(self, sop_uids: Collection[str]) -> dict[str, Instance]:
        """Which of these SOP Instance UIDs are kept, and can be read; what came last is looked through first."""
        wanted = {f"{file_name(uid)}.dcm": uid for uid in sop_uids}
        found: dict[str, Instance] = {}
        folders = [series for study in self.root.glob(OURS) for series in study.iterdir()]
        for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime_ns, reverse=True):
            for name in wanted.keys() & set(os.listdir(folder)):  # noqa: PTH208 (names, and nothing looked up)
                with suppress(DataSetError, OSError):
                    found[wanted[name]] = read(folder / name)
            if len(found) == len(wanted):
                break
        return found

    def keep(self, incoming: Path, instance: Instance) -> tuple[Outcome, Instance]:
        """Give a file that is written and synced its place."""
        outcome = _claim(incoming, instance.path, instance.sha256)
        if outcome is Outcome.CONFLICT:
            apart = self.root / QUARANTINE / f"{instance.path.stem}.{instance.sha256}.dcm"
            instance = replace(instance, path=incoming.rename(apart))
        try:
            sync_directory(instance.path.parent)
        except OSError:
            self._unpromised.add(instance.path)
            raise
        if outcome is Outcome.REPEATED and instance.path in self._unpromised:
            outcome = Outcome.NEW
        self._unpromised.discard(instance.path)
        return outcome, instance

    def place(self, study_uid: str, series_uid: str, sop_uid: str) -> Path:
        """Where an instance belongs, in a directory that is itself durable."""
        series = self.root / file_name(study_uid) / file_name(series_uid)
        with self._making_directory:  # nobody uses it before it is
            if not series.is_dir():
                series.mkdir(parents=True, exist_ok=True)
                sync_directory(series.parent)
                sync_directory(self.root)
        return series / f"{file_name(sop_uid)}.dcm"

    def _require_space(self) -> None:
        free_gb = shutil.disk_usage(self.root).free / 1e9
        if free_gb < self._free_floor_gb:
            raise SpoolFull(f"{free_gb:.1f} GB free, below node.free_floor_gb, {self._free_floor_gb:g}: make room")


class Incoming:
    """One instance on its way in: a file without a name that means anything, until `commit` gives it one."""

    def __init__(
        self, spool: Spool, path: Path, head: bytes, sop_class_uid: str, sop_uid: str, transfer_syntax_uid: str
    ) -> None:
        self._spool, self._path = spool, path
        self._sop_class_uid, self._sop_uid, self._transfer_syntax_uid = sop_class_uid, sop_uid, transfer_syntax_uid
        self._head = bytearray()  # the data set's first bytes
        self._size = 0
        self._sha256 = hashlib.sha256()
        self._file = path.open("xb", buffering=0)
        _write(self._file, head)
        self._begins = len(head)

    def write(self, piece: bytes | memoryview) -> None:
        """Take the next bytes of the encoded data set.

        Raises
        ------
        InstanceTooLarge : it is over the limit
        OSError : the disk failed, or is full

        """
        self._size += len(piece)
        if self._size > 1e6 * self._spool.max_instance_mb:
            raise InstanceTooLarge(f"the object is larger than max_instance_mb, {self._spool.max_instance_mb:g} MB")
        if len(self._head) < HEAD:
            self._head += piece[: HEAD - len(self._head)]
        self._sha256.update(piece)
        _write(self._file, piece)

    def commit(self) -> tuple[Outcome, Instance]:
        """Keep the instance; on return it survives a power cut.

        Returns
        -------
        Outcome and Instance; the instance's path lies in quarantine when the outcome is CONFLICT

        Raises
        ------
        DataSetUnreadable : the bytes can't be parsed as far as the UIDs
        DataSetMismatch : a UID is missing, or SOPInstanceUID is not that of the request
        OSError : the disk failed

        """
        study_uid, series_uid, own_uid = self._identity()
        if own_uid != self._sop_uid:
            raise DataSetMismatch("SOPInstanceUID is not the request's Affected SOP Instance UID")
        path = self._spool.place(study_uid, series_uid, self._sop_uid)
        now = time.time_ns()
        os.utime(self._file.fileno(), ns=(now, now))  # the kernel's own stamps are too coarse for the order of arrival
        os.fdatasync(self._file.fileno())
        request = self._sop_class_uid, self._sop_uid, self._transfer_syntax_uid
        instance = Instance(study_uid, series_uid, *request, path, self._sha256.hexdigest())
        try:
            return self._spool.keep(self._path, instance)
        finally:
            self.discard()

    def discard(self) -> None:
        """Forget what has not been kept. May be called again, and after `commit`."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def _identity(self) -> tuple[str, str, str]:
        try:
            return part10.identity(self._head, self._transfer_syntax_uid)
        except DataSetError:
            if self._size <= HEAD:
                raise
        with self._path.open("rb") as file:
            file.seek(self._begins)
            return part10.identity(file.read(part10.LONGEST_HEAD), self._transfer_syntax_uid)


def count(root: Path) -> dict[tuple[str, str], tuple[int, float]]:
    """What lies in a spool, without the spool: for who looks on while a node fills it.

    Of a series that is named on disk as its peer named it no file is opened: a look must be cheap, too.

    Returns
    -------
    by StudyInstanceUID and SeriesInstanceUID: instances, and when the last one came, in seconds since the epoch

    """
    found = {}
    for folder in sorted(series for study in root.glob(OURS) for series in study.iterdir()):
        paths = list(folder.glob("*.dcm"))
        if not paths:
            continue
        uids = folder.parent.name, folder.name
        if any(uid.startswith(HASHED) for uid in uids):
            with suppress(DataSetError, OSError):  # then its names on disk have to do
                uids = _series_of(paths[0])
        found[uids] = len(paths), folder.stat().st_mtime  # a directory changes when a file gets its name there
    return found


def file_name(uid: str) -> str:
    """What a UID is called on disk: itself, or a hash where a peer sent ``../x``, 200 characters or a NUL."""
    if len(uid) <= 64 and re.fullmatch(r"[0-9]+(\.[0-9]+)*", uid):
        return uid
    return HASHED + hashlib.sha256(uid.encode("latin-1", "replace")).hexdigest()


def _write(file: FileIO, piece: bytes | memoryview) -> None:
    """All of it: the operating system may take less at a time."""
    written = file.write(piece)
    while written < len(piece):
        written += file.write(piece[written:])


def _claim(incoming: Path, path: Path, sha256: str) -> Outcome:
    """Give a complete file its name, if the name is free. Of two threads only one can: link(2) never replaces."""
    try:
        os.link(incoming, path)
    except FileExistsError:
        return Outcome.REPEATED if part10.digest(path) == sha256 else Outcome.CONFLICT
    return Outcome.NEW


def _by_arrival(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.dcm"), key=lambda path: path.stat().st_mtime_ns)


def _series_of(path: Path) -> tuple[str, str]:
    """StudyInstanceUID and SeriesInstanceUID of a file of ours."""
    with path.open("rb") as file:
        return part10.names(file)[2:4]


def read(path: Path) -> Instance:
    """A file of the spool back into its instance."""
    with path.open("rb") as file:
        sop_class_uid, transfer_syntax_uid, *uids = part10.names(file)
    return Instance(*uids[:2], sop_class_uid, uids[2], transfer_syntax_uid, path, part10.digest(path))


def _counts(study: Path) -> dict[str, int]:
    """Number of instances by the name of their series' folder."""
    return {series.name: len(list(series.glob("*.dcm"))) for series in study.iterdir()} if study.is_dir() else {}


def sync_directory(path: Path) -> None:
    """Have names in a folder outlast a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
