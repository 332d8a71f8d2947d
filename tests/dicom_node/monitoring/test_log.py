"""Logging: what is said, where, in which form, and what is never said."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import warnings

import pytest
import structlog
from pydicom.dataset import Dataset
from pydicom.uid import UID
from pydicom.valuerep import DSfloat, PersonName

from dicom_node.monitoring import log
from runtime.errors import ScansideError


class Stderr(io.StringIO):
    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    @property
    def events(self) -> list[dict]:
        return [json.loads(line) for line in self.getvalue().splitlines()]


@pytest.fixture(autouse=True)
def _as_it_was():
    """Logging belongs to the process, and pytest has its own."""
    root = logging.getLogger()
    packages = [logging.getLogger(name) for name in ("dicom_node", "runtime", "scanside", "pydicom")]
    handlers, levels = list(root.handlers), [logger.level for logger in (root, *packages)]
    yield
    structlog.reset_defaults()
    logging.captureWarnings(capture=False)
    root.handlers[:] = handlers
    for logger, level in zip((root, *packages), levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def configure(monkeypatch):
    def start(level: str = "info", format: str = "json", *, terminal: bool = False) -> Stderr:  # noqa: A002 (as the API)
        stderr = Stderr(terminal=terminal)
        monkeypatch.setattr(sys, "stderr", stderr)
        log.configure(level, format)
        return stderr

    return start


def test_one_json_object_a_line(configure, capsys):
    stderr = configure()
    structlog.get_logger("dicom_node.x").info("series closed", series_uid="1.2.3", slices=40)
    logging.getLogger("runtime.y").warning("from the %s library", "standard")
    first, second = stderr.events
    assert first.pop("timestamp").endswith("Z")
    assert first == {
        "event": "series closed", "series_uid": "1.2.3", "slices": 40, "level": "info", "logger": "dicom_node.x"
    }  # fmt: skip
    assert (second["event"], second["level"], second["logger"]) == ("from the standard library", "warning", "runtime.y")
    assert capsys.readouterr().out == ""  # stdout belongs to `--json`


@pytest.mark.parametrize(
    ("format", "terminal", "is_json"),
    [("auto", True, False), ("auto", False, True), ("console", False, False), ("json", True, True)],
)
def test_the_form_follows_the_terminal_unless_told(configure, format, terminal, is_json):  # noqa: A002 (as the API)
    stderr = configure(format=format, terminal=terminal)
    structlog.get_logger("dicom_node.x").info("hello")
    assert stderr.getvalue().startswith("{") is is_json


def test_levels(configure):
    stderr = configure("warning")
    for name in ("dicom_node.x", "runtime.x", "scanside"):
        structlog.get_logger(name).info("too little")
        structlog.get_logger(name).warning("enough")
    logging.getLogger("pynetdicom.assoc").info("libraries speak from warning up")
    logging.getLogger("pynetdicom.assoc").error("an error")
    assert [event["event"] for event in stderr.events] == ["enough"] * 3 + ["an error"]

    stderr = configure("debug")
    structlog.get_logger("dicom_node.x").debug("chatter")
    logging.getLogger("pynetdicom.assoc").info("still not")
    assert [event["event"] for event in stderr.events] == ["chatter"]


def test_configuring_twice_does_not_say_things_twice(configure):
    configure()
    stderr = configure()
    structlog.get_logger("dicom_node.x").info("once")
    assert len(stderr.events) == 1


@pytest.mark.parametrize(
    "key",
    [
        "PatientName", "patient_name", "patient", "PatientID", "patientId", "OtherPatientIDs", "IssuerOfPatientID",
        "PatientBirthDate", "birth_date", "AccessionNumber", "accession", "ReferringPhysicianName", "OperatorsName",
        "InstitutionName", "person_name", "PatientTelephoneNumbers", "mrn", "MRN",
    ],
)  # fmt: skip
def test_what_names_a_patient_is_redacted_at_any_depth(configure, key):
    stderr = configure()
    logger = structlog.get_logger("dicom_node.x")
    logger.info("flat", **{key: "DOE^JOHN"})
    logger.info("deep", tags={"of": [{key: "DOE^JOHN"}, ({key: ["DOE^JOHN"]},)]})
    logger.bind(**{key: "DOE^JOHN"}).info("bound")
    with structlog.contextvars.bound_contextvars(**{key: "DOE^JOHN"}):
        logger.info("in context")
    assert len(stderr.events) == 4
    assert "DOE" not in stderr.getvalue()
    assert stderr.events[0][key] == log.REDACTED


def test_what_pydicom_made_is_redacted_but_uids_and_numbers(configure):
    stderr = configure()
    dataset = Dataset()
    dataset.PatientName = "DOE^JOHN"
    structlog.get_logger("dicom_node.x").info(
        "x",
        a=dataset,
        b=PersonName("DOE^JOHN"),
        c=dataset["PatientName"],
        d=[dataset],
        uid=UID("1.2.3"),
        mm=DSfloat("5.0"),
    )
    assert "DOE" not in stderr.getvalue()
    assert (stderr.events[0]["uid"], stderr.events[0]["mm"]) == ("1.2.3", 5.0)


@pytest.mark.parametrize(
    "key", ["series_uid", "address", "name", "destination", "event_name", "sop_class", "path", "reason"]
)
def test_what_names_no_patient_is_kept(configure, key):
    stderr = configure()
    structlog.get_logger("dicom_node.x").info("x", **{key: "kept"})
    assert stderr.events[0][key] == "kept"


@pytest.mark.filterwarnings("default")
def test_a_warning_says_where_but_not_what(configure):
    """A value that pydicom complains about is quoted to its logger and in a Python warning."""
    stderr = configure()
    dataset = Dataset()
    dataset.PatientBirthDate = "DOE^JOHN"
    dataset.StudyInstanceUID = "1.DOE"
    warnings.warn("odd\nDOE^JOHN\nlines", RuntimeWarning, stacklevel=1)
    assert "DOE" not in stderr.getvalue()
    assert len(stderr.events) == 3
    assert all("pydicom" in event["event"] and event["event"].endswith("UserWarning") for event in stderr.events[:2])
    assert stderr.events[2]["event"].endswith("RuntimeWarning")


def test_pydicom_quotes_nothing_either_when_it_is_imported_afterwards():
    """It sets its logger's level then; a command of ours imports it when it needs it."""
    code = (
        "from dicom_node.monitoring import log\n"
        "log.configure('warning', 'json')\n"
        "from pydicom.dataset import Dataset\n"
        "Dataset().StudyInstanceUID = '1.DOE'\n"
        "import logging\n"
        "logging.getLogger('pydicom.pixels.decoders.base').warning('DOE')\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert "UserWarning" in said
    assert "DOE" not in said


@pytest.mark.parametrize("format", ["json", "console"])
def test_a_traceback_shows_no_local_variables(configure, format):  # noqa: A002 (as the API)
    stderr = configure(format=format, terminal=True)
    secret = "DOE^" + "JOHN"
    try:
        len(secret) / 0
    except ZeroDivisionError:
        structlog.get_logger("dicom_node.x").exception("a bug")
        logging.getLogger("pynetdicom").exception("a bug in a library")
    assert stderr.getvalue().count("ZeroDivisionError") >= 2
    assert "DOE^JOHN" not in stderr.getvalue()


@pytest.mark.parametrize("format", ["json", "console"])
def test_of_an_exception_that_is_not_ours_the_type_and_the_place_are_told(configure, format):  # noqa: A002 (as the API)
    stderr = configure(format=format, terminal=True)
    try:
        try:
            int("DOE^JOHN")
        except ValueError as error:
            raise ScansideError("the file is damaged") from error
    except ScansideError:
        structlog.get_logger("dicom_node.x").exception("a bug")
        logging.getLogger("pynetdicom").exception("a bug in a library")
    said = stderr.getvalue()
    assert "DOE^JOHN" not in said.replace('int("DOE^JOHN")', "").replace('int(\\"DOE^JOHN\\")', "")  # the code itself
    assert said.count("ValueError: [redacted]") == 2
    assert said.count("ScansideError: the file is damaged") == 2
    assert said.count("test_log.py") >= 4
