"""The node's configuration: one TOML file, overridden by the environment, every mistake reported at once.

``SCANSIDE_NODE__PORT=4242`` overrides ``port`` of ``[node]``; lists and tables are JSON there. The descriptions below
are the manual: `dicom_node.configuration.toml` writes them beside the defaults.
"""

from __future__ import annotations

import ipaddress
import os
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict, SettingsError

from dicom_node.alerts.settings import Email, Hl7, Settings, Webhook, Worklist
from dicom_node.configuration.journal import JournalSettings
from dicom_node.configuration.mistakes import Mistake, clash, mistake, raised_again, unknown_variables
from dicom_node.configuration.sections import (
    Audit,
    CodeRow,
    Destination,
    Log,
    Model,
    Node,
    Page,
    Results,
    Scanner,
    Section,
    Series,
    Tls,
    TriageRule,
    Web,
)
from dicom_node.configuration.triton import Triton
from dicom_node.storage.postgres import Address
from runtime.engine import TAKES
from runtime.errors import ScansideError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import ModelWrapValidatorHandler
    from pydantic_core import InitErrorDetails

_PREFIX = "SCANSIDE_"
CHANNELS = ("hl7", "webhooks", "emails", "worklists")


class ConfigError(ScansideError):
    """A configuration that can't be used; its message has one line for each mistake."""


class Config(Section):
    node: Node = Field(Node(), description="The DICOM node.")
    model: Model = Field(Model(), description="The network and the engine that runs it.")
    triton: Triton | None = Field(
        None,
        description="Servers for model.backend triton: NVIDIA Triton, or others that speak KServe v2. `scanside bundle "
        "triton` writes the model for them.",
        examples=[Triton(servers=("grpc://192.0.2.40:8001", "grpc://192.0.2.41:8001"), fail_over="onnxruntime")],
    )
    series: Series = Field(Series(), description="When a series is complete.")
    destinations: tuple[Destination, ...] = Field((), description="Where results go: one table for each receiver.")
    tls: Tls | None = Field(
        None,
        description="Files for TLS, relative to this one's folder; read again by the next connection when they change.",
        examples=[Tls(certificate=Path("node.pem"), key=Path("node.key"), ca=Path("ca.pem"))],
    )
    scanners: tuple[Scanner, ...] = Field(
        (),
        description="Scanners that take reports of storage commitment at a port of their own: one table for each. "
        "Others get them on the association on which they asked.",
        examples=[Scanner(ae_title="CT01", host="192.0.2.7", port=104)],
    )
    triage: tuple[TriageRule, ...] = Field(
        (
            # the ICH score counts 30 ml and more (Hemphill, Stroke 2001); extra-axial blood displaces the brain sooner
            TriageRule(level="critical", classes=("any",), volume_ml=30.0),
            TriageRule(level="critical", classes=("epidural",), volume_ml=5.0),
            TriageRule(level="critical", classes=("subdural",), volume_ml=10.0),
            TriageRule(level="urgent", classes=("any",), volume_ml=0.0),
        ),
        description="Triage rules, in order; the first that holds decides; none: routine.",
    )
    results: Results = Field(Results(), description="What results look like.")
    codes: tuple[CodeRow, ...] = Field(
        (),
        description="Codes of a site's own, in place of the bundle's and of scanside's: one table for each class. "
        "SNOMED CT identifiers are held against their check digit.",
        examples=[
            CodeRow(
                name="subdural",
                finding=("35486000", "SCT", "Subdural intracranial hemorrhage"),
                site=("128319008", "SCT", "Intracranial structure"),
            )
        ],
    )
    hl7: tuple[Hl7, ...] = Field(
        (),
        description="Who is told of alerts by HL7 v2 (ORU^R01 over MLLP): one table for each listener.",
        examples=[Hl7(name="emergency", host="192.0.2.20", port=2575)],
    )
    webhooks: tuple[Webhook, ...] = Field(
        (),
        description="Who is told of alerts by a signed POST request: one table for each address.",
        examples=[Webhook(name="paging", url="https://hooks.hospital/alerts", secret=Path("paging.secret"))],
    )
    emails: tuple[Email, ...] = Field(
        (),
        description="Who is told of alerts by e-mail: one table for each group of people.",
        examples=[
            Email(
                name="on-call",
                host="mail.hospital",
                sender="scanside@hospital.example",
                recipients=("on-call@hospital.example",),
                after_s=300,
            )
        ],
    )
    worklists: tuple[Worklist, ...] = Field(
        (),
        description="Worklists that get a step of high priority for an alert (DICOM UPS): one table for each manager.",
        examples=[
            Worklist(name="reading", ae_title="WORKLIST", host="192.0.2.30", port=11112, retrieve_ae_title="PACS")
        ],
    )
    journal: JournalSettings = Field(JournalSettings(), description="Where series, results owed and alerts are kept.")
    web: Web = Field(Web(), description="For monitoring: Prometheus' metrics, and whether the node is well.")
    page: Page = Field(Page(), description="The triage page: for radiologists, and for whoever looks after the node.")
    audit: Audit = Field(Audit(), description="Audit trail (DICOM PS3.15 A.5). Off without a file and a host.")
    log: Log = Field(Log(), description="Logging, to stderr.")

    @property
    def channels(self) -> tuple[Settings, ...]:
        """All who are told of alerts."""
        return (*self.hl7, *self.webhooks, *self.emails, *self.worklists)

    @property
    def node_name(self) -> str:
        """Which of several nodes this is."""
        return self.node.name or self.node.ae_title

    @property
    def journal_place(self) -> Path | Address:
        """The journal's file, or its database."""
        if self.journal.database:
            return Address(self.journal.database, self.journal.password)
        return self.node.folder / "journal.sqlite"

    @model_validator(mode="wrap")
    @classmethod
    def _report_clashes(cls, data: Any, handler: ModelWrapValidatorHandler[Config]) -> Config:
        """Report what clashes across fields beside what is wrong in one: an `after` validator would have to wait."""
        errors = list(_clashes(data)) if isinstance(data, dict) else []
        try:
            config = handler(data)
        except ValidationError as error:
            errors += [raised_again(details) for details in error.errors()]
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return config


