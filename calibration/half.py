"""FP16 as a typed graph: what a network computes in half precision is written into it, and so is what it does not.

TensorRT 11 has no builder flag for FP16: precision is the graph's (strong typing). What comes before the first
convolution and after the last, the pre- and post-processing, stays FP32: Hounsfield units beyond 2,048 are not exact in
FP16.

In a graph with Q/DQ for TensorRT it types what is not computed on bytes. Where bytes are, FP32 stays in name: opset 17
quantises nothing else, and a cast in between would keep TensorRT from fusing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from calibration.graph import COPYING, WEIGHTED, Graph

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from numpy.typing import NDArray

LARGEST = float(np.finfo(np.float16).max)  # 65504
HEADROOM = 8.0  # an image outside the samples may excite a tensor this much more
# FP32 within the network, with the reason; what is neither here nor in HALF stays FP32 too
FULL = {
    "Softmax": "sums exponentials",
    "Exp": "leaves FP16's range at 11.1",
    "ReduceMean": "sums more values than FP16 resolves",
    "ReduceSum": "sums more values than FP16 resolves",
    "GlobalAveragePool": "sums more values than FP16 resolves",
    "InstanceNormalization": "squares and sums over a whole slice",
    "GroupNormalization": "squares and sums over a whole slice",
    "BatchNormalization": "divides by a variance that may be small; export folds what it can",
    "Pow": "leaves FP16's range early",
}
HALF = frozenset(
    {
        *WEIGHTED, "Add", "AveragePool", "Clip", "Concat", "DepthToSpace", "Div", "Elu", "Expand", "Flatten",
        "HardSigmoid", "Identity", "LeakyRelu", "MaxPool", "Mul", "Neg", "PRelu", "Pad", "Relu", "Reshape", "Resize",
        "Sigmoid", "Slice", "SpaceToDepth", "Split", "Squeeze", "Sub", "Sum", "Tanh", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
BEHIND = ("Add", "Clip", "LeakyRelu", "Relu")  # what TensorRT computes within the quantised convolution before it
STAYS_FLOAT = {"Resize": (1, 2)}  # inputs that are float32 whatever the data is: region and scales


def kept_full(model: onnx.ModelProto, peak: Mapping[str, float]) -> dict[str, str]:
    """Nodes within the network that stay FP32, and why.

    Parameters
    ----------
    peak : largest magnitude of each tensor on samples (`calibration.activations.Histogram.peak`)

    """
    graph = Graph.of(model)
    reasons = {}
    for at in sorted(graph.body - _on_bytes(graph)):
        node = graph.nodes[at]
        if node.op_type == "Constant" or not any(name in peak for name in node.output):
            continue  # sizes and other integers
        if node.op_type not in HALF:
            reasons[node.name] = f"{node.op_type} {FULL.get(node.op_type, 'is not known to be safe')}"
            continue
        far = [name for name in (*node.input, *node.output) if peak.get(name, 0.0) * HEADROOM > LARGEST]
        lost = [n for n in node.input if node.op_type not in WEIGHTED and _vanishes(graph.constant(n))]
        heavy = [n for n in node.input if np.abs(_values(graph.weight(n))).max(initial=0) > LARGEST]
        if far:
            reasons[node.name] = f"{far[0]} reaches {peak[far[0]]:.0f}: {HEADROOM:g} times that is beyond {LARGEST:.0f}"
        elif lost:
            reasons[node.name] = f"constant {lost[0]} vanishes in FP16"
        elif heavy:
            reasons[node.name] = f"weight {heavy[0]} is beyond {LARGEST:.0f}"
    return reasons


def to_half(model: onnx.ModelProto, peak: Mapping[str, float]) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Type a graph: FP16 within the network, FP32 around it and where that is safer; what goes in and out stays as is.

    Returns
    -------
    the typed graph, and the nodes within the network that stayed FP32 with the reason

    """
    full = kept_full(model, peak)
    graph = Graph.of(model)
    return _Typing(model, graph.body - _on_bytes(graph), full.keys()).run(), full


