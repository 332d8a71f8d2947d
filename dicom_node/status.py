"""What a node's folder tells of it. Who looks needs no running node, writes nothing and takes no lock."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydicom.tag import Tag

from dicom_node.alerts.ledger import Ledger
from dicom_node.delivery.outbox import DELIVERED, DeliveryState, Outbox
from dicom_node.images import part10
from dicom_node.images.gate import MULTI_FRAME
from dicom_node.monitoring import nameplate
from dicom_node.retention import DAY_S
from dicom_node.storage import lock, spool
from dicom_node.storage.journal import Journal, JournalError, SeriesState
from dicom_node.storage.membership import members

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from dicom_node.alerts.alert import Alert
    from dicom_node.configuration.config import Config
    from dicom_node.delivery.outbox import OutboxItem
    from dicom_node.storage.journal import SeriesRecord
    from dicom_node.storage.membership import Member

NUMBER_OF_FRAMES = Tag("NumberOfFrames")
RECEIVING = "receiving"  # the node runs, and a slice came within the idle timeout
WAITING = "waiting"  # acknowledged and without a result: to be closed, or to be analysed by the next start


@dataclass(frozen=True, slots=True)
class Series:
    """One revision of one series; the keys of `scanside status --json`.

    Attributes
    ----------
    state : a `SeriesState`, `RECEIVING` or `WAITING`
    reason : why it was not analysed or failed; None otherwise
    provisional, missing, decision, findings : as the report has them; None or empty without one
    slices_received : on disk where it is open; otherwise those that had come when it closed. Every frame of a
        multi-frame image is one; but of a series without a report the files are counted
    slices_analysed : how many of them the report rests on; None without one
    engine : which engine answered, with its version; several where one stood in for another; None without a report
    arrived, composed : first slice and report, in seconds since the epoch; None without a report
    node : who has it
    changed : when the last slice came where it is open, otherwise when the result was recorded; likewise

    """

    study_uid: str
    series_uid: str
    revision: int
    state: str
    slices_received: int
    changed: float
    reason: str | None = None
    slices_analysed: int | None = None
    provisional: bool | None = None
    missing: tuple[str, ...] = ()
    decision: dict[str, str] | None = None
    findings: tuple[dict[str, Any], ...] = ()
    engine: str | None = None
    arrived: float | None = None
    composed: float | None = None
    node: str = ""

    @property
    def is_open(self) -> bool:
        return self.state in {RECEIVING, WAITING}


@dataclass(frozen=True, slots=True)
class OpenAlert:
    """An alert that somebody has to acknowledge, or is owed a message of. Whose it is, `scanside alerts list` says.

    Attributes
    ----------
    level, state, reason : as the ledger has them
    raised : seconds since the epoch
    acknowledged : whether somebody has
    untold : channels that have not got all yet

    """

    id: int
    study_uid: str
    series_uid: str
    level: str
    state: str
    reason: str
    raised: float
    acknowledged: bool
    untold: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """One of the nodes that share a journal: whether it is heard of, and when it was last, seconds since the epoch."""

    name: str
    lives: bool
    seen: float


@dataclass(frozen=True, slots=True)
class Status:
    """All that `scanside status` tells.

    Attributes
    ----------
    node_running : whether a node holds the folder
    results_unsent, results_parked : what destinations still have to get, and what only a person sends on
    results_unconfirmed : what they have taken, and not said yet that they keep it
    refusing : why slices are refused, if they are
    idle : why the node that runs has nobody who analyses, if it has not
    series : every revision in the order of recording, then what is open
    alerts : that are open, newest first
    nodes : that share the journal; none where it is a file

    """

    node_running: bool
    results_unsent: int
    results_parked: int
    results_unconfirmed: int
    refusing: str | None
    series: tuple[Series, ...]
    alerts: tuple[OpenAlert, ...] = ()
    nodes: tuple[Node, ...] = ()
    idle: str | None = None


@dataclass(frozen=True, slots=True)
class Delivery:
    """One result on its way to one destination.

    Attributes
    ----------
    item : its row of the journal
    next_try : seconds since the epoch; None where there will be none: it is sent, parked or on the wire, or its
        destination is configured no more

    """

    item: OutboxItem
    next_try: float | None

    def told(self) -> dict[str, Any]:
        """What `scanside outbox list --json` has of it."""
        item = self.item
        return {
            "id": item.id,
            "study_uid": item.study_uid,
            "series_uid": item.series_uid,
            "revision": item.revision,
            "role": item.role,
            "destination": item.destination,
            "state": str(item.state),
            "tries": item.tries,
            "not_taken": item.attempts,
            "last_error": item.last_error,
            "next_try": self.next_try,
            "created": item.created,
            "sent": item.sent,
            "confirmed": item.confirmed,
            "path": str(item.path),
        }


def look(config: Config, days: float = inf) -> Status:
    """Read the spool, the journal and the lock.

    Parameters
    ----------
    days : what was recorded before is left out; what is open or owed never is

    Raises
    ------
    JournalError : there is none, or it can't be read

    """
    running = lock.is_locked(config.node.folder)
    # slices first: a series that closes meanwhile is then told by its result and not twice
    held = spool.count(config.node.folder / "spool")
    with contextlib.closing(open_journal(config, read_only=True)) as journal:
        records, items = journal.series(), Outbox(journal).items()
        covering = [*records, *journal.twins()]
        alerts = tuple(_open_alerts(Ledger(journal).alerts()))
        nodes = members(journal)
    own = [record for record in covering if not nodes or record.node == config.node_name]
    fresh = time.time() - config.series.idle_timeout_s if running else inf
    waiting = [*_without_result(config.node.folder / "spool", held, own, config.node_name, fresh)]
    waiting += elsewhere(nodes, config.node_name, covering)
    if config.journal.shared_storage:
        waiting += _left_behind(nodes, covering, config.node_name)
    owed = {(item.study_uid, item.series_uid) for item in items if item.state not in DELIVERED}
    told = [one for one in records if _is_recent(one.recorded, days) or (one.study_uid, one.series_uid) in owed]
    free_gb, floor = shutil.disk_usage(config.node.folder).free / 1e9, config.node.free_floor_gb
    states = Counter(item.state for item in items)
    parked, unconfirmed = states[DeliveryState.PARKED], states[DeliveryState.UNCONFIRMED]
    return Status(
        node_running=running,
        results_unsent=len(items) - sum(states[each] for each in DELIVERED) - parked - unconfirmed,
        results_parked=parked,
        results_unconfirmed=unconfirmed,
        refusing=f"{free_gb:.1f} GB free, below node.free_floor_gb = {floor:g}" if free_gb < floor else None,
        series=(*map(recorded, told), *sorted(waiting, key=lambda one: one.changed)),
        alerts=alerts,
        nodes=tuple(Node(one.name, one.lives, one.seen) for one in nodes),
        idle=_idle(config.node.folder) if running else None,
    )


def _idle(folder: Path) -> str | None:
    engine = nameplate.read(folder)
    return (engine.get("why") or "its log says why") if engine.get("worker") == "none" else None


def _without_result(
    root: Path, held: Mapping[tuple[str, str], tuple[int, float]], own: Iterable[SeriesRecord], node: str, fresh: float
) -> Iterator[Series]:
    """Series of a node's spool whose last result does not cover them; they arrive still where that is fresh."""
    latest = {(record.study_uid, record.series_uid): record for record in sorted(own, key=lambda one: one.revision)}
    for key, (count, last) in held.items():
        if key not in latest or count > latest[key].slices or last > latest[key].recorded:
            yield Series(
                study_uid=key[0],
                series_uid=key[1],
                revision=latest[key].revision + 1 if key in latest else 1,
                state=RECEIVING if last > fresh else WAITING,
                slices_received=slices(root, *key, count),
                changed=last,
                node=node,
            )


