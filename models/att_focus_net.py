"""AttFocusNet: Attention U-Net that keeps, beside each pooled map, what pooling throws away.

Peng et al., "Deep learning-based computed tomography image segmentation and volume measurement of intracerebral
hemorrhage", Front. Neurosci. 2022, doi:10.3389/fnins.2022.965680: Dice .908 on its test set, .889 on CQ500 and .911 on
RSNA 2019, ICC of the volume .997.

The focus structure, from YOLOv5, samples a map of C channels with a step of two into 4 C channels and convolves them to
C / 2; its output joins the pooled map. The paper gives that and no other width: 64 to 1,024 are U-Net's own and our
choice. Its figure splices the two inputs of the attention gate; its text takes the gate of Oktay et al., which adds
them, and so do we.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from models.attention_unet import GatedUp
from models.vanilla_unet import pair


@dataclass(frozen=True)
class AttFocusNetConfig:
    """Widths from the finest level to the coarsest; input sides must be multiples of ``2 ** (len(channels) - 1)``."""

    in_channels: int = 1
    classes: int = 1
    channels: tuple[int, ...] = (64, 128, 256, 512, 1024)


class FocusPool(nn.Module):
    """``(N, C, H, W)`` -> ``(N, C + C // 2, H / 2, W / 2)``: max pooling, and the focus structure beside it.

    A 3x3 convolution of the maps sampled with a step of two is a 6x6 convolution of stride two of the map itself, with
    the same weights in another order; YOLOv5 writes its focus so since its release 6.0.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.pool = nn.MaxPool2d(2)
        self.focus = nn.Sequential(nn.Conv2d(channels, half, 6, stride=2, padding=2), nn.BatchNorm2d(half), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.pool(x), self.focus(x)], dim=1)


class AttFocusNet(nn.Module):
    """``(N, in_channels, H, W)`` -> logits ``(N, classes, H, W)``."""

    def __init__(self, config: AttFocusNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or AttFocusNetConfig()
        widths = config.channels
        self.first = pair(config.in_channels, widths[0])
        self.down = nn.ModuleList(nn.Sequential(FocusPool(a), pair(a + a // 2, b)) for a, b in pairwise(widths))
        self.up = nn.ModuleList(GatedUp(b, a) for a, b in reversed(list(pairwise(widths))))
        self.head = nn.Conv2d(widths[0], config.classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.first(x)]  # (N, widths[0], H, W)
        for block in self.down:
            skips.append(block(skips[-1]))  # (N, widths[i], H / 2**i, W / 2**i)
        x = skips.pop()
        for up in self.up:
            x = up(x, skips.pop())
        return self.head(x)
