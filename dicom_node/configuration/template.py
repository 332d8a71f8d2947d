"""Texts of the configuration that are filled in with values."""

from __future__ import annotations

from string import Formatter


def check_template(template: str, names: tuple[str, ...]) -> None:
    """Refuse with a ValueError what could not be filled in with a value of each of these names, whatever it is."""
    try:
        fields = [(name, spec, convert) for _, name, spec, convert in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"is no template: {error}") from error
    if unknown := ", ".join(sorted({name for name, *_ in fields} - {*names})):
        raise ValueError(f"has placeholders that nothing fills ({unknown}): there are {', '.join(names)}")
    if any(spec or convert for _, spec, convert in fields):
        raise ValueError("has a placeholder with more in its braces than its name")
