"""Scores of a bundle: right where the answers are known, and written where people look."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.bundle import Bundle, open_bundle
from runtime.geometry import View
from runtime.types import ModelIdentity, SliceLabels
from training import card, evaluate
from training.heads import as_case, check_classes
from training.lesions import CLASSES, Lesion, PhantomError
from training.phantom import Scan, make
from training.sources.case import Case

SIDE = 64


class Oracle:
    """An engine that knows the answers: label maps by the slice's first pixel."""

    identity = ModelIdentity("oracle", "1", "0" * 64, "fp32", "oracle", "nothing")

    def __init__(self, answers: np.ndarray) -> None:
        self.answers = answers

    def infer(self, hu: np.ndarray) -> list[SliceLabels]:
        labels = self.answers[hu[:, hu.shape[1] // 2, 0, 0]]
        counts = [np.bincount(one.ravel(), minlength=len(CLASSES)) for one in labels]
        return [
            SliceLabels(one.copy(), count, (count > 0).astype(np.float32) * np.float32(0.9))
            for one, count in zip(labels, counts, strict=True)
        ]

    def close(self) -> None:
        pass


def blocks(*sizes: int) -> np.ndarray:
    """Label maps of ten slices; class 1 + i is a block of `sizes[i]` rows and columns on slices 3 to 6."""
    labels = np.zeros((10, SIDE, SIDE), np.uint8)
    for c, size in enumerate(sizes, start=1):
        labels[3:7, 2 + 12 * c : 2 + 12 * c + size, 10 : 10 + size] = c
    return labels


def case(labels: np.ndarray, name: str = "one", *, spacing: bool = True) -> Case:
    images = np.zeros(labels.shape, np.int16)
    images[:, 0, 0] = np.arange(len(labels))
    return Case(name, name, images, labels, "HU", (5.0, 2.0, 2.0) if spacing else None)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return dataclasses.replace(open_bundle(), view=View(3))


def scored(truth: np.ndarray, answer: np.ndarray, bundle: Bundle, **how: object) -> evaluate.Scored:
    one = case(truth, **how)
    return evaluate.score(one, one.images, bundle, Oracle(answer))


def test_right_answers_score_one(bundle: Bundle):
    truths = [blocks(size, 5) for size in (4, 6, 8, 10)]
    cases = [scored(truth, truth, bundle, name=str(i)) for i, truth in enumerate(truths)]
    summary = evaluate.summarise(cases, bundle, Oracle(truths[0]), "blocks")
    one = summary["classes"][CLASSES[1]]
    assert (one["cases"], one["dice"], one["iou"], one["precision"], one["recall"]) == (4, 1, 1, 1, 1)
    assert one["dice_of_cases"] == {"estimate": 1, "low": 1, "high": 1}
    assert (one["hausdorff_95_mm"], one["volume_icc"]["estimate"], one["within_10_percent_or_1.5_ml"]) == (0, 1, 1)
    assert one["abc_icc"]["estimate"] == 1, "half the product of a square's diagonals is its area"
    assert summary["classes"][CLASSES[3]]["cases"] == 0
    assert summary["over_classes"]["dice"]["global_macro"] == 1
    assert summary["bleed_free"]["cases"] == 0


def test_volumes_are_those_of_the_geometry(bundle: Bundle):
    one = scored(blocks(10), blocks(5), bundle)
    assert one.truth_ml[1] == pytest.approx(4 * 100 * 20 / 1000)
    assert one.measured_ml[1] == pytest.approx(4 * 25 * 20 / 1000)
    assert one.dice[1] == pytest.approx(2 * 25 / 125)
    assert [match.covered for match in one.lesions[1]] == [pytest.approx(0.25)]


def test_wrong_blood_in_a_clean_head_is_a_false_finding(bundle: Bundle):
    summary = evaluate.summarise(
        [scored(blocks(), blocks(0, 6), bundle, name="a"), scored(blocks(), blocks(), bundle, name="b")],
        bundle,
        Oracle(blocks()),
        "blocks",
    )
    clean = summary["bleed_free"]
    assert (clean["cases"], clean["without_findings"], clean["specificity"]) == (2, 1, 0.5)
    assert clean["false_parts_per_case"]["estimate"] == 0.5
    assert clean["largest_false_volume_ml"] == pytest.approx(4 * 36 * 20 / 1000)
    assert summary["classes"][CLASSES[2]]["false_findings"] == 1


def test_pictures_have_no_millilitres(bundle: Bundle):
    cases = [scored(blocks(8), blocks(6), bundle, name=str(i), spacing=False) for i in range(3)]
    summary = evaluate.summarise(cases, bundle, Oracle(blocks(6)), "pictures")
    one = summary["classes"][CLASSES[1]]
    assert one["dice"] == pytest.approx(2 * 36 / 100)
    assert "volume_icc" not in one
    assert one["hausdorff_95_mm"] is None
    assert "lesions found by size" not in card.of_bundle(summary, bundle)
    clean = [scored(blocks(), blocks(4), bundle, name="clean", spacing=False)]
    summary = evaluate.summarise([*cases, *clean], bundle, Oracle(blocks(6)), "pictures")
    assert (summary["bleed_free"]["specificity"], one["false_findings"]) == (0, 0)
    assert summary["classes"][CLASSES[1]]["false_findings"] == 1, "any pixel of it"
    unknown = (summary["bleed_free"]["false_parts_per_case"], summary["bleed_free"]["largest_false_volume_ml"])
    assert unknown == (None, None), "not none, as if the clean picture were clean"
    assert "false parts" not in card.of_bundle(summary, bundle)


def test_everything_is_written_and_what_the_split_takes_for_the_patient_is_not(bundle: Bundle, tmp_path: Path):
    cases = [scored(blocks(size, 5), blocks(6, 5), bundle, name=f"case-{size}") for size in (4, 6, 8)]
    cases = [dataclasses.replace(one, patient="DOE^JANE") for one in cases]
    summary = evaluate.summarise(cases, bundle, Oracle(blocks()), "blocks")
    assert summary["patients"] == 1
    evaluate.write(cases, summary, bundle, tmp_path)
    assert json.loads((tmp_path / "scores.json").read_text()) == summary
    rows = list(csv.DictReader((tmp_path / "cases.csv").read_text().splitlines()))
    assert [(row["name"], row["class"]) for row in rows][:2] == [("case-4", CLASSES[1]), ("case-4", CLASSES[2])]
    assert float(rows[0]["dice"]) == pytest.approx(2 * 16 / 52, abs=1e-4)
    pictures = sorted(path.name for path in tmp_path.rglob("*.png"))
    assert pictures == [
        "01-case-1.png",
        "02-case-3.png",
        "03-case-2.png",
        "calibration.png",
        "dice.png",
        f"{CLASSES[1]}.png",
        f"{CLASSES[2]}.png",
    ]
    for path in tmp_path.rglob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 300
    words = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    words.append(card.of_bundle(summary, bundle).encode())
    assert not any(b"DOE" in text for text in words)


def test_distances_follow_a_step_that_changes_and_a_tilt(bundle: Bundle):
    """Truth on slice 3, answer on slice 5: 4 + 7 mm apart, and shifted by the tilt."""
    truth, answer = (np.zeros((10, SIDE, SIDE), np.uint8) for _ in range(2))
    truth[3, 20:30, 20:30] = answer[5, 20:30, 20:30] = 1
    along = np.array([0, 4, 8, 12, 16, 23, 30, 37, 44, 51.0])
    one = dataclasses.replace(case(truth), origin_mm=np.stack([along, 0.4 * along, 0 * along], axis=1))
    scored = evaluate.score(one, one.images, bundle, Oracle(answer))
    # 11 mm along the normal and 4.4 mm down the rows: so far the outermost row has to go
    assert scored.hausdorff_mm[1] == pytest.approx(np.hypot(11, 4.4), abs=0.01)
    assert scored.hausdorff_95_mm[1] == pytest.approx(np.hypot(11, 4.4), abs=0.01)
    even = evaluate.score(case(truth), one.images, bundle, Oracle(answer))
    assert even.hausdorff_mm[1] == pytest.approx(10), "two steps of 5 mm"


def test_what_a_source_leaves_out_is_told(bundle: Bundle):
    one = dataclasses.replace(case(blocks(6)), excluded=(("no mask", 3),), notes=("a step of 9.00 mm",))
    cases = [evaluate.score(one, one.images, bundle, Oracle(blocks(6)))] * 2
    summary = evaluate.summarise(cases, bundle, Oracle(blocks(6)), "blocks")
    assert summary["slices_left_out"] == {"no mask": 6}
    assert "Left out: 6 slices: no mask. 2 cases: a step of 9.00 mm." in card.of_bundle(summary, bundle)


def test_phantoms_do_not_score_a_model_of_other_classes():
    check_classes(open_bundle().classes)
    with pytest.raises(PhantomError, match="the model has subdural: use data"):
        check_classes(("background", "subdural"))


def test_a_phantom_is_a_case_in_the_order_of_its_stack():
    phantom = make((Lesion("epidural", 10.0),), Scan((4.0, 7.0), tilt_deg=10, matrix=128), seed=3)
    one = as_case(phantom)
    assert one.thickness_mm.min() == pytest.approx(4 * np.cos(np.radians(10)), abs=0.02)
    ml = one.voxel_ml @ (one.labels == CLASSES.index("epidural")).sum(axis=(1, 2))
    assert ml == pytest.approx(10, rel=0.01)
