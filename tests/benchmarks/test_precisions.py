"""The table of precisions: what is written says which passed, which did not and why."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import precisions
from runtime.bundle import open_bundle


def row(precision: str, **others: object) -> precisions.Row:
    told = {
        "network": "res_unet", "steps": 150, "least": 0.985, "precision": precision, "passed": True, "reasons": (),
        "dice": 0.9987, "volume_ml": 0.21,
        "decisions_flipped": 0, "layers": 31, "left_out": 2, "megabytes": 2.9, "slice_ms": 21.5, "speed_up": 1.7,
        "speed_up_of_all": 1.9,
        "share_of_time": {},
    }  # fmt: skip
    return precisions.Row(**told | others)


def test_the_page_tells_verdicts_and_blames_operators(tmp_path: Path):
    failed = row(
        "int8", passed=False, reasons=("subdural: Dice 0.91",), slice_ms=None, speed_up=None, speed_up_of_all=None
    )
    blamed = row("int8-cpu", share_of_time={"Resize": 0.41, "QLinearConv": 0.32})
    precisions.write([failed, blamed], 4, 12, tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert (
        "| `res_unet` | 150 | 0.985 | int8 | failed: subdural: Dice 0.91 | 0.9987 | 0.21 | 31 | 2 | 2.9 |  |  |  |  |"
        in page
    )
    assert "| 21.5 | 1.7 | 1.9 | Resize 41%, QLinearConv 32% |" in page
    assert "--views 12 --held-out 4" in page
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["rows"][0]["reasons"] == ["subdural: Dice 0.91"]


def test_a_precision_weighs_its_graph_and_the_weights_that_it_refers_to():
    bundle = open_bundle()
    full, half, eighth = (precisions.weights(bundle, one) for one in ("fp32", "fp16", "int8-cpu"))
    assert full > half > eighth > 1e6
    assert full < sum(path.stat().st_size for path in bundle.folder.iterdir())
