"""Why a peer is not let in."""

from __future__ import annotations

from enum import Enum


class Refusal(Enum):
    """How it is counted, how the peer is told (result, source and reason of A-ASSOCIATE-RJ, PS3.8 table 9-21), and why.

    A peer without an association to reject is cut off.
    """

    CALLING_AE = "calling_ae", (1, 1, 3), "its AE title is not in node.allowed_calling_aes"
    ADDRESS = "address", None, "its address is not in node.allowed_addresses"
    TLS = "tls", None, "no TLS, or no certificate that is trusted"
    LIMIT = "limit", (2, 3, 2), "node.max_associations are open"
    PEER_LIMIT = "peer_limit", (2, 3, 2), "node.max_associations_per_peer are open from its address"
    STOPPING = "stopping", (2, 3, 1), "the node is stopping"

    def __init__(self, label: str, rejection: tuple[int, int, int] | None, why: str) -> None:
        self.label, self.rejection, self.why = label, rejection, why

    @property
    def is_alarming(self) -> bool:
        """Whether somebody tries to get in who may not."""
        return self in (Refusal.CALLING_AE, Refusal.ADDRESS, Refusal.TLS)
