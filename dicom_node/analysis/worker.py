"""The worker process: decode, inference and result files, one per engine.

It speaks JSON, one object a line: requests on stdin, answers on stdout. It may crash or hang at any slice (a CUDA
error is for life); it keeps nothing that the spool does not have, so the node starts another and tells it the open
series again.

::

    -> {"do": "open", "bundle": ..., "backend": ..., ...}
    <- {"is": "ready", "model": ..., "backend": ...}      or {"is": "broken", "error": ...}, now or later
    -> {"do": "reload", ...}                              as "open"; triage, limits, results and logging change
    -> {"do": "slice", "series": ID, "path": ..., "folder": for its results}
    <- {"is": "engine", ...}             as "ready", when another engine answers from now on, a server is lost, or back
    <- {"is": "going", "series": ID}     now and then, before the answer on many frames
    <- {"is": "early", "series": ID, "report": ..., "patient": {...}, "key": ...}
                                         before the answer on the slice that makes the series critical, or urgent
    <- {"is": "slice", "series": ID, "rank": ..., "path": ..., "planes": [{...} or null], "refusals": [[code, why]]}
    -> {"do": "close", "series": ID, "folder": ..., "revision": 1, "missing": [...], "predecessor": path or null,
        "arrived", "closed": seconds since the epoch, "given_up": why no more is tried than a notice, or null,
        "paths": for that}
    <- {"is": "no room", "series": ID, "reason": ...}     or, once there is some:
    <- {"is": "result", "series": ID, "state": ..., "reason": ..., "code": ..., "report": ..., "files": [...],
        "patient": {...}}
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import queue
import signal
import sys
import threading
import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import structlog

from dicom_node.analysis.analyser import Analyser, Outcome
from dicom_node.analysis.rehearsal import rehearse
from dicom_node.analysis.series import Seen, Series
from dicom_node.configuration.triton import servers
from dicom_node.images.gate import NotAnalysed
from dicom_node.monitoring.log import configure
from dicom_node.results import result_set, writing
from dicom_node.results.painter import Painter
from dicom_node.results.result_set import Form
from dicom_node.results.writing import NoRoom
from runtime.bundle import open_bundle
from runtime.errors import DeviceLost, ScansideError
from runtime.session import open_session, self_test
from runtime.triage import LEVELS, Rule, check_rules
from runtime.triton import TritonSession

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from dicom_node.results.painter import Draw
    from runtime.bundle import Bundle
    from runtime.session import Session

log = structlog.get_logger("dicom_node.analysis.worker")  # its own name is __main__, as a program


def main() -> None:
    """Serve requests until stdin ends. Signals to the whole process group (Ctrl-C, systemd's stop) are the node's."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints must not mix with the answers
    requests: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    opening = json.loads(sys.stdin.readline())
    configure(opening["log_level"], opening["log_format"])
    try:
        analyser = _open(opening, answers)
        threading.Thread(target=_read, args=(sys.stdin, requests), daemon=True).start()
        _serve(analyser, requests, answers)
    except DeviceLost as error:
        _say(answers, {"is": "broken", "error": str(error)})
        os._exit(error.exit_code)  # giving back what a hanging GPU holds may hang too
    except ScansideError as error:
        _say(answers, {"is": "broken", "error": str(error)})


def _open(opening: dict[str, Any], answers: IO[str]) -> Analyser:
    keys = [Path(key) for key in opening["trusted_keys"]]
    bundle = open_bundle(Path(opening["bundle"]) if opening["bundle"] else None, keys)
    plans = Path(opening["plans"]) if opening["plans"] else None
    session = open_session(
        bundle,
        opening["backend"],
        precision=opening["precision"],
        threads=opening["threads"],
        plans=plans,
        servers=servers(opening["triton"]),
    )
    disagreement = self_test(session, bundle)
    rules, form = _rules(opening, bundle), _form(opening, bundle)
    _say(answers, {"is": "ready", **_engine(bundle, session), "self_test": disagreement})
    draw = Painter().draw
    _rehearse(bundle, session, form, draw)
    gc.collect()
    gc.freeze()  # modules and tables live for ever: looking through them again, in the middle of results, takes 0.15 s
    max_batch = opening["max_batch"] or session.max_batch
    return Analyser(bundle, session, rules, **_limits(opening), max_batch=max_batch, form=form, draw=draw)


def _engine(bundle: Bundle, session: Session) -> dict[str, Any]:
    """Who answers, and why which of its servers can't be asked."""
    return {
        "model": f"{bundle.name} {bundle.version}",
        "backend": session.identity.backend,
        "precision": session.identity.precision,
        "why": session.why,
        "servers": session.servers if isinstance(session, TritonSession) else {},
    }


def _rehearse(bundle: Bundle, session: Session, form: Form, draw: Draw) -> None:
    """Be ready for the first patient in earnest; a rehearsal that fails costs nobody anything."""
    began = time.monotonic()
    try:
        if rehearse(bundle, session, form, draw):
            log.info("rehearsed", seconds=round(time.monotonic() - began, 1))
        else:
            log.error("rehearsal_failed")
    except (OSError, ScansideError) as error:  # a full disk, above all
        log.warning("not_rehearsed", reason=error.strerror if isinstance(error, OSError) else str(error))


def _rules(opening: dict[str, Any], bundle: Bundle) -> list[Rule]:
    rules = [Rule(**rule | {name: tuple(rule[name]) for name in ("classes", "also")}) for rule in opening["triage"]]
    check_rules(rules, bundle.classes)
    return rules


def _form(opening: dict[str, Any], bundle: Bundle) -> Form:
    return Form.of(opening["results"], opening["codes"], bundle.classes)


def _limits(opening: dict[str, Any]) -> dict[str, Any]:
    return {name: opening[name] for name in ("min_slices", "min_coverage_mm", "max_lossy_ratio", "bone_kernels")}


def _read(source: IO[str], requests: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    for line in source:
        requests.put(json.loads(line))
    requests.put(None)


def _serve(analyser: Analyser, requests: queue.SimpleQueue[dict[str, Any] | None], answers: IO[str]) -> None:
    open_series: dict[str, Series] = {}
    waiting: deque[dict[str, Any] | None] = deque()
    engine = _engine(analyser.bundle, analyser.session)
    while True:
        engine = _tell_engine(analyser, engine, answers)
        _wait(requests, waiting, open_series)
        request = waiting.popleft()
        if request is None:
            analyser.session.close()
            return
        if request["do"] == "reload":
            configure(request["log_level"], request["log_format"])
            form = _form(request, analyser.bundle)
            analyser.reload(_rules(request, analyser.bundle), **_limits(request), form=form)
            continue
        name = request["series"]
        if request["do"] == "close":
            series = open_series.setdefault(name, Series())
            gc.disable()  # a look through all headers of all open series, while a reader waits, finds nothing
            going = {"is": "going", "series": name}
            try:
                outcome = (
                    _given_up(analyser, request)
                    if request["given_up"]
                    else _close(analyser, series, request, partial(_say, answers, going))
                )
            except NoRoom as error:
                _say(answers, {"is": "no room", "series": name, "reason": str(error)})
                continue
            finally:
                gc.enable()
            del open_series[name]
            _say(answers, {"is": "result", "series": name, **_outcome(outcome, analyser.form, request)})
            continue
        paths = [Path(request["path"])]
        while len(paths) < analyser.max_batch and waiting and waiting[0] and _is_slice(waiting[0], name):
            paths.append(Path(waiting.popleft()["path"]))  # what waits already goes together; nothing is waited for
        series, folder = open_series.setdefault(name, Series()), Path(request["folder"])

        def go_on(name: str = name, series: Series = series, folder: Path = folder) -> None:
            _say(answers, {"is": "going", "series": name})
            _tell_early(analyser, name, series, folder, answers)

        fed = analyser.feed(series, paths, go_on)
        _tell_early(analyser, name, series, folder, answers)
        for seen in fed:
            _say(answers, {"is": "slice", "series": name, **_seen(seen, series)})


def _wait(
    requests: queue.SimpleQueue[dict[str, Any] | None],
    waiting: deque[dict[str, Any] | None],
    open_series: Mapping[str, Series],
) -> None:
    """Have something to do; what pictures will need is made while there is nothing, and in no slice's way."""
    while not waiting and requests.empty() and any(series.make_tile() for series in open_series.values()):
        pass
    while not waiting or not requests.empty():
        waiting.append(requests.get())


def _tell_engine(analyser: Analyser, told: dict[str, Any], answers: IO[str]) -> dict[str, Any]:
    """Tell who answers now, where it is another engine than was told, or other servers are lost."""
    now = _engine(analyser.bundle, analyser.session)
    lost = [{address for address, fault in each["servers"].items() if fault} for each in (told, now)]
    if now["backend"] != told["backend"] or lost[0] != lost[1]:
        _say(answers, {"is": "engine", **now})
    return now


def _tell_early(analyser: Analyser, name: str, series: Series, folder: Path, answers: IO[str]) -> None:
    """Tell what makes a level of triage while slices still come; then leave what the network drew, which can wait."""
    try:
        report = analyser.look(series)
    except Exception as error:  # noqa: BLE001  # it must not cost the series its slices; closing tells what is wrong
        series.told = LEVELS[-1]  # and there is no other look
        log.error("early_look_failed", series=name, reason=type(error).__name__)  # noqa: TRY400
        return
    if report is None:
        return
    told = {"report": result_set.to_json(report, series.received, analyser.form), "patient": analyser.whose(series)}
    _say(answers, {"is": "early", "series": name, **told, "key": report.findings[0].key_slice})
    try:
        writing.write_early(report, series.labels, folder)
    except (OSError, ValueError) as error:  # a full disk, a UID that can't be a name
        log.warning("early_labels_not_kept", series=name, reason=type(error).__name__)


def _is_slice(request: dict[str, Any], series: str) -> bool:
    return request["do"] == "slice" and request["series"] == series


def _close(analyser: Analyser, series: Series, request: dict[str, Any], go_on: Callable[[], None]) -> Outcome:
    return analyser.close(
        series,
        Path(request["folder"]),
        revision=request["revision"],
        missing=request["missing"],
        predecessor=_predecessor(request),
        siblings=_siblings(series, Path(request["folder"]).parents[1]),
        on_more=go_on,
    )


def _siblings(series: Series, results: Path) -> Iterator[list[Path]]:
    """Files of the other series of a study in the spool, without those that got a notice instead of results."""
    for here in {path.parent for path in series.files}:
        for folder in here.parent.iterdir():
            if folder != here and not any((results / folder.name).glob("revision-*/notice.dcm")):
                yield list(folder.glob("*.dcm"))


def _given_up(analyser: Analyser, request: dict[str, Any]) -> Outcome:
    return analyser.give_up(
        request["given_up"],
        [Path(path) for path in request["paths"]],
        Path(request["folder"]),
        revision=request["revision"],
        predecessor=_predecessor(request),
    )


def _predecessor(request: dict[str, Any]) -> Path | None:
    return Path(request["predecessor"]) if request["predecessor"] else None


def _seen(seen: Seen, series: Series) -> dict[str, Any]:
    return {
        "rank": series.rank,
        "path": str(seen.path),
        "planes": [None if isinstance(one, NotAnalysed) else dataclasses.asdict(one) for one in seen.images],
        "refusals": [(refusal.reason.name, str(refusal)) for refusal in seen.refusals],
    }


def _outcome(outcome: Outcome, form: Form, request: Mapping[str, Any]) -> dict[str, Any]:
    at = {what: request[what] for what in ("arrived", "closed")}
    report = result_set.to_json(outcome.report, outcome.received, form, **at) if outcome.report else None
    return {
        "state": outcome.state,
        "reason": outcome.reason,
        "code": outcome.code,
        "report": report,
        "patient": dict(outcome.patient),
        "files": [{**dataclasses.asdict(file), "path": str(file.path)} for file in outcome.files],
    }


def _say(answers: IO[str], message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
