"""Cases: read-only, checked, pickled, and without their patient where it could be seen."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from runtime.errors import ScansideError
from training.sources.case import Case
from training.sources.errors import LeakError, SourceError

HU = np.zeros((2, 3, 4), np.int16)
LABELS = np.zeros((2, 3, 4), np.uint8)


def test_arrays_are_read_only_and_the_patient_is_not_shown():
    case = Case("SECRET", "a", HU.copy(), LABELS.copy(), "HU", (5.0, 0.5, 0.4), np.array([5.0, 7.0]))
    for array in (case.images, case.labels, case.thickness_mm):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 1
    assert "SECRET" not in repr(case)


def test_a_voxel_has_its_own_slices_thickness():
    case = Case("p", "a", HU.copy(), LABELS.copy(), "HU", (5.0, 0.5, 0.4), np.array([5.0, 7.0]))
    assert case.voxel_ml == pytest.approx([5 * 0.5 * 0.4 / 1000, 7 * 0.5 * 0.4 / 1000])
    even = Case("p", "a", HU.copy(), LABELS.copy(), "HU", (5.0, 0.5, 0.4))
    assert even.voxel_ml == pytest.approx([0.001, 0.001])
    assert Case("p", "a", HU.copy(), LABELS.copy(), "HU").voxel_ml is None


@pytest.mark.parametrize(
    ("images", "labels", "quantity", "thickness"),
    [
        (HU.astype(np.int32), LABELS, "HU", None),
        (HU.astype(np.uint8), LABELS, "HU", None),
        (HU.astype(np.float32), LABELS, "grey", None),
        (HU, LABELS.astype(np.int64), "HU", None),
        (HU, LABELS[:1], "HU", None),
        (HU[0], LABELS[0], "HU", None),
        (HU, LABELS, "HU", np.ones(3)),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(images, labels, quantity, thickness):
    with pytest.raises(TypeError):
        Case("p", "a", images.copy(), labels.copy(), quantity, (1.0, 1.0, 1.0), thickness)


def test_errors_name_file_reason_and_remedy_and_survive_a_process_boundary():
    error = pickle.loads(pickle.dumps(SourceError(Path("a/b.png"), "is blue", "paint it")))
    assert str(error) == f"{Path('a/b.png')}: is blue: paint it"
    assert (error.reason, error.remedy, error.exit_code) == ("is blue", "paint it", 2)
    assert isinstance(error, ScansideError)
    assert LeakError("x").exit_code == 1
