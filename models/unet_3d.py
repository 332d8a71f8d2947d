"""3D U-Net, by MONAI: the segmentation of a whole volume at once.

Çiçek et al., "3D U-Net: Learning Dense Volumetric Segmentation from Sparse Annotation", MICCAI 2016, arXiv:1606.06650,
as a rival of AttFocusNet in Peng et al., Front. Neurosci. 2022, doi:10.3389/fnins.2022.965680: Dice .857 (.908).

Of MONAI's networks BasicUNet is the nearest: max pooling, two convolutions a level, transposed convolutions; with batch
norm and ReLU in place of its own defaults, as Çiçek et al. have them. It has five levels where they have four. Peng et
al. give no widths: 32 to 512 are our choice, for a size near the 19 M parameters of Çiçek et al.
"""

from __future__ import annotations

from dataclasses import dataclass

from monai.networks import nets


@dataclass(frozen=True)
class UNet3DConfig:
    """Widths of the five levels, finest first, and the last one before the head.

    Depth, height and width of the input must be multiples of 16: beyond its end a series' last slice is repeated.
    """

    in_channels: int = 1
    classes: int = 1
    channels: tuple[int, int, int, int, int, int] = (32, 64, 128, 256, 512, 32)


class UNet3D(nets.BasicUNet):
    """``(N, in_channels, D, H, W)`` -> logits ``(N, classes, D, H, W)``."""

    def __init__(self, config: UNet3DConfig | None = None) -> None:
        config = config or UNet3DConfig()
        super().__init__(
            spatial_dims=3,
            in_channels=config.in_channels,
            out_channels=config.classes,
            features=config.channels,
            act="relu",
            norm="batch",
        )
        self.config = config
        for up in (self.upcat_4, self.upcat_3, self.upcat_2, self.upcat_1):
            up.is_pad = False  # for odd sides, which there are none of; traced, it would keep the graph from export
