"""What goes wrong with data sets and their splits.

::

    ScansideError
    ├── SourceError           a file of a data set that can't be used as it is
    └── SplitError            a split that can't be made as asked
        └── LeakError         patients that stand on more than one side of a split
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from runtime.errors import ScansideError

if TYPE_CHECKING:
    from pathlib import Path


class SourceError(ScansideError):
    """A file or folder of a data set that can't be used as it is.

    Attributes
    ----------
    path : the file or folder
    reason : what is wrong with it
    remedy : what to do about it

    """

    def __init__(self, path: Path, reason: str, remedy: str) -> None:
        super().__init__(path, reason, remedy)  # the arguments themselves: an exception is pickled by its args
        self.path, self.reason, self.remedy = path, reason, remedy

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}: {self.remedy}"


class SplitError(ScansideError):
    """A split that can't be made as asked."""


class LeakError(SplitError):
    """Patients that stand on more than one side of a split."""

    exit_code: ClassVar[int] = 1
