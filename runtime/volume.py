"""Label maps to findings: millilitres by each slice's own geometry, connected parts, where most of it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cc3d
import numpy as np

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
    total_ml = volumes_ml(stack, voxels)
    shown = [c for c in range(1, len(classes)) if total_ml[c] > 0]
    if not shown:
        return ()
    parts = _components_ml(stack, ordered, len(classes))
    findings = [
        Finding(
            label=c,
            name=classes[c],
            volume_ml=float(total_ml[c]),
            components=len(parts[c]),
            largest_ml=float(max(parts[c])),
            probability=float(max(one.evidence[c] for one in ordered if one.voxels[c])),
            keys=tuple(key for key, one in zip(stack.keys, ordered, strict=True) if one.voxels[c]),
            key_slice=stack.keys[int(np.argmax(voxels[:, c] * stack.voxel_ml))],
        )
        for c in shown
    ]
    return tuple(sorted(findings, key=lambda finding: -finding.volume_ml))


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


def _components_ml(stack: SliceStack, ordered: Sequence[SliceLabels], classes: int) -> list[list[float]]:
    """Volumes in ml of the connected parts (26-neighbourhood) of each class."""
    bleeding = np.flatnonzero([one.voxels[1:].any() for one in ordered])
    some = slice(bleeding[0], bleeding[-1] + 1)  # a whole head of thin slices would be much to look through
    volume = np.stack([one.labels for one in ordered[some]])  # (N, H, W)
    parts = cc3d.connected_components(volume, connectivity=26)
    sizes = np.zeros(int(parts.max()) + 1)
    labels = np.zeros(len(sizes), np.uint8)
    for voxel_ml, part, label in zip(stack.voxel_ml[some], parts, volume, strict=True):
        blood = label > 0
        if not blood.any():
            continue
        ids = part[blood]
        sizes += np.bincount(ids, minlength=len(sizes)) * voxel_ml
        labels[ids] = label[blood]
    return [sizes[labels == c].tolist() for c in range(classes)]
