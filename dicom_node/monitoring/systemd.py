"""What the service manager is told: a datagram to the socket that it names (sd_notify(3)), and nothing without one."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from collections.abc import Mapping

TIMEOUT_S = 1.0  # its socket is full only where it hangs itself

log = structlog.get_logger(__name__)


class ServiceManager:
    """Who started the process, where that wants to hear of it.

    Parameters
    ----------
    environment : in which it says so

    Attributes
    ----------
    watchdog_s : how long it waits for ``WATCHDOG=1`` before it starts the service again; None: it does not wait for it

    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        path = environment.get("NOTIFY_SOCKET", "")
        self._address = f"\0{path[1:]}" if path.startswith("@") else path  # @: abstract, without a file
        own = str(os.getpid())
        is_meant = environment.get("WATCHDOG_PID", own) == own  # the variables are inherited
        limit_us = int(environment.get("WATCHDOG_USEC", 0)) if is_meant else 0
        self.watchdog_s = limit_us / 1e6 or None

    @property
    def listens(self) -> bool:
        return bool(self._address)

    def tell(self, **fields: object) -> None:
        """Send fields of sd_notify(3), such as ``READY=1``; who can't be reached is no reason to do anything else."""
        if not self._address:
            return
        message = "\n".join(f"{name}={value}" for name, value in fields.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
                notify.settimeout(TIMEOUT_S)
                notify.sendto(message.encode(), self._address)
        except OSError as error:
            log.warning("service_manager_not_told", fields=sorted(fields), reason=error.strerror or str(error))
