"""What a bundle scores on phantoms it never saw, through the very runtime that serves it."""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime import geometry
from runtime.bundle import Bundle, open_bundle
from runtime.report import compose
from runtime.session import open_session
from training.data import LARGEST_ML, SMALLEST_ML, draw_lesions
from training.phantom import CLASSES, Phantom, PhantomError, Scan, make

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

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
            self.total += np.bincount(predicted.ravel(), minlength=len(CLASSES)) + np.bincount(truth.ravel(), minlength=len(CLASSES))
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
