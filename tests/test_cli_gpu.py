"""The command line beside a GPU, on stand-ins, and where one is missing."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import scanside as commands
from runtime import caps, device, gpu, plans, seal, session
from runtime.bundle import SHIPPED
from runtime.device import CudaBindings
from runtime.errors import BackendError, DeviceLost
from runtime.verdict import Verdict
from tests.benchmarks.test_gpu_suite import Typed
from tests.runtime.stand_ins import Cuda

PASSED = Verdict(passed=True, reasons=(), figures={})


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a command in this process; gives its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["scanside", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            commands.main()
        return ended.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Typed:
    """A machine with a GPU and TensorRT, whose golden slices are taken as passed."""
    trt = Typed(Cuda())
    monkeypatch.setattr(caps, "load", lambda: trt)
    for module in (device, gpu):
        monkeypatch.setattr(module, "open_device", lambda: CudaBindings(runtime=trt.cuda))
    monkeypatch.setattr(gpu, "TIMED", 1)
    monkeypatch.setattr(gpu, "self_test", lambda *_: 0.0)
    monkeypatch.setattr(commands, "_constants", lambda path: str(path).encode())
    return trt


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> dict[str, Verdict]:
    """What `verify` finds, without any heads."""
    found = {"fp32": PASSED}
    monkeypatch.setattr(commands, "_series", lambda *_: iter(()))
    monkeypatch.setattr("calibration.verify.verify", lambda *_, **__: found)
    return found


def refuse(*_: object, **__: object) -> None:
    raise BackendError("TensorRT: it is not here")


def test_build_without_a_home_folder_is_one_line(run, monkeypatch: pytest.MonkeyPatch):
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    code, told, said = run("build", "--precision", "fp32")
    assert (code, told, said) == (3, "", "scanside: no home folder: name --plans or model.plans\n")


def test_build_shows_tensorrts_words_as_they_are(run, trt: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parser = SimpleNamespace(parse=lambda _: False, num_errors=1, get_error=lambda _: "no [/net/Conv] and [red] [/]")
    monkeypatch.setattr(trt, "OnnxParser", lambda *_: parser)
    where = tmp_path / "[/b]"
    code, told, _ = run("build", "--precision", "fp32", "--batch", "1", "--plans", where)
    assert code == 1
    assert "does not take the graph: no [/net/Conv] and [red] [/]\n" in told
    assert told.endswith(f"in {where}\n")


def test_build_says_what_it_leaves_out(run, trt: Typed, tmp_path: Path):
    bundle = shutil.copytree(SHIPPED, tmp_path / "bundle")
    seal.add(bundle, {}, rulings={})
    code, told, said = run("build", bundle, "--batch", "1", "--plans", tmp_path / "plans", "--json")
    assert (code, [row["precision"] for row in json.loads(told)["engines"]]) == (0, ["fp32"])
    for name in ("fp16", "int8"):
        assert f"{name} is not verified: run `scanside verify {bundle}`" in said


def test_build_tells_what_was_made_before_the_device_was_lost(run, trt: Typed, tmp_path: Path, monkeypatch):
    make = gpu.make

    def lose(bundle, key, *given, **how):
        if key.batch == 2:
            raise DeviceLost("the GPU is gone")
        return make(bundle, key, *given, **how)

    monkeypatch.setattr(gpu, "make", lose)
    asked = ("build", "--precision", "fp32", "--batch", "1, 2", "--size", "512X512", "--plans", tmp_path)
    code, told, said = run(*asked, "--json")
    assert (code, [row["state"] for row in json.loads(told)["engines"]]) == (3, ["built", "failed"])
    assert said == "scanside: the GPU is gone\n"
    code, told, _ = run(*asked)
    assert (code, told.count("there already"), told.count("the GPU is gone")) == (3, 1, 1)


def test_build_without_onnx_names_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "calibration.weights", raising=False)
    with pytest.raises(SystemExit) as ended:
        commands._constants(SHIPPED / "model.onnx")
    assert ended.value.code == 3
    assert "onnx is not installed: in scanside's checkout, pip install '.[gpu]'" in capsys.readouterr().err


def test_verify_asks_for_the_gpu_before_the_heads(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(caps, "load", refuse)
    monkeypatch.setattr(commands, "_series", lambda *_: pytest.fail("heads were made"))
    told = run("verify", "--tensorrt", "--dry-run", "--json", "--plans", tmp_path)
    assert told == (3, "", "scanside: TensorRT: it is not here\n")


def test_verify_judges_what_is_there_and_names_what_is_not(run, trt: Typed, tmp_path: Path, judged):
    (tmp_path / "node.toml").write_text('[model]\nplans = "plans"\n')
    asked = ("verify", "--tensorrt", "--json", "--config", tmp_path / "node.toml")
    code, told, said = run(*asked)
    assert (code, told) == (3, "")
    assert f"no fp32 or fp16 or int8 plan of phantom-unet: run `scanside build {SHIPPED} --plans" in said
    run("build", "--precision", "fp32", "--batch", "1", "--plans", tmp_path / "plans")
    code, told, said = run(*asked)
    verdicts = json.loads(told)
    assert (code, verdicts["fp32"]["passed"], verdicts["int8"]["passed"]) == (0, True, False)
    remedy = f"run `scanside build {SHIPPED} --plans {tmp_path / 'plans'} --precision int8`"
    assert verdicts["int8"]["reasons"] == [f"not built: {remedy}"]
    assert said == f"written into 1 plan in {tmp_path / 'plans'}\n"
    assert [one.verdict for one in plans.accepted(tmp_path / "plans")] == ["passed"]


def test_verify_prints_its_verdict_before_it_writes_it(run, trt: Typed, tmp_path: Path, judged, monkeypatch):
    run("build", "--precision", "fp32", "--batch", "1", "--plans", tmp_path)
    judged["fp32"] = Verdict(passed=False, reasons=("FP32 shows [little]",), figures={}, is_decided=False)
    code, told, said = run("verify", "--tensorrt", "--plans", tmp_path)
    assert (code, "fp32: FP32 shows [little]" in told) == (1, True)
    assert said == f"written into 0 plans in {tmp_path}\n"
    monkeypatch.setattr(gpu, "rule", refuse)
    code, told, _ = run("verify", "--tensorrt", "--plans", tmp_path)
    assert (code, "fp32: FP32 shows [little]" in told) == (3, True)


def test_verify_has_no_use_for_plans_without_tensorrt(run, tmp_path: Path):
    code, _, said = run("verify", "--plans", tmp_path)
    assert code == 2
    assert "--plans is of --tensorrt" in " ".join(said.replace("│", " ").split())


@pytest.mark.parametrize("command", [("evaluate", SHIPPED), ("bundle", "verify")])
def test_a_bundle_is_scored_on_the_processor_whatever_plans_there_are(run, command, monkeypatch: pytest.MonkeyPatch):
    opened: list[tuple] = []
    monkeypatch.setattr(session, "open_session", lambda *given, **_: opened.append(given) or refuse())
    assert run(*command)[0] == 3
    assert [backend for _, backend in opened] == ["onnxruntime"]
