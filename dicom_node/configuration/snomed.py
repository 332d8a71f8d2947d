"""Whether a SNOMED CT identifier can be one: its last digit checks the others, so that a slip of the pen shows."""

from __future__ import annotations

import re

_TURN = (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)


def is_identifier(value: str) -> bool:
    """Whether the digits satisfy Verhoeff's check (SNOMED CT Release File Specifications, "Check-digit").

    It finds every wrong digit and every swap of neighbours; whether the concept exists, no arithmetic can say.
    """
    if not re.fullmatch(r"[1-9][0-9]{5,17}", value):
        return False
    check = 0
    for place, digit in enumerate(reversed(value)):
        number = int(digit)
        for _ in range(place % 8):
            number = _TURN[number]
        check = _times(check, number)
    return check == 0


def _times(a: int, b: int) -> int:
    """Product in the dihedral group of the pentagon: 0 to 4 turn it, 5 to 9 turn it over first."""
    turned = (a + b if a < 5 else a - b) % 5
    return turned if (a < 5) == (b < 5) else turned + 5
