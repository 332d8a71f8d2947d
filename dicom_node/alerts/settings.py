"""The sections of a configuration that say who is told of alerts; their descriptions are its manual."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from pydantic import AfterValidator, Field, StringConstraints

from dicom_node.alerts.alert import OCCASIONS, Level, Occasion
from dicom_node.alerts.quiet import QuietHours
from dicom_node.configuration.sections import AETitle, Folder, Host, Name, Section
from dicom_node.configuration.template import check_template

if TYPE_CHECKING:
    from collections.abc import Collection

LINK_NAMES = ("alert", "study_uid", "series_uid")


def _legal_hours(text: str) -> str:
    QuietHours.parse(text)
    return text


def _legal_url(url: str) -> str:
    if not re.fullmatch(r"https?://[^\s/?#@]+(:\d+)?([/?][^\s#]*)?", url):
        raise ValueError("is no address such as https://hooks.hospital/alerts, without a name and a password in it")
    return url


def _legal_link(template: str) -> str:
    check_template(template, LINK_NAMES)
    _legal_url(template.partition("#")[0])
    return template


def _legal_address(address: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]+@[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?", address):
        raise ValueError("is not an e-mail address")
    return address


# HL7 v2.5.1 data type IS within HD: printable, none of the delimiters
Hl7Name = Annotated[str, StringConstraints(strip_whitespace=True, max_length=180, pattern=r"^[^|^~\\&\x00-\x1f\x7f]*$")]
Link = Annotated[str, AfterValidator(_legal_link)]
Address = Annotated[str, StringConstraints(strip_whitespace=True), AfterValidator(_legal_address)]


class Told(Section):
    """What all who are told of alerts have in common."""

    name: Name = Field(description="Unique among all who are told; `scanside alerts list`, metrics and log use it.")
    levels: tuple[Level, ...] = Field(
        get_args(Level),
        min_length=1,
        description="Of which alerts it is told. Of what corrects something that it was told it hears in any case.",
    )
    after_s: float = Field(
        0.0, ge=0, le=86400, description="Escalation: it is told only if nobody has acknowledged the alert for so long."
    )
    quiet_hours: Annotated[str, AfterValidator(_legal_hours)] | None = Field(
        None,
        description="Local time, also over midnight. What is urgent waits for their end; critical is never silenced.",
        examples=["22:00-06:30"],
    )

    @property
    def occasions(self) -> Collection[Occasion]:
        """What it can be told at all."""
        return OCCASIONS

    def quiet_until(self, now: float) -> float | None:
        """End of the quiet hours that it is in, None outside them."""
        return QuietHours.parse(self.quiet_hours).until(now) if self.quiet_hours else None


class Hl7(Told):
    """A listener for HL7 v2 messages."""

    host: Host = Field(description="Its host name or IP address.")
    port: int = Field(ge=1, le=65535, description="Its MLLP port.")
    tls: bool = Field(False, description="Connect over TLS, with the files of [tls]; its certificate has to be for it.")
    sending_application: Hl7Name = Field("SCANSIDE", min_length=1, description="MSH-3.")
    sending_facility: Hl7Name = Field("", description="MSH-4.")
    receiving_application: Hl7Name = Field("", description="MSH-5.")
    receiving_facility: Hl7Name = Field("", description="MSH-6.")
    assigning_authority: Hl7Name = Field(
        "", description="Who issues the patients' numbers, PID-3.4, where the images do not say (IssuerOfPatientID)."
    )
    processing_id: Literal["P", "T", "D"] = Field("P", description="MSH-11: production, training or debugging.")


class Webhook(Told):
    """An address that gets a POST request, signed as Standard Webhooks has it."""

    url: Annotated[str, AfterValidator(_legal_url)] = Field(description="Where to post. Redirects are not followed.")
    secret: Folder = Field(
        description="File with the secret that the receiver shares, relative to this file's folder: whsec_ and 24 to "
        "64 bytes in Base64. Several, a line each, while one takes another's place.",
    )
    ca: Folder | None = Field(
        None,
        description="Authorities that its certificate may be from, relative to this file's folder. Default: the "
        "system's.",
        examples=["ca.pem"],
    )
    identify: bool = Field(False, description="Say whose head it is. Otherwise UIDs alone.")
    link: Link | None = Field(
        None,
        description="Where to look: {alert}, {study_uid} and {series_uid} are filled in.",
        examples=["https://ct-room-2.hospital:8443/"],
    )


class Email(Told):
    """People who get e-mail."""

    host: Host = Field(description="The mail server's host name or IP address.")
    port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="Its port. Default: 587 for starttls, 465 for tls, 25 for none.",
        examples=[587],
    )
    security: Literal["starttls", "tls", "none"] = Field(
        "starttls", description="none: the text, and the login if there is one, can be read on the way."
    )
    ca: Folder | None = Field(
        None,
        description="Authorities that its certificate may be from, relative to this file's folder. Default: the "
        "system's.",
        examples=["ca.pem"],
    )
    user: str | None = Field(None, min_length=1, description="Login, if it wants one.", examples=["scanside"])
    password: Folder | None = Field(
        None, description="File with the login's password, relative to this file's folder.", examples=["mail-password"]
    )
    sender: Address = Field(description="From.")
    recipients: tuple[Address, ...] = Field(min_length=1, description="To.")
    identify: bool = Field(
        False, description="Say whose head it is: only where mail stays within the hospital, and on its devices."
    )
    link: Link | None = Field(
        None,
        description="Where to look: {alert}, {study_uid} and {series_uid} are filled in.",
        examples=["https://ct-room-2.hospital:8443/"],
    )

    @property
    def its_port(self) -> int:
        """The one that is set, or what is usual."""
        return self.port or {"starttls": 587, "tls": 465, "none": 25}[self.security]


class Worklist(Told):
    """A manager of unified procedure steps (DICOM UPS), which people or workstations take their work from."""

    ae_title: AETitle = Field(description="Its AE title.")
    host: Host = Field(description="Its host name or IP address.")
    port: int = Field(ge=1, le=65535, description="Its DICOM port.")
    tls: bool = Field(False, description="Connect over TLS, with the files of [tls]; its certificate has to be for it.")
    retrieve_ae_title: AETitle = Field(description="AE title of the archive that the images can be had from.")
    label: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=64)] = Field(
        "scanside", pattern=r"^[^\\\x00-\x1f\x7f]*$", description="Label of the worklist that its steps belong to."
    )

    @property
    def occasions(self) -> Collection[Occasion]:
        """A step that has been made is as it is: it is cancelled, or another takes its place."""
        return frozenset({"raised", "escalated", "changed", "withdrawn"})


Settings = Hl7 | Webhook | Email | Worklist
