"""DICOM series with SEG, RTSTRUCT and NIfTI masks: exact pixels and volumes, upright, tilted and uneven."""

from __future__ import annotations

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.uid import (
    JPEG2000Lossless,
    JPEGLSLossless,
    MRImageStorage,
    RLELossless,
)

from tests.training.sources import made
from tests.training.sources.made import (
    HOLE,
    NAMES,
    OUTLINE,
    TILTED,
    UNEVEN,
    UPRIGHT,
    change,
    load,
    truth,
    with_nifti,
    with_segmentation,
    with_structures,
)
from training.sources import dicom
from training.sources.errors import SourceError

GEOMETRIES = {"upright": UPRIGHT, "tilted": TILTED, "uneven and tilted": UNEVEN}


# series


@pytest.mark.parametrize("where", GEOMETRIES.values(), ids=GEOMETRIES)
def test_a_series_is_in_order_in_hounsfield_units_with_each_slices_thickness(tmp_path, where):
    hu, _ = with_segmentation(tmp_path, where)
    case = load(tmp_path)
    assert np.array_equal(case.images, hu)
    assert case.images.dtype == np.int16
    assert (case.quantity, case.patient, case.name) == ("HU", made.PATIENT, "ct")
    steps = np.diff([plane.origin_lps[2] for plane in where]) * where[0].column_lps[1]  # along the normal
    assert case.spacing_mm == pytest.approx((np.median(steps), 0.5, 0.4), rel=1e-5)
    # the 7 mm between slices of 4 and 7 mm are theirs as 4 to 7
    table = [4, 4, 2 + 28 / 11, 49 / 11 + 3.5, 7] if where is UNEVEN else [5] * 5
    assert case.thickness_mm == pytest.approx(np.array(table) * where[0].column_lps[1], rel=1e-5)


@pytest.mark.parametrize("where", GEOMETRIES.values(), ids=GEOMETRIES)
def test_a_segmentation_gives_its_pixels_to_the_slices_it_names(tmp_path, where):
    with_segmentation(tmp_path, where)
    case = load(tmp_path)
    assert np.array_equal(case.labels, np.array([0, 2, 3], np.uint8)[truth()])


def test_the_phantoms_volume_comes_back_through_dicom(tmp_path):
    """The scanner's geometry, HU and masks from file to case: millilitres within 1 % of the blood itself."""
    from dicom_node.simulation import phantom as writer
    from training.lesions import CLASSES, Lesion
    from training.phantom import Scan, make

    scan = Scan(slices=24, tilt_deg=20, matrix=128)
    phantom = make((Lesion("intracerebral", 30), Lesion("subdural", 15)), scan, seed=5)
    paths = writer.write(phantom.slices, tmp_path, tilt_deg=20)
    present = [CLASSES.index(name) for name in phantom.truth_ml]
    segments = np.zeros_like(phantom.labels)
    for number, index in enumerate(present, start=1):
        segments[phantom.labels == index] = number
    made.segmentation([dcmread(path) for path in paths], segments, list(phantom.truth_ml)).save_as(tmp_path / "seg.dcm")
    case = load(tmp_path, {name: CLASSES.index(name) for name in phantom.truth_ml})
    assert np.array_equal(case.labels, phantom.labels)
    assert np.array_equal(case.images, np.stack([one.hu for one in phantom.slices]))
    for name, ml in phantom.truth_ml.items():
        measured = float((case.labels == CLASSES.index(name)).sum(axis=(1, 2)) @ case.voxel_ml)
        assert measured == pytest.approx(ml, rel=0.01)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless], ids=lambda uid: uid.name)
def test_lossless_syntaxes_decode_to_the_same_values(tmp_path, syntax):
    hu = made.hounsfield(5, (64, 72))
    for path in made.write(made.series(UPRIGHT, hu), tmp_path):
        one = dcmread(path)
        one.compress(syntax, generate_instance_uid=False)
        one.save_as(path)
    assert np.array_equal(load(tmp_path, unmasked="negative").images, hu)


def test_the_rescale_is_applied_and_rounded(tmp_path):
    hu, _ = with_segmentation(tmp_path)
    for path in (tmp_path / "ct").iterdir():
        change(path, RescaleSlope="0.5", RescaleIntercept="-100.25")
    assert np.array_equal(load(tmp_path).images, np.rint((hu + 1024) * 0.5 - 100.25))


def test_an_mr_series_is_grey_and_as_stored(tmp_path):
    hu, _ = with_segmentation(tmp_path)
    for path in (tmp_path / "ct").iterdir():
        change(path, SOPClassUID=MRImageStorage, RescaleSlope=None, RescaleIntercept=None)
    case = load(tmp_path)
    assert case.quantity == "grey"
    assert np.array_equal(case.images, hu + 1024)


