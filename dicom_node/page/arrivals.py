"""What lies in a spool, looked at every second: only folders that have changed are listed again."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dicom_node.images import part10
from dicom_node.storage import spool

if TYPE_CHECKING:
    from pathlib import Path

SETTLED_S = 2.0  # a folder that changed less long ago is listed again: its time stamp may not tell of the last file


@dataclass(frozen=True, slots=True)
class Arrival:
    """What has come of one series.

    Attributes
    ----------
    study, series : their names on disk
    study_uid, series_uid : as its files have them
    count : files
    first, last : when the first and the last of them came, seconds since the epoch
    changed : when the last of them got its name, which is a moment later

    """

    study: str
    series: str
    study_uid: str
    series_uid: str
    count: int
    first: float
    last: float
    changed: float


class Arrivals:
    """The series of a spool. Not for use from several threads."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[str, tuple[int, Arrival | None]] = {}  # by the series' folder

    def look(self) -> list[Arrival]:
        """Every series that has a file. One that is being removed may be left out, or not yet."""
        settled = time.time_ns() - int(SETTLED_S * 1e9)
        known: dict[str, tuple[int, Arrival | None]] = {}
        for study in self._root.glob(spool.OURS):
            with suppress(OSError), os.scandir(study) as entries:
                for entry in entries:
                    with suppress(OSError):
                        changed = entry.stat().st_mtime_ns
                        before = self._known.get(entry.path)
                        if before is None or before[0] != changed or changed >= settled:
                            before = changed, _arrival(study / entry.name, before[1] if before else None)
                        known[entry.path] = before
        self._known = known
        return [arrival for _, arrival in known.values() if arrival]


def files(root: Path, study: str, series: str) -> list[Path]:
    """Files of a series in the order of their names; none where it is gone."""
    with suppress(OSError):
        return sorted(path for path in (root / study / series).iterdir() if path.suffix == ".dcm")
    return []


def _arrival(folder: Path, before: Arrival | None) -> Arrival | None:
    """List a folder; that of which a file has its UIDs needs no second look into one."""
    with os.scandir(folder) as entries:
        times = [entry.stat().st_mtime for entry in entries if entry.name.endswith(".dcm")]
    if not times:
        return None
    names = folder.parent.name, folder.name
    uids = (before.study_uid, before.series_uid) if before else _uids(folder, names)
    return Arrival(*names, *uids, len(times), min(times), max(times), folder.stat().st_mtime)


def _uids(folder: Path, names: tuple[str, str]) -> tuple[str, str]:
    if any(name.startswith(spool.HASHED) for name in names):
        with suppress(part10.DataSetError, OSError, StopIteration):
            with next(folder.glob("*.dcm")).open("rb") as file:
                study_uid, series_uid = part10.names(file)[2:4]
            return study_uid, series_uid
    return names
