"""What a bundle scores on cases with a known truth, through the very runtime that serves it.

Every case is segmented view by view as the node does, measured by its own geometry and compared with its truth; the
summary has the metrics of docs/metrics.md, and every case's own row stands beside it.
"""

from __future__ import annotations

import csv
import json
import time
from collections import Counter
from dataclasses import asdict
from functools import partial, reduce
from operator import add
from typing import TYPE_CHECKING, Any

import cc3d
import numpy as np

from runtime.coniglobus import measure_abc
from training import card, metrics
from training.detection import (
    Match,
    bin_probabilities,
    count_false_parts,
    false_positive_rate,
    match_lesions,
    stratify,
)
from training.figures import draw_bland_altman, draw_overlay, draw_reliability, draw_violins
from training.metrics import count_classes
from training.scored import Scored
from training.statistics import Interval, bland_altman, bootstrap, by_patient, icc, volume_error_percent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from runtime.bundle import Bundle
    from runtime.session import Session
    from runtime.types import OperatingPoint
    from training.sources.case import Case

SIZES_ML = (0.0, 1.0, 5.0, 15.0, 30.0, float("inf"))
LEAST_PART_ML = 0.1  # of a false part, and of a part that somebody would measure by ABC/2
TOLERANCE, TOLERANCE_ML = 0.1, 1.5  # a volume is right within the larger of the two
LARGE_ML = 5.0
OVERLAYS = 12
SEED, RESAMPLES = 0, 1000  # of the bootstrap
METRICS = {"dice": metrics.dice, "iou": metrics.iou, "precision": metrics.precision, "recall": metrics.recall}


def score(case: Case, hu: NDArray[np.int16], bundle: Bundle, session: Session) -> Scored:
    """Segment a case and compare it with its truth.

    Parameters
    ----------
    hu : ``(N, H, W)``, the case's images in Hounsfield units

    """
    answers, slice_ms = [], []
    for shown, answered in bundle.view.over(len(hu)):
        started = time.perf_counter()
        answers += session.infer(hu[None, shown])[: len(answered)]
        slice_ms.append(1000 * (time.perf_counter() - started) / bundle.view.answered)
    predicted, truth = np.stack([one.labels for one in answers]), case.labels
    classes = range(len(bundle.classes))
    counts = reduce(add, (count_classes(p, t, len(classes)) for p, t in zip(predicted, truth, strict=True)))
    evidence = np.stack([one.evidence[1:] for one in answers])
    shows = np.stack([(truth == c).any(axis=(1, 2)) for c in classes[1:]], axis=1)
    drawn = np.stack([one.voxels[1:] > 0 for one in answers])
    voxel_ml = case.voxel_ml
    unknown = np.full(len(classes), np.nan)
    truth_ml, measured_ml, abc_ml, far_mm, false_parts = (unknown.copy() for _ in range(5))
    farthest_mm = np.full((len(classes), 2), np.nan)
    lesions: list[tuple[Match, ...]] = [()] * len(classes)
    if voxel_ml is not None and case.spacing_mm is not None:
        thickness_mm = np.full(len(hu), case.spacing_mm[0]) if case.thickness_mm is None else case.thickness_mm
        for c in classes[1:]:
            there, said = truth == c, predicted == c
            truth_ml[c], measured_ml[c] = (voxel_ml @ mask.sum(axis=(1, 2)) for mask in (there, said))
            ways_mm = [
                metrics.surface_distances_mm(*pair, case.spacing_mm, case.origin_mm)
                for pair in ((said, there), (there, said))
            ]
            farthest_mm[c] = [metrics.farthest(way) for way in ways_mm]
            far_mm[c] = np.max([metrics.farthest(way, 95) for way in ways_mm])
            lesions[c] = match_lesions(said, there, voxel_ml)
            false_parts[c] = count_false_parts(said, truth > 0, voxel_ml, least_ml=LEAST_PART_ML)
            abc_ml[c] = _abc_ml(there, case.spacing_mm[1:], thickness_mm, voxel_ml)
    most = int(((truth > 0).sum(axis=(1, 2)) + (predicted > 0).sum(axis=(1, 2))).argmax())
    spacing = case.spacing_mm[1:] if case.spacing_mm else (1.0, 1.0)
    return Scored(
        name=case.name,
        patient=case.patient,
        slices=len(hu),
        counts=counts,
        truth_ml=truth_ml,
        measured_ml=measured_ml,
        abc_ml=abc_ml,
        hausdorff_95_mm=far_mm,
        hausdorff_mm=farthest_mm,
        lesions=tuple(lesions),
        probability=np.array([0.0, *(evidence * drawn).max(0)]),
        in_a_row=np.array([0, *map(_in_a_row, drawn.T)]),
        false_parts=false_parts,
        reliability=bin_probabilities(evidence.clip(0, 1), shows),
        slice_ms=float(np.median(slice_ms)),
        shown=(hu[most].copy(), truth[most].copy(), predicted[most], spacing),
        left_out=case.excluded,
        notes=case.notes,
    )


