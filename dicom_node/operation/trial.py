"""Whether all whom the node talks to answer: archives, who is told of alerts, who gets audit messages."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pynetdicom import build_context
from pynetdicom.sop_class import LabelMapSegmentationStorage, SegmentationStorage, Verification

from dicom_node.alerts.channel import Undelivered
from dicom_node.alerts.heralds import open_channel
from dicom_node.delivery.confirmation import CONTEXTS
from dicom_node.delivery.storing import SOP_CLASSES
from dicom_node.monitoring.syslog import Server
from dicom_node.network.requestor import PeerError, associate
from dicom_node.network.tls import Identity, TlsError
from dicom_node.page import hazards
from dicom_node.page.login import LoginError, Users

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pydicom.uid import UID

    from dicom_node.configuration.config import Config
    from dicom_node.configuration.sections import Destination

Kind = Literal["configuration", "environment", "finding"]
KINDS: dict[int, Kind] = {1: "finding", 2: "configuration", 3: "environment"}  # by the exit code of an error


def name_of(sop_class: UID) -> str:
    """What people call a SOP class; pydicom's dictionary is older than one of them."""
    return "Label Map Segmentation Storage" if sop_class == LabelMapSegmentationStorage else sop_class.name


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that was looked at.

    Attributes
    ----------
    name : what, such as ``"port"`` or ``"destination pacs"``
    ok : True, False, or None for a warning
    kind : whose fault it is when it isn't: the configuration's, this machine's, or what the check itself found out
    message : what was seen; where it is not ok, also what to do

    """

    name: str
    ok: bool | None
    kind: Kind
    message: str


def archives(config: Config) -> Iterator[Item]:
    """Whether destinations answer, over TLS where they want it."""
    identity = None
    if config.tls:
        try:
            identity = Identity(config.tls)
        except TlsError as error:
            yield Item("tls", False, "environment", str(error))
        else:
            yield Item("tls", True, "environment", f"{config.tls.certificate}: can be used")
    for destination in config.destinations:
        if identity or not destination.tls:
            yield _echo(destination, config.node.ae_title, identity, _sent(config))


def _sent(config: Config) -> dict[str, str]:
    """SOP classes of the results that are made, by role."""
    is_labelmap = config.results.segmentation == "labelmap"
    sent = {role: classes[0] for role, classes in SOP_CLASSES.items() if role != "pdf" or config.results.pdf}
    return sent | {"seg": LabelMapSegmentationStorage if is_labelmap else SegmentationStorage}


def _echo(destination: Destination, ae_title: str, identity: Identity | None, sent: Mapping[str, str]) -> Item:
    """C-ECHO (DICOM PS3.4 annex A), on an association as results will ask for."""
    name = f"destination {destination.name}"
    needed = {Verification, *(sent[role] for role in destination.results if role in sent)}
    needed |= {CONTEXTS[destination.confirm]} if destination.confirm in CONTEXTS else set()
    try:
        association = associate(destination, ae_title, [build_context(each) for each in needed], identity=identity)
    except PeerError as error:
        return Item(name, False, "finding", str(error))
    if lacking := sorted(name_of(context.abstract_syntax) for context in association.rejected_contexts):
        association.release()
        message = f"does not accept {', '.join(lacking)}: have it accept that, or change its `results` or `confirm`"
        return Item(name, False, "finding", f"{destination.ae_title} accepts an association, but {message}")
    status = association.send_c_echo().get("Status")
    association.release()
    if status != 0:
        answer = "no answer" if status is None else f"status 0x{status:04X}"
        return Item(name, False, "finding", f"accepts an association, but answers C-ECHO with {answer}")
    return Item(name, True, "finding", f"{destination.ae_title} at {destination.host}:{destination.port} answers")


def page(config: Config) -> Iterator[Item]:
    """Whether the page's users can be read, and what of it had better not stay so."""
    if config.page.port is None:
        return
    try:
        if config.page.users:
            Users(config.page.users)
    except LoginError as error:
        yield Item("page users", False, KINDS[error.exit_code], str(error))
    yield from (Item("page", None, "configuration", sentence) for sentence in hazards.find(config))


def audit(config: Config) -> Iterator[Item]:
    """Whether audit messages can go where they are meant to."""
    file, host = config.audit.file, config.audit.host
    if file:
        is_writable = os.access(file, os.W_OK) if file.exists() else os.access(file.parent, os.W_OK)
        problem = "" if is_writable else ": can't be written; set audit.file to one that can"
        yield Item("audit file", is_writable, "environment", f"{file}{problem}")
    if not host:
        return
    try:
        identity = Identity(config.tls) if config.tls else None
        Server(config.audit, identity, lambda _: None).reach()
    except TlsError:  # told of where the archives are asked
        return
    except OSError as error:
        yield Item("audit server", False, "finding", f"{host}: {error.strerror or error}; see [audit]")
    else:
        told = "answers" if config.audit.transport == "tls" else "gets datagrams; nobody says whether they arrive"
        yield Item("audit server", True, "finding", f"{host} {told}")


def channels(config: Config) -> Iterator[Item]:
    """Whether those who are told of alerts are there; none of them is told anything."""
    try:
        identity = Identity(config.tls) if config.tls else None
    except TlsError:  # told of where the archives are asked
        identity = None
    for settings in config.channels:
        name = f"channel {settings.name}"
        if getattr(settings, "tls", False) and identity is None:
            continue
        try:
            yield Item(name, True, "finding", open_channel(settings, config.node.ae_title, identity).reach())
        except Undelivered as error:
            yield Item(name, False, KINDS[error.exit_code], error.full)
