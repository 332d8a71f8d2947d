"""FP16 as a typed graph."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, shape_inference

from calibration import lint, placement
from calibration.activations import Probe, float_tensors, observe
from calibration.emulation import rounded_everywhere
from calibration.half import to_half
from tests.calibration.made import conv, graph, shipped, unet, views


def typed(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, str]]:
    seen = observe(model, float_tensors(model), views())
    return to_half(model, {name: one.peak for name, one in seen.items()})


def kinds(model: onnx.ModelProto) -> dict[str, int]:
    inferred = shape_inference.infer_shapes(model, strict_mode=True).graph
    return {one.name: one.type.tensor_type.elem_type for one in (*inferred.value_info, *inferred.output)}


def labels(model: onnx.ModelProto) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["labels"], {"hu": np.stack(views()).astype(np.int32)})[0]


def test_the_network_is_half_and_what_surrounds_it_is_not():
    model, full = typed(unet())
    kind = kinds(model)
    assert full == {}
    assert {kind[f"{name}.out"] for name in ("first", "merge", "head")} == {TensorProto.FLOAT16}
    assert {kind[name] for name in ("x", "probability", "evidence")} == {TensorProto.FLOAT}
    assert kind["labels"] == TensorProto.UINT8
    assert all(one.data_type == TensorProto.FLOAT16 for one in model.graph.initializer if one.name.endswith("w_half"))
    assert lint.check(model) == []


def test_emulated_half_precision_rounds_between_operators():
    """2048 and a half is 2048 in FP16: what was added is lost, however an engine fuses."""
    w: dict[str, np.ndarray] = {"far": np.float32(2048)}
    nodes = [
        conv("one", "x", w, (1, 4)),
        helper.make_node("Add", ["one.out", "far"], ["up"], name="up"),
        helper.make_node("Sub", ["up", "far"], ["down"], name="down"),
        conv("two", "down", w, (4, 3)),
    ]
    model, full = typed(graph(nodes, w, "two.out"))
    assert full == {}
    emulated = rounded_everywhere(model)
    names = ["one.out", "down"]
    read = Probe(emulated, names).read(views()[0])
    assert (read["one.out"] == read["one.out"].astype(np.float16)).all()
    expected = (read["one.out"].astype(np.float16) + np.float16(2048)) - np.float16(2048)
    assert (read["down"] == expected).all()
    assert (read["down"] != read["one.out"]).mean() > 0.5, "nothing was lost, so nothing was rounded"


def test_half_precision_answers_nearly_as_full():
    model, _ = typed(unet())
    assert (labels(rounded_everywhere(model)) != labels(unet())).mean() < 0.01


def test_beside_bytes_a_graph_for_tensorrt_is_half():
    """The transposed convolution, the gate and the logits in FP16; around Q, DQ and what is fused with them FP32."""
    seen = observe(unet(), float_tensors(unet()), views())
    span = placement.spans(unet(), seen, "minmax")
    placed = placement.for_tensorrt(unet(), span, placement.layers(unet()))
    model, full = to_half(placed, {name: one.peak for name, one in seen.items()})
    kind = kinds(model)
    assert full == {}
    assert {kind[name] for name in ("up", "head.out")} == {TensorProto.FLOAT16}
    fused = ("first.out", "a", "second.out", "sum", "pooled", "deep.out", "both")
    assert {name: kind[name] for name in fused} == dict.fromkeys(fused, TensorProto.FLOAT)
    halves = {node.input[0] for node in model.graph.node if node.op_type == "Cast"} & {"a", "pooled", "first.out"}
    readers = {name: [node.op_type for node in model.graph.node if name in node.input] for name in halves}
    assert all("QuantizeLinear" in kinds_of for kinds_of in readers.values()), "no cast between a layer and its Q"
    assert lint.check(model) == []
    assert (labels(rounded_everywhere(model)) != labels(placed)).mean() < 0.01


def test_a_constant_that_vanishes_in_half_precision_keeps_its_operator():
    w: dict[str, np.ndarray] = {"tiny": np.float32(1e-8)}
    nodes = [
        conv("one", "x", w, (1, 4)),
        helper.make_node("Abs", ["one.out"], ["abs"], name="abs"),
        helper.make_node("Add", ["abs", "tiny"], ["safe"], name="epsilon"),
        helper.make_node("Div", ["one.out", "safe"], ["sign"], name="divide"),
        conv("two", "sign", w, (4, 3)),
    ]
    _, full = typed(graph(nodes, w, "two.out"))
    assert full["epsilon"] == "constant tiny vanishes in FP16"


def beyond(weight: float) -> onnx.ModelProto:
    """A network whose second convolution gets or holds values that FP16 has not."""
    w: dict[str, np.ndarray] = {}
    nodes = [conv("one", "x", w, (1, 4)), conv("two", "one.out", w, (4, 4)), conv("three", "two.out", w, (4, 3))]
    w["one.w"] *= weight
    return graph(nodes, w, "three.out")


def test_an_activation_that_may_overflow_keeps_its_operators_in_full_precision():
    model, full = typed(beyond(1e5))
    assert set(full) == {"one", "two", "three"}
    assert "reaches" in full["two"]
    assert "65504" in full["two"]
    emulated = Probe(rounded_everywhere(model), ["three.out"]).read(views()[0])["three.out"]
    assert np.isfinite(emulated).all()
    reckless, _ = to_half(beyond(1e5), dict.fromkeys(float_tensors(beyond(1e5)), 1.0))  # as if nothing were measured
    assert not np.isfinite(Probe(rounded_everywhere(reckless), ["three.out"]).read(views()[0])["three.out"]).all()


def test_a_weight_beyond_half_precision_is_kept():
    heavy = beyond(1.0)
    one = next(w for w in heavy.graph.initializer if w.name == "two.w")
    values = numpy_helper.to_array(one).copy()
    values[0, 0, 0, 0] = 1e5
    one.CopyFrom(numpy_helper.from_array(values, "two.w"))
    seen = dict.fromkeys(float_tensors(heavy), 1.0)
    model, full = to_half(heavy, seen)
    assert full == {"two": "weight two.w is beyond 65504"}
    assert kinds(model)["two.out"] == TensorProto.FLOAT


def test_operators_that_sum_or_divide_stay_full_and_say_why():
    w: dict[str, np.ndarray] = {"s": np.ones(4, np.float32), "t": np.zeros(4, np.float32)}
    nodes = [
        conv("one", "x", w, (1, 4)),
        helper.make_node("InstanceNormalization", ["one.out", "s", "t"], ["normal"], name="norm"),
        conv("two", "normal", w, (4, 3)),
    ]
    model, full = typed(graph(nodes, w, "two.out"))
    assert full == {"norm": "InstanceNormalization squares and sums over a whole slice"}
    assert (kinds(model)["one.out"], kinds(model)["normal"]) == (TensorProto.FLOAT16, TensorProto.FLOAT)


def test_the_scales_of_a_resize_stay_full():
    model, _ = typed(shipped())
    kind = kinds(model) | {one.name: one.data_type for one in model.graph.initializer}
    resizes = [node for node in model.graph.node if node.op_type == "Resize"]
    assert len(resizes) > 2
    for node in resizes:
        assert all(kind[name] == TensorProto.FLOAT for name in node.input[1:3] if name)


def test_a_network_that_ends_in_an_output_itself_is_refused():
    w: dict[str, np.ndarray] = {}
    model = graph([conv("one", "x", w, (1, 3))], w, "one.out")
    model.graph.output.append(helper.make_tensor_value_info("one.out", TensorProto.FLOAT, ["N", 3, "H", "W"]))
    with pytest.raises(ValueError, match="one.out comes out of the network itself"):
        typed(model)
