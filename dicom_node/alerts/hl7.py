"""Alerts as HL7 v2.5.1 unsolicited results: ORU^R01 over MLLP, answered in the original mode (chapters 2 and 7).

What a receiver makes of them rests on three statuses (tables 0085 and 0123): P while the series arrives or is not
whole, F for the whole head, C for what corrects an F. A finding that a receiver was told and that is none any more is
sent again without a value as W, "post original as wrong": D would take it out of the record, and somebody may have
acted on it. Where a series can't be analysed the decision is X, "results cannot be obtained".

Segments are put together and taken apart by `python-hl7`; it escapes what is not ASCII as well, so delimiters are
escaped here: the message says that it is UTF-8 (MSH-18).
"""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import hl7
from hl7.exceptions import HL7Exception

from dicom_node.alerts import mllp, text
from dicom_node.alerts.channel import Refused, Unreachable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from dicom_node.alerts.alert import Alert, Message
    from dicom_node.alerts.settings import Hl7
    from dicom_node.network.tls import Identity

TAKEN, IN_ERROR, REJECTED = {"AA", "CA"}, {"AE", "CE"}, {"AR", "CR"}  # table 0008
ATTEMPTS_AFTER_REJECTION = 3  # it is for the message's kind, or for a receiver that does not work at all
STATUS = {"preliminary": "P", "final": "F", "corrected": "C"}
# |, ^, ~, \ and & by their sequences (section 2.7.1), line ends as a space, no control character
_ESCAPES = str.maketrans({"\\": "\\E\\", "|": "\\F\\", "^": "\\S\\", "&": "\\T\\", "~": "\\R\\"})
_CODING = "99SCANSIDE"  # a local code (table 0396)


class Hl7Channel:
    """A listener that takes ORU^R01.

    Parameters
    ----------
    settings : where it is, and what it is to be told
    identity : for a listener that takes TLS

    """

    def __init__(self, settings: Hl7, identity: Identity | None) -> None:
        self._settings, self._identity = settings, identity

    def send(self, message: Message, alert: Alert) -> str:
        """Send, and read the answer: MSA-2 has to name our message, MSA-1 says what became of it."""
        answer = mllp.exchange(self._settings, self._identity, compose(self._settings, message, alert).encode())
        return judge(answer, message.control_id)

    def reach(self) -> str:
        mllp.exchange(self._settings, self._identity, None)
        return f"{self._settings.host}:{self._settings.port} takes connections{' over TLS' * self._settings.tls}"


def judge(answer: bytes, control_id: str) -> str:
    """Whether a message was taken, by its acknowledgement (section 2.9.2); what it says.

    Raises
    ------
    Refused : an error or a rejection
    Unreachable : an answer that can't be read, or one to another message: then this one has none

    """
    try:
        segment = hl7.parse(answer.decode("utf-8", "replace").strip()).segment("MSA")
        code, about = str(segment(1)).strip().upper(), str(segment(2)).strip()
        words = " ".join(str(field) for field in segment[3:4]).strip()
    except (HL7Exception, KeyError, IndexError, TypeError, AttributeError):
        raise Unreachable("the answer is no HL7 acknowledgement") from None
    if about != control_id:
        raise Unreachable("the answer is to another message", _short(about))
    if code in TAKEN:
        return _short(f"{code} {words}".strip())
    if code in REJECTED:
        raise Refused(f"rejected ({code})", _short(words), attempts=ATTEMPTS_AFTER_REJECTION)
    if code in IN_ERROR:
        raise Refused(f"not taken ({code})", _short(words))
    raise Unreachable("the answer has no acknowledgement code that there is", _short(code))


def compose(settings: Hl7, message: Message, alert: Alert) -> str:
    """ORU^R01, its segments separated by carriage returns."""
    segments = [_msh(settings, message), _pid(settings, alert), *_obr(message, alert), *_obx(message, alert)]
    return "\r".join(map(str, segments)) + "\r"


def _msh(settings: Hl7, message: Message) -> str:
    fields = [
        "|",
        r"^~\&",
        settings.sending_application,
        settings.sending_facility,
        settings.receiving_application,
        settings.receiving_facility,
        _time(message.created),
        "",
        "ORU^R01^ORU_R01",
        message.control_id,
        settings.processing_id,
        "2.5.1",
        *[""] * 5,
        "UNICODE UTF-8",
    ]
    return _segment("MSH", *fields)


def _pid(settings: Hl7, alert: Alert) -> str:
    patient = alert.patient
    number, authority = patient.get("PatientID", ""), patient.get("IssuerOfPatientID") or settings.assigning_authority
    identifier = (
        _components(number, "", "", authority, "PI") if number else ""
    )  # table 0203: patient internal identifier
    sex = {"M": "M", "F": "F", "O": "O"}.get(patient.get("PatientSex", ""), "U")
    return _segment(
        "PID", "1", "", identifier, "", _name(patient), "", _digits(patient.get("PatientBirthDate", ""))[:8], sex
    )


