"""A folder of DICOM files instead of a network: the node's analysis without the node."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pydicom
from pydicom.errors import InvalidDicomError

from dicom_node.analysis import Analyser, Outcome, Series
from dicom_node.uids import derive
from runtime.errors import ScansideError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


class FolderError(ScansideError):
    """A folder without anything to analyse."""


@dataclass(frozen=True, slots=True)
class Analysed:
    """One series of the folder and what became of it; results lie in `folder`."""

    series_uid: str
    files: int
    outcome: Outcome
    folder: Path


def find(folder: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """DICOM files under a folder by SeriesInstanceUID, and the files that are none.

    Raises
    ------
    FolderError : no such folder, or no DICOM file in it

    """
    if not folder.is_dir():
        raise FolderError(f"{folder} is no folder")
    series: defaultdict[str, list[Path]] = defaultdict(list)
    others = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["SeriesInstanceUID"])
        except (InvalidDicomError, OSError, EOFError):
            others.append(path)
            continue
        series[str(header.get("SeriesInstanceUID", ""))].append(path)
    if not series:
        raise FolderError(f"{folder}: no DICOM file in it ({len(others)} other files)")
    return dict(series), others


def analyse(
    analyser: Analyser, series: dict[str, list[Path]], out: Path, on_image: Callable[[int], None]
) -> list[Analysed]:
    """Analyse each series as the node would when it closes; its results go into a folder of its own under `out`."""
    done = []
    for series_uid, paths in series.items():
        state = Series()
        for batch in _eights(paths):
            analyser.feed(state, batch)
            on_image(len(batch))
        target = out / (series_uid if series_uid.replace(".", "").isdigit() else derive(series_uid))
        done.append(Analysed(series_uid, len(paths), analyser.close(state, target, revision=1, missing=()), target))
    return done


def _eights(paths: Sequence[Path]) -> list[Sequence[Path]]:
    return [paths[i : i + 8] for i in range(0, len(paths), 8)]