def _left_behind(nodes: Iterable[Member], records: Sequence[SeriesRecord], here: str) -> Iterator[Series]:
    """What lies without a result with nodes that are gone, and tell of nothing: who took over could not read it."""
    for node in nodes:
        if node.name != here and not node.lives and node.shared and not node.open:
            with contextlib.suppress(OSError):  # a folder that is gone holds nothing that could be told
                held = spool.count(node.folder / "spool")
                own = [record for record in records if record.node == node.name]
                yield from _without_result(node.folder / "spool", held, own, node.name, inf)


def elsewhere(nodes: Iterable[Member], here: str, records: Iterable[SeriesRecord]) -> list[Series]:
    """Series without a result that other nodes have, as these told of them last, less what they recorded since."""
    recorded: dict[tuple[str, str, str], int] = {}
    for record in records:
        key = record.node, record.study_uid, record.series_uid
        recorded[key] = max(record.revision, recorded.get(key, 0))
    return [
        Series(**one, state=RECEIVING if node.lives else WAITING, changed=node.seen, node=node.name)
        for node in nodes
        if node.name != here
        for one in node.open
        if one["revision"] > recorded.get((node.name, one["study_uid"], one["series_uid"]), 0)
    ]


def deliveries(config: Config, days: float = inf) -> list[Delivery]:
    """Every result for every destination, in the order of sending.

    Parameters
    ----------
    days : what arrived and was made before is left out

    Raises
    ------
    JournalError : there is none, or it can't be read

    """
    with contextlib.closing(open_journal(config, read_only=True)) as journal:
        outbox = Outbox(journal)
        items = outbox.items()
        # all that a destination is owed goes when the first of it is due
        due = {one.name: outbox.next_due(one.name) for one in config.destinations}
    told = [item for item in items if item.state not in DELIVERED or _is_recent(item.created, days)]
    return [Delivery(item, _next_try(item, due)) for item in told]


