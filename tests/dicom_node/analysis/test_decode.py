"""Files to Hounsfield units, and the reasons of those that are turned away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileDataset
from pydicom.tag import Tag
from pydicom.uid import (
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    RLELossless,
)

from dicom_node.analysis import decode
from dicom_node.images import gate
from dicom_node.images.gate import NotAnalysed, Reason
from dicom_node.simulation import phantom
from runtime.types import Plane, Slice

CORPUS = Path(__file__).parents[4] / "shared" / "corpus"
PLANE = Plane((-60.0, -60.0, 0.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.5, 0.75), 5.0)


@pytest.fixture
def image(tmp_path: Path) -> tuple[Path, np.ndarray]:
    hu = np.random.default_rng(0).integers(-1024, 3000, (64, 48)).astype(np.int16)
    (path,) = phantom.write([Slice("a", PLANE, hu)], tmp_path)
    return path, hu


def read(path: Path, max_lossy_ratio: float = 1.0) -> tuple[Dataset, Slice]:
    """The one image of a file."""
    (one,) = decode.read(path, max_lossy_ratio)
    if isinstance(one, NotAnalysed):
        raise one
    return one


def changed(path: Path, change: Callable[[FileDataset], object]) -> Path:
    dataset = dcmread(path)
    change(dataset)
    dataset.save_as(path)
    return path


def test_what_was_written_is_read(image: tuple[Path, np.ndarray]):
    path, hu = image
    header, one = read(path)
    assert (one.hu == hu).all()
    assert one.plane == PLANE
    assert one.key == header.SOPInstanceUID
    assert "PixelData" not in header


@pytest.mark.parametrize("syntax", [RLELossless, ImplicitVRLittleEndian])
def test_other_transfer_syntaxes_give_the_same_pixels(image: tuple[Path, np.ndarray], syntax: str):
    path, hu = image
    if syntax == RLELossless:
        changed(path, lambda d: d.compress(RLELossless, generate_instance_uid=False))
    else:
        changed(path, lambda d: setattr(d.file_meta, "TransferSyntaxUID", syntax))
    assert (read(path)[1].hu == hu).all()


def test_signed_pixels_and_a_slope_that_is_no_integer(image: tuple[Path, np.ndarray]):
    path, hu = image

    def change(dataset: FileDataset) -> None:
        dataset.PixelRepresentation, dataset.BitsStored, dataset.HighBit = 1, 16, 15
        dataset.RescaleSlope, dataset.RescaleIntercept = "0.5", "0.25"
        dataset.PixelData = hu.astype("<i2").tobytes()

    expected = np.rint(hu * 0.5 + 0.25).astype(np.int16)
    assert (read(changed(path, change))[1].hu == expected).all()


def test_units_beyond_int16_are_cut_off_and_do_not_wrap(image: tuple[Path, np.ndarray]):
    path, _ = image
    hu = read(changed(path, lambda d: setattr(d, "RescaleSlope", "100")))[1].hu
    assert hu.max() == 32767
    assert hu.min() == -1024


def delete(*keywords: str) -> Callable[[FileDataset], None]:
    return lambda dataset: [delattr(dataset, keyword) for keyword in keywords]


def put(**values: object) -> Callable[[FileDataset], None]:
    return lambda dataset: [setattr(dataset, keyword, value) for keyword, value in values.items()]


def test_lossy_images_pass_up_to_a_ratio(image: tuple[Path, np.ndarray]):
    """All steps of compression count together; a ratio that is not told, and a lossy syntax that denies it, never."""
    twice = changed(image[0], put(LossyImageCompression="01", LossyImageCompressionRatio=["2", "3"]))
    assert read(twice, 6.0)[1].hu.any()
    with pytest.raises(NotAnalysed, match="lossy compressed.*2.*3"):
        read(twice, 5.9)
    with pytest.raises(NotAnalysed, match="not given"):
        read(changed(twice, put(LossyImageCompressionRatio=None)), 1e9)
    header = dcmread(image[0])
    for syntax, said, is_lossy in [
        (JPEGBaseline8Bit, "00", True),
        (JPEG2000, "", True),
        (JPEG2000, "00", False),
        (ExplicitVRLittleEndian, "", False),
    ]:
        header.file_meta.TransferSyntaxUID, header.LossyImageCompression = syntax, said
        assert gate._is_lossy(header) is is_lossy


LOSSY = {"LossyImageCompression": "01"}


@pytest.mark.filterwarnings("ignore:(Invalid value|The value length|A value of type):UserWarning")
@pytest.mark.parametrize(
    ("values", "detail"),
    [
        ({"ImageType": ["DERIVED", "MUSTER^ERIKA", "AXIAL"]}, "DERIVED\\?\\AXIAL"),
        ({"ImageType": ["DERIVED", "SECONDARY", "Muster"]}, "DERIVED\\SECONDARY\\?"),
        ({"ImageType": ["DERIVED", *100 * ["OTHER"]]}, "\\".join(["DERIVED", *7 * ["OTHER"]])),
        ({"RescaleType": "Muster^Erika"}, "RescaleType ?"),
        ({"RescaleType": "M" * 64}, "RescaleType ?"),
        ({"RescaleType": "Z_EFF"}, "RescaleType Z_EFF"),
        ({"SOPClassUID": "Muster^Erika"}, "SOP class ?"),
        ({**LOSSY, "LossyImageCompressionRatio": ["2.5", "10"]}, "ratio 2.5\\10"),
    ],
    ids=str,
)
def test_of_a_foreign_file_a_reason_quotes_what_can_be_no_name(
    image: tuple[Path, np.ndarray], values: dict[str, object], detail: str
):
    with pytest.raises(NotAnalysed) as caught:
        read(changed(image[0], put(**values)))
    assert caught.value.detail == detail


@pytest.mark.filterwarnings("ignore:Invalid value:UserWarning")
@pytest.mark.parametrize("ratio", ["0", "-1", "nan", ["-2", "-3"], ["0", "10"]])
def test_a_ratio_that_can_be_none_is_not_told(image: tuple[Path, np.ndarray], ratio: str | list[str]):
    header = dcmread(image[0])
    header.LossyImageCompression = "01"
    header.LossyImageCompressionRatio = ratio
    with pytest.raises(NotAnalysed) as caught:
        gate.check_kind(header, 1e9)
    assert caught.value.reason is Reason.LOSSY


@pytest.mark.filterwarnings("ignore:Invalid value:UserWarning")
def test_a_ratio_that_is_a_name_is_none_and_not_quoted(image: tuple[Path, np.ndarray]):
    """As pydicom reads it from a file: it refuses to write such a thing."""
    header = dcmread(image[0])
    header.LossyImageCompression = "01"
    tag = Tag("LossyImageCompressionRatio")
    header[tag] = RawDataElement(tag, "DS", 12, b"Muster^Erika", 0, is_implicit_VR=False, is_little_endian=True)
    with pytest.raises(NotAnalysed) as caught:
        gate.check_kind(header, 1e9)
    assert (caught.value.reason, caught.value.detail) == (Reason.LOSSY, "ratio ?")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (put(SOPClassUID="1.2.840.10008.5.1.4.1.1.4"), Reason.NOT_CT),
        (put(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), Reason.LOCALIZER),
        (put(ImageType=["DERIVED", "SECONDARY", "REFORMATTED"]), Reason.DERIVED),
        (put(ImageType="DERIVED"), Reason.DERIVED),
        (put(RescaleType="Z_EFF"), Reason.DERIVED),
        (put(ImageOrientationPatient=[1, 0, 0, 0, 0, -1]), Reason.NOT_AXIAL),
        (put(LossyImageCompression="01"), Reason.LOSSY),
        (delete("PixelData"), Reason.NO_PIXEL_DATA),
        (delete("RescaleIntercept"), Reason.NO_RESCALE),
        (put(RescaleSlope=0), Reason.NO_RESCALE),
        (delete("ImagePositionPatient"), Reason.NO_GEOMETRY),
        (delete("PixelSpacing"), Reason.NO_GEOMETRY),
        (put(PixelSpacing=[0, 0.5]), Reason.NO_GEOMETRY),
        (put(SliceThickness=-5), Reason.NO_GEOMETRY),
        (put(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), Reason.NO_GEOMETRY),
        (put(ImagePositionPatient=[0, 0]), Reason.NO_GEOMETRY),
        (put(PixelData=b"\0" * 10), Reason.TRUNCATED),
        (put(Rows=9999), Reason.TRUNCATED),
        (delete("BitsStored"), Reason.UNREADABLE),
    ],
)
def test_what_can_t_be_analysed_is_turned_away_with_the_reason(
    image: tuple[Path, np.ndarray], change: Callable[[FileDataset], None], reason: Reason
):
    with pytest.raises(NotAnalysed) as caught:
        read(changed(image[0], change))
    assert caught.value.reason is reason
    assert reason.value in str(caught.value)


@pytest.mark.filterwarnings("ignore:End of file reached:UserWarning")
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless])
@pytest.mark.parametrize("missing", [7, 2000])
def test_a_file_without_its_end_is_truncated(image: tuple[Path, np.ndarray], syntax: str, missing: int):
    path, _ = image
    if syntax == RLELossless:
        changed(path, lambda d: d.compress(RLELossless, generate_instance_uid=False))
    else:
        changed(path, lambda d: setattr(d.file_meta, "TransferSyntaxUID", syntax))
    path.write_bytes(path.read_bytes()[:-missing])
    with pytest.raises(NotAnalysed, match="truncated") as caught:
        read(path)
    assert caught.value.reason is Reason.TRUNCATED
    assert not caught.value.reason.of_another_kind, "its slice would be missing from the report without a word"


def test_a_syntax_without_a_decoder_is_named(image: tuple[Path, np.ndarray], monkeypatch):
    path, _ = image
    changed(path, lambda d: d.compress(RLELossless, generate_instance_uid=False))

    def none(syntax: str):
        raise NotImplementedError

    def missing(_):
        raise RuntimeError("Unable to decompress: all plugins are missing dependencies")

    monkeypatch.setattr(decode, "get_decoder", none)
    monkeypatch.setattr(decode, "pixel_array", missing)
    with pytest.raises(NotAnalysed, match="no installed decoder reads: RLE Lossless") as caught:
        read(path)
    assert caught.value.reason is Reason.NO_DECODER


def test_a_file_of_two_transfer_syntaxes_is_turned_away(image: tuple[Path, np.ndarray]):
    path, _ = image
    path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.1000\\.1.2.1\0", 1))
    with pytest.raises(NotAnalysed) as caught:
        read(path)
    assert caught.value.reason is Reason.UNREADABLE


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\0" * 128 + b"DICM" + b"\xff" * 300])
def test_bytes_that_are_no_dicom_are_turned_away(tmp_path: Path, content: bytes):
    (tmp_path / "x.dcm").write_bytes(content)
    with pytest.raises(NotAnalysed):
        read(tmp_path / "x.dcm")


@pytest.mark.skipif(not CORPUS.exists(), reason="the corpus of real DICOM is not here: real syntaxes are NOT tested")
def test_one_image_in_fifteen_syntaxes_is_the_same_or_refused_as_lossy():
    decoded, refused = {}, set()
    for path in sorted((CORPUS / "40_ct_one_image_15_transfer_syntaxes").glob("*.dcm")):
        syntax = dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID
        try:
            decoded[path.name] = (syntax, read(path)[1].hu)
        except NotAnalysed as refusal:
            refused.add((syntax, refusal.reason))
    (_, first), *others = decoded.values()
    assert all((hu == first).all() for _, hu in others)
    assert {str(syntax) for syntax, _ in decoded.values()} == {
        "1.2.840.10008.1.2",
        "1.2.840.10008.1.2.1",
        "1.2.840.10008.1.2.1.99",
        "1.2.840.10008.1.2.2",
        "1.2.840.10008.1.2.4.57",
        "1.2.840.10008.1.2.4.70",
        "1.2.840.10008.1.2.4.80",
        "1.2.840.10008.1.2.4.90",
        "1.2.840.10008.1.2.5",
    }
    assert len(refused) == 6
    assert {reason for _, reason in refused} == {Reason.LOSSY}
