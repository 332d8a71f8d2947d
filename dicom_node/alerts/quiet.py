"""Quiet hours: by the clock on the wall, over midnight, and through the two days a year on which that clock jumps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)\s*-\s*([01]\d|2[0-3]):([0-5]\d)")
_DAY_MIN = 24 * 60


@dataclass(frozen=True, slots=True)
class QuietHours:
    """From one time of the day to another, in minutes after midnight."""

    begin: int
    end: int

    @classmethod
    def parse(cls, text: str) -> QuietHours:
        """Read ``"22:00-06:30"``.

        Raises
        ------
        ValueError

        """
        found = _HOURS.fullmatch(text.strip())
        if found is None:
            raise ValueError('is not two times of the day: write them as "22:00-06:30"')
        hours = cls(*(60 * int(found[at]) + int(found[at + 1]) for at in (1, 3)))
        if hours.begin == hours.end:
            raise ValueError("begins when it ends; leave levels out instead")
        return hours

    def hold(self, at: float) -> bool:
        """Whether the clock on the wall shows one of them, at a time in seconds since the epoch."""
        clock = datetime.fromtimestamp(at).astimezone()
        return (60 * clock.hour + clock.minute - self.begin) % _DAY_MIN < (self.end - self.begin) % _DAY_MIN

    def until(self, now: float) -> float | None:
        """When they end, if they hold at `now`: the first minute after it at which the clock shows none of them."""
        if not self.hold(now):
            return None
        at = now - now % 60 + 60
        while self.hold(at):
            at += 60
        return at
