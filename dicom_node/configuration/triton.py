"""Where the model is served, if not by this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints

from dicom_node.configuration.sections import Section
from runtime.client import Address
from runtime.triton import MOST_DEADLINE_S, Servers

if TYPE_CHECKING:
    from collections.abc import Mapping


def _legal_address(text: str) -> str:
    return str(Address.parse(text))


def _all_different(addresses: tuple[str, ...]) -> tuple[str, ...]:
    for address in addresses:
        if addresses.count(address) > 1:
            raise ValueError(f"has {address} more than once: each replica is a server of its own")
    return addresses


ServerAddress = Annotated[str, StringConstraints(strip_whitespace=True), AfterValidator(_legal_address)]


class Triton(Section):
    """Servers that speak KServe v2."""

    servers: Annotated[tuple[ServerAddress, ...], AfterValidator(_all_different)] = Field(
        min_length=1,
        description="Replicas of one model, asked in turn; where one fails, the next is. grpc://HOST:PORT or "
        "http://HOST:PORT; over gRPC a server on this machine shares memory.",
    )
    deadline_s: float = Field(
        5.0,
        gt=0,
        le=MOST_DEADLINE_S,
        description="For the answer to a slice; a server that takes longer is lost for a while. All servers together "
        "get a minute, one request half of it at most, so that another can be asked after one that hangs.",
    )
    fail_over: Literal["auto", "tensorrt", "onnxruntime", "onnxruntime-cuda"] | None = Field(
        None,
        description="The local backend that answers when no server does; results say so. Default: none does, and "
        "series wait for a server.",
        examples=["onnxruntime"],
    )


def servers(section: Mapping[str, Any] | None) -> Servers | None:
    """What a session has to know, of the section as it is told to a worker."""
    return section and Servers(tuple(section["servers"]), section["deadline_s"], section["fail_over"])