def _in_a_row(shows: NDArray[np.bool_]) -> int:
    """Most in a row that are true."""
    ends = np.flatnonzero(~np.concatenate([[False], shows, [False]]))
    return int(np.diff(ends).max()) - 1


def _abc_ml(
    mask: NDArray[np.bool_],
    spacing_mm: tuple[float, float],
    thickness_mm: NDArray[np.float64],
    voxel_ml: NDArray[np.float64],
) -> float:
    """ABC/2 of each connected part, summed."""
    if not mask.any():
        return 0.0
    parts = cc3d.connected_components(mask.view(np.uint8), connectivity=26)
    volumes_ml = [float(voxel_ml @ (parts == part).sum(axis=(1, 2))) for part in range(1, int(parts.max()) + 1)]
    worth = [part for part, ml in enumerate(volumes_ml, start=1) if ml >= LEAST_PART_ML]
    return sum(measure_abc(parts == part, spacing_mm, thickness_mm).volume_ml for part in worth)


def summarise(scored: Sequence[Scored], bundle: Bundle, session: Session, data: str) -> dict[str, Any]:
    """Scores of all cases, JSON-ready: NaN is None.

    Parameters
    ----------
    data : what the cases are and what they say nothing about, in a sentence

    """
    counts = [one.counts for one in scored]
    patients = by_patient(scored, [one.patient for one in scored])
    clean = [one for one in scored if not _bleeds(one)]
    said = [_findings(one, bundle) for one in clean]
    macro = {
        name: {
            "global_macro": metrics.global_macro(counts, metric),
            "case_average": metrics.batch_average(counts, metric, batch=1),
        }
        for name, metric in METRICS.items()
    }
    measured = [one for one in clean if not np.isnan(one.measured_ml[1:]).any()]
    rate = false_positive_rate([int(one.false_parts[1:].sum()) for one in measured]) if measured else None
    reliability = reduce(add, (one.reliability for one in scored))
    return _plain(
        {
            "data": data,
            "bundle": {"name": bundle.name, "version": bundle.version, "digest": bundle.digest},
            "engine": session.identity.backend,
            "precision": session.identity.precision,
            "cases": len(scored),
            "patients": len(patients),
            "slices": sum(one.slices for one in scored),
            "slices_left_out": _left_out(scored),
            "notes": Counter(note for one in scored for note in one.notes),
            "slice_ms": float(np.median([one.slice_ms for one in scored])),
            "operating_point": {name: asdict(point) for name, point in bundle.operating_point.items()},
            "classes": {name: _of_class(c, scored, patients, bundle) for c, name in enumerate(bundle.classes) if c},
            "over_classes": macro,
            "bleed_free": {
                "cases": len(clean),
                "without_findings": sum(not one for one in said),
                "specificity": float(np.mean([not one for one in said])) if clean else None,
                "false_parts_per_case": rate and _interval(rate),
                "least_part_ml": LEAST_PART_ML,
                "largest_false_volume_ml": max((float(one.measured_ml[1:].sum()) for one in measured), default=None),
            },
            "calibration": {
                "of": "each slice's highest probability of each class, against whether the slice shows the class",
                "expected_error": reliability.expected_error,
                "edges": reliability.edges,
                "confidence": reliability.confidence,
                "frequency": reliability.frequency,
                "count": reliability.count,
            },
        }
    )


