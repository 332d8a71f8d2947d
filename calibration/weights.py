"""The weights of all precisions in one file, each tensor once.

A network of 11 MB in four precisions would be 25 MB; here FP32 and FP16 share their tensors, and so do the two INT8
graphs with their FP32 remainder. It works because a bundle's kernels are rounded to FP16 at export, FP32's too: a
relative change of 2**-11 that parity with PyTorch measures. FP32 arithmetic reads them through a Cast, which ONNX
Runtime folds when it opens the graph; TensorRT wants constants: `load` gives it those.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from calibration.graph import WEIGHTED

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FILE = "weights.bin"
LEAST_BYTES = 1024  # smaller tensors stay in their graph
ALIGNED = 64
STORED = "_stored"


def rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with its kernels rounded to FP16's precision; those beyond its range stay as they are.

    Kernels alone: windows, scales, epsilons and biases are few, and some of them are exact for a reason.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kernels = {node.input[1] for node in copy.graph.node if node.op_type in WEIGHTED}
    for one in copy.graph.initializer:
        if one.name not in kernels or one.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(one)
        if np.abs(values).max(initial=0) <= np.finfo(np.float16).max:
            one.CopyFrom(numpy_helper.from_array(values.astype(np.float16).astype(np.float32), one.name))
    return copy


def store(models: Mapping[str, onnx.ModelProto], folder: Path) -> None:
    """Write graphs by file name, and ``weights.bin`` with their tensors."""
    places: dict[str, tuple[int, int]] = {}
    with (folder / FILE).open("wb") as file:
        for name, model in models.items():
            written = onnx.ModelProto()
            written.CopyFrom(model)
            casts = [cast for one in written.graph.initializer if (cast := _halved(one))]
            for one in written.graph.initializer:
                values = numpy_helper.to_array(one).tobytes()
                if len(values) < LEAST_BYTES:
                    continue
                digest = hashlib.sha256(values).hexdigest()
                if digest not in places:
                    file.write(bytes(-file.tell() % ALIGNED))
                    places[digest] = (file.tell(), len(values))
                    file.write(values)
                _refer(one, *places[digest])
            nodes = [*casts, *written.graph.node]
            del written.graph.node[:]
            written.graph.node.extend(nodes)
            (folder / name).write_bytes(written.SerializeToString())


def _halved(one: TensorProto) -> onnx.NodeProto | None:
    """Store a large FP32 tensor whose values FP16 has in FP16; the cast gives it back under its name."""
    if one.data_type != TensorProto.FLOAT:
        return None
    values, name = numpy_helper.to_array(one), one.name
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if half.nbytes < LEAST_BYTES or (half.astype(np.float32) != values).any():
        return None
    one.CopyFrom(numpy_helper.from_array(half, name + STORED))
    return helper.make_node("Cast", [one.name], [name], name=f"{name}_cast", to=TensorProto.FLOAT)


def _refer(one: TensorProto, offset: int, length: int) -> None:
    one.ClearField("raw_data")
    for field in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
        one.ClearField(field)
    one.data_location = TensorProto.EXTERNAL
    for key, value in (("location", FILE), ("offset", offset), ("length", length)):
        one.external_data.add(key=key, value=str(value))


def load(path: Path) -> onnx.ModelProto:
    """Read a graph with its weights as constants of their own type: one that needs no other file."""
    model = onnx.load(path)
    stored = {one.name: one for one in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "Cast" and node.input[0] in stored and node.input[0].endswith(STORED):
            one = stored[node.input[0]]
            one.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(one).astype(np.float32), node.output[0]))
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model
