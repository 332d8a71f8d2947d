"""Head CT phantoms with haemorrhage of exact volume: the head, the blood, the scanner.

A `Phantom` is what a scanner would deliver (`Slice`s in any geometry) with the truth beside it: a label map per slice and the volume of
each class in millilitres, taken from the blood itself and not from the slices. Each slice's mask holds as many pixels as its slab holds
blood, so a volume computed from the masks with the right geometry comes out as the truth, and one computed with the wrong geometry does not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage, sparse

from runtime.errors import ScansideError
from runtime.types import Plane, Slice
from training import anatomy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from training.anatomy import Anatomy, Field, Space

CLASSES = ("background", "intracerebral", "subdural", "epidural", "subarachnoid", "intraventricular", "contusion")
ABBREVIATIONS = {
    "ich": "intracerebral",
    "sdh": "subdural",
    "edh": "epidural",
    "sah": "subarachnoid",
    "ivh": "intraventricular",
    "cc": "contusion",
}
BLOOD_HU = {  # fresh blood, unenhanced; thin layers look paler by partial volume alone
    "intracerebral": (62, 76),
    "subdural": (58, 72),
    "epidural": (64, 78),
    "subarachnoid": (56, 70),
    "intraventricular": (58, 72),
    "contusion": (54, 64),
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
            raise PhantomError(
                f"{self.name!r} is no haemorrhage class: use {', '.join(f'{a} ({n})' for a, n in ABBREVIATIONS.items())}"
            )
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
class Scan:
    """How the scanner takes the head.

    Attributes
    ----------
    thickness_mm : nominal slice thickness; several values split the head into as many parts, from the base up
    step_mm : table feed where it is not the thickness (slices that overlap or leave gaps)
    slices : number of slices; None takes what covers the brain. With `slices` and no thickness, the thickness is what covers the brain
    tilt_deg : gantry tilt; the table still moves along z, so the stack is sheared
    matrix, field_of_view_mm : pixels and edge of a square slice
    noise_hu : standard deviation at 5 mm; thinner slices are noisier by the square root

    """

    thickness_mm: tuple[float, ...] = ()
    step_mm: float | None = None
    slices: int | None = None
    tilt_deg: float = 0.0
    matrix: int = 512
    field_of_view_mm: float = 230.0
    noise_hu: float = 3.5

    def __post_init__(self) -> None:
        if any(not 0.3 <= t <= 10 for t in self.thickness_mm):
            raise PhantomError(f"slice thickness {self.thickness_mm} mm: each must lie between 0.3 and 10 mm")
        if self.slices is not None and not 1 <= self.slices <= 2000:
            raise PhantomError(f"{self.slices} slices: ask for 1 to 2,000")
        if self.step_mm is not None and (len(self.thickness_mm) != 1 or not 0.3 <= self.step_mm <= 20):
            raise PhantomError("a table step of its own goes with exactly one thickness and lies between 0.3 and 20 mm")
        if abs(self.tilt_deg) > 30:
            raise PhantomError(f"a gantry tilts by 30 degrees at most, not {self.tilt_deg}")

    def table_mm(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Table position and nominal thickness of each slice, ``(N,)`` mm each, contiguous unless `step_mm` says otherwise."""
        shear = 84 * abs(
            np.sin(np.radians(self.tilt_deg))
        )  # a tilted plane through the brain's middle reaches this far up and down
        low, high = -54 - shear, 70 + shear
        if not self.thickness_mm:
            count = self.slices or 40
            return low + (np.arange(count) + 0.5) * (high - low) / count, np.full(count, (high - low) / count)
        if self.step_mm is not None:
            count = self.slices or int(np.ceil((high - low) / self.step_mm))
            return low + (np.arange(count) + 0.5) * self.step_mm, np.full(count, self.thickness_mm[0])
        thickness: list[float] = []
        edges = np.linspace(low, high, len(self.thickness_mm) + 1)
        reached = low
        for mm, upper in zip(self.thickness_mm, edges[1:], strict=True):
            while reached < upper - 1e-6:
                thickness.append(mm)
                reached += mm
        if self.slices is not None:
            thickness = (thickness + [self.thickness_mm[-1]] * self.slices)[: self.slices]
        return low + np.cumsum(thickness) - np.array(thickness) / 2, np.array(thickness)


@dataclass(frozen=True)
class Phantom:
    """A scanned head and its truth.

    Attributes
    ----------
    slices : in table order, keys ``"0"``, ``"1"``, ...
    labels : ``(N, H, W)`` uint8, index into `CLASSES`
    truth_ml : volume per class, from the blood itself
    tilt_deg, seed : as asked

    """

    slices: tuple[Slice, ...]
    labels: NDArray[np.uint8]
    truth_ml: dict[str, float]
    tilt_deg: float
    seed: int


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


