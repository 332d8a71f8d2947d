"""What validators and readers that are not ours say of every kind of result.

In `make test` the matrix with one character set, in `make test-slow` with every one of the corpus.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import highdicom as hd
import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import EncapsulatedPDFStorage

from dicom_node.results import codes, result_set, writing
from dicom_node.results.source import plane
from runtime.geometry import stack
from runtime.millilitres import said
from tests.dicom_node import ct, matrix

# what they say against results, and why it stays
EXCEPTIONS = {
    ("dciodvfy", "labelmap"): "knows no Label Map Segmentation: dicom3tools' newest snapshot is of 2022",
    ("dciodvfy", "illegal UID"): "a UID of study, series, slice or frame of reference is the source's, or is no link",
    ("segimage2itkimage", "labelmap"): "dcmqi 1.5 takes the bytes of a label map for bits, and says nothing",
    ("segimage2itkimage", "tilt"): "dcmqi makes one regular grid, which a tilted stack is not; highdicom reads it",
}
# DCMTK's own words on UTF-8, not on what is written in it
ABOUT_ITSELF = "W: The VR checker does not support this Specific Character Set: ISO_IR 192"

TOOLS = Path(sys.executable).parent
FORM = result_set.Form(pdf=True)
ONE = matrix.CORPUS / "chrH32.dcm"  # of those with several character sets in one name


def needs(tool: str, package: str) -> pytest.MarkDecorator:
    where = shutil.which(tool) or shutil.which(tool, path=TOOLS)
    return pytest.mark.skipif(where is None, reason=f"{tool} not installed: {package}")


needs_dicom3tools = needs("dciodvfy", "apt-get install dicom3tools")
needs_dcmtk = needs("dsrdump", "apt-get install dcmtk")
needs_pixelmed = needs("DicomSRValidator", "apt-get install pixelmed-apps")
needs_dcmqi = needs("tid1500reader", "pip install dcmqi")
needs_corpus = pytest.mark.skipif(
    not matrix.CORPUS.is_dir(), reason=f"{matrix.CORPUS} not there: real files are not part of the repository"
)
slow = pytest.mark.slow


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False, env={**os.environ, **environment}
    )
    return done.stdout + done.stderr


def errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith(("Error", "E:", "F:"))]


@functools.lru_cache(maxsize=8)
def made(kind: str, tilt_deg: float, donor: Path | None) -> tuple[ct.Case, ct.ResultSet]:
    """Built once for all tests; only to be read."""
    one = matrix.case(kind, tilt_deg, donor)
    return one, matrix.build(one, kind, FORM)


def built(kind: str, tilt_deg: float, donor: Path | None, folder: Path) -> tuple[ct.Case, dict[str, Path]]:
    one, objects = made(kind, tilt_deg, donor)
    return one, writing.write(objects, folder)


def charsets(*, every: bool) -> list[Path | None]:
    if every:
        return [matrix.CORPUS / f"{name}.dcm" for name in matrix.CHARSETS]
    return [ONE if ONE.is_file() else None]


def check_files(paths: dict[str, Path]) -> None:
    """No error in any object by itself, nor between them, nor in the tree of the SR."""
    for path in paths.values():
        assert errors(run("dciodvfy", "-new", path)) == [], path.name
    assert errors(run("dcentvfy", *paths.values())) == []
    if "sr" in paths and shutil.which("dsrdump"):
        said = run("dsrdump", "+Pc", paths["sr"])
        assert errors(said) == []
        assert [line for line in said.splitlines() if line.startswith("W:") and line != ABOUT_ITSELF] == []


def check_name(donor: Path | None, paths: dict[str, Path]) -> None:
    """Every object has the name of the source, in UTF-8."""
    name = pydicom.dcmread(donor, force=True).get("PatientName", "") if donor else "Phantom^Head"
    for path in paths.values():
        told = pydicom.dcmread(path, stop_before_pixels=True)
        assert told.SpecificCharacterSet == "ISO_IR 192"
        assert str(told.PatientName) == str(name).replace("\x1b$)A", "")  # see test_source


@needs_dicom3tools
@pytest.mark.parametrize("tilt_deg", matrix.TILTS)
@pytest.mark.parametrize("kind", matrix.KINDS)
def test_no_validator_finds_an_error(kind: str, tilt_deg: float, tmp_path: Path) -> None:
    (donor,) = charsets(every=False)
    _, paths = built(kind, tilt_deg, donor, tmp_path)
    expected = {"failed": {"notice"}, "negative": {"sr", "pdf"}}.get(kind, {"seg", "sr", "pdf"})
    assert {role for role in paths if not role.startswith("sc")} == expected
    check_files(paths)
    check_name(donor, paths)


@slow
@needs_corpus
@needs_dicom3tools
@pytest.mark.parametrize("donor", charsets(every=True), ids=lambda path: path.stem)
@pytest.mark.parametrize("tilt_deg", matrix.TILTS)
@pytest.mark.parametrize("kind", matrix.KINDS)
def test_no_validator_finds_an_error_whatever_the_character_set(
    kind: str, tilt_deg: float, donor: Path, tmp_path: Path
) -> None:
    _, paths = built(kind, tilt_deg, donor, tmp_path)
    check_files(paths)
    check_name(donor, paths)


WITH_SR = [(kind, tilt_deg) for kind in matrix.KINDS if kind != "failed" for tilt_deg in matrix.TILTS]


@slow
@needs_corpus
@needs_pixelmed
@pytest.mark.parametrize("number", range(len(matrix.CHARSETS)), ids=matrix.CHARSETS)
def test_pixelmed_finds_no_error_against_tid_1500(number: int, tmp_path: Path) -> None:
    """Each character set with one kind in turn, three times each kind: a minute of Java for all would find no more."""
    kind, tilt_deg = WITH_SR[number % len(WITH_SR)]
    _, paths = built(kind, tilt_deg, matrix.CORPUS / f"{matrix.CHARSETS[number]}.dcm", tmp_path)
    limits = " ".join(
        f"-Djdk.xml.{limit}=0" for limit in ("xpathTotalOpLimit", "xpathExprOpLimit", "xpathExprGrpLimit")
    )
    said = run("DicomSRValidator", paths["sr"], JAVA_TOOL_OPTIONS=limits)
    assert "Root Template Validation Complete" in said
    assert "IOD validation complete" in said
    assert errors(said) == []


@slow
@needs_corpus
@pytest.mark.parametrize(("kind", "tilt_deg"), WITH_SR)
def test_whose_report_it_is_changes_nothing_in_its_tree(kind: str, tilt_deg: float) -> None:
    """So what PixelMed says of one character set holds for all."""
    trees = set()
    for donor in charsets(every=True):
        report = matrix.build(matrix.case(kind, tilt_deg, donor), kind).sr
        trees.add(json.dumps([item.to_json_dict() for item in report.ContentSequence]))
    assert len(trees) == 1


def volumes_ml(one: ct.Case, segmentation: hd.seg.Segmentation) -> dict[str, float]:
    """Of each tracked segment, from its own pixels and the planes of its sources."""
    geometry = stack({key: plane(source) for key, source in zip(one.keys, one.sources, strict=True)})
    found = {}
    for number in segmentation.segment_numbers:
        pixels = segmentation.get_pixels_by_source_instance(
            list(geometry.keys), segment_numbers=[number], assert_missing_frames_are_empty=True
        )
        found[segmentation.get_segment_description(number).tracking_id] = float(
            pixels.sum(axis=(1, 2, 3)) @ geometry.voxel_ml
        )
    return found


def reported_ml(document: Dataset) -> dict[str, float]:
    return {
        group.tracking_identifier: float(group.get_measurements(name=codes.VOLUME)[0].value)
        for group in document.content.get_volumetric_roi_measurement_groups()
    }


@pytest.mark.parametrize("tilt_deg", matrix.TILTS)
@pytest.mark.parametrize("segmentation", ["binary", "labelmap"])
def test_highdicom_reads_the_same_masks_and_volumes(segmentation: str, tilt_deg: float, tmp_path: Path) -> None:
    one = matrix.case("positive", tilt_deg)
    form = result_set.Form(segmentation=segmentation)
    paths = writing.write(matrix.build(one, "positive", form), tmp_path)
    masks = hd.seg.segread(paths["seg"])
    assert masks.SegmentationType == segmentation.upper()
    read = masks.get_pixels_by_source_instance(one.keys, combine_segments=True, assert_missing_frames_are_empty=True)
    expected = np.zeros_like(one.labels)
    for number, finding in enumerate(one.report.findings, start=1):
        expected[one.labels == finding.label] = number
    np.testing.assert_array_equal(read, expected)
    assert reported_ml(hd.sr.srread(paths["sr"])) == pytest.approx(volumes_ml(one, masks), abs=0.1)


@needs_dcmqi
@pytest.mark.parametrize("kind", ["positive", "provisional"])
@pytest.mark.parametrize("tilt_deg", matrix.TILTS)
def test_dcmqi_reads_the_measurements(kind: str, tilt_deg: float, tmp_path: Path) -> None:
    one, paths = built(kind, tilt_deg, None, tmp_path)
    told = tmp_path / "sr.json"
    run(TOOLS / "tid1500reader", "--inputDICOM", paths["sr"], "--outputMetadata", told)
    groups = json.loads(told.read_text())["Measurements"]
    read = {
        group["TrackingIdentifier"]: float(item["value"])
        for group in groups
        for item in group["measurementItems"]
        if item["quantity"]["CodeValue"] == codes.VOLUME.value
    }
    assert read == pytest.approx({finding.name: finding.volume_ml for finding in one.report.findings}, abs=0.001)


def read_by_dcmqi(path: Path, folder: Path) -> dict[int, tuple[int, float]]:
    """Voxels and ml of each segment."""
    run(TOOLS / "segimage2itkimage", "--inputDICOM", path, "--outputDirectory", folder, "-t", "nii")
    read = {}
    for mask in folder.glob("*.nii.gz"):
        image = nibabel.load(mask)
        voxels = int(np.count_nonzero(np.asanyarray(image.dataobj)))
        read[int(mask.name.partition(".")[0])] = voxels, voxels * float(np.prod(image.header.get_zooms())) / 1000
    return read


@needs_dcmqi
def test_dcmqi_reads_the_masks(tmp_path: Path) -> None:
    one, paths = built("positive", 0.0, None, tmp_path)
    read = read_by_dcmqi(paths["seg"], tmp_path)
    assert len(read) == len(one.report.findings)
    for number, finding in enumerate(one.report.findings, start=1):
        voxels, volume_ml = read[number]
        assert voxels == np.count_nonzero(one.labels == finding.label)
        assert volume_ml == pytest.approx(finding.volume_ml, abs=0.1)


@needs_dcmqi
@needs_dicom3tools
@pytest.mark.parametrize(
    ("tool", "what", "said"),
    [
        ("segimage2itkimage", "tilt", ""),
        ("segimage2itkimage", "labelmap", ""),
        ("dciodvfy", "labelmap", "Information Object Not found"),
        ("dciodvfy", "illegal UID", "Illegal root for UID"),
    ],
)
def test_the_exceptions_are_still_needed(tool: str, what: str, said: str, tmp_path: Path) -> None:
    assert (tool, what) in EXCEPTIONS
    one = matrix.case("positive", 20.0 if what == "tilt" else 0.0)
    if what == "illegal UID":
        for source in one.sources:
            source._dict[pydicom.tag.Tag("StudyInstanceUID")] = pydicom.dataelem.RawDataElement(
                pydicom.tag.Tag("StudyInstanceUID"), "UI", 8, b"abc.def\0", 0, False, True
            )
    form = result_set.Form(segmentation="labelmap" if what == "labelmap" else "binary")
    path = writing.write(matrix.build(one, "positive", form), tmp_path)["seg"]
    if tool == "dciodvfy":
        assert said in run("dciodvfy", "-new", path)
        return
    truth = {n: np.count_nonzero(one.labels == f.label) for n, f in enumerate(one.report.findings, start=1)}
    assert {number: voxels for number, (voxels, _) in read_by_dcmqi(path, tmp_path).items()} != truth


def test_no_exception_is_left_untested() -> None:
    (mark,) = (m for m in test_the_exceptions_are_still_needed.pytestmark if m.name == "parametrize")
    assert {(tool, what) for tool, what, _ in mark.args[1]} == {*EXCEPTIONS}


def words(page: bytes) -> str:
    """Text of a PDF whose streams are as reportlab writes them: ASCII 85 over deflate."""
    import base64
    import re
    import zlib

    found: list[str] = []
    for stream in re.findall(rb"stream\r?\n(.*?)endstream", page, re.DOTALL):
        data = stream.strip()
        try:
            text = zlib.decompress(base64.a85decode(data.removesuffix(b"~>")))
        except (ValueError, zlib.error):  # a picture
            continue
        found += [part.decode("latin-1") for part in re.findall(rb"\((.*?)(?<!\\)\)", text)]
    return " ".join(found).replace("\\", "")


@pytest.mark.parametrize("kind", ["positive", "negative", "provisional"])
def test_the_pdf_says_what_the_report_says_and_names_nobody(kind: str, tmp_path: Path) -> None:
    one, paths = built(kind, 0.0, None, tmp_path)
    made.cache_clear()
    _, again = built(kind, 0.0, None, tmp_path / "again")
    assert paths["pdf"].read_bytes() == again["pdf"].read_bytes()
    document = pydicom.dcmread(paths["pdf"])
    assert document.SOPClassUID == EncapsulatedPDFStorage
    assert document.MIMETypeOfEncapsulatedDocument == "application/pdf"
    page = document.EncapsulatedDocument[: document.EncapsulatedDocumentLength]
    assert page.startswith(b"%PDF-")
    assert page.rstrip().endswith(b"%%EOF")
    told = words(page)
    for finding in one.report.findings:
        assert said(finding.volume_ml) in told
    for part in (
        one.report.decision.level.upper(),
        ct.MODEL.training_data,
        "Not a medical device",
        *one.report.missing,
    ):
        assert part in told, part
    assert ("PROVISIONAL" in told) == one.report.provisional
    assert "Phantom" not in told
    assert "P1" not in told


def test_other_content_is_another_object_and_the_same_is_the_same() -> None:
    def uids(form: result_set.Form) -> set[str]:
        objects = matrix.build(matrix.case("negative", 0.0), "negative", form)
        return {str(each.SOPInstanceUID) for _, each in objects}

    first = uids(result_set.USUAL)
    assert uids(result_set.Form()) == first
    own = {"subdural": codes.OwnCode(codes.HEMORRHAGE, codes.BRAIN)}
    for other in (result_set.Form(codes=own), result_set.Form(segmentation="labelmap")):
        assert not first & uids(other)
