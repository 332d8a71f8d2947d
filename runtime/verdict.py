"""Two answers to the same heads: how far a precision is from FP32, in what a clinic would notice, and whether it may.

Mean Dice hides what harms. So a budget counts lesions lost and invented, millilitres and decisions too.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import cc3d
import numpy as np

from runtime.triage import decide

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from runtime.triage import Rule
    from runtime.types import Report, SliceLabels, SliceStack

SMALL_ML = 2.0
LEAST_ML = 1.0  # of a class in all series together, below which nothing is known of it
EDGE_ML = 0.05  # so near to a rule's volume, two precisions may fall on either side of it
SPECK_ML = 0.1  # connected parts below are noise in every precision


@dataclass(frozen=True, slots=True)
class Budget:
    """How far from FP32 a precision may be and still serve.

    Attributes
    ----------
    dice : least Dice of any class, over all series, of those classes that FP32 shows 1 ml of
    volume_percent, volume_ml : a class's volume in a series may change by the larger of the two
    findings : series whose report may name other findings
    small_lesions : connected parts of 0.1 to 2 ml that may be lost or invented, in all series together: the other
        precision shows the class in less than half of them
    decisions : triage decisions that may differ, where FP32's own is not on the edge of a rule (0.05 ml)
    logit_mean : mean difference of the classes' margins (logit less the background's), over pixels, classes and views

    """

    dice: float = 0.98
    volume_percent: float = 5.0
    volume_ml: float = 0.5
    findings: int = 0
    small_lesions: int = 0
    decisions: int = 0
    logit_mean: float = 0.4


@dataclass(frozen=True, slots=True)
class Difference:
    """One series in two precisions.

    Attributes
    ----------
    series : its name
    agreed, shown : ``(C,)`` pixels of each class in both, and in the one plus in the other: Dice is 2 * agreed / shown
    reference_ml, volume_ml : ``(C,)`` of each class, FP32's first
    lost, invented : connected parts of 0.1 to 2 ml of one class, of which the other precision shows less than half
    decisions : level of triage, FP32's first
    near : levels that FP32's volumes would give if all were 0.05 ml more, or less
    found : names of the findings over the operating point, FP32's first

    """

    series: str
    agreed: NDArray[np.int64]
    shown: NDArray[np.int64]
    reference_ml: NDArray[np.float64]
    volume_ml: NDArray[np.float64]
    lost: int
    invented: int
    decisions: tuple[str, str]
    near: frozenset[str]
    found: tuple[tuple[str, ...], tuple[str, ...]]


def compare(
    name: str,
    stack: SliceStack,
    reference: tuple[Mapping[str, SliceLabels], Report],
    other: tuple[Mapping[str, SliceLabels], Report],
    classes: int,
    rules: Sequence[Rule],
) -> Difference:
    """What differs between two precisions' labels and reports of one series."""
    shifted = (
        [replace(one, volume_ml=max(0.0, one.volume_ml + shift)) for one in reference[1].findings]
        for shift in (-EDGE_ML, EDGE_ML)
    )
    first, second = (np.stack([labels[key].labels for key in stack.keys]) for labels, _ in (reference, other))
    one, two = (np.stack([labels[key].voxels for key in stack.keys]) for labels, _ in (reference, other))
    same = first[first == second]
    return Difference(
        series=name,
        agreed=np.bincount(same.ravel(), minlength=classes),
        shown=one.sum(0) + two.sum(0),
        reference_ml=stack.voxel_ml @ one,
        volume_ml=stack.voxel_ml @ two,
        lost=_unmatched(stack, first, second, classes),
        invented=_unmatched(stack, second, first, classes),
        decisions=(reference[1].decision.level, other[1].decision.level),
        near=frozenset(decide(findings, rules).level for findings in shifted),
        found=tuple(tuple(f.name for f in report.findings) for _, report in (reference, other)),  # type: ignore[arg-type]
    )


