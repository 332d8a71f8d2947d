"""One node to a folder: a lock that the operating system takes back when its holder dies."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING, ClassVar

from runtime.errors import ScansideError

if TYPE_CHECKING:
    from pathlib import Path


class LockedError(ScansideError):
    """Another node runs in the folder."""

    exit_code: ClassVar[int] = 3


class FolderLock:
    """Held from construction to `release`, or to the end of the process.

    Raises
    ------
    LockedError : somebody else holds it

    """

    def __init__(self, folder: Path) -> None:
        self._handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._handle)
            raise LockedError(
                f"{folder}: another node runs here: stop it, or give this one a folder of its own"
            ) from None

    def release(self) -> None:
        os.close(self._handle)
