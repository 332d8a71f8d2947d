"""What the worker is told, in which order, and what it owes an answer to.

Few requests are under way at a time: so a finished series is not held up by the slices of others, and a worker that
hangs never blocks the desk. When a worker dies, the first request without an answer is the suspect. From then on
requests go one by one until each suspect has been answered; an image that takes three workers with it is set aside,
alone.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from dicom_node.images.gate import Reason
from dicom_node.monitoring import nameplate
from dicom_node.storage.journal import ResultFile, SeriesState
from runtime.types import IN_PLACE, Plane

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from dicom_node.assembler import Assembler, Assembly
    from dicom_node.monitoring.metrics import Metrics
    from dicom_node.supervisor import Supervisor

UNDER_WAY = 32  # requests at a time; more would wait in the worker instead of here
HANG_S = 120.0  # a request that takes longer has hung its worker
MOST_DEATHS = 3  # workers that one request may take with it
NO_ROOM_RETRY_S = 5.0  # results that did not fit on the disk

_FIRST = (-1.0,)  # before any rank

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Result:
    """What the worker said of a closed series.

    Attributes
    ----------
    state, reason : what became of it, and in words why not more
    report_json : the report, where there is one
    files : result files, written and synced
    code : the reason's name in `Reason`
    patient : by keyword, as `dicom_node.results.source.patient` has it

    """

    state: SeriesState
    reason: str | None
    report_json: str | None = None
    files: Sequence[ResultFile] = ()
    code: str | None = None
    patient: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_failed(self) -> bool:
        return self.state is SeriesState.FAILED

    @property
    def level(self) -> str | None:
        """Of the triage decision; None without a report."""
        return json.loads(self.report_json)["decision"]["level"] if self.report_json else None

    def discard(self) -> None:
        """Remove the files: nobody gets them, and the series' next SR must not name theirs."""
        for folder in {file.path.parent for file in self.files}:
            shutil.rmtree(folder, ignore_errors=True)

    def summary(self) -> dict[str, Any]:
        """Decision and volumes for the log."""
        return summary(self.report_json) if self.report_json else {}


def summary(report_json: str) -> dict[str, Any]:
    """Of a report, what the log says of it; the log's own "level" is another thing."""
    report = json.loads(report_json)
    volumes_ml = {finding["name"]: round(finding["volume_ml"], 2) for finding in report["findings"]}
    return {"triage": report["decision"]["level"], "volumes_ml": volumes_ml, "provisional": report["provisional"]}


@dataclass(frozen=True, slots=True)
class _Request:
    """A slice (`path`) or the close of a series (no path)."""

    assembly: Assembly
    path: Path | None
    since: float = field(default_factory=time.monotonic, compare=False)

    @property
    def name(self) -> str:
        return f"{self.assembly.name} {self.path or 'close'}"


