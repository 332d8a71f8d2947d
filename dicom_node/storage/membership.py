"""The nodes that share a journal: which there are, which of them live, and who finishes what a dead one has left.

Each has a row with a lease, by the database's clock, that it renews as long as it runs; nobody asks the clocks of two
machines what time it is. What a node is, is its folder: a file there says how it is called, so that by mistake none
takes another's name, or goes on under another one than before.

Where storage is shared, one of the living takes over from a node whose lease has run out: it holds that node's row and
the lock of its folder, and moves the slices of every series without a result into its own spool. From there on they are
as if a scanner had sent them here. A slice always has a name in one of the spools: who dies in between loses nothing.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

import structlog

from dicom_node.images.part10 import DataSetError
from dicom_node.storage import spool as spools
from dicom_node.storage.carrying import carry_over
from dicom_node.storage.journal import JournalError
from dicom_node.storage.lock import FolderLock, LockedError
from dicom_node.storage.register import without_result
from dicom_node.storage.spool import Outcome, Spool

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dicom_node.storage.database import Execute, Row
    from dicom_node.storage.journal import Journal
    from dicom_node.storage.spool import Instance

IDENTITY = "identity.json"
LEASE_S = 30.0  # a node that has not been heard of for so long is taken for dead
BEAT_S = 5.0

log = structlog.get_logger(__name__)


class Intake(Protocol):
    """A node's desk: told of slices that have come, and asked for what is open."""

    def instance_stored(self, association: str, instance: Instance) -> None:
        """Take note of a new one."""

    def association_ended(self, association: str, *, released: bool) -> None:
        """Take note that no more come this way."""

    def arriving(self) -> Sequence[Mapping[str, Any]] | None:
        """Series without a result yet, as `Member.open` has them; None where that can't be said now."""


@dataclass(frozen=True, slots=True)
class Member:
    """One of the nodes that share a journal.

    Attributes
    ----------
    folder : where its slices and results are, on its own machine or on shared storage
    lives : whether its lease runs
    seen : when it was heard of last, in seconds since the epoch, by the database's clock
    open : its series without a result: study_uid, series_uid, revision, slices_received

    """

    name: str
    folder: Path
    shared: bool
    lives: bool
    seen: float
    open: Sequence[Mapping[str, Any]]


class Membership:
    """One node among those that share its journal, from `join` to `stop`; of a journal that is a file, nothing.

    Parameters
    ----------
    journal : opened in this node's name
    folder : of this node
    spool : of this node
    intake : told of slices that are taken over
    shares_storage : whether others can see its folder, and it theirs

    """

    def __init__(self, journal: Journal, folder: Path, spool: Spool, intake: Intake, *, shares_storage: bool) -> None:
        self._journal, self._folder, self._spool, self._intake = journal, folder.absolute(), spool, intake
        self._shares_storage = shares_storage
        self._token = ""
        self._stopping = Event()
        self._thread = Thread(target=self._run, name="membership", daemon=True)

    def join(self) -> None:
        """Take this node's name, and keep it; what it had in a journal of its own comes with it.

        Raises
        ------
        JournalError : another node has it; or the folder is that of a node with another name

        """
        if not self._journal.database.has_others:
            return
        self._token = _identity(self._folder, self._journal.node)
        with self._journal.transaction() as execute:
            self._journal.database.alone(execute)
            place = self._folder, self._shares_storage
            row = take_name(execute, self._journal.database.clock, self._journal.node, self._token, *place)
        if row and row["token"] != self._token and not row["emptied"]:
            remedy = "slices there without a result are nobody's from now on: send them again"
            log.warning("dead_node_replaced", node=self._journal.node, folder=row["folder"], remedy=remedy)
        carry_over(self._journal, self._folder / "journal.sqlite")
        self._thread.start()

    def stop(self) -> None:
        """Let the lease run out: others need not wait for its end."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
            with suppress(JournalError):  # then it runs out by itself
                self._write("expires = seen", "token = :token", token=self._token)

    def _run(self) -> None:
        while not self._stopping.wait(BEAT_S):
            try:
                self._beat()
                if self._shares_storage:
                    for member in members(self._journal):
                        self._take_over_from(member)
            except JournalError as error:
                log.warning("lease_not_renewed", reason=str(error), retry_s=BEAT_S)
            except Exception:  # a bug in one takeover must not end the lease, and with it this node for all others
                log.exception("takeover_failed")

    def _beat(self) -> None:
        progress = self._intake.arriving()
        told = {} if progress is None else {"open": json.dumps(list(progress))}
        clock = self._journal.database.clock
        values = f"seen = {clock}, expires = {clock} + :lease" + (", open = :open" if told else "")
        if not self._write(values, "token = :token AND keeper IS NULL", token=self._token, lease=LEASE_S, **told):
            log.warning("lease_lost", remedy="another node has this one's name, or takes over from it at this moment")

    # what others have left

    def _take_over_from(self, member: Member) -> None:
        """Finish what a node has left that is heard of no more, unless another is at it or it runs after all."""
        clock = self._journal.database.clock
        held = f"keeper = :me, expires = {clock} + :lease"
        left = f"expires <= {clock} AND shared = 1 AND emptied IS NULL"
        me = {"me": self._journal.node, "lease": LEASE_S, "of": member.name}
        if member.name == self._journal.node or member.lives or not self._write(held, left, **me):
            return
        is_emptied = False
        try:
            folder_lock = FolderLock(member.folder)
            try:
                theirs = Spool(member.folder / "spool", 0.0)
                for study_uid, series_uid, _ in without_result(theirs, self._journal, member.name):
                    self._beat()  # a folder full of slices takes longer than a lease
                    if self._stopping.is_set() or not self._write(held, "keeper = :me", **me):
                        return
                    self._move(theirs, study_uid, series_uid, member.name)
                is_emptied = True
            finally:
                folder_lock.release()
        except LockedError:
            log.warning("node_without_database", node=member.name, folder=str(member.folder))
        except OSError as error:
            log.warning("not_taken_over", node=member.name, folder=str(member.folder), reason=str(error))
        finally:
            emptied = f", emptied = {clock}, open = '[]'" if is_emptied else ""
            self._write(f"keeper = NULL, expires = {clock}{emptied}", "keeper = :me", **me)

    def _move(self, theirs: Spool, study_uid: str, series_uid: str, name: str) -> None:
        """Move a series into this node's spool, slice by slice: each has its new name before it loses the old one."""
        association, moved = f"taken over from {name}", 0
        for path in theirs.series(study_uid, series_uid):
            try:
                instance = spools.read(path)
            except DataSetError as error:  # stays where it is, and holds up nothing else
                log.error("file_not_taken_over", node=name, path=str(path), reason=str(error))  # noqa: TRY400
                continue
            place = self._spool.place(instance.study_uid, instance.series_uid, instance.sop_uid)
            outcome, instance = self._spool.keep(path, replace(instance, path=place))
            if outcome is Outcome.NEW:  # told before anything else can fail: the next attempt finds it repeated
                self._intake.instance_stored(association, instance)
                moved += 1
            path.unlink(missing_ok=True)
        self._intake.association_ended(association, released=False)
        log.warning("series_taken_over", node=name, study=study_uid, series=series_uid, images=moved)

    def _write(self, values: str, condition: str, *, of: str | None = None, **said: Any) -> bool:
        """Change a node's row; False where the condition does not hold."""
        with self._journal.transaction() as execute:
            changed = execute(
                f"UPDATE node SET {values} WHERE name = :of AND {condition}",  # noqa: S608 (our names)
                {"of": of or self._journal.node, **said},
            ).rowcount
        return bool(changed)


