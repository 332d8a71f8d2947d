"""Attention U-Net: U-Net whose skips pass an attention gate.

Oktay et al., "Attention U-Net: Learning Where to Look for the Pancreas", arXiv:1804.03999, as three papers on brain
haemorrhage use it in two dimensions:

- Pradana, Suryani and Saputra, "Evaluation of EMA-Attention U-Net for Brain Hemorrhage Segmentation": the baseline,
  7,791,285 parameters, Dice .1420 over all classes. Their count gives the widths, which the text does not: 64 to 512,
  three input channels and twelve classes, gates of half the skip's width at the skip's own resolution.
  `AttentionUNetConfig`.
- Peng et al., Front. Neurosci. 2022, doi:10.3389/fnins.2022.965680: AttUNet, the rival of AttFocusNet, Dice .893; and a
  comparison of U-Net and Attention U-Net for subarachnoid haemorrhage (submitted to JoWUA in 2025), Dice .896. Neither
  gives widths: 64 to 1,024 are U-Net's own and our choice. `WideAttentionUNetConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from models.vanilla_unet import pair


@dataclass(frozen=True)
class AttentionUNetConfig:
    """Widths from the finest level to the coarsest; input sides must be multiples of ``2 ** (len(channels) - 1)``."""

    in_channels: int = 3
    classes: int = 12
    channels: tuple[int, ...] = (64, 128, 256, 512)


@dataclass(frozen=True)
class WideAttentionUNetConfig(AttentionUNetConfig):
    """Grey slices in, blood or none out, U-Net's five levels."""

    in_channels: int = 1
    classes: int = 1
    channels: tuple[int, ...] = (64, 128, 256, 512, 1024)


class Gate(nn.Module):
    """``skip * sigmoid(psi(relu(W_g g + W_x skip)))``: g, from the decoder, has the skip's resolution already."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        within = channels // 2
        self.signal = nn.Sequential(nn.Conv2d(channels, within, 1), nn.BatchNorm2d(within))
        self.skip = nn.Sequential(nn.Conv2d(channels, within, 1), nn.BatchNorm2d(within))
        self.psi = nn.Sequential(nn.Conv2d(within, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid())

    def forward(self, signal: Tensor, skip: Tensor) -> Tensor:
        return skip * self.psi(torch.relu(self.signal(signal) + self.skip(skip)))  # psi: (N, 1, h, w)


class GatedUp(nn.Module):
    """Double the grid, gate the skip by the result, join them, one block."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.widen = nn.ConvTranspose2d(c_in, c_out, 2, stride=2)
        self.gate = Gate(c_out)
        self.block = pair(2 * c_out, c_out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.widen(x)
        return self.block(torch.cat([self.gate(x, skip), x], dim=1))


class AttentionUNet(nn.Module):
    """``(N, in_channels, H, W)`` -> logits ``(N, classes, H, W)``."""

    def __init__(self, config: AttentionUNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or AttentionUNetConfig()
        widths = config.channels
        self.down = nn.ModuleList(pair(a, b) for a, b in pairwise((config.in_channels, *widths)))
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList(GatedUp(b, a) for a, b in reversed(list(pairwise(widths))))
        self.head = nn.Conv2d(widths[0], config.classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, *deeper = self.down
        skips = [first(x)]  # (N, widths[0], H, W)
        for block in deeper:
            skips.append(block(self.pool(skips[-1])))  # (N, widths[i], H / 2**i, W / 2**i)
        x = skips.pop()
        for up in self.up:
            x = up(x, skips.pop())
        return self.head(x)
