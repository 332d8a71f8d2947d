"""EMA in convolutions and means against EMA as published, and the graph that it becomes."""

from __future__ import annotations

import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from models.ema_attention_unet import EMA, softmax_within_groups
from tests.models.reduced import build, export, picture


class PublishedEMA(nn.Module):
    """Ouyang et al., ICASSP 2023, arXiv:2305.13563, figure 2: groups folded into the batch, matrices multiplied."""

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        width = channels // factor
        self.factor = factor
        self.gn = nn.GroupNorm(width, width)
        self.conv1x1 = nn.Conv2d(width, width, 1)
        self.conv3x3 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        groups = x.reshape(batch * self.factor, channels // self.factor, height, width)
        rows, columns = groups.mean(3, keepdim=True), groups.mean(2, keepdim=True)
        both = self.conv1x1(torch.cat([rows, columns.transpose(2, 3)], dim=2))
        rows, columns = both.split([height, width], dim=2)
        wide = self.gn(groups * rows.sigmoid() * columns.transpose(2, 3).sigmoid())
        local = self.conv3x3(groups)
        crossed = self.attend(wide, local) + self.attend(local, wide)
        return (groups * crossed.reshape(-1, 1, height, width).sigmoid()).reshape(x.shape)

    @staticmethod
    def attend(by: Tensor, to: Tensor) -> Tensor:
        return torch.softmax(by.mean((2, 3)), dim=1)[:, None] @ to.flatten(2)  # (N * groups, 1, H * W)


def both(channels: int, factor: int, dtype: torch.dtype) -> tuple[EMA, PublishedEMA]:
    torch.manual_seed(0)
    ours = EMA(channels, factor).to(dtype)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)  # a fresh group norm has no bias, and so no opinion on the channels
    published = PublishedEMA(channels, factor).to(dtype)
    published.load_state_dict(dict(ours.named_parameters()))
    return ours, published


@pytest.mark.parametrize(("channels", "factor"), [(64, 32), (512, 32), (24, 8), (32, 32)])
def test_ema_is_the_published_one(channels: int, factor: int):
    ours, published = both(channels, factor, torch.float32)
    x = torch.randn(2, channels, 12, 9)
    with torch.no_grad():
        assert (ours(x) - published(x)).abs().max() <= 1e-6


def test_ema_learns_as_the_published_one():
    ours, published = both(24, 8, torch.float64)
    x = torch.randn(2, 24, 6, 5, dtype=torch.float64)
    target = torch.randn_like(x)
    for network in (ours, published):
        (network(x) * target).sum().backward()
    for (key, parameter), expected in zip(ours.named_parameters(), published.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-9, atol=1e-9, msg=key)


def test_ema_holds_each_weight_once():
    c = 512 // 32
    assert sum(p.numel() for p in EMA(512, 32).parameters()) == 10 * c**2 + 4 * c


def test_the_grouped_softmax_does_not_overflow():
    logits = torch.tensor([300.0, 299.0, -300.0, -300.0])[None, :, None, None]
    expected = torch.softmax(logits.reshape(2, 2), dim=1).reshape(logits.shape)
    torch.testing.assert_close(softmax_within_groups(logits, 2), expected)


def test_a_factor_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="factor 32 does not divide 48 channels"):
        EMA(48, 32)


def test_ema_exports_without_reshape_or_matmul():
    network, multiple = build("ema_attention_unet")
    graph = export(network, picture(2, 2 * multiple, 2 * multiple)).graph
    kinds = {node.op_type for node in graph.node}
    assert not kinds & {"Reshape", "MatMul", "Gemm", "Einsum", "Tile", "Expand", "Shape", "Gather"}
    weights = {tensor.name: numpy_helper.to_array(tensor).shape for tensor in graph.initializer}
    grouped = 0
    for node in graph.node:
        if node.op_type == "Conv":
            assert node.input[1] in weights, node.name  # folded: the tiled weight is a constant
            grouped += weights[node.input[1]][0] != weights[node.input[1]][1] and any(
                attribute.name == "group" and attribute.i == 4 for attribute in node.attribute
            )
    assert grouped == 3 * 4  # on each of three levels: rows, columns, local and the sum over a group
