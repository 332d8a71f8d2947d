"""Graphs that an engine would refuse, found before it does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, checker, helper, numpy_helper

from calibration import lint
from tests import older_graphs
from tests.calibration.made import conv, graph, shipped, unet


def put(model: onnx.ModelProto, operator: str, **attributes: object) -> None:
    """Put an operator behind the first convolution."""
    model.graph.node[2].output[0] = "moved"
    model.graph.node.insert(3, helper.make_node(operator, ["moved"], ["first.out"], name="odd", **attributes))


def double(model: onnx.ModelProto) -> None:
    put(model, "Cast", to=TensorProto.FLOAT)
    model.graph.node[3].input[0] = "doubled"
    model.graph.node.insert(3, helper.make_node("Cast", ["moved"], ["doubled"], name="double", to=TensorProto.DOUBLE))


def resize(model: onnx.ModelProto) -> None:
    at = next(i for i, node in enumerate(model.graph.node) if node.name == "pool")
    pool = model.graph.node[at]
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 1, 0.5, 0.5], np.float32), "half"))
    made = helper.make_node("Resize", [pool.input[0], "", "half"], list(pool.output), name="odd", mode="cubic")
    pool.CopyFrom(made)


def opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 18


def domain(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def output(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_empty_tensor_value_info("gate"))


def infinite(model: onnx.ModelProto) -> None:
    one = next(w for w in model.graph.initializer if w.name == "first.w")
    one.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(one), np.inf), "first.w"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (opset, "opset 18: export with 17"),
        (domain, "operators of com.microsoft"),
        (output, "outputs labels, evidence, gate: a bundle's graph has labels, evidence, and nothing"),
        (infinite, "first.w: weights that are not finite"),
        (resize, "odd: Resize with mode cubic: TensorRT has nearest, linear"),
        (lambda model: put(model, "Det"), "odd: TensorRT 8.6 has no Det"),
        (lambda model: put(model, "Dropout"), "odd: Dropout of training"),
        (double, "doubled: TensorRT computes nothing in DOUBLE"),
    ],
)
def test_what_an_engine_would_refuse_is_named(spoil: Callable[[onnx.ModelProto], None], message: str):
    model = unet()
    assert lint.check(model) == []
    spoil(model)
    found = lint.check(model)
    assert any(message in text for text in found), found


def test_counts_that_older_bundles_have_are_let_pass():
    model = older_graphs.counting(unet(), 3)
    checker.check_model(model, full_check=True)
    assert lint.check(model) == []


def test_quantisation_that_is_not_around_zero_is_named():
    w: dict[str, np.ndarray] = {"s": np.float32(0.1), "z": np.uint8(128)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="odd"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], name="odder"),
        conv("one", "y", w, (1, 3)),
    ]
    found = lint.check(graph(nodes, w, "one.out"))
    assert "odd: TensorRT quantises to int8 around zero" in found
    assert "odder: TensorRT quantises to int8 around zero" in found


def test_the_shipped_graph_is_one_that_every_engine_takes():
    assert lint.check(shipped()) == []
