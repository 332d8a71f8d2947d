"""What a bundle scores on phantoms it never saw, through the very runtime that serves it."""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime import geometry
from runtime.bundle import Bundle, open_bundle
from runtime.report import compose
from runtime.session import open_session
from training.heads import LARGEST_ML, SMALLEST_ML, draw_lesions
from training.lesions import CLASSES, Lesion, PhantomError
from training.phantom import Phantom, Scan, make

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from runtime.session import Session
    from runtime.types import Report, SliceLabels

FIRST_SEED = 900_000_000  # far from any training seed
THICKNESSES = ((5.0,), (4.0,), (2.5,), (1.25,), (4.0, 7.0))


def evaluate(folder: Path, *, heads: int, bleed_free: int, on_head: Callable[[int, int], None]) -> dict[str, Any]:
    """Score a bundle on `heads` phantoms with blood and `bleed_free` without.

    Every protocol in turn: 1.25 to 7 mm, one with a step change, half of them tilted up to 20 degrees.

    Returns
    -------
    JSON-ready scores: per class Dice, volume errors, sensitivity, false findings; specificity on heads without blood

    """
    bundle = open_bundle(folder)
    session = open_session(bundle)
    scores = _Scores(bundle)
    jobs = [(FIRST_SEED + i, i < heads, i) for i in range(heads + bleed_free)]
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # the engine takes the other core
        for done, phantom in enumerate(pool.imap(_phantom, jobs), start=1):
            report, labels = analyse(phantom, bundle, session)
            scores.add(phantom, report, labels)
            on_head(done, len(jobs))
    return scores.summary(session)


def analyse(phantom: Phantom, bundle: Bundle, session: Session) -> tuple[Report, dict[str, SliceLabels]]:
    """Infer a phantom's slices, measure and report, as the node does."""
    labels = {one.key: session.infer(one.hu[None])[0] for one in phantom.slices}
    stack = geometry.stack({one.key: one.plane for one in phantom.slices})
    return compose(stack, labels, bundle, session.identity, ()), labels


def _phantom(job: tuple[int, bool, int]) -> Phantom:
    seed, bleeds, index = job
    rng = np.random.default_rng(seed)
    scan = Scan(THICKNESSES[index % len(THICKNESSES)], tilt_deg=float(rng.uniform(-20, 20)) if index % 2 else 0.0)
    for attempt in range(1000):
        try:
            return make(draw_lesions(rng, 0.0) if bleeds else (), scan, seed=seed + 1_000_000 * attempt)
        except PhantomError:
            continue  # more blood than that head has room for
    raise PhantomError(f"no phantom for seed {seed}")


