"""What a scanner and a head can differ in: side, place, size, turn, calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from training.recipe import Augmentation


def augment(
    hu: NDArray[np.int16], labels: NDArray[np.uint8], how: Augmentation, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Slices and labels, each moved alike and differently from the next slice.

    Parameters
    ----------
    hu, labels : ``(N, H, W)``

    Returns
    -------
    HU ``(N, H, W)`` float32 and labels ``(N, H, W)`` uint8

    """
    count = len(hu)
    turn = np.radians(rng.uniform(-how.turn_deg, how.turn_deg, count))
    zoom = rng.uniform(1 - how.zoom, 1 + how.zoom, count)
    side = rng.choice((-1.0, 1.0), count) if how.flip else np.ones(count)
    affine = np.zeros((count, 2, 3), np.float32)
    affine[:, 0, 0], affine[:, 0, 1] = side * np.cos(turn) / zoom, -np.sin(turn) / zoom
    affine[:, 1, 0], affine[:, 1, 1] = side * np.sin(turn) / zoom, np.cos(turn) / zoom
    affine[:, :, 2] = rng.uniform(-2 * how.shift, 2 * how.shift, (count, 2))  # the grid's edge is 2 long
    field = functional.affine_grid(torch.from_numpy(affine), [count, 1, *hu.shape[1:]], align_corners=False)

    def warp(images: NDArray[np.int16 | np.uint8], mode: str) -> Tensor:
        x = torch.from_numpy(images).to(torch.float32)[:, None]
        return functional.grid_sample(x, field, mode, padding_mode="border", align_corners=False)[:, 0]

    offset = torch.from_numpy(rng.uniform(-how.offset_hu, how.offset_hu, (count, 1, 1)).astype(np.float32))
    gain = torch.from_numpy(rng.uniform(1 - how.gain, 1 + how.gain, (count, 1, 1)).astype(np.float32))
    return warp(hu, "bilinear") * gain + offset, warp(labels, "nearest").to(torch.uint8)
