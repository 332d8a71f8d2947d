"""Plans: what is accepted, what is loaded, and what is said where there is none."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from calibration.verify import verify
from runtime import caps, engine, gpu, plans
from runtime.bundle import open_bundle
from runtime.device import CudaBindings
from runtime.errors import BackendError, DeviceLost, InferenceError, NoPlan, NotVerified, SelfTestFailed
from runtime.plans import Key, Plan
from runtime.session import open_session
from runtime.verdict import Verdict
from tests.calibration.made import heads
from tests.runtime.stand_ins import Cuda, Trt

BUNDLE = open_bundle()
PASSED = Verdict(passed=True, reasons=(), figures={})


def named(path: Path) -> bytes:
    """The stand-in's graphs are their paths."""
    return str(path).encode()


@pytest.fixture
def cuda() -> Cuda:
    return Cuda()


@pytest.fixture
def trt(cuda: Cuda) -> Trt:
    return Trt(cuda)


def key(trt: Trt, cuda: Cuda, precision: str = "fp16", batch: int = 1) -> Key:
    return Key.of(BUNDLE, precision, (batch, 512, 512), trt, CudaBindings(runtime=cuda).about())


def made(folder: Path, trt: Trt, cuda: Cuda, precision: str = "fp16", batch: int = 1) -> Plan:
    trt.types = {"fp32": "FP32", "fp16": "FP16", "int8": "Int8"}[precision]
    return gpu.make(
        BUNDLE,
        key(trt, cuda, precision, batch),
        folder,
        trt=trt,
        read=named,
    )


@pytest.fixture
def at_hand(monkeypatch: pytest.MonkeyPatch, trt: Trt, cuda: Cuda) -> None:
    """A machine with a GPU and TensorRT."""
    monkeypatch.setattr(caps, "load", lambda: trt)
    monkeypatch.setattr(gpu, "open_device", lambda: CudaBindings(runtime=cuda))
    monkeypatch.setattr(gpu, "TIMED", 1)


pytestmark = pytest.mark.usefixtures("at_hand")


