"""The slices of a series and the masks on them, from a node's files: for who looks while a node works on them.

Any file may be gone by the time it is opened, or be damaged: then it is left out. What may kill a process (a decoder on
hostile bytes) is called here alone, and this is never the node's process.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

import numpy as np
import structlog
from pydicom import dcmread
from pydicom.tag import Tag

from dicom_node.analysis import decode
from dicom_node.images import frames, part10
from dicom_node.images.gate import MULTI_FRAME, NotAnalysed
from dicom_node.page.cache import Cache
from dicom_node.results import capture, picture, source
from dicom_node.storage import spool

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from pydicom.dataset import Dataset

    from dicom_node.page.palette import Palette
    from dicom_node.results.codes import Colour
    from runtime.types import Plane

HU_BYTES, PICTURE_BYTES, MASK_BYTES, HEAD_BYTES = 64 << 20, 128 << 20, 64 << 20, 32 << 20
ENTRY_BYTES = 2000  # about, of a slice that is known and not decoded

_PATIENT = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyDescription",
    "SeriesDescription",
    "SeriesNumber",
)
_PLACE = (
    "SpecificCharacterSet",
    "SOPClassUID",
    "SOPInstanceUID",
    "SliceThickness",
    "InstanceNumber",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "Rows",
    "Columns",
    "PixelSpacing",
)
_TAGS = tuple(map(Tag, (*_PATIENT, *_PLACE)))

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """A slice that can be shown.

    Attributes
    ----------
    name : in addresses: that of its file, and of a frame its number
    path, frame : where it lies
    key : `dicom_node.results.source.slice_key`, by which reports and masks name it
    number : InstanceNumber, or the frame's
    plane : where it lies in the patient
    shape : rows and columns

    """

    name: str
    path: Path
    frame: int | None
    key: str
    number: int
    plane: Plane
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Masks:
    """What was found, slice by slice.

    Attributes
    ----------
    version : changes with the file that they are from
    labels : ``(H, W)`` uint8 by slice key, of slices that show something
    classes : the name of each label, the largest finding first
    colours : of each label, in the order of drawing: the largest finding last, on top

    """

    version: str
    labels: Mapping[str, NDArray[np.uint8]]
    classes: Mapping[int, str]
    colours: Mapping[int, Colour]

    def shown(self, key: str) -> list[str]:
        """Names of the classes that a slice shows."""
        if key not in self.labels:
            return []
        return [self.classes[label] for label in np.unique(self.labels[key]).tolist() if label in self.classes]


NO_MASKS = Masks("none", {}, {}, {})


class Pictures:
    """Slices, masks and pictures of a node's folder, with what was read before kept in bounds.

    Parameters
    ----------
    palette : colours of the classes

    """

    def __init__(self, palette: Palette) -> None:
        self._palette = palette
        self._heads: Cache[list[Entry]] = Cache(HEAD_BYTES, lambda entries: ENTRY_BYTES * (1 + len(entries)))
        self._hu: Cache[NDArray[np.int16]] = Cache(HU_BYTES, attrgetter("nbytes"))
        self._masks: Cache[Masks] = Cache(MASK_BYTES, lambda masks: sum(one.nbytes for one in masks.labels.values()))
        self._pictures: Cache[bytes] = Cache(PICTURE_BYTES, len)

    def entries(self, paths: Sequence[Path]) -> list[Entry]:
        """The slices of a series in the order of their places, from foot to head where they are axial.

        Images that lie in another direction than most (a localizer) are left out.
        """
        found = [entry for path in paths for entry in self._heads.get(path, lambda path=path: _entries(path))]
        if not found:
            return []
        normals = np.array([entry.plane.normal_lps for entry in found])
        normal = (
            normals[int(np.argmax((np.abs(normals @ normals.T) > 0.99).sum(axis=0)))] if len(found) > 1 else normals[0]
        )
        kept = [entry for entry, one in zip(found, normals, strict=True) if abs(one @ normal) > 0.99]
        upwards = normal if normal[2] >= 0 else -normal
        return sorted(kept, key=lambda entry: (float(upwards @ np.asarray(entry.plane.origin_lps)), entry.number))

    def masks(self, path: Path) -> Masks:
        """What the ``seg.dcm`` of a result, or the ``early.npz`` of an open series, shows; nothing without one."""
        try:
            changed = path.stat().st_mtime_ns
            version = f"{path.parent.name}-{changed:x}"
            return self._masks.get((path, changed), lambda: self._read(path, version))
        except FileNotFoundError:
            return NO_MASKS
        except Exception as error:  # noqa: BLE001  # whatever the file is, the slices are shown without it
            log.warning("masks_unreadable", path=str(path), reason=type(error).__name__)
            return NO_MASKS

    def _read(self, path: Path, version: str) -> Masks:
        labels, found = _segmented(path) if path.suffix == ".dcm" else _early(path)
        colours = {label: self._palette.colour(name) for label, name in reversed(found.items())}
        return Masks(version, labels, found, colours)

    def hu(self, entry: Entry) -> NDArray[np.int16] | NotAnalysed:
        """Hounsfield units of a slice, or why there are none."""
        try:
            return self._hu.get((entry.path, entry.frame), lambda: _hu(entry))
        except NotAnalysed as refusal:
            return refusal

    def slice(self, entry: Entry, window: str) -> bytes | NotAnalysed:
        """A slice as PNG, at one of `picture.WINDOWS`."""

        def draw() -> bytes:
            hu = self.hu(entry)
            if isinstance(hu, NotAnalysed):
                raise hu
            return picture.png(picture.grey(hu, picture.WINDOWS[window]))

        try:
            return self._pictures.get((entry.path, entry.frame, window), draw)
        except NotAnalysed as refusal:
            return refusal

    def mask(self, entry: Entry, masks: Masks) -> bytes | None:
        """What was found in a slice as PNG, to lie on it; None where it is nothing."""
        labels = masks.labels.get(entry.key)
        if labels is None:
            return None
        return self._pictures.get(
            (entry.path, entry.frame, masks.version), lambda: picture.png(picture.overlay(labels, masks.colours))
        )


def patient(paths: Sequence[Path]) -> dict[str, str]:
    """Who a series is of, from the first of its files that can be read: keywords and text, absent ones left out."""
    for path in paths[:3]:
        try:
            head = _head(path)
        except (part10.DataSetError, OSError):
            continue
        return {keyword: value for keyword in _PATIENT if (value := _text(head, keyword))}
    return {}


def _text(head: Dataset, keyword: str) -> str:
    try:
        return str(head.get(keyword) or "").strip()
    except Exception:  # noqa: BLE001  # pydicom, of bytes that its VR can't hold
        return ""


def _head(path: Path) -> Dataset:
    """What is needed of the first bytes of a file of the spool."""
    with path.open("rb") as file:
        head = memoryview(file.read(spool.HEAD))
    start = 144 + int.from_bytes(head[140:144], "little")
    _, syntax = part10.file_meta(head[132:start])
    return part10.read_head(head[start:], syntax, _TAGS)


def _entries(path: Path) -> list[Entry]:
    """The images of a file; none where it can't be read, or says not where it lies."""
    try:
        return list(_read_entries(path))
    except Exception as error:  # noqa: BLE001  # parsers raise what they like on hostile bytes
        log.info("image_not_shown", image=path.stem, reason=type(error).__name__)
        return []


