"""Lesions in geometries: which of the cases run always."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from training.phantom import Scan


def in_turn(pairs: Sequence[tuple], geometries: Mapping[str, Scan], *slow: str) -> list:
    """Each pair of lesions in each geometry: one pair for each, in turn, and with the slow tests the others, too.

    Parameters
    ----------
    slow : geometries of which all are slow

    """
    cases = []
    for column, (name, scan) in enumerate(geometries.items()):
        for row, pair in enumerate(pairs):
            is_slow = name in slow or (row + column) % len(pairs)
            marks = [pytest.mark.slow] if is_slow else []
            cases.append(pytest.param(scan, pair, id=f"{pair[0]}+{pair[2]}-{name}", marks=marks))
    return cases
