"""Augmentation: slices, neighbours and labels moved alike."""

from __future__ import annotations

import numpy as np
import torch

from training.augmentation import augment
from training.recipe import Augmentation

STILL = {"flip": False, "turn_deg": 0, "zoom": 0, "shift": 0, "offset_hu": 0, "gain": 0}


def slices(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two slices of three, 48 x 64, each with a block of label 1 that is 100 HU in all three."""
    hu, labels = rng.integers(-20, 20, (2, 3, 48, 64)).astype(np.int16), np.zeros((2, 48, 64), np.uint8)
    hu[:, :, 10:20, 8:24] += 100
    labels[:, 10:20, 8:24] = 1
    return hu, labels


def test_nothing_asked_for_changes_nothing():
    hu, labels = slices(np.random.default_rng(1))
    moved, same = augment(hu, labels, Augmentation(**STILL), np.random.default_rng(2))
    torch.testing.assert_close(moved, torch.from_numpy(hu).float(), atol=0.05, rtol=0)
    assert (same.numpy() == labels).all()


def test_neighbours_and_labels_move_with_their_slice():
    hu, labels = slices(np.random.default_rng(1))
    how = Augmentation(turn_deg=20, zoom=0.1, shift=0.05, offset_hu=0, gain=0)
    moved, there = augment(hu, labels, how, np.random.default_rng(4))
    assert (there.numpy() != labels).any()
    for neighbour in range(3):
        bright = (moved[:, neighbour] > 50).numpy()
        agree = (bright == there.numpy()).mean()
        assert agree > 0.98, "all but the pixels at the edge"


def test_a_turn_is_a_turn_by_that_angle():
    """A quarter turn of a square: as numpy's rot90, one way or the other."""
    hu = np.random.default_rng(0).integers(0, 100, (1, 1, 32, 32)).astype(np.int16)
    how = Augmentation(**STILL | {"turn_deg": 90})

    class Always:
        def uniform(self, low: float, high: float, shape: object) -> np.ndarray:  # noqa: ARG002
            return np.full(shape, high)

    moved, _ = augment(hu, np.zeros((1, 32, 32), np.uint8), how, Always())
    turned = [np.rot90(hu[0, 0], k) for k in (1, 3)]
    assert any(np.allclose(moved[0, 0].numpy(), one, atol=0.05) for one in turned)


def test_calibration_changes_the_values_alone():
    hu, labels = slices(np.random.default_rng(1))
    moved, same = augment(hu, labels, Augmentation(**STILL | {"offset_hu": 5, "gain": 0.1}), np.random.default_rng(3))
    assert (same.numpy() == labels).all()
    slope, offset = np.polyfit(hu[0].ravel(), moved[0].numpy().ravel(), 1)
    assert 0.9 <= slope <= 1.1
    assert -5 <= offset <= 5
    assert (slope, offset) != (1, 0)