def _name(patient: dict[str, str]) -> str:
    """PN (PS3.5 section 6.2) to XPN: alphabetic, ideographic and phonetic become repetitions, the suffix goes first."""
    names = []
    for group, kind in zip_longest(patient.get("PatientName", "").split("=")[:3], "AIP", fillvalue=""):
        family, given, middle, prefix, suffix = (*group.split("^"), *[""] * 5)[:5]
        if any((family, given, middle, prefix, suffix)):
            names.append(_components(family, given, middle, suffix, prefix, "", "L", kind))
    return "~".join(names)


def _obr(message: Message, alert: Alert) -> Iterator[str]:
    patient = alert.patient
    accession = patient.get("AccessionNumber", "")
    placer = _escaped(patient.get("PlacerOrderNumberImagingServiceRequest", ""))
    filler = _escaped(patient.get("FillerOrderNumberImagingServiceRequest", "") or accession)
    when = _digits(patient.get("StudyDate", "")) + _digits(patient.get("StudyTime", "").partition(".")[0])
    yield _segment(
        "OBR",
        "1",
        placer,
        filler,
        _components("24725-4", "CT Head", "LN"),
        "",
        "",
        when[:14] or _time(alert.raised),
        *[""] * 10,
        _escaped(accession),  # 18: placer field 1, where accession numbers go
        "",
        _escaped(alert.study_uid),  # 20: filler field 1
        "",
        _time(alert.changed),
        "",
        "CT",  # table 0074
        STATUS[message.standing],
    )
    sentences = [text.occasion(message, alert), *text.limits(alert)]
    yield from (_segment("NTE", str(n), "L", _escaped(each)) for n, each in enumerate(sentences, start=1))


def _obx(message: Message, alert: Alert) -> Iterator[str]:
    status = STATUS[message.standing]
    withdrawn = alert.state == "withdrawn"
    flag = "N" if withdrawn else {"critical": "AA", "urgent": "A"}[alert.level]  # table 0078
    decision = "X" if alert.state == "unresolved" else status
    level = "withdrawn" if withdrawn else alert.level
    rows = [
        ("ST", _components("triage-level", "Triage level", _CODING), level, "", flag, decision),
        ("TX", _components("triage-text", "Triage", _CODING), text.sentence(alert), "", "", decision),
        ("ST", _components("series", "Series Instance UID", _CODING), alert.series_uid, "", "", status),
    ]
    found = [(each, _number(each["volume_ml"]), status) for each in alert.evidence["findings"]]
    retracted = [(each, "", "W") for each in alert.evidence.get("retracted", ())]
    rows += [("NM", _volume(finding), ml, "mL^milliliter^UCUM", "", said) for finding, ml, said in found + retracted]
    model = alert.evidence["model"]
    method = _components("", f"{model['name']} {model['version']}", _CODING)
    for number, (kind, what, value, unit, abnormal, its_status) in enumerate(rows, start=1):
        yield _segment(
            "OBX", str(number), kind, what, "1", _escaped(value), unit, "", abnormal, "", "", its_status,
            "", "", _time(alert.changed), "", "", method,
        )  # fmt: skip


def _number(volume_ml: float) -> str:
    """As people are told it; of what is little no less than there is, for NM has no "under"."""
    return f"{volume_ml:.1f}" if volume_ml >= 1 else f"{volume_ml:.4f}".rstrip("0")


def _volume(finding: Mapping[str, Any]) -> str:
    """Observation identifier: a code of ours, since none exists, beside the finding's own code as results have it."""
    value, scheme, meaning = finding["code"]
    return _components(
        f"volume-{finding['name']}"[:60], f"Volume of {finding['title']}", _CODING, value, meaning, scheme
    )


def _segment(name: str, *fields: str) -> str:
    """Its fields, already escaped; those that are empty at the end are left out."""
    return str(hl7.Segment("|", [name, *fields])).rstrip("|")


def _components(*parts: str) -> str:
    return str(hl7.Repetition("^", [_escaped(part) for part in parts])).rstrip("^")


def _escaped(value: str) -> str:
    printable = "".join(each if each.isprintable() else " " for each in value)
    return printable.translate(_ESCAPES)


def _time(seconds: float) -> str:
    """TS with its offset, so that no time zone has to be guessed."""
    return f"{datetime.fromtimestamp(seconds, UTC).astimezone():%Y%m%d%H%M%S%z}"


def _digits(value: str) -> str:
    """A date or a time as HL7 has it, empty where DICOM's is none."""
    return value if value.isascii() and value.isdigit() else ""


def _short(words: str) -> str:
    """A peer's words for log and journal: printable, and not many."""
    return "".join(each if each.isprintable() else "?" for each in words)[:200]
