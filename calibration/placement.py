"""Where 8 bits begin and end: Q/DQ placed for TensorRT, and from the same ranges for ONNX Runtime's CPU kernels.

The same Q/DQ graph is not fast on both. TensorRT takes signed symmetric activations, wants the inputs of weighted
operators quantised and their outputs left alone, so that it can fuse bias, addition and activation behind them. ONNX
Runtime's integer convolutions need a quantised output too, and are fastest with unsigned activations (U8S8).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from calibration.activations import SIGNED, UNSIGNED, float_tensors
from calibration.graph import Graph

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from calibration.activations import Histogram

# operators that ONNX Runtime's CPU provider computes on bytes, or carries bytes through
ON_BYTES = (
    "Add", "AveragePool", "Concat", "Conv", "DepthToSpace", "GlobalAveragePool", "LeakyRelu", "MaxPool", "Mul", "Relu",
    "Reshape", "Resize", "Slice", "Transpose",
)  # fmt: skip

SEVERAL = ("Add", "Concat", "Mul")  # all of whose inputs are data


def layers(model: onnx.ModelProto) -> list[str]:
    """Names of the convolutions that may be quantised, in order.

    Left out for good: those that make the logits, for 8 bits of them are too few to compare, and those of gates.
    Transposed convolutions never were: TensorRT does not fuse behind them, and ONNX Runtime has no integer kernel.
    """
    graph = Graph.of(model)
    out = graph.gates() | graph.last()
    return [graph.nodes[at].name for at in graph.convolutions() if at not in out]


def tensors(model: onnx.ModelProto) -> list[str]:
    """Names of the activations whose ranges either placement may ask for."""
    graph = Graph.of(model)
    names: dict[str, None] = {}
    for at in sorted(graph.body):
        node = graph.nodes[at]
        if node.op_type in ON_BYTES:
            data = node.input if node.op_type in SEVERAL else node.input[:1]
            names |= dict.fromkeys(name for name in (*data, *node.output) if name and name not in graph.weights)
    floats = set(float_tensors(model))  # sizes are tensors too
    return [name for name in names if name in floats]


def spans(
    model: onnx.ModelProto, seen: Mapping[str, Histogram], method: str, steps: int = SIGNED
) -> dict[str, tuple[float, float]]:
    """(lowest, highest) quantised value of each tensor; tensors that must share a scale get what holds them all.

    Parameters
    ----------
    steps : of the placement's bytes (`STEPS`)

    """
    alike = Graph.of(model).alike()
    own = {name: histogram.span(method, steps) for name, histogram in seen.items()}
    shared: dict[str, tuple[float, float]] = {}
    for name, (low, high) in own.items():
        root = alike.get(name, name)
        at_least, at_most = shared.get(root, (0.0, 0.0))
        shared[root] = min(low, at_least), max(high, at_most)
    return {name: shared[alike.get(name, name)] for name in own}


def for_tensorrt(
    model: onnx.ModelProto, span: Mapping[str, tuple[float, float]], quantised: Collection[str]
) -> onnx.ModelProto:
    """Q/DQ by the rules of TensorRT's explicit quantisation.

    Inputs and kernels of the quantised convolutions (signed, symmetric; kernels per output channel), the inputs of a
    concatenation that one of them reads, and of a residual sum the side that is not the fused convolution's own.
    Outputs and biases are left alone.

    Parameters
    ----------
    span : of `tensors`
    quantised : names among `layers`

    """
    graph = Graph.of(model)
    chosen = {at for at in graph.convolutions() if graph.nodes[at].name in quantised}
    placed = _Placed(graph, span)
    for at in sorted(chosen):
        placed.activation(at, 0)
        placed.kernel(at)
        source = graph.maker.get(graph.nodes[at].input[0])
        while source is not None and graph.nodes[source].op_type in ("MaxPool", "Resize", "Identity"):
            source = graph.maker.get(graph.nodes[source].input[0])
        if source in graph.body and graph.nodes[source].op_type == "Concat":
            for place, name in enumerate(graph.nodes[source].input):
                if graph.kind_of_maker(name) != "ConvTranspose":  # TensorRT does not fuse Q behind one
                    placed.activation(source, place)
    for at in graph.body:
        node = graph.nodes[at]
        sides = [graph.maker.get(name) for name in node.input]
        fused = [i for i, side in enumerate(sides) if side in chosen and len(graph.after(side)) == 1]
        if node.op_type == "Add" and fused and all(name in span for name in node.input):  # not a constant
            placed.activation(at, 1 - fused[0])
    return placed.model()


class _Placed:
    """Pairs of Q and DQ, one for each tensor, and who reads their output."""

    def __init__(self, graph: Graph, span: Mapping[str, tuple[float, float]]) -> None:
        self._graph, self._span = graph, span
        self._model = onnx.ModelProto()
        self._model.CopyFrom(graph.model)
        self._pairs: dict[str, list[onnx.NodeProto]] = {}

    def activation(self, at: int, place: int) -> None:
        name = self._graph.nodes[at].input[place]
        low, high = self._span[name]
        reach = max(-low, high) or 1.0  # a tensor that is always zero may have any scale
        self._through(at, place, np.float32(reach / 127), np.int8(0), {})

    def kernel(self, at: int) -> None:
        values = self._graph.weight(self._graph.nodes[at].input[1])
        reach = np.abs(values).reshape(len(values), -1).max(1)
        scale = np.where(reach > 0, reach, 1).astype(np.float32) / np.float32(127)
        self._through(at, 1, scale, np.zeros(len(values), np.int8), {"axis": 0})

    def _through(self, at: int, place: int, scale: object, zero: object, attributes: dict[str, int]) -> None:
        name = self._graph.nodes[at].input[place]
        if name not in self._pairs:
            for suffix, values in (("scale", scale), ("zero_point", zero)):
                self._model.graph.initializer.append(numpy_helper.from_array(np.asarray(values), f"{name}_{suffix}"))
            sides = [f"{name}_scale", f"{name}_zero_point"]
            quantised, back = f"{name}_quantized", f"{name}_dequantized"
            self._pairs[name] = [
                helper.make_node("QuantizeLinear", [name, *sides], [quantised], name=f"{name}_Q", **attributes),
                helper.make_node("DequantizeLinear", [quantised, *sides], [back], name=f"{name}_DQ", **attributes),
            ]
        self._model.graph.node[at].input[place] = f"{name}_dequantized"

    def model(self) -> onnx.ModelProto:
        nodes = list(self._model.graph.node)
        del self._model.graph.node[:], self._model.graph.value_info[:]
        graph = self._graph
        for name, pair in self._pairs.items():
            if name not in graph.maker:
                self._model.graph.node.extend(pair)
        for node in nodes:
            self._model.graph.node.append(node)
            for name in node.output:
                self._model.graph.node.extend(self._pairs.get(name, ()))
        onnx.checker.check_model(self._model, full_check=True)
        return self._model


def for_onnxruntime(
    model: onnx.ModelProto, span: Mapping[str, tuple[float, float]], quantised: Collection[str]
) -> onnx.ModelProto:
    """Q/DQ around all that ONNX Runtime's CPU provider computes on bytes: unsigned activations, signed 7-bit kernels.

    Of 7 bits, because processors without VNNI add pairs of products in 16, which would saturate: what was verified on
    one machine must hold on another. A stretch between two quantised convolutions stays on bytes; gates and logits are
    floating point.

    Parameters
    ----------
    span, quantised : as of `for_tensorrt`

    """
    graph = Graph.of(model)
    on_bytes = _on_bytes(graph, quantised)
    ranges = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high if high > low else low + 1))
        for name, (low, high) in span.items()
    }
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    quantizer = QDQQuantizer(
        copy,
        per_channel=True,
        reduce_range=True,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, ranges),
        nodes_to_quantize=[graph.nodes[at].name for at in sorted(on_bytes)],
        nodes_to_exclude=[],
        op_types_to_quantize=sorted({graph.nodes[at].op_type for at in on_bytes}),
        extra_options={"ActivationSymmetric": False, "WeightSymmetric": True, "ForceQuantizeNoInputCheck": False},
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    made = quantizer.model.model
    onnx.checker.check_model(made)
    return made


def _on_bytes(graph: Graph, quantised: Collection[str]) -> set[int]:
    """Quantised convolutions, and what lies between them: all its inputs are bytes, and someone wants bytes of it."""
    convolutions = {at for at in graph.convolutions() if graph.nodes[at].name in quantised}
    between = {
        at
        for at in graph.body - graph.gates()
        if graph.nodes[at].op_type in ON_BYTES and graph.nodes[at].op_type != "Conv"
    }
    while True:
        inside = convolutions | between
        lone = {at for at in between if not _sources(graph, at) <= inside or not graph.after(at) & inside}
        if not lone:
            return inside
        between -= lone


def _sources(graph: Graph, at: int) -> set[int]:
    """Places of the nodes whose data a node computes on; -1 for a constant or the graph's input."""
    node = graph.nodes[at]
    data = node.input if node.op_type in SEVERAL else node.input[:1]
    return {graph.maker.get(name, -1) for name in data}


STEPS = {"int8": SIGNED, "int8-cpu": UNSIGNED}
PLACEMENTS: dict[str, Callable[[onnx.ModelProto, Mapping[str, tuple[float, float]], Collection[str]], onnx.ModelProto]]
PLACEMENTS = {"int8": for_tensorrt, "int8-cpu": for_onnxruntime}
