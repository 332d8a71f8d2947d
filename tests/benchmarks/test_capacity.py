"""The capacity model: its simulation against formulas that are exact, its arithmetic by hand, its page from records."""

from __future__ import annotations

import ast
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import capacity, capacity_checks, capacity_pictures, costs, stations
from benchmarks.capacity_checks import queue
from benchmarks.costs import Assumptions, Costs
from benchmarks.node_simulation import Run, Work, at_once, simulate
from benchmarks.queueing import Saturated, erlang_c, mg1_wait, mgc_wait, servers_needed, utilisation
from benchmarks.record import Record, RecordError
from tests.benchmarks import capacity_records

ROOT = Path(__file__).parents[2]
ASSUMED = Assumptions()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("records")
    capacity_records.write(made)
    return made


@pytest.fixture(scope="module")
def records(folder: Path) -> dict[str, Record]:
    return costs.load(folder)


@pytest.fixture(scope="module")
def measured(records: dict[str, Record]) -> Costs:
    return Costs.of(records)


def of_the_mean(samples: np.ndarray, batches: int = 20) -> float:
    """Half the width of a 99.9 % interval of a queue's mean time, whose neighbours are alike: by means of batches."""
    means = [batch.mean() for batch in np.array_split(samples, batches)]
    return 3.88 * float(np.std(means, ddof=1)) / math.sqrt(batches)  # Student's t, 19 degrees of freedom


# formulas


def test_erlangs_formula_by_hand():
    assert erlang_c(0.6, 1.0, 1) == pytest.approx(0.6)  # one server: who comes waits when it is busy
    assert erlang_c(1.0, 1.0, 2) == pytest.approx(1 / 3)  # two servers, half busy: a²/2 / ((1-a/2)(1+a) + a²/2)
    assert mgc_wait(0.6, 1.0, 1) == pytest.approx(mg1_wait(0.6, 1.0, 2.0))
    assert mgc_wait(0.6, 1.0, 1, variation=0.0) == pytest.approx(mg1_wait(0.6, 1.0, 1.0))
    assert 0 < erlang_c(950.0, 1.0, 1000) < 1  # no factorial runs over


def test_who_is_asked_for_too_much_says_so():
    for formula in (lambda: mg1_wait(1.0, 1.0, 2.0), lambda: erlang_c(3.0, 1.0, 3), lambda: mgc_wait(9.0, 1.0, 3)):
        with pytest.raises(Saturated, match="busy"):
            formula()


def test_servers_that_are_needed():
    assert [servers_needed(rate, 1.0, 0.5) for rate in (0.1, 0.5, 0.51, 5.0)] == [1, 1, 2, 10]


# the simulation against them


def test_one_worker_is_m_m_1():
    """Mean and distribution of the time in the system: exponential with 1 / (mu - lambda)."""
    service = np.random.default_rng(5).exponential(1.0, 200_000)
    mean = float(service.mean())
    run = simulate(
        queue(service), Assumptions(exam=(1,), exams_per_hour=1800 / mean, pace=math.inf), 1, exams=12_000, seed=11
    )
    took = run.results_s()
    assert took.mean() == pytest.approx(mean / (1 - 0.5), abs=of_the_mean(took))
    longer = took > 4.0 * mean
    assert longer.mean() == pytest.approx(math.exp(-4.0 * 0.5), abs=of_the_mean(longer.astype(float)))


def test_measured_times_are_m_g_1_and_gpus_m_m_c(measured: Costs):
    for one in capacity_checks.formulas(measured, seed=3):
        assert abs(one.error) < 0.06, one


def test_littles_law_and_the_utilisation_law_hold(measured: Costs):
    run = simulate(Work.of(measured, ASSUMED, "processor", ASSUMED.exam), ASSUMED, 20, exams=60, seed=2)
    rate = len(run.series) / run.seconds
    there = np.mean([one.sent - one.began for one in run.series])
    assert run.mean_in_system() == pytest.approx(rate * there, rel=1e-9)
    exams_per_s = 60 / run.seconds
    load = stations.load(measured, ASSUMED, "processor")
    assert run.busy("worker") == pytest.approx(utilisation(exams_per_s, load.worker_ms / 1e3), rel=0.03)
    for station, part in (("line", "network in"), ("intake", "disk sync")):
        assert run.busy(station) == pytest.approx(exams_per_s * load.parts[part] / 1e3, rel=1e-6)


