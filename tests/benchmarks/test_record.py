"""Records of benchmarks: one schema, and a comparison that tells a change from noise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import comparison, pace, page
from benchmarks.commands import app
from benchmarks.record import MOST_SAMPLES, Record, RecordError, measuring, read


def noisy(seed: int, *, times: float = 1.0, drift: float = 0.0, count: int = 200) -> list[float]:
    """Samples as a machine gives them: neighbours alike."""
    rng = np.random.default_rng(seed)
    wander = np.cumsum(rng.normal(0, drift, count)) if drift else 0.0
    return list(times * (10 + rng.gamma(2.0, 0.3, count) + wander))


def record(samples: list[float], name: str = "infer_ms", **asked: object) -> Record:
    made = Record("latency", asked)
    made.add(name, samples)
    made.load_average |= {"before": 0.1, "after": 0.9}
    return made


def test_a_record_comes_back_from_its_file(tmp_path: Path):
    with measuring("end-to-end", slices=[40, 320], rate=20.0, orthanc=False, verbose=True) as made:
        made.add("all_ms", [3.0, 1.0, 2.0], floor="floor_ms")
        made.add("floor_ms", [1.0, 1.0])
        made.about["model"] = "phantom-unet"
    made.write(tmp_path / "new" / "one.json")
    told = json.loads((tmp_path / "new" / "one.json").read_text())
    assert told["command"] == "scanside bench end-to-end --slices 40,320 --rate 20.0 --verbose"
    assert told["schema"] == 1
    assert told["figures"]["all_ms"]["p50"] == 2.0
    assert told["figures"]["all_ms"]["ratio"] == 2.0
    assert told["machine"]["threads"] >= 1
    assert told["versions"]["numpy"]
    assert told["load_average"].keys() == {"before", "after"}
    assert [told["figures"][name]["count"] for name in ("pace_loop_ms", "pace_rested_ms")] == [2 * pace.TIMES] * 2
    assert "= 2.00 x floor_ms" in made.lines()[0]
    again = read(tmp_path / "new" / "one.json")
    assert (again.samples, again.floors, again.about) == (made.samples, made.floors, made.about)


def test_a_long_run_is_kept_in_part_and_told_in_whole():
    made = record(list(range(1, 10 * MOST_SAMPLES + 1)))
    figure = made.told()["figures"]["infer_ms"]
    assert len(figure["samples"]) == MOST_SAMPLES
    assert (figure["count"], figure["p99"]) == (10 * MOST_SAMPLES, pytest.approx(9900, rel=1e-3))


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 1}', '{"figures": {}}'])
def test_what_is_no_record_is_named(tmp_path: Path, content: str):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(RecordError, match="no record of a benchmark"):
        read(tmp_path / "x.json")


def test_a_record_of_another_schema_is_measured_again(tmp_path: Path):
    (tmp_path / "x.json").write_text('{"schema": 0}')
    with pytest.raises(RecordError, match="schema 0, this is 1"):
        read(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("name", "times", "verdict"),
    [
        ("infer_ms", 1.2, "worse"),
        ("infer_ms", 0.8, "better"),
        ("slices_per_s", 1.2, "better"),
        ("slices_per_s", 0.8, "worse"),
        ("infer_ms", 1.02, "same"),  # sure, and too small to matter
    ],
)
def test_a_change_is_told_from_noise(name: str, times: float, verdict: str):
    (change,) = comparison.compare(record(noisy(1), name), record(noisy(2, times=times), name))
    assert change.verdict == verdict
    assert change.low < change.ratio < change.high


def test_noise_that_neighbours_share_is_no_change():
    found = [
        comparison.compare(record(noisy(seed, drift=0.15)), record(noisy(seed + 100, drift=0.15)), 0.0)[0].verdict
        for seed in range(30)
    ]
    alone = [comparison.compare(record(noisy(seed)), record(noisy(seed + 100)), 0.0)[0].verdict for seed in range(30)]
    assert alone.count("same") >= 28
    assert found.count("same") >= 8  # of a random walk, blocks know some of the doubt; drawn one by one, 3 are left


def test_few_samples_decide_nothing():
    (change,) = comparison.compare(record([1.0, 1.0]), record([2.0, 2.0]))
    assert change.verdict == "too few samples"


def test_only_what_is_alike_is_compared():
    other = Record("ingest", {})
    other.add("infer_ms", [1.0])
    with pytest.raises(RecordError, match="compare two of a kind"):
        comparison.compare(record([1.0]), other)
    with pytest.raises(RecordError, match="no figure in common"):
        comparison.compare(record([1.0]), record([1.0], "decode_ms"))


def test_what_makes_a_comparison_doubtful_is_said():
    first, second = record([1.0], batch=1), record([1.0], batch=4)
    second.machine = {**second.machine, "cpu": "another"}
    second.load_average["before"] = 3.0
    said = comparison.doubts(first, second)
    assert len(said) == 3
    assert all(any(word in one for one in said) for word in ("another", "batch", "load of 3"))


@pytest.mark.parametrize(("times", "code"), [(1.3, 1), (1.0, 0), (0.7, 0)])
def test_the_command_fails_where_something_got_worse(tmp_path: Path, times: float, code: int):
    record(noisy(1)).write(tmp_path / "a.json")
    record(noisy(2, times=times)).write(tmp_path / "b.json")
    shown = CliRunner().invoke(app, ["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--json"])
    assert shown.exit_code == code, shown.output
    assert json.loads(shown.output)["changes"][0]["name"] == "infer_ms"


def test_the_page_says_which_targets_are_met(tmp_path: Path):
    whole, peers = Record("end-to-end", {"slices": [40], "rate": 20.0}), Record("peers", {"slices": 40})
    for name, ms in {"40_all_ms": 290.0, "40_floor_ms": 150.0, "40_alert_ms": 90.0, "node_start_s": 2.0}.items():
        whole.add(name, [ms] * 3)
    whole.floors["40_all_ms"] = "40_floor_ms"
    whole.add("idle_cpu_percent", [0.2])
    peers.add("scanside_results_ms", [900.0])
    peers.add("monai_last_slice_to_labels_ms", [5900.0])
    peers.about["pixels_that_differ"] = {"eager": 0.0001}
    for one in (whole, peers):
        one.load_average |= {"before": 0.1, "after": 0.9}
    shown = page.compose({"end-to-end": whole, "peers": peers})
    assert "| all results in the archive, 40 slices at 20/s, p95, ms | 300 | 290 | met |" in shown
    assert "| times the floor, 40 slices | 1.5 | 1.93 | **missed** |" in shown
    assert "| times sooner than store-then-process with a wait of 5 s | 10 | 20.3 | met |" in shown
    assert "`scanside bench end-to-end --slices 40 --rate 20.0`" in shown
    assert "0.0100%" in shown


def test_the_committed_page_is_that_of_the_committed_records():
    found = {
        name: read(page.RESULTS / f"{name}.json") for name in page.SECTIONS if (page.RESULTS / f"{name}.json").exists()
    }
    assert page.PAGE.read_text() == page.compose(found)
