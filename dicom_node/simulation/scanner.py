"""A scanner's side of C-STORE: files pushed at a pace over one association, each answer timed (``scanside push``)."""

from __future__ import annotations

import struct
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import structlog
from pydantic import ValidationError
from pydicom.errors import InvalidDicomError
from pydicom.tag import Tag
from pydicom.uid import UID, MediaStorageDirectoryStorage
from pynetdicom import build_context
from pynetdicom.dsutils import split_dataset
from pynetdicom.status import STORAGE_SERVICE_CLASS_STATUS, code_to_category

from dicom_node.configuration.mistakes import mistake
from dicom_node.configuration.sections import Destination
from dicom_node.images.part10 import DataSetUnreadable, read_head
from dicom_node.network.requestor import associate
from dicom_node.network.wire import accepted, store
from runtime.errors import ScansideError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from pynetdicom.association import Association

INSTANCE_NUMBER = Tag(0x0020, 0x0013)
NO_DICOM = "no DICOM file"
MOST_CONTEXTS = 128  # presentation context IDs are the odd numbers below 256 (PS3.8 section 9.3.2.2)

log = structlog.get_logger(__name__)


class PushError(ScansideError):
    """Nothing that could be pushed."""


@dataclass(frozen=True, slots=True)
class Sent:
    """One file and what the peer said of it.

    Attributes
    ----------
    path, sop_uid : which
    status : DIMSE status; None where there was no answer
    reason : why it failed, or what a warning says; empty on success
    response_ms : from the start of sending to the answer; None without one
    acknowledged : ``time.time()`` of the answer; None without one

    """

    path: Path
    sop_uid: str
    status: int | None
    reason: str
    response_ms: float | None = None
    acknowledged: float | None = None

    @property
    def is_stored(self) -> bool:
        return self.status is not None and code_to_category(self.status) in ("Success", "Warning")


@dataclass(frozen=True, slots=True)
class PushReport:
    """All that one push did.

    Attributes
    ----------
    sent : files that the peer stored, in order
    failed : files that it did not, with status and reason
    skipped : files that are no DICOM instances, with the reason; `NO_DICOM` for whatever lies beside a series
    seconds : from the first byte of the first file to the last answer

    """

    sent: tuple[Sent, ...]
    failed: tuple[Sent, ...]
    skipped: tuple[tuple[Path, str], ...]
    seconds: float

    @property
    def last_acknowledged(self) -> float | None:
        """``time.time()`` when the last file was acknowledged: from here a result's latency counts."""
        return max((each.acknowledged for each in self.sent), default=None)

    def response_ms(self, percentile: float) -> float:
        """Response time that `percentile` percent of the stored files kept; NaN when there are none."""
        times = [each.response_ms for each in self.sent]
        return float(np.percentile(times, percentile)) if times else float("nan")


@dataclass(frozen=True, slots=True)
class _File:
    """An instance on disk, its data set from `offset` on."""

    path: Path
    offset: int
    sop_class_uid: UID
    sop_uid: UID
    transfer_syntax_uid: UID
    number: int


def push(
    paths: Sequence[Path],
    address: tuple[str, int],
    *,
    calling_ae: str,
    called_ae: str,
    rate: float | None = None,
    on_slice: Callable[[Sent], None] | None = None,
) -> PushReport:
    """Send DICOM files as a scanner does: in order of InstanceNumber, over one association, as they are encoded.

    Parameters
    ----------
    paths : files, and folders that are searched for files
    address : host and port
    calling_ae, called_ae : AE titles, ours and the peer's
    rate : slices per second, kept from the start on however long an answer takes; None: as fast as it goes
    on_slice : told of each file as it is answered or fails

    Raises
    ------
    PushError : no DICOM file, or more kinds of them than an association can carry
    dicom_node.network.requestor.PeerError : no connection, or the association was rejected, with the reason

    """
    files, skipped = _find(paths)
    kinds = sorted({(file.sop_class_uid, file.transfer_syntax_uid) for file in files})
    if len(kinds) > MOST_CONTEXTS:
        raise PushError(
            f"{len(kinds)} kinds of files (class and transfer syntax), an association carries {MOST_CONTEXTS}"
        )
    peer = _peer(address, called_ae, "called")
    calling_ae = _peer(address, calling_ae, "calling").ae_title
    association = associate(peer, calling_ae, [build_context(*kind) for kind in kinds])

    answers: list[Sent] = []
    start = time.perf_counter()
    try:
        for i, file in enumerate(files):
            if rate:
                time.sleep(max(0.0, start + i / rate - time.perf_counter()))
            answers.append(_send(association, file, message_id=i % 0x10000))
            if on_slice:
                on_slice(answers[-1])
        seconds = time.perf_counter() - start
        association.release()
    finally:
        if association.is_established:  # something above raised
            association.abort()
    return PushReport(
        sent=tuple(each for each in answers if each.is_stored),
        failed=tuple(each for each in answers if not each.is_stored),
        skipped=tuple(skipped),
        seconds=seconds,
    )


