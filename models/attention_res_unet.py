"""Attention-based residual U-Net: residual blocks on every level, an attention gate on every skip.

"Advanced multi-label brain hemorrhage segmentation using an attention-based residual U-Net model", BMC Med. Inform.
Decis. Mak. 2025, doi:10.1186/s12911-025-03131-3: six kinds of haemorrhage on CT, Dice .93 (subarachnoid), .93
(subdural), .92 (epidural), .90 (contusion), .88 (intraventricular) and .92 (intracerebral) on its test set.

We know its abstract, which names attention and residual connections and gives no widths. Our choice: U-Net's five
levels at half its width (32 to 512), the residual block of He et al. (arXiv:1512.03385), the gate of Oktay et al.
(arXiv:1804.03999), and transposed convolutions; one input channel, background and the six kinds out.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from models.attention_unet import Gate
from models.res_unet import Block


@dataclass(frozen=True)
class AttentionResUNetConfig:
    """Widths from the finest level to the coarsest; input sides must be multiples of ``2 ** (len(channels) - 1)``."""

    in_channels: int = 1
    classes: int = 7
    channels: tuple[int, ...] = (32, 64, 128, 256, 512)


class GatedUp(nn.Module):
    """Double the grid, gate the skip by the result, join them, one residual block."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.widen = nn.ConvTranspose2d(c_in, c_out, 2, stride=2)
        self.gate = Gate(c_out)
        self.block = Block(2 * c_out, c_out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.widen(x)
        return self.block(torch.cat([self.gate(x, skip), x], dim=1))


class AttentionResUNet(nn.Module):
    """``(N, in_channels, H, W)`` -> logits ``(N, classes, H, W)``."""

    def __init__(self, config: AttentionResUNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or AttentionResUNetConfig()
        widths = config.channels
        self.down = nn.ModuleList(Block(a, b) for a, b in pairwise((config.in_channels, *widths)))
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
