"""Head CT phantoms with haemorrhage of exact volume: the head and its blood, taken by a scanner.

A `Phantom` is what a scanner would deliver (`Slice`s in any geometry) with the truth beside it: a label map per slice
and the volume of each class in millilitres, taken from the blood itself and not from the slices. Each slice's mask
holds as many pixels as its slab holds blood, so a volume computed from the masks with the right geometry comes out as
the truth, and one computed with the wrong geometry does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage, sparse

from runtime.types import Plane, Slice
from training import anatomy
from training.lesions import CLASSES, Lesion, PhantomError, bleed
from training.trouble import disturb, draw_trouble, move, wander

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from training.anatomy import Field, Space
    from training.lesions import Head
    from training.trouble import Trouble


@dataclass(frozen=True)
class Scan:
    """How the scanner takes the head.

    Attributes
    ----------
    thickness_mm : nominal slice thickness; several values split the head into as many parts, from the base up
    step_mm : table feed where it is not the thickness (slices that overlap or leave gaps)
    slices : number of slices; None takes what covers the brain. With `slices` and no thickness, the thickness is what
        covers the brain
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
        if not abs(self.tilt_deg) <= 30:
            raise PhantomError(f"a gantry tilts by 30 degrees at most, not {self.tilt_deg}")

    def table_mm(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Table position and nominal thickness of each slice, ``(N,)`` mm; contiguous without a `step_mm`."""
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


def make(lesions: tuple[Lesion, ...] = (), scan: Scan | None = None, *, seed: int = 0, hard: bool = False) -> Phantom:
    """Make a phantom: the same arguments give the same phantom.

    Parameters
    ----------
    hard : with trouble of some kind (`training.trouble`), drawn by the seed

    Raises
    ------
    PhantomError : blood that does not fit into its space, or a scan that misses part of it

    """
    rng = np.random.default_rng(seed)
    scan = scan or Scan()
    trouble = draw_trouble(rng) if hard else None
    head = bleed(lesions, rng, trouble=trouble)
    _check_coverage(head, scan)
    return take(head, scan, rng, seed=seed, trouble=trouble)


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
                f"the scan misses {missed:.1f} of {head.truth_ml[name]:.1f} ml {name}: take more slices or thicker "
                "ones, or give only one of the two, so that the slices cover the brain"
            )


def take(
    head: Head,
    scan: Scan,
    rng: np.random.Generator,
    *,
    seed: int = 0,
    only: NDArray[np.int64] | None = None,
    trouble: Trouble | None = None,
) -> Phantom:
    """Scan a head: slabs averaged through their thickness (partial volume), noise, Hounsfield units.

    Parameters
    ----------
    only : which of the scan's slices; None takes them all
    trouble : what goes wrong meanwhile

    """
    position, thickness = scan.table_mm()
    if only is not None:
        position, thickness = position[only], thickness[only]
    # interpolated volumes: HU and the occupancy of each class that is there
    volumes = [head.hu, *head.blood.values()]
    moved_mm = wander(trouble, len(position), rng) if trouble and trouble.motion_mm else None
    slices, labels = [], []
    for i, sampled in enumerate(_slabs(head.space, volumes, position, thickness, scan)):
        hu, *occupancies = sampled if moved_mm is None else [move(image, moved_mm[i], scan) for image in sampled]
        if trouble:
            hu = disturb(hu, trouble, scan, float(position[i]), rng)
        hu = hu + _noise(rng, scan, float(thickness[i]))
        plane = _plane(scan, float(position[i]), float(thickness[i]))
        slices.append(Slice(str(i), plane, np.clip(np.rint(hu), -1024, 3071).astype(np.int16)))
        occupancy = np.stack(occupancies) if head.blood else np.zeros((0, *hu.shape), np.float32)
        labels.append(_binarise(occupancy, [CLASSES.index(name) for name in head.blood]))
    return Phantom(tuple(slices), np.stack(labels), head.truth_ml, scan.tilt_deg, seed)


def _slabs(
    space: Space, volumes: list[Field], position: NDArray[np.float64], thickness: NDArray[np.float64], scan: Scan
) -> Iterator[list[Field]]:
    """Each slice of each volume, ``(H, W)``, averaged through its slab.

    The gantry tilts about the x axis alone, so a slice's rows are lines of constant y and z: one sparse matrix
    gathers and averages the grid's lines for a slab's rows, one dense matrix interpolates along x.
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
