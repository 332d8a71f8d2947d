"""FP16 on a processor, as it will be rounded elsewhere: FP32 arithmetic with every tensor rounded to FP16.

ONNX Runtime's CPU provider has no FP16 kernels. It computes such a graph in FP32 and hands unrounded values from
operator to operator, even where a tensor is an output. So here the roundings are operators of their own: those it
keeps.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference


def rounded_everywhere(model: onnx.ModelProto) -> onnx.ModelProto:
    """A typed FP16 graph in FP32 arithmetic, each FP16 tensor of which goes through FP16 and back.

    What it does not show: sums within an operator, which a GPU may itself keep in FP16 or in FP32.
    """
    inferred = shape_inference.infer_shapes(model, strict_mode=True).graph
    half = {one.name for one in inferred.value_info if one.type.tensor_type.elem_type == TensorProto.FLOAT16}
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    for one in graph.initializer:
        if one.data_type == TensorProto.FLOAT16:
            one.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(one).astype(np.float32), one.name))
    nodes = []
    for node in graph.node:
        if node.op_type == "Cast" and helper.get_attribute_value(node.attribute[0]) == TensorProto.FLOAT16:
            (attribute,) = node.attribute
            attribute.i = TensorProto.FLOAT
        nodes.append(node)
        for place, name in enumerate(node.output):
            if name in half:
                node.output[place] = f"{name}_exact"
                nodes.append(helper.make_node("Cast", [f"{name}_exact"], [f"{name}_rounded"], to=TensorProto.FLOAT16))
                nodes.append(helper.make_node("Cast", [f"{name}_rounded"], [name], to=TensorProto.FLOAT))
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(kept)
    onnx.checker.check_model(made, full_check=True)
    return made
