"""Alerts as unified procedure steps, for a manager that checks what PS3.4 table CC.2.5-3 asks of a requestor."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import Comprehensive3DSRStorage, CTImageStorage, EnhancedCTImageStorage
from pynetdicom import AE, evt
from pynetdicom.sop_class import UnifiedProcedureStepPush, Verification

from dicom_node.alerts.channel import Refused, Unreachable
from dicom_node.alerts.settings import Worklist
from dicom_node.alerts.worklist import WorklistChannel, step_uid
from dicom_node.results.uids import Issue
from runtime.types import ModelIdentity
from tests.dicom_node.alerts.made import EARLY, PATIENT, SERIES, STUDY, note, report, written

# pynetdicom leaves the socket of a connection that could not be opened to garbage collection
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """What pynetdicom left goes within the test that is known for it, not in a later one."""
    yield
    gc.collect()


# type 1: a value; type 2: there, if empty (PS3.4 table CC.2.5-3, column N-CREATE, for the requestor)
TYPE_1 = (
    "ScheduledProcedureStepPriority", "ProcedureStepLabel", "ScheduledProcedureStepStartDateTime",
    "InputReadinessState", "ProcedureStepState",
)  # fmt: skip
TYPE_2 = (
    "TransactionUID", "WorklistLabel", "ScheduledProcessingParametersSequence", "ScheduledStationNameCodeSequence",
    "ScheduledStationClassCodeSequence", "ScheduledStationGeographicLocationCodeSequence",
    "ScheduledWorkitemCodeSequence",
    "CommentsOnTheScheduledProcedureStep", "InputInformationSequence", "PatientName", "PatientID", "PatientBirthDate",
    "PatientSex", "IssuerOfPatientID", "IssuerOfPatientIDQualifiersSequence", "OtherPatientIDsSequence", "AdmissionID",
    "IssuerOfAdmissionIDSequence", "AdmittingDiagnosesDescription", "AdmittingDiagnosesCodeSequence",
    "ReferencedRequestSequence", "ProcedureStepProgressInformationSequence",
    "UnifiedProcedureStepPerformedProcedureSequence",
)  # fmt: skip
NOT_ALLOWED = ("SOPClassUID", "SOPInstanceUID", "ScheduledProcedureStepModificationDateTime")


class Manager:
    """An SCP of UPS Push: steps by UID, and what became of them."""

    def __init__(self) -> None:
        self.steps: dict[str, Dataset] = {}
        self.cancelled: list[str] = []
        self.status: int | None = None

    def create(self, event: evt.Event):
        if self.status is not None:
            return self.status, None
        uid, step = event.request.AffectedSOPInstanceUID, event.attribute_list
        if uid in self.steps:
            return 0x0111, None
        if any(not step.get(keyword) for keyword in TYPE_1) or any(keyword not in step for keyword in TYPE_2):
            return 0x0120, None
        if any(keyword in step for keyword in NOT_ALLOWED) or step.TransactionUID:
            return 0x0106, None
        self.steps[uid] = step
        return 0x0000, None

    def act(self, event: evt.Event):
        uid = event.request.RequestedSOPInstanceUID
        if event.action_type != 2:
            return 0x0123, None
        if uid not in self.steps:
            return 0xC307, None
        if uid in self.cancelled:
            return 0xB304, None
        self.cancelled.append(uid)
        return 0x0000, None


@pytest.fixture(scope="module")
def serving() -> Iterator[Manager]:
    made = Manager()
    ae = AE("WORKLIST")
    ae.add_supported_context(UnifiedProcedureStepPush)
    ae.add_supported_context(Verification)
    handlers = [(evt.EVT_N_CREATE, made.create), (evt.EVT_N_ACTION, made.act)]
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
    made.port = server.socket.getsockname()[1]
    yield made
    server.shutdown()


@pytest.fixture
def manager(serving: Manager) -> Manager:
    """As good as new."""
    serving.steps, serving.cancelled, serving.status = {}, [], None
    return serving


def channel(port: int) -> WorklistChannel:
    told = {"name": "ed", "ae_title": "WORKLIST", "host": "127.0.0.1", "port": port, "retrieve_ae_title": "PACS"}
    return WorklistChannel(Worklist.model_validate(told), "SCANSIDE", None)


def test_a_step_has_all_that_the_standard_asks_for(ledger, manager):
    note(ledger, report(sr_uid="2.25.7"), patient=PATIENT | {"AccessionNumber": "A1", "IssuerOfPatientID": "HOSP"})
    message, alert = written(ledger)
    assert "created" in channel(manager.port).send(message, alert)
    ((uid, step),) = manager.steps.items()
    assert uid == step_uid(message)
    assert (step.ScheduledProcedureStepPriority, step.ProcedureStepState) == ("HIGH", "SCHEDULED")
    assert step.ProcedureStepLabel == "CRITICAL: Intracerebral haemorrhage 31.2 ml"
    assert "Research use only, not a medical device." in step.CommentsOnTheScheduledProcedureStep
    assert (step.PatientID, str(step.PatientName), step.IssuerOfPatientID) == ("P1", PATIENT["PatientName"], "HOSP")
    (request,) = step.ReferencedRequestSequence
    assert (request.StudyInstanceUID, request.AccessionNumber) == (STUDY, "A1")
    images, document = step.InputInformationSequence
    assert (images.StudyInstanceUID, images.SeriesInstanceUID, images.TypeOfInstances) == (STUDY, SERIES, "DICOM")
    assert images.DICOMRetrievalSequence[0].RetrieveAETitle == "PACS"
    assert images.ReferencedSOPSequence[0].ReferencedSOPClassUID == CTImageStorage
    assert images.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == "1.2.3.4.5.8"
    assert document.ReferencedSOPSequence[0].ReferencedSOPClassUID == Comprehensive3DSRStorage
    for keyword in (*TYPE_1, *TYPE_2):
        assert keyword in step


def test_the_sr_that_a_step_names_is_the_one_that_is_sent(ledger, manager):
    note(ledger, report(sr_uid="2.25.7"), revision=3)
    channel(manager.port).send(*written(ledger))
    (step,) = manager.steps.values()
    model = ModelIdentity("phantom-unet", "1.0", "ab" * 32, "int8", "another", "anything")
    issue = Issue(STUDY, SERIES, 7, model, 3, datetime.now(UTC), "content")
    reference = step.InputInformationSequence[1]
    assert reference.SeriesInstanceUID == issue.series("SR")
    assert reference.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == "2.25.7"


def test_a_frame_is_named_by_its_number_and_early_evidence_has_no_sr(ledger, manager):
    early = report("urgent", 3, missing=("arriving",))
    early["findings"][0]["key_slice"] = "1.2.3.4.5.1 frame 17"
    note(ledger, early, final=False)
    channel(manager.port).send(*written(ledger))
    (step,) = manager.steps.values()
    assert step.ScheduledProcedureStepPriority == "MEDIUM"
    (images,) = step.InputInformationSequence
    (reference,) = images.ReferencedSOPSequence
    assert (reference.ReferencedSOPClassUID, reference.ReferencedFrameNumber) == (EnhancedCTImageStorage, 17)
    assert reference.ReferencedSOPInstanceUID == "1.2.3.4.5.1"


def test_a_repetition_is_a_duplicate_and_counts_as_taken(ledger, manager):
    note(ledger, report())
    message, alert = written(ledger)
    channel(manager.port).send(message, alert)
    assert "has it already" in channel(manager.port).send(message, alert)
    assert len(manager.steps) == 1


def test_another_level_makes_another_step_and_a_withdrawal_cancels_it(ledger, manager):
    note(ledger, EARLY, final=False)
    note(ledger, report("urgent", 12))
    note(ledger, report("routine"), revision=2)
    uids = []
    for _ in range(3):
        message, alert = written(ledger)
        channel(manager.port).send(message, alert)
        channel(manager.port).send(message, alert)  # killed before the journal knew
        ledger.sent(message, "taken")
        uids.append(step_uid(message))
    assert list(manager.steps) == uids[:2]
    assert manager.cancelled == uids[:2]
    assert [step.ScheduledProcedureStepPriority for step in manager.steps.values()] == ["HIGH", "MEDIUM"]


def test_a_step_that_the_manager_has_lost_is_as_good_as_cancelled(ledger, manager):
    note(ledger, EARLY, final=False)
    note(ledger, report("routine"))
    ledger.sent(written(ledger)[0], "taken")
    assert "0xC307" in channel(manager.port).send(*written(ledger))


@pytest.mark.parametrize(("status", "error"), [(0x0106, Refused), (0x0124, Refused), (0x0110, Unreachable)])
def test_what_is_not_taken(ledger, manager, status, error):
    manager.status = status
    note(ledger, report())
    with pytest.raises(error, match=f"0x{status:04X}"):
        channel(manager.port).send(*written(ledger))


def test_whether_it_is_there(manager):
    assert "WORKLIST at 127.0.0.1" in channel(manager.port).reach()


def test_an_archive_is_no_manager(ledger):
    ae = AE("WORKLIST")
    ae.add_supported_context(Verification)
    server = ae.start_server(("127.0.0.1", 0), block=False)
    port = server.socket.getsockname()[1]
    note(ledger, report())
    with pytest.raises(Refused, match="Unified Procedure Step - Push"):
        channel(port).send(*written(ledger))
    with pytest.raises(Refused, match="Unified Procedure Step - Push"):
        channel(port).reach()
    server.shutdown()
    with pytest.raises(Unreachable):
        channel(port).send(*written(ledger))
