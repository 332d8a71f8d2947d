"""The sections of a node's configuration; their descriptions are its manual (`dicom_node.configuration.toml`)."""

from __future__ import annotations

import ipaddress
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from dicom_node.configuration.snomed import is_identifier
from dicom_node.configuration.template import check_template
from dicom_node.images.gate import BONE_KERNELS
from dicom_node.storage.journal import Role

Confirm = Literal["no", "commitment", "query"]
Level = Literal["critical", "urgent", "routine"]
VIEWER_NAMES = ("study_uid", "series_uid", "patient_id", "accession_number")


def _legal_ae_title(title: str) -> str:
    if not re.fullmatch(r"[\x20-\x5b\x5d-\x7e]{1,16}", title):
        raise ValueError("is not an AE title: 1 to 16 ASCII characters, no backslash, no control character")
    return title


def _legal_name(name: str) -> str:
    """Names are shown on terminals, logged, and stand in SQL."""
    if not name.isprintable():
        raise ValueError("is not a name: it has a control character, or another one that can't be printed")
    return name


def _legal_host(host: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._:-]+", host):
        raise ValueError("is not a host name or an IP address")
    return host


def _legal_network(network: str) -> str:
    try:
        return str(ipaddress.ip_network(network))
    except ValueError as error:
        raise ValueError(f"is not an address or a network: {error}") from error


def _legal_path(path: Any) -> Any:
    if not isinstance(path, str | Path):
        return path  # pydantic complains of it
    if path == "" or "\0" in str(path):
        raise ValueError("is not a path")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError("names a home folder that is not there") from error


def _legal_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"is not a regular expression: {error}") from error
    return pattern


def _legal_viewer(template: str) -> str:
    check_template(template, VIEWER_NAMES)
    if not re.match(r"https?://[^\s/]+", template):
        raise ValueError("is no address of a viewer: begin with https://")
    return template


def _legal_triple(triple: tuple[str, ...]) -> tuple[str, ...]:
    """CodeValue and CodingSchemeDesignator are SH, CodeMeaning is LO (DICOM PS3.3 table 8.8-1, PS3.5 table 6.2-1)."""
    if len(triple) != 3:
        raise ValueError('is not a code: it has three parts, as ["50960005", "SCT", "Hemorrhage"]')
    for part, longest in zip(triple, (16, 16, 64), strict=True):
        if not part.isprintable() or "\\" in part or not 1 <= len(part.strip()) <= longest:
            raise ValueError(
                f"is not a code: {json.dumps(part)} has to be 1 to {longest} characters, without backslash and control "
                "characters"
            )
    value, scheme, _ = triple
    if scheme == "SCT" and not is_identifier(value):
        raise ValueError(f"is not a code: {value} is no SNOMED CT identifier, for its check digit is wrong")
    return triple


def _legal_colour(colour: tuple[int, ...]) -> tuple[int, ...]:
    if len(colour) != 3 or not all(0 <= part <= 255 for part in colour):
        raise ValueError("is not a colour: red, green and blue from 0 to 255, as [255, 82, 70]")
    return colour


def _drawable(title: str) -> str:
    if not title.isprintable() or "\\" in title or not title.encode("latin-1", "ignore").decode("latin-1") == title:
        raise ValueError("can't be drawn: pictures have Latin letters alone, and no backslash")
    return title


def _any_stands_alone(classes: tuple[str, ...]) -> tuple[str, ...]:
    if "any" in classes and len(classes) > 1:
        raise ValueError('is ambiguous: "any" takes every class, so it stands alone')
    return classes


def _no_any(classes: tuple[str, ...]) -> tuple[str, ...]:
    if "any" in classes:
        raise ValueError('names "any": say which class has to be found, too')
    return classes


