"""What a node has in a journal of its own goes with it when it begins to share one."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

import structlog

from dicom_node.storage.journal import Journal

if TYPE_CHECKING:
    from pathlib import Path

    from dicom_node.storage.database import Execute

CARRIED = ".carried"  # ends the name of the file from then on
_TABLES = ("series", "outbox", "step", "announced", "commitment", "alert", "acknowledgement", "message", "attempt")
_OF_A_NODE = {"series", "outbox", "commitment", "alert"}
_PARENTS = {
    "acknowledgement": ("alert_id", "alert"),
    "message": ("alert_id", "alert"),
    "attempt": ("message_id", "message"),
}

log = structlog.get_logger(__name__)


def carry_over(journal: Journal, path: Path) -> None:
    """Copy a file's journal into one that is shared, as this node's, and put the file aside.

    All or nothing; and what is there already is not copied again, should the machine die before the file has its other
    name. A series of which another node has an alert keeps that one.

    Parameters
    ----------
    journal : of a database that several nodes share
    path : of the file; where there is none, nothing happens

    Raises
    ------
    JournalError

    """
    if not path.exists():
        return
    with closing(Journal(path)) as old, old.statements() as read:
        rows = {table: [dict(row) for row in read(f"SELECT * FROM {table}")] for table in _TABLES}  # noqa: S608 (ours)
    ids: dict[tuple[str, int], int] = {}  # new ones, by table and old one
    with journal.transaction() as execute:
        for table in _TABLES:
            for row in sorted(rows[table], key=lambda one: one.get("id", 0)):
                _copy(execute, table, row, journal.node, ids)
    path.rename(path.with_name(path.name + CARRIED))
    counts = {table: len(rows[table]) for table in ("series", "outbox", "alert")}
    log.info("journal_carried_over", **counts, file=path.name + CARRIED)


def _copy(execute: Execute, table: str, row: dict[str, Any], node: str, ids: dict[tuple[str, int], int]) -> None:
    old_id = row.pop("id", None)
    if table in _OF_A_NODE:
        row["node"] = node
    if table in ("outbox", "message"):
        row["sender"] = node  # whoever it was: what is half sent is due again here
    if table in _PARENTS:
        key, parent = _PARENTS[table]
        if (parent, row[key]) not in ids:
            return
        row[key] = ids[parent, row[key]]
    names, places = ", ".join(row), ", ".join(f":{name}" for name in row)
    returned = "" if old_id is None else " RETURNING id"
    made = execute(f"INSERT INTO {table} ({names}) VALUES ({places}) ON CONFLICT DO NOTHING{returned}", row)  # noqa: S608
    if old_id is not None and (new := made.fetchone()):
        ids[table, old_id] = new[0]
