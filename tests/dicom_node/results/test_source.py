from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pydicom
import pytest
from structlog.testing import capture_logs

from dicom_node.results import result_set, writing
from dicom_node.results.picture import BRAIN, grey
from dicom_node.results.source import Repairs, normalise, own, patient, plane
from tests.dicom_node import ct

CORPUS = Path(__file__).parents[3].parent / "shared" / "corpus"
TYPE_2 = [
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "StudyID",
    "ReferringPhysicianName",
]


# pydicom warns of the values that these tests are about
illegal = pytest.mark.filterwarnings(
    "ignore:(The value length|The number of PN|Invalid value|Failed to decode):UserWarning"
)


def build(sources: list[pydicom.Dataset]) -> ct.ResultSet:
    labels = ct.bleeds(len(sources), classes=(2,))
    shown = grey(ct.hounsfield(labels), BRAIN)
    report = ct.report(sources, labels)
    key = report.findings[0].key_slice
    pictured = {key: shown[[source.SOPInstanceUID for source in sources].index(key)]}
    return ct.build(sources, labels, pictured, report, revision=1, started=ct.STARTED)


def test_a_complete_source_needs_no_repair() -> None:
    _, repairs = normalise(ct.headers())
    assert repairs == Repairs()


@pytest.mark.parametrize("keyword", [*TYPE_2, "FrameOfReferenceUID", "SliceThickness"])
def test_what_is_missing_is_repaired_named_and_carried_by_every_result(keyword: str) -> None:
    sources = ct.headers(without=[keyword])
    copies, repairs = normalise(sources)
    assert repairs == Repairs(repaired=(keyword,))
    assert keyword in copies[0]
    assert keyword not in sources[0]  # the caller's headers stay as they were
    built = build(sources)
    for dataset in (built.seg, built.sr, *built.sc):
        if keyword in TYPE_2:
            assert dataset[keyword].is_empty


@pytest.mark.parametrize(
    "keyword", ["PositionReferenceIndicator", "Manufacturer", "SeriesNumber", "InstanceNumber", "StudyDescription"]
)
def test_what_may_be_missing_is_no_repair(keyword: str) -> None:
    sources = ct.headers(without=[keyword])
    assert normalise(sources)[1] == Repairs()
    build(sources)


@illegal
@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("PatientBirthDate", "1950.01.01x"),
        ("PatientBirthDate", "19503101"),
        ("StudyDate", "today"),
        ("StudyTime", "25:61"),
        ("PatientSex", "U"),
        ("StudyDescription", "x" * 65),
    ],
)
def test_what_no_result_could_carry_is_emptied(keyword: str, value: str) -> None:
    sources = [ct.as_received(header) for header in ct.headers(**{keyword: value})]
    copies, repairs = normalise(sources)
    assert repairs == Repairs(repaired=(keyword,))
    assert not copies[0].get(keyword)
    build(sources)


@illegal
@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("PatientID", "P" * 70),
        ("AccessionNumber", "A" * 20),
        ("StudyInstanceUID", "1.2.03.4"),
        ("FrameOfReferenceUID", "1.2.03.5"),
        ("SOPInstanceUID", None),
    ],
)
def test_what_identifies_stays_even_if_it_is_illegal(keyword: str, value: str | None) -> None:
    sources = ct.headers()
    for number, header in enumerate(sources):
        setattr(header, keyword, value or f"1.2.03.{number}.{'9' * 60}")
    sources = [ct.as_received(header) for header in sources]
    copies, repairs = normalise(sources)
    assert repairs == Repairs(kept=(keyword,))
    assert [copy[keyword].value for copy in copies] == [source[keyword].value for source in sources]
    built = build(sources)
    if value:
        carriers = [dataset for dataset in (built.seg, built.sr, *built.sc) if keyword in dataset]
        assert built.seg in carriers
        assert {dataset[keyword].value for dataset in carriers} == {value}


def raw(sources: list[pydicom.Dataset], keyword: str, value: bytes) -> list[pydicom.Dataset]:
    """The same headers with an element as a careless sender writes it."""
    tag = pydicom.tag.Tag(keyword)
    vr = pydicom.datadict.dictionary_VR(tag)
    for source in sources:
        source._dict[tag] = pydicom.dataelem.RawDataElement(tag, vr, len(value), value, 0, False, True)
    return sources