# DICOM PS3.5 section 6.2, VR AE: leading and trailing spaces don't count, so they are stripped here
AETitle = Annotated[str, StringConstraints(strip_whitespace=True), AfterValidator(_legal_ae_title)]
Host = Annotated[str, StringConstraints(strip_whitespace=True), AfterValidator(_legal_host)]
Folder = Annotated[Path, BeforeValidator(_legal_path)]
Network = Annotated[str, StringConstraints(strip_whitespace=True), AfterValidator(_legal_network)]
Title = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=64), AfterValidator(_drawable)]
Triple = Annotated[tuple[str, ...], AfterValidator(_legal_triple)]
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1), AfterValidator(_legal_name)]


class Section(BaseModel):
    """What all have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Node(Section):
    ae_title: AETitle = Field(
        "SCANSIDE", description="What scanners call this node; one that calls it otherwise is answered too."
    )
    address: Host = Field(
        "127.0.0.1",
        description="Where to listen. The default is this machine only: whoever reaches the port can send images, so "
        'opening it is a decision. "0.0.0.0" listens on every network; then fill in allowed_calling_aes.',
    )
    port: int = Field(11112, ge=0, le=65535, description="DICOM port; 0 takes any free one.")
    folder: Folder = Field(
        Path("scanside-data"),
        description="Slices, results and the journal live here; relative to this file's folder.",
    )
    free_floor_gb: float = Field(
        2.0, ge=0, description="With less free disk, slices are refused (status A700), not lost."
    )
    allowed_calling_aes: tuple[AETitle, ...] = Field((), description="AE titles that may send. Empty: anyone.")
    tls: bool = Field(False, description="Take associations over TLS alone, by the files of [tls].")
    allowed_addresses: tuple[Network, ...] = Field(
        (), description='Networks that may connect, as "10.1.2.0/24" or one address. Empty: any.'
    )
    max_instance_mb: float = Field(
        1000.0, gt=0, description="Larger objects are refused (status A700) before they are here."
    )
    keep_days: float | None = Field(
        None,
        gt=0,
        description="Slices and results are removed so long after the last result of their study, and never before "
        "each destination has all of it. Default: nothing is removed.",
        examples=[30],
    )
    max_associations: int = Field(
        16, ge=1, description="Senders served at the same time; the next is told to come back."
    )
    max_associations_per_peer: int = Field(
        8,
        ge=1,
        description="Of these, for one address, whatever it calls itself: a scanner that has gone mad leaves places "
        "for the others. More, where a router stands between the scanners and this node.",
    )
    name: Name | None = Field(
        None, description="Which of several nodes with one journal this is. Default: its AE title.", examples=["ct-1"]
    )


class Model(Section):
    bundle: Folder | None = Field(
        None,
        description="Folder of the model bundle; relative to this file's folder. Default: the one scanside brings.",
        examples=["bundles/mine"],
    )
    backend: Literal["auto", "tensorrt", "onnxruntime", "onnxruntime-cuda", "triton"] = Field(
        "auto",
        description="auto: TensorRT where there is a GPU and a plan of `scanside build`, else ONNX Runtime on the "
        "processor; the log says which and why. triton: the servers of [triton]. Only auto becomes another unasked.",
    )
    precision: Literal["auto", "fp32", "fp16", "int8", "int8-cpu"] = Field(
        "auto",
        description="One that the bundle has and `scanside verify` has passed: int8-cpu is the processor's fastest, "
        "fp16 and int8 are TensorRT's. auto: TensorRT's fastest, and fp32 on the processor.",
    )
    plans: Folder | None = Field(
        None,
        description="Folder of TensorRT's plans; relative to this file's folder. Default: the user's cache.",
        examples=["plans"],
    )
    trusted_keys: tuple[Folder, ...] = Field(
        (),
        description="Public keys (Ed25519, PEM), relative to this file's folder: only bundles that one of them signed "
        "are served. Empty: any whole bundle.",
        examples=[["keys/hospital.pem"]],
    )
    threads: int = Field(0, ge=0, description="CPU threads for inference; 0: all cores.")
    max_batch: int | None = Field(
        None,
        ge=1,
        description="Most slices in one inference; default: what the engine makes good use of, on a processor one for "
        "each thread, up to 4.",
        examples=[4],
    )


class Series(Section):
    idle_timeout_s: float = Field(
        10.0, gt=0, description="A series that nothing else completes is closed after this long without a slice."
    )
    min_slices: int = Field(5, ge=1, description="Series with fewer slices are not analysed, and say so.")
    min_coverage_mm: float = Field(
        100.0, ge=0, description="A series that covers less of the head is waited for, then reported as provisional."
    )
    max_lossy_ratio: float = Field(
        1.0, ge=1, description="Images that were compressed lossily by more are not analysed, and say so. 1: none is."
    )

    bone_kernels: tuple[Annotated[str, AfterValidator(_legal_pattern)], ...] = Field(
        BONE_KERNELS,
        description="ConvolutionKernel of series for bone, as regular expressions. They are analysed last, and not at "
        "all where the study has the same slices for soft tissue.",
    )


class Tls(Section):
    """PEM files."""

    certificate: Folder = Field(description="The node's certificate, and what it takes to get to its authority's.")
    key: Folder = Field(description="Its private key, without a passphrase; readable by the node's user alone.")
    ca: Folder = Field(description="Certificates of the authorities whose peers are trusted.")


class Destination(Section):
    """A storage SCP that receives results."""

    name: Name = Field(description="Unique; the outbox and the log use it.")
    ae_title: AETitle = Field(description="Its AE title.")
    host: Host = Field(description="Its host name or IP address.")
    port: int = Field(ge=1, le=65535, description="Its DICOM port.")
    tls: bool = Field(False, description="Connect over TLS; its certificate has to be for its host.")
    results: tuple[Role, ...] = Field(
        get_args(Role),
        min_length=1,
        description="What it gets: notice (a page instead of results: why a head was not analysed), sr (measurements), "
        "sc (pictures), pdf (a report for people, if results.pdf is on), seg (masks). Always sent in this order.",
    )
    levels: tuple[Level, ...] = Field(
        get_args(Level),
        min_length=1,
        description="Of which decisions it gets results. In any case it gets notices, incomplete heads without a "
        "finding, and what corrects a result that it has got.",
    )
    confirm: Confirm = Field(
        "no",
        description="How to make sure that it keeps what it took. commitment: it is asked to commit itself (storage "
        "commitment), and may answer at this node's port; query: it is searched for each. no: its word is taken.",
    )

    def wants(self, level: str | None) -> bool:
        """Whether it gets results of a decision; None is a notice.

        What is incomplete goes to all, as a notice does: whoever got nothing would take it for a routine head.
        """
        return level in (None, "incomplete", *self.levels)


class Scanner(Section):
    """A scanner with a port of its own."""

    ae_title: AETitle = Field(description="Its AE title.")
    host: Host = Field(description="Its host name or IP address.")
    port: int = Field(ge=1, le=65535, description="The port where it takes storage commitment's reports.")
    tls: bool = Field(False, description="Connect over TLS; its certificate has to be for its host.")

    @property
    def name(self) -> str:
        return self.ae_title


class TriageRule(Section):
    """One row of the triage table; the first that holds decides."""

    level: Literal["critical", "urgent"] = Field(description="What the rule says.")
    classes: Annotated[tuple[Name, ...], AfterValidator(_any_stands_alone)] = Field(
        min_length=1, description='Classes of the model whose volumes are added, or ["any"] for all of them.'
    )
    volume_ml: float = Field(ge=0, description="The rule holds from this volume on.")
    also: Annotated[tuple[Name, ...], AfterValidator(_no_any)] = Field(
        (),
        description="Classes each of which has to be found, too, however little of it.",
        examples=[["intraventricular"]],
    )
    reason: str = Field(
        "",
        description="Words of yours for what the rule says, put before the numbers.",
        examples=["bleeding into the ventricles"],
    )


class Results(Section):
    segmentation: Literal["binary", "labelmap"] = Field(
        "binary",
        description="Kind of the SEG: binary is what every archive and viewer takes; labelmap (DICOM 2024d) holds all "
        "classes in one frame for each slice, under a SOP class of its own.",
    )
    pdf: bool = Field(
        False, description="Write the report as Encapsulated PDF, too: for archives whose viewers show no SR."
    )


class CodeRow(Section):
    """What one class is called in results."""

    name: Name = Field(description="A class of the model.")
    finding: Triple = Field(description="Code of the finding in SR: value, coding scheme, meaning.")
    site: Triple = Field(description="Code of where it lies, in SR and SEG: value, coding scheme, meaning.")
    title: Title | None = Field(
        None, description="Its name in legends. Default: the usual one.", examples=["Subdural haematoma"]
    )
    colour: Annotated[tuple[int, ...], AfterValidator(_legal_colour)] | None = Field(
        None, description="Red, green and blue, 0 to 255. Default: the usual one.", examples=[[80, 180, 255]]
    )


class Web(Section):
    address: Host = Field("127.0.0.1", description="Where /metrics, /healthz and /readyz answer: this machine only.")
    port: int | None = Field(None, ge=0, le=65535, description="Their port; without one they are off.", examples=[8080])


class Page(Section):
    """The triage page."""

    address: Host = Field(
        "127.0.0.1",
        description="Where the triage page listens: this machine only. Any other address needs `users`, and should "
        "have `tls`: the page shows patients.",
    )
    port: int | None = Field(None, ge=0, le=65535, description="Its port; without one it is off.", examples=[8443])
    tls: bool = Field(False, description="Serve https, with certificate and key of [tls]; browsers need not show one.")
    users: Folder | None = Field(
        None,
        description="Who may see it: a file of lines that `scanside page-password` writes, relative to this file's "
        "folder. Default: whoever reaches it.",
        examples=["page-users"],
    )
    open_to_all: bool = Field(
        False, description="Let it listen beyond this machine without users, such as behind a proxy that has a login."
    )
    hosts: tuple[Host, ...] = Field(
        (),
        description="Names by which browsers reach it, besides its address. On this machine requests under any other "
        "name are refused, so that no web page elsewhere can have a browser read it.",
        examples=[["ct-room-2.hospital"]],
    )
    hide_names: bool = Field(False, description="Show PatientID and accession number, and neither name nor birth date.")
    viewer: Annotated[str, AfterValidator(_legal_viewer)] | None = Field(
        None,
        description="Link to a viewer; {study_uid}, {series_uid}, {patient_id} and {accession_number} are filled in. "
        "Stone: https://orthanc.hospital/stone-webviewer/index.html?study={study_uid}",
        examples=["https://ohif.hospital/viewer?StudyInstanceUIDs={study_uid}"],
    )


class Audit(Section):
    """Where audit messages go."""

    file: Folder | None = Field(
        None,
        description="Gets every message, one a line, relative to this file's folder. It names patients by their "
        "PatientID: it is made for the node's user alone.",
        examples=["audit.log"],
    )
    host: Host | None = Field(
        None,
        description="A syslog server that gets every message, too. While it is down 2,000 are kept for it, in memory.",
        examples=["audit.hospital"],
    )
    transport: Literal["tls", "udp"] = Field(
        "tls", description="tls takes the files of [tls]; udp is neither private nor certain to arrive."
    )
    port: int | None = Field(
        None, ge=1, le=65535, description="Its port. Default: 6514 for tls, 514 for udp.", examples=[6514]
    )


class Log(Section):
    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least important event that is logged."
    )
    format: Literal["auto", "console", "json"] = Field("auto", description="auto: JSON when stderr is not a terminal.")
