"""An HL7 listener that takes messages, refuses them, or fails in every way that a listener can."""

from __future__ import annotations

import socket
import ssl
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Self

import hl7

if TYPE_CHECKING:
    from collections.abc import Callable

START, END = b"\x0b", b"\x1c\r"


def acknowledgement(message: str, code: str = "AA", *, about: str | None = None, words: str = "") -> bytes:
    """An answer in the original mode."""
    control_id = str(hl7.parse(message).segment("MSH")(10)) if about is None else about
    text = f"MSH|^~\\&|ED|HOSPITAL|SCANSIDE||20260101120000||ACK^R01^ACK|1|P|2.5.1\rMSA|{code}|{control_id}|{words}\r"
    return START + text.encode() + END


def taken(message: str) -> bytes:
    return acknowledgement(message)


class Listener:
    """Answers each message by `answer`: bytes to send back, or None to close the connection without any.

    Attributes
    ----------
    got : the messages, in order, also repeated ones

    """

    def __init__(self, answer: Callable[[str], bytes | None] = taken, tls: ssl.SSLContext | None = None) -> None:
        self.answer, self._tls = answer, tls
        self.got: list[str] = []
        self._lock = threading.Lock()
        self._stopping = False
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(5)

    def control_ids(self) -> list[str]:
        return [str(hl7.parse(message).segment("MSH")(10)) for message in self.got]

    def _serve(self) -> None:
        while not self._stopping:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with suppress(OSError, ValueError), connection:
            if self._tls:
                connection = self._tls.wrap_socket(connection, server_side=True)
            with connection:
                connection.settimeout(20)
                received = b""
                while not received.endswith(END):
                    piece = connection.recv(4096)
                    if not piece:
                        return
                    received += piece
                message = received[len(START) : -len(END)].decode("utf-8")
                with self._lock:
                    self.got.append(message)
                answer = self.answer(message)
                if answer is not None:
                    connection.sendall(answer)
