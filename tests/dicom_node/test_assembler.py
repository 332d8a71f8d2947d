"""When a series is complete: by evidence, provisional without, reopened by what comes late."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dicom_node.assembler import Assembler, Assembly
from dicom_node.storage.spool import Instance
from tests.runtime.test_geometry import axial

if TYPE_CHECKING:
    from collections.abc import Iterable

TIMEOUT_S = 10.0


class Bench:
    """An assembler with a clock, a disk and a worker of its own."""

    def __init__(self, min_coverage_mm: float = 0) -> None:
        self.disk: dict[str, list[Path]] = {}
        self.revision: dict[str, int] = {}
        self.reported: dict[str, list[Path]] = {}
        self.lists: dict[str, tuple[frozenset[str], frozenset[str]]] = {}
        self.assembler = Assembler(
            TIMEOUT_S,
            lambda _, series: (
                self.revision.get(series, 0),
                self.disk.get(series, []),
                self.reported.get(series) == self.disk.get(series),
            ),
            lambda series: self.lists.get(series, (frozenset(), frozenset())),
            min_coverage_mm=min_coverage_mm,
        )
        self.now = 0.0

    def store(self, z: float, *, association: str = "ct", series: str = "1.2", seen: bool = True) -> list[Path]:
        """A slice at table position `z` arrives; the worker sees it at once unless told otherwise."""
        path = Path(f"/spool/{series}/{z}.dcm")
        instance = Instance("1", series, "ct", f"{series}.{z}", "le", path, "hash")
        self.disk.setdefault(series, []).append(path)
        assembly, new = self.assembler.stored(association, instance, self.now)
        if seen:
            for each in new:
                self.assembler.seen(assembly.name, each, (axial(float(each.stem)),))
        return new

    def list(self, *, step: Iterable[float] = (), committed: Iterable[float] = (), series: str = "1.2") -> None:
        """The scanner lists slices at these table positions."""
        self.lists[series] = frozenset(map(str, step)), frozenset(map(str, committed))
        self.assembler.announced([series])

    def due(self, after_s: float = 0.0) -> list[Assembly]:
        self.now += after_s
        return list(self.assembler.due(self.now))


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_release_with_closed_geometry_closes_at_once_and_final(bench: Bench):
    for z in (0, 5, 10, 15):
        bench.store(z)
        assert bench.due() == []
    bench.assembler.ended("ct", released=True)
    (closed,) = bench.due()
    assert closed.missing == ()
    assert bench.due(1000) == [], "given out twice"


def test_part_of_a_head_is_waited_for():
    """Twelve slices of 5 mm and an orderly release: the lower half, and the rest may follow."""
    bench = Bench(min_coverage_mm=100)
    for z in range(0, 60, 5):
        bench.store(z)
    bench.assembler.ended("ct", released=True)
    assert bench.due() == []
    for z in range(60, 110, 5):
        bench.store(z, association="ct again")
    bench.assembler.ended("ct again", released=True)
    (closed,) = bench.due()
    assert len(closed.paths) == 22


def test_part_of_a_head_closes_when_nothing_more_comes():
    bench = Bench(min_coverage_mm=100)
    for z in range(0, 60, 5):
        bench.store(z)
    bench.assembler.ended("ct", released=True)
    assert len(bench.due(after_s=TIMEOUT_S)) == 1


def store_frames(bench: Bench, name: str, association: str) -> Path:
    """A multi-frame image arrives; the worker has not seen it."""
    path = Path(f"/spool/1.2/{name}.dcm")
    bench.disk.setdefault("1.2", []).append(path)
    bench.assembler.stored(association, Instance("1", "1.2", "enhanced", name, "le", path, "hash"), bench.now)
    return path


@pytest.mark.parametrize("released_first", [True, False])
def test_one_multi_frame_image_is_a_whole_series_when_its_association_is_released(released_first: bool):
    bench = Bench(min_coverage_mm=100)
    path = store_frames(bench, "all", "ct")
    planes = tuple(axial(z) for z in range(0, 120, 5))
    steps = [lambda: bench.assembler.ended("ct", released=True), lambda: bench.assembler.seen("1/1.2/1", path, planes)]
    for step in steps if released_first else steps[::-1]:
        assert bench.due() == []
        step()
    (closed,) = bench.due()
    assert closed.missing == ()


def test_a_series_over_several_multi_frame_images_waits_for_the_rest():
    bench = Bench(min_coverage_mm=100)
    for name, places in (("low", range(0, 60, 5)), ("high", range(60, 110, 5))):
        assert bench.due() == []
        path = store_frames(bench, name, name)
        bench.assembler.seen("1/1.2/1", path, tuple(axial(z) for z in places))
        bench.assembler.ended(name, released=True)
    (closed,) = bench.due()
    assert len(closed.paths) == 2


def test_a_gap_between_frames_is_waited_for_and_an_abort_is_no_end(bench: Bench):
    path = store_frames(bench, "gap", "ct")
    bench.assembler.seen("1/1.2/1", path, tuple(axial(z) for z in (0, 5, 15, 20)))
    bench.assembler.ended("ct", released=True)
    assert bench.due() == []
    filling = store_frames(bench, "rest", "again")
    bench.assembler.seen("1/1.2/1", filling, (axial(10), None))
    bench.assembler.ended("again", released=False)
    assert bench.due() == []
    (closed,) = bench.due(TIMEOUT_S)
    assert "broke off" in closed.missing[0]


def test_a_multi_frame_image_of_one_frame_is_one_slice(bench: Bench):
    """One association for each of them: no sign of the end."""
    for z in (0, 5, 10):
        path = store_frames(bench, str(z), str(z))
        bench.assembler.seen("1/1.2/1", path, (axial(z),))
        bench.assembler.ended(str(z), released=True)
        assert bench.due() == []


def test_nothing_closes_before_the_worker_has_seen_every_slice(bench: Bench):
    bench.store(0)
    bench.store(5, seen=False)
    bench.assembler.ended("ct", released=True)
    assert bench.due(1000) == []
    bench.assembler.seen("1/1.2/1", Path("/spool/1.2/5.dcm"), (axial(5),))
    assert len(bench.due()) == 1


def test_a_gap_waits_for_the_missing_slice_and_then_closes_without_it(bench: Bench):
    for z in (0, 5, 15, 20):
        bench.store(z)
    bench.assembler.ended("ct", released=True)
    assert bench.due(TIMEOUT_S - 1) == []
    (closed,) = bench.due(2)
    assert closed.missing == (), "the gap itself is named by the report"


def test_the_missing_slice_over_a_second_association_closes_the_gap(bench: Bench):
    for z in (0, 5, 15, 20):
        bench.store(z)
    bench.assembler.ended("ct", released=True)
    bench.store(10, association="again")
    assert bench.due() == []
    bench.assembler.ended("again", released=True)
    assert len(bench.due()) == 1


def test_an_association_for_each_slice_is_no_sign_of_the_end(bench: Bench):
    for z in (0, 5, 10, 15):
        bench.store(z, association=str(z))
        bench.assembler.ended(str(z), released=True)
        assert bench.due(1) == []
    (closed,) = bench.due(TIMEOUT_S)
    assert "no sign that the series is complete" in closed.missing[0]


def test_an_abort_waits_for_the_sender_to_come_back(bench: Bench):
    for z in (0, 5, 10):
        bench.store(z)
    bench.assembler.ended("ct", released=False)
    assert bench.due(TIMEOUT_S - 1) == []
    for z in (15, 20):
        bench.store(z, association="back")
    bench.assembler.ended("back", released=True)
    (closed,) = bench.due()
    assert closed.missing == ()


def test_an_abort_without_return_is_named(bench: Bench):
    for z in (0, 5, 10):
        bench.store(z)
    bench.assembler.ended("ct", released=False)
    (closed,) = bench.due(TIMEOUT_S)
    assert "the sender broke off" in closed.missing[0]


def test_two_associations_feed_one_series_and_both_must_end(bench: Bench):
    for z in (0, 5, 10, 15, 20, 25):
        bench.store(z, association="a" if z % 10 else "b")
    bench.assembler.ended("a", released=True)
    assert bench.due() == []
    bench.assembler.ended("b", released=True)
    assert len(bench.due()) == 1


def test_an_open_association_that_has_gone_quiet_does_not_hold_its_series_for_ever(bench: Bench):
    for z in (0, 5, 10):
        bench.store(z)
    assert len(bench.due(TIMEOUT_S)) == 1


def test_series_of_one_association_close_each_for_itself(bench: Bench):
    for z in (0, 5, 10):
        bench.store(z, series="1.2")
        bench.store(z, series="1.3")
    bench.assembler.ended("ct", released=True)
    assert {closed.series_uid for closed in bench.due()} == {"1.2", "1.3"}


def test_a_late_slice_reopens_the_series_as_its_next_revision_with_all_its_slices(bench: Bench):
    for z in (0, 5, 10):
        bench.store(z)
    bench.assembler.ended("ct", released=True)
    (first,) = bench.due()
    bench.assembler.finished(first.name)
    bench.revision["1.2"] = 1
    new = bench.store(15, association="late")
    assert [path.stem for path in new] == ["0", "5", "10", "15"]
    (second,) = bench.due(TIMEOUT_S)
    assert second.revision == 2
    assert len(second.paths) == 4


def test_a_slice_that_comes_while_the_worker_writes_results_is_the_next_revision(bench: Bench):
    for z in (0, 5, 10):
        bench.store(z)
    bench.assembler.ended("ct", released=True)
    (first,) = bench.due()
    bench.store(15, association="late")
    (second,) = bench.due(TIMEOUT_S)
    assert (first.revision, second.revision) == (1, 2)
    assert bench.assembler.finished(first.name) is first
    assert bench.assembler.finished(second.name) is second
    assert bench.assembler.next_deadline() is None


def test_what_a_result_has_or_will_have_opens_nothing(bench: Bench):
    """The slices waited to be noted, and were found on the disk by what opened the series meanwhile."""
    paths = [Path(f"/spool/1.2/{z}.dcm") for z in (0, 5, 10)]
    instances = [Instance("1", "1.2", "ct", path.stem, "le", path, "hash") for path in paths]
    bench.disk["1.2"] = paths
    opened = bench.assembler.reopen("1", "1.2", bench.now)
    for path in paths:
        bench.assembler.seen(opened.name, path, (axial(float(path.stem)),))
    (closed,) = bench.due(TIMEOUT_S)
    assert bench.assembler.stored("ct", instances[0], bench.now) is None, "its result is being made"
    bench.assembler.finished(closed.name)
    bench.revision["1.2"], bench.reported["1.2"] = 1, list(paths)
    assert [bench.assembler.stored("ct", each, bench.now) for each in instances] == [None] * 3
    assert bench.assembler.progress() == {}
    assert len(bench.store(15)) == 4, "what is new opens it"
    (second,) = bench.due(TIMEOUT_S)
    assert second.revision == 2


def test_how_long_nothing_came_is_told_in_tenths_of_a_second(bench: Bench):
    for z, pause_s in ((0, 4.102846), (5, 0), (10, 0)):
        bench.store(z)
        bench.now += pause_s
    (closed,) = bench.due(2 * TIMEOUT_S)
    assert closed.missing[0].startswith("closed after 12.3 s without a new slice")


def test_images_the_worker_turned_away_close_with_their_association(bench: Bench):
    """A dose report: no planes, no gaps, nothing to wait for."""
    for z in (0, 1):
        bench.store(z, seen=False)
        bench.assembler.seen("1/1.2/1", Path(f"/spool/1.2/{z}.dcm"), (None,))
    bench.assembler.ended("ct", released=True)
    assert len(bench.due()) == 1


def test_a_new_worker_is_told_everything(bench: Bench):
    for z in (0, 5, 10):
        bench.store(z)
    bench.store(0, series="1.3")
    bench.assembler.ended("ct", released=True)
    closed = bench.due()
    assert [each.series_uid for each in closed] == ["1.2"]
    told = bench.assembler.restarted()
    assert {(each.series_uid, len(each.paths), each.closed) for each in told} == {("1.2", 3, True), ("1.3", 1, False)}


def test_what_the_worker_has_not_seen_gives_no_deadline(bench: Bench):
    """Its answers are events; a deadline in the past would keep the desk awake for nothing."""
    bench.store(0, seen=False)
    assert bench.assembler.next_deadline() is None


def test_an_image_set_aside_counts_as_seen_for_the_next_worker(bench: Bench):
    bench.store(0)
    bench.store(5, seen=False)
    (assembly,) = bench.assembler.restarted()
    assembly.set_aside.add(Path("/spool/1.2/5.dcm"))
    bench.assembler.restarted()
    bench.assembler.seen(assembly.name, Path("/spool/1.2/0.dcm"), (axial(0),))
    assert len(bench.due(TIMEOUT_S)) == 1


def test_the_deadline_is_that_of_the_series_quiet_for_longest(bench: Bench):
    assert bench.assembler.next_deadline() is None
    bench.store(0, series="1.2")
    bench.now = 4
    bench.store(0, series="1.3")
    assert bench.assembler.next_deadline() == TIMEOUT_S


def test_what_the_step_lists_closes_the_series_at_once_and_final(bench: Bench):
    """No release, one association a slice, a gap: the scanner says that this is all."""
    bench.store(0, association="a")
    bench.list(step=(0, 5, 15))
    bench.store(5, association="b")
    assert bench.due() == []
    bench.store(15, association="c")
    (closed,) = bench.due()
    assert closed.missing == ()


def test_a_slice_that_the_step_lists_and_that_is_not_here_is_waited_for_and_named(bench: Bench):
    for z in (0, 5, 10):
        bench.store(z)
    bench.list(step=(0, 5, 10, 15))
    bench.assembler.ended("ct", released=True)
    assert bench.due() == []
    (closed,) = bench.due(after_s=TIMEOUT_S)
    assert "1 of 4 images that the scanner's procedure step lists are not here" in closed.missing[0]


def test_a_step_that_lists_less_than_is_here_proves_nothing(bench: Bench):
    for z in (0, 5, 10):
        bench.store(z)
    bench.list(step=(0, 5))
    assert bench.due() == []
    assert len(bench.due(after_s=TIMEOUT_S)) == 1


def test_a_list_known_before_the_first_slice_counts(bench: Bench):
    bench.list(step=(0, 5))
    bench.store(0)
    assert bench.due() == []
    bench.store(5)
    assert len(bench.due()) == 1


def test_a_request_for_commitment_of_all_that_is_here_is_as_good_as_a_release():
    bench = Bench(min_coverage_mm=20)
    for z in (0, 5, 10):
        bench.store(z, association=f"one {z}")
    bench.list(committed=(0, 5, 10))
    assert bench.due() == [], "part of a head"
    bench.store(15, association="one 15")
    assert bench.due() == [], "one slice more than was listed"
    bench.list(committed=(0, 5, 10, 15))
    (closed,) = bench.due()
    assert closed.missing == ()


def test_who_pauses_is_waited_for_three_times_as_long_and_not_for_ever(bench: Bench):
    bench.store(0)
    assert bench.due(after_s=6) == []
    bench.store(5)
    assert bench.assembler.next_deadline() == pytest.approx(6 + 18)
    assert bench.due(after_s=17.9) == []
    assert len(bench.due(after_s=0.1)) == 1
    bench.store(0, series="1.3")
    bench.now += 9.9
    bench.store(5, series="1.3")
    bench.now += 29
    bench.store(10, series="1.3")
    assert bench.assembler.next_deadline() == pytest.approx(bench.now + 6 * TIMEOUT_S)


@pytest.mark.parametrize(("slices", "rank", "promises"), [(5, (0.0,), True), (4, (0.0,), False), (5, (1.0,), False)])
def test_a_head_for_the_brain_promises_results(bench: Bench, slices: int, rank: tuple[float, ...], promises: bool):
    for z in range(slices):
        bench.store(z)
    bench.store(9.0, seen=False)
    (assembly,) = bench.assembler.restarted()
    for z in range(slices):
        bench.assembler.seen(assembly.name, Path(f"/spool/1.2/{z}.dcm"), (axial(z),))
    bench.assembler.seen(assembly.name, Path("/spool/1.2/9.0.dcm"), (None,))
    assembly.rank = rank
    assert assembly.promises_results(5) == promises
