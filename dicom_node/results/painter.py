"""The pictures of a report, made in a process of its own while SEG and SR are made: half of the work after a scan.

Slices and pixels lie in memory that both share; what else is said goes over a socket. Where the painter is
lost, the worker draws. Where the worker ends, however it ends, so does the socket, and the painter with it.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import traceback
from contextlib import suppress
from io import BytesIO
from itertools import islice
from mmap import mmap
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from pydicom import dcmread, dcmwrite
from pydicom.config import disable_value_validation

from dicom_node.results import capture, montage, sc
from dicom_node.results.panel import Panel
from runtime.errors import ScansideError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from pydicom.dataset import Dataset

    from dicom_node.results.capture import Shown
    from dicom_node.results.uids import Issue
    from runtime.types import Report

    _Message = tuple[bytes, list[tuple[int, int]]]
    Draw = Callable[[Sequence[str], Mapping[str, Shown], Report, Issue], Iterator[Dataset]]

PATIENCE_S = 30.0  # with it: a picture takes 20 ms, its start 1 s

log = structlog.get_logger(__name__)


class PainterLost(ScansideError):
    """The process that draws does not answer, or not what it was asked."""


def draw(keys: Sequence[str], shown: Mapping[str, Shown], report: Report, issue: Issue) -> Iterator[Dataset]:
    """Pictures of a report as Secondary Captures, one after the other: the overview, then the key slices.

    Parameters
    ----------
    keys : of the whole series, in stack order
    shown : slices to picture, by key (see `dicom_node.results.montage.pictured`)
    report : what was found
    issue : names the objects

    """
    panel = Panel(report, issue.codes)
    return sc.build((picture for kind in (montage, capture) for picture in kind.draw(keys, shown, panel)), issue)


class Painter:
    """Draws in another process, one report at a time; here where there is none, for whatever reason. For Linux."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._reports = 0
        self._is_owing = False  # pictures that were asked for and have not all come

    def draw(self, keys: Sequence[str], shown: Mapping[str, Shown], report: Report, issue: Issue) -> Iterator[Dataset]:
        """As `draw`, and with the same objects: they are being made from this call on."""
        asked = keys, shown, report, issue
        try:
            self._ask(asked, [array for one in shown.values() for array in (one.grey, one.labels) if array is not None])
        except Exception as error:  # noqa: BLE001  # pictures are no reason to lose a report
            self._lose(error)
            return draw(*asked)
        return self._made(asked)

    def _ask(self, asked: tuple[Any, ...], arrays: list[NDArray[Any]]) -> None:
        if self._process is None:
            self._start()
        while self._is_owing:  # of a report that nobody wanted to its end, as on a full disk
            self._hear()
        self._make_room(sum(array.nbytes for array in arrays) + sc.A_REVISION * capture.PICTURE_B)
        self._reports += 1
        self._socket.send((self._reports, *_put(asked, self._memory)))
        self._is_owing = True

    def _made(self, asked: tuple[Any, ...]) -> Iterator[Dataset]:
        count = 0
        try:
            for image in self._received():
                count += 1
                yield image
        except Exception as error:  # noqa: BLE001  # as above
            self._lose(error)
            yield from islice(draw(*asked), count, None)

    def _received(self) -> Iterator[Dataset]:
        while (message := self._hear()) is not None:
            encoded, begin, end = message
            image = dcmread(BytesIO(encoded))
            image.add_new("PixelData", "OB", self._memory[begin:end])
            yield image

    def _hear(self) -> tuple[bytes, int, int] | None:
        """The next picture of the report, encoded without pixels, and where these lie; None after the last."""
        if not self._socket.poll(PATIENCE_S):
            raise PainterLost(f"it has said nothing for {PATIENCE_S:g} s")
        number, message = self._socket.recv()
        if number != self._reports:
            raise PainterLost(f"it has ended: {message}" if number is None else "it is at another report")
        self._is_owing = message is not None
        return message

    def _lose(self, error: Exception) -> None:
        reason = str(error) if isinstance(error, PainterLost) else type(error).__name__
        log.warning("painter_lost", reason=reason)
        self.close()

    def _start(self) -> None:
        self._socket, theirs = Pipe()
        self._shared = os.memfd_create("pictures")
        self._memory = mmap(-1, 1)
        handles = theirs.fileno(), self._shared
        try:
            self._process = subprocess.Popen(  # noqa: S603  # our own command; -P as in `dicom_node.supervisor`
                (sys.executable, "-P", "-m", __name__, *map(str, handles)),
                pass_fds=handles,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # whatever a library says of a value, it may be the patient's
            )
        except OSError:
            self._socket.close()
            os.close(self._shared)
            raise
        finally:
            theirs.close()

    def _make_room(self, size: int) -> None:
        """Have memory for a report: not much more than that, either, after an unusually large one."""
        if not size <= len(self._memory) <= 4 * size:
            os.truncate(self._shared, size)
            self._memory = mmap(self._shared, 0)

    def close(self) -> None:
        """End the process; the next report starts another."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._process, self._is_owing = None, False
        self._socket.close()
        os.close(self._shared)


def _put(thing: object, memory: mmap) -> tuple[_Message, int]:
    """Pickle something, with its arrays in shared memory; where they end."""
    arrays: list[pickle.PickleBuffer] = []
    rest, places, at = pickle.dumps(thing, protocol=5, buffer_callback=arrays.append), [], 0
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
    memory = mmap(-1, 1)
    while True:
        number, message, at = socket.recv()
        if os.fstat(shared).st_size != len(memory):
            memory = mmap(shared, 0)
        for image in draw(*_get(message, memory)):
            pixels, encoded = image.pop("PixelData").value, BytesIO()
            dcmwrite(encoded, image, enforce_file_format=True)
            begin, at = at, at + len(pixels)
            memory[begin:at] = pixels
            socket.send((number, (encoded.getvalue(), begin, at)))
        socket.send((number, None))


def main() -> None:
    """Draw whatever comes, until nobody is there. Signals to the whole process group are the node's.

    What goes wrong is told by its place alone, for its message might quote the patient.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with Connection(int(sys.argv[1])) as socket, suppress(EOFError, OSError), disable_value_validation():
        try:
            _serve(socket, int(sys.argv[2]))
        except (EOFError, OSError):
            raise
        except Exception as error:  # noqa: BLE001
            frame = traceback.extract_tb(error.__traceback__)[-1]
            socket.send((None, f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"))


if __name__ == "__main__":
    main()
