"""A checkpoint's network to ONNX: batch norm folded, HU in, labels out, any batch and any slice size."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import onnx
import torch
from onnx import checker, numpy_helper

from calibration.lint import OPSET
from export.errors import ExportError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from models.graph import HeadCT


TRACED = 2  # views in the batch that is traced


def to_onnx(graph: HeadCT) -> onnx.ModelProto:
    """Trace the network with its pre- and post-processing.

    Input ``hu`` int32 ``(N, shown, H, W)``; outputs ``labels`` uint8 ``(N * answered, H, W)`` and ``evidence``
    float32 ``(N * answered, classes)``.

    Raises
    ------
    ExportError : an operator that ONNX has not, or a graph that its checker refuses; `calibration.lint` looks closer.
        Batch norm behind a concatenation has no convolution to fold into and stays, with its constants

    """
    hu = torch.zeros(TRACED, graph.shown, 2 * graph.grid, 2 * graph.grid, dtype=torch.int32)
    sizes = {"labels": {0: "answered", 1: "H", 2: "W"}, "evidence": {0: "answered"}}
    return _of_any_batch(traced(graph.eval(), (hu,), {"hu": {0: "N", 2: "H", 3: "W"}}, sizes))


def _of_any_batch(model: onnx.ModelProto) -> onnx.ModelProto:
    """Let a reshape that has kept the size of the traced batch take that of its input (0 copies it).

    The transformer of MONAI's UNETR reshapes by einops, whose sizes are plain numbers to a trace. Where the first of
    them was no batch, the graph answers other batches wrongly or not at all: export runs it with two sizes.
    """
    shapes = {node.output[0]: node for node in model.graph.node if node.op_type == "Constant"}
    for node in model.graph.node:
        shape = shapes.get(node.input[1]) if node.op_type == "Reshape" else None
        if shape is None:
            continue
        sizes = numpy_helper.to_array(shape.attribute[0].t).copy()
        if sizes.size > 1 and sizes[0] == TRACED:
            sizes[0] = 0
            shape.attribute[0].t.CopyFrom(numpy_helper.from_array(sizes))
    return model


def traced(
    module: nn.Module,
    arguments: tuple[Tensor, ...],
    inputs: dict[str, dict[int, str]],
    outputs: dict[str, dict[int, str]],
) -> onnx.ModelProto:
    """Trace a module with these arguments; of inputs and outputs by name, the axes of any size.

    Raises
    ------
    ExportError : as of `to_onnx`

    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # of the tracing exporter, which is the one that writes opset 17
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", message="ONNX export mode is set to TrainingMode.EVAL")  # the lint finds it
        try:
            torch.onnx.export(
                module,
                arguments,
                buffer,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_axes=inputs | outputs,
                opset_version=OPSET,
                do_constant_folding=True,
                dynamo=False,  # the tracing exporter writes opset 17 directly; the newer one converts down from 18
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error).partition("\n")[0]
            raise ExportError(f"ONNX of opset {OPSET} can't say what the network computes: {reason}") from error
    model = onnx.load_from_string(buffer.getvalue())
    try:
        checker.check_model(model, full_check=True)
    except checker.ValidationError as error:
        raise ExportError(f"ONNX's checker refuses the graph: {error}") from error
    return model
