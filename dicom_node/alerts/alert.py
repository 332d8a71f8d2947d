"""What an alert and its messages are, as the journal keeps them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from runtime.triage import LEVELS

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from dicom_node.storage.database import Row

Level = Literal["critical", "urgent"]
State = Literal["provisional", "confirmed", "withdrawn", "unresolved"]
Occasion = Literal["raised", "changed", "confirmed", "withdrawn", "unresolved", "escalated"]
MessageState = Literal["queued", "sending", "sent", "waiting", "parked", "cancelled"]
Standing = Literal["preliminary", "final", "corrected"]

URGENCY = {level: place for place, level in enumerate(LEVELS, start=1)}  # what raises an alert, the higher the sooner
OCCASIONS: frozenset[Occasion] = frozenset({"raised", "changed", "confirmed", "withdrawn", "unresolved", "escalated"})


class Recipient(Protocol):
    """What the ledger has to know of a channel; the sections of a configuration are such."""

    @property
    def name(self) -> str: ...

    @property
    def levels(self) -> Collection[Level]:
        """Of which alerts it is told."""

    @property
    def after_s(self) -> float:
        """So long somebody has time to acknowledge before it is told; 0: it is told at once."""

    @property
    def occasions(self) -> Collection[Occasion]:
        """What it can say at all."""

    def quiet_until(self, now: float) -> float | None:
        """End of the quiet hours that it is in at `now`, seconds since the epoch; None outside them."""


@dataclass(frozen=True, slots=True)
class Message:
    """What one channel is to be told, or has been.

    Attributes
    ----------
    control_id : by which the receiver knows a repetition; 20 characters, never changed
    level : the alert's; of a correction the more urgent of what was and is
    standing : of the result that it tells: preliminary, final, or a correction of what this channel was told as final
    due : not before, seconds since the epoch; likewise `created` and `sent`
    attempts : how often it was tried, the one under way included
    refusals : how often it was refused; a receiver that can't be reached doesn't count

    """

    id: int
    alert_id: int
    channel: str
    occasion: Occasion
    level: Level
    control_id: str
    standing: Standing
    state: MessageState
    due: float
    attempts: int
    refusals: int
    last_error: str | None
    created: float
    sent: float | None


@dataclass(frozen=True, slots=True)
class Alert:
    """One series about which somebody has to know at once.

    Attributes
    ----------
    level : what it was raised at last; a withdrawn alert keeps it
    reason : the decision's; of a withdrawn or unresolved one, why it is
    raised, changed, acknowledged : seconds since the epoch
    patient : DICOM keywords and values, absent ones left out
    evidence : what the report says (see `evidence`)
    messages : oldest first
    node : whose series it is; a journal that no node has opened since it was written by an older one lacks it

    """

    id: int
    study_uid: str
    series_uid: str
    revision: int
    level: Level
    reason: str
    state: State
    raised: float
    changed: float
    acknowledged: float | None
    acknowledged_by: str | None
    patient: Mapping[str, str]
    evidence: Mapping[str, Any]
    messages: tuple[Message, ...] = ()
    node: str = ""

    @property
    def is_open(self) -> bool:
        """Whether somebody still has to acknowledge it."""
        return self.acknowledged is None and self.state != "withdrawn"


def evidence(report: Mapping[str, Any]) -> dict[str, Any]:
    """What an alert keeps of a report (JSON, as `dicom_node.results.result_set.to_json` makes it).

    ``sr_uid`` is the SOP Instance UID of the SR that says the same, if there is one.
    """
    findings = [
        {
            "name": each["name"],
            "title": each["title"],
            "code": each["code"],
            "volume_ml": each["volume_ml"],
            "probability": each["probability"],
            "slices": len(each["keys"]),
            "key_slice": each["key_slice"],
        }
        for each in report["findings"]
    ]
    model = {key: report["model"][key] for key in ("name", "version", "digest", "precision", "training_data")}
    return {
        "findings": findings,
        "key_slice": findings[0]["key_slice"] if findings else None,
        "slices": report["slices"],
        "model": model,
        "operating_point": report.get("operating_point", {}),
        "provisional": report["provisional"],
        "missing": list(report["missing"]),
        "sr_uid": report.get("sr_uid"),
    }


def message_of(row: Row) -> Message:
    """A message from its row, or from one that has more."""
    return Message(**{name: row[name] for name in Message.__slots__})


def alert_of(row: Row, messages: tuple[Message, ...] = (), said: str | None = None) -> Alert:
    """An alert from its row; with `said`, as a message tells it."""
    kept = row.keys()  # of sqlite3's rows `in` would ask the values
    values = {name: row[name] for name in Alert.__slots__ if name in kept}
    values |= {"patient": json.loads(row["patient"]), "evidence": json.loads(row["evidence"]), "messages": messages}
    return Alert(**values | (json.loads(said) if said else {}))