def _left_out(scored: Sequence[Scored]) -> dict[str, int]:
    reasons = Counter[str]()
    for one in scored:
        reasons.update(dict(one.left_out))
    return dict(reasons)


def _of_class(c: int, scored: Sequence[Scored], patients: Sequence[Sequence[Scored]], bundle: Bundle) -> dict[str, Any]:
    shown = [one for one in scored if one.shows(c)]
    name, without = bundle.classes[c], [one for one in scored if not one.shows(c)]
    pooled = metrics.total([one.counts for one in scored])
    far_mm = np.array([one.hausdorff_95_mm[c] for one in shown])
    return {
        "cases": len(shown),
        **{key: float(metric(pooled)[c]) for key, metric in METRICS.items()},
        "dice_of_cases": _over_patients(patients, partial(_mean_dice, c)),
        "hausdorff_95_mm": _known_mean(far_mm),
        "hausdorff_mm": {
            "directed_to_truth": _known_mean(np.array([one.hausdorff_mm[c, 0] for one in shown])),
            "directed_to_answer": _known_mean(np.array([one.hausdorff_mm[c, 1] for one in shown])),
            "symmetric": _known_mean(np.array([one.hausdorff_mm[c].max() for one in shown])),
        },
        "without_distance": int(np.isnan(far_mm).sum()),
        **_of_volumes(c, shown, bundle.operating_point[name]),
        "false_findings": sum(name in _findings(one, bundle) for one in without),
        "largest_false_volume_ml": max((float(one.measured_ml[c]) for one in without), default=None),
    }


def _of_volumes(c: int, shown: Sequence[Scored], point: OperatingPoint) -> dict[str, Any]:
    """What needs millilitres, of the cases that have them."""
    measurable = [one for one in shown if not np.isnan(one.truth_ml[c])]
    if not measurable:
        return {}
    truth, measured, abc = (
        np.array([getattr(one, name)[c] for one in measurable]) for name in ("truth_ml", "measured_ml", "abc_ml")
    )
    error = measured - truth
    within, large = np.abs(error) <= np.maximum(TOLERANCE * truth, TOLERANCE_ML), truth > LARGE_ML
    enough = len(measurable) > 2  # for a correlation
    return {
        "volume_error_ml": {
            "mean": float(error.mean()),
            "mean_absolute": float(np.abs(error).mean()),
            "worst": float(error[np.abs(error).argmax()]),
            "mean_percent": float(volume_error_percent(measured, truth).mean()),
        },
        "bland_altman_ml": _agreement(measured, truth),
        "volume_icc": _interval(icc(np.stack([measured, truth], 1)).agreement) if enough else None,
        "abc_icc": _interval(icc(np.stack([abc, truth], 1)).agreement) if enough else None,
        "within_10_percent_or_1.5_ml": float(within.mean()),
        "over_5_ml": {"cases": int(large.sum()), "within_10_percent_or_1.5_ml": int(within[large].sum())},
        "sensitivity": float(np.mean([one.is_found(c, point) for one in measurable])),
        "lesions_by_size": [
            {"from_ml": stratum.low_ml, "to_ml": stratum.high_ml, "lesions": stratum.lesions, "found": stratum.found}
            for stratum in stratify((match for one in measurable for match in one.lesions[c]), SIZES_ML)
        ],
    }


def _agreement(measured: NDArray[np.float64], truth: NDArray[np.float64]) -> dict[str, dict[str, float]] | None:
    """Bias and 95 % limits of agreement, over cases."""
    if len(truth) < 2:
        return None
    found = bland_altman(measured, truth)
    return {name: _interval(getattr(found, name)) for name in ("bias", "lower", "upper")}


def _known_mean(values: NDArray[np.float64]) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def _mean_dice(c: int, patients: Sequence[Sequence[Scored]]) -> float:
    values = [one.dice[c] for cases in patients for one in cases if one.shows(c)]
    return float(np.mean(values)) if values else float("nan")


