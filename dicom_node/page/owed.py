"""What the node still owes, in groups: results to its destinations, and words of alerts to who is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dicom_node.delivery.outbox import DeliveryState

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dicom_node.alerts.alert import Alert
    from dicom_node.delivery.outbox import OutboxItem

SHOWN = 20


@dataclass(frozen=True, slots=True)
class Owed:
    """What waits alike: to whom, how, and why."""

    receiver: str
    state: str
    error: str | None
    what: tuple[str, ...]


def results(waiting: Sequence[OutboxItem]) -> tuple[Owed, ...]:
    """Results by destination, parked ones first; their roles say what."""
    return _grouped((item.state, item.destination, item.last_error, item.role) for item in waiting)


def messages(alerts: Iterable[Alert]) -> tuple[Owed, ...]:
    """Words of alerts that a channel could not be told so far, parked ones first; their occasions say what.

    One that has never been tried is not among them: an escalation waits for its time, and others for a second.
    """
    return _grouped(
        (one.state, one.channel, one.last_error, one.occasion)
        for alert in alerts
        for one in alert.messages
        if one.state == "parked" or (one.state in {"sending", "waiting"} and one.last_error)
    )


def _grouped(waiting: Iterable[tuple[str, str, str | None, str]]) -> tuple[Owed, ...]:
    groups: dict[tuple[str, str, str | None], list[str]] = {}
    for state, receiver, error, what in sorted(waiting, key=lambda one: (one[0] != DeliveryState.PARKED, one[1])):
        groups.setdefault((receiver, str(state), error), []).append(what)
    return tuple(Owed(*key, tuple(what)) for key, what in groups.items())[:SHOWN]
