"""One node to a folder: a lock that the operating system takes back when its holder dies."""

from __future__ import annotations

import fcntl
import os
import struct
from typing import TYPE_CHECKING, ClassVar

from runtime.errors import ScansideError

if TYPE_CHECKING:
    from pathlib import Path


NAME = "lock"
_FLOCK = "hhqqi4x"  # Linux's struct flock: l_type, l_whence, l_start, l_len, l_pid
_EXCLUSIVE = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


class LockedError(ScansideError):
    """Another node runs in the folder."""

    exit_code: ClassVar[int] = 3


class FolderLock:
    """Held from construction to `release`, or to the end of the process.

    An open file description lock (fcntl(2)): of all kinds only this one belongs to one handle, so that no other part
    of the process can lose it, and at the same time can be asked after without being taken.

    Raises
    ------
    LockedError : somebody else holds it

    """

    def __init__(self, folder: Path) -> None:
        self._handle = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.fcntl(self._handle, fcntl.F_OFD_SETLK, _EXCLUSIVE)
        except OSError:
            os.close(self._handle)
            raise LockedError(
                f"{folder}: another node runs here: stop it, or give this one a folder of its own"
            ) from None

    def release(self) -> None:
        os.close(self._handle)


def is_locked(folder: Path) -> bool:
    """Whether a node runs in the folder. Only asks: a node that starts at this moment is not disturbed."""
    try:
        handle = os.open(folder / NAME, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        answer = fcntl.fcntl(handle, fcntl.F_OFD_GETLK, _EXCLUSIVE)
    finally:
        os.close(handle)
    return struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK
