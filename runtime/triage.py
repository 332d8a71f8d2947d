"""Findings to a decision: the first rule that holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.errors import ScansideError
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


class RuleError(ScansideError):
    """A triage rule that can never hold."""


def check_rules(rules: Sequence[Rule], classes: Sequence[str]) -> None:
    """Refuse rules about classes that the model does not have: a typo would be a rule that never holds.

    Raises
    ------
    RuleError

    """
    unknown = sorted({name for rule in rules for name in rule.classes} - {"any", *classes[1:]})
    if unknown:
        raise RuleError(
            f"triage rules name {', '.join(unknown)}; the model has {', '.join(classes[1:])}: write [[triage]] rules "
            "for its classes (without any, the usual ones hold: see `scanside config --example`)"
        )


def decide(
    findings: Sequence[Finding],
    rules: Sequence[Rule],
    below_threshold: Sequence[tuple[str, float]] = (),
    *,
    complete: bool = True,
) -> Decision:
    """The decision of the first rule that holds; ``"routine"`` when none does, or nothing was found.

    Parameters
    ----------
    below_threshold : (name, ml) of what is too little for a finding, so that the reason does not hide it
    complete : without it, the level is ``"incomplete"`` where it would be ``"routine"``: the rest of the head may bleed

    """
    calm = "routine" if complete else "incomplete"
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
            calm, "findings below every rule: " + ", ".join(f"{f.name} {f.volume_ml:.1f} ml" for f in findings)
        )
    if below_threshold:
        seen = ", ".join(f"{name} {ml:.2f} ml" for name, ml in below_threshold)
        return Decision(calm, f"nothing above the reporting threshold; below it: {seen}")
    return Decision(calm, "no haemorrhage found" if complete else "no haemorrhage found in the slices that are there")