class Dispatch:
    """The desk's side of the worker. Not for use from several threads.

    Parameters
    ----------
    supervisor : passes the messages
    assembler : whose slices they are
    results : folder for result files
    record : told of each result, before its series is forgotten
    metrics : what is counted
    on_early : told when the slices of an open series make a level: the series, a provisional report as JSON, and whose
        it is. A worker that takes over says it again

    """

    def __init__(
        self,
        supervisor: Supervisor,
        assembler: Assembler,
        results: Path,
        record: Callable[[Assembly, Result], None],
        metrics: Metrics,
        on_early: Callable[[Assembly, str, Mapping[str, str]], None] = lambda *_: None,
    ) -> None:
        self._supervisor = supervisor
        self._assembler = assembler
        self._results = results
        self._record, self._metrics, self._on_early = record, metrics, on_early
        self._worker: int | None = None  # which one is ready
        self._backend = self._fault = ""  # which engine answers; why no worker can open one
        self._lost: set[str] = set()  # servers
        self._waiting: list[tuple[tuple[float, ...], int, _Request]] = []  # a heap
        self._numbers = count()
        self._owed: deque[_Request] = deque()
        self._put_off: list[tuple[float, _Request]] = []  # until when, and what; the soonest first
        self._progress_at = 0.0  # when the worker last answered, or was given work after none
        self._deaths: Counter[str] = Counter()

    def feed(self, assembly: Assembly, paths: Iterable[Path]) -> None:
        """Have slices analysed."""
        if self._worker:  # the next one is told everything when it is ready
            for path in paths:
                self._queue(_Request(assembly, path), assembly.rank)

    @property
    def is_ready(self) -> bool:
        """Whether a worker takes requests."""
        return self._worker is not None

    def close(self, assembly: Assembly) -> None:
        """Have results made, before any slice that still waits: all of this series' slices have been seen."""
        if self._worker:
            self._queue(_Request(assembly, None), (*_FIRST, *assembly.rank))

    def pump(self, now: float) -> None:
        """Pass on what may be under way; end a worker that has not answered for `HANG_S`."""
        if self._owed and now - self._progress_at > HANG_S:
            log.error("worker_hangs", request=self._owed[0].name, after_s=HANG_S)
            self._progress_at = now
            self._supervisor.kill()
            return
        while self._put_off and self._put_off[0][0] <= now:
            self.close(self._put_off.pop(0)[1].assembly)
        most = 1 if self._deaths else UNDER_WAY
        while self._worker and self._waiting and len(self._owed) < most:
            if not self._owed:
                self._progress_at = now
            _, _, request = heappop(self._waiting)
            self._owed.append(request)
            self._supervisor.send(self._message(request), worker=self._worker)

    def next_deadline(self) -> float | None:
        """Clock at which the worker is taken for hung, or something that was put off is due; None without either."""
        hung = [self._progress_at + HANG_S] if self._owed else []
        return min([*hung, *(at for at, _ in self._put_off)], default=None)

    def hear(self, message: dict[str, Any]) -> None:
        """Take a message of the supervisor: all of one worker's come before the next one's."""
        match message["is"]:
            case "ready" | "engine":
                self._introduce(message)
            case "broken" | "died":
                self._lose_worker(message)
            case "going":
                self._progress_at = time.monotonic()
            case "early":
                self._progress_at = time.monotonic()
                request = self._owed[0]  # slices go to the worker in order: it is at this one, or at the next few
                if request.assembly.name != message["series"]:  # or else another's head would get the alert
                    raise self._miscounted(f"{message['series']} early", request)
                log.info("early_evidence", series=message["series"], **summary(message["report"]))
                self._metrics.stage("alert", time.monotonic() - request.since)
                self._on_early(request.assembly, message["report"], message["patient"])
            case "slice":
                request = self._answered(message, Path(message["path"]))
                self._metrics.stage("analysis", time.monotonic() - request.since)
                planes = tuple(_plane(plane) if plane else None for plane in message["planes"])
                self._assembler.seen(message["series"], Path(message["path"]), planes)
                request.assembly.rank = tuple(message["rank"] or request.assembly.rank)
                for code, refusal in message["refusals"]:
                    self._metrics.image_not_analysed(code)
                    image = Path(message["path"]).stem
                    log.info("image_not_analysed", series=message["series"], image=image, reason=refusal)
            case "no room":
                request = self._answered(message, None)
                log.error(
                    "results_not_written", series=message["series"], reason=message["reason"], retry_s=NO_ROOM_RETRY_S
                )
                self._put_off.append((time.monotonic() + NO_ROOM_RETRY_S, request))
            case "result":
                request = self._answered(message, None)
                files = [ResultFile(**{**file, "path": Path(file["path"])}) for file in message["files"]]
                result = Result(
                    SeriesState(message["state"]),
                    message["reason"],
                    message["report"],
                    files,
                    message["code"],
                    message["patient"],
                )
                self._record(request.assembly, result)
            case other:
                log.error("worker_not_understood", message=other)

    def _introduce(self, message: dict[str, Any]) -> None:
        """Say which engine answers from now on, of a new worker or of one that goes on."""
        told = {name: message[name] for name in ("model", "backend", "precision", "why")}
        nameplate.write(self._results.parent, told)
        self._tell_servers(message["servers"])
        is_stand_in = IN_PLACE in told["backend"]
        self._metrics.engine(message["servers"], fail_over=is_stand_in)
        before, self._backend = self._backend, told["backend"]
        if message["is"] == "engine":
            if before != self._backend:
                log.warning("engine_changed", **told)
            return
        say = log.warning if is_stand_in else log.info
        say("worker_ready", **told, pid=self._supervisor.pid)
        self._worker = message["worker"]
        self._start_over()

    def _lose_worker(self, message: dict[str, Any]) -> None:
        """Say why there is none, as it said itself before it died, if it could."""
        if message["is"] == "broken":
            self._fault = message["error"]
            return
        self._metrics.worker_died()
        self._metrics.engine({}, fail_over=False)
        nameplate.write(self._results.parent, None, self._fault or "the worker ended by itself: see the node's log")
        self._fault = ""
        self._suspect()

    def _tell_servers(self, servers: Mapping[str, str]) -> None:
        """Say once of each that it is lost, and why, and once that it is back; whichever worker has noticed."""
        for address, fault in servers.items():
            if fault and address not in self._lost:
                log.warning("server_lost", server=address, reason=fault)
            elif not fault and address in self._lost:
                log.info("server_back", server=address)
        self._lost = {address for address, fault in servers.items() if fault}

    def _answered(self, message: dict[str, Any], path: Path | None) -> _Request:
        """The request that a message answers: the worker works in order."""
        request = self._owed.popleft()
        if (request.assembly.name, request.path) != (message["series"], path):
            raise self._miscounted(f"{message['series']} {path or 'close'}", request)
        self._progress_at = time.monotonic()
        self._deaths.pop(request.name, None)
        return request

    def _miscounted(self, answered: str, request: _Request) -> RuntimeError:
        """End a worker that has lost count; the next one starts from the spool."""
        self._supervisor.kill()
        return RuntimeError(f"the worker answered {answered} instead of {request.name}")

    def _start_over(self) -> None:
        """Tell a new worker everything that has no result yet."""
        for assembly in self._assembler.restarted():
            if assembly.given_up is None:
                for path in assembly.paths:
                    if path not in assembly.set_aside:
                        self._queue(_Request(assembly, path), assembly.rank)
            if assembly.closed:
                self._queue(_Request(assembly, None), assembly.rank)  # behind its slices

    def _queue(self, request: _Request, rank: tuple[float, ...]) -> None:
        heappush(self._waiting, (rank, next(self._numbers), request))

    def _suspect(self) -> None:
        """Count a death against the request that the worker was at, if it was at work at all."""
        if self._owed:
            victim = self._owed[0]
            self._deaths[victim.name] += 1
            if self._deaths[victim.name] >= MOST_DEATHS:
                del self._deaths[victim.name]
                self._set_aside(victim)
        self._worker = None
        self._owed.clear()
        self._waiting.clear()
        self._put_off.clear()  # the next worker is told all that is closed

    def _set_aside(self, victim: _Request) -> None:
        log.error("request_set_aside", request=victim.name, workers_lost=MOST_DEATHS)
        if victim.path is not None:
            victim.assembly.set_aside.add(victim.path)
            return
        reason = f"the worker died {MOST_DEATHS} times while it made the results; the slices are kept"
        if victim.assembly.given_up is None:
            victim.assembly.given_up = reason  # the next worker makes a notice of it
        else:
            self._record(victim.assembly, Result(SeriesState.FAILED, reason))

    def _message(self, request: _Request) -> dict[str, Any]:
        assembly = request.assembly
        folder = self._results.joinpath(*assembly.folder.parts[-2:])
        own = str(folder / f"revision-{assembly.revision}")
        if request.path is not None:
            return {"do": "slice", "series": assembly.name, "path": str(request.path), "folder": own}
        lost = [f"{n} image{'s' * (n > 1)} not analysed: {Reason.LETHAL.value}" for n in [len(assembly.set_aside)] if n]
        return {
            "do": "close",
            "arrived": _arrived(assembly),
            "closed": time.time(),
            "series": assembly.name,
            "revision": assembly.revision,
            "folder": own,
            "predecessor": _last_report(folder),
            "missing": [*assembly.missing, *lost],
            "given_up": assembly.given_up,
            "paths": [str(path) for path in assembly.paths] if assembly.given_up else [],
        }


def _arrived(assembly: Assembly) -> float | None:
    """When the first slice came, in seconds since the epoch; None where it is gone."""
    with suppress(OSError):
        return next(iter(assembly.paths)).stat().st_mtime
    return None


def _last_report(folder: Path) -> str | None:
    """The newest SR that was made of a series, to be named by the next; None when there is none."""
    reports = sorted(folder.glob("revision-*/sr.dcm"), key=lambda path: int(path.parent.name.partition("-")[2]))
    return str(reports[-1]) if reports else None


def _plane(plane: dict[str, Any]) -> Plane:
    return Plane(**{name: tuple(value) if isinstance(value, list) else value for name, value in plane.items()})
