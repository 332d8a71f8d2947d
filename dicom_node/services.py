"""What peers are served with: who they are, what they send, what they are answered."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from dicom_node.dimse import Command


@dataclass(eq=False, slots=True)
class Peer:
    """Who has an association with us.

    Attributes
    ----------
    ae_title, address, port : the peer's; the title without padding
    contexts : by presentation context ID, abstract and transfer syntax of those accepted
    outcomes : what became of its messages, counted by whoever serves them

    """

    ae_title: str
    address: str
    port: int
    contexts: dict[int, tuple[str, str]]
    outcomes: Counter[str] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        """Unique while it is connected."""
        return f"{self.ae_title}@{self.address}:{self.port}"


@dataclass(frozen=True, slots=True)
class Answer:
    """Status of a response, a comment where it is no success, and an encoded data set where it has one."""

    status: int
    comment: str = ""
    data_set: bytes = b""


class Message(Protocol):
    """Who takes a message's data set, piece by piece. Nothing raises: what fails is answered."""

    def write(self, piece: memoryview) -> None:
        """Take the next bytes; the memory is used again afterwards."""

    def finish(self) -> Answer | None:
        """Answer: all of it is here. None: there is no answer to it."""

    def discard(self) -> None:
        """Forget it: the rest will not come. Only ever called instead of `finish`."""


class Services(Protocol):
    """What peers are served with. Calls about one peer come one after the other, on its thread."""

    def accepted(self, peer: Peer) -> None:
        """Take note of an association."""

    def serve(self, peer: Peer, context_id: int, command: Command) -> Message:
        """Serve a request other than C-ECHO; one without a data set is finished at once."""

    def ended(self, peer: Peer, *, released: bool) -> None:
        """Take note of an association's end: released, or else aborted or lost. Comes once, and last."""


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
