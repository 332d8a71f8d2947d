"""Findings to a decision: the first rule that holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.errors import ScansideError
from runtime.millilitres import said
from runtime.types import Decision

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from runtime.types import Finding


LEVELS = ("urgent", "critical")  # that alert, the most urgent last


@dataclass(frozen=True, slots=True)
class Rule:
    """`level` when the named classes together reach `volume_ml`, and others are found beside them.

    Attributes
    ----------
    level : ``"critical"`` or ``"urgent"``
    classes : class names whose volumes are added; ``("any",)`` takes all
    volume_ml : from this volume on
    also : classes each of which has to be a finding, too
    reason : words of the site, put before the numbers

    """

    level: str
    classes: tuple[str, ...]
    volume_ml: float
    also: tuple[str, ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        beside = f" beside {' and '.join(self.also)}" if self.also else ""
        return f"{'/'.join(self.classes)} from {self.volume_ml:g} ml{beside}"

    def counted(self, volumes_ml: Mapping[str, float]) -> tuple[str, ...]:
        """Names of the findings that make it hold, of those given by name; none where it does not hold."""
        mine = tuple(name for name in volumes_ml if name in self.classes or self.classes == ("any",))
        enough = sum(volumes_ml[name] for name in mine) >= self.volume_ml
        return mine if enough and all(name in volumes_ml for name in self.also) else ()


class RuleError(ScansideError):
    """A triage rule that can never hold."""


def check_rules(rules: Sequence[Rule], classes: Sequence[str]) -> None:
    """Refuse rules about classes that the model does not have: a typo would be a rule that never holds.

    Raises
    ------
    RuleError

    """
    named = {name for rule in rules for name in rule.classes} - {"any"}
    unknown = sorted((named | {name for rule in rules for name in rule.also}) - {*classes[1:]})
    if unknown:
        raise RuleError(
            f"triage rules name {', '.join(unknown)}; the model has {', '.join(classes[1:])}: write [[triage]] rules "
            "for its classes (without any, the usual ones hold: see `scanside config --example`)"
        )


def level_of(volumes_ml: Mapping[str, float], rules: Sequence[Rule]) -> str | None:
    """Level of the first rule that holds for the volumes of findings by name; None where none does."""
    return next((rule.level for rule in rules if rule.counted(volumes_ml)), None)


def is_higher(level: str | None, other: str | None) -> bool:
    """Whether a level is more urgent than another; None and whatever is no alert is the least."""
    return _urgency(level) > _urgency(other)


def _urgency(level: str | None) -> int:
    return LEVELS.index(level) if level in LEVELS else -1


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
    volumes_ml = {f.name: f.volume_ml for f in findings}
    for rule in rules:
        counted = rule.counted(volumes_ml)
        if counted:
            words = f"{rule.reason}: " if rule.reason else ""
            total_ml = sum(volumes_ml[name] for name in counted)
            return Decision(rule.level, f"{words}{' + '.join(counted)} {said(total_ml)}, rule: {rule}")
    if findings:
        found = ", ".join(f"{name} {said(ml)}" for name, ml in volumes_ml.items())
        return Decision(calm, f"findings below every rule: {found}")
    if below_threshold:
        seen = ", ".join(f"{name} {said(ml)}" for name, ml in below_threshold)
        return Decision(calm, f"nothing above the reporting threshold; below it: {seen}")
    return Decision(calm, "no haemorrhage found" if complete else "no haemorrhage found in the slices that are there")
