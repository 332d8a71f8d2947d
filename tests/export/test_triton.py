"""Model repositories, read back by Triton's own protobuf."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from calibration.verify import logits
from export import triton
from export.errors import ExportError
from runtime import plans, seal
from runtime.bundle import SHIPPED, open_bundle
from runtime.errors import BackendError, NotVerified
from runtime.geometry import View
from runtime.kserve import BUNDLE, CHECKED, GRAPH, PRECISION
from runtime.plans import Key, Plan
from tests import older_graphs

NUMPY = {"TYPE_INT32": np.int32, "TYPE_UINT8": np.uint8, "TYPE_FP32": np.float32}


def parsed(folder: Path) -> model_config_pb2.ModelConfig:
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def named(value: int) -> str:
    return model_config_pb2.DataType.Name(value)


@pytest.mark.parametrize("precision", ["fp32", "int8-cpu"])
def test_the_configuration_says_what_the_graph_takes_and_gives(tmp_path: Path, precision: str):
    folder = triton.write(open_bundle(), precision, tmp_path)
    config = parsed(folder)
    assert (folder.name, config.name, config.backend) == (config.name, folder.name, "onnxruntime")
    model = onnx.load(folder / "1" / "model.onnx", load_external_data=False)
    assert logits(model)
    assert not any(one.external_data for one in model.graph.initializer), "Triton's copy holds its own weights"
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    hu = np.full(
        (2, *[64 if size == -1 else size for size in config.input[0].dims]), 30, NUMPY[named(config.input[0].data_type)]
    )
    answers = dict(zip([one.name for one in session.get_outputs()], session.run(None, {"hu": hu}), strict=True))
    assert {one.name for one in config.output} == set(answers)
    for one in config.output:
        assert answers[one.name].dtype == NUMPY[named(one.data_type)]
        assert answers[one.name].shape == (2, *[64 if size == -1 else size for size in one.dims])
    (group,) = config.instance_group
    assert model_config_pb2.ModelInstanceGroup.Kind.Name(group.kind) == "KIND_CPU"
    assert [one.batch_size for one in config.model_warmup] == [1, 8, 32]
    assert config.max_batch_size == 32
    said = {key: one.string_value for key, one in config.parameters.items()}
    bundle = open_bundle()
    assert (said[BUNDLE], said[GRAPH], said[PRECISION]) == (bundle.digest, bundle.sha256(precision), precision)
    assert said["sha256 model.onnx"] == hashlib.sha256((folder / "1" / "model.onnx").read_bytes()).hexdigest()
    assert config.HasField("dynamic_batching")
    assert "phantoms" in (folder / "config.pbtxt").read_text()


def test_a_network_for_volumes_gets_no_batches_of_its_answers(tmp_path: Path):
    config = parsed(triton.write(replace(open_bundle(), view=View(32, 16)), "fp32", tmp_path))
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [-1, 32, -1, -1]
    assert list(config.output[0].dims) == [-1, -1, -1]


def test_a_precision_that_has_not_passed_goes_nowhere(tmp_path: Path):
    copy = shutil.copytree(SHIPPED, tmp_path / "bundle")
    seal.add(copy, {}, rulings={})
    with pytest.raises(NotVerified):
        triton.write(open_bundle(copy), "int8-cpu", tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_of_a_graph_that_counts_pixels_that_is_not_asked_for(tmp_path: Path):
    older = older_graphs.bundle(shutil.copytree(SHIPPED, tmp_path / "bundle"), 7)
    folder = triton.write(open_bundle(older), "fp32", tmp_path / "repository")
    assert [one.name for one in parsed(folder).output] == ["labels", "evidence"]
    graph = onnx.load(folder / "1" / "model.onnx")
    assert [one.name for one in graph.graph.output] == ["labels", "evidence", "voxels"]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_what_no_processor_computes_gets_no_repository(tmp_path: Path, precision: str):
    with pytest.raises(ExportError, match=f"{precision} is TensorRT's"):
        triton.write(open_bundle(), precision, tmp_path)


def test_what_is_there_is_not_overwritten(tmp_path: Path):
    triton.write(open_bundle(), "fp32", tmp_path)
    with pytest.raises(ExportError, match=r"phantom_unet_fp32_\w+ is there already"):
        triton.write(open_bundle(), "fp32", tmp_path)


def plan_in(folder: Path, precision: str = "fp16", verdict: object = "passed", **changes: object) -> Plan:
    """A record and a plan as `scanside build` and `scanside verify --tensorrt` leave them."""
    bundle = open_bundle()
    told = {"tensorrt": "10.13.0", "driver": "12.9", "gpu": "NVIDIA A4000", "capability": "8.6"} | changes
    key = Key(bundle.name, precision, bundle.sha256(precision), 1, 512, 512, **told)
    data = json.dumps([precision, key.stem]).encode()
    plan = Plan(key, hashlib.sha256(data).hexdigest(), {"fp16": 9}, 1.0, 2.0, 0.0, verdict)
    folder.mkdir(exist_ok=True)
    (folder / f"{key.stem}.plan").write_bytes(data)
    plans.keep(folder, plan)
    return plan


def test_a_plan_of_another_format_is_none(tmp_path: Path):
    plan_in(tmp_path, format=plans.FORMAT - 1)
    with pytest.raises(ExportError, match="no fp16 plan of phantom-unet"):
        triton.write(open_bundle(), "fp16", tmp_path / "repository", engine="tensorrt", folder=tmp_path)
    plan_in(tmp_path)
    assert triton.write(open_bundle(), "fp16", tmp_path / "repository", engine="tensorrt", folder=tmp_path).is_dir()


def test_plans_of_several_gpus_are_one_model_of_one_shape(tmp_path: Path):
    here = tmp_path / "plans"
    made = [plan_in(here), plan_in(here, capability="9.0", gpu="NVIDIA H200")]
    plan_in(here, precision="int8")
    folder = triton.write(open_bundle(), "fp16", tmp_path / "repository", engine="tensorrt", folder=here)
    config = parsed(folder)
    assert (config.backend, config.max_batch_size) == ("tensorrt", 0)
    assert {**config.cc_model_filenames} == {"8.6": "model.8.6.plan", "9.0": "model.9.0.plan"}
    assert {one.name for one in (folder / "1").iterdir()} == {"model.8.6.plan", "model.9.0.plan"}
    for plan in made:
        name = f"model.{plan.key.capability}.plan"
        assert config.parameters[f"sha256 {name}"].string_value == plan.sha256
        assert hashlib.sha256((folder / "1" / name).read_bytes()).hexdigest() == plan.sha256
        assert config.parameters[f"tensorrt {plan.key.capability}"].string_value == "10.13.0"
    assert config.parameters[GRAPH].string_value == open_bundle().sha256("fp16")
    assert list(config.input[0].dims) == [1, 1, 512, 512]
    assert [list(one.dims) for one in config.output] == [[1, 512, 512], [1, 7]]
    (group,) = config.instance_group
    assert model_config_pb2.ModelInstanceGroup.Kind.Name(group.kind) == "KIND_GPU"
    cuda = config.optimization.cuda
    assert (cuda.graphs, list(cuda.graph_spec[0].input["hu"].dim)) == (True, [1, 1, 512, 512])
    assert [list(one.inputs["hu"].dims) for one in config.model_warmup] == [[1, 1, 512, 512]]
    assert not config.HasField("dynamic_batching"), "Triton makes batches of no engine with one shape"


def test_without_a_plan_the_command_that_builds_one_is_named(tmp_path: Path):
    plan_in(tmp_path, precision="int8")
    with pytest.raises(ExportError, match=r"no fp16 plan of phantom-unet.*scanside build .*--precision fp16 --batch 1"):
        triton.write(open_bundle(), "fp16", tmp_path / "repository", engine="tensorrt", folder=tmp_path)


@pytest.mark.parametrize(
    ("verdict", "words"), [(None, "not yet judged: run `scanside verify"), (("Dice 0.2",), "failed verify: Dice 0.2")]
)
def test_a_plan_that_has_not_passed_goes_nowhere(tmp_path: Path, verdict: object, words: str):
    plan_in(tmp_path, verdict=verdict)
    with pytest.raises(ExportError, match=words):
        triton.write(open_bundle(), "fp16", tmp_path / "repository", engine="tensorrt", folder=tmp_path)
    assert not (tmp_path / "repository").exists()


def test_of_two_plans_for_a_gpu_somebody_has_to_choose(tmp_path: Path):
    plan_in(tmp_path)
    plan_in(tmp_path, tensorrt="11.0.0")
    with pytest.raises(ExportError, match=r"two plans for compute capability 8\.6, of TensorRT 1.*and 1"):
        triton.write(open_bundle(), "fp16", tmp_path / "repository", engine="tensorrt", folder=tmp_path)


def test_a_plan_that_is_not_what_was_accepted_goes_nowhere(tmp_path: Path):
    plan = plan_in(tmp_path)
    (tmp_path / f"{plan.key.stem}.plan").write_bytes(b"another")
    with pytest.raises(BackendError, match="not what was accepted"):
        triton.write(open_bundle(), "fp16", tmp_path / "repository", engine="tensorrt", folder=tmp_path)


def test_the_python_backend_runs_the_same_graph(tmp_path: Path):
    folder = triton.write(open_bundle(), "fp32", tmp_path, engine="python", threads=3)
    config = parsed(folder)
    assert config.backend == "python"
    assert config.parameters["intra_op_thread_count"].string_value == "3"
    compile((folder / "1" / "model.py").read_text(), "model.py", "exec")
    (tmp_path / "other").mkdir()
    other = triton.write(open_bundle(), "fp32", tmp_path / "other", threads=3)
    assert (folder / "1" / "model.onnx").read_bytes() == (other / "1" / "model.onnx").read_bytes()


def test_the_python_backend_loads_no_other_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a Triton starts it, which hands over the configuration as JSON."""

    class Refused(Exception): ...

    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", SimpleNamespace(TritonModelException=Refused))
    folder = triton.write(open_bundle(), "fp32", tmp_path, engine="python", threads=1)
    other = triton.write(open_bundle(), "int8-cpu", tmp_path)
    spec = importlib.util.spec_from_file_location("model", folder / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parameters = {key: {"string_value": one.string_value} for key, one in parsed(folder).parameters.items()}
    config = json.dumps({"parameters": parameters})
    asked = {"model_config": config, "model_repository": str(folder), "model_version": "1"}
    module.TritonPythonModel().initialize(asked)
    shutil.copy(other / "1" / "model.onnx", folder / "1" / "model.onnx")
    with pytest.raises(
        Refused, match=f"model.onnx is another graph.* says {parameters['sha256 model.onnx']['string_value']}"
    ):
        module.TritonPythonModel().initialize(asked)
    assert parsed(folder).parameters[CHECKED].string_value == "model.py"
    assert CHECKED not in parsed(other).parameters, "Triton's own backends hash nothing"


WITHOUT = """
import sys
for name in {lost}: sys.modules[name] = None
import scanside
sys.argv = ["scanside", "bundle", "triton", "--out", {out!r}]
scanside.main()
"""


def test_it_takes_onnx_and_no_torch(tmp_path: Path):
    """What the `triton` extra installs; of the bundle that ships where none is named."""

    def written(*lost: str) -> subprocess.CompletedProcess[str]:
        code = WITHOUT.format(lost=lost, out=str(tmp_path / "repository"))
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    told = written("onnx", "torch")
    assert (told.returncode, told.stdout) == (3, "")
    assert "onnx is not installed: in scanside's checkout, pip install '.[triton]'" in told.stderr
    assert not (tmp_path / "repository").exists()
    told = written("torch", "onnxscript", "matplotlib", "tritonclient")
    assert told.returncode == 0, told.stderr
    assert [path.name for path in (tmp_path / "repository").glob("*/1/model.onnx")] == ["model.onnx"]


def test_each_bundle_is_a_model_of_its_own(tmp_path: Path):
    one, other = open_bundle(), replace(open_bundle(), digest="0" * 64)
    assert triton.write(one, "fp32", tmp_path) != triton.write(other, "fp32", tmp_path)
