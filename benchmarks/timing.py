"""Wall-clock times of a call, alike in every benchmark of a GPU."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WARM_UP = 10


def percentiles(took: Sequence[float]) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(took, p)), 4) for p in (50, 90, 99)}


def wall_ms(work: Callable[[], object], rounds: int) -> dict[str, float]:
    """Milliseconds of a call, after some to warm up."""
    took = []
    for i in range(rounds + WARM_UP):
        began = time.perf_counter()
        work()
        if i >= WARM_UP:
            took.append(1e3 * (time.perf_counter() - began))
    return percentiles(took)
