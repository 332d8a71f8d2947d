"""A configuration that is read again: what a running node takes of it, and what waits for a restart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

from dicom_node.configuration.config import CHANNELS, Config, ConfigError
from dicom_node.configuration.mistakes import mistake
from dicom_node.results.codes import check_names
from runtime.bundle import open_bundle
from runtime.triage import check_rules

if TYPE_CHECKING:
    from collections.abc import Iterator

    from runtime.errors import ScansideError

# keys, or sections as a whole, that a running node can change; the others name it, its port, its files or its engine
AT_ONCE = frozenset(
    {
        "node.free_floor_gb",
        "node.allowed_calling_aes",
        "node.allowed_addresses",
        "node.max_instance_mb",
        "node.keep_days",
        "node.max_associations",
        "node.max_associations_per_peer",
        "series",
        "destinations",
        "scanners",
        "triage",
        "results",
        "codes",
        "hl7",
        "webhooks",
        "emails",
        "worklists",
        "log",
    }
)
_WHOLE = ("destinations", "scanners", "triage", "codes", "tls", "triton", *CHANNELS)  # sections that change as a whole


def merge(running: Config, wanted: Config) -> tuple[Config, list[str], list[str]]:
    """What a node that runs with one configuration goes on with when it is given another.

    Returns
    -------
    the configuration to go on with, the keys that change in it, and those that need a restart

    Raises
    ------
    ConfigError : what can change does not fit to what can't, such as a destination with TLS to a node without
    ScansideError : triage rules or codes for classes that the bundle does not know, or no bundle to ask

    """
    keys = list(_differences(running, wanted))
    changed = [key for key in keys if key in AT_ONCE or key.partition(".")[0] in AT_ONCE]
    table = running.model_dump()
    for key in changed:
        section, _, name = key.partition(".")
        if name:
            table[section][name] = getattr(getattr(wanted, section), name)
        else:
            table[section] = getattr(wanted, section)
    try:
        merged = Config.model_validate(table)
    except ValidationError as error:
        found = [str(mistake(details, Config)) for details in error.errors()]
        raise ConfigError("\n".join(["what can change now does not fit to what needs a restart", *found])) from None
    if {"triage", "codes"} & {*changed}:
        classes = open_bundle(merged.model.bundle, merged.model.trusted_keys).classes
        check_rules(merged.triage, classes)
        check_names((row.name for row in merged.codes), classes)
    return merged, changed, [key for key in keys if key not in changed]


def mistakes(error: ScansideError) -> list[str]:
    """What is wrong, one by one, without the line that counts it."""
    lines = str(error).splitlines()
    return lines[1:] or lines


def _differences(one: Config, other: Config) -> Iterator[str]:
    for section, value in one:
        if section in _WHOLE:
            if value != getattr(other, section):
                yield section
            continue
        yield from (f"{section}.{name}" for name, mine in value if mine != getattr(getattr(other, section), name))
