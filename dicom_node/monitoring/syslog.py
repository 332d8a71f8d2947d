"""Syslog: frames (RFC 5424), and a server that gets them, over TLS (RFC 5425) or UDP (RFC 5426)."""

from __future__ import annotations

import os
import socket
import ssl
from collections import deque
from contextlib import suppress
from threading import Condition, Thread
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from dicom_node.configuration.sections import Audit
    from dicom_node.network.tls import Identity

PRIORITY = 10 * 8 + 5  # security messages, normal but significant (PS3.15 section A.6)
MESSAGE_ID = "DICOM+RFC3881"  # the same
PORTS = {"tls": 6514, "udp": 514}

MOST_WAITING = 2000  # frames for a server that is down, 2 kB each: some days of a busy scanner
TIMEOUT_S, FAREWELL_S = 5.0, 1.0
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0  # between two attempts to reach it

log = structlog.get_logger(__name__)


def frame(message: str, when: datetime) -> bytes:
    """A message as syslog carries it: UTF-8, and marked as such (RFC 5424 section 6.4)."""
    at = when.isoformat(timespec="milliseconds")
    head = f"<{PRIORITY}>1 {at} {socket.gethostname()} scanside {os.getpid()} {MESSAGE_ID} - "
    return head.encode("ascii", "replace") + b"\xef\xbb\xbf" + message.encode()


class Server:
    """The way to a syslog server, on a thread of its own, from `start` to `stop`: one that is down delays nobody.

    Syslog has no acknowledgements: what was under way when a connection broke may be gone.

    Parameters
    ----------
    settings : where it is
    identity : for TLS
    on_lost : told how many frames were given up

    """

    def __init__(self, settings: Audit, identity: Identity | None, on_lost: Callable[[int], None]) -> None:
        self._host, self._port = settings.host, settings.port or PORTS[settings.transport]
        self._is_tls, self._identity = settings.transport == "tls", identity
        self._on_lost = on_lost
        self._log = log.bind(server=f"{self._host}:{self._port}")
        self._news = Condition()
        self._waiting: deque[bytes] = deque()
        self._is_stopping = False
        self._failures = self._lost = 0  # since it was reached last
        self._connection: socket.socket | None = None
        self._thread = Thread(target=self._run, name="syslog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def reach(self) -> None:
        """Connect once, before the start.

        Raises
        ------
        OSError : it can't be reached, or is not trusted

        """
        self._connection = self._connect()
        self._disconnect()

    def put(self, frame: bytes) -> None:
        """Have a frame sent; with too many that wait, it is given up."""
        with self._news:
            is_full = len(self._waiting) >= MOST_WAITING
            if not is_full:
                self._waiting.append(frame)
                self._news.notify()
        if is_full:
            self._give_up(1)

    def stop(self) -> None:
        """Send what waits, as long as that goes well, and give up the rest."""
        with self._news:
            self._is_stopping = True
            self._news.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._waiting or self._is_stopping)
                if not self._waiting:
                    break
                first = self._waiting[0]
            try:
                self._send(first)
            except (OSError, ValueError) as error:  # ValueError: a name that can't be a host's
                self._disconnect()
                if not self._failed(getattr(error, "strerror", None) or str(error)):
                    break
                continue
            with self._news:
                self._waiting.popleft()
            if self._failures:
                self._log.info("audit_server_reached", lost=self._lost)
                self._failures = self._lost = 0
        self._disconnect()
        if self._waiting:
            self._give_up(len(self._waiting))

    def _failed(self, reason: str) -> bool:
        """Wait before the next attempt; False where there will be none."""
        if not self._failures:
            self._log.warning("audit_server_unreachable", reason=reason, waiting=len(self._waiting))
        self._failures += 1
        with self._news:
            wait_s = min(FIRST_WAIT_S * 2 ** min(self._failures - 1, 10), LONGEST_WAIT_S)
            return not self._news.wait_for(lambda: self._is_stopping, wait_s)

    def _give_up(self, count: int) -> None:
        if not self._lost:
            self._log.error("audit_messages_lost", count=count, remedy="see the server; [audit] file has them, if set")
        self._lost += count
        self._on_lost(count)

    def _send(self, frame: bytes) -> None:
        if self._connection and self._is_gone():
            self._disconnect()
        if not self._connection:
            self._connection = self._connect()
        # octet counting (RFC 5425 section 4.3); a datagram is a frame by itself
        self._connection.sendall(b"%d %b" % (len(frame), frame) if self._is_tls else frame)

    def _connect(self) -> socket.socket:
        if not self._is_tls:
            family, kind, protocol, _, address = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_DGRAM)[0]
            datagrams = socket.socket(family, kind, protocol)
            datagrams.connect(address)
            return datagrams
        plain = socket.create_connection((self._host, self._port), TIMEOUT_S)
        try:
            return self._identity.requestor().wrap_socket(plain, server_hostname=self._host)
        except OSError:
            plain.close()
            raise

    def _is_gone(self) -> bool:
        """Whether the server has closed the connection: writing into it would not tell, and lose the frame."""
        if not self._is_tls:
            return False
        self._connection.settimeout(0)
        try:
            return not self._connection.recv(1)
        except ssl.SSLWantReadError:
            return False
        except OSError:
            return True
        finally:
            self._connection.settimeout(TIMEOUT_S)

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        with suppress(OSError, ValueError):  # ValueError: it was not TLS, or is not any more
            if self._is_tls:  # until the server has read all: closing at once may destroy what it has not
                connection.settimeout(FAREWELL_S)
                connection.unwrap()
        connection.close()
