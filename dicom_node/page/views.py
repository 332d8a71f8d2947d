"""The page's templates, and how numbers, times and names are written in them."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import HTMLResponse

from runtime import millilitres
from runtime.types import OperatingPoint, in_words

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from starlette.requests import Request
    from starlette.responses import Response

    from dicom_node.configuration.sections import Page
    from dicom_node.page.palette import Palette

TEMPLATES = Path(__file__).parent / "templates"


class Views:
    """Templates, filled in.

    Parameters
    ----------
    page : the section of the configuration
    warnings : of unsafe settings, on every page
    where : which node it is
    palette : titles and colours of the classes

    """

    def __init__(self, page: Page, warnings: Sequence[str], where: str, palette: Palette) -> None:
        self._environment = environment(palette)
        self._environment.globals |= {"hide_names": page.hide_names, "warnings": warnings, "where": where}
        self._environment.globals |= {"has_login": page.users is not None}

    def page(self, template: str, request: Request, *, status: int = 200, **values: Any) -> Response:
        """A whole page."""
        values |= {"path": request.url.path, "now": time.time(), "query": request.url.query}
        return HTMLResponse(self._environment.get_template(template).render(**values), status)

    def fragment(self, template: str, **values: Any) -> Markup:
        """A part of one, the same for the same values: it holds no time of its own."""
        return Markup(self._environment.get_template(template).render(**values))  # noqa: S704 (escaped by the template)


def environment(palette: Palette) -> Environment:
    """What all templates share."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"clock": clock, "day": day, "ml": millilitres.said, "span": span, "who": who}
    made.filters |= {"title": palette.title, "colour": palette.hexadecimal, "iso": iso, "birth": birth}
    made.filters["point"] = lambda points: in_words(
        {name: OperatingPoint(**point) for name, point in points.items()}, palette.title
    )
    return made


def clock(at: float) -> str:
    """Time of day, to the second, where the node stands."""
    return datetime.fromtimestamp(at).astimezone().strftime("%H:%M:%S")


def day(at: float) -> str:
    """Date and time of day."""
    return datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def iso(at: float) -> str:
    """For machines."""
    return datetime.fromtimestamp(at).astimezone().isoformat(timespec="seconds")


def birth(date: str) -> str:
    """A DICOM date (PS3.5 section 6.2, DA) as people write it; anything else as it is."""
    return f"* {date[:4]}-{date[4:6]}-{date[6:]}" if len(date) == 8 and date.isdecimal() else date


def span(seconds: float) -> str:
    """How long something took."""
    if seconds < 0.95:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 48:
        return f"{hours / 24:.0f} days"
    return f"{minutes:.0f} min" if minutes < 100 else f"{hours:.0f} h"


def who(patient: Mapping[str, str], *, hide_names: bool) -> str:
    """A patient in a few words: ``"Doe, John"``, or the PatientID where names are hidden."""
    if hide_names:
        return f"ID {patient['PatientID']}" if patient.get("PatientID") else "name hidden, no PatientID"
    alphabetic, *others = patient.get("PatientName", "").split("=")
    written = [", ".join(part for part in one.split("^")[:2] if part) for one in (alphabetic, *others[:1])]
    name = " ".join(part for part in written if part)
    return name or (f"ID {patient['PatientID']}" if patient.get("PatientID") else "no name, no PatientID")
