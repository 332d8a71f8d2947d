"""What every source gives: cases of one patient each, listed first and loaded one at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

Quantity = Literal["HU", "grey"]

DTYPES: dict[str, tuple[type[np.generic], ...]] = {"HU": (np.int16,), "grey": (np.uint8, np.int16)}


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """Images of one patient with the truth beside them.

    Attributes
    ----------
    patient : the unit of every split; never shown in the case's repr
    name : the case's own name, such as the file's path within its data set
    images : ``(N, H, W)``, read-only: int16 Hounsfield units, or uint8 or int16 grey values
    labels : ``(N, H, W)`` uint8, class index per pixel, 0 is background, read-only
    quantity : ``"HU"`` or ``"grey"``: what the values of `images` are
    spacing_mm : distance between slices along their normal (the median where it varies), between rows, between
        columns; None where a picture has none
    origin_mm : ``(N, 3)`` float64, where each slice's first voxel lies along the normal, the rows' axis and the
        columns': what a step that varies and a tilt do; None where slices lie on one another in even steps. Read-only
    thickness_mm : ``(N,)`` float64, what of the normal's axis belongs to each slice, where that is known, read-only
    excluded : (reason, slices) of what the source has and this case has not
    notes : sentences on what else is to be known of this case

    """

    patient: str = field(repr=False)
    name: str
    images: NDArray[np.uint8] | NDArray[np.int16] = field(repr=False)
    labels: NDArray[np.uint8] = field(repr=False)
    quantity: Quantity
    spacing_mm: tuple[float, float, float] | None = None
    thickness_mm: NDArray[np.float64] | None = field(default=None, repr=False)
    origin_mm: NDArray[np.float64] | None = field(default=None, repr=False)
    excluded: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.images.dtype not in DTYPES[self.quantity]:
            raise TypeError(f"{self.name}: {self.images.dtype} is no dtype of {self.quantity} values")
        if self.images.ndim != 3 or self.labels.shape != self.images.shape or self.labels.dtype != np.uint8:
            raise TypeError(
                f"{self.name}: labels must be uint8 (N, H, W) as the images, not {self.labels.dtype} "
                f"{self.labels.shape} beside {self.images.shape}"
            )
        if self.thickness_mm is not None:
            if self.thickness_mm.shape != (len(self.images),):
                raise TypeError(f"{self.name}: {self.thickness_mm.shape} thicknesses of {len(self.images)} slices")
            self.thickness_mm.setflags(write=False)
        if self.origin_mm is not None:
            if self.origin_mm.shape != (len(self.images), 3):
                raise TypeError(f"{self.name}: origins {self.origin_mm.shape} of {len(self.images)} slices")
            self.origin_mm.setflags(write=False)
        self.images.setflags(write=False)
        self.labels.setflags(write=False)

    @property
    def voxel_ml(self) -> NDArray[np.float64] | None:
        """Volume of one voxel of each slice in millilitres, ``(N,)``; None where the source has no spacing."""
        if self.spacing_mm is None:
            return None
        slice_mm, row_mm, column_mm = self.spacing_mm
        thickness_mm = np.full(len(self.images), slice_mm) if self.thickness_mm is None else self.thickness_mm
        return thickness_mm * (row_mm * column_mm / 1000.0)


@dataclass(frozen=True, slots=True)
class Entry:
    """A case that is listed and not yet read.

    Attributes
    ----------
    patient : the unit of every split; never shown in the entry's repr
    name : the case's own name
    load : reads the case; can be pickled, so that processes can share the work

    """

    patient: str = field(repr=False)
    name: str
    load: Callable[[], Case] = field(repr=False)
