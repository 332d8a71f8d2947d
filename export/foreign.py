"""A finished ONNX network, such as one from MONAI, between scanside's own pre- and post-processing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx
import onnxruntime
import torch
from onnx import compose, version_converter
from torch import Tensor, nn

from calibration.lint import OPSET
from export.errors import ExportError
from export.graph import traced
from models.graph import HeadCT
from runtime.engine import OUTPUTS

if TYPE_CHECKING:
    from pathlib import Path

    from training.recipe import Contract


@dataclass(frozen=True)
class _Config:
    classes: int


class Foreign(nn.Module):
    """A network that only ONNX Runtime can compute: what a bundle made of it is held against.

    Parameters
    ----------
    model : one input ``(N, channels, G, G)`` float32 in [0, 1], one output of logits ``(N, classes, G, G)``; one logit
        of blood alone, of two classes

    """

    def __init__(self, model: onnx.ModelProto, classes: int) -> None:
        super().__init__()
        self.config = _Config(classes)
        opset = max(one.version for one in model.opset_import if one.domain in ("", "ai.onnx"))
        self.reference = f"onnxruntime {onnxruntime.__version__} with the file as it was given, opset {opset}"
        self._session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        self._input = model.graph.input[0].name

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self._session.run(None, {self._input: x.numpy()})[0])


class _Before(nn.Module):
    def __init__(self, graph: HeadCT) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, hu: Tensor) -> tuple[Tensor, Tensor]:
        return self.graph.prepare(hu), hu + 0


class _After(nn.Module):
    def __init__(self, graph: HeadCT) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, logits: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
        return self.graph.answer(logits, shown)


def surround(path: Path, contract: Contract) -> tuple[HeadCT, onnx.ModelProto]:
    """A network from a file, as a module to compare with and as the graph of a bundle.

    Raises
    ------
    ExportError : no ONNX file, more than one input or output, an operator set that can't be converted to 17, or a
        network that does not answer what the contract shows it with logits for its classes

    """
    given = _read(path)
    foreign = _converted(given, path)
    if contract.input.depth:
        raise ExportError(f"{contract.name} has a depth: a network of volumes from elsewhere is not taken")
    view, classes = contract.input.view, len(contract.classes)
    grid, channels = contract.input.grid, len(contract.input.windows_hu) * view.shown
    asked = torch.zeros(2, channels, grid, grid)
    first = given.graph.input[0].type.tensor_type.shape.dim[:1]
    if first and first[0].dim_value:
        raise ExportError(
            f"{path}: takes batches of {first[0].dim_value} alone: export it with a dynamic first axis "
            '(torch.onnx.export: dynamic_axes={"x": {0: "N"}})'
        )
    try:
        answered = tuple(Foreign(given, classes)(asked).shape)
    except Exception as error:  # onnxruntime's exceptions share no base class below Exception
        raise ExportError(
            f"{path}: does not take an input of shape {tuple(asked.shape)}, as {contract.name} shows it "
            f"({len(contract.input.windows_hu)} windows of {view.shown} slices, grid {grid}): {error}"
        ) from error
    if answered != (2, classes, grid, grid) and (answered, classes) != ((2, 1, grid, grid), 2):
        raise ExportError(
            f"{path}: answers with {answered}: {contract.name} has {classes} classes on a grid of {grid}, so logits "
            f"are of shape {(2, classes, grid, grid)}"
        )
    graph = HeadCT(Foreign(given, answered[1]), contract.input.windows_hu, grid, view.shown).eval()
    sizes = {0: "N", 2: "H", 3: "W"}
    hu = torch.zeros(2, view.shown, 2 * grid, 2 * grid, dtype=torch.int32)
    before = traced(_Before(graph), (hu,), {"hu": sizes}, {"x": {0: "N"}, "shown": sizes})
    after = traced(
        _After(graph), (torch.zeros(2, answered[1], grid, grid), hu), {"logits": {0: "N"}, "shown": sizes},
        {"labels": {0: "N", 1: "H", 2: "W"}, "evidence": {0: "N"}},
    )  # fmt: skip
    parts = [
        compose.add_prefix(part, f"{name}/")
        for part, name in ((before, "before"), (foreign, "network"), (after, "after"))
    ]
    for part in parts:
        part.ir_version = before.ir_version
    inner, outer = parts[1].graph.input[0].name, parts[1].graph.output[0].name
    joined = compose.merge_models(parts[0], parts[1], io_map=[("before/x", inner)])
    joined = compose.merge_models(joined, parts[2], io_map=[(outer, "after/logits"), ("before/shown", "after/shown")])
    _rename(joined, {"before/hu": "hu", **{f"after/{name}": name for name in OUTPUTS}})
    onnx.checker.check_model(joined, full_check=True)
    return graph, joined


def _read(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except OSError as error:
        raise ExportError(f"{path}: {error.strerror}") from None
    except Exception as error:  # protobuf's and the checker's
        raise ExportError(f"{path}: no valid ONNX model: {error}") from error
    constants = {one.name for one in model.graph.initializer}
    inputs = [one for one in model.graph.input if one.name not in constants]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        told = f"{len(inputs)} inputs and {len(model.graph.output)} outputs"
        raise ExportError(f"{path}: {told}: export it with one input, the slices, and one output, the logits")
    return model


def _converted(given: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The same network in the opset of bundles, each node with a name, constants as initializers."""
    model = onnx.ModelProto()
    model.CopyFrom(given)
    version = next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), 0)
    if version != OPSET:
        try:
            model = version_converter.convert_version(model, OPSET)
        except Exception as error:  # ConvertError, RuntimeError and what protobuf raises
            raise ExportError(
                f"{path}: opset {version} can't be converted to {OPSET}: export it again: {error}"
            ) from error
    nodes = []
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
        tensors = [one.t for one in node.attribute if node.op_type == "Constant" and one.name == "value"]
        if tensors:
            tensors[0].name = node.output[0]
            model.graph.initializer.append(tensors[0])
        else:
            nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _rename(model: onnx.ModelProto, names: dict[str, str]) -> None:
    for node in model.graph.node:
        for tensors in (node.input, node.output):
            tensors[:] = [names.get(name, name) for name in tensors]
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        value.name = names.get(value.name, value.name)
