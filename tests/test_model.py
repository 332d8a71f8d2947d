"""The shipped model on phantoms it never saw: millilitres in every geometry, and silence where there is no blood."""

from __future__ import annotations

import json

import pytest

from runtime.bundle import SHIPPED, Bundle, open_bundle
from runtime.session import Session, open_session
from training.evaluate import analyse
from training.lesions import Lesion
from training.phantom import Scan, make

GEOMETRIES = {
    "5 mm": Scan((5.0,)),
    "5 mm, 20 degrees": Scan((5.0,), tilt_deg=20),
    "step change, -20 degrees": Scan((4.0, 7.0), tilt_deg=-20),
}
THIN = {"1 mm": Scan((1.0,)), "1 mm, 20 degrees": Scan((1.0,), tilt_deg=20), "step change": Scan((4.0, 7.0))}
PAIRS = (
    ("intracerebral", 30, "subdural", 14),
    ("epidural", 18, "contusion", 12),
    ("subarachnoid", 12, "intraventricular", 10),
)


HELD = tuple(zip(PAIRS, ("subdural", "contusion", "intraventricular"), strict=True))


@pytest.fixture(scope="module")
def engine() -> tuple[Bundle, Session]:
    bundle = open_bundle()
    return bundle, open_session(bundle)


def assert_volumes(scan: Scan, pair: tuple[str, float, str, float], engine: tuple[Bundle, Session], seed: int) -> None:
    """Within 10 % or 1.5 ml of the truth, for every lesion over 5 ml."""
    phantom = make((Lesion(pair[0], pair[1]), Lesion(pair[2], pair[3])), scan, seed=seed)
    report, _ = analyse(phantom, *engine)
    measured = {finding.name: finding.volume_ml for finding in report.findings}
    for name, truth in phantom.truth_ml.items():
        assert truth > 5
        assert measured.get(name, 0) == pytest.approx(truth, abs=max(0.1 * truth, 1.5)), (name, measured)


@pytest.mark.parametrize("scan", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize(("pair", "held"), HELD, ids=str)
def test_classes_that_the_model_holds(
    scan: Scan, pair: tuple[str, float, str, float], held: str, engine: tuple[Bundle, Session]
):
    """What this model keeps within 10 % or 1.5 ml; what it does not yet is in the slow tests and in the README."""
    phantom = make((Lesion(pair[0], pair[1]), Lesion(pair[2], pair[3])), scan, seed=31)
    report, _ = analyse(phantom, *engine)
    measured = {finding.name: finding.volume_ml for finding in report.findings}
    truth = phantom.truth_ml[held]
    assert measured[held] == pytest.approx(truth, abs=max(0.1 * truth, 1.5))
    if "subarachnoid" not in pair:
        whole = sum(phantom.truth_ml.values())
        assert sum(measured.values()) == pytest.approx(whole, rel=0.1), "blood lost or invented, not only misnamed"


@pytest.mark.slow
@pytest.mark.parametrize("scan", (GEOMETRIES | THIN).values(), ids=GEOMETRIES | THIN)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p[0]}+{p[2]}")
@pytest.mark.parametrize("seed", [31, 41])
def test_every_lesion_over_5_ml_is_measured(
    scan: Scan, pair: tuple[str, float, str, float], engine: tuple[Bundle, Session], seed: int
):
    assert_volumes(scan, pair, engine, seed)


@pytest.mark.parametrize("seed", [51, 52, 53, 54])
def test_a_head_without_blood_stays_silent(seed: int, engine: tuple[Bundle, Session]):
    """Calcified pineal gland and plexus, falx, tentorium, beam hardening: none of them is blood."""
    report, _ = analyse(make((), Scan((5.0,), tilt_deg=8.0 * (seed % 2)), seed=seed), *engine)
    assert report.findings == ()


def test_the_scores_in_the_bundle_are_those_of_the_bundle():
    scores = json.loads((SHIPPED / "scores.json").read_text())
    assert scores["bleed_free"]["phantoms"] >= 40
    for name, one in scores["classes"].items():
        assert one["phantoms"] >= 5, name
        assert one["dice"] > 0.5, name