def open_journal(config: Config, *, read_only: bool) -> Journal:
    """The journal of a node that has run before, without making one where there is none.

    Raises
    ------
    JournalError : there is none, or it can't be read

    """
    place = config.journal_place
    if isinstance(place, Path) and not place.exists():
        raise JournalError(f"{place} is not there: the node of this configuration has not run yet")
    shares_storage = config.journal.shared_storage
    return Journal(place, read_only=read_only, node=config.node_name, shares_storage=shares_storage)


def _open_alerts(alerts: Iterable[Alert]) -> Iterator[OpenAlert]:
    for one in alerts:
        owed = (each.channel for each in one.messages if each.state in ("queued", "sending", "waiting", "parked"))
        untold = tuple(dict.fromkeys(owed))
        if one.is_open or untold:
            told = {name: getattr(one, name) for name in OpenAlert.__slots__ if hasattr(one, name)}
            yield OpenAlert(**told | {"acknowledged": one.acknowledged is not None, "untold": untold})


def _is_recent(at: float, days: float) -> bool:
    return at >= time.time() - days * DAY_S


def slices(root: Path, study_uid: str, series_uid: str, files: int) -> int:
    """Slices of an open series: its files, or their frames; of a series of single-frame images one file is opened."""
    paths = (root / spool.file_name(study_uid) / spool.file_name(series_uid)).glob("*.dcm")
    first = next(paths, None)
    frames = _frames(first) if first else None
    return files if frames is None else frames + sum(_frames(path) or 1 for path in paths)


def _frames(path: Path) -> int | None:
    """NumberOfFrames of a multi-frame CT; None for any other file, or one that does not tell."""
    try:
        with path.open("rb") as file:
            head = memoryview(file.read(spool.HEAD))
        start = 144 + int.from_bytes(head[140:144], "little")
        sop_class_uid, syntax = part10.file_meta(head[132:start])
        if sop_class_uid not in MULTI_FRAME:
            return None
        return int(part10.read_head(head[start:], syntax, (NUMBER_OF_FRAMES,)).NumberOfFrames)
    except (part10.DataSetError, AttributeError, TypeError, ValueError, OSError):
        return None


def _next_try(item: OutboxItem, due: Mapping[str, float | None]) -> float | None:
    match item.state:
        case DeliveryState.QUEUED | DeliveryState.WAITING:
            return due.get(item.destination)
        case DeliveryState.UNCONFIRMED:
            return item.next_try if item.destination in due else None
        case _:
            return None


def recorded(record: SeriesRecord) -> Series:
    """What the journal has of one revision of a series."""
    told: dict[str, Any] = {}
    received = 0  # the journal counts files
    if record.state is SeriesState.ANALYSED and record.report_json:
        report = json.loads(record.report_json)
        received = report.get("received", 0)
        told = {
            "slices_analysed": report["slices"],
            "provisional": report["provisional"],
            "missing": tuple(report["missing"]),
            "decision": report["decision"],
            "findings": tuple(
                {"class": finding["name"], "volume_ml": finding["volume_ml"]} for finding in report["findings"]
            ),
            "engine": report["model"]["backend"],
            "arrived": report.get("arrived"),  # older ones lack it
            "composed": report["composed"],
        }
    return Series(
        study_uid=record.study_uid,
        series_uid=record.series_uid,
        revision=record.revision,
        state=str(record.state),
        slices_received=max(record.slices, received),
        changed=record.recorded,
        reason=record.reason,
        node=record.node,
        **told,
    )
