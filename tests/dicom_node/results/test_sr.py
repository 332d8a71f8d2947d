from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import highdicom as hd
import pytest
from highdicom.sr.utils import find_content_items
from pydicom.uid import CTImageStorage

from dicom_node.results import codes, source, sr, writing
from runtime.millilitres import said
from runtime.types import OperatingPoint
from tests.dicom_node import ct

if TYPE_CHECKING:
    from pathlib import Path

    from pydicom import Dataset

CASES = ct.cases()


def read_back(name: str, folder: Path) -> hd.sr.Comprehensive3DSR:
    return hd.sr.srread(writing.write(ct.built(name), folder)["sr"])


def presence(group: hd.sr.MeasurementsAndQualitativeEvaluations) -> hd.sr.CodedConcept:
    (evaluation,) = group.get_qualitative_evaluations(name=codes.PRESENCE)
    return evaluation.value


def texts(document: Dataset, name: object) -> list[str]:
    return [str(item.TextValue) for item in find_content_items(document, name=name, recursive=True)]


@pytest.mark.parametrize("name", ["six findings", "negative", "revision 2", "foreign class", "poor source"])
def test_it_is_to_the_byte_what_highdicom_and_pydicom_make_of_all_slices(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, make, seen = CASES[name], sr.Comprehensive3DSR, []
    ours = writing.write(case.build(), tmp_path / "ours")["sr"].read_bytes()

    def of_all(*, evidence: list[Dataset], **rest: object) -> Dataset:
        seen.append(evidence)
        return make(evidence=[*source.normalise(case.sources)[0], *evidence[1:]], **rest)

    monkeypatch.setattr(sr, "Comprehensive3DSR", of_all)
    monkeypatch.setattr(sr, "settle", lambda _: None)
    monkeypatch.setattr(sr, "_name_evidence", lambda *_: None)
    theirs = writing.write(case.build(), tmp_path / "theirs")["sr"].read_bytes()
    assert len(seen) == 1
    assert ours == theirs


@pytest.mark.parametrize("name", CASES)
def test_one_volumetric_group_for_each_finding(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    document = read_back(name, tmp_path)
    groups = document.content.get_volumetric_roi_measurement_groups()
    assert len(groups) == len(case.report.findings)
    for number, (group, finding) in enumerate(zip(groups, case.report.findings, strict=True), start=1):
        code = codes.look_up(finding.name)
        assert group.tracking_identifier == finding.name
        assert group.finding_category == codes.MORPHOLOGICALLY_ABNORMAL
        assert group.finding_type == code.finding
        assert [site.value for site in group.finding_sites] == [code.site]
        assert presence(group) == codes.PRESENT
        (volume,) = group.get_measurements(name=codes.VOLUME)
        assert volume.value == pytest.approx(finding.volume_ml, abs=0.0006)
        assert volume.unit == codes.CUBIC_CENTIMETER
        (count,) = group.get_measurements(name=codes.NUMBER_OF_LESIONS)
        assert count.value == finding.components
        assert (
            f"{finding.probability:.2f}, no measure of certainty: not calibrated" in texts(group[0], codes.COMMENT)[0]
        )
        for name_of, told_ml in ((codes.LARGEST, finding.largest_ml), (codes.ABC2, finding.abc2_ml)):
            (one,) = group.get_measurements(name=name_of)
            assert one.value == pytest.approx(told_ml, abs=0.0006)
            assert "volume" not in one.name.meaning.lower()  # by name, a reader finds the volume alone
        assert group.referenced_segment.referenced_segment_numbers == [number]
        assert f"the largest {said(finding.largest_ml)}" in texts(group[0], codes.COMMENT)[0]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.report.findings])
