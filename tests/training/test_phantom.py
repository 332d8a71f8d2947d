"""Phantoms: exact truth in every geometry, blood where anatomy puts it, and clear refusals."""

from __future__ import annotations

import numpy as np
import pytest

from runtime import geometry
from tests.in_turn import in_turn
from training.lesions import CLASSES, Lesion, PhantomError, bleed
from training.phantom import Phantom, Scan, make, take
from training.trouble import Trouble

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


@pytest.mark.parametrize(("scan", "asked"), in_turn(LESIONS, GEOMETRIES))
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


def test_a_hard_phantom_is_the_same_head_with_trouble():
    blood = (Lesion("epidural", 20.0), Lesion("contusion", 8.0))
    easy, hard = (make(blood, Scan((5.0,), matrix=128), seed=11, hard=hard) for hard in (False, True))
    assert hard.truth_ml == pytest.approx({"epidural": 20.0, "contusion": 8.0}, rel=2e-3)
    assert (np.stack([s.hu for s in easy.slices]) != np.stack([s.hu for s in hard.slices])).any()
    again = make(blood, Scan((5.0,), matrix=128), seed=11, hard=True)
    assert all((a.hu == b.hu).all() for a, b in zip(hard.slices, again.slices, strict=True))


def head_of(trouble: Trouble, lesions: tuple[Lesion, ...] = ()) -> Phantom:
    rng = np.random.default_rng(5)
    return take(bleed(lesions, rng, trouble=trouble), Scan((5.0,), matrix=128, noise_hu=0.5), rng, trouble=trouble)


def test_metal_streaks_across_the_slices_that_it_lies_in_and_leaves_the_others_alone():
    clip = (18.0, -12.0, -28.0)
    without, with_ = (np.stack([s.hu for s in head_of(Trouble(metal=m)).slices]) for m in (None, clip))
    change = np.abs(with_.astype(int) - without).mean(axis=(1, 2))
    away = np.array([abs(s.plane.origin_lps[2] - clip[2]) for s in head_of(Trouble()).slices])
    assert change[away < 4].min() > 3 * change[away > 12].max()
    assert with_[away < 4].max() == 3071


def test_pale_blood_is_less_dense_and_decoys_are_no_blood():
    lesions = (Lesion("intracerebral", 30.0),)
    fresh, pale = (head_of(Trouble(contrast_hu=c), lesions) for c in (0, 14))
    means = [
        np.mean([s.hu[m > 0].mean() for s, m in zip(p.slices, p.labels, strict=True) if (m > 0).sum() > 30])
        for p in (fresh, pale)
    ]
    assert means[0] - means[1] == pytest.approx(14, abs=3)
    spotted = head_of(Trouble(calcifications=4, cavities=2))
    assert not spotted.labels.any()


def test_masks_move_with_a_head_that_moves():
    """Blood stays where its mask is: the mean density under the mask is that of blood."""
    moving = head_of(Trouble(motion_mm=3.0), (Lesion("intracerebral", 40.0),))
    shown = [s.hu[m == 1].mean() for s, m in zip(moving.slices, moving.labels, strict=True) if (m == 1).sum() > 100]
    assert min(shown) > 55
    ml = sum((m == 1).sum() * (230 / 128) ** 2 * 5 / 1000 for m in moving.labels)
    assert ml == pytest.approx(40, rel=0.03)
