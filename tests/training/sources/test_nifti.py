"""NIfTI pairs: canonical order from any order of axes, spacing along the normal, and every refusal."""

from __future__ import annotations

import itertools
import pickle

import nibabel
import numpy as np
import pytest

from training.sources import nifti
from training.sources.errors import SourceError

CLASSES = {1: 1, 3: 2}
PATIENT = r"^(?P<patient>s\d+)"
N, H, W = 4, 6, 5
SPACING_MM = (5.0, 0.5, 0.4)
HU = np.random.default_rng(2).integers(-1000, 2000, (N, H, W)).astype(np.int16)  # canonical: slice, row, column
MASK = np.random.default_rng(4).choice(np.array([0, 0, 1, 3], np.uint8), (N, H, W))


def affine_ras(tilt_deg=0.0):
    """Of column, row, slice: to the left, the posterior, the superior; under tilt the rows lean, the table not."""
    tilt = np.radians(tilt_deg)
    affine = np.eye(4)
    affine[:3, 0] = (-0.4, 0, 0)
    affine[:3, 1] = np.array((0, -np.cos(tilt), np.sin(tilt))) * 0.5
    affine[:3, 2] = (0, 0, 5)
    affine[:3, 3] = (31.0, -22.5, 7.25)
    return affine


def save(path, canonical, axes=(0, 1, 2), flips=(0, 0, 0), affine=None, kind=nibabel.Nifti1Image):
    """Write a canonical volume with its file's axes in another order and direction."""
    values = canonical.transpose(2, 1, 0)  # column, row, slice
    change = np.eye(4)[:, [*axes, 3]]
    for axis, flip in enumerate(flips):
        if flip:
            step = np.eye(4)
            step[axis, axis], step[axis, 3] = -1, values.shape[axes[axis]] - 1
            change = change @ step
    values = np.flip(values.transpose(axes), [axis for axis, flip in enumerate(flips) if flip])
    path.parent.mkdir(exist_ok=True)
    nibabel.save(kind(values, (affine_ras() if affine is None else affine) @ change), path)


@pytest.fixture
def folders(tmp_path):
    save(tmp_path / "images/s1.nii.gz", HU)
    save(tmp_path / "masks/s1.nii.gz", MASK)
    return tmp_path / "images", tmp_path / "masks"


def only(folders, **options):
    (entry,) = nifti.entries(*folders, **{"quantity": "HU", "classes": CLASSES, "patient": PATIENT, **options})
    return pickle.loads(pickle.dumps(entry)).load()


@pytest.mark.parametrize("flips", list(itertools.product((0, 1), repeat=3)))
@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_any_order_of_axes_becomes_canonical(folders, axes, flips):
    save(folders[0] / "s1.nii.gz", HU, axes, flips)
    save(folders[1] / "s1.nii.gz", MASK, (0, 1, 2), flips[::-1])  # the mask in an order of its own
    case = only(folders)
    assert np.array_equal(case.images, HU)
    assert np.array_equal(case.labels, np.where(MASK == 3, 2, MASK))
    assert case.spacing_mm == pytest.approx(SPACING_MM)
    assert (case.patient, case.name, case.quantity) == ("s1", "s1", "HU")


def test_slices_go_to_the_superior_rows_to_the_posterior_columns_to_the_left(folders):
    volume = nifti.canonical(*nifti.read(folders[0] / "s1.nii.gz", None), folders[0])
    steps = np.sign(np.round(volume.affine_ras[:3, :3], 6))
    assert steps.T.tolist() == [[0, 0, 1], [0, -1, 0], [-1, 0, 0]]  # slice, row, column in RAS


@pytest.mark.parametrize("tilt_deg", [20.0, -12.0])
def test_under_tilt_slices_are_nearer_than_the_tables_step(folders, tilt_deg):
    for folder, values in zip(folders, (HU, MASK), strict=True):
        save(folder / "s1.nii.gz", values, affine=affine_ras(tilt_deg))
    case = only(folders)
    apart_mm = 5 * np.cos(np.radians(tilt_deg))
    assert case.spacing_mm == pytest.approx((apart_mm, 0.5, 0.4))
    assert case.thickness_mm == pytest.approx([apart_mm] * N)
    measured = float((case.labels == 1).sum(axis=(1, 2)) @ case.voxel_ml)
    assert measured == pytest.approx((MASK == 1).sum() * apart_mm * 0.5 * 0.4 / 1000)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_hounsfield_units_of_any_type_are_rounded_to_int16(folders, dtype):
    values = (HU % 200).astype(dtype)
    save(folders[0] / "s1.nii.gz", values + np.asarray(0.4, dtype))
    assert np.array_equal(only(folders).images, HU % 200)


