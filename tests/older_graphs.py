"""Graphs as bundles before phantom-unet 1.7.0 have them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from runtime import seal
from runtime.engine import COUNTS

if TYPE_CHECKING:
    from pathlib import Path


def counting(model: onnx.ModelProto, classes: int) -> onnx.ModelProto:
    """The graph with a third output: pixels of each class, which nobody asks for any more."""
    drawn = next(node.input[0] for node in model.graph.node if "labels" in node.output)
    constants = {"at_1": np.int64([1]), "sides": np.int64([2, 3]), "each": np.arange(classes, dtype=np.float32)}
    constants["each"] = constants["each"].reshape(1, -1, 1, 1)
    model.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in constants.items())
    model.graph.node.extend(
        [
            helper.make_node("Unsqueeze", [drawn, "at_1"], ["drawn"], "drawn"),
            helper.make_node("Equal", ["drawn", "each"], ["is_each"], "is_each"),
            helper.make_node("Cast", ["is_each"], ["ones"], "ones", to=TensorProto.FLOAT),
            helper.make_node("ReduceSum", ["ones", "sides"], [COUNTS], COUNTS, keepdims=0),
        ]
    )
    model.graph.output.append(helper.make_tensor_value_info(COUNTS, TensorProto.FLOAT, [None, classes]))
    return model


def bundle(folder: Path, classes: int) -> Path:
    """The intact bundle in a folder, with such a graph in FP32."""

    def put(partial: Path) -> None:
        path = partial / "model.onnx"
        path.write_bytes(counting(onnx.load(path, load_external_data=False), classes).SerializeToString())

    seal.change(folder, put)
    return folder
