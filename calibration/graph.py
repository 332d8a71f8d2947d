"""An ONNX graph with its neighbourhoods: who makes a tensor, who reads it, and where the network itself lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnx import TensorProto, numpy_helper

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# what comes out are values that went in, or lie between them: one scale serves both sides
COPYING = ("Concat", "DepthToSpace", "Flatten", "Identity", "MaxPool", "Reshape", "Resize", "Slice", "Transpose")


@dataclass(frozen=True)
class Graph:
    """A model, indexed.

    Attributes
    ----------
    nodes : in topological order, as ONNX demands
    maker : place of the node that makes each tensor
    readers : places of the nodes that read each tensor
    weights : initializers by name
    body : places of the network's own nodes: from the first weighted operator to the last, on any path between two of
        them. Before it lies the pre-processing, after it the post-processing

    """

    model: onnx.ModelProto
    nodes: list[onnx.NodeProto]
    maker: dict[str, int]
    readers: dict[str, list[int]]
    weights: dict[str, onnx.TensorProto]
    body: frozenset[int]

    @classmethod
    def of(cls, model: onnx.ModelProto) -> Graph:
        nodes = list(model.graph.node)
        maker = {name: at for at, node in enumerate(nodes) for name in node.output}
        readers: dict[str, list[int]] = {}
        for at, node in enumerate(nodes):
            for name in dict.fromkeys(node.input):
                readers.setdefault(name, []).append(at)
        weights = {one.name: one for one in model.graph.initializer}
        return cls(model, nodes, maker, readers, weights, _body(nodes, maker))

    def weight(self, name: str) -> NDArray[np.float32] | None:
        """Values of a constant tensor of FP32, ``None`` for anything else."""
        one = self.weights.get(name)
        return numpy_helper.to_array(one) if one is not None and one.data_type == TensorProto.FLOAT else None

    def constant(self, name: str) -> NDArray[np.float32] | None:
        """Values of a constant tensor of FP32, an initializer's or a Constant's; None for anything else."""
        at = self.maker.get(name)
        if at is None or self.nodes[at].op_type != "Constant":
            return self.weight(name)
        tensors = [one.t for one in self.nodes[at].attribute if one.name == "value"]
        floats = [one for one in tensors if one.data_type == TensorProto.FLOAT]
        return numpy_helper.to_array(floats[0]) if floats else None

    def kind_of_maker(self, name: str) -> str | None:
        """Operator that makes a tensor; None for a constant or an input."""
        return self.nodes[self.maker[name]].op_type if name in self.maker else None

    def after(self, at: int) -> set[int]:
        return {reader for name in self.nodes[at].output for reader in self.readers.get(name, ())}

    def convolutions(self) -> list[int]:
        """Places of the network's convolutions with constant kernels, in order."""
        return [
            at
            for at in sorted(self.body)
            if self.nodes[at].op_type == "Conv" and self.weight(self.nodes[at].input[1]) is not None
        ]

    def gates(self) -> set[int]:
        """Places of what only ever reaches the rest through a sigmoid or softmax: attention, which 8 bits blur."""
        found: set[int] = set()
        for at in sorted(self.body, reverse=True):
            after = self.after(at)
            gating = self.nodes[at].op_type in ("Sigmoid", "HardSigmoid", "Softmax")
            if gating or (after and after <= found):
                found.add(at)
        return found

    def last(self) -> set[int]:
        """Places of the weighted operators after which no other comes: those that make the logits."""
        return {at for at in self.body if self.nodes[at].op_type in WEIGHTED and not self.after(at) & self.body}

    def alike(self) -> dict[str, str]:
        """Tensors of the network that must share a scale, each with the name of one of them for all."""
        of: dict[str, str] = {}

        def root(name: str) -> str:
            while of.setdefault(name, name) != name:
                name = of[name]
            return name

        for at in self.body:
            node = self.nodes[at]
            if node.op_type in COPYING:
                data = node.input if node.op_type == "Concat" else node.input[:1]
                for name in data:
                    of[root(name)] = root(node.output[0])
        return {name: root(name) for name in list(of)}


def _body(nodes: list[onnx.NodeProto], maker: dict[str, int]) -> frozenset[int]:
    before = [{maker[name] for name in node.input if name in maker} for node in nodes]
    weighted = [node.op_type in WEIGHTED for node in nodes]
    after_first = list(weighted)
    for at in range(len(nodes)):
        after_first[at] |= any(after_first[i] for i in before[at])
    before_last = list(weighted)
    for at in reversed(range(len(nodes))):
        if before_last[at]:
            for i in before[at]:
                before_last[i] = True
    inside = (after and ahead for after, ahead in zip(after_first, before_last, strict=True))
    return frozenset(at for at, within in enumerate(inside) if within)
