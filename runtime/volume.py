"""Label maps to findings: millilitres by each slice's own geometry, connected parts, where most of it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cc3d
import numpy as np

from runtime.coniglobus import measure_abc
from runtime.types import Finding, SliceLabels, SliceStack

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from numpy.typing import NDArray


def volumes_ml(stack: SliceStack, voxels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Volume of each class in millilitres, ``(C,)``: V = sum over slices of X Y T W.

    As in Peng et al., Front. Neurosci. 16:965680 (2022), with each slice's own T along the normal.

    Parameters
    ----------
    stack : geometry of N slices
    voxels : ``(N, C)`` pixels per slice and class, in the stack's order

    """
    return stack.voxel_ml @ voxels


def measure(stack: SliceStack, slices: Mapping[str, SliceLabels], classes: Sequence[str]) -> tuple[Finding, ...]:
    """Every class of blood that the labels show anywhere, largest volume first, however small.

    Parameters
    ----------
    stack : order and geometry
    slices : what the network said of each of the stack's keys
    classes : names by label; 0 is background

    """
    ordered = [slices[key] for key in stack.keys]
    voxels = np.stack([one.voxels for one in ordered])  # (N, C)
    evidence = np.stack([one.evidence for one in ordered])
    total_ml = volumes_ml(stack, voxels)
    shown = [c for c in range(1, len(classes)) if total_ml[c] > 0]
    if not shown:
        return ()
    bleeding = np.flatnonzero(voxels[:, 1:].any(axis=1))
    some = slice(bleeding[0], bleeding[-1] + 1)
    labels = _around_blood(ordered[some], voxels[some, 1:].any(axis=1))
    parts = cc3d.connected_components(labels, connectivity=26)  # (n, h, w)
    sizes_ml = _components_ml(stack.voxel_ml[some], labels, parts, len(classes))
    spacing_mm = stack.planes[bleeding[0]].spacing_mm
    largest = [max(of_class, key=of_class.__getitem__, default=0) for of_class in sizes_ml]
    findings = [
        Finding(
            label=c,
            name=classes[c],
            volume_ml=float(total_ml[c]),
            components=len(sizes_ml[c]),
            largest_ml=sizes_ml[c][largest[c]],
            abc2_ml=_abc2_ml(parts, largest[c], voxels[some, c] > 0, spacing_mm, stack.thickness_mm[some]),
            probability=float(evidence[voxels[:, c] > 0, c].max()),
            keys=tuple(stack.keys[place] for place in np.flatnonzero(voxels[:, c])),
            key_slice=stack.keys[int(np.argmax(voxels[:, c] * stack.voxel_ml))],
        )
        for c in shown
    ]
    return tuple(sorted(findings, key=lambda finding: -finding.volume_ml))


def _around_blood(slices: Sequence[SliceLabels], bleeding: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The labels of slices, ``(n, h, w)``, cut to where there is blood on any: a whole head is much to look through."""
    blood = np.zeros_like(slices[0].labels)
    for index in np.flatnonzero(bleeding):
        np.maximum(blood, slices[index].labels, out=blood)
    (top, bottom), (left, right) = (np.flatnonzero(blood.any(axis))[[0, -1]] for axis in (1, 0))
    return np.stack([one.labels[top : bottom + 1, left : right + 1] for one in slices])


def in_a_row(stack: SliceStack, keys: Collection[str]) -> int:
    """Most neighbours in a row among some of a stack's slices; beyond a gap there is no neighbour."""
    wanted, ends = set(keys), {gap.after_key for gap in stack.gaps}
    longest = count = 0
    for key in stack.keys:
        count = count + 1 if key in wanted else 0
        longest = max(longest, count)
        if key in ends:
            count = 0
    return longest


def _components_ml(
    voxel_ml: NDArray[np.float64], labels: NDArray[np.uint8], parts: NDArray[np.integer], classes: int
) -> list[dict[int, float]]:
    """Volumes in ml of the connected parts (26-neighbourhood) of each class, by their numbers in `parts`."""
    sizes = np.zeros(int(parts.max()) + 1)
    label_of = np.zeros(len(sizes), np.uint8)
    for each_ml, part, label in zip(voxel_ml, parts, labels, strict=True):
        blood = label > 0
        ids = part[blood]
        sizes += np.bincount(ids, minlength=len(sizes)) * each_ml
        label_of[ids] = label[blood]
    return [{int(part): float(sizes[part]) for part in np.flatnonzero(label_of == c)} for c in range(classes)]


def _abc2_ml(
    parts: NDArray[np.integer],
    part: int,
    shown: NDArray[np.bool_],
    spacing_mm: tuple[float, float],
    thickness_mm: NDArray[np.float64],
) -> float:
    """ABC/2 of one connected part, measured in its bounding box; `shown`: ``(n,)`` slices that may have some of it."""
    masks = {index: parts[index] == part for index in np.flatnonzero(shown)}
    masks = {index: mask for index, mask in masks.items() if mask.any()}
    slices, volume = list(masks), np.stack(list(masks.values()))
    area = volume.any(axis=0)
    rows, columns = np.flatnonzero(area.any(axis=1)), np.flatnonzero(area.any(axis=0))
    box = volume[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return measure_abc(box, spacing_mm, thickness_mm[slices]).volume_ml
