"""Haemorrhage in a synthetic head: six classes, each of an exact volume, each where anatomy puts it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from scipy import optimize

from runtime.errors import ScansideError
from training import anatomy
from training.trouble import add_decoys

if TYPE_CHECKING:
    from collections.abc import Callable

    from training.anatomy import Anatomy, Field, Space
    from training.trouble import Trouble

CLASSES = ("background", "intracerebral", "subdural", "epidural", "subarachnoid", "intraventricular", "contusion")
ABBREVIATIONS = {
    "ich": "intracerebral",
    "sdh": "subdural",
    "edh": "epidural",
    "sah": "subarachnoid",
    "ivh": "intraventricular",
    "cc": "contusion",
}
# unenhanced, acute: a clot is densest; fluid thins what lies in the ventricles, tissue what a contusion holds
BLOOD_HU = {
    "intracerebral": (66, 80),
    "subdural": (50, 60),
    "epidural": (68, 82),
    "subarachnoid": (60, 70),
    "intraventricular": (48, 58),
    "contusion": (48, 56),
}
GRID_MM = 1.25


class PhantomError(ScansideError):
    """A phantom that can't be made as asked."""


@dataclass(frozen=True)
class Lesion:
    """Blood of one class, in millilitres."""

    name: str
    volume_ml: float

    def __post_init__(self) -> None:
        if self.name not in CLASSES[1:]:
            known = ", ".join(f"{short} ({name})" for short, name in ABBREVIATIONS.items())
            raise PhantomError(f"{self.name!r} is no haemorrhage class: use {known}")
        if not 0.2 <= self.volume_ml <= 150:
            raise PhantomError(f"{self.name}: {self.volume_ml} ml is outside 0.2 to 150 ml")

    @classmethod
    def parse(cls, text: str) -> Lesion:
        """Read ``"ich:30"`` or ``"intracerebral:30"``: a class and its millilitres."""
        name, _, volume = text.partition(":")
        try:
            return cls(ABBREVIATIONS.get(name.lower(), name.lower()), float(volume))
        except ValueError:
            raise PhantomError(f"{text!r} is no lesion: write CLASS:MILLILITRES, such as ich:30") from None


@dataclass(frozen=True)
class Head:
    """Anatomy with blood in it, ready to be scanned."""

    space: Space
    hu: Field
    blood: dict[str, Field] = field(default_factory=dict)

    @property
    def truth_ml(self) -> dict[str, float]:
        return {
            name: float(occupancy.sum(dtype=np.float64)) * self.space.voxel_ml for name, occupancy in self.blood.items()
        }


def bleed(
    lesions: tuple[Lesion, ...],
    rng: np.random.Generator,
    *,
    trouble: Trouble | None = None,
    grid_mm: float = GRID_MM,
) -> Head:
    """Grow a head and let it bleed, one class after the other, each where anatomy puts it."""
    wanted = {lesion.name: 0.0 for lesion in lesions}
    for lesion in lesions:
        wanted[lesion.name] += lesion.volume_ml
    side = int(rng.choice((-1, 1)))
    outside = sum(wanted.get(name, 0) for name in ("subdural", "epidural", "intracerebral"))
    space = anatomy.space(grid_mm, tuple(rng.normal(0, (4, 3, 5))), rng.uniform(0.94, 1.04))
    swelling = max(1.0, (wanted.get("intraventricular", 0) / 18) ** (1 / 2))
    head = anatomy.grow(
        space,
        rng,
        ventricle_scale=rng.uniform(0.75, 1.35) * swelling,
        sulcus_width=rng.uniform(0.1, 0.28),
        shift_mm=-side * min(9.0, 0.08 * outside) * rng.uniform(0.3, 1),
    )
    if trouble:
        add_decoys(head, trouble, rng)
    hu, blood = head.hu.copy(), {}
    free = np.ones_like(hu)
    for name in CLASSES[1:]:
        if name in wanted:
            occupancy, oedema = _SHAPES[name](head, wanted[name], side, rng, free)
            hu += (np.float32(rng.uniform(17, 24)) - hu) * np.float32(0.8) * oedema * free * head.parenchyma
            speckle_hu, wavelength_mm = (8.0, (4, 9)) if name == "contusion" else (1.5, (9, 25))  # salt and pepper
            value = np.float32(rng.uniform(*BLOOD_HU[name]) - (trouble.contrast_hu if trouble else 0))
            value = value + np.float32(speckle_hu) * anatomy.waves(space, rng, wavelength_mm, 4)
            hu += (value - hu) * occupancy
            free *= 1 - occupancy
            blood[name] = occupancy
    return Head(space, hu, blood)


