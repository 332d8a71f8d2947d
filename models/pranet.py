"""PraNet: a coarse map from the deep features, then its edges by reverse attention, level by level.

Fan et al., "PraNet: Parallel Reverse Attention Network for Polyp Segmentation", MICCAI 2020, arXiv:2006.11392, as a
rival of AttFocusNet in Peng et al., Front. Neurosci. 2022, doi:10.3389/fnins.2022.965680: Dice .788 (AttFocusNet .908).
The encoder is Res2Net-50 (Gao et al., IEEE TPAMI 2021, arXiv:1904.01169) in its v1b form, as in the authors' code, and
so are all widths; it starts from scratch where they started from ImageNet.

Several classes. Reverse attention multiplies the features by one minus the probability of the object found so far, so
that the next level looks for what is still missing. With several classes, class 0 the background, the object is every
other class together: the features are multiplied by the softmax probability of the background. With one class it is one
minus the sigmoid, as published; with two, the same number as with one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class PraNetConfig:
    """Res2Net-50's stem, stages and splits, and the decoder's width; input sides must be multiples of 32."""

    in_channels: int = 1
    classes: int = 1
    stem: int = 64
    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)
    base_width: int = 26  # channels of one of the four splits where the stage has 64 planes
    decoder: int = 32
    reverse: tuple[int, int, int] = (64, 64, 256)  # widths of the reverse branches at 1/8, 1/16 and 1/32


def conv_bn(c_in: int, c_out: int, kernel: tuple[int, int] | int = 3, stride: int = 1, dilation: int = 1) -> nn.Module:
    """A convolution and batch norm that keep the size (over the stride), without activation."""
    sides = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = tuple(dilation * (side - 1) // 2 for side in sides)
    return nn.Sequential(nn.Conv2d(c_in, c_out, sides, stride, padding, dilation, bias=False), nn.BatchNorm2d(c_out))


def resize(x: Tensor, scale: float) -> Tensor:
    return functional.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)


class Bottle2neck(nn.Module):
    """Res2Net's block: four splits, each convolved after the one before it is added.

    The first block of a stage (`first`) adds nothing between splits, pools the last one, and carries the stride.
    """

    SPLITS = 4
    EXPANSION = 4

    def __init__(self, c_in: int, planes: int, base_width: int, stride: int = 1, *, first: bool = False) -> None:
        super().__init__()
        self.width = width = planes * base_width // 64
        c_out = planes * self.EXPANSION
        self.reduce = conv_bn(c_in, width * self.SPLITS, 1)
        self.splits = nn.ModuleList(conv_bn(width, width, 3, stride) for _ in range(self.SPLITS - 1))
        self.expand = conv_bn(width * self.SPLITS, c_out, 1)
        self.first = first
        self.last: nn.Module = nn.AvgPool2d(3, stride, padding=1) if first else nn.Identity()
        self.side: nn.Module = nn.Identity()
        if first:
            pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
            self.side = nn.Sequential(pool, conv_bn(c_in, c_out, 1))

    def forward(self, x: Tensor) -> Tensor:
        *parts, last = torch.relu(self.reduce(x)).split(self.width, dim=1)
        done: list[Tensor] = []
        for part, convolve in zip(parts, self.splits, strict=True):
            alone = self.first or not done
            done.append(torch.relu(convolve(part if alone else part + done[-1])))
        return torch.relu(self.expand(torch.cat([*done, self.last(last)], dim=1)) + self.side(x))


class Res2Net(nn.Module):
    """``(N, in_channels, H, W)`` -> its maps at 1/8, 1/16 and 1/32; `channels` are their widths."""

    def __init__(self, config: PraNetConfig) -> None:
        super().__init__()
        half = config.stem // 2
        self.stem = nn.Sequential(
            conv_bn(config.in_channels, half, stride=2),
            nn.ReLU(),
            conv_bn(half, half),
            nn.ReLU(),
            conv_bn(half, config.stem),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        stages, c_in = [], config.stem
        for number, count in enumerate(config.blocks):
            planes = config.stem * 2**number
            blocks = [Bottle2neck(c_in, planes, config.base_width, stride=2 if number else 1, first=True)]
            c_in = planes * Bottle2neck.EXPANSION
            blocks += [Bottle2neck(c_in, planes, config.base_width) for _ in range(count - 1)]
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.channels = tuple(config.stem * 2**number * Bottle2neck.EXPANSION for number in (1, 2, 3))

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[1:]


class ReceptiveField(nn.Module):
    """Four branches that see further and further: the authors' RFB."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList([conv_bn(c_in, c_out, 1)])
        for reach in (3, 5, 7):
            self.branches.append(
                nn.Sequential(
                    conv_bn(c_in, c_out, 1),
                    conv_bn(c_out, c_out, (1, reach)),
                    conv_bn(c_out, c_out, (reach, 1)),
                    conv_bn(c_out, c_out, 3, dilation=reach),
                )
            )
        self.join = conv_bn(len(self.branches) * c_out, c_out, 3)
        self.side = conv_bn(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.join(torch.cat([branch(x) for branch in self.branches], dim=1)) + self.side(x))