def _on_bytes(graph: Graph) -> set[int]:
    """Places of Q and DQ, of the convolutions between them, and of what TensorRT fuses into these or moves Q across."""
    found = {at for at, node in enumerate(graph.nodes) if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    for at in sorted(graph.body):
        node = graph.nodes[at]
        quantised = node.op_type == "Conv" and graph.kind_of_maker(node.input[1]) == "DequantizeLinear"
        if quantised or (node.op_type in BEHIND and any(_makes(graph, name) & found for name in node.input)):
            found.add(at)
    before = {at for at in found if graph.nodes[at].op_type == "QuantizeLinear"}
    for at in sorted(graph.body, reverse=True):
        if graph.nodes[at].op_type in COPYING and graph.after(at) & before:
            before.add(at)
    return found | before


def _makes(graph: Graph, name: str) -> set[int]:
    """The node that makes a tensor of floats; of a DQ's nothing follows for who reads it."""
    return {graph.maker[name]} if graph.kind_of_maker(name) in ("Conv", *BEHIND) else set()


def _vanishes(constant: NDArray[np.float32] | None) -> bool:
    """Whether a value that is not zero is less than FP16's smallest normal one."""
    values = np.abs(_values(constant))
    return bool(((values > 0) & (values < np.finfo(np.float16).smallest_normal)).any())


def _values(weight: NDArray[np.float32] | None) -> NDArray[np.float32]:
    return np.zeros(0, np.float32) if weight is None else weight


class _Typing:
    """One pass in the order of the graph: what type each float tensor has, and a cast where a node wants the other."""

    def __init__(self, model: onnx.ModelProto, inner: Collection[int], full: Collection[str]) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.inner, self.full = inner, full
        inferred = shape_inference.infer_shapes(model, strict_mode=True).graph
        values = [*inferred.value_info, *inferred.input, *inferred.output]
        self.kind = {value.name: value.type.tensor_type.elem_type for value in values}
        self.weights = {one.name: one for one in model.graph.initializer}
        self.kind |= {name: one.data_type for name, one in self.weights.items()}
        self.done: list[onnx.NodeProto] = []
        self.there: dict[tuple[str, int], str] = {}  # a tensor in the other type, once it is made

    def run(self) -> onnx.ModelProto:
        for at, node in enumerate(list(self.model.graph.node)):
            if node.op_type == "Shape":  # of a tensor of any type
                self.done.append(node)
                continue
            half = at in self.inner and node.op_type != "Constant" and node.name not in self.full
            wanted = TensorProto.FLOAT16 if half else TensorProto.FLOAT
            for place, name in enumerate(node.input):
                fixed = place in STAYS_FLOAT.get(node.op_type, ())
                node.input[place] = self._as(name, TensorProto.FLOAT if fixed else wanted)
            self.done.append(node)
            for name in node.output:
                if self.kind.get(name) == TensorProto.FLOAT:
                    self.kind[name] = wanted
        graph = self.model.graph
        for output in graph.output:
            if self.kind[output.name] == TensorProto.FLOAT16:
                raise ValueError(f"{output.name} comes out of the network itself, without post-processing")
        del graph.node[:], graph.value_info[:]
        graph.node.extend(self.done)
        used = {name for node in self.done for name in node.input}
        weights = [one for one in graph.initializer if one.name in used]
        del graph.initializer[:]
        graph.initializer.extend(weights)
        onnx.checker.check_model(self.model, full_check=True)
        return self.model

    def _as(self, name: str, wanted: int) -> str:
        """The tensor, in the wanted type if it is a float one."""
        kind = self.kind.get(name)
        if kind not in (TensorProto.FLOAT, TensorProto.FLOAT16) or kind == wanted:
            return name
        if (name, wanted) not in self.there:
            other = f"{name}_{'half' if wanted == TensorProto.FLOAT16 else 'float'}"
            if name in self.weights:
                values = numpy_helper.to_array(self.weights[name])
                self.model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float16), other))
            else:
                self.done.append(helper.make_node("Cast", [name], [other], name=f"{other}_cast", to=wanted))
            self.there[name, wanted] = other
        return self.there[name, wanted]
