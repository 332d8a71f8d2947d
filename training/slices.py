"""Training slices: one square size, Hounsfield units, memory-mapped, drawn by step, each with its neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from runtime.geometry import View

if TYPE_CHECKING:
    from numpy.typing import NDArray

MATRIX = 512
SHOWN_PIXELS = 20  # a slice with fewer pixels of a class does not count as showing it


@dataclass(frozen=True)
class Slices:
    """Slices with their truth, memory-mapped.

    Attributes
    ----------
    hu : ``(M, 512, 512)`` int16
    labels : ``(M, 512, 512)`` uint8
    around : ``(N, K)``, for each slice to learn from its place in `hu` between those of its neighbours
    classes : how many classes there are, background included

    """

    hu: NDArray[np.int16]
    labels: NDArray[np.uint8]
    around: NDArray[np.int64]
    classes: int

    def __len__(self) -> int:
        return len(self.around)

    @property
    def own(self) -> NDArray[np.int64]:
        """Places of the slices to learn from, ``(N,)``."""
        return self.around[:, (self.around.shape[1] - 1) // 2]

    @cached_property
    def by_class(self) -> tuple[NDArray[np.int64], ...]:
        """For each class, the indices of the slices that show it; background: those without blood."""
        counts = [np.bincount(self.labels[at].ravel(), minlength=self.classes) for at in self.own]
        shows = np.stack(counts) >= SHOWN_PIXELS
        shows[:, 0] = ~shows[:, 1:].any(axis=1)
        return tuple(np.flatnonzero(shows[:, index]) for index in range(self.classes))

    def pick(self, step: int, batch: int, sampling: str, seed: int) -> NDArray[np.int64]:
        """Which slices a step learns from: a function of seed and step, so that a resumed run goes on as it would have.

        ``"shuffled"`` takes every slice once an epoch; ``"by_class"`` three of four by class of blood, each as often as
        another, and the rest from all slices alike.

        Parameters
        ----------
        step : from 1 on

        """
        if sampling == "shuffled":
            places = np.arange((step - 1) * batch, step * batch)
            return np.array([_permutation(seed, at // len(self), len(self))[at % len(self)] for at in places])
        rng = np.random.default_rng((seed, step))
        shown = [members for members in self.by_class[1:] if len(members)]
        by_class = [shown and rng.random() < 0.75 for _ in range(batch)]
        return np.array(
            [rng.choice(shown[rng.integers(len(shown))]) if one else rng.integers(len(self)) for one in by_class]
        )


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(count)


def places(count: int, shown: int) -> NDArray[np.int64]:
    """Places of each slice of a stack among its neighbours, ``(count, shown)``; itself in the middle."""
    return np.stack([around for around, _ in View(shown).over(count)])
