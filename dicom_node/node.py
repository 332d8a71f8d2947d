"""The node: receiver, assembler, worker and sender put together, with one thread that decides.

Receiver threads and the supervisor only put events on a queue. The desk takes them one after the other, so the
assembler needs no lock and every decision about a series is made in one place.
"""

from __future__ import annotations

import queue
import shutil
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from dicom_node.alerts.heralds import Heralds
from dicom_node.alerts.ledger import Ledger
from dicom_node.assembler import Assembler, Assembly
from dicom_node.backlog import Backlog
from dicom_node.delivery.outbox import DeliveryState, Outbox
from dicom_node.delivery.sender import Sender
from dicom_node.dispatch import Dispatch
from dicom_node.images.gate import Reason
from dicom_node.intake import commitment, mpps
from dicom_node.intake.announced import Announced
from dicom_node.intake.commitment import Commitments
from dicom_node.intake.mpps import PerformedSteps
from dicom_node.intake.receiver import Receiver
from dicom_node.monitoring import nameplate
from dicom_node.monitoring.metrics import Metrics
from dicom_node.monitoring.trail import Trail
from dicom_node.network.tls import Identity
from dicom_node.opening import limits, opening
from dicom_node.page.child import Page
from dicom_node.retention import Retention
from dicom_node.storage.journal import Journal, JournalError, RevisionTaken
from dicom_node.storage.lock import FolderLock
from dicom_node.storage.membership import Membership
from dicom_node.storage.register import Register, history, without_result
from dicom_node.storage.spool import Spool
from dicom_node.supervisor import Supervisor
from runtime.errors import BackendError, ScansideError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dicom_node.configuration.config import Config
    from dicom_node.delivery.outbox import OutboxItem
    from dicom_node.dispatch import Result
    from dicom_node.storage.spool import Instance

JOURNAL_RETRY_S = 5.0
DESK_PATIENCE_S = 5.0  # for who asks the desk

_T = TypeVar("_T")

log = structlog.get_logger(__name__)


