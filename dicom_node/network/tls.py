"""TLS for associations, both ways: versions and ciphers of BCP 195, as DICOM's profile has it (PS3.15 annex B.12)."""

from __future__ import annotations

import ssl
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, ClassVar

import structlog

from dicom_node.network.wire import PromptTlsSocket
from runtime.errors import ScansideError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dicom_node.configuration.sections import Tls

# RFC 9325 section 4.2: forward secrecy and authenticated encryption, of TLS 1.2; those of 1.3 are all so
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"

log = structlog.get_logger(__name__)


class TlsError(ScansideError):
    """Certificates or a key that can't be used."""

    exit_code: ClassVar[int] = 3


class Identity:
    """The node's certificate, and whom it trusts. Files that are replaced are read again, by the next connection.

    Parameters
    ----------
    settings : where the files are

    Raises
    ------
    TlsError : one that can't be read, or a key of another certificate

    """

    def __init__(self, settings: Tls) -> None:
        self._settings = settings
        self._lock = Lock()
        self._files = [Path(file) for file in (settings.certificate, settings.key, settings.ca)]
        self._stamp = self._stamps()
        self._contexts = self._load()

    def acceptor(self) -> ssl.SSLContext:
        """For connections that peers open: they have to show a certificate."""
        return self._current()[0]

    def requestor(self) -> ssl.SSLContext:
        """For connections to peers; their certificate must be for the host that is connected to."""
        return self._current()[1]

    def _current(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        with self._lock:
            stamp = self._stamps()
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._contexts = self._load()
                    log.info("certificates_reloaded", certificate=str(self._settings.certificate))
                except TlsError as error:  # in the middle of being replaced, or wrong: the last good ones serve
                    log.error("certificates_not_reloaded", reason=str(error))  # noqa: TRY400 (the reason is all there is)
            return self._contexts

    def _stamps(self) -> list[tuple[int, int]]:
        stamps = []
        for file in self._files:
            stamp = 0, 0
            with suppress(OSError):
                status = file.stat()
                stamp = status.st_mtime_ns, status.st_ino
            stamps.append(stamp)
        return stamps

    def _load(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        return self._context(ssl.PROTOCOL_TLS_SERVER), self._context(ssl.PROTOCOL_TLS_CLIENT)

    def _context(self, protocol: int) -> ssl.SSLContext:
        certificate, key, ca = self._files
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.verify_mode = ssl.CERT_REQUIRED
        context.set_ciphers(CIPHERS)
        context.sslsocket_class = PromptTlsSocket
        self._try(ca, lambda: context.load_verify_locations(ca))
        self._try(certificate, lambda: context.load_cert_chain(certificate, key))
        return context

    @staticmethod
    def _try(file: Path, load: Callable[[], None]) -> None:
        try:
            load()
        except ssl.SSLError as error:
            raise TlsError(f"{file}: {error.reason or error}: name PEM files that belong together in [tls]") from error
        except OSError as error:
            raise TlsError(f"{file}: {error.strerror}: set tls.certificate, tls.key and tls.ca") from error
