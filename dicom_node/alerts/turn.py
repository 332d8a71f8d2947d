"""Which message of a channel goes next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dicom_node.alerts.news import update

if TYPE_CHECKING:
    from dicom_node.storage.database import Execute, Row

LONGEST_WAIT_S = 60.0  # between two attempts
LONGEST_HOLD_S = 3600.0  # that a receiver may ask for


def next_message(execute: Execute, channel: str, now: float, only: str | None, free: str) -> Row | None:
    """The message of a channel that goes next, of one level `only` or of any; None where nothing does.

    An escalation that nobody needs any more is cancelled on the way. A row in ``sending`` is a crash's, for a channel
    has one sender in a node; unless another node that lives is at it (SQL `free` says of none), behind which all wait.
    """
    rows = execute(
        f"SELECT message.*, alert.acknowledged, alert.state AS alert_state, {free} AS free FROM message"  # noqa: S608 (ours)
        " JOIN alert ON alert.id = alert_id"
        " WHERE channel = ? AND message.state IN ('queued', 'sending', 'waiting') ORDER BY message.id",
        (channel,),
    ).fetchall()
    if any((row["holds"] and not _is_due(row, now)) or (row["state"] == "sending" and not row["free"]) for row in rows):
        return None
    held: set[int] = set()
    for row in rows:
        if row["occasion"] == "escalated" and (row["acknowledged"] is not None or row["alert_state"] == "withdrawn"):
            update(execute, "message", row["id"], {"state": "cancelled", "holds": 0})
        elif row["alert_id"] in held:
            continue
        elif _is_due(row, now) and only in (None, row["level"]):
            return row
        elif row["attempts"]:
            held.add(row["alert_id"])
    return None


def _is_due(row: Row, now: float) -> bool:
    """Whether a message may go, or was written or put off before the clock was set back: rather too early than late."""
    longest_s = LONGEST_HOLD_S if row["holds"] > 1 else LONGEST_WAIT_S
    is_from_later = row["created"] > now + LONGEST_WAIT_S or (row["holds"] and row["due"] > now + longest_s)
    return row["state"] == "sending" or row["due"] <= now or is_from_later
