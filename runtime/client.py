"""A server's address, and NVIDIA's client for it: connected past any proxy, its errors in our words."""

from __future__ import annotations

import ipaddress
import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.errors import BackendError, InferenceError, ScansideError, ServerLost

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

LONGEST_S = 60.0  # for an answer, whoever is asked for it: the node takes a worker that says nothing for 120 s for hung
HEALTH_S = 2.0  # for an answer that needs no inference
REFUSED = {"StatusCode.INVALID_ARGUMENT", "400"}
CHANNEL = (  # in place of tritonclient's own, which are the two lengths and no keep-alive
    ("grpc.enable_http_proxy", 0),  # of the environment: pixels go to the servers that are configured, and nowhere else
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens: ``grpc://HOST:PORT`` or ``http://HOST:PORT``."""

    scheme: str
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read an address; ValueError says what is wrong with it."""
        found = re.fullmatch(r"(grpc|http)://(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):(\d{1,5})/?", text.strip())
        if not found or not 0 < int(found[3]) < 65536:
            raise ValueError("is no address of a server: write grpc://HOST:PORT or http://HOST:PORT")
        return cls(found[1], found[2], int(found[3]))

    @property
    def place(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def is_here(self) -> bool:
        """Whether it is on this machine, where memory can be shared."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"{self.scheme}://{self.place}"


def library(address: Address) -> ModuleType:
    """Tritonclient's half for an address.

    Raises
    ------
    BackendError : it is not installed

    """
    try:
        if address.scheme == "grpc":
            import tritonclient.grpc as found  # noqa: PLC0415  # an extra, of which each half is slow to load
        else:
            import tritonclient.http as found  # noqa: PLC0415
    except (ImportError, RuntimeError) as error:  # tritonclient makes the second of the first
        remedy = "in scanside's checkout, pip install '.[triton]'"
        raise BackendError(f"{address}: tritonclient is missing ({error}): {remedy}") from None
    return found


def connect(address: Address) -> Any:
    """A client of a server, which nothing has been asked yet.

    Raises
    ------
    BackendError : no tritonclient

    """
    client = library(address).InferenceServerClient
    if address.scheme == "grpc":
        return client(address.place, channel_args=CHANNEL)
    return client(address.place, connection_timeout=HEALTH_S, network_timeout=LONGEST_S)


@contextmanager
def told(address: Address) -> Iterator[None]:
    """Tell what the client raises in our words: whether the server is lost, or has refused or garbled this one call."""
    from tritonclient.utils import InferenceServerException  # noqa: PLC0415  # as in `library`

    try:
        yield
    except ScansideError:
        raise
    except InferenceServerException as error:
        kind = InferenceError if error.status() in REFUSED else ServerLost
        raise kind(f"{address}: {' '.join(str(error.message()).split())}") from None
    except OSError as error:  # HTTP's; a timeout among them
        raise ServerLost(f"{address}: {error}") from None
    except Exception as error:  # what the clients make of a garbled answer shares no base class below Exception
        raise InferenceError(f"{address}: an answer that is none of KServe v2: {error}") from error
