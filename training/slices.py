"""Training slices: one size, Hounsfield units, memory-mapped, drawn by step, each with its neighbours."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from runtime.geometry import View

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

MATRIX = 512  # of phantoms, and of what comes in several sizes
SHOWN_PIXELS = 20  # a slice with fewer pixels of a class does not count as showing it


@dataclass(frozen=True)
class Slices:
    """Slices with their truth, memory-mapped.

    Attributes
    ----------
    hu : ``(M, H, W)`` int16
    labels : ``(M, H, W)`` uint8
    around : ``(N, K)``, for each view to learn from the places in `hu` of the slices that it shows
    classes : how many classes there are, background included
    left_out : slices that the source has and these have not, by reason

    """

    hu: NDArray[np.int16]
    labels: NDArray[np.uint8]
    around: NDArray[np.int64]
    classes: int
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.around)

    @property
    def own(self) -> NDArray[np.int64]:
        """Place of the slice in the middle of each view, ``(N,)``."""
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
