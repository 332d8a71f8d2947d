"""Dense U-Net: four dense blocks going down, U-Net's blocks coming up.

Xu et al., "Deep Network for the Automatic Segmentation and Quantification of Intracranial Hemorrhage on CT",
Front. Neurosci. 2021, doi:10.3389/fnins.2020.541817, in the form of S. Liu, "Comparing Augmented U-Net Models For
Segmentation of Hematomas In Patients with Intracerebral Hemorrhaging": Dice .8281 on MRI slices of 256 x 256. Dense
blocks are Huang et al., arXiv:1608.06993.

The paper gives blocks of 3, 6, 12 and 8 layers, a growth of 8, bottlenecks, five resolutions from 256 to 16, 1x1
convolution and max pooling going down and transposed convolutions coming up. Our choice: a 3x3 stem of 64 channels
(what Xu's growth of 32 has in a DenseNet), bottlenecks of four times the growth (DenseNet-B), transitions that keep the
width, and U-Net's blocks of 512 channels at the bottom and 256 to 32 above.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from models.vanilla_unet import pair


@dataclass(frozen=True)
class DenseUNetConfig:
    """Layers of each dense block, finest first; the decoder's widths, the bottom's first.

    The decoder has one width more than there are blocks. Input sides must be multiples of ``2 ** len(blocks)``.
    """

    in_channels: int = 1
    classes: int = 1
    stem: int = 64
    growth: int = 8
    bottleneck: int = 32
    blocks: tuple[int, ...] = (3, 6, 12, 8)
    decoder: tuple[int, ...] = (512, 256, 128, 64, 32)


def bn_relu_conv(c_in: int, c_out: int, kernel: int) -> nn.Sequential:
    """DenseNet's order: every layer normalises the joined maps in its own way."""
    return nn.Sequential(
        nn.BatchNorm2d(c_in), nn.ReLU(), nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
    )


class DenseBlock(nn.Module):
    """Layers of `growth` channels, each fed by all before it: C channels in, ``C + layers * growth`` out."""

    def __init__(self, c_in: int, layers: int, growth: int, bottleneck: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(bn_relu_conv(c_in + i * growth, bottleneck, 1), bn_relu_conv(bottleneck, growth, 3))
            for i in range(layers)
        )
        self.norm = nn.Sequential(nn.BatchNorm2d(c_in + layers * growth), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], dim=1)
        return self.norm(x)


class Up(nn.Module):
    """Double the grid, join the skip, one block."""

    def __init__(self, c_in: int, c_skip: int, c_out: int) -> None:
        super().__init__()
        self.widen = nn.ConvTranspose2d(c_in, c_out, 2, stride=2)
        self.block = pair(c_out + c_skip, c_out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.block(torch.cat([self.widen(x), skip], dim=1))


class DenseUNet(nn.Module):
    """``(N, in_channels, H, W)`` -> logits ``(N, classes, H, W)``."""

    def __init__(self, config: DenseUNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DenseUNetConfig()
        self.stem = nn.Conv2d(config.in_channels, config.stem, 3, padding=1, bias=False)
        widths = [config.stem]
        for layers in config.blocks:
            widths.append(widths[-1] + layers * config.growth)
        self.down = nn.ModuleList(
            DenseBlock(width, layers, config.growth, config.bottleneck)
            for width, layers in zip(widths, config.blocks, strict=False)
        )
        self.transition = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.MaxPool2d(2)) for width in widths[1:]
        )
        self.bottom = pair(widths[-1], config.decoder[0])
        self.up = nn.ModuleList(
            Up(a, skip, b) for (a, b), skip in zip(pairwise(config.decoder), reversed(widths[1:]), strict=True)
        )
        self.head = nn.Conv2d(config.decoder[-1], config.classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        skips = []
        for block, transition in zip(self.down, self.transition, strict=True):
            skips.append(block(x))  # (N, widths[i + 1], H / 2**i, W / 2**i)
            x = transition(skips[-1])
        x = self.bottom(x)
        for up in self.up:
            x = up(x, skips.pop())
        return self.head(x)