@illegal
@pytest.mark.parametrize(
    ("keyword", "value", "left"),
    [
        ("PatientName", rb"DOE^JOHN\DOE^J", "DOE^JOHN/DOE^J"),
        ("PatientBirthDate", b"1950.01.02", "19500102"),
        ("ReferringPhysicianName", b"A=B=C=D ", None),
        ("StudyID", b"S" * 18, None),
        ("StudyDescription", rb"head\neck", None),
        ("StudyTime", b"05:05:05", None),
        ("FrameOfReferenceUID", rb"1.2.3\1.2.4 ", "1.2.3"),
        ("SeriesNumber", rb"1\2 ", None),
        ("SeriesNumber", b"two ", None),
        ("SliceThickness", b"-5", "5.0"),
        ("SliceThickness", b"nan ", "5.0"),
        ("SliceThickness", rb"5\5 ", "5.0"),
        ("SliceThickness", b"4.99999999999999999999999", "5.0"),
        ("PixelSpacing", b"3.75000000000000000001\\3.75000000000000000001", "[3.75, 3.75]"),
        ("ImagePositionPatient", b"-120.00000000000000001\\-115.5\\10.00000000000000001 ", "[-120.0, -115.5, 10.0]"),
        ("LossyImageCompression", b"no", None),
    ],
    ids=str,
)
def test_what_careless_senders_write_becomes_legal_and_is_named(keyword: str, value: bytes, left: str | None) -> None:
    sources = raw([ct.as_received(header) for header in ct.headers()][:1], keyword, value)
    (copy, *_), repairs = normalise([*sources, *ct.headers()[1:]])
    assert repairs == Repairs(repaired=(keyword,))
    assert (str(copy[keyword].value) if copy.get(keyword) else None) == left


@illegal
def test_a_name_that_no_character_set_decodes_is_named() -> None:
    sources = raw([ct.as_received(header) for header in ct.headers()], "PatientName", b"\xff\xfe\xfa\xfb")
    assert normalise(sources)[1] == Repairs(repaired=("PatientName",))
    build(sources)


def test_designators_of_character_sets_are_no_part_of_a_name() -> None:
    sources = raw([ct.as_received(header) for header in ct.headers()], "PatientName", b"Zhang=\x1b$)A\xd5\xc5^A\x1b(B ")
    for source in sources:
        source.set_original_encoding(False, True, ["iso8859", "iso_ir_58"])
    assert str(normalise(sources)[0][0].PatientName) == "Zhang=张^A"


@pytest.mark.parametrize("uid", ["1.2.03.4", "1..2", "abc.def", "1.2." + "9" * 70])
@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"])
@illegal
def test_illegal_uids_stay_and_are_named(keyword: str, uid: str) -> None:
    sources = [ct.as_received(header) for header in ct.headers(**{keyword: uid})]
    assert normalise(sources)[1] == Repairs(kept=(keyword,))
    with capture_logs() as events:
        build(sources)
    assert [(event["keywords"], event["kept"]) for event in events] == [((), (keyword,))]


def test_an_absent_patient_id_is_never_invented() -> None:
    built = build(ct.headers(without=["PatientID"]))
    for dataset in (built.seg, built.sr, *built.sc):
        assert dataset.PatientID in (None, "")


def test_a_missing_frame_of_reference_is_the_same_for_all_slices_and_on_every_run() -> None:
    sources = ct.headers(without=["FrameOfReferenceUID"])
    first, again = normalise(sources)[0], normalise(sources)[0]
    assert len({copy.FrameOfReferenceUID for copy in (*first, *again)}) == 1
    other = normalise(ct.headers(without=["FrameOfReferenceUID"], SeriesInstanceUID="1.2.3.4.99"))[0]
    assert other[0].FrameOfReferenceUID != first[0].FrameOfReferenceUID
    assert pydicom.uid.UID(first[0].FrameOfReferenceUID).is_valid


def test_a_missing_thickness_is_what_the_positions_leave() -> None:
    copies, _ = normalise(ct.headers(without=["SliceThickness"], tilt_deg=20, steps_mm=(5.0,)))
    assert float(copies[5].SliceThickness) == pytest.approx(4.6985, abs=1e-3)


def test_strings_of_positions_stay_to_the_letter() -> None:
    sources = [ct.as_received(header) for header in ct.headers(tilt_deg=20)]
    copies, _ = normalise(sources)
    for copy, source in zip(copies, sources, strict=True):
        for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
            assert str(copy[keyword].value) == str(source[keyword].value)


