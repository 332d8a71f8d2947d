"""The study of networks: one small round of it leaves results that can be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import study
from models import catalogue
from runtime.bundle import open_bundle
from runtime.session import open_session
from training.heads import as_case
from training.lesions import Lesion
from training.phantom import Scan, make


def test_every_network_of_two_dimensions_fits_the_common_conditions():
    for name, one in catalogue.ARCHITECTURES.items():
        if one.dimensions == 2:
            assert study.recipe_of(name, steps=10, grid=128).settings["classes"] == 7


def test_slim_networks_cost_what_the_default_costs():
    costs = {}
    for name in study.SLIM:
        with torch.device("meta"):
            network = catalogue.build(name, **study.recipe_of(name, steps=10, grid=128, slim=True).settings)
        costs[name] = catalogue.gflops(network, (1, 3, 128, 128))
    assert costs.keys() == {name for name, one in catalogue.ARCHITECTURES.items() if one.dimensions == 2}
    assert {name: cost for name, cost in costs.items() if not 0.9 < cost < 1.2} == {}


@pytest.mark.slow
def test_a_round_trains_exports_scores_and_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = {"heads": 2, "validation_heads": 1, "slices_per_head": 6, "bleed_free": 0.0}
    monkeypatch.setitem(study.ALIKE, "data", study.ALIKE["data"] | small)
    blood = (Lesion("epidural", 15.0), Lesion("contusion", 10.0))
    cases = [as_case(make(blood, Scan((7.0,), matrix=128), seed=seed, hard=True)) for seed in (1, 2)]
    rows, summaries = [], {}
    for name in ("res_unet", "dr_unet"):
        run = study.learn(name, tmp_path / "runs", steps=2, grid=64)
        row, summaries[name] = study.score(run, cases, tmp_path / "bundles" / name)
        rows.append(row)
    took = study.latency({name: open_session(open_bundle(tmp_path / "bundles" / name)) for name in summaries}, rounds=1)
    assert took.keys() == summaries.keys()
    assert min(took.values()) > 0
    made = sorted((tmp_path / "runs" / "slices").glob("hu-*.npy"))
    assert len(made) == 2, "training and validation slices, made once for both networks"
    study.write(rows, summaries, {"steps": 2, "grid": 64, "heads": 2, "bleed_free": 0, "slim": False}, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert {row["network"] for row in results["rows"]} == {"res_unet", "dr_unet"}
    assert all(row["slice_ms"] > 0 and 0 <= row["dice"] <= 1 for row in results["rows"])
    assert results["machine"]["torch"]
    assert (tmp_path / "accuracy-latency.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "README.md").read_text()
    assert all(f"| `{row.network}` | {row.dice:.3f} |" in page for row in rows)
    best = tmp_path / "runs" / "dr_unet-2-64" / "best.pt"
    before = best.stat().st_mtime_ns
    assert study.learn("dr_unet", tmp_path / "runs", steps=2, grid=64) == best.parent
    assert best.stat().st_mtime_ns == before, "what is trained is not trained again"