def make(lesions: tuple[Lesion, ...] = (), scan: Scan | None = None, *, seed: int = 0) -> Phantom:
    """Make a phantom: the same arguments give the same phantom.

    Raises
    ------
    PhantomError : blood that does not fit into its space, or a scan that misses part of it

    """
    rng = np.random.default_rng(seed)
    scan = scan or Scan()
    head = bleed(lesions, rng)
    _check_coverage(head, scan)
    return take(head, scan, rng, seed=seed)


def _check_coverage(head: Head, scan: Scan) -> None:
    """Refuse a scan whose table range leaves blood out: its truth would not be what the slices show."""
    position, thickness = scan.table_mm()
    low, high = position[0] - thickness[0] / 2, position[-1] + thickness[-1] / 2
    z_axis, y_axis, _ = head.space.axes_mm
    table = z_axis[:, None] - y_axis * np.tan(
        np.radians(scan.tilt_deg)
    )  # where the plane through (z, y) meets the table's axis
    outside = (table < low) | (table > high)
    for name, occupancy in head.blood.items():
        missed = float(occupancy[outside].sum(dtype=np.float64)) * head.space.voxel_ml
        if missed > 0.005 * head.truth_ml[name]:
            raise PhantomError(
                f"the scan misses {missed:.1f} of {head.truth_ml[name]:.1f} ml {name}: take more slices or thicker ones, "
                "or give only one of the two, so that the slices cover the brain"
            )


def bleed(lesions: tuple[Lesion, ...], rng: np.random.Generator, *, grid_mm: float = GRID_MM) -> Head:
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
        shift_mm=-side * min(9.0, 0.08 * outside) * rng.uniform(0.3, 1),
    )
    hu, blood = head.hu.copy(), {}
    free = np.ones_like(hu)
    for name in CLASSES[1:]:
        if name in wanted:
            occupancy, oedema = _SHAPES[name](head, wanted[name], side, rng, free)
            hu += (np.float32(rng.uniform(17, 24)) - hu) * np.float32(0.8) * oedema * free * head.parenchyma
            value = np.float32(rng.uniform(*BLOOD_HU[name])) + np.float32(1.5) * anatomy.waves(space, rng, (9, 25), 4)
            hu += (value - hu) * occupancy
            free *= 1 - occupancy
            blood[name] = occupancy
    return Head(space, hu, blood)


