"""The node as a service: which signals it obeys, and what it tells whoever supervises it.

SIGTERM and SIGINT stop it in order, a second one at once; SIGHUP has its configuration read again.
"""

from __future__ import annotations

import os
import queue
import signal
import time
from threading import Event, Thread
from typing import TYPE_CHECKING, NoReturn

import structlog

from dicom_node import reload
from dicom_node.configuration import config as configuration
from dicom_node.monitoring import log as logging
from dicom_node.monitoring.systemd import ServiceManager
from dicom_node.node import Node
from runtime.errors import ScansideError

if TYPE_CHECKING:
    from pathlib import Path

# for open associations to end, and for what they brought to be analysed and delivered: a head takes seconds. More would
# hold up whoever restarts a node in the middle of the day, and nothing is lost that does not come so far
DRAIN_S = 10.0
LOOK_S = 0.1  # how often is looked whether it has
REPORT_S = 15.0  # how often the service manager is told how things stand, where its watchdog wants no more

log = structlog.get_logger("scanside")


class Service:
    """A node, from its configuration file to the signal that ends it.

    Parameters
    ----------
    path : the configuration file

    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._signals: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._manager = ServiceManager(os.environ)
        self._ended = Event()
        self._is_told_to_stop = False

    def run(self) -> None:
        """Serve until told to stop.

        Raises
        ------
        ScansideError : the configuration or what it names can't be used

        """
        settings = configuration.load(self._path)
        logging.configure(settings.log.level, settings.log.format)
        node = Node(settings)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda received, _frame: self._hear(received, node))
        node.start()
        log.info("node_started", ae_title=settings.node.ae_title, address=settings.node.address, port=node.port)
        self._manager.tell(READY=1, STATUS=node.summary())
        if self._manager.listens:
            Thread(target=self._report, args=(node,), name="watchdog", daemon=True).start()
        while self._signals.get() == signal.SIGHUP:
            self._reload(node)
        self._manager.tell(STOPPING=1, STATUS="stopping")
        self._drain(node)
        self._ended.set()
        node.stop()
        log.info("node_stopped")

    def _hear(self, number: int, node: Node) -> None:
        """Take a signal, in the main thread between any two of its steps."""
        if number != signal.SIGHUP:
            if self._is_told_to_stop:
                _end_at_once(node)
            self._is_told_to_stop = True
        self._signals.put(number)

    def _drain(self, node: Node) -> None:
        """Take no more associations, and let those that are open, and what they brought, be finished."""
        node.close()
        deadline, waiting, told = time.monotonic() + DRAIN_S, {}, set()
        while (left_s := deadline - time.monotonic()) > 0 and (waiting := node.unfinished(left_s)):
            if news := {str(each) for each in waiting.items()} - told:  # what comes and goes is told once
                log.info("stop_waits", **waiting, at_most_s=round(left_s, 1))
                told |= news
            time.sleep(LOOK_S)
        if left_s <= 0 and waiting:
            log.warning("stop_waits_no_longer", **waiting, after_s=DRAIN_S)

    def _reload(self, node: Node) -> None:
        self._manager.tell(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)
        try:
            settings, changed, waiting = reload.merge(node.config, configuration.load(self._path))
        except ScansideError as error:
            log.error("configuration_not_reloaded", mistakes=reload.mistakes(error))  # noqa: TRY400 (a user's mistakes)
        else:
            logging.configure(settings.log.level, settings.log.format)
            node.reload(settings)
            if changed:
                node.trail.reconfigured(changed)
            log.info("configuration_reloaded", changed=changed)
            if waiting:
                log.warning("restart_needed", unchanged=waiting, remedy="they change when the node is started again")
        self._manager.tell(READY=1, STATUS=node.summary())

    def _report(self, node: Node) -> None:
        """Tell the service manager that the node does its work, as long as it does, and how things stand."""
        interval_s = min(REPORT_S, (self._manager.watchdog_s or 3 * REPORT_S) / 3)
        while not self._ended.wait(interval_s):
            wrong = [f"{what} {reason}" for what, reason in node.health().items() if reason]
            if wrong:
                self._manager.tell(STATUS="; ".join(wrong))
            else:
                self._manager.tell(WATCHDOG=1, STATUS=node.summary())


def _end_at_once(node: Node) -> NoReturn:
    """Wait for nothing: what was acknowledged is on the disk, as after a power cut."""
    log.warning("node_stopped_at_once", remedy="the next start goes on with what is left")
    node.supervisor.kill()
    os._exit(0)