def golden_slices() -> NDArray[np.int16]:
    """Slices ``(N, 512, 512)`` for parity and self-tests: blood and none, thick and thin, tilted and straight."""
    bleeding = make(tuple(Lesion(name, 12.0) for name in CLASSES[1:]), Scan((5.0,), tilt_deg=12.0), seed=FIRST_SEED - 1)
    clean = make((), Scan((1.25,)), seed=FIRST_SEED - 2)
    shown = [int((bleeding.labels == c).sum(axis=(1, 2)).argmax()) for c in range(1, len(CLASSES))]
    chosen = sorted(set(shown))[:2]
    return np.stack([*(bleeding.slices[i].hu for i in chosen), clean.slices[len(clean.slices) // 2].hu])


def card(folder: Path, scores: dict[str, Any]) -> str:
    """The model card: what the bundle is, what it has seen, what it scores, what it must not be used for."""
    bundle = open_bundle(folder)
    rows = []
    for name, one in scores["classes"].items():
        if one["phantoms"]:
            mean, worst = one["mean_absolute_volume_error_ml"], one["worst_volume_error_ml"]
            within, found = one["within_10_percent_or_1.5_ml"], one["sensitivity"]
            row = (f"{one['dice']:.3f}", f"{mean:.2f}", f"{worst:+.2f}", f"{within:.0%}", f"{found:.0%}")
            rows.append(f"| {name} | {one['phantoms']} | {' | '.join(row)} | {one['false_findings']} |")
    clean = scores["bleed_free"]
    return f"""# {bundle.name} {bundle.version}

**Research use only; not a medical device.** Training data: {bundle.training_data}.
What it finds in a human head is not validated by anything and must not guide anybody's care.

Scores on {sum(one["phantoms"] for one in scores["classes"].values())} lesions in phantoms it never saw, 1.25 to 7 mm
slices, half of them tilted, through {scores["engine"]}:

| class | phantoms | Dice | mean abs. error, ml | worst, ml | within 10 % or 1.5 ml | found | false findings |
|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Heads without blood: {clean["without_findings"]} of {clean["phantoms"]} without a finding (specificity
{clean["specificity"]:.1%}); the largest false volume was {clean["largest_false_volume_ml"]:.2f} ml.
A class of less than {max(bundle.minimum_volume_ml.values()):g} ml is mentioned in the report and is no finding.
"""


class _Scores:
    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.both = np.zeros(len(CLASSES))
        self.total = np.zeros(len(CLASSES))
        self.volumes: dict[str, list[tuple[float, float]]] = {name: [] for name in CLASSES[1:]}  # (truth, measured) ml
        self.false_ml: dict[str, list[float]] = {name: [] for name in CLASSES[1:]}
        self.clean: list[tuple[int, float]] = []  # per bleed-free head: findings, ml of anything seen

    def add(self, phantom: Phantom, report: Report, labels: dict[str, SliceLabels]) -> None:
        seen = {**dict(report.below_threshold), **{f.name: f.volume_ml for f in report.findings}}
        if not phantom.truth_ml:
            self.clean.append((len(report.findings), sum(seen.values())))
        for one, truth in zip(phantom.slices, phantom.labels, strict=True):
            predicted = labels[one.key].labels
            self.total += np.bincount(predicted.ravel(), minlength=len(CLASSES)) + np.bincount(
                truth.ravel(), minlength=len(CLASSES)
            )
            self.both += np.bincount(truth[predicted == truth], minlength=len(CLASSES))
        for name in CLASSES[1:]:
            if name in phantom.truth_ml:
                self.volumes[name].append((phantom.truth_ml[name], seen.get(name, 0.0)))
            elif seen.get(name):
                self.false_ml[name].append(seen[name])

    def summary(self, session: Session) -> dict[str, Any]:
        classes = {}
        for index, name in enumerate(CLASSES[1:], start=1):
            pairs = np.array(self.volumes[name] or np.zeros((0, 2)))
            error = pairs[:, 1] - pairs[:, 0]
            within = np.abs(error) <= np.maximum(0.1 * pairs[:, 0], 1.5)
            minimum = self.bundle.minimum_volume_ml[name]
            classes[name] = {
                "phantoms": len(pairs),
                "dice": round(float(2 * self.both[index] / self.total[index]), 4) if self.total[index] else None,
                "mean_absolute_volume_error_ml": round(float(np.abs(error).mean()), 3) if len(pairs) else None,
                "mean_volume_error_ml": round(float(error.mean()), 3) if len(pairs) else None,
                "worst_volume_error_ml": round(float(error[np.abs(error).argmax()]), 3) if len(pairs) else None,
                "within_10_percent_or_1.5_ml": round(float(within.mean()), 4) if len(pairs) else None,
                "sensitivity": round(float((pairs[:, 1] >= minimum).mean()), 4) if len(pairs) else None,
                "false_findings": sum(ml >= minimum for ml in self.false_ml[name]),
                "largest_false_volume_ml": round(max(self.false_ml[name], default=0.0), 3),
            }
        quiet = sum(findings == 0 for findings, _ in self.clean)
        return {
            "data": "synthetic phantoms, seeds not used in training; says nothing about human heads",
            "engine": session.identity.backend,
            "lesions_ml": {name: [SMALLEST_ML, LARGEST_ML[name]] for name in CLASSES[1:]},
            "minimum_volume_ml": dict(self.bundle.minimum_volume_ml),
            "classes": classes,
            "bleed_free": {
                "phantoms": len(self.clean),
                "without_findings": quiet,
                "specificity": round(quiet / len(self.clean), 4) if self.clean else None,
                "largest_false_volume_ml": round(max((ml for _, ml in self.clean), default=0.0), 3),
            },
        }
