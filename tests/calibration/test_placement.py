"""Q and DQ where TensorRT fuses behind them, and where ONNX Runtime has integer kernels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from calibration import lint, placement
from calibration.activations import observe
from calibration.graph import Graph
from tests.calibration.made import conv, graph, shipped, unet, views


def placed(model: onnx.ModelProto, precision: str, layers: list[str] | None = None) -> onnx.ModelProto:
    seen = observe(model, placement.tensors(model), views())
    span = placement.spans(model, seen, "minmax")
    return placement.PLACEMENTS[precision](model, span, placement.layers(model) if layers is None else layers)


def quantised(model: onnx.ModelProto) -> set[str]:
    """Names of the tensors that go through Q and DQ."""
    return {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}


def constant(model: onnx.ModelProto, name: str) -> np.ndarray:
    return next(numpy_helper.to_array(one) for one in model.graph.initializer if one.name == name)


def scale(model: onnx.ModelProto, tensor: str) -> float:
    return float(constant(model, f"{tensor}_scale"))


def test_gates_logits_and_transposed_convolutions_are_left_out():
    assert placement.layers(unet()) == ["first", "second", "deep", "merge"]


def test_tensorrt_gets_inputs_and_kernels_and_one_side_of_a_residual_sum():
    model = placed(unet(), "int8")
    kernels = {f"{name}.w" for name in ("first", "second", "deep", "merge")}
    assert quantised(model) == kernels | {"x", "a", "pooled", "both", "gated"}, (
        "not `up`: TensorRT fuses no Q behind a transposed convolution"
    )
    residual = next(node for node in model.graph.node if node.name == "residual")
    assert list(residual.input) == ["second.out", "a_dequantized"], "the convolution's own side stays: it is fused"
    assert not any(name.endswith(".out") for name in quantised(model)), "outputs of convolutions are left alone"


def test_tensorrt_gets_signed_symmetric_activations_and_a_scale_per_channel_of_a_kernel():
    model = placed(unet(), "int8")
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = constant(model, node.input[2])
            assert zero.dtype == np.int8
            assert not zero.any()
    assert constant(model, "merge.w_scale").shape == (16,)
    kernel = constant(model, "merge.w")
    assert constant(model, "merge.w_scale") == pytest.approx(np.abs(kernel).reshape(16, -1).max(1) / 127)


def test_what_is_concatenated_or_pooled_shares_a_scale():
    model = placed(unet(), "int8")
    assert scale(model, "both") == scale(model, "gated")
    seen = observe(unet(), ["up", "gated", "both"], views())
    assert scale(model, "both") == pytest.approx(max(one.peak for one in seen.values()) / 127, rel=1e-3)


def test_one_pair_serves_all_who_read_a_tensor():
    pairs = Counter(node.input[0] for node in placed(unet(), "int8").graph.node if node.op_type == "QuantizeLinear")
    assert set(pairs.values()) == {1}


def test_the_graph_for_tensorrt_holds_nothing_that_it_refuses():
    assert lint.check(placed(unet(), "int8")) == []
    assert lint.check(placed(shipped(), "int8")) == []


@pytest.mark.parametrize("make", [unet, shipped])
def test_every_quantised_layer_runs_on_bytes_on_the_processor(make, tmp_path: Path):
    model = make()
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    made = placed(model, "int8-cpu").SerializeToString()
    onnxruntime.InferenceSession(made, options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert kinds["QLinearConv"] == len(placement.layers(model))
    graph = Graph.of(model)
    assert kinds["Conv"] + kinds["FusedConv"] == len(graph.convolutions()) - len(placement.layers(model))


@pytest.mark.parametrize("precision", placement.PLACEMENTS)
def test_nothing_is_quantised_where_no_layer_is(precision: str):
    assert quantised(placed(unet(), precision, [])) == set()


@pytest.mark.parametrize("precision", placement.PLACEMENTS)
def test_leaving_a_layer_out_leaves_its_kernel_as_it_is(precision: str):
    model = placed(unet(), precision, ["second", "deep"])
    merge = next(node for node in model.graph.node if node.name == "merge")
    assert merge.input[1] == "merge.w"
    assert constant(model, "merge.w") == pytest.approx(constant(unet(), "merge.w"))


@pytest.mark.parametrize("precision", placement.PLACEMENTS)
def test_eight_bits_answer_nearly_as_32_do(precision: str):
    def labels(model: onnx.ModelProto) -> np.ndarray:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(["labels"], {"hu": np.stack(views()).astype(np.int32)})[0]

    full = labels(unet())
    assert (labels(placed(unet(), precision)) != full).mean() < 0.03
    assert len(np.unique(full)) == 3, "a graph with one answer tests nothing"


@pytest.mark.parametrize("precision", placement.PLACEMENTS)
def test_sizes_and_constants_in_a_network_are_no_activations(precision: str):
    """A resize to a skip's own size computes with integers; a sum with a Constant node has one activation."""
    w: dict[str, np.ndarray] = {"one": np.array([1]), "two": np.array([2]), "four": np.array([4])}
    node = onnx.helper.make_node
    offset = numpy_helper.from_array(np.full((1, 16, 1, 1), 0.1, np.float32))
    nodes = [
        conv("first", "x", w, (1, 16)),
        node("MaxPool", ["first.out"], ["pooled"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        conv("deep", "pooled", w, (16, 16)),
        node("Constant", [], ["offset"], name="offset", value=offset),
        node("Add", ["deep.out", "offset"], ["shifted"], name="shift"),
        node("Shape", ["first.out"], ["size"], name="size"),
        node("Shape", ["shifted"], ["small"], name="small"),
        node("Slice", ["small", "zero", "two"], ["front"], name="front"),
        node("Slice", ["size", "two", "four"], ["back"], name="back"),
        node("Concat", ["front", "back"], ["target"], name="sizes", axis=0),
        node("Resize", ["shifted", "", "", "target"], ["large"], name="resize", mode="nearest"),
        node("Concat", ["large", "first.out"], ["both"], name="join", axis=1),
        conv("merge", "both", w, (32, 16)),
        conv("head", "merge.out", w, (16, 3), 1),
    ]
    model = graph(nodes, w | {"zero": np.array([0])}, "head.out")
    assert not {"size", "small", "front", "target", "offset"} & set(placement.tensors(model))
    assert quantised(placed(model, precision))
