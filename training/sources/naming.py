"""Whose picture a file is: its patient, from its name by a regular expression."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from training.sources.errors import SourceError

if TYPE_CHECKING:
    from pathlib import Path

_REMEDY = r"write one that fits the file names, such as (?P<patient>\d+)_slice"


def compile_pattern(pattern: str, source: Path) -> re.Pattern[str]:
    r"""Compile a pattern with a group named ``patient``, such as ``r"(?P<patient>\d+)_slice\d+"``.

    Parameters
    ----------
    source : the data set that it is for, named in the error

    Raises
    ------
    SourceError : it is no regular expression, or it has no group named ``patient``

    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise SourceError(
            source, f"the patient pattern {pattern!r} is no regular expression ({error})", _REMEDY
        ) from None
    if "patient" not in compiled.groupindex:
        raise SourceError(
            source,
            f"the patient pattern {pattern!r} has no group named 'patient': without it no split by patient",
            _REMEDY,
        )
    return compiled


def find_patient(pattern: re.Pattern[str], name: str, path: Path) -> str:
    """Find the patient in a file's name, anywhere in it.

    Raises
    ------
    SourceError : the pattern fits nowhere in the name, or its group is empty

    """
    found = pattern.search(name)
    if found is None or not found["patient"]:
        raise SourceError(path, f"the patient pattern {pattern.pattern!r} finds no patient in {name!r}", _REMEDY)
    return found["patient"]
