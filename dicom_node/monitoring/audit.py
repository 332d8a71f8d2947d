"""Audit messages (PS3.15 annex A.5): what happened, who took part, and whose study it was; XML in one line.

The schema wants a name beside every object that takes part. A patient's is left empty: of a patient a message says
the PatientID alone, as the standard has it, and nothing else of the node writes even that.
"""

from __future__ import annotations

import re
from base64 import b64encode
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element, SubElement, tostring

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

NOT_XML = re.compile("[^\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # and what would break the line


@dataclass(frozen=True, slots=True)
class Code:
    """A coded value."""

    value: str
    meaning: str
    scheme: str = "DCM"


# CID 400, Audit Event ID
APPLICATION_ACTIVITY = Code("110100", "Application Activity")
BEGIN_TRANSFERRING = Code("110102", "Begin Transferring DICOM Instances")
INSTANCES_TRANSFERRED = Code("110104", "DICOM Instances Transferred")
STUDY_DELETED = Code("110105", "DICOM Study Deleted")
SECURITY_ALERT = Code("110113", "Security Alert")
# CID 401, Audit Event Type Code
APPLICATION_START, APPLICATION_STOP = Code("110120", "Application Start"), Code("110121", "Application Stop")
NODE_AUTHENTICATION = Code("110126", "Node Authentication")
SECURITY_CONFIGURATION = Code("110129", "Security Configuration")
SOFTWARE_CONFIGURATION = Code("110131", "Software Configuration")
# CID 402, Audit Active Participant Role ID Code
APPLICATION = Code("110150", "Application")
DESTINATION, SOURCE = Code("110152", "Destination Role ID"), Code("110153", "Source Role ID")
# CID 404, Audit Participant Object ID Type Code, and section A.5.1.2.4
STUDY_UID, NODE_ID = Code("110180", "Study Instance UID"), Code("110182", "Node ID")
PATIENT_NUMBER = Code("2", "Patient Number", "RFC-3881")

SERVER_PROCESS = "4"  # audit source type code, section A.5.1.2.1
PERSON, SYSTEM = "1", "2"  # participant object type codes
OF_PATIENT, OF_REPORT, OF_SECURITY = "1", "3", "13"  # roles of objects, section A.5.1.2.2
SUCCESS, MINOR_FAILURE = "0", "4"


@dataclass(frozen=True, slots=True)
class Participant:
    """Who took part.

    Attributes
    ----------
    user_id : what the log calls it
    ae_title : of a DICOM application
    address : an IP address; empty where it is not known
    role : in the event
    is_requestor : it was the one who wanted it
    host : its name, or its address as the configuration has it, where there is no other

    """

    user_id: str
    ae_title: str = ""
    address: str = ""
    role: Code | None = None
    is_requestor: bool = False
    host: str = ""

    def element(self) -> Element:
        made = _element("ActiveParticipant", UserID=self.user_id, UserIsRequestor=str(self.is_requestor).lower())
        if self.ae_title:
            made.set("AlternativeUserID", _text(f"AETITLES={self.ae_title}"))
        if place := self.address or self.host:
            made.set("NetworkAccessPointID", _text(place))
            made.set("NetworkAccessPointTypeCode", "2" if _is_address(place) else "1")
        if self.role:
            made.append(_coded("RoleIDCode", self.role))
        return made


def _is_address(place: str) -> bool:
    with suppress(ValueError):
        return bool(ip_address(place))
    return False


def compose(
    event: Code,
    kind: Code | None = None,
    *,
    action: str,
    when: datetime,
    source: str,
    participants: Iterable[Participant],
    objects: Iterable[Element] = (),
    failure: str = "",
) -> str:
    """One message, in the order of the schema (section A.5.1).

    Parameters
    ----------
    event, kind : what happened, and of what type that is
    action : C, R, U, D or E (create, read, update, delete, execute)
    when : with its time zone
    source : who reports it
    participants : who took part
    objects : of what, made by `study`, `patient` and `alert`
    failure : what went wrong, where something did

    """
    root = Element("AuditMessage")
    outcome = MINOR_FAILURE if failure else SUCCESS
    told = {"EventActionCode": action, "EventDateTime": when.isoformat(), "EventOutcomeIndicator": outcome}
    identified = SubElement(root, "EventIdentification", told)
    identified.append(_coded("EventID", event))
    if kind:
        identified.append(_coded("EventTypeCode", kind))
    if failure:
        SubElement(identified, "EventOutcomeDescription").text = _text(failure)
    root.extend(each.element() for each in participants)
    reporter = _element("AuditSourceIdentification", AuditSourceID=source)
    SubElement(reporter, "AuditSourceTypeCode", {"csd-code": SERVER_PROCESS})
    root.append(reporter)
    root.extend(objects)
    return tostring(root, encoding="unicode")


def study(uid: str, classes: Mapping[str, int]) -> Element:
    """A study, and how many instances by their SOP Class UIDs, where that is known."""
    made = _object(uid, STUDY_UID, SYSTEM, OF_REPORT)
    if not classes:
        return made
    described = SubElement(made, "ParticipantObjectDescription")
    for sop_class, count in sorted(classes.items()):
        described.append(_element("SOPClass", UID=sop_class, NumberOfInstances=str(count)))
    return made


def patient(patient_id: str) -> Element:
    return _object(patient_id, PATIENT_NUMBER, PERSON, OF_PATIENT)


def alert(node: str, description: str) -> Element:
    """The node that an alert is about, and why."""
    made = _object(node, NODE_ID, SYSTEM, OF_SECURITY)
    value = b64encode(description.encode()).decode()
    made.append(_element("ParticipantObjectDetail", type="Alert Description", value=value))
    return made


def _object(identifier: str, of_type: Code, kind: str, role: str) -> Element:
    made = _element(
        "ParticipantObjectIdentification",
        ParticipantObjectID=identifier,
        ParticipantObjectTypeCode=kind,
        ParticipantObjectTypeCodeRole=role,
    )
    made.append(_coded("ParticipantObjectIDTypeCode", of_type))
    SubElement(made, "ParticipantObjectName")
    return made


def _coded(name: str, code: Code) -> Element:
    return Element(name, {"csd-code": code.value, "codeSystemName": code.scheme, "originalText": code.meaning})


def _element(name: str, **attributes: str) -> Element:
    return Element(name, {key: _text(value) for key, value in attributes.items()})


def _text(text: str) -> str:
    """What peers send may hold anything; XML, and a line, may not."""
    return NOT_XML.sub("?", text)
