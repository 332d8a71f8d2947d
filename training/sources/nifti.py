"""NIfTI volumes with a mask each: CT, and MRI as paper 003 uses it.

A case has its slices along the volume's superior axis, its rows to the posterior and its columns to the left, whatever
the order in the file. Nothing is resampled: an oblique volume keeps its voxels and goes by its nearest axes.
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import nibabel
import numpy as np
from nibabel import orientations
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from training.sources import folder, labels, naming
from training.sources.case import Case, Entry
from training.sources.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from training.sources.case import Quantity

PairBy = Literal["affine", "index"]

SUFFIXES = (".nii", ".nii.gz")
AGREE_MM = 0.1  # how far apart the same voxel of image and mask may lie: headers hold rounded quaternions
_SKEW = 1e-3  # cosine between rows and columns from which pixels are no rectangles
_CANONICAL = ("L", "P", "S")
_BROKEN = (OSError, EOFError, ValueError, zlib.error, gzip.BadGzipFile, ImageFileError, HeaderDataError)
_AGAIN = "copy it again from where it came"


@dataclass(frozen=True, slots=True)
class Volume:
    """A NIfTI volume in canonical order.

    Attributes
    ----------
    values : ``(N, H, W)``, slices to the superior, rows to the posterior, columns to the left, scaled by its header
    affine_ras : ``(4, 4)``, slice, row and column index to millimetres to the right, anterior and superior
    file_slice : ``(N,)``, each slice's index along the file's third axis; None where the slices lie along another one

    """

    values: NDArray[Any]
    affine_ras: NDArray[np.float64]
    file_slice: NDArray[np.int64] | None

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between slices along their normal, between rows, between columns."""
        step, down, across = self.affine_ras[:3, :3].T
        normal = np.cross(down, across)
        apart = abs(float(normal @ step)) / float(np.linalg.norm(normal))  # less than the table's step under tilt
        return apart, float(np.linalg.norm(down)), float(np.linalg.norm(across))


def entries(
    images: Path,
    masks: Path,
    *,
    quantity: Quantity,
    classes: Mapping[int, int],
    patient: str,
    mask_suffix: str = "",
    assume: str | None = None,
    pair_by: PairBy = "affine",
) -> tuple[Entry, ...]:
    r"""List volumes (``.nii``, ``.nii.gz``) with their masks, at any depth, one case a volume.

    Parameters
    ----------
    images, masks : two folders; or one, where `mask_suffix` tells the masks apart
    quantity : ``"HU"`` for CT; ``"grey"`` for MRI, whose values stay what they are where int16 holds them and are
        otherwise stretched to 0 to 32,767
    classes : class index of each mask value beside 0
    patient : regular expression with a group named ``patient``, sought in the path within `images` without its suffix
    mask_suffix : what a mask's stem has after its image's, such as ``"_mask"``
    assume : directions that the file's axes point to where its header does not say, such as ``"LAS"``; None refuses
        such files
    pair_by : ``"affine"``: image and mask must lie in the same place, to 0.1 mm; ``"index"``: the mask is taken voxel
        by voxel in the file's order, for masks whose headers are known to be wrong

    Raises
    ------
    SourceError : folders that do not pair, or a pattern that does not name each volume's patient

    """
    labels.check_classes(classes, masks)
    pattern = naming.compile_pattern(patient, images)
    found = []
    for name, (image, mask) in folder.match(images, masks, SUFFIXES, mask_suffix).items():
        whose = naming.find_patient(pattern, name, image)
        found.append(Entry(whose, name, partial(_load, whose, name, image, mask, quantity, classes, assume, pair_by)))
    return tuple(found)


def _load(
    patient: str,
    name: str,
    image: Path,
    mask: Path,
    quantity: Quantity,
    classes: Mapping[int, int],
    assume: str | None,
    pair_by: PairBy,
) -> Case:
    volume, truth = read_pair(image, mask, assume=assume, pair_by=pair_by)
    notes: tuple[str, ...] = ()
    if quantity == "HU":
        values = to_hounsfield(volume.values, image)
    else:
        values, notes = _to_grey(volume.values, image)
    indices = np.ascontiguousarray(labels.map_values(truth, classes, mask))
    thickness_mm = np.full(len(values), volume.spacing_mm[0])
    return Case(patient, name, values, indices, quantity, volume.spacing_mm, thickness_mm, notes=notes)


def read_pair(image: Path, mask: Path, *, assume: str | None, pair_by: PairBy) -> tuple[Volume, NDArray[Any]]:
    """Read a volume, and its mask's values in the same order, ``(N, H, W)``.

    Raises
    ------
    SourceError : a broken file, another shape, or a mask that lies elsewhere

    """
    values, affine_ras = read(image, assume)
    volume = canonical(values, affine_ras, image)
    if pair_by == "index":
        truth, _ = read(mask, "RAS")
        if truth.shape != values.shape:
            raise _other_shape(mask, truth.shape, values.shape)
        return volume, canonical(truth, affine_ras, mask).values
    other = canonical(*read(mask, assume), mask)
    if other.values.shape != volume.values.shape:
        raise _other_shape(mask, other.values.shape, volume.values.shape)
    apart_mm = _apart_mm(volume.affine_ras, other.affine_ras, volume.values.shape)
    if apart_mm > AGREE_MM:
        raise SourceError(
            mask,
            f"lies {apart_mm:.2f} mm from its image (allowed: {AGREE_MM} mm)",
            "resample it onto the image with nearest neighbours; or pair by index, if only its header is wrong",
        )
    return volume, other.values


