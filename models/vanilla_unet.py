"""Vanilla U-Net: the "equivalent" that the Dimension-Reduction U-Net was measured against.

S. Liu, "Comparing Augmented U-Net Models For Segmentation of Hematomas In Patients with Intracerebral Hemorrhaging":
MRI slices of 256 x 256, Dice .8359 (DR U-Net .8361, Dense U-Net .8281). The architecture is the U-Net of Ronneberger et
al., MICCAI 2015, arXiv:1505.04597, with batch norm and same-size convolutions.

The paper gives the parameters, 31,114,305, and not the widths. They follow from the count: five encoder blocks from 32
to 512, 1,024 at the bottom, a 1x1 stem of 16 as the DR U-Net has it, transposed convolutions, and batch norm over the
joined skip and upsampled maps. The DR U-Net is this skeleton with other blocks, so it takes it from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class VanillaUNetConfig:
    """Widths from the finest level to the coarsest; input sides must be multiples of ``2 ** (len(channels) - 1)``."""

    in_channels: int = 1
    classes: int = 1
    stem: int = 16
    channels: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)


def pair(c_in: int, c_out: int) -> nn.Sequential:
    """Two 3x3 convolutions with bias, each with batch norm and ReLU: U-Net's block."""
    layers: list[nn.Module] = []
    for width in (c_in, c_out):
        layers += [nn.Conv2d(width, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*layers)


class Up(nn.Module):
    """Double the grid, join the skip, normalise both together, one block."""

    def __init__(
        self, c_in: int, c_out: int, block: Callable[[int, int], nn.Module], activation: type[nn.Module]
    ) -> None:
        super().__init__()
        self.widen = nn.ConvTranspose2d(c_in, c_out, 2, stride=2)
        self.norm = nn.Sequential(nn.BatchNorm2d(2 * c_out), activation())
        self.block = block(2 * c_out, c_out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.block(self.norm(torch.cat([self.widen(x), skip], dim=1)))


class VanillaUNet(nn.Module):
    """``(N, in_channels, H, W)`` -> logits ``(N, classes, H, W)``.

    Parameters
    ----------
    config : widths; the paper's when left out
    block : what stands on every level, made from (channels in, channels out)
    activation : what follows the batch norms outside the blocks

    """

    def __init__(
        self,
        config: VanillaUNetConfig | None = None,
        *,
        block: Callable[[int, int], nn.Module] = pair,
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.config = config = config or VanillaUNetConfig()
        widths = config.channels
        self.stem = nn.Sequential(
            nn.Conv2d(config.in_channels, config.stem, 1), nn.BatchNorm2d(config.stem), activation()
        )
        self.down = nn.ModuleList(block(a, b) for a, b in pairwise((config.stem, *widths)))
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList(Up(b, a, block, activation) for a, b in reversed(list(pairwise(widths))))
        self.head = nn.Conv2d(widths[0], config.classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, *deeper = self.down
        skips = [first(self.stem(x))]  # (N, widths[0], H, W)
        for block in deeper:
            skips.append(block(self.pool(skips[-1])))  # (N, widths[i], H / 2**i, W / 2**i)
        x = skips.pop()
        for up in self.up:
            x = up(x, skips.pop())
        return self.head(x)
