"""Files and data sets that are made to fill the memory: refused by name before anything is allocated for them."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from dicom_node.analysis import decode
from dicom_node.images import codestream, part10
from dicom_node.images.gate import NotAnalysed, Reason
from dicom_node.images.part10 import DataSetError, DataSetExcessive, DataSetUnreadable, identity, read_whole
from dicom_node.simulation import phantom
from dicom_node.storage.spool import Spool, read
from runtime.types import Plane, Slice
from tests.dicom_node.instances import encoded, image

PLANE = Plane((-60.0, -60.0, 0.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.5, 0.75), 5.0)
UNDEFINED = 0xFFFFFFFF
SEQUENCE = b"SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"  # without a length, and an item without one
ITEM = b"\xfe\xff\x00\xe0" + bytes(4)
CT = struct.pack("<HH2sH", 8, 0x16, b"UI", 26) + CTImageStorage.encode() + b"\0"


def long(group: int, element: int, vr: bytes, value: bytes, length: int | None = None) -> bytes:
    """An element of explicit VR whose length takes four bytes."""
    return struct.pack("<HH2sxxL", group, element, vr, len(value) if length is None else length) + value


def implicit(group: int, element: int, value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<HHL", group, element, len(value) if length is None else length) + value


def deflated(value: bytes, times: int = 1) -> bytes:
    made = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return b"".join(made.compress(value) for _ in range(times)) + made.flush()


def read_image(path: Path) -> tuple[Dataset, Slice]:
    """The one image of a file."""
    (image,) = decode.read(path)
    if isinstance(image, NotAnalysed):
        raise image
    return image


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits at which a test is quick; what is held against them is larger by as much."""
    monkeypatch.setattr(part10, "MOST_READS", 1 << 14)
    monkeypatch.setattr(part10._Bounded, "left", 1 << 14)
    monkeypatch.setattr(part10, "LARGEST", 1 << 22)
    monkeypatch.setattr(part10, "LONGEST_HEAD", 1 << 18)
    monkeypatch.setattr(part10, "LONGEST_VALUE", 1 << 20)


@pytest.fixture
def slice_file(tmp_path: Path) -> Path:
    hu = np.random.default_rng(0).integers(-1024, 3000, (64, 48)).astype(np.int16)
    (path,) = phantom.write([Slice("a", PLANE, hu)], tmp_path)
    return path


