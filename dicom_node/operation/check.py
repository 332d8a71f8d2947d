"""Whether the node could start and deliver here and now: all is tried, and what fails says what to do about it."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import sqlite3
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dicom_node.configuration.triton import servers
from dicom_node.network.acceptor import PORT_REMEDIES
from dicom_node.operation import trial
from dicom_node.operation.trial import KINDS, Item
from dicom_node.results.codes import CodeError, check_names
from dicom_node.storage.database import EmptyJournal, JournalError
from dicom_node.storage.lock import is_locked
from dicom_node.storage.membership import known_token, take_name
from dicom_node.storage.postgres import Postgres
from runtime.bundle import open_bundle
from runtime.errors import BackendError, BundleError, InferenceError, ScansideError, SelfTestFailed
from runtime.triage import RuleError, check_rules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dicom_node.configuration.config import Config
    from dicom_node.configuration.mistakes import Mistake
    from dicom_node.configuration.sections import Node
    from dicom_node.storage.database import Execute
    from dicom_node.storage.postgres import Address
    from runtime.bundle import Bundle


def check(config: Config, mistakes: Sequence[Mistake] = ()) -> list[Item]:
    """Look at everything that the node needs. It lasts as long as the destinations take to answer, and a self-test.

    Nothing is left behind: no folder is made, nothing is stored anywhere.

    Parameters
    ----------
    config : what is sound of the configuration
    mistakes : what is wrong in its file; each is a fault, and what hangs on a key that is wrong isn't looked at

    """

    def is_sound(*keys: str) -> bool:
        return not any(mistake.concerns(key) for mistake in mistakes for key in keys)

    node = config.node
    items = [Item(mistake.key, False, "configuration", mistake.complaint) for mistake in mistakes]
    if is_sound("node.allowed_calling_aes", "node.address", "node.port"):
        items.append(_senders(node))
    if is_sound("node.folder"):
        items.append(_folder(node))
    if is_sound("node.folder", "journal"):
        items += _journal(config, is_sound)
    if is_sound("node.folder", "node.free_floor_gb"):
        items.append(_disk(node))
    items += [
        _port(section, where.address, where.port, node.folder)
        for section, where in (("node", node), ("web", config.web), ("page", config.page))
        if where.port is not None and is_sound(f"{section}.address", f"{section}.port")
    ]
    if not config.destinations and is_sound("destinations"):
        items.append(Item("destinations", None, "configuration", "there are none: results stay in the node's folder"))
    parts = (
        ("node.ae_title", trial.archives),
        ("page", trial.page),
        ("audit", trial.audit),
        ("node.ae_title", trial.channels),
    )
    for key, look in parts:
        if is_sound(key, "tls"):
            items += look(config)
    return [*items, *_model(config, is_sound)]


def _senders(node: Node) -> Item:
    limits = [", ".join(node.allowed_calling_aes)] if node.allowed_calling_aes else []
    limits += ["with a certificate that tls.ca vouches for"] if node.tls else []
    limits += [f"from {', '.join(node.allowed_addresses)}"] if node.allowed_addresses else []
    if limits:
        return Item("senders", True, "configuration", f"only {'; '.join(limits)}")
    return Item(
        "senders",
        None,
        "configuration",
        f"anyone who reaches {node.address}:{node.port} may send; name the scanners in node.allowed_calling_aes",
    )


def _folder(node: Node) -> Item:
    try:
        existing = next(folder for folder in (node.folder, *node.folder.parents) if folder.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        message = f"{node.folder}: can't be made or written: {error.strerror}; set node.folder to one that can"
        return Item("folder", False, "environment", message)
    state = "writable" if existing == node.folder else "will be made"
    return Item("folder", True, "environment", f"{node.folder}: {state}")


def _journal(config: Config, is_sound: Callable[..., bool]) -> Iterator[Item]:
    place = config.journal_place
    if isinstance(place, Path):
        yield from _file(place)
    elif is_sound("node.name", "node.ae_title"):
        yield _database(place, config.node.folder, config.node_name, shared=config.journal.shared_storage)


def _file(path: Path) -> Iterator[Item]:
    """Look whether a journal that is there is one; read-only, and a node that runs on it is not disturbed."""
    try:
        if not path.exists():
            return
    except OSError:  # the folder's fault, and told there
        return
    try:
        # immutable: as it lies there; `Journal` itself, read-only too, would leave SQLite's log files behind
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.Error as error:
        message = f"{path}: {error}; move it away, and the node begins a new one"
        yield Item("journal", False, "environment", message)
        return
    if tables and not {"series", "outbox"} <= tables:
        message = f"{path}: an SQLite file, but not a journal of scanside; move it away"
        yield Item("journal", False, "environment", message)
        return
    yield Item("journal", True, "environment", f"{path}: can be read")


def _database(address: Address, folder: Path, name: str, *, shared: bool) -> Item:
    """Do with a database what a node does that starts, and undo it; nothing stays there."""
    state = "can be used"

    def join(execute: Execute) -> None:
        take_name(execute, Postgres.clock, name, known_token(folder, name) or "", folder, shared)

    try:
        try:
            Postgres(address, read_only=True).close()
        except EmptyJournal:
            state = "can be reached; empty, the node makes its tables"
        Postgres(address, read_only=False, rehearsal=join).close()
    except JournalError as error:
        return _fault("journal", error)
    return Item("journal", True, "environment", f"{address}: {state}")


def _disk(node: Node) -> Item:
    """Look at the disk that the folder is on, or will be: also where the folder itself can't be used."""
    for folder in (node.folder, *node.folder.parents):
        try:
            usage = shutil.disk_usage(folder)
        except OSError:
            continue
        break
    free_gb, floor = usage.free / 1e9, f"node.free_floor_gb = {node.free_floor_gb:g}"
    if usage.total / 1e9 < node.free_floor_gb:
        message = f"{floor} is more than the whole disk has ({usage.total / 1e9:.1f} GB): every slice would be refused"
        return Item("disk", False, "environment", f"{message}; lower it")
    if free_gb < node.free_floor_gb:
        message = f"{free_gb:.1f} GB free, below {floor}: every slice would be refused; make room or lower it"
        return Item("disk", False, "environment", message)
    message = f"{free_gb:.1f} GB free; slices are refused below {node.free_floor_gb:g}"
    return Item("disk", True, "environment", message)


