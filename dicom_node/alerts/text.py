"""What is said of an alert in words, to everybody in the same; whose head it is, each channel says or leaves out."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING
from urllib.parse import quote

from runtime.millilitres import said
from runtime.types import OperatingPoint, in_words

if TYPE_CHECKING:
    from dicom_node.alerts.alert import Alert, Message

RESEARCH = "Research use only, not a medical device."
NOT_CALIBRATED = "The probability is the network's highest for the class, and not calibrated."
_STATES = {
    "provisional": "provisional: the series is still arriving",
    "confirmed": "confirmed by the whole series",
    "withdrawn": "withdrawn",
    "unresolved": "the series could not be analysed after all: look at it",
}


def headline(alert: Alert) -> str:
    """The level, and whether it still holds, in a few words: for a subject or a label."""
    what = ", ".join(f"{each['title']} {said(each['volume_ml'])}" for each in alert.evidence["findings"])
    if alert.state == "withdrawn":
        return f"WITHDRAWN ({alert.level}): {what or 'no finding'}"
    return f"{alert.level.upper()}: {what}"


def sentence(alert: Alert) -> str:
    """Level, findings and volumes, state, and the rule or the reason."""
    state = _STATES[alert.state]
    if alert.state == "confirmed" and alert.evidence["provisional"]:
        state = "confirmed by the slices that are there"
    return f"{headline(alert)} ({state}). {alert.reason}"


def occasion(message: Message, alert: Alert) -> str:
    """Why somebody is told now."""
    if message.occasion == "escalated":
        return f"Nobody has acknowledged this alert since {clock(alert.raised)}."
    told = {
        "raised": "A new alert.",
        "changed": "This alert has changed.",
        "confirmed": "The alert is confirmed.",
        "withdrawn": "The alert is withdrawn.",
        "unresolved": "The alert can't be confirmed.",
    }
    return told[message.occasion]


def findings(alert: Alert) -> list[str]:
    """A line for each finding."""
    return [
        f"{each['title']}: {said(each['volume_ml'])} on {each['slices']} of {alert.evidence['slices']} slices,"
        f" probability {each['probability']:.2f}"
        for each in alert.evidence["findings"]
    ]


def limits(alert: Alert) -> list[str]:
    """What has to be known before anybody relies on it, one sentence each."""
    model = alert.evidence["model"]
    return [
        RESEARCH,
        *(f"Missing: {each}." for each in alert.evidence["missing"]),
        f"Model: {model['name']} {model['version']}, {model['precision']}, sha256 {model['digest'][:16]}.",
        f"Trained on: {model['training_data']}.",
        *operating_point(alert),
        *([NOT_CALIBRATED] if alert.evidence["findings"] else []),
    ]


def operating_point(alert: Alert) -> list[str]:
    """From where on something is a finding: a sentence, or none where the report does not say."""
    points = {name: OperatingPoint(**point) for name, point in alert.evidence["operating_point"].items()}
    return [f"Operating point: {in_words(points)}."] if points else []


def clock(seconds: float) -> str:
    """Local date and time, to the minute."""
    return f"{datetime.fromtimestamp(seconds).astimezone():%Y-%m-%d %H:%M}"


def link(template: str, alert: Alert) -> str:
    """An address from its template: ``{alert}``, ``{study_uid}`` and ``{series_uid}`` are filled in."""
    uids = {name: quote(getattr(alert, name), safe="") for name in ("study_uid", "series_uid")}
    return template.format(alert=alert.id, **uids)
