"""What the node has decided and what it still owes: one SQLite file, never a write per slice (`schema` has its tables).

``series`` says what became of each revision of a series, ``outbox`` has a row per result and destination
(`dicom_node.outbox`). A result and what is owed for it are written in one transaction, so after a crash either both are
there or neither.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from dicom_node.schema import VERSIONS
from runtime.errors import ScansideError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    Execute = Callable[..., sqlite3.Cursor]

# in the order of sending: what a reader needs first, and the largest last
Role = Literal["notice", "sr", "sc", "pdf", "seg"]


class JournalError(ScansideError):
    """A journal that can't be opened, read or written."""

    exit_code: ClassVar[int] = 3


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

    """

    study_uid: str
    series_uid: str
    revision: int
    state: SeriesState
    reason: str | None
    slices: int
    report_json: str | None
    recorded: float


class Journal:
    """The journal file.

    All threads share one connection and a lock: SQLite has one writer at a time anyway, a transaction is a few rows and
    one disk sync, and so no thread can slip a statement into another's transaction. WAL lets other processes read
    meanwhile; ``synchronous=FULL`` makes a committed transaction survive a power cut.

    Parameters
    ----------
    path : created where it is missing; its folder must exist
    read_only : for who only looks: writes nothing, not even to bring an older journal up to date
    patience_s : for another process that has it to itself

    Raises
    ------
    JournalError : not a journal, a damaged one, or one written by a newer scanside

    """

    def __init__(self, path: Path, *, read_only: bool = False, patience_s: float = 30.0) -> None:
        self._path = path
        where = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
        self._lock = threading.Lock()
        try:
            self._connection = sqlite3.connect(
                where, uri=True, timeout=patience_s, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise JournalError(f"{path}: can't be opened: {error}") from error
        try:
            self._connection.row_factory = sqlite3.Row
            with self.statements() as execute:
                for pragma in () if read_only else ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
                    execute(f"PRAGMA {pragma}")
            self._prepare(read_only=read_only)
        except JournalError:
            self._connection.close()
            raise

    def close(self) -> None:
        with self._lock:
            self._connection.close()

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
        False where this revision was recorded before; then nothing changes, whatever the arguments

        Raises
        ------
        JournalError : a SOP Instance UID that another revision owes to the same destination already, a full disk

        """
        now = time.time()
        series = (study_uid, series_uid, revision)
        in_order = sorted(files, key=lambda file: get_args(Role).index(file.role))
        with self.transaction() as execute:
            written = execute(
                "INSERT INTO series VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (study_uid, series_uid, revision) DO NOTHING",
                (*series, SeriesState(state).value, reason, slices, report_json, now),
            ).rowcount
            if not written:
                return False
            for file in in_order:
                what = (file.role, str(file.path), file.sop_class_uid, file.sop_uid)
                for destination in (name for name, roles in destinations.items() if file.role in roles):
                    execute(
                        "INSERT INTO outbox (study_uid, series_uid, revision, role, path, sop_class_uid, sop_uid,"
                        " destination, state, attempts, next_try, created)"
                        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'queued', 0, ?, ?)",
                        (*series, *what, destination, now, now),
                    )
            if also:
                also(execute)
            return True

    def latest(self, study_uid: str, series_uid: str) -> SeriesRecord | None:
        """The highest revision of a series, None for a series without a result."""
        with self.statements() as execute:
            row = execute(
                "SELECT * FROM series WHERE study_uid = ? AND series_uid = ? ORDER BY revision DESC LIMIT 1",
                (study_uid, series_uid),
            ).fetchone()
        return _series_record(row) if row else None

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
                "SELECT *, MAX(revision) AS revision FROM series WHERE study_uid = ? GROUP BY series_uid", (study_uid,)
            ).fetchall()
        records = [_series_record(row) for row in rows]
        return [one for one in records if one.state is SeriesState.NOT_ANALYSED and one.reason.startswith(reason)]

    def series(self) -> list[SeriesRecord]:
        """Every revision of every series, in the order they were recorded."""
        with self.statements() as execute:
            return [_series_record(row) for row in execute("SELECT * FROM series ORDER BY recorded, rowid")]

    def forget(self, before: float, studies_here: Collection[str]) -> None:
        """Remove what nobody needs any more.

        That is what scanners announced and asked for; and of studies that are not here any more what was delivered, the
        reports, and all revisions but the last. The last one stays for ever: a series that is sent again must not give
        new results the UIDs of old ones.

        Parameters
        ----------
        before : what is younger stays, in seconds since the epoch
        studies_here : StudyInstanceUIDs of the spool; of these all stays

        """
        said = {"before": before, "here": json.dumps(list(studies_here))}
        gone = "study_uid NOT IN (SELECT value FROM json_each(:here))"
        with self.transaction() as execute:
            for table, since in (("announced", "announced"), ("step", "changed"), ("commitment", "created")):
                execute(f"DELETE FROM {table} WHERE {since} < :before", said)  # noqa: S608 (constants, as below)
            execute(
                f"DELETE FROM outbox WHERE created < :before AND {gone} AND study_uid NOT IN"  # noqa: S608
                " (SELECT study_uid FROM outbox WHERE state NOT IN ('sent', 'confirmed'))",
                said,
            )
            execute(
                f"DELETE FROM series WHERE recorded < :before AND {gone} AND NOT EXISTS (SELECT 1 FROM outbox"  # noqa: S608
                " WHERE (study_uid, series_uid, revision) = (series.study_uid, series.series_uid, series.revision))"
                " AND revision < (SELECT MAX(revision) FROM series AS every"
                " WHERE (every.study_uid, every.series_uid) = (series.study_uid, series.series_uid))",
                said,
            )
            execute(
                f"UPDATE series SET report_json = NULL WHERE recorded < :before AND report_json IS NOT NULL AND {gone}",  # noqa: S608
                said,
            )

    # the file

    def _prepare(self, *, read_only: bool) -> None:
        # two processes may come at once: the second finds it done
        with self.statements() if read_only else self.transaction() as execute:
            version = execute("PRAGMA user_version").fetchone()[0]
            if version > len(VERSIONS):
                raise JournalError(
                    f"{self._path}: written by a newer scanside (schema {version}, this one knows {len(VERSIONS)})"
                )
            if version == 0:
                if execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
                    raise JournalError(f"{self._path}: an SQLite file, but not a journal of scanside; move it away")
                if read_only:
                    raise JournalError(f"{self._path}: empty: the node has not run yet")
            for statements in () if read_only else VERSIONS[version:]:
                for statement in statements:
                    execute(statement)

    @contextmanager
    def statements(self) -> Iterator[Execute]:
        """Run statements that only read; nobody else's come between them."""
        with self._lock:
            try:
                yield self._connection.execute
            except sqlite3.Error as error:
                raise JournalError(f"{self._path}: {error}") from error

    @contextmanager
    def transaction(self) -> Iterator[Execute]:
        """Run statements that are all done, and durable, when this ends; or none of them, where it raises."""
        with self.statements() as execute:
            execute("BEGIN IMMEDIATE")
            try:
                yield execute
                execute("COMMIT")
            except BaseException:
                # SQLite itself rolls back after some errors, a full disk among them
                if self._connection.in_transaction:
                    execute("ROLLBACK")
                raise


def _series_record(row: sqlite3.Row) -> SeriesRecord:
    return SeriesRecord(**{**row, "state": SeriesState(row["state"])})
