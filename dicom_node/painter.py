"""The pictures of a report, drawn in a process of its own while SEG and SR are made: half of the work after a scan.

Slices and pictures lie in memory that both share; what else is said goes over a socket. Where the painter is
lost, the worker draws. Where the worker ends, however it ends, so does the socket, and the painter with it.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from contextlib import suppress
from itertools import islice
from mmap import mmap
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import structlog

from dicom_node import capture, montage, sc
from dicom_node.panel import Panel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from dicom_node.capture import Shown
    from dicom_node.codes import OwnCode
    from dicom_node.sc import Picture
    from runtime.types import Report

    _Message = tuple[bytes, list[tuple[int, int]]]
    Draw = Callable[[Sequence[str], Mapping[str, Shown], Report, Mapping[str, OwnCode]], Iterator[Picture]]

log = structlog.get_logger(__name__)


def draw(
    keys: Sequence[str], shown: Mapping[str, Shown], report: Report, own: Mapping[str, OwnCode]
) -> Iterator[Picture]:
    """Pictures of a report, one after the other: the overview, then the key slices.

    Parameters
    ----------
    keys : of the whole series, in stack order
    shown : slices to picture, by key (see `dicom_node.montage.pictured`)
    report : what was found
    own : codes of the configuration

    """
    panel = Panel(report, own)
    for kind in (montage, capture):
        yield from kind.draw(keys, shown, panel)


class Painter:
    """Draws in another process, one report at a time. Linux has what it takes."""

    def __init__(self) -> None:
        self._shared = os.memfd_create("pictures")
        os.truncate(self._shared, sc.A_REVISION * capture.PICTURE_B)
        self._memory = mmap(self._shared, 0)
        self._start()

    def _start(self) -> None:
        self._socket, theirs = Pipe()
        with theirs:
            handles = theirs.fileno(), self._shared
            command = (sys.executable, "-m", __name__, *map(str, handles))
            self._process = subprocess.Popen(command, pass_fds=handles)  # noqa: S603  # our own command

    def draw(
        self, keys: Sequence[str], shown: Mapping[str, Shown], report: Report, own: Mapping[str, OwnCode]
    ) -> Iterator[Picture]:
        """As `draw`, and with the same pictures; their pixels are there until the next report's are drawn."""
        arrays = [array for one in shown.values() for array in (one.hu, one.labels)]
        self._make_room(sum(array.nbytes for array in arrays) + sc.A_REVISION * capture.PICTURE_B)
        count, is_done = 0, False
        try:
            message, at = _put((keys, shown, report, dict(own)), self._memory, 0)
            self._socket.send((message, at))
            while (message := self._socket.recv()) is not None:
                count += 1
                yield _get(message, self._memory)
            is_done = True
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            log.warning("painter_lost", reason=type(error).__name__)
            yield from islice(draw(keys, shown, report, own), count, None)
        finally:
            if not is_done:  # what it may still send is of this report
                self.close()
                self._start()

    def _make_room(self, size: int) -> None:
        if size > len(self._memory):
            os.truncate(self._shared, size)
            self._memory = mmap(self._shared, 0)

    def close(self) -> None:
        """End the process."""
        self._socket.close()
        self._process.kill()
        self._process.wait()


def _put(thing: object, memory: mmap, at: int) -> tuple[_Message, int]:
    """Pickle something, with its arrays in shared memory; where there is room for the next."""
    arrays: list[pickle.PickleBuffer] = []
    rest, places = pickle.dumps(thing, protocol=5, buffer_callback=arrays.append), []
    for array in arrays:
        content = array.raw()
        memory[at : at + content.nbytes] = content
        places.append((at, at + content.nbytes))
        at += content.nbytes
    return (rest, places), at


def _get(message: _Message, memory: mmap) -> Any:
    rest, places = message
    return pickle.loads(rest, buffers=[memoryview(memory)[begin:end] for begin, end in places])  # noqa: S301  # our own


def _serve(socket: Connection, shared: int) -> None:
    memory = mmap(shared, 0)
    while True:
        message, at = socket.recv()
        if os.fstat(shared).st_size > len(memory):
            memory = mmap(shared, 0)
        for picture in draw(*_get(message, memory)):
            told, at = _put(picture, memory, at)
            socket.send(told)
        socket.send(None)


def main() -> None:
    """Draw whatever comes, until nobody is there. Signals to the whole process group are the node's.

    What goes wrong ends it without a word, for that might quote the patient: the worker comes upon it again.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with Connection(int(sys.argv[1])) as socket, suppress(Exception):
        _serve(socket, int(sys.argv[2]))


if __name__ == "__main__":
    main()
