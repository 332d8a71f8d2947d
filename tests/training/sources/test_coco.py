"""COCO: polygons and both run-length forms to exact pixels, and every way a file can be broken."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as coco_mask

from training.sources import coco
from training.sources.errors import SourceError

H, W = 14, 18
CLASSES = {"subdural": 2, "epidural": 3}
PATIENT = r"^(?P<patient>p\d+)_"
SQUARE = [2, 3, 8, 3, 8, 9, 2, 9]  # x y x y: columns 2 to 7, rows 3 to 8


def compressed(mask):
    run = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(run["size"]), "counts": run["counts"].decode()}


def runs(mask):
    flat = mask.T.ravel().astype(int)
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


@pytest.fixture
def content():
    return {
        "categories": [{"id": 0, "name": "unused"}, {"id": 1, "name": "subdural"}, {"id": 2, "name": "epidural"}],
        "images": [
            {"id": 7, "file_name": "p1_a.png", "height": H, "width": W},
            {"id": 8, "file_name": "p2_a.png", "height": H, "width": W},
        ],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 1, "segmentation": [SQUARE]}],
    }


GREY = np.random.default_rng(3).integers(0, 256, (H, W)).astype(np.uint8)


def listed(folder, content, **options):
    for each in content["images"] if isinstance(content, dict) and isinstance(content.get("images"), list) else ():
        if isinstance(each, dict) and each.get("file_name"):
            Image.fromarray(GREY).save(folder / each["file_name"])
    (folder / "coco.json").write_text(json.dumps(content))
    return coco.entries(folder / "coco.json", **{"classes": CLASSES, "patient": PATIENT, **options})


def test_a_polygon_becomes_its_pixels_and_a_picture_without_any_is_a_negative(tmp_path, content):
    first, second = listed(tmp_path, content)
    assert (first.patient, first.name, second.patient) == ("p1", "p1_a.png", "p2")
    case = pickle.loads(pickle.dumps(first)).load()
    expected = np.zeros((1, H, W), np.uint8)
    expected[0, 3:9, 2:8] = 2
    assert np.array_equal(case.labels, expected)
    assert np.array_equal(case.images[0], GREY)
    assert (case.patient, case.quantity, case.spacing_mm) == ("p1", "grey", None)
    assert not second.load().labels.any()


def test_parts_of_one_annotation_are_joined_and_the_higher_class_lies_on_top(tmp_path, content):
    part = [10, 3, 12, 3, 12, 5, 10, 5]
    over = [5, 3, 11, 3, 11, 4, 5, 4]
    one = {"id": 1, "image_id": 7, "category_id": 1, "segmentation": [SQUARE, part]}
    other = {"id": 2, "image_id": 7, "category_id": 2, "segmentation": [over]}
    expected = np.zeros((1, H, W), np.uint8)
    expected[0, 3:9, 2:8] = expected[0, 3:5, 10:12] = 2
    expected[0, 3:4, 5:11] = 3
    for order in ([one, other], [other, one]):
        content["annotations"] = order
        assert np.array_equal(listed(tmp_path, content)[0].load().labels, expected)


@pytest.mark.parametrize("form", [compressed, runs])
@pytest.mark.parametrize("seed", range(3))
def test_run_lengths_become_their_pixels(tmp_path, content, form, seed):
    mask = np.random.default_rng(seed).random((H, W)) < (0.5, 0.05, 0.9)[seed]
    content["annotations"][0].update(segmentation=form(mask), category_id=2)
    assert np.array_equal(listed(tmp_path, content)[0].load().labels[0], 3 * mask)


@given(arrays(bool, st.tuples(st.integers(1, 90), st.integers(1, 60))))
@settings(max_examples=50, deadline=None)
def test_compressed_run_lengths_are_read_as_pycocotools_writes_them(mask):
    assert coco._uncompress(compressed(mask)["counts"]) == runs(mask)["counts"]


def test_a_category_mapped_to_0_is_left_out(tmp_path, content):
    content["annotations"].append({"id": 2, "image_id": 7, "category_id": 2, "segmentation": [[9, 9, 12, 9, 12, 12]]})
    case = listed(tmp_path, content, classes={"subdural": 1, "epidural": 0})[0].load()
    assert set(np.unique(case.labels)) == {0, 1}


def test_pictures_may_lie_elsewhere(tmp_path, content):
    (tmp_path / "pictures").mkdir()
    Image.fromarray(GREY).save(tmp_path / "pictures/p1_a.png")
    Image.fromarray(GREY).save(tmp_path / "pictures/p2_a.png")
    (tmp_path / "coco.json").write_text(json.dumps(content))
    found = coco.entries(tmp_path / "coco.json", classes=CLASSES, patient=PATIENT, images=tmp_path / "pictures")
    assert len(found) == 2
    with pytest.raises(SourceError, match=r"p1_a.png: listed and not there"):
        coco.entries(tmp_path / "coco.json", classes=CLASSES, patient=PATIENT)


def annotated(**changes):
    return lambda content: content["annotations"][0].update(changes)


def with_rle(**changes):
    return annotated(segmentation={**runs(np.ones((H, W), bool)), **changes})


BROKEN = {
    "no object": (lambda c: c.clear(), "no valid 'images'"),
    "no images": (lambda c: c.update(images=[]), "no image is listed"),
    "image without id": (lambda c: c["images"][0].pop("id"), "image has no valid 'id'"),
    "image twice": (lambda c: c["images"][1].update(id=7), "image 7 is listed twice"),
    "file twice": (lambda c: c["images"][1].update(file_name="p1_a.png"), "p1_a.png is listed twice"),
    "no height": (lambda c: c["images"][0].pop("height"), "image 7 has no valid 'height'"),
    "category twice": (lambda c: c["categories"][1].update(id=0), "category 0 is listed twice"),
    "unknown category": (annotated(category_id=0), "unknown class 'unused'"),
    "category not listed": (annotated(category_id=9), "category 9, which is not listed"),
    "image not listed": (annotated(image_id=9), "image 9, which is not listed"),
    "no segmentation": (lambda c: c["annotations"][0].pop("segmentation"), "annotation 1 has no valid 'segmentation'"),
    "no outline": (annotated(segmentation=[]), "annotation 1 has no outline"),
    "a box": (annotated(segmentation=[[1, 2, 5, 6]]), "three or more points"),
    "odd numbers": (annotated(segmentation=[[1, 2, 5, 6, 7, 8, 9]]), "three or more points"),
    "words": (annotated(segmentation=[[1, 2, 5, 6, 7, "8"]]), "three or more points"),
    "flat": (annotated(segmentation=SQUARE), "three or more points"),
    "outside": (annotated(segmentation=[[1, 2, 5, 6, 7, H + 2]]), "reaches out of its picture"),
    "not a number": (annotated(segmentation=[[1, 2, 5, 6, 7, float("nan")]]), "reaches out of its picture"),
    "runs of another size": (with_rle(size=[W, H]), "run lengths of another size"),
    "runs too short": (with_rle(counts=[3, 4]), "run lengths of 7 pixels, not 252"),
    "runs too long": (with_rle(counts=[3, 4000]), "run lengths of 4003 pixels"),
    "negative runs": (with_rle(counts=[-3, 255]), "broken run lengths"),
    "compressed, cut": (with_rle(counts="0i"), "broken run lengths"),
    "compressed, short": (with_rle(counts="34"), "run lengths of 7 pixels"),
    "compressed, foreign": (with_rle(counts="3\x01"), "broken run lengths"),
    "no patient": (lambda c: c["images"][0].update(file_name="q1.png"), "finds no patient in 'q1.png'"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_refused_by_name(tmp_path, content, kind):
    change, message = BROKEN[kind]
    change(content)
    with pytest.raises(SourceError, match=message) as raised:
        [entry.load() for entry in listed(tmp_path, content)]
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", '{"images": [', "\xff\xfe"])
def test_what_is_no_json_is_refused(tmp_path, text):
    (tmp_path / "coco.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(SourceError, match="no JSON, or truncated"):
        coco.entries(tmp_path / "coco.json", classes=CLASSES, patient=PATIENT)


def test_json_of_another_kind_and_no_file_at_all_are_refused(tmp_path):
    (tmp_path / "coco.json").write_text("[]")
    with pytest.raises(SourceError, match="no COCO file"):
        coco.entries(tmp_path / "coco.json", classes=CLASSES, patient=PATIENT)
    with pytest.raises(SourceError, match="can't be read"):
        coco.entries(tmp_path / "none.json", classes=CLASSES, patient=PATIENT)


def test_a_picture_of_another_size_is_refused(tmp_path, content):
    entry = listed(tmp_path, content)[0]
    Image.fromarray(GREY.T).save(tmp_path / "p1_a.png")
    with pytest.raises(SourceError, match="18 x 14 pixels, annotated at 14 x 18"):
        entry.load()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patient": ""}, "no group named 'patient': .*no split by patient"),
        ({"patient": r"(?P<subject>\d+)"}, "no group named 'patient'"),
        ({"patient": "(?P<patient>"}, "no regular expression"),
        ({"patient": r"(?P<patient>\d*)"}, "finds no patient"),
        ({"classes": {"subdural": 256}}, "'subdural' is mapped to class 256"),
        ({"classes": {"subdural": -1}}, "'subdural' is mapped to class -1"),
        ({"classes": {"subdural": 1.5}}, "'subdural' is mapped to class 1.5"),
        ({"classes": {"subdural": 0}}, "no class has an index above 0"),
        ({"classes": {}}, "no class has an index above 0"),
    ],
)
def test_mappings_and_patterns_that_can_not_work_are_refused(tmp_path, content, options, message):
    with pytest.raises(SourceError, match=message):
        listed(tmp_path, content, **options)
