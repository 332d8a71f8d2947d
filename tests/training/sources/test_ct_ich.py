"""CT-ICH's layout: binary masks get their class from the table, and what it leaves open is left out and counted."""

from __future__ import annotations

import pickle

import nibabel
import numpy as np
import pytest

from training.sources import ct_ich
from training.sources.errors import SourceError

CLASSES = {"Intraventricular": 5, "Intraparenchymal": 1, "Subarachnoid": 4, "Epidural": 3, "Subdural": 2}
ONE_CLASS = dict.fromkeys(CLASSES, 1)
HEADER = (
    "PatientNumber,SliceNumber,Intraventricular,Intraparenchymal,Subarachnoid,Epidural,Subdural,"
    "No_Hemorrhage,Fracture_Yes_No"
)
N, H, W = 8, 6, 5
HU = np.random.default_rng(2).integers(-1000, 2000, (N, H, W)).astype(np.int16)  # as the file's third axis counts
BLOOD = np.zeros((N, H, W), bool)
BLOOD[1:6, 2:4, 1:3] = True
# types of each slice, and whether the table says that there is none
TABLE = {
    1: ("", 1),
    2: ("Epidural", 0),
    3: ("Epidural Subdural", 0),  # several
    4: ("", 1),  # a mask without a type
    5: ("Subdural", 1),  # contradicts itself
    # slice 6 has no row
    7: ("Intraventricular", 0),  # a type without a mask
    8: ("", 1),
}


def rows(table, patient="49"):
    return [
        ",".join(
            [patient, str(number), *("1" if name in types.split() else "0" for name in ct_ich.TYPES), str(none), "0"]
        )
        for number, (types, none) in table.items()
    ]


def write(root, table=TABLE, *, to_inferior=False, mask_values=255, header=HEADER, more=()):
    """The data set with one patient; rows in the file go to the anterior, as its own do."""
    affine = np.diag([-0.4, 0.5, -5.0 if to_inferior else 5.0, 1])
    for folder, values in (("ct_scans", HU), ("masks", (BLOOD * mask_values).astype(np.uint8))):
        (root / folder).mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(values.transpose(2, 1, 0)[:, ::-1], affine), root / folder / "049.nii")
    (root / ct_ich.TABLE).write_text("\n".join([header, *rows(table), *more]) + "\n")
    return root


def only(root, **options):
    (entry,) = ct_ich.entries(root, **{"classes": CLASSES, **options})
    return pickle.loads(pickle.dumps(entry)).load()


@pytest.mark.parametrize("to_inferior", [False, True])
def test_slices_with_one_type_get_its_class_and_open_ones_are_left_out_and_counted(tmp_path, to_inferior):
    case = only(write(tmp_path, to_inferior=to_inferior))
    kept = [0, 1, 7][:: -1 if to_inferior else 1]  # slices as the file counts them, to the superior
    assert np.array_equal(case.images, HU[kept])
    classes = np.array([0, 3, 0, 0, 0, 0, 0, 0], np.uint8)
    assert np.array_equal(case.labels, (BLOOD * classes[:, None, None])[kept])
    assert dict(case.excluded) == {
        ct_ich.SEVERAL: 1,
        ct_ich.UNTYPED: 1,
        ct_ich.CONTRADICTED: 1,
        ct_ich.UNLISTED: 1,
        ct_ich.UNMASKED: 1,
    }
    assert (case.patient, case.quantity) == ("049", "HU")
    assert case.spacing_mm == pytest.approx((5.0, 0.5, 0.4))
    assert case.thickness_mm == pytest.approx([5.0] * 3)


def test_several_types_of_one_class_are_not_ambiguous(tmp_path):
    case = only(write(tmp_path), classes=ONE_CLASS)
    assert np.array_equal(case.labels, BLOOD[[0, 1, 2, 7]])
    assert ct_ich.SEVERAL not in dict(case.excluded)


def test_a_row_that_says_neither_contradicts_itself(tmp_path):
    case = only(write(tmp_path, {**TABLE, 1: ("", 0)}))
    assert dict(case.excluded)[ct_ich.CONTRADICTED] == 2


@pytest.mark.parametrize("value", [1, 255])
def test_a_mask_has_one_value_whatever_it_is(tmp_path, value):
    assert only(write(tmp_path, mask_values=value)).labels.max() == 3