def _to_volume(
    shape: Callable[[float], Field], volume_ml: float, at: Space, name: str, limits: tuple[float, float]
) -> Field:
    """Grow a shape by its one parameter until it holds the asked-for millilitres (to 0.1 %)."""
    low, high = limits
    capacity = float(shape(high).sum(dtype=np.float64)) * at.voxel_ml
    if capacity < volume_ml:
        raise PhantomError(
            f"{name}: this head has room for {capacity:.1f} ml, not {volume_ml:g}: ask for less or for another seed"
        )

    def excess_ml(grow: float) -> float:
        excess = float(shape(grow).sum(dtype=np.float64)) * at.voxel_ml - volume_ml
        return 0.0 if abs(excess) < 1e-3 * volume_ml else excess  # a root: near enough

    return shape(optimize.brentq(excess_ml, low, high, xtol=1e-6))


def _local(whole: Field, box: tuple[slice, slice, slice], part: Field) -> Field:
    result = np.zeros_like(whole)
    result[box] = part
    return result


def _intracerebral(
    head: Anatomy, volume_ml: float, side: int, rng: np.random.Generator, free: Field
) -> tuple[Field, Field]:
    """One ragged ellipsoid in the deep nuclei, a lobe or the cerebellum, with oedema around it."""
    sites = [(27, -4, 6), (14, 8, 7), (32, -38, 26), (36, 30, 28), (42, 6, -10), (26, 52, 10)]
    if volume_ml < 25:
        sites.append((20, 46, -34))
    x, y, z = sites[rng.integers(len(sites))]
    centre = (side * x + rng.normal(0, 2), y + rng.normal(0, 3), z + rng.normal(0, 3))
    radius = (volume_ml * 1000 * 3 / 4 / np.pi) ** (1 / 3)
    box = head.space.box(centre, 2.2 * radius + 14)
    at = head.space.part(box)
    aspect = np.exp(rng.normal(0, 0.16, 3))
    distance = at.ellipsoid(centre, tuple(radius * aspect / np.prod(aspect) ** (1 / 3)), rng.uniform(-40, 40))
    distance += np.float32(0.1 * radius) * anatomy.waves(at, rng, (1.2 * radius + 6, 2.5 * radius + 12), 6)
    room = (head.parenchyma * free)[box]
    occupancy = _to_volume(
        lambda grow: at.occupancy(distance - np.float32(grow)) * room, volume_ml, at, "intracerebral", (-radius, radius)
    )
    oedema = np.exp(-np.maximum(distance, 0) / np.float32(rng.uniform(1.5, 4.5)))
    return _local(free, box, occupancy), _local(free, box, oedema)


def _over_convexity(
    head: Anatomy, side: int, rng: np.random.Generator, *, angle: tuple[float, float], middle: tuple[float, float]
) -> tuple[Field, Field]:
    """Angles from a point on the convexity, each in units of its half-width: around the head and up the head."""
    at = head.space
    around = np.degrees(np.arctan2(at.y / 82, side * at.x / 65)) - np.float32(middle[0] + rng.normal(0, 6))
    radius = np.sqrt((at.x / 65) ** 2 + (at.y / 82) ** 2 + (at.z / 64) ** 2)
    up = np.degrees(np.arcsin(np.clip(at.z / 64 / np.maximum(radius, 1e-3), -1, 1))) - np.float32(
        middle[1] + rng.normal(0, 4)
    )
    return around / np.float32(angle[0]), up / np.float32(angle[1])


def _layer(head: Anatomy, thickness_mm: Field, side: int, free: Field) -> Field:
    """Blood from the inner table inwards, `thickness_mm` deep, on one side of the falx, above the skull base."""
    at = head.space
    depth = np.maximum(head.inner_table_mm, -thickness_mm - head.inner_table_mm)
    return at.occupancy(depth) * at.occupancy(2 - side * at.x) * at.occupancy(-36 - at.z) * (thickness_mm > 0) * free


def _subdural(head: Anatomy, volume_ml: float, side: int, rng: np.random.Generator, free: Field) -> tuple[Field, Field]:
    """A crescent: an even layer over much of one hemisphere that thins out at its edges."""
    around, up = _over_convexity(head, side, rng, angle=(54, 32), middle=(rng.uniform(-15, 15), rng.uniform(10, 24)))
    rho = np.sqrt(around**2 + up**2)
    usual = np.float32(rng.uniform(0.8, 1.2))

    def shape(grow: float) -> Field:
        reach = np.float32(min(1.45, grow**0.5))
        return _layer(
            head,
            np.float32(10) * usual * np.float32(grow**0.5) * np.clip(1.0 - (rho / reach) ** 4, 0, None),
            side,
            free,
        )

    return _to_volume(shape, volume_ml, head.space, "subdural", (0.02, 9.0)), np.zeros_like(free)


