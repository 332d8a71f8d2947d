"""Losses over soft targets: a pixel at a boundary belongs to two classes, in shares."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def soft_targets(labels: Tensor, classes: int, grid: int) -> Tensor:
    """Label maps ``(N, H, W)`` -> share of each class in each pixel of the grid, ``(N, classes, G, G)`` float32."""
    shares = torch.zeros(len(labels), classes, grid, grid)
    for index in labels.unique().tolist():
        shares[:, index] = functional.adaptive_avg_pool2d((labels == index).to(torch.float32), grid)
    return shares


def cross_entropy_and_dice(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy plus soft Dice over the batch, the Dice term over foreground classes that the batch shows.

    Parameters
    ----------
    logits, target : ``(N, classes, G, G)``; target holds shares that sum to 1

    """
    log_probability = torch.log_softmax(logits, dim=1)
    entropy = -(log_probability * target).sum(dim=1).mean()
    probability = log_probability[:, 1:].exp()
    shown = target[:, 1:]
    both = (probability * shown).sum(dim=(0, 2, 3))
    total = probability.sum(dim=(0, 2, 3)) + shown.sum(dim=(0, 2, 3))
    present = (shown.sum(dim=(0, 2, 3)) > 0).to(logits.dtype)
    dice = (2 * both + 1) / (total + 1)
    return entropy + ((1 - dice) * present).sum() / present.sum().clamp(min=1)