def _over_patients(
    patients: Sequence[Sequence[Scored]], statistic: Callable[[Sequence[Sequence[Scored]]], float]
) -> dict[str, float]:
    if len(patients) > 1:
        return _interval(bootstrap(patients, statistic, seed=SEED, resamples=RESAMPLES))
    alone = statistic(patients)
    return {"estimate": alone, "low": float("nan"), "high": float("nan")}


def _interval(interval: Interval) -> dict[str, float]:
    return {"estimate": interval.estimate, "low": interval.low, "high": interval.high}


def _plain(value: Any) -> Any:
    """As JSON has it: no arrays, and no NaN or infinity, which are None."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(one) for one in value]
    if isinstance(value, float | np.floating):
        return round(float(value), 4) if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def write(scored: Sequence[Scored], summary: dict[str, Any], bundle: Bundle, folder: Path) -> None:
    """Scores, a table, every case's own row, and figures, into `folder`.

    ``scores.json``, ``scores.md``, ``cases.csv``, ``dice.png`` (violins), ``bland-altman/`` by class,
    ``calibration.png`` and ``overlays/``: the most different of the cases, worst first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").write_text(json.dumps(summary, indent=2) + "\n")
    (folder / "scores.md").write_text(card.table(card.rows(summary)))
    _write_cases(scored, bundle.classes, folder / "cases.csv")
    names = bundle.classes
    by_class = {name: np.array([one.dice[c] for one in scored if one.shows(c)]) for c, name in enumerate(names) if c}
    draw_violins(by_class, title=f"{bundle.name} {bundle.version}").savefig(folder / "dice.png")
    for c, name in enumerate(names):  # a class at a time: the volumes of one head are no independent cases
        volumes = [(one.measured_ml[c], one.truth_ml[c]) for one in scored if c and one.shows(c)]
        pairs = np.array([pair for pair in volumes if not np.isnan(pair).any()]).reshape(-1, 2)
        if len(pairs) > 1:
            (folder / "bland-altman").mkdir(exist_ok=True)
            figure = draw_bland_altman(bland_altman(*pairs.T), title=name)
            figure.savefig(folder / "bland-altman" / f"{name.replace(' ', '-')}.png")
    reliability = reduce(add, (one.reliability for one in scored))
    draw_reliability(reliability, title="a class anywhere in a slice").savefig(folder / "calibration.png")
    (folder / "overlays").mkdir(exist_ok=True)
    worst = sorted(enumerate(scored), key=lambda item: _mean_of_case(item[1]))
    for place, (number, one) in enumerate(worst[:OVERLAYS], start=1):
        hu, truth, predicted, spacing_mm = one.shown
        figure = draw_overlay(hu, truth, predicted, spacing_mm, names)
        figure.savefig(folder / "overlays" / f"{place:02d}-case-{number + 1}.png")


def _mean_of_case(one: Scored) -> float:
    """Mean Dice over the classes that the truth or the answer shows; 1 where neither shows any."""
    known = one.dice[1:][~np.isnan(one.dice[1:])]
    return float(known.mean()) if known.size else 1.0


def _write_cases(scored: Sequence[Scored], classes: Sequence[str], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["case", "name", "class", "dice", "truth_ml", "measured_ml", "abc_ml", "hausdorff_95_mm", "false_parts"]
        )
        for number, one in enumerate(scored, start=1):
            for c, name in enumerate(classes):
                if c and (one.shows(c) or one.counts.false_positive[c]):
                    values = (one.dice[c], one.truth_ml[c], one.measured_ml[c], one.abc_ml[c], one.hausdorff_95_mm[c])
                    told = ["" if np.isnan(value) else f"{value:.4f}" for value in values]
                    parts = "" if np.isnan(one.false_parts[c]) else int(one.false_parts[c])
                    writer.writerow([number, one.name, name, *told, parts])


def _bleeds(one: Scored) -> bool:
    return any(one.shows(c) for c in range(1, len(one.truth_ml)))


def _findings(one: Scored, bundle: Bundle) -> list[str]:
    """Classes that the node would report."""
    return [name for c, name in enumerate(bundle.classes) if c and one.is_found(c, bundle.operating_point[name])]