def _port(section: str, address: str, port: int, folder: Path) -> Item:
    """Whether a port can be listened on: the node's own, or one of its pages'."""
    name, where = "port" if section == "node" else f"{section} port", f"{address}:{port}"
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.create_server((address, port), family=family):
            pass
    except OSError as error:
        if error.errno == errno.EADDRINUSE and is_locked(folder):
            return Item(name, True, "environment", f"{where}: taken; a node runs in {folder}")
        by_name = isinstance(error, socket.gaierror)
        remedy = None if by_name else PORT_REMEDIES.get(error.errno or 0)
        remedy = (remedy or "set another node.address or node.port").replace("node.", f"{section}.")
        # create_server adds the address to what the system says
        reason = error.strerror if by_name or not error.errno else os.strerror(error.errno)
        return Item(name, False, "environment", f"{where}: {reason}; {remedy}")
    return Item(name, True, "environment", f"{where} is free")


def _fault(name: str, error: ScansideError) -> Item:
    """What any other command would end with, as an item."""
    return Item(name, False, KINDS[error.exit_code], str(error))


def _model(config: Config, is_sound: Callable[..., bool]) -> Iterator[Item]:
    # loading an engine takes a second or more: nothing but this needs it
    from runtime.session import open_session, self_test  # noqa: PLC0415

    if not is_sound("model.bundle"):
        yield from _triage_without_bundle(config)
        return
    try:
        bundle = open_bundle(config.model.bundle, config.model.trusted_keys)
    except BundleError as error:
        yield _fault("bundle", error)
        yield from _triage_without_bundle(config)
        return
    yield Item("bundle", True, "environment", f"{bundle.name} {bundle.version}, every hash as its manifest says")
    yield from _triage(config, bundle)
    if not is_sound("model.backend", "model.threads", "model.precision", "model.plans", "triton"):
        return
    looked_at = [*_gpu(config, bundle), *_servers(config, bundle)]
    yield from looked_at
    if any(item.ok is False for item in looked_at):  # the engine could only say the same again
        return
    try:
        session = open_session(
            bundle,
            config.model.backend,
            precision=config.model.precision,
            threads=config.model.threads,
            plans=config.model.plans,
            servers=servers(config.triton and config.triton.model_dump()),
        )
    except (BackendError, BundleError, InferenceError) as error:
        yield _fault("engine", error)
        return
    try:
        worst = self_test(session, bundle)
    except (InferenceError, SelfTestFailed) as error:
        yield _fault("engine", error)
    else:
        identity = session.identity
        message = (
            f"{identity.backend}, {identity.precision}: golden slices as recorded (at most {worst:.3%} of the pixels "
            f"differ); {session.why}"
        )
        yield Item("engine", True, "finding", message)
    finally:
        session.close()


