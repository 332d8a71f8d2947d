"""What every channel is: one way to tell somebody of an alert, and the two ways in which that fails."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

from runtime.errors import ScansideError

if TYPE_CHECKING:
    from types import TracebackType

    from dicom_node.alerts.alert import Alert, Message

PATIENCE_S = 30.0  # for one attempt, from the first byte to the last
ATTEMPTS_BEFORE_PARKING = 6  # about a minute: longer than a receiver's restart, in which it may refuse anything
LONGEST_SECRET = 4096


class Undelivered(ScansideError):
    """A message that did not get through.

    Attributes
    ----------
    full : the reason with the receiver's own `words`, which may quote the patient: for the journal, not for the log

    """

    def __init__(self, reason: str, words: str = "") -> None:
        super().__init__(reason)
        self.full = f"{reason}: {words}" if words else reason


class Refused(Undelivered):
    """A receiver that does not take a message, and is not likely to: after `attempts` a person has to look."""

    exit_code: ClassVar[int] = 1

    def __init__(self, reason: str, words: str = "", *, attempts: int = ATTEMPTS_BEFORE_PARKING) -> None:
        super().__init__(reason, words)
        self.attempts = attempts


class Unreachable(Undelivered):
    """A receiver that can't take anything now: all waits, and is never parked.

    Attributes
    ----------
    wait_s : what it asked for, None where it said nothing

    """

    exit_code: ClassVar[int] = 1

    def __init__(self, reason: str, words: str = "", *, wait_s: float | None = None) -> None:
        super().__init__(reason, words)
        self.wait_s = wait_s


class Unready(Unreachable):
    """A file of ours that can't be used: as soon as it is mended, what waits goes."""

    exit_code: ClassVar[int] = 3


class Channel(Protocol):
    """One way to tell somebody. Its instances belong to one thread."""

    def send(self, message: Message, alert: Alert) -> str:
        """Tell of an alert as `message` has it; the same message is the same, byte for byte, however often it is sent.

        Returns
        -------
        what the receiver answered, for the journal

        Raises
        ------
        Refused, Unreachable

        """

    def reach(self) -> str:
        """Look whether the receiver is there, without telling it anything; a sentence on what answered.

        Raises
        ------
        Refused, Unreachable

        """


class Deadline:
    """Cuts a connection that takes longer in all than `PATIENCE_S`, however often it moves a byte."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(patience_s, self._cut)
        self._timer.daemon = True
        self.has_passed = False

    def watch(self, connection: socket.socket | None) -> None:
        """Cut this one; it takes the place of any before it."""
        self._socket = connection
        if self.has_passed:
            self._cut()

    def _cut(self) -> None:
        self.has_passed = True
        if self._socket is not None:
            with suppress(OSError):  # it is closed already
                # not the TLS layer's: its shutdown waits for the peer's
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()


def read_secret(path: Path, key: str) -> str:
    """What a file of secrets holds, without the white space around it. It is read for each use: it may be replaced.

    Raises
    ------
    Unready : it can't be read or is empty; `key` of the configuration names it

    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(LONGEST_SECRET + 1)
        text = content.decode("utf-8").strip()
    except OSError as error:
        raise Unready(f"{path}: {error.strerror}; have {key} name a file that the node's user can read") from None
    except UnicodeDecodeError:
        raise Unready(f"{path}: is not UTF-8 text; see {key}") from None
    if not text or len(content) > LONGEST_SECRET:
        problem = f"has more than {LONGEST_SECRET} bytes" if text else "is empty"
        raise Unready(f"{path}: {problem}; see {key}")
    return text
