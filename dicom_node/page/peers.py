"""Whether destinations answer: an echo once a minute, in a thread of the page, so that no delivery waits for it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from threading import Event, Thread
from typing import TYPE_CHECKING

import structlog
from pynetdicom import build_context
from pynetdicom.sop_class import Verification

from dicom_node.network.requestor import PeerError, associate
from dicom_node.network.tls import Identity, TlsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dicom_node.configuration.config import Config
    from dicom_node.configuration.sections import Destination

INTERVAL_S = 60.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Peer:
    """A destination, and what came of the last echo.

    Attributes
    ----------
    name, where : its name, and its AE title and address
    answers : None before the first echo
    problem : why it does not
    took_ms : the association and the echo
    at : when it was asked, in seconds since the epoch

    """

    name: str
    where: str
    answers: bool | None = None
    problem: str = ""
    took_ms: float = 0.0
    at: float = 0.0


class Peers:
    """The destinations of a node, asked from `start` to `stop`."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._told = {one.name: Peer(one.name, _where(one)) for one in config.destinations}
        self._stopping = Event()
        self._thread = Thread(target=self._run, name="peers", daemon=True)

    def start(self) -> None:
        if self._told:
            self._thread.start()

    def stop(self) -> None:
        """Ask no more. An echo that is under way ends by itself."""
        self._stopping.set()

    def look(self) -> Sequence[Peer]:
        """What is known of each."""
        return tuple(self._told.values())

    def ask(self) -> None:
        """Ask each of them now."""
        try:
            identity = Identity(self._config.tls) if self._config.tls else None
        except TlsError as error:
            for one in self._config.destinations:
                self._told[one.name] = Peer(one.name, _where(one), answers=False, problem=str(error), at=time.time())
            return
        for one in self._config.destinations:
            if not self._stopping.is_set():
                self._told[one.name] = _asked(one, self._config.node.ae_title, identity)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.ask()
            except Exception:  # one peer's answer must not end the asking of all
                log.exception("echo_failed")
            self._stopping.wait(INTERVAL_S)


def _asked(destination: Destination, ae_title: str, identity: Identity | None) -> Peer:
    """C-ECHO (DICOM PS3.4 annex A)."""
    began, problem = time.monotonic(), ""
    try:
        association = associate(destination, ae_title, [build_context(Verification)], identity=identity)
    except PeerError as error:
        problem = str(error)
    else:
        status = association.send_c_echo().get("Status")
        association.release()
        if status != 0:
            problem = "no answer to C-ECHO" if status is None else f"C-ECHO answered with status 0x{status:04X}"
    took_ms = 1000 * (time.monotonic() - began)
    return Peer(destination.name, _where(destination), not problem, problem, took_ms, time.time())


def _where(destination: Destination) -> str:
    return f"{destination.ae_title} at {destination.host}:{destination.port}"
