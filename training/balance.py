"""Areas set right after the last step: biases that let each class cover as many pixels as its truth does.

A network that learns by overlap draws thin and pale blood too small, and millilitres are what the node reports. So the
last layer's biases are moved until the median slice of the training side, unaugmented, has as many pixels of a class as
its truth; of classes, that is, whose areas are too small or too large more often than chance would have it. Nothing is
added to the network, and no slice that scores it is looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import stats
from torch.nn import functional

from training.recipe import RecipeError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from models.graph import HeadCT
    from training.slices import Slices

REACH = 2.0  # logits: as far as a class is moved, up or down
SLICES = 150  # of each class that are looked at, by chance
PIXELS = 100  # of a class that a slice shows at least to count
CHANCE = 0.05  # of a sign test, two-sided: above it a class stays where it is
SWEEPS, HALVINGS = 8, 12


@torch.no_grad()
def offsets(graph: HeadCT, training: Slices, seed: int) -> list[float]:
    """Logits to add to each class, background's 0, so that the median slice has its truth's area of every class."""
    graph.eval()
    rng = np.random.default_rng(seed)
    chosen = np.unique(np.concatenate([rng.permutation(members)[:SLICES] for members in training.by_class[1:]]))
    device = next(graph.parameters()).device
    settled, truth, logits, places = [], [], [], []
    for place, index in enumerate(chosen):
        own = training.labels[training.own[index]]
        hu = torch.from_numpy(training.hu[training.around[index]])[None].to(device)
        found = graph.complete(graph.network(graph.prepare(hu)))
        found = functional.interpolate(found, size=own.shape, mode="bilinear", align_corners=False)[0]
        first, second = found.topk(2, dim=0).values
        near = first - second < 2 * REACH  # all others stay with their class, whatever is added
        settled.append(np.bincount(found.argmax(0)[~near].cpu().numpy(), minlength=training.classes))
        truth.append(np.bincount(own.ravel(), minlength=training.classes))
        logits.append(found[:, near].T.cpu().numpy())
        places.append(np.full(len(logits[-1]), place))
    return _fit(np.stack(settled), np.stack(truth), np.concatenate(logits), np.concatenate(places))


def _fit(
    settled: NDArray[np.int64], truth: NDArray[np.int64], logits: NDArray[np.float32], places: NDArray[np.int64]
) -> list[float]:
    """Class after class by halving, several times over, for what one gains another loses.

    Parameters
    ----------
    settled, truth : pixels by slice and class: those that no offset moves, and those of the truth
    logits, places : ``(P, classes)`` of the other pixels, and the slice of each

    """
    added = np.zeros(truth.shape[1], np.float32)

    def ratios(own: int) -> NDArray[np.float64]:
        cells = places * truth.shape[1] + (logits + added).argmax(axis=1)
        areas = settled + np.bincount(cells, minlength=truth.size).reshape(truth.shape)
        shows = truth[:, own] >= PIXELS
        return areas[shows, own] / truth[shows, own]

    classes = [own for own in range(1, len(added)) if _are_off(ratios(own))]
    for _ in range(SWEEPS):
        for own in classes:
            low, high = -REACH, REACH
            for _ in range(HALVINGS):
                added[own] = (low + high) / 2
                low, high = (added[own], high) if np.median(ratios(own)) < 1 else (low, added[own])
    return added.tolist()


def _are_off(ratios: NDArray[np.float64]) -> bool:
    """Whether more of them lie on one side of 1 than chance explains."""
    return len(ratios) > 0 and stats.binomtest(int((ratios < 1).sum()), len(ratios)).pvalue < CHANCE


@torch.no_grad()
def shift(network: nn.Module, by: list[float], example: Tensor) -> None:
    """Add to each class's logits for good, by the biases that make them.

    Parameters
    ----------
    by : logits, one per class; where the network has but one logit, background's is left out
    example : an input of the network's

    Raises
    ------
    RecipeError : no bias of the network moves its logits and nothing else

    """
    network.eval()
    classes = network.config.classes
    steps = example.new_tensor(by[-classes:])
    before = network(example)
    for bias in reversed([one for one in network.parameters() if one.ndim == 1 and one.numel() % classes == 0]):
        kept = bias.clone()
        bias.add_(steps.repeat_interleave(bias.numel() // classes))  # PixelShuffle: one class after another
        moved = (network(example) - before).movedim(1, -1)
        if torch.allclose(moved, steps.expand_as(moved), atol=1e-3):
            return
        bias.copy_(kept)
    raise RecipeError(f"training.balance: no bias of {type(network).__name__} moves its logits alone")
