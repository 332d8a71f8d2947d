"""A configuration as TOML: as it stands, or as a manual with every key, its meaning and its default."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from dicom_node.configuration.config import Config
from dicom_node.configuration.sections import Destination

if TYPE_CHECKING:
    from collections.abc import Iterator


def example() -> str:
    """A configuration with every key, its meaning and its default, as TOML that `load` reads."""
    pacs = Destination(name="pacs", ae_title="PACS", host="127.0.0.1", port=4242)
    usage = (
        "# What `scanside serve --config` reads. Keys may be left out: the values here are the defaults.",
        "# SCANSIDE_NODE__PORT=4242 in the environment overrides port of [node], and so on.",
    )
    return "\n".join([*usage, *_lines(Config(destinations=(pacs,)), commented=True), ""])


def show(config: Config) -> str:
    """The configuration as it stands, as TOML that `load` reads again."""
    return "\n".join([*_lines(config, commented=False), ""]).lstrip("\n")


def _lines(config: Config, *, commented: bool) -> Iterator[str]:
    shown = {name: field.examples or [] for name, field in Config.model_fields.items() if commented}
    for name, value in config:
        if value == () and not shown.get(name):
            yield f"{name} = []"  # above all tables: below one, it would be a key of it
    for name, value in config:
        if value in ((), None) and not shown.get(name):
            continue
        yield ""
        if commented:
            yield from _comment(Config.model_fields[name].description)
        if isinstance(value, BaseModel):
            yield f"[{name}]"
            yield from _keys(value, commented=commented)
        for index, item in enumerate(value if isinstance(value, tuple) else ()):
            yield from [""] * bool(index)
            yield f"[[{name}]]"
            yield from _keys(item, commented=commented and index == 0)
        if value in ((), None):
            header = f"[{name}]" if value is None else f"[[{name}]]"
            lines = [header, *_keys(shown[name][0], commented=True)]
            yield from (line if line.startswith("#") else f"# {line}" for line in lines)


def _keys(section: BaseModel, *, commented: bool) -> Iterator[str]:
    for name, value in section:
        field = type(section).model_fields[name]
        if commented:
            yield from _comment(field.description)
        if value is not None:
            yield f"{name} = {_toml(value)}"
        elif commented:
            yield f"# {name} = {_toml((field.examples or [''])[0])}"


def _comment(description: str | None) -> Iterator[str]:
    yield from textwrap.wrap(description or "", width=110, initial_indent="# ", subsequent_indent="# ")


def _toml(value: Any) -> str:
    """A scalar or a list of them: what JSON and TOML write the same way."""
    return json.dumps(value, default=str, ensure_ascii=False)
