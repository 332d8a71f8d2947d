"""One series' labels to its report: findings over the operating point, the decision, and what is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.triage import Rule, decide
from runtime.types import ModelIdentity, Report, SliceLabels, SliceStack
from runtime.volume import in_a_row, measure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from runtime.bundle import Bundle

ARRIVING = "the series is still arriving"


def compose(
    stack: SliceStack,
    slices: Mapping[str, SliceLabels],
    bundle: Bundle,
    model: ModelIdentity,
    rules: Sequence[Rule],
    *,
    missing: Sequence[str] = (),
    left_out: Sequence[str] = (),
    arriving: bool = False,
) -> Report:
    """Measure, threshold, decide.

    Parameters
    ----------
    stack, slices : geometry, and what the network said of each of its keys
    bundle, model : classes and operating point; what computed it
    rules : triage
    missing : what keeps the report provisional beside the stack's own gaps, one sentence each
    left_out : images that were never slices of the head (a localizer), one sentence each; they keep nothing provisional
    arriving : slices may still come, between these too: then that is all that is missing

    """
    seen = measure(stack, slices, bundle.classes)
    findings = tuple(
        f for f in seen if bundle.operating_point[f.name].admits(f.volume_ml, f.probability, in_a_row(stack, f.keys))
    )
    gaps = (
        []
        if arriving
        else [
            f"{gap.missing} slice{'s' * (gap.missing > 1)} missing: "
            f"a step of {gap.step_mm:.1f} mm after slice {stack.keys.index(gap.after_key) + 1}"
            for gap in stack.gaps
        ]
    )
    repeats = [f"{len(stack.repeated)} images lie where another one is and were left out"] if stack.repeated else []
    incomplete = [*missing, *gaps, *([ARRIVING] if arriving else [])]
    below = tuple((f.name, f.volume_ml) for f in seen if f not in findings)
    return Report(
        findings=findings,
        absent=tuple(name for name in bundle.classes[1:] if name not in {f.name for f in findings}),
        below_threshold=below,
        decision=decide(findings, rules, below, complete=not incomplete),
        model=model,
        slices=len(stack),
        provisional=bool(incomplete),
        missing=(*incomplete, *repeats, *left_out),
        thickness_mm=(float(stack.thickness_mm.min()), float(stack.thickness_mm.max())),
        coverage_mm=stack.coverage_mm,
        tilt_deg=stack.tilt_deg,
        operating_point=bundle.operating_point,
    )
