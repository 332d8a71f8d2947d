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
    on_message : told of every answer, and of ``{"is": "died"}`` when a worker ended, on a thread of this class. Each
        message says under ``"worker"`` which one it is from: 1 is the first

    """

    # -P: whatever lies in the current folder is not imported
    command: ClassVar[tuple[str, ...]] = (sys.executable, "-P", "-m", "dicom_node.analysis.worker")

    def __init__(self, opening: dict[str, Any], on_message: Callable[[dict[str, Any]], None]) -> None:
        self._opening = opening
        self._on_message = on_message
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self.worker = 0  # which one runs now

    @property
    def pid(self) -> int | None:
        """Process id of the worker that runs now."""
        process = self._process
        return process.pid if process else None

    def start(self) -> None:
        self._thread.start()

    def send(self, message: dict[str, Any], *, worker: int) -> None:
        """Pass a message to that worker; a dead one loses it, and whoever hears of its death tells the next."""
        with self._lock:
            if worker == self.worker:
                self._write(message)

    def reload(self, opening: dict[str, Any]) -> None:
        """Open the next workers with this, and have the one that runs go by it as far as it can."""
        with self._lock:
            self._opening = opening
            self._write(opening | {"do": "reload"})

    def kill(self) -> None:
        """End a worker that hangs; another will be started."""
        process = self._process
        if process:
            process.kill()

    def stop(self) -> None:
        """Let the worker finish what it was told, for `GRACE_S` at most."""
        with self._lock:
            self._stopping.set()
            process = self._process
            if process:
                _close_stdin(process)
        if process:
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                log.warning("worker_killed", reason=f"did not end within {GRACE_S:g} s")
                process.kill()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        wait_s = FIRST_WAIT_S
        while not self._stopping.is_set():
            worked = self._live_once()
            if self._stopping.is_set():
                return
            wait_s = FIRST_WAIT_S if worked else min(2 * wait_s, LONGEST_WAIT_S)
            log.error("worker_died", restart_s=wait_s)
            self._on_message({"is": "died", "worker": self.worker})
            self._stopping.wait(wait_s)

    def _live_once(self) -> bool:
        """Run one worker to its end; True when it did any work beside starting."""
        self.worker += 1
        try:
            process = subprocess.Popen(  # noqa: S603  # our own command
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except OSError as error:  # no memory, no process: as if it had died at once
            log.warning("worker_not_started", reason=error.strerror)
            return False
        with self._lock:
            self._process = process
            if self._stopping.is_set():
                _close_stdin(process)
            self._write(self._opening)
        worked = False
        for line in process.stdout:
            try:
                message = json.loads(line)
            except ValueError:  # it was killed in the middle of a line
                process.kill()
                break
            worked = worked or message["is"] in ("slice", "result")
            self._on_message(message | {"worker": self.worker})
        process.wait()
        with self._lock:
            self._process = None
            process.stdout.close()
            _close_stdin(process)
        return worked

    def _write(self, message: dict[str, Any]) -> None:
        """With the lock held, for lines must not mix, and the opening is the first."""
        if self._process is not None:
            with suppress(OSError, ValueError):  # it died a moment ago, or was told to end; the reader will notice
                self._process.stdin.write(json.dumps(message) + "\n")
                self._process.stdin.flush()


def _close_stdin(process: subprocess.Popen[str]) -> None:
    with suppress(OSError):  # what a dead worker did not read any more
        process.stdin.close()
