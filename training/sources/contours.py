"""Closed contours to pixels by the even-odd rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

GRAIN_PX = (
    1e-4  # finer differences are rounding: a vertex meant for a pixel's centre must not fall to either side of it
)


def fill(polygons: Iterable[NDArray[np.float64]], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Pixels whose centres an odd number of the polygons enclose, ``(H, W)``.

    A polygon within another is a hole, and a keyhole's two edges cancel. A centre that lies exactly on an edge belongs
    to the polygon if that is the upper or the left edge, so polygons that share an edge share no pixel, and one with
    its vertices on pixel centres has as many pixels as its area.

    Parameters
    ----------
    polygons : ``(P, 2)`` each: row and column of the vertices, a pixel's centre being whole numbers; closed by itself
    shape : rows and columns of the image; what lies outside of it is cut off

    """
    rows, columns = shape
    toggles = np.zeros((rows, columns + 1), np.int32)  # where, along each row, inside turns to outside and back
    for polygon in polygons:
        start = np.rint(polygon / GRAIN_PX) * GRAIN_PX
        end = np.roll(start, -1, axis=0)
        first = np.ceil(np.minimum(start[:, 0], end[:, 0])).astype(int)
        count = np.ceil(np.maximum(start[:, 0], end[:, 0])).astype(int) - first  # rows that each edge crosses
        edge = np.repeat(np.arange(len(start)), count)
        row = first[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count)
        slope = (end - start)[edge, 1] / (end - start)[edge, 0]
        column = start[edge, 1] + (row - start[edge, 0]) * slope
        column = np.ceil(np.rint(column / GRAIN_PX) * GRAIN_PX)
        inside = (row >= 0) & (row < rows)
        np.add.at(toggles, (row[inside], np.clip(column[inside], 0, columns).astype(int)), 1)
    return toggles.cumsum(axis=1)[:, :columns] % 2 == 1
