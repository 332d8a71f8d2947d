"""Every two-dimensional architecture at widths small enough for a test, and what the tests share about them."""

from __future__ import annotations

import io
import warnings
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from models import catalogue

CHANNELS, CLASSES = 2, 3
SETTINGS: dict[str, dict[str, Any]] = {
    "res_unet": {"channels": (4, 8, 8)},
    "vanilla_unet": {"stem": 4, "channels": (8, 12, 16)},
    "dr_unet": {"stem": 4, "channels": (8, 12, 16)},
    "dense_unet": {"stem": 8, "growth": 4, "bottleneck": 8, "blocks": (1, 3), "decoder": (16, 12, 8)},
    "attention_unet": {"channels": (8, 12, 16)},
    "wide_attention_unet": {"channels": (6, 10)},
    "ema_attention_unet": {"channels": (8, 16, 24), "factor": 4},
    "attention_res_unet": {"channels": (8, 12, 16)},
    "resnet34_unet": {"stages": (8, 8, 12, 16), "blocks": (1, 2, 1, 1), "decoder": (16, 12, 8, 8, 4)},
    "att_focus_net": {"channels": (8, 12, 16)},
    "unet_plus_plus": {"channels": (8, 12, 16, 16)},
    "pranet": {"stem": 8, "blocks": (2, 1, 1, 1), "base_width": 32, "decoder": 4, "reverse": (8, 8, 16)},
}
NAMES = tuple(SETTINGS)


def build(name: str, **others: Any) -> tuple[nn.Module, int]:
    """A reduced network, the same at every call, and its side multiple."""
    settings = {"in_channels": CHANNELS, "classes": CLASSES} | SETTINGS[name] | others
    torch.manual_seed(0)
    return catalogue.build(name, **settings), catalogue.side_multiple(name, **settings)


def picture(batch: int, height: int, width: int, seed: int = 1) -> Tensor:
    return torch.rand(batch, CHANNELS, height, width, generator=torch.Generator().manual_seed(seed))


def settle(network: nn.Module, side: int) -> nn.Module:
    """Running statistics, as after training: fresh ones make batch norm the identity."""
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None  # the plain average of what it sees
    with torch.no_grad():
        network.train()(picture(2, side, side))
    return network.eval()


def export(network: nn.Module, example: Tensor) -> onnx.ModelProto:
    """As the project exports: traced, opset 17, constants folded, the batch left open."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the tracing exporter
        torch.onnx.export(
            network.eval(),
            (example,),
            buffer,
            input_names=["x"],
            output_names=["logits"],
            dynamic_axes={"x": {0: "N"}, "logits": {0: "N"}},
            opset_version=17,
            dynamo=False,
        )
    model = onnx.load_from_string(buffer.getvalue())
    onnx.checker.check_model(model, full_check=True)
    return model
