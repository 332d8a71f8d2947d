"""What becomes of an alert by what is found, and which channels are told what of it."""

from __future__ import annotations

import json
import secrets
import time
from typing import TYPE_CHECKING, Any

from dicom_node.alerts.alert import URGENCY

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dicom_node.alerts.alert import Occasion, Recipient, Standing, State
    from dicom_node.storage.database import Execute, Row

# never on the wire, and of a kind that nobody needs who has no use for it any more
PENDING = "(state = 'queued' AND attempts = 0 AND (occasion = 'escalated' OR (occasion = 'raised' AND due > :now)))"
_TOLD = f"(state != 'cancelled' OR attempts > 0) AND NOT {PENDING}"  # or will be, whatever happens; or may have been
_SAID = ("level", "reason", "state", "revision", "raised", "changed")


def step(
    before: Row | None, revision: int, found: str, *, final: bool, complete: bool
) -> tuple[State, Occasion | None] | None:
    """What becomes of an alert; an occasion of None: nobody is told. None: nothing becomes of it.

    Parameters
    ----------
    before : its row, None where there is none yet
    found : the report's level
    final, complete : a result, and one of the whole head

    """
    state: State = "confirmed" if final else "provisional"
    if before is None:
        return (state, "raised") if found in URGENCY else None
    was, known = before["state"], before["revision"]
    if revision < known or (revision == known and was != "provisional" and not final):
        return None  # of an older revision, or of one whose result is there
    if was == "withdrawn":
        return (state, "raised") if found in URGENCY and revision > known else None
    if not final:
        return (state, "changed") if URGENCY.get(found, 0) > URGENCY[before["level"]] else None
    if found not in URGENCY:
        return "withdrawn", "withdrawn"
    return state, _occasion(before, found, complete=complete)


def _occasion(before: Row, found: str, *, complete: bool) -> Occasion | None:
    """What a result that alarms is to an alert that stands."""
    if found != before["level"]:
        return "changed"
    was_whole = before["state"] == "confirmed" and not json.loads(before["evidence"])["provisional"]
    return "confirmed" if before["state"] != "confirmed" or (complete and not was_whole) else None


class Writer:
    """Writes what one channel is told of one alert.

    Parameters
    ----------
    row : the alert as it is now
    level_before : what it was

    """

    def __init__(self, execute: Execute, row: Row, recipient: Recipient, level_before: str) -> None:
        self._execute, self._row, self._recipient = execute, row, recipient
        self._higher = max(level_before, row["level"], key=URGENCY.__getitem__)
        self._now = time.time()
        self._key = {"alert": row["id"], "channel": recipient.name, "now": self._now}

    def tell(self, occasion: Occasion | None) -> None:
        """Queue a message, or bring the one that is pending up to date."""
        pending = self._one(PENDING)
        last = self._one(f"{_TOLD} ORDER BY id DESC")
        if last is not None and last["occasion"] != "withdrawn":
            if occasion in self._recipient.occasions:
                # who was told "critical" is told at once that it is not
                self._queue(occasion, self._higher, after_s=0.0)
        elif pending is not None:
            self._refresh(pending)
        elif occasion in ("raised", "changed") and self._row["level"] in self._recipient.levels:
            after_s = self._recipient.after_s
            if not after_s or self._row["acknowledged"] is None:  # or somebody knows already
                self._queue("escalated" if after_s else "raised", self._row["level"], after_s=after_s)

    def _one(self, condition: str) -> Row | None:
        return self._execute(
            f"SELECT * FROM message WHERE alert_id = :alert AND channel = :channel AND {condition}",  # noqa: S608
            self._key,
        ).fetchone()

    def _queue(self, occasion: Occasion, level: str, *, after_s: float) -> None:
        self._execute(  # what quiet hours still hold back is overtaken by this
            "UPDATE message SET state = 'cancelled' WHERE alert_id = :alert AND channel = :channel"
            " AND state = 'queued' AND attempts = 0 AND due > :now",
            self._key,
        )
        message = {
            "alert_id": self._row["id"],
            "channel": self._recipient.name,
            "occasion": occasion,
            "level": level,
            "control_id": secrets.token_hex(10),  # MSH-10 of HL7 2.5.1 has 20 characters
            "standing": self._standing(),
            "said": self._said(),
            "state": "queued",
            "due": self._due(self._now + after_s, level),
            "created": self._now,
        }
        self._execute(f"INSERT INTO message ({', '.join(message)}) VALUES ({slots(message)})", message)  # noqa: S608
        self._execute(  # a receiver that was down may be up again, and this can't wait for the back-off's end
            "UPDATE message SET due = :now WHERE channel = :channel AND state = 'waiting' AND holds = 1",
            self._key,
        )

    def _refresh(self, pending: Row) -> None:
        """Have the pending message say what is so now; nothing, where the channel isn't told of that level."""
        level = self._row["level"]
        if level not in self._recipient.levels:
            update(self._execute, "message", pending["id"], {"state": "cancelled"})
            return
        due = min(pending["due"], self._due(pending["created"] + self._recipient.after_s, level))
        said = {"said": self._said(), "level": level, "standing": self._standing(), "due": due}
        update(self._execute, "message", pending["id"], said)

    def _due(self, at: float, level: str) -> float:
        return at if level == "critical" else self._recipient.quiet_until(at) or at

    def _said(self) -> str:
        """What the alert is now, and which findings this channel was told of that are none any more."""
        values: dict[str, Any] = {name: self._row[name] for name in _SAID}
        evidence = json.loads(self._row["evidence"])
        rows = self._execute(
            f"SELECT said FROM message WHERE alert_id = :alert AND channel = :channel AND {_TOLD}",  # noqa: S608
            self._key,
        ).fetchall()
        told = {each["name"]: each for row in rows for each in json.loads(row["said"])["evidence"]["findings"]}
        gone = sorted(told.keys() - {each["name"] for each in evidence["findings"]})
        retracted = [{key: told[name][key] for key in ("name", "title", "code")} for name in gone]
        return json.dumps(values | {"evidence": evidence | {"retracted": retracted}})

    def _standing(self) -> Standing:
        if self._one(f"standing IN ('final', 'corrected') AND {_TOLD}") is not None:
            return "corrected"
        is_partial = json.loads(self._row["evidence"])["provisional"]
        return "preliminary" if is_partial or self._row["state"] in ("provisional", "unresolved") else "final"


def update(execute: Execute, table: str, row_id: int, values: Mapping[str, Any]) -> None:
    """Set columns of one row."""
    assigned = ", ".join(f"{name} = :{name}" for name in values)
    execute(f"UPDATE {table} SET {assigned} WHERE id = :row_id", {**values, "row_id": row_id})  # noqa: S608 (our names)


def slots(values: Mapping[str, Any]) -> str:
    """Places for values, by their names."""
    return ", ".join(f":{name}" for name in values)
