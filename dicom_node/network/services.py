"""What peers are served with: who they are, what they send, what they are answered."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import structlog

from dicom_node.images.part10 import read_whole
from dicom_node.network.dimse import PROCESSING_FAILURE, RESOURCE_LIMITATION
from dicom_node.storage.journal import JournalError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydicom.dataset import Dataset

    from dicom_node.network.dimse import Command
    from dicom_node.network.refusal import Refusal

LONGEST_DATA_SET = 1 << 22  # bytes of a data set that is not an instance to be stored

STATUSES = {
    PROCESSING_FAILURE: "the data set can't be read, or the journal or the spool can't be used",
    RESOURCE_LIMITATION: f"a data set of more than {LONGEST_DATA_SET:,} bytes",
}

log = structlog.get_logger(__name__)


@dataclass(eq=False, slots=True)
class Peer:
    """Who has an association with us.

    Attributes
    ----------
    ae_title, address, port : the peer's; the title without padding
    contexts : by presentation context ID, abstract and transfer syntax of those accepted
    outcomes : what became of its messages, counted by whoever serves them
    asked : what we have asked it, by message ID, for whoever takes the answers

    """

    ae_title: str
    address: str
    port: int
    contexts: dict[int, tuple[str, str]]
    outcomes: Counter[str] = field(default_factory=Counter)
    asked: dict[int, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Unique while it is connected."""
        return f"{self.ae_title}@{self.address}:{self.port}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request gets.

    Attributes
    ----------
    status : of the response
    comment : where it is no success
    then : command set and data set of a request of ours that follows it on the same association

    """

    status: int
    comment: str = ""
    then: tuple[bytes, bytes] | None = None


class Message(Protocol):
    """Who takes a message's data set, piece by piece. Nothing raises: what fails is answered."""

    def write(self, piece: memoryview) -> None:
        """Take the next bytes; the memory is used again afterwards."""

    def finish(self) -> Answer | None:
        """Answer: all of it is here. None: there is no answer to it."""

    def discard(self) -> None:
        """Forget it: the rest will not come. Only ever called instead of `finish`."""


class Service(Protocol):
    """What one SOP Class is served with."""

    def serve(self, peer: Peer, command: Command, transfer_syntax: str) -> Message:
        """Serve a request."""

    def answered(self, peer: Peer, command: Command) -> None:
        """Take the response to a request of ours."""


class Services(Protocol):
    """What peers are served with. Calls about one peer come one after the other, on its thread."""

    def refused(self, address: str, calling_ae: str, refusal: Refusal) -> None:
        """Take note of who got no association; the AE title is empty where it was not asked for."""

    def accepted(self, peer: Peer) -> None:
        """Take note of an association."""

    def serve(self, peer: Peer, context_id: int, command: Command) -> Message:
        """Serve a request other than C-ECHO; one without a data set is finished at once."""

    def answered(self, peer: Peer, context_id: int, command: Command) -> None:
        """Take the response to a request of ours."""

    def ended(self, peer: Peer, *, released: bool) -> None:
        """Take note of an association's end: released, or else aborted or lost. Comes once, and last."""


class Gathered:
    """A message whose data set is small and wanted whole, decoded.

    Parameters
    ----------
    peer, transfer_syntax : whose it is, and how it is encoded
    serve : what to do with the data set; may raise `JournalError`, OSError, and whatever pydicom does

    """

    def __init__(self, peer: Peer, transfer_syntax: str, serve: Callable[[Dataset], Answer]) -> None:
        self._peer, self._transfer_syntax, self._serve = peer, transfer_syntax, serve
        self._encoded = bytearray()

    def write(self, piece: memoryview) -> None:
        if len(self._encoded) <= LONGEST_DATA_SET:
            self._encoded += piece

    def finish(self) -> Answer:
        if len(self._encoded) > LONGEST_DATA_SET:
            return Answer(RESOURCE_LIMITATION, f"more than {LONGEST_DATA_SET} bytes")
        try:
            return self._serve(read_whole(bytes(self._encoded), self._transfer_syntax))
        except (JournalError, OSError) as error:
            log.warning("request_not_kept", association=self._peer.name, reason=str(error))
            return Answer(PROCESSING_FAILURE, "the journal or the spool can't be used")
        except Exception as error:  # noqa: BLE001 (pydicom raises anything on what is no data set)
            log.warning("request_unreadable", association=self._peer.name, reason=type(error).__name__)
            return Answer(PROCESSING_FAILURE, "a data set that can't be read")

    def discard(self) -> None:
        """Nothing to forget."""


class Ignored:
    """A message whose data set nobody wants, and its answer, if it gets one."""

    def __init__(self, answer: Answer | None) -> None:
        self._answer = answer

    def write(self, piece: memoryview) -> None:
        """Pass over it."""

    def finish(self) -> Answer | None:
        return self._answer

    def discard(self) -> None:
        """Nothing to forget."""
