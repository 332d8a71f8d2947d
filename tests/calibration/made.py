"""Small graphs and series that the tests of calibration share."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from calibration.samples import Series
from calibration.weights import load
from runtime.bundle import open_bundle
from training.lesions import Lesion
from training.phantom import Scan, make

CLASSES = ("background", "intracerebral", "subdural")


def graph(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], out: str, channels: int = 1) -> onnx.ModelProto:
    """HU in, labels and evidence out, around nodes from ``x`` (N, channels, H, W) to `out` (N, 3, H, W)."""
    constants = {"scale": np.float32(100)}
    around = [
        helper.make_node("Cast", ["hu"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "scale"], ["x"], name="window"),
        *nodes,
        helper.make_node("Softmax", [out], ["probability"], name="softmax", axis=1),
        helper.make_node("ReduceMax", ["probability"], ["evidence"], name="most", axes=[2, 3], keepdims=0),
        helper.make_node("ArgMax", [out], ["argmax"], name="argmax", axis=1, keepdims=1),
        helper.make_node("Cast", ["argmax"], ["argmax_float"], name="argmax_float", to=TensorProto.FLOAT),
        helper.make_node("Squeeze", ["argmax_float", "axis"], ["flat"], name="flat"),
        helper.make_node("Cast", ["flat"], ["labels"], name="labels", to=TensorProto.UINT8),
    ]
    stored = {**constants, "axis": np.array([1]), **weights}
    made = helper.make_model(
        helper.make_graph(
            around,
            "tiny",
            [helper.make_tensor_value_info("hu", TensorProto.INT32, ["N", channels, "H", "W"])],
            [
                helper.make_tensor_value_info("labels", TensorProto.UINT8, ["N", "H", "W"]),
                helper.make_tensor_value_info("evidence", TensorProto.FLOAT, ["N", 3]),
            ],
            [numpy_helper.from_array(np.asarray(values), name) for name, values in stored.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.checker.check_model(made, full_check=True)
    return made


def conv(
    name: str, source: str, weights: dict[str, np.ndarray], channels: tuple[int, int], size: int = 3
) -> onnx.NodeProto:
    """A convolution with random weights, which it adds."""
    rng = np.random.default_rng(sum(map(ord, name)))
    weights[f"{name}.w"] = (
        rng.normal(size=(channels[1], channels[0], size, size)) / np.sqrt(channels[0] * size**2)
    ).astype(np.float32)
    weights[f"{name}.b"] = rng.normal(size=channels[1]).astype(np.float32) / 10
    return helper.make_node(
        "Conv", [source, f"{name}.w", f"{name}.b"], [f"{name}.out"], name=name, pads=[size // 2] * 4
    )


def unet() -> onnx.ModelProto:
    """All that placement has rules for: a residual sum, pooling, a gate, a concatenation, a transposed convolution."""
    w: dict[str, np.ndarray] = {}
    w["up.w"] = (np.random.default_rng(5).normal(size=(16, 16, 2, 2)) / 4).astype(np.float32)
    node = helper.make_node
    nodes = [
        conv("first", "x", w, (1, 16)),
        node("Relu", ["first.out"], ["a"], name="relu.a"),
        conv("second", "a", w, (16, 16)),
        node("Add", ["second.out", "a"], ["sum"], name="residual"),
        node("Relu", ["sum"], ["skip"], name="relu.skip"),
        node("MaxPool", ["skip"], ["pooled"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        conv("deep", "pooled", w, (16, 16)),
        node("Relu", ["deep.out"], ["d"], name="relu.d"),
        node("ConvTranspose", ["d", "up.w"], ["up"], name="up", strides=[2, 2]),
        conv("psi", "up", w, (16, 1), 1),
        node("Sigmoid", ["psi.out"], ["gate"], name="sigmoid"),
        node("Mul", ["skip", "gate"], ["gated"], name="gating"),
        node("Concat", ["up", "gated"], ["both"], name="concat", axis=1),
        conv("merge", "both", w, (32, 16)),
        node("Relu", ["merge.out"], ["m"], name="relu.m"),
        conv("head", "m", w, (16, 3), 1),
    ]
    return graph(nodes, w, "head.out")


def views(count: int = 4, side: int = 64) -> list[np.ndarray]:
    """Smooth random slices of HU, ``(1, side, side)``."""
    rng = np.random.default_rng(2)
    coarse = rng.normal(scale=120, size=(count, 1, side // 8, side // 8))
    return list(np.kron(coarse, np.ones((8, 8))).astype(np.int16))


@lru_cache(maxsize=1)
def heads() -> tuple[Series, ...]:
    """Three phantoms with blood, small enough for a test."""
    made = []
    for seed, blood in (
        (1, ("intracerebral", "subarachnoid")),
        (2, ("subdural", "contusion")),
        (3, ("epidural", "intraventricular")),
    ):
        phantom = make(tuple(Lesion(name, 14.0) for name in blood), Scan((7.0,), matrix=512), seed=seed)
        made.append(Series.stacked(f"phantom {seed}", phantom.slices, "phantom"))
    return tuple(made)


@lru_cache(maxsize=1)
def shipped() -> onnx.ModelProto:
    """The graph that ships, in FP32."""
    return load(open_bundle().graph("fp32"))
