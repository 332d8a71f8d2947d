"""All that the list of the page shows, from the node's folder: it only looks, and asks the node nothing.

Who has to be seen first stands first. Before all others the series of an alert that nobody has acknowledged, critical
ones before urgent ones, who has waited longest first; then heads that were not, or not wholly, analysed; then what
arrives. What is settled follows, the newest first.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field, replace
from enum import IntEnum
from threading import Lock
from typing import TYPE_CHECKING, Any

from dicom_node import status
from dicom_node.delivery.outbox import DELIVERED, DeliveryState
from dicom_node.images.gate import Reason
from dicom_node.monitoring import nameplate
from dicom_node.page import arrivals, owed, slices
from dicom_node.page.arrivals import Arrival, Arrivals
from dicom_node.page.records import Records
from dicom_node.storage import lock, spool
from dicom_node.storage.journal import JournalError

if TYPE_CHECKING:
    from pathlib import Path

    from dicom_node.alerts.alert import Alert
    from dicom_node.configuration.config import Config
    from dicom_node.page.owed import Owed
    from dicom_node.storage.membership import Member

FRESH_S = 0.3  # so long a look is everybody's who asks
SHOWN = 100  # rows, unless all are asked for
DAY_S = 86400.0
KNOWN_S = 7 * DAY_S  # results of which nothing else is left are shown for so long
NAMES_KEPT = 5000  # patients whose files are not opened again

# of these nobody takes the series for a head that was looked at
_OF_NO_HEAD = tuple(reason.value for reason in Reason if reason.of_another_kind or reason is Reason.BONE_KERNEL)


class Urgency(IntEnum):
    """The order of the list."""

    CRITICAL = 0  # nobody has acknowledged it
    URGENT = 1
    TO_BE_READ = 2  # failed, not analysed though a head, or incomplete, since yesterday: nobody else will tell
    ARRIVING = 3
    SETTLED = 4


@dataclass(frozen=True, slots=True)
class Row:
    """One series: its newest result, or what is open of it.

    Attributes
    ----------
    study, series : their names on disk, and in addresses
    told : what status tells of it
    result : of a series that is open again, what status tells of its last result
    alert : about it
    arrival : what lies in the spool; None where it has been removed
    patient : DICOM keywords and text
    urgency : its place in the list
    folder : of the node that has it, where that can be seen from here; else of this one
    holder : the node that has its slices, where they can't be seen from here; else empty

    """

    study: str
    series: str
    told: status.Series
    result: status.Series | None
    alert: Alert | None
    arrival: Arrival | None
    patient: dict[str, str]
    urgency: Urgency
    folder: Path
    holder: str

    @property
    def level(self) -> str | None:
        """What triage says; of a series that still arrives, what its alert says."""
        if self.told.decision:
            return self.told.decision["level"]
        if self.alert and self.alert.state != "withdrawn":
            return self.alert.level
        return None

    @property
    def state(self) -> str:
        """As `scanside status` has it, in words."""
        if self.told.is_open:
            return "arriving" if self.told.state == status.RECEIVING else "waiting"
        return {True: "provisional", False: "final", None: self.told.state.replace("_", " ")}[self.told.provisional]

    @property
    def first(self) -> tuple[str, float]:
        """What is known to have come first, and when: the first slice, or where nobody kept that, what tells of it."""
        results = [one.arrived for one in (self.result, self.told) if one and one.arrived]
        slices = [self.arrival.first] if self.arrival else results
        if slices:
            return "first slice", min(slices)
        told = (self.told.changed, "heard of" if self.told.is_open else "result")
        raised = [(self.alert.raised, "alert")] if self.alert else []
        at, what = min([*raised, told])
        return what, at

    @property
    def since(self) -> float:
        return self.first[1]

    @property
    def reason(self) -> str:
        """Why it is what it is, in a sentence."""
        if self.told.decision:
            return self.told.decision["reason"]
        if self.told.is_open and self.alert and self.alert.state != "withdrawn":
            return self.alert.reason
        return self.told.reason or ""

    @property
    def findings(self) -> tuple[dict[str, Any], ...]:
        """Name and volume of each class found, also of what has been found so far."""
        if self.told.is_open and self.alert and self.alert.state != "withdrawn":
            found = self.alert.evidence.get("findings", ())
            return tuple({"class": each["name"], "volume_ml": each["volume_ml"]} for each in found)
        return self.told.findings

    @property
    def is_of_no_head(self) -> bool:
        """Whether it is a localizer, a reformat or the like: of another kind, and nothing that anybody waits for."""
        reason = self.told.reason or ""
        is_few = reason.startswith(Reason.TOO_FEW_SLICES.value) and ";" not in reason
        return self.told.state == "not_analysed" and (reason.startswith(_OF_NO_HEAD) or is_few)


@dataclass(frozen=True, slots=True)
class Board:
    """A look at everything.

    Attributes
    ----------
    is_known : the journal could be read; where not, nothing is known of rows, results and alerts
    rows : in order of urgency, then of waiting time
    not_analysed : rows of series that were of no head
    owed, parked, unconfirmed : how many results are not where they belong
    deliveries : those in groups, parked ones first
    untold : likewise what could not be told of alerts
    engine : what `dicom_node.monitoring.nameplate` has
    troubles : what is wrong, in sentences
    nodes : that share the journal; none where it is a file
    at : when it was looked, in seconds since the epoch

    """

    is_known: bool = True
    rows: tuple[Row, ...] = ()
    not_analysed: tuple[Row, ...] = ()
    owed: int = 0
    parked: int = 0
    unconfirmed: int = 0
    deliveries: tuple[Owed, ...] = ()
    untold: tuple[Owed, ...] = ()
    engine: dict[str, Any] = field(default_factory=dict)
    is_running: bool = False
    nodes: tuple[Member, ...] = ()
    troubles: tuple[str, ...] = ()
    at: float = 0.0

    @property
    def unseen(self) -> int:
        """Alerts that nobody has acknowledged."""
        return sum(row.alert is not None and row.alert.is_open for row in self.rows)

    def find(self, study: str, series: str) -> Row | None:
        """The row of a series; None where there is none."""
        rows = (*self.rows, *self.not_analysed)
        return next((row for row in rows if (row.study, row.series) == (study, series)), None)


class Lookout:
    """Looks at a node's folder. Safe to use from several threads; one looks, and the others get what it saw.

    Parameters
    ----------
    config : of the node

    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._spool = config.node.folder / "spool"
        self._arrivals = Arrivals(self._spool)
        self._records = Records(config)
        self._patients: dict[tuple[str, str], dict[str, str]] = {}
        self._heard: dict[tuple[str, str], float] = {}  # when other nodes first told of what is open there
        self._lock = Lock()
        self._board = Board()
        self._looked = -FRESH_S

    def look(self) -> Board:
        """How things stand."""
        with self._lock:
            if time.monotonic() - self._looked >= FRESH_S:
                self._board = self._look()
                self._looked = time.monotonic()
            return self._board

    def expire(self) -> None:
        """Have the next who asks look again: something has just been changed."""
        with self._lock:
            self._looked = -FRESH_S

    def _look(self) -> Board:
        node = self._config.node
        is_running = lock.is_locked(node.folder)
        engine = nameplate.read(node.folder)
        arrived = {(one.study, one.series): one for one in self._arrivals.look()}
        try:
            records, alerts, items = self._records.read()
        except JournalError as error:
            told = (f"The list can't be made: {error}",)
            return Board(is_known=False, engine=engine, is_running=is_running, troubles=told, at=time.time())
        latest = {(spool.file_name(one.study_uid), spool.file_name(one.series_uid)): one for one in records}
        about = {(spool.file_name(one.study_uid), spool.file_name(one.series_uid)): one for one in reversed(alerts)}
        nodes = self._records.nodes
        others = {
            (spool.file_name(one.study_uid), spool.file_name(one.series_uid)): one
            for one in status.elsewhere(nodes, self._config.node_name, [*records, *self._records.twins])
        }
        self._heard = {key: self._heard.get(key, one.changed) for key, one in others.items()}
        others = {key: replace(one, changed=self._heard[key]) for key, one in others.items()}
        fresh = time.time() - self._config.series.idle_timeout_s
        rows = [
            self._row(
                key, arrived.get(key), latest.get(key), about.get(key), others.get(key), is_fed=is_running, fresh=fresh
            )
            for key in dict.fromkeys([*arrived, *latest, *about, *others])
        ]
        rows = sorted((row for row in rows if row), key=_place)
        kept = {(row.study, row.series) for row in rows}
        self._patients = {key: told for key, told in self._patients.items() if key in kept}
        waiting = [item for item in items if item.state not in DELIVERED]
        states = [item.state for item in waiting]
        parked, unconfirmed = states.count(DeliveryState.PARKED), states.count(DeliveryState.UNCONFIRMED)
        return Board(
            rows=tuple(row for row in rows if not row.is_of_no_head),
            not_analysed=tuple(row for row in rows if row.is_of_no_head),
            owed=len(waiting) - parked - unconfirmed,
            parked=parked,
            unconfirmed=unconfirmed,
            deliveries=owed.results(waiting),
            untold=owed.messages(alerts),
            engine=engine,
            is_running=is_running,
            nodes=tuple(nodes),
            troubles=tuple(self._troubles(engine, is_running=is_running, parked=parked)),
            at=time.time(),
        )

    def _row(
        self,
        key: tuple[str, str],
        arrival: Arrival | None,
        record: status.Series | None,
        alert: Alert | None,
        other: status.Series | None,
        *,
        is_fed: bool,
        fresh: float,
    ) -> Row | None:
        files, recorded = self._records.here.get(key, (0, 0.0))
        is_open = arrival and (arrival.count > files or arrival.changed > recorded)
        if other and not arrival:
            is_open, told = True, other
        elif is_open:
            told = status.Series(
                study_uid=arrival.study_uid,
                series_uid=arrival.series_uid,
                revision=record.revision + 1 if record else 1,
                state=status.RECEIVING if is_fed and arrival.changed > fresh else status.WAITING,
                slices_received=status.slices(self._spool, arrival.study_uid, arrival.series_uid, arrival.count),
                changed=arrival.changed,
                node=self._config.node_name,
            )
        elif record:
            told = record
        else:  # its node died before it could tell of it
            told = status.Series(
                study_uid=alert.study_uid,
                series_uid=alert.series_uid,
                revision=alert.revision,
                state=status.WAITING,
                slices_received=alert.evidence.get("slices", 0),
                changed=alert.changed,
                node=alert.node,
            )
        if arrival is None and told.changed < time.time() - KNOWN_S and not (alert and alert.is_open):
            return None
        result = record if is_open else None
        folder = self._config.node.folder if arrival else self._folder_of(told.node)
        patient = self._patient(folder or self._config.node.folder, key, alert)
        return Row(
            *key, told, result, alert, arrival, patient, _urgency(told, alert), folder or self._config.node.folder,
            holder="" if folder else told.node,
        )  # fmt: skip

    def _folder_of(self, name: str) -> Path | None:
        """Where a node's slices and results are; None where that can't be seen from here."""
        for member in self._records.nodes:
            if member.name == name != self._config.node_name:
                return member.folder if member.shared and self._config.journal.shared_storage else None
        return self._config.node.folder

    def _patient(self, folder: Path, key: tuple[str, str], alert: Alert | None) -> dict[str, str]:
        if key not in self._patients:
            told = slices.patient(arrivals.files(folder / "spool", *key))
            if not told:  # its files are gone, or are just coming
                return dict(alert.patient) if alert else {}
            self._patients[key] = told
        return self._patients[key]

    def _troubles(self, engine: dict[str, Any], *, is_running: bool, parked: int) -> list[str]:
        node = self._config.node
        found = []
        if not is_running:
            found.append("The node does not run: no scan is taken in or analysed. Start it again (scanside serve).")
        elif engine.get("worker") == "none":
            found.append("No engine is ready: scans are taken in, and wait to be analysed. See the node's log.")
        free_gb = shutil.disk_usage(node.folder).free / 1e9
        if free_gb < node.free_floor_gb:
            found.append(f"The disk is full ({free_gb:.1f} GB free): scans are refused. Make room.")
        if parked:
            found.append(
                f"{parked} result{'s' * (parked > 1)} could not be delivered and will not be sent again by "
                f"{'themselves' if parked > 1 else 'itself'}: see `scanside outbox list`."
            )
        return found


def _urgency(told: status.Series, alert: Alert | None) -> Urgency:
    if alert and alert.is_open:
        return Urgency.CRITICAL if alert.level == "critical" else Urgency.URGENT
    if told.is_open:
        return Urgency.ARRIVING
    level = told.decision["level"] if told.decision else None
    is_news = told.changed > time.time() - DAY_S and (alert is None or alert.acknowledged is None)
    return Urgency.TO_BE_READ if level in (None, "incomplete") and is_news else Urgency.SETTLED


def _place(row: Row) -> tuple[int, float]:
    """Who waits stands in the order of waiting; of what is settled the newest is looked for."""
    return row.urgency, -row.since if row.urgency is Urgency.SETTLED else row.since
