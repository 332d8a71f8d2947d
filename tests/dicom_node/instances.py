"""Tiny CT instances, encoded as they travel, and an intake that remembers what it was told."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, RLELossless
from pynetdicom.dsutils import encode as encode_native

from dicom_node.intake.receiver import Receiver
from dicom_node.storage.spool import Spool, read

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from dicom_node.storage.spool import Instance

STUDY, SERIES = "1.2.3.4", "1.2.3.4.5"


def image(number: int = 1, syntax: UID = ExplicitVRLittleEndian, *, side: int = 16, **replaced: object) -> Dataset:
    """One slice; `replaced` sets attributes to other values, or leaves them out where the value is None."""
    slice_ = Dataset()
    slice_.SOPClassUID = CTImageStorage
    slice_.SOPInstanceUID = f"{SERIES}.{number}"
    slice_.Modality = "CT"
    slice_.PatientName = "Phantom^Head"
    slice_.PatientID = "P1"
    slice_.StudyInstanceUID, slice_.SeriesInstanceUID = STUDY, SERIES
    slice_.InstanceNumber = number
    slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
    slice_.Rows = slice_.Columns = side
    slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit, slice_.PixelRepresentation = 16, 12, 11, 0
    pixels = np.random.default_rng(number).integers(0, 4096, (side, side), dtype=np.uint16)
    slice_.PixelData = pixels.astype("<u2" if UID(syntax).is_little_endian else ">u2").tobytes()
    slice_["PixelData"].VR = "OW"
    slice_.file_meta = FileMetaDataset()
    slice_.file_meta.MediaStorageSOPClassUID = CTImageStorage
    slice_.file_meta.MediaStorageSOPInstanceUID = slice_.SOPInstanceUID
    slice_.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax == RLELossless else syntax
    if syntax == RLELossless:
        slice_.compress(RLELossless, generate_instance_uid=False)
    for keyword, value in replaced.items():
        if value is None:
            delattr(slice_, keyword)
        else:
            setattr(slice_, keyword, value)
    return slice_


def encoded(slice_: Dataset) -> bytes:
    """The data set as it travels: no preamble, no file meta information."""
    syntax = slice_.file_meta.TransferSyntaxUID
    return encode_native(slice_, syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated)


def write(folder: Path, *slices: Dataset) -> list[Path]:
    """Part 10 files named by the number of each slice."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{slice_.InstanceNumber}.dcm" for slice_ in slices]
    for path, slice_ in zip(paths, slices, strict=True):
        slice_.save_as(path, enforce_file_format=True)
    return paths


def data_set_of(path: Path) -> bytes:
    """The encoded data set of a Part 10 file."""
    content = path.read_bytes()
    return content[144 + int.from_bytes(content[140:144], "little") :]


class Recorder:
    """An intake. `calls` holds ("stored", association, instance) and ("ended", association, released)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, Instance | bool]] = []
        self._called = threading.Condition()

    def instance_stored(self, association: str, instance: Instance) -> None:
        self._note("stored", association, instance)

    def association_ended(self, association: str, *, released: bool) -> None:
        self._note("ended", association, released)

    def stored(self) -> list[Instance]:
        return [what for kind, _, what in self.calls if kind == "stored"]

    def ended(self) -> list[bool]:
        return [what for kind, _, what in self.calls if kind == "ended"]

    def wait(self, fulfilled: Callable[[Recorder], bool]) -> None:
        with self._called:
            assert self._called.wait_for(lambda: fulfilled(self), 20), self.calls

    def _note(self, kind: str, association: str, what: Instance | bool) -> None:
        with self._called:
            self.calls.append((kind, association, what))
            self._called.notify_all()


@contextmanager
def receiving(folder: Path, intake: Recorder, **options: object) -> Iterator[Receiver]:
    """A running receiver on a free port."""
    receiver = Receiver(
        ae_title="SCANSIDE",
        address="127.0.0.1",
        port=0,
        spool=Spool(folder, options.pop("free_floor_gb", 0), options.pop("max_instance_mb", 4000)),
        intake=intake,
        **options,
    )
    receiver.start()
    try:
        yield receiver
    finally:
        receiver.stop()


def instances(spool: Spool) -> list[Instance]:
    """All that is on disk, series by series, each in order of arrival."""
    return [read(path) for study, series, _ in spool.contents() for path in spool.series(study, series)]
