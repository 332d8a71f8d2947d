"""What makes a scan hard to read: blood of little contrast, things that look like it, movement, metal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from training.anatomy import Anatomy, Field
    from training.phantom import Scan

CLIPS_MM = ((18, -12, -28), (-18, -12, -28), (30, -8, -12), (0, -48, -6), (-66, 10, 34))  # aneurysm clips, a valve
METAL_HU = 3071.0
GHOST = 0.35  # what a movement within one slice leaves of the head at its second place


@dataclass(frozen=True)
class Trouble:
    """How hard a phantom is.

    Attributes
    ----------
    contrast_hu : by how much blood is less dense than usual (anaemia, a day gone by)
    calcifications, cavities : bright spots, and what old bleeds left behind; neither is blood
    motion_mm : how far the head wanders from slice to slice, and half of it within one
    metal : where a clip lies, in the scanner's x, y, z; None without

    """

    contrast_hu: float = 0.0
    calcifications: int = 0
    cavities: int = 0
    motion_mm: float = 0.0
    metal: tuple[float, float, float] | None = None


def draw_trouble(rng: np.random.Generator) -> Trouble:
    """Trouble as an emergency room has it: seldom all at once."""
    return Trouble(
        contrast_hu=float(rng.uniform(0, 14)),
        calcifications=int(rng.integers(0, 5)),
        cavities=int(rng.integers(0, 3)),
        motion_mm=float(rng.choice((0.0, rng.uniform(0.5, 3.0)), p=(0.6, 0.4))),
        metal=CLIPS_MM[rng.integers(len(CLIPS_MM))] if rng.random() < 0.25 else None,
    )


def add_decoys(head: Anatomy, trouble: Trouble, rng: np.random.Generator) -> None:
    """Put calcified spots and old cavities into a head, in place; what bleeds afterwards may cover them."""
    at, hu = head.space, head.hu

    def somewhere() -> tuple[float, float, float]:
        towards = rng.normal(size=3)
        towards *= rng.uniform(0.25, 0.85) / np.linalg.norm(towards)
        return float(62 * towards[0]), float(78 * towards[1]), float(8 + 48 * towards[2])

    for _ in range(trouble.calcifications):
        centre = (0.0, float(rng.uniform(-60, 40)), float(rng.uniform(10, 52))) if rng.random() < 0.3 else somewhere()
        radius = float(rng.uniform(1.0, 3.5))
        at.fill(hu, float(rng.uniform(90, 400)), centre, (radius, 1.4 * radius, radius))
    for _ in range(trouble.cavities):
        radii = rng.uniform(5, 13, 3)
        at.fill(
            hu,
            float(rng.uniform(8, 20)),
            somewhere(),
            tuple(radii.tolist()),
            yaw_deg=float(rng.uniform(0, 90)),
            soft_mm=3.0,
        )


def wander(trouble: Trouble, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Where the head lies on each slice, ``(count, 2)`` mm down the rows and columns: it drifts and comes back."""
    walk = rng.normal(0, trouble.motion_mm / 2, (count, 2))
    return ndimage.gaussian_filter1d(walk, 1.0, axis=0, mode="nearest").clip(-trouble.motion_mm, trouble.motion_mm)


def move(image: Field, by_mm: NDArray[np.float64], scan: Scan) -> Field:
    """A slice ``(H, W)`` moved in its plane."""
    return ndimage.shift(image, by_mm * scan.matrix / scan.field_of_view_mm, order=1, mode="nearest")


def disturb(hu: Field, trouble: Trouble, scan: Scan, table_mm: float, rng: np.random.Generator) -> Field:
    """A slice's HU ``(H, W)`` with a double contour where the head moved, and streaks where there is metal."""
    if trouble.motion_mm:
        hu = (1 - GHOST) * hu + GHOST * move(hu, rng.normal(0, trouble.motion_mm / 2, 2), scan)
    return hu if trouble.metal is None else _streak(hu, trouble.metal, scan, table_mm, rng)


def _streak(
    hu: Field, metal_mm: tuple[float, float, float], scan: Scan, table_mm: float, rng: np.random.Generator
) -> Field:
    """Bright and dark rays from a clip, as starved projections leave them, fading with distance."""
    sine, cosine = np.sin(np.radians(scan.tilt_deg)), np.cos(np.radians(scan.tilt_deg))
    x, y, z = metal_mm
    away = (z - table_mm) * cosine - y * sine  # from the slice's plane
    strength = float(np.exp(-((away / 5) ** 2)))
    if strength < 0.02:
        return hu
    centred = (np.arange(scan.matrix) - (scan.matrix - 1) / 2) * scan.field_of_view_mm / scan.matrix
    down, across = centred[:, None] - (y * cosine + (z - table_mm) * sine), centred[None] - x
    far, angle = np.hypot(down, across), np.arctan2(down, across)
    rays = sum(
        rng.normal() * np.sin(waves * angle + rng.uniform(0, 2 * np.pi)) for waves in rng.integers(3, 40, 12).tolist()
    )
    streaked = hu + np.where(hu > -500, 10 * strength * rays * np.exp(-far / 70), 0)
    return np.where(far < 2.5 * strength, METAL_HU, streaked).astype(np.float32)