def _peer(address: tuple[str, int], ae_title: str, role: str) -> Destination:
    """Who is called or calls, checked as a destination in a configuration is."""
    try:
        return Destination(name="peer", ae_title=ae_title, host=address[0], port=address[1])
    except ValidationError as error:
        wrong = [mistake(details, Destination) for details in error.errors()]
        names = {"ae_title": f"{role} AE title"}
        raise PushError("; ".join(f"{names.get(one.key, one.key)}: {one.complaint}" for one in wrong)) from None


def _find(paths: Sequence[Path]) -> tuple[list[_File], list[tuple[Path, str]]]:
    """The instances among `paths`, in order, and what is none, with the reason."""
    files, skipped = [], []
    for path in _walk(paths):
        try:
            files.append(_read(path))
        except InvalidDicomError:
            skipped.append((path, NO_DICOM))
        except PushError as error:
            skipped.append((path, str(error)))
        except OSError as error:
            skipped.append((path, error.strerror or str(error)))
        except (AttributeError, ValueError, RuntimeError, struct.error) as error:  # pydicom, of a head that is garbage
            skipped.append((path, f"a DICOM file that can't be read: {str(error) or type(error).__name__}"))
    if not files:
        if missing := [path for path in paths if not path.exists()]:
            raise PushError(f"{missing[0]}: no such file or folder")
        raise PushError(f"no DICOM files in {', '.join(map(str, paths))} ({len(skipped)} other files)")
    return sorted(files, key=lambda file: (file.number, file.path.name)), skipped


def _walk(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(each for each in path.rglob("*") if each.is_file())
        else:
            yield path


def _read(path: Path) -> _File:
    meta, offset = split_dataset(path)
    for keyword in ("MediaStorageSOPClassUID", "MediaStorageSOPInstanceUID", "TransferSyntaxUID"):
        if not meta.get(keyword):
            raise PushError(f"a DICOM file without {keyword} in its file meta information")
    if meta.MediaStorageSOPClassUID == MediaStorageDirectoryStorage:
        raise PushError("a DICOMDIR, not an instance")
    return _File(
        path=path,
        offset=offset,
        sop_class_uid=meta.MediaStorageSOPClassUID,
        sop_uid=meta.MediaStorageSOPInstanceUID,
        transfer_syntax_uid=meta.TransferSyntaxUID,
        number=_number(path.read_bytes()[offset:], meta.TransferSyntaxUID),
    )


def _number(data_set: bytes, transfer_syntax_uid: UID) -> int:
    """InstanceNumber; what has none that can be read goes last."""
    try:
        return int(read_head(data_set, transfer_syntax_uid, (INSTANCE_NUMBER,)).InstanceNumber)
    except (DataSetUnreadable, AttributeError, TypeError, ValueError):
        return sys.maxsize


def _send(association: Association, file: _File, message_id: int) -> Sent:
    context_id = accepted(association, file.sop_class_uid, file.transfer_syntax_uid)
    if context_id is None:
        wanted = f"{file.sop_class_uid.name} in {file.transfer_syntax_uid.name}"
        return Sent(file.path, file.sop_uid, None, f"the peer does not accept {wanted}")
    if not association.is_established:
        return Sent(file.path, file.sop_uid, None, "not sent: the association is gone")

    with file.path.open("rb") as opened:
        opened.seek(file.offset)
        data_set = opened.read()
    start = time.perf_counter()
    response = store(
        association,
        context_id,
        data_set,
        sop_class_uid=file.sop_class_uid,
        sop_uid=file.sop_uid,
        message_id=message_id,
    )
    if response is None:
        return Sent(file.path, file.sop_uid, None, "no answer: the peer ended the association or is too slow")
    category, meaning = STORAGE_SERVICE_CLASS_STATUS.get(response.Status, (code_to_category(response.Status), ""))
    comment = f": {response.ErrorComment}" if response.ErrorComment else ""
    return Sent(
        path=file.path,
        sop_uid=file.sop_uid,
        status=response.Status,
        reason="" if category == "Success" else f"0x{response.Status:04X} {category} {meaning}{comment}",
        response_ms=(time.perf_counter() - start) * 1e3,
        acknowledged=time.time(),
    )
