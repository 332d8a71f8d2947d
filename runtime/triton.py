"""Triton, or any server that speaks KServe v2: replicas of one model, and a local engine for when none answers."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from runtime.client import LONGEST_S, Address, library
from runtime.errors import (
    BackendError,
    DeviceLost,
    InferenceError,
    NoPlan,
    OutOfTime,
    ScansideError,
    SelfTestFailed,
    ServerLost,
)
from runtime.kserve import MOST_VIEWS, Server
from runtime.types import IN_PLACE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from runtime.bundle import Bundle
    from runtime.session import Session
    from runtime.types import ModelIdentity, SliceLabels

MOST_DEADLINE_S = LONGEST_S / (2 * MOST_VIEWS)  # for a slice: so many take half of the time, and more of them no longer
RETRY_S, LONGEST_RETRY_S = 1.0, 30.0  # before a replica that failed is asked again; doubled each time
COST = 10  # and, up to the longest, so many times as long as slices waited for it in vain


@dataclass(frozen=True, slots=True)
class Servers:
    """Where the model is served.

    Attributes
    ----------
    addresses : of replicas of one model: ``grpc://HOST:PORT`` or ``http://HOST:PORT``
    deadline_s : for a slice, of which there may be several in a request; all of one get half of `LONGEST_S` at most
    fail_over : the local backend that answers when none of them does; None: nobody does

    """

    addresses: tuple[str, ...]
    deadline_s: float = 5.0
    fail_over: str | None = None


class TritonSession:
    """A bundle's precision on servers, one of them after the other; every connection is checked before it answers.

    Parameters
    ----------
    local : answers when no server does; each answer says whose it is (`identity` after `infer`)

    Raises
    ------
    BackendError : no tritonclient; or no server can be used, and there is nobody else

    """

    def __init__(self, bundle: Bundle, precision: str, servers: Servers, local: Session | None = None) -> None:
        self._local = local
        addresses = [Address.parse(one) for one in servers.addresses]
        for one in addresses:
            library(one)  # what is not installed is no server that is away
        self._least_s, self._next_look = min(servers.deadline_s, MOST_DEADLINE_S), 0.0
        self._replicas = deque(_Replica(one, bundle, precision, servers.deadline_s) for one in addresses)
        opened = [one.server for one in self._replicas if one.open(time.monotonic() + LONGEST_S)]
        if not opened and local is None:
            raise BackendError(f"no server can be used: {self._faults()}")
        first = opened[0] if opened else local
        self.sizes, self.max_batch = first.sizes, first.max_batch
        self._say(opened[0] if opened else None)
        if len(opened) < len(self._replicas) and opened:
            self.why += f"; {self._faults()}"

    def infer(self, hu: NDArray[np.int16] | NDArray[np.int32]) -> list[SliceLabels]:
        """Labels of the slices that N views answer, from HU ``(N, shown, H, W)``, of the next server that is well.

        However many there are, all of them together get `LONGEST_S`, with all that is asked of them. One that hangs
        takes half of it at most, and looking for those that are lost a quarter: the rest is for one that is well.

        Raises
        ------
        ServerLost : none answers in time, and there is no local engine
        InferenceError : of a request that a well server refuses, or the local engine's

        """
        refusal, late, began = None, "", time.monotonic()
        until = began + LONGEST_S
        self._look_for_lost(began + LONGEST_S / 4)
        for _ in range(len(self._replicas)):
            if until - time.monotonic() < self._least_s:  # too little to tell one that is well from one that hangs
                break
            replica = self._replicas[0]
            self._replicas.rotate(-1)
            if replica.server is None:
                continue
            try:
                answers = replica.infer(hu, until)
            except OutOfTime as error:
                late = str(error)
                continue
            except DeviceLost:
                continue
            except InferenceError as error:
                refusal = error
                continue
            self._say(replica.server)
            return answers
        if self._local is not None:
            answers = self._local.infer(hu)
            self._say(None, refusal)
            return answers
        raise refusal or ServerLost(f"no server answers: {'; '.join(filter(None, (self._faults(), late)))}")

    def _look_for_lost(self, until: float) -> None:
        """Look until then for servers whose time has come, the longest due first; one waited for in vain is enough."""
        for replica in sorted((one for one in self._replicas if one.server is None), key=lambda one: one.next_try):
            began = time.monotonic()
            if began < max(replica.next_try, self._next_look):
                return
            if not replica.open(until):
                self._next_look = time.monotonic() + _pause_s(began)

    def close(self) -> None:
        for one in self._replicas:
            one.close()
        if self._local is not None:
            self._local.close()

    @property
    def servers(self) -> dict[str, str]:
        """Why each can't be asked now, by its address; empty where it can, as far as the last slices have told."""
        return {str(one.address): one.fault for one in self._replicas}

    def _say(self, server: Server | None, refusal: InferenceError | None = None) -> None:
        """Say who has answered, or would."""
        self.identity: ModelIdentity
        if server is not None:
            self.identity, self.why = server.identity, server.why
        elif self._local is not None:
            own = self._local.identity
            self.identity = replace(own, backend=f"{own.backend} {IN_PLACE} triton")
            self.why = f"fail-over: {refusal or self._faults()}"

    def _faults(self) -> str:
        return "; ".join(one.fault for one in self._replicas if one.fault)


class _Replica:
    """A server that may be away for a while."""

    def __init__(self, address: Address, bundle: Bundle, precision: str, deadline_s: float) -> None:
        self.address, self._opening = address, (address, bundle, precision, deadline_s)
        self.server: Server | None = None
        self.fault = ""  # why there is none
        self._wait_s, self.next_try = RETRY_S, 0.0

    def open(self, until: float) -> bool:
        """Look for it, until then at most; whether it can be asked now."""
        began = time.monotonic()
        try:
            self.server, self.fault = Server(*self._opening, until), ""
        except (BackendError, InferenceError, SelfTestFailed) as error:
            self._lose(error, began)
        return self.server is not None

    def infer(self, hu: NDArray[np.int16] | NDArray[np.int32], until: float) -> list[SliceLabels]:
        """Labels, of a connection that is made anew where a request is refused: that tells whose fault it is.

        Raises
        ------
        ServerLost : the server
        OutOfTime : neither, as far as can be told
        InferenceError : the request

        """
        try:
            return self._infer(hu, until)
        except (DeviceLost, NoPlan):
            raise
        except InferenceError:
            self.close()
            if not self.open(until):
                raise ServerLost(self.fault) from None
            return self._infer(hu, until)

    def _infer(self, hu: NDArray[np.int16] | NDArray[np.int32], until: float) -> list[SliceLabels]:
        began, self.server.until = time.monotonic(), until
        try:
            answers = self.server.infer(hu)
        except OutOfTime:  # others took what it would have had: it is not lost for that
            self.server.reconnect()
            raise
        except DeviceLost as error:
            self.close()
            self._lose(error, began)
            raise
        self._wait_s = RETRY_S
        return answers

    def _lose(self, error: ScansideError, began: float) -> None:
        self.fault, self.next_try = str(error), time.monotonic() + max(self._wait_s, _pause_s(began))
        self._wait_s = min(2 * self._wait_s, LONGEST_RETRY_S)

    def close(self) -> None:
        if self.server is not None:
            self.server.close()
            self.server = None


def _pause_s(began: float) -> float:
    """How long nobody is to wait again for what was begun then, and came to nothing."""
    return min(COST * (time.monotonic() - began), LONGEST_RETRY_S)
