"""The section of a configuration that says where the journal is."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import parse_qs, urlsplit

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from dicom_node.configuration.sections import Folder, Section


def _legal_url(url: str) -> str:
    """Refuse a password: the configuration is shown, logged and passed on. Nothing of it is quoted in the complaint."""
    try:
        parts = urlsplit(url)
        keys = " ".join(parse_qs(parts.query, keep_blank_values=True))
    except ValueError as error:
        raise ValueError(f"is no URL: {error}") from error
    # of libpq's options sslpassword is one, too, and oauth_client_secret
    if parts.password is not None or "password" in keys or "secret" in keys:
        complaint = "has a password in it: put that into a file and name it in journal.password"
        raise PydanticCustomError("secret", "{complaint}", {"complaint": complaint})
    if parts.scheme not in ("postgresql", "postgres"):
        raise ValueError("is no database's URL: begin with postgresql://")
    return url


class JournalSettings(Section):
    """A file, or a database that several nodes share."""

    database: Annotated[str, AfterValidator(_legal_url)] | None = Field(
        None,
        description="PostgreSQL database of several nodes with one worklist, as libpq writes it, without a password. "
        "Default: an SQLite file in node.folder, for one node.",
        examples=["postgresql://scanside@db.hospital/scanside"],
    )
    password: Folder | None = Field(
        None,
        description="File with its password, relative to this file's folder. Default: libpq's own ways, PGPASSFILE and "
        "~/.pgpass among them.",
        examples=["database-password"],
    )
    shared_storage: bool = Field(
        False,
        description="node.folder lies on storage that all nodes of the database have under the same path, each with a "
        "folder of its own: any of them may send what lies there, and what a dead one has left open is finished by "
        "another.",
    )
