"""Slices to series: which are open, and when one is complete, by evidence. No threads, no clock, no files of its own.

A series closes when one of these holds:

- all that the scanner's performed procedure step lists of it is here, and nothing else;
- an association that brought several of its slices, in one file or in many, was released, none that still sends to it
  is open, or a request for storage commitment lists just what is here; and the slices make a stack without gaps that
  covers a head;
- nothing came for `idle_timeout_s`, or for three times as long as it ever paused. Then, and with a gap, the report is
  provisional and says why.

A slice that comes after that reopens the series as its next revision, with all the slices on disk.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from runtime import geometry
from runtime.errors import GeometryError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
    from pathlib import Path

    from dicom_node.storage.spool import Instance
    from runtime.types import Plane

    History = Callable[[str, str], tuple[int, Sequence[Path], bool]]
    Lists = Callable[[str], tuple[frozenset[str], frozenset[str]]]

PATIENCE = 3  # times the longest pause of a series is no end yet
MOST_PATIENCE = 6  # times `idle_timeout_s` is one in any case


@dataclass(slots=True)
class Assembly:
    """One revision of one series, from its first slice to its result.

    Attributes
    ----------
    study_uid, series_uid, revision : which
    paths : in order of arrival (the keys; a dict for its fast look-up)
    planes : of the slices that the worker has seen in each of them, one or as many as frames; None for one turned away
    feeding : open associations that brought slices
    brought : what came by each association
    ends : of associations that brought slices, in their order, whether they were released
    last_arrival : clock at the last slice
    longest_pause_s : between two of its slices
    listed : names on disk of what the scanner's performed procedure step lists of it; empty where it said nothing
    committed : of what a request for storage commitment lists of it
    missing : set when it closes: why the report is provisional
    closed : the worker has been told to close it
    set_aside : images that no worker is told of any more
    rank : the lower, the sooner its slices are analysed (`dicom_node.analysis.kernel`); what nobody has seen yet comes
        first
    given_up : why no worker is told of it any more but to make a notice

    """

    study_uid: str
    series_uid: str
    revision: int
    last_arrival: float
    paths: dict[Path, None] = field(default_factory=dict)
    planes: dict[Path, tuple[Plane | None, ...]] = field(default_factory=dict)
    feeding: set[Hashable] = field(default_factory=set)
    brought: dict[Hashable, list[Path]] = field(default_factory=dict)
    ends: dict[Hashable, bool] = field(default_factory=dict)
    longest_pause_s: float = 0.0
    listed: frozenset[str] = frozenset()
    committed: frozenset[str] = frozenset()
    missing: tuple[str, ...] = ()
    closed: bool = False
    set_aside: set[Path] = field(default_factory=set)
    rank: tuple[float, ...] = (0.0,)
    given_up: str | None = None
    _partial: tuple[int, bool] = (0, False)  # for how many planes it was last asked, and the answer

    @property
    def name(self) -> str:
        """Unique among all series and revisions; what the worker is told."""
        return f"{self.study_uid}/{self.series_uid}/{self.revision}"

    def here(self) -> set[str]:
        """Names on disk of what has come."""
        return {path.stem for path in self.paths}

    def is_seen(self) -> bool:
        return len(self.planes) == len(self.paths)

    def promises_results(self, min_slices: int) -> bool:
        """Whether it looks like a head for the brain: others have results seldom or never."""
        planes = [plane for of_file in self.planes.values() for plane in of_file if plane]
        return not self.rank[0] and len(planes) >= min_slices

    @property
    def folder(self) -> Path:
        """Its folder in the spool, whose last two parts are safe names for study and series."""
        return next(iter(self.paths)).parent

    @property
    def was_released(self) -> bool | None:
        """Whether the last association that tells something was released, not aborted; None where none tells.

        The release of one that brought a single slice tells nothing. Who broke off may come back and finish.
        """
        for association, released in reversed(self.ends.items()):
            if not released or sum(max(1, len(self.planes.get(path, ()))) for path in self.brought[association]) > 1:
                return released
        return None

    def forget_partial(self) -> None:
        """Have `is_partial` look again."""
        self._partial = (0, False)

    def is_partial(self, min_coverage_mm: float) -> bool:
        """Whether slices are missing between or beyond those there are; what makes no stack is not waited for."""
        if self._partial[0] != len(self.planes):
            slices = enumerate(plane for planes in self.planes.values() for plane in planes if plane)
            try:
                stack = geometry.stack({str(number): plane for number, plane in slices})
                partial = bool(stack.gaps) or stack.coverage_mm < min_coverage_mm
            except GeometryError:
                partial = False
            self._partial = (len(self.planes), partial)
        return self._partial[1]


class Assembler:
    """All open series.

    Parameters
    ----------
    idle_timeout_s : close what has been quiet for this long
    history : for a study and series UID, the last revision that has a result (0: none), the files on disk, and whether
        this node's last result rests on all of them
    lists : for a SeriesInstanceUID, what its step lists and what was asked to be committed, by their names on disk
    min_coverage_mm : slices that cover less are part of a head; the rest is waited for

    """

    def __init__(
        self,
        idle_timeout_s: float,
        history: History,
        lists: Lists = lambda _: (frozenset(), frozenset()),
        *,
        min_coverage_mm: float,
    ) -> None:
        self._idle_timeout_s = idle_timeout_s
        self._min_coverage_mm = min_coverage_mm
        self._history, self._lists = history, lists
        self._assemblies: dict[str, Assembly] = {}  # by name
        self._open: dict[tuple[str, str], Assembly] = {}  # by study and series UID: the newest revision, not closed

    def reload(self, idle_timeout_s: float, min_coverage_mm: float) -> None:
        """Go by other limits, also with the series that are open."""
        self._idle_timeout_s, self._min_coverage_mm = idle_timeout_s, min_coverage_mm
        for assembly in self._assemblies.values():
            assembly.forget_partial()

    def stored(self, association: Hashable, instance: Instance, now: float) -> tuple[Assembly, list[Path]] | None:
        """Take note of a new instance.

        Returns
        -------
        its assembly, and the paths the worker has to be told: this one, or all of them when a series (re)opens; None
        where a result has it, or is being made of it: who waited to be noted may have been found on the disk meanwhile

        """
        key = (instance.study_uid, instance.series_uid)
        assembly = self._open.get(key)
        if assembly is None:
            revision, paths, is_reported = self._history(*key)
            is_closing = any(instance.path in one.paths for one in self._revisions(*key))
            if is_closing or (is_reported and instance.path in paths):
                return None
            assembly = self._begin(*key, revision, paths, now)
            new = list(dict.fromkeys([*assembly.paths, instance.path]))
        else:
            new = [] if instance.path in assembly.paths else [instance.path]
        assembly.paths |= dict.fromkeys(new)
        assembly.feeding.add(association)
        assembly.brought.setdefault(association, []).append(instance.path)
        assembly.longest_pause_s = max(assembly.longest_pause_s, now - assembly.last_arrival)
        assembly.last_arrival = max(assembly.last_arrival, now)  # who waited for the journal came before
        return assembly, new

    def reopen(self, study_uid: str, series_uid: str, now: float) -> Assembly:
        """Open a series with what is on disk, as the revision after the last one finished or being closed."""
        revision, paths, _ = self._history(study_uid, series_uid)
        return self._begin(study_uid, series_uid, revision, paths, now)

    def _revisions(self, study_uid: str, series_uid: str) -> list[Assembly]:
        return [a for a in self._assemblies.values() if (a.study_uid, a.series_uid) == (study_uid, series_uid)]

    def _begin(self, study_uid: str, series_uid: str, revision: int, paths: Sequence[Path], now: float) -> Assembly:
        closing = [one.revision for one in self._revisions(study_uid, series_uid)]
        assembly = Assembly(study_uid, series_uid, max([revision, *closing]) + 1, now)
        assembly.paths = dict.fromkeys(paths)
        assembly.listed, assembly.committed = self._lists(series_uid)
        self._assemblies[assembly.name] = assembly
        self._open[study_uid, series_uid] = assembly
        return assembly

    def announced(self, series_uids: Collection[str]) -> None:
        """Take note that there are new lists of series."""
        for assembly in self._open.values():
            if assembly.series_uid in series_uids:
                assembly.listed, assembly.committed = self._lists(assembly.series_uid)

    def ended(self, association: Hashable, *, released: bool) -> None:
        """Take note of an association's end."""
        for assembly in self._open.values():
            if association in assembly.feeding:
                assembly.feeding.discard(association)
                assembly.ends[association] = released

    def seen(self, name: str, path: Path, planes: tuple[Plane | None, ...]) -> None:
        """Take note of the worker's answer on a file: where its slices lie."""
        if name in self._assemblies:
            self._assemblies[name].planes[path] = planes

    def restarted(self) -> list[Assembly]:
        """Forget what the last worker said; every assembly has to be told to the next one."""
        for assembly in self._assemblies.values():
            assembly.planes = dict.fromkeys(assembly.set_aside, ())
        return list(self._assemblies.values())

    def finished(self, name: str) -> Assembly | None:
        """Forget an assembly that has its result; None for one that is not known (an answer of a worker long dead)."""
        assembly = self._assemblies.pop(name, None)
        if assembly and self._open.get((assembly.study_uid, assembly.series_uid)) is assembly:
            del self._open[assembly.study_uid, assembly.series_uid]
        return assembly

    def progress(self) -> dict[str, tuple[int, int]]:
        """Series without a result yet, by SeriesInstanceUID: images the worker has seen, and images here."""
        return {a.series_uid: (len(a.planes), len(a.paths)) for a in self._assemblies.values()}

    def is_open(self, study_uid: str, series_uid: str) -> bool:
        """Whether a series waits for slices: all that is on disk of it will be in its next result."""
        return (study_uid, series_uid) in self._open

    def arriving(self) -> list[dict[str, Any]]:
        """Series without a result yet, for who looks from another node."""
        keys = ("study_uid", "series_uid", "revision")
        return [
            {**{key: getattr(one, key) for key in keys}, "slices_received": len(one.paths)}
            for one in self._assemblies.values()
        ]

    def unfinished(self) -> int:
        """How many series the worker is at: it has not seen all of their slices, or makes their results."""
        return sum(a.closed or not a.is_seen() for a in self._assemblies.values())

    def due(self, now: float) -> Iterator[Assembly]:
        """Series that close now, one after the other; each is given out once."""
        for assembly in [a for a in self._open.values() if a.is_seen() and self._is_complete(a, now)]:
            assembly.closed = True
            del self._open[assembly.study_uid, assembly.series_uid]
            yield assembly

    def next_deadline(self) -> float | None:
        """Clock at which `due` may have something new without an event; None when there is nothing to wait for.

        A series that the worker has not seen whole waits for its answers, and those are events.
        """
        return min((a.last_arrival + self._patience_s(a) for a in self._open.values() if a.is_seen()), default=None)

    def _patience_s(self, assembly: Assembly) -> float:
        pause_s = PATIENCE * assembly.longest_pause_s
        return min(max(self._idle_timeout_s, pause_s), MOST_PATIENCE * self._idle_timeout_s)

    def _is_complete(self, assembly: Assembly, now: float) -> bool:
        here = assembly.here() if assembly.listed or assembly.committed else set()
        if assembly.listed and here == assembly.listed:
            return True
        awaited = assembly.listed - here
        released = assembly.was_released
        ended = (released and not assembly.feeding) or (bool(here) and here == assembly.committed)
        if ended and not awaited and not assembly.is_partial(self._min_coverage_mm):
            return True
        patience_s = self._patience_s(assembly)
        if now - assembly.last_arrival < patience_s:
            return False
        if awaited:
            why = (
                f"{len(awaited)} of {len(assembly.listed)} images that the scanner's procedure step lists are not here"
            )
        elif released is False:
            why = "the sender broke off or slices were refused"
        else:
            why = "the sender gave no sign that the series is complete"
        if (
            awaited or not released
        ):  # with a clean release only the gap or the coverage is wrong, and the report names it
            assembly.missing = (f"closed after {round(patience_s, 1):g} s without a new slice; {why}",)
        return True
