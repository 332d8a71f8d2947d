"""Findings to a decision: the first rule that holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.types import Decision

if TYPE_CHECKING:
    from collections.abc import Sequence

    from runtime.types import Finding


@dataclass(frozen=True, slots=True)
class Rule:
    """`level` when the named classes together reach `volume_ml`.

    Attributes
    ----------
    level : ``"critical"`` or ``"urgent"``
    classes : class names whose volumes are added; ``("any",)`` takes all
    volume_ml : from this volume on

    """

    level: str
    classes: tuple[str, ...]
    volume_ml: float


def decide(findings: Sequence[Finding], rules: Sequence[Rule]) -> Decision:
    """The decision of the first rule that holds; ``"routine"`` when none does, or nothing was found."""
    for rule in rules:
        counted = [f for f in findings if f.name in rule.classes or rule.classes == ("any",)]
        volume_ml = sum(f.volume_ml for f in counted)
        if counted and volume_ml >= rule.volume_ml:
            what = " + ".join(f.name for f in counted)
            return Decision(
                rule.level, f"{what} {volume_ml:.1f} ml, rule: {'/'.join(rule.classes)} from {rule.volume_ml:g} ml"
            )
    if findings:
        return Decision(
            "routine", "findings below every rule: " + ", ".join(f"{f.name} {f.volume_ml:.1f} ml" for f in findings)
        )
    return Decision("routine", "no haemorrhage found")