@pytest.mark.parametrize(
    ("data_set", "syntax", "detail"),
    [
        (CT + b"\x40\x00\x75\x02" + SEQUENCE * 10_000, ExplicitVRLittleEndian, "nested without end"),
        (CT + long(8, 0x1140, b"SQ", ITEM * 10_000, UNDEFINED), ExplicitVRLittleEndian, "more elements"),
        (long(9, 0x1010, b"OB", bytes(1 << 21)), ExplicitVRLittleEndian, "a value of 2097152 bytes"),
        (implicit(0x20, 0x37, b"1\\" * 40_000), ImplicitVRLittleEndian, "a value of 80000 bytes"),
        (implicit(8, 5, b"\\" * 80_000), ImplicitVRLittleEndian, "a value of 80000 bytes"),
        (
            implicit(8, 0x1140, b"\xfe\xff\x00\xe0\xff\xff\xff\xff" + implicit(8, 5, b"\\" * 2_000_000), UNDEFINED),
            ImplicitVRLittleEndian,
            "a value of 2000000 bytes",
        ),
        (deflated(bytes(1 << 20), 64), DeflatedExplicitVRLittleEndian, "inflates to more than"),
        (
            deflated(long(8, 0x1140, b"SQ", ITEM * 20_000, UNDEFINED)),
            DeflatedExplicitVRLittleEndian,
            "more elements",
        ),
        (bytes(1 << 22), ExplicitVRLittleEndian, "a file of 0.0 GB"),
    ],
    ids=[
        "nested", "empty items", "a long value", "numbers", "character sets", "nested character sets",
        "inflates", "inflates to items", "large",
    ],
)  # fmt: skip
def test_what_would_fill_the_memory_is_turned_away_by_name(tmp_path: Path, data_set: bytes, syntax: str, detail: str):
    path = tmp_path / "x.dcm"
    path.write_bytes(part10.file_head(CTImageStorage, "1.2.3", syntax, "CT01") + data_set)
    del data_set
    tracemalloc.start()
    try:
        with pytest.raises(NotAnalysed, match=detail) as caught:
            read_image(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.reason is Reason.TOO_LARGE
    assert not caught.value.reason.of_another_kind, "its slice would be missing from the report without a word"
    assert peak < 32e6


@pytest.mark.parametrize("length", [0x7FFFFFFF, 0xFFFFFFF0])
@pytest.mark.parametrize("tag", [(8, 0x1140), (9, 0x1010), (0x7FE0, 0x10)], ids=["header", "private", "pixels"])
def test_lengths_beyond_the_end_are_told_and_not_allocated(tmp_path: Path, tag: tuple[int, int], length: int):
    path = tmp_path / "x.dcm"
    head = part10.file_head(CTImageStorage, "1.2.3", ExplicitVRLittleEndian, "CT01")
    path.write_bytes(head + CT + long(*tag, b"OB", bytes(1000), length))
    tracemalloc.start()
    try:
        with pytest.raises(NotAnalysed) as caught:
            read_image(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.reason is Reason.TRUNCATED
    assert peak < 1e6


def test_a_deflated_image_is_what_it_was(slice_file: Path):
    _, before = read_image(slice_file)
    dataset = dcmread(slice_file)
    dataset.PatientName, dataset.SpecificCharacterSet = "Grüße", "ISO_IR 192"
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(slice_file)
    header, after = read_image(slice_file)
    assert (after.hu == before.hu).all()
    assert header.PatientName == "Grüße"
    assert header.file_meta.TransferSyntaxUID == DeflatedExplicitVRLittleEndian


def claim(rows: int, columns: int, components: int = 1) -> Callable[[bytearray], None]:
    """Have a JPEG 2000 code stream of one tile say another size of itself (ITU-T T.800 annex A.5.1)."""

    def change(frame: bytearray) -> None:
        siz = frame.index(b"\xff\x51")
        struct.pack_into(">LL", frame, siz + 6, columns, rows)
        struct.pack_into(">LL", frame, siz + 22, columns, rows)
        struct.pack_into(">H", frame, siz + 38, components)

    return change


def claim_jpeg(rows: int, columns: int) -> Callable[[bytearray], None]:
    """The same of a JPEG-LS frame header."""

    def change(frame: bytearray) -> None:
        struct.pack_into(">HH", frame, frame.index(b"\xff\xf7") + 5, rows, columns)

    return change


@pytest.mark.parametrize(
    ("syntax", "change"),
    [
        (JPEG2000Lossless, claim(65535, 65535)),
        (JPEG2000Lossless, claim(64, 48, components=16384)),
        (JPEG2000Lossless, claim(63, 48)),
        (JPEGLSLossless, claim_jpeg(65535, 65535)),
        (JPEG2000Lossless, lambda frame: frame.__setitem__(slice(0, 2), b"BM")),
        (JPEG2000Lossless, lambda frame: frame.__delitem__(slice(20, None))),
        (JPEGLSLossless, lambda frame: frame.__setitem__(slice(2, None), b"\xff\xfe\x00\x09")),
        (JPEGLSLossless, lambda frame: frame.__setitem__(slice(2, None), b"\xff\xfe\x00\x02" + bytes(40))),
        (
            JPEG2000Lossless,
            lambda frame: frame.__setitem__(slice(0, 0), b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\x07xml \xff\x4f\xff\x51"),
        ),
    ],
    ids=[
        "size", "components", "one row less", "JPEG-LS", "no code stream", "cut", "cut JPEG", "no header", "a box",
    ],
)  # fmt: skip
def test_a_frame_that_claims_another_size_reaches_no_decoder(
    slice_file: Path, monkeypatch: pytest.MonkeyPatch, syntax: str, change: Callable[[bytearray], None]
):
    dataset = dcmread(slice_file)
    dataset.compress(syntax, generate_instance_uid=False)
    dataset.save_as(slice_file)
    assert read_image(slice_file)[1].hu.shape == (64, 48)
    frame = bytearray(next(generate_frames(dataset.PixelData, number_of_frames=1)))
    change(frame)
    dataset.PixelData = encapsulate([bytes(frame)])
    dataset.save_as(slice_file)
    monkeypatch.setattr(decode, "pixel_array", lambda _: pytest.fail("decoded"))
    with pytest.raises(NotAnalysed) as caught:
        read_image(slice_file)
    assert caught.value.reason is Reason.UNREADABLE


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


JFIF, HEADER, SCAN = (
    segment(0xE0, b"JFIF\0\1\1" + bytes(7)),
    segment(0xC3, b"\x10\0\x40\0\x30\1" + bytes(3)),
    segment(0xDA, bytes(6)),
)


@pytest.mark.parametrize(
    ("segments", "size"),
    [
        (JFIF + HEADER + SCAN, (64, 48, 1)),
        (b"\xff" + HEADER + b"\xff\xff" + SCAN + b"any", (64, 48, 1)),
        (HEADER + b"SQ" + SCAN, None),
        (JFIF.replace(b"JFIF\0\1", b"JFIF\0\2") + HEADER + SCAN, None),
        (HEADER + SCAN[:-1], None),
        (HEADER + HEADER + SCAN, None),
        (segment(0xC2, HEADER[4:]) + SCAN, None),
        (JFIF, None),
    ],
    ids=["whole", "fill", "between", "version", "cut", "two headers", "progressive", "no header"],
)
def test_what_would_end_gdcm_s_process_is_no_jpeg(segments: bytes, size: tuple[int, int, int] | None):
    """It takes each warning of libjpeg before the first scan for a failed assertion."""
    frame = b"\xff\xd8" + segments
    if size:
        assert codestream.size(frame, JPEGLosslessSV1) == size
    else:
        with pytest.raises(ValueError, match="a JPEG|a compressed frame"):
            codestream.size(frame, JPEGLosslessSV1)


def test_a_jp2_file_in_place_of_a_code_stream_is_looked_into(slice_file: Path):
    dataset = dcmread(slice_file)
    dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
    stream = next(generate_frames(dataset.PixelData, number_of_frames=1))
    boxes = b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0\0\0\x0cxml \xff\x4f\xff\x51" + b"\0\0\0\0jp2c"
    assert codestream.size(boxes + stream, JPEG2000Lossless) == (64, 48, 1)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless])
@pytest.mark.parametrize(
    "shape",
    [
        {"Rows": 65535, "Columns": 65535},
        {"NumberOfFrames": 2_000_000_000},
        {"SamplesPerPixel": 65535},
        {"Rows": 4096, "Columns": 2048},
    ],
    ids="-".join,
)
def test_a_header_that_claims_more_than_any_ct_reaches_no_decoder(
    slice_file: Path, monkeypatch: pytest.MonkeyPatch, syntax: str, shape: dict[str, int]
):
    dataset = dcmread(slice_file)
    if syntax != ExplicitVRLittleEndian:
        dataset.compress(syntax, generate_instance_uid=False)
    for keyword, value in shape.items():
        setattr(dataset, keyword, value)
    dataset.save_as(slice_file)
    monkeypatch.setattr(decode, "pixel_array", lambda _: pytest.fail("decoded"))
    monkeypatch.setattr("dicom_node.images.gate.LARGEST", 1 << 22)
    with pytest.raises(NotAnalysed) as caught:
        read_image(slice_file)
    assert caught.value.reason is Reason.TOO_LARGE


def test_where_the_uids_stand_is_looked_for_in_bounds(tmp_path: Path):
    """Of an object of any size the spool holds a part in memory, also when it is read again."""
    spool = Spool(tmp_path / "spool", free_floor_gb=0)
    request = {"sop_class_uid": CTImageStorage, "transfer_syntax_uid": ExplicitVRLittleEndian, "calling_ae": "CT01"}
    whole = encoded(image())
    ahead, behind = long(9, 0x1010, b"OB", bytes(100_000)), long(0x7FE1, 0x1010, b"OB", bytes(1 << 23))
    at = whole.index(b"\x10\x00\x10\x00")
    large = whole[:at] + ahead + whole[at:] + behind
    late = whole[:at] + long(9, 0x1010, b"OB", bytes(1 << 23)) + whole[at:]
    tracemalloc.start()
    try:
        _, instance = spool.store(large, sop_uid="1.2.3.4.5.1", **request)
        spool.store(large, sop_uid="1.2.3.4.5.1", **request)
        assert list(spool.contents()) == [("1.2.3.4", "1.2.3.4.5", 1)]
        assert read(instance.path) == instance
        with pytest.raises(DataSetError):
            spool.store(late, sop_uid="1.2.3.4.5.1", **request)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4e6


@pytest.mark.parametrize(
    ("data_set", "syntax"),
    [
        (b"\x08\x00\x06\x00" + SEQUENCE * 10_000, ExplicitVRLittleEndian),
        (long(8, 0x1140, b"SQ", ITEM * 30_000, UNDEFINED), ExplicitVRLittleEndian),
        (deflated(long(8, 0x1140, b"SQ", ITEM * 30_000, UNDEFINED)), DeflatedExplicitVRLittleEndian),
    ],
    ids=["nested", "empty items", "inflates to items"],
)
def test_no_data_set_keeps_the_receiver_busy(data_set: bytes, syntax: str):
    with pytest.raises(DataSetExcessive):
        identity(data_set, syntax)


def test_pydicom_s_own_errors_are_not_taken_for_the_disk_s(tmp_path: Path):
    """It raises OSError where an item is cut off; the scanner would be told that the disk is full."""
    cut = long(8, 0x1140, b"SQ", ITEM, UNDEFINED) + b"\xfe\xff"
    with pytest.raises(DataSetUnreadable):
        identity(cut, ExplicitVRLittleEndian)
    with pytest.raises(DataSetUnreadable):
        read_whole(cut, ExplicitVRLittleEndian)


def test_an_empty_uid_of_no_vr_is_missing():
    """Two letters are a VR for pydicom by their order, and NotImplementedError came out of it later."""
    series = encoded(image()).replace(b"\x20\x00\x0e\x00UI\x0a\x00", b"\x20\x00\x0e\x00U\0\0\0")
    with pytest.raises(DataSetUnreadable):
        identity(series, ExplicitVRLittleEndian)


def test_a_list_of_instances_has_an_end():
    listed = long(8, 0x1140, b"SQ", ITEM * (part10.MOST_ITEMS + 1))
    with pytest.raises(DataSetExcessive, match="65536 items"):
        read_whole(listed, ExplicitVRLittleEndian)
