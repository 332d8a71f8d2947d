"""`scanside bench` on tiny cases: each command leaves a record and a picture, and its peers compute the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from typer.testing import CliRunner

from benchmarks import cases, charts, end_to_end, floors, growth, running, tritonserver
from benchmarks.commands import app
from benchmarks.record import Record, read
from runtime.bundle import open_bundle

PNG = b"\x89PNG"
PACE = {"pace_loop_ms", "pace_rested_ms"}  # of the machine, in every record


def bench(*arguments: object) -> str:
    shown = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    return shown.output


def test_the_command_line_shows_them_and_loads_none():
    asked = "import scanside, sys; print([n for n in sys.modules if n.startswith('benchmarks')])"
    shown = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
    shown = subprocess.run(
        [sys.executable, "-m", "scanside", "bench", "--help"], capture_output=True, text=True, check=True
    )
    assert all(name in shown.stdout for name in ("latency", "throughput", "ingest", "end-to-end", "peers", "compare"))


def test_latency_beside_its_floor(tmp_path: Path):
    out = tmp_path / "latency.json"
    shown = bench("latency", "--matrix", 64, "--threads", 1, "--seconds", 0.02, "--out", out)
    assert "x session_run_ms" in shown
    told = read(out)
    assert told.samples.keys() == {"infer_ms", "session_run_ms", "decode_ms", *PACE}
    assert len(told.samples["infer_ms"]) >= 10
    assert out.with_suffix(".png").read_bytes().startswith(PNG)
    assert str(tmp_path) not in out.read_text()


def test_throughput_by_batch_and_threads(tmp_path: Path):
    out = tmp_path / "throughput.json"
    how = ("--batches", "1,2", "--threads", "1", "--matrix", 64, "--seconds", 0.02)
    told = json.loads(bench("throughput", *how, "--json", "--out", out))
    assert {"threads_1_batch_1_per_s", "threads_1_batch_2_per_s"} <= told["figures"].keys()
    assert told["figures"]["threads_1_batch_2_per_s"]["floor"] == "threads_1_batch_2_run_per_s"
    assert out.with_suffix(".png").read_bytes().startswith(PNG)


@pytest.mark.slow
def test_an_untrained_network_in_both_precisions(tmp_path: Path):
    out = tmp_path / "network.json"
    how = ("--architecture", "res_unet", "--grids", 64, "--slices", 5, "--rounds", 1, "--out", out)
    shown = bench("network", *how)
    assert "x grid_64_int8_engine_alone_ms" in shown
    told = read(out)
    assert told.about["parameters"] == 2_761_460
    assert 0.2 < told.about["gflops"]["64"] < 0.4
    assert out.with_suffix(".png").read_bytes().startswith(PNG)
    refused = CliRunner().invoke(app, ["network", "--architecture", "unet_3d"])
    assert refused.exit_code == 2
    assert "att_focus_net" in refused.output


needs_triton = pytest.mark.skipif(
    tritonserver.find() is None, reason="no Triton here, its benchmarks are NOT tested: run `make triton`"
)


@needs_triton
def test_the_ways_to_a_triton_beside_none(tmp_path: Path):
    out = tmp_path / "triton.json"
    bench("triton", "--matrix", 64, "--seconds", 0.1, "--out", out)
    told = read(out)
    ways = ("shared_memory", "grpc", "http")
    figures = {"local_ms", *(f"{way}_ms" for way in ways), *(f"{way}_more_per_slice_ms" for way in ways)}
    assert told.samples.keys() == figures | PACE
    assert "HTTP; hashes" in told.about["engines"]["http"]
    assert "gRPC; hashes" in told.about["engines"]["grpc"]
    assert "gRPC with shared memory; hashes" in told.about["engines"]["shared_memory"]
    assert out.with_suffix(".png").read_bytes().startswith(PNG)


@needs_triton
def test_more_tritons_beside_the_ideal(tmp_path: Path):
    out = tmp_path / "replicas.json"
    bench("replicas", "--counts", "1,2", "--matrix", 64, "--seconds", 1, "--out", out)
    told = read(out)
    assert told.floors == {f"replicas_{n}_per_s": f"replicas_{n}_ideal_per_s" for n in (1, 2)}
    assert told.median("replicas_1_per_s") > 0
    assert out.with_suffix(".png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("text", ["", "1,,2", "0", "a", "1.5", "-1"])
def test_numbers_that_are_none_are_usage(text: str):
    assert CliRunner().invoke(app, ["throughput", f"--batches={text}"]).exit_code == 2


def test_a_head_can_be_written_as_another_study_and_in_thinner_slices(tmp_path: Path):
    head = cases.head(60, tmp_path / "drawn", matrix=64)
    first, again, other = (head.write(tmp_path / str(number), number) for number in (1, 1001, 2))
    one, two = dcmread(first[0]), dcmread(other[0])
    assert one.StudyInstanceUID != two.StudyInstanceUID
    assert (one.pixel_array == two.pixel_array).all()
    places = [float(dcmread(path).ImagePositionPatient[2]) for path in again]
    assert len(places) == 60
    assert np.diff(places) == pytest.approx(np.diff(places).mean(), abs=1e-6)
    assert float(one.SliceThickness) == pytest.approx(np.diff(places).mean(), rel=1e-3)


def test_the_floor_of_a_close_has_all_its_parts(tmp_path: Path):
    head = cases.head(12, tmp_path / "head", matrix=128)
    with floors.rehearsed(None) as one:
        own = floors.close(one, head.write(tmp_path / "scan", 1), tmp_path / "results")
    archive = running.Ours(tmp_path / "archive")
    try:
        own.ms["round_trip"] = floors.round_trip_ms(own.files, archive.port)
        roles = [arrival.role for arrival in archive.arrivals(tmp_path)]
    finally:
        archive.close()
    assert set(floors.REMAINING) <= own.ms.keys()
    assert own.ms["close"] >= own.ms["compose"] + own.ms["build"] + own.ms["write"]
    assert len(roles) == len(own.files)
    assert {"sr", "sc", "seg"} <= set(roles)


def test_a_refused_object_is_no_round_trip(tmp_path: Path):
    head = cases.head(2, tmp_path / "head", matrix=64)
    archive = running.Ours(tmp_path / "archive")
    try:
        (path, _) = head.write(tmp_path / "scan", 1)
        floors.round_trip_ms([path], archive.port)
        changed = path.read_bytes()
        path.write_bytes(changed[:-2] + b"\1\2")
        with pytest.raises(running.RunError, match="status C111"):
            floors.round_trip_ms([path], archive.port)
    finally:
        archive.close()


def test_slopes_are_those_of_the_larger_half():
    assert growth.slope([1, 1, 10, 20, 40], [1, 2, 4, 8, 16]) == pytest.approx(2.0, abs=1.0)
    assert growth.slope([5, 10, 20, 40], [10, 20, 40, 80]) == 1.0
    assert growth.slope([100], [1]) is None


def test_stages_follow_each_other(tmp_path: Path):
    record = Record("end-to-end", {"slices": [40]})
    parts = {f"floor_{part}": 10.0 for part in floors.REMAINING}
    for name, ms in {"closing": 20.0, "results": 120.0, "all": 200.0, **parts}.items():
        record.add(f"40_{name}_ms", [ms])
    stages = end_to_end.stages(record)
    assert list(stages["40 slices"].values()) == [20.0, 100.0, 80.0]
    assert sum(stages["40 slices, floor"].values()) == 50.0
    charts.stacked(stages, tmp_path / "stages.png", "", marks={"40 slices": 300.0})
    assert (tmp_path / "stages.png").read_bytes().startswith(PNG)


def test_peers_have_the_same_weights():
    from benchmarks import peers

    bundle = open_bundle()
    hu, expected = bundle.golden()
    for way, answer in peers._ways(bundle, compiled=False).items():
        assert (answer(hu[2, 0]) != expected[2]).mean() < 1e-4, way


@pytest.mark.slow
def test_from_the_scanner_to_the_archive(tmp_path: Path):
    out = tmp_path / "whole.json"
    bench("end-to-end", "--slices", 12, "--rate", 0, "--rounds", 1, "--disk", tmp_path, "--out", out)
    told = read(out)
    assert told.samples["12_all_ms"][0] >= told.samples["12_seg_ms"][0] > told.samples["12_closing_ms"][0] > 0
    assert told.floors["12_all_ms"] == "12_floor_ms"
    assert out.with_suffix(".png").read_bytes().startswith(PNG)


@pytest.mark.slow
def test_growth_has_a_curve_for_each_kind_of_work(tmp_path: Path):
    out = tmp_path / "growth.json"
    sizes = ("--slices", "10,20", "--series", "1,2", "--matrix", "64,128", "--associations", "1,2")
    bench("growth", *sizes, "--disk", tmp_path, "--out", out)
    assert {one.partition(":")[0] for one in read(out).about["slopes"]} == {
        "slices", "series", "matrix", "associations", "lesions",
    }  # fmt: skip
    assert out.with_suffix(".png").read_bytes().startswith(PNG)
