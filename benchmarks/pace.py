"""How fast the machine itself is at the moment: a virtual one's pace changes within hours, and every figure with it."""

from __future__ import annotations

import time

import numpy as np

from benchmarks.timing import once_ms

ADDITIONS = 1_000_000
RESTED_B, RESTED_S = 16_000_000, 0.1
TIMES = 2


def measure() -> dict[str, list[float]]:
    """A few samples of what takes as long everywhere on a machine at rest.

    ``pace_loop_ms``: a million additions in Python. ``pace_rested_ms``: to read 16 MB that nobody has touched for
    0.1 s, as a scanner's pauses leave a node's memory: on a machine that others share it may take ten times as long.
    """
    values = np.ones(RESTED_B // 8)
    loop, rested = [], []
    for _ in range(TIMES):
        time.sleep(RESTED_S)
        rested.append(round(once_ms(values.sum), 2))
        loop.append(round(once_ms(_add), 2))
    return {"pace_loop_ms": loop, "pace_rested_ms": rested}


def _add() -> None:
    total = 0
    for number in range(ADDITIONS):
        total += number
