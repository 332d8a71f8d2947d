r"""Which alerts there are, who is to be told of them, and who has been: rows of the journal.

An alert belongs to a series. Early evidence raises it, or its level; a result confirms, changes or withdraws it::

    (early) provisional -> confirmed (changed) -> withdrawn -> raised again by a later revision
                 \-> unresolved: the series could not be analysed after all

A message is one thing that one channel is told of one alert. What it says and its control id are fixed when it is
written, in the transaction that records the cause. Each goes ::

    queued -> sending -> sent
       ^         |-> waiting (due) -> sending ...
     retry       \-> parked
       +-------------+           queued -> cancelled: nobody has to be told any more

A channel with `after_s` is told only if nobody has acknowledged by then; its message is *pending*, as is one that quiet
hours put off: what changes meanwhile changes what it will say, acknowledgement and withdrawal cancel it. Who has been
told is told of everything that corrects it.

Nodes send; other processes may read, acknowledge and retry meanwhile. What nodes that share a journal do with alerts
they do one after the other, and a channel is told by one of them at a time.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import structlog

from dicom_node.alerts.alert import URGENCY, Alert, Message, alert_of, evidence, message_of
from dicom_node.alerts.news import PENDING, Writer, slots, step, update
from dicom_node.alerts.turn import next_message

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from dicom_node.alerts.alert import Occasion, Recipient
    from dicom_node.storage.database import Execute, Row
    from dicom_node.storage.journal import Journal

ALERTS_SINCE = 6  # version of the journal
# somebody has to acknowledge it, or is owed a message of it
_NEEDED = (
    "((acknowledged IS NULL AND state != 'withdrawn') OR id IN (SELECT alert_id FROM message"
    " WHERE state IN ('queued', 'sending', 'waiting', 'parked')))"
)

log = structlog.get_logger(__name__)


class Ledger:
    """The alerts of a journal.

    Parameters
    ----------
    journal : where they are kept
    recipients : the channels that are told of what is noted from now on

    """

    def __init__(self, journal: Journal, recipients: Sequence[Recipient] = ()) -> None:
        self._journal, self._recipients = journal, tuple(recipients)

    def reload(self, recipients: Sequence[Recipient]) -> None:
        """Tell these of what is noted from now on; messages that are written stay as they are."""
        self._recipients = tuple(recipients)

    # what the desk notes

    def note(
        self,
        execute: Execute,
        study_uid: str,
        series_uid: str,
        revision: int,
        report: Mapping[str, Any],
        patient: Mapping[str, str],
        *,
        final: bool,
        of_part: bool = False,
    ) -> None:
        """Raise, confirm, change or withdraw the alert of a series, and queue what has to be told of it.

        The same again changes nothing.

        Parameters
        ----------
        execute : of a transaction of the journal
        report : as JSON has it
        patient : kept from the first time that it says something: a repeated message must not differ
        final : a result; otherwise evidence from a series that still arrives
        of_part : a result of a part of what another node has reported on: it may add to an alert, and takes none back

        """
        self._journal.database.alone(execute)
        if not final and _has_result(execute, study_uid, series_uid, revision):
            return  # it could not be written in time, and is older than what is known
        final = final and not of_part
        before = _find(execute, study_uid, series_uid)
        found = str(report["decision"]["level"])
        change = step(before, revision, found, final=final, complete=not report["provisional"])
        if change is None:
            return
        now = time.time()
        state, occasion = change
        alert: dict[str, Any] = {
            "study_uid": study_uid,
            "series_uid": series_uid,
            "revision": revision,
            "level": before["level"] if before and state == "withdrawn" else found,
            "reason": report["decision"]["reason"],
            "state": state,
            "raised": before["raised"] if before and occasion != "raised" else now,
            "changed": now,
            "patient": before["patient"] if before and before["patient"] != "{}" else json.dumps(dict(patient)),
            "evidence": json.dumps(evidence(report)),
            "node": self._journal.node,
        }
        if before is None:
            execute(f"INSERT INTO alert ({', '.join(alert)}) VALUES ({slots(alert)})", alert)  # noqa: S608 (our names)
        else:
            update(execute, "alert", before["id"], alert)
            if occasion == "raised" or URGENCY.get(found, 0) > URGENCY[before["level"]]:
                update(execute, "alert", before["id"], {"acknowledged": None, "acknowledged_by": None})
        self._tell(execute, study_uid, series_uid, occasion, before["level"] if before else found)

    def note_failure(self, execute: Execute, study_uid: str, series_uid: str, revision: int, reason: str) -> None:
        """Say that the series of a provisional alert could not be analysed after all; somebody still has to look."""
        self._journal.database.alone(execute)
        before = _find(execute, study_uid, series_uid)
        if before is None or before["state"] != "provisional" or revision < before["revision"]:
            return
        update(
            execute,
            "alert",
            before["id"],
            {"revision": revision, "state": "unresolved", "reason": reason, "changed": time.time()},
        )
        self._tell(execute, study_uid, series_uid, "unresolved", before["level"])

    def _tell(
        self, execute: Execute, study_uid: str, series_uid: str, occasion: Occasion | None, level_before: str
    ) -> None:
        row = _find(execute, study_uid, series_uid)
        log.info("alert", series=series_uid, id=row["id"], triage=row["level"], state=row["state"], occasion=occasion)
        if row["state"] == "withdrawn":
            _cancel_pending(execute, row["id"])
        for each in self._recipients:
            Writer(execute, row, each, level_before).tell(occasion)

    # what people do, and look at

    def acknowledge(self, alert_id: int, by: str, seen: str | None = None) -> bool:
        """Keep who has taken notice, and cancel what nobody needs to be told any more.

        Parameters
        ----------
        seen : the level that was looked at: who took notice of "urgent" has taken none of what is critical since

        Returns
        -------
        False where it is acknowledged already, not there, or higher than what was seen

        """
        now = time.time()
        with self._transaction() as execute:
            row = execute("SELECT * FROM alert WHERE id = ?", (alert_id,)).fetchone()
            if row is None or row["acknowledged"] is not None:
                return False
            if seen is not None and URGENCY[row["level"]] > URGENCY.get(seen, 0):
                return False
            update(execute, "alert", alert_id, {"acknowledged": now, "acknowledged_by": by})
            execute(
                "INSERT INTO acknowledgement (alert_id, by, at, raised, level) VALUES (?, ?, ?, ?, ?)",
                (alert_id, by, now, row["raised"], row["level"]),
            )
            _cancel_pending(execute, alert_id)
        log.info("alert_acknowledged", id=alert_id, after_s=round(now - row["raised"], 1))
        return True

    def alerts(self) -> list[Alert]:
        """Every alert, newest first, with its messages."""
        with self._journal.statements() as execute:
            if self._journal.database.version(execute) < ALERTS_SINCE:
                return []  # an older journal, looked at before its node has been started again
            rows = execute("SELECT * FROM alert ORDER BY raised DESC, id DESC").fetchall()
            messages: dict[int, list[Message]] = {}
            for row in execute("SELECT * FROM message ORDER BY id"):
                messages.setdefault(row["alert_id"], []).append(message_of(row))
        return [alert_of(row, tuple(messages.get(row["id"], ()))) for row in rows]

    def acknowledgements(self, after: int = 0) -> list[dict[str, Any]]:
        """Each that was ever given, also at a level that has gone up since: id, alert_id, by, at, raised, level."""
        with self._journal.statements() as execute:
            rows = execute("SELECT * FROM acknowledgement WHERE id > ? ORDER BY id", (after,)).fetchall()
        return [dict(row) for row in rows]

    def attempts(self, message_id: int) -> list[dict[str, Any]]:
        """Each attempt of a message: began, ended, outcome, detail."""
        with self._journal.statements() as execute:
            rows = execute(
                "SELECT began, ended, outcome, detail FROM attempt WHERE message_id = ? ORDER BY id", (message_id,)
            ).fetchall()
        return [dict(row) for row in rows]

    def counts(self) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]:
        """How many alerts by level and state, and messages by channel and state."""
        with self._journal.statements() as execute:
            alerts = execute("SELECT level, state, COUNT(*) FROM alert GROUP BY 1, 2").fetchall()
            messages = execute("SELECT channel, state, COUNT(*) FROM message GROUP BY 1, 2").fetchall()
        return tuple(Counter({(row[0], row[1]): row[2] for row in rows}) for rows in (alerts, messages))  # type: ignore[return-value]

    def studies_needed(self) -> set[str]:
        """StudyInstanceUIDs of which somebody has to acknowledge an alert, or is owed a message."""
        with self._journal.statements() as execute:
            return {row[0] for row in execute(f"SELECT study_uid FROM alert WHERE {_NEEDED}")}  # noqa: S608 (a constant)

    def forget(self, before: float, studies_here: Collection[str]) -> None:
        """Forget the patients of alerts whose study is not here any more, and of old ones everything.

        Never one that nobody has acknowledged, unless it was withdrawn, and none of which somebody is owed a message.

        Parameters
        ----------
        before : what is younger stays, but for the patient; in seconds since the epoch
        studies_here : StudyInstanceUIDs of the spool; of these all stays

        """
        database = self._journal.database
        said = {"before": before, "here": database.packed(studies_here)}
        gone = f"study_uid NOT IN ({database.members('here')}) AND {self._journal.own} AND NOT {_NEEDED}"
        with self._transaction() as execute:
            execute(f"UPDATE alert SET patient = '{{}}' WHERE patient != '{{}}' AND {gone}", said)  # noqa: S608 (constants)
            is_old = "changed < :before AND COALESCE(acknowledged, 0) < :before"
            execute(f"DELETE FROM alert WHERE {is_old} AND {gone}", said)  # noqa: S608

    def retry(self, message_id: int | None = None) -> int:
        """Try one message now, or all that are parked or wait; how many there were.

        What was parked while its channel was told something later of the same alert is given up instead: to tell it now
        would raise what has been withdrawn.
        """
        chosen = "state IN ('parked', 'waiting')" + ("" if message_id is None else " AND id = :id")
        said = {"id": message_id, "now": time.time()}
        with self._transaction() as execute:
            execute(
                f"UPDATE message SET state = 'cancelled', last_error = 'overtaken' WHERE {chosen} AND EXISTS"  # noqa: S608
                " (SELECT 1 FROM message AS later WHERE (later.alert_id, later.channel) = (message.alert_id,"
                " message.channel) AND later.id > message.id AND later.state = 'sent')",
                said,
            )
            return execute(
                f"UPDATE message SET state = 'waiting', refusals = 0, holds = 0, due = :now WHERE {chosen}",  # noqa: S608
                said,
            ).rowcount

    def cancel(self, message_id: int) -> bool:
        """Give a message up that has not been sent; False where there is none."""
        with self._transaction() as execute:
            return bool(
                execute(
                    "UPDATE message SET state = 'cancelled', last_error = 'given up by hand' WHERE id = ?"
                    " AND state IN ('queued', 'waiting', 'parked')",
                    (message_id,),
                ).rowcount
            )

    # the channels' side

    def claim(self, channel: str, now: float, quiet_until: float | None = None) -> tuple[Message, Alert] | None:
        """Take the next message that is due, with the alert as it tells it, and mark it as being sent.

        The messages of an alert go in order, and so do those of a channel, but that one which was refused holds up no
        other alert. A channel that can't be reached holds up all (`unreachable`). Whether somebody has acknowledged is
        looked up here, in the same transaction.

        Parameters
        ----------
        quiet_until : end of the channel's quiet hours, if it is in them: until then what is not critical waits

        """
        with self._transaction() as execute:
            if quiet_until is not None:
                execute(
                    "UPDATE message SET due = :end, holds = 0,"  # noqa: S608 (a constant, as below)
                    " state = CASE attempts WHEN 0 THEN 'queued' ELSE 'waiting' END WHERE channel = :channel"
                    " AND state IN ('queued', 'sending', 'waiting') AND level != 'critical' AND due < :end"
                    f" AND (state != 'sending' OR {self._journal.free})",
                    {"end": quiet_until, "channel": channel},
                )
            row = next_message(
                execute, channel, now, "critical" if quiet_until is not None else None, self._journal.free
            )
            if row is None:
                return None
            update(
                execute,
                "message",
                row["id"],
                {"state": "sending", "attempts": row["attempts"] + 1, "sender": self._journal.node},
            )
            execute(
                "INSERT INTO attempt (message_id, began, outcome) VALUES (?, ?, 'no end recorded')", (row["id"], now)
            )
            row = execute("SELECT * FROM message WHERE id = ?", (row["id"],)).fetchone()
            alert = execute("SELECT * FROM alert WHERE id = ?", (row["alert_id"],)).fetchone()
            siblings = execute("SELECT * FROM message WHERE alert_id = ? ORDER BY id", (row["alert_id"],)).fetchall()
        return message_of(row), alert_of(alert, tuple(map(message_of, siblings)), row["said"])

    def sent(self, message: Message, detail: str) -> None:
        """The receiver has it, and says so."""
        self._end(message, "taken", detail, {"state": "sent", "sent": time.time(), "last_error": None, "holds": 0})

    def unreachable(self, message: Message, reason: str, wait_s: float, *, asked: bool = False) -> None:
        """The receiver can't take anything now: all of the channel waits behind this message.

        With the next news it is tried at once, unless the wait is what it `asked` for.
        """
        holds = 2 if asked else 1
        self._end(message, "unreachable", reason, {"state": "waiting", "holds": holds, "due": time.time() + wait_s})

    def refused(self, message: Message, reason: str, wait_s: float | None) -> None:
        """The receiver does not take this one: it waits alone, or is parked where `wait_s` is None."""
        state = {"state": "parked"} if wait_s is None else {"state": "waiting", "due": time.time() + wait_s}
        self._end(message, "refused", reason, {**state, "holds": 0, "refusals": message.refusals + 1})

    def hurry(self, channel: str) -> None:
        """Have what waits for a channel tried now: its address was wrong, and is not any more."""
        with self._transaction() as execute:
            execute(
                "UPDATE message SET due = ?, holds = 0 WHERE channel = ? AND state = 'waiting'", (time.time(), channel)
            )

    @contextmanager
    def _transaction(self) -> Iterator[Execute]:
        with self._journal.transaction() as execute:
            self._journal.database.alone(execute)
            yield execute

    def _end(self, message: Message, outcome: str, detail: str, values: dict[str, Any]) -> None:
        """Note how an attempt ended; one that did not get there takes back nothing that another node has told."""
        with self._transaction() as execute:
            is_ours = f"SELECT 1 FROM message WHERE id = ? AND state = 'sending' AND {self._journal.free}"  # noqa: S608
            if outcome != "taken" and not execute(is_ours, (message.id,)).fetchone():
                return
            execute(
                "UPDATE attempt SET ended = ?, outcome = ?, detail = ?"
                " WHERE id = (SELECT MAX(id) FROM attempt WHERE message_id = ?)",
                (time.time(), outcome, detail, message.id),
            )
            update(execute, "message", message.id, {"last_error": detail} | values)

    def is_due(self, channel: str, at: float) -> bool:
        """Whether anything of a channel goes by then, unless it is refused or nobody is there."""
        with self._journal.statements() as execute:
            return execute(
                "SELECT EXISTS (SELECT 1 FROM message WHERE channel = ? AND due <= ?"
                " AND state IN ('queued', 'sending', 'waiting'))",
                (channel, at),
            ).fetchone()[0]

    def next_due(self, channel: str, now: float) -> float | None:
        """When something of a channel will be due that is not yet; None where nothing will."""
        with self._journal.statements() as execute:
            return execute(
                "SELECT MIN(due) FROM message WHERE channel = ? AND state IN ('queued', 'waiting') AND due > ?",
                (channel, now),
            ).fetchone()[0]


def _find(execute: Execute, study_uid: str, series_uid: str) -> Row | None:
    return execute("SELECT * FROM alert WHERE study_uid = ? AND series_uid = ?", (study_uid, series_uid)).fetchone()


def _has_result(execute: Execute, study_uid: str, series_uid: str, revision: int) -> bool:
    return execute(
        "SELECT EXISTS (SELECT 1 FROM series WHERE study_uid = ? AND series_uid = ? AND revision >= ?)",
        (study_uid, series_uid, revision),
    ).fetchone()[0]


def _cancel_pending(execute: Execute, alert_id: int) -> None:
    execute(
        f"UPDATE message SET state = 'cancelled' WHERE alert_id = :alert AND {PENDING}",  # noqa: S608 (a constant)
        {"alert": alert_id, "now": time.time()},
    )