class PartialDecoder(nn.Module):
    """Three maps, 1/8, 1/16 and 1/32 -> the coarse logits at 1/8."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.deep_to_middle = conv_bn(width, width)
        self.deep_to_fine = conv_bn(width, width)
        self.middle_to_fine = conv_bn(width, width)
        self.deep_beside = conv_bn(width, width)
        self.middle_join = conv_bn(2 * width, 2 * width)
        self.middle_beside = conv_bn(2 * width, 2 * width)
        self.fine_join = conv_bn(3 * width, 3 * width)
        self.head = nn.Sequential(conv_bn(3 * width, 3 * width), nn.Conv2d(3 * width, classes, 1))

    def forward(self, fine: Tensor, middle: Tensor, deep: Tensor) -> Tensor:
        raised = resize(deep, 2)
        middle_product = self.deep_to_middle(raised) * middle
        fine_product = self.deep_to_fine(resize(raised, 2)) * self.middle_to_fine(resize(middle, 2)) * fine
        joined = self.middle_join(torch.cat([middle_product, self.deep_beside(raised)], dim=1))
        return self.head(self.fine_join(torch.cat([fine_product, self.middle_beside(resize(joined, 2))], dim=1)))


class ReverseAttention(nn.Module):
    """Logits found so far, of the features' resolution, and the features that correct them -> better logits."""

    def __init__(self, c_in: int, width: int, kernel: int, layers: int, classes: int) -> None:
        super().__init__()
        self.several = classes > 1
        self.reduce = conv_bn(c_in, width, 1)
        self.layers = nn.ModuleList(conv_bn(width, width, kernel) for _ in range(layers))
        # one by one at the deepest level, three by three at the others, as published
        self.head = conv_bn(width, classes, 1 if kernel == 5 else 3)

    def forward(self, found: Tensor, features: Tensor) -> Tensor:
        missing = torch.softmax(found, dim=1)[:, :1] if self.several else torch.sigmoid(-found)  # (N, 1, h, w)
        x = self.reduce(missing * features)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x) + found


class PraNet(nn.Module):
    """``(N, in_channels, H, W)`` -> logits ``(N, classes, H, W)``.

    In training mode a tuple of four such logits, for deep supervision: the network's answer first, then the sides it
    was refined from, at 1/16 and 1/32, and the coarse map, all at the input's resolution. In evaluation the answer.
    """

    def __init__(self, config: PraNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or PraNetConfig()
        self.encoder = Res2Net(config)
        self.fields = nn.ModuleList(ReceptiveField(width, config.decoder) for width in self.encoder.channels)
        self.coarse = PartialDecoder(config.decoder, config.classes)
        fine, middle, deep = zip(self.encoder.channels, config.reverse, strict=True)
        self.deep = ReverseAttention(*deep, kernel=5, layers=3, classes=config.classes)
        self.middle = ReverseAttention(*middle, kernel=3, layers=2, classes=config.classes)
        self.fine = ReverseAttention(*fine, kernel=3, layers=2, classes=config.classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        fine, middle, deep = self.encoder(x)  # (N, ..., H/8, W/8), (..., H/16, W/16), (..., H/32, W/32)
        coarse = self.coarse(*(field(one) for field, one in zip(self.fields, (fine, middle, deep), strict=True)))
        at_32 = self.deep(resize(coarse, 0.25), deep)
        at_16 = self.middle(resize(at_32, 2), middle)
        answer = resize(self.fine(resize(at_16, 2), fine), 8)
        if not self.training:
            return answer
        return answer, resize(at_16, 16), resize(at_32, 32), resize(coarse, 8)