def test_report_and_segmentation_track_the_same_things(name: str, tmp_path: Path) -> None:
    paths = writing.write(ct.built(name), tmp_path)
    document, segmentation = hd.sr.srread(paths["sr"]), hd.seg.segread(paths["seg"])
    for group in document.content.get_volumetric_roi_measurement_groups():
        reference = group.referenced_segment
        assert reference.referenced_sop_instance_uid == segmentation.SOPInstanceUID
        assert reference.referenced_sop_class_uid == segmentation.SOPClassUID
        (number,) = reference.referenced_segment_numbers
        described = segmentation.get_segment_description(number)
        assert (group.tracking_uid, group.tracking_identifier) == (described.tracking_uid, described.tracking_id)
        assert reference.source_series_for_segmentation.value == CASES[name].sources[0].SeriesInstanceUID


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.report.findings])
def test_key_images_are_references_in_the_tree(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    for group, finding in zip(
        read_back(name, tmp_path).content.get_volumetric_roi_measurement_groups(), case.report.findings, strict=True
    ):
        (best,) = find_content_items(group[0], name=codes.BEST_ILLUSTRATION)
        others = find_content_items(group[0], name=codes.ILLUSTRATION)
        assert best.referenced_sop_instance_uid == finding.key_slice
        shown = [item.referenced_sop_instance_uid for item in (best, *others)]
        assert len(set(shown)) == len(shown)
        assert set(shown) <= set(finding.keys)
        assert {item.referenced_sop_class_uid for item in (best, *others)} == {CTImageStorage}


def test_the_imaging_part_of_the_ich_score(tmp_path: Path) -> None:
    (told,) = [text for text in texts(read_back("six findings", tmp_path), codes.COMMENT) if "ICH score" in text]
    assert "intraventricular extension: yes, 1" in told
    assert "Not computable here: infratentorial origin" in told
    assert "ICH score" not in "".join(texts(read_back("one finding", tmp_path / "subdural"), codes.COMMENT))


def test_the_operating_point_stands_where_there_is_one() -> None:
    case, half = CASES["negative"], OperatingPoint(0.5)
    points = {"intracerebral": half, "subdural": half, "epidural": OperatingPoint(1, 0.9)}
    told = [
        [text for text in texts(replace(case, report=report).build().sr, codes.COMMENT) if "Operating" in text]
        for report in (case.report, replace(case.report, operating_point=points))
    ]
    said_so = "intracerebral, subdural from 0.5 ml; epidural from 1 ml, probability 0.9."
    assert told == [[], [f"Operating point, below which nothing is a finding: {said_so}"]]


def answers(document: Dataset) -> dict[str, object]:
    """Questions and answers of the Qualitative Evaluations container."""
    (container,) = find_content_items(document, name=codes.QUALITATIVE_EVALUATIONS)
    items = find_content_items(container, value_type="CODE", relationship_type="CONTAINS")
    return {item.name.value: item.value for item in items}


@pytest.mark.parametrize("name", CASES)
def test_what_is_there_and_what_was_looked_for_in_vain(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    document = read_back(name, tmp_path)
    told = answers(document)
    assert told.pop(codes.INTRACRANIAL_HEMORRHAGE.value) == (codes.PRESENT if case.report.findings else codes.ABSENT)
    found = {codes.look_up(finding.name).finding.value for finding in case.report.findings}
    # on part of a head nothing can be ruled out
    unseen = codes.INDETERMINATE if case.report.provisional else codes.ABSENT
    assert all(answer == unseen for answer in told.values())
    assert not found & told.keys()
    comments = "\n".join(texts(document, codes.COMMENT))
    below = {name for name, _ in case.report.below_threshold}
    assert not {codes.look_up(name).finding.value for name in below} & told.keys()
    for absent in set(case.report.absent) - below:
        code = codes.look_up(absent)
        part = "Not found in the slices that are there, and not excluded"
        words = part if case.report.provisional else "Looked for and not found"
        assert code.finding.value in told or f"{words}: {code.title}." in comments


def test_a_negative_study_says_absent(tmp_path: Path) -> None:
    (group,) = read_back("negative", tmp_path).content.get_image_measurement_groups()
    assert group.finding_type == codes.INTRACRANIAL_HEMORRHAGE
    assert presence(group) == codes.ABSENT


def test_a_class_with_a_general_code_is_never_answered_absent_beside_a_finding(tmp_path: Path) -> None:
    case = CASES["one finding"]
    assert "intraventricular" in case.report.absent
    document = read_back("one finding", tmp_path)
    assert answers(document)[codes.INTRACRANIAL_HEMORRHAGE.value] == codes.PRESENT
    assert "Looked for and not found: Intraventricular haemorrhage." in texts(document, codes.COMMENT)


def test_every_source_and_the_segmentation_are_evidence(tmp_path: Path) -> None:
    case = CASES["one finding"]
    built = ct.built("one finding")
    document = hd.sr.srread(writing.write(built, tmp_path)["sr"])
    evidence = {uid for _, _, uid, _ in document.get_evidence()}
    assert evidence == {*case.keys, str(built.seg.SOPInstanceUID)}
    named = set()
    for item in built.sr.ContentSequence:
        item.walk(
            lambda _, element: named.add(element.value) if element.keyword == "ReferencedSOPInstanceUID" else None
        )
    assert built.seg.SOPInstanceUID in named
    assert named <= evidence


def test_text_says_what_the_numbers_do_not(tmp_path: Path) -> None:
    case = CASES["provisional"]
    document = read_back("provisional", tmp_path)
    assert texts(document, codes.CONCLUSION) == ["Triage: CRITICAL. " + case.report.decision.reason]
    told = "\n".join(texts(document, codes.COMMENT))
    for part in (
        "Slices analysed: 12",
        "gantry tilt 0.0 degrees",
        "Provisional",
        case.report.missing[0],
        ct.MODEL.digest,
        "precision fp32",
        ct.MODEL.backend,
        ct.MODEL.training_data,
        "Research use only, not a medical device",
    ):
        assert part in told
    assert "Below the reporting threshold: Subdural haemorrhage, 0.20 ml." in texts(
        read_back("below threshold", tmp_path), codes.COMMENT
    )


def test_algorithm_is_identified_with_its_weights(tmp_path: Path) -> None:
    document = read_back("negative", tmp_path)
    found = {
        item.ConceptNameCodeSequence[0].CodeMeaning: str(item.TextValue)
        for item in find_content_items(document, value_type="TEXT", recursive=True)
    }
    assert found["Algorithm Name"] == ct.MODEL.name
    assert found["Algorithm Version"] == ct.MODEL.version
    parameters = [
        str(item.TextValue)
        for item in find_content_items(document, value_type="TEXT", recursive=True)
        if item.ConceptNameCodeSequence[0].CodeMeaning == "Algorithm Parameters"
    ]
    assert f"sha256={ct.MODEL.digest}" in parameters
    (observer,) = document.content.get_observer_contexts()
    assert observer.observer_type == codes.DEVICE
    assert observer.observer_identifying_attributes.manufacturer_name == "scanside"


@pytest.mark.parametrize(("name", "flag"), [("one finding", "FINAL"), ("provisional", "PRELIMINARY")])
def test_flags(name: str, flag: str, tmp_path: Path) -> None:
    document = read_back(name, tmp_path)
    assert document.PreliminaryFlag == flag
    assert (document.CompletionFlag, document.VerificationFlag) == ("COMPLETE", "UNVERIFIED")
    assert (document.ContentDate, document.ContentTime) == ("20260304", "050607.800000")


def test_a_later_revision_names_its_predecessor(tmp_path: Path) -> None:
    first, second = ct.built("one finding"), ct.built("revision 2")
    assert "PredecessorDocumentsSequence" not in first.sr
    document = hd.sr.srread(writing.write(second, tmp_path)["sr"])
    (study,) = document.PredecessorDocumentsSequence
    (series,) = study.ReferencedSeriesSequence
    (reference,) = series.ReferencedSOPSequence
    assert study.StudyInstanceUID == first.sr.StudyInstanceUID
    assert series.SeriesInstanceUID == first.sr.SeriesInstanceUID == document.SeriesInstanceUID
    assert reference.ReferencedSOPClassUID == first.sr.SOPClassUID
    assert reference.ReferencedSOPInstanceUID == first.sr.SOPInstanceUID != document.SOPInstanceUID
