"""What is spoken on the wire, and what pynetdicom lacks there as requestor: no answer lost, no wait for Nagle."""

from __future__ import annotations

import queue
import socket
import ssl
from contextlib import suppress
from io import BytesIO
from typing import TYPE_CHECKING, Any

from pydicom import dcmread, uid
from pynetdicom import sop_class as sop
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dsutils import split_dataset

if TYPE_CHECKING:
    from pathlib import Path

    from pynetdicom.association import Association

# Of several proposed for one context the first of these is taken: what needs no decoder, then what loses nothing.
TRANSFER_SYNTAXES = (
    uid.ExplicitVRLittleEndian,
    uid.ImplicitVRLittleEndian,
    uid.RLELossless,
    uid.JPEGLSLossless,
    uid.JPEGLosslessSV1,
    uid.JPEGLossless,
    uid.JPEG2000Lossless,
    uid.HTJ2KLossless,
    uid.HTJ2KLosslessRPCL,
    uid.DeflatedExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    # lossy: taken, since a scanner that may not send an image says nothing of it, and analysed if the site allows it
    uid.JPEGLSNearLossless,
    uid.JPEG2000,
    uid.HTJ2K,
    uid.JPEGExtended12Bit,
    uid.JPEGBaseline8Bit,
)

# What a CT console pushes in one job beside its slices. All are accepted, since some consoles fail the whole job over
# one refused dose report; what is analysed is decided later. Not every storage class there is: pynetdicom copies the
# list for each connection (170 classes: 12 to 19 ms, these: 2 to 3), and some scanners open one for each image.
FROM_CT_SCANNERS = (
    sop.CTImageStorage,
    sop.EnhancedCTImageStorage,
    sop.LegacyConvertedEnhancedCTImageStorage,
    sop.SecondaryCaptureImageStorage,
    sop.MultiFrameSingleBitSecondaryCaptureImageStorage,
    sop.MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    sop.MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    sop.MultiFrameTrueColorSecondaryCaptureImageStorage,
    sop.XRayRadiationDoseSRStorage,
    sop.EnhancedXRayRadiationDoseSRStorage,
    sop.PatientRadiationDoseSRStorage,
    sop.BasicTextSRStorage,
    sop.EnhancedSRStorage,
    sop.ComprehensiveSRStorage,
    sop.Comprehensive3DSRStorage,
    sop.KeyObjectSelectionDocumentStorage,
    sop.GrayscaleSoftcopyPresentationStateStorage,
    sop.ColorSoftcopyPresentationStateStorage,
    sop.BlendingSoftcopyPresentationStateStorage,
    sop.CTPerformedProcedureProtocolStorage,
    sop.RawDataStorage,
    sop.SpatialRegistrationStorage,
    sop.EncapsulatedPDFStorage,
)

PIECE = 4096  # pynetdicom reads a PDU's six first bytes, then pieces of this size, then the rest


class _Prompt:
    """Acknowledges at once what begins or ends a PDU, and is closed in the end.

    DCMTK writes a PDU's header and its body one after the other with Nagle's algorithm on: the body waits until the
    header has been acknowledged, which Linux puts off for 40 ms. The option holds for a few segments only and has to be
    set again and again. Together with TCP_NODELAY, SR, SC and SEG take 32 ms to DCMTK's storescp instead of 233, to
    Orthanc 50 instead of 242.
    """

    def recv(self, size: int, flags: int = 0) -> bytes:
        if size < PIECE and hasattr(socket, "TCP_QUICKACK"):  # Linux
            self.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return super().recv(size, flags)

    def shutdown(self, how: int) -> None:
        """Say nothing when the peer was faster: pynetdicom closes the socket only where this raises nothing."""
        with suppress(OSError):
            super().shutdown(how)


class PromptSocket(_Prompt, socket.socket):
    """A connection that waits for no acknowledgement."""


class PromptTlsSocket(_Prompt, ssl.SSLSocket):
    """The same with TLS."""


class Answers(queue.Queue):
    """A requestor's message queue that pynetdicom's own loop finds empty; to be set as ``association.dimse.msg_queue``.

    That loop polls the queue for requests of the peer. send_c_store pauses it, but trusts its "paused" flag while it
    may still be passing its checkpoint. Then the loop takes the answer, throws it away ("unexpected C-STORE service
    message"), and the sender waits for it until the DIMSE timeout: once in 6,000 C-STOREs in one busy process.
    """

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        if not block:  # the loop; whoever sent something waits
            raise queue.Empty
        return super().get(block, timeout)


def store_file(association: Association, path: Path, sop_class_uid: str, sop_uid: str) -> int | None:
    """Store a file's object, as it is where the peer takes its transfer syntax; the status, None without an answer.

    Raises
    ------
    ValueError : the peer accepts nothing that it could be sent in, or the file holds another object than this one;
        besides, all that pydicom raises of a damaged file

    """
    meta, offset = split_dataset(path)
    with path.open("rb") as file:
        head = dcmread(file, stop_before_pixels=True)
        pixels = file.read(12)  # tag, VR and length, if there are any
        cut = len(pixels) == 12 and file.tell() + int.from_bytes(pixels[8:], "little") > path.stat().st_size
    if cut and meta.TransferSyntaxUID == uid.ExplicitVRLittleEndian:
        raise ValueError("is cut off within its pixel data")
    for held in (
        (meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID),
        (head.SOPClassUID, head.SOPInstanceUID),
    ):
        if held != (sop_class_uid, sop_uid):
            raise ValueError(f"holds {held[0]} {held[1]}, not {sop_class_uid} {sop_uid}")
    context_id = accepted(association, sop_class_uid, meta.TransferSyntaxUID)
    if context_id is None:
        return association.send_c_store(dcmread(path)).get("Status")
    response = store(association, context_id, (path, offset), sop_class_uid=sop_class_uid, sop_uid=sop_uid)
    return response.Status if response else None


def accepted(association: Association, sop_class_uid: str, transfer_syntax_uid: str) -> int | None:
    """ID of the presentation context in which a peer takes a class in a transfer syntax; None where it does not."""
    for context in association.accepted_contexts:
        if (context.abstract_syntax, context.transfer_syntax[0]) == (sop_class_uid, transfer_syntax_uid):
            return context.context_id
    return None


def store(
    association: Association,
    context_id: int,
    data_set: bytes | tuple[Path, int],
    *,
    sop_class_uid: str,
    sop_uid: str,
    message_id: int = 1,
) -> C_STORE | None:
    """C-STORE of an encoded data set, or of a file's from an offset on; None without an answer.

    Association.send_c_store would decode and encode it, which takes longer than to send it, drops group lengths,
    changes the lengths of sequences and refuses malformed files that scanners do send. Its switch for sending files as
    they are (_config.STORE_SEND_CHUNKED_DATASET) is one for the whole process, and converts for no peer.
    """
    request = C_STORE()
    request.MessageID, request.Priority = message_id, 0
    request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = sop_class_uid, sop_uid
    if isinstance(data_set, bytes):
        request.DataSet = BytesIO(data_set)
    else:  # as that switch has it; read piece by piece, it takes a fifth less time
        request._dataset_path = data_set  # noqa: SLF001
    try:
        association.dimse.send_msg(request, context_id)
    except Exception:  # of a file that can't be read to its end
        association.abort()  # what the peer has got of the message can't be taken back
        raise
    _, response = association.dimse.get_msg(block=True)
    if response is not None and response.is_valid_response:
        return response
    if association.is_established:
        association.abort()  # the answer may still come, and would be taken for the next one's
    return None
