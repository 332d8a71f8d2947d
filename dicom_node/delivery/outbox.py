r"""What destinations are owed, and where each of it stands: a row of the journal per result and destination.

::

    queued -> sending -> sent
       ^         |  \-> unconfirmed -> confirmed
       |         |         |
       |         +-> waiting (next_try) -> sending ...
     retry       +-> parked
       +-------------+

A destination that is asked whether it keeps what it took (`dicom_node.delivery.confirmation`) has it unconfirmed until
it says so, and waiting again where it does not. A row left in ``sending`` by a crash is due again: whether the peer has
it can't be known, so it is sent once more, with the same SOP Instance UID. That is delivery at least once, and a
storage SCP takes the second for the first.

Nodes send; other processes may read, retry and park (the command line) meanwhile. Of nodes that share a journal each
takes rows that no other has: one that is being sent is another's only when its sender is heard of no more. From then
on what the first still says of its attempt changes nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from dicom_node.storage.database import JournalError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from dicom_node.storage.database import Row
    from dicom_node.storage.journal import Journal, Role

FIRST_WAIT_S = 2.0
LONGEST_WAIT_S = 300.0  # between two attempts
ATTEMPTS_BEFORE_PARKING = (
    6  # about a minute: longer than an archive's restart, in which it may refuse what it takes later
)
LONGEST_CONFIRMATION_S = 6 * 3600.0  # between two requests for it: some archives commit at night

log = structlog.get_logger(__name__)


class DeliveryState(StrEnum):
    QUEUED = "queued"
    SENDING = "sending"
    SENT = "sent"
    UNCONFIRMED = "unconfirmed"
    CONFIRMED = "confirmed"
    WAITING = "waiting"
    PARKED = "parked"


DELIVERED = frozenset({DeliveryState.SENT, DeliveryState.CONFIRMED})

_OWED = "state IN ('queued', 'sending', 'waiting')"
_OPEN = "state IN ('queued', 'sending', 'waiting', 'unconfirmed')"


@dataclass(frozen=True, slots=True)
class OutboxItem:
    """One result for one destination.

    Attributes
    ----------
    attempts : how often this object was offered to the peer and not taken; a peer that can't be reached doesn't count
    tries : how often the sender set out with it, whether it reached the peer or not; the one under way counts
    next_try, created, sent, confirmed : seconds since the epoch
    node, sender : on whose disk it lies, and who sends it or sent it last
    transaction_uid : of the last request for its commitment
    asked : how often its destination was asked whether it keeps it

    """

    id: int
    study_uid: str
    series_uid: str
    revision: int
    role: Role
    path: Path
    sop_class_uid: str
    sop_uid: str
    destination: str
    state: DeliveryState
    attempts: int
    next_try: float
    last_error: str | None
    created: float
    sent: float | None
    # a journal that no node has opened since it was written by an older one lacks these
    tries: int = 0
    transaction_uid: str | None = None
    asked: int = 0
    confirmed: float | None = None
    node: str = ""
    sender: str | None = None


class Outbox:
    """The deliveries of a journal."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    # the sender's side

    def claim(self, destination: str, now: float) -> list[OutboxItem]:
        """Take all that a destination is owed and mark it as being sent, if any of it is due.

        All, because it is the peer that is up or down: when it is tried, everything that waits for it goes. What it did
        not take before goes last, so that one bad object never stands before good ones; otherwise first come, first
        served, and each series in the order of `Role`. Rows in ``sending`` are taken too: a destination has one sender
        in a node, so they are a crash's, or of a node that is gone. A `next_try` further away than any wait is due: the
        clock has been set back since.
        """
        with self._journal.transaction() as execute:
            rows = execute(
                f"SELECT * FROM outbox WHERE destination = ? AND {_OWED} AND {self._journal.within_reach}"  # noqa: S608 (constants)
                f" ORDER BY attempts, id{self._journal.database.skip_locked}",
                (destination,),
            ).fetchall()
            if not any(_is_due(row, now, LONGEST_WAIT_S) for row in rows):
                return []
            for row in rows:
                execute(
                    "UPDATE outbox SET state = 'sending', tries = tries + 1, sender = ? WHERE id = ?",
                    (self._journal.node, row["id"]),
                )
            now_so = {"state": "sending", "sender": self._journal.node}
            return [_item({**row, **now_so, "tries": row["tries"] + 1}) for row in rows]

    def next_due(self, destination: str) -> float | None:
        """When the next item of a destination is due, in seconds since the epoch; None when nothing is owed."""
        with self._journal.statements() as execute:
            return execute(
                f"SELECT MIN(next_try) FROM outbox WHERE destination = ? AND ({_OWED} OR state = 'unconfirmed')"  # noqa: S608
                f" AND {self._journal.within_reach}",
                (destination,),
            ).fetchone()[0]

    def mark_sent(self, item_id: int, *, confirm: bool = False) -> None:
        """The peer has it, and says so; `confirm`: it has to be asked whether it keeps it."""
        now = time.time()
        with self._journal.transaction() as execute:
            execute(
                "UPDATE outbox SET state = ?, last_error = NULL, sent = ?, next_try = ?, asked = 0,"
                " transaction_uid = NULL, confirmed = NULL WHERE id = ?",  # what was said of it before counts no more
                (DeliveryState.UNCONFIRMED if confirm else DeliveryState.SENT, now, now, item_id),
            )

    def failed(self, item: OutboxItem, reason: str) -> bool:
        """The peer did not take this object, or does not keep it: one attempt more, and wait.

        Returns
        -------
        False where the row is another node's by now; a report on commitment counts whoever hears it
        """
        wait_s = back_off_s(item.attempts + 1)
        log.warning("result_not_taken", **_told(item), reason=reason, retry_s=wait_s)
        with self._journal.transaction() as execute:
            changed = execute(
                "UPDATE outbox SET state = 'waiting', attempts = attempts + 1, next_try = ?, last_error = ?"  # noqa: S608
                " WHERE id = ? AND state IN ('sending', 'unconfirmed')"
                f" AND ({self._journal.free} OR state = 'unconfirmed' AND transaction_uid = ?)",
                (time.time() + wait_s, reason, item.id, item.transaction_uid),
            ).rowcount
        return bool(changed)

    def refused(self, item: OutboxItem, reason: str) -> None:
        """Not taken, and not likely to be: after some attempts a person has to look."""
        is_ours = self.failed(item, reason)
        if is_ours and item.attempts + 1 >= ATTEMPTS_BEFORE_PARKING and self.park(item.id, reason):
            remedy = f"mend the cause, then `scanside outbox retry {item.id}`"
            log.error("result_parked", **_told(item), series_uid=item.series_uid, reason=reason, remedy=remedy)

    def postpone(self, item_ids: Sequence[int], next_try: float, error: str) -> None:
        """The peer was not asked to take or to confirm these, for a reason that is not theirs: no attempt counts."""
        with self._journal.transaction() as execute:
            for item_id in item_ids:
                execute(
                    "UPDATE outbox SET state = CASE state WHEN 'sending' THEN 'waiting' ELSE state END,"  # noqa: S608
                    " next_try = ?, last_error = ?"
                    f" WHERE id = ? AND state IN ('sending', 'unconfirmed') AND {self._journal.free}",
                    (next_try, error, item_id),
                )

    def hurry(self, destination: str) -> None:
        """Have what waits here for a destination tried now: its address was wrong, and is not any more."""
        with self._journal.transaction() as execute:
            execute(
                "UPDATE outbox SET next_try = ? WHERE destination = ? AND state IN ('waiting', 'unconfirmed')"  # noqa: S608
                f" AND {self._journal.within_reach}",
                (time.time(), destination),
            )

    # whether it is kept

    def unconfirmed(self, destination: str, now: float) -> list[OutboxItem]:
        """What a destination has taken and has to be asked for now."""
        rows = self._rows(f"state = 'unconfirmed' AND destination = ? AND {self._journal.within_reach}", destination)
        return [_item(row) for row in rows if _is_due(row, now, LONGEST_CONFIRMATION_S)]

    def ask(self, item_ids: Collection[int], next_try: float, transaction_uid: str | None = None) -> None:
        """The destination is being asked, and will be again at `next_try` if that settles nothing."""
        with self._journal.transaction() as execute:
            for item_id in item_ids:
                execute(
                    "UPDATE outbox SET asked = asked + 1, next_try = ?, transaction_uid = ?"  # noqa: S608
                    f" WHERE id = ? AND state = 'unconfirmed' AND {self._journal.free}",
                    (next_try, transaction_uid, item_id),
                )

    def believe(self, destination: str) -> None:
        """A destination that is asked no more has what it took from here; other nodes may ask it still."""
        with self._journal.transaction() as execute:
            execute(
                "UPDATE outbox SET state = 'sent' WHERE state = 'unconfirmed' AND destination = ?"  # noqa: S608
                f" AND {self._journal.within_reach}",
                (destination,),
            )

    def asked_in(self, transaction_uid: str) -> list[OutboxItem]:
        """All whose commitment was asked for in a transaction, whatever has become of it."""
        return [_item(row) for row in self._rows("transaction_uid = ?", transaction_uid)]

    def confirm(self, item: OutboxItem) -> None:
        """The destination keeps it, and says so."""
        with self._journal.transaction() as execute:
            execute(
                "UPDATE outbox SET state = 'confirmed', confirmed = ?, last_error = NULL"
                " WHERE id = ? AND state = 'unconfirmed'",
                (time.time(), item.id),
            )
        log.info("result_confirmed", **_told(item))

    # an operator's side

    def items(self) -> list[OutboxItem]:
        """Every item, in the order of sending."""
        return [_item(row) for row in self._rows("TRUE")]

    def destinations_of(self, study_uid: str, series_uid: str) -> set[str]:
        """Who has got, or is owed, a result of a series."""
        with self._journal.statements() as execute:
            return {
                row[0]
                for row in execute(
                    "SELECT DISTINCT destination FROM outbox WHERE study_uid = ? AND series_uid = ?",
                    (study_uid, series_uid),
                )
            }

    def undelivered(self) -> Counter[tuple[str, DeliveryState]]:
        """How many have not arrived, or not for certain, by destination and state."""
        with self._journal.statements() as execute:
            rows = execute(
                "SELECT destination, state, COUNT(*) FROM outbox WHERE state NOT IN ('sent', 'confirmed') GROUP BY 1, 2"
            ).fetchall()
        return Counter({(row[0], DeliveryState(row[1])): row[2] for row in rows})

    def tell_stranded(self, destinations: Collection[str]) -> None:
        """Log what nobody sends or asks for, since its destination is none of these."""
        counts: dict[str, dict[str, int]] = {}
        try:
            undelivered = self.undelivered()
        except JournalError:  # it will be told at the next start
            return
        for (name, state), count in sorted(undelivered.items()):
            if state is not DeliveryState.PARKED and name not in destinations:
                counts.setdefault(name, {})[str(state)] = count
        for name, results in counts.items():
            remedy = "configure it again, or park what it is owed or does not confirm"
            log.warning("destination_not_configured", destination=name, results=results, remedy=remedy)

    def park(self, item_id: int, error: str) -> bool:
        """Take an item that is not done with out of the sender's way until `retry`; False where there is none."""
        with self._journal.transaction() as execute:
            return bool(
                execute(
                    f"UPDATE outbox SET state = 'parked', last_error = ? WHERE id = ? AND {_OPEN}",  # noqa: S608
                    (error, item_id),
                ).rowcount
            )

    def retry(self, item_id: int | None = None) -> int:
        """Queue one item again, also one that has arrived (an archive may have lost it), or all parked ones.

        Returns
        -------
        how many there were; one that is on the wire is none

        """
        chosen = "state = 'parked'" if item_id is None else "id = :id AND state != 'sending'"
        with self._journal.transaction() as execute:
            return execute(
                f"UPDATE outbox SET state = 'queued', attempts = 0, tries = 0, next_try = :now WHERE {chosen}",  # noqa: S608
                {"id": item_id, "now": time.time()},
            ).rowcount

    def _rows(self, condition: str, *values: object) -> list[Row]:
        with self._journal.statements() as execute:
            return execute(f"SELECT * FROM outbox WHERE {condition} ORDER BY id", values).fetchall()  # noqa: S608


def back_off_s(times: int) -> float:
    """Seconds to wait after the n-th failure: 2, 4, 8 ... 300."""
    return min(FIRST_WAIT_S * 2 ** min(times - 1, 16), LONGEST_WAIT_S)


def _is_due(row: Row, now: float, longest_s: float) -> bool:
    return row["next_try"] <= now or row["next_try"] > now + longest_s


def _told(item: OutboxItem) -> dict[str, str]:
    """What the log has of an item."""
    return {"destination": item.destination, "role": item.role, "sop_uid": item.sop_uid}


def _item(row: Row) -> OutboxItem:
    return OutboxItem(**{**row, "path": Path(row["path"]), "state": DeliveryState(row["state"])})
