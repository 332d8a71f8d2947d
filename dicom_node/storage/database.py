"""What a journal asks of its database, and SQLite, which every Python brings (`postgres` has the other).

The SQL of the other modules is what both take: places for values are ``?`` or ``:name``, and what they differ in stands
here.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from dicom_node.storage.schema import VERSIONS
from runtime.errors import ScansideError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    Execute = Callable[
        ..., Any
    ]  # SQL and its values; gives a cursor, whose rows have their values by name and by number
    Row = Mapping[str, Any]


class JournalError(ScansideError):
    """A journal that can't be opened, read or written."""

    exit_code: ClassVar[int] = 3


class EmptyJournal(JournalError):
    """A journal in which no node has ever written."""


class Database(Protocol):
    """A database with the journal's tables.

    Attributes
    ----------
    has_others : whether other nodes may write into it
    skip_locked : ends a SELECT of rows that nobody else is to take before the transaction ends
    clock : the time of all nodes, in seconds since the epoch; an expression

    """

    has_others: bool
    skip_locked: str
    clock: str

    def statements(self) -> AbstractContextManager[Execute]:
        """Run statements that only read; nobody else's of this process come between them."""

    def transaction(self) -> AbstractContextManager[Execute]:
        """Run statements that are all done, and durable, when this ends; or none of them, where it raises."""

    def alone(self, execute: Execute) -> None:
        """Wait until no other transaction that has come here is open, in whatever node."""

    def members(self, name: str) -> str:
        """What `packed` has put into a named value, as a SELECT."""

    def packed(self, values: Collection[str]) -> Any:
        """Texts as one value."""

    def version(self, execute: Execute) -> int:
        """How many of `schema.VERSIONS` it has."""

    def change(self, execute: Execute) -> Any:
        """Something that differs when another process has written."""

    def fault(self) -> str:
        """Why it can't be used now; empty where it can, as far as is known."""

    def close(self) -> None:
        """Let it go."""


class Sqlite:
    """A file of SQLite's.

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

    has_others: ClassVar[bool] = False
    skip_locked: ClassVar[str] = ""
    clock: ClassVar[str] = "(julianday('now') - 2440587.5) * 86400.0"

    def __init__(self, path: Path, *, read_only: bool, patience_s: float) -> None:
        self._path = path
        where = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
        self._lock = threading.Lock()
        try:
            self.connection = sqlite3.connect(
                where, uri=True, timeout=patience_s, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise JournalError(f"{path}: can't be opened: {error}") from error
        try:
            self.connection.row_factory = sqlite3.Row
            with self.statements() as execute:
                for pragma in () if read_only else ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
                    execute(f"PRAGMA {pragma}")
            self._prepare(read_only=read_only)
        except JournalError:
            self.connection.close()
            raise

    @contextmanager
    def statements(self) -> Iterator[Execute]:
        with self._lock:
            try:
                yield self.connection.execute
            except sqlite3.Error as error:
                raise JournalError(f"{self._path}: {error}") from error

    @contextmanager
    def transaction(self) -> Iterator[Execute]:
        with self.statements() as execute:
            execute("BEGIN IMMEDIATE")
            try:
                yield execute
                execute("COMMIT")
            except BaseException:
                # SQLite itself rolls back after some errors, a full disk among them
                if self.connection.in_transaction:
                    execute("ROLLBACK")
                raise

    def alone(self, execute: Execute) -> None:
        """Nothing: every transaction is."""

    def members(self, name: str) -> str:
        return f"SELECT value FROM json_each(:{name})"  # noqa: S608 (our name)

    def packed(self, values: Collection[str]) -> str:
        return json.dumps(list(values))

    def version(self, execute: Execute) -> int:
        return execute("PRAGMA user_version").fetchone()[0]

    def change(self, execute: Execute) -> int:
        return execute("PRAGMA data_version").fetchone()[0]

    def fault(self) -> str:
        return ""

    def close(self) -> None:
        with self._lock:
            self.connection.close()

    def _prepare(self, *, read_only: bool) -> None:
        # two processes may come at once: the second finds it done
        with self.statements() if read_only else self.transaction() as execute:
            version = self.version(execute)
            require_known(str(self._path), version)
            if version == 0:
                if execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
                    raise JournalError(f"{self._path}: an SQLite file, but not a journal of scanside; move it away")
                if read_only:
                    raise EmptyJournal(f"{self._path}: empty: the node has not run yet")
            for statements in () if read_only else VERSIONS[version:]:
                for statement in statements:
                    execute(statement)


def require_known(name: str, version: int) -> None:
    """Refuse a journal that only a newer scanside understands."""
    if version > len(VERSIONS):
        raise JournalError(
            f"{name}: written by a newer scanside (schema {version}, this one knows {len(VERSIONS)}): update this node"
        )
