"""Losses over soft targets: a pixel at a boundary belongs to two classes, in shares."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def soft_targets(labels: Tensor, classes: int, grid: int) -> Tensor:
    """Share of each class in each pixel of the grid.

    Label maps ``(N, H, W)`` -> ``(N, classes, G, G)`` float32, volumes ``(N, D, H, W)`` -> ``(N, classes, D, G, G)``.
    """
    shares = torch.zeros(len(labels), classes, *labels.shape[1:-2], grid, grid)
    twice = labels.shape[-2:] == (2 * grid, 2 * grid)  # then bilinear is the mean of four too, in a third of the time
    for index in labels.flatten().bincount().nonzero().flatten().tolist():
        there = (labels == index).to(torch.float32)
        if twice:
            halved = functional.interpolate(there.flatten(0, -3)[None], size=(grid, grid), mode="bilinear")
            shares[:, index] = halved.reshape(shares[:, index].shape)
        else:
            shares[:, index] = functional.adaptive_avg_pool2d(there, grid)
    return shares


def loss(logits: Tensor, target: Tensor, terms: tuple[str, ...]) -> Tensor:
    """Sum of ``"cross_entropy"`` and ``"dice"`` over a batch, the Dice over foreground classes that the batch shows.

    Between two classes the cross-entropy is the papers' binary one: a softmax over a logit and 0 is its sigmoid.

    Parameters
    ----------
    logits, target : ``(N, classes, [D,] G, G)``; target holds shares that sum to 1

    """
    log_probability = torch.log_softmax(logits, dim=1)
    total = logits.new_zeros(())
    if "cross_entropy" in terms:
        total = total - (log_probability * target).sum(dim=1).mean()
    if "dice" in terms:
        probability, shown = log_probability[:, 1:].exp(), target[:, 1:]
        over = (0, *range(2, logits.ndim))
        both = (probability * shown).sum(dim=over)
        whole = probability.sum(dim=over) + shown.sum(dim=over)
        present = (shown.sum(dim=over) > 0).to(logits.dtype)
        total = total + ((1 - (2 * both + 1) / (whole + 1)) * present).sum() / present.sum().clamp(min=1)
    return total
