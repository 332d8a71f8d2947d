"""What ranges and verdicts are measured on: whole series, and the slices chosen among them."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from zipfile import BadZipFile, ZipFile, is_zipfile

import numpy as np

from runtime import geometry
from runtime.errors import ScansideError
from runtime.types import Plane, SliceLabels, SliceStack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from runtime.geometry import View
    from runtime.session import Session
    from runtime.types import Slice

HU = "hu"  # the array that makes an .npz a series
SIZES_ML = (2.0, 15.0)  # a class's blood in a series: small, middling, large


class SampleError(ScansideError):
    """Samples that can't be read, are too few, or were used for something that forbids this use."""


@dataclass(frozen=True, slots=True)
class Series:
    """A series of slices that the network may see.

    Attributes
    ----------
    name : for people; of a patient's series a hash, never a UID
    scanner : manufacturer and model; empty where nothing says
    hu : ``(N, H, W)`` int16, in the order of the stack
    stack : geometry, with keys ``"0"`` to ``"N - 1"``
    sha256 : of the Hounsfield units
    study : a hash of what else it belongs to, of a DICOM series its study; of arrays the pixels'

    """

    name: str
    scanner: str
    hu: NDArray[np.int16]
    stack: SliceStack
    sha256: str
    study: str

    @classmethod
    def of(
        cls,
        name: str,
        hu: NDArray[np.int16],
        spacing_mm: tuple[float, float],
        thickness_mm: NDArray[np.float64],
        scanner: str = "",
    ) -> Series:
        """Slices in order, with the distance between rows and columns and each slice's own thickness, ``(N,)``."""
        if hu.ndim != 3 or hu.dtype != np.int16 or not len(hu):
            raise SampleError(f"{name}: slices are int16 HU of shape (N, H, W), not {hu.dtype} {hu.shape}")
        below = np.cumsum(thickness_mm) - thickness_mm / 2
        planes = tuple(Plane((0.0, 0.0, float(z)), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), spacing_mm) for z in below)
        keys = tuple(str(i) for i in range(len(hu)))
        stack = SliceStack(keys, planes, np.asarray(thickness_mm, np.float64).copy(), tilt_deg=0.0)
        digest = hashlib.sha256(np.ascontiguousarray(hu)).hexdigest()
        return cls(name, scanner, hu, stack, digest, study=digest)

    @classmethod
    def stacked(cls, name: str, slices: Sequence[Slice], scanner: str = "", study: str = "") -> Series:
        """Slices in any order, with the planes that they lie in.

        Raises
        ------
        GeometryError : they make no stack
        SampleError : of different sizes

        """
        if len({one.hu.shape for one in slices}) > 1:
            raise SampleError(f"{name}: slices of different sizes")
        by_key = {one.key: one for one in slices}
        stack = geometry.stack({one.key: one.plane for one in slices})
        hu = np.stack([by_key[key].hu for key in stack.keys])
        renamed = replace(stack, keys=tuple(str(i) for i in range(len(stack))), gaps=(), repeated=())
        digest = hashlib.sha256(hu).hexdigest()
        return cls(name, scanner, hu, renamed, digest, study=study or digest)

    def views(self, view: View) -> list[NDArray[np.int16]]:
        """What the network is shown: ``(shown, H, W)``, as often as it takes to answer every slice."""
        return [self.hu[shown] for shown, _ in view.over(len(self.hu))]

    def answered(self, session: Session, view: View, batch: int = 1) -> dict[str, SliceLabels]:
        """Labels of every slice by key."""
        labels: dict[str, SliceLabels] = {}
        planned = view.over(len(self.hu))
        for start in range(0, len(planned), batch):
            some = planned[start : start + batch]
            answers = session.infer(self.hu[np.stack([shown for shown, _ in some])])
            for number, (_, places) in enumerate(some):
                first = number * view.answered
                labels |= dict(zip(map(str, places.tolist()), answers[first : first + len(places)], strict=True))
        return labels


def holds_series(path: Path) -> bool:
    """Whether an ``.npz`` is one that `read_arrays` is for: others, such as a phantom's truth, may lie beside it."""
    if not is_zipfile(path):
        return True  # and `read_arrays` says what is wrong with it
    with ZipFile(path) as archive:
        return f"{HU}.npy" in archive.namelist()