def test_fractions_are_rounded_to_the_nearest(folders):
    save(folders[0] / "s1.nii.gz", HU + np.float32(0.6))
    assert np.array_equal(only(folders).images, HU + 1)


def test_a_files_own_scaling_is_applied_and_masks_are_still_whole(folders):
    image = nibabel.Nifti1Image(HU.transpose(2, 1, 0), affine_ras())
    image.header.set_slope_inter(2.0, -7.0)
    nibabel.save(image, folders[0] / "s1.nii.gz")
    mask = nibabel.Nifti1Image((MASK * 85).transpose(2, 1, 0), affine_ras())
    mask.header.set_slope_inter(1 / 85, 0)
    nibabel.save(mask, folders[1] / "s1.nii.gz")
    case = only(folders)
    assert np.array_equal(case.images, HU.astype(int) * 2 - 7)
    assert np.array_equal(case.labels, np.where(MASK == 3, 2, MASK))


def test_mri_keeps_whole_values_and_stretches_others(folders):
    assert np.array_equal(only(folders, quantity="grey").images, HU)
    save(folders[0] / "s1.nii.gz", (HU % 256).astype(np.uint8))
    assert only(folders, quantity="grey").images.dtype == np.uint8
    unit = (HU - HU.min()) / np.ptp(HU.astype(float))
    save(folders[0] / "s1.nii.gz", unit.astype(np.float32))
    case = only(folders, quantity="grey")
    assert case.quantity == "grey"
    assert np.abs(case.images - unit * 32767).max() <= 0.51
    assert case.notes == ("grey values stretched from 0 to 1 over 0 to 32,767",)


def test_a_single_slice_may_have_two_axes(folders):
    for folder, values in zip(folders, (HU, MASK), strict=True):
        nibabel.save(nibabel.Nifti1Image(values[0].T, affine_ras()), folder / "s1.nii.gz")
    case = only(folders)
    assert np.array_equal(case.images, HU[:1])
    assert np.array_equal(case.labels, np.where(MASK == 3, 2, MASK)[:1])


def test_plain_files_nifti_2_and_masks_beside_images(tmp_path):
    save(tmp_path / "all/s1_ct.nii", HU, kind=nibabel.Nifti2Image)
    save(tmp_path / "all/s1_ct_seg.nii.gz", MASK)
    case = only((tmp_path / "all", tmp_path / "all"), mask_suffix="_seg")
    assert (case.name, case.labels.any()) == ("s1_ct", True)
    assert np.array_equal(case.images, HU)


def unoriented(path, values):
    image = nibabel.Nifti1Image(values.transpose(2, 1, 0)[:, ::-1], None)
    image.header.set_zooms((0.4, 0.5, 5.0))
    image.header["sform_code"] = image.header["qform_code"] = 0
    nibabel.save(image, path)


def test_directions_are_assumed_only_if_the_caller_says_so(folders):
    for folder, values in zip(folders, (HU, MASK), strict=True):
        unoriented(folder / "s1.nii.gz", values)
    with pytest.raises(SourceError, match="left and right are not known"):
        only(folders)
    case = only(folders, assume="LAS")
    assert np.array_equal(case.images, HU)
    assert np.array_equal(case.labels, np.where(MASK == 3, 2, MASK))
    assert case.spacing_mm == pytest.approx(SPACING_MM)
    for wrong in ("LA", "LAX", "LRS", "las"):
        with pytest.raises(SourceError, match="are no three directions"):
            only(folders, assume=wrong)


def moved(mm):
    affine = affine_ras()
    affine[1, 3] += mm
    return affine