class _Environment(BaseSettings, Config):
    """Which variables there are; only read through `EnvSettingsSource`."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, env_nested_delimiter="__")


def load(path: Path) -> Config:
    """Read a configuration file, then the environment over it.

    Parameters
    ----------
    path : a TOML file; relative folders in it are relative to its own folder

    Raises
    ------
    ConfigError : one line for each mistake, named as in the file: ``node.port: 70000 is above 65535``

    """
    config, mistakes = examine(path)
    if mistakes:
        count = f"{len(mistakes)} mistake{'s' * (len(mistakes) > 1)}"
        raise ConfigError("\n".join([f"{path}: {count}", *map(str, mistakes)]))
    return config


def examine(path: Path) -> tuple[Config, list[Mistake]]:
    """Read like `load`, and with mistakes too: whatever is wrong is left out, so that the rest can be looked at.

    Raises
    ------
    ConfigError : no file, or no TOML

    """
    table = _read(path)
    mistakes = list(unknown_variables(_PREFIX, Config))
    try:
        table = _overridden(table, EnvSettingsSource(_Environment)())
    except SettingsError as error:
        hint = f"lists are JSON: {_PREFIX}NODE__ALLOWED_CALLING_AES='[\"CT1\"]'"
        mistakes.append(Mistake("environment", f"{error}; {hint}"))
    try:
        config = Config.model_validate(table)
    except ValidationError as error:
        mistakes += [_mistake(details) for details in error.errors() if not _is_echo(details)]
        config = _what_is_sound(table, error)
    folder, model = path.absolute().parent, config.model
    paths = {name: value and folder / value for name, value in (("bundle", model.bundle), ("plans", model.plans))}
    model = model.model_copy(update=paths | {"trusted_keys": tuple(folder / key for key in model.trusted_keys)})
    node = config.node.model_copy(update={"folder": folder / config.node.folder})
    told = {
        name: tuple(each.model_copy(update=_placed(each, folder)) for each in getattr(config, name))
        for name in ("webhooks", "emails")
    }
    tls = config.tls and config.tls.model_copy(update={name: folder / file for name, file in config.tls})
    audit = config.audit.model_copy(update={"file": config.audit.file and folder / config.audit.file})
    page = config.page.model_copy(update={"users": config.page.users and folder / config.page.users})
    password = config.journal.password and folder / config.journal.password
    journal = config.journal.model_copy(update={"password": password})
    found = {"node": node, "journal": journal, "model": model, "tls": tls, "audit": audit, "page": page, **told}
    return config.model_copy(update=found), mistakes


def _placed(section: Webhook | Email, folder: Path) -> dict[str, Path]:
    """The files that a section names, relative to `folder`."""
    return {name: folder / value for name, value in section if isinstance(value, Path)}


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows' editors put a byte order mark before it
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: {error.strerror}; `scanside config --example > {path}` writes one") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: is a folder; name the configuration file itself, such as node.toml") from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a configuration file that can be read") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8, which TOML must be: {error.reason} at byte {error.start}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from error


def _mistake(details: Any) -> Mistake:
    """One of pydantic's errors, with the variable where the value is from one."""
    found = mistake(details, Config)
    variable = _PREFIX + "__".join(str(part) for part in details["loc"]).upper()
    return Mistake(found.key, f"{found.complaint} (from {variable})") if variable in os.environ else found