def _unmatched(stack: SliceStack, labels: NDArray[np.uint8], others: NDArray[np.uint8], classes: int) -> int:
    """Small connected parts of `labels` in less than half of which `others` shows the class."""
    count = 0
    for c in range(1, classes):
        if not (labels == c).any():
            continue
        parts = cc3d.connected_components(labels == c, connectivity=26)
        sizes, met = np.zeros(int(parts.max()) + 1), np.zeros(int(parts.max()) + 1)
        for voxel_ml, part, other in zip(stack.voxel_ml, parts, others, strict=True):
            sizes += np.bincount(part.ravel(), minlength=len(sizes)) * voxel_ml
            met += np.bincount(part[other == c], minlength=len(sizes)) * voxel_ml
        small = (sizes >= SPECK_ML) & (sizes < SMALL_ML) & (met < sizes / 2)
        count += int(small[1:].sum())
    return count


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a precision may serve, with every figure that decided.

    Attributes
    ----------
    passed : nothing is in `reasons`
    reasons : one sentence for each limit that is broken
    figures : what was measured, with units in the keys
    is_decided : False where nothing is against it but that too little was shown to tell

    """

    passed: bool
    reasons: tuple[str, ...]
    figures: Mapping[str, object]
    is_decided: bool = True


def judge(
    differences: Sequence[Difference], budget: Budget, classes: Sequence[str], logits: tuple[float, float] | None
) -> Verdict:
    """Hold what differs against the budget.

    Parameters
    ----------
    logits : (mean, largest) difference; None where an engine does not show them

    """
    reasons: list[str] = []
    agreed, shown = (np.sum([getattr(one, key) for one in differences], axis=0) for key in ("agreed", "shown"))
    reference_ml = np.sum([one.reference_ml for one in differences], axis=0)
    dice = {classes[c]: float(2 * agreed[c] / shown[c]) for c in range(1, len(classes)) if reference_ml[c] >= LEAST_ML}
    reasons += [
        f"{name}: Dice {d:.4f} against FP32, at least {budget.dice:g}" for name, d in dice.items() if d < budget.dice
    ]
    unseen = [classes[c] for c in range(1, len(classes)) if reference_ml[c] < LEAST_ML]
    if unseen:
        reasons.append(f"FP32 shows less than {LEAST_ML:g} ml of {', '.join(unseen)}: these series prove nothing of it")
    changes = [
        (abs(two - one), one, two, difference.series, classes[c])
        for difference in differences
        for c, (one, two) in enumerate(zip(difference.reference_ml, difference.volume_ml, strict=True))
        if c
    ]
    over = [x for x in changes if x[0] > max(budget.volume_ml, budget.volume_percent / 100 * x[1])]
    reasons += [f"{series}: {name} {one:.2f} -> {two:.2f} ml" for _, one, two, series, name in over]
    lost, invented = (sum(getattr(one, key) for one in differences) for key in ("lost", "invented"))
    if lost + invented > budget.small_lesions:
        reasons.append(f"{lost} small lesions lost and {invented} invented, at most {budget.small_lesions}")
    renamed = [one for one in differences if set(one.found[0]) != set(one.found[1])]
    if len(renamed) > budget.findings:
        reasons += [
            f"{one.series}: findings {', '.join(one.found[0]) or 'none'} -> {', '.join(one.found[1]) or 'none'}"
            for one in renamed
        ]
    differing = [one for one in differences if one.decisions[0] != one.decisions[1]]
    flipped = [one for one in differing if one.decisions[1] not in one.near]
    if len(flipped) > budget.decisions:
        reasons += [f"{one.series}: triage {one.decisions[0]} -> {one.decisions[1]}" for one in flipped]
    if logits and not logits[0] <= budget.logit_mean:
        reasons.append(f"logits differ by {logits[0]:.3f} in the mean, at most {budget.logit_mean:g}")
    worst = max(changes, default=None)
    figures = {
        "series": len(differences),
        "dice": {name: round(d, 5) for name, d in dice.items()},
        "worst_volume_change": {
            "ml": round(worst[0], 3), "reference_ml": round(worst[1], 3), "series": worst[3], "class": worst[4],
        } if worst else None,
        "volume_change_percent": {
            classes[c]: round(float(100 * (np.sum([d.volume_ml[c] for d in differences]) / reference_ml[c] - 1)), 3)
            for c in range(1, len(classes))
            if reference_ml[c] >= LEAST_ML
        },
        "small_lesions_lost": lost,
        "small_lesions_invented": invented,
        "decisions_flipped": len(flipped),
        "decisions_differing_on_the_edge_of_a_rule": len(differing) - len(flipped),
        "findings_changed": len(renamed),
        "logit_mean_difference": None if logits is None else round(logits[0], 5),
        "logit_largest_difference": None if logits is None else round(logits[1], 4),
        "budget": {field.name: getattr(budget, field.name) for field in fields(budget)},
    }  # fmt: skip
    return Verdict(not reasons, tuple(reasons), figures, is_decided=not unseen or len(reasons) > 1)
