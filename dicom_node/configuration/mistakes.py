"""What is wrong in a configuration, in the words of its file: ``destinations[1].port: 70000 is above 65535``."""

from __future__ import annotations

import difflib
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from pydantic_core import InitErrorDetails, PydanticCustomError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import BaseModel

_COMPLAINTS = {
    "missing": "is missing",
    "greater_than": "{value} is not above {gt:g}",
    "greater_than_equal": "{value} is below {ge:g}",
    "less_than_equal": "{value} is above {le:g}",
    "int_type": "{value} is not a whole number",
    "int_parsing": "{value} is not a whole number",
    "int_from_float": "{value} is not a whole number",
    "float_type": "{value} is not a number",
    "float_parsing": "{value} is not a number",
    "finite_number": "{value} is not a finite number",
    "string_type": "{value} is not a text; put it in quotes",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "tuple_type": "{value} is not a list",
    "path_type": "{value} is not a path; put it in quotes",
    "literal_error": "{value} is none of {expected}",
    "model_type": "{value} is not a table",
    "value_error": "{value} {error}",
    "clash": "{value} {complaint}",
    "secret": "{complaint}",
}


FOR_TESTS = {"SCANSIDE_NVONNXPARSER"}  # names in the environment that are no configuration


@dataclass(frozen=True, slots=True)
class Mistake:
    """One thing that is wrong: where, such as ``"node.port"`` or the name of a variable, and what."""

    key: str
    complaint: str

    def __str__(self) -> str:
        return f"{self.key}: {self.complaint}"

    def concerns(self, key: str) -> bool:
        """Whether `key` can't be taken as it is: it, a part of it or the section that it stands in is wrong."""
        return any(
            longer == shorter or longer.startswith((f"{shorter}.", f"{shorter}["))
            for longer, shorter in ((self.key, key), (key, self.key))
        )


def clash(location: tuple[str | int, ...], value: Any, complaint: str) -> InitErrorDetails:
    """An error that no single field can know."""
    return InitErrorDetails(
        type=PydanticCustomError("clash", "{complaint}", {"complaint": complaint}), loc=location, input=value
    )


def raised_again(details: Any) -> InitErrorDetails:
    """An error of pydantic's in the form in which it can be raised beside ours."""
    same = PydanticCustomError(details["type"], details["msg"], details.get("ctx"))
    return InitErrorDetails(type=same, loc=details["loc"], input=details["input"])


def mistake(details: Any, root: type[BaseModel]) -> Mistake:
    """One of pydantic's errors about `root`."""
    location = details["loc"]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    if details["type"] == "extra_forbidden":
        complaint = f"unknown key{suggestion(str(location[-1]), _keys_beside(location, root))}"
    elif details["type"] == "tuple_type" and location == (key,) and isinstance(details["input"], dict):
        complaint = f"is one table, and there may be several: write [[{key}]], with double brackets, above each"
    else:
        template = _COMPLAINTS.get(details["type"], "{value}: {message}")
        value = json.dumps(details["input"], default=str)
        complaint = template.format(value=value, message=details["msg"], **details.get("ctx", {}))
    return Mistake(key, complaint)


def unknown_variables(prefix: str, root: type[BaseModel]) -> Iterator[Mistake]:
    """Misspelt sections in the environment; pydantic-settings passes over what it doesn't know."""
    known = list(root.model_fields)
    for variable in sorted(os.environ):
        section, separator, _ = variable.removeprefix(prefix).lower().partition("__")
        if not variable.startswith(prefix) or section in known or variable in FOR_TESTS:
            continue
        first, _, key = section.partition("_")
        if not separator and first in known:
            yield Mistake(variable, f"unknown; did you mean {prefix}{first.upper()}__{key.upper()}?")
        else:
            yield Mistake(variable, f"unknown section{suggestion(section, known)}")


def suggestion(word: str, known: list[str]) -> str:
    """What may have been meant by a word that is not known."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"


def _keys_beside(location: tuple[str | int, ...], root: type[BaseModel]) -> list[str]:
    section: Any = root
    for part in location[:-1]:
        if isinstance(part, str):
            annotation = section.model_fields[part].annotation
            section = next((inner for inner in get_args(annotation) if inner is not Ellipsis), annotation)
    return list(section.model_fields)
