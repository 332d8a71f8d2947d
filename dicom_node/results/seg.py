"""The masks as DICOM Segmentation (PS3.3 A.51): one segment per class found, each frame in its source's plane.

BINARY, which every archive and viewer takes, or LABELMAP (its own SOP class since DICOM 2024d), which holds all classes
in one frame for each slice.

Frames are written from the source images and never from a resampled volume: under gantry tilt, or where the step
changes within a series, there is no regular grid to resample to.

highdicom makes the object of one slice, which settles all but the frames. Those of all slices are made here, each
functional group encoded once for all frames that share it: highdicom and pydicom take two and a half times as long over
them, and share the first slice's plane among all.
"""

from __future__ import annotations

from collections import deque
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import numpy as np
from highdicom.color import CIELabColor
from highdicom.content import AlgorithmIdentificationSequence
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
from highdicom.sr import CodedConcept
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage
from pydicom.valuerep import DSfloat, format_number_as_ds

from dicom_node.results import codes
from dicom_node.results.encoding import encoded, numbers, put, sequence, settle, text
from dicom_node.results.source import instances, named, plane, slice_key
from dicom_node.results.uids import MANUFACTURER, long_string

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from pydicom.dataelem import RawDataElement

    from dicom_node.results.uids import Issue
    from runtime.types import Finding, ModelIdentity, Report

EVEN_STEP_MM = 0.01  # steps that differ by less are one spacing


def build(
    sources: Sequence[Dataset],
    labels: Sequence[NDArray[np.uint8]],
    report: Report,
    issue: Issue,
    kind: Literal["binary", "labelmap"] = "binary",
    own: Mapping[str, Sequence[RawDataElement]] = MappingProxyType({}),
) -> Segmentation | None:
    """Segmentation of the classes that the report finds; None where it finds none.

    Parameters
    ----------
    sources : normalised headers in stack order
    labels : of each of them ``(H, W)``, class index per pixel; classes without a finding are left out
    report : what was found; its n-th finding becomes segment n
    issue : names the object
    kind : SegmentationType
    own : `own_groups` of slices, by key, where they are there already

    Raises
    ------
    ValueError : a finding whose class no pixel has: a viewer hangs on an empty segment (OHIF issue 3991)

    """
    if not report.findings:
        return None
    bleeding = {key for finding in report.findings for key in finding.keys}
    # the last slice first, as highdicom orders frames
    shown = {slice_key(source): (source, of_slice) for source, of_slice in zip(sources, labels, strict=True)}
    shown = {key: pair for key, pair in reversed(shown.items()) if key in bleeding}
    slices, maps = zip(*shown.values(), strict=True)
    segmentation = Segmentation(
        source_images=[_single_frame(slices[0])],
        pixel_array=np.zeros((1, *maps[0].shape), np.uint8),
        segmentation_type=SegmentationTypeValues(kind.upper()),
        segment_descriptions=[
            _describe(number, finding, issue) for number, finding in enumerate(report.findings, start=1)
        ],
        content_label="HAEMORRHAGE",
        content_description="Intracranial haemorrhage by type. Research use only",
        omit_empty_frames=False,
        **issue.attributes("SEG", "seg", number=issue.revision),
    )
    dimensions = issue.instance("dimensions")  # highdicom draws a random one
    segmentation.DimensionOrganizationSequence[0].DimensionOrganizationUID = dimensions
    for index in segmentation.DimensionIndexSequence:
        index.DimensionOrganizationUID = dimensions
    groups = [[*(own.get(key) or own_groups(source))] for key, source in zip(shown, slices, strict=True)]
    _share_planes(segmentation, slices, _even_step_mm(sources), groups)
    places = dict(zip(shown, range(1, len(shown) + 1), strict=True))
    frames: list[tuple[int | None, int]] = [
        (number, places[key])
        for number, finding in enumerate(report.findings, start=1)
        for key in sorted(finding.keys, key=places.__getitem__)
    ]
    masks = (_mask(maps[place - 1], report.findings[number - 1]) for number, place in frames)
    if kind == "binary":
        pixels = b"".join(_packed(masks))
    else:
        deque(masks, maxlen=0)  # no segment may be empty here, either
        frames = [(None, place) for place in places.values()]
        pixels = b"".join(_segments(maps, report))
    _fill(segmentation, frames, groups, pixels)
    _name_sources(segmentation, reversed(slices))
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


def _single_frame(source: Dataset) -> Dataset:
    """A source as highdicom takes it, which would have all frames of a multi-frame image."""
    if source.SOPClassUID == CTImageStorage:
        return source
    twin = Dataset()
    twin.update(source)
    twin.add_new("SOPClassUID", "UI", CTImageStorage)  # a new entry: setting it would change the one that both share
    return twin


def _even_step_mm(sources: Sequence[Dataset]) -> float | None:
    """Distance between neighbours along the normal where all are alike, else None."""
    origins_lps = np.array([source["ImagePositionPatient"].value for source in sources], float)
    steps = np.diff(origins_lps @ plane(sources[0]).normal_lps)
    return float(steps.mean()) if len(steps) and np.ptp(steps) < EVEN_STEP_MM else None