def read_arrays(path: Path) -> Series:
    """Read a series from ``.npz``: ``hu`` (N, H, W) int16, ``spacing_mm`` of rows and columns, ``thickness_mm``.

    Raises
    ------
    SampleError : not such a file

    """
    if not path.exists():
        raise SampleError(f"{path}: no such file or folder")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            hu, spacing, thickness = (arrays[key] for key in (HU, "spacing_mm", "thickness_mm"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, BadZipFile) as error:
        wanted = "hu (N, H, W) int16, spacing_mm (rows, columns) and thickness_mm"
        raise SampleError(f"{path}: no .npz with {wanted}: {error}") from None
    try:
        row, column = np.broadcast_to(np.asarray(spacing, float), 2).tolist()
        thick = np.broadcast_to(np.asarray(thickness, float), len(hu))
    except (ValueError, TypeError) as error:
        raise SampleError(f"{path}: spacing_mm or thickness_mm do not fit the slices: {error}") from None
    series = Series.of(path.stem, hu, (row, column), thick)
    if not np.isfinite(series.stack.voxel_ml).all() or (series.stack.voxel_ml <= 0).any():
        raise SampleError(f"{path}: spacing_mm {spacing} and thickness_mm are not all above zero")
    return series


def check_distinct(series: Sequence[Series]) -> None:
    """Refuse the same pixels twice: they would count twice, or lie on both sides of a division.

    Raises
    ------
    SampleError

    """
    if len({one.sha256 for one in series}) < len(series):
        raise SampleError("two series with the same pixels: each may be there once")


@dataclass(frozen=True, slots=True)
class Sample:
    """One chosen view and why it is there.

    Attributes
    ----------
    series, slice : where it is from: name, and place in the stack
    sha256 : of the Hounsfield units that the network sees
    strata : what it stands for, such as ``"subdural < 2 ml"``, ``"bone"``, ``"scanner GE Revolution"``
    hu : ``(shown, H, W)`` int16

    """

    series: str
    slice: int
    sha256: str
    strata: tuple[str, ...]
    hu: NDArray[np.int16]

    def told(self) -> dict[str, object]:
        """All but the pixels, for the bundle's record."""
        return {"series": self.series, "slice": self.slice, "sha256": self.sha256, "strata": list(self.strata)}


def strata(
    series: Series,
    labels: Mapping[str, SliceLabels],
    classes: Sequence[str],
) -> list[tuple[str, ...]]:
    """What each slice of a series stands for: classes with how much of them the series has, content, scanner.

    Without anyone's outlines: `labels` are the network's own, in FP32.
    """
    voxels = np.stack([labels[key].voxels for key in series.stack.keys])
    total_ml = series.stack.voxel_ml @ voxels
    told = []
    for place in range(len(series.hu)):
        shown = [c for c in range(1, len(classes)) if voxels[place, c]]
        blood = [f"{classes[c]} {_size(total_ml[c])}" for c in shown] or ["no blood"]
        scanner = [f"scanner {series.scanner}"] if series.scanner else []
        told.append((*blood, _content(series.hu[place]), *scanner))
    return told


def _size(volume_ml: float) -> str:
    small, large = SIZES_ML
    return f"< {small:g} ml" if volume_ml < small else f"< {large:g} ml" if volume_ml < large else f">= {large:g} ml"


def _content(hu: NDArray[np.int16]) -> str:
    """Air, bone or brain: what the slice has unusually much of."""
    if (hu > 300).mean() > 0.08:
        return "bone"
    return "brain" if ((hu > 0) & (hu < 100)).mean() > 0.2 else "air"


def choose(
    series: Iterable[Series],
    session: Session,
    view: View,
    classes: Sequence[str],
    count: int,
    on_series: Callable[[int], None] = lambda _: None,
) -> list[Sample]:
    """Slices that stand for all strata alike: one by one, the slice whose strata are rarest among those taken.

    Parameters
    ----------
    session : FP32
    count : how many, fewer where there are fewer

    """
    offered: list[Sample] = []
    for one in series:
        kinds = strata(one, one.answered(session, view), classes)
        for shown, answered in view.over(len(one.hu)):
            hu = one.hu[shown]
            digest = hashlib.sha256(np.ascontiguousarray(hu)).hexdigest()
            of_view = tuple(dict.fromkeys(kind for place in answered for kind in kinds[place]))
            offered.append(Sample(one.name, int(answered[0]), digest, of_view, hu))
        on_series(1)
    offered.sort(key=lambda sample: sample.sha256)  # an order that no folder decides
    taken: list[Sample] = []
    had: Counter[str] = Counter()
    while offered and len(taken) < count:
        rarest = max(offered, key=lambda sample: sum(0.25 ** had[kind] for kind in sample.strata))
        offered.remove(rarest)
        taken.append(rarest)
        had.update(rarest.strata)
    return taken
