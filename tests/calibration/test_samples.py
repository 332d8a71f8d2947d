"""Choosing what to measure on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from calibration.samples import SampleError, Series, choose, read_arrays, strata
from runtime.geometry import View
from runtime.types import Plane, Slice, SliceLabels

CLASSES = ("background", "subdural", "contusion")


class Thresholds:
    """Stands for a network: 60 HU is subdural, 70 HU a contusion."""

    def infer(self, hu: np.ndarray) -> list[SliceLabels]:
        made = []
        for one in hu[:, hu.shape[1] // 2]:
            labels = ((one == 60) + 2 * (one == 70)).astype(np.uint8)
            voxels = np.bincount(labels.ravel(), minlength=3)
            made.append(SliceLabels(labels, voxels, np.zeros(3, np.float32)))
        return made


def series(name: str, blood: dict[int, tuple[int, int]], scanner: str = "", slices: int = 12) -> Series:
    """Slices of 64 x 64 pixels of 1 mm, 5 mm thick; `blood` by slice: HU and pixels of it. Each pixel is 0.005 ml."""
    hu = np.full((slices, 64, 64), -1000, np.int16)
    hu[4:, 10:50, 10:50] = 30
    hu[-2:, 0:20, 0:20] = 900
    for place, (value, pixels) in blood.items():
        hu[place, 12:50, 12:50].flat[:0] = 0
        rows = hu[place, 12:50, 12:50].reshape(-1).copy()
        rows[:pixels] = value
        hu[place, 12:50, 12:50] = rows.reshape(38, 38)
    hu[:, -1, -1] = len(name) + sum(map(ord, name))  # no two alike
    return Series.of(name, hu, (1.0, 1.0), np.full(slices, 5.0), scanner)


def test_slices_stand_for_classes_by_size_for_what_they_show_and_for_the_scanner():
    one = series("a", {5: (60, 100), 6: (60, 100), 7: (70, 700)}, "Maker X")
    told = strata(one, one.answered(Thresholds(), View()), CLASSES)
    assert told[0] == ("no blood", "air", "scanner Maker X")
    assert told[5] == ("subdural < 2 ml", "brain", "scanner Maker X")
    assert told[7] == ("contusion < 15 ml", "brain", "scanner Maker X")
    assert told[-1] == ("no blood", "bone", "scanner Maker X")


def test_rare_strata_are_taken_before_common_ones():
    many = [series(f"plain {i}", {}, "Maker X") for i in range(8)]
    rare = series("rare", {5: (60, 50), 7: (70, 900)}, "Maker Y")
    taken = choose([*many, rare], Thresholds(), View(), CLASSES, 12)
    had = Counter(kind for sample in taken for kind in sample.strata)
    assert len(taken) == 12
    assert {
        "subdural < 2 ml",
        "contusion < 15 ml",
        "scanner Maker X",
        "scanner Maker Y",
        "air",
        "bone",
        "brain",
    } <= set(had)
    assert had["bone"] >= 2, "by chance there would be two in twelve"


def test_the_choice_does_not_depend_on_the_order_of_the_files():
    some = [series(name, {6: (60, 200 * (i + 1))}) for i, name in enumerate("abcd")]
    first, second = (choose(order, Thresholds(), View(3), CLASSES, 10) for order in (some, some[::-1]))
    assert [sample.sha256 for sample in first] == [sample.sha256 for sample in second]
    assert {sample.hu.shape for sample in first} == {(3, 64, 64)}


def test_there_may_be_fewer_slices_than_asked_for():
    assert len(choose([series("a", {})], Thresholds(), View(), CLASSES, 100)) == 12


def test_a_series_of_planes_is_ordered_and_keeps_its_own_thickness():
    def plane(z: float, thick: float) -> Plane:
        return Plane((0.0, 0.0, z), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.5, 0.5), thick)

    flat = [np.full((8, 8), i, np.int16) for i in range(3)]
    slices = [
        Slice("top", plane(11.0, 7.0), flat[2]),
        Slice("low", plane(0.0, 4.0), flat[0]),
        Slice("mid", plane(4.0, 4.0), flat[1]),
    ]
    made = Series.stacked("x", slices)
    assert made.hu[:, 0, 0].tolist() == [0, 1, 2]
    assert made.stack.keys == ("0", "1", "2")
    assert made.stack.thickness_mm[0] == pytest.approx(4.0)
    slices[1] = Slice("low", plane(0.0, 4.0), np.zeros((9, 8), np.int16))
    with pytest.raises(SampleError, match="x: slices of different sizes"):
        Series.stacked("x", slices)


def test_arrays_are_a_series(tmp_path: Path):
    hu = series("a", {}).hu
    np.savez(tmp_path / "a.npz", hu=hu, spacing_mm=0.5, thickness_mm=5.0)
    read = read_arrays(tmp_path / "a.npz")
    assert (read.hu == hu).all()
    assert read.stack.voxel_ml == pytest.approx(0.5 * 0.5 * 5 / 1000)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"hu": np.zeros((2, 4, 4), np.int16)}, "no .npz with hu"),
        ({"hu": np.zeros((2, 4, 4), np.float32), "spacing_mm": 1, "thickness_mm": 1}, "int16 HU"),
        ({"hu": np.zeros((4, 4), np.int16), "spacing_mm": 1, "thickness_mm": 1}, "int16 HU"),
        ({"hu": np.zeros((2, 4, 4), np.int16), "spacing_mm": -1, "thickness_mm": [1, 0]}, "not all above zero"),
        ({"hu": np.zeros((2, 4, 4), np.int16), "spacing_mm": [1, 1, 1], "thickness_mm": 1}, "do not fit the slices"),
        ({"hu": np.zeros((2, 4, 4), np.int16), "spacing_mm": 1, "thickness_mm": [1, 2, 3]}, "do not fit the slices"),
    ],
)
def test_arrays_that_are_no_series_are_refused_by_name(tmp_path: Path, arrays: dict[str, object], message: str):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(SampleError, match=message):
        read_arrays(tmp_path / "bad.npz")


def test_a_file_that_is_no_archive_is_refused_by_name(tmp_path: Path):
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(SampleError, match="bad.npz: no .npz"):
        read_arrays(tmp_path / "bad.npz")