def own_groups(source: Dataset) -> list[RawDataElement]:
    """Functional groups of a slice's frames, as far as its own header settles them: where it is, and what they show.

    Parameters
    ----------
    source : normalised, or what `dicom_node.results.source.own` made of it

    """
    purpose, derived = _codes_of_derivation()
    image = [*named(source), text("SpatialLocationsPreserved", "YES"), purpose]
    return [
        sequence("DerivationImageSequence", [[sequence("SourceImageSequence", [image]), derived]]),
        encoded("PlanePositionSequence", _copy(source, "ImagePositionPatient")),
    ]


@cache
def _codes_of_derivation() -> tuple[RawDataElement, RawDataElement]:
    return (
        encoded("PurposeOfReferenceCodeSequence", CodedConcept.from_code(codes.SOURCE_IMAGE)),
        encoded("DerivationCodeSequence", CodedConcept.from_code(codes.SEGMENTATION)),
    )


def _name_sources(segmentation: Segmentation, slices: Iterable[Dataset]) -> None:
    images = instances(slices).values()
    put(segmentation, sequence("SourceImageSequence", (named(*sources) for sources in images)))
    whole = (named(*sources, frames=False) for sources in images)
    put(segmentation.ReferencedSeriesSequence[0], sequence("ReferencedInstanceSequence", whole))


def _share_planes(
    segmentation: Segmentation,
    slices: Sequence[Dataset],
    step_mm: float | None,
    groups: Sequence[list[RawDataElement]],
) -> None:
    """Say how thick slices are, how large their pixels and how they are turned: to the letter, as each slice has it.

    A macro that is alike in all slices goes where all frames share it, else into the groups of each: it may be shared
    or per frame, never both (PS3.3 C.7.6.16). The spacing between slices is that of the whole stack, whatever frames
    are there.
    """
    macros = {
        "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness"),
        "PlaneOrientationSequence": ("ImageOrientationPatient",),
    }
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    for macro, keywords in macros.items():
        told = [[source[keyword].value for keyword in keywords] for source in slices]
        differ = any(one != told[0] for one in told)
        items = [_copy(source, *keywords) for source in (slices if differ else slices[:1])]
        if step_mm and macro == "PixelMeasuresSequence":
            for item in items:
                item.SpacingBetweenSlices = DSfloat(format_number_as_ds(step_mm))
        if not differ:
            setattr(shared, macro, items)
            continue
        delattr(shared, macro)
        for of_slice, item in zip(groups, items, strict=True):
            of_slice.append(encoded(macro, item))


def _copy(source: Dataset, *keywords: str) -> Dataset:
    copy = Dataset()
    for keyword in keywords:
        copy.add(source[keyword])
    return copy


def _mask(labels: NDArray[np.uint8], finding: Finding) -> NDArray[np.bool_]:
    mask = labels == finding.label
    if not mask.any():
        raise ValueError(f"no pixel shows {finding.name}: the label maps are not those that the report was made of")
    return mask


def _packed(masks: Iterable[NDArray[np.bool_]]) -> Iterator[bytes]:
    """A bit a pixel; a frame begins in the byte in which the last one ends (PS3.5 section 8.1.1)."""
    rest = np.empty(0, np.bool_)
    for mask in masks:
        bits = np.concatenate([rest, mask.ravel()]) if len(rest) else mask.ravel()
        whole = len(bits) // 8 * 8
        yield np.packbits(bits[:whole], bitorder="little").tobytes()
        rest = bits[whole:]
    yield np.packbits(rest, bitorder="little").tobytes()


def _segments(maps: Iterable[NDArray[np.uint8]], report: Report) -> Iterator[bytes]:
    """The number of the segment per pixel; 0 where there is none."""
    segment_of_label = bytearray(256)
    for number, finding in enumerate(report.findings, start=1):
        segment_of_label[finding.label] = number
    return (labels.tobytes().translate(segment_of_label) for labels in maps)  # ten times as fast as indexing


def _fill(
    segmentation: Segmentation,
    frames: Sequence[tuple[int | None, int]],
    groups: Sequence[Sequence[RawDataElement]],
    pixels: bytes,
) -> None:
    """Put frames in place of those of the one slice.

    Parameters
    ----------
    frames : of each the number of its segment (None where it shows all) and the place of its slice, from 1
    groups : functional groups of each slice
    pixels : of all frames

    """
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    is_shared = "SegmentIdentificationSequence" in shared  # where all are of one segment
    items = []
    for number, place in frames:
        index = (place,) if number is None else (number, place)
        elements = [sequence("FrameContentSequence", [[numbers("DimensionIndexValues", *index)]]), *groups[place - 1]]
        if number is not None and not is_shared:
            identified = numbers("ReferencedSegmentNumber", number)
            elements.append(sequence("SegmentIdentificationSequence", [[identified]]))
        items.append(elements)
    segmentation.NumberOfFrames = len(frames)
    segmentation.add_new("PixelData", "OB", pixels)
    settle(segmentation)
    put(segmentation, sequence("PerFrameFunctionalGroupsSequence", items))