def test_series_are_told_apart_and_named_by_their_folders(tmp_path):
    for number, patient in enumerate(("A", "B", "B"), start=1):
        sources = made.series(UPRIGHT, made.hounsfield(5, seed=number), patient=patient, series=f"1.2.{number}")
        made.write(sources, tmp_path / ("one" if number == 1 else f"two/{number}"))
        made.segmentation(sources, truth(), list(NAMES)).save_as(tmp_path / f"{number}.dcm")
    found = dicom.entries(tmp_path, classes=NAMES)
    assert [(entry.patient, entry.name) for entry in found] == [("A", "one"), ("B", "two/2"), ("B", "two/3")]
    for number, entry in enumerate(found, start=1):
        assert np.array_equal(entry.load().images, made.hounsfield(5, seed=number))


def test_series_in_one_folder_get_numbers(tmp_path):
    for number in (1, 2):
        sources = made.series(UPRIGHT, made.hounsfield(5, seed=number), series=f"1.2.{number}")
        for i, one in enumerate(sources):
            one.save_as(tmp_path / f"{number}-{i}.dcm", enforce_file_format=True)
        made.segmentation(sources, truth(), list(NAMES)).save_as(tmp_path / f"seg{number}.dcm")
    names = [entry.name for entry in dicom.entries(tmp_path, classes=NAMES)]
    assert names == [f"{tmp_path.name}#1", f"{tmp_path.name}#2"]


def test_a_series_without_a_mask_is_what_the_caller_says(tmp_path):
    made.write(made.series(UPRIGHT, made.hounsfield(5)), tmp_path)
    with pytest.raises(SourceError, match="has no mask"):
        dicom.entries(tmp_path, classes=NAMES)
    assert dicom.entries(tmp_path, classes=NAMES, unmasked="skip") == ()
    assert not load(tmp_path, unmasked="negative").labels.any()


def test_gaps_repeats_and_loss_are_told(tmp_path):
    where = made.planes((5.0, 5.0, 5.0, 5.0, 15.0), thickness_mm=5.0)
    again = [*where, where[2]]
    sources = made.series(again, made.hounsfield(7))
    sources[3].LossyImageCompression = "01"
    made.write(sources, tmp_path)
    case = load(tmp_path, unmasked="negative")
    assert np.array_equal(case.images, made.hounsfield(7)[:6])
    assert case.excluded == (("lies where another slice lies", 1),)
    assert case.notes == ("a step of 15.00 mm: 2 slices may be missing", "1 slices were compressed with loss")


