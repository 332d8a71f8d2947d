"""What scanners say of what they send, kept in the journal: steps that they perform, and the instances of a series.

A list of instances is evidence. What a step has brought forth is all there is of a series: with it, the series is
complete, and without some of it, it is not, however its association ended. A request for commitment lists what was
sent so far, which is as good as the orderly end of an association.
"""

from __future__ import annotations

import time
from enum import StrEnum
from typing import TYPE_CHECKING

from dicom_node.storage.spool import file_name

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from dicom_node.storage.database import Execute
    from dicom_node.storage.journal import Journal


class Source(StrEnum):
    """Who announced an instance."""

    STEP = "step"
    COMMITMENT = "commitment"


class StepState(StrEnum):
    """Performed Procedure Step Status (PS3.3 C.4.14)."""

    IN_PROGRESS = "IN PROGRESS"
    COMPLETED = "COMPLETED"
    DISCONTINUED = "DISCONTINUED"


class Announced:
    """Steps and instances that scanners have announced. Safe to use from many threads.

    Parameters
    ----------
    journal : where they are kept

    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def begin_step(self, sop_uid: str, calling_ae: str) -> bool:
        """Keep a step that is in progress; False where it is there already."""
        with self._journal.transaction() as execute:
            row = (sop_uid, calling_ae, StepState.IN_PROGRESS.value, time.time())
            return bool(execute("INSERT INTO step VALUES (?, ?, ?, ?) ON CONFLICT (sop_uid) DO NOTHING", row).rowcount)

    def state_of(self, sop_uid: str) -> StepState | None:
        """State of a step; None for one that nobody began."""
        with self._journal.statements() as execute:
            row = execute("SELECT state FROM step WHERE sop_uid = ?", (sop_uid,)).fetchone()
        return StepState(row["state"]) if row else None

    def end_step(self, sop_uid: str, state: StepState, series: Mapping[str, Collection[str]]) -> None:
        """Keep a step's end, and the SOP Instance UIDs of each series that it brought forth."""
        with self._journal.transaction() as execute:
            execute("UPDATE step SET state = ?, changed = ? WHERE sop_uid = ?", (state.value, time.time(), sop_uid))
            _announce(execute, series, Source.STEP)

    def announce(self, series: Mapping[str, Collection[str]]) -> None:
        """Keep the SOP Instance UIDs that a request for commitment has of series."""
        with self._journal.transaction() as execute:
            _announce(execute, series, Source.COMMITMENT)

    def of(self, series_uid: str, source: Source) -> frozenset[str]:
        """SOP Instance UIDs that were announced of a series; empty where nobody said anything."""
        with self._journal.statements() as execute:
            rows = execute(
                "SELECT sop_uid FROM announced WHERE series_uid = ? AND source = ?", (series_uid, source.value)
            ).fetchall()
        return frozenset(row["sop_uid"] for row in rows)

    def names(self, series_uid: str) -> tuple[frozenset[str], frozenset[str]]:
        """What a series' step lists, and what was asked to be committed of it, by their names in the spool."""
        step, committed = (
            frozenset(map(file_name, self.of(series_uid, source))) for source in (Source.STEP, Source.COMMITMENT)
        )
        return step, committed


def _announce(execute: Execute, series: Mapping[str, Collection[str]], source: Source) -> None:
    for series_uid, sop_uids in sorted(series.items()):
        for one in sorted(sop_uids):  # two nodes that are told the same must not wait for each other
            row = (series_uid, one, source.value, time.time())
            execute(
                "INSERT INTO announced (series_uid, sop_uid, source, announced) VALUES (?, ?, ?, ?)"
                " ON CONFLICT (series_uid, sop_uid, source) DO UPDATE SET announced = excluded.announced",
                row,
            )
