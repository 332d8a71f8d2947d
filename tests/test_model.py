"""The shipped model on phantoms it never saw: millilitres in every geometry, and silence where there is no blood."""

from __future__ import annotations

import json

import numpy as np
import pytest

from runtime import geometry
from runtime.bundle import SHIPPED, Bundle, open_bundle
from runtime.report import compose
from runtime.session import Session, open_session
from runtime.types import Report
from tests.in_turn import in_turn
from training.lesions import Lesion
from training.phantom import Phantom, Scan, make

GEOMETRIES = {
    "5 mm": Scan((5.0,)),
    "5 mm, 20 degrees": Scan((5.0,), tilt_deg=20),
    "1 mm": Scan((1.0,)),
    "1 mm, 20 degrees": Scan((1.0,), tilt_deg=20),
    "step change": Scan((4.0, 7.0)),
    "step change, -20 degrees": Scan((4.0, 7.0), tilt_deg=-20),
}
Volumes = dict[str, tuple[float, float]]
PAIRS = (
    ("intracerebral", 30, "subdural", 14),
    ("epidural", 18, "contusion", 12),
    ("subarachnoid", 12, "intraventricular", 10),
)


@pytest.fixture(scope="module")
def engine() -> tuple[Bundle, Session]:
    bundle = open_bundle()
    return bundle, open_session(bundle)


def report_on(phantom: Phantom, bundle: Bundle, session: Session) -> Report:
    hu = np.stack([one.hu for one in phantom.slices])
    labels = {}
    for shown, answered in bundle.view.over(len(hu)):
        labels |= zip((phantom.slices[i].key for i in answered), session.infer(hu[None, shown]), strict=False)
    stack = geometry.stack({one.key: one.plane for one in phantom.slices})
    return compose(stack, labels, bundle, session.identity, ())


def measured(scan: Scan, pair: tuple[str, float, str, float], engine: tuple[Bundle, Session], seed: int) -> Volumes:
    """Truth and answer in millilitres, by class."""
    phantom = make((Lesion(pair[0], pair[1]), Lesion(pair[2], pair[3])), scan, seed=seed)
    report = report_on(phantom, *engine)
    found = {finding.name: finding.volume_ml for finding in report.findings}
    return {name: (truth, found.get(name, 0)) for name, truth in phantom.truth_ml.items()}


@pytest.mark.parametrize(("scan", "pair"), in_turn(PAIRS, GEOMETRIES, "1 mm", "1 mm, 20 degrees"))
def test_lesions_over_5_ml_are_measured(
    scan: Scan, pair: tuple[str, float, str, float], engine: tuple[Bundle, Session]
):
    """Within 10 % or 1.5 ml of the truth."""
    for name, (truth, answer) in measured(scan, pair, engine, seed=41).items():
        assert answer == pytest.approx(truth, abs=max(0.1 * truth, 1.5)), name


@pytest.mark.slow
@pytest.mark.parametrize("scan", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p[0]}+{p[2]}")
@pytest.mark.parametrize("seed", [31, 41])
def test_every_lesion_over_5_ml_is_measured(
    scan: Scan, pair: tuple[str, float, str, float], engine: tuple[Bundle, Session], seed: int
):
    """The goal, which this model misses in some of these cases: 10 % or 1.5 ml for every class and head."""
    for name, (truth, answer) in measured(scan, pair, engine, seed).items():
        assert answer == pytest.approx(truth, abs=max(0.1 * truth, 1.5)), name


@pytest.mark.parametrize("seed", [51, 52, 53, 54])
def test_a_head_without_blood_stays_silent(seed: int, engine: tuple[Bundle, Session]):
    """Calcified pineal gland and plexus, falx, tentorium, beam hardening: none of them is blood."""
    report = report_on(make((), Scan((5.0,), tilt_deg=8.0 * (seed % 2)), seed=seed), *engine)
    assert report.findings == ()


def test_the_scores_in_the_bundle_are_those_of_the_bundle():
    scores = json.loads((SHIPPED / "scores.json").read_text())
    assert scores["bleed_free"]["cases"] >= 40
    assert scores["bleed_free"]["specificity"] >= 0.95
    for name, one in scores["classes"].items():
        assert one["cases"] >= 9, name
        assert one["dice"] > 0.75, name
