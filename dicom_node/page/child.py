"""Keeps the page's process alive beside the node: pictures are decoded there, and a decoder may end it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar

import structlog

if TYPE_CHECKING:
    import socket

    from dicom_node.configuration.config import Config

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
SETTLED_S = 60.0  # who has lived so long did not die of its start
GRACE_S = 5.0

log = structlog.get_logger(__name__)


class Page:
    """The page of a node, restarted with back-off for as long as the node runs; nothing where it has no port.

    The node holds the port: it stays open over a restart, and who asks meanwhile is answered a moment later.

    Parameters
    ----------
    config : of the node

    """

    # -P: whatever lies in the current folder is not imported
    command: ClassVar[tuple[str, ...]] = (sys.executable, "-P", "-m", "dicom_node.page.server")

    def __init__(self, config: Config) -> None:
        self._config = config
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="page", daemon=True)

    @property
    def port(self) -> int | None:
        """The port listened on; None while there is none."""
        return self._socket.getsockname()[1] if self._socket else None

    @property
    def pid(self) -> int | None:
        """Process id of the page that runs now."""
        process = self._process
        return process.pid if process else None

    def start(self) -> None:
        """Open the port, and start the process.

        Raises
        ------
        PageError : the port can't be opened
        LoginError : the users can't be read

        """
        if self._config.page.port is None:
            return
        from dicom_node.page import login, server  # noqa: PLC0415  # loads a web server: for who wants one

        if self._config.page.users:
            login.Users(self._config.page.users)
        self._socket = server.listen(self._config)
        log.info("page_started", address=self._config.page.address, port=self.port)
        self._thread.start()

    def reload(self, config: Config) -> None:
        """Go on with another configuration, in another process."""
        with self._lock:
            self._config = config
            process = self._process
        if process:
            _close_stdin(process)

    def stop(self) -> None:
        """End the process, and close the port."""
        with self._lock:
            self._stopping.set()
            process = self._process
        if process:
            _close_stdin(process)
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
        if self._thread.is_alive():
            self._thread.join()
        if self._socket:
            self._socket.close()

    def _run(self) -> None:
        wait_s = FIRST_WAIT_S
        while not self._stopping.is_set():
            began = time.monotonic()
            config = self._config
            code = self._live_once()
            if self._stopping.is_set():
                return
            if code == 0 and config is not self._config:  # it ended to be reloaded
                continue
            wait_s = FIRST_WAIT_S if time.monotonic() - began > SETTLED_S else wait_s
            log.error("page_died", exit_code=code, restart_s=wait_s)
            self._stopping.wait(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _live_once(self) -> int:
        """Run one process to its end; its exit code."""
        handle = self._socket.fileno()
        try:
            process = subprocess.Popen(  # noqa: S603  # our own command
                [*self.command, str(handle)], stdin=subprocess.PIPE, text=True, pass_fds=[handle]
            )
        except OSError as error:  # no memory, no process: as if it had died at once
            log.warning("page_not_started", reason=error.strerror)
            return -1
        with self._lock:
            self._process = process
            with suppress(OSError):  # it died a moment ago
                process.stdin.write(self._config.model_dump_json() + "\n")
                process.stdin.flush()
            if self._stopping.is_set():
                _close_stdin(process)
        code = process.wait()
        with self._lock:
            self._process = None
        _close_stdin(process)
        return code


def _close_stdin(process: subprocess.Popen[str]) -> None:
    with suppress(OSError):  # what a dead process did not read any more
        process.stdin.close()
