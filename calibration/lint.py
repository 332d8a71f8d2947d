"""What a graph must not hold if TensorRT 8.6 to 11 and ONNX Runtime are all to take it.

Operators: what the parser of TensorRT 8.6.0 itself says it takes, but Dropout (`tests/export/test_tensorrt_parser.py`
asks it). Types and modes: docs/operators.md of onnx-tensorrt. Later versions take all of it, ONNX Runtime takes more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto, helper, numpy_helper, shape_inference

from runtime.engine import COUNTS, OUTPUTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx

OPSET = 17  # the newest that TensorRT 8.6 reads, and every later one and ONNX Runtime do too
OPERATORS = frozenset(
    {
        "Abs", "Acos", "Acosh", "Add", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh", "AveragePool",
        "BatchNormalization", "Cast", "Ceil", "Celu", "Clip", "Concat", "Constant", "ConstantOfShape", "Conv",
        "ConvTranspose", "Cos", "Cosh", "CumSum", "DepthToSpace", "DequantizeLinear", "Div", "Einsum", "Elu", "Equal",
        "Erf", "Exp", "Expand", "EyeLike", "Flatten", "Floor", "GRU", "Gather", "GatherElements", "GatherND", "Gemm",
        "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "Greater", "GreaterOrEqual", "GridSample", "HardSigmoid",
        "HardSwish", "Identity", "If", "InstanceNormalization", "IsInf", "IsNaN", "LRN", "LSTM", "LayerNormalization",
        "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax", "Loop", "LpNormalization", "LpPool", "MatMul", "Max",
        "MaxPool", "Mean", "MeanVarianceNormalization", "Min", "Mod", "Mul", "Neg", "Not", "OneHot", "Or", "PRelu",
        "Pad", "Pow", "QuantizeLinear", "RNN", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
        "Range", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
        "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Resize", "ReverseSequence",
        "Round", "Scan", "Scatter", "ScatterElements", "ScatterND", "Selu", "Shape", "Shrink", "Sigmoid", "Sign", "Sin",
        "Sinh", "Size", "Slice", "Softmax", "Softplus", "Softsign", "SpaceToDepth", "Split", "Sqrt", "Squeeze", "Sub",
        "Sum", "Tan", "Tanh", "ThresholdedRelu", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Upsample", "Where",
        "Xor",
    }
)  # fmt: skip
TYPES = frozenset(
    (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL)
)
RESIZE = {
    "mode": ("nearest", "linear"),
    "coordinate_transformation_mode": ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners"),
    "nearest_mode": ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil"),
}


def check(model: onnx.ModelProto) -> list[str]:
    """One sentence for each thing that an engine would refuse or misread; empty for a good graph."""
    return [*_whole(model), *(text for node in model.graph.node for text in _node(node, model)), *_tensors(model)]


def _whole(model: onnx.ModelProto) -> Iterator[str]:
    for one in model.opset_import:
        if one.domain not in ("", "ai.onnx"):
            yield f"operators of {one.domain}: TensorRT has those of ONNX alone"
        elif one.version != OPSET:
            yield f"opset {one.version}: export with {OPSET}, which TensorRT 8.6 and every later one read"
    inputs, outputs = [one.name for one in model.graph.input], [one.name for one in model.graph.output]
    if inputs != ["hu"]:
        yield f"inputs {', '.join(inputs)}: a bundle's graph has one, hu"
    if not {*OUTPUTS} <= {*outputs} <= {*OUTPUTS, COUNTS}:
        wanted = f"{', '.join(OUTPUTS)}, and nothing that only training needs"
        yield f"outputs {', '.join(outputs)}: a bundle's graph has {wanted}"


def _node(node: onnx.NodeProto, model: onnx.ModelProto) -> Iterator[str]:
    said = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    if node.op_type == "Dropout" or (node.op_type == "BatchNormalization" and said.get("training_mode")):
        yield f"{node.name}: {node.op_type} of training: call eval() before export"
    elif node.op_type not in OPERATORS:
        yield f"{node.name}: TensorRT 8.6 has no {node.op_type}"
    if node.op_type == "Resize":
        for key, taken in RESIZE.items():
            value = said.get(key, taken[0].encode())
            if value.decode() not in taken:
                yield f"{node.name}: Resize with {key} {value.decode()}: TensorRT has {', '.join(taken)}"
    constants = {one.name: one for one in model.graph.initializer}
    if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2:
        zero = constants.get(node.input[2])
        if zero is None or zero.data_type != TensorProto.INT8 or numpy_helper.to_array(zero).any():
            yield f"{node.name}: TensorRT quantises to int8 around zero"


def _tensors(model: onnx.ModelProto) -> Iterator[str]:
    for one in model.graph.initializer:
        values = numpy_helper.to_array(one)
        if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
            yield f"{one.name}: weights that are not finite"
    inferred = shape_inference.infer_shapes(model).graph  # of what is odd it need not know the shape
    ends = {one.name for one in (*model.graph.input, *model.graph.output)}
    for one in inferred.value_info:
        kind = one.type.tensor_type.elem_type
        if kind not in TYPES and one.name not in ends:
            yield f"{one.name}: TensorRT computes nothing in {TensorProto.DataType.Name(kind)}"
