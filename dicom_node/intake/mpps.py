"""Modality Performed Procedure Step SCP (PS3.4 annex F.7): the scanner says when it is done, and what it has made."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog
from pynetdicom.sop_class import ModalityPerformedProcedureStep

from dicom_node.intake.announced import StepState
from dicom_node.network import dimse
from dicom_node.network.dimse import (
    DUPLICATE_INSTANCE,
    INVALID_ATTRIBUTE_VALUE,
    INVALID_INSTANCE,
    NO_SUCH_INSTANCE,
    PROCESSING_FAILURE,
    SUCCESS,
    UNRECOGNISED_OPERATION,
    Request,
)
from dicom_node.network.services import Answer, Gathered, Ignored

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydicom.dataset import Dataset

    from dicom_node.intake.announced import Announced
    from dicom_node.network.dimse import Command
    from dicom_node.network.services import Message, Peer

SOP_CLASS = ModalityPerformedProcedureStep

STATUSES = {
    SUCCESS: "the step, or its end, is in the journal",
    INVALID_ATTRIBUTE_VALUE: "PerformedProcedureStepStatus is not IN PROGRESS at the beginning, or none of the "
    "defined ones later",
    DUPLICATE_INSTANCE: "a step with this SOP Instance UID has begun already",
    NO_SUCH_INSTANCE: "no step with this SOP Instance UID has begun here",
    INVALID_INSTANCE: "the request names no SOP Instance UID",
    PROCESSING_FAILURE: "the step has ended and may no longer be updated, the data set can't be read, or the journal "
    "can't be written",
    UNRECOGNISED_OPERATION: "the service has no such operation",
}

log = structlog.get_logger(__name__)


class PerformedSteps:
    """The service.

    Parameters
    ----------
    announced : where steps and instances are kept
    told : called with the SeriesInstanceUIDs of a step that has ended

    """

    def __init__(self, announced: Announced, told: Callable[[tuple[str, ...]], None]) -> None:
        self._announced, self._told = announced, told

    def serve(self, peer: Peer, command: Command, transfer_syntax: str) -> Message:
        match command.field:
            case Request.N_CREATE:
                sop_uid, act = command.text(dimse.AFFECTED_SOP_INSTANCE_UID), self._create
            case Request.N_SET:
                sop_uid, act = command.text(dimse.REQUESTED_SOP_INSTANCE_UID), self._set
            case _:
                return Ignored(Answer(UNRECOGNISED_OPERATION))
        if not sop_uid:
            return Ignored(Answer(INVALID_INSTANCE, "a step without a SOP Instance UID"))

        return Gathered(peer, transfer_syntax, lambda step: act(peer, sop_uid, step))

    def answered(self, peer: Peer, command: Command) -> None:
        """Nothing: peers are asked nothing."""

    def _create(self, peer: Peer, sop_uid: str, step: Dataset) -> Answer:
        if _state(step) != StepState.IN_PROGRESS:
            return Answer(INVALID_ATTRIBUTE_VALUE, "PerformedProcedureStepStatus of a new step is IN PROGRESS")
        if not self._announced.begin_step(sop_uid, peer.ae_title):
            return Answer(DUPLICATE_INSTANCE, "this step has begun already")
        log.info("step_begun", association=peer.name, step=sop_uid)
        return Answer(SUCCESS)

    def _set(self, peer: Peer, sop_uid: str, changes: Dataset) -> Answer:
        before = self._announced.state_of(sop_uid)
        if before is None:
            return Answer(NO_SUCH_INSTANCE, "no such step: it was not begun here")
        if before is not StepState.IN_PROGRESS:
            # PS3.4 table F.7.2-2
            return Answer(PROCESSING_FAILURE, "Performed Procedure Step Object may no longer be updated")
        after = _state(changes)
        if after in ("", StepState.IN_PROGRESS):
            return Answer(SUCCESS)
        if after not in tuple(StepState):
            return Answer(INVALID_ATTRIBUTE_VALUE, "PerformedProcedureStepStatus is none of the defined ones")
        series = _series(changes)
        self._announced.end_step(sop_uid, StepState(after), series)
        counts = {one: len(sop_uids) for one, sop_uids in series.items()}
        log.info("step_ended", association=peer.name, step=sop_uid, state=after, instances=counts)
        self._told(tuple(series))
        return Answer(SUCCESS)


def _state(step: Dataset) -> str:
    return str(step.get("PerformedProcedureStepStatus") or "").strip()


def _series(step: Dataset) -> dict[str, set[str]]:
    """SOP Instance UIDs by SeriesInstanceUID, of a Performed Series Sequence (PS3.3 C.4.15)."""
    found: dict[str, set[str]] = {}
    for one in step.get("PerformedSeriesSequence") or ():
        references = [
            *(one.get("ReferencedImageSequence") or ()),
            *(one.get("ReferencedNonImageCompositeSOPInstanceSequence") or ()),
        ]
        sop_uids = {str(uid) for each in references if (uid := each.get("ReferencedSOPInstanceUID"))}
        if (series_uid := str(one.get("SeriesInstanceUID") or "")) and sop_uids:
            found.setdefault(series_uid, set()).update(sop_uids)
    return found