def read(path: Path, assume: str | None) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Values of a file in its own order, ``(I, J, K)``, and its affine to RAS, ``(4, 4)`` mm.

    Parameters
    ----------
    assume : directions that the axes point to, such as ``"LAS"``, used only where neither sform nor qform is set

    Raises
    ------
    SourceError : a broken file, no three axes, units other than mm, or directions that neither header nor caller say

    """
    try:
        image = nibabel.load(path)
        values = np.asanyarray(image.dataobj)
    except _BROKEN as error:
        raise SourceError(path, f"no NIfTI volume, or truncated ({type(error).__name__})", _AGAIN) from error
    if not isinstance(image, nibabel.Nifti1Image):  # the base of NIfTI-2 too
        raise SourceError(path, f"{type(image).__name__} is no NIfTI volume", "convert it to NIfTI")
    values = values[..., np.newaxis] if values.ndim == 2 else values
    if values.ndim > 3 and values.size == np.prod(values.shape[:3]):
        values = values.reshape(values.shape[:3])
    if values.ndim != 3 or not values.size or values.dtype.names or np.iscomplexobj(values):
        raise SourceError(path, f"{values.dtype} values of shape {values.shape}", "save one scalar volume a file")
    if image.header.get_xyzt_units()[0] not in ("mm", "unknown"):
        raise SourceError(path, f"lengths in {image.header.get_xyzt_units()[0]}", "save it with millimetres")
    return values, _affine(image, path, assume)


def _affine(image: nibabel.Nifti1Image, path: Path, assume: str | None) -> NDArray[np.float64]:
    if image.header["sform_code"] or image.header["qform_code"]:
        affine = np.asarray(image.affine, np.float64)
        if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
            raise SourceError(path, "an affine that spans no space", "repair its header")
        return affine
    if assume is None:
        raise SourceError(
            path,
            "neither sform nor qform is set, so left and right are not known",
            "set one of them, or say which directions to assume, such as LAS",
        )
    if len(assume) != 3 or any(len(set(pair) & set(assume)) != 1 for pair in ("LR", "PA", "IS")):
        raise SourceError(
            path, f"{assume!r} are no three directions", "write one each of L/R, P/A and I/S, such as LAS"
        )
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    zooms = np.append(image.header.get_zooms()[:3], 1.0)[:3]  # a single slice may have two
    for axis, (to, sign) in enumerate(orientations.axcodes2ornt(tuple(assume)).astype(int)):
        affine[to, axis] = sign * zooms[axis]
    return affine


def canonical(values: NDArray[Any], affine_ras: NDArray[np.float64], path: Path) -> Volume:
    """Turn a file's axes into slice, row, column: to the superior, the posterior, the left. A view, not a copy.

    Parameters
    ----------
    values, affine_ras : as `read` gives them

    Raises
    ------
    SourceError : pixels that are no rectangles

    """
    change = orientations.ornt_transform(orientations.io_orientation(affine_ras), orientations.axcodes2ornt(_CANONICAL))
    turned = affine_ras @ orientations.inv_ornt_aff(change, values.shape)
    turned = turned[:, [2, 1, 0, 3]]
    down, across = turned[:3, 1], turned[:3, 2]
    if abs(down @ across) > _SKEW * np.linalg.norm(down) * np.linalg.norm(across):
        raise SourceError(path, "rows and columns are not at right angles", "resample it")
    third = np.broadcast_to(np.arange(values.shape[2]), values.shape)
    numbers = orientations.apply_orientation(third, change).transpose(2, 1, 0)
    along_third = numbers[0, 0, 0] == numbers[0, -1, -1]
    return Volume(
        values=orientations.apply_orientation(values, change).transpose(2, 1, 0),
        affine_ras=turned,
        file_slice=numbers[:, 0, 0].copy() if along_third else None,
    )


def to_hounsfield(values: NDArray[Any], path: Path) -> NDArray[np.int16]:
    """Round to int16, which clips what no scanner writes.

    Raises
    ------
    SourceError : values that are no numbers

    """
    _check_finite(values, path)
    return np.ascontiguousarray(np.clip(np.rint(values), -32768, 32767).astype(np.int16))


def _to_grey(values: NDArray[Any], path: Path) -> tuple[NDArray[np.uint8] | NDArray[np.int16], tuple[str, ...]]:
    """MRI has no unit: whole numbers are kept, and what int16 can't hold is stretched over its positive half."""
    _check_finite(values, path)
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values), ()
    low, high = float(values.min()), float(values.max())
    if low >= -32768 and high <= 32767 and np.array_equal(values, np.rint(values)):
        return np.ascontiguousarray(values.astype(np.int16)), ()
    stretched = np.rint((values.astype(np.float64) - low) * (32767 / max(high - low, 1e-12)))
    note = f"grey values stretched from {low:g} to {high:g} over 0 to 32,767"
    return np.ascontiguousarray(stretched.astype(np.int16)), (note,)


def _check_finite(values: NDArray[Any], path: Path) -> None:
    if not np.isfinite(values).all():
        raise SourceError(path, "values that are no numbers", "replace NaN and infinities, such as by -1024 in a CT")


def _apart_mm(one: NDArray[np.float64], other: NDArray[np.float64], shape: tuple[int, ...]) -> float:
    """Largest distance between the same corner voxels of two volumes."""
    corners = np.stack(np.meshgrid(*[(0, length - 1) for length in shape], [1], indexing="ij"), -1).reshape(-1, 4)
    return float(np.linalg.norm(corners @ (one - other).T, axis=1).max())


def _other_shape(mask: Path, shape: tuple[int, ...], wanted: tuple[int, ...]) -> SourceError:
    return SourceError(mask, f"shape {shape} beside an image of {wanted}", "save the mask on the image's own grid")
