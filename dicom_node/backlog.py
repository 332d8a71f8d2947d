"""Slices that were acknowledged while the journal, which knows what revision their series is at, can't be read.

A series that is open needs no journal. One that is not waits here with all that comes of it, the ends of associations
among that, and is opened in one piece: what is told of each of its slices, and in which order, is what would have been
told without the fault. Not for use from several threads: it is the desk's.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import structlog

from dicom_node.storage.journal import JournalError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable
    from pathlib import Path

    from dicom_node.assembler import Assembler, Assembly
    from dicom_node.storage.spool import Instance

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Held:
    """What waits of one series: in its order, from which associations, and how many images."""

    since: float
    events: deque[Callable[[], None]] = field(default_factory=deque)
    senders: set[Hashable] = field(default_factory=set)
    images: int = 0


class Backlog:
    """The way of slices to the assembler.

    Parameters
    ----------
    assembler : takes note of them
    feed : told of slices that are to be analysed
    later : has the desk call something in a few seconds

    """

    def __init__(
        self,
        assembler: Assembler,
        feed: Callable[[Assembly, Iterable[Path]], None],
        later: Callable[[Callable[[], None]], None],
    ) -> None:
        self._assembler, self._feed, self._later = assembler, feed, later
        self._held: dict[tuple[str, str], _Held] = {}  # by study and series UID
        self._is_due = False  # the desk will call

    def images(self) -> int:
        """How many wait."""
        return sum(held.images for held in self._held.values())

    def stored(self, association: Hashable, instance: Instance) -> None:
        """Take note of a new instance, now or when that can be done."""
        key, at = (instance.study_uid, instance.series_uid), time.monotonic()
        event = partial(self._note, association, instance, at)
        if key not in self._held:
            try:
                event()
            except (JournalError, OSError) as error:
                log.warning("series_not_opened", series="/".join(key), reason=str(error), remedy="it is tried again")
                self._held[key] = _Held(at)
            else:
                return
        held = self._held[key]
        held.events.append(event)
        held.senders.add(association)
        held.images += 1
        if self._assembler.is_open(*key):  # for another reason, such as a result that failed
            with suppress(JournalError):
                self._replay(key)
        self._call_later()

    def ended(self, association: Hashable, *, released: bool) -> None:
        """Take note of an association's end; for what waits, when its slices are noted."""
        event = partial(self._assembler.ended, association, released=released)
        event()
        for held in self._held.values():
            if association in held.senders:
                held.events.append(event)

    def announced(self, series_uids: tuple[str, ...]) -> None:
        """Take note that there are new lists of series, now or when that can be done."""
        try:
            self._assembler.announced(series_uids)
        except JournalError:
            self._later(partial(self.announced, series_uids))

    def _note(self, association: Hashable, instance: Instance, at: float) -> None:
        if opened := self._assembler.stored(association, instance, at):
            self._feed(*opened)

    def _again(self) -> None:
        self._is_due = False
        try:
            for key in list(self._held):
                self._replay(key)
        except JournalError:  # it would keep the desk waiting once more for each series
            pass
        finally:
            self._call_later()

    def _replay(self, key: tuple[str, str]) -> None:
        held = self._held[key]
        while held.events:
            event = held.events.popleft()
            try:
                event()
            except JournalError:
                held.events.appendleft(event)
                raise
            except OSError:  # of this series' files
                held.events.appendleft(event)
                return
        del self._held[key]
        after_s = round(time.monotonic() - held.since, 1)
        log.info("series_opened", series="/".join(key), images=held.images, after_s=after_s)

    def _call_later(self) -> None:
        if self._held and not self._is_due:
            self._is_due = True
            self._later(self._again)
