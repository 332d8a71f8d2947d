"""One series as the page shows it: its slices, what was found, and how long each stage took."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from dicom_node import status
from dicom_node.delivery.outbox import DELIVERED, Outbox
from dicom_node.page import arrivals, slices
from dicom_node.page.slices import NO_MASKS, Masks
from dicom_node.results import picture
from dicom_node.storage.journal import SeriesState

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from dicom_node.alerts.alert import Alert
    from dicom_node.configuration.config import Config
    from dicom_node.delivery.outbox import OutboxItem
    from dicom_node.page.board import Row
    from dicom_node.page.palette import Palette
    from dicom_node.page.slices import Entry, Pictures
    from dicom_node.storage.journal import SeriesRecord

OCCASIONS = {
    "raised": "alert",
    "changed": "change of the alert",
    "confirmed": "confirmation",
    "withdrawn": "withdrawal",
    "unresolved": "failure after an alert",
    "escalated": "escalation",
}


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a series.

    Attributes
    ----------
    at : seconds since the epoch
    what : in a few words
    after_s : seconds since the event before it; None for the first
    is_wrong : it went wrong, or waits to be tried again

    """

    at: float
    what: str
    after_s: float | None = None
    is_wrong: bool = False


@dataclass(frozen=True, slots=True)
class Study:
    """What the view of one series needs beside its row.

    Attributes
    ----------
    report : of the newest result that has one, as ``report.json`` has it; None without one
    outdated : its revision, where there is a newer one that has none, or not yet
    revisions : every result of it, the newest first
    events : in the order of time
    stacked : its slices, from foot to head
    masks : what was found in them

    """

    report: dict[str, Any] | None
    outdated: int | None
    revisions: tuple[status.Series, ...]
    events: tuple[Event, ...]
    stacked: tuple[Entry, ...]
    masks: Masks

    @property
    def key_slice(self) -> int:
        """Place of the slice to begin with: that which shows most of the largest finding, else the middle."""
        wanted = [each["key_slice"] for each in (self.report or {}).get("findings", ())]
        places = {entry.key: place for place, entry in enumerate(self.stacked)}
        found = [places[key] for key in wanted if key in places and key in self.masks.labels]
        if found:
            return found[0]
        shown = [places[key] for key in self.masks.labels if key in places]
        return shown[len(shown) // 2] if shown else len(self.stacked) // 2


def read(config: Config, row: Row, pictures: Pictures) -> Study:
    """Read what there is about a series.

    Raises
    ------
    JournalError : the journal can't be read

    """
    uids = (row.told.study_uid, row.told.series_uid)
    with contextlib.closing(status.open_journal(config, read_only=True)) as journal:
        records = [one for one in journal.series() if (one.study_uid, one.series_uid) == uids]
        items = [one for one in Outbox(journal).items() if (one.study_uid, one.series_uid) == uids]
    records.sort(key=lambda one: -one.revision)
    reported = next((one for one in records if one.report_json), None)
    if row.told.is_open and row.alert and row.alert.state == "provisional":
        reported = None  # what is known of it now is in the alert
    events = sorted(_events(row, records, items), key=lambda event: event.at)
    return Study(
        report=json.loads(reported.report_json) if reported else None,
        outdated=reported.revision if reported and reported.revision < row.told.revision else None,
        revisions=tuple(map(status.recorded, records)),
        events=tuple(
            Event(event.at, event.what, event.at - before.at if before else None, event.is_wrong)
            for before, event in zip([None, *events], events, strict=False)
        ),
        stacked=tuple(entries(row, pictures)),
        masks=masks(row, pictures),
    )


def entries(row: Row, pictures: Pictures) -> list[Entry]:
    """The slices of a series, in order."""
    return pictures.entries(arrivals.files(row.folder / "spool", row.study, row.series))


def masks(row: Row, pictures: Pictures) -> Masks:
    """What was found in a series: of an open revision what is known early, else the newest result."""
    folder = row.folder / "results" / row.study / row.series
    if row.told.is_open:
        early = pictures.masks(folder / f"revision-{row.told.revision}" / "early.npz")
        if early is not NO_MASKS:
            return early
    shown = row.result or row.told
    if shown.state != SeriesState.ANALYSED:
        return NO_MASKS
    return pictures.masks(folder / f"revision-{shown.revision}" / "seg.dcm")


def _events(row: Row, records: Sequence[SeriesRecord], items: Sequence[OutboxItem]) -> Iterator[Event]:
    if row.arrival:
        yield Event(row.arrival.first, "first slice")
        yield Event(row.arrival.last, f"last slice{' so far' if row.told.is_open else ''}")
    for record in sorted(records, key=lambda one: one.revision):
        which = f" (revision {record.revision})" if len(records) > 1 or record.revision > 1 else ""
        report = json.loads(record.report_json) if record.report_json else {}
        if closed := report.get("closed"):
            yield Event(closed, f"series closed{which}")
        if composed := report.get("composed"):
            yield Event(composed, f"report composed{which}: {report['decision']['level']}")
        said = {"analysed": "results written", "failed": "analysis failed"}.get(record.state, "not analysed")
        yield Event(record.recorded, f"{said}{which}", is_wrong=record.state == SeriesState.FAILED)
    yield from _deliveries(items)
    if row.alert:
        yield from _alarms(row.alert)


def _alarms(alert: Alert) -> Iterator[Event]:
    yield Event(alert.raised, "alert raised")  # the journal keeps no level but the last
    if alert.changed > alert.raised + 0.001:
        yield Event(alert.changed, f"alert {alert.state}")
    for message in alert.messages:
        if message.sent:
            what = OCCASIONS.get(message.occasion, message.occasion)
            yield Event(message.sent, f"{what} delivered to {message.channel}")
    if alert.acknowledged:
        yield Event(alert.acknowledged, f"acknowledged by {alert.acknowledged_by}")


def _deliveries(items: Sequence[OutboxItem]) -> Iterator[Event]:
    """When a destination had all of a revision, and when it had said that it keeps it."""
    groups: dict[tuple[str, int], list[OutboxItem]] = {}
    for item in items:
        groups.setdefault((item.destination, item.revision), []).append(item)
    revisions = {item.revision for item in items}
    for (destination, revision), group in groups.items():
        which = f" (revision {revision})" if len(revisions) > 1 else ""
        sent = [item.sent for item in group if item.sent and (item.state in DELIVERED or item.state == "unconfirmed")]
        if sent:
            what = f"{len(sent)} of {len(group)} results at {destination}{which}"
            yield Event(max(sent), what, is_wrong=len(sent) < len(group))
        confirmed = [item.confirmed for item in group if item.confirmed]
        if len(confirmed) == len(group):
            yield Event(max(confirmed), f"{destination} keeps them{which}")


def waiting(row: Row) -> list[dict[str, Any]]:
    """Messages of the alert that are not sent yet: when, to whom, why, and whether an acknowledgement cancels them."""
    now = time.time()
    return [
        {
            "channel": message.channel,
            "what": OCCASIONS.get(message.occasion, message.occasion),
            "due": message.due,
            "state": message.state,
            "error": message.last_error,
            "is_in_doubt": not message.attempts and (message.occasion == "escalated" or message.due > now),
        }
        for message in (row.alert.messages if row.alert else ())
        if message.state in {"queued", "sending", "waiting", "parked"}
    ]


def viewer_link(template: str, row: Row) -> str:
    """Address of the study in a viewer."""
    values: Mapping[str, str] = {
        "study_uid": row.told.study_uid,
        "series_uid": row.told.series_uid,
        "patient_id": row.patient.get("PatientID", ""),
        "accession_number": row.patient.get("AccessionNumber", ""),
    }
    return template.format(**{name: quote(value, safe="") for name, value in values.items()})


def slice_list(study: Study, address: str, palette: Palette) -> dict[str, Any]:
    """What the viewer in the browser has to know of the slices: their pictures' addresses and what each shows."""
    left, right = slices.sides(study.stacked)
    marks = f"{address}/masks/{study.masks.version}"
    return {
        "key": study.key_slice,
        "sides": [left, right],
        "colours": {name: palette.hexadecimal(name) for name in study.masks.classes.values()},
        "slices": [
            {
                "number": entry.number,
                "size": picture.shown_size(entry.plane, entry.shape),
                "picture": f"{address}/slices/{entry.name}/",
                "mask": f"{marks}/{entry.name}.png" if entry.key in study.masks.labels else None,
                "classes": study.masks.shown(entry.key),
            }
            for entry in study.stacked
        ],
    }
