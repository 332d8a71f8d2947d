"""The node: receiver, assembler, worker and sender put together, with one thread that decides.

Receiver threads and the supervisor only put events on a queue. The desk takes them one after the other, so the
assembler needs no lock and every decision about a series is made in one place.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from dicom_node.assembler import Assembler, Assembly
from dicom_node.journal import Journal, ResultFile, SeriesState
from dicom_node.receiver import Receiver, ReceiverError
from dicom_node.sender import Sender
from dicom_node.spool import Spool
from dicom_node.supervisor import Supervisor
from runtime.errors import BackendError
from runtime.types import Plane

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dicom_node.config import Config
    from dicom_node.spool import Instance

MOST_DEATHS = 3  # workers that one series may take with it before it is set aside

log = structlog.get_logger(__name__)


class Node:
    """A running node, from `start` to `stop`.

    Parameters
    ----------
    config : where to listen, what to run, where results go

    """

    def __init__(self, config: Config) -> None:
        self.config = config
        folder = config.node.folder
        folder.mkdir(parents=True, exist_ok=True)
        self._spool = Spool(folder / "spool", config.node.free_floor_gb)
        self._results = folder / "results"
        self._journal = Journal(folder / "journal.sqlite")
        self._assembler = Assembler(config.series.idle_timeout_s, self._history)
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._desk = threading.Thread(target=self._run, name="desk", daemon=True)
        self._sender = Sender(self._journal, config.destinations, config.node.ae_title)
        self.supervisor = Supervisor(_opening(config), self._on_worker)
        self._receiver = Receiver(
            ae_title=config.node.ae_title,
            address=config.node.address,
            port=config.node.port,
            spool=self._spool,
            intake=self,
            allowed_calling_aes=config.node.allowed_calling_aes,
            max_associations=config.node.max_associations,
        )
        self._worker_ready = False
        self._first_answer: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._deaths: Counter[str] = Counter()  # by name of the assembly that was being worked on

    @property
    def port(self) -> int:
        """The DICOM port listened on."""
        return self._receiver.port

    def progress(self) -> dict[str, tuple[int, int]]:
        """Open series by SeriesInstanceUID: images analysed so far, and images here."""
        answer: queue.SimpleQueue[dict[str, tuple[int, int]]] = queue.SimpleQueue()
        self._events.put(lambda: answer.put(self._assembler.progress()))
        return answer.get()

    def start(self) -> None:
        """Open the engine, test it, resume what an earlier life left, and only then open the DICOM port.

        Raises
        ------
        BackendError : the worker could not open the model
        ReceiverError : the port can't be opened

        """
        self.supervisor.start()
        answer = self._first_answer.get()
        if answer["is"] != "ready":
            self.supervisor.stop()
            raise BackendError(
                answer.get("error", "the worker process ended before it was ready: see its output above")
            )
        self._resume()
        self._desk.start()
        self._sender.start()
        try:
            self._receiver.start()
        except ReceiverError:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop taking slices, finish what the worker has been told, keep the rest for the next start."""
        self._receiver.stop()
        self.supervisor.stop()
        self._events.put(None)
        self._desk.join()
        self._sender.stop()
        self._journal.close()

    # what other threads tell the desk

    def instance_stored(self, association: str, instance: Instance) -> None:
        self._events.put(lambda: self._take(association, instance))

    def association_ended(self, association: str, *, released: bool) -> None:
        self._events.put(lambda: self._assembler.ended(association, released=released))

    def _on_worker(self, message: dict[str, Any]) -> None:
        if message["is"] in ("ready", "broken", "died"):
            self._first_answer.put(message)
        if message["is"] == "broken":
            log.error("worker_broken", error=message["error"])
        self._events.put(lambda: self._hear(message))

    # the desk

    def _run(self) -> None:
        while True:
            deadline = self._assembler.next_deadline()
            try:
                event = self._events.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                event = _nothing
            if event is None:
                return
            try:
                event()
                self._close_due()
            except Exception:  # one event's failure must not end the desk: every series behind it would wait for ever
                log.exception("event_failed")

    def _take(self, association: str, instance: Instance) -> None:
        assembly, new = self._assembler.stored(association, instance, time.monotonic())
        self._feed(assembly, new)

    def _feed(self, assembly: Assembly, paths: Sequence[Path]) -> None:
        if not self._worker_ready:  # the next worker is told everything when it is
            return
        for path in paths:
            self.supervisor.send({"do": "slice", "series": assembly.name, "path": str(path)})

    def _close_due(self) -> None:
        for assembly in self._assembler.due(time.monotonic()):
            log.info("series_closed", series=assembly.name, images=len(assembly.paths), missing=list(assembly.missing))
            self._send_close(assembly)

    def _send_close(self, assembly: Assembly) -> None:
        if self._worker_ready:
            self.supervisor.send(
                {
                    "do": "close",
                    "series": assembly.name,
                    "revision": assembly.revision,
                    "folder": str(self._results_folder(assembly)),
                    "missing": list(assembly.missing),
                }
            )

    def _hear(self, message: dict[str, Any]) -> None:
        match message["is"]:
            case "ready":
                log.info("worker_ready", model=message["model"], backend=message["backend"], pid=self.supervisor.pid)
                self._worker_ready = True
                for assembly in self._assembler.restarted():
                    self._feed(assembly, list(assembly.paths))
                    if assembly.closed:
                        self._send_close(assembly)
            case "died":
                self._worker_ready = False
                self._set_poison_aside()
            case "slice":
                plane = message["plane"]
                self._assembler.seen(message["series"], Path(message["path"]), _plane(plane) if plane else None)
                if message["refusal"]:
                    log.info("image_not_analysed", series=message["series"], reason=message["refusal"])
            case "result":
                self._record(message)

    def _record(self, message: dict[str, Any]) -> None:
        assembly = self._assembler.finished(message["series"])
        if assembly is None:
            return
        self._deaths.pop(assembly.name, None)
        self._journal.record_result(
            assembly.study_uid,
            assembly.series_uid,
            assembly.revision,
            state=SeriesState(message["state"]),
            reason=message["reason"],
            slices=len(assembly.paths),
            report_json=message["report"],
            files=[ResultFile(**{**file, "path": Path(file["path"])}) for file in message["files"]],
            destinations={each.name: each.results for each in self.config.destinations},
        )
        self._sender.wake()
        log.info(
            "series_finished",
            series=assembly.name,
            state=message["state"],
            reason=message["reason"],
            files=len(message["files"]),
        )

    def _set_poison_aside(self) -> None:
        """Count a death against the series the worker was at; after three, record it as failed and go on without it."""
        victim = self._assembler.first_unanswered()
        if victim is None:
            return
        self._deaths[victim.name] += 1
        if self._deaths[victim.name] >= MOST_DEATHS:
            reason = f"the worker died {MOST_DEATHS} times on this series; its slices are kept in {_folder_of(victim)}"
            log.error("series_set_aside", series=victim.name, reason=reason)
            self._record({"series": victim.name, "state": "failed", "reason": reason, "report": None, "files": []})

    # the disk

    def _resume(self) -> None:
        """Open again every series that has more instances on disk than its last result covers."""
        series: Counter[tuple[str, str]] = Counter((i.study_uid, i.series_uid) for i in self._spool.replay())
        for (study_uid, series_uid), count in series.items():
            latest = self._journal.latest(study_uid, series_uid)
            if latest is None or latest.slices != count:
                assembly = self._assembler.reopen(study_uid, series_uid, time.monotonic())
                log.info("series_resumed", series=assembly.name, images=count)

    def _history(self, study_uid: str, series_uid: str) -> tuple[int, list[Instance]]:
        latest = self._journal.latest(study_uid, series_uid)
        return (latest.revision if latest else 0), list(self._spool.series(study_uid, series_uid))

    def _results_folder(self, assembly: Assembly) -> Path:
        return self._results.joinpath(*_folder_of(assembly).parts[-2:], f"revision-{assembly.revision}")


def _folder_of(assembly: Assembly) -> Path:
    """The series' folder in the spool, whose last two parts are safe names for study and series."""
    return next(iter(assembly.paths)).parent


def _opening(config: Config) -> dict[str, Any]:
    """What a new worker has to know."""
    return {
        "do": "open",
        "bundle": str(config.model.bundle) if config.model.bundle else None,
        "backend": config.model.backend,
        "threads": config.model.threads,
        "max_batch": config.model.max_batch,
        "min_slices": config.series.min_slices,
        "triage": [rule.model_dump(mode="json") for rule in config.triage],
        "log_level": config.log.level,
        "log_format": config.log.format,
    }


def _plane(plane: dict[str, Any]) -> Plane:
    return Plane(**{name: tuple(value) if isinstance(value, list) else value for name, value in plane.items()})


def _nothing() -> None:
    """Stand for the passing of time, which alone can make a series due."""