def _gpu(config: Config, bundle: Bundle) -> Iterator[Item]:
    """Look at TensorRT, the GPU and its plans, where they are meant or there; what is missing names its remedy."""
    from runtime import caps, device, plans  # noqa: PLC0415  # as above

    is_meant = config.model.backend == "tensorrt"
    if config.model.backend not in ("auto", "tensorrt"):
        return
    try:
        trt = caps.load()
    except BackendError as error:
        if is_meant:
            yield _fault("tensorrt", error)
        return
    typed = "strongly typed" if caps.is_strongly_typed(trt) else "types by constraint"
    yield Item("tensorrt", True, "environment", f"{trt.__version__}, {typed}")
    try:
        found = device.open_device()
        gpu, free, library = found.about(), found.free_bytes(), found.library
        found.close()
    except (BackendError, InferenceError) as error:
        yield replace(_fault("gpu", error), ok=False if is_meant else None)
        return
    memory = f"{free >> 20} of {gpu.memory >> 20} MiB free"
    about = f"{gpu.name}, compute capability {gpu.capability}, driver for CUDA {gpu.driver}, {memory}, by {library}"
    yield Item("gpu", True, "environment", about)
    try:
        folder = config.model.plans or plans.default_folder()
    except BackendError as error:
        yield replace(_fault("plans", error), ok=False if is_meant else None)
        return
    found = plans.sorted_out(bundle, folder, trt, gpu)
    for message in [*found.wrong, *found.failed]:
        yield Item("plan", None, "environment", message)
    message = f"{folder}: {len(found.usable)} for this GPU and bundle"
    if found.others:
        message += f", {found.others} of another GPU, TensorRT or bundle"
    if not found.usable:
        remedy = plans.command("build", bundle, folder, *["--again"] * bool(found.failed))
        yield Item("plans", False if is_meant else None, "environment", f"{message}; {remedy}")
        return
    message += f": {', '.join(str(one.key) for one in found.usable)}"
    unjudged = [str(one.key) for one in found.usable if one.verdict is None]
    if unjudged:
        remedy = plans.command("verify", bundle, folder, "--tensorrt")
        yield Item("plans", None, "finding", f"{message}; not yet judged: {', '.join(unjudged)}: {remedy}")
    else:
        yield Item("plans", True, "environment", message)


def _servers(config: Config, bundle: Bundle) -> Iterator[Item]:
    """Look at each server by itself: a session is content with one, or with none where it may fail over."""
    from runtime.client import Address, library  # noqa: PLC0415  # as above
    from runtime.kserve import Server  # noqa: PLC0415  # as above

    if config.model.backend != "triton" or config.triton is None:
        return
    precision = "fp32" if config.model.precision == "auto" else config.model.precision
    addresses = [Address.parse(each) for each in config.triton.servers]
    try:
        for address in addresses:
            library(address)
    except BackendError as error:  # once: it is no server's fault, and no fail-over makes up for it
        yield _fault("server", error)
        return
    for address in addresses:
        try:
            server = Server(address, bundle, precision, config.triton.deadline_s)
        except (BackendError, InferenceError, SelfTestFailed) as error:
            yield replace(_fault("server", error), ok=None if config.triton.fail_over else False)
            continue
        yield Item("server", True, "environment", f"{server.why}, {server.identity.backend}: golden slices as recorded")
        server.close()


def _triage(config: Config, bundle: Bundle) -> Iterator[Item]:
    """Hold what names classes against those that there are."""
    try:
        check_rules(config.triage, bundle.classes)
    except RuleError as error:
        yield Item("triage", False, "configuration", str(error))
    try:
        check_names((row.name for row in config.codes), bundle.classes)
    except CodeError as error:
        yield Item("codes", False, "configuration", str(error))


def _triage_without_bundle(config: Config) -> Iterator[Item]:
    """Hold the rules against the model that ships: a warning, since the one that is meant may know more classes."""
    try:
        shipped = open_bundle()
    except BundleError:
        yield Item("triage", None, "configuration", "the rules' classes can't be checked without a bundle")
        return
    for item in _triage(config, shipped):
        yield replace(item, ok=None, message=f"{item.message} (the one that ships, for want of yours)")
