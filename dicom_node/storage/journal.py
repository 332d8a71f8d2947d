"""What the node has decided and what it still owes: a database, never a write per slice (`schema` has its tables).

``series`` says what became of each revision of a series, ``outbox`` has a row per result and destination
(`dicom_node.delivery.outbox`). A result and what is owed for it are written in one transaction, so after a crash
either both are there or neither. One node has a file of SQLite's; several that share a worklist have a database of
PostgreSQL's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from dicom_node.storage.database import JournalError, Sqlite
from dicom_node.storage.postgres import Postgres

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from contextlib import AbstractContextManager

    from dicom_node.storage.database import Database, Execute, Row
    from dicom_node.storage.postgres import Address

# in the order of sending: what a reader needs first, and the largest last
Role = Literal["notice", "sr", "sc", "pdf", "seg"]

TWINS_SINCE = 8  # version of the journal
# results that a node has made, too, as its own records
_TWINS = (
    "SELECT study_uid, series_uid, revision, state, reason, twin.slices, report_json, twin.recorded, twin.node"
    " FROM twin JOIN series USING (study_uid, series_uid, revision)"
)


class RevisionTaken(JournalError):
    """Another node has recorded another result under the same revision of a series."""


class SeriesState(StrEnum):
    ANALYSED = "analysed"
    NOT_ANALYSED = "not_analysed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ResultFile:
    """A result on disk, synced by whoever wrote it."""

    role: Role
    path: Path
    sop_class_uid: str
    sop_uid: str


@dataclass(frozen=True, slots=True)
class SeriesRecord:
    """What became of one revision of a series.

    Attributes
    ----------
    reason : why it was not analysed or failed; None for an analysis
    slices : how many slices of the series had come when it closed
    report_json : the report, None where there is none
    recorded : seconds since the epoch
    node : who recorded it

    """

    study_uid: str
    series_uid: str
    revision: int
    state: SeriesState
    reason: str | None
    slices: int
    report_json: str | None
    recorded: float
    node: str = ""  # a journal that no node has opened since it was written by an older one lacks it


class Journal:
    """The journal of a node, or of all that share a database. Safe to use from many threads.

    Parameters
    ----------
    place : the file of SQLite's, whose folder must exist, or where the database of PostgreSQL's is
    read_only : for who only looks: writes nothing, not even to bring an older journal up to date
    patience_s : for another process that has the file to itself
    node : the name of this one among those that share it
    shares_storage : whether it can read the files of the others, and they its own

    Raises
    ------
    JournalError : not a journal, a damaged one, one written by a newer scanside, or one that can't be reached

    """

    def __init__(
        self,
        place: Path | Address,
        *,
        read_only: bool = False,
        patience_s: float = 30.0,
        node: str = "",
        shares_storage: bool = False,
    ) -> None:
        self.database: Database = (
            Sqlite(place, read_only=read_only, patience_s=patience_s)
            if isinstance(place, Path)
            else Postgres(place, read_only=read_only)
        )
        self.node = node
        self.own, self.free, self.within_reach = _conditions(self.database, node, shares_storage=shares_storage)

    def statements(self) -> AbstractContextManager[Execute]:
        """Run statements that only read; nobody else's come between them."""
        return self.database.statements()

    def transaction(self) -> AbstractContextManager[Execute]:
        """Run statements that are all done, and durable, when this ends; or none of them, where it raises."""
        return self.database.transaction()

    def close(self) -> None:
        self.database.close()

    # results

    def record_result(
        self,
        study_uid: str,
        series_uid: str,
        revision: int,
        *,
        state: SeriesState,
        reason: str | None,
        slices: int,
        report_json: str | None,
        files: Sequence[ResultFile],
        destinations: Mapping[str, Collection[Role]],
        also: Callable[[Execute], None] | None = None,
    ) -> bool:
        """Write what became of a series and queue its files, in one transaction.

        Parameters
        ----------
        revision : 1 for the first result of a series, and one more each time a late slice reopens it
        files : result files; they stay where they are until every destination has them
        destinations : the roles that each destination gets, by its name
        also : what else is written with it, in the same transaction

        Returns
        -------
        False where this revision was recorded before; then nothing changes, whatever the arguments, but that it is a
        result of this node, too

        Raises
        ------
        JournalError : a SOP Instance UID that another revision owes to the same destination already, a full disk
        RevisionTaken : another node has recorded this revision, made of something else

        """
        now = time.time()
        series = (study_uid, series_uid, revision)
        in_order = sorted(files, key=lambda file: get_args(Role).index(file.role))
        with self.transaction() as execute:
            written = execute(
                "INSERT INTO series (study_uid, series_uid, revision, state, reason, slices, report_json, recorded,"
                " node) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (study_uid, series_uid, revision) DO NOTHING",
                (*series, SeriesState(state).value, reason, slices, report_json, now, self.node),
            ).rowcount
            if not written:
                self._note_twin(execute, series, files, (slices, now))
                return False
            for file in in_order:
                what = (file.role, str(file.path), file.sop_class_uid, file.sop_uid)
                for destination in (name for name, roles in destinations.items() if file.role in roles):
                    execute(
                        "INSERT INTO outbox (study_uid, series_uid, revision, role, path, sop_class_uid, sop_uid,"
                        " destination, node, state, attempts, next_try, created)"
                        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 'queued', 0, ?, ?)",
                        (*series, *what, destination, self.node, now, now),
                    )
            if also:
                also(execute)
            return True

    def _note_twin(
        self, execute: Execute, series: tuple[str, str, int], files: Sequence[ResultFile], made: tuple[int, float]
    ) -> None:
        """Take another node's result for this one's, too, if it is made of the same: then it has the same UIDs."""
        which = "study_uid = ? AND series_uid = ? AND revision = ?"
        (node,) = execute(f"SELECT node FROM series WHERE {which}", series).fetchone()  # noqa: S608 (a constant)
        if not self.database.has_others or node == self.node:
            return
        rows = execute(f"SELECT sop_uid FROM outbox WHERE {which}", series).fetchall()  # noqa: S608
        if not {file.sop_uid for file in files} & {row[0] for row in rows}:
            raise RevisionTaken(f"revision {series[2]} of series {series[1]} is one of node {node}")
        execute(
            "INSERT INTO twin (study_uid, series_uid, revision, node, slices, recorded) VALUES (?, ?, ?, ?, ?, ?)"
            " ON CONFLICT DO NOTHING",
            (*series, self.node, *made),
        )

    def latest(self, study_uid: str, series_uid: str, *, of: str | None = None) -> SeriesRecord | None:
        """The highest revision of a series, None for a series without a result.

        Parameters
        ----------
        of : the node whose results count, those among them that another has recorded and it has made, too; None: all

        """
        found, values = "SELECT * FROM series WHERE study_uid = ? AND series_uid = ?", (study_uid, series_uid)
        if of is not None and self.database.has_others:
            found = f"{found} AND node = ? UNION ALL {_TWINS} WHERE study_uid = ? AND series_uid = ? AND twin.node = ?"
            values = (*values, of) * 2
        with self.statements() as execute:
            row = execute(f"{found} ORDER BY revision DESC LIMIT 1", values).fetchone()
        return _series_record(row) if row else None

    def reported_elsewhere(self, execute: Execute, study_uid: str, series_uid: str) -> int:
        """How many slices of a series another node has reported on; 0 where none has.

        Who records at this moment is waited for until the transaction of `execute` ends.
        """
        if not self.database.has_others:
            return 0
        self.database.alone(execute)
        return execute(
            "SELECT COALESCE(MAX(slices), 0) FROM series WHERE study_uid = ? AND series_uid = ?"  # noqa: S608 (a constant)
            f" AND report_json IS NOT NULL AND NOT ({self.own})",
            (study_uid, series_uid),
        ).fetchone()[0]

    def last_told(self, study_uid: str, series_uid: str) -> SeriesRecord | None:
        """The highest revision of a series of which a destination has got, or is owed, something."""
        with self.statements() as execute:
            row = execute(
                "SELECT series.* FROM series JOIN outbox USING (study_uid, series_uid, revision)"
                " WHERE study_uid = ? AND series_uid = ? ORDER BY revision DESC LIMIT 1",
                (study_uid, series_uid),
            ).fetchone()
        return _series_record(row) if row else None

    def left_out(self, study_uid: str, reason: str) -> list[SeriesRecord]:
        """Series of a study whose last revision was not analysed for a reason that begins so."""
        with self.statements() as execute:
            rows = execute(
                "SELECT * FROM series WHERE study_uid = ? AND revision = (SELECT MAX(revision) FROM series AS every"
                " WHERE (every.study_uid, every.series_uid) = (series.study_uid, series.series_uid))",
                (study_uid,),
            ).fetchall()
        records = [_series_record(row) for row in rows]
        return [one for one in records if one.state is SeriesState.NOT_ANALYSED and one.reason.startswith(reason)]

    def series(self) -> list[SeriesRecord]:
        """Every revision of every series, in the order they were recorded."""
        with self.statements() as execute:
            return [
                _series_record(row)
                for row in execute("SELECT * FROM series ORDER BY recorded, study_uid, series_uid, revision")
            ]

    def twins(self) -> list[SeriesRecord]:
        """Results that a node has made and another has recorded, as if the first had."""
        with self.statements() as execute:
            if not self.database.has_others or self.database.version(execute) < TWINS_SINCE:
                return []
            return [_series_record(row) for row in execute(_TWINS)]

    def forget(self, before: float, studies_here: Collection[str]) -> None:
        """Remove what nobody needs any more.

        That is what scanners announced and asked for; and of studies that are not here any more what was delivered, the
        reports, and all revisions but the last. The last one stays for ever: a series that is sent again must not give
        new results the UIDs of old ones. What is a result of another node, too, stays as long as that one needs it.

        Parameters
        ----------
        before : what is younger stays, in seconds since the epoch
        studies_here : StudyInstanceUIDs of the spool; of these all stays

        """
        said = {"before": before, "here": self.database.packed(studies_here)}
        gone = f"study_uid NOT IN ({self.database.members('here')}) AND {self.own}"
        which = "(study_uid, series_uid, revision) = (series.study_uid, series.series_uid, series.revision)"
        alone = f"NOT EXISTS (SELECT 1 FROM twin WHERE {which})"  # noqa: S608 (constants, as below)
        with self.transaction() as execute:
            for table, since in (("announced", "announced"), ("step", "changed"), ("commitment", "created")):
                execute(f"DELETE FROM {table} WHERE {since} < :before", said)  # noqa: S608
            execute(f"DELETE FROM twin WHERE recorded < :before AND {gone}", said)  # noqa: S608
            execute(
                f"DELETE FROM outbox WHERE created < :before AND {gone} AND study_uid NOT IN"  # noqa: S608
                " (SELECT study_uid FROM outbox WHERE state NOT IN ('sent', 'confirmed'))",
                said,
            )
            execute(
                f"DELETE FROM series WHERE recorded < :before AND {gone} AND {alone}"  # noqa: S608
                f" AND NOT EXISTS (SELECT 1 FROM outbox WHERE {which})"
                " AND revision < (SELECT MAX(revision) FROM series AS every"
                " WHERE (every.study_uid, every.series_uid) = (series.study_uid, series.series_uid))",
                said,
            )
            execute(
                f"UPDATE series SET report_json = NULL WHERE recorded < :before AND report_json IS NOT NULL AND {gone}"  # noqa: S608
                f" AND {alone}",
                said,
            )


def _conditions(database: Database, node: str, *, shares_storage: bool) -> tuple[str, str, str]:
    """SQL that tells rows apart by their nodes: own ones, those whose sender is no other that lives, and both at once.

    A node sends what lies on its disk; where the disks are shared, what lies on any of these.
    """
    if not database.has_others:
        return "TRUE", "TRUE", "TRUE"
    name = "'" + node.replace("'", "''") + "'"
    own = f"node = {name}"
    living = f"SELECT name FROM node WHERE expires > {database.clock}"  # noqa: S608 (our names, as below)
    free = f"(sender IS NULL OR sender = {name} OR sender NOT IN ({living}))"
    reach = "node IN (SELECT name FROM node WHERE shared = 1)" if shares_storage else own
    return own, free, f"{reach} AND (state NOT IN ('sending', 'unconfirmed') OR {free})"


def _series_record(row: Row) -> SeriesRecord:
    return SeriesRecord(**{**row, "state": SeriesState(row["state"])})
