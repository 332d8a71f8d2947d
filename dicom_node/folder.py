"""A folder of DICOM files instead of a network: the node's analysis without the node."""

from __future__ import annotations

import re
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pydicom

from dicom_node.analysis import decode
from dicom_node.analysis.series import Series
from dicom_node.images.gate import NotAnalysed, Reason
from dicom_node.results.uids import derive
from runtime.errors import ScansideError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pydicom.dataset import Dataset

    from dicom_node.analysis.analyser import Analyser, Outcome
    from runtime.types import Slice


class FolderError(ScansideError):
    """A folder without anything to analyse."""


@dataclass(frozen=True, slots=True)
class Analysed:
    """One series of the folder and what became of it; results lie in `folder`."""

    series_uid: str
    files: int
    outcome: Outcome
    folder: Path
    refused: tuple[tuple[Path, str], ...] = ()  # files and frames that were not analysed, and why


def find(folder: Path) -> tuple[dict[tuple[str, str], list[Path]], list[Path]]:
    """DICOM files under a folder by StudyInstanceUID and SeriesInstanceUID, and the files that are none.

    Each series in the order of its InstanceNumbers, so that a slice comes soon after its neighbours.

    Raises
    ------
    FolderError : no such folder, or no DICOM file in it

    """
    if not folder.is_dir():
        raise FolderError(f"{folder} is no folder")
    series: defaultdict[tuple[str, str], list[tuple[int, Path]]] = defaultdict(list)
    others = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        try:
            wanted = ["StudyInstanceUID", "SeriesInstanceUID", "InstanceNumber"]
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=wanted)
            key = (str(header.get("StudyInstanceUID", "")), str(header.get("SeriesInstanceUID", "")))
        except Exception:  # noqa: BLE001  # parsers raise what they like on bytes that are no DICOM; the file is listed
            others.append(path)
            continue
        series[key].append((_instance_number(header), path))
    if not series:
        raise FolderError(f"{folder}: no DICOM file in it ({len(others)} other files)")
    return {key: [path for _, path in sorted(found)] for key, found in series.items()}, others


def slices(paths: list[Path]) -> tuple[list[Slice], str, dict[Reason, int]]:
    """Decode the slices of one series.

    Returns
    -------
    the slices, the scanner's Manufacturer and ManufacturerModelName, and how many images were turned away and why

    """
    decoded, scanner = {}, ""
    refused: Counter[Reason] = Counter()
    for path in paths:
        for image in decode.read(path):
            if isinstance(image, NotAnalysed):
                refused[image.reason] += 1
                continue
            header, slice_ = image
            decoded.setdefault(slice_.key, slice_)
            named = (str(header.get(keyword) or "") for keyword in ("Manufacturer", "ManufacturerModelName"))
            scanner = scanner or " ".join(name for name in named if name)
    return list(decoded.values()), scanner, refused


def _instance_number(header: Dataset) -> int:
    try:
        return int(header.InstanceNumber)
    except (AttributeError, TypeError, ValueError):  # missing, empty, or not a number: any place will do
        return 0


def prepare(out: Path) -> None:
    """Make the folder for results, before the work that they cost.

    Raises
    ------
    FolderError : something else is there
    OSError : it can't be made or written

    """
    if out.exists() and not out.is_dir():
        raise FolderError(f"{out} is not a folder: choose another with --out")
    out.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:  # it names the file that could not be made, not the folder
        raise OSError(error.errno, error.strerror, str(out)) from None


def analyse(
    analyser: Analyser, series: dict[tuple[str, str], list[Path]], out: Path, on_image: Callable[[int], None]
) -> list[Analysed]:
    """Analyse each series as the node would when it closes; its results go into a folder of its own under `out`.

    Raises
    ------
    FolderError : a series has results there already

    """
    targets = {key: _target(*key, out) for key in series}
    if taken := [target for target in targets.values() if target.is_dir() and any(target.iterdir())]:
        raise FolderError(f"{taken[0]} holds the results of an earlier run: choose another --out, or remove it")
    done = []
    for key, paths in series.items():
        state, refused = Series(), []
        for path in paths:
            (seen,) = analyser.feed(state, [path])
            refused += [(path, str(one)) for one in seen.refusals]
            on_image(1)
        others = [files for other, files in series.items() if other[0] == key[0] and other != key]
        outcome = analyser.close(state, targets[key], revision=1, missing=(), siblings=others)
        done.append(Analysed(key[1], len(paths), outcome, targets[key], tuple(refused)))
    return done


def _target(study_uid: str, series_uid: str, out: Path) -> Path:
    safe = re.fullmatch(r"[0-9.]{1,64}", series_uid)
    return out / (series_uid if safe else str(derive(study_uid, series_uid)))