def _to_volume(
    shape: Callable[[float], Field], volume_ml: float, at: Space, name: str, limits: tuple[float, float]
) -> Field:
    """Bisect the one parameter that a shape grows with until it holds the asked-for millilitres (to 0.1 %)."""
    low, high = limits
    capacity = float(shape(high).sum(dtype=np.float64)) * at.voxel_ml
    if capacity < volume_ml:
        raise PhantomError(
            f"{name}: this head has room for {capacity:.1f} ml, not {volume_ml:g}: ask for less or for another seed"
        )
    for _ in range(30):
        middle = (low + high) / 2
        occupancy = shape(middle)
        reached = float(occupancy.sum(dtype=np.float64)) * at.voxel_ml
        if abs(reached - volume_ml) < 1e-3 * volume_ml:
            break
        low, high = (middle, high) if reached < volume_ml else (low, middle)
    return occupancy


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
    room = head.subarachnoid * free * at.occupancy(-42 - at.z)
    return (
        _to_volume(
            lambda reach: room * at.occupancy(distance - np.float32(reach), 8.0),
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


def take(head: Head, scan: Scan, rng: np.random.Generator, *, seed: int = 0) -> Phantom:
    """Scan a head: slabs averaged through their thickness (partial volume), noise, Hounsfield units."""
    position, thickness = scan.table_mm()
    # interpolated volumes: HU and the occupancy of each class that is there
    volumes = [head.hu, *head.blood.values()]
    slices, labels = [], []
    for i, sampled in enumerate(_slabs(head.space, volumes, position, thickness, scan)):
        hu = sampled[0] + _noise(rng, scan, float(thickness[i]))
        plane = _plane(scan, float(position[i]), float(thickness[i]))
        slices.append(Slice(str(i), plane, np.clip(np.rint(hu), -1024, 3071).astype(np.int16)))
        occupancy = np.stack(sampled[1:]) if head.blood else np.zeros((0, *hu.shape), np.float32)
        labels.append(_binarise(occupancy, [CLASSES.index(name) for name in head.blood]))
    return Phantom(tuple(slices), np.stack(labels), head.truth_ml, scan.tilt_deg, seed)


def _slabs(
    space: Space, volumes: list[Field], position: NDArray[np.float64], thickness: NDArray[np.float64], scan: Scan
) -> Iterator[list[Field]]:
    """Each slice of each volume, ``(H, W)``, averaged through its slab.

    The gantry tilts about the x axis alone, so a slice's rows are lines of constant y and z: one sparse matrix gathers and averages the
    grid's lines for a slab's rows, one dense matrix interpolates along x.
    """
    z_axis, y_axis, x_axis = space.axes_mm
    centred = (np.arange(scan.matrix) - (scan.matrix - 1) / 2) * scan.field_of_view_mm / scan.matrix
    x_at, x_weight = _linear(x_axis, centred)
    across = sparse.csr_array(
        (x_weight.ravel(), (np.repeat(np.arange(scan.matrix), 2), x_at.ravel())),
        shape=(scan.matrix, len(x_axis)),
        dtype=np.float32,
    ).toarray()
    sine, cosine = np.sin(np.radians(scan.tilt_deg)), np.cos(np.radians(scan.tilt_deg))
    lines = [np.pad(v.reshape(-1, len(x_axis)), ((0, 1), (0, 0))) for v in volumes]  # one more line: outside the grid
    lines[0][-1] = anatomy.AIR
    inside_x = (centred >= x_axis[0]) & (centred <= x_axis[-1])
    for z, mm in zip(position, thickness, strict=True):
        depth = (np.arange(n := max(2, int(np.ceil(mm / 0.8)))) + 0.5) / n * mm - mm / 2
        y_mm = centred[:, None] * cosine - depth * sine
        z_mm = z + centred[:, None] * sine + depth * cosine
        (y_at, y_weight), (z_at, z_weight) = _linear(y_axis, y_mm), _linear(z_axis, z_mm)
        line = z_at[..., :, None] * len(y_axis) + y_at[..., None, :]
        weight = z_weight[..., :, None] * y_weight[..., None, :] / n
        outside = (y_mm < y_axis[0]) | (y_mm > y_axis[-1]) | (z_mm < z_axis[0]) | (z_mm > z_axis[-1])
        line[outside] = len(z_axis) * len(y_axis)
        rows = np.repeat(np.arange(scan.matrix), line[0].size)
        gather = sparse.csr_array(
            (weight.ravel().astype(np.float32), (rows, line.ravel())),
            shape=(scan.matrix, len(z_axis) * len(y_axis) + 1),
        )
        yield [
            np.where(inside_x, (gather @ flat) @ across.T, np.float32(flat[-1, 0]))  # (rows, X) @ (X, columns)
            for flat in lines
        ]


def _linear(axis: NDArray[np.float32], at: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Indices and weights of linear interpolation on an even axis, ``(..., 2)`` each."""
    place = np.clip((at - axis[0]) / (axis[1] - axis[0]), 0, len(axis) - 1 - 1e-6)
    low = np.floor(place).astype(np.int64)
    return np.stack([low, low + 1], -1), np.stack([1 - (place - low), place - low], -1)


def _noise(rng: np.random.Generator, scan: Scan, thickness_mm: float) -> Field:
    """Correlated noise as a reconstruction kernel leaves it, ``(H, W)`` HU."""
    white = rng.standard_normal((scan.matrix, scan.matrix), dtype=np.float32)
    smooth = ndimage.gaussian_filter(white, 0.7 * scan.matrix / 512, mode="wrap")
    return smooth * np.float32(scan.noise_hu * np.sqrt(5 / thickness_mm) / smooth.std())


def _plane(scan: Scan, table_mm: float, thickness_mm: float) -> Plane:
    sine, cosine = float(np.sin(np.radians(scan.tilt_deg))), float(np.cos(np.radians(scan.tilt_deg)))
    pixel = scan.field_of_view_mm / scan.matrix
    corner = -(scan.matrix - 1) / 2 * pixel
    return Plane(
        (corner, corner * cosine, table_mm + corner * sine),
        (1.0, 0.0, 0.0),
        (0.0, cosine, sine),
        (pixel, pixel),
        thickness_mm,
    )


def _binarise(occupancy: Field, indices: list[int]) -> NDArray[np.uint8]:
    """Label map ``(H, W)`` with as many pixels of each class as the slab holds of it: the fullest pixels first."""
    labels = np.zeros(occupancy.shape[1:], np.uint8)
    if not indices:
        return labels
    strongest = occupancy.argmax(axis=0)
    for i, index in enumerate(indices):
        count = round(float(occupancy[i].sum(dtype=np.float64)))
        mine = np.flatnonzero((strongest == i) & (occupancy[i] > 0))
        if count == 0:
            continue
        if count < mine.size:
            mine = mine[np.argpartition(occupancy[i].ravel()[mine], mine.size - count)[mine.size - count :]]
        labels.ravel()[mine] = index
    return labels
