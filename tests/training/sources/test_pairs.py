"""Image and mask pairs: grey values and masks to the pixel, and every way that two folders do not pair."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from PIL import Image

from training.sources import pairs
from training.sources.errors import SourceError

PATIENT = r"^(?P<patient>\d+)_"
GREY = np.random.default_rng(5).integers(0, 256, (9, 13)).astype(np.uint8)
MASK = np.where(np.random.default_rng(6).random((9, 13)) < 0.3, 255, 0).astype(np.uint8)


@pytest.fixture
def folders(tmp_path):
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    Image.fromarray(GREY).save(images / "1_a.png")
    Image.fromarray(MASK).save(masks / "1_a.png")
    return images, masks


def only(folders, **options):
    (entry,) = pairs.entries(*folders, **{"patient": PATIENT, **options})
    return entry.load()


def test_a_pair_is_one_case(folders):
    (entry,) = pairs.entries(*folders, patient=PATIENT)
    case = pickle.loads(pickle.dumps(entry)).load()
    assert (case.patient, case.name, case.quantity, case.spacing_mm) == ("1", "1_a", "grey", None)
    assert case.images.dtype == np.uint8
    assert np.array_equal(case.images[0], GREY)
    assert np.array_equal(case.labels[0], MASK // 255)


def test_the_threshold_is_half_of_the_full_scale(folders):
    levels = np.array([[0, 127, 128, 255]], np.uint8)
    Image.fromarray(levels).save(folders[0] / "1_a.png")
    Image.fromarray(levels).save(folders[1] / "1_a.png")
    assert only(folders).labels.tolist() == [[[0, 0, 1, 1]]]


def test_values_may_be_class_indices_through_a_mapping(folders):
    values = np.zeros((9, 13), np.uint8)
    values[2:4, 5:9], values[6, 1] = 2, 7
    Image.fromarray(values).save(folders[1] / "1_a.png")
    labels = only(folders, classes={2: 1, 7: 4}).labels[0]
    assert np.array_equal(labels, np.where(values == 2, 1, 0) + np.where(values == 7, 4, 0))


def test_a_palette_is_its_indices_where_classes_are_asked_for(folders):
    picture = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    picture = picture.convert("P")
    picture.putdata([0, 1, 2])
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    picture.save(folders[1] / "1_a.png")
    Image.fromarray(GREY[:1, :3]).save(folders[0] / "1_a.png")
    assert only(folders, classes={1: 1, 2: 2}).labels.tolist() == [[[0, 1, 2]]]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "1"])
def test_grey_stays_grey_whatever_it_is_stored_as(folders, mode):
    Image.fromarray(MASK).convert(mode).save(folders[0] / "1_a.png")
    assert np.array_equal(only(folders).images[0], MASK)


@pytest.mark.parametrize("name", ["1_a.png", "1_a.tif"])
def test_sixteen_bits_are_kept(folders, name):
    (folders[0] / "1_a.png").unlink()
    deep = np.arange(9 * 13, dtype=np.uint16).reshape(9, 13) * 250
    Image.fromarray(deep).save(folders[0] / name)
    case = only(folders)
    assert case.images.dtype == np.int16
    assert np.array_equal(case.images[0], deep)


def test_jpeg_and_folders_within_folders(folders):
    images, masks = folders
    for folder, array in ((images, GREY), (masks, MASK)):
        (folder / "12/brain").mkdir(parents=True)
        Image.fromarray(array).save(folder / ("12/brain/3.jpg" if folder == images else "12/brain/3.png"), quality=95)
        (folder / "1_a.png").unlink()
    (images / ".hidden.png").write_bytes(b"")
    (images / "readme.txt").write_text("text beside images is no image")
    (images / "Thumbs.db").write_bytes(b"")
    (entry,) = pairs.entries(images, masks, patient=r"^(?P<patient>\d+)/")
    assert (entry.patient, entry.name) == ("12", "12/brain/3")
    with Image.open(images / "12/brain/3.jpg") as stored:
        assert np.array_equal(entry.load().images[0], np.asarray(stored))


def test_masks_may_lie_beside_images_by_their_suffix(folders):
    images = folders[0]
    Image.fromarray(MASK).save(images / "1_a_mask.png")
    (entry,) = pairs.entries(images, images, patient=PATIENT, mask_suffix="_mask")
    assert (entry.name, entry.load().labels.sum()) == ("1_a", (MASK > 0).sum())
    with pytest.raises(SourceError, match="images and masks in one folder"):
        pairs.entries(images, images, patient=PATIENT)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-30])


def two_pages(path):
    one = Image.fromarray(GREY)
    path.unlink()
    one.save(path.with_suffix(".tif"), save_all=True, append_images=[one])


def turned(path):
    tags = Image.Exif()
    tags[0x0112] = 6
    path.unlink()
    Image.fromarray(GREY).save(path.with_suffix(".jpg"), exif=tags)


def floating(path):
    path.unlink()
    Image.fromarray(GREY.astype(np.float32)).save(path.with_suffix(".tif"))


BROKEN = {
    "truncated": (lambda at: truncate(at / "images/1_a.png"), "1_a.png: broken picture"),
    "truncated mask": (lambda at: truncate(at / "masks/1_a.png"), "broken picture"),
    "text": (lambda at: (at / "images/1_a.png").write_text("no picture"), "broken picture"),
    "empty file": (lambda at: (at / "images/1_a.png").write_bytes(b""), "broken picture"),
    "another type": (lambda at: (at / "images/1_b.bmp").write_bytes(b""), "1_b.bmp: not one of"),
    "no image": (lambda at: Image.fromarray(MASK).save(at / "masks/1_b.png"), "1_b.png: mask without image"),
    "no mask": (lambda at: Image.fromarray(GREY).save(at / "images/1_b.png"), "1_b.png: image without mask"),
    "one stem": (lambda at: Image.fromarray(GREY).save(at / "images/1_a.jpg"), "the same stem as 1_a.jpg"),
    "no files": (lambda at: (at / "images/1_a.png").unlink(), "empty folder"),
    "sizes": (lambda at: Image.fromarray(MASK.T).save(at / "masks/1_a.png"), "13 x 9 pixels beside an image of 9 x 13"),
    "pages": (lambda at: two_pages(at / "images/1_a.png"), "2 pages"),
    "turned": (lambda at: turned(at / "images/1_a.png"), "EXIF orientation"),
    "floating": (lambda at: floating(at / "images/1_a.png"), "floating-point pixels"),
    "too bright": (
        lambda at: Image.fromarray(np.full((9, 13), 40000, np.uint16)).save(at / "images/1_a.png"),
        "values up to 40000",
    ),
    "dark mask": (lambda at: Image.fromarray(MASK // 100).save(at / "masks/1_a.png"), "these look like class indices"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_pairs_are_refused_by_name(folders, kind):
    spoil, message = BROKEN[kind]
    spoil(folders[0].parent)
    with pytest.raises(SourceError, match=message):
        only(folders)


def test_no_folder_is_refused(folders):
    with pytest.raises(SourceError, match="no such folder"):
        pairs.entries(folders[0] / "none", folders[1], patient=PATIENT)


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (lambda path: Image.fromarray(MASK).save(path), "unknown class 255 .known: 1, 2"),
        (lambda path: Image.fromarray(MASK).convert("RGB").save(path), "mode RGB has no class indices"),
        (lambda path: (path.unlink(), Image.fromarray(MASK).save(path.with_suffix(".jpg"))), "JPEG changes class"),
    ],
)
def test_masks_that_are_no_class_indices_are_refused(folders, save, message):
    save(folders[1] / "1_a.png")
    with pytest.raises(SourceError, match=message):
        only(folders, classes={1: 1, 2: 2})


def test_a_pattern_is_needed_that_names_each_patient(folders):
    with pytest.raises(SourceError, match="no split by patient"):
        pairs.entries(*folders, patient=r"\d+")
    with pytest.raises(SourceError, match="finds no patient in '1_a'"):
        pairs.entries(*folders, patient=r"(?P<patient>x\d+)")
