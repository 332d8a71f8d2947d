"""Dimension-Reduction U-Net: U-Net whose blocks work at a quarter of the level's channels.

Yu et al., "A robust deep learning segmentation method for hematoma volumetric detection in intracerebral hemorrhage",
Stroke 2021, doi:10.1161/STROKEAHA.120.032243, in the PyTorch form of S. Liu, "Comparing Augmented U-Net Models For
Segmentation of Hematomas In Patients with Intracerebral Hemorrhaging": 10,953,249 parameters, Dice .8361 on MRI.

The paper describes the blocks and the activation (ELU) and gives the parameters, not the widths; levels from 32 to
1,024, a 1x1 stem of 16 and biased convolutions under batch norm give exactly its count. Its Blocks 1 (encoder) and 2
(decoder) differ in where their input comes from alone: here both are `Unit` to a quarter of the channels, and its
Block 3 is the `Unit` back to all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from torch.nn import functional

from models.vanilla_unet import VanillaUNet, VanillaUNetConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DRUNetConfig(VanillaUNetConfig):
    """As the vanilla U-Net's, widths included; every width a multiple of four."""


def conv_bn(c_in: int, c_out: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2), nn.BatchNorm2d(c_out))


class Unit(nn.Module):
    """``elu(main(x) + side(x))``: main is 1x1, 3x3 and 3x3 convolutions at `narrow` channels, side is 1x1."""

    def __init__(self, c_in: int, narrow: int, c_out: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            conv_bn(c_in, narrow, 1), nn.ELU(), conv_bn(narrow, narrow, 3), nn.ELU(), conv_bn(narrow, c_out, 3)
        )
        self.side = conv_bn(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.elu(self.main(x) + self.side(x))


def reduced(c_in: int, c_out: int) -> nn.Sequential:
    """Down to a quarter of the level's channels (Block 1 or 2), then back to all of them (Block 3)."""
    quarter = c_out // 4
    return nn.Sequential(Unit(c_in, quarter, quarter), Unit(quarter, quarter, c_out))


class DRUNet(VanillaUNet):
    """``(N, in_channels, H, W)`` -> logits ``(N, classes, H, W)``."""

    def __init__(self, config: DRUNetConfig | None = None) -> None:
        super().__init__(config or DRUNetConfig(), block=reduced, activation=nn.ELU)
