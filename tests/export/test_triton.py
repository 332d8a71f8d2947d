"""Model repositories, read back by Triton's own protobuf."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from calibration.verify import logits
from export import triton
from export.graph import ExportError
from runtime import seal
from runtime.bundle import SHIPPED, open_bundle
from runtime.errors import NotVerified
from runtime.geometry import View
from runtime.kserve import BUNDLE, GRAPH, PRECISION

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


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_what_no_processor_computes_gets_no_repository(tmp_path: Path, precision: str):
    with pytest.raises(ExportError, match=f"{precision} is TensorRT's"):
        triton.write(open_bundle(), precision, tmp_path)


def test_what_is_there_is_not_overwritten(tmp_path: Path):
    triton.write(open_bundle(), "fp32", tmp_path)
    with pytest.raises(ExportError, match=r"phantom_unet_fp32_\w+ is there already"):
        triton.write(open_bundle(), "fp32", tmp_path)