@pytest.mark.parametrize("engine", ["processor", "gpu"])
def test_nothing_is_lost_and_nothing_runs_backwards(engine: stations.Engine, measured: Costs):
    work = Work.of(measured, ASSUMED, engine, ASSUMED.exam)
    run = simulate(work, ASSUMED, 60, exams=25, seed=4, nodes=2, gpus=int(engine == "gpu"))
    assert sum(node.done["slices"] for node in run.nodes) == 25 * ASSUMED.slices
    assert sum(node.done["series"] for node in run.nodes) == len(run.series) == 25 * len(ASSUMED.exam)
    for one in run.series:
        assert one.left == 0
        assert one.began < one.last <= one.analysed < one.built < one.sent
        assert one.last - one.began >= (one.slices - 1) / ASSUMED.pace - 1e-9


def test_examinations_of_several_nodes_come_to_each_at_random(measured: Costs):
    """A scanner has its node: dealt out in turn, no node would ever get two at once."""
    work = Work.of(measured, replace(ASSUMED, exam=(20,)), "processor", (20,), loopback=True)
    run = simulate(work, replace(ASSUMED, exam=(20,), pace=math.inf), 8, exams=400, seed=4, nodes=4)
    counts = [node.done["series"] for node in run.nodes]
    assert sum(counts) == 400
    assert max(counts) > min(counts) + 4


def test_the_same_seed_gives_the_same_run_and_another_does_not(measured: Costs):
    work = Work.of(measured, ASSUMED, "processor", (40,))
    seeds = [simulate(work, replace(ASSUMED, exam=(40,)), 4, exams=5, seed=seed).results_s() for seed in (1, 1, 2)]
    assert (seeds[0] == seeds[1]).all()
    assert (seeds[0] != seeds[2]).any()


def test_results_go_before_slices_and_short_series_before_long_ones(measured: Costs):
    """As in the node: a long series that is being worked through does not hold up a short one."""
    work = Work.of(measured, ASSUMED, "processor", (20, 320), loopback=True)
    quiet = np.median([one.sent for one in at_once(work, 20, 1, seed=1, own_s=0.0)])
    flat_out = replace(ASSUMED, exam=(320, 20), exams_per_hour=1.0, pace=math.inf)
    run = simulate(work, flat_out, 1, exams=5, seed=1)
    assert np.median(run.results_s(20)) < 1.5 * quiet
    assert np.median(run.results_s(320)) > 5 * quiet


def test_more_scanners_wait_longer(measured: Costs):
    work = Work.of(measured, ASSUMED, "processor", ASSUMED.exam)
    few, many = (simulate(work, ASSUMED, scanners, exams=60, seed=3).results_s().mean() for scanners in (2, 25))
    assert many > 1.5 * few


# stations


def test_what_an_examination_takes_by_hand(measured: Costs):
    one = stations.load(measured, ASSUMED, "processor")
    assert one.parts["network in"] == pytest.approx(360 * 8 * 526_000 / 1e9 * 1e3)
    assert one.parts["disk sync"] == pytest.approx(360 * 1e3 / 400)
    decode = measured.decode_ms.mean()
    each = sum(n * (measured.slice_ms[n].mean() - decode) for n in (40, 320))
    assert one.parts["inference"] == pytest.approx(each + 360 * 0.85 / 2)
    assert one.bottleneck == "inference"
    assert stations.scanners_per_node(one, ASSUMED) == int(0.7 * 3.6e6 / (4 * one.worker_ms))
    on_gpu = stations.load(measured, ASSUMED, "gpu")
    assert on_gpu.parts["inference"] == 360 * 4.0
    assert on_gpu.parts["GPU"] == 360 * 2.0


@pytest.mark.parametrize("part", ["network in", "disk sync", "network out", "archive's answers", "building results"])
def test_the_largest_is_the_bottleneck(part: str, measured: Costs):
    one = stations.load(measured, ASSUMED, "processor")
    assert replace(one, parts=one.parts | {part: 1e6}).bottleneck == part