def test_masks_that_scaling_left_not_whole_are_whole(tmp_path):
    write(tmp_path)
    mask = nibabel.Nifti1Image((BLOOD * np.float32(0.9999)).transpose(2, 1, 0)[:, ::-1], np.diag([-0.4, 0.5, 5.0, 1]))
    nibabel.save(mask, tmp_path / "masks/049.nii")
    assert only(tmp_path).labels.max() == 3


def test_blank_rows_spaces_decimals_and_other_patients_are_read_over(tmp_path):
    more = [",,,,,,,,", "", *rows({1: ("", 1)}, patient="77")]
    write(tmp_path, header="\ufeff" + HEADER.replace(",", " , "), more=more)
    text = (tmp_path / ct_ich.TABLE).read_text().replace("\n49,", "\n49.0,")
    (tmp_path / ct_ich.TABLE).write_text(text)
    assert len(only(tmp_path).images) == 3


def edit(root, old, new):
    path = root / ct_ich.TABLE
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def two_values(root):
    values = (BLOOD * 1 + (HU > 1900) * 2).astype(np.uint8).transpose(2, 1, 0)[:, ::-1]
    nibabel.save(nibabel.Nifti1Image(values, np.diag([-0.4, 0.5, 5.0, 1])), root / "masks/049.nii")


def sagittal(root):
    affine = np.array([[0, 0, 0.4, 0], [0.5, 0, 0, 0], [0, 5.0, 0, 0], [0, 0, 0, 1]])
    for folder in ("ct_scans", "masks"):
        nibabel.save(nibabel.Nifti1Image(np.zeros((W, H, N), np.uint8), affine), root / folder / "049.nii")


BROKEN = {
    "no table": (lambda at: (at / ct_ich.TABLE).unlink(), "no table"),
    "no text": (lambda at: (at / ct_ich.TABLE).write_bytes(b"\xff\xfe\x00"), "no table"),
    "empty table": (lambda at: (at / ct_ich.TABLE).write_text(""), "no column PatientNumber"),
    "no column": (lambda at: edit(at, "Epidural", "Extradural"), "no column Epidural"),
    "words": (lambda at: edit(at, "\n49,1,", "\n49,one,"), "line 2 is no row of whole numbers"),
    "nan": (lambda at: edit(at, "\n49,1,", "\n49,nan,"), "line 2 is no row of whole numbers"),
    "half": (lambda at: edit(at, "\n49,1,", "\n49,1.5,"), "line 2 is no row of whole numbers"),
    "short row": (lambda at: edit(at, "\n49,1,0,0,0,0,0,1,0", "\n49,1,0,0"), "line 2 is no row"),
    "row twice": (lambda at: edit(at, "\n49,2,", "\n49,1,"), "line 3: a second row of one slice"),
    "row beyond": (lambda at: edit(at, "\n49,8,", "\n49,9,"), "row of slice 9 of patient 49, whose volume has 8"),
    "other patients only": (lambda at: write(at, {}, more=rows(TABLE, "50")), "patient 49 has no row"),
    "name": (
        lambda at: [(at / folder / "049.nii").rename(at / folder / "a.nii") for folder in ("ct_scans", "masks")],
        "no patient's number",
    ),
    "no mask": (lambda at: (at / "masks/049.nii").rename(at / "masks/050.nii"), "050.nii: mask without image"),
    "no folder": (lambda at: (at / "masks").rename(at / "labels"), "masks: no such folder"),
    "two values": (two_values, "masks/049.nii: unknown class"),
    "sagittal": (sagittal, "its slices do not lie along its third axis"),
    "nothing left": (lambda at: write(at, {1: ("Subdural", 0)}), "no slice is left"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_sets_are_refused_by_name(tmp_path, kind):
    spoil, message = BROKEN[kind]
    spoil(write(tmp_path))
    with pytest.raises(SourceError, match=message):
        only(tmp_path)


def test_a_type_without_a_class_is_refused_if_a_slice_shows_it(tmp_path):
    known = {name: index for name, index in CLASSES.items() if name != "Epidural"}
    with pytest.raises(SourceError, match="unknown class 'Epidural'"):
        only(write(tmp_path), classes=known)
    table = {number: row for number, row in TABLE.items() if "Epidural" not in row[0]}
    assert len(only(write(tmp_path, table), classes=known).images) == 2
