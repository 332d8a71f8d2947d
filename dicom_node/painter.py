"""The pictures of a report, drawn in a process of its own while SEG and SR are made: half of the work after a scan.

It gets what it needs over a socket of its own and has nothing that is not elsewhere, too. Where it is lost, the worker
draws; where the worker ends, however it ends, the socket does, and the painter with it.
"""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import structlog

from dicom_node import capture, montage
from dicom_node.panel import Panel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dicom_node.capture import Shown
    from dicom_node.codes import OwnCode
    from dicom_node.sc import Picture
    from runtime.types import Report

    Draw = Callable[[Sequence[str], Mapping[str, Shown], Report, Mapping[str, OwnCode]], list[Picture]]

log = structlog.get_logger(__name__)


def draw(keys: Sequence[str], shown: Mapping[str, Shown], report: Report, own: Mapping[str, OwnCode]) -> list[Picture]:
    """All pictures of a report: the overview first, then the key slices.

    Parameters
    ----------
    keys : of the whole series, in stack order
    shown : slices to picture, by key (see `dicom_node.montage.pictured`)
    report : what was found
    own : codes of the configuration

    """
    panel = Panel(report, own)
    return [picture for kind in (montage, capture) for picture in kind.draw(keys, shown, panel)]


class Painter:
    """Draws in another process."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._socket, theirs = Pipe()
        with theirs:
            command = (sys.executable, "-m", __name__, str(theirs.fileno()))
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])  # noqa: S603  # our own command

    def draw(
        self, keys: Sequence[str], shown: Mapping[str, Shown], report: Report, own: Mapping[str, OwnCode]
    ) -> list[Picture]:
        """As `draw`, and with the same pictures."""
        try:
            self._socket.send((keys, shown, report, dict(own)))
            return self._socket.recv()
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            self.close()
            log.warning("painter_lost", reason=type(error).__name__, status=self._process.returncode)
            self._start()
            return draw(keys, shown, report, own)

    def close(self) -> None:
        """End the process."""
        self._socket.close()
        self._process.kill()
        self._process.wait()


def main() -> None:
    """Draw whatever comes, until nobody is there. Signals to the whole process group are the node's.

    What goes wrong ends it without a word, for that might quote the patient: the worker comes upon it again.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with Connection(int(sys.argv[1])) as socket, suppress(Exception):
        while True:
            socket.send(draw(*socket.recv()))


if __name__ == "__main__":
    main()
