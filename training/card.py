"""Results as people read them: the table of an evaluation, the card of a bundle and that of a training run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from runtime.bundle import Bundle
    from training.recipe import Recipe


def rows(summary: dict[str, Any]) -> list[dict[str, str]]:
    """The scores of each class, one row each, as people read them."""
    return [
        {
            "class": name,
            "cases": str(one["cases"]),
            "Dice": _number(one["dice"]),
            "of cases": f"{_number(one['dice_of_cases']['low'])} to {_number(one['dice_of_cases']['high'])}",
            "IoU": _number(one["iou"]),
            "precision": _number(one["precision"]),
            "recall": _number(one["recall"]),
            "HD95, mm": _number(one["hausdorff_95_mm"], 1),
            "volume ICC": _number((one.get("volume_icc") or {}).get("estimate")),
            "ABC/2 ICC": _number((one.get("abc_icc") or {}).get("estimate")),
            "error, ml": _number(one.get("volume_error_ml", {}).get("mean_absolute"), 2),
            "within 10 % or 1.5 ml": _share(one.get("within_10_percent_or_1.5_ml")),
            "found": _share(one.get("sensitivity")),
            "false findings": str(one["false_findings"]),
        }
        for name, one in summary["classes"].items()
    ]


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows with the same keys as Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def of_bundle(summary: dict[str, Any], bundle: Bundle) -> str:
    """The card of a bundle: what the bundle is, what it has seen, what it scores, what it must not be used for."""
    clean, calibration = summary["bleed_free"], summary["calibration"]
    least_ml = clean["least_part_ml"]
    false = ""
    if rate := clean["false_parts_per_case"]:
        false = f""", {rate["estimate"]:.2f} false parts of {least_ml} ml or more per case (at most
{rate["high"]:.2f}, 95 % by Poisson), the largest false volume {clean["largest_false_volume_ml"]:.2f} ml"""
    reasons = ", ".join(f"{count} slices: {reason}" for reason, count in summary["slices_left_out"].items())
    left_out = f"Left out: {reasons}. " if reasons else ""
    left_out += "".join(f"{count} cases: {note}. " for note, count in summary["notes"].items())
    found = [
        {"class": name, **{_size(s): f"{s['found']}/{s['lesions']}" for s in one["lesions_by_size"]}}
        for name, one in summary["classes"].items()
        if "lesions_by_size" in one
    ]
    by_size = f"Connected lesions found by size (one voxel is enough):\n\n{table(found)}\n" if found else ""
    return f"""# {bundle.name} {bundle.version}

**Research use only; not a medical device.** Training data: {bundle.training_data}.
What it finds in a human head is not validated by anything and must not guide anybody's care.

Scored on {summary["cases"]} cases of {summary["patients"]} patients, {summary["slices"]} slices: {summary["data"]}.
Through {summary["engine"]}, {summary["precision"]}. {left_out}
Dice, IoU, precision and recall are over all voxels of all cases; "of cases"
is the 95 % interval, by bootstrap over patients, of the mean Dice over the cases that show the class (docs/metrics.md).

{table(rows(summary))}
{by_size}Without blood: {clean["without_findings"]} of {clean["cases"]} cases without a finding (specificity
{_share(clean["specificity"]) or "unknown"}){false}.
What is below the operating point is mentioned in the report, is no finding and raises no alert:
{_points(bundle)}.

Calibration: a slice's highest probability of a class is off by {_number(calibration["expected_error"])} on average
(expected calibration error) as a probability that the slice shows the class. It is not calibrated beyond that.
"""


def _points(bundle: Bundle) -> str:
    """The operating point of each class, those together that have the same."""
    alike: dict[str, list[str]] = {}
    for name, point in bundle.operating_point.items():
        alike.setdefault(str(point), []).append(name)
    if len(alike) == 1:
        return f"every class {next(iter(alike))}"
    return "; ".join(f"{', '.join(names)} {point}" for point, names in alike.items())


def of_run(recipe: Recipe, rows: Sequence[Mapping[str, float]], facts: Mapping[str, str]) -> str:
    """The card of a training run: what learns from what, how, and how far it has come.

    Parameters
    ----------
    rows : one per validation, as in ``curves.csv``
    facts : what else is to be known, by name

    """
    names = recipe.classes[1:]
    best = max(rows, key=lambda row: _mean([row[f"dice_{name}"] for name in names]))
    scores = [{"class": name, "Dice": _number(_known(best[f"dice_{name}"]))} for name in names]
    settings = {
        "network": " ".join([recipe.network.architecture, *(f"{k}={v}" for k, v in recipe.network.settings.items())]),
        "input": ", ".join(f"{k} {v}" for k, v in recipe.input.model_dump().items()),
        "data": ", ".join(f"{k} {v}" for k, v in recipe.data.model_dump().items()),
        "split": "by seed" if recipe.split is None else str(recipe.split.model_dump(exclude_none=True)),
        "training": ", ".join(f"{k} {v}" for k, v in recipe.training.model_dump(exclude_none=True).items()),
        "augmentation": ", ".join(f"{k} {v}" for k, v in recipe.augmentation.model_dump().items()),
        **facts,
    }
    return f"""# {recipe.name} {recipe.version}: a training run

**Research use only; not a medical device.** Training data: {recipe.training_data}.

{table([{"what": key, "how": value.replace("|", "/")} for key, value in settings.items()])}
Dice over all pixels of the validation slices at step {best["step"]}, whose weights are in best.pt. These slices chose
the step, so they flatter it: `scanside evaluate` scores a bundle on others.

{table(scores)}"""


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else 0.0


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _size(stratum: Mapping[str, float | None]) -> str:
    if stratum["to_ml"] is None:
        return f"from {stratum['from_ml']:g} ml"
    return f"{stratum['from_ml']:g} to {stratum['to_ml']:g} ml"
