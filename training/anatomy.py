"""A synthetic head in space: tissues in Hounsfield units on a grid, as functions of position.

Head frame: millimetres, x to the left, y to the posterior, z to the superior (LPS), origin in the middle of the
brain. Shapes are signed distances (negative inside) turned into soft occupancies, so that volumes are exact below one
grid cell. The proportions are those of an adult; the texture is made of random waves. It looks like a head CT and is
none: no patient went into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Field = NDArray[np.float32]  # (Z, Y, X) on the grid

EXTENT_MM = ((-82.0, 86.0), (-104.0, 104.0), (-84.0, 84.0))  # z, y, x
AIR, FAT, SCALP, WHITE, GREY, CSF, DURA, BONE, DIPLOE = -1000.0, -90.0, 45.0, 29.0, 38.0, 7.0, 46.0, 1150.0, 650.0


@dataclass(frozen=True)
class Space:
    """The grid and, per voxel, where it lies in the head.

    Attributes
    ----------
    spacing_mm : edge of a cubic voxel
    axes_mm : scanner coordinates of the grid's z, y and x lines
    pose : ``(3, 3)``, scanner to head coordinates, both in x, y, z
    z, y, x : head coordinates of every voxel, ``(Z, Y, X)`` float32 mm (differs from the grid by the head's pose)

    """

    spacing_mm: float
    axes_mm: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]
    pose: NDArray[np.float64]
    z: Field
    y: Field
    x: Field

    @property
    def voxel_ml(self) -> float:
        return self.spacing_mm**3 / 1000.0

    def occupancy(self, distance_mm: Field, soft_mm: float | None = None) -> Field:
        """Share of each voxel inside a surface given by its signed distance: a linear ramp one voxel wide."""
        return np.clip(0.5 - distance_mm / np.float32(soft_mm or self.spacing_mm), 0, 1, dtype=np.float32)

    def ellipsoid(
        self, centre: tuple[float, float, float], radii: tuple[float, float, float], yaw_deg: float = 0
    ) -> Field:
        """Signed distance in mm to first order; centre and radii in x, y, z; yaw turns it about z."""
        x, y, z = self.x - np.float32(centre[0]), self.y - np.float32(centre[1]), self.z - np.float32(centre[2])
        if yaw_deg:
            c, s = np.float32(np.cos(np.radians(yaw_deg))), np.float32(np.sin(np.radians(yaw_deg)))
            x, y = c * x + s * y, c * y - s * x
        return _ellipsoid(x, y, z, *(np.float32(r) for r in radii))

    def capsule(self, start: tuple[float, float, float], end: tuple[float, float, float], radius: float) -> Field:
        """Signed distance in mm to a line segment thickened by `radius`; points in x, y, z."""
        ax, ay, az = (np.float32(v) for v in start)
        dx, dy, dz = (np.float32(e - s) for s, e in zip(start, end, strict=True))
        x, y, z = self.x - ax, self.y - ay, self.z - az
        t = np.clip((x * dx + y * dy + z * dz) / (dx * dx + dy * dy + dz * dz), 0, 1)
        return np.sqrt((x - t * dx) ** 2 + (y - t * dy) ** 2 + (z - t * dz) ** 2) - np.float32(radius)

    def box(self, centre: tuple[float, float, float], reach_mm: float) -> tuple[slice, slice, slice]:
        """The part of the grid within `reach_mm` of a point given in x, y, z of the head."""
        there = np.linalg.solve(self.pose, centre)[::-1]
        scale = np.linalg.det(self.pose) ** (
            1 / 3
        )  # the head's millimetres are not the scanner's when its size is not 1
        return tuple(
            slice(*np.searchsorted(axis, (c - reach_mm / scale, c + reach_mm / scale)).tolist())
            for axis, c in zip(self.axes_mm, there, strict=True)
        )

    def part(self, box: tuple[slice, slice, slice]) -> Space:
        axes = tuple(axis[cut] for axis, cut in zip(self.axes_mm, box, strict=True))
        return Space(self.spacing_mm, axes, self.pose, self.z[box], self.y[box], self.x[box])

    def fill(
        self,
        field: Field,
        value: float,
        centre: tuple[float, float, float],
        radii: tuple[float, float, float],
        *,
        yaw_deg: float = 0,
        soft_mm: float | None = None,
    ) -> None:
        """Set an ellipsoid of a field to a value, in place, blended at its edge."""
        box = self.box(centre, max(radii) + 3)
        part = self.part(box)
        field[box] += (np.float32(value) - field[box]) * part.occupancy(part.ellipsoid(centre, radii, yaw_deg), soft_mm)


def _ellipsoid(x: Field, y: Field, z: Field, rx: Field, ry: Field, rz: Field) -> Field:
    q = np.sqrt((x / rx) ** 2 + (y / ry) ** 2 + (z / rz) ** 2)
    gradient = np.sqrt((x / rx**2) ** 2 + (y / ry**2) ** 2 + (z / rz**2) ** 2)
    return q * (q - 1) / np.maximum(gradient, np.float32(1e-6))


def space(spacing_mm: float, pose_deg: tuple[float, float, float], size: float) -> Space:
    """Grid of the scanner and the head's pose in it.

    Parameters
    ----------
    spacing_mm : edge of a voxel
    pose_deg : rotation of the head about x (nod), y (roll) and z (turn)
    size : scale of the head, 1 is the average

    """
    axes = tuple(np.arange(low, high + 1e-6, spacing_mm, dtype=np.float32) for low, high in EXTENT_MM)
    z, y, x = (np.ascontiguousarray(a) for a in np.broadcast_arrays(axes[0][:, None, None], axes[1][:, None], axes[2]))
    nod, roll, turn = np.radians(pose_deg)
    about_x = np.array([[1, 0, 0], [0, np.cos(nod), np.sin(nod)], [0, -np.sin(nod), np.cos(nod)]])
    about_y = np.array([[np.cos(roll), 0, -np.sin(roll)], [0, 1, 0], [np.sin(roll), 0, np.cos(roll)]])
    about_z = np.array([[np.cos(turn), np.sin(turn), 0], [-np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    pose = about_y @ about_x @ about_z / size
    m = pose.astype(np.float32)
    head_x, head_y, head_z = (m[i, 0] * x + m[i, 1] * y + m[i, 2] * z for i in range(3))
    return Space(spacing_mm, axes, pose, head_z, head_y, head_x)


def waves(at: Space, rng: np.random.Generator, wavelength_mm: tuple[float, float], count: int) -> Field:
    """Smooth random texture of about unit variance: a sum of plane waves with random directions and phases."""
    total = np.zeros_like(at.x)
    for _ in range(count):
        direction = rng.normal(size=3)
        k = direction / np.linalg.norm(direction) * 2 * np.pi / rng.uniform(*wavelength_mm)
        phase = np.float32(rng.uniform(0, 2 * np.pi))
        total += np.sin(np.float32(k[0]) * at.x + np.float32(k[1]) * at.y + np.float32(k[2]) * at.z + phase)
    return total * np.float32(np.sqrt(2 / count))


@dataclass(frozen=True)
class Anatomy:
    """A head without blood.

    Attributes
    ----------
    space : the grid
    hu : ``(Z, Y, X)`` float32
    brain_mm : signed distance to the brain's surface
    inner_table_mm : signed distance to the inside of the skull
    ventricles, distended, parenchyma : occupancies of the spaces where blood can be; distended are the sulci, fissures
        and cisterns as blood widens them, without the film of fluid under the skull

    """

    space: Space
    hu: Field
    brain_mm: Field
    inner_table_mm: Field
    ventricles: Field
    distended: Field
    parenchyma: Field


def grow(
    at: Space, rng: np.random.Generator, *, ventricle_scale: float, sulcus_width: float, shift_mm: float = 0.0
) -> Anatomy:
    """Grow one head.

    Parameters
    ----------
    at : grid and pose
    rng : shapes, texture and calcifications come from here
    ventricle_scale : 1 is the average adult; hydrocephalus 1.5 and more
    sulcus_width : half the width of the sulci in units of the folding field; 0.13 is about 1.3 mm from bank to bank
    shift_mm : how far deep structures are pushed across the midline, to +x (the left)

    """
    up = np.where(at.z > 0, np.float32(64), np.float32(50))
    brain = _ellipsoid(at.x, at.y, at.z, 65 * (1 + np.float32(0.0013) * at.y), np.float32(82), up)
    subdural_mm = np.float32(rng.uniform(1.6, 3.0))  # atrophy widens what lies over the convexity
    inner = brain - subdural_mm
    deep = np.clip(-brain / 30, 0, 1)
    mid = Space(
        at.spacing_mm, at.axes_mm, at.pose, at.z, at.y, at.x - np.float32(shift_mm) * deep * deep * (3 - 2 * deep)
    )

    hu = _outside(at, inner, rng)
    inside = at.occupancy(inner)

    folds = waves(at, rng, (17, 30), 7)
    fine = waves(at, rng, (7, 10), 5)
    cerebellar = (at.y > 8) & (at.z < -20 - np.float32(0.22) * np.abs(at.x) + np.float32(0.1) * (at.y - 40))
    cortex = np.clip((brain + np.float32(rng.uniform(13, 18))) / 3, 0, 1) * ~cerebellar
    midline = (brain > -26) & (at.z > -25) & ~cerebellar
    cistern_mm = _cisterns(mid, at)
    convexity = at.occupancy(-brain)  # between brain and dura
    ventricles = at.occupancy(_ventricles(mid, ventricle_scale)) * at.occupancy(brain)
    within = at.occupancy(brain + 1) * (1 - ventricles)

    def spaces(wider_mm: float) -> Field:
        """Sulci, fissures and cisterns, each bank `wider_mm` further out than in health."""
        half = np.float32(sulcus_width + 0.2 * wider_mm)
        sulci = np.clip((half - np.abs(folds)) / np.float32(0.08) + np.float32(0.5), 0, 1) * cortex
        interhemispheric = at.occupancy(np.abs(mid.x) - np.float32(1.3 + wider_mm)) * midline
        cisterns = at.occupancy(cistern_mm - np.float32(wider_mm))
        return np.maximum.reduce([sulci, interhemispheric, cisterns]) * within

    clefts = spaces(0.0)
    subarachnoid = np.maximum(clefts, convexity) * inside * (1 - ventricles)

    grey = np.clip((np.float32(0.55) - np.abs(folds)) / np.float32(0.2), 0, 1) * (brain > -22)
    grey = np.maximum(grey, np.clip((brain + 4) / 1.5, 0, 1))
    grey[cerebellar] = np.clip(np.float32(0.6) + np.float32(0.4) * fine[cerebellar], 0, 1)
    for side in (-1, 1):
        for centre, radii in (((10, 4, 6), (7, 13, 9)), ((13, -25, 10), (5, 9, 8)), ((25, -8, 4), (6, 18, 11))):
            mid.fill(grey, 1.0, (side * centre[0], centre[1], centre[2]), radii, soft_mm=2.0)
    contrast = np.float32(rng.uniform(7, 11))
    base = np.float32(WHITE + rng.uniform(-2, 2))
    tissue = base + contrast * grey + np.float32(0.8) * fine
    csf = np.float32(CSF + rng.uniform(-3, 3))

    content = tissue * (1 - subarachnoid) + csf * subarachnoid
    content = content * (1 - ventricles) + csf * ventricles
    content = _dura(content, mid, at, brain, cerebellar)
    content = _calcifications(content, mid, rng)
    cupping = np.float32(rng.uniform(2, 9)) * np.exp(np.minimum(inner, 0) / 6)  # beam hardening under the skull
    ridge = np.exp(-(((at.z + 38) / 6) ** 2) - ((at.y - 6) / 10) ** 2) * (np.abs(at.x) < 34)
    content += cupping - np.float32(rng.uniform(4, 16)) * ridge  # and the dark band between the petrous bones
    hu = hu * (1 - inside) + content * inside
    return Anatomy(
        at, hu, brain, inner, ventricles, spaces(1.0), at.occupancy(brain + 1) * (1 - ventricles) * (1 - subarachnoid)
    )


def _outside(at: Space, inner: Field, rng: np.random.Generator) -> Field:
    """Skull, scalp, face and skull base."""
    head = _ellipsoid(
        at.x, at.y, at.z, np.float32(78), np.float32(96), np.where(at.z > 0, np.float32(78), np.float32(150))
    )
    hu = AIR + (SCALP - AIR) * at.occupancy(head)
    fat = at.occupancy(np.abs(head + np.float32(3.5)) - np.float32(1.2))
    hu += (FAT - hu) * fat
    table = np.float32(rng.uniform(4.5, 8))
    base_thick = np.clip((-30 - at.z) / 12, 0, 1) * 4  # the base is thicker
    bone = at.occupancy(inner - table - base_thick) * (at.z > -72)
    diploe = at.occupancy(np.abs(inner - table / 2) - table * np.float32(0.22))
    hu += (BONE + (DIPLOE - BONE) * diploe - hu) * bone * at.occupancy(head + 2)
    for side in (-1, 1):
        at.fill(hu, BONE + 150, (side * 40, 8, -44), (26, 8, 9), yaw_deg=side * 35)  # petrous bones
        at.fill(hu, FAT, (side * 30, -66, -56), (18, 20, 17))  # orbits
        at.fill(hu, 12, (side * 31, -74, -56), (12, 12, 12))
        at.fill(hu, AIR, (side * 26, -52, -82), (15, 16, 14))  # maxillary sinuses
        at.fill(hu, -500, (side * 56, 26, -50), (8, 11, 11))  # mastoid cells
    at.fill(hu, AIR, (0, -60, -64), (9, 22, 14))
    at.fill(hu, AIR, (0, -88, -30), (16, 5, 11))  # frontal sinus
    return hu


def _cisterns(mid: Space, at: Space) -> Field:
    """Signed distance to the suprasellar and ambient cisterns and the Sylvian fissures with the insular cisterns."""
    suprasellar = mid.ellipsoid((0, -16, -33), (15, 12, 5))
    stem = mid.ellipsoid((0, 10, -38), (15, 14, 30))
    ambient = np.maximum(np.abs(stem - 2) - np.float32(1.7), np.abs(at.z + 30) - 11)
    side = np.abs(at.x)
    slope = (at.z + 2 - np.float32(0.9) * at.y) / np.float32(1.35)  # rises to the back; mm across the fissure
    sylvian = np.maximum.reduce([np.abs(slope) - np.float32(1.5), np.abs(at.y) - 20, 39 - side])
    insula = side - np.float32(39) + np.float32(0.006) * (at.y - 2) ** 2  # between the insula and what covers it
    insular = np.maximum.reduce([np.abs(insula) - np.float32(1.2), np.abs(at.y - 2) - 20, np.abs(at.z - 2) - 15])
    return np.minimum.reduce([suprasellar, ambient, sylvian, insular])


def _ventricles(mid: Space, scale: float) -> Field:
    """Signed distance to the ventricular system: lateral with its horns, third and fourth."""
    distance = np.full_like(mid.x, 50)

    def add(box: tuple[slice, slice, slice], part: Field) -> None:
        distance[box] = np.minimum(distance[box], part)

    for centre, radii in (((0, -2, 2), (2.4 * scale, 13, 10)), ((0, 29, -36), (6 * scale, 6 * scale, 8))):
        box = mid.box(centre, 24)
        add(box, mid.part(box).ellipsoid(centre, radii))
    for side in (-1, 1):
        path = [(12, -40, 8), (9.5, -14, 19), (13, 14, 21), (24, 33, 9)]
        tubes = [(a, b, r) for a, b, r in zip(path, path[1:], (4.6, 5.2, 6.2), strict=False)]
        horns = [((24, 33, 9), (22, 56, 4), 4.2), ((25, 29, 3), (33, -6, -20), 2.6)]
        for (ax, ay, az), (bx, by, bz), radius in tubes + horns:
            start, end = (side * ax, ay, az), (side * bx, by, bz)
            box = mid.box(tuple((s + e) / 2 for s, e in zip(start, end, strict=True)), 34 + radius * scale)
            add(box, mid.part(box).capsule(start, end, radius * scale))
    return distance


def _dura(content: Field, mid: Space, at: Space, brain: Field, cerebellar: NDArray[np.bool_]) -> Field:
    """Falx and tentorium: thin and a little brighter than brain, the mimic every reader knows."""
    falx = at.occupancy(np.abs(mid.x) - np.float32(0.5)) * ((brain > -32) & (at.z > -8) & ~cerebellar)
    sheet = np.abs(at.z + 20 + np.float32(0.22) * np.abs(at.x) - np.float32(0.1) * (at.y - 40)) - np.float32(0.5)
    tentorium = at.occupancy(sheet) * ((at.y > 8) & (np.abs(at.x) > 12))
    both = np.maximum(falx, tentorium)
    return content * (1 - both) + DURA * both


def _calcifications(content: Field, mid: Space, rng: np.random.Generator) -> Field:
    """Pineal gland, choroid plexus and sometimes the pallidum: bright, small and not blood."""
    spots = []
    if rng.random() < 0.6:
        spots.append(((0, 24, 0), rng.uniform(1.2, 2.6)))
    if rng.random() < 0.6:
        spots += [((side * 23, 32, 9), rng.uniform(1.5, 3.5)) for side in (-1, 1)]
    if rng.random() < 0.15:
        spots += [((side * 20, -4, 2), rng.uniform(1.5, 3.0)) for side in (-1, 1)]
    for centre, radius in spots:
        mid.fill(content, rng.uniform(90, 320), centre, (radius, radius, radius * 1.2))
    return content
