"""Broken DICOM sets: each is refused by the file that is broken, and never by its patient."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
)

from tests.training.sources import made
from tests.training.sources.made import NAMES, OUTLINE, UPRIGHT, change, load, truth, with_segmentation, with_structures
from training.sources import dicom
from training.sources.errors import SourceError


def cut(path, keep):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def first(folder):
    return folder / "ct/007.dcm"


def copy_slice(folder):
    (folder / "ct/copy.dcm").write_bytes(first(folder).read_bytes())


def second_mask(folder):
    (folder / "seg2.dcm").write_bytes((folder / "seg.dcm").read_bytes())


def without_series(folder):
    for path in (folder / "ct").iterdir():
        change(path, SeriesInstanceUID="1.9.9", SOPInstanceUID=dcmread(path).SOPInstanceUID + ".9")


def one_frame(folder, edit):
    one = dcmread(folder / "seg.dcm")
    edit(one.PerFrameFunctionalGroupsSequence[2])
    one.save_as(folder / "seg.dcm")


def fewer_frames(folder):
    one = dcmread(folder / "seg.dcm")
    del one.PerFrameFunctionalGroupsSequence[-1]
    one.save_as(folder / "seg.dcm")


def two_sources(frame):
    another = Dataset()
    another.ReferencedSOPClassUID, another.ReferencedSOPInstanceUID = CTImageStorage, f"{made.SERIES}.1"
    frame.DerivationImageSequence[0].SourceImageSequence.append(another)


def mirrored(frame):
    frame.PlanePositionSequence[0].ImagePositionPatient[1] = 88.5


def swapped(folder):
    one = dcmread(folder / "seg.dcm")
    one.SegmentSequence[0].SegmentLabel = "Tumour"
    one.save_as(folder / "seg.dcm")


BROKEN = {
    "no folder": (lambda at: (at / "ct").parent.rename(at.with_name("gone")), "no such folder"),
    "no images": (lambda at: [path.unlink() for path in (at / "ct").iterdir()], "no CT or MR image"),
    "text": (lambda at: first(at).write_bytes(b"no DICOM at all"), "007.dcm: no DICOM file"),
    "cut header": (lambda at: cut(first(at), 0.3), "007.dcm: (no|truncated)"),
    "cut pixels": (lambda at: cut(first(at), 0.95), r"007.dcm: truncated in \(7FE0,0010\)"),
    "cut mask": (lambda at: cut(at / "seg.dcm", 0.97), "seg.dcm: (no|truncated)"),
    "cut references": (lambda at: cut(at / "seg.dcm", 0.6), "seg.dcm: (no|truncated|mask without)"),
    "no patient": (lambda at: change(first(at), PatientID=""), "no PatientID"),
    "two patients": (lambda at: change(first(at), PatientID="SECRET-2"), "another patient or modality"),
    "no position": (lambda at: change(first(at), ImagePositionPatient=None), "007.dcm: no position"),
    "no orientation": (lambda at: change(first(at), ImageOrientationPatient=[1, 0, 0]), "no position, orientation"),
    "no plane": (lambda at: change(first(at), ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "that no plane has"),
    "no rescale": (lambda at: change(first(at), RescaleSlope=None), "a CT without RescaleSlope"),
    "zero rescale": (lambda at: change(first(at), RescaleSlope="0"), "rescale slope 0.0"),
    "other orientation": (
        lambda at: change(first(at), ImageOrientationPatient=[0, 1, 0, 0, 0, -1]),
        "no stack of slices .*not parallel",
    ),
    "other spacing": (lambda at: change(first(at), PixelSpacing=[0.6, 0.4]), "another size or pixel spacing"),
    "other size": (lambda at: change(first(at), Rows=13, Columns=58), "another size or pixel spacing"),
    "two frames": (
        lambda at: change(first(at), Rows=13, Columns=29, NumberOfFrames=2),
        r"pixels of shape \(2, 13, 29\)",
    ),
    "multi-frame": (lambda at: change(first(at), SOPClassUID=EnhancedCTImageStorage), "a multi-frame image"),
    "one slice twice": (copy_slice, "the same instance as"),
    "mask of another series": (without_series, "seg.dcm: mask without image"),
    "two masks": (second_mask, "seg2.dcm: a second mask beside seg.dcm"),
    "slice missing": (lambda at: (at / "ct/021.dcm").unlink(), "is of a slice that the stack has not"),
    "unknown segment": (swapped, "seg.dcm: unknown class 'Tumour'"),
    "frame size": (lambda at: change(at / "seg.dcm", Rows=29, Columns=26), "frames of 29 x 26 pixels"),
    "no sources": (
        lambda at: one_frame(at, lambda frame: frame.pop("DerivationImageSequence")),
        "frame 3 names 0 source images",
    ),
    "two sources": (lambda at: one_frame(at, two_sources), "frame 3 names 2 source images"),
    "mirrored": (lambda at: one_frame(at, mirrored), r"frame 3 lies 177\.00 mm from the slice"),
    "frames not described": (fewer_frames, "8 frames and 7 descriptions of frames"),
    "no segments": (lambda at: change(at / "seg.dcm", SegmentSequence=None), "no SegmentSequence"),
    "nifti of nobody": (
        lambda at: nibabel.save(nibabel.Nifti1Image(truth(), np.eye(4)), at / "mask.nii"),
        "mask.nii: mask without image",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_series_are_refused_by_name_and_never_by_patient(tmp_path, kind):
    folder = tmp_path / "set"
    folder.mkdir()
    with_segmentation(folder)
    spoil, message = BROKEN[kind]
    spoil(folder)
    with pytest.raises(SourceError, match=message) as raised:
        load(folder)
    assert str(folder) in str(raised.value)
    assert "SECRET" not in str(raised.value)


def test_a_patient_id_that_breaks_dicoms_rules_is_no_warning_and_in_no_repr(tmp_path):
    sources = made.series(UPRIGHT, made.hounsfield(5))
    for one in sources:
        one.PatientID = ""
    for path in made.write(sources, tmp_path):
        path.write_bytes(path.read_bytes().replace(b"1.2.3.4.", b"1.2.3.x."))  # nor is an illegal UID
        content = path.read_bytes()
        at = content.index(b"\x10\x00\x20\x00LO\x00\x00")
        value = b"SECRET\x07" * 12
        path.write_bytes(content[: at + 6] + len(value).to_bytes(2, "little") + value + content[at + 8 :])
    (entry,) = dicom.entries(tmp_path, classes=NAMES, unmasked="negative")
    assert entry.patient.startswith("SECRET")
    assert "SECRET" not in repr(entry) + repr(entry.load)
    assert "SECRET" not in repr(entry.load())


def drawn(pixels=OUTLINE, plane=UPRIGHT[1], uid=None, **changes):
    one = made.contour(plane, pixels, uid)
    for keyword, value in changes.items():
        setattr(one, keyword, value)
    return {"Subdural": [one]}


BROKEN_CONTOURS = {
    "unknown structure": ({"Skin": []}, "unknown class 'Skin'"),
    "open": (drawn(ContourGeometricType="OPEN_PLANAR"), "is OPEN_PLANAR, not closed"),
    "no points": (drawn(ContourData=[]), "without valid points|with 0 points"),
    "two coordinates": (drawn(ContourData=[1, 2, 3, 4, 5, 6, 7, 8]), "without valid points"),
    "points missing": (drawn(NumberOfContourPoints=5), "with 4 points of 5"),
    "twice": ({"Subdural": [*drawn()["Subdural"], *drawn()["Subdural"]]}, "is there twice"),
    "outside": (drawn([(2, 3), (2, 31), (9, 31)]), "reaches out of its image"),
    "slice missing": (drawn(uid="1.2.3.4.99"), "names slices that the stack has not"),
    "another slice": (drawn(uid="1.2.3.4.4"), r"lies 10\.00 mm from its slice"),
    "between slices": (drawn(plane=made.planes((12.0, 12.0))[2]), "lies|mm from its slice"),
    "tilted": (drawn(plane=made.planes(tilt_deg=8.0)[1]), r"mm bent"),
}


@pytest.mark.parametrize("kind", BROKEN_CONTOURS)
def test_broken_structure_sets_are_refused_by_name(tmp_path, kind):
    rois, message = BROKEN_CONTOURS[kind]
    with_structures(tmp_path, rois)
    with pytest.raises(SourceError, match=message) as raised:
        load(tmp_path)
    assert "rt.dcm" in str(raised.value)


def test_contours_of_no_structure_are_refused(tmp_path):
    with_structures(tmp_path, drawn())
    one = dcmread(tmp_path / "rt.dcm")
    one.ROIContourSequence[0].ReferencedROINumber = 8
    one.save_as(tmp_path / "rt.dcm")
    with pytest.raises(SourceError, match=r"rt\.dcm: contours of structure 8, which is not described"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0.2, 0.4, 0.6, 0.8, 0.9, 0.99])
def test_a_structure_set_that_breaks_off_loses_no_contour_silently(tmp_path, keep):
    with_structures(tmp_path, {"Subdural": [made.contour(plane, OUTLINE) for plane in UPRIGHT]})
    cut(tmp_path / "rt.dcm", keep)
    with pytest.raises(SourceError, match=r"rt\.dcm: "):
        load(tmp_path)


def test_a_structure_set_of_two_series_is_refused(tmp_path):
    for number in (1, 2):
        sources = made.series(UPRIGHT, made.hounsfield(5), series=f"1.2.{number}")
        made.write(sources, tmp_path / str(number))
    made.structures({"Subdural": []}, series_uid=None).save_as(tmp_path / "rt.dcm", enforce_file_format=True)
    with pytest.raises(SourceError, match="rt.dcm: mask of 2 series"):
        dicom.entries(tmp_path, classes=NAMES)
