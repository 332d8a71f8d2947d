"""The process of the page: its socket, its server, and what ends it."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import sys
from threading import Thread
from typing import TYPE_CHECKING, ClassVar

import uvicorn

from dicom_node.configuration.config import Config
from dicom_node.monitoring import log as logging
from dicom_node.monitoring.http_server import HttpServer
from dicom_node.network.acceptor import PORT_REMEDIES
from dicom_node.network.tls import CIPHERS
from dicom_node.page.app import Application
from runtime.errors import ScansideError

if TYPE_CHECKING:
    from collections.abc import Callable

GRACE_S = 2  # for answers that are under way when it ends


class PageError(ScansideError):
    """The page can't be served."""

    exit_code: ClassVar[int] = 3


def listen(config: Config) -> socket.socket:
    """Open the page's port.

    Raises
    ------
    PageError : it can't be opened

    """
    address, port = config.page.address, config.page.port or 0
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family)
    except OSError as error:
        reason, *_ = (error.strerror or str(error)).partition(" (")
        remedy = PORT_REMEDIES.get(error.errno or 0, "").replace("node.", "page.") or "set another page.address"
        raise PageError(f"can't listen on {address}:{port} ({reason}): {remedy}") from error


def serve(config: Config, listening: socket.socket, tell: Callable[[HttpServer], None] = lambda _: None) -> None:
    """Serve the page until a signal ends it, or whoever was given the server by `tell` does.

    Raises
    ------
    ScansideError : the files of [tls] or `page.users` can't be used

    """
    application = Application(config)
    options = {
        "log_config": None,
        "access_log": False,
        "lifespan": "off",
        "server_header": False,
        "proxy_headers": False,
    }
    if config.page.tls and config.tls:
        options |= {"ssl_certfile": config.tls.certificate, "ssl_keyfile": config.tls.key, "ssl_ciphers": CIPHERS}
    settings = uvicorn.Config(application, timeout_graceful_shutdown=GRACE_S, **options)
    try:
        settings.load()
    except (OSError, ssl.SSLError) as error:
        raise PageError(f"[tls]: certificate and key can't be used for the page: {error}") from error
    if settings.ssl:
        settings.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
    server = HttpServer(settings)
    tell(server)
    application.start()
    try:
        server.run(sockets=[listening])
    finally:
        application.stop()


def main() -> None:
    """Serve a node's page: its configuration comes on stdin, its port as a file handle; it ends when stdin does."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # to the whole process group; they are the node's
        signal.signal(number, signal.SIG_IGN)
    config = Config.model_validate(json.loads(sys.stdin.readline()))
    logging.configure(config.log.level, config.log.format)
    listening = socket.socket(fileno=int(sys.argv[1]))
    try:
        serve(config, listening, lambda server: Thread(target=_end_with_stdin, args=(server,), daemon=True).start())
    except ScansideError as error:
        sys.stderr.write(f"scanside: {error}\n")
        os._exit(error.exit_code)


def _end_with_stdin(server: HttpServer) -> None:
    sys.stdin.read()
    server.end()


if __name__ == "__main__":
    main()