@pytest.fixture
def gate_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of other things: golden slices take a while."""
    monkeypatch.setattr(gpu, "self_test", lambda *_: 0.0)


def test_a_plan_that_answers_as_the_bundle_says_is_kept_with_its_proof(tmp_path: Path, trt: Trt, cuda: Cuda):
    plan = made(tmp_path, trt, cuda)
    found, data = plans.load(tmp_path, key(trt, cuda), BUNDLE)
    assert found == plan
    assert json.loads(data)["shape"] == [1, 1, 512, 512]
    assert plan.layers == {"fp32": 0, "fp16": 2, "int8": 0}
    assert plan.golden_disagreement <= 1e-3
    assert plan.batch_ms > 0
    assert len(json.loads((tmp_path / f"{plan.key.stem}.layers").read_text())["Layers"]) == 2
    assert cuda.held == {}, "the trial gave the GPU back"


@pytest.mark.usefixtures("gate_left_open")
def test_what_it_cost_to_time_tactics_is_kept_and_used_again(tmp_path: Path, trt: Trt, cuda: Cuda):
    made(tmp_path, trt, cuda)
    (cache,) = tmp_path.glob("timing-*.cache")
    assert cache.name == "timing-10.13.0-Stand-in-GPU-8.6.cache"
    assert cache.read_bytes() == b"what was timed"
    cache.write_bytes(b"another GPU's")
    made(tmp_path, trt, cuda, batch=2)
    assert cache.read_bytes() == b"what was timed"


def test_an_engine_in_another_precision_is_not_accepted(tmp_path: Path, trt: Trt, cuda: Cuda):
    trt.types = "FP32"
    with pytest.raises(BackendError, match="asked for fp16, and of the engine's convolutions are 2 in fp32"):
        gpu.make(BUNDLE, key(trt, cuda), tmp_path, trt=trt, read=named)
    assert not list(tmp_path.glob("*.plan"))
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda name, values: values[..., ::-1] if name == "labels" else values, SelfTestFailed),
        (lambda _, __: None, InferenceError),
    ],
)
def test_an_engine_with_other_answers_is_not_accepted(tmp_path: Path, trt: Trt, cuda: Cuda, spoil, error):
    trt.spoil = spoil
    with pytest.raises(error):
        made(tmp_path, trt, cuda)
    assert not list(tmp_path.glob("*.json"))
    assert cuda.held == {}


@pytest.mark.parametrize(
    ("refuses", "message"),
    [("parse", "does not take the graph: no such operator"), ("build", "built no engine: it gives no reason")],
)
def test_a_build_that_fails_names_the_reason_and_leaves_nothing(
    tmp_path: Path, trt: Trt, cuda: Cuda, refuses: str, message: str
):
    trt.refuses.add(refuses)
    with pytest.raises(BackendError, match=message):
        made(tmp_path, trt, cuda)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("gate_left_open")
def test_an_interrupted_build_leaves_no_plan(tmp_path: Path, trt: Trt, cuda: Cuda, monkeypatch: pytest.MonkeyPatch):
    write = plans.write

    def stop(path: Path, data: bytes) -> None:
        if path.suffix == ".json":
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(plans, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, trt, cuda)
    assert list(plans.accepted(tmp_path)) == []
    with pytest.raises(BackendError, match="no fp16 plan"):
        plans.load(tmp_path, key(trt, cuda), BUNDLE)


@pytest.mark.usefixtures("gate_left_open")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tensorrt": "8.6.1"}, "the nearest, fp16 1 x 512 x 512, is of tensorrt 8.6.1, now 10.13.0"),
        ({"gpu": "NVIDIA T4", "capability": "7.5"}, "gpu NVIDIA T4, now Stand-in GPU; capability 7.5, now 8.6"),
        ({"driver": "12.2"}, "driver 12.2, now 12.4"),
        ({"sha256": "0" * 64}, "sha256 0000"),
    ],
)
def test_a_plan_of_something_else_is_never_loaded_and_the_difference_is_named(
    tmp_path: Path, trt: Trt, cuda: Cuda, changed: dict, message: str
):
    plan = made(tmp_path, trt, cuda)
    other = dataclasses.replace(plan, key=dataclasses.replace(plan.key, **changed))
    for path in tmp_path.glob(f"{plan.key.stem}.*"):
        path.rename(tmp_path / f"{other.key.stem}{path.suffix}")
    (tmp_path / f"{other.key.stem}.json").write_text(json.dumps(dataclasses.asdict(other)))
    with pytest.raises(BackendError, match=message) as caught:
        plans.load(tmp_path, plan.key, BUNDLE)
    where = f"{BUNDLE.folder} --plans {tmp_path}"
    assert f"run `scanside build {where} --precision fp16 --batch 1 --size 512x512`" in str(caught.value)
    assert plans.fitting(tmp_path, plan.key) == []


@pytest.mark.usefixtures("gate_left_open")
def test_a_plan_whose_bytes_changed_is_not_loaded(tmp_path: Path, trt: Trt, cuda: Cuda):
    plan = made(tmp_path, trt, cuda)
    path = tmp_path / f"{plan.key.stem}.plan"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(BackendError, match="not what was accepted"):
        plans.load(tmp_path, plan.key, BUNDLE)


@pytest.mark.usefixtures("gate_left_open")
def test_a_plan_under_another_name_is_not_loaded(tmp_path: Path, trt: Trt, cuda: Cuda):
    one, other = made(tmp_path, trt, cuda), key(trt, cuda, batch=8)
    for path in tmp_path.glob(f"{one.key.stem}.*"):
        path.rename(tmp_path / f"{other.stem}{path.suffix}")
    with pytest.raises(BackendError, match="not what was accepted"):
        plans.load(tmp_path, other, BUNDLE)


@pytest.mark.usefixtures("gate_left_open")
@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": {}}', '{"key": 1, "sha256": 2}'])
def test_a_broken_record_is_no_plan(tmp_path: Path, trt: Trt, cuda: Cuda, text: str):
    plan = made(tmp_path, trt, cuda)
    (tmp_path / f"{plan.key.stem}.json").write_text(text)
    found, (wrong,) = plans.survey(tmp_path)
    assert found == []
    assert wrong.startswith(f"{tmp_path / plan.key.stem}.json: not a plan of this version: ")
    with pytest.raises(BackendError, match="not a plan of this version: .*: run `scanside build"):
        plans.load(tmp_path, plan.key, BUNDLE)


@pytest.mark.usefixtures("gate_left_open")
@pytest.mark.parametrize("entry", [{"batch_ms": None}, {"layers": {"fp16": "2"}}, {"verdict": 3}, {"failed": []}])
def test_a_record_of_wrong_types_is_named_and_the_others_are_used(tmp_path: Path, trt: Trt, cuda: Cuda, entry: dict):
    plan, other = made(tmp_path, trt, cuda), made(tmp_path, trt, cuda, batch=2)
    told = dataclasses.asdict(plan) | entry
    (tmp_path / f"{plan.key.stem}.json").write_text(json.dumps(told))
    found, (wrong,) = plans.survey(tmp_path)
    assert found == [other]
    assert f".json: not a plan of this version: {next(iter(entry))}" in wrong
    session = open_session(BUNDLE, plans=tmp_path)
    assert session.identity.backend.startswith("tensorrt")
    session.close()


def test_a_folder_that_is_none_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    assert f"{tmp_path / 'file'}: Not a directory" in open_session(BUNDLE, plans=tmp_path / "file").why
    with pytest.raises(BackendError, match=f"{tmp_path / 'file'}: plans can't be written: File exists: name another"):
        next(gpu.make_all(BUNDLE, "fp16", [(1, 512, 512)], tmp_path / "file", read=named))


def test_the_nearest_plan_is_sought_in_every_precision_and_batch(tmp_path: Path, trt: Trt, cuda: Cuda, gate_left_open):
    plan = made(tmp_path, trt, cuda, "fp32", 8)
    for path in tmp_path.glob(f"{plan.key.stem}.*"):
        path.unlink()
    plans.keep(tmp_path, dataclasses.replace(plan, key=dataclasses.replace(plan.key, driver="12.2")))
    why = open_session(BUNDLE, plans=tmp_path).why
    assert (
        "no fp32 or fp16 or int8 plan of phantom-unet; the nearest, fp32 8 x 512 x 512, is of driver 12.2, now" in why
    )
    assert why.endswith(f"run `scanside build {BUNDLE.folder} --plans {tmp_path}`")


def test_without_a_home_auto_serves_on_the_processor(monkeypatch: pytest.MonkeyPatch):
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    session = open_session(BUNDLE)
    assert session.identity.backend.startswith("onnxruntime")
    assert session.why.endswith("no home folder: name --plans or model.plans")


@pytest.mark.usefixtures("gate_left_open")
def test_auto_takes_the_plans_and_says_so(tmp_path: Path, trt: Trt, cuda: Cuda):
    for precision in ("fp32", "fp16"):
        made(tmp_path, trt, cuda, precision)
    slower, faster = sorted(plans.accepted(tmp_path), key=lambda one: one.key.precision == "fp16")
    for plan, ms in ((slower, 5.0), (faster, 1.0)):
        told = dataclasses.asdict(dataclasses.replace(plan, batch_ms=ms))
        (tmp_path / f"{plan.key.stem}.json").write_text(json.dumps(told))
    session = open_session(BUNDLE, plans=tmp_path)
    assert (session.identity.precision, session.identity.backend) == ("fp16", "tensorrt 10.13.0 Stand-in GPU")
    judge = f"run `scanside verify {BUNDLE.folder} --plans {tmp_path} --tensorrt`"
    assert session.why == f"there are plans for this GPU: 1 in 1.00 ms, the fastest; not yet judged: {judge}"
    session.close()
    gpu.rule(tmp_path, BUNDLE, {"fp32": PASSED})
    session = open_session(BUNDLE, "tensorrt", precision="fp32", plans=tmp_path)
    assert session.why == "asked for: 1 in 5.00 ms"
    session.close()


@pytest.mark.usefixtures("gate_left_open")
def test_memory_that_runs_out_is_a_reason_for_the_processor(tmp_path: Path, trt: Trt, cuda: Cuda):
    made(tmp_path, trt, cuda)
    cuda.free = 1 << 20
    session = open_session(BUNDLE, plans=tmp_path)
    assert session.identity.backend.startswith("onnxruntime")
    assert "MiB are needed" in session.why
    assert cuda.held == {}


@pytest.mark.usefixtures("gate_left_open")
def test_a_gpu_that_hangs_while_plans_are_opened_is_not_waited_for(
    tmp_path: Path, trt: Trt, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
):
    made(tmp_path, trt, cuda)
    cuda.hangs = True
    monkeypatch.setattr("runtime.trt.TrtSession.__init__.__kwdefaults__", {"watchdog_s": 0.2})
    with pytest.raises(DeviceLost):
        open_session(BUNDLE, plans=tmp_path)


@pytest.mark.usefixtures("gate_left_open")
def test_what_a_verdict_has_against_a_plan_keeps_it_from_service(tmp_path: Path, trt: Trt, cuda: Cuda):
    made(tmp_path, trt, cuda)
    against = Verdict(passed=False, reasons=("subdural: Dice 0.91",), figures={})
    assert gpu.rule(tmp_path, BUNDLE, {"fp16": dataclasses.replace(against, is_decided=False)}) == 0
    assert [one.verdict for one in plans.accepted(tmp_path)] == [None]
    assert gpu.rule(tmp_path, BUNDLE, {"fp16": against}) == 1
    failed = "fp16 1 x 512 x 512 failed verify: subdural: Dice 0.91"
    with pytest.raises(BackendError, match=f"no fp16 plan of .* that has passed: {failed}: run .* --again`"):
        open_session(BUNDLE, "tensorrt", precision="fp16", plans=tmp_path)
    (row,) = gpu.make_all(BUNDLE, "fp16", [(1, 512, 512)], tmp_path, read=named)
    assert (row["state"], row["types"]) == ("failed", f"{failed}: use --again")
    open_session(BUNDLE, "tensorrt", precision="fp16", plans=tmp_path, on_trial=True).close()
    assert gpu.rule(tmp_path, BUNDLE, {"fp16": PASSED}) == 1
    assert [one.verdict for one in plans.accepted(tmp_path)] == ["passed"]
    open_session(BUNDLE, "tensorrt", precision="fp16", plans=tmp_path).close()
    gpu.rule(tmp_path, BUNDLE, {"fp16": against})
    (row,) = gpu.make_all(BUNDLE, "fp16", [(1, 512, 512)], tmp_path, read=named, again=True)
    assert row["state"] == "built"
    open_session(BUNDLE, "tensorrt", precision="fp16", plans=tmp_path).close()


@pytest.mark.usefixtures("gate_left_open")
def test_what_the_machine_lacks_is_no_verdict(tmp_path: Path, trt: Trt, cuda: Cuda):
    made(tmp_path, trt, cuda)
    assert gpu.to_judge(BUNDLE, tmp_path, writing=True) == (["fp16"], ["fp32", "int8"])
    cuda.free, free = 1 << 20, cuda.free
    with pytest.raises(BackendError, match="MiB are needed"):
        verify(BUNDLE, [], [], on_gpu=["fp16"], plans=tmp_path)
    cuda.free = free
    small = dataclasses.replace(heads()[0], hu=heads()[0].hu[:, :320, :320])
    with pytest.raises(NoPlan, match=f"scanside build {BUNDLE.folder} --plans {tmp_path} --size 320x320`"):
        verify(BUNDLE, [small], [], on_gpu=["fp16"], plans=tmp_path)
    assert cuda.held == {}
    (path,) = tmp_path.glob("*.plan")
    path.write_bytes(b"")
    with pytest.raises(BackendError, match="not what was accepted"):
        gpu.to_judge(BUNDLE, tmp_path, writing=False)
    with pytest.raises(BackendError, match="no fp32 or fp16 or int8 plan"):
        gpu.to_judge(BUNDLE, tmp_path / "nowhere", writing=False)


@pytest.mark.usefixtures("gate_left_open")
def test_the_fastest_is_that_of_a_shape_that_all_have(tmp_path: Path, trt: Trt, cuda: Cuda):
    for precision, batch, ms in (("fp16", 1, 2.0), ("fp16", 8, 8.0), ("int8", 8, 4.0)):
        plan = made(tmp_path, trt, cuda, precision, batch)
        told = dataclasses.asdict(dataclasses.replace(plan, batch_ms=ms))
        (tmp_path / f"{plan.key.stem}.json").write_text(json.dumps(told))
    session = open_session(BUNDLE, plans=tmp_path)
    assert session.identity.precision == "int8", "8 in 4 ms against 8 in 8: that FP16 has one in 2 is no matter"
    session.close()


@pytest.mark.usefixtures("gate_left_open")
def test_a_damaged_plan_is_built_again(tmp_path: Path, trt: Trt, cuda: Cuda):
    trt.types = "FP16"

    def build() -> list[str]:
        return [row["state"] for row in gpu.make_all(BUNDLE, "fp16", [(1, 512, 512)], tmp_path, read=named)]

    assert [build(), build()] == [["built"], ["there already"]]
    (path,) = tmp_path.glob("*.plan")
    path.write_bytes(b"")
    assert build() == ["built"]
    path.unlink()
    assert build() == ["built"]
    assert path.stat().st_mode & 0o777 == 0o644, "an administrator builds, the node's user reads"


def test_auto_without_a_plan_takes_the_processor_and_says_why(tmp_path: Path):
    session = open_session(BUNDLE, plans=tmp_path)
    assert session.identity.backend.startswith("onnxruntime")
    assert session.why.startswith(
        f"the processor, for want of a GPU's engine: {tmp_path}: no fp32 or fp16 or int8 plan of phantom-unet: run `"
    )


def test_who_asks_for_tensorrt_gets_it_or_an_error(tmp_path: Path, cuda: Cuda):
    with pytest.raises(BackendError, match="no fp16 plan of phantom-unet: run `scanside build .* --precision fp16`"):
        open_session(BUNDLE, "tensorrt", precision="fp16", plans=tmp_path)
    assert cuda.held == {}


def test_who_asks_for_tensorrt_gets_no_processor_whatever_the_precision(tmp_path: Path):
    with pytest.raises(BackendError, match="int8-cpu is not for tensorrt: it takes fp32, fp16, int8") as caught:
        open_session(BUNDLE, "tensorrt", precision="int8-cpu", plans=tmp_path)
    assert caught.value.exit_code == 2
    with pytest.raises(BackendError, match="; or set precision to auto: the processor has no fp16") as caught:
        open_session(BUNDLE, precision="fp16", plans=tmp_path)
    assert caught.value.exit_code == 3
    assert open_session(BUNDLE, "auto", precision="int8-cpu", plans=tmp_path).identity.precision == "int8-cpu"


@pytest.mark.usefixtures("gate_left_open")
def test_a_precision_that_has_not_passed_is_not_served(tmp_path: Path, trt: Trt, cuda: Cuda):
    made(tmp_path, trt, cuda)
    untried = dataclasses.replace(BUNDLE, manifest=BUNDLE.manifest.model_copy(update={"rulings": {}}))
    with pytest.raises(NotVerified, match="fp16 is not verified"):
        open_session(untried, "tensorrt", precision="fp16", plans=tmp_path)
    assert open_session(untried, plans=tmp_path).identity.precision == "fp32"
    assert open_session(untried, "tensorrt", precision="fp16", plans=tmp_path, on_trial=True)


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        # TensorRT 8.6
        ({"LayerType": "CaskConvolution", "Inputs": [{"Format/Datatype": "Row major linear FP32"}]}, "fp32"),
        ({"LayerType": "CaskConvolution", "Inputs": [{"Format/Datatype": "Channel major FP16 format"}]}, "fp16"),
        (
            {"LayerType": "CaskConvolution", "Inputs": [{"Format/Datatype": "Thirty-two wide channel vectorized row "
            "major Int8 format"}]},
            "int8",
        ),
        # TensorRT 10 and 11
        ({"LayerType": "CaskConvolution", "Inputs": [{"Format/Datatype": "Half"}]}, "fp16"),
        ({"LayerType": "CaskDeconvolutionV2", "Inputs": [{"Format/Datatype": "Float"}]}, "fp32"),
        ({"LayerType": "kgen", "Inputs": [{"DataType": "Half"}]}, "fp16"),
    ],
)  # fmt: skip
def test_the_inspectors_words_are_understood(report: dict, expected: str):
    assert {name for name, count in engine.layer_types(json.dumps({"Layers": [report]})).items() if count} == {expected}


def test_a_report_without_types_proves_nothing():
    layers = engine.layer_types(json.dumps({"Layers": ["names alone"]}))
    with pytest.raises(BackendError, match="none that tells its type"):
        engine.check_types("fp16", layers)


def test_an_fp32_engine_holds_nothing_shorter():
    engine.check_types("fp32", {"fp32": 3, "fp16": 0, "int8": 0})
    with pytest.raises(BackendError, match="asked for fp32"):
        engine.check_types("fp32", {"fp32": 3, "fp16": 1, "int8": 0})
    engine.check_types("int8", {"fp32": 1, "fp16": 2, "int8": 9})
    with pytest.raises(BackendError, match="asked for fp16, and of the engine's convolutions are 9 in fp32, 1 in fp16"):
        engine.check_types("fp16", {"fp32": 9, "fp16": 1, "int8": 0})
