"""The measurements as Comprehensive 3D SR, template TID 1500 Measurement Report (PS3.16).

What is where, and why there:

* Imaging Measurements: one volumetric group (TID 1411) for each finding, with the segment it was measured on, tracked
  by the same UID, its volume, how many components, size and ABC/2 of the largest, the slices that show it best as image
  references, and the algorithm with its weights (TID 4019). The largest component's numbers have names of our own (see
  `codes`): a second number called Volume would be taken for the volume by readers that look for it by name.
  The highest probability goes into a comment: as a coded certainty it would be believed. A negative study has one group
  without a region (TID 1501) that says Presence absent; the two kinds are never mixed, for PixelMed's validator holds
  every group against both templates then.
* Qualitative Evaluations (TID 1500 row 12): whether there is any haemorrhage, and each class looked for and not found,
  as question and answer (row 13); as text (row 14) the triage as Conclusion, and as Comments the ICH score as far as it
  goes, what went in, what is missing, what lies below the threshold, the operating point, training data and limits.
* A class whose code is only the general one (see `codes`) is reported absent in a Comment: as a coded answer
  it would read "Intracranial hemorrhage: absent" beside a finding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from highdicom.coding_schemes import CodingSchemeIdentificationItem
from highdicom.sr import (
    AlgorithmIdentification,
    Comprehensive3DSR,
    ContainerContentItem,
    DeviceObserverIdentifyingAttributes,
    FindingSite,
    ImageContentItem,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    QualitativeEvaluation,
    ReferencedSegment,
    RelationshipTypeValues,
    SourceImageForSegmentation,
    SourceSeriesForSegmentation,
    TextContentItem,
    TrackingIdentifier,
    VolumetricROIMeasurementsAndQualitativeEvaluations,
)
from highdicom.sr.value_types import ContentSequence
from pydicom.uid import SegmentationStorage

from dicom_node.results import capture, codes
from dicom_node.results.encoding import put, sequence, settle
from dicom_node.results.source import frame_number, instances, named, slice_key
from dicom_node.results.uids import MANUFACTURER
from runtime import ich_score
from runtime.millilitres import said
from runtime.types import in_words

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from highdicom.seg import Segmentation
    from pydicom.dataset import Dataset
    from pydicom.sr.coding import Code

    from dicom_node.results.uids import Issue
    from runtime.types import Finding, Report

WHOLE_SERIES = "intracranial"  # tracking identifier of the finding "any haemorrhage"


def build(
    sources: Sequence[Dataset],
    segmentation: Segmentation | None,
    report: Report,
    issue: Issue,
    predecessor: Dataset | None = None,
) -> Dataset:
    """Report of what was found and of what was looked for and not found: a Comprehensive 3D SR.

    Its tree is in ContentSequence, as in the file; highdicom's own `content` has the first item alone.

    Parameters
    ----------
    sources : normalised headers; all of them are evidence
    segmentation : from `dicom_node.results.seg.build` with the same report and issue; None for a negative study
    report : what was found
    issue : names the object
    predecessor : the SR that this one replaces, named in PredecessorDocumentsSequence (PS3.3 C.17.2)

    """
    slices = {slice_key(source): source for source in sources}
    groups = [_volumetric(number, finding, slices, issue) for number, finding in enumerate(report.findings, start=1)]
    content = MeasurementReport(
        observation_context=ObservationContext(observer_device_context=_observer(issue)),
        procedure_reported=codes.CT_PROCEDURE,
        imaging_measurements=groups or [_negative(report, issue)],
    )
    root = content[0]
    items = [*root.ContentSequence, _qualitative_evaluations(report, issue)]
    root.ContentSequence = items[:1]  # highdicom copies what it gets and looks through it twice: half of its time
    document = Comprehensive3DSR(
        evidence=[sources[0], *([segmentation] if segmentation else [])],
        content=root,
        is_complete=True,
        is_final=not report.provisional,
        is_verified=False,
        previous_versions=[predecessor] if predecessor else None,
        coding_schemes=[
            CodingSchemeIdentificationItem(
                designator=codes.OWN_SCHEME, name="scanside's own codes", responsible_organization=MANUFACTURER
            )
        ],
        **issue.attributes("SR", "sr", number=issue.revision),
    )
    document.ContentSequence = items
    settle(document)
    _name_evidence(document, sources)
    return document


def _name_evidence(document: Dataset, sources: Sequence[Dataset]) -> None:
    """Have all of the series for evidence: highdicom, which gets one, would make data sets of each."""
    (study,) = document.CurrentRequestedProcedureEvidenceSequence
    (series,) = (one for one in study.ReferencedSeriesSequence if one.SeriesInstanceUID == sources[0].SeriesInstanceUID)
    images = instances(sources).values()
    put(series, sequence("ReferencedSOPSequence", (named(*of_image, frames=False) for of_image in images)))


def _observer(issue: Issue) -> ObserverContext:
    equipment = issue.equipment
    return ObserverContext(
        observer_type=codes.DEVICE,
        observer_identifying_attributes=DeviceObserverIdentifyingAttributes(
            uid=issue.device,
            name=equipment["manufacturer_model_name"],
            manufacturer_name=equipment["manufacturer"],
            model_name=equipment["manufacturer_model_name"],
            serial_number=equipment["device_serial_number"],
        ),
    )


def _negative(report: Report, issue: Issue) -> MeasurementsAndQualitativeEvaluations:
    """TID 1501: no finding anywhere in the series."""
    return MeasurementsAndQualitativeEvaluations(
        tracking_identifier=_track(WHOLE_SERIES, issue),
        finding_category=codes.MORPHOLOGICALLY_ABNORMAL,
        finding_type=codes.INTRACRANIAL_HEMORRHAGE,
        finding_sites=[FindingSite(anatomic_location=codes.INTRACRANIAL_STRUCTURE)],
        algorithm_id=_algorithm(issue),
        qualitative_evaluations=[QualitativeEvaluation(codes.PRESENCE, _presence(report))],
    )


def _volumetric(
    number: int, finding: Finding, slices: Mapping[str, Dataset], issue: Issue
) -> VolumetricROIMeasurementsAndQualitativeEvaluations:
    """TID 1411: one finding, the segment that shows it and its numbers."""
    code = issue.code(finding.name)
    group = VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=_track(finding.name, issue),
        # built by hand: from_segmentation() fails on a segmentation of one segment (highdicom 0.28)
        referenced_segment=ReferencedSegment(
            sop_class_uid=SegmentationStorage,
            sop_instance_uid=issue.instance("seg"),
            segment_number=number,
            **_segmented(finding, slices, issue),
        ),
        finding_category=codes.MORPHOLOGICALLY_ABNORMAL,
        finding_type=code.finding,
        finding_sites=[FindingSite(anatomic_location=code.site)],
        algorithm_id=_algorithm(issue),
        measurements=[
            Measurement(codes.VOLUME, round(finding.volume_ml, 3), codes.CUBIC_CENTIMETER),
            Measurement(codes.NUMBER_OF_LESIONS, finding.components, codes.COMPONENTS),
            Measurement(codes.LARGEST, round(finding.largest_ml, 3), codes.CUBIC_CENTIMETER),
            Measurement(codes.ABC2, round(finding.abc2_ml, 3), codes.CUBIC_CENTIMETER),
        ],
        qualitative_evaluations=[QualitativeEvaluation(codes.PRESENCE, codes.PRESENT)],
    )
    group[0].ContentSequence.extend(_illustrations(finding, slices))
    comment = (
        f"{code.title}: {said(finding.volume_ml)}, connected components: {finding.components}, the largest "
        f"{said(finding.largest_ml)}, by ABC/2 {said(finding.abc2_ml)}; slices that show it: {len(finding.keys)}. "
        f"Highest class probability of any pixel: {finding.probability:.2f}, no measure of certainty: "
        f"{issue.model.calibration}. Codes: {code.provenance}."
    )
    group[0].ContentSequence.append(_text(codes.COMMENT, comment))
    return group


def _segmented(finding: Finding, slices: Mapping[str, Dataset], issue: Issue) -> dict[str, Any]:
    """What a finding was segmented on: frames of multi-frame images, which are few, by number; else the series.

    A reference to the series instead of every slice is a fifth of the time and size.
    """
    if any(frame_number(source) is None for source in slices.values()):
        return {"source_series": SourceSeriesForSegmentation(issue.series_uid)}
    shown = instances(source for key, source in slices.items() if key in finding.keys)
    return {
        "source_images": [
            SourceImageForSegmentation(str(frames[0].SOPClassUID), uid, list(map(frame_number, frames)))
            for uid, frames in shown.items()
        ]
    }


def _track(name: str, issue: Issue) -> TrackingIdentifier:
    return TrackingIdentifier(uid=issue.tracking(name), identifier=name)


def _illustrations(finding: Finding, slices: Mapping[str, Dataset]) -> Iterator[ImageContentItem]:
    """The slice that shows most of a finding, then those a quarter and three quarters through it."""
    for key in capture.telling(finding):
        source = slices[key]
        yield ImageContentItem(
            name=codes.BEST_ILLUSTRATION if key == finding.key_slice else codes.ILLUSTRATION,
            referenced_sop_class_uid=source.SOPClassUID,
            referenced_sop_instance_uid=source.SOPInstanceUID,
            referenced_frame_numbers=frame_number(source),
            relationship_type=RelationshipTypeValues.CONTAINS,
        )


def _algorithm(issue: Issue) -> AlgorithmIdentification:
    """TID 4019: which algorithm, with which weights, in which precision, on which engine."""
    model = issue.model
    return AlgorithmIdentification(
        name=model.name,
        version=model.version,
        manufacturer=MANUFACTURER,
        family=codes.ARTIFICIAL_INTELLIGENCE,
        parameters=[f"sha256={model.digest}", f"precision={model.precision}", f"backend={model.backend}"],
    )


def _presence(report: Report) -> Code:
    """Whether there is any haemorrhage; absent only where nothing at all was seen and nothing is missing."""
    if report.findings:
        return codes.PRESENT
    return codes.INDETERMINATE if report.below_threshold or report.provisional else codes.ABSENT


def _qualitative_evaluations(report: Report, issue: Issue) -> ContainerContentItem:
    container = ContainerContentItem(codes.QUALITATIVE_EVALUATIONS, relationship_type=RelationshipTypeValues.CONTAINS)
    content = ContentSequence(QualitativeEvaluation(codes.INTRACRANIAL_HEMORRHAGE, _presence(report)))
    unseen = codes.INDETERMINATE if report.provisional else codes.ABSENT  # on part of a head nothing can be ruled out
    for name in _unseen(report):
        if (finding := issue.code(name).finding) != codes.INTRACRANIAL_HEMORRHAGE:
            content.extend(QualitativeEvaluation(finding, unseen))
    decision = report.decision
    content.append(_text(codes.CONCLUSION, f"Triage: {decision.level.upper()}. {decision.reason}"))
    content.extend(_text(codes.COMMENT, comment) for comment in comments(report, issue))
    container.ContentSequence = content
    return container


def _unseen(report: Report) -> list[str]:
    """Classes of which nothing was seen; of one below the threshold the report says that, and not that it is absent."""
    below = {name for name, _ in report.below_threshold}
    return [name for name in report.absent if name not in below]


def comments(report: Report, issue: Issue) -> Iterator[str]:
    """What there is to know of a report beside its numbers, one sentence or two each."""
    if part := ich_score.score(report):
        yield str(part)
    thinnest_mm, thickest_mm = report.thickness_mm
    yield (
        f"Slices analysed: {report.slices}, thickness along the normal {thinnest_mm:.2f} to {thickest_mm:.2f} mm, "
        f"{report.coverage_mm:.0f} mm in all, gantry tilt {report.tilt_deg:.1f} degrees."
    )
    for name in _unseen(report):
        if (code := issue.code(name)).finding == codes.INTRACRANIAL_HEMORRHAGE:
            yield (
                f"Not found in the slices that are there, and not excluded: {code.title}."
                if report.provisional
                else f"Looked for and not found: {code.title}."
            )
    if report.provisional:
        yield "Provisional: slices are missing or may still come; a later revision replaces this document."
    for sentence in report.missing:
        yield f"Missing or left out: {sentence}"
    for name, volume_ml in report.below_threshold:
        yield f"Below the reporting threshold: {issue.code(name).title}, {said(volume_ml)}."
    if point := in_words(report.operating_point):
        yield f"Operating point, below which nothing is a finding: {point}."
    model = report.model
    yield (
        f"Model: {model.name} {model.version}, bundle sha256 {model.digest}, precision {model.precision}, "
        f"engine {model.backend}."
    )
    yield f"Training data: {model.training_data}"
    yield "Research use only, not a medical device. Not reviewed by a physician."


def _text(name: Code, value: str) -> TextContentItem:
    return TextContentItem(name=name, value=value, relationship_type=RelationshipTypeValues.CONTAINS)
