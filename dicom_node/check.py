"""Whether the node could start and deliver here and now: all is tried, and what fails says what to do about it."""

from __future__ import annotations

import shutil
import socket
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pynetdicom import build_context
from pynetdicom.sop_class import Verification

from dicom_node.sender import PeerError, associate
from runtime.errors import BackendError, BundleError, InferenceError, SelfTestFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dicom_node.config import Config, Destination, Node

Kind = Literal["configuration", "environment", "finding"]


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


def check(config: Config) -> list[Item]:
    """Look at everything that the node needs. It lasts as long as the destinations take to answer, and a self-test.

    Nothing is left behind: no folder is made, nothing is stored anywhere.
    """
    return [
        _senders(config.node),
        *_folder(config.node),
        _port(config.node),
        *_destinations(config),
        *_model(config),
    ]


def _senders(node: Node) -> Item:
    if node.allowed_calling_aes:
        return Item("senders", True, "configuration", f"only {', '.join(node.allowed_calling_aes)}")
    return Item(
        "senders",
        None,
        "configuration",
        f"anyone who reaches {node.address}:{node.port} may send; name the scanners in node.allowed_calling_aes",
    )


def _folder(node: Node) -> Iterator[Item]:
    try:
        existing = next(folder for folder in (node.folder, *node.folder.parents) if folder.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
        free_gb = shutil.disk_usage(existing).free / 1e9
    except OSError as error:
        message = f"{node.folder}: can't be made or written: {error.strerror}; set node.folder to one that can"
        yield Item("folder", False, "environment", message)
        return
    state = "writable" if existing == node.folder else "will be made"
    yield Item("folder", True, "environment", f"{node.folder}: {state}")
    if free_gb < node.free_floor_gb:
        message = (
            f"{free_gb:.1f} GB free, below node.free_floor_gb = {node.free_floor_gb:g}: every slice would be refused"
        )
        yield Item("disk", False, "environment", message)
    else:
        message = f"{free_gb:.1f} GB free; slices are refused below {node.free_floor_gb:g}"
        yield Item("disk", True, "environment", message)


def _port(node: Node) -> Item:
    family = socket.AF_INET6 if ":" in node.address else socket.AF_INET
    try:
        with socket.create_server((node.address, node.port), family=family):
            pass
    except OSError as error:
        message = f"{node.address}:{node.port}: {error.strerror or error}; is a node running already?"
        return Item("port", False, "environment", message)
    return Item("port", True, "environment", f"{node.address}:{node.port} is free")


def _destinations(config: Config) -> Iterator[Item]:
    if not config.destinations:
        yield Item("destinations", None, "configuration", "there are none: results stay in the node's folder")
    for destination in config.destinations:
        yield _echo(destination, config.node.ae_title)


def _echo(destination: Destination, ae_title: str) -> Item:
    """C-ECHO (DICOM PS3.4 annex A)."""
    name = f"destination {destination.name}"
    try:
        association = associate(destination, ae_title, [build_context(Verification)])
    except PeerError as error:
        return Item(name, False, "finding", str(error))
    status = association.send_c_echo().get("Status")
    association.release()
    if status != 0:
        answer = "no answer" if status is None else f"status 0x{status:04X}"
        return Item(name, False, "finding", f"accepts an association, but answers C-ECHO with {answer}")
    return Item(name, True, "finding", f"{destination.ae_title} at {destination.host}:{destination.port} answers")


def _model(config: Config) -> Iterator[Item]:
    # loading an engine takes a second or more: nothing but this needs it
    from runtime.bundle import open_bundle  # noqa: PLC0415
    from runtime.session import open_session, self_test  # noqa: PLC0415
    from runtime.triage import RuleError, check_rules  # noqa: PLC0415

    try:
        bundle = open_bundle(config.model.bundle)
    except BundleError as error:
        yield Item("bundle", False, "environment", str(error))
        return
    yield Item("bundle", True, "environment", f"{bundle.name} {bundle.version}, every hash as its manifest says")

    try:
        check_rules(config.triage, bundle.classes)
    except RuleError as error:
        yield Item("triage", False, "configuration", str(error))

    try:
        session = open_session(bundle, config.model.backend, threads=config.model.threads)
    except BackendError as error:
        yield Item("engine", False, "environment", str(error))
        return
    try:
        worst = self_test(session, bundle)
    except (InferenceError, SelfTestFailed) as error:
        yield Item("engine", False, "finding", str(error))
    else:
        message = f"{session.identity.backend}: golden slices as recorded (at most {worst:.3%} of the pixels differ)"
        yield Item("engine", True, "finding", message)
    finally:
        session.close()
