"""UNETR, by MONAI: a vision transformer as the encoder of a 3D U-Net.

Hatamizadeh et al., "UNETR: Transformers for 3D Medical Image Segmentation", WACV 2022, arXiv:2103.10504, as a rival of
AttFocusNet in Peng et al., Front. Neurosci. 2022, doi:10.3389/fnins.2022.965680: Dice .700 (.908).

Peng et al. give neither widths nor the volume it saw; both are those of Hatamizadeh et al.: 96 x 96 x 96 voxels, ViT-B
on patches of 16. Its position embedding belongs to one volume size, so that the input has the config's size, no other.
"""

from __future__ import annotations

from dataclasses import dataclass

from monai.networks import nets
from torch import nn


@dataclass(frozen=True)
class UNETRConfig:
    """`size` is the input's depth, height and width in voxels, each a multiple of 16."""

    in_channels: int = 1
    classes: int = 1
    size: tuple[int, int, int] = (96, 96, 96)
    features: int = 16
    hidden: int = 768
    mlp: int = 3072
    heads: int = 12


class UNETR(nets.UNETR):
    """``(N, in_channels, D, H, W)`` -> logits ``(N, classes, D, H, W)``."""

    def __init__(self, config: UNETRConfig | None = None) -> None:
        config = config or UNETRConfig()
        super().__init__(
            in_channels=config.in_channels,
            out_channels=config.classes,
            img_size=config.size,
            feature_size=config.features,
            hidden_size=config.hidden,
            mlp_dim=config.mlp,
            num_heads=config.heads,
        )
        self.config = config
        for block in self.vit.blocks:
            # MONAI makes it for cross-attention, which UNETR does not have: a weight that nothing would ever train
            block.norm_cross_attn = nn.Identity()
