"""Logging to stderr: for people on a terminal, one JSON object a line otherwise, and nothing about patients.

Modules say ``structlog.get_logger(__name__).info("series_closed", series_uid=uid)``. Values under a key that names
something about a patient, and values that pydicom made (a Dataset, a PersonName), are replaced on their way out; so is
the text of a Python warning, because pydicom's quote what they complain about. UIDs stay: without them nothing can be
traced.
"""

from __future__ import annotations

import logging
import re
import sys
from typing import TYPE_CHECKING, Any

import structlog

if TYPE_CHECKING:
    from structlog.typing import EventDict, WrappedLogger

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
    # plain tracebacks in both: the pretty ones print local variables, and those hold data sets
    rendering = (
        [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
        if console
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, _hush_warnings],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    # it says its warnings twice; the other way they can be hushed. No level: it sets its own when it is imported
    logging.getLogger("pydicom").filters = [_is_error]
    for module in ("transport", "acse", "association"):  # what they say of a peer is said here, with whom and why
        logging.getLogger(f"pynetdicom.{module}").setLevel(logging.CRITICAL)
    for package in ("dicom_node", "runtime", "scanside"):
        logging.getLogger(package).setLevel(level.upper())


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


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


def _hush_warnings(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Keep of a captured warning where and what kind: ``/x/pydicom/valuerep.py:440: UserWarning``."""
    if event.get("logger") == "py.warnings":
        place = re.match(r".*?:\d+: \w+", event["event"])
        event["event"] = place.group() if place else REDACTED
    return event