class Node:
    """A running node, from `start` to `stop`.

    Parameters
    ----------
    config : where to listen, what to run, where results go

    Raises
    ------
    LockedError : another node runs in this folder
    TlsError : the files of [tls] can't be used

    """

    def __init__(self, config: Config) -> None:
        self.config = config
        folder = config.node.folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(folder)
        self._spool = Spool(folder / "spool", config.node.free_floor_gb, config.node.max_instance_mb)
        shares_storage = config.journal.shared_storage
        self._journal = Journal(config.journal_place, node=config.node_name, shares_storage=shares_storage)
        self._members = Membership(self._journal, folder, self._spool, self, shares_storage=shares_storage)
        self._announced = Announced(self._journal)
        self._assembler = Assembler(
            config.series.idle_timeout_s,
            partial(history, self._spool, self._journal),
            self._announced.names,
            min_coverage_mm=config.series.min_coverage_mm,
        )
        self._events: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._is_to_close = False  # an event that waits will look for what is due
        self._desk = threading.Thread(target=self._run, name="desk", daemon=True)
        self.metrics = Metrics()
        identity = Identity(config.tls) if config.tls else None
        self._outbox, self._ledger = Outbox(self._journal), Ledger(self._journal, config.channels)
        self._register = Register(self._journal, self._outbox, self._ledger)
        self.trail = Trail(config.audit, config.node.ae_title, identity, self.metrics)
        self._sender = Sender(
            self._outbox, config.destinations, config.node.ae_title, self._on_sent, identity, self.trail
        )
        self._heralds = Heralds(self._ledger, config.channels, config.node.ae_title, identity, self.metrics.alert_told)
        self.supervisor = Supervisor(opening(config), self._on_worker)
        self._dispatch = Dispatch(
            self.supervisor, self._assembler, folder / "results", self._record, self.metrics, self._on_early
        )
        self._backlog = Backlog(self._assembler, self._dispatch.feed, self._later)
        self._commitments = Commitments(
            self._journal, self._spool, self._announced, config.scanners, config.node.ae_title, self._told, identity
        )
        self._retention = Retention(self._spool, self._journal, folder / "results", config.node.keep_days, self.trail)
        self._receiver = Receiver(
            ae_title=config.node.ae_title,
            address=config.node.address,
            port=config.node.port,
            spool=self._spool,
            intake=self,
            **limits(config),
            identity=identity if config.node.tls else None,
            metrics=self.metrics,
            trail=self.trail,
            services={
                mpps.SOP_CLASS: PerformedSteps(self._announced, self._told),
                commitment.SOP_CLASS: self._commitments,
            },
        )
        self.metrics.watch(self._outbox, self._ledger, folder, self._gauges)
        self.page = Page(config)
        self._web = None
        if config.web.port is not None:
            from dicom_node.monitoring.web import Web  # noqa: PLC0415  # loads a web server: for who wants one

            self._web = Web(self, self.metrics.registry, config.web.address, config.web.port)
        self._first_answer: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._is_closed = False

    @property
    def port(self) -> int:
        """The DICOM port listened on."""
        return self._receiver.port

    def arriving(self) -> list[dict[str, Any]] | None:
        """Open series, for other nodes; None where the desk does not answer in time."""
        return self._ask_desk(self._assembler.arriving)

    def progress(self) -> dict[str, tuple[int, int]]:
        """Open series by SeriesInstanceUID: images analysed so far, and images here."""
        return self._ask_desk(self._assembler.progress) or {}

    def start(self) -> None:
        """Open the engine, test it, resume what an earlier life left, and only then open the DICOM port.

        Raises
        ------
        BackendError : the worker could not open the model
        ReceiverError, WebError, PageError : a port can't be opened

        """
        try:
            self._members.join()
            self._open_engine()
            self._resume()
        except (ScansideError, OSError):
            self.supervisor.stop()
            self._let_go()
            raise
        self._desk.start()
        self.trail.start()
        self._sender.start()
        self._heralds.start()
        self._commitments.start()
        self._retention.start()
        try:
            if self._web:
                self._web.start()
            self.page.start()
            self._receiver.start()
        except ScansideError:  # a port is taken
            self.stop()
            raise

    def _open_engine(self) -> None:
        nameplate.write(self.config.node.folder, None, "it is being opened")
        self.supervisor.start()
        answer = self._first_answer.get()
        if answer["is"] != "ready":
            ended = "the worker process ended before it was ready: see its output above"
            raise BackendError(answer.get("error", ended))

    def reload(self, config: Config) -> None:
        """Go on with another configuration, which differs in what a running node can change (`reload.merge`)."""
        self.config = config
        self._spool.reload(config.node.free_floor_gb, config.node.max_instance_mb)
        self._receiver.reload(**limits(config))
        self._commitments.reload(config.scanners)
        self._retention.reload(config.node.keep_days)
        self._sender.reload(config.destinations)
        self._ledger.reload(config.channels)
        self._heralds.reload(config.channels)
        self.supervisor.reload(opening(config))
        self.page.reload(config)
        series = config.series
        self._events.put(lambda: self._assembler.reload(series.idle_timeout_s, series.min_coverage_mm))

    def close(self) -> None:
        """Take no more associations; those that are open go on, and so does what they have brought."""
        self._is_closed = True
        self._receiver.close()

    def unfinished(self, within_s: float) -> dict[str, Any]:
        """What a stop may wait for, in an order in which nothing slips by on its way from one to the next."""
        found: dict[str, Any] = {"associations": self._receiver.associations()}
        series = self._ask_desk(partial(self._settle, time.monotonic()), within_s)
        found["series"] = "unknown: the desk gives no answer" if series is None else series
        found["destinations"] = self._sender.busy(within_s)
        found["channels"] = self._heralds.busy(within_s)
        return {what: waiting for what, waiting in found.items() if waiting}

    def stop(self) -> None:
        """Stop taking slices, finish what the worker has been told, keep the rest for the next start."""
        self._is_closed = True
        self._receiver.stop()
        if self._web:
            self._web.stop()
        self.page.stop()
        self.supervisor.stop()
        self._events.put(None)
        self._desk.join()
        self._commitments.stop()
        self._retention.stop()
        self._sender.stop()
        self._heralds.stop()
        self.trail.stop()
        self._let_go()

    def _let_go(self) -> None:
        self._members.stop()
        self._journal.close()
        self._lock.release()

    def health(self) -> dict[str, str]:
        """Look whether the desk, which decides everything, answers, and whether all that has to run runs."""
        desk = "" if self._ask_desk(dict) is not None else f"gives no answer within {DESK_PATIENCE_S:g} s"
        receiver = "" if self._is_closed or self._receiver.is_alive() else "takes no connections any more"
        return {"desk": desk, "receiver": receiver, "sender": self._sender.fault(), "heralds": self._heralds.fault()}

    def readiness(self) -> dict[str, str]:
        """Look whether slices would be taken and analysed now."""
        free_gb, floor = shutil.disk_usage(self.config.node.folder).free / 1e9, self.config.node.free_floor_gb
        full = f"{free_gb:.1f} GB free, slices are refused below {floor:g}" if free_gb < floor else ""
        worker = "" if self._dispatch.is_ready else "no worker is ready; slices are taken, and wait"
        fault = self._journal.database.fault()
        journal = f"the database is away ({fault}); slices are taken; new series and results wait" if fault else ""
        stopping = {"node": "is stopping"} if self._is_closed else {}
        return self.health() | {"worker": worker, "journal": journal, "disk": full} | stopping

    def summary(self) -> str:
        """Where it listens and what waits, in a line for people."""
        gauges, node = self._gauges(), self.config.node
        counts = f"{gauges.get('series_open', '?')} series open, {gauges.get('images_waiting', '?')} images to analyse"
        try:
            undelivered = self._outbox.undelivered()
        except JournalError as error:
            return str(error)
        parked = sum(count for (_, state), count in undelivered.items() if state is DeliveryState.PARKED)
        counts += f", {undelivered.total() - parked} results to send" + f", {parked} PARKED" * (parked > 0)
        worker = "" if self._dispatch.is_ready else "; no worker is ready"
        where = "stopping" if self._is_closed else f"{node.ae_title} on {node.address}:{self.port}"
        return f"{where}: {counts}{worker}"

    def _gauges(self) -> dict[str, float]:
        gauges = {"worker_ready": self._dispatch.is_ready}
        if told := self._ask_desk(lambda: (self._assembler.progress(), self._backlog.images())):  # else all is unknown
            waiting = sum(here - seen for seen, here in told[0].values())
            gauges |= {"series_open": len(told[0]), "images_waiting": waiting, "images_not_noted": told[1]}
        return gauges

    def _ask_desk(self, question: Callable[[], _T], within_s: float = DESK_PATIENCE_S) -> _T | None:
        """Have the desk answer between two events; None where it does not in time."""
        answer: queue.SimpleQueue[_T] = queue.SimpleQueue()
        self._events.put(lambda: answer.put(question()))
        try:
            return answer.get(timeout=max(0.0, min(within_s, DESK_PATIENCE_S)))
        except queue.Empty:
            return None

    def _on_sent(self, item: OutboxItem) -> None:
        self.metrics.stage("delivery", time.time() - item.created)

    # what other threads tell the desk

    def instance_stored(self, association: str, instance: Instance) -> None:
        self._events.put(lambda: self._backlog.stored(association, instance))

    def association_ended(self, association: str, *, released: bool) -> None:
        self._events.put(lambda: self._backlog.ended(association, released=released))

    def _told(self, series_uids: tuple[str, ...]) -> None:
        self._events.put(lambda: self._backlog.announced(series_uids))

    def _on_worker(self, message: dict[str, Any]) -> None:
        if message["worker"] == 1 and message["is"] in ("ready", "broken", "died"):
            self._first_answer.put(message)
        if message["is"] == "broken":
            log.error("worker_broken", error=message["error"])
        self._events.put(lambda: self._dispatch.hear(message))

    # the desk

    def _run(self) -> None:
        while True:
            deadlines = [at for one in (self._assembler, self._dispatch) if (at := one.next_deadline()) is not None]
            try:
                event = self._events.get(timeout=max(0.0, min(deadlines) - time.monotonic()) if deadlines else None)
            except queue.Empty:
                event = dict  # nothing: the passing of time alone can make a series due
            if event is None:
                return
            try:
                event()
                if self._events.empty():
                    self._close_due(time.monotonic())
                elif not self._is_to_close:
                    # behind what took long may be slices of a series that seems quiet: what waits now is heard first
                    self._is_to_close = True
                    self._events.put(partial(self._close_due, time.monotonic()))
                self._dispatch.pump(time.monotonic())
            except Exception:  # one event's failure must not end the desk: every series behind it would wait for ever
                log.exception("event_failed")

    def _settle(self, heard_until: float) -> int:
        """Close what is due; how many series are in work then."""
        self._close_due(heard_until)
        return self._assembler.unfinished()

    def _close_due(self, heard_until: float) -> None:
        """Close what is due by all that had been told by then."""
        self._is_to_close = False
        for assembly in self._assembler.due(heard_until):
            self.metrics.stage("closing", time.monotonic() - assembly.last_arrival)
            log.info("series_closed", series=assembly.name, images=len(assembly.paths), missing=assembly.missing)
            self._dispatch.close(assembly)
            if self._dispatch.is_ready and assembly.promises_results(self.config.series.min_slices):
                self._sender.expect()

    def _on_early(self, assembly: Assembly, report_json: str, patient: Mapping[str, str]) -> None:
        """Raise an alert before its series ends; what can't be written is tried again, as long as that is so."""
        try:
            self._register.note_early(assembly, report_json, patient)
        except JournalError as error:
            log.warning("alert_not_noted", series=assembly.name, reason=str(error), retry_s=JOURNAL_RETRY_S)
            self._later(lambda: self._on_early(assembly, report_json, patient))
            return
        self._heralds.wake()

    def _record(self, assembly: Assembly, result: Result) -> None:
        """Write a result and what is owed for it into the journal, and only then forget the series."""
        try:
            self._register.record(assembly, result, self.config.destinations)
            left_out = self._journal.left_out(assembly.study_uid, Reason.BONE_KERNEL) if result.has_failed else ()
        except RevisionTaken as error:  # by a node that has got other slices of the series
            log.warning("revision_taken", series=assembly.name, reason=str(error))
            result.discard()
            self._assembler.finished(assembly.name)
            self._feed_again(assembly.study_uid, assembly.series_uid)
            return
        except JournalError as error:  # the disk is full: results and slices are there, so it can be said again
            log.warning("result_not_recorded", series=assembly.name, reason=str(error), retry_s=JOURNAL_RETRY_S)
            self._later(lambda: self._record(assembly, result))
            return
        self._assembler.finished(assembly.name)
        for each in left_out:  # in favour of this one
            self._feed_again(each.study_uid, each.series_uid)
        self.metrics.stage("results", time.monotonic() - assembly.last_arrival)
        self.metrics.series(result.state, result.code, result.level)
        self._sender.wake()
        self._heralds.wake()
        log.info("series_finished", series=assembly.name, state=result.state, reason=result.reason, **result.summary())

    def _feed_again(self, study_uid: str, series_uid: str) -> None:
        try:
            if self._assembler.is_open(study_uid, series_uid) or not self._spool.series(study_uid, series_uid):
                return
            assembly = self._assembler.reopen(study_uid, series_uid, time.monotonic())
        except (JournalError, OSError):
            self._later(lambda: self._feed_again(study_uid, series_uid))
        else:
            self._dispatch.feed(assembly, assembly.paths)

    def _later(self, event: Callable[[], None]) -> None:
        timer = threading.Timer(JOURNAL_RETRY_S, self._events.put, [event])
        timer.daemon = True
        timer.start()

    def _resume(self) -> None:
        """Open again each series with more or newer instances than its last result covers, or whose analysis failed."""
        for study_uid, series_uid, count in without_result(self._spool, self._journal, self._journal.node):
            assembly = self._assembler.reopen(study_uid, series_uid, time.monotonic())
            log.info("series_resumed", series=assembly.name, images=count)
