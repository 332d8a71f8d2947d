"""A NIfTI mask beside a DICOM series: taken voxel by voxel, where its grid is the series' own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from training.sources import labels, nifti
from training.sources.dicom_image import corners_lps
from training.sources.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from runtime.types import SliceStack

AGREE_MM = 0.1  # how far a voxel may lie from its pixel: headers hold rounded quaternions
_REMEDY = "export the mask on the series' own slices; nothing is resampled here"


def read_labels(
    path: Path, stack: SliceStack, shape: tuple[int, int], classes: Mapping[str | int, int]
) -> NDArray[np.uint8]:
    """Label maps of a series from a mask with any order of axes, ``(N, H, W)`` uint8, in the stack's order.

    The affine (RAS) must put a voxel within 0.1 mm of every slice's corner pixels (LPS). One affine has one step, so a
    series whose steps vary can't have such a mask; a tilted one can, with a sheared affine.

    Parameters
    ----------
    stack : geometry of the series
    shape : rows and columns of its images
    classes : class index by mask value

    Raises
    ------
    SourceError : a broken file, a grid that is not the series', or values that are not in `classes`

    """
    values, affine_ras = nifti.read(path, None)
    wanted = (len(stack), *shape)
    if sorted(values.shape) != sorted(wanted):
        raise SourceError(path, f"shape {values.shape} beside a series of {wanted}", _REMEDY)
    corners = np.stack([corners_lps(plane, shape) for plane in stack.planes])  # (N, 4, 3)
    corners_ras = corners * (-1, -1, 1)
    exact = (corners_ras - affine_ras[:3, 3]) @ np.linalg.inv(affine_ras[:3, :3]).T
    voxels = np.rint(exact).astype(np.int64)  # (N, 4, 3)
    apart_mm = np.linalg.norm(voxels @ affine_ras[:3, :3].T + affine_ras[:3, 3] - corners_ras, axis=2).max()
    if apart_mm > AGREE_MM:
        raise SourceError(path, f"its voxels lie up to {apart_mm:.2f} mm from pixels (allowed: {AGREE_MM} mm)", _REMEDY)
    first = voxels[:, 0]
    across, down = ((voxels[0, i] - first[0]) // max(length - 1, 1) for i, length in ((1, shape[1]), (2, shape[0])))
    at = (
        first[:, np.newaxis, np.newaxis]
        + np.arange(shape[0])[:, np.newaxis, np.newaxis] * down
        + np.arange(shape[1])[:, np.newaxis] * across
    )  # (N, H, W, 3)
    last = first + (shape[0] - 1) * down + (shape[1] - 1) * across
    if (last != voxels[:, 3]).any() or (at < 0).any() or (at >= values.shape).any():
        raise SourceError(path, "its grid is not the series'", _REMEDY)
    return labels.map_values(values[at[..., 0], at[..., 1], at[..., 2]], classes, path)
