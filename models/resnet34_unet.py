"""U-Net with a ResNet34 encoder.

The U-Net of a comparison of U-Net and Attention U-Net for subarachnoid haemorrhage on CT (submitted to JoWUA in 2025):
grey slices of 256 x 256, Dice .867 (Attention U-Net .896). The encoder is He et al., arXiv:1512.03385, without its
classifier. The paper gives the encoder and nothing of the decoder: nearest upsampling and two 3x3 convolutions a level,
from 256 to 16 channels, are our choice, the one that segmentation_models_pytorch made common.

Every weight starts from scratch unless a caller loads some. The encoder's parameters have torchvision's names, so that
its ``resnet34`` weights load with ``network.encoder.load_state_dict(weights, strict=False)`` when in_channels is 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ResNet34UNetConfig:
    """ResNet34's stages and the decoder's widths, coarsest first; input sides must be multiples of 32."""

    in_channels: int = 1
    classes: int = 1
    stages: tuple[int, int, int, int] = (64, 128, 256, 512)
    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)
    decoder: tuple[int, int, int, int, int] = (256, 128, 64, 32, 16)


class BasicBlock(nn.Module):
    """``relu(bn(conv(relu(bn(conv(x))))) + side(x))``, the first convolution and the side with the stage's stride."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        main = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(main + self.downsample(x))


class ResNet34(nn.Module):
    """``(N, in_channels, H, W)`` -> its maps at 1/2, 1/4, 1/8, 1/16 and 1/32 of the input."""

    def __init__(self, config: ResNet34UNetConfig) -> None:
        super().__init__()
        stem = config.stages[0]
        self.conv1 = nn.Conv2d(config.in_channels, stem, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        c_in = stem
        for number, (c_out, count) in enumerate(zip(config.stages, config.blocks, strict=True), start=1):
            blocks = [BasicBlock(c_in, c_out, stride=1 if number == 1 else 2)]
            blocks += [BasicBlock(c_out, c_out, stride=1) for _ in range(count - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            c_in = c_out

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [torch.relu(self.bn1(self.conv1(x)))]
        x = self.maxpool(maps[0])
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps


class Up(nn.Module):
    """Double the grid, join the skip where there is one, two convolutions."""

    def __init__(self, c_in: int, c_skip: int, c_out: int) -> None:
        super().__init__()
        self.widen = nn.Upsample(scale_factor=2, mode="nearest")
        self.block = nn.Sequential(
            nn.Conv2d(c_in + c_skip, c_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(),
            nn.Conv2d(c_out, c_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(),
        )

    def forward(self, x: Tensor, *skip: Tensor) -> Tensor:
        return self.block(torch.cat([self.widen(x), *skip], dim=1))


class ResNet34UNet(nn.Module):
    """``(N, in_channels, H, W)`` -> logits ``(N, classes, H, W)``."""

    def __init__(self, config: ResNet34UNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ResNet34UNetConfig()
        self.encoder = ResNet34(config)
        first, second, third, fourth = config.stages
        skips = (third, second, first, first, 0)  # the last level, the input's own, has none
        widths = (fourth, *config.decoder)
        self.up = nn.ModuleList(Up(a, skip, b) for (a, b), skip in zip(pairwise(widths), skips, strict=True))
        self.head = nn.Conv2d(widths[-1], config.classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        *skips, x = self.encoder(x)
        for up in self.up:
            x = up(x, skips.pop()) if skips else up(x)
        return self.head(x)
