"""The node over HTTP, for machines: is it alive, is it ready, what does it count."""

from __future__ import annotations

import socket
from threading import Thread
from typing import TYPE_CHECKING, ClassVar, Protocol

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dicom_node.monitoring.http_server import HttpServer
from dicom_node.network.acceptor import PORT_REMEDIES
from runtime.errors import ScansideError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


class WebError(ScansideError):
    """The port can't be opened."""

    exit_code: ClassVar[int] = 3


class Watched(Protocol):
    """What is asked of a node. Both give, by name, what was looked at: empty where it is well, else what is wrong."""

    def health(self) -> dict[str, str]:
        """Look whether the process does its work; if not, it has to be started again."""

    def readiness(self) -> dict[str, str]:
        """Look whether scanners should send to it now. An archive that is down is no reason not to."""


class Web:
    """An HTTP port, from `start` to `stop`.

    Parameters
    ----------
    node : who is asked
    registry : what is counted
    address, port : where to listen; port 0 is any free one

    """

    def __init__(self, node: Watched, registry: CollectorRegistry, address: str, port: int) -> None:
        self._address, self._requested = address, port
        self._socket: socket.socket | None = None
        routes = [
            Route("/healthz", lambda _: _told(node.health())),
            Route("/readyz", lambda _: _told(node.readiness())),
            Route("/metrics", lambda _: Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)),
        ]
        options = {"log_config": None, "access_log": False, "lifespan": "off"}
        self._server = HttpServer(uvicorn.Config(Starlette(routes=routes), **options))
        self._thread = Thread(target=self._run, name="web", daemon=True)

    @property
    def port(self) -> int:
        if self._socket is None:
            raise RuntimeError("the web port is not open yet")
        return self._socket.getsockname()[1]

    def start(self) -> None:
        """Open the port and return.

        Raises
        ------
        WebError : it can't be opened

        """
        family = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        try:
            self._socket = socket.create_server((self._address, self._requested), family=family)
        except OSError as error:
            reason, *_ = error.strerror.partition(" (")
            remedy = PORT_REMEDIES.get(error.errno, "").replace("node.", "web.") or "set another web.address"
            raise WebError(f"can't listen on {self._address}:{self._requested} ({reason}): {remedy}") from error
        self._thread.start()

    def stop(self) -> None:
        """Close the port."""
        self._server.end()
        if self._thread.is_alive():
            self._thread.join()
        if self._socket:
            self._socket.close()

    def _run(self) -> None:
        self._server.run(sockets=[self._socket])


def _told(looked_at: dict[str, str]) -> JSONResponse:
    wrong = any(looked_at.values())
    return JSONResponse({name: reason or "ok" for name, reason in looked_at.items()}, 503 if wrong else 200)
