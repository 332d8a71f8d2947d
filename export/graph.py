"""A checkpoint's network to ONNX: batch norm folded, HU in, labels out, any batch and any slice size."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import onnx
import torch
from onnx import checker

from runtime.errors import ScansideError

if TYPE_CHECKING:
    from models.graph import HeadCT

OPSET = 17  # the newest that TensorRT 8.6 reads, and every later one and ONNX Runtime do too


class ExportError(ScansideError):
    """A network that can't become a bundle."""


def to_onnx(graph: HeadCT) -> onnx.ModelProto:
    """Trace the network with its pre- and post-processing.

    Input ``hu`` int32 ``(N, shown, H, W)``; outputs ``labels`` uint8 ``(N * answered, H, W)``, ``voxels`` and
    ``evidence`` float32 ``(N * answered, classes)``.

    Raises
    ------
    ExportError : batch norm or dropout in training mode, an operator that ONNX has not, or a graph that its checker
        refuses. Batch norm behind a concatenation has no convolution to fold into and stays, with its constants

    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # of the tracing exporter, which is the one that writes opset 17
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", message="ONNX export mode is set to TrainingMode.EVAL")  # an error below
        try:
            torch.onnx.export(
                graph.eval(),
                (torch.zeros(2, graph.shown, 2 * graph.grid, 2 * graph.grid, dtype=torch.int32),),
                buffer,
                input_names=["hu"],
                output_names=["labels", "voxels", "evidence"],
                dynamic_axes={
                    "hu": {0: "N", 2: "H", 3: "W"},
                    "labels": {0: "answered", 1: "H", 2: "W"},
                    "voxels": {0: "answered"},
                    "evidence": {0: "answered"},
                },
                opset_version=OPSET,
                do_constant_folding=True,
                dynamo=False,  # the tracing exporter writes opset 17 directly; the newer one converts down from 18
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error).partition("\n")[0]
            raise ExportError(f"ONNX of opset {OPSET} can't say what the network computes: {reason}") from error
    model = onnx.load_from_string(buffer.getvalue())
    left = sorted({node.op_type for node in model.graph.node if _is_training(node)})
    if left:
        raise ExportError(f"{', '.join(left)} of training in the exported graph: call eval() before export")
    try:
        checker.check_model(model, full_check=True)
    except checker.ValidationError as error:
        raise ExportError(f"ONNX's checker refuses the graph: {error}") from error
    return model


def _is_training(node: onnx.NodeProto) -> bool:
    trains = any(attribute.name == "training_mode" and attribute.i for attribute in node.attribute)
    return node.op_type == "Dropout" or (node.op_type == "BatchNormalization" and trains)
