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
    hu : ``(N, K, H, W)``, each slice between its neighbours
    labels : ``(N, H, W)``, of the slice in the middle, or of all ``(N, K, H, W)``

    Returns
    -------
    HU float32 and labels uint8, in their shapes

    """
    count = len(hu)
    turn = np.radians(rng.uniform(-how.turn_deg, how.turn_deg, count))
    zoom = rng.uniform(1 - how.zoom, 1 + how.zoom, count)
    flip = rng.choice((-1.0, 1.0), count) if how.flip else np.ones(count)
    across = np.stack([flip * np.cos(turn), flip * np.sin(turn)], -1) / zoom[:, None]  # where a step along a row goes
    down = np.stack([-np.sin(turn), np.cos(turn)], -1) / zoom[:, None]
    shift = rng.uniform(-2 * how.shift, 2 * how.shift, (count, 2))  # the grid's edge is 2 long
    rows, columns = ((2 * np.arange(side) + 1) / side - 1 for side in hu.shape[2:])
    # as functional.affine_grid, in a tenth of the time
    along_row = torch.from_numpy((columns[:, None] * across[:, None] + shift[:, None]).astype(np.float32))  # (N, W, 2)
    along_column = torch.from_numpy((rows[:, None] * down[:, None]).astype(np.float32))  # (N, H, 2)
    field = along_row[:, None] + along_column[:, :, None]

    def warp(images: NDArray[np.int16 | np.uint8], mode: str) -> Tensor:
        x = torch.from_numpy(images).to(torch.float32)
        return functional.grid_sample(x, field, mode, padding_mode="border", align_corners=False)

    offset = torch.from_numpy(rng.uniform(-how.offset_hu, how.offset_hu, (count, 1, 1, 1)).astype(np.float32))
    gain = torch.from_numpy(rng.uniform(1 - how.gain, 1 + how.gain, (count, 1, 1, 1)).astype(np.float32))
    several = labels.reshape(count, -1, *hu.shape[2:])
    there = warp(several, "nearest").to(torch.uint8).reshape(labels.shape)
    return warp(hu, "bilinear").mul_(gain).add_(offset), there
