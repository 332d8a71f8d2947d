"""Phantoms: exact truth in every geometry, blood where anatomy puts it, and clear refusals."""

from __future__ import annotations

import numpy as np
import pytest

from runtime import geometry
from training.lesions import CLASSES, Lesion, PhantomError
from training.phantom import Phantom, Scan, make

GEOMETRIES = {
    "5 mm": Scan((5.0,)),
    "5 mm, 20 degrees": Scan((5.0,), tilt_deg=20),
    "1 mm, 20 degrees": Scan((1.0,), tilt_deg=20, matrix=256),
    "1 mm": Scan((1.0,), matrix=256),
    "step change": Scan((4.0, 7.0)),
    "step change, -20 degrees": Scan((4.0, 7.0), tilt_deg=-20),
    "40 slices": Scan(slices=40),
}
LESIONS = (
    ("intracerebral", 30.0, "subdural", 12.0),
    ("epidural", 20.0, "contusion", 9.0),
    ("subarachnoid", 12.0, "intraventricular", 10.0),
)


def measured_ml(phantom: Phantom) -> dict[str, float]:
    """Volumes of the truth masks through the geometry code."""
    stack = geometry.stack({one.key: one.plane for one in phantom.slices})
    voxels = np.stack([np.bincount(labels.ravel(), minlength=len(CLASSES)) for labels in phantom.labels])
    order = [int(key) for key in stack.keys]
    return dict(zip(CLASSES, (stack.voxel_ml @ voxels[order]).tolist(), strict=True))


@pytest.mark.parametrize("scan", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("asked", LESIONS, ids=lambda a: f"{a[0]}+{a[2]}")
def test_truth_masks_measure_the_truth(scan: Scan, asked: tuple[str, float, str, float]):
    lesions = (Lesion(asked[0], asked[1]), Lesion(asked[2], asked[3]))
    phantom = make(lesions, scan, seed=5)
    measured = measured_ml(phantom)
    for lesion in lesions:
        assert phantom.truth_ml[lesion.name] == pytest.approx(lesion.volume_ml, rel=2e-3), "not what was asked for"
        assert measured[lesion.name] == pytest.approx(phantom.truth_ml[lesion.name], rel=0.01)
    assert set(phantom.truth_ml) == {lesion.name for lesion in lesions}


def test_the_same_seed_is_the_same_phantom_and_another_is_another():
    one, same, other = (make((Lesion("subdural", 9),), Scan((5.0,)), seed=seed) for seed in (3, 3, 4))
    assert all((a.hu == b.hu).all() for a, b in zip(one.slices, same.slices, strict=True))
    assert (one.labels == same.labels).all()
    assert any((a.hu != b.hu).any() for a, b in zip(one.slices, other.slices, strict=True))


def test_blood_lies_where_anatomy_puts_it_and_looks_like_blood():
    """Each class in its place: distance to the skull, side of the midline, and Hounsfield units."""
    for name, near_skull in (
        ("subdural", True),
        ("epidural", True),
        ("intracerebral", False),
        ("intraventricular", False),
    ):
        phantom = make((Lesion(name, 15),), Scan((5.0,)), seed=8)
        hu = np.stack([one.hu for one in phantom.slices])
        blood = phantom.labels > 0
        assert 45 < np.median(hu[blood]) < 85, name
        bone = np.stack([_grown(one.hu > 400) for one in phantom.slices])
        assert ((blood & bone).sum() / blood.sum() > 0.2) == near_skull, name


def _grown(mask: np.ndarray) -> np.ndarray:
    """A mask widened by 8 pixels (3.6 mm)."""
    from scipy import ndimage

    return ndimage.binary_dilation(mask, iterations=8)


def test_a_head_without_lesions_has_no_label_and_all_its_tissues():
    phantom = make((), Scan((5.0,)), seed=2)
    assert not phantom.labels.any()
    assert phantom.truth_ml == {}
    hu = phantom.slices[len(phantom.slices) // 2].hu
    brain = hu[(hu > 0) & (hu < 60)]
    assert 26 < np.median(brain) < 40
    assert (hu > 700).sum() > 3000, "no skull"
    assert (hu < -900).sum() > 50_000, "no air"


def test_thin_slices_are_noisier():
    def noise(mm: float) -> float:
        one = make((), Scan((mm,), slices=40, step_mm=4.0), seed=6).slices[20].hu.astype(float)
        middle = one[200:300, 230:280]
        return float(np.std(middle - _smooth(middle)))

    assert noise(1.0) > 1.8 * noise(5.0)


def _smooth(image: np.ndarray) -> np.ndarray:
    from scipy import ndimage

    return ndimage.gaussian_filter(image, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ich", "is no lesion"),
        ("ich:x", "is no lesion"),
        ("tumour:5", "'tumour' is no haemorrhage class"),
        ("ich:900", "900.0 ml is outside"),
    ],
)
def test_lesions_that_are_none_are_refused(text: str, message: str):
    with pytest.raises(PhantomError, match=message):
        Lesion.parse(text)


@pytest.mark.parametrize(
    ("scan", "message"),
    [
        ({"thickness_mm": (0.1,)}, "between 0.3 and 10"),
        ({"slices": 0}, "ask for 1 to 2,000"),
        ({"tilt_deg": 45}, "tilts by 30 degrees"),
        ({"thickness_mm": (4.0, 7.0), "step_mm": 4.0}, "exactly one thickness"),
    ],
)
def test_scans_that_no_scanner_makes_are_refused(scan: dict, message: str):
    with pytest.raises(PhantomError, match=message):
        Scan(**scan)


def test_a_scan_that_misses_blood_is_refused():
    with pytest.raises(PhantomError, match=r"the scan misses .* subdural"):
        make((Lesion("subdural", 20),), Scan((5.0,), slices=8), seed=1)


def test_more_blood_than_there_is_room_for_is_refused():
    with pytest.raises(PhantomError, match="this head has room for"):
        make((Lesion("subarachnoid", 150), Lesion("subarachnoid", 150)), seed=1)
