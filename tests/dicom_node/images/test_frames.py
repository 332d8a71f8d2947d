"""Multi-frame files to slices: encodings, functional groups, and the reasons of what is turned away."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGLSLossless, LegacyConvertedEnhancedCTImageStorage, RLELossless

from dicom_node.analysis import decode
from dicom_node.images.gate import NotAnalysed, Reason
from runtime.types import Plane, Slice
from tests.dicom_node import multiframe
from tests.dicom_node.multiframe import changed

CORPUS = Path(__file__).parents[4] / "shared" / "corpus"
FRAMES = 7


def one(index: int, shape: tuple[int, int] = (32, 48)) -> Slice:
    tilt = np.radians(15)
    plane = Plane(
        (-60.0, -60.0, 5.0 * index), (1.0, 0.0, 0.0), (0.0, float(np.cos(tilt)), -float(np.sin(tilt))), (0.5, 0.75), 5.0
    )
    return Slice(str(index), plane, np.random.default_rng(index).integers(-1024, 3000, shape).astype(np.int16))


SLICES = [one(i) for i in range(FRAMES)]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return multiframe.write(SLICES, tmp_path)


def slices(path: Path) -> list[Slice]:
    """What a file holds; all of it must be slices."""
    images = list(decode.read(path))
    assert not [image for image in images if isinstance(image, NotAnalysed)]
    return [slice_ for _, slice_ in images]


def refusals(path: Path) -> list[NotAnalysed]:
    return [image for image in decode.read(path) if isinstance(image, NotAnalysed)]


def the_reason(path: Path) -> Reason:
    (refusal,) = decode.read(path)
    assert refusal.frame is None
    return refusal.reason


def assert_same(found: list[Slice], expected: list[Slice]) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine.hu, theirs.hu)
        np.testing.assert_allclose(mine.plane.origin_lps, theirs.plane.origin_lps)
        np.testing.assert_allclose(mine.plane.column_lps, theirs.plane.column_lps)
        assert (mine.plane.spacing_mm, mine.plane.thickness_mm) == (theirs.plane.spacing_mm, theirs.plane.thickness_mm)


def remove(keyword: str, frame: int | None = None) -> Callable[[FileDataset], None]:
    """Take a functional group from one frame, or from the shared ones."""

    def change(dataset: FileDataset) -> None:
        if frame is None:
            del dataset.SharedFunctionalGroupsSequence[0][keyword]
        else:
            del dataset.PerFrameFunctionalGroupsSequence[frame - 1][keyword]

    return change


def put(**values: object) -> Callable[[FileDataset], None]:
    return lambda dataset: [setattr(dataset, keyword, value) for keyword, value in values.items()]


def frame_types(**types: list[str]) -> Callable[[FileDataset], None]:
    """Frames (``frame_3=[...]``) with types of their own; the image is MIXED."""

    def change(dataset: FileDataset) -> None:
        dataset.ImageType = ["MIXED", "PRIMARY", "MIXED", "NONE"]
        shared = dataset.SharedFunctionalGroupsSequence[0].CTImageFrameTypeSequence[0]
        del dataset.SharedFunctionalGroupsSequence[0].CTImageFrameTypeSequence
        for number, own in enumerate(dataset.PerFrameFunctionalGroupsSequence, start=1):
            item = Dataset()
            item.FrameType = types.get(f"frame_{number}", shared.FrameType)
            own.CTImageFrameTypeSequence = [item]

    return change


@pytest.mark.parametrize("encoding", multiframe.ENCODINGS)
def test_every_encoding_gives_the_same_slices(image: Path, encoding: str):
    assert_same(slices(changed(image, multiframe.ENCODINGS[encoding])), SLICES)


def test_a_frame_decoded_again_alone_is_the_same(image: Path):
    for encoding in ("explicit", "deflated", "JPEG-LS in fragments without offsets"):
        changed(image, multiframe.ENCODINGS[encoding])
        ((header, slice_),) = decode.read(image, only=4)
        assert_same([slice_], [SLICES[3]])
        assert header.ReferencedFrameNumber == 4
        changed(image, lambda dataset: dataset.decompress(generate_instance_uid=False)) if "JPEG" in encoding else None


def test_a_slice_is_called_by_instance_and_frame(image: Path):
    uid = dcmread(image).SOPInstanceUID
    assert [slice_.key for slice_ in slices(image)] == [f"{uid} frame {n}" for n in range(1, FRAMES + 1)]


def test_a_frame_s_header_is_that_of_a_single_frame_image(image: Path):
    header, _ = next(decode.read(image))
    assert "PixelData" not in header
    assert "NumberOfFrames" not in header
    assert "PerFrameFunctionalGroupsSequence" not in header
    assert (header.Rows, header.PatientID) == (32, dcmread(image).PatientID)
    assert header.ImageType == ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    assert header.ConvolutionKernel == "SOFT"


def test_text_is_read_in_the_image_s_character_set(image: Path):
    changed(image, put(SpecificCharacterSet="ISO_IR 144", PatientName="Иванов^Иван"))
    assert [str(header.PatientName) for header, _ in decode.read(image)] == ["Иванов^Иван"] * FRAMES


def test_rescale_may_be_each_frame_s_own(image: Path):
    assert_same(slices(changed(image, multiframe.rescale_per_frame)), SLICES)


def test_a_frame_s_own_groups_come_before_shared_ones(image: Path):
    def change(dataset: FileDataset) -> None:
        item = Dataset()
        item.RescaleSlope, item.RescaleIntercept, item.RescaleType = 1, -1000, "HU"
        dataset.PerFrameFunctionalGroupsSequence[2].PixelValueTransformationSequence = [item]

    found = slices(changed(image, change))
    assert (found[2].hu - SLICES[2].hu == 24).all()
    np.testing.assert_array_equal(found[3].hu, SLICES[3].hu)


def test_groups_may_all_be_shared_but_the_position(image: Path):
    def change(dataset: FileDataset) -> None:
        first = dataset.PerFrameFunctionalGroupsSequence[0]
        shared = dataset.SharedFunctionalGroupsSequence[0]
        for keyword in ("PlaneOrientationSequence", "PixelMeasuresSequence"):
            shared.add(first[keyword])
            for own in dataset.PerFrameFunctionalGroupsSequence:
                del own[keyword]

    assert_same(slices(changed(image, change)), SLICES)


def test_legacy_converted_images_are_read_alike(tmp_path: Path):
    path = multiframe.legacy(SLICES, tmp_path)
    assert dcmread(path).SOPClassUID == LegacyConvertedEnhancedCTImageStorage
    found = slices(path)
    assert_same(sorted(found, key=lambda slice_: slice_.plane.origin_lps[2]), SLICES)


def test_a_frame_that_is_none_of_the_head_s_is_left_out_alone(image: Path):
    types = {
        "frame_2": ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"],
        "frame_5": ["DERIVED", "PRIMARY", "VOLUME", "MAX"],
    }
    changed(image, frame_types(**types))
    assert [(refusal.frame, refusal.reason) for refusal in refusals(image)] == [
        (2, Reason.LOCALIZER),
        (5, Reason.DERIVED),
    ]
    assert str(refusals(image)[0]) == "frame 2: a localizer"
    found = [image for image in decode.read(image) if not isinstance(image, NotAnalysed)]
    assert_same([slice_ for _, slice_ in found], [SLICES[i] for i in (0, 2, 3, 5, 6)])


def test_a_mixed_image_has_to_say_which_frames_are_derived(image: Path):
    changed(image, frame_types())
    assert refusals(image) == []
    changed(
        image, lambda dataset: [own.pop("CTImageFrameTypeSequence") for own in dataset.PerFrameFunctionalGroupsSequence]
    )
    assert {refusal.reason for refusal in refusals(image)} == {Reason.DERIVED}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (remove("PlanePositionSequence", 3), Reason.NO_GEOMETRY),
        (remove("PlaneOrientationSequence", 3), Reason.NO_GEOMETRY),
        (remove("PixelMeasuresSequence", 3), Reason.NO_GEOMETRY),
        (lambda d: setattr(d.PerFrameFunctionalGroupsSequence[2], "PlanePositionSequence", []), Reason.NO_GEOMETRY),
    ],
)
def test_a_frame_that_lacks_a_group_is_turned_away_by_number(
    image: Path, change: Callable[[FileDataset], None], reason: Reason
):
    def astray(dataset: FileDataset) -> None:
        change(dataset)
        dataset.ImagePositionPatient = [0, 0, 0]  # no place for it: no frame's position

    (refusal,) = refusals(changed(image, astray))
    assert (refusal.reason, refusal.frame) == (reason, 3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (put(PerFrameFunctionalGroupsSequence=None), Reason.NO_FUNCTIONAL_GROUPS),
        (lambda d: d.pop("PerFrameFunctionalGroupsSequence"), Reason.NO_FUNCTIONAL_GROUPS),
        (lambda d: [d.pop(f"{which}FunctionalGroupsSequence") for which in ("PerFrame", "Shared")],
         Reason.NO_FUNCTIONAL_GROUPS),
        (lambda d: d.pop("NumberOfFrames"), Reason.NO_FUNCTIONAL_GROUPS),
        (put(NumberOfFrames=0), Reason.NO_FUNCTIONAL_GROUPS),
        (put(NumberOfFrames=FRAMES - 1), Reason.NO_FUNCTIONAL_GROUPS),
        (put(NumberOfFrames=9999), Reason.NO_FUNCTIONAL_GROUPS),
        (lambda d: d.PerFrameFunctionalGroupsSequence.pop(), Reason.NO_FUNCTIONAL_GROUPS),
        (lambda d: d.pop("PixelData"), Reason.NO_PIXEL_DATA),
        (put(PixelData=b"\0" * 100), Reason.TRUNCATED),
        (put(Rows=65535, Columns=65535), Reason.TRUNCATED),
        (lambda d: d.pop("Rows"), Reason.UNREADABLE),
        (put(SOPClassUID="1.2.840.10008.5.1.4.1.1.4.1"), Reason.NOT_CT),
    ],
)  # fmt: skip
def test_an_image_that_can_t_be_taken_apart_is_turned_away_whole(
    image: Path, change: Callable[[FileDataset], object], reason: Reason
):
    assert the_reason(changed(image, change)) is reason


def test_a_rescale_that_nobody_tells_is_missed(image: Path):
    changed(image, remove("PixelValueTransformationSequence"))
    assert {(one.reason, one.frame) for one in refusals(image)} == {(Reason.NO_RESCALE, n + 1) for n in range(FRAMES)}


def test_what_claims_to_be_huge_is_turned_away_before_memory_is_allocated(tmp_path: Path):
    frames = 9999
    path = multiframe.write([one(0, (4, 4))], tmp_path)

    def claim(dataset: FileDataset) -> None:
        dataset.Rows = dataset.Columns = 65535
        dataset.NumberOfFrames = frames
        dataset.PerFrameFunctionalGroupsSequence = [Dataset()] * frames

    changed(path, claim)
    tracemalloc.start()
    assert the_reason(path) is Reason.TRUNCATED
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6
    changed(path, lambda dataset: dataset.__setattr__("PerFrameFunctionalGroupsSequence", None))
    assert the_reason(path) is Reason.NO_FUNCTIONAL_GROUPS


def test_compressed_frames_that_claim_to_be_huge_are_turned_away(image: Path):
    changed(image, multiframe.compress(RLELossless))
    changed(image, put(Rows=65535, Columns=65535))
    assert {refusal.reason for refusal in refusals(image)} == {Reason.TOO_LARGE}
    assert "65535 x 65535" in str(refusals(image)[0])


@pytest.mark.filterwarnings("ignore:End of file reached:UserWarning")
@pytest.mark.parametrize("encoding", ["explicit", "implicit", "deflated", "RLE", "JPEG-LS in fragments"])
@pytest.mark.parametrize("missing", [7, 3000, 15000])
def test_a_file_without_its_end_is_truncated(image: Path, encoding: str, missing: int):
    changed(image, multiframe.ENCODINGS[encoding])
    image.write_bytes(image.read_bytes()[:-missing])
    assert the_reason(image) is Reason.TRUNCATED


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's, of headers without their end
def test_wherever_it_is_cut_off_a_file_has_its_reason(image: Path):
    whole = image.read_bytes()
    for length in range(len(whole) - 1, 0, -997):
        image.write_bytes(whole[:length])
        assert [image.reason for image in decode.read(image)] != []
        assert all(isinstance(image, NotAnalysed) for image in decode.read(image))


def test_a_frame_that_does_not_decode_is_left_out_alone(image: Path):
    def damage(dataset: FileDataset) -> None:
        multiframe.compress(JPEGLSLossless)(dataset)
        frames = multiframe.encoded(dataset)
        frames[3] = b"\xff\xd8" + b"\0" * 200
        dataset.PixelData = encapsulate(frames)

    (refusal,) = refusals(changed(image, damage))
    assert (refusal.reason, refusal.frame) == (Reason.UNREADABLE, 4)


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (lambda frames: encapsulate(frames[:-1]), Reason.TRUNCATED),
        (lambda frames: encapsulate([*frames, frames[0]], has_bot=False), Reason.UNREADABLE),
        (lambda frames: encapsulate(frames)[:100] + b"\0" * 9000, Reason.UNREADABLE),
    ],
)  # fmt: skip
def test_fragments_that_are_no_frames_are_turned_away(image: Path, pixels: Callable, reason: Reason):
    def change(dataset: FileDataset) -> None:
        multiframe.compress(RLELossless)(dataset)
        dataset.PixelData = pixels(multiframe.encoded(dataset))

    assert the_reason(changed(image, change)) is reason


def test_an_offset_table_that_lies_is_not_believed(image: Path):
    def change(dataset: FileDataset) -> None:
        multiframe.compress(JPEGLSLossless, 3)(dataset)
        table = bytearray(dataset.PixelData)
        table[12:16] = (7).to_bytes(4, "little")  # where the second frame is said to begin
        dataset.PixelData = bytes(table)

    assert the_reason(changed(image, change)) is Reason.UNREADABLE


def test_memory_does_not_grow_with_the_number_of_frames(tmp_path: Path):
    """Of 60 frames of 128 KiB, stored and decoded, few are in memory at a time."""
    many = [one(i % 5, (256, 256)) for i in range(60)]
    for encoding in ("explicit", "RLE"):
        path = changed(multiframe.write(many, tmp_path), multiframe.ENCODINGS[encoding])
        tracemalloc.start()
        for image in decode.read(path):
            assert not isinstance(image, NotAnalysed)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 3e6, encoding


@pytest.mark.skipif(not CORPUS.exists(), reason="the corpus of real DICOM is not here: real Enhanced CT is NOT tested")
def test_a_real_perfusion_map_is_derived():
    path = CORPUS / "30_enhanced_ct_perfusion_map" / "eCT_Supplemental.dcm"
    assert [(refusal.frame, refusal.reason) for refusal in decode.read(path)] == [
        (1, Reason.DERIVED),
        (2, Reason.DERIVED),
    ]


@pytest.mark.filterwarnings("ignore")  # pydicom's, of its own broken examples
def test_every_file_that_pydicom_ships_is_a_slice_or_has_its_reason():
    paths = sorted((Path(pydicom.__file__).parent / "data" / "test_files").rglob("*.dcm"))
    assert len(paths) > 50
    for path in paths:
        images = list(decode.read(path))
        assert images, path
        assert all(isinstance(image, NotAnalysed) or image[1].hu.any() for image in images)
