"""What is spoken on the wire, and what pynetdicom lacks there as requestor: no answer lost, no wait for Nagle."""

from __future__ import annotations

import queue
import socket
import ssl
from contextlib import suppress
from typing import Any

from pydicom import uid
from pynetdicom import sop_class as sop

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
