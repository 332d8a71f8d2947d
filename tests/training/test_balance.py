"""Areas set right by the last biases: in every network, and to the truth's."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.graph import HeadCT
from tests.models.reduced import CLASSES, NAMES, build, picture, settle
from training import balance
from training.recipe import RecipeError
from training.slices import Slices

SIDE = 64


class Bright(nn.Module):
    """Calls blood what is brighter than four fifths, on a scale where the truth begins at one half."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(classes=classes)
        self.head = nn.Conv2d(1, classes, 1)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([0.0, 4.0, -9.0])[-classes:, None, None, None])
            self.head.bias.copy_(torch.tensor([0.0, -3.2, -9.0])[-classes:])
            if classes == 1:
                self.head.weight.fill_(4.0)
                self.head.bias.fill_(-3.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def discs(count: int) -> Slices:
    """Bright in the middle and darker outwards: blood is where it is brighter than one half."""
    rows, columns = np.mgrid[:SIDE, :SIDE] - SIDE / 2
    bright = np.stack([1 - np.hypot(rows, columns) / (24 + place) for place in range(count)]).clip(0, 1)
    around = np.arange(count)[:, None]
    return Slices((100 * bright).astype(np.int16), (bright > 0.5).astype(np.uint8), around, 3)


def area(graph: HeadCT, slices: Slices) -> float:
    with torch.no_grad():
        found = graph(torch.from_numpy(slices.hu[slices.around]))[0].numpy()
    return float(np.median((found == 1).sum(axis=(1, 2)) / (slices.labels == 1).sum(axis=(1, 2))))


@pytest.mark.parametrize("classes", [3, 1])
def test_blood_that_was_drawn_too_small_gets_the_area_of_its_truth(classes: int):
    slices = discs(9)
    graph = HeadCT(Bright(classes), ((0.0, 100.0),), SIDE, max(classes, 2)).eval()
    if classes == 1:
        slices = Slices(slices.hu, slices.labels, slices.around, 2)
    assert area(graph, slices) < 0.25
    by = balance.offsets(graph, slices, seed=0)
    assert by[:2] == [0.0, pytest.approx(1.2, abs=0.1)]
    assert by[2:] == [0.0] * (len(by) - 2), "what no slice shows stays where it is"
    balance.shift(graph.network, by, graph.prepare(torch.from_numpy(slices.hu[:1, None])))
    assert area(graph, slices) == pytest.approx(1, abs=0.05)


def test_a_class_stays_where_it_is_when_chance_may_have_drawn_it_small():
    """Five slices, each too small: one in sixteen by chance, either way."""
    graph = HeadCT(Bright(3), ((0.0, 100.0),), SIDE, 3).eval()
    assert balance.offsets(graph, discs(5), seed=0) == [0.0, 0.0, 0.0]
    assert balance.offsets(graph, discs(6), seed=0) != [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", NAMES)
def test_every_network_has_biases_that_move_its_logits_and_nothing_else(name: str):
    network, multiple = build(name)
    settle(network, 4 * multiple).eval()
    x, by = picture(1, 2 * multiple, 3 * multiple), [0.0, 0.75, -1.5]
    with torch.no_grad():
        before = network(x)
        balance.shift(network, by, picture(1, 4 * multiple, 2 * multiple, seed=2))
        moved = network(x) - before
    assert moved.shape[1] == CLASSES
    torch.testing.assert_close(moved.mean(dim=(0, 2, 3)), torch.tensor(by), atol=1e-4, rtol=0)
    assert moved.std(dim=(0, 2, 3)).max() < 1e-4


def test_a_network_without_such_biases_is_refused_and_left_as_it_was():
    network = Bright(3)
    last = network.head
    network.head = nn.Sequential(last, nn.ReLU())
    kept = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(RecipeError, match=r"training\.balance: no bias of Bright moves its logits alone"):
        balance.shift(network, [0.0, 1.0, 1.0], torch.rand(1, 1, 8, 8))
    assert all(torch.equal(kept[name], value) for name, value in network.state_dict().items())