def _read_entries(path: Path) -> Iterator[Entry]:
    head = _head(path)
    is_multi_frame = head.get("SOPClassUID") in MULTI_FRAME
    # what does not stand within the first bytes is looked for in the whole file
    is_whole = not is_multi_frame and all(head.get(name) for name in ("Rows", "Columns", "PixelSpacing"))
    for image in [head] if is_whole else frames.read(path):
        frame = source.frame_number(image)
        yield Entry(
            name=path.stem if frame is None else f"{path.stem}-{frame}",
            path=path,
            frame=frame,
            key=source.slice_key(image),
            number=frame or int(image.get("InstanceNumber") or 0),
            plane=source.plane(image),
            shape=(int(image.Rows), int(image.Columns)),
        )


def _hu(entry: Entry) -> NDArray[np.int16]:
    answer = next(decode.read(entry.path, math.inf, entry.frame))
    if isinstance(answer, NotAnalysed):
        raise answer
    return answer[1].hu


def _segmented(path: Path) -> tuple[dict[str, NDArray[np.uint8]], dict[int, str]]:
    """Masks of a Segmentation of ours: BINARY, with a frame for each segment, or LABELMAP with one for all."""
    segmentation = dcmread(path)
    pixels = segmentation.pixel_array.reshape(-1, segmentation.Rows, segmentation.Columns)
    is_label_map = segmentation.SegmentationType == "LABELMAP"
    labels: dict[str, NDArray[np.uint8]] = {}
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    for frame, mask in zip(segmentation.PerFrameFunctionalGroupsSequence, pixels, strict=True):
        shown = frame.DerivationImageSequence[0].SourceImageSequence[0]
        number = shown.get("ReferencedFrameNumber")
        uid = str(shown.ReferencedSOPInstanceUID)
        key = uid if number is None else f"{uid} frame {number}"
        if is_label_map:
            labels[key] = mask.astype(np.uint8)
            continue
        identified = frame if "SegmentIdentificationSequence" in frame else shared  # of a single segment, once
        segment = int(identified.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        labels.setdefault(key, np.zeros(mask.shape, np.uint8))[mask > 0] = segment
    classes = {
        int(segment.SegmentNumber): str(segment.get("TrackingID") or segment.SegmentLabel)
        for segment in segmentation.SegmentSequence
        if segment.SegmentNumber > 0  # a label map describes its background, too
    }
    return labels, classes


def _early(path: Path) -> tuple[dict[str, NDArray[np.uint8]], dict[int, str]]:
    """Masks as `dicom_node.results.writing.write_early` leaves them."""
    with np.load(path, allow_pickle=False) as stored:
        classes = {int(label): str(name) for label, name in json.loads(stored.zip.comment).items()}
        return {key: stored[key].astype(np.uint8) for key in stored.files}, classes


def sides(entries: Sequence[Entry]) -> tuple[str, str]:
    """The patient's side at the left and right edge of the pictures."""
    return capture.sides(entries[0].plane) if entries else ("", "")