def test_other_objects_and_files_are_passed_over(tmp_path):
    with_segmentation(tmp_path)
    report = made.image(UPRIGHT[0], made.hounsfield(1)[0], 1, series="1.2.8")
    report.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.33"
    report.save_as(tmp_path / "sr.dcm", enforce_file_format=True)
    scout = made.image(UPRIGHT[0], made.hounsfield(1)[0], 1, series="1.2.7")
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    scout.save_as(tmp_path / "scout.dcm", enforce_file_format=True)
    for name in ("DICOMDIR", ".DS_Store", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert np.array_equal(load(tmp_path).images, made.hounsfield(5))


# segmentations


def test_fractions_count_from_half_on(tmp_path):
    fractions = truth().astype(np.float32)
    fractions[fractions > 0] = np.linspace(0.2, 0.8, int((fractions > 0).sum()))
    channels = np.stack([fractions * (truth() == label) for label in (1, 2)], axis=-1)
    with_segmentation(tmp_path, labels=channels, segmentation_type="FRACTIONAL", max_fractional_value=100)
    stored = np.rint(fractions * 100)
    assert np.array_equal(load(tmp_path).labels, np.array([0, 2, 3], np.uint8)[truth()] * (stored >= 50))


def test_a_label_map_is_its_segments(tmp_path):
    with_segmentation(tmp_path, labels=truth(), segmentation_type="LABELMAP")
    assert np.array_equal(load(tmp_path).labels, np.array([0, 2, 3], np.uint8)[truth()])


def test_where_segments_overlap_the_higher_class_is_seen(tmp_path):
    channels = np.zeros((5, *made.SHAPE, 2), np.uint8)
    channels[2, 2:8, 2:8, 0] = channels[2, 5:11, 5:11, 1] = 1
    for classes, top in ((NAMES, 3), ({"Subdural": 3, "Epidural": 2}, 3)):
        folder = tmp_path / str(classes["Subdural"])
        folder.mkdir()
        with_segmentation(folder, labels=channels)
        assert (load(folder, classes).labels[2, 5:8, 5:8] == top).all()


def test_a_segment_mapped_to_0_is_left_out(tmp_path):
    with_segmentation(tmp_path)
    assert np.array_equal(load(tmp_path, {"Subdural": 1, "Epidural": 0}).labels, truth() == 1)


def test_a_segmentation_may_name_only_its_slices(tmp_path):
    hu, path = with_segmentation(tmp_path)
    change(path, ReferencedSeriesSequence=None)
    other = made.series(UPRIGHT, made.hounsfield(5, seed=9), series="1.2.77")  # in the same frame of reference
    made.write(other, tmp_path / "other")
    (entry,) = dicom.entries(tmp_path, classes=NAMES, unmasked="skip")
    assert np.array_equal(entry.load().images, hu)


# structure sets


@pytest.mark.parametrize("referenced", [True, False], ids=["by reference", "by plane"])
@pytest.mark.parametrize("where", GEOMETRIES.values(), ids=GEOMETRIES)
def test_contours_fill_their_slices_in_their_own_planes(tmp_path, where, referenced):
    outlines = {
        "Subdural": [
            made.contour(where[i], shape, f"{made.SERIES}.{i + 1}" if referenced else None)
            for i in (1, 3)
            for shape in (OUTLINE, HOLE)
        ],
        "Epidural": [made.contour(where[3], [(3, 6), (3, 10), (6, 10), (6, 6)])],
    }
    with_structures(tmp_path, outlines, where)
    case = load(tmp_path)
    expected = np.zeros((5, *made.SHAPE), np.uint8)
    expected[[1, 3], 2:24, 3:11] = 2
    expected[[1, 3], 4:20, 5:8] = 0
    expected[3, 3:6, 6:10] = 3
    assert np.array_equal(case.labels, expected)
    mm2 = (22 * 8 - 16 * 3) * 0.5 * 0.4
    subdural_ml = float((case.labels[1] == 2).sum() * case.voxel_ml[1])
    assert subdural_ml == pytest.approx(mm2 * case.thickness_mm[1] / 1000)


def test_a_structure_set_may_name_only_the_frame_of_reference(tmp_path):
    with_structures(tmp_path, {"Subdural": [made.contour(UPRIGHT[1], OUTLINE)]}, series_uid=None)
    assert load(tmp_path).labels[1, 2:24, 3:11].all()


def test_structures_mapped_to_0_need_no_closed_contours(tmp_path):
    point = made.contour(UPRIGHT[1], OUTLINE)
    point.ContourGeometricType = "POINT"
    with_structures(tmp_path, {"Marker": [point], "Subdural": []})
    assert not load(tmp_path, {"Marker": 0, "Subdural": 1}).labels.any()


# NIfTI masks


def turned(values, affine, axes, flips):
    """The same mask with its axes in another order and direction."""
    change_of = np.eye(4)[:, [*axes, 3]]
    for axis, flip in enumerate(flips):
        if flip:
            step = np.eye(4)
            step[axis, axis], step[axis, 3] = -1, values.shape[axes[axis]] - 1
            change_of = change_of @ step
    moved = values.transpose(axes)
    return np.flip(moved, [axis for axis, flip in enumerate(flips) if flip]), affine @ change_of


@pytest.mark.parametrize("flips", [(0, 0, 0), (0, 1, 0), (1, 0, 1)])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("where", [UPRIGHT, TILTED], ids=["upright", "tilted"])
def test_a_nifti_mask_in_any_order_gives_its_voxels(tmp_path, where, axes, flips):
    values = truth().transpose(2, 1, 0).astype(np.int16)  # column, row, slice
    with_nifti(tmp_path, *turned(values, made.affine_ras(where), axes, flips), where)
    assert np.array_equal(load(tmp_path, {1: 2, 2: 3}).labels, np.array([0, 2, 3], np.uint8)[truth()])


def test_a_nifti_mask_may_lie_beside_its_folder(tmp_path):
    with_nifti(tmp_path, truth().transpose(2, 1, 0), made.affine_ras(UPRIGHT))
    (tmp_path / "ct/mask.nii.gz").rename(tmp_path / "ct.nii.gz")
    assert np.array_equal(load(tmp_path, {1: 1, 2: 2}).labels, truth())


def moved(mm):
    affine = made.affine_ras(UPRIGHT)
    affine[0, 3] += mm
    return affine


@pytest.mark.parametrize(
    ("affine", "message"),
    [
        (moved(0.09), None),
        (moved(0.15), r"its voxels lie up to 0\.15 mm from pixels .allowed: 0\.1 mm"),
        (moved(0.4), "its grid is not the series'"),
        (moved(-0.4), "its grid is not the series'"),
        (made.affine_ras(UPRIGHT) @ np.diag([2, 1, 1, 1]), "its grid is not the series'"),
        (np.diag([-1, -1, 1, 1]) @ made.affine_ras(UPRIGHT), "its grid is not the series'|its voxels lie"),
        (made.affine_ras(TILTED), "its voxels lie up to"),
    ],
    ids=["within", "beyond", "a pixel off", "a pixel off to the other side", "coarser", "LPS for RAS", "another tilt"],
)
def test_a_nifti_mask_must_lie_where_the_series_does(tmp_path, affine, message):
    with_nifti(tmp_path, truth().transpose(2, 1, 0), affine)
    if message is None:
        assert np.array_equal(load(tmp_path, {1: 1, 2: 2}).labels, truth())
    else:
        with pytest.raises(SourceError, match=message):
            load(tmp_path, {1: 1, 2: 2})


def test_a_series_with_uneven_steps_has_no_nifti_mask(tmp_path):
    with_nifti(tmp_path, truth().transpose(2, 1, 0), made.affine_ras(UNEVEN), UNEVEN)
    with pytest.raises(SourceError, match="its voxels lie up to"):
        load(tmp_path, {1: 1, 2: 2})
