"""The masks as DICOM Segmentation (PS3.3 A.51): one segment per class found, each frame in its source's plane.

BINARY, which every archive and viewer takes, or LABELMAP (its own SOP class since DICOM 2024d), which holds all classes
in one frame for each slice.

Frames are written from the source images and never from a resampled volume: under gantry tilt, or where the step
changes within a series, there is no regular grid to resample to.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Literal

import numpy as np
from highdicom.color import CIELabColor
from highdicom.content import AlgorithmIdentificationSequence
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage
from pydicom.valuerep import DSfloat, format_number_as_ds

from dicom_node import codes
from dicom_node.source import instances, plane, reference, slice_key
from dicom_node.uids import MANUFACTURER, long_string

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dicom_node.uids import Issue
    from runtime.types import Finding, ModelIdentity, Report

EVEN_STEP_MM = 0.01  # steps that differ by less are one spacing


def build(
    sources: Sequence[Dataset],
    labels: Sequence[NDArray[np.uint8]],
    report: Report,
    issue: Issue,
    kind: Literal["binary", "labelmap"] = "binary",
) -> Segmentation | None:
    """Segmentation of the classes that the report finds; None where it finds none.

    Parameters
    ----------
    sources : normalised headers in stack order
    labels : of each of them ``(H, W)``, class index per pixel; classes without a finding are left out
    report : what was found; its n-th finding becomes segment n
    issue : names the object
    kind : SegmentationType

    Raises
    ------
    ValueError : a finding whose class no pixel has: a viewer hangs on an empty segment (OHIF issue 3991)

    """
    if not report.findings:
        return None
    segment_of_label = bytearray(256)
    for number, finding in enumerate(report.findings, start=1):
        segment_of_label[finding.label] = number
    bleeding = {key for finding in report.findings for key in finding.keys}
    shown: list[Dataset] = []
    masks: list[NDArray[np.uint8]] = []
    empty = set(range(1, len(report.findings) + 1))
    for source, slice_labels in zip(sources, labels, strict=True):  # slice by slice: it stays in the cache
        if slice_key(source) not in bleeding:
            continue
        # bytes.translate takes a tenth of the time of indexing with the labels
        mask = np.frombuffer(slice_labels.tobytes().translate(segment_of_label), np.uint8).reshape(slice_labels.shape)
        if mask.any():
            shown.append(source)
            masks.append(mask)
            empty -= {number for number in empty if (mask == number).any()}
    if empty:
        names = ", ".join(report.findings[number - 1].name for number in sorted(empty))
        raise ValueError(f"no pixel shows {names}: the label maps are not those that the report was made of")

    stand_ins = [_stand_in(source, shown[0]) for source in shown]
    segmentation = Segmentation(
        source_images=stand_ins,
        pixel_array=np.stack(masks),
        segmentation_type=SegmentationTypeValues(kind.upper()),
        segment_descriptions=[
            _describe(number, finding, issue) for number, finding in enumerate(report.findings, start=1)
        ],
        content_label="HAEMORRHAGE",
        content_description="Intracranial haemorrhage by type. Research use only",
        omit_empty_frames=True,
        **issue.attributes("SEG", "seg", number=issue.revision),
    )
    slices = {slice_key(source): source for source in shown}
    _restore_planes(segmentation, slices, _even_step_mm(sources))
    if any(one is not source for one, source in zip(stand_ins, shown, strict=True)):
        _restore_references(segmentation, slices)
    dimensions = issue.instance("dimensions")  # highdicom draws a random one
    segmentation.DimensionOrganizationSequence[0].DimensionOrganizationUID = dimensions
    for index in segmentation.DimensionIndexSequence:
        index.DimensionOrganizationUID = dimensions
    return segmentation


def _describe(number: int, finding: Finding, issue: Issue) -> SegmentDescription:
    code = issue.code(finding.name)
    return SegmentDescription(
        segment_number=number,
        segment_label=code.title,
        segmented_property_category=codes.MORPHOLOGICALLY_ABNORMAL,
        segmented_property_type=codes.HEMORRHAGE,
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=_identify(issue.model),
        tracking_uid=issue.tracking(finding.name),
        tracking_id=finding.name,
        anatomic_regions=[code.site],
        display_color=CIELabColor.from_rgb(*code.colour),
    )


def _identify(model: ModelIdentity) -> AlgorithmIdentificationSequence:
    return AlgorithmIdentificationSequence(
        name=long_string(model.name),
        family=codes.ARTIFICIAL_INTELLIGENCE,
        version=long_string(model.version),
        source=MANUFACTURER,
        parameters={"sha256": model.digest, "precision": model.precision, "backend": model.backend},
    )


def _stand_in(source: Dataset, first: Dataset) -> Dataset:
    """A source as highdicom takes it; what it says of one that is not the source itself is put right afterwards.

    It refuses orientations that differ in the last digit from the first one's, and several multi-frame images: a frame
    goes as a single-frame image of its own.
    """
    orientation = source["ImageOrientationPatient"].value
    if source.SOPClassUID == CTImageStorage and orientation == first["ImageOrientationPatient"].value:
        return source
    twin = Dataset()
    twin.update(source)
    # new entries: setting an attribute would change the element that both share
    twin.add(first["ImageOrientationPatient"])
    twin.add_new("SOPClassUID", "UI", CTImageStorage)
    twin.add_new("SOPInstanceUID", "UI", slice_key(source))
    return twin


def _even_step_mm(sources: Sequence[Dataset]) -> float | None:
    """Distance between neighbours along the normal where all are alike, else None."""
    origins_lps = np.array([source["ImagePositionPatient"].value for source in sources], float)
    steps = np.diff(origins_lps @ plane(sources[0]).normal_lps)
    return float(steps.mean()) if len(steps) and np.ptp(steps) < EVEN_STEP_MM else None


def _restore_planes(segmentation: Segmentation, slices: dict[str, Dataset], step_mm: float | None) -> None:
    """Give each frame exactly the plane of its source.

    highdicom shares the first source's spacing, thickness and orientation among all frames, and takes the spacing
    between slices from the frames that are there. Here the strings come from each frame's own source, a macro that
    differs between slices goes into the frames (it may be shared or per frame, never both: PS3.3 C.7.6.16), and the
    spacing is that of the whole stack.
    """
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    groups = {
        "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness"),
        "PlaneOrientationSequence": ("ImageOrientationPatient",),
    }
    for sequence, keywords in groups.items():
        told = [[source[keyword].value for keyword in keywords] for source in slices.values()]
        differ = any(one != told[0] for one in told)
        items = {key: _item(source, keywords) for key, source in islice(slices.items(), None if differ else 1)}
        if step_mm and sequence == "PixelMeasuresSequence":
            for item in items.values():
                item.SpacingBetweenSlices = DSfloat(format_number_as_ds(step_mm))
        if not differ:
            setattr(shared, sequence, list(items.values()))
            continue
        delattr(shared, sequence)
        for frame in segmentation.PerFrameFunctionalGroupsSequence:
            setattr(frame, sequence, [items[_source_key(frame)]])
    for frame in segmentation.PerFrameFunctionalGroupsSequence:
        frame.PlanePositionSequence = [_item(slices[_source_key(frame)], ("ImagePositionPatient",))]


def _item(source: Dataset, keywords: tuple[str, ...]) -> Dataset:
    item = Dataset()
    for keyword in keywords:
        item.add(source[keyword])
    return item


def _source_key(frame: Dataset) -> str:
    return str(frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID)


def _restore_references(segmentation: Segmentation, slices: dict[str, Dataset]) -> None:
    """Name the sources and their frames where the stand-ins are named."""
    frames = segmentation.PerFrameFunctionalGroupsSequence
    for frame, key in zip(frames, [_source_key(frame) for frame in frames], strict=True):  # segments share their items
        frame.DerivationImageSequence[0].SourceImageSequence[0].update(reference(slices[key]))
    grouped = instances(slices.values())
    segmentation.SourceImageSequence = [reference(*sources) for sources in grouped.values()]
    segmentation.ReferencedSeriesSequence[0].ReferencedInstanceSequence = [
        _item(item, ("ReferencedSOPClassUID", "ReferencedSOPInstanceUID")) for item in segmentation.SourceImageSequence
    ]
