"""Logging to stderr: for people on a terminal, one JSON object a line otherwise, and nothing about patients.

Modules say ``structlog.get_logger(__name__).info("series_closed", series_uid=uid)``. Values under a key that names
something about a patient, and values that pydicom made (a Dataset, a PersonName), are replaced on their way out; so is
the text of a Python warning, because pydicom's quote what they complain about, and what an exception says, if it is
neither ours nor the operating system's. UIDs stay: without them nothing can be traced.
"""

from __future__ import annotations

import logging
import re
import sys
from traceback import format_tb
from typing import TYPE_CHECKING, Any

import structlog

from runtime.errors import ScansideError

if TYPE_CHECKING:
    from structlog.typing import EventDict, ExcInfo, WrappedLogger

REDACTED = "[redacted]"

# of what DICOM PS3.15 table E.1-1 protects: what a log line could plausibly carry
_ABOUT_A_PERSON = re.compile(r"patient|birth|accession|physician|operatorsname|personname|institution|telephone|^mrn$")


def configure(level: str, format: str) -> None:  # noqa: A002 (the key in the configuration file)
    """Set up structlog and the standard library's logging for this process; may be called again.

    Parameters
    ----------
    level : ``"debug"``, ``"info"``, ``"warning"`` or ``"error"``, for our own events; libraries speak from warning up
    format : ``"console"``, ``"json"``, or ``"auto"``: console where stderr is a terminal

    """
    console = format == "console" or (format == "auto" and sys.stderr.isatty())
    shared = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.contextvars.merge_contextvars,
        redact,
    ]
    rendering = (
        [structlog.dev.ConsoleRenderer(exception_formatter=lambda to, error: print("\n" + _traceback(error), file=to))]
        if console
        else [structlog.processors.ExceptionRenderer(_traceback), structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_may_be_said)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, _hush_warnings],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    for module in ("transport", "acse", "association"):  # what they say of a peer is said here, with whom and why
        logging.getLogger(f"pynetdicom.{module}").setLevel(logging.CRITICAL)
    for package in ("dicom_node", "runtime", "scanside"):
        logging.getLogger(package).setLevel(level.upper())


def _may_be_said(record: logging.LogRecord) -> bool:
    """Not what these quote below errors: their Python warnings come as well, and can be hushed.

    A level would not last: pydicom sets its own when it is imported.
    """
    return record.levelno >= logging.ERROR or record.name.partition(".")[0] not in ("pydicom", "highdicom")


def redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Replace what is about a patient, at any depth; a processor of structlog."""
    return {key: _redacted(key, value) for key, value in event.items()}


def _redacted(key: str, value: Any) -> Any:
    if _ABOUT_A_PERSON.search(re.sub(r"[^a-z]", "", key.lower())):
        return REDACTED
    if isinstance(value, dict):
        return {inner: _redacted(str(inner), of_it) for inner, of_it in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted("", item) for item in value]
    # UIDs are strings and numbers are numbers, also in pydicom; the rest of it can hold anything
    if type(value).__module__.startswith("pydicom") and not isinstance(value, str | int | float):
        return REDACTED
    return value


def _traceback(failure: ExcInfo) -> str:
    """Where an exception and what led to it were raised, without local variables: those hold data sets.

    Of others than ours and the operating system's the type is all that is told: pydicom's quote values, a database's
    rows.
    """
    lines: list[str] = []
    error: BaseException | None = failure[1]
    while error is not None:
        said = str(error) if isinstance(error, ScansideError | OSError) else REDACTED
        told = (
            "Traceback (most recent call last):\n",
            *format_tb(error.__traceback__),
            f"{type(error).__name__}: {said}",
        )
        lines = ["".join(told), *lines]
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\n\nThen:\n\n".join(lines)


def _hush_warnings(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Keep of a captured warning where and what kind: ``/x/pydicom/valuerep.py:440: UserWarning``."""
    if event.get("logger") == "py.warnings":
        place = re.match(r".*?:\d+: \w+", event["event"])
        event["event"] = place.group() if place else REDACTED
    return event
