"""FP16 as a typed graph."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, shape_inference

from calibration.activations import float_tensors, observe
from calibration.half import to_half
from calibration.verify import shown
from export import lint
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
    assert {kind[name] for name in ("x", "probability", "evidence", "voxels")} == {TensorProto.FLOAT}
    assert kind["labels"] == TensorProto.UINT8
    assert all(one.data_type == TensorProto.FLOAT16 for one in model.graph.initializer if one.name.endswith("w_half"))
    assert lint.check(model) == []


def test_half_precision_answers_nearly_as_full_and_is_rounded_when_asked():
    model, _ = typed(unet())
    exposed = shown(model)
    assert len(exposed.graph.output) > len(model.graph.output)
    assert (labels(exposed) != labels(unet())).mean() < 0.01


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
    assert np.isfinite(labels(model)).all()


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
