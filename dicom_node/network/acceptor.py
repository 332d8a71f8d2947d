"""The port on which associations are accepted, and who has a place on it."""

from __future__ import annotations

import errno
import socket
import time
from collections import Counter
from ipaddress import ip_address, ip_network
from threading import Lock, Thread
from typing import TYPE_CHECKING

import structlog

from dicom_node.network.connection import Connection, cut
from dicom_node.network.refusal import Refusal

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Sequence

    from pynetdicom.presentation import PresentationContext

    from dicom_node.network.services import Services

PAUSE_S = 0.1  # after a connection that could not be taken
MOST_WAITING = 64  # connections without an association; one more, and one is cut

PORT_REMEDIES = {
    errno.EADDRINUSE: "is a node running already? Stop it, or set another node.port",
    errno.EADDRNOTAVAIL: "no network of this machine has this address; set node.address to one that is its own, or to "
    '"0.0.0.0" for all',
    errno.EACCES: "ports below 1024 need privileges; set node.port to a higher one",
}

log = structlog.get_logger(__name__)


class Acceptor:
    """A listening port and its associations.

    Parameters
    ----------
    address, port : where to listen; ``""`` is every interface, port 0 any free one
    contexts : what is supported
    services : who serves
    allowed_calling_aes : AE titles that may connect; empty: all may
    allowed_addresses : networks from which connections are taken; empty: from all
    max_associations : more at once are rejected (transient, local limit exceeded)
    max_associations_per_peer : as many of one address; None: all of them
    max_pdu : largest PDU that a peer may send, bytes
    idle_timeout_s : an association is aborted after so much silence
    tls : every connection has to be TLS, by the context that this gives

    Raises
    ------
    OSError : the port can't be opened

    """

    def __init__(
        self,
        address: str,
        port: int,
        *,
        contexts: Sequence[PresentationContext],
        services: Services,
        allowed_calling_aes: Sequence[str] = (),
        allowed_addresses: Sequence[str] = (),
        max_associations: int,
        max_associations_per_peer: int | None = None,
        max_pdu: int,
        idle_timeout_s: float,
        tls: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        self.contexts, self.services = list(contexts), services
        self.max_pdu, self.idle_timeout_s, self._tls = max_pdu, idle_timeout_s, tls
        self.reload(allowed_calling_aes, allowed_addresses, max_associations, max_associations_per_peer)
        self._lock = Lock()
        self._waiting: dict[Connection, None] = {}  # no association yet, or no more; the oldest first
        self._associated: set[Connection] = set()
        self._alive: set[Connection] = set()  # all of them, those too that had to go and have not come to their end
        self._is_closed = self.is_stopping = False
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.create_server((address, port), family=family, backlog=128)
        self.port: int = self._socket.getsockname()[1]
        self._thread = Thread(target=self._accept, name="acceptor", daemon=True)
        self._thread.start()

    def reload(
        self,
        allowed_calling_aes: Sequence[str],
        allowed_addresses: Sequence[str],
        max_associations: int,
        max_associations_per_peer: int | None,
    ) -> None:
        """Go by these from the next connection on; associations that are open stay."""
        self._allowed, self._most = frozenset(allowed_calling_aes), max_associations
        self._most_per_peer = max_associations_per_peer or max_associations
        self._networks = [ip_network(network) for network in allowed_addresses]

    def close(self) -> None:
        """Close the port: no more associations, also for who is connected and has none. Those that are open go on."""
        with self._lock:
            self._is_closed = True
        cut(self._socket)  # wakes the loop that accepts
        self._thread.join()
        self._socket.close()

    def is_alive(self) -> bool:
        """Whether connections are taken."""
        return self._thread.is_alive()

    def associations(self) -> list[str]:
        """Who has an association; without them, the end of every one has been told."""
        with self._lock:
            return sorted(connection.who for connection in self._associated)

    def stop(self) -> None:
        """Close the port, cut every connection, and return when each has ended."""
        self.close()
        self.is_stopping = True
        with self._lock:
            connections = list(self._alive)
        for connection in connections:
            connection.cut()
        for connection in connections:
            connection.join()

    def admit(self, connection: Connection, calling_ae: str) -> Refusal | None:
        """Give a connection that asks for an association its place, or say why not."""
        if self._allowed and calling_ae not in self._allowed:
            return Refusal.CALLING_AE
        with self._lock:  # who is admitted now is there for whoever asks once the port is closed
            if self._is_closed:
                return Refusal.STOPPING
            if len(self._associated) >= self._most:
                return Refusal.LIMIT
            if sum(each.address == connection.address for each in self._associated) >= self._most_per_peer:
                return Refusal.PEER_LIMIT
            self._waiting.pop(connection, None)
            self._associated.add(connection)
        return None

    def left(self, connection: Connection) -> None:
        """Give a connection's place away; it waits for its peer to close it."""
        with self._lock:
            self._associated.discard(connection)
            self._waiting[connection] = None

    def gone(self, connection: Connection) -> None:
        """Forget a connection: all has been told of it."""
        with self._lock:
            self._waiting.pop(connection, None)
            self._associated.discard(connection)
            self._alive.discard(connection)

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                accepted, remote = self._socket.accept()
            except OSError as error:
                if not self._is_closed:  # the peer was gone again, or there are no more file descriptors
                    log.warning("connection_failed", reason=error.strerror)
                    time.sleep(PAUSE_S)
                continue
            try:
                self._take(accepted, remote)
            except Exception:  # no more threads, for instance: it must not end the loop, and with it all intake
                log.exception("connection_not_served", address=remote[0])
                accepted.close()

    def _take(self, accepted: socket.socket, remote: tuple[str, int]) -> None:
        """Serve a connection, on a thread of its own."""
        if self._networks and not any(ip_address(remote[0]) in network for network in self._networks):
            log.warning("connection_refused", address=remote[0], reason=Refusal.ADDRESS.why)
            accepted.close()
            self.services.refused(remote[0], "", Refusal.ADDRESS)
            return
        connection = Connection(self, accepted, remote[0], remote[1], self._tls and self._tls())
        with self._lock:
            crowded_out = self._least() if len(self._waiting) >= MOST_WAITING else None
            self._waiting.pop(crowded_out, None)
            self._waiting[connection] = None
            self._alive.add(connection)
        if crowded_out:
            crowded_out.cut()
            crowded_out.join(PAUSE_S)  # or threads would pile up that have not come to their end yet
        try:
            connection.start()
        except RuntimeError:
            self.gone(connection)
            raise

    def _least(self) -> Connection:
        """Who has to go when too many wait: of the address that has the most, the oldest that asks for nothing.

        So whoever floods the port takes places from itself.
        """
        counts = Counter(one.address for one in self._waiting)
        return min(self._waiting, key=lambda one: (-counts[one.address], one.is_asking))