def take_name(execute: Execute, clock: str, name: str, token: str, folder: Path, shared: bool) -> Row | None:
    """Make a name that of the node with this token, and what it was sending when it ended nobody's.

    Returns
    -------
    the row of the name as it was, None where there was none

    Raises
    ------
    JournalError : it is another living node's, or another takes over what this one has left

    """
    row = execute(
        f"SELECT token, folder, keeper, emptied, expires > {clock} AS lives FROM node WHERE name = ?",  # noqa: S608 (a constant)
        (name,),
    ).fetchone()
    if row and row["lives"] and row["keeper"]:
        raise JournalError(f"node {row['keeper']} takes over what this one has left: start it in a moment")
    if row and row["lives"] and row["token"] != token:
        raise JournalError(
            f"another node of this database is called {name} (its folder is {row['folder']}):"
            " set node.name to a name of its own"
        )
    execute(
        "INSERT INTO node (name, token, folder, shared, seen, expires)"  # noqa: S608
        f" VALUES (:name, :token, :folder, :shared, {clock}, {clock} + :lease)"
        " ON CONFLICT (name) DO UPDATE SET token = :token, folder = :folder, shared = :shared,"
        f" seen = {clock}, expires = {clock} + :lease, keeper = NULL, emptied = NULL, open = '[]'",
        {"name": name, "token": token, "folder": str(folder), "shared": int(shared), "lease": LEASE_S},
    )
    # a crash left them; this node may not even have their destination any more, and others would wait behind it
    for table in ("outbox", "message"):
        execute(
            f"UPDATE {table} SET sender = NULL WHERE sender = ? AND state IN ('sending', 'unconfirmed')",  # noqa: S608
            (name,),
        )
    return row


def members(journal: Journal) -> list[Member]:
    """All nodes that have ever shared a journal; none where it is a file."""
    if not journal.database.has_others:
        return []
    with journal.statements() as execute:
        rows = execute(
            f"SELECT node.*, expires > {journal.database.clock} AND keeper IS NULL AS lives FROM node ORDER BY name"  # noqa: S608 (a constant)
        ).fetchall()
    return [
        Member(
            row["name"], Path(row["folder"]), bool(row["shared"]), bool(row["lives"]), row["seen"],
            tuple(json.loads(row["open"])),
        )
        for row in rows
    ]  # fmt: skip


def _identity(folder: Path, name: str) -> str:
    """What tells a folder from all others; made when a node first runs in it, under its name."""
    token = known_token(folder, name)
    if token is None:
        token, path = uuid4().hex, folder / IDENTITY
        made = path.with_suffix(".new")
        with made.open("w") as file:
            json.dump({"name": name, "token": token}, file)
            file.flush()
            os.fsync(file.fileno())
        made.rename(path)
        spools.sync_directory(folder)  # without its name after a power cut, the node would be another
    return token


def known_token(folder: Path, name: str) -> str | None:
    """What tells a folder from all others; None where no node has run in it.

    Raises
    ------
    JournalError : it is the folder of a node with another name

    """
    path = folder / IDENTITY
    try:
        known = json.loads(path.read_text())
        before, token = str(known["name"]), str(known["token"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JournalError(f"{path}: can't be read ({error}): remove it, and the node makes a new one") from error
    if before != name:
        raise JournalError(
            f'{folder}: belongs to node {before}: set node.name = "{before}", or give this node a folder of its own'
        )
    return token
