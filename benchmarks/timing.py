"""Wall-clock times of a call, alike in every benchmark."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WARM_UP = 10
WARM_UP_S, LEAST_S, LEAST_ROUNDS = 0.2, 3.0, 10  # as trtexec has them


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


def once_ms(work: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    began = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - began)


def in_turn_ms(*works: Callable[[], object], seconds: float = LEAST_S) -> list[list[float]]:
    """Milliseconds of each call of several pieces of work, one after the other, so that noise meets all alike.

    Warmed up first; then for so many seconds of all together, and ten times in any case.
    """
    until = time.perf_counter() + min(WARM_UP_S, seconds)
    while True:
        for work in works:
            work()
        if time.perf_counter() >= until:
            break
    took: list[list[float]] = [[] for _ in works]
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(took[0]) < LEAST_ROUNDS:
        for times, work in zip(took, works, strict=True):
            times.append(once_ms(work))
    return took