def test_enough_nodes_are_enough(measured: Costs):
    one = stations.load(measured, ASSUMED, "processor")
    for scanners in (1, 7, 200):
        nodes, each = stations.nodes_needed(scanners, one, ASSUMED), one.busy(4.0)["worker"]
        assert math.ceil(scanners / nodes) * each <= 0.7 + 1e-9
        assert nodes == 1 or math.ceil(scanners / (nodes - 1)) * each > 0.7
    nodes, gpus = stations.reread(1e9, one, ASSUMED)
    rate = 1e9 / 360 / (24 * 365)
    assert (nodes, gpus) == (math.ceil(rate * one.worker_ms / 3.6e6 / 0.7), 0)


def test_a_scanner_has_its_node(measured: Costs):
    """A node that is full at two and a half takes two; one that is full at a third is a third of what one needs."""
    one = stations.load(measured, ASSUMED, "processor")

    def needed(most: float) -> list[int]:
        load = replace(one, parts={**dict.fromkeys(one.parts, 0.0), "inference": 0.7 * 3.6e6 / (4 * most)})
        return [stations.nodes_needed(scanners, load, ASSUMED) for scanners in (1, 2, 3, 4, 5, 30)]

    assert needed(2.5) == [1, 1, 2, 2, 3, 15]
    assert needed(1.9) == [1, 2, 3, 4, 5, 30]
    assert needed(100.0) == [1] * 6
    assert needed(1 / 3) == [3, 6, 9, 12, 15, 90]


