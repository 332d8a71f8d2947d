"""One series while it is open: what has come of it, and what the network has said so far."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np

from dicom_node.analysis import decode
from dicom_node.images.gate import NotAnalysed
from dicom_node.results import picture, source
from runtime.evidence import Evidence

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from pydicom.dataset import Dataset

    from runtime.types import ModelIdentity, Plane, Slice, SliceLabels

KEPT_B = 32 << 20  # of HU of each open series, for the key slices: 64 slices of 512 x 512
TILES_B = 32 << 20  # of tiles: 512 slices of 512 x 512; of more every second one, for an overview has few


@dataclass(frozen=True, slots=True)
class Seen:
    """What became of each image of a file: a plane when it was analysed, a reason when it was turned away."""

    path: Path
    images: list[Plane | NotAnalysed] = field(default_factory=list)

    @property
    def refusals(self) -> list[NotAnalysed]:
        return [image for image in self.images if isinstance(image, NotAnalysed)]


@dataclass(slots=True)
class Series:
    """What is known so far of one series that is still open."""

    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    paths: dict[str, Path] = field(default_factory=dict)  # by the slices' keys, like all below
    headers: dict[str, Dataset] = field(default_factory=dict)
    sources: dict[str, source.Own | Dataset] = field(default_factory=dict)  # as `result_set.make` takes them
    planes: dict[str, Plane] = field(default_factory=dict)
    sizes: set[tuple[int, ...]] = field(default_factory=set)
    order: list[tuple[float, str]] = field(default_factory=list)  # places along the first slice's normal, mm
    recent: dict[str, NDArray[np.int16]] = field(default_factory=dict)  # HU of the last slices
    tiles: dict[str, NDArray[np.uint8]] = field(default_factory=dict)  # slices as the overview shows them
    _untiled: list[str] = field(default_factory=list)
    labels: dict[str, SliceLabels] = field(default_factory=dict)
    engines: dict[str, ModelIdentity] = field(default_factory=dict)  # who gave each answer
    looked_at: dict[str, tuple[str, ...]] = field(default_factory=dict)  # what each answer was made from
    files: list[Path] = field(default_factory=list)  # all of them, whatever became of them
    rank: tuple[bool, float] | None = None  # see `dicom_node.analysis.kernel`; None before the first slice
    refused: list[NotAnalysed] = field(default_factory=list)
    repeated: int = 0  # images that say they are one that is here already
    patients: set[str] = field(default_factory=set)  # each PatientID that its slices name
    evidence: Evidence = field(default_factory=Evidence)  # what the labels come to at least
    told: str | None = None  # the highest level of triage that was told before its end
    next_look: int = 0  # slices that have to be here before there is another look at all of them

    def add(self, path: Path, header: Dataset, slice_: Slice, prepared: source.Own | Dataset) -> None:
        """Take a slice in and find its place among the others."""
        self.paths[slice_.key], self.headers[slice_.key], self.sources[slice_.key] = path, header, prepared
        self.planes[slice_.key], self.recent[slice_.key] = slice_.plane, slice_.hu
        self._untiled.append(slice_.key)
        self.sizes.add(slice_.hu.shape)
        if named := str(header.get("PatientID") or "").strip():
            self.patients.add(named)
        normal = next(iter(self.planes.values())).normal_lps
        bisect.insort(self.order, (float(normal @ np.asarray(slice_.plane.origin_lps)), slice_.key))

    def make_tile(self) -> bool:
        """Make the tile of the last slice that has none, while nobody waits; False where there is none to make."""
        while self._untiled:
            key = self._untiled.pop()
            if key in self.recent:
                self.tiles[key] = made = self.tile(key)
                if len(self.tiles) * made.nbytes > TILES_B:
                    for other in list(self.tiles)[1::2]:
                        del self.tiles[other]
                return True
        return False

    @property
    def received(self) -> int:
        """Images that came, also those that were not taken."""
        return len(self.planes) + self.repeated + len(self.refused)

    def doubts(self) -> list[str]:
        """Sentences on what can't be right with its images; without it a report would be final."""
        said = []
        if self.repeated:
            said.append(f"{self.repeated} images carry the SOPInstanceUID of another and were left out")
        if len(self.patients) > 1:
            said.append(f"the slices name {len(self.patients)} patients by PatientID, the results one of them")
        return said

    def answered(self, key: str, labels: SliceLabels, shown: tuple[str, ...], engine: ModelIdentity) -> None:
        """Take what the network says of a slice, having been shown it between these, by this engine."""
        self.labels[key], self.looked_at[key], self.engines[key] = labels, shown, engine
        self.evidence.take(key, self.planes[key], labels)

    def forget(self, least: int) -> None:
        """Let go of HU but of so many last slices, and of as many more as there is room for."""
        each = next((hu.nbytes for hu in self.recent.values()), 1)
        for key in list(self.recent)[: -max(least, KEPT_B // each)]:
            del self.recent[key]

    def grey(self, key: str) -> NDArray[np.uint8]:
        """A slice at the brain window, as pictures show it."""
        return picture.grey(self.hu(key), picture.BRAIN)

    def tile(self, key: str) -> NDArray[np.uint8]:
        """The same as a tile shows it: made before, or now."""
        return self.tiles[key] if key in self.tiles else picture.reduced(self.grey(key))

    def hu(self, key: str) -> NDArray[np.int16]:
        """HU of a slice: one of the last, or decoded again, for keeping all would hold whole series in memory."""
        if key in self.recent:
            return self.recent[key]
        _, slice_ = next(decode.read(self.paths[key], math.inf, source.frame_number(self.headers[key])))
        return slice_.hu