def _epidural(head: Anatomy, volume_ml: float, side: int, rng: np.random.Generator, free: Field) -> tuple[Field, Field]:
    """A lens: thick in the middle, sharp-edged, held back by the sutures."""
    side = int(rng.choice((-1, 1))) if volume_ml < 15 else side
    site = ((-38, 2), (2, 2), (34, 12), (-20, 34))[rng.integers(4)]  # frontal, temporal, parietal, high frontal
    around, up = _over_convexity(head, side, rng, angle=(28, 27), middle=site)
    rho2 = around**2 + up**2

    def shape(grow: float) -> Field:
        reach2 = np.float32(grow)
        return _layer(head, np.float32(20) * np.float32(grow**0.55) * np.clip(1 - rho2 / reach2, 0, None), side, free)

    return _to_volume(shape, volume_ml, head.space, "epidural", (0.05, 5.0)), np.zeros_like(free)


def _subarachnoid(
    head: Anatomy, volume_ml: float, side: int, rng: np.random.Generator, free: Field
) -> tuple[Field, Field]:
    """Blood in the cisterns and sulci around an aneurysm's site, or over the convexity after a blow."""
    at = head.space
    centres = [(0, -14, -32), (side * 34, -8, -12), (side * 44, -8, -10), (side * 48, 5, 34), (side * 30, -58, 24)]
    x, y, z = centres[rng.integers(len(centres))]
    distance = np.sqrt((at.x - x) ** 2 + (at.y - y) ** 2 + (at.z - z) ** 2) + np.float32(5) * anatomy.waves(
        at, rng, (25, 50), 4
    )
    room = head.distended * free * at.occupancy(-42 - at.z)
    return (
        _to_volume(
            lambda reach: room * at.occupancy(distance - np.float32(reach), 4.0),
            volume_ml,
            at,
            "subarachnoid",
            (0.0, 150.0),
        ),
        np.zeros_like(free),
    )


def _intraventricular(
    head: Anatomy, volume_ml: float, side: int, rng: np.random.Generator, free: Field
) -> tuple[Field, Field]:
    """Blood settles: the patient lies on the back, so the dependent part of the ventricles fills first."""
    at = head.space
    # the fluid level: mostly y, a little z, and one side before the other
    height = (
        -at.y * np.float32(np.cos(0.3))
        + at.z * np.float32(rng.uniform(-0.35, 0.35))
        - np.float32(side * rng.uniform(0, 0.9)) * at.x
    )
    room = head.ventricles * free
    return (
        _to_volume(
            lambda level: room * at.occupancy(height - np.float32(level), 2.5),
            volume_ml,
            at,
            "intraventricular",
            (-130.0, 130.0),
        ),
        np.zeros_like(free),
    )


def _contusion(
    head: Anatomy, volume_ml: float, side: int, rng: np.random.Generator, free: Field
) -> tuple[Field, Field]:
    """Salt and pepper: a cluster of small foci in cortex that struck bone, with oedema between them."""
    poles = [(20, -62, -10), (30, -56, 4), (46, -24, -22), (50, -2, -20), (44, 20, -14)]
    x, y, z = poles[rng.integers(len(poles))]
    count = int(rng.integers(5, 9))
    focus = (volume_ml * 1000 / count * 3 / 4 / np.pi) ** (1 / 3)
    cluster = 1.5 * focus * count ** (1 / 3)
    box = head.space.box((side * x, y, z), 2.2 * cluster + 12)
    at = head.space.part(box)
    foci = []
    for _ in range(count):
        offset = rng.normal(size=3)
        offset *= cluster * rng.uniform(0.35, 1) / np.linalg.norm(offset)
        radii = focus * np.exp(rng.normal(0, 0.18, 3))
        foci.append(
            at.ellipsoid((side * x + offset[0], y + offset[1], z + offset[2]), tuple(radii), rng.uniform(0, 90))
        )
    distance = np.minimum.reduce(foci) + np.float32(0.15 * focus) * anatomy.waves(at, rng, (6, 14), 5)
    room = (at.occupancy(head.brain_mm[box] + 1) * (1 - head.ventricles[box])) * free[box]
    occupancy = _to_volume(
        lambda grow: at.occupancy(distance - np.float32(grow)) * room,
        volume_ml,
        at,
        "contusion",
        (-2 * focus, 4 * focus),
    )
    oedema = np.exp(-np.maximum(distance, 0) / np.float32(rng.uniform(3, 5)))
    return _local(free, box, occupancy), _local(free, box, oedema)


_SHAPES: dict[str, Callable[[Anatomy, float, int, np.random.Generator, Field], tuple[Field, Field]]] = {
    "intracerebral": _intracerebral,
    "subdural": _subdural,
    "epidural": _epidural,
    "subarachnoid": _subarachnoid,
    "intraventricular": _intraventricular,
    "contusion": _contusion,
}
