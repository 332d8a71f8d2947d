"""UNet++: U-Net whose skips are U-Nets themselves.

Zhou et al., "UNet++: Redesigning Skip Connections to Exploit Multiscale Features in Image Segmentation", IEEE Trans.
Med. Imaging 2020, doi:10.1109/TMI.2019.2959609, as a rival of AttFocusNet in Peng et al., Front. Neurosci. 2022,
doi:10.3389/fnins.2022.965680: Dice .900 (AttFocusNet .908).

Peng et al. give no widths: 32 to 512 and transposed convolutions are those of Zhou et al. (9.04 M parameters there).
One head at the last node: Peng et al. mention no deep supervision.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from models.vanilla_unet import pair


@dataclass(frozen=True)
class UNetPlusPlusConfig:
    """Widths from the finest level to the coarsest; input sides must be multiples of ``2 ** (len(channels) - 1)``."""

    in_channels: int = 1
    classes: int = 1
    channels: tuple[int, ...] = (32, 64, 128, 256, 512)


class Node(nn.Module):
    """Double the grid of the node below, join all nodes to the left, one block."""

    def __init__(self, c_below: int, channels: int, left: int) -> None:
        super().__init__()
        self.widen = nn.ConvTranspose2d(c_below, channels, 2, stride=2)
        self.block = pair((left + 1) * channels, channels)

    def forward(self, below: Tensor, left: list[Tensor]) -> Tensor:
        return self.block(torch.cat([*left, self.widen(below)], dim=1))


class UNetPlusPlus(nn.Module):
    """``(N, in_channels, H, W)`` -> logits ``(N, classes, H, W)``."""

    def __init__(self, config: UNetPlusPlusConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or UNetPlusPlusConfig()
        widths = config.channels
        self.down = nn.ModuleList(pair(a, b) for a, b in pairwise((config.in_channels, *widths)))
        self.pool = nn.MaxPool2d(2)
        # columns[j - 1][i] is the paper's X(i, j): level i, with j nodes to its left
        self.columns = nn.ModuleList(
            nn.ModuleList(Node(widths[i + 1], widths[i], j) for i in range(len(widths) - j))
            for j in range(1, len(widths))
        )
        self.head = nn.Conv2d(widths[0], config.classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, *deeper = self.down
        levels = [[first(x)]]  # levels[i]: what stands at (H / 2**i, W / 2**i), from the left
        for block in deeper:
            levels.append([block(self.pool(levels[-1][0]))])
        for column in self.columns:
            for i, node in enumerate(column):
                levels[i].append(node(levels[i + 1][len(levels[i]) - 1], levels[i]))
        return self.head(levels[0][-1])
