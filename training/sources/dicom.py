"""DICOM series with their masks: DICOM SEG, RT structure sets, or NIfTI beside them.

One folder may hold anything: files are told apart by what is in them, and brought together by their UIDs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    MRImageStorage,
    RTStructureSetStorage,
    SegmentationStorage,
)

from runtime import geometry
from runtime.errors import GeometryError
from training.sources import dicom_nifti, dicom_rtstruct, dicom_seg, folder, labels, nifti
from training.sources.case import Case, Entry
from training.sources.dicom_image import AGAIN, read, read_pixels, read_plane, required, text
from training.sources.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from runtime.types import Plane, SliceStack

Unmasked = Literal["refuse", "skip", "negative"]

LABEL_MAP_SEGMENTATION_STORAGE = "1.2.840.10008.5.1.4.1.1.66.7"  # PS3.4 B.5; pydicom 3.0 has no name for it
_IMAGES = (CTImageStorage, MRImageStorage)
_MULTI_FRAME = (
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
)
_MASKS = {
    SegmentationStorage: dicom_seg.read_labels,
    LABEL_MAP_SEGMENTATION_STORAGE: dicom_seg.read_labels,
    RTStructureSetStorage: dicom_rtstruct.read_labels,
}
_REFERENCES = (
    "ReferencedSeriesSequence",
    "ReferencedFrameOfReferenceSequence",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "StructureSetROISequence",
    "ROIContourSequence",
)
_IDENTITY = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "PatientID", "ImageType")


@dataclass(slots=True)
class _Series:
    """One series as it is found, before anything of it is decoded."""

    patient: str = field(repr=False)
    sop_class: str
    frame_of_reference: str
    files: dict[str, Path] = field(default_factory=dict)  # by SOP Instance UID
    masks: list[tuple[Path, str]] = field(default_factory=list)  # with what kind of mask it is: a SOP class, or NIfTI

    @property
    def folder(self) -> Path:
        return next(iter(self.files.values())).parent


def entries(root: Path, *, classes: Mapping[str | int, int], unmasked: Unmasked = "refuse") -> tuple[Entry, ...]:
    """List the CT and MR series below a folder with their masks, one case a series.

    A segmentation belongs to the series whose slices it refers to, a structure set too, or to the only series in its
    frame of reference. A NIfTI mask belongs to the series in whose folder it lies, or beside whose folder it lies under
    the folder's name. Localizers, and objects that are neither images nor masks (reports, dose, presentation states,
    captures), are passed over. The patient is the PatientID, and in no message.

    Parameters
    ----------
    root : folder with DICOM Part 10 files at any depth
    classes : class index by SegmentLabel, ROIName or NIfTI mask value; 0 leaves one out
    unmasked : what a series without a mask is: an error, no case, or a case without blood

    Raises
    ------
    SourceError : files that can't be read, one slice twice, a mask without its series, several masks of one series, a
        series without a mask or a PatientID

    """
    labels.check_classes(classes, root)
    paths = folder.list_files(root)
    niftis = [path for path in paths if folder.suffix(path) in nifti.SUFFIXES]
    series, masks = _index(path for path in paths if folder.suffix(path) not in nifti.SUFFIXES)
    if not series:
        raise SourceError(root, "no CT or MR image", "check the path")
    for path, kind, owners in _owners(series, masks):
        _only(path, owners).masks.append((path, kind))
    for path in niftis:
        _only(path, _neighbours(path, series)).masks.append((path, "NIfTI"))
    found = []
    for name, each in _named(series.values(), root):
        if len(each.masks) > 1:
            raise SourceError(each.masks[1][0], f"a second mask beside {each.masks[0][0].name}", "keep one a series")
        if not each.masks and unmasked == "refuse":
            raise SourceError(each.folder, f"series {name} has no mask", "add it, or set unmasked to skip or negative")
        if each.masks or unmasked == "negative":
            found.append(Entry(each.patient, name, partial(_load, name, each, classes)))
    return tuple(found)


def _index(paths: Iterable[Path]) -> tuple[dict[str, _Series], list[tuple[Path, str]]]:
    """Series by their UID, and masks with their SOP class."""
    series: dict[str, _Series] = {}
    masks: list[tuple[Path, str]] = []
    for path in paths:
        header = read(path, _IDENTITY)
        sop_class = str(required(header, "SOPClassUID", path))
        if sop_class in _MULTI_FRAME:
            raise SourceError(path, "a multi-frame image", "convert it to single-frame images, or take it away")
        if sop_class in _MASKS:
            masks.append((path, sop_class))
        if sop_class not in _IMAGES or "LOCALIZER" in (header.get("ImageType") or ()):
            continue
        patient = text(header, "PatientID")
        if not patient:
            raise SourceError(path, "no PatientID: without it a split by patient can't be made", "add a pseudonym")
        uid = str(required(header, "SeriesInstanceUID", path))
        each = series.setdefault(uid, _Series(patient, sop_class, text(header, "FrameOfReferenceUID")))
        if (each.patient, each.sop_class) != (patient, sop_class):
            raise SourceError(path, "another patient or modality than the rest of its series", "export it again")
        instance = str(required(header, "SOPInstanceUID", path))
        if instance in each.files:
            raise SourceError(path, f"the same instance as {each.files[instance].name}", "remove one of the two")
        each.files[instance] = path
    return series, masks


def _owners(
    series: Mapping[str, _Series], masks: Iterable[tuple[Path, str]]
) -> Iterator[tuple[Path, str, list[_Series]]]:
    """Each segmentation or structure set with the series that it was made on."""
    of_instance = {instance: uid for uid, each in series.items() for instance in each.files}
    in_frame: dict[str, list[str]] = {}
    for uid, each in series.items():
        in_frame.setdefault(each.frame_of_reference, []).append(uid)
    for path, kind in masks:
        named: dict[str, set[str]] = {}
        for element in read(path, _REFERENCES).iterall():
            if element.VR == "UI":
                named.setdefault(element.keyword, set()).add(str(element.value))
        uids = named.get("SeriesInstanceUID", set()) & series.keys()
        uids |= {of_instance[uid] for uid in named.get("ReferencedSOPInstanceUID", ()) if uid in of_instance}
        if not uids:
            uids = {uid for frame in named.get("ReferencedFrameOfReferenceUID", ()) for uid in in_frame.get(frame, ())}
        yield path, kind, [series[uid] for uid in uids]


def _neighbours(path: Path, series: Mapping[str, _Series]) -> list[_Series]:
    """The series in whose folder a NIfTI mask lies, or beside whose folder it lies under its name."""
    inside = [each for each in series.values() if each.folder == path.parent]
    beside = path.parent / folder.stem(path, path.parent)
    return inside or [each for each in series.values() if each.folder == beside]


def _only(path: Path, owners: Sequence[_Series]) -> _Series:
    if not owners:
        raise SourceError(path, "mask without image", "add the series that it was drawn on, or take the mask away")
    if len(owners) > 1:
        raise SourceError(
            path, f"mask of {len(owners)} series", "keep one series and its mask in a folder of their own"
        )
    return owners[0]


def _named(series: Iterable[_Series], root: Path) -> list[tuple[str, _Series]]:
    """Each series with a name of its own: its folder, and a number where it shares that."""
    by_folder: dict[str, list[_Series]] = {}
    for each in series:
        relative = each.folder.relative_to(root).as_posix()
        by_folder.setdefault(root.name if relative == "." else relative, []).append(each)
    return [
        (name if len(shared) == 1 else f"{name}#{number}", each)
        for name, shared in sorted(by_folder.items())
        for number, each in enumerate(shared, start=1)
    ]


def _load(name: str, series: _Series, classes: Mapping[str | int, int]) -> Case:
    planes: dict[str, Plane] = {}
    pixels: dict[str, NDArray[np.int16]] = {}
    lossy = 0
    for uid, path in series.files.items():
        image = read(path)
        planes[uid] = read_plane(image, path)
        pixels[uid] = read_pixels(image, path)
        lossy += text(image, "LossyImageCompression") == "01"
        first = next(iter(planes))
        if pixels[uid].shape != pixels[first].shape or not np.allclose(
            planes[uid].spacing_mm, planes[first].spacing_mm
        ):
            raise SourceError(path, "another size or pixel spacing than the rest of its series", AGAIN)
    try:
        stack = geometry.stack(planes)
    except GeometryError as error:
        raise SourceError(series.folder, f"no stack of slices ({error})", "give each orientation its series") from error
    shape = pixels[stack.keys[0]].shape
    truth = np.zeros((len(stack), *shape), np.uint8)
    for path, kind in series.masks:
        truth = _MASKS.get(kind, dicom_nifti.read_labels)(path, stack, shape, classes)
    notes = [f"a step of {gap.step_mm:.2f} mm: {gap.missing} slices may be missing" for gap in stack.gaps]
    if lossy:
        notes.append(f"{lossy} slices were compressed with loss")
    row_mm, column_mm = stack.planes[0].spacing_mm
    return Case(
        patient=series.patient,
        name=name,
        images=np.stack([pixels[uid] for uid in stack.keys]),
        labels=truth,
        quantity="HU" if series.sop_class == CTImageStorage else "grey",
        spacing_mm=(_step_mm(stack), row_mm, column_mm),
        thickness_mm=stack.thickness_mm,
        origin_mm=stack.origin_mm,
        excluded=(("lies where another slice lies", len(stack.repeated)),) if stack.repeated else (),
        notes=tuple(notes),
    )


def _step_mm(stack: SliceStack) -> float:
    """Median distance between neighbours along the normal; of a single slice its thickness."""
    if len(stack) == 1:
        return float(stack.thickness_mm[0])
    along = [float(stack.planes[0].normal_lps @ np.asarray(plane.origin_lps)) for plane in stack.planes]
    return float(np.median(np.diff(along)))
