"""Alerts as unified procedure steps that a worklist manager takes (UPS Push SOP Class, PS3.4 CC.2.5 and CC.2.2).

A head that alarms becomes a step "Interpretation" of priority HIGH (critical) or MEDIUM (urgent), so that a worklist
shows it before others. A step is never changed: at another level it is cancelled and another is made in its place.
Its UID is derived from the message's control id. So a repetition is answered as a duplicate, and counts as taken.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage
from pynetdicom import build_context
from pynetdicom.sop_class import Comprehensive3DSRStorage, UnifiedProcedureStepPush, Verification

from dicom_node.alerts import text
from dicom_node.alerts.channel import Refused, Unreachable
from dicom_node.delivery.confirmation import SYNTAXES
from dicom_node.network.requestor import DIMSE_TIMEOUT_S, ContextError, PeerError, associate
from dicom_node.results.uids import derive, long_string, result_series

if TYPE_CHECKING:
    from pynetdicom.association import Association

    from dicom_node.alerts.alert import Alert, Message
    from dicom_node.alerts.settings import Worklist
    from dicom_node.network.tls import Identity

PRIORITIES = {"critical": "HIGH", "urgent": "MEDIUM"}
REQUEST_CANCEL = 2  # action type, PS3.4 table CC.2.1-1
DUPLICATE = 0x0111
BUSY = {0x0110, 0x0213}  # processing failure, resource limitation
CREATED = {0x0000: "created", 0xB300: "created with modifications", DUPLICATE: "has it already"}
CANCELLED = {
    0x0000: "asked to cancel",
    0xB304: "cancelled already",
    0xC307: "does not know the step, so nobody will take it",
    0xC310: "completed already",
    0xC311: "its performer can't be asked",
    0xC312: "its performer goes on",
    0xC313: "its performer goes on",
}
_OPENING = ("raised", "escalated", "changed")
# type 2 of PS3.4 table CC.2.5-3 that have no value here
_EMPTY = ("TransactionUID", "AdmissionID", "AdmittingDiagnosesDescription")
_EMPTY_SEQUENCES = (
    "ScheduledProcessingParametersSequence",
    "ScheduledStationNameCodeSequence",
    "ScheduledStationClassCodeSequence",
    "ScheduledStationGeographicLocationCodeSequence",
    "ScheduledHumanPerformersSequence",
    "IssuerOfPatientIDQualifiersSequence",
    "OtherPatientIDsSequence",
    "IssuerOfAdmissionIDSequence",
    "AdmittingDiagnosesCodeSequence",
    "ProcedureStepProgressInformationSequence",
    "UnifiedProcedureStepPerformedProcedureSequence",
)


class WorklistChannel:
    """A manager of worklists.

    Parameters
    ----------
    settings : where it is, and what it is to be told
    ae_title : this node's
    identity : for one that takes TLS

    """

    def __init__(self, settings: Worklist, ae_title: str, identity: Identity | None) -> None:
        self._settings, self._ae_title, self._identity = settings, ae_title, identity

    def send(self, message: Message, alert: Alert) -> str:
        """Make a step, or have the last one cancelled; where the level has changed, both."""
        association = self._associate(UnifiedProcedureStepPush)
        done = []
        try:
            earlier = [
                each for each in alert.messages
                if (each.channel, each.occasion in _OPENING) == (message.channel, True) and each.id < message.id
                and each.attempts
            ]  # fmt: skip
            if message.occasion in ("changed", "withdrawn") and earlier:
                done.append(self._cancel(association, step_uid(earlier[-1]), alert))
            if message.occasion in _OPENING:
                done.append(self._create(association, message, alert))
            association.release()
        finally:
            if association.is_established:
                association.abort()
        return "; ".join(done) or "there is no step to cancel"

    def reach(self) -> str:
        """C-ECHO, on an association as steps will ask for."""
        association = self._associate(UnifiedProcedureStepPush, Verification)
        status = association.send_c_echo().get("Status") if _takes(association, Verification) else 0
        association.release()
        if status != 0:
            raise Unreachable("accepts an association, but gives no good answer to C-ECHO")
        return f"{self._settings.ae_title} at {self._settings.host}:{self._settings.port} answers"

    def _associate(self, *sop_classes: str) -> Association:
        contexts = [build_context(each, list(SYNTAXES)) for each in sop_classes]
        try:
            association = associate(self._settings, self._ae_title, contexts, identity=self._identity)
        except ContextError as error:
            raise Refused(f"{error}: have it accept Unified Procedure Step - Push") from error
        except PeerError as error:
            raise Unreachable(str(error)) from error
        if not _takes(association, UnifiedProcedureStepPush):
            association.release()
            raise Refused(f"{self._settings.ae_title} does not accept Unified Procedure Step - Push: have it do so")
        return association

    def _create(self, association: Association, message: Message, alert: Alert) -> str:
        step = compose(self._settings, alert)
        answer, _ = association.send_n_create(step, UnifiedProcedureStepPush, step_uid(message))
        return _judge(answer.get("Status"), CREATED, "N-CREATE")

    def _cancel(self, association: Association, uid: str, alert: Alert) -> str:
        why = Dataset()
        why.SpecificCharacterSet = "ISO_IR 192"
        why.ReasonForCancellation = text.sentence(alert)[:1024]
        answer, _ = association.send_n_action(why, REQUEST_CANCEL, UnifiedProcedureStepPush, uid)
        return _judge(answer.get("Status"), CANCELLED, "N-ACTION Request UPS Cancel")


def step_uid(message: Message) -> str:
    """SOP Instance UID of the step that a message makes."""
    return derive("ups", message.control_id)


def compose(settings: Worklist, alert: Alert) -> Dataset:
    """All that an SCU has to give (PS3.4 table CC.2.5-3), and what the step is about (PS3.3 C.30)."""
    patient = alert.patient
    step = Dataset()
    step.SpecificCharacterSet = "ISO_IR 192"
    for keyword in _EMPTY:
        setattr(step, keyword, "")
    for keyword in _EMPTY_SEQUENCES:
        setattr(step, keyword, [])
    step.ProcedureStepState = "SCHEDULED"
    step.ScheduledProcedureStepPriority = PRIORITIES[alert.level]
    step.ProcedureStepLabel = long_string(text.headline(alert))
    step.WorklistLabel = settings.label
    step.CommentsOnTheScheduledProcedureStep = "\r\n".join([text.sentence(alert), *text.limits(alert)])[:10240]
    step.ScheduledProcedureStepStartDateTime = f"{datetime.fromtimestamp(alert.raised).astimezone():%Y%m%d%H%M%S%z}"
    step.ScheduledWorkitemCodeSequence = [_code("110005", "DCM", "Interpretation")]  # CID 9231
    # what it names is there: whoever waits for a series that still arrives loses the time that the alert wins
    step.InputReadinessState = "READY"
    step.InputInformationSequence = _inputs(settings, alert)
    step.StudyInstanceUID = alert.study_uid
    for keyword in ("PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex"):
        setattr(step, keyword, patient.get(keyword, ""))
    step.ReferencedRequestSequence = [_request(alert)]
    return step


def _request(alert: Alert) -> Dataset:
    patient = alert.patient
    request = Dataset()
    request.StudyInstanceUID = alert.study_uid
    request.AccessionNumber = patient.get("AccessionNumber", "")
    request.RequestedProcedureID = ""
    request.RequestedProcedureDescription = long_string(patient.get("StudyDescription", ""))
    request.RequestedProcedureCodeSequence = []
    request.IssuerOfAccessionNumberSequence = []
    request.OrderPlacerIdentifierSequence, request.OrderFillerIdentifierSequence = [], []
    for keyword in ("PlacerOrderNumberImagingServiceRequest", "FillerOrderNumberImagingServiceRequest"):
        if keyword in patient:
            setattr(request, keyword, patient[keyword])
    return request


def _inputs(settings: Worklist, alert: Alert) -> list[Dataset]:
    """The slices that show most of each finding, and the SR where there is one (macro: PS3.3 table 10-3b)."""
    keys = dict.fromkeys(each["key_slice"] for each in alert.evidence["findings"])
    inputs = [_referenced(settings, alert, alert.series_uid, [_slice(key) for key in keys])] if keys else []
    if document := alert.evidence["sr_uid"]:
        model = alert.evidence["model"]
        series = result_series(
            alert.study_uid, alert.series_uid, model["name"], model["version"], model["digest"], "SR"
        )
        inputs.append(_referenced(settings, alert, series, [_reference(Comprehensive3DSRStorage, document)]))
    return inputs


def _referenced(settings: Worklist, alert: Alert, series_uid: str, references: list[Dataset]) -> Dataset:
    item, retrieval = Dataset(), Dataset()
    item.TypeOfInstances = "DICOM"
    item.StudyInstanceUID, item.SeriesInstanceUID = alert.study_uid, series_uid
    item.ReferencedSOPSequence = references
    retrieval.RetrieveAETitle = settings.retrieve_ae_title
    item.DICOMRetrievalSequence = [retrieval]
    return item


def _slice(key: str) -> Dataset:
    """A slice by its key, which names the frame of a multi-frame image."""
    uid, _, frame = key.partition(" frame ")
    reference = _reference(EnhancedCTImageStorage if frame else CTImageStorage, uid)
    if frame:
        reference.ReferencedFrameNumber = int(frame)
    return reference


def _reference(sop_class: str, uid: str) -> Dataset:
    reference = Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = sop_class, uid
    return reference


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, meaning
    return code


def _takes(association: Association, sop_class: str) -> bool:
    return any(each.abstract_syntax == sop_class for each in association.accepted_contexts)


def _judge(status: int | None, good: dict[int, str], operation: str) -> str:
    if status is None:
        raise Unreachable(f"no answer to {operation} within {DIMSE_TIMEOUT_S:g} s, or it ended the association")
    answer = f"{operation}: 0x{status:04X}"
    if status in good:
        return f"{answer}, {good[status]}"
    if status in BUSY:
        raise Unreachable(answer)
    raise Refused(answer)