def test_a_mask_must_lie_where_its_image_does_unless_paired_by_index(folders):
    save(folders[1] / "s1.nii.gz", MASK, affine=moved(0.09))
    assert np.array_equal(only(folders).labels, np.where(MASK == 3, 2, MASK))
    save(folders[1] / "s1.nii.gz", MASK, affine=moved(0.11))
    with pytest.raises(SourceError, match=r"lies 0\.11 mm from its image .allowed: 0\.1 mm"):
        only(folders)
    nibabel.save(nibabel.Nifti1Image(MASK.transpose(2, 1, 0), np.eye(4)), folders[1] / "s1.nii.gz")
    assert np.array_equal(only(folders, pair_by="index").labels, np.where(MASK == 3, 2, MASK))
    save(folders[1] / "s1.nii.gz", MASK[:2])
    with pytest.raises(SourceError, match=r"shape \(5, 6, 2\) beside an image of \(5, 6, 4\)"):
        only(folders, pair_by="index")


def cut(path):
    path.write_bytes(path.read_bytes()[:-60])


def plain(at):
    save(at / "images/s1.nii", HU)
    (at / "images/s1.nii.gz").unlink()


def in_metres(path):
    image = nibabel.Nifti1Image(HU, affine_ras())
    image.header.set_xyzt_units("meter")
    nibabel.save(image, path)


def skewed(path):
    affine = affine_ras()
    affine[0, 1] = 0.02
    save(path, HU, affine=affine)


def flat(path):
    image = nibabel.Nifti1Image(HU, None)
    image.header["sform_code"] = 1
    image.header["srow_x"] = image.header["srow_y"] = (1, 0, 0, 0)
    nibabel.save(image, path)


BROKEN = {
    "cut": (lambda at: cut(at / "images/s1.nii.gz"), "s1.nii.gz: no NIfTI volume, or truncated"),
    "cut, plain": (lambda at: (plain(at), cut(at / "images/s1.nii")), "s1.nii: no NIfTI volume, or truncated"),
    "cut mask": (lambda at: cut(at / "masks/s1.nii.gz"), "no NIfTI volume, or truncated"),
    "text": (lambda at: (at / "images/s1.nii.gz").write_text("no volume"), "no NIfTI volume"),
    "empty": (lambda at: (at / "images/s1.nii.gz").write_bytes(b""), "no NIfTI volume"),
    "another type": (lambda at: (at / "images/s1.mgz").write_bytes(b""), "s1.mgz: not one of .nii, .nii.gz"),
    "no mask": (lambda at: save(at / "images/s2.nii", HU), "s2.nii: image without mask"),
    "no image": (lambda at: save(at / "masks/s2.nii", MASK), "s2.nii: mask without image"),
    "one stem": (lambda at: save(at / "images/s1.nii", HU), "the same stem as s1.nii"),
    "no files": (lambda at: (at / "images/s1.nii.gz").unlink(), "empty folder"),
    "shape": (lambda at: save(at / "masks/s1.nii.gz", MASK[1:]), r"shape \(3, 6, 5\) beside an image of \(4, 6, 5\)"),
    "four axes": (
        lambda at: nibabel.save(nibabel.Nifti1Image(np.stack([HU, HU], -1), affine_ras()), at / "images/s1.nii.gz"),
        r"values of shape \(4, 6, 5, 2\)",
    ),
    "metres": (lambda at: in_metres(at / "images/s1.nii.gz"), "lengths in meter"),
    "skewed": (lambda at: skewed(at / "images/s1.nii.gz"), "not at right angles"),
    "flat": (lambda at: flat(at / "images/s1.nii.gz"), "an affine that spans no space"),
    "not a number": (
        lambda at: save(at / "images/s1.nii.gz", np.where(HU > 0, HU, np.nan).astype(np.float32)),
        "values that are no numbers",
    ),
    "unknown value": (lambda at: save(at / "masks/s1.nii.gz", MASK * 2), "unknown class 2 .known: 1, 3"),
    "resampled": (
        lambda at: save(at / "masks/s1.nii.gz", (MASK * 0.5).astype(np.float32)),
        "mask values are no whole numbers",
    ),
    "nan mask": (
        lambda at: save(at / "masks/s1.nii.gz", np.full((N, H, W), np.nan, np.float32)),
        "mask values are no whole numbers",
    ),
    "no patient": (
        lambda at: [(at / folder / "s1.nii.gz").rename(at / folder / "x.nii.gz") for folder in ("images", "masks")],
        "finds no patient in 'x'",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_volumes_are_refused_by_name(folders, kind):
    spoil, message = BROKEN[kind]
    spoil(folders[0].parent)
    with pytest.raises(SourceError, match=message) as raised:
        only(folders)
    assert str(folders[0].parent) in str(raised.value)
