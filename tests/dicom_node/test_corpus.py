"""Every file of the corpus through a running node: an answer each time, one state with a reason for every series."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import build_context
from pynetdicom.pdu import A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import A_ASSOCIATE, ImplementationClassUIDNotification, MaximumLengthNotification
from pynetdicom.sop_class import CTImageStorage, Verification
from structlog.testing import capture_logs

from dicom_node.intake.receiver import STATUSES
from dicom_node.network import dimse
from dicom_node.network.dimse import Request
from dicom_node.network.wire import TRANSFER_SYNTAXES
from dicom_node.node import Node
from dicom_node.status import look
from dicom_node.storage.journal import SeriesState
from tests.dicom_node.conftest import wait_until
from tests.dicom_node.network.test_connection import Peer, asked

CORPUS = Path(__file__).parents[3] / "shared" / "corpus"
pytestmark = pytest.mark.skipif(
    not CORPUS.exists(), reason="the corpus of real DICOM is not here: real and damaged files are NOT pushed"
)


class Scanner(Peer):
    """A peer that sends bytes as they lie in a file, whatever they are, in the file's transfer syntax or another."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.socket.settimeout(60)
        self._seen: set[str] = set()
        wanted = A_ASSOCIATE()
        wanted.application_context_name = "1.2.840.10008.3.1.1.1"
        wanted.calling_ae_title, wanted.called_ae_title = "CT01", "SCANSIDE"
        contexts = [build_context(CTImageStorage, syntax) for syntax in TRANSFER_SYNTAXES]
        for number, context in enumerate([*contexts, build_context(Verification)]):
            context.context_id = 2 * number + 1
        wanted.presentation_context_definition_list = [*contexts, build_context(Verification)]
        wanted.presentation_context_definition_list[-1].context_id = 2 * len(contexts) + 1
        length, implementation = MaximumLengthNotification(), ImplementationClassUIDNotification()
        length.maximum_length_received, implementation.implementation_class_uid = 16384, "1.2.3"
        wanted.user_information = [length, implementation]
        self.socket.sendall(A_ASSOCIATE_RQ(wanted).encode())
        assert self.receive()[0] == 2
        self.echo_context = 2 * len(contexts) + 1

    def store(self, path: Path, number: int) -> int:
        """Status of one file."""
        content = path.read_bytes()
        sop_class, sop_uid, syntax, begins = CTImageStorage, f"1.2.3.{number}", ImplicitVRLittleEndian, 0
        try:
            meta = read_file_meta_info(path)
            begins = 132 + 12 + int(meta.FileMetaInformationGroupLength)
            sop_class, sop_uid = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
            syntax = meta.TransferSyntaxUID
        except (InvalidDicomError, AttributeError):
            pass  # no file meta information, or not all of it: a data set of a syntax that was guessed
        if sop_uid in self._seen:  # one image in many syntaxes: each is to reach the worker
            other = f"{sop_uid[:-3]}{number:03}"
            content, sop_uid = content.replace(sop_uid.encode(), other.encode()), other
        self._seen.add(sop_uid)
        known = syntax if syntax in TRANSFER_SYNTAXES else ExplicitVRLittleEndian
        command = {
            dimse.AFFECTED_SOP_CLASS_UID: str(sop_class), dimse.COMMAND_FIELD: Request.C_STORE,
            dimse.MESSAGE_ID: number, dimse.COMMAND_DATA_SET_TYPE: 0, dimse.AFFECTED_SOP_INSTANCE_UID: str(sop_uid),
        }  # fmt: skip
        context = 2 * TRANSFER_SYNTAXES.index(known) + 1
        self.message(dimse.encode(command), content[begins:], context=context, piece=1 << 16)
        return self.answer().number(dimse.STATUS)


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom on what is wrong with the files
def test_every_file_is_answered_and_every_series_ends_with_a_reason(node: Node):
    files = sorted(path for path in CORPUS.rglob("*") if path.is_file())
    with capture_logs() as events:
        scanner = Scanner(node.port)
        statuses = Counter(scanner.store(path, number) for number, path in enumerate(files, start=1))
        scanner.message(asked(Request.C_ECHO), context=scanner.echo_context)
        assert scanner.answer().number(dimse.STATUS) == 0
        scanner.socket.close()
        wait_until(lambda: not any(one.is_open for one in look(node.config).series), "a state of every series")
    series = look(node.config).series
    print({f"{status:04X}": count for status, count in statuses.items()}, Counter(str(one.state) for one in series))
    assert statuses.keys() <= STATUSES.keys()
    assert statuses[0] > 90
    assert statuses.total() == len(files)
    stored = list((node.config.node.folder / "spool").glob("[0-9u]*/*/*.dcm"))
    assert sum(one.slices_received for one in series) == len(stored)
    assert len({(one.study_uid, one.series_uid) for one in series}) == len(series) == len({p.parent for p in stored})
    assert {one.state for one in series} == {SeriesState.ANALYSED, SeriesState.NOT_ANALYSED}, "one failed"
    assert all(one.reason for one in series if one.state == SeriesState.NOT_ANALYSED)
    assert all(one.missing for one in series if one.provisional)
    assert node.supervisor.worker == 1, "a worker died of a file"
    assert not [event for event in events if event["log_level"] in ("error", "critical")]