def _what_is_sound(table: dict[str, Any], error: ValidationError) -> Config:
    """The configuration without what `error` complains of: keys, rows of a list, or whole sections.

    Once is not always enough: a default that takes a wrong value's place may clash with a destination.
    """
    wrong = {each["loc"][: 1 if _lacks_key(each) else 2] for each in error.errors()}
    sound = {}
    for name, value in table.items():
        if (name,) in wrong:
            continue
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        kept = {key: part for key, part in pairs if (name, key) not in wrong}
        sound[name] = kept if isinstance(value, dict) else list(kept.values())
    try:
        return Config.model_validate(sound)
    except ValidationError as clashing:
        return _what_is_sound(sound, clashing)


def _is_echo(details: Any) -> bool:
    """True of a list that is too short for pydantic only because something in it is wrong, which is told by itself."""
    return details["type"] == "too_short" and len(details["input"]) > 0


def _lacks_key(details: Any) -> bool:
    """Whether a section lacks a key that it has to have: then it is left out as a whole."""
    return details["type"] == "missing" and len(details["loc"]) == 2


def _overridden(table: dict[str, Any], environment: dict[str, Any]) -> dict[str, Any]:
    """Sections are one level deep, and so is the merge; a list from the environment replaces the file's."""
    merged = dict(table)
    for section, values in environment.items():
        mine = table.get(section)
        merged[section] = {**mine, **values} if isinstance(mine, dict) and isinstance(values, dict) else values
    return merged


def _clashes(table: dict[str, Any]) -> Iterator[InitErrorDetails]:
    """What no single field can know. The values may be raw and wrong: then `Config` itself complains about them."""
    yield from _engine_clashes(table)
    page = dict(Page()) | _as_dict(table.get("page"))
    if not (page["users"] or page["open_to_all"] or is_loopback(str(page["address"]))):
        complaint = "is seen from the network: name page.users (`scanside page-password`), or set page.open_to_all"
        yield clash(("page", "address"), page["address"], complaint)
    node = dict(Node()) | _as_dict(table.get("node"))
    if not table.get("tls"):
        for location, value in _wants_tls(table):
            yield clash(location, value, "needs certificate, key and ca in [tls]")
    yield from _lacks_database(_as_dict(table.get("journal")))
    yield from _ports_taken_twice(table)
    yield from _repeated_names(table, ("destinations",))
    yield from _repeated_names(table, ("codes",))
    yield from _repeated_names(table, CHANNELS)
    for index, email in enumerate(_rows(table, "emails")):
        for key, other in (("password", "user"), ("user", "password")):
            if email.get(key) is not None and email.get(other) is None:
                yield clash(("emails", index, key), email[key], f"needs `{other}`: a login has both")
    for index, destination in enumerate(_rows(table, "destinations")):
        same_port = str(destination.get("port")) == str(node["port"])
        if same_port and _is_same_host(str(destination.get("host")), str(node["address"])):
            complaint = f"with port {node['port']} is this node itself: results would come back in"
            yield clash(("destinations", index, "host"), destination.get("host"), complaint)