@pytest.mark.parametrize(
    ("charset", "name"),
    [
        ("ISO_IR 100", "Müller^Jörg"),
        ("ISO_IR 144", "Иванов^Иван"),
        ("GB18030", "Wang^XiaoDong=王^小东"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        ("ISO_IR 192", "Πατέρας^Γιώργος"),
    ],
)
def test_text_of_any_character_set_arrives_as_utf8(charset: str | list[str], name: str, tmp_path: Path) -> None:
    description = name.partition("=")[2].partition("=")[0] or name
    sources = [
        ct.as_received(header)
        for header in ct.headers(SpecificCharacterSet=charset, PatientName=name, StudyDescription=description)
    ]
    for path in writing.write(build(sources), tmp_path).values():
        result = pydicom.dcmread(path)
        assert result.SpecificCharacterSet == "ISO_IR 192"
        assert str(result.PatientName) == name
        assert result.StudyDescription == description


@illegal
def test_a_number_that_is_none_counts_as_missing() -> None:
    sources = ct.headers()
    for header in sources:
        header._dict[pydicom.tag.Tag("SeriesNumber")] = pydicom.dataelem.RawDataElement(
            pydicom.tag.Tag("SeriesNumber"), "IS", 4, b"two ", 0, False, True
        )
    assert "SeriesNumber" not in normalise(sources)[0][0]
    assert build(sources).sr.SeriesNumber == 993


def test_private_and_other_attributes_stay_behind() -> None:
    sources = ct.headers(PatientComments="nobody's business")
    for header in sources:
        header.private_block(0x0019, "VENDOR", create=True).add_new(0x01, "LO", "secret")
    built = build(sources)
    for dataset in (built.seg, built.sr, *built.sc):
        assert "PatientComments" not in dataset
        assert not any(element.tag.is_private for element in dataset)


def test_deidentified_sources_keep_saying_so() -> None:
    copies, repairs = normalise(ct.headers(PatientIdentityRemoved="YES"))
    assert repairs.repaired == ("DeidentificationMethod",)
    assert copies[0].PatientIdentityRemoved == "YES"
    assert copies[0].DeidentificationMethod == "not stated in the source images"


def test_plane() -> None:
    where = plane(ct.headers(tilt_deg=20)[3])
    assert where.origin_lps == (-120.0, -115.5, 15.0)
    assert where.row_lps == (1.0, 0.0, 0.0)
    assert where.column_lps == pytest.approx((0.0, 0.93969262, -0.34202014))
    assert where.spacing_mm == (3.75, 3.75)
    assert where.thickness_mm == 5.0
    assert plane(ct.headers(without=["SliceThickness"])[0]).thickness_mm is None


@pytest.mark.skipif(not CORPUS.is_dir(), reason=f"{CORPUS} not there: real series are not part of the repository")
@pytest.mark.parametrize("case", ["20_geom_gantrytilting_001", "22_geom_sliceincrement_002"])
def test_real_headers_without_thickness(case: str) -> None:
    sources = [pydicom.dcmread(path, stop_before_pixels=True) for path in sorted((CORPUS / case).glob("*.dcm"))]
    copies, repairs = normalise(sources)
    assert "SliceThickness" in repairs.repaired
    assert all(float(copy.SliceThickness) > 0 for copy in copies)


def test_whose_a_series_is_is_told_in_text_and_without_what_is_not_there() -> None:
    header = pydicom.Dataset()
    header.SpecificCharacterSet = ["ISO 2022 IR 6", "ISO 2022 IR 87"]
    header.PatientName = "Yamada^Tarou=山田^太郎"
    header.PatientID, header.IssuerOfPatientID, header.SeriesNumber = "7", "HOSPITAL", 2
    header.PatientSex, header.AccessionNumber = "", ["A1", "A2"]
    header.add_new("StudyDate", "DA", "20260102")
    header.PlacerOrderNumberImagingServiceRequest = "P-9"
    header.PatientAge = "080Y"
    file = BytesIO()
    header.save_as(file, implicit_vr=True, little_endian=True)
    file.seek(0)
    assert b"\x1b$B" in file.getvalue(), "encoded as it says"
    assert patient(pydicom.dcmread(file, force=True)) == {
        "PatientID": "7",
        "IssuerOfPatientID": "HOSPITAL",
        "PatientName": "Yamada^Tarou=山田^太郎",
        "AccessionNumber": "A1\\A2",
        "StudyDate": "20260102",
        "SeriesNumber": "2",
        "PlacerOrderNumberImagingServiceRequest": "P-9",
    }


def test_what_of_a_patient_can_not_be_read_is_left_out_alone() -> None:
    class Damaged(pydicom.Dataset):
        def get(self, key: str, default: object = None) -> object:
            if key == "SeriesNumber":
                raise ValueError("bytes that are no number")
            return super().get(key, default)

    header = Damaged()
    header.PatientID, header.PatientName, header.SeriesNumber = "7", "Doe^Jane", 2
    assert result_set.whose(header) == {"PatientID": "7", "PatientName": "Doe^Jane"}


def test_what_a_slice_settles_is_not_changed_by_its_neighbours() -> None:
    """A series that is closed again may have other slices: the thickness that one leaves to another is another then."""
    settled = [own(header) for header in ct.headers(without=["SliceThickness"], steps_mm=(5.0,))]
    first = normalise(settled)[0]
    again = normalise(settled[::2])[0]
    assert {float(copy.SliceThickness) for copy in first} == {5.0}
    assert {float(copy.SliceThickness) for copy in again} == {10.0}
    assert all("SliceThickness" not in one.copy and "PatientName" not in one.copy for one in settled)
