"""What classes are called and coloured where people look: as the configuration says, else as the table does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dicom_node.results import codes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

    from dicom_node.configuration.sections import CodeRow
    from dicom_node.results.codes import Colour


@dataclass(frozen=True, slots=True)
class Palette:
    """Titles and colours by the name of a class."""

    own: Mapping[str, codes.OwnCode] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Sequence[CodeRow]) -> Self:
        """As ``[[codes]]`` has them."""
        return cls(codes.own(row.model_dump() for row in rows))

    def title(self, name: str) -> str:
        return codes.look_up(name, own=self.own).title.removesuffix(" haemorrhage")

    def colour(self, name: str) -> Colour:
        return codes.look_up(name, own=self.own).colour

    def hexadecimal(self, name: str) -> str:
        """The colour as CSS and SVG write it."""
        return "#{:02x}{:02x}{:02x}".format(*self.colour(name))