def test_each_site_of_a_region_has_a_node(records: dict[str, Record], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(capacity_checks, "CUSTOMERS", 20)
    monkeypatch.setattr(capacity, "SHARES", (0.1,))
    monkeypatch.setattr(capacity, "SITES", {"apart": (3, 2), "together": (1, 6)})
    found = capacity.compute(records, ASSUMED, exams=2, seed=1)
    for engine in capacity.ENGINES:
        assert {name: (of[engine].scanners, of[engine].nodes) for name, of in found.sites.items()} == {
            "apart": (6, 3), "together": (6, 1),
        }  # fmt: skip


# records, page and command


def test_sizes_that_are_not_measured_lie_between_those_that_are_or_grow_with_the_slices(measured: Costs):
    assert measured.of_slice(45) is measured.slice_ms[40]
    between = (measured.close_ms[160].mean() + measured.close_ms[320].mean()) / 2
    assert measured.of_close(240).mean() == pytest.approx(between)
    assert measured.of_close(5).mean() == pytest.approx(measured.close_ms[20].mean())
    assert measured.of_close(640).mean() == pytest.approx(2 * measured.close_ms[320].mean())
    assert measured.of_send(40).mean() == pytest.approx(150, rel=1e-3)


def test_series_at_once_are_as_many_slices_as_growth_has():
    tree = ast.parse((ROOT / "benchmarks/growth.py").read_text())
    (value,) = (
        node.value.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "SLICES_EACH"
    )
    assert value == costs.SLICES_EACH


def test_simulation_comes_near_to_what_the_records_have_of_whole_runs(records: dict[str, Record], measured: Costs):
    """These records are of a node that is what the simulation takes it for: paced, flat out, and several at once."""
    found = capacity_checks.whole_runs(records, measured, ASSUMED, seed=1)
    assert len(found) == 2 * 2 * 3 + 2 * 3
    assert [one.what for one in found if one.is_input] == ["1 series of 20 at once: pushed"]
    for one in found:
        if not one.what.endswith("pushed"):
            assert abs(one.error) < 0.15, one


def test_the_page_says_what_is_assumed_and_what_is_measured(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(capacity_checks, "CUSTOMERS", 20)
    arguments = ["--records", str(folder), "--exams", "2", "--gpu-ms", "3.5", "--page", str(tmp_path / "scale.md")]
    assert capacity.main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    page = (tmp_path / "scale.md").read_text()
    assert "There is no record of a GPU" in page.replace("\n", " ")
    assert "`python -m benchmarks.capacity --gpu-ms 3.5`" in page
    assert "| a GPU's time for one slice, ms | 3.5 | `--gpu-ms` |" in page
    assert "| slices of the series of one examination | 40 and 320 | `--exam` |" in page
    for site, of in told["sites"].items():
        assert f"| {site} |" in page
        assert of["processor"]["gpus"] == 0
        assert of["gpu"]["gpus"] >= 1
    assert f"full at **{told['scanners_per_node']['processor']} scanners**" in page
    assert (tmp_path / "scale.png").stat().st_size > 10_000
    assert capacity.main(arguments) == 0
    assert (tmp_path / "scale.md").read_text() == page


def test_regions_are_what_the_stations_say(measured: Costs):
    region = capacity_pictures.limits(measured, ASSUMED)
    names = np.asarray(stations.STATIONS)[region]
    assert set(names[-1]) == {"inference"}  # 300 ms a slice
    assert "inference" not in names[0]  # 0.1 ms


@pytest.mark.parametrize("lost", ["growth", "ingest", "latency", "end-to-end"])
def test_a_record_that_is_not_there_is_named_with_its_command(lost: str, tmp_path: Path, capsys):
    capacity_records.write(tmp_path)
    (tmp_path / f"{lost}.json").unlink()
    assert capacity.main(["--records", str(tmp_path), "--page", str(tmp_path / "scale.md")]) == 2
    said = capsys.readouterr().err
    assert f"scanside bench {lost} --out" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "scale.md").exists()


def test_a_record_without_a_figure_is_refused(folder: Path, records: dict[str, Record]):
    ingest = costs.load(folder)["ingest"]
    del ingest.samples["loopback_scanside_cpu_ms"]
    with pytest.raises(RecordError, match="loopback_scanside_cpu_ms"):
        Costs.of({**records, "ingest": ingest})


def test_series_at_once_without_a_single_one_are_refused(folder: Path, measured: Costs):
    growth = costs.load(folder)["growth"]
    growth.asked["series"] = [2, 4]
    with pytest.raises(RecordError, match="--series 1,2"):
        capacity_checks.sender_s(growth, measured)


def test_without_a_page_everything_is_told_and_nothing_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(capacity_checks, "CUSTOMERS", 20)
    monkeypatch.setattr(capacity, "SHARES", (0.1,))
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert capacity.main(["--records", str(folder), "--exams", "2", "--scanners", "7,1", "--exam", "20,40,320"]) == 0
    page = capsys.readouterr().out
    assert "Made by `python -m benchmarks.capacity --exam 20,40,320 --scanners 7,1`" in page
    assert "| one site, 7 scanners | 28 |" in page
    assert "| one site, 1 scanner | 4 |" in page
    assert "hospital, 4 scanners" not in page
    assert "| slices of the series of one examination | 20, 40 and 320 | `--exam` |" in page
    assert ".png" not in page
    assert [path.name for path in tmp_path.rglob("*")] == ["docs"]


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--gpu-ms", "0", "write a number above 0"),
        ("--gpu-ms", "nan", "write a number above 0"),
        ("--pace", "fast", "fast: write a number above 0"),
        ("--days", "inf", "inf: write a number that ends"),
        ("--most-busy", "2", "2: write a number between 0 and 1"),
        ("--most-busy", "1", "1: write a number between 0 and 1"),
        ("--most-busy", "0", "write a number above 0"),
        ("--exam", "40,-1", "write whole numbers above 0 with commas between"),
        ("--exam", "", "write whole numbers above 0 with commas between"),
        ("--exam", "foo", "foo: write whole numbers above 0 with commas between"),
        ("--scanners", "0", "write whole numbers above 0 with commas between"),
        ("--seed", "-1", "-1: write a whole number, 0 or more"),
        ("--exams", "0", "0: write a whole number above 0"),
    ],
)
def test_what_makes_no_sense_is_refused_with_what_would(option: str, value: str, words: str, capsys):
    with pytest.raises(SystemExit) as ended:
        capacity.main([f"{option}={value}"])
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}: " in said
    assert words in said


def test_all_slices_at_once_are_a_pace():
    assert math.isinf(capacity.options().parse_args(["--pace", "inf"]).pace)


def test_a_run_without_series_takes_no_time():
    assert Run([], [], 1.0).mean_in_system() == 0.0
