"""Residual U-Net for two cores: the network of the bundle that ships.

U-Net (Ronneberger et al., MICCAI 2015, arXiv:1505.04597) with residual blocks (He et al., CVPR 2016, arXiv:1512.03385).
All levels work at half the input's resolution and below, where blood still has its shape and a convolution costs a
quarter; the head gives four logits per position and unfolds them (sub-pixel convolution, Shi et al., CVPR 2016,
arXiv:1609.05158). Nearest-neighbour upsampling followed by a 3x3 convolution instead of a transposed one, ReLU
throughout and no convolution bias: batch norm folds into every convolution at export, and every operator quantises.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ResUNetConfig:
    """Widths from the finest level to the coarsest; input sides must be multiples of ``2 ** len(channels)``."""

    in_channels: int = 3
    classes: int = 7
    channels: tuple[int, ...] = (24, 48, 96, 160, 192)


def conv_bn(c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(c_out))


class Block(nn.Module):
    """``relu(bn(conv(relu(bn(conv(x))))) + side(x))``, the side branch a 1x1 convolution where the width changes."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.first = conv_bn(c_in, c_out)
        self.second = conv_bn(c_out, c_out)
        self.side = conv_bn(c_in, c_out, kernel=1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + self.side(x))


class Up(nn.Module):
    """Double the grid, halve the channels, join the skip, one block."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.widen = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), conv_bn(c_in, c_out), nn.ReLU())
        self.block = Block(2 * c_out, c_out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.block(torch.cat([self.widen(x), skip], dim=1))


class ResUNet(nn.Module):
    """``(N, in_channels, H, W)`` -> logits ``(N, classes, H, W)``."""

    def __init__(self, config: ResUNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ResUNetConfig()
        widths = config.channels
        self.stem = nn.Sequential(
            conv_bn(config.in_channels, widths[0], stride=2), nn.ReLU(), Block(widths[0], widths[0])
        )
        self.down = nn.ModuleList(Block(a, b) for a, b in pairwise(widths))
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList(Up(b, a) for a, b in reversed(list(pairwise(widths))))
        self.head = nn.Sequential(nn.Conv2d(widths[0], 4 * config.classes, 1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.stem(x)]  # (N, widths[0], H/2, W/2)
        for block in self.down:
            skips.append(block(self.pool(skips[-1])))
        x = skips.pop()
        for up in self.up:
            x = up(x, skips.pop())
        return self.head(x)
