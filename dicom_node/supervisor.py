"""Keeps a worker process alive: starts it, passes messages, and starts another when it ends."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable

FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 30.0
GRACE_S = 10.0

log = structlog.get_logger(__name__)


class Supervisor:
    """One worker process, restarted with back-off for as long as the node runs.

    Parameters
    ----------
    opening : the first message to each worker
    on_message : told of every answer, and of ``{"is": "died"}`` when a worker ended; called from a thread of this class

    """

    command: ClassVar[tuple[str, ...]] = (sys.executable, "-m", "dicom_node.worker")

    def __init__(self, opening: dict[str, Any], on_message: Callable[[dict[str, Any]], None]) -> None:
        self._opening = opening
        self._on_message = on_message
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    @property
    def pid(self) -> int | None:
        """Process id of the worker that runs now."""
        process = self._process
        return process.pid if process else None

    def start(self) -> None:
        self._thread.start()

    def send(self, message: dict[str, Any]) -> None:
        """Pass a message; to a dead worker it is lost, and whoever hears that it died says it again to the next."""
        with self._lock:
            if self._process is None or self._process.stdin is None:
                return
            try:
                self._process.stdin.write(json.dumps(message) + "\n")
                self._process.stdin.flush()
            except OSError:  # it died a moment ago; the reader will notice
                return

    def stop(self) -> None:
        """Let the worker finish what it was told, for `GRACE_S` at most."""
        self._stopping.set()
        with self._lock:
            process = self._process
            if process and process.stdin:
                process.stdin.close()
        if process:
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                log.warning("worker_killed", reason=f"did not end within {GRACE_S:g} s")
                process.kill()
        self._thread.join()

    def _run(self) -> None:
        wait_s = FIRST_WAIT_S
        while not self._stopping.is_set():
            answered = self._live_once()
            if self._stopping.is_set():
                return
            wait_s = FIRST_WAIT_S if answered else min(2 * wait_s, LONGEST_WAIT_S)
            log.error("worker_died", restart_s=wait_s)
            self._on_message({"is": "died"})
            self._stopping.wait(wait_s)

    def _live_once(self) -> bool:
        """Run one worker to its end; True when it did any work beside starting."""
        process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603  # our own
        with self._lock:
            self._process = process
        self.send(self._opening)
        worked = False
        for line in process.stdout:
            message = json.loads(line)
            worked = worked or message["is"] in ("slice", "result")
            self._on_message(message)
        process.wait()
        with self._lock:
            self._process = None
            process.stdout.close()
            with suppress(OSError):  # what a dead worker did not read any more
                process.stdin.close()
        return worked