def _engine_clashes(table: dict[str, Any]) -> Iterator[InitErrorDetails]:
    model = dict(Model()) | _as_dict(table.get("model"))
    backend, precision = str(model["backend"]), str(model["precision"])
    taken = TAKES.get(backend)
    if taken and precision not in taken and any(precision in others for others in TAKES.values()):
        yield clash(("model", "precision"), precision, f"is not for {backend}: it takes {', '.join(taken)}")
    if backend == "triton" and not table.get("triton"):
        yield clash(("model", "backend"), backend, "needs servers in [triton]")


def _lacks_database(journal: dict[str, Any]) -> Iterator[InitErrorDetails]:
    for key in ("password", "shared_storage"):
        if journal.get(key) and not journal.get("database"):
            yield clash(("journal", key), journal[key], "needs journal.database: without one the journal is a file")


def _ports_taken_twice(table: dict[str, Any]) -> Iterator[InitErrorDetails]:
    """Ports of this node that are one; at 0 each gets a free one."""
    taken: dict[str, str] = {}
    for section in (Node, Web, Page):
        name = section.__name__.lower()
        port = (dict(section()) | _as_dict(table.get(name)))["port"]
        if port not in (None, 0) and taken.setdefault(str(port), name) != name:
            yield clash((name, "port"), port, f"is {taken[str(port)]}.port already: each needs one of its own")


def _repeated_names(table: dict[str, Any], sections: tuple[str, ...]) -> Iterator[InitErrorDetails]:
    """Names that stand twice in lists that share them."""
    names: dict[str, str] = {}
    for section in sections:
        for index, row in enumerate(_rows(table, section)):
            name, here = row.get("name"), f"{section}[{index}]"
            if name is not None and names.setdefault(str(name).strip(), here) != here:
                complaint = f"is the name of {names[str(name).strip()]} already"
                yield clash((section, index, "name"), name, complaint)


def _rows(table: dict[str, Any], section: str) -> list[dict[str, Any]]:
    """The tables of a list; what is none is empty, and `Config` complains of it."""
    rows = table.get(section)
    return [_as_dict(each) for each in (rows if isinstance(rows, list | tuple) else ())]


def _wants_tls(table: dict[str, Any]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Keys that ask for TLS, and their values; keys that are there, for what is wrong is left out."""
    if _as_dict(table.get("node")).get("tls") is True:
        yield ("node", "tls"), True
    if _as_dict(table.get("page")).get("tls") is True:
        yield ("page", "tls"), True
    audit = dict(Audit()) | _as_dict(table.get("audit"))
    if audit["host"] is not None and audit["transport"] == "tls":
        yield ("audit", "host"), audit["host"]
    for name in ("destinations", "scanners", "hl7", "worklists"):
        for index, row in enumerate(_rows(table, name)):
            if row.get("tls") is True:
                yield (name, index, "tls"), True


def is_loopback(host: str) -> bool:
    """Whether what listens there is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_same_host(host: str, listening: str) -> bool:
    """Whether `host` reaches `listening`, as far as one can tell without asking the name service."""
    host, listening = ("127.0.0.1" if name == "localhost" else name for name in (host, listening))
    try:
        reached, bound = ipaddress.ip_address(host), ipaddress.ip_address(listening)
    except ValueError:
        return host == listening
    return reached == bound or (bound.is_unspecified and (reached.is_loopback or reached.is_unspecified))


def _as_dict(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, BaseModel | dict) else {}
