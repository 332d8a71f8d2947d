"""Which layers bear 8 bits: each of them alone against FP32, and then the fewest left out that keep the budget."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    import onnx
    from numpy.typing import NDArray

    from runtime.verdict import Budget

    Place = Callable[[onnx.ModelProto, Mapping[str, tuple[float, float]], Collection[str]], onnx.ModelProto]

SHARE = 0.5  # of the budget that the search may spend: a verdict is given on other series


@dataclass(frozen=True, slots=True)
class Agreement:
    """A quantised graph beside FP32 on the same views.

    Attributes
    ----------
    dice : of each class of which FP32 shows enough pixels to compare
    area_percent : change of each such class's pixels

    """

    dice: Mapping[str, float]
    area_percent: Mapping[str, float]

    @property
    def loss(self) -> float:
        """1 - Dice of the worst class."""
        return 1 - min(self.dice.values())

    def within(self, budget: Budget) -> bool:
        """Hold the search's share of the budget."""
        return self.loss <= SHARE * (1 - budget.dice) and all(
            abs(change) <= SHARE * budget.volume_percent for change in self.area_percent.values()
        )


@dataclass(frozen=True, slots=True)
class Search:
    """What a search found.

    Attributes
    ----------
    alone : loss of each layer with nothing else quantised, worst first
    left_out : layers that stay FP32, in the order in which they were given up
    path : agreement with none of them left out, with the first, and so on; the last is what was chosen
    inside : whether that keeps the budget

    """

    alone: Mapping[str, float]
    left_out: tuple[str, ...]
    path: tuple[Agreement, ...]
    inside: bool


class Scorer:
    """FP32's labels of some views, to hold quantised graphs against."""

    LEAST_PIXELS = 500  # of a class over all views, below which one pixel decides

    def __init__(self, model: onnx.ModelProto, views: Sequence[NDArray[np.int16]], classes: Sequence[str]) -> None:
        self._views, self._classes = [view[None].astype(np.int32) for view in views], classes
        self._reference = self._labels(model)

    def _labels(self, model: onnx.ModelProto) -> list[NDArray[np.uint8]]:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return [session.run(["labels"], {"hu": view})[0] for view in self._views]

    def compare(self, model: onnx.ModelProto) -> Agreement:
        agreed, first, second = (np.zeros(len(self._classes), np.int64) for _ in range(3))
        for one, two in zip(self._reference, self._labels(model), strict=True):
            agreed += np.bincount(one[one == two].ravel(), minlength=len(agreed))
            first += np.bincount(one.ravel(), minlength=len(agreed))
            second += np.bincount(two.ravel(), minlength=len(agreed))
        told = {name: self._classes.index(name) for name in self.told}
        return Agreement(
            {name: float(2 * agreed[c] / (first[c] + second[c])) for name, c in told.items()},
            {name: float(100 * (second[c] / first[c] - 1)) for name, c in told.items()},
        )

    @cached_property
    def told(self) -> list[str]:
        """Classes of which FP32 shows enough pixels to compare."""
        shown = np.sum([np.bincount(one.ravel(), minlength=len(self._classes)) for one in self._reference], axis=0)
        return [self._classes[c] for c in range(1, len(shown)) if shown[c] >= self.LEAST_PIXELS]


def search(
    model: onnx.ModelProto,
    place: Place,
    span: Mapping[str, tuple[float, float]],
    layers: Sequence[str],
    scorer: Scorer,
    budget: Budget,
    on_graph: Callable[[int], None] = lambda _: None,
) -> Search:
    """Scan the layers one by one, then give up the worst until what is left keeps the budget.

    Parameters
    ----------
    place : `calibration.placement.for_tensorrt` or `for_onnxruntime`
    on_graph : called after each graph that was tried

    """
    alone = {}
    for layer in layers:
        alone[layer] = scorer.compare(place(model, span, [layer])).loss
        on_graph(1)
    worst_first = sorted(layers, key=lambda layer: -alone[layer])
    path: list[Agreement] = []
    for count in range(len(layers)):  # with none of them left, it would be FP32 by another name
        path.append(scorer.compare(place(model, span, worst_first[count:])))
        on_graph(1)
        if path[-1].within(budget):
            break
    return Search(
        alone={layer: alone[layer] for layer in worst_first},
        left_out=tuple(worst_first[: max(len(path) - 1, 0)]),
        path=tuple(path),
        inside=bool(path) and path[-1].within(budget),
    )
