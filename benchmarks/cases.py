"""What is measured on: phantom heads with two bleeds as DICOM series, each round's under UIDs of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pydicom import dcmread
from pydicom.filebase import DicomBytesIO

from dicom_node.simulation import phantom
from training.lesions import Lesion
from training.phantom import Scan, make

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from runtime.types import Slice

BLOOD = (Lesion("intracerebral", 30), Lesion("subdural", 14))
DRAWN = 40
UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID")


@dataclass(frozen=True)
class Head:
    """A series of one phantom: its files as bytes, and the UIDs in them that make it this series."""

    images: tuple[bytes, ...]
    uids: tuple[bytes, ...]

    @classmethod
    def of(cls, paths: Sequence[Path]) -> Head:
        images = tuple(path.read_bytes() for path in paths)
        return cls(images, tuple(sorted({uid for image in images for uid in _uids(image)})))

    def write(self, folder: Path, number: int) -> list[Path]:
        """The same head as another study: with the last six figures of each UID replaced."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for index, image in enumerate(self.images):
            changed = image
            for uid in self.uids:
                changed = changed.replace(uid, uid[:-6] + b"%06d" % number)
            paths.append(folder / f"{index:04d}.dcm")
            paths[-1].write_bytes(changed)
        return paths


def head(slices: int, folder: Path, *, matrix: int = 512, seed: int = 21, lesions: Sequence[Lesion] = BLOOD) -> Head:
    """A head that bleeds; written to `folder` first.

    More than `DRAWN` slices are those again, in as many thinner parts each: drawing thousands would take minutes.
    """
    made = make(tuple(lesions), Scan(slices=min(slices, DRAWN), matrix=matrix), seed=seed)
    return Head.of(phantom.write(stretched(made.slices, slices), folder))


def stretched(slices: Sequence[Slice], count: int) -> list[Slice]:
    """As many slices over the same extent, each pixel for pixel the one that lay there."""
    if count == len(slices):
        return list(slices)
    share = len(slices) / count
    first, second = slices[0].plane.origin_lps, slices[1].plane.origin_lps
    step = [share * (b - a) for a, b in zip(first, second, strict=True)]
    thickness_mm = share * (slices[0].plane.thickness_mm or 0) or None
    made = []
    for index in range(count):
        x, y, z = (at + index * by for at, by in zip(first, step, strict=True))
        one = slices[int(index * share)]
        plane = replace(one.plane, origin_lps=(x, y, z), thickness_mm=thickness_mm)
        made.append(replace(one, key=f"{index}", plane=plane))
    return made


def _uids(image: bytes) -> Iterator[bytes]:
    """UIDs that phantoms derive from their content, and no others."""
    header = dcmread(DicomBytesIO(image), stop_before_pixels=True)
    for keyword in UIDS:
        yield str(header[keyword].value).encode()
