"""The benchmarks for a GPU machine, on stand-ins: they must work when one is at hand. Figures are not looked at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_peers, gpu_suite
from runtime import caps, device, gpu
from runtime.bundle import open_bundle
from runtime.device import CudaBindings
from runtime.errors import BackendError
from tests.calibration.made import heads
from tests.runtime.stand_ins import Cuda, Trt


class Typed(Trt):
    """Says of each plan what its graph is."""

    def Runtime(self, logger: object) -> object:  # noqa: N802
        runtime = super().Runtime(logger)
        made = runtime.deserialize_cuda_engine

        def deserialize(plan: bytes) -> object:
            self.types = "Int8" if b"int8" in plan else "FP16" if b"fp16" in plan else "FP32"
            return made(plan)

        runtime.deserialize_cuda_engine = deserialize
        return runtime


@pytest.mark.slow  # 40 s: every precision of the bundle, on stand-ins
def test_the_suite_measures_every_precision_and_judges_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cuda = Cuda()
    trt = Typed(cuda)
    monkeypatch.setattr(caps, "load", lambda: trt)
    for module in (device, gpu, gpu_suite):
        monkeypatch.setattr(module, "open_device", lambda: CudaBindings(runtime=cuda))
    ways = {"cuda-bindings": CudaBindings, "without CUDA graphs": gpu_suite.WithoutGraphs}
    ways = {name: lambda made=made: made(runtime=cuda) for name, made in ways.items()}
    monkeypatch.setattr(gpu_suite, "WAYS", ways | {"pycuda": gpu_suite.PyCuda})
    monkeypatch.setattr(gpu_suite, "BATCHES", (1, 2))
    monkeypatch.setattr(gpu, "TIMED", 1)
    monkeypatch.setattr(gpu_suite, "constants", lambda path: str(path).encode())
    monkeypatch.setattr(gpu_suite, "wall_ms", lambda work, _: {"p50": 1.0} if work() else {})
    monkeypatch.setattr(gpu_suite, "compute_times", lambda *_: [0.5])
    told = gpu_suite.measure(open_bundle(), tmp_path / "plans", heads()[:1], lambda _: None)
    assert [one["state"] for one in told["engines"]] == ["built"] * 6
    assert set(told["verdicts"]) == {"fp32", "fp16", "int8"}
    for precision in told["verdicts"]:
        for way in ways:
            assert told["times"][f"{precision}, {way}"]["batch 2"]["compute_ms"] == {"p50": 0.5, "p90": 0.5, "p99": 0.5}
        assert "pycuda" in told["times"][f"{precision}, pycuda"]["error"]
    assert told["times"]["onnxruntime"]["batch 1"]
    assert "onnxruntime-gpu" in told["times"]["onnxruntime-cuda"]["error"]
    assert told["verdicts"]["fp32"]["figures"]["series"] == 1
    assert cuda.held == {}
    gpu_suite.write({"machine": gpu_suite.machine(), "bundles": [told]}, 1, tmp_path)
    assert "| `phantom-unet" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["machine"]["gpu"]["name"] == "Stand-in GPU"


@pytest.mark.parametrize(
    ("suite", "arguments", "code", "said"),
    [
        (gpu_suite, [], 3, "TensorRT: it is not here"),
        (gpu_suite, ["nowhere"], 2, "nowhere is no bundle"),
        (gpu_suite, ["--held-out", "0"], 2, "--held-out 0: a verdict needs one head at least"),
        (gpu_peers, ["res_unet"], 3, "has no CUDA here"),
        (gpu_peers, ["unetr"], 2, "invalid choice: 'unetr'"),
    ],
)
def test_what_is_missing_or_wrong_is_said_at_once(suite, arguments, code, said, tmp_path, monkeypatch, capsys):
    def refuse() -> None:
        raise BackendError("TensorRT: it is not here")

    monkeypatch.setattr(caps, "load", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("training.heads.unseen", lambda *_, **__: pytest.fail("heads were made"))
    monkeypatch.setattr("sys.argv", ["suite", "--out", str(tmp_path / "out" / "here"), *arguments])
    with pytest.raises(SystemExit) as ended:
        suite.main()
    assert ended.value.code == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_engine_is_timed_between_events(monkeypatch: pytest.MonkeyPatch):
    from tests.runtime.test_trt import SIDE, opened

    monkeypatch.setattr(gpu_suite, "SLICE", (SIDE, SIDE))
    session, cuda, _ = opened((1,))
    assert gpu_suite.compute_times(session, 1, 3) == [1.5] * 3
    session.close()
    assert cuda.held == {}


def test_pytorch_is_timed_on_the_same_graph(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_peers, "BATCHES", (1,))
    monkeypatch.setattr(torch, "compile", lambda run: run)
    told = gpu_peers.measure("res_unet", 32, 1, device="cpu")
    assert told["eager"]["batch 1"]["p50"] > 0
    assert told["compiled"]["batch 1"]["p50"] > 0
